"""Fused attention over packed sequences in Triton: forward and backward, causal or bidirectional by one constexpr.

The idea (FlashAttention-2, arXiv 2307.08691): scores never reach memory. A program holds one block of queries, walks over
the blocks of keys they see, and keeps a running maximum and sum of each row's softmax; what it leaves behind is the
output and each row's log-sum-exp (LSE, base 2), from which the backward pass makes the weights again.

Nothing is padded, so the grid is over blocks of the T packed tokens, not over sequences: (head, T / block) programs, a
size that depends on shapes alone, with no host synchronisation. Every token knows the bounds [start, end) of its sequence.
They never decrease along T, so a block's first and last row tell which blocks of keys it needs: for sequences a, b and c

                       full                                 causal
    queries   keys  aaaa  abbb  bbbb  bbcc                  aaaa  abbb  bbbb  bbcc
    aaaa              #     /     .     .                     /     .     .     .       .  skipped, never loaded
    abbb              /     /     /     /                     /     /     .     .       /  an edge: masked element by element
    bbbb              .     /     #     /                     .     /     /     .       #  inside: no mask
    bbcc              .     /     /     /                     .     /     /     /

so each loop runs over one range of blocks and masks those outside an inner range, by a branch that all threads take
together. One loop, not three: the loads of its next blocks stay in flight across the edges, and it needs fewer registers
(LOG.md). A token past the last sequence has an empty range: zeros, LSE +inf (whatever minus it is a weight of zero), no
gradient.

The backward pass is two kernels without atomics, hence the same bits every time: dK and dV with a block of keys in
registers (all the query heads of its group in turn: GQA repeats nothing), dQ with a block of queries. Price: scores
and their gradient are computed twice, 7 matrix products instead of 5.

On Hopper and data-centre Blackwell blocks are loaded through TMA descriptors, which compute addresses and clip edges in
hardware and so free 20-80 registers a thread (a 96-wide head is loaded into a 128-wide block, zero-filled); elsewhere by
pointers and masks. Blocks and warps come from a table; ATTENTION_AUTOTUNE=1 searches instead and prints what it found.
"""
import functools
import os
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

HEAD_DIMS = (64, 96, 128)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Blocks(NamedTuple):
    """Rows of queries and of keys a program works on at once, and how it is compiled."""
    BM: int
    BN: int
    num_warps: int
    num_stages: int
    tma: bool = False


# {compute capability: key of TABLE}. Devices share a key if they have the same tensor core
# instructions and the same shared memory for a program.
ARCHITECTURES = {
    (8, 0): 80,       # A100: mma.sync, 163 KB
    (8, 6): 89,       # GeForce 30, A10, A40: mma.sync, 99 KB
    (8, 9): 89,       # GeForce 40, L4, L40: the same
    (9, 0): 90,       # Hopper: wgmma, 227 KB, TMA
    (10, 0): 100,     # B200: tcgen05, whose results lie in tensor memory; 227 KB, TMA
    (10, 3): 100,     # B300: the same
    (12, 0): 120,     # GeForce 50, RTX PRO: mma.sync as before, 99 KB, TMA
    (12, 1): 120,     # GB10 (DGX Spark): the same
}
HAS_TMA = (90, 100, 120)


def architecture(major, minor):
    """TABLE's key for a GPU of this compute capability.

    A GPU that nobody has looked at gets the blocks that need least: small ones, loaded by pointers.
    """
    return ARCHITECTURES.get((major, minor), 89)


