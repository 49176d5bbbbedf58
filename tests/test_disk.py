"""What lies on the disk is checked before it is used: checkpoints, corpora and logs that were changed by hand, by a crash or by a stranger."""
import errno
import json
import os
import shutil
import stat

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import train
from core import checkpoint
from core.configurator import UserError
from huggingface import exporting
from model import SIZES, Encoder

OLD = os.path.join(ROOT, "tests", "data", "old")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 20 steps with a checkpoint at step 10: its folder."""
    monkeypatch.setitem(SIZES, "nano", dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64))
    return shutil.copytree(os.path.join(OLD, "run"), tmp_path / "run")


def write_sums(path):
    """Make SHA256SUMS say that a checkpoint is intact."""
    lines = [f"{checkpoint.sha256(path / name)}  {name}\n" for name in sorted(os.listdir(path)) if name != "SHA256SUMS"]
    (path / "SHA256SUMS").write_text("".join(lines))


def change_tensors(run, file, change):
    """Change one file of tensors in the run's checkpoint, checksums included. -> its path"""
    path = run / "step_0000010"
    tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
    change(tensors)
    save_file(tensors, path / file)
    write_sums(path)
    return str(path)


def load(path):
    """The checkpoint's weights and optimizer state in a fresh model."""
    model = Encoder(checkpoint.config_of(path))
    checkpoint.load(path, model, train.configure_optimizer(model, train.Config()))


NORM = "norm.weight"


# ---- weights and optimizer state

def nan_in(name):
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan"))


@pytest.mark.parametrize("change, says", [
    (nan_in("blocks.1.mlp.down.weight"), "blocks.1.mlp.down.weight holds NaN or infinity"),
    (lambda t: t[NORM].fill_(float("inf")), "norm.weight holds NaN or infinity"),
    (lambda t: t.update({NORM: t[NORM][:-1].clone()}), r"norm.weight has the shape \[31\], and the model here has \[32\]"),
    (lambda t: t.update({NORM: t[NORM].long()}), "norm.weight holds int64, not floating-point numbers"),
    (lambda t: t.update({NORM: t[NORM].bool()}), "norm.weight holds bool, not floating-point numbers"),
    (lambda t: t.pop(NORM), "lacks norm.weight"),
    (lambda t: t.update(more=t[NORM].clone()), "has more, and the model here lacks it"),
])
def test_weights_that_are_not_the_models_are_refused_by_name(run, change, says):
    path = change_tensors(run, "model.safetensors", change)
    for use in (load, checkpoint.load_model):       # train.py; finetune.py, eval_ir.py and sample.py
        with pytest.raises(UserError, match=says):
            use(path)


@pytest.mark.parametrize("change, says", [
    (lambda t: t.update({f"exp_avg.{NORM}": torch.zeros(1)}), r"exp_avg.norm.weight is float32 \[1\], not float32 \[32\]"),
    (lambda t: t.update({f"exp_avg_sq.{NORM}": torch.zeros(32, 1)}), r"exp_avg_sq.norm.weight is float32 \[32, 1\], not float32 \[32\]"),
    (lambda t: t.update({f"exp_avg.{NORM}": torch.zeros(32, dtype=torch.int8)}), "exp_avg.norm.weight is int8"),
    (lambda t: t.update({f"exp_avg.{NORM}": torch.zeros(32, dtype=torch.complex64)}), "exp_avg.norm.weight is complex64"),
    (lambda t: t.update({f"step.{NORM}": torch.zeros(2)}), r"step.norm.weight is float32 \[2\], not float32 \[\]"),
    (lambda t: t[f"step.{NORM}"].fill_(-1), "step.norm.weight is negative"),
    (nan_in(f"exp_avg.{NORM}"), "exp_avg.norm.weight holds NaN or infinity"),
    (lambda t: t.pop(f"exp_avg_sq.{NORM}"), "lacks exp_avg_sq.norm.weight"),
    (lambda t: [t.pop(f"{key}.{NORM}") for key in ("exp_avg", "exp_avg_sq", "step")], "has no optimizer state of norm.weight"),
    (lambda t: t.update({"exp_avg.more": torch.zeros(2)}), "has exp_avg.more, and the model here has no parameter of that name"),
])
def test_optimizer_state_that_does_not_fit_its_parameter_is_refused_by_name(run, change, says):
    path = change_tensors(run, "optimizer.safetensors", change)
    with pytest.raises(UserError, match=says):
        load(path)


def test_a_parameter_that_had_no_gradient_yet_has_no_optimizer_state_and_still_resumes(run):
    model = Encoder(checkpoint.config_of(str(run / "step_0000010")))
    optimizer = train.configure_optimizer(model, train.Config())
    model.norm.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    state = checkpoint.read_state(str(run / "step_0000010"))
    path = checkpoint.save(str(run), 11, model, state, optimizer)
    assert checkpoint.read_state(path)["without_optimizer_state"] == [NORM]
    load(path)


