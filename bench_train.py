"""The training part of bench.py: whole steps (data, forward, backward, clip, optimizer) of ours, of ours with one feature
switched off at a time, and of the peers.

Each contestant is a process of its own, as a user would run it, with a compiler's cache that is empty. All read the same
random tokens from shards on disk, cut, masked and laid out in a background thread as train.py does it; who needs padding
gets each sequence padded to block_size, the static shape a compiler wants. On a CPU the contestants take turns, up to
five at a time and the first always among them; on a GPU, whose memory they would have to share, they come one by one.
"""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import hf_model
import system
import tokenizer
from configurator import UserError
from kernels import linear_cross_entropy
from model import SIZES, Encoder, ModelConfig

AT_ONCE = 4            # on a CPU, beside the first: each keeps 2 to 4 GiB
ROWS_ON_DISK = 64      # times a step's; then steps see a row again, with another cut and mask
NAMES = {"ours": "ours, MLM",
         "ours-clm": "ours, CLM",
         "ours-kernel": "ours, MLM, without the attention kernel: SDPA a sequence",
         "ours-head": "ours, MLM, logits at every position",
         "ours-loss": "ours, MLM, without the fused loss: all logits at once",
         "ours-eager": "ours, MLM, without torch.compile",
         "ours-padded": "ours, MLM, padded",
         "ours-malloc": "ours, MLM, without system.keep_freed_memory",
         "eurobert": "Hugging Face EuroBERT, MLM, compiled",
         "eurobert-eager": "Hugging Face EuroBERT, MLM, eager",
         "nanogpt": "nanoGPT, CLM, compiled",
         "nanogpt-eager": "nanoGPT, CLM, eager, as its README asks on a CPU",
         "nanogpt-dropout": "nanoGPT, CLM, compiled, dropout 0.2 as in its 6 x 384 model",
         "nanogpt-shipped": "nanoGPT, CLM, eager, dropout 0.2: both as shipped"}


def contestants(c):
    """{key of NAMES: (function that builds its step, why it is not measured here or None)}"""
    device = system.pick_device(c.device)
    no_compile, on_gpu = system.why_not_compile(device), device.startswith("cuda")
    no_peer = None if importlib.util.find_spec("transformers") else "transformers is not installed"
    no_clone = None if os.path.isfile(os.path.join(c.nanogpt or "-", "model.py")) else "no --nanogpt=CLONE was given"
    # its only 6 x 384 model, config/train_shakespeare_char.py, has dropout 0.2; its README asks for --compile=False on a CPU
    no_dropout = no_clone or (None if c.size == "small" else "not that model")
    no_eager = "its README asks for that on a CPU" if on_gpu else None

    def us(objective="mlm", **off):
        return lambda: ours(c, device, objective, **off)
    found = {"ours": (us(), no_compile),
             "ours-clm": (us("clm"), no_compile),
             "ours-kernel": (us(attention="sdpa"), no_compile or (None if on_gpu else "a CPU has no such kernel")),
             "ours-head": (us(head_everywhere=True), no_compile),
             "ours-loss": (us(fused_loss=False), no_compile),
             "ours-eager": (us(compiled=False), None),
             "ours-padded": (us(pads=True), no_compile or (None if c.random_length else "nothing to pad")),
             "ours-malloc": (us(), "a GPU has no part in it" if on_gpu else no_compile),
             "eurobert": (lambda: eurobert(c, device), no_peer or no_compile),
             "eurobert-eager": (lambda: eurobert(c, device, compiled=False), no_peer),
             "nanogpt": (lambda: nanogpt(c, device), no_clone or no_compile),
             "nanogpt-eager": (lambda: nanogpt(c, device, compiled=False), no_clone or no_eager),
             "nanogpt-dropout": (lambda: nanogpt(c, device, 0.2), no_dropout or no_compile),
             "nanogpt-shipped": (lambda: nanogpt(c, device, 0.2, compiled=False), no_dropout or no_eager)}
    wanted = [key for key in c.contestants.split(",") if key]
    if set(wanted) - set(found):
        raise UserError(f"contestants={c.contestants}: expected some of {','.join(found)}")
    return {key: found[key] for key in wanted or found}


