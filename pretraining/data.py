"""Token shards -> rows -> sequences -> batches, every choice a pure function of (seed, epoch, index).

A corpus split is one long stream of `document tokens + eos`, stored in shards. Row w is the tokens
[w*L, (w+1)*L) of that stream, L = block_size. An epoch is one permutation of the rows, and step s
takes the next `batch_rows` of it. Nothing here keeps state. So a run that is resumed, or has
another number of GPUs or another `micro_rows`, reads exactly the same tokens under the same masks,
and a checkpoint needs no loader state.

The paper (arXiv 2507.00994, footnote 6) trains on sequences of 12 to 2,048 tokens. Its code draws a
length of 12 to 2,036, and takes the rest of 2,048 tokens as the next sequence. Here each row is cut
once in this way, into two sequences that do not see each other. Both are in the same batch, and each
epoch cuts anew: that is ours.
"""

import os
import shlex
import threading
from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np
import torch

import objectives
from core import tokenizer
from core.configurator import RunError, UserError
from core.files import ahead, find_files
from core.rng import CUT, hashed, permute
from core.schema import read_json
from corpus.shards import MANIFEST_SHAPE, Shard, verify_shard

VERIFY_AT_ONCE = 2 << 30  # bytes; a larger split is verified while training runs
MIN_LENGTH = 12  # tokens of the paper's shortest sequence


@dataclass(frozen=True)
class DataSettings:
    """Everything that decides which tokens a step sees and what it hides of them."""

    block_size: int  # tokens of a row
    batch_rows: int  # rows of a step, over all processes
    random_length: bool = True  # cut each row once, at a random place
    document_mask: bool = False  # also cut at the end of each document
    mask_rate: float = 0.4  # share of the ordinary tokens that are hidden
    mask_replace: tuple = (1.0, 0.0, 0.0)  # shares of these that become the mask id, a random id, or stay
    seed: int = 42
    first_row: int = 0  # how many rows of the data order come before step 0


# -------------------------------------------------------------------------------------------------
# the corpus


class Corpus:
    """One split ("train" or "val") of a prepared corpus: a stream of tokens in shards."""

    def __init__(self, data_dir, split="train", verify=True):
        """Open the split and, if `verify`, check its checksums: a large split's in the background.

        Raises UserError, which says what to do, for a missing, unfinished, truncated, corrupted or
        mixed corpus, and for one that is not what its manifest.json says.
        """
        self.data_dir = data_dir
        self.split = split
        manifest_path = os.path.join(data_dir, "manifest.json")
        if not os.path.isfile(manifest_path):
            if os.path.isdir(data_dir) and os.listdir(data_dir):
                text = data_dir.rstrip("/")
                command = f"--source={shlex.quote(text)} --out={shlex.quote(text + '_corpus')}"
                raise UserError(
                    f"no corpus in '{data_dir}', which holds other files. If they are the text to train on: "
                    f"python prepare_fineweb.py {command}"
                )
            command = f"python prepare_fineweb.py --source=sotu --out={shlex.quote(data_dir)}"
            raise UserError(
                f"no corpus in '{data_dir}'; make one with: {command} "
                "(sotu is the demo corpus; any file or folder of text will do)"
            )
        manifest = read_json(manifest_path, MANIFEST_SHAPE)
        if not manifest["complete"]:
            raise UserError(
                f"the corpus in '{data_dir}' is unfinished: run its prepare_fineweb.py command again"
            )

        # The shards that are there, and those that should be.
        self.shards = [Shard(path) for path in find_files(data_dir, f"{split}_*.bin")]
        for shard in self.shards:
            if shard.tokenizer_hash != self.shards[0].tokenizer_hash:
                raise UserError(
                    f"{shard.path} was made with another tokenizer than {self.shards[0].path}: "
                    "prepare the corpus anew in an empty folder"
                )
        check_shards(self.shards, split, manifest, manifest_path)
        # Shard i is tokens [boundaries[i], boundaries[i + 1]) of the stream.
        self.boundaries = [0]
        for shard in self.shards:
            self.boundaries.append(self.boundaries[-1] + shard.n_tokens)
        self.n_tokens = self.boundaries[-1]
        if self.n_tokens == 0:
            hint = " or with a larger --val_fraction" if split == "val" else ""
            raise UserError(f"the {split} split of '{data_dir}' is empty: prepare it from more text{hint}")
        header = self.shards[0].header
        self.tokenizer_hash = self.shards[0].tokenizer_hash
        self.vocab_size = int(header["vocab_size"])
        self.eos_id = int(header["eos_id"])
        self.mask_id = int(header["mask_id"])
        self.special_start = int(header["special_start"])  # ids from here on are special tokens

        # The checksums. Reading a large split only for them takes minutes, so that happens in the
        # background.
        self.damage = None
        if verify and sum(os.path.getsize(shard.path) for shard in self.shards) <= VERIFY_AT_ONCE:
            for shard in self.shards:
                verify_shard(shard.path, shard.header)
        elif verify:
            threading.Thread(target=self.verify_all, daemon=True).start()

    def load_tokenizer(self):
        """The tokenizer that lies in the corpus. Raises UserError if the shards were made with another."""
        stored = tokenizer.load(self.data_dir)
        if stored.hash.hex() != self.tokenizer_hash:
            raise UserError(
                f"the tokenizer in '{self.data_dir}' is not the one its shards were made with: put the "
                "corpus's own tokenizer.tiktoken and tokenizer_info.json back"
            )
        return stored

    def verify_all(self):
        """Verify every shard, and keep the error of a damaged one for read() to raise."""
        try:
            for shard in self.shards:
                verify_shard(shard.path, shard.header)
        except (UserError, OSError) as error:
            self.damage = error

    def read(self, start, count):
        """Tokens [start, start + count) of the stream, from one shard or several. -> int64 [count]

        Raises RunError if a shard was damaged or removed in the meantime.
        """
        if self.damage:
            raise RunError(str(self.damage))
        start = int(start)
        number = bisect_right(self.boundaries, start) - 1
        pieces = []
        while count > 0:
            first = start - self.boundaries[number]
            piece = self.shards[number].read(first, min(count, self.shards[number].n_tokens - first))
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
            number += 1
        if len(pieces) == 1:
            return pieces[0].astype(np.int64)
        return np.concatenate(pieces).astype(np.int64)


