"""Files and folders under names that users choose: such a name is never a pattern, nor markup."""
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import queue
import re
import socket
import threading

from core.configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))      # the folder of this repository


def find_files(folder, pattern):
    """The sorted paths of all files and folders in `folder` that match a pattern like "step_*" or "**/*.parquet".

    Only `pattern` is a pattern. The folder's own name is taken literally, so a run may be called "lr [5e-4]" or "what?".
    No other file of this repository imports the glob module, so that no user's path becomes part of a pattern.
    """
    names = glob.glob(pattern, root_dir=folder, recursive=True)
    return [os.path.join(folder, name) for name in sorted(names)]


def table_cell(name):
    """A name as it stands in a Markdown table, whose columns end at a bar: folders may have one in their names."""
    return name.replace("|", "\\|")


def write_whole(path, content):
    """Write bytes so that `path` holds the old or the new content whole, whatever happens meanwhile."""
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"     # several machines may write the same
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def is_new(folder, *ours):
    """Is a folder not there, or empty but for files of ours and what a killed write_whole left? Anything else is somebody's."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return all(name in ours or re.fullmatch(r".+\.\d+-[0-9a-f]{8}\.tmp", name) for name in names)


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=1).encode())


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def hashed(text):
    """A number in [0, 1) decided by the text alone: no order, no seed, and two copies of a text land on the same side of a cut."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2 ** 64


def lines_of(path):
    """(where, line) of every line that is not blank; path may end in .gz, .xz or .zst. Raises UserError naming file and line."""
    if path.endswith(".zst"):
        import zstandard
        file = io.BufferedReader(zstandard.open(path, "rb"))
    else:
        file = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(path)[1], open)(path, "rb")
    with file as f:
        for number, line in enumerate(unpacked(f, path), start=1):
            if line.strip():
                yield f"{path}, line {number}", decode(line, f"{path}, line {number}")


def unpacked(lines, path):
    """The lines of a file; a compressed one that breaks off or is no such archive becomes a UserError."""
    try:
        yield from lines
    except Exception as error:       # gzip, lzma and zstandard each raise their own
        raise UserError(f"{path} cannot be unpacked ({error}): fetch or compress it again") from None


def decode(raw, where):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv -t UTF-8") from None


def ahead(items, depth):
    """The same items, drawn in a background thread; at most `depth` wait, so memory stays flat whichever side is slower."""
    ready, stop, end = queue.Queue(depth), threading.Event(), object()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work():
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:   # handed to the consumer's thread, which raises it
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join(10.0)     # a thread that waits for a network may take its time: it dies with the process


def unique(path):
    """A name beside path that no other process uses."""
    return f"{path}.{socket.gethostname()}.{os.getpid()}"
