"""The definitions of both operations, dense and slow, in the precision of their inputs.

Every kernel is tested against these two functions.
"""

import torch
import torch.nn.functional as F


def attention(q, k, v, cu_seqlens, causal):
    """See kernels.attention. q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]

    It needs O(T^2) memory, and takes any dtype, fp64 included.
    """
    T, H, D = q.shape
    group = H // k.shape[1]
    token = torch.arange(T, device=q.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True)  # [T] each token's sequence
    is_visible = sequence[:, None] == sequence[None, :]  # [T, T]
    if causal:
        is_visible = is_visible & (token[:, None] >= token[None, :])
    k = k.repeat_interleave(group, dim=1)  # [T, H, D]
    v = v.repeat_interleave(group, dim=1)  # [T, H, D]
    scores = torch.einsum("ihd,jhd->hij", q, k) / D**0.5  # [H, T, T]
    weights = scores.masked_fill(~is_visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v)  # [T, H, D]


def linear_cross_entropy(hidden, weight, targets):
    """Return the sum of the N losses, in the dtype of the inputs.

    hidden [N, C], weight [V, C], targets [N], -100 where there is none
    """
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
