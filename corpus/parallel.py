"""Parquet files -> token shards, one file at a time, in as many processes as there are cores.

The idea: each file is prepared by itself, so the result does not depend on how many processes or
machines share the work. File 7 becomes the folder OUT/files/00007 with its shards, `documents.bin`
(what assemble.py needs to know of each document) and `facts.json`. The folder is written under a
temporary name and renamed at the end, so a prepared file is complete or absent.
"""
import hashlib
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

from core import tokenizer as tokenizers
from core.configurator import RunError, UserError
from core.files import ahead, find_files, hashed, remove_file_or_folder, write_json, write_whole
from core.schema import read_json
from corpus import hub
from corpus.shards import SplitWriter

SPLITS = ("train", "val")

# The name of a folder while it is written, 00007.PID.tmp: a killed process leaves it.
LEFTOVER = r"\d{5,}\.\d+\.tmp"

# documents.bin holds one record for each document that is not blank, sorted by id.
DOCUMENT_FIELDS = [
    ("id", "<u8"),            # a hash of the document's id
    ("row", "<u4"),           # of the parquet file
    ("tokens", "<u4"),        # eos included
    ("characters", "<u4"),
    ("val", "?"),             # is it held out for validation?
]
DOCUMENT = np.dtype(DOCUMENT_FIELDS)

# The shape of facts.json.
FACTS = {
    "made": {str: object},
    "whole": bool,
    "rows": int,
    "shards": {str: int},
    "train": {"tokens": int},
    "val": {"tokens": int},
}


@dataclass(frozen=True)
class Job:
    """What a corpus is made of, and how. Worker processes get a copy."""

    out: str                  # folder of the corpus; holds the tokenizer already
    source: str               # hf:ORG/NAME:CONFIG or parquet:FOLDER
    commit: str               # that a hub source is pinned to; "" for a folder
    urls: list                # of the parquet files, in order
    sizes: list               # of these files, in bytes
    tokenizer_hash: str
    val_fraction: float
    shard_tokens: int
    tokens: float = 0.0       # stop at the document that reaches so many training tokens; 0: all
    processes: int = 0        # 0: one per core
    threads: int = 0          # tokenizer threads of each process; 0: the cores, shared out
    retries: int = 0          # tries after a network error

    @property
    def limit(self):
        """Training tokens to stop at; infinity if there is no limit."""
        return self.tokens or math.inf

    def identity(self):
        """What decides the content of a prepared file; facts.json records it under "made"."""
        return {
            "source": self.source,
            "commit": self.commit,
            "val_fraction": self.val_fraction,
            "shard_tokens": self.shard_tokens,
            "tokenizer_hash": self.tokenizer_hash,
        }


@dataclass(frozen=True)
class PreparedFile:
    """What facts.json says of a prepared file."""

    is_complete: bool         # read to its end; False if `enough` tokens were reached before
    rows: int                 # of the parquet file that were read
    shards: dict              # {"train_000.bin": its documents}
    train_tokens: int
    val_tokens: int

    @property
    def tokens(self):
        return self.train_tokens + self.val_tokens


# -------------------------------------------------------------------------------------------------
# one file
def folder_of(out, index):
    """The folder of a prepared file."""
    return os.path.join(out, "files", f"{index:05d}")


def prepare_file(job, index, enough, threads, report):
    """Prepare one parquet file: write its folder.

    Reading stops after the batch that reaches `enough` training tokens. report(tokens) is called
    after each batch.
    """
    # Remove leftovers of killed processes, and what a run with a smaller --tokens made of it.
    folder = folder_of(job.out, index)
    shutil.rmtree(folder, ignore_errors=True)
    for old in find_files(os.path.dirname(folder), f"{index:05d}.*"):
        if re.fullmatch(LEFTOVER, os.path.basename(old)):
            remove_file_or_folder(old)

    temporary = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(temporary)
    tok = tokenizers.load(job.out)
    writers = {}
    for split in SPLITS:
        writers[split] = split_writer(temporary, split, tok, job.shard_tokens)

    # Read, tokenize and write a batch of rows at a time. The next one is read in the background.
    batches = [np.empty(0, DOCUMENT)]
    rows = 0
    train_tokens = 0
    for table in ahead(hub.tables(job.urls[index], job.retries), 1):
        batch = write_table(table, rows, job.val_fraction, tok, threads, writers)
        batches.append(batch)
        rows += len(table)
        train_tokens += int(batch["tokens"][~batch["val"]].sum())
        report(int(batch["tokens"].sum()))
        if train_tokens >= enough:
            break
    records = np.concatenate(batches)

    # Close the shards, and write down what assemble.py needs to know.
    facts = {"made": job.identity(), "whole": train_tokens < enough, "rows": rows, "shards": {}}
    for split in SPLITS:
        writers[split].close()
        for path, documents in writers[split].closed:
            facts["shards"][os.path.basename(path)] = documents
        split_records = records[is_of(split, records)]
        facts[split] = {
            "documents": len(split_records),
            "tokens": int(split_records["tokens"].sum()),
            "characters": int(split_records["characters"].sum()),
        }
    records = np.sort(records, order=("id", "row"))
    write_whole(os.path.join(temporary, "documents.bin"), records.tobytes())
    write_json(os.path.join(temporary, "facts.json"), facts)
    os.rename(temporary, folder)


