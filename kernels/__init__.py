"""The two operations that decide this trainer's speed, each behind one function with a slow, obvious reference.

    attention(q, k, v, cu_seqlens, causal, impl)         kernels/attention.py (Triton), sdpa.py, reference.py
    linear_cross_entropy(hidden, weight, targets)        kernels/cross_entropy.py
"""
import functools
import os

import torch

from .cross_entropy import linear_cross_entropy
from .reference import attention as reference_attention
from .sdpa import attention as sdpa_attention

try:
    from . import attention as triton_kernels  # the module, before the function below takes its name
except ImportError:                                   # no Triton on this platform
    triton_kernels = None


def triton_attention(q, k, v, cu_seqlens, causal):     # where it can run: resolve() has asked
    return triton_kernels.attention(q, k, v, cu_seqlens, causal)


ATTENTION = {"triton": triton_attention, "sdpa": sdpa_attention, "reference": reference_attention}   # a new one is one entry here

__all__ = ["ATTENTION", "attention", "linear_cross_entropy", "resolve", "triton_kernels"]


def why_not_triton(device_type, dtype, head_dim):
    """None if the Triton kernels take such tensors here, else the reason in words."""
    return triton_kernels.why_not(device_type, dtype, head_dim) if triton_kernels else "Triton is not installed (it needs Linux)"


def resolve(impl, device_type=None, dtype=None, head_dim=None):
    """Check a name; with the other three also turn "auto" into the fastest implementation that works here: Triton on a
    CUDA GPU once a small trial call agrees with the reference, else PyTorch's SDPA. Says once what it chose and why.

    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    if impl != "auto" and impl not in ATTENTION:
        raise ValueError(f"attention={impl}: expected auto or one of {', '.join(ATTENTION)}")
    if device_type and impl == "auto":
        return choose(device_type, dtype, head_dim)
    reason = why_not_triton(device_type, dtype, head_dim) if device_type and impl == "triton" else None
    if reason:
        raise ValueError(f"attention=triton: {reason}")
    return impl


def choose(device_type, dtype, head_dim):
    return chosen(device_type, dtype, head_dim)


# torch.compile calls it while it traces and keeps the answer in the graph. What torch.compiler.assume_constant_result does,
# without its import of torch._dynamo, which every process would pay with a second at its start; a test holds it.
choose._dynamo_marked_constant = True


@functools.cache
def chosen(device_type, dtype, head_dim):
    """resolve("auto"), once a kind of input and process."""
    if device_type != "cuda":
        return "sdpa"
    reason, error = objection(device_type, dtype, head_dim)
    if os.environ.get("RANK", "0") == "0":
        print(f"attention: PyTorch's SDPA, because {reason}" if reason else f"attention: Triton kernels, {dtype} at head dim "
              f"{head_dim}; a trial call came within {error:.1e} of the reference", flush=True)
    return "sdpa" if reason else "triton"


def objection(device_type, dtype, head_dim):
    """Why the Triton kernels should not be used here, in words, after a trial call, or None; and the trial's error."""
    reason = why_not_triton(device_type, dtype, head_dim)
    if reason:
        return reason, None
    try:
        error = trial(device_type, dtype, head_dim)
    except Exception as problem:   # whatever a compiler or a driver throws at us: train on, and say so
        first_line = (str(problem).splitlines() or [""])[0]
        return f"a trial call of the Triton kernels failed: {type(problem).__name__}: {first_line}", None
    # rounding to bf16 is 4e-3; a miscompiled kernel is off by far more than 2e-2
    return (None if error < 2e-2 else f"a trial call of the Triton kernels was off by {error:.1e}"), error


def trial(device_type, dtype, head_dim):
    """Largest relative error of the Triton kernels' output and gradients on a small packed batch, both masks."""
    generator = torch.Generator(device_type).manual_seed(0)
    cu_seqlens = torch.tensor([0, 130, 131, 300], dtype=torch.int32, device=device_type)
    worst = 0.0
    for causal in (False, True):
        inputs = [torch.randn(300, heads, head_dim, device=device_type, generator=generator).to(dtype) for heads in (3, 1, 1, 3)]
        found = []
        for implementation, precision in ((triton_attention, dtype), (reference_attention, torch.float32)):
            with torch.enable_grad(), torch.autocast(device_type, enabled=False):
                q, k, v = (x.to(precision, copy=True).requires_grad_() for x in inputs[:3])
                out = implementation(q, k, v, cu_seqlens, causal)
                found.append([out, *torch.autograd.grad(out, (q, k, v), inputs[3].to(precision))])
        worst = max([worst] + [((a - b).norm() / b.norm()).nan_to_num(float("inf")).item() for a, b in zip(*found)])
    return worst


def check(q, k, v, cu_seqlens):
    """Raises ValueError, in one line, for what no implementation can mean."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: {shapes}: expected [T, H, D] and twice [T, Hkv, D]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {shapes}: query heads must be a multiple of KV heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype")
    if not q.device == k.device == v.device == cu_seqlens.device:
        raise ValueError(f"attention: q is on {q.device}, k on {k.device}, v on {v.device}, cu_seqlens on {cu_seqlens.device}: "
                         "expected one device")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() < 2:
        raise ValueError(f"attention: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: expected int32 [S + 1]")
    # its values: once a tensor, because on a GPU a look is a synchronisation; a compiled or captured step does not look
    if torch.compiler.is_compiling() or getattr(cu_seqlens, "checked_for", None) == q.shape[0]:
        return
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[0] or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"attention: cu_seqlens goes from {bounds[0]} to {bounds[-1]}: expected 0 to T = {q.shape[0]}, "
                         "never falling")
    cu_seqlens.checked_for = q.shape[0]


def attention(q, k, v, cu_seqlens, causal: bool, impl: str = "auto") -> torch.Tensor:
    """Softmax attention within each packed sequence, scale 1/sqrt(D), differentiable.

    q [T, H, D]; k, v [T, Hkv, D] with H a multiple of Hkv (GQA: query head h reads KV head h // (H // Hkv)), any strides;
    cu_seqlens [S+1] int32, from 0 to T, non-decreasing: sequence s is the tokens [cu_seqlens[s], cu_seqlens[s+1]).
    causal: a token sees itself and what stands before it in its sequence; otherwise the whole sequence. -> [T, H, D]
    Under autocast the inputs are cast first. Raises ValueError for shapes, dtypes, devices or bounds that do not fit.
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    check(q, k, v, cu_seqlens)
    return ATTENTION[resolve(impl, kind, q.dtype, q.shape[-1])](q, k, v, cu_seqlens, causal)
