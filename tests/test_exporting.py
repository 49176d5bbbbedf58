"""An exported model is one that everybody can load: a fresh process without this repository computes the same."""
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_python
from safetensors.torch import load_file
from test_eval_ir import worker

import finetune
import hf
import objectives
import sample
import train
from core import checkpoint, tokenizer
from core.configurator import UserError
from huggingface import exporting, history, importing
from huggingface import weights as hf_weights
from huggingface.model_card import auto_class
from model import SIZES, Encoder, ModelConfig, SequenceHead, TokenHead
from retrieval import tokens

TEXTS = ["The state of the Union is strong.", "Peace!", "1 12 123 1234: naïve café — 中文\n\n\t x", ("We the people of the United States " * 9).strip()]
FILL = "The state of [MASK] is strong, and the [MASK] of our people, too."
ROPE3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# more kinds of models than a run of train.py has; each leaves as an encoder and, but for the first, as a decoder
SHAPES = {"gqa": dict(n_head=4, n_kv_head=2), "tied": dict(tied=True), "wide_heads": dict(head_dim=24, rope_theta=250_000.0),
          "scaled": dict(rope_scaling=ROPE3, rope_theta=500_000.0), "biased": dict(qkv_bias=True, tied=True), "normed": dict(qk_norm=True)}


def write_random(folder, tok, change=None, head=None, state=None, **shape):
    """A run with one checkpoint of random weights that matter. change: a function that a fork does to the model"""
    torch.manual_seed(3)
    model = Encoder(ModelConfig(**SIZES["tiny"] | {"vocab_size": tok.vocab_size, "block_size": 128} | shape))
    if change:
        change(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.ndim == 2 else 1.0).add_(0.2 * torch.randn_like(p) if p.ndim == 1 else 0.0)
    os.makedirs(folder)
    tokenizer.save(tok, folder)
    imported = {"causal": True, "source": "x", "revision": None}
    return checkpoint.save(folder, 0, model, {"settings": {"tokenizer_hash": tok.hash.hex()}, "imported": imported} | (state or {}), head=head)


def load_in_a_fresh_process(jobs, tmp):
    """jobs for load_exported.py -> its results and tensors"""
    out = str(tmp / "results.json")
    done = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "load_exported.py"), json.dumps(jobs), out], capture_output=True,
                          text=True, timeout=300, cwd=str(tmp), env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.load(open(out)), load_file(out + ".safetensors")


def our_hidden_states(run, texts, causal, close_with_eos=True):
    """-> the model, ids of each text, hidden states [T, C] and cu_seqlens of all of them packed"""
    path = checkpoint.find(run)
    model = checkpoint.load_model(path)
    tok = checkpoint.tokenizer_of(path)
    ids = [tok.encode(text) for text in texts]
    if close_with_eos:
        ids = [[*i, tok.eos_id] for i in ids]
    ends = torch.tensor([len(i) for i in ids]).cumsum(0).tolist()
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    with torch.no_grad():
        return model, ids, model(torch.tensor(sum(ids, [])), cu_seqlens, causal), cu_seqlens


def check_close(tensor, expected, tolerance=1e-4):
    assert tensor.shape == expected.shape and expected.abs().max() > 0.05
    assert (tensor - expected).abs().max() <= tolerance


def expected_class(name, is_causal):
    if name == "normed":
        return "Qwen3ForCausalLM"
    return "LlamaForCausalLM" if is_causal else "EuroBertForMaskedLM"