def split_writer(folder, split, tok, shard_tokens):
    """A SplitWriter for folder/train_000.bin, folder/train_001.bin, ... or val_000.bin, ..."""

    def path_of(number):
        return os.path.join(folder, f"{split}_{number:03d}.bin")

    return SplitWriter(path_of, tok, shard_tokens)


def write_table(table, first_row, val_fraction, tok, threads, writers):
    """Tokenize the documents of some hub.Rows and write them. -> their records, DOCUMENT [n]"""
    rows = [row for row, text in enumerate(table.texts) if not hub.is_blank(text)]
    texts = [table.texts[row] for row in rows]
    names = [table.ids[row] for row in rows]
    ids = tok.encode_to_arrays(texts, threads)

    records = np.empty(len(rows), DOCUMENT)
    hashes = [id_hash(name, text) for name, text in zip(names, texts)]
    records["id"] = np.array(hashes, np.uint64)
    records["row"] = first_row + np.array(rows, np.int64)
    records["tokens"] = [len(document) + 1 for document in ids]
    records["characters"] = [len(text) for text in texts]
    records["val"] = [hashed(text) < val_fraction for text in texts]

    for split in SPLITS:
        chosen = np.flatnonzero(is_of(split, records))
        writers[split].write([ids[i] for i in chosen])
    return records


def is_of(split, records):
    """Which records belong to a split. -> bool [n]"""
    return records["val"] if split == "val" else ~records["val"]


