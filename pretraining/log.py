"""What a run tells: lines on the console, a row a step in log.jsonl, and Weights & Biases if asked.

Losses stay on the device until they are logged. So between two console lines the host never waits
for the GPU.
"""

import json
import os
import time
from datetime import timedelta

import torch

from core import checkpoint
from core.configurator import RunError
from core.device import peak_flops, peak_memory
from core.distributed import all_sum
from core.files import write_whole


class RunLog:
    """The log of one run on one process. Only the first process prints and writes."""

    def __init__(self, settings, totals, max_steps, device, processes):
        """settings: train.Config; totals: {"tokens", "targets", "flops", "seconds"} since the run's
        first ancestor began, which this log keeps up to date."""
        self.settings = settings
        self.totals = totals
        self.max_steps = max_steps
        self.device = device
        self.processes = processes
        self.path = os.path.join(settings.out_dir, "log.jsonl")
        self.peak_flops = peak_flops(device)
        self.wandb_run = None
        self.waiting = []  # steps whose losses are still on the device
        self.restart_clock()

    def start_wandb(self, run_id, all_settings):
        """Send the rows to Weights & Biases, too. A resumed run with the same run_id continues its
        plot."""
        if self.settings.wandb_log and self.processes.is_first:
            import wandb

            name = os.path.basename(os.path.normpath(self.settings.out_dir))
            self.wandb_run = wandb.init(
                project=self.settings.wandb_project,
                dir=self.settings.out_dir,
                id=run_id,
                resume="allow",
                config=all_settings,
                name=name,
            )

    def say(self, text):
        if self.processes.is_first:
            print(text, flush=True)

    def restart_clock(self):
        """Begin to time steps: what came before, such as a validation, is not part of their
        speed."""
        self.clock = time.time()

    def add_step(self, step, phase, loss, learning_rate, grad_norm, targets, flops):
        """Remember a step until the next flush().

        loss: sum of this process' losses, and grad_norm, both still tensors on the device; targets:
        of all processes; flops: of this process
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

        # Fetch what lies on the device, and add up the processes' shares.
        n = len(rows)
        grad_norms = torch.stack([row["grad_norm"] for row in rows]).tolist()
        losses = torch.stack([row["loss"] for row in rows]).tolist()
        sums = all_sum(losses + [row["flops"] for row in rows], self.processes)
        losses, flops = sums[:n], sums[n:]

        # How fast were they?
        seconds = max(1e-9, time.time() - self.clock)
        tokens_per_step = self.settings.batch_rows * self.settings.block_size
        mfu = None
        if self.peak_flops:
            mfu = sum(flops) / seconds / (self.peak_flops * self.processes.world_size)
        speed = {
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
            row |= {"loss": loss, "grad_norm": grad_norm} | speed | self.totals
        self.write(rows)

        # One line on the console for all of them.
        last = rows[-1]
        eta = timedelta(seconds=int((self.max_steps - last["step"]) * seconds / n))
        mfu_text = f"{mfu:.1%}" if mfu else "n/a"
        self.say(
            f"step {last['step']:>6}/{self.max_steps}  {last['phase']}  loss {last['loss']:.4f}  "
            f"lr {last['lr']:.2e}  norm {last['grad_norm']:.2f}  {speed['tok_per_s']:,.0f} tok/s  "
            f"mfu {mfu_text}  eta {eta}"
        )
        self.restart_clock()

    def check_finite(self, step, loss, grad_norm):
        """Raises RunError if one of them is infinite or not a number."""
        if abs(loss) < float("inf") and grad_norm < float("inf"):  # NaN fails both comparisons
            return
        saved = checkpoint.all_of(self.settings.out_dir)
        last_good = (
            f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        )
        raise RunError(
            f"loss {loss}, gradient norm {grad_norm} at step {step}: stopped, not saved; {last_good}. "
            "A lower --learning_rate in another --out_dir may help"
        )

    def add_validation(self, step, phase, losses):
        """Write a validation. losses: {"val_clm_loss": ..., "val_mlm_loss": ...} in nats per
        target"""
        self.write([{"step": step, "phase": phase} | self.totals | losses])
        self.say(
            f"step {step:>6}/{self.max_steps}  validation  clm {losses['val_clm_loss']:.4f}  "
            f"mlm {losses['val_mlm_loss']:.4f}"
        )

    def write(self, rows):
        if self.processes.is_first:
            with open(self.path, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        if self.wandb_run:
            for row in rows:
                self.wandb_run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self):
        if self.wandb_run:
            self.wandb_run.finish()


def read_rows(path):
    """[(row, its line)] of a log.jsonl, without a last line that a kill cut off; [] if there is no
    such file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [(json.loads(line), line) for line in f if line.endswith("\n")]


def trim(path, step):
    """Drop what a run that resumes after `step` writes again, with the same values: later rows, and
    the validation at `step` itself."""
    if not os.path.isfile(path):
        return
    # A training row of `step` describes what was done before it was saved: it stays.
    kept = []
    for row, line in read_rows(path):
        is_training_row = "loss" in row
        if row["step"] < step or (row["step"] == step and is_training_row):
            kept.append(line)
    write_whole(path, "".join(kept).encode())


def has_validation(path, step):
    """True if the log has the validation of `step`."""
    return any(row["step"] == step and "val_mlm_loss" in row for row, _ in read_rows(path))