# ---------------------------------------------------------------------------------------------------------------------
# data
def write_corpus(c, folder):
    """A corpus that data.Corpus and train.py read: random tokens with Zipf's frequencies, as text has them."""
    special = c.vocab_size - 2
    ranks = {bytes([i]) if i < 256 else i.to_bytes(4, "big"): i for i in range(special)}
    specials = {"<|eos|>": special, "<|mask|>": special + 1}
    tok = tokenizer.build("random", ranks, tokenizer.GPT2_PATTERN, specials, "<|eos|>", "<|mask|>", c.vocab_size)
    tokenizer.save(tok, folder)
    drawn = np.random.default_rng(0).zipf(1.1, (ROWS_ON_DISK + 1) * max(c.rows, 8) * c.block_size)
    tokens = (drawn.astype(np.uint64) % np.uint64(special)).astype(np.int64)
    for split, part in (("val", tokens[:8 * c.block_size]), ("train", tokens)):
        writer = data.ShardWriter(os.path.join(folder, f"{split}_000000.bin"), tok)
        writer.write(part)
        writer.close()
    system.write_json(os.path.join(folder, "manifest.json"), {"complete": True})


def batches(c, objective, device, layout=lambda batch: batch):
    """The batches train.py would get on one device, each laid out by `layout`, made in the background, without end."""
    corpus = data.Corpus(c.data_dir)
    settings = SimpleNamespace(block_size=c.block_size, batch_rows=c.rows, seed=42, first_row=0, random_length=c.random_length,
                               document_mask=False, mask_rate=c.mask_rate, mask_replace=(1.0, 0.0, 0.0))

    def make(step):
        batch, = data.micro_batches(corpus, step, objective, settings, 0, 1, c.rows)
        batch = layout(batch)
        return batch.pin() if device.startswith("cuda") else batch
    return data.prefetch(make, 0, 1 << 40)


def padded(batch, length):
    """The same sequences, each filled up to `length` at its end. -> Batch of S * length tokens"""
    S, lengths = len(batch.lengths), torch.from_numpy(batch.lengths)
    sequence = torch.arange(S).repeat_interleave(lengths)                                                  # [T]
    place = sequence * length + torch.arange(len(sequence)) - batch.cu_seqlens.long()[sequence]            # [T]
    tokens = torch.zeros(S * length, dtype=torch.int64).index_copy(0, place, batch.tokens)
    return replace(batch, tokens=tokens, cu_seqlens=torch.arange(0, S * length + 1, length, dtype=torch.int32),
                   positions=place[batch.positions])


def labels_of(batch):
    """Targets at their places among all tokens, -100 elsewhere. -> [T]"""
    labels = torch.full_like(batch.tokens, -100)
    real = batch.targets >= 0
    labels[batch.positions[real]] = batch.targets[real]
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# contestants: each is step(), which trains on a batch and returns it, and flops(batch), what a step of it takes at least
def stepper(model, optimizer, stream, loss_of, precision=nullcontext):
    def step():
        batch = next(stream)
        with precision():
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch
    return step


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)


def autocast(c, device):
    bf16 = system.pick_dtype(c.dtype, device) == "bfloat16"
    return (lambda: torch.autocast(device.partition(":")[0], torch.bfloat16)) if bf16 else nullcontext


def config_of(c):
    return ModelConfig(**SIZES[c.size], vocab_size=c.vocab_size, block_size=c.block_size)


def structural(c):
    """FLOPs of a step by model.Encoder.flops: no padding, logits only at targets. The same count for ours and for EuroBERT."""
    with torch.device("meta"):
        model = Encoder(config_of(c))
    return lambda batch: model.flops(batch.lengths, batch.num_targets, batch.causal)


def ours(c, device, objective, attention="auto", head_everywhere=False, fused_loss=True, compiled=True, pads=False):
    torch.manual_seed(0)
    with torch.device(device):      # the weights of 1b are made in no time on a GPU, in ten seconds on a CPU
        model = Encoder(config_of(c), attention, c.checkpoint_activations)
    if compiled:
        model.compile()

    def layout(batch):
        batch = padded(batch, c.block_size) if pads else batch
        return replace(batch, positions=torch.arange(len(batch.tokens)), targets=labels_of(batch)) if head_everywhere else batch

    def loss_of(batch):
        batch = batch.to(device)
        hidden = model(batch.tokens, batch.cu_seqlens, batch.causal, batch.positions)                      # [N, C]
        if fused_loss:
            return linear_cross_entropy(hidden, model.lm_head.weight, batch.targets) / batch.num_targets
        return F.cross_entropy(model.logits(hidden).float(), batch.targets, ignore_index=-100)
    return stepper(model, adamw(model), batches(c, objective, device, layout), loss_of, autocast(c, device)), structural(c)


