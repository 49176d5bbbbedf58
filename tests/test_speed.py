"""What speed rests on and what it may not cost: memory that does not grow, nobody who waits for the device, collectives that are
counted and overlap the backward pass; and bench.py, which measures it."""
import gc
import json
import os
import sys
import warnings
from dataclasses import fields

import pytest
import torch
from conftest import DEVICE, ROOT, files, run_python

import bench
import train
from benchmarks import contestants as bench_contestants
from benchmarks import steps as bench_steps
from benchmarks import tables as bench_tables
from benchmarks.settings import StepSettings
from core import checkpoint, configurator
from kernels.sdpa import attention, plan
from model import SIZES, Encoder, ModelConfig
from objectives import OBJECTIVES
from pretraining import data

LENGTHS = (40, 88, 12, 116)


def model_and_batch(**kwargs):
    torch.manual_seed(0)
    model = Encoder(ModelConfig(**SIZES["demo"], vocab_size=512), **kwargs)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return model, torch.randint(0, 512, (sum(LENGTHS),)), cu_seqlens


@pytest.mark.parametrize("lengths", [[20] * 8, [5, 5, 20, 20, 40, 40, 60, 60]], ids=["one group", "four groups"])
def test_attention_on_a_cpu_copies_a_strided_tensor_once_however_many_groups_of_short_sequences_there_are(lengths):
    qkv = torch.randn(sum(lengths), 6, 16, requires_grad=True)      # q, k, v as model.Attention has them: parts of one product
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    assert len(plan(tuple(cu_seqlens.tolist()), 2, 2, True)[1]) == len(set(lengths))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        attention(*qkv.split((2, 2, 2), dim=1), cu_seqlens, False).sum().backward()
    copies = [event for event in seen.events() if event.name == "aten::copy_" and event.input_shapes[0] == [sum(lengths), 2, 16]]
    assert len(copies) == 3 + 4      # q, k and v forward; they and the gradient, an expanded number, backward


# ---- memory
def test_checkpointed_activations_give_the_same_bits_and_keep_less():
    found = {}
    for flag in (False, True):
        kept = []
        model, tokens, cu_seqlens = model_and_batch(checkpoint_activations=flag)
        weights = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x), x)[1], lambda x: x):
            loss = model(tokens, cu_seqlens, False, torch.arange(0, 256, 3)).square().sum()
        held = sum(x.untyped_storage().nbytes() for x in kept if x.data_ptr() not in weights)
        loss.backward()
        found[flag] = held, [loss.item()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found[False][1], found[True][1]))
    assert found[True][0] < 0.45 * found[False][0]       # three of four layers keep their input only


def test_a_checkpointed_run_equals_one_that_is_not_and_may_be_resumed_as_one(tiny):
    whole, part = tiny("whole"), tiny("part", checkpoint_activations=True, phases=(("clm", 12), ("mlm", 8)))
    train.main(whole), train.main(part)
    assert files(checkpoint.path_of(part.out_dir, 20)) == files(checkpoint.path_of(whole.out_dir, 20))
    part.checkpoint_activations = False
    train.main(part)                                      # says that it is finished; a changed setting would raise


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_memory_is_flat_to_the_byte(tiny, monkeypatch, objective):
    """Bytes of all tensors that live when a step begins; batches are made when they are asked for, so that none waits."""
    seen = []

    def prefetch(make, first, last):
        for step in range(first, last):
            plan.cache_clear()        # of the last eight batches' lengths, which differ
            gc.collect()
            storages = {}
            for x in gc.get_objects():
                if type(x) in (torch.Tensor, torch.nn.Parameter):
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            seen.append(sum(storages.values()))
            yield make(step)
    monkeypatch.setattr(data, "prefetch", prefetch)
    monkeypatch.setattr(gc, "freeze", lambda: None)      # what is frozen would not be counted
    train.main(tiny(phases=((objective, 8),), log_interval=1, eval_interval=100, save_interval=100))
    assert len(seen) == 8 and set(seen[2:]) == {seen[2]} and seen[2] > 0


