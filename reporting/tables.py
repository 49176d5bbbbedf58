"""The tables of a report, as Markdown."""
import math
from collections import Counter, defaultdict

import numpy as np
from scipy import stats

from core.files import as_markdown
from reporting.scores import (
    DATASETS,
    RULES,
    interval,
    select_trials,
    task_of,
    unusual_settings,
    with_remarks,
)

NOTHING = "–"           # an en dash, in a cell without a value
RANKING_SCORES = {"ndcg_10": "NDCG@10", "paper_ndcg_10": "the paper's NDCG@10",
                  "mrr_10": "MRR@10", "recall_100": "Recall@100"}


def table_line(cells):
    return f"| {' | '.join(map(str, cells))} |"


def markdown(header, lines):
    """A whole table. header: the titles of its columns; lines: lists of cells"""
    separator = ["---"] * len(header)
    return "\n".join(table_line(cells) for cells in [header, separator, *lines]) + "\n"


def lr_in_words(lr):
    """5e-04, or 1.5e-03 where one digit is not enough."""
    for text in (f"{lr:.0e}", f"{lr:.1e}"):
        if float(text) == lr:
            return text
    return f"{lr:g}"


# ---- runs

def phases_in_words(phases):
    return ", ".join(f"{steps:,} {objective}" for objective, steps in phases)


def run_table(runs):
    """Each run's phases, tokens and seconds of training (its trunk's included), and last losses."""
    lines = ["| run | steps | tokens | training seconds "
             "| validation CLM loss | validation MLM loss |",
             "|---|---|---|---|---|---|"]
    best = min(run["validation"][-1]["val_mlm_loss"] for run in runs)
    for run in runs:
        last = run["validation"][-1]
        mlm_loss = f"{last['val_mlm_loss']:.4f}"
        if last["val_mlm_loss"] == best and len(runs) > 1:
            mlm_loss = f"**{mlm_loss}**"
        lines.append(table_line([
            as_markdown(run["name"]),
            phases_in_words(run["settings"]["phases"]),
            f"{last['tokens']:,}",
            f"{last['seconds']:,.0f}",
            f"{last['val_clm_loss']:.4f}",
            mlm_loss]))
    return "\n".join(lines) + "\n"


# ---- trials that belong to no study

def selection_in_words(selection, lrs):
    """53.16 ± 0.42 (5e-05 x 3, 1e-04 x 2†)

    In parentheses are the selected learning rates, and for how many seeds each was selected. The
    dagger marks an edge of the grid `lrs`, beyond which a better one may lie.
    """
    if selection is None:
        return "no trial succeeded"
    edges = {min(lrs), max(lrs)} if len(lrs) > 1 else set()
    selected_lrs = []
    for lr, count in sorted(Counter(selection.lrs).items()):
        text = lr_in_words(lr)
        if count > 1:
            text += f" x {count}"
        if lr in edges:
            text += "†"
        selected_lrs.append(text)
    score = f"{100 * selection.mean:.2f}"
    if not math.isnan(selection.half_width):
        score += f" ± {100 * selection.half_width:.2f}"
    return f"{score} ({', '.join(selected_lrs)})"


def model_of(row):
    """The model, and how it was fine-tuned if not as usual: such trials are never mixed."""
    remarks = unusual_settings(row)
    if row.get("param_dtype", "float32") != "float32":
        remarks.append(f"{row['param_dtype']} weights")
    if row.get("train_on", row["task"]) != row["task"]:
        remarks.append(f"trained on {row['train_on']}")
    return with_remarks(row["model"], remarks)


def grouped_by_task_and_model(rows):
    """[((task, model), its rows), ...], sorted by task and model"""
    groups = defaultdict(list)
    for row in rows:
        groups[task_of(row), model_of(row)].append(row)
    return sorted(groups.items())


def trial_table(rows):
    """A line per task and model, with both rules side by side.

    The grid of a task: all learning rates and all seeds that any trial of it has. The last column
    counts the trials that a model lacks of that grid.
    """
    lines = ["| task | model "
             "| rule paper: test ± 1.96 s/√n (LR) | rule standard: test ± t s/√n (LR) "
             "| baseline | seeds | failed | missing |",
             "|---|---|---|---|---|---|---|---|"]
    lrs = defaultdict(set)              # {task: learning rates of its grid}
    seeds = defaultdict(set)            # {task: seeds of its grid}
    for row in rows:
        lrs[task_of(row)].add(row["lr"])
        seeds[task_of(row)].add(row["seed"])

    for (task, model), group in grouped_by_task_and_model(rows):
        trials = {(row["lr"], row["seed"]) for row in group}
        n_missing = len(lrs[task]) * len(seeds[task]) - len(trials)
        # the estimate under each rule, and the learning rates it selects
        by_rule = [selection_in_words(select_trials(group, rule), lrs[task]) for rule in RULES]
        lines.append(table_line([
            as_markdown(task),
            as_markdown(model),
            *by_rule,
            baseline_in_words(group),
            len({row["seed"] for row in group}),
            sum(row["failed"] for row in group),
            n_missing]))
    return "\n".join(lines) + "\n"


