"""Does A beat B? The paper's claims, and tests of them.

The claims are the orderings of models that a reproduction of the paper should show. Each is tested
in two ways:

* over test examples, with a sign-flip permutation test and Holm's correction: do these two
  checkpoints differ on examples like these? This does not see that another pretraining run would
  have given another checkpoint.
* over pretraining seeds, with a t interval, where both models share two seeds or more.
"""
import os
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from experiments import recipes
from reporting.scores import PUBLISHED_FAMILIES, interval, select_trials
from reporting.sections import CLM, MLM, first_objective, sections, size_of

RESAMPLES = 9_999       # random sign patterns of a permutation test
ALPHA = 0.05            # a corrected p value below this is significant
# orderings of models by their scores, read from the paper's tables: its findings that are tested
ORDERINGS = {
    1: "Early in pretraining CLM leads MLM: everywhere up to step 5k, at 10k on TC and IR, later "
       "on TC alone",
    2: "At the end of pretraining MLM leads CLM on QA",
    3: "At the end of pretraining MLM leads CLM on SC",
    4: "At an equal budget, a quarter of CLM and then MLM beats MLM alone (in the paper all but IR "
       "at 22k)",
    5: "Continued with MLM, a CLM start beats an MLM start after 22k steps, except on QA; after 2k "
       "steps it is behind, except on TC",
    6: "Retrieval is best at a masking rate of 50 %, question answering (210M, 610M) at 20 %"}


# ---- the claims

@dataclass(frozen=True)
class Claim:
    """`better` beats `worse` on the tasks of these families. ordering: a key of ORDERINGS"""
    ordering: int
    better: str
    worse: str
    families: tuple


def claims(names):
    """All claims about these models (names without pretraining seeds), sorted by ordering."""
    groups = sections(names)
    unsorted_claims = [*early_claims(groups["steps"]),
                       *final_claims(groups["base"]),
                       *share_claims(groups["shares"]),
                       *continued_claims(groups["continued"]),
                       *masking_rate_claims(groups["base"])]
    return sorted(unsorted_claims, key=lambda claim: claim.ordering)


def grouped(names, group_key, member_key):
    """The models to compare with each other, smallest size first.

    -> {group_key(recipe): {member_key(recipe): name}}
    """
    all_recipes = [(name, recipes.parse(name)) for name in names]
    all_recipes.sort(key=lambda pair: size_of(pair[1].size))
    groups = defaultdict(dict)
    for name, recipe in all_recipes:
        groups[group_key(recipe)][member_key(recipe)] = name
    return groups


def early_claims(names):
    """Ordering 1, of intermediate checkpoints at the same step."""
    checkpoints = grouped(names, lambda r: (r.size, r.steps, r.step), first_objective)
    for (_, _, step), models in sorted(checkpoints.items()):
        if step <= 5_000:
            families = tuple(PUBLISHED_FAMILIES)
        elif step <= 10_000:
            families = ("TC", "IR")
        else:
            families = ("TC",)
        if CLM in models and MLM in models:
            yield Claim(1, models[CLM], models[MLM], families)


def final_claims(names):
    """Orderings 2 and 3, of the models of one objective."""
    for models in grouped(names, lambda r: r.size, first_objective).values():
        if CLM in models and MLM in models:
            yield Claim(2, models[MLM], models[CLM], ("QA",))
            yield Claim(3, models[MLM], models[CLM], ("SC",))


def share_claims(names):
    """Ordering 4: about a quarter of CLM against none, under the same budget."""
    budgets = grouped(names, lambda r: (r.size, r.steps, r.stages[-1][0]), lambda r: r.clm_share())
    for models in budgets.values():             # {share of CLM: name}
        quarters = [share for share in models if 0.15 < share < 0.35]
        if quarters and 0 in models:
            nearest = min(quarters, key=lambda share: (abs(share - 0.25), share))
            yield Claim(4, models[nearest], models[0], tuple(PUBLISHED_FAMILIES))


def continued_claims(names):
    """Ordering 5: the same number of MLM steps after a CLM start and after an MLM start."""

    def start(recipe):
        """The objective of the start; None for a model that is a start itself."""
        return first_objective(recipe) if recipe.start else None

    lengths = grouped(names, lambda r: (r.size, r.steps - r.start), start)
    for (_, added_steps), models in lengths.items():
        if CLM not in models or MLM not in models:
            continue
        if added_steps == 22_000:
            yield Claim(5, models[CLM], models[MLM], ("SC", "TC", "IR"))
            yield Claim(5, models[MLM], models[CLM], ("QA",))
        elif added_steps == 2_000:
            yield Claim(5, models[MLM], models[CLM], ("SC", "QA", "IR"))


def masking_rate_claims(names):
    """Ordering 6, of the models of one objective."""
    for size, models in grouped(names, lambda r: r.size, first_objective).items():
        if "mlm20" in models and "mlm50" in models:
            yield Claim(6, models["mlm50"], models["mlm20"], ("IR",))
            if size != "1b":
                yield Claim(6, models["mlm20"], models["mlm50"], ("QA",))


