"""Token shards -> rows -> sequences -> batches, every choice a pure function of (seed, epoch,
index).

A corpus split is one long stream of `document tokens + eos`, stored in shards. Row w is the tokens
[w*L, (w+1)*L) of that stream, L = block_size. An epoch is one permutation of the rows, and step s
takes the next `batch_rows` of it. Nothing here keeps state. So a resumed run, another number of
GPUs or another micro-batch reads exactly the same tokens under the same masks, and a checkpoint
needs no loader state.

The paper (arXiv 2507.00994, footnote 6 and section 2) trains on sequences of 12 to 2,048 tokens:
each row is cut once into two sequences that do not see each other.
"""

import json
import os
import shlex
import threading
from dataclasses import dataclass, replace

import numpy as np
import torch

import objectives
from core.configurator import RunError, UserError
from core.files import ahead, find_files
from core.rng import CUT, hashed, permute
from corpus.shards import HEADER_BYTES, read_header, verify_shard

VERIFY_AT_ONCE = 2 << 30  # bytes; larger corpora are checked while training runs
MIN_LENGTH = 12  # tokens of the paper's shortest sequence


@dataclass(frozen=True)
class DataSettings:
    """Everything that decides which tokens a step sees and what it hides of them."""

    block_size: int  # tokens of a row
    batch_rows: int  # rows of a step, over all processes
    random_length: bool = True  # cut each row once, at a random place
    document_mask: bool = False  # also cut at the end of each document
    mask_rate: float = 0.4  # share of the ordinary tokens that are hidden
    mask_replace: tuple = (
        1.0,
        0.0,
        0.0,
    )  # of the hidden tokens: become [mask], a random id, or stay
    seed: int = 42
    first_row: int = 0  # rows that the runs before this one have read


# ---------------------------------------------------------------------------------------------------
# the corpus


