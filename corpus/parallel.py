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
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

from core import tokenizer as tokenizers
from core.configurator import RunError, UserError
from core.files import ahead, find_files, hashed, read_json, write_json, write_whole
from corpus import hub as hub_corpus
from corpus.shards import Shards

# documents.bin: one record for each document that is not blank, sorted by the hash of its id
DOCUMENT = np.dtype([("id", "<u8"), ("row", "<u4"), ("tokens", "<u4"), ("characters", "<u4"), ("val", "?")])
SPLITS = ("train", "val")


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
    context.set_forkserver_preload(["huggingface_hub", "pyarrow.parquet", "corpus.parallel"])
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