def test_exported_models_have_our_logits_ids_answers_and_embeddings_in_a_fresh_process(encoder, ir, tmp_path):
    """The trained encoder as all that it can be loaded as; random models of every shape, as encoder and as decoder."""
    tok = checkpoint.tokenizer_of(checkpoint.find(encoder))
    runs, jobs = {"trained": encoder}, {}
    for name, shape in SHAPES.items():
        runs[name] = str(tmp_path / name)
        write_random(runs[name], tok, **shape)
    for name, run in runs.items():
        for causal in (True, False):
            if name == "normed" and not causal:
                with pytest.raises(UserError, match="no native encoder with norms on q and k"):
                    exporting.export(run, str(tmp_path / "no"), causal="false")
                continue
            folder = str(tmp_path / f"{name}_{causal}_exported")
            exporting.export(run, folder, causal=str(causal).lower())
            classes = ["AutoModelForCausalLM"] if causal else ["AutoModelForMaskedLM", "AutoModel"]
            jobs[f"{name}.{causal}"] = {"folder": folder, "texts": TEXTS, "classes": classes}
    trained = jobs["trained.False"]
    trained["classes"] += ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"]
    trained |= {"fill": FILL, "sentences": [*TEXTS, "A text that is longer than the encoder's context. " * 30 + "So it is cut."]}
    results, tensors = load_in_a_fresh_process(jobs, tmp_path)

    # ids, logits and hidden states, of each text alone and in a padded batch
    for job_name, job in jobs.items():
        name, _, causal = job_name.partition(".")
        is_causal = causal == "True"
        model, ids, hidden, cu_seqlens = our_hidden_states(runs[name], TEXTS, is_causal, close_with_eos=not is_causal)
        assert results[job_name]["ids"] == ids and results[job_name]["specials"] == [tok.eos_id, tok.eos_id, tok.mask_id]
        auto = job["classes"][0]
        loaded = results[job_name][auto]
        assert loaded["class"] == expected_class(name, is_causal)
        assert (loaded["missing"], loaded["unexpected"], loaded["theta"]) == ([], [], model.config.rope_theta)
        with torch.no_grad():
            logits = model.logits(hidden)
        for i, (s, e) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
            check_close(tensors[f"{job_name}.{auto}.{i}"], logits[s:e])
            check_close(tensors[f"{job_name}.{auto}"][i, :e - s], logits[s:e])
            if not is_causal:
                check_close(tensors[f"{job_name}.AutoModel.{i}"], hidden[s:e])
                check_close(tensors[f"{job_name}.AutoModel"][i, :e - s], hidden[s:e])

    # a head that the checkpoint does not have is the only thing that transformers misses
    heads = results["trained.False"]
    assert heads["AutoModelForSequenceClassification"] | {"theta": 0, "unexpected": 0} == {
        "class": "EuroBertForSequenceClassification", "missing": ["classifier.bias", "classifier.weight", "dense.bias", "dense.weight"], "unexpected": 0,
        "labels": ["LABEL_0", "LABEL_1"], "theta": 0}
    assert heads["AutoModelForTokenClassification"]["missing"] == ["classifier.bias", "classifier.weight"]

    # the words for the gaps of a text
    our_gaps = sample.fill(checkpoint.load_model(encoder), tok, FILL, 4, "cpu")
    for gap, our_gap in zip(heads["fill"], our_gaps, strict=True):
        assert [tok.decode([i]) for i, _, _ in gap] == [text for text, _ in our_gap]
        assert [p for _, _, p in gap] == pytest.approx([p for _, p in our_gap], abs=1e-5)

    # embeddings as eval_ir.py computes them
    our_worker = worker(ir())
    assert heads["max_seq_length"] == our_worker.max_length
    for kind, prefix in (("query", "Query: "), ("document", "Document: "), ("plain", "")):
        texts = [(i, prefix + text) for i, text in enumerate(trained["sentences"])]
        encoded, _ = tokens.cached_tokens("texts", lambda texts=texts: texts, tok, our_worker.max_length, (kind,), str(tmp_path / "cache"))
        check_close(tensors[f"trained.False.sentences.{kind}"], our_worker.embeddings(encoded, "texts"), 1e-5)


