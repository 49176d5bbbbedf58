"""What report.py reads, and what it writes to be read again: runs of train.py, trials, studies, rows.jsonl.

    STUDY/study.json                                        {"plan", "scale", "code", "models": {NAME: {"folder"}}}, study.py's
    STUDY/<folder>/trials/<task>/lr<lr>_sd<seed>.json       a trial, and beside it the .npz of its examples' own scores
    STUDY/<folder>/state.json                               "totals" and "settings" of the training that led there
    STUDY/<folder>/../log.jsonl                             its losses

Only report.py and the other report_*.py import this file.
"""
import json
import math
import os
import re
from dataclasses import dataclass, field

import numpy as np

from core.configurator import UserError
from core.files import find_files
from experiments import recipes

# what rows.jsonl keeps of a trial beside its scores
KEEP = ("name", "plan", "model", "task", "kind", "lr", "seed", "failed", "why", "baseline", "pool", "documents", "mode", "split",
        "causal", "train_on", "max_length", "steps", "data", "param_dtype", "dtype", "device", "torch", "code", "totals")
ONE_PLAN = "a report is of one plan"


def read_json(path, what):
    """Raises UserError naming the file and what it should be."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as error:
        raise UserError(f"{path}: expected {what}: {error.strerror.lower()}") from None
    except ValueError:
        raise UserError(f"{path}: expected {what}, and it does not hold JSON") from None


def read_lines(path):
    """A .jsonl -> (its objects, 1 if the last line was torn by a kill, else 0). Raises UserError naming a line that is no row."""
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = f.read().split("\n")
    found = []
    for i, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None and not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if i == len(lines):          # nothing behind it, not even its own line feed
                return found, 1
            raise UserError(f"{path}, line {i} is no row (torn in the middle of the file?): {line[:60]}") from None
        found += [row] if row is not None else []
    return found, 0


def read_run(folder, notes=None):
    """-> {"name", "settings", "train": rows, "validation": rows}, the rows of a trunk it was branched from in front.
    notes: a list that hears of a torn last line. Raises UserError."""
    try:
        config, (rows, torn) = (read_json(os.path.join(folder, "config.json"), "a run's config.json"),
                                read_lines(os.path.join(folder, "log.jsonl")))
    except OSError as error:
        raise UserError(f"{folder} is no run of train.py: {error.strerror.lower()}: {error.filename}") from None
    except UserError as error:
        raise UserError(f"{folder} is no run of train.py: {error}") from None
    if torn and notes is not None:
        notes.append(f"{folder}/log.jsonl: its torn last line was dropped")
    found = {"name": os.path.basename(os.path.normpath(folder)), "settings": config["settings"],
             "train": [r for r in rows if "loss" in r], "validation": [r for r in rows if "val_mlm_loss" in r]}
    if config["start_step"] > 0:
        before = read_run(beside(folder, config["parent"]), notes)
        for kind in ("train", "validation"):
            first = found[kind][0]["step"] if found[kind] else float("inf")
            found[kind] = [r for r in before[kind] if r["step"] < first and r["step"] <= config["start_step"]] + found[kind]
    return found


def beside(folder, checkpoint):
    """The run folder of a checkpoint that a run in `folder` began from, also where both were moved together."""
    run = os.path.dirname(os.path.normpath(checkpoint))
    return run if os.path.isdir(run) else os.path.join(os.path.dirname(os.path.normpath(folder)), os.path.basename(run))


def read_curve(folder, notes):
    """Losses of a run and of all its ancestors, branched from or continued: {"train": [[step, loss, phase], ...], "validation":
    [[step, MLM loss], ...]}, steps counted from the first ancestor. Of a run without logged steps: empty lists."""
    config = read_json(os.path.join(folder, "config.json"), "a run's config.json")
    rows, torn = read_lines(os.path.join(folder, "log.jsonl"))
    notes += [f"{folder}/log.jsonl: its torn last line was dropped"] * torn
    per_step = config["settings"]["batch_rows"] * config["settings"]["block_size"]
    train = [[r["tokens"] / per_step, r["loss"], r["phase"]] for r in rows if "loss" in r]
    validation = [[r["tokens"] / per_step, r["val_mlm_loss"]] for r in rows if "val_mlm_loss" in r]
    parent = config.get("parent") and beside(folder, config["parent"])
    if train and parent and os.path.isfile(os.path.join(parent, "log.jsonl")):
        before, begin = read_curve(parent, notes), train[0][0] - 1
        train = [r for r in before["train"] if r[0] <= begin] + train
        first = validation[0][0] if validation else math.inf
        validation = [r for r in before["validation"] if r[0] <= begin and r[0] < first] + validation
    return {"train": train, "validation": validation}


def validation_at(run, checkpoint):
    """The losses of the validation at a checkpoint step_NNNNNNN of a run: {"mlm", "clm"} in nats, {} if there was none."""
    log, step = os.path.join(run, "log.jsonl"), re.fullmatch(r"step_(\d+)", checkpoint)
    for row in read_lines(log)[0] if step and os.path.isfile(log) else ():
        if row["step"] == int(step[1]) and "val_mlm_loss" in row:
            return {"mlm": row["val_mlm_loss"], "clm": row["val_clm_loss"]}
    return {}


def thinned(curve, points=200):
    """A training curve of at most so many points, each the mean of those it stands for within its phase."""
    size, out = max(1, math.ceil(len(curve["train"]) / points)), []
    for i in range(0, len(curve["train"]), size):
        part = [r for r in curve["train"][i:i + size] if r[2] == curve["train"][i][2]]
        out.append([round(np.mean([r[0] for r in part]), 1), round(float(np.mean([r[1] for r in part])), 4), part[0][2]])
    return {"train": out, "validation": [[round(s, 1), round(v, 4)] for s, v in curve["validation"]]}


def checked(row, where):
    """A trial's row with `failed` set, whatever wrote it. Raises UserError for what is no row."""
    try:
        row = {k: row[k] for k in ("model", "task", "lr", "seed")} | row
        scores = None if row.get("failed") else [float(row[split]["score"]) for split in ("validation", "test")]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} is no row of a trial: remove it, or run the trial again") from None
    return row | {"failed": scores is None or not all(map(math.isfinite, scores))}


