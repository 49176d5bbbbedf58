"""Texts of a collection -> token files on disk."""
import hashlib
import itertools
import json
import os
import shutil

import numpy as np
from safetensors.numpy import load_file, save
from tqdm import tqdm

from core.distributed import speaks
from core.files import unique

BATCH = 10_000          # documents tokenized at a time


# ---- tokens

def tokenized(texts, tokenizer, max_length):
    """-> a list of int32 arrays, each a text cut to max_length - 1 tokens, and eos, as in pretraining; how many were cut"""
    found = tokenizer.encode_batch(texts, threads=os.cpu_count() or 1)
    return ([np.array([*ids[:max_length - 1], tokenizer.eos_id], np.int32) for ids in found],
            sum(len(ids) > max_length - 1 for ids in found))


def encoded(name, texts, tokenizer, max_length, key, folder):
    """Texts -> tokens on disk, memory-mapped, made once under each key. texts: a function -> iterator of (id, text).

    -> {"tokens": int32 [N], "bounds": int64 [n + 1], "truncated": [1], how many were cut}, ids [n]. Memory is that of BATCH texts
    and of the ids.
    """
    rules = hashlib.sha256(repr([tokenizer.hash.hex(), max_length, key]).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{name}-{rules}")
    if not os.path.isdir(path):
        temporary, ids, lengths, cut, items = unique(path), [], [], 0, iter(texts())
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        with (open(os.path.join(temporary, "tokens.bin"), "wb") as f,
              tqdm(desc=f"tokenizing {name}", unit="text", leave=False, disable=not speaks()) as bar):
            while batch := list(itertools.islice(items, BATCH)):
                arrays, n = tokenized([text for _, text in batch], tokenizer, max_length)
                f.write(np.concatenate(arrays).tobytes())
                ids += [id_ for id_, _ in batch]
                lengths += map(len, arrays)
                cut += n
                bar.update(len(batch))
        with open(os.path.join(temporary, "index.safetensors"), "wb") as f:
            f.write(save({"bounds": np.cumsum([0, *lengths], dtype=np.int64), "truncated": np.array([cut])}))
        with open(os.path.join(temporary, "ids.json"), "w", encoding="utf-8") as f:
            json.dump(ids, f)
        try:
            os.rename(temporary, path)
        except OSError:                  # another worker was faster
            shutil.rmtree(temporary)
    found = load_file(os.path.join(path, "index.safetensors"))
    with open(os.path.join(path, "ids.json"), encoding="utf-8") as f:
        ids = json.load(f)
    return found | {"tokens": np.memmap(os.path.join(path, "tokens.bin"), np.int32, "r")}, ids
