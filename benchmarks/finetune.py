"""A grid of fine-tuning trials: finetune.py with one worker and with several, beside a loop around
Hugging Face's Trainer.

    python bench.py finetune
    python bench.py finetune --task=sst2 --task_dir=FOLDER_OF_THE_DATA

Each is started as a user starts it, in a process of its own, and timed from its start to its end:
imports, tokenizing and loading included. The loop does for each trial what the paper's code does:
from_pretrained, a Trainer that pads each batch to its longest sequence, evaluation of the
validation and the test set. It is favoured in three ways: our tokenizer makes its tokens,
evaluation takes batches as large as in training, and one process runs all trials. Several loops
side by side are not measured. So one worker beside the loop compares the two programs, and several
workers beside the loop compare what a user gets from either without more work.
"""
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks.rows import describe, record
from benchmarks.settings import as_flags, check_sizes, settings_for
from core import checkpoint, tokenizer
from core.configurator import Path, PositiveInt, RunError, UserError
from core.device import pick_device, pick_dtype, synchronize
from core.files import ROOT
from huggingface import weights as hf_weights
from model import SIZES, Encoder, ModelConfig
from tasks import demo, loading, packing, registry

MAX_LENGTH = 507                   # tokens of a sequence: 0.99 * 512
LEARNING_RATES = (5e-5, 1e-4)
BATCH = 32


@dataclass
class Config:
    # the model, from random weights
    size: str = "small"             # a key of model.SIZES
    vocab_size: PositiveInt = 8192  # of the tokenizer
    # the grid
    task: str = "sotu_era"          # a sequence classification task of tasks/registry.py
    task_dir: Path = ""             # local data for it, as finetune.py's data_dir
    trials: PositiveInt = 8         # at two learning rates, half of them at each
    trial_steps: PositiveInt = 50   # steps of a trial
    # how
    device: str = "auto"            # cuda where there is one, else cpu
    dtype: str = "auto"             # bfloat16 or float32
    to: Path = ""                   # append the rows, with device and versions, to this .jsonl file


def finetune(c):
    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    check_settings(c)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(c, device, dtype, folder)
    n_workers = count_workers(c)
    names = {
        "one": "finetune.py, one worker",
        "several": f"finetune.py, {n_workers} workers (torchrun)",
        "trainer": "Hugging Face Trainer loop: pads, loads the model again for each trial",
    }
    print(f"\n{describe(device)}; {c.size}, {dtype}; {c.task}: {c.trials} trials of "
          f"{c.trial_steps} steps of {BATCH}, and evaluation\n\n"
          "| grid | seconds | trials/hour | faster than the loop by |\n|---|---|---|---|")
    ratio = {key: seconds["trainer"] / value for key, value in seconds.items()}
    for key, name in names.items():
        trials_an_hour = 3600 * c.trials / seconds[key]
        print(f"| {name} | {seconds[key]:.0f} | {trials_an_hour:.0f} | {ratio[key]:.2f} x |")
    row = {"bench": "finetune", "task": c.task, "size": c.size, "dtype": dtype, "trials": c.trials,
           "steps": c.trial_steps, "workers": n_workers, "seconds": seconds, "ratio": ratio}
    record(c.to, row, device)


def check_settings(c):
    check_sizes((c.size,), f"size={c.size}")
    if c.trials < 2 or c.trials % 2:
        raise UserError(f"trials={c.trials}: expected an even number, half of them at each "
                        "learning rate")
    if registry.find(c.task, c.task_dir).kind != "sequence":
        raise UserError(f"task={c.task}: expected a sequence classification task, which is what "
                        "the peer's loop trains")
    packages = ("transformers", "accelerate")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the peer needs {' and '.join(missing)} (requirements-dev.txt)")


