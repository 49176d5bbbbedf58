"""Runs -> a table and a picture; fine-tuning trials -> a table with confidence intervals. Nothing imports it.

    python report.py runs/demo/mlm runs/demo/clm runs/demo/clm_then_mlm --to=runs/demo

Of a run of train.py it reads config.json and log.jsonl; one that was branched from a trunk is shown with the trunk's steps
before it, so that all curves begin at step 0. Trials are every trials/<task>/lr<lr>_sd<seed>.json anywhere below the folders:
{"model", "task", "lr", "seed", "validation": {"score"}, "test": {"score"}}, scores from 0 to 1, or "failed": true. Retrieval rows
are told apart by the pool of documents that was searched, and have a second table with what else is known of their rankings.
"""
import glob
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass

import matplotlib
import numpy as np
from scipy import stats

import metrics
from configurator import UserError, run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MLM_BLUE, CLM_RED, BOTH = "#1f5fbf", "#c0392b", "#7d3c98"     # the paper's colours for its two objectives, and one for the pair


@dataclass
class Config:
    args: tuple = ()
    # output
    to: str = "report"      # folder for table.md, loss_curves.png and trials.md


def read_run(folder):
    """-> {"name", "settings", "train": rows, "validation": rows}, an ancestor's rows in front. Raises UserError."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
    except OSError as error:
        raise UserError(f"{folder} is no run of train.py: {error.strerror.lower()}: {error.filename}") from None
    found = {"name": os.path.basename(os.path.normpath(folder)), "settings": config["settings"],
             "train": [r for r in rows if "loss" in r], "validation": [r for r in rows if "val_mlm_loss" in r]}
    if config["start_step"] > 0:
        trunk = os.path.dirname(os.path.normpath(config["parent"]))
        if not os.path.isdir(trunk):            # the runs were moved together
            trunk = os.path.join(os.path.dirname(os.path.normpath(folder)), os.path.basename(trunk))
        before = read_run(trunk)
        for kind in ("train", "validation"):
            first = found[kind][0]["step"] if found[kind] else float("inf")
            found[kind] = [r for r in before[kind] if r["step"] < first and r["step"] <= config["start_step"]] + found[kind]
    return found


def phases_in_words(phases):
    return ", ".join(f"{steps:,} {objective}" for objective, steps in phases)


def table(runs):
    """Markdown: the last validation of each run, its tokens, and the seconds it trained (a trunk's included)."""
    lines = ["| run | steps | tokens | training seconds | validation CLM loss | validation MLM loss |", "|---|---|---|---|---|---|"]
    best = min(r["validation"][-1]["val_mlm_loss"] for r in runs)
    for r in runs:
        v = r["validation"][-1]
        mark = "**" if v["val_mlm_loss"] == best and len(runs) > 1 else ""
        lines.append(f"| {r['name']} | {phases_in_words(r['settings']['phases'])} | {v['tokens']:,} | {v['seconds']:,.0f} "
                     f"| {v['val_clm_loss']:.4f} | {mark}{v['val_mlm_loss']:.4f}{mark} |")
    return "\n".join(lines) + "\n"


def colour(r):
    objectives = {objective for objective, _ in r["settings"]["phases"]}
    return {"mlm": MLM_BLUE, "clm": CLM_RED}[objectives.pop()] if len(objectives) == 1 else BOTH


def smooth(values, weight=0.9):
    """Exponential moving average without the start's bias."""
    out, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight ** i))
    return out


