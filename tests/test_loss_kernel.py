"""The loss's Triton kernel against fp64, interpreted where there is no GPU, compiled where there is; and the memory it takes."""
import importlib.util

import pytest
import torch
from conftest import DEVICE, GPU
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels.reference import linear_cross_entropy as dense

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed (it needs Linux)")


@pytest.mark.parametrize("n, rows, ignored", [(37, 257, 0.3), (20, 1000, 0.0), (9, 8200, 0.5), (5, 64, 1.0)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_the_loss_kernel_equals_fp64_values_and_gradients(poisoned, monkeypatch, n, rows, ignored, dtype, bound):
    monkeypatch.setitem(kernels.cross_entropy.CHUNK_ELEMENTS, DEVICE, 12 * rows)      # several chunks, the last one shorter
    monkeypatch.setattr(kernels.cross_entropy, "MIN_CHUNK_ROWS", 1)
    torch.manual_seed(0)
    targets = torch.randint(0, rows, (n,))
    targets[torch.rand(n) < ignored] = -100
    hidden, weight = torch.randn(n, 32).to(dtype), (torch.randn(rows, 32) * 0.3).to(dtype)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    reference_loss = dense(*exact, targets)
    reference_loss.backward()
    hidden, weight = (x.to(DEVICE).requires_grad_() for x in (hidden, weight))
    loss = kernels.linear_cross_entropy(hidden, weight, targets.to(DEVICE), impl="triton")
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(reference_loss.item(), rel=bound)
    for ours, theirs in zip((hidden.grad, weight.grad), (x.grad for x in exact)):
        assert (ours.double().cpu() - theirs).norm() <= bound * theirs.norm() + 1e-12
    with torch.no_grad():
        again = kernels.linear_cross_entropy(hidden, weight, targets.to(DEVICE), impl="triton")
    assert torch.equal(again, loss.detach())


class LargeTensors(TorchDispatchMode):
    """Counts the distinct memory of tensors of at least `size` elements that is alive at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.most, self.largest = size, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() >= self.size:
                self.alive[x.untyped_storage().data_ptr()] = StorageWeakRef(x.untyped_storage())
                self.largest = max(self.largest, x.numel())
        self.alive = {place: ref for place, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_never_more_than_two_chunks_of_logits_are_alive(monkeypatch, impl):
    rows, vocabulary = 128, 500
    monkeypatch.setitem(kernels.cross_entropy.CHUNK_ELEMENTS, DEVICE, rows * vocabulary)
    monkeypatch.setattr(kernels.cross_entropy, "MIN_CHUNK_ROWS", 1)
    hidden = torch.randn(4 * rows, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(vocabulary, 4, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, vocabulary, (len(hidden),), device=DEVICE)
    with LargeTensors(rows * vocabulary // 2 + 1) as seen:          # more than the weight and its gradient
        kernels.linear_cross_entropy(hidden, weight, targets, impl=impl).backward()
    assert 1 <= seen.most <= 2
    if GPU or impl == "torch":                                      # the interpreter looks at a tensor as bytes
        assert seen.largest == rows * vocabulary
    with LargeTensors(rows * vocabulary // 2 + 1) as dense_way:     # what it is there to avoid
        dense(hidden, weight, targets).backward()
    assert dense_way.largest == len(hidden) * vocabulary


@pytest.mark.parametrize("change", [dict(targets=3), dict(weight=33), dict(impl="cuda")])
def test_bad_input_of_the_loss_is_one_clear_value_error(change):
    hidden, weight, targets = torch.randn(4, 32), torch.randn(9, change.get("weight", 32)), torch.zeros(change.get("targets", 4)).long()
    with pytest.raises(ValueError, match="^linear_cross_entropy: "):
        kernels.linear_cross_entropy(hidden, weight, targets, change.get("impl", "auto"))


@pytest.mark.gpu
@pytest.mark.fast
def test_the_loss_takes_less_than_4_gib_at_the_papers_size():
    hidden = torch.randn(24_576, 768, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(128_256, 768, device="cuda").requires_grad_()
    targets = torch.randint(0, 128_256, (24_576,), device="cuda")
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 2 ** 30
