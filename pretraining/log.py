"""What a run reports: lines on the console, a row a step in log.jsonl, and Weights & Biases if asked.

Losses stay on the device until they are written. So between two console lines the host never waits
for the GPU.
"""

import contextlib
import json
import math
import os
import shutil
import time
from datetime import timedelta

import torch

from core import checkpoint
from core.configurator import RunError, UserError
from core.device import peak_flops, peak_memory
from core.distributed import all_sum
from core.files import write_whole
from core.schema import parse_json

# What a row of log.jsonl has. A training row has a loss, a validation has the other two.
ROW_SHAPE = {"step": int, "loss?": float, "val_clm_loss?": float, "val_mlm_loss?": float}


class RunLog:
    """The log of one run on one process. Only the first process prints and writes."""

    def __init__(self, c, totals, max_steps, device, processes):
        """Begin the log of a run.

        c: train.Config; totals: {"tokens", "targets", "flops", "seconds"} since the run's first
        ancestor began, which this log keeps up to date
        """
        self.c = c
        self.totals = totals
        self.max_steps = max_steps
        self.device = device
        self.processes = processes
        self.path = os.path.join(c.out_dir, "log.jsonl")
        self.peak_flops = peak_flops(device)
        self.wandb_run = None
        self.waiting = []  # rows of steps whose losses are still on the device
        self.restart_clock()

    def start_wandb(self, run_id, run_settings):
        """Send the rows to Weights & Biases, too. A resumed run has its old run_id: its plot continues.

        Raises UserError if that is not possible here.
        """
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_log=true needs a package: pip install wandb") from None
        try:
            self.wandb_run = wandb.init(
                project=self.c.wandb_project,
                dir=self.c.out_dir,
                id=run_id,
                resume="allow",
                config=run_settings,
                name=os.path.basename(os.path.normpath(self.c.out_dir)),
            )
        except (wandb.Error, ValueError) as error:
            # no login, no network, a project name or an environment variable that wandb refuses
            raise UserError(
                f"wandb_log=true, but wandb does not start ({' '.join(str(error).split())[:300]}): run "
                "`wandb login`, or set WANDB_MODE=offline and run `wandb sync` later, or leave out wandb_log"
            ) from None

    def restart_clock(self):
        """Time steps from now on: what came before, such as a validation, does not count."""
        self.clock = time.time()

    def add_step(self, step, phase, loss, learning_rate, grad_norm, targets, flops):
        """Remember a step until the next flush().

        loss and grad_norm are still tensors on the device. loss is a sum over this process' targets,
        flops are this process', and targets are those of all processes.
        """
        self.waiting.append(
            {
                "step": step,
                "phase": phase,
                "loss": loss,
                "lr": learning_rate,
                "grad_norm": grad_norm,
                "targets": int(targets),
                "flops": flops,
            }
        )

    def flush(self):
        """Write the rows of the steps since the last flush and print the last one.

        Raises RunError if a loss or a gradient norm is not finite.
        """
        if not self.waiting:
            return
        rows = self.waiting
        self.waiting = []

        # Fetch what is on the device, and add up the processes' losses and FLOPs.
        n = len(rows)
        grad_norms = torch.stack([row["grad_norm"] for row in rows]).tolist()
        losses = torch.stack([row["loss"] for row in rows]).tolist()
        sums = all_sum(losses + [row["flops"] for row in rows], self.processes)
        losses, flops = sums[:n], sums[n:]

        # How fast were they?
        seconds = max(1e-9, time.time() - self.clock)
        tokens_per_step = self.c.batch_rows * self.c.block_size
        mfu = None
        if self.peak_flops:
            mfu = sum(flops) / seconds / (self.peak_flops * self.processes.world_size)
        measured = {
            "tok_per_s": n * tokens_per_step / seconds,
            "mfu": mfu,
            "peak_memory": peak_memory(self.device),
        }

        # The totals grow row by row, so each row says how far the run was after its step.
        for row, loss, step_flops, grad_norm in zip(rows, losses, flops, grad_norms):
            loss /= row["targets"]
            self.check_finite(row["step"], loss, grad_norm)
            self.totals["tokens"] += tokens_per_step
            self.totals["targets"] += row["targets"]
            self.totals["flops"] += int(step_flops)
            self.totals["seconds"] += seconds / n
            row |= {"loss": loss, "grad_norm": grad_norm} | measured | self.totals
        self.write(rows)

        # Print one line for all of them.
        last = rows[-1]
        eta = timedelta(seconds=int((self.max_steps - last["step"]) * seconds / n))
        mfu_text = f"{mfu:.1%}" if mfu else "n/a"
        self.processes.print0(
            f"step {last['step']:>6}/{self.max_steps}  {last['phase']}  loss {last['loss']:.4f}  "
            f"lr {last['lr']:.2e}  norm {last['grad_norm']:.2f}  {last['tok_per_s']:,.0f} tok/s  "
            f"mfu {mfu_text}  eta {eta}"
        )
        self.restart_clock()

    def check_finite(self, step, loss, grad_norm):
        """Raises RunError if one of them is infinite or not a number."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        last_good = "there is no checkpoint yet"
        checkpoints = checkpoint.all_of(self.c.out_dir)
        if checkpoints:
            last_good = f"the last good checkpoint is {checkpoints[-1]}"
        raise RunError(
            f"loss {loss}, gradient norm {grad_norm} at step {step}: stopped, not saved; "
            f"{last_good}. A lower --learning_rate in another --out_dir may help"
        )

    def add_validation(self, step, phase, losses):
        """Write and print a validation.

        losses: {"val_clm_loss": ..., "val_mlm_loss": ...}, in nats per target
        """
        self.write([{"step": step, "phase": phase} | self.totals | losses])
        self.processes.print0(
            f"step {step:>6}/{self.max_steps}  validation  clm {losses['val_clm_loss']:.4f}  "
            f"mlm {losses['val_mlm_loss']:.4f}"
        )

    def write(self, rows):
        """Append rows to log.jsonl, and send them to Weights & Biases."""
        if self.processes.is_first:
            with open(self.path, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        if self.wandb_run:
            with self.without_wandb_if_it_fails():
                for row in rows:
                    self.wandb_run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self):
        """Let Weights & Biases send what it still has."""
        if self.wandb_run:
            with self.without_wandb_if_it_fails():
                self.wandb_run.finish()

    @contextlib.contextmanager
    def without_wandb_if_it_fails(self):
        """Continue without Weights & Biases if it fails: its own process may have died."""
        try:
            yield
        except Exception as error:      # of many types
            self.wandb_run = None
            print(f"warning: wandb has failed, the run continues without it; all rows are in {self.path} "
                  f"({' '.join(str(error).split())[:300]})", flush=True)


def read_rows(path):
    """The rows of a log.jsonl, and what is wrong with its other lines.

    A last line that a kill cut off is left out, and so are blank lines and the NULs that a power
    cut leaves. -> [(row, line), ...], ["log.jsonl, line 5 is not JSON ...", ...]
    """
    if not os.path.isfile(path):
        return [], []
    rows = []
    damages = []
    with open(path, "rb") as f:
        lines = f.read().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        line = line.strip(b"\0 \t\r")
        if not line:
            continue
        try:
            row = parse_json(line, f"{path}, line {number}", ROW_SHAPE)
        except UserError as error:
            damages.append(str(error))
            continue
        rows.append((row, line.decode() + "\n"))
    return rows, damages


def trim(path, step):
    """Drop the rows that a run which resumes after `step` will write again, with the same values.

    These are the later rows, and the validation of `step` itself. The training row of `step`
    stays: that step was done before the checkpoint was saved. Lines that are not rows go, too, with
    a warning; the log that held them is kept as log.jsonl.damaged.
    """
    if not os.path.isfile(path):
        return
    rows, damages = read_rows(path)
    if damages:
        shutil.copyfile(path, f"{path}.damaged")
        print(f"warning: {damages[0]}; {len(damages)} such lines left out, see {path}.damaged", flush=True)
    kept = []
    for row, line in rows:
        is_training_row = "loss" in row
        if row["step"] < step or (row["step"] == step and is_training_row):
            kept.append(line)
    write_whole(path, "".join(kept).encode())


def has_validation(path, step):
    """True if the log has the validation of `step`."""
    rows, _ = read_rows(path)
    return any(row["step"] == step and "val_mlm_loss" in row for row, _ in rows)
