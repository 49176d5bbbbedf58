"""The parts of bench.py for a GPU that is at hand for minutes only, as runs/gpu.sh calls them.

    alive          does everything run? attention's trial calls, a training step against the reference, train.py itself
    steps          the training step of several sizes, all in one process
    step_profile   where one step's time goes on the GPU

Each result is printed and written to --to the moment it is known, so a run that is cut short leaves
what it has.
"""
import gc
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch

import kernels
from benchmarks import rows as bench_rows
from benchmarks import runs as bench_runs
from benchmarks import train as bench_train
from benchmarks.summary import step_in_words
from core.configurator import UserError
from core.device import keep_freed_memory, peak_flops, peak_memory, pick_device, pick_dtype, synchronize, why_not_compile
from core.files import ROOT
from kernels.dispatch import FAST_ON_GPU, objection
from model import SIZES, Encoder, ModelConfig

# query heads, KV heads and head dim: those of 210m, 610m and 1b, and one with the third head dim
# that the Triton kernels know
HEADS = ((12, 12, 64), (18, 6, 64), (18, 6, 96), (16, 8, 128))
MOST_GRADIENT_ERROR = 3e-2  # of a step in bf16 beside one in fp32


def say(line):
    print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# does it run at all?


def alive(c):
    """Everything that must work before a measurement means anything, the most basic first."""
    device = pick_device(c.device)
    facts = bench_rows.versions(device)
    say(
        f"{bench_rows.describe(device)}; "
        + ", ".join(f"{name} {value}" for name, value in facts.items())
    )
    bench_rows.record(c, {"bench": "alive", "name": "versions", "ok": True} | facts, device)
    with tempfile.TemporaryDirectory() as folder:
        small = replace(c, size="tiny", vocab_size=1024, block_size=256, rows=4, data_dir=folder)
        bench_train.write_corpus(small, folder)
        # Compiling takes most of the time and one core each, so the trial calls and a run of
        # train.py have processes of their own.
        trials = [start_trial(c, heads) for heads in HEADS] if device.startswith("cuda") else []
        training = bench_runs.start(
            replace(small, size="demo" if trials else "tiny"), folder, "train", steps=30
        )
        check_steps(small, device)
        for process in trials:
            process.wait()
        check_training(c, training, folder, device)
    if not trials:
        say("trial calls of the attention kernels: need a CUDA GPU")
        return
    for (
        n_head,
        n_kv_head,
        head_dim,
    ) in HEADS:  # what the trial calls compiled lies in Triton's cache now
        name = kernels.resolve("auto", "cuda", torch.bfloat16, head_dim, n_head, n_kv_head)
        bench_rows.record(
            c, {"bench": "auto", "heads": [n_head, n_kv_head, head_dim], "name": name}, device
        )


def start_trial(c, heads):
    script = os.path.join(ROOT, "bench.py")
    return subprocess.Popen(
        [sys.executable, script, "trial", *map(str, heads), f"--device={c.device}", f"--to={c.to}"]
    )


def trial(c):
    """The process of one trial: bench.py trial QUERY_HEADS KV_HEADS HEAD_DIM."""
    device = pick_device(c.device)
    n_head, n_kv_head, head_dim = map(int, c.args[1:])
    for name in FAST_ON_GPU:
        try:
            problem, error = objection(
                name, device.partition(":")[0], torch.bfloat16, head_dim, n_head, n_kv_head
            )
        except (
            Exception
        ) as crash:  # a compiler's or a driver's: that is what this process is there to find out
            problem, error = f"{type(crash).__name__}: {(str(crash).splitlines() or [''])[0]}", None
        verdict = f"agrees with the reference, error {error:.1e}" if problem is None else problem
        say(f"trial call of {name}, {n_head}/{n_kv_head} heads of {head_dim}: {verdict}")
        bench_rows.record(
            c,
            {
                "bench": "trial",
                "heads": [n_head, n_kv_head, head_dim],
                "name": name,
                "ok": problem is None,
                "error": error,
                "problem": problem,
            },
            device,
        )


