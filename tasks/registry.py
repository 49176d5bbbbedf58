"""The tasks: their names, sizes and labels, and where their data comes from.

    sst2 mnli qqp                  sequence classification          GLUE
    conll2003 ontonotes5 uner      token classification             entities, IOB2
    squad squad_v2 record          extractive question answering
    msmarco nq mldr_en             retrieval, for eval_ir.py        see retrieval/collections.py
    sotu_era sotu_case sotu_cloze sotu_search   one of each kind, made by rule (demo.py)

A new task is an entry of TASKS. A new family of tasks is a class and an entry of FAMILIES. Nothing
else needs to change.

With --data_dir a task is read from local files whose rows have the fields of the hub's:
data_dir/<name>/{train,validation,test}.jsonl. They may lie one folder deeper, and be compressed
(.gz .xz .zst). data_dir may also be the folder <name> itself. A local folder is a task of its own,
under the folder's name, if it has an info.json with "label_names", "text_fields" and "label_field",
or if it has BEIR's layout: corpus.jsonl, queries.jsonl and qrels/.

Data sets, templates and test sets are the paper's (arXiv 2507.00994, appendix B and its evaluation
code), some from other copies on the hub than its code reads. Where the published test labels are
secret, the published validation set is the test set, and validation is cut from train (loading.py).
"""
import dataclasses
import difflib
import os
from collections import Counter
from dataclasses import dataclass, field

from core.configurator import UserError
from core.files import find_files
from core.schema import read_json
from tasks import demo
from tasks.family import shortened
from tasks.question_answering import PaperQuestionAnswering, QuestionAnswering
from tasks.sequence_classification import SequenceClassification, template_parts
from tasks.token_classification import PaperTokenClassification, TokenClassification

HELD_OUT = 0.05        # share of the training rows that choose the learning rate
# the info.json of a local folder
INFO_SHAPE = {"label_names": [str], "text_fields": [str], "label_field": str, "template?": str}

# the family of each kind of task, and the paper's variant of those that have one
FAMILIES = {
    "sequence": SequenceClassification,
    "token": TokenClassification,
    "span": QuestionAnswering,
}
PAPER_FAMILIES = {
    "token": PaperTokenClassification,
    "span": PaperQuestionAnswering,
}


@dataclass(frozen=True)
class Task:
    """One data set. Some fields are for one kind of task only, as their comments say."""
    kind: str                   # a key of FAMILIES, or "retrieval"
    labels: tuple = ()          # names by id
    template: str = ""          # sequence: the text, made from a row's fields
    label: str = "label"        # the row's field with the label (sequence) or the tags (token)
    words: str = "tokens"       # token: the row's field with the words
    unanswerable: bool = False  # span: some questions have no answer
    entities: bool = False      # span: the answer is one of the passage's marked entities (ReCoRD)
    epochs: int = 0             # of training, as in the paper's code; 0: 1,000 steps instead

    # where the data comes from: the Hugging Face hub, a function, or a local folder
    hub: str = ""               # id of a data set on the hub
    config: str = ""            # its configuration
    revision: str = "main"      # a commit where it is pinned; sizes and labels are always checked
    # {split: file pattern}, for repositories that the package `datasets` cannot load by itself
    files: dict = field(default_factory=dict)
    # the hub's names of train, validation and test; "" where the hub has no such split
    splits: tuple = ("train", "", "validation")
    sizes: tuple = ()           # rows of train, validation and test
    make: object = None         # a function -> {split: rows}; for retrieval as demo.search
    folder: str = ""            # the folder of local files

    # retrieval only
    pairs: str = ""             # id of a data set on the hub with training pairs (query, positive)
    train_on: str = ""          # the task whose training pairs are used; its own if empty
    pool: str = "full"          # which documents are searched unless --pool says otherwise


def family_of(task, mode="standard"):
    """The Family of a task: the object that reads, encodes, trains and scores it."""
    families = FAMILIES | PAPER_FAMILIES if mode == "paper" else FAMILIES
    return families[task.kind](task, mode)


def iob2(*types):
    """The labels for entities of these types: "O", then "B-" and "I-" of each type."""
    labels = ["O"]
    for entity_type in types:
        labels += [f"B-{entity_type}", f"I-{entity_type}"]
    return tuple(labels)


