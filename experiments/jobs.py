"""Commands with an order among them, run a few at a time, that can be stopped at any moment and begun again.

A job is done when what it makes is there, so nothing is remembered but the files: whoever starts the same jobs again goes on behind
what is finished. Each job is a process of its own, its words go to a log of its own.
"""
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from tqdm import tqdm

from core.configurator import RunError, UserError
from core.device import pick_device


@dataclass
class Job:
    name: str
    words: list               # of the command, behind the interpreter
    is_done: object           # () -> bool: is what it makes there?
    after: list = field(default_factory=list)     # names of jobs that must be done before
    cost: float = 1.0         # in any unit that is the same for jobs of a kind, for the time that is left
    kind: str = ""
    check: object = None      # () that raises UserError if what it needs is not there


def hold(folder):
    """Take a folder for this process and those it starts, until the last of them ends. -> the file to pass on

    Raises UserError if others hold it: the kernel lets go of the lock when they end, however they do.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, "lock"), "w")      # open as long as the process lives
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another study.py, or a process it started, is at work in {folder}: wait for it, or stop it") from None
    return file


def environments(device, n):
    """What each of n processes sees of this machine: a GPU, which they may share, or some of the cores. n = 0: one a GPU, or
    one a core, at most 8: each has a gigabyte or more."""
    gpus, cores = torch.cuda.device_count() if pick_device(device) == "cuda" else 0, os.cpu_count()
    n = n or gpus or min(cores, 8)
    return [{"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {"OMP_NUM_THREADS": str(max(1, cores // n))} for i in range(n)]


def die_with_parent():
    """In a new process: be killed when the one that started it is (Linux; elsewhere the lock keeps others out until it ends)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG


def tail(path):
    """The last line of a log that says something."""
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f.read().replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def work(jobs, folder, lock, environments):
    """Run what is not done, len(environments) at a time, each with an environment of its own (a GPU, a number of threads).

    Logs are FOLDER/logs/<name>.txt. The first failure lets the others finish their step and stops: RunError with its last words.
    """
    todo = [job for job in jobs if not job.is_done()]
    names, running, free, failed = {job.name for job in todo}, {}, list(range(len(environments))), None
    spent = {}      # {kind: (cost, seconds)} of what has ended
    os.makedirs(os.path.join(folder, "logs"), exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # as Ctrl-C: what runs finishes its step and saves
    often = 1.0 if sys.stderr.isatty() else 60.0       # a log wants fewer lines than a terminal
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), mininterval=often, miniters=0,
              bar_format="{n_fmt}/{total_fmt} jobs |{bar}| {elapsed}{postfix}") as bar:
        try:
            while running or (todo and failed is None):
                ready = [job for job in todo if not names & set(job.after)] if failed is None else []
                for job in ready[:len(free)]:
                    if job.check:
                        job.check()
                    slot, path = free.pop(), os.path.join(folder, "logs", f"{job.name}.txt")
                    with open(path, "a", encoding="utf-8") as log:
                        process = subprocess.Popen([sys.executable, *job.words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                   env=os.environ | environments[slot], pass_fds=(lock.fileno(),),
                                                   preexec_fn=die_with_parent)
                    todo.remove(job)
                    running[process] = job, slot, path, time.time()
                ended = [process for process in running if process.poll() is not None]
                for process in ended:
                    job, slot, path, since = running.pop(process)
                    free.append(slot)
                    names.discard(job.name)
                    seconds, before = time.time() - since, spent.get(job.kind, (0.0, 0.0))
                    spent[job.kind] = before[0] + job.cost, before[1] + seconds
                    bar.update()
                    bar.set_postfix_str(f"eta {eta([*todo, *(j for j, *_ in running.values())], spent, len(environments))}")
                    tqdm.write(f"{job.name}: {timedelta(seconds=int(seconds))}, {tail(path)}")
                    if process.returncode or not job.is_done():
                        failed = failed or (job.name, path)
                        stop(running)
                if not ended:
                    time.sleep(0.2)
                    bar.update(0)
        except BaseException:
            stop(running)
            raise
    if failed:
        raise RunError(f"{failed[0]} failed: {tail(failed[1])} (all it said: {failed[1]}); the rest is as it was, and the same "
                       "command goes on from here")


def eta(jobs, spent, n):
    """In words, from what jobs of the same kind took; n: processes at a time. Of a kind that none has ended of, only the name."""
    seconds = sum(job.cost * spent[job.kind][1] / spent[job.kind][0] for job in jobs if job.kind in spent) / n
    new = sorted({job.kind for job in jobs} - spent.keys())
    return f"{timedelta(seconds=int(seconds))}" + f", and then {' and '.join(new)}" * bool(new)


def stop(running):
    """Ask processes to finish their step and save, and wait for them."""
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
