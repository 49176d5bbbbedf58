"""The processes that torchrun starts, and what they tell each other."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from core.configurator import RunError, UserError

# What torchrun tells each process that it starts.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ANSWER = 5.0      # seconds that the living processes have to answer when one is missing

store = None      # where torchrun's processes leave each other notes, once they have joined


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


def start_processes(device, timeout=1800):
    """Join torchrun's process group. -> (Processes, this process' device)

    timeout: seconds to wait for another process before it is given up. Raises UserError if the
    variables that torchrun sets do not fit together.
    """
    global store
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        # Some platforms set a few of them for a process that is the only one.
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return Processes(0, 0, 1), device
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {' and '.join(missing)} is not set: "
            "start with torchrun, or unset WORLD_SIZE for a single process"
        )
    rank, local_rank, world_size = (number_in(name) for name in VARIABLES[:3])
    port = number_in("MASTER_PORT")
    if not 0 <= local_rank <= rank < world_size or port > 65535:
        raise UserError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world_size} and MASTER_PORT={port} do "
            "not fit together: start with torchrun, or unset them for a single process"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:      # our parent is torchrun
        die_with_parent(signal.SIGTERM)
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}, but this process sees {torch.cuda.device_count()} GPUs: start "
                "as many processes on a machine as it has GPUs"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if world_size == 1:
        return Processes(0, 0, 1), device
    # Gradients travel by nccl, and the few numbers of all_sum by gloo, so that they never wait for
    # the GPU. Without a GPU everything travels by gloo.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    limit = timedelta(seconds=min(timeout, 10**7))      # four months; gloo's clock ends somewhere beyond
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
        store.set(f"host of {rank}", socket.gethostname())
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    except (RuntimeError, OSError) as error:      # torch's DistError is a RuntimeError
        raise RunError(
            f"the {world_size} processes did not find each other at {os.environ['MASTER_ADDR']}:{port} in "
            f"{timeout} s ({first_line(error)}); {who_is_missing(rank, world_size)}"
        ) from None
    return Processes(rank, local_rank, world_size), device


def number_in(name):
    """The number in a variable of torchrun. Raises UserError."""
    text = os.environ[name]
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UserError(f"{name}={text!r} is not a number: start with torchrun, or unset it")
    return int(text)


def die_with_parent(number):
    """Ask the kernel to send this process a signal when the process that started it dies. Linux only.

    A kill -9 of torchrun, as by the out-of-memory killer, would otherwise leave its ranks training.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:      # it died a moment ago
            os.kill(os.getpid(), number)


def wait_for_all(processes, hours=12):
    """Wait until all processes have come this far, even if one of them reads for hours.

    A process that dies meanwhile ends all: torchrun sees to that.
    """
    if processes.world_size > 1:
        store.set(f"ready {processes.rank}", "")
        store.wait([f"ready {rank}" for rank in range(processes.world_size)], timedelta(hours=hours))


@contextlib.contextmanager
def naming_the_missing(processes):
    """Turn the error of a process that waited in vain for another into a RunError that names the other."""
    try:
        yield
    except RuntimeError as error:
        # torch raises a DistError for nccl and the store, and a plain RuntimeError for gloo.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunError(
            f"lost another process of this run ({first_line(error)}); "
            f"{who_is_missing(processes.rank, processes.world_size)}. The last checkpoint stays: run the "
            "same command to resume, with a larger --timeout if it was only slow"
        ) from None


def who_is_missing(rank, world_size):
    """In words, which processes do not answer."""
    try:
        store.set(f"answer of {rank}", "")
        time.sleep(ANSWER)
        names = []
        for other in range(world_size):
            if not store.check([f"answer of {other}"]):
                host = "an unknown machine"
                if store.check([f"host of {other}"]):
                    host = store.get(f"host of {other}").decode()
                names.append(f"rank {other} on {host}")
    except (RuntimeError, AttributeError):      # AttributeError: not even a store was found
        return f"the first machine, {os.environ.get('MASTER_ADDR')}, does not answer"
    if not names:
        return "all answer now"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"no answer from {', '.join(names[:8])}{more}"


def first_line(error):
    return str(error).strip().splitlines()[0][:200]


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
