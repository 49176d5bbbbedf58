"""One process of a grid of fine-tuning trials: the encoder, a copy of its pretrained weights, and
the facts that every row records.

finetune.py and eval_ir.py each derive their own worker from this one. Loading a checkpoint takes
longer than resetting the encoder, so a worker loads it once and copies the weights back before each
trial. tasks/queue.py hands out the trials.
"""
import os
import subprocess
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import torch

from core import checkpoint, tokenizer
from core.configurator import (
    Beta,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Path,
    PositiveFloat,
    PositiveInt,
    Seed,
    UserError,
    differences,
)
from core.device import pick_attention, pick_device, pick_dtype
from core.distributed import number_in
from core.files import ROOT, check_regular, unique
from core.schema import read_json
from model import Encoder
from tasks import queue


@dataclass
class GridSettings:
    """The settings that finetune.py and eval_ir.py share.

    Each program adds settings of its own, and repeats a shared one to give it another default or
    comment.
    """
    # what
    ckpt: Path = ""                       # RUN/step_NNNNNNN, or RUN for its newest one
    tasks: str = "demo"                   # names with commas between them, all (the paper's) or demo
    data_dir: Path = ""                   # local data instead of the hub
    out_dir: Path = ""                    # where trials/ is written; the checkpoint's folder if empty
    lrs: tuple[PositiveFloat, ...] = (    # peak learning rates, the paper's six
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4,
    )
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)  # of the order of the data, and of a new head
    random_weights: bool = False          # the same model from random weights: what pretraining is worth
    keep: bool = False                    # keep each trial's encoder as a checkpoint beside its row
    # how
    mode: str = "standard"                # standard, or paper: the scores of the paper's code
    steps: NonNegativeInt = 0             # of each trial; 0: the paper's
    batch: PositiveInt = 32               # sequences in a step: examples, or windows of long ones
    warmup: Fraction = 0.1                # share of the steps
    beta1: Beta = 0.9                     # AdamW
    beta2: Beta = 0.95                    # AdamW
    adam_eps: PositiveFloat = 1e-5        # AdamW
    weight_decay: NonNegativeFloat = 0.1  # on matrices, not on norms and biases
    grad_clip: NonNegativeFloat = 1.0     # global norm; 0: no clipping
    max_length: NonNegativeInt = 0       # tokens of a sequence; 0: 0.99 of the encoder's own (2,028 of 2,048)
    causal: bool = False                  # keep the causal mask, as an ablation
    param_dtype: str = "float32"      # of weights and AdamW state; bfloat16: the paper's, loses small updates
    # system
    device: str = "auto"                  # cuda where there is one, else cpu
    dtype: str = "auto"                   # bfloat16 (autocast) where it is fast, else float32
    attention: str = "auto"               # triton or varlen (CUDA), sdpa (anywhere) or reference
    micro_tokens: PositiveInt = 16_384    # tokens in a forward and backward pass
    eval_tokens: PositiveInt = 8_192      # tokens in a forward pass of evaluation
    cache_dir: Path = "data/tasks"        # tokenized data sets


# Settings that may differ between the processes of a grid: they say how and where a process runs,
# and which trials, but not what a trial is.
FREE = ("ckpt", "tasks", "data_dir", "out_dir", "lrs", "seeds", "device", "attention",
        "micro_tokens", "eval_tokens", "cache_dir", "keep")

# What a finished trial's row has; a program writes more. The second shape is a failed trial's.
ROW_SHAPE = (
    {"model": str, "task": str, "lr": float, "seed": int, "failed?": bool,
     "validation": {"score": float}, "test": {"score": float}},
    {"model": str, "task": str, "lr": float, "seed": int, "failed": bool,
     "validation": None, "test": None},
)
# the settings.json beside the rows; it has the other settings, too
SETTINGS_SHAPE = {"ckpt_sha": str, "dtype": str, "max_length": int, "data": str, "steps": int}


def split_names(text):
    """The names in a list like "sst2,my task". -> ("sst2", "my task")

    Your own task has the name of its folder, which may contain spaces.
    """
    names = [name.strip() for name in text.split(",")]
    return tuple(name for name in names if name)


