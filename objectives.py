"""What a training step hides from the model, and what it asks for: the objectives of train.py's `phases`.

    clm     every token predicts the next one, under the causal mask
    mlm     each ordinary token is hidden with probability mask_rate and predicted in its place
    mntp    masked next-token prediction: as mlm, but each hidden token is predicted one position
            earlier, as in clm (LLM2Vec, arXiv 2404.05961)
    cmlm    mlm under the causal mask: does the attention mask matter, or the objective?

A number after the name is a rate in percent. mlm20 hides 20 % of the tokens whatever mask_rate is,
so several phases make a schedule: (("mlm50", 1000), ("mlm20", 1000)). clm40 has a loss at 40 % of
its positions, as many as mlm40.

To add an objective, write a function and add one entry to OBJECTIVES below. Choose tokens by their
`rows.position` and `rows.epoch` (see Rows in pretraining/data.py), never by their place in the
batch: another number of GPUs or micro-batches cuts the batch in another way, and would hide other
tokens.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.configurator import UserError
from core.rng import MASK, REPLACE, hashed, mix, threshold


@dataclass(frozen=True)
class Objective:
    """An objective, and everything that the rest of the program needs to know about it."""

    # (rows, corpus, settings, rate) -> the input ids [T] int64, which positions have a target [T]
    # bool, and the id to predict at each position [T] int64.
    # rows, corpus and settings are Rows, Corpus and DataSettings of pretraining/data.py; rate is the
    # number after the name as a share (0.4 in mlm40), or None.
    prepare: Callable
    is_causal: bool  # does it train under the causal attention mask?
    hides_tokens: bool  # does it replace tokens of the input?
    # (number of tokens, least number of sequences, rate, settings) -> the most targets to expect.
    # Every batch gets room for this many, so that shapes stay the same under torch.compile. The
    # function gets the least number of sequences, because fewer sequences have more CLM targets. A
    # batch with more targets loses none: it has another shape, and is compiled again.
    most_targets: Callable


def clm(rows, _corpus, settings, rate=None):
    """Causal language modelling: every token but a sequence's last predicts the next one.

    With a rate, only that share of them do.
    """
    has_target = np.ones(len(rows.tokens), bool)
    last_tokens = rows.cu_seqlens[1:] - 1
    has_target[last_tokens] = False
    if rate is not None:
        has_target &= is_drawn(rows, settings, rate)
    return rows.tokens, has_target, np.roll(rows.tokens, -1)


def mlm(rows, corpus, settings, rate=None):
    """Masked language modelling: each ordinary token is hidden with probability `rate`.

    Without a rate it is settings.mask_rate. settings.mask_replace has the shares of the hidden
    tokens that become the mask id, become a random id, or stay. The paper uses (1, 0, 0), BERT used
    (0.8, 0.1, 0.1).
    """
    ids = rows.tokens
    # Special tokens, such as the end of a document, are never hidden.
    is_special = (ids >= corpus.special_start) | (ids == corpus.eos_id) | (ids == corpus.mask_id)
    is_hidden = is_drawn(rows, settings, rate or settings.mask_rate) & ~is_special
    inputs = np.where(is_hidden, corpus.mask_id, ids)
    share_masked, share_random, _ = settings.mask_replace
    if share_masked < 1.0:
        # A second draw for each hidden token decides what becomes of it.
        draw = hashed(rows.position, settings.seed, rows.epoch, REPLACE)
        uniform = (draw >> np.uint64(11)).astype(np.float64) / 2.0**53  # in [0, 1)
        random_ids = (mix(draw) % np.uint64(corpus.special_start)).astype(np.int64)
        stays = is_hidden & (uniform >= share_masked + share_random)
        becomes_random = is_hidden & (uniform >= share_masked) & ~stays
        inputs = np.where(becomes_random, random_ids, inputs)
        inputs = np.where(stays, ids, inputs)
    return inputs, is_hidden, ids


def mntp(rows, corpus, settings, rate=None):
    """Masked next-token prediction: a hidden token is predicted at the position before it.

    A sequence's first token has none before it, so it is never predicted.
    """
    inputs, is_hidden, ids = mlm(rows, corpus, settings, rate)
    has_target = np.roll(is_hidden, -1)
    last_tokens = rows.cu_seqlens[1:] - 1
    has_target[last_tokens] = False
    return inputs, has_target, np.roll(ids, -1)


def is_drawn(rows, settings, rate):
    """True at a random share `rate` of the positions, the same in every run with this seed. [T] bool

    A lower rate draws a subset of what a higher one draws.
    """
    return hashed(rows.position, settings.seed, rows.epoch, MASK) < threshold(rate)


def most_targets_of_clm(n_tokens, n_sequences, rate, settings):
    """The most targets to expect if all tokens but each sequence's last have one.

    With a rate, only a share of them do.
    """
    if rate is None:
        return n_tokens - n_sequences
    return most_targets_at_rate(n_tokens, n_sequences, rate, settings)


def most_targets_at_rate(n_tokens, _n_sequences, rate, settings):
    """The most targets to expect if each token has one with probability `rate`.

    That is the mean plus six standard deviations, rounded up to a multiple of 64, at which matrix
    products on a GPU are fast.
    """
    rate = rate or settings.mask_rate
    six_sigmas = 6 * (n_tokens * rate * (1 - rate)) ** 0.5
    most = int(n_tokens * rate + six_sigmas)
    rounded_up = -(-most // 64) * 64
    return min(n_tokens, rounded_up)


OBJECTIVES = {
    "clm": Objective(clm, is_causal=True, hides_tokens=False, most_targets=most_targets_of_clm),
    "mlm": Objective(mlm, is_causal=False, hides_tokens=True, most_targets=most_targets_at_rate),
    "mntp": Objective(mntp, is_causal=False, hides_tokens=True, most_targets=most_targets_at_rate),
    "cmlm": Objective(mlm, is_causal=True, hides_tokens=True, most_targets=most_targets_at_rate),
}


def split_name(name):
    """Split the name of a phase: "mlm40" -> ("mlm", 0.4), "clm" -> ("clm", None).

    Raises ValueError, naming all objectives, for a name that is not one.
    """
    if name in OBJECTIVES:
        return name, None  # first, because the name of an objective may end in a digit
    kind, percent = re.fullmatch(r"(.*?)([0-9]*)", str(name), re.DOTALL).groups()
    is_valid_rate = percent == "" or 0 < int(percent) <= 100
    if kind not in OBJECTIVES or not is_valid_rate:
        raise ValueError(
            f"objectives are {', '.join(OBJECTIVES)}, each alone or with a rate of 1 to 100 % "
            "after its name, as in mlm40"
        )
    rate = int(percent) / 100 if percent else None
    return kind, rate


def parse(name):
    """Look up the name of a phase: "mlm40" -> (OBJECTIVES["mlm"], 0.4). Raises ValueError."""
    kind, rate = split_name(name)
    return OBJECTIVES[kind], rate


def facts_of(phases):
    """What a checkpoint records about its run's objectives: {name: {"is_causal", "hides_tokens", "rate"}}."""
    facts = {}
    for name, _ in phases:
        objective, rate = parse(name)
        facts[name] = {
            "is_causal": objective.is_causal,
            "hides_tokens": objective.hides_tokens,
            "rate": rate,
        }
    return facts


def recorded_objectives(state):
    """What a checkpoint recorded about its run's objectives, as facts_of() makes it.

    state: the state.json of a checkpoint of train.py. Checkpoints before 2026-11-26 do not have
    these facts: then they come from OBJECTIVES. Raises UserError if it does not know a name.
    """
    if "objectives" in state:
        return state["objectives"]
    try:
        return facts_of(state["settings"]["phases"])
    except ValueError as error:
        raise UserError(
            "this checkpoint does not record its objectives, and objectives.py does not know "
            f"them: {error}"
        ) from None


def objective_at(step, phases):
    """The name of the objective of step `step`, counted from 0.

    phases: ((name, steps), ...). After the end of the last phase, its objective.
    """
    for name, steps in phases:
        if step < steps:
            return name
        step -= steps
    return phases[-1][0]
