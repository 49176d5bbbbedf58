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


def outputs(q):
    """Empty out [T, H, D], and log-sum-exp [H, T] where the backward kernel wants it ([H, 0] elsewhere)."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (torch.empty_like(q, memory_format=torch.contiguous_format),
            q.new_empty((q.shape[1], q.shape[0] if way(q) == "flash" else 0), dtype=lse_dtype))


@torch.library.custom_op("nanoencoder::sdpa", mutates_args=())
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], log-sum-exp of the scores [H, T]"""
    out, lse = outputs(q)
    group = q.shape[1] // k.shape[1]
    for s, e in sequences(cu_seqlens):
        args = heads_first(q, s, e), heads_first(k, s, e, group), heads_first(v, s, e, group)
        if way(q) == "matmul":
            o = cpu_bf16.forward(*args, causal)
        elif way(q) == "flash":
            o, lse_s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*(x[None] for x in args), 0.0, causal)
            o, lse[:, s:e] = o[0], lse_s[0]
        else:
            o = F.scaled_dot_product_attention(*(x[None] for x in args), is_causal=causal)[0]
        out[s:e] = o.transpose(0, 1)                                                # [H, L, D] -> [L, H, D]
    return out, lse


@sdpa.register_fake
def _(q, k, v, cu_seqlens, causal):
    return outputs(q)


@torch.library.custom_op("nanoencoder::sdpa_backward", mutates_args=())
def sdpa_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                  lse: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of q [T, H, D], k and v [T, Hkv, D]"""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    for s, e in sequences(cu_seqlens):
        args = [heads_first(q, s, e), heads_first(k, s, e, group), heads_first(v, s, e, group)]
        do = heads_first(grad, s, e)
        if way(q) == "matmul":
            grads = cpu_bf16.backward(do, *args, causal)
        elif way(q) == "flash":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do[None], *(x[None] for x in args), heads_first(out, s, e)[None], lse[None, :, s:e], 0.0, causal)
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
def _(grad, q, k, v, out, lse, cu_seqlens, causal):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def backward(ctx, grad, _):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    return *sdpa_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.causal), None, None


sdpa.register_autograd(backward, setup_context=setup_context)


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention."""
    return sdpa(q, k, v, cu_seqlens, causal)[0]
