"""Parquet files as streams of documents: those of a data set on the Hugging Face hub, or of a folder that mirrors one.

    hf:HuggingFaceFW/fineweb-edu:sample-10BT    the files that the data set's own README gives this configuration
    parquet:fineweb-edu/sample/100BT            every .parquet file below a folder

Both need the columns `text` and `id`, as FineWeb-Edu has them. A hub source is pinned to a commit, so its files never change
under a preparation that goes on. $HF_ENDPOINT names another server than huggingface.co.
"""
import glob
import os
import sys
import time

from configurator import RunError, UserError

COLUMNS = ["text", "id"]
ROWS = 1024           # read, tokenized and written at a time, whatever a file's row groups are
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
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.parquet"), recursive=True))
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


def tables(url, retries):
    """Yield the rows of one parquet file as pyarrow Tables (text, id) of at most ROWS rows, streamed, in order.

    huggingface_hub asks again for a range that breaks off (5 times, 23 seconds in all). When that was not enough, the file is
    opened anew and read up to the table that is wanted next. Raises UserError (no parquet, no such column) and RunError.
    """
    import datasets
    import pyarrow.dataset
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    config = datasets.config       # its own 20 tries would hide ours
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    scan = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)     # its buffer keeps what was read until the file ends
    patience, done = Patience(url, retries), 0
    while True:
        try:
            stream = datasets.load_dataset("parquet", data_files={"train": [url]}, split="train", streaming=True, columns=COLUMNS,
                                           batch_size=ROWS, fragment_scan_options=scan)
            check_columns(stream.features, url)
            for number, table in enumerate(stream.with_format("arrow").iter(ROWS)):
                if number == done:
                    done += 1
                    patience.worked()
                    yield table
            return
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{url} is no intact parquet file: {str(error).splitlines()[0]}") from None
        except network_errors() as error:
            if not url.startswith("hf://"):      # a disk's errors do not pass
                raise
            patience.failed(error)


def check_columns(features, url):
    for name in COLUMNS:
        if name not in features:
            raise UserError(f"{url} has no column '{name}': a source of this kind has {' and '.join(COLUMNS)}; a plain folder of "
                            "texts needs neither hf: nor parquet:")
        kind = getattr(features[name], "dtype", type(features[name]).__name__)
        if kind not in ("string", "large_string"):
            raise UserError(f"{url}: the column '{name}' is {kind}, not string")


def texts(urls, retries):
    """The text of every document of these files that is not blank, in order."""
    for url in urls:
        for table in tables(url, retries):
            yield from (text for text in table.column("text").to_pylist() if text and not text.isspace())
