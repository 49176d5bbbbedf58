"""Parquet files as streams of documents: those of a data set on the Hugging Face hub, or of a folder that mirrors one.

    hf:HuggingFaceFW/fineweb-edu:sample-10BT    the files that the data set's own README gives this configuration
    parquet:fineweb-edu/sample/100BT            every .parquet file below a folder

Both need the columns `text` and `id`, as FineWeb-Edu has them. A hub source is pinned to a commit, so its files never change
under a preparation that goes on. $HF_ENDPOINT names another server than huggingface.co.
"""
import os
import sys
import time

from core.configurator import RunError, UserError
from core.files import find_files

COLUMNS = ["text", "id"]
ROWS = 1024           # read, tokenized and written at a time, whatever a file's row groups are
BUFFER = 1 << 23      # bytes of a column that are read at once
LONGEST_WAIT = 60.0   # seconds between two tries


class Patience:
    """Counts the failures in a row of one thing, and waits twice as long after each: 1, 2, 4, ... 60 seconds."""

    def __init__(self, what, retries):
        self.what, self.retries, self.failures = what, retries, 0

    def worked(self):
        self.failures = 0

    def failed(self, error):
        """Wait, or raise RunError after `retries` waits; UserError at once for what no waiting mends."""
        from huggingface_hub import errors
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise UserError(f"{self.what} is on the hub, and HF_HUB_OFFLINE forbids to ask it: unset it, or download the files "
                            "and give --source=parquet:FOLDER") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise UserError(f"the hub does not give {self.what} ({reason})") from None
        self.failures += 1
        if self.failures > self.retries:
            raise RunError(f"{self.what}: the network failed {self.failures} times in a row ({reason}); whole files stay, the same "
                           "command goes on from them") from None
        seconds = min(LONGEST_WAIT, 2.0 ** (self.failures - 1))
        print(f"{self.what}: {reason}; trying again in {seconds:.0f} s ({self.failures} of {self.retries})", file=sys.stderr,
              flush=True)
        time.sleep(seconds)


def network_errors():
    """What a connection that breaks raises, whichever library notices; OSError has the sockets' errors and the hub's."""
    from huggingface_hub import errors
    return OSError, errors.HTTPError


def retried(call, what, retries):
    """call(), again after a network error. Raises RunError when the tries are used up, UserError where none would help."""
    patience = Patience(what, retries)
    while True:
        try:
            return call()
        except network_errors() as error:
            patience.failed(error)


def split_source(source):
    """"hf:ORG/NAME:CONFIG" -> ("ORG/NAME", "CONFIG"). Raises UserError."""
    repository, _, config = source.removeprefix("hf:").partition(":")
    if repository.count("/") != 1:
        raise UserError(f"--source={source}: expected hf:ORG/NAME:CONFIG, as in hf:HuggingFaceFW/fineweb-edu:sample-10BT")
    return repository, config or "default"


def listing(source, revision, retries):
    """The files of a source in a fixed order, and the commit they are pinned to ("" for a folder), as a manifest has them.

    -> {"commit", "files": [[path, bytes], ...]}. Raises UserError: no such folder, data set, revision or configuration.
    """
    if source.startswith("parquet:"):
        folder = source.removeprefix("parquet:")
        paths = find_files(folder, "**/*.parquet")
        if not paths:
            raise UserError(f"no .parquet file below '{folder}' (--source={source})")
        return {"commit": "", "files": [[os.path.relpath(path, folder), os.path.getsize(path)] for path in paths]}
    repository, config = split_source(source)
    return retried(lambda: hub_listing(repository, config, revision), f"{repository} at {revision}", retries)


def hub_listing(repository, config, revision):
    import datasets
    from huggingface_hub import HfApi
    datasets.disable_progress_bars()
    api = HfApi()
    commit = api.dataset_info(repository, revision=revision).sha
    names = datasets.get_dataset_config_names(repository, revision=commit)
    if config not in names:
        raise UserError(f"{repository} has no configuration '{config}'; it has {', '.join(names)}")
    files = datasets.load_dataset_builder(repository, config, revision=commit).config.data_files
    if "train" not in files:
        raise UserError(f"{repository}:{config} has no split 'train' (it has {', '.join(files)})")
    prefix = f"hf://datasets/{repository}@{commit}/"
    paths = sorted(path.removeprefix(prefix) for path in files["train"] if path.endswith(".parquet"))
    if not paths:
        raise UserError(f"{repository}:{config} holds no .parquet files")
    size = {}
    for i in range(0, len(paths), 500):
        found = api.get_paths_info(repository, paths[i:i + 500], revision=commit, repo_type="dataset")
        size |= {file.path: file.size for file in found}
    return {"commit": commit, "files": [[path, size[path]] for path in paths]}


def address(source, commit, path):
    """Where `datasets` finds a file of a listing."""
    if source.startswith("parquet:"):
        return os.path.join(source.removeprefix("parquet:"), path)
    return f"hf://datasets/{split_source(source)[0]}@{commit}/{path}"


def opened(url):
    """A file of the hub as one that can be read anywhere, a range at a time; or a file of this machine."""
    if not url.startswith("hf://"):
        return open(url, "rb")
    from huggingface_hub import HfFileSystem
    return HfFileSystem().open(url, "rb", cache_type="blockcache", cache_options={"maxblocks": 4})     # of 5 MiB


def tables(url, retries):
    """Yield the rows of one parquet file in order, as pyarrow RecordBatches (text, id) of at most ROWS rows.

    Nothing is read before it is asked for. (The scanner behind datasets' streaming=True reads on in the background as fast as the
    network gives, and held a whole file in memory where the tokenizer was slower.) huggingface_hub asks again for a range that
    breaks off, 5 times, 23 seconds in all; when that was not enough, the file is opened anew at the row group that was being
    read. Raises UserError (no parquet, no such column) and RunError.
    """
    import pyarrow.parquet
    patience, group, done = Patience(url, retries), 0, 0      # done: batches of this row group
    while True:
        try:
            with opened(url) as raw:
                file = pyarrow.parquet.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
                check_columns(file.schema_arrow, url)
                while group < file.num_row_groups:
                    for number, batch in enumerate(file.iter_batches(ROWS, [group], COLUMNS)):
                        if number == done:
                            done += 1
                            patience.worked()
                            yield batch
                    group, done = group + 1, 0
            return
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{url} is no intact parquet file: {str(error).splitlines()[0]}") from None
        except network_errors() as error:
            if not url.startswith("hf://"):      # a disk's errors do not pass
                raise
            patience.failed(error)


def check_columns(schema, url):
    for name in COLUMNS:
        if name not in schema.names:
            raise UserError(f"{url} has no column '{name}': a source of this kind has {' and '.join(COLUMNS)}; a plain folder of "
                            "texts needs neither hf: nor parquet:")
        if str(schema.field(name).type) not in ("string", "large_string"):
            raise UserError(f"{url}: the column '{name}' is {schema.field(name).type}, not string")


def texts(urls, retries):
    """The text of every document of these files that is not blank, in order."""
    for url in urls:
        for table in tables(url, retries):
            yield from (text for text in table.column("text").to_pylist() if text and not text.isspace())
