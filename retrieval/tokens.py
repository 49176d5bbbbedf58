"""The token files of a collection's texts: made once, and memory-mapped from then on.

    CACHE_DIR/<name>-<hash>/tokens.bin           all token ids end to end, int32
                            index.safetensors    bounds [n + 1]: where each text begins and ends;
                                                 truncated [1]: how many texts were cut;
                                                 sha256 [32]: a checksum of the three files
                            ids.json             the texts' ids
"""
import itertools
import json
import os

import numpy as np
from safetensors.numpy import load_file, save
from tqdm import tqdm

from core.distributed import shows_progress
from core.schema import parse_json
from tasks import packing

BATCH = 10_000  # texts tokenized at a time: only these are in memory, however large the corpus


def tokenize(texts, tokenizer, max_length, paper_encoding=False):
    """Tokenizes a list of texts. -> a list of int32 arrays, how many texts were cut

    Each text is cut to max_length - 1 tokens and ends with eos, as in pretraining. With
    paper_encoding it has no eos; it begins with <|begin_of_text|> if the tokenizer has one, as
    Llama-3's does, and it is cut to max_length tokens.
    """
    begin, end = [], [tokenizer.eos_id]
    if paper_encoding:
        begin_id = tokenizer.encoding._special_tokens.get("<|begin_of_text|>")
        begin, end = [] if begin_id is None else [begin_id], []
    room = max_length - len(begin) - len(end)
    arrays = []
    n_truncated = 0
    for ids in tokenizer.encode_batch(texts, threads=os.cpu_count() or 1):
        arrays.append(np.array([*begin, *ids[:room], *end], np.int32))
        if len(ids) > room:
            n_truncated += 1
    return arrays, n_truncated


def cached_tokens(name, texts, tokenizer, max_length, key, folder, paper_encoding=False):
    """Tokenizes texts, or opens the files of an earlier run with the same key.

    texts: a function that returns an iterator of (id, text). key: what decides the texts; its
    repr() must change with them.
    -> {"tokens": int32 [N], "bounds": int64 [n + 1], "truncated": int64 [1]}, list of n ids
    """
    # Everything that decides the files. A change of any of it makes new ones.
    rules = [tokenizer.hash.hex(), max_length, key]
    if paper_encoding:
        rules.append("paper_encoding")

    def write(path):
        write_tokens(path, name, texts(), tokenizer, max_length, paper_encoding)

    return packing.cached(folder, name, rules, write, read_tokens)


def read_tokens(folder):
    """Opens the three files of a folder. -> as cached_tokens

    Raises an exception if one is missing or damaged.
    """
    index = load_file(os.path.join(folder, "index.safetensors"))
    contents = packing.without_checksum(index | read_contents(folder))
    ids = parse_json(contents.pop("ids").tobytes(), "ids.json", list)
    return contents, ids


def read_contents(folder):
    """The arrays of tokens.bin and ids.json. -> {"tokens": int32 [N], "ids": uint8}"""
    # Token ids may be larger than memory. They stay on disk until a batch reads them.
    path = os.path.join(folder, "tokens.bin")
    tokens = np.empty(0, np.int32)       # no text: an empty file cannot be mapped
    if os.path.getsize(path):
        tokens = np.memmap(path, np.int32, "r")
    with open(os.path.join(folder, "ids.json"), "rb") as file:
        ids = np.frombuffer(file.read(), np.uint8)
    return {"tokens": tokens, "ids": ids}


def write_tokens(folder, name, texts, tokenizer, max_length, paper_encoding):
    """Tokenizes an iterator of (id, text) into the three files of a new folder."""
    os.makedirs(folder)

    # Tokenize batch by batch. Token ids go to disk; only the texts' ids and lengths stay in memory.
    texts = iter(texts)
    ids = []
    lengths = []
    n_truncated = 0
    is_quiet = not shows_progress()
    with (
        open(os.path.join(folder, "tokens.bin"), "wb") as file,
        tqdm(desc=f"tokenizing {name}", unit="text", leave=False, disable=is_quiet) as bar,
    ):
        while batch := list(itertools.islice(texts, BATCH)):
            batch_texts = [text for _, text in batch]
            arrays, n_cut = tokenize(batch_texts, tokenizer, max_length, paper_encoding)
            file.write(np.concatenate(arrays).tobytes())
            ids += [id_ for id_, _ in batch]
            lengths += map(len, arrays)
            n_truncated += n_cut
            bar.update(len(batch))

    # A text begins where the one before it ends: the bounds are the running sum of the lengths.
    index = {
        "bounds": np.cumsum([0, *lengths], dtype=np.int64),
        "truncated": np.array([n_truncated]),
    }
    with open(os.path.join(folder, "ids.json"), "w", encoding="utf-8") as file:
        json.dump(ids, file)
    index[packing.CHECKSUM] = packing.checksum(index | read_contents(folder))
    with open(os.path.join(folder, "index.safetensors"), "wb") as file:
        file.write(save(index))
