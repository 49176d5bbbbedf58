"""Scores of classification, question answering and retrieval: the standard ones, and the paper's.

All scores lie between 0 and 1. Some functions score a whole set of examples (accuracy, entity F1).
Others score one example, and the caller takes the mean, so that the examples' own scores can be
kept for paired tests.

The paper's own scores (arXiv 2507.00994; its evaluation code, EncodEval) are not the usual ones:
`sentence_macro_f1` counts O as a class and gives a sentence without entities 1.0 for free,
`token_set_f1` compares positions, not answers, and `ndcg_of_retrieved` forgives every relevant
document that was not found. Do not mix the two kinds in a table.
"""
import itertools
import math
import re
import string
from collections import Counter

import numpy as np

# ---- classification

def accuracy(gold, predicted):
    """The share of predictions that are right. Raises ValueError for lists that are empty or of
    unequal length."""
    if not gold or len(gold) != len(predicted):
        raise ValueError(f"accuracy of {len(predicted)} predictions for {len(gold)} examples")
    return sum(g == p for g, p in zip(gold, predicted)) / len(gold)


def best_lr(scores):
    """The learning rate with the best mean validation score, among those with the most scores.

    scores: {lr: [a score per seed]}
    """
    def seeds_and_mean(lr):
        return len(scores[lr]), sum(scores[lr]) / len(scores[lr])
    return max(scores, key=seeds_and_mean)


# ---- token classification: a sentence is a list of IOB2 tags, such as ["B-PER", "I-PER", "O"]

def entities(tags, strict=False):
    """The entities of a sentence: {(type, first word, word after the last)}.

    An I- that does not continue an entity begins one, as in conlleval and seqeval's default. If
    strict, it belongs to no entity, as the definition of IOB2 has it.
    """
    spans = set()
    start, entity_type = None, None            # of the entity that has begun and not ended
    for i, tag in enumerate([*tags, "O"]):     # the O ends an entity that has the last word
        prefix, _, tag_type = tag.partition("-")
        continues = prefix == "I" and tag_type == entity_type
        if start is not None and not continues:
            spans.add((entity_type, start, i))
            start = None
        begins = prefix == "B" or (prefix == "I" and start is None and not strict)
        if begins:
            start, entity_type = i, tag_type
    return spans


def entity_f1(gold, predicted, strict=False):
    """{"precision", "recall", "f1"} over the entities of all sentences; 0.0 if there are none.

    A predicted entity is right if type, first and last word are. gold, predicted: for each sentence
    a list of tags. Raises ValueError if their lengths differ.
    """
    n_right = n_gold = n_predicted = 0
    for i, (gold_tags, predicted_tags) in enumerate(zip(gold, predicted, strict=True)):
        if len(gold_tags) != len(predicted_tags):
            raise ValueError(f"sentence {i} has {len(gold_tags)} words and {len(predicted_tags)} "
                             "predicted tags")
        gold_entities = entities(gold_tags, strict)
        predicted_entities = entities(predicted_tags, strict)
        n_right += len(gold_entities & predicted_entities)
        n_gold += len(gold_entities)
        n_predicted += len(predicted_entities)
    return {"precision": n_right / n_predicted if n_predicted else 0.0,
            "recall": n_right / n_gold if n_gold else 0.0,
            "f1": 2 * n_right / (n_gold + n_predicted) if n_gold + n_predicted else 0.0}


def sentence_macro_f1(gold, predicted):
    """The paper's NER score of one sentence: the mean F1 of the tags in it, O included.

    gold, predicted: lists of tags. A tag is in the sentence if it is among the gold or the
    predicted ones. A word whose predicted tag is None has none.
    """
    # the F1 of a tag is 2 right / (gold + predicted)
    n_right = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    n_gold = Counter(gold)
    n_predicted = Counter(tag for tag in predicted if tag is not None)
    tags = n_gold | n_predicted
    if not tags:
        return 0.0
    return sum(2 * n_right[tag] / (n_gold[tag] + n_predicted[tag]) for tag in tags) / len(tags)


# ---- question answering

