"""Examples to ids and back: nothing is shifted, lost in silence, or labelled on the wrong token."""
import os

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared

from core import tokenizer
from core.files import unique
from tasks import loading, packing, registry
from tasks.family import Outputs, Split
from tasks.question_answering import LONGEST_ANSWER, Prediction, best_span, best_threshold, gold_texts

WORDS = ["In", "1996", ",", "Żółw", "the", "U.N.", "'s", "café", "日本", "$", "3,000", "won", "(", "Dr.", "O'Neill", ")"]


@pytest.fixture(scope="module")
def tok(corpus_dir):
    return tokenizer.load(corpus_dir)


def split(name, part="test", data_dir="", mode="standard"):
    task, examples, _ = loading.load(name, data_dir)
    return registry.family_of(task, mode), examples[part]


def oracle(family, examples, encoded):
    """Head outputs that give every target the highest score, in float32."""
    outputs = []
    for i, length in enumerate(packing.lengths(encoded)):
        targets, _ = family.targets(encoded, [i])
        if targets["ids"].shape == (1, 2):
            o = np.zeros((length, 2), np.float32)
            o[targets["ids"][0], [0, 1]] = 9.0
        else:
            ids = np.maximum(targets["ids"], 0)
            o = np.eye(len(family.task.labels) or 2, dtype=np.float32)[ids]
        outputs.append(o)
    return Outputs(examples, encoded, outputs)


def test_targets_of_a_regression_stay_fractions(tok):
    class Regression(type(split("sotu_era")[0])):
        def encode(self, examples, tokenizer, max_length):
            for index, (sequence,), is_cut in super().encode(examples, tokenizer, max_length):
                yield index, [sequence | {"target": np.array(index / 8)}], is_cut
    family, examples = split("sotu_era")
    encoded = packing.encode(Regression(family.task, "standard"), examples[:4], tok, max_length=32)
    batch = packing.batch_of(encoded, [1, 3], "cpu", family.targets(encoded, [1, 3])[0])
    assert batch.targets["ids"].dtype == torch.float32 and batch.targets["ids"].tolist() == [0.125, 0.375]


def test_a_text_is_its_ids_and_eos_and_a_long_one_is_cut_before_it(tok):
    family, examples = split("sotu_era")
    encoded = packing.encode(family, examples, tok, max_length=32)
    full = [tok.encode(e["text"]) for e in examples]
    for i, ids in enumerate(full):
        assert packing.rows(encoded, "tokens", [i]).tolist() == ids[:31] + [tok.eos_id]
    assert encoded["truncated"] == sum(len(ids) > 31 for ids in full) > 0
    assert encoded["target"].tolist() == [e["label"] for e in examples]


def test_words_encoded_apart_are_the_joint_text_and_labels_sit_on_their_first_visible_token(tok):
    ours, papers = (registry.family_of(registry.TASKS["conll2003"], mode) for mode in ("standard", "paper"))
    examples = [{"words": WORDS, "tags": [i % 9 for i in range(len(WORDS))]}]
    encoded = packing.encode(ours, examples, tok, max_length=500)
    assert encoded["tokens"][:-1].tolist() == tok.encode(" ".join(WORDS))
    first = np.flatnonzero(encoded["first"])
    assert encoded["word"][first].tolist() == list(range(len(WORDS)))          # one a word, in order
    for token in first:
        assert tok.encoding.decode_single_token_bytes(int(encoded["tokens"][token])).strip()
    standard, n = ours.targets(encoded, [0])
    assert n == len(WORDS) and standard["ids"][first].tolist() == examples[0]["tags"]
    paper, n = papers.targets(encoded, [0])
    assert n == len(encoded["tokens"]) - 1 and (paper["ids"][:-1] == np.array(examples[0]["tags"])[encoded["word"][:-1]]).all()


@pytest.mark.parametrize("mode", ["standard", "paper"])
def test_perfect_outputs_give_a_perfect_token_score_and_words_beyond_the_limit_count_as_o(tok, mode):
    family, examples = split("sotu_case", mode=mode)
    outputs = oracle(family, examples, packing.encode(family, examples, tok, max_length=500))
    scores, items = family.score(outputs, family.predict(outputs))
    assert scores["score"] == scores["f1"] == scores["strict_f1"] == scores["sentence_macro_f1"] == 1 and len(items) == 600
    short = packing.encode(family, examples, tok, max_length=16)
    assert short["truncated"] > 300
    outputs = oracle(family, examples, short)
    predictions = family.predict(outputs)
    assert [len(labels) for labels in predictions] == [len(e["words"]) for e in examples]
    assert family.score(outputs, predictions)[0]["recall"] < 0.9


def test_the_majority_of_a_words_tokens_decides_in_the_papers_mode_and_its_first_in_ours(tok):
    ours, papers = (registry.family_of(registry.TASKS["conll2003"], mode) for mode in ("standard", "paper"))
    examples = [{"words": ["Ouagadougou"], "tags": [5]}]
    encoded = packing.encode(ours, examples, tok, max_length=500)
    n = len(encoded["tokens"])
    assert n >= 4
    outputs = Outputs(examples, encoded, [np.eye(9, dtype=np.float32)[[1, *[5] * (n - 2), 0]]])
    assert papers.predict(outputs) == [["B-LOC"]]
    assert ours.predict(outputs) == [["B-PER"]]


