"""Contestants of `bench.py train` as processes that take turns.

Each contestant is a process of its own, as a user would run it, with an empty compiler cache. It
runs one round of steps whenever a line arrives on its stdin, and answers with a line of JSON. On a
CPU groups of up to five contestants take turns, and the first contestant is in every group. On a
GPU, whose memory they would have to share, they run one after the other.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.contestants import NAMES, contestants, write_corpus
from benchmarks.settings import StepSettings, as_flags, settings_for
from core.configurator import NonNegativeFloat, Path, PositiveInt
from core.device import keep_freed_memory, limit_memory, peak_memory, pick_device, synchronize
from core.files import ROOT

AT_ONCE = 4            # contestants in a group beside the first: each needs 2 to 4 GiB


# --------------------------------------------------------------------------------------------------
# the process of one contestant

@dataclass
class ContestantConfig(StepSettings):
    args: tuple = ()                    # the contestant's key in NAMES
    data_dir: Path = "data/demo"        # the corpus
    nanogpt: Path = ""                  # folder of a clone of karpathy/nanoGPT
    memory_gib: NonNegativeFloat = 0.0  # use no more of the device's memory than this; 0: all of it
    steps: PositiveInt = 4              # in a round


def run_contestant(c):
    """bench.py contestant KEY: for each line on stdin, run c.steps steps, and answer with JSON."""
    key = c.args[0]
    device = pick_device(c.device)
    if key.startswith("ours") and key != "ours-malloc":
        keep_freed_memory()
    limit_memory(device, c.memory_gib)
    try:
        training_step = contestants(c, c.nanogpt)[key].build(c, c.data_dir)
        training_step.run()
        synchronize(device)
        answer(first=True)
        # The second step may compile once more, for gradients with another memory layout.
        training_step.run()
        synchronize(device)
        answer(ready=True)
        for _ in sys.stdin:
            race_one_round(training_step, c.steps, device)
        answer(peak=peak_memory(device))
    except (RuntimeError, MemoryError) as error:
        # A CPU that runs out of memory may raise a mere RuntimeError.
        is_out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not is_out_of_memory and "can't allocate memory" not in str(error):
            raise
        answer(failed="out of memory")


def race_one_round(training_step, n_steps, device):
    """Run and time n_steps steps, after one that is not timed."""
    # Another contestant has run before, and has left its data in the caches.
    training_step.run()
    synchronize(device)
    began = time.perf_counter()
    batches = [training_step.run() for _ in range(n_steps)]
    synchronize(device)
    seconds = time.perf_counter() - began
    answer(seconds=seconds, flops=sum(training_step.flops_of(batch) for batch in batches))


def answer(**facts):
    """Send facts to the Runner of this process."""
    print("answer " + json.dumps(facts), flush=True)


# --------------------------------------------------------------------------------------------------
# that process, seen from outside

class Runner:
    """Starts a contestant's process and waits for its first two steps.

    seconds: of each round; flops: of all rounds; first: seconds from the start of the process to
    the end of its first step; peak: bytes of memory; failed: why it has stopped, in words, or None.
    """

    def __init__(self, settings, key, folder):
        """settings: ContestantConfig; folder: the corpus, and a place for the process' files."""
        began = time.time()
        self.seconds = []
        self.flops = 0
        self.failed = None
        self.peak = None
        self.reference = None      # (key, Runner) that it is compared with
        self.errors = open(os.path.join(folder, key), "w+")
        empty_caches = {}
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            empty_caches[name] = os.path.join(folder, f"{name}-{key}")
        settings = settings_for(ContestantConfig, settings, data_dir=folder)
        script = os.path.join(ROOT, "bench.py")
        command = [sys.executable, script, "contestant", key, *as_flags(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True,
                                        env=os.environ | empty_caches)
        self.read_answer()
        self.first = time.time() - began
        # Wait for the second step, too, or it would run during another contestant's first round.
        self.read_answer()

    def read_answer(self):
        """Return the next answer. Without one return {}, and let `failed` say why."""
        for line in self.process.stdout:
            # The peers may print lines of their own.
            if line.startswith("answer "):
                facts = json.loads(line.removeprefix("answer "))
                self.failed = self.failed or facts.get("failed")
                return facts
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        last_line = lines[-1] if lines else "no message"
        self.failed = self.failed or f"exit code {self.process.wait()}: {last_line}"
        return {}

    def race(self):
        """Run one round."""
        if self.failed:
            return
        # If the process has died, the pipe is broken, and read_answer() finds out why.
        with suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        facts = self.read_answer()
        self.seconds.append(facts.get("seconds"))
        self.flops += facts.get("flops", 0)

    def finish(self):
        """Let the process end, and read its peak memory."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        if not self.failed:
            self.peak = self.read_answer().get("peak")
        self.process.wait()
        self.errors.close()


# --------------------------------------------------------------------------------------------------
# the race

def measure(settings, keys, rounds, device, show):
    """Race the contestants `keys`. -> {key: its Runner, finished}

    settings: ContestantConfig; show(line) reports progress.
    """
    finished = {}
    groups = groups_of(keys, device)
    n_turns = sum(len(group) for group in groups) * (rounds + 1)
    bar = tqdm(total=n_turns, desc="rounds", smoothing=0)
    with tempfile.TemporaryDirectory() as folder, bar:
        write_corpus(settings, folder)
        for group in groups:
            runners = race_group(settings, group, rounds, folder, bar, show)
            # The first contestant runs in each group. Its first run counts, which found an empty
            # compiler cache.
            for key, runner in runners.items():
                finished.setdefault(key, runner)
            # On a CPU a ratio is fair within a group only, whose members took turns.
            comparable = runners if device == "cpu" else finished
            working = [(key, runner) for key, runner in comparable.items() if not runner.failed]
            for runner in runners.values():
                runner.reference = working[0] if working else None
    return finished


def groups_of(keys, device):
    """Decide which contestants are in memory at the same time. -> [[key, ...], ...]"""
    if device != "cpu" or len(keys) == 1:
        return [[key] for key in keys]
    groups = []
    for i in range(1, len(keys), AT_ONCE):
        groups.append([keys[0], *keys[i:i + AT_ONCE]])
    return groups


def race_group(settings, keys, rounds, folder, bar, show):
    """Start these contestants and let them take turns for `rounds` rounds. -> {key: Runner}"""
    runners = {}
    for key in keys:
        runner = Runner(settings, key, folder)
        runners[key] = runner
        bar.update()
        show(f"{NAMES[key]}: {runner.failed or f'first step after {runner.first:.1f} s'}")
    for _ in range(rounds):
        for runner in runners.values():
            runner.race()
            bar.update()
    for runner in runners.values():
        runner.finish()
    return runners


def row_of(key, runner, tokens, n_steps):
    """Return the result of a contestant as a row.

    tokens: in a step. The row's `seconds` are those of a step in each round, and its `ratio` is the
    median of the ratios to the reference within a round.
    """
    if runner.failed:
        return {"key": key, "why": runner.failed}
    median = np.median(runner.seconds)
    reference_key, reference = runner.reference
    return {
        "key": key,
        "seconds": [seconds / n_steps for seconds in runner.seconds],
        "tok_per_s": tokens * n_steps / median,
        "reference": reference_key,
        "ratio": float(np.median(np.divide(runner.seconds, reference.seconds))),
        "flops_per_s": runner.flops / len(runner.seconds) / median,
        "peak": runner.peak,
        "first": runner.first,
    }
