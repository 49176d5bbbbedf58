"""Training: exact resume, invariance to how the work is split, branches, signals, and trouble that loses nothing."""
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, files, losses, rows, run_python

import prepare_fineweb
import train
from core import checkpoint, device
from core.configurator import RunError, UserError
from core.device import pick_dtype
from kernels.reference import linear_cross_entropy as dense
from objectives import objective_at
from pretraining import data, log
from pretraining.lifetime import stop_on_signals


def science(out_dir):
    """log.jsonl without clock and memory."""
    clock = ("seconds", "tok_per_s", "mfu", "peak_memory")
    return [{k: v for k, v in r.items() if k not in clock} for r in rows(out_dir) + rows(out_dir, validation=True)]


def torchrun(words, processes=2, **kwargs):
    return run_python(["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master-port=0", "--rdzv-backend=c10d",
                       "--rdzv-endpoint=localhost:0", *words], **kwargs)


def flip(path, at=-100):
    raw = bytearray(open(path, "rb").read())
    raw[at] ^= 0x10
    with open(path, "wb") as f:
        f.write(raw)


# ---- going on exactly

def test_20_steps_equal_10_and_resume_and_10_bit_for_bit_across_the_swap(tiny, capsys):
    whole, resumed = tiny("whole", eval_interval=5), tiny("resumed", eval_interval=5)      # the swap is at step 12
    train.main(whole)
    shutil.copytree(whole.out_dir, resumed.out_dir)      # what a death between 10 and 20 leaves: later rows in the log, too
    shutil.rmtree(checkpoint.path_of(resumed.out_dir, 20))
    shutil.rmtree(checkpoint.path_of(resumed.out_dir, 16)), shutil.rmtree(checkpoint.path_of(resumed.out_dir, 12))
    train.main(resumed)
    assert f"resuming from {checkpoint.path_of(resumed.out_dir, 10)}" in capsys.readouterr().out
    for step in (12, 16, 20):
        assert files(checkpoint.path_of(whole.out_dir, step)) == files(checkpoint.path_of(resumed.out_dir, step))
    assert science(whole.out_dir) == science(resumed.out_dir)
    assert [r["phase"] for r in rows(whole.out_dir)] == ["clm"] * 12 + ["mlm"] * 8