# ---- statistics

def sign_flip(differences, resamples=RESAMPLES, seed=0):
    """Two-sided p value that the mean of paired differences is 0. differences: [n]

    If the mean were 0, each difference could as well have the other sign. The p value is the share
    of sign patterns whose sum is at least as far from 0 as the observed sum. If there are more than
    `resamples` patterns, it is the share of so many random ones and the observed one.
    """
    d = np.asarray(differences, np.float64)
    observed = abs(d.sum())
    # added in another order, the same sum may differ in its last bits: it must count as equal
    threshold = observed * (1 - 1e-9)
    if not d.any():
        return 1.0

    if 2 ** len(d) <= resamples:
        # all patterns: bit i of a pattern's number is the sign of difference i
        patterns = np.arange(2 ** len(d))[:, None]                              # [2^n, 1]
        bits = (patterns >> np.arange(len(d))) & 1                              # [2^n, n]
        signs = 1 - 2 * bits
        return float(np.mean(np.abs(signs @ d) >= threshold))

    # random patterns, in blocks that fit into memory; flipping a zero changes nothing
    rng = np.random.default_rng(seed)
    d = d[d != 0]
    bytes_per_pattern = -(-len(d) // 8)
    block = max(1, 4_000_000 // len(d))
    n_extreme = 0
    for begin in range(0, resamples, block):
        n_patterns = min(block, resamples - begin)
        random_bytes = rng.integers(0, 256, (n_patterns, bytes_per_pattern), np.uint8)
        is_flipped = np.unpackbits(random_bytes, axis=1, count=len(d))          # [patterns, n]
        sums = d.sum() - 2 * (is_flipped @ d)                                   # [patterns]
        n_extreme += int((np.abs(sums) >= threshold).sum())
    return (1 + n_extreme) / (1 + resamples)


def holm(p_values):
    """Holm's adjusted p values, in the order given.

    If all tests with an adjusted p value below ALPHA are called significant, then at most a share
    ALPHA of such tables has any that is so by chance.
    """
    adjusted = [0.0] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    highest = 0.0
    for rank, i in enumerate(order):
        n_remaining = len(p_values) - rank
        highest = max(highest, min(1.0, n_remaining * p_values[i]))
        adjusted[i] = highest
    return adjusted


# ---- a model's scores, by example and by pretraining seed

class NoExampleScores(Exception):
    """Its text says why a model's scores on single examples cannot be compared."""


def example_scores(results, name, column, seeds):
    """A model's score on each test example, and which version of the data the examples are of.

    A score is the mean over the fine-tuning seeds that the rule "standard" selects, then over the
    pretraining seeds `seeds`. Raises NoExampleScores.
    -> array [examples], "data" of the trials
    """
    # one array [examples] per pretraining seed, the mean over its fine-tuning seeds
    means = []
    versions = set()
    for seed in seeds:
        selection = select_trials(results.rows[name, column].get(seed, ()), "standard")
        if selection is None:
            continue
        scores = [load_example_scores(row) for row in selection.rows]
        versions |= {row.get("data") for row in selection.rows}
        if len({len(s) for s in scores}) > 1:
            raise NoExampleScores("seeds of different test sets")
        means.append(np.mean(scores, axis=0))
    if not means:
        raise NoExampleScores("no scores")
    if len({len(mean) for mean in means}) > 1 or len(versions) > 1:
        raise NoExampleScores("pretraining seeds of different test sets")
    return np.mean(means, axis=0), versions.pop()


def load_example_scores(row):
    """The .npz beside a trial's file: its score on each test example. -> array [examples]

    Raises NoExampleScores.
    """
    if not row.get("per_item") or not row.get("path"):
        raise NoExampleScores("no .npz of its examples' scores")
    path = os.path.join(os.path.dirname(row["path"]), row["per_item"])
    if not os.path.isfile(path):
        raise NoExampleScores("no .npz of its examples' scores")
    try:
        with np.load(path) as file:
            scores = file["test"].astype(np.float64)
    except Exception:
        # a damaged file makes numpy, zipfile and zlib raise errors of many types
        raise NoExampleScores("an .npz that cannot be read") from None
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise NoExampleScores("an .npz without a score of each example")
    return scores


def differences_by_seed(results, claim, column):
    """The selected test score of the better model minus that of the worse, in points.

    -> {pretraining seed that both models have: difference}
    """
    better = means_by_seed(results, claim.better, column)
    worse = means_by_seed(results, claim.worse, column)
    return {seed: better[seed] - worse[seed] for seed in sorted(better) if seed in worse}


def means_by_seed(results, name, column):
    """{pretraining seed: test score in percent}, selected by the rule "standard"."""
    means = {}
    for seed, rows in results.rows[name, column].items():
        selection = select_trials(rows, "standard")
        if selection is not None:
            means[seed] = 100 * selection.mean
    return means


# ---- the tests

def paired_tests(results, earlier_tests=()):
    """Tests every claim on every task where both models share a pretraining seed.

    -> a list of dicts as rows.jsonl has them, differences in points:
        ordering, better, worse, family, task
        by_seed         differences of the selected test scores, one per pretraining seed
        items           number of examples, 0 if there is no test over examples: "why" says why
        difference      mean over the examples
        half_width      1.96 standard errors of it
        p, holm         the p value over examples, and Holm's correction over all tests
        verdict         see verdict()

    earlier_tests: tests of an earlier report. They stand in for tests over examples that cannot be
    repeated, because a report's rows.jsonl has no scores of examples.
    """
    earlier = {}            # {(better, worse, task): a test over examples}
    for test in earlier_tests:
        if test["p"] is not None:
            earlier[test["better"], test["worse"], test["task"]] = test

    tests = []
    for claim in claims(results.names):
        for family in claim.families:
            for column in results.columns.get(family, ()):
                by_seed = differences_by_seed(results, claim, column)
                if not by_seed:
                    continue
                test = paired_test(results, claim, family, column, by_seed)
                if test["p"] is None:
                    test = earlier.get((claim.better, claim.worse, column), test)
                tests.append(test)

    # the correction is over all tests that have a p value, those of an earlier report included
    with_p = [test for test in tests if test["p"] is not None]
    adjusted = holm([test["p"] for test in with_p])
    for test, p in zip(with_p, adjusted):
        test["holm"] = p
    for test in tests:
        test["verdict"] = verdict(test)
    return tests


def paired_test(results, claim, family, column, by_seed):
    """One test of paired_tests, before the correction. by_seed: {pretraining seed: difference}"""
    test = {"ordering": claim.ordering, "better": claim.better, "worse": claim.worse,
            "family": family, "task": column, "by_seed": list(by_seed.values()),
            "items": 0, "difference": None, "half_width": None, "p": None}
    try:
        better, data_of_better = example_scores(results, claim.better, column, by_seed)
        worse, data_of_worse = example_scores(results, claim.worse, column, by_seed)
    except NoExampleScores as error:
        test["why"] = str(error)
        return test
    if len(better) != len(worse) or data_of_better != data_of_worse:
        test["why"] = "different test sets"
        return test
    differences = 100 * (better - worse)                                        # [examples], points
    test["items"] = len(differences)
    test["difference"] = float(differences.mean())
    test["p"] = sign_flip(differences)
    if len(differences) > 1:
        test["half_width"] = float(1.96 * differences.std(ddof=1) / len(differences) ** 0.5)
    return test


def verdict(test):
    """What a test says about its claim, in words.

    "confirmed" needs both: the examples (Holm's p below ALPHA) and the pretraining seeds (a 95 % t
    interval on the claim's side of 0). With the examples alone the claim holds "for these
    checkpoints". Where the task's own score says the opposite of the examples, nothing is
    confirmed.
    """
    by_seed = test["by_seed"]
    side_of_seeds = side_of_zero(by_seed)

    # without scores of examples, the pretraining seeds alone decide
    if test["p"] is None:
        if side_of_seeds > 0:
            return "confirmed by pretraining seeds alone"
        if side_of_seeds < 0:
            return "the other way round by pretraining seeds alone"
        return "not separated by pretraining seeds" if len(by_seed) > 1 else "not tested"

    # with them, both must agree
    if test["holm"] >= ALPHA:
        return "not separated"
    side_of_examples = 1 if test["difference"] > 0 else -1
    if np.mean(by_seed) * side_of_examples < 0:
        # e.g. the entity F1 of a test set falls while the mean of its sentences' macro F1 rises
        return "examples and score disagree"
    words = "confirmed" if side_of_examples > 0 else "the other way round"
    if side_of_seeds != side_of_examples:
        words += " for these checkpoints"
    return words


def side_of_zero(values):
    """1 or -1 if the 95 % t interval of the mean lies above or below 0, else 0."""
    if len(values) < 2:
        return 0
    mean = float(np.mean(values))
    half_width = interval(values, "standard")
    if mean - half_width > 0:
        return 1
    if mean + half_width < 0:
        return -1
    return 0


def summary(tests):
    """{ordering: the verdicts of its tests, counted in words}, for the orderings tested."""
    verdicts = defaultdict(list)
    for test in tests:
        verdicts[test["ordering"]].append(test["verdict"])
    texts = {}
    for ordering in sorted(verdicts):
        n = len(verdicts[ordering])
        counts = Counter(verdicts[ordering]).most_common()
        if len(counts) == 1:
            texts[ordering] = f"{counts[0][0]} ({n} of {n})"
        else:
            texts[ordering] = ", ".join(f"{count} of {n} {words}" for words, count in counts)
    return texts
