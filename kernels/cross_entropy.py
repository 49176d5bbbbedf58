"""The LM head and its cross-entropy in one function, over target positions only, a chunk at a time.

The logits of a step would be the largest tensor of the whole program: 24,576 positions x 128,256 in
fp32 are 11.7 GiB, and autograd keeps copies. Here only one chunk of rows is alive, in the dtype of
the inputs, and all chunks use the same buffer. The forward pass computes a chunk's loss and, right
after it, the gradient, which is written over the logits. The backward pass only scales. This takes
as many FLOPs as the dense way, and on a GPU some 10 bytes of memory traffic per logit instead of
some 34 (counted).

    for each chunk of rows:   logits = h W^T               # [n, V], a library product
                              logits = softmax - one_hot   # in place; on a GPU by row_kernel
                              dh = logits W                # [n, C]
                              dW += logits^T h             # [V, C], summed over chunks in fp32

PyTorch's own F.linear_cross_entropy (2.13) works in chunks too, but returns the sum in bf16 (10.5
instead of 10.74), so it cannot replace this.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: use the torch path below
    triton = None

# The most logits in a chunk. A CPU gets what its cache holds. A GPU gets 2 GiB in bf16, because few
# large products are faster than many small ones.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 30}

# The fewest rows in a chunk, even if they have more logits than that: each chunk adds to all of dW,
# and a product of few rows is slow (docs/log.md).
MIN_CHUNK_ROWS = 512


# ---- the loss of one chunk of logits, and its gradient


if triton:

    @triton.jit
    def row_kernel(LOGITS, TARGETS, LOSS, row_stride, V, B: tl.constexpr, GRADIENT: tl.constexpr):
        """Compute the loss of one row of logits [V], and write its gradient over the logits.

        Both are zero where there is no target (-100). The first pass over the row keeps a running
        maximum and sum. The second pass finds the row still in the L2 cache: 132 rows of 128,256 in
        bf16, one for each multiprocessor of an H100, are 34 MB.
        """
        # Offsets are int64, because 24,576 x 128,256 is more than 2^31.
        row = tl.program_id(0).to(tl.int64)
        LOGITS += row * row_stride
        target = tl.load(TARGETS + row)
        has_target = target >= 0
        # Read this logit before the second pass writes over it.
        target_logit = tl.load(LOGITS + tl.where(has_target, target, 0)).to(tl.float32)

        # The log-sum-exp of the row.
        row_max = float("-inf")
        row_sum = 0.0
        for begin in tl.range(0, V, B):
            columns = begin + tl.arange(0, B)
            x = tl.load(LOGITS + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            new_max = tl.maximum(row_max, tl.max(x, 0))
            row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(x - new_max), 0)
            row_max = new_max
        lse = row_max + tl.log(row_sum)
        tl.store(LOSS + row, tl.where(has_target, lse - target_logit, 0.0))

        # The gradient: softmax - one-hot.
        if GRADIENT:
            for begin in tl.range(0, V, B):
                columns = begin + tl.arange(0, B)
                x = tl.load(LOGITS + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
                one_hot = tl.where(columns == target, 1.0, 0.0)
                gradient = tl.where(has_target, tl.exp(x - lse) - one_hot, 0.0)
                tl.store(LOGITS + columns, gradient.to(LOGITS.dtype.element_ty), mask=columns < V)


def triton_loss(logits, targets, needs_gradient):
    """See softmax_loss. Each row has a program of row_kernel."""
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    B = min(8192, triton.next_power_of_2(V))
    row_kernel[(n,)](
        logits, targets, losses, logits.stride(0), V, B=B, GRADIENT=needs_gradient, num_warps=8
    )
    return losses.sum()


def torch_loss(logits, targets, needs_gradient):
    """See softmax_loss."""
    log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)  # [n, V]
    has_target = targets >= 0  # [n]
    index = targets.clamp(min=0).unsqueeze(1)  # [n, 1]
    log_p_of_target = log_p.gather(1, index).squeeze(1)  # [n]
    loss = -(log_p_of_target * has_target).sum()
    if needs_gradient:
        minus_one = log_p.new_full((1, 1), -1.0).expand_as(index)
        gradient = log_p.exp_().scatter_add_(1, index, minus_one)  # softmax - one-hot
        logits.copy_(gradient.mul_(has_target.unsqueeze(1)))
    return loss


def softmax_loss(logits, targets, needs_gradient, impl):
    """Return the sum of the losses (fp32) of logits [n, V] at targets [n].

    If the gradient of that sum is needed, it is written over the logits.
    """
    if impl == "triton":
        return triton_loss(logits, targets, needs_gradient)
    return torch_loss(logits, targets, needs_gradient)


# ---- all chunks


def rows_per_chunk(device_type, N, V):
    """Return how many of N rows of V logits are computed at once: few chunks, of equal size."""
    max_elements = CHUNK_ELEMENTS.get(device_type, 1 << 27)
    max_rows = max(MIN_CHUNK_ROWS, max_elements // V)
    # -(-a // b) is a / b, rounded up.
    n_chunks = max(1, -(-N // max_rows))
    rows = -(-N // n_chunks)
    if device_type == "cuda":
        # A GPU computes a product in tiles of 128 rows: fill them.
        rows = min(N, -(-rows // 128) * 128)
    return rows


def weight_gradient(logits_gradient, hidden):
    """Return a chunk's gradient of the weight. [n, V], [n, C] -> [V, C] in fp32"""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(logits_gradient.T, hidden, out_dtype=torch.float32)
    return (logits_gradient.T @ hidden).float()


