"""What a study's scale changes: steps, sizes, batches, tasks."""
import os

from core.files import read_json

PAPER_STEPS = 42_000                    # a scale's `steps` are what these become

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


def settings(c):
    """What a scale comes to: rows, their length and the vocabulary."""
    scale, info = SCALES[c.scale], os.path.join(c.data_dir, "tokenizer_info.json")
    vocab_size = 128_256
    if os.path.isfile(info):
        vocab_size = read_json(info).get("vocab_size", vocab_size)
    return dict(batch_rows=1152, block_size=2048) | scale["train"] | {"sizes": scale["sizes"], "vocab_size": vocab_size}


def scaled(step, c):
    """A step of the paper's at the scale."""
    return round(step * SCALES[c.scale]["steps"] / PAPER_STEPS)
