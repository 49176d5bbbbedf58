"""Attention of one sequence on a CPU in bf16, as plain matrix products over blocks of queries.

PyTorch's CPU flash kernel walks tiles too small for a CPU's bf16 units: 6 heads x 512 tokens x 64 took it 3.0 ms forward
and 7.4 backward on two Zen cores with avx512_bf16, this 1.8 and 4.4. The price is precision and memory: scores are
rounded to bf16 (relative error of the output 4e-3 instead of 2e-3 on normal inputs), and one block of them is alive.
A long fp32 sequence stays with the flash kernel, which is faster there; several short ones come here in any dtype, as one
batch (sdpa.py).

Sequences up to KEEP tokens keep their softmax weights for the backward pass (LOG.md), longer ones compute them again: that
bounds the memory at KEEP bf16 numbers a token and head, whatever the lengths.

Inputs are heads first and contiguous: oneDNN's batched product reads that and its transpose in place, and copies the rest.
"""
import torch

KEEP = 512


def blocks(length, causal):
    """(first query, end of queries, end of the keys they see). Small blocks skip more of what a causal mask hides; large
    ones make better products, and one block needs no sums of its gradients. Measured: LOG.md."""
    size = 256 if causal else 512
    for a in range(0, length, size):
        b = min(a + size, length)
        yield a, b, b if causal else length


def place(kept, q, a, b, end):
    """The part of kept [H * L * L] that holds a block's weights [H, b - a, end]; None if the sequence keeps none."""
    heads, length = q.shape[:2]
    if length > KEEP or not kept.numel():
        return None
    return kept[a * heads * length:][:heads * (b - a) * end].view(heads, b - a, end)


def weights(q, k, causal, hidden=None, out=None):
    """Softmax of q k^T for a block of queries and the keys up to its end, in out if given. [H, n, D], [H, m, D] -> [H, n, m]"""
    scores = torch.bmm(q, k.transpose(1, 2), out=out)
    if hidden is not None:
        scores.masked_fill_(hidden[:, :, :k.shape[1]], float("-inf"))
    if causal:       # only the last n keys, the block's own, are partly hidden
        n = q.shape[1]
        scores[:, :, -n:].masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def forward(q, k, v, kept, causal, hidden=None):
    """q, k, v [H, L, D] -> [H, L, D]; writes the weights into kept [H * L * L], or [0] to keep none. hidden [H, 1, L]: keys that
    nobody may see."""
    out, q = torch.empty_like(q), q * q.shape[-1] ** -0.5
    for a, b, end in blocks(q.shape[1], causal):
        p = weights(q[:, a:b], k[:, :end], causal, hidden, place(kept, q, a, b, end))                      # [H, n, m]
        out[:, a:b] = torch.bmm(p, v[:, :end])
    return out


def backward(grad, q, k, v, kept, causal, hidden=None):
    """-> gradients of q, k, v [H, L, D]; those of k and v are summed over the blocks in fp32."""
    scale = q.shape[-1] ** -0.5
    q, dq, dk, dv = q * scale, torch.empty_like(q), None, None
    for a, b, end in blocks(q.shape[1], causal):
        p, g = place(kept, q, a, b, end), grad[:, a:b]                                                     # [H, n, m], [H, n, D]
        p = weights(q[:, a:b], k[:, :end], causal, hidden) if p is None else p
        dv_block = torch.bmm(p.transpose(1, 2), g)                                                         # [H, m, D]
        ds = torch.bmm(g, v[:, :end].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)                  # [H, n, m]
        dq[:, a:b] = torch.bmm(ds, k[:, :end]).mul_(scale)
        dk_block = torch.bmm(ds.transpose(1, 2), q[:, a:b])                                                # [H, m, D]
        if a == 0 and b == q.shape[1]:
            return dq, dk_block, dv_block
        if a == 0:
            dk, dv = k.new_zeros(k.shape, dtype=torch.float32), v.new_zeros(v.shape, dtype=torch.float32)
        dk[:, :end] += dk_block
        dv[:, :end] += dv_block
    return dq, dk, dv
