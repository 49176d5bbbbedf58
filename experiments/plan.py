"""Which training runs a list of models takes, and which steps they share.

Models whose first steps are equal train them once. A run that others branch from is their trunk: it
keeps its checkpoint at each step where one does. Only steps before the learning rate decays can be
shared.
"""

from dataclasses import dataclass, replace

from core.configurator import UserError
from experiments.recipes import DECAY, WARMUP, Recipe, groups, parse


@dataclass(frozen=True)
class Run:
    """One run of train.py.

    Steps are the paper's. They count from the run's own step 0: in continued pretraining, from the
    decayed model that it starts from.
    """

    recipe: Recipe
    trunk: str = ""         # the name of the run it branches from; "": it does not branch
    branch_step: int = 0    # where it branches: the trunk trains the steps before
    kept_steps: tuple = ()  # the steps whose checkpoints it keeps

    @property
    def steps(self):
        """The length of its schedule."""
        return self.recipe.steps - self.recipe.start

    @property
    def own_steps(self):
        """The number of steps that it trains itself."""
        return self.steps - self.branch_step


def plan_runs(names):
    """{name: Run} of what has to be trained for these models, each run after those it begins from.

    The decayed starts of continued pretraining are added. Raises UserError for a name outside the
    grammar, or a schedule too short for its warmup and decay.
    """
    recipes = {parse(name).finished() for name in names}
    recipes |= {recipe.parent() for recipe in recipes if recipe.start}
    for recipe in recipes:
        check_length(recipe)

    # Long runs with one objective come first, so they become the trunks. (Another order shares as
    # many steps, between other runs.) Continued pretraining comes last, after what it starts from.
    sizes = list(dict.fromkeys(parse(name).size for name in names))

    def order(recipe):
        return (
            recipe.start > 0,
            recipe.seed,
            sizes.index(recipe.size),
            len(recipe.stages),
            -recipe.steps,
            recipe.name,
        )

    # Each run branches from the earlier one that shares most steps with it.
    runs = {}
    for recipe in sorted(recipes, key=order):
        trunk, branch_step = find_trunk(recipe, runs)
        runs[recipe.name] = Run(recipe, trunk, branch_step)

    kept = kept_steps(names, runs)
    return {name: replace(run, kept_steps=tuple(sorted(kept[name]))) for name, run in runs.items()}


def check_length(recipe):
    """Raises UserError for a schedule that is too short for its warmup and decay."""
    least = DECAY if recipe.start else WARMUP + DECAY
    if recipe.steps - recipe.start < least:
        raise UserError(
            f"{recipe.name} is too short: a schedule has {WARMUP:,} steps of warmup and {DECAY:,} "
            "of decay, continued pretraining the decay alone"
        )


def find_trunk(recipe, runs):
    """The run that shares the most first steps with a recipe, and how many; ("", 0) for none."""
    trunk = ""
    most_steps = 0
    for name, run in runs.items():
        steps = shared_steps(recipe, run.recipe)
        if steps > most_steps:  # the first of equals wins
            trunk = name
            most_steps = steps
    return trunk, most_steps


def shared_steps(a, b):
    """How many first steps two recipes have in common, of those before either decays."""
    if (a.size, a.seed, a.parent()) != (b.size, b.seed, b.parent()):
        return 0
    # An objective changes only where a stage of either ends: compare between these steps.
    shorter_end = min(a.steps, b.steps)
    ends = {stage.end for stage in (*a.stages, *b.stages) if a.start < stage.end <= shorter_end}
    common_end = a.start
    for end in sorted(ends):
        if a.objective_at(common_end) != b.objective_at(common_end):
            break
        common_end = end
    # The last steps of the shorter one are its decay, which nothing can branch from.
    common_end = min(common_end, shorter_end - DECAY)
    return max(0, common_end - a.start)


# ---- which checkpoints stay


def kept_steps(names, runs):
    """{name of a run: the steps whose checkpoints it keeps}."""
    # For models that may be asked for later.
    kept = {name: steps_for_later(run) for name, run in runs.items()}
    # For runs that branch there.
    for run in runs.values():
        if run.trunk:
            kept[run.trunk].add(run.branch_step)
    # For names that ask for the checkpoint itself.
    for name in names:
        recipe = parse(name)
        if recipe.step:
            kept[run_holding(recipe, runs)].add(recipe.step - recipe.start)
    return kept


def steps_for_later(run):
    """The steps of a run that any model of recipes.py needs, whether it is asked for or not."""
    steps = set()
    for names in groups().values():
        for name in names:
            recipe = replace(parse(name), seed=run.recipe.seed)
            if recipe.step and recipe.finished() == run.recipe:
                steps.add(recipe.step - recipe.start)
            elif not recipe.step and recipe != run.recipe:
                steps.add(shared_steps(recipe, run.recipe))
    return {step for step in steps if step > run.branch_step}


def run_holding(recipe, runs):
    """The name of the run that has an intermediate checkpoint: its own, or a trunk before it."""
    name = recipe.finished().name
    while recipe.step - recipe.start <= runs[name].branch_step:
        name = runs[name].trunk
    return name
