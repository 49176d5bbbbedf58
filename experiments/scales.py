"""The same study with smaller models: a scale shrinks models, batches and steps.

The names of the models and their steps stay the paper's, whatever the scale. They are translated
only where a command, a folder or a cost needs the real ones.
"""

import os
from dataclasses import dataclass

from core.configurator import UserError
from core.schema import read_json

PAPER_STEPS = 42_000
# The paper's learning-rate grid of fine-tuning.
LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
# What the small scales share: settings of train.py, and tasks.
SMALL = dict(block_size=256, dtype="float32", learning_rate=1e-3, eval_rows=32, log_interval=50)
LOCAL = "sst2,uner_en_ewt,squad,squad_retrieval"


@dataclass(frozen=True)
class Scale:
    """What a scale changes: a row of SCALES, and its name."""

    name: str
    steps: int   # what the paper's 42,000 steps become
    sizes: dict  # {size in a name: row of model.SIZES that it means here}
    train: dict  # settings of train.py
    tasks: str   # the tasks that every checkpoint is scored on: "all" or "demo",
    local: str   # and of these, with commas between, those that tasks_dir has files of
    tune: dict   # {script that scores a checkpoint: (its config file or "", its settings)}

    def to_step(self, paper_step):
        """The step of this scale that stands for a step of the paper."""
        return round(paper_step * self.steps / PAPER_STEPS)

    def to_size(self, paper_size):
        """The model size of this scale that stands for a size of the paper."""
        return self.sizes.get(paper_size, paper_size)


# These are plain dictionaries because study.json records them unchanged.
SCALES = {
    "paper": dict(
        steps=42_000,
        sizes={},
        train={},
        tasks="all",
        local="",
        tune={
            "finetune.py": ("config/finetune_paper.py", dict(lrs=LRS, seeds=(0, 1, 2, 3, 4))),
            "eval_ir.py": ("config/retrieval_paper.py", dict(lrs=LRS, seeds=(0, 1, 2, 3, 4))),
        },
    ),
    "gpu": dict(
        steps=1050,
        sizes={"210m": "demo", "610m": "small", "1b": "mid"},
        tasks="demo",
        local=LOCAL,
        train=SMALL | dict(
            dtype="auto", batch_rows=32, micro_rows=32, eval_interval=125, save_interval=350,
        ),
        tune={
            "finetune.py": ("", dict(steps=150, batch=16, lrs=(2e-4, 5e-4, 1e-3), seeds=(0,))),
            "eval_ir.py": ("", dict(steps=80, batch=16, lrs=(2e-4, 5e-4, 1e-3), seeds=(0,))),
        },
    ),
    "cpu": dict(
        steps=1050,
        sizes={"210m": "micro", "610m": "mini", "1b": "demo"},
        tasks="demo",
        local=LOCAL,
        train=SMALL | dict(batch_rows=8, micro_rows=8, eval_interval=125, save_interval=350),
        tune={
            "finetune.py": ("", dict(
                steps=100, batch=16, lrs=(5e-4, 1.5e-3), seeds=(0,), dtype="float32",
            )),
            "eval_ir.py": ("", dict(
                steps=60, batch=16, lrs=(3e-4, 1e-3), seeds=(0,), dtype="float32", max_length=128,
            )),
        },
    ),
    # A smoke test: it takes minutes and shows that everything runs. Its scores mean nothing.
    "smoke": dict(
        steps=42,
        sizes={"210m": "tiny", "610m": "tiny", "1b": "tiny"},
        tasks="demo",
        local="",
        train=SMALL | dict(
            block_size=64, batch_rows=8, micro_rows=8, eval_interval=99, save_interval=2,
        ),
        tune={
            "finetune.py": ("", dict(steps=6, batch=8, lrs=(1e-3,), seeds=(0,))),
            "eval_ir.py": ("", dict(steps=6, batch=8, lrs=(1e-3,), seeds=(0,))),
        },
    ),
}


def scale_called(name):
    """The Scale called `name`. Raises UserError for an unknown one."""
    if name not in SCALES:
        raise UserError(f"scale={name}: expected one of {', '.join(SCALES)}")
    return Scale(name, **SCALES[name])


@dataclass(frozen=True)
class Batch:
    """The tokens that a training step reads."""

    rows: int
    block_size: int  # tokens of a row
    vocab_size: int  # of the corpus

    @property
    def tokens(self):
        """The number of tokens."""
        return self.rows * self.block_size


def batch_of(scale, data_dir):
    """The Batch of a scale and the corpus in data_dir; without a corpus, the paper's vocabulary."""
    vocab_size = 128_256
    info = os.path.join(data_dir, "tokenizer_info.json")
    if os.path.isfile(info):
        vocab_size = read_json(info, {"vocab_size?": int}).get("vocab_size", vocab_size)
    # Without settings of its own, a scale has train.py's defaults, the paper's batch.
    rows = scale.train.get("batch_rows", 1152)
    block_size = scale.train.get("block_size", 2048)
    return Batch(rows, block_size, vocab_size)
