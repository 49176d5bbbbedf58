"""Speed, measured beside the peers. Each part is a file of benchmarks/ with its own settings.

    python bench.py train          # a training step: ours, Hugging Face's EuroBERT, nanoGPT
    python bench.py profile        # where the time of a training step goes
    python bench.py steady         # train.py for a thousand steps: still as fast? more memory?
    python bench.py ddp            # train.py on two processes under DDP, beside one
    python bench.py memory         # the most rows a step can have, activations checkpointed or not
    python bench.py data           # batches from a corpus, and preparing one beside nanoGPT's way
    python bench.py kernels        # attention and loss beside PyTorch's, on a CUDA GPU
    python bench.py finetune       # a grid of fine-tuning trials beside a Hugging Face Trainer loop
    python bench.py search         # exact search in a million documents, beside numpy and FAISS
    python bench.py alive          # does everything run on this machine? runs/gpu.sh begins with it
    python bench.py steps          # the training step of several sizes, in one process
    python bench.py readme         # the tables of docs/speed.md, from the rows in results/speed/

`python bench.py PART --help` shows a part's settings; --to=FILE.jsonl keeps its results as rows.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import sys
from collections import namedtuple

from benchmarks import (
    alive,
    data,
    ddp,
    finetune,
    kernels,
    memory,
    profile,
    race,
    search,
    steady,
    steps,
    tables,
    train,
)
from core.configurator import run

# A part is a function, and the dataclass of the settings that it takes.
Part = namedtuple("Part", ["function", "settings"])
PARTS = {
    "train": Part(train.train, train.Config),
    "profile": Part(profile.profile, profile.Config),
    "steady": Part(steady.steady, steady.Config),
    "ddp": Part(ddp.ddp, ddp.Config),
    "memory": Part(memory.memory, memory.Config),
    "data": Part(data.data, data.Config),
    "kernels": Part(kernels.kernel_bench, kernels.Config),
    "finetune": Part(finetune.finetune, finetune.Config),
    "search": Part(search.search, search.Config),
    "alive": Part(alive.alive, alive.Config),
    "steps": Part(steps.steps, steps.Config),
    "readme": Part(tables.readme, tables.Config),
}
# What some parts start as processes of their own.
INTERNAL = {
    "contestant": Part(race.run_contestant, race.ContestantConfig),
    "trial": Part(alive.trial, alive.TrialConfig),
    "trainer": Part(finetune.run_trainer, finetune.TrainerConfig),
    "searcher": Part(search.run_searcher, search.SearcherConfig),
}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("--help", "-h"):
        print(__doc__.strip())
    elif name in PARTS or name in INTERNAL:
        # Take the name off the command line: what follows are the settings.
        selected = (PARTS | INTERNAL)[name]
        del sys.argv[1]
        run(selected.function, selected.settings)
    else:
        print(f"error: what to measure? python bench.py {'|'.join(PARTS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
