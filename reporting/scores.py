"""Scores with their intervals: a study's own and the paper's.

StudyResults (trials of a study) and PaperResults (results/paper.csv) answer the same questions, so
that tables and figures treat both alike: which models there are, what a model scored on a task or
on a family of tasks, and how many steps, tokens, supervised tokens and FLOPs it was trained for.

A model's name here has no pretraining seed: 610m-clm-42k and 610m-clm-42k-seed43 are two runs of
one model. Scores of trials are shares from 0 to 1; a Score is in percent.
"""
import csv
import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import stats

from core.configurator import UserError
from experiments import recipes
from reporting.sections import CLM, order_of
from tasks import metrics, registry

RULES = ("paper", "standard")       # see select_trials
# the paper's families of tasks, and the kinds of trials in them
PUBLISHED_FAMILIES = {"SC": "sequence classification", "TC": "token classification",
                      "QA": "question answering", "IR": "retrieval"}
FAMILY_OF_KIND = {"sequence": "SC", "token": "TC", "span": "QA", "retrieval": "IR"}
# a task of ours -> the paper's name of its data set, in the order of the paper's columns
DATASETS = {"sst2": "SST-2", "qqp": "QQP", "mnli": "MNLI",
            "ontonotes5": "OntoNotes", "conll2003": "CoNLL", "uner": "UNER",
            "squad": "SQuAD", "squad_v2": "SQuADv2", "record": "ReCoRD",
            "nq": "NQ", "msmarco": "MSMARCO", "mldr_en": "MLDR"}
PAPER_COLUMNS = "experiment,model,family,dataset,mean,ci95"       # of results/paper.csv
AXES = {"steps": "training steps", "tokens": "training tokens",
        "targets": "supervised tokens", "flops": "training FLOPs"}

# The paper's runs: tokens of a step (its Table 1; its text says 2,373,120), and by our count GFLOPs
# per token, forward and backward, of the blocks' matrix products, of the LM head at every position,
# and of full attention in sequences of 12 to 2,048 tokens (the mean token is in one of 1,365).
PAPER_TOKENS_PER_STEP = 2_359_296
PAPER_GFLOPS = {"210m": (0.680, 0.591, 0.151),
                "610m": (2.761, 0.887, 0.491),
                "1b": (5.797, 1.330, 0.793)}
PAPER_SEEDS = 5         # fine-tuning seeds behind every published number


# ---- one model on one task

def interval(values, rule):
    """Half the width of a 95 % interval of the mean; NaN for a single value.

    It is 1.96 s / sqrt(n) under the rule "paper", t(0.975, n - 1) s / sqrt(n) under "standard". s
    is the sample standard deviation (ddof 1).
    """
    n = len(values)
    if n < 2:
        return math.nan
    quantile = 1.96 if rule == "paper" else stats.t.ppf(0.975, n - 1)
    return float(quantile * np.std(values, ddof=1) / n ** 0.5)


@dataclass
class Selection:
    """The trials that validation selected, and the test score they estimate (from 0 to 1)."""
    mean: float
    half_width: float       # of the 95 % interval
    rows: list              # the selected trials, one per fine-tuning seed

    @property
    def lrs(self):
        return [row["lr"] for row in self.rows]

    @property
    def n(self):
        return len(self.rows)


def select_trials(rows, rule):
    """Selects learning rates by their validation scores and estimates the test score.

    rows: all trials of one model on one task. Failed trials have no score and are never selected.

    "paper":    Each seed takes the learning rate of its own best validation score. The interval is
                1.96 s / sqrt(n). On MLDR, where the official rows of three models were checked,
                this gives the published numbers exactly. 1.96 is a normal quantile: with five
                seeds, such an interval covers the true mean in 88 of 100 cases, and choosing per
                seed is optimistic.
    "standard": One learning rate, of the best mean validation score among those with the most
                seeds. The interval is t(0.975, n - 1) s / sqrt(n).

    -> Selection, or None if no trial succeeded. Raises UserError if a trial is among the rows twice.
    """
    refuse_repeated(rows)
    succeeded = [row for row in rows if not row["failed"]]
    if not succeeded:
        return None
    if rule == "paper":
        selected = []
        for seed in sorted({row["seed"] for row in succeeded}):
            rows_of_seed = [row for row in succeeded if row["seed"] == seed]
            selected.append(max(rows_of_seed, key=validation_score))
    else:
        by_lr = defaultdict(list)
        for row in succeeded:
            by_lr[row["lr"]].append(row)
        validation_scores = {}
        for lr, rows_of_lr in by_lr.items():
            validation_scores[lr] = [validation_score(row) for row in rows_of_lr]
        selected = by_lr[metrics.best_lr(validation_scores)]
    test_scores = [row["test"]["score"] for row in selected]
    return Selection(float(np.mean(test_scores)), interval(test_scores, rule), selected)


