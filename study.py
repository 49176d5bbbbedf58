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
from configurator import UserError, run
from model import SIZES, Encoder, ModelConfig
from recipes import DECAY, WARMUP, holder, parse, plan

PAPER_STEPS = 42_000                    # a scale's `steps` are what these become
# what the paper counts as its cost (section 2), without saying of what it is made
PAPER_SAYS = {"A": "630k", "B": "120k for B to E", "F": "26k a start"}

# What a scale changes. sizes: the models that stand for the paper's, a third and twice as large as each other; train: settings of
# train.py; tune: those of each fine-tuning script, behind its config file; tasks: what every checkpoint is scored by, all or demo,
# and those in `local` that tasks_dir has.
LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
SMALL = dict(block_size=256, dtype="float32", learning_rate=1e-3, eval_rows=32, log_interval=50)
LOCAL = "sst2,uner_en_ewt,squad,squad_retrieval"
SCALES = {
    "paper": dict(steps=42_000, sizes={}, train={}, tasks="all", local="", tune={
        "finetune.py": ("config/finetune_paper.py", dict(lrs=LRS, seeds=(0, 1, 2, 3, 4))),
        "eval_ir.py": ("config/retrieval_paper.py", dict(lrs=LRS, seeds=(0, 1, 2, 3, 4)))}),
    "gpu": dict(steps=1050, sizes={"210m": "demo", "610m": "small", "1b": "mid"}, tasks="demo", local=LOCAL,
                train=SMALL | dict(dtype="auto", batch_rows=32, micro_rows=32, eval_interval=125, save_interval=350), tune={
        "finetune.py": ("", dict(steps=150, batch=16, lrs=(2e-4, 5e-4, 1e-3), seeds=(0,))),
        "eval_ir.py": ("", dict(steps=80, batch=16, lrs=(2e-4, 5e-4, 1e-3), seeds=(0,)))}),
    "cpu": dict(steps=1050, sizes={"210m": "micro", "610m": "mini", "1b": "demo"}, tasks="demo", local=LOCAL,
                train=SMALL | dict(batch_rows=8, micro_rows=8, eval_interval=125, save_interval=350), tune={
        "finetune.py": ("", dict(steps=100, batch=16, lrs=(5e-4, 1.5e-3), seeds=(0,), dtype="float32")),
        "eval_ir.py": ("", dict(steps=60, batch=16, lrs=(3e-4, 1e-3), seeds=(0,), dtype="float32", max_length=128))}),
    # nothing to learn from this one, but that everything runs
    "smoke": dict(steps=42, sizes={"210m": "tiny", "610m": "tiny", "1b": "tiny"}, tasks="demo", local="",
                  train=SMALL | dict(block_size=64, batch_rows=8, micro_rows=8, eval_interval=99, save_interval=2), tune={
        "finetune.py": ("", dict(steps=6, batch=8, lrs=(1e-3,), seeds=(0,))),
        "eval_ir.py": ("", dict(steps=6, batch=8, lrs=(1e-3,), seeds=(0,)))}),
}


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
    names = []
    for r in map(parse, found):
        check(r, c.scale)
        names += [replace(r, seed=seed).name for seed in c.seeds] if r.seed == recipes.SEED else [r.name]
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


def settings(c):
    """What a scale comes to: rows, their length and the vocabulary."""
    scale, info = SCALES[c.scale], os.path.join(c.data_dir, "tokenizer_info.json")
    vocab_size = 128_256
    if os.path.isfile(info):
        vocab_size = system.read_json(info).get("vocab_size", vocab_size)
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


# ---- the commands

def flag(key, value):
    """A setting as a word of the command line."""
    if type(value) is tuple:       # phases as [["clm", 10000], ["mlm40", 32000]], numbers as 1,2
        value = json.dumps(value) if any(type(v) is tuple for v in value) else ",".join(map(str, value)) or "()"
    return f"--{key}={str(value).lower() if isinstance(value, bool) else value}"