def picture(runs, path):
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    panels = (("MLM loss, validation", "validation", "val_mlm_loss"), ("CLM loss, validation", "validation", "val_clm_loss"),
              ("training loss (each run's own objective)", "train", "loss"))
    for axis, (title, kind, key) in zip(axes, panels):
        for r in sorted(runs, key=lambda r: colour(r) == BOTH):      # the pair last: its beginning covers the trunk's
            x, y = [row["tokens"] / 1e6 for row in r[kind]], [row[key] for row in r[kind]]
            style = dict(color=colour(r), label=r["name"], lw=1.8)
            if kind == "train":
                axis.plot(x, y, color=colour(r), alpha=0.18, lw=0.8)
                axis.plot(x, smooth(y), **style)
            else:
                axis.plot(x, y, marker="o", ms=3, **style)
                axis.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", va="center",
                              color=colour(r))
        for tokens in {switch(r) for r in runs} - {None}:
            axis.axvline(tokens / 1e6, color="grey", ls=":", lw=1)
            axis.text(tokens / 1e6, 0.98, " objective swap", transform=axis.get_xaxis_transform(), va="top", fontsize=8,
                      color="grey")
        axis.set(title=title, xlabel="million tokens", ylabel="nats per target")
        axis.margins(x=0.08)
        axis.grid(alpha=0.25)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def switch(r):
    """Tokens seen when the first phase ends, or None for a run of one phase."""
    s = r["settings"]
    return s["phases"][0][1] * s["batch_rows"] * s["block_size"] if len(s["phases"]) > 1 else None


# ---- fine-tuning trials

def read_trials(folder):
    """{path: row} of all trials below a folder. Raises UserError for a file that is no row."""
    paths = glob.glob(os.path.join(glob.escape(folder), "**", "trials", "*", "lr*_sd*.json"), recursive=True)
    rows = {}
    for path in sorted(map(os.path.realpath, paths)):
        with open(path, encoding="utf-8") as f:
            try:
                row = json.load(f)
                row = {k: row[k] for k in ("model", "task", "lr", "seed")} | row
                scores = None if row.get("failed") else [float(row[split]["score"]) for split in ("validation", "test")]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is no row of a trial: remove it, or run the trial again") from None
        row["failed"] = scores is None or not all(map(math.isfinite, scores))
        rows[path] = row
    return rows


def select(rows, rule):
    """Choose learning rates on validation scores and estimate the test score. rows: one model's and task's.

    "paper":    each seed takes the LR of its own best validation score; mean of the test scores +- 1.96 s / sqrt(n). This is how
                the published tables came about (their figures follow from the official rows). 1.96 is a normal quantile: with
                five seeds such an interval covers the true mean in 88 of 100 cases, and choosing per seed is optimistic.
    "standard": one LR, of the best mean validation score among those with the most seeds; +- t(0.975, n - 1) s / sqrt(n).
    s has ddof 1. Failed trials have no score and are never chosen.
    -> {"mean", "half_width", "lrs": one a seed, "n", "rows": the chosen ones}, or None
    """
    good = [r for r in rows if not r["failed"]]
    if not good:
        return None
    if rule == "paper":
        chosen = [max((r for r in good if r["seed"] == seed), key=lambda r: r["validation"]["score"])
                  for seed in sorted({r["seed"] for r in good})]
    else:
        by_lr = defaultdict(list)
        for r in good:
            by_lr[r["lr"]].append(r)
        chosen = by_lr[metrics.best_lr({lr: [r["validation"]["score"] for r in rs] for lr, rs in by_lr.items()})]
    scores, n = [r["test"]["score"] for r in chosen], len(chosen)
    quantile = 1.96 if rule == "paper" else stats.t.ppf(0.975, n - 1)
    half_width = quantile * np.std(scores, ddof=1) / n ** 0.5 if n > 1 else float("nan")
    return {"mean": float(np.mean(scores)), "half_width": float(half_width), "lrs": [r["lr"] for r in chosen], "n": n,
            "rows": chosen}


def in_words(found, lrs):
    """53.16 ± 0.42 (5e-05 x 3, 1e-04 x 2†); the dagger marks an edge of the grid, where a better LR may lie outside."""
    if found is None:
        return "no trial succeeded"
    edge = {min(lrs), max(lrs)} if len(lrs) > 1 else set()
    chosen = ", ".join(f"{lr:.0e}{f' x {k}' if k > 1 else ''}{'†' if lr in edge else ''}"
                       for lr, k in sorted(Counter(found["lrs"]).items()))
    interval = "" if math.isnan(found["half_width"]) else f" ± {100 * found['half_width']:.2f}"
    return f"{100 * found['mean']:.2f}{interval} ({chosen})"


