"""The paper's Figures 2 to 10 and 12, ours and the paper's in rows of panels of their own; and the loss curves of runs.

A figure is a function (sources) -> matplotlib figure, or None where no source has what it shows. MLM is blue, solid and round,
CLM red, dashed and square. Bars are 95 % intervals and dots the values that ours are over; two values are only dots. An axis is
fitted to means and dots; an interval much wider than that runs out of its panel.
Only report.py imports this file.
"""
import math
import re
import textwrap

import matplotlib
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter  # noqa: E402

from experiments import recipes
from objectives import split_name
from reporting.scores import AXES, IN_WORDS, StudyResults, select_trials
from reporting.sections import CLM, MLM, sections, size_of

matplotlib.use("Agg")

MLM_BLUE, CLM_RED, BOTH = "#1f5fbf", "#c0392b", "#7d3c98"     # the paper's colours for its two objectives, and one for the pair
LOOK = {"mlm": dict(color=MLM_BLUE, marker="o", ls="-"), "clm": dict(color=CLM_RED, marker="s", ls="--")}
SERIES = [dict(marker="o", ls="-"), dict(marker="s", ls="--"), dict(marker="^", ls=":"), dict(marker="D", ls="-.")]
BLUES, PURPLES = ("#8db4e8", MLM_BLUE, "#0b2a5c"), ("#c39bd3", BOTH, "#3b1050")
RULE = "standard"                       # of ours' error bars; the paper's are as published
FIT_LRS = (1e-5, 1e-4)                  # Figure 5's learning rates, ends included
UNITS = {"SC": "accuracy", "TC": "F1", "QA": "F1", "IR": "NDCG@10"}


# ---- panels

def frame(sources, names, ylabel=None):
    """A row of four panels a source. names: {source: the models compared} -> figure, [(source, family, columns, axis), ...]"""
    figure, axes = plt.subplots(len(sources), 4, figsize=(12, 0.6 + 3.0 * len(sources)), layout="constrained", squeeze=False)
    panels = []
    for source, row in zip(sources, axes):
        for family, axis in zip(IN_WORDS, row):
            columns = source.common(names[source], family)
            title = f"{family}, {UNITS[family]}" if source.is_paper else f"{family}: {', '.join(columns)}"
            axis.set_title(textwrap.fill(title, 30), fontsize=10)
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=9)
            if columns:
                panels.append((source, family, columns, axis))
            else:
                axis.text(0.5, 0.5, "no rows", transform=axis.transAxes, ha="center", color="grey")
                axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{source.label}\n{ylabel or 'score, %'}", fontsize=10)
    return figure, panels


def finish(figure, order=(), ncols=5):
    """One legend for all panels, above them. order: of its labels, where that of the panels will not do"""
    found = dict.fromkeys(order)
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found[label] = found.get(label) or handle
    found = {label: handle for label, handle in found.items() if handle}
    if found:
        figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=min(ncols, len(found)), fontsize=10,
                      frameon=False)
    return figure


def fit(axis, scores, below=0.12, above=0.15):
    """The y axis that holds all means and seeds, and their intervals as far as these are not much wider."""
    points = [p for s in scores for p in (s.mean, *s.values)]
    span = max(max(points) - min(points), 0.5)
    ends = [s.mean + sign * bar(s) for s in scores for sign in (-1, 1)]
    low, high = max(min(ends), min(points) - 0.5 * span), min(max(ends), max(points) + 0.5 * span)
    axis.set_ylim(min(low, min(points)) - below * span, max(high, max(points)) + above * span)


def bar(score):
    """Half the height of an error bar. A t interval of two values is nine times their spread: the two dots say as much."""
    return 0 if math.isnan(score.half_width) or score.n < 3 else score.half_width


def line(axis, points, label, **look):
    """points: [(x, Score)]"""
    points = sorted(((x, s) for x, s in points if x is not None and s), key=lambda p: p[0])
    if points:
        axis.errorbar([x for x, _ in points], [s.mean for _, s in points], yerr=[bar(s) for _, s in points], label=label, ms=5,
                      lw=1.6, capsize=3, elinewidth=1, **look)
        for x, s in points:
            axis.scatter([x] * len(s.values), s.values, s=8, color=look["color"], alpha=0.45, zorder=3)
    return [s for _, s in points]


