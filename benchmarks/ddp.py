"""train.py on two processes under DDP, beside one process, and beside two separate runs at a time.

    python bench.py ddp
    python bench.py ddp --size=small --rows=2 --run_steps=40 --rounds=3

Each process has a core or a GPU of its own, and the same number of rows in a step.
"""
import tempfile
from dataclasses import dataclass

import numpy as np

from benchmarks import runs
from benchmarks.contestants import write_corpus
from benchmarks.rows import describe, record
from benchmarks.settings import StepSettings
from core.configurator import Path, PositiveInt, UserError
from core.device import pick_device

WARMUP = 20       # steps before the ones that count


@dataclass
class Config(StepSettings):
    # the runs
    run_steps: PositiveInt = 1000  # of each run
    processes: PositiveInt = 2     # under DDP, and of separate runs at a time
    rounds: PositiveInt = 5        # each has a run alone, the separate runs, and a run under DDP
    to: Path = ""                  # append the rows, with device and versions, to this .jsonl file


def ddp(c):
    device = pick_device(c.device)
    if c.run_steps <= WARMUP or c.processes < 2:
        raise UserError(f"run_steps={c.run_steps}, processes={c.processes}: expected more than "
                        f"{WARMUP} steps and at least 2 processes")
    rates = measure(c, device)

    # the table, and efficiencies: medians of the ratios within a round
    alone = np.array(rates["alone"])
    apart = np.array(rates["apart"])
    together = np.array(rates["together"])
    print(f"\n{describe(device)}; train.py, {c.size}, {c.rows} x {c.block_size} tokens a process; "
          f"median of {c.rounds} rounds\n\n"
          "| processes | tokens/s |\n|---|---|")
    print(f"| 1 | {np.median(alone):,.0f} |")
    print(f"| {c.processes} side by side | {np.median(apart):,.0f} |")
    print(f"| {c.processes} under DDP | {np.median(together):,.0f} |")
    efficiency = np.median(together / (c.processes * alone))
    efficiency_apart = np.median(together / apart)
    print(f"\nscaling efficiency: {efficiency:.1%} of {c.processes} times one process, "
          f"{efficiency_apart:.1%} of {c.processes} separate runs")
    row = {
        "bench": "ddp",
        "size": c.size,
        "rows": c.rows,
        "block_size": c.block_size,
        "processes": c.processes,
        "tok_per_s": rates,
        "efficiency": efficiency,
        "efficiency_apart": efficiency_apart,
    }
    record(c.to, row, device)


def measure(c, device):
    """Race the three kinds. -> {"alone" | "apart" | "together": tokens/s of each round}"""
    # (kind, runs at a time, processes of each)
    kinds = (("alone", 1, 1), ("apart", c.processes, 1), ("together", 1, c.processes))
    rates = {"alone": [], "apart": [], "together": []}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(c, folder)
        for i in range(c.rounds):
            for kind, n_runs, processes in kinds:
                rate = rate_of_runs(c, device, folder, f"{kind}{i}", n_runs, processes)
                rates[kind].append(rate)
    return rates


def rate_of_runs(c, device, folder, name, n_runs, processes):
    """Run train.py n_runs times at a time, with `processes` processes each. -> tokens/s in all"""
    names = [f"{name}-{j}" for j in range(n_runs)]
    started = []
    for j in range(n_runs):
        env = {"OMP_NUM_THREADS": "1"}
        if device.startswith("cuda") and processes == 1:
            env = {"CUDA_VISIBLE_DEVICES": str(j)}
        started.append(runs.start(c, folder, names[j], c.run_steps, processes, env))
    logs = [runs.finish(process, folder, run) for process, run in zip(started, names)]
    tokens = processes * c.rows * c.block_size * (c.run_steps - WARMUP)
    return sum(tokens / runs.seconds_between(rows, WARMUP, c.run_steps) for rows in logs)
