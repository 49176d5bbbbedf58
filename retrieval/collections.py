"""Retrieval collections: documents, queries, relevance judgements (qrels), and pairs to train on.

    msmarco nq mldr_en     mteb's copies on the Hugging Face hub, at pinned commits; all three use
                           the training pairs of msmarco
    DATA_DIR/<name>/       any folder in BEIR's layout, your own collection included:
                               corpus.jsonl      _id, title (may be missing), text
                               queries.jsonl     _id, text
                               qrels/test.tsv    query-id, corpus-id, score, between tabs; or TREC's
                                                 four columns; a header may order them otherwise;
                                                 also train.tsv, and validation.tsv or dev.tsv
                           Each file may be compressed (.gz .xz .zst).
    sotu_search            made by rule from the demo corpus (tasks/demo.py)

A collection is never repaired. If something odd about it can still be scored, the notes count it.
Anything else is refused with a message that names the line.

Validation queries choose the learning rate. If a collection has none, they are cut from the
training queries (5 %) or, if it has none of these either, from the test queries (half). The hash of
a query's id decides. NQ's validation queries are cut from the test queries, as in the paper's code
(arXiv 2507.00994), which draws them at random.
"""
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

from core.configurator import UserError
from core.files import find_packed, hashed, lines_of
from tasks import packing
from tasks.family import field_of, shortened
from tasks.loading import json_lines, load_from_hub
from tasks.registry import HELD_OUT, find

# {split: the names that its file in qrels/ may have}
SPLITS = {
    "train": ("train",),
    "validation": ("validation", "dev"),
    "test": ("test",),
}
# the names that the columns of qrels may have in a header, with - for _
HEADERS = (
    ("query-id", "queryid", "qid", "query", "topic", "topic-id"),
    ("corpus-id", "doc-id", "docid", "did", "pid", "document-id", "passage-id", "doc", "document"),
    ("score", "grade", "relevance", "rel", "label"),
)
# what a walk through the corpus has found
SURVEY_SHAPE = {"fingerprint": str, "notes": [str], "judged": {str: str}}
LARGEST_GRADE = 1_000_000
LAYOUT = "BEIR's layout is corpus.jsonl, queries.jsonl and qrels/test.tsv"


@dataclass
class Collection:
    name: str
    documents: Callable  # documents() yields (id, title and text) of each, in the corpus' order
    queries: dict        # {id: text}
    qrels: dict          # {"train" | "validation" | "test": {query id: {document id: grade}}}
    fingerprint: str     # 16 hex digits, a hash of all of it
    pairs: list          # [(query text, document text)] to train on; if empty, see qrels["train"]
    notes: list          # what a reader of the scores should know
    judged_ids: set      # of documents with a judgement for a validation or test query
    judged: dict         # {id: title and text} of those that the corpus has, in its order

    def documents_of(self, ids):
        """Yields (id, title and text) of the documents with some ids; of all if ids is None."""
        documents = self.documents()
        if ids is not None and ids <= self.judged_ids:
            documents = self.judged.items()        # without a walk through the corpus
        for document_id, text in documents:
            if ids is None or document_id in ids:
                yield document_id, text


def load_collection(name, data_dir="", cache_dir=""):
    """Reads and checks a collection: a folder of data_dir, the hub's, or the demo's. -> Collection

    cache_dir: where is kept what a walk through the corpus has found; "": nowhere. Raises UserError
    if the collection cannot be reached, or cannot be scored.
    """
    task = find(name, data_dir)
    if task.kind != "retrieval":
        raise UserError(
            f"{name} is not a retrieval collection: python finetune.py --tasks={name}"
        )
    if task.folder:
        documents, queries, qrels = read_folder(task.folder)
    elif task.make:
        documents, queries, qrels = read_demo(task)
    else:
        documents, queries, qrels = read_hub(name, task)
    pairs = []
    if task.pairs and not task.folder:
        pairs = read_hub_pairs(task)

    # Every collection needs validation and test queries. The notes are about the qrels as given.
    given_qrels = dict(qrels)
    cut_notes = [] if "validation" in qrels else [cut_validation(qrels)]

    # Check what was read. That walks through the corpus, which takes minutes for a large one.
    content = json.dumps([queries, qrels, pairs], sort_keys=True).encode()
    judged_ids = set()
    for split in ("validation", "test"):
        for grades in qrels.get(split, {}).values():
            judged_ids |= grades.keys()

    def survey():
        return survey_documents(name, documents, queries, given_qrels, judged_ids, content)

    source = source_of(task)
    if cache_dir and source:
        rules = [*source, hashlib.sha256(content).hexdigest(), sorted(given_qrels)]
        found = cached_survey(cache_dir, name, rules, survey)
    else:
        found = survey()

    for split in ("validation", "test"):
        if not qrels[split]:
            raise UserError(
                f"{name} has no {split} queries: give qrels/{split}.tsv, "
                "or more queries to cut it from"
            )
    return Collection(
        name=name,
        documents=documents,
        queries=queries,
        qrels={"train": {}} | qrels,
        fingerprint=found["fingerprint"],
        pairs=pairs,
        notes=found["notes"] + cut_notes,
        judged_ids=judged_ids,
        judged=found["judged"],
    )


