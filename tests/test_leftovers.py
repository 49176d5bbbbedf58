"""What killed writers leave is removed by the next holder of the folder, and nothing that a user made."""
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import matplotlib.pyplot as plt
import pyarrow
import pyarrow.parquet as parquet
import pytest
from conftest import ROOT
from filelock import FileLock

import prepare_fineweb
from core import checkpoint, files, lock
from core.configurator import UserError
from core.device import remove_interrupted_compilations
from core.distributed import Processes
from huggingface import exporting, importing
from model import Encoder
from pretraining.lifetime import hold_out_dir
from reporting.output import write_report

OLD = os.path.join(ROOT, "tests", "data", "old")

# Names that resemble those of our writers, which never write them.
LOOKALIKES = ["notes.tmp", "config.json.tmp", "config.json.7.tmp", "config.json.7-deadbeef", "config.json.7-DEADBEEF.tmp", "my config.json.7-deadbeef.tmp",
              "notes.txt.7-deadbeef.tmp", "log.jsonl.x-deadbeef.tmp", ".writing_notes", ".writing_0000007_deadbeef.tar", "writing_0000007_deadbeef",
              "train.bin.tmp", "train_00001.bin.tmp.old", "test_00001.bin.tmp", "00007.mine.tmp", "00007.8.tmp.old", "manifest.json.bak", "lock.7-deadbeef.tmp"]


class Killed(BaseException):
    """Ends a writer where it stands, as kill -9 would: none of ours cleans up after it."""


def kill_at(monkeypatch, nth, name="replace"):
    """Let the n-th call of os.replace (or another function of os) end the process, so to speak. -> the patch's context"""
    real, calls = getattr(os, name), []

    def dies(*arguments, **kwargs):
        calls.append(arguments)
        if len(calls) == nth:
            raise Killed
        return real(*arguments, **kwargs)
    monkeypatch.setattr(os, name, dies)


def add_lookalikes(folder):
    os.makedirs(folder, exist_ok=True)
    for i, name in enumerate(LOOKALIKES):
        path = os.path.join(folder, name)
        if i % 3 == 2:
            os.mkdir(path)
            path = os.path.join(path, "chapter")
        with open(path, "w", encoding="utf-8") as f:
            f.write("all my work")


def check_lookalikes(folder):
    assert set(LOOKALIKES) <= set(os.listdir(folder))
    for i, name in enumerate(LOOKALIKES):
        with open(os.path.join(folder, name, "chapter") if i % 3 == 2 else os.path.join(folder, name), encoding="utf-8") as f:
            assert f.read() == "all my work"


def ours(folder):
    """What is in a folder, at any depth, and is neither a lookalike nor a lock."""
    names = []
    for path, folders, file_names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LOOKALIKES]
        names += [os.path.relpath(os.path.join(path, name), folder) for name in [*folders, *file_names] if name not in LOOKALIKES]
    return sorted(name for name in names if not re.fullmatch(files.LOCK, name))


def test_kill_9_of_a_writer_leaves_a_file_that_the_next_holder_removes(tmp_path):
    code = "import os, signal, sys; from core import files; os.replace = lambda *_: os.kill(os.getpid(), 9); files.write_json(sys.argv[1], {})"
    for name in ("config.json", "tokenizer_info.json", "notes.json"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT).returncode == -signal.SIGKILL
    assert len(ours(tmp_path)) == 3
    files.remove_leftovers(tmp_path, ["config.json", "tokenizer_info.json"])
    left, = ours(tmp_path)
    assert re.fullmatch(r"notes\.json\.\d+-[0-9a-f]{8}\.tmp", left)


def test_a_training_removes_what_a_killed_one_left_and_nothing_else(tmp_path, monkeypatch):
    run = shutil.copytree(os.path.join(OLD, "run"), tmp_path / "run")
    before = ours(run)
    add_lookalikes(run)
    model = Encoder(checkpoint.config_of(str(run / "step_0000010")))
    for nth in (1, 2):      # of a new checkpoint, and of one that takes the place of a damaged one
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, nth)
            checkpoint.save(str(run), 10, model, checkpoint.read_state(str(run / "step_0000010")))
        if nth == 2:
            damaged, = (name for name in os.listdir(run) if name.endswith("_replaced"))
            shutil.copytree(run / damaged, run / "step_0000010")
    for name in ("config.json", "log.jsonl", "tokenizer.tiktoken", "tokenizer_info.json"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, 1)
            files.write_whole(str(run / name), b"half")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 1, "unlink")
        lock.age_of(str(run / lock.NAME))
    assert len(ours(run)) >= len(before) + 6
    with ExitStack() as at_exit:
        assert hold_out_dir(str(run), Processes(0, 0, 1), at_exit) == ""
        assert ours(run) == before
    check_lookalikes(run)


