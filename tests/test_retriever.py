"""The retriever: one loss however a batch is cut, embeddings that depend on their text alone, and mteb's scores are ours."""
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from speech_collections import collection
from test_eval_ir import worker

import eval_ir
from core.configurator import UserError
from core.files import find_files
from retrieval.mteb_adapter import ForMteb
from retrieval.retriever import info_nce, other_positives
from retrieval.tokens import tokenize
from tasks import demo, packing


def spread(retriever):
    """Large random embeddings of tokens: an encoder trained for a second has nearly one embedding for all texts, and no gradient."""
    torch.manual_seed(0)
    with torch.no_grad():
        retriever.encoder.embedding.weight.normal_()
    return retriever


# ---- the loss

def test_info_nce_is_the_cross_entropy_of_the_own_document_among_those_that_are_no_answers():
    torch.manual_seed(0)
    q, d = (F.normalize(torch.randn(4, 5), dim=1) for _ in range(2))
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[0, 2] = excluded[3, 1] = True                              # document 2 answers query 0, too
    expected = 0.0
    for i in range(4):
        weights = {j: math.exp(float(q[i] @ d[j]) / 0.05) for j in range(4) if not excluded[i, j]}
        expected -= math.log(weights[i] / sum(weights.values()))
    assert info_nce(torch.cat([q, d]), excluded, 0.05).item() == pytest.approx(expected, rel=1e-5)


def test_other_positives_are_all_answers_of_the_query_but_the_pairs_own():
    positives = [{7, 8}, {7}, {9}]
    pairs = [(0, 7), (1, 7), (0, 8), (2, 9), (0, 7)]
    assert other_positives(pairs, positives).int().tolist() == [
        [0, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]


def gradients(c):
    """The first step's gradients before they are clipped, its number of passes, and the loss curve."""
    retriever = spread(worker(c))
    gradients_of = {}       # {parameter: its gradient after each backward pass}
    hooks = []
    for name, parameter in retriever.encoder.named_parameters():
        def keep(p, name=name):
            gradients_of.setdefault(name, []).append(p.grad.clone())
        hooks.append(parameter.register_post_accumulate_grad_hook(keep))
    curve = retriever.train(retriever.training_set, 1, {"lr": 1e-3, "seed": 0}, "")
    for hook in hooks:
        hook.remove()
    passes = len(gradients_of["norm.weight"])
    return {name: after_passes[-1] for name, after_passes in gradients_of.items()}, passes, curve


def test_cached_gradients_are_those_of_one_big_batch(ir):
    uncut, passes, curve = gradients(ir(batch=24))
    assert passes == 1 and len(uncut) > 10
    for budget in (1, 300, 1500):                 # each text alone; a few at a time; two or three parts
        pieces, passes, cut = gradients(ir(batch=24, micro_tokens=budget))
        assert passes > 1 and cut[0][1] == pytest.approx(curve[0][1], abs=1e-6)
        assert pieces.keys() == uncut.keys()
        assert all((pieces[k] - g).abs().max() < min(1e-6, 1e-4 * g.abs().max()) for k, g in uncut.items())


def test_without_the_cache_a_cut_batch_would_have_other_negatives(ir):
    """The reason for it: the mean over small batches is another loss."""
    large, small = (worker(ir(str(b), batch=b)) for b in (16, 4))
    of_16, of_4 = (retriever.train(retriever.training_set, 1, {"lr": 1e-3, "seed": 0}, "")[0][1] for retriever in (large, small))
    assert of_16 > of_4 + 0.5


# ---- embeddings

@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_an_embedding_depends_on_its_text_alone(ir, dtype, tolerance):
    """Not on the batch, its order, the packing or the budget; a text of eos alone and one as long as the context are among them."""
    retriever = spread(worker(ir(dtype=dtype)))
    short = sorted(demo.search()["queries"]["test"].values(), key=len)
    texts = [f"Query: {text}" for text in short[:200:10]] + ["", "so on " * 400]
    arrays, cut = tokenize(texts, retriever.tokenizer, retriever.max_length)
    assert cut == 1 and len(arrays[-2]) == 1 and len(arrays[-1]) == retriever.max_length
    data = {"tokens": np.concatenate(arrays), "bounds": np.cumsum([0, *map(len, arrays)])}
    alone = torch.cat([retriever.embed(data, [i]) for i in range(len(texts))])
    order = random.Random(0).sample(range(len(texts)), len(texts))
    with torch.inference_mode():
        together = retriever.embed(data, order)
    assert (together - alone[order]).abs().max() < tolerance
    for budget in (1, 50, 700, 10 ** 6):
        retriever.eval_tokens = budget
        assert (retriever.embeddings(data, "") - alone).abs().max() < tolerance
    assert alone.dtype == torch.float32 and (alone.norm(dim=1) - 1).abs().max() < 1e-5
    assert (alone @ alone.T).fill_diagonal_(0).max() < 0.999       # and they are different texts to it


def test_an_embedding_is_the_mean_over_all_tokens(ir):
    retriever = worker(ir())
    tokens, cu_seqlens = packing.pack(retriever.training_set.sequences, [3, 50], "cpu")
    with torch.no_grad():
        hidden = retriever.encoder(tokens, cu_seqlens, causal=False)
        embeddings = retriever.embed(retriever.training_set.sequences, [3, 50])
    for i, rows in enumerate(hidden.split(cu_seqlens.diff().tolist())):
        assert torch.allclose(embeddings[i], F.normalize(rows.mean(0), dim=0), atol=1e-6)
    assert tokens[cu_seqlens[1:] - 1].tolist() == [retriever.tokenizer.eos_id] * 2
    assert retriever.tokenizer.decode(tokens[:4].tolist()).startswith("Query") or retriever.tokenizer.decode(tokens[:9].tolist()).startswith("Query: ")


def test_encoding_begins_with_the_longest_text_and_shares_are_all_of_it(ir):
    retriever = worker(ir(eval_tokens=500))
    documents = retriever.targets["one"].documents
    first, _ = next(retriever.encode(documents, ""))
    lengths = packing.lengths(documents)
    assert lengths[first[0]] == lengths.max() and lengths[first].sum() <= 500
    shares = [torch.cat([indices for indices, _ in retriever.encode(documents, "", rank, 3)]).tolist() for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(120)) and min(map(len, shares)) > 20


def test_copies_of_a_document_are_found_in_the_order_of_their_ids(ir, tmp_path):
    """Whatever their order in the corpus: of equal scores trec_eval has the larger id first."""
    documents = [{"_id": id_, "text": "the state of the union is strong" if len(id_) == 1 else f"report {id_}"}
                 for id_ in ("a", "d10", "c", "b", "d9", "e", "d")]
    folder = collection(tmp_path / "copies", "one", documents, [{"_id": f"q{i}", "text": "the union"} for i in range(3)],
                        train=[("q0", "a", 1)], validation=[("q1", "a", 1)], test=[("q2", "a", 1)])
    retriever = worker(ir(data_dir=folder))
    target = retriever.targets["one"]
    scores, ids = retriever.search(target.queries, target.documents, target.places, 7, "")
    names = [target.document_ids[i] for i in ids[0].tolist()]
    assert [name for name in names if len(name) == 1] == ["e", "d", "c", "b", "a"]
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)


