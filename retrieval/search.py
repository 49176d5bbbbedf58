"""Exact search: every query's k best documents by inner product, in one pass over the corpus.

The documents come in pieces, so that a corpus of any size is searched while it is being encoded.
Memory holds one tile of documents, its scores, and each query's k best so far, and no other
embedding. There is no approximate index, because a reported number must not depend on one.

The one idea: a document's score and its id are packed into one integer, its key. Keys sort as
trec_eval sorts documents: by score in single precision, and equal scores by id, the larger first.
So the k best documents are a topk of distinct keys. Ties come out the same whatever the pieces,
their order, or the process that scored a document.

Matrix products always have the same shape, TILE documents at a time. So copies of a document have
the same score to the last bit, wherever they lie (tests/test_search.py; seen on CPUs so far).
"""
import torch

TILE = 4096  # documents in one product
QUERIES = 1024  # queries in one product: 16 MiB of scores
EMPTY = torch.iinfo(torch.int64).min  # a key that stands for no document and sorts last


def top_k(queries, pieces, k):
    """Finds the k documents with the largest inner product, for every query.

    queries [Q, C]; pieces: an iterable of (ids [n] int64, embeddings [n, C]), in which each id
    appears once and 0 <= id < 2**32.
    -> scores [Q, k] fp32 and ids [Q, k] int64, best first; -inf and -1 where there are fewer than
    k documents. A score that is NaN is never among them.
    """
    return decode(best_keys(queries, pieces, k))


def best_keys(queries, pieces, k):
    """The result of top_k as keys [Q, k], which merge() joins with those of other documents."""
    query_blocks = queries.float().split(QUERIES)  # each [up to QUERIES, C]
    best = [torch.full((len(block), k), EMPTY, device=block.device) for block in query_blocks]
    for ids, documents in tiles(pieces):
        for i, block in enumerate(query_blocks):
            best[i] = add_tile(best[i], block @ documents.T, ids)
    return torch.cat(best)


def merge(keys, k):
    """The k best keys of each row, best first: [Q, n] keys of different documents -> [Q, k]"""
    return keys.topk(k, dim=1).values


# ---- keys


def keys_of(scores, ids):
    """Packs fp32 scores and int64 ids below 2**32 into int64 keys."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    # The bits of positive floats, read as integers, sort as the floats do. Those of negative floats
    # do so after all bits but the sign are flipped.
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.long() << 32) | ids


def decode(keys):
    """Unpacks int64 keys into fp32 scores and int64 ids; -inf and -1 where there is no document."""
    bits = (keys >> 32).int()
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    ids = keys & 0xFFFFFFFF
    is_empty = keys == EMPTY
    return scores.masked_fill(is_empty, float("-inf")), ids.masked_fill(is_empty, -1)


# ---- tiles of documents


def tiles(pieces):
    """Regroups (ids [n], embeddings [n, C]) of any n into tiles of TILE documents.

    The last tile is filled up with zeros under the id -1.
    """
    tile_ids = []
    tile_rows = []
    size = 0
    for ids, rows in pieces:
        # A piece may end one tile and begin the next.
        while len(ids):
            room = TILE - size
            tile_ids.append(ids[:room])
            tile_rows.append(rows[:room].float())
            size += len(tile_ids[-1])
            ids = ids[room:]
            rows = rows[room:]
            if size == TILE:
                yield torch.cat(tile_ids), torch.cat(tile_rows)
                tile_ids = []
                tile_rows = []
                size = 0
    if size:
        tile_ids.append(tile_ids[0].new_full((TILE - size,), -1))
        tile_rows.append(tile_rows[0].new_zeros(TILE - size, tile_rows[0].shape[1]))
        yield torch.cat(tile_ids), torch.cat(tile_rows)


def add_tile(best, scores, ids):
    """The best keys after one more tile of documents. -> [Q, k]

    best [Q, k]: the best keys so far, in descending order. scores [Q, n], ids [n]: of the tile.
    """
    # Only a document that reaches a query's k-th best score can be among the k best. After some
    # tiles few do: make keys for these candidates alone instead of for all Q * n.
    floor, _ = decode(best[:, -1:])  # [Q, 1]
    query, column = ((scores >= floor) & (ids >= 0)).nonzero(as_tuple=True)  # in order of queries
    if not len(query):
        return best

    # One row of candidate keys for each query, filled up with EMPTY to the longest row. In its row
    # a candidate's place is its number minus the number of its query's first candidate.
    count = torch.bincount(query, minlength=len(best))  # [Q]
    first = count.cumsum(0) - count  # [Q]
    place = torch.arange(len(query), device=query.device) - first[query]
    candidates = best.new_full((len(best), int(count.max())), EMPTY)
    candidates[query, place] = keys_of(scores[query, column], ids[column])
    return merge(torch.cat([best, candidates], dim=1), best.shape[1])
