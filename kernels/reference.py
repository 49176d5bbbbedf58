"""The definitions, dense and slow, in whatever precision they are given: what every kernel is tested against."""
import torch
import torch.nn.functional as F


def attention(q, k, v, cu_seqlens, causal):
    """q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]; see kernels.attention. O(T^2) memory, any dtype, fp64 included."""
    T, H, D = q.shape
    group = H // k.shape[1]
    token = torch.arange(T, device=q.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True)             # [T], which sequence a token is in
    visible = sequence[:, None] == sequence[None, :]                                # [T, T]
    if causal:
        visible = visible & (token[:, None] >= token[None, :])
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))                      # [T, H, D]
    scores = torch.einsum("ihd,jhd->hij", q, k) / D ** 0.5                          # [H, T, T]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v)                                 # [T, H, D]


def linear_cross_entropy(hidden, weight, targets):
    """hidden [N, C], weight [V, C], targets [N] (-100: no target) -> the sum of the N losses, in the inputs' dtype."""
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