def named(row):
    """The model, and how it was fine-tuned where that is not the default: such rows are never mixed."""
    unusual = [row["mode"]] if row.get("mode", "standard") != "standard" else []
    unusual += [f"{row['param_dtype']} weights"] if row.get("param_dtype", "float32") != "float32" else []
    unusual += ["causal"] if row.get("causal") else []
    unusual += [f"{row['split']} split"] if row.get("split", "hash") != "hash" else []
    unusual += [f"trained on {row['train_on']}"] if row.get("train_on", row["task"]) != row["task"] else []
    return row["model"] + f" ({', '.join(unusual)})" * bool(unusual)


def task_of(row):
    """The task and, in retrieval, the pool of documents that was searched: another pool is another task."""
    return f"{row['task']}, {row['pool']} pool" if row.get("pool") else row["task"]


def trial_table(rows):
    """Markdown: a line a task and model, both rules side by side, and what is missing of the grid that the task's rows span."""
    lines = ["| task | model | rule paper: test ± 1.96 s/√n (LR) | rule standard: test ± t s/√n (LR) "
             "| baseline | seeds | failed | missing |",
             "|---|---|---|---|---|---|---|---|"]
    groups = defaultdict(list)
    for r in rows:
        groups[task_of(r), named(r)].append(r)
    for (task, model), group in sorted(groups.items()):
        lrs, seeds = ({r[k] for r in rows if task_of(r) == task} for k in ("lr", "seed"))
        baseline = next((f"{100 * r['baseline']['score']:.2f} ({r['baseline']['name']})" for r in group if r.get("baseline")), "")
        missing = len(lrs) * len(seeds) - len({(r["lr"], r["seed"]) for r in group})
        lines.append(f"| {task} | {model} | {in_words(select(group, 'paper'), lrs)} | {in_words(select(group, 'standard'), lrs)} "
                     f"| {baseline} | {len({r['seed'] for r in group})} | {sum(r['failed'] for r in group)} | {missing} |")
    return "\n".join(lines) + "\n"


def retrieval_table(rows):
    """Markdown: what else is known of the rankings, means over the seeds of rule standard's learning rate."""
    keys = {"ndcg_10": "NDCG@10", "paper_ndcg_10": "the paper's NDCG@10", "mrr_10": "MRR@10", "recall_100": "Recall@100"}
    lines = [f"| collection, pool | model | documents | queries | {' | '.join(keys.values())} |", "|" + "---|" * (4 + len(keys))]
    groups = defaultdict(list)
    for r in rows:
        if r.get("kind") == "retrieval":
            groups[task_of(r), named(r)].append(r)
    for (task, model), group in sorted(groups.items()):
        found = select(group, "standard")
        if found is not None:
            means = [f"{100 * np.mean([r['test'][key] for r in found['rows']]):.2f}" for key in keys]
            first = found["rows"][0]
            lines.append(f"| {task} | {model} | {first['documents']:,} | {first['test']['n']:,} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def main(c):
    if not c.args:
        raise UserError("which runs? python report.py RUN_DIR... --to=DIR")
    found = {folder: read_trials(folder) for folder in c.args}
    trials = list({path: row for rows in found.values() for path, row in rows.items()}.values())    # each file once
    # a folder that holds trials need not be a run of train.py
    folders = [f for f in c.args if not found[f] or os.path.isfile(os.path.join(f, "log.jsonl"))]
    runs = [read_run(folder) for folder in folders]
    for folder, r in zip(folders, runs):
        if not r["validation"] or not r["train"]:
            raise UserError(f"{folder} has no logged steps yet")
    os.makedirs(c.to, exist_ok=True)
    texts = {"table.md": table(runs)} if runs else {}
    if trials:
        texts["trials.md"] = "\n".join(filter(None, (trial_table(trials), retrieval_table(trials))))
    for name, text in texts.items():
        with open(os.path.join(c.to, name), "w", encoding="utf-8") as f:
            f.write(text)
        print(text)
    if runs:
        picture(runs, os.path.join(c.to, "loss_curves.png"))
    print(", ".join(os.path.join(c.to, name) for name in [*texts, *["loss_curves.png"] * bool(runs)]))


if __name__ == "__main__":
    run(main, Config)
