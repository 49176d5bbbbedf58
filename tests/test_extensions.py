"""What README calls "change one thing": each test adds one in the test itself, in as many lines as README says, and trains with it.

The ones for task families, collections, attention and exports stand in tests/test_extensions_*.py.
"""
import os

import numpy as np
import pytest
import torch
from conftest import files, losses, rows

import model
import objectives
import train
from core import checkpoint
from core.configurator import UserError
from objectives import OBJECTIVES, Objective


def resumed_run_equals_an_undisturbed_one(tiny, tmp_path, **changes):
    """Train 20 steps at once, and again with a stop after 10. -> the folder of the second run"""
    changes = {"save_interval": 10} | changes
    train.main(tiny("at_once", **changes))
    train.main(tiny("stopped", **changes))
    for name in os.listdir(tmp_path / "stopped"):
        if name.startswith("step_") and name != "step_0000010":
            os.rename(tmp_path / "stopped" / name, tmp_path / name)      # as if it had been killed after step 10
    train.main(tiny("stopped", **changes))
    assert losses(str(tmp_path / "stopped")) == losses(str(tmp_path / "at_once"))
    last = checkpoint.path_of(str(tmp_path / "stopped"), 20)
    assert files(last) == files(checkpoint.path_of(str(tmp_path / "at_once"), 20))
    return str(tmp_path / "stopped")


def test_a_new_objective_is_a_function_and_an_entry_of_six_lines_together(tiny, tmp_path, monkeypatch):
    def skip(rows, corpus, settings, rate):      # every token predicts the one after the next
        has_target = np.ones(len(rows.tokens), bool)
        last_tokens = rows.cu_seqlens[1:] - 1
        has_target[last_tokens] = has_target[last_tokens - 1] = False
        return rows.tokens, has_target, np.roll(rows.tokens, -2)
    monkeypatch.setitem(OBJECTIVES, "skip", Objective(skip, is_causal=True, hides_tokens=False, most_targets=objectives.most_targets_of_clm))

    run = resumed_run_equals_an_undisturbed_one(tiny, tmp_path, phases=(("skip", 12), ("mlm", 8)))
    assert losses(run)[11] < losses(run)[0]
    state = checkpoint.read_state(checkpoint.path_of(run, 20))
    assert state["objectives"]["skip"] == {"is_causal": True, "hides_tokens": False, "rate": None}
    # it is also a trunk to branch from, and mask_replace did not matter to it
    train.main(tiny("branch", branch_from=checkpoint.path_of(run, 10), phases=(("skip", 10), ("mlm", 10)), mask_replace=(0.8, 0.1, 0.1)))


def test_a_new_size_is_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(model.SIZES, "nano", dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64))
    run = resumed_run_equals_an_undisturbed_one(tiny, tmp_path, size="nano")
    assert checkpoint.load_model(run).config.n_embd == 32
    with pytest.raises(UserError, match="size: nano then, tiny now"):
        train.main(tiny("stopped", size="tiny", save_interval=10))


class LayerNorm(torch.nn.LayerNorm):
    def __init__(self, width, eps):
        super().__init__(width, eps)


def test_a_new_norm_is_a_class_of_three_lines(tiny, tmp_path, monkeypatch):
    train.main(tiny("rms"))
    monkeypatch.setattr(model, "RMSNorm", LayerNorm)
    run = resumed_run_equals_an_undisturbed_one(tiny, tmp_path)
    assert "norm.bias" in checkpoint.load_model(run).state_dict()
    with pytest.raises(UserError, match="lacks blocks.0.norm_1.bias, and the model here has it"):
        checkpoint.load_model(str(tmp_path / "rms"))


@pytest.mark.parametrize("make", [lambda model, c: torch.optim.SGD(model.parameters(), lr=c.learning_rate, momentum=0.9),
                                  lambda model, c: torch.optim.AdamW(model.parameters(), lr=c.learning_rate, amsgrad=True, foreach=True)],
                         ids=["SGD", "AMSGrad"])
def test_another_optimizer_is_one_function_and_its_state_is_saved_and_resumed(tiny, tmp_path, monkeypatch, make):
    monkeypatch.setattr(train, "configure_optimizer", make)
    run = resumed_run_equals_an_undisturbed_one(tiny, tmp_path, learning_rate=1e-2)
    assert losses(run)[-1] < losses(run)[0]


class Interrupted(Exception):
    """What an out-of-memory error, a bug of a fork or a preemption does to a validation."""


def test_a_crash_in_validation_does_not_cost_the_steps_checkpoint_and_the_next_start_validates(tiny, tmp_path, monkeypatch):
    real = train.validate

    def crash_at(step):
        def validate(*arguments):
            if os.path.isdir(checkpoint.path_of(str(tmp_path / "run"), step)):
                raise Interrupted
            return real(*arguments)
        monkeypatch.setattr(train, "validate", validate)

    for step in (10, 20):      # 20 is the last: a finished run without its last validation is not finished
        crash_at(step)
        with pytest.raises(Interrupted):
            train.main(tiny("run", eval_interval=10, save_interval=10))
        assert checkpoint.latest(str(tmp_path / "run")) == checkpoint.path_of(str(tmp_path / "run"), step)
    monkeypatch.setattr(train, "validate", real)
    train.main(tiny("run", eval_interval=10, save_interval=10))
    train.main(tiny("undisturbed", eval_interval=10, save_interval=10))
    for validation in (False, True):
        found, expected = (rows(str(tmp_path / name), validation) for name in ("run", "undisturbed"))
        keys = {"step", "loss", "val_clm_loss", "val_mlm_loss", "targets"}
        assert [{k: row[k] for k in keys & row.keys()} for row in found] == [{k: row[k] for k in keys & row.keys()} for row in expected]
