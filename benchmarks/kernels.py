"""Attention and the loss beside what PyTorch has, at the shapes of the paper's models, on a CUDA
GPU.

    python bench.py kernels
    python bench.py kernels --device=cpu --tokens=2048 --sizes="('small',)"      # a CPU's kernels

The contestants take turns in one process, so it does not matter if the clock of the device drifts.
The data are random, and a buffer larger than any cache is overwritten before each timed call. A row
has the median over the rounds, and as its ratio the median of the ratios to ours within a round. If
a contestant cannot compute a case here, its row says why. A row also names the GPU kernel that the
forward pass spends most time in, which shows the backend that a library took.
"""
import importlib.util
import statistics
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import kernels
from benchmarks.rows import describe, error_in_words, record, versions
from benchmarks.settings import check_sizes
from core.configurator import NonNegativeFloat, Path, PositiveInt, Share, UserError
from core.device import keep_freed_memory, pick_device
from core.rng import CUT, hashed
from model import SIZES
from pretraining.data import MIN_LENGTH


@dataclass
class Config:
    # the cases
    sizes: tuple[str, ...] = ("210m", "610m", "1b")  # keys of model.SIZES, for their heads and widths
    packings: tuple[str, ...] = ("cuts", "equal")  # rows cut once at random, or whole
    shares: tuple[Share, ...] = (0.4, 1.0)  # shares of the tokens for which the loss has a target
    tokens: PositiveInt = 24_576            # in a call: 12 rows of 2,048
    head_vocab: PositiveInt = 128_256       # vocabulary size of the loss
    # how
    rounds: PositiveInt = 5                 # after a round that is not timed
    seconds: NonNegativeFloat = 0.0         # begin nothing new after so long; 0: do all
    device: str = "auto"                    # cuda where there is one, else cpu
    to: Path = ""                           # append the rows, with device and versions, to this .jsonl file


def kernel_bench(c):
    """Write a row for each case, contestant and pass, and print those of forward + backward."""
    device = pick_device(c.device).partition(":")[0]
    if device == "cpu" and c.device != "cpu":
        raise UserError("this needs a CUDA GPU (a CPU has other kernels; to see them: "
                        "--device=cpu --tokens=2048 --sizes='(\"small\",)')")
    check_sizes(c.sizes, f"sizes={c.sizes}")
    if c.tokens < 64 or c.tokens % min(2048, c.tokens):
        raise UserError(f"tokens={c.tokens}: expected a multiple of 2048, or 64 to 2047")
    keep_freed_memory()
    print(f"\n{describe(device)}; {c.tokens:,} tokens, bf16, forward + backward, "
          f"median of {c.rounds} rounds; ratio: theirs / ours\n\n"
          "| case | contestant | ms | TFLOP/s | ratio | peak MiB | kernel |\n"
          "|---|---|---|---|---|---|---|")
    facts = versions(device)

    def emit(row):
        record(c.to, facts | row, device)
        if row["pass"] == "both":
            tqdm.write(table_line(row))

    began = time.monotonic()
    for run_case in tqdm(cases(c), desc="kernels", disable=None):
        if c.seconds and time.monotonic() - began > c.seconds:
            tqdm.write(f"{c.seconds:g} s are over: the rest is not measured")
            break
        torch._dynamo.reset()
        run_case(c, device, emit)


def table_line(row):
    if row["bench"] == "attention":
        mask = "causal" if row["causal"] else "full"
        case = f"{row['size']}, {row['packing']}, {mask}"
    else:
        case = f"loss: {row['size']}, {row['positions']:,} x {row['vocab_size']:,}"
    if "not_run" in row:
        return f"| {case} | {row['name']} | not run: {row['not_run']} | | | | |"
    peak = "not measured" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
    kernel = (row["kernel"] or "")[:60]
    return (f"| {case} | {row['name']} | {row['ms']:.3f} | {row['tflops']:.0f} "
            f"| {row['ratio']:.2f} | {peak} | {kernel} |")


def cases(c):
    """Return a function (c, device, emit) for each case.

    Those of a usual training step come first, so that a run that is cut short has measured them.
    """
    functions = []
    for packing in c.packings:
        for causal in (False, True):
            for size in c.sizes:
                functions.append(partial(attention, size, packing, causal))
            # the loss, once, after the first attention cases
            if packing == c.packings[0] and not causal:
                for share in c.shares:
                    for size in c.sizes:
                        functions.append(partial(loss, size, share))
    return functions


# --------------------------------------------------------------------------------------------------
# timing