def check_shards(shards, split, manifest, manifest_path):
    """Raises UserError unless a split's shards are those that the manifest lists.

    Early manifests have no such list, or only the totals: what is missing is not compared.
    """
    data_dir = os.path.dirname(manifest_path)
    if "shards" in manifest:
        expected = {name: facts for name, facts in manifest["shards"].items() if name.startswith(f"{split}_")}
        present = {os.path.basename(shard.path): shard for shard in shards}
        missing = sorted(expected.keys() - present.keys())
        if missing:
            raise UserError(
                f"'{data_dir}' lacks {len(missing)} of the {len(expected)} {split} shards that its "
                f"manifest.json lists, such as {missing[0]}: copy them there, or run its "
                "prepare_fineweb.py command again"
            )
        for name, shard in present.items():
            if name not in expected:
                raise UserError(f"{shard.path} is not among the shards of {manifest_path}: move it away")
            crc32 = f"{int(shard.header['tokens_crc32']):08x}"
            if (shard.n_tokens, crc32) != (expected[name]["tokens"], expected[name]["crc32"]):
                raise UserError(
                    f"{shard.path} is not the shard that {manifest_path} lists: copy the right one there, or "
                    "delete it and run its prepare_fineweb.py command again"
                )
    n_tokens = sum(shard.n_tokens for shard in shards)
    if manifest.get(f"{split}_tokens", n_tokens) != n_tokens:
        raise UserError(
            f"{manifest_path} says {manifest[f'{split}_tokens']:,} {split} tokens, and the shards "
            f"hold {n_tokens:,}: copy the whole corpus again"
        )
    if shards and manifest.get("tokenizer_hash", shards[0].tokenizer_hash) != shards[0].tokenizer_hash:
        raise UserError(
            f"{shards[0].path} was made with another tokenizer than {manifest_path} says: copy the "
            "whole corpus again"
        )


# -------------------------------------------------------------------------------------------------
# rows and batches


