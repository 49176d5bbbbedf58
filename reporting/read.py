"""What report.py reads: runs of train.py, trials, studies, and the rows.jsonl of an earlier report.

    STUDY/study.json                {"plan", "scale", "code", "models": {NAME: {"folder"}}}
    STUDY/<folder>/trials/<task>/   lr<lr>_sd<seed>.json, a trial; .npz: its examples' scores
    STUDY/<folder>/state.json       "totals" and "settings" of the training up to the checkpoint
    STUDY/<folder>/../log.jsonl     the losses of that training

A report writes what it read into one rows.jsonl, from which the same report can be drawn again.
"""
import json
import math
import os
import re
from dataclasses import dataclass, field

import numpy as np

from core import files, schema
from core.configurator import UserError
from experiments import recipes

TRIAL_KEYS = {"model", "task", "lr", "seed"}        # every trial has these
# what rows.jsonl keeps of a trial beside its scores
KEPT_KEYS = ("name", "plan", "model", "task", "kind", "lr", "seed", "failed", "why", "baseline",
             "pool", "documents", "mode", "split", "causal", "train_on", "max_length", "steps",
             "data", "param_dtype", "dtype", "device", "torch", "code", "totals")
# two rows that agree in these are the same trial
IDENTITY_KEYS = ("name", "model", "task", "pool", "lr", "seed", "mode", "param_dtype", "causal",
                 "split", "train_on")
ONE_PLAN = "a report shows one plan, so give each plan its own"
CURVE_POINTS = 200          # most points of a training curve that rows.jsonl keeps


# ---- JSON

def read_json(path, expected):
    """The content of a JSON file. Raises UserError naming the file and what was expected of it."""
    try:
        return schema.read_json(path)
    except OSError as error:
        raise UserError(f"{path}: expected {expected}: {error.strerror.lower()}") from None
    except UserError as error:
        raise UserError(f"expected {expected}, and {error}") from None


def read_jsonl(path):
    """The objects of a .jsonl file, and whether its last line was torn (its writer was killed).

    A torn last line is dropped. Raises UserError, naming the line, for any other line that is not
    an object.
    -> rows, is_torn
    """
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = f.read().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number == len(lines):          # the file does not even end in a line feed
            return rows, True
        else:
            raise UserError(f"{path}, line {number} is not a row (torn in the middle of the "
                            f"file?): {line[:60]}")
    return rows, False


def note_if_torn(is_torn, path, notes):
    """Adds a warning to `notes` (a list of sentences) if the file's last line was torn."""
    if is_torn:
        notes.append(f"{path}: its torn last line was dropped")


# ---- runs of train.py

def read_run(folder, notes=None):
    """The settings and the log of a run. The log of a branch begins with its trunk's.

    notes: a list that receives warnings. Raises UserError if the folder is not a run.
    -> {"name", "settings", "train": rows, "validation": rows}
    """
    notes = [] if notes is None else notes
    log_path = os.path.join(folder, "log.jsonl")
    try:
        config = read_json(os.path.join(folder, "config.json"), "a run's config.json")
        rows, is_torn = read_jsonl(log_path)
    except OSError as error:
        reason = f"{error.strerror.lower()}: {error.filename}"
        raise UserError(f"{folder} is not a run of train.py: {reason}") from None
    except UserError as error:
        raise UserError(f"{folder} is not a run of train.py: {error}") from None
    note_if_torn(is_torn, log_path, notes)

    run = {"name": os.path.basename(os.path.normpath(folder)),
           "settings": config["settings"],
           "train": [row for row in rows if "loss" in row],
           "validation": [row for row in rows if "val_mlm_loss" in row]}
    start_step = config["start_step"]
    if start_step > 0:
        # put the trunk's rows in front, up to the branch and up to this run's own first row
        trunk = read_run(parent_folder(folder, config["parent"]), notes)
        for kind in ("train", "validation"):
            first_step = run[kind][0]["step"] if run[kind] else math.inf
            trunk_rows = [row for row in trunk[kind]
                          if row["step"] < first_step and row["step"] <= start_step]
            run[kind] = trunk_rows + run[kind]
    return run


def parent_folder(folder, checkpoint):
    """The run folder of the checkpoint that the run in `folder` began from.

    If it is not where the run recorded it, both were moved together, and it is beside `folder`.
    """
    recorded = os.path.dirname(os.path.normpath(checkpoint))
    if os.path.isdir(recorded):
        return recorded
    return os.path.join(os.path.dirname(os.path.normpath(folder)), os.path.basename(recorded))


