"""Scores equal their oracles: seqeval, scikit-learn, and values of the official scripts worked out by hand."""
import random
import warnings

import pytest
import seqeval.metrics
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score

import metrics

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
