"""train.py over a thousand steps: are the last ones as fast as the first, and does memory grow?

    python bench.py steady
    python bench.py steady --size=micro --vocab_size=4096 --block_size=256 --rows=8
"""
import tempfile
from dataclasses import dataclass

from benchmarks import runs
from benchmarks.contestants import write_corpus
from benchmarks.rows import describe, record
from benchmarks.settings import StepSettings
from core.configurator import Path, PositiveInt, UserError
from core.device import pick_device, pick_dtype

WARMUP = 100      # steps before the ones that count


@dataclass
class Config(StepSettings):
    # the run
    run_steps: PositiveInt = 1000  # after the warm-up
    to: Path = ""                  # append the rows, with device and versions, to this .jsonl file


def steady(c):
    device = pick_device(c.device)
    if c.run_steps < 200 or c.run_steps % 100:
        raise UserError(f"run_steps={c.run_steps}: expected a multiple of 100, and at least 200, "
                        "to compare the last 100 steps with the first")
    facts = measure(c)
    windows = ", ".join(f"{10 * seconds:.1f}" for seconds in facts["windows"])
    print(f"\n{describe(device)}; train.py, {c.in_words()}, {c.run_steps} steps after {WARMUP} of "
          "warm-up\n"
          f"last 100 steps / first 100: {facts['last'] / facts['first']:.4f}; peak memory grew by "
          f"{facts['growth']:,} of {facts['peak']:,} bytes\nms a step, of each 100: {windows}")
    row = {"bench": "steady", "size": c.size, "rows": c.rows, "block_size": c.block_size,
           "dtype": pick_dtype(c.dtype, device)}
    record(c.to, row | facts, device)


def measure(c):
    """Run train.py, and read its log.

    -> {"first", "last": seconds of the first and last 100 steps after WARMUP,
        "windows": seconds of each 100 steps,
        "peak": bytes of peak memory, read at the end,
        "growth": bytes by which that grew since the first 100 steps}
    """
    last_step = c.run_steps + WARMUP
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(c, folder)
        process = runs.start(c, folder, "steady", last_step)
        rows = runs.finish(process, folder, "steady")
    memory_at = {row["step"]: row["peak_memory"] for row in rows}
    windows = []
    for step in range(WARMUP, last_step, 100):
        windows.append(runs.seconds_between(rows, step, step + 100))
    return {
        "first": windows[0],
        "last": windows[-1],
        "windows": windows,
        "peak": memory_at[last_step],
        "growth": memory_at[last_step] - memory_at[WARMUP + 100],
    }
