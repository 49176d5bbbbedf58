"""One writer a folder: who holds it, who is refused, and what a kill or a power cut leaves."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

import prepare_fineweb
from core import lock
from core.configurator import UserError
from huggingface import exporting, importing
from reporting.output import write_report

HOLDER = """
import sys, time
from core.lock import hold
with hold(sys.argv[1], "train.py"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_at_once_and_told_who_is_first(holder, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"train.py \(pid {holder.pid} on .+\) is writing "):
        with lock.hold(tmp_path, "train.py"):
            pass
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_is_no_obstacle(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    with lock.hold(tmp_path, "train.py"):
        pass


def test_a_folder_can_be_held_again_and_again(tmp_path):
    for _ in range(2):
        with lock.hold(tmp_path, "train.py"):
            assert os.path.getsize(tmp_path / lock.NAME) > 0
        assert os.path.getsize(tmp_path / lock.NAME) == 0


def test_a_lock_that_a_power_cut_filled_with_nulls_is_free(tmp_path):
    (tmp_path / lock.NAME).write_bytes(b"\0" * 40)
    with lock.hold(tmp_path, "train.py"):
        pass


@pytest.mark.parametrize("make", [
    lambda path: path.write_text("my notes"),
    lambda path: path.mkdir(),
    lambda path: path.symlink_to(path.parent / "thesis.tex"),
    lambda path: os.mkfifo(path),
], ids=["file", "folder", "link", "fifo"])
def test_what_a_user_put_in_its_place_is_not_touched(tmp_path, make):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("\\chapter")
    path = tmp_path / lock.NAME
    make(path)
    with pytest.raises(UserError, match="not a file of ours"):
        with lock.hold(tmp_path, "train.py"):
            pass
    assert thesis.read_text() == "\\chapter" and (not path.is_file() or path.read_text() in ("my notes", "\\chapter"))


def another_machine(path, age):
    """A lock as a process of another machine left it `age` seconds ago; its kernel's lock does not reach ours."""
    path.write_text('{"host": "elsewhere", "pid": 7, "kernel": "another", "program": "train.py"}')
    then = time.time() - age
    os.utime(path, (then, then))


def test_a_holder_on_another_machine_is_alive_while_it_touches_the_lock(tmp_path):
    another_machine(tmp_path / lock.NAME, age=20)
    with pytest.raises(UserError, match=r"pid 7 on elsewhere"):
        with lock.hold(tmp_path, "train.py"):
            pass


def test_a_holder_on_another_machine_that_was_silent_for_a_minute_is_gone(tmp_path):
    another_machine(tmp_path / lock.NAME, age=lock.STALE + 5)
    with lock.hold(tmp_path, "train.py"):
        pass


def test_a_lock_dated_in_the_future_is_watched_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 1.0)
    another_machine(tmp_path / lock.NAME, age=-86_400)
    with lock.hold(tmp_path, "train.py"):
        pass


def test_a_heartbeat_touches_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    with lock.hold(tmp_path, "train.py"):
        os.utime(tmp_path / lock.NAME, (0, 0))
        time.sleep(0.5)
        assert os.stat(tmp_path / lock.NAME).st_mtime > 0


def test_a_folder_made_for_nothing_is_removed_and_one_that_was_there_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "made"):
        with pytest.raises(ValueError):
            with lock.hold_new(tmp_path / name, "train.py"):
                raise ValueError
    assert os.listdir(tmp_path) == ["mine"]


def test_prepare_fineweb_and_report_write_no_folder_that_another_process_writes(tmp_path):
    shutil.copy(os.path.join(ROOT, "README.md"), tmp_path / "text.txt")
    (tmp_path / "out").mkdir()
    c = prepare_fineweb.Config(source=str(tmp_path / "text.txt"), out=str(tmp_path / "out"), tokenizer="train:320", val_fraction=0.0)
    with lock.hold(tmp_path / "out", "another.py"):
        with pytest.raises(UserError, match=r"another.py \(pid "):
            prepare_fineweb.prepare(c)
        with pytest.raises(UserError, match=r"another.py \(pid "):
            write_report(str(tmp_path / "out"), {"table.md": "| run | steps |"}, {})
    assert os.listdir(tmp_path / "out") == [lock.NAME]
    prepare_fineweb.prepare(c)
    with lock.hold(tmp_path / "out", "another.py"):      # a complete corpus is only looked at
        prepare_fineweb.prepare(c)


