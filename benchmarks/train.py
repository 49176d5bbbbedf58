"""A whole training step, beside the peers: ours, Hugging Face's EuroBERT, nanoGPT.

    python bench.py train
    python bench.py train --nanogpt=../nanoGPT             # with a clone of karpathy/nanoGPT
    python bench.py train --contestants=ours,ours-eager    # only these

The contestants take turns for `rounds` rounds: one untimed step, then `steps` timed ones. A row has
the median over the rounds. Its ratio to the first row is the median of the ratios within a round,
so it does not matter if the speed of the machine drifts.
"""
import time
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks import race
from benchmarks.contestants import NAMES, contestants
from benchmarks.rows import describe, record
from benchmarks.settings import StepSettings, settings_for
from core.configurator import NonNegativeFloat, Path, PositiveInt, UserError
from core.device import peak_flops, pick_device, pick_dtype


@dataclass
class Config(StepSettings):
    # who and how often
    contestants: str = ""               # which, e.g. ours,eurobert; "": all that can run here
    nanogpt: Path = ""                  # folder of a clone of karpathy/nanoGPT; "": without nanoGPT
    steps: PositiveInt = 4              # of each contestant in a round
    rounds: PositiveInt = 5             # each contestant takes two steps before the first
    memory_gib: NonNegativeFloat = 0.0  # use no more of the device's memory than this; 0: all of it
    to: Path = ""                       # append the rows, with device and versions, to this .jsonl file


def train(c):
    device = pick_device(c.device)
    # who takes part
    entrants = choose_contestants(c)
    racing = [key for key, contestant in entrants.items() if not contestant.why_not]
    if not racing:
        reasons = "; ".join(f"{key}: {contestant.why_not}" for key, contestant in entrants.items())
        raise UserError(f"contestants={c.contestants}: none can be measured here: {reasons}")
    settings = settings_for(race.ContestantConfig, c)
    runners = race.measure(settings, racing, c.rounds, device, tqdm.write)

    # the table's head, and what all rows have in common
    dtype = pick_dtype(c.dtype, device)
    peak = peak_flops(device)
    tokens = c.rows * c.block_size
    cuts = "each row cut once" if c.random_length else "whole rows"
    print(f"\n{describe(device)}; {c.in_words()}, {cuts}; MLM at {c.mask_rate:.0%}; {dtype}, "
          f"nanoGPT as it ships; median of {c.rounds} rounds of {c.steps} steps\n\n"
          "| training step | tokens/s | ms a step | ours is faster by | TFLOP/s | MFU | peak GiB "
          "| first step, s |\n|---|---|---|---|---|---|---|---|")
    facts = {
        "bench": "train",
        "run": time.strftime("%Y-%m-%d %H:%M:%S"),
        "dtype": dtype,
        "peak_flops": peak,
        "size": c.size,
        "vocab_size": c.vocab_size,
        "rows": c.rows,
        "block_size": c.block_size,
        "random_length": c.random_length,
        "checkpoint_activations": c.checkpoint_activations,
    }
    # a row for each, measured or not
    for key, contestant in entrants.items():
        if contestant.why_not:
            row = {"key": key, "why": contestant.why_not}
        else:
            row = race.row_of(key, runners[key], tokens, c.steps)
        if "why" not in row:
            row["mfu"] = row["flops_per_s"] / peak if peak else None
        print(table_line(row, tokens))
        # "out of memory" is a result; "not installed" is not.
        if row.get("why") in (None, "out of memory"):
            record(c.to, facts | row, device)

    mfu = f"MFU: of {peak / 1e12:,.0f} TFLOP/s" if peak else "No MFU without a published peak"
    print("\nFLOPs: of the matrix products in our step, without padding, and with logits only at "
          f"targets. The same count for EuroBERT; nanoGPT counts its own. {mfu}.")


def choose_contestants(c):
    """Return the contestants that the user named, or all. -> {key: Contestant}

    Raises UserError for a name that does not exist.
    """
    everybody = contestants(c, c.nanogpt)
    keys = [key for key in c.contestants.split(",") if key]
    if set(keys) - set(everybody):
        raise UserError(f"contestants={c.contestants}: expected some of {','.join(everybody)}")
    if not keys:
        return everybody
    return {key: everybody[key] for key in keys}


def table_line(row, tokens):
    if "why" in row:
        return f"| {NAMES[row['key']]} | not measured: {row['why']} | | | | | | |"
    cells = (
        NAMES[row["key"]],
        f"{row['tok_per_s']:,.0f}",
        f"{1000 * tokens / row['tok_per_s']:.0f}",
        f"{row['ratio']:.2f} x",
        f"{row['flops_per_s'] / 1e12:,.2f}",
        "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['peak'] / 2 ** 30:.1f}",
        f"{row['first']:.0f}",
    )
    return f"| {' | '.join(cells)} |"
