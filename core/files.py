"""Files and folders: complete writes, JSON, lines of compressed files, and reading ahead.

Users choose the names of folders. Here a name is never taken for a pattern, and never for markup.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import queue
import re
import shutil
import socket
import threading
import unicodedata

from core.configurator import UserError

# lines_of() refuses a longer line. So a few kilobytes that unpack to gigabytes without an end of line
# take no more memory than this.
LONGEST_LINE = 64 << 20    # bytes

THIS_PROCESS = os.urandom(4).hex()

# The folder of this repository.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# -------------------------------------------------------------------------------------------------
# names
def find_files(folder, pattern):
    """The sorted paths of everything in `folder` that matches a pattern like "**/*.parquet".

    The folder's own name is taken literally, so a run may be called "lr [5e-4]" or "what?". No
    other file of this repository imports glob, so that no user's path becomes part of a pattern.
    """
    names = glob.glob(pattern, root_dir=folder, recursive=True)
    return [os.path.join(folder, name) for name in sorted(names)]


def files_below(folder, suffixes):
    """The files below `folder` whose names end in one of `suffixes`, sorted by name.

    A folder is read once, also if links lead back to it. Hidden files and folders are left out, and
    so is `_temporary`, where Spark keeps parts that are not finished.
    """
    names = []
    folders_seen = set()
    # Links are followed after all real folders. So a folder that is also linked to keeps its own name.
    folders, links = [""], []
    while folders or links:
        name = folders.pop() if folders else links.pop()
        path = os.path.join(folder, name)
        if not os.path.isdir(path) or os.path.realpath(path) in folders_seen:
            continue
        folders_seen.add(os.path.realpath(path))
        for entry in os.listdir(path):
            if entry.startswith(".") or entry == "_temporary":
                continue
            entry_path = os.path.join(path, entry)
            if os.path.isdir(entry_path):
                waiting = links if os.path.islink(entry_path) else folders
                waiting.append(os.path.join(name, entry))
            elif entry.endswith(suffixes):
                names.append(os.path.join(name, entry))
    paths = [os.path.join(folder, name) for name in sorted(names)]
    for path in paths:
        check_regular(path)
    return paths


def own_path(name):
    """A file of this repository as a command names it: with its folder, unless we are in that folder."""
    return name if os.path.samefile(os.curdir, ROOT) else os.path.join(ROOT, name)


def check_regular(path):
    """Raise UserError for a pipe or a device, whose reading may never end, and for a broken link."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file (but a folder, a pipe, a device or a broken link)")


def printable(name):
    """A name in one line of characters that can be written anywhere.

    Line feeds, control characters and bytes that are not UTF-8 become escapes like \\n.
    """
    characters = []
    for character in name:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def as_markdown(name):
    """A name as Markdown that shows it unchanged, also in a table.

    An underscore inside a word is only text, and so are brackets without a "(" behind them. They get
    no backslash, so that usual names remain readable.
    """
    outer_underscore = r"(?<![^\W_])_|_(?![^\W_])"
    end_of_link_text = r"\](?=\()"
    entity = r"&(?=#?\w+;)"
    markup = rf"[\\`*~<$|]|{outer_underscore}|{end_of_link_text}|{entity}"
    return re.sub(markup, r"\\\g<0>", printable(name))


def as_code(name):
    """A name as Markdown's code; a name that would end the code is shown as a text is."""
    return as_markdown(name) if "`" in name else f"`{printable(name)}`"


def unique(path):
    """A path beside `path` that no other process uses, on this machine or another.

    Two containers may have one host name, and each a process 7: they differ in THIS_PROCESS.
    """
    return f"{path}.{socket.gethostname()}.{os.getpid()}-{THIS_PROCESS}"


# -------------------------------------------------------------------------------------------------
# writing and reading

# A lock of core/lock.py, also that of one --shard of prepare_fineweb.py.
LOCK = r"\.lock(\.\d+-of-\d+)?"
# What a killed process may leave: write_whole() a file with this ending, core/checkpoint.py a folder.
OF_WRITE_WHOLE = r"\.\d+-[0-9a-f]{8}\.tmp"
OF_CHECKPOINTS = r"\.writing_\d{7}_[0-9a-f]{8}(_replaced)?"


