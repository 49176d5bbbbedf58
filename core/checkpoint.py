"""Checkpoints that are whole or not there: safetensors, JSON and SHA-256 sums; nothing is ever unpickled.

    out_dir/step_0010000/model.safetensors       weights, fp32, plain parameter names
                         optimizer.safetensors   AdamW's moments: exp_avg.NAME, exp_avg_sq.NAME, step.NAME
                         head.safetensors        a fine-tuned encoder's: its task's head
                         state.json              model dimensions, step, settings and counters of the run
                         SHA256SUMS              of these files, as `sha256sum -c` reads it

A checkpoint is written to a hidden temporary folder, synced to disk and renamed, so a kill or a full disk at any moment
leaves the ones before it as they were.
"""
import dataclasses
import hashlib
import json
import os
import re
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core import tokenizer
from core.configurator import RunError, UserError
from core.files import find_files
from model import Encoder, ModelConfig

SUMS = "SHA256SUMS"


class Damaged(Exception):
    """A checkpoint whose files are missing or not what SHA256SUMS says."""


def path_of(out_dir, step):
    return os.path.join(out_dir, f"step_{step:07d}")


def step_of(path):
    return int(re.fullmatch(r"step_(\d+)", os.path.basename(os.path.normpath(path)))[1])


def all_of(out_dir):
    """Paths of the checkpoints in out_dir, oldest first, unchecked."""
    paths = [path for path in find_files(out_dir, "step_*") if re.fullmatch(r"step_\d+", os.path.basename(path))]
    return sorted(paths, key=step_of)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path):
    """Force a file's or folder's content to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(out_dir, step, model, state, optimizer=None, head=None):
    """Write out_dir/step_NNNNNNN with the model, its optimizer or its task's head, and `state` (JSON values; gains model and step).

    Raises RunError if the disk does not take it; what was there before is untouched then. -> the checkpoint's path
    """
    path, temporary = path_of(out_dir, step), os.path.join(out_dir, f".writing_{step:07d}")
    shutil.rmtree(temporary, ignore_errors=True)
    weights = model.state_dict()
    if model.config.tied:
        del weights["lm_head.weight"]      # safetensors stores a tensor once
    try:
        os.makedirs(temporary)
        save_file({k: v.contiguous().cpu() for k, v in weights.items()}, os.path.join(temporary, "model.safetensors"))
        if optimizer is not None:
            save_file(moments(model, optimizer), os.path.join(temporary, "optimizer.safetensors"))
        if head is not None:
            save_file({k: v.float().cpu() for k, v in head.state_dict().items()}, os.path.join(temporary, "head.safetensors"))
        with open(os.path.join(temporary, "state.json"), "w", encoding="utf-8") as f:
            json.dump(state | {"model": dataclasses.asdict(model.config), "step": step}, f, indent=1)
        names = sorted(os.listdir(temporary))
        with open(os.path.join(temporary, SUMS), "w", encoding="utf-8") as f:
            f.writelines(f"{sha256(os.path.join(temporary, name))}  {name}\n" for name in names)
        for name in [*names, SUMS, ""]:
            sync(os.path.join(temporary, name))
        if results(path):          # a damaged one of the same step that was fine-tuned: its results stay where they are
            for name in [*names, SUMS]:
                os.replace(os.path.join(temporary, name), os.path.join(path, name))
            os.rmdir(temporary)
        else:
            shutil.rmtree(path, ignore_errors=True)    # only a damaged one can stand there
            os.replace(temporary, path)
        sync(out_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"could not save step {step} ({error}); the checkpoints before it are intact: make room in "
                       f"{out_dir} and run the same command again") from None
    return path


def moments(model, optimizer):
    """AdamW's state by parameter name, as safetensors can store it."""
    return {f"{key}.{name}": value.contiguous().cpu() for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()}


def verify(path):
    """Check every file against SHA256SUMS. Raises Damaged."""
    try:
        with open(os.path.join(path, SUMS), encoding="utf-8") as f:
            sums = dict(reversed(line.split(maxsplit=1)) for line in f.read().splitlines())
        if not {"model.safetensors", "state.json"} <= sums.keys():
            raise Damaged(f"{path} is damaged: {SUMS} is not complete")
        for name, expected in sums.items():
            if sha256(os.path.join(path, name)) != expected:
                raise Damaged(f"{path} is damaged: {name} does not match {SUMS}")
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None