def test_fine_tuned_heads_leave_with_their_labels_and_our_logits(encoder, tmp_path):
    c = finetune.Config(ckpt=encoder, tasks="demo", out_dir=str(tmp_path / "out"), lrs=(3e-3,), seeds=(0,), steps=3, dtype="float32", device="cpu",
                        keep=True, cache_dir=str(tmp_path / "cache"))
    finetune.main(c)
    jobs, kinds = {}, {"sotu_era": "Sequence", "sotu_case": "Token", "sotu_cloze": "Token"}
    for task, kind in kinds.items():
        folder = str(tmp_path / f"{task}_exported")
        about, _ = exporting.export(f"{c.out_dir}/trials/{task}/lr3e-03_sd0.encoder", folder)
        assert auto_class(about["architectures"][0]) == f"AutoModelFor{kind}Classification"
        jobs[task] = {"folder": folder, "texts": TEXTS, "classes": [f"AutoModelFor{kind}Classification"]}
        card = open(os.path.join(folder, "README.md")).read()
        assert f"{task}: 3 steps, learning rate 0.003, seed 0" in card and "20 steps CLM, then 20 steps MLM at 40% masking" in card
    with pytest.raises(UserError, match="is fine-tuned: only an encoder can be exported"):
        exporting.export(f"{c.out_dir}/trials/sotu_era/lr3e-03_sd0.encoder", str(tmp_path / "no"), causal="true")
    causal = finetune.Config(**{**vars(c), "tasks": "sotu_case", "causal": True, "out_dir": str(tmp_path / "causal")})
    finetune.main(causal)
    for wish in ("auto", "false"):         # an encoder's class would give its head another mask than it was trained under
        with pytest.raises(UserError, match="is fine-tuned: only an encoder can be exported with its head"):
            exporting.export(f"{causal.out_dir}/trials/sotu_case/lr3e-03_sd0.encoder", str(tmp_path / "no"), causal=wish)
    results, tensors = load_in_a_fresh_process(jobs, tmp_path)
    for task, kind in kinds.items():
        run, auto = f"{c.out_dir}/trials/{task}/lr3e-03_sd0.encoder", f"AutoModelFor{kind}Classification"
        labels = checkpoint.read_state(checkpoint.find(run))["fine_tuned"]["labels"] or ["start", "end"]
        loaded = results[task][auto]
        assert (loaded["class"], loaded["labels"]) == (f"EuroBertFor{kind}Classification", labels)
        assert loaded["missing"] == loaded["unexpected"] == []
        model, _, hidden, cu_seqlens = our_hidden_states(run, TEXTS, False)
        head = (SequenceHead if kind == "Sequence" else TokenHead)(model.config.n_embd, len(labels))
        head.load_state_dict(load_file(os.path.join(checkpoint.find(run), "head.safetensors")))
        with torch.no_grad():
            logits = head(hidden, cu_seqlens)
        for i, (s, e) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
            if kind == "Token":
                check_close(tensors[f"{task}.{auto}"][i, :e - s], logits[s:e], 1e-5)
            else:
                check_close(tensors[f"{task}.{auto}"][i], logits[i], 1e-5)


def test_what_leaves_comes_back_as_it_was(encoder, tmp_path):
    """Weights to the bit, ids, and the mask token; also a bias that an encoder of theirs has on the attention's output and ours has not."""
    tok = checkpoint.tokenizer_of(checkpoint.find(encoder))
    write_random(str(tmp_path / "biased"), tok, qkv_bias=True, tied=True)
    for run in (encoder, str(tmp_path / "biased")):
        folder = str(tmp_path / f"{os.path.basename(run)}_exported")
        exporting.export(run, folder, causal="false")
        back = importing.read(folder)
        before = checkpoint.load_model(run)
        assert back.config == before.config and all(torch.equal(back.weights[k], v) for k, v in before.state_dict().items())
        assert (back.tokenizer.mask_id, back.tokenizer.eos_id, back.facts["mask"]) == (tok.mask_id, tok.eos_id, "the model's own")
        assert all(back.tokenizer.encode(text) == tok.encode(text) for text in TEXTS)


def test_the_mean_of_checkpoints_is_their_mean(tiny, tmp_path):
    train.main(tiny("run", save_interval=5))
    run = str(tmp_path / "run")
    steps = [checkpoint.step_of(path) for path in checkpoint.all_of(run)]
    assert steps == [5, 10, 12, 15, 16, 20]                # with the swap of objectives and the start of the decay
    done = run_python(["hf.py", "export", run, str(tmp_path / "mean"), "--average", "3"])
    assert done.returncode == 0 and "mean of steps 15, 16, 20" in done.stdout, done.stderr
    checkpoints = [load_file(os.path.join(run, f"step_{s:07d}", "model.safetensors")) for s in steps[-3:]]
    mean = importing.read(str(tmp_path / "mean"), weights_only=True).weights
    for name in checkpoints[0]:
        tensors = [weights[name] for weights in checkpoints]
        assert torch.allclose(mean[name], sum(tensors) / 3, atol=1e-7)
    assert "mean of the checkpoints of steps 15, 16, 20" in open(tmp_path / "mean" / "README.md").read()
    with pytest.raises(UserError, match="has 4 checkpoints up to step_0000015"):
        exporting.export(os.path.join(run, "step_0000015"), str(tmp_path / "too_many"), average=5)


