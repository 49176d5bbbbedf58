"""What a trial trains on and what it searches, tokenized, and the scores of its ranking.

A Library reads collections and keeps their tokens on disk. The trials of a grid share it.
"""
from dataclasses import dataclass

import numpy as np
import torch

from core.configurator import UserError
from core.distributed import all_sum
from core.tokenizer import DOCUMENT, QUERY
from retrieval import tokens
from retrieval.collections import Collection, load_collection
from retrieval.pools import BM25_LIMIT, bm25, pool_ids, training_pairs
from tasks import metrics, packing

DEPTH = 100  # documents kept for each query


@dataclass
class TrainingSet:
    """The training pairs of a collection, tokenized."""

    collection: Collection
    sequences: dict  # tokens and bounds of all queries and documents
    pairs: np.ndarray  # [P, 2] int: a query and a document, as indices of sequences
    positives: list  # for each query, the set of documents that answer it, as indices of sequences


@dataclass
class Target:
    """A collection and a pool of it, tokenized: what is searched after training."""

    collection: Collection
    pool: str
    hard_negatives: int  # of the pool "hard"; None for other pools
    queries: dict  # tokens and bounds of all validation and test queries
    query_ids: list
    documents: dict  # tokens and bounds of the pool
    document_ids: list  # sorted: of equal scores, the larger place in this list ranks first
    places: torch.Tensor  # [n] int64: for each of `documents`, its place in document_ids
    baseline: dict  # BM25's score on the test queries, or None where it takes too long

    @property
    def truncated(self):
        """How many documents lost tokens to max_length."""
        return int(self.documents["truncated"][0])


