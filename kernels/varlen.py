"""Packed attention by PyTorch's own kernel for it: torch.nn.attention.varlen, which is
FlashAttention-2 over cu_seqlens.

This is what `--attention=auto` takes on a GPU where our Triton kernels cannot run (a head dim they
do not have, an old Triton, a compiler's fault) or are clearly slower. It is one call for all
sequences. It has two drawbacks. The gradient of q is summed with atomic additions, so two runs of
the same training differ in their last bits. And the host waits for the device once per batch, see
longest_sequence.

varlen_attn takes the length of the longest sequence as a Python int. Inside torch.compile that
would be a constant, and every batch would compile again. So the call is hidden in a custom operator
of our own, which looks the length up when it runs.
"""

import functools
import inspect

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# {cu_seqlens: tokens in its longest sequence}. An entry disappears together with its tensor.
LONGEST = WeakTensorKeyDictionary()


@functools.cache
def torch_varlen():
    """Return PyTorch's module, or None for a PyTorch that was built without it.

    It is imported at the first use, because it imports torch._dynamo, which takes longer than all
    else that a program imports.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen


@functools.cache
def has_parameter(name):
    """Return whether this version of varlen_attn has a parameter of this name."""
    module = torch_varlen()
    return module is not None and name in inspect.signature(module.varlen_attn).parameters


def takes_groups():
    """Return whether a group of query heads may read one KV head, as from torch 2.13 on.

    torch 2.11 needs as many heads in k and v as in q.
    """
    return has_parameter("enable_gqa")


def why_not(device_type, dtype, head_dim):
    """Return None if varlen_attn can compute such tensors here, else the reason in words."""
    if device_type != "cuda":
        return "PyTorch's packed attention needs a CUDA GPU"
    if not has_parameter("window_size"):
        return "PyTorch's packed attention needs torch 2.11 or newer"
    if torch.version.hip:
        return "PyTorch's packed attention was not tried on AMD GPUs"
    if torch.cuda.get_device_capability()[0] < 8:
        return "PyTorch's packed attention needs an Ampere GPU or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"PyTorch's packed attention takes bfloat16 and float16, not {dtype}"
    if head_dim % 8 != 0 or head_dim > 256:
        return (
            f"head dim {head_dim} is not supported by PyTorch's packed attention: "
            "multiples of 8 up to 256 are"
        )
    return None


def longest_sequence(cu_seqlens):
    """Return how many tokens the longest sequence has.

    On a GPU the host waits for the device to read this number, but only once per batch: the answer
    is remembered for as long as the tensor lives, for the other layers and the backward pass. So do
    not write into a cu_seqlens that attention has seen.
    """
    if cu_seqlens not in LONGEST:
        LONGEST[cu_seqlens] = int(cu_seqlens.diff().max())
    return LONGEST[cu_seqlens]


def window(causal):
    """Return how many tokens a token sees to its left and to its right; -1 means all of them."""
    return (-1, 0) if causal else (-1, -1)


def repeat_heads(x, n_head):
    """Repeat each KV head for its group of query heads. [T, Hkv, D] -> [T, H, D]"""
    return x.repeat_interleave(n_head // x.shape[1], dim=1)


def forward(q, k, v, cu_seqlens, causal):
    """Return out [T, H, D] and the log-sum-exp of the scores [H, T]."""
    longest = longest_sequence(cu_seqlens)
    options = {"window_size": window(causal), "return_aux": torch_varlen().AuxRequest(lse=True)}
    if takes_groups():
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    call = torch_varlen().varlen_attn
    return call(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def gradients(grad, q, k, v, out, lse, cu_seqlens, causal):
    """Return the gradients of q [T, H, D], k and v [T, Hkv, D]."""
    longest = longest_sequence(cu_seqlens)
    n_head = q.shape[1]
    n_kv_head = k.shape[1]
    if not takes_groups():
        k = repeat_heads(k, n_head)
        v = repeat_heads(v, n_head)
    # There is no dropout, but the operator needs a seed for it.
    dropout_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    # varlen_attn's own backward pass, for which PyTorch has no public name. Its arguments are the
    # same in torch 2.11 and 2.13.
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        grad, q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, longest, causal,
        dropout_state, None, list(window(causal)),
    )
    # A repeated KV head gets the sum of its copies' gradients.
    # [T, H, D] -> [T, Hkv, group, D] -> [T, Hkv, D]
    if dk.shape[1] != n_kv_head:
        dk = dk.unflatten(1, (n_kv_head, -1)).sum(2)
        dv = dv.unflatten(1, (n_kv_head, -1)).sum(2)
    return dq, dk, dv


# ---- the operator that PyTorch sees: one node for torch.compile, with its own backward pass


def empty_outputs(q):
    """Return memory for out [T, H, D] and the log-sum-exp of the scores [H, T]."""
    T, H, D = q.shape
    return q.new_empty((T, H, D)), q.new_empty((H, T), dtype=torch.float32)


def empty_gradients(q, k, v):
    """Return memory for the gradients of q [T, H, D], k and v [T, Hkv, D]."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("nanoencoder::varlen", mutates_args=())
def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [T, H, D], log-sum-exp of the scores [H, T]"""
    if q.shape[0] == 0:
        return empty_outputs(q)
    out, lse = forward(q, k, v, cu_seqlens, causal)
    return out.contiguous(), lse.contiguous()


@varlen.register_fake
def fake(q, _k, _v, _cu_seqlens, _causal):
    return empty_outputs(q)


@torch.library.custom_op("nanoencoder::varlen_backward", mutates_args=())
def varlen_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of q [T, H, D], k and v [T, Hkv, D]"""
    if q.shape[0] == 0:
        return empty_gradients(q, k, v)
    dq, dk, dv = gradients(grad.contiguous(), q, k, v, out, lse, cu_seqlens, causal)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@varlen_backward.register_fake
def fake_backward(_grad, q, k, v, _out, _lse, _cu_seqlens, _causal):
    return empty_gradients(q, k, v)


def setup_context(ctx, inputs, output):
    """Save what the backward pass needs of the forward pass."""
    q, k, v, cu_seqlens, ctx.causal = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
    ctx.set_materialize_grads(False)


def backward(ctx, grad, _grad_of_lse):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    dq, dk, dv = varlen_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.causal)
    return dq, dk, dv, None, None


varlen.register_autograd(backward, setup_context=setup_context)


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention."""
    return varlen(q, k, v, cu_seqlens, causal)[0]
