"""The paper's whole experiment as one plan: print it, cost it, run it, stop it, go on.

    python study.py plan                                            # the 38 models and 12 intermediate checkpoints: what shares what
    python study.py plan --tok_per_s=25000                          # ... and GPU-hours at 25,000 tokens a second of one GPU (610m)
    python study.py run --scale=cpu --data_dir=data/demo --only=B   # train, fine-tune and evaluate on this machine
    python study.py run --launch=slurm --nodes=24 > study.sh        # print the commands instead, with their order; torchrun likewise
    python study.py run --only='610m-clm-*,610m-mntp40-42k'         # names, patterns, groups (A to F, I, X); recipes.py has the grammar
    python report.py out/study --to=out/study/report                # the paper's tables and figures from what there is

Models whose first steps are equal take them once: a trunk keeps its checkpoints where others branch off, and a branch equals a run from
the beginning bit for bit (train.py --branch_from). So stopping anywhere, or asking for more models later, costs nothing but time. A scale
shrinks model, rows and steps; names stay the paper's. Everything goes to out_dir: a run a model, with its trials in its checkpoints, the
logs of what was run, and study.json, from which report.py knows which checkpoint is which model.
"""
import fnmatch
import json
import os
import shlex
import sys
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

import checkpoint
import data
import jobs
import lineage
import objectives
import recipes
import system
import tasks
import trials
import worker
from configurator import UserError, as_tuple, run
from model import SIZES, Encoder, ModelConfig
from recipes import DECAY, WARMUP, holder, parse, plan

PAPER_STEPS = 42_000                    # a scale's `steps` are what these become
# what the paper counts as its cost (section 2); it does not itemise
PAPER_SAYS = {"A": "630k", "B": "120k for B to E", "F": "26k a start"}

# What a scale changes. sizes: the model that stands for each of the paper's; train, tune: settings of train.py, and of finetune.py and
# eval_ir.py, on top of their config file; tasks: what every checkpoint is scored by, all or demo, and `local` where tasks_dir has it.
SCALES = {
    "paper": dict(steps=42_000, sizes={}, train={}, tune=dict(lrs=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4), seeds=(0, 1, 2, 3, 4)),
                  configs={"finetune.py": "config/finetune_paper.py", "eval_ir.py": "config/retrieval_paper.py"}, tasks="all", local=""),
    # TODO numbers
    "cpu": dict(steps=420, sizes={"210m": "demo-210m", "610m": "demo", "1b": "demo-1b"},
                train=dict(block_size=256, batch_rows=8, micro_rows=8, learning_rate=1e-3, eval_rows=32),
                tune=dict(steps=40, batch=16, lrs=(3e-4, 1e-3, 3e-3), seeds=(0,)), configs={},
                tasks="demo", local="sst2,uner_en_ewt,squad,squad_retrieval"),
}
SCALES["gpu"] = SCALES["cpu"]


@dataclass
class Config:
    args: tuple = ()
    # which models
    only: str = ""                     # names, patterns or groups with commas between; empty: the paper's 38 and 12
    scale: str = "paper"               # paper, gpu or cpu: study.SCALES
    seeds: tuple = (42,)               # of pretraining: each model once with each
    # what they read
    data_dir: str = "data/fineweb-edu"   # a corpus of prepare_fineweb.py
    tasks_dir: str = ""                # local data sets; finetune.py's and eval_ir.py's data_dir
    evaluate: bool = True              # fine-tune and search with each checkpoint, too
    # where and how
    out_dir: str = "out/study"         # the study
    launch: str = "local"              # local: run it here; torchrun or slurm: print the commands
    nodes: int = 1                     # machines of a printed command
    nproc_per_node: int = 8            # GPUs of each
    jobs: int = 0                      # processes at a time here; 0: one a GPU, or one a core
    device: str = "auto"               # cuda where there is one, else cpu
    compile: bool = True               # train.py's
    tok_per_s: float = 0.0             # plan: tokens a second of one GPU with the 610m model


# ---- which models

def check(r):
    """Raises UserError for a recipe that names what is not there."""
    if r.size not in SIZES:
        raise UserError(f"{r.name}: no size {r.size} in model.SIZES ({', '.join(SIZES)})")
    for objective, _ in r.stages:
        try:
            objectives.kind_and_rate(objective)
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
    names = [replace(parse(name), seed=seed).name if parse(name).seed == recipes.SEED else name for name in found for seed in c.seeds]
    for name in names:
        check(parse(name))
    return list(dict.fromkeys(names))


# ---- what it costs

