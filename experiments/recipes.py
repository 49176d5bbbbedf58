"""What the names of a study's models say: which objectives, for how many steps, from which start.

    610m-clm-42k                 one objective, 42,000 steps
    610m-clm-10k-mlm40-42k       10,000 steps of CLM, then MLM with a masking rate of 40 % up to
                                 step 42,000
    610m-clm-dec42k-mlm40-64k    continued pretraining: 610m-clm-42k, whose learning rate has
                                 decayed, and then 22,000 steps of MLM
    610m-clm-42k-1000            the checkpoint at step 1,000 of 610m-clm-42k

That is the paper's grammar (arXiv 2507.00994; the names of hf.co/MLMvsCLM). Its steps count from
the very beginning. We added:

    610m-mlm40-10k-clm-20k-mlm40-42k    any number of stages
    610m-mlm50-21k-mlm20-42k            ... so a masking rate can have a schedule
    610m-alt1k-clm-mlm40-42k            two objectives that take turns, 1,000 steps each
    610m-mntp40-42k                     any objective of objectives.py
    610m-clm-42k-seed43                 a pretraining seed

A name and a Recipe are two forms of the same thing: parse() and name_of() turn one into the other.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from core.configurator import UserError

# A name without -seed means this seed: train.py's default, and that of the paper's code.
SEED = 42
# Every budget has these steps of warmup and of decay (Table 1, section 2): a 12k run is 10k steps
# that a longer run may share, and a decay of its own.
WARMUP = 2_000
DECAY = 2_000
GRAMMAR = (
    "expected SIZE-OBJECTIVE-STEPS and more -OBJECTIVE-TOTAL stages, as in 610m-clm-10k-mlm40-42k; "
    "decN ends a decayed start (610m-clm-dec42k-mlm40-64k), altN takes turns "
    "(610m-alt1k-clm-mlm40-42k), -seedN and then -STEP may end it"
)
STEPS = r"[1-9]\d{0,8}k?"  # 1500 or 42k
MOST_TURNS = 10_000


class Stage(NamedTuple):
    """A part of a schedule that has one objective."""

    objective: str
    end: int  # the step at which it ends, counted from the very beginning


@dataclass(frozen=True)
class Recipe:
    """What a name says. Steps are the paper's (scales.py shrinks them), from the very beginning."""

    size: str            # 210m, 610m or 1b; a scale may stand another row of model.SIZES for it
    stages: tuple        # of Stage
    start: int = 0       # continued pretraining: the last step of the decayed model it starts from
    turn_steps: int = 0  # steps of a turn, for a name with alt
    seed: int = SEED     # of weights and data order
    step: int = 0        # of an intermediate checkpoint; 0: the finished model

    @property
    def steps(self):
        """The step at which training ends."""
        return self.stages[-1].end

    @property
    def name(self):
        return name_of(self)

    @property
    def phases(self):
        """((objective, number of steps), ...) for train.py, without those of a decayed start."""
        phases = []
        begin = self.start
        for stage in self.stages:
            if stage.end > self.start:
                phases.append((stage.objective, stage.end - begin))
                begin = stage.end
        return tuple(phases)

    def finished(self):
        """The recipe of the finished model, for an intermediate checkpoint's."""
        return replace(self, step=0)

    def parent(self):
        """The recipe of the decayed model that continued pretraining starts from, or None."""
        if not self.start:
            return None
        stages = tuple(stage for stage in self.stages if stage.end <= self.start)
        return replace(self, stages=stages, start=0, step=0)

    @property
    def parent_name(self):
        """The name of parent(), or ""."""
        parent = self.parent()
        return parent.name if parent else ""

    def objective_at(self, step):
        """The objective of step `step`, counted from 0."""
        return next(stage.objective for stage in self.stages if step < stage.end)

    def clm_share(self):
        """The share of all steps whose objective is CLM."""
        clm_steps = 0
        begin = 0
        for stage in self.stages:
            if stage.objective == "clm":
                clm_steps += stage.end - begin
            begin = stage.end
        return clm_steps / self.steps


# ---- a recipe's name


