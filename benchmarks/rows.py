"""What every part of bench.py writes: a row of JSON for each fact, with the date, the device and
the versions beside it."""
import json
import os
import platform
import subprocess
import time

import torch

import kernels


def describe(device):
    """The device in words, and what computes on it."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        if names:
            model = names[0]
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def versions(device):
    """The versions that decide a kernel's speed and correctness. -> {name: version}"""
    facts = {"torch": torch.__version__}
    if kernels.triton_kernels is None:
        return facts
    import triton

    facts["triton"] = triton.__version__
    if device.startswith("cuda"):
        from triton.backends.nvidia.compiler import get_ptxas_version

        major, minor = torch.cuda.get_device_capability()
        facts["ptxas"] = get_ptxas_version(10 * major + minor).splitlines()[-1]
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def record(path, row, device):
    """Append a row to the .jsonl file `path`, unless that is ""."""
    if not path:
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "kind": device.partition(":")[0],
        "device": describe(device),
        "python": platform.python_version(),
    }
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(facts | row) + "\n")


def log(line):
    """Print a line at once, so that a run that is cut short has shown what it knows."""
    print(line, flush=True)
