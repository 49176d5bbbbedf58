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
import numpy as np

import report_figures
import report_stats
import report_tables
from configurator import UserError, run
from report_read import Study, lines_of, read_rows, read_run, read_study, read_trials
from report_scores import IN_WORDS, Ours, Paper, interval, sections
from report_tables import retrieval_table, table, trial_table

PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "paper.csv")
MARK = "<!-- written by nanoEncoder's report.py, which may write it again -->"
SOFTWARE = "nanoEncoder report.py"          # in the pictures' metadata


@dataclass
class Config:
    args: tuple = ()
    # output
    to: str = "report"      # folder for the page, the pictures and rows.jsonl


CAPTIONS = {
    "fig02_objectives_by_size": "Figure 2: MLM at 40 % and CLM, by size. Bars do not begin at 0; their values stand in them.",
    "fig03_masking_rate": "Figure 3: the masking rate, a line a size.",
    "fig04_steps": "Figure 4: undecayed checkpoints of pretraining, against steps.",
    "fig04_tokens": "Figure 4 against the tokens that were read.",
    "fig04_targets": "Figure 4 against supervised tokens: all for CLM, the masked ones for MLM.",
    "fig05_learning_rates": "Figure 5: how far single trials (dots) lie from their mean over learning rates from 1e-5 to 1e-4 and "
                            "over seeds; bars are one standard deviation.",
    "fig06_share_of_clm": "Figure 6: the share of CLM under a fixed budget (the paper's Figure 11 is the same at 1B).",
    "fig07_masking_after_clm": "Figure 7: how far scores (dots) lie from their mean over masking rates and seeds; bars are one "
                               "standard deviation.",
    "fig08_continued_bars": "Figure 8: a finished model and its longest continuation with MLM. Bars do not begin at 0.",
    "fig09_continued_steps": "Figure 9: steps of MLM after a finished MLM or CLM model.",
    "fig10_flops": "Figure 10: Figure 4 against training FLOPs (logits at supervised positions only, half of attention under the "
                   "causal mask).",
    "fig12_losses": "Figure 12: losses of pretraining and continuation. Training losses are each phase's own: CLM's and MLM's are "
                    "not on one scale. Validation losses are MLM's throughout."}
ONLY_PLOTTED = ("The paper published Figures 5, 7, 11 and 12 as plots without numbers. Of Figure 7 its tables give one half, MLM "
                "throughout, as one mean a masking rate: seeds are not in it. The other three cannot be drawn from its tables.")


# ---- the page of a study, or of the paper

SCORES = """\
Scores are in percent, on test sets. A family's score is the mean of its tasks. **Rule paper**: each fine-tuning seed takes the
learning rate of its own best validation score, ± 1.96 s/√n. **Rule standard**: one learning rate, of the best mean validation
score, ± t s/√n. s is the sample standard deviation of n seeds.
"""
OURS = """\
These are rows of the plan **{plan}** at its own scale, not the paper's models. Names, and the steps in names, are the paper's;
what was trained stands in the last table. Where a model has several pretraining seeds, each is one value, its selected test
score, and the interval is over pretraining seeds: there, runs are independent. With one pretraining seed it is over fine-tuning
seeds, as in the paper, and knows nothing of another pretraining run. An interval of 1.96 s/√n covers the true mean in
{coverage}, so the pictures of ours have the t intervals of rule standard. Their dots are the values that an interval is over;
of two values only the dots are drawn, and a wide interval may run out of its panel.
"""
PAPERS = """\
The paper's intervals are the published ones, over five fine-tuning seeds of one pretraining run (rule paper); under rule
standard the same are widened to Student's t (x 1.416). Its family scores are recomputed from its data sets; none is further
than {deviation:.3f} from the printed average.
"""
TESTS = """\
**What was tested**: for each claim and task, two models that share pretraining seeds. Over examples: the differences of their
scores on every test example, each the mean over the seeds of the learning rate that validation selected; a sign-flip
permutation test of their mean, two-sided, {resamples:,} resamples; Holm's correction over all {tested} of them. Such a test
does not see the randomness of pretraining. So the difference of the tables' scores by pretraining seed stands before it, with a
t interval of its own where there are several (not corrected for the number of claims). *Confirmed*: both agree. *Confirmed for
these checkpoints*: the examples separate the two; pretraining seeds do not, or there is only one. Token classification's
examples are sentences with their macro F1, whose mean is not the entity F1 of the tables: where the two differences have
opposite signs, nothing is confirmed and the verdict says so.
"""
ABOUT = """\
*Should We Still Pretrain Encoders with Masked Language Modeling?* (arXiv 2507.00994 v4), its Tables 2 to 17 and the figures
that follow from them: the target of a reproduction.
"""


