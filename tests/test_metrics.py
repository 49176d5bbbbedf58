"""Scores equal their oracles: seqeval, scikit-learn, and values of the official scripts worked out by hand."""
import random
import warnings

import numpy as np
import pytest
import pytrec_eval
import seqeval.metrics
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score, ndcg_score

from tasks import metrics

GOLD = ["B-PER", "I-PER", "O", "B-LOC"]


@pytest.mark.parametrize("predicted, default, strict", [
    (GOLD, 1.0, 1.0), (["B-PER", "O", "O", "B-LOC"], 0.5, 0.5), (["B-ORG", "I-ORG", "O", "B-LOC"], 0.5, 0.5),
    (["I-PER", "I-PER", "O", "I-LOC"], 1.0, 0.0), (["O"] * 4, 0.0, 0.0), (["B-PER", "B-PER", "O", "B-LOC"], 0.4, 0.4),
    (["B-PER", "I-ORG", "O", "B-LOC"], 0.4, 0.5)])
def test_entity_f1_of_the_published_cases(predicted, default, strict):
    assert metrics.entity_f1([GOLD], [predicted])["f1"] == pytest.approx(default)
    assert metrics.entity_f1([GOLD], [predicted], strict=True)["f1"] == pytest.approx(strict)


@pytest.mark.parametrize("strict", [False, True])
def test_entity_f1_equals_seqeval_on_random_tags(strict):
    random.seed(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]
    how = dict(mode="strict", scheme=IOB2) if strict else {}
    for _ in range(100):
        gold, predicted = ([[random.choice(tags) for _ in range(n)] for n in (1, 3, 8, 20)] for _ in range(2))
        ours = metrics.entity_f1(gold, predicted, strict)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [f(gold, predicted, zero_division=0, **how) for f in
                      (seqeval.metrics.precision_score, seqeval.metrics.recall_score, seqeval.metrics.f1_score)]
        assert list(ours.values()) == pytest.approx(theirs, abs=1e-12)


