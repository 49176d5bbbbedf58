"""Fine-tune an encoder for retrieval, search with it, and score the ranking: every collection, learning rate and seed.

    python eval_ir.py --ckpt=runs/demo/clm_then_mlm config/retrieval_quick.py            # a minute, no network
    python eval_ir.py --ckpt=RUN --tasks=squad_retrieval --data_dir=FOLDER               # a folder in BEIR's layout
    torchrun --nproc_per_node=8 eval_ir.py --ckpt=RUN --tasks=all                        # MS MARCO, NQ, MLDR: 8 GPUs share the grid
    torchrun --nproc_per_node=8 eval_ir.py --ckpt=RUN --tasks=all --finals=true --shard=true    # and the whole corpora, together
    python report.py RUN --to=RUN/report                                                 # the table

Training is the paper's (arXiv 2507.00994, section 4): pairs of a query and a document that answers it, an embedding is the mean of
the last hidden states, and of a batch's documents the query must find its own (InfoNCE over cosines at temperature 0.05). Then
every document of a pool is encoded and searched exactly. Rows, seeds and the queue are finetune.py's:
OUT_DIR/trials/<task>/lr<lr>_sd<seed>.json. What a pool is, and how to bring your own collection: ir_data.py.
"""
import json
import os
import shlex
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from core import checkpoint
from core.configurator import UserError, run
from core.device import keep_freed_memory, pick_device
from core.distributed import Processes, all_sum, speaks, start_processes
from core.tokenizer import DOCUMENT, QUERY
from retrieval import collections as ir_data
from retrieval import retriever, tokens
from retrieval.mteb_adapter import on_mteb
from retrieval.pools import BM25_LIMIT, bm25, pool_of, training_pairs
from retrieval.targets import Target
from tasks import metrics, queue, registry, worker
from tasks.training import Diverged

DEPTH = 100           # documents kept for each query
POOLS = ("judged", "hard", "full")


@dataclass
class Config:
    # what
    ckpt: str = ""                  # RUN/step_NNNNNNN, or RUN for its newest one
    tasks: str = "demo"             # names with commas between them, all (the paper's three) or demo
    data_dir: str = ""              # local collections instead of the hub: data_dir/<task>/{corpus.jsonl,queries.jsonl,qrels/}
    out_dir: str = ""               # where trials/ is written; the checkpoint's folder if empty
    lrs: tuple = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)   # peak learning rates, the paper's six
    seeds: tuple = (0, 1, 2, 3, 4)  # of the order of the pairs, and of nothing else
    random_weights: bool = False    # the same model from random weights: what pretraining is worth
    train_on: str = ""              # whose training pairs; empty: MS MARCO's for the paper's three, else each collection its own
    pool: str = ""                  # what is searched: judged, hard or full; empty: judged (paper, demo), full (your own)
    hard_negatives: int = 100       # BM25's best documents for each query that are in the pool "hard"
    finals: bool = False            # then the best learning rate's seeds again on the full pool
    keep: bool = False              # keep each trial's encoder as a checkpoint beside its row
    mteb: str = ""                  # no training: the encoder as it is on tasks of the package mteb, as in NFCorpus,SciFact
    # how
    mode: str = "standard"          # standard: NDCG@10; paper: its own score, and known positives of a query among its negatives
    steps: int = 0                  # of each trial; 0: 1,000, the paper's
    batch: int = 32                 # pairs in a step; each query's negatives are the other documents
    temperature: float = 0.05       # of InfoNCE
    warmup: float = 0.1             # share of the steps
    beta1: float = 0.9              # AdamW
    beta2: float = 0.95             # AdamW
    adam_eps: float = 1e-5          # AdamW
    weight_decay: float = 0.1       # on matrices, not on norms and biases
    grad_clip: float = 1.0          # global norm; 0: no clipping
    max_length: int = 0             # tokens of a sequence; 0: 0.99 of what the encoder was trained on (2,028 of 2,048)
    causal: bool = False            # keep the causal mask, as an ablation
    param_dtype: str = "float32"    # of weights and AdamW's moments; bfloat16: the paper's, which loses small updates
    # system
    device: str = "auto"            # cuda where there is one, else cpu
    dtype: str = "auto"             # bfloat16 (autocast) where it is fast, else float32; similarities are float32 in any case
    attention: str = "auto"         # triton or varlen (CUDA), sdpa (anywhere) or reference
    micro_tokens: int = 16_384      # tokens in a forward and backward pass; a batch beyond it is computed twice, with the same loss
    eval_tokens: int = 0            # tokens in a forward pass of encoding; 0: 8,192 on a CPU, 65,536 on a GPU
    cache_dir: str = "data/tasks"   # tokenized collections, and what BM25 found
    shard: bool = False             # torchrun's processes share each trial, its batches and its corpus, instead of the grid


