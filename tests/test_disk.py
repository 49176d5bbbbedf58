"""What lies on the disk is checked before it is used: checkpoints, corpora and logs that were changed by hand, by a crash or by a stranger."""
import errno
import json
import os
import shutil
import stat

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import ROOT, files, rows
from safetensors.torch import load_file, save_file

import prepare_fineweb
import train
from core import checkpoint
from core.configurator import RunError, UserError
from huggingface import exporting
from model import SIZES, Encoder
from pretraining import data
from tasks import queue

OLD = os.path.join(ROOT, "tests", "data", "old")


SETTINGS = dict(size="nano", block_size=64, batch_rows=8, micro_rows=8, phases=(("clm", 10), ("mlm", 10)), warmup_steps=2,
                decay_steps=4, learning_rate=3e-3, eval_interval=10, eval_rows=8, save_interval=5, keep_last=9, log_interval=5,
                dtype="float32", compile=False, device="cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 20 steps with a checkpoint at step 10: its folder."""
    monkeypatch.setitem(SIZES, "nano", dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64))
    return shutil.copytree(os.path.join(OLD, "run"), tmp_path / "run")


@pytest.fixture
def corpus(tmp_path):
    """A corpus with one shard of training tokens and one of validation tokens: its folder."""
    return shutil.copytree(os.path.join(OLD, "corpus"), tmp_path / "corpus")


def train_on(corpus, out, **changes):
    """20 steps of a tiny model; a folder that holds its run resumes."""
    train.main(train.Config(data_dir=str(corpus), out_dir=str(out), **SETTINGS | changes))


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


OPTIMIZERS = {
    "AdamW": train.configure_optimizer,
    "SGD": lambda model, c: torch.optim.SGD(model.parameters(), lr=c.learning_rate, momentum=0.9),
    "RMSprop": lambda model, c: torch.optim.RMSprop(model.parameters(), lr=c.learning_rate),
    "RAdam": lambda model, c: torch.optim.RAdam(model.parameters(), lr=c.learning_rate),      # keeps tensors of AdamW's names
}


@pytest.mark.parametrize("there, here", [("AdamW", "SGD"), ("AdamW", "RMSprop"), ("AdamW", "RAdam"), ("SGD", "AdamW")])
def test_a_checkpoint_of_another_optimizer_is_refused_by_its_name_wherever_its_state_is_loaded(corpus, run, monkeypatch, there, here):
    out, base = run.parent / "new", str(run.parent / "base")
    monkeypatch.setattr(train, "configure_optimizer", OPTIMIZERS[there])
    train_on(corpus, base)
    assert checkpoint.read_state(f"{base}/step_0000010")["optimizer"] == there
    shutil.rmtree(f"{base}/step_0000020")
    monkeypatch.setattr(train, "configure_optimizer", OPTIMIZERS[here])
    for folder, changes in ((base, {}), (out, {"branch_from": f"{base}/step_0000010"}), (out, {"init_from": f"{base}/step_0000010"})):
        with pytest.raises(UserError, match=f"has the optimizer state of {there}, and configure_optimizer in train.py makes {here}") as error:
            train_on(corpus, folder, **changes)
        assert "\n" not in str(error.value) and not out.exists()
    train_on(corpus, out, init_from=f"{base}/step_0000010", keep_moments=False)      # as the message says


def test_adamw_with_amsgrad_needs_the_state_that_amsgrad_keeps(run):
    model = Encoder(checkpoint.config_of(str(run / "step_0000010")))
    with pytest.raises(UserError, match="lacks max_exp_avg_sq"):
        checkpoint.load(str(run / "step_0000010"), model, torch.optim.AdamW(model.parameters(), amsgrad=True))


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
    (lambda s: s["model"].update(n_head=3, n_kv_head=2), "3 heads of size 16, 2 for keys and values"),
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


@pytest.mark.parametrize("change, says", [
    (nan_in("blocks.1.mlp.down.weight"), "blocks.1.mlp.down.weight holds NaN or infinity"),
    (lambda t: t["embedding.weight"][3:4, 2:3].fill_(-float("inf")), "embedding.weight holds NaN or infinity"),
    (lambda t: t["lm_head.weight"].fill_(float("nan")), "lm_head.weight holds NaN or infinity"),
])
@pytest.mark.parametrize("average", [1, 2])
def test_weights_that_are_not_finite_are_not_exported(corpus, run, tmp_path, change, says, average):
    train_on(corpus, run)
    change_tensors(run, "model.safetensors", change)
    if average == 1:
        shutil.rmtree(run / "step_0000020")
        shutil.rmtree(run / "step_0000016")
        shutil.rmtree(run / "step_0000015")
    with pytest.raises(UserError, match=f"step_0000010.*{says}") as error:
        exporting.export(str(run), str(tmp_path / "exported"), average=4 if average == 2 else 1)
    assert "\n" not in str(error.value) and not os.path.exists(tmp_path / "exported")


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


