"""Token sequences laid end to end, without padding, and the cache that keeps them on disk.

The sequences of a split are a dict of arrays, here for n sequences of N tokens in total:

    tokens [N]        each sequence ends with eos, as in pretraining, and has no bos
    bounds [n + 1]    sequence i is tokens[bounds[i]:bounds[i + 1]]
    example [n]       the index of its example: a long context is cut into several sequences
    truncated [1]     how many examples lost tokens to max_length
    ...               what the task's family adds, with a value per token or per sequence
"""
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import time
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import load_file, save
from tqdm import tqdm

from core.configurator import UserError
from core.files import find_files, remove_file_or_folder, unique
from core.schema import parse_json, read_json

VERSION = 3            # raise it when this file encodes in another way: old caches are not read then
CHECKSUM = "sha256"    # what a cache file calls its checksum


# ---- examples to tokens

def encode(family, examples, tokenizer, max_length):
    """The sequences of one split. max_length: tokens of a sequence, eos included."""
    sequences, example_of, n_truncated = [], [], 0
    for index, sequences_of_example, is_cut in family.encode(examples, tokenizer, max_length):
        sequences += sequences_of_example
        example_of += [index] * len(sequences_of_example)
        n_truncated += is_cut

    # one array for all sequences: values per token lie end to end, values per sequence are stacked
    sizes = [len(sequence["tokens"]) for sequence in sequences]
    arrays = {"truncated": np.array([n_truncated]), "example": np.array(example_of),
              "bounds": np.cumsum([0, *sizes])}
    for key in sequences[0]:
        values = [sequence[key] for sequence in sequences]
        array = np.stack(values) if key in family.per_sequence else np.concatenate(values)
        if array.dtype == np.int64:
            array = array.astype(np.int32)
        arrays[key] = array
    return arrays


def encode_task(name, family, examples, fingerprint, tokenizer, max_length, folder):
    """{split: sequences} of a whole task, read from the cache in `folder` if it was encoded before.

    examples: {split: list}. fingerprint: changes with any of the examples (loading.fingerprint).
    """
    def write(path):
        flat = {}
        for split, split_examples in tqdm(examples.items(), desc=f"tokenizing {name}", leave=False):
            for key, array in encode(family, split_examples, tokenizer, max_length).items():
                flat[f"{split}.{key}"] = array
        with open(path, "wb") as f:
            f.write(save(flat | {CHECKSUM: checksum(flat)}))

    def read(path):
        return without_checksum(load_file(path))

    # Everything that decides the arrays: the family's own code, so that you can edit it, and the
    # mode, since the paper's code cuts a long context and the standard mode makes windows of it.
    with open(inspect.getfile(type(family)), "rb") as f:
        code = hashlib.sha256(f.read()).hexdigest()
    is_standard = family.mode != "paper"
    rules = [tokenizer.hash.hex(), fingerprint, family.task.kind, code, max_length, is_standard, VERSION]
    flat = cached(folder, name, rules, write, read, ending=".safetensors")
    splits = {split: {} for split in examples}
    for flat_key, array in flat.items():
        split, _, key = flat_key.partition(".")
        splits[split][key] = array
    return splits


# ---- the cache

@contextlib.contextmanager
def alone_in(folder):
    """While the block runs, other processes of this machine that enter the same folder wait.

    So what takes minutes is made by one process and read by the others. Where the file system has
    no locks, each process makes it.
    """
    os.makedirs(folder, exist_ok=True)
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)                   # the lock ends with it