def compete(contestants, inputs, flops, scale, c, device, row, emit):
    """Time the forward pass, the backward pass and both, and emit a row of each.

    contestants: {name: function () -> output}. flops: of a forward pass; the backward pass counts
    `scale` times as many. Some losses, ours too, make their gradients in the forward pass: compare
    these by "both" only.
    """
    outputs, grads, refusals = first_calls(contestants, inputs, device)

    def backward(name):
        return torch.autograd.grad(outputs[name], inputs, grads[name], retain_graph=True)

    def both(name):
        return torch.autograd.grad(contestants[name](), inputs, grads[name])

    passes = {
        "forward": (1.0, {name: contestants[name] for name in outputs}),
        "backward": (scale, {name: partial(backward, name) for name in outputs}),
        "both": (1.0 + scale, {name: partial(both, name) for name in outputs}),
    }
    for pass_name, (factor, calls) in passes.items():
        times = take_turns(calls, c.rounds, device)
        for name in contestants:
            if name in refusals:
                if pass_name == "both":
                    emit(row | {"pass": pass_name, "name": name, "not_run": refusals[name]})
                continue
            seconds = statistics.median(times[name])
            ratios = [t / t_ours for t, t_ours in zip(times[name], times["ours"])]
            facts = {
                "pass": pass_name,
                "name": name,
                "ms": 1e3 * seconds,
                "tflops": factor * flops / seconds / 1e12,
                "ratio": statistics.median(ratios),
                "peak_mib": None,
            }
            if pass_name == "both":
                facts["peak_mib"] = peak_memory(calls[name], device)
                facts["kernel"] = busiest_kernel(contestants[name], device)
            emit(row | facts)


def first_calls(contestants, inputs, device):
    """Run forward and backward once, untimed: to compile, and to find out what cannot run here.

    -> {name: output}, {name: a gradient for it}, {name: why it cannot run}
    """
    outputs = {}
    grads = {}
    refusals = {}
    for name, forward in contestants.items():
        try:
            output = forward()
            grad = torch.randn_like(output) if output.ndim else torch.ones_like(output)
            torch.autograd.grad(output, inputs, grad, retain_graph=True)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            # Another library's limit is a result, not our failure.
            refusals[name] = error_in_words(error)[:180]
            continue
        outputs[name] = output
        grads[name] = grad
    return outputs, grads, refusals


def take_turns(calls, rounds, device):
    """Time {name: function} by turns, after an untimed call of each. -> {name: seconds by round}"""
    times = {name: [] for name in calls}
    # 256 MiB, more than any cache holds
    flush = torch.empty(64 << 20 if device == "cuda" else 1, dtype=torch.int32, device=device)
    for i in range(rounds + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, flush, device)
            if i > 0:
                times[name].append(seconds)
    return times


