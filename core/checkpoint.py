"""Checkpoints that are complete or absent: safetensors, JSON and SHA-256 sums, and no pickles.

    out_dir/step_0010000/model.safetensors       weights, fp32, under the parameters' names
                         optimizer.safetensors   optimizer state: exp_avg.NAME, exp_avg_sq.NAME, step.NAME
                         head.safetensors        the task's head, if this is a fine-tuned encoder
                         state.json              model dimensions, step, settings and counters of the run
                         SHA256SUMS              checksums of these files; `sha256sum -c` reads it

A checkpoint is written to a hidden temporary folder, synced to disk and renamed. So a kill or a
full disk at any moment leaves the checkpoints before it unchanged.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
from collections import defaultdict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core import tokenizer
from core.configurator import RunError, UserError
from core.files import OF_CHECKPOINTS, find_files, remove_leftovers
from core.schema import read_json
from model import Encoder, ModelConfig

SUMS = "SHA256SUMS"
# What every state.json has. Readers that need more declare more.
MODEL_SHAPE = {
    "n_layer": int, "n_head": int, "n_kv_head": int, "n_embd": int, "n_ffn": int, "vocab_size": int,
    "block_size?": int, "rope_theta?": float, "norm_eps?": float, "tied?": bool, "head_dim?": int,
    "rope_scaling?": ({str: float}, None), "qkv_bias?": bool, "qk_norm?": bool,
}
STATE_SHAPE = {
    "step": int, "model": MODEL_SHAPE, "settings?": {"tokenizer_hash?": str},
    "optimizer?": str, "without_optimizer_state?": [str],
}
ADAM = (torch.optim.Adam, torch.optim.AdamW)
# Optimizer state that has the shape and dtype of its parameter: Adam's, and that of SGD.
LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


class Damaged(Exception):
    """A checkpoint whose files are missing or not what SHA256SUMS says."""


def path_of(out_dir, step):
    return os.path.join(out_dir, f"step_{step:07d}")


def has_step_name(path):
    """True if the last part of a path is step_NNNNNNN."""
    return re.fullmatch(r"step_[0-9]+", os.path.basename(os.path.normpath(path))) is not None


def step_of(path):
    """The step of a checkpoint: from its name or, if its folder was renamed, from its state.json."""
    if has_step_name(path):
        return int(os.path.basename(os.path.normpath(path)).removeprefix("step_"))
    return read_state(path)["step"]


def all_of(out_dir):
    """Paths of the checkpoints in out_dir, oldest first. Their files are not checked.

    A checkpoint may be a symbolic link, to a folder on another disk for example.
    """
    paths = []
    for path in find_files(out_dir, "step_*"):
        if has_step_name(path) and (os.path.isdir(path) or os.path.islink(path)):
            paths.append(path)
    return sorted(paths, key=step_of)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path):
    """Force a file to disk, or a folder's list of files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not os.path.isdir(path):      # SMB and some FUSE systems sync files, but no folders
            raise
    finally:
        os.close(handle)


def save(out_dir, step, model, state, optimizer=None, head=None):
    """Write out_dir/step_NNNNNNN and return its path.

    state: JSON values about the run; the model's dimensions and the step are added
    optimizer: if given, its state is saved
    head: if given, the head of a fine-tuned encoder

    Raises RunError if it cannot be written. The earlier checkpoints then stay unchanged.
    """
    path = path_of(out_dir, step)
    temporary = os.path.join(out_dir, f".writing_{step:07d}_{os.urandom(4).hex()}")
    replaced = f"{temporary}_replaced"
    if os.path.isdir(out_dir):
        remove_leftovers(out_dir, pattern=OF_CHECKPOINTS)

    # What goes into which file.
    weights = model.state_dict()
    if model.config.tied:
        del weights["lm_head.weight"]  # the same tensor as the embedding: stored once
    tensors_of = {"model.safetensors": weights}
    if optimizer is not None:
        tensors_of["optimizer.safetensors"] = optimizer_state(model, optimizer)
        state = state | {"optimizer": type(optimizer).__name__}
        without = [name for name, p in model.named_parameters() if not optimizer.state[p]]
        if without:      # parameters that had no gradient yet
            state = state | {"without_optimizer_state": without}
    if head is not None:
        head_weights = {name: value.float() for name, value in head.state_dict().items()}
        tensors_of["head.safetensors"] = head_weights
    facts = state | {"model": dataclasses.asdict(model.config), "step": step}

    try:
        # Write the files into the temporary folder.
        os.makedirs(temporary)
        for file_name, tensors in tensors_of.items():
            on_cpu = {name: value.contiguous().cpu() for name, value in tensors.items()}
            save_tensors(on_cpu, os.path.join(temporary, file_name))
        with open(os.path.join(temporary, "state.json"), "w", encoding="utf-8") as f:
            json.dump(facts, f, indent=1)

        # Add their checksums, and force everything to disk: "" is the folder itself.
        file_names = sorted(os.listdir(temporary))
        with open(os.path.join(temporary, SUMS), "w", encoding="utf-8") as f:
            for name in file_names:
                f.write(f"{sha256(os.path.join(temporary, name))}  {name}\n")
        for name in [*file_names, SUMS, ""]:
            sync(os.path.join(temporary, name))

        # Give the folder its name. A checkpoint that already has this name is a damaged one: it is
        # replaced, but results of fine-tuning in it stay. If it is a link, only the link is removed.
        if os.path.islink(path):
            os.unlink(path)
        if results(path):
            for name in [*file_names, SUMS]:
                os.replace(os.path.join(temporary, name), os.path.join(path, name))
            os.rmdir(temporary)
        else:
            # Move the damaged one away first: on NFS a folder cannot be deleted while somebody
            # reads a file in it.
            if os.path.isdir(path):
                os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced, ignore_errors=True)
        sync(out_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"could not save step {step} ({error}); the checkpoints before it are intact: "
            f"make room in {out_dir} and run the same command again"
        ) from None
    return path


