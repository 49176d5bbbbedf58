"""Packed attention by PyTorch's own fused kernels, one call per sequence. It runs everywhere.

The loop over sequences is hidden in one custom operator with its own backward pass, so
torch.compile sees a single node however many sequences there are. The loop reads cu_seqlens on the
host. On a GPU the host then waits for the device in every layer: there this is the portable path,
not the fast one.

On a CPU a call costs more than the arithmetic of a short sequence. So short sequences of about the
same length are computed together, as one batch (docs/log.md).
"""

import functools
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import sdpa_cpu

# On a CPU, sequences of up to SHORT tokens are computed together if their lengths are the same
# after rounding up to a multiple of GRAIN.
SHORT = 128
GRAIN = 16


def kernel_for(q):
    """Return the kernel that computes a sequence which is not part of a Batch.

    "matmul": matrix products, sdpa_cpu.py (CPU, bf16). "flash": PyTorch's flash kernel for CPUs
    (CPU, other dtypes). "device": what PyTorch chooses on any other device.
    """
    if q.device.type != "cpu":
        return "device"
    return "matmul" if q.dtype == torch.bfloat16 else "flash"


# ---- which sequences are computed together


class Batch(NamedTuple):
    """n short sequences, m tokens in all, that one call computes as tensors [n * H, L, D].

    L is the length of the longest one. The others repeat their last token up to L: as keys the
    repetitions are hidden, and as queries their results are dropped. "Rows" are those of a tensor
    seen as a matrix with D columns.
    """

    length: int  # L
    q_rows: torch.Tensor  # [n * H * L] where the queries are in q [T * H, D]
    kv_rows: torch.Tensor  # [n * H * L] where their KV heads are in k and v [T * Hkv, D]
    is_hidden: torch.Tensor  # bool [n * H, 1, L] keys that are repetitions
    tokens: torch.Tensor  # [m] the tokens of these sequences
    q_result_rows: torch.Tensor  # [m * H] where these tokens are in a result [n * H * L, D]
    kv_result_rows: torch.Tensor  # [m * Hkv] and in a gradient of k or v [n * Hkv * L, D]


