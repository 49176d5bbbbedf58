"""The data sets: what a row must look like, where validation comes from, and that what changed is noticed."""
import dataclasses
import json
import lzma
import os

import datasets
import pytest
from conftest import SHARED, needs_shared

from core.configurator import UserError
from tasks import demo, loading, registry


def write(folder, name, **splits):
    """A local data set: folder/name/SPLIT.jsonl."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def sst2(n, start=0):
    return [{"idx": i, "sentence": f"sentence number {i} is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(start, start + n)]


def test_the_table_has_the_papers_nine_with_its_labels_and_sizes():
    assert registry.PAPER == ("sst2", "mnli", "qqp", "conll2003", "ontonotes5", "uner", "squad", "squad_v2", "record")
    assert [len(registry.TASKS[n].labels) for n in registry.PAPER[:6]] == [2, 3, 2, 9, 37, 7]
    for name in registry.PAPER:
        task = registry.TASKS[name]
        assert task.hub.count("/") == 1 and sum(map(bool, task.sizes)) == sum(map(bool, task.splits)) and task.kind in registry.FAMILIES
        if task.kind == "token":       # every entity type can begin and go on
            types = {label[2:] for label in task.labels if label != "O"}
            assert {f"{b}-{t}" for t in types for b in "BI"} | {"O"} == set(task.labels) and task.labels[0] == "O"


def test_local_files_of_the_hubs_fields_packed_or_not(tmp_path):
    folder = write(tmp_path, "deeper/sst2", train=sst2(50), validation=sst2(9, 50), test=sst2(7, 90))
    path = tmp_path / "deeper/sst2/test.jsonl"
    (tmp_path / "deeper/sst2/test.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    _, examples, notes = loading.load("sst2", folder)
    assert {k: len(v) for k, v in examples.items()} == {"train": 50, "validation": 9, "test": 7} and not notes
    assert examples["test"][1] == {"text": "sentence number 91 is good", "label": 1}


def test_a_folder_with_labels_of_its_own_is_a_task(tmp_path):
    rows = [{"a": f"left {i}", "b": "right", "sense": "no" if i % 3 else "yes"} for i in range(40)]
    folder = write(tmp_path, "mine", train=rows, validation=rows, test=rows)
    (tmp_path / "mine/info.json").write_text(json.dumps({"label_names": ["yes", "no"], "text_fields": ["a", "b"], "label_field": "sense"}))
    task, examples, _ = loading.load("mine", folder)
    assert task.kind == "sequence" and examples["train"][1] == {"text": "left 1\nright", "label": 1}
    with pytest.raises(UserError, match="unknown task 'yours': expected one of conll2003, mine, mldr_en, mnli, .*, all or demo"):
        loading.load("yours", folder)


def test_a_backup_beside_a_training_file_is_not_read(tmp_path):
    rows = [json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(6)]
    for name, text in (("train.jsonl", "".join(rows)), ("train.jsonl.bak", rows[0]), ("train.jsonl~", "torn"), ("test.jsonl", "".join(rows))):
        (tmp_path / name).write_text(text)
    assert {split: len(found) for split, found in loading.read_folder(str(tmp_path)).items()} == {"train": 6, "test": 6}


def test_a_data_dir_that_is_the_tasks_own_folder_is_understood_or_named(tmp_path, monkeypatch):
    rows = sst2(50)
    write(tmp_path, "data/sst2", train=rows, validation=rows, test=rows)
    for data_dir in (tmp_path / "data", tmp_path / "data" / "sst2", str(tmp_path / "data" / "sst2") + "/"):
        assert len(loading.load("sst2", str(data_dir))[1]["train"]) == 50
    monkeypatch.chdir(tmp_path / "data" / "sst2")
    assert len(loading.load("sst2", ".")[1]["train"]) == 50
    os.rename(tmp_path / "data" / "sst2", tmp_path / "data" / "glue")
    with pytest.raises(UserError, match="glue has a train.jsonl itself, but is not called sst2: rename it to sst2, or give the folder that holds sst2/train.jsonl"):
        loading.load("sst2", str(tmp_path / "data" / "glue"))


@pytest.mark.parametrize("name, nearest", [("squadv2", "squad_v2"), ("SST2", "sst2"), ("conll03", "conll2003"), ("ms_marco", "msmarco")])
def test_an_unknown_name_is_answered_with_the_nearest_one_first(name, nearest):
    with pytest.raises(UserError, match=f"unknown task '{name}': expected one of {nearest} \\(the nearest\\), "):
        registry.find(name)


def parquet(folder, name, rows, features):
    os.makedirs(folder, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(os.path.join(folder, name))


def test_the_hubs_loader_checks_sizes_and_label_names(tmp_path, monkeypatch):
    """The real `datasets` on a repository of the hub's layout, which may as well be a local folder."""
    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names, "idx": datasets.Value("int32")})
    for split, rows in (("train", sst2(200)), ("validation", sst2(20, 200)), ("test", [dict(r, label=-1) for r in sst2(5, 300)])):
        parquet(str(tmp_path / "glue"), f"{split}.parquet", rows, features)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    here = dataclasses.replace(registry.TASKS["sst2"], hub=str(tmp_path / "glue"), config="", sizes=(200, 0, 20))
    monkeypatch.setitem(registry.TASKS, "sst2", here)
    _, examples, _ = loading.load("sst2")
    assert len(examples["train"]) + len(examples["validation"]) == 200 and len(examples["test"]) == 20
    assert examples["test"][0] == {"text": "sentence number 200 is bad", "label": 0}
    for wrong, says in (({"sizes": (201, 0, 20)}, "has 200 rows in train, and the table in tasks/registry.py 201"),
                        ({"labels": ("positive", "negative")}, "has the labels negative, positive, and the table in tasks/registry.py positive, neg")):
        monkeypatch.setitem(registry.TASKS, "sst2", dataclasses.replace(here, **wrong))
        with pytest.raises(UserError, match=says):
            loading.load("sst2")


