"""What the figures share: colours, panels, legends, bars and lines.

Each source (StudyResults, PaperResults) gets a row of panels of its own, a panel per family of
tasks. Error bars are 95 % intervals. Dots are the values that an interval of a study is over. An
axis is fitted to means and dots: an interval that is much wider runs out of its panel.
"""
import math
import textwrap
from dataclasses import dataclass
from functools import cache

import matplotlib
import matplotlib.pyplot as plt
from matplotlib import font_manager

from core import files
from reporting.scores import Score

# pictures look the same for everybody, whatever a user's own matplotlibrc says
matplotlib.rcdefaults()

# the paper's colours for its two objectives, and one for both together
MLM_BLUE = "#1f5fbf"
CLM_RED = "#c0392b"
BOTH_PURPLE = "#7d3c98"

STUDY_RULE = "standard"         # the rule of a study's scores; the paper's are shown as published
METRICS = {"SC": "accuracy", "TC": "F1", "QA": "F1", "IR": "NDCG@10"}


# ---- names in figures

def as_plain_text(name):
    """A name, changed so that matplotlib shows it as it is.

    Unchanged, dollar signs would be read as formulas, and a label that begins with an underscore
    would be left out of the legend.
    """
    name = files.printable(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


# fonts of matplotlib that show boxes or other signs in the places of characters
STAND_INS = ("Last Resort", "STIXNonUnicode", "cm")


def fonts_for(text):
    """The names of installed fonts that have the characters which matplotlib's own font lacks.

    -> names, the characters that no font has
    """
    missing = set(text) - characters_of(font_manager.findfont("DejaVu Sans"))
    names = []
    if missing:
        # regular fonts before bold ones
        fonts = font_manager.fontManager.ttflist
        for font in sorted(fonts, key=lambda font: (font.weight != 400, font.name)):
            if not font.name.startswith(STAND_INS) and missing & characters_of(font.fname):
                names.append(font.name)
                missing -= characters_of(font.fname)
    return names, "".join(sorted(missing))


@cache
def characters_of(path):
    """The characters that a font has, as a set."""
    try:
        return {chr(code) for code in font_manager.get_font(path).get_charmap()}
    except (OSError, RuntimeError):
        return set()


# ---- panels, legends and axes

@dataclass
class Panel:
    """One family of tasks of one source."""
    source: object          # StudyResults or PaperResults
    family: str
    columns: list           # the tasks that its scores are means of
    axis: plt.Axes

    def score(self, name):
        """A model's Score over the panel's tasks, or None."""
        rule = "paper" if self.source.is_paper else STUDY_RULE
        return self.source.score(name, self.columns, rule)


def families_of(sources):
    """The families of tasks that any of these sources has: the paper's four, then a fork's own."""
    families = {}           # a dict keeps the order
    for source in sources:
        families |= dict.fromkeys(source.columns)
    return list(families)


def make_axes(n_rows, n_columns):
    """A figure of empty panels. -> figure, axes [rows, columns]"""
    size = (3.0 * n_columns, 0.6 + 3.0 * n_rows)
    return plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False)


def make_panels(models):
    """A figure with a row of empty panels per source, a panel per family of tasks.

    models: {source: names of the models to compare} -> figure, the Panels with something to show
    """
    families = families_of(models)
    figure, axes = make_axes(len(models), len(families))
    panels = []
    for (source, names), row in zip(models.items(), axes):
        for family, axis in zip(families, row):
            columns = source.common_columns(names, family)
            if source.is_paper:
                title = f"{family}, {METRICS.get(family, 'score')}"
            else:
                title = f"{family}: {', '.join(columns)}"
            axis.set_title(textwrap.fill(as_plain_text(title), 30), fontsize=10)
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=9)
            if columns:
                panels.append(Panel(source, family, columns, axis))
            else:
                axis.text(0.5, 0.5, "no rows", transform=axis.transAxes, ha="center", color="grey")
                axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{as_plain_text(source.label)}\nscore, %", fontsize=10)
    return figure, panels


def add_legend(figure, order=(), ncols=5):
    """One legend for all panels, above them. order: labels that come first, in this order"""
    handles = dict.fromkeys(order)          # {label: handle, None until one is found}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            if handles.get(label) is None:
                handles[label] = handle
    handles = {label: handle for label, handle in handles.items() if handle}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center",
                      ncols=min(ncols, len(handles)), fontsize=10, frameon=False)


def error_bar(score):
    """Half the height of a score's error bar; 0 where none is drawn.

    The t interval of two values is ± nine of their standard deviations. Their two dots say more.
    """
    if math.isnan(score.half_width) or score.n < 3:
        return 0
    return score.half_width


def fit_axis(axis, scores, below=0.12, above=0.15):
    """Fit the y axis to all means and dots, and to error bars that are not much wider.

    below, above: room to leave, as a share of the range of means and dots
    """
    points = []
    ends = []
    for score in scores:
        points += [score.mean, *score.values]
        ends += [score.mean - error_bar(score), score.mean + error_bar(score)]
    span = max(max(points) - min(points), 0.5)
    # an error bar may reach half the range beyond the lowest and the highest point
    low = max(min(ends), min(points) - 0.5 * span)
    high = min(max(ends), max(points) + 0.5 * span)
    axis.set_ylim(min(low, min(points)) - below * span, max(high, max(points)) + above * span)


# ---- bars

@dataclass
class Bar:
    label: str
    score: Score | None
    colour: str
    hatch: str = ""


def draw_bars(axis, groups):
    """Groups of bars with error bars and dots. groups: {title: list of Bar}

    The axis does not begin at 0, so every bar shows its value as a number.
    """
    scores = []
    for group in groups.values():
        scores += [bar.score for bar in group if bar.score]
    fit_axis(axis, scores, below=0.45, above=0.3)
    for i, group in enumerate(groups.values()):
        width = 0.8 / len(group)
        for k, bar in enumerate(group):
            if bar.score:
                x = i - 0.4 + (k + 0.5) * width
                draw_bar(axis, bar, x, width)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.grid(False, axis="x")


def draw_bar(axis, bar, x, width):
    score = bar.score
    half_height = error_bar(score)
    axis.bar(x, score.mean, 0.92 * width, color=bar.colour, hatch=bar.hatch, edgecolor="white",
             label=bar.label)
    capsize = 3 if half_height else 0
    axis.errorbar(x, score.mean, yerr=half_height, color="black", capsize=capsize, lw=1)
    bottom = axis.get_ylim()[0]
    axis.annotate(f"{score.mean:.1f}", (x, bottom), xytext=(0, 3), textcoords="offset points",
                  ha="center", fontsize=8, bbox=dict(fc="white", ec="none", pad=0.6))
    axis.scatter([x] * len(score.values), score.values, s=9, color="black", zorder=3)


# ---- lines

@dataclass
class Line:
    """How a line of models is drawn."""
    label: str
    style: dict         # of matplotlib: color, marker, ls


def draw_line(axis, points, line):
    """Means with error bars and dots. points: [(x, Score), ...], sorted by x"""
    xs = [x for x, _ in points]
    means = [score.mean for _, score in points]
    half_heights = [error_bar(score) for _, score in points]
    axis.errorbar(xs, means, yerr=half_heights, label=line.label, ms=5, lw=1.6, capsize=3,
                  elinewidth=1, **line.style)
    for x, score in points:
        axis.scatter([x] * len(score.values), score.values, s=8, color=line.style["color"],
                     alpha=0.45, zorder=3)
