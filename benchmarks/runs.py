"""The part of bench.py that watches train.py itself: is a step as long after a thousand as at the start, does memory grow, what
do two processes gain, and how many rows fit a device?"""
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import torch

from benchmarks import train as bench_train
from benchmarks.race import Runner
from core.configurator import RunError
from core.files import ROOT

WARMUP = 100      # steps that steady() does not look at


def start(c, folder, name, steps, processes=1, env=None):
    """train.py, or torchrun train.py, on the corpus in `folder`, MLM throughout, neither saving nor validating on its way."""
    script = os.path.join(ROOT, "train.py")
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"] if processes > 1 else []
    settings = {"data_dir": folder, "out_dir": os.path.join(folder, name), "size": c.size, "block_size": c.block_size,
                "random_length": c.random_length, "micro_rows": c.rows, "batch_rows": c.rows * processes, "mask_rate": c.mask_rate,
                "phases": f"(('mlm', {steps}),)", "warmup_steps": 10, "decay_steps": 10, "learning_rate": 1e-4, "eval_rows": 1,
                "eval_interval": 10 ** 9, "save_interval": 10 ** 9, "log_interval": 10, "device": c.device, "dtype": c.dtype,
                "checkpoint_activations": c.checkpoint_activations}
    with open(os.path.join(folder, f"{name}.txt"), "w") as said:
        return subprocess.Popen([sys.executable, *torchrun, script, *(f"--{k}={v}" for k, v in settings.items())], stdout=said,
                                stderr=said, env=os.environ | (env or {}))


def finish(process, folder, name):
    """-> the training rows of its log.jsonl"""
    if process.wait():
        with open(os.path.join(folder, f"{name}.txt")) as f:
            raise RunError(f"train.py ended with exit code {process.returncode}: {(f.read().splitlines() or ['no message'])[-1]}")
    with open(os.path.join(folder, name, "log.jsonl"), encoding="utf-8") as f:
        return [row for row in map(json.loads, f) if "loss" in row]


def seconds(log, first, last):
    """Of steps (first, last]; a step's own time is that of the log_interval it lies in."""
    at = {row["step"]: row["seconds"] for row in log}
    return at[last] - at[first]


def steady(c):
    """-> {"first", "last": seconds of the first and last 100 steps after WARMUP, "growth": bytes of peak memory between them,
    "windows": seconds of each 100 steps}"""
    with tempfile.TemporaryDirectory() as folder:
        bench_train.write_corpus(c, folder)
        log = finish(start(c, folder, "steady", c.run_steps + WARMUP), folder, "steady")
    memory = {row["step"]: row["peak_memory"] for row in log}
    windows = [seconds(log, s, s + 100) for s in range(WARMUP, c.run_steps + WARMUP, 100)]
    return {"first": windows[0], "last": windows[-1], "windows": windows, "peak": memory[c.run_steps + WARMUP],
            "growth": memory[c.run_steps + WARMUP] - memory[WARMUP + 100]}


def scaling(c, device):
    """Rounds of: one process alone, as many side by side that know nothing of each other, and as many under DDP, each with a
    core or a GPU of its own and with the same rows a process. -> {"alone" | "apart" | "together": tokens/s of each round}"""
    n, on_gpu, one_core, found = c.processes, device.startswith("cuda"), {"OMP_NUM_THREADS": "1"}, {}
    with tempfile.TemporaryDirectory() as folder:
        bench_train.write_corpus(c, folder)
        for i in range(c.rounds):
            for key, runs, processes in (("alone", 1, 1), ("apart", n, 1), ("together", 1, n)):
                names = [f"{key}{i}-{j}" for j in range(runs)]
                own = [{"CUDA_VISIBLE_DEVICES": str(j)} if on_gpu and processes == 1 else one_core for j in range(runs)]
                started = [start(c, folder, name, c.run_steps, processes, env) for name, env in zip(names, own)]
                logs = [finish(process, folder, name) for process, name in zip(started, names)]
                tokens = processes * c.rows * c.block_size * (c.run_steps - 20)      # behind 20 steps of warm-up
                found.setdefault(key, []).append(sum(tokens / seconds(log, 20, c.run_steps) for log in logs))
    return found


def largest(c):
    """The most rows a step of c.size can have, within a sixteenth: two small steps tell what a row takes, the line through them
    where the memory ends, and then real steps whether it does. -> (rows, peak bytes of that step)"""
    found = {}

    def peak(rows):
        if rows not in found:
            runner = Runner(replace(c, rows=rows, steps=1), "ours", folder)
            runner.race()
            runner.finish()
            if runner.failed and runner.failed != "out of memory":
                raise RunError(f"{rows} rows: {runner.failed}")
            found[rows] = runner.peak
        return found[rows]
    with tempfile.TemporaryDirectory() as folder:
        bench_train.write_corpus(replace(c, rows=256), folder)
        total = c.memory_gib * 2 ** 30 or torch.cuda.get_device_properties(0).total_memory
        fits, too_many, rows = 0, None, 1
        while too_many is None or too_many - fits > max(1, fits // 16):
            if peak(rows):
                a_row = max(1, (peak(rows) - (peak(fits) if fits else 0)) / (rows - fits))
                fits, rows = rows, max(rows + 1 + rows // 16, rows + int((total - peak(rows)) / a_row)) if fits else 5
            else:
                too_many, rows = rows, rows
            rows = rows if too_many is None else min(rows, (fits + too_many) // 2)
        return fits, found.get(fits)
