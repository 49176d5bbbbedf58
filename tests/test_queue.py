"""Any number of workers share a grid: each trial has one row, and a killed worker costs the trial it was in. Real processes."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from core import lock
from core.configurator import UserError
from tasks import queue, worker

GRID = [{"task": "t", "lr": lr, "seed": seed} for lr in (1e-5, 2e-5, 5e-4) for seed in range(4)]
WORKER = """
import json, os, sys, time
from tasks import queue
folder, seconds = sys.argv[1], float(sys.argv[2])
grid = json.loads(sys.argv[3])

def run(trial):
    with open(os.path.join(folder, "starts"), "a") as f:          # short appends to a local file do not mix
        f.write(f"{trial['lr']:.0e} {trial['seed']} {os.getpid()}\\n")
    time.sleep(seconds)
    return trial | {"score": trial["lr"] * 1e5 + trial["seed"]}
print("ran", queue.work(grid, folder, run, poll=0.05))
"""


def start(folder, seconds=0.05):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(seconds), json.dumps(GRID)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def rows(folder):
    found = {}
    for trial in GRID:
        with open(queue.path_of(str(folder), trial)) as f:
            found[trial["lr"], trial["seed"]] = json.load(f)
    return found


def starts(folder):
    with open(os.path.join(str(folder), "starts")) as f:
        return [tuple(line.split()) for line in f]


EXPECTED = {(t["lr"], t["seed"]): t | {"score": t["lr"] * 1e5 + t["seed"]} for t in GRID}


def leftovers(folder):
    return [name for _, _, names in os.walk(str(folder)) for name in names if not name.endswith(".json") and name != "starts"]


def test_four_workers_run_every_trial_once(tmp_path):
    workers = [start(tmp_path) for _ in range(4)]
    ran = [int(w.communicate(timeout=60)[0].split()[-1]) for w in workers]
    assert all(w.returncode == 0 for w in workers) and sum(ran) == len(GRID)
    assert rows(tmp_path) == EXPECTED and len(starts(tmp_path)) == len(GRID) and not leftovers(tmp_path)


def test_after_kill_9_two_new_workers_leave_the_rows_of_an_uninterrupted_grid(tmp_path):
    first = start(tmp_path, seconds=0.3)
    while not os.path.exists(tmp_path / "starts") or len(starts(tmp_path)) < 3:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done_before = len([name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".json")])
    assert 0 < done_before < len(GRID) and leftovers(tmp_path)            # the claim of the trial it was in
    workers = [start(tmp_path) for _ in range(2)]
    assert all(w.communicate(timeout=60) and w.returncode == 0 for w in workers)
    assert rows(tmp_path) == EXPECTED and not leftovers(tmp_path)
    assert len(starts(tmp_path)) == len(GRID) + 1                         # the killed trial twice, no other


def test_an_interrupted_worker_gives_its_trial_back_at_once(tmp_path):
    worker = start(tmp_path, seconds=30)
    while not os.path.exists(tmp_path / "starts"):
        time.sleep(0.02)
    worker.send_signal(signal.SIGINT)
    worker.communicate(timeout=20)
    assert worker.returncode != 0 and not leftovers(tmp_path)


def dead_pid():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


@pytest.mark.parametrize("owner, age, stale", [
    ({"kernel": "another", "pid": 1}, 5, False), ({"kernel": "another", "pid": 1}, 61, True), ({"pid": "self"}, 5, False),
    ({"pid": "dead"}, 0, True), ("", 0, False), ("", 61, True),
    # a container with our host name, whose process 7 is not ours
    ({"kernel": "another", "pid": "dead"}, 5, False), ({"kernel": "another", "pid": "self"}, 61, True),
    # what a power cut or a hand leaves: nobody's, so it is stale without a heartbeat
    ("\0" * 40, 5, False), ("\0" * 40, 61, True), ("[]", 61, True), ('{"host": ', 61, True), ({"pid": None}, 61, True),
    ({"pid": -1}, 61, True), ({"pid": 10**30}, 0, True), ({"pid": "7"}, 61, True), ("[" * 100_000, 61, True)])
def test_a_claim_is_stale_when_its_process_is_gone_or_its_heartbeat_has_stopped(tmp_path, owner, age, stale):
    if isinstance(owner, dict):
        pids = {"dead": dead_pid, "self": os.getpid}
        owner = {"kernel": lock.this_kernel()} | owner
        if owner["pid"] in pids:
            owner["pid"] = pids[owner["pid"]]()
        owner = json.dumps(owner)
    path = tmp_path / "x.claim"
    path.write_text(owner)
    os.utime(path, (time.time() - age,) * 2)
    assert queue.is_stale(str(path)) == stale
    assert queue.claim(str(path)) == stale                              # only a stale one can be taken ...
    if stale:
        assert json.loads(path.read_text())["pid"] == os.getpid() and not queue.claim(str(path))      # ... and is ours then
    assert [p.name for p in tmp_path.iterdir()] == ["x.claim"]


def test_a_claim_dated_in_the_future_is_stale_once_we_have_seen_no_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "STALE", 0.3)
    path = tmp_path / "x.claim"
    path.write_text('{"kernel": "another", "pid": 1}')
    os.utime(path, (time.time() + 86_400,) * 2)
    assert not queue.claim(str(path))
    time.sleep(0.4)
    assert queue.claim(str(path)) and [p.name for p in tmp_path.iterdir()] == ["x.claim"]


def test_a_heartbeat_keeps_a_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "HEARTBEAT", 0.05)
    ages = []

    def run(trial):
        claimed = queue.path_of(str(tmp_path), trial, "claim")
        os.utime(claimed, (0, 0))
        time.sleep(0.3)
        ages.append(time.time() - os.stat(claimed).st_mtime)
        return trial
    assert queue.work(GRID[:1], str(tmp_path), run) == 1
    assert ages[0] < 0.25


def test_the_first_row_of_a_trial_stays_and_every_learning_rate_has_its_own(tmp_path):
    path = queue.path_of(str(tmp_path), GRID[0])
    os.makedirs(os.path.dirname(path))
    queue.finish(path, {"score": 1})
    queue.finish(path, {"score": 2})
    assert json.load(open(path)) == {"score": 1} and os.listdir(os.path.dirname(path)) == ["lr1e-05_sd0.json"]
    names = {queue.path_of("", {"task": "t", "lr": lr, "seed": 0}) for lr in (1e-5, 1.5e-5, 2e-5, 1.25e-4)}
    assert len(names) == 4


# ---- what is damaged

SCORED = {"model": "m", "task": "t", "lr": 1e-5, "seed": 0, "failed": False, "validation": {"score": 0.5, "n": 9}, "test": {"score": 0.5, "n": 9}}
FAILED = SCORED | {"failed": True, "why": "loss nan", "validation": None, "test": None}


def work_on_first(folder):
    """Run the grid's first trial if its row asks for that. -> how many trials were run"""
    return queue.work(GRID[:1], str(folder), lambda trial: SCORED | {"again": True}, shape=worker.ROW_SHAPE)


