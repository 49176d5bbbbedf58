"""Packed attention by PyTorch's own fused kernels, one call a sequence: runs everywhere, needs no Triton.

One custom op with a fake and an autograd formula, so torch.compile sees a single node and no graph break however many
sequences there are. The loop reads cu_seqlens on the host, which on a GPU is one synchronisation a layer: this is the
portable path, not the fast one.
"""
import torch
import torch.nn.functional as F

from . import cpu_bf16


def sequences(cu_seqlens):
    """(start, end) of every sequence that has tokens."""
    bounds = cu_seqlens.tolist()
    return [(s, e) for s, e in zip(bounds, bounds[1:]) if e > s]


def heads_first(x, start, end, group=1):
    """[T, Hkv, D] -> one sequence as [H, L, D], each KV head repeated for its group of query heads."""
    x = x[start:end].transpose(0, 1)
    x = x.repeat_interleave(group, dim=0) if group > 1 else x
    return x.contiguous() if way(x) == "matmul" else x     # see cpu_bf16: its products want it so, the others do not care


def way(q):
    """Which kernel computes a sequence: "matmul" (CPU, bf16), "flash" (CPU, fp32 and fp64) or "device" (all else)."""
    return "device" if q.device.type != "cpu" else "matmul" if q.dtype == torch.bfloat16 else "flash"


def kept_for_backward(q, training):
    """Empty room for what a kernel's backward wants of its forward: the flash kernel's log-sum-exp [H, T], softmax weights
    [T * H * KEEP] of the matrix products, nothing [0] elsewhere. Its size depends on shapes alone, as torch.compile wants."""
    T, H, _ = q.shape
    if way(q) == "flash":
        return q.new_empty((H, T), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(T * H * cpu_bf16.KEEP if way(q) == "matmul" and training else 0)


def of_sequence(kept, q, start, end):
    """One sequence's part of the kept softmax weights [T * H * KEEP]."""
    size = q.shape[1] * cpu_bf16.KEEP if kept.numel() else 0
    return kept[start * size:end * size]


@torch.library.custom_op("nanoencoder::sdpa", mutates_args=())
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, training: bool
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], what the backward pass wants besides (kept_for_backward)"""
    out, kept = torch.empty_like(q, memory_format=torch.contiguous_format), kept_for_backward(q, training)
    group = q.shape[1] // k.shape[1]
    for s, e in sequences(cu_seqlens):
        args = heads_first(q, s, e), heads_first(k, s, e, group), heads_first(v, s, e, group)
        if way(q) == "matmul":
            o = cpu_bf16.forward(*args, of_sequence(kept, q, s, e), causal)
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
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    for s, e in sequences(cu_seqlens):
        args = [heads_first(q, s, e), heads_first(k, s, e, group), heads_first(v, s, e, group)]
        do = heads_first(grad, s, e)
        if way(q) == "matmul":
            grads = cpu_bf16.backward(do, *args, of_sequence(kept, q, s, e), causal)
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


def backward(ctx, grad, _):
    q, k, v, out, kept, cu_seqlens = ctx.saved_tensors
    return *sdpa_backward(grad, q, k, v, out, kept, cu_seqlens, ctx.causal), None, None, None


sdpa.register_autograd(backward, setup_context=setup_context)


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return sdpa(q, k, v, cu_seqlens, causal, training)[0]
