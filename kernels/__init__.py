"""The two operations that decide this trainer's speed, each behind one function with a slow, obvious reference.

    attention(q, k, v, cu_seqlens, causal, impl)         kernels/reference.py, kernels/sdpa.py
    linear_cross_entropy(hidden, weight, targets)        kernels/cross_entropy.py
"""
import torch

from .cross_entropy import linear_cross_entropy
from .reference import attention as reference_attention
from .sdpa import attention as sdpa_attention

ATTENTION = {"sdpa": sdpa_attention, "reference": reference_attention}   # a new kernel is one entry here

__all__ = ["ATTENTION", "attention", "linear_cross_entropy", "resolve"]


def resolve(impl):
    """"auto" -> the fastest implementation that works here; other names are themselves. Raises ValueError."""
    if impl == "auto":
        return "sdpa"
    if impl not in ATTENTION:
        raise ValueError(f"attention={impl}: expected auto or one of {', '.join(ATTENTION)}")
    return impl


def attention(q, k, v, cu_seqlens, causal: bool, impl: str = "auto") -> torch.Tensor:
    """Softmax attention within each packed sequence, scale 1/sqrt(D), differentiable.

    q [T, H, D]; k, v [T, Hkv, D] with H a multiple of Hkv (GQA: query head h reads KV head h // (H // Hkv));
    cu_seqlens [S+1] int32, from 0 to T, non-decreasing: sequence s is the tokens [cu_seqlens[s], cu_seqlens[s+1]).
    causal: a token sees itself and what stands before it in its sequence; otherwise the whole sequence. -> [T, H, D]
    """
    return ATTENTION[resolve(impl)](q, k, v, cu_seqlens, causal)
