"""Runs and trials -> tables, figures and a page.

    inputs    what the arguments of report.py name
    read      runs, trials, studies, and an earlier report's rows
    sections  which models belong in one table
    scores    scores of trials and of the paper, with their intervals
    stats     the paper's claims and their tests
    tables    the tables
    caveats   the page's warnings: what is missing, failed or mixed
    figures   the figures
    page      the page they stand on
    output    the folder they are written to
"""
