"""What is searched: pools of documents, BM25, and the pairs to train on."""
import json
import os

import numpy as np

from core.configurator import UserError
from core.files import unique

BM25_LIMIT = 1_000_000  # documents; a baseline of more takes a quarter of an hour and tens of gigabytes


# ---- training pairs

def training_pairs(collection):
    """-> (query texts, document texts, pairs [P, 2] of indices into them, known: for each query text its set of documents).

    A pair is a query and a document of grade 1 or above. Equal texts are one text, so that a copy of a positive is no negative.
    Raises UserError where there are none.
    """
    if collection.pairs:
        texts = collection.pairs
    else:
        wanted = {d for grades in collection.qrels["train"].values() for d, grade in grades.items() if grade >= 1}
        document = {id_: text for id_, text in collection.documents() if id_ in wanted}
        texts = [(collection.queries[q], document[d]) for q, grades in collection.qrels["train"].items() if q in collection.queries
                 for d, grade in grades.items() if grade >= 1 and d in document]
    if not texts:
        raise UserError(f"{collection.name} has no training pairs (qrels/train.tsv): name a collection that has, --train_on=NAME")
    queries, documents = ({text: i for i, text in enumerate(dict.fromkeys(pair[side] for pair in texts))} for side in (0, 1))
    pairs = np.array([(queries[q], documents[d]) for q, d in dict.fromkeys(texts)])
    known = [set() for _ in queries]
    for q, d in pairs.tolist():
        known[q].add(d)
    return list(queries), list(documents), pairs, known


# ---- pools

def pool_of(collection, pool, hard_negatives, folder):
    """Ids of the documents that are searched, or None for all. hard: BM25's best hard_negatives for each query, kept in folder."""
    if pool == "full":
        return None
    graded = {q: grades for split in ("validation", "test") for q, grades in collection.qrels[split].items()}
    ids = {d for grades in graded.values() for d in grades}
    if pool == "judged":
        return ids
    path = os.path.join(folder, f"{collection.name}-{collection.fingerprint}-bm25-{hard_negatives}.json")
    if not os.path.isfile(path):
        os.makedirs(folder, exist_ok=True)
        found = sorted({d for best in bm25(collection, sorted(graded), None, hard_negatives).values() for d in best})
        with open(unique(path), "w", encoding="utf-8") as f:
            json.dump(found, f)
        os.replace(unique(path), path)
    with open(path, encoding="utf-8") as f:
        return ids | set(json.load(f))


def bm25(collection, queries, pool, k):
    """BM25's k best documents of a pool (ids, or None for all): {query: {document: score}}; bm25s' defaults, English stop words."""
    try:
        import bm25s
    except ImportError:
        raise UserError("BM25 needs the package bm25s: pip install -r requirements.txt") from None
    ids, texts = zip(*((id_, text) for id_, text in collection.documents() if pool is None or id_ in pool))
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    asked = [q for q in queries if q in collection.queries]
    tokens = bm25s.tokenize([collection.queries[q] for q in asked], stopwords="en", show_progress=False)
    found, scores = index.retrieve(tokens, k=min(k, len(ids)), show_progress=False)
    return {q: {ids[d]: float(s) for d, s in zip(row, of) if s > 0} for q, row, of in zip(asked, found, scores)}