def save_tensors(tensors, path, metadata=None):
    """Write a safetensors file, {name: tensor}, with the permissions that the umask gives any file."""
    open(path, "wb").close()
    mode = os.stat(path).st_mode
    save_file(tensors, path, metadata)      # this alone would let nobody but the owner read it
    with contextlib.suppress(OSError):      # a file system without permissions
        os.chmod(path, mode)


def optimizer_state(model, optimizer):
    """The state of any optimizer of torch's kind, as {"KEY.PARAMETER": tensor}.

    torch's own state_dict numbers the parameters. Names stay right if a fork groups them differently.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    return tensors


def verify(path):
    """Check every file against SHA256SUMS. Raises Damaged."""
    try:
        # A line is a checksum and the name of its file.
        with open(os.path.join(path, SUMS), encoding="utf-8") as f:
            lines = [line.split(maxsplit=1) for line in f.read().splitlines()]
        sums = {name: digest for digest, name in lines}
        if not {"model.safetensors", "state.json"} <= sums.keys():
            raise Damaged(f"{path} is damaged: {SUMS} is not complete")
        for name, expected in sums.items():
            if sha256(os.path.join(path, name)) != expected:
                raise Damaged(f"{path} is damaged: {name} does not match {SUMS}")
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None


def latest(out_dir, log=print):
    """The path of the newest intact checkpoint of out_dir, or None. Logs the damaged ones it passes over."""
    for path in reversed(all_of(out_dir)):
        try:
            verify(path)
            return path
        except Damaged as error:
            log(f"{error}; falling back to the checkpoint before it")
    return None


def prune(out_dir, keep_last, milestones, log=print):
    """Delete all but the newest `keep_last` checkpoints.

    Some are neither counted nor deleted: those at `milestones` (steps), those that hold results of
    fine-tuning, and symbolic links, which may lead to another run's folder. A checkpoint that
    cannot be deleted, as on NFS while somebody reads a file in it, is logged and stays.
    """
    deletable = []
    for path in all_of(out_dir):
        if step_of(path) not in milestones and not results(path) and not os.path.islink(path):
            deletable.append(path)
    n_to_delete = max(0, len(deletable) - keep_last)
    for path in deletable[:n_to_delete]:
        try:
            delete(path, out_dir)
        except OSError as error:
            log(f"warning: could not delete the old checkpoint {path} ({error}); training continues")


def delete(path, out_dir):
    """Delete the checkpoint `path` of the run `out_dir`.

    Raises RunError, and deletes nothing, if the path does not belong to the run.
    """
    if os.path.realpath(os.path.dirname(path)) != os.path.realpath(out_dir) or os.path.islink(path):
        raise RunError(f"{path} is not a checkpoint of the run {out_dir}: it was not deleted")
    shutil.rmtree(path)


def results(path):
    """The folders of results that finetune.py and eval_ir.py wrote into a checkpoint's folder."""
    names = ("trials", "random", "mteb")
    return [name for name in names if os.path.isdir(os.path.join(path, name))]


