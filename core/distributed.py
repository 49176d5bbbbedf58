"""The processes that torchrun starts, and what they tell each other."""

import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist


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
    if "RANK" not in os.environ:
        return Processes(0, 0, 1), device
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    # Gradients travel by nccl, and the few numbers of all_sum by gloo, so that they never wait for
    # the GPU. Without a GPU everything travels by gloo.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend)
    return Processes(rank, local_rank, world_size), device


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