def check_windows(family, examples, tok, max_length):
    """Every token of every context is in a window; every answer short enough comes back, whole and as text."""
    encoded = packing.encode(family, examples, tok, max_length)
    assert packing.lengths(encoded).max() <= max_length
    for k, e in enumerate(examples):
        spans = [packing.rows(encoded, "token_chars", [i]) for i in np.flatnonzero(encoded["example"] == k)]
        seen = {tuple(s) for part in spans for s in part.tolist() if s[0] >= 0}
        assert seen == set(map(tuple, tok.encode_with_offsets(e["context"])[1].tolist()))
    outputs = oracle(family, examples, encoded)
    _, scored = family.evaluate(outputs, outputs)
    return encoded, scored


def test_windows_cover_a_passage_and_hold_its_answers(tok):
    family, examples = split("sotu_cloze")
    one, (scores, _) = check_windows(family, examples[:200], tok, 500)
    many, (windowed, _) = check_windows(family, examples[:200], tok, 80)
    assert len(one["example"]) == 200 < len(many["example"]) / 3
    # spans are whole tokens: an answer that ends inside of one comes with the rest of it; the entity is exact
    assert scores["em"] == windowed["em"] == 1 and scores["free_f1"] > 0.95 and windowed["free_f1"] > 0.9


@needs_shared
@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_real_answers_come_back_from_their_tokens(tok, name):
    family, examples = split(name, data_dir=SHARED)
    _, (scores, items) = check_windows(family, examples[:250], tok, 256)
    within = [not e["answers"] or len(tok.encode(e["answers"][0][0])) <= LONGEST_ANSWER for e in examples[:250]]
    assert all(item == 1 for item, short in zip(items, within) if short) and scores["f1"] > 0.9 and sum(within) > 200


def test_a_question_without_an_answer_points_at_eos_and_needs_every_window_to_say_so(tok):
    family = registry.family_of(registry.TASKS["squad_v2"])
    context = "The first paragraph says nothing. " * 30 + "Ada wrote the program."
    examples = [{"question": "Who?", "context": context, "answers": answers, "entities": []}
                for answers in ([], [("Ada", context.index("Ada"))])]
    encoded = packing.encode(family, examples, tok, 128)
    windows = [np.flatnonzero(encoded["example"] == k) for k in (0, 1)]
    assert len(windows[0]) >= 3
    length = packing.lengths(encoded)
    for i in [*windows[0], *windows[1][:-1]]:
        assert family.targets(encoded, [i])[0]["ids"].tolist() == [[length[i] - 1] * 2]
    outputs = oracle(family, examples, encoded)
    none, ada = family.predict(outputs)
    assert none.no_answer_margin > 0 and ada.text == "Ada" and ada.no_answer_margin < 0
    outputs.logits[windows[0][1]][40] = 8.0          # one window has an answer, less sure than all are of "none"
    assert family.predict(outputs)[0].no_answer_margin > 0
    outputs.logits[windows[0][1]][-1] = 0.0          # ... and does not say "none" itself: the least sure window decides
    assert family.predict(outputs)[0].no_answer_margin < 0


def test_an_answer_is_looked_for_in_the_context_and_never_in_the_question(tok):
    family, examples = split("sotu_cloze")
    encoded = packing.encode(family, examples[:3], tok, 500)
    targets, n = family.targets(encoded, [0, 1, 2])
    batch = packing.batch_of(encoded, [0, 1, 2], "cpu", targets)
    logits = torch.zeros(sum(batch.lengths), 2, requires_grad=True)
    loss = family.loss(logits, batch)
    loss.backward()
    allowed = [length - len(tok.encode(f"Question: {e['question']}\nContext: ")) for length, e in zip(batch.lengths, examples)]
    assert loss.item() == pytest.approx(sum(np.log(allowed))) and n == 3        # eos, "no answer", is one of them
    assert (logits.grad[:, 0] != 0).sum() == (logits.grad[:, 1] != 0).sum() == sum(allowed)


def test_the_threshold_of_no_answer_is_validations_best_and_the_test_set_keeps_it():
    family, rng = registry.family_of(registry.TASKS["squad_v2"]), np.random.default_rng(0)
    data = Split([{"answers": [("Ada", 0)] if i % 2 else []} for i in range(40)], {})
    gold = gold_texts(data.examples)
    answers = [Prediction("Ada" if rng.random() < 0.5 else "Grace", no_answer_margin=float(rng.normal() + (i % 2 == 0))) for i in range(40)]
    scores, items = family.score(data, answers, best_threshold(answers, gold))
    at = {t: family.score(data, answers, t)[0] for t in [a.no_answer_margin for a in answers] + [-9.0, 0.0]}
    assert scores["f1"] == max(s["f1"] for s in at.values()) > at[-9.0]["f1"] == 0.5 and sum(items) / 40 == scores["score"]
    assert scores == at[scores["null_threshold"]] and scores["untuned_f1"] == at[0.0]["f1"] < scores["f1"]
    wrong = [Prediction("Grace", no_answer_margin=-5.0)] * 40                  # never right: it abstains, and equals the baseline
    scores, _ = family.score(data, wrong, best_threshold(wrong, gold))
    assert scores["f1"] == scores["no_answer_f1"] / 2 == 0.5 and scores["untuned_f1"] == 0


