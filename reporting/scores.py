"""Scores with their intervals, ours and the paper's, and which models belong in one table.

Two sources answer the same questions, `Ours` (rows of trials) and `Paper` (results/paper.csv): which models there are, what a model
scored on a task or family of tasks, and how many steps, tokens, supervised tokens and FLOPs it was trained for. Scores are in
percent. Only report.py and the other report_*.py import this file.
"""
import csv
import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from core.configurator import UserError
from experiments import recipes
from tasks import metrics

FAMILIES = {"sequence": "SC", "token": "TC", "span": "QA", "retrieval": "IR"}       # a row's kind -> the paper's family
IN_WORDS = {"SC": "sequence classification", "TC": "token classification", "QA": "question answering", "IR": "retrieval"}
DATASETS = {"sst2": "SST-2", "qqp": "QQP", "mnli": "MNLI", "ontonotes5": "OntoNotes", "conll2003": "CoNLL", "uner": "UNER",
            "squad": "SQuAD", "squad_v2": "SQuADv2", "record": "ReCoRD", "nq": "NQ", "msmarco": "MSMARCO", "mldr_en": "MLDR"}
COLUMNS = "experiment,model,family,dataset,mean,ci95"       # of results/paper.csv
AXES = {"steps": "training steps", "tokens": "training tokens", "targets": "supervised tokens", "flops": "training FLOPs"}
MLM, CLM = "mlm40", "clm"                               # the paper's pair of objectives

# the paper's runs (its Table 1): tokens of a step, and GFLOPs a token, forward and backward, of the blocks' matrix products, of the
# LM head at every position and of full attention in sequences of 12 to 2,048 tokens (a token's mean sequence has 1,365)
PAPER_STEP = 2_359_296
PAPER_GFLOPS = {"210m": (0.680, 0.591, 0.151), "610m": (2.761, 0.887, 0.491), "1b": (5.797, 1.330, 0.793)}


# ---- scores

def interval(values, rule):
    """Half the width of a 95 % interval of the mean. "paper": 1.96 s / sqrt(n); "standard": t(0.975, n - 1) s / sqrt(n); s has
    ddof 1. NaN for a single value."""
    n = len(values)
    quantile = 1.96 if rule == "paper" else stats.t.ppf(0.975, n - 1)
    return float(quantile * np.std(values, ddof=1) / n ** 0.5) if n > 1 else float("nan")


def select(rows, rule):
    """Choose learning rates on validation scores and estimate the test score. rows: one model's and task's.

    "paper":    each seed takes the LR of its own best validation score; mean of the test scores +- 1.96 s / sqrt(n). This is how
                the published tables came about (their figures follow from the official rows). 1.96 is a normal quantile: with
                five seeds such an interval covers the true mean in 88 of 100 cases, and choosing per seed is optimistic.
    "standard": one LR, of the best mean validation score among those with the most seeds; +- t(0.975, n - 1) s / sqrt(n).
    Failed trials have no score and are never chosen.
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
    scores = [r["test"]["score"] for r in chosen]
    return {"mean": float(np.mean(scores)), "half_width": interval(scores, rule), "lrs": [r["lr"] for r in chosen],
            "n": len(chosen), "rows": chosen}


@dataclass
class Score:
    """A mean in percent and half its interval. over: of which seeds the interval and the n values are."""
    mean: float
    half_width: float
    n: int
    over: str                       # "pretraining", "fine-tuning" or "published"
    values: tuple = ()
    fine: tuple = ()                # fine-tuning seeds of a task's selected trials: fewest, most


def task_of(row):
    """The task and, in retrieval, the pool of documents that was searched: another pool is another task."""
    return f"{row['task']}, {row['pool']} pool" if row.get("pool") else row["task"]


def column_of(row):
    """A study's column: the task, its pool, and what else makes its scores another thing. Such rows are never averaged together."""
    unusual = [f"{row['mode']} mode"] if row.get("mode", "standard") != "standard" else []
    unusual += ["causal"] if row.get("causal") else []
    unusual += [f"{row['split']} split"] if row.get("split", "hash") != "hash" else []
    return task_of(row) + f" ({', '.join(unusual)})" * bool(unusual)


def one_seed(name):
    """A model's name without its pretraining seed, and that seed."""
    recipe = recipes.parse(name)
    return replace(recipe, seed=recipes.SEED).name, recipe.seed