def eurobert(c, device, compiled=True):
    """Hugging Face's EuroBertForMaskedLM with our dimensions, by SDPA; logits at every position, as it computes them."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM
    torch.manual_seed(0)
    same = hf_model.write_config(config_of(c), causal=False)
    ids = dict(bos_token_id=0, eos_token_id=1, mask_token_id=2, pad_token_id=None)
    with torch.device(device):
        model = EuroBertForMaskedLM(EuroBertConfig.from_dict(same | ids, attn_implementation="sdpa")).train()
    forward = torch.compile(model) if compiled else model

    def layout(batch):      # `positions` carries the attention mask here
        rows = padded(batch, c.block_size)
        visible = torch.arange(c.block_size) < torch.from_numpy(batch.lengths)[:, None]                    # [S, L]
        tokens, targets = (x.view(visible.shape) for x in (rows.tokens, labels_of(rows)))
        return replace(rows, tokens=tokens, targets=targets, positions=visible.long())

    def loss_of(batch):
        batch = batch.to(device)
        mask = {"attention_mask": batch.positions} if c.random_length else {}     # nothing padded: no mask, so SDPA's flash kernel
        return forward(input_ids=batch.tokens, labels=batch.targets, **mask).loss
    return stepper(model, adamw(model), batches(c, "mlm", device, layout), loss_of, autocast(c, device)), structural(c)


def nanogpt(c, device, dropout=0.0, compiled=True):
    """The GPT of a nanoGPT clone, as deep and wide, trained as it ships: whole rows, fp32 on a CPU, bf16 on a GPU, its AdamW."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(c.nanogpt, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    s, kind = SIZES[c.size], device.partition(":")[0]
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=s["n_layer"], n_head=s["n_head"],
                                        n_embd=s["n_embd"], dropout=dropout, bias=False)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), kind)
    forward = torch.compile(model) if compiled else model
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))

    def layout(batch):
        shape = c.rows, c.block_size
        return replace(batch, tokens=batch.tokens.view(shape), targets=batch.tokens.roll(-1).view(shape))

    def loss_of(batch):
        batch = batch.to(device)
        return forward(batch.tokens, batch.targets)[1]

    def flops(batch):      # 6 a weight and token; attention's pairs under the causal mask
        return 6 * c.rows * c.block_size * (products + s["n_layer"] * s["n_embd"] * (c.block_size + 1))
    precision = nullcontext if kind == "cpu" else lambda: torch.autocast(kind, torch.bfloat16)
    return stepper(model, optimizer, batches(c, "clm", device, layout), loss_of, precision), flops


# ---------------------------------------------------------------------------------------------------------------------
# the race
def contestant(c, key):
    """The process of one contestant. Each line on its stdin asks for c.steps steps, each answer is a line of JSON."""
    device = system.pick_device(c.device)
    if key.startswith("ours") and key != "ours-malloc":
        system.keep_freed_memory()
    system.limit_memory(device, c.memory_gib)
    try:
        step, flops = contestants(c)[key][0]()
        step()
        system.synchronize(device)
        answer(first=True)
        step()      # may compile once more, for gradients that are laid out otherwise
        system.synchronize(device)
        answer(ready=True)
        for _ in sys.stdin:
            step()      # untimed: caches and clocks are another contestant's until then
            system.synchronize(device)
            began = time.perf_counter()
            seen = [step() for _ in range(c.steps)]
            system.synchronize(device)
            answer(seconds=time.perf_counter() - began, flops=sum(map(flops, seen)))
        answer(peak=system.peak_memory(device))
    except (RuntimeError, MemoryError) as error:      # a GPU's and a CPU's allocator have each their own words for it
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        answer(failed="out of memory")


