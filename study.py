"""The paper's whole experiment as one plan: print it, cost it, run it, stop it, go on.

    python study.py plan                                            # 38 models, 12 intermediate checkpoints: what shares what
    python study.py plan --tok_per_s=25000                          # ... and GPU-hours, one GPU making 25,000 tokens/s with 610m
    python study.py run --scale=cpu --data_dir=data/demo --only=B   # train, fine-tune and evaluate on this machine
    python study.py run --launch=slurm --nodes=24 > study.sh        # print the commands instead, in their order; or torchrun
    python study.py run --only='610m-clm-*,610m-mntp40-42k'         # names, patterns, groups (A to F, I, X): see recipes.py
    python report.py out/study --to=out/study/report                # the paper's tables and figures from what there is

Models whose first steps are equal take them once: a trunk keeps its checkpoints where others branch off, and a branch equals a run
from the beginning bit for bit (train.py --branch_from). So stopping anywhere, and asking for more models later, cost nothing but
time. A scale shrinks model, rows and steps; names stay the paper's. out_dir holds a run a model, its trials in its checkpoints, the
logs of all that was run, and study.json, from which report.py knows which checkpoint is which model.
"""
import fnmatch
import shlex
from dataclasses import dataclass, replace

import objectives
from core.configurator import UserError, run
from experiments import jobs, recipes
from experiments.commands import all_jobs, print_commands, settle
from experiments.cost import show
from experiments.plan import plan
from experiments.recipes import parse
from experiments.scales import PAPER_STEPS, SCALES
from model import SIZES


@dataclass
class Config:
    args: tuple = ()
    # which models
    only: str = ""                     # names, patterns or groups with commas between; empty: the paper's 38 and 12
    scale: str = "paper"               # paper, gpu, cpu or smoke: study.SCALES
    seeds: tuple = (42,)               # of pretraining: each model once with each
    # what they read
    data_dir: str = "data/fineweb-edu"   # a corpus of prepare_fineweb.py
    tasks_dir: str = ""                # local data sets; finetune.py's and eval_ir.py's data_dir
    tasks: str = ""                    # what each checkpoint is scored by, instead of the scale's
    evaluate: bool = True              # fine-tune and search with each checkpoint, too
    # where and how
    out_dir: str = "out/study"         # the study
    launch: str = "local"              # local: run it here; torchrun or slurm: print the commands
    nodes: int = 1                     # machines of a printed command
    nproc_per_node: int = 8            # GPUs of each
    jobs: int = 0                      # processes at a time here; 0: one a GPU, or one a core, at most 8
    device: str = "auto"               # cuda where there is one, else cpu
    compile: bool = True               # train.py's
    tok_per_s: float = 0.0             # plan: tokens a second of one GPU with the 610m model


# ---- which models

def check(r, scale):
    """Raises UserError for a recipe that names what is not there, or steps that the scale has no whole number for."""
    for step in (r.step, *(end for _, end in r.stages)):
        if step * SCALES[scale]["steps"] % PAPER_STEPS:
            raise UserError(f"{r.name}: at scale={scale} a step is {PAPER_STEPS / SCALES[scale]['steps']:g} of the paper's, and "
                            f"{step:,} is no multiple of it")
    if r.size not in SIZES:
        raise UserError(f"{r.name}: no size {r.size} in model.SIZES ({', '.join(SIZES)})")
    for objective, _ in r.stages:
        try:
            objectives.parse(objective)
        except ValueError as error:
            raise UserError(f"{r.name}: {error}") from None


def chosen(c):
    """The names that --only and --seeds ask for. Raises UserError for what matches nothing."""
    groups = recipes.paper() | {"X": recipes.BEYOND}
    every = [name for names in groups.values() for name in names]
    found = [] if c.only else [name for group in recipes.paper().values() for name in group]
    for word in filter(None, c.only.replace(" ", "").split(",")):
        matches = groups.get(word) or fnmatch.filter(every, word)
        if not matches and set(word) & set("*?["):
            raise UserError(f"only={word} matches none of the {len(every)} names in recipes.py")
        found += matches or [parse(word).name]
    names = []
    for r in map(parse, found):
        check(r, c.scale)
        names += [replace(r, seed=seed).name for seed in c.seeds] if r.seed == recipes.SEED else [r.name]
    return list(dict.fromkeys(names))


def run_here(c, names):
    runs = plan(names)
    lock = jobs.hold(c.out_dir)
    settle(c, runs, names)
    todo = all_jobs(c, runs, names)
    done = {job.name for job in todo if job.is_done()}
    for job in todo:
        if job.name not in done and set(job.after) <= done:
            job.check()      # before an hour of other work, not after it
    jobs.work(todo, c.out_dir, lock, jobs.environments(c.device, c.jobs))
    report = shlex.join(["python", "report.py", c.out_dir, f"--to={c.out_dir}/report"])
    print(f"{len(names)} checkpoints in {c.out_dir}; the tables and figures: {report}")


def main(c):
    if not c.args or c.args[0] not in ("plan", "run"):
        raise UserError("plan or run? python study.py plan, python study.py run --scale=cpu ...")
    if c.scale not in SCALES or c.launch not in ("local", "torchrun", "slurm"):
        raise UserError(f"scale={c.scale}, launch={c.launch}: expected {', '.join(SCALES)}, and local, torchrun or slurm")
    if not c.seeds or any(type(seed) is not int or seed < 0 for seed in c.seeds):
        raise UserError(f"seeds={c.seeds}: expected whole numbers, as in 42,43,44")
    names = chosen(c)
    if c.args[0] == "plan":
        show(c, names)
    else:
        {"local": run_here}.get(c.launch, print_commands)(c, names)


if __name__ == "__main__":
    run(main, Config)
