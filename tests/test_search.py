"""Exact search is exact: whatever the pieces, their order and the ties, the result is that of sorting everything."""
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

from retrieval import search
from tasks import metrics


def pieces(ids, documents, sizes, seed=0):
    """The documents in random order, cut into pieces of random sizes out of `sizes`."""
    rng = random.Random(seed)
    order = torch.tensor(rng.sample(range(len(ids)), len(ids)))
    start = 0
    while start < len(order):
        piece = order[start:start + rng.choice(sizes)]
        yield ids[piece].to(DEVICE), documents[piece].to(DEVICE)
        start += len(piece)


def brute_force(queries, documents, ids, k):
    """Everything sorted in Python: by score, equal scores by id, the larger first."""
    found_ids = []
    for scores in (queries.double() @ documents.double().T).tolist():
        found_ids.append(sorted(zip(scores, ids.tolist()), reverse=True)[:k])
    return found_ids


@pytest.mark.parametrize("sizes", [(1, 30, 300), (100, 1000), (4096,), (10_000,)])
def test_search_equals_brute_force_for_any_pieces_with_duplicates_and_ties(sizes):
    torch.manual_seed(0)
    queries = torch.randint(-2, 3, (1030, 16)).float() / 4          # products and sums are exact, and most scores are tied
    documents = torch.randint(-2, 3, (6000, 16)).float() / 4
    documents[5000:5100] = documents[0]
    ids = torch.randperm(20_000)[:6000]
    scores, found_ids = search.top_k(queries.to(DEVICE), pieces(ids, documents, sizes), 50)
    assert scores.shape == found_ids.shape == (1030, 50) and scores.dtype == torch.float32 and found_ids.dtype == torch.int64
    for q in (0, 1, 500, 1023, 1024, 1029):
        expected = brute_force(queries[q:q + 1], documents, ids, 50)[0]
        assert list(zip(scores[q].tolist(), found_ids[q].tolist())) == expected


def test_pieces_and_order_change_no_bit_of_real_valued_scores_and_copies_tie():
    torch.manual_seed(1)
    queries, documents = (F.normalize(torch.randn(n, 96), dim=1) for n in (33, 9000))
    documents[[10, 4095, 4096, 8999]] = documents[7].clone()       # in different tiles and places of a tile
    ids = torch.arange(9000)
    in_one_piece = search.top_k(queries.to(DEVICE), [(ids.to(DEVICE), documents.to(DEVICE))], 100)
    for seed, sizes in enumerate([(1, 50), (4096,), (333, 4097)]):
        again = search.top_k(queries.to(DEVICE), pieces(ids, documents, sizes, seed), 100)
        assert torch.equal(in_one_piece[0], again[0]) and torch.equal(in_one_piece[1], again[1])
    expected = (queries.double() @ documents.double().T).topk(100)
    assert (in_one_piece[0].cpu() - expected.values).abs().max() < 1e-6
    alone = search.top_k(documents[7:8].to(DEVICE), pieces(ids, documents, (777,)), 6)
    assert alone[1][0, :5].tolist() == [8999, 4096, 4095, 10, 7] and len(set(alone[0][0, :5].tolist())) == 1


def test_parts_of_a_corpus_merge_to_the_search_of_the_whole():
    torch.manual_seed(2)
    queries = torch.randn(5, 8).round()
    documents = torch.randn(999, 8).round()
    ids = torch.arange(999)
    shares = [search.best_keys(queries, [(ids[r::3], documents[r::3])], 20) for r in range(3)]
    merged = search.decode(search.merge(torch.cat(shares, dim=1), 20))
    all_at_once = search.top_k(queries, [(ids, documents)], 20)
    assert torch.equal(merged[0], all_at_once[0]) and torch.equal(merged[1], all_at_once[1])


def test_fewer_documents_than_asked_for_none_and_scores_that_are_not_numbers():
    queries = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    documents = torch.tensor([[0.5, 2.0], [-3.0, 0.0], [float("nan"), 1.0]])
    scores, ids = search.top_k(queries, [(torch.tensor([4, 9, 2]), documents)], 4)
    assert ids.tolist() == [[4, 9, -1, -1], [9, 4, -1, -1]]        # NaN is never found, 0 x NaN included
    assert scores[0].tolist() == [0.5, -3.0, float("-inf"), float("-inf")]
    assert scores[1].tolist()[:2] == [0.0, -2.0]
    scores, ids = search.top_k(queries, [], 3)
    assert ids.tolist() == [[-1] * 3] * 2 and (scores == float("-inf")).all()


def test_keys_have_the_order_of_scores_and_then_of_ids():
    values = torch.tensor([float("-inf"), -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, float("inf")])
    keys = search.keys_of(values, torch.zeros(9, dtype=torch.int64))
    assert keys.tolist() == sorted(keys.tolist()) and len(set(keys.tolist())) == 9 and keys.min() > search.EMPTY
    assert search.keys_of(torch.tensor([-0.0]), torch.tensor([3])).item() == search.keys_of(torch.tensor([0.0]), torch.tensor([3])).item()
    large = torch.tensor([0, 1, 2 ** 32 - 1])
    scores, ids = search.decode(search.keys_of(torch.full((3,), -0.5), large))
    assert ids.tolist() == large.tolist() and scores.tolist() == [-0.5] * 3


def test_ties_are_broken_as_trec_eval_breaks_them():
    """Ids of documents are their places in the sorted list of names, so that search and metric list the same ten."""
    names = sorted(["d10", "d9", "é", "Z", "a"])
    scores, ids = search.top_k(torch.ones(1, 2), [(torch.arange(5), torch.ones(5, 2))], 3)
    found_ids = [names[i] for i in ids[0].tolist()]
    run = {"q": dict.fromkeys(names, 2.0)}
    assert found_ids == next(best for *_, best in metrics.ranking({"q": {"a": 1}}, run, 3)) == ["é", "d9", "d10"]