def read_trials(folder, below="**"):
    """{path: row} of all trials below a folder. Raises UserError for a file that is no row."""
    paths = find_files(folder, os.path.join(below, "trials", "*", "lr*_sd*.json"))
    rows = {}
    for path in sorted(map(os.path.realpath, paths)):
        with open(path, encoding="utf-8") as f:
            try:
                row = json.load(f)
            except ValueError:
                row = None
        rows[path] = checked(row, path) | {"path": path}
    return rows


def compact(row):
    """What tables, figures and warnings need of a trial's row: scores, not examples."""
    small = {k: row[k] for k in KEEP if row.get(k) is not None}
    if not row["failed"]:
        small["validation"] = {"score": row["validation"]["score"]}
        small["test"] = {k: v for k, v in row["test"].items() if isinstance(v, int | float)}
    return small


# ---- a study

@dataclass
class Study:
    """Rows of one plan at one scale. models: {name: {"totals", "per_step": tokens of a step, "validation": losses, "curve"}}"""
    plan: str = ""
    scale: dict = field(default_factory=dict)
    code: str = ""
    models: dict = field(default_factory=dict)
    trials: list = field(default_factory=list)
    tests: list = field(default_factory=list)          # paired tests of an earlier report, whose items are not here
    notes: list = field(default_factory=list)          # warnings of the reading

    def take(self, other, where):
        """Add another's rows. Raises UserError naming both plans where they differ."""
        if self.plan and other.plan and self.plan != other.plan:
            raise UserError(f"{where} is of the plan '{other.plan}', what was read before it of '{self.plan}': {ONE_PLAN}")
        if self.scale and other.scale and self.scale != other.scale:
            raise UserError(f"{where} has the plan '{other.plan}' at another scale than what was read before it: {ONE_PLAN}")
        self.plan, self.scale, self.code = self.plan or other.plan, self.scale or other.scale, self.code or other.code
        for name, facts in other.models.items():
            self.models[name] = self.models.get(name, {}) | facts
        known = {identity(r) for r in self.trials}
        self.trials += [r for r in other.trials if identity(r) not in known]
        self.tests += other.tests
        self.notes += [n for n in other.notes if n not in self.notes]


