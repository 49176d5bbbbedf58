"""A report's tables and warnings, as Markdown. Only report.py imports this file."""
import math
from collections import Counter, defaultdict

import numpy as np
from scipy import stats

from core.files import table_cell
from reporting.scores import DATASETS, IN_WORDS, column_of, interval, select_trials, split_seed, task_of
from reporting.sections import sections

RULES = ("paper", "standard")
SECTIONS = {    # heading, number of the paper's first table, its figures
    "base": ("Objective, masking rate and size", 2, ("fig02_objectives_by_size", "fig03_masking_rate", "fig05_learning_rates")),
    "steps": ("Data efficiency", 6, ("fig04_steps", "fig04_tokens", "fig04_targets", "fig10_flops")),
    "shares": ("Two stages under a fixed budget", 10, ("fig06_share_of_clm", "fig07_masking_after_clm")),
    "continued": ("Continued pretraining", 14, ("fig08_continued_bars", "fig09_continued_steps", "fig12_losses")),
    "others": ("Beyond the paper's tables", 0, ())}


# ---- runs, and trials of no study

def phases_in_words(phases):
    return ", ".join(f"{steps:,} {objective}" for objective, steps in phases)


def run_table(runs):
    """Markdown: the last validation of each run, its tokens, and the seconds it trained (a trunk's included)."""
    lines = ["| run | steps | tokens | training seconds | validation CLM loss | validation MLM loss |", "|---|---|---|---|---|---|"]
    best = min(r["validation"][-1]["val_mlm_loss"] for r in runs)
    for r in runs:
        v = r["validation"][-1]
        mark = "**" if v["val_mlm_loss"] == best and len(runs) > 1 else ""
        lines.append(f"| {table_cell(r['name'])} | {phases_in_words(r['settings']['phases'])} | {v['tokens']:,} "
                     f"| {v['seconds']:,.0f} | {v['val_clm_loss']:.4f} | {mark}{v['val_mlm_loss']:.4f}{mark} |")
    return "\n".join(lines) + "\n"


def in_words(found, lrs):
    """53.16 ± 0.42 (5e-05 x 3, 1e-04 x 2†); the dagger marks an edge of the grid, where a better LR may lie outside."""
    if found is None:
        return "no trial succeeded"
    edge = {min(lrs), max(lrs)} if len(lrs) > 1 else set()
    chosen = ", ".join(f"{lr_in_words(lr)}{f' x {k}' if k > 1 else ''}{'†' if lr in edge else ''}"
                       for lr, k in sorted(Counter(found.lrs).items()))
    interval = "" if math.isnan(found.half_width) else f" ± {100 * found.half_width:.2f}"
    return f"{100 * found.mean:.2f}{interval} ({chosen})"


