"""The loss at target positions, in chunks, is the dense cross-entropy; and ten steps of training are what they were."""
import pytest
import torch
from conftest import losses

import kernels.cross_entropy as ce
import train
from kernels import linear_cross_entropy
from kernels.reference import linear_cross_entropy as dense


def problem(n=150, width=32, rows=257, ignored=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    targets = torch.randint(0, rows, (n,))
    targets[torch.rand(n) < ignored] = -100
    return torch.randn(n, width, dtype=dtype), torch.randn(rows, width, dtype=dtype) * 0.3, targets


@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 150, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_chunked_equals_dense_values_and_gradients(monkeypatch, chunk_rows, ignored):
    hidden, weight, targets = problem(ignored=ignored)
    monkeypatch.setitem(ce.CHUNK_ELEMENTS, "cpu", chunk_rows * 257)
    monkeypatch.setattr(ce, "MIN_CHUNK_ROWS", 1)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    reference = dense(*exact, targets)
    (reference * 0.37).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss * 0.37).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6, abs=1e-6)
    for ours, theirs in zip((hidden.grad, weight.grad), (x.grad for x in exact)):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-12


def test_under_autocast_the_loss_stays_fp32_and_near_the_exact_one():
    hidden, weight, targets = problem(n=400)
    exact = dense(hidden.double(), weight.double(), targets)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)


def test_large_logits_neither_overflow_nor_vanish():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden * 1e3, weight, targets)
    assert loss.item() == pytest.approx(dense(hidden.double() * 1e3, weight.double(), targets).item(), rel=1e-5)


def test_frozen_parts_get_no_gradient():
    hidden, weight, targets = problem()
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


GOLDEN = {"clm": [6.94373, 6.888011, 6.656779, 6.461355, 6.318608, 6.207365, 6.212226, 6.117371, 6.364088, 6.097962],
          "mlm": [6.929225, 6.843694, 6.572908, 6.436854, 6.587645, 6.152533, 6.273882, 6.126759, 6.409423, 6.219319]}


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_golden_losses_of_ten_steps(tiny, objective):
    """Recorded on an x86-64 CPU, torch 2.13.0, fp32: a change of any number in the chain from text to loss shows here."""
    c = tiny(phases=((objective, 10),), learning_rate=1e-2, warmup_steps=2)
    train.main(c)
    assert losses(c.out_dir) == pytest.approx(GOLDEN[objective], rel=2e-5)
