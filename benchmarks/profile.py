"""Where the time of a training step goes: three steps under torch.profiler.

    python bench.py profile                                # ours
    python bench.py profile --contestants=eurobert-eager   # another contestant of bench.py train
    python bench.py profile --to=table.txt                 # keep the table of operators
    python bench.py profile --to=rows.jsonl                # keep a row with the largest GPU kernels

Prints the 40 operators that take most time themselves. On a GPU it also prints the ten kernels that
take most time, and the share of a step in which the GPU computes.
"""
import os
import tempfile
from dataclasses import dataclass

import torch

from benchmarks.contestants import contestants, write_corpus
from benchmarks.rows import describe, log, record
from benchmarks.settings import StepSettings
from benchmarks.train import choose_contestants
from core.configurator import Path, UserError
from core.device import keep_freed_memory, pick_device, synchronize, why_not_compile
from core.files import write_whole

STEPS = 3


@dataclass
class Config(StepSettings):
    # whose steps
    contestants: str = ""        # the first of these; "": ours
    nanogpt: Path = ""           # folder of a clone of karpathy/nanoGPT
    compile: bool = True         # torch.compile ours, where a compiler is installed
    to: Path = ""                # FILE.jsonl: append a row of GPU kernels; else: write the table


def profile(c):
    device = pick_device(c.device)
    # whose steps, and compiled or not
    key = next(iter(choose_contestants(c))) if c.contestants else "ours"
    is_compiled = c.compile and why_not_compile(device) is None
    if key == "ours" and not is_compiled:
        key = "ours-eager"
    contestant = contestants(c, c.nanogpt)[key]
    if contestant.why_not:
        raise UserError(f"contestants={c.contestants}: {key} cannot run here: {contestant.why_not}")
    profiled = run_profiler(c, contestant, device)

    # the table of operators
    own_time = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    averages = profiled.key_averages()
    operators = averages.table(sort_by=own_time, row_limit=40, max_name_column_width=70)
    table = f"{describe(device)}; {key}: {STEPS} steps, {c.in_words()}\n{operators}"
    log(table)

    # A file of rows gets the kernels, any other file the table.
    row = row_of_kernels(c, gpu_spans(profiled))
    if c.to.endswith(".jsonl"):
        record(c.to, row, device)
    elif c.to:
        os.makedirs(os.path.dirname(c.to) or ".", exist_ok=True)
        write_whole(c.to, table.encode())


def run_profiler(c, contestant, device):
    """Profile STEPS steps of a Contestant, after three that do not count. -> torch's profile"""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(c, folder)
        training_step = contestant.build(c, folder)
        for _ in range(3):
            training_step.run()
        synchronize(device)
        with torch.profiler.profile(activities=activities) as profiled:
            for _ in range(STEPS):
                training_step.run()
            synchronize(device)
    return profiled


def row_of_kernels(c, spans):
    """Print the GPU kernels that take most time. -> a row of them"""
    if not spans:
        log("no GPU kernels here; the operators above ran on a CPU")
        return {"bench": "profile", "size": c.size, "kernels": []}
    largest, busy, total = largest_kernels(spans)
    step_ms = total / STEPS / 1000
    log(f"\na step takes {step_ms:.2f} ms; the GPU computes for {busy / total:.1%} of it\n")
    log("| kernel | ms a step | share | calls a step |\n|---|---|---|---|")
    kernel_rows = []
    for name, (microseconds, calls) in largest:
        ms = microseconds / STEPS / 1000
        log(f"| {name[:90]} | {ms:.3f} | {microseconds / total:.1%} | {calls / STEPS:g} |")
        kernel_rows.append({"name": name, "ms": ms, "calls": calls / STEPS})
    return {
        "bench": "profile",
        "size": c.size,
        "rows": c.rows,
        "step_ms": step_ms,
        "busy": busy / total,
        "kernels": kernel_rows,
    }


def gpu_spans(profiled):
    """Return everything that ran on the GPU. -> [(start, end, name)], times in microseconds"""
    spans = []
    for event in profiled.events():
        # A user annotation, such as the optimizer's, spans the kernels inside it and their gaps.
        is_on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if is_on_gpu and not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end, event.name))
    return spans


def largest_kernels(spans, n=10):
    """Add up spans [(start, end, name)], in any order. They may overlap.

    -> [(name, (microseconds, calls))] of the n names that take most time; microseconds in which at
    least one kernel runs; microseconds from the first start to the last end
    """
    times = {}
    for start, end, name in spans:
        microseconds, calls = times.get(name, (0, 0))
        times[name] = (microseconds + end - start, calls + 1)
    # Walk through time: everything before `reached` has been counted.
    first = min(start for start, _, _ in spans)
    reached = first
    busy = 0
    for start, end, _ in sorted(spans):
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    largest = sorted(times.items(), key=lambda item: -item[1][0])
    return largest[:n], busy, reached - first
