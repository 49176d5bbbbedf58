"""What machine this is: device, precision, compiler, processes, peak FLOP/s; and its files: packed ones read line by line,
written ones never half written."""
import ctypes
import os
import shutil
import sys
import sysconfig

import torch

from core.configurator import UserError
from kernels import resolve

try:
    import resource
except ImportError:      # Windows
    resource = None

# Dense bf16 FLOP/s of one device by the vendors' datasheets, for MFU; a device that is not listed gets none.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
              "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI250X": 192e12,
              "MI300X": 1307e12}


def pick_device(name):
    """"auto" -> cuda where there is one, else cpu; other names as torch knows them. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(kind, False):
        raise UserError(f"device={name}: this machine has {', '.join(k for k, v in there.items() if v)}")
    return name


def cpu_vendor():
    """"AuthenticAMD", "GenuineIntel", ...; "" where Linux does not say."""
    if not os.path.isfile("/proc/cpuinfo"):
        return ""
    with open("/proc/cpuinfo") as f:
        return next((line.split(":")[1].strip() for line in f if line.startswith("vendor_id")), "")


def fast_bf16_on_cpu():
    """With AMX (made for it, not measured here), or AMD's avx512_bf16: twice fp32's rate. Intel's without AMX: half (LOG.md)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() and cpu_vendor() == "AuthenticAMD"


def pick_dtype(name, device):
    """"auto" -> "bfloat16" where its matrix products are faster than fp32's (CUDA; some CPUs), else "float32".
    fp32 weights either way: bfloat16 means autocast."""
    if name not in ("auto", "bfloat16", "float32"):
        raise UserError(f"dtype={name}: expected auto, bfloat16 (autocast over fp32 weights) or float32")
    if name != "auto":
        return name
    fast = torch.cuda.is_bf16_supported() if device.startswith("cuda") else device == "cpu" and fast_bf16_on_cpu()
    return "bfloat16" if fast else "float32"


def pick_attention(name, device, dtype, config):
    """The attention implementation that runs: `name`, or what "auto" comes to for this device and model.

    dtype: "bfloat16" or "float32"; config: a ModelConfig. Raises UserError for a name that is not
    known, or that cannot run here.
    """
    try:
        return resolve(name, device.partition(":")[0], getattr(torch, dtype), config.head_dim, config.n_head, config.n_kv_head)
    except ValueError as error:
        raise UserError(str(error)) from None


def why_not_compile(device):
    """None if torch.compile can build kernels here, else the reason in words."""
    if device.startswith("cuda"):
        return None
    if device != "cpu":
        return f"not tried on {device}"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++", "c++")):
        return "no C++ compiler (g++ or clang++) is installed"
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Python's C headers are not installed (python3-dev)"
    return None


def peak_flops(device):
    """Datasheet bf16 FLOP/s of the device, or None: an MFU needs a stated denominator, and a CPU has none."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in sorted(PEAK_FLOPS.items(), key=lambda item: -len(item[0])) if key in name), None)


def synchronize(device):
    """Wait until a GPU has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(device):
    """Most bytes so far: what PyTorch has handed out on a GPU, elsewhere what this process had in RAM; None where no one counts."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_memory(device, gib):
    """This process gets no more than gib, if it is not 0: a large device plays a small one."""
    limit = int(gib * 2 ** 30)
    if limit and device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(device).total_memory))
    elif limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def keep_freed_memory():
    """Tell glibc to keep large freed blocks: by default each temporary of a step is mapped, faulted in page by page and
    unmapped again, which costs a CPU step about a fifth of its time (`python bench.py train` shows it)."""
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):   # another libc: nothing to tune
            return
        mallopt(-3, 1 << 30)       # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)   # M_TRIM_THRESHOLD
