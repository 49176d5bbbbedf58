"""Does everything run on this machine?

    python bench.py alive
    python bench.py alive --compile=false

On a GPU it makes the trial calls of the attention kernels. Then it compares the gradient of a
training step, eager and compiled, with that of the reference. Then it runs 30 steps of train.py.
Each result is printed and written the moment it is known, so a run that is cut short leaves the
results it has.
"""
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace

import torch

import kernels
from benchmarks import runs
from benchmarks.contestants import batches, write_corpus
from benchmarks.rows import describe, error_in_words, log, record, versions
from benchmarks.settings import StepSettings, as_flags
from core.configurator import Path
from core.device import pick_device, why_not_compile
from core.files import ROOT
from kernels.dispatch import FAST_ON_GPU, try_out
from model import Encoder, ModelConfig

# Query heads, KV heads and head dim: those of 210m, 610m and 1b, and a case with the third head dim
# that the Triton kernels support.
HEADS = ((12, 12, 64), (18, 6, 64), (18, 6, 96), (16, 8, 128))
MAX_GRADIENT_ERROR = 3e-2       # of a step in bf16 beside one in fp32, relative
TRAINING_STEPS = 30             # of train.py


@dataclass
class Config:
    # how
    compile: bool = True         # torch.compile where a compiler is installed
    device: str = "auto"         # cuda where there is one, else cpu
    dtype: str = "auto"          # of train.py
    to: Path = ""                # append the rows, with device and versions, to this .jsonl file


def alive(c):
    device = pick_device(c.device)
    facts = versions(device)
    log(f"{describe(device)}; " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    record(c.to, {"bench": "alive", "name": "versions", "ok": True} | facts, device)
    settings = StepSettings(size="tiny", vocab_size=1024, block_size=256, rows=4, device=c.device,
                            dtype=c.dtype)
    on_gpu = device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(settings, folder)
        # Compiling takes most of the time, and uses one core. So the trial calls and train.py run
        # at the same time, in processes of their own.
        trials = [start_trial(c, heads) for heads in HEADS] if on_gpu else []
        # On a GPU: a size with head dim 64, which the Triton kernels support.
        train_settings = replace(settings, size="demo") if on_gpu else settings
        training = runs.start(train_settings, folder, "train", TRAINING_STEPS,
                              is_compiled=c.compile)
        check_steps(c, settings, folder, device)
        for process in trials:
            process.wait()
        check_training(c, training, folder, device)
    if not on_gpu:
        log("trial calls of the attention kernels: need a CUDA GPU")
        return
    # What the trial calls compiled lies in Triton's cache now, so this is quick.
    for n_head, n_kv_head, head_dim in HEADS:
        name = kernels.resolve("auto", "cuda", torch.bfloat16, head_dim, n_head, n_kv_head)
        row = {"bench": "auto", "heads": [n_head, n_kv_head, head_dim], "name": name}
        record(c.to, row, device)


# --------------------------------------------------------------------------------------------------
# trial calls of the attention kernels

@dataclass
class TrialConfig:
    args: tuple = ()             # query heads, KV heads, head dim
    device: str = "auto"
    to: Path = ""


def start_trial(c, heads):
    words = [str(number) for number in heads]
    flags = as_flags(TrialConfig(device=c.device, to=c.to))
    script = os.path.join(ROOT, "bench.py")
    return subprocess.Popen([sys.executable, script, "trial", *words, *flags])


def trial(c):
    """The process of one trial: bench.py trial QUERY_HEADS KV_HEADS HEAD_DIM."""
    device = pick_device(c.device)
    kind = device.partition(":")[0]
    n_head, n_kv_head, head_dim = (int(word) for word in c.args)
    for name in FAST_ON_GPU:
        try:
            problem, error = try_out(name, kind, torch.bfloat16, head_dim, n_head, n_kv_head)
        except Exception as crash:
            # A compiler or a driver may raise anything. This process is here to find out.
            problem = error_in_words(crash)
            error = None
        verdict = problem or f"agrees with the reference, error {error:.1e}"
        log(f"trial call of {name}, {n_head}/{n_kv_head} heads of {head_dim}: {verdict}")
        row = {
            "bench": "trial",
            "heads": [n_head, n_kv_head, head_dim],
            "name": name,
            "ok": problem is None,
            "error": error,
            "problem": problem,
        }
        record(c.to, row, device)


# --------------------------------------------------------------------------------------------------
# one training step beside the reference

def check_steps(c, settings, folder, device):
    """Compare a training step's gradient with the reference's. CLM and MLM, eager and compiled."""
    on_gpu = device.startswith("cuda")
    attention = "triton" if on_gpu else "sdpa"
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=256, n_ffn=512,      # head dim 64
                         vocab_size=settings.vocab_size)
    no_compile = why_not_compile(device) if c.compile else "--compile=false"
    for objective in ("clm", "mlm"):
        batch = next(batches(folder, settings.data_settings(), objective, device))
        exact = gradient_of_step(config, batch, device, "reference", is_compiled=False,
                                 is_bf16=False)
        for is_compiled in (False, True):
            name = f"a step of {objective.upper()}, {'compiled' if is_compiled else 'eager'}"
            if is_compiled and no_compile:
                log(f"{name}: not run: {no_compile}")
                continue
            try:
                gradient = gradient_of_step(config, batch, device, attention, is_compiled,
                                            is_bf16=on_gpu)
                error = ((gradient - exact).norm() / exact.norm()).item()
                ok = error < MAX_GRADIENT_ERROR
                verdict = "agrees" if ok else "WRONG"
                log(f"{name}: its gradient is {error:.1e} from the reference's: {verdict}")
            except Exception as crash:
                error = None
                ok = False
                log(f"{name}: FAILED: {error_in_words(crash)}")
            record(c.to, {"bench": "alive", "name": name, "ok": ok, "error": error}, device)


def gradient_of_step(config, batch, device, attention, is_compiled, is_bf16):
    """Return the gradient of the mean loss by all parameters, laid end to end. -> [n_params]"""
    torch.manual_seed(0)
    with torch.device(device):
        model = Encoder(config, attention)
    if is_compiled:
        model.compile()
    batch = batch.to(device)
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=is_bf16):
        hidden = model(batch.tokens, batch.cu_seqlens, batch.causal, batch.positions)      # [N, C]
        loss_sum = kernels.linear_cross_entropy(hidden, model.lm_head.weight, batch.targets)
        loss = loss_sum / batch.num_targets
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# --------------------------------------------------------------------------------------------------
# train.py, started as a user starts it

def check_training(c, process, folder, device):
    """Check the loss of train.py on random tokens: is it finite, and does it fall?"""
    try:
        losses = [row["loss"] for row in runs.finish(process, folder, "train")]
        is_complete = len(losses) == TRAINING_STEPS and all(math.isfinite(loss) for loss in losses)
        ok = is_complete and losses[-1] < losses[0]
        verdict = "it learns" if ok else "WRONG"
        fall = f"{losses[0]:.3f} -> {losses[-1]:.3f}"
        log(f"train.py, {TRAINING_STEPS} steps: loss {fall}: {verdict}")
    except Exception as problem:
        ok = False
        log(f"train.py: FAILED: {problem}")
    record(c.to, {"bench": "alive", "name": "train.py", "ok": ok}, device)