def check(c, all_names, demo_names):
    """The names of the tasks. Raises UserError for a setting that is wrong with any checkpoint.

    c: GridSettings. all_names, demo_names: what --tasks=all and --tasks=demo stand for.
    """
    if not c.ckpt:
        raise UserError("which encoder? --ckpt=RUN/step_NNNNNNN, or --ckpt=RUN for its newest "
                        "checkpoint")
    names = []
    for name in split_names(c.tasks):
        names += {"all": all_names, "demo": demo_names}.get(name, [name])
    if not names or not c.lrs or not c.seeds:
        raise UserError("tasks, lrs and seeds need at least one value each, as in --tasks=sst2")
    if c.mode not in ("standard", "paper"):
        raise UserError(f"mode={c.mode}: expected standard or paper")
    if c.param_dtype not in ("float32", "bfloat16"):
        raise UserError(f"param_dtype={c.param_dtype}: expected float32 or bfloat16")
    return tuple(dict.fromkeys(names))      # each name once


class Worker:
    """Holds what all trials of a process share.

    c: GridSettings. path: the checkpoint's folder. free: names of the settings that may differ
    between the processes of a grid. Raises UserError if the settings do not fit the checkpoint.
    """

    def __init__(self, c, path, free=FREE):
        self.c = c
        self.device = local_device(c.device)
        self.dtype = "bfloat16" if c.param_dtype == "bfloat16" else pick_dtype(c.dtype, self.device)
        state = checkpoint.read_state(path)
        self.tokenizer = checkpoint.tokenizer_of(path)
        config = checkpoint.config_of(path)
        # called for its UserError, if this attention cannot run here
        pick_attention(c.attention, self.device, self.dtype, config)
        if self.tokenizer.vocab_size != config.vocab_size:
            raise UserError(f"{path} has a vocabulary of {config.vocab_size:,}, but the tokenizer "
                            f"beside it has {self.tokenizer.vocab_size:,}: they do not belong "
                            "together")
        self.max_length = c.max_length or round(0.99 * config.block_size)
        if self.max_length < 16:
            raise UserError(f"max_length={c.max_length}: expected at least 16 tokens")

        # The encoder, a copy of the weights that every trial starts from, and what the checkpoint
        # says about its pretraining.
        torch.manual_seed(0)
        if c.random_weights:
            self.encoder = Encoder(config, c.attention).to(self.device)
            self.parent = {}
        else:
            self.encoder = checkpoint.load_model(path, self.device, c.attention)
            self.parent = {key: value for key, value in state.items() if key != "model"}
        self.encoder.to(getattr(torch, c.param_dtype))
        self.weights = {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}

        # What every row records, and the settings that all rows of a folder must share.
        self.facts = self.describe(path, state["step"])
        self.settings = {key: value for key, value in asdict(c).items() if key not in free}
        self.settings |= {key: self.facts[key] for key in ("ckpt_sha", "dtype", "max_length")}
        if not c.steps:
            del self.settings["steps"]      # then each task has its own number of steps

    def describe(self, path, step):
        """The facts about encoder, settings and machine that every row records."""
        name = f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}-{step}"
        if self.c.random_weights:
            name += "-random"
        device_name = "cpu"
        if self.device.startswith("cuda"):
            device_name = torch.cuda.get_device_name(self.device)
        return {"v": 1, "model": name, "step": step, "ckpt_sha": weights_digest(path)[:16],
                "mode": self.c.mode, "param_dtype": self.c.param_dtype, "dtype": self.dtype,
                "causal": self.c.causal, "max_length": self.max_length, "device": device_name,
                "torch": torch.__version__, "code": git_commit()}

    def autocast(self):
        """The context manager that forward passes run in."""
        if self.dtype == "bfloat16":
            return torch.autocast(self.device.partition(":")[0], torch.bfloat16)
        return nullcontext()

    def restore(self, seed):
        """Reset the encoder to its pretrained weights, and torch's random numbers to a seed."""
        self.encoder.load_state_dict(self.weights)
        torch.manual_seed(seed)

    def parameters(self):
        """The parameters of the encoder that a trial trains: all but the LM head."""
        return [p for name, p in self.encoder.named_parameters() if not name.startswith("lm_head")]

    def save_encoder(self, out_dir, trial, row, head=None):
        """Save a trial's encoder, and its head, in a folder beside its row.

        --ckpt and `hf.py export` accept this folder as a run. row: its state.json records it under
        "fine_tuned".
        """
        folder = queue.path_of(out_dir, trial, "encoder")
        os.makedirs(folder, exist_ok=True)
        tokenizer.save(self.tokenizer, folder)
        left_out = ("train_loss", "per_item", "secs")
        row = {key: value for key, value in row.items() if key not in left_out}
        state = {"settings": {"tokenizer_hash": self.tokenizer.hash.hex()},
                 "parent": self.parent, "fine_tuned": row}
        checkpoint.save(folder, row["steps"], self.encoder.float(), state, head=head)
        self.encoder.to(getattr(torch, self.c.param_dtype))

    def record_settings(self, out_dir, name, facts, keys=("data", "steps")):
        """Write the settings of a task's trials into their settings.json.

        Raises UserError if an earlier worker has written other ones. keys: the facts that belong to
        the settings.
        """
        path = settings_path(out_dir, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        settings = self.settings | {key: facts[key] for key in keys}
        queue.finish(path, settings)       # an existing file stays
        self.check_same_settings(path, settings)

    def refuse_other_settings(self, out_dir, facts_of_tasks):
        """Raise UserError if earlier trials of a task have other settings. Reads no data for that.

        facts_of_tasks: {name: the facts about its trials that are known without its data}
        """
        for name, facts in facts_of_tasks.items():
            path = settings_path(out_dir, name)
            if os.path.lexists(path):
                self.check_same_settings(path, self.settings | facts)

    def check_same_settings(self, path, settings):
        """Raise UserError if the settings.json at path holds other settings, or is damaged.

        A setting that the file lacks is newer than the file: its trials had the default.
        """
        folder = os.path.dirname(path)
        try:
            check_regular(path)
            old = read_json(path, SETTINGS_SHAPE)
        except UserError as error:
            raise UserError(f"{error}. It should hold the settings of the trials beside it: choose "
                            f"another --out_dir, or move {folder} away") from None
        old = asdict(type(self.c)()) | old
        shared = {key: value for key, value in settings.items() if key in old}
        changed = differences(old, shared, free=())
        if changed:
            raise UserError(f"{folder} holds trials of other settings ({'; '.join(changed)}): "
                            "choose another --out_dir, or delete that folder")


def local_device(name):
    """The device of this process. If there are several GPUs, torchrun's LOCAL_RANK chooses one. If
    there are more processes than GPUs, they share them."""
    device = pick_device(name)
    if device == "cuda":
        local_rank = number_in("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)      # kernels start on the current device
    return device


def weights_digest(path):
    """The SHA-256 of a checkpoint's weights, 64 hex digits, as its SHA256SUMS says."""
    with open(os.path.join(path, checkpoint.SUMS), encoding="utf-8") as f:
        for line in f:
            digest, name = line.split(maxsplit=1)
            if name.rstrip() == "model.safetensors":
                return digest
    raise UserError(f"{path} is damaged: {checkpoint.SUMS} does not list model.safetensors")


def git_commit():
    """The commit of this repository, or None outside of a git checkout.

    It ends in "-dirty" if a file of the commit has been changed since.
    """
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:                        # git is not installed
        return None
    return done.stdout.strip() or None


def save_example_scores(out_dir, trial, **scores_of_split):
    """Write each example's own score to an .npz beside a trial's row. -> the name of the file

    scores_of_split: an array for each split.
    """
    path = queue.path_of(out_dir, trial, "npz")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(unique(path), "wb") as f:
        np.savez_compressed(f, **scores_of_split)
    os.replace(unique(path), path)
    return os.path.basename(path)


def settings_path(out_dir, name):
    return os.path.join(out_dir, "trials", name, "settings.json")
