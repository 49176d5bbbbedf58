"""Randomness without state: every draw is a hash of what it is drawn for.

splitmix64's finalizer over keys and indices, and a Feistel network for shuffles. Nothing here remembers anything, so whoever asks
for the same (seed, epoch, index) gets the same number: after a resume, on another number of GPUs, in another process.
"""
import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
SHUFFLE, CUT, MASK, REPLACE = 1, 2, 3, 4      # what a number is drawn for, so that no two uses share a stream


def mix(x):
    """uint64 array or numpy scalar -> its hash, every bit depending on every bit (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):          # multiplication modulo 2^64 is the point
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed(index, *keys):
    """A uint64 for every entry of the int array `index`; `keys` are ints or int arrays that broadcast against it."""
    with np.errstate(over="ignore"):
        key = np.uint64(0)
        for k in keys:
            key = mix(key + np.asarray(k).astype(np.uint64) + np.uint64(GOLDEN))
        return mix(np.asarray(index).astype(np.uint64) * np.uint64(GOLDEN) + key)


def threshold(probability):
    """hash < threshold(p) with probability p; p = 1 is always, which needs the type's last value as well."""
    return np.uint64(min(int(probability * 2.0 ** 64), 2 ** 64 - 1))


def permute(index, n, seed, epoch):
    """Where a shuffle of range(n) puts each of `index`: a Feistel network on the next even power of two, walked until
    the result is below n. No memory, no state, a bijection for every (seed, epoch). int64 [R] -> int64 [R]"""
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    x = np.asarray(index).astype(np.uint64)
    epoch = np.broadcast_to(np.asarray(epoch), x.shape)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & low
        for r in range(6):
            left, right = right, left ^ (hashed(right, seed, epoch[todo], SHUFFLE, r) & low)
        x[todo] = (left << half) | right
        todo = x >= n
    return x.astype(np.int64)
