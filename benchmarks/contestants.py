"""Who takes part in `bench.py train`: ours, ours with one feature switched off at a time, and the
peers.

A contestant is built from StepSettings and a corpus on disk. Then it runs whole training steps:
data, forward, backward, clip, optimizer. All read the same random tokens, which a background thread
cuts, masks and lays out as in train.py. A contestant that needs padding gets each sequence padded
to block_size, so that a compiler sees a single static shape.
"""
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from core import tokenizer
from core.configurator import UserError
from core.device import pick_device, pick_dtype, why_not_compile
from core.files import write_json
from corpus.shards import ShardWriter
from huggingface import weights as hf_weights
from kernels import linear_cross_entropy
from model import SIZES, Encoder
from pretraining import data

# The corpus holds the rows of so many steps. After that a step sees a row again, with another cut
# and mask.
STEPS_ON_DISK = 64

NAMES = {
    "ours": "ours, MLM",
    "ours-clm": "ours, CLM",
    "ours-kernel": "ours, MLM, without the attention kernel: SDPA called for each sequence",
    "ours-head": "ours, MLM, logits at every position",
    "ours-loss": "ours, MLM, without the fused loss: all logits at once",
    "ours-eager": "ours, MLM, without torch.compile",
    "ours-padded": "ours, MLM, padded",
    "ours-malloc": "ours, MLM, without device.keep_freed_memory",
    "eurobert": "Hugging Face EuroBERT, MLM, compiled",
    "eurobert-eager": "Hugging Face EuroBERT, MLM, eager",
    "nanogpt": "nanoGPT, CLM, compiled",
    "nanogpt-eager": "nanoGPT, CLM, eager, as its README asks on a CPU",
    "nanogpt-dropout": "nanoGPT, CLM, compiled, dropout 0.2 as in its 6 x 384 model",
    "nanogpt-shipped": "nanoGPT, CLM, eager, dropout 0.2: both as shipped",
}


@dataclass
class TrainingStep:
    """A contestant that is ready to train."""
    run: Callable          # () -> the Batch that it trained on
    flops_of: Callable     # (batch) -> the FLOPs that a step on this batch takes at least


@dataclass
class Contestant:
    build: Callable            # (settings, corpus_dir) -> TrainingStep
    why_not: str | None        # why it cannot be measured here


def contestants(settings, nanogpt_dir=""):
    """Return every contestant, in the order of NAMES. -> {key: Contestant}

    settings: StepSettings; nanogpt_dir: the folder of a clone of karpathy/nanoGPT, or "".
    Raises UserError if that folder is not one.
    """
    device = pick_device(settings.device)
    on_gpu = device.startswith("cuda")

    # Reasons, each None where it does not apply. A contestant gets the first one that does.
    no_compile = why_not_compile(device)
    no_kernel = None if on_gpu else "a CPU has no such kernel"
    no_padding = None if settings.random_length else "nothing to pad"
    no_malloc = "it concerns CPUs only" if on_gpu else None
    no_peer = None if importlib.util.find_spec("transformers") else "transformers is not installed"
    if nanogpt_dir and not os.path.isfile(os.path.join(nanogpt_dir, "model.py")):
        raise UserError(f"--nanogpt={nanogpt_dir} is not a clone of karpathy/nanoGPT: it has no model.py")
    no_clone = None if nanogpt_dir else "no --nanogpt=CLONE was given"
    # nanoGPT's only 6 x 384 model, config/train_shakespeare_char.py, has dropout 0.2; its README
    # asks for --compile=False on a CPU.
    no_dropout = None if settings.size == "small" else "nanoGPT's model of this size has none"
    no_eager = "its README asks for that on a CPU" if on_gpu else None

    clone = partial(nanogpt, nanogpt_dir=nanogpt_dir)
    return {
        "ours": Contestant(ours, no_compile),
        "ours-clm": Contestant(partial(ours, objective="clm"), no_compile),
        "ours-kernel": Contestant(partial(ours, attention="sdpa"), no_compile or no_kernel),
        "ours-head": Contestant(partial(ours, head_everywhere=True), no_compile),
        "ours-loss": Contestant(partial(ours, fused_loss=False), no_compile),
        "ours-eager": Contestant(partial(ours, compiled=False), None),
        "ours-padded": Contestant(partial(ours, pads=True), no_compile or no_padding),
        "ours-malloc": Contestant(ours, no_malloc or no_compile),
        "eurobert": Contestant(eurobert, no_peer or no_compile),
        "eurobert-eager": Contestant(partial(eurobert, compiled=False), no_peer),
        "nanogpt": Contestant(clone, no_clone or no_compile),
        "nanogpt-eager": Contestant(partial(clone, compiled=False), no_clone or no_eager),
        "nanogpt-dropout": Contestant(partial(clone, dropout=0.2),
                                      no_clone or no_dropout or no_compile),
        "nanogpt-shipped": Contestant(partial(clone, dropout=0.2, compiled=False),
                                      no_clone or no_dropout or no_eager),
    }