def baseline_in_words(rows):
    """The baseline that trials recorded, as "34.56 (BM25)"; empty if none did."""
    for row in rows:
        if row.get("baseline"):
            name = as_markdown(row["baseline"]["name"])
            return f"{100 * row['baseline']['score']:.2f} ({name})"
    return ""


def retrieval_table(rows):
    """More about the rankings of retrieval trials; empty if there are none.

    Scores are means over the seeds that the rule "standard" selects.
    """
    titles = ["collection, pool", "model", "documents", "queries", *RANKING_SCORES.values()]
    lines = []
    for (task, model), group in grouped_by_task_and_model(rows):
        retrieval_rows = [row for row in group if row.get("kind") == "retrieval"]
        selection = select_trials(retrieval_rows, "standard")
        if selection is None:
            continue
        means = []
        for key in RANKING_SCORES:
            means.append(ranking_score(selection.rows, key))
        first = selection.rows[0]
        lines.append(table_line([
            as_markdown(task),
            as_markdown(model),
            count_in_words(first.get("documents")),
            count_in_words(first["test"].get("n")),
            *means]))
    if not lines:
        return ""
    separator = "|" + "---|" * len(titles)
    return "\n".join([table_line(titles), separator, *lines]) + "\n"


def ranking_score(rows, key):
    """The mean of a score of trials' rankings, in percent, or NOTHING if one lacks it."""
    scores = [row["test"].get(key) for row in rows]
    if not all(isinstance(score, int | float) for score in scores):
        return NOTHING
    return f"{100 * np.mean(scores):.2f}"


def count_in_words(count):
    return f"{count:,}" if isinstance(count, int) else NOTHING


# ---- scores of a study and of the paper

def score_cell(score, of_line=None):
    """52.31 ± 0.42: a Score as a cell, without an interval where there is one value.

    of_line: the Score whose seeds the table's line names. A cell with other seeds says which.
    """
    if score is None:
        return NOTHING
    text = f"{score.mean:.2f}"
    if not math.isnan(score.half_width):
        text += f" ± {score.half_width:.2f}"
    if of_line is not None and (score.n, score.over) != (of_line.n, of_line.over):
        text += f" ({score.n} {score.over})"
    return text


def seeds_in_words(score):
    """Which seeds a study's Score is over."""
    if score is None:
        return ""
    if score.over == "pretraining":
        fewest, most = score.fine_tuned
        each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        return f"{score.n} pretraining ({each} fine-tuning each)"
    return f"{score.n} fine-tuning"


def family_table(source, names, family, paper=None):
    """One family's table of some models: the scores of its tasks, and their mean.

    source: StudyResults or PaperResults; paper: PaperResults to stand beside a study's scores.
    -> text, or "" where no model has a score
    """
    columns = list(source.columns.get(family, ()))
    names_with_scores = []
    for name in names:
        if any(source.score(name, [column], "paper") for column in columns):
            names_with_scores.append(name)
    if not names_with_scores:
        return ""
    if source.is_paper:
        return paper_table(source, names_with_scores, family)
    return study_table(source, names_with_scores, family, paper)


def paper_table(paper, names, family):
    """A line per model of the paper: its score on each data set, and their mean.

    The last column is the same mean with a t interval.
    """
    columns = list(paper.columns[family])
    lines = []
    for name in names:
        line = [name]
        line += [score_cell(paper.score(name, [column], "paper")) for column in columns]
        line.append(f"**{score_cell(paper.score(name, columns, 'paper'))}**")
        line.append(score_cell(paper.score(name, columns, "standard")))
        lines.append(line)
    return markdown(["model", *columns, f"**{family}**", f"{family}, t interval"], lines)


def study_table(results, names, family, paper):
    """A line per model and rule. A model with a name of the paper's has the paper's scores, too."""
    columns = list(results.columns[family])
    common = results.common_columns(names, family)
    published = []                  # the names that the paper has scores of
    if paper is not None and paper.columns.get(family):
        published = [name for name in names if name in paper.names]
    titles = [as_markdown(column) for column in columns]
    header = ["model", "rule", "interval over seeds", *titles, f"**{family}**"]
    # columns for the paper's scores, if it has any
    datasets = []
    if published:
        tasks = results.columns[family].values()
        datasets = [DATASETS[task] for task in tasks if task in DATASETS]
        header += [f"the paper's {dataset}" for dataset in datasets]
        header.append(f"the paper's **{family}**")

    lines = []
    for name in names:
        for rule in RULES:
            mean = results.score(name, common, rule) if common else None
            scores = [results.score(name, [column], rule) for column in columns]
            # the line names the seeds of the mean, or of the first score where there is no mean
            of_line = mean or next(score for score in scores if score)
            line = [name, rule, seeds_in_words(of_line)]
            line += [score_cell(score, of_line) for score in scores]
            line.append(f"**{score_cell(mean)}**")
            if name in published:
                line += [score_cell(paper.score(name, [dataset], rule)) for dataset in datasets]
                whole_family = paper.score(name, list(paper.columns[family]), rule)
                line.append(f"**{score_cell(whole_family)}**")
            elif published:
                line += [""] * (len(datasets) + 1)
            lines.append(line)
    return markdown(header, lines) + "\n" + what_the_mean_is(family, columns, common)


