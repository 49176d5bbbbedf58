"""The names of a study's models, and what they say: which objectives, for how many steps, from which start.

    610m-clm-42k                       one objective, 42,000 steps
    610m-clm-10k-mlm40-42k             10,000 steps of CLM, then MLM at a masking rate of 40 % up to step 42,000
    610m-clm-dec42k-mlm40-64k          continued pretraining: 610m-clm-42k, its learning rate decayed, and 22,000 steps more
    610m-clm-42k-1000                  the checkpoint at step 1,000 of 610m-clm-42k

That is the paper's grammar (arXiv 2507.00994; the names of hf.co/MLMvsCLM), whose steps count from the very beginning. Ours on top:
any number of stages (610m-mlm40-10k-clm-20k-mlm40-42k; 610m-mlm50-21k-mlm20-42k is a schedule of the masking rate), stages that
take turns (610m-alt1k-clm-mlm40-42k), any of objectives.py (610m-mntp40-42k), and a pretraining seed (610m-clm-42k-seed43).
"""
import re
from dataclasses import dataclass, replace

from core.configurator import UserError

SEED = 42                   # of a name without -seed: the paper's, and train.py's default
WARMUP = DECAY = 2_000      # steps, of every budget (Table 1): a 12k run is 10k steps of a longer one and its own decay
GRAMMAR = ("expected SIZE-OBJECTIVE-STEPS and more -OBJECTIVE-TOTAL stages, as in 610m-clm-10k-mlm40-42k; decN ends a decayed "
           "start (610m-clm-dec42k-mlm40-64k), altN takes turns (610m-alt1k-clm-mlm40-42k), -seedN and then -STEP may end it")


@dataclass(frozen=True)
class Recipe:
    """One name. Steps are the paper's; study.py's scales shrink them."""
    size: str                   # a row of model.SIZES in the paper's proportions
    stages: tuple               # ((objective, step at which it ends), ...), steps counted from the beginning
    start: int = 0              # continued pretraining: the step at which its decayed start ends; 0: from random weights
    turns: int = 0              # steps of a turn, for a name with alt
    seed: int = SEED            # of weights and data order
    step: int = 0               # an intermediate checkpoint; 0: the finished model

    @property
    def steps(self):
        """Where training ends, counted from the beginning."""
        return self.stages[-1][1]

    @property
    def name(self):
        return name_of(self)

    @property
    def own(self):
        """The stages of this schedule alone, ((objective, number of steps), ...): without a decayed start's."""
        ends, found, begin = [s for s in self.stages if s[1] > self.start], [], self.start
        for objective, end in ends:
            found.append((objective, end - begin))
            begin = end
        return tuple(found)

    def finished(self):
        """The model of an intermediate checkpoint."""
        return replace(self, step=0)

    def parent(self):
        """The decayed model that continued pretraining starts from, or None."""
        return replace(self, stages=tuple(s for s in self.stages if s[1] <= self.start), start=0, step=0) if self.start else None

    def objective_at(self, step):
        """The objective of step `step`, counted from 0."""
        return next(objective for objective, end in self.stages if step < end)

    def clm_share(self):
        """Share of the steps whose objective is CLM."""
        begins = [0, *(end for _, end in self.stages[:-1])]
        return sum(end - begin for begin, (objective, end) in zip(begins, self.stages) if objective == "clm") / self.steps


def steps_in_words(n):
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def name_of(r):
    """Recipe -> its name; parse(name_of(r)) == r."""
    words = [r.size]
    if r.turns:
        words += [f"alt{steps_in_words(r.turns)}", *dict.fromkeys(objective for objective, _ in r.stages), steps_in_words(r.steps)]
    else:
        for objective, end in r.stages:
            words += [objective, ("dec" if end == r.start else "") + steps_in_words(end)]
    return "-".join(words + [f"seed{r.seed}"] * (r.seed != SEED) + [str(r.step)] * bool(r.step))


