"""Small collections in BEIR's layout, for the tests of retrieval."""
import json
import random

from tasks import demo

DOCUMENTS = [{"_id": f"d{i}", "title": f"On {i}" if i % 2 else "", "text": f"document number {i} tells of river {i}"} for i in range(30)]
QUERIES = [{"_id": f"q{i}", "text": f"which river is number {i}?"} for i in range(24)]


def collection(folder, name="rivers", documents=DOCUMENTS, queries=QUERIES, **qrels):
    """A folder in BEIR's layout: folder/name. qrels: {split: [(query, document, grade)]}; 12 train, 4 validation, 8 test by default."""
    path = folder / name
    (path / "qrels").mkdir(parents=True, exist_ok=True)
    for file, rows in (("corpus", documents), ("queries", queries)):
        (path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = [(f"q{i}", f"d{i}", 1) for i in range(24)]
    for split, rows in (qrels or {"train": one[:12], "validation": one[12:16], "test": one[16:]}).items():
        (path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join("\t".join(map(str, r)) + "\n" for r in rows))
    return str(folder)


def speeches(folder, name, start):
    """A small collection of real text in BEIR's layout: a sentence asks for its paragraph, and every other one for a second, too."""
    found = demo.search()
    ids = list(found["corpus"])[start:start + 120]
    by_document = {d: q for part in found["qrels"].values() for q, grades in part.items() for d in grades}
    queries = {q: text for part in found["queries"].values() for q, text in part.items()}
    asked = [d for d in ids if d in by_document]
    rng, cuts, rows = random.Random(start), {"train": 48, "validation": 12, "test": 20}, {}
    assert len(asked) >= sum(cuts.values())
    for split, n in cuts.items():
        chosen, asked = asked[:n], asked[n:]
        rows[split] = [(by_document[d], d, rng.choice([1, 1, 2])) for d in chosen]
        rows[split] += [(by_document[d], rng.choice(ids), 1) for d in chosen[::2]]
    for split, part in rows.items():
        rows[split] = [(q, d, grade) for (q, d), grade in {(q, d): grade for q, d, grade in part}.items()]
    return collection(folder, name, [{"_id": d, "text": found["corpus"][d]} for d in ids],
                      [{"_id": by_document[d], "text": queries[by_document[d]]} for d in ids if d in by_document], **rows)
