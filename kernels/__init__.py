"""The two operations that decide this trainer's speed, each with a slow, obvious reference.

    attention(q, k, v, cu_seqlens, causal, impl)      dispatch.py: Triton (attention.py), varlen.py,
                                                      sdpa.py or reference.py
    linear_cross_entropy(hidden, weight, targets)     cross_entropy.py
"""
from .cross_entropy import linear_cross_entropy

# `attention` becomes the function here, after dispatch.py has imported the module of that name
from .dispatch import ATTENTION, attention, resolve, triton_kernels

__all__ = ["ATTENTION", "attention", "linear_cross_entropy", "resolve", "triton_kernels"]
