"""`bench.py kernels`: attention and the loss beside what PyTorch has, at the shapes of the paper's models.

In one process, the contestants take turns, so that a device whose clock drifts does not decide; random data; a buffer
larger than any cache is overwritten before each timed call. A row is the median over the rounds, its ratio the median of
the ratios to ours within a round. What a contestant cannot do here is a row that says why. A row also names the GPU kernel that a
contestant's forward pass spends most time in, so that one sees which backend a library took.
"""
import importlib.util
import statistics
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import kernels
from benchmarks import rows as bench_rows
from core.rng import CUT, hashed
from model import SIZES
from pretraining import data


def take_turns(calls, rounds, device):
    """{name: function} -> {name: [seconds in each round]}; after one untimed call each."""
    cuda, times = device == "cuda", {name: [] for name in calls}
    flush = torch.empty(64 << 20 if cuda else 1, dtype=torch.int32, device=device)
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            flush.zero_()
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            else:
                begin = time.perf_counter()
                call()
                seconds = time.perf_counter() - begin
            if round_:
                times[name].append(seconds)
    return times


def peak_memory(call, device):
    """MiB above what is allocated before the call; None where it is not counted."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def compete(contestants, inputs, flops, scale, c, device, row, emit):
    """Time forward, backward and both of {name: function without arguments -> output} and emit a row of each.

    flops: of one forward pass; the backward pass counts as scale times that. Some losses, ours too, make their gradients in
    the forward pass: for them only "both" compares.
    """
    outputs, grads, refused = {}, {}, {}
    for name, forward in contestants.items():
        try:
            outputs[name] = forward()
            grads[name] = torch.randn_like(outputs[name]) if outputs[name].ndim else torch.ones_like(outputs[name])
            torch.autograd.grad(outputs[name], inputs, grads[name], retain_graph=True)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as problem:      # another library's limit is a result, not our failure
            outputs.pop(name, None)
            refused[name] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]}"
    passes = {"forward": (1.0, lambda n: contestants[n]),
              "backward": (scale, lambda n: lambda: torch.autograd.grad(outputs[n], inputs, grads[n], retain_graph=True)),
              "both": (1.0 + scale, lambda n: lambda: torch.autograd.grad(contestants[n](), inputs, grads[n]))}
    for kind, (factor, make) in passes.items():
        calls = {name: make(name) for name in outputs}
        times = take_turns(calls, c.rounds, device)
        for name in contestants:
            facts = row | {"pass": kind, "name": name}
            if name in refused:
                if kind == "both":
                    emit(facts | {"not_run": refused[name]})
                continue
            seconds = statistics.median(times[name])
            ratio = statistics.median(theirs / mine for theirs, mine in zip(times[name], times["ours"]))
            facts |= {"ms": 1e3 * seconds, "tflops": factor * flops / seconds / 1e12, "ratio": ratio, "peak_mib": None}
            if kind == "both":
                facts |= {"peak_mib": peak_memory(calls[name], device), "kernel": busiest_kernel(contestants[name], device)}
            emit(facts)


# ---- attention

def sequences(packing, c):
    """cu_seqlens of c.tokens tokens: "equal" rows of 2,048, or "cuts", those rows cut at random as train.py cuts them."""
    block = min(2048, c.tokens)
    cu = np.arange(0, c.tokens + 1, block, dtype=np.int32)
    if packing == "cuts":
        rows = np.arange(len(cu) - 1, dtype=np.uint64)
        cut = data.MIN_LENGTH + hashed(rows, 0, 0, CUT) % np.uint64(block - 2 * data.MIN_LENGTH + 1)
        cu = np.sort(np.concatenate([cu, rows * np.uint64(block) + cut])).astype(np.int32)
    return cu


def heads_first(x, cu):
    """[T, H, D] of equal sequences -> [S, H, L, D]"""
    return x.unflatten(0, (len(cu) - 1, -1)).transpose(1, 2)


def sdpa(q, k, v, cu, causal, backend):
    """PyTorch's scaled_dot_product_attention by one backend: a batch where lengths are equal, else a call a sequence."""
    bounds = cu.tolist()
    run = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    if len(set(np.diff(bounds))) == 1:
        def forward():
            with sdpa_kernel(backend):
                out = run(*(heads_first(x, cu) for x in (q, k, v)))
            return out.transpose(1, 2).flatten(0, 1)                                            # [S, H, L, D] -> [T, H, D]
    else:
        def forward():
            with sdpa_kernel(backend):
                return torch.cat([run(*(x[None, s:e].transpose(1, 2) for x in (q, k, v)))[0].transpose(0, 1)
                                  for s, e in zip(bounds, bounds[1:])])
    return forward


