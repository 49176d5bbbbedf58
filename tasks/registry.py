"""The labelled data sets: where they come from, how their rows must look, and how they are split.

    sst2 mnli qqp                  sequence classification          GLUE
    conll2003 ontonotes5 uner      token classification             entities, IOB2
    squad squad_v2 record          extractive question answering
    msmarco nq mldr_en             retrieval: eval_ir.py; ir_data.py reads them
    sotu_era sotu_case sotu_cloze sotu_search   one of each, made by rule from the demo corpus (demo_tasks.py)

`load(name, data_dir, split)` reads a set from the Hugging Face hub or, with data_dir, from local files of the same fields:
data_dir/<name>/{train,validation,test}.jsonl, also one folder deeper, also packed (.gz .xz .zst). A local folder whose
info.json has "label_names", "text_fields" and "label_field" is a task of its own under the folder's name, and so is one in BEIR's
layout, with corpus.jsonl, queries.jsonl and qrels/.

Data sets, templates and splits are the paper's (arXiv 2507.00994, appendix B and its evaluation code). Its test sets are
the published validation sets where the published test labels are secret; validation is cut from train. We cut by a
hash of the text, so that copies of a text and all questions of a paragraph are on one side; split="encodeval" cuts as the
paper's code did, by row.
"""
import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field

from core.configurator import UserError
from core.files import find_files, hashed, lines_of
from tasks import demo

HELD_OUT = 0.05        # share of the training rows that choose the learning rate
KINDS = {"sequence": "sequence classification", "token": "token classification", "span": "question answering"}


@dataclass(frozen=True)
class Task:
    kind: str                      # "sequence", "token", "span" or "retrieval"
    labels: tuple = ()             # names by id
    template: str = ""             # sequence: the text, from a row's fields
    label: str = "label"           # field of the label (sequence) or tags (token)
    words: str = "tokens"          # token: field of the words
    hub: str = ""                  # id of a data set on the Hugging Face hub
    config: str = ""               # its configuration
    revision: str = "main"         # a commit where one is known; sizes and label names are checked in any case
    files: dict = field(default_factory=dict)     # {split: file pattern in the repository}, for those that need a script otherwise
    splits: tuple = ("train", "", "validation")   # the hub's names for train, validation and test; "": cut from train
    sizes: tuple = ()              # rows of train, validation and test
    epochs: int = 0                # train so many epochs; 0: 1,000 steps, as the paper's code has it for each set
    unanswerable: bool = False     # span: some questions have no answer
    entities: bool = False         # span: the answer is one of the passage's marked entities (ReCoRD)
    pairs: str = ""                # retrieval: a set of (query, positive) texts on the hub to train on, instead of train qrels
    train_on: str = ""             # retrieval: the task whose pairs it is trained on; its own if empty
    pool: str = "full"             # retrieval: the documents that are searched unless --pool says otherwise
    make: object = None            # a function -> {split: rows}, or a collection, instead of a hub
    folder: str = ""               # of local files


def iob2(*types):
    return "O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")