GLUE = dict(
    kind="sequence", hub="nyu-mll/glue", revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
ENTITIES = dict(kind="token", splits=("train", "validation", "test"))
# in the order of the data set's label.json, which follows no rule
ONTONOTES = tuple(
    "O B-CARDINAL B-DATE I-DATE B-PERSON I-PERSON B-NORP B-GPE I-GPE B-LAW I-LAW B-ORG I-ORG "
    "B-PERCENT I-PERCENT B-ORDINAL B-MONEY I-MONEY B-WORK_OF_ART I-WORK_OF_ART B-FAC B-TIME "
    "I-CARDINAL B-LOC B-QUANTITY I-QUANTITY I-NORP I-LOC B-PRODUCT I-TIME B-EVENT I-EVENT I-FAC "
    "B-LANGUAGE I-PRODUCT I-ORDINAL I-LANGUAGE".split())

TASKS = {
    "sst2": Task(
        **GLUE, config="sst2", template="{sentence}",
        labels=("negative", "positive"), sizes=(67_349, 0, 872)),
    "mnli": Task(
        **GLUE, config="mnli", template="Premise: {premise}\nHypothesis: {hypothesis}",
        labels=("entailment", "neutral", "contradiction"),
        splits=("train", "", "validation_matched"), sizes=(392_702, 0, 9_815)),
    "qqp": Task(
        **GLUE, config="qqp", template="Question 1: {question1}\nQuestion 2: {question2}",
        labels=("not_duplicate", "duplicate"), sizes=(363_846, 0, 40_430)),

    "conll2003": Task(
        **ENTITIES, hub="lhoestq/conll2003", label="ner_tags", epochs=1,
        labels=iob2("PER", "ORG", "LOC", "MISC"), sizes=(14_041, 3_250, 3_453)),
    "ontonotes5": Task(
        **ENTITIES, hub="tner/ontonotes5", label="tags", labels=ONTONOTES,
        files={"train": "dataset/train*.json", "validation": "dataset/valid.json",
               "test": "dataset/test.json"},
        sizes=(59_924, 8_528, 8_262)),
    "uner": Task(
        **ENTITIES, hub="hgissbkh/uner_en", label="ner_tags", epochs=1,
        labels=iob2("PER", "ORG", "LOC"), sizes=(12_543, 2_001, 2_077)),

    "squad": Task(
        "span", hub="rajpurkar/squad", revision="7b6d24c440a36b6815f21b70d25016731768db1f",
        sizes=(87_599, 0, 10_570)),
    "squad_v2": Task(
        "span", hub="rajpurkar/squad_v2", revision="3ffb306f725f7d2ce8394bc1873b24868140c412",
        unanswerable=True, sizes=(130_319, 0, 11_873)),
    "record": Task(
        "span", hub="aps/super_glue", revision="9f1f8088b6705f471970f4f2edbcdb450ccf8b22",
        files={"train": "record/train/*.parquet", "validation": "record/validation/*.parquet"},
        entities=True, sizes=(100_730, 0, 10_000)),

    # Retrieval: the hub's mteb copies. The paper trains on MS MARCO, and searches only the
    # documents that were judged for a collection's queries.
    "msmarco": Task(
        "retrieval", hub="mteb/msmarco", revision="c5a29a104738b98a9e76336939199e264163d4a0",
        pairs="hgissbkh/msmarco-pairs", pool="judged",
        splits=("", "dev", "test"), sizes=(0, 6_980, 43)),
    "nq": Task(
        "retrieval", hub="mteb/nq", revision="b774495ed302d8c44a3a7ea25c90dbce03968f31",
        train_on="msmarco", pool="judged",
        splits=("", "", "test"), sizes=(0, 0, 3_452)),
    "mldr_en": Task(
        "retrieval", hub="mteb/MultiLongDocRetrieval", config="en",
        revision="837028901907a7d419b4ab906f28e011ce1cc824", train_on="msmarco", pool="judged",
        splits=("", "dev", "test"), sizes=(0, 200, 800)),

    # one of each kind that needs no network
    "sotu_era": Task("sequence", demo.ERAS, template="{sentence}", make=demo.era),
    "sotu_case": Task("token", iob2("CAP"), label="ner_tags", make=demo.case),
    "sotu_cloze": Task("span", make=demo.cloze, entities=True),
    "sotu_search": Task("retrieval", make=demo.search, pool="judged"),
}

# what --tasks=all and --tasks=demo stand for: in finetune.py, and (_IR) in eval_ir.py
PAPER = ("sst2", "mnli", "qqp", "conll2003", "ontonotes5", "uner", "squad", "squad_v2", "record")
DEMO = ("sotu_era", "sotu_case", "sotu_cloze")
PAPER_IR = ("msmarco", "nq", "mldr_en")
DEMO_IR = ("sotu_search",)


# ---- finding a task

def folders(data_dir):
    """{name: folder} of the data sets below a local data_dir, directly or one folder deeper.

    data_dir may also be the folder of a data set itself.
    """
    if not os.path.isdir(data_dir):
        raise UserError(f"data_dir={data_dir} is not a folder")
    folder_of = {}
    for pattern in ("*/train.jsonl*", "*/*/train.jsonl*", "*/corpus.jsonl*", "*/*/corpus.jsonl*",
                    "train.jsonl*", "corpus.jsonl*"):
        for path in find_files(data_dir, pattern):
            folder, file = os.path.split(path)
            name = os.path.basename(os.path.abspath(folder))
            is_described = name in TASKS or os.path.isfile(os.path.join(folder, "info.json"))
            if is_described or file.startswith("corpus."):
                folder_of.setdefault(name, folder)
    return folder_of


def find(name, data_dir=""):
    """The Task called name, from TASKS, from a local folder, or from both. Raises UserError if
    there is none."""
    local = folders(data_dir) if data_dir else {}
    task = TASKS.get(name)
    if name in local:
        if find_files(local[name], "corpus.jsonl*"):
            if task is None or task.kind != "retrieval":
                task = Task("retrieval")
        else:
            task = described_task(task, local[name])
        return dataclasses.replace(task, folder=local[name], make=None)
    if task is None:
        names = sorted(TASKS.keys() | local.keys())
        for nearest in difflib.get_close_matches(name[:100].lower(), names, n=1):
            names.remove(nearest)
            names.insert(0, f"{nearest} (the nearest)")
        advice = "or a folder of yours, see --data_dir"
        if data_dir:
            advice = ("a folder in data_dir is one if its info.json has label_names, text_fields "
                      "and label_field, or if it is a collection: corpus.jsonl, queries.jsonl, qrels/")
        raise UserError(f"unknown task '{shortened(name)}': expected one of {', '.join(names)}, all "
                        f"or demo; {advice}")
    if data_dir and not task.make:
        file = "corpus.jsonl" if task.kind == "retrieval" else "train.jsonl"
        if find_files(data_dir, f"{file}*"):
            raise UserError(f"{data_dir} has a {file} itself, but is not called {name}: rename it "
                            f"to {name}, or give the folder that holds {name}/{file}")
        raise UserError(f"{data_dir} has no {name}/{file}, nor one folder deeper: without "
                        "--data_dir it comes from the hub")
    return task


def described_task(task, folder):
    """The Task of a local folder: the table's if it has one, otherwise what info.json describes.

    task: the table's, or None. Raises UserError if info.json has other labels than the table.
    """
    path = os.path.join(folder, "info.json")
    if not os.path.isfile(path):
        return task
    info = read_json(path, INFO_SHAPE)
    labels = tuple(info["label_names"])
    text_fields = info["text_fields"]
    label_field = info["label_field"]
    if len(labels) < 2:
        raise UserError(f"{path}: 'label_names' has {len(labels)} names: expected two or more")
    duplicates = [name for name, count in Counter(labels).items() if count > 1]
    if duplicates:
        raise UserError(f"{path}: 'label_names' has '{duplicates[0]}' twice: rename or remove one")
    if task is not None:
        if labels != task.labels:
            raise UserError(f"{path} has the labels {labels}, and the table in tasks/registry.py "
                            f"{task.labels}")
        return task
    if text_fields == ["tokens"]:
        return Task("token", labels, label=label_field)
    # by default the text has one field a line: "{question}\n{passage}"
    template = info.get("template", "\n".join(f"{{{name}}}" for name in text_fields))
    if not any(is_field for is_field, _ in template_parts(template, path)):
        raise UserError(f"{path}: the text has no field: name some in 'text_fields'")
    return Task("sequence", labels, label=label_field, template=template)
