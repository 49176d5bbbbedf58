"""The study runs in any order of accidents: branches equal whole runs, kills change nothing, what is missing is named."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, files, run_python

import study
import train
from core import lock
from core.configurator import RunError, UserError
from core.files import find_files, is_new
from experiments import jobs
from experiments.commands import flag
from experiments.scales import SCALES

ONLY = "610m-clm-3k-mlm40-12k,610m-clm-12k,610m-clm-12k-3000"


def words(corpus_dir, out, **changes):
    settings = dict(scale="smoke", only=ONLY, data_dir=corpus_dir, out_dir=str(out), tasks="sotu_era", device="cpu", compile=False, jobs=2)
    return ["study.py", "run", *(flag(k, v) for k, v in (settings | changes).items())]


def scores(out):
    """{path: what a trial found} of a study."""
    found = {}
    for path in find_files(out, "**/trials/*/lr*.json"):
        with open(path) as f:
            row = json.load(f)
        found[os.path.relpath(path, out)] = row["validation"], row["test"], row["train_loss"], row["ckpt_sha"]
    return found


@pytest.fixture(scope="module")
def undisturbed(corpus_dir, tmp_path_factory):
    """A study of three checkpoints, trained and fine-tuned: its folder."""
    out = tmp_path_factory.mktemp("study") / "whole"
    done = run_python(words(corpus_dir, out), timeout=300)
    assert done.returncode == 0, done.stderr
    return str(out)


def test_a_branched_model_equals_one_trained_straight_bit_for_bit(undisturbed, corpus_dir, tmp_path):
    """610m-clm-3k-mlm40-12k: from the trunk's step 3, and alone, where no trunk is wanted."""
    with open(f"{undisturbed}/610m-clm-3k-mlm40-12k/config.json") as f:
        assert json.load(f)["start_step"] == 3
    done = run_python(words(corpus_dir, tmp_path / "alone", only="610m-clm-3k-mlm40-12k", evaluate=False))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "alone" / "610m-clm-3k-mlm40-12k" / "config.json") as f:
        assert json.load(f)["start_step"] == 0
    last = os.path.join("610m-clm-3k-mlm40-12k", "step_0000012")
    assert files(str(tmp_path / "alone" / last)) == files(os.path.join(undisturbed, last))


def test_kill_9_at_up_to_ten_random_moments_gives_the_rows_of_the_undisturbed_study(undisturbed, corpus_dir, tmp_path):
    out, when, kills = tmp_path / "killed", random.Random(7), 0
    while kills < 10:
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen([sys.executable, *words(corpus_dir, out)], cwd=ROOT, stdout=said, stderr=said)
        try:
            process.wait(when.uniform(0.5, 12.0))
            assert process.returncode == 0, (tmp_path / "said").read_text()      # it may finish before its time: then it must do so well
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 4, "the study is too short to be killed in"        # on a fast machine it may finish before the tenth
    done = run_python(words(corpus_dir, out), timeout=300)
    assert done.returncode == 0, done.stderr
    assert scores(out) == scores(undisturbed) and len(scores(out)) == 3
    assert not find_files(out, "**/*.claim")


