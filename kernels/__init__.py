"""The two operations that decide this trainer's speed, each with a slow, obvious reference.

    attention(q, k, v, cu_seqlens, causal, impl)
    linear_cross_entropy(hidden, weight, targets)

    dispatch           attention(), which calls one of the next four:
    triton_attention   our own kernels, for CUDA GPUs
    varlen             PyTorch's packed attention, for CUDA GPUs
    sdpa               PyTorch's scaled_dot_product_attention, one call per sequence: runs anywhere
    reference          the definitions of both operations, dense and slow
    blocks             the block sizes of our own kernels, for each kind of GPU
    sdpa_cpu           what sdpa calls on a CPU in bf16, and for short sequences
    cross_entropy      linear_cross_entropy(): LM head and loss, a chunk of logits at a time
"""
from .cross_entropy import linear_cross_entropy
from .dispatch import ATTENTION, attention, resolve, triton_kernels

__all__ = ["ATTENTION", "attention", "linear_cross_entropy", "resolve", "triton_kernels"]
