"""Runs and trials -> tables, figures and a page.

    read      what a report reads
    sections  which models belong in one table
    scores    scores of trials and of the paper, with their intervals
    stats     the paper's claims and their tests
    tables    the tables
    figures   the figures
    page      the page they stand on
"""
