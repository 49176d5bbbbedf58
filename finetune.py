"""Fine-tune an encoder: every task, every learning rate, every seed; a row of scores for each.

    python finetune.py --ckpt=runs/demo/clm_then_mlm --tasks=demo config/finetune_quick.py      # minutes, no network
    python finetune.py --ckpt=RUN/step_0042000 --tasks=sst2,squad                               # the whole grid of two tasks
    torchrun --nproc_per_node=8 finetune.py --ckpt=RUN --tasks=all config/finetune_paper.py     # 8 GPUs share the paper's grid
    python report.py RUN --to=RUN/report                                                        # the table

Rows go to OUT_DIR/trials/<task>/lr<lr>_sd<seed>.json, by default beside the checkpoint, with per-example scores in an .npz of
the same name. Start it as often as you like, on as many machines as see the folder: workers share what is left, finished trials
stay, and a killed worker costs the trial it was in. `--tasks=all` are the paper's nine, `demo` the three made from the demo
corpus; tasks.py lists them, and a folder of your own data is one more.
"""
import os
import shlex
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from core import checkpoint
from core.configurator import UserError, run
from core.device import keep_freed_memory
from core.distributed import speaks
from core.rng import permute
from tasks import families, packing, queue, registry, worker
from tasks.training import Diverged, fit


@dataclass
class Config(worker.GridSettings):
    # what
    tasks: str = "demo"             # names with commas between them, all (the paper's nine) or demo
    data_dir: str = ""              # local data instead of the hub: data_dir/<task>/{train,validation,test}.jsonl
    seeds: tuple = (0, 1, 2, 3, 4)  # of the new head and of the order of the data, and of nothing else
    keep: bool = False              # keep each trial's encoder and head as a checkpoint beside its row
    # how
    mode: str = "standard"          # standard: entity F1, answers as spans; paper: the paper's labels, heads and scores
    split: str = "hash"             # how validation is cut from train: hash (of the text) or encodeval (the paper's, by row)
    steps: int = 0                  # of each trial; 0: 1,000 or one epoch, as the paper has it for the task
    # system
    micro_tokens: int = 16_384      # tokens in a forward and backward pass; a step is cut to fit
    eval_tokens: int = 8_192        # tokens in a forward pass of evaluation; more fall out of a CPU's caches


# ---- one worker

@dataclass
class Data:
    """One task, read and encoded."""
    task: registry.Task
    examples: dict        # {split: list}
    encoded: dict         # {split: arrays}
    facts: dict           # what its rows say about it