def find(path):
    """The path of an intact checkpoint, given its own path or its run's. Raises UserError.

    A link, such as `latest`, is followed until the path ends in step_NNNNNNN: that lies in the run's
    folder, even if it is itself a link to another disk.
    """
    if os.path.isfile(os.path.join(path, "state.json")):
        path = os.path.normpath(path)
        while os.path.islink(path) and not has_step_name(path):
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        try:
            verify(path)
            return path
        except Damaged as error:
            raise UserError(f"{error}: choose another checkpoint") from None
    newest = latest(path)
    if newest is None:
        # A folder as on the Hugging Face hub has weights beside its config.json. A run has only the latter.
        has_weights = find_files(path, "*.safetensors") or find_files(path, "pytorch_model*")
        is_foreign = has_weights and os.path.isfile(os.path.join(path, "config.json"))
        if is_foreign or path.startswith("hf:"):
            command = f"python hf.py import {shlex.quote(path.removeprefix('hf:'))} OUT"
            raise UserError(f"{path} is a Hugging Face model: {command}, then give OUT")
        raise UserError(f"no checkpoint at {path}: give a folder RUN/step_NNNNNNN, or a RUN that has one")
    return newest


def read_state(path, shape=STATE_SHAPE):
    """The content of a checkpoint's state.json. Raises UserError if it does not have the shape."""
    return read_json(os.path.join(path, "state.json"), shape)


def config_of(path):
    """The ModelConfig of a checkpoint. Raises UserError if it describes no model that we can make."""
    where = os.path.join(path, "state.json")
    sizes = read_state(path)["model"]
    unknown = sizes.keys() - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise UserError(
            f"{where}: 'model.{min(unknown)}' is unknown here: model.py is not the one it was trained with"
        )
    for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn", "vocab_size", "block_size"):
        if sizes.get(name, 1) < 1:
            raise UserError(f"{where}: 'model.{name}' is {sizes[name]}, not a whole number of at least 1")
    config = ModelConfig(**sizes)
    if config.n_head % config.n_kv_head or config.head_dim < 2 or config.head_dim % 2:
        raise UserError(
            f"{where}: {config.n_head} heads of size {config.head_dim}, {config.n_kv_head} for keys and "
            "values: n_head must be a multiple of n_kv_head, and the size even"
        )
    return config


def same_model(stored, expected, path):
    """Raises UserError if two ModelConfigs differ in more than the length of their sequences."""
    stored = dataclasses.asdict(stored)
    different = []
    for key, value in dataclasses.asdict(expected).items():
        if key != "block_size" and stored[key] != value:
            different.append(f"{key} is {stored[key]} there and {value} here")
    if different:
        raise UserError(
            f"{path} holds another model ({'; '.join(different)}): "
            "train.py without --size takes that of a checkpoint"
        )


def same_tensors(stored, expected, path):
    """Raises UserError, naming one, if a checkpoint has other tensors than the model.

    Then model.py was changed in between. stored, expected: {name: tensor}
    """
    missing = expected.keys() - stored.keys()
    if missing:
        raise UserError(
            f"{path} lacks {min(missing)}, and the model here has it "
            f"({len(missing)} such tensors): model.py is not the one it was trained with"
        )
    unknown = stored.keys() - expected.keys()
    if unknown:
        raise UserError(
            f"{path} has {min(unknown)}, and the model here lacks it "
            f"({len(unknown)} such tensors): model.py is not the one it was trained with"
        )
    for name, value in stored.items():
        if value.shape != expected[name].shape:
            raise UserError(
                f"{path}: {name} has the shape {list(value.shape)}, and the model here has "
                f"{list(expected[name].shape)}"
            )
        if not value.is_floating_point():
            raise UserError(f"{path}: {name} holds {name_of_dtype(value)}, not floating-point numbers")
        check_finite(name, value, path)


def check_finite(name, value, path):
    """Raises UserError if a tensor of a checkpoint holds NaN or infinity."""
    if not torch.isfinite(value).all():
        raise UserError(f"{path}: {name} holds NaN or infinity: choose another checkpoint")


def name_of_dtype(value):
    """A tensor's dtype as a word: "float32"."""
    return str(value.dtype).removeprefix("torch.")


