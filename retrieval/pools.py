"""What is trained on and what is searched: training pairs, pools of documents, and BM25.

A pool is the set of documents that is searched. The larger it is, the lower the scores. So each
pool has a name, every row of results records it, and results of different pools are never mixed:

    judged   the documents that have a judgement for a validation or test query. This is the paper's
             pool (arXiv 2507.00994, its evaluation code). It lacks all other documents, which could
             confuse the encoder, so its scores cannot be compared with BEIR's.
    hard     the judged documents and, for each query, BM25's best documents of the corpus
    full     the whole corpus
"""
from dataclasses import dataclass

import numpy as np

from core.configurator import UserError
from tasks import packing

POOLS = ("judged", "hard", "full")
# The BM25 baseline is left out for larger pools. With more than a million documents it takes a
# quarter of an hour and tens of gigabytes.
BM25_LIMIT = 1_000_000


# ---- training pairs


@dataclass
class TrainingPairs:
    """Pairs of a query and a document that answers it."""

    queries: list  # distinct texts
    documents: list  # distinct texts
    pairs: np.ndarray  # [P, 2] int: the index of a query, the index of a document
    positives: list  # for each query, the set of indices of all documents that answer it


def training_pairs(collection):
    """The collection's training pairs. -> TrainingPairs

    A pair is a query and a document of grade 1 or above. Equal texts become one text, so that a
    copy of a positive is never taken for a negative. Raises UserError if there is no pair.
    """
    text_pairs = collection.pairs or judged_text_pairs(collection)
    if not text_pairs:
        raise UserError(
            f"{collection.name} has no training pairs (qrels/train.tsv): "
            "name a collection that has some, --train_on=NAME"
        )

    # Each pair once, and each text once, in the order of their first copies.
    text_pairs = list(dict.fromkeys(text_pairs))
    queries = list(dict.fromkeys(query for query, _ in text_pairs))
    documents = list(dict.fromkeys(document for _, document in text_pairs))

    # The pairs, as indices into these two lists.
    query_index = {text: i for i, text in enumerate(queries)}
    document_index = {text: i for i, text in enumerate(documents)}
    pairs = []
    positives = [set() for _ in queries]
    for query, document in text_pairs:
        q = query_index[query]
        d = document_index[document]
        pairs.append((q, d))
        positives[q].add(d)
    return TrainingPairs(queries, documents, np.array(pairs), positives)


def judged_text_pairs(collection):
    """[(query text, document text)] of the training judgements of grade 1 or above."""
    id_pairs = []
    for query_id, grades in collection.qrels["train"].items():
        id_pairs += [(query_id, document_id) for document_id, grade in grades.items() if grade >= 1]
    relevant_ids = {document_id for _, document_id in id_pairs}
    texts = {id_: text for id_, text in collection.documents() if id_ in relevant_ids}
    # A judgement may name a query or a document that the collection lacks.
    return [
        (collection.queries[query_id], texts[document_id])
        for query_id, document_id in id_pairs
        if query_id in collection.queries and document_id in texts
    ]


# ---- pools


def pool_ids(collection, pool, hard_negatives, cache_dir):
    """The set of ids of a pool's documents, or None for all documents.

    hard_negatives: how many of BM25's best documents for each query the pool "hard" has. Their ids
    are kept in cache_dir, because it takes minutes to find them in a large corpus.
    """
    if pool == "full":
        return None
    query_ids = set()
    judged = set()
    for split in ("validation", "test"):       # a query may be in both
        for query_id, grades in collection.qrels[split].items():
            query_ids.add(query_id)
            judged |= grades.keys()
    if pool == "judged":
        return judged

    def best_ids():
        """BM25's documents, as a sorted list of ids."""
        scores_of_query = bm25(collection, sorted(query_ids), None, hard_negatives)
        ids = set()
        for scores in scores_of_query.values():
            ids |= scores.keys()
        return sorted(ids)

    name = f"{collection.name}-bm25-{hard_negatives}"
    rules = [collection.fingerprint, hard_negatives]
    return judged | set(packing.cached_json(cache_dir, name, rules, best_ids, list))


def bm25(collection, query_ids, pool, k):
    """BM25's k best documents of a pool for each query. -> {query id: {document id: score}}

    pool: a set of document ids, or None for all. The settings are the defaults of the package
    bm25s, without English stop words. A document that shares no word with the query is left out.
    """
    try:
        import bm25s
    except ImportError:
        raise UserError("BM25 needs the package bm25s: pip install -r requirements.txt") from None

    # Index the documents of the pool.
    ids = []
    texts = []
    for document_id, text in collection.documents_of(pool):
        ids.append(document_id)
        texts.append(text)
    index = bm25s.BM25()
    words = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    index.index(words, show_progress=False)

    # Search for those queries that the collection has.
    query_ids = [query_id for query_id in query_ids if query_id in collection.queries]
    query_texts = [collection.queries[query_id] for query_id in query_ids]
    query_words = bm25s.tokenize(query_texts, stopwords="en", show_progress=False)
    places, scores = index.retrieve(query_words, k=min(k, len(ids)), show_progress=False)  # [Q, k]
    best = {}
    for query_id, query_places, query_scores in zip(query_ids, places, scores):
        best[query_id] = {
            ids[place]: float(score)
            for place, score in zip(query_places, query_scores)
            if score > 0
        }
    return best
