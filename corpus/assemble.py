"""Prepared files -> one corpus.

build_corpus() prepares the files that are missing (parallel.py). Going through files and rows in
order, it drops documents whose id came before, and stops at the document that reaches --tokens. It
moves the shards of file 7 to OUT/train_00007_000.bin, ... Only shards that lose a document are
written again.
"""
import os
import re
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from core import tokenizer as tokenizers
from core.configurator import RunError, UserError
from core.files import find_files, remove_file_or_folder
from corpus.parallel import DOCUMENT, LEFTOVER, SPLITS, folder_of, forget, is_of, prepare_files
from corpus.shards import Shard, ShardWriter, shard_facts

MERGE_AT_ONCE = 1 << 22    # records in memory while duplicates are looked for


@dataclass
class Selection:
    """Which documents of the prepared files make the corpus."""

    files: dict       # {index: PreparedFile}, in order
    dropped: dict     # {index: sorted rows that are duplicates}, only for files that have any
    last_row: int     # the row of the last file that reaches the limit; None if all rows count

    def rows_of(self, index):
        """How many rows of a file count."""
        if self.last_row is not None and index == max(self.files):
            return self.last_row + 1
        return self.files[index].rows


def build_corpus(job):
    """Write the shards of a corpus. -> what its manifest says about them

    After an interruption it continues where it stopped: a shard that is in its place stays.
    """
    selection = select_documents(job)
    tok = tokenizers.load(job.out)
    totals = {}
    for split in SPLITS:
        for unit in ("documents", "tokens", "characters"):
            totals[f"{split}_{unit}"] = 0
    totals |= {"duplicates": 0, "blank_documents": 0, "files_read": len(selection.files)}

    shards = {}
    for index in tqdm(selection.files, desc="putting together", unit=" files", mininterval=1.0):
        records, is_kept = in_row_order(job.out, index, selection.dropped)
        rows = selection.rows_of(index)
        # A document is kept if it is not a duplicate and stands before the stop.
        is_before_stop = records["row"] < rows
        totals["duplicates"] += int((is_before_stop & ~is_kept).sum())
        totals["blank_documents"] += rows - int(is_before_stop.sum())
        is_kept &= is_before_stop
        for split in SPLITS:
            is_of_split = is_of(split, records)
            kept = records[is_of_split & is_kept]
            totals[f"{split}_documents"] += len(kept)
            totals[f"{split}_tokens"] += int(kept["tokens"].sum())
            totals[f"{split}_characters"] += int(kept["characters"].sum())
            counts = selection.files[index].shards
            lengths = records["tokens"][is_of_split]
            shards |= place_split(job.out, index, split, counts, lengths, is_kept[is_of_split], tok)

    remove_unused_files(job.out, max(selection.files))
    return totals | {"shards": shards}


# -------------------------------------------------------------------------------------------------
# which documents
def select_documents(job):
    """Prepare as many files as job.tokens asks for, and choose their documents. -> Selection"""
    enough = job.limit
    while True:
        files = prepare_files(job, range(len(job.urls)), enough, enough)
        check_records(job.out, files)
        dropped = find_duplicates(job.out, list(files))

        # Go through the files until their training tokens, without duplicates, reach the limit.
        missing = job.limit      # training tokens that are still missing
        lost = 0                 # training tokens of duplicates
        for index, file in files.items():
            tokens = file.train_tokens
            if index in dropped:
                _, row_tokens = kept_train_tokens(job.out, index, dropped)
                tokens = int(row_tokens.sum())
                lost += file.train_tokens - tokens
            if tokens >= missing:
                rows, row_tokens = kept_train_tokens(job.out, index, dropped)
                last_row = int(rows[np.searchsorted(np.cumsum(row_tokens), missing)])
                used = {i: prepared for i, prepared in files.items() if i <= index}
                return Selection(used, dropped, last_row)
            missing -= tokens

        # The limit was not reached. If the source has no more, these are all of its documents.
        # Otherwise duplicates took tokens: read so many more.
        if len(files) == len(job.urls) and all(file.is_complete for file in files.values()):
            return Selection(files, dropped, None)
        enough = job.tokens + lost


def check_records(out, files):
    """Raises UserError if a file's documents.bin does not have a record for each of its documents."""
    for index, file in files.items():
        folder = folder_of(out, index)
        path = os.path.join(folder, "documents.bin")
        expected = sum(file.shards.values()) * DOCUMENT.itemsize
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        if size != expected:
            raise UserError(
                f"{path} is damaged ({size:,} bytes, expected {expected:,}): delete {folder} and run "
                "the same command again"
            )


