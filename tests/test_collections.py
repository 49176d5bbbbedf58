"""Collections are read as they are, and everything odd about them is counted and named, or refused in one line."""
import dataclasses
import gzip
import threading
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from conftest import SHARED, needs_shared
from speech_collections import DOCUMENTS, QUERIES, collection

from core import tokenizer
from core.configurator import UserError
from core.distributed import Processes
from retrieval import collections, pools, tokens
from retrieval.collections import load_collection
from retrieval.pools import pool_ids, training_pairs
from retrieval.targets import Library
from tasks import metrics, packing, registry
from tasks.loading import json_lines


def test_a_backup_beside_a_file_is_not_read_and_two_files_of_one_name_are_refused(tmp_path):
    folder, path = collection(tmp_path), tmp_path / "rivers"
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        for ending in (".bak", "~", ".zzz"):
            (path / f"{name}{ending}").write_text("not what it seems\n")
    loaded = load_collection("rivers", folder)
    assert len(list(loaded.documents())) == 30 and len(loaded.qrels["test"]) == 8
    (path / "qrels" / "test.tsv.gz").write_bytes(gzip.compress((path / "qrels" / "test.tsv").read_bytes()))
    with pytest.raises(UserError, match="test.tsv and .*test.tsv.gz: which of them is meant"):
        load_collection("rivers", folder)


def test_a_folder_in_beirs_layout_is_a_collection(tmp_path):
    loaded = load_collection("rivers", collection(tmp_path / "deep"))
    assert {split: len(queries) for split, queries in loaded.qrels.items()} == {"train": 12, "validation": 4, "test": 8} and loaded.notes == []
    assert dict(loaded.documents())["d1"] == "On 1. document number 1 tells of river 1" and len(list(loaded.documents())) == 30
    assert dict(loaded.documents())["d2"] == "document number 2 tells of river 2"          # no title
    training = training_pairs(loaded)
    query, document = training.pairs[3]
    assert len(training.pairs) == 12
    assert training.queries[query] == "which river is number 3?" and "number 3 " in training.documents[document]
    # packed, without header, BEIR's name for validation, one folder deeper: the same
    path = tmp_path / "deep" / "rivers"
    (path / "corpus.jsonl.gz").write_bytes(gzip.compress((path / "corpus.jsonl").read_bytes()))
    (path / "corpus.jsonl").unlink()
    text = (path / "qrels" / "validation.tsv").read_text()
    (path / "qrels" / "validation.tsv").unlink()
    (path / "qrels" / "dev.tsv").write_text(text.partition("\n")[2])
    again = load_collection("rivers", str(tmp_path))
    assert again.qrels == loaded.qrels and again.fingerprint == loaded.fingerprint


def test_equal_texts_are_one_text_and_all_positives_of_a_query_are_known(tmp_path):
    documents = [*DOCUMENTS, {"_id": "copy", "text": "document number 0 tells of river 0"}]
    folder = collection(tmp_path, documents=documents, test=[("q9", "d9", 1)], validation=[("q8", "d8", 1)],
                        train=[("q0", "d0", 1), ("q0", "copy", 2), ("q0", "d5", 1), ("q1", "d5", 1), ("q1", "d0", 0)])
    training = training_pairs(load_collection("rivers", folder))
    assert len(training.queries) == 2 and len(training.documents) == 2
    assert training.pairs.tolist() == [[0, 0], [0, 1], [1, 1]]      # grade 0 is not a positive
    assert training.positives == [{0, 1}, {1}]


