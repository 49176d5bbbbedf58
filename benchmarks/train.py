"""The training part of bench.py: whole steps (data, forward, backward, clip, optimizer) of ours, of ours with one feature
switched off at a time, and of the peers.

Each contestant is a process of its own, as a user would run it, with a compiler's cache that is empty. All read the same
random tokens from shards on disk, cut, masked and laid out in a background thread as train.py does it; who needs padding
gets each sequence padded to block_size, the static shape a compiler wants. On a CPU the contestants take turns, up to
five at a time and the first always among them; on a GPU, whose memory they would have to share, they come one by one.
"""
import importlib.util
import os
from contextlib import nullcontext
from dataclasses import replace

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
from model import SIZES, Encoder, ModelConfig
from pretraining import data

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
    device = pick_device(c.device)
    no_compile, on_gpu = why_not_compile(device), device.startswith("cuda")
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
        writer = ShardWriter(os.path.join(folder, f"{split}_000000.bin"), tok)
        writer.write(part)
        writer.close()
    write_json(os.path.join(folder, "manifest.json"), {"complete": True})


def batches(c, objective, device, layout=lambda batch: batch):
    """The batches train.py would get on one device, each laid out by `layout`, made in the background, without end."""
    corpus = data.Corpus(c.data_dir)
    settings = data.DataSettings(c.block_size, c.rows, c.random_length, mask_rate=c.mask_rate)

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
    bf16 = pick_dtype(c.dtype, device) == "bfloat16"
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
    same = hf_weights.write_config(config_of(c), causal=False)
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
