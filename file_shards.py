"""Parquet files -> token shards, a file at a time, in parallel, so that nothing depends on how many processes did it.

Each file becomes a folder OUT/files/00007: its shards, `documents.bin` (what finish() needs to know of each document) and
`facts.json`; it is written under a temporary name and renamed when it is whole, so a file is there or it is not.
finish() then drops the documents whose id has been seen before, in the order of files and rows, stops at the document
that reaches `tokens`, and moves the shards to OUT/train_00007_000.bin: only those that lose a document are written again.
"""
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import time
from bisect import bisect_left
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

import hub_corpus
import tokenizer as tokenizers
from configurator import RunError, UserError
from data import HEADER_BYTES, ShardWriter, read_header
from files import find_files
from system import ahead, hashed, read_json, write_json, write_whole

# documents.bin: one record for each document that is not blank, sorted by the hash of its id
DOCUMENT = np.dtype([("id", "<u8"), ("row", "<u4"), ("tokens", "<u4"), ("characters", "<u4"), ("val", "?")])
MERGE_AT_ONCE = 1 << 22    # records in memory while duplicates are looked for
SPLITS = ("train", "val")


class Shards:
    """Documents to shards, each closed after the document that reaches shard_tokens; name(i) is the path of shard i."""

    def __init__(self, name, tok, shard_tokens, first=0):
        self.name, self.tok, self.shard_tokens, self.number, self.writer = name, tok, shard_tokens, first, None
        self.written = []     # (path, documents) of every closed shard

    def open(self):
        self.writer = self.writer or ShardWriter(self.name(self.number), self.tok)

    def write(self, documents):
        """documents: list of id arrays [n] without eos."""
        ends = np.cumsum([len(ids) + 1 for ids in documents])
        begin, before = 0, 0
        while begin < len(documents):
            self.open()
            room = self.shard_tokens - int(self.writer.header["tokens"])
            end = min(int(np.searchsorted(ends, before + room)) + 1, len(documents))     # up to the one that fills it
            body = np.full(int(ends[end - 1]) - before, self.tok.eos_id, self.writer.dtype)
            for ids, stop in zip(documents[begin:end], ends[begin:end]):
                body[stop - before - 1 - len(ids):stop - before - 1] = ids
            self.writer.write(body, end - begin)
            begin, before = end, int(ends[end - 1])
            if self.writer.header["tokens"] >= self.shard_tokens:
                self.close()

    def close(self):
        if self.writer:
            self.writer.close()
            self.written.append((self.writer.path, int(self.writer.header["documents"])))
            self.number, self.writer = self.number + 1, None


def shard_facts(path):
    """What a manifest says of a shard, from its header; the checksum is that of the tokens' bytes."""
    h = read_header(path)
    return {"documents": int(h["documents"]), "tokens": int(h["tokens"]), "crc32": f"{int(h['tokens_crc32']):08x}"}


# ---------------------------------------------------------------------------------------------------------------------
# one file
def folder_of(out, index):
    return os.path.join(out, "files", f"{index:05d}")