def refuse_repeated(rows):
    """Raises UserError if two rows have the same learning rate and seed: one trial is no sample of two."""
    row_of = {}
    for row in rows:
        trial = row["lr"], row["seed"]
        if trial in row_of:
            first = row_of[trial]
            raise UserError(
                f"{row['task']} was trained twice from {row['model']} with learning rate {row['lr']:g} and "
                f"seed {row['seed']} ({first.get('steps', '?')} and {row.get('steps', '?')} steps): "
                f"{first.get('path', 'one row')} and {row.get('path', 'another')}. "
                "Give only one of the folders"
            )
        row_of[trial] = row


def validation_score(row):
    return row["validation"]["score"]


@dataclass
class Score:
    """A mean in percent, half its interval, and what the interval is over."""
    mean: float
    half_width: float
    n: int                          # number of seeds that the interval is over
    over: str                       # which seeds: "pretraining", "fine-tuning" or "published"
    values: tuple = ()              # one value per seed
    fine_tuned: tuple = ()          # fewest and most fine-tuning seeds of a task's selected trials


# ---- families and columns: what the scores of a table are of

def family_of_kind(kind):
    """The family of a kind of trial, or None for an unknown kind.

    A family that a fork added to tasks/registry.py is called by its kind. It gets tables and panels
    of its own beside the paper's families, and belongs to no claim of the paper.
    """
    if kind in FAMILY_OF_KIND:
        return FAMILY_OF_KIND[kind]
    return kind if kind in registry.FAMILIES else None


def family_in_words(family):
    """"TC" -> "token classification"; a fork's family has its class's title."""
    if family in PUBLISHED_FAMILIES:
        return PUBLISHED_FAMILIES[family]
    return registry.FAMILIES[family].title


def with_remarks(text, remarks):
    """"text (remark, remark)", or the text alone."""
    return f"{text} ({', '.join(remarks)})" if remarks else text


def unusual_settings(row):
    """Remarks on how a trial was run if not as usual: it compares only with trials run alike."""
    remarks = []
    if row.get("mode", "standard") != "standard":
        remarks.append(f"{row['mode']} mode")
    if row.get("causal"):
        remarks.append("causal")
    if row.get("split", "hash") != "hash":
        remarks.append(f"{row['split']} split")
    return remarks


def task_of(row):
    """The task. In retrieval, another pool of searched documents makes it another task."""
    if row.get("pool"):
        return f"{row['task']}, {row['pool']} pool"
    return row["task"]


def column_of(row):
    """The column of a table that a trial belongs to: its task, and what was unusual about it.

    Trials of different columns are never averaged as trials of one task.
    """
    return with_remarks(task_of(row), unusual_settings(row))


def in_paper_order(columns):
    """{column: task}, sorted: the paper's data sets first, in the paper's order."""
    order = list(DATASETS)

    def position(item):
        column, task = item
        place = order.index(task) if task in order else len(order)
        return place, column

    return dict(sorted(columns.items(), key=position))


@cache
def split_seed(name):
    """"610m-clm-42k-seed43" -> ("610m-clm-42k", 43); a name without a seed has the default one."""
    recipe = recipes.parse(name)
    return replace(recipe, seed=recipes.SEED).name, recipe.seed


# ---- a study