def source_of(task):
    """What decides the documents of a task and is known without reading them; None if nothing is."""
    if task.folder:
        path = find_json_lines(task.folder, "corpus")
        status = os.stat(path)
        return [os.path.realpath(path), status.st_size, status.st_mtime_ns]
    is_pinned = len(task.revision) == 40 and not os.path.isdir(task.hub)
    return [task.hub, task.config, task.revision] if task.hub and is_pinned else None


def cached_survey(folder, name, rules, survey):
    """survey(), which one process of a machine makes for all and for later runs."""
    with packing.alone_in(folder):
        return packing.cached_json(folder, f"{name}-survey", rules, survey, SURVEY_SHAPE)


# ---- checks and notes


def survey_documents(name, documents, queries, qrels, judged_ids, content):
    """Walks through the corpus once, and checks it. -> {"fingerprint", "notes", "judged"}

    content: the bytes that the fingerprint is of, beside the documents. Raises UserError for an id
    that appears twice, and for a collection that cannot be searched.
    """
    ids = set()
    empty_ids = []
    judged = {}
    digest = hashlib.sha256()
    for document_id, text in documents():
        if document_id in ids:
            raise UserError(
                f"{name}: the document id '{document_id}' appears twice: rename or remove one"
            )
        ids.add(document_id)
        digest.update(f"{document_id}\0{text}\0".encode("utf-8", "surrogatepass"))
        if not text.strip():
            empty_ids.append(document_id)
        if document_id in judged_ids:
            judged[document_id] = text
    digest.update(content)

    required = {
        "documents": ids,
        "queries": queries,
        "judgements of test queries": qrels.get("test"),
    }
    for noun, values in required.items():
        if not values:
            raise UserError(f"{name} has no {noun}: an empty collection cannot be searched")
    check_judgements(name, qrels, queries, ids)
    notes = judgement_notes(qrels, queries, ids)
    notes += count_note("documents are empty", empty_ids)
    return {"fingerprint": digest.hexdigest()[:16], "notes": notes, "judged": judged}


def check_judgements(name, qrels, queries, document_ids):
    """Raises UserError if a split's judgements are of no query, or no document, of the collection.

    That happens when ids are written differently in two files. All scores would be 0. (Training
    judgements may be of another collection's queries, if --train_on names one.)
    """
    for split in ("validation", "test"):
        judgements = qrels.get(split)
        if not judgements:
            continue
        judged_ids = [document_id for grades in judgements.values() for document_id in grades]
        for noun, ids, known in (
            ("queries", judgements, queries),
            ("documents", judged_ids, document_ids),
        ):
            if not any(id_ in known for id_ in ids):
                example = shortened(repr(next(iter(ids))))
                known_example = shortened(repr(min(known)))
                raise UserError(
                    f"{name}: none of the {noun} of the {split} judgements is in the collection: "
                    f"an id is {example} in the judgements, and {known_example} in the collection"
                )


