"""FlashAttention-2 over packed sequences, written in Triton: the forward and the backward pass.

The idea (arXiv 2307.08691). Attention is out = softmax(q k^T / sqrt(D)) v. Written down literally,
it makes a matrix of T x T scores for every head, and most of its time goes into writing that matrix
to memory and reading it back. Here the scores never reach memory. A program (one instance of a
kernel; thousands run side by side) holds one block of queries and walks over the blocks of keys and
values that these queries see. For each query it keeps

    row_max   the largest score so far
    row_sum   the sum of exp(score - row_max) over the keys so far
    acc       the sum of exp(score - row_max) * value over the keys so far      [D numbers]

When a block of keys brings a larger score, row_sum and acc are multiplied by exp(old maximum - new
maximum). After the last block, acc / row_sum is the output, exactly. Besides the output, the
program stores one number for each query, the log-sum-exp of its scores: lse = row_max +
log(row_sum). The backward pass gets every softmax weight back from it: p = exp(score - lse).

The hardware computes powers of two, so exp(x) is computed as 2^(x log2(e)): the scores are
multiplied by log2(e), and lse is a logarithm to base 2.

Packed sequences. Nothing is padded: S sequences lie end to end in T tokens. The grid has a program
for each head and each block of the T tokens, so its size depends on shapes alone, and the host
never waits to learn how long the sequences are. A block may hold the end of one sequence and the
start of the next, so every token knows the bounds [start, end) of its own sequence. These bounds
never decrease along T. So the first and the last row of a block tell which blocks of keys it needs.
For three sequences a, b and c, in blocks of four tokens:

                       full                                 causal
    queries   keys  aaaa  abbb  bbbb  bbcc                  aaaa  abbb  bbbb  bbcc
    aaaa              #     /     .     .                     /     .     .     .
    abbb              /     /     /     /                     /     /     .     .
    bbbb              .     /     #     /                     .     /     /     .
    bbcc              .     /     /     /                     .     /     /     /

    .  no query sees any of these keys: the block is skipped and never loaded
    /  some queries see some of these keys: the block is masked element by element
    #  all queries see all of these keys: the block needs no mask

(The forward pass shifts its blocks of keys: the first one begins at the first key that is seen.)

Each kernel has one loop over all the blocks it needs. A block that needs a mask takes a branch,
which all threads take together. Three loops (edge, inside, edge) would empty and refill the
pipeline of loads twice, and need more registers (docs/log.md).

The backward pass. With scale = 1 / sqrt(D), and do for the gradient of the output ("d out"):

    p  = exp(scale * q k^T - lse)            softmax weights, computed again
    dv = p^T do
    ds = p * (do v^T - delta)                delta = sum(do * out) for each query
    dq = scale * ds k
    dk = scale * ds^T q

This takes two kernels. One holds a block of keys and walks over queries: it sums dk and dv. The
other holds a block of queries and walks over keys: it sums dq. Each sum is made by one program, in
one order, without atomic additions, so a run gives the same bits every time. The price is that both
kernels compute p and ds: 7 matrix products instead of 5.

Grouped-query attention (GQA): a group of query heads reads one KV head. No key is repeated in
memory. The program that sums dk and dv walks over all the query heads of its group.

Loading. In most kernels for Hopper and data-centre Blackwell, a block is loaded through a TMA
descriptor: the hardware computes the addresses and fills what lies outside the tensor with zeros,
which frees 20 to 80 registers a thread. The others load by pointers and masks. blocks.py says which
do, and has the block sizes.

Names in the kernels. Capital letters are tensors in memory (pointers, or TMA descriptors), sizes
and compile-time constants: T tokens, H query heads, D head dim, BD the same rounded up to a power
of two, BM queries in a block, BN keys in a block, GROUP query heads per KV head. s are scores, p
the softmax weights.
"""

import functools
import os
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .blocks import TABLE, Blocks, architecture, candidates

HEAD_DIMS = (64, 96, 128)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = tl.constexpr(1.4426950408889634)


# ---- which tokens see each other


