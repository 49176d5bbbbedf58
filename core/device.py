"""What this machine can do: its device, precision, attention kernel, compiler, memory, peak FLOP/s.

Each pick_... function turns the setting "auto" into what runs best here, and refuses what cannot
run here with a one-line error.
"""

import ctypes
import os
import shutil
import sys
import sysconfig

import torch

from core.configurator import UserError
from core.files import find_files
from kernels import resolve

try:
    import resource
except ImportError:
    resource = None      # Windows

# FLOP/s of one device in dense bf16, from the vendors' datasheets, for the MFU (model FLOPs
# utilization). A device that is not listed gets no MFU.
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI250X": 192e12,
    "MI300X": 1307e12,
}
COMPILERS = ("g++", "clang++", "c++")      # torch.compile looks for these, after $CXX
M_TRIM_THRESHOLD = -1                      # parameters of glibc's mallopt
M_MMAP_THRESHOLD = -3


# -------------------------------------------------------------------------------------------------
# which device, which precision, which kernels
def pick_device(name):
    """The torch device to use; "auto" is cuda if the machine has it, else cpu.

    Raises UserError if the machine lacks the device.
    """
    is_available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = "cuda" if is_available["cuda"] else "cpu"
    kind = name.partition(":")[0]
    if not is_available.get(kind, False):
        kinds = [kind for kind, available in is_available.items() if available]
        raise UserError(f"device={name}: this machine has {', '.join(kinds)}")
    return name


def pick_dtype(name, device):
    """"bfloat16" or "float32"; "auto" is bfloat16 where its matrix products are faster.

    Weights are fp32 either way: bfloat16 means autocast. Raises UserError.
    """
    if name not in ("auto", "bfloat16", "float32"):
        raise UserError(f"dtype={name}: expected auto, bfloat16 (autocast over fp32 weights) or float32")
    if name != "auto":
        return name
    if device.startswith("cuda"):
        is_fast = torch.cuda.is_bf16_supported()
    else:
        is_fast = device == "cpu" and has_fast_bf16_on_cpu()
    return "bfloat16" if is_fast else "float32"


def has_fast_bf16_on_cpu():
    """True if this CPU multiplies bf16 matrices faster than fp32 ones.

    CPUs with AMX are made for it (not measured here). Of those with avx512_bf16 only, AMD's do bf16
    at twice the rate of fp32, Intel's at half of it (docs/log.md).
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and cpu_vendor() == "AuthenticAMD"


def cpu_vendor():
    """"AuthenticAMD", "GenuineIntel", ...; "" where Linux does not say."""
    if not os.path.isfile("/proc/cpuinfo"):
        return ""
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return ""


def pick_attention(name, device, dtype, config):
    """The attention implementation to use: `name`, or what "auto" means for this device and model.

    dtype: "bfloat16" or "float32"; config: a ModelConfig. Raises UserError if the name is not
    known, or cannot run here.
    """
    kind = device.partition(":")[0]
    torch_dtype = getattr(torch, dtype)
    try:
        return resolve(name, kind, torch_dtype, config.head_dim, config.n_head, config.n_kv_head)
    except ValueError as error:
        raise UserError(str(error)) from None


def why_not_compile(device):
    """Why torch.compile cannot build kernels here, in words; None if it can."""
    if device.startswith("cuda"):
        return None
    if device != "cpu":
        return f"not tried on {device}"
    compilers = (os.environ.get("CXX") or "g++", *COMPILERS)
    if not any(shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler (g++ or clang++) is installed"
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Python's C headers are not installed (python3-dev)"
    return None


def remove_interrupted_compilations():
    """Remove what a killed C++ compiler left in torch.compile's cache.

    The compiler writes a library under its final name, and torch takes a file of that name for
    finished: after a `kill -9` in the first step no later run could load it. A folder
    NAME_CxxBuild stands beside a library that is not finished, and whoever compiles it holds a lock.
    """
    # A second of imports, which torch.compile needs anyway.
    from filelock import FileLock
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    cache = cache_dir()
    for build in find_files(cache, "??/*_CxxBuild"):
        library = build.removesuffix("_CxxBuild")
        key = os.path.basename(library).partition(".")[0]
        try:
            os.makedirs(os.path.join(cache, "locks"), exist_ok=True)
            with FileLock(os.path.join(cache, "locks", f"{key}.lock"), timeout=0):
                for path in (f"{library}.so", f"{library}.o"):
                    if os.path.exists(path):
                        os.remove(path)
                shutil.rmtree(build)
        except OSError:
            # Another process compiles it now, or it belongs to another user. (filelock's Timeout is an
            # OSError.)
            pass


# -------------------------------------------------------------------------------------------------
# speed
def peak_flops(device):
    """The datasheet's bf16 FLOP/s of a GPU, or None if it is not listed. A CPU has no such number."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    # Longest first: "GH200" before "H200", "L40S" before "L4".
    for key in sorted(PEAK_FLOPS, key=len, reverse=True):
        if key in name:
            return PEAK_FLOPS[key]
    return None


def synchronize(device):
    """Wait until a GPU has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------------
# memory
def peak_memory(device):
    """The most bytes in use so far, or None where the system does not count them.

    On a GPU these are the bytes of PyTorch's tensors, elsewhere this process' share of the RAM.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def limit_memory(device, gib):
    """Let this process use at most `gib` GiB, as if the device had no more. 0: no limit."""
    limit = int(gib * 2**30)
    if limit == 0:
        return
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def keep_freed_memory():
    """Tell glibc to keep large blocks that were freed.

    By default each temporary tensor of a step is mapped, faulted in page by page and unmapped
    again. Then a step on a CPU takes 6 to 17 % longer (`python bench.py train` shows it).
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return      # another libc: nothing to tune
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
