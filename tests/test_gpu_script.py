"""runs/gpu.sh, at toy size on a CPU: GPU time is scarce, so the script must not fail for reasons of its own."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from benchmarks import profile as bench_profile
from benchmarks import summary as bench_summary

TOY = ["--device=cpu", "--tiny=true"]


def gpu_sh(*words, **env):
    return subprocess.run(["bash", os.path.join(ROOT, "runs", "gpu.sh"), *words], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PYTHON": sys.executable} | env)


def test_every_part_runs_at_toy_size_without_a_gpu_and_leaves_its_results(tmp_path):
    out = tmp_path / "out [1]"
    done = gpu_sh(str(out), *TOY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert sorted(os.listdir(out)) == ["cpu.jsonl", "log.txt", "summary.txt"]
    rows = bench_summary.read_rows(str(out / "cpu.jsonl"))
    assert {"alive", "train", "attention", "loss", "profile"} <= {row["bench"] for row in rows}
    assert all(row["ok"] for row in rows if row["bench"] == "alive")
    assert {(row["size"], row["key"]) for row in rows if row["bench"] == "train"} == {
        ("tiny", "ours"), ("tiny", "ours-clm"), ("tiny", "eurobert")}
    summary = (out / "summary.txt").read_text()
    assert summary.startswith("does it run? ") and "tokens/s" in summary.splitlines()[1]
    assert all(f"\n{part}  " in summary for part in "abcdef") and "FAILED" not in summary and "CUT OFF" not in summary
    assert done.stdout.endswith(summary)
    assert "trial calls of the attention kernels: need a CUDA GPU" in done.stdout      # what needs one says so


def test_a_part_that_is_cut_off_and_one_that_crashes_leave_the_results_of_the_others(tmp_path):
    """A python that hangs in part d and dies of a segmentation fault in part e; parts a and f come before and after them."""
    python = tmp_path / "python"
    python.write_text(f"""#!/usr/bin/env bash
case "$*" in
  *"bench.py kernels"*) sleep 100 ;;
  *"bench.py profile"*) kill -SEGV $$ ;;
esac
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    done = gpu_sh(str(tmp_path / "out"), *TOY, "--parts=c,d:1,e,f", "--seconds=100", PYTHON=str(python))
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == 1
    assert "c  training steps: ended after" in summary and "tiny, ours, MLM, eager: " in summary
    assert "d  kernels beside PyTorch's: CUT OFF after" in summary
    assert "e  where a step's time goes: FAILED with exit code 139" in summary
    assert "f  an experiment of yours: ended after" in summary
    assert {row["bench"] for row in bench_summary.read_rows(str(tmp_path / "out" / "cpu.jsonl"))} == {"train"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_part_that_runs_and_the_script_and_keeps_what_was_found(tmp_path, number):
    process = subprocess.Popen(["bash", os.path.join(ROOT, "runs", "gpu.sh"), str(tmp_path), *TOY, "--parts=f,c,e"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"PYTHON": sys.executable})
    while not process.stdout.readline().startswith("==== c"):
        pass
    time.sleep(1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)      # nothing that the part started holds the pipe open
    assert process.returncode == 130 and "interrupted: the results until then are in" in err and "==== e" not in out
    assert "f  an experiment of yours: ended" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("words, says", [(["--parts=z"], "part 'z': expected"), (["--parts=c:x"], "part 'c:x'"), (["--fast"], "what is '--fast'?"),
                                         (["--seconds=soon"], "seconds=soon"), (["--device=cpu"], "--device=cpu takes hours"), (["a", "b"], "two folders")])
def test_a_wrong_call_is_one_line(words, says):
    done = gpu_sh(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr and done.stderr.count("\n") == 1


def test_the_summary_takes_the_newest_row_of_each_fact_and_skips_a_line_that_was_cut_off(tmp_path):
    step = {"bench": "train", "run": "steps", "size": "210m", "key": "ours", "name": "ours, MLM"}
    measured = step | {"tok_per_s": 341_000.0, "seconds": [0.072], "mfu": 0.39, "peak": 2 ** 34, "first": 31.0}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (step | {"why": "out of memory"}, measured)) + '{"bench": "tra')
    lines = list(bench_summary.steps_in_words(bench_summary.read_rows(str(path))))
    assert lines == ["210m, ours, MLM: 341,000 tokens/s, 72 ms a step, 39.0% MFU, peak 16.0 GiB, first step after 31 s"]


def test_the_profile_counts_overlapping_kernels_once_and_sees_the_gaps():
    spans = [(0, 10, "a"), (5, 12, "b"), (20, 30, "a"), (30, 31, "c")]
    largest, busy, total = bench_profile.largest_kernels(spans, n=2)
    assert largest == [("a", (20, 2)), ("b", (7, 1))] and busy == 12 + 11 and total == 31
