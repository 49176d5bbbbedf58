"""One checkpoint writes and fills; the same seed writes the same."""
import json
import re

import pytest
import torch
from conftest import run_python

import sample
import train
from core import checkpoint
from core.configurator import UserError

ARGS = dict(max_new_tokens=20, num_samples=3)


def model_and_tokenizer(run):
    path = checkpoint.find(run)
    return checkpoint.load_model(path), checkpoint.tokenizer_of(path)


def test_a_text_continues_its_prompt_by_the_models_own_probabilities(encoder):
    model, tok = model_and_tokenizer(encoder)
    with torch.no_grad():
        # a second of training tells few tokens apart
        model.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    c = sample.Config(temperature=0.0, max_new_tokens=12)
    text, = sample.generate(model, tok, "The state of", c, "cpu")

    # the long way: one sequence, every logit
    prompt = tok.encode("The state of")
    ids = list(prompt)
    never = [i for i in range(model.config.vocab_size) if i not in tok.known_ids or i == tok.mask_id]
    for _ in range(12):
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(ids), cu_seqlens, True))[-1]
        logits[never] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] == tok.eos_id:
            break
    assert tok.decode(ids[len(prompt):]).startswith(text)


def test_samples_are_many_reproducible_and_without_masks(encoder):
    model, tok = model_and_tokenizer(encoder)

    def write(**settings):
        return sample.generate(model, tok, "", sample.Config(**settings), "cpu")
    texts = write(**ARGS, seed=1)
    assert texts == write(**ARGS, seed=1) != write(**ARGS, seed=2)
    assert len(set(texts)) == 3 and "<|mask|>" not in "".join(texts)
    # past the 128 tokens of the context
    assert len(write(max_new_tokens=140, num_samples=2, temperature=9.0, top_k=0)) == 2
    assert len(set(write(**ARGS, top_k=1, temperature=9.0))) == 1
    # a head that would write nothing but the mask
    with torch.no_grad():
        hidden = model(torch.tensor([tok.eos_id]), torch.tensor([0, 1], dtype=torch.int32), True)[0]
        model.lm_head.weight[tok.mask_id] = 100 * hidden / hidden.norm()
    text, = write(max_new_tokens=3, temperature=0.0)
    assert text and "<|mask|>" not in text


def test_a_gap_sees_both_sides_and_takes_the_space_before_it(encoder):
    model, tok = model_and_tokenizer(encoder)

    def first_gap(text):
        return sample.fill(model, tok, text, 5, "cpu")[0]
    candidates = first_gap("The [MASK] of the Union")
    tokens, probabilities = zip(*candidates)
    assert candidates == first_gap("The<|mask|> of the Union") == first_gap("The  [MASK] of the Union")
    assert len(candidates) == 5 and list(probabilities) == sorted(probabilities, reverse=True)
    assert candidates != first_gap("The [MASK] of the Senate")              # what follows counts
    assert len(sample.fill(model, tok, "[MASK] [MASK] and [MASK]", 1, "cpu")) == 3

    # the long way: every logit
    ids = [*tok.encode("The"), tok.mask_id, *tok.encode(" of the Union"), tok.eos_id]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), False))
    best = logits[len(tok.encode("The"))].softmax(-1).topk(5)
    assert list(probabilities) == pytest.approx(best.values.tolist(), abs=1e-6)
    assert list(tokens) == [tok.decode([i]) for i in best.indices.tolist()]


def test_comparing_shows_each_checkpoint_in_its_column(encoder):
    a, b = f"{encoder}/step_0000020", f"{encoder}/step_0000040"        # before and after the swap
    done = run_python(["sample.py", "--compare", a, b, "--fill", "The [MASK] of the [MASK]"], env={"COLUMNS": "400"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "mask 1" and "mask 2" in lines and lines[1].split() == [a, b]
    for column, path in enumerate((a, b)):
        (text, p), *_ = sample.fill(*model_and_tokenizer(path), "The [MASK] of the [MASK]", 5, "cpu")[0]
        assert f"{p:.2%}" in lines[3].split()[2 * column]
    done = run_python(["sample.py", f"--ckpt={b}", "--prompt=Peace", "--max_new_tokens=5", "--num_samples=2"])
    assert done.returncode == 0 and done.stdout.count("Peace") == 2 and "sample 2" in done.stdout, done.stderr


def noted(capsys, path, **settings):
    """What sample.py notes on stderr while a checkpoint continues a prompt."""
    sample.main(sample.Config(ckpt=str(path), max_new_tokens=2, device="cpu", **settings))
    return capsys.readouterr().err


def test_a_prompt_for_a_model_that_ended_on_mlm_is_continued_and_a_note_names_the_end_of_its_clm_phase(encoder, tmp_path, capsys):
    clm, mlm = f"{encoder}/step_0000020", f"{encoder}/step_0000040"
    for settings in ({"prompt": "Peace"}, {}):
        said = noted(capsys, encoder, **settings)
        assert f"note: {mlm} was not last trained to continue texts: --ckpt={clm} was" in said and said.count("note:") == 1
    assert "note:" not in noted(capsys, clm, prompt="Peace") and "note:" not in noted(capsys, mlm, fill="The [MASK]")

    # A branch that is MLM from its first step on, and a new schedule: the CLM phase is another run's.
    shared = dict(size="tiny", block_size=128, batch_rows=8, micro_rows=8, dtype="float32", eval_interval=40, eval_rows=16, save_interval=40,
                  compile=False, device="cpu", data_dir=json.load(open(f"{encoder}/config.json"))["settings"]["data_dir"], learning_rate=3e-3)
    train.main(train.Config(out_dir=str(tmp_path / "branch"), branch_from=clm, phases=(("clm", 20), ("mlm", 4)), warmup_steps=4, decay_steps=0, **shared))
    train.main(train.Config(out_dir=str(tmp_path / "cpt"), init_from=str(tmp_path / "branch"), phases=(("mlm", 2),), warmup_steps=0, decay_steps=0, **shared))
    train.main(train.Config(out_dir=str(tmp_path / "mlm"), phases=(("mlm", 2),), warmup_steps=0, decay_steps=0, **shared))
    capsys.readouterr()
    for run in ("branch", "cpt"):
        assert f"--ckpt={clm} was" in noted(capsys, tmp_path / run, prompt="Peace")
    assert "--fill shows what it has learned" in noted(capsys, tmp_path / "mlm", prompt="Peace")


@pytest.mark.parametrize("settings, message", [
    ({}, "which checkpoint?"),
    ({"ckpt": "a", "compare": ("b",)}, "which checkpoint?"),
    ({"ckpt": "x", "prompt": "a", "fill": "b"}, "give one of them"),
    ({"ckpt": "x", "num_samples": 10**9}, "at most 1,000"),
])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sample.main(sample.Config(**settings))


def test_a_wrong_call_is_one_line(encoder):
    for words, message in ((["--ckpt=nowhere"], "no checkpoint at nowhere"),
                           ([f"--ckpt={encoder}", "--fill=nothing is missing"], "there is no [MASK] in it")):
        done = run_python(["sample.py", *words])
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