def test_a_repository_that_needs_a_script_is_read_by_its_files(tmp_path, monkeypatch):
    rows = [{"tokens": ["Paris", "in", str(i)], "tags": [7, 0, 1]} for i in range(6)]
    os.makedirs(tmp_path / "repo/dataset")
    for name, part in (("train00", rows[:2]), ("train01", rows[2:4]), ("valid", rows[4:5]), ("test", rows[5:])):
        (tmp_path / f"repo/dataset/{name}.json").write_text("".join(json.dumps(r) + "\n" for r in part))
    task = dataclasses.replace(registry.TASKS["ontonotes5"], hub=str(tmp_path / "repo"), sizes=(4, 1, 1))
    monkeypatch.setitem(registry.TASKS, "ontonotes5", task)
    _, examples, _ = loading.load("ontonotes5")
    assert [len(examples[s]) for s in ("train", "validation", "test")] == [4, 1, 1]
    assert [task.labels[t] for t in examples["test"][0]["tags"]] == ["B-GPE", "O", "B-CARDINAL"]


def test_without_a_network_the_hub_is_one_line_of_advice():
    with pytest.raises(UserError, match=r"could not load nyu-mll/glue at bcdcba.* --data_dir=FOLDER, or run --tasks=demo") as error:
        loading.load("mnli")
    assert "\n" not in str(error.value)


def test_validation_is_cut_by_text_and_frozen(tmp_path):
    folder = write(tmp_path, "sst2", train=sst2(2000) + sst2(300), validation=sst2(20, 5000))
    _, examples, _ = loading.load("sst2", folder)
    held_out = {e["text"] for e in examples["validation"]}
    assert not held_out & {e["text"] for e in examples["train"]}                    # copies of a text go together
    assert 0.035 < len(examples["validation"]) / 2300 < 0.065 and len(examples["test"]) == 20
    assert sorted(held_out)[:3] == ["sentence number 1001 is good", "sentence number 1023 is good", "sentence number 1048 is bad"]


def test_questions_of_one_paragraph_stay_on_one_side(tmp_path):
    rows = [{"context": f"Paragraph {i // 5} names Ada.", "question": f"Who? {i}", "answers": {"text": ["Ada"], "answer_start": [start]}}
            for i in range(1000) for start in [f"Paragraph {i // 5} names Ada.".index("Ada")]]
    _, examples, _ = loading.load("squad", write(tmp_path, "squad", train=rows, validation=rows[:5]))
    sides = [{e["context"] for e in examples[s]} for s in ("train", "validation")]
    assert sides[1] and not sides[0] & sides[1] and len(examples["validation"]) % 5 == 0