class Ours:
    """Scores of a study's rows. Raises UserError for a row of no known kind."""
    what = "ours"

    def __init__(self, study):
        self.study, self.label = study, f"ours, plan {study.plan}"
        self.rows, self.columns, found = defaultdict(lambda: defaultdict(list)), defaultdict(dict), {}
        for row in study.trials:
            if row.get("name"):
                if row.get("kind") not in FAMILIES:
                    raise UserError(f"{row.get('path', row['name'])}: a trial of the kind '{row.get('kind')}', expected one of "
                                    f"{', '.join(FAMILIES)}")
                name, seed = found.setdefault(row["name"], one_seed(row["name"]))
                self.rows[name, column_of(row)][seed].append(row)       # {(name, column): {pretraining seed: rows}}
                self.columns[FAMILIES[row["kind"]]][column_of(row)] = row["task"]
        order = list(DATASETS)
        for family, columns in self.columns.items():
            self.columns[family] = dict(sorted(columns.items(), key=lambda c: (order.index(c[1]) if c[1] in order else 99, c[0])))
        self.seeds = defaultdict(set)       # of pretraining, of every model of the plan, with trials or without
        for full in study.models:
            name, seed = one_seed(full)
            self.seeds[name].add(seed)
        self.names = sorted(self.seeds, key=order_of)

    def losses(self, name, objective):
        """A model's validation losses, one a pretraining seed that has one, in nats."""
        facts = [facts.get("validation") or {} for full, facts in self.study.models.items() if one_seed(full)[0] == name]
        return [f[objective] for f in facts if objective in f]

    def common(self, names, family):
        """The family's columns that every one of the models has that have any of them."""
        have = [{c for c in self.columns.get(family, ()) if self.score(name, [c], "paper")} for name in names]
        have = [columns for columns in have if columns]
        return [c for c in self.columns.get(family, ()) if have and all(c in columns for columns in have)]

    def score(self, name, columns, rule):
        """A model's mean over some columns -> Score, or None where one of them has no score.

        With several pretraining seeds that have all columns, each is one value, the mean of its columns' selected test scores,
        and the interval is over these values: that is where runs are independent. With one, it is over the fine-tuning seeds.
        """
        groups = {seed: [select(self.rows[name, c].get(seed, ()), rule) for c in columns]
                  for seed in sorted({s for c in columns for s in self.rows.get((name, c), ())})}
        groups = {seed: found for seed, found in groups.items() if found and all(found)}
        if not groups:
            return None
        counts = [f["n"] for found in groups.values() for f in found]
        fine = min(counts), max(counts)
        if len(groups) > 1:
            values = [100 * float(np.mean([f["mean"] for f in found])) for found in groups.values()]
            return Score(float(np.mean(values)), interval(values, rule), len(values), "pretraining", tuple(values), fine)
        found, = groups.values()
        by_seed = [{r["seed"]: r["test"]["score"] for r in f["rows"]} for f in found]
        both = sorted(set.intersection(*map(set, by_seed)))
        values = [100 * float(np.mean([scores[seed] for scores in by_seed])) for seed in both]
        mean = 100 * float(np.mean([f["mean"] for f in found]))
        return Score(mean, interval(values, rule), len(values), "fine-tuning", tuple(values), fine)

    def x(self, name, axis):
        """Steps, tokens, supervised tokens or FLOPs since the first ancestor began, the mean of the pretraining seeds; or None."""
        found = []
        for seed in self.seeds[name]:
            facts = self.study.models.get(replace(recipes.parse(name), seed=seed).name, {})
            totals, per_step = facts.get("totals") or {}, facts.get("per_step")
            if axis == "steps":
                found += [totals["tokens"] / per_step] if totals.get("tokens") and per_step else []
            elif totals.get(axis):
                found.append(totals[axis])
        return float(np.mean(found)) if found else None

    def rows_of(self, name, column):
        """All rows of a model's pretraining seeds, with the seed."""
        return [(seed, row) for seed, rows in sorted(self.rows.get((name, column), {}).items()) for row in rows]


# ---- the paper's tables

