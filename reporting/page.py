"""report.md: the page with all tables, figures and tests of a study, or of the paper."""
import numpy as np

from core.files import as_markdown
from reporting import stats, tables
from reporting.caveats import list_warnings
from reporting.output import MARK
from reporting.scores import PUBLISHED_FAMILIES, family_in_words, interval
from reporting.sections import sections

# {section: (heading, number of the first of the paper's four tables, 0 for none; its figures)}
SECTIONS = {
    "base": ("Objective, masking rate and size", 2,
             ("fig02_objectives_by_size", "fig03_masking_rate", "fig05_learning_rates")),
    "steps": ("Data efficiency", 6,
              ("fig04_steps", "fig04_tokens", "fig04_targets", "fig10_flops")),
    "shares": ("Two stages under a fixed budget", 10,
               ("fig06_share_of_clm", "fig07_masking_after_clm")),
    "continued": ("Continued pretraining", 14,
                  ("fig08_continued_bars", "fig09_continued_steps", "fig12_losses")),
    "others": ("Beyond the paper's tables", 0, ())}
CAPTIONS = {
    "fig02_objectives_by_size":
        "Figure 2: MLM at 40 % and CLM, by size. Bars do not begin at 0; the values stand in "
        "them.",
    "fig03_masking_rate":
        "Figure 3: the masking rate, a line per size.",
    "fig04_steps":
        "Figure 4: checkpoints before the learning rate decays, against steps.",
    "fig04_tokens":
        "Figure 4, against the tokens that were read.",
    "fig04_targets":
        "Figure 4, against supervised tokens: all for CLM, the masked ones for MLM.",
    "fig05_learning_rates":
        "Figure 5: how far single trials (dots) lie from their mean over learning rates from 1e-5 "
        "to 1e-4 and over seeds; bars are one standard deviation.",
    "fig06_share_of_clm":
        "Figure 6: the share of CLM under a fixed budget (the paper's Figure 11 has three "
        "shares at 1B).",
    "fig07_masking_after_clm":
        "Figure 7: how far scores (dots) lie from their mean over masking rates and seeds; bars "
        "are one standard deviation.",
    "fig08_continued_bars":
        "Figure 8: a finished model and its longest continuation with MLM. Bars do not begin at 0.",
    "fig09_continued_steps":
        "Figure 9: steps of MLM after a finished MLM or CLM model.",
    "fig10_flops":
        "Figure 10: Figure 4 against training FLOPs as we count them (logits at supervised positions "
        "only, half of attention under the causal mask). The paper counts by Hoffmann's formula, so "
        "its axis differs.",
    "fig12_losses":
        "Figure 12: losses of pretraining and continuation. Training losses are each phase's own: "
        "CLM's and MLM's are not on one scale. Validation losses are MLM's throughout."}

# ---- the page's explanations

ABOUT_THE_PAPER = """\
*Should We Still Pretrain Encoders with Masked Language Modeling?* (arXiv 2507.00994 v4): its
Tables 2 to 17, and the figures that follow from them. They are the target of a reproduction.
"""
ONLY_PLOTTED = """\
The paper published Figures 5, 7, 11 and 12 as plots without numbers. Its tables give one half of
Figure 7, MLM throughout, as one mean per masking rate, without single seeds. The other three
cannot be drawn from its tables. Figure 1, a scheme with parts of Figures 6 and 8, is not drawn.
"""
ABOUT_SCORES = """\
Scores are in percent, on test sets. A family's score is the mean of its tasks.

* **Rule paper**: each fine-tuning seed takes the learning rate of its own best validation score.
  Intervals are ± 1.96 s/√n.
* **Rule standard**: all seeds take one learning rate, of the best mean validation score.
  Intervals are ± t s/√n.

s is the sample standard deviation of n seeds.
"""
ABOUT_OUR_SCORES = """\
These are scores of the plan **{plan}** at its own scale, not of the paper's models. Names are the
paper's, and so are the steps in names. The last table says what was really trained.

Where a model has several pretraining seeds, the interval is over these, because pretraining runs
are independent: each seed is one value, its selected test score. With one pretraining seed the
interval is over fine-tuning seeds, as in the paper. It does not say how another pretraining run
would differ.

An interval of 1.96 s/√n covers the true mean in {coverage}. So the figures show our scores with
the t intervals of rule standard. Dots are the values that an interval is over. Where there are two
values, only the dots are drawn. A wide interval may run out of its panel.
"""
ABOUT_PAPER_SCORES = """\
The paper's intervals are the published ones, over five fine-tuning seeds of one pretraining run.
That they follow rule paper was checked for three models on MLDR. Under rule standard the same
intervals are widened to Student's t (x 1.416). The paper's family scores are recomputed from its
data sets. None is further than {deviation:.3f} from the printed average.
"""
ABOUT_TESTS = """\
**What was tested**: for each claim and task, two models that share pretraining seeds.

* *Over examples*: a model's score on a test example is the mean over the seeds of the learning
  rate that validation selected. The mean difference of the two models is tested with a two-sided
  sign-flip permutation test ({resamples:,} resamples), and with Holm's correction over all
  {tested} tests. Such a test does not see the randomness of pretraining.
* *Over pretraining seeds*: the difference of the scores in the tables, with a t interval where
  there are several seeds (not corrected for the number of claims).

*Confirmed*: both agree. *Confirmed for these checkpoints*: the examples separate the two models,
but pretraining seeds do not, or there is only one seed. In token classification the examples are
sentences with their macro F1, and its mean is not the entity F1 of the tables. Where the two
differences have opposite signs, nothing is confirmed and the verdict says so.
"""
ABOUT_LEARNING_RATES = """\
Test scores at each learning rate: means over all seeds and over the tasks that all models have.
"""
ABOUT_TRAINING = """\
Means over pretraining seeds, counted from the first step of the first ancestor.
"""
ABOUT_ROWS = """\
All rows are in [rows.jsonl](rows.jsonl), from which `python report.py` draws this page again.
"""