FACTS = "data", "steps", "train_on", "train_data", "pool", "hard_negatives"       # which rows of one folder share
FREE = (*worker.FREE, "train_on", "pool", "hard_negatives", "finals", "mteb", "shard")


class Worker(retriever.Retriever):
    """Runs trials: trains on the pairs at hand and searches the collections that are scored after them."""

    def __init__(self, c, path, processes):
        super().__init__(c, path, processes, FREE)
        self.source, self.pairs, self.targets = None, None, {}
        self.steps = c.steps or 1000

    def in_turn(self, make):
        """make() where it may write to the cache: by the first process, then by those that share its trials and find it there."""
        found = make() if self.processes.first else None
        all_sum([0], self.processes)
        return found if self.processes.first else make()

    def tokens(self, name, texts, *key):
        return self.in_turn(lambda: tokens.encoded(name, texts, self.tokenizer, self.max_length, (QUERY, DOCUMENT, *key),
                                                    self.c.cache_dir))

    def take(self, train_on, wanted, folder):
        """Read and tokenize what a trial trains on and is scored by, unless it is at hand. wanted: {folder name: (task, pool)}"""
        if not self.source or self.source.name != train_on:
            self.source = ir_data.load(train_on, self.c.data_dir)
            queries, documents, pairs, known = training_pairs(self.source)
            n, texts = len(queries), [QUERY + text for text in queries] + [DOCUMENT + text for text in documents]
            encoded, _ = self.tokens(f"{train_on}-pairs", lambda: enumerate(texts), self.source.fingerprint)
            self.pairs = encoded, pairs + [0, n], [{n + d for d in found} for found in known]      # places in encoded
            say(f"{train_on}: {len(pairs):,} training pairs, {self.steps} steps of {self.c.batch}", self.source.notes)
        for name, (task, pool) in wanted.items():
            if name not in self.targets:
                self.targets[name] = self.target(task, pool)
            self.settle(folder, name, self.targets[name].facts, FACTS)

    def target(self, name, pool):
        """Read and tokenize a collection's queries and the documents of a pool. -> Target"""
        c, source = self.c, self.source
        collection = source if name == source.name else ir_data.load(name, c.data_dir)
        chosen = self.in_turn(lambda: pool_of(collection, pool, c.hard_negatives, c.cache_dir))
        asked = dict.fromkeys(q for split in ("validation", "test") for q in collection.qrels[split] if q in collection.queries)
        queries, query_ids = self.tokens(f"{name}-queries", lambda: ((q, QUERY + collection.queries[q]) for q in asked),
                                         collection.fingerprint)
        hard = c.hard_negatives if pool == "hard" else None
        documents, ids = self.tokens(f"{name}-{pool}", lambda: ((id_, DOCUMENT + text) for id_, text in collection.documents()
                                                                if chosen is None or id_ in chosen), collection.fingerprint, hard)
        if not ids or not asked:
            raise UserError(f"{name}: no {'document of the pool ' + pool if asked else 'judged query'} is in the collection")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rank = torch.empty(len(ids), dtype=torch.int64)
        rank[torch.tensor(order)] = torch.arange(len(ids))
        cut = int(documents["truncated"][0])
        facts = {"task": name, "kind": "retrieval", "pool": pool, "documents": len(ids), "train_on": source.name,
                 "steps": self.steps, "epochs": round(self.steps * c.batch / len(self.pairs[1]), 3),
                 "data": collection.fingerprint, "train_data": source.fingerprint, "hard_negatives": hard,
                 "truncated_frac": cut / len(ids), "baseline": self.baseline(collection, chosen, len(ids))}
        notes = [f"{cut:,} documents cut at {self.max_length} tokens"] * (cut > 0) + collection.notes * (collection is not source)
        of = " and ".join(f"{len(collection.qrels[split]):,} {split}" for split in ("validation", "test"))
        say(f"{name}: retrieval, {of} queries, pool {pool} of {len(ids):,} documents", notes)
        return Target(collection, queries, query_ids, documents, [ids[i] for i in order], rank, facts)

    def baseline(self, collection, chosen, n):
        """What BM25 scores on the test queries in the same pool. -> {"name", "score"}, or None where it takes too long"""
        if n > BM25_LIMIT or not self.processes.first:
            return None
        qrels = collection.qrels["test"]
        return {"name": "BM25", "score": self.score(qrels, bm25(collection, list(qrels), chosen, DEPTH))[0]["score"]}

    def score(self, qrels, found):
        """-> {"score", ...}: means over all queries of the qrels; each query's own score"""
        of = {"ndcg_10": metrics.ndcg(qrels, found), "paper_ndcg_10": metrics.ndcg_of_retrieved(qrels, found),
              "mrr_10": metrics.mrr(qrels, found), "recall_100": metrics.recall(qrels, found)}
        items = list(of["paper_ndcg_10" if self.c.mode == "paper" else "ndcg_10"].values())
        return {"score": sum(items) / len(items)} | {k: sum(v.values()) / len(v) for k, v in of.items()} | {"n": len(items)}, items

    def run(self, trial, folder, where):
        """Train once and score those of the trial's tasks that have no row. where: {folder name: (task, pool, train_on)}
        -> the row of trial["task"]; those of trial["also"] are written here"""
        names = [trial["task"], *trial.get("also", ())]
        todo = [name for name in names if not queue.is_done(folder, {**trial, "task": name, "also": ()})]
        self.take(where[names[0]][2], {name: where[name][:2] for name in names}, folder)
        began, what = time.time(), f"{self.source.name} lr {trial['lr']:g} seed {trial['seed']}"
        row = self.facts | {"lr": trial["lr"], "seed": trial["seed"], "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        self.restore(trial["seed"])
        try:
            row["train_loss"] = self.train(self.pairs, self.steps, trial, what)
            row |= {"failed": False, "secs": {"train": round(time.time() - began, 2)}}
        except Diverged as error:
            say(f"{what}: failed, {error}", [])
            row |= {"failed": True, "why": str(error), "validation": None, "test": None}
        if self.c.keep and not row["failed"] and self.processes.first:
            self.keep(folder, trial, row | {k: self.targets[names[0]].facts[k] for k in ("task", "kind", "steps")})
        for name in reversed(todo):            # trial["task"] is last, its row is work()'s to write
            own = trial | {"task": name}
            found = row | self.targets[name].facts | ({} if row["failed"] else self.evaluate(name, own, folder, row["secs"]))
            if name == trial["task"]:
                return found
            if self.processes.first:
                queue.finish(queue.path_of(folder, own), found)
        return row                             # trial["task"] has its row already, which stays

    def evaluate(self, name, trial, folder, secs):
        """Search a target with the encoder as it is. -> what the trial's row says of it"""
        t, began = self.targets[name], time.time()
        scores, ids = (found.tolist() for found in self.search(t.queries, t.documents, t.rank, DEPTH, name))
        found = {q: {t.ids[d]: s for d, s in zip(*row) if d >= 0} for q, *row in zip(t.query_ids, ids, scores)}
        parts = {split: self.score(t.collection.qrels[split], found) for split in ("validation", "test")}
        row = {split: means for split, (means, _) in parts.items()}
        row["secs"] = secs | {"eval": round(time.time() - began, 2)}
        if self.processes.first:
            items = {split: np.array(own, np.float16) for split, (_, own) in parts.items()}
            row["per_item"] = worker.keep_items(folder, trial, **items)
        baseline = t.facts["baseline"]
        say(f"{name} lr {trial['lr']:g} seed {trial['seed']}: NDCG@10 validation {100 * row['validation']['score']:.2f}, test "
            f"{100 * row['test']['score']:.2f}" + (f" (BM25 {100 * baseline['score']:.2f})" if baseline else "")
            + f", {secs['train'] + row['secs']['eval']:.1f} s", [])
        return row


def say(text, notes):
    if speaks():
        tqdm.write("; ".join([text, *notes]))


# ---- the grid

def check(c):
    """Raises UserError for what is wrong with the settings alone. -> {task: (Task, pool, train_on)}"""
    found = {}
    for name in worker.check(c, registry.PAPER_IR, registry.DEMO_IR):
        task = registry.find(name, c.data_dir)
        if task.kind != "retrieval":
            raise UserError(f"{name} is no retrieval collection: python finetune.py --tasks={name}")
        found[name] = task, c.pool or task.pool, c.train_on or task.train_on or name
    for train_on in {train_on for *_, train_on in found.values()}:
        registry.find(train_on, c.data_dir)
    if c.pool not in ("", *POOLS):
        raise UserError(f"pool={c.pool}: expected {', '.join(POOLS)}, or nothing for each collection's own")
    if not 0 < c.temperature < float("inf") or c.hard_negatives < 1:
        raise UserError(f"temperature={c.temperature}, hard_negatives={c.hard_negatives}: expected numbers above 0")
    if c.finals and all(pool == "full" for _, pool, _ in found.values()):
        raise UserError("finals=true is for pools that are not the full corpus: it is searched in full already")
    if c.batch < 2:
        raise UserError("batch=1: a query's negatives are the other pairs' documents, so expected at least 2")
    return found


def folder_of(name, task, pool):
    """A task's folder under trials/: its pool is in the name unless it is the task's own."""
    return name if pool == task.pool else f"{name}-{pool}"


def grid(where, lrs, seeds):
    """Trials of tasks that train on the same pairs are one training. where: {folder name: (task, pool, train_on)}"""
    by_source = defaultdict(list)
    for name, (*_, train_on) in where.items():
        by_source[train_on].append(name)
    return [{"task": names[0], "also": tuple(names[1:]), "lr": lr, "seed": seed}
            for names in by_source.values() for lr in lrs for seed in seeds]


def chosen_lr(folder, name, c):
    """The learning rate of the best mean validation score of a finished grid, or None if every trial failed."""
    scores = defaultdict(list)
    for lr in c.lrs:
        for seed in c.seeds:
            with open(queue.path_of(folder, {"task": name, "lr": lr, "seed": seed}), encoding="utf-8") as f:
                row = json.load(f)
            if not row["failed"]:
                scores[lr].append(row["validation"]["score"])
    return metrics.best_lr(scores) if scores else None


def work(mine, todo, folder, where):
    """Run a list of trials: from the queue, or all of them together."""
    mine.refuse_other_settings(folder, {name: {"pool": pool, "train_on": train_on} for name, (_, pool, train_on) in where.items()})
    if mine.processes.world_size == 1:
        return queue.work(todo, folder, lambda trial: mine.run(trial, folder, where))
    for trial in todo:
        if all_sum([mine.processes.first and not queue.is_done(folder, trial)], mine.processes)[0]:
            row = mine.run(trial, folder, where)
            if mine.processes.first:
                queue.finish(queue.path_of(folder, trial), row)
    all_sum([0], mine.processes)      # the last row is there before anybody goes on
    return None


def main(c):
    wanted = check(c)
    keep_freed_memory()
    path = checkpoint.find(c.ckpt)
    processes = start_processes(pick_device(c.device))[0] if c.shard else Processes(0, 0, 1)
    try:
        run_grids(c, wanted, path, processes)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_grids(c, wanted, path, processes):
    """The grid, and with --finals its best learning rates on the full pools; or --mteb."""
    if processes.world_size > 2 * c.batch:
        raise UserError(f"{processes.world_size} processes share {2 * c.batch} texts of a batch: start fewer, or without --shard")
    folder = c.out_dir or (os.path.join(path, "random") if c.random_weights else path)
    mine = Worker(c, path, processes)
    if c.mteb:
        return on_mteb(mine, folder)
    where = {folder_of(name, task, pool): (name, pool, train_on) for name, (task, pool, train_on) in wanted.items()}
    work(mine, grid(where, c.lrs, c.seeds), folder, where)
    if c.finals:
        by_lr = defaultdict(dict)
        for name, (task, pool, train_on) in wanted.items():
            lr = chosen_lr(folder, folder_of(name, task, pool), c)
            if pool != "full" and lr is not None:
                by_lr[lr][folder_of(name, task, "full")] = name, "full", train_on
        for lr, where in by_lr.items():
            work(mine, grid(where, (lr,), c.seeds), folder, where)
    if speaks():
        report = shlex.join(["python", "report.py", folder, f"--to={folder}/report"])
        print(f"rows in {folder}/trials; the table: {report}")


if __name__ == "__main__":
    run(main, Config)