def write_whole(path, content):
    """Write bytes to a file. An interruption leaves the old content, never half of the new one."""
    # Several processes, on several machines, may write the same file at once.
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def is_new(folder, *own_files):
    """True if the folder is missing, empty, or holds only `own_files` and leftovers of write_whole()."""
    if not os.path.isdir(folder):
        return True
    for name in os.listdir(folder):
        is_lock_or_leftover = re.fullmatch(f"{LOCK}|.+{OF_WRITE_WHOLE}|{OF_CHECKPOINTS}", name)
        if name not in own_files and not is_lock_or_leftover:
            return False
    return True


def remove_leftovers(folder, own_files=(), pattern="(?!)"):
    """Remove what killed processes left in a folder. The caller must hold the folder's lock.

    own_files: names of files that are written by write_whole(), and only by the lock's holder. What
    is left of one is called NAME.PID-XXXXXXXX.tmp. pattern: a regular expression that matches the
    complete names of other leftovers.
    """
    own_names = "|".join([LOCK, *(re.escape(name) for name in own_files)])
    for name in os.listdir(folder):
        if re.fullmatch(f"({own_names}){OF_WRITE_WHOLE}|{pattern}", name):
            remove_file_or_folder(os.path.join(folder, name))


def remove_file_or_folder(path):
    """Remove a file, or a folder with all that is in it. A link stays, and so does what cannot be removed."""
    if os.path.islink(path):
        return
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def write_json(path, value):
    """Write a JSON file, complete or not at all."""
    write_whole(path, json.dumps(value, indent=1).encode())


def decode(raw, where):
    """Bytes -> text, without a byte order mark.

    Raises a UserError that names `where` if they are not UTF-8.
    """
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        position = first_bad_byte(raw)
        raise UserError(
            f"{where} is not UTF-8 (byte {position}): convert it, e.g. with iconv -t UTF-8"
        ) from None


def first_bad_byte(raw):
    """The position of the first byte that is not UTF-8; None if there is none."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start


def lines_of(path):
    """Yield (where, line) for every line that is not blank; `where` names the file and the line.

    A file that ends in .gz, .xz or .zst is unpacked. Raises a UserError that names the place, also
    for a line of more than LONGEST_LINE bytes.
    """
    with open_packed(path) as f:
        for number, line in enumerate(unpacked(f, path), start=1):
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where} is longer than {LONGEST_LINE >> 20} MiB: cut it into several")
            text = decode(line, where)
            if text.strip():
                yield where, text


def find_packed(folder, name):
    """The path of folder/name, which may also end in .gz, .xz or .zst; None if there is no such file.

    Other names that begin like that, such as train.jsonl.bak or train.jsonl~, are other files. Raises
    UserError if there are two.
    """
    paths = []
    for suffix in ("", ".gz", ".xz", ".zst"):
        path = os.path.join(folder, name + suffix)
        if os.path.lexists(path):
            paths.append(path)
    if len(paths) > 1:
        raise UserError(f"{' and '.join(paths)}: which of them is meant? Move the other one away")
    return paths[0] if paths else None


def open_packed(path):
    """Open a file to read bytes. One that ends in .gz, .xz or .zst is unpacked."""
    check_regular(path)
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".xz"):
        return lzma.open(path, "rb")
    if path.endswith(".zst"):
        import zstandard
        return io.BufferedReader(zstandard.open(path, "rb"))
    return open(path, "rb")


def unpacked(file, path):
    """Yield the lines of an open file; one that is too long is cut one byte after LONGEST_LINE.

    Raises UserError if the file is cut off or was not packed that way.
    """
    while True:
        try:
            line = file.readline(LONGEST_LINE + 1)
        except Exception as error:
            # gzip, lzma and zstandard each raise errors of their own.
            raise UserError(
                f"{path} cannot be unpacked ({error}): fetch or compress it again"
            ) from None
        if not line:
            return
        yield line


# -------------------------------------------------------------------------------------------------
# texts and threads
def hashed(text):
    """A number in [0, 1) that depends on the text alone.

    It splits a data set in two without an order or a seed; copies of a text land on the same side.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def ahead(items, depth):
    """Yield the same items, which a background thread draws ahead of time.

    At most `depth` items wait, so memory stays flat whichever side is slower. What `items` raises
    is raised here.
    """
    ready = queue.Queue(depth)      # (item, error) pairs
    stop = threading.Event()
    end = object()

    def put(item, error=None):
        # The consumer may stop at any time, so do not wait forever for room.
        while not stop.is_set():
            try:
                ready.put((item, error), timeout=0.2)
                return
            except queue.Full:
                continue

    def draw():
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=draw, daemon=True)
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
        # A thread that waits for a network may take longer than this. It is a daemon, so the program
        # can end without it.
        stop.set()
        thread.join(10.0)