def read_curve(folder, notes):
    """The losses of a run and of all its ancestors, whether it branches from or continues them.

    Steps count from the first ancestor's step 0. A run without logged steps gives empty lists.
    -> {"train": [[step, loss, phase], ...], "validation": [[step, MLM loss], ...]}
    """
    config = read_json(os.path.join(folder, "config.json"), "a run's config.json")
    log_path = os.path.join(folder, "log.jsonl")
    rows, is_torn = read_jsonl(log_path)
    note_if_torn(is_torn, log_path, notes)

    tokens_per_step = config["settings"]["batch_rows"] * config["settings"]["block_size"]
    train = []
    validation = []
    for row in rows:
        if "loss" in row:
            train.append([row["tokens"] / tokens_per_step, row["loss"], row["phase"]])
        if "val_mlm_loss" in row:
            validation.append([row["tokens"] / tokens_per_step, row["val_mlm_loss"]])

    if train and config.get("parent"):
        parent = parent_folder(folder, config["parent"])
        if os.path.isfile(os.path.join(parent, "log.jsonl")):
            # put the ancestors' points in front, up to this run's own first ones
            ancestors = read_curve(parent, notes)
            last_step = train[0][0] - 1
            first_validation = validation[0][0] if validation else math.inf
            train = [point for point in ancestors["train"] if point[0] <= last_step] + train
            validation = [point for point in ancestors["validation"]
                          if point[0] <= last_step and point[0] < first_validation] + validation
    return {"train": train, "validation": validation}


def thinned(curve):
    """The curve with at most CURVE_POINTS training points, each a mean of neighbouring ones.

    Where the phase changes among the neighbours, only those of the first one's phase count.
    """
    points = curve["train"]
    stride = max(1, math.ceil(len(points) / CURVE_POINTS))
    train = []
    for i in range(0, len(points), stride):
        phase = points[i][2]
        same_phase = [point for point in points[i:i + stride] if point[2] == phase]
        step = np.mean([point[0] for point in same_phase])
        loss = float(np.mean([point[1] for point in same_phase]))
        train.append([round(step, 1), round(loss, 4), phase])
    validation = [[round(step, 1), round(loss, 4)] for step, loss in curve["validation"]]
    return {"train": train, "validation": validation}


def validation_at(run, checkpoint):
    """The validation losses of a run at its checkpoint step_NNNNNNN, in nats; {} if there are none.

    -> {"mlm", "clm"}
    """
    log_path = os.path.join(run, "log.jsonl")
    match = re.fullmatch(r"step_(\d+)", checkpoint)
    if match is None or not os.path.isfile(log_path):
        return {}
    rows, _ = read_jsonl(log_path)
    for row in rows:
        if row["step"] == int(match[1]) and "val_mlm_loss" in row:
            return {"mlm": row["val_mlm_loss"], "clm": row["val_clm_loss"]}
    return {}


# ---- trials

def read_trials(folder, below="**"):
    """All trials in a folder: {path: row}. Raises UserError for a file that is not a trial.

    below: a pattern of the folders that a folder trials/ may be in; "": in `folder` itself
    """
    paths = files.find_files(folder, os.path.join(below, "trials", "*", "lr*_sd*.json"))
    trials = {}
    for path in sorted(map(os.path.realpath, paths)):
        try:
            row = schema.read_json(path)
        except UserError:
            row = None
        trials[path] = check_trial(row, path) | {"path": path}
    return trials


def check_trial(row, where):
    """A trial's row, with "failed" set to whether it lacks finite scores.

    Raises UserError for a row that lacks what a trial has.
    """
    is_trial = isinstance(row, dict) and TRIAL_KEYS <= row.keys()
    has_scores = False
    if is_trial and not row.get("failed"):
        try:
            scores = [float(row[split]["score"]) for split in ("validation", "test")]
            has_scores = all(math.isfinite(score) for score in scores)
        except (KeyError, TypeError, ValueError):
            is_trial = False
    if not is_trial:
        raise UserError(f"{where} is not a row of a trial: remove it, or run the trial again")
    return row | {"failed": not has_scores}


def compact(row):
    """What tables, figures and warnings need of a trial: scores, not single examples."""
    small = {key: row[key] for key in KEPT_KEYS if row.get(key) is not None}
    if not row["failed"]:
        small["validation"] = {"score": row["validation"]["score"]}
        small["test"] = {key: value for key, value in row["test"].items()
                         if isinstance(value, int | float)}
    return small


def identity(row):
    """What tells trials apart: two rows with the same identity are the same trial."""
    return tuple(row.get(key) for key in IDENTITY_KEYS)


# ---- a study

@dataclass
class StudyRecord:
    """Everything that was read of one plan at one scale, for a report to show."""
    plan: str = ""
    scale: dict = field(default_factory=dict)
    code: str = ""
    # {name: {"totals", "per_step": tokens of a step, "validation": losses, "curve"}}
    models: dict = field(default_factory=dict)
    trials: list = field(default_factory=list)
    # paired tests: those of an earlier report, whose scores of single examples are not at hand,
    # and then this report's own
    tests: list = field(default_factory=list)
    notes: list = field(default_factory=list)          # warnings from the reading

    def add(self, study, where):
        """Add everything of another StudyRecord.

        where: the argument it was read from. Raises UserError if it has another plan or scale.
        """
        if self.plan and study.plan and self.plan != study.plan:
            raise UserError(f"{where} has the plan '{study.plan}', the folders before it "
                            f"'{self.plan}': {ONE_PLAN}")
        if self.scale and study.scale and self.scale != study.scale:
            raise UserError(f"{where} has the plan '{study.plan}' at another scale than the "
                            f"folders before it: {ONE_PLAN}")
        self.plan = self.plan or study.plan
        self.scale = self.scale or study.scale
        self.code = self.code or study.code
        for name, facts in study.models.items():
            self.models[name] = self.models.get(name, {}) | facts
        identities = {identity(row) for row in self.trials}
        self.trials += [row for row in study.trials if identity(row) not in identities]
        self.tests += study.tests
        self.notes += [note for note in study.notes if note not in self.notes]