@triton.jit
def bounds_kernel(CU_SEQLENS, START, END, S, T, n_steps, B: tl.constexpr):
    """Write the bounds [start, end) of the sequence that each token is in.

    A binary search in cu_seqlens [S + 1] finds it in `n_steps` steps. A token after the last
    sequence gets an empty range: its output is zero, and its lse is +inf, which makes all its
    weights and gradients zero in the backward pass.
    """
    tokens = tl.program_id(0) * B + tl.arange(0, B)
    # A token's sequence is the first one that ends after it. Its index lies in [low, high].
    low = tl.zeros([B], tl.int32)
    high = tl.zeros([B], tl.int32) + S
    for _ in range(n_steps):
        middle = (low + high) // 2
        # A token whose sequence is found (low == high) gets T + 1, so that no bound moves any more.
        ends_before = tl.load(CU_SEQLENS + middle + 1, mask=low < high, other=T + 1) <= tokens
        low = tl.where(ends_before, middle + 1, low)
        high = tl.where(ends_before, high, middle)
    tl.store(START + tokens, tl.minimum(tl.load(CU_SEQLENS + low), T), mask=tokens < T)
    next_start = tl.load(CU_SEQLENS + tl.minimum(low + 1, S))
    tl.store(END + tokens, tl.minimum(next_start, T), mask=tokens < T)


@triton.jit
def key_range(START, END, first_query, T, CAUSAL: tl.constexpr, BM: tl.constexpr):
    """Find the keys that the queries [first_query, first_query + BM) see.

    Return start, end [BM]: each query sees the keys [start, end). any_start, any_end: only keys in
    this range are seen by any of the queries. all_start, all_end: keys in this range are seen by
    all of them, so no mask is needed there.
    """
    queries = first_query + tl.arange(0, BM)
    last_query = tl.minimum(first_query + BM, T) - 1
    start = tl.load(START + queries, mask=queries < T, other=0)
    end = tl.load(END + queries, mask=queries < T, other=0)
    # Bounds never decrease along T: the last query has the largest, the first one the smallest.
    any_end = tl.load(END + last_query)
    all_end = tl.load(END + first_query)
    if CAUSAL:  # a query sees nothing after itself
        end = tl.minimum(end, queries + 1)
        any_end = tl.minimum(any_end, last_query + 1)
        all_end = tl.minimum(all_end, first_query + 1)
    any_start = tl.load(START + first_query)
    all_start = tl.load(START + last_query)
    return start, end, any_start, any_end, all_start, all_end


@triton.jit
def is_visible(columns, start, end):
    """Whether each row sees each column. columns [c], start and end [r] -> [r, c]"""
    return (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])


# ---- loading and storing blocks


@triton.jit
def load(X, first_row, head, row_stride, head_stride, T, D: tl.constexpr, B: tl.constexpr,
         BD: tl.constexpr, TMA: tl.constexpr, HELD: tl.constexpr = False):
    """Load the rows [first_row, first_row + B) of one head of X [T, heads, D] -> [B, BD].

    X is a pointer, or with TMA a descriptor. HELD: the program holds this block, so it is loaded
    once, before the loop. Rows past T and columns past D are zeros, with one exception: a block
    that is held and loaded by TMA has columns of the next head there (see `descriptor`).
    """
    if TMA and HELD:
        x = X.load([first_row, head * D])
    elif TMA:
        x = X.load([first_row, head, 0]).reshape([B, BD])
    else:
        rows = first_row + tl.arange(0, B)
        columns = tl.arange(0, BD)
        # Offsets are 64 bits wide: X may have more than 2^31 elements.
        head_start = X + tl.cast(head, tl.int64) * head_stride
        pointers = head_start + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
        x = tl.load(pointers, mask=(rows < T)[:, None] & (columns < D)[None, :], other=0.0)
    return x


@triton.jit
def store(X, x, first_row, head, heads, T, D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr):
    """Store x [B, BD] in the rows [first_row, first_row + B) of one head of X [T, heads, D]."""
    rows = first_row + tl.arange(0, B)
    columns = tl.arange(0, BD)
    pointers = X + (rows.to(tl.int64)[:, None] * heads + head) * D + columns[None, :]
    mask = (rows < T)[:, None] & (columns < D)[None, :]
    tl.store(pointers, x.to(X.dtype.element_ty), mask=mask)


# ---- the forward pass


