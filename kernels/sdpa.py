"""Packed attention by PyTorch's own fused kernels, one call a sequence: runs everywhere, needs no Triton.

One custom op with a fake and an autograd formula, so torch.compile sees a single node and no graph break however many
sequences there are. The loop reads cu_seqlens on the host, which on a GPU is one synchronisation a layer: this is the
portable path, not the fast one.
"""
import torch
import torch.nn.functional as F


def sequences(cu_seqlens):
    """(start, end) of every sequence that has tokens."""
    bounds = cu_seqlens.tolist()
    return [(s, e) for s, e in zip(bounds, bounds[1:]) if e > s]


def heads_first(x, start, end, group=1):
    """[T, Hkv, D] -> one sequence as [1, H, L, D], each KV head repeated for its group of query heads."""
    x = x[start:end].transpose(0, 1).unsqueeze(0)
    return x.repeat_interleave(group, dim=1) if group > 1 else x


def outputs(q):
    """Empty out [T, H, D], and log-sum-exp [H, T] on a CPU, whose backward kernel wants it ([H, 0] elsewhere)."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (torch.empty_like(q, memory_format=torch.contiguous_format),
            q.new_empty((q.shape[1], q.shape[0] if q.device.type == "cpu" else 0), dtype=lse_dtype))


@torch.library.custom_op("nanoencoder::sdpa", mutates_args=())
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], log-sum-exp of the scores [H, T]"""
    out, lse = outputs(q)
    group = q.shape[1] // k.shape[1]
    for s, e in sequences(cu_seqlens):
        args = heads_first(q, s, e), heads_first(k, s, e, group), heads_first(v, s, e, group)
        if q.device.type == "cpu":
            o, lse_s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, causal)
            lse[:, s:e] = lse_s[0]
        else:
            o = F.scaled_dot_product_attention(*args, is_causal=causal)
        out[s:e] = o[0].transpose(0, 1)                                             # [H, L, D] -> [L, H, D]
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
        if q.device.type == "cpu":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, *args, heads_first(out, s, e), lse[:, s:e].unsqueeze(0), 0.0, causal)
        else:   # other devices' kernels keep state of their own between forward and backward: run the forward again
            with torch.enable_grad():
                args = [x.detach().requires_grad_() for x in args]
                grads = torch.autograd.grad(F.scaled_dot_product_attention(*args, is_causal=causal), args, do)
        dq[s:e] = grads[0][0].transpose(0, 1)                                       # [H, L, D] -> [L, H, D]
        for d, g in ((dk, grads[1]), (dv, grads[2])):                               # the group's gradients add up
            d[s:e] = g[0].unflatten(0, (kv_heads, group)).sum(1).transpose(0, 1)    # [H, L, D] -> [L, Hkv, D]
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
