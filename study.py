"""The paper's whole experiment as one plan: print it, cost it, run it, stop it, resume it.

    # the plan: 38 models and 12 intermediate checkpoints, and which steps they share
    python study.py plan
    # ... with GPU-hours, if one GPU makes 25,000 tokens/s with the 610m model
    python study.py plan --tok_per_s=25000
    # train, fine-tune and evaluate on this machine
    python study.py run --scale=cpu --data_dir=data/demo --only=B
    # names, patterns, groups (A to F, I, X): experiments/recipes.py explains them
    python study.py run --only='610m-clm-*,610m-mntp40-42k'
    # print the commands instead of running them; --launch=torchrun does too
    python study.py run --launch=slurm --nodes=24 > study.sh
    # the paper's tables and figures, of the results so far
    python report.py out/study --to=out/study/report

Models whose first steps are equal train them once. The run that trains these steps is a trunk: it
keeps its checkpoint wherever another model branches off, and a branch equals a run from the
beginning bit for bit (train.py --branch_from). So you can stop at any moment and resume, and ask
for more models later. Ctrl-C lets the running commands finish their step and save, and a second one
ends them at once. A scale shrinks models, batches and steps; names stay the paper's.

out_dir holds one run per model, the results inside its checkpoints, the logs of all commands, and
study.json, which tells report.py which checkpoint is which model.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import os
import shlex
from dataclasses import dataclass

from core import files, lock
from core.configurator import NonNegativeFloat, Path, PositiveInt, Seed, UserError, Workers, run
from core.files import remove_leftovers
from experiments import jobs
from experiments.commands import jobs_of
from experiments.layout import Launch, Study, check_folder, write_study
from experiments.overview import print_plan, print_rows_read_again
from experiments.plan import plan_runs
from experiments.scales import scale_called
from experiments.script import print_script
from experiments.selection import select_names


@dataclass
class Config:
    args: tuple = ()
    # which models
    only: str = ""                      # comma-separated names, patterns or groups; empty: all of the paper's
    scale: str = "paper"                 # paper, gpu, cpu or smoke: see experiments/scales.py
    seeds: tuple[Seed, ...] = (42,)      # of pretraining: each model once with each
    # what they read
    data_dir: Path = "data/fineweb-edu"  # a corpus of prepare_fineweb.py
    tasks_dir: Path = ""                 # local data sets; finetune.py's and eval_ir.py's data_dir
    tasks: str = ""                      # what each checkpoint is scored on, instead of the scale's tasks
    evaluate: bool = True                # fine-tune and search with each checkpoint, too
    # where and how
    out_dir: Path = "out/study"          # the study's folder
    launch: str = "local"                # local: run it here; torchrun or slurm: print the commands
    nodes: PositiveInt = 1               # machines of a printed training command
    nproc_per_node: PositiveInt = 8      # GPUs of each machine
    jobs: Workers = 0                    # processes at a time here; 0: one per GPU, or per core, at most 8
    device: str = "auto"                 # cuda if there is a GPU, else cpu
    compile: bool = True                 # train.py's
    tok_per_s: NonNegativeFloat = 0.0    # plan: tokens per second of one GPU with the 610m model


def check_settings(c):
    """Raises UserError for a setting that is wrong whatever the study."""
    if not c.args or c.args[0] not in ("plan", "run"):
        raise UserError("plan or run? python study.py plan, python study.py run --scale=cpu ...")
    if c.launch not in ("local", "torchrun", "slurm"):
        raise UserError(f"launch={c.launch}: expected local, torchrun or slurm")
    if not c.seeds:
        raise UserError(f"seeds={c.seeds}: expected whole numbers, as in 42,43,44")


def run_here(study, n_processes):
    """Train and score what is left of a study on this machine."""
    check_folder(study.out_dir)
    os.makedirs(study.out_dir, exist_ok=True)
    with lock.hold(study.out_dir, "study.py") as lock_file:
        remove_leftovers(study.out_dir, ["study.json"])
        write_study(study)
        print_rows_read_again(study.runs, study.scale, study.data_dir)
        all_jobs = jobs_of(study)
        jobs.check_first(all_jobs)
        environments = jobs.process_environments(study.device, n_processes)
        # The jobs inherit the lock: one that outlives this process keeps others out, too.
        jobs.run_jobs(all_jobs, study.out_dir, lock_file, environments)
    report = ["python", files.own_path("report.py"), study.out_dir, f"--to={study.out_dir}/report"]
    print(f"{len(study.names)} checkpoints in {study.out_dir}; for tables and figures: "
          f"{shlex.join(report)}")


def main(c):
    check_settings(c)
    scale = scale_called(c.scale)
    names = select_names(c.only, c.seeds, scale)
    if c.args[0] == "plan":
        print_plan(names, scale, c.data_dir, c.tok_per_s)
        return

    study = Study(
        names=names,
        runs=plan_runs(names),
        scale=scale,
        out_dir=c.out_dir,
        data_dir=c.data_dir,
        tasks_dir=c.tasks_dir,
        tasks=c.tasks,
        evaluate=c.evaluate,
        device=c.device,
        compile=c.compile,
        launch=Launch(c.launch, c.nodes, c.nproc_per_node),
    )
    if study.launch.is_printed:
        print_script(study)
    else:
        run_here(study, c.jobs)


if __name__ == "__main__":
    run(main, Config)
