"""Fine-tune an encoder on tasks, over a grid of learning rates and seeds.

    # minutes, no network
    python finetune.py --ckpt=runs/demo/clm_then_mlm --tasks=demo config/finetune_quick.py
    # the complete grid of two tasks
    python finetune.py --ckpt=RUN/step_0042000 --tasks=sst2,squad
    # 8 GPUs share the paper's grid
    torchrun --nproc_per_node=8 finetune.py --ckpt=RUN --tasks=all config/finetune_paper.py
    # the table
    python report.py RUN --to=RUN/report

A trial is one task, one learning rate and one seed. It starts from the pretrained encoder and a new
head, trains both, and scores them. It writes a row, OUT_DIR/trials/<task>/lr<lr>_sd<seed>.json, and
the score of each example in an .npz of the same name. By default OUT_DIR is the checkpoint's own
folder. Start this program as often as you like, on as many machines as can see the folder: its
processes share the trials that are left, finished trials stay, and a killed process costs only the
trial it was in.

`--tasks=all` stands for the paper's nine tasks, `--tasks=demo` for the three that are made from the
demo corpus. tasks/registry.py lists them, and a folder of your own data is one more. Each family of
tasks is one file, such as tasks/question_answering.py. tasks/family.py says what such a file
provides.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import itertools
import math
import os
import shlex
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from core import checkpoint
from core.configurator import NonNegativeInt, Path, PositiveInt, Seed, UserError, run
from core.device import keep_freed_memory
from core.distributed import shows_progress
from core.rng import permute
from tasks import loading, packing, queue, registry, worker
from tasks.family import Family, Outputs, Split
from tasks.training import Diverged, fit


@dataclass
class Config(worker.GridSettings):
    # what
    tasks: str = "demo"                 # names with commas between them, all (the paper's nine) or demo
    data_dir: Path = ""                 # data_dir/<task>/{train,validation,test}.jsonl instead of the hub
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)  # of the new head and the data's order, and of nothing else
    keep: bool = False                  # keep each trial's encoder and head as a checkpoint beside its row
    # how
    mode: str = "standard"              # standard, or paper: the labels and scores of the paper's code
    split: str = "hash"                 # how validation is cut off: hash (of the text) or encodeval (by row)
    steps: NonNegativeInt = 0           # of each trial; 0: 1,000 or one epoch, as in the paper
    # system
    micro_tokens: PositiveInt = 16_384  # tokens in a forward and backward pass; a step is cut to fit
    eval_tokens: PositiveInt = 8_192    # tokens in a forward pass of evaluation; more overflow a CPU's caches


# ---- one process

@dataclass
class TaskData:
    """A task, read and encoded."""
    family: Family        # knows how to train and score it
    splits: dict          # {"train" | "validation" | "test": Split}
    facts: dict           # what every row of the task records about it


class FineTuningWorker(worker.Worker):
    """Runs trials. It holds the encoder, and the data of one task at a time."""

    def __init__(self, c, path):
        super().__init__(c, path)
        self.data = None
        self.facts["split"] = c.split

    def run(self, trial, out_dir):
        """Run one trial: load the task, restore the encoder, train, evaluate. Returns its row.

        trial: {"task", "lr", "seed"}.
        """
        self.load_task(trial["task"], out_dir)
        start_time = time.time()
        name = f"{trial['task']} lr {trial['lr']:g} seed {trial['seed']}"
        row = self.facts | self.data.facts | trial | {"time": time.strftime("%Y-%m-%dT%H:%M:%S")}

        # The pretrained weights again. The seed decides the new head and the order of the data, and
        # nothing else.
        self.restore(trial["seed"])
        head = self.data.family.new_head(self.encoder.config.n_embd)
        head = head.to(self.device, getattr(torch, self.c.param_dtype))
        try:
            row["train_loss"] = self.train(head, trial, name)      # about ten pairs [step, mean loss]
        except Diverged as error:
            tqdm.write(f"{name}: failed, {error}")
            return row | {"failed": True, "why": str(error), "validation": None, "test": None}
        train_end = time.time()

        # Score both splits. The row gets the scores of each split; each example's own go to a file
        # beside it.
        validation_outputs = self.compute_outputs(head, "validation")
        test_outputs = self.compute_outputs(head, "test")
        validation, test = self.data.family.evaluate(validation_outputs, test_outputs)
        validation_scores, validation_per_example = validation
        test_scores, test_per_example = test
        row["failed"] = False
        row["validation"] = validation_scores | {"n": len(validation_per_example)}
        row["test"] = test_scores | {"n": len(test_per_example)}
        row["per_item"] = worker.save_example_scores(
            out_dir, trial, validation=np.array(validation_per_example, np.float16),
            test=np.array(test_per_example, np.float16))
        row["secs"] = {"train": round(train_end - start_time, 2),
                       "eval": round(time.time() - train_end, 2)}
        tqdm.write(f"{name}: validation {100 * validation_scores['score']:.2f}, "
                   f"test {100 * test_scores['score']:.2f} "
                   f"({row['baseline']['name']} {100 * row['baseline']['score']:.2f}), "
                   f"{time.time() - start_time:.1f} s")
        if self.c.keep:
            labels = self.data.family.task.labels
            self.save_encoder(out_dir, trial, row | {"labels": labels}, head)
        return row

    def load_task(self, name, out_dir):
        """Read and encode a task, unless the previous trial was of the same one.

        Prints its size, and what a reader of its scores should know.
        """
        if self.data and self.data.facts["task"] == name:
            return
        c = self.c
        task, examples, notes = loading.load(name, c.data_dir, c.split)
        family = registry.family_of(task, c.mode)
        fingerprint = loading.fingerprint(examples)
        sequences = packing.encode_task(name, family, examples, fingerprint, self.tokenizer,
                                        self.max_length, c.cache_dir)
        splits = {split: Split(examples[split], sequences[split]) for split in examples}

        # how long it is trained
        n_sequences = len(packing.lengths(sequences["train"]))
        steps_per_epoch = math.ceil(n_sequences / c.batch)
        steps = c.steps
        if not steps:
            steps = task.epochs * steps_per_epoch if task.epochs else 1000

        # how much of it max_length cut off
        truncated_share = {}
        for split, arrays in sequences.items():
            n_truncated = int(arrays["truncated"][0])
            truncated_share[split] = n_truncated / len(examples[split])
            if n_truncated:
                notes.append(f"{n_truncated:,} of {split} cut at {self.max_length} tokens")

        facts = {"task": name, "kind": task.kind, "data": fingerprint, "steps": steps,
                 "epochs": round(steps / steps_per_epoch, 3),
                 "truncated_frac": truncated_share, "baseline": family.baseline(splits)}
        self.record_settings(out_dir, name, facts)
        self.data = TaskData(family, splits, facts)
        if shows_progress():
            sizes = " + ".join(f"{len(examples[split]):,}" for split in examples)
            summary = (f"{name}: {family.title}, {sizes} examples, {steps} steps of {c.batch} "
                       f"({facts['epochs']:g} epochs)")
            tqdm.write("; ".join([summary, *notes]))

    def train(self, head, trial, name):
        """Train the encoder and the head on the loaded task. Returns the loss curve of fit()."""
        c, family = self.c, self.data.family
        sequences = self.data.splits["train"].sequences
        n_sequences = len(packing.lengths(sequences))

        def micro_batches(step):
            """[((sequence indices, their targets), number of targets)] of a step."""
            # The epochs follow each other without a gap, each in an order of its own. A step takes
            # the next c.batch places of this stream; permute() says which sequence stands where.
            place = np.arange(step * c.batch, (step + 1) * c.batch)
            indices = permute(place % n_sequences, n_sequences, trial["seed"],
                              epoch=place // n_sequences)
            batches = []
            for batch_indices in packing.by_budget(indices, sequences, c.micro_tokens):
                targets, n_targets = family.targets(sequences, batch_indices)
                batches.append(((batch_indices, targets), n_targets))
            return batches

        def loss_of(micro_batch):
            """The sum of the losses of a micro-batch's targets."""
            indices, targets = micro_batch
            batch = packing.batch_of(sequences, indices, self.device, targets)
            return family.loss(self.forward(head, batch), batch)

        parameters = [*self.parameters(), *head.parameters()]
        steps = self.data.facts["steps"]
        return fit(parameters, micro_batches, loss_of, steps, trial["lr"], c, name)

    def compute_outputs(self, head, split):
        """The head's outputs for all sequences of a split. -> Outputs"""
        data = self.data.splits[split]
        lengths = packing.lengths(data.sequences)
        # longest sequences first, so that what does not fit in memory fails at once
        order = np.argsort(-lengths, kind="stable")
        logits = [None] * len(lengths)
        batches = packing.by_budget(order, data.sequences, self.c.eval_tokens)
        for indices in tqdm(batches, desc=split, leave=False, disable=not shows_progress()):
            batch = packing.batch_of(data.sequences, indices, self.device)
            with torch.inference_mode():
                batch_logits = self.forward(head, batch).cpu()
            if self.data.family.has_output_per_token:
                batch_logits = batch_logits.split(batch.lengths)
            for i, sequence_logits in zip(indices, batch_logits):
                logits[i] = sequence_logits.numpy()
        return Outputs(data.examples, data.sequences, logits)

    def forward(self, head, batch):
        """A batch through encoder and head. -> logits, fp32: [T, outputs] or [S, outputs]"""
        with self.autocast():
            hidden = self.encoder(batch.tokens, batch.cu_seqlens, self.c.causal)          # [T, C]
            return head(hidden, batch.cu_seqlens).float()


