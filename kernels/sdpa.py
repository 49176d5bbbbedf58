"""Packed attention by PyTorch's own fused kernels, one call a sequence: runs everywhere, needs no Triton.

One custom op with a fake and an autograd formula, so torch.compile sees a single node and no graph break however many
sequences there are. The loop reads cu_seqlens on the host, which on a GPU is one synchronisation a layer: this is the
portable path, not the fast one. On a CPU a call costs more than a sentence's arithmetic, so sentences of about one length
are computed together (LOG.md).
"""
import functools
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import sdpa_cpu

SHORT, GRAIN = 128, 16     # sequences of up to SHORT tokens that fill the same multiple of GRAIN are computed together on a CPU


class Together(NamedTuple):
    """G sequences as one call: their rows of [T * heads, D], as [G * H, L, D]; shorter ones repeat their last token."""
    length: int                # L, of the longest
    q: torch.Tensor            # [G * H * L] rows of q
    kv: torch.Tensor           # [G * H * L] rows of k and v: each KV head stands for its group of query heads
    hidden: torch.Tensor       # bool [G * H, 1, L]: keys that are repetitions
    tokens: torch.Tensor       # [n] the sequences' real tokens ...
    real: torch.Tensor         # [n * H] ... and where the result has them
    real_kv: torch.Tensor      # [n * Hkv] ... and where a gradient of k and v has them