class Paper:
    """The published means and intervals of results/paper.csv: experiment, model, family, dataset, mean, ci95."""
    what, label = "paper", "the paper"

    def __init__(self, path):
        """Raises UserError for a file that is no such table, naming the line."""
        self.cells, self.columns = {}, {family: {} for family in IN_WORDS}
        with open(path, encoding="utf-8", newline="") as f:
            for i, row in enumerate(csv.DictReader(f), start=2):
                try:
                    name = re.sub(r" @(\d+)k$", r"-\g<1>000", row["model"].removesuffix(" (base)"))
                    recipes.parse(name)
                    cell = float(row["mean"]), float(row["ci95"])
                    self.columns[row["family"]][row["dataset"]] = row["dataset"]
                except (KeyError, TypeError, ValueError, UserError):
                    raise UserError(f"{path}, line {i} is no published result: expected the columns {COLUMNS}") from None
                if self.cells.setdefault((name, row["family"], row["dataset"]), cell) != cell:
                    raise UserError(f"{path}, line {i}: {name} has two different results on {row['dataset']} {row['family']}")
        if not self.cells:
            raise UserError(f"{path} holds no published result")
        self.columns = {family: {d: d for d in datasets if d != "average"} for family, datasets in self.columns.items()}
        self.names = sorted({name for name, *_ in self.cells}, key=order_of)

    def common(self, names, family):
        return list(self.columns[family])

    def score(self, name, columns, rule):
        """As Ours.score. The mean of a family's columns is computed from them, its interval is the published one. Under the rule
        standard the same interval is widened to Student's t for five seeds; the learning rates stay those of the rule paper."""
        family = next(f for f, known in self.columns.items() if columns[0] in known)
        if any((name, family, c) not in self.cells for c in columns):
            return None
        whole = len(columns) > 1 and set(columns) == set(self.columns[family])
        half = self.cells.get((name, family, "average" if whole else columns[0]), (0, math.nan))[1] if whole or len(columns) == 1 \
            else math.nan
        mean = float(np.mean([self.cells[name, family, c][0] for c in columns]))
        return Score(mean, half * (stats.t.ppf(0.975, 4) / 1.96 if rule == "standard" else 1), 5, "published", (), (5, 5))

    def published(self, name, family):
        """The printed average of a family, or None."""
        return self.cells.get((name, family, "average"), (None,))[0]

    def x(self, name, axis):
        """As Ours.x, from the name: the paper's nominal tokens a step; MLM supervises its masking rate's share of them; FLOPs are
        what this repository would run: logits at supervised positions only, half the attention under the causal mask."""
        recipe = recipes.parse(name)
        end, begin, total = recipe.step or recipe.steps, 0, 0.0
        if axis in ("steps", "tokens"):
            return end * (PAPER_STEP if axis == "tokens" else 1)
        for objective, last in recipe.stages:
            tokens = max(0, min(last, end) - begin) * PAPER_STEP
            share = 1.0 if objective == CLM else int(objective[3:]) / 100
            body, head, attention = PAPER_GFLOPS[recipe.size]
            per_token = 1e9 * (body + head * share + attention * (0.5 if objective == CLM else 1.0))
            total, begin = total + tokens * (share if axis == "targets" else per_token), last
        return total


# ---- which models belong together

def size_of(size):
    """A number to sort sizes by."""
    found = re.fullmatch(r"([\d.]+)([mb])", size)
    return float(found[1]) * (1000 if found[2] == "b" else 1) if found else 0.0


def order_of(name):
    """Sort by size, budget, share of CLM, masking rate and step."""
    r = recipes.parse(name)
    budget = (0, r.stages[0][0], r.steps) if r.start else (r.steps, "", 0)       # continuations go by their start
    return size_of(r.size), bool(r.start), *budget, r.clm_share(), r.stages, r.step


def sections(names):
    """{section: names} of the paper's four groups of tables, and what is in none of them; a model may be in several."""
    by_name = {name: recipes.parse(name) for name in sorted(names, key=order_of)}
    known = {n: r for n, r in by_name.items() if all(re.fullmatch(r"clm|mlm\d+", o) for o, _ in r.stages) and not r.turns}
    single = {n: r for n, r in known.items() if len(r.stages) == 1 and not r.step}
    longest = max((r.steps for r in single.values()), default=0)
    two = {n: r for n, r in known.items() if [o[:3] for o, _ in r.stages] == ["clm", "mlm"] and not r.start and not r.step
           and r.steps - r.stages[0][1] > recipes.DECAY}        # a shorter second stage is the decay alone, Figure 7's
    ends = {(r.size, r.steps, o) for r in two.values() for o in (CLM, r.stages[1][0])}
    parents = {r.parent().name for r in known.values() if r.start}
    found = {"base": [n for n, r in single.items() if r.steps == longest],
             "steps": [n for n, r in known.items() if len(r.stages) == 1 and r.step],
             "shares": [n for n, r in known.items() if n in two or n in single and (
                 r.steps < longest or (r.size, r.steps, r.stages[0][0]) in ends)],
             "continued": [n for n, r in known.items() if not r.step and (r.start or n in parents)]}
    return found | {"others": [n for n in by_name if not any(n in part for part in found.values())]}