# ---- mteb

def test_mteb_scores_the_checkpoint_as_our_own_search_does(ir, monkeypatch, capsys):
    """A retrieval task of mteb's own kind over local data, as its tasks' own data is on the hub: its NDCG@10 is ours."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import EncoderProtocol
    c = ir()
    retriever = worker(c)
    loaded = retriever.targets["one"].collection

    class Speeches(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Speeches", description="-", dataset={"path": "local/speeches", "revision": "1"}, type="Retrieval", category="t2t",
            modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10", reference=None, date=None,
            domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None)

        def load_data(self, num_proc=None, **kwargs):
            qrels = loaded.qrels["test"]
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_list([{"id": d, "text": text} for d, text in loaded.documents()]), "relevant_docs": qrels,
                "queries": Dataset.from_list([{"id": q, "text": loaded.queries[q]} for q in qrels]), "top_ranked": None}}}
            self.data_loaded = True

    assert isinstance(ForMteb(retriever), EncoderProtocol)
    with pytest.raises(UserError, match="mteb=NoSuchTask: .*NoSuchTask"):
        eval_ir.main(ir(mteb="NoSuchTask"))
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [Speeches() for name in tasks])
    eval_ir.main(ir(mteb="Speeches"))
    our_scores = retriever.evaluate("one", {"task": "one", "lr": 1.0, "seed": 0}, c.out_dir, {"train": 0})["test"]
    path, = find_files(c.out_dir, "mteb/**/Speeches.json")
    scores, = json.load(open(path))["scores"]["test"]
    assert scores["ndcg_at_10"] == pytest.approx(our_scores["ndcg_10"], abs=1e-4) and our_scores["ndcg_10"] > 0
    assert scores["recall_at_100"] == pytest.approx(our_scores["recall_100"], abs=1e-4)
    assert f"Speeches: ndcg_at_10 {100 * scores['ndcg_at_10']:.2f}" in capsys.readouterr().out
