"""What report.py reads: runs of train.py, trials, studies, and the rows.jsonl of an earlier report.

    STUDY/study.json                {"plan", "scale", "code", "models": {NAME: {"folder"}}}
    STUDY/<folder>/trials/<task>/   lr<lr>_sd<seed>.json, a trial; .npz: its examples' scores
    STUDY/<folder>/state.json       "totals" and "settings" of the training up to the checkpoint
    STUDY/<folder>/../log.jsonl     the losses of that training

A report writes what it read into one rows.jsonl, from which the same report can be drawn again.
"""
import math
import os
import re
from dataclasses import dataclass, field

import numpy as np

from core import files, schema
from core.configurator import UserError
from experiments import recipes

# ---- what is needed of each file; see core/schema.py

CONFIG_SHAPE = {"settings": {"batch_rows": int, "block_size": int, "phases?": [[(str, int)]]},
                "start_step": int, "parent?": (str, None)}
# a row of log.jsonl: of a training step, of a validation, or anything else of a step
STEP_SHAPE = {"step": int, "tokens": float, "loss": float, "phase": str}
VALIDATION_SHAPE = {"step": int, "tokens": float, "seconds?": float, "val_mlm_loss": float,
                    "val_clm_loss": float}
OTHER_SHAPE = {"step": int}
STUDY_SHAPE = {"plan": str, "scale?": ({str: object}, None), "code?": (str, None),
               "models": {str: {"folder": str}}}
TOTALS_SHAPE = ({"tokens?": float, "targets?": float, "flops?": float, "seconds?": float}, None)
STATE_SHAPE = {"totals?": TOTALS_SHAPE, "settings?": {"batch_rows?": int, "block_size?": int}}
TRIAL_SHAPE = {"model": str, "task": str, "lr": float, "seed": int, "failed?": bool,
               "name?": (str, None), "plan?": (str, None), "kind?": (str, None),
               "baseline?": ({"name": str, "score": float}, None), "pool?": (str, None),
               "documents?": (int, None), "mode?": (str, None), "split?": (str, None),
               "causal?": (bool, None), "train_on?": (str, None), "param_dtype?": (str, None),
               "data?": (str, None), "per_item?": (str, None), "totals?": TOTALS_SHAPE}
SCORES_SHAPE = {"validation": {"score": float}, "test": {"score": float}}
# the rows of rows.jsonl that are not trials, by "what" they are
ROW_SHAPES = {
    "study": {"plan": str, "scale": {str: object}, "code": str},
    "note": {"text": str},
    "model": {"name": str, "totals?": TOTALS_SHAPE, "per_step?": (int, None),
              "validation?": ({"mlm?": float, "clm?": float}, None),
              "curve?": {"train": [[(float, str)]], "validation": [[float]]}},
    "test": {"ordering": int, "better": str, "worse": str, "family": str, "task": str,
             "by_seed": [float], "items": int, "difference": (float, None),
             "half_width": (float, None), "p": (float, None), "verdict?": str, "why?": str},
}
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

def read_json(path, shape, expected):
    """The content of a JSON file. Raises UserError naming the file and what was expected of it."""
    try:
        return schema.read_json(path, shape)
    except OSError as error:
        raise UserError(f"{path}: expected {expected}: {error.strerror.lower()}") from None
    except UserError as error:
        raise UserError(f"expected {expected}, and {error}") from None


def read_jsonl(path, notes):
    """Yields (where, value) of each line of a .jsonl file; `where` names the file and the line.

    Lines that are not JSON are left out, and counted in a sentence that is added to `notes`: a last
    line whose writer was killed, and what a power cut or a full disk leaves in the middle.
    """
    with open(path, "rb") as f:
        lines = f.read().split(b"\n")
    damages = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = schema.parse_json(line, where)
        except UserError as error:
            # a torn last line does not even end in a line feed
            if number == len(lines):
                notes.append(f"{path}: its torn last line was dropped")
            else:
                damages.append(str(error))
            continue
        yield where, value
    note_damages(damages, path, notes)


def note_damages(damages, path, notes):
    """Adds a sentence to `notes` about lines of a file that were left out."""
    if damages:
        lines = "a line was" if len(damages) == 1 else f"{len(damages)} lines were"
        notes.append(f"{path}: {lines} left out ({damages[0].removeprefix(f'{path}, ')})")


