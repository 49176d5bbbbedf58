"""LM head and cross-entropy in one, over target positions only and a chunk of rows at a time.

The logits of a step would be the largest tensor of the whole program (24,576 positions x 128,256 in fp32: 11.7 GiB, and
autograd keeps copies). Here one chunk of them is alive, in the inputs' dtype and in one buffer for all chunks; its loss and
its gradient are computed together in the forward pass, the gradient over the logits, and the backward pass only scales.
Same FLOPs as the dense way, and on a GPU some 10 bytes of memory traffic a logit instead of some 34 (counted).

    for each chunk of rows:   logits = h W^T             # [n, V], a library product
                              logits <- softmax - 1hot   # in place, a row a program: `row_kernel`; in torch elsewhere
                              dh = logits W              # [n, C]
                              dW += logits^T h           # [V, C], summed over the chunks in fp32

PyTorch's own F.linear_cross_entropy (2.13) chunks too, but returns the sum in bf16 (10.5 for 10.74), so it is no substitute.
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:   # no Triton on this platform: the torch path below is all there is
    triton = None

# most logits in a chunk: what a CPU's cache holds; 2 GiB in bf16 on a GPU, where few large products beat many small ones
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 30}
CHUNK_ROWS = 512      # but at least so many rows: each chunk adds to all of dW, and few rows make a poor product (LOG.md)

if triton:
    @triton.jit
    def row_kernel(LOGITS, TARGETS, LOSS, row_stride, V, B: tl.constexpr, GRADIENT: tl.constexpr):
        """One row of logits [V]: its loss, and over it the loss's gradient, zeros where there is no target (-100).

        The first pass is an online maximum and sum; what the second reads is still in the L2 cache (132 rows of 128,256
        in bf16 are 34 MB). int64 offsets: 24,576 x 128,256 is more than 2^31.
        """
        row = tl.program_id(0).to(tl.int64)
        LOGITS += row * row_stride
        target = tl.load(TARGETS + row)
        wanted = target >= 0
        at_target = tl.load(LOGITS + tl.where(wanted, target, 0)).to(tl.float32)   # before the second pass writes over it
        top, total = float("-inf"), 0.0
        for begin in tl.range(0, V, B):
            i = begin + tl.arange(0, B)
            x = tl.load(LOGITS + i, mask=i < V, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
            top = new_top
        lse = top + tl.log(total)
        tl.store(LOSS + row, tl.where(wanted, lse - at_target, 0.0))
        if GRADIENT:
            for begin in tl.range(0, V, B):
                i = begin + tl.arange(0, B)
                x = tl.load(LOGITS + i, mask=i < V, other=float("-inf")).to(tl.float32)
                gradient = tl.where(wanted, tl.exp(x - lse) - tl.where(i == target, 1.0, 0.0), 0.0)
                tl.store(LOGITS + i, gradient.to(LOGITS.dtype.element_ty), mask=i < V)


def softmax_loss(logits, targets, need_grad, impl):
    """-> sum of losses (fp32); logits [n, V] become the gradient of that sum, if needed."""
    n, V = logits.shape
    if impl == "triton":
        losses = torch.empty(n, dtype=torch.float32, device=logits.device)
        row_kernel[(n,)](logits, targets, losses, logits.stride(0), V, B=min(8192, triton.next_power_of_2(V)),
                         GRADIENT=need_grad, num_warps=8)
        return losses.sum()
    log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)                     # [n, V]
    wanted = targets >= 0
    index = targets.clamp(min=0).unsqueeze(1)                                         # [n, 1]
    loss = -(log_p.gather(1, index).squeeze(1) * wanted).sum()
    if need_grad:
        p = log_p.exp_().scatter_add_(1, index, log_p.new_full((1, 1), -1.0).expand_as(index))   # softmax - one-hot
        logits.copy_(p.mul_(wanted.unsqueeze(1)))
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, impl):
        need_h, need_w = ctx.needs_input_grad[:2]
        kind, N, V = hidden.device.type, hidden.shape[0], weight.shape[0]
        chunks = -(-N // max(CHUNK_ROWS, CHUNK_ELEMENTS.get(kind, 1 << 27) // V))     # as few as fit, and equal
        rows = -(-N // max(1, chunks))
        rows = min(N, -(-rows // 128) * 128) if kind == "cuda" else rows              # whole tiles of a GPU's products
        w, h = weight.to(hidden.dtype), hidden.contiguous()
        buffer = hidden.new_empty(rows, V)                                            # [n, V], the only logits there are
        total = hidden.new_zeros((), dtype=torch.float32)
        dh = torch.empty_like(h) if need_h else None
        dw = None
        for i in range(0, N, rows or 1):
            some = h[i:i + rows]
            logits = torch.mm(some, w.T, out=buffer[:len(some)])                      # [n, C] [C, V] -> [n, V]
            total += softmax_loss(logits, targets[i:i + rows], need_h or need_w, impl)
            if need_h:
                torch.mm(logits, w, out=dh[i:i + rows])                               # [n, V] [V, C] -> [n, C]
            if need_w:
                part = torch.mm(logits.T, some, out_dtype=torch.float32) if kind == "cuda" and h.dtype != torch.float32 \
                    else (logits.T @ some).float()                                    # [V, n] [n, C] -> [V, C]
                dw = part if dw is None else dw.add_(part)      # no zeros to add to: on a GPU two passes over [V, C] less
        if need_w and dw is None:
            dw = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        dh, dw = ctx.saved_tensors
        return (None if dh is None else dh * scale.to(dh.dtype),
                None if dw is None else (dw * scale).to(ctx.weight_dtype), None, None)


def linear_cross_entropy(hidden, weight, targets, impl="auto"):
    """Sum of cross-entropies of softmax(hidden @ weight.T) at targets, differentiable in hidden and weight.

    hidden [N, C]; weight [V, C]; targets [N] int64, -100 where there is none. Under autocast the products run in its
    dtype; softmax, loss and the weight's gradient are fp32. -> fp32 scalar
    impl: "triton" (row_kernel), "torch", or "auto": Triton on a GPU. Raises ValueError for what does not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f"linear_cross_entropy: hidden {list(hidden.shape)}, weight {list(weight.shape)}, targets "
                         f"{list(targets.shape)}: expected [N, C], [V, C], [N]")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"linear_cross_entropy: hidden on {hidden.device}, weight on {weight.device}, targets on {targets.device}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"linear_cross_entropy: impl={impl}: expected auto, triton or torch")
    if impl == "auto":
        impl = "triton" if triton and kind == "cuda" else "torch"
    return LinearCrossEntropy.apply(hidden, weight, targets, impl)