def profile(c, key, steps=3):
    """torch.profiler's table of a contestant's steps, most time of its own first."""
    device = system.pick_device(c.device)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * device.startswith("cuda")
    system.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(c, folder)
        step, _ = contestants(replace(c, data_dir=folder))[key][0]()
        for _ in range(3):
            step()
        system.synchronize(device)
        with torch.profiler.profile(activities=kinds) as found:
            for _ in range(steps):
                step()
            system.synchronize(device)
    sort = f"self_{'device' if device.startswith('cuda') else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=70)


def answer(**facts):
    print("answer " + json.dumps(facts), flush=True)


class Runner:
    """A contestant's process, seen from outside."""

    def __init__(self, c, key, folder):
        default, script = type(c)(), os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py")
        flags = [f"--{k}={v}" for k, v in vars(c).items() if k not in ("args", "to", "data_dir") and v != getattr(default, k)]
        self.errors, self.began = open(os.path.join(folder, key), "w+"), time.time()
        self.seconds, self.flops, self.failed = [], 0, None
        empty = {name: os.path.join(folder, f"{name}-{key}") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        self.process = subprocess.Popen([sys.executable, script, "contestant", key, *flags, f"--data_dir={folder}"], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=os.environ | empty)
        self.hear()
        self.first = time.time() - self.began
        self.hear()      # else its second step runs into another's first round

    def hear(self):
        """The next answer, or {}: `failed` says why there is none."""
        for line in self.process.stdout:
            if line.startswith("answer "):      # what else it prints is its own business
                facts = json.loads(line.removeprefix("answer "))
                self.failed = self.failed or facts.get("failed")
                return facts
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        self.failed = self.failed or f"exit code {self.process.wait()}: {lines[-1] if lines else 'no message'}"
        return {}

    def race(self):
        if not self.failed:
            with suppress(BrokenPipeError):      # it died: hear() will find out why
                print(file=self.process.stdin, flush=True)
            facts = self.hear()
            self.seconds.append(facts.get("seconds"))
            self.flops += facts.get("flops", 0)

    def finish(self):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.peak = None if self.failed else self.hear().get("peak")
        self.process.wait()
        self.errors.close()


def measure(c, device, show):
    """-> {key: row}, a row with either `why` it was not measured or seconds a step of each round, tok_per_s, the median ratio
    within a round to the `reference` (the first contestant), flops_per_s, peak bytes, and `first`, seconds from the start of its
    process to the end of its first step"""
    everybody, found = contestants(c), {}
    racing = [key for key, (_, why) in everybody.items() if not why]
    if not racing:
        raise UserError(f"contestants={c.contestants}: none can be measured here: "
                        + "; ".join(f"{key}: {why}" for key, (_, why) in everybody.items()))
    groups = [[key] for key in racing]
    if device == "cpu":      # who waits keeps its memory; the first races in each group, begun anew
        groups = [racing[:1] + racing[i:i + AT_ONCE] for i in range(1, len(racing), AT_ONCE)] or groups
    bar = tqdm(total=sum(map(len, groups)) * (c.rounds + 1), desc="rounds", smoothing=0)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(c, folder)
        for group in groups:
            runners = {}
            for key in group:
                runners[key] = Runner(c, key, folder)
                bar.update()
                show(f"{NAMES[key]}: " + (runners[key].failed or f"first step after {runners[key].first:.1f} s"))
            for _ in range(c.rounds):
                for runner in runners.values():
                    runner.race()
                    bar.update()
            for key, runner in runners.items():
                runner.finish()
                found.setdefault(key, runner)      # of the first, who ran in each group, the run with an empty cache
            for runner in runners.values():
                runner.beside = next(((k, r) for k, r in (runners if device == "cpu" else found).items() if not r.failed), None)
    bar.close()
    tokens, table = c.rows * c.block_size * c.steps, {}
    for key, (_, why) in everybody.items():
        runner = found.get(key)
        table[key] = row = {"key": key}
        if runner is None or runner.failed:
            row["why"] = why or runner.failed
            continue
        first, beside = runner.beside
        row |= {"seconds": [s / c.steps for s in runner.seconds], "tok_per_s": tokens / np.median(runner.seconds),
                "reference": first, "ratio": float(np.median(np.divide(runner.seconds, beside.seconds))),
                "flops_per_s": runner.flops / c.rounds / np.median(runner.seconds), "peak": runner.peak, "first": runner.first}
    return table