@pytest.mark.parametrize("content", [
    b"", b"\0" * 300, b"7", b"null", b"[]", b'"text"', b"{}", b"\xff\xfe{", b"[" * 100_000, b"9" * 5000, json.dumps(SCORED)[:70].encode(),
    json.dumps(SCORED | {"lr": "1e-05"}).encode(), json.dumps(SCORED | {"validation": None}).encode(), json.dumps(SCORED | {"test": {"n": 9}}).encode(),
    json.dumps(SCORED | {"test": {"score": "0.5"}}).encode(), json.dumps(SCORED | {"seed": 1}).encode(), "folder", "broken link"])
def test_a_damaged_row_is_named_kept_under_another_name_and_its_trial_runs_again(tmp_path, capsys, content):
    folder = tmp_path / "trials" / "t"
    folder.mkdir(parents=True)
    row, scores = folder / "lr1e-05_sd0.json", folder / "lr1e-05_sd0.npz"
    scores.write_bytes(b"scores")
    (folder / "lr1e-05_sd0.json.damaged").write_text("of an earlier time")
    if content == "folder":
        row.mkdir()
    elif content == "broken link":
        row.symlink_to("nowhere")
    else:
        row.write_bytes(content)
    assert work_on_first(tmp_path) == 1 and json.loads(row.read_text())["again"]
    said = capsys.readouterr().out
    assert str(row) in said and said.endswith("; it is kept as lr1e-05_sd0.json.damaged_, and the trial runs again\n") and said.count("\n") == 1
    assert (folder / "lr1e-05_sd0.json.damaged").read_text() == "of an earlier time"
    assert (folder / "lr1e-05_sd0.npz.damaged").read_bytes() == b"scores"
    if isinstance(content, bytes):
        assert (folder / "lr1e-05_sd0.json.damaged_").read_bytes() == content
    assert work_on_first(tmp_path) == 0


