"""The paper's Figures 2 to 10 and 12, drawn from a study and from the paper.

FIGURES, at the end, names them all. Each is called with the sources, a list of StudyResults,
PaperResults or both, and returns a matplotlib figure, or None if the sources lack what it shows.
MLM is blue, solid and round; CLM is red, dashed and square.
"""
import re
import textwrap
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from experiments import recipes
from reporting.panels import (
    BOTH_PURPLE,
    CLM_RED,
    METRICS,
    MLM_BLUE,
    STUDY_RULE,
    Bar,
    Line,
    add_legend,
    as_plain_text,
    draw_bars,
    draw_line,
    families_of,
    fit_axis,
    make_axes,
    make_panels,
)
from reporting.scores import AXES, select_trials
from reporting.sections import (
    CLM,
    MLM,
    first_objective,
    is_clm_then_mlm,
    is_continued_with_mlm,
    sections,
    size_of,
    without_rate,
)

MLM_LABEL = "MLM, 40 % masked"
LOOK = {"mlm": dict(color=MLM_BLUE, marker="o", ls="-"),
        "clm": dict(color=CLM_RED, marker="s", ls="--")}
# lines that do not compare MLM with CLM take these shades, markers and styles in turn
BLUES = ("#8db4e8", MLM_BLUE, "#0b2a5c")
PURPLES = ("#c39bd3", BOTH_PURPLE, "#3b1050")
MARKERS = ("o", "s", "^", "D")
LINE_STYLES = ("-", "--", ":", "-.")
FIGURE_5_LRS = (1e-5, 1e-4)     # Figure 5's learning rates, both ends included


# ---- which models a figure shows

def models_with_scores(sources, choose):
    """The models that `choose` picks and that have a score: {source: names}.

    choose: a function {section: {name: recipe}} -> names. If the first source has no such model,
    the result is empty: the paper's row stands below a study's, not in its place.
    """
    models = {}
    for source in sources:
        groups = {}
        for section, names in sections(source.names).items():
            groups[section] = {name: recipes.parse(name) for name in names}
        chosen = [name for name in choose(groups) if has_score(source, name)]
        if chosen:
            models[source] = chosen
    return models if sources[0] in models else {}


def has_score(source, name):
    """True if a model has a score on any task."""
    for _, column in columns_of(source):
        if source.score(name, [column], STUDY_RULE):
            return True
    return False


def columns_of(source):
    """Yields (family, column) for every task that a source has."""
    for family, columns in source.columns.items():
        for column in columns:
            yield family, column


# ---- Figures 2 and 8: bars

def figure_2(sources):
    """MLM at 40 % and CLM, by size."""

    def choose(groups):
        return [name for name, r in groups["base"].items() if first_objective(r) in (MLM, CLM)]

    models = models_with_scores(sources, choose)
    if not models:
        return None
    figure, panels = make_panels(models)
    for panel in panels:
        groups = defaultdict(list)
        for name in models[panel.source]:
            recipe = recipes.parse(name)
            if first_objective(recipe) == MLM:
                bar = Bar(MLM_LABEL, panel.score(name), MLM_BLUE)
            else:
                bar = Bar("CLM", panel.score(name), CLM_RED, hatch="//")
            groups[recipe.size.upper()].append(bar)
        draw_bars(panel.axis, groups)
    add_legend(figure)
    return figure


def figure_8(sources):
    """Finished MLM and CLM models, and their longest continuations with MLM."""

    def choose(groups):
        continued = groups["continued"]
        longest = max((r.steps for r in continued.values() if r.start), default=0)
        return [name for name, r in continued.items() if not r.start or r.steps == longest]

    # a source must have a continuation to compare the finished models with
    models = {}
    for source, names in models_with_scores(sources, choose).items():
        if any(recipes.parse(name).start for name in names):
            models[source] = names
    if not models:
        return None
    figure, panels = make_panels(models)
    for panel in panels:
        groups = {"from MLM": [], "from CLM": []}
        for name in models[panel.source]:
            recipe = recipes.parse(name)
            is_clm = first_objective(recipe) == CLM
            objective = "CLM" if is_clm else "MLM"
            colour = CLM_RED if is_clm else MLM_BLUE
            if recipe.start:
                added = recipes.steps_in_words(recipe.steps - recipe.start)
                label = f"MLM for {added} steps more, from {objective}"
                bar = Bar(label, panel.score(name), colour, hatch="xx")
            else:
                bar = Bar(f"{objective} start", panel.score(name), colour)
            groups[f"from {objective}"].append(bar)
        draw_bars(panel.axis, {title: bars for title, bars in groups.items() if bars})
    add_legend(figure)
    return figure


