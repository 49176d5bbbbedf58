"""eval_ir.py as its users run it: grids, pools, finals, processes that share a trial, and the table."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, needs_shared, run_python
from speech_collections import collection

import eval_ir
import finetune
from core import checkpoint
from core.configurator import UserError
from core.distributed import Processes
from core.files import find_files
from core.schema import read_json
from reporting.read import read_trials
from reporting.tables import trial_table
from tasks import queue

ALONE = Processes(0, 0, 1)


def words(c, script="eval_ir.py"):
    default = eval_ir.Config()
    return [script, *(f"--{k}={v}" for k, v in vars(c).items() if v != getattr(default, k))]


def rows(folder):
    """{file name below trials/: row}, without times."""
    rows_by_name = {}
    for path in find_files(folder, "trials/*/lr*.json"):
        row = read_json(path)
        del row["time"]
        row.pop("secs", None)
        rows_by_name[os.path.relpath(path, os.path.join(folder, "trials"))] = row
    return rows_by_name


def worker(c):
    retriever = eval_ir.RetrievalWorker(c, checkpoint.find(c.ckpt), ALONE)
    retriever.load([eval_ir.Search(task=c.tasks, pool="full", usual_pool="full", train_on=c.tasks)], c.out_dir)
    retriever.restore(0)
    return retriever


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_that_share_a_trial_are_one(ir, one_thread):
    """Batches, gradients, encoding and search over two ranks: losses and weights of one process. Where the weights are the same to
    the bit, at a learning rate of nothing, all scores are; texts are encoded one by one, so that rounding has no say in it."""
    same = dict(tasks="one,two", train_on="one", lrs=(1e-3, 1e-20), eval_tokens=1, keep=True)
    alone = ir("alone", **same)
    both = ir("both", shard=True, **same)
    eval_ir.main(alone)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *words(both)], cwd=ROOT,
                          capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows_alone = rows(alone.out_dir)
    rows_both = rows(both.out_dir)
    assert rows_alone.keys() == rows_both.keys() and len(rows_alone) == 4
    for name, row in rows_alone.items():
        losses = [loss for _, loss in row.pop("train_loss")]
        losses_both = [loss for _, loss in rows_both[name].pop("train_loss")]
        assert losses == pytest.approx(losses_both, abs=1e-5)
        if "1e-20" in name:
            assert row == rows_both[name]
    before = checkpoint.load_model(alone.ckpt).state_dict()
    weights = [checkpoint.load_model(os.path.join(c.out_dir, "trials", "one", "lr1e-03_sd0.encoder")).state_dict() for c in (alone, both)]
    moved = max((weights[0][k] - before[k]).abs().max() for k in before)
    assert moved > 1e-3 and all((weights[0][k] - weights[1][k]).abs().max() < 0.01 * moved for k in before)


def test_the_demo_from_a_checkpoint_to_a_table(ir, tmp_path):
    """A real process, no network: rows with all they need, every query's own score, and both tables."""
    c = ir(tasks="demo", data_dir="", seeds=(0, 1), steps=3)
    done = run_python(words(c), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sotu_search: retrieval, 200 validation and 300 test queries, pool judged of 500 documents" in done.stdout + done.stderr
    found_rows = rows(c.out_dir)
    assert len(found_rows) == 2
    for name, row in found_rows.items():
        assert row["model"] == "clm_then_mlm-40" and row["pool"] == "judged" and row["train_on"] == "sotu_search" and not row["failed"]
        assert row["documents"] == 500 and row["test"]["n"] == 300 and row["baseline"]["name"] == "BM25" and row["steps"] == 3
        test = row["test"]
        # one positive a query; an encoder this young has tied scores, which the paper's variant shares out
        assert test["score"] == test["ndcg_10"] == pytest.approx(test["paper_ndcg_10"], abs=2e-3) and 0 < test["mrr_10"] < test["recall_100"]
        items = np.load(os.path.join(c.out_dir, "trials", name)[:-4] + "npz")
        assert items["validation"].shape == (200,) and items["test"].mean(dtype=np.float64) == pytest.approx(test["score"], abs=1e-3)
    done = run_python(["report.py", c.out_dir, f"--to={tmp_path}/report"])
    assert done.returncode == 0, done.stderr
    assert "| sotu_search, judged pool | clm_then_mlm-40 |" in done.stdout and "(BM25)" in done.stdout
    assert "| collection, pool | model | documents | queries | NDCG@10 | the paper's NDCG@10 | MRR@10 | Recall@100 |" in done.stdout


def test_the_same_twice_is_the_same_to_the_bit_and_a_seed_is_an_order(ir):
    once = ir("once", seeds=(0, 1))
    again = ir("again", seeds=(1, 0))
    eval_ir.main(once)
    eval_ir.main(again)
    assert rows(once.out_dir) == rows(again.out_dir) and len(rows(once.out_dir)) == 2
    first, second = (row["train_loss"] for row in rows(once.out_dir).values())
    assert first != second


def test_training_lowers_the_loss_and_finds_what_it_was_trained_on(ir, collections, tmp_path):
    folder = tmp_path / "same" / "one"
    shutil.copytree(os.path.join(collections, "one"), folder)
    for split in ("validation", "test"):
        shutil.copy(folder / "qrels" / "train.tsv", folder / "qrels" / f"{split}.tsv")
    c = ir(data_dir=str(tmp_path / "same"), steps=60, batch=16, lrs=(5e-3, 1e-9))
    eval_ir.main(c)
    found_rows = rows(c.out_dir)
    trained, untrained = found_rows["one/lr5e-03_sd0.json"], found_rows["one/lr1e-09_sd0.json"]
    assert trained["train_loss"][-1][1] < trained["train_loss"][0][1] - 0.5
    assert trained["test"] == trained["validation"] and trained["test"]["score"] > untrained["test"]["score"] + 0.1


def test_a_grad_clip_of_0_is_no_clipping(ir):
    settings = dict(lrs=(5e-3,), steps=30, batch=16)
    off = ir("off", grad_clip=0.0, **settings)
    far_away = ir("far_away", grad_clip=1e9, **settings)
    eval_ir.main(off)
    eval_ir.main(far_away)
    row, = rows(off.out_dir).values()
    assert rows(off.out_dir) == rows(far_away.out_dir) and row["train_loss"][-1][1] < row["train_loss"][0][1] - 0.2


def test_tasks_that_share_their_pairs_share_a_training(ir):
    """The row of a task is the same alone, beside another, and when the other is added later."""
    both = ir("both", tasks="one,two", train_on="one")
    later = ir("later", tasks="one", train_on="one")
    eval_ir.main(both)
    eval_ir.main(later)
    assert len(rows(later.out_dir)) == 1
    scores = os.path.join(later.out_dir, "trials", "one", "lr1e-03_sd0.npz")
    before = os.stat(scores).st_mtime_ns
    eval_ir.main(ir("later", tasks="one,two", train_on="one"))
    assert os.stat(scores).st_mtime_ns == before                  # what has a row is not searched again
    assert rows(both.out_dir) == rows(later.out_dir) and len(rows(both.out_dir)) == 2
    row = rows(both.out_dir)["two/lr1e-03_sd0.json"]
    assert (row["task"], row["train_on"], row["test"]["n"]) == ("two", "one", 20)
    table = trial_table(list(read_trials(both.out_dir).values()))
    assert "| two, full pool | clm_then_mlm-40 (trained on one) |" in table and "| one, full pool | clm_then_mlm-40 |" in table


def test_pools_have_folders_rows_and_table_lines_of_their_own_and_distractors_only_push_down(ir):
    for pool in ("judged", "hard", ""):
        eval_ir.main(ir(pool=pool, hard_negatives=2))
    found_rows = rows(ir().out_dir)
    assert set(found_rows) == {f"{name}/lr1e-03_sd0.json" for name in ("one", "one-hard", "one-judged")}
    judged, hard, full = (found_rows[f"{name}/lr1e-03_sd0.json"] for name in ("one-judged", "one-hard", "one"))
    assert [row["pool"] for row in (judged, hard, full)] == ["judged", "hard", "full"]
    assert judged["documents"] < hard["documents"] < full["documents"] == 120
    in_judged, in_hard, in_full = (np.load(os.path.join(ir().out_dir, "trials", name, "lr1e-03_sd0.npz"))["test"]
                                   for name in ("one-judged", "one-hard", "one"))
    assert (in_judged >= in_hard).all() and (in_hard >= in_full).all() and in_judged.sum() > in_full.sum()
    table = trial_table(list(read_trials(ir().out_dir).values()))
    assert all(f"| one, {pool} pool |" in table for pool in ("judged", "hard", "full"))
    with pytest.raises(UserError, match=r"one-hard holds trials of other settings \(hard_negatives: 2 then, 3 now\)"):
        eval_ir.main(ir(pool="hard", hard_negatives=3, seeds=(1,)))


def test_finals_search_the_full_corpus_for_the_best_learning_rate_alone(ir):
    c = ir(pool="judged", lrs=(1e-9, 3e-3), seeds=(0, 1), steps=40, finals=True)
    eval_ir.main(c)
    found_rows = rows(c.out_dir)
    grid = [row for name, row in found_rows.items() if name.startswith("one-judged/")]
    means = {}
    for lr in c.lrs:
        means[lr] = np.mean([row["validation"]["score"] for row in grid if row["lr"] == lr])
    best = max(means, key=means.get)
    finals = {name: row for name, row in found_rows.items() if name.startswith("one/")}
    assert len(grid) == 4 and {(row["lr"], row["seed"]) for row in finals.values()} == {(best, 0), (best, 1)}
    for row in finals.values():        # the same training, more documents
        twin = next(r for r in grid if (r["lr"], r["seed"]) == (row["lr"], row["seed"]))
        assert row["train_loss"] == twin["train_loss"] and row["pool"] == "full" and row["test"]["score"] <= twin["test"]["score"]


def test_a_trial_that_diverges_is_a_failed_row_of_every_task(ir):
    c = ir(tasks="one,two", train_on="one", lrs=(1e30, 1e-3))
    eval_ir.main(c)
    found_rows = rows(c.out_dir)
    assert len(found_rows) == 4
    for name, row in found_rows.items():
        assert row["failed"] == ("1e+30" in name) and (row["test"] is None) == row["failed"] and row["pool"] == "full"


def test_rows_of_before_paper_encoding_are_not_mixed_with_it(ir):
    eval_ir.main(ir(mode="paper"))
    path = os.path.join(ir().out_dir, "trials", "one", "settings.json")
    with open(path) as f:
        settings = json.load(f)
    del settings["paper_encoding"]
    with open(path, "w") as f:
        json.dump(settings, f)
    eval_ir.main(ir(mode="paper"))
    with pytest.raises(UserError, match=r"other settings \(paper_encoding: False then, True now\)"):
        eval_ir.main(ir(mode="paper", paper_encoding=True))


def test_a_row_is_done_when_the_tasks_beside_it_are(tmp_path):
    trial = {"task": "a", "also": ("b",), "lr": 1e-3, "seed": 0}
    for task, done in (("a", False), ("b", True)):
        path = queue.path_of(str(tmp_path), trial | {"task": task})
        os.makedirs(os.path.dirname(path))
        queue.finish(path, {})
        assert queue.is_done(str(tmp_path), trial) == done
    assert queue.is_done(str(tmp_path), {"task": "a", "lr": 1e-3, "seed": 0})


def test_a_kept_encoder_is_a_checkpoint_that_finds_the_same(ir):
    c = ir(keep=True, steps=20)
    eval_ir.main(c)
    row, = rows(c.out_dir).values()
    kept = os.path.join(c.out_dir, "trials", "one", "lr1e-03_sd0.encoder")
    again = worker(ir("again", ckpt=kept))
    assert again.evaluate("one", {"task": "one", "lr": 1e-3, "seed": 0}, c.out_dir, {"train": 0})["test"] == row["test"]
    before = worker(ir("before"))
    assert not torch.equal(before.encoder.embedding.weight, again.encoder.embedding.weight)


def test_finished_trials_stay_and_other_settings_are_refused_by_name(ir):
    c = ir()
    eval_ir.main(c)
    before = rows(c.out_dir)
    eval_ir.main(ir(seeds=(0, 1)))
    assert len(rows(c.out_dir)) == 2 and before.items() <= rows(c.out_dir).items()
    for changes, message in (({"temperature": 0.1}, "temperature: 0.05 then, 0.1 now"), ({"train_on": "two"}, "train_on: one then, two now"),
                          ({"mode": "paper"}, "mode: standard then, paper now")):
        with pytest.raises(UserError, match=f"holds trials of other settings.*{message}"):
            eval_ir.main(ir(**changes))


def test_the_papers_mode_scores_and_trains_as_its_code_does(ir):
    c = ir("paper", mode="paper")
    eval_ir.main(c)
    row, = rows(c.out_dir).values()
    assert row["test"]["score"] == row["test"]["paper_ndcg_10"] > row["test"]["ndcg_10"]      # one of two positives found
    assert row["mode"] == "paper"
    standard = ir("standard")
    eval_ir.main(standard)
    standard_row, = rows(standard.out_dir).values()
    assert standard_row["test"]["score"] == standard_row["test"]["ndcg_10"] and standard_row["train_loss"] != row["train_loss"]


def test_the_papers_encoding_searches_other_tokens_after_the_same_training(ir):
    rows_of = []
    for name, is_paper in (("closed", False), ("open", True)):
        settings = ir(name, mode="paper", paper_encoding=is_paper)
        eval_ir.main(settings)
        rows_of.append(next(iter(rows(settings.out_dir).values())))
    assert rows_of[0]["train_loss"] == rows_of[1]["train_loss"] and rows_of[0]["test"] != rows_of[1]["test"]
    with pytest.raises(UserError, match="holds trials of other settings .*paper_encoding"):
        eval_ir.main(ir("closed", mode="paper", paper_encoding=True))


def test_the_grid_is_finetunes():
    of_retrieval, of_finetuning = (vars(module.Config()) for module in (eval_ir, finetune))
    shared = of_retrieval.keys() & of_finetuning.keys() - {"eval_tokens", "data_dir"}
    assert len(shared) > 15
    assert {key: of_retrieval[key] for key in shared} == {key: of_finetuning[key] for key in shared}


# ---- wrong calls

@pytest.mark.parametrize("changes, message", [
    ({"tasks": "rivers"}, "unknown task 'rivers'"),
    ({"tasks": "sotu_era"}, "sotu_era is not a retrieval collection: python finetune.py --tasks=sotu_era"),
    ({"pool": "half"}, "pool=half: expected judged, hard, full"),
    ({"paper_encoding": True}, "expected mode=paper with it"),
    ({"batch": 1}, "batch=1: a query's negatives are the other pairs' documents"),
    ({"finals": True}, "every search has that pool already"),
    ({"train_on": "nothing"}, "unknown task 'nothing'"),
    ({"data_dir": "", "tasks": "nq"}, "from the Hugging Face hub"),
    ({"ckpt": "nowhere"}, "no checkpoint at nowhere"),
    ({"lrs": ()}, "tasks, lrs and seeds need at least one value each"),
])
def test_a_wrong_call_is_explained_in_one_line(ir, changes, message):
    with pytest.raises(UserError) as error:
        eval_ir.main(ir(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_collection_that_cannot_be_searched_is_one_line_and_exit_2(ir, tmp_path):
    folder = collection(tmp_path / "bad", documents=[])
    done = run_python(words(ir(tasks="rivers", data_dir=folder)))
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: rivers has no documents: an empty collection cannot be searched"


def test_finetune_sends_retrieval_here(ir):
    done = run_python(["finetune.py", f"--ckpt={ir().ckpt}", "--tasks=sotu_search"])
    assert done.returncode == 2 and "sotu_search is a retrieval collection: python eval_ir.py --tasks=sotu_search" in done.stderr


@needs_shared
def test_a_real_graded_collection_from_end_to_end(ir):
    c = ir(tasks="cranfield", data_dir=SHARED, steps=2)
    eval_ir.main(c)
    row, = rows(c.out_dir).values()
    assert row["documents"] == 1400 and row["test"]["n"] == 100 and row["validation"]["n"] == 25
    assert row["baseline"]["score"] == pytest.approx(0.340, abs=5e-4) and row["test"]["paper_ndcg_10"] >= row["test"]["ndcg_10"]