def test_a_file_that_is_no_safetensors_is_one_line(run):
    (run / "step_0000010" / "model.safetensors").write_bytes(b"PK\x03\x04" * 10)
    write_sums(run / "step_0000010")
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        checkpoint.load_model(str(run))


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("step"), "has no 'step'"),
    (lambda s: s.update(step="10"), "'step' is \"10\", not a whole number"),
    (lambda s: s["model"].update(n_head=0), "'model.n_head' is 0"),
    (lambda s: s["model"].update(n_kv_head=-1), "'model.n_kv_head' is -1"),
    (lambda s: s["model"].update(n_head=3, n_kv_head=2), "3 heads of 16, 2 for keys and values"),
    (lambda s: s["model"].update(gate="silu"), "'model.gate' is unknown here"),
    (lambda s: s["model"].pop("n_layer"), "has no 'model.n_layer'"),
    (lambda s: s.pop("settings"), "has no 'settings'"),
    (lambda s: s.update(settings=[]), "'settings' is a list, not an object"),
])
def test_a_state_that_says_no_model_is_one_line_with_its_key(run, change, says):
    path = run / "step_0000010"
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    write_sums(path)
    with pytest.raises(UserError, match=says) as error:
        checkpoint.load_model(str(path))
        checkpoint.tokenizer_of(str(path))
    assert "state.json" in str(error.value) and "\n" not in str(error.value)


# ---- links, permissions, file systems

def test_a_link_to_a_checkpoint_is_that_checkpoint_for_loading_and_export(run, tmp_path):
    os.symlink("step_0000010", run / "latest")
    os.symlink(run / "latest", tmp_path / "best")
    for path in (run / "latest", tmp_path / "best"):
        assert checkpoint.find(str(path)) == str(run / "step_0000010")
        assert checkpoint.tokenizer_of(checkpoint.find(str(path))).vocab_size == 320
    _, steps = exporting.export(str(tmp_path / "best"), str(tmp_path / "exported"))
    assert steps == [10]


def test_a_checkpoint_on_another_disk_behind_a_link_is_still_the_runs(run, tmp_path):
    os.rename(run / "step_0000010", tmp_path / "moved")
    os.symlink(tmp_path / "moved", run / "step_0000010")
    os.symlink("step_0000010", run / "latest")
    for path in (run, run / "latest", run / "step_0000010"):
        assert checkpoint.find(str(path)) == str(run / "step_0000010")
    checkpoint.prune(str(run), 1, milestones=())
    assert os.path.islink(run / "step_0000010") and os.path.isfile(tmp_path / "moved" / "state.json")
    _, steps = exporting.export(str(run), str(tmp_path / "exported"))
    assert steps == [10]
    # A save at its place replaces the link alone.
    (tmp_path / "moved" / "trials").mkdir()
    model = checkpoint.load_model(str(run))
    checkpoint.save(str(run), 10, model, {"settings": {"tokenizer_hash": ""}})
    assert not os.path.islink(run / "step_0000010") and os.path.isdir(tmp_path / "moved" / "trials")


def test_a_renamed_checkpoint_is_exported_with_its_own_weights(run, tmp_path):
    shutil.copytree(run / "step_0000010", run / "keep this")
    _, steps = exporting.export(str(run / "keep this"), str(tmp_path / "exported"))
    assert steps == [10]


def test_a_file_or_a_broken_link_by_the_name_of_a_checkpoint_stops_nothing(run):
    (run / "step_0000030").write_text("notes")
    os.symlink("nowhere", run / "step_0000031")
    said = []
    assert checkpoint.latest(str(run), said.append) == str(run / "step_0000010")
    assert len(said) == 1 and "step_0000031 is damaged" in said[0]
    checkpoint.prune(str(run), 1, milestones=())
    assert sorted(name for name in os.listdir(run) if name.startswith("step")) == ["step_0000010", "step_0000030", "step_0000031"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(run, monkeypatch):
    shutil.copytree(run / "step_0000010", run / "step_0000011")

    def busy(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)      # NFS, while somebody reads it
    monkeypatch.setattr(shutil, "rmtree", busy)
    said = []
    checkpoint.prune(str(run), 1, milestones=(), log=said.append)
    assert len(said) == 1 and "could not delete the old checkpoint" in said[0] and "step_0000010" in said[0]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_a_checkpoint(run, tmp_path, umask, mode):
    model = checkpoint.load_model(str(run))
    before = os.umask(umask)
    try:
        path = checkpoint.save(str(run), 11, model, {"settings": {"tokenizer_hash": ""}})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(os.stat(os.path.join(path, name)).st_mode) for name in os.listdir(path)} == {mode}