# --------------------------------------------------------------------------------------------------
# data

def write_corpus(settings, folder):
    """Write a corpus that train.py can read: random tokens, some as frequent as common words."""
    # a tokenizer of made-up tokens, whose last two ids are eos and mask
    n_ordinary = settings.vocab_size - 2
    ranks = {}
    for i in range(n_ordinary):
        token = bytes([i]) if i < 256 else i.to_bytes(4, "big")
        ranks[token] = i
    specials = {"<|eos|>": n_ordinary, "<|mask|>": n_ordinary + 1}
    tok = tokenizer.build("random", ranks, tokenizer.GPT2_PATTERN, specials, "<|eos|>", "<|mask|>",
                          settings.vocab_size)
    tokenizer.save(tok, folder)

    n_tokens = (STEPS_ON_DISK + 1) * max(settings.rows, 8) * settings.block_size
    drawn = np.random.default_rng(0).zipf(1.1, n_tokens)
    tokens = (drawn.astype(np.uint64) % np.uint64(n_ordinary)).astype(np.int64)
    splits = {"val": tokens[:8 * settings.block_size], "train": tokens}
    for split, tokens_of_split in splits.items():
        writer = ShardWriter(os.path.join(folder, f"{split}_000000.bin"), tok)
        writer.write(tokens_of_split)
        writer.close()
    write_json(os.path.join(folder, "manifest.json"), {"complete": True})


def batches(corpus_dir, data_settings, objective, device, layout=None):
    """Return an endless iterator over train.py's batches, which are made in the background.

    layout: (batch) -> the batch as a contestant needs it.
    """
    corpus = data.Corpus(corpus_dir)

    def make(step):
        micro_rows = data_settings.batch_rows      # one micro-batch a step
        batch = data.micro_batches(corpus, step, objective, data_settings, 0, 1, micro_rows)[0]
        if layout:
            batch = layout(batch)
        return batch.pin() if device.startswith("cuda") else batch

    return data.prefetch(make, 0, 1 << 40)


def padded(batch, length):
    """Fill up each sequence to `length`, at its end. -> Batch of S * length tokens"""
    S = len(batch.lengths)
    lengths = torch.from_numpy(batch.lengths)
    sequence = torch.arange(S).repeat_interleave(lengths)                                  # [T]
    start = batch.cu_seqlens.long()[sequence]                                              # [T]
    offset = torch.arange(len(sequence)) - start                                           # [T]
    place = sequence * length + offset                                                     # [T]
    tokens = torch.zeros(S * length, dtype=torch.int64).index_copy(0, place, batch.tokens)
    cu_seqlens = torch.arange(0, S * length + 1, length, dtype=torch.int32)                # [S+1]
    return replace(batch, tokens=tokens, cu_seqlens=cu_seqlens, positions=place[batch.positions])


def labels_of(batch):
    """Return the targets at their places among all tokens, -100 elsewhere. -> [T]"""
    labels = torch.full_like(batch.tokens, -100)
    has_target = batch.targets >= 0
    labels[batch.positions[has_target]] = batch.targets[has_target]
    return labels


# --------------------------------------------------------------------------------------------------
# what the contestants have in common

def make_step(model, optimizer, stream, loss_of, precision=nullcontext):
    """Return a function that takes the next batch of `stream`, trains on it, and returns it."""

    def run():
        batch = next(stream)
        with precision():
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch

    return run


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5,
                             weight_decay=0.1, fused=True)


def autocast(settings, device):
    """Return a function that makes the context of a forward pass: autocast to bf16, or nothing."""
    if pick_dtype(settings.dtype, device) != "bfloat16":
        return nullcontext
    return partial(torch.autocast, device.partition(":")[0], torch.bfloat16)


def structural_flops(settings):
    """Return a function (batch) -> the FLOPs of a step, by model.Encoder.flops.

    It counts no padding, and logits only at targets, for ours and for EuroBERT alike.
    """
    with torch.device("meta"):
        model = Encoder(settings.model_config())
    return lambda batch: model.flops(batch.lengths, batch.num_targets, batch.causal)


# --------------------------------------------------------------------------------------------------
# the contestants