@pytest.mark.parametrize("changes, message", [
    ({"documents": []}, "rivers has no documents: an empty collection cannot be searched"),
    ({"queries": []}, "rivers has no queries"),
    ({"test": []}, "rivers has no judgements of test queries"),
    ({"documents": [*DOCUMENTS, DOCUMENTS[3]]}, "the document id 'd3' appears twice"),
    ({"queries": [*QUERIES, QUERIES[3]]}, "queries.jsonl, line 25: the query id 'q3' appears twice"),
    ({"test": [("q1", "d1", "0.5")]}, "test.tsv, line 2: the grade '0.5' is not a whole number"),
    ({"test": [("q1", "d1", 1), ("q1", "d1", 2)]}, "test.tsv, line 3: document 'd1' has another grade for query 'q1' in an earlier line"),
    ({"test": [("q1", "d1")]}, "test.tsv, line 2 has 2 columns: expected query-id, corpus-id and score"),
    ({"documents": [{"id": "d1", "text": "x"}]}, "corpus.jsonl, line 1 has no field '_id' (it has id, text)"),
    ({"documents": [{"_id": "1", "title": 7, "text": "x"}]}, "corpus.jsonl, line 1: the field 'title' is int, not str"),
    ({"documents": ["d1"]}, "corpus.jsonl, line 1 has no field '_id' (it has str)"),
    ({"documents": [{"_id": 1, "text": "x"}]}, "corpus.jsonl, line 1: the field '_id' is int, not str"),
    ({"train": [("q1", "d1", 1)]}, "rivers has no qrels/test.tsv"),
    ({"test": [("q1 ", "d1", 1), ("Q2", "d1", 1)]}, "rivers: none of the queries of the test judgements is in the collection: an id is 'q1 ' in the judgements, and 'q0' in"),
    ({"test": [("q1", "D1", 1)]}, "none of the documents of the test judgements is in the collection: an id is 'D1' in the judgements, and 'd0' in"),
    ({"test": [("q1", "d1", 1)], "validation": [("1", "d1", 1)]}, "none of the queries of the validation judgements is in the collection"),
    *[({"test": [("q1", "d1", grade)]}, "test.tsv, line 2: the grade ") for grade in ("nan", "inf", "", "1e999", "9" * 5000, "one")],
    ({"test": [("q1", "0", "d1", 1, "x")]}, "test.tsv, line 2 has 5 columns"),
])
def test_what_cannot_be_scored_is_refused_in_one_line(tmp_path, changes, message):
    folder = collection(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_collection("rivers", folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "query_id\tdoc_id\tscore\nq1\td1\t1\nq2\td2\t2\n",
    "qid\tpid\trelevance\r\nq1\td1\t1.0\r\nq2\td2\t2.0\r\n",
    "corpus-id\tquery-id\tscore\nd1\tq1\t1\nd2\tq2\t2\n",
    "q1\t0\td1\t1\nq2\t0\td2\t2\n",
    "q1 0 d1 1\nq2 Q0 d2 2\n",
    "\ufeffquery-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t2e0\n",
])
def test_judgements_may_be_written_in_any_way_that_has_one_reading(tmp_path, text):
    folder = collection(tmp_path, test=[("q1", "d1", 1)], validation=[("q3", "d3", 1)])
    (tmp_path / "rivers" / "qrels" / "test.tsv").write_text(text, newline="")
    assert load_collection("rivers", folder).qrels["test"] == {"q1": {"d1": 1}, "q2": {"d2": 2}}


def test_a_query_of_both_splits_has_the_judgements_of_both_in_the_pools(tmp_path):
    folder = collection(tmp_path, validation=[("q1", "d1", 1)], test=[("q1", "d2", 1), ("q2", "d3", 1)])
    assert pool_ids(load_collection("rivers", folder), "judged", 3, str(tmp_path)) == {"d1", "d2", "d3"}


