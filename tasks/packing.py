"""Examples of tasks.py -> packed token ids, once a tokenizer, kept as flat arrays.

An encoded split is a dict of arrays over N tokens in n sequences:

    tokens [N], bounds [n + 1]    sequence i is tokens[bounds[i]:bounds[i + 1]]; each ends with eos, as in pretraining; no bos
    example [n]                   the example it belongs to; a long question's paragraph is cut into several sequences
    target                        sequence: label [n]. token: tag of each token's word [N], -100 at eos.
                                  span: characters (start, end) of the first answer [n, 2], -1 without one
    word, first [N]               token: index of the token's word, -1 at eos; is it the one that stands for the word?
    span [N, 2]                   span: the characters of the context each token has bytes of, -1 outside the context
    truncated [1]                 how many examples lost tokens to max_length

Ids are the same as those of one joint encoding of the text: no pattern of ours spans a word and the space behind it.
"""
import functools
import hashlib
import os

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from core.files import unique
from tasks import registry

VERSION = 1            # of the rules below: a change of them makes old caches invalid
STRIDE = 128           # tokens that neighbouring windows of a paragraph share


def encode(task, examples, tokenizer, max_length, windows=True):
    """One split -> its arrays. max_length: tokens of a sequence, eos included. windows=False: a paragraph's first window only."""
    pieces = {"sequence": sequence_pieces, "token": token_pieces, "span": span_pieces}[task.kind]
    found, truncated = [], 0
    for i, parts, cut in pieces(examples, tokenizer, max_length, windows):
        found += [part | {"example": i} for part in parts]
        truncated += cut
    out = {"truncated": np.array([truncated]), "example": np.array([part["example"] for part in found]),
           "bounds": np.cumsum([0] + [len(part["tokens"]) for part in found])}
    for key in found[0].keys() - {"example"}:
        values = [part[key] for part in found]
        # one value a sequence, or one a token
        out[key] = np.stack(values).astype(np.int32) if key == "target" and task.kind != "token" else np.concatenate(values)
    return out


def sequence_pieces(examples, tokenizer, max_length, windows):
    """Yields (example index, its sequences, was it cut?)."""
    encoded = tokenizer.encode_batch([e["text"] for e in examples], threads=os.cpu_count() or 1)
    for i, (e, ids) in enumerate(zip(examples, encoded)):
        tokens = np.array([*ids[:max_length - 1], tokenizer.eos_id], np.int32)
        yield i, [{"tokens": tokens, "target": np.array(e["label"])}], len(ids) > max_length - 1


def token_pieces(examples, tokenizer, max_length, windows):
    blank = {i for token, i in tokenizer.encoding._mergeable_ranks.items() if not token.strip()}

    @functools.cache
    def of_word(text):
        """ids, and which stands for the word: the first that is not a bare space (" 1996" may be " ", "199", "6"), -1 if none."""
        ids = tokenizer.encode(text)
        return ids, next((k for k, token in enumerate(ids) if token not in blank), -1)

    for i, e in enumerate(examples):
        ids, words, first = [], [], []
        for w, word in enumerate(e["words"]):
            of, k = of_word(word if w == 0 else f" {word}")
            ids += of
            words += [w] * len(of)
            first += [j == k for j in range(len(of))]
        n = min(len(ids), max_length - 1)
        tags = np.array(e["tags"], np.int32)
        yield i, [{"tokens": np.array([*ids[:n], tokenizer.eos_id], np.int32), "word": np.array([*words[:n], -1], np.int32),
                   "first": np.array([*first[:n], False]),
                   "target": np.append(tags[words[:n]], -100).astype(np.int32)}], n < len(ids)


def span_pieces(examples, tokenizer, max_length, windows):
    of_context = functools.lru_cache(1000)(tokenizer.encode_with_offsets)        # neighbours ask about one paragraph
    for i, e in enumerate(examples):
        prefix = tokenizer.encode(f"Question: {e['question']}\nContext: ")
        prefix, long = prefix[:max_length // 2], len(prefix) > max_length // 2
        ids, spans = of_context(e["context"])
        room = max_length - 1 - len(prefix)
        stride = min(STRIDE, room // 2)
        answer = np.array([e["answers"][0][1], e["answers"][0][1] + len(e["answers"][0][0])] if e["answers"] else [-1, -1])
        outside = np.full((len(prefix), 2), -1, np.int32)
        starts = range(0, max(1, len(ids) - stride), room - stride) if windows else (0,)
        yield i, [{"tokens": np.array([*prefix, *ids[a:a + room], tokenizer.eos_id], np.int32), "target": answer,
                   "span": np.concatenate([outside, spans[a:a + room], [[-1, -1]]]).astype(np.int32)} for a in starts
                  ], long or (not windows and len(ids) > room)


def cached(name, task, examples, tokenizer, max_length, windows, folder):
    """{split: arrays} of a whole data set, from folder if it was encoded there before under the same rules."""
    rules = [tokenizer.hash.hex(), registry.fingerprint(examples), task.kind, max_length, windows, VERSION]
    key = hashlib.sha256(repr(rules).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{name}-{key}.safetensors")
    try:
        flat = load_file(path)
    except (OSError, SafetensorError):
        flat = {f"{split}.{k}": v for split, part in tqdm(examples.items(), desc=f"tokenizing {name}", leave=False)
                for k, v in encode(task, part, tokenizer, max_length, windows).items()}
        os.makedirs(folder, exist_ok=True)
        with open(unique(path), "wb") as f:
            f.write(save(flat))
        os.replace(unique(path), path)
    return {split: {k.partition(".")[2]: v for k, v in flat.items() if k.startswith(f"{split}.")} for split in examples}


def lengths(encoded, indices=slice(None)):
    """Tokens of these sequences, by default of all."""
    return encoded["bounds"][1:][indices] - encoded["bounds"][:-1][indices]


def by_budget(indices, encoded, budget):
    """Cut a list of sequences, in its order, into lists of at most `budget` tokens; a longer sequence is alone."""
    batches, size = [[]], 0
    for i, n in zip(indices, lengths(encoded, indices)):
        if batches[-1] and size + n > budget:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += n
    return batches


def rows(encoded, key, indices):
    """The part of a per-token array that belongs to some sequences, end to end."""
    bounds = encoded["bounds"]
    return np.concatenate([encoded[key][bounds[i]:bounds[i + 1]] for i in indices])


def pack(encoded, indices, device):
    """-> tokens [T] int64, cu_seqlens [S + 1] int32 of these sequences"""
    tokens = torch.from_numpy(rows(encoded, "tokens", indices).astype(np.int64))
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths(encoded, indices)]).astype(np.int32))
    return tokens.to(device), cu_seqlens.to(device)