def test_the_papers_cut_is_that_of_datasets(tmp_path):
    folder = write(tmp_path, "sst2", train=sst2(500), validation=sst2(20, 900))
    _, examples, _ = loading.load("sst2", folder, split="encodeval")
    theirs = datasets.Dataset.from_list(sst2(500)).train_test_split(train_size=0.95, seed=42)
    assert [e["text"] for e in examples["validation"]] == theirs["test"]["sentence"] and len(theirs["test"]) == 25
    assert [e["text"] for e in examples["train"]] == theirs["train"]["sentence"]


GOOD_QA = {"context": "Ada wrote it.", "question": "Who?", "answers": {"text": ["Ada"], "answer_start": [0]}}


@pytest.mark.parametrize("name, row, says", [
    ("sst2", {"text": "no sentence", "label": 1}, r"train.jsonl, line 1 has no field 'sentence' \(it has text, label\)"),
    ("sst2", {"sentence": 3, "label": 1}, "the field 'sentence' is int, not str"),
    ("sst2", {"sentence": "x", "label": -1}, "label -1 is not in the table: 2 labels, negative, positive"),
    ("sst2", {"sentence": "x", "label": "neutral"}, "label 'neutral' is not in the table"),
    ("sst2", {"sentence": "x", "label": int("7" * 4000)}, "label 7777.* is not in the table"),
    ("squad", GOOD_QA | {"answers": {"text": ["Ada", "it"], "answer_start": [0]}}, "of unequal length: 2 in 'text', 1 in 'answer_start'"),
    ("squad", GOOD_QA | {"answers": [{"text": "Ada"}]}, "has no field 'answer_start'"),
    ("squad", GOOD_QA | {"answers": "Ada"}, "the field 'answers' is str, not dict or list"),
    ("record", {"passage": "Ada.", "query": "@placeholder wrote", "answers": ["Ada"],
                "entity_spans": {"text": ["Ada"], "start": [0, 1], "end": [3]}}, "of unequal length: 1 in 'text', 2 in 'start', 1 in 'end'"),
    ("record", {"passage": "Ada.", "query": "@placeholder wrote", "answers": ["Ada"],
                "entity_spans": {"text": ["Ada"], "start": [0], "end": [4]}}, "the entity 'Ada' is not at characters 0 to 4 of the passage"),
    ("record", {"passage": "Ada.", "query": "@placeholder wrote", "answers": ["Ada"],
                "entity_spans": {"text": [["Ada"]], "start": [None], "end": ["3"]}}, r"the entity \['Ada'\] is not at characters None to '3'"),
    ("sst2", ["a list"], r"has no field 'sentence' \(it has list\)"),
    ("uner", {"tokens": ["a", "b"], "ner_tags": [0]}, "has 2 words and 1 tags"),
    ("uner", {"tokens": [3], "ner_tags": [0]}, "the field 'tokens' holds something that is not a string"),
    ("squad", GOOD_QA | {"answers": {"text": [None], "answer_start": [0]}}, "the answer None is not at character 0 of the context"),
    ("uner", {"tokens": ["a"], "ner_tags": [7]}, "label 7 is not in the table"),
    ("squad", GOOD_QA | {"answers": {"text": ["Ada"], "answer_start": [4]}}, "the answer 'Ada' is not at character 4 of the context"),
    ("squad", GOOD_QA | {"answers": {"text": ["Ada"], "answer_start": [-13]}}, "the answer 'Ada' is not at character -13"),
    ("squad", GOOD_QA | {"answers": {"text": [], "answer_start": []}}, "the question has no answer"),
    ("record", {"passage": "Ada.", "query": "@placeholder wrote", "answers": ["Bob"],
                "entity_spans": {"text": ["Ada"], "start": [0], "end": [3]}}, r"none of the answers \['Bob'\] is an entity"),
])
def test_a_row_that_does_not_fit_is_named(tmp_path, name, row, says):
    with pytest.raises(UserError, match=says):
        loading.load(name, write(tmp_path, name, train=[row], validation=[row], test=[row]))


