"""Which models belong in one table: the paper's four groups of tables, read from the models' names.

    base        one objective for the longest budget, at each masking rate and size
    steps       intermediate checkpoints of one objective
    shares      CLM and then MLM under a fixed budget, beside CLM alone and MLM alone
    continued   a finished model of one objective, and more training of it with MLM alone
    others      models that the paper has no table for
"""
import re

from experiments import recipes

# the two objectives that the paper compares
CLM = "clm"
MLM = "mlm40"


def size_of(size):
    """A number to sort sizes by: "610m" -> 610.0, "1b" -> 1000.0; 0.0 for a size like "tiny"."""
    match = re.fullmatch(r"([\d.]+)([mb])", size)
    if match is None:
        return 0.0
    millions = float(match[1])
    return 1000 * millions if match[2] == "b" else millions


def order_of(name):
    """A key that sorts models by size, budget, share of CLM, masking rate and step."""
    recipe = recipes.parse(name)
    is_continued = recipe.start > 0
    if is_continued:
        # continued models come after the others, together by what they start from
        budget = (0, first_objective(recipe), recipe.steps)
    else:
        budget = (recipe.steps, "", 0)
    share = recipe.clm_share()
    return size_of(recipe.size), is_continued, *budget, share, recipe.stages, recipe.step


def without_rate(objective):
    """An objective without its rate: "mlm40" -> "mlm"."""
    return objective.rstrip("0123456789")


def first_objective(recipe):
    """The objective that training begins with."""
    return recipe.stages[0][0]


def is_clm_then_mlm(recipe):
    """True for a finished model of two stages under one budget, CLM and then MLM."""
    objectives = [without_rate(objective) for objective, _ in recipe.stages]
    is_finished = not recipe.step
    is_one_budget = not recipe.start and not recipe.turn_steps
    return objectives == ["clm", "mlm"] and is_finished and is_one_budget


def is_continued_with_mlm(recipe):
    """True for continued pretraining as in the paper: MLM alone, after a model of one objective."""
    if not recipe.start:
        return False
    has_one_objective = len(recipe.parent().stages) == 1
    return has_one_objective and all(re.fullmatch(r"mlm\d+", o) for o, _ in recipe.phases)


def has_paper_objectives(recipe):
    """True if every stage is plain CLM, or MLM at some masking rate, and none take turns."""
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

    # the section "continued" also has the finished models that others continue
    continuations = {n: r for n, r in paper_like.items() if is_continued_with_mlm(r)}
    parents = {r.parent().name for r in continuations.values()}
    continued = [n for n, r in paper_like.items()
                 if not r.step and (n in continuations or n in parents)]

    placed = {*base, *steps, *shares, *continued}
    others = [n for n in all_recipes if n not in placed]
    return {"base": base, "steps": steps, "shares": shares, "continued": continued,
            "others": others}


def names_of_shares(paper_like, finished, longest):
    """The section "shares": CLM then MLM under a budget, and beside it MLM alone and CLM alone."""
    two_stages = set()      # names
    budgets = set()         # (size, steps, objective) of the models to put beside them
    for name, recipe in paper_like.items():
        # a second stage no longer than the decay is the paper's Figure 7, not a share of CLM
        if is_clm_then_mlm(recipe) and recipe.steps - recipe.stages[0][1] > recipes.DECAY:
            two_stages.add(name)
            second_objective = recipe.stages[1][0]
            budgets.add((recipe.size, recipe.steps, CLM))
            budgets.add((recipe.size, recipe.steps, second_objective))
    names = []
    for name, recipe in paper_like.items():
        is_beside = False
        if name in finished:
            # a model of a shorter budget is shown here in any case
            budget = (recipe.size, recipe.steps, first_objective(recipe))
            is_beside = recipe.steps < longest or budget in budgets
        if name in two_stages or is_beside:
            names.append(name)
    return names
