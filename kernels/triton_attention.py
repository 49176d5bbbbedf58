"""FlashAttention-2 over packed sequences, written in Triton: the forward and the backward pass.

The idea (arXiv 2307.08691). Attention is out = softmax(q k^T / sqrt(D)) v. Written down literally,
it makes a matrix of T x T scores for every head, and most of its time goes into writing that matrix
to memory and reading it back. Here the scores never reach memory. A program holds one block of
queries and walks over the blocks of keys and values that these queries see. For each query it keeps

    row_max   the largest score so far
    row_sum   the sum of exp(score - row_max) over the keys so far
    acc       the sum of exp(score - row_max) * value over the keys so far      [D numbers]

When a block of keys brings a larger score, row_sum and acc shrink by exp(old maximum - new
maximum). After the last block, acc / row_sum is the output, exactly. Besides the output, the
program stores one number for each query, the log-sum-exp of its scores: lse = row_max +
log(row_sum). The backward pass gets every softmax weight back from it: p = exp(score - lse).

Exponentials are powers of two, because that is what the hardware computes: the scores are
multiplied by log2(e), and lse is a logarithm to base 2.

Packed sequences. Nothing is padded: S sequences lie end to end in T tokens. The grid has a program
for each head and each block of the T tokens, so its size depends on shapes alone, and the host
never waits to learn how long the sequences are. A block may hold the end of one sequence and the
start of the next, so every token knows the bounds [start, end) of its own sequence. These bounds
never decrease along T. So the first and the last row of a block tell which blocks of keys it needs.
For three sequences a, b and c, in blocks of four tokens:

                       full                                 causal
    queries   keys  aaaa  abbb  bbbb  bbcc                  aaaa  abbb  bbbb  bbcc
    aaaa              #     /     .     .                     /     .     .     .     . skipped
    abbb              /     /     /     /                     /     /     .     .     / masked
    bbbb              .     /     #     /                     .     /     /     .     # no mask
    bbcc              .     /     /     /                     .     /     /     /

A block of keys that no query sees is skipped and never loaded. One that all queries see needs no
mask. The others are masked element by element. Each kernel has one loop over all the blocks it
needs, with a branch that masks those outside an inner range. All threads take this branch together.
Three loops (edge, inside, edge) would drain the loads in flight twice, and need more registers
(docs/log.md).

The backward pass. With scale = 1 / sqrt(D), and do for the gradient of the output:

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

Loading. On Hopper and data-centre Blackwell a block is loaded through a TMA descriptor: the
hardware computes the addresses and fills what lies outside the tensor with zeros, which frees 20 to
80 registers a thread. Other GPUs load by pointers and masks. Block sizes come from blocks.py.

Names in the kernels: capital letters are pointers, sizes and compile-time constants. T tokens, H
query heads, D head dim, BD the same rounded up to a power of two, BM rows of queries, BN rows of
keys, GROUP query heads per KV head.
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
def bounds_kernel(CU_SEQLENS, START, END, S, T, steps, B: tl.constexpr):
    """Write the bounds [start, end) of the sequence that each token is in.

    A binary search of `steps` steps in cu_seqlens [S + 1]. A token after the last sequence gets an
    empty range. So its output is zero, its lse is +inf, which makes all its weights zero in the
    backward pass, and it has no gradient.
    """
    token = tl.program_id(0) * B + tl.arange(0, B)
    # The sequence looked for is the first one that ends after the token; it is in [low, high].
    low = tl.zeros([B], tl.int32)
    high = tl.zeros([B], tl.int32) + S
    for _ in range(steps):
        middle = (low + high) // 2
        ends_before = tl.load(CU_SEQLENS + middle + 1, mask=low < high, other=T + 1) <= token
        low = tl.where(ends_before, middle + 1, low)
        high = tl.where(ends_before, high, middle)
    tl.store(START + token, tl.minimum(tl.load(CU_SEQLENS + low), T), mask=token < T)
    next_start = tl.load(CU_SEQLENS + tl.minimum(low + 1, S))
    tl.store(END + token, tl.minimum(next_start, T), mask=token < T)


@triton.jit
def key_range(START, END, first_query, T, CAUSAL: tl.constexpr, BM: tl.constexpr):
    """Find the keys that the queries [first_query, first_query + BM) see.

    start, end [BM]: each query sees the keys [start, end). any_start, any_end: at least one of the
    queries sees these keys. all_start, all_end: every one of them does, so no mask is needed there.
    """
    query = first_query + tl.arange(0, BM)
    last_query = tl.minimum(first_query + BM, T) - 1
    start = tl.load(START + query, mask=query < T, other=0)
    end = tl.load(END + query, mask=query < T, other=0)
    # Bounds never decrease along T: the last query has the largest, the first one the smallest.
    any_end = tl.load(END + last_query)
    all_end = tl.load(END + first_query)
    if CAUSAL:  # a query sees nothing after itself
        end = tl.minimum(end, query + 1)
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
         BD: tl.constexpr, TMA: tl.constexpr, ONCE: tl.constexpr):
    """Load the rows [first_row, first_row + B) of one head of X [T, heads, D] -> [B, BD].

    Rows past T and columns past D are zeros. ONCE: this block is loaded once, before the loop;
    `descriptor` says what its columns past D hold then.
    """
    if TMA and ONCE:
        x = X.load([first_row, head * D])
    elif TMA:
        x = X.load([first_row, head, 0]).reshape([B, BD])
    else:
        row = first_row + tl.arange(0, B)
        column = tl.arange(0, BD)
        # Offsets are 64 bits wide: X may have more than 2^31 elements.
        head_start = X + tl.cast(head, tl.int64) * head_stride
        pointers = head_start + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        x = tl.load(pointers, mask=(row < T)[:, None] & (column < D)[None, :], other=0.0)
    return x


@triton.jit
def store(X, x, first_row, head, heads, T, D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr):
    """Store x [B, BD] in the rows [first_row, first_row + B) of one head of X [T, heads, D]."""
    row = first_row + tl.arange(0, B)
    column = tl.arange(0, BD)
    pointers = X + (row.to(tl.int64)[:, None] * heads + head) * D + column[None, :]
    mask = (row < T)[:, None] & (column < D)[None, :]
    tl.store(pointers, x.to(X.dtype.element_ty), mask=mask)


# ---- the forward pass


@triton.jit
def forward_kernel(Q, K, V, O, LSE, START, END, sm_scale, T, H,
                   q_row_stride, q_head_stride, k_row_stride, k_head_stride,
                   v_row_stride, v_head_stride,
                   GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Compute BM rows of the output of one head, and their log-sum-exp."""
    # Programs that start together differ in their head: the heads of a group find the keys they
    # share in the L2 cache.
    head = tl.program_id(0)
    first_query = tl.program_id(1) * BM
    kv_head = head // GROUP
    scale = sm_scale * LOG2_E
    start, end, any_start, any_end, all_start, all_end = key_range(
        START, END, first_query, T, CAUSAL, BM)
    q = load(Q, first_query, head, q_row_stride, q_head_stride, T, D, BM, BD, TMA, True)  # [BM, BD]
    acc = tl.zeros([BM, BD], tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], float("-inf"), tl.float32)

    # The blocks begin where the sequence begins, not at a multiple of BN: one edge less to mask.
    for first_key in tl.range(any_start, any_end, BN):
        # Scores. At an edge, hide the keys of other sequences and, if causal, later ones.
        k = load(K, first_key, kv_head, k_row_stride, k_head_stride, T, D, BN, BD, TMA, False)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        if first_key < all_start or first_key + BN > all_end:
            s = tl.where(is_visible(first_key + tl.arange(0, BN), start, end), s, float("-inf"))

        # Weights under the new maximum. A row that has seen no key yet has the maximum -inf: shift
        # it by 0 instead, because -inf - -inf is not a number.
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.math.exp2(s * scale - shift[:, None])  # [BM, BN]

        # Bring what was summed so far under the new maximum, and add this block.
        shrink = tl.math.exp2(row_max - shift)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = load(V, first_key, kv_head, v_row_stride, v_head_stride, T, D, BN, BD, TMA, False)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")  # [BM, BD]
        row_max = new_max

    # A row that sees nothing at all gives zeros, and lse = +inf.
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    store(O, acc / row_sum[:, None], first_query, head, H, T, D, BM, BD)
    query = first_query + tl.arange(0, BM)
    pointers = LSE + tl.cast(head, tl.int64) * T + query
    lse = tl.where(is_empty, float("inf"), row_max + tl.math.log2(row_sum))
    tl.store(pointers, lse, mask=query < T)