def test_kill_9_at_random_moments_changes_nothing(tiny, command):
    settings = dict(phases=(("clm", 60), ("mlm", 340)), save_interval=20, log_interval=3, keep_last=2, eval_interval=100)
    whole = tiny("whole", **settings)
    train.main(whole)
    killed, kills = command("killed", **settings), 0
    out, chance = os.path.join(os.path.dirname(whole.out_dir), "killed"), random.Random()
    for _ in range(12):
        process = subprocess.Popen([sys.executable, *killed], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        began = checkpoint.all_of(out)[-1:]
        while process.poll() is None and checkpoint.all_of(out)[-1:] == began and kills < 3:
            time.sleep(0.01)        # let it come one checkpoint further each time, then strike anywhere
        try:
            process.wait(chance.uniform(0.0, 0.4) if kills < 3 else 60)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        kills += 1
    assert kills >= 3
    assert files(checkpoint.path_of(out, 400)) == files(checkpoint.path_of(whole.out_dir, 400))
    assert science(out) == science(whole.out_dir)


def test_sigterm_finishes_the_step_saves_and_exits_0(tiny, command):
    settings = dict(phases=(("clm", 40), ("mlm", 60)), save_interval=1000, log_interval=1)
    whole, words = tiny("whole", **settings), command("stopped", **settings)
    out = os.path.join(os.path.dirname(whole.out_dir), "stopped")
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not os.path.isfile(os.path.join(out, "log.jsonl")) or len(rows(out)) < 30:
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    said = process.communicate(timeout=60)[0]
    step = checkpoint.step_of(checkpoint.all_of(out)[-1])
    assert process.returncode == 0 and f"stopped at step {step}" in said and 30 <= step < 100
    assert rows(out)[-1]["step"] == step
    assert run_python(words).returncode == 0
    train.main(whole)
    assert files(checkpoint.path_of(out, 100)) == files(checkpoint.path_of(whole.out_dir, 100))


def test_a_branch_equals_the_one_long_run(tiny, tmp_path):
    whole, trunk = tiny("whole"), tiny("trunk", phases=(("clm", 30),))
    train.main(trunk), train.main(whole)
    branch = tiny("branch", branch_from=str(tmp_path / "trunk" / "step_0000010"))
    train.main(branch)
    assert files(checkpoint.path_of(branch.out_dir, 20)) == files(checkpoint.path_of(whole.out_dir, 20))
    assert losses(trunk.out_dir)[:10] + losses(branch.out_dir) == losses(whole.out_dir)
    assert rows(branch.out_dir)[-1]["tokens"] == rows(whole.out_dir)[-1]["tokens"]


@pytest.mark.parametrize("changes, says", [
    (dict(seed=1), "seed: 42 then, 1 now"),
    (dict(phases=(("mlm", 20),)), "step 0 would be mlm"),
    (dict(phases=(("clm", 10),), decay_steps=2), "decay before step 10"),
    (dict(branch_from="step_0000030"), "lies in its run's decay"),
])
def test_a_branch_that_would_not_equal_one_long_run_is_refused(tiny, tmp_path, changes, says):
    train.main(tiny("trunk", phases=(("clm", 30),)))
    at = changes.pop("branch_from", "step_0000010")
    with pytest.raises(UserError, match=says):
        train.main(tiny("branch", branch_from=str(tmp_path / "trunk" / at), **changes))
    assert not os.path.exists(tmp_path / "branch")


def test_continued_pretraining_starts_a_new_schedule_on_unseen_rows(tiny, tmp_path):
    base = tiny("base")
    train.main(base)
    new = tiny("cpt", init_from=str(tmp_path / "base"), phases=(("mlm", 10),), warmup_steps=0)
    train.main(new)
    state = checkpoint.read_state(checkpoint.path_of(new.out_dir, 10))
    assert state["first_row"] == 20 * 8                                   # right behind the rows the base run read
    assert [r["lr"] for r in rows(new.out_dir)][:6] == [new.learning_rate] * 6 and rows(new.out_dir)[-1]["lr"] == new.learning_rate / 4
    assert rows(new.out_dir)[0]["tokens"] == 21 * 8 * 64                  # the ancestor's tokens count
    model = checkpoint.load_model(base.out_dir)
    c = data.DataSettings(new.block_size, new.batch_rows, seed=new.seed, first_row=20 * 8)
    batch, = data.micro_batches(data.Corpus(new.data_dir), 0, "mlm", c, 0, 1, 8)
    loss = dense(model(batch.tokens, batch.cu_seqlens, False)[batch.positions], model.lm_head.weight, batch.targets)
    assert rows(new.out_dir)[0]["loss"] == pytest.approx(loss.item() / batch.num_targets, abs=1e-5)


# ---- the same numbers however the work is split

@pytest.mark.parametrize("micro_rows", [2, 4])
def test_accumulation_changes_no_loss(tiny, micro_rows):
    one, split = tiny("one"), tiny("split", micro_rows=micro_rows)
    train.main(one), train.main(split)
    assert losses(split.out_dir) == pytest.approx(losses(one.out_dir), abs=1e-5)
    assert rows(split.out_dir, True)[-1]["val_mlm_loss"] == pytest.approx(rows(one.out_dir, True)[-1]["val_mlm_loss"], abs=1e-5)


@pytest.mark.parametrize("batch_rows, processes, micro_rows, taken", [
    (4, 1, 8, 4), (9, 1, 2, 1), (12, 1, 8, 6), (1152, 8, 100, 72), (1151, 1, 12, 1), (8, 2, 2**63 - 1, 4), (8, 2, 4, 4)])
def test_micro_rows_is_the_most_at_once_and_the_largest_that_divides_is_taken(tiny, batch_rows, processes, micro_rows, taken):
    c = tiny(batch_rows=batch_rows, micro_rows=micro_rows)
    train.check(c, processes)
    assert train.largest_micro_rows(c, processes) == taken


def test_micro_rows_that_does_not_divide_trains_and_a_line_says_what_is_taken(tiny, capsys):
    c = tiny(batch_rows=4, micro_rows=8)
    train.main(c)
    assert "micro_rows=8 does not divide the 4 rows that each process has in a step: it takes 4 at once\n" in capsys.readouterr().out
    train.main(tiny("divides", batch_rows=4, micro_rows=4))
    assert "micro_rows=" not in capsys.readouterr().out
    assert losses(c.out_dir) == losses(tiny("divides").out_dir)
    with pytest.raises(UserError, match="batch_rows=9 is not divisible by 2 processes"):
        train.check(tiny(batch_rows=9), 2)


def test_two_processes_that_accumulate_equal_one_that_does_not(tiny, command):
    one = tiny("one")
    train.main(one)
    done = torchrun(command("two", micro_rows=1))
    assert done.returncode == 0, done.stderr
    two = os.path.join(os.path.dirname(one.out_dir), "two")
    assert losses(two) == pytest.approx(losses(one.out_dir), abs=1e-5)
    assert [r["targets"] for r in rows(two)] == [r["targets"] for r in rows(one.out_dir)]
    assert [r["flops"] for r in rows(two)] == [r["flops"] for r in rows(one.out_dir)]
    assert [r["grad_norm"] for r in rows(two)] == pytest.approx([r["grad_norm"] for r in rows(one.out_dir)], rel=1e-4)
    for a, b in zip(rows(two, True), rows(one.out_dir, True)):
        assert a["val_mlm_loss"] == pytest.approx(b["val_mlm_loss"], abs=1e-5) and a["val_clm_loss"] == pytest.approx(b["val_clm_loss"], abs=1e-5)


def test_a_run_of_two_processes_resumes_with_one(tiny, command):
    whole = tiny("whole")
    train.main(whole)
    assert torchrun(command("moved", micro_rows=2)).returncode == 0
    moved = os.path.join(os.path.dirname(whole.out_dir), "moved")
    for step in (12, 16, 20):
        shutil.rmtree(checkpoint.path_of(moved, step))
    train.main(tiny("moved"))
    assert losses(moved) == pytest.approx(losses(whole.out_dir), abs=1e-5)


def test_a_grad_clip_of_0_is_no_clipping_and_the_norm_is_logged(tiny):
    off, far_away = tiny("off", grad_clip=0.0), tiny("far_away", grad_clip=1e9)
    train.main(off)
    train.main(far_away)
    assert losses(off.out_dir) == losses(far_away.out_dir) and losses(off.out_dir)[11] < losses(off.out_dir)[0] - 0.1
    norms = [row["grad_norm"] for row in rows(off.out_dir)]
    assert norms == [row["grad_norm"] for row in rows(far_away.out_dir)] and all(0 < norm < float("inf") for norm in norms)


def test_compiled_training_follows_eager_training_and_a_line_says_what_takes_so_long(tiny, capsys):
    eager, compiled = tiny("eager"), tiny("compiled", compile=True)
    train.main(eager)
    assert "compiling" not in capsys.readouterr().out
    train.main(compiled)
    said = capsys.readouterr().out
    assert said.index("compiling the model before the first step, about a minute ...\n") < said.index("  validation  ")
    assert losses(compiled.out_dir) == pytest.approx(losses(eager.out_dir), abs=1e-4)
    torch._dynamo.reset()


# ---- the schedule and the log

def test_warmup_stable_decay(tiny):
    c = tiny(phases=(("clm", 60), ("mlm", 40)), warmup_steps=10, decay_steps=20, learning_rate=1.0)
    rates = [train.learning_rate_at(s, c, 100) for s in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and set(rates[10:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(20)]) and rates[-1] == pytest.approx(0.05)
    assert [objective_at(s, c.phases) for s in (0, 59, 60, 99)] == ["clm", "clm", "mlm", "mlm"]


def test_the_log_has_every_step_and_the_counters_add_up(tiny):
    c = tiny(log_interval=7, eval_interval=10)
    train.main(c)
    found = rows(c.out_dir)
    assert [r["step"] for r in found] == list(range(1, 21))
    assert [r["tokens"] for r in found] == [512 * s for s in range(1, 21)]
    clm, mlm = found[11]["targets"], found[19]["targets"] - found[11]["targets"]
    assert clm == 12 * (512 - 16) and abs(mlm - 0.4 * 8 * 512) < 200
    assert {"step", "phase", "loss", "lr", "grad_norm", "tokens", "targets", "flops", "tok_per_s", "mfu", "peak_memory", "seconds"} == set(found[0])
    assert [r["step"] for r in rows(c.out_dir, True)] == [0, 10, 20]


def test_checkpoints_kept_are_the_last_ones_and_the_milestones(tiny):
    c = tiny(phases=(("clm", 24), ("mlm", 16)), milestones=(3, 7), save_interval=2, keep_last=2, decay_steps=5)
    train.main(c)
    assert [checkpoint.step_of(p) for p in checkpoint.all_of(c.out_dir)] == [3, 7, 24, 35, 36, 38, 40]
    model = checkpoint.load_model(c.out_dir)
    assert not model.training and model.lm_head.weight.shape == (1024, 64)
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=checkpoint.path_of(c.out_dir, 40), capture_output=True, text=True)
    assert sums.returncode == 0 and sums.stdout.count("OK") == 3


def test_a_tied_model_trains_saves_and_loads(tiny):
    c = tiny(tied=True)
    train.main(c)
    model = checkpoint.load_model(c.out_dir)
    assert model.lm_head.weight is model.embedding.weight and model.num_parameters()["encoder"] == model.num_parameters()["total"]


def test_wandb_offline_gets_the_run(command, tmp_path):
    done = run_python(command(wandb_log=True), env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    folder = next((tmp_path / "run" / "wandb").glob("offline-run-*"))
    record = next(folder.glob("*.wandb")).read_bytes()
    with open(tmp_path / "run" / "config.json") as f:
        assert folder.name.endswith(json.load(f)["run_id"])
    assert b"grad_norm" in record and b"val_mlm_loss" in record and b"learning_rate" in record


@pytest.fixture
def run_log(tmp_path, monkeypatch):
    """A RunLog where wandb knows nobody."""
    import wandb
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    run_log = object.__new__(log.RunLog)
    run_log.c = SimpleNamespace(wandb_project="nanoencoder", out_dir=str(tmp_path))
    run_log.path = str(tmp_path / "log.jsonl")
    run_log.processes = SimpleNamespace(is_first=True)
    run_log.wandb_run = None
    yield run_log
    wandb.teardown()

@pytest.mark.parametrize("environment, project, says", [
    ({}, "nanoencoder", "No API key configured"), ({"WANDB_API_KEY": "short"}, "nanoencoder", "WANDB_API_KEY invalid"),
    ({"WANDB_MODE": "offline"}, "a/b", "Invalid project name"), ({"WANDB_MODE": "sometimes"}, "nanoencoder", "Input should be 'online'")])
def test_wandb_that_cannot_start_is_one_line_before_the_first_step(run_log, monkeypatch, environment, project, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run_log.c.wandb_project = project
    with pytest.raises(UserError, match=f"wandb does not start .*{says}.*`wandb login`, or set WANDB_MODE=offline") as error:
        run_log.start_wandb("abcd0123", {})
    assert "\n" not in str(error.value)


def test_a_run_continues_without_a_wandb_that_fails(run_log, capsys):
    class Dead:
        def log(self, *_, **__):
            raise BrokenPipeError("its process\nis gone")

    run_log.wandb_run = Dead()
    run_log.write([{"step": 1, "loss": 2.0}])
    run_log.write([{"step": 2, "loss": 1.0}])
    run_log.close()
    assert [row["step"] for row in rows(os.path.dirname(run_log.path))] == [1, 2]
    assert capsys.readouterr().out.count("warning: wandb has failed, the run continues without it") == 1


def test_without_a_compiler_it_says_so_once_and_runs_eager(command):
    done = run_python(command(compile=True), env={"PATH": os.path.dirname(sys.executable), "CXX": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("eager: no C++ compiler") == 1


# ---- trouble: one clear line, nothing lost

@pytest.mark.parametrize("changes, says", [
    (dict(data_dir="nowhere"), "no corpus in 'nowhere'; make one with: python prepare_fineweb.py"),
    (dict(block_size=10_000_000), "block_size=10000000 is more than the"),
    (dict(block_size=20), "too small"),
    (dict(size="7b"), "size=7b: expected one of"),
    (dict(phases=(("nsp", 10),)), "objectives are clm, mlm"),
    (dict(phases=(("mlm", 5),)), "more than the 5 steps"),
    (dict(mask_rate=1e-9), "hides less than one of 8 x 64 tokens"),
    (dict(milestones=(21,)), "phases end at step 20"),
    (dict(block_size=1, random_length=False), "nothing to predict"),
    (dict(batch_rows=2**40, micro_rows=8), "tokens in a step"),
    (dict(phases=(([], 3),)), "expected (objective, steps) pairs"),
    (dict(mask_replace=(0.8, 0.1)), "three shares"),
    (dict(mask_replace=("mask", 0.1, 0.1)), "three shares"),
    (dict(attention="flash9"), "attention=flash9: expected auto or one of"),
    (dict(device="cuda:9" if not torch.cuda.is_available() else "tpu"), "this machine has"),
    (dict(dtype="float16"), "dtype=float16"),
    (dict(branch_from="nowhere/step_1"), "no checkpoint at nowhere/step_1"),
    (dict(branch_from="a", init_from="b"), "give one of them"),
])
def test_bad_settings_are_one_line_and_leave_no_run_behind(tiny, changes, says):
    c = tiny(**changes)
    with pytest.raises(UserError) as error:
        train.main(c)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(c.out_dir)


def test_a_usage_error_in_a_process_is_one_line_exit_2_no_traceback(command):
    done = run_python(command(size="7b"))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: size=7b") and done.stderr.count("\n") == 1


def test_a_finished_run_says_so_and_a_changed_setting_is_refused_by_name(tiny, capsys):
    c = tiny()
    train.main(c)
    before = files(checkpoint.path_of(c.out_dir, 20))
    train.main(tiny())
    assert "is finished: 20 steps; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=re.escape("(mask_rate: 0.4 then, 0.3 now; learning_rate: 0.003 then, 0.001 now)")):
        train.main(tiny(learning_rate=1e-3, mask_rate=0.3))
    with pytest.raises(UserError, match="already holds a run"):
        train.main(tiny(resume=False))
    train.main(tiny(save_interval=5, micro_rows=4))     # how it runs may change
    assert files(checkpoint.path_of(c.out_dir, 20)) == before


def read_only(monkeypatch):
    """Make this process see all disks as read-only, as root would see a disk that is mounted so."""
    real_open, real_os_open = open, os.open

    def refuse(name):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)

    def guarded_open(name, mode="r", *arguments, **kwargs):
        return refuse(name) if set(mode) & set("wax+") else real_open(name, mode, *arguments, **kwargs)

    def guarded_os_open(name, flags, *arguments, **kwargs):
        return refuse(name) if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT) else real_os_open(name, flags, *arguments, **kwargs)
    monkeypatch.setattr("builtins.open", guarded_open)
    monkeypatch.setattr(os, "open", guarded_os_open)
    for name in ("mkdir", "rename", "replace", "remove", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, lambda name, *arguments, **kwargs: refuse(name))


def test_a_finished_run_on_a_read_only_disk_says_so_and_one_that_is_not_says_what_to_do(tiny, capsys, monkeypatch):
    done, half = tiny("done"), tiny("half")
    train.main(done)
    train.main(half)
    shutil.rmtree(checkpoint.path_of(half.out_dir, 20))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        read_only(patch)
        train.main(done)
        with pytest.raises(RunError, match=r"half cannot be written \(Read-only file system\): make it writable"):
            train.main(half)
        with pytest.raises(UserError, match="seed: 42 then, 1 now"):
            train.main(tiny("done", seed=1))
        with pytest.raises(OSError, match="Read-only file system"):      # before a model is fetched or made
            train.main(tiny("new", init_from="hf:nobody/nothing"))
    assert f"{done.out_dir} is finished: 20 steps; nothing to do\n" in capsys.readouterr().out


def test_a_folder_with_other_files_is_not_taken_over(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train.main(tiny())
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS", "gone"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tiny, capsys, name):
    c = tiny()
    train.main(c)
    good = files(checkpoint.path_of(c.out_dir, 20))
    if name == "gone":
        os.remove(os.path.join(checkpoint.path_of(c.out_dir, 20), "model.safetensors"))
    else:
        flip(os.path.join(checkpoint.path_of(c.out_dir, 20), name))
    train.main(c)
    said = capsys.readouterr().out
    assert "step_0000020 is damaged" in said and "falling back to the checkpoint before it" in said
    assert f"resuming from {checkpoint.path_of(c.out_dir, 16)}" in said
    assert files(checkpoint.path_of(c.out_dir, 20)) == good


def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_last_good_checkpoint(tiny):
    c = tiny(phases=(("clm", 400),), learning_rate=1e18, warmup_steps=0, save_interval=2, adam_eps=1e-38, weight_decay=0.0, eval_interval=400)
    with pytest.raises(RunError, match=r"at step \d+: stopped, not saved") as error:
        train.main(c)
    for path in checkpoint.all_of(c.out_dir):
        assert all(torch.isfinite(p).all() for p in checkpoint.load_model(path).parameters())
    last = checkpoint.all_of(c.out_dir)
    assert not last or last[-1] in str(error.value)
    assert all(abs(r["loss"]) < float("inf") for r in rows(c.out_dir))


def test_a_full_disk_while_saving_leaves_the_old_checkpoint_intact(tiny, command):
    """A file-size limit of the process makes the second save fail half-way, as a full disk would."""
    c = tiny(phases=(("clm", 10),))
    train.main(c)
    good = files(checkpoint.path_of(c.out_dir, 10))
    shutil.rmtree(checkpoint.path_of(c.out_dir, 10))
    words = command(phases=(("clm", 10),))
    limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); sys.argv = {words!r}; " \
            f"sys.path.insert(0, {ROOT!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    old = checkpoint.all_of(c.out_dir)
    assert [checkpoint.step_of(p) for p in old] == [6]
    before = files(old[0])
    done = run_python(["-c", limit])
    assert done.returncode == 1 and "could not save step 10" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert files(old[0]) == before and checkpoint.latest(c.out_dir) == old[0]
    assert not [n for n in os.listdir(c.out_dir) if n.startswith(".writing")]
    assert run_python(words).returncode == 0
    assert files(checkpoint.path_of(c.out_dir, 10)) == good


def test_a_checkpoint_of_another_tokenizer_or_model_is_refused(tiny, tmp_path):
    train.main(tiny("base"))
    other = str(tmp_path / "other")
    prepare_fineweb.prepare(prepare_fineweb.Config(out=other, tokenizer="train:512", val_fraction=0.05))
    with pytest.raises(UserError, match="another tokenizer"):
        train.main(tiny("a", init_from=str(tmp_path / "base"), data_dir=other))
    with pytest.raises(UserError, match="holds another model"):
        train.main(tiny("b", init_from=str(tmp_path / "base"), size="demo"))
    with pytest.raises(UserError, match="tokenizer_hash"):
        train.main(tiny("base", data_dir=other))


@pytest.mark.parametrize("amx, avx512_bf16, vendor, found", [(True, True, "GenuineIntel", "bfloat16"), (False, True, "AuthenticAMD", "bfloat16"),
                                                             (False, True, "GenuineIntel", "float32"), (False, False, "AuthenticAMD", "float32")])
def test_auto_takes_bf16_only_on_cpus_whose_products_are_faster_in_it(monkeypatch, amx, avx512_bf16, vendor, found):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(device, "cpu_vendor", lambda: vendor)
    assert pick_dtype("auto", "cpu") == found and pick_dtype("bfloat16", "cpu") == "bfloat16"


def test_a_second_training_in_one_folder_is_refused_at_once_and_the_first_is_undisturbed(tiny, command):
    """Also with other settings, and while the first has no checkpoint yet."""
    c = tiny("run", phases=(("clm", 4000),))
    first = subprocess.Popen([sys.executable, *command("run", phases=(("clm", 4000),))], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "first step" not in first.stdout.readline():
        pass
    with pytest.raises(UserError, match=rf"train.py \(pid {first.pid} on .*\) is writing {re.escape(c.out_dir)}"):
        train.main(tiny("run", phases=(("clm", 4000),), learning_rate=1e-4))
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    steps = [row["step"] for row in rows(c.out_dir)]
    assert first.returncode == 0 and steps == sorted(set(steps))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])      # SIGTERM: above
def test_each_signal_that_asks_for_an_end_saves_and_exits_0(tiny, command, number):
    c = tiny("run", phases=(("clm", 4000),))
    process = subprocess.Popen([sys.executable, *command("run", phases=(("clm", 4000),))], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "first step" not in process.stdout.readline():
        pass
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "run the same command to resume" in text and checkpoint.latest(c.out_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_job_lets_the_compiler_end_its_work(number):
    with ExitStack() as at_exit:
        signals = stop_on_signals(at_exit)
        compiler = subprocess.Popen(["sleep", "0.2"])
        compiler.send_signal(number)
        os.kill(os.getpid(), number)
        assert compiler.wait(timeout=60) == 0 and signals == [number]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent died")
def test_kill_9_of_torchrun_ends_its_ranks_which_save_first(tiny, command):
    c = tiny("run", phases=(("clm", 9000),), micro_rows=4)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    agent = subprocess.Popen([sys.executable, *torchrun, *command("run", phases=(("clm", 9000),), micro_rows=4)], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while "first step" not in agent.stdout.readline():
        pass
    agent.kill()
    text = agent.communicate(timeout=60)[0]          # ends when the last rank closes the pipe
    assert "run the same command to resume" in text and checkpoint.latest(c.out_dir)
