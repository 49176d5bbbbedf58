"""Pretrain an encoder: causal language modelling, masked language modelling, or one and then the other.

    python train.py config/demo_mlm.py                                        # minutes, on a laptop's CPU
    python train.py config/210m_clm_then_mlm.py                               # one GPU
    torchrun --nproc_per_node=8 train.py config/1b_clm_then_mlm.py            # one machine with 8 GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/...

The same command again resumes from the newest intact checkpoint in out_dir. --branch_from=RUN/step_0010000 goes on from
an undecayed trunk with other phases; --init_from=CKPT starts a new schedule from finished weights (arXiv 2507.00994:
sections 4 and 5). SIGTERM and Ctrl-C finish the step, save and exit 0.
"""
import gc
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import objectives
from core import checkpoint, tokenizer
from core.configurator import RunError, UserError, run
from core.device import keep_freed_memory, peak_flops, peak_memory, pick_attention, pick_device, pick_dtype, why_not_compile
from core.distributed import all_sum, start_processes
from core.files import write_whole
from kernels import ATTENTION, linear_cross_entropy
from model import SIZES, Encoder
from objectives import objective_at
from pretraining import data, resume
from pretraining.data import DataSettings


@dataclass
class Config:
    # input and output
    data_dir: str = "data/sotu"              # a corpus made by prepare_fineweb.py
    out_dir: str = "out"                     # the run: config.json, log.jsonl, step_NNNNNNN/
    resume: bool = True                      # go on from out_dir's newest checkpoint; false: refuse a run that is there
    branch_from: str = ""                    # RUN/step_NNNNNNN of a trunk: go on from there with other phases
    init_from: str = ""                      # a checkpoint, hf:ORG/NAME or a Hugging Face folder: a new schedule from its weights
    keep_moments: bool = True                # with init_from: take AdamW's moments along if it has them
    save_interval: int = 1_000               # steps between checkpoints
    keep_last: int = 2                       # how many stay, besides each switch of objective and the start of the decay
    milestones: tuple = ()                   # more steps whose checkpoints stay, e.g. (1000, 2000, 5000)
    eval_interval: int = 500                 # steps between validations
    eval_rows: int = 128                     # validation rows, always the same ones
    eval_mask_rate: float = 0.4              # masking rate of the MLM validation, the same for all runs one compares
    log_interval: int = 10                   # steps between console lines; log.jsonl gets every step
    wandb_log: bool = False                  # log to Weights & Biases as well
    wandb_project: str = "nanoencoder"       # its project there
    # model
    size: str = ""                           # a row of model.SIZES; empty: that of init_from or branch_from, else 210m
    tied: bool = False                       # share the LM head with the embedding (the paper does not)
    # objective
    phases: tuple = (("clm", 10_000), ("mlm", 32_000))   # (objective, steps), one after the other; objectives.py has them all
    mask_rate: float = 0.4                   # share of ordinary tokens an MLM step hides; a phase "mlm20" has its own
    mask_replace: tuple = (1.0, 0.0, 0.0)    # hidden tokens become (mask, random, themselves); BERT's is (0.8, 0.1, 0.1)
    # data
    block_size: int = 2048                   # tokens in a row
    random_length: bool = True               # cut each row once, into sequences of 12 tokens or more (the paper's footnote 6)
    document_mask: bool = False              # also cut at document ends; the paper does not
    batch_rows: int = 1152                   # rows a step, over all GPUs: 1,152 x 2,048 = 2,359,296 tokens (Table 1)
    micro_rows: int = 12                     # rows a GPU takes at once
    seed: int = 42                           # of weights, data order, cuts and masks
    # optimizer: AdamW on every parameter, warmup - stable - linear decay
    learning_rate: float = 5e-4              # of the stable stretch
    warmup_steps: int = 2_000                # linear, from 0
    decay_steps: int = 2_000                 # linear to 0, the last steps of the last phase
    beta1: float = 0.9                       # AdamW
    beta2: float = 0.95                      # AdamW
    adam_eps: float = 1e-5                   # AdamW
    weight_decay: float = 0.1                # on everything, norms and embeddings included, as in the paper's code
    grad_clip: float = 1.0                   # global norm; 0: no clipping
    # system
    device: str = "auto"                     # cuda where there is one, else cpu
    dtype: str = "auto"                      # bfloat16 (autocast over fp32 weights) where it is fast, else float32
    compile: bool = True                     # torch.compile where a compiler is installed
    attention: str = "auto"                  # triton or varlen (CUDA), sdpa (anywhere) or reference (dense, for debugging)
    checkpoint_activations: bool = False     # compute each layer again in the backward pass: less memory, a third more work


