"""A plan -> the command lines of its jobs."""
import json
import os
import shlex
import sys
from functools import partial

from core import checkpoint
from core.configurator import UserError, differences
from core.files import is_new, read_json, write_json
from experiments import jobs
from experiments.cost import cost
from experiments.plan import holder, plan
from experiments.recipes import DECAY, WARMUP, parse
from experiments.scales import SCALES, scaled
from pretraining import data
from tasks import queue, registry, worker

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
        values["branch_from"] = read_json(begun)["settings"]["branch_from"]
    return ["train.py", *(flag(k, v) for k, v in values.items() if v != "")]


def grids(c):
    """[(script, its tasks)] of what every checkpoint is scored by."""
    s, local = SCALES[c.scale], registry.folders(c.tasks_dir) if c.tasks_dir else {}
    known = {"all": registry.PAPER + registry.PAPER_IR, "demo": registry.DEMO + registry.DEMO_IR}
    names = known[s["tasks"]] + tuple(name for name in s["local"].split(",") if name in local)
    if c.tasks:
        names = known.get(c.tasks) or worker.split_names(c.tasks)
    found = [], []
    for name in names:
        found[registry.find(name, c.tasks_dir).kind == "retrieval"].append(name)
    return [(script, names) for script, names in zip(("finetune.py", "eval_ir.py"), found) if names]


def tune_words(c, script, names, ckpt):
    """finetune.py or eval_ir.py and its settings for a checkpoint."""
    config, values = SCALES[c.scale]["tune"][script]
    values = values | {"ckpt": ckpt, "tasks": ",".join(names), "device": c.device, "data_dir": c.tasks_dir}
    return [script, *filter(None, [config]), *(flag(k, v) for k, v in values.items() if v != "")]


def has_rows(c, script, names, ckpt):
    """Has every trial of these tasks its row?"""
    tune = SCALES[c.scale]["tune"][script][1]
    return all(os.path.isfile(queue.path_of(ckpt, {"task": task, "lr": lr, "seed": seed}))
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
        old = read_json(path)
        changed = differences(mine | old, json.loads(json.dumps(mine)), free=())
        if changed:
            raise UserError(f"{c.out_dir} holds another study ({'; '.join(changed)}): choose another --out_dir")
        mine, models = mine | old, old["models"]
    elif not is_new(c.out_dir, "lock"):
        raise UserError(f"{c.out_dir} is not empty and holds no study: choose another --out_dir")
    models |= {name: {"folder": os.path.relpath(ckpt_of(c, runs, name), c.out_dir)} for name in names}
    write_json(path, {"code": worker.code()} | mine | {"models": models})


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
