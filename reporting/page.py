"""The report's page: its sections, captions and explanations."""
import numpy as np

from reporting import stats as report_stats
from reporting import tables as report_tables
from reporting.output import MARK
from reporting.scores import IN_WORDS, interval
from reporting.sections import sections

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
