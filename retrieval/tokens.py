"""Texts of a collection -> token files on disk, made once and memory-mapped from then on.

    CACHE_DIR/<name>-<key>/tokens.bin           all token ids end to end, int32
                           index.safetensors    bounds [n + 1] of the texts in it; truncated [1]
                           ids.json             the texts' ids
"""
import hashlib
import itertools
import json
import os
import shutil

import numpy as np
from safetensors.numpy import load_file, save
from tqdm import tqdm

from core.distributed import speaks
from core.files import read_json, unique

BATCH = 10_000  # texts tokenized at a time; a corpus of any size needs the memory of these


def tokenize(texts, tokenizer, max_length):
    """Tokenizes a list of texts, each cut to max_length - 1 tokens and closed by eos.

    -> a list of int32 arrays, as in pretraining; how many texts were cut
    """
    arrays = []
    truncated = 0
    for ids in tokenizer.encode_batch(texts, threads=os.cpu_count() or 1):
        arrays.append(np.array([*ids[: max_length - 1], tokenizer.eos_id], np.int32))
        if len(ids) > max_length - 1:
            truncated += 1
    return arrays, truncated


def encoded(name, texts, tokenizer, max_length, key, folder):
    """Tokenizes texts, or opens the files of an earlier run with the same key.

    texts: a function that returns an iterator of (id, text). key: whatever else decides the texts;
    its repr() must change with them. -> ({"tokens": int32 [N], "bounds": int64 [n + 1],
    "truncated": int64 [1], how many texts were cut}, list of n ids)
    """
    rules = repr([tokenizer.hash.hex(), max_length, key])
    path = os.path.join(folder, f"{name}-{hashlib.sha256(rules.encode()).hexdigest()[:16]}")
    if not os.path.isdir(path):
        # Write under another name and rename at the end: a folder is complete or absent.
        temporary = unique(path)
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        write_tokens(temporary, name, texts(), tokenizer, max_length)
        try:
            os.rename(temporary, path)
        except OSError:  # another worker was faster
            shutil.rmtree(temporary)
    # Only the token ids stay on disk; bounds and ids are small.
    index = load_file(os.path.join(path, "index.safetensors"))
    tokens = np.memmap(os.path.join(path, "tokens.bin"), np.int32, "r")
    return index | {"tokens": tokens}, read_json(os.path.join(path, "ids.json"))


def write_tokens(folder, name, texts, tokenizer, max_length):
    """Tokenizes an iterator of (id, text) into the three files of a folder."""
    # Token ids go to disk batch by batch; the bounds follow from the lengths at the end.
    texts = iter(texts)
    ids = []
    lengths = []
    truncated = 0
    with (
        open(os.path.join(folder, "tokens.bin"), "wb") as file,
        tqdm(desc=f"tokenizing {name}", unit="text", leave=False, disable=not speaks()) as bar,
    ):
        while batch := list(itertools.islice(texts, BATCH)):
            arrays, truncated_here = tokenize([text for _, text in batch], tokenizer, max_length)
            file.write(np.concatenate(arrays).tobytes())
            ids += [id_ for id_, _ in batch]
            lengths += map(len, arrays)
            truncated += truncated_here
            bar.update(len(batch))
    index = {
        "bounds": np.cumsum([0, *lengths], dtype=np.int64),
        "truncated": np.array([truncated]),
    }
    with open(os.path.join(folder, "index.safetensors"), "wb") as file:
        file.write(save(index))
    with open(os.path.join(folder, "ids.json"), "w", encoding="utf-8") as file:
        json.dump(ids, file)
