"""Retrieval collections: documents, queries, judgements (qrels), the pairs to train on, and the pools that are searched.

    msmarco nq mldr_en     the Hugging Face hub's mteb copies at pinned commits; msmarco also has the training pairs of all three
    DATA_DIR/<name>/       any folder in BEIR's layout: corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and
                           qrels/{train,validation or dev,test}.tsv (query-id, corpus-id, score); may be packed (.gz .xz .zst)
    sotu_search            made by rule from the demo corpus (demo_tasks.py)

What is searched decides the level of every score, so a pool has a name, which stands in each row, and pools are never mixed:

    judged   the documents that have a judgement for a validation or test query. The paper's (arXiv 2507.00994, its
             evaluation code): no distractors, so its scores cannot be compared with BEIR's.
    hard     these and the best documents by BM25 for each of the queries
    full     the whole corpus

Without validation judgements the learning rate is chosen on 5 % of the training queries, or, where there are none, on half of the
test queries (so for NQ, as the paper's code has it); which ones is decided by a hash of their id.
"""
import hashlib
import json
import os
from dataclasses import dataclass

from core.configurator import UserError
from core.files import find_files, hashed, lines_of
from tasks.family import value
from tasks.registry import HELD_OUT, find

SPLITS = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}


@dataclass
class Collection:
    name: str
    documents: object     # a function -> iterator of (id, text with its title), in the corpus' order
    queries: dict         # {id: text}
    qrels: dict           # {"train", "validation", "test": {query: {document: grade}}}; an empty train without pairs
    fingerprint: str      # 16 hex digits that change with queries, qrels or corpus
    pairs: list           # [(query text, document text)] where training pairs come without ids
    notes: list           # what a reader of the scores should know


def load(name, data_dir=""):
    """-> Collection. Raises UserError, in one line, for what does not fit, and for a collection that cannot be reached."""
    task = find(name, data_dir)
    if task.kind != "retrieval":
        raise UserError(f"{name} is no retrieval collection: python finetune.py --tasks={name}")
    documents, queries, qrels = of_folder(task.folder) if task.folder else of_demo(task) if task.make else of_hub(name, task)
    pairs = pairs_of_hub(task) if task.pairs and not task.folder else []
    ids, digest, empty = set(), hashlib.sha256(), []
    for id_, text in documents():
        if id_ in ids:
            raise UserError(f"{name}: the document id '{id_}' is there twice: rename or remove one")
        ids.add(id_)
        digest.update(f"{id_}\0{text}\0".encode("utf-8", "surrogatepass"))
        if not text.strip():
            empty.append(id_)
    for what, found in (("documents", ids), ("queries", queries), ("judgements of test queries", qrels.get("test"))):
        if not found:
            raise UserError(f"{name} has no {what}: an empty collection cannot be searched")
    notes = []
    for split in [s for s in SPLITS if qrels.get(s)]:
        graded = qrels[split]
        unknown = [[q for q in graded if q not in queries], sorted({d for grades in graded.values() for d in grades} - ids)]
        for what, strange in zip(("queries", "documents"), unknown):
            fate = "are left out" if split == "train" else "count as not found"
            notes += counted(f"{what} of the {split} judgements that are not in the collection {fate}", strange)
        if split != "train":
            notes += counted(f"{split} queries without a relevant document score 0",
                             [q for q, grades in graded.items() if max(grades.values()) < 1])
    notes += counted("documents are empty", empty)
    if "validation" not in qrels:
        source, share = ("train", HELD_OUT) if qrels.get("train") else ("test", 0.5)
        chosen = {q for q in qrels[source] if hashed(q) < share}
        qrels["validation"] = {q: grades for q, grades in qrels[source].items() if q in chosen}
        qrels[source] = {q: grades for q, grades in qrels[source].items() if q not in chosen}
        notes.append(f"validation is cut from {source}, {len(chosen):,} queries")
    for split in ("validation", "test"):
        if not qrels[split]:
            raise UserError(f"{name} has no {split} queries: give qrels/{split}.tsv, or more queries to cut it from")
    digest.update(json.dumps([queries, qrels, pairs], sort_keys=True).encode())
    return Collection(name, documents, queries, {"train": {}} | qrels, digest.hexdigest()[:16], pairs, notes)


def counted(what, strange, shown=3):
    """["2 documents are empty (471, 995)"], or [] for none."""
    names = ", ".join(strange[:shown]) + (", ..." if len(strange) > shown else "")
    return [f"{len(strange):,} {what} ({names})"] if strange else []


def titled(title, text):
    return f"{title}. {text}" if title and title.strip() else text


