"""One writer a folder: who holds it, who is refused, and what a kill or a power cut leaves."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import prepare_fineweb
from core import lock
from core.configurator import UserError
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
