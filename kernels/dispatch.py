"""attention(): one function, several implementations, and the choice between them.

    triton      our own kernels (triton_attention.py), for CUDA GPUs
    varlen      PyTorch's packed attention (varlen.py), for CUDA GPUs
    sdpa        PyTorch's scaled_dot_product_attention, one call per sequence (sdpa.py): runs
                everywhere, and is the fast path of a CPU
    reference   the definition, dense and slow (reference.py)

"auto" is sdpa wherever there is no CUDA GPU. On a GPU, triton and varlen are tried: each computes a
small batch, which is compared with the reference. Those that agree with it are timed on one layer
of a training step, and the faster one is taken.
"""

import functools
import os
import time

import torch

from . import reference, sdpa, varlen

try:
    from . import triton_attention as triton_kernels
except ImportError:  # no Triton on this platform
    triton_kernels = None


def triton_attention(q, k, v, cu_seqlens, causal):
    return triton_kernels.attention(q, k, v, cu_seqlens, causal)


# {name: function}. A new implementation is one entry here; --attention=NAME trains with it.
ATTENTION = {
    "triton": triton_attention,
    "varlen": varlen.attention,
    "sdpa": sdpa.attention,
    "reference": reference.attention,
}

# What "auto" chooses from on a GPU, the preferred one first.
FAST_ON_GPU = ("triton", "varlen")

# The largest relative error that a trial may have. Rounding to bf16 makes 4e-3, a miscompiled
# kernel makes far more than this.
MAX_TRIAL_ERROR = 2e-2

# varlen is taken only if it needs less than this share of triton's time: triton is preferred,
# because it alone gives the same bits in every run.
CLEARLY_FASTER = 0.95


def why_not(name, device_type, dtype, head_dim):
    """Return None if the implementation can compute such tensors here, else the reason in words."""
    if name == "triton" and triton_kernels is None:
        return "Triton is not installed (it needs Linux)"
    if name == "triton":
        return triton_kernels.why_not(device_type, dtype, head_dim)
    if name == "varlen":
        return varlen.why_not(device_type, dtype, head_dim)
    return None


def resolve(impl, device_type=None, dtype=None, head_dim=None, n_head=3, n_kv_head=1):
    """Return the name of the implementation that runs: `impl`, or what "auto" means here.

    The other arguments describe q, k and v. Without a device_type only the spelling is checked, and
    "auto" stays "auto". On a GPU, "auto" prints one line for each kind of input: what it takes, why,
    and both times. Raises ValueError for an unknown name, and for an implementation that cannot run
    here.
    """
    if impl != "auto" and impl not in ATTENTION:
        raise ValueError(f"attention={impl}: expected auto or one of {', '.join(ATTENTION)}")
    if device_type is None:
        return impl
    if impl == "auto":
        return resolve_auto(device_type, dtype, head_dim, n_head, n_kv_head)
    reason = why_not(impl, device_type, dtype, head_dim)
    if reason:
        raise ValueError(f"attention={impl}: {reason}")
    return impl


def resolve_auto(device_type, dtype, head_dim, n_head, n_kv_head):
    return resolve_auto_once(device_type, dtype, head_dim, n_head, n_kv_head)


# torch.compile calls this function while it traces, and keeps the answer in the graph. This is what
# torch.compiler.assume_constant_result does, but that imports torch._dynamo, which would cost every
# process a second at its start (a test checks that).
resolve_auto._dynamo_marked_constant = True


@functools.cache
def resolve_auto_once(device_type, dtype, head_dim, n_head, n_kv_head):
    """Return what "auto" means for this kind of input. It is decided once per process."""
    if device_type != "cuda":
        return "sdpa"
    name, explanation = pick_fastest(FAST_ON_GPU, device_type, dtype, head_dim, n_head, n_kv_head)
    if os.environ.get("RANK", "0") == "0":
        print(f"attention: {explanation}", flush=True)
    return name