# ---- reading

def one_file(folder, name):
    found = find_files(folder, f"{name}.jsonl*")
    if not found:
        raise UserError(f"{folder} has no {name}.jsonl: BEIR's layout is corpus.jsonl, queries.jsonl and qrels/test.tsv")
    return found[0]


def json_lines(path):
    for where, line in lines_of(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{where} is no JSON object") from None


def of_folder(folder):
    """-> documents, queries, qrels of a folder in BEIR's layout"""
    corpus = one_file(folder, "corpus")

    def documents():
        for where, row in json_lines(corpus):
            id_, title = value(row, "_id", str, where), "" if row.get("title") is None else value(row, "title", str, where)
            yield id_, titled(title, value(row, "text", str, where))

    queries = {}
    for where, row in json_lines(one_file(folder, "queries")):
        id_ = value(row, "_id", str, where)
        if id_ in queries:
            raise UserError(f"{where}: the query id '{id_}' is there twice: rename or remove one")
        queries[id_] = value(row, "text", str, where)
    qrels = {}
    for split, names in SPLITS.items():
        paths = [path for name in names for path in find_files(os.path.join(folder, "qrels"), f"{name}.tsv*")]
        for path in sorted(paths, reverse=True)[:1]:           # "validation" before "dev"
            qrels[split] = read_qrels((where, line.rstrip("\r\n").split("\t")) for where, line in lines_of(path))
    if "test" not in qrels:
        raise UserError(f"{folder} has no qrels/test.tsv: BEIR's layout is corpus.jsonl, queries.jsonl and qrels/test.tsv")
    return documents, queries, qrels


def read_qrels(rows):
    """(where, [query, document, grade]) of each row, BEIR's header allowed -> {query: {document: grade}}"""
    qrels = {}
    for i, (where, row) in enumerate(rows):
        if i == 0 and row == ["query-id", "corpus-id", "score"]:
            continue
        if len(row) != 3:
            raise UserError(f"{where} has {len(row)} columns, not query-id, corpus-id and score with tabs between them")
        query, document, grade = row
        try:
            grade = int(grade)
        except ValueError:
            raise UserError(f"{where}: the grade '{grade}' is no whole number") from None
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise UserError(f"{where}: document '{document}' has another grade for query '{query}' further up")
    return qrels


def of_demo(task):
    found = task.make()
    queries = {id_: text for part in found["queries"].values() for id_, text in part.items()}
    return lambda: iter(found["corpus"].items()), queries, found["qrels"]


def id_of(row):
    return str(row["_id"] if "_id" in row else row["id"])


def of_hub(name, task):
    """-> documents, queries, qrels of one of the hub's mteb collections, numbers of queries checked"""
    kind = f"{task.config}-" if task.config else ""
    corpus, asked, judged = (from_hub(task.hub, f"{kind}{what}" if what or kind else "default", task.revision)
                             for what in ("corpus", "queries", "qrels" if kind else ""))

    def documents():
        before = set()                    # where validation and test have a corpus each, they share documents
        for i, part in enumerate(corpus.values(), start=1):
            for row in part:
                if id_of(row) not in before:
                    yield id_of(row), titled(row.get("title"), row["text"])
            if i < len(corpus):
                before.update(map(id_of, part))

    queries = {id_of(row): row["text"] for part in asked.values() for row in part}
    qrels = {}
    for split, there, size in zip(SPLITS, task.splits, task.sizes):
        if there:
            rows = judged[there] if there in judged else []
            qrels[split] = read_qrels((f"{name}, {there} row {i}", [str(row["query-id"]), str(row["corpus-id"]), row["score"]])
                                      for i, row in enumerate(rows))
            if len(qrels[split]) != size:
                raise UserError(f"{name}: {task.hub} has judgements for {len(qrels[split]):,} queries in {there}, and the table in "
                                f"tasks.py {size:,}: the data has changed")
    return documents, queries, qrels


def pairs_of_hub(task):
    rows = next(iter(from_hub(task.pairs, None, "main").values()))
    return list(zip(rows["query"], rows["positive"]))


def from_hub(repository, config, revision):
    """All splits of one configuration, memory-mapped. Raises UserError."""
    try:
        import datasets
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()       # its retries; the error below says it once
        return datasets.load_dataset(repository, config, revision=None if os.path.isdir(repository) else revision)
    except Exception as error:              # network, hub and parser each raise their own
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"could not load {repository} at {revision} from the Hugging Face hub ({type(error).__name__}: {first}): "
                        "connect to the network, or give a folder in BEIR's layout with --data_dir=FOLDER, or run --tasks=demo"
                        ) from None