def folder_of(c, name, step):
    """Where the checkpoint of a run at a step of its own is."""
    return checkpoint.path_of(os.path.join(c.out_dir, name), scaled(step, c))


def ckpt_of(c, runs, name):
    """Where the checkpoint of any name is."""
    r = parse(name)
    return folder_of(c, holder(runs, r), r.step - r.start) if r.step else folder_of(c, name, runs[name].steps)


def begins(c, r):
    """The checkpoint a run begins from; "" for random weights."""
    if r.trunk:
        return folder_of(c, r.trunk, r.branch)
    return folder_of(c, r.recipe.parent().name, r.recipe.start) if r.recipe.start else ""


def train_words(c, r):
    """train.py and its settings for a recipes.Run."""
    s, end, phases = SCALES[c.scale], r.recipe.start, []
    for objective, n in r.recipe.own:
        phases.append((objective, scaled(end + n, c) - scaled(end, c)))
        end += n
    values = s["train"] | {
        "size": s["sizes"].get(r.recipe.size, r.recipe.size), "phases": tuple(phases), "seed": r.recipe.seed,
        "warmup_steps": 0 if r.recipe.start else scaled(WARMUP, c), "decay_steps": scaled(DECAY, c), "keep_last": 1,
        "milestones": tuple(scaled(k, c) for k in r.keep), "data_dir": c.data_dir, "device": c.device, "compile": c.compile,
        "out_dir": os.path.join(c.out_dir, r.recipe.name)}
    if c.launch != "local":        # rows that a GPU takes at once: at most a dozen, a number that divides its share
        share = max(1, values.get("batch_rows", 1152) // (c.nodes * c.nproc_per_node))
        values["micro_rows"] = max(n for n in range(1, 13) if share % n == 0)
    if begins(c, r):
        values["branch_from" if r.trunk else "init_from"] = begins(c, r)
    begun = os.path.join(values["out_dir"], "config.json")
    if os.path.isfile(begun):      # with fewer models around it may have begun from another trunk, or none: the bits are the same
        values["branch_from"] = system.read_json(begun)["settings"]["branch_from"]
    return ["train.py", *(flag(k, v) for k, v in values.items() if v != "")]


def grids(c):
    """[(script, its tasks)] of what every checkpoint is scored by."""
    s, local = SCALES[c.scale], tasks.folders(c.tasks_dir) if c.tasks_dir else {}
    known = {"all": tasks.PAPER + tasks.PAPER_IR, "demo": tasks.DEMO + tasks.DEMO_IR}
    names = known[s["tasks"]] + tuple(name for name in s["local"].split(",") if name in local)
    if c.tasks:
        names = known.get(c.tasks) or worker.split_names(c.tasks)
    found = [], []
    for name in names:
        found[tasks.find(name, c.tasks_dir).kind == "retrieval"].append(name)
    return [(script, names) for script, names in zip(("finetune.py", "eval_ir.py"), found) if names]


def tune_words(c, script, names, ckpt):
    """finetune.py or eval_ir.py and its settings for a checkpoint."""
    config, values = SCALES[c.scale]["tune"][script]
    values = values | {"ckpt": ckpt, "tasks": ",".join(names), "device": c.device, "data_dir": c.tasks_dir}
    return [script, *filter(None, [config]), *(flag(k, v) for k, v in values.items() if v != "")]


def has_rows(c, script, names, ckpt):
    """Has every trial of these tasks its row?"""
    tune = SCALES[c.scale]["tune"][script][1]
    return all(os.path.isfile(trials.path_of(ckpt, {"task": task, "lr": lr, "seed": seed}))
               for task in names for lr in tune["lrs"] for seed in tune["seeds"])


def all_jobs(c, runs, names):
    """The study as jobs: a run each, then what fine-tunes and searches with each checkpoint that was asked for."""
    found = []
    for name, r in runs.items():
        source = begins(c, r)
        found.append(jobs.Job(name, train_words(c, r), partial(os.path.isdir, folder_of(c, name, r.steps)),
                              [os.path.basename(os.path.dirname(source))] * bool(source), cost(r, c)["flops"], "train",
                              partial(there, name, source)))
    for name in names if c.evaluate else ():
        ckpt = ckpt_of(c, runs, name)
        for script, its in grids(c):
            kind, is_done = script.removesuffix(".py"), partial(has_rows, c, script, its, ckpt)
            found.append(jobs.Job(f"{name}.{kind}", tune_words(c, script, its, ckpt), is_done,
                                  [os.path.basename(os.path.dirname(ckpt))], len(its), kind, partial(there, name, ckpt)))
    return found


def there(name, path):
    """Raises UserError if a checkpoint that `name` begins from is not there."""
    if path and not os.path.isdir(path):
        begun = os.path.dirname(path)
        raise UserError(f"{name} begins from {path}, which is not there: put it back"
                        + f", or delete {begun} to train it again" * bool(checkpoint.all_of(begun)))


def settle(c, runs, names):
    """Write study.json: the scale, and which checkpoint is which model. Raises UserError for another study's folder."""
    path, models, mine = os.path.join(c.out_dir, "study.json"), {}, {"plan": c.scale, "scale": SCALES[c.scale]}
    if c.launch == "local" or os.path.isdir(c.data_dir):      # commands may be printed where the corpus is not
        corpus = data.Corpus(c.data_dir, verify=False)
        mine |= {"train_tokens": corpus.n_tokens, "tokenizer_hash": corpus.tokenizer_hash}
    if os.path.isfile(path):
        old = system.read_json(path)
        changed = lineage.differences(mine | old, json.loads(json.dumps(mine)), free=())
        if changed:
            raise UserError(f"{c.out_dir} holds another study ({'; '.join(changed)}): choose another --out_dir")
        mine, models = mine | old, old["models"]
    elif not system.is_new(c.out_dir, "lock"):
        raise UserError(f"{c.out_dir} is not empty and holds no study: choose another --out_dir")
    models |= {name: {"folder": os.path.relpath(ckpt_of(c, runs, name), c.out_dir)} for name in names}
    system.write_json(path, {"code": worker.code()} | mine | {"models": models})


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


def print_commands(c, names):
    """The study as a shell script: torchrun one after the other, or Slurm jobs with their dependencies."""
    slurm, gang = c.launch == "slurm", f"torchrun --nproc_per_node={c.nproc_per_node}"
    host = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' if slurm else "$HOST"
    meet = f' --nnodes={c.nodes} --rdzv_backend=c10d --rdzv_endpoint="{host}:29500"' if c.nodes > 1 else ""
    command = " ".join(map(shlex.quote, sys.argv[1:])).replace("\n", " ")      # a line feed would end the comment it stands in
    print(f"#!/usr/bin/env bash\n# python study.py {command}\nset -euo pipefail")
    if slurm:
        print("declare -A job\nsubmit() {   # NAME NODES AFTER, what to run on standard input: prints the job's number\n"
              "  { echo '#!/usr/bin/env bash'; cat; } | sbatch --parsable --job-name=\"$1\" --nodes=\"$2\" --ntasks-per-node=1 \\\n"
              f"    --gpus-per-node={c.nproc_per_node} ${{3:+--dependency=afterok:$3}}\n}}")
    elif meet:
        print("# on every machine alike, with HOST set to the name of the first")
    runs = plan(names)
    os.makedirs(c.out_dir, exist_ok=True)
    settle(c, runs, names)
    todo = [job for job in all_jobs(c, runs, names) if not job.is_done()]
    for job in todo:
        trains = job.kind == "train"
        words = f"{gang}{meet * trains} {' '.join(map(shlex.quote, job.words))}"
        if slurm:
            after = "".join(f"${{job[{other.name}]}}" for other in todo if other.name in job.after)      # one at most
            print(f"job[{job.name}]=$(submit {job.name} {c.nodes if trains else 1} \"{after}\" <<'END'\nsrun {words}\nEND\n)")
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