def what_the_mean_is(family, columns, common):
    """The sentence below a table: which columns its means are over, and which are left out."""
    averaged = ", ".join(map(as_markdown, common))
    averaged = averaged or "nothing: no task is common to all models of this table"
    sentence = f"{family} is the mean of {averaged}"
    left_out = [as_markdown(column) for column in columns if column not in common]
    if left_out:
        sentence += (" (left out, because not every model here has it: "
                     f"{', '.join(left_out)})")
    return sentence + ".\n"


# ---- what was trained, and learning rates

def models_table(results):
    """What each model was trained for, counted from its first ancestor's first step.

    Numbers are means over its pretraining seeds.
    """
    header = ["model", "pretraining seeds", "steps", "tokens", "supervised tokens", "FLOPs",
              "seconds", "validation MLM loss", "validation CLM loss"]
    lines = []
    for name in results.names:
        line = [name, ", ".join(map(str, sorted(results.seeds[name])))]
        for axis in ("steps", "tokens", "targets", "flops", "seconds"):
            line.append(amount_in_words(results.amount(name, axis), axis))
        for objective in ("mlm", "clm"):
            line.append(loss_in_words(results.losses(name, objective)))
        lines.append(line)
    return markdown(header, lines)


def amount_in_words(amount, axis):
    if amount is None:
        return NOTHING
    return f"{amount:.3g}" if axis == "flops" else f"{amount:,.0f}"


def loss_in_words(values):
    """Mean and t interval of validation losses, one per pretraining seed."""
    if not values:
        return NOTHING
    text = f"{sum(values) / len(values):.3f}"
    if len(values) > 1:
        text += f" ± {interval(values, 'standard'):.3f}"
    return text


def lr_tables(results):
    """A table per family: test scores at each learning rate, their spread, and failed trials.

    Scores are means over all seeds and over the tasks that all models have.
    """
    texts = []
    for family, all_columns in results.columns.items():
        columns = results.common_columns(results.names, family)
        if all_columns and not columns:
            texts.append(f"**{family}**: no task is common to all models that have any.\n")
        table = lr_table(results, columns)
        if table:
            tasks = ", ".join(map(as_markdown, columns))
            texts.append(f"**{family}** ({tasks})\n\n{table}")
    return "\n".join(texts)


def lr_table(results, columns):
    """One table of lr_tables, "" where no model has a score at any learning rate.

    columns: the tasks that its scores are means of
    """
    trials = {}             # {model: [the trials of a task, for each task]}
    lrs = set()
    for name in results.names:
        trials[name] = []
        for column in columns:
            rows = [row for _, row in results.rows_of(name, column)]
            trials[name].append(rows)
            lrs |= {row["lr"] for row in rows}

    # a line per model, with NOTHING at a learning rate that one of its tasks lacks
    lines = []
    for name, trials_of_tasks in trials.items():
        means = [mean_at_lr(trials_of_tasks, lr) for lr in sorted(lrs)]
        scores = [mean for mean in means if mean is not None]
        if not scores:
            continue
        spread = f"{max(scores) - min(scores):.2f}"
        deviation = f"{np.std(scores, ddof=1):.2f}" if len(scores) > 1 else NOTHING
        n_failed = 0
        for rows in trials_of_tasks:
            n_failed += sum(row["failed"] for row in rows)
        cells = [NOTHING if mean is None else f"{mean:.2f}" for mean in means]
        lines.append([name, *cells, spread, deviation, n_failed])
    if not lines:
        return ""
    titles_of_lrs = [lr_in_words(lr) for lr in sorted(lrs)]
    header = ["model", *titles_of_lrs, "best - worst", "standard deviation", "failed"]
    return markdown(header, lines)


def mean_at_lr(trials_of_tasks, lr):
    """The mean test score at one learning rate, in percent; None if a task has none."""
    means = []
    for rows in trials_of_tasks:
        scores = []
        for row in rows:
            if row["lr"] == lr and not row["failed"]:
                scores.append(100 * row["test"]["score"])
        if not scores:
            return None
        means.append(np.mean(scores))
    return float(np.mean(means)) if means else None


# ---- two numbers that the page quotes

def coverage(n):
    """In how many of 100 cases 1.96 s / sqrt(n) covers the true mean of n normal values."""
    return 100 * (2 * stats.t.cdf(1.96, n - 1) - 1)


def largest_deviation(paper):
    """How far a family's mean over its data sets is from the printed average, at most."""
    deviations = []
    for name in paper.names:
        for family, columns in paper.columns.items():
            printed = paper.printed_average(name, family)
            score = paper.score(name, list(columns), "paper")
            if printed is not None and score is not None:
                deviations.append(abs(score.mean - printed))
    return max(deviations, default=0.0)
