"""What training costs: steps, tokens, FLOPs and GPU-hours."""

from dataclasses import dataclass
from functools import cache

import torch

import objectives
from model import SIZES, Encoder, ModelConfig


@dataclass(frozen=True)
class Cost:
    """What some training costs, at a scale."""

    steps: int
    tokens: int
    flops: float


def cost_of(run, scale, batch):
    """The Cost of the steps that a run (plan.Run) trains itself, at a scale."""
    size = scale.to_size(run.recipe.size)
    first_own_step = run.recipe.start + run.branch_step  # its trunk trains the steps before
    steps = 0
    flops = 0.0
    begin = run.recipe.start
    for objective, phase_steps in run.recipe.phases:
        end = begin + phase_steps
        if end > first_own_step:
            own_steps = scale.to_step(end) - scale.to_step(max(begin, first_own_step))
            steps += own_steps
            flops += own_steps * batch.rows * flops_of_a_row(size, objective, batch)
        begin = end
    return Cost(steps, steps * batch.tokens, flops)


def sum_of(costs):
    """The Cost of several runs."""
    return Cost(
        steps=sum(cost.steps for cost in costs),
        tokens=sum(cost.tokens for cost in costs),
        flops=sum(cost.flops for cost in costs),
    )


def gpu_hours(flops, tok_per_s, scale, batch):
    """Hours that so many FLOPs take on one GPU.

    tok_per_s: the tokens per second that this GPU makes with 610m under MLM40
    """
    flops_per_token = flops_of_a_row(scale.to_size("610m"), "mlm40", batch) / batch.block_size
    return flops / flops_per_token / tok_per_s / 3600


@cache
def flops_of_a_row(size, objective_name, batch):
    """FLOPs of training on one row, averaged over 64 places where train.py may cut it in two.

    size: a row of model.SIZES
    """
    with torch.device("meta"):
        model = Encoder(ModelConfig(**SIZES[size], vocab_size=batch.vocab_size))
    objective, rate = objectives.parse(objective_name)
    # Without a rate in its name, an objective that hides tokens hides train.py's default of 40 %.
    if rate is not None:
        share_of_targets = rate
    elif objective.hides_tokens:
        share_of_targets = 0.4
    else:
        share_of_targets = 1
    n_targets = batch.block_size * share_of_targets

    # A cut leaves at least 12 tokens on either side.
    cuts = [12 + (batch.block_size - 24) * i // 63 for i in range(64)]
    total = 0.0
    for cut in cuts:
        lengths = [cut, batch.block_size - cut]
        total += model.flops(lengths, n_targets, objective.is_causal)
    return total / len(cuts)
