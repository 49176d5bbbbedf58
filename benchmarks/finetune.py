"""The fine-tuning part of bench.py: a grid of trials by finetune.py, by one worker and by several that share the machine, and
the same grid by a Hugging Face Trainer loop.

All start as a user starts them, in a process of their own, and are timed from there to the last row: imports, tokenizing and
loading included. The loop is what upstream does for each trial, from_pretrained, a Trainer that pads each batch to its
longest, evaluation of validation and test set, with three favours: tokens come from our tokenizer ready made, evaluation takes
batches as large as training, and one process runs all trials. Several loops side by side are not measured here: compare one
worker with the loop for what a process does, several for what a user of either gets without more work.
"""
import os
import subprocess
import sys
import time

import torch

from core import checkpoint, tokenizer
from core.configurator import RunError
from core.device import synchronize
from core.files import ROOT
from huggingface import weights as hf_weights
from model import SIZES, Encoder, ModelConfig
from tasks import demo, loading, packing, registry

MAX_LENGTH = 507    # 0.99 * 512


def new_run(c, folder):
    """A run with random weights, which are as fast as trained ones: the size and vocabulary of c. -> its checkpoint"""
    os.makedirs(folder)
    texts = (sentence for *_, sentence in demo.sentences())
    tok = tokenizer.get(f"train:{c.vocab_size}", texts)
    tokenizer.save(tok, folder)
    torch.manual_seed(0)
    model = Encoder(ModelConfig(**SIZES[c.size], vocab_size=c.vocab_size, block_size=512))
    return checkpoint.save(folder, 0, model, {"settings": {"tokenizer_hash": tok.hash.hex()}})


def grid(c):
    return [{"lr": lr, "seed": seed} for lr in (5e-5, 1e-4) for seed in range(c.trials // 2)]


def workers(c):
    """How many share the grid: one a core, four at most, and no more than there are seeds."""
    return min(4, os.cpu_count() or 1, c.trials // 2)


def measure(c, device, dtype, folder):
    """-> {"one" worker | "several" | "trainer": seconds of the whole grid}"""
    path = new_run(c, os.path.join(folder, "run"))
    seeds = sorted({t["seed"] for t in grid(c)})
    ours = ["finetune.py", f"--ckpt={path}", f"--tasks={c.task}", f"--data_dir={c.task_dir}", "--lrs=5e-5,1e-4",
            f"--seeds={','.join(map(str, seeds))}", f"--steps={c.trial_steps}", f"--device={device}", f"--dtype={dtype}"]
    theirs = ["bench.py", "trainer", path, *(w for w in sys.argv[1:] if w.startswith("--"))]
    commands = {"one": [*ours, f"--out_dir={folder}/one", f"--cache_dir={folder}/one"],
                "several": ["-m", "torch.distributed.run", f"--nproc_per_node={workers(c)}", *ours, f"--out_dir={folder}/several",
                            f"--cache_dir={folder}/several"],
                "trainer": theirs}
    here, seconds = ROOT, {}
    for name, command in commands.items():
        began = time.time()
        done = subprocess.run([sys.executable, *command], cwd=here, check=False, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RunError(f"{name} ended with exit code {done.returncode}")
        seconds[name] = time.time() - began
    return seconds


def trainer(c, path, device, dtype):
    """The loop: every trial loads the model anew and pads."""
    from transformers import EuroBertConfig, EuroBertForSequenceClassification, Trainer, TrainingArguments
    tok = tokenizer.load(os.path.dirname(path))
    task, examples, _ = loading.load(c.task, c.task_dir)
    data = {split: packing.encode(registry.family_of(task), part, tok, MAX_LENGTH) for split, part in examples.items()}
    data = {split: [{"ids": packing.rows(d, "tokens", [i]).tolist(), "label": int(d["target"][i])} for i in range(len(d["target"]))]
            for split, d in data.items()}
    folder = os.path.join(os.path.dirname(path), "hugging_face")
    same = hf_weights.write_config(ModelConfig(**SIZES[c.size], vocab_size=c.vocab_size, block_size=512), causal=False)
    ids = dict(bos_token_id=0, eos_token_id=tok.eos_id, pad_token_id=tok.eos_id, mask_token_id=tok.mask_id)
    config = EuroBertConfig.from_dict(same | ids | {"classifier_pooling": "mean"}, num_labels=len(task.labels))
    EuroBertForSequenceClassification(config).save_pretrained(folder)

    def pad(items):
        longest = max(len(x["ids"]) for x in items)
        ids = torch.tensor([x["ids"] + [tok.eos_id] * (longest - len(x["ids"])) for x in items])
        mask = torch.tensor([[1] * len(x["ids"]) + [0] * (longest - len(x["ids"])) for x in items])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([x["label"] for x in items])}

    for trial in grid(c):
        model = EuroBertForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa")
        run = Trainer(model, TrainingArguments(
            output_dir=os.path.join(folder, "out"), max_steps=c.trial_steps, per_device_train_batch_size=32,
            per_device_eval_batch_size=32, learning_rate=trial["lr"], seed=trial["seed"], warmup_steps=c.trial_steps // 10,
            weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-5, bf16=dtype == "bfloat16", use_cpu=device == "cpu",
            remove_unused_columns=False, save_strategy="no", report_to="none"), train_dataset=data["train"], data_collator=pad)
        run.train()
        for split in ("validation", "test"):
            run.predict(data[split])
    synchronize(device)