def bars(axis, groups):
    """groups: {group: [(label, Score, colour, hatch)]}; the axis does not begin at 0, so every bar has its value."""
    drawn = [s for group in groups.values() for _, s, *_ in group if s]
    fit(axis, drawn, 0.45, 0.3)
    for i, group in enumerate(groups.values()):
        width = 0.8 / len(group)
        for k, (label, s, colour, hatch) in enumerate(group):
            if s:
                x = i - 0.4 + (k + 0.5) * width
                axis.bar(x, s.mean, 0.92 * width, color=colour, hatch=hatch, edgecolor="white", label=label)
                axis.errorbar(x, s.mean, yerr=bar(s), color="black", capsize=3 if bar(s) else 0, lw=1)
                axis.annotate(f"{s.mean:.1f}", (x, axis.get_ylim()[0]), xytext=(0, 3), textcoords="offset points", ha="center",
                              fontsize=8, bbox=dict(fc="white", ec="none", pad=0.6))
                axis.scatter([x] * len(s.values), s.values, s=9, color="black", zorder=3)
    axis.set_xticks(range(len(groups)), groups)
    axis.grid(False, axis="x")


def having(sources, wanted):
    """{source: names} of the sources for which wanted(sections of its models, recipes) finds any; {} if the first has none."""
    found = {}
    for source in sources:
        parts = {k: {n: recipes.parse(n) for n in names} for k, names in sections(source.names).items()}
        names = [n for n in wanted(parts) if any(source.score(n, [c], RULE) for f in IN_WORDS for c in source.columns.get(f, ()))]
        if names:
            found[source] = names
    return found if sources[0] in found else {}         # the paper's row stands below ours, not in its place


def objective(recipe):
    return recipe.stages[0][0]


# ---- the figures

def figure_2(sources):
    """Bars: MLM at 40 % and CLM, by size."""
    names = having(sources, lambda parts: [n for n, r in parts["base"].items() if objective(r) in (MLM, CLM)])
    if not names:
        return None
    figure, panels = frame(list(names), names)
    for source, _, columns, axis in panels:
        groups = {}
        for name in names[source]:
            r = recipes.parse(name)
            groups.setdefault(r.size.upper(), []).append((
                "MLM, 40 % masked" if objective(r) == MLM else "CLM", source.score(name, columns, paper_rule(source)),
                *((MLM_BLUE, "") if objective(r) == MLM else (CLM_RED, "//"))))
        bars(axis, groups)
    return finish(figure)


def paper_rule(source):
    return "paper" if source.is_paper else RULE