@pytest.mark.parametrize("row", [SCORED, FAILED, {key: SCORED[key] for key in ("model", "task", "lr", "seed", "validation", "test")}])
def test_an_intact_row_stays_also_that_of_a_failed_trial_or_of_another_program(tmp_path, capsys, row):
    path = tmp_path / "trials" / "t" / "lr1e-05_sd0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row))
    assert work_on_first(tmp_path) == 0 and json.loads(path.read_text()) == row and os.listdir(path.parent) == [path.name]
    assert "every trial has its row already, so no data is read" in capsys.readouterr().err


def test_the_next_worker_removes_what_dead_ones_left_and_nothing_else(tmp_path):
    folder = tmp_path / "trials" / "t"
    folder.mkdir(parents=True)
    (folder / "lr1e-05_sd0.json").write_text(json.dumps(SCORED))
    dead = json.dumps({"kernel": lock.this_kernel(), "pid": dead_pid()})
    (folder / "lr1e-05_sd0.claim").write_text(dead)                       # killed after its row, before the end of its claim
    (folder / "lr9e-05_sd0.claim").write_text(dead)                       # of a grid that nobody continues
    kept = ["lr1e-05_sd0.json", "lr2e-05_sd0.claim", "lr1e-05_sd0.npz", "lr1e-05_sd0.json.damaged", "notes.1234", "settings.json"]
    (folder / "lr2e-05_sd0.claim").write_text(json.dumps(lock.this_process()))
    left = ["lr1e-05_sd0.json.my.host.41", "settings.json.host.41.41-0123abcd.tmp", "lr1e-05_sd0.npz.host.41-0123abcd", "lr1e-05_sd0.claim.host.41"]
    for name in [*left, *kept[2:]]:
        (folder / name).write_text("")
        os.utime(folder / name, (time.time() - 61,) * 2)
    (folder / "lr2e-05_sd0.json.host.42").write_text("")                  # somebody is writing it
    assert work_on_first(tmp_path) == 0
    assert sorted(os.listdir(folder)) == sorted([*kept, "lr2e-05_sd0.json.host.42"])


def test_a_living_claim_that_was_renamed_by_mistake_is_put_back_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError("no hard links here")
    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "x.claim"
    path.write_text(json.dumps(lock.this_process()))
    looks = iter([True, False])                   # the stale claim that it saw has been replaced before its rename
    monkeypatch.setattr(queue, "is_stale", lambda path: next(looks))
    assert not queue.remove_stale(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.claim"] and queue.owner_of(str(path)) == lock.this_process()


def test_a_folder_that_has_the_name_of_a_claim_is_refused(tmp_path):
    os.makedirs(queue.path_of(str(tmp_path), GRID[0], "claim"))
    with pytest.raises(UserError, match="lr1e-05_sd0.claim is not a file"):
        work_on_first(tmp_path)
