"""Exact search: every query's k best documents by inner product, in one pass over documents that come in pieces.

Memory is one tile of documents, its scores, and the running k best: a corpus of any size is searched while it is being
encoded, and no embedding is kept. No approximate index: a reported number must not depend on one.

A document's score and id are packed into one integer, its key, whose order is trec_eval's: by score in single precision, equal
scores by id, the larger first. So "the k best" is one topk of unique keys, and ties come out the same whatever the pieces,
their order, or the process a document was scored by. Products have one fixed shape, TILE documents at a time, so that
copies of a document have one score to the last bit wherever they lie (tests/test_search.py; seen on CPUs so far).
"""
import torch

TILE, QUERIES = 4096, 1024            # documents and queries in one product: 16 MiB of scores
EMPTY = torch.iinfo(torch.int64).min  # the key of no document


def keys_of(scores, ids):
    """fp32 scores and int64 ids below 2**32 -> int64 keys."""
    bits = (scores + 0.0).view(torch.int32)                          # + 0.0: -0.0 is 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)            # floats as integers of the same order
    return bits.long() << 32 | ids


def decode(keys):
    """int64 keys -> fp32 scores and int64 ids; -inf and -1 where there is no document."""
    bits = (keys >> 32).int()
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    none = keys == EMPTY
    return scores.masked_fill(none, float("-inf")), (keys & 0xFFFFFFFF).masked_fill(none, -1)


def tiles(pieces):
    """Regroup (ids [n], embeddings [n, C]) of any n into full tiles; the last is filled up with zeros under id -1."""
    ids, rows, n = [], [], 0
    for piece_ids, piece in pieces:
        while len(piece_ids):
            room = TILE - n
            ids.append(piece_ids[:room])
            rows.append(piece[:room].float())
            n += len(ids[-1])
            piece_ids, piece = piece_ids[room:], piece[room:]
            if n == TILE:
                yield torch.cat(ids), torch.cat(rows)
                ids, rows, n = [], [], 0
    if n:
        nothing = ids[0].new_full((TILE - n,), -1), rows[0].new_zeros(TILE - n, rows[0].shape[1])
        yield torch.cat([*ids, nothing[0]]), torch.cat([*rows, nothing[1]])


def improve(best, scores, ids):
    """best [Q, k] keys in descending order, scores [Q, n] of the documents ids [n] -> the k best of both."""
    floor, _ = decode(best[:, -1:])                                  # what a document must reach; after some tiles few do
    query, column = ((scores >= floor) & (ids >= 0)).nonzero(as_tuple=True)
    if not len(query):
        return best
    count = torch.bincount(query, minlength=len(best))               # [Q]
    place = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]     # 0, 1, ... within each query
    better = best.new_full((len(best), int(count.max())), EMPTY)
    better[query, place] = keys_of(scores[query, column], ids[column])
    return merge(torch.cat([best, better], dim=1), best.shape[1])


def merge(keys, k):
    """[Q, n] keys of different documents -> the k best of each row, best first [Q, k]"""
    return keys.topk(k, dim=1).values


def best_keys(queries, pieces, k):
    """top_k's result as keys [Q, k], which merge() joins with those of another part of the corpus."""
    queries = queries.float().split(QUERIES)                         # of [Q, C]
    best = [torch.full((len(q), k), EMPTY, device=q.device) for q in queries]
    for ids, documents in tiles(pieces):
        best = [improve(b, q @ documents.T, ids) for b, q in zip(best, queries)]
    return torch.cat(best)


def top_k(queries, pieces, k):
    """The k documents with the largest inner product, for every query.

    queries [Q, C]; pieces: an iterable of (ids [n] int64 from 0 below 2**32, embeddings [n, C]), each id once.
    -> scores [Q, k] fp32 and ids [Q, k] int64, best first; -inf and -1 where there are fewer than k documents. A score that is
    NaN is never among them.
    """
    return decode(best_keys(queries, pieces, k))