def test_a_checkpoint_leaves_under_the_mask_it_was_trained_under_last(tiny, tmp_path):
    train.main(tiny("run"))
    assert exporting.export(str(tmp_path / "run"), str(tmp_path / "newest"))[0]["model_type"] == "eurobert"
    assert exporting.export(str(tmp_path / "run" / "step_0000012"), str(tmp_path / "trunk"))[0]["model_type"] == "llama"     # CLM until then


def test_a_new_causal_objective_leaves_as_a_decoder_also_after_it_is_gone(tiny, tmp_path, monkeypatch):
    """The checkpoint records the facts of its objectives: an export neither parses names nor needs the objective's code."""
    clm = objectives.OBJECTIVES["clm"]
    with monkeypatch.context() as m:
        m.setitem(objectives.OBJECTIVES, "backwards", objectives.Objective(clm.prepare, is_causal=True, hides_tokens=False, most_targets=clm.most_targets))
        train.main(tiny("run", phases=(("mlm", 4), ("backwards", 8))))
    about, _ = exporting.export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert about["model_type"] == "llama" and "4 steps MLM at 40% masking, then 8 steps BACKWARDS; this is step 12" in open(tmp_path / "out" / "README.md").read()
    assert exporting.export(str(tmp_path / "run" / "step_0000004"), str(tmp_path / "before"))[0]["model_type"] == "eurobert"


def test_a_checkpoint_that_records_no_objectives_asks_objectives_py():
    old = {"settings": {"phases": [["mlm20", 5], ["cmlm", 5]]}}
    assert not history.was_causal(old | {"step": 5}) and history.was_causal(old | {"step": 6})
    assert objectives.recorded_objectives(old)["mlm20"] == {"is_causal": False, "hides_tokens": True, "rate": 0.2}
    with pytest.raises(UserError, match="does not record its objectives, and objectives.py does not know them: objectives are clm"):
        history.was_causal({"settings": {"phases": [["backwards", 5]]}, "step": 5})


# ---- what a fork adds is not dropped in silence

def layer_norm(model):
    for block in model.blocks:
        block.norm_1 = torch.nn.LayerNorm(model.config.n_embd)


def no_final_norm(model):
    model.norm = torch.nn.Identity()


def wide_mlp(model):
    model.blocks[1].mlp.down = torch.nn.Linear(2 * model.config.n_ffn, model.config.n_embd, bias=False)


def with_head(**tensors):
    head = TokenHead(64, 2)
    for name, value in tensors.items():
        setattr(head, name, value)
    return head


@pytest.mark.parametrize("change, message", [
    (layer_norm, "this checkpoint has tensors that the export does not know: blocks.0.norm_1.bias, blocks.1.norm_1.bias; add them to names() in huggingface/weights.py"),
    (lambda m: m.add_module("pooler", torch.nn.Linear(8, 8)), "does not know: pooler.bias, pooler.weight; add them"),
    (no_final_norm, "this checkpoint lacks tensors that the export needs: norm.weight; change names()"),
    (wide_mlp, "blocks.1.mlp.down.weight has the shape [64, 256], and the export expects [64, 128]")])
def test_a_model_with_other_tensors_is_refused_by_name(change, message, encoder, tmp_path):
    tok = checkpoint.tokenizer_of(checkpoint.find(encoder))
    write_random(str(tmp_path / "run"), tok, change=change, vocab_size=320)
    with pytest.raises(UserError, match=re.escape(message)):
        exporting.export(str(tmp_path / "run"), str(tmp_path / "out"), causal="false")
    assert os.listdir(tmp_path) == ["run"]


def test_a_setting_that_a_fork_added_to_the_model_is_refused_by_name():
    @dataclasses.dataclass
    class ForksConfig(ModelConfig):
        parallel_blocks: bool = False
    c = ForksConfig(**SIZES["tiny"], vocab_size=320)
    assert hf_weights.write_config(c, causal=False)["model_type"] == "eurobert"
    c.parallel_blocks = True
    with pytest.raises(UserError, match=re.escape("does not know ModelConfig.parallel_blocks=True: add it to write_config()")):
        hf_weights.write_config(c, causal=False)