def pick_fastest(names, device_type, dtype, head_dim, n_head, n_kv_head, n_rows=12):
    """Try and time implementations, and pick one. -> (name, explanation in one line)

    names: the first that agrees with the reference is preferred, unless another is clearly faster.
    n_rows: rows of 2,048 tokens in the layer that is timed.
    """
    kind = (device_type, dtype, head_dim, n_head, n_kv_head)
    errors = {}
    seconds = {}
    problems = {}
    for name in names:
        try:
            problems[name], errors[name] = try_out(name, *kind)
            if problems[name] is None:
                seconds[name] = time_layer(name, *kind, n_rows)
        except Exception as error:
            # A compiler or a driver may raise anything: try the next implementation.
            lines = str(error).splitlines()
            first_line = lines[0] if lines else ""
            problems[name] = f"a trial call of {name} failed: {type(error).__name__}: {first_line}"
    refusals = "; ".join(problem for problem in problems.values() if problem)
    if not seconds:
        return "sdpa", f"sdpa, one call a sequence, which is slow on a GPU, because {refusals}"

    best = next(iter(seconds))
    for name in seconds:
        if seconds[name] < CLEARLY_FASTER * seconds[best]:
            best = name
    times = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
    dtype_name = str(dtype).removeprefix("torch.")
    explanation = (
        f"{best}; a layer of {n_rows} x 2,048 tokens, forward and backward, full and causal, "
        f"takes {times} ({n_head}/{n_kv_head} heads of {head_dim}, {dtype_name}; "
        f"error {errors[best]:.1e})"
    )
    return best, f"{explanation}; {refusals}" if refusals else explanation