class Worker(worker.Worker):
    """Runs trials of the task at hand."""

    def __init__(self, c, path):
        super().__init__(c, path)
        self.data = None
        self.facts["split"] = c.split

    def take(self, name, folder):
        """Read and encode a task, unless it is the one at hand; say what a reader of its scores should know."""
        if self.data and self.data.facts["task"] == name:
            return
        c = self.c
        task, examples, notes = registry.load(name, c.data_dir, c.split)
        # the paper's code has no windows: it cuts a paragraph at max_length
        encoded = packing.cached(name, task, examples, self.tokenizer, self.max_length, c.mode != "paper", c.cache_dir)
        epoch = -(-len(encoded["train"]["example"]) // c.batch)
        steps = c.steps or (epoch * task.epochs if task.epochs else 1000)
        cut = {split: int(part["truncated"][0]) for split, part in encoded.items()}
        notes += [f"{n:,} of {split} cut at {self.max_length} tokens" for split, n in cut.items() if n]
        facts = {"task": name, "kind": task.kind, "data": registry.fingerprint(examples), "steps": steps,
                 "epochs": round(steps / epoch, 3), "truncated_frac": {split: n / len(examples[split]) for split, n in cut.items()},
                 "baseline": families.baseline(task, examples["train"], examples["test"], encoded["test"], c.mode)}
        self.settle(folder, name, facts)
        self.data = Data(task, examples, encoded, facts)
        if speaks():
            sizes = " + ".join(f"{len(part):,}" for part in examples.values())
            tqdm.write("; ".join([f"{name}: {registry.KINDS[task.kind]}, {sizes} examples, {steps} steps of {c.batch} "
                                  f"({facts['epochs']:g} epochs)", *notes]))

    def logits(self, head, encoded, indices):
        tokens, cu_seqlens = packing.pack(encoded, indices, self.device)
        with self.autocast():
            return head(self.encoder(tokens, cu_seqlens, self.c.causal), cu_seqlens).float()

    def evaluate(self, head, split, threshold=None):
        """-> {"score", ...}, per-example scores [n]. Longest sequences first, so that what does not fit fails at once.
        threshold: see families.span_scores"""
        task, examples, encoded = self.data.task, self.data.examples[split], self.data.encoded[split]
        lengths, (_, _, predictions, scores) = packing.lengths(encoded), families.family(task, self.c.mode)
        outputs = [None] * len(lengths)
        batches = packing.by_budget(np.argsort(-lengths, kind="stable"), encoded, self.c.eval_tokens)
        for indices in tqdm(batches, desc=split, leave=False, disable=not speaks()):
            with torch.inference_mode():
                logits = self.logits(head, encoded, indices).cpu()
            parts = logits if task.kind == "sequence" else logits.split(lengths[indices].tolist())
            for i, part in zip(indices, parts):
                outputs[i] = part.numpy()
        found = predictions(task, examples, encoded, outputs, self.c.mode)
        of_all, items = scores(task, examples, encoded, found, self.c.mode, threshold)
        return of_all | {"n": len(examples)}, np.array(items, np.float16)

    def train(self, head, trial, name):
        """Train encoder and head on the task at hand. -> the loss curve"""
        c, encoded, (targets, loss, _, _) = self.c, self.data.encoded["train"], families.family(self.data.task, self.c.mode)
        n, lengths = len(encoded["example"]), packing.lengths(encoded)

        def micro_batches(step):
            position = np.arange(step * c.batch, (step + 1) * c.batch)       # in the stream of all epochs
            order = permute(position % n, n, trial["seed"], position // n)
            return [((indices, wanted), count) for indices in packing.by_budget(order, encoded, c.micro_tokens)
                    for wanted, count in [targets(encoded, indices, c.mode)]]

        def loss_of(batch):
            indices, wanted = batch
            wanted = {k: torch.from_numpy(v if v.dtype == bool else v.astype(np.int64)).to(self.device) for k, v in wanted.items()}
            return loss(self.logits(head, encoded, indices), wanted, lengths[indices].tolist())

        parameters = [*self.parameters(), *head.parameters()]
        return fit(parameters, micro_batches, loss_of, self.data.facts["steps"], trial["lr"], c, name)

    def run(self, trial, folder):
        """Train and evaluate one trial. -> its row"""
        self.take(trial["task"], folder)
        began, name = time.time(), f"{trial['task']} lr {trial['lr']:g} seed {trial['seed']}"
        row = self.facts | self.data.facts | trial | {"time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        self.restore(trial["seed"])
        head = families.new_head(self.data.task, self.encoder.config.n_embd).to(self.device, getattr(torch, self.c.param_dtype))
        try:
            row["train_loss"] = self.train(head, trial, name)
        except Diverged as error:
            tqdm.write(f"{name}: failed, {error}")
            return row | {"failed": True, "why": str(error), "validation": None, "test": None}
        trained = time.time()
        validation, of_validation = self.evaluate(head, "validation")
        test, of_test = self.evaluate(head, "test", validation.get("null_threshold"))
        items = worker.keep_items(folder, trial, validation=of_validation, test=of_test)
        tqdm.write(f"{name}: validation {100 * validation['score']:.2f}, test {100 * test['score']:.2f} "
                   f"({row['baseline']['name']} {100 * row['baseline']['score']:.2f}), {time.time() - began:.1f} s")
        row |= {"failed": False, "validation": validation, "test": test, "per_item": items,
                "secs": {"train": round(trained - began, 2), "eval": round(time.time() - trained, 2)}}
        if self.c.keep:
            self.keep(folder, trial, row | {"labels": self.data.task.labels}, head)
        return row


def check(c):
    """Raises UserError for what is wrong with the settings alone. -> names of the tasks"""
    names = worker.check(c, registry.PAPER, registry.DEMO)
    for name in names:
        if registry.find(name, c.data_dir).kind == "retrieval":
            raise UserError(f"{name} is a retrieval collection: python eval_ir.py --tasks={name}")
    if c.split not in ("hash", "encodeval") or c.eval_tokens < 1:
        raise UserError(f"split={c.split}, eval_tokens={c.eval_tokens}: expected hash or encodeval, and at least 1 token")
    return names


def main(c):
    names = check(c)
    keep_freed_memory()
    path = checkpoint.find(c.ckpt)
    folder = c.out_dir or (os.path.join(path, "random") if c.random_weights else path)
    mine = Worker(c, path)
    mine.refuse_other_settings(folder, {name: {} for name in names})
    grid = [{"task": name, "lr": lr, "seed": seed} for name in names for lr in c.lrs for seed in c.seeds]
    queue.work(grid, folder, lambda trial: mine.run(trial, folder))
    if speaks():
        report = shlex.join(["python", "report.py", folder, f"--to={folder}/report"])
        print(f"{len(grid)} trials in {folder}/trials; the table: {report}")


if __name__ == "__main__":
    run(main, Config)
