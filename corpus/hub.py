"""Parquet files as streams of documents: a data set of the Hugging Face hub, or a folder of files.

    hf:HuggingFaceFW/fineweb-edu:sample-10BT    the files of one configuration of a data set
    parquet:fineweb-edu/sample/100BT            every .parquet file below a folder

Both need the columns `text` and `id`, as in FineWeb-Edu. A hub source is pinned to a commit when
its preparation starts, so a resumed preparation reads the same files. $HF_ENDPOINT names another
server than huggingface.co.
"""
import os
import sys
import time
from dataclasses import dataclass

from core.configurator import RunError, UserError
from core.files import files_below
from corpus.documents import TEXT, DamagedData, check_text_column, damage_named, text_values

COLUMNS = [TEXT, "id"]
ROWS = 1024               # rows that are read, tokenized and written at a time
BUFFER = 1 << 23          # bytes of a column that are read at once
LONGEST_WAIT = 60.0       # seconds between two tries
PATHS_PER_REQUEST = 500   # files whose sizes the hub is asked for at a time
WORTH_RETRYING = (408, 429)    # HTTP errors 4xx that may pass: request timeout, too many requests


# -------------------------------------------------------------------------------------------------
# network errors
class Patience:
    """Counts failures in a row, and waits longer after each: 1, 2, 4, ... up to 60 seconds."""

    def __init__(self, subject, retries):
        self.subject = subject     # what is being read, for the messages
        self.retries = retries
        self.failures = 0

    def worked(self):
        self.failures = 0

    def failed(self, error):
        """Wait before the next try.

        Raises RunError after `retries` tries in a row, and UserError where waiting does not help.
        """
        from huggingface_hub import errors
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise UserError(
                f"{self.subject} is on the hub, and HF_HUB_OFFLINE forbids asking it: unset "
                "it, or download the files and give --source=parquet:FOLDER"
            ) from None

        # The hub says that the request itself is wrong: there is no such data set, or no access.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, DamagedData):
            reason = str(error)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and 400 <= status < 500 and status not in WORTH_RETRYING:
            raise UserError(f"the hub does not give {self.subject} ({reason})") from None

        self.failures += 1
        if self.failures > self.retries:
            what_failed = "the network failed"
            advice = "run the same command to resume"
            if isinstance(error, DamagedData):
                what_failed = "it came damaged"
                advice = (
                    "if the same command later finds it damaged, too, it is damaged at its source: "
                    "choose another --revision or tell its publisher"
                )
            raise RunError(
                f"{self.subject}: {what_failed} {self.failures} times in a row ({reason}); complete "
                f"files stay, {advice}"
            ) from None
        seconds = min(LONGEST_WAIT, 2.0 ** (self.failures - 1))
        print(
            f"{self.subject}: {reason}; trying again in {seconds:.0f} s "
            f"({self.failures} of {self.retries})",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(seconds)


def passing_errors():
    """The exceptions that another try may mend. OSError covers the errors of sockets and of the hub."""
    from huggingface_hub import errors
    return OSError, errors.HTTPError, DamagedData


def retried(call, subject, retries):
    """The result of call(), which is repeated after a network error.

    Raises RunError and UserError as Patience does.
    """
    patience = Patience(subject, retries)
    while True:
        try:
            return call()
        except passing_errors() as error:
            patience.failed(error)


# -------------------------------------------------------------------------------------------------
# source -> files
@dataclass
class Listing:
    """The files of a source, in a fixed order."""

    commit: str      # that a hub source is pinned to; "" for a folder
    files: list      # [path, bytes] of each

    def urls(self, source):
        """Where tables() finds each file."""
        return [address(source, self.commit, path) for path, _ in self.files]

    def sizes(self):
        """The bytes of each file."""
        return [size for _, size in self.files]


def listing(source, revision, retries):
    """The Listing of a source.

    Raises UserError if the folder, data set, revision or configuration does not exist.
    """
    if source.startswith("parquet:"):
        return folder_listing(source.removeprefix("parquet:"))
    repository, config = split_source(source)
    subject = f"{repository} at {revision}"
    return retried(lambda: hub_listing(repository, config, revision), subject, retries)


def split_source(source):
    """"hf:ORG/NAME:CONFIG" -> ("ORG/NAME", "CONFIG"). Raises UserError."""
    repository, _, config = source.removeprefix("hf:").partition(":")
    if repository.count("/") != 1:
        raise UserError(
            f"--source={source}: expected hf:ORG/NAME:CONFIG, "
            "as in hf:HuggingFaceFW/fineweb-edu:sample-10BT"
        )
    return repository, config or "default"


def folder_listing(folder):
    """The Listing of the parquet files below a folder."""
    paths = files_below(folder, (".parquet",))
    if not paths:
        raise UserError(f"no .parquet file below '{folder}' (--source=parquet:{folder})")
    files = [[os.path.relpath(path, folder), os.path.getsize(path)] for path in paths]
    return Listing("", files)


def hub_listing(repository, config, revision):
    """The Listing of the split "train" of a data set's configuration."""
    import datasets
    from huggingface_hub import HfApi
    datasets.disable_progress_bars()
    api = HfApi()
    commit = api.dataset_info(repository, revision=revision).sha

    # The data set's README says which files belong to a configuration; `datasets` reads it.
    configs = datasets.get_dataset_config_names(repository, revision=commit)
    if config not in configs:
        raise UserError(
            f"{repository} has no configuration '{config}'; it has {', '.join(configs)}"
        )
    files = datasets.load_dataset_builder(repository, config, revision=commit).config.data_files
    if "train" not in files:
        raise UserError(f"{repository}:{config} has no split 'train' (it has {', '.join(files)})")
    prefix = f"hf://datasets/{repository}@{commit}/"
    urls = [url for url in files["train"] if url.endswith(".parquet")]
    paths = sorted(url.removeprefix(prefix) for url in urls)
    if not paths:
        raise UserError(f"{repository}:{config} holds no .parquet files")

    sizes = {}
    for begin in range(0, len(paths), PATHS_PER_REQUEST):
        asked = paths[begin:begin + PATHS_PER_REQUEST]
        infos = api.get_paths_info(repository, asked, revision=commit, repo_type="dataset")
        for file in infos:
            sizes[file.path] = file.size
    return Listing(commit, [[path, sizes[path]] for path in paths])


def address(source, commit, path):
    """Where tables() finds a file of a listing: a path on this machine, or an hf:// URL."""
    if source.startswith("parquet:"):
        return os.path.join(source.removeprefix("parquet:"), path)
    repository, _ = split_source(source)
    return f"hf://datasets/{repository}@{commit}/{path}"


# -------------------------------------------------------------------------------------------------
# file -> documents
def open_url(url):
    """Open a file of the hub, which is fetched a range at a time, or a file of this machine."""
    if not url.startswith("hf://"):
        return open(url, "rb")
    from huggingface_hub import HfFileSystem

    # This cache keeps at most four blocks of 5 MiB in memory.
    return HfFileSystem().open(url, "rb", cache_type="blockcache", cache_options={"maxblocks": 4})


@dataclass
class Rows:
    """Rows of a parquet file that follow each other."""

    texts: list      # str, or None
    ids: list        # str, or None

    def __len__(self):
        return len(self.texts)


def tables(url, retries):
    """Yield the rows of one parquet file in order, as Rows of at most ROWS rows.

    Nothing is read before it is asked for. (`datasets` with streaming=True reads ahead in the
    background as fast as the network allows. Where the tokenizer was slower, a whole file was then
    in memory.)

    huggingface_hub itself repeats a failed request 5 times, over 23 seconds. If that was not
    enough, or if what came is damaged, the file is opened again at the row group that was being read.
    Raises UserError (not an intact parquet file, no such column) and RunError (too many network
    errors, or always damaged).
    """
    import pyarrow.parquet
    is_remote = url.startswith("hf://")
    patience = Patience(url, retries)
    group = 0            # the row group that is being read
    batches_done = 0     # batches of it that were yielded already
    rows_done = 0
    while True:
        try:
            with damage_named(url, is_remote), open_url(url) as raw:
                file = pyarrow.parquet.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
                check_columns(file.schema_arrow, url)
                while group < file.num_row_groups:
                    for number, batch in enumerate(file.iter_batches(ROWS, [group], COLUMNS)):
                        if number == batches_done:
                            columns = read_columns(batch, url, rows_done)
                            batches_done += 1
                            rows_done += len(batch)
                            patience.worked()
                            yield Rows(*columns)
                    group += 1
                    batches_done = 0
            return
        except passing_errors() as error:
            # A file of this machine: waiting does not repair a disk.
            if not is_remote:
                raise
            patience.failed(error)


def read_columns(batch, url, rows_done):
    """The COLUMNS of a batch of rows, as lists of str or None; rows_done: of the file, before it.

    Raises UserError for bytes that are not UTF-8, and DamagedData if they came from the hub.
    """
    try:
        return [text_values(batch.column(name), url, rows_done) for name in COLUMNS]
    except UserError as error:
        if url.startswith("hf://"):
            raise DamagedData(str(error)) from None
        raise


def check_columns(schema, url):
    """Raise UserError unless the columns `text` and `id` are there and hold strings."""
    for name in COLUMNS:
        if name not in schema.names:
            raise UserError(
                f"{url} has no column '{name}': a source of this kind has "
                f"{' and '.join(COLUMNS)}; a plain folder of texts needs neither hf: nor parquet:"
            )
        check_text_column(schema, name, url)


def is_blank(text):
    """True for null, the empty string, and white space alone."""
    return not text or text.isspace()


def texts(urls, retries):
    """Yield the text of every document of these files that is not blank, in order."""
    for url in urls:
        for rows in tables(url, retries):
            for text in rows.texts:
                if not is_blank(text):
                    yield text
