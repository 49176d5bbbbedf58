"""Runs -> a table and a picture. Reads config.json and log.jsonl; nothing imports it.

    python report.py runs/demo/mlm runs/demo/clm runs/demo/clm_then_mlm --to=runs/demo

A run that was branched from a trunk is shown with the trunk's steps before it, so that all curves begin at step 0.
"""
import json
import os
from dataclasses import dataclass

import matplotlib

from configurator import UserError, run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MLM_BLUE, CLM_RED, BOTH = "#1f5fbf", "#c0392b", "#7d3c98"     # the paper's colours for its two objectives, and one for the pair


@dataclass
class Config:
    args: tuple = ()
    # output
    to: str = "report"      # folder for table.md and loss_curves.png


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


def main(c):
    if not c.args:
        raise UserError("which runs? python report.py RUN_DIR... --to=DIR")
    runs = [read_run(folder) for folder in c.args]
    for folder, r in zip(c.args, runs):
        if not r["validation"] or not r["train"]:
            raise UserError(f"{folder} has no logged steps yet")
    os.makedirs(c.to, exist_ok=True)
    text = table(runs)
    with open(os.path.join(c.to, "table.md"), "w", encoding="utf-8") as f:
        f.write(text)
    picture(runs, os.path.join(c.to, "loss_curves.png"))
    print(text)
    print(f"{os.path.join(c.to, 'table.md')}, {os.path.join(c.to, 'loss_curves.png')}")


if __name__ == "__main__":
    run(main, Config)