def check_steps(c, device):
    """One training step of a small model, eager and compiled, CLM and MLM: its gradient beside the
    same step's by the reference."""
    on_gpu = device.startswith("cuda")
    config = ModelConfig(
        n_layer=2, n_head=4, n_kv_head=2, n_embd=256, n_ffn=512, vocab_size=c.vocab_size
    )  # head dim 64
    no_compile = "--compile=false" if not c.compile else why_not_compile(device)
    for objective in ("clm", "mlm"):
        batch = next(bench_train.batches(c, objective, device))
        exact = gradient_of_step(config, batch, device, "reference", compiled=False, bf16=False)
        for compiled in (False, True):
            name = f"a step of {objective.upper()}, {'compiled' if compiled else 'eager'}"
            if compiled and no_compile:
                say(f"{name}: not run: {no_compile}")
                continue
            try:
                found = gradient_of_step(
                    config, batch, device, "triton" if on_gpu else "sdpa", compiled, bf16=on_gpu
                )
                error = ((found - exact).norm() / exact.norm()).item()
                ok = error < MOST_GRADIENT_ERROR
                say(
                    f"{name}: its gradient is {error:.1e} from the reference's: {'agrees' if ok else 'WRONG'}"
                )
            except Exception as crash:
                error, ok = None, False
                say(
                    f"{name}: FAILED: {type(crash).__name__}: {(str(crash).splitlines() or [''])[0]}"
                )
            bench_rows.record(c, {"bench": "alive", "name": name, "ok": ok, "error": error}, device)


def gradient_of_step(config, batch, device, attention, compiled, bf16):
    """-> the gradient of the mean loss in all parameters, end to end, fp32 [number of
    parameters]"""
    torch.manual_seed(0)
    with torch.device(device):
        model = Encoder(config, attention)
    if compiled:
        model.compile()
    batch = batch.to(device)
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=bf16):
        hidden = model(batch.tokens, batch.cu_seqlens, batch.causal, batch.positions)  # [N, C]
        loss = (
            kernels.linear_cross_entropy(hidden, model.lm_head.weight, batch.targets)
            / batch.num_targets
        )
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check_training(c, process, folder, device):
    """30 steps of train.py as a user starts it, on random words: is the loss finite, and does it
    fall?"""
    try:
        losses = [row["loss"] for row in bench_runs.finish(process, folder, "train")]
        ok = len(losses) == 30 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
        say(
            f"train.py, 30 steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}: {'it learns' if ok else 'WRONG'}"
        )
    except Exception as problem:
        ok = False
        say(f"train.py: FAILED: {problem}")
    bench_rows.record(c, {"bench": "alive", "name": "train.py", "ok": ok}, device)


# ---------------------------------------------------------------------------------------------------------------------
# whole training steps


def steps(c):
    """Tokens/s, MFU and peak memory of a training step: ours with MLM and CLM at each size, then
    EuroBERT at the first size."""
    device = pick_device(c.device)
    keep_freed_memory()
    unknown = set(c.sizes) - set(SIZES)
    if unknown or not c.sizes:
        raise UserError(f"sizes={c.sizes}: expected some of {', '.join(SIZES)}")
    runs = [(size, key) for size in c.sizes for key in ("ours", "ours-clm")] + [
        (c.sizes[0], "eurobert")
    ]
    began = time.monotonic()
    say(
        f"{bench_rows.describe(device)}; {c.rows} x {c.block_size} tokens a step, "
        f"{'each row cut once' if c.random_length else 'whole rows'}, vocabulary {c.vocab_size:,}, MLM at {c.mask_rate:.0%}"
    )
    with tempfile.TemporaryDirectory() as folder:
        c = replace(c, data_dir=folder)
        bench_train.write_corpus(c, folder)
        ours = {}
        for size, key in runs:
            if c.seconds and time.monotonic() - began > c.seconds:
                say(f"{c.seconds:g} s are over: the rest is not measured")
                break
            row = measure_step(replace(c, size=size), key, device)
            if "seconds" in row:
                ours.setdefault(size, row)
                row["ratio"] = statistics.median(row["seconds"]) / statistics.median(
                    ours[size]["seconds"]
                )
            say(step_in_words(row))
            bench_rows.record(c, row, device)
            torch._dynamo.reset()
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()


