"""An attention of your own is a function and one entry in kernels.ATTENTION: train.py trains and resumes with it."""
import os
import shutil

import pytest
from conftest import files, losses

import kernels
import train
from core import checkpoint
from core.configurator import UserError
from kernels import reference

calls = []


def my_attention(q, k, v, cu_seqlens, causal):
    """Somebody's own attention. q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]"""
    calls.append(causal)
    return reference.attention(q, k, v, cu_seqlens, causal)


@pytest.fixture
def added(monkeypatch):
    """What a fork does in its own file: one entry."""
    calls.clear()
    monkeypatch.setitem(kernels.ATTENTION, "mine", my_attention)


def test_an_added_attention_trains_and_resumes_to_the_same_bytes(added, tiny):
    settings = dict(attention="mine", phases=(("clm", 4), ("mlm", 4)), decay_steps=2, save_interval=4, eval_interval=8, log_interval=1)
    whole, resumed = tiny("whole", **settings), tiny("resumed", **settings)
    train.main(whole)
    assert True in calls and False in calls      # both masks went through it
    train.main(resumed)
    shutil.rmtree(checkpoint.path_of(resumed.out_dir, 8))
    calls.clear()
    train.main(resumed)                          # from step 4
    assert calls and losses(resumed.out_dir) == losses(whole.out_dir)
    assert files(checkpoint.path_of(resumed.out_dir, 8)) == files(checkpoint.path_of(whole.out_dir, 8))


def test_it_computes_what_the_built_in_one_computes(added, tiny):
    settings = dict(phases=(("mlm", 4),), warmup_steps=2, decay_steps=2, save_interval=4, eval_interval=4, log_interval=1)
    for name in ("mine", "sdpa"):
        train.main(tiny(name, attention=name, **settings))
    out_dir = os.path.dirname(tiny().out_dir)
    assert losses(os.path.join(out_dir, "mine")) == pytest.approx(losses(os.path.join(out_dir, "sdpa")), abs=1e-5)


@pytest.mark.parametrize("name", ["flash9", "mien"])
def test_a_wrong_name_is_refused_and_the_added_one_is_among_those_that_are_offered(added, tiny, name):
    with pytest.raises(UserError, match=f"attention={name}: expected auto or one of .*mine"):
        train.main(tiny(attention=name))
