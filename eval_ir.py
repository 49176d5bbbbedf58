"""Fine-tune an encoder for retrieval, search with it, and score the ranking.

    # a minute, no network
    python eval_ir.py --ckpt=runs/demo/clm_then_mlm config/retrieval_quick.py
    # a folder in BEIR's layout: FOLDER/squad_retrieval/{corpus.jsonl,queries.jsonl,qrels/}
    python eval_ir.py --ckpt=RUN --tasks=squad_retrieval --data_dir=FOLDER
    # MS MARCO, NQ and MLDR: 8 GPUs share the grid of learning rates and seeds
    torchrun --nproc_per_node=8 eval_ir.py --ckpt=RUN --tasks=all
    # then the best learning rates on the whole corpora, 8 GPUs together on each trial
    torchrun --nproc_per_node=8 eval_ir.py --ckpt=RUN --tasks=all --finals=true --shard=true
    # the table
    python report.py RUN --to=RUN/report

A trial has a learning rate and a seed. It loads the collections, trains on pairs of a query and a
document that answers it, encodes every document of a pool, searches the pool exactly, scores the
ranking, and writes a row: OUT_DIR/trials/<task>/lr<lr>_sd<seed>.json. Rows, seeds and the queue of
trials are as in finetune.py.

Training is the paper's (arXiv 2507.00994, section 4). An embedding is the mean of the last hidden
states. Each query must tell its own document from the other documents of the batch (InfoNCE over
cosines at temperature 0.05). retrieval/pools.py explains the pools of documents, and
retrieval/collections.py how to search your own collection.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import os
import shlex
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from core import checkpoint
from core.configurator import NonNegativeInt, Path, PositiveFloat, PositiveInt, Seed, UserError, run
from core.device import keep_freed_memory, pick_device
from core.distributed import Processes, all_sum, shows_progress, start_processes
from retrieval import targets
from retrieval.mteb_adapter import score_on_mteb
from retrieval.pools import POOLS
from retrieval.retriever import Retriever
from tasks import metrics, queue, registry, worker
from tasks.training import Diverged


@dataclass
class Config(worker.GridSettings):
    # what
    data_dir: Path = ""              # local collections instead of the hub: data_dir/<task>/ in BEIR's layout
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)  # of the order of the pairs, and of nothing else
    train_on: str = ""                  # collection to train on; empty: MS MARCO (paper), else the same one
    pool: str = ""                      # judged, hard or full; empty: judged (paper, demo), full (your own)
    hard_negatives: PositiveInt = 100   # how many of BM25's best documents for each query the pool "hard" has
    finals: bool = False                # afterwards, run the best learning rate again on the full pool
    mteb: str = ""                    # instead: mteb's tasks, without fine-tuning, e.g. NFCorpus,SciFact
    # how
    mode: str = "standard"              # standard: NDCG@10; paper: its score, and answers among the negatives
    paper_encoding: bool = False        # search without the closing token, as (very likely) the paper's code
    steps: NonNegativeInt = 0           # of each trial; 0: 1,000, the paper's
    batch: PositiveInt = 32             # pairs in a step; each query's negatives are the other documents
    temperature: PositiveFloat = 0.05   # of InfoNCE
    # system
    dtype: str = "auto"              # bfloat16 (autocast) where it is fast, else float32; cosines are float32
    micro_tokens: PositiveInt = 16_384  # tokens in a training pass; a larger batch is embedded twice
    eval_tokens: NonNegativeInt = 0  # tokens in an encoding pass; 0: 8,192 on a CPU, 65,536 on a GPU
    cache_dir: Path = "data/tasks"      # tokenized collections, and BM25's best documents
    shard: bool = False                 # torchrun's processes share each trial instead of the grid


# The facts about a search that all rows of its folder of trials must share.
SHARED_FACTS = ("data", "steps", "train_on", "train_data", "pool", "hard_negatives")
# Settings that may differ between the processes of a grid, or that SHARED_FACTS cover.
FREE = (*worker.FREE, "train_on", "pool", "hard_negatives", "finals", "mteb", "shard")


@dataclass(frozen=True)
class Search:
    """What the trials of one folder do: train on a collection's pairs, search another's pool."""

    task: str         # the collection that is searched
    pool: str
    usual_pool: str   # the collection's pool unless --pool names another
    train_on: str     # the collection whose pairs are trained on

    @property
    def folder(self):
        """The name of its folder in trials/, such as "nq", or "nq-full" for an unusual pool."""
        return self.task if self.pool == self.usual_pool else f"{self.task}-{self.pool}"


# ---- one process

class RetrievalWorker(Retriever):
    """Runs trials. It keeps the collections that it has read for the next trial."""

    def __init__(self, c, path, processes):
        super().__init__(c, path, processes, FREE)
        self.steps = c.steps or 1000
        # The paper's evaluator very likely cuts a text where the encoder's context ends.
        self.search_length = self.max_length
        if c.paper_encoding and not c.max_length:
            self.search_length = self.encoder.config.block_size
        self.library = targets.Library(
            c, self.tokenizer, self.max_length, self.search_length, processes
        )
        self.training_set = None
        self.targets = {}            # {folder: Target}

    def run(self, trial, out_dir, searches):
        """Trains once, then searches and scores every target of the trial that has no row yet.

        searches: {folder: Search}. trial["task"] and trial["also"] name folders of it. Returns the
        row of trial["task"], and writes those of trial["also"].
        """
        folders = [trial["task"], *trial.get("also", ())]
        trials = [trial | {"task": folder, "also": ()} for folder in folders]
        open_trials = [t for t in trials if not queue.is_done(out_dir, t, worker.ROW_SHAPE)]

        # Load the pairs to train on, and the pools to search afterwards.
        self.load([searches[folder] for folder in folders], out_dir)

        # Train on pairs, from the same weights as every other trial.
        name = f"{self.training_set.collection.name} lr {trial['lr']:g} seed {trial['seed']}"
        row = self.facts | {
            "lr": trial["lr"],
            "seed": trial["seed"],
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        start_time = time.time()
        self.restore(trial["seed"])
        try:
            row["train_loss"] = self.train(self.training_set, self.steps, trial, name)
        except Diverged as error:
            log(f"{name}: failed, {error}")
            row |= {"failed": True, "why": str(error), "validation": None, "test": None}
        else:
            row |= {"failed": False, "secs": {"train": round(time.time() - start_time, 2)}}
        if self.c.keep and not row["failed"] and self.processes.is_first:
            facts = self.facts_of(trial["task"])
            kept_facts = {key: facts[key] for key in ("task", "kind", "steps")}
            self.save_encoder(out_dir, trial, row | kept_facts)

        # Search and score each target, and write its row. trial["task"] comes last, because its row
        # is returned: the caller writes it.
        for open_trial in reversed(open_trials):
            folder = open_trial["task"]
            target_row = row | self.facts_of(folder)
            if not row["failed"]:
                target_row |= self.evaluate(folder, open_trial, out_dir, row["secs"])
            if folder == trial["task"]:
                return target_row
            if self.processes.is_first:
                queue.finish(queue.path_of(out_dir, open_trial), target_row)
        # trial["task"] was not open. Its old row stays, whatever is returned.
        return row

    def load(self, searches, out_dir):
        """Reads and tokenizes what a trial needs, unless an earlier trial has done so."""
        train_on = searches[0].train_on
        if self.training_set is None or self.training_set.collection.name != train_on:
            self.training_set = self.library.training_set(train_on)
            n = len(self.training_set.pairs)
            log(
                f"{train_on}: {n:,} training pairs, {self.steps} steps of {self.c.batch}",
                self.training_set.collection.notes,
            )
        for search in searches:
            if search.folder not in self.targets:
                target = self.library.target(
                    search.task, search.pool, self.training_set.collection
                )
                self.targets[search.folder] = target
                self.log_target(target)
            facts = self.facts_of(search.folder)
            self.record_settings(out_dir, search.folder, facts, SHARED_FACTS)

    def log_target(self, target):
        """Prints the size of a target and what is odd about it."""
        collection = target.collection
        notes = []
        if target.truncated:
            notes.append(f"{target.truncated:,} documents cut at {self.search_length} tokens")
        # The notes on the collection of the training pairs are printed already.
        if collection is not self.training_set.collection:
            notes += collection.notes
        n_validation = len(collection.qrels["validation"])
        n_test = len(collection.qrels["test"])
        log(
            f"{collection.name}: retrieval, {n_validation:,} validation and {n_test:,} test "
            f"queries, pool {target.pool} of {len(target.document_ids):,} documents",
            notes,
        )

    def facts_of(self, folder):
        """What every row of a folder of trials records about its target and the training."""
        target = self.targets[folder]
        source = self.training_set
        n = len(target.document_ids)
        return {
            "task": target.collection.name,
            "kind": "retrieval",
            "pool": target.pool,
            "documents": n,
            "train_on": source.collection.name,
            "steps": self.steps,
            "epochs": round(self.steps * self.c.batch / len(source.pairs), 3),
            "data": target.collection.fingerprint,
            "train_data": source.collection.fingerprint,
            "hard_negatives": target.hard_negatives,
            "truncated_frac": target.truncated / n,
            "baseline": target.baseline,
        }

    def evaluate(self, folder, trial, out_dir, secs):
        """Searches a target with the trained encoder and scores the ranking.

        secs: {"train": seconds}. -> the part of the row that holds scores and seconds
        """
        target = self.targets[folder]
        start_time = time.time()

        # Encode the pool and search it, in one pass.
        k = targets.DEPTH
        # [Q, k] each
        cosines, places = self.search(target.queries, target.documents, target.places, k, folder)
        ranking = targets.named_ranking(target, cosines, places)

        # Score the ranking, and keep each query's own score beside the row.
        split_scores = {}
        for split in ("validation", "test"):
            qrels = target.collection.qrels[split]
            split_scores[split] = targets.score(qrels, ranking, self.c.mode)
        row = {split: scores.means for split, scores in split_scores.items()}
        row["secs"] = secs | {"eval": round(time.time() - start_time, 2)}
        if self.processes.is_first:
            per_query = {}
            for split, scores in split_scores.items():
                per_query[split] = np.array(scores.per_query, np.float16)
            row["per_item"] = worker.save_example_scores(out_dir, trial, **per_query)

        validation = 100 * row["validation"]["score"]
        test = 100 * row["test"]["score"]
        text = f"{folder} lr {trial['lr']:g} seed {trial['seed']}: "
        measure = "the paper's NDCG@10" if self.c.mode == "paper" else "NDCG@10"
        text += f"{measure}: validation {validation:.2f}, test {test:.2f}"
        if target.baseline:
            text += f" (BM25 {100 * target.baseline['score']:.2f})"
        log(f"{text}, {secs['train'] + row['secs']['eval']:.1f} s")
        return row


def log(text, notes=()):
    """Prints a line and its notes, once per machine, without breaking a progress bar."""
    if shows_progress():
        tqdm.write("; ".join([text, *notes]))


# ---- the grid of trials

def check(c):
    """The searches that the settings ask for. -> [Search]

    Raises UserError if a setting is wrong. Reads no checkpoint and no collection for that.
    """
    searches = []
    for name in worker.check(c, registry.PAPER_IR, registry.DEMO_IR):
        task = registry.find(name, c.data_dir)
        if task.kind != "retrieval":
            raise UserError(
                f"{name} is not a retrieval collection: python finetune.py --tasks={name}"
            )
        pool = c.pool or task.pool
        train_on = c.train_on or task.train_on or name
        searches.append(Search(name, pool, task.pool, train_on))
    for search in searches:
        registry.find(search.train_on, c.data_dir)
    if c.pool not in ("", *POOLS):
        raise UserError(
            f"pool={c.pool}: expected {', '.join(POOLS)}, or nothing for each collection's own"
        )
    if c.finals and all(search.pool == "full" for search in searches):
        raise UserError(
            "finals=true repeats the best trials on the full corpus, and every search has that pool already"
        )
    if c.paper_encoding and c.mode != "paper":
        raise UserError("paper_encoding=true is to compare with the paper: expected mode=paper with it")
    if c.batch < 2:
        raise UserError(
            "batch=1: a query's negatives are the other pairs' documents, so expected at least 2"
        )
    return searches


def grid(searches, lrs, seeds):
    """The trials of some searches. Searches that train on the same pairs share a trial.

    -> [{"task": the first one's folder, "also": folders of the others, "lr", "seed"}]
    """
    folders_by_pairs = defaultdict(list)
    for search in searches:
        folders_by_pairs[search.train_on].append(search.folder)
    trials = []
    for folders in folders_by_pairs.values():
        for lr in lrs:
            for seed in seeds:
                trial = {"task": folders[0], "also": tuple(folders[1:]), "lr": lr, "seed": seed}
                trials.append(trial)
    return trials


def best_lr(out_dir, folder, c):
    """The learning rate with the best mean validation score in a finished grid.

    None if every trial failed.
    """
    scores = defaultdict(list)
    for lr in c.lrs:
        for seed in c.seeds:
            trial = {"task": folder, "lr": lr, "seed": seed}
            row = queue.read_row(out_dir, trial, worker.ROW_SHAPE)
            if row["validation"] is not None:
                scores[lr].append(row["validation"]["score"])
    return metrics.best_lr(scores) if scores else None


def run_grid(retriever, searches, lrs, seeds, out_dir):
    """Runs every trial that has no row yet."""
    by_folder = {search.folder: search for search in searches}
    settings = {s.folder: {"pool": s.pool, "train_on": s.train_on} for s in searches}
    retriever.refuse_other_settings(out_dir, settings)
    trials = grid(searches, lrs, seeds)

    # This process runs a trial alone: the queue shares out the trials among such processes.
    if retriever.processes.world_size == 1:
        queue.work(trials, out_dir, lambda trial: retriever.run(trial, out_dir, by_folder),
                   shape=worker.ROW_SHAPE)
        return

    # All processes together run each trial. The first decides whether it is still open, so that all
    # agree.
    is_first = retriever.processes.is_first
    for trial in trials:
        is_open = is_first and not queue.is_done(out_dir, trial, worker.ROW_SHAPE)
        if all_sum([is_open], retriever.processes)[0]:
            if is_first:
                queue.set_aside_damaged(out_dir, trial, worker.ROW_SHAPE)
            row = retriever.run(trial, out_dir, by_folder)
            if is_first:
                queue.finish(queue.path_of(out_dir, trial), row)
    all_sum([0], retriever.processes)      # no process continues before the last row is written


# ---- the program

def main(c):
    searches = check(c)
    keep_freed_memory()
    path = checkpoint.find(c.ckpt)
    processes = Processes(0, 0, 1)
    if c.shard:
        processes, _ = start_processes(pick_device(c.device))
    try:
        run_all(c, searches, path, processes)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_all(c, searches, path, processes):
    """Runs the grid, then with --finals its best learning rates on the full pools.

    With --mteb it scores the encoder on mteb's tasks instead.
    """
    if processes.world_size > 2 * c.batch:
        raise UserError(
            f"{processes.world_size} processes share {2 * c.batch} texts of a batch: "
            "start fewer, or without --shard"
        )
    out_dir = c.out_dir
    if not out_dir:
        out_dir = os.path.join(path, "random") if c.random_weights else path
    retriever = RetrievalWorker(c, path, processes)
    if c.mteb:
        score_on_mteb(retriever, c.mteb, out_dir)
        return

    run_grid(retriever, searches, c.lrs, c.seeds, out_dir)
    if c.finals:
        finals = defaultdict(list)   # {best learning rate: searches}
        for search in searches:
            lr = best_lr(out_dir, search.folder, c)
            if search.pool != "full" and lr is not None:
                finals[lr].append(replace(search, pool="full"))
        for lr, full_searches in finals.items():
            run_grid(retriever, full_searches, (lr,), c.seeds, out_dir)
    if shows_progress():
        report = shlex.join(["python", "report.py", out_dir, f"--to={out_dir}/report"])
        print(f"rows in {out_dir}/trials; the table: {report}")


if __name__ == "__main__":
    run(main, Config)