def id_hash(name, text):
    """8 bytes of a document's id, or of its text where it has none. Two of 100 M ids collide with probability 0.0003."""
    return hashlib.blake2b((name or text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def prepare_file(c, made, url, index, enough, threads, report):
    """One parquet file -> its folder. Stops reading after `enough` training tokens; report(documents, tokens) as it goes on."""
    folder, tok = folder_of(c.out, index), tokenizers.load(c.out)
    interrupted = find_files(os.path.dirname(folder), f"{index:05d}.*.tmp")      # left by processes that were killed
    for old in [folder, *interrupted]:      # the folder itself may be there from a smaller --tokens
        shutil.rmtree(old, ignore_errors=True)
    work = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(work)
    shards = {split: Shards(lambda i, split=split: os.path.join(work, f"{split}_{i:03d}.bin"), tok, c.shard_tokens)
              for split in SPLITS}
    records, row, tokens, whole = [np.empty(0, DOCUMENT)], 0, 0, True
    for table in ahead(hub_corpus.tables(url, c.retries), 1):
        texts, names = (table.column(name).to_pylist() for name in hub_corpus.COLUMNS)
        kept = [i for i, text in enumerate(texts) if text and not text.isspace()]
        texts, names = [texts[i] for i in kept], [names[i] for i in kept]
        ids = tok.encode_to_arrays(texts, threads)
        batch = np.empty(len(kept), DOCUMENT)
        batch["id"] = np.frombuffer(b"".join(map(id_hash, names, texts)), "<u8")
        batch["row"] = row + np.array(kept, np.int64)
        batch["tokens"] = [len(i) + 1 for i in ids]
        batch["characters"] = list(map(len, texts))
        batch["val"] = [hashed(text) < c.val_fraction for text in texts]
        for split, val in zip(SPLITS, (False, True)):
            shards[split].write([ids[i] for i in np.flatnonzero(batch["val"] == val)])
        records.append(batch)
        row += len(table)
        tokens += int(batch["tokens"][~batch["val"]].sum())
        report(len(batch), int(batch["tokens"].sum()))
        if tokens >= enough:
            whole = False
            break
    facts = {"made": made, "whole": whole, "rows": row, "shards": {}}
    records = np.concatenate(records)
    for split, val in zip(SPLITS, (False, True)):
        shards[split].close()
        facts["shards"] |= {os.path.basename(path): documents for path, documents in shards[split].written}
        side = records[records["val"] == val]
        facts[split] = {"documents": len(side), "tokens": int(side["tokens"].sum()), "characters": int(side["characters"].sum())}
    write_whole(os.path.join(work, "documents.bin"), np.sort(records, order=("id", "row")).tobytes())
    write_json(os.path.join(work, "facts.json"), facts)
    os.rename(work, folder)


def facts_of(c, made, index, enough):
    """What is known of a file that has been prepared, as far as `enough` training tokens; else None. Raises UserError."""
    folder = folder_of(c.out, index)
    if not os.path.isdir(folder):
        return None
    facts = read_json(os.path.join(folder, "facts.json"))
    changed = [f"{k} was {v}, is {made[k]}" for k, v in facts["made"].items() if made[k] != v]
    if changed:
        raise UserError(f"{folder} was made otherwise ({'; '.join(changed)}): delete it, or prepare in another --out")
    return facts if facts["whole"] or facts["train"]["tokens"] >= enough else None


def forget(out, index):
    """Remove all that was made of one file, so that it is prepared again."""
    shutil.rmtree(folder_of(out, index), ignore_errors=True)
    for path in find_files(out, f"*_{index:05d}_???.bin"):
        os.remove(path)


# ---------------------------------------------------------------------------------------------------------------------
# many files
def processes_of_their_own():
    """Children of a server that has the imports done and no threads: they start in milliseconds, and no lock is forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["huggingface_hub", "pyarrow.parquet", "file_shards"])
    return context


def in_a_process(connection, arguments):
    """prepare_file in a process of its own; when the one that started it is gone, the next report ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        prepare_file(*arguments, lambda documents, tokens: connection.send((documents, tokens)))
        connection.send("done")
    except (UserError, RunError) as error:
        connection.send(error)
    except BrokenPipeError:
        pass
    except OSError as error:
        connection.send(RunError(f"{error.strerror or error} ({error.filename}); whole files stay, the same command goes on from "
                                 "them"))


def prepare_files(c, made, urls, sizes, order, goal, enough):
    """Prepare the files `order` until those without a gap behind the first hold `goal` training tokens. -> their facts"""
    facts = {index: found for index in order if (found := facts_of(c, made, index, enough))}
    if facts:
        print(f"going on behind {len(facts)} whole file{'s' * (len(facts) > 1)}", flush=True)
    cores = os.cpu_count()
    processes = max(1, min(c.processes or cores, len(order)))
    threads = c.threads or max(1, cores // processes)
    todo, running, started = [index for index in order if index not in facts], {}, time.time()
    new = 0
    with tqdm(unit=" tokens", unit_scale=True, desc="tokenizing", mininterval=1.0, total=goal if goal < math.inf else None,
              initial=sum(f["train"]["tokens"] + f["val"]["tokens"] for f in facts.values())) as bar:
        def report(documents, tokens):
            nonlocal new
            new += tokens
            bar.update(tokens)
            bar.set_postfix_str(f"{len(facts)} of {len(order)} files, {new / (time.time() - started):,.0f} tokens/s")

        def finished(index):
            facts[index] = facts_of(c, made, index, enough)
            if goal == math.inf:      # how many tokens there will be is known from those of the files that are whole
                known = sum(f["train"]["tokens"] + f["val"]["tokens"] for f in facts.values())
                bar.total = known * sum(sizes[i] for i in order) / sum(sizes[i] for i in facts)

        def prefix():
            """The whole files up to the first that is missing, or up to the goal."""
            found, tokens = [], 0
            for index in order:
                if index not in facts or tokens >= goal:
                    break
                found.append(index)
                tokens += facts[index]["train"]["tokens"]
            return found, tokens

        def start(index):
            return c, made, urls[index], index, enough, threads

        if processes == 1:
            while todo and prefix()[1] < goal:
                index = todo.pop(0)
                prepare_file(*start(index), report)
                finished(index)
            return {index: facts[index] for index in prefix()[0]}
        context = processes_of_their_own()
        try:
            while prefix()[1] < goal and (todo or running):
                while todo and len(running) < processes:
                    index = todo.pop(0)
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=in_a_process, args=(theirs, start(index)), daemon=True)
                    process.start()
                    theirs.close()       # so that the end of the process is the end of the pipe
                    running[ours] = (index, process)
                for connection in wait(list(running)):
                    index, process = running[connection]
                    try:
                        message = connection.recv()
                    except EOFError:
                        process.join()
                        raise RunError(f"the process that prepared {urls[index]} ended with exit code {process.exitcode}; whole "
                                       "files stay, the same command goes on from them") from None
                    if isinstance(message, Exception):
                        raise message
                    if message != "done":
                        report(*message)
                        continue
                    process.join()
                    del running[connection]
                    finished(index)
        finally:
            for _, process in running.values():
                process.kill()
                process.join()
        return {index: facts[index] for index in prefix()[0]}


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