def read_log(path, notes):
    """The rows of a run's log.jsonl. Lines that are not rows are left out and noted."""
    rows = []
    damages = []
    for where, row in read_jsonl(path, notes):
        shape = OTHER_SHAPE
        if isinstance(row, dict) and "loss" in row:
            shape = STEP_SHAPE
        elif isinstance(row, dict) and "val_mlm_loss" in row:
            shape = VALIDATION_SHAPE
        problem = schema.misfit(row, shape)
        if problem:
            damages.append(f"{where}: {problem}")
        else:
            rows.append(row)
    note_damages(damages, path, notes)
    return rows


# ---- runs of train.py

def read_run(folder, notes=None, descendants=()):
    """The settings and the log of a run. The log of a branch begins with its trunk's.

    notes: a list that receives warnings; descendants: the runs that come from this one, as
    real paths. Raises UserError if the folder is not a run.
    -> {"name", "settings", "train": rows, "validation": rows}
    """
    notes = [] if notes is None else notes
    check_descent(folder, descendants)
    try:
        config = read_config(folder)
        check_phases(config, folder)
        rows = read_log(os.path.join(folder, "log.jsonl"), notes)
    except OSError as error:
        reason = f"{error.strerror.lower()}: {error.filename}"
        raise UserError(f"{folder} is not a run of train.py: {reason}") from None
    except UserError as error:
        raise UserError(f"{folder} is not a run of train.py: {error}") from None

    run = {"name": os.path.basename(os.path.normpath(folder)),
           "settings": config["settings"],
           "train": [row for row in rows if "loss" in row],
           "validation": [row for row in rows if "val_mlm_loss" in row]}
    start_step = config["start_step"]
    if start_step > 0:
        # put the trunk's rows in front, up to the branch and up to this run's own first row
        trunk = read_run(parent_folder(folder, config), notes,
                         (*descendants, os.path.realpath(folder)))
        for kind in ("train", "validation"):
            first_step = run[kind][0]["step"] if run[kind] else math.inf
            trunk_rows = [row for row in trunk[kind]
                          if row["step"] < first_step and row["step"] <= start_step]
            run[kind] = trunk_rows + run[kind]
    return run


def read_config(folder):
    """The content of a run's config.json. Raises UserError."""
    path = os.path.join(folder, "config.json")
    config = read_json(path, CONFIG_SHAPE, "a run's config.json")
    for key in ("batch_rows", "block_size"):
        if config["settings"][key] < 1:
            raise UserError(f"{path}: 'settings.{key}' is below 1")
    if "\0" in (config.get("parent") or ""):
        raise UserError(f"{path}: 'parent' contains a NUL character")
    if config["start_step"] > 0 and not config.get("parent"):
        raise UserError(f"{path}: 'start_step' is above 0, and 'parent' names no checkpoint")
    return config


def check_phases(config, folder):
    """Raises UserError if the phases of a run are not [[objective, steps], ...]."""
    phases = config["settings"].get("phases")
    if not phases or any([type(item) for item in phase] != [str, int] for phase in phases):
        path = os.path.join(folder, "config.json")
        raise UserError(f"{path}: 'settings.phases' is not a list of [objective, steps]")


def check_descent(folder, descendants):
    """Raises UserError if a run is among those that come from it."""
    if os.path.realpath(folder) in descendants:
        raise UserError(f"{folder} comes from itself: look at 'parent' in its config.json, and in "
                        "those of the runs it began from")


def parent_folder(folder, config):
    """The run folder of the checkpoint that the run in `folder` began from.

    config: the content of its config.json. If the checkpoint is not where the run recorded it, both
    were moved together, and it is beside `folder`.
    """
    recorded = os.path.dirname(os.path.normpath(config["parent"]))
    if os.path.isdir(recorded):
        return recorded
    return os.path.join(os.path.dirname(os.path.normpath(folder)), os.path.basename(recorded))


def read_curve(folder, notes, descendants=()):
    """The losses of a run and of all its ancestors, whether it branches from or continues them.

    Steps count from the first ancestor's step 0. A run without logged steps gives empty lists.
    descendants: the runs that come from this one, as real paths. Raises UserError.
    -> {"train": [[step, loss, phase], ...], "validation": [[step, MLM loss], ...]}
    """
    check_descent(folder, descendants)
    config = read_config(folder)
    rows = read_log(os.path.join(folder, "log.jsonl"), notes)
    tokens_per_step = config["settings"]["batch_rows"] * config["settings"]["block_size"]
    train = []
    validation = []
    for row in rows:
        if "loss" in row:
            train.append([row["tokens"] / tokens_per_step, row["loss"], row["phase"]])
        elif "val_mlm_loss" in row:
            validation.append([row["tokens"] / tokens_per_step, row["val_mlm_loss"]])

    if train and config.get("parent"):
        parent = parent_folder(folder, config)
        if os.path.isfile(os.path.join(parent, "log.jsonl")):
            # put the ancestors' points in front, up to this run's own first ones
            ancestors = read_curve(parent, notes, (*descendants, os.path.realpath(folder)))
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


