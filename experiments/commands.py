"""A study's command lines, as jobs: each run is trained, each checkpoint asked for is scored."""

import json
import os
from dataclasses import dataclass
from functools import partial

from core import checkpoint
from core.configurator import UserError
from core.files import own_path
from core.schema import read_json
from experiments.cost import cost_of
from experiments.jobs import Job
from experiments.layout import Place
from experiments.recipes import DECAY, WARMUP
from tasks import queue, registry, worker

RUN_CONFIG_SHAPE = {"settings": {"branch_from": str}}   # what is needed of a run's config.json


def jobs_of(study):
    """The Jobs of a Study (layout.py), each after those that it depends on."""
    jobs = [training_job(study, run) for run in study.runs.values()]
    if study.evaluate:
        grids = grids_of(study)
        for name in study.names:
            jobs += [scoring_job(study, name, grid) for grid in grids]
    return jobs


def flag(key, value):
    """A setting as a word of a command line."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, tuple) and any(isinstance(item, tuple) for item in value):
        text = json.dumps(value)  # phases: [["clm", 10000], ["mlm40", 32000]]
    elif isinstance(value, tuple):
        text = ",".join(map(str, value)) or "()"  # numbers: 1,2
    else:
        text = str(value)
    return f"--{key}={text}"


def flags(settings):
    """Settings as words of a command line, without those that are empty."""
    return [flag(key, value) for key, value in settings.items() if value != ""]


def check_source(name, path):
    """Raises UserError if the checkpoint that a job begins from is missing."""
    if os.path.isdir(path):
        return
    run_dir = os.path.dirname(path)
    message = f"{name} begins from {path}, which is missing: put it back"
    if checkpoint.all_of(run_dir):
        message += f", or delete {run_dir} to train it again"
    raise UserError(message)


# ---- training


def training_job(study, run):
    """The Job that trains a run (plan.Run)."""
    name = run.recipe.name
    finished = study.path_of(Place(name, run.steps))
    job = Job(
        name=name,
        kind="train",
        words=training_words(study, run),
        is_done=partial(os.path.isdir, finished),
        cost=cost_of(run, study.scale, study.batch).flops,
    )
    source = study.source_of(run)
    if source:
        job.after = [source.run_name]
        job.check = partial(check_source, name, study.path_of(source))
    return job


def training_words(study, run):
    """train.py and its settings for a run (plan.Run)."""
    recipe = run.recipe
    scale = study.scale
    run_dir = os.path.join(study.out_dir, recipe.name)
    # Continued pretraining starts at the full learning rate, and train.py loads the optimizer state
    # of the decayed model. Both are our choice: the paper says neither.
    is_continued = recipe.start > 0
    settings = scale.train | {
        "size": scale.to_size(recipe.size),
        "phases": phases_at(scale, recipe),
        "seed": recipe.seed,
        "warmup_steps": 0 if is_continued else scale.to_step(WARMUP),
        "decay_steps": scale.to_step(DECAY),
        "keep_last": 1,
        "milestones": tuple(scale.to_step(step) for step in run.kept_steps),
        "data_dir": study.data_dir,
        "device": study.device,
        "compile": study.compile,
        "out_dir": run_dir,
    }
    if study.launch.is_printed:
        settings["micro_rows"] = micro_rows(study.batch.rows, study.launch.n_gpus)

    # A branch continues its trunk's schedule; continued pretraining starts one of its own.
    source = study.source_of(run)
    if run.trunk:
        settings["branch_from"] = study.path_of(source)
    elif is_continued:
        settings["init_from"] = study.path_of(source)

    # A run that has begun keeps its beginning. It may have begun from another trunk, or from none,
    # if fewer models were asked for at that time. Its weights are the same to the bit.
    config_path = os.path.join(run_dir, "config.json")
    if os.path.isfile(config_path):
        settings["branch_from"] = read_json(config_path, RUN_CONFIG_SHAPE)["settings"]["branch_from"]
    return [own_path("train.py"), *flags(settings)]


def phases_at(scale, recipe):
    """The phases of a recipe at a scale: ((objective, number of steps), ...) for train.py."""
    # Scale the steps where phases end, not their lengths: then rounding does not move the last end.
    phases = []
    begin = recipe.start
    for objective, steps in recipe.phases:
        end = begin + steps
        phases.append((objective, scale.to_step(end) - scale.to_step(begin)))
        begin = end
    return tuple(phases)


def micro_rows(batch_rows, gpus):
    """The rows that a GPU takes at once: the most, up to 12, that divide its share of the batch."""
    share = max(1, batch_rows // gpus)
    return max(rows for rows in range(1, 13) if share % rows == 0)


# ---- scoring


@dataclass(frozen=True)
class Grid:
    """The tasks that one script scores a checkpoint on."""

    script: str  # finetune.py or eval_ir.py
    tasks: list


def grids_of(study):
    """The Grids that every checkpoint of a study is scored with."""
    finetuning = []
    retrieval = []
    for name in task_names(study):
        task = registry.find(name, study.tasks_dir)
        if task.kind == "retrieval":
            retrieval.append(name)
        else:
            finetuning.append(name)
    grids = [Grid("finetune.py", finetuning), Grid("eval_ir.py", retrieval)]
    return [grid for grid in grids if grid.tasks]


def task_names(study):
    """The tasks that every checkpoint is scored on: those of --tasks, or the scale's."""
    lists = {"all": registry.PAPER + registry.PAPER_IR, "demo": registry.DEMO + registry.DEMO_IR}
    if study.tasks:
        return lists.get(study.tasks) or worker.split_names(study.tasks)
    # The scale's local tasks count only where tasks_dir has their files.
    folders = registry.folders(study.tasks_dir) if study.tasks_dir else {}
    local_names = tuple(name for name in study.scale.local.split(",") if name in folders)
    return lists[study.scale.tasks] + local_names


def scoring_job(study, name, grid):
    """The Job that scores the checkpoint of a name with a Grid."""
    place = study.place_of(name)
    path = study.path_of(place)
    kind = grid.script.removesuffix(".py")
    return Job(
        name=f"{name}.{kind}",
        kind=kind,
        words=scoring_words(study, grid, path),
        is_done=partial(has_all_rows, study.scale, grid, path),
        after=[place.run_name],
        cost=len(grid.tasks),
        check=partial(check_source, name, path),
    )


def scoring_words(study, grid, ckpt):
    """finetune.py or eval_ir.py and its settings for a checkpoint."""
    config_file, settings = study.scale.tune[grid.script]
    settings = settings | {
        "ckpt": ckpt,
        "tasks": ",".join(grid.tasks),
        "device": study.device,
        "data_dir": study.tasks_dir,
    }
    config_files = [own_path(config_file)] if config_file else []
    return [own_path(grid.script), *config_files, *flags(settings)]


def has_all_rows(scale, grid, ckpt):
    """True if every trial of a Grid has an intact row."""
    _, settings = scale.tune[grid.script]
    for task in grid.tasks:
        for lr in settings["lrs"]:
            for seed in settings["seeds"]:
                trial = {"task": task, "lr": lr, "seed": seed}
                if not queue.is_done(ckpt, trial, worker.ROW_SHAPE):
                    return False
    return True
