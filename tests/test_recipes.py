"""The study's names say all there is to say, and its plan costs what sharing leaves."""
import os
import re

import pytest
from conftest import ROOT, run_python

import study
from core.configurator import UserError, configure
from core.files import find_files
from experiments import recipes
from experiments.plan import plan_runs, run_holding
from experiments.recipes import parse
from experiments.scales import SCALES, batch_of, scale_called

PAPER = recipes.paper()
EVERY = [name for names in PAPER.values() for name in names]


def test_all_50_names_parse_and_back():
    assert len(EVERY) == len(set(EVERY)) == 50 and len(PAPER["I"]) == 12
    for name in [*EVERY, *recipes.BEYOND]:
        for seeded in (name, name.replace("42k-", "42k-seed7-") if parse(name).step else f"{name}-seed7"):
            assert parse(seeded).name == seeded and (parse(seeded).seed == 7) == (seeded != name)


def test_names_mean_what_the_paper_means():
    two = parse("610m-clm-10k-mlm40-42k")
    assert (two.size, two.stages, two.phases) == ("610m", (("clm", 10_000), ("mlm40", 42_000)), (("clm", 10_000), ("mlm40", 32_000)))
    assert two.parent() is None and two.clm_share() == pytest.approx(10 / 42) and two.objective_at(9_999) == "clm" != two.objective_at(10_000)
    more = parse("610m-clm-dec42k-mlm40-64k")                           # 42k + 22k of MLM, on the decayed model
    assert more.parent().name == "610m-clm-42k" and more.phases == (("mlm40", 22_000),) and more.steps == 64_000
    assert parse("610m-clm-10k-mlm40-dec42k-mlm40-64k").parent().name == "610m-clm-10k-mlm40-42k"
    early = parse("610m-mlm40-42k-1000")
    assert early.step == 1_000 and early.finished().name == "610m-mlm40-42k"
    turns = parse("610m-alt1k-clm-mlm40-42k")
    assert [turns.objective_at(s) for s in (0, 999, 1_000, 2_000, 41_999)] == ["clm", "clm", "mlm40", "clm", "mlm40"]
    assert turns.steps == 42_000 and turns.clm_share() == 0.5


@pytest.mark.parametrize("name, says", [
    ("", "'' is not a size"), ("610m", "come in pairs"), ("clm-42k", "'clm' is not a size"), ("610m-clm", "come in pairs"), ("610m-clm-x", "'x' is not a number"),
    ("610m-CLM-42k", "'CLM' is not an objective"), ("610m-mlm0-42k", "'mlm0' is not an objective"), ("610m-mlm40-12k-clm-10k", "not after step 12,000"),
    ("610m-clm-dec42k", "without dec"), ("610m-clm-dec1k-clm-dec2k-clm-42k", "only one"), ("610m-clm-42000", "it is written 610m-clm-42k"),
    ("610m-clm-42k-seed42", "it is written 610m-clm-42k"), ("610m-clm-42k-42000", "not one before its end"), ("610m-alt1k-clm-42k", "altN needs"),
    ("610m-alt1k", "altN needs"), ("610m-alt1k-clm-mlm40-dec42k", "altN needs"), ("610m-clm-seed5-mlm40-42k", "'seed5' is not a number")])
def test_a_name_outside_the_grammar_says_what_was_expected(name, says):
    with pytest.raises(UserError) as error:
        parse(name)
    assert says in str(error.value) and "expected SIZE-OBJECTIVE-STEPS" in str(error.value) and "\n" not in str(error.value)


def steps_of(names):
    runs = plan_runs(EVERY)
    return sum(runs[name].own_steps for name in names)


def test_the_plan_is_the_papers_15_and_17_and_6_models_and_a_step_its_2359296_tokens():
    assert [len(PAPER[g]) for g in "ABCDEF"] == [15, 5, 5, 3, 4, 6] and len(plan_runs(EVERY)) == 15 + 17 + 6
    assert batch_of(scale_called("paper"), data_dir="nowhere").tokens == 2_359_296
    assert steps_of(PAPER["A"]) == 630_000
    assert steps_of(PAPER["B"] + PAPER["C"] + PAPER["D"]) == 122_000 and steps_of(PAPER["E"]) == 8_000      # the paper says 120k in all
    assert steps_of(PAPER["F"][:3]) == steps_of(PAPER["F"][3:]) == 26_000


def test_a_config_is_called_one_of_the_papers_models_only_if_it_is_one():
    for path in find_files(os.path.join(ROOT, "config"), "*.py"):
        for name in re.findall(r'^out_dir = "out/(.*)" +# the paper\'s name for this model$', open(path, encoding="utf-8").read(), re.M):
            assert name in EVERY, path