def validation_at(run, checkpoint, notes):
    """The validation losses of a run at its checkpoint step_NNNNNNN, in nats; {} if there are none.

    notes: a list that receives warnings
    -> {"mlm", "clm"}
    """
    log_path = os.path.join(run, "log.jsonl")
    match = re.fullmatch(r"step_(\d+)", checkpoint)
    if match is None or not os.path.isfile(log_path):
        return {}
    for row in read_log(log_path, notes):
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
        except UserError as error:
            raise UserError(f"{error}: remove this file, or run the trial again") from None
        trials[path] = check_trial(row, path) | {"path": path}
    return trials


def check_trial(row, where):
    """A trial's row, with "failed" set to whether it lacks finite scores.

    Raises UserError for a row that lacks what a trial has.
    """
    problem = schema.misfit(row, TRIAL_SHAPE)
    if not problem and not math.isfinite(row["lr"]):
        problem = "'lr' is not a finite number"
    has_scores = False
    if not problem and not row.get("failed"):
        problem = schema.misfit(row, SCORES_SHAPE)
        has_scores = not problem and all(math.isfinite(row[split]["score"]) for split in SCORES_SHAPE)
    if problem:
        raise UserError(f"{where} is not a row of a trial ({problem}): remove it, or run the trial "
                        "again")
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
    content = read_json(path, STUDY_SHAPE, "a study.json of study.py")
    study = StudyRecord(content["plan"], content.get("scale") or {}, content.get("code") or "")
    checkpoints = {}
    for name, entry in content["models"].items():
        if "\0" in entry["folder"]:
            raise UserError(f"{path}: the folder of {name} contains a NUL character")
        checkpoints[name] = os.path.join(folder, entry["folder"])
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
        state = read_json(state_path, STATE_SHAPE, "a checkpoint's state.json")
        settings = state.get("settings", {})
        facts["totals"] = state.get("totals")
        facts["per_step"] = settings.get("batch_rows", 0) * settings.get("block_size", 0)
    run, checkpoint_name = os.path.split(os.path.normpath(checkpoint))
    facts["validation"] = validation_at(run, checkpoint_name, notes)
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
    study = StudyRecord()
    for where, row in read_jsonl(path, study.notes):
        kind = row.pop("what", "trial") if isinstance(row, dict) else "trial"
        if kind == "trial":
            add_trial(study, check_trial(row, where), where)
            continue
        problem = "it is of an unknown kind"
        if isinstance(kind, str) and kind in ROW_SHAPES:
            problem = schema.misfit(row, ROW_SHAPES[kind]) or misfit_of_curve(row)
        if problem:
            raise UserError(f"{where} is not a row of a report: {problem}")
        add_row(study, kind, row, where)
    return study


def misfit_of_curve(row):
    """What is wrong with the points of a model's curve, in words; "" if nothing is."""
    for key, types in (("train", (float, float, str)), ("validation", (float, float))):
        for point in row.get("curve", {}).get(key, ()):
            if len(point) != len(types) or any(map(schema.misfit, point, types)):
                return f"'curve.{key}' has a point that is not of {len(types)} values"
    return ""


def add_row(study, kind, row, where):
    """Add one row of rows.jsonl that is not a trial. kind: a key of ROW_SHAPES"""
    if kind == "study":
        study.plan = row["plan"]
        study.scale = row["scale"]
        study.code = row["code"]
    elif kind == "model":
        recipe = parse_name(row.pop("name"), where)
        study.models[recipe.name] = row
    elif kind == "test":
        study.tests.append(row)
    else:
        study.notes.append(row["text"])


def add_trial(study, row, where):
    """Add a trial of rows.jsonl. Raises UserError if the rows before it have another plan."""
    if row.get("plan") and study.plan and row["plan"] != study.plan:
        raise UserError(f"{where} has the plan '{row['plan']}', the rows before it "
                        f"'{study.plan}': {ONE_PLAN}")
    if row.get("name"):
        study.models.setdefault(parse_name(row["name"], where).name, {})
    study.plan = study.plan or row.get("plan", "")
    study.trials.append(row)