def read_study(folder):
    """The models of a study's folder, the facts of their training, and their trials.

    Raises UserError if it is not a study's folder.
    -> StudyRecord
    """
    path = os.path.join(folder, "study.json")
    content = read_json(path, "a study.json of study.py")
    try:
        study = StudyRecord(content["plan"], content.get("scale") or {}, content.get("code") or "")
        checkpoints = {name: os.path.join(folder, entry["folder"])
                       for name, entry in content["models"].items()}
    except (KeyError, TypeError, AttributeError):
        expected = '{"plan", "models": {NAME: {"folder"}}}'
        raise UserError(f"{path} is not a study.json: expected {expected}") from None
    for name, checkpoint in checkpoints.items():
        recipe = parse_name(name, path)
        facts = training_facts(checkpoint, recipe, study.notes)
        study.models[name] = facts
        for row in read_trials(checkpoint, below="").values():
            totals = facts.get("totals")
            study.trials.append(row | {"name": name, "plan": study.plan, "totals": totals})
    # an ancestor's log is read again for each of its continuations: keep each note once
    study.notes = list(dict.fromkeys(study.notes))
    return study


def training_facts(checkpoint, recipe, notes):
    """What a report shows of the training up to a checkpoint: an entry of StudyRecord.models."""
    facts = {}
    state_path = os.path.join(checkpoint, "state.json")
    if os.path.isfile(state_path):
        state = read_json(state_path, "a checkpoint's state.json")
        settings = state.get("settings", {})
        facts["totals"] = state.get("totals")
        facts["per_step"] = settings.get("batch_rows", 0) * settings.get("block_size", 0)
    run, checkpoint_name = os.path.split(os.path.normpath(checkpoint))
    facts["validation"] = validation_at(run, checkpoint_name)
    # the loss curves of Figure 12 are of finished models of continued pretraining
    is_finished_continuation = recipe.start and not recipe.step
    if is_finished_continuation and os.path.isfile(os.path.join(run, "log.jsonl")):
        facts["curve"] = thinned(read_curve(run, notes))
    return facts


def parse_name(name, where):
    """A model's Recipe. Raises UserError, naming `where` the name stands."""
    try:
        return recipes.parse(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# ---- rows.jsonl

def report_rows(study):
    """Yields the rows of rows.jsonl, from which read_rows makes the same StudyRecord again.

    Paired tests are kept as results: scores of single examples are not in rows.jsonl.
    """
    yield {"what": "study", "plan": study.plan, "scale": study.scale, "code": study.code}
    for text in study.notes:
        yield {"what": "note", "text": text}
    for name, facts in study.models.items():
        yield {"what": "model", "name": name} | facts
    for row in study.trials:
        yield compact(row)
    for test in study.tests:
        yield {"what": "test"} | test


def read_rows(path):
    """The content of a rows.jsonl. Trials that belong to no study have no "name".

    Raises UserError, naming the row, if one is not a row of a report.
    -> StudyRecord
    """
    rows, is_torn = read_jsonl(path)
    study = StudyRecord()
    note_if_torn(is_torn, path, study.notes)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        kind = row.pop("what", "trial")
        try:
            add_row(study, kind, row, where)
        except KeyError:
            raise UserError(f"{where} is not a row of a report: it is of an unknown kind, or lacks "
                            f"what a '{kind}' has") from None
    return study


def add_row(study, kind, row, where):
    """Add one row of rows.jsonl. Raises KeyError if it lacks something or is of an unknown kind."""
    if kind == "study":
        study.plan = row["plan"]
        study.scale = row["scale"]
        study.code = row["code"]
    elif kind == "model":
        recipe = parse_name(row.pop("name"), where)
        study.models[recipe.name] = row
    elif kind == "test":
        if not {"better", "worse", "task", "p"} <= row.keys():
            raise KeyError(kind)
        study.tests.append(row)
    elif kind == "note":
        study.notes.append(row["text"])
    elif kind == "trial":
        add_trial(study, check_trial(row, where), where)
    else:
        raise KeyError(kind)


def add_trial(study, row, where):
    """Add a trial of rows.jsonl. Raises UserError if the rows before it have another plan."""
    if row.get("plan") and study.plan and row["plan"] != study.plan:
        raise UserError(f"{where} has the plan '{row['plan']}', the rows before it "
                        f"'{study.plan}': {ONE_PLAN}")
    if row.get("name"):
        study.models.setdefault(parse_name(row["name"], where).name, {})
    study.plan = study.plan or row.get("plan", "")
    study.trials.append(row)
