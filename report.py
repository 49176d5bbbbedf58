"""Tables, figures and tests from runs, trials and studies.

    python report.py runs/demo/mlm runs/demo/clm runs/demo/clm_then_mlm --to=runs/demo
    python report.py RUN --to=RUN/report                    # a run's trials: scores with intervals
    python report.py STUDY --to=STUDY/report                # a study: report.md and its figures
    python report.py STUDY/report --to=STUDY/report         # the same page, from its rows.jsonl
    python report.py results/paper.csv --to=results/paper   # what the paper published: the target

Runs of train.py give a table and their loss curves (from config.json and log.jsonl). A run that was
branched from a trunk is shown with the trunk's steps before it, so that all curves begin at step 0.

Trials are all files trials/<task>/lr<lr>_sd<seed>.json below the folders, with {"model", "task",
"lr", "seed", "validation": {"score"}, "test": {"score"}}, scores from 0 to 1, or "failed": true.
They give a table of scores with confidence intervals. A second table says more about the rankings
of retrieval trials. There each pool of searched documents is a task of its own.

A study gives the paper's tables, figures and tests of its claims. Its scores stand beside the
paper's (results/paper.csv) where names match. In figures each has a row of panels of its own.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import json
import os
from dataclasses import dataclass

from core.configurator import Path, UserError, run
from core.files import ROOT
from reporting.figures import FIGURES
from reporting.inputs import read_inputs
from reporting.loss_curves import loss_curves
from reporting.output import write_report
from reporting.page import page
from reporting.read import report_rows
from reporting.scores import PaperResults, StudyResults
from reporting.stats import paired_tests
from reporting.tables import retrieval_table, run_table, trial_table

PAPER = os.path.join(ROOT, "results", "paper.csv")


@dataclass
class Config:
    args: tuple = ()
    # output
    to: Path = "report"     # folder for the page, the pictures and rows.jsonl


def study_page(study, paper):
    """The page and the figures of a study, of the paper, or of both side by side.

    Replaces study.tests by the tests that the page shows.
    -> the text of report.md, {file name: matplotlib figure}
    """
    # a study is shown beside the paper, whether or not an argument named the paper's file
    results = None
    if study.models:
        results = StudyResults(study)
        study.tests = paired_tests(results, study.tests)
        if paper is None and os.path.isfile(PAPER):
            paper = PaperResults(PAPER)
    sources = [source for source in (results, paper) if source is not None]

    # the page has those figures that can be drawn from these sources
    figures = {}
    for name, draw in FIGURES.items():
        figure = draw(sources)
        if figure is not None:
            figures[name] = figure
    text = page(results, paper, study.tests, figures.keys())
    return text, {f"{name}.png": figure for name, figure in figures.items()}


def main(c):
    if not c.args:
        raise UserError("which runs? python report.py RUN_DIR... --to=DIR")
    inputs = read_inputs(c.args)
    study = inputs.study
    texts = {}
    figures = {}

    # runs: a table and the loss curves
    if inputs.runs:
        texts["table.md"] = run_table(inputs.runs)
        figures["loss_curves.png"] = loss_curves(inputs.runs)

    # trials that belong to no study: scores, and rankings where there are any
    trials = [row for row in study.trials if not row.get("name")]
    if trials:
        tables = [trial_table(trials), retrieval_table(trials)]
        texts["trials.md"] = "\n".join(table for table in tables if table)
    # a study, or the paper: the page with all tables and figures
    if study.models or inputs.paper:
        page_text, page_figures = study_page(study, inputs.paper)
        texts["report.md"] = page_text
        figures |= page_figures

    # everything that was read, from which the same report can be drawn again
    if study.trials or study.models:
        texts["rows.jsonl"] = "".join(json.dumps(row) + "\n" for row in report_rows(study))

    write_report(c.to, texts, figures)
    for name in ("table.md", "trials.md"):
        if name in texts:
            print(texts[name])
    for note in study.notes:
        print(f"warning: {note}")
    print(f"the report is in {os.path.abspath(c.to)}: {', '.join([*texts, *figures])}")


if __name__ == "__main__":
    run(main, Config)
