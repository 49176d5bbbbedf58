"""The warnings on a study's page: which trials are missing, failed, or mixed with unlike ones."""
import itertools
from collections import Counter, defaultdict

from core.files import as_markdown
from reporting.scores import column_of, select_trials, split_seed
from reporting.sections import sections

MOST_ITEMS = 6      # a warning lists so many items at most, and counts the others

# All trials should agree in these, or a table compares unlike ones.
# {key of a row: what a warning calls its values}
SHARED_BY_ALL = {"param_dtype": "precisions of weights", "dtype": "precisions of arithmetic",
                 "device": "devices", "torch": "versions of torch", "code": "versions of this code",
                 "mode": "modes", "split": "ways of cutting validation", "causal": "masks"}
# The trials of a task should agree in these; other tasks may have other values.
SHARED_BY_TASK = {"pool": "pools, which are tasks of their own here",
                  "documents": "numbers of documents", "data": "versions of the data",
                  "train_on": "training sets", "steps": "lengths of fine-tuning",
                  "max_length": "lengths of sequences"}


class Trials:
    """A study's trials, grouped as the warnings need them."""

    def __init__(self, study):
        self.rows = [row for row in study.trials if row.get("name")]
        # {(model with its seed, column): rows}
        self.groups = defaultdict(list)
        # The grid of a column: all learning rates and all seeds that any trial of it has.
        self.lrs = defaultdict(set)         # {column: learning rates}
        self.seeds = defaultdict(set)       # {column: fine-tuning seeds}
        for row in self.rows:
            column = column_of(row)
            self.groups[row["name"], column].append(row)
            self.lrs[column].add(row["lr"])
            self.seeds[column].add(row["seed"])
        self.columns = list(self.lrs)
        # models with trials, in the order of the rows (a set's order would depend on the process)
        self.names = list(dict.fromkeys(row["name"] for row in self.rows))


def list_warnings(study, results):
    """The warnings as a list of sentences in Markdown. results: the study's StudyResults"""
    trials = Trials(study)
    untried = [name for name in study.models if name not in trials.names]
    warnings = {                            # {what is wrong: items that it is wrong with}
        "No trial yet": untried,
        "No trial of a task that other models have": absent_tasks(trials),
        "Missing trials of the grid that a task's rows span": gaps_in_grids(trials),
        "Failed trials": failures(trials),
        "Fewer fine-tuning seeds than others": fewer_fine_tuning_seeds(trials),
        "Fewer pretraining seeds than others in the same tables":
            fewer_pretraining_seeds(trials, results),
        "Best learning rate at an edge of the grid, where a better one may lie outside":
            edges_of_grids(trials),
        "Not above an untrained baseline, so a difference there says little":
            not_above_baseline(trials)}
    sentences = [as_markdown(note) for note in study.notes]
    for title, items in warnings.items():
        if items:
            sentences.append(f"**{title}**: {shortened(items)}.")
    return sentences + mixture_warnings(trials.rows)


def shortened(items):
    """The first few items as text, and how many more there are."""
    text = "; ".join(map(as_markdown, items[:MOST_ITEMS]))
    if len(items) > MOST_ITEMS:
        text += f"; and {len(items) - MOST_ITEMS} more"
    return text


# ---- the items of each warning

def absent_tasks(trials):
    items = []
    for name in trials.names:
        for column in trials.columns:
            if (name, column) not in trials.groups:
                items.append(f"{name} on {column}")
    return items


def gaps_in_grids(trials):
    items = []
    for (name, column), rows in trials.groups.items():
        grid = set(itertools.product(trials.lrs[column], trials.seeds[column]))
        gaps = sorted(grid - {(row["lr"], row["seed"]) for row in rows})
        if gaps:
            lr, seed = gaps[0]
            example = f"lr {lr:g} seed {seed}"
            if len(gaps) > 1:
                example += ", ..."
            items.append(f"{name} on {column}, {len(gaps)} of {len(grid)} ({example})")
    return items


def failures(trials):
    items = []
    for (name, column), rows in trials.groups.items():
        failed = [row for row in rows if row["failed"]]
        if failed:
            lrs = sorted({row["lr"] for row in failed})
            lrs_in_words = ", ".join(f"{lr:g}" for lr in lrs)
            items.append(f"{name} on {column}, {len(failed)} (lr {lrs_in_words})")
    return items


def fewer_fine_tuning_seeds(trials):
    items = []
    for (name, column), rows in trials.groups.items():
        succeeded = {row["seed"] for row in rows if not row["failed"]}
        if len(succeeded) < len(trials.seeds[column]):
            items.append(f"{name} on {column}, {len(succeeded)} of {len(trials.seeds[column])}")
    return items


def fewer_pretraining_seeds(trials, results):
    n_seeds = Counter()             # {model without its seed: number of seeds with trials}
    for full_name in trials.names:
        name, _ = split_seed(full_name)
        n_seeds[name] += 1
    items = []
    for names in sections(results.names).values():
        most = max((n_seeds[name] for name in names), default=0)
        for name in names:
            if 0 < n_seeds[name] < most:
                items.append(f"{name}, {n_seeds[name]} of {most}")
    return list(dict.fromkeys(items))       # a model may be in several sections


def edges_of_grids(trials):
    items = []
    for (name, column), rows in trials.groups.items():
        selection = select_trials(rows, "standard")
        lrs = trials.lrs[column]
        if selection is None or len(lrs) == 1:
            continue
        best_lr = selection.lrs[0]          # the rule "standard" selects one for all seeds
        if best_lr in (min(lrs), max(lrs)):
            items.append(f"{name} on {column} ({best_lr:g})")
    return items


def not_above_baseline(trials):
    items = []
    for (name, column), rows in trials.groups.items():
        selection = select_trials(rows, "standard")
        baseline = next((row["baseline"] for row in rows if row.get("baseline")), None)
        if selection is None or baseline is None or selection.mean > baseline["score"]:
            continue
        items.append(f"{name} on {column} ({100 * selection.mean:.2f}, "
                     f"{baseline['name']} {100 * baseline['score']:.2f})")
    return items


# ---- trials that a table compares although they are unlike

def mixture_warnings(rows):
    """Sentences about the settings that differ between trials that should agree in them."""
    sentences = []
    for key, words in SHARED_BY_ALL.items():
        counts = Counter(str(row[key]) for row in rows if row.get(key) is not None)
        if len(counts) > 1:
            items = [f"{value} in {n} rows" for value, n in counts.most_common()]
            sentences.append(f"**Mixed {words}** ({key}): {shortened(items)}.")
    for key, words in SHARED_BY_TASK.items():
        values = defaultdict(set)           # {column, or task: values of the key}
        for row in rows:
            if row.get(key) is not None:
                # all trials of a column have the same pool, so look for pools within a task
                place = row["task"] if key == "pool" else column_of(row)
                values[place].add(str(row[key]))
        items = []
        for place, values_there in values.items():
            if len(values_there) > 1:
                items.append(f"{place}: {', '.join(sorted(values_there))}")
        if items:
            sentences.append(f"**Mixed {words}** ({key}): {shortened(items)}.")
    return sentences