def how_to_read(ours, paper):
    texts = [SCORES]
    if ours:
        coverage = ", ".join(f"{report_tables.coverage(n):.0f} of 100 at n = {n}" for n in (2, 3, 5))
        texts.append(OURS.format(plan=ours.study.plan, coverage=coverage))
    if paper:
        texts.append(PAPERS.format(deviation=report_tables.deviation(paper)))
    return "\n".join(texts)


def of_tests(tests, paper):
    """Markdown: verdicts by ordering, and every test."""
    if not tests:
        return "No claim of the paper has rows of both models.\n"
    verdicts = report_stats.summary(tests)
    orderings = [[i, text, verdicts.get(i, "no rows")] for i, text in report_stats.ORDERINGS.items()]
    lines = []
    for t in tests:
        by_seed = f"{np.mean(t['by_seed']):+.2f}"
        if len(t["by_seed"]) > 1:
            by_seed += f" ± {interval(t['by_seed'], 'standard'):.2f} ({len(t['by_seed'])})"
        examples = t.get("why", "")
        if t["items"]:
            examples = f"{t['difference']:+.2f}" + (f" ± {t['half_width']:.2f}" if t["half_width"] is not None else "")
        ps = ("–", "–") if t["p"] is None else (f"{t['p']:.4f}", f"{t['holm']:.4f}")
        lines.append([t["ordering"], t["better"], t["worse"], f"{t['family']}: {t['task']}", by_seed, t["items"] or "–", examples,
                      *ps, t["verdict"], published(paper, t)])
    return "\n".join((
        report_tables.markdown(["", "ordering of the paper", "here"], orderings),
        TESTS.format(resamples=report_stats.RESAMPLES, tested=sum(t["p"] is not None for t in tests)),
        report_tables.markdown(["", "better", "worse", "task", "difference ± t over pretraining seeds (n)", "examples",
                                "± 1.96 s/√n over examples", "p", "Holm's p", "verdict", "the paper's, whole family"], lines)))


def published(paper, test):
    """The paper's difference of the same two models in the family's score."""
    pair = [paper and paper.score(test[side], list(paper.columns[test["family"]]), "paper") for side in ("better", "worse")]
    return f"{pair[0].mean - pair[1].mean:+.2f}" if all(pair) else ""


def page(ours, paper, tests, drawn):
    """report.md. drawn: names of the figures there are."""
    source = ours or paper
    parts = [MARK, f"# Report: plan {ours.study.plan}\n" if ours else "# The paper's own tables and figures\n"]
    if ours:
        found = report_tables.warnings(ours.study, ours)
        parts += ["## Warnings\n", "\n".join(f"* {text}" for text in found) + "\n" if found else "None.\n"]
    else:
        parts.append(ABOUT)
    beside = paper if not ours or paper and set(ours.names) & set(paper.names) else None
    parts += ["## How to read it\n", how_to_read(ours, beside)]
    if ours:
        parts += ["## Does A beat B?\n", of_tests(tests, paper)]
    groups = sections(source.names)
    for section, (heading, number, figures) in report_tables.SECTIONS.items():
        tables = [(f"Table {number + i}: {words} ({family})" if number else f"{words[0].upper()}{words[1:]} ({family})",
                   report_tables.table_of(source, groups[section], family, paper if ours else None))
                  for i, (family, words) in enumerate(IN_WORDS.items())]
        pictures = [f"![{CAPTIONS[name]}]({name}.png)\n\n*{CAPTIONS[name]}*\n" for name in figures if name in drawn]
        if pictures or any(text for _, text in tables):
            parts += [f"## {heading}\n", *pictures]
            parts += [part for title, text in tables if text for part in (f"### {title}\n", text)]
    if ours:
        parts += ["## Learning rates\n", "Test scores at each learning rate: means over all seeds and over the tasks that "
                  "all models have.\n", report_tables.lr_table(ours), "## What was trained\n",
                  "Means over pretraining seeds, counted from the first ancestor's first step.\n", report_tables.models_table(ours),
                  "All rows: [rows.jsonl](rows.jsonl), from which `python report.py` draws this page again.\n"]
    else:
        parts += ["## What is not here\n", ONLY_PLOTTED + "\n"]
    return "\n".join(parts)


# ---- the folder

def read(args):
    """-> run folders, Study, Paper or None. Raises UserError."""
    study, paper, folders, plain = Study(), None, [], {}
    for arg in args:
        if arg.endswith((".csv", ".jsonl")) and not os.path.isfile(arg):
            raise UserError(f"{arg} is no file")
        if arg.endswith(".csv"):
            paper = Paper(arg)
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
        ours = Ours(study) if study.models else None
        if ours:
            paper = paper or (Paper(PAPER) if os.path.isfile(PAPER) else None)
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
