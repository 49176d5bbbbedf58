"""eval_ir.py as its users run it: one loss however it is cut, embeddings that depend on their text alone, pools, and the table."""
import glob
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, needs_shared, run_python
from test_ir_data import collection

import checkpoint
import demo_tasks
import encode
import eval_ir
import ir_data
import report
import retriever
import system
import trials
from configurator import UserError

ALONE = system.Processes(0, 0, 1)


def speeches(folder, name, start=0, **sizes):
    """A small collection of real text in BEIR's layout: a sentence asks for its paragraph, and every other one for a second, too."""
    found = demo_tasks.search()
    ids = list(found["corpus"])[start:start + 120]
    by_document = {d: q for part in found["qrels"].values() for q, grades in part.items() for d in grades}
    queries = {q: text for part in found["queries"].values() for q, text in part.items()}
    asked = [d for d in ids if d in by_document]
    rng, cuts, rows = random.Random(start), {"train": 48, "validation": 12, "test": 20}, {}
    assert len(asked) >= sum(cuts.values())
    for split, n in cuts.items():
        chosen, asked = asked[:n], asked[n:]
        rows[split] = [(by_document[d], d, rng.choice([1, 1, 2])) for d in chosen]
        rows[split] += [(by_document[d], rng.choice(ids), 1) for d in chosen[::2]]
    for split, part in rows.items():
        rows[split] = [(q, d, grade) for (q, d), grade in {(q, d): grade for q, d, grade in part}.items()]
    return collection(folder, name, [{"_id": d, "text": found["corpus"][d]} for d in ids],
                      [{"_id": by_document[d], "text": queries[by_document[d]]} for d in ids if d in by_document], **rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collections")
    speeches(folder, "one", start=2000)
    speeches(folder, "two", start=2400)
    return str(folder)


@pytest.fixture
def small(encoder, data, tmp_path):
    """Settings of a grid that takes seconds: small(out, **changes) -> eval_ir.Config"""
    def config(out="out", **changes):
        settings = dict(ckpt=encoder, tasks="one", data_dir=data, out_dir=str(tmp_path / out), lrs=(1e-3,), seeds=(0,), steps=6, batch=8,
                        dtype="float32", device="cpu", cache_dir=str(tmp_path / "cache"))
        return eval_ir.Config(**(settings | changes))
    return config


def words(c, script="eval_ir.py"):
    default = eval_ir.Config()
    return [script, *(f"--{k}={v}" for k, v in vars(c).items() if v != getattr(default, k))]


def rows(folder):
    """{file name below trials/: row}, without what a clock says."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "trials", "*", "lr*.json"))):
        with open(path, encoding="utf-8") as f:
            found[os.path.relpath(path, os.path.join(folder, "trials"))] = {
                k: v for k, v in json.load(f).items() if k not in ("secs", "time")}
    return found


def worker(c):
    mine = eval_ir.Worker(c, checkpoint.find(c.ckpt), ALONE)
    mine.take(c.tasks, {c.tasks: (c.tasks, "full")}, c.out_dir)
    mine.restore(0)
    return mine


def spread(mine):
    """Large random embeddings of tokens: an encoder trained for a second has nearly one embedding for all texts, and no gradient."""
    torch.manual_seed(0)
    with torch.no_grad():
        mine.encoder.embedding.weight.normal_()
    return mine


# ---- the loss

def test_info_nce_is_the_cross_entropy_of_the_own_document_among_those_that_are_no_answers():
    torch.manual_seed(0)
    q, d = (F.normalize(torch.randn(4, 5), dim=1) for _ in range(2))
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[0, 2] = known[3, 1] = True                              # document 2 answers query 0, too
    expected = 0.0
    for i in range(4):
        weights = {j: math.exp(float(q[i] @ d[j]) / 0.05) for j in range(4) if not known[i, j]}
        expected -= math.log(weights[i] / sum(weights.values()))
    assert retriever.info_nce(torch.cat([q, d]), known, 0.05).item() == pytest.approx(expected, rel=1e-5)


def test_known_positives_are_all_answers_of_the_query_but_the_pairs_own():
    known = [{7, 8}, {7}, {9}]
    pairs = [(0, 7), (1, 7), (0, 8), (2, 9), (0, 7)]
    assert retriever.known_positives(pairs, known).int().tolist() == [
        [0, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]


def gradients(c):
    """Gradients of the first step before they are clipped, and the loss curve of a short training."""
    mine, found = spread(worker(c)), {}
    hooks = [p.register_post_accumulate_grad_hook(lambda p, k=k: found.setdefault(k, []).append(p.grad.clone()))
             for k, p in mine.encoder.named_parameters()]
    curve = mine.train(mine.pairs, 1, {"lr": 1e-3, "seed": 0}, "")
    for hook in hooks:
        hook.remove()
    return {k: steps[-1] for k, steps in found.items()}, len(found["norm.weight"]), curve


def test_cached_gradients_are_those_of_one_big_batch(small):
    whole, passes, curve = gradients(small(batch=24))
    assert passes == 1 and len(whole) > 10
    for budget in (1, 300, 1500):                 # each text alone; a few at a time; two or three parts
        parts, passes, cut = gradients(small(batch=24, micro_tokens=budget))
        assert passes > 1 and cut[0][1] == pytest.approx(curve[0][1], abs=1e-6)
        assert parts.keys() == whole.keys()
        assert all((parts[k] - g).abs().max() < min(1e-6, 1e-4 * g.abs().max()) for k, g in whole.items())


def test_without_the_cache_a_cut_batch_would_have_other_negatives(small):
    """The reason for it: the mean over small batches is another loss."""
    one, two = (worker(small(str(b), batch=b)) for b in (16, 4))
    of_16, of_4 = (mine.train(mine.pairs, 1, {"lr": 1e-3, "seed": 0}, "")[0][1] for mine in (one, two))
    assert of_16 > of_4 + 0.5


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_that_share_a_trial_are_one(small, one_thread):
    """Batches, gradients, encoding and search over two ranks: losses and weights of one process. Where the weights are the same to
    the bit, at a learning rate of nothing, all scores are; texts are encoded one by one, so that rounding has no say in it."""
    same = dict(tasks="one,two", train_on="one", lrs=(1e-3, 1e-20), eval_tokens=1, keep=True)
    alone, both = small("alone", **same), small("both", shard=True, **same)
    eval_ir.main(alone)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *words(both)], cwd=ROOT,
                          capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = rows(alone.out_dir), rows(both.out_dir)
    assert one.keys() == two.keys() and len(one) == 4
    for name, row in one.items():
        of_one, of_two = row.pop("train_loss"), two[name].pop("train_loss")
        assert [x for _, x in of_one] == pytest.approx([x for _, x in of_two], abs=1e-5)
        if "1e-20" in name:
            assert row == two[name]
    before = checkpoint.load_model(alone.ckpt).state_dict()
    weights = [checkpoint.load_model(os.path.join(c.out_dir, "trials", "one", "lr1e-03_sd0.encoder")).state_dict() for c in (alone, both)]
    moved = max((weights[0][k] - before[k]).abs().max() for k in before)
    assert moved > 1e-3 and all((weights[0][k] - weights[1][k]).abs().max() < 0.01 * moved for k in before)


# ---- embeddings

@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_an_embedding_depends_on_its_text_alone(small, encoder, corpus_dir, dtype, tolerance):
    """Not on the batch, its order, the packing or the budget; a text of eos alone and one as long as the context are among them."""
    mine = spread(worker(small(dtype=dtype)))
    short = sorted(demo_tasks.search()["queries"]["test"].values(), key=len)
    texts = [f"Query: {text}" for text in short[:200:10]] + ["", "so on " * 400]
    arrays, cut = ir_data.tokenized(texts, mine.tokenizer, mine.max_length)
    assert cut == 1 and len(arrays[-2]) == 1 and len(arrays[-1]) == mine.max_length
    data = {"tokens": np.concatenate(arrays), "bounds": np.cumsum([0, *map(len, arrays)])}
    alone = torch.cat([mine.embed(data, [i]) for i in range(len(texts))])
    order = random.Random(0).sample(range(len(texts)), len(texts))
    with torch.inference_mode():
        together = mine.embed(data, order)
    assert (together - alone[order]).abs().max() < tolerance
    for budget in (1, 50, 700, 10 ** 6):
        mine.eval_tokens = budget
        assert (mine.embeddings(data, "") - alone).abs().max() < tolerance
    assert alone.dtype == torch.float32 and (alone.norm(dim=1) - 1).abs().max() < 1e-5
    assert (alone @ alone.T).fill_diagonal_(0).max() < 0.999       # and they are different texts to it


def test_an_embedding_is_the_mean_over_all_tokens(small):
    mine = worker(small())
    tokens, cu_seqlens = encode.pack(mine.pairs[0], [3, 50], "cpu")
    with torch.no_grad():
        hidden = mine.encoder(tokens, cu_seqlens, causal=False)
        ours = mine.embed(mine.pairs[0], [3, 50])
    for i, part in enumerate(hidden.split(cu_seqlens.diff().tolist())):
        assert torch.allclose(ours[i], F.normalize(part.mean(0), dim=0), atol=1e-6)
    assert tokens[cu_seqlens[1:] - 1].tolist() == [mine.tokenizer.eos_id] * 2
    assert mine.tokenizer.decode(tokens[:4].tolist()).startswith("Query") or mine.tokenizer.decode(tokens[:9].tolist()).startswith("Query: ")


def test_encoding_begins_with_the_longest_text_and_shares_are_all_of_it(small):
    mine = worker(small(eval_tokens=500))
    documents = mine.targets["one"].documents
    first, _ = next(mine.encode(documents, ""))
    lengths = encode.lengths(documents)
    assert lengths[first[0]] == lengths.max() and lengths[first].sum() <= 500
    shares = [torch.cat([indices for indices, _ in mine.encode(documents, "", rank, 3)]).tolist() for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(120)) and min(map(len, shares)) > 20


def test_copies_of_a_document_are_found_in_the_order_of_their_ids(small, tmp_path):
    """Whatever their order in the corpus: of equal scores trec_eval has the larger id first."""
    documents = [{"_id": id_, "text": "the state of the union is strong" if len(id_) == 1 else f"report {id_}"}
                 for id_ in ("a", "d10", "c", "b", "d9", "e", "d")]
    folder = collection(tmp_path / "copies", "one", documents, [{"_id": f"q{i}", "text": "the union"} for i in range(3)],
                        train=[("q0", "a", 1)], validation=[("q1", "a", 1)], test=[("q2", "a", 1)])
    mine = worker(small(data_dir=folder))
    target = mine.targets["one"]
    scores, ids = mine.search(target.queries, target.documents, target.rank, 7, "")
    names = [target.ids[i] for i in ids[0].tolist()]
    assert [name for name in names if len(name) == 1] == ["e", "d", "c", "b", "a"]
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)


# ---- trials

def test_the_demo_from_a_checkpoint_to_a_table(small, tmp_path):
    """A real process, no network: rows with all they need, every query's own score, and both tables."""
    c = small(tasks="demo", data_dir="", seeds=(0, 1), steps=3)
    done = run_python(words(c), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sotu_search: retrieval, 200 validation and 300 test queries, pool judged of 500 documents" in done.stdout + done.stderr
    found = rows(c.out_dir)
    assert len(found) == 2
    for name, row in found.items():
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


def test_the_same_twice_is_the_same_to_the_bit_and_a_seed_is_an_order(small):
    one, again = small("one", seeds=(0, 1)), small("again", seeds=(1, 0))
    eval_ir.main(one)
    eval_ir.main(again)
    assert rows(one.out_dir) == rows(again.out_dir) and len(rows(one.out_dir)) == 2
    first, second = ([x for _, x in row["train_loss"]] for row in rows(one.out_dir).values())
    assert first != second


def test_training_lowers_the_loss_and_finds_what_it_was_trained_on(small, data, tmp_path):
    folder = tmp_path / "same" / "one"
    shutil.copytree(os.path.join(data, "one"), folder)
    for split in ("validation", "test"):
        shutil.copy(folder / "qrels" / "train.tsv", folder / "qrels" / f"{split}.tsv")
    c = small(data_dir=str(tmp_path / "same"), steps=60, batch=16, lrs=(5e-3, 1e-9))
    eval_ir.main(c)
    found = rows(c.out_dir)
    trained, untrained = found["one/lr5e-03_sd0.json"], found["one/lr1e-09_sd0.json"]
    assert trained["train_loss"][-1][1] < trained["train_loss"][0][1] - 0.5
    assert trained["test"] == trained["validation"] and trained["test"]["score"] > untrained["test"]["score"] + 0.1


def test_tasks_that_share_their_pairs_share_a_training(small):
    """The row of a task is the same alone, beside another, and when the other is added later."""
    both, later = small("both", tasks="one,two", train_on="one"), small("later", tasks="one", train_on="one")
    eval_ir.main(both)
    eval_ir.main(later)
    assert len(rows(later.out_dir)) == 1
    eval_ir.main(small("later", tasks="one,two", train_on="one"))
    assert rows(both.out_dir) == rows(later.out_dir) and len(rows(both.out_dir)) == 2
    row = rows(both.out_dir)["two/lr1e-03_sd0.json"]
    assert (row["task"], row["train_on"], row["test"]["n"]) == ("two", "one", 20)
    table = report.trial_table(list(report.read_trials(both.out_dir).values()))
    assert "| two, full pool | clm_then_mlm-40 (trained on one) |" in table and "| one, full pool | clm_then_mlm-40 |" in table


def test_pools_have_folders_rows_and_table_lines_of_their_own_and_distractors_only_push_down(small):
    for pool in ("judged", "hard", ""):
        eval_ir.main(small(pool=pool, hard_negatives=2))
    found = rows(small().out_dir)
    assert set(found) == {f"{name}/lr1e-03_sd0.json" for name in ("one", "one-hard", "one-judged")}
    judged, hard, full = (found[f"{name}/lr1e-03_sd0.json"] for name in ("one-judged", "one-hard", "one"))
    assert [row["pool"] for row in (judged, hard, full)] == ["judged", "hard", "full"]
    assert judged["documents"] < hard["documents"] < full["documents"] == 120
    of = [np.load(os.path.join(small().out_dir, "trials", name, "lr1e-03_sd0.npz"))["test"] for name in ("one-judged", "one-hard", "one")]
    assert (of[0] >= of[1]).all() and (of[1] >= of[2]).all() and of[0].sum() > of[2].sum()
    table = report.trial_table(list(report.read_trials(small().out_dir).values()))
    assert all(f"| one, {pool} pool |" in table for pool in ("judged", "hard", "full"))
    with pytest.raises(UserError, match=r"one-hard holds trials of other settings \(hard_negatives: 2 then, 3 now\)"):
        eval_ir.main(small(pool="hard", hard_negatives=3, seeds=(1,)))


def test_finals_search_the_full_corpus_for_the_best_learning_rate_alone(small):
    c = small(pool="judged", lrs=(1e-9, 3e-3), seeds=(0, 1), steps=40, finals=True)
    eval_ir.main(c)
    found = rows(c.out_dir)
    grid = [row for name, row in found.items() if name.startswith("one-judged/")]
    means = {lr: np.mean([row["validation"]["score"] for row in grid if row["lr"] == lr]) for lr in c.lrs}
    best = max(means, key=means.get)
    finals = {name: row for name, row in found.items() if name.startswith("one/")}
    assert len(grid) == 4 and {(row["lr"], row["seed"]) for row in finals.values()} == {(best, 0), (best, 1)}
    for row in finals.values():        # the same training, more documents
        twin = next(r for r in grid if (r["lr"], r["seed"]) == (row["lr"], row["seed"]))
        assert row["train_loss"] == twin["train_loss"] and row["pool"] == "full" and row["test"]["score"] <= twin["test"]["score"]


def test_a_trial_that_diverges_is_a_failed_row_of_every_task(small):
    c = small(tasks="one,two", train_on="one", lrs=(1e30, 1e-3))
    eval_ir.main(c)
    found = rows(c.out_dir)
    assert len(found) == 4
    for name, row in found.items():
        assert row["failed"] == ("1e+30" in name) and (row["test"] is None) == row["failed"] and row["pool"] == "full"


def test_a_row_is_done_when_the_tasks_beside_it_are(tmp_path):
    trial = {"task": "a", "also": ("b",), "lr": 1e-3, "seed": 0}
    for task, done in (("a", False), ("b", True)):
        path = trials.path_of(str(tmp_path), trial | {"task": task})
        os.makedirs(os.path.dirname(path))
        trials.finish(path, {})
        assert trials.is_done(str(tmp_path), trial) == done
    assert trials.is_done(str(tmp_path), {"task": "a", "lr": 1e-3, "seed": 0})


def test_a_kept_encoder_is_a_checkpoint_that_finds_the_same(small, encoder, tmp_path):
    c = small(keep=True, steps=20)
    eval_ir.main(c)
    row, = rows(c.out_dir).values()
    kept = os.path.join(c.out_dir, "trials", "one", "lr1e-03_sd0.encoder")
    again = worker(small("again", ckpt=kept))
    assert again.evaluate("one", {"task": "one", "lr": 1e-3, "seed": 0}, c.out_dir, {"train": 0})["test"] == row["test"]
    before = worker(small("before"))
    assert not torch.equal(before.encoder.embedding.weight, again.encoder.embedding.weight)


def test_finished_trials_stay_and_other_settings_are_refused_by_name(small):
    c = small()
    eval_ir.main(c)
    before = rows(c.out_dir)
    eval_ir.main(small(seeds=(0, 1)))
    assert len(rows(c.out_dir)) == 2 and before.items() <= rows(c.out_dir).items()
    for changes, says in (({"temperature": 0.1}, "temperature: 0.05 then, 0.1 now"), ({"train_on": "two"}, "train_on: one then, two now"),
                          ({"mode": "paper"}, "mode: standard then, paper now")):
        with pytest.raises(UserError, match=f"holds trials of other settings.*{says}"):
            eval_ir.main(small(**changes))


def test_the_papers_mode_scores_and_trains_as_its_code_does(small):
    c = small("paper", mode="paper")
    eval_ir.main(c)
    row, = rows(c.out_dir).values()
    assert row["test"]["score"] == row["test"]["paper_ndcg_10"] > row["test"]["ndcg_10"]      # one of two positives found
    assert row["mode"] == "paper"
    standard = small("standard")
    eval_ir.main(standard)
    ours, = rows(standard.out_dir).values()
    assert ours["test"]["score"] == ours["test"]["ndcg_10"] and ours["train_loss"] != row["train_loss"]


def test_the_grid_is_finetunes():
    import finetune
    ours, theirs = (vars(module.Config()) for module in (eval_ir, finetune))
    same = ours.keys() & theirs.keys() - {"eval_tokens", "data_dir"}
    assert len(same) > 15 and {k: ours[k] for k in same} == {k: theirs[k] for k in same}


# ---- mteb

def test_mteb_scores_the_checkpoint_as_our_own_search_does(small, monkeypatch, capsys):
    """A retrieval task of mteb's own kind over local data, as its tasks' own data is on the hub: its NDCG@10 is ours."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import EncoderProtocol
    c = small()
    mine = worker(c)
    found = mine.targets["one"].collection

    class Speeches(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Speeches", description="-", dataset={"path": "local/speeches", "revision": "1"}, type="Retrieval", category="t2t",
            modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10", reference=None, date=None,
            domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None)

        def load_data(self, num_proc=None, **kwargs):
            qrels = found.qrels["test"]
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_list([{"id": d, "text": text} for d, text in found.documents()]), "relevant_docs": qrels,
                "queries": Dataset.from_list([{"id": q, "text": found.queries[q]} for q in qrels]), "top_ranked": None}}}
            self.data_loaded = True

    assert isinstance(retriever.ForMteb(mine), EncoderProtocol)
    with pytest.raises(UserError, match="mteb=NoSuchTask: .*NoSuchTask"):
        eval_ir.main(small(mteb="NoSuchTask"))
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [Speeches() for name in tasks])
    eval_ir.main(small(mteb="Speeches"))
    ours = mine.evaluate("one", {"task": "one", "lr": 1.0, "seed": 0}, c.out_dir, {"train": 0})["test"]
    path, = glob.glob(os.path.join(c.out_dir, "mteb", "**", "Speeches.json"), recursive=True)
    scores, = json.load(open(path))["scores"]["test"]
    assert scores["ndcg_at_10"] == pytest.approx(ours["ndcg_10"], abs=1e-4) and ours["ndcg_10"] > 0
    assert scores["recall_at_100"] == pytest.approx(ours["recall_100"], abs=1e-4)
    assert f"Speeches: ndcg_at_10 {100 * scores['ndcg_at_10']:.2f}" in capsys.readouterr().out


# ---- wrong calls

@pytest.mark.parametrize("changes, says", [
    ({"tasks": "rivers"}, "unknown task 'rivers'"),
    ({"tasks": "sotu_era"}, "sotu_era is no retrieval collection: python finetune.py --tasks=sotu_era"),
    ({"pool": "half"}, "pool=half: expected judged, hard, full"),
    ({"batch": 1}, "batch=1: a query's negatives are the other pairs' documents"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"finals": True}, "it is searched in full already"),
    ({"train_on": "nothing"}, "unknown task 'nothing'"),
    ({"data_dir": "", "tasks": "nq"}, "from the Hugging Face hub"),
    ({"ckpt": "nowhere"}, "no checkpoint at nowhere"),
    ({"lrs": (1,)}, "learning rates above 0 written as in 1e-5"),
])
def test_a_wrong_call_is_explained_in_one_line(small, changes, says):
    with pytest.raises(UserError) as error:
        eval_ir.main(small(**changes))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_collection_that_cannot_be_searched_is_one_line_and_exit_2(small, tmp_path):
    folder = collection(tmp_path / "bad", documents=[])
    done = run_python(words(small(tasks="rivers", data_dir=folder)))
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: rivers has no documents: an empty collection cannot be searched"


def test_finetune_sends_retrieval_here(small):
    done = run_python(["finetune.py", f"--ckpt={small().ckpt}", "--tasks=sotu_search"])
    assert done.returncode == 2 and "sotu_search is a retrieval collection: python eval_ir.py --tasks=sotu_search" in done.stderr


@needs_shared
def test_a_real_graded_collection_from_end_to_end(small):
    c = small(tasks="cranfield", data_dir=SHARED, steps=2)
    eval_ir.main(c)
    row, = rows(c.out_dir).values()
    assert row["documents"] == 1400 and row["test"]["n"] == 100 and row["validation"]["n"] == 25
    assert row["baseline"]["score"] == pytest.approx(0.340, abs=5e-4) and row["test"]["paper_ndcg_10"] >= row["test"]["ndcg_10"]