@pytest.mark.parametrize("line, says", [("{", "line 2 is not JSON"), ("[" * 100_000, "nested too deep"), ("9" * 5000, "line 2 is not JSON"), ("\0", "line 2 is not JSON")])
@pytest.mark.parametrize("name", ["corpus", "queries"])
def test_a_line_that_is_not_json_is_named(tmp_path, name, line, says):
    folder = collection(tmp_path)
    path = tmp_path / "rivers" / f"{name}.jsonl"
    path.write_text(path.read_text().partition("\n")[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=says):
        load_collection("rivers", folder)


def test_the_corpus_is_walked_through_once_for_all_processes_and_runs(tmp_path, corpus_dir, monkeypatch):
    folder = collection(tmp_path / "data", test=[("q1", "d1", 1), ("q1", "gone", 1)], validation=[("q3", "d3", 1)])
    walks = []

    def counted(path):
        walks.append(path)
        return json_lines(path)
    monkeypatch.setattr(collections, "json_lines", counted)
    settings = SimpleNamespace(data_dir=folder, cache_dir=str(tmp_path / "cache"), hard_negatives=3, mode="standard", paper_encoding=False)
    plain = load_collection("rivers", folder)
    targets = []
    for _ in range(3):                 # three processes; each reads the queries
        walks.clear()
        library = Library(settings, tokenizer.load(corpus_dir), 64, 64, Processes(0, 0, 1))
        loaded = load_collection("rivers", folder, settings.cache_dir)
        assert (loaded.fingerprint, loaded.notes, loaded.qrels) == (plain.fingerprint, plain.notes, plain.qrels)
        targets.append(library.target("rivers", "judged", loaded))
        assert sum(path.endswith("corpus.jsonl") for path in walks) == (1 if len(targets) == 1 else 0)
    assert targets[0].document_ids == targets[2].document_ids == ["d1", "d3"] and targets[0].baseline == targets[2].baseline
    # another corpus, and a damaged file, are noticed
    (survey,) = (tmp_path / "cache").glob("rivers-survey-*.json")
    for text in ("{", "7", survey.read_text().replace("river 3", "stream 3")):
        survey.write_text(text)
        assert load_collection("rivers", folder, settings.cache_dir).judged == plain.judged
    corpus = tmp_path / "data" / "rivers" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("river 3", "stream 3"))
    changed = load_collection("rivers", folder, settings.cache_dir)
    assert "stream 3" in changed.judged["d3"] and changed.fingerprint != plain.fingerprint


def test_processes_of_a_machine_take_turns(tmp_path):
    order = []

    def second():
        with packing.alone_in(str(tmp_path)):
            order.append("second")
    with packing.alone_in(str(tmp_path)):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_what_can_be_scored_all_the_same_is_counted_and_named(tmp_path):
    documents = [*DOCUMENTS, {"_id": "blank", "title": "", "text": " "}]
    test = [("q1", "d1", 1), ("q1", "gone", 1), ("nobody", "d2", 1), ("q2", "d3", 0), *((f"q{i}", f"lost{i}", 1) for i in range(4, 9))]
    loaded = load_collection("rivers", collection(tmp_path, documents=documents, test=test, validation=[("q9", "d9", 1)],
                                              train=[("q20", "d20", 1), ("q20", "away", 1)]))
    assert loaded.notes == ["1 documents of the train judgements that are not in the collection are left out (away)",
                           "1 queries of the test judgements that are not in the collection count as not found (nobody)",
                           "6 documents of the test judgements that are not in the collection count as not found (gone, lost4, lost5, ...)",
                           "1 test queries without a relevant document score 0 (q2)", "1 documents are empty (blank)"]
    assert len(training_pairs(loaded).pairs) == 1
    # ... and counts: the best that can be found of q1 is one of its two documents
    best = metrics.ndcg(loaded.qrels["test"], {"q1": {"d1": 1.0}})
    assert set(best) == {"q1", "nobody", "q2", "q4", "q5", "q6", "q7", "q8"} and best["q1"] == pytest.approx(1 / (1 + 1 / np.log2(3)))