def flex(q, k, v, cu, causal):
    """FlexAttention, compiled, with a block mask of the sequences; making the mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    T = q.shape[0]
    sequence = torch.searchsorted(cu.long(), torch.arange(T, device=q.device), right=True)

    def visible(b, h, i, j):
        same = sequence[i] == sequence[j]
        return same & (i >= j) if causal else same
    mask = create_block_mask(visible, None, None, T, T, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = q.shape[1] != k.shape[1]
    return lambda: compiled(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)


def fa3(q, k, v, cu, causal):
    """FlashAttention-3 where torch can activate it (a prototype; needs its wheel): takes SDPA's flash place for the call."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
    forward = sdpa(q, k, v, cu, causal, SDPBackend.FLASH_ATTENTION)

    def activated():
        activate_flash_attention_impl("FA3")
        try:
            return forward()
        finally:
            restore_flash_attention_impl()
    return activated


def later(make, *args):
    """A contestant that is made at its first call, so that what it cannot do becomes its row."""
    made = []

    def call():
        if not made:
            made.append(make(*args))
        return made[0]()
    return call


def busiest_kernel(call, device):
    """Name of the GPU kernel that a call spends most time in: which backend a library took. None where that is not known."""
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    return max(events, key=lambda event: event.self_device_time_total).key if events else None


def attention(size, packing, causal, c, device, emit):
    """One case: the heads of a size, rows whole ("equal") or cut at random ("cuts"), one mask."""
    impl = "triton" if device == "cuda" else "auto"
    H, Hkv, D = SIZES[size]["n_head"], SIZES[size]["n_kv_head"], SIZES[size]["n_embd"] // SIZES[size]["n_head"]
    cu = torch.from_numpy(sequences(packing, c)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(c.tokens, H + 2 * Hkv, D, device=device, generator=generator).bfloat16()
    q, k, v = (x.detach().requires_grad_() for x in qkv.split((H, Hkv, Hkv), dim=1))
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in cu.diff().tolist())
    contestants = {"ours": partial(kernels.attention, q, k, v, cu, causal, impl),
                   "varlen_attn": partial(kernels.attention, q, k, v, cu, causal, "varlen"),
                   "SDPA flash": later(sdpa, q, k, v, cu, causal, SDPBackend.FLASH_ATTENTION),
                   "FlexAttention": later(flex, q, k, v, cu, causal)}
    if packing == "equal":            # cuDNN makes a plan for each length: no contestant for random ones
        contestants["SDPA cuDNN"] = later(sdpa, q, k, v, cu, causal, SDPBackend.CUDNN_ATTENTION)
        contestants["FA3"] = later(fa3, q, k, v, cu, causal)
    row = {"bench": "attention", "size": size, "heads": [H, Hkv, D], "tokens": c.tokens, "packing": packing, "causal": causal}
    compete(contestants, (q, k, v), 4 * H * D * pairs, 2.5, c, device, row, emit)


# ---- the loss

def eager_loss(hidden, weight, targets):
    """What a training script usually does: bf16 logits, cross-entropy in fp32."""
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets, reduction="sum")


def torch_loss(hidden, weight, targets):
    """PyTorch's own fused loss, since 2.13."""
    return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum")


def liger_loss(hidden, weight, targets):
    """Liger's, where it is installed."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger
    return Liger.apply(hidden, weight.to(hidden.dtype), targets, None, None, -100, 0.0, 0.0, "sum")[0]


def loss(size, share, c, device, emit):
    """One case: the width of a size, and a share of the tokens that have a target."""
    C, N = SIZES[size]["n_embd"], int(share * c.tokens)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, C, device=device, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(c.head_vocab, C, device=device, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(0, c.head_vocab, (N,), device=device, generator=generator)
    losses = {"ours": kernels.linear_cross_entropy, "F.cross_entropy, compiled": torch.compile(eager_loss, dynamic=False)}
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy"] = torch_loss
    if importlib.util.find_spec("liger_kernel"):
        losses["Liger"] = liger_loss
    contestants = {name: partial(function, hidden, weight, targets) for name, function in losses.items()}
    row = {"bench": "loss", "size": size, "positions": N, "width": C, "vocab_size": c.head_vocab}
    compete(contestants, (hidden, weight), 2 * N * C * c.head_vocab, 2.0, c, device, row, emit)


def cases(c):
    """[function of a case], what a training step is made of first: a run that is cut short has measured that."""
    found = []
    for packing in c.packings:
        for causal in (False, True):
            found += [partial(attention, size, packing, causal) for size in c.sizes]
            if packing == c.packings[0] and not causal:
                found += [partial(loss, size, share) for share in c.shares for size in c.sizes]
    return found


def measure(c, device, emit):
    """Every case, until c.seconds are over if that is not 0; emit(row) is called with each row as soon as it is known."""
    facts = bench_rows.versions(device)
    began = time.monotonic()
    for case in tqdm(cases(c), desc="kernels", disable=None):
        if c.seconds and time.monotonic() - began > c.seconds:
            tqdm.write(f"{c.seconds:g} s are over: the rest is not measured")
            break
        torch._dynamo.reset()
        case(c, device, lambda row: emit(facts | row))