def read_tensors(path):
    """The tensors of a safetensors file, {name: tensor}. Raises UserError if it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another checkpoint") from None


def tokenizer_of(path):
    """The tokenizer of the run that a checkpoint belongs to. Raises UserError if it was exchanged."""
    stored = tokenizer.load(os.path.dirname(os.path.abspath(path)))
    state = read_state(path, {"settings": {"tokenizer_hash": str}})
    if stored.hash.hex() != state["settings"]["tokenizer_hash"]:
        raise UserError(
            f"the tokenizer beside {path} is not the one it was trained with: put the run's own "
            "tokenizer.tiktoken and tokenizer_info.json back"
        )
    return stored


def load(path, model, optimizer=None):
    """Copy a checkpoint's weights into a model, and its optimizer state into an optimizer if given.

    path: from find() or latest(), which verify the files. -> the content of state.json
    Raises UserError if it belongs to another model, or has no optimizer state.
    """
    state = read_state(path)
    same_model(config_of(path), model.config, path)
    weights = read_tensors(os.path.join(path, "model.safetensors"))
    if model.config.tied and "embedding.weight" in weights:
        weights["lm_head.weight"] = weights["embedding.weight"]
    same_tensors(weights, model.state_dict(), path)
    model.load_state_dict(weights)
    if optimizer is not None:
        optimizer_path = os.path.join(path, "optimizer.safetensors")
        if not os.path.isfile(optimizer_path):
            raise UserError(
                f"{path} has no optimizer.safetensors, so training cannot continue from it exactly"
            )
        same_optimizer(state, optimizer, path)
        tensors = read_tensors(optimizer_path)
        without_state = state.get("without_optimizer_state", [])
        check_optimizer_state(model, optimizer, tensors, without_state, optimizer_path)
        load_optimizer_state(model, optimizer, tensors)
    return state


def same_optimizer(state, optimizer, path):
    """Raises UserError if a checkpoint has the state of another optimizer than train.py makes now.

    Early checkpoints do not name theirs.
    """
    here = type(optimizer).__name__
    there = state.get("optimizer", here)
    if there != here:
        raise UserError(
            f"{path} has the optimizer state of {there}, and configure_optimizer in train.py makes {here}: "
            f"make {there} there again, or begin a new schedule from the weights alone with "
            f"--init_from={path} --keep_moments=false"
        )


def check_optimizer_state(model, optimizer, tensors, without_state, path):
    """Raises UserError if optimizer state does not fit the parameters it belongs to.

    A fused optimizer trusts the shapes: it would read and write beyond a tensor that is too small.
    tensors: {"KEY.PARAMETER": tensor}; without_state: names of parameters that need not have any
    """
    parameters = dict(model.named_parameters())
    keys_of = defaultdict(set)      # {parameter: {"exp_avg", "step", ...}}
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise UserError(f"{path} has {full_name}, and the model here has no parameter of that name")
        keys_of[name].add(key)
        shape, dtype = value.shape, value.dtype
        if key in LIKE_PARAMETER:
            shape, dtype = parameters[name].shape, parameters[name].dtype
        elif key == "step":
            shape, dtype = torch.Size(), torch.float32
        if value.shape != shape or value.dtype != dtype:
            raise UserError(
                f"{path}: {full_name} is {name_of_dtype(value)} {list(value.shape)}, not "
                f"{str(dtype).removeprefix('torch.')} {list(shape)}: choose another checkpoint"
            )
        check_finite(full_name, value, path)
        if key in ("step", "exp_avg_sq") and value.min() < 0:
            raise UserError(f"{path}: {full_name} is negative: choose another checkpoint")

    for name in parameters:
        if tensors and name not in keys_of and name not in without_state:
            raise UserError(f"{path} has no optimizer state of {name}: choose another checkpoint")
        # A fork's optimizer may keep anything, but Adam needs all of these.
        needed = {"exp_avg", "exp_avg_sq", "step"} if isinstance(optimizer, ADAM) else set()
        if needed and optimizer.defaults["amsgrad"]:
            needed.add("max_exp_avg_sq")
        missing = needed - keys_of[name] if name in keys_of else set()
        if missing:
            raise UserError(f"{path} lacks {min(missing)}.{name}: choose another checkpoint")


def load_optimizer_state(model, optimizer, tensors):
    """Put what optimizer_state() made into an optimizer of the same kind.

    The optimizer's own load_state_dict decides on which device each tensor belongs.
    """
    # Sort the tensors by parameter: {parameter's name: {"exp_avg": tensor, ...}}
    values_of = defaultdict(dict)
    for key, value in tensors.items():
        state_key, _, name = key.partition(".")
        values_of[name][state_key] = value.clone()  # a copy: the original is mapped from the file

    # load_state_dict knows a parameter by its number, counted through the optimizer's groups.
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    state = {}
    for index, parameter in enumerate(parameters):
        values = values_of.get(name_of[id(parameter)])
        if values:
            state[index] = values
    param_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})


def load_model(path, device="cpu", attention="auto"):
    """The Encoder of a checkpoint, or of a run's newest one, in eval mode. Raises UserError."""
    path = find(path)
    # Random weights would be overwritten at once, so do not spend time on drawing them.
    with torch.device("meta"):
        model = Encoder(config_of(path), attention=attention)
    model.to_empty(device=device)
    if model.config.tied:
        model.lm_head.weight = model.embedding.weight
    load(path, model)
    return model.eval()
