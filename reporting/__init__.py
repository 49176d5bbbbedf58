"""Runs and trials -> tables, figures and a page.

    inputs        what the arguments of report.py name
    read          runs, trials, studies, and an earlier report's rows
    sections      which models belong in one table
    scores        scores of trials and of the paper, with their intervals
    stats         the paper's claims and their tests
    tables        the tables
    caveats       the page's warnings: what is missing, failed or mixed
    panels        what the figures share: colours, panels, legends, bars and lines
    figures       the paper's figures, of a study or of the paper
    loss_curves   the loss curves of runs
    page          the page that tables and figures stand on
    output        the folder they are written to
"""