@cache
def flops_of_a_row(size, objective, vocab_size, block_size):
    """FLOPs of training on one row: averaged over 64 places where train.py may cut it."""
    with torch.device("meta"):
        model = Encoder(ModelConfig(**SIZES[size], vocab_size=vocab_size))
    kind, rate = objectives.kind_and_rate(objective)
    targets = block_size * (rate or (1 if kind == "clm" else 0.4))
    cuts = [12 + (block_size - 24) * i // 63 for i in range(64)]
    causal = objectives.is_causal(objective)
    return sum(model.flops([cut, block_size - cut], targets, causal) for cut in cuts) / len(cuts)


def cost(run, c):
    """-> {"steps", "tokens", "flops"} of a run's own steps at the scale"""
    s, steps, flops = settings(c), 0, 0.0
    begin = run.recipe.start
    for objective, n in run.recipe.own:
        first = max(begin, run.recipe.start + run.branch)
        n, begin = scaled(begin + n, c) - scaled(first, c), begin + n
        if n > 0:
            steps += n
            flops += n * s["batch_rows"] * flops_of_a_row(s["sizes"].get(run.recipe.size, run.recipe.size), objective, s["vocab_size"],
                                                          s["block_size"])
    return {"steps": steps, "tokens": steps * s["batch_rows"] * s["block_size"], "flops": flops}


def settings(c):
    """What a scale comes to: rows, their length and the vocabulary."""
    scale, info = SCALES[c.scale], os.path.join(c.data_dir, "tokenizer_info.json")
    vocab_size = 128_256
    if os.path.isfile(info):
        with open(info, encoding="utf-8") as f:
            vocab_size = json.load(f).get("vocab_size", vocab_size)
    return dict(batch_rows=1152, block_size=2048) | scale["train"] | {"sizes": scale["sizes"], "vocab_size": vocab_size}


def scaled(step, c):
    """A step of the paper's at the scale."""
    return round(step * SCALES[c.scale]["steps"] / PAPER_STEPS)


def group_of(name):
    """The group a name belongs to, whatever its seed: of the paper's, else X."""
    base = replace(parse(name), seed=recipes.SEED).name
    return next((g for g, names in recipes.paper().items() if base in names), "X")


def show(c, names):
    """Print the graph of trunks and tails, and what it costs."""
    runs = plan(names)
    costs = {name: cost(run, c) for name, run in runs.items()}
    print(f"{len(names)} checkpoints of {len(runs)} runs, scale {c.scale}; steps from the beginning of a schedule\n")

    def branch(name, depth):
        run = runs[name]
        start = f"@ {scaled(run.branch, c):>6,} " if run.trunk else ""
        if run.recipe.start and not run.trunk:
            start = f"{run.recipe.parent().name}, decayed > "
        kept = [f"{scaled(k, c):,}" for k in run.keep]
        print(f"{'    ' * depth}{start}{name}: {costs[name]['steps']:,} steps" + f" (keeps {', '.join(kept)})" * bool(kept))
        for other in sorted((o for o in runs.values() if o.trunk == name), key=lambda o: (o.branch, o.recipe.name)):
            branch(other.recipe.name, depth + 1)

    roots = [name for name, run in runs.items() if not run.trunk]
    for name in sorted(roots, key=lambda name: getattr(runs[name].recipe.parent(), "name", "")):
        branch(name, 0)
    table = [["group", "models", "steps", "unshared", "saved", "tokens", "FLOPs", "GPU-hours", "the paper says"]]
    by_group = {g: [name for name in runs if group_of(name) == g] for g in recipes.GROUPS}
    whole = {g: None for g, found in by_group.items() if set(found) == set(recipes.paper().get(g, ()))}
    for group, found in [*by_group.items(), ("all", list(runs))]:
        if found:
            own, tokens, flops = (sum(costs[name][key] for name in found) for key in ("steps", "tokens", "flops"))
            alone = sum(scaled(runs[name].recipe.steps, c) - scaled(runs[name].recipe.start, c) for name in found)
            says = PAPER_SAYS.get(group, "") if c.scale == "paper" and group in whole else ""
            title = f"{group}: {recipes.GROUPS[group]}" if group in recipes.GROUPS else group
            table.append([title, str(len(found)), f"{own:,}", f"{alone:,}", f"{alone - own:,}", f"{tokens / 1e9:,.4g} B", f"{flops:.3g}",
                          gpu_hours(flops, c), says])
    print()
    for row in table:
        print("| " + " | ".join(row) + " |" + ("\n" + "|---" * len(row) + "|" if row is table[0] else ""))
    s = settings(c)
    print(f"\na step: {s['batch_rows']:,} rows x {s['block_size']:,} = {s['batch_rows'] * s['block_size']:,} tokens; vocabulary {s['vocab_size']:,}"
          + (f"; GPU-hours at {c.tok_per_s:,.0f} tokens/s of one GPU with 610m under MLM40, other sizes by their FLOPs" if c.tok_per_s else ""))
    if {"B", "C", "D", "E"} <= set(whole) and c.scale == "paper":
        print("B to E: 17 models, 130,000 steps: 122,000 of the 13 in B, C and D, and 8,000 of the four decays in E. The paper's 120k is "
              "not itemised; no two of the\ntwo-stage models switch at the same step, so nothing more can be shared. F: 26,000 a start, "
              "two starts.")


def gpu_hours(flops, c):
    if not c.tok_per_s:
        return ""
    s = settings(c)
    per_token = flops_of_a_row(s["sizes"].get("610m", "610m"), "mlm40", s["vocab_size"], s["block_size"]) / s["block_size"]
    return f"{flops / per_token / c.tok_per_s / 3600:,.1f}"


# ---- the commands

def flag(key, value):
    return f"--{key}={str(value).lower() if isinstance(value, bool) else value}"


def folder_of(c, name, step):
    """Where the checkpoint of a run at a step of its own is."""
    return checkpoint.path_of(os.path.join(c.out_dir, name), scaled(step, c))


def ckpt_of(c, runs, name):
    """Where the checkpoint of any name is."""
    r = parse(name)
    return folder_of(c, holder(runs, r), r.step - r.start) if r.step else folder_of(c, name, runs[name].steps)


def train_words(c, run):
    """train.py and its settings for a run."""
    r, s, begin, phases = run.recipe, SCALES[c.scale], run.recipe.start, []
    for objective, n in r.own:
        phases.append((objective, scaled(begin + n, c) - scaled(begin, c)))
        begin += n
    decay = scaled(DECAY, c)
    values = s["train"] | {
        "size": s["sizes"].get(r.size, r.size), "phases": tuple(phases), "seed": r.seed, "decay_steps": decay,
        "warmup_steps": 0 if r.start else scaled(WARMUP, c), "milestones": tuple(scaled(k, c) for k in run.keep),
        "data_dir": c.data_dir, "out_dir": os.path.join(c.out_dir, r.name), "device": c.device, "compile": c.compile,
        "save_interval": max(1, scaled(1000, c)), "eval_interval": max(1, scaled(1000, c)), "keep_last": 1}
    if c.launch != "local":        # rows that a GPU takes at once: at most a dozen, as many as divide its share
        share = max(1, values.get("batch_rows", 1152) // (c.nodes * c.nproc_per_node))
        values["micro_rows"] = max(n for n in range(1, 13) if share % n == 0)
    if run.trunk:
        values["branch_from"] = folder_of(c, run.trunk, run.branch)
    elif r.start:
        values["init_from"] = folder_of(c, r.parent().name, r.start)
    begun = os.path.join(values["out_dir"], "config.json")
    if os.path.isfile(begun):      # with fewer models around it may have begun from another trunk, or none: the bits are the same
        with open(begun, encoding="utf-8") as f:
            values["branch_from"] = json.load(f)["settings"]["branch_from"]
    return ["train.py", *(flag(k, v) for k, v in values.items() if v != "")]


def grids(c):
    """[(script, its tasks)] of what every checkpoint is scored by."""
    s, local = SCALES[c.scale], tasks.folders(c.tasks_dir) if c.tasks_dir else {}
    known = {"all": (tasks.PAPER, tasks.PAPER_IR), "demo": (tasks.DEMO, tasks.DEMO_IR)}
    found = [list(names) for names in known[s["tasks"]]]
    for name in filter(None, s["local"].split(",")):
        if name in local:
            found[tasks.find(name, c.tasks_dir).kind == "retrieval"].append(name)
    return [(script, names) for script, names in zip(("finetune.py", "eval_ir.py"), found) if names]


def tune_words(c, script, names, ckpt):
    """finetune.py or eval_ir.py and its settings for a checkpoint."""
    values = SCALES[c.scale]["tune"] | {"ckpt": ckpt, "tasks": ",".join(names), "device": c.device, "data_dir": c.tasks_dir}
    return [script, *filter(None, [SCALES[c.scale]["configs"].get(script)]), *(flag(k, v) for k, v in values.items() if v != "")]


def has_rows(c, names, ckpt):
    """Has every trial of these tasks its row?"""
    tune = SCALES[c.scale]["tune"]
    return all(os.path.isfile(trials.path_of(ckpt, {"task": task, "lr": lr, "seed": seed}))
               for task in names for lr in tune["lrs"] for seed in tune["seeds"])


def all_jobs(c, runs, names):
    """The study as jobs: a run each, then what fine-tunes and searches with each checkpoint that was asked for."""
    found = []
    for name, run in runs.items():
        begins = train_words(c, run)
        source = folder_of(c, run.trunk, run.branch) if run.trunk else \
            folder_of(c, run.recipe.parent().name, run.recipe.start) if run.recipe.start else ""
        found.append(jobs.Job(name, begins, partial(os.path.isdir, folder_of(c, name, run.steps)),
                              [run.trunk or run.recipe.parent().name] * bool(source), cost(run, c)["flops"], partial(there, name, source)))
    for name in names if c.evaluate else ():
        ckpt = ckpt_of(c, runs, name)
        for script, its in grids(c):
            found.append(jobs.Job(f"{name}.{script[:-3]}", tune_words(c, script, its, ckpt), partial(has_rows, c, its, ckpt),
                                  [os.path.basename(os.path.dirname(ckpt))], len(its), partial(there, name, ckpt)))
    return found


def there(name, path):
    """Raises UserError if a checkpoint that `name` begins from is not there."""
    if path and not os.path.isdir(path):
        begun = os.path.dirname(path)
        raise UserError(f"{name} begins from {path}, which is not there"
                        + (f" though {begun} is further: put it back, or delete {begun} to train it again" if checkpoint.all_of(begun) else ""))


def environments(c):
    """What each of the processes at a time sees of this machine: a GPU, or some of the cores."""
    device, cores = system.pick_device(c.device), os.cpu_count()
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    n = c.jobs or gpus or cores
    return [{"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {"OMP_NUM_THREADS": str(max(1, cores // n))} for i in range(n)]


def settle(c, runs, names):
    """Write study.json: the scale, and which checkpoint is which model. Raises UserError for another study's folder."""
    path = os.path.join(c.out_dir, "study.json")
    mine = {"plan": c.scale, "scale": SCALES[c.scale], "tokenizer_hash": data.Corpus(c.data_dir, verify=False).tokenizer_hash}
    models = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as f:
            old = json.load(f)
        changed = lineage.differences({k: old.get(k) for k in mine}, json.loads(json.dumps(mine)), free=())
        if changed:
            raise UserError(f"{c.out_dir} holds another study ({'; '.join(changed)}): choose another --out_dir")
        mine, models = old, old["models"]
    elif [name for name in os.listdir(c.out_dir) if name != "lock"]:
        raise UserError(f"{c.out_dir} is not empty and holds no study: choose another --out_dir")
    models |= {name: {"folder": os.path.relpath(ckpt_of(c, runs, name), c.out_dir)} for name in names}
    system.write_whole(path, json.dumps({"code": worker.code()} | mine | {"models": models}, indent=1).encode())


def run_here(c, names):
    runs = plan(names)
    os.makedirs(c.out_dir, exist_ok=True)
    lock = jobs.hold(c.out_dir)
    settle(c, runs, names)
    todo = all_jobs(c, runs, names)
    done = {job.name for job in todo if job.is_done()}
    for job in todo:
        if job.name not in done and set(job.after) <= done:
            job.check()      # before an hour of other work, not after it
    jobs.work(todo, c.out_dir, lock, environments(c))
    print(f"{len(names)} checkpoints in {c.out_dir}; the tables and figures: python report.py {c.out_dir} --to={c.out_dir}/report")


def print_commands(c, names):
    """The study as a shell script: torchrun one after the other, or Slurm jobs with their dependencies."""
    runs, slurm = plan(names), c.launch == "slurm"
    gang = f"torchrun --nproc_per_node={c.nproc_per_node}"
    host = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' if slurm else "$HOST"
    wide = gang if c.nodes == 1 else f"torchrun --nnodes={c.nodes} --nproc_per_node={c.nproc_per_node} --rdzv_backend=c10d " \
        f'--rdzv_endpoint="{host}:29500"'
    print("#!/usr/bin/env bash\n# made by: python study.py " + " ".join(map(shlex.quote, sys.argv[1:])) + "\nset -euo pipefail")
    if slurm:
        print("submit() {   # NAME NODES AFTER COMMAND -> the job's number\n  sbatch --parsable --job-name=\"$1\" --nodes=\"$2\" --ntasks-per-node=1 "
              f"--gpus-per-node={c.nproc_per_node} \\\n    ${{3:+--dependency=afterok:$3}} --wrap=\"srun $4\"\n}}\ndeclare -A job")
    elif c.nodes > 1:
        print("# on every machine alike, with HOST set to the first one's name")
    for job in all_jobs(c, runs, names):
        trains = job.words[0] == "train.py"
        words = f"{wide if trains else gang} {' '.join(map(shlex.quote, job.words))}"
        if slurm:
            after = f"${{job[{job.after[0]}]}}" if job.after else ""
            print(f'job[{job.name}]=$(submit {job.name} {c.nodes if trains else 1} "{after}" {shlex.quote(words)})')
        else:
            print(words)


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