@triton.jit
def forward_kernel(Q, K, V, O, LSE, START, END, scale, T, H,
                   q_row_stride, q_head_stride, k_row_stride, k_head_stride,
                   v_row_stride, v_head_stride,
                   GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Compute BM rows of the output of one head, and their log-sum-exp."""
    # Programs that start together differ in their head, so the heads of a group find their common
    # keys in the L2 cache.
    head = tl.program_id(0)
    first_query = tl.program_id(1) * BM
    kv_head = head // GROUP
    log2_scale = scale * LOG2_E
    start, end, any_start, any_end, all_start, all_end = key_range(
        START, END, first_query, T, CAUSAL, BM)
    # [BM, BD]
    q = load(Q, first_query, head, q_row_stride, q_head_stride, T, D, BM, BD, TMA, HELD=True)
    acc = tl.zeros([BM, BD], tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], float("-inf"), tl.float32)

    # Begin at the first key that is seen, not at a multiple of BN: half a block less on average.
    for first_key in tl.range(any_start, any_end, BN):
        # Scores. At an edge, hide the keys of other sequences and, if causal, later ones.
        k = load(K, first_key, kv_head, k_row_stride, k_head_stride, T, D, BN, BD, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        if first_key < all_start or first_key + BN > all_end:
            s = tl.where(is_visible(first_key + tl.arange(0, BN), start, end), s, float("-inf"))

        # Weights under the new maximum. A row that has seen no key yet has the maximum -inf: shift
        # it by 0 instead, because -inf - -inf is not a number.
        new_max = tl.maximum(row_max, tl.max(s, 1) * log2_scale)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.math.exp2(s * log2_scale - shift[:, None])  # [BM, BN]

        # Scale down what was summed under the old maximum, and add this block.
        shrink = tl.math.exp2(row_max - shift)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = load(V, first_key, kv_head, v_row_stride, v_head_stride, T, D, BN, BD, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")  # [BM, BD]
        row_max = new_max

    # A row that sees nothing at all gives zeros, and lse = +inf.
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    store(O, acc / row_sum[:, None], first_query, head, H, T, D, BM, BD)
    queries = first_query + tl.arange(0, BM)
    pointers = LSE + tl.cast(head, tl.int64) * T + queries
    lse = tl.where(is_empty, float("inf"), row_max + tl.math.log2(row_sum))
    tl.store(pointers, lse, mask=queries < T)


# ---- the backward pass


@triton.jit
def delta_kernel(O, DO, DELTA, T, H, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    """Compute delta [H, T]: for each query the sum of do * out over the head dim."""
    head = tl.program_id(0)
    first_row = tl.program_id(1) * B
    o = load(O, first_row, head, H * D, D, T, D, B, BD, TMA=False).to(tl.float32)
    do = load(DO, first_row, head, H * D, D, T, D, B, BD, TMA=False).to(tl.float32)
    rows = first_row + tl.arange(0, B)
    tl.store(DELTA + tl.cast(head, tl.int64) * T + rows, tl.sum(o * do, 1), mask=rows < T)


@triton.jit
def dkdv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, START, END, scale, T, H,
                q_row_stride, q_head_stride, k_row_stride, k_head_stride,
                v_row_stride, v_head_stride,
                GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Compute BN rows of the gradients of a KV head: hold a block of keys, walk over queries."""
    kv_head = tl.program_id(0)
    first_key = tl.program_id(1) * BN
    keys = first_key + tl.arange(0, BN)
    last_key = tl.minimum(first_key + BN, T) - 1
    # k and v: [BN, BD]
    k = load(K, first_key, kv_head, k_row_stride, k_head_stride, T, D, BN, BD, TMA, HELD=True)
    v = load(V, first_key, kv_head, v_row_stride, v_head_stride, T, D, BN, BD, TMA, HELD=True)

    # The queries that see these keys, as in key_range. Each key is seen by the queries
    # [start, end). Only queries in [any_start, any_end) see any of the keys, and those in
    # [all_start, all_end) see all of them.
    start = tl.load(START + keys, mask=keys < T, other=0)
    end = tl.load(END + keys, mask=keys < T, other=0)
    any_start = tl.load(START + first_key)
    all_start = tl.load(START + last_key)
    if CAUSAL:  # no query before a key sees it
        start = tl.maximum(start, keys)
        any_start = tl.maximum(any_start, first_key)
        all_start = tl.maximum(all_start, last_key)
    any_end = tl.load(END + last_key)
    all_end = tl.load(END + first_key)

    log2_scale = scale * LOG2_E
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for head_in_group in tl.range(0, GROUP):
        head = kv_head * GROUP + head_in_group
        head_start = tl.cast(head, tl.int64) * T
        # Begin at a multiple of BM, so that LSE and DELTA are loaded 16 bytes at a time.
        for first_query in tl.range(any_start // BM * BM, any_end, BM):
            # Compute the weights again, transposed: a row is a key, a column is a query.
            queries = first_query + tl.arange(0, BM)
            q = load(Q, first_query, head, q_row_stride, q_head_stride, T, D, BM, BD, TMA)
            lse = tl.load(LSE + head_start + queries, mask=queries < T, other=float("inf"))
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN, BM]
            p = tl.math.exp2(s * log2_scale - lse[None, :])  # [BN, BM]
            if first_query < all_start or first_query + BM > all_end:
                p = tl.where(is_visible(queries, start, end), p, 0.0)

            # dv = p^T do
            do = load(DO, first_query, head, H * D, D, T, D, BM, BD, TMA)  # [BM, BD]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")  # [BN, BD]

            # ds = p * (do v^T - delta), dk = ds^T q
            delta = tl.load(DELTA + head_start + queries, mask=queries < T, other=0.0)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BN, BM]
            ds = p * (dp - delta[None, :])  # [BN, BM]
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")  # [BN, BD]
    store(DK, dk * scale, first_key, kv_head, H // GROUP, T, D, BN, BD)
    store(DV, dv, first_key, kv_head, H // GROUP, T, D, BN, BD)


@triton.jit
def dq_kernel(Q, K, V, DO, DQ, LSE, DELTA, START, END, scale, T, H,
              q_row_stride, q_head_stride, k_row_stride, k_head_stride,
              v_row_stride, v_head_stride,
              GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Compute BM rows of the gradient of a query head: hold a block of queries, walk over keys."""
    head = tl.program_id(0)
    first_query = tl.program_id(1) * BM
    kv_head = head // GROUP
    log2_scale = scale * LOG2_E
    start, end, any_start, any_end, all_start, all_end = key_range(
        START, END, first_query, T, CAUSAL, BM)
    # q and do: [BM, BD]
    q = load(Q, first_query, head, q_row_stride, q_head_stride, T, D, BM, BD, TMA, HELD=True)
    do = load(DO, first_query, head, H * D, D, T, D, BM, BD, TMA, HELD=True)
    queries = first_query + tl.arange(0, BM)
    offsets = tl.cast(head, tl.int64) * T + queries
    lse = tl.load(LSE + offsets, mask=queries < T, other=float("inf"))
    delta = tl.load(DELTA + offsets, mask=queries < T, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)

    # Begin at a multiple of BN: this saves registers, so that two programs fit on a multiprocessor.
    for first_key in tl.range(any_start // BN * BN, any_end, BN):
        # Compute the weights again.
        k = load(K, first_key, kv_head, k_row_stride, k_head_stride, T, D, BN, BD, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        p = tl.math.exp2(s * log2_scale - lse[:, None])  # [BM, BN]
        if first_key < all_start or first_key + BN > all_end:
            p = tl.where(is_visible(first_key + tl.arange(0, BN), start, end), p, 0.0)

        # ds = p * (do v^T - delta), dq = ds k
        v = load(V, first_key, kv_head, v_row_stride, v_head_stride, T, D, BN, BD, TMA)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # [BM, BN]
        ds = p * (dp - delta[:, None])  # [BM, BN]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BM, BD]
    store(DQ, dq * scale, first_query, head, H, T, D, BM, BD)


# ---- running a kernel


def descriptor(x, n_rows, width, is_held):
    """Return a TMA descriptor of x [T, heads, D] that loads a box of n_rows x width at a time.

    A block that is loaded in the loop has three dimensions, [T, heads, D]: a head of 96 then comes
    with 32 columns of zeros. A block that the program holds has two, [T, heads * D]: the compiler
    then leaves it in shared memory, instead of in registers (dq at head dim 128: 163 registers a
    thread instead of 215), but its 32 extra columns belong to the next head. Each product pairs a
    held block with a block of the loop, whose zeros cancel them.
    """
    T, heads, D = x.shape
    if is_held:
        return TensorDescriptor(x, [T, heads * D], [x.stride(0), 1], [n_rows, width])
    return TensorDescriptor(x, [T, heads, D], list(x.stride()), [n_rows, 1, width])


def fits_tma(x):
    """True if TMA can load x [T, heads, D]: rows aligned to 16 bytes, no gaps between heads."""
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return is_aligned and x.stride(1) == x.shape[2]


# {(architecture, kernel, width, causal): the Blocks that a search with ATTENTION_AUTOTUNE=1 chose}
tuned = {}


def launch(name, kernel, held, operands, other_tensors, q, k, v, causal):
    """Run one of the three kernels that walk over blocks.

    name: the kernel's name in TABLE. held: "queries" or "keys", whichever of them a program holds
    while it walks over the others. operands: [(tensor, "queries" or "keys")], the tensors that TMA
    may load, and what their rows are. other_tensors: the tensors that follow. Both stand in the
    order of the kernel's parameters.
    """
    T, H, D = q.shape
    n_kv_head = k.shape[1]
    width = triton.next_power_of_2(D)
    n_heads = H if held == "queries" else n_kv_head
    strides = [*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]]
    can_use_tma = all(fits_tma(x) for x, _ in operands)

    def run(blocks: Blocks):
        n_rows = {"queries": blocks.BM, "keys": blocks.BN}
        use_tma = blocks.tma and can_use_tma
        inputs = []
        for x, kind in operands:
            if use_tma:
                x = descriptor(x, n_rows[kind], width, is_held=kind == held)
            inputs.append(x)
        grid = (n_heads, triton.cdiv(T, n_rows[held]))
        kernel[grid](*inputs, *other_tensors, D**-0.5, T, H, *strides,
                     GROUP=H // n_kv_head, D=D, BD=width, CAUSAL=causal,
                     BM=blocks.BM, BN=blocks.BN, TMA=use_tma,
                     num_warps=blocks.num_warps, num_stages=blocks.num_stages)

    # The interpreter runs on a CPU, which has no compute capability: any blocks will do.
    arch = architecture(*torch.cuda.get_device_capability(q.device)) if q.is_cuda else 80
    table_key = (arch, name, width)
    tuned_key = (*table_key, causal)
    may_search = os.environ.get("ATTENTION_AUTOTUNE") == "1" and not INTERPRETED
    if may_search and tuned_key not in tuned:
        tuned[tuned_key] = search(run, candidates(table_key), tuned_key)
    run(tuned.get(tuned_key) or TABLE[table_key])


def search(run, blocks_to_try, tuned_key):
    """Return the fastest Blocks of those that compile and fit, and print them for blocks.TABLE."""
    times = {}
    for blocks in blocks_to_try:
        try:
            times[blocks] = triton.testing.do_bench(functools.partial(run, blocks))
        except Exception:  # too many registers or too much shared memory for this GPU
            continue
    best = min(times, key=times.get)
    counts = f"{len(times)} of {len(blocks_to_try)} ran"
    print(f"attention autotune {tuned_key}: {best}, {times[best]:.3f} ms ({counts})", flush=True)
    return best


def on_device_of(x):
    """Make x's GPU the current one, because Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---- the operator that PyTorch sees: one node for torch.compile, with its own backward pass


def with_dense_rows(*tensors):
    """Return the tensors, copied where the numbers of a head do not lie side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def empty_outputs(q):
    """Return memory for out [T, H, D], lse [H, T] and bounds of each token's sequence [2, T]."""
    T, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((H, T), dtype=torch.float32)
    bounds = q.new_empty((2, T), dtype=torch.int32)
    return out, lse, bounds


def empty_gradients(q, k, v):
    """Return memory for the gradients of q [T, H, D], k and v [T, Hkv, D]."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@torch.library.custom_op("nanoencoder::triton_attention", mutates_args=())
def triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], lse [H, T] (base 2), bounds of each token's sequence [2, T]"""
    q, k, v = with_dense_rows(q, k, v)
    out, lse, bounds = empty_outputs(q)
    T = q.shape[0]
    if T == 0:
        return out, lse, bounds
    S = cu_seqlens.numel() - 1
    start, end = bounds
    with on_device_of(q):
        n_steps = S.bit_length()  # of a binary search among S + 1 numbers
        bounds_kernel[(triton.cdiv(T, 256),)](cu_seqlens, start, end, S, T, n_steps, B=256)
        operands = [(q, "queries"), (k, "keys"), (v, "keys")]
        other_tensors = [out, lse, start, end]
        launch("forward", forward_kernel, "queries", operands, other_tensors, q, k, v, causal)
    return out, lse, bounds


@triton_attention.register_fake
def fake(q, _k, _v, _cu_seqlens, _causal):
    return empty_outputs(q)


@torch.library.custom_op("nanoencoder::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, bounds: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of q [T, H, D], k and v [T, Hkv, D]"""
    q, k, v = with_dense_rows(q, k, v)
    grad = grad.contiguous()
    dq, dk, dv = empty_gradients(q, k, v)
    T, H, D = q.shape
    if T == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)  # [H, T]
    width = triton.next_power_of_2(D)
    start, end = bounds
    with on_device_of(q):
        delta_kernel[(H, triton.cdiv(T, 64))](out, grad, delta, T, H, D=D, BD=width, B=64)
        operands = [(q, "queries"), (k, "keys"), (v, "keys"), (grad, "queries")]
        other_tensors = [dk, dv, lse, delta, start, end]
        launch("dkdv", dkdv_kernel, "keys", operands, other_tensors, q, k, v, causal)
        other_tensors = [dq, lse, delta, start, end]
        launch("dq", dq_kernel, "queries", operands, other_tensors, q, k, v, causal)
    return dq, dk, dv


@triton_attention_backward.register_fake
def fake_backward(_grad, q, k, v, _out, _lse, _bounds, _causal):
    return empty_gradients(q, k, v)


def setup_context(ctx, inputs, output):
    """Save what the backward pass needs of the forward pass."""
    q, k, v, _, ctx.causal = inputs
    out, lse, bounds = output
    ctx.save_for_backward(q, k, v, out, lse, bounds)
    # lse and bounds get no gradients: PyTorch need not make tensors of zeros for them.
    ctx.set_materialize_grads(False)


def backward(ctx, grad, _grad_of_lse, _grad_of_bounds):
    dq, dk, dv = triton_attention_backward(grad, *ctx.saved_tensors, ctx.causal)
    return dq, dk, dv, None, None


triton_attention.register_autograd(backward, setup_context=setup_context)


# ---- what kernels.attention calls


def why_not(device_type, dtype, head_dim):
    """Return None if these kernels can compute such tensors here, else the reason in words."""
    if device_type != "cuda" and not INTERPRETED:
        return (
            "the Triton kernels need a CUDA GPU "
            "(TRITON_INTERPRET=1 interprets them on a CPU, slowly)"
        )
    if head_dim not in HEAD_DIMS:
        supported = ", ".join(map(str, HEAD_DIMS))
        return f"head dim {head_dim} is not supported by the Triton kernels: {supported} are"
    if INTERPRETED and dtype not in (torch.float32, torch.float16):
        return (
            f"Triton's interpreter takes float32 and float16, not {dtype} "
            "(it multiplies bfloat16 wrongly)"
        )
    if not INTERPRETED and dtype not in (torch.bfloat16, torch.float16):
        return f"the Triton kernels take bfloat16 and float16 on a GPU, not {dtype}"
    # Triton 3.6 has two faults on data-centre Blackwell: warps race each other in some loops
    # (triton#9871), and the TMA descriptors of small tensors with gaps are wrong (triton#9235).
    is_data_centre_blackwell = not INTERPRETED and torch.cuda.get_device_capability()[0] == 10
    if is_data_centre_blackwell and triton_version() < (3, 7):
        return (
            f"Triton {triton.__version__} miscompiles some loops on this GPU "
            "(triton-lang/triton#9871): install Triton 3.7 or newer"
        )
    return None


def triton_version():
    """Return the version of Triton as two numbers: 3.7.1 -> (3, 7)."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention."""
    return triton_attention(q, k, v, cu_seqlens, causal)[0]