def lines_figure(sources, wanted, key, x, xlabel, look, log=False, ticks=None):
    """Lines of family scores. key(recipe) -> [what a line's models share]; x(source, name) -> where a model lies;
    look(keys) -> {key: (label, style)}"""
    names = having(sources, wanted)
    names = {s: [n for n in found if x(s, n) is not None] for s, found in names.items()}
    names = {s: found for s, found in names.items() if found}
    if sources[0] not in names:
        return None
    figure, panels = frame(list(names), names)
    styles = look(list({k: None for found in names.values() for name in found for k in key(recipes.parse(name))}))
    for source, _, columns, axis in panels:
        lines = {}
        for name in names[source]:
            for k in key(recipes.parse(name)):
                lines.setdefault(k, []).append((x(source, name), source.score(name, columns, paper_rule(source))))
        drawn = []
        for k, (label, style) in styles.items():
            drawn += line(axis, lines.get(k, ()), label, **style)
        if drawn:
            fit(axis, drawn)
        axis.set_xlabel(xlabel, fontsize=9)
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(10, (1, 3)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        if xlabel != AXES["flops"] and not ticks:
            axis.xaxis.set_major_formatter(lambda value, _: EngFormatter(sep="")(value).replace("G", "B"))
        if ticks:
            axis.set_xticks(ticks)
    return finish(figure, [label for label, _ in styles.values()])


def shades(keys, colours, words):
    return {k: (words(k), SERIES[i % 4] | dict(color=colours[i % 3])) for i, k in enumerate(keys)}


def figure_3(sources):
    """Score against the masking rate, a line a size."""
    def wanted(parts):
        rates = {n: objective(r) for n, r in parts["base"].items() if objective(r) != CLM}
        return list(rates) if len(set(rates.values())) > 1 else []
    return lines_figure(sources, wanted, lambda r: [r.size], lambda source, name: int(objective(recipes.parse(name))[3:]),
                        "masking rate, %", lambda keys: shades(sorted(keys, key=size_of), BLUES, str.upper), ticks=(20, 30, 40, 50))


def figure_4(axis):
    """Score against an axis of pretraining, MLM and CLM; against FLOPs it is the paper's Figure 10."""
    def look(keys):
        sizes = sorted({size for size, _ in keys}, key=size_of)
        return {(size, o): (("MLM, 40 % masked" if o == MLM else "CLM") + f", {size.upper()}" * (len(sizes) > 1),
                            LOOK[o[:3]] | (dict(marker="os^D"[sizes.index(size) % 4]) if len(sizes) > 1 else {}))
                for size, o in sorted(keys, key=lambda k: (size_of(k[0]), k[1] != MLM))}
    return lambda sources: lines_figure(
        sources, lambda parts: [n for n, r in parts["steps"].items() if objective(r) in (MLM, CLM)],
        lambda r: [(r.size, objective(r))], lambda source, name: source.amount(name, axis), AXES[axis], look, log=True)


def figure_6(sources):
    """Score against the share of CLM, a line a budget."""
    def ends(r):
        return [(size_of(r.size), r.size, r.steps)]

    def wanted(parts):
        mixed = {(*ends(r), o) for r in parts["shares"].values() if len(r.stages) > 1 for o in (CLM, r.stages[1][0])}
        return [n for n, r in parts["shares"].items() if (*ends(r), r.stages[-1][0]) in mixed]
    return lines_figure(
        sources, wanted, ends, lambda source, name: 100 * recipes.parse(name).clm_share(), "share of CLM, % of steps",
        lambda keys: shades(sorted(keys), PURPLES, lambda k: f"{k[1].upper()}, budget {recipes.steps_in_words(k[2])}"))


def figure_8(sources):
    """Bars: a decayed model and what MLM made of it in the longest continuation, from MLM and from CLM."""
    names = having(sources, lambda parts: [n for n, r in parts["continued"].items() if not r.start or r.steps == max(
        q.steps for q in parts["continued"].values() if q.start)])
    names = {s: found for s, found in names.items() if any(recipes.parse(n).start for n in found)}
    if not names:
        return None
    figure, panels = frame(list(names), names)
    for source, _, columns, axis in panels:
        groups = {}
        for name in names[source]:
            r = recipes.parse(name)
            start = "CLM" if objective(r) == CLM else "MLM"
            label = f"MLM for {recipes.steps_in_words(r.steps - r.start)} steps more, from {start}" if r.start else f"{start} start"
            groups.setdefault(f"from {start}", []).append((label, source.score(name, columns, paper_rule(source)),
                                                           CLM_RED if start == "CLM" else MLM_BLUE, "xx" if r.start else ""))
        bars(axis, dict(sorted(groups.items(), reverse=True)))
    return finish(figure)


def added(source, name):
    """Steps of continued pretraining, of the source's own scale; 0 for a start."""
    recipe = recipes.parse(name)
    if not recipe.start:
        return 0
    if source.is_paper:
        return recipe.steps - recipe.start
    whole, start = source.amount(name, "steps"), source.amount(recipe.parent().name, "steps")
    return whole - start if whole and start else None


def figure_9(sources):
    """Score against steps of continued pretraining, from MLM and from CLM."""
    return lines_figure(
        sources, lambda parts: list(parts["continued"]) if any(r.start for r in parts["continued"].values()) else [],
        lambda r: [objective(r)[:3]], added, "steps of MLM after the start",
        lambda keys: {k: (f"from {k.upper()}", LOOK[k]) for k in sorted(keys, reverse=True)})


def spread_figure(series):
    """Centred scores of each task: every value a dot, and a bar of one standard deviation.
    series: {source: {(family, column): {label: values}}}"""
    figure, axes = plt.subplots(len(series), 4, figsize=(12, 0.6 + 3.0 * len(series)), layout="constrained", squeeze=False)
    for (source, found), row in zip(series.items(), axes):
        for family, axis in zip(IN_WORDS, row):
            columns = [c for f, c in found if f == family]
            for i, column in enumerate(columns):
                for label, values in found[family, column].items():
                    clm = label.startswith("CLM")
                    look, x, values = LOOK["clm" if clm else "mlm"], i + 0.17 * (1 if clm else -1), values - np.mean(values)
                    axis.scatter(np.full(len(values), x + 0.09), values, s=7, color=look["color"], alpha=0.4)
                    axis.errorbar(x, 0, yerr=np.std(values, ddof=1), color=look["color"], marker=look["marker"], ls="none",
                                  capsize=5, lw=2, label=label)
            axis.set_title(f"{family}, {UNITS[family]}" if columns else f"{family}: no rows", fontsize=10)
            axis.set_xticks(range(len(columns)), [textwrap.fill(c, 14, break_long_words=False) for c in columns], fontsize=8,
                            rotation=0 if len(columns) < 4 else 30)
            axis.set_xlim(-0.6, max(len(columns), 1) - 0.4)
            axis.axhline(0, color="grey", lw=0.6)
            axis.grid(alpha=0.25, axis="y")
        row[0].set_ylabel(f"{source.label}\nscore - its mean, points", fontsize=10)
    return finish(figure)


def figure_5(sources):
    """How far scores lie from their mean over learning rates and seeds, MLM and CLM, at the largest size that has both."""
    found = {}
    for source in (s for s in sources if isinstance(s, StudyResults)):
        base = {(r.size, objective(r)): n for n in sections(source.names)["base"] for r in [recipes.parse(n)]}
        sizes = sorted({size for size, _ in base if (size, MLM) in base and (size, CLM) in base}, key=size_of)
        for family, column in ((f, c) for f in IN_WORDS for c in source.columns.get(f, ())):
            for label, o in (("MLM, 40 % masked", MLM), ("CLM", CLM)) if sizes else ():
                rows = [(seed, r) for seed, r in source.rows_of(base[sizes[-1], o], column)
                        if not r["failed"] and FIT_LRS[0] <= r["lr"] <= FIT_LRS[1]]
                means = {s: np.mean([r["test"]["score"] for q, r in rows if q == s]) for s in {s for s, _ in rows}}
                values = [100 * (r["test"]["score"] - means[s]) for s, r in rows]      # around the mean of each pretraining seed
                if len(values) > 1:
                    found.setdefault(source, {}).setdefault((family, column), {})[label] = values
    return spread_figure(found) if found else None


def figure_7(sources):
    """How far scores lie from their mean over masking rates and seeds: MLM throughout, and CLM with the decay alone in MLM. Of the
    paper the second is not published as numbers, nor the seeds: one mean a masking rate."""
    found = {}
    for source in sources:
        parts = sections(source.names)
        rates = {n: recipes.parse(n) for n in parts["base"] + parts["others"]}
        decays = {n: r for n, r in rates.items() if not r.start and not r.turns and not r.step
                  and [o[:3] for o, _ in r.stages] == ["clm", "mlm"]}
        sizes = {r.size for r in decays.values()} or {"610m"}
        plain = {n: r for n, r in rates.items() if len(r.stages) == 1 and re.fullmatch(r"mlm\d+", objective(r)) and r.size in sizes}
        for label, group in (("MLM throughout", plain), ("CLM, its decay in MLM", decays)):
            for family, column in ((f, c) for f in IN_WORDS for c in source.columns.get(f, ())):
                values = []
                for name in group if len(group) > 1 else ():
                    if source.is_paper:
                        values.append(source.score(name, [column], "paper").mean)
                    else:
                        picked = [select_trials(rows, "paper") for rows in source.rows[name, column].values()]
                        values += [100 * r["test"]["score"] for p in picked if p for r in p.rows]
                if len(values) > 1:
                    found.setdefault(source, {}).setdefault((family, column), {})[label] = values
    return spread_figure(found) if sources[0] in found else None


def figure_12(sources):
    """Losses of pretraining and its continuation, a panel a budget: training (thin, own objective) and validation (MLM)."""
    curves = {}
    for source in (s for s in sources if isinstance(s, StudyResults)):
        for name, facts in sorted(source.study.models.items()):
            r = recipes.parse(name)
            if r.start and facts.get("curve", {}).get("train"):
                curves.setdefault(r.steps - r.start, {}).setdefault(objective(r)[:3], (facts["curve"], r))       # the lowest seed's
    if not curves:
        return None
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.8), layout="constrained", squeeze=False)
    for axis, (steps, found) in zip(axes[0], sorted(curves.items())):
        for start, (curve, _) in sorted(found.items(), reverse=True):
            look = LOOK[start]
            axis.plot(*zip(*[r[:2] for r in curve["train"]]), color=look["color"], ls=look["ls"], lw=0.8, alpha=0.5,
                      label=f"{start.upper()}, then MLM: training, own objective")
            if curve["validation"]:
                axis.plot(*zip(*curve["validation"]), **look, ms=3.5, lw=1.5, label=f"{start.upper()}, then MLM: validation, MLM")
        axis.set_title(f"{recipes.steps_in_words(steps)} steps more (the paper's count)", fontsize=10)
        axis.set_xlabel("training steps", fontsize=9)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("loss, nats a target", fontsize=10)
    return finish(figure, ncols=2)


