"""Randomness without state: every number is a hash of what it is drawn for.

splitmix64's finalizer hashes keys and indices, and a Feistel network shuffles. Nothing here
remembers anything, so the same (seed, epoch, index) gives the same number: after a resume, on
another number of GPUs, in another process.
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
FEISTEL_ROUNDS = 6

# What a number is drawn for. Each use has its own key, so that no two share a stream.
SHUFFLE = 1
CUT = 2
MASK = 3
REPLACE = 4


def mix(x):
    """The hash of a uint64 array or scalar: each bit depends on all bits (Steele et al. 2014)."""
    # The products are meant modulo 2^64.
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed(index, *keys):
    """A uint64 for every entry of the int array `index`.

    keys: the seed, the epoch, what the number is for. Each is an int, or an int array that
    broadcasts against `index`.
    """
    with np.errstate(over="ignore"):
        key = np.uint64(0)
        for k in keys:
            key = mix(key + np.asarray(k).astype(np.uint64) + np.uint64(GOLDEN))
        return mix(np.asarray(index).astype(np.uint64) * np.uint64(GOLDEN) + key)


def threshold(probability):
    """The uint64 that a hash is below with this probability (of 1: the largest uint64)."""
    return np.uint64(min(int(probability * 2.0**64), 2**64 - 1))


def permute(index, n, seed, epoch):
    """Where a shuffle of range(n) puts each entry of `index`. int64 [R] -> int64 [R]

    A Feistel network shuffles range(4^h), for the least h with 4^h >= n. An entry that lands at n
    or above is shuffled again until it lands below. No table is stored, and every (seed, epoch)
    gives a bijection.
    """
    bits = max(n - 1, 1).bit_length()
    half = np.uint64(max(1, (bits + 1) // 2))      # h: bits of each half of a number
    low = (np.uint64(1) << half) - np.uint64(1)    # selects the right half
    x = np.asarray(index).astype(np.uint64)
    epoch = np.broadcast_to(np.asarray(epoch), x.shape)
    is_outside = np.ones(x.shape, bool)
    while is_outside.any():
        left = x[is_outside] >> half
        right = x[is_outside] & low
        for r in range(FEISTEL_ROUNDS):
            key = hashed(right, seed, epoch[is_outside], SHUFFLE, r) & low
            left, right = right, left ^ key
        x[is_outside] = (left << half) | right
        is_outside = x >= n
    return x.astype(np.int64)
