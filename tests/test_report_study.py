"""A study's rows become the paper's tables, figures and tests; whatever is wrong with them stands on top of the page or is refused."""
import json
import os
import re
import shutil

import made_study as made
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import run_python
from made_study import PAPER, draw
from scipy import stats
from test_report import OFFICIAL

from core.configurator import UserError
from reporting import figures as report_figures
from reporting import read as report_read
from reporting import scores as report_scores
from reporting import stats as report_stats
from reporting import tables as report_tables
from reporting.inputs import read_inputs
from reporting.output import MARK, is_own_file, write_report
from reporting.page import page
from tasks import registry
from tasks.sequence_classification import SequenceClassification


def read(folder):
    """-> StudyRecord, StudyResults"""
    study = read_inputs([str(folder)]).study
    return study, report_scores.StudyResults(study)


def page_of(folder, drawn=()):
    """The page of a study's folder or rows.jsonl, without drawing."""
    study, ours = read(folder)
    study.tests = report_stats.paired_tests(ours, study.tests)
    return page(ours, report_scores.PaperResults(PAPER), study.tests, drawn), study


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of every kind of model the page knows, 32 of them, and its report. -> study's folder, report's folder"""
    root = made.write(str(tmp_path_factory.mktemp("study")))
    draw(root, to=f"{root}/report")
    return root, f"{root}/report"


@pytest.fixture
def small(tmp_path):
    """Two models on two tasks: small(**changes) -> folder"""
    def build(where="s", **changes):
        return made.write(str(tmp_path / where), **({"names": made.BOTH, "tasks": ("sst2", "squad_retrieval")} | changes))
    return build


def row_of(root, name, task="sst2", lr=5e-5, seed=0):
    return os.path.join(root, made.folder_of(name), "trials", task, f"lr{lr:.0e}_sd{seed}.json")


def change(path, **changes):
    with open(path) as f:
        row = json.load(f)
    made.dump(path, row | changes)


# ---- a study

def test_the_official_rows_of_a_model_give_its_published_number_in_a_study(tmp_path):
    root = made.write(str(tmp_path), names=["610m-clm-42k"], tasks=())
    for lr, pairs in OFFICIAL.items():
        for seed, (validation, test) in enumerate(pairs):
            path = os.path.join(root, made.folder_of("610m-clm-42k"), "trials", "mldr_en", f"lr{lr:.0e}_sd{seed}.json")
            made.dump(path, {"model": "m", "task": "mldr_en", "kind": "retrieval", "lr": lr, "seed": seed,
                             "validation": {"score": validation}, "test": {"score": test}})
    text, _ = page_of(root)
    assert "| 610m-clm-42k | paper | 5 fine-tuning | 53.16 ± 0.42 | **53.16 ± 0.42** | 53.16 ± 0.42 | **76.20 ± 0.54** |" in text
    assert "| 610m-clm-42k | standard | 5 fine-tuning | 53.14 ± 0.56 |" in text


def test_a_study_has_all_tables_and_all_figures_and_ours_beside_the_papers(whole):
    root, out = whole
    text = open(f"{out}/report.md").read()
    assert [f"Table {n}:" in text for n in range(1, 19)] == [False, *[True] * 16, False] and "## Beyond the paper's tables" in text
    assert set(re.findall(r"\((fig\w+)\.png\)", text)) == set(report_figures.FIGURES)
    assert {int(name[3:5]) for name in report_figures.FIGURES} == {*range(2, 11), 12} and len(report_figures.FIGURES) == 12
    others = text.split("## Beyond the paper's tables")[1].split("## Learning rates")[0]
    assert set(re.findall(r"^\| (610m\S+)", others, re.M)) == {"610m-clm-40k-mlm20-42k", "610m-clm-40k-mlm40-42k", "610m-mntp40-42k"}
    for name in report_figures.FIGURES:
        assert os.path.isfile(f"{out}/{name}.png")
    assert "plan **toy** at its own scale, not of the paper's models" in text
    rows = [json.load(open(row_of(root, "610m-mlm20-42k", task, lr, seed))) | {"failed": False}
            for task in ("sst2", "sotu_era") for lr in made.LRS for seed in made.SEEDS]
    for rule, factor in (("paper", 1.96), ("standard", 12.706)):
        found = [report_scores.select_trials([r for r in rows if r["task"] == task], rule) for task in ("sst2", "sotu_era")]
        cells = [f"{100 * f.mean:.2f} ± {100 * f.half_width:.2f}" for f in found]
        by_seed = [50 * (found[0].rows[s]["test"]["score"] + found[1].rows[s]["test"]["score"]) for s in (0, 1)]
        both = f"**{np.mean(by_seed):.2f} ± {factor * abs(by_seed[0] - by_seed[1]) / 2:.2f}**"
        assert f"| 610m-mlm20-42k | {rule} | 2 fine-tuning | {cells[0]} | {cells[1]} | {both} | 92.61 ± " in text


def test_the_command_writes_a_page_with_pictures(small):
    root = small()
    done = run_python(["report.py", root, f"--to={root}/report"])
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    pictures = re.findall(r"\((fig\w+\.png)\)", open(f"{root}/report/report.md").read())
    assert {p[:5] for p in pictures} == {"fig02", "fig05"}
    for name in pictures:
        assert open(f"{root}/report/{name}", "rb").read(4) == b"\x89PNG" and is_own_file(f"{root}/report/{name}")


def test_a_report_drawn_from_its_own_rows_is_the_same(whole, tmp_path):
    _, out = whole
    text, study = page_of(out, set(report_figures.FIGURES))
    assert text == open(f"{out}/report.md").read()
    assert "".join(json.dumps(line) + "\n" for line in report_read.report_rows(study)) == open(f"{out}/rows.jsonl").read()
    ours = report_scores.StudyResults(study)
    assert all(plt.close(draw([ours])) is None for name, draw in report_figures.FIGURES.items() if name[3:5] in ("05", "12"))
    assert len(open(f"{out}/rows.jsonl").read().splitlines()) > 900 and "train_loss" not in open(f"{out}/rows.jsonl").read()


def test_axes_count_from_the_first_ancestor(whole):
    study, ours = read(whole[0])
    assert ours.amount("610m-mlm40-42k", "steps") == 840 and ours.amount("610m-clm-dec42k-mlm40-64k", "steps") == 1280
    assert ours.amount("610m-clm-42k-1000", "targets") == 20 * made.PER_STEP == ours.amount("610m-mlm40-42k-1000", "targets") / 0.4
    assert report_figures.added_steps(ours, "610m-clm-dec42k-mlm40-64k") == 440 and report_figures.added_steps(ours, "610m-clm-42k") == 0
    curve = study.models["610m-clm-dec42k-mlm40-64k"]["curve"]
    steps, phases = [r[0] for r in curve["train"]], [r[2] for r in curve["train"]]
    assert steps == sorted(steps) and steps[0] < 10 and steps[-1] > 1270 and len(steps) <= 200
    assert phases.index("mlm") == sum(s <= 840 for s in steps) and set(phases) == {"clm", "mlm"}


def test_pretraining_seeds_are_the_values_that_an_interval_is_over(whole):
    _, ours = read(whole[0])
    for rule, quantile in (("paper", 1.96), ("standard", stats.t.ppf(0.975, 2))):
        found = ours.score("610m-clm-42k", ["sst2"], rule)
        means = []
        for name in ("610m-clm-42k", "610m-clm-42k-seed43", "610m-clm-42k-seed44"):
            rows = [json.load(open(row_of(whole[0], name, lr=lr, seed=s))) for lr in made.LRS for s in made.SEEDS]
            means.append(100 * report_scores.select_trials(rows, rule).mean)
        assert found.values == pytest.approx(means) and (found.over, found.n, found.fine_tuned) == ("pretraining", 3, (2, 2))
        assert found.mean == pytest.approx(np.mean(means)) and found.half_width == pytest.approx(quantile * np.std(means, ddof=1) / 3 ** 0.5)
    assert report_tables.seeds_in_words(found) == "3 pretraining (2 fine-tuning each)"
    one = ours.score("610m-mlm20-42k", ["sst2"], "standard")
    assert (one.over, one.n) == ("fine-tuning", 2)


def test_a_cell_of_other_seeds_than_its_line_says_so(small):
    root = small(names=[*made.BOTH, "610m-clm-42k-seed43"], tasks=("sst2", "sotu_era"))
    for lr in made.LRS:
        for seed in made.SEEDS:
            os.remove(row_of(root, "610m-clm-42k-seed43", "sotu_era", lr, seed))
    line = next(line for line in page_of(root)[0].splitlines() if line.startswith("| 610m-clm-42k | standard"))
    assert "| 2 fine-tuning |" in line and line.count("(2 pretraining)") == 1


def test_a_task_that_some_models_lack_is_shown_but_not_averaged(small):
    root = small(tasks=("sst2", "sotu_era"))
    for lr in made.LRS:
        for seed in made.SEEDS:
            os.remove(row_of(root, made.BOTH[0], "sotu_era", lr, seed))
    text, _ = page_of(root)
    assert "SC is the mean of sst2 (left out, because not every model here has it: sotu_era)." in text
    cells = next(line for line in text.splitlines() if line.startswith("| 610m-mlm40-42k | standard")).split(" | ")
    assert cells[5] == f"**{cells[3]}**" != f"**{cells[4]}**"


# ---- statistics

def test_holms_correction_by_hand():
    assert report_stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])       # 0.005 x 4, 0.01 x 3, 0.03 x 2, max
    assert report_stats.holm([0.5, 0.9]) == [1.0, 1.0] and report_stats.holm([]) == []


def test_sign_flips_agree_with_scipy_and_with_each_other():
    rng = np.random.default_rng(3)
    for d in (rng.normal(0.5, 1, 11), np.array([1, 1, 0, -1, 1, 0, 1, 1, 0.0])):
        want = stats.permutation_test((d, np.zeros(len(d))), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf)
        assert report_stats.sign_flip(d) == pytest.approx(want.pvalue, abs=1e-12)
        assert report_stats.sign_flip(d, resamples=400) == pytest.approx(want.pvalue, abs=0.06)          # random signs
    many = rng.normal(0.04, 1, 3000)
    assert report_stats.sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)
    assert report_stats.sign_flip(many + 1) == 1 / 10_000 and report_stats.sign_flip([0.0, 0.0]) == 1.0


def test_a_claim_is_confirmed_by_examples_and_pretraining_seeds_both(small):
    def ability(recipe, kind, gap=0.2):
        return 0.5 + gap * (recipe.stages[0][0] == "mlm40")
    three = [*made.BOTH, *(f"{n}-seed{s}" for n in made.BOTH for s in (43, 44))]
    for names, wanted, p in ((three, "confirmed", ability), (made.BOTH, "confirmed for these checkpoints", ability),
                             (three, "the other way round", lambda r, k: ability(r, k, -0.2)), (three, "not separated", lambda r, k: 0.5)):
        root = small(wanted.replace(" ", "") + str(len(names)), names=names, tasks=("sst2",), ability=p)
        text, study = page_of(root)
        test, = study.tests
        assert (test["ordering"], test["better"], test["verdict"]) == (3, "610m-mlm40-42k", wanted)
        assert f"| 3 | {report_stats.ORDERINGS[3]} | {wanted} (1 of 1) |" in text and "| no rows |" in text
        assert test["items"] == made.ITEMS and test["difference"] == pytest.approx(np.mean(test["by_seed"]), abs=0.1)


def test_examples_that_contradict_the_tasks_own_score_confirm_nothing():
    test = {"p": 0.001, "holm": 0.01, "difference": 1.2, "by_seed": [-8.0]}       # entity F1 fell, the mean of sentences' macro F1 rose
    assert report_stats.verdict(test) == "examples and score disagree"
    assert report_stats.verdict(test | {"by_seed": [8.0]}) == "confirmed for these checkpoints"


def test_where_examples_are_missing_or_others_it_says_so(small):
    root = small(tasks=("sst2",), names=[*made.BOTH, *(f"{n}-seed43" for n in made.BOTH)])
    for lr in made.LRS:
        for seed in made.SEEDS:
            change(row_of(root, made.BOTH[0], lr=lr, seed=seed), data="of another version")
    _, study = page_of(root)
    assert study.tests[0]["why"] == "pretraining seeds of different test sets" and study.tests[0]["p"] is None
    root = small("t", tasks=("sst2",))
    for file in os.listdir(os.path.dirname(row_of(root, made.BOTH[0]))):
        if file.endswith(".npz"):
            os.remove(os.path.join(os.path.dirname(row_of(root, made.BOTH[0])), file))
    text, study = page_of(root)
    assert study.tests[0]["verdict"] == "not tested" and "| no .npz of its examples' scores | – | – | not tested |" in text


def test_the_claims_are_the_papers_and_hold_in_its_own_tables():
    paper = report_scores.PaperResults(PAPER)
    found = report_stats.claims(paper.names)
    assert {c.ordering for c in found} == set(report_stats.ORDERINGS)
    wrong = [(c.ordering, c.better, f) for c in found for f in c.families
             if paper.score(c.better, list(paper.columns[f]), "paper").mean <= paper.score(c.worse, list(paper.columns[f]), "paper").mean]
    assert wrong == [(4, "610m-clm-5k-mlm40-22k", "IR")]           # 77.29 to 77.54: the paper's own exception


# ---- warnings and refusals

@pytest.mark.parametrize("words, says, provoke", [
    ("Missing trials", "610m-clm-42k on sst2, 1 of 6 (lr 5e-05 seed 0)", lambda row: os.remove(row)),
    ("Failed trials", "610m-clm-42k on sst2, 1 (lr 5e-05)", lambda row: change(row, failed=True, validation=None, test=None)),
    ("Failed trials", "610m-clm-42k on sst2, 1 (lr 5e-05)", lambda row: change(row, validation={"score": float("nan")})),
    ("Best learning rate at an edge", "610m-clm-42k on sst2 (0.0001)",
     lambda row: [change(row.replace("5e-05", "1e-04").replace("sd0", f"sd{s}"), validation={"score": 0.99}) for s in (0, 1)]),
    ("Fewer fine-tuning seeds", "610m-clm-42k on sst2, 1 of 2", lambda row: [os.remove(row.replace("5e-05", lr)) for lr in ("2e-05", "5e-05", "1e-04")]),
    ("Mixed precisions of weights", "float32 in 23 rows; bfloat16 in 1 rows", lambda row: change(row, param_dtype="bfloat16")),
    ("Mixed precisions of arithmetic", "float32 in 1 rows", lambda row: change(row, dtype="float32")),
    ("Mixed devices", "NVIDIA H100 in 1 rows", lambda row: change(row, device="NVIDIA H100")),
    ("Mixed versions of torch", "2.12.0 in 1 rows", lambda row: change(row, torch="2.12.0")),
    ("Mixed versions of this code", "def in 1 rows", lambda row: change(row, code="def")),
    ("Mixed modes", "paper in 1 rows", lambda row: change(row, mode="paper")),
    ("Mixed lengths of fine-tuning", "sst2: 40, 41", lambda row: change(row, steps=41)),
    ("Mixed versions of the data", "sst2: of sst2, x", lambda row: change(row, data="x")),
    ("Mixed pools", "squad_retrieval: full, judged", lambda row: change(row.replace("sst2", "squad_retrieval"), pool="judged")),
    ("Not above an untrained baseline", "610m-clm-42k on sst2 (", lambda row: change(row, baseline={"name": "majority", "score": 0.9})),
])
def test_every_irregularity_has_its_warning(small, words, says, provoke):
    root = small()
    assert "## Warnings\n\nNone.\n" in page_of(root)[0]
    provoke(row_of(root, "610m-clm-42k"))
    warnings = page_of(root)[0].split("## How to read it")[0]
    assert f"* **{words}" in warnings and says in warnings
    study = read(root)[0]
    write_report(f"{root}/again", {"rows.jsonl": "".join(json.dumps(line) + "\n" for line in report_read.report_rows(study))}, {})
    assert page_of(f"{root}/again")[0].split("## How to read it")[0] == warnings


def test_models_without_trials_or_seeds_are_named(small):
    root = small(names=[*made.BOTH, "610m-clm-42k-seed43", "610m-mlm20-42k"])
    shutil.rmtree(os.path.join(root, "610m-mlm20-42k"))
    shutil.rmtree(os.path.dirname(row_of(root, "610m-clm-42k-seed43")))
    warnings = page_of(root)[0].split("## How to read it")[0]
    assert "**No trial yet**: 610m-mlm20-42k." in warnings and "**No trial of a task that other models have**: 610m-clm-42k-seed43 on sst2." in warnings
    assert "**Fewer pretraining seeds than others in the same tables**: 610m-mlm40-42k, 1 of 2." in warnings


def test_the_warnings_do_not_depend_on_the_process_that_writes_them(small):
    names = [f"210m-{o}-42k" for o in ("clm", "mlm20", "mlm30", "mlm40", "mlm50")] + ["610m-clm-42k"]
    root = small(names=names)
    for name in names[:5]:
        shutil.rmtree(os.path.dirname(row_of(root, name)))
    found = {run_python(["-c", f"from reporting.inputs import read_inputs; from reporting.scores import StudyResults; from reporting.caveats import list_warnings; study = read_inputs([{root!r}]).study; "
                               "print(*list_warnings(study, StudyResults(study)))"], env={"PYTHONHASHSEED": seed}).stdout for seed in "123"}
    assert len(found) == 1 and "on sst2; 210m-" in found.pop()


def test_torn_lines_are_left_out_and_said_and_a_line_of_something_else_is_refused(small):
    root = small()
    path = os.path.join(root, "rows.jsonl")
    write_report(root, {"rows.jsonl": "".join(json.dumps(line) + "\n" for line in report_read.report_rows(read(root)[0]))}, {})
    lines = open(path).read().splitlines(keepends=True)
    with open(path, "w") as f:
        f.writelines([*lines[:-1], lines[-1][:40]])
    text, study = page_of(path)
    assert len(study.trials) == 23 and f"* {path}: its torn last line was dropped" in text and "**Missing trials" in text
    with open(path, "w") as f:
        f.writelines([*lines[:4], lines[4][:40] + "\n", *lines[5:9], "\0" * 100 + "\n", *lines[9:]])
    text, study = page_of(path)
    assert len(study.trials) == 23 and f"* {path}: 2 lines were left out (line 5 is not JSON" in text and "**Missing trials" in text
    for line in ('{"task": "sst2"}', '["a", "list"]', '{"what": "else"}', '{"what": "model"}', '{"what": "test", "p": 0}'):
        with open(path, "w") as f:
            f.writelines([lines[0], line + "\n", lines[-1]])
        with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is not a row"):
            read(path)


def test_a_torn_log_is_said_once(tmp_path):
    root = made.write(str(tmp_path), names=["610m-clm-42k", *(f"610m-clm-dec42k-mlm40-{k}k" for k in (44, 64))], tasks=())
    with open(f"{root}/610m-clm-42k/log.jsonl", "a") as f:
        f.write('{"step": 84')
    study, _ = read(root)
    assert study.notes == [f"{root}/610m-clm-42k/log.jsonl: its torn last line was dropped"]
    assert len(study.models["610m-clm-dec42k-mlm40-64k"]["curve"]["train"]) > 150


def test_a_trial_of_an_unknown_kind_is_refused(small):
    root = small()
    change(row_of(root, "610m-clm-42k"), kind="vision")
    with pytest.raises(UserError, match=r"lr5e-05_sd0.json: a trial of the kind 'vision'"):
        read(root)


def test_a_family_that_a_fork_added_is_reported_on_its_own(small, tmp_path, monkeypatch):
    """A class in tasks/registry.py is all that the report needs of it."""
    class MultipleChoice(SequenceClassification):
        title = "multiple choice"
    monkeypatch.setitem(made.TASKS, "riddles", "choice")
    root, out = small(tasks=("sst2", "riddles")), str(tmp_path / "report")
    with pytest.raises(UserError, match="a trial of the kind 'choice', expected one of sequence, token, span, retrieval$"):
        read(root)
    monkeypatch.setitem(registry.FAMILIES, "choice", MultipleChoice)
    draw(root, to=out)
    text = open(f"{out}/report.md").read()
    assert "### Multiple choice (choice)\n" in text and "choice is the mean of riddles.\n" in text and "**choice** (riddles)\n" in text
    assert "| interval over seeds | riddles | **choice** |\n" in text                  # the paper has no column for it
    assert page_of(f"{out}/rows.jsonl", report_figures.FIGURES)[0].count("(choice)") == text.count("(choice)")
    # the paper's families are what they are without it
    alone = page_of(small("alone", tasks=("sst2",)))[0]
    table = alone[alone.index("### Table 2: "):alone.index("## Learning rates")]
    assert table.strip() in text and "SC is the mean of sst2.\n" in table
    # figures have a panel more for it, which is empty in the paper's row
    figure = report_figures.FIGURES["fig02_objectives_by_size"]([read(root)[1], report_scores.PaperResults(PAPER)])
    assert [axis.get_title().split(":")[0] for axis in figure.axes] == [
        "SC", "TC", "QA", "IR", "choice", "SC, accuracy", "TC, F1", "QA, F1", "IR, NDCG@10", "choice, score"]
    assert [bool(axis.patches) for axis in figure.axes] == [True, False, False, False, True, True, True, True, True, False]
    plt.close(figure)


def test_two_plans_are_never_one_report(small):
    one, two, other = small("one"), small("two", plan="gpu"), small("other")
    done = run_python(["report.py", one, two, f"--to={one}/out"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'gpu'" in done.stderr and "'toy'" in done.stderr
    assert not os.path.exists(f"{one}/out")
    change(os.path.join(other, "study.json"), scale={"steps": 7})
    with pytest.raises(UserError, match="at another scale"):
        read_inputs([one, other])
    rows = [line for folder in (one, two) for line in report_read.report_rows(read(folder)[0]) if "task" in line]
    write_report(one, {"rows.jsonl": "".join(json.dumps(line) + "\n" for line in rows)}, {})
    with pytest.raises(UserError, match="'gpu', the rows before it 'toy'"):
        read_inputs([f"{one}/rows.jsonl"])


@pytest.mark.parametrize("name, content, says", [
    ("study.json", "{", "expected a study.json of study.py, and "), ("study.json", '{"plan": "x"}', "study.json: has no 'models'"),
    ("study.json", '{"plan": "x", "models": {"bert": {"folder": "bert"}}}', "'bert' is not a model of a study"),
    ("t.csv", "a,b\n1,2\n", "line 2 is not a published result"), ("t.csv", "", "holds no published result"),
    ("t.csv", report_scores.PAPER_COLUMNS + "\nBASE,610m-clm-42k,SC,MNLI,high,0.1\n", "line 2 is not a published result")])
def test_what_is_no_study_and_no_table_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        read_inputs([str(tmp_path if name == "study.json" else tmp_path / name)])


def test_a_users_own_files_are_never_written_over(small, tmp_path):
    root, out = small(), tmp_path / "mine"
    out.mkdir()
    for name, content in (("report.md", b"# my thoughts\n"), ("fig02_objectives_by_size.png", b"\x89PNG mine")):
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} was not written by report.py"):
            write_report(str(out), {"report.md": MARK}, {"fig02_objectives_by_size.png": plt.figure()})
        assert os.listdir(out) == [name] and (out / name).read_bytes() == content
        (out / name).unlink()
    for _ in range(2):          # its own are
        write_report(str(out), {"report.md": MARK}, {"fig02_objectives_by_size.png": plt.figure()})
    assert read(root)[0].plan == "toy"