class StudyResults:
    """The scores of a study's trials. Raises UserError for a trial of an unknown kind."""
    is_paper = False

    def __init__(self, study):
        self.study = study
        self.label = f"ours, plan {study.plan}"
        # {(model, column): {pretraining seed: rows}}
        self.rows = defaultdict(lambda: defaultdict(list))
        # {family: {column: task}}: the paper's families, then those that a fork added
        self.columns = {family: {} for family in PUBLISHED_FAMILIES}
        for row in study.trials:
            if row.get("name"):
                self.add_trial(row)
        for family, columns in self.columns.items():
            self.columns[family] = in_paper_order(columns)
        # {model: pretraining seeds}, for every model of the study, with trials or without
        self.seeds = defaultdict(set)
        for full_name in study.models:
            name, seed = split_seed(full_name)
            self.seeds[name].add(seed)
        self.names = sorted(self.seeds, key=order_of)

    def add_trial(self, row):
        family = family_of_kind(row.get("kind"))
        if family is None:
            where = row.get("path", row["name"])
            kinds = dict.fromkeys([*FAMILY_OF_KIND, *registry.FAMILIES])
            raise UserError(f"{where}: a trial of the kind '{row.get('kind')}', expected one of "
                            f"{', '.join(kinds)}")
        name, seed = split_seed(row["name"])
        column = column_of(row)
        self.rows[name, column][seed].append(row)
        self.columns.setdefault(family, {})[column] = row["task"]

    def rows_of(self, name, column):
        """All trials of a model in a column: [(pretraining seed, row), ...]"""
        pairs = []
        for seed, rows in sorted(self.rows.get((name, column), {}).items()):
            pairs += [(seed, row) for row in rows]
        return pairs

    def losses(self, name, objective):
        """A model's validation losses in nats, one for each pretraining seed that has one."""
        values = []
        for full_name, facts in self.study.models.items():
            validation = facts.get("validation") or {}
            if split_seed(full_name)[0] == name and objective in validation:
                values.append(validation[objective])
        return values

    def common_columns(self, names, family):
        """The family's columns that all of these models have a score in.

        Models without any score in the family do not count.
        """
        columns = list(self.columns.get(family, ()))
        columns_of_models = []
        for name in names:
            columns_with_score = {c for c in columns if self.score(name, [c], "paper")}
            if columns_with_score:
                columns_of_models.append(columns_with_score)
        if not columns_of_models:
            return []
        shared = set.intersection(*columns_of_models)
        return [column for column in columns if column in shared]

    def score(self, name, columns, rule):
        """A model's mean over some columns: a Score, or None if a column has no score.

        With several pretraining seeds that have all columns, each seed is one value, the mean of
        its columns' selected test scores, and the interval is over these values: that is where runs
        are independent. With one pretraining seed, the interval is over the fine-tuning seeds.
        """
        # the selected trials of every pretraining seed that has all columns
        seeds = set()
        for column in columns:
            seeds |= set(self.rows.get((name, column), ()))
        by_seed = {}                # {pretraining seed: one Selection per column}
        for seed in sorted(seeds):
            selections = [select_trials(self.rows[name, c].get(seed, ()), rule) for c in columns]
            if None not in selections:
                by_seed[seed] = selections
        if not by_seed:
            return None

        # how many fine-tuning seeds they have
        counts = []
        for selections in by_seed.values():
            counts += [selection.n for selection in selections]
        fine_tuned = (min(counts), max(counts))

        # several pretraining seeds: one value each, its mean over columns
        means = []
        for selections in by_seed.values():
            means.append(100 * float(np.mean([selection.mean for selection in selections])))
        if len(means) > 1:
            mean = float(np.mean(means))
            half_width = interval(means, rule)
            return Score(mean, half_width, len(means), "pretraining", tuple(means), fine_tuned)

        # one pretraining seed: one value for each fine-tuning seed
        selections, = by_seed.values()
        values = means_by_fine_tuning_seed(selections)
        half_width = interval(values, rule)
        return Score(means[0], half_width, len(values), "fine-tuning", tuple(values), fine_tuned)

    def amount(self, name, axis):
        """How much a model was trained, counted from its first ancestor's first step.

        axis: "steps", "tokens", "targets" (supervised tokens), "flops" or "seconds"
        -> the mean over its pretraining seeds, or None if unknown
        """
        amounts = []
        for seed in self.seeds[name]:
            full_name = replace(recipes.parse(name), seed=seed).name
            facts = self.study.models.get(full_name, {})
            totals = facts.get("totals") or {}
            tokens_per_step = facts.get("per_step")
            if axis != "steps":
                amount = totals.get(axis)
            elif totals.get("tokens") and tokens_per_step:
                amount = totals["tokens"] / tokens_per_step
            else:
                amount = None
            if amount:
                amounts.append(amount)
        return float(np.mean(amounts)) if amounts else None


def means_by_fine_tuning_seed(selections):
    """The mean over tasks in percent, for each fine-tuning seed that all of them have.

    selections: one per task
    """
    scores_of_tasks = []
    for selection in selections:
        scores_of_tasks.append({row["seed"]: row["test"]["score"] for row in selection.rows})
    shared_seeds = set.intersection(*map(set, scores_of_tasks))
    means = []
    for seed in sorted(shared_seeds):
        means.append(100 * float(np.mean([scores[seed] for scores in scores_of_tasks])))
    return means


# ---- the paper's tables

@dataclass(frozen=True)
class Published:
    """A published mean in percent and half its 95 % interval."""
    mean: float
    half_width: float


