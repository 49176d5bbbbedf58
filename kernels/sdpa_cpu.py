"""Attention of one sequence on a CPU in bf16, as plain matrix products over blocks of queries.

PyTorch's flash kernel for CPUs works in tiles that are too small for a CPU's bf16 units: 6 heads x
512 tokens x 64 took it 3.0 ms forward and 7.4 backward on two Zen cores with avx512_bf16. The
products here took 1.8 and 4.4. The price is precision and memory: scores are rounded to bf16
(relative error of the output 4e-3 instead of 2e-3 on normal inputs), and one block of scores is in
memory at a time. A long fp32 sequence stays with the flash kernel, which is faster there. Several
short ones come here in any dtype, as one batch (sdpa.py). On other devices than a CPU, sdpa.py
computes the output by PyTorch's kernels and only the gradients here.

Inputs are contiguous with heads first, [H, L, D]: oneDNN's batched product reads that, and its
transpose, without a copy.
"""

import torch

# Sequences of up to KEEP tokens save their softmax weights for the backward pass (docs/log.md).
# Longer ones compute them again. So no more than KEEP numbers are saved per token and head.
KEEP = 512


def query_blocks(length, causal):
    """Yield (first query, end of the queries, end of the keys they see) for each block of queries.

    Small blocks skip more of what a causal mask hides. Large blocks make faster products, and a
    single one has no gradients to sum. The sizes were measured: docs/log.md.
    """
    size = 256 if causal else 512
    for start in range(0, length, size):
        end = min(start + size, length)
        end_of_keys = end if causal else length
        yield start, end, end_of_keys


def saved_block(saved, q, start, end, end_of_keys):
    """Return the view [H, n, m] of `saved` [H * L * L] that holds a block's weights.

    Return None if the weights of this sequence are not saved.
    """
    heads, length, _ = q.shape
    if length > KEEP or saved.numel() == 0:
        return None
    n_queries = end - start
    block = saved[start * heads * length :][: heads * n_queries * end_of_keys]
    return block.view(heads, n_queries, end_of_keys)


def softmax_weights(q, k, causal, is_hidden=None, out=None):
    """Compute the softmax of q k^T for a block of queries and the keys they see.

    q [H, n, D], k [H, m, D] -> [H, n, m], written into `out` if given. is_hidden [H, 1, L]: keys
    that no query sees.
    """
    scores = torch.bmm(q, k.transpose(1, 2), out=out)  # [H, n, m]
    if is_hidden is not None:
        scores.masked_fill_(is_hidden[:, :, : k.shape[1]], float("-inf"))
    if causal:
        # Only the last n keys, which are the block's own tokens, are hidden from some queries.
        n = q.shape[1]
        is_later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        scores[:, :, -n:].masked_fill_(is_later, float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def forward(q, k, v, saved, causal, is_hidden=None):
    """Compute the output [H, L, D] for q, k, v [H, L, D].

    saved: memory [H * L * L] for the softmax weights, or [0] to save none. is_hidden [H, 1, L]:
    keys that no query sees.
    """
    out = torch.empty_like(q)
    q = q * q.shape[-1] ** -0.5
    for start, end, end_of_keys in query_blocks(q.shape[1], causal):
        keys = k[:, :end_of_keys]
        block = saved_block(saved, q, start, end, end_of_keys)
        p = softmax_weights(q[:, start:end], keys, causal, is_hidden, block)  # [H, n, m]
        out[:, start:end] = torch.bmm(p, v[:, :end_of_keys])
    return out


def backward(grad, q, k, v, saved, causal, is_hidden=None):
    """Return the gradients of q, k, v [H, L, D]. Those of k and v are summed in fp32."""
    length = q.shape[1]
    scale = q.shape[-1] ** -0.5
    q = q * scale
    dq = torch.empty_like(q)
    dk = None
    dv = None
    for start, end, end_of_keys in query_blocks(length, causal):
        # The softmax weights: saved by the forward pass, or computed again.
        queries = q[:, start:end]  # [H, n, D]
        keys = k[:, :end_of_keys]  # [H, m, D]
        block_grad = grad[:, start:end]  # [H, n, D]
        p = saved_block(saved, q, start, end, end_of_keys)  # [H, n, m]
        if p is None:
            p = softmax_weights(queries, keys, causal, is_hidden)

        # dv = p^T grad; ds = the softmax's gradient of grad v^T; dq = ds k; dk = ds^T q
        dv_block = torch.bmm(p.transpose(1, 2), block_grad)  # [H, m, D]
        ds = torch.bmm(block_grad, v[:, :end_of_keys].transpose(1, 2))  # [H, n, m]
        ds = torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        dq[:, start:end] = torch.bmm(ds, keys).mul_(scale)
        dk_block = torch.bmm(ds.transpose(1, 2), queries)  # [H, m, D]

        is_only_block = start == 0 and end == length
        if is_only_block:
            return dq, dk_block, dv_block
        if start == 0:
            dk = k.new_zeros(k.shape, dtype=torch.float32)
            dv = v.new_zeros(v.shape, dtype=torch.float32)
        dk[:, :end_of_keys] += dk_block
        dv[:, :end_of_keys] += dv_block
    return dq, dk, dv