def test_sigterm_lets_training_finish_its_step_and_save(corpus_dir, tmp_path):
    process = subprocess.Popen([sys.executable, *words(corpus_dir, tmp_path / "s", only="610m-clm-42k", evaluate=False, jobs=1)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "s" / "logs" / "610m-clm-42k.txt"
    while process.poll() is None and not (log.exists() and "first step" in log.read_text()):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143
    assert "stopped at step" in log.read_text().splitlines()[-1] and "run the same command to resume" in log.read_text()


@pytest.fixture
def start_job(tmp_path):
    """Start a Python program as a job: start_job(kind, code) -> the jobs.JobQueue that runs it"""
    (tmp_path / "logs").mkdir()
    processes = []
    with open(tmp_path / "lock", "w") as lock_file:
        def start(kind, code):
            job = jobs.Job("job", ["-u", "-c", code], is_done=lambda: False, kind=kind)
            queue = jobs.JobQueue([job], str(tmp_path), lock_file, [{}])
            queue.start_ready()
            processes.append(queue.running[0].process)
            while b"ready" not in (tmp_path / "logs" / "job.txt").read_bytes():
                time.sleep(0.01)
            return queue
        yield start
    for process in processes:
        process.kill()
        process.wait()


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(%r, 'ready'); time.sleep(100)"


def test_a_training_that_still_compiles_is_ended_at_once_since_it_has_nothing_to_save(start_job, tmp_path):
    (tmp_path / "logs").mkdir(exist_ok=True)
    (tmp_path / "logs" / "job.txt").write_text("first step after 3.0 s, of an earlier run\n")
    queue = start_job("train", DEAF % "compiling")
    began = time.monotonic()
    queue.stop()
    assert time.monotonic() - began < 5 and queue.running[0].process.returncode == -signal.SIGKILL


def test_a_training_that_has_taken_a_step_may_save(start_job, tmp_path):
    queue = start_job("train", "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('first step after 1 s, ready')\n"
                      "try: time.sleep(100)\nfinally: time.sleep(0.3); print('saved')")
    queue.stop()
    assert queue.running[0].process.returncode == 0 and "saved" in (tmp_path / "logs" / "job.txt").read_text()


def test_a_second_ctrl_c_ends_jobs_that_do_not_listen(start_job, monkeypatch):
    queue = start_job("train", DEAF % "first step after 1 s")

    def interrupted(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(jobs.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.stop()
    assert queue.running[0].process.returncode == -signal.SIGKILL


def test_study_json_names_every_checkpoint_and_the_same_command_has_nothing_to_do(undisturbed, corpus_dir):
    with open(f"{undisturbed}/study.json") as f:
        found = json.load(f)
    assert found["plan"] == "smoke" and {name: m["folder"] for name, m in found["models"].items()} == {
        "610m-clm-3k-mlm40-12k": "610m-clm-3k-mlm40-12k/step_0000012", "610m-clm-12k": "610m-clm-12k/step_0000012",
        "610m-clm-12k-3000": "610m-clm-12k/step_0000003"}
    before = {path: os.stat(path).st_mtime_ns for path in find_files(undisturbed, "*/**")}
    done = run_python(words(corpus_dir, undisturbed))
    assert done.returncode == 0, done.stderr
    assert {path: os.stat(path).st_mtime_ns for path in find_files(undisturbed, "*/**")} == before


def test_the_report_knows_a_real_study_its_names_scores_and_losses(undisturbed, tmp_path):
    done = run_python(["report.py", undisturbed, f"--to={tmp_path}/report"])
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report" / "report.md").read_text()
    with open(f"{undisturbed}/610m-clm-12k/log.jsonl") as f:
        last = [row for row in map(json.loads, f) if "val_mlm_loss" in row][-1]
    trained = next(line for line in page.splitlines() if line.startswith("| 610m-clm-12k | 42 | 12 | 6,144 |"))
    assert trained.endswith(f"| {last['val_mlm_loss']:.3f} | {last['val_clm_loss']:.3f} |")
    assert next(line for line in page.splitlines() if line.startswith("| 610m-clm-12k-3000 | 42 | 3 |")).endswith("| – | – |")
    test = json.load(open(f"{undisturbed}/610m-clm-12k/step_0000012/trials/sotu_era/lr1e-03_sd0.json"))["test"]["score"]
    assert f"{100 * test:.2f}" in page and "Report: plan smoke" in page


def test_other_scales_and_other_folders_are_refused(undisturbed, corpus_dir, tmp_path):
    with pytest.raises(UserError, match="holds another study.*plan: smoke then, cpu now"):
        study.main(study.Config(args=("run",), scale="cpu", only=ONLY, data_dir=corpus_dir, out_dir=undisturbed))
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no study"):
        study.main(study.Config(args=("run",), scale="cpu", only=ONLY, data_dir=corpus_dir, out_dir=str(tmp_path)))


def test_more_of_the_papers_models_can_be_asked_for_later(undisturbed, corpus_dir, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    trunk = files(str(out / "610m-clm-12k" / "step_0000012"))
    done = run_python(words(corpus_dir, out, only="610m-clm-6k-mlm40-12k,610m-clm-12k-5000", evaluate=False))
    assert done.returncode == 0, done.stderr
    with open(out / "610m-clm-6k-mlm40-12k" / "config.json") as f:
        assert json.load(f)["parent"] == str(out / "610m-clm-12k" / "step_0000006")
    with open(out / "study.json") as f:
        assert len(json.load(f)["models"]) == 5 and (out / "610m-clm-12k" / "step_0000005").is_dir()
    assert files(str(out / "610m-clm-12k" / "step_0000012")) == trunk


def test_what_a_kill_leaves_behind_before_anything_is_whole_is_no_obstacle(tiny, corpus_dir, tmp_path):
    run = tiny("run", phases=(("clm", 8),))
    os.makedirs(run.out_dir)
    shutil.copy(f"{corpus_dir}/tokenizer.tiktoken", run.out_dir)                          # killed before config.json was there ...
    (tmp_path / "run" / "config.json.4711-0123abcd.tmp").write_text("{")                  # ... or while it was written
    train.main(run)
    assert os.path.isdir(f"{run.out_dir}/step_0000008")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json.4711-0123abcd.tmp").write_text("{")
    study.main(study.Config(args=("run",), scale="smoke", only=ONLY, data_dir=corpus_dir, out_dir=str(tmp_path / "study"), launch="torchrun"))
    assert (tmp_path / "study" / "study.json").is_file()
    assert not is_new(run.out_dir) and is_new(str(tmp_path / "nowhere"))


def test_a_missing_parent_checkpoint_is_named_before_anything_runs(undisturbed, corpus_dir, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "610m-clm-3k-mlm40-12k")
    shutil.rmtree(out / "610m-clm-12k" / "step_0000003")
    done = run_python(words(corpus_dir, out))
    assert done.returncode == 2 and "610m-clm-3k-mlm40-12k begins from" in done.stderr and "step_0000003, which is missing" in done.stderr
    assert done.stderr.strip().count("\n") == 0 and not (out / "610m-clm-3k-mlm40-12k").exists()


def test_a_job_that_fails_stops_the_study_with_its_own_words(corpus_dir, tmp_path):
    done = run_python(words(corpus_dir, tmp_path / "bad", only="610m-clm-12k", tasks="nosuchtask"))
    assert done.returncode == 2 and "unknown task 'nosuchtask'" in done.stderr
    c = study.Config(args=("run",), scale="smoke", only="610m-clm-12k", data_dir=corpus_dir, out_dir=str(tmp_path / "x"), evaluate=False, device="cpu")
    os.makedirs(tmp_path / "x" / "610m-clm-12k")
    (tmp_path / "x" / "610m-clm-12k" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no study"):
        study.main(c)
    os.makedirs(tmp_path / "y" / "610m-clm-12k")
    (tmp_path / "y" / "study.json").write_text(json.dumps({"plan": "smoke", "scale": json.loads(json.dumps(SCALES["smoke"])), "models": {}}))
    (tmp_path / "y" / "610m-clm-12k" / "mine.txt").write_text("precious")
    c.out_dir = str(tmp_path / "y")
    with pytest.raises(RunError, match="610m-clm-12k failed: error: .* is not empty and holds no run"):
        study.main(c)


def test_two_at_a_time_on_one_folder_are_refused(undisturbed, corpus_dir):
    with lock.hold(undisturbed, "study.py"):
        done = run_python(words(corpus_dir, undisturbed))
    assert done.returncode == 2 and f"study.py (pid {os.getpid()} on " in done.stderr and "is writing" in done.stderr


def test_what_lies_in_a_folder_of_the_user_is_not_touched(corpus_dir, tmp_path):
    """Also not a file that is called as our lock once was."""
    for name in ("lock", "thesis.tex"):
        (tmp_path / name).write_text("my notes")
    done = run_python(words(corpus_dir, tmp_path))
    assert done.returncode == 2 and "holds no study" in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"lock": "my notes", "thesis.tex": "my notes"}


def test_continued_pretraining_begins_from_decayed_weights_on_unread_rows(corpus_dir, tmp_path):
    done = run_python(words(corpus_dir, tmp_path, only="610m-clm-dec12k-mlm40-20k,610m-clm-dec12k-mlm40-14k", evaluate=False), timeout=300)
    assert done.returncode == 0, done.stderr
    for name, steps in (("610m-clm-dec12k-mlm40-20k", 8), ("610m-clm-dec12k-mlm40-14k", 2)):
        with open(tmp_path / name / f"step_{steps:07d}" / "state.json") as f:
            state = json.load(f)
        assert state["settings"]["init_from"] == str(tmp_path / "610m-clm-12k" / "step_0000012") and state["settings"]["warmup_steps"] == 0
        assert state["first_row"] == 12 * 8 and state["totals"]["tokens"] == (12 + steps) * 8 * 64


def test_printed_commands_are_those_that_would_run_with_slurm_waiting_for_what_comes_before(tmp_path):
    """The script runs, against an sbatch that writes down what it is given and answers a number, as the real one does."""
    (tmp_path / "sbatch").write_text('#!/bin/bash\nn=$(($(cat "$HERE/n" 2>/dev/null || echo 100) + 1)); echo $n > "$HERE/n"\n'
                                     'echo "$n $*" >> "$HERE/jobs"; grep srun >> "$HERE/jobs"; echo $n\n')
    (tmp_path / "sbatch").chmod(0o755)
    made = run_python(["study.py", "run", "--launch=slurm", "--nodes=24", f"--only={ONLY},610m-clm-dec12k-mlm40-14k", f"--out_dir={tmp_path}/s", "--data_dir=nowhere"])
    assert made.returncode == 0, made.stderr
    done = subprocess.run(["bash", "-c", made.stdout], env=os.environ | {"HERE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 0
    lines = (tmp_path / "jobs").read_text().splitlines()
    heads, commands = lines[::2], lines[1::2]
    number = {head.split("--job-name=")[1].split()[0]: head.split()[0] for head in heads}
    after = {head.split("--job-name=")[1].split()[0]: head.partition("afterok:")[2] for head in heads}
    assert after["610m-clm-12k"] == "" and after["610m-clm-3k-mlm40-12k"] == after["610m-clm-dec12k-mlm40-14k"] == number["610m-clm-12k"]
    assert after["610m-clm-12k-3000.finetune"] == number["610m-clm-12k"] and after["610m-clm-3k-mlm40-12k.eval_ir"] == number["610m-clm-3k-mlm40-12k"]
    assert all("--nodes=24" in h and "--nnodes=24" in c and "--micro_rows=6" in c for h, c in zip(heads, commands) if "train.py" in c)
    assert len(heads) == 3 + 2 * 4 and sum("finetune.py config/finetune_paper.py" in c for c in commands) == 4
    one = run_python(["study.py", "run", "--launch=torchrun", "--only=610m-clm-12k", "--evaluate=false", f"--out_dir={tmp_path}/t", "--data_dir=nowhere"])
    assert one.stdout.splitlines()[-1].startswith("torchrun --nproc_per_node=8 train.py --size=610m '--phases=[[\"clm\", 12000]]' --seed=42")


def test_a_script_printed_in_another_folder_may_be_run_in_a_third(tmp_path, monkeypatch, capsys):
    """Relative folders are of where it was printed, and the programs are named with their folder."""
    home = tmp_path / "it's home"
    home.mkdir()
    monkeypatch.chdir(home)
    (tmp_path / "sbatch").write_text('#!/bin/bash\npwd >> "$HERE/jobs"; grep srun >> "$HERE/jobs"; echo 1\n')
    (tmp_path / "sbatch").chmod(0o755)
    study.main(study.Config(args=("run",), launch="slurm", only="610m-clm-12k", out_dir="s", data_dir="nowhere"))
    done = subprocess.run(["bash", "-c", capsys.readouterr().out], cwd="/", env=os.environ | {"HERE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    lines = (tmp_path / "jobs").read_text().splitlines()
    assert done.returncode == 0 and len(lines) == 6 and set(lines[::2]) == {str(home)}
    for line in lines[1::2]:
        program, *arguments = line.partition(" --nproc_per_node=8 ")[2].split()
        assert os.path.isfile(program) and os.path.dirname(program) == ROOT
        assert all(os.path.isfile(word) for word in arguments if word.endswith(".py"))
        assert "--out_dir=s/610m-clm-12k" in arguments or any(word.startswith("--ckpt=s/610m-clm-12k/") for word in arguments)


@pytest.mark.parametrize("content, says", [
    (b"{", "is not JSON"), (b"[]", "the content is a list, not an object"), (b"{}", "has no 'plan'"), (b'{"plan": "smoke", "models": []}', "'models' is a list"),
    (b'{"plan": "smoke", "models": {"610m-clm-12k": "x"}}', "'models.610m-clm-12k' is"), (b"\xff", "not UTF-8"), (b"[" * 200_000, "nested too deep")])
def test_a_damaged_study_json_is_one_line(corpus_dir, tmp_path, content, says):
    (tmp_path / "study.json").write_bytes(content)
    c = study.Config(args=("run",), scale="smoke", only="610m-clm-12k", data_dir=corpus_dir, out_dir=str(tmp_path), evaluate=False, device="cpu")
    with pytest.raises(UserError, match=f"study.json.*{re.escape(says)}"):
        study.main(c)
    assert (tmp_path / "study.json").read_bytes() == content


@pytest.mark.parametrize("command, path, content, says", [
    ("run", "s/610m-clm-12k/config.json", "[]", "the content is a list"), ("run", "s/610m-clm-12k/config.json", '{"settings": {}}', "has no 'settings.branch_from'"),
    ("plan", "d/tokenizer_info.json", "[]", "the content is a list"), ("plan", "d/tokenizer_info.json", '{"vocab_size": "many"}', "'vocab_size' is \"many\"")])
def test_another_damaged_file_of_a_study_is_one_line_and_no_script(tmp_path, capsys, command, path, content, says):
    os.makedirs(os.path.dirname(tmp_path / path))
    (tmp_path / path).write_text(content)
    os.makedirs(tmp_path / "s", exist_ok=True)
    (tmp_path / "s" / "study.json").write_text(json.dumps({"plan": "smoke", "scale": SCALES["smoke"], "models": {}}))
    data_dir = str(tmp_path / "d") if command == "plan" else "nowhere"
    c = study.Config(args=(command,), scale="smoke", only="610m-clm-12k", data_dir=data_dir, out_dir=str(tmp_path / "s"), evaluate=False, launch="torchrun")
    with pytest.raises(UserError, match=f"{path}.*{re.escape(says)}"):
        study.main(c)
    assert command == "plan" or capsys.readouterr().out == ""


def test_the_time_that_is_left_counts_kinds_that_have_ended_and_names_the_others():
    left = [jobs.Job("a", [], None, cost=3.0, kind="train"), jobs.Job("b", [], None, cost=2.0, kind="finetune")]
    assert jobs.eta(left, {"train": jobs.Spent(6.0, 60.0)}, 2) == "0:00:15, and then finetune"
    assert jobs.eta(left, {"train": jobs.Spent(6.0, 60.0), "finetune": jobs.Spent(1.0, 5.0)}, 2) == "0:00:20"
