"""The training step of several sizes, one after the other in one process, for when you have a GPU
for a few minutes only.

    python bench.py steps --vocab_size=128256 --block_size=2048 --rows=12 --steps=10

Ours with MLM and CLM at each size, then EuroBERT at the first size: tokens/s, MFU and peak memory.
Each result is printed and written the moment it is known, so a run that is cut short leaves the
results it has.
"""
import gc
import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks import contestants
from benchmarks.rows import describe, error_in_words, log, record
from benchmarks.settings import StepSettings, check_sizes, settings_for
from benchmarks.summary import step_in_words
from core.configurator import NonNegativeFloat, Path, PositiveInt, Share
from core.device import (
    keep_freed_memory,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
    synchronize,
    why_not_compile,
)


@dataclass
class Config:
    # the models, and one training step of them
    sizes: tuple[str, ...] = ("210m", "610m", "1b")  # keys of model.SIZES
    vocab_size: PositiveInt = 8192        # of embedding and head
    block_size: PositiveInt = 512         # tokens in a row
    rows: PositiveInt = 8                 # rows in a step
    random_length: bool = True            # cut each row once, as train.py does; false: whole rows
    mask_rate: Share = 0.4                # share of the tokens that MLM hides
    checkpoint_activations: bool = False  # ours with this setting of train.py
    # how
    steps: PositiveInt = 4                # that are timed, of each
    seconds: NonNegativeFloat = 0.0       # begin nothing new after so long; 0: do all
    compile: bool = True                  # torch.compile where a compiler is installed
    device: str = "auto"                  # cuda where there is one, else cpu
    dtype: str = "auto"                   # bfloat16 or float32
    to: Path = ""                         # append the rows, with device and versions, to this .jsonl file


def steps(c):
    device = pick_device(c.device)
    keep_freed_memory()
    check_sizes(c.sizes, f"sizes={c.sizes}")
    cuts = "each row cut once" if c.random_length else "whole rows"
    log(f"{describe(device)}; {c.rows} x {c.block_size} tokens a step, {cuts}, "
        f"vocabulary {c.vocab_size:,}, MLM at {c.mask_rate:.0%}")
    began = time.monotonic()
    # {size: seconds of our MLM step, which the others are compared with}
    median_of_ours = {}
    with tempfile.TemporaryDirectory() as folder:
        contestants.write_corpus(settings_for(StepSettings, c, size=c.sizes[0]), folder)
        for size, key in list_steps(c.sizes):
            if c.seconds and time.monotonic() - began > c.seconds:
                log(f"{c.seconds:g} s are over: the rest is not measured")
                break
            row = measure_step(c, size, key, folder, device)
            if "seconds" in row:
                median = statistics.median(row["seconds"])
                if key == "ours":
                    median_of_ours[size] = median
                if size in median_of_ours:
                    row["ratio"] = median / median_of_ours[size]
            log(step_in_words(row))
            record(c.to, row, device)
            forget_model(device)


def list_steps(sizes):
    """Return the steps to measure, in their order. -> [(size, key of contestants.NAMES)]"""
    pairs = []
    for size in sizes:
        pairs.append((size, "ours"))
        pairs.append((size, "ours-clm"))
    pairs.append((sizes[0], "eurobert"))
    return pairs


def measure_step(c, size, key, folder, device):
    """Measure a step. -> a row like those of bench.py train

    It has the `seconds` of each timed step, or `why` there are none.
    """
    settings = settings_for(StepSettings, c, size=size)
    is_compiled = c.compile and why_not_compile(device) is None
    name = contestants.NAMES[key].removesuffix(", compiled")
    if not is_compiled:
        name += ", eager"
    peak = peak_flops(device)
    row = {
        "bench": "train",
        "run": "steps",
        "key": key,
        "name": name,
        "reference": "ours",
        "size": size,
        "vocab_size": c.vocab_size,
        "rows": c.rows,
        "block_size": c.block_size,
        "random_length": c.random_length,
        "checkpoint_activations": c.checkpoint_activations,
        "dtype": pick_dtype(c.dtype, device),
        "peak_flops": peak,
    }
    if key == "eurobert" and importlib.util.find_spec("transformers") is None:
        return row | {"why": "transformers is not installed"}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()

    # Build the model and run its first step, which compiles; then the timed ones.
    began = time.monotonic()
    try:
        if key == "eurobert":
            training_step = contestants.eurobert(settings, folder, is_compiled)
        else:
            objective = "clm" if key == "ours-clm" else "mlm"
            training_step = contestants.ours(settings, folder, objective, compiled=is_compiled)
        training_step.run()
        synchronize(device)
        row["first"] = time.monotonic() - began
        # The second step may compile once more, for gradients with another memory layout.
        training_step.run()
        seconds, batches = timed_steps(training_step.run, c.steps, device)
    except torch.OutOfMemoryError:
        return row | {"why": "out of memory"}
    except Exception as error:
        # If a size fails, go on with the others.
        return row | {"why": error_in_words(error)}
    median = statistics.median(seconds)
    flops_per_s = statistics.mean(training_step.flops_of(batch) for batch in batches) / median
    return row | {
        "seconds": seconds,
        "tok_per_s": c.rows * c.block_size / median,
        "flops_per_s": flops_per_s,
        "mfu": flops_per_s / peak if peak else None,
        "peak": peak_memory(device),
    }


def timed_steps(run, n, device):
    """Run n steps. -> seconds of each, and their batches"""
    batches = []
    if not device.startswith("cuda"):
        seconds = []
        for _ in range(n):
            began = time.perf_counter()
            batches.append(run())
            seconds.append(time.perf_counter() - began)
        return seconds, batches
    # On a GPU events take the time, so that the host need not wait between the steps.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for mark in marks[1:]:
        batches.append(run())
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in zip(marks, marks[1:])], batches


def forget_model(device):
    """Free what the last contestant compiled and allocated."""
    torch._dynamo.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