def find_duplicates(out, indices):
    """The rows whose id an earlier file or row has. -> {index: sorted rows}, for files with any

    The records of a file are sorted by the hash of the id. The range of hashes is cut into slices.
    Only one slice of all files is in memory at a time, so memory does not grow with the corpus.
    """
    files = [read_records(out, index) for index in indices]
    n_slices = sum(len(file) for file in files) // MERGE_AT_ONCE + 1
    duplicates = {}      # {index: [rows of one slice, ...]}
    begins = [0] * len(files)
    for number in range(1, n_slices + 1):
        if number == n_slices:
            ends = [len(file) for file in files]
        else:
            bound = (number << 64) // n_slices      # hashes have 64 bits
            ends = [bisect_left(file["id"], bound, lo=begin) for file, begin in zip(files, begins)]
        records = np.concatenate([file[begin:end] for file, begin, end in zip(files, begins, ends)])
        file_of = np.repeat(np.arange(len(files)), np.subtract(ends, begins))     # of each record

        # Sort by id, then file, then row. A record is a duplicate if the one before it has its id.
        order = np.lexsort((records["row"], file_of, records["id"]))
        ids = records["id"][order]
        repeated = order[1:][ids[1:] == ids[:-1]]
        for i in np.unique(file_of[repeated]):
            rows = records["row"][repeated[file_of[repeated] == i]]
            duplicates.setdefault(indices[i], []).append(rows)
        begins = ends
    return {index: np.sort(np.concatenate(rows)) for index, rows in duplicates.items()}


def read_records(out, index):
    """The records of a prepared file, sorted by id and memory-mapped. -> DOCUMENT [n]"""
    path = os.path.join(folder_of(out, index), "documents.bin")
    if os.path.getsize(path) == 0:
        return np.empty(0, DOCUMENT)
    return np.memmap(path, DOCUMENT, "r")


def in_row_order(out, index, dropped):
    """The records of a file sorted by row, and which of them are kept. -> DOCUMENT [n], bool [n]"""
    records = np.sort(np.array(read_records(out, index)), order="row")
    is_duplicate = np.isin(records["row"], dropped.get(index, []))
    return records, ~is_duplicate


def kept_train_tokens(out, index, dropped):
    """The rows of a file, and the training tokens that each gives the corpus. -> [n], [n]"""
    records, is_kept = in_row_order(out, index, dropped)
    tokens = np.where(is_kept & ~records["val"], records["tokens"], 0)
    return records["row"], tokens


# -------------------------------------------------------------------------------------------------
# shards to their places
def place_split(out, index, split, counts, lengths, is_kept, tok):
    """Place the shards of one split of a file. -> {name: what the manifest says about it}

    counts: {name: number of documents} of all shards of the file. lengths [n] and is_kept [n] are
    those of the documents of this split, in the order in which its shards hold them.
    """
    placed = {}
    begin = 0
    for name, count in counts.items():
        if not name.startswith(split):
            continue
        number = name.removesuffix(".bin").split("_")[1]
        source = os.path.join(folder_of(out, index), name)
        target = os.path.join(out, f"{split}_{index:05d}_{number}.bin")
        in_shard = slice(begin, begin + count)
        place(source, target, lengths[in_shard], is_kept[in_shard], tok)
        if is_kept[in_shard].any():
            facts = shard_facts(target)
            expected = int(lengths[in_shard][is_kept[in_shard]].sum())
            if facts["tokens"] != expected:
                raise UserError(
                    f"{target} holds {facts['tokens']:,} tokens and should hold {expected:,}: delete it and "
                    "run the same command again"
                )
            placed[os.path.basename(target)] = facts
        begin += count
    return placed


def place(source, target, lengths, is_kept, tok):
    """Move a shard to its place, or write only its kept documents there."""
    if not os.path.isfile(source):
        # It was placed before an interruption. If it has been deleted since, start its file anew.
        if is_kept.any() and not os.path.isfile(target):
            index = int(os.path.basename(target).split("_")[1])
            forget(os.path.dirname(target), index)
            raise RunError(f"{target} is missing: run the same command to prepare its file again")
        return
    if is_kept.all():
        os.replace(source, target)
        return
    if is_kept.any():
        shard = Shard(source)
        writer = ShardWriter(target, tok)
        ends = np.cumsum(lengths, dtype=np.int64)
        for i in np.flatnonzero(is_kept):
            writer.write(shard.read(int(ends[i] - lengths[i]), int(lengths[i])))
        writer.close()
    os.remove(source)


def remove_unused_files(out, last_index):
    """Remove the folders of files after the stop, and leftovers of killed processes. Others stay."""
    for path in find_files(os.path.join(out, "files"), "*"):
        name = os.path.basename(path)
        is_after_stop = re.fullmatch(r"\d{5,}", name) and int(name) > last_index
        if is_after_stop or re.fullmatch(LEFTOVER, name):
            remove_file_or_folder(path)