def name_of(recipe):
    """The name of a recipe: parse(name_of(recipe)) == recipe."""
    words = [recipe.size]
    if recipe.turn_steps:
        # Each objective once, in the order of their first turns.
        objectives = dict.fromkeys(stage.objective for stage in recipe.stages)
        words += [f"alt{steps_in_words(recipe.turn_steps)}", *objectives]
        words.append(steps_in_words(recipe.steps))
    else:
        for stage in recipe.stages:
            end = steps_in_words(stage.end)
            if stage.end == recipe.start:
                end = "dec" + end
            words += [stage.objective, end]
    if recipe.seed != SEED:
        words.append(f"seed{recipe.seed}")
    if recipe.step:
        words.append(str(recipe.step))
    return "-".join(words)


def steps_in_words(steps):
    """42000 -> "42k", 1500 -> "1500"."""
    return f"{steps // 1000}k" if steps % 1000 == 0 else str(steps)


# ---- a name's recipe


class WrongName(Exception):
    """Its text says what is wrong with a name."""


def parse(name):
    """The Recipe of a name. Raises UserError for a name outside the grammar."""
    try:
        recipe = recipe_of(name.split("-"))
        if recipe.step >= recipe.steps:
            raise WrongName(f"step {recipe.step:,} is not one before its end, {recipe.steps:,}")
        if recipe.name != name:
            raise WrongName(f"it is written {recipe.name}")
    except WrongName as error:
        raise UserError(f"'{name}' is not a model of a study: {error}; {GRAMMAR}") from None
    return recipe


def recipe_of(words):
    """The Recipe of a name's words. Takes words off both ends of the list; the rest are stages."""
    # At the front: the size.
    size = words.pop(0)
    is_keyword = re.fullmatch("clm|mlm|alt|dec", size)
    if is_keyword or not re.fullmatch(r"\d+(\.\d+)?[mb]|[a-z]+", size):
        raise WrongName(f"'{size}' is not a size")

    # At the end: the step of an intermediate checkpoint. It stands behind another number of steps
    # or a seed.
    step = 0
    if len(words) > 2 and re.fullmatch(r"[1-9]\d{0,11}", words[-1]):
        if re.fullmatch(rf"(dec)?{STEPS}|seed\d{{1,18}}", words[-2]):
            step = int(words.pop())

    # Before it: the seed.
    seed = SEED
    if words and re.fullmatch(r"seed\d{1,18}", words[-1]):
        seed = int(words.pop().removeprefix("seed"))

    # What is left are stages, or the short form of stages that take turns.
    turn_steps = 0
    if words and re.fullmatch(rf"alt{STEPS}", words[0]):
        turn_steps = number_of_steps(words[0].removeprefix("alt"))
        stages = stages_in_turns(turn_steps, words[1:])
        start = 0
    else:
        stages, start = stages_of(words)
    return Recipe(size, stages, start, turn_steps, seed, step)


def stages_in_turns(turn_steps, words):
    """The stages of a name with alt. words: the objectives, then the total number of steps."""
    objectives = words[:-1]
    has_total = bool(words) and re.fullmatch(STEPS, words[-1]) is not None
    if not has_total or len(objectives) < 2 or len(set(objectives)) < len(objectives):
        raise WrongName("altN needs two or more different objectives and a total")
    for objective in objectives:
        check_objective(objective)
    total = number_of_steps(words[-1])
    if total > MOST_TURNS * turn_steps:
        raise WrongName(f"its turns are too short: there are more than {MOST_TURNS:,}")
    stages = []
    while not stages or stages[-1].end < total:
        objective = objectives[len(stages) % len(objectives)]
        end = (len(stages) + 1) * turn_steps
        stages.append(Stage(objective, min(end, total)))
    return tuple(stages)