def normalise(answer):
    """An answer in lower case, without ASCII punctuation and English articles, words separated by
    single spaces, as SQuAD compares them."""
    characters = [character for character in answer.lower() if character not in string.punctuation]
    answer = "".join(characters)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def squad(prediction, golds):
    """(exact match, F1) of one answer, each the best over all gold answers. As SQuAD v2's script.

    golds: the gold answers; [] or [""] if the question has none. Then only an answer that is empty
    after normalisation is right. ReCoRD's official scores are the same, with the entities that
    answer the query as golds.
    """
    golds = [gold for gold in map(normalise, golds) if gold]
    if not golds:
        golds = [""]
    prediction = normalise(prediction)
    best_f1 = max(f1_of_words(prediction.split(), gold.split()) for gold in golds)
    return float(prediction in golds), best_f1


def f1_of_words(predicted, gold):
    """F1 of two lists of words in any order. If one is empty: 1.0 if both are, else 0.0."""
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def token_set_f1(predicted, gold):
    """The paper's QA score of one example: F1 of predicted and gold sets of token positions.

    An empty set counts as {0}. So a model that never answers has 1.0 on every unanswerable
    question, and a mean of 50.07 % on SQuAD v2.
    """
    predicted = set(predicted) or {0}
    gold = set(gold) or {0}
    return 2 * len(predicted & gold) / (len(predicted) + len(gold))


# ---- retrieval: qrels {query: {document: grade}}, run {query: {document: score}} -> {query: value}
# Every query of the qrels gets a value. A document of grade 1 or above is relevant.

def ranking(qrels, run, k):
    """Yields (query, its grades, its k best documents) for every query of the qrels.

    Documents are ranked as in trec_eval: by the score in single precision, and those of equal score
    by id, the larger first. A query that the run lacks has no documents. Raises ValueError for a
    score that is NaN.
    """
    for query, grades in qrels.items():
        by_score = []
        for document, score in run.get(query, {}).items():
            if math.isnan(score):
                raise ValueError(f"query {query} has a document whose score is NaN")
            by_score.append((float(np.float32(score)), document))
        by_score.sort(reverse=True)
        yield query, grades, [document for _, document in by_score[:k]]


def dcg(gains):
    """Discounted cumulative gain: the sum of the gains, each divided by log2(1 + its rank)."""
    return sum(gain / math.log2(i + 2) for i, gain in enumerate(gains))


def ndcg(qrels, run, k=10):
    """NDCG@k, as trec_eval's ndcg_cut.

    A document's gain is its grade, or 0 if that is negative. The ideal ranking has all judged
    documents, also those that were not retrieved. A query without a relevant document has 0.
    """
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        ideal_gains = sorted((max(grade, 0) for grade in grades.values()), reverse=True)
        ideal = dcg(ideal_gains[:k])
        gains = [max(grades.get(document, 0), 0) for document in best]
        values[query] = dcg(gains) / ideal if ideal else 0.0
    return values


def ndcg_of_retrieved(qrels, run, k=10):
    """The paper's NDCG@k: scikit-learn's ndcg_score of the k best documents alone.

    Every relevant document has a gain of 1, the ideal ranking has only these k documents, and those
    of equal score share their gains.
    """
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        score_of = run.get(query, {}).get
        best = sorted(best, key=score_of, reverse=True)
        # scikit-learn's rule for ties: documents of equal score all get the mean of their gains
        gains = []
        for _, tied in itertools.groupby(best, key=score_of):
            relevant = [float(is_relevant(document, grades)) for document in tied]
            gains += [sum(relevant) / len(relevant)] * len(relevant)
        ideal_gains = [float(is_relevant(document, grades)) for document in best]
        ideal = dcg(sorted(ideal_gains, reverse=True))
        values[query] = dcg(gains) / ideal if ideal else 0.0
    return values


def mrr(qrels, run, k=10):
    """MRR@k: 1 / rank of the first relevant document among the k best; 0 if there is none."""
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        values[query] = 0.0
        for rank, document in enumerate(best, start=1):
            if is_relevant(document, grades):
                values[query] = 1 / rank
                break
    return values


def recall(qrels, run, k=100):
    """Recall@k: the share of the relevant documents that are among the k best; 0 without any."""
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        relevant = {document for document in grades if is_relevant(document, grades)}
        values[query] = len(relevant.intersection(best)) / len(relevant) if relevant else 0.0
    return values


def is_relevant(document, grades):
    return grades.get(document, 0) >= 1