# The cache is for the layers: all of them ask about the same cu_seqlens, forward and backward.
@functools.lru_cache(maxsize=8)
def plan(bounds, n_head, n_kv_head, is_cpu):
    """Decide how to compute packed sequences. bounds: their cu_seqlens, as a tuple.

    -> [(start, end)] of the sequences that are computed alone, [Batch] of those computed together
    """
    alone = []
    short = defaultdict(list)  # {length in units of GRAIN, rounded up: [(start, end)]}
    for start, end in zip(bounds, bounds[1:]):
        length = end - start
        if length <= 0:
            continue
        if is_cpu and length <= SHORT:
            short[-(-length // GRAIN)].append((start, end))
        else:
            alone.append((start, end))

    batches = []
    for spans in short.values():
        if len(spans) == 1:
            alone.append(spans[0])
        else:
            batches.append(make_batch(spans, n_head, n_kv_head))
    return alone, batches


def plan_for(q, k, cu_seqlens):
    """Return the plan for inputs of attention."""
    bounds = tuple(cu_seqlens.tolist())
    return plan(bounds, q.shape[1], k.shape[1], q.device.type == "cpu")


def make_batch(spans, n_head, n_kv_head):
    """Return the Batch of the sequences with these (start, end)."""
    start, end = (x[:, None] for x in torch.tensor(spans).unbind(1))  # [n, 1] each
    L = int((end - start).max())
    token = start + torch.arange(L)  # [n, L]
    is_real = token < end
    token = token.minimum(end - 1)  # beyond its end, a sequence repeats its last token

    def input_rows(heads_per_token, head):
        """Rows of [T * heads_per_token, D], in the order [n, H, L]."""
        return (token[:, None] * heads_per_token + head[:, None]).flatten()

    def result_rows(heads):
        """Rows of a result [n * heads * L, D], in the order [m, heads]."""
        sequence, place = is_real.nonzero(as_tuple=True)  # [m] each
        row_of_head = sequence[:, None] * heads + torch.arange(heads)  # [m, heads]
        return (row_of_head * L + place[:, None]).flatten()

    head = torch.arange(n_head)
    kv_head = head // (n_head // n_kv_head)
    return Batch(
        length=L,
        q_rows=input_rows(n_head, head),
        kv_rows=input_rows(n_kv_head, kv_head),
        is_hidden=(~is_real).repeat_interleave(n_head, dim=0)[:, None],
        tokens=token[is_real],
        q_result_rows=result_rows(n_head),
        kv_result_rows=result_rows(n_kv_head),
    )


def gather(x, rows, batch):
    """Copy the sequences of a batch out of x [T, heads, D]. -> [n * H, L, D]"""
    D = x.shape[2]
    return x.reshape(-1, D).index_select(0, rows).view(-1, batch.length, D)


def scatter(out, result, rows, tokens):
    """Write the real tokens of a batch's result [n * heads, L, D] into out [T, heads, D]."""
    D = result.shape[2]
    real = result.reshape(-1, D).index_select(0, rows)  # [m * heads, D]
    out.flatten(1).index_copy_(0, tokens, real.view(len(tokens), -1))


def heads_first(x, start, end, group=1):
    """Return one sequence of x [T, Hkv, D] as [H, L, D].

    Each KV head is repeated for the query heads of its group. sdpa_cpu needs the result
    contiguous, the other kernels do not.
    """
    x = x[start:end].transpose(0, 1)  # [Hkv, L, D]
    if group > 1:
        x = x.repeat_interleave(group, dim=0)  # [H, L, D]
    return x.contiguous() if kernel_for(x) == "matmul" else x


def sum_over_groups(grad, group):
    """Add up the gradients that a KV head gets from the query heads of its group.

    [H, L, D] -> [Hkv, L, D]
    """
    return grad.unflatten(0, (-1, group)).sum(1) if group > 1 else grad


# ---- what the forward pass saves for the backward pass


def memory_for_backward(q, training):
    """Return a tensor for what a kernel's backward pass needs of its forward pass.

    "flash": the log-sum-exps of the scores [H, T]; sequences that are computed together leave zeros
    there. "matmul": softmax weights [T * H * KEEP], if training. "device": nothing, [0]. The size
    depends on shapes alone, which torch.compile needs.
    """
    T, H, _ = q.shape
    if kernel_for(q) == "flash":
        return q.new_zeros((H, T), dtype=torch.promote_types(q.dtype, torch.float32))
    if kernel_for(q) == "matmul" and training:
        return q.new_empty(T * H * sdpa_cpu.KEEP)
    return q.new_empty(0)


class Saved:
    """Hands out the memory of memory_for_backward, a piece for each sequence or batch.

    The backward pass asks in the same order as the forward pass, so it gets the same pieces.
    """

    def __init__(self, memory):
        self.memory = memory
        self.used = 0

    def lse(self, start, end):
        """Return the log-sum-exps of one sequence, for the flash kernel. -> [H, L]"""
        return self.memory[:, start:end]

    def weights(self, heads, length):
        """Return the next heads * length^2 softmax weights; an empty tensor if none are saved.

        The memory is large enough for a batch, too. Lengths that round up to R are R - GRAIN + 1 or
        more, and R^2 <= KEEP * (R - GRAIN + 1) for all R <= SHORT.
        """
        has_weights = self.memory.ndim == 1 and self.memory.numel() > 0
        if not has_weights or length > sdpa_cpu.KEEP:
            return self.memory.new_empty(0)
        first = self.used
        self.used += heads * length * length
        return self.memory[first : self.used]


# ---- one sequence


def forward_alone(q, k, v, start, end, causal, saved):
    """Return the output of the sequence [start, end). q, k, v [H, L, D] -> [H, L, D]"""
    kernel = kernel_for(q)
    if kernel == "matmul":
        heads, length, _ = q.shape
        return sdpa_cpu.forward(q, k, v, saved.weights(heads, length), causal)
    if kernel == "flash":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, causal
        )
        saved.lse(start, end).copy_(lse[0])
        return out[0]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]


def backward_alone(grad, q, k, v, out, start, end, causal, saved):
    """Return the gradients of q, k, v [H, L, D] for a gradient of the output [H, L, D]."""
    kernel = kernel_for(q)
    if kernel == "matmul":
        heads, length, _ = q.shape
        return sdpa_cpu.backward(grad, q, k, v, saved.weights(heads, length), causal)
    if kernel == "flash":
        lse = saved.lse(start, end)
        out = heads_first(out, start, end)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[None], q[None], k[None], v[None], out[None], lse[None], 0.0, causal
        )
        return [g[0] for g in grads]
    # The kernels of other devices need state from their forward pass, which this operator cannot
    # keep for them, and on a GPU autograd does not work inside an operator. So compute matrix
    # products, in fp32 because their scores would lose precision in bf16.
    dtype = torch.promote_types(q.dtype, torch.float32)
    no_weights = q.new_empty(0)
    wide = [x.to(dtype) for x in (grad, q, k, v)]
    grads = sdpa_cpu.backward(*wide, no_weights, causal)
    return [g.to(q.dtype) for g in grads]


# ---- the operator that PyTorch sees: one node for torch.compile, with its own backward pass


