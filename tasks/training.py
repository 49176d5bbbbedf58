"""Training one trial: AdamW, warmup, decay, clipped gradients."""
import math

import torch
from tqdm import tqdm

from core.distributed import speaks


class Diverged(Exception):
    """A loss or a gradient that is not finite; the message says at which step."""


def fit(parameters, micro_batches, loss_of, steps, lr, c, name="", reduce=None):
    """Train one trial: AdamW, linear warmup and decay to 0, gradients clipped, as in the paper's section 4 and its code.

    parameters: list of tensors; weight decay only on those of two dimensions. micro_batches(step) -> [(batch, number of
    targets)]; loss_of(batch) -> the sum of its targets' losses. So how a batch is cut into micro-batches changes nothing.
    reduce(): called before the clip, where processes share a step, to sum their gradients.
    c: warmup (a share of the steps), beta1, beta2, adam_eps, weight_decay, grad_clip (0: no clipping).
    -> [[step, mean loss since the entry before], ...], ten of them or so. Raises Diverged.
    """
    groups = [{"params": [p for p in parameters if (p.ndim >= 2) == matrix], "weight_decay": c.weight_decay * matrix}
              for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
    warmup, curve, pending = math.ceil(c.warmup * steps), [], []
    bar = tqdm(range(steps), desc=name, leave=False, disable=not speaks())
    for step in bar:
        # Hugging Face's schedule, whose first step has a learning rate of 0
        share = step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        batches = micro_batches(step)
        targets, loss = max(1, sum(n for _, n in batches)), 0.0
        for batch, _ in batches:
            part = loss_of(batch) / targets
            part.backward()
            loss += part.detach()
        if reduce:
            reduce()
        norm = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append(torch.stack([loss.float(), norm.float()]))
        if len(pending) >= steps / 10 or step == steps - 1:       # the only places where the host waits for the device
            mean, norm = torch.stack(pending).mean(0).tolist()        # a gradient that is not finite ruins the weights, too
            if not math.isfinite(mean + norm):
                raise Diverged(f"loss {mean}, gradient norm {norm} in the {len(pending)} steps up to step {step + 1}")
            curve.append([step + 1, mean])
            bar.set_postfix_str(f"loss {mean:.4f}")
            pending = []
    return curve