# {(architecture, kernel, width of the head's block): Blocks}.
#
# They were chosen by what the compiler makes of them: registers, spills, shared and tensor memory,
# and so how many programs an SM holds (LOG.md, 2026-11-26, has the candidates; tests/aot.py prints
# the figures of these). That is all: their speed is not measured. ATTENTION_AUTOTUNE=1 may find
# better ones. Two programs of four warps are preferred to one of eight, because one computes its
# softmax while the other waits for its products.
TABLE = {
    # A100. 32 keys in dkdv at 64: with 64 and loads in flight it spills. (32-wide products have
    # crashed on Hopper, triton-lang/triton#10573; neither Hopper nor data-centre Blackwell has any.)
    (80, "forward", 64): Blocks(128, 64, 4, 3),
    (80, "forward", 128): Blocks(128, 64, 8, 2),
    (80, "dkdv", 64): Blocks(64, 32, 4, 2),
    (80, "dkdv", 128): Blocks(64, 64, 8, 2),
    (80, "dq", 64): Blocks(64, 64, 4, 2),
    (80, "dq", 128): Blocks(64, 64, 8, 2),

    # Ada and consumer Ampere: A100's, which fit into 99 KB, but with one block less in flight in
    # forward at 64, so that two programs share the 100 KB of an SM.
    (89, "forward", 64): Blocks(128, 64, 4, 2),
    (89, "forward", 128): Blocks(128, 64, 8, 2),
    (89, "dkdv", 64): Blocks(64, 32, 4, 2),
    (89, "dkdv", 128): Blocks(64, 64, 8, 2),
    (89, "dq", 64): Blocks(64, 64, 4, 2),
    (89, "dq", 128): Blocks(64, 64, 8, 2),

    # Hopper. dkdv at 96 and 128 spills: 9 instructions.
    (90, "forward", 64): Blocks(128, 128, 8, 3, True),
    (90, "forward", 128): Blocks(128, 128, 8, 2, True),
    (90, "dkdv", 64): Blocks(64, 128, 8, 2, True),
    (90, "dkdv", 128): Blocks(64, 128, 8, 2, True),
    (90, "dq", 64): Blocks(128, 64, 8, 3, True),
    (90, "dq", 128): Blocks(128, 64, 8, 2, True),

    # Data-centre Blackwell. Every product has 128 rows (queries, in dkdv keys): 64 would fill half of
    # the 128 lanes of tensor memory. In forward and in dq at 64 two programs share its 512 columns.
    # dkdv at 96 and 128 spills 36 instructions, all outside its inner loop; 64 keys would not spill.
    # why_not refuses Triton older than 3.7 here: what 3.6 makes of some loops like these has a race
    # between warps (triton-lang/triton#9871, #9235).
    (100, "forward", 64): Blocks(128, 64, 4, 3, True),
    (100, "forward", 128): Blocks(128, 64, 4, 2, True),
    (100, "dkdv", 64): Blocks(64, 128, 8, 2, True),
    (100, "dkdv", 128): Blocks(64, 128, 8, 2, True),
    (100, "dq", 64): Blocks(128, 64, 8, 3, True),
    (100, "dq", 128): Blocks(128, 64, 8, 3, True),

    # Consumer Blackwell: Ada's, but for dq at 64, where 64 keys spill. dkdv at 96 spills 12
    # instructions, none in its inner loop. It has TMA, with which nothing spills and a thread needs 8
    # to 60 registers less. Still pointers: others have measured TMA at 0.3 to 0.8 of their bandwidth
    # here (kekzl/imp#169), and the form of it that Triton 3.6 emits makes the driver set aside 3.5 GB
    # (tile-ai/tilelang#2052).
    (120, "forward", 64): Blocks(128, 64, 4, 2),
    (120, "forward", 128): Blocks(128, 64, 8, 2),
    (120, "dkdv", 64): Blocks(64, 32, 4, 2),
    (120, "dkdv", 128): Blocks(64, 64, 8, 2),
    (120, "dq", 64): Blocks(64, 32, 4, 2),
    (120, "dq", 128): Blocks(64, 64, 8, 2),
}
SEARCH = [Blocks(*sizes, tma) for tma in (True, False)
          for sizes in ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (64, 128, 8, 3),
                        (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2))]