def id_hash(name, text):
    """A hash, of 64 bits, of a document's id, or of its text if it has no id.

    Two of 100 million ids collide with probability 0.0003.
    """
    key = (name or text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def read_prepared(job, index, enough):
    """The PreparedFile of a file that was read to its end or to `enough` tokens, else None.

    Raises UserError if it was prepared from another source or with other settings.
    """
    folder = folder_of(job.out, index)
    if not os.path.isdir(folder):
        return None
    facts = read_json(os.path.join(folder, "facts.json"), FACTS)
    identity = job.identity()
    changed = [
        f"{key} was {value}, is {identity.get(key)}"
        for key, value in facts["made"].items()
        if identity.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{folder} was made otherwise ({'; '.join(changed)}): delete it, or prepare in "
            "another --out"
        )
    prepared = PreparedFile(
        is_complete=facts["whole"],
        rows=facts["rows"],
        shards=facts["shards"],
        train_tokens=facts["train"]["tokens"],
        val_tokens=facts["val"]["tokens"],
    )
    if prepared.is_complete or prepared.train_tokens >= enough:
        return prepared
    return None


def forget(out, index):
    """Remove everything that was made of one file, so that it is prepared again."""
    shutil.rmtree(folder_of(out, index), ignore_errors=True)
    for path in find_files(out, f"*_{index:05d}_*.bin"):
        if re.fullmatch(rf"(train|val)_{index:05d}_\d{{3,}}\.bin", os.path.basename(path)):
            os.remove(path)


# -------------------------------------------------------------------------------------------------
# many files
def prepare_files(job, order, goal, enough):
    """Prepare files until, counted from the first, they hold `goal` training tokens.

    order: the indices of the files, in the order in which they count towards the goal.
    enough: reading of a single file stops at so many training tokens.
    -> {index: PreparedFile} of the files up to the goal
    """
    queue = FileQueue(job, order, goal, enough)
    if queue.prepared:
        noun = "file" if len(queue.prepared) == 1 else "files"
        print(f"resuming after {len(queue.prepared)} complete {noun}", flush=True)
    cores = os.cpu_count()
    processes = max(1, min(job.processes or cores, len(order)))
    threads = job.threads or max(1, cores // processes)
    with queue.bar:
        if processes == 1:
            prepare_here(queue, threads)
        else:
            prepare_in_processes(queue, processes, threads)
    return queue.files_up_to_goal()


class FileQueue:
    """Which files are prepared and which are waiting, with a progress bar in tokens."""

    def __init__(self, job, order, goal, enough):
        self.job = job
        self.order = order
        self.goal = goal
        self.enough = enough
        self.prepared = {}       # {index: PreparedFile}
        for index in order:
            file = read_prepared(job, index, enough)
            if file is not None:
                self.prepared[index] = file
        self.waiting = [index for index in order if index not in self.prepared]
        self.started = time.time()
        self.new_tokens = 0
        self.bar = tqdm(
            unit=" tokens",
            unit_scale=True,
            desc="tokenizing",
            mininterval=1.0,
            total=goal if goal < math.inf else None,
            initial=self.prepared_tokens(),
        )

    def prepared_tokens(self):
        return sum(file.tokens for file in self.prepared.values())

    def report(self, tokens):
        """Advance the progress bar by so many tokens."""
        self.new_tokens += tokens
        speed = self.new_tokens / (time.time() - self.started)
        self.bar.update(tokens)
        self.bar.set_postfix_str(
            f"{len(self.prepared)} of {len(self.order)} files, {speed:,.0f} tokens/s"
        )

    def finished(self, index):
        """Note that a file is prepared."""
        self.prepared[index] = read_prepared(self.job, index, self.enough)
        if self.goal == math.inf:
            # Estimate the tokens of all files from the tokens per byte so far.
            bytes_so_far = sum(self.job.sizes[i] for i in self.prepared)
            bytes_of_all = sum(self.job.sizes[i] for i in self.order)
            self.bar.total = self.prepared_tokens() * bytes_of_all / bytes_so_far

    def files_up_to_goal(self):
        """The prepared files before the first gap, up to the goal. -> {index: PreparedFile}"""
        files = {}
        tokens = 0
        for index in self.order:
            if index not in self.prepared or tokens >= self.goal:
                break
            files[index] = self.prepared[index]
            tokens += files[index].train_tokens
        return files

    def is_done(self):
        tokens = sum(file.train_tokens for file in self.files_up_to_goal().values())
        return tokens >= self.goal


def prepare_here(queue, threads):
    """Prepare the files one after the other in this process."""
    while queue.waiting and not queue.is_done():
        index = queue.waiting.pop(0)
        prepare_file(queue.job, index, queue.enough, threads, queue.report)
        queue.finished(index)


def prepare_in_processes(queue, processes, threads):
    """Prepare the files in several processes at a time. Each process prepares one file and ends."""
    context = worker_context()
    workers = {}     # {our end of a worker's pipe: (index of its file, process)}
    try:
        while not queue.is_done() and (queue.waiting or workers):
            while queue.waiting and len(workers) < processes:
                index = queue.waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, queue.job, index, queue.enough, threads)
                process = context.Process(target=work, args=arguments, daemon=True)
                process.start()
                # The worker now holds the only sender: when it ends, receiving raises EOFError.
                sender.close()
                workers[receiver] = (index, process)
            for receiver in wait(list(workers)):
                index, process = workers[receiver]
                message = receive(receiver, process, queue.job.urls[index])
                if message == "done":
                    process.join()
                    del workers[receiver]
                    queue.finished(index)
                else:
                    queue.report(message)
    finally:
        for _, process in workers.values():
            process.kill()
            process.join()


def worker_context():
    """The way to start worker processes: forked from a server that has done all imports.

    So they start in milliseconds. The server has no threads, so no worker is forked while another
    thread holds a lock.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["huggingface_hub", "pyarrow.parquet", "corpus.parallel"])
    return context


def work(sender, job, index, enough, threads):
    """prepare_file in a worker process. It sends counts of tokens, then "done" or an exception."""
    # Ctrl-C reaches all processes. The parent process stops this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        prepare_file(job, index, enough, threads, sender.send)
        sender.send("done")
    except (UserError, RunError) as error:
        sender.send(error)
    except BrokenPipeError:
        return      # the parent process is gone
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or job.out})"
        sender.send(RunError(f"{reason}; complete files stay, run the same command to resume"))


def receive(receiver, process, url):
    """The next message of a worker: a number of tokens, or "done". Raises what went wrong in it."""
    try:
        message = receiver.recv()
    except EOFError:
        process.join()
        raise RunError(
            f"the process that prepared {url} ended with exit code {process.exitcode}; complete "
            "files stay, run the same command to resume"
        ) from None
    if isinstance(message, Exception):
        raise message
    return message
