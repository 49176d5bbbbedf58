"""finetune.py as its users run it: grids, rows, workers that die, and settings that do not fit."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, needs_shared, run_python
from test_tasks import sst2, write

import finetune
from core import checkpoint, tokenizer
from core.configurator import UserError
from core.files import find_files
from model import SIZES, Encoder, ModelConfig
from reporting.read import read_trials
from reporting.tables import trial_table
from tasks import demo
from tasks.training import Diverged, fit
from tasks.worker import git_commit


@pytest.fixture
def small(encoder, tmp_path):
    """Settings of a grid that takes seconds: small(out, **changes) -> finetune.Config"""
    folder = write(tmp_path, "data/sst2", train=sst2(200), validation=sst2(40, 1000), test=sst2(60, 2000))
    assert folder == str(tmp_path)

    def config(out="out", **changes):
        settings = dict(ckpt=encoder, tasks="sst2", data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / out), lrs=(1e-3, 3e-3),
                        seeds=(0, 1), steps=12, dtype="float32", device="cpu", cache_dir=str(tmp_path / "cache"))
        return finetune.Config(**(settings | changes))
    return config


@pytest.fixture
def grid_worker(small):
    c = small()
    return finetune.FineTuningWorker(c, checkpoint.find(c.ckpt))


def words(c):
    default = finetune.Config()
    return ["finetune.py", *(f"--{k}={v}" for k, v in vars(c).items() if v != getattr(default, k))]


def rows(folder):
    """{file name below trials/: row}, without what a clock says."""
    found = {}
    for path in find_files(folder, "trials/*/lr*.json"):
        with open(path, encoding="utf-8") as f:
            found[os.path.relpath(path, folder)] = {k: v for k, v in json.load(f).items() if k not in ("secs", "time")}
    return found


def test_the_demo_families_from_a_checkpoint_to_a_table(encoder, small, tmp_path):
    """A real process, no network: rows with all they need, scores of every example, and both rules in the report."""
    c = small(tasks="demo", data_dir="", lrs=(2e-3,), steps=4, seeds=(0, 1))
    done = run_python(words(c), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sotu_era: sequence classification, 3,000 + 400 + 600 examples, 4 steps of 32" in done.stdout + done.stderr
    found = rows(c.out_dir)
    assert len(found) == 6
    for path, row in found.items():
        assert row["model"] == "clm_then_mlm-40" and row["mode"] == "standard" and not row["failed"] and row["steps"] == 4
        sizes = (221, 323) if row["kind"] == "span" else (400, 600)
        assert (row["validation"]["n"], row["test"]["n"]) == sizes and 0 <= row["test"]["score"] <= 1
        items = np.load(os.path.join(c.out_dir, path)[:-4] + "npz")
        assert items["validation"].shape == sizes[:1] and items["test"].shape == sizes[1:] and items["test"].dtype == np.float16
        if row["kind"] != "token":
            assert items["test"].mean(dtype=np.float64) == pytest.approx(row["test"]["score"], abs=2e-3)
    done = run_python(["report.py", c.out_dir, f"--to={tmp_path}/report"])
    assert done.returncode == 0, done.stderr
    for name in ("(majority)", "(all O)", "(most frequent entity)", "| sotu_era | clm_then_mlm-40 |"):
        assert name in done.stdout


def test_a_seed_decides_head_and_order_and_the_same_twice_is_the_same_to_the_bit(small):
    one, again = small("one"), small("again", seeds=(1, 0))
    finetune.main(one)
    finetune.main(again)
    assert rows(one.out_dir) == rows(again.out_dir) and len(rows(one.out_dir)) == 4
    curves = {k: [loss for _, loss in row["train_loss"]] for k, row in rows(one.out_dir).items()}
    assert len({tuple(curve) for curve in curves.values()}) == 4
    # the first step has a learning rate of 0: before it only head and data differ, so the learning rate is not in the seed
    first = {(k.split("sd")[1], curve[0]) for k, curve in curves.items()}
    assert len(first) == 2


def test_every_epoch_reads_every_example_once_in_an_order_of_its_own(small):
    c = small(steps=14, batch=30)
    worker = finetune.FineTuningWorker(c, checkpoint.find(c.ckpt))
    worker.load_task("sst2", c.out_dir)
    family, orders = worker.data.family, []
    head, targets = family.new_head(worker.encoder.config.n_embd), family.targets

    def watched(sequences, indices):
        orders[-1] += list(indices)
        return targets(sequences, indices)
    family.targets = watched
    for seed in (0, 1):
        orders.append([])
        worker.train(head, {"lr": 1e-4, "seed": seed}, "")
    epochs = [tuple(order[i:i + 200]) for order in orders for i in (0, 200)]       # of 200 examples, 14 x 30 are read
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs) and len({*epochs, tuple(range(200))}) == 5


def test_how_a_batch_is_cut_changes_nothing(small, tmp_path):
    for name, rows_of in (("uner", demo.case()), ("record", demo.cloze())):       # few rows of their schema
        write(tmp_path / "data", name, train=rows_of["train"][:64], validation=rows_of["test"][:9], test=rows_of["test"][9:30])
    whole = small("whole", seeds=(0,), lrs=(1e-3,), tasks="sst2,uner,record", steps=6)
    parts = small("parts", seeds=(0,), lrs=(1e-3,), tasks="sst2,uner,record", steps=6, micro_tokens=200, eval_tokens=300)
    finetune.main(whole)
    finetune.main(parts)
    for (name, a), b in zip(rows(whole.out_dir).items(), rows(parts.out_dir).values()):
        assert [x for _, x in a["train_loss"]] == pytest.approx([x for _, x in b["train_loss"]], rel=1e-4), name
        assert a["test"]["score"] == pytest.approx(b["test"]["score"], abs=0.02)


def test_a_test_set_is_scored_at_the_threshold_that_validation_chose(small, tmp_path):
    def questions(rows):       # every other one has no answer
        return [{"id": str(i), "context": r["passage"], "question": r["query"], "answers": {
                 "text": r["answers"][:i % 2], "answer_start": [r["passage"].index(a) for a in r["answers"][:i % 2]]}}
                for i, r in enumerate(rows)]
    found = demo.cloze()
    write(tmp_path / "data", "squad_v2", train=questions(found["train"][:64]), validation=questions(found["validation"][:60]),
          test=questions(found["test"][:60]))
    c = small("v2", tasks="squad_v2", seeds=(0,), lrs=(2e-3,), steps=2)
    finetune.main(c)
    row, = rows(c.out_dir).values()
    validation, test = row["validation"], row["test"]
    assert validation["null_threshold"] == test["null_threshold"] and row["baseline"] == {"name": "no answer", "score": 0.5}
    assert validation["score"] == validation["f1"] >= max(0.5, validation["untuned_f1"]) and 0 <= test["untuned_f1"] <= 1


def test_a_worker_killed_in_the_middle_costs_one_trial_and_two_more_finish_the_grid(small):
    """kill -9, then two workers: the rows of an uninterrupted run, none twice, none missing."""
    calm, c = small("calm", steps=20), small("torn", steps=20)
    finetune.main(calm)
    victim = subprocess.Popen([sys.executable, *words(c)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 100
    while len(rows(c.out_dir)) < 1 and time.time() < deadline:      # it is in its second trial or about to begin it
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 1 <= len(rows(c.out_dir)) < 4
    workers = [subprocess.Popen([sys.executable, *words(c)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
               for _ in range(2)]
    for worker in workers:
        assert worker.wait(timeout=200) == 0, worker.stderr.read()
    ended = rows(c.out_dir)
    assert ended.keys() == rows(calm.out_dir).keys() and len(ended) == 4
    # workers beside each other have fewer threads, which may round sums otherwise; what a user reads is the same
    for name, row in rows(calm.out_dir).items():
        assert row == ended[name], name
    assert not find_files(c.out_dir, "trials/*/*.claim")


def test_a_loss_that_is_not_finite_is_a_failed_trial_and_the_grid_goes_on(small, tmp_path):
    c = small(lrs=(1e-3, 1e30), seeds=(0,))
    finetune.main(c)
    found = rows(c.out_dir)
    bad, good = found["trials/sst2/lr1e+30_sd0.json"], found["trials/sst2/lr1e-03_sd0.json"]
    assert bad["failed"] and "loss" in bad["why"] and not good["failed"]
    assert good == rows_of_alone(small)                 # weights come back whole after the ruin
    table = trial_table(list(read_trials(c.out_dir).values()))
    assert "| 1 | 1 | 0 |" in table                     # one seed, one failed, none missing


def rows_of_alone(small):
    c = small("alone", lrs=(1e-3,), seeds=(0,))
    finetune.main(c)
    return rows(c.out_dir)["trials/sst2/lr1e-03_sd0.json"]


def test_weights_come_back_after_every_trial(small, encoder):
    c = small(lrs=(3e-3, 1e-3), seeds=(0,))
    finetune.main(c)
    assert rows(c.out_dir)["trials/sst2/lr1e-03_sd0.json"] == rows_of_alone(small)


def test_pretrained_and_random_weights_causal_and_paper_are_told_apart(small, encoder, tmp_path):
    """Rows go beside the checkpoint, and a report never mixes them."""
    ckpt = checkpoint.latest(encoder)
    run = str(tmp_path / "clm_then_mlm")
    shutil.copytree(encoder, run)
    path = os.path.join(run, os.path.basename(ckpt))
    for changes in ({}, {"random_weights": True}, {"causal": True, "out_dir": f"{run}/causal"},
                    {"mode": "paper", "param_dtype": "bfloat16", "split": "encodeval", "out_dir": f"{run}/paper"}):
        finetune.main(small(**({"ckpt": run, "out_dir": "", "lrs": (1e-3,), "seeds": (0,), "steps": 3} | changes)))
    assert len(rows(path)) == len(rows(os.path.join(path, "random"))) == 1
    table = trial_table(list(read_trials(run).values()))
    for model in ("clm_then_mlm-40 |", "clm_then_mlm-40-random |", "clm_then_mlm-40 (causal) |",
                  "clm_then_mlm-40 (paper mode, encodeval split, bfloat16 weights) |"):
        assert f"| sst2 | {model}" in table
    scores = {r["test"]["score"] for r in read_trials(run).values()}
    assert len(scores) >= 2
    # a later checkpoint of the run does not take the rows with it
    checkpoint.prune(run, 0, ())
    assert os.path.isdir(path) and len(rows(path)) == 1


def test_a_damaged_checkpoint_is_written_anew_around_its_results(tmp_path):
    model = Encoder(ModelConfig(**SIZES["tiny"], vocab_size=320))
    path = checkpoint.save(str(tmp_path), 5, model, {"settings": {}})
    row = os.path.join(path, "trials", "sst2", "lr1e-03_sd0.json")
    os.makedirs(os.path.dirname(row))
    with open(row, "w") as f:
        f.write("{}")
    with open(os.path.join(path, "model.safetensors"), "r+b") as f:
        f.truncate(99)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.verify(path)
    assert checkpoint.save(str(tmp_path), 5, model, {"settings": {}}) == path
    checkpoint.verify(path)
    assert os.path.isfile(row) and os.listdir(tmp_path) == ["step_0000005"]


@pytest.mark.parametrize("task", ["sotu_case", "sotu_cloze"])
def test_the_papers_mode_runs_the_other_families(small, task):
    c = small(tasks=task, mode="paper", lrs=(1e-3,), seeds=(0,), steps=3)
    finetune.main(c)
    row, = rows(c.out_dir).values()
    assert 0 <= row["test"]["score"] <= 1 and row["baseline"]["name"] == {"sotu_case": "all O", "sotu_cloze": "no answer"}[task]


def test_finished_trials_stay_and_other_settings_are_refused_by_name(small, tmp_path):
    c = small(seeds=(0,))
    finetune.main(c)
    before = {p: os.stat(os.path.join(c.out_dir, p)).st_mtime_ns for p in rows(c.out_dir)}
    finetune.main(small(seeds=(0, 1)))                                      # more seeds: only what is missing
    assert len(rows(c.out_dir)) == 4
    assert all(os.stat(os.path.join(c.out_dir, p)).st_mtime_ns == t for p, t in before.items())
    for seeds in ((0, 1, 2), (0,)):                                         # also where nothing is left to do
        with pytest.raises(UserError, match=r"holds trials of other settings \(steps: 12 then, 13 now\): choose another --out_dir"):
            finetune.main(small(seeds=seeds, steps=13))
    write(tmp_path / "data", "sst2", train=sst2(201), validation=sst2(40, 1000), test=sst2(60, 2000))
    with pytest.raises(UserError, match=r"other settings \(data: [0-9a-f]{16} then, [0-9a-f]{16} now\)"):
        finetune.main(small(seeds=(2,)))


@pytest.mark.parametrize("text", ["7", "null", "[]", '"text"', "", "{}", "{", "\0" * 90, "[" * 100_000, '{"ckpt_sha": 1}', "folder"])
def test_settings_of_a_grid_that_cannot_be_read_are_refused_in_one_line(small, text, grid_worker):
    c = small()
    path = os.path.join(c.out_dir, "trials", "sst2", "settings.json")
    os.makedirs(path if text == "folder" else os.path.dirname(path))
    if text != "folder":
        with open(path, "w") as f:
            f.write(text)
    with pytest.raises(UserError, match=r"settings.json.*choose another --out_dir, or move .*sst2 away$"):
        grid_worker.refuse_other_settings(c.out_dir, {"sst2": {}})


def test_a_setting_that_is_newer_than_a_grid_had_its_default_there(small, grid_worker):
    c = small()
    grid_worker.record_settings(c.out_dir, "sst2", {"data": "0", "steps": 12})
    path = os.path.join(c.out_dir, "trials", "sst2", "settings.json")
    with open(path) as f:
        settings = json.load(f)
    del settings["warmup"]
    with open(path, "w") as f:
        json.dump(settings, f)
    grid_worker.refuse_other_settings(c.out_dir, {"sst2": {}})
    grid_worker.settings["warmup"] = 0.2
    with pytest.raises(UserError, match=r"other settings \(warmup: 0.1 then, 0.2 now\)"):
        grid_worker.refuse_other_settings(c.out_dir, {"sst2": {}})


def test_a_row_names_the_commit_and_whether_its_files_were_changed_since(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr("tasks.worker.ROOT", str(tmp_path))
    assert git_commit() is None
    git("init")
    (tmp_path / "model.py").write_text("a")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "")
    (tmp_path / "notes").write_text("not part of a commit")
    commit = git_commit()
    assert len(commit) == 12 and int(commit, 16)
    (tmp_path / "model.py").write_text("b")
    assert git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None               # git is not installed


def test_all_and_demo_stand_for_names_also_beside_others(small):
    assert finetune.check(small(tasks="demo, sst2,sotu_era")) == ("sotu_era", "sotu_case", "sotu_cloze", "sst2")


def test_the_tasks_own_number_of_steps_is_the_papers_and_named_or_not_is_the_same(small, tmp_path):
    rows_of = demo.case()
    write(tmp_path / "data", "uner", train=rows_of["train"][:70], validation=rows_of["test"][:9], test=rows_of["test"][9:30])
    c = small(tasks="uner", lrs=(1e-3,), seeds=(0,), steps=0)
    finetune.main(c)
    row, = rows(c.out_dir).values()
    assert row["steps"] == 3 and row["epochs"] == 1                         # one epoch: 70 sentences by 32
    finetune.main(small(tasks="uner", lrs=(1e-3,), seeds=(0, 1), steps=0))
    finetune.main(small(tasks="uner", lrs=(1e-3,), seeds=(0, 1, 2), steps=3))
    assert len(rows(c.out_dir)) == 3


def test_what_is_longer_than_the_context_is_cut_and_said(small, tmp_path, capsys):
    long = [dict(row, sentence=row["sentence"] + " and so on" * 60) for row in sst2(8, 500)]
    write(tmp_path / "data", "sst2", train=sst2(200) + long, validation=sst2(40, 1000), test=sst2(60, 2000))
    c = small(lrs=(1e-3,), seeds=(0,), steps=2)
    finetune.main(c)
    row, = rows(c.out_dir).values()
    assert row["truncated_frac"] == {"train": 8 / 208, "validation": 0.0, "test": 0.0} and row["max_length"] == 127
    assert "8 of train cut at 127 tokens" in capsys.readouterr().out


def test_a_grad_clip_of_0_is_no_clipping(small):
    settings = dict(lrs=(1e-2,), seeds=(0,), steps=30, batch=8)
    off, far_away = small("off", grad_clip=0.0, **settings), small("far_away", grad_clip=1e9, **settings)
    finetune.main(off)
    finetune.main(far_away)
    row, = rows(off.out_dir).values()
    assert rows(off.out_dir) == rows(far_away.out_dir) and row["train_loss"][-1][1] < 0.5 * row["train_loss"][0][1]


@pytest.mark.parametrize("changes, says", [
    ({"grad_clip": -1.0}, "grad_clip=-1.0 in the command line: expected a number of at least 0"),
    ({"tasks": "sst"}, "unknown task 'sst': expected one of sst2 (the nearest), conll2003, "),
    ({"ckpt": ""}, "which encoder?"),
    ({"ckpt": "nowhere"}, "no checkpoint at nowhere"),
    ({"lrs": ()}, "tasks, lrs and seeds need at least one value each"),
    ({"lrs": (-1.0,)}, "lrs=-1.0 in the command line: expected a number above 0"),
    ({"seeds": (0.5,)}, "seeds=0.5 in the command line: expected a whole number"),
    ({"mode": "papers"}, "mode=papers: expected standard or paper"),
    ({"max_length": 4}, "max_length=4: expected at least 16"),
    ({"attention": "flash"}, "attention=flash: expected auto or one of"),
    ({"data_dir": "nowhere"}, "data_dir=nowhere is not a folder"),
])
def test_a_wrong_call_is_one_line_and_exit_2(small, changes, says):
    done = run_python(words(small(**changes)))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_of_hugging_face_as_ckpt_is_answered_with_the_command_that_imports_it(small, tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="no checkpoint at"):
        finetune.main(small(ckpt=str(folder)))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    for ckpt, source in ((str(folder), f"'{folder}'"), ("hf:org/name", "org/name")):
        with pytest.raises(UserError, match=f"^{ckpt} is a Hugging Face model: python hf.py import {source} OUT, then give OUT$"):
            finetune.main(small(ckpt=ckpt))


def test_a_checkpoint_beside_anothers_tokenizer_is_refused(small, encoder, tmp_path):
    run = str(tmp_path / "mixed")
    shutil.copytree(encoder, run)
    tokenizer.save(tokenizer.get("train:512", [str(k ** 3) for k in range(3000)]), run)
    with pytest.raises(UserError, match="the tokenizer beside .* is not the one it was trained with"):
        finetune.main(small(ckpt=run))


def test_the_schedule_warms_up_over_a_tenth_and_ends_at_zero_and_decay_spares_vectors():
    """Against transformers' linear schedule and torch's AdamW on a toy, step by step."""
    from transformers import get_linear_schedule_with_warmup
    c, steps = finetune.Config(grad_clip=1e9), 25
    ours, theirs = ([torch.nn.Parameter(torch.full((3, 3), 2.0)), torch.nn.Parameter(torch.full((3,), 2.0))] for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}], lr=0.01,
                                  betas=(0.9, 0.95), eps=1e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, steps)
    for step in range(steps):
        (sum((p * (step + 1)).sin().sum() for p in theirs) / 5).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    curve = fit(ours, lambda step: [(step, 2), (step, 3)], lambda s: sum((p * (s + 1)).sin().sum() for p in ours) / 2, steps,
                       0.01, c)
    assert [step for step, _ in curve][-1] == steps and len(curve) <= 10
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_in_the_last_step_fails_though_all_losses_were_fine():
    p = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(Diverged, match="loss 0.0, gradient norm nan"):
        fit(p, lambda step: [(step, 1)], lambda step: ((p[0] - p[0].detach()).abs().sqrt().sum() if step == 3 else p[0].sum() * 0), 4,
                   1e-3, finetune.Config())


@needs_shared
@pytest.mark.parametrize("task", ["sst2", "uner_en_ewt", "squad"])
def test_real_data_trains_above_the_baseline(small, task):
    """The path, on a tiny encoder that has seen a second of text; README has what a small one reaches."""
    lr, steps = {"sst2": (2e-3, 160), "uner_en_ewt": (5e-3, 200), "squad": (5e-3, 40)}[task]
    c = small(tasks=task, data_dir=SHARED, lrs=(lr,), seeds=(0,), steps=steps)
    finetune.main(c)
    row, = rows(c.out_dir).values()
    assert row["train_loss"][-1][1] < row["train_loss"][0][1] and row["test"]["score"] > row["baseline"]["score"]