@triton.jit
def bounds_kernel(CU, START, END, S, T, steps, B: tl.constexpr):
    """Bounds of the sequence each token is in, by binary search in cu_seqlens [S + 1]."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    lo = tl.zeros([B], tl.int32)              # the first sequence that ends after t
    hi = tl.zeros([B], tl.int32) + S
    for _ in range(steps):
        mid = (lo + hi) // 2
        before = tl.load(CU + mid + 1, mask=lo < hi, other=T + 1) <= t
        lo = tl.where(before, mid + 1, lo)
        hi = tl.where(before, hi, mid)
    tl.store(START + t, tl.minimum(tl.load(CU + lo), T), mask=t < T)
    tl.store(END + t, tl.minimum(tl.load(CU + tl.minimum(lo + 1, S)), T), mask=t < T)


@triton.jit
def load(X, row, head, row_stride, head_stride, T, D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr,
         OUTER: tl.constexpr):
    """Rows [row, row + B) of one head of X [T, heads, D] -> [B, BD], zeros past T and D. OUTER: loaded once, before the loop
    (see `descriptor` for what its columns past D hold then)."""
    if TMA and OUTER:
        x = X.load([row, head * D])
    elif TMA:
        x = X.load([row, head, 0]).reshape([B, BD])
    else:
        r, d = row + tl.arange(0, B), tl.arange(0, BD)
        at = X + tl.cast(head, tl.int64) * head_stride + r.to(tl.int64)[:, None] * row_stride + d[None, :]
        x = tl.load(at, mask=(r < T)[:, None] & (d < D)[None, :], other=0.0)
    return x


@triton.jit
def store(X, x, row, head, heads, T, D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr):
    """x [B, BD] into rows [row, row + B) of one head of a contiguous X [T, heads, D]."""
    r, d = row + tl.arange(0, B), tl.arange(0, BD)
    at = X + (r.to(tl.int64)[:, None] * heads + head) * D + d[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(r < T)[:, None] & (d < D)[None, :])


@triton.jit
def key_range(START, END, m0, T, CAUSAL: tl.constexpr, BM: tl.constexpr):
    """The keys that queries [m0, m0 + BM) see: [start, end) of each row [BM], their union [lo, hi), and [inner_lo, inner_hi),
    which all rows see."""
    m, last = m0 + tl.arange(0, BM), tl.minimum(m0 + BM, T) - 1
    start = tl.load(START + m, mask=m < T, other=0)
    end = tl.load(END + m, mask=m < T, other=0)
    hi, inner_hi = tl.load(END + last), tl.load(END + m0)
    if CAUSAL:
        end, hi, inner_hi = tl.minimum(end, m + 1), tl.minimum(hi, last + 1), tl.minimum(inner_hi, m0 + 1)
    return start, end, tl.load(START + m0), hi, tl.load(START + last), inner_hi


@triton.jit
def visible(rows, start, end):
    """[r], bounds [n] each -> [n, r]"""
    return (rows[None, :] >= start[:, None]) & (rows[None, :] < end[:, None])


@triton.jit
def forward_kernel(Q, K, V, O, LSE, START, END, sm_scale, T, H, sqt, sqh, skt, skh, svt, svh, GROUP: tl.constexpr, D: tl.constexpr,
                   BD: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    head, m0 = tl.program_id(0), tl.program_id(1) * BM       # heads vary fastest: a group's heads find its keys in the L2 cache
    group, scale = head // GROUP, sm_scale * 1.4426950408889634
    start, end, lo, hi, inner_lo, inner_hi = key_range(START, END, m0, T, CAUSAL, BM)
    q = load(Q, m0, head, sqt, sqh, T, D, BM, BD, TMA, True)
    acc = tl.zeros([BM, BD], tl.float32)
    total, top = tl.zeros([BM], tl.float32), tl.full([BM], float("-inf"), tl.float32)
    for n0 in tl.range(lo, hi, BN):       # from where a sequence begins: an edge less than from a multiple of BN
        k = load(K, n0, group, skt, skh, T, D, BN, BD, TMA, False)                             # [BN, BD]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                                     # [BM, BN]
        if n0 < inner_lo or n0 + BN > inner_hi:
            s = tl.where(visible(n0 + tl.arange(0, BN), start, end), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)   # a row that has seen nothing yet: no inf - inf
        p = tl.math.exp2(s * scale - shift[:, None])
        shrink = tl.math.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v = load(V, n0, group, svt, svh, T, D, BN, BD, TMA, False)                             # [BN, BD]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store(O, acc / total[:, None], m0, head, H, T, D, BM, BD)
    m = m0 + tl.arange(0, BM)
    tl.store(LSE + tl.cast(head, tl.int64) * T + m, tl.where(empty, float("inf"), top + tl.math.log2(total)), mask=m < T)


@triton.jit
def delta_kernel(O, DO, DELTA, T, H, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    """delta = rowsum(dO * O), what the softmax's gradient subtracts. [H, T]"""
    head, t = tl.program_id(0), tl.program_id(1) * B
    o = load(O, t, head, H * D, D, T, D, B, BD, False, False).to(tl.float32)
    do = load(DO, t, head, H * D, D, T, D, B, BD, False, False).to(tl.float32)
    r = t + tl.arange(0, B)
    tl.store(DELTA + tl.cast(head, tl.int64) * T + r, tl.sum(o * do, 1), mask=r < T)