def judgement_notes(qrels, queries, document_ids):
    """Notes on judgements of unknown queries or documents, and on queries with nothing relevant."""
    notes = []
    for split in SPLITS:
        if not qrels.get(split):
            continue
        judged_ids = set()
        for grades in qrels[split].values():
            judged_ids |= grades.keys()
        unknown_queries = [query_id for query_id in qrels[split] if query_id not in queries]
        unknown_documents = sorted(judged_ids - document_ids)

        consequence = "are left out" if split == "train" else "count as not found"
        where = f"of the {split} judgements that are not in the collection {consequence}"
        notes += count_note(f"queries {where}", unknown_queries)
        notes += count_note(f"documents {where}", unknown_documents)
        if split != "train":
            without_relevant = [
                query_id for query_id, grades in qrels[split].items() if max(grades.values()) < 1
            ]
            text = f"{split} queries without a relevant document score 0"
            notes += count_note(text, without_relevant)
    return notes


def count_note(text, ids, shown=3):
    """["2 documents are empty (471, 995)"], or [] if there are no ids."""
    if not ids:
        return []
    names = ", ".join(map(shortened, ids[:shown]))
    if len(ids) > shown:
        names += ", ..."
    return [f"{len(ids):,} {text} ({names})"]


def cut_validation(qrels):
    """Moves a share of the training or test queries to qrels["validation"]. -> a note"""
    if qrels.get("train"):
        source, share = "train", HELD_OUT
    else:
        source, share = "test", 0.5
    judgements = qrels[source]
    chosen = {query_id for query_id in judgements if hashed(query_id) < share}
    qrels["validation"] = {q: grades for q, grades in judgements.items() if q in chosen}
    qrels[source] = {q: grades for q, grades in judgements.items() if q not in chosen}
    return f"validation is cut from {source}, {len(chosen):,} queries"


# ---- reading: read_folder, read_demo and read_hub return a Collection's documents, queries, qrels


def with_title(title, text):
    """A document's title and text. The title may be missing or empty."""
    if title and title.strip():
        return f"{title}. {text}"
    return text


def read_folder(folder):
    """Reads a folder in BEIR's layout."""
    corpus = find_json_lines(folder, "corpus")

    def documents():
        for where, row in json_lines(corpus):
            document_id = field_of(row, "_id", str, where)
            title = ""
            if row.get("title") is not None:
                title = field_of(row, "title", str, where)
            yield document_id, with_title(title, field_of(row, "text", str, where))

    # Documents are read whenever they are needed. Queries are few: read them now.
    queries = {}
    for where, row in json_lines(find_json_lines(folder, "queries")):
        query_id = field_of(row, "_id", str, where)
        if query_id in queries:
            raise UserError(
                f"{where}: the query id '{query_id}' appears twice: rename or remove one"
            )
        queries[query_id] = field_of(row, "text", str, where)

    qrels = {}
    for split, names in SPLITS.items():
        # A split's file may have several names. Of several files the last in the alphabet is read:
        # validation.tsv, not dev.tsv.
        paths = []
        for name in names:
            path = find_packed(os.path.join(folder, "qrels"), f"{name}.tsv")
            if path:
                paths.append(path)
        if paths:
            qrels[split] = parse_qrels(read_table(max(paths)))
    if "test" not in qrels:
        raise UserError(f"{folder} has no qrels/test.tsv: {LAYOUT}")
    return documents, queries, qrels


def find_json_lines(folder, name):
    """The path of folder/name.jsonl, which may be compressed."""
    path = find_packed(folder, f"{name}.jsonl")
    if not path:
        raise UserError(f"{folder} has no {name}.jsonl: {LAYOUT}")
    return path


def read_table(path):
    """Yields (where, list of columns) of each line: between tabs or, without any, between blanks."""
    for where, line in lines_of(path):
        if "\t" in line:
            yield where, line.rstrip("\r\n").split("\t")
        else:
            yield where, line.split()