# ---- the grid

def check(c):
    """The names of the tasks. Raises UserError if a setting is wrong."""
    names = worker.check(c, registry.PAPER, registry.DEMO)
    for name in names:
        if registry.find(name, c.data_dir).kind == "retrieval":
            raise UserError(f"{name} is a retrieval collection: python eval_ir.py --tasks={name}")
    if c.split not in ("hash", "encodeval"):
        raise UserError(f"split={c.split}: expected hash or encodeval")
    return names


def main(c):
    names = check(c)
    keep_freed_memory()
    path = checkpoint.find(c.ckpt)
    out_dir = c.out_dir
    if not out_dir:
        out_dir = os.path.join(path, "random") if c.random_weights else path
    this_worker = FineTuningWorker(c, path)
    # The facts about each task are still empty: they are known only once its data is read.
    this_worker.refuse_other_settings(out_dir, {name: {} for name in names})

    trials = []
    for name, lr, seed in itertools.product(names, c.lrs, c.seeds):
        trials.append({"task": name, "lr": lr, "seed": seed})
    queue.work(trials, out_dir, lambda trial: this_worker.run(trial, out_dir), shape=worker.ROW_SHAPE)
    if shows_progress():
        report = shlex.join(["python", "report.py", out_dir, f"--to={out_dir}/report"])
        print(f"{len(trials)} trials in {out_dir}/trials; the table: {report}")


if __name__ == "__main__":
    run(main, Config)
