"""Examples to ids and back: nothing is shifted, lost in silence, or labelled on the wrong token."""
import os

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared

from core import tokenizer
from tasks import families, packing, registry

WORDS = ["In", "1996", ",", "Żółw", "the", "U.N.", "'s", "café", "日本", "$", "3,000", "won", "(", "Dr.", "O'Neill", ")"]


@pytest.fixture(scope="module")
def tok(corpus_dir):
    return tokenizer.load(corpus_dir)


def split(name, part="test", data_dir=""):
    task, examples, _ = registry.load(name, data_dir)
    return task, examples[part]


def oracle(task, encoded, mode):
    """Head outputs that give every target the highest score, in float32."""
    outputs = []
    for i in range(len(encoded["example"])):
        targets, _ = families.family(task, mode)[0](encoded, [i], mode)
        length = packing.lengths(encoded)[i]
        if task.kind == "span" and mode == "standard":
            o = np.zeros((length, 2), np.float32)
            o[targets["ids"][0], [0, 1]] = 9.0
        else:
            ids = np.maximum(targets["ids"], 0)
            o = np.eye(len(task.labels) or 2, dtype=np.float32)[ids]
        outputs.append(o)
    return outputs


def test_a_text_is_its_ids_and_eos_and_a_long_one_is_cut_before_it(tok):
    task, examples = split("sotu_era")
    encoded = packing.encode(task, examples, tok, max_length=32)
    full = [tok.encode(e["text"]) for e in examples]
    for i, ids in enumerate(full):
        assert packing.rows(encoded, "tokens", [i]).tolist() == ids[:31] + [tok.eos_id]
    assert encoded["truncated"] == sum(len(ids) > 31 for ids in full) > 0
    assert encoded["target"].tolist() == [e["label"] for e in examples]


def test_words_encoded_apart_are_the_joint_text_and_labels_sit_on_their_first_visible_token(tok):
    task, examples = registry.TASKS["conll2003"], [{"words": WORDS, "tags": [i % 9 for i in range(len(WORDS))]}]
    encoded = packing.encode(task, examples, tok, max_length=500)
    assert encoded["tokens"][:-1].tolist() == tok.encode(" ".join(WORDS))
    first = np.flatnonzero(encoded["first"])
    assert encoded["word"][first].tolist() == list(range(len(WORDS)))          # one a word, in order
    for token in first:
        assert tok.encoding.decode_single_token_bytes(int(encoded["tokens"][token])).strip()
    standard, n = families.token_targets(encoded, [0], "standard")
    assert n == len(WORDS) and standard["ids"][first].tolist() == examples[0]["tags"]
    paper, n = families.token_targets(encoded, [0], "paper")
    assert n == len(encoded["tokens"]) - 1 and (paper["ids"][:-1] == np.array(examples[0]["tags"])[encoded["word"][:-1]]).all()


@pytest.mark.parametrize("mode", ["standard", "paper"])
def test_perfect_outputs_give_a_perfect_token_score_and_words_beyond_the_limit_count_as_o(tok, mode):
    task, examples = split("sotu_case")
    encoded = packing.encode(task, examples, tok, max_length=500)
    found = families.token_predictions(task, examples, encoded, oracle(task, encoded, mode), mode)
    scores, items = families.token_scores(task, examples, encoded, found, mode)
    assert scores["score"] == scores["f1"] == scores["strict_f1"] == scores["sentence_macro_f1"] == 1 and len(items) == 600
    short = packing.encode(task, examples, tok, max_length=16)
    assert short["truncated"] > 300
    found = families.token_predictions(task, examples, short, oracle(task, short, mode), mode)
    assert [len(f) for f in found] == [len(e["words"]) for e in examples]
    assert families.token_scores(task, examples, short, found, mode)[0]["recall"] < 0.9


def test_the_majority_of_a_words_tokens_decides_in_the_papers_mode_and_its_first_in_ours(tok):
    task, examples = registry.TASKS["conll2003"], [{"words": ["Ouagadougou"], "tags": [5]}]
    encoded = packing.encode(task, examples, tok, max_length=500)
    n = len(encoded["tokens"])
    assert n >= 4
    outputs = [np.eye(9, dtype=np.float32)[[1, *[5] * (n - 2), 0]]]
    assert families.token_predictions(task, examples, encoded, outputs, "paper") == [["B-LOC"]]
    assert families.token_predictions(task, examples, encoded, outputs, "standard") == [["B-PER"]]