def measure_step(c, key, device):
    """-> a row as bench.py train writes it: `seconds` of each timed step, or `why` there are
    none"""
    dtype = pick_dtype(c.dtype, device)
    peak = peak_flops(device)
    compiled = c.compile and why_not_compile(device) is None
    name = bench_train.NAMES[key].removesuffix(", compiled") + ("" if compiled else ", eager")
    row = {
        "bench": "train",
        "run": "steps",
        "key": key,
        "name": name,
        "reference": "ours",
        "size": c.size,
        "vocab_size": c.vocab_size,
        "rows": c.rows,
        "block_size": c.block_size,
        "random_length": c.random_length,
        "checkpoint_activations": c.checkpoint_activations,
        "dtype": dtype,
        "peak_flops": peak,
    }
    if key == "eurobert" and importlib.util.find_spec("transformers") is None:
        return row | {"why": "transformers is not installed"}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    try:
        if key == "eurobert":
            step, flops_of = bench_train.eurobert(c, device, compiled)
        else:
            step, flops_of = bench_train.ours(
                c, device, "clm" if key == "ours-clm" else "mlm", compiled=compiled
            )
        step()
        synchronize(device)
        row["first"] = time.monotonic() - began
        step()  # may compile once more, for gradients that are laid out otherwise
        seconds, batches = timed_steps(step, c.steps, device)
    except Exception as problem:  # one size that does not fit or fails must not cost the others
        out_of_memory = isinstance(problem, torch.OutOfMemoryError)
        first_line = (str(problem).splitlines() or [""])[0]
        return row | {
            "why": "out of memory" if out_of_memory else f"{type(problem).__name__}: {first_line}"
        }
    median = statistics.median(seconds)
    flops_per_s = statistics.mean(flops_of(batch) for batch in batches) / median
    return row | {
        "seconds": seconds,
        "tok_per_s": c.rows * c.block_size / median,
        "flops_per_s": flops_per_s,
        "mfu": flops_per_s / peak if peak else None,
        "peak": peak_memory(device),
    }


def timed_steps(step, n, device):
    """Run n steps. -> seconds of each, by events on a GPU, and their batches"""
    if not device.startswith("cuda"):
        seconds, batches = [], []
        for _ in range(n):
            began = time.perf_counter()
            batches.append(step())
            seconds.append(time.perf_counter() - began)
        return seconds, batches
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    batches = []
    marks[0].record()
    for mark in marks[1:]:
        batches.append(step())
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in zip(marks, marks[1:])], batches


# ---------------------------------------------------------------------------------------------------------------------
# where a step's time goes


def step_profile(c):
    """Three steps under torch.profiler: the ten kernels with most time, and how long the GPU waits."""
    device = pick_device(c.device)
    keep_freed_memory()
    n_steps = 3
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        c = replace(c, data_dir=folder)
        bench_train.write_corpus(c, folder)
        compiled = c.compile and why_not_compile(device) is None
        step, _ = bench_train.ours(c, device, "mlm", compiled=compiled)
        for _ in range(3):
            step()
        synchronize(device)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(n_steps):
                step()
            synchronize(device)

    say(f"{bench_rows.describe(device)}; ours, MLM, {bench_rows.step_of(c)}, {n_steps} steps")
    spans = gpu_spans(profile)
    if not spans:
        operators = profile.key_averages()
        say("no GPU kernels here; a CPU's operators instead:")
        say(operators.table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=60))
        bench_rows.record(c, {"bench": "profile", "size": c.size, "kernels": []}, device)
        return
    largest, busy, total = largest_kernels(spans)
    step_ms = total / n_steps / 1000
    say(f"a step takes {step_ms:.2f} ms; the GPU computes for {busy / total:.1%} of it\n")
    say("| kernel | ms a step | share | calls a step |\n|---|---|---|---|")
    kernel_rows = []
    for name, (microseconds, calls) in largest:
        ms = microseconds / n_steps / 1000
        say(f"| {name[:90]} | {ms:.3f} | {microseconds / total:.1%} | {calls / n_steps:g} |")
        kernel_rows.append({"name": name, "ms": ms, "calls": calls / n_steps})
    row = {"bench": "profile", "size": c.size, "rows": c.rows, "step_ms": step_ms}
    bench_rows.record(c, row | {"busy": busy / total, "kernels": kernel_rows}, device)


def gpu_spans(profile):
    """[(start, end, name)] of everything that ran on the GPU, in microseconds."""
    spans = []
    for event in profile.events():
        # A user annotation, such as the optimizer's, spans the kernels inside it and their gaps.
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end, event.name))
    return spans


def largest_kernels(spans, n=10):
    """spans: [(start, end, name)] in microseconds, in any order, which may overlap.

    -> [(name, (microseconds, calls))] of the n names with most time; microseconds in which at least one kernel runs; and from the
    first start to the last end
    """
    times = {}
    for start, end, name in spans:
        microseconds, calls = times.get(name, (0, 0))
        times[name] = (microseconds + end - start, calls + 1)
    busy = 0
    reached = min(start for start, _, _ in spans)
    first = reached
    for start, end, _ in sorted(spans):
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    largest = sorted(times.items(), key=lambda item: -item[1][0])
    return largest[:n], busy, reached - first