def parse_qrels(rows):
    """(where, [query id, document id, grade]) rows -> {query id: {document id: grade}}

    The first row may be a header. Raises UserError for a row that is not a judgement.
    """
    qrels = {}
    order = (0, 1, 2)  # the columns of the query id, the document id and the grade
    for i, (where, row) in enumerate(rows):
        header_order = order_of_header(row) if i == 0 else None
        if header_order:
            order = header_order
            continue
        # TREC's four columns: query, an iteration that nobody uses, document, grade
        if len(row) == 4 and row[1] in ("0", "Q0") and order == (0, 1, 2):
            row = [row[0], row[2], row[3]]
        if len(row) != max(3, 1 + max(order)):
            raise UserError(
                f"{where} has {len(row)} columns: expected query-id, corpus-id and score, "
                "with tabs between them"
            )
        query_id, document_id, grade = (row[column] for column in order)
        grade = grade_of(grade, where)
        grades = qrels.setdefault(query_id, {})
        if grades.setdefault(document_id, grade) != grade:
            raise UserError(
                f"{where}: document '{shortened(document_id)}' has another grade for query "
                f"'{shortened(query_id)}' in an earlier line"
            )
    return qrels


def order_of_header(row):
    """The columns of query id, document id and grade if a row is a header; otherwise None."""
    names = [cell.strip().lower().replace("_", "-") for cell in row]
    order = []
    for known_names in HEADERS:
        columns = [column for column, name in enumerate(names) if name in known_names]
        if len(columns) != 1:
            return None
        order.append(columns[0])
    return tuple(order)


def grade_of(text, where):
    """A grade as a whole number; it may be written 1.0. Raises UserError if it is none."""
    try:
        grade = float(text)
        if grade.is_integer() and abs(grade) < LARGEST_GRADE:
            return int(grade)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{where}: the grade {shortened(repr(text))} is not a whole number")


def read_demo(task):
    """Makes the demo's collection."""
    demo = task.make()
    queries = {}
    for split_queries in demo["queries"].values():
        queries |= split_queries
    return lambda: iter(demo["corpus"].items()), queries, demo["qrels"]


def read_hub(name, task):
    """Reads one of mteb's collections on the hub, and checks how many queries are judged."""
    if task.config:
        configs = f"{task.config}-corpus", f"{task.config}-queries", f"{task.config}-qrels"
    else:
        configs = "corpus", "queries", "default"
    corpus, query_rows, judgements = (
        load_from_hub(task.hub, config, task.revision) for config in configs
    )

    def documents():
        # If validation and test have a corpus each, these share documents: skip the second copies.
        # The ids of the last corpus, mostly the only one, need not be remembered.
        earlier_ids = set()
        corpora = used_splits(corpus, task)
        for i, rows in enumerate(corpora.values(), start=1):
            for row in rows:
                if id_of(row) not in earlier_ids:
                    yield id_of(row), with_title(row.get("title"), row["text"])
            if i < len(corpora):
                earlier_ids.update(map(id_of, rows))

    # MLDR has queries of training, too, which we do not use.
    queries = {}
    for hub_split, rows in used_splits(query_rows, task).items():
        for row in rows:
            query_id, text = id_of(row), row["text"]
            if queries.setdefault(query_id, text) != text:
                raise UserError(
                    f"{name}: {task.hub} has two queries of the id '{query_id}', one of them in "
                    f"{hub_split}: the data has changed"
                )

    # The judgements of each split, for as many queries as the table of tasks says.
    qrels = {}
    for split, hub_split, size in zip(SPLITS, task.splits, task.sizes):
        if not hub_split:
            continue
        rows = []
        if hub_split in judgements:
            for i, row in enumerate(judgements[hub_split]):
                cells = [str(row["query-id"]), str(row["corpus-id"]), str(row["score"])]
                rows.append((f"{name}, {hub_split} row {i}", cells))
        qrels[split] = parse_qrels(rows)
        if len(qrels[split]) != size:
            raise UserError(
                f"{name}: {task.hub} has judgements for {len(qrels[split]):,} queries in "
                f"{hub_split}, and the table in tasks/registry.py {size:,}: the data has changed"
            )
    return documents, queries, qrels


def used_splits(rows_of_split, task):
    """Of {hub split: rows} those that the task uses; all if they are not named as its splits."""
    used = {split: rows for split, rows in rows_of_split.items() if split in task.splits}
    return used or rows_of_split


def id_of(row):
    """The id of a row from the hub, as text. Its field is called _id or id."""
    return str(row["_id"] if "_id" in row else row["id"])


def read_hub_pairs(task):
    """The training pairs of a hub collection. -> [(query text, document text)]"""
    splits = load_from_hub(task.pairs)
    rows = next(iter(splits.values()))
    return list(zip(rows["query"], rows["positive"]))