def stages_of(words):
    """The stages of a name without alt, and the last step of a decayed start, or 0."""
    if not words or len(words) % 2:
        raise WrongName(f"objectives and steps come in pairs, and '{'-'.join(words)}' does not")
    stages = []
    start = 0
    begin = 0
    for objective, word in zip(words[::2], words[1::2]):
        check_objective(objective)
        if not re.fullmatch(rf"(dec)?{STEPS}", word):
            raise WrongName(f"'{word}' is not a number of steps")
        end = number_of_steps(word.removeprefix("dec"))
        if end <= begin:
            raise WrongName(f"{objective} ends at step {end:,}, which is not after step {begin:,}")
        if word.startswith("dec"):
            if start:
                raise WrongName("only one stage may end decayed")
            start = end
        stages.append(Stage(objective, end))
        begin = end
    if start == begin:
        raise WrongName("the last stage always decays, it is written without dec")
    return tuple(stages), start


def check_objective(word):
    """Raises WrongName for a word that cannot be an objective's name, known or not."""
    if not re.fullmatch(r"[a-z]+(100|[1-9]\d?)?", word):
        raise WrongName(f"'{word}' is not an objective")


def number_of_steps(word):
    """The number that steps_in_words writes as this word."""
    if word.endswith("k"):
        return int(word.removesuffix("k")) * 1000
    return int(word)


# ---- the names of the paper

# The groups of models that --only takes, and what they are called in a printed plan.
GROUP_TITLES = {
    "A": "base: size x objective",
    "B": "share of CLM, 12k steps",
    "C": "share of CLM, 22k steps",
    "D": "share of CLM, 42k steps",
    "E": "masking rate after CLM",
    "F": "continued pretraining",
    "I": "intermediate checkpoints",
    "X": "beyond the paper's 38",
}


def paper():
    """{group: names} of the paper's 38 models (sections 3 to 5) and 12 intermediate checkpoints."""
    m = "610m"
    groups = {"A": []}
    for size in ("210m", "610m", "1b"):
        for objective in ("clm", "mlm20", "mlm30", "mlm40", "mlm50"):
            groups["A"].append(f"{size}-{objective}-42k")

    # A budget of 12k, 22k or 42k steps, of which CLM gets none, some or all. The models of one
    # objective with 42k are in A.
    groups["B"] = [f"{m}-mlm40-12k", f"{m}-clm-12k"]
    groups["B"] += [f"{m}-clm-{clm}k-mlm40-12k" for clm in (3, 6, 9)]
    groups["C"] = [f"{m}-mlm40-22k", f"{m}-clm-22k"]
    groups["C"] += [f"{m}-clm-{clm}k-mlm40-22k" for clm in (5, 11, 17)]
    groups["D"] = [f"{m}-clm-{clm}k-mlm40-42k" for clm in (10, 21, 32)]

    groups["E"] = [f"{m}-clm-40k-mlm{rate}-42k" for rate in (20, 30, 40, 50)]
    groups["F"] = []
    groups["I"] = []
    for objective in ("clm", "mlm40"):
        groups["F"] += [f"{m}-{objective}-dec42k-mlm40-{total}k" for total in (44, 54, 64)]
        groups["I"] += [f"{m}-{objective}-42k-{step}000" for step in (1, 2, 5, 10, 20, 40)]
    return groups


# Add a model here: --only=X trains all of these, --only=NAME trains one.
BEYOND = [
    # Two stages at 1B, as in the paper's Figure 11. It is not among the 38, and the paper does not
    # give its name or scores.
    "1b-clm-10k-mlm40-42k",
    # A detour through CLM (arXiv 2605.12438 continues a finished encoder in this way).
    "610m-mlm40-10k-clm-20k-mlm40-42k",
    # The two objectives take turns.
    "610m-alt1k-clm-mlm40-42k",
    # A masking rate that falls.
    "610m-mlm50-21k-mlm20-42k",
    # Masked next-token prediction, LLM2Vec's (arXiv 2404.05961).
    "610m-mntp40-42k",
    # Is it the objective or the mask? CLM with as many targets as MLM40 has ...
    "610m-clm40-42k",
    # ... and MLM under the causal mask.
    "610m-cmlm40-42k",
]


def groups():
    """{group: names} of all models that have a group: the paper's and, in X, those beyond it."""
    return paper() | {"X": BEYOND}
