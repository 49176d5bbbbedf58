"""train.py as a user starts it, watched from outside: start it, wait for it, read its log."""
import json
import os
import subprocess
import sys

from core.configurator import RunError
from core.files import ROOT


def start(settings, folder, name, steps, processes=1, env=None, is_compiled=True):
    """Start train.py, or torchrun train.py, on the corpus in `folder`. -> its Popen

    It trains with MLM throughout, and neither saves nor validates before the end. settings:
    StepSettings, whose rows are those of one process. The run is in folder/NAME, and what it prints
    in folder/NAME.txt.
    """
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                    "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    never = 10 ** 9
    keys = {
        "data_dir": folder,
        "out_dir": os.path.join(folder, name),
        "size": settings.size,
        "block_size": settings.block_size,
        "random_length": settings.random_length,
        "micro_rows": settings.rows,
        "batch_rows": settings.rows * processes,
        "mask_rate": settings.mask_rate,
        "phases": f"(('mlm', {steps}),)",
        "warmup_steps": 10,
        "decay_steps": 10,
        "learning_rate": 1e-4,
        "eval_rows": 1,
        "eval_interval": never,
        "save_interval": never,
        "log_interval": 10,
        "device": settings.device,
        "dtype": settings.dtype,
        "checkpoint_activations": settings.checkpoint_activations,
        "compile": is_compiled,
    }
    words = [f"--{key}={value}" for key, value in keys.items()]
    command = [sys.executable, *torchrun, os.path.join(ROOT, "train.py"), *words]
    with open(os.path.join(folder, f"{name}.txt"), "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | (env or {}))


def finish(process, folder, name):
    """Wait for a run. -> the training rows of its log.jsonl

    Raises RunError, with the last line it printed, if it failed.
    """
    if process.wait():
        with open(os.path.join(folder, f"{name}.txt")) as f:
            lines = f.read().splitlines() or ["no message"]
        raise RunError(f"train.py ended with exit code {process.returncode}: {lines[-1]}")
    with open(os.path.join(folder, name, "log.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [row for row in rows if "loss" in row]


def seconds_between(rows, first, last):
    """Return the seconds from the end of step `first` to the end of step `last`.

    Both are steps with a row in the log, which has one every 10 steps.
    """
    seconds_at = {row["step"]: row["seconds"] for row in rows}
    return seconds_at[last] - seconds_at[first]
