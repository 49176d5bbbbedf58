"""The figures in a rows file that decide something, most important first: `python bench_summary.py
ROWS.jsonl`.

Runs after every part of runs/gpu.sh, so it needs the standard library only and takes no time.
"""
import json
import os
import statistics
import sys


def read(path):
    """The rows of a .jsonl file, oldest first; a last line that a killed process cut off is left
    out."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def newest(rows, *keys):
    """One row for each combination of the keys' values, the last one written; in the order in which
    they first appeared."""
    found = {}
    for row in rows:
        found[str([row.get(key) for key in keys])] = row
    return list(found.values())


def checks_in_words(rows):
    checks = newest(
        [row for row in rows if row["bench"] in ("alive", "trial")], "bench", "name", "heads"
    )
    failed = [row for row in checks if not row["ok"]]
    if checks:
        yield f"does it run? {len(checks) - len(failed)} of {len(checks)} checks agree"
    for row in failed:
        yield f"  NOT: {row['name']}: {row.get('problem') or row.get('error')}"
    for row in newest([row for row in rows if row["bench"] == "auto"], "heads"):
        n_head, n_kv_head, head_dim = row["heads"]
        yield f"--attention=auto with {n_head}/{n_kv_head} heads of {head_dim} takes {row['name']}"


def step_in_words(row):
    """One measured training step, as bench.py steps prints it, too."""
    name = f"{row['size']}, {row['name']}"
    if "why" in row:
        return f"{name}: not measured: {row['why']}"
    mfu = f"{row['mfu']:.1%} MFU" if row["mfu"] else "no MFU (no published peak)"
    ratio = "" if row["key"] == "ours" else f", {row['ratio']:.2f} x the time of ours, MLM"
    return (
        f"{name}: {row['tok_per_s']:,.0f} tokens/s, {1000 * statistics.median(row['seconds']):.0f} ms a step, {mfu}, "
        f"peak {row['peak'] / 2**30:.1f} GiB, first step after {row['first']:.0f} s{ratio}"
    )


def steps_in_words(rows):
    for row in newest(
        [row for row in rows if row["bench"] == "train" and row["run"] == "steps"], "size", "key"
    ):
        yield step_in_words(row)


def kernels_in_words(rows):
    """A line a case: ours in TFLOP/s, and how many times as long the others take."""
    cases = {}
    for row in rows:
        if row["bench"] in ("attention", "loss") and row["pass"] == "both" and "ms" in row:
            if row["bench"] == "attention":
                case = f"attention {row['size']}, {row['packing']}, {'causal' if row['causal'] else 'full'}"
            else:
                case = f"loss {row['size']}, {row['positions']:,} targets"
            cases.setdefault(case, {})[row["name"]] = row
    for case, found in cases.items():
        if "ours" in found:
            words = [
                f"{case}: ours {found['ours']['tflops']:.1f} TFLOP/s, {found['ours']['ms']:.2f} ms"
            ]
            words += [
                f"{name} takes {row['ratio']:.2f} x as long"
                for name, row in found.items()
                if name != "ours"
            ]
            yield ", ".join(words)


def profile_in_words(rows):
    for row in newest(
        [row for row in rows if row["bench"] == "profile" and row["kernels"]], "size"
    ):
        largest = row["kernels"][0]
        yield (
            f"a step of {row['size']}: the GPU computes for {row['busy']:.1%} of {row['step_ms']:.1f} ms; most time in "
            f"{largest['name'][:60]}, {largest['ms']:.2f} ms"
        )


def main(path):
    rows = read(path)
    for lines in (
        checks_in_words(rows),
        steps_in_words(rows),
        kernels_in_words(rows),
        profile_in_words(rows),
    ):
        for line in lines:
            print(line)


if __name__ == "__main__":
    main(sys.argv[1])
