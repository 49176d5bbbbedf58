"""Does A beat B? Paired tests over a task's examples, Holm's correction, and differences by pretraining seed.

The claims are the orderings that a reproduction of the paper should show. Only report.py imports this file.

A test over examples asks whether these two checkpoints differ on examples like these. It does not see that another pretraining
run would have been another checkpoint; where both models have two pretraining seeds or more, the difference by seed does.
"""
import os
import zipfile
from dataclasses import dataclass

import numpy as np

from experiments import recipes
from reporting.scores import CLM, IN_WORDS, MLM, interval, sections, select, size_of

RESAMPLES = 9_999
ALPHA = 0.05
ORDERINGS = {
    1: "Early in pretraining CLM leads MLM: everywhere up to step 5k, at 10k on TC and IR, later on TC alone",
    2: "At the end of pretraining MLM leads CLM on QA",
    3: "At the end of pretraining MLM leads CLM on SC",
    4: "At an equal budget, a quarter of CLM and then MLM beats MLM alone",
    5: "Continued with MLM, a CLM start beats an MLM start after 22k steps, except on QA; after 2k steps it is behind",
    6: "Retrieval wants a masking rate of 50 %, question answering (210M, 610M) of 20 %"}


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse` on the tasks of these families."""
    ordering: int
    better: str
    worse: str
    families: tuple


def claims(names):
    """The orderings' claims on models that are there, names without pretraining seeds -> [Claim]"""
    parts = {k: {n: recipes.parse(n) for n in found} for k, found in sections(names).items()}
    found, every = [], tuple(IN_WORDS)

    def pairs(part, key, of):
        """{key(recipe): {of(recipe): name}} of a section, by size."""
        out = {}
        for n, r in sorted(parts[part].items(), key=lambda item: size_of(item[1].size)):
            out.setdefault(key(r), {})[of(r)] = n
        return out

    for (_, _, step), pair in sorted(pairs("steps", lambda r: (r.size, r.steps, r.step), lambda r: r.stages[0][0]).items()):
        if {CLM, MLM} <= pair.keys():
            families = every if step <= 5_000 else ("TC", "IR") if step <= 10_000 else ("TC",)
            found.append(Claim(1, pair[CLM], pair[MLM], families))
    base = pairs("base", lambda r: r.size, lambda r: r.stages[0][0])
    for pair in base.values():
        if {CLM, MLM} <= pair.keys():
            found += [Claim(2, pair[MLM], pair[CLM], ("QA",)), Claim(3, pair[MLM], pair[CLM], ("SC",))]
    for shares in pairs("shares", lambda r: (r.size, r.steps, r.stages[-1][0]), lambda r: r.clm_share()).values():
        mixed = sorted((abs(share - 0.25), share) for share in shares if 0.15 < share < 0.35)
        if mixed and 0 in shares:
            found.append(Claim(4, shares[mixed[0][1]], shares[0], every))
    for (_, more), pair in pairs("continued", lambda r: (r.size, r.steps - r.start), lambda r: r.start and r.stages[0][0]).items():
        if {CLM, MLM} <= pair.keys():
            found += {22_000: [Claim(5, pair[CLM], pair[MLM], ("SC", "TC", "IR")), Claim(5, pair[MLM], pair[CLM], ("QA",))],
                      2_000: [Claim(5, pair[MLM], pair[CLM], ("SC", "QA", "IR"))]}.get(more, [])
    for size, pair in base.items():
        if {"mlm20", "mlm50"} <= pair.keys():
            found.append(Claim(6, pair["mlm50"], pair["mlm20"], ("IR",)))
            found += [Claim(6, pair["mlm20"], pair["mlm50"], ("QA",))] * (size != "1b")
    return sorted(found, key=lambda c: c.ordering)


def sign_flip(differences, resamples=RESAMPLES, seed=0):
    """Two-sided p that the mean of paired differences is 0, under which each sign is as likely as the other: all sign patterns
    where they are no more than resamples, else so many random ones and the observed. differences: [n]"""
    d = np.asarray(differences, np.float64)
    observed = abs(d.sum()) * (1 - 1e-9)         # sums in another order must still count as equal
    if not d.any():
        return 1.0
    if 2 ** len(d) <= resamples:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float(np.mean(np.abs(signs @ d) >= observed))
    rng, d = np.random.default_rng(seed), d[d != 0]         # a sign of zero changes nothing
    extreme, block = 0, max(1, 4_000_000 // len(d))
    for begin in range(0, resamples, block):
        k = min(block, resamples - begin)
        bits = np.unpackbits(rng.integers(0, 256, (k, -(-len(d) // 8)), np.uint8), axis=1, count=len(d))
        extreme += int((np.abs(d.sum() - 2 * (bits @ d)) >= observed).sum())
    return (1 + extreme) / (1 + resamples)


def holm(ps):
    """Holm's adjusted p values, in the order given: at most a share ALPHA of such tables has any false rejection."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def items_of(ours, name, column, seeds):
    """Each test example's score: the mean over the seeds of the selected learning rate (rule standard), then over these
    pretraining seeds. -> array [examples], what the examples are; or None, why not"""
    means, data = [], set()
    for seed in seeds:
        found, items = select(ours.rows[name, column].get(seed, ()), "standard"), []
        for row in found["rows"] if found else ():
            data.add(row.get("data"))
            path = os.path.join(os.path.dirname(row.get("path", "")), row.get("per_item") or "")
            if not row.get("per_item") or not row.get("path") or not os.path.isfile(path):
                return None, "no .npz of its examples' scores"
            try:
                with np.load(path) as file:
                    items.append(file["test"].astype(np.float64))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                return None, "an .npz that cannot be read"
        if found:
            if len({len(i) for i in items}) > 1:
                return None, "seeds of different test sets"
            means.append(np.mean(items, axis=0))
    if not means or len({len(m) for m in means}) > 1 or len(data) > 1:
        return None, "no scores" if not means else "pretraining seeds of different test sets"
    return np.mean(means, axis=0), data.pop()


def by_seed(ours, claim, column):
    """{pretraining seed that both models have: difference of their selected test scores, in points}"""
    scores = []
    for name in (claim.better, claim.worse):
        found = {seed: select(rows, "standard") for seed, rows in ours.rows[name, column].items()}
        scores.append({seed: 100 * f["mean"] for seed, f in found.items() if f})
    return {s: scores[0][s] - scores[1][s] for s in sorted(scores[0].keys() & scores[1].keys())}


def paired_tests(ours, known=()):
    """A test a claim and task that both models share a pretraining seed of, as dicts for JSON, differences in points.

    {"ordering", "better", "worse", "family", "task", "by_seed" (of selected scores), "items" (their number), "difference" (of their
    means), "half_width" (1.96 standard errors over examples), "p", "why" there is none, "holm" (corrected p), "verdict"}.
    known: tests of an earlier report, for rows whose examples are not here."""
    earlier = {(t["better"], t["worse"], t["task"]): t for t in known if t["p"] is not None}
    found = []
    for claim in claims(ours.names):
        for family, column in ((f, c) for f in claim.families for c in ours.columns.get(f, ())):
            seeds = by_seed(ours, claim, column)
            if not seeds:
                continue
            test = {"ordering": claim.ordering, "better": claim.better, "worse": claim.worse, "family": family, "task": column,
                    "by_seed": list(seeds.values()), "items": 0, "difference": None, "half_width": None, "p": None}
            (a, of_a), (b, of_b) = (items_of(ours, name, column, seeds) for name in (claim.better, claim.worse))
            if a is None or b is None:
                test["why"] = of_a if a is None else of_b
            elif len(a) != len(b) or of_a != of_b:
                test["why"] = "different test sets"
            else:
                d = 100 * (a - b)
                test |= {"items": len(d), "difference": float(d.mean()), "p": sign_flip(d),
                         "half_width": float(1.96 * d.std(ddof=1) / len(d) ** 0.5) if len(d) > 1 else None}
            found.append(earlier.get((claim.better, claim.worse, column), test) if test["p"] is None else test)
    tested = [t for t in found if t["p"] is not None]
    for test, p in zip(tested, holm([t["p"] for t in tested])):
        test["holm"] = p
    for test in found:
        test["verdict"] = verdict(test)
    return found


def verdict(test):
    """Of one test. "confirmed" wants both: examples (Holm's p below ALPHA), and pretraining seeds (a 95 % t interval on the claim's
    side of 0). With examples alone it holds for these checkpoints; not where the task's own score says the opposite."""
    seeds = test["by_seed"]
    mean, half = (float(np.mean(seeds)), interval(seeds, "standard")) if len(seeds) > 1 else (0.0, float("nan"))
    of_seeds = 1 if mean - half > 0 else -1 if mean + half < 0 else 0
    if test["p"] is None:
        return {1: "confirmed by pretraining seeds alone", -1: "the other way round by pretraining seeds alone"}.get(
            of_seeds, "not separated by pretraining seeds" if len(seeds) > 1 else "not tested")
    if test["holm"] >= ALPHA:
        return "not separated"
    side = 1 if test["difference"] > 0 else -1
    if np.mean(seeds) * side < 0:      # entity F1 of a set and macro F1 of its sentences can
        return "examples and score disagree"
    return ("confirmed" if side > 0 else "the other way round") + " for these checkpoints" * (of_seeds != side)


def summary(tests):
    """{ordering: verdict in words} of the orderings that rows speak to."""
    found = {}
    for ordering in sorted({t["ordering"] for t in tests}):
        counts = {}
        for t in tests:
            if t["ordering"] == ordering:
                counts[t["verdict"]] = counts.get(t["verdict"], 0) + 1
        n = sum(counts.values())
        found[ordering] = next(iter(counts)) + f" ({n} of {n})" if len(counts) == 1 else ", ".join(
            f"{k} of {n} {word}" for word, k in sorted(counts.items(), key=lambda c: -c[1]))
    return found