def test_a_damaged_checkpoint_that_cannot_be_deleted_does_not_keep_its_step_from_being_saved(run, monkeypatch):
    model = checkpoint.load_model(str(run))
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)       # NFS, while somebody reads it
    (run / "step_0000010" / "model.safetensors").write_bytes(b"")
    (run / ".writing_0000010_01234567_replaced").mkdir()
    for _ in range(2):
        checkpoint.verify(checkpoint.save(str(run), 10, model, {"settings": {"tokenizer_hash": ""}}))
    monkeypatch.setattr(shutil, "rmtree", real)
    checkpoint.save(str(run), 11, model, {"settings": {"tokenizer_hash": ""}})
    assert not [name for name in os.listdir(run) if name.startswith(".writing")]


def test_a_file_system_that_cannot_sync_a_folder_still_takes_checkpoints(run, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)
    model = checkpoint.load_model(str(run))
    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.verify(checkpoint.save(str(run), 11, model, {"settings": {"tokenizer_hash": ""}}))


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_a_checkpoint(run, tmp_path, umask, mode):
    model = checkpoint.load_model(str(run))
    before = os.umask(umask)
    try:
        path = checkpoint.save(str(run), 11, model, {"settings": {"tokenizer_hash": ""}})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(os.stat(os.path.join(path, name)).st_mode) for name in os.listdir(path)} == {mode}


# ---- a corpus

def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def manifest(change):
    return lambda corpus: edit_json(corpus / "manifest.json", change)


@pytest.mark.parametrize("damage, says", [
    (lambda c: os.remove(c / "train_00000.bin"), "lacks 1 of the 1 train shards that its manifest.json lists, such as train_00000.bin"),
    (lambda c: shutil.copy(c / "train_00000.bin", c / "train_00001.bin"), "train_00001.bin is not among the shards of"),
    (lambda c: shutil.copy(c / "val_00000.bin", c / "train_00000.bin"), "train_00000.bin is not the shard that"),
    (manifest(lambda m: m["shards"]["train_00000.bin"].update(crc32="00000000")), "train_00000.bin is not the shard that"),
    (manifest(lambda m: m.update(train_tokens=1)), "says 1 train tokens, and the shards hold 56,242"),
    (manifest(lambda m: m.update(tokenizer_hash="00")), "another tokenizer than"),
    (manifest(lambda m: m.update(shards=["train_00000.bin"])), "manifest.json: 'shards' is a list, not an object"),
    (manifest(lambda m: m["shards"]["train_00000.bin"].pop("tokens")), "manifest.json: has no 'shards.train_00000.bin.tokens'"),
    (manifest(lambda m: m.pop("complete")), "manifest.json: has no 'complete'"),
    (lambda c: (c / "manifest.json").write_bytes(bytes(99)), "manifest.json is not JSON"),
    (lambda c: (c / "tokenizer_info.json").write_text((c / "tokenizer_info.json").read_text().replace("eos|", "end|")),
     "is not the one its shards were made with"),
])
def test_a_corpus_that_is_not_what_its_manifest_says_is_refused_before_anything_is_written(corpus, run, damage, says):
    damage(corpus)
    with pytest.raises(UserError, match=says) as error:
        train_on(corpus, run.parent / "new")
    assert "\n" not in str(error.value) and not os.path.exists(run.parent / "new")


def test_a_corpus_of_an_early_version_whose_manifest_says_little_still_trains(corpus, run):
    (corpus / "manifest.json").write_text('{"complete": true}')
    train_on(corpus, run)
    assert os.path.isdir(run / "step_0000020")


DAMAGES = {
    "cut short": lambda path: os.truncate(path, 2000),
    "can no longer be read": os.remove,
    "changed while it was in use": lambda path: overwrite(path),
}


def overwrite(path):
    """Write zeros over the tokens, as `cp` or rsync --inplace would: the same file, the same size."""
    with open(path, "r+b") as f:
        f.seek(1024)
        f.write(bytes(os.path.getsize(path) - 1024))
    os.utime(path, ns=(1, 1))      # the clock of a file system may be coarser than this test is slow


