"""LM head and cross-entropy in one, over target positions only and a chunk of rows at a time.

The logits of a step would be the largest tensor of the whole program (24,576 positions x 128,256 in fp32: 11.7 GiB, and
autograd keeps copies). Here at most one chunk of them is alive: its loss and its gradient are computed together in the
forward pass, and the backward pass only scales. Same FLOPs as the dense way.
"""
import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 29}   # logits of one chunk: what a CPU's cache holds; 2 GiB in fp32 on a GPU


def chunk_loss(hidden, weight, targets, need_grad):
    """-> sum of losses (fp32), and the gradient of that sum by the logits [n, V] in hidden's dtype, or None."""
    log_p = torch.log_softmax(F.linear(hidden, weight), dim=1, dtype=torch.float32)   # [n, V]
    wanted = targets >= 0
    index = targets.clamp(min=0).unsqueeze(1)                                         # [n, 1]
    loss = -(log_p.gather(1, index).squeeze(1) * wanted).sum()
    if not need_grad:
        return loss, None
    grad = log_p.exp_().scatter_add_(1, index, log_p.new_full((1, 1), -1.0).expand_as(index))   # softmax - one-hot
    return loss, grad.mul_(wanted.unsqueeze(1)).to(hidden.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        need_h, need_w = ctx.needs_input_grad[:2]
        rows = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 27) // weight.shape[0])
        w = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        dh = torch.empty_like(hidden) if need_h else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        for i in range(0, hidden.shape[0], rows):
            h = hidden[i:i + rows]
            loss, grad = chunk_loss(h, w, targets[i:i + rows], need_h or need_w)
            total += loss
            if need_h:
                dh[i:i + rows] = grad @ w                                  # [n, V] [V, C] -> [n, C]
            if need_w:
                dw += grad.T @ h                                           # [V, n] [n, C] -> [V, C]
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        dh, dw = ctx.saved_tensors
        return (None if dh is None else dh * scale.to(dh.dtype),
                None if dw is None else (dw * scale).to(ctx.weight_dtype), None)


def linear_cross_entropy(hidden, weight, targets):
    """Sum of cross-entropies of softmax(hidden @ weight.T) at targets, differentiable in hidden and weight.

    hidden [N, C]; weight [V, C]; targets [N] int64, -100 where there is none. Under autocast the products run in its
    dtype; softmax, loss and the weight's gradient are fp32. -> fp32 scalar
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return LinearCrossEntropy.apply(hidden, weight, targets)