def test_a_threshold_does_not_part_questions_of_one_margin():
    """Answering the first of two equal margins alone would be best, but no threshold does that."""
    gold = [["Ada"], [], ["Ada"]]
    answers = [Prediction("Ada", no_answer_margin=1.0), Prediction("Ada", no_answer_margin=1.0), Prediction("Ada", no_answer_margin=0.0)]
    assert best_threshold(answers, gold) == 0.0
    assert best_threshold(answers[:2], gold[:2]) == 0.0      # below both: the same F1, and no answer more


def test_the_papers_question_answering_tags_the_first_answers_tokens_and_scores_their_set(tok):
    family, examples = split("sotu_cloze", mode="paper")
    encoded = packing.encode(family, examples, tok, 500)
    assert len(encoded["example"]) == len(examples)
    outputs = oracle(family, examples, encoded)
    predictions = family.predict(outputs)
    scores, items = family.score(outputs, predictions)
    assert scores["score"] == 1 and len(items) == len(examples) and all(predictions)
    assert family.score(outputs, [set()] * len(examples))[0]["score"] == 0


def test_the_best_span_is_that_of_a_search_through_all():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 50):
        for _ in range(20):
            start, end, allowed = rng.normal(size=n), rng.normal(size=n), rng.random(n) < 0.7
            spans = [(start[i] + end[j], i, j) for i in range(n) for j in range(i, min(n, i + 30)) if allowed[i] and allowed[j]]
            score, i, j = best_span(start, end, allowed)
            if spans:
                assert (score, i, j) == pytest.approx(max(spans))
            else:
                assert score == -np.inf


def test_a_budget_is_kept_and_a_longer_sequence_goes_alone():
    encoded = {"bounds": np.cumsum([0, 5, 50, 7, 7, 7])}
    assert packing.by_budget(np.arange(5), encoded, 14) == [[0], [1], [2, 3], [4]]


def test_the_cache_is_read_back_and_made_anew_for_other_data_tokenizer_or_length(tok, tmp_path):
    task, examples, _ = loading.load("sotu_case")
    family, folder = registry.family_of(task), str(tmp_path / "cache")

    def encode(examples, tok, max_length):
        return packing.encode_task("sotu_case", family, examples, loading.fingerprint(examples), tok, max_length, folder)

    few = {k: v[:50] for k, v in examples.items()}
    made = encode(few, tok, 500)
    path = os.path.join(folder, *os.listdir(folder))
    before = os.stat(path).st_mtime_ns
    again = encode(few, tok, 500)
    assert os.stat(path).st_mtime_ns == before
    for s in made:
        assert made[s].keys() == again[s].keys() and all((made[s][k] == again[s][k]).all() for k in made[s])
    encode(few, tok, 400)
    encode({k: v[1:50] for k, v in examples.items()}, tok, 500)
    encode(few, tokenizer.get("train:512", ["some other text, " * 200 + e["words"][0] for e in examples["train"]]), 500)
    assert len(os.listdir(folder)) == 4
    with open(path, "rb") as f:
        content = f.read()
    for damaged in (b"", content[:100], bytes(len(content)), content[:-9] + bytes(9), content[:-1] + bytes([content[-1] ^ 1])):
        with open(path, "wb") as f:
            f.write(damaged)                  # a damaged file is no data
        again = encode(few, tok, 500)
        assert (again["test"]["tokens"] == made["test"]["tokens"]).all()


def test_what_a_killed_process_left_in_the_cache_goes_after_a_day(tmp_path):
    def make(value):
        return packing.cached_json(str(tmp_path), "x", [value], lambda: value, int)
    assert make(1) == 1
    (made,) = tmp_path.iterdir()
    old, young = tmp_path / f"{made.name}.host.1", tmp_path / f"{made.name}.host.2"
    old.mkdir()
    (old / "tokens.bin").write_text("")
    young.write_text("")
    for path in (old / "tokens.bin", old):
        os.utime(path, (1, 1))
    made.write_text("")
    assert make(1) == 1 and set(tmp_path.iterdir()) == {made, young}


def test_of_two_processes_that_make_a_folder_of_the_cache_the_faster_one_wins(tmp_path):
    def write(path):
        final = path.removesuffix(unique(""))
        for folder, maker in ((final, "the other"), (path, "this")):
            os.makedirs(folder)
            with open(os.path.join(folder, "maker"), "w") as f:
                f.write(maker)

    def read(path):
        with open(os.path.join(path, "maker")) as f:
            return f.read()
    assert packing.cached(str(tmp_path), "x", [1], write, read) == "the other"
    assert len(os.listdir(tmp_path)) == 1
