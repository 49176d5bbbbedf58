"""The processes that torchrun starts, and what they tell each other."""
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Processes:
    """This process among those torchrun started; (0, 0, 1) without torchrun."""
    rank: int
    local_rank: int
    world_size: int

    @property
    def first(self):
        return self.rank == 0


def start_processes(device):
    """Join torchrun's process group (nccl on GPUs, gloo on CPUs). -> (Processes, this process' device)"""
    if "RANK" not in os.environ:
        return Processes(0, 0, 1), device
    p = Processes(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if device == "cuda":
        device = f"cuda:{p.local_rank}"
        torch.cuda.set_device(device)
    # with a GPU: gradients travel by nccl, the few numbers of all_sum by gloo, so that they never wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return p, device


def all_sum(values, processes):
    """Sum a list of numbers over all processes. -> list of floats"""
    if processes.world_size == 1:
        return [float(v) for v in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    for _ in range(1000):      # gloo's thread lets go of the tensor under Python's lock; a process that ends before it has, aborts
        if sys.getrefcount(total) == 2:
            break
        time.sleep(0)
    return total.tolist()


def speaks():
    """Is this the worker that draws progress bars? Of torchrun's workers one a machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