def count_workers(c):
    """Return how many workers share the grid: one per core, but at most four, and one per seed."""
    return min(4, os.cpu_count() or 1, c.trials // 2)


def measure(c, device, dtype, folder):
    """Time each program on the whole grid. -> {"one" worker | "several" | "trainer": seconds}"""
    path = new_run(c, os.path.join(folder, "run"))
    rates = ",".join(f"{lr:g}" for lr in LEARNING_RATES)
    seeds = ",".join(str(seed) for seed in range(c.trials // 2))
    grid = [
        "finetune.py",
        f"--ckpt={path}",
        f"--tasks={c.task}",
        f"--data_dir={c.task_dir}",
        f"--lrs={rates}",
        f"--seeds={seeds}",
        f"--steps={c.trial_steps}",
        f"--device={device}",
        f"--dtype={dtype}",
    ]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={count_workers(c)}"]
    trainer_flags = as_flags(settings_for(TrainerConfig, c))
    commands = {
        "one": [*grid, f"--out_dir={folder}/one", f"--cache_dir={folder}/one"],
        "several": [*torchrun, *grid, f"--out_dir={folder}/several",
                    f"--cache_dir={folder}/several"],
        "trainer": ["bench.py", "trainer", path, *trainer_flags],
    }
    seconds = {}
    for name, command in commands.items():
        began = time.time()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False,
                              stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RunError(f"{name} ended with exit code {done.returncode}")
        seconds[name] = time.time() - began
    return seconds


def new_run(c, folder):
    """Save a model of c's size and vocabulary, with random weights. -> its checkpoint"""
    os.makedirs(folder)
    texts = (sentence for *_, sentence in demo.sentences())
    tok = tokenizer.get(f"train:{c.vocab_size}", texts)
    tokenizer.save(tok, folder)
    torch.manual_seed(0)
    model = Encoder(model_config(c))
    return checkpoint.save(folder, 0, model, {"settings": {"tokenizer_hash": tok.hash.hex()}})


def model_config(c):
    return ModelConfig(**SIZES[c.size], vocab_size=c.vocab_size, block_size=512)


# --------------------------------------------------------------------------------------------------
# the process of the Trainer loop

@dataclass
class TrainerConfig(Config):
    args: tuple = ()             # a checkpoint, for its tokenizer


def run_trainer(c):
    """bench.py trainer CHECKPOINT: run the grid. Each trial loads the model and pads batches."""
    from transformers import (
        EuroBertConfig,
        EuroBertForSequenceClassification,
        Trainer,
        TrainingArguments,
    )

    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    run_dir = os.path.dirname(c.args[0])
    tok = tokenizer.load(run_dir)
    task, examples, _ = loading.load(c.task, c.task_dir)
    splits = {split: encode_split(task, rows, tok) for split, rows in examples.items()}

    # A model of the checkpoint's size, with random weights, as Hugging Face saves one.
    folder = os.path.join(run_dir, "hugging_face")
    dimensions = hf_weights.write_config(model_config(c), causal=False)
    ids_and_pooling = {
        "bos_token_id": 0,
        "eos_token_id": tok.eos_id,
        "pad_token_id": tok.eos_id,
        "mask_token_id": tok.mask_id,
        "classifier_pooling": "mean",
    }
    config = EuroBertConfig.from_dict(dimensions | ids_and_pooling, num_labels=len(task.labels))
    EuroBertForSequenceClassification(config).save_pretrained(folder)

    # The grid: each trial trains and then evaluates the validation and the test set.
    for lr in LEARNING_RATES:
        for seed in range(c.trials // 2):
            model = EuroBertForSequenceClassification.from_pretrained(folder,
                                                                      attn_implementation="sdpa")
            arguments = TrainingArguments(
                output_dir=os.path.join(folder, "out"),
                max_steps=c.trial_steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                learning_rate=lr,
                seed=seed,
                warmup_steps=c.trial_steps // 10,
                weight_decay=0.1,
                adam_beta2=0.95,
                adam_epsilon=1e-5,
                bf16=dtype == "bfloat16",
                use_cpu=device == "cpu",
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
            )
            loop = Trainer(model, arguments, train_dataset=splits["train"],
                           data_collator=lambda items: pad(items, tok.eos_id))
            loop.train()
            loop.predict(splits["validation"])
            loop.predict(splits["test"])
    synchronize(device)


def encode_split(task, examples, tok):
    """Encode the examples of a split for the Trainer. -> [{"ids": token ids, "label": label id}]"""
    encoded = packing.encode(registry.family_of(task), examples, tok, MAX_LENGTH)
    items = []
    for i, label in enumerate(encoded["target"]):
        ids = packing.rows(encoded, "tokens", [i]).tolist()
        items.append({"ids": ids, "label": int(label)})
    return items


def pad(items, pad_id):
    """Pad the items of a batch to the longest. -> the arguments of the model"""
    longest = max(len(item["ids"]) for item in items)
    ids = []
    mask = []
    for item in items:
        n_padding = longest - len(item["ids"])
        ids.append(item["ids"] + [pad_id] * n_padding)
        mask.append([1] * len(item["ids"]) + [0] * n_padding)
    labels = [item["label"] for item in items]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }
