"""The most important figures of a file of rows, in a few lines.

    python -m benchmarks.summary ROWS.jsonl

runs/gpu.sh runs it after every part, so it needs the standard library only and takes no time.
"""
import json
import os
import statistics
import sys


def main(path):
    rows = read_rows(path)
    for in_words in (checks_in_words, steps_in_words, kernels_in_words, profiles_in_words):
        for line in in_words(rows):
            print(line)


def read_rows(path):
    """Return the rows of a .jsonl file, oldest first, without a last line that was cut off."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def rows_of(rows, *benches):
    return [row for row in rows if row["bench"] in benches]


def newest(rows, *keys):
    """Return the last row for each combination of the keys' values, in the order of the first."""
    rows_by_values = {}
    for row in rows:
        values = str([row.get(key) for key in keys])
        rows_by_values[values] = row
    return list(rows_by_values.values())


# --------------------------------------------------------------------------------------------------
# lines

def checks_in_words(rows):
    """How many checks of bench.py alive agree, which do not, and what --attention=auto takes."""
    # A check may have run several times: its last run counts.
    checks = newest(rows_of(rows, "alive", "trial"), "bench", "name", "heads")
    failed = [row for row in checks if not row["ok"]]
    if checks:
        yield f"does it run? {len(checks) - len(failed)} of {len(checks)} checks agree"
    for row in failed:
        yield f"  NOT: {row['name']}: {row.get('problem') or row.get('error')}"
    for row in newest(rows_of(rows, "auto"), "heads"):
        n_head, n_kv_head, head_dim = row["heads"]
        yield f"--attention=auto with {n_head}/{n_kv_head} heads of {head_dim} takes {row['name']}"


def steps_in_words(rows):
    measured = [row for row in rows_of(rows, "train") if row["run"] == "steps"]
    for row in newest(measured, "size", "key"):
        yield step_in_words(row)


def step_in_words(row):
    """Return the line of a training step. bench.py steps prints this line, too."""
    name = f"{row['size']}, {row['name']}"
    if "why" in row:
        return f"{name}: not measured: {row['why']}"
    ms = 1000 * statistics.median(row["seconds"])
    mfu = f"{row['mfu']:.1%} MFU" if row["mfu"] else "no MFU (no published peak)"
    gib = row["peak"] / 2 ** 30
    ratio = ""
    if row["key"] != "ours" and "ratio" in row:      # it is missing where our MLM step failed
        ratio = f", {row['ratio']:.2f} x the time of ours, MLM"
    return (f"{name}: {row['tok_per_s']:,.0f} tokens/s, {ms:.0f} ms a step, {mfu}, "
            f"peak {gib:.1f} GiB, first step after {row['first']:.0f} s{ratio}")


def kernels_in_words(rows):
    """A line for each case: ours in TFLOP/s, and how many times as long the others take."""
    # {case: {contestant: its row for forward and backward together}}
    cases = {}
    for row in rows_of(rows, "attention", "loss"):
        if row["pass"] == "both" and "ms" in row:
            cases.setdefault(case_in_words(row), {})[row["name"]] = row
    for case, contestants in cases.items():
        if "ours" not in contestants:
            continue
        own_row = contestants["ours"]
        words = [f"{case}: ours {own_row['tflops']:.1f} TFLOP/s, {own_row['ms']:.2f} ms"]
        for name, row in contestants.items():
            if name != "ours":
                words.append(f"{name} takes {row['ratio']:.2f} x as long")
        yield ", ".join(words)


def case_in_words(row):
    if row["bench"] == "attention":
        mask = "causal" if row["causal"] else "full"
        return f"attention {row['size']}, {row['packing']}, {mask}"
    return f"loss {row['size']}, {row['positions']:,} targets"


def profiles_in_words(rows):
    profiles = [row for row in rows_of(rows, "profile") if row["kernels"]]
    for row in newest(profiles, "size"):
        largest = row["kernels"][0]
        yield (f"a step of {row['size']}: the GPU computes for {row['busy']:.1%} of "
               f"{row['step_ms']:.1f} ms; most time in {largest['name'][:60]}, "
               f"{largest['ms']:.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1])
