"""Reading a task's data: from a local folder, the Hugging Face hub, or the function that makes it.

Start at `load`. The task's family checks each row and makes an example of it. Where the data has no
validation set, one is cut from the training data. split="hash" cuts by a hash of the text, so that
copies of a text, and all questions about a paragraph, stay together. split="encodeval" cuts by row,
as the paper's code does.
"""
import hashlib
import json
import os

from core.configurator import UserError
from core.files import find_packed, hashed, lines_of
from core.schema import parse_json
from tasks.registry import HELD_OUT, family_of, find

SPLITS = ("train", "validation", "test")
ODD_SHARE = 0.001       # of the training rows may be left out, because the family cannot read them
SHOWN = 3               # of the rows left out are named


def load(name, data_dir="", split="hash"):
    """Read a task's data. -> Task, {"train" | "validation" | "test": examples}, notes

    The notes tell what a reader of the scores should know. Raises UserError for a row that the
    family does not accept, and for a data set that has changed or cannot be reached. Of the training
    rows one in a thousand may be odd: these are left out, and named.
    """
    task = find(name, data_dir)
    if split not in ("hash", "encodeval"):
        raise UserError(f"split={split}: expected hash (ours) or encodeval (the paper's)")

    # rows, from one of three sources
    if task.folder:
        rows = read_folder(task.folder)
    elif task.make:
        rows = task.make()
    else:
        rows = read_hub(name, task)

    # rows -> examples; the same in both modes
    family = family_of(task)
    examples, n_empty = {}, 0
    complaints = []                        # about odd training rows
    for split_name, split_rows in rows.items():
        examples[split_name] = []
        for where, row in with_places(name, split_name, split_rows):
            try:
                example = family.read(row, where)
            except UserError as error:
                complaints.append(str(error))
                if split_name != "train" or len(complaints) > ODD_SHARE * len(split_rows):
                    raise UserError(complaint_of(complaints, split_name)) from None
                continue
            text = family.key_text(example)
            # CoNLL marks the beginning of a document by a sentence of this one word
            is_empty = not text.strip() or text == "-DOCSTART-"
            n_empty += is_empty
            if not (is_empty and family.leaves_out_empty):
                examples[split_name].append(example)
    notes = list(family.notes)
    if complaints:
        shown = "; ".join(complaints[:SHOWN])
        more = "; ..." if len(complaints) > SHOWN else ""
        notes.append(f"{len(complaints)} odd training rows are left out ({shown}{more})")
    if n_empty:
        consequence = "read as an end-of-text token alone"
        if family.leaves_out_empty:
            consequence = "left out"
        notes.append(f"{n_empty} empty texts, {consequence}")

    # all three splits must have examples
    if "validation" not in examples:
        examples["train"], examples["validation"] = cut(family, examples["train"], split)
    for split_name in SPLITS:
        if not examples.get(split_name):
            raise UserError(f"{name} has no {split_name} examples: give {split_name}.jsonl in "
                            f"{task.folder}, or more rows to cut it from")
    return task, examples, notes


def complaint_of(complaints, split):
    """The message about the last of some odd rows, which is one too many."""
    text = complaints[-1]
    if split == "train" and len(complaints) > 1:
        text += f" ({len(complaints)} odd rows so far: more than {ODD_SHARE:.1%} of train)"
    return text


def with_places(name, split, rows):
    """Yields (where, row). `where` names the row in error messages. Rows from a folder have it."""
    for i, row in enumerate(rows):
        if isinstance(row, tuple):
            yield row
        else:
            yield f"{name}, {split} row {i}", row


# ---- a local folder

def read_folder(folder):
    """{split: [(where, row)]} of a folder's .jsonl files.

    If there is no test file, the validation file becomes the test set, as the paper does it with
    the published sets. load() then cuts validation from train.
    """
    rows = {}
    for split in SPLITS:
        path = find_packed(folder, f"{split}.jsonl")
        if path:
            rows[split] = list(json_lines(path))
    if "test" not in rows and "validation" in rows:
        rows["test"] = rows.pop("validation")
    return rows


def json_lines(path):
    """Yields (where, row) of a file of JSON lines. Raises UserError for a line that is not JSON."""
    for where, line in lines_of(path):
        yield where, parse_json(line, where)


# ---- the Hugging Face hub

def read_hub(name, task):
    """{split: rows} from the hub. Raises UserError if sizes or labels are not those of the Task."""
    dataset = load_from_hub(task.hub, task.config, task.revision, task.files)
    rows = {}
    for split, hub_split, size in zip(SPLITS, task.splits, task.sizes):
        if not hub_split:
            continue
        n = len(dataset[hub_split]) if hub_split in dataset else 0
        if n != size:
            raise UserError(f"{name}: {task.hub} has {n} rows in {hub_split}, and the table in "
                            f"tasks/registry.py {size}: the data has changed")
        labels = label_names(dataset[hub_split].features.get(task.label))
        if labels and labels != task.labels:
            raise UserError(f"{name}: {task.hub} has the labels {', '.join(labels)}, and the "
                            f"table in tasks/registry.py {', '.join(task.labels)}: "
                            "the data has changed")
        rows[split] = dataset[hub_split].to_list()
    return rows


def label_names(feature):
    """The label names of a `datasets` feature: a ClassLabel, or a list of them. Otherwise ()."""
    label = getattr(feature, "feature", feature)
    return tuple(getattr(label, "names", None) or ())


def load_from_hub(repository, config="", revision="main", files=None):
    """A data set on the Hugging Face hub, as the package `datasets` returns it: {split: rows}.

    repository: its id, or a local folder. files: {split: pattern of its files}, for a repository
    that `datasets` cannot load by itself. Raises UserError, in one line, if it cannot be loaded.
    """
    is_local = os.path.isdir(repository)
    try:
        import datasets
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()       # no warning per retry: the error below says it once
        if files:
            root = repository if is_local else f"hf://datasets/{repository}@{revision}"
            data_files = {split: f"{root}/{pattern}" for split, pattern in files.items()}
            file_format = "json" if "json" in files["train"] else "parquet"
            return datasets.load_dataset(file_format, data_files=data_files)
        if is_local:
            return datasets.load_dataset(repository, config or None)
        return datasets.load_dataset(repository, config or None, revision=revision)
    except Exception as error:      # network, hub and parser each raise their own
        message = (str(error).splitlines() or [""])[0]
        raise UserError(f"could not load {repository} at {revision} from the Hugging Face hub "
                        f"({type(error).__name__}: {message}): connect to the network, or give "
                        "local files with --data_dir=FOLDER, or run --tasks=demo") from None


# ---- validation

def cut(family, examples, method):
    """Cut a list of examples in two. -> training examples, validation examples

    method: hash (of the text) or encodeval (by row, as the paper's code does).
    """
    if method == "encodeval":
        import datasets
        indices = datasets.Dataset.from_dict({"row": range(len(examples))})
        two_sets = indices.train_test_split(train_size=1 - HELD_OUT, seed=42)
        train = [examples[i] for i in two_sets["train"]["row"]]
        validation = [examples[i] for i in two_sets["test"]["row"]]
        return train, validation
    train, validation = [], []
    for example in examples:
        is_held_out = hashed(family.key_text(example)) < HELD_OUT
        if is_held_out:
            validation.append(example)
        else:
            train.append(example)
    return train, validation


def fingerprint(examples):
    """A hash of all examples: 16 hex digits."""
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()[:16]
