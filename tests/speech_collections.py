"""Small collections in BEIR's layout, for the tests of retrieval."""
import json
import random

from tasks import demo

DOCUMENTS = [
    {
        "_id": f"d{i}",
        "title": f"On {i}" if i % 2 else "",
        "text": f"document number {i} tells of river {i}",
    }
    for i in range(30)
]
QUERIES = [{"_id": f"q{i}", "text": f"which river is number {i}?"} for i in range(24)]


def collection(folder, name="rivers", documents=DOCUMENTS, queries=QUERIES, **qrels):
    """Writes folder/name in BEIR's layout. -> folder

    qrels: {split: [(query, document, grade)]}; without any, 12 train, 4 validation and 8 test.
    """
    path = folder / name
    (path / "qrels").mkdir(parents=True, exist_ok=True)
    for file, rows in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (path / f"{file}.jsonl").write_text("".join(lines))
    if not qrels:
        judgements = [(f"q{i}", f"d{i}", 1) for i in range(24)]
        qrels = {
            "train": judgements[:12],
            "validation": judgements[12:16],
            "test": judgements[16:],
        }
    for split, rows in qrels.items():
        lines = ["query-id\tcorpus-id\tscore\n"]
        for row in rows:
            lines.append("\t".join(map(str, row)) + "\n")
        (path / "qrels" / f"{split}.tsv").write_text("".join(lines))
    return str(folder)


def speeches(folder, name, start):
    """Writes a small collection of real text: 120 documents of the demo's, from number start.

    A sentence asks for its paragraph, and every other sentence for a second paragraph, too.
    """
    demo_collection = demo.search()
    texts = demo_collection["corpus"]
    ids = list(texts)[start:start + 120]
    query_of = {}
    for qrels in demo_collection["qrels"].values():
        for query, grades in qrels.items():
            query_of |= dict.fromkeys(grades, query)
    query_texts = {}
    for queries in demo_collection["queries"].values():
        query_texts |= queries
    asked = [d for d in ids if d in query_of]
    sizes = {"train": 48, "validation": 12, "test": 20}
    assert len(asked) >= sum(sizes.values())

    rng = random.Random(start)
    rows = {}
    first = 0
    for split, size in sizes.items():
        chosen = asked[first:first + size]
        first += size
        judgements = [((query_of[d], d), rng.choice([1, 1, 2])) for d in chosen]
        judgements += [((query_of[d], rng.choice(ids)), 1) for d in chosen[::2]]
        rows[split] = [(query, d, grade) for (query, d), grade in dict(judgements).items()]
    documents = [{"_id": d, "text": texts[d]} for d in ids]
    queries = [{"_id": query_of[d], "text": query_texts[query_of[d]]} for d in asked]
    return collection(folder, name, documents, queries, **rows)
