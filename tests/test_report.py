"""Trials become the published numbers under the paper's rule, and every irregularity of a grid is counted."""
import json
import os

import pytest
from conftest import run_python

from core.configurator import UserError
from reporting.read import read_trials
from reporting.scores import select_trials
from reporting.tables import selection_in_words, trial_table

# the 30 official runs of one model and data set: {lr: [(validation, test) of seeds 0 to 4]}, NDCG@10 of 610m-clm-42k on MLDR-en,
# from results/610m-clm-42k/IR/mldr_en of github.com/hgissbkh/EncodEval (branch MLM_vs_CLM)
OFFICIAL = {
    1e-05: [(0.52377844, 0.49523393), (0.52635522, 0.49423695), (0.51713846, 0.50161140),
            (0.52441006, 0.49428063), (0.51354791, 0.49142235)],
    2e-05: [(0.56817261, 0.53243475), (0.55880878, 0.52804126), (0.56332640, 0.52636320),
            (0.55979828, 0.52608558), (0.57182317, 0.52530195)],
    5e-05: [(0.56182711, 0.53084597), (0.58989304, 0.53620958), (0.57632354, 0.53585137),
            (0.56363513, 0.52801469), (0.55128573, 0.52626937)],
    1e-04: [(0.51577412, 0.49054287), (0.44020529, 0.40644829), (0.52388912, 0.47492236),
            (0.51423684, 0.45420294), (0.55318894, 0.52172881)],
    2e-04: [(0.44280141, 0.39276508), (0.42869236, 0.38601010), (0.42568710, 0.37399203),
            (0.43624975, 0.37623840), (0.39284894, 0.38521035)],
    5e-04: [(0.09047135, 0.09005935), (0.10075571, 0.08454378), (0.10026040, 0.09733206),
            (0.02301816, 0.02970343), (0.08600973, 0.08309768)],
}


def write(folder, lr, seed, **row):
    path = os.path.join(folder, "step_0042000", "trials", row.get("task", "mldr_en"), f"lr{lr:.0e}_sd{seed}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        json.dump({"model": "610m-clm-42k", "task": "mldr_en", "lr": lr, "seed": seed} | row, f)
    return path


@pytest.fixture
def grid(tmp_path):
    for lr, pairs in OFFICIAL.items():
        for seed, (validation, test) in enumerate(pairs):
            write(str(tmp_path / "run"), lr, seed, validation={"score": validation}, test={"score": test})
    return str(tmp_path / "run")


def test_the_papers_rule_gives_the_published_number(grid):
    rows = list(read_trials(grid).values())
    assert len(rows) == 30
    lrs = set(OFFICIAL)
    assert selection_in_words(select_trials(rows, "paper"), lrs).startswith("53.16 ± 0.42 (")       # Table 2: 53.16 ± 0.42
    standard = select_trials(rows, "standard")
    assert round(100 * standard.mean, 2) == 53.14 and set(standard.lrs) == {5e-05}
    assert 100 * standard.half_width == pytest.approx(0.39 / 1.96 * 2.776, abs=0.01)           # its 0.39, as a t interval


def test_the_table_counts_what_failed_and_what_is_missing_and_marks_the_edge(grid):
    os.remove(write(grid, 1e-05, 4))
    write(grid, 5e-04, 3, failed=True)
    write(grid, 5e-04, 2, validation={"score": float("nan")}, test={"score": 0.1})
    write(grid, 5e-04, 0, validation={"score": 0.99}, test={"score": 0.5}, baseline={"name": "random order", "score": 0.01})
    done = run_python(["report.py", grid, os.path.join(grid, "step_0042000"), f"--to={grid}/out"])    # a file counts once
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("| mldr_en"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["mldr_en", "610m-clm-42k"] and cells[4:] == ["1.00 (random order)", "5", "2", "1"]
    assert "5e-04†" in cells[2] and "†" not in cells[3]
    assert open(f"{grid}/out/trials.md").read() in done.stdout + "\n"


def test_one_seed_has_no_interval_and_none_at_all_says_so():
    row = {"task": "t", "model": "m", "lr": 1e-4, "seed": 0, "failed": False, "validation": {"score": 0.5}, "test": {"score": 0.4}}
    assert selection_in_words(select_trials([row], "standard"), {1e-4}) == "40.00 (1e-04)"
    assert selection_in_words(select_trials([row | {"failed": True}], "paper"), {1e-4}) == "no trial succeeded"


def test_what_is_missing_is_counted_within_a_task():
    rows = [{"task": task, "model": "m", "lr": lr, "seed": seed, "failed": False, "validation": {"score": 0.5}, "test": {"score": 0.4}}
            for task, lrs, seeds in (("wide", (1e-5, 1e-4), (0, 1, 2)), ("narrow", (5e-4,), (0,))) for lr in lrs for seed in seeds]
    narrow, wide = trial_table(rows[1:]).splitlines()[2:]
    assert narrow.endswith("| 1 | 0 | 0 |") and wide.endswith("| 3 | 0 | 1 |")


def test_a_file_that_is_no_row_is_named(grid):
    path = write(grid, 2e-05, 0, validation={})
    with pytest.raises(UserError, match=os.path.basename(path)):
        read_trials(grid)


def test_a_trial_that_is_there_twice_is_refused_and_never_counted_as_two_seeds(grid, tmp_path):
    """Two folders with the same trial, as after a change of --steps in another --out_dir."""
    again = write(str(tmp_path / "again"), 1e-04, 0, validation={"score": 0.5}, test={"score": 0.5})
    done = run_python(["report.py", grid, str(tmp_path / "again"), f"--to={tmp_path}/out"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "learning rate 0.0001 and seed 0" in done.stderr and again in done.stderr and "Give only one" in done.stderr
