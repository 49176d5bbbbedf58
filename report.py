"""Runs -> a table and a picture; trials -> tables with confidence intervals; a study -> the paper's tables, figures and tests.

    python report.py runs/demo/mlm runs/demo/clm runs/demo/clm_then_mlm --to=runs/demo
    python report.py STUDY --to=STUDY/report                   # a folder with study.json: report.md, its pictures and rows.jsonl
    python report.py STUDY/report --to=STUDY/report            # the same page again, from its own rows.jsonl
    python report.py results/paper.csv --to=results/paper      # what the paper published: the target

Of a run of train.py it reads config.json and log.jsonl; one that was branched from a trunk is shown with the trunk's steps
before it, so that all curves begin at step 0. Trials are every trials/<task>/lr<lr>_sd<seed>.json anywhere below the folders:
{"model", "task", "lr", "seed", "validation": {"score"}, "test": {"score"}}, scores from 0 to 1, or "failed": true. Retrieval rows
are told apart by the pool of documents that was searched, and have a second table with what else is known of their rankings.
A study's rows stand beside the paper's (results/paper.csv) where names match, and are never put on one scale with them.
"""
import json
import os
from dataclasses import dataclass

import matplotlib.pyplot as plt

from core.configurator import UserError, run
from core.files import ROOT
from reporting import figures as report_figures
from reporting import stats as report_stats
from reporting.page import MARK, page
from reporting.read import Study, lines_of, read_rows, read_run, read_study, read_trials
from reporting.scores import PaperResults, StudyResults
from reporting.tables import retrieval_table, table, trial_table

PAPER = os.path.join(ROOT, "results", "paper.csv")
SOFTWARE = "nanoEncoder report.py"          # in the pictures' metadata


@dataclass
class Config:
    args: tuple = ()
    # output
    to: str = "report"      # folder for the page, the pictures and rows.jsonl


# ---- the folder

def read(args):
    """-> run folders, Study, PaperResults or None. Raises UserError."""
    study, paper, folders, plain = Study(), None, [], {}
    for arg in args:
        if arg.endswith((".csv", ".jsonl")) and not os.path.isfile(arg):
            raise UserError(f"{arg} is no file")
        if arg.endswith(".csv"):
            paper = PaperResults(arg)
        elif arg.endswith(".jsonl"):
            study.take(read_rows(arg), arg)
        elif os.path.isfile(os.path.join(arg, "study.json")):
            study.take(read_study(arg), arg)
        else:
            found = read_trials(arg)
            log, rows = (os.path.isfile(os.path.join(arg, name)) for name in ("log.jsonl", "rows.jsonl"))
            if rows and not found and not log:
                study.take(read_rows(os.path.join(arg, "rows.jsonl")), arg)
                continue
            plain |= found                              # by path: each file once
            folders += [arg] * (log or not found)       # a folder that holds trials need not be a run of train.py
    study.trials += plain.values()
    return folders, study, paper


def is_ours(path, name):
    """Did report.py write this file? A user's own is never written over."""
    with open(path, "rb") as f:
        begin = f.read(4096)
    old = {"loss_curves.png": b"Matplotlib", "table.md": b"| run | steps |", "trials.md": b"| task | model |"}.get(name)
    marks = [SOFTWARE.encode(), MARK.encode(), b'{"what": "study"', *filter(None, [old])]
    return not begin or any(mark in begin for mark in marks)


def write(folder, texts, pictures):
    """Write {name: text} and {name: figure}, each whole. Raises UserError, writing nothing, where such a file is not ours."""
    os.makedirs(folder, exist_ok=True)
    for name in [*texts, *pictures]:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not is_ours(path, name):
            raise UserError(f"{path} was not written by report.py: choose another --to")
    for name, content in (texts | pictures).items():
        path = os.path.join(folder, name)
        if name in pictures:
            content.savefig(path + ".tmp", dpi=100, format="png", metadata={"Software": SOFTWARE})
            plt.close(content)
        else:
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                f.write(content)
        os.replace(path + ".tmp", path)


def main(c):
    if not c.args:
        raise UserError("which runs? python report.py RUN_DIR... --to=DIR")
    folders, study, paper = read(c.args)
    runs = [read_run(folder, study.notes) for folder in folders]
    for folder, r in zip(folders, runs):
        if not r["validation"] or not r["train"]:
            raise UserError(f"{folder} has no logged steps yet")
    texts, pictures = {"table.md": table(runs)} if runs else {}, {}
    plain = [r for r in study.trials if not r.get("name")]
    if plain:
        texts["trials.md"] = "\n".join(filter(None, (trial_table(plain), retrieval_table(plain))))
    for text in texts.values():
        print(text)
    if runs:
        pictures["loss_curves.png"] = report_figures.loss_curves(runs)
    if study.models or paper:
        ours = StudyResults(study) if study.models else None
        if ours:
            paper = paper or (PaperResults(PAPER) if os.path.isfile(PAPER) else None)
            study.tests = report_stats.paired_tests(ours, study.tests)
        found = {name: draw([s for s in (ours, paper) if s]) for name, draw in report_figures.FIGURES.items()}
        pictures |= {f"{name}.png": figure for name, figure in found.items() if figure}
        texts["report.md"] = page(ours, paper, study.tests, {name for name, figure in found.items() if figure})
    if study.trials or study.models:
        texts["rows.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines_of(study))
    for note in study.notes:
        print(f"warning: {note}")
    write(c.to, texts, pictures)
    print(", ".join(os.path.join(c.to, name) for name in [*texts, *pictures]))


if __name__ == "__main__":
    run(main, Config)