def identity(row):
    """What makes two rows the same trial."""
    keys = ("name", "model", "task", "pool", "lr", "seed", "mode", "param_dtype", "causal", "split", "train_on")
    return tuple(row.get(k) for k in keys)


def read_study(folder):
    """STUDY/study.json, the trials of its models and the facts of their training -> Study. Raises UserError."""
    path = os.path.join(folder, "study.json")
    said = read_json(path, "a study.json of study.py")
    try:
        study = Study(said["plan"], said.get("scale") or {}, said.get("code") or "")
        places = {name: os.path.join(folder, entry["folder"]) for name, entry in said["models"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{path} is no study.json: expected {{"plan", "models": {{NAME: {{"folder"}}}}}}') from None
    for name, place in places.items():
        recipe = parsed(name, path)
        facts, state = {}, os.path.join(place, "state.json")
        if os.path.isfile(state):
            said = read_json(state, "a checkpoint's state.json")
            settings = said.get("settings", {})
            facts = {"totals": said.get("totals"), "per_step": settings.get("batch_rows", 0) * settings.get("block_size", 0)}
        run = os.path.dirname(os.path.normpath(place))
        facts["validation"] = validation_at(run, os.path.basename(os.path.normpath(place)))
        if recipe.start and not recipe.step and os.path.isfile(os.path.join(run, "log.jsonl")):      # Figure 12 is of these
            facts["curve"] = thinned(read_curve(run, study.notes))
        study.models[name] = facts
        study.trials += [row | {"name": name, "plan": study.plan, "totals": facts.get("totals")}
                         for row in read_trials(place, below="").values()]
    study.notes = list(dict.fromkeys(study.notes))      # an ancestor's log is read for each of its continuations
    return study


def parsed(name, where):
    try:
        return recipes.parse(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_rows(path):
    """rows.jsonl, as lines_of has it -> Study; trials that belong to no study have no name. Raises UserError naming a row."""
    rows, torn = read_lines(path)
    study = Study(notes=[f"{path}: its torn last line was dropped"] * torn)
    for i, row in enumerate(rows, start=1):
        where, what = f"{path}, row {i}", row.pop("what", "trial")
        try:
            if what == "study":
                study.plan, study.scale, study.code = row["plan"], row["scale"], row["code"]
            elif what == "model":
                study.models[parsed(row.pop("name"), where).name] = row
            elif what == "test":
                if not {"better", "worse", "task", "p"} <= row.keys():
                    raise KeyError(what)
                study.tests.append(row)
            elif what == "note":
                study.notes.append(row["text"])
            elif what == "trial":
                take_trial(study, checked(row, where), where)
            else:
                raise KeyError(what)
        except KeyError:
            raise UserError(f"{where} is no row of a report: '{what}' without what such a row has") from None
    return study


def take_trial(study, row, where):
    """Add a trial of rows.jsonl. Raises UserError."""
    if row.get("plan") and study.plan and row["plan"] != study.plan:
        raise UserError(f"{where} is of the plan '{row['plan']}', those before it of '{study.plan}': {ONE_PLAN}")
    if row.get("name"):
        study.models.setdefault(parsed(row["name"], where).name, {})
    study.plan = study.plan or row.get("plan", "")
    study.trials.append(row)


def lines_of(study):
    """The lines of rows.jsonl: all that the same report can be drawn from again. Paired tests are kept as results, not as items."""
    yield {"what": "study", "plan": study.plan, "scale": study.scale, "code": study.code}
    yield from ({"what": "note", "text": text} for text in study.notes)
    yield from ({"what": "model", "name": name} | facts for name, facts in study.models.items())
    yield from map(compact, study.trials)
    yield from ({"what": "test"} | test for test in study.tests)
