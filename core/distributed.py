"""The processes that torchrun starts, and what they tell each other."""

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from core.configurator import UserError

# How long a process waits for the others, e.g. for a machine whose network is down. torch's own
# default is half an hour. A checkpoint of the 1b model is written in less.
TIMEOUT = timedelta(minutes=5)


@dataclass
class Processes:
    """This process among those that torchrun started; (0, 0, 1) without torchrun."""

    rank: int          # this process' number among all
    local_rank: int    # its number among those of its machine
    world_size: int    # how many there are

    @property
    def is_first(self):
        """True for the one process that writes files and the log."""
        return self.rank == 0

    def print0(self, text):
        """Print a line, in the first process only."""
        if self.is_first:
            print(text, flush=True)


def start_processes(device):
    """Join torchrun's process group. -> (Processes, this process' device)"""
    # Some platforms set RANK for processes that torchrun did not start: then this is the only one.
    if not all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return Processes(0, 0, 1), device
    try:
        rank = int(os.environ["RANK"])
        local_rank = int(os.environ["LOCAL_RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise UserError("RANK, LOCAL_RANK or WORLD_SIZE is not a number: start with torchrun") from None
    if not 0 <= local_rank <= rank < world_size:
        raise UserError(
            f"RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE={world_size} do not fit together: "
            "start with torchrun"
        )
    die_with_parent(signal.SIGTERM)
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    # Gradients travel by nccl, and the few numbers of all_sum by gloo, so that they never wait for
    # the GPU. Without a GPU everything travels by gloo.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    return Processes(rank, local_rank, world_size), device


def die_with_parent(number):
    """Ask the kernel to send this process a signal when the process that started it dies. Linux only.

    A kill -9 of torchrun, as by the out-of-memory killer, would otherwise leave its ranks training.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def all_sum(values, processes):
    """Sum a list of numbers over all processes. -> list of floats"""
    if processes.world_size == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    # gloo's thread drops its reference to the tensor a moment later, and needs Python's lock to do
    # so. A process that exits before that aborts. So wait until ours is the only reference (besides
    # the one that getrefcount itself holds).
    for _ in range(1000):
        if sys.getrefcount(total) == 2:
            break
        time.sleep(0)
    return total.tolist()


def shows_progress():
    """True in the process that draws progress bars: the first on each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