FIGURES = {"fig02_objectives_by_size": figure_2, "fig03_masking_rate": figure_3,
           **{f"fig04_{axis}": figure_4(axis) for axis in ("steps", "tokens", "targets")}, "fig10_flops": figure_4("flops"),
           "fig05_learning_rates": figure_5, "fig06_share_of_clm": figure_6, "fig07_masking_after_clm": figure_7,
           "fig08_continued_bars": figure_8, "fig09_continued_steps": figure_9, "fig12_losses": figure_12}


# ---- runs without trials

def colour(r):
    kinds = {split_name(objective)[0] for objective, _ in r["settings"]["phases"]}
    return {"mlm": MLM_BLUE, "clm": CLM_RED}.get(kinds.pop(), BOTH) if len(kinds) == 1 else BOTH


def smooth(values, weight=0.9):
    """Exponential moving average without the start's bias."""
    out, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight ** i))
    return out


def in_legend(name):
    """A folder's name as matplotlib shows it unchanged: dollar signs would be read as formulas, and a label that begins with an
    underscore is left out of the legend."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def loss_curves(runs):
    """Of runs of train.py against their tokens: validation losses of both objectives, and each run's own training loss."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    panels = (("MLM loss, validation", "validation", "val_mlm_loss"), ("CLM loss, validation", "validation", "val_clm_loss"),
              ("training loss (each run's own objective)", "train", "loss"))
    for axis, (title, kind, key) in zip(axes, panels):
        for r in sorted(runs, key=lambda r: colour(r) == BOTH):      # the pair last: its beginning covers the trunk's
            x, y = [row["tokens"] / 1e6 for row in r[kind]], [row[key] for row in r[kind]]
            style = dict(color=colour(r), label=in_legend(r["name"]), lw=1.8)
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
    return figure


def switch(r):
    """Tokens seen when the first phase ends, or None for a run of one phase."""
    s = r["settings"]
    return s["phases"][0][1] * s["batch_rows"] * s["block_size"] if len(s["phases"]) > 1 else None