class PaperResults:
    """The published results of results/paper.csv: experiment, model, family, dataset, mean, ci95.

    Raises UserError, naming the line, for a file that is not such a table.
    """
    is_paper = True
    label = "the paper"

    def __init__(self, path):
        # {(model, family, data set): Published}
        self.cells = {}
        # {family: {column: data set}}
        self.columns = {family: {} for family in PUBLISHED_FAMILIES}
        number = 1
        try:
            with open(path, encoding="utf-8-sig", newline="") as f:
                for number, row in enumerate(csv.DictReader(f), start=2):
                    self.add_line(row, f"{path}, line {number}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read after line {number}: {error}") from None
        if not self.cells:
            raise UserError(f"{path} holds no published result")
        self.names = sorted({name for name, _, _ in self.cells}, key=order_of)

    def add_line(self, row, where):
        try:
            # names as experiments/recipes.py writes them: "610m-clm-42k @5k" is its
            # 610m-clm-42k-5000, and "610m-clm-42k (base)" its 610m-clm-42k
            name = re.sub(r" @(\d+)k$", r"-\g<1>000", row["model"].removesuffix(" (base)"))
            recipes.parse(name)
            family = row["family"]
            dataset = row["dataset"]
            cell = Published(float(row["mean"]), float(row["ci95"]))
            columns = self.columns[family]
            if not dataset or not math.isfinite(cell.mean) or not math.isfinite(cell.half_width):
                raise ValueError(dataset)
        except (KeyError, AttributeError, TypeError, ValueError, UserError):
            raise UserError(f"{where} is not a published result: expected the columns "
                            f"{PAPER_COLUMNS}") from None
        if dataset != "average":
            columns[dataset] = dataset
        if self.cells.setdefault((name, family, dataset), cell) != cell:
            raise UserError(f"{where}: {name} has two different results on {dataset} {family}")

    def common_columns(self, _names, family):
        """As StudyResults.common_columns: every published model has all columns of a family."""
        return list(self.columns.get(family, ()))

    def score(self, name, columns, rule):
        """As StudyResults.score, from the published numbers.

        The mean of a family's columns is computed from them; its interval is the published one.
        Under the rule "standard" the same interval is widened to Student's t for five seeds; the
        learning rates stay those that the rule "paper" selected.
        """
        if not columns:
            return None
        family = next(family for family, datasets in self.columns.items() if columns[0] in datasets)
        if any((name, family, column) not in self.cells for column in columns):
            return None
        mean = float(np.mean([self.cells[name, family, column].mean for column in columns]))
        # the published interval: of one data set, or of the average of all of a family
        cell = None
        if len(columns) == 1:
            cell = self.cells[name, family, columns[0]]
        elif set(columns) == set(self.columns[family]):
            cell = self.cells.get((name, family, "average"))
        half_width = cell.half_width if cell else math.nan
        if rule == "standard":
            half_width *= stats.t.ppf(0.975, PAPER_SEEDS - 1) / 1.96
        return Score(mean, half_width, PAPER_SEEDS, "published", (), (PAPER_SEEDS, PAPER_SEEDS))

    def printed_average(self, name, family):
        """The average of a family as the paper printed it, or None."""
        cell = self.cells.get((name, family, "average"))
        return cell.mean if cell else None

    def amount(self, name, axis):
        """As StudyResults.amount, computed from the name and the paper's nominal tokens per step.

        MLM supervises its masking rate's share of the tokens. FLOPs are what this repository would
        run: logits at supervised positions only, and half the attention under the causal mask. The
        paper counts them by another formula.
        """
        recipe = recipes.parse(name)
        last_step = recipe.step or recipe.steps
        if axis == "steps":
            return last_step
        if axis == "tokens":
            return last_step * PAPER_TOKENS_PER_STEP
        if recipe.size not in PAPER_GFLOPS:
            return None
        body, head, attention = PAPER_GFLOPS[recipe.size]
        total = 0.0
        begin = 0
        for objective, end in recipe.stages:
            # an intermediate checkpoint ends inside a stage, or before it
            steps = max(0, min(end, last_step) - begin)
            tokens = steps * PAPER_TOKENS_PER_STEP
            is_clm = objective == CLM
            supervised_share = 1.0 if is_clm else int(objective[3:]) / 100
            if axis == "targets":
                per_token = supervised_share
            else:
                attention_share = 0.5 if is_clm else 1.0
                per_token = 1e9 * (body + head * supervised_share + attention * attention_share)
            total += tokens * per_token
            begin = end
        return total
