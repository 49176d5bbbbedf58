"""The paper's numbers become its own tables and figures; the pages in results/ are what their commands write."""
import os
import re

import numpy as np
import pytest
from conftest import ROOT
from made_study import PAPER, draw

import model
from reporting import scores as report_scores
from reporting.output import is_own_file
from reporting.sections import sections
from reporting.stats import claims


def test_every_family_average_of_the_paper_follows_from_its_data_sets():
    paper = report_scores.PaperResults(PAPER)
    assert len(paper.names) == 46 and sum(len(v) for v in paper.columns.values()) == 12       # of 50 lines: two models stand in three groups of tables
    for name in paper.names:
        for family, columns in paper.columns.items():
            found = paper.score(name, list(columns), "paper")
            assert abs(found.mean - paper.printed_average(name, family)) < 0.01
            assert found.half_width == paper.cells[name, family, "average"].half_width
            assert paper.score(name, list(columns), "standard").half_width == pytest.approx(found.half_width * 2.776 / 1.96, rel=1e-3)


def test_the_papers_models_fall_into_the_papers_groups_of_tables():
    lines = [line.split(",") for line in open(PAPER).read().splitlines()[1:]]
    groups = {e: {re.sub(r" @(\d+)k", r"-\g<1>000", name.removesuffix(" (base)")) for experiment, name, *_ in lines if experiment == e}
              for e in ("BASE", "STEP", "PFS", "CPT")}
    found = sections(report_scores.PaperResults(PAPER).names)
    assert [set(part) for part in found.values()] == [*groups.values(), set()]


@pytest.mark.parametrize("other", ["610m-mlm40-dec42k-clm-64k", "610m-mlm40-dec42k-clm-62k-mlm40-64k", "610m-clm-10k-mlm40-dec42k-mlm40-64k"])
def test_only_mlm_after_a_model_of_one_objective_is_shown_as_mlm_for_22k_steps_more(other):
    """Figures 8 and 9 and the fifth ordering speak of MLM after MLM, or after CLM: another history is shown among the others."""
    names = ["610m-mlm40-42k", "610m-clm-42k", "610m-clm-dec42k-mlm40-64k", "610m-clm-10k-mlm40-42k"]
    found = sections([*names, other])
    assert set(found["continued"]) == {"610m-clm-42k", "610m-clm-dec42k-mlm40-64k"} and found["others"] == [other]
    assert not [claim for claim in claims([*names, other]) if claim.ordering == 5]


def test_the_papers_axes_are_its_tokens_and_the_flops_of_its_sizes():
    paper = report_scores.PaperResults(PAPER)
    assert paper.amount("610m-mlm40-42k-1000", "tokens") == 2_359_296_000 and paper.amount("610m-mlm40-42k-1000", "targets") == 943_718_400
    assert paper.amount("610m-clm-10k-mlm40-42k", "targets") == 2_359_296 * (10_000 + 0.4 * 32_000)
    for size, (body, head, attention) in report_scores.PAPER_GFLOPS.items():
        c = model.ModelConfig(**model.SIZES[size], vocab_size=128_256)
        weights = c.n_layer * (c.n_embd * (c.n_head + 2 * c.n_kv_head) * c.head_dim + c.n_head * c.head_dim * c.n_embd
                               + 3 * c.n_embd * c.n_ffn + 2 * c.n_embd) + c.n_embd
        want = np.array([6 * weights, 6 * c.vocab_size * c.n_embd, 12 * c.n_layer * c.n_head * c.head_dim * 1365]) / 1e9
        assert [body, head, attention] == pytest.approx(want, abs=6e-3)


def test_the_papers_page_in_the_repository_is_what_its_own_command_writes(tmp_path):
    draw(PAPER, to=str(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert text == open(os.path.join(ROOT, "results", "paper", "report.md")).read()
    assert "| 610m-clm-42k | 85.57 ± 0.34 | 89.88 ± 1.17 | 53.16 ± 0.42 | **76.20 ± 0.54** | 76.20 ± 0.76 |" in text
    assert [f"Table {n}:" in text for n in range(1, 19)] == [False, *[True] * 16, False]
    assert {int(n) for n in re.findall(r"\(fig(\d+)_", text)} == {2, 3, 4, 6, 7, 8, 9, 10} and "Figures 5, 7, 11 and 12" in text
    for name in re.findall(r"\((fig\w+\.png)\)", text):
        assert (tmp_path / name).is_file() and is_own_file(os.path.join(ROOT, "results", "paper", name))


def test_the_miniatures_page_in_the_repository_follows_from_its_rows(tmp_path):
    folder = os.path.join(ROOT, "results", "mini")
    draw(os.path.join(folder, "rows.jsonl"), to=str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([".lock", *os.listdir(folder)])
    for name in ("report.md", "rows.jsonl"):
        assert (tmp_path / name).read_text() == open(os.path.join(folder, name)).read()