# ---- Figures 3, 4, 6, 9 and 10: lines

class LineFigure:
    """Scores of families against some property of the models, a line per group of models.

    Call an instance with the sources to draw the figure. A subclass is one figure, with four
    methods:

        models(groups)      the names to show; groups: {section: {name: recipe}}
        line_key(recipe)    models with the same key are on one line
        x(source, name)     where a model lies on the x axis; None leaves it out
        lines(keys)         {key: Line} for a set of keys, in the order of the legend
    """
    xlabel = ""
    is_log = False
    ticks = None                    # of the x axis; None: matplotlib's own
    has_unit_prefixes = True        # ticks are written 10k, 1M

    def __call__(self, sources):
        # the models to show that have a place on the x axis: {source: names}
        models = {}
        for source, names in models_with_scores(sources, self.models).items():
            with_x = [name for name in names if self.x(source, name) is not None]
            if with_x:
                models[source] = with_x
        if sources[0] not in models:
            return None

        # every panel has the same lines, in the same look
        keys = set()
        for names in models.values():
            keys |= {self.line_key(recipes.parse(name)) for name in names}
        lines = self.lines(keys)
        figure, panels = make_panels(models)
        for panel in panels:
            self.draw_panel(panel, models[panel.source], lines)
            self.set_x_axis(panel.axis)
        add_legend(figure, [line.label for line in lines.values()])
        return figure

    def draw_panel(self, panel, names, lines):
        points = defaultdict(list)          # {key: [(x, Score), ...]}
        for name in names:
            score = panel.score(name)
            if score:
                key = self.line_key(recipes.parse(name))
                points[key].append((self.x(panel.source, name), score))
        # the lines in the order of the legend, each from left to right
        scores = []
        for key, line in lines.items():
            if key in points:
                points[key].sort(key=lambda point: point[0])
                draw_line(panel.axis, points[key], line)
                scores += [score for _, score in points[key]]
        if scores:
            fit_axis(panel.axis, scores)

    def set_x_axis(self, axis):
        axis.set_xlabel(self.xlabel, fontsize=9)
        if self.is_log:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(10, (1, 3)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        if self.ticks:
            axis.set_xticks(self.ticks)
        elif self.has_unit_prefixes:
            axis.xaxis.set_major_formatter(with_unit_prefix)


def with_unit_prefix(value, _position):
    """10k, 3M, 100B. EngFormatter writes 100G, and language models count in billions."""
    return EngFormatter(sep="")(value).replace("G", "B")


def shaded_lines(keys, colours, label):
    """Lines that differ in shade, marker and style. label: key -> text. -> {key: Line}"""
    lines = {}
    for i, key in enumerate(keys):
        style = dict(marker=MARKERS[i % 4], ls=LINE_STYLES[i % 4], color=colours[i % 3])
        lines[key] = Line(label(key), style)
    return lines


class MaskingRateFigure(LineFigure):
    """Figure 3: score against the masking rate, a line per size."""
    xlabel = "masking rate, %"
    ticks = (20, 30, 40, 50)

    def models(self, groups):
        rates = {}
        for name, recipe in groups["base"].items():
            if first_objective(recipe) != CLM:
                rates[name] = first_objective(recipe)
        has_several_rates = len(set(rates.values())) > 1
        return list(rates) if has_several_rates else []

    def line_key(self, recipe):
        return recipe.size

    def x(self, _source, name):
        return int(first_objective(recipes.parse(name)).removeprefix("mlm"))

    def lines(self, keys):
        by_size = sorted(keys, key=lambda size: (size_of(size), size))
        return shaded_lines(by_size, BLUES, str.upper)


class EfficiencyFigure(LineFigure):
    """Figures 4 and 10: score of MLM and CLM checkpoints against how much they were trained."""
    is_log = True

    def __init__(self, amount):
        """amount: a key of AXES"""
        self.amount = amount
        self.xlabel = AXES[amount]
        self.has_unit_prefixes = amount != "flops"

    def models(self, groups):
        return [name for name, r in groups["steps"].items() if first_objective(r) in (MLM, CLM)]

    def line_key(self, recipe):
        return recipe.size, first_objective(recipe)

    def x(self, source, name):
        return source.amount(name, self.amount)

    def lines(self, keys):
        sizes = sorted({size for size, _ in keys}, key=size_of)

        def order(key):
            size, objective = key
            return size_of(size), objective != MLM          # MLM before CLM

        lines = {}
        for size, objective in sorted(keys, key=order):
            label = MLM_LABEL if objective == MLM else "CLM"
            style = LOOK[without_rate(objective)]
            if len(sizes) > 1:
                # colours tell objectives apart, markers sizes
                label += f", {size.upper()}"
                style = style | dict(marker=MARKERS[sizes.index(size) % 4])
            lines[size, objective] = Line(label, style)
        return lines


class ShareFigure(LineFigure):
    """Figure 6: score against the share of CLM, a line per budget."""
    xlabel = "share of CLM, % of steps"

    def models(self, groups):
        # A line needs models that go from CLM to a second objective. Its ends are models of CLM
        # alone and of the second objective alone.
        on_a_line = set()           # (line key, last objective) of a line's models and ends
        for recipe in groups["shares"].values():
            if len(recipe.stages) > 1:
                second_objective = recipe.stages[1][0]
                on_a_line.add((self.line_key(recipe), CLM))
                on_a_line.add((self.line_key(recipe), second_objective))
        names = []
        for name, recipe in groups["shares"].items():
            last_objective = recipe.stages[-1][0]
            if (self.line_key(recipe), last_objective) in on_a_line:
                names.append(name)
        return names

    def line_key(self, recipe):
        # keys are sorted: the number puts sizes in order
        return size_of(recipe.size), recipe.size, recipe.steps

    def x(self, _source, name):
        return 100 * recipes.parse(name).clm_share()

    def lines(self, keys):
        def label(key):
            _, size, budget = key
            return f"{size.upper()}, budget {recipes.steps_in_words(budget)}"

        return shaded_lines(sorted(keys), PURPLES, label)


class ContinuedFigure(LineFigure):
    """Figure 9: score against steps of continued pretraining, from MLM and from CLM."""
    xlabel = "steps of MLM after the start"

    def models(self, groups):
        has_continuation = any(recipe.start for recipe in groups["continued"].values())
        return list(groups["continued"]) if has_continuation else []

    def line_key(self, recipe):
        return without_rate(first_objective(recipe))

    def x(self, source, name):
        return added_steps(source, name)

    def lines(self, keys):
        mlm_first = sorted(keys, reverse=True)
        return {key: Line(f"from {key.upper()}", LOOK[key]) for key in mlm_first}


def added_steps(source, name):
    """Steps of continued pretraining at the source's own scale: 0 for a start, None if unknown."""
    recipe = recipes.parse(name)
    if not recipe.start:
        return 0
    if source.is_paper:
        return recipe.steps - recipe.start
    total = source.amount(name, "steps")
    before = source.amount(recipe.parent().name, "steps")
    if not total or not before:
        return None
    return total - before


# ---- Figures 5 and 7: how far scores spread

class Spread:
    """The scores of each task, which draw() shows around their mean."""

    def __init__(self):
        # {source: {(family, column): {label: scores}}}
        self.scores = defaultdict(lambda: defaultdict(dict))

    def add(self, source, family, column, label, scores):
        """Add scores of one task; a single score has no spread and is left out."""
        if len(scores) > 1:
            self.scores[source][family, column][label] = scores

    def draw(self):
        """Every score a dot, and a bar of one standard deviation."""
        families = families_of(self.scores)
        figure, axes = make_axes(len(self.scores), len(families))
        for (source, scores_of_columns), row in zip(self.scores.items(), axes):
            for family, axis in zip(families, row):
                columns = [column for f, column in scores_of_columns if f == family]
                for i, column in enumerate(columns):
                    for label, scores in scores_of_columns[family, column].items():
                        draw_spread(axis, i, label, scores)
                self.label_panel(axis, family, columns)
            label = as_plain_text(source.label)
            row[0].set_ylabel(f"{label}\nscore - its mean, points", fontsize=10)
        add_legend(figure)
        return figure

    @staticmethod
    def label_panel(axis, family, columns):
        title = f"{family}, {METRICS.get(family, 'score')}" if columns else f"{family}: no rows"
        axis.set_title(title, fontsize=10)
        names = []
        for column in columns:
            names.append(textwrap.fill(as_plain_text(column), 14, break_long_words=False))
        rotation = 0 if len(columns) < 4 else 30
        axis.set_xticks(range(len(columns)), names, fontsize=8, rotation=rotation)
        axis.set_xlim(-0.6, max(len(columns), 1) - 0.4)
        axis.axhline(0, color="grey", lw=0.6)
        axis.grid(alpha=0.25, axis="y")


def draw_spread(axis, i, label, scores):
    """The scores of the i-th column of a panel: MLM's left of its middle, CLM's right."""
    is_clm = label.startswith("CLM")
    look = LOOK["clm" if is_clm else "mlm"]
    x = i + 0.17 if is_clm else i - 0.17
    centred = scores - np.mean(scores)
    axis.scatter(np.full(len(scores), x + 0.09), centred, s=7, color=look["color"], alpha=0.4)
    axis.errorbar(x, 0, yerr=np.std(centred, ddof=1), color=look["color"], marker=look["marker"],
                  ls="none", capsize=5, lw=2, label=label)


def figure_5(sources):
    """How far scores lie from their mean over learning rates and seeds, MLM and CLM.

    It shows the largest size that has both. The paper published no numbers for it.
    """
    spread = Spread()
    for source in sources:
        if source.is_paper:
            continue
        # the models of one objective: {size: {objective: name}}
        models = defaultdict(dict)
        for name in sections(source.names)["base"]:
            recipe = recipes.parse(name)
            models[recipe.size][first_objective(recipe)] = name
        sizes = [size for size in models if MLM in models[size] and CLM in models[size]]
        if not sizes:
            continue
        # the trials of the largest size that has both objectives
        largest = max(sizes, key=size_of)
        for family, column in columns_of(source):
            for label, objective in ((MLM_LABEL, MLM), ("CLM", CLM)):
                rows = source.rows_of(models[largest][objective], column)
                spread.add(source, family, column, label, scores_around_seed_means(rows))
    return spread.draw() if spread.scores else None


def scores_around_seed_means(rows):
    """Test scores at Figure 5's learning rates, each minus the mean of its pretraining seed.

    rows: [(pretraining seed, row), ...] -> a list, in points
    """
    lowest, highest = FIGURE_5_LRS
    by_seed = defaultdict(list)
    for seed, row in rows:
        if not row["failed"] and lowest <= row["lr"] <= highest:
            by_seed[seed].append(row["test"]["score"])
    points = []
    for scores in by_seed.values():
        mean = np.mean(scores)
        points += [100 * (score - mean) for score in scores]
    return points


def figure_7(sources):
    """How far scores lie from their mean over masking rates and seeds.

    It shows two groups of models: MLM throughout, and CLM whose decay alone is in MLM. The paper
    published no numbers for the second group and no single seeds, so its row has one mean per
    masking rate of the first.
    """
    spread = Spread()
    for source in sources:
        groups = sections(source.names)
        candidates = {name: recipes.parse(name) for name in groups["base"] + groups["others"]}
        decays = [name for name, recipe in candidates.items() if is_clm_then_mlm(recipe)]
        # beside them, models of MLM throughout, of the same sizes (the paper's figure is of 610m)
        sizes = {candidates[name].size for name in decays} or {"610m"}
        throughout = []
        for name, recipe in candidates.items():
            is_plain_mlm = re.fullmatch(r"mlm\d+", first_objective(recipe)) is not None
            if is_plain_mlm and len(recipe.stages) == 1 and recipe.size in sizes:
                throughout.append(name)
        for label, names in (("MLM throughout", throughout), ("CLM, its decay in MLM", decays)):
            if len(names) > 1:
                for family, column in columns_of(source):
                    scores = scores_of_models(source, names, column)
                    spread.add(source, family, column, label, scores)
    return spread.draw() if sources[0] in spread.scores else None


def scores_of_models(source, names, column):
    """Scores of some models on one task: a study's selected trials, or the paper's means."""
    if source.is_paper:
        published = [source.score(name, [column], "paper") for name in names]
        return [score.mean for score in published if score is not None]
    scores = []
    for name in names:
        for rows in source.rows[name, column].values():
            selection = select_trials(rows, "paper")
            if selection is not None:
                scores += [100 * row["test"]["score"] for row in selection.rows]
    return scores


# ---- Figure 12: losses of a study

def figure_12(sources):
    """Losses of pretraining and its continuation, a panel per length of the continuation.

    Training losses (thin) are of each phase's own objective, validation losses of MLM.
    """
    curves = continuation_curves(sources)
    # the paper published no losses, so only a study has curves
    if not curves:
        return None
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.8), layout="constrained",
                                squeeze=False)
    for axis, added in zip(axes[0], sorted(curves)):
        mlm_first = sorted(curves[added], reverse=True)
        for start in mlm_first:
            curve = curves[added][start]
            look = LOOK[start]
            name = f"{start.upper()}, then MLM"
            # a thin line of training losses, a thick one with markers of validation losses
            steps = [point[0] for point in curve["train"]]
            losses = [point[1] for point in curve["train"]]
            axis.plot(steps, losses, color=look["color"], ls=look["ls"], lw=0.8, alpha=0.5,
                      label=f"{name}: training, own objective")
            if curve["validation"]:
                steps, losses = zip(*curve["validation"])
                axis.plot(steps, losses, **look, ms=3.5, lw=1.5, label=f"{name}: validation, MLM")
        title = f"{recipes.steps_in_words(added)} steps more (the paper's count)"
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("training steps", fontsize=9)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("loss, nats a target", fontsize=10)
    add_legend(figure, ncols=2)
    return figure


