"""The labels of words: whatever the scheme, the entities are the same, and what is no scheme is refused by name."""
import json

import numpy as np
import pytest

from core import tokenizer
from core.configurator import UserError
from tasks import loading, metrics, packing
from tasks.family import Outputs, Split
from tasks.label_schemes import scheme_of
from tasks.registry import TASKS, Task, family_of, iob2

# one sentence: PER of two words, O, LOC, LOC of one word each (IO and plain labels cannot part neighbours: no second LOC)
SENTENCES = {
    "IOB2": (iob2("PER", "LOC"), "B-PER I-PER O B-LOC B-LOC"),
    "IOB1": (("O", "I-PER", "I-LOC", "B-LOC"), "I-PER I-PER O I-LOC B-LOC"),
    "IO": (("O", "I-PER", "I-LOC"), "I-PER I-PER O I-LOC"),
    "BIOES": (("O", "B-PER", "E-PER", "I-PER", "S-LOC"), "B-PER E-PER O S-LOC S-LOC"),
    "IOE2": (("O", "I-PER", "E-PER", "E-LOC"), "I-PER E-PER O E-LOC E-LOC"),
    "BILOU": (("O", "B-PER", "L-PER", "U-LOC"), "B-PER L-PER O U-LOC U-LOC"),
    "BMEWO": (("O", "B_PER", "M_PER", "E_PER", "W_LOC"), "B_PER E_PER O W_LOC W_LOC"),
    "suffix": (("PER-B", "PER-I", "LOC-B", "O"), "PER-B PER-I O LOC-B LOC-B"),
    "suffixed BIOES": (("PER-B", "PER-E", "PER-I", "LOC-S", "O"), "PER-B PER-E O LOC-S LOC-S"),
    "lower case": (("other", "b-PER", "i-PER", "b-LOC"), "b-PER i-PER other b-LOC b-LOC"),
    "plain": (("PER", "O", "LOC"), "PER PER O LOC"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_each_scheme_says_the_same_entities(name):
    labels, sentence = SENTENCES[name]
    tags = scheme_of(labels).as_iob2(sentence.split())
    expected = {("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5)}
    assert metrics.entities(tags) == {span for span in expected if span[2] <= len(tags)}


def test_letters_without_a_type_are_entities_of_one_type():
    assert metrics.entities(scheme_of(("B", "I", "O")).as_iob2("B I O B B".split())) == {("", 0, 2), ("", 3, 4), ("", 4, 5)}
    assert metrics.entities(scheme_of(("B", "M", "E", "S")).as_iob2("B M E S B E".split())) == {("", 0, 3), ("", 3, 4), ("", 4, 6)}


def test_the_labels_of_the_papers_tasks_are_read_as_they_stand():
    for name in ("conll2003", "ontonotes5", "uner", "sotu_case"):
        scheme = scheme_of(TASKS[name].labels)
        assert scheme.name == "IOB" and scheme.outside == "O" and scheme.note == ""
        assert scheme.as_iob2(TASKS[name].labels) == list(TASKS[name].labels)


@pytest.mark.parametrize("labels, says", [
    (("O", "B-PER", "I-PER", "X"), r"mix two schemes \(X beside B-PER, I-PER\)"),
    (("O", "B-PER", "I-PER", "PER"), r"mix two schemes \(PER beside"),
    (("O", "B-PER", "I_PER"), "mix two schemes"),
    (("O", "B-PER", "L-PER", "E-PER"), "mix two schemes"),
    (("O", "OTHER", "B-PER"), "mix two schemes"),
])
def test_labels_of_two_schemes_are_refused_by_name(labels, says):
    with pytest.raises(UserError, match=says):
        family_of(Task("token", labels))


@pytest.mark.parametrize("labels", [("NOUN", "VERB", "X", "PUNCT"), ("N", "O", "V", ",", "!"), ("NN", "IN", "-LRB-", "PRP$", "."), ("B", "I", "N", "V")])
def test_parts_of_speech_are_scored_by_accuracy_and_mean_f1(labels):
    family = family_of(Task("token", labels))
    split = Split([{"words": ["a"] * 4, "tags": [0, 0, 1, 2]}], {})
    scores, _ = family.score(split, [[labels[0]] * 3 + [labels[2]]])
    assert scores["score"] == scores["accuracy"] == 0.75 and scores["macro_f1"] == pytest.approx((0.8 + 0 + 1) / 3) and "f1" not in scores
    assert family.baseline({"train": split, "test": split}) == {"name": "majority", "score": 0.5} and "accuracy" in family.notes[0]


@pytest.mark.parametrize("mode", ["standard", "paper"])
@pytest.mark.parametrize("labels, unseen", [(("B-PER", "I-PER", "O"), "O"), (("N", "V", "X"), None)])
def test_words_behind_the_cut_are_outside_wherever_that_label_stands(corpus_dir, mode, labels, unseen):
    tok = tokenizer.load(corpus_dir)
    family = family_of(Task("token", labels), mode)
    examples = [{"words": ["nobody", "here"] * 30, "tags": [2] * 60}]
    encoded = packing.encode(family, examples, tok, 32)
    right = np.tile(np.eye(3, dtype=np.float32)[2], (len(encoded["tokens"]), 1))
    labels_of_words, = family.predict(Outputs(examples, encoded, [right]))
    assert labels_of_words[0] == labels[2] and labels_of_words[-1] == unseen and len(labels_of_words) == 60
    scores, _ = family.score(Split(examples, encoded), [labels_of_words])
    if unseen is None:      # never seen is wrong, and no label of its own
        n = labels_of_words.count("X")
        assert scores["accuracy"] == n / 60 and scores["macro_f1"] == pytest.approx(2 * n / (n + 60))
    else:
        assert labels_of_words == ["O"] * 60


def test_a_folder_of_another_scheme_is_scored_and_the_reader_is_told(tmp_path):
    labels, sentence = SENTENCES["BIOES"]
    (tmp_path / "mine").mkdir()
    info = {"label_names": labels, "text_fields": ["tokens"], "label_field": "ner"}
    (tmp_path / "mine" / "info.json").write_text(json.dumps(info))
    for name in ("train", "validation", "test"):
        row = json.dumps({"tokens": list("abcde"), "ner": sentence.split()})
        (tmp_path / "mine" / f"{name}.jsonl").write_text(row)
    task, examples, notes = loading.load("mine", str(tmp_path))
    assert notes == ["labels read as BIOES"]
    scores, _ = family_of(task).score(Split(examples["test"], {}), [sentence.split()])
    assert scores["score"] == scores["f1"] == 1.0 and "strict_f1" not in scores
