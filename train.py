"""Pretrain an encoder with causal language modelling, masked language modelling, or one after the other.

    python train.py config/demo_mlm.py                                    # minutes, on a laptop's CPU
    python train.py config/210m_clm_then_mlm.py                           # one GPU
    torchrun --nproc_per_node=8 train.py config/1b_clm_then_mlm.py        # one machine with 8 GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/...

Run the same command again to resume from the newest intact checkpoint in out_dir.
--branch_from=RUN/step_0010000 continues another run with other phases, from a step before its
learning rate decays. --init_from=CKPT starts a new schedule from finished weights (arXiv
2507.00994, sections 4 and 5). SIGTERM and Ctrl-C finish the step, save and exit 0. Only one training
writes an out_dir at a time.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import gc
import math
import os
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import objectives
from core import checkpoint, tokenizer
from core.configurator import (
    Beta,
    NonNegativeFloat,
    NonNegativeInt,
    Path,
    PositiveFloat,
    PositiveInt,
    RunError,
    Seed,
    Share,
    UserError,
    run,
    shorten,
)
from core.device import (
    keep_freed_memory,
    pick_attention,
    pick_device,
    pick_dtype,
    remove_interrupted_compilations,
    why_not_compile,
)
from core.distributed import all_sum, naming_the_missing, start_processes
from core.files import write_json
from core.schema import read_json
from kernels import ATTENTION, linear_cross_entropy
from model import SIZES, Encoder
from objectives import objective_at
from pretraining import data, log, resume
from pretraining.data import DataSettings
from pretraining.lifetime import hold_out_dir, stop_on_signals


@dataclass
class Config:
    # input and output
    data_dir: Path = "data/sotu"             # a corpus made by prepare_fineweb.py
    out_dir: Path = "out"                    # the run: config.json, log.jsonl, step_NNNNNNN/
    resume: bool = True                      # if out_dir holds a run: true resumes it, false refuses
    branch_from: Path = ""                   # RUN/step_NNNNNNN: continue from there with other phases
    init_from: Path = ""                     # new schedule from the weights of a checkpoint or hf:ORG/NAME
    keep_moments: bool = True                # with init_from: load its optimizer state, too
    save_interval: PositiveInt = 1_000       # steps between checkpoints
    keep_last: PositiveInt = 2               # newest checkpoints to keep, besides those to branch from
    milestones: tuple[PositiveInt, ...] = ()  # more steps to keep, e.g. (1000, 2000)
    eval_interval: PositiveInt = 500         # steps between validations
    eval_rows: PositiveInt = 128             # validation rows, always the same ones
    eval_mask_rate: Share = 0.4              # masking rate of validation; the same in all runs you compare
    log_interval: PositiveInt = 10           # steps between console lines; log.jsonl gets every step
    wandb_log: bool = False                  # log to Weights & Biases, too
    wandb_project: str = "nanoencoder"       # its project there
    # model
    size: str = ""                           # a row of model.SIZES; empty: the given weights' size, else 210m
    tied: bool = False                       # share the LM head with the embedding (the paper does not)
    # objective
    phases: tuple = (("clm", 10_000), ("mlm", 32_000))  # (objective, steps); see objectives.py
    mask_rate: Share = 0.4                   # share of tokens an MLM step hides; "mlm20" has its own
    mask_replace: tuple = (1.0, 0.0, 0.0)    # shares of hidden tokens: mask, random, unchanged
    # data
    block_size: PositiveInt = 2048           # tokens in a row
    random_length: bool = True               # cut each row into two at a random place (paper's code)
    document_mask: bool = False              # also cut at document ends; the paper does not
    batch_rows: PositiveInt = 1152           # rows in a step, over all GPUs (Table 1: 2,359,296 tokens)
    micro_rows: PositiveInt = 12             # the most rows a GPU takes at once
    seed: Seed = 42                          # of weights, data order, cuts and masks
    # optimizer: AdamW on every parameter, warmup - stable - linear decay
    learning_rate: PositiveFloat = 5e-4      # of the stable stretch
    warmup_steps: NonNegativeInt = 2_000     # linear, from 0
    decay_steps: NonNegativeInt = 2_000      # linear to 0, the last steps of the run
    beta1: Beta = 0.9                        # AdamW
    beta2: Beta = 0.95                       # AdamW
    adam_eps: PositiveFloat = 1e-5           # AdamW
    weight_decay: NonNegativeFloat = 0.1     # on everything, also norms, as in the paper's code
    grad_clip: NonNegativeFloat = 1.0        # largest global norm of the gradients; 0: no clipping
    # system
    device: str = "auto"                     # cuda where there is one, else cpu
    dtype: str = "auto"                      # bfloat16 (autocast) where it is fast, else float32
    compile: bool = True                     # torch.compile where a compiler is installed
    attention: str = "auto"                  # triton or varlen (CUDA), sdpa (anywhere), reference
    checkpoint_activations: bool = False     # less memory for a third more work
    timeout: PositiveInt = 300               # seconds to wait for another process or machine


MOST_STEPS = 10**12
MOST_TOKENS = 2**31 - 1  # in a step: token positions in it are int32


def check(c, world_size):
    """Check the settings that do not depend on the corpus, and fill in the default size.

    -> the number of steps of all phases together. Raises UserError.
    """
    # the schedule
    if not c.phases:
        raise UserError("phases is empty: expected (objective, steps) pairs")
    phases = shorten(c.phases)
    for phase in c.phases:
        is_pair = type(phase) is tuple and [type(part) for part in phase] == [str, int]
        if not is_pair or not 1 <= phase[1] <= MOST_STEPS:
            raise UserError(f"phases={phases}: expected (objective, steps) pairs")
        try:
            objectives.parse(phase[0])
        except ValueError as error:
            raise UserError(f"phases={phases}: {error}") from None
    steps = sum(n for _, n in c.phases)
    if c.warmup_steps + c.decay_steps > steps:
        raise UserError(
            f"warmup_steps + decay_steps = {c.warmup_steps + c.decay_steps} is more than "
            f"the {steps} steps of phases"
        )
    if max(c.milestones, default=0) > steps:
        raise UserError(f"milestones={shorten(c.milestones)}: phases end at step {steps}")
    if c.branch_from and c.init_from:
        raise UserError("branch_from continues a schedule and init_from starts one: give one of them")

    # the model and the batch
    if not c.size and not c.init_from and not c.branch_from:
        c.size = "210m"
    if c.size and c.size not in SIZES:
        raise UserError(
            f"size={c.size}: expected one of {', '.join(SIZES)} "
            "(model.SIZES; add a line for a new one)"
        )
    if c.batch_rows % world_size:
        raise UserError(
            f"batch_rows={c.batch_rows} is not divisible by {world_size} processes: change one of them"
        )
    if c.block_size < 2:
        raise UserError("block_size=1: a row of one token has nothing to predict")
    data.check_block_size(c.block_size, c.random_length)
    if c.batch_rows * c.block_size > MOST_TOKENS:
        raise UserError(
            f"batch_rows={c.batch_rows} x block_size={c.block_size}: expected at most {MOST_TOKENS:,} "
            "tokens in a step"
        )

    # masking
    are_shares = all(type(share) in (int, float) and share >= 0 for share in c.mask_replace)
    if len(c.mask_replace) != 3 or not are_shares or not abs(sum(c.mask_replace) - 1) <= 1e-6:
        raise UserError(
            f"mask_replace={shorten(c.mask_replace)}: expected three shares that add up to 1"
        )
    # A step or a validation without a target would have no loss.
    for name, rate, rows in (
        ("mask_rate", c.mask_rate, c.batch_rows),
        ("eval_mask_rate", c.eval_mask_rate, c.eval_rows),
    ):
        if rate * rows * c.block_size < 1:
            raise UserError(
                f"{name}={rate} hides less than one of {rows} x {c.block_size} tokens: raise it"
            )
    return steps


def largest_micro_rows(c, world_size):
    """The most rows a process can take at once: at most micro_rows, and a divisor of its share of a step."""
    share = c.batch_rows // world_size
    rows = min(c.micro_rows, share)
    while share % rows:
        rows -= 1
    return rows


def learning_rate_at(step, c, max_steps):
    """The WSD schedule of the paper's Table 1: linear warmup, a stable stretch, linear decay.

    The decay would reach 0 one step after the last.
    """
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    return c.learning_rate * min(1.0, (max_steps - step) / max(1, c.decay_steps))


def configure_optimizer(model, c):
    """Make the run's optimizer. To try another, change it here: checkpoints save the state of any.

    They also record its class, and a run does not resume with another class. The schedule
    sets one learning rate for all of its parameter groups.
    """
    return torch.optim.AdamW(
        model.parameters(),
        lr=c.learning_rate,
        betas=(c.beta1, c.beta2),
        eps=c.adam_eps,
        weight_decay=c.weight_decay,
        fused=True,
    )


def compute_loss(model, lm_head, batch, autocast):
    """The sum of the losses at a micro-batch's targets, fp32. batch: a Batch on the model's device.

    model may be wrapped in DDP, which has no lm_head, so the head is passed by itself. DDP exchanges
    its gradient all the same: it watches parameters, not calls.
    """
    with autocast:
        hidden = model(batch.tokens, batch.cu_seqlens, batch.causal, batch.positions)  # [N, C]
        return linear_cross_entropy(hidden, lm_head.weight, batch.targets)


# the error on a rank that can read its own rows
UNREADABLE_ELSEWHERE = "another process of this run could not read the corpus"


def validate(loss_of, val_corpus, eval_settings, c, processes):
    """Mean losses of both objectives, over the same rows, cuts and masks every time.

    loss_of: batch -> sum of its losses; eval_settings: data.validation_settings(...)
    -> {"val_clm_loss": ..., "val_mlm_loss": ...}, the same on all ranks
    Raises RunError, on all ranks, if one cannot read its rows.
    """
    losses = {}
    for objective in ("clm", "mlm"):
        loss_sum = 0.0
        n_targets = 0
        failure = None
        batches = data.validation_batches(
            val_corpus, objective, eval_settings, c.eval_rows,
            rank=processes.rank, world_size=processes.world_size, micro_rows=c.micro_rows,
        )
        try:
            for batch in batches:
                with torch.no_grad():  # and no model.eval(): there is no dropout
                    loss_sum += float(loss_of(batch))
                n_targets += batch.num_targets
        except RunError as error:      # the corpus cannot be read: all ranks must hear of it
            failure = error
        # Total loss over total targets: how ranks and micro-batches share the rows does not matter.
        loss_sum, n_targets, n_failures = all_sum([loss_sum, n_targets, failure is not None], processes)
        if n_failures:
            raise failure or RunError(UNREADABLE_ELSEWHERE)
        if n_targets == 0:
            raise RunError("the validation has no token to predict: raise eval_mask_rate or eval_rows")
        losses[f"val_{objective}_loss"] = loss_sum / n_targets
    return losses


def main(c):
    processes, device = start_processes(pick_device(c.device), c.timeout)
    try:
        with naming_the_missing(processes), ExitStack() as at_exit:
            train(c, device, processes, at_exit)
    finally:
        gc.unfreeze()  # what train() froze
        if dist.is_initialized():
            dist.destroy_process_group()


def train(c, device, processes, at_exit):
    """Train a run from wherever it stands to its end. at_exit: an ExitStack that frees what it holds."""
    launched = time.time()
    max_steps = check(c, processes.world_size)
    micro_rows = largest_micro_rows(c, processes.world_size)
    if micro_rows != c.micro_rows:
        processes.print0(
            f"micro_rows={c.micro_rows} does not divide the {c.batch_rows // processes.world_size} rows that "
            f"each process has in a step: it takes {micro_rows} at once"
        )
        c.micro_rows = micro_rows
    keep_freed_memory()

    # ---- the corpus. One process on each machine verifies its checksums.
    verify = processes.local_rank == 0
    corpus = data.Corpus(c.data_dir, "train", verify)
    val_corpus = data.Corpus(c.data_dir, "val", verify)
    if corpus.tokenizer_hash != val_corpus.tokenizer_hash:
        raise UserError(
            f"the splits of {c.data_dir} have different tokenizers: "
            "prepare the corpus anew in an empty folder"
        )
    corpus_tokenizer = corpus.load_tokenizer()

    # ---- where the run begins. config.json and the checkpoints record run_settings.
    dtype = pick_dtype(c.dtype, device)
    run_settings = asdict(c) | {
        "dtype": dtype,
        "tokenizer_hash": corpus.tokenizer_hash,
        "train_tokens": corpus.n_tokens,
    }
    unwritable = hold_out_dir(c.out_dir, processes, at_exit)
    beginning = resume.start(c, run_settings, processes)
    step = beginning.step
    log_path = os.path.join(c.out_dir, "log.jsonl")
    # A run that was interrupted in its last validation is not finished.
    if step >= max_steps and log.has_validation(log_path, max_steps):
        processes.print0(f"{c.out_dir} is finished: {max_steps} steps; nothing to do")
        return
    if unwritable:
        raise RunError(
            f"{c.out_dir} cannot be written ({unwritable}): make it writable and run the same command"
        )
    data_settings = DataSettings(
        block_size=c.block_size, batch_rows=c.batch_rows,
        random_length=c.random_length, document_mask=c.document_mask,
        mask_rate=c.mask_rate, mask_replace=c.mask_replace,
        seed=c.seed, first_row=beginning.first_row,
    )
    eval_settings = data.validation_settings(data_settings, c.eval_mask_rate)
    data.count_rows(corpus, data_settings)  # raises if there is less than one row
    data.count_rows(val_corpus, eval_settings)

    # ---- the model and its optimizer
    config = resume.model_config(c, beginning, corpus.vocab_size)
    attention = pick_attention(c.attention, device, dtype, config)
    # On a GPU "auto" depends on timings, which may differ between ranks. So all take rank 0's
    # choice: the others add 0 to its index.
    names = list(ATTENTION)
    index = names.index(attention) if processes.is_first else 0
    attention = names[int(all_sum([index], processes)[0])]
    torch.manual_seed(c.seed)
    model = Encoder(config, attention, c.checkpoint_activations).to(device)
    optimizer = configure_optimizer(model, c)
    # Weights: from Hugging Face (already in memory), from a checkpoint, or else random.
    if beginning.imported:
        model.load_state_dict(beginning.imported.weights)
        beginning.imported = None  # frees this second copy of the weights
    elif beginning.source:
        checkpoint.load(beginning.source, model, optimizer if beginning.load_optimizer else None)

    # ---- the run's folder
    config_path = os.path.join(c.out_dir, "config.json")
    if processes.is_first:
        os.makedirs(c.out_dir, exist_ok=True)
        tokenizer.save(corpus_tokenizer, c.out_dir)
        log.trim(log_path, step)  # drops the rows that this run writes again
        if not os.path.isfile(config_path):
            run = {
                "settings": run_settings,
                "parent": beginning.source,
                "start_step": step,
                "run_id": os.urandom(4).hex(),
                "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            }
            write_json(config_path, run)
    run_log = log.RunLog(c, beginning.totals, max_steps, device, processes)
    if c.wandb_log and processes.is_first:
        run_log.start_wandb(read_json(config_path, resume.CONFIG_SHAPE)["run_id"], run_settings)

    # ---- what it runs on: torch.compile, DDP, autocast
    why_eager = "compile=false" if not c.compile else why_not_compile(device)
    execution = f"eager: {why_eager}" if why_eager else "torch.compile"
    parameters = model.num_parameters()
    processes.print0(
        f"{run_settings['size'] or c.init_from}: {parameters['encoder'] / 1e6:.1f} M parameters, "
        f"{parameters['total'] / 1e6:.1f} M with the LM head | "
        f"{processes.world_size} x {device}, {dtype}, attention {attention}, {execution}"
    )
    tokens_to_train_on = max_steps * c.batch_rows * c.block_size
    processes.print0(
        f"{corpus.n_tokens:,} training tokens, {tokens_to_train_on:,} to train on in {max_steps} "
        f"steps of {c.batch_rows} x {c.block_size}; {val_corpus.n_tokens:,} validation tokens"
    )
    rows_again = data.count_rows_read_again(corpus, data_settings, max_steps)
    if rows_again:
        processes.print0(
            f"the corpus has {data.count_rows(corpus, data_settings):,} rows: {rows_again:,} of this "
            f"run's {max_steps * c.batch_rows:,} rows are read for the second time or more"
        )
    if not why_eager:
        remove_interrupted_compilations()
        model.compile()      # torch does it at the first call
        processes.print0("compiling the model before the first step, about a minute ...")
    wrapped_model = model
    if processes.world_size > 1:
        devices = [processes.local_rank] if device.startswith("cuda") else None
        # Each .grad is a view into the buckets that DDP exchanges, which saves a copy.
        wrapped_model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    autocast = nullcontext()
    if dtype == "bfloat16":
        autocast = torch.autocast(device.partition(":")[0], torch.bfloat16)

    # ---- data: a background thread makes this rank's micro-batches of the next steps
    def make_batches(step):
        batches = data.micro_batches(
            corpus, step, objective_at(step, c.phases), data_settings,
            rank=processes.rank, world_size=processes.world_size, micro_rows=c.micro_rows,
        )
        if device.startswith("cuda"):
            batches = [batch.pin() for batch in batches]
        return batches

    stream = data.prefetch(make_batches, step, max_steps)

    def loss_of(batch):
        return compute_loss(wrapped_model, model.lm_head, batch.to(device), autocast)

    # ---- the loop
    stop_signals = stop_on_signals(at_exit)
    is_stopping = False
    failure = None  # why the corpus can no longer be read
    first_step = step
    saved_step = step
    # Checkpoints that stay, so that other runs can branch from them: the end of each phase, the
    # start of the decay, and the milestones.
    kept_steps = {max_steps - c.decay_steps, *c.milestones}
    phase_end = 0
    for _, n_steps in c.phases:
        phase_end += n_steps
        kept_steps.add(phase_end)
    run_log.restart_clock()
    while True:
        is_last = step == max_steps
        # The objective of the next step. So a validation at the end of a phase is logged under the
        # objective of the phase that follows.
        objective = objective_at(step, c.phases)

        # Save first: a crash or a preemption in the validation must not cost the step's checkpoint.
        is_due = step % c.save_interval == 0 or step in kept_steps or is_stopping
        if step > saved_step and is_due:
            run_log.flush()
            if processes.is_first:
                state = {
                    "settings": run_settings,
                    "totals": run_log.totals,
                    "first_row": beginning.first_row,
                    "objectives": objectives.facts_of(c.phases),
                }
                checkpoint.save(c.out_dir, step, model, state, optimizer)
                checkpoint.prune(c.out_dir, c.keep_last, kept_steps)
            saved_step = step
            run_log.restart_clock()
        if (step % c.eval_interval == 0 or is_last) and not is_stopping:
            run_log.flush()
            try:
                losses = validate(loss_of, val_corpus, eval_settings, c, processes)
            except RunError as error:
                failure, is_stopping = error, True
                continue  # save, and leave
            run_log.add_validation(step, objective, losses)
            run_log.restart_clock()
        if is_last or is_stopping:
            break

        # Forward and backward, a micro-batch at a time. Each loss is divided by the step's number of
        # targets on all ranks, so neither world_size nor micro_rows changes the gradient.
        try:
            batches = next(stream)
        except RunError as error:
            batches = []
            failure = error
        n_targets = sum(batch.num_targets for batch in batches)
        # The same sum tells every rank whether one of them was asked to stop. This step is still
        # done; then the top of the loop saves and leaves. If one cannot read its rows, no rank does
        # the step.
        n_targets, n_stopping, n_failures = all_sum(
            [n_targets, bool(stop_signals), failure is not None], processes
        )
        is_stopping = n_stopping + n_failures > 0
        if n_failures:
            failure = failure or RunError(UNREADABLE_ELSEWHERE)
            continue
        if n_targets == 0:
            failure = RunError("this step has no token to predict: raise mask_rate or batch_rows")
            is_stopping = True
            continue
        loss_sum = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            # Let DDP exchange gradients only in the last backward pass. It reads this flag in the
            # forward pass.
            wrapped_model.require_backward_grad_sync = i == len(batches) - 1
            loss = loss_of(batch)
            (loss * (processes.world_size / n_targets)).backward()  # DDP averages over ranks
            loss_sum += loss.detach()

        # Update the weights.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        learning_rate = learning_rate_at(step, c, max_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        # Under DDP the gradients lie in its buckets: they are set to zero, not removed.
        optimizer.zero_grad(set_to_none=processes.world_size == 1)

        # The log reads loss and gradient norm from the device only when it is flushed.
        flops = sum(model.flops(batch.lengths, batch.num_targets, batch.causal) for batch in batches)
        step += 1
        run_log.add_step(
            step, objective, loss=loss_sum, learning_rate=learning_rate, grad_norm=grad_norm,
            targets=n_targets, flops=flops,
        )
        if step == first_step + 1:
            run_log.flush()
            # torch and a compiled model are about 500,000 long-lived Python objects. Freeze them
            # once, so that later garbage collections skip them (a full one took 0.2 s in the middle
            # of a step).
            gc.collect()
            gc.freeze()
            processes.print0(f"first step after {time.time() - launched:.1f} s")
        elif step % c.log_interval == 0:
            run_log.flush()

    run_log.close()
    if failure:
        saved = "nothing new was trained"
        if saved_step > first_step:
            saved = f"the last checkpoint is {checkpoint.path_of(c.out_dir, saved_step)}"
        raise RunError(f"{failure}; stopped at step {step}, {saved}")
    if is_stopping:
        processes.print0(f"stopped at step {step}; run the same command to resume")
    else:
        processes.print0(f"done: {c.out_dir}")


if __name__ == "__main__":
    run(main, Config)
