"""Texts of a collection -> token files on disk, made once and memory-mapped from then on.

    CACHE_DIR/<name>-<key>/tokens.bin           all token ids end to end, int32
                           index.safetensors    bounds [n + 1] of the texts in it; truncated [1]
                           ids.json             the texts' ids
"""
import itertools
import json
import os

import numpy as np
from safetensors.numpy import load_file, save
from tqdm import tqdm

from core.distributed import shows_progress
from core.files import read_json
from tasks import packing

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
    rules = [tokenizer.hash.hex(), max_length, key]

    def write(path):
        write_tokens(path, name, texts(), tokenizer, max_length)

    return packing.cached(folder, name, rules, write, read_tokens)


def read_tokens(folder):
    """Opens the three files of a folder. Only the token ids, which are large, stay on disk."""
    index = load_file(os.path.join(folder, "index.safetensors"))
    tokens = np.memmap(os.path.join(folder, "tokens.bin"), np.int32, "r")
    return index | {"tokens": tokens}, read_json(os.path.join(folder, "ids.json"))


def write_tokens(folder, name, texts, tokenizer, max_length):
    """Tokenizes an iterator of (id, text) into the three files of a new folder."""
    os.makedirs(folder)

    # Token ids go to disk batch by batch, and only ids and lengths stay in memory.
    texts = iter(texts)
    ids = []
    lengths = []
    truncated = 0
    is_quiet = not shows_progress()
    with (
        open(os.path.join(folder, "tokens.bin"), "wb") as file,
        tqdm(desc=f"tokenizing {name}", unit="text", leave=False, disable=is_quiet) as bar,
    ):
        while batch := list(itertools.islice(texts, BATCH)):
            arrays, truncated_here = tokenize([text for _, text in batch], tokenizer, max_length)
            file.write(np.concatenate(arrays).tobytes())
            ids += [id_ for id_, _ in batch]
            lengths += map(len, arrays)
            truncated += truncated_here
            bar.update(len(batch))

    # The index is written last: where a text begins follows from the lengths of those before it.
    index = {
        "bounds": np.cumsum([0, *lengths], dtype=np.int64),
        "truncated": np.array([truncated]),
    }
    with open(os.path.join(folder, "index.safetensors"), "wb") as file:
        file.write(save(index))
    with open(os.path.join(folder, "ids.json"), "w", encoding="utf-8") as file:
        json.dump(ids, file)