@pytest.mark.parametrize("says", DAMAGES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_that_is_damaged_under_a_running_training_stops_it_with_a_saved_checkpoint(corpus, run, monkeypatch, split, says):
    out = run.parent / "new"
    real = train.learning_rate_at

    def damage_at_7(step, *arguments):
        if step == 7:
            DAMAGES[says](corpus / f"{split}_00000.bin")
        return real(step, *arguments)
    monkeypatch.setattr(train, "learning_rate_at", damage_at_7)
    with pytest.raises(RunError, match=f"{split}_00000.bin") as error:
        train_on(corpus, out)
    newest = checkpoint.latest(str(out))
    assert checkpoint.step_of(newest) >= 8 and str(newest) in str(error.value) and "\n" not in str(error.value)
    assert says in str(error.value) or "is truncated" in str(error.value)
    assert [row["step"] for row in rows(out)] == list(range(1, checkpoint.step_of(newest) + 1))
    # With the shard back in its place, the run ends as if nothing had happened.
    monkeypatch.setattr(train, "learning_rate_at", real)
    shutil.copy(os.path.join(OLD, "corpus", f"{split}_00000.bin"), corpus)
    train_on(corpus, out)
    train_on(corpus, run.parent / "undisturbed")
    assert files(out / "step_0000020") == files(run.parent / "undisturbed" / "step_0000020")


def test_a_shard_that_was_only_touched_or_copied_anew_is_read_on(corpus):
    opened = data.Corpus(str(corpus))
    before = opened.read(0, 1000)
    os.utime(corpus / "train_00000.bin", ns=(1, 1))
    assert (opened.read(0, 1000) == before).all()
    shutil.copy(corpus / "train_00000.bin", corpus / "copy")
    os.replace(corpus / "copy", corpus / "train_00000.bin")
    assert (opened.read(0, 1000) == before).all()


def test_an_id_beyond_the_vocabulary_is_one_line(corpus):
    opened = data.Corpus(str(corpus))
    opened.vocab_size = 300
    with pytest.raises(RunError, match="holds the id 3.., and its vocabulary has 300"):
        data.read_rows(opened, range(100), [0] * 100, data.DataSettings(64, 100))


# ---- a run's own files

@pytest.mark.parametrize("line", [b"", b"\0" * 512, b'{"step": 4, "phase": "cl', b'{"step": "4"}', b"[]", b"\xff\xfe", b'{"loss": 2.0}'],
                         ids=["blank", "NULs", "torn", "no number", "list", "not UTF-8", "no step"])
def test_a_line_of_the_log_that_is_not_a_row_does_not_keep_a_run_from_resuming(corpus, run, line, capsys):
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(b"".join([*lines[:4], line + b"\n", *lines[4:]]))
    train_on(corpus, run)
    assert [row["step"] for row in rows(run)] == list(range(1, 21))
    said = capsys.readouterr().out
    is_named = "log.jsonl, line 5" in said and os.path.isfile(run / "log.jsonl.damaged")
    assert is_named == bool(line.strip(b"\0"))


def test_a_log_with_torn_lines_does_not_keep_a_run_from_being_exported(run, tmp_path):
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(b"".join([b"\n", bytes(9) + b"\n", lines[3][:40] + b"\n", *lines]))
    exporting.export(str(run), str(tmp_path / "exported"))
    assert "| validation loss | CLM " in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.parametrize("change, says", [
    (lambda c: c.pop("settings"), "has no 'settings'"),
    (lambda c: c.update(settings=None), "'settings' is null, not an object"),
    (lambda c: c["settings"].update(size=210), "'settings.size' is 210, not a string"),
])
def test_a_config_that_is_not_a_runs_is_one_line_with_its_key(corpus, run, change, says):
    edit_json(run / "config.json", change)
    with pytest.raises(UserError, match=f"config.json: {says}"):
        train_on(corpus, run)


@pytest.mark.parametrize("change, says", [
    (lambda s: s["settings"].update(phases=[["clm"]]), r"'settings.phases' has \['clm'\]"),
    (lambda s: s["settings"].update(phases="clm"), "'settings.phases' is \"clm\", not a list"),
    (lambda s: s["settings"].pop("decay_steps"), "has no 'settings.decay_steps'"),
    (lambda s: s["totals"].update(tokens=None), "'totals.tokens' is null, not a whole number"),
    (lambda s: s.pop("first_row"), "has no 'first_row'"),
    (lambda s: s.update(objectives={"clm": True}), "'objectives.clm' is true, not an object"),
])
def test_a_state_without_a_schedule_cannot_be_continued_and_says_which_key_is_missing(corpus, run, change, says):
    edit_json(run / "step_0000010" / "state.json", change)
    write_sums(run / "step_0000010")
    for out, changes in ((run, {}), (run.parent / "branch", {"branch_from": str(run)}), (run.parent / "new", {"init_from": str(run)})):
        with pytest.raises(UserError, match=says):
            train_on(corpus, out, **changes)


def test_a_checkpoint_under_another_steps_name_is_not_resumed(corpus, run):
    os.rename(run / "step_0000010", run / "step_0000015")
    with pytest.raises(UserError, match="step_0000015/state.json says step 10: give the folder its own name back"):
        train_on(corpus, run)


def test_weights_that_are_not_finite_are_refused_wherever_a_run_may_begin(corpus, run):
    change_tensors(run, "model.safetensors", nan_in(NORM))
    for out, changes in ((run, {}), (run.parent / "branch", {"branch_from": str(run)}), (run.parent / "new", {"init_from": str(run)})):
        with pytest.raises(UserError, match="norm.weight holds NaN or infinity"):
            train_on(corpus, out, **changes)
        assert out == run or not os.path.exists(out)


def test_a_grid_writes_its_rows_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted", source, None, target)      # exFAT, SMB
    monkeypatch.setattr(os, "link", link)
    trials = [{"task": "mood", "lr": 1e-3, "seed": seed} for seed in (0, 1)]
    assert queue.work(trials, str(tmp_path), lambda trial: {"seed": trial["seed"]}) == 2
    folder = tmp_path / "trials" / "mood"
    assert {name: json.loads((folder / name).read_text()) for name in os.listdir(folder)} == {
        "lr1e-03_sd0.json": {"seed": 0}, "lr1e-03_sd1.json": {"seed": 1}}
    queue.finish(str(folder / "lr1e-03_sd0.json"), {"seed": 9})
    assert json.loads((folder / "lr1e-03_sd0.json").read_text()) == {"seed": 0} and len(os.listdir(folder)) == 2


# ---- a corpus that is being prepared

@pytest.mark.parametrize("change, says", [
    (lambda m: m.pop("settings"), "has no 'settings'"),
    (lambda m: m.update(settings=[1]), "'settings' is a list, not an object"),
    (lambda m: m.update(complete="yes"), "'complete' is \"yes\", not true or false"),
    (lambda m: m.update(shards=3), "'shards' is 3, not an object"),
])
def test_a_manifest_of_another_shape_is_one_line_also_when_preparing(corpus, tmp_path, change, says):
    edit_json(corpus / "manifest.json", change)
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(UserError, match=f"manifest.json: {says}"):
        prepare_fineweb.prepare(prepare_fineweb.Config(source=str(tmp_path / "text.txt"), out=str(corpus)))


@pytest.mark.parametrize("damage, says", [
    (lambda folder: os.truncate(folder / "documents.bin", 50), r"documents.bin is damaged \(50 bytes, expected 63\)"),
    (lambda folder: os.remove(folder / "documents.bin"), r"documents.bin is damaged \(0 bytes, expected 63\)"),
    (lambda folder: edit_json(folder / "facts.json", lambda f: f.pop("rows")), "facts.json: has no 'rows'"),
    (lambda folder: (folder / "facts.json").write_text("{"), "facts.json is not JSON"),
])
def test_a_damaged_folder_of_a_prepared_file_is_named_before_it_becomes_part_of_a_corpus(tmp_path, damage, says):
    (tmp_path / "source").mkdir()
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read()
    texts = [text[:2000], text[2000:4000], text[4000:6000]]
    parquet.write_table(pyarrow.table({"text": texts, "id": ["a", "b", "c"]}), tmp_path / "source" / "0.parquet")
    settings = dict(source=f"parquet:{tmp_path}/source", tokenizer="train:320", out=str(tmp_path / "out"), val_fraction=0.0, processes=1)
    prepare_fineweb.prepare(prepare_fineweb.Config(**settings, shard="0/1"))
    damage(tmp_path / "out" / "files" / "00000")
    with pytest.raises(UserError, match=says):
        prepare_fineweb.prepare(prepare_fineweb.Config(**settings))
