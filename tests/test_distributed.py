"""torchrun's processes: what their environment may be, and who is named when one is missing."""
import os
import subprocess
import sys

import pytest
import torch.distributed as dist
from conftest import ROOT, run_python

from core import distributed, lock
from core.configurator import RunError, UserError
from core.distributed import Processes

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}


@pytest.fixture
def environment(monkeypatch):
    def set_all(variables):
        for name in (*distributed.VARIABLES, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return set_all


@pytest.mark.parametrize("variables", [
    {}, {"RANK": "0"}, {"RANK": "3"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}, TORCHRUN | {"WORLD_SIZE": "1", "MASTER_ADDR": "nowhere.invalid"}])
def test_a_process_that_a_platform_numbered_without_torchrun_is_the_only_one(environment, variables):
    environment(variables)
    assert distributed.start_processes("cpu") == (Processes(0, 0, 1), "cpu") and not dist.is_initialized()


@pytest.mark.parametrize("variables, words", [
    ({"WORLD_SIZE": "8"}, "RANK and LOCAL_RANK"), ({"RANK": "3", "WORLD_SIZE": "8"}, "LOCAL_RANK"),
    (TORCHRUN | {"RANK": "two"}, "RANK='two'"), (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK=''"), (TORCHRUN | {"RANK": "-1"}, "RANK='-1'"),
    (TORCHRUN | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE="), (TORCHRUN | {"RANK": "2"}, "do not fit"), (TORCHRUN | {"WORLD_SIZE": "0"}, "do not fit"),
    (TORCHRUN | {"LOCAL_RANK": "1"}, "do not fit"), (TORCHRUN | {"MASTER_PORT": "99999"}, "do not fit"), (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT")])
def test_variables_that_do_not_fit_together_are_named(environment, variables, words):
    environment(variables)
    with pytest.raises(UserError, match=words):
        distributed.start_processes("cpu")


def test_a_process_that_nobody_joins_gives_up_in_time_and_names_who_is_missing(environment, monkeypatch):
    environment(TORCHRUN)
    monkeypatch.setattr(distributed, "ANSWER", 0.1)
    with pytest.raises(RunError, match="1 of 2|did not find each other at 127.0.0.1"):
        distributed.start_processes("cpu", timeout=1)


WAITS = """
import os, signal, sys
from core import distributed
distributed.ANSWER = 0.3
from core.configurator import RunError
processes, _ = distributed.start_processes("cpu", timeout=2)
distributed.wait_for_all(processes)
if processes.rank == 1:
    if sys.argv[1] == "dies": os._exit(9)
    signal.pause()          # its link is down
try:
    with distributed.naming_the_missing(processes):
        distributed.all_sum([1], processes)
except RunError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_process_that_is_lost_is_named_by_the_others(how):
    environment = os.environ | TORCHRUN | {"MASTER_PORT": str(29600 + os.getpid() % 1000), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", WAITS, how], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    text, _ = ranks[0].communicate(timeout=60)
    ranks[1].kill()
    ranks[1].communicate()
    assert "lost another process" in text and "no answer from rank 1 on " in text and "--timeout" in text


def test_a_refusal_reaches_all_ranks(tmp_path, command):
    words = command("run", micro_rows=4)
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    with lock.hold(out_dir, "train.py"):
        done = run_python(["-m", "torch.distributed.run", "--nproc_per_node=2", *words], env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "is writing" in done.stderr and "bug in the program" not in done.stderr
    assert os.listdir(out_dir) == [lock.NAME]