def latest(out_dir, say=print):
    """The newest intact checkpoint of out_dir, or None; `say`s which damaged ones it passed over."""
    for path in reversed(all_of(out_dir)):
        try:
            verify(path)
            return path
        except Damaged as error:
            say(f"{error}; falling back to the checkpoint before it")
    return None


def prune(out_dir, keep_last, milestones):
    """Delete old checkpoints. What stays: the newest `keep_last`, the milestones (steps kept for good), checkpoints that
    somebody has fine-tuned, whose results lie in them, and symbolic links, which lead to a folder that is not ours."""
    ordinary = []
    for path in all_of(out_dir):
        if step_of(path) not in milestones and not results(path) and not os.path.islink(path):
            ordinary.append(path)
    for path in ordinary[:-keep_last or None]:
        delete(path, out_dir)


def delete(path, out_dir):
    """Remove the checkpoint `path` of the run `out_dir`. Raises RunError, removing nothing, for a path that is not its own."""
    if os.path.realpath(os.path.dirname(path)) != os.path.realpath(out_dir) or os.path.islink(path):
        raise RunError(f"{path} is not a checkpoint of the run {out_dir}: it was not deleted")
    shutil.rmtree(path)


def results(path):
    """What finetune.py and eval_ir.py have put into a checkpoint's folder: not ours to delete."""
    return [name for name in ("trials", "random", "mteb") if os.path.isdir(os.path.join(path, name))]


def find(path):
    """A checkpoint from its own path or its run's: checked. Raises UserError."""
    if os.path.isfile(os.path.join(path, "state.json")):
        try:
            verify(path)
            return path
        except Damaged as error:
            raise UserError(f"{error}: choose another checkpoint") from None
    found = latest(path)
    if found is None:
        raise UserError(f"no checkpoint at {path}: give a folder RUN/step_NNNNNNN, or a RUN that has one")
    return found


def read_state(path):
    with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
        return json.load(f)


def config_of(path):
    """The ModelConfig of a checkpoint."""
    return ModelConfig(**read_state(path)["model"])


def same_model(there, here, path):
    """Raises UserError if two ModelConfigs differ in more than the length of their sequences."""
    there, here = dataclasses.asdict(there), dataclasses.asdict(here)
    different = [f"{k} is {there[k]} there and {v} here" for k, v in here.items() if k != "block_size" and there[k] != v]
    if different:
        raise UserError(f"{path} holds another model ({'; '.join(different)}): train.py without --size takes that of a checkpoint")


def tokenizer_of(path):
    """The tokenizer of the run a checkpoint belongs to, checked against the run's settings. Raises UserError."""
    found = tokenizer.load(os.path.dirname(os.path.abspath(path)))
    if found.hash.hex() != read_state(path)["settings"]["tokenizer_hash"]:
        raise UserError(f"the tokenizer beside {path} is not the one it was trained with: put the run's own tokenizer.tiktoken and "
                        "tokenizer_info.json back")
    return found


def load(path, model, optimizer=None):
    """Copy weights, and moments if an optimizer is given, from a checked checkpoint. -> its state

    Raises UserError if it belongs to a model of other dimensions, or has no moments to give.
    """
    state = read_state(path)
    same_model(config_of(path), model.config, path)
    weights = load_file(os.path.join(path, "model.safetensors"))
    if model.config.tied:
        weights["lm_head.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights)
    if optimizer is not None:
        stored = os.path.join(path, "optimizer.safetensors")
        if not os.path.isfile(stored):
            raise UserError(f"{path} has no optimizer.safetensors, so training cannot go on from it exactly")
        load_moments(model, optimizer, load_file(stored))
    return state


def load_moments(model, optimizer, stored):
    for name, p in model.named_parameters():
        optimizer.state[p] = {key: stored[f"{key}.{name}"].to(p.device, copy=True)      # copied out of the mapped file
                              for key in ("step", "exp_avg", "exp_avg_sq")}


def load_model(path, device="cpu", attention="auto"):
    """The Encoder of a checkpoint or of a run's newest one, in eval mode. Raises UserError."""
    path = find(path)
    with torch.device("meta"):       # no time spent on random weights
        model = Encoder(config_of(path), attention=attention)
    model.to_empty(device=device)
    if model.config.tied:
        model.lm_head.weight = model.embedding.weight
    load(path, model)
    return model.eval()
