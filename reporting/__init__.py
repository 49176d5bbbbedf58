"""Runs and trials -> tables, figures and a page.

    read      what a report reads
    scores    scores, intervals and seeds
    stats     the paper's claims and their tests
    tables    the tables
    figures   the figures
    page      the page they stand on
"""
