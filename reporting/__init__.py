"""Runs and trials -> tables, figures and a page.

    inputs        what the arguments of report.py hold
    read          runs, trials, studies, and an earlier report's rows
    sections      which models belong in one table
    scores        scores of trials and of the paper, with their intervals
    stats         the paper's claims and their tests
    tables        the tables
    caveats       the page's warnings: what is missing, failed or mixed
    panels        what the figures share: colours, panels, legends, bars and lines
    figures       the paper's figures, drawn from a study and from the paper
    loss_curves   the loss curves of runs
    page          report.md, the page with the tables and figures
    output        the folder that a report is written to
"""
import os

# A notebook's or a desktop's way to show pictures does not work everywhere. A report only writes
# them to files. matplotlib reads this variable as it is imported.
os.environ["MPLBACKEND"] = "Agg"