def test_ends_that_are_the_last_character_are_told_by_the_entitys_text(tmp_path):
    """ReCoRD's own files have such ends; the hub's copy has the character after it."""
    row = {"passage": "Ada met Bob.", "query": "@placeholder left", "answers": ["Bob"]}
    entities = []
    for ends in ([3, 11], [2, 10]):
        rows = [row | {"entity_spans": {"text": ["Ada", "Bob"], "start": [0, 8], "end": ends}}]
        _, examples, _ = loading.load("record", write(tmp_path, "record", train=rows, validation=rows, test=rows))
        entities.append(examples["test"][0]["entities"])
    assert entities[0] == entities[1] == [(0, 3), (8, 11)]


def test_answers_may_be_written_as_in_squads_own_files(tmp_path):
    rows = [GOOD_QA | {"answers": [{"text": "Ada", "answer_start": 0}]}]
    _, examples, _ = loading.load("squad", write(tmp_path, "squad", train=rows, validation=rows, test=rows))
    assert examples["test"][0]["answers"] == [("Ada", 0)]


def test_one_odd_training_row_in_a_thousand_is_left_out_and_named(tmp_path):
    odd = {"sentence": "odd", "label": -1}
    rows = sst2(2000)
    rows[7] = rows[1500] = odd
    folder = write(tmp_path, "sst2", train=rows, validation=sst2(20, 5000), test=sst2(20, 6000))
    _, examples, notes = loading.load("sst2", folder)
    assert len(examples["train"]) == 1998
    assert len(notes) == 1 and notes[0].startswith("2 odd training rows are left out (") and "line 8: label -1" in notes[0] and "line 1501" in notes[0]
    rows[9] = odd
    with pytest.raises(UserError, match=r"line 1501: label -1 .* \(3 odd rows so far: more than 0.1% of train\)"):
        loading.load("sst2", write(tmp_path, "sst2", train=rows, validation=sst2(20, 5000), test=sst2(20, 6000)))
    for split in ("validation", "test"):       # a score is of all rows
        parts = {"train": sst2(2000), "validation": sst2(2000, 5000), "test": sst2(2000, 8000)}
        parts[split][4] = odd
        with pytest.raises(UserError, match=f"{split}.jsonl, line 5: label -1"):
            loading.load("sst2", write(tmp_path, "sst2", **parts))


INFO = {"label_names": ["yes", "no"], "text_fields": ["text"], "label_field": "label"}


