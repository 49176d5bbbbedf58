"""The most rows that a training step can have, with activations checkpointed or not.

    python bench.py memory                          # in the memory of this machine's GPU
    python bench.py memory --memory_gib=4           # in less memory; a CPU needs this limit

Two small steps tell how much memory a row takes. The line through them predicts how many rows fit,
and real steps of about that many rows check it.
"""
import tempfile
from dataclasses import dataclass, replace

import torch

from benchmarks.contestants import write_corpus
from benchmarks.race import ContestantConfig, Runner
from benchmarks.rows import log, record
from benchmarks.settings import StepSettings, settings_for
from core.configurator import NonNegativeFloat, Path, RunError, UserError
from core.device import pick_device


@dataclass
class Config(StepSettings):
    # the device
    memory_gib: NonNegativeFloat = 0.0  # use no more of the device's memory than this; 0: all of it
    to: Path = ""                       # append the rows, with device and versions, to this .jsonl file


def memory(c):
    device = pick_device(c.device)
    if device == "cpu" and not c.memory_gib:
        raise UserError("on a CPU, bench.py memory needs a limit, e.g. --memory_gib=2")
    for is_checkpointed in (False, True):
        rows, peak = largest_step(replace(c, checkpoint_activations=is_checkpointed))
        with_or_without = "with" if is_checkpointed else "without"
        peak_in_words = f", peak {peak / 2 ** 30:.1f} GiB" if rows else ""
        log(f"{c.size}, {with_or_without} activation checkpointing: "
            f"{rows} x {c.block_size} tokens fit{peak_in_words}")
        row = {
            "bench": "memory",
            "size": c.size,
            "vocab_size": c.vocab_size,
            "block_size": c.block_size,
            "rows": rows,
            "memory_gib": c.memory_gib,
            "checkpoint_activations": is_checkpointed,
            "peak": peak,
        }
        record(c.to, row, device)


def largest_step(c):
    """Find the most rows that fit, within a sixteenth. -> (rows, peak bytes of that step)

    Without room for a single row: (0, None).
    """
    total = c.memory_gib * 2 ** 30
    if not total:
        total = torch.cuda.get_device_properties(0).total_memory
    peaks = {}         # {rows: peak bytes of a step, or None if it ran out of memory}
    fits = 0           # the most rows that fitted so far
    too_many = None    # the fewest rows that did not
    rows = 1           # the next to try
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(replace(c, rows=256), folder)
        while too_many is None or too_many - fits > max(1, fits // 16):
            peaks[rows] = peak_of_step(c, rows, folder)
            if peaks[rows] is None:
                too_many = rows
            else:
                next_rows = guess_rows(rows, fits, peaks, total)
                fits = rows
                rows = next_rows
            # Try no more than the middle between what fits and what does not.
            if too_many is not None:
                rows = min(rows, (fits + too_many) // 2)
    return fits, peaks.get(fits)


def guess_rows(rows, fits, peaks, total):
    """Return how many rows fill the memory, by the line through steps of `fits` and `rows` rows."""
    if fits == 0:
        # A line needs a second step.
        return 5
    bytes_per_row = max(1, (peaks[rows] - peaks[fits]) / (rows - fits))
    more_rows = int((total - peaks[rows]) / bytes_per_row)
    return rows + max(1 + rows // 16, more_rows)


def peak_of_step(c, rows, folder):
    """Return the peak bytes of a step in a process of its own, or None if it runs out of memory."""
    runner = Runner(settings_for(ContestantConfig, c, rows=rows, steps=1), "ours", folder)
    runner.race()
    runner.finish()
    if runner.failed and runner.failed != "out of memory":
        raise RunError(f"{rows} rows: {runner.failed}")
    return runner.peak
