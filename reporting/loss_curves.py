"""The loss curves of runs of train.py."""
import matplotlib.pyplot as plt

from objectives import split_name
from reporting.panels import BOTH_PURPLE, CLM_RED, MLM_BLUE, as_plain_text

# each panel's title, the rows of a run that it shows, and the key of a loss in these rows
LOSS_PANELS = (("MLM loss, validation", "validation", "val_mlm_loss"),
               ("CLM loss, validation", "validation", "val_clm_loss"),
               ("training loss (each run's own objective)", "train", "loss"))


def loss_curves(runs):
    """Validation losses of both objectives and each run's own training loss, against tokens.

    runs: as read.read_run returns them
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    swaps = {tokens_at_swap(run) for run in runs} - {None}
    # runs of both objectives are drawn last: they begin with their trunk's curve, and so cover it
    runs_in_order = sorted(runs, key=lambda run: run_colour(run) == BOTH_PURPLE)
    for axis, (title, kind, key) in zip(axes, LOSS_PANELS):
        for run in runs_in_order:
            draw_losses(axis, run, kind, key)
        # a dotted line where a run of several phases changes its objective
        for tokens in swaps:
            axis.axvline(tokens / 1e6, color="grey", ls=":", lw=1)
            axis.text(tokens / 1e6, 0.98, " objective swap", transform=axis.get_xaxis_transform(),
                      va="top", fontsize=8, color="grey")
        axis.set(title=title, xlabel="million tokens", ylabel="nats per target")
        axis.margins(x=0.08)
        axis.grid(alpha=0.25)
        axis.legend()
    return figure


def draw_losses(axis, run, kind, key):
    """One run's curve: smoothed training losses, or validation losses with the last value written.

    kind: "train" or "validation", whose rows of the run are drawn; key: of the loss in a row
    """
    tokens = [row["tokens"] / 1e6 for row in run[kind]]
    losses = [row[key] for row in run[kind]]
    colour = run_colour(run)
    style = dict(color=colour, label=as_plain_text(run["name"]), lw=1.8)
    if kind == "train":
        # the raw losses stay visible behind their average
        axis.plot(tokens, losses, color=colour, alpha=0.18, lw=0.8)
        axis.plot(tokens, smooth(losses), **style)
    else:
        axis.plot(tokens, losses, marker="o", ms=3, **style)
        axis.annotate(f"{losses[-1]:.2f}", (tokens[-1], losses[-1]), xytext=(4, 0),
                      textcoords="offset points", va="center", color=colour)


def run_colour(run):
    """Blue for MLM, red for CLM, purple for everything else."""
    kinds = {split_name(objective)[0] for objective, _ in run["settings"]["phases"]}
    if kinds == {"mlm"}:
        return MLM_BLUE
    if kinds == {"clm"}:
        return CLM_RED
    return BOTH_PURPLE


def smooth(values, weight=0.9):
    """Exponential moving average, corrected for its start at 0."""
    averages = []
    mean = 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        averages.append(mean / (1 - weight ** i))
    return averages


def tokens_at_swap(run):
    """The tokens seen when the first phase ends, or None for a run of one phase."""
    settings = run["settings"]
    if len(settings["phases"]) < 2:
        return None
    _, first_steps = settings["phases"][0]
    return first_steps * settings["batch_rows"] * settings["block_size"]
