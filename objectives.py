"""What a step learns: the objectives that `phases` of train.py names, each a function of a few lines.

    clm       every token predicts the next one, under the causal mask
    mlm       each ordinary token is hidden with probability mask_rate and predicted in place, under the full mask
    mntp      masked next-token prediction: inputs and mask as in mlm, but a hidden token is read one position earlier, as in clm
              (LLM2Vec, arXiv 2404.05961): the LM head keeps the habit a decoder taught it
    cmlm      mlm under the causal mask: what is the attention mask worth, and what the objective?

A number behind the name is a rate in percent: mlm20 hides 20 % whatever mask_rate is, so phases with several rates are a schedule
(("mlm50", 1000), ("mlm20", 1000)); clm40 has a loss at 40 % of its positions, as many as mlm40.
To add one: write a function (rows, corpus, c, rate) -> inputs [T], is a target asked for here [T] bool, its id [T], causal mask?
and name it in OBJECTIVES. rows: data.Rows; c: mask_rate, mask_replace, seed; rate: the name's, or None.
"""
import re

import numpy as np

from core.rng import MASK, REPLACE, hashed, mix, threshold


def clm(rows, corpus, c, rate=None):
    """Causal language modelling: every token but a sequence's last predicts the next one; with a rate, that share of them does."""
    wanted = np.ones(len(rows.tokens), bool)
    wanted[rows.cu_seqlens[1:] - 1] = False
    if rate is not None:
        wanted &= hashed(rows.position, c.seed, rows.epoch, MASK) < threshold(rate)
    return rows.tokens, wanted, np.roll(rows.tokens, -1), True


def mlm(rows, corpus, c, rate=None):
    """Masked language modelling: each ordinary token is hidden with probability mask_rate and predicted in place.

    mask_replace = (mask, random, keep): shares of the hidden tokens that become the mask id, a random id, or stay; the
    paper uses (1, 0, 0), BERT (0.8, 0.1, 0.1).
    """
    ids = rows.tokens
    special = (ids >= corpus.special_start) | (ids == corpus.eos_id) | (ids == corpus.mask_id)
    hidden = (hashed(rows.position, c.seed, rows.epoch, MASK) < threshold(rate or c.mask_rate)) & ~special
    inputs = np.where(hidden, corpus.mask_id, ids)
    if c.mask_replace[0] < 1.0:
        draw = hashed(rows.position, c.seed, rows.epoch, REPLACE)
        kind = (draw >> np.uint64(11)).astype(np.float64) / 2.0 ** 53
        random_id = (mix(draw) % np.uint64(corpus.special_start)).astype(np.int64)
        keep = kind >= c.mask_replace[0] + c.mask_replace[1]
        inputs = np.where(hidden & (kind >= c.mask_replace[0]), np.where(keep, ids, random_id), inputs)
    return inputs, hidden, ids, False


def mntp(rows, corpus, c, rate=None):
    """Masked next-token prediction: the token before a hidden one predicts it. A sequence's first token has none before it."""
    inputs, hidden, ids, causal = mlm(rows, corpus, c, rate)
    wanted = np.roll(hidden, -1)
    wanted[rows.cu_seqlens[1:] - 1] = False
    return inputs, wanted, np.roll(ids, -1), causal


def cmlm(rows, corpus, c, rate=None):
    """Masked language modelling under the causal mask."""
    return *mlm(rows, corpus, c, rate)[:3], True


OBJECTIVES = {"clm": clm, "mlm": mlm, "mntp": mntp, "cmlm": cmlm}


def kind_and_rate(objective):
    """"mlm40" -> ("mlm", 0.4); "clm" -> ("clm", None). Raises ValueError, naming all."""
    kind, percent = re.fullmatch(r"(.*?)(\d*)", str(objective)).groups()
    if kind not in OBJECTIVES or percent and not 0 < int(percent) <= 100:
        raise ValueError(f"objectives are {', '.join(OBJECTIVES)}, each alone or with a rate of 1 to 100 % behind it, as in mlm40")
    return kind, int(percent) / 100 if percent else None


def hides(objective):
    """Does it hide tokens?"""
    return kind_and_rate(objective)[0] != "clm"


def is_causal(objective):
    """Does it train under the causal mask?"""
    return kind_and_rate(objective)[0] in ("clm", "cmlm")


def objective_at(step, phases):
    """The objective of step `step`, counted from 0, in ((objective, steps), ...); past the end, the last one."""
    for objective, steps in phases:
        if step < steps:
            return objective
        step -= steps
    return phases[-1][0]


def capacity(objective, rows, c):
    """Static number of head positions: all but the certain gaps for whole CLM, else the rate plus six sigmas."""
    T, (kind, rate) = len(rows.tokens), kind_and_rate(objective)
    if kind == "clm" and rate is None:
        return T - len(rows.filler) * (2 if c.random_length else 1)
    rate = rate or c.mask_rate
    spread = 6 * (T * rate * (1 - rate)) ** 0.5
    return min(T, -(-int(T * rate + spread) // 64) * 64)
