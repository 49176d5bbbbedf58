"""Folders that an earlier version wrote (commit db58a97, tests/data/old) still load, resume, continue and are reported."""
import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, rows, run_python

import finetune
import train
from core import checkpoint
from model import SIZES
from pretraining import data

OLD = os.path.join(ROOT, "tests", "data", "old")
SETTINGS = dict(size="nano", block_size=64, batch_rows=8, micro_rows=8, phases=(("clm", 10), ("mlm", 10)), warmup_steps=2,
                decay_steps=4, learning_rate=3e-3, eval_interval=10, eval_rows=8, save_interval=5, keep_last=9, log_interval=5,
                dtype="float32", compile=False, device="cpu")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old folders, and the size that their model has."""
    monkeypatch.setitem(SIZES, "nano", dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64))
    return shutil.copytree(OLD, tmp_path / "old")


def test_an_old_checkpoint_gives_the_hidden_states_it_gave_then(old):
    model = checkpoint.load_model(str(old / "run"))
    tokens = torch.arange(40) % 300
    cu_seqlens = torch.tensor([0, 15, 40], dtype=torch.int32)
    for causal, total, size in ((True, -107.66286, 0.86663646), (False, -343.54071, 0.93805373)):
        with torch.no_grad():
            hidden = model(tokens, cu_seqlens, causal)
        assert hidden.sum().item() == pytest.approx(total, abs=1e-2) and hidden.abs().mean().item() == pytest.approx(size, abs=1e-5)


def test_an_old_corpus_is_read_and_an_old_run_resumes_across_the_swap_to_the_losses_it_had_then(old):
    assert data.Corpus(str(old / "corpus")).n_tokens == 56_242
    then = rows(str(old / "run")), rows(str(old / "run"), validation=True)
    assert [row["step"] for row in then[0]] == list(range(1, 21))
    train.main(train.Config(data_dir=str(old / "corpus"), out_dir=str(old / "run"), **SETTINGS))
    now = rows(str(old / "run")), rows(str(old / "run"), validation=True)
    assert now[0][:10] == then[0][:10]
    for old_row, row in zip(then[0][10:] + then[1][1:], now[0][10:] + now[1][1:], strict=True):
        for key in ("step", "phase", "tokens", "targets", "flops"):
            assert row[key] == old_row[key]
        for key in ("loss", "lr", "grad_norm", "val_clm_loss", "val_mlm_loss"):
            assert row.get(key) == pytest.approx(old_row.get(key), abs=1e-4)
    assert os.path.isdir(old / "run" / "step_0000020")


def test_an_old_grid_is_finished_grows_and_is_reported(old, tmp_path, capsys):
    row = old / "grid" / "trials" / "mood" / "lr1e-03_sd0.json"
    before = row.read_bytes()
    settings = dict(ckpt=str(old / "run" / "step_0000010"), tasks="mood", data_dir=str(old / "tasks"), out_dir=str(old / "grid"), lrs=(1e-3,),
                    steps=8, batch=8, dtype="float32", device="cpu", cache_dir=str(tmp_path / "cache"))
    finetune.main(finetune.Config(seeds=(0, 1), **settings))
    assert row.read_bytes() == before
    scores = [json.loads(path.read_text())["test"]["score"] for path in sorted(row.parent.glob("lr*.json"))]
    assert len(scores) == 2
    # the same trial again gives the same row
    finetune.main(finetune.Config(seeds=(0,), **settings | {"out_dir": str(old / "again")}))
    again = json.loads((old / "again" / "trials" / "mood" / "lr1e-03_sd0.json").read_text())
    then = json.loads(before)
    assert again["test"]["score"] == pytest.approx(then["test"]["score"], abs=0.05)
    assert [loss for _, loss in again["train_loss"]] == pytest.approx([loss for _, loss in then["train_loss"]], abs=1e-4)
    done = run_python(["report.py", str(old / "grid"), f"--to={tmp_path}/report"])
    assert done.returncode == 0 and "| run-10 |" in done.stdout and "mood" in done.stdout, done.stdout + done.stderr
