"""A study's commands as a shell script, to be run elsewhere.

With --launch=torchrun they run one after the other. With --launch=slurm each becomes a job, which
waits for the job that makes the checkpoint it begins from.
"""

import os
import shlex
import sys

from experiments.commands import jobs_of
from experiments.layout import write_study

# The head of a Slurm script. submit() hands a job to Slurm and prints the number that Slurm gives
# it. The array `job` holds these numbers under the names of the jobs.
SLURM_FUNCTIONS = (
    "declare -A job\n"
    "submit() {   # NAME NODES AFTER, what to run on standard input: prints the job's number\n"
    "  { echo '#!/usr/bin/env bash'; cat; } | "
    'sbatch --parsable --job-name="$1" --nodes="$2" --ntasks-per-node=1 \\\n'
    "    --gpus-per-node=GPUS ${3:+--dependency=afterok:$3}\n"
    "}"
)


def print_script(study):
    """Write study.json and print the commands that are left to run, as a shell script."""
    launch = study.launch
    os.makedirs(study.out_dir, exist_ok=True)
    write_study(study)
    jobs = [job for job in jobs_of(study) if not job.is_done()]
    names_left = {job.name for job in jobs}

    # A line feed in a setting would end the comment that repeats the command.
    command = shlex.join(sys.argv[1:]).replace("\n", " ")
    print(f"#!/usr/bin/env bash\n# python study.py {command}\nset -euo pipefail")
    # Paths in the commands may be relative to this folder. The script may be started in another.
    print(f"cd {shlex.quote(os.getcwd())}")
    if launch.program == "slurm":
        print(SLURM_FUNCTIONS.replace("GPUS", str(launch.gpus_per_node)))
    elif launch.nodes > 1:
        print("# on every machine alike, with HOST set to the name of the first")
    for job in jobs:
        if launch.program == "slurm":
            print(slurm_job(job, launch, names_left))
        else:
            print(torchrun(job, launch))


def torchrun(job, launch):
    """The torchrun command of a Job. Training takes all nodes, scoring one."""
    command = f"torchrun --nproc_per_node={launch.gpus_per_node}"
    if job.kind == "train" and launch.nodes > 1:
        if launch.program == "slurm":
            host = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        else:
            host = "$HOST"
        command += f' --nnodes={launch.nodes} --rdzv_backend=c10d --rdzv_endpoint="{host}:29500"'
    return f"{command} {shlex.join(job.words)}"


def slurm_job(job, launch, names_left):
    """The lines that submit a Job.

    names_left: the names of the jobs in this script; all others are done
    """
    nodes = launch.nodes if job.kind == "train" else 1
    # A job begins from one checkpoint at most, so it waits for one job at most.
    numbers = [f"${{job[{name}]}}" for name in job.after if name in names_left]
    after = "".join(numbers)
    return (
        f"job[{job.name}]=$(submit {job.name} {nodes} \"{after}\" <<'END'\n"
        f"srun {torchrun(job, launch)}\n"
        "END\n"
        ")"
    )