def ours(settings, corpus_dir, objective="mlm", attention="auto", head_everywhere=False,
         fused_loss=True, compiled=True, pads=False):
    """Our training step, with features switched on or off. -> TrainingStep"""
    device = pick_device(settings.device)
    torch.manual_seed(0)
    # Make the weights on the device: those of 1b take no time on a GPU and ten seconds on a CPU.
    with torch.device(device):
        model = Encoder(settings.model_config(), attention, settings.checkpoint_activations)
    if compiled:
        model.compile()

    def layout(batch):
        if pads:
            batch = padded(batch, settings.block_size)
        if head_everywhere:
            everywhere = torch.arange(len(batch.tokens))
            batch = replace(batch, positions=everywhere, targets=labels_of(batch))
        return batch

    def loss_of(batch):
        batch = batch.to(device)
        hidden = model(batch.tokens, batch.cu_seqlens, batch.causal, batch.positions)      # [N, C]
        if fused_loss:
            loss_sum = linear_cross_entropy(hidden, model.lm_head.weight, batch.targets)
            return loss_sum / batch.num_targets
        return F.cross_entropy(model.logits(hidden).float(), batch.targets, ignore_index=-100)

    stream = batches(corpus_dir, settings.data_settings(), objective, device, layout)
    run = make_step(model, adamw(model), stream, loss_of, autocast(settings, device))
    return TrainingStep(run, structural_flops(settings))


def eurobert(settings, corpus_dir, compiled=True):
    """Hugging Face's EuroBertForMaskedLM with our dimensions, by SDPA. -> TrainingStep

    It computes logits at every position.
    """
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    device = pick_device(settings.device)
    torch.manual_seed(0)
    dimensions = hf_weights.write_config(settings.model_config(), causal=False)
    ids = dict(bos_token_id=0, eos_token_id=1, mask_token_id=2, pad_token_id=None)
    config = EuroBertConfig.from_dict(dimensions | ids, attn_implementation="sdpa")
    with torch.device(device):
        model = EuroBertForMaskedLM(config).train()
    forward = torch.compile(model) if compiled else model

    def layout(batch):
        rows = padded(batch, settings.block_size)
        lengths = torch.from_numpy(batch.lengths)
        is_visible = torch.arange(settings.block_size) < lengths[:, None]                  # [S, L]
        tokens = rows.tokens.view(is_visible.shape)                                        # [S, L]
        labels = labels_of(rows).view(is_visible.shape)                                    # [S, L]
        # `positions` carries the attention mask here.
        return replace(rows, tokens=tokens, targets=labels, positions=is_visible.long())

    def loss_of(batch):
        batch = batch.to(device)
        mask = batch.positions
        if not settings.random_length:
            # Nothing is padded, and without a mask SDPA takes its flash kernel.
            mask = None
        return forward(input_ids=batch.tokens, labels=batch.targets, attention_mask=mask).loss

    stream = batches(corpus_dir, settings.data_settings(), "mlm", device, layout)
    run = make_step(model, adamw(model), stream, loss_of, autocast(settings, device))
    return TrainingStep(run, structural_flops(settings))


def nanogpt(settings, corpus_dir, nanogpt_dir, dropout=0.0, compiled=True):
    """The GPT of a nanoGPT clone, as deep and wide as ours. -> TrainingStep

    It trains as nanoGPT does: whole rows, fp32 on a CPU, bf16 on a GPU, its own AdamW.
    """
    path = os.path.join(nanogpt_dir, "model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    device = pick_device(settings.device)
    kind = device.partition(":")[0]
    size = SIZES[settings.size]
    torch.manual_seed(0)
    config = module.GPTConfig(block_size=settings.block_size, vocab_size=settings.vocab_size,
                              n_layer=size["n_layer"], n_head=size["n_head"], n_embd=size["n_embd"],
                              dropout=dropout, bias=False)
    model = module.GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), kind)
    forward = torch.compile(model) if compiled else model

    def layout(batch):
        shape = settings.rows, settings.block_size
        targets = batch.tokens.roll(-1)
        return replace(batch, tokens=batch.tokens.view(shape), targets=targets.view(shape))

    def loss_of(batch):
        batch = batch.to(device)
        _, loss = forward(batch.tokens, batch.targets)
        return loss

    # Its FLOPs, the same for every batch. Each token has 6 per weight, and in each layer's
    # attention 12 n_embd per visible token, of which there are (block_size + 1) / 2 on average.
    n_weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = size["n_layer"] * size["n_embd"] * (settings.block_size + 1)
    flops = 6 * settings.rows * settings.block_size * (n_weights + attention)

    precision = nullcontext if kind == "cpu" else partial(torch.autocast, kind, torch.bfloat16)
    stream = batches(corpus_dir, settings.data_settings(), "clm", device, layout)
    run = make_step(model, optimizer, stream, loss_of, precision)
    return TrainingStep(run, lambda _batch: flops)