def continuation_curves(sources):
    """The loss curves of continued pretraining: {steps added: {"clm" or "mlm": curve}}

    "clm" or "mlm" is what a model started from. Where there are several pretraining seeds, or
    sizes, the first name in alphabetical order counts.
    """
    curves = defaultdict(dict)
    for source in sources:
        if source.is_paper:
            continue
        for name, facts in sorted(source.study.models.items()):
            recipe = recipes.parse(name)
            curve = facts.get("curve", {})
            start = without_rate(first_objective(recipe))
            if is_continued_with_mlm(recipe) and start in LOOK and curve.get("train"):
                curves[recipe.steps - recipe.start].setdefault(start, curve)
    return curves


FIGURES = {"fig02_objectives_by_size": figure_2,
           "fig03_masking_rate": MaskingRateFigure(),
           "fig04_steps": EfficiencyFigure("steps"),
           "fig04_tokens": EfficiencyFigure("tokens"),
           "fig04_targets": EfficiencyFigure("targets"),
           "fig10_flops": EfficiencyFigure("flops"),
           "fig05_learning_rates": figure_5,
           "fig06_share_of_clm": ShareFigure(),
           "fig07_masking_after_clm": figure_7,
           "fig08_continued_bars": figure_8,
           "fig09_continued_steps": ContinuedFigure(),
           "fig12_losses": figure_12}
