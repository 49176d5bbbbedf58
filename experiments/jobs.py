"""Run commands that depend on each other, a few at a time.

A job is done when the files it makes exist. Nothing else is remembered: you can stop at any moment,
and start the same jobs again to resume. Each job is a process of its own, with a log of its own.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
from tqdm import tqdm

from core.configurator import RunError
from core.device import pick_device
from core.distributed import die_with_parent


@dataclass
class Job:
    """A command of this repository."""

    name: str
    words: list  # a program and its settings, without the Python interpreter
    is_done: Callable  # () -> bool: do the files that it makes exist?
    after: list = field(default_factory=list)  # names of the jobs that must be done before
    kind: str = ""     # train, finetune or eval_ir
    cost: float = 1.0  # jobs of one kind take time in proportion to it
    # () -> None; raises UserError if something that it needs is missing
    check: Callable | None = None


@dataclass
class Running:
    """A job that has been started."""

    job: Job
    process: subprocess.Popen
    slot: int             # the index of its environment
    log: str              # the path of its log
    log_start: int        # where its part of the log begins, in bytes: earlier runs wrote the rest
    started: float        # time.time()
    seconds: float = 0.0  # how long it took, once it has ended


@dataclass
class Spent:
    """The cost of all jobs of one kind that have ended, and the seconds they took."""

    cost: float = 0.0
    seconds: float = 0.0


def process_environments(device, n_processes):
    """The environment variables of each process: its GPU, which several may share, or its threads.

    n_processes = 0 means one per GPU, or without a GPU one per core, at most 8 (a process takes a
    gigabyte of memory or more).
    """
    cores = os.cpu_count()
    gpus = torch.cuda.device_count() if pick_device(device) == "cuda" else 0
    n_processes = n_processes or gpus or min(cores, 8)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": str(i % gpus)} for i in range(n_processes)]
    threads = max(1, cores // n_processes)
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(n_processes)]


def check_first(jobs):
    """Raises UserError if a job that can start now lacks something.

    Its own check would come when its turn does, perhaps after hours of other jobs.
    """
    done = {job.name for job in jobs if job.is_done()}
    for job in jobs:
        can_start = job.name not in done and done.issuperset(job.after)
        if can_start and job.check:
            job.check()


def run_jobs(jobs, folder, lock_file, environments):
    """Run the jobs that are not done, as many at a time as there are environments.

    A job's log is FOLDER/logs/NAME.txt. After the first failure the other running jobs finish their
    step and stop. Then this raises RunError with the last line that the failed job printed.
    """
    os.makedirs(os.path.join(folder, "logs"), exist_ok=True)
    # SIGTERM does the same as Ctrl-C: the running jobs finish their step and save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    queue = JobQueue(jobs, folder, lock_file, environments)
    # A log needs fewer lines than a terminal.
    seconds_between_updates = 1.0 if sys.stderr.isatty() else 60.0
    n_done = len(jobs) - len(queue.waiting)
    with tqdm(
        total=len(jobs),
        initial=n_done,
        mininterval=seconds_between_updates,
        miniters=0,
        bar_format="{n_fmt}/{total_fmt} jobs |{bar}| {elapsed}{postfix}",
    ) as bar:
        try:
            while queue.has_work():
                queue.start_ready()
                ended = queue.collect_ended()
                # Tell what has ended, and how much time is left.
                for running in ended:
                    bar.update()
                    bar.set_postfix_str(f"eta {queue.time_left()}")
                    duration = timedelta(seconds=int(running.seconds))
                    tqdm.write(f"{running.job.name}: {duration}, {last_line(running.log)}")
                if queue.failed:
                    queue.stop()
                elif not ended:
                    time.sleep(0.2)
                    bar.update(0)
        except BaseException:
            queue.stop()
            raise
    if queue.failed:
        log = queue.failed.log
        raise RunError(
            f"{queue.failed.job.name} failed: {last_line(log)} (its whole log: {log}); "
            "all else is kept, run the same command to resume"
        )


class JobQueue:
    """The jobs of run_jobs: those that wait, those that run, and what the ended ones took."""

    def __init__(self, jobs, folder, lock_file, environments):
        self.folder = folder
        self.lock_file = lock_file
        self.environments = environments
        self.waiting = [job for job in jobs if not job.is_done()]
        self.running = []   # of Running
        self.failed = None  # the first Running that failed
        self.unfinished = {job.name for job in self.waiting}  # names of jobs that wait or run
        self.free_slots = list(range(len(environments)))
        self.spent = {}  # {kind: Spent}

    def has_work(self):
        """True while jobs run, or wait and may still be started."""
        if self.failed:
            return bool(self.running)
        return bool(self.running or self.waiting)

    def start_ready(self):
        """Start jobs that wait for no other, while slots are free; none after a failure."""
        if self.failed:
            return
        ready = [job for job in self.waiting if self.unfinished.isdisjoint(job.after)]
        for job in ready[: len(self.free_slots)]:
            if job.check:
                job.check()
            self.waiting.remove(job)
            self.running.append(self.start(job, self.free_slots.pop()))

    def start(self, job, slot):
        """Start a job in the environment of a slot. -> Running"""
        path = os.path.join(self.folder, "logs", f"{job.name}.txt")
        with open(path, "ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                [sys.executable, *job.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environments[slot],
                pass_fds=(self.lock_file.fileno(),),
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
            )
        return Running(job, process, slot, path, log_start, started=time.time())

    def collect_ended(self):
        """Remove the jobs that have ended from the running ones. -> list of Running"""
        ended = [running for running in self.running if running.process.poll() is not None]
        for running in ended:
            job = running.job
            running.seconds = time.time() - running.started
            # Make room for the next job, and for those that waited for this one.
            self.running.remove(running)
            self.free_slots.append(running.slot)
            self.unfinished.discard(job.name)
            # Its seconds tell how long others of its kind will take.
            spent = self.spent.setdefault(job.kind, Spent())
            spent.cost += job.cost
            spent.seconds += running.seconds
            # A job that exits with 0 but has not made its files has failed, too.
            has_failed = running.process.returncode != 0 or not job.is_done()
            if has_failed and not self.failed:
                self.failed = running
        return ended

    def time_left(self):
        """The time that is left, in words."""
        running_jobs = [running.job for running in self.running]
        return eta([*self.waiting, *running_jobs], self.spent, len(self.environments))

    def stop(self):
        """Ask the running jobs to finish their step and save, and kill those that take a minute.

        A training that still compiles has nothing to save, and would not look up for minutes: it is
        killed at once. So is everything if Ctrl-C comes a second time.
        """
        for running in self.running:
            if has_taken_a_step(running):
                running.process.terminate()
            else:
                running.process.kill()
        began = time.monotonic()
        is_said = False
        try:
            while names := [r.job.name for r in self.running if r.process.poll() is None]:
                seconds = time.monotonic() - began
                if seconds > 60:
                    break
                if seconds > 2 and not is_said:
                    tqdm.write(f"{', '.join(names)}: finishing the step and saving, at most a minute; "
                               "Ctrl-C ends it at once")
                    is_said = True
                time.sleep(0.1)
        finally:
            for running in self.running:
                running.process.kill()
                running.process.wait()


def has_taken_a_step(running):
    """True if a job may have something to save: all but a training before its first step."""
    if running.job.kind != "train":
        return True
    with open(running.log, "rb") as f:
        f.seek(running.log_start)
        return b"first step after" in f.read()


def last_line(path):
    """The last line of a log that is not blank."""
    with open(path, encoding="utf-8", errors="replace") as f:
        text = f.read().replace("\r", "\n")  # progress bars return to the beginning of their line
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def eta(jobs, spent, n_processes):
    """The time that jobs will take, in words, if they take as long as others of their kind took.

    spent: {kind: Spent} of the jobs that have ended. A kind without one is named without a time.
    """
    seconds = 0.0
    for job in jobs:
        if job.kind in spent:
            seconds += job.cost * spent[job.kind].seconds / spent[job.kind].cost
    words = str(timedelta(seconds=int(seconds / n_processes)))
    unknown_kinds = {job.kind for job in jobs} - spent.keys()
    if unknown_kinds:
        words += f", and then {' and '.join(sorted(unknown_kinds))}"
    return words
