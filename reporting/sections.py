"""Which models belong in one table: the paper's four groups of tables, read from the models' names.

    base        one objective for the longest budget: objectives, masking rates and sizes
    steps       checkpoints on the way, before the learning rate decays
    shares      CLM and then MLM under a fixed budget, beside CLM alone and MLM alone
    continued   a finished model, and more training of it with MLM
    others      models that the paper has no table for
"""
import re

from experiments import recipes

CLM = "clm"         # the paper's pair of objectives
MLM = "mlm40"


def size_of(size):
    """A number to sort sizes by: "610m" -> 610.0, "1b" -> 1000.0, 0.0 for sizes with a name."""
    match = re.fullmatch(r"([\d.]+)([mb])", size)
    if match is None:
        return 0.0
    millions = float(match[1])
    return 1000 * millions if match[2] == "b" else millions


def order_of(name):
    """A key that sorts models by size, budget, share of CLM, masking rate and step."""
    recipe = recipes.parse(name)
    if recipe.start:
        # continued models stand together by what they start from, after the others
        budget = (0, first_objective(recipe), recipe.steps)
    else:
        budget = (recipe.steps, "", 0)
    is_continued = bool(recipe.start)
    share = recipe.clm_share()
    return size_of(recipe.size), is_continued, *budget, share, recipe.stages, recipe.step


def kind_of(objective):
    """An objective without its rate: "mlm40" -> "mlm"."""
    return objective.rstrip("0123456789")


def first_objective(recipe):
    return recipe.stages[0][0]


def is_clm_then_mlm(recipe):
    """True for two stages under one budget, CLM and then MLM, trained to the end."""
    kinds = [kind_of(objective) for objective, _ in recipe.stages]
    is_whole_run = not recipe.start and not recipe.turn_steps and not recipe.step
    return kinds == ["clm", "mlm"] and is_whole_run


def has_paper_objectives(recipe):
    """True if every stage is plain CLM or MLM at some masking rate, one after another."""
    objectives = [objective for objective, _ in recipe.stages]
    return not recipe.turn_steps and all(re.fullmatch(r"clm|mlm\d+", o) for o in objectives)


def sections(names):
    """The models of each section: {section: names}, sorted. A model may be in several sections."""
    all_recipes = {name: recipes.parse(name) for name in sorted(names, key=order_of)}
    paper_like = {n: r for n, r in all_recipes.items() if has_paper_objectives(r)}
    single_stage = {n: r for n, r in paper_like.items() if len(r.stages) == 1}
    finished = {n: r for n, r in single_stage.items() if not r.step}

    longest = max((r.steps for r in finished.values()), default=0)
    base = [n for n, r in finished.items() if r.steps == longest]
    steps = [n for n, r in single_stage.items() if r.step]
    shares = names_of_shares(paper_like, finished, longest)

    # a finished model is in the section "continued" if some other model continues it
    parents = {r.parent().name for r in paper_like.values() if r.start}
    continued = [n for n, r in paper_like.items() if not r.step and (r.start or n in parents)]

    placed = {*base, *steps, *shares, *continued}
    others = [n for n in all_recipes if n not in placed]
    return {"base": base, "steps": steps, "shares": shares, "continued": continued,
            "others": others}


def names_of_shares(paper_like, finished, longest):
    """CLM then MLM under a budget, and both ends of the line: MLM alone and CLM alone."""
    two_stages = set()
    ends = set()
    for name, recipe in paper_like.items():
        # a second stage no longer than the decay is the paper's Figure 7, not a share of CLM
        if is_clm_then_mlm(recipe) and recipe.steps - recipe.stages[0][1] > recipes.DECAY:
            two_stages.add(name)
            second_objective = recipe.stages[1][0]
            ends.add((recipe.size, recipe.steps, CLM))
            ends.add((recipe.size, recipe.steps, second_objective))
    names = []
    for name, recipe in paper_like.items():
        is_end = False
        if name in finished:
            end = (recipe.size, recipe.steps, first_objective(recipe))
            is_end = recipe.steps < longest or end in ends
        if name in two_stages or is_end:
            names.append(name)
    return names
