"""Objectives: what each hides, asks for and lets see; a rate in a name is its own; they train, and a branch knows them."""
from dataclasses import replace

import numpy as np
import pytest
from conftest import rows as logged

import objectives
import train
from core.configurator import UserError
from pretraining import data


@pytest.fixture(scope="module")
def rows(corpus_dir):
    c = data.DataSettings(block_size=64, batch_rows=16, seed=3)
    corpus = data.Corpus(corpus_dir)
    return data.read_rows(corpus, np.arange(400), np.zeros(400, int), c), corpus, c


def test_a_name_that_ends_in_a_digit_is_not_taken_for_a_rate(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "every3", objectives.OBJECTIVES["mlm"])
    assert objectives.split_name("every3") == ("every3", None) and objectives.split_name("mlm3") == ("mlm", 0.03)


def test_mntp_hides_what_mlm_hides_and_asks_one_position_earlier_under_the_full_mask(rows):
    mlm, mntp = objectives.mlm(*rows), objectives.mntp(*rows)
    assert np.array_equal(mlm[0], mntp[0]) and not objectives.OBJECTIVES["mntp"].is_causal and not objectives.OBJECTIVES["mlm"].is_causal
    first = np.zeros(len(mlm[0]), bool)
    first[rows[0].cu_seqlens[:-1]] = True
    hidden = np.flatnonzero(mlm[1] & ~first)                     # a sequence's first token has nobody to predict it
    assert np.array_equal(np.flatnonzero(mntp[1]), hidden - 1) and (mlm[1] & first).any()
    assert np.array_equal(mntp[2][hidden - 1], rows[0].tokens[hidden])


def test_cmlm_is_mlm_under_the_causal_mask_and_clm40_is_clm_with_as_many_targets_as_mlm40(rows):
    cmlm = objectives.OBJECTIVES["cmlm"]
    assert cmlm.prepare is objectives.mlm and cmlm.is_causal and cmlm.hides_tokens
    clm, clm40 = objectives.clm(*rows), objectives.clm(*rows, 0.4)
    assert np.array_equal(clm[0], clm40[0]) and np.array_equal(clm[2], clm40[2]) and objectives.OBJECTIVES["clm"].is_causal
    assert (clm40[1] <= clm[1]).all() and abs(clm40[1].sum() / clm[1].sum() - 0.4) < 4 * (0.24 / clm[1].sum()) ** 0.5


def test_a_rate_in_the_name_is_its_own(rows):
    _, corpus, c = rows
    def batch(objective, rate):
        return data.make_batch(corpus, np.arange(16), np.zeros(16, int), objective, replace(c, mask_rate=rate))
    assert batch("mlm", 0.2).num_targets == batch("mlm20", 0.4).num_targets < batch("mlm50", 0.4).num_targets
    assert len(batch("mlm20", 0.4).positions) == len(batch("mlm", 0.2).positions)          # the static shape, too
    assert batch("clm", 0.4).num_targets == batch("clm100", 0.1).num_targets == 16 * 62


@pytest.mark.parametrize("phases", [(("mntp40", 6), ("cmlm", 6)), (("clm40", 4), ("mlm50", 4), ("mlm20", 4)), tuple((o, 3) for o in ("clm", "mlm40") * 2)])
def test_every_objective_trains_and_its_loss_falls(tiny, phases):
    c = tiny("run", phases=phases)
    train.main(c)
    found = logged(c.out_dir)
    assert [r["phase"] for r in found] == [o for o, n in phases for _ in range(n)]
    assert found[-1]["loss"] < found[0]["loss"]


def test_a_branch_may_change_what_the_trunk_never_used(tiny, tmp_path):
    train.main(tiny("trunk", phases=(("mlm40", 12),), mask_rate=0.4))
    trunk = str(tmp_path / "trunk" / "step_0000008")
    with pytest.raises(UserError, match="mask_replace"):
        train.main(tiny("a", branch_from=trunk, phases=(("mlm40", 8), ("mlm20", 8)), mask_replace=(0.8, 0.1, 0.1)))
    with pytest.raises(UserError, match="step 0 would be mlm20, but"):
        train.main(tiny("b", branch_from=trunk, phases=(("mlm20", 16),)))
    train.main(tiny("c", branch_from=trunk, phases=(("mlm40", 8), ("mlm20", 8)), mask_rate=0.3))      # mask_rate: never used


@pytest.mark.parametrize("name", ["mlm0", "mlm101", "rtd", "40", "", "MLM"])
def test_an_unknown_objective_is_named_with_the_known_ones(name):
    with pytest.raises(UserError, match="objectives are clm, mlm, mntp, cmlm"):
        train.check(train.Config(phases=((name, 100),), warmup_steps=1, decay_steps=1), 1)
