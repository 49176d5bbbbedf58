"""A study folder of invented scores, as study.py leaves one: real files, no training."""
import hashlib
import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT

import report
from experiments import recipes

PAPER = os.path.join(ROOT, "results", "paper.csv")
TASKS = {"sst2": "sequence", "sotu_era": "sequence", "uner_en_ewt": "token", "squad": "span", "squad_retrieval": "retrieval"}
LRS, SEEDS, ITEMS, PER_STEP = (2e-5, 5e-5, 1e-4), (0, 1), 80, 2048
SCALE = 50              # a step of these runs stands for this many of the paper's
BOTH = ("610m-clm-42k", "610m-mlm40-42k")
NAMES = [f"{size}-{o}-42k" for size in ("210m", "610m") for o in ("clm", "mlm20", "mlm30", "mlm40", "mlm50")] + [
    f"{name}-seed{seed}" for name in BOTH for seed in (43, 44)] + [f"{name}-{step}" for name in BOTH for step in (1000, 5000, 20000)] + [
    "610m-mlm40-12k", "610m-clm-3k-mlm40-12k", "610m-clm-6k-mlm40-12k", "610m-clm-12k", "610m-clm-10k-mlm40-42k"] + [
    f"610m-clm-40k-mlm{rate}-42k" for rate in (20, 40)] + [
    f"610m-{o}-dec42k-mlm40-{total}k" for o in ("clm", "mlm40") for total in (44, 64)] + ["610m-mntp40-42k"]


def noise(*key):
    return np.random.default_rng(int(hashlib.sha256(repr(key).encode()).hexdigest()[:12], 16))


def ability(recipe, kind):
    """A made-up probability to be right: CLM learns early, MLM is better at the end, both together are best."""
    done, share = (recipe.step or recipe.steps) / 42_000, recipe.clm_share()
    late = 0.3 * min(done, 1.3) ** 0.5 * (1 - 0.35 * share + 0.3 * share * (1 - share)) + 0.12 * share * max(0, 1 - done)
    return 0.3 + late + 0.04 * (recipe.size == "610m") - 0.1 * (kind == "span") * share


def folder_of(name):
    """The folder of a model's checkpoint, within the study's."""
    recipe = recipes.parse(name)
    step = (recipe.step or recipe.steps - recipe.start) // SCALE
    return os.path.join(recipe.finished().name, f"step_{step:07d}")


def dump(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        json.dump(value, f)


def write(root, names=NAMES, tasks=tuple(TASKS), lrs=LRS, seeds=SEEDS, plan="toy", ability=ability):
    """Write a study of these models to the folder root: study.json, runs, states and trials. -> root"""
    for name in names:
        recipe, folder = recipes.parse(name), os.path.join(root, folder_of(name))
        steps = (recipe.step or recipe.steps) // SCALE
        targets = sum(PER_STEP * (1 if recipe.objective_at(s * SCALE) == "clm" else 0.4) for s in range(steps))
        state = {"totals": {"tokens": steps * PER_STEP, "targets": int(targets), "flops": steps * 10 ** 12, "seconds": steps / 10},
                 "settings": {"batch_rows": 8, "block_size": 256}}
        dump(os.path.join(folder, "state.json"), state)
        if not recipe.step:
            run(os.path.dirname(folder), recipe, state["settings"])
        for task in tasks:
            base = ability(recipe, TASKS[task])
            for lr in lrs:
                for seed in seeds:
                    trial(folder, name, task, lr, seed, base - 0.1 * abs(np.log2(lr / 5e-5)) / 3 + noise(name, task, seed).normal(0, 0.01))
    dump(os.path.join(root, "study.json"), {"plan": plan, "scale": {"steps": SCALE}, "code": "abc", "models": {
        name: {"folder": folder_of(name)} for name in names}})
    return root


def run(folder, recipe, settings):
    """Write a run's config.json and log.jsonl. In continued pretraining steps count from 0 again, totals do not."""
    before = recipe.start // SCALE
    steps = (recipe.steps - recipe.start) // SCALE
    parent_folder = ""
    if recipe.start:
        parent_folder = os.path.join(os.path.dirname(folder), folder_of(recipe.parent_name))
    dump(os.path.join(folder, "config.json"), {"settings": settings, "parent": parent_folder, "start_step": 0})
    with open(os.path.join(folder, "log.jsonl"), "w") as f:
        for step in range(1, steps + 1):
            objective = recipe.objective_at((before + step) * SCALE - 1)
            row = {"step": step, "phase": objective[:3], "tokens": (before + step) * PER_STEP}
            loss = 4 + 5 / (before + step) ** 0.5 + 0.5 * (objective != "clm")
            f.write(json.dumps(row | {"loss": loss + noise(recipe.name, step).normal(0, 0.05)}) + "\n")
            if step % 100 == 0:
                f.write(json.dumps(row | {"val_mlm_loss": loss + 0.2, "val_clm_loss": loss + 0.1}) + "\n")


def trial(folder, name, task, lr, seed, p, **changes):
    """Write one trial's row and the scores of its examples. p: how often it is right. -> the row's path"""
    path = os.path.join(folder, "trials", task, f"lr{lr:.0e}_sd{seed}.json")
    hard = noise(task).random(ITEMS)
    right = (hard + noise(name, task, seed, lr).normal(0, 0.05, ITEMS) < p).astype(np.float16)
    row = {"model": f"{os.path.basename(os.path.dirname(folder))}-1", "task": task, "kind": TASKS[task], "lr": lr, "seed": seed,
           "validation": {"score": p}, "test": {"score": float(right.mean()), "n": ITEMS}, "failed": False, "mode": "standard",
           "param_dtype": "float32", "dtype": "bfloat16", "device": "cpu", "torch": "2.13.0", "code": "abc", "steps": 40, "data": f"of {task}",
           "per_item": os.path.basename(path)[:-5] + ".npz", "train_loss": [[4, 1.0]]} | (
        {"pool": "full", "documents": 99, "train_on": task} if TASKS[task] == "retrieval" else {}) | changes
    dump(path, row)
    np.savez_compressed(path[:-5] + ".npz", validation=right, test=right)
    return path


def draw(*args, to):
    """Run report.py in this process. Its pictures are drawn but saved empty: rasterizing takes the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt.Figure, "savefig", lambda figure, file, **_: None)
        report.main(report.Config(args, to))