@dataclass
class Rows:
    """R rows laid end to end: T = R * block_size tokens in S sequences.

    position, epoch and the seed are the key of each token's mask.
    """

    tokens: np.ndarray  # [T] int64
    cu_seqlens: np.ndarray  # [S+1] int32, where each sequence starts, and T
    position: np.ndarray  # [T] int64, each token's place in the corpus' stream
    epoch: np.ndarray  # [T] int64
    is_filler: np.ndarray  # [R] bool: rows that only fill up a shape; they get no targets


@dataclass
class Batch:
    """What the model and the loss take.

    Batches of one objective have the same N, so that shapes stay the same under torch.compile.
    """

    tokens: torch.Tensor  # [T] int64, some of them hidden
    cu_seqlens: torch.Tensor  # [S+1] int32
    positions: torch.Tensor  # [N] int64, where in tokens the targets are; filled up with 0
    targets: torch.Tensor  # [N] int64, the id to predict there; filled up with -100, which is none
    causal: bool
    num_targets: int  # how many targets are not -100
    lengths: np.ndarray  # [S] int64, on the host, to count FLOPs

    def to(self, device):
        """Copy to the device. From pinned memory the copy overlaps with computation."""
        return self.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self):
        """Copy to pinned memory."""
        return self.with_tensors(lambda tensor: tensor.pin_memory())

    def with_tensors(self, change):
        """This batch with change(tensor) in the place of each tensor."""
        return replace(
            self,
            tokens=change(self.tokens),
            cu_seqlens=change(self.cu_seqlens),
            positions=change(self.positions),
            targets=change(self.targets),
        )


def count_rows(corpus, settings):
    """How many rows of block_size tokens a split has.

    Raises UserError if it has none, or if block_size is too small to cut.
    """
    n_rows = corpus.n_tokens // settings.block_size
    if n_rows == 0:
        hint = "more text or a larger --val_fraction" if corpus.split == "val" else "more text"
        raise UserError(
            f"block_size={settings.block_size} is more than the {corpus.n_tokens:,} tokens "
            f"of the {corpus.split} split: make it smaller, or prepare {hint}"
        )
    check_block_size(settings.block_size, settings.random_length)
    return n_rows


def check_block_size(block_size, random_length):
    """Raises UserError if a row is too short to be cut in two."""
    if random_length and block_size < 2 * MIN_LENGTH:
        raise UserError(
            f"block_size={block_size} is too small to cut rows in two: "
            f"use at least {2 * MIN_LENGTH}, or random_length=false"
        )


def rows_of_step(corpus, step, settings):
    """Which rows step `step` reads: the next batch_rows entries of the epochs' permutations.

    -> (row numbers [R], the epoch of each [R]), int64
    """
    n_rows = count_rows(corpus, settings)
    first = settings.first_row + step * settings.batch_rows
    index = first + np.arange(settings.batch_rows, dtype=np.int64)
    epochs = index // n_rows
    return permute(index % n_rows, n_rows, settings.seed, epochs), epochs


def count_rows_read_again(corpus, settings, n_steps):
    """How many of the rows of steps 0 to n_steps - 1 were read before, by this run or its ancestors."""
    first = settings.first_row
    end = first + n_steps * settings.batch_rows
    return max(0, end - max(first, count_rows(corpus, settings)))


def read_rows(corpus, row_numbers, epochs, settings, is_filler=None):
    """Load rows, and cut them into sequences. -> Rows

    A row is cut once at a random place (random_length), and after every eos (document_mask).
    """
    L = settings.block_size
    R = len(row_numbers)
    tokens = np.concatenate([corpus.read(w * L, L) for w in row_numbers])  # [T]
    if tokens.max() >= corpus.vocab_size:
        raise RunError(
            f"the {corpus.split} split of '{corpus.data_dir}' holds the id {tokens.max()}, and its "
            f"vocabulary has {corpus.vocab_size}: prepare the corpus anew"
        )

    # Where sequences begin, and where the last one ends.
    starts = np.arange(R, dtype=np.int64) * L  # [R]
    cuts = [starts, [R * L]]
    if settings.random_length:
        # Two sequences of 12 to L - 12 tokens: every batch has 2R sequences, so its shapes never
        # change.
        n_places = L - 2 * MIN_LENGTH + 1
        place = MIN_LENGTH + hashed(row_numbers, settings.seed, epochs, CUT) % np.uint64(n_places)
        cuts.append(starts + place.astype(np.int64))
    if settings.document_mask:
        cuts.append(np.flatnonzero(tokens == corpus.eos_id) + 1)
    cu_seqlens = np.unique(np.concatenate(cuts)).astype(np.int32)  # [S+1]
    if settings.document_mask:
        # The number of documents varies. Empty sequences round it up to a multiple of 8R, so that
        # only a few shapes occur.
        n_empty = -(len(cu_seqlens) - 1) % (8 * R)
        cu_seqlens = np.concatenate([cu_seqlens, np.full(n_empty, R * L, np.int32)])

    position = np.asarray(row_numbers)[:, None] * L + np.arange(L)  # [R, L]
    if is_filler is None:
        is_filler = np.zeros(R, bool)
    return Rows(tokens, cu_seqlens, position.reshape(-1), np.repeat(epochs, L), is_filler)