# ---- nobody waits for the device
def repository_calls(monkeypatch, names):
    """Count calls of Tensor methods that make the host wait, by the file of this repository they stand in."""
    calls = {}
    for name in names:
        real = getattr(torch.Tensor, name)

        def spy(self, *args, real=real, **kwargs):
            path = sys._getframe(1).f_code.co_filename
            if path.startswith(ROOT) and not path.startswith(os.path.join(ROOT, "tests")):
                calls[os.path.relpath(path, ROOT)] = calls.get(os.path.relpath(path, ROOT), 0) + 1
            return real(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, spy)
    return calls


def test_a_step_reads_nothing_back_from_the_device(tiny, monkeypatch):
    """Ten more steps between two log lines cost not one read more; attention on a CPU reads cu_seqlens, which is no device's."""
    calls = repository_calls(monkeypatch, ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"))
    found = []
    for steps in (20, 30):
        calls.clear()
        train.main(tiny(f"run{steps}", phases=(("mlm", steps),), log_interval=1000, eval_interval=1000, save_interval=1000))
        found.append({k: v for k, v in calls.items() if not k.startswith("kernels/")})
    assert found[0] == found[1] and found[0]["train.py"] > 0


@pytest.mark.gpu
@pytest.mark.fast
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_a_gpu_never_synchronises(tmp_path, compiled):
    found, corpus = [], str(tmp_path / "corpus")
    os.makedirs(corpus)
    bench_contestants.write_corpus(StepSettings(vocab_size=1024, block_size=64), corpus)      # needs no package that a GPU machine may lack
    for steps in (10, 20, 30):      # the first run also compiles, which waits for the device
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train.main(train.Config(data_dir=corpus, out_dir=str(tmp_path / f"run{steps}"), phases=(("mlm", steps),), size="demo", block_size=64,
                                        batch_rows=8, micro_rows=4, eval_rows=8, warmup_steps=4, decay_steps=4, log_interval=1000,
                                        eval_interval=1000, save_interval=1000, device=DEVICE, dtype="bfloat16", compile=compiled,
                                        attention="triton"))      # "auto" could be varlen, for which the host waits once per batch
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchronizing" in str(w.message) for w in caught))
    assert found[1] == found[2] > 0


# ---- two processes
PROFILED = """
import json, os, sys, torch
sys.path.insert(0, {root!r})
import train
from core.configurator import configure
c = configure(train.Config, sys.argv[1:])
real, made = torch.optim.AdamW.step, []
def step(self, *args, **kwargs):      # steps 5 to 9 are looked at
    made.append(0)
    if len(made) == 4:
        profiler.start()
    if len(made) == 9:
        profiler.stop()
    return real(self, *args, **kwargs)
torch.optim.AdamW.step = step
profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
train.main(c)
if os.environ["RANK"] == "0":
    events = [(e.name, e.time_range.start, e.time_range.end) for e in profiler.events()]
    json.dump(events, open({out!r}, "w"))
"""


def test_two_processes_exchange_gradients_while_they_make_them_and_one_count_besides(command, tmp_path):
    script, out = tmp_path / "profiled.py", str(tmp_path / "events.json")
    script.write_text(PROFILED.format(root=ROOT, out=out))
    words = command("run", size="small", block_size=64, batch_rows=8, micro_rows=2, phases=(("mlm", 12),), decay_steps=1, log_interval=100,
                    eval_interval=100, save_interval=100)
    done = run_python(["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                       str(script), *words[1:]], env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    with open(out) as f:
        events = json.load(f)
    calls = sorted((start, name) for name, start, _ in events if "c10d::" in name or "gloo:" in name)
    assert {name for _, name in calls} == {"c10d::allreduce_", "gloo:all_reduce"}
    # of each step: the number of targets, then the buckets of gradients; the losses wait for the next line of the log
    updates = sorted(start for name, start, _ in events if name == "Optimizer.step#AdamW.step")
    assert len(updates) >= 3
    for before, after in zip(updates, updates[1:]):
        mine = [start for start, name in calls if name == "c10d::allreduce_" and before < start < after]
        passes = sorted(end for name, _, end in events if "evaluate_function: EmbeddingBackward0" in name and before < end < after)
        buckets = [start for start in mine if start > passes[0]]
        assert len(passes) == 2 and len(mine) == 1 + len(buckets)        # two micro-batches; nothing is sent in the first
        early = [start for start in buckets if start < passes[1]]
        assert len(buckets) >= 3 and len(early) >= len(buckets) - 1      # all but the last, while the backward pass goes on


# ---- bench.py
def test_padding_keeps_every_token_target_and_label_in_its_place():
    settings = StepSettings(vocab_size=512, block_size=128, rows=4).data_settings()
    model, tokens, cu_seqlens = model_and_batch()
    rows_ = data.Rows(tokens.numpy(), cu_seqlens.numpy(), None, None, [False])
    inputs, has_target, ids = OBJECTIVES["clm"].prepare(rows_, None, settings)
    positions = torch.from_numpy(has_target).nonzero().squeeze(1)
    batch = data.Batch(torch.from_numpy(inputs), cu_seqlens, positions, torch.from_numpy(ids)[positions], True, len(positions),
                       torch.tensor(LENGTHS).numpy())
    wide = bench_contestants.padded(batch, 128)
    assert wide.tokens.view(4, 128)[1, :88].equal(tokens[40:128]) and wide.cu_seqlens.tolist() == [0, 128, 256, 384, 512]
    narrow, far = (model(b.tokens, b.cu_seqlens, True, b.positions) for b in (batch, wide))      # what follows cannot be seen
    assert torch.allclose(narrow, far, atol=1e-5)
    labels = bench_contestants.labels_of(wide)
    assert labels[wide.positions].equal(batch.targets) and (labels >= 0).sum() == len(positions)
    assert torch.equal(labels.view(4, 128)[1, :87], tokens[41:128])


@pytest.mark.parametrize("part", bench.PARTS)
def test_the_help_of_each_part_of_bench_lists_its_own_keys_with_comments(part):
    config_class = bench.PARTS[part].settings
    lines = [line.strip() for line in configurator.help_text(config_class).splitlines()]
    assert f"python bench.py {part}" in "".join(lines) and f"python bench.py {part} " in bench.__doc__
    for field in fields(config_class):
        line, = (line for line in lines if line.startswith(f"--{field.name}="))
        assert len(line.partition("  ")[2].strip()) > 3 or " " in line, f"{field.name} has no comment: {line}"


def test_a_part_of_bench_refuses_the_key_of_another_and_bench_lists_its_parts():
    done = run_python(["bench.py", "readme", "--size=tiny"])
    assert done.returncode == 2 and "unknown key 'size'" in done.stderr
    assert "python bench.py PART --help` shows" in run_python(["bench.py", "--help"]).stdout


def test_bench_train_races_real_steps_and_says_why_a_peer_is_missing(tmp_path):
    to = tmp_path / "rows.jsonl"
    done = run_python(["bench.py", "train", "--contestants=ours-eager,nanogpt,ours-kernel", "--size=tiny", "--vocab_size=512", "--rows=2",
                       "--block_size=64", "--steps=2", "--rounds=3", "--device=cpu", "--dtype=float32", f"--to={to}"])
    assert done.returncode == 0, done.stderr
    assert "| nanoGPT, CLM, compiled | not measured: no --nanogpt=CLONE was given |" in done.stdout
    row, = map(json.loads, to.read_text().splitlines())
    assert row["key"] == "ours-eager" and len(row["seconds"]) == 3 and row["peak"] > 2 ** 26 and row["first"] > 0
    model = Encoder(ModelConfig(**SIZES["tiny"], vocab_size=512))
    whole = model.flops([64] * 2, 128, False), model.flops([32] * 4, 20, False)      # the most and the least of such a step
    rate = row["flops_per_s"] / row["tok_per_s"] * 128
    assert whole[1] < rate < whole[0]


def test_a_size_whose_own_step_failed_is_no_reference_for_others(tmp_path, monkeypatch, capsys):
    def measure(c, size, key, folder, device):
        row = {"bench": "train", "run": "steps", "key": key, "name": key, "size": size, "reference": "ours"}
        if (size, key) == ("tiny", "ours"):
            return row | {"why": "out of memory"}
        seconds = {"ours": 1.0, "ours-clm": 2.0, "eurobert": 4.0}[key]
        return row | {"seconds": [seconds], "tok_per_s": 1.0, "mfu": None, "peak": 2 ** 30, "first": 1.0}
    monkeypatch.setattr(bench_steps, "measure_step", measure)
    monkeypatch.setattr(bench_contestants, "write_corpus", lambda settings, folder: None)
    to = tmp_path / "rows.jsonl"
    bench_steps.steps(bench_steps.Config(sizes=("tiny", "demo"), device="cpu", to=str(to)))
    ratios = {(row["size"], row["key"]): row.get("ratio") for row in map(json.loads, to.read_text().splitlines())}
    assert ratios == {("tiny", "ours"): None, ("tiny", "ours-clm"): None, ("demo", "ours"): 1.0, ("demo", "ours-clm"): 2.0, ("tiny", "eurobert"): None}
    assert capsys.readouterr().out.count("x the time of ours") == 1
    assert bench_tables.ratio_to_ours({"reference": "ours", "key": "eurobert"}) == ""


def test_the_tables_of_the_docs_follow_from_the_rows():
    with open(os.path.join(ROOT, bench_tables.PAGE), encoding="utf-8") as f:
        text = f.read()
    assert bench_tables.put_tables(text, os.path.join(ROOT, "results", "speed")) == text


def test_a_cell_nobody_measured_says_so_and_the_newest_row_counts(tmp_path):
    row = {"bench": "train", "kind": "cuda", "device": "NVIDIA H100, torch 2.11", "size": "610m", "key": "ours", "tok_per_s": 1e5, "mfu": 0.44, "peak": 2 ** 35,
           "first": 40.0, "reference": "ours", "ratio": 1.0, "peak_flops": 989e12, **bench_tables.GPU}
    kernel = {"bench": "attention", "kind": "cuda", "device": "NVIDIA H100, torch 2.11", "size": "610m", "heads": [18, 6, 64], "packing": "cuts", "causal": True,
              "pass": "both", "name": "ours", "ms": 2.5, "tflops": 200.0, "ratio": 1.0}
    text = "before\n" + bench_tables.BEGIN + "old\n" + bench_tables.END + bench_tables.BEGIN_KERNELS + "old\n" + bench_tables.END_KERNELS + "after\n"
    empty = bench_tables.put_tables(text, str(tmp_path))
    assert "| ours, MLM | not measured | not measured | not measured |" in empty and "No kernels have been measured yet." in empty and "old" not in empty
    assert empty.startswith("before\n") and empty.endswith("after\n")
    with open(tmp_path / "h100.jsonl", "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in (row | {"tok_per_s": 1.0}, row, row | {"key": "eurobert", "tok_per_s": 5e4, "ratio": 2.0},
                                                                 kernel | {"ms": 9.0}, kernel, kernel | {"name": "varlen_attn", "ratio": 1.25}))
    full = bench_tables.put_tables(empty, str(tmp_path))
    assert "| ours, MLM | not measured | 100,000, 44.0%, 32 GiB, 40 s | not measured |" in full and "50,000, 44.0%, 32 GiB, 40 s, 2.00 x" in full
    assert "| NVIDIA H100 | 610m (18/6 heads of 64) | rows cut once, causal | 2.50 ms, 200 TFLOP/s | 1.25 x |  |  |  |" in full