def seconds_of(call, flush, device):
    """Overwrite `flush`, which empties the caches, and then time a call."""
    if device != "cuda":
        flush.zero_()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    # Overwriting it 16 times takes the GPU about a millisecond, in which the host prepares the call.
    # In a training step the host is ahead of the GPU as well, so its time must not count.
    for _ in range(16):
        flush.zero_()
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(call, device):
    """Return the MiB that a call allocates at its peak, or None on a CPU."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def busiest_kernel(call, device):
    """Return the name of the GPU kernel that a call spends most time in, or None on a CPU."""
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    if not events:
        return None
    return max(events, key=lambda event: event.self_device_time_total).key


# --------------------------------------------------------------------------------------------------
# attention

def attention(size, packing, causal, c, device, emit):
    """One case: the heads of a size, a packing (see `sequences`), and a mask."""
    impl = "triton" if device == "cuda" else "auto"
    H = SIZES[size]["n_head"]
    Hkv = SIZES[size]["n_kv_head"]
    D = SIZES[size]["n_embd"] // H
    cu = torch.from_numpy(sequences(packing, c.tokens)).to(device)                    # [S+1]
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(c.tokens, H + 2 * Hkv, D, device=device, generator=generator).bfloat16()
    q, k, v = (x.detach().requires_grad_() for x in qkv.split((H, Hkv, Hkv), dim=1))  # [T, H, D]
    contestants = {
        "ours": partial(kernels.attention, q, k, v, cu, causal, impl),
        "varlen_attn": partial(kernels.attention, q, k, v, cu, causal, "varlen"),
        "SDPA flash": make_at_first_call(sdpa, q, k, v, cu, causal, SDPBackend.FLASH_ATTENTION),
        "FlexAttention": make_at_first_call(flex, q, k, v, cu, causal),
    }
    # cuDNN makes a plan for each length, so it takes part only if lengths are equal. So does FA3.
    if packing == "equal":
        backend = SDPBackend.CUDNN_ATTENTION
        contestants["SDPA cuDNN"] = make_at_first_call(sdpa, q, k, v, cu, causal, backend)
        contestants["FA3"] = make_at_first_call(fa3, q, k, v, cu, causal)
    row = {
        "bench": "attention",
        "size": size,
        "heads": [H, Hkv, D],
        "tokens": c.tokens,
        "packing": packing,
        "causal": causal,
    }
    # Forward two products, q k^T and weights v, each 2 D FLOPs for a head and a pair of tokens.
    # Backward five.
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in cu.diff().tolist())
    compete(contestants, (q, k, v), 4 * H * D * pairs, 2.5, c, device, row, emit)


def sequences(packing, n_tokens):
    """Return the cu_seqlens of n_tokens tokens. [S+1]

    packing: "equal" for rows of 2,048, "cuts" for such rows cut at random, as train.py cuts them.
    """
    block = min(2048, n_tokens)
    cu = np.arange(0, n_tokens + 1, block, dtype=np.int32)
    if packing == "cuts":
        rows = np.arange(len(cu) - 1, dtype=np.uint64)
        n_places = block - 2 * MIN_LENGTH + 1
        place = MIN_LENGTH + hashed(rows, 0, 0, CUT) % np.uint64(n_places)
        cuts = rows * np.uint64(block) + place
        cu = np.sort(np.concatenate([cu, cuts])).astype(np.int32)
    return cu


def make_at_first_call(make, *args):
    """Return a contestant that is made at its first call, where first_calls() sees if it fails."""
    made = []

    def call():
        if not made:
            made.append(make(*args))
        return made[0]()

    return call


def sdpa(q, k, v, cu, causal, backend):
    """PyTorch's scaled_dot_product_attention by a given backend.

    One call for a batch where lengths are equal, else a call for each sequence.
    """
    bounds = cu.tolist()
    S = len(bounds) - 1
    is_gqa = q.shape[1] != k.shape[1]
    run = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=is_gqa)

    def one_call():
        batch = [x.unflatten(0, (S, -1)).transpose(1, 2) for x in (q, k, v)]          # [S, H, L, D]
        with sdpa_kernel(backend):
            out = run(*batch)
        return out.transpose(1, 2).flatten(0, 1)                                      # [T, H, D]

    def call_per_sequence():
        outs = []
        with sdpa_kernel(backend):
            for start, end in zip(bounds, bounds[1:]):
                batch = [x[None, start:end].transpose(1, 2) for x in (q, k, v)]       # [1, H, L, D]
                outs.append(run(*batch)[0].transpose(0, 1))                           # [L, H, D]
            return torch.cat(outs)                                                    # [T, H, D]

    is_equal = len(set(np.diff(bounds))) == 1
    return one_call if is_equal else call_per_sequence


def flex(q, k, v, cu, causal):
    """FlexAttention, compiled, with a block mask of the sequences. Making the mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[0]
    sequence = torch.searchsorted(cu.long(), torch.arange(T, device=q.device), right=True)  # [T]

    def is_visible(_batch, _head, i, j):
        is_same = sequence[i] == sequence[j]
        return is_same & (i >= j) if causal else is_same

    mask = create_block_mask(is_visible, None, None, T, T, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    is_gqa = q.shape[1] != k.shape[1]

    def call():
        batch = [x.transpose(0, 1)[None] for x in (q, k, v)]                          # [1, H, T, D]
        return compiled(*batch, block_mask=mask, enable_gqa=is_gqa)[0].transpose(0, 1)   # [T, H, D]

    return call


def fa3(q, k, v, cu, causal):
    """FlashAttention-3, where its package is installed. In torch this is a prototype.

    For the time of a call it takes the place of SDPA's flash kernel.
    """
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    forward = sdpa(q, k, v, cu, causal, SDPBackend.FLASH_ATTENTION)

    def call():
        activate_flash_attention_impl("FA3")
        try:
            return forward()
        finally:
            restore_flash_attention_impl()

    return call


# --------------------------------------------------------------------------------------------------
# the loss

def loss(size, share, c, device, emit):
    """One case: the width of a size, and the share of the tokens that have a target."""
    C = SIZES[size]["n_embd"]
    N = int(share * c.tokens)
    V = c.head_vocab
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, C, device=device, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(V, C, device=device, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device, generator=generator)
    losses = {
        "ours": kernels.linear_cross_entropy,
        "F.cross_entropy, compiled": torch.compile(eager_loss, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy"] = torch_loss
    if importlib.util.find_spec("liger_kernel"):
        losses["Liger"] = liger_loss
    contestants = {}
    for name, function in losses.items():
        contestants[name] = partial(function, hidden, weight, targets)
    row = {"bench": "loss", "size": size, "positions": N, "width": C, "vocab_size": V}
    compete(contestants, (hidden, weight), 2 * N * C * V, 2.0, c, device, row, emit)


def eager_loss(hidden, weight, targets):
    """What a training script usually does: bf16 logits, cross-entropy in fp32."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()                             # [N, V]
    return F.cross_entropy(logits, targets, reduction="sum")


def torch_loss(hidden, weight, targets):
    """PyTorch's own fused loss, since 2.13."""
    return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum")


def liger_loss(hidden, weight, targets):
    """The loss of Liger Kernel, where it is installed."""
    from liger_kernel.ops import fused_linear_cross_entropy as liger

    loss_function = liger.LigerFusedLinearCrossEntropyFunction
    weight = weight.to(hidden.dtype)
    return loss_function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]
