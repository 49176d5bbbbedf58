"""Whatever report.py and study.py are given to read: damaged lines are counted and named, all else that is wrong is one line."""
import json
import os
import random
import shutil

import made_study as made
import matplotlib.pyplot as plt
import pytest
from conftest import ROOT
from made_study import PAPER
from test_bad_input import WAYS, damage, run_main

import report
from core.configurator import UserError
from experiments.recipes import parse
from reporting.inputs import read_inputs
from reporting.read import read_run, report_rows
from reporting.scores import PaperResults

RUN = os.path.join(ROOT, "tests", "data", "old", "run")


@pytest.fixture
def run(tmp_path):
    """A run of 20 steps with a log: run(name, **changes of its config.json) -> folder"""
    def copy(name="run", **changes):
        folder = str(tmp_path / name)
        shutil.copytree(RUN, folder)
        with open(f"{folder}/config.json") as f:
            config = json.load(f)
        made.dump(f"{folder}/config.json", config | changes)
        return folder
    return copy


@pytest.mark.parametrize("line, says", [
    (b"", "is not JSON"), (b"\0" * 200, "is not JSON"), (b'{"step": 5, "loss": ', "is not JSON"), (b"\xff\xfe", "not UTF-8"), (b"[7]", "the content is a list"),
    (b'{"step": 5, "loss": "low", "tokens": 1, "phase": "clm"}', "'loss' is \"low\", not a number"), (b'{"step": 5, "loss": 1.0}', "has no 'tokens'"),
    (b'{"step": 5, "val_mlm_loss": 1.0, "tokens": 1}', "has no 'val_clm_loss'"), (b'{"loss": 1e999999, "step": 1e9}', ""), (b'{"step": 5, "tokens": 1' + b"0" * 400 + b"}", "")])
def test_a_damaged_line_of_a_log_is_left_out_and_named(run, line, says):
    folder = run()
    path = f"{folder}/log.jsonl"
    lines = open(path, "rb").read().split(b"\n")
    open(path, "wb").write(b"\n".join([*lines[:5], line, *lines[5:]]))
    notes = []
    found, whole = read_run(folder, notes), read_run(RUN)
    assert (found["train"], found["validation"]) == (whole["train"], whole["validation"])
    if line and says:
        assert len(notes) == 1 and notes[0].startswith(f"{path}: a line was left out (line 6") and says in notes[0]


def test_a_run_that_comes_from_itself_is_refused_however_long_the_way(run, tmp_path):
    folders = [run(name, start_step=5, parent=str(tmp_path / parent / "step_0000005")) for name, parent in (("a", "b"), ("b", "c"), ("c", "a"))]
    os.symlink(folders[0], tmp_path / "link")
    for folder in (*folders, str(tmp_path / "link"), run("d", start_step=5, parent=str(tmp_path / "d" / "step_0000005"))):
        with pytest.raises(UserError, match=r"comes from itself: look at 'parent' in its config\.json"):
            read_inputs([folder])


def test_a_study_whose_run_continues_itself_is_refused(tmp_path):
    root = made.write(str(tmp_path), names=["610m-clm-42k", "610m-clm-dec42k-mlm40-44k"], tasks=())
    path = f"{root}/610m-clm-42k/config.json"
    made.dump(path, json.load(open(path)) | {"parent": os.path.join(root, made.folder_of("610m-clm-dec42k-mlm40-44k"))})
    with pytest.raises(UserError, match="comes from itself"):
        read_inputs([root])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "~", "~root"])
def test_a_folder_may_be_called_like_a_file(run, tmp_path, monkeypatch, name):
    run(name)
    monkeypatch.chdir(tmp_path)
    assert [r["name"] for r in read_inputs([name]).runs] == [name]


def test_a_path_may_begin_with_the_home_folder(run, tmp_path, monkeypatch):
    run("run")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [r["name"] for r in read_inputs(["~/run"]).runs] == ["run"]


