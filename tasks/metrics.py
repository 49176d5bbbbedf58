"""Scores of classification, question answering and retrieval: standard ones, and the paper's own.

Lists go in, scores between 0 and 1 come out. Where a score is a mean over examples the function
gives one example's score, so that rows can keep them for paired tests; entity F1 is a score of a
whole set.

The paper's own scores (arXiv 2507.00994; its evaluation code, EncodEval) are not the usual ones:
`sentence_macro_f1` counts O as a class and gives a sentence without entities 1.0 for free,
`token_set_f1` compares positions, not answers, and `ndcg_of_retrieved` forgives every relevant
document that was not found. Do not mix them up in a table.
"""
import itertools
import math
import re
import string
from collections import Counter

import numpy as np

# ---- classification

def accuracy(gold, predicted):
    """Share of equal items; both lists of the same length. Raises ValueError for empty or unequal
    ones."""
    if not gold or len(gold) != len(predicted):
        raise ValueError(f"accuracy of {len(predicted)} predictions for {len(gold)} examples")
    return sum(g == p for g, p in zip(gold, predicted)) / len(gold)


def best_lr(scores):
    """The learning rate of the best mean validation score among those with the most seeds. scores:
    {lr: [scores]}"""
    def seeds_and_mean(lr):
        return len(scores[lr]), sum(scores[lr]) / len(scores[lr])
    return max(scores, key=seeds_and_mean)


# ---- token classification: one list of IOB2 tags a sentence, such as ["B-PER", "I-PER", "O"]

def entities(tags, strict=False):
    """The entities of a sentence: {(type, first word, word after the last)}.

    strict: IOB2 as it is written, where an I- that continues nothing does not belong to an entity.
    Otherwise such an I- begins an entity, as conlleval and seqeval's default read it.
    """
    spans = set()
    start, entity_type = None, None            # of the entity that is open
    for i, tag in enumerate([*tags, "O"]):     # the last O closes an entity at the end
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
    """Micro-averaged {"precision", "recall", "f1"} of the entities of all sentences; 0.0 if there
    are none.

    Boundaries and types must be exact. gold, predicted: lists of lists of tags. Raises ValueError
    where lengths differ.
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
    """The paper's NER score of one sentence: the mean F1 over the tags that occur in it, gold or
    predicted, O included."""
    # each tag's F1 is 2 right / (gold + predicted)
    n_right = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    n_gold = Counter(gold)
    n_predicted = Counter(predicted)
    tags = n_gold | n_predicted
    if not tags:
        return 0.0
    return sum(2 * n_right[tag] / (n_gold[tag] + n_predicted[tag]) for tag in tags) / len(tags)


# ---- question answering

def normalise(answer):
    """An answer in lower case, without ASCII punctuation and English articles, with single spaces:
    SQuAD's rule."""
    characters = [character for character in answer.lower() if character not in string.punctuation]
    answer = "".join(characters)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def squad(prediction, golds):
    """(exact match, F1) of one answer, the best over all gold answers, as SQuAD v2's official
    script has them.

    golds: [] or [""] where the question has no answer; then only an answer that is empty after
    normalisation is right. ReCoRD's official scores are these, with the entity mentions that answer
    a query as golds.
    """
    golds = [gold for gold in map(normalise, golds) if gold]
    if not golds:
        golds = [""]
    prediction = normalise(prediction)
    best_f1 = max(f1_of_words(prediction.split(), gold.split()) for gold in golds)
    return float(prediction in golds), best_f1


def f1_of_words(predicted, gold):
    """F1 of two bags of words; with an empty one, 1.0 if both are."""
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def token_set_f1(predicted, gold):
    """The paper's QA score of one example: F1 of the sets of token positions in the answer; an
    empty set counts as {0}.

    So a model that never answers scores 1.0 on every unanswerable question, 50.07 on SQuAD v2 in
    total.
    """
    predicted = set(predicted) or {0}
    gold = set(gold) or {0}
    return 2 * len(predicted & gold) / (len(predicted) + len(gold))


# ---- retrieval: qrels {query: {document: grade}}, run {query: {document: score}} -> {query: value}
# There is a value for every query of the qrels. A document of grade 1 or above is relevant.

def ranking(qrels, run, k):
    """Yields (query, its grades, its k best documents), ranked as trec_eval ranks.

    That is by the score in single precision, and documents of equal score by id, the larger first.
    A query that the run lacks has no documents. Raises ValueError for a score that is NaN.
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
    """Discounted cumulative gain: each gain by the logarithm of its rank."""
    return sum(gain / math.log2(i + 2) for i, gain in enumerate(gains))


def ndcg(qrels, run, k=10):
    """NDCG@k as trec_eval's ndcg_cut.

    The grade is the gain (none below 0), and the ideal ranking has all relevant documents, also
    those that were not retrieved. A query without a relevant document has 0.
    """
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        ideal_gains = sorted((max(grade, 0) for grade in grades.values()), reverse=True)
        ideal = dcg(ideal_gains[:k])
        gains = [max(grades.get(document, 0), 0) for document in best]
        values[query] = dcg(gains) / ideal if ideal else 0.0
    return values


def ndcg_of_retrieved(qrels, run, k=10):
    """The paper's NDCG@k: scikit-learn's ndcg_score of the k retrieved documents alone.

    Every relevant document counts 1, the ideal ranking is made of the retrieved documents, and
    those of equal score share their gain.
    """
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        score_of = run.get(query, {}).get
        best = sorted(best, key=score_of, reverse=True)
        # scikit-learn's rule for ties: documents of equal score have their mean gain
        gains = []
        for _, tied in itertools.groupby(best, key=score_of):
            relevant = [float(is_relevant(document, grades)) for document in tied]
            gains += [sum(relevant) / len(relevant)] * len(relevant)
        ideal_gains = [float(is_relevant(document, grades)) for document in best]
        ideal = dcg(sorted(ideal_gains, reverse=True))
        values[query] = dcg(gains) / ideal if ideal else 0.0
    return values


def mrr(qrels, run, k=10):
    """1 / the rank of the first relevant document among the k best; 0 if there is none."""
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        values[query] = 0.0
        for rank, document in enumerate(best, start=1):
            if is_relevant(document, grades):
                values[query] = 1 / rank
                break
    return values


def recall(qrels, run, k=100):
    """Share of the relevant documents that are among the k best; 0 if there are none."""
    values = {}
    for query, grades, best in ranking(qrels, run, k):
        relevant = {document for document in grades if is_relevant(document, grades)}
        values[query] = len(relevant.intersection(best)) / len(relevant) if relevant else 0.0
    return values


def is_relevant(document, grades):
    return grades.get(document, 0) >= 1
