"""What every part of bench.py writes: a row of JSON for each result, with the date, the device and
the versions."""
import json
import os
import platform
import subprocess
import time

import torch

import kernels


def describe(device):
    """Return the name of the device and the version of torch, in words."""
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
    """Return the versions that a kernel's speed and correctness depend on. -> {name: version}"""
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
    """Append a row, with date and device, to the .jsonl file `path`. No path: do nothing."""
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
    """Print a line at once, so that a run that is cut short has shown its results so far."""
    print(line, flush=True)


def error_in_words(error):
    """Return an exception in one line: its type, and the first line of its message."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
