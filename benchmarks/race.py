"""Contestants of bench.py train as processes that take turns."""
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.train import AT_ONCE, NAMES, contestants, write_corpus
from core.configurator import UserError
from core.device import keep_freed_memory, limit_memory, peak_memory, pick_device, synchronize
from core.files import ROOT


# ---------------------------------------------------------------------------------------------------------------------
# the race
def contestant(c, key):
    """The process of one contestant. Each line on its stdin asks for c.steps steps, each answer is a line of JSON."""
    device = pick_device(c.device)
    if key.startswith("ours") and key != "ours-malloc":
        keep_freed_memory()
    limit_memory(device, c.memory_gib)
    try:
        step, flops = contestants(c)[key][0]()
        step()
        synchronize(device)
        answer(first=True)
        step()      # may compile once more, for gradients that are laid out otherwise
        synchronize(device)
        answer(ready=True)
        for _ in sys.stdin:
            step()      # untimed: caches and clocks are another contestant's until then
            synchronize(device)
            began = time.perf_counter()
            seen = [step() for _ in range(c.steps)]
            synchronize(device)
            answer(seconds=time.perf_counter() - began, flops=sum(map(flops, seen)))
        answer(peak=peak_memory(device))
    except (RuntimeError, MemoryError) as error:      # a GPU's and a CPU's allocator have each their own words for it
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        answer(failed="out of memory")


def profile(c, key, steps=3):
    """torch.profiler's table of a contestant's steps, most time of its own first."""
    device = pick_device(c.device)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * device.startswith("cuda")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(c, folder)
        step, _ = contestants(replace(c, data_dir=folder))[key][0]()
        for _ in range(3):
            step()
        synchronize(device)
        with torch.profiler.profile(activities=kinds) as found:
            for _ in range(steps):
                step()
            synchronize(device)
    sort = f"self_{'device' if device.startswith('cuda') else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=70)


def answer(**facts):
    print("answer " + json.dumps(facts), flush=True)


class Runner:
    """A contestant's process, seen from outside."""

    def __init__(self, c, key, folder):
        default, script = type(c)(), os.path.join(ROOT, "bench.py")
        flags = [f"--{k}={v}" for k, v in vars(c).items() if k not in ("args", "to", "data_dir") and v != getattr(default, k)]
        self.errors, self.began = open(os.path.join(folder, key), "w+"), time.time()
        self.seconds, self.flops, self.failed = [], 0, None
        empty = {name: os.path.join(folder, f"{name}-{key}") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        self.process = subprocess.Popen([sys.executable, script, "contestant", key, *flags, f"--data_dir={folder}"], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=os.environ | empty)
        self.hear()
        self.first = time.time() - self.began
        self.hear()      # else its second step runs into another's first round

    def hear(self):
        """The next answer, or {}: `failed` says why there is none."""
        for line in self.process.stdout:
            if line.startswith("answer "):      # what else it prints is its own business
                facts = json.loads(line.removeprefix("answer "))
                self.failed = self.failed or facts.get("failed")
                return facts
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        self.failed = self.failed or f"exit code {self.process.wait()}: {lines[-1] if lines else 'no message'}"
        return {}

    def race(self):
        if not self.failed:
            with suppress(BrokenPipeError):      # it died: hear() will find out why
                print(file=self.process.stdin, flush=True)
            facts = self.hear()
            self.seconds.append(facts.get("seconds"))
            self.flops += facts.get("flops", 0)

    def finish(self):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.peak = None if self.failed else self.hear().get("peak")
        self.process.wait()
        self.errors.close()


def measure(c, device, show):
    """-> {key: row}, a row with either `why` it was not measured or seconds a step of each round, tok_per_s, the median ratio
    within a round to the `reference` (the first contestant), flops_per_s, peak bytes, and `first`, seconds from the start of its
    process to the end of its first step"""
    everybody, found = contestants(c), {}
    racing = [key for key, (_, why) in everybody.items() if not why]
    if not racing:
        raise UserError(f"contestants={c.contestants}: none can be measured here: "
                        + "; ".join(f"{key}: {why}" for key, (_, why) in everybody.items()))
    groups = [[key] for key in racing]
    if device == "cpu":      # who waits keeps its memory; the first races in each group, begun anew
        groups = [racing[:1] + racing[i:i + AT_ONCE] for i in range(1, len(racing), AT_ONCE)] or groups
    bar = tqdm(total=sum(map(len, groups)) * (c.rounds + 1), desc="rounds", smoothing=0)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(c, folder)
        for group in groups:
            runners = {}
            for key in group:
                runners[key] = Runner(c, key, folder)
                bar.update()
                show(f"{NAMES[key]}: " + (runners[key].failed or f"first step after {runners[key].first:.1f} s"))
            for _ in range(c.rounds):
                for runner in runners.values():
                    runner.race()
                    bar.update()
            for key, runner in runners.items():
                runner.finish()
                found.setdefault(key, runner)      # of the first, who ran in each group, the run with an empty cache
            for runner in runners.values():
                runner.beside = next(((k, r) for k, r in (runners if device == "cpu" else found).items() if not r.failed), None)
    bar.close()
    tokens, table = c.rows * c.block_size * c.steps, {}
    for key, (_, why) in everybody.items():
        runner = found.get(key)
        table[key] = row = {"key": key}
        if runner is None or runner.failed:
            row["why"] = why or runner.failed
            continue
        first, beside = runner.beside
        row |= {"seconds": [s / c.steps for s in runner.seconds], "tok_per_s": tokens / np.median(runner.seconds),
                "reference": first, "ratio": float(np.median(np.divide(runner.seconds, beside.seconds))),
                "flops_per_s": runner.flops / c.rounds / np.median(runner.seconds), "peak": runner.peak, "first": runner.first}
    return table