def make_batch(corpus, row_numbers, epochs, objective_name, settings, is_filler=None):
    """Make the Batch of some rows for an objective: the same arguments give the same batch anywhere."""
    rows = read_rows(corpus, row_numbers, epochs, settings, is_filler)
    objective, rate = objectives.parse(objective_name)
    inputs, has_target, ids = objective.prepare(rows, corpus, settings, rate)
    has_target = has_target & ~np.repeat(rows.is_filler, settings.block_size)
    positions = np.flatnonzero(has_target)  # [num_targets]

    # Make room for the most targets to expect. If there are more, the batch gets a new shape, which
    # costs a compilation, but no target is dropped.
    least_sequences = len(row_numbers) * (2 if settings.random_length else 1)
    most_targets = objective.most_targets(len(rows.tokens), least_sequences, rate, settings)
    N = max(most_targets, len(positions))
    all_positions = np.zeros(N, np.int64)
    all_positions[: len(positions)] = positions
    targets = np.full(N, -100, np.int64)
    targets[: len(positions)] = ids[positions]
    return Batch(
        tokens=torch.from_numpy(inputs),
        cu_seqlens=torch.from_numpy(rows.cu_seqlens),
        positions=torch.from_numpy(all_positions),
        targets=torch.from_numpy(targets),
        causal=objective.is_causal,
        num_targets=len(positions),
        lengths=np.diff(rows.cu_seqlens).astype(np.int64),
    )


def micro_batches(corpus, step, objective_name, settings, rank, world_size, micro_rows):
    """This rank's share of a step, a list of Batches of micro_rows rows.

    world_size and micro_rows only slice what the step sees.
    """
    row_numbers, epochs = rows_of_step(corpus, step, settings)
    per_rank = len(row_numbers) // world_size
    batches = []
    for first in range(rank * per_rank, (rank + 1) * per_rank, micro_rows):
        chunk = slice(first, first + micro_rows)
        batches.append(make_batch(corpus, row_numbers[chunk], epochs[chunk], objective_name, settings))
    return batches


def validation_settings(settings, eval_mask_rate):
    """The settings of a run's validation: its own, but with one seed and plain masking for all runs."""
    return replace(settings, seed=0, first_row=0, mask_rate=eval_mask_rate, mask_replace=(1.0, 0.0, 0.0))


def validation_batches(corpus, objective_name, settings, eval_rows, rank, world_size, micro_rows):
    """Yield this rank's share of the first eval_rows rows of a split, as Batches of epoch 0.

    settings: validation_settings(...). Filler rows, which have no targets, make the number of rows
    a multiple of what all ranks take at once, so that all shapes are those of training.
    """
    n_rows = min(eval_rows, count_rows(corpus, settings))
    at_once = micro_rows * world_size
    n_filled = -(-n_rows // at_once) * at_once
    index = np.arange(n_filled, dtype=np.int64)
    row_numbers = index % n_rows
    is_filler = index >= n_rows
    epochs = np.zeros(micro_rows, np.int64)
    per_rank = n_filled // world_size
    for first in range(rank * per_rank, (rank + 1) * per_rank, micro_rows):
        chunk = slice(first, first + micro_rows)
        yield make_batch(corpus, row_numbers[chunk], epochs, objective_name, settings, is_filler[chunk])


def prefetch(make, first, last, depth=2):
    """Yield make(first), ..., make(last - 1), made in a background thread so that no step waits."""
    yield from ahead((make(step) for step in range(first, last)), depth)