def empty_gradients(q, k, v):
    """Return memory for the gradients of q [T, H, D], k and v [T, Hkv, D]."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@torch.library.custom_op("nanoencoder::sdpa", mutates_args=())
def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool,
    training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], and what else the backward pass needs (see memory_for_backward)"""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    memory = memory_for_backward(q, training)
    saved = Saved(memory)
    group = q.shape[1] // k.shape[1]
    alone, batches = plan_for(q, k, cu_seqlens)

    if batches:
        # Copy a strided tensor (the model's v is one) once here, not in each gather.
        q, k, v = (x.contiguous() for x in (q, k, v))
    for batch in batches:
        q_batch = gather(q, batch.q_rows, batch)  # [n * H, L, D], as the next two
        k_batch = gather(k, batch.kv_rows, batch)
        v_batch = gather(v, batch.kv_rows, batch)
        weights = saved.weights(q_batch.shape[0], batch.length)
        result = sdpa_cpu.forward(q_batch, k_batch, v_batch, weights, causal, batch.is_hidden)
        scatter(out, result, batch.q_result_rows, batch.tokens)

    for start, end in alone:
        q_heads = heads_first(q, start, end)  # [H, L, D], as the next two
        k_heads = heads_first(k, start, end, group)
        v_heads = heads_first(v, start, end, group)
        result = forward_alone(q_heads, k_heads, v_heads, start, end, causal, saved)
        out[start:end] = result.transpose(0, 1)  # [H, L, D] -> [L, H, D]
    return out, memory


@sdpa.register_fake
def fake(q, _k, _v, _cu_seqlens, _causal, training):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, memory_for_backward(q, training)


@torch.library.custom_op("nanoencoder::sdpa_backward", mutates_args=())
def sdpa_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    memory: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of q [T, H, D], k and v [T, Hkv, D]"""
    dq, dk, dv = empty_gradients(q, k, v)
    saved = Saved(memory)
    group = q.shape[1] // k.shape[1]
    alone, batches = plan_for(q, k, cu_seqlens)

    if batches:
        grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    for batch in batches:
        grad_batch = gather(grad, batch.q_rows, batch)  # [n * H, L, D], as the next three
        q_batch = gather(q, batch.q_rows, batch)
        k_batch = gather(k, batch.kv_rows, batch)
        v_batch = gather(v, batch.kv_rows, batch)
        # Repetitions, as queries, must not add anything to the gradients.
        grad_batch.masked_fill_(batch.is_hidden.transpose(1, 2), 0.0)
        weights = saved.weights(grad_batch.shape[0], batch.length)
        dq_batch, dk_batch, dv_batch = sdpa_cpu.backward(
            grad_batch, q_batch, k_batch, v_batch, weights, causal, batch.is_hidden
        )
        scatter(dq, dq_batch, batch.q_result_rows, batch.tokens)
        scatter(dk, sum_over_groups(dk_batch, group), batch.kv_result_rows, batch.tokens)
        scatter(dv, sum_over_groups(dv_batch, group), batch.kv_result_rows, batch.tokens)

    for start, end in alone:
        q_heads = heads_first(q, start, end)  # [H, L, D], as the next three
        k_heads = heads_first(k, start, end, group)
        v_heads = heads_first(v, start, end, group)
        grad_heads = heads_first(grad, start, end)
        dq_heads, dk_heads, dv_heads = backward_alone(
            grad_heads, q_heads, k_heads, v_heads, out, start, end, causal, saved
        )
        dq[start:end] = dq_heads.transpose(0, 1)  # [H, L, D] -> [L, H, D]
        dk[start:end] = sum_over_groups(dk_heads, group).transpose(0, 1)  # -> [L, Hkv, D]
        dv[start:end] = sum_over_groups(dv_heads, group).transpose(0, 1)
    return dq, dk, dv


@sdpa_backward.register_fake
def fake_backward(_grad, q, k, v, _out, _memory, _cu_seqlens, _causal):
    return empty_gradients(q, k, v)


def setup_context(ctx, inputs, output):
    """Save what the backward pass needs of the forward pass."""
    q, k, v, cu_seqlens, ctx.causal, _ = inputs
    out, memory = output
    ctx.save_for_backward(q, k, v, out, memory, cu_seqlens)
    # Otherwise PyTorch would make a gradient of zeros for `memory`, as large as it is.
    ctx.set_materialize_grads(False)


def backward(ctx, grad, _grad_of_memory):
    q, k, v, out, memory, cu_seqlens = ctx.saved_tensors
    dq, dk, dv = sdpa_backward(grad, q, k, v, out, memory, cu_seqlens, ctx.causal)
    return dq, dk, dv, None, None, None


sdpa.register_autograd(backward, setup_context=setup_context)


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention."""
    needs_gradient = q.requires_grad or k.requires_grad or v.requires_grad
    training = torch.is_grad_enabled() and needs_gradient
    return sdpa(q, k, v, cu_seqlens, causal, training)[0]