def parse(name):
    """A name -> its Recipe. Raises UserError, saying what was expected, for one outside the grammar."""
    def wrong(why):
        return UserError(f"'{name}' is no model of a study: {why}; {GRAMMAR}")

    words = name.split("-")
    size = words.pop(0)
    if not re.fullmatch(r"\d+(\.\d+)?[mb]|[a-z]+", size) or re.fullmatch("clm|mlm|alt|dec", size):
        raise wrong(f"'{size}' is no size")
    step = int(words.pop()) if len(words) > 2 and re.fullmatch(r"[1-9]\d*", words[-1]) and ends(words[-2]) else 0
    seed = int(words.pop()[4:]) if words and re.fullmatch(r"seed\d+", words[-1]) else SEED
    turns, begin, start, stages = 0, 0, 0, []
    if words and re.fullmatch(r"alt[1-9]\d*k?", words[0]):
        turns, total = number(words.pop(0)[3:]), words.pop()
        if len(words) < 2 or len(set(words)) < len(words) or not ends(total):
            raise wrong("altNk wants two or more different objectives and a total")
        ends_at = [min((i + 1) * turns, number(total)) for i in range(-(-number(total) // turns))]
        words = [w for i, end in enumerate(ends_at) for w in (words[i % len(words)], str(end))]
    if not words or len(words) % 2:
        raise wrong(f"objectives and steps come in pairs, and '{'-'.join(words)}' is none")
    for objective, end in zip(words[::2], words[1::2]):
        if not re.fullmatch(r"[a-z]+(100|[1-9]\d?)?", objective):
            raise wrong(f"'{objective}' is no objective")
        if not ends(end):
            raise wrong(f"'{end}' is no number of steps")
        stages.append((objective, number(end.removeprefix("dec"))))
        if stages[-1][1] <= begin:
            raise wrong(f"{objective} ends at step {stages[-1][1]:,}, which is not behind step {begin:,}")
        begin = stages[-1][1]
        if end.startswith("dec"):
            if start:
                raise wrong("only one stage may end decayed")
            start = begin
    if start == begin:
        raise wrong("the last stage always decays, it is written without dec")
    found = Recipe(size, tuple(stages), start, turns, seed, step)
    if not 0 <= step < found.steps:
        raise wrong(f"step {step:,} is not one before its end, {found.steps:,}")
    if found.name != name:
        raise wrong(f"it is written {found.name}")
    return found


def ends(word):
    return re.fullmatch(r"(dec)?[1-9]\d*k?|seed\d+", word) is not None


def number(word):
    return int(word[:-1]) * 1000 if word.endswith("k") else int(word)


def paper():
    """{group: names} of the paper's 38 models (its sections 3 to 5) and 12 intermediate checkpoints."""
    sizes, rates, m = ("210m", "610m", "1b"), (20, 30, 40, 50), "610m"
    two_stages = {12: (3, 6, 9), 22: (5, 11, 17), 42: (10, 21, 32)}       # thousands of steps of CLM in a budget
    groups = {"A": [f"{size}-{o}-42k" for size in sizes for o in ("clm", *(f"mlm{rate}" for rate in rates))]}
    for group, budget in (("B", 12), ("C", 22), ("D", 42)):
        single = [f"{m}-mlm40-{budget}k", f"{m}-clm-{budget}k"] if budget < 42 else []         # at 42k they are base models
        groups[group] = single + [f"{m}-clm-{k}k-mlm40-{budget}k" for k in two_stages[budget]]
    groups["E"] = [f"{m}-clm-40k-mlm{rate}-42k" for rate in rates]
    groups["F"] = [f"{m}-{o}-dec42k-mlm40-{total}k" for o in ("clm", "mlm40") for total in (44, 54, 64)]
    groups["I"] = [f"{m}-{o}-42k-{k}000" for o in ("clm", "mlm40") for k in (1, 2, 5, 10, 20, 40)]
    return groups


GROUPS = {"A": "base: size x objective", "B": "two stages, 12k", "C": "two stages, 22k", "D": "two stages, 42k",
          "E": "masking rate after CLM", "F": "continued pretraining", "I": "intermediate checkpoints", "X": "beyond the paper"}
# one line each; --only=X, or by name. The 1B model is the paper's Figure 11, which is not among its 38.
BEYOND = ["1b-clm-10k-mlm40-42k",
          "610m-mlm40-10k-clm-20k-mlm40-42k",       # a detour through CLM (arXiv 2605.12438 continues a finished encoder so)
          "610m-alt1k-clm-mlm40-42k",               # the two objectives take turns
          "610m-mlm50-21k-mlm20-42k",               # a masking rate that falls
          "610m-mntp40-42k",                        # masked next-token prediction, LLM2Vec's (arXiv 2404.05961)
          "610m-clm40-42k",                         # CLM with as many targets as MLM40 has ...
          "610m-cmlm40-42k"]                        # ... and MLM under the causal mask: is it the objective or the mask?