def try_out(name, device_type, dtype, head_dim, n_head, n_kv_head):
    """Try an implementation on a small batch, if it can run here at all.

    -> (why it must not be used here, in words, or None; the error of the trial, or None)
    """
    reason = why_not(name, device_type, dtype, head_dim)
    if reason:
        return reason, None
    error = trial_error(name, device_type, dtype, head_dim, n_head // n_kv_head)
    if error < MAX_TRIAL_ERROR:
        return None, error
    return f"a trial call of {name} was off by {error:.1e}", error


def trial_error(name, device_type, dtype, head_dim, group):
    """Compare an implementation with the reference on a small packed batch under both masks.

    group: query heads per KV head. -> the largest relative error of the output and of the gradients
    of q, k and v
    """
    # Triton compiles other kernels for a single head, and for a number of tokens that is not a
    # multiple of 16. With two KV heads and 304 tokens it compiles those of a training step.
    n_tokens = 304
    n_kv_head = 2
    n_head = group * n_kv_head
    cu_seqlens = torch.tensor([0, 130, 131, n_tokens], dtype=torch.int32, device=device_type)
    generator = torch.Generator(device_type).manual_seed(0)
    max_error = 0.0
    for causal in (False, True):
        inputs = random_inputs(n_tokens, n_head, n_kv_head, head_dim, dtype, generator)
        results = output_and_gradients(ATTENTION[name], *inputs, cu_seqlens, causal)
        in_fp32 = [x.float() for x in inputs]
        exact_results = output_and_gradients(reference.attention, *in_fp32, cu_seqlens, causal)
        for result, exact in zip(results, exact_results):
            error = (result.float() - exact).norm() / exact.norm()
            max_error = max(max_error, error.nan_to_num(float("inf")).item())
    return max_error


def random_inputs(n_tokens, n_head, n_kv_head, head_dim, dtype, generator):
    """Return random q [T, H, D], k and v [T, Hkv, D], and a gradient of the output [T, H, D]."""
    inputs = []
    for heads in (n_head, n_kv_head, n_kv_head, n_head):
        x = torch.randn(n_tokens, heads, head_dim, device=generator.device, generator=generator)
        inputs.append(x.to(dtype))
    return inputs


def output_and_gradients(implementation, q, k, v, grad, cu_seqlens, causal):
    """Return the output [T, H, D] and the gradients of q, k and v.

    grad: the gradient of the output.
    """
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        out = implementation(q, k, v, cu_seqlens, causal)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def time_layer(name, device_type, dtype, head_dim, n_head, n_kv_head, n_rows):
    """Return the seconds that attention takes in one layer of a training step, the median of five.

    That is forward and backward, under both masks, over n_rows rows of 2,048 tokens, each cut once.
    """
    starts = 2048 * torch.arange(n_rows)
    cuts = starts + torch.randint(12, 2037, (n_rows,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([starts, cuts, torch.tensor([2048 * n_rows])])  # [2 n_rows + 1]
    cu_seqlens = bounds.sort().values.int().to(device_type)
    generator = torch.Generator(device_type).manual_seed(0)
    inputs = random_inputs(2048 * n_rows, n_head, n_kv_head, head_dim, dtype, generator)

    def run_both_masks():
        for causal in (False, True):
            output_and_gradients(ATTENTION[name], *inputs, cu_seqlens, causal)

    def wait_for_device():
        if device_type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):  # compile, and fill the caches
        run_both_masks()
    # Wait only before and after several calls: in a training step, too, the host prepares a call
    # while the device computes the ones before it.
    calls = 5 if device_type == "cuda" else 1
    times = []
    for _ in range(5):
        wait_for_device()
        began = time.perf_counter()
        for _ in range(calls):
            run_both_masks()
        wait_for_device()
        times.append((time.perf_counter() - began) / calls)
    return sorted(times)[2]


def check_inputs(q, k, v, cu_seqlens):
    """Raise ValueError, with a message of one line, for inputs that do not fit together.

    The values of cu_seqlens are checked on a CPU only. On a GPU reading them would make the host
    wait for the device in every layer, so bad values are not noticed there. A compiled function
    does not check them either.
    """
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if (
        not q.ndim == k.ndim == v.ndim == 3
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2] != k.shape[2]
    ):
        raise ValueError(f"attention: {shapes}: expected [T, H, D] and twice [T, Hkv, D]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {shapes}: query heads must be a multiple of KV heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype")
    if not q.device == k.device == v.device == cu_seqlens.device:
        raise ValueError(
            f"attention: q is on {q.device}, k on {k.device}, v on {v.device}, "
            f"cu_seqlens on {cu_seqlens.device}: expected one device"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"attention: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: "
            "expected int32 [S + 1]"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    T = q.shape[0]
    bounds = cu_seqlens.tolist()
    is_falling = any(a > b for a, b in zip(bounds, bounds[1:]))
    if bounds[0] != 0 or bounds[-1] != T or is_falling:
        raise ValueError(
            f"attention: cu_seqlens goes from {bounds[0]} to {bounds[-1]}: "
            f"expected 0 to T = {T}, never falling"
        )


def attention(q, k, v, cu_seqlens, causal: bool, impl: str = "auto") -> torch.Tensor:
    """Return softmax attention within each packed sequence, with scale 1/sqrt(D). Differentiable.

    q [T, H, D]; k, v [T, Hkv, D], any strides -> [T, H, D]. H is a multiple of Hkv: query head h
    reads KV head h // (H // Hkv) (grouped-query attention).
    cu_seqlens [S+1] int32, from 0 to T, never falling: sequence s is the tokens
    [cu_seqlens[s], cu_seqlens[s+1]).
    causal: a token sees itself and the tokens before it in its sequence; otherwise it sees the
    whole sequence.
    impl: a key of ATTENTION, or "auto".

    Under autocast the inputs are cast first. Raises ValueError for shapes, dtypes, devices or, on a
    CPU, values of cu_seqlens that do not fit together, and for an impl that cannot run here.
    """
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        q, k, v = (x.to(torch.get_autocast_dtype(device_type)) for x in (q, k, v))
    check_inputs(q, k, v, cu_seqlens)
    n_head, head_dim = q.shape[1:]
    name = resolve(impl, device_type, q.dtype, head_dim, n_head, k.shape[1])
    return ATTENTION[name](q, k, v, cu_seqlens, causal)