def test_every_damage_to_every_file_of_a_study_is_one_line(tmp_path, monkeypatch):
    """study.json, states, logs, configs, trials and their examples, rows.jsonl and a table of published results."""
    names = ["610m-clm-42k", "610m-mlm40-42k", "610m-clm-dec42k-mlm40-44k", "610m-clm-42k-1000"]
    root = made.write(str(tmp_path / "whole"), names=names, tasks=("sst2", "squad_retrieval"), lrs=(5e-5,), seeds=(0, 1))
    monkeypatch.setattr(report, "write_report", lambda *_: plt.close("all"))
    monkeypatch.setattr(report, "FIGURES", {name: report.FIGURES[name] for name in ("fig12_losses",)})
    study = read_inputs([root]).study
    os.makedirs(f"{root}/report", exist_ok=True)
    with open(f"{root}/report/rows.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in report_rows(study))
    shutil.copyfile(PAPER, f"{root}/report/paper.csv")
    checkpoint = made.folder_of("610m-clm-42k")
    files = ["study.json", f"{checkpoint}/state.json", "610m-clm-42k/config.json", "610m-clm-42k/log.jsonl", "610m-clm-dec42k-mlm40-44k/config.json",
             f"{checkpoint}/trials/sst2/lr5e-05_sd0.json", f"{checkpoint}/trials/sst2/lr5e-05_sd0.npz", "report/rows.jsonl", "report/paper.csv"]
    cases = [(file, way, seed) for file in files for way in WAYS for seed in range(4 if way.startswith(("a key", "a byte", "truncated")) else 1)]
    random.Random(3).shuffle(cases)
    wrong = []
    n_cases = len(cases) if os.environ.get("ALL_CASES") else 60
    for file, way, seed in cases[:n_cases]:
        path = os.path.join(root, file)
        content = open(path, "rb").read()
        if damage(path, way, random.Random(f"{file} {way} {seed}")):
            arg = path if file.startswith("report/") else root
            problem, _ = run_main(report.main, report.Config, [arg, f"--to={tmp_path}/out"])
            if problem:
                wrong.append(f"{file}, {way} ({seed}): {problem}")
        if os.path.isdir(path):
            os.rmdir(path)
        open(path, "wb").write(content)
    assert wrong == [], "\n" + "\n".join(wrong)


@pytest.mark.parametrize("content, says", [
    (b"\xff\xfe\0", "cannot be read after line 1"), (b"HEAD\nBASE,610m-clm-42k,SC,MNLI,\xff,0.1\n", "cannot be read after line"),
    (b"HEAD\nBASE,610m-clm-42k,SC,MNLI,nan,0.1\n", "line 2 is not a published result"), (b"HEAD\nBASE,610m-clm-42k,SC,,80,0.1\n", "line 2 is not"),
    (b'HEAD\nBASE,610m-clm-42k,SC,"' + b"x" * 200_000 + b'",80,0.1\n', "cannot be read after line 1")])
def test_a_table_that_cannot_be_read_is_named(tmp_path, content, says):
    path = tmp_path / "a.csv"
    path.write_bytes(content.replace(b"HEAD", b"experiment,model,family,dataset,mean,ci95"))
    with pytest.raises(UserError, match=says):
        PaperResults(str(path))


def test_a_table_that_a_spreadsheet_saved_is_the_same(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + open(PAPER, "rb").read().replace(b"\n", b"\r\n"))
    assert PaperResults(str(path)).cells == PaperResults(PAPER).cells


@pytest.mark.parametrize("name", ["610m-alt1-clm-mlm40-999999k", "610m-clm-" + "9" * 5000, "610m-clm-42k-seed" + "9" * 5000, "610m-clm-42k-" + "9" * 5000])
def test_a_name_of_very_many_steps_is_refused_at_once(name):
    with pytest.raises(UserError, match="is not a model of a study"):
        parse(name)
