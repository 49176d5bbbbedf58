"""One checkpoint writes and fills; the same seed says the same."""
import re

import pytest
import torch
from conftest import run_python

import sample
from core import checkpoint
from core.configurator import UserError

ARGS = dict(max_new_tokens=20, num_samples=3)


def model_and_tokenizer(run):
    path = checkpoint.find(run)
    return checkpoint.load_model(path), checkpoint.tokenizer_of(path)


def test_a_text_goes_on_from_its_prompt_by_the_models_own_probabilities(encoder):
    model, tok = model_and_tokenizer(encoder)
    with torch.no_grad():
        model.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))       # a second of training tells few tokens apart
    c = sample.Config(temperature=0.0, max_new_tokens=12)
    text, = sample.generate(model, tok, "The state of", c, "cpu")
    ids = tok.encode("The state of")
    for _ in range(12):          # one sequence, every logit: what generate takes a shorter way to
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), True))[-1]
        logits[[i for i in range(len(logits)) if i not in tok.known_ids or i == tok.mask_id]] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] == tok.eos_id:
            break
    assert tok.decode(ids[len(tok.encode("The state of")):]).startswith(text)


def test_samples_are_many_reproducible_and_without_masks(encoder):
    model, tok = model_and_tokenizer(encoder)
    one, again, other = (sample.generate(model, tok, "", sample.Config(**ARGS, seed=s), "cpu") for s in (1, 1, 2))
    assert one == again != other and len(set(one)) == 3 and "<|mask|>" not in "".join(one)
    assert len(sample.generate(model, tok, "", sample.Config(max_new_tokens=140, num_samples=2, temperature=9.0, top_k=0), "cpu")) == 2   # past 128
    assert len(set(sample.generate(model, tok, "", sample.Config(**ARGS, top_k=1, temperature=9.0), "cpu"))) == 1
    with torch.no_grad():                                       # a head that would say nothing but the mask
        hidden = model(torch.tensor([tok.eos_id]), torch.tensor([0, 1], dtype=torch.int32), True)[0]
        model.lm_head.weight[tok.mask_id] = 100 * hidden / hidden.norm()
    text, = sample.generate(model, tok, "", sample.Config(max_new_tokens=3, temperature=0.0), "cpu")
    assert text and "<|mask|>" not in text


def test_a_gap_sees_both_sides_and_takes_the_space_before_it(encoder):
    model, tok = model_and_tokenizer(encoder)
    one, = sample.fill(model, tok, "The [MASK] of the Union", 5, "cpu")
    assert one == sample.fill(model, tok, "The<|mask|> of the Union", 5, "cpu")[0] == sample.fill(model, tok, "The  [MASK] of the Union", 5, "cpu")[0]
    assert len(one) == 5 and [p for _, p in one] == sorted((p for _, p in one), reverse=True)
    assert one != sample.fill(model, tok, "The [MASK] of the Senate", 5, "cpu")[0]              # what follows counts
    assert len(sample.fill(model, tok, "[MASK] [MASK] and [MASK]", 1, "cpu")) == 3
    ids = [*tok.encode("The"), tok.mask_id, *tok.encode(" of the Union"), tok.eos_id]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), False))
    best = logits[len(tok.encode("The"))].softmax(-1).topk(5)
    assert [p for _, p in one] == pytest.approx(best.values.tolist(), abs=1e-6) and [t for t, _ in one] == [tok.decode([i]) for i in best.indices.tolist()]


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


@pytest.mark.parametrize("settings, says", [({}, "which checkpoint?"), ({"ckpt": "a", "compare": ("b",)}, "which checkpoint?"),
                                            ({"ckpt": "x", "prompt": "a", "fill": "b"}, "give one of them"), ({"ckpt": "x", "show": 0}, "at least 1")])
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(UserError, match=re.escape(says)):
        sample.main(sample.Config(**settings))


def test_a_wrong_call_is_one_line(encoder):
    for words, says in ((["--ckpt=nowhere"], "no checkpoint at nowhere"), ([f"--ckpt={encoder}", "--fill=nothing is missing"], "there is no [MASK] in it")):
        done = run_python(["sample.py", *words])
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