class Corpus:
    """One split ("train" or "val") of a prepared corpus: a stream of tokens over memory-mapped
    shards."""

    def __init__(self, data_dir, split="train", verify=True):
        """Raises UserError for a missing, unfinished, truncated, corrupted or mixed corpus, with
        the command that mends it."""
        self.split = split
        manifest = os.path.join(data_dir, "manifest.json")
        if not os.path.isfile(manifest):
            command = f"python prepare_fineweb.py --source=sotu --out={shlex.quote(data_dir)}"
            raise UserError(
                f"no corpus in '{data_dir}'; make one with: {command} (sotu is the demo corpus; any "
                "file or folder of text will do)"
            )
        with open(manifest, encoding="utf-8") as f:
            if not json.load(f)["complete"]:
                raise UserError(
                    f"the corpus in '{data_dir}' is unfinished: run its prepare_fineweb.py command again"
                )
        self.paths = find_files(data_dir, f"{split}_*.bin")
        headers = [read_header(path) for path in self.paths]
        # where in the stream each shard begins, and where the last one ends
        self.ends = np.cumsum([0] + [int(header["tokens"]) for header in headers])
        self.n_tokens = int(self.ends[-1])
        if self.n_tokens == 0:
            hint = " or with a larger --val_fraction" if split == "val" else ""
            raise UserError(
                f"the {split} split of '{data_dir}' is empty: prepare it from more text{hint}"
            )
        self.tokenizer_hash = headers[0]["tokenizer_hash"].tobytes().hex()
        for path, header in zip(self.paths, headers):
            if header["tokenizer_hash"].tobytes().hex() != self.tokenizer_hash:
                raise UserError(
                    f"{path} was made with another tokenizer than {self.paths[0]}: prepare the corpus "
                    "anew in an empty folder"
                )
        self.vocab_size = int(headers[0]["vocab_size"])
        self.eos_id = int(headers[0]["eos_id"])
        self.mask_id = int(headers[0]["mask_id"])
        self.special_start = int(headers[0]["special_start"])  # ids from here on are special tokens
        self.shards = []
        for path, header in zip(self.paths, headers):
            dtype = np.uint16 if header["itemsize"] == 2 else np.uint32
            self.shards.append(np.memmap(path, dtype, "r", offset=HEADER_BYTES))

        # Reading a large corpus only to check it would take minutes, so that is done in the
        # background.
        self.damage = None
        if verify and sum(os.path.getsize(path) for path in self.paths) <= VERIFY_AT_ONCE:
            for path, header in zip(self.paths, headers):
                verify_shard(path, header)
        elif verify:
            threading.Thread(target=self.verify_all, args=(headers,), daemon=True).start()

    def verify_all(self, headers):
        try:
            for path, header in zip(self.paths, headers):
                verify_shard(path, header)
        except UserError as error:
            self.damage = error  # read() raises it: the next step stops, the last checkpoint stands

    def read(self, start, count):
        """Tokens [start, start + count) of the stream, across the ends of shards. -> int64
        [count]"""
        if self.damage:
            raise RunError(str(self.damage))
        tokens = np.empty(count, np.int64)
        done = 0
        shard = int(np.searchsorted(self.ends, start, "right")) - 1
        while done < count:
            place = start + done - self.ends[shard]
            piece = self.shards[shard][place:][: count - done]
            tokens[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return tokens


# ---------------------------------------------------------------------------------------------------
# rows and batches


@dataclass
class Rows:
    """R rows laid end to end: T = R * block_size tokens in S sequences."""

    tokens: np.ndarray  # [T] int64
    cu_seqlens: np.ndarray  # [S+1] int32, where each sequence starts, and T
    position: (
        np.ndarray
    )  # [T] int64, place in the corpus' stream: with seed and epoch, the key of every mask
    epoch: np.ndarray  # [T] int64
    is_filler: np.ndarray  # [R] bool: rows that only keep a shape the same; they get no targets


@dataclass
class Batch:
    """What the model and the loss take. N is a fixed number, so that shapes stay the same under
    torch.compile."""

    tokens: torch.Tensor  # [T] int64, with tokens hidden
    cu_seqlens: torch.Tensor  # [S+1] int32
    positions: torch.Tensor  # [N] int64, places in tokens whose hidden state is needed
    targets: torch.Tensor  # [N] int64, the id to predict there; -100 where there is none
    causal: bool
    num_targets: int  # how many targets are not -100
    lengths: np.ndarray  # [S] int64, on the host, to count FLOPs

    def to(self, device):
        """Copy to the device. From pinned memory the copy overlaps with computation."""
        return replace(
            self,
            **{name: getattr(self, name).to(device, non_blocking=True) for name in self.tensors()},
        )

    def pin(self):
        """Move to pinned memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in self.tensors()})

    @staticmethod
    def tensors():
        return "tokens", "cu_seqlens", "positions", "targets"


def count_rows(corpus, settings):
    """Rows of block_size tokens in a split. Raises UserError if there is none, or block_size is too
    small to cut."""
    n_rows = corpus.n_tokens // settings.block_size
    if n_rows == 0:
        hint = "more text or a larger --val_fraction" if corpus.split == "val" else "more text"
        raise UserError(
            f"block_size={settings.block_size} is more than the {corpus.n_tokens:,} tokens of the "
            f"{corpus.split} split: make it smaller, or prepare {hint}"
        )
    if settings.random_length and settings.block_size < 2 * MIN_LENGTH:
        raise UserError(
            f"block_size={settings.block_size} is too small to cut rows in two: use at least "
            f"{2 * MIN_LENGTH}, or random_length=false"
        )
    return n_rows


def rows_of_step(corpus, step, settings):
    """Which rows step `step` reads: the next batch_rows entries of the epochs' permutations.

    -> (row [R], epoch [R]) int64
    """
    n_rows = count_rows(corpus, settings)
    first = settings.first_row + step * settings.batch_rows
    index = first + np.arange(settings.batch_rows, dtype=np.int64)
    epoch = index // n_rows
    return permute(index % n_rows, n_rows, settings.seed, epoch), epoch


def read_rows(corpus, row, epoch, settings, is_filler=None):
    """Load rows and cut them: once at a random place (random_length), and after every eos
    (document_mask). -> Rows"""
    L = settings.block_size
    R = len(row)
    tokens = np.concatenate([corpus.read(w * L, L) for w in row])  # [T]
    starts = np.arange(R, dtype=np.int64) * L  # [R]
    cuts = [starts, [R * L]]
    if settings.random_length:
        # Two sequences of 12 to L - 12 tokens: every batch has 2R sequences, so its shapes never
        # change.
        n_places = L - 2 * MIN_LENGTH + 1
        place = MIN_LENGTH + hashed(row, settings.seed, epoch, CUT) % np.uint64(n_places)
        cuts.append(starts + place.astype(np.int64))
    if settings.document_mask:
        cuts.append(np.flatnonzero(tokens == corpus.eos_id) + 1)
    cu_seqlens = np.unique(np.concatenate(cuts)).astype(np.int32)  # [S+1]
    if settings.document_mask:
        # The number of documents varies. Empty sequences round it up, so that few distinct shapes
        # occur.
        n_empty = -(len(cu_seqlens) - 1) % (8 * R)
        cu_seqlens = np.concatenate([cu_seqlens, np.full(n_empty, R * L, np.int32)])
    position = np.asarray(row)[:, None] * L + np.arange(L)  # [R, L]
    if is_filler is None:
        is_filler = np.zeros(R, bool)
    return Rows(tokens, cu_seqlens, position.reshape(-1), np.repeat(epoch, L), is_filler)


def make_batch(corpus, row, epoch, objective_name, settings, is_filler=None):
    """Rows -> Batch for one objective. A pure function: same arguments, same batch, on every
    machine."""
    rows = read_rows(corpus, row, epoch, settings, is_filler)
    objective, rate = objectives.parse(objective_name)
    inputs, has_target, ids = objective.prepare(rows, corpus, settings, rate)
    has_target = has_target & ~np.repeat(rows.is_filler, settings.block_size)
    positions = np.flatnonzero(has_target)  # [num_targets]

    # Room for the most targets to expect. Beyond that a new shape is better than a wrong loss.
    least_sequences = len(row) * (2 if settings.random_length else 1)
    most_targets = objective.most_targets(len(rows.tokens), least_sequences, rate, settings)
    N = max(most_targets, len(positions))
    all_positions = np.zeros(N, np.int64)
    all_positions[: len(positions)] = positions
    targets = np.full(N, -100, np.int64)
    targets[: len(positions)] = ids[positions]
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(rows.cu_seqlens),
        torch.from_numpy(all_positions),
        torch.from_numpy(targets),
        objective.is_causal,
        len(positions),
        np.diff(rows.cu_seqlens).astype(np.int64),
    )


def micro_batches(corpus, step, objective_name, settings, rank, world_size, micro_rows):
    """This rank's share of a step, as a list of Batches. Rank and micro_rows only slice what the
    step sees."""
    row, epoch = rows_of_step(corpus, step, settings)
    per_rank = len(row) // world_size
    batches = []
    for first in range(rank * per_rank, (rank + 1) * per_rank, micro_rows):
        chunk = slice(first, first + micro_rows)
        batches.append(make_batch(corpus, row[chunk], epoch[chunk], objective_name, settings))
    return batches


def validation_settings(settings, eval_mask_rate):
    """What a run may not change about its validation: the seed, the masking rate, pure masking, the
    first row."""
    return replace(
        settings, seed=0, first_row=0, mask_rate=eval_mask_rate, mask_replace=(1.0, 0.0, 0.0)
    )


def validation_batches(corpus, objective_name, settings, eval_rows, rank, world_size, micro_rows):
    """This rank's share of the first eval_rows rows of the validation stream, as Batches of epoch
    0.

    settings: validation_settings(...). The last micro-batch is filled up with rows that have no
    targets, so that its shapes are those of training.
    """
    n_rows = min(eval_rows, count_rows(corpus, settings))
    at_once = micro_rows * world_size
    n_padded = -(-n_rows // at_once) * at_once
    index = np.arange(n_padded, dtype=np.int64)
    row = index % n_rows
    is_filler = index >= n_rows
    for first in range(
        rank * n_padded // world_size, (rank + 1) * n_padded // world_size, micro_rows
    ):
        chunk = slice(first, first + micro_rows)
        epoch = np.zeros(micro_rows, np.int64)
        yield make_batch(corpus, row[chunk], epoch, objective_name, settings, is_filler[chunk])


def prefetch(make, first, last, depth=2):
    """Yield make(first), ..., make(last - 1), computed in a background thread so that no step waits
    for data."""
    yield from ahead((make(step) for step in range(first, last)), depth)
