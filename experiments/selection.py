"""Which models a study makes: the names that --only and --seeds mean."""

import fnmatch
from dataclasses import replace

import objectives
from core.configurator import UserError
from experiments import recipes
from experiments.scales import PAPER_STEPS
from model import SIZES


def select_names(only, seeds, scale):
    """The names of the models and checkpoints to make, each once.

    only: names, patterns or groups of recipes.py with commas between; "" means all of the paper's.
    A name without a seed of its own stands for one model per seed of `seeds`. Raises UserError for
    a word that matches nothing, and for a model that this scale cannot make.
    """
    names = []
    for name in names_meant(only):
        recipe = recipes.parse(name)
        check_recipe(recipe, scale)
        if recipe.seed == recipes.SEED:
            names += [replace(recipe, seed=seed).name for seed in seeds]
        else:
            names.append(recipe.name)
    return list(dict.fromkeys(names))


def names_meant(only):
    """The names that the words of --only mean, in their order."""
    if not only:
        return names_of(recipes.paper())
    groups = recipes.groups()
    all_names = names_of(groups)
    names = []
    words = only.replace(" ", "").split(",")
    for word in filter(None, words):
        is_pattern = "*" in word or "?" in word or "[" in word
        if word in groups:
            names += groups[word]
        elif is_pattern:
            matches = fnmatch.filter(all_names, word)
            if not matches:
                raise UserError(
                    f"only={word} matches none of the {len(all_names)} names in recipes.py"
                )
            names += matches
        else:
            names.append(recipes.parse(word).name)
    return names


def names_of(groups):
    """All names of some groups {group: names}, in one list."""
    names = []
    for names_of_group in groups.values():
        names += names_of_group
    return names


def check_recipe(recipe, scale):
    """Raises UserError for an unknown size or objective, or a step that the scale would round."""
    for step in (recipe.step, *(stage.end for stage in recipe.stages)):
        if step * scale.steps % PAPER_STEPS:
            raise UserError(
                f"{recipe.name}: at scale={scale.name} a step is {PAPER_STEPS / scale.steps:g} "
                f"of the paper's, and {step:,} is not a multiple of it"
            )
    if recipe.size not in SIZES:
        raise UserError(f"{recipe.name}: no size {recipe.size} in model.SIZES ({', '.join(SIZES)})")
    for stage in recipe.stages:
        try:
            objectives.parse(stage.objective)
        except ValueError as error:
            raise UserError(f"{recipe.name}: {error}") from None