@functools.lru_cache(maxsize=8)     # all layers ask about the same batch, forward and backward
def plan(bounds, heads, kv_heads, together):
    """cu_seqlens as a tuple -> [(start, end)] of what is computed alone, [Together] of the rest."""
    alone, short = [], defaultdict(list)
    for s, e in zip(bounds, bounds[1:]):
        if e > s:
            (short[-(-(e - s) // GRAIN)] if together and e - s <= SHORT else alone).append((s, e))
    alone += [spans[0] for spans in short.values() if len(spans) == 1]
    return alone, [together_of(spans, heads, kv_heads) for spans in short.values() if len(spans) > 1]


def together_of(spans, heads, kv_heads):
    start, end = (x[:, None] for x in torch.tensor(spans).unbind(1))                            # [G, 1] each
    position = start + torch.arange(int((end - start).max()))                                   # [G, L]
    L = position.shape[1]
    real, token = position < end, position.minimum(end - 1)

    def rows(n, head):     # of [T * n, D], in the order [G, H, L]
        return (token[:, None] * n + head[:, None]).flatten()

    def places(n):         # of a [G * n * L, D] result, in the order [tokens, n]
        g, l = real.nonzero(as_tuple=True)
        return ((g[:, None] * n + torch.arange(n)) * L + l[:, None]).flatten()

    head = torch.arange(heads)
    return Together(L, rows(heads, head), rows(kv_heads, head // (heads // kv_heads)),
                    (~real).repeat_interleave(heads, dim=0)[:, None], token[real], places(heads), places(kv_heads))


def take(x, rows, p):
    """x [T, heads, D] -> [G * H, L, D]"""
    return x.reshape(-1, x.shape[2]).index_select(0, rows).view(-1, p.length, x.shape[2])


def put(out, y, places, tokens):
    """y [G * heads, L, D] -> its real tokens' rows of out [T, heads, D]"""
    real = y.reshape(-1, y.shape[2]).index_select(0, places)
    out.flatten(1).index_copy_(0, tokens, real.view(len(tokens), -1))


def heads_first(x, start, end, group=1):
    """[T, Hkv, D] -> one sequence as [H, L, D], each KV head repeated for its group of query heads."""
    x = x[start:end].transpose(0, 1)
    x = x.repeat_interleave(group, dim=0) if group > 1 else x
    return x.contiguous() if way(x) == "matmul" else x     # see sdpa_cpu: its products want it so, the others do not care


def way(q):
    """Which kernel computes a sequence: "matmul" (CPU, bf16), "flash" (CPU, fp32 and fp64) or "device" (all else)."""
    return "device" if q.device.type != "cpu" else "matmul" if q.dtype == torch.bfloat16 else "flash"


def kept_for_backward(q, training):
    """Empty room for what a kernel's backward wants of its forward: the flash kernel's log-sum-exp [H, T], softmax weights
    [T * H * KEEP] of the matrix products, nothing [0] elsewhere. Its size depends on shapes alone, as torch.compile wants."""
    T, H, _ = q.shape
    if way(q) == "flash":
        return q.new_zeros((H, T), dtype=torch.promote_types(q.dtype, torch.float32))     # what is computed together has none
    return q.new_empty(T * H * sdpa_cpu.KEEP if way(q) == "matmul" and training else 0)


def room(kept, used, heads, length):
    """The next part of the kept softmax weights [T * H * KEEP], for [heads, length, length] of them, and where it ends; nothing
    where none are kept. Several sequences never need more than their tokens' share: the shortest that fills a multiple of
    GRAIN has L - GRAIN + 1 tokens, and L^2 <= KEEP * (L - GRAIN + 1) for all L <= SHORT."""
    if kept.ndim == 2 or not kept.numel() or length > sdpa_cpu.KEEP:
        return kept.new_empty(0), used
    end = used + heads * length * length
    return kept[used:end], end


@torch.library.custom_op("nanoencoder::sdpa", mutates_args=())
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, training: bool
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], what the backward pass wants besides (kept_for_backward)"""
    out, kept = torch.empty_like(q, memory_format=torch.contiguous_format), kept_for_backward(q, training)
    group, used = q.shape[1] // k.shape[1], 0
    alone, together = plan(tuple(cu_seqlens.tolist()), q.shape[1], k.shape[1], q.device.type == "cpu")
    if together:
        q, k, v = (x.contiguous() for x in (q, k, v))                               # v is strided: once, not in each take()
    for p in together:
        args = take(q, p.q, p), take(k, p.kv, p), take(v, p.kv, p)
        weights, used = room(kept, used, *args[0].shape[:2])
        put(out, sdpa_cpu.forward(*args, weights, causal, p.hidden), p.real, p.tokens)
    for s, e in alone:
        args = heads_first(q, s, e), heads_first(k, s, e, group), heads_first(v, s, e, group)
        if way(q) == "matmul":
            weights, used = room(kept, used, *args[0].shape[:2])
            o = sdpa_cpu.forward(*args, weights, causal)
        elif way(q) == "flash":
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*(x[None] for x in args), 0.0, causal)
            o, kept[:, s:e] = o[0], lse[0]
        else:
            o = F.scaled_dot_product_attention(*(x[None] for x in args), is_causal=causal)[0]
        out[s:e] = o.transpose(0, 1)                                                # [H, L, D] -> [L, H, D]
    return out, kept


@sdpa.register_fake
def _(q, k, v, cu_seqlens, causal, training):
    return torch.empty_like(q, memory_format=torch.contiguous_format), kept_for_backward(q, training)


@torch.library.custom_op("nanoencoder::sdpa_backward", mutates_args=())
def sdpa_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                  kept: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of q [T, H, D], k and v [T, Hkv, D]"""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    kv_heads, group, used = k.shape[1], q.shape[1] // k.shape[1], 0
    alone, together = plan(tuple(cu_seqlens.tolist()), q.shape[1], kv_heads, q.device.type == "cpu")
    if together:
        grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    for p in together:
        do, *args = take(grad, p.q, p), take(q, p.q, p), take(k, p.kv, p), take(v, p.kv, p)
        do.masked_fill_(p.hidden.transpose(1, 2), 0.0)                              # a repeated query adds nothing
        weights, used = room(kept, used, *do.shape[:2])
        grads = sdpa_cpu.backward(do, *args, weights, causal, p.hidden)
        put(dq, grads[0], p.real, p.tokens)
        for d, g in ((dk, grads[1]), (dv, grads[2])):
            if group > 1:                                                           # a group's gradients add up
                g = g.unflatten(0, (-1, group)).sum(1)                              # [G * H, L, D] -> [G * Hkv, L, D]
            put(d, g, p.real_kv, p.tokens)
    for s, e in alone:
        args = [heads_first(q, s, e), heads_first(k, s, e, group), heads_first(v, s, e, group)]
        do = heads_first(grad, s, e)
        if way(q) == "matmul":
            weights, used = room(kept, used, *do.shape[:2])
            grads = sdpa_cpu.backward(do, *args, weights, causal)
        elif way(q) == "flash":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do[None], *(x[None] for x in args), heads_first(out, s, e)[None], kept[None, :, s:e], 0.0, causal)
            grads = [g[0] for g in grads]
        else:   # other devices' kernels keep state of their own between forward and backward: run the forward again
            with torch.enable_grad():
                args = [x.detach()[None].requires_grad_() for x in args]
                grads = torch.autograd.grad(F.scaled_dot_product_attention(*args, is_causal=causal), args, do[None])
            grads = [g[0] for g in grads]
        dq[s:e] = grads[0].transpose(0, 1)                                          # [H, L, D] -> [L, H, D]
        for d, g in ((dk, grads[1]), (dv, grads[2])):
            if group > 1:                                                           # a group's gradients add up
                g = g.unflatten(0, (kv_heads, group)).sum(1)                        # [H, L, D] -> [Hkv, L, D]
            d[s:e] = g.transpose(0, 1)
    return dq, dk, dv


@sdpa_backward.register_fake
def _(grad, q, k, v, out, kept, cu_seqlens, causal):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.causal, _ = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)        # else what is kept gets a gradient of zeros as large as itself


def backward(ctx, grad, _):
    q, k, v, out, kept, cu_seqlens = ctx.saved_tensors
    return *sdpa_backward(grad, q, k, v, out, kept, cu_seqlens, ctx.causal), None, None, None


sdpa.register_autograd(backward, setup_context=setup_context)


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return sdpa(q, k, v, cu_seqlens, causal, training)[0]