def test_validation_is_cut_by_a_hash_of_the_query_where_there_is_none(tmp_path):
    queries = [{"_id": f"q{i}", "text": f"river {i}"} for i in range(400)]
    rows = [(q["_id"], "d1", 1) for q in queries]
    halves = load_collection("rivers", collection(tmp_path / "a", queries=queries, test=rows))
    assert set(halves.qrels["validation"]).isdisjoint(halves.qrels["test"]) and halves.notes == [
        f"validation is cut from test, {len(halves.qrels['validation'])} queries"] and 150 < len(halves.qrels["test"]) < 250
    cut = load_collection("rivers", collection(tmp_path / "b", queries=queries, test=rows[:9], train=rows[9:]))
    assert 5 < len(cut.qrels["validation"]) < 40 and set(cut.qrels["validation"]).isdisjoint(cut.qrels["train"]) and len(cut.qrels["test"]) == 9
    # the same query is on the same side in a collection with others
    fewer = load_collection("rivers", collection(tmp_path / "c", queries=queries, test=rows[::2]))
    assert set(fewer.qrels["test"]) == set(halves.qrels["test"]) & {q for q, *_ in rows[::2]}
    with pytest.raises(UserError, match="rivers has no training pairs .*: name a collection that has some, --train_on=NAME"):
        training_pairs(halves)


def test_the_three_pools(tmp_path):
    documents = [*DOCUMENTS, *({"_id": f"near{i}", "text": f"which river is number {i}? which river?"} for i in range(16, 24))]
    loaded = load_collection("rivers", collection(tmp_path, documents=documents))
    judged = pool_ids(loaded, "judged", 3, str(tmp_path))
    assert judged == {f"d{i}" for i in range(12, 24)} and pool_ids(loaded, "full", 3, str(tmp_path)) is None
    hard = pool_ids(loaded, "hard", 1, str(tmp_path))
    assert hard == judged | {f"near{i}" for i in range(16, 24)}                             # what BM25 has first for q16 to q23
    more = pool_ids(loaded, "hard", 20, str(tmp_path))
    assert hard < more <= {d["_id"] for d in documents} and pool_ids(loaded, "hard", 20, str(tmp_path)) == more
    for path in tmp_path.glob("rivers-bm25-*.json"):
        path.write_text("[7]")
    assert pool_ids(loaded, "hard", 20, str(tmp_path)) == more


def test_tokens_are_made_once_in_the_order_of_the_texts_cut_and_closed(tmp_path, corpus_dir, monkeypatch):
    tok = tokenizer.load(corpus_dir)
    texts = [(f"d{i}", f"Document: the state of the union {i} " + "and so on " * (i % 40)) for i in range(95)]
    monkeypatch.setattr(tokens, "BATCH", 10)
    encoded, ids = tokens.cached_tokens("x", lambda: iter(texts), tok, 64, "key", str(tmp_path))
    assert ids == [id_ for id_, _ in texts] and len(encoded["bounds"]) == 96 and isinstance(encoded["tokens"], np.memmap)
    ids_by_text = [tok.encode(text) for _, text in texts]
    for i, ids_of in enumerate(ids_by_text):
        assert encoded["tokens"][encoded["bounds"][i]:encoded["bounds"][i + 1]].tolist() == [*ids_of[:63], tok.eos_id]
    assert encoded["truncated"][0] == sum(len(ids_of) > 63 for ids_of in ids_by_text) > 0

    def never():
        raise AssertionError("tokenized twice")
    again, _ = tokens.cached_tokens("x", never, tok, 64, "key", str(tmp_path))
    assert np.array_equal(again["tokens"], encoded["tokens"])
    assert len(tokens.cached_tokens("x", lambda: iter(texts[:5]), tok, 64, "other", str(tmp_path))[1]) == 5
    assert all("." not in name for name in map(str, (p.name for p in tmp_path.iterdir())))       # nothing temporary is left


