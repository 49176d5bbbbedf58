"""What machine this is: device, precision, compiler, processes, peak FLOP/s; and its files: packed ones read line by line,
written ones never half written."""
import ctypes
import gzip
import hashlib
import io
import json
import lzma
import os
import queue
import re
import shutil
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import UserError

try:
    import resource
except ImportError:      # Windows
    resource = None

# Dense bf16 FLOP/s of one device by the vendors' datasheets, for MFU; a device that is not listed gets none.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
              "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI250X": 192e12,
              "MI300X": 1307e12}


def write_whole(path, content):
    """Write bytes so that `path` holds the old or the new content whole, whatever happens meanwhile."""
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"     # several machines may write the same
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def is_new(folder, *ours):
    """Is a folder not there, or empty but for files of ours and what a killed write_whole left? Anything else is somebody's."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return all(name in ours or re.fullmatch(r".+\.\d+-[0-9a-f]{8}\.tmp", name) for name in names)


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=1).encode())


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def hashed(text):
    """A number in [0, 1) decided by the text alone: no order, no seed, and two copies of a text land on the same side of a cut."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2 ** 64


def lines_of(path):
    """(where, line) of every line that is not blank; path may end in .gz, .xz or .zst. Raises UserError naming file and line."""
    if path.endswith(".zst"):
        import zstandard
        file = io.BufferedReader(zstandard.open(path, "rb"))
    else:
        file = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(path)[1], open)(path, "rb")
    with file as f:
        for number, line in enumerate(unpacked(f, path), start=1):
            if line.strip():
                yield f"{path}, line {number}", decode(line, f"{path}, line {number}")


def unpacked(lines, path):
    """The lines of a file; a compressed one that breaks off or is no such archive becomes a UserError."""
    try:
        yield from lines
    except Exception as error:       # gzip, lzma and zstandard each raise their own
        raise UserError(f"{path} cannot be unpacked ({error}): fetch or compress it again") from None


def decode(raw, where):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv -t UTF-8") from None


def ahead(items, depth):
    """The same items, drawn in a background thread; at most `depth` wait, so memory stays flat whichever side is slower."""
    ready, stop, end = queue.Queue(depth), threading.Event(), object()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work():
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:   # handed to the consumer's thread, which raises it
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join(10.0)     # a thread that waits for a network may take its time: it dies with the process


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


@dataclass
class Processes:
    """This process among those torchrun started; (0, 0, 1) without torchrun."""
    rank: int
    local_rank: int
    world_size: int

    @property
    def first(self):
        return self.rank == 0


def start_processes(device):
    """Join torchrun's process group (nccl on GPUs, gloo on CPUs). -> (Processes, this process' device)"""
    if "RANK" not in os.environ:
        return Processes(0, 0, 1), device
    p = Processes(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if device == "cuda":
        device = f"cuda:{p.local_rank}"
        torch.cuda.set_device(device)
    # with a GPU: gradients travel by nccl, the few numbers of all_sum by gloo, so that they never wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return p, device


def all_sum(values, processes):
    """Sum a list of numbers over all processes. -> list of floats"""
    if processes.world_size == 1:
        return [float(v) for v in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    for _ in range(1000):      # gloo's thread lets go of the tensor under Python's lock; a process that ends before it has, aborts
        if sys.getrefcount(total) == 2:
            break
        time.sleep(0)
    return total.tolist()