def check(c, world_size):
    """Everything that can be wrong with the settings alone. Raises UserError. -> total steps"""
    for phase in c.phases:
        if type(phase) is not tuple or len(phase) != 2 or type(phase[1]) is not int or phase[1] < 1:
            raise UserError(f"phases={c.phases}: expected (objective, steps) pairs")
        try:
            objectives.parse(phase[0])
        except ValueError as error:
            raise UserError(f"phases={c.phases}: {error}") from None
    steps = sum(n for _, n in c.phases)
    if not c.phases or c.warmup_steps + c.decay_steps > steps:
        raise UserError(f"warmup_steps + decay_steps = {c.warmup_steps + c.decay_steps} is more than the {steps} steps of phases")
    c.size = c.size or "210m" * (not c.init_from and not c.branch_from)
    if c.size and c.size not in SIZES:
        raise UserError(f"size={c.size}: expected one of {', '.join(SIZES)} (model.SIZES; add a line for a new one)")
    if min(c.batch_rows, c.micro_rows) < 1 or c.batch_rows % (c.micro_rows * world_size):
        raise UserError(f"batch_rows={c.batch_rows} is not divisible by micro_rows={c.micro_rows} x {world_size} "
                        f"process{'es' * (world_size > 1)}: change one of them")
    for name in ("mask_rate", "eval_mask_rate"):
        if not 0.0 < getattr(c, name) <= 1.0:
            raise UserError(f"{name}={getattr(c, name)}: expected a share of the tokens, 0 < {name} <= 1")
    numbers = all(type(share) in (int, float) for share in c.mask_replace)
    if len(c.mask_replace) != 3 or not numbers or min(c.mask_replace) < 0 or abs(sum(c.mask_replace) - 1) > 1e-6:
        raise UserError(f"mask_replace={c.mask_replace}: expected three shares that add up to 1")
    if min(c.save_interval, c.eval_interval, c.log_interval, c.eval_rows, c.keep_last) < 1:
        raise UserError("save_interval, eval_interval, log_interval, eval_rows and keep_last must be at least 1")
    if not c.grad_clip >= 0:      # NaN fails, too
        raise UserError(f"grad_clip={c.grad_clip}: expected the largest norm a step's gradients may have, or 0 for no clipping")
    if c.branch_from and c.init_from:
        raise UserError("branch_from goes on with a schedule and init_from starts one: give one of them")
    return steps


