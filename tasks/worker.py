"""One process of a grid of fine-tuning trials: the encoder, a copy of its weights, and what every row says about them.

finetune.py and eval_ir.py each make a Worker of their own of it; the queue it takes trials from is in trials.py.
"""
import json
import os
import subprocess
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import torch

from core import checkpoint, tokenizer
from core.configurator import UserError, differences
from core.device import pick_attention, pick_device, pick_dtype
from core.files import ROOT, unique
from model import Encoder, ModelConfig
from tasks import queue

# what may differ between processes that share a grid: where and how it runs, and how much of it
FREE = ("ckpt", "tasks", "data_dir", "out_dir", "lrs", "seeds", "device", "attention", "micro_tokens", "eval_tokens", "cache_dir",
        "keep")


class Worker:
    """Holds what trials share. c: the settings of finetune.py or eval_ir.py; path: a checkpoint. Raises UserError."""

    def __init__(self, c, path, free=FREE):
        self.c = c
        self.device = pick_device(c.device)
        if self.device == "cuda":
            self.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"      # workers may share one
            torch.cuda.set_device(self.device)      # kernels start on the current one
        self.dtype = "bfloat16" if c.param_dtype == "bfloat16" else pick_dtype(c.dtype, self.device)
        state, self.tokenizer = checkpoint.read_state(path), checkpoint.tokenizer_of(path)
        config = ModelConfig(**state["model"])
        pick_attention(c.attention, self.device, self.dtype, config)      # raises if it cannot run here
        if self.tokenizer.vocab_size != config.vocab_size:
            raise UserError(f"{path} has {config.vocab_size:,} rows of vocabulary, and the tokenizer beside it "
                            f"{self.tokenizer.vocab_size:,}: they do not belong together")
        self.max_length = c.max_length or round(0.99 * config.block_size)
        if self.max_length < 16:
            raise UserError(f"max_length={c.max_length}: expected at least 16 tokens")
        torch.manual_seed(0)
        self.encoder = Encoder(config, c.attention).to(self.device) if c.random_weights else \
            checkpoint.load_model(path, self.device, c.attention)
        self.encoder.to(getattr(torch, c.param_dtype))
        self.weights = {k: v.clone() for k, v in self.encoder.state_dict().items()}
        self.parent = {} if c.random_weights else {k: v for k, v in state.items() if k != "model"}
        run_name = os.path.basename(os.path.dirname(os.path.abspath(path)))
        with open(os.path.join(path, checkpoint.SUMS), encoding="utf-8") as f:
            sums = {name: digest for digest, name in map(str.split, f)}
        device = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu"
        self.facts = {"v": 1, "model": f"{run_name}-{state['step']}" + "-random" * c.random_weights,
                      "step": state["step"], "ckpt_sha": sums["model.safetensors"][:16], "mode": c.mode,
                      "param_dtype": c.param_dtype, "dtype": self.dtype, "causal": c.causal, "max_length": self.max_length,
                      "device": device, "torch": torch.__version__, "code": code()}
        self.settings = {k: v for k, v in asdict(c).items() if k not in free} | {k: self.facts[k] for k in (
            "ckpt_sha", "dtype", "max_length")}
        if not c.steps:
            del self.settings["steps"]      # each task's own

    def autocast(self):
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def restore(self, seed):
        """The encoder as it was before any trial, and the seed of this one."""
        self.encoder.load_state_dict(self.weights)
        torch.manual_seed(seed)

    def parameters(self):
        """What a trial trains of the encoder: all but the LM head."""
        return [p for k, p in self.encoder.named_parameters() if not k.startswith("lm_head")]

    def keep(self, folder, trial, row, head=None):
        """Keep a trial's encoder, and its head, beside its row: a run folder that --ckpt and `hf.py export` take.
        row: what its state.json says of the fine-tuning"""
        folder = queue.path_of(folder, trial, "encoder")
        os.makedirs(folder, exist_ok=True)
        tokenizer.save(self.tokenizer, folder)
        row = {k: v for k, v in row.items() if k not in ("train_loss", "per_item", "secs")}
        state = {"settings": {"tokenizer_hash": self.tokenizer.hash.hex()}, "parent": self.parent, "fine_tuned": row}
        checkpoint.save(folder, row["steps"], self.encoder.float(), state, head=head)
        self.encoder.to(getattr(torch, self.c.param_dtype))

    def settle(self, folder, name, facts, keys=("data", "steps")):
        """Write down, once, with which settings and facts a folder's trials of a task are run; refuse others."""
        path = settings_path(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        settings = self.settings | {k: facts[k] for k in keys}
        queue.finish(path, settings)       # unless it is there
        same_settings(path, settings)

    def refuse_other_settings(self, folder, known):
        """The same before anything is read, also where all trials are done. known: {name: what is known of its facts}"""
        for name, facts in known.items():
            if os.path.isfile(settings_path(folder, name)):
                same_settings(settings_path(folder, name), self.settings | facts)


def keep_items(folder, trial, **arrays):
    """Write each example's own score beside a trial's row. -> the file's name, for the row"""
    path = queue.path_of(folder, trial, "npz")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(unique(path), "wb") as f:
        np.savez_compressed(f, **arrays)
    os.replace(unique(path), path)
    return os.path.basename(path)


def code():
    """The commit of this repository, or None outside of one."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def settings_path(folder, name):
    return os.path.join(folder, "trials", name, "settings.json")


def same_settings(path, settings):
    """Raises UserError if the trials beside path were run with other settings."""
    with open(path, encoding="utf-8") as f:
        old = json.load(f)
    changed = differences(old, {k: v for k, v in settings.items() if k in old}, free=())
    if changed:
        raise UserError(f"{os.path.dirname(path)} holds trials of other settings ({'; '.join(changed)}): choose another --out_dir, "
                        "or delete that folder")


def split_names(text):
    """"sst2, my task" -> ("sst2", "my task"): a task of one's own is called as its folder, which may have spaces in its name."""
    names = [name.strip() for name in text.split(",")]
    return tuple(name for name in names if name)


def check(c, every, demo):
    """Raises UserError for what is wrong with the settings alone. every, demo: what --tasks=all and --tasks=demo mean.
    -> names of the tasks"""
    if not c.ckpt:
        raise UserError("which encoder? --ckpt=RUN/step_NNNNNNN, or --ckpt=RUN for its newest checkpoint")
    names = {"all": every, "demo": demo}.get(c.tasks) or split_names(c.tasks)
    if not names or not c.lrs or any(type(lr) is not float or not 0 < lr < float("inf") for lr in c.lrs):
        raise UserError(f"tasks={c.tasks}, lrs={c.lrs}: expected names, and learning rates above 0 written as in 1e-5")
    if not c.seeds or any(type(seed) is not int or seed < 0 for seed in c.seeds):
        raise UserError(f"seeds={c.seeds}: expected whole numbers, as in 0,1,2")
    known = {"mode": ("standard", "paper"), "param_dtype": ("float32", "bfloat16")}
    for key, allowed in known.items():
        if getattr(c, key) not in allowed:
            raise UserError(f"{key}={getattr(c, key)}: expected {' or '.join(allowed)}")
    if min(c.batch, c.micro_tokens) < 1 or min(c.eval_tokens, c.steps) < 0 or not 0 <= c.warmup < 1:
        raise UserError("batch, micro_tokens and eval_tokens must be at least 1, steps at least 0, and 0 <= warmup < 1")
    if not c.grad_clip >= 0:      # NaN fails, too
        raise UserError(f"grad_clip={c.grad_clip}: expected the largest norm a step's gradients may have, or 0 for no clipping")
    return tuple(dict.fromkeys(names))
