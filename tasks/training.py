"""The training loop of one trial: AdamW, linear warmup and decay, clipped gradients."""
import math

import torch
from tqdm import tqdm

from core.distributed import shows_progress


class Diverged(Exception):
    """A loss or a gradient that is not finite; the message says at which step."""


def fit(parameters, micro_batches, loss_of, steps, lr, c, name="", reduce=None):
    """Train one trial, with the optimizer and the schedule of the paper's code. Raises Diverged.

    parameters: list of tensors. Weight decay applies only to those of two or more dimensions.
    micro_batches(step) -> [(batch, number of targets)].
    loss_of(batch) -> the sum of the losses of its targets. The loss of a step is the mean over all
    its targets, however it is cut into micro-batches.
    c: GridSettings. name: shown by the progress bar.
    reduce(): sums the gradients over the processes that share a step, before they are clipped.

    Returns the loss curve, about ten entries [step, mean loss since the entry before].
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=lr, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
    curve = []
    pending = []           # losses and gradient norms that are not in the curve yet
    bar = tqdm(range(steps), desc=name, leave=False, disable=not shows_progress())
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * share_of_peak(step, steps, c.warmup)

        # gradients of the mean loss over the step's targets, summed over its micro-batches
        batches = micro_batches(step)
        n_targets = max(1, sum(count for _, count in batches))
        loss = 0.0
        for batch, _ in batches:
            batch_loss = loss_of(batch) / n_targets
            batch_loss.backward()
            loss += batch_loss.detach()
        if reduce:
            reduce()
        norm = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Reading a loss makes the CPU wait for the GPU, so it is read only about ten times. The
        # gradient's norm is read with it, since a gradient that is not finite ruins the weights.
        pending.append(torch.stack([loss.float(), norm.float()]))
        if len(pending) >= steps / 10 or step == steps - 1:
            mean, norm = torch.stack(pending).mean(0).tolist()
            if not math.isfinite(mean + norm):
                raise Diverged(f"loss {mean}, gradient norm {norm} in the {len(pending)} steps up "
                               f"to step {step + 1}")
            curve.append([step + 1, mean])
            bar.set_postfix_str(f"loss {mean:.4f}")
            pending = []
    return curve


def share_of_peak(step, steps, warmup):
    """The learning rate of a step as a share of the peak: up from 0, then down to 0, both linear.

    As Hugging Face's get_linear_schedule_with_warmup. warmup: a share of the steps.
    """
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return step / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)