def check_windows(task, examples, tok, max_length):
    """Every token of every context is in a window; every answer short enough comes back, whole and as text."""
    encoded = packing.encode(task, examples, tok, max_length)
    assert packing.lengths(encoded).max() <= max_length
    for k, e in enumerate(examples):
        spans = [packing.rows(encoded, "span", [i]) for i in np.flatnonzero(encoded["example"] == k)]
        seen = {tuple(s) for part in spans for s in part.tolist() if s[0] >= 0}
        assert seen == set(map(tuple, tok.encode_with_offsets(e["context"])[1].tolist()))
    found = families.span_predictions(task, examples, encoded, oracle(task, encoded, "standard"), "standard")
    return encoded, families.span_scores(task, examples, encoded, found, "standard")


def test_windows_cover_a_passage_and_hold_its_answers(tok):
    task, examples = split("sotu_cloze")
    one, (scores, _) = check_windows(task, examples[:200], tok, 500)
    many, (windowed, _) = check_windows(task, examples[:200], tok, 80)
    assert len(one["example"]) == 200 < len(many["example"]) / 3
    # spans are whole tokens: an answer that ends inside of one comes with the rest of it; the entity is exact
    assert scores["em"] == windowed["em"] == 1 and scores["free_f1"] > 0.95 and windowed["free_f1"] > 0.9


@needs_shared
@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_real_answers_come_back_from_their_tokens(tok, name):
    task, examples = split(name, data_dir=SHARED)
    _, (scores, items) = check_windows(task, examples[:250], tok, 256)
    within = [not e["answers"] or len(tok.encode(e["answers"][0][0])) <= families.LONGEST_ANSWER for e in examples[:250]]
    assert all(item == 1 for item, short in zip(items, within) if short) and scores["f1"] > 0.9 and sum(within) > 200


def test_a_question_without_an_answer_points_at_eos_and_needs_every_window_to_say_so(tok):
    task = registry.TASKS["squad_v2"]
    context = "The first paragraph says nothing. " * 30 + "Ada wrote the program."
    examples = [{"question": "Who?", "context": context, "answers": answers, "entities": []}
                for answers in ([], [("Ada", context.index("Ada"))])]
    encoded = packing.encode(task, examples, tok, 128)
    windows = [np.flatnonzero(encoded["example"] == k) for k in (0, 1)]
    assert len(windows[0]) >= 3
    length = packing.lengths(encoded)
    for i in [*windows[0], *windows[1][:-1]]:
        assert families.span_targets(encoded, [i], "standard")[0]["ids"].tolist() == [[length[i] - 1] * 2]
    outputs = oracle(task, encoded, "standard")

    def found():
        return families.span_predictions(task, examples, encoded, outputs, "standard")

    assert found()[0][1] > 0 and found()[1][0] == "Ada" and found()[1][1] < 0
    outputs[windows[0][1]][40] = 8.0                 # one window has found something, less sure than all are of "none"
    assert found()[0][1] > 0
    outputs[windows[0][1]][-1] = 0.0                 # ... and does not say "none" itself: the least sure window decides
    assert found()[0][1] < 0


def test_an_answer_is_looked_for_in_the_context_and_never_in_the_question(tok):
    task, examples = split("sotu_cloze")
    encoded = packing.encode(task, examples[:3], tok, 500)
    targets, n = families.span_targets(encoded, [0, 1, 2], "standard")
    lengths = packing.lengths(encoded).tolist()
    logits = torch.zeros(sum(lengths), 2, requires_grad=True)
    loss = families.span_loss(logits, {k: torch.from_numpy(v) for k, v in targets.items()}, lengths)
    loss.backward()
    allowed = [length - len(tok.encode(f"Question: {e['question']}\nContext: ")) for length, e in zip(lengths, examples)]
    assert loss.item() == pytest.approx(sum(np.log(allowed))) and n == 3        # eos, "no answer", is one of them
    assert (logits.grad[:, 0] != 0).sum() == (logits.grad[:, 1] != 0).sum() == sum(allowed)