def named(row):
    """The model, and how it was fine-tuned where that is not the default: such rows are never mixed."""
    unusual = [row["mode"]] if row.get("mode", "standard") != "standard" else []
    unusual += [f"{row['param_dtype']} weights"] if row.get("param_dtype", "float32") != "float32" else []
    unusual += ["causal"] if row.get("causal") else []
    unusual += [f"{row['split']} split"] if row.get("split", "hash") != "hash" else []
    unusual += [f"trained on {row['train_on']}"] if row.get("train_on", row["task"]) != row["task"] else []
    return row["model"] + f" ({', '.join(unusual)})" * bool(unusual)


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
        by_rule = [in_words(select_trials(group, rule), lrs) for rule in RULES]
        cells = [table_cell(task), table_cell(model), *by_rule, baseline, len({r["seed"] for r in group}),
                 sum(r["failed"] for r in group), missing]
        lines.append(f"| {' | '.join(map(str, cells))} |")
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
        found = select_trials(group, "standard")
        if found is not None:
            means = [f"{100 * np.mean([r['test'][key] for r in found.rows]):.2f}" for key in keys]
            first = found.rows[0]
            lines.append(f"| {table_cell(task)} | {table_cell(model)} | {first['documents']:,} | {first['test']['n']:,} "
                         f"| {' | '.join(means)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


# ---- a study, and the paper

def cell(score, line=None):
    """52.31 ± 0.42, without the interval where there is one value, an en dash where there is none. line: a Score whose seeds the
    table's line names; another number of them is said in the cell."""
    if score is None:
        return "–"
    other = line and (score.n, score.over) != (line.n, line.over)
    return f"{score.mean:.2f}" + ("" if math.isnan(score.half_width) else f" ± {score.half_width:.2f}") + (
        f" ({score.n} {score.over})" if other else "")


def seeds_of(score):
    """What the interval is over."""
    if score is None:
        return ""
    few, many = score.fine
    each = f"{few}" if few == many else f"{few} to {many}"
    return {"pretraining": f"{score.n} pretraining ({each} fine-tuning each)", "published": f"{score.n} fine-tuning",
            "fine-tuning": f"{score.n} fine-tuning"}[score.over]


def markdown(header, lines):
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def table_of(source, names, family, paper=None):
    """One family's table of some models: a line a model and rule, cells of its tasks, their mean; and, where ours stands beside it,
    the paper's cells of the same name. -> text, or "" where no model has a score"""
    columns, common = list(source.columns.get(family, ())), source.common(names, family)
    names = [n for n in names if any(source.score(n, [c], "paper") for c in columns)]
    if not names:
        return ""
    beside = [DATASETS[source.columns[family][c]] for c in columns if source.columns[family][c] in DATASETS] if paper else []
    known = [n for n in names if paper and n in paper.names]
    if source.is_paper:
        whole = {n: [source.score(n, columns, rule) for rule in RULES] for n in names}
        return markdown(["model", *columns, f"**{family}**", f"{family}, t interval"], [
            [n, *(cell(source.score(n, [c], "paper")) for c in columns), f"**{cell(a)}**", cell(b)] for n, (a, b) in whole.items()])
    header = ["model", "rule", "interval over seeds", *columns, f"**{family}**"]
    if known:
        header += [*(f"the paper's {d}" for d in beside), f"the paper's **{family}**"]
    lines = []
    for name in names:
        for rule in RULES:
            whole = source.score(name, common, rule) if common else None
            first = whole or next(filter(None, (source.score(name, [c], rule) for c in columns)))
            line = [name, rule, seeds_of(first), *(cell(source.score(name, [c], rule), first) for c in columns)]
            line.append(f"**{cell(whole)}**")
            if known:
                theirs = name in known
                line += [cell(paper.score(name, [d], rule)) if theirs else "" for d in beside]
                line += [f"**{cell(paper.score(name, list(paper.columns[family]), rule))}**" if theirs else ""]
            lines.append(line)
    left = [c for c in columns if c not in common]
    note = f"\n{family} is the mean of {', '.join(common) or 'nothing: no task is common to all models of this table'}"
    note += f" (left out, because not every model here has it: {', '.join(left)})" if left else ""
    return markdown(header, lines) + note + ".\n"


def coverage(n):
    """In how many of 100 cases an interval of 1.96 s / sqrt(n) covers a normal mean."""
    return 100 * (2 * stats.t.cdf(1.96, n - 1) - 1)


def deviation(paper):
    """How far a family's mean of its data sets is from the printed average, at most."""
    return max(abs(paper.score(n, list(paper.columns[f]), "paper").mean - paper.printed_average(n, f))
               for n in paper.names for f in paper.columns if paper.printed_average(n, f) is not None)


def lr_in_words(lr):
    """5e-04, or 1.5e-03 where one digit does not say it."""
    return f"{lr:.0e}" if float(f"{lr:.0e}") == lr else f"{lr:.1e}" if float(f"{lr:.1e}") == lr else f"{lr:g}"


def models_table(ours):
    """What each model was trained for, the mean of its pretraining seeds, counted from the first ancestor's first step."""
    lines = []
    for name in ours.names:
        x = {axis: ours.amount(name, axis) for axis in ("steps", "tokens", "targets", "flops", "seconds")}
        lines.append([name, ", ".join(map(str, sorted(ours.seeds[name]))),
                      *("–" if x[k] is None else f"{x[k]:.3g}" if k == "flops" else f"{x[k]:,.0f}" for k in x),
                      *(loss_in_words(ours.losses(name, objective)) for objective in ("mlm", "clm"))])
    return markdown(["model", "pretraining seeds", "steps", "tokens", "supervised tokens", "FLOPs", "seconds",
                     "validation MLM loss", "validation CLM loss"], lines)


def loss_in_words(values):
    """Mean and t interval of validation losses by pretraining seed."""
    half = interval(values, "standard") if len(values) > 1 else math.nan
    return f"{sum(values) / len(values):.3f}" + f" ± {half:.3f}" * (half == half) if values else "–"


def lr_table(ours):
    """Test scores at each learning rate, means over seeds and a family's common tasks, their spread, and failed trials."""
    lines = []
    for family in IN_WORDS:
        columns = ours.common(ours.names, family)
        rows = {n: [[r for _, r in ours.rows_of(n, c)] for c in columns] for n in ours.names}
        lrs = sorted({r["lr"] for found in rows.values() for part in found for r in part})
        table = []
        for name, found in rows.items():
            means = []
            for lr in lrs:
                of_tasks = [[100 * r["test"]["score"] for r in part if r["lr"] == lr and not r["failed"]] for part in found]
                means.append(float(np.mean([np.mean(s) for s in of_tasks])) if of_tasks and all(of_tasks) else None)
            there = [m for m in means if m is not None]
            if there:
                table.append([name, *("–" if m is None else f"{m:.2f}" for m in means), f"{max(there) - min(there):.2f}",
                              f"{np.std(there, ddof=1):.2f}" if len(there) > 1 else "–",
                              sum(r["failed"] for part in found for r in part)])
        if ours.columns.get(family) and not columns:
            lines.append(f"**{family}**: no task is common to all models that have any.\n")
        if table:
            lines.append(f"**{family}** ({', '.join(columns)})\n\n" + markdown(
                ["model", *map(lr_in_words, lrs), "best - worst", "standard deviation", "failed"], table))
    return "\n".join(lines)


# ---- warnings

def some(items, most=6):
    items = list(items)
    return "; ".join(items[:most]) + f"; and {len(items) - most} more" * (len(items) > most)


def warnings(study, ours):
    """What a reader should know before any number: a list of sentences."""
    found = list(study.notes)
    rows = [r for r in study.trials if r.get("name")]
    grids, by_model = defaultdict(lambda: (set(), set())), defaultdict(list)
    for r in rows:
        by_model[r["name"], column_of(r)].append(r)
        for values, key in zip(grids[column_of(r)], ("lr", "seed")):
            values.add(r[key])
    tried = list(dict.fromkeys(name for name, _ in by_model))      # not a set: their order should not depend on the process

    missing, edges, failed, fewer, floor = [], [], [], [], []
    for (name, column), group in by_model.items():
        lrs, seeds = grids[column]
        gaps = sorted({(lr, s) for lr in lrs for s in seeds} - {(r["lr"], r["seed"]) for r in group})
        missing += [f"{name} on {column}, {len(gaps)} of {len(lrs) * len(seeds)} (lr {gaps[0][0]:g} seed {gaps[0][1]}"
                    + ", ..." * (len(gaps) > 1) + ")"] if gaps else []
        broken = [r for r in group if r["failed"]]
        rates = ", ".join(f"{lr:g}" for lr in sorted({r["lr"] for r in broken}))
        failed += [f"{name} on {column}, {len(broken)} (lr {rates})"] * bool(broken)
        good = {r["seed"] for r in group if not r["failed"]}
        fewer += [f"{name} on {column}, {len(good)} of {len(seeds)}"] * (len(good) < len(seeds))
        best = select_trials(group, "standard")
        if best and len(lrs) > 1 and best.lrs[0] in (min(lrs), max(lrs)):
            edges.append(f"{name} on {column} ({best.lrs[0]:g})")
        baseline = next((r["baseline"] for r in group if r.get("baseline")), None)
        if best and baseline and best.mean <= baseline["score"]:
            floor.append(f"{name} on {column} ({100 * best.mean:.2f}, {baseline['name']} {100 * baseline['score']:.2f})")
    absent = [f"{name} on {column}" for name in tried for column in grids if (name, column) not in by_model]
    singles = []
    for names in (sections(ours.names).values() if ours else ()):
        counts = {n: len({split_seed(t)[1] for t in tried if split_seed(t)[0] == n}) for n in names}
        most = max(counts.values(), default=0)
        singles += [f"{n}, {k} of {most}" for n, k in counts.items() if 0 < k < most and f"{n}, {k} of {most}" not in singles]
    found += [f"**{what}**: {some(items)}." for what, items in (
        ("No trial yet", [n for n in study.models if n not in tried]), ("No trial of a task that other models have", absent),
        ("Missing trials of the grid that a task's rows span", missing), ("Failed trials", failed),
        ("Fewer fine-tuning seeds than others", fewer), ("Fewer pretraining seeds than others in the same tables", singles),
        ("Best learning rate at an edge of the grid, where a better one may lie outside", edges),
        ("Not above an untrained baseline, so a difference there says little", floor)) if items]
    return found + mixed(rows)


def mixed(rows):
    """Sentences on whatever differs between rows that a table compares."""
    found = []
    alike = {"param_dtype": "precisions of weights", "dtype": "precisions of arithmetic", "device": "devices",
             "torch": "versions of torch", "code": "versions of this code", "mode": "modes", "split": "ways of cutting validation",
             "causal": "masks"}
    for key, words in alike.items():
        values = Counter(str(r[key]) for r in rows if r.get(key) is not None)
        if len(values) > 1:
            found.append(f"**Mixed {words}** ({key}): {some(f'{v} in {n} rows' for v, n in values.most_common())}.")
    of_task = {"pool": "pools, which are tasks of their own here", "documents": "numbers of documents",
               "data": "versions of the data", "train_on": "training sets", "steps": "lengths of fine-tuning",
               "max_length": "lengths of sequences"}
    for key, words in of_task.items():
        values = defaultdict(set)
        for r in rows:
            if r.get(key) is not None:
                values[r["task"] if key == "pool" else column_of(r)].add(str(r[key]))
        several = [f"{task}: {', '.join(sorted(v))}" for task, v in values.items() if len(v) > 1]
        found += [f"**Mixed {words}** ({key}): {some(several)}."] * bool(several)
    return found