@triton.jit
def dkdv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, START, END, sm_scale, T, H, sqt, sqh, skt, skh, svt, svh, GROUP: tl.constexpr,
                D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    group, n0 = tl.program_id(0), tl.program_id(1) * BN
    n, last = n0 + tl.arange(0, BN), tl.minimum(n0 + BN, T) - 1
    k = load(K, n0, group, skt, skh, T, D, BN, BD, TMA, True)                                  # [BN, BD]
    v = load(V, n0, group, svt, svh, T, D, BN, BD, TMA, True)
    start = tl.load(START + n, mask=n < T, other=0)          # queries that see key n: [start, end)
    end = tl.load(END + n, mask=n < T, other=0)
    lo, inner_lo = tl.load(START + n0), tl.load(START + last)
    if CAUSAL:
        start, lo, inner_lo = tl.maximum(start, n), tl.maximum(lo, n0), tl.maximum(inner_lo, last)
    hi, inner_hi, scale = tl.load(END + last), tl.load(END + n0), sm_scale * 1.4426950408889634
    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    for g in tl.range(0, GROUP):
        head = group * GROUP + g
        offset = tl.cast(head, tl.int64) * T
        for m0 in tl.range(lo // BM * BM, hi, BM):      # from a multiple of BM: LSE and DELTA are loaded 16 bytes at a time
            m = m0 + tl.arange(0, BM)
            q = load(Q, m0, head, sqt, sqh, T, D, BM, BD, TMA, False)                          # [BM, BD]
            lse = tl.load(LSE + offset + m, mask=m < T, other=float("inf"))
            p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])   # [BN, BM]
            if m0 < inner_lo or m0 + BM > inner_hi:
                p = tl.where(visible(m, start, end), p, 0.0)
            do = load(DO, m0, head, H * D, D, T, D, BM, BD, TMA, False)                        # [BM, BD]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            delta = tl.load(DELTA + offset + m, mask=m < T, other=0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])        # [BN, BM]
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store(DK, dk * sm_scale, n0, group, H // GROUP, T, D, BN, BD)
    store(DV, dv, n0, group, H // GROUP, T, D, BN, BD)


@triton.jit
def dq_kernel(Q, K, V, DO, DQ, LSE, DELTA, START, END, sm_scale, T, H, sqt, sqh, skt, skh, svt, svh, GROUP: tl.constexpr,
              D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    head, m0 = tl.program_id(0), tl.program_id(1) * BM
    group, scale = head // GROUP, sm_scale * 1.4426950408889634
    start, end, lo, hi, inner_lo, inner_hi = key_range(START, END, m0, T, CAUSAL, BM)
    q = load(Q, m0, head, sqt, sqh, T, D, BM, BD, TMA, True)                                   # [BM, BD]
    do = load(DO, m0, head, H * D, D, T, D, BM, BD, TMA, True)
    m = m0 + tl.arange(0, BM)
    at = tl.cast(head, tl.int64) * T + m
    lse = tl.load(LSE + at, mask=m < T, other=float("inf"))
    delta = tl.load(DELTA + at, mask=m < T, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    for n0 in tl.range(lo // BN * BN, hi, BN):      # a multiple of BN saves registers, and two programs fit
        k = load(K, n0, group, skt, skh, T, D, BN, BD, TMA, False)                             # [BN, BD]
        p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])   # [BM, BN]
        if n0 < inner_lo or n0 + BN > inner_hi:
            p = tl.where(visible(n0 + tl.arange(0, BN), start, end), p, 0.0)
        v = load(V, n0, group, svt, svh, T, D, BN, BD, TMA, False)                             # [BN, BD]
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])            # [BM, BN]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store(DQ, dq * sm_scale, m0, head, H, T, D, BM, BD)


def descriptor(x, rows, outer, width):
    """TMA descriptor of x [T, heads, D], a box of rows x width at a time, zero-filled past the edges.

    What a loop loads is boxed in three dimensions, so that a 96-wide head comes with 32 columns of zeros. What is loaded
    once before it is boxed in two, [T, heads * D]: the compiler then leaves it in shared memory, where three keep it in
    registers (dq at head dim 128: 160 a thread instead of 215). Its 32 columns more are the next head's, times zeros.
    """
    shape, strides, box = list(x.shape), list(x.stride()), [rows, 1, width]
    return TensorDescriptor(x, [shape[0], shape[1] * shape[2]], [strides[0], 1], [rows, width]) if outer else \
        TensorDescriptor(x, shape, strides, box)


tuned = {}      # {(architecture, kernel, width, causal): Blocks} found by ATTENTION_AUTOTUNE=1


def launch(name, kernel, outer, operands, rest, q, k, v, causal):
    """Run one kernel over blocks of "BM" queries or "BN" keys (outer). operands: [(tensor, "BM" or "BN")], which TMA may
    load; rest: its other tensors."""
    T, H, D = q.shape
    width = triton.next_power_of_2(D)
    # The interpreter, on a CPU, has no compute capability: any blocks will do.
    arch = architecture(*torch.cuda.get_device_capability(q.device)) if q.is_cuda else 80
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    regular = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) == D for x, _ in operands)

    def run(c):
        tma = c.tma and regular
        xs = [descriptor(x, getattr(c, rows), rows == outer, width) if tma else x for x, rows in operands]
        grid = (H if outer == "BM" else k.shape[1], triton.cdiv(T, getattr(c, outer)))
        kernel[grid](*xs, *rest, D ** -0.5, T, H, *strides, GROUP=H // k.shape[1], D=D, BD=width, CAUSAL=causal, BM=c.BM, BN=c.BN,
                     TMA=tma, num_warps=c.num_warps, num_stages=c.num_stages)

    key = (arch, name, width, causal)
    if os.environ.get("ATTENTION_AUTOTUNE") == "1" and not INTERPRETED and key not in tuned:
        # The table's blocks are a candidate, too: a search must not end with slower ones.
        candidates = [TABLE[key[:3]]]
        candidates += [c for c in SEARCH if (arch in HAS_TMA or not c.tma) and c not in candidates]
        tuned[key] = search(run, candidates, key)
    run(tuned.get(key) or TABLE[key[:3]])