def cached(folder, name, rules, write, read, ending=""):
    """Read a file or folder, after making it if it does not exist. -> what read(path) returns

    write(path) makes it. Its path is FOLDER/<name>-<hash of rules><ending>. rules: a list of
    everything that decides the content, so that any change makes a new file. It is written under
    another name and then renamed, so that no process ever reads half of it, also when several make
    it at the same time. If read(path) raises anything, the file is damaged, and is made again.
    """
    digest = hashlib.sha256(repr(rules).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{name}-{digest}{ending}")
    temporary = unique(path)
    if os.path.lexists(path):
        try:
            return read(path)
        except Exception as error:         # each format has errors of its own
            reason = " ".join(str(error).split())
            tqdm.write(f"{path} is damaged ({reason[:200]}): it is made again")
        if os.path.islink(path):
            os.unlink(path)
        with contextlib.suppress(FileNotFoundError):     # another process was faster
            os.rename(path, temporary)
    os.makedirs(folder, exist_ok=True)
    remove_file_or_folder(temporary)
    remove_unfinished(path)
    write(temporary)
    try:
        os.replace(temporary, path)
    except OSError:
        if not os.path.isdir(temporary):
            raise
        shutil.rmtree(temporary)           # another process was faster to make this folder
    return read(path)


def remove_unfinished(path):
    """Remove what killed processes left beside a cache file: unfinished ones, untouched for a day."""
    folder, cache_name = os.path.split(path)
    for name in os.listdir(folder):
        if name.startswith(f"{cache_name}."):
            unfinished = os.path.join(folder, name)
            files = [unfinished, *find_files(unfinished, "*")]
            with contextlib.suppress(FileNotFoundError):
                if time.time() - max(map(os.path.getmtime, files)) > 86_400:
                    remove_file_or_folder(unfinished)


def cached_json(folder, name, rules, make, shape):
    """What make() returns, a value for JSON, kept in a file as in cached(). shape: see core/schema.py"""
    def write(path):
        text = json.dumps(make())
        with open(path, "w", encoding="ascii") as f:
            json.dump({CHECKSUM: hashlib.sha256(text.encode()).hexdigest(), "value": text}, f)

    def read(path):
        content = read_json(path, {CHECKSUM: str, "value": str})
        if hashlib.sha256(content["value"].encode()).hexdigest() != content[CHECKSUM]:
            raise UserError("its checksum does not match")
        return parse_json(content["value"], path, shape)

    return cached(folder, name, rules, write, read, ending=".json")


def checksum(arrays):
    """The SHA-256 of {name: array}, as an array of 32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return np.frombuffer(digest.digest(), np.uint8)


def without_checksum(arrays):
    """Arrays as they were before their checksum was added. Raises UserError if it is not theirs."""
    arrays = dict(arrays)
    if CHECKSUM not in arrays:
        raise UserError("it has no checksum, as in earlier versions")
    expected = arrays.pop(CHECKSUM)
    if checksum(arrays).tobytes() != expected.tobytes():
        raise UserError("its checksum does not match")
    return arrays


# ---- tokens to batches

@dataclass
class Batch:
    """Some sequences end to end, on the device."""
    tokens: torch.Tensor        # [T] int64
    cu_seqlens: torch.Tensor    # [S + 1] int32
    lengths: list               # the number of tokens of each sequence
    targets: dict               # {name: tensor} of Family.targets; empty in evaluation


def batch_of(sequences, indices, device, targets=None):
    """The Batch of some sequences. targets: {name: array}, which become bool, int64 or fp32 tensors."""
    tensors = {}
    for name, array in (targets or {}).items():
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        elif array.dtype != bool:
            array = array.astype(np.int64)
        tensors[name] = torch.from_numpy(array).to(device)
    tokens, cu_seqlens = pack(sequences, indices, device)
    return Batch(tokens, cu_seqlens, lengths(sequences, indices).tolist(), tensors)


def pack(sequences, indices, device):
    """tokens [T] int64 and cu_seqlens [S + 1] int32 of some sequences."""
    tokens = torch.from_numpy(rows(sequences, "tokens", indices).astype(np.int64))
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths(sequences, indices)]).astype(np.int32))
    return tokens.to(device), cu_seqlens.to(device)


def lengths(sequences, indices=slice(None)):
    """The number of tokens of each of these sequences; of all if `indices` is not given."""
    bounds = sequences["bounds"]
    return bounds[1:][indices] - bounds[:-1][indices]


def rows(sequences, key, indices):
    """The values that a per-token array has for some sequences, end to end."""
    bounds = sequences["bounds"]
    return np.concatenate([sequences[key][bounds[i]:bounds[i + 1]] for i in indices])


def by_budget(indices, sequences, budget):
    """Cut a list of sequence indices, in its order, into lists of at most `budget` tokens. A
    sequence that is longer than that is alone in its list."""
    batches, size = [[]], 0
    for i, length in zip(indices, lengths(sequences, indices)):
        if batches[-1] and size + length > budget:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += length
    return batches
