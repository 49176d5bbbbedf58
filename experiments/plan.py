"""Which training runs a list of models takes, and which of them share a beginning."""
from dataclasses import dataclass, replace

from core.configurator import UserError
from experiments.recipes import BEYOND, DECAY, WARMUP, Recipe, paper, parse

# ---- the plan: what shares what

@dataclass(frozen=True)
class Run:
    """One call of train.py. Steps are the paper's, counted from the run's own step 0 (a CPT's from its start)."""
    recipe: Recipe
    trunk: str = ""           # branches from this run ...
    branch: int = 0           # ... at this step
    keep: tuple = ()          # steps whose checkpoints stay

    @property
    def steps(self):
        return self.recipe.steps - self.recipe.start

    @property
    def own(self):
        return self.steps - self.branch


def shared(a, b):
    """How many first steps two recipes have in common, up to where either decays: what a trunk can do for a branch."""
    if (a.size, a.seed, a.parent()) != (b.size, b.seed, b.parent()):
        return 0
    first, ends = a.start, [end for _, end in (*a.stages, *b.stages)]
    for end in sorted(e for e in ends if e > a.start):
        if first >= min(a.steps, b.steps) or a.objective_at(first) != b.objective_at(first):
            break
        first = end
    return max(0, min(first, a.steps - DECAY, b.steps - DECAY) - a.start)


def plan(names):
    """Names -> {name: Run} in an order in which each comes after what it begins from; decayed starts are added.

    Raises UserError for a name outside the grammar, or a schedule too short for its warmup and decay.
    """
    wanted = {parse(name).finished() for name in names}
    wanted |= {r.parent() for r in wanted} - {None}
    for r in wanted:
        if r.steps - r.start < (DECAY if r.start else WARMUP + DECAY):
            raise UserError(f"{r.name} is too short: a schedule has {WARMUP:,} steps of warmup and {DECAY:,} of decay, continued "
                            "pretraining the decay alone")
    sizes, runs = list(dict.fromkeys(parse(name).size for name in names)), {}
    # single long runs first: they are the trunks; whatever the order, the steps in common are the same
    for r in sorted(wanted, key=lambda r: (r.start > 0, r.seed, sizes.index(r.size), len(r.stages), -r.steps, r.name)):
        common = [(name, shared(r, run.recipe)) for name, run in runs.items()]
        trunk, branch = max(common, key=lambda found: found[1], default=("", 0))      # the first of equals
        runs[r.name] = Run(r, trunk if branch else "", branch)
    keep = {name: {run.branch for run in runs.values() if run.trunk == name} | wanted_later(run) for name, run in runs.items()}
    for name in names:
        r = parse(name)
        if r.step:
            keep[holder(runs, r)].add(r.step - r.start)
    return {name: replace(run, keep=tuple(sorted(keep[name]))) for name, run in runs.items()}


def wanted_later(run):
    """Steps of a run that other names of ours begin from or are: kept even if nobody asks for these names yet."""
    others = [replace(parse(name), seed=run.recipe.seed) for names in (*paper().values(), BEYOND) for name in names]
    steps = {r.step if r.finished() == run.recipe else 0 if r.step else shared(r, run.recipe) for r in others if r != run.recipe}
    return {step for step in steps if step > run.branch}


def holder(runs, r):
    """The name of the run whose folder has the checkpoint of an intermediate recipe: its own, or a trunk's it branched from."""
    name = r.finished().name
    while r.step - r.start <= runs[name].branch:
        name = runs[name].trunk
    return name