# ---- the page

def page(results, paper, tests, drawn):
    """The text of report.md.

    results: StudyResults, or None for a page of the paper alone; paper: PaperResults or None;
    tests: stats.paired_tests of the study; drawn: names of the figures that could be drawn
    """
    if results is None:
        blocks = [MARK, "# The paper's own tables and figures\n", ABOUT_THE_PAPER,
                  "## How to read it\n", how_to_read(None, paper)]
        blocks += section_blocks(paper, None, drawn)
        blocks += ["## What is not here\n", ONLY_PLOTTED]
        return "\n".join(blocks)

    has_shared_models = paper is not None and not set(results.names).isdisjoint(paper.names)
    blocks = [MARK, f"# Report: plan {as_markdown(results.study.plan)}\n",
              "## Warnings\n", warnings_list(results),
              "## How to read it\n", how_to_read(results, paper if has_shared_models else None),
              "## Does A beat B?\n", test_tables(tests, paper)]
    blocks += section_blocks(results, paper, drawn)
    blocks += ["## Learning rates\n", ABOUT_LEARNING_RATES, tables.lr_tables(results),
               "## What was trained\n", ABOUT_TRAINING, tables.models_table(results), ABOUT_ROWS]
    return "\n".join(blocks)


def warnings_list(results):
    """The warnings about a study as a Markdown list."""
    sentences = list_warnings(results.study, results)
    if not sentences:
        return "None.\n"
    return "\n".join(f"* {sentence}" for sentence in sentences) + "\n"


def how_to_read(results, paper):
    """What scores and intervals mean, of a study and of the paper; either may be None."""
    texts = [ABOUT_SCORES]
    if results is not None:
        cases = [f"{tables.coverage(n):.0f} of 100 cases at n = {n}" for n in (2, 3, 5)]
        plan = as_markdown(results.study.plan)
        texts.append(ABOUT_OUR_SCORES.format(plan=plan, coverage=", ".join(cases)))
    if paper is not None:
        texts.append(ABOUT_PAPER_SCORES.format(deviation=tables.largest_deviation(paper)))
    return "\n".join(texts)


def section_blocks(source, paper, drawn):
    """Heading, figures and tables of every section that has any."""
    blocks = []
    for section, names in sections(source.names).items():
        heading, first_number, figures = SECTIONS[section]
        pictures = []
        for figure in figures:
            if figure in drawn:
                caption = CAPTIONS[figure]
                pictures.append(f"![{caption}]({figure}.png)\n\n*{caption}*\n")
        # the paper's families come first, so a section's i-th table is the paper's i-th, too
        family_tables = []
        for i, family in enumerate(source.columns):
            words = family_in_words(family)
            if first_number and family in PUBLISHED_FAMILIES:
                title = f"Table {first_number + i}: {words} ({family})"
            else:
                title = f"{words[0].upper()}{words[1:]} ({family})"
            text = tables.family_table(source, names, family, paper)
            if text:
                family_tables += [f"### {title}\n", text]
        if pictures or family_tables:
            blocks += [f"## {heading}\n", *pictures, *family_tables]
    return blocks


# ---- the tests on the page

def test_tables(tests, paper):
    """The verdict on each ordering of the paper, and every single test."""
    if not tests:
        return "No claim of the paper has rows of both models.\n"
    verdicts = stats.summary(tests)
    orderings = []
    for number, text in stats.ORDERINGS.items():
        orderings.append([number, text, verdicts.get(number, "no rows")])
    n_tested = sum(test["p"] is not None for test in tests)
    header = ["", "better", "worse", "task", "difference ± t over pretraining seeds (n)",
              "examples", "± 1.96 s/√n over examples", "p", "Holm's p", "verdict",
              "the paper's, whole family"]
    return "\n".join([
        tables.markdown(["", "ordering of the paper", "here"], orderings),
        ABOUT_TESTS.format(resamples=stats.RESAMPLES, tested=n_tested),
        tables.markdown(header, [test_line(test, paper) for test in tests])])


def test_line(test, paper):
    """The cells of one test."""
    # over pretraining seeds
    by_seed = f"{np.mean(test['by_seed']):+.2f}"
    n_seeds = len(test["by_seed"])
    if n_seeds > 1:
        by_seed += f" ± {interval(test['by_seed'], 'standard'):.2f} ({n_seeds})"
    # over examples, or why there is no such test
    over_examples = test.get("why", "")
    if test["items"]:
        over_examples = f"{test['difference']:+.2f}"
        if test["half_width"] is not None:
            over_examples += f" ± {test['half_width']:.2f}"
    p = tables.NOTHING
    holm = tables.NOTHING
    if test["p"] is not None:
        p = f"{test['p']:.4f}"
        holm = f"{test['holm']:.4f}"
    task = f"{test['family']}: {as_markdown(test['task'])}"
    return [test["ordering"], test["better"], test["worse"], task, by_seed,
            test["items"] or tables.NOTHING, over_examples, p, holm, test["verdict"],
            published_difference(paper, test)]


def published_difference(paper, test):
    """The paper's difference of the two models in the family's score; "" if it lacks a model."""
    if paper is None:
        return ""
    columns = list(paper.columns[test["family"]])
    better = paper.score(test["better"], columns, "paper")
    worse = paper.score(test["worse"], columns, "paper")
    if better is None or worse is None:
        return ""
    return f"{better.mean - worse.mean:+.2f}"