@pytest.mark.parametrize("file", ["tokens.bin", "index.safetensors", "ids.json"])
@pytest.mark.parametrize("damage", ["emptied", "shortened by a token", "shortened by a byte", "a byte changed", "NULs", "removed", "a folder"])
def test_damaged_files_of_tokens_are_made_again_with_one_line(tmp_path, corpus_dir, capsys, file, damage):
    tok = tokenizer.load(corpus_dir)
    texts = [(f"d{i}", f"Document: the state of the union {i}") for i in range(9)]

    def read():
        contents, ids = tokens.cached_tokens("x", lambda: iter(texts), tok, 64, "key", str(tmp_path))
        return {key: array.tolist() for key, array in contents.items()}, ids
    made = read()
    assert capsys.readouterr().out == "" and set(made[0]) == {"tokens", "bounds", "truncated"}
    (path,) = tmp_path.glob(f"*/{file}")
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "removed":
        middle = len(content) // 2
        path.write_bytes({"emptied": b"", "shortened by a token": content[:-4], "shortened by a byte": content[:-1], "NULs": bytes(len(content)),
                          "a byte changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]}[damage])
    assert read() == made
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and " is damaged (" in said and said.endswith("): it is made again\n")
    assert read() == made and capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 1


def test_no_texts_are_no_tokens(tmp_path, corpus_dir):
    contents, ids = tokens.cached_tokens("x", lambda: iter(()), tokenizer.load(corpus_dir), 64, "key", str(tmp_path))
    assert len(contents["tokens"]) == 0 and ids == []


def test_the_papers_encoding_opens_a_text_as_llama_3_does_and_does_not_close_it(tmp_path, corpus_dir):
    tok = tokenizer.load(corpus_dir)
    text = "Document: " + "the state of the union " * 40
    ids = tok.encode(text)
    (ours,), _ = tokens.tokenize([text], tok, 64)
    (papers,), n_cut = tokens.tokenize([text], tok, 66, paper_encoding=True)
    assert ours.tolist() == [*ids[:63], tok.eos_id] and papers.tolist() == ids[:66] and n_cut == 1      # this tokenizer has no such token
    specials = tok.encoding._special_tokens | {"<|begin_of_text|>": 1100}
    encoding = tokenizer.new_encoding("x", tok.encoding._pat_str, tok.encoding._mergeable_ranks, specials)
    llama = dataclasses.replace(tok, encoding=encoding)
    (papers,), _ = tokens.tokenize([text], llama, 66, paper_encoding=True)
    assert papers.tolist() == [1100, *ids[:65]]
    # the two never share a cache
    for is_paper in (False, True):
        encoded, _ = tokens.cached_tokens("x", lambda: iter([("d", text)]), tok, 64, "key", str(tmp_path), is_paper)
        assert (encoded["tokens"][-1] == tok.eos_id) != is_paper


def test_the_papers_three_are_in_the_table_and_the_hub_is_explained():
    assert registry.PAPER_IR == ("msmarco", "nq", "mldr_en") and registry.DEMO_IR == ("sotu_search",)
    for name in registry.PAPER_IR:
        task = registry.TASKS[name]
        assert len(task.revision) == 40 and task.pool == "judged" and (task.train_on or name) == "msmarco"
    with pytest.raises(UserError, match=r"could not load mteb/nq at b774495ed302.*connect to the network, or give local files with --data_dir=FOLDER"):
        load_collection("nq")
    with pytest.raises(UserError, match="sst2 is not a retrieval collection: python finetune.py --tasks=sst2"):
        load_collection("sst2")


def write_hub(hub, files):
    """The layout of the hub's mteb copies, as files: configurations for corpus, queries and judgements. files: [(config, split, rows)]"""
    yaml = []
    for config, split, rows in files:
        path = hub / config / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        yaml.append((config, split, f"{config}/{split}.parquet"))
    configs = dict.fromkeys(config for config, _, _ in yaml)
    (hub / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n" + "".join(f"  - split: {s}\n    path: {p}\n" for c, s, p in yaml if c == config)
        for config in configs) + "---\n")


def test_of_mldrs_queries_only_those_of_the_splits_in_use_are_read(tmp_path, monkeypatch):
    """Training has queries of the same ids; two texts of one id among the used ones are refused."""
    def files(test_text):
        return [*(("en-corpus", split, [{"_id": "1", "text": "a"}, {"_id": "2", "text": split}]) for split in ("train", "dev", "test")),
                ("en-queries", "dev", [{"_id": "q1", "text": "dev 1"}, {"_id": "q3", "text": "shared"}]),
                ("en-queries", "test", [{"_id": "q2", "text": "test 2"}, {"_id": "q3", "text": test_text}]),
                ("en-queries", "train", [{"_id": "q1", "text": "train 1"}, {"_id": "q2", "text": "train 2"}]),
                ("en-qrels", "dev", [{"query-id": "q1", "corpus-id": "1", "score": 1.0}]),
                ("en-qrels", "test", [{"query-id": "q2", "corpus-id": "2", "score": 1.0}])]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_hub(tmp_path / "good", files("shared"))
    task = dataclasses.replace(registry.TASKS["mldr_en"], hub=str(tmp_path / "good"), sizes=(0, 1, 1))
    monkeypatch.setitem(registry.TASKS, "mldr_en", task)
    loaded = load_collection("mldr_en")
    assert loaded.queries == {"q1": "dev 1", "q2": "test 2", "q3": "shared"}
    assert list(loaded.documents()) == [("1", "a"), ("2", "dev")]
    write_hub(tmp_path / "bad", files("another"))
    monkeypatch.setitem(registry.TASKS, "mldr_en", dataclasses.replace(task, hub=str(tmp_path / "bad")))
    with pytest.raises(UserError, match="has two queries of the id 'q3', one of them in test: the data has changed"):
        load_collection("mldr_en")


def test_a_hub_collection_is_read_from_its_parquet_files(tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    write_hub(hub, [("corpus", "corpus", [{"_id": "1", "title": "Nile", "text": "a river"}, {"_id": "2", "title": "", "text": "b"}]),
                    ("queries", "queries", [{"_id": "7", "text": "which?"}, {"_id": "8", "text": "what?"}]),
                    ("default", "dev", [{"query-id": "7", "corpus-id": "1", "score": 1}]),
                    ("default", "test", [{"query-id": "8", "corpus-id": "2", "score": 3}])])
    (tmp_path / "pairs").mkdir()
    datasets.Dataset.from_list([{"query": "who?", "positive": "she"}, {"query": "who?", "positive": "he"}]).to_parquet(
        str(tmp_path / "pairs" / "train.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = dataclasses.replace(registry.TASKS["msmarco"], hub=str(hub), pairs=str(tmp_path / "pairs"), sizes=(0, 1, 1))
    monkeypatch.setitem(registry.TASKS, "msmarco", task)
    loaded = load_collection("msmarco")
    assert list(loaded.documents()) == [("1", "Nile. a river"), ("2", "b")] and loaded.queries == {"7": "which?", "8": "what?"}
    assert loaded.qrels == {"train": {}, "validation": {"7": {"1": 1}}, "test": {"8": {"2": 3}}}
    training = training_pairs(loaded)
    assert training.queries == ["who?"] and training.documents == ["she", "he"]
    assert training.pairs.tolist() == [[0, 0], [0, 1]] and training.positives == [{0, 1}]
    monkeypatch.setitem(registry.TASKS, "msmarco", dataclasses.replace(task, sizes=(0, 6_980, 43)))
    with pytest.raises(UserError, match="has judgements for 1 queries in dev, and the table in tasks/registry.py 6,980: the data has changed"):
        load_collection("msmarco")


@needs_shared
@pytest.mark.parametrize("name, sizes, bm25", [("cranfield", (100, 25, 100), 0.340), ("squad_retrieval", (5000, 700, 1000), 0.806)])
def test_real_collections_load_and_bm25_has_its_known_score(name, sizes, bm25):
    loaded = load_collection(name, SHARED)
    assert tuple(len(loaded.qrels[split]) for split in ("train", "validation", "test")) == sizes
    assert loaded.notes == (["2 documents are empty (471, 995)"] if name == "cranfield" else [])
    values = metrics.ndcg(loaded.qrels["test"], pools.bm25(loaded, list(loaded.qrels["test"]), None, 100)).values()
    assert sum(values) / len(values) == pytest.approx(bm25, abs=5e-4)
