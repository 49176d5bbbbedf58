"""What a plan costs: steps, tokens, FLOPs, GPU hours."""
from dataclasses import replace
from functools import cache

import torch

import objectives
from experiments import recipes
from experiments.plan import plan
from experiments.recipes import parse
from experiments.scales import scaled, settings
from model import SIZES, Encoder, ModelConfig

# what the paper counts as its cost (section 2), without saying of what it is made
PAPER_SAYS = {"A": "630k", "B": "120k for B to E", "F": "26k a start"}


# ---- what it costs

@cache
def flops_of_a_row(size, objective, vocab_size, block_size):
    """FLOPs of training on one row: averaged over 64 places where train.py may cut it."""
    with torch.device("meta"):
        model = Encoder(ModelConfig(**SIZES[size], vocab_size=vocab_size))
    parsed, rate = objectives.parse(objective)
    share_of_targets = rate or (0.4 if parsed.hides_tokens else 1)
    targets = block_size * share_of_targets
    cuts = [12 + (block_size - 24) * i // 63 for i in range(64)]
    return sum(model.flops([cut, block_size - cut], targets, parsed.is_causal) for cut in cuts) / len(cuts)


def cost(r, c):
    """-> {"steps", "tokens", "flops"} of a recipes.Run's own steps at the scale"""
    s, steps, flops, end = settings(c), 0, 0.0, r.recipe.start
    size = s["sizes"].get(r.recipe.size, r.recipe.size)
    for objective, n in r.recipe.own:
        begin, end = max(end, r.recipe.start + r.branch), end + n
        if end > begin:      # else it was the trunk's
            n = scaled(end, c) - scaled(begin, c)
            a_row = flops_of_a_row(size, objective, s["vocab_size"], s["block_size"])
            steps, flops = steps + n, flops + n * s["batch_rows"] * a_row
    return {"steps": steps, "tokens": steps * s["batch_rows"] * s["block_size"], "flops": flops}


def group_of(name):
    """The group a name belongs to, whatever its seed: of the paper's, else X."""
    base = replace(parse(name), seed=recipes.SEED).name
    return next((g for g, names in recipes.paper().items() if base in names), "X")


def show(c, names):
    """Print the graph of trunks and tails, and what it costs."""
    runs = plan(names)
    costs = {name: cost(r, c) for name, r in runs.items()}
    print(f"{len(names)} checkpoints of {len(runs)} runs, scale {c.scale}; steps count from the beginning of a schedule\n")

    def branch(name, depth):
        r = runs[name]
        start = f"@ {scaled(r.branch, c):>6,} " if r.trunk else f"{r.recipe.parent().name}, decayed > " if r.recipe.start else ""
        kept = ", ".join(f"{scaled(k, c):,}" for k in r.keep)
        print(f"{'    ' * depth}{start}{name}: {costs[name]['steps']:,} steps{f' (keeps {kept})' * bool(kept)}")
        for other in sorted((o for o in runs.values() if o.trunk == name), key=lambda o: (o.branch, o.recipe.name)):
            branch(other.recipe.name, depth + 1)

    roots = [name for name, r in runs.items() if not r.trunk]
    for name in sorted(roots, key=lambda name: getattr(runs[name].recipe.parent(), "name", "")):
        branch(name, 0)

    table = ["group", "models", "steps", "one by one", "saved", "tokens", "FLOPs", "GPU-hours", "the paper says"], ["---"] * 9
    by_group = {g: [name for name in runs if group_of(name) == g] for g in recipes.GROUPS}
    whole = {g for g, found in by_group.items() if c.scale == "paper" and set(found) == set(recipes.paper().get(g, ()))}
    for group, found in [*by_group.items(), ("all", list(runs))]:
        if found:
            steps, tokens, flops = (sum(costs[name][key] for name in found) for key in ("steps", "tokens", "flops"))
            alone = sum(scaled(runs[name].recipe.steps, c) - scaled(runs[name].recipe.start, c) for name in found)
            says = PAPER_SAYS.get(group, "") if group in whole else ""
            title = f"{group}: {recipes.GROUPS[group]}" if group in recipes.GROUPS else group
            in_words = f"{tokens / 1e9:,.4g} B" if tokens > 1e9 else f"{tokens / 1e6:,.4g} M"
            table += [title, str(len(found)), f"{steps:,}", f"{alone:,}", f"{alone - steps:,}", in_words, f"{flops:.3g}",
                      gpu_hours(flops, c), says],
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in table))
    s = settings(c)
    print(f"\na step: {s['batch_rows']:,} rows x {s['block_size']:,} = {s['batch_rows'] * s['block_size']:,} tokens; vocabulary "
          f"{s['vocab_size']:,}")
    if c.tok_per_s:
        print(f"GPU-hours: one GPU makes {c.tok_per_s:,.0f} tokens/s with 610m under MLM40, all else by its FLOPs")
    if {"B", "C", "D", "E"} <= whole:
        of_e, rest = (sum(costs[name]["steps"] for g in groups for name in by_group[g]) for groups in ("E", "BCD"))
        print(f"B to E: 17 models, {rest + of_e:,} steps: {rest:,} of the 13 in B, C and D, {of_e:,} of the four decays in E.\n"
              "The paper says 120k, without its parts; outside E no two of its two-stage models switch at the same step.")


def gpu_hours(flops, c):
    if not c.tok_per_s:
        return ""
    s = settings(c)
    per_token = flops_of_a_row(s["sizes"].get("610m", "610m"), "mlm40", s["vocab_size"], s["block_size"]) / s["block_size"]
    return f"{flops / per_token / c.tok_per_s / 3600:,.1f}"