GLUE = dict(kind="sequence", hub="nyu-mll/glue", revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
# the order of the data set's label.json, which is not one of sense
ONTONOTES = tuple(
    "O B-CARDINAL B-DATE I-DATE B-PERSON I-PERSON B-NORP B-GPE I-GPE B-LAW I-LAW B-ORG I-ORG B-PERCENT I-PERCENT B-ORDINAL B-MONEY "
    "I-MONEY B-WORK_OF_ART I-WORK_OF_ART B-FAC B-TIME I-CARDINAL B-LOC B-QUANTITY I-QUANTITY I-NORP I-LOC B-PRODUCT I-TIME B-EVENT "
    "I-EVENT I-FAC B-LANGUAGE I-PRODUCT I-ORDINAL I-LANGUAGE".split())
TASKS = {
    "sst2": Task(**GLUE, config="sst2", template="{sentence}", labels=("negative", "positive"), sizes=(67_349, 0, 872)),
    "mnli": Task(**GLUE, config="mnli", template="Premise: {premise}\nHypothesis: {hypothesis}", sizes=(392_702, 0, 9_815),
                 labels=("entailment", "neutral", "contradiction"), splits=("train", "", "validation_matched")),
    "qqp": Task(**GLUE, config="qqp", template="Question 1: {question1}\nQuestion 2: {question2}", sizes=(363_846, 0, 40_430),
                labels=("not_duplicate", "duplicate")),
    "conll2003": Task("token", iob2("PER", "ORG", "LOC", "MISC"), label="ner_tags", hub="lhoestq/conll2003", epochs=1,
                      splits=("train", "validation", "test"), sizes=(14_041, 3_250, 3_453)),
    "ontonotes5": Task("token", ONTONOTES, label="tags", hub="tner/ontonotes5", splits=("train", "validation", "test"),
                       files={"train": "dataset/train*.json", "validation": "dataset/valid.json", "test": "dataset/test.json"},
                       sizes=(59_924, 8_528, 8_262)),
    "uner": Task("token", iob2("PER", "ORG", "LOC"), label="ner_tags", hub="hgissbkh/uner_en", epochs=1,
                 splits=("train", "validation", "test"), sizes=(12_543, 2_001, 2_077)),
    "squad": Task("span", hub="rajpurkar/squad", revision="7b6d24c440a36b6815f21b70d25016731768db1f", sizes=(87_599, 0, 10_570)),
    "squad_v2": Task("span", hub="rajpurkar/squad_v2", revision="3ffb306f725f7d2ce8394bc1873b24868140c412",
                     sizes=(130_319, 0, 11_873), unanswerable=True),
    "record": Task("span", hub="aps/super_glue", revision="9f1f8088b6705f471970f4f2edbcdb450ccf8b22", entities=True,
                   files={part: f"record/{part}/*.parquet" for part in ("train", "validation")}, sizes=(100_730, 0, 10_000)),
    # the hub's mteb copies; the paper trains on MS MARCO and searches the documents judged for its queries, nothing else
    "msmarco": Task("retrieval", hub="mteb/msmarco", revision="c5a29a104738b98a9e76336939199e264163d4a0", pool="judged",
                    pairs="hgissbkh/msmarco-pairs", splits=("", "dev", "test"), sizes=(0, 6_980, 43)),
    "nq": Task("retrieval", hub="mteb/nq", revision="b774495ed302d8c44a3a7ea25c90dbce03968f31", splits=("", "", "test"),
               train_on="msmarco", pool="judged", sizes=(0, 0, 3_452)),
    "mldr_en": Task("retrieval", hub="mteb/MultiLongDocRetrieval", config="en", revision="837028901907a7d419b4ab906f28e011ce1cc824",
                    splits=("", "dev", "test"), train_on="msmarco", pool="judged", sizes=(0, 200, 800)),
    "sotu_era": Task("sequence", demo.ERAS, template="{sentence}", make=demo.era),
    "sotu_case": Task("token", iob2("CAP"), label="ner_tags", make=demo.case),
    "sotu_cloze": Task("span", make=demo.cloze, entities=True),
    "sotu_search": Task("retrieval", make=demo.search, pool="judged"),
}

def names(demo, retrieval):
    return tuple(name for name, t in TASKS.items() if name.startswith("sotu_") == demo and (t.kind == "retrieval") == retrieval)


PAPER, DEMO = names(False, False), names(True, False)               # "all" and "demo" of finetune.py
PAPER_IR, DEMO_IR = names(False, True), names(True, True)           # and of eval_ir.py


# ---- finding

def folders(data_dir):
    """{name: folder} of the data sets below a local data_dir, directly or one folder deeper."""
    if not os.path.isdir(data_dir):
        raise UserError(f"data_dir={data_dir} is no folder")
    found = {}
    for pattern in ("*/train.jsonl*", "*/*/train.jsonl*", "*/corpus.jsonl*", "*/*/corpus.jsonl*"):
        for path in find_files(data_dir, pattern):
            folder = os.path.dirname(path)
            known = os.path.basename(folder) in TASKS or os.path.isfile(os.path.join(folder, "info.json"))
            if known or os.path.basename(path).startswith("corpus."):
                found.setdefault(os.path.basename(folder), folder)
    return found


def find(name, data_dir=""):
    """The Task called name: of the table, of a local folder, or both. Raises UserError for an unknown one, listing all."""
    local = folders(data_dir) if data_dir else {}
    task = TASKS.get(name)
    if name in local and find_files(local[name], "corpus.jsonl*"):
        known = task if task and task.kind == "retrieval" else Task("retrieval")
        return dataclasses.replace(known, folder=local[name], make=None)
    if name in local:
        return dataclasses.replace(described(task, local[name]), folder=local[name], make=None)
    if task is None:
        raise UserError(f"unknown task '{name}': expected one of {', '.join(sorted(TASKS.keys() | local.keys()))}, all or demo"
                        + ("; a folder in data_dir is one if its info.json has label_names, text_fields and label_field" if data_dir
                           else "; or a folder of yours, see --data_dir"))
    if data_dir and not task.make:
        file = "corpus" if task.kind == "retrieval" else "train"
        raise UserError(f"{data_dir} has no {name}/{file}.jsonl, nor one folder deeper: without --data_dir it comes from the hub")
    return task


def described(task, folder):
    """The task of a local folder: the table's, whose labels its info.json must not contradict, or info.json's own."""
    path = os.path.join(folder, "info.json")
    if not os.path.isfile(path):
        return task
    with open(path, encoding="utf-8") as f:
        try:
            info = json.load(f)
            labels, fields, label = tuple(info["label_names"]), info["text_fields"], info["label_field"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected label_names, text_fields and label_field ({error!r})") from None
    if task is not None:
        if labels != task.labels:
            raise UserError(f"{path} has the labels {labels}, and the table in tasks.py {task.labels}")
        return task
    if fields == ["tokens"]:
        return Task("token", labels, label=label)
    return Task("sequence", labels, label=label, template=info.get("template", "\n".join(f"{{{f}}}" for f in fields)))


# ---- reading

def load(name, data_dir="", split="hash"):
    """-> (Task, {"train" | "validation" | "test": examples}, notes: what a reader of the scores should know).

    Examples by kind: {"text", "label"}, {"words", "tags"}, or {"question", "context", "answers": [(text, start)], "entities":
    [(start, end)]}; labels and tags as ids, starts and ends in characters of the context.
    Raises UserError, in one line, for a row that does not fit, a data set that has changed, or one that cannot be reached.
    """
    task = find(name, data_dir)
    if split not in ("hash", "encodeval"):
        raise UserError(f"split={split}: expected hash (ours) or encodeval (the paper's)")
    rows = of_folder(task) if task.folder else task.make() if task.make else of_hub(name, task)
    examples, empty = {}, 0
    for part, part_rows in rows.items():
        read = {"sequence": of_sequence, "token": of_token, "span": of_span}[task.kind]
        found = [read(task, row, where) for where, row in numbered(name, part, part_rows)]
        dropped = task.kind == "token"          # a sentence without words has nothing to score; CoNLL's document markers likewise
        blank = [not key_of(task, e).strip() or key_of(task, e) == "-DOCSTART-" for e in found]
        empty += sum(blank)
        examples[part] = [e for e, b in zip(found, blank) if not (dropped and b)]
    what = "left out" if task.kind == "token" else "read as an end-of-text token alone"
    notes = [f"{empty} empty texts, {what}"] if empty else []
    if "validation" not in examples:
        examples["train"], examples["validation"] = cut(task, examples["train"], split)
    for part in ("train", "validation", "test"):
        if not examples.get(part):
            raise UserError(f"{name} has no {part} examples: give {part}.jsonl in {task.folder}, or more rows to cut it from")
    return task, examples, notes


def numbered(name, part, rows):
    return ((row if isinstance(row, tuple) else (f"{name}, {part} row {i}", row)) for i, row in enumerate(rows))


def of_folder(task):
    """{split: [(where, row)]} of a folder's .jsonl files. Without a test file the validation file is the test set and validation
    is cut from train, as the paper does with the published sets."""
    rows = {}
    for part in ("train", "validation", "test"):
        for path in find_files(task.folder, f"{part}.jsonl*"):
            rows[part] = []
            for where, line in lines_of(path):
                try:
                    rows[part].append((where, json.loads(line)))
                except json.JSONDecodeError:
                    raise UserError(f"{where} is no JSON object") from None
    if "test" not in rows and "validation" in rows:
        rows["test"] = rows.pop("validation")
    return rows


def of_hub(name, task):
    """{split: rows} from the hub, sizes and label names checked."""
    try:
        import datasets
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()       # its retries; the error below says it once
        if task.files:
            kind = "json" if "json" in task.files["train"] else "parquet"
            root = task.hub if os.path.isdir(task.hub) else f"hf://datasets/{task.hub}@{task.revision}"
            found = datasets.load_dataset(kind, data_files={part: f"{root}/{file}" for part, file in task.files.items()})
        else:
            found = datasets.load_dataset(task.hub, task.config or None, revision=task.revision)
    except Exception as error:      # network, hub and parser each raise their own
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name}: could not load {task.hub} at {task.revision} from the Hugging Face hub ({type(error).__name__}: "
                        f"{first}): connect to the network, or give files of the same fields with --data_dir=FOLDER, or run "
                        "--tasks=demo") from None
    rows = {}
    for part, there, size in zip(("train", "validation", "test"), task.splits, task.sizes):
        if not there:
            continue
        n = len(found[there]) if there in found else 0
        if n != size:
            raise UserError(f"{name}: {task.hub} has {n} rows in {there}, and the table in tasks.py {size}: the data has changed")
        feature = found[there].features.get(task.label)
        named = getattr(getattr(feature, "feature", feature), "names", None)
        if named is not None and tuple(named) != task.labels:
            raise UserError(f"{name}: {task.hub} has the labels {', '.join(named)}, and the table in tasks.py "
                            f"{', '.join(task.labels)}: the data has changed")
        rows[part] = found[there].to_list()
    return rows


def value(row, name, kind, where):
    try:
        found = row[name]
    except (KeyError, TypeError):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no field '{name}' (it has {there})") from None
    if not isinstance(found, kind):
        raise UserError(f"{where}: the field '{name}' is {type(found).__name__}, not {kind.__name__}")
    return found


def label_id(task, found, where):
    """A label as an id, from an id or a name."""
    if isinstance(found, str) and found in task.labels:
        return task.labels.index(found)
    if type(found) is not int or not 0 <= found < len(task.labels):
        raise UserError(f"{where}: label {found!r} is not in the table: {len(task.labels)} labels, {', '.join(task.labels[:9])}"
                        + (", ..." if len(task.labels) > 9 else ""))
    return found


def of_sequence(task, row, where):
    fields = [name.partition("}")[0] for name in task.template.split("{")[1:]]
    text = task.template.format(**{name: value(row, name, str, where) for name in fields})
    return {"text": text, "label": label_id(task, value(row, task.label, object, where), where)}


def of_token(task, row, where):
    words = value(row, task.words, list, where)
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: the field '{task.words}' holds something that is not a string")
    tags = [label_id(task, tag, where) for tag in value(row, task.label, list, where)]
    if len(words) != len(tags):
        raise UserError(f"{where} has {len(words)} words and {len(tags)} tags")
    for i, tag in enumerate(tags):        # IOB1, in which an I- may begin an entity -> IOB2
        prefix, _, kind = task.labels[tag].partition("-")
        if prefix == "I" and (i == 0 or task.labels[tags[i - 1]].partition("-")[2] != kind):
            tags[i] = task.labels.index(f"B-{kind}")
    return {"words": words, "tags": tags}


def of_span(task, row, where):
    if task.entities:
        context, question = value(row, "passage", str, where), value(row, "query", str, where)
        wanted, marked = set(value(row, "answers", list, where)), value(row, "entity_spans", dict, where)
        texts, starts, ends = (value(marked, k, list, where) for k in ("text", "start", "end"))
        answers = [(text, start) for text, start in zip(texts, starts) if text in wanted]     # every mention
        entities = list(zip(starts, ends))
        if not answers:
            raise UserError(f"{where}: none of the answers {sorted(wanted)} is an entity of the passage")
    else:
        context, question = value(row, "context", str, where), value(row, "question", str, where)
        given = value(row, "answers", dict, where)
        answers, entities = list(zip(*(value(given, k, list, where) for k in ("text", "answer_start")))), []
        if not answers and not task.unanswerable:
            raise UserError(f"{where}: the question has no answer")
    for text, start in answers:
        if not isinstance(text, str) or type(start) is not int or start < 0 or not text or context[start:start + len(text)] != text:
            raise UserError(f"{where}: the answer {text!r} is not at character {start} of the context")
    return {"question": question, "context": context, "answers": answers, "entities": entities}


# ---- splitting

def key_of(task, example):
    """The text that decides on which side of a cut an example is."""
    return " ".join(example["words"]) if task.kind == "token" else example["text" if task.kind == "sequence" else "context"]


def cut(task, examples, split):
    """-> training examples, validation examples"""
    if split == "encodeval":
        import datasets
        parts = datasets.Dataset.from_dict({"row": range(len(examples))}).train_test_split(train_size=1 - HELD_OUT, seed=42)
        return [examples[i] for i in parts["train"]["row"]], [examples[i] for i in parts["test"]["row"]]
    sides = defaultdict(list)
    for e in examples:
        sides[hashed(key_of(task, e)) < HELD_OUT].append(e)
    return sides[False], sides[True]


def fingerprint(examples):
    """16 hex digits that change with any of the examples."""
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()[:16]