@pytest.mark.parametrize("first, second, is_refused", [
    ("0/2", "0/2", True), ("0/2", "00/2", True), ("0/2", "1/2", False), ("0/2", "1/3", True), ("1/3", "0/2", True), ("0/2", "", True), ("", "1/2", True),
])
def test_two_preparations_of_the_same_files_are_refused_and_shards_that_share_none_are_not(tmp_path, monkeypatch, first, second, is_refused):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read()
    (tmp_path / "source").mkdir()
    for k in range(6):
        table = pyarrow.table({"text": [text[1000 * k:1000 * k + 1000]], "id": [str(k)]})
        pyarrow.parquet.write_table(table, tmp_path / "source" / f"{k}.parquet")

    def config(shard):
        return prepare_fineweb.Config(source=f"parquet:{tmp_path}/source", out=str(tmp_path / "out"), tokenizer="train:320", val_fraction=0.0,
                                      processes=1, shard=shard)
    real = prepare_fineweb.write_corpus
    said = []

    def meanwhile(c, settings):
        monkeypatch.setattr(prepare_fineweb, "write_corpus", real)
        try:
            prepare_fineweb.prepare(config(second))
        except UserError as error:
            said.append(str(error))
        real(c, settings)
    monkeypatch.setattr(prepare_fineweb, "write_corpus", meanwhile)
    prepare_fineweb.prepare(config(first))
    holder = f"prepare_fineweb.py{f' --shard={first}' if first else ''} (pid {os.getpid()} on "
    assert len(said) == is_refused and all(text.startswith(holder) and "\n" not in text for text in said)
    for shard in ("0/2", "1/2", ""):
        prepare_fineweb.prepare(config(shard))
    assert prepare_fineweb.is_finished(str(tmp_path / "out"))


def test_a_shard_that_another_machine_prepares_is_refused_while_its_lock_is_touched(tmp_path):
    (tmp_path / "manifest.json").write_text('{"settings": {}, "complete": false}')
    another_machine(tmp_path / ".lock.1-of-3", age=20)
    for name in (".lock", ".lock.0-of-2"):
        with lock.hold(tmp_path, "prepare_fineweb.py", name), pytest.raises(UserError, match="pid 7 on elsewhere"):
            lock.check_free(tmp_path, ".lock.1-of-3")
    another_machine(tmp_path / ".lock.1-of-3", age=lock.STALE + 5)
    lock.check_free(tmp_path, ".lock.1-of-3")


def test_two_exports_into_one_folder_the_second_is_refused_at_once(tmp_path, monkeypatch):
    run = os.path.join(ROOT, "tests", "data", "old", "run")
    said = []
    real = exporting.write_folder

    def meanwhile(*arguments):
        for write, source in ((exporting.export, run), (importing.write, "a model that is never looked for")):
            with pytest.raises(UserError) as error:
                write(source, str(tmp_path / "out"))
            said.append(str(error.value))
        real(*arguments)
    monkeypatch.setattr(exporting, "write_folder", meanwhile)
    exporting.export(run, str(tmp_path / "out"))
    assert len(said) == 2 and all(text.startswith(f"hf.py (pid {os.getpid()} on ") for text in said)
    assert os.listdir(tmp_path) == ["out"] and lock.NAME not in os.listdir(tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        exporting.export(run, str(tmp_path / "out"))


def test_an_export_through_a_link_fills_the_folder_that_it_leads_to(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    os.symlink(tmp_path / "disk" / "empty", tmp_path / "out")
    exporting.export(os.path.join(ROOT, "tests", "data", "old", "run"), str(tmp_path / "out"))
    assert os.path.isfile(tmp_path / "disk" / "empty" / "model.safetensors") and os.listdir(tmp_path / "disk") == ["empty"]