def test_the_threshold_of_no_answer_is_validations_best_and_the_test_set_keeps_it():
    task, rng = registry.TASKS["squad_v2"], np.random.default_rng(0)
    examples = [{"answers": [("Ada", 0)] if i % 2 else []} for i in range(40)]
    found = [("Ada" if rng.random() < 0.5 else "Grace", float(rng.normal() + (i % 2 == 0))) for i in range(40)]
    scores, items = families.span_scores(task, examples, None, found, "standard")
    at = {t: families.span_scores(task, examples, None, found, "standard", t)[0] for t in [m for _, m in found] + [-9.0, 0.0]}
    assert scores["f1"] == max(s["f1"] for s in at.values()) > at[-9.0]["f1"] == 0.5 and sum(items) / 40 == scores["score"]
    assert scores == at[scores["null_threshold"]] and scores["untuned_f1"] == at[0.0]["f1"] < scores["f1"]
    wrong = [("Grace", -5.0)] * 40                  # never right: it abstains, and equals the baseline
    scores, _ = families.span_scores(task, examples, None, wrong, "standard")
    assert scores["f1"] == scores["no_answer_f1"] / 2 == 0.5 and scores["untuned_f1"] == 0


def test_the_papers_question_answering_tags_the_first_answers_tokens_and_scores_their_set(tok):
    task, examples = split("sotu_cloze")
    encoded = packing.encode(task, examples, tok, 500, windows=False)
    assert len(encoded["example"]) == len(examples)
    found = families.tag_predictions(task, examples, encoded, oracle(task, encoded, "paper"), "paper")
    scores, items = families.tag_scores(task, examples, encoded, found, "paper")
    assert scores["score"] == 1 and len(items) == len(examples) and all(found)
    assert families.tag_scores(task, examples, encoded, [set()] * len(examples), "paper")[0]["score"] == 0


def test_the_best_span_is_that_of_a_search_through_all():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 50):
        for _ in range(20):
            start, end, allowed = rng.normal(size=n), rng.normal(size=n), rng.random(n) < 0.7
            spans = [(start[i] + end[j], i, j) for i in range(n) for j in range(i, min(n, i + 30)) if allowed[i] and allowed[j]]
            score, i, j = families.best_span(start, end, allowed)
            if spans:
                assert (score, i, j) == pytest.approx(max(spans))
            else:
                assert score == -np.inf


def test_a_budget_is_kept_and_a_longer_sequence_goes_alone():
    encoded = {"bounds": np.cumsum([0, 5, 50, 7, 7, 7])}
    assert packing.by_budget(np.arange(5), encoded, 14) == [[0], [1], [2, 3], [4]]


def test_the_cache_is_read_back_and_made_anew_for_other_data_tokenizer_or_length(tok, tmp_path):
    task, examples, _ = registry.load("sotu_case")
    args = task, {k: v[:50] for k, v in examples.items()}
    folder = str(tmp_path / "cache")
    made = packing.cached("sotu_case", *args, tok, 500, True, folder)
    path = os.path.join(folder, *os.listdir(folder))
    before = os.stat(path).st_mtime_ns
    again = packing.cached("sotu_case", *args, tok, 500, True, folder)
    assert os.stat(path).st_mtime_ns == before
    for s in made:
        assert made[s].keys() == again[s].keys() and all((made[s][k] == again[s][k]).all() for k in made[s])
    packing.cached("sotu_case", *args, tok, 400, True, folder)
    packing.cached("sotu_case", task, {k: v[1:50] for k, v in examples.items()}, tok, 500, True, folder)
    packing.cached("sotu_case", *args, tokenizer.get("train:512", ["some other text, " * 200 + e["words"][0] for e in examples["train"]]),
                  500, True, folder)
    assert len(os.listdir(folder)) == 4
    with open(path, "r+b") as f:
        f.truncate(100)                       # a damaged file is no data
    again = packing.cached("sotu_case", *args, tok, 500, True, folder)
    assert (again["test"]["tokens"] == made["test"]["tokens"]).all()
