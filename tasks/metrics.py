"""Scores of classification, token classification, question answering and retrieval: the standard ones, and the paper's own.

Functions of lists in, scores between 0 and 1 out. Where a score is a mean over examples the function gives one example's
score, so that rows can keep them for paired tests; entity F1 is a score of a whole set.

The paper's own (arXiv 2507.00994; its evaluation code, EncodEval) are not the usual ones: `sentence_macro_f1` counts O as a
class and gives a sentence without entities 1.0 for free, `token_set_f1` compares positions, not answers, and
`ndcg_of_retrieved` forgives every relevant document that was not found. Do not mix them up in a table.
"""
import itertools
import math
import re
import string
from collections import Counter

import numpy as np


def accuracy(gold, predicted):
    """Share of equal items; both lists of the same length. Raises ValueError for empty or unequal ones."""
    if not gold or len(gold) != len(predicted):
        raise ValueError(f"accuracy of {len(predicted)} predictions for {len(gold)} examples")
    return sum(g == p for g, p in zip(gold, predicted)) / len(gold)


def best_lr(scores):
    """The learning rate of the best mean validation score among those with the most seeds. scores: {lr: [scores]}"""
    return max(scores, key=lambda lr: (len(scores[lr]), sum(scores[lr]) / len(scores[lr])))


# ---- token classification: one list of IOB2 tags a sentence, such as ["B-PER", "I-PER", "O"]

def entities(tags, strict=False):
    """The entities of a sentence: {(type, first word, word after the last)}.

    strict: IOB2 as it is written, an I- that continues nothing is no part of an entity. Otherwise as conlleval and seqeval's
    default read it: such an I- begins one.
    """
    found, start, kind = set(), None, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, type_ = tag.partition("-")
        if start is not None and not (prefix == "I" and type_ == kind):
            found.add((kind, start, i))
            start = None
        if prefix == "B" or prefix == "I" and start is None and not strict:
            start, kind = i, type_
    return found


def entity_f1(gold, predicted, strict=False):
    """Micro-averaged F1 of the entities of all sentences, exact boundaries and types; 0.0 if there are none at all.

    gold, predicted: lists of lists of tags. -> {"precision", "recall", "f1"}. Raises ValueError where lengths differ.
    """
    right = of_gold = of_predicted = 0
    for i, (g, p) in enumerate(zip(gold, predicted, strict=True)):
        if len(g) != len(p):
            raise ValueError(f"sentence {i} has {len(g)} words and {len(p)} predicted tags")
        g, p = entities(g, strict), entities(p, strict)
        right, of_gold, of_predicted = right + len(g & p), of_gold + len(g), of_predicted + len(p)
    return {"precision": right / of_predicted if of_predicted else 0.0, "recall": right / of_gold if of_gold else 0.0,
            "f1": 2 * right / (of_gold + of_predicted) if of_gold + of_predicted else 0.0}


def sentence_macro_f1(gold, predicted):
    """The paper's NER score of one sentence: the mean F1 over the tags that occur in it, gold or predicted, O included."""
    right = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    of_gold, of_predicted = Counter(gold), Counter(predicted)
    tags = of_gold | of_predicted
    return sum(2 * right[t] / (of_gold[t] + of_predicted[t]) for t in tags) / len(tags) if tags else 0.0


# ---- question answering

def normalise(answer):
    """SQuAD's: lower case, without ASCII punctuation and English articles, single spaces."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def squad(prediction, golds):
    """(exact match, F1) of one answer, the best over all gold answers, as SQuAD v2's official script has them.

    golds: [] or [""] where the question has no answer; then only an answer that is empty after normalisation is right.
    ReCoRD's official scores are these, with the entity mentions that answer a query as golds.
    """
    golds = [g for g in map(normalise, golds) if g] or [""]
    p = normalise(prediction)
    return float(p in golds), max(f1_of_words(p.split(), g.split()) for g in golds)


def f1_of_words(predicted, gold):
    """F1 of two bags of words; with an empty one, 1.0 if both are."""
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def token_set_f1(predicted, gold):
    """The paper's QA score of one example: F1 of the sets of token positions that are in the answer, empty ones being {0}.

    So a model that never answers scores 1.0 on every unanswerable question, 50.07 on SQuAD v2 as a whole.
    """
    predicted, gold = set(predicted) or {0}, set(gold) or {0}
    return 2 * len(predicted & gold) / (len(predicted) + len(gold))


# ---- retrieval: qrels {query: {document: grade}}, run {query: {document: score}} -> {query: value}, for every query of the qrels

def ranking(qrels, run, k):
    """Yields (query, its grades, its k best documents), ranked as trec_eval ranks: by the score in single precision, equal ones by
    id, the larger first. A query that the run does not have has no documents. Raises ValueError for a score that is NaN."""
    for query, grades in qrels.items():
        scores = {document: float(np.float32(score)) for document, score in run.get(query, {}).items()}
        if any(map(math.isnan, scores.values())):
            raise ValueError(f"query {query} has a document whose score is NaN")
        yield query, grades, sorted(scores, key=lambda d: (scores[d], d), reverse=True)[:k]


def dcg(gains):
    return sum(gain / math.log2(i + 2) for i, gain in enumerate(gains))


def ndcg(qrels, run, k=10):
    """NDCG@k as trec_eval's ndcg_cut: the grade is the gain (none below 0), the ideal ranking has all relevant documents, found
    or not. A query without a relevant document has 0."""
    found = {}
    for query, grades, best in ranking(qrels, run, k):
        ideal = dcg(sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:k])
        found[query] = dcg(max(grades.get(d, 0), 0) for d in best) / ideal if ideal else 0.0
    return found


def ndcg_of_retrieved(qrels, run, k=10):
    """The paper's: grades of 1 and above count 1, the ideal ranking is made of the k retrieved documents alone, and those of equal
    score share their gain (scikit-learn's ndcg_score of the retrieved ten)."""
    found = {}
    for query, grades, best in ranking(qrels, run, k):
        gains, score = [], run.get(query, {}).get
        for _, tied in itertools.groupby(sorted(best, key=score, reverse=True), key=score):
            relevant = [float(grades.get(d, 0) >= 1) for d in tied]
            gains += [sum(relevant) / len(relevant)] * len(relevant)
        ideal = dcg(sorted((float(grades.get(d, 0) >= 1) for d in best), reverse=True))
        found[query] = dcg(gains) / ideal if ideal else 0.0
    return found


def mrr(qrels, run, k=10):
    """1 / the rank of the first relevant document (grade 1 or above) among the k best, else 0."""
    return {query: next((1 / i for i, d in enumerate(best, start=1) if grades.get(d, 0) >= 1), 0.0)
            for query, grades, best in ranking(qrels, run, k)}


def recall(qrels, run, k=100):
    """Share of the relevant documents (grade 1 or above) that are among the k best; 0 where there are none."""
    found = {}
    for query, grades, best in ranking(qrels, run, k):
        relevant = {d for d, grade in grades.items() if grade >= 1}
        found[query] = len(relevant.intersection(best)) / len(relevant) if relevant else 0.0
    return found