@pytest.fixture
def texts(tmp_path):
    """The settings of a corpus of three texts, from local files or from parquet files."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read()
    (tmp_path / "texts").mkdir()
    for k in range(3):
        part = text[2000 * k:2000 * k + 2000]
        (tmp_path / "texts" / f"{k}.txt").write_text(part)
        parquet.write_table(pyarrow.table({"text": [part, f"{k} more"], "id": [f"{k}", f"{k} more"]}), tmp_path / "texts" / f"{k}.parquet")
    return dict(tokenizer="train:320", val_fraction=0.0, shard_tokens=500)


@pytest.mark.parametrize("source", ["texts/0.txt", "parquet"])
def test_a_preparation_removes_what_a_killed_one_left_and_nothing_else(tmp_path, texts, monkeypatch, source):
    settings = texts | dict(source=str(tmp_path / source))
    if source == "parquet":
        settings = texts | dict(source=f"parquet:{tmp_path}/texts", processes=1)

    def prepare(out):
        prepare_fineweb.prepare(prepare_fineweb.Config(out=str(tmp_path / out), **settings))
    prepare("undisturbed")
    out, n_kills = tmp_path / "out", 0
    for name, moments in (("replace", (1, 2, 3, 4, 6)), ("rename", (1, 2))):
        for nth in moments:
            with monkeypatch.context() as patch:
                kill_at(patch, nth, name)
                try:
                    prepare("out")
                except Killed:
                    n_kills += 1
            if n_kills == 3:      # by now there is a manifest, and the folder is a corpus with some files of the user
                add_lookalikes(out)
                if source == "parquet":
                    add_lookalikes(out / "files")
            if os.path.isfile(out / "manifest.json") and prepare_fineweb.is_finished(str(out)):
                break
    assert n_kills >= 4
    prepare("out")
    assert ours(out) == ours(tmp_path / "undisturbed")
    check_lookalikes(out)
    if source == "parquet":
        check_lookalikes(out / "files")


def test_starting_anew_removes_the_files_of_the_corpus_alone(tmp_path, texts):
    out = tmp_path / "out"
    (tmp_path / "texts" / "0.txt").write_text(" ")
    with pytest.raises(UserError):
        prepare_fineweb.prepare(prepare_fineweb.Config(source=str(tmp_path / "texts" / "0.txt"), out=str(out), **texts))
    add_lookalikes(out)
    add_lookalikes(out / "files")
    (out / "notes_1.bin").write_text("all my work")
    prepare_fineweb.prepare(prepare_fineweb.Config(source=str(tmp_path / "texts" / "1.txt"), out=str(out), **texts))
    check_lookalikes(out)
    check_lookalikes(out / "files")
    assert (out / "notes_1.bin").read_text() == "all my work"


def test_an_import_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    exporting.export(os.path.join(OLD, "run"), str(tmp_path / "exported"))
    for nth, left in ((3, r"\.writing_0000000_.*"), (1, r"tokenizer.tiktoken\..*\.tmp")):      # a checkpoint, and a tokenizer
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, nth)
            importing.write(str(tmp_path / "exported"), str(tmp_path / "model"))
        assert [name for name in os.listdir(tmp_path / "model") if re.fullmatch(left, name)]
    importing.write(str(tmp_path / "exported"), str(tmp_path / "model"))
    assert sorted(os.listdir(tmp_path / "model")) == [lock.NAME, "step_0000000", "tokenizer.tiktoken", "tokenizer_info.json"]


def test_an_export_removes_what_a_killed_one_left_and_nothing_else(tmp_path, monkeypatch):
    for name in ("out.writing", "out.deadbeef", "out.DEADBEEF.writing", "my out.deadbeef.writing", "out2.deadbeef.writing", "notes.deadbeef.writing"):
        (tmp_path / name).mkdir()
    before = os.listdir(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)      # a killed process removes nothing
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 1)
        exporting.export(os.path.join(OLD, "run"), str(tmp_path / "out"))
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == len(before) + 2
    exporting.export(os.path.join(OLD, "run"), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])
    assert {"config.json", "model.safetensors", "README.md"} <= set(os.listdir(tmp_path / "out")) and lock.NAME not in os.listdir(tmp_path / "out")


def test_a_report_removes_what_a_killed_one_left_and_nothing_else(tmp_path, monkeypatch):
    add_lookalikes(tmp_path)
    for nth in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, nth)
            write_report(str(tmp_path), {"table.md": "| run | steps |"}, {"loss_curves.png": plt.figure()})
    write_report(str(tmp_path), {"table.md": "| run | steps |"}, {"loss_curves.png": plt.figure()})
    assert ours(tmp_path) == ["loss_curves.png", "table.md"]
    check_lookalikes(tmp_path)


def test_a_library_that_a_killed_compiler_began_is_compiled_again(tmp_path, monkeypatch):
    """torch takes any file of the right name for a finished library: after a kill in the first step no run could load it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name in ("ab/cab1.main", "ab/cab2", "cd/ccd3.main", "cd/ccd4.main"):
        for path in (tmp_path / f"{name}.cpp", tmp_path / f"{name}.so"):
            path.parent.mkdir(exist_ok=True)
            path.touch()
        if "ccd4" not in name:
            (tmp_path / f"{name}_CxxBuild").mkdir()
            (tmp_path / f"{name}_CxxBuild" / "part.s").touch()
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "ccd3.lock"):          # another process compiles it
        remove_interrupted_compilations()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("??/*")}
    finished_or_in_work = {"cd/ccd3.main.so", "cd/ccd3.main_CxxBuild", "cd/ccd4.main.so"}
    assert left == finished_or_in_work | {f"{name}.cpp" for name in ("ab/cab1.main", "ab/cab2", "cd/ccd3.main", "cd/ccd4.main")}
