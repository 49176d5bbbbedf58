"""Prepared files -> one corpus: duplicates dropped, the stop found, shards numbered in the order of the source."""
import math
import os
import shutil
from bisect import bisect_left

import numpy as np
from tqdm import tqdm

from core import tokenizer as tokenizers
from core.configurator import RunError
from core.files import find_files
from corpus.parallel import DOCUMENT, SPLITS, folder_of, forget, prepare_files
from corpus.shards import HEADER_BYTES, ShardWriter, read_header, shard_facts

MERGE_AT_ONCE = 1 << 22    # records in memory while duplicates are looked for


# ---------------------------------------------------------------------------------------------------------------------
# all files
def records_of(out, index):
    path = os.path.join(folder_of(out, index), "documents.bin")
    return np.memmap(path, DOCUMENT, "r") if os.path.getsize(path) else np.empty(0, DOCUMENT)


def duplicates(out, indices):
    """The rows whose id an earlier file or row has. The files' hashes are merged a range of them at a time, so memory does
    not grow with the corpus. -> {index: sorted rows}, only files that have any"""
    files = [records_of(out, index) for index in indices]
    ranges = sum(map(len, files)) // MERGE_AT_ONCE + 1
    found = {}
    begin = [0] * len(files)
    for r in range(1, ranges + 1):
        end = [len(f) if r == ranges else bisect_left(f["id"], (r << 64) // ranges, lo=b) for f, b in zip(files, begin)]
        part = np.concatenate([f[b:e] for f, b, e in zip(files, begin, end)])
        file = np.repeat(np.arange(len(files)), np.subtract(end, begin))
        order = np.lexsort((part["row"], file, part["id"]))
        again = order[1:][part["id"][order[1:]] == part["id"][order[:-1]]]
        for i in np.unique(file[again]):
            found.setdefault(indices[i], []).append(part["row"][again[file[again] == i]])
        begin = end
    return {index: np.sort(np.concatenate(rows)) for index, rows in found.items()}


def in_row_order(out, index, dropped):
    """The records of a file in the order of its rows, and which of them are kept. -> [n] DOCUMENT, [n] bool"""
    records = np.sort(np.array(records_of(out, index)), order="row")
    return records, ~np.isin(records["row"], dropped.get(index, []))


def prepare_all(c, made, urls, sizes):
    """Every file that the stop at c.tokens needs. -> facts, {index: rows to drop}, the last row of the last file or None"""
    enough = c.tokens or math.inf
    while True:
        facts = prepare_files(c, made, urls, sizes, range(len(urls)), enough, enough)
        dropped = duplicates(c.out, list(facts))
        lost, missing = 0, c.tokens or math.inf
        for index in facts:
            tokens = facts[index]["train"]["tokens"]
            if index in dropped:
                records, kept = in_row_order(c.out, index, dropped)
                lost += int(records["tokens"][~kept & ~records["val"]].sum())
                tokens = int(records["tokens"][kept & ~records["val"]].sum())
            if tokens >= missing:
                records, kept = in_row_order(c.out, index, dropped)
                ends = np.cumsum(np.where(kept & ~records["val"], records["tokens"], 0))
                last = int(records["row"][np.searchsorted(ends, missing)])
                return {i: f for i, f in facts.items() if i <= index}, dropped, last
            missing -= tokens
        if len(facts) == len(urls) and all(f["whole"] for f in facts.values()):
            return facts, dropped, None
        enough = c.tokens + lost     # duplicates took some: read on by as many


def finish(c, made, urls, sizes):
    """Prepare what is missing, drop duplicates, stop, and put the shards in their places. -> what the manifest says of them"""
    facts, dropped, last = prepare_all(c, made, urls, sizes)
    tok, indices = tokenizers.load(c.out), list(facts)
    total = {f"{split}_{unit}": 0 for split in SPLITS for unit in ("documents", "tokens", "characters")}
    total |= {"duplicates": 0, "blank_documents": 0, "files_read": len(indices)}
    shards = {}
    for index in tqdm(indices, desc="putting together", unit=" files", mininterval=1.0):
        records, keep = in_row_order(c.out, index, dropped)
        cut = index == indices[-1] and last is not None
        inside = records["row"] <= (last if cut else math.inf)
        total["duplicates"] += int((inside & ~keep).sum())
        total["blank_documents"] += (last + 1 if cut else facts[index]["rows"]) - int(inside.sum())
        keep &= inside
        for split, val in zip(SPLITS, (False, True)):
            side, begin = records["val"] == val, 0
            lengths, kept = records["tokens"][side], keep[side]
            total[f"{split}_documents"] += int(kept.sum())
            total[f"{split}_tokens"] += int(lengths[kept].sum())
            total[f"{split}_characters"] += int(records["characters"][side][kept].sum())
            for name, documents in facts[index]["shards"].items():
                if name.startswith(split):
                    number, mine = name.removesuffix(".bin").split("_")[1], slice(begin, begin + documents)
                    target = os.path.join(c.out, f"{split}_{index:05d}_{number}.bin")
                    place(os.path.join(folder_of(c.out, index), name), target, lengths[mine], kept[mine], tok)
                    if kept[mine].any():
                        shards[os.path.basename(target)] = shard_facts(target)
                    begin += documents
    for path in find_files(os.path.join(c.out, "files"), "*"):
        name = os.path.basename(path)
        if not name.isdigit() or int(name) > indices[-1]:      # behind the stop, or left by a process that was killed
            shutil.rmtree(path)
    return total | {"shards": shards}


def place(source, target, lengths, keep, tok):
    """Move a shard to its place, or write there the documents of it that are kept: nothing, if there is none."""
    if not os.path.isfile(source):
        if keep.any() and not os.path.isfile(target):
            forget(os.path.dirname(target), int(os.path.basename(target).split("_")[1]))
            raise RunError(f"{target} is missing: the same command prepares its file again")
        return        # done before an interruption
    if keep.all():
        os.replace(source, target)
        return
    if keep.any():
        header, writer = read_header(source), ShardWriter(target, tok)
        tokens = np.memmap(source, writer.dtype, "r", offset=HEADER_BYTES, shape=(int(header["tokens"]),))
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for i in np.flatnonzero(keep):
            writer.write(tokens[ends[i]:ends[i + 1]])
        writer.close()
    os.remove(source)