def search(run, candidates, key):
    """The fastest of the candidates that compile and fit; a line says which, for TABLE."""
    times = {}
    for c in candidates:
        try:
            times[c] = triton.testing.do_bench(functools.partial(run, c))
        except Exception:        # too many registers or too much shared memory for this device: not a candidate
            continue
    best = min(times, key=times.get)
    print(f"attention autotune {key}: {best}, {times[best]:.3f} ms ({len(times)} of {len(candidates)} ran)", flush=True)
    return best


def on_device_of(x):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.library.custom_op("nanoencoder::triton_attention", mutates_args=())
def triton_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
                     ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], log2-sum-exp of the scores [H, T], bounds of each token's sequence [2, T]"""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse, bounds = fake(q, k, v, cu_seqlens, causal)
    T, S = q.shape[0], cu_seqlens.numel() - 1
    if T:
        with on_device_of(q):
            bounds_kernel[(triton.cdiv(T, 256),)](cu_seqlens, bounds[0], bounds[1], S, T, S.bit_length(), B=256)
            operands = [(q, "BM"), (k, "BN"), (v, "BN")]
            launch("forward", forward_kernel, "BM", operands, [out, lse, bounds[0], bounds[1]], q, k, v, causal)
    return out, lse, bounds


@triton_attention.register_fake
def fake(q, k, v, cu_seqlens, causal):
    T, H, _ = q.shape
    return (torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((H, T), dtype=torch.float32),
            q.new_empty((2, T), dtype=torch.int32))