@pytest.mark.parametrize("info, says", [
    ("[]", "info.json: the content is a list, not an object"),
    ("{", "info.json is not JSON"),
    ("[" * 100_000, "info.json is not JSON that we can read: it is nested too deep"),
    (INFO | {"label_names": "yes"}, "'label_names' is \"yes\", not a list"),
    (INFO | {"label_names": ["yes", 1]}, r"'label_names\[1\]' is 1, not a string"),
    (INFO | {"label_names": ["yes", "no", "yes"]}, "'label_names' has 'yes' twice"),
    (INFO | {"label_names": ["yes"]}, "'label_names' has 1 names: expected two or more"),
    (INFO | {"label_field": None}, "'label_field' is null, not a string"),
    ({"label_names": ["a", "b"], "text_fields": ["text"]}, "has no 'label_field'"),
    (INFO | {"text_fields": []}, "the text has no field"),
    (INFO | {"template": 7}, "'template' is 7, not a string"),
    (INFO | {"template": "no field"}, "the text has no field"),
    (INFO | {"template": "{text"}, "a brace stands alone in the template '{text'"),
    (INFO | {"template": "{text}}"}, "a brace stands alone"),
    (INFO | {"template": "{} {text}"}, "a brace stands alone"),
    (INFO | {"text_fields": ["a{b"]}, "a brace stands alone"),
])
def test_an_info_json_that_describes_no_task_is_one_line(tmp_path, info, says):
    folder = write(tmp_path, "mine", train=[{"text": "a", "label": 0}])
    (tmp_path / "mine/info.json").write_text(info if isinstance(info, str) else json.dumps(info))
    with pytest.raises(UserError, match=says) as error:
        loading.load("mine", folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_fields_may_have_any_name_and_braces_may_stand_in_the_text(tmp_path):
    rows = [{"a.b": "left", "c[0]": "right", "d:e!r": "more", "label": 1}]
    folder = write(tmp_path, "mine", train=rows, validation=rows, test=rows)
    fields = {"text_fields": ["a.b", "c[0]", "d:e!r"]}
    for extra, text in (({}, "left\nright\nmore"), ({"template": "{{{a.b}}} is {c[0]}"}, "{left} is right")):
        (tmp_path / "mine/info.json").write_text(json.dumps(INFO | fields | extra))
        _, examples, _ = loading.load("mine", folder)
        assert examples["test"] == [{"text": text, "label": 1}]


@pytest.mark.parametrize("line, says", [("{", "line 2 is not JSON"), ("[" * 100_000, "nested too deep"), ('{"sentence": ' + "9" * 5000 + "}", "line 2 is not JSON"),
                                        ('\x00', "line 2 is not JSON")])
def test_a_line_that_is_not_json_is_named(tmp_path, line, says):
    folder = write(tmp_path, "sst2", train=sst2(1), validation=sst2(3))
    (tmp_path / "sst2/train.jsonl").write_text(json.dumps(sst2(1)[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=says):
        loading.load("sst2", folder)


def test_empty_texts_are_counted_and_documents_without_words_left_out(tmp_path):
    _, examples, notes = loading.load("sst2", write(tmp_path, "sst2", train=sst2(99) + [{"sentence": "", "label": 0}], validation=sst2(3)))
    assert len(examples["train"] + examples["validation"]) == 100 and notes == ["1 empty texts, read as an end-of-text token alone"]
    rows = [{"tokens": ["-DOCSTART-"], "ner_tags": [0]}, {"tokens": [], "ner_tags": []}, {"tokens": ["Ada"], "ner_tags": [1]}]
    _, examples, notes = loading.load("uner", write(tmp_path, "uner", train=rows, validation=rows, test=rows))
    assert [e["words"] for e in examples["test"]] == [["Ada"]] and notes == ["6 empty texts, left out"]


def test_iob1_becomes_iob2(tmp_path):
    rows = [{"tokens": list("abcde"), "ner_tags": ["I-PER", "I-PER", "I-LOC", "O", "I-ORG"]}]
    task, examples, _ = loading.load("uner", write(tmp_path, "uner", train=rows, validation=rows, test=rows))
    assert [task.labels[t] for t in examples["test"][0]["tags"]] == ["B-PER", "I-PER", "B-LOC", "O", "B-ORG"]


def test_demo_tasks_share_no_address_between_splits_and_hold_what_they_say():
    for name in registry.DEMO:
        _, examples, notes = loading.load(name)
        sizes = [1730, 221, 323] if name == "sotu_cloze" else [3000, 400, 600]      # few sentences have a name to guess
        assert [len(examples[s]) for s in ("train", "validation", "test")] == sizes and not notes
    by_sentence = {text: (name, split) for name, _, split, text in demo.sentences()}
    for split, rows in demo.era().items():
        assert {by_sentence[row["sentence"]][1] for row in rows} == {split}
        assert {row["label"] for row in rows} == {0, 1, 2, 3}
    for row in demo.case()["test"]:
        assert all(word == word.lower() for word in row["tokens"]) and row["ner_tags"][0] == 0
    for row in demo.cloze()["test"]:
        assert row["query"].count("@placeholder") == 1 and row["answers"][0] in row["entities"] and len(row["entities"]) >= 3
    found = demo.search()
    for split, queries in found["queries"].items():
        for id_, text in queries.items():
            (document, grade), = found["qrels"][split][id_].items()
            assert grade == 1 and text not in found["corpus"][document]
    assert {split: len(part) for split, part in found["qrels"].items()} == {"train": 1500, "validation": 200, "test": 300}
    assert len(found["corpus"]) == 4000


@needs_shared
@pytest.mark.parametrize("name, sizes", [("sst2", (6920, 872, 1821)), ("banking77", (9003, 1000, 3080)), ("sick", (4500, 500, 4927)),
                                         ("wnut_17", (3394, 1009, 1287)), ("uner_en_ewt", (1500, 501, 2077)),
                                         ("squad", (3500, 700, 700)), ("squad_v2", (2000, 500, 500))])
def test_real_data_sets_load(name, sizes):
    _, examples, notes = loading.load(name, SHARED)
    assert tuple(len(examples[s]) for s in ("train", "validation", "test")) == sizes and not notes