@pytest.mark.parametrize("kind, head, message", [
    ("token", with_head(gate=torch.nn.Linear(64, 2, bias=False)), "head.safetensors has tensors that the export does not know: gate.weight; add them to HEADS"),
    ("sequence", with_head(), "head.safetensors lacks tensors that the export needs: dense.bias, dense.weight"),
    ("ranking", with_head(), "has a head for tasks of the kind ranking, which the export does not know")])
def test_a_fine_tuned_head_with_other_tensors_is_refused_by_name(kind, head, message, encoder, tmp_path):
    tok = checkpoint.tokenizer_of(checkpoint.find(encoder))
    tuned = {"kind": kind, "task": "sst2", "model": "x", "labels": ["a", "b"], "mode": "standard", "steps": 3, "lr": 1e-3, "seed": 0}
    write_random(str(tmp_path / "run"), tok, head=head, state={"fine_tuned": tuned}, vocab_size=320)
    with pytest.raises(UserError, match=re.escape(message)):
        exporting.export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["run"]


def test_an_export_leaves_its_neighbours_alone_also_when_it_fails(encoder, tmp_path, monkeypatch):
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "out.writing" / "thesis.txt").write_text("all my work")
    exporting.export(encoder, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["out", "out.writing"] and os.listdir(tmp_path / "out.writing") == ["thesis.txt"]

    def full(*args, **kwargs):
        raise OSError("no space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError):
        exporting.export(encoder, str(tmp_path / "second"))
    assert sorted(os.listdir(tmp_path)) == ["out", "out.writing"]


def test_hf_py_loads_only_what_it_uses(encoder, tmp_path):
    """An import does not load the export, nor the other way round, and neither the parts of the repository that it does not need."""
    code = "import json, sys, hf; hf.main(hf.Config(args=tuple(sys.argv[1:]))); print(json.dumps(sorted(sys.modules)))"
    loaded = {}
    for words in (("export", encoder, str(tmp_path / "out")), ("import", str(tmp_path / "out"), str(tmp_path / "back"))):
        done = run_python(["-c", code, *words])
        assert done.returncode == 0, done.stderr
        loaded[words[0]] = set(json.loads(done.stdout.splitlines()[-1]))
        for name in ("tasks", "retrieval", "pretraining", "corpus", "experiments", "transformers", "datasets"):
            assert name not in loaded[words[0]], f"{words[0]} loads {name}"
    assert "huggingface.importing" not in loaded["export"] and "huggingface.exporting" not in loaded["import"]
    assert not {"huggingface.model_card", "huggingface.history", "objectives"} & loaded["import"]


def test_an_export_overwrites_nothing_and_explains_itself(encoder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    done = run_python(["hf.py", "export", encoder, str(tmp_path / "mine")])
    assert done.returncode == 2 and "already exists: choose another folder" in done.stderr and done.stderr.count("\n") == 1
    for c, message in ((hf.Config(args=("export", str(tmp_path / "nowhere"), "x")), "no checkpoint at"),
                       (hf.Config(args=("publish", encoder, "x")), "unknown command 'publish'"),
                       (hf.Config(average=0, args=("export", encoder, str(tmp_path / "y"))), "average=0"),
                       (hf.Config(causal="maybe", args=("export", encoder, str(tmp_path / "y"))), "causal=maybe")):
        with pytest.raises(UserError, match=re.escape(message)):
            hf.main(c)
    assert sorted(os.listdir(tmp_path / "mine")) == ["thesis.txt"] and not os.path.exists(tmp_path / "y")
    done = run_python(["hf.py", "export", encoder, str(tmp_path / "out")])
    card = open(tmp_path / "out" / "README.md").read()
    assert done.returncode == 0 and "pipeline_tag: fill-mask" in card
    assert "20 steps CLM, then 20 steps MLM at 40% masking" in card and "validation loss | CLM" in card
    for _, _, files in os.walk(tmp_path / "out"):
        assert not [name for name in files if name.endswith((".bin", ".pt", ".py"))]