def test_no_other_sharing_is_cheaper():
    """Every first step of every schedule that is not its own decay, counted once: what any plan has to train."""
    seen = set()
    for name in EVERY:
        r = parse(name)
        if not r.step:
            before = [o for s in range(r.start, r.steps - recipes.DECAY, 1000) for o in [r.objective_at(s)]]
            seen |= {(r.size, r.parent(), tuple(before[:i + 1])) for i in range(len(before))}
    assert 1000 * len(seen) + recipes.DECAY * 38 == steps_of(plan_runs(EVERY))


def test_trunks_come_first_and_keep_what_others_begin_from():
    runs, done = plan_runs(EVERY), set()
    for name, r in runs.items():
        for needed in filter(None, (r.trunk, r.recipe.parent_name)):
            assert needed in done
        if r.trunk:
            assert r.branch_step in runs[r.trunk].kept_steps and r.branch_step <= runs[r.trunk].steps - recipes.DECAY
            assert all(r.recipe.objective_at(s + r.recipe.start) == runs[r.trunk].recipe.objective_at(s + r.recipe.start) for s in range(r.branch_step))
        done.add(name)
    assert set(runs["610m-mlm40-42k"].kept_steps) == {1_000, 2_000, 5_000, 10_000, 20_000, 40_000}
    for name, r in plan_runs(["610m-clm-42k-seed7", "610m-mlm40-42k-seed7"]).items():      # and what may be asked for later
        assert r.kept_steps == runs[name.removesuffix("-seed7")].kept_steps
    alone = plan_runs(["610m-clm-10k-mlm40-42k-5000", "610m-clm-42k"])        # a checkpoint that lies in the trunk's folder
    assert {5_000, 10_000} <= set(alone["610m-clm-42k"].kept_steps) and run_holding(parse("610m-clm-10k-mlm40-42k-5000"), alone) == "610m-clm-42k"


def test_a_scale_keeps_the_proportions_and_the_printed_plan_adds_up(capsys):
    def printed(*words):
        study.main(configure(study.Config, ["plan", *words]))
        return capsys.readouterr().out
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in printed("--scale=cpu", "--seeds=42,43").splitlines() if line.startswith("| ")}
    assert lines["all"][0] == "76" and int(lines["all"][1].replace(",", "")) == 2 * steps_of(plan_runs(EVERY)) * SCALES["cpu"]["steps"] // 42_000
    paper = printed("--tok_per_s=4900")        # about the paper's own: 16k hours for 120k steps
    cells = next(line for line in paper.splitlines() if line.startswith("| all")).split("|")
    assert cells[2].strip() == "38" and cells[3].strip() == "812,000" and "2,359,296 tokens" in paper
    continued = [cell.strip() for cell in next(line for line in paper.splitlines() if line.startswith("| F:")).split("|")]
    assert continued[3] == "52,000" and continued[9] == "26k"          # the paper says 26k of all six
    hours = float(continued[8].replace(",", ""))
    assert hours == pytest.approx(52_000 * 2_359_296 / 4900 / 3600, rel=1e-3)


@pytest.mark.parametrize("words, says", [
    ([], "plan or run?"), (["plan", "--scale=mars"], "scale=mars"), (["plan", "--only=610m-clm"], "expected SIZE-OBJECTIVE-STEPS"),
    (["plan", "--only=9b-clm-42k"], "no size 9b"), (["plan", "--only=610m-rtd-42k"], "objectives are clm"), (["plan", "--only=7*"], "matches none"),
    (["plan", "--only=610m-clm-3k"], "too short"), (["run", "--launch=kubernetes"], "launch=kubernetes"), (["plan", "--seeds=()"], "seeds=()"),
    (["plan", "--scale=smoke", "--only=610m-clm-4500"], "a step is 1000 of the paper's, and 4,500 is not a multiple"),
    (["run", "--data_dir=nowhere", "--out_dir=build/nowhere"], "no corpus in 'nowhere'")])
def test_a_wrong_call_is_explained_in_one_line(words, says, tmp_path):
    with pytest.raises(UserError) as error:
        study.main(configure(study.Config, [w.replace("build", str(tmp_path)) for w in words]))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_name_outside_the_grammar_is_a_mistake_of_the_users():
    done = run_python(["study.py", "plan", "--only=610m-clm"])
    assert done.returncode == 2 and "expected SIZE-OBJECTIVE-STEPS" in done.stderr and done.stderr.count("\n") == 1