def test_without_any_entity_f1_is_zero_and_not_nan():
    assert metrics.entity_f1([["O", "O"]], [["O", "O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_the_papers_ner_score_equals_scikit_learns_macro_f1_of_each_sentence():
    random.seed(1)
    for _ in range(200):
        n = random.randint(1, 12)
        gold, predicted = ([random.choice(["O", "O", "O", "B-PER", "I-PER", "B-LOC"]) for _ in range(n)] for _ in range(2))
        assert metrics.sentence_macro_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, average="macro"), abs=1e-12)
    assert metrics.sentence_macro_f1(["O"] * 5, ["O"] * 5) == 1.0


@pytest.mark.parametrize("prediction, gold, f1", [
    ("the Cat", "cat.", 1), ("", "", 1), ("", "x", 0), ("the", "", 1), ("a b c", "b c d", 0.8), ("10th–11th", "10th-11th", 0),
    ("U.S.", "US", 1), ("b b", "b", 2 / 3)])
def test_squad_f1_of_the_published_cases(prediction, gold, f1):
    exact, found = metrics.squad(prediction, [gold])
    assert found == pytest.approx(f1) and exact == (1.0 if f1 == 1 else 0.0)


def test_squad_takes_the_best_gold_answer_and_knows_questions_without_one():
    assert metrics.squad("Bern", ["Zurich", "the city of Bern", "Bern"]) == (1.0, 1.0)
    assert metrics.squad("city Bern", ["Zurich", "the city of Bern"]) == (0.0, pytest.approx(0.8))
    assert metrics.squad("", []) == (1.0, 1.0) and metrics.squad("Bern", []) == (0.0, 0.0)
    assert metrics.squad("", ["the"]) == (1.0, 1.0)           # an answer of articles alone is none, as in the official script


def test_the_papers_qa_score_is_of_positions_and_rewards_silence():
    assert metrics.token_set_f1([4, 5, 6], [5, 6, 7]) == pytest.approx(2 / 3)
    assert metrics.token_set_f1([], []) == 1.0 and metrics.token_set_f1([], [3]) == 0.0
    assert metrics.token_set_f1([0], []) == 1.0               # {0} stands for the empty set


def test_accuracy_equals_scikit_learns():
    random.seed(2)
    gold, predicted = ([random.randint(0, 3) for _ in range(500)] for _ in range(2))
    assert metrics.accuracy(gold, predicted) == accuracy_score(gold, predicted)
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        metrics.accuracy([1, 2], [1])


# ---- retrieval

def random_collection(n=60):
    """Graded qrels and a run with ties, near ties, queries that only one of them has, and empty results."""
    random.seed(3)
    documents = [f"d{i}" for i in range(300)] + ["é", "日", "Z", "z"]
    qrels = {f"q{i}": {d: random.choice([-1, 0, 0, 1, 2, 3]) for d in random.sample(documents, random.choice([1, 3, 20, 150]))}
             for i in range(n)}
    run = {}
    for i in range(n + 5):
        scores = [random.choice([0.1, 0.2, 0.8, 0.80000001, 3.0, -1.0, random.random()]) for _ in documents]
        run[f"q{i}"] = {d: s for d, s in zip(documents, scores) if random.random() < random.choice([0, 0.05, 1])}
    del run["q0"], run["q1"]
    run["q2"], qrels["q3"] = {}, {"d1": 0}
    return qrels, run


def test_retrieval_scores_equal_trec_evals():
    qrels, run = random_collection()
    oracle = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_5,10,20", "recip_rank", "recall_10,100"}).evaluate(run)
    assert len(oracle) == len(qrels) - 2                     # it leaves out what the run does not have; we count it as 0
    for name, ours in [(f"ndcg_cut_{k}", metrics.ndcg(qrels, run, k)) for k in (5, 10, 20)] + [
            ("recip_rank", metrics.mrr(qrels, run, 10 ** 9)), ("recall_10", metrics.recall(qrels, run, 10)),
            ("recall_100", metrics.recall(qrels, run))]:
        assert ours.keys() == qrels.keys() and ours["q0"] == ours["q1"] == ours["q2"] == ours["q3"] == 0.0
        assert len(set(ours.values())) > 10
        for query, value in ours.items():
            assert value == pytest.approx(oracle.get(query, {name: 0.0})[name], abs=1e-9), (name, query)
    of_ten = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(
        {q: {d: 10 - i for i, d in enumerate(best)} for q, _, best in metrics.ranking(qrels, run, 10)})
    for query, value in metrics.mrr(qrels, run).items():
        assert value == pytest.approx(of_ten.get(query, {"recip_rank": 0.0})["recip_rank"], abs=1e-9)


@pytest.mark.parametrize("grades, scores, value", [
    ({"d2": 1}, {"d1": 1.0, "d2": 1.0, "d3": 1.0}, 0.6309),              # ties: the larger id first; scikit-learn has 0.7103
    ({"a": 3, "b": 2, "c": 1}, {"a": 1, "b": 2, "c": 3}, 0.7900),        # linear gains; exponential ones give 0.6806
    ({"d1": 1}, {"d1": 0.80000001, "d2": 0.8}, 0.6309),                  # equal in single precision
    ({f"d{i}": 1 for i in range(20)}, {f"d{i}": i for i in range(10)}, 1.0),      # the ideal is cut at ten, too
    ({"d1": 0}, {"d1": 1.0}, 0.0), ({"d1": 1}, {}, 0.0)])
def test_ndcg_of_the_tricky_cases(grades, scores, value):
    assert metrics.ndcg({"q": grades}, {"q": scores})["q"] == pytest.approx(value, abs=5e-5)


def test_a_query_that_was_not_answered_counts_and_a_score_of_nan_is_an_error():
    found = metrics.ndcg({"a": {"d": 1}, "b": {"d": 1}}, {"a": {"d": 1.0}})
    assert found == {"a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="query a has a document whose score is NaN"):
        metrics.ndcg({"a": {"d": 1}}, {"a": {"d": float("nan")}})


def test_the_papers_ndcg_equals_scikit_learns_on_the_retrieved_ten():
    qrels, run = random_collection()
    ours, checked = metrics.ndcg_of_retrieved(qrels, run), 0
    for query, grades, best in metrics.ranking(qrels, run, 10):
        if len(best) > 1:                                                # scikit-learn refuses fewer
            gains, scores = np.array([[float(grades.get(d, 0) >= 1) for d in best]]), np.array([[run[query][d] for d in best]])
            assert ours[query] == pytest.approx(ndcg_score(gains, scores), abs=1e-9)
            checked += 1
    assert checked > 20 and ours["q0"] == 0.0
    assert metrics.ndcg_of_retrieved({"q": {"a": 1, "b": 1}}, {"q": {"b": 1.0}}) == {"q": 1.0}      # "a" was not found: no loss
