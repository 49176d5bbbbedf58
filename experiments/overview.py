"""The printed plan of a study: which runs branch where, and what each group of models costs."""

import os
from dataclasses import dataclass, replace

from core.schema import read_json
from experiments import recipes
from experiments.cost import cost_of, gpu_hours, sum_of
from experiments.plan import plan_runs
from experiments.scales import Batch, Scale, batch_of

# The steps that the paper gives as its cost (section 2). It does not say which steps it counts, nor
# why F has half of the steps of our plan.
PAPER_SAYS = {"A": "630k", "B": "120k for B to E", "F": "26k"}
HEADINGS = [
    "group", "models", "steps", "one by one", "saved", "tokens", "FLOPs", "GPU-hours",
    "the paper says",
]


def print_plan(names, scale, data_dir, tok_per_s):
    """Print the plan that makes these models.

    tok_per_s: tokens a second of one GPU with the 610m model; 0 prints no GPU hours.
    """
    runs = plan_runs(names)
    batch = batch_of(scale, data_dir)
    costs = {name: cost_of(run, scale, batch) for name, run in runs.items()}
    overview = Overview(runs, costs, scale, batch, tok_per_s)

    print(
        f"{len(names)} checkpoints of {len(runs)} runs, scale {scale.name}; "
        "steps count from the beginning of a schedule\n"
    )
    overview.print_trees()
    overview.print_table()
    print(
        f"\na step: {batch.rows:,} rows x {batch.block_size:,} = {batch.tokens:,} tokens; "
        f"vocabulary {batch.vocab_size:,}"
    )
    if tok_per_s:
        print(
            f"GPU-hours: one GPU makes {tok_per_s:,.0f} tokens/s with 610m under MLM40; "
            "other models are estimated by their FLOPs"
        )
    overview.print_comparison()
    print_rows_read_again(runs, scale, data_dir)


def print_rows_read_again(runs, scale, data_dir):
    """Say in one line how many runs read rows of the corpus again, and how many rows at most.

    Without a corpus in data_dir, or if it is large enough, nothing is printed.
    """
    path = os.path.join(data_dir, "manifest.json")
    manifest = read_json(path, {"train_tokens?": int}) if os.path.isfile(path) else {}
    if "train_tokens" not in manifest:
        return
    batch = batch_of(scale, data_dir)
    n_rows = manifest["train_tokens"] // batch.block_size
    rows_again = {}      # {name of a run: rows}
    for name, run in runs.items():
        # A continued run reads the rows after those of the run that it continues.
        end = scale.to_step(run.recipe.steps) * batch.rows
        first = scale.to_step(run.recipe.start) * batch.rows
        if end > n_rows:
            rows_again[name] = end - max(first, n_rows)
    if rows_again:
        name = max(rows_again, key=rows_again.get)
        print(
            f"{data_dir} has {n_rows:,} rows: {len(rows_again)} of {len(runs)} runs read rows for "
            f"the second time or more, {name} {rows_again[name]:,} of them"
        )


@dataclass(frozen=True)
class Overview:
    """A plan with its costs."""

    runs: dict   # {name: plan.Run}
    costs: dict  # {name of a run: Cost of the steps that it trains itself}
    scale: Scale
    batch: Batch
    tok_per_s: float

    # ---- trunks and branches

    def print_trees(self):
        """Print each run under the run it branches from."""
        roots = [run for run in self.runs.values() if not run.trunk]
        for run in sorted(roots, key=lambda run: run.recipe.parent_name):
            self.print_tree(run, indent="")

    def print_tree(self, run, indent):
        """Print a run, and under it those that branch from it."""
        name = run.recipe.name
        # Where it begins: at a step of the run above it, from a decayed model, or at random.
        origin = ""
        if run.trunk:
            origin = f"@ {self.scale.to_step(run.branch_step):>6,} "
        elif run.recipe.start:
            origin = f"{run.recipe.parent_name}, decayed > "
        kept = ", ".join(f"{self.scale.to_step(step):,}" for step in run.kept_steps)
        keeps = f" (keeps {kept})" if kept else ""
        print(f"{indent}{origin}{name}: {self.costs[name].steps:,} steps{keeps}")
        branches = [branch for branch in self.runs.values() if branch.trunk == name]
        for branch in sorted(branches, key=lambda branch: (branch.branch_step, branch.recipe.name)):
            self.print_tree(branch, indent + "    ")

    # ---- what groups cost

    def print_table(self):
        """Print a Markdown table of what each group costs, and what all of them cost together."""
        rows = [HEADINGS, ["---"] * len(HEADINGS)]
        for group, title in recipes.GROUP_TITLES.items():
            names = self.names_in(group)
            if names:
                paper_says = PAPER_SAYS.get(group, "") if self.is_the_papers(group) else ""
                rows.append(self.table_row(f"{group}: {title}", names, paper_says))
        rows.append(self.table_row("all", list(self.runs), ""))
        print()
        for row in rows:
            print(f"| {' | '.join(row)} |")

    def table_row(self, title, names, paper_says):
        """The cells of a row: what these models cost."""
        cost = self.total_cost(names)

        # Without sharing, each model would train its whole schedule.
        steps_one_by_one = 0
        for name in names:
            recipe = self.runs[name].recipe
            steps_one_by_one += self.scale.to_step(recipe.steps) - self.scale.to_step(recipe.start)
        saved = steps_one_by_one - cost.steps

        if cost.tokens > 1e9:
            tokens = f"{cost.tokens / 1e9:,.4g} B"
        else:
            tokens = f"{cost.tokens / 1e6:,.4g} M"
        hours = ""
        if self.tok_per_s:
            hours = f"{gpu_hours(cost.flops, self.tok_per_s, self.scale, self.batch):,.1f}"
        return [
            title,
            str(len(names)),
            f"{cost.steps:,}",
            f"{steps_one_by_one:,}",
            f"{saved:,}",
            tokens,
            f"{cost.flops:.3g}",
            hours,
            paper_says,
        ]

    def print_comparison(self):
        """Compare the steps of the two-stage models with the paper's number, if all are planned."""
        if not all(self.is_the_papers(group) for group in "BCDE"):
            return
        steps = {group: self.total_cost(self.names_in(group)).steps for group in "BCDE"}
        steps_b_to_d = steps["B"] + steps["C"] + steps["D"]
        print(
            f"B to E: 17 models, {steps_b_to_d + steps['E']:,} steps: {steps_b_to_d:,} of the 13 "
            f"in B, C and D, {steps['E']:,} of the four decays in E.\n"
            "The paper says 120k, without a breakdown; outside E no two of its two-stage models "
            "switch at the same step."
        )

    def total_cost(self, names):
        """The Cost of several runs."""
        return sum_of([self.costs[name] for name in names])

    def names_in(self, group):
        """The names of the planned runs that belong to a group, whatever their seed."""
        return [name for name in self.runs if group_of(name) == group]

    def is_the_papers(self, group):
        """True if exactly the paper's models of a group are planned, at the paper's scale."""
        planned_names = set(self.names_in(group))
        paper_names = set(recipes.paper().get(group, ()))
        return self.scale.name == "paper" and planned_names == paper_names


def group_of(name):
    """The paper's group that a name belongs to, whatever its seed; "X" if it belongs to none."""
    unseeded = replace(recipes.parse(name), seed=recipes.SEED).name
    for group, names in recipes.paper().items():
        if unseeded in names:
            return group
    return "X"