@torch.library.custom_op("nanoencoder::triton_attention_backward", mutates_args=())
def triton_attention_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                              lse: torch.Tensor, bounds: torch.Tensor, causal: bool
                              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of q [T, H, D], k and v [T, Hkv, D]"""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grad = grad.contiguous()
    dq, dk, dv = fake_backward(grad, q, k, v, out, lse, bounds, causal)
    delta, (T, H, D) = torch.empty_like(lse), q.shape
    if T:
        with on_device_of(q):
            delta_kernel[(H, triton.cdiv(T, 64))](out, grad, delta, T, H, D=D, BD=triton.next_power_of_2(D), B=64)
            operands = [(q, "BM"), (k, "BN"), (v, "BN"), (grad, "BM")]
            launch("dkdv", dkdv_kernel, "BN", operands, [dk, dv, lse, delta, bounds[0], bounds[1]], q, k, v, causal)
            launch("dq", dq_kernel, "BM", operands, [dq, lse, delta, bounds[0], bounds[1]], q, k, v, causal)
    return dq, dk, dv


@triton_attention_backward.register_fake
def fake_backward(grad, q, k, v, out, lse, bounds, causal):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def setup_context(ctx, inputs, output):
    q, k, v, _, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def backward(ctx, grad, *_):
    return *triton_attention_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


triton_attention.register_autograd(backward, setup_context=setup_context)


def why_not(device_type, dtype, head_dim):
    """None if these kernels take such tensors here, else the reason in words."""
    if device_type != "cuda" and not INTERPRETED:
        return "the Triton kernels need a CUDA GPU (TRITON_INTERPRET=1 interprets them on a CPU, slowly)"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not supported by the Triton kernels: {', '.join(map(str, HEAD_DIMS))} are"
    if INTERPRETED and dtype not in (torch.float32, torch.float16):
        return f"Triton's interpreter takes float32 and float16, not {dtype} (it multiplies bfloat16 wrongly)"
    if not INTERPRETED and dtype not in (torch.bfloat16, torch.float16):
        return f"the Triton kernels take bfloat16 and float16 on a GPU, not {dtype}"
    if not INTERPRETED and torch.cuda.get_device_capability()[0] == 10 and triton_version() < (3, 7):
        return (
            f"Triton {triton.__version__} miscompiles some loops on this GPU "
            "(triton-lang/triton#9871): install Triton 3.7 or newer"
        )
    return None


def triton_version():
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention."""
    return triton_attention(q, k, v, cu_seqlens, causal)[0]