class LinearCrossEntropy(torch.autograd.Function):
    """The loss over all chunks, and its gradients, which the forward pass makes as well."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, impl):
        needs_dh, needs_dw = ctx.needs_input_grad[:2]
        N = hidden.shape[0]
        V = weight.shape[0]
        rows = rows_per_chunk(hidden.device.type, N, V)
        w = weight.to(hidden.dtype)  # [V, C]
        h = hidden.contiguous()  # [N, C]
        buffer = hidden.new_empty(rows, V)  # the logits of one chunk after the other
        total = hidden.new_zeros((), dtype=torch.float32)
        dh = torch.empty_like(h) if needs_dh else None
        dw = None
        for start in range(0, N, max(1, rows)):
            chunk = h[start : start + rows]  # [n, C]
            chunk_targets = targets[start : start + rows]  # [n]
            logits = torch.mm(chunk, w.T, out=buffer[: len(chunk)])  # [n, C] [C, V] -> [n, V]
            total += softmax_loss(logits, chunk_targets, needs_dh or needs_dw, impl)
            # Now `logits` holds the gradient of the loss.
            if needs_dh:
                torch.mm(logits, w, out=dh[start : start + rows])  # [n, V] [V, C] -> [n, C]
            if needs_dw:
                chunk_dw = weight_gradient(logits, chunk)  # [V, C]
                # The first chunk's gradient becomes the sum. Adding it to zeros instead would be
                # two more passes over [V, C].
                dw = chunk_dw if dw is None else dw.add_(chunk_dw)
        if needs_dw and dw is None:  # there were no rows
            dw = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        """grad: the gradient of the summed loss, a number by which both gradients are scaled."""
        dh, dw = ctx.saved_tensors
        if dh is not None:
            dh = dh * grad.to(dh.dtype)
        if dw is not None:
            dw = (dw * grad).to(ctx.weight_dtype)
        return dh, dw, None, None


def check_inputs(hidden, weight, targets, impl):
    """Raise ValueError, with a message of one line, for inputs that do not fit together."""
    is_matrix = hidden.ndim == 2 and weight.ndim == 2
    if not is_matrix or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {list(hidden.shape)}, weight {list(weight.shape)}, "
            f"targets {list(targets.shape)}: expected [N, C], [V, C], [N]"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"linear_cross_entropy: hidden is on {hidden.device}, weight on {weight.device}, "
            f"targets on {targets.device}: expected one device"
        )
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"linear_cross_entropy: impl={impl}: expected auto, triton or torch")


def linear_cross_entropy(hidden, weight, targets, impl="auto"):
    """Return the sum of the cross-entropies of softmax(hidden @ weight.T) at targets.

    hidden [N, C], weight [V, C], targets [N] int64, -100 where there is none. -> fp32 scalar,
    differentiable in hidden and weight. Under autocast the products run in its dtype; softmax and
    loss are fp32, and so is the sum of the weight's gradient. impl: "triton" (row_kernel), "torch",
    or "auto": triton on a GPU, else torch. Raises ValueError for inputs that do not fit together.
    """
    check_inputs(hidden, weight, targets, impl)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    if impl == "auto":
        impl = "triton" if triton and device_type == "cuda" else "torch"
    return LinearCrossEntropy.apply(hidden, weight, targets, impl)