# ---- the backward pass


@triton.jit
def delta_kernel(O, DO, DELTA, T, H, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    """Compute delta [H, T]: for each query the sum of do * out over the head dim."""
    head = tl.program_id(0)
    first_row = tl.program_id(1) * B
    o = load(O, first_row, head, H * D, D, T, D, B, BD, False, False).to(tl.float32)
    do = load(DO, first_row, head, H * D, D, T, D, B, BD, False, False).to(tl.float32)
    row = first_row + tl.arange(0, B)
    tl.store(DELTA + tl.cast(head, tl.int64) * T + row, tl.sum(o * do, 1), mask=row < T)


@triton.jit
def dkdv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, START, END, sm_scale, T, H,
                q_row_stride, q_head_stride, k_row_stride, k_head_stride,
                v_row_stride, v_head_stride,
                GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Compute BN rows of the gradients of one KV head: a block of keys stays, queries pass by."""
    kv_head = tl.program_id(0)
    first_key = tl.program_id(1) * BN
    key = first_key + tl.arange(0, BN)
    last_key = tl.minimum(first_key + BN, T) - 1
    # k and v: [BN, BD]
    k = load(K, first_key, kv_head, k_row_stride, k_head_stride, T, D, BN, BD, TMA, True)
    v = load(V, first_key, kv_head, v_row_stride, v_head_stride, T, D, BN, BD, TMA, True)

    # The queries that see these keys, as in key_range: each key is seen by [start, end), at least
    # one of them by [any_start, any_end), and all of them by [all_start, all_end).
    start = tl.load(START + key, mask=key < T, other=0)
    end = tl.load(END + key, mask=key < T, other=0)
    any_start = tl.load(START + first_key)
    all_start = tl.load(START + last_key)
    if CAUSAL:  # no query before a key sees it
        start = tl.maximum(start, key)
        any_start = tl.maximum(any_start, first_key)
        all_start = tl.maximum(all_start, last_key)
    any_end = tl.load(END + last_key)
    all_end = tl.load(END + first_key)

    scale = sm_scale * LOG2_E
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for head_in_group in tl.range(0, GROUP):
        head = kv_head * GROUP + head_in_group
        offset = tl.cast(head, tl.int64) * T
        # From a multiple of BM: then 16 bytes of LSE and DELTA are loaded at a time.
        for first_query in tl.range(any_start // BM * BM, any_end, BM):
            # The weights again, transposed: a row is a key, a column is a query.
            query = first_query + tl.arange(0, BM)
            q = load(Q, first_query, head, q_row_stride, q_head_stride, T, D, BM, BD, TMA, False)
            lse = tl.load(LSE + offset + query, mask=query < T, other=float("inf"))
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN, BM]
            p = tl.math.exp2(s * scale - lse[None, :])  # [BN, BM]
            if first_query < all_start or first_query + BM > all_end:
                p = tl.where(is_visible(query, start, end), p, 0.0)

            # dv = p^T do
            do = load(DO, first_query, head, H * D, D, T, D, BM, BD, TMA, False)  # [BM, BD]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")  # [BN, BD]

            # ds = p * (do v^T - delta), dk = ds^T q
            delta = tl.load(DELTA + offset + query, mask=query < T, other=0.0)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BN, BM]
            ds = p * (dp - delta[None, :])  # [BN, BM]
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")  # [BN, BD]
    store(DK, dk * sm_scale, first_key, kv_head, H // GROUP, T, D, BN, BD)
    store(DV, dv, first_key, kv_head, H // GROUP, T, D, BN, BD)


@triton.jit
def dq_kernel(Q, K, V, DO, DQ, LSE, DELTA, START, END, sm_scale, T, H,
              q_row_stride, q_head_stride, k_row_stride, k_head_stride,
              v_row_stride, v_head_stride,
              GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Compute BM rows of the gradient of one query head: a block of queries stays, keys pass by."""
    head = tl.program_id(0)
    first_query = tl.program_id(1) * BM
    kv_head = head // GROUP
    scale = sm_scale * LOG2_E
    start, end, any_start, any_end, all_start, all_end = key_range(
        START, END, first_query, T, CAUSAL, BM)
    q = load(Q, first_query, head, q_row_stride, q_head_stride, T, D, BM, BD, TMA, True)  # [BM, BD]
    do = load(DO, first_query, head, H * D, D, T, D, BM, BD, TMA, True)  # [BM, BD]
    query = first_query + tl.arange(0, BM)
    offset = tl.cast(head, tl.int64) * T + query
    lse = tl.load(LSE + offset, mask=query < T, other=float("inf"))
    delta = tl.load(DELTA + offset, mask=query < T, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)

    # From a multiple of BN: this saves registers, so that two programs fit on an SM.
    for first_key in tl.range(any_start // BN * BN, any_end, BN):
        # The weights again.
        k = load(K, first_key, kv_head, k_row_stride, k_head_stride, T, D, BN, BD, TMA, False)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        p = tl.math.exp2(s * scale - lse[:, None])  # [BM, BN]
        if first_key < all_start or first_key + BN > all_end:
            p = tl.where(is_visible(first_key + tl.arange(0, BN), start, end), p, 0.0)

        # ds = p * (do v^T - delta), dq = ds k
        v = load(V, first_key, kv_head, v_row_stride, v_head_stride, T, D, BN, BD, TMA, False)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # [BM, BN]
        ds = p * (dp - delta[:, None])  # [BM, BN]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BM, BD]
    store(DQ, dq * sm_scale, first_query, head, H, T, D, BM, BD)


# ---- running a kernel


def descriptor(x, n_rows, is_loaded_once, width):
    """Return a TMA descriptor of x [T, heads, D] that loads a box of n_rows x width at a time.

    What a loop loads has three dimensions, [T, heads, D], so that a head of 96 comes with 32
    columns of zeros. What is loaded once, before the loop, has two, [T, heads * D]: the compiler
    then leaves it in shared memory, where three dimensions would keep it in registers (dq at head
    dim 128: 160 a thread instead of 215). Its 32 extra columns belong to the next head. They do no
    harm, because they only meet zeros in a product.
    """
    T, heads, D = x.shape
    if is_loaded_once:
        return TensorDescriptor(x, [T, heads * D], [x.stride(0), 1], [n_rows, width])
    return TensorDescriptor(x, [T, heads, D], list(x.stride()), [n_rows, 1, width])


def fits_tma(x):
    """True if TMA can load x [T, heads, D]: rows on 16 bytes, the heads of a token side by side."""
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return is_aligned and x.stride(1) == x.shape[2]


# {(architecture, kernel, width, causal): the Blocks that ATTENTION_AUTOTUNE=1 found}
tuned = {}


def launch(name, kernel, outer, operands, rest, q, k, v, causal):
    """Run one of the three kernels that walk over blocks.

    name: the kernel's name in TABLE. outer: "BM" if a program holds queries, "BN" if it holds keys.
    operands: [(tensor, "BM" or "BN")], what TMA may load, in blocks of so many rows. rest: the
    kernel's other tensors.
    """
    T, H, D = q.shape
    n_kv_head = k.shape[1]
    width = triton.next_power_of_2(D)
    n_heads = H if outer == "BM" else n_kv_head
    strides = [*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]]
    can_use_tma = all(fits_tma(x) for x, _ in operands)

    def run(blocks: Blocks):
        use_tma = blocks.tma and can_use_tma
        inputs = []
        for x, size_name in operands:
            if use_tma:
                x = descriptor(x, getattr(blocks, size_name), size_name == outer, width)
            inputs.append(x)
        grid = (n_heads, triton.cdiv(T, getattr(blocks, outer)))
        kernel[grid](*inputs, *rest, D**-0.5, T, H, *strides, GROUP=H // n_kv_head, D=D, BD=width,
                     CAUSAL=causal, BM=blocks.BM, BN=blocks.BN, TMA=use_tma,
                     num_warps=blocks.num_warps, num_stages=blocks.num_stages)

    # The interpreter runs on a CPU, which has no compute capability: any blocks will do.
    arch = architecture(*torch.cuda.get_device_capability(q.device)) if q.is_cuda else 80
    table_key = (arch, name, width)
    key = (*table_key, causal)
    if os.environ.get("ATTENTION_AUTOTUNE") == "1" and not INTERPRETED and key not in tuned:
        tuned[key] = search(run, candidates(table_key), key)
    run(tuned.get(key) or TABLE[table_key])


def search(run, blocks_to_try, key):
    """Return the fastest Blocks of those that compile and fit, and print them for blocks.TABLE."""
    times = {}
    for blocks in blocks_to_try:
        try:
            times[blocks] = triton.testing.do_bench(functools.partial(run, blocks))
        except Exception:  # too many registers or too much shared memory for this GPU
            continue
    best = min(times, key=times.get)
    counts = f"{len(times)} of {len(blocks_to_try)} ran"
    print(f"attention autotune {key}: {best}, {times[best]:.3f} ms ({counts})", flush=True)
    return best


def on_device_of(x):
    """Make x's GPU the current one, because Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---- the operator that PyTorch sees: one node for torch.compile, with its own backward pass


def with_dense_rows(*tensors):
    """Return the tensors, copied where the numbers of a head do not lie side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def empty_outputs(q):
    """-> memory for out [T, H, D], lse [H, T] and the bounds of each token's sequence [2, T]"""
    T, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((H, T), dtype=torch.float32)
    bounds = q.new_empty((2, T), dtype=torch.int32)
    return out, lse, bounds


def empty_gradients(q, k, v):
    """-> memory for the gradients of q [T, H, D], k and v [T, Hkv, D]"""
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
        bounds_kernel[(triton.cdiv(T, 256),)](cu_seqlens, start, end, S, T, S.bit_length(), B=256)
        operands = [(q, "BM"), (k, "BN"), (v, "BN")]
        rest = [out, lse, start, end]
        launch("forward", forward_kernel, "BM", operands, rest, q, k, v, causal)
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
        operands = [(q, "BM"), (k, "BN"), (v, "BN"), (grad, "BM")]
        rest = [dk, dv, lse, delta, start, end]
        launch("dkdv", dkdv_kernel, "BN", operands, rest, q, k, v, causal)
        rest = [dq, lse, delta, start, end]
        launch("dq", dq_kernel, "BM", operands, rest, q, k, v, causal)
    return dq, dk, dv


@triton_attention_backward.register_fake
def fake_backward(_grad, q, k, v, _out, _lse, _bounds, _causal):
    return empty_gradients(q, k, v)


def setup_context(ctx, inputs, output):
    """Keep for the backward pass what it needs of the forward pass."""
    q, k, v, _, ctx.causal = inputs
    out, lse, bounds = output
    ctx.save_for_backward(q, k, v, out, lse, bounds)
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
    # What Triton 3.6 makes of some loops has a race between warps there (also triton#9235).
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
