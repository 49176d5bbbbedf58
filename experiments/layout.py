"""A study: its plan, the settings that its commands need, and where its checkpoints are.

The folder of a study:

    out_dir/study.json           the scale and the corpus, and the folder of each model's checkpoint
            610m-clm-42k/        a run of train.py
                step_0042000/    a checkpoint ...
                    trials/      ... and its results
            logs/                what each command printed
            lock                 held while a study.py runs here
"""

import json
import os
from dataclasses import dataclass

from core import checkpoint
from core.configurator import UserError, differences
from core.files import is_new, write_json
from core.schema import read_json
from experiments.plan import run_holding
from experiments.recipes import parse
from experiments.scales import SCALES, Scale, batch_of
from pretraining import data
from tasks import worker

STUDY_SHAPE = {"plan": str, "models": {str: {"folder": str}}}   # what is needed of study.json


@dataclass(frozen=True)
class Launch:
    """How commands are started."""

    program: str  # local: run here; torchrun or slurm: printed
    nodes: int    # machines of a printed training command
    gpus_per_node: int

    @property
    def n_gpus(self):
        """The number of GPUs of a printed training command."""
        return self.nodes * self.gpus_per_node

    @property
    def is_printed(self):
        """True if commands are printed instead of run."""
        return self.program != "local"


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is: its run and its step."""

    run_name: str
    step: int  # the paper's, counted from the run's own step 0


@dataclass(frozen=True)
class Study:
    """What to make, and how."""

    names: list     # the models and checkpoints asked for
    runs: dict      # {name: plan.Run} that make them
    scale: Scale
    out_dir: str    # the study's folder
    data_dir: str   # the corpus of pretraining
    tasks_dir: str  # local data sets of the tasks; "": none
    tasks: str      # what each checkpoint is scored on; "": the scale's tasks
    evaluate: bool  # score the checkpoints, too
    device: str
    compile: bool   # train.py's
    launch: Launch

    @property
    def batch(self):
        """The Batch that a training step reads."""
        return batch_of(self.scale, self.data_dir)

    def path_of(self, place):
        """The folder of the checkpoint at a Place."""
        run_dir = os.path.join(self.out_dir, place.run_name)
        return checkpoint.path_of(run_dir, self.scale.to_step(place.step))

    def place_of(self, name):
        """The Place of the checkpoint that a name asks for."""
        recipe = parse(name)
        if recipe.step:
            return Place(run_holding(recipe, self.runs), recipe.step - recipe.start)
        return Place(name, self.runs[name].steps)

    def source_of(self, run):
        """The Place of the checkpoint that a run begins from; None if from random weights."""
        if run.trunk:
            return Place(run.trunk, run.branch_step)
        if run.recipe.start:
            return Place(run.recipe.parent_name, run.recipe.start)
        return None


# ---- study.json


def write_study(study):
    """Write study.json, or add the study's models to the one in its folder.

    Raises UserError if the folder holds another study, or something else.
    """
    path = os.path.join(study.out_dir, "study.json")
    facts = facts_of(study)
    models = {}
    if os.path.isfile(path):
        old = read_json(path, STUDY_SHAPE)
        # Compare as JSON, in which tuples are lists. If the study was printed where its corpus is
        # missing, its old facts lack those of the corpus.
        facts_as_json = json.loads(json.dumps(facts))
        changed = differences(facts | old, facts_as_json, free=())
        if changed:
            raise UserError(
                f"{study.out_dir} holds another study ({'; '.join(changed)}): "
                "choose another --out_dir"
            )
        facts = facts | old
        models = old["models"]
    else:
        check_folder(study.out_dir)
    for name in study.names:
        folder = study.path_of(study.place_of(name))
        models[name] = {"folder": os.path.relpath(folder, study.out_dir)}
    write_json(path, {"code": worker.git_commit()} | facts | {"models": models})


def check_folder(folder):
    """Raises UserError if a folder holds something else than a study. "lock" is of earlier versions."""
    if not os.path.isfile(os.path.join(folder, "study.json")) and not is_new(folder, "lock"):
        raise UserError(f"{folder} is not empty and holds no study: choose another --out_dir")


def facts_of(study):
    """What may not change while a study's folder is used: the scale and the corpus."""
    facts = {"plan": study.scale.name, "scale": SCALES[study.scale.name]}
    # The machine that prints commands may lack the corpus.
    if not study.launch.is_printed or os.path.isdir(study.data_dir):
        corpus = data.Corpus(study.data_dir, verify=False)
        facts["train_tokens"] = corpus.n_tokens
        facts["tokenizer_hash"] = corpus.tokenizer_hash
    return facts
