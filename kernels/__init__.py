"""The two operations that decide this trainer's speed, each with a slow, obvious reference.

    attention(q, k, v, cu_seqlens, causal, impl)
    linear_cross_entropy(hidden, weight, targets)

    dispatch           attention(), and which of these computes it:
    triton_attention   our own kernels, for CUDA GPUs
    blocks             how many rows a program of them works on, for each kind of GPU
    varlen             PyTorch's packed attention, for CUDA GPUs
    sdpa, sdpa_cpu     PyTorch's scaled_dot_product_attention, one call per sequence: the fast path
                       of a CPU
    reference          both definitions, dense and slow
    cross_entropy      the LM head and its loss, a chunk of logits at a time
"""
from .cross_entropy import linear_cross_entropy

# `attention` becomes the function here, after dispatch.py has imported the module of that name
from .dispatch import ATTENTION, attention, resolve, triton_kernels

__all__ = ["ATTENTION", "attention", "linear_cross_entropy", "resolve", "triton_kernels"]
