"""Your own collection is a folder in BEIR's layout. It needs no line of code."""
import json

from conftest import run_python

import eval_ir
from core.files import find_files
from core.schema import read_json

ANIMALS = ("heron", "otter", "salmon", "beaver", "newt", "pike", "swan", "crane")
PLACES = ("bridge", "mill", "harbour", "dam", "island", "ford", "lock", "ferry")


def write_collection(folder):
    """Writes 64 documents and a query for each: 40 to train on, 8 to validate, 16 to test."""
    (folder / "qrels").mkdir(parents=True)
    documents = []
    queries = []
    judgements = []
    for i in range(64):
        animal = ANIMALS[i % 8]
        place = PLACES[i // 8]
        text = f"A {animal} was seen near the {place}, and the people of the {place} were glad."
        documents.append({"_id": f"sighting-{i}", "title": animal, "text": text})
        queries.append({"_id": f"question-{i}", "text": f"Who saw the {animal} at the {place}?"})
        judgements.append(f"question-{i}\tsighting-{i}\t1\n")
    for name, rows in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    splits = {"train": judgements[:40], "validation": judgements[40:48], "test": judgements[48:]}
    for split, lines in splits.items():
        header = "query-id\tcorpus-id\tscore\n"
        (folder / "qrels" / f"{split}.tsv").write_text(header + "".join(lines))


def test_a_folder_is_a_collection_that_trains_is_searched_and_reported(encoder, tmp_path):
    write_collection(tmp_path / "data" / "sightings")
    out_dir = str(tmp_path / "out")
    eval_ir.main(eval_ir.Config(
        ckpt=encoder, tasks="sightings", data_dir=str(tmp_path / "data"), out_dir=out_dir,
        cache_dir=str(tmp_path / "cache"), lrs=(3e-3,), seeds=(0,), steps=30, batch=16,
        dtype="float32", device="cpu"))

    path, = find_files(out_dir, "trials/sightings/lr*.json")
    row = read_json(path)
    assert row["task"] == row["train_on"] == "sightings"
    assert row["pool"] == "full" and row["documents"] == 64
    assert row["validation"]["n"] == 8 and row["test"]["n"] == 16

    # It has learned: the loss fell, and a random ranking's NDCG@10 would be 0.07.
    losses = [loss for _, loss in row["train_loss"]]
    assert losses[-1] < losses[0] - 0.5
    assert row["test"]["ndcg_10"] > 0.15

    done = run_python(["report.py", out_dir, f"--to={tmp_path}/report"])
    assert done.returncode == 0, done.stderr
    assert "| sightings, full pool | clm_then_mlm-40 |" in done.stdout
    assert "| sightings, full pool |" in (tmp_path / "report" / "trials.md").read_text()