def learning_rate_at(step, c, max_steps):
    """WSD: linear warmup, stable, linear decay to 0 over the last decay_steps (the paper, Table 1)."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    return c.learning_rate * min(1.0, (max_steps - step) / max(1, c.decay_steps))


def main(c):
    device = pick_device(c.device)
    processes, device = start_processes(device)
    try:
        train(c, device, processes)
    finally:
        gc.unfreeze()
        if dist.is_initialized():
            dist.destroy_process_group()


def train(c, device, processes):
    launched = time.time()
    say = print if processes.first else lambda *args, **kwargs: None
    max_steps = check(c, processes.world_size)
    keep_freed_memory()
    corpus, val_corpus = (data.Corpus(c.data_dir, split, verify=processes.local_rank == 0) for split in ("train", "val"))
    if corpus.tokenizer_hash != val_corpus.tokenizer_hash:
        raise UserError(f"the splits of {c.data_dir} have different tokenizers: prepare the corpus anew in an empty folder")
    data.count_rows(corpus, c), data.count_rows(val_corpus, c)      # raises if there is less than one
    dtype = pick_dtype(c.dtype, device)
    settings = asdict(c) | {"dtype": dtype, "tokenizer_hash": corpus.tokenizer_hash, "train_tokens": corpus.n_tokens}

    # ---- where the run begins, its model and its optimizer
    start = resume.start(c, settings, processes, say)
    step, totals = start.step, start.totals
    if step >= max_steps:
        return say(f"{c.out_dir} is finished: {max_steps} steps; nothing to do")
    config = resume.model_config(c, start, corpus.vocab_size)
    attention = pick_attention(c.attention, device, dtype, config)
    # "auto" goes by times on a GPU, which may differ between ranks: all take what rank 0 found
    names = list(ATTENTION)
    of_rank_0 = all_sum([names.index(attention) if processes.first else 0], processes)
    attention = names[int(of_rank_0[0])]
    torch.manual_seed(c.seed)
    model = Encoder(config, attention, c.checkpoint_activations).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.adam_eps,
                                  weight_decay=c.weight_decay, fused=True)
    if start.foreign:
        model.load_state_dict(start.foreign.weights)
        start.foreign = None      # a second copy of the weights that nobody reads again
    elif start.source:
        checkpoint.load(start.source, model, optimizer if start.moments else None)
    config_path, log_path = os.path.join(c.out_dir, "config.json"), os.path.join(c.out_dir, "log.jsonl")
    if processes.first:
        os.makedirs(c.out_dir, exist_ok=True)
        tokenizer.save(tokenizer.load(c.data_dir), c.out_dir)
        resume.trim_log(log_path, step)
        if not os.path.isfile(config_path):
            facts = {"settings": settings, "parent": start.source, "start_step": step, "run_id": os.urandom(4).hex(),
                     "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
            write_whole(config_path, json.dumps(facts, indent=1).encode())

    # ---- what it runs on
    parameters = model.num_parameters()
    no_compile = "compile=false" if not c.compile else why_not_compile(device)
    name = settings["size"] or c.init_from
    say(f"{name}: {parameters['encoder'] / 1e6:.1f} M parameters, {parameters['total'] / 1e6:.1f} M with the LM head | "
        f"{processes.world_size} x {device}, {dtype}, attention {attention}, "
        f"{'eager: ' + no_compile if no_compile else 'torch.compile'}")
    say(f"{corpus.n_tokens:,} training tokens, {max_steps * c.batch_rows * c.block_size:,} to train on in {max_steps} steps of "
        f"{c.batch_rows} x {c.block_size}; {val_corpus.n_tokens:,} validation tokens")
    if not no_compile:
        model.compile()
    wrapped = model if processes.world_size == 1 else DistributedDataParallel(      # gradients are made in the buckets that travel
        model, [processes.local_rank] if device.startswith("cuda") else None, gradient_as_bucket_view=True)
    autocast = torch.autocast(device.partition(":")[0], torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    peak = peak_flops(device)
    wandb_run = None
    if c.wandb_log and processes.first:
        import wandb
        with open(config_path, encoding="utf-8") as f:
            run_id = json.load(f)["run_id"]      # so that a resumed run goes on in the same plot
        wandb_run = wandb.init(project=c.wandb_project, dir=c.out_dir, id=run_id, resume="allow", config=settings,
                               name=os.path.basename(c.out_dir))

    # ---- data: this rank's micro-batches of each step, made in the background
    data_settings = DataSettings(c.block_size, c.batch_rows, c.random_length, c.document_mask, c.mask_rate, c.mask_replace,
                                 c.seed, start.first_row)
    eval_settings = data.validation_settings(data_settings, c.eval_mask_rate)

    def make(step):
        batches = data.micro_batches(corpus, step, objective_at(step, c.phases), data_settings, processes.rank,
                                     processes.world_size, c.micro_rows)
        return [b.pin() for b in batches] if device.startswith("cuda") else batches

    stream = data.prefetch(make, step, max_steps)

    def loss_of(batch):
        """Sum of the losses at one micro-batch's targets, fp32."""
        batch = batch.to(device)
        with autocast:
            hidden = wrapped(batch.tokens, batch.cu_seqlens, batch.causal, batch.positions)      # [N, C]
            return linear_cross_entropy(hidden, model.lm_head.weight, batch.targets)

    def validate():
        """Mean losses of both objectives: sums over sums, on all ranks, the same rows and masks every time."""
        row = {"step": step, "phase": objective_at(step, c.phases)} | totals
        for objective in ("clm", "mlm"):
            loss = targets = 0.0
            for b in data.validation_batches(val_corpus, objective, eval_settings, c.eval_rows, processes.rank,
                                             processes.world_size, c.micro_rows):
                with torch.no_grad():
                    loss, targets = loss + float(loss_of(b)), targets + b.num_targets
            loss, targets = all_sum([loss, targets], processes)
            row[f"val_{objective}_loss"] = loss / targets
        write_log([row])
        say(f"step {step:>6}/{max_steps}  validation  clm {row['val_clm_loss']:.4f}  mlm {row['val_mlm_loss']:.4f}", flush=True)

    def write_log(rows):
        if processes.first:
            with open(log_path, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        if wandb_run:
            for row in rows:
                wandb_run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    pending, clock = [], time.time()       # steps not yet logged: their losses stay on the device until then

    def flush():
        """Log the pending steps; with validation and saving the only places where the host waits for the device."""
        nonlocal clock
        if not pending:
            return
        k = len(pending)
        norms = torch.stack([r["grad_norm"] for r in pending]).tolist()
        sums = all_sum(torch.stack([r["loss"] for r in pending]).tolist() + [r["flops"] for r in pending], processes)
        seconds = max(1e-9, time.time() - clock)
        speed = {"tok_per_s": k * c.batch_rows * c.block_size / seconds,
                 "mfu": sum(sums[k:]) / seconds / (peak * processes.world_size) if peak else None,
                 "peak_memory": peak_memory(device)}
        for r, loss, flops, norm in zip(pending, sums[:k], sums[k:], norms):
            loss /= r["targets"]
            if not (abs(loss) < float("inf") and norm < float("inf")):     # NaN fails both
                good = checkpoint.all_of(c.out_dir)
                raise RunError(f"loss {loss}, gradient norm {norm} at step {r['step']}: stopped, not saved; "
                               f"{'the last good checkpoint is ' + good[-1] if good else 'there is no checkpoint yet'}. "
                               "A lower --learning_rate in another --out_dir may help")
            for key, value in {"tokens": c.batch_rows * c.block_size, "targets": r["targets"], "flops": int(flops),
                               "seconds": seconds / k}.items():
                totals[key] += value
            r |= {"loss": loss, "grad_norm": norm} | speed | totals
        write_log(pending)
        eta, mfu = timedelta(seconds=int((max_steps - step) * seconds / k)), speed["mfu"]
        say(f"step {step:>6}/{max_steps}  {r['phase']}  loss {r['loss']:.4f}  lr {r['lr']:.2e}  norm {r['grad_norm']:.2f}  "
            f"{speed['tok_per_s']:,.0f} tok/s  mfu {f'{mfu:.1%}' if mfu else 'n/a'}  eta {eta}", flush=True)
        pending.clear()
        clock = time.time()

    # ---- signals: finish the step, save, exit 0; a second Ctrl-C interrupts at once
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    # ---- the loop
    switches = {sum(n for _, n in c.phases[:i]) for i in range(1, len(c.phases))}
    keep = switches | {max_steps - c.decay_steps, max_steps, *c.milestones}       # checkpoints that stay, to branch from
    begin, stopping = step, False
    while True:
        last = step == max_steps
        if step % c.eval_interval == 0 or last:
            flush()
            validate()
            clock = time.time()
        if step > begin and (step % c.save_interval == 0 or step in keep or stopping):
            flush()
            if processes.first:
                state = {"settings": settings, "totals": totals, "first_row": start.first_row,
                         "objectives": objectives.facts_of(c.phases)}
                checkpoint.save(c.out_dir, step, model, state, optimizer)
                checkpoint.prune(c.out_dir, c.keep_last, keep)
            clock = time.time()
        if last or stopping:
            break

        batches = next(stream)
        targets, stopping = all_sum([sum(b.num_targets for b in batches), bool(stop)], processes)
        total = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            wrapped.require_backward_grad_sync = i == len(batches) - 1      # DDP reads it in the forward pass already
            loss = loss_of(batch)
            (loss * (processes.world_size / targets)).backward()            # DDP averages over ranks
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        lr = learning_rate_at(step, c, max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=processes.world_size == 1)     # under DDP they stay in its buckets
        pending.append({"step": step + 1, "phase": objective_at(step, c.phases), "loss": total, "lr": lr, "grad_norm": norm,
                        "targets": int(targets), "flops": sum(model.flops(b.lengths, b.num_targets, b.causal) for b in batches)})
        step += 1
        if step == begin + 1:
            flush()
            gc.collect(), gc.freeze()      # half a million objects that stay: no collection walks them again (0.2 s)
            say(f"first step after {time.time() - launched:.1f} s", flush=True)
        elif step % c.log_interval == 0:
            flush()
    if wandb_run:
        wandb_run.finish()
    say(f"stopped at step {step}; the same command goes on from here" if stopping and not last else f"done: {c.out_dir}")


if __name__ == "__main__":
    run(main, Config)