class Library:
    """Reads and tokenizes collections.

    settings: eval_ir.py's. max_length: tokens of a text in training. search_length: of a text that
    is searched. processes: those that share each trial. The first of them writes the cache and the
    others read it.
    """

    def __init__(self, settings, tokenizer, max_length, search_length, processes):
        self.settings = settings
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.search_length = search_length
        self.processes = processes

    def training_set(self, name):
        """Reads the training pairs of a collection. -> TrainingSet"""
        collection = load_collection(name, self.settings.data_dir, self.settings.cache_dir)
        pairs = training_pairs(collection)
        texts = [QUERY + text for text in pairs.queries]
        texts += [DOCUMENT + text for text in pairs.documents]
        key = (collection.fingerprint,)
        sequences, _ = self.tokenize(f"{name}-pairs", lambda: enumerate(texts), key, self.max_length)
        # In sequences the documents come after the queries: add the number of queries to their
        # indices.
        n_queries = len(pairs.queries)
        positives = []
        for documents in pairs.positives:
            positives.append({n_queries + document for document in documents})
        return TrainingSet(collection, sequences, pairs.pairs + [0, n_queries], positives)

    def target(self, name, pool, trained_on):
        """Reads a collection's judged queries and the documents of a pool. -> Target

        trained_on: the collection of the training pairs. If it has this name, it is not read again.
        Raises UserError if there is no query, or no document.
        """
        settings = self.settings
        collection = trained_on
        if name != trained_on.name:
            collection = load_collection(name, settings.data_dir, settings.cache_dir)
        ids_of_pool = self.in_turn(
            lambda: pool_ids(collection, pool, settings.hard_negatives, settings.cache_dir)
        )
        hard_negatives = settings.hard_negatives if pool == "hard" else None

        # Tokenize the validation and test queries, each once, and the documents of the pool.
        judged = collection.qrels["validation"] | collection.qrels["test"]
        judged_ids = [query_id for query_id in judged if query_id in collection.queries]

        def query_texts():
            for query_id in judged_ids:
                yield query_id, QUERY + collection.queries[query_id]

        def document_texts():
            for document_id, text in collection.documents_of(ids_of_pool):
                yield document_id, DOCUMENT + text

        queries_key = (collection.fingerprint,)
        length, is_paper = self.search_length, settings.paper_encoding
        queries, query_ids = self.tokenize(
            f"{name}-queries", query_texts, queries_key, length, is_paper
        )
        documents_key = (collection.fingerprint, hard_negatives)
        documents, document_ids = self.tokenize(
            f"{name}-{pool}", document_texts, documents_key, length, is_paper
        )
        if not judged_ids:
            raise UserError(f"{name}: no judged query is in the collection")
        if not document_ids:
            raise UserError(f"{name}: no document of the pool {pool} is in the collection")

        # Search breaks ties by an integer per document: its place in the order of the ids.
        order = sorted(range(len(document_ids)), key=document_ids.__getitem__)
        places = torch.empty(len(order), dtype=torch.int64)
        places[torch.tensor(order)] = torch.arange(len(order))

        # The score of BM25, which compares words alone, in the same pool.
        baseline = None
        if len(document_ids) <= BM25_LIMIT and self.processes.is_first:
            baseline = {"name": "BM25", "score": self.bm25_score(collection, pool, ids_of_pool)}
        return Target(
            collection=collection,
            pool=pool,
            hard_negatives=hard_negatives,
            queries=queries,
            query_ids=query_ids,
            documents=documents,
            document_ids=[document_ids[i] for i in order],
            places=places,
            baseline=baseline,
        )

    def bm25_score(self, collection, pool, ids_of_pool):
        """BM25's score on the test queries, kept in cache_dir."""
        settings = self.settings
        rules = [collection.fingerprint, pool, settings.hard_negatives, settings.mode, DEPTH]

        def make():
            qrels = collection.qrels["test"]
            ranking = bm25(collection, list(qrels), ids_of_pool, DEPTH)
            return score(qrels, ranking, settings.mode).means["score"]

        name = f"{collection.name}-bm25-score"
        with packing.alone_in(settings.cache_dir):
            return packing.cached_json(settings.cache_dir, name, rules, make, float)

    def tokenize(self, name, texts, key, max_length, paper_encoding=False):
        """Tokenizes texts, or reads their tokens from the cache. See tokens.cached_tokens."""
        key = (QUERY, DOCUMENT, *key)
        return self.in_turn(
            lambda: tokens.cached_tokens(
                name,
                texts,
                self.tokenizer,
                max_length,
                key,
                self.settings.cache_dir,
                paper_encoding,
            )
        )

    def in_turn(self, make):
        """Calls make() in the first process, and then in all others. -> what make() returns

        So the others find in the cache what the first one has written there. Processes that share
        no trial but a machine take turns, too.
        """
        result = None
        if self.processes.is_first:
            with packing.alone_in(self.settings.cache_dir):
                result = make()
        all_sum([0], self.processes)  # wait for the first process
        return result if self.processes.is_first else make()


# ---- scores


def named_ranking(target, cosines, places):
    """A search result by ids. cosines, places [Q, k] -> {query id: {document id: cosine}}"""
    ranking = {}
    rows = zip(target.query_ids, places.tolist(), cosines.tolist())
    for query_id, query_places, query_cosines in rows:
        ranking[query_id] = {
            target.document_ids[place]: cosine
            for place, cosine in zip(query_places, query_cosines)
            if place >= 0  # -1 where the pool has fewer than k documents
        }
    return ranking


@dataclass
class Scores:
    means: dict  # {"score", "ndcg_10", ..., "n"}: means over all queries of the qrels
    per_query: list  # each query's own "score"


def score(qrels, ranking, mode):
    """Scores a ranking {query id: {document id: score}}. -> Scores

    mode: "standard", where "score" is NDCG@10, or "paper", where it is the paper's variant of that.
    """
    values = {
        "ndcg_10": metrics.ndcg(qrels, ranking),
        "paper_ndcg_10": metrics.ndcg_of_retrieved(qrels, ranking),
        "mrr_10": metrics.mrr(qrels, ranking),
        "recall_100": metrics.recall(qrels, ranking),
    }
    main_score = "paper_ndcg_10" if mode == "paper" else "ndcg_10"
    per_query = list(values[main_score].values())
    means = {"score": sum(per_query) / len(per_query)}
    for name, by_query in values.items():
        means[name] = sum(by_query.values()) / len(by_query)
    means["n"] = len(per_query)
    return Scores(means, per_query)
