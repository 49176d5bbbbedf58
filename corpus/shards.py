"""The shard, the file format of a prepared corpus: a header of 1,024 bytes, then token ids.

A document is its token ids followed by eos; documents lie end to end. Ids are uint16 where the
vocabulary allows it, else uint32, so that any row can be read by its place. A shard is written under
a temporary name and renamed when it is complete.
"""
import os
import zlib

import numpy as np

from core.configurator import RunError, UserError

MAGIC = 20_250_700
VERSION = 1
HEADER_BYTES = 1024
CHECKED_AT_ONCE = 1 << 24    # bytes of a shard that are in memory while its checksum is computed

# What the manifest.json of a corpus says of its shards. Early manifests do not list them.
MANIFEST_SHAPE = {
    "complete": bool,
    "tokenizer_hash?": str,
    "train_tokens?": int,
    "val_tokens?": int,
    "shards?": {str: {"tokens": int, "crc32": str}},
}

# All numbers are little-endian. A checksum is a CRC-32: `tokens_crc32` of the bytes after the
# header, `header_crc32` of the header before this last field.
HEADER_FIELDS = [
    ("magic", "<i4"),
    ("version", "<i4"),
    ("itemsize", "<i4"),             # bytes per token id, 2 or 4
    ("vocab_size", "<i4"),
    ("eos_id", "<i4"),
    ("mask_id", "<i4"),
    ("special_start", "<i4"),        # ids from here on never come from text
    ("tokens_crc32", "<u4"),
    ("tokens", "<i8"),               # how many, eos included
    ("documents", "<i8"),
    ("tokenizer_hash", "u1", 32),
    ("unused", "u1", HEADER_BYTES - 84),
    ("header_crc32", "<u4"),
]
HEADER = np.dtype(HEADER_FIELDS)


# -------------------------------------------------------------------------------------------------
# writing
class ShardWriter:
    """Writes one shard under a temporary name; close() adds the header and renames it to `path`."""

    def __init__(self, path, tokenizer):
        self.path = path
        self.temporary = path + ".tmp"
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.header = np.zeros((), HEADER)
        self.header["magic"] = MAGIC
        self.header["version"] = VERSION
        self.header["itemsize"] = self.dtype().itemsize
        for field in ("vocab_size", "eos_id", "mask_id", "special_start"):
            self.header[field] = getattr(tokenizer, field)
        self.header["tokenizer_hash"] = np.frombuffer(tokenizer.hash, np.uint8)
        self.file = open(self.temporary, "wb")
        self.file.write(bytes(HEADER_BYTES))

    def write(self, ids, documents=1):
        """Append the ids of one document, or of several laid end to end, each closed by eos."""
        body = np.asarray(ids, self.dtype).tobytes()
        self.file.write(body)
        self.header["tokens_crc32"] = zlib.crc32(body, int(self.header["tokens_crc32"]))
        self.header["tokens"] += len(ids)
        self.header["documents"] += documents

    def close(self):
        self.header["header_crc32"] = header_checksum(self.header)
        self.file.seek(0)
        self.file.write(self.header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)


class SplitWriter:
    """Writes the documents of one split to numbered shards.

    A shard is closed after the document that brings it to `shard_tokens` tokens. `path_of(i)` is
    the path of shard i; `first` is the number of the first shard to write.
    """

    def __init__(self, path_of, tokenizer, shard_tokens, first=0):
        self.path_of = path_of
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.number = first
        self.writer = None       # the ShardWriter of the shard that is open
        self.closed = []         # (path, documents) of every shard written

    def open(self):
        """Open the next shard, unless one is open."""
        if self.writer is None:
            self.writer = ShardWriter(self.path_of(self.number), self.tokenizer)

    def write(self, documents):
        """Append documents: a list of id arrays [n] without eos."""
        # The number of tokens up to the end of each document, its eos included.
        ends = np.cumsum([len(ids) + 1 for ids in documents])
        first = 0               # the next document to write
        tokens_written = 0
        while first < len(documents):
            self.open()
            # This shard takes the documents up to and including the one that fills it.
            room = self.shard_tokens - int(self.writer.header["tokens"])
            filling = int(np.searchsorted(ends, tokens_written + room))
            stop = min(filling + 1, len(documents))
            ids = joined(documents[first:stop], self.tokenizer.eos_id, self.writer.dtype)
            self.writer.write(ids, stop - first)
            first = stop
            tokens_written = int(ends[stop - 1])
            if self.writer.header["tokens"] >= self.shard_tokens:
                self.close()

    def close(self):
        """Close the open shard, if there is one."""
        if self.writer is not None:
            self.writer.close()
            self.closed.append((self.writer.path, int(self.writer.header["documents"])))
            self.number += 1
            self.writer = None


def joined(documents, eos_id, dtype):
    """The id arrays of documents laid end to end, eos after each. -> [tokens]"""
    total = sum(len(ids) + 1 for ids in documents)
    tokens = np.full(total, eos_id, dtype)
    begin = 0
    for ids in documents:
        tokens[begin:begin + len(ids)] = ids
        begin += len(ids) + 1
    return tokens


# -------------------------------------------------------------------------------------------------
# reading
def header_checksum(header):
    """The CRC-32 of a header's bytes before its last field."""
    return zlib.crc32(header.tobytes()[:-4])


def read_header(path):
    """The checked header of a shard.

    Raises UserError if the file is not a shard, of another version, damaged, or cut short.
    """
    advice = "delete it and run its prepare_fineweb.py command again"
    raw = np.fromfile(path, np.uint8, HEADER_BYTES)
    if raw.size < HEADER_BYTES:
        raise UserError(f"{path} is truncated: {advice}")
    header = raw.view(HEADER)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION:
        raise UserError(
            f"{path} is not a token shard of version {VERSION}: prepare the corpus with "
            "this prepare_fineweb.py"
        )
    is_valid = header["itemsize"] in (2, 4) and header["tokens"] >= 0
    if header["header_crc32"] != header_checksum(header) or not is_valid:
        raise UserError(f"{path} has a corrupted header: {advice}")
    size = os.path.getsize(path)
    expected = HEADER_BYTES + int(header["tokens"]) * int(header["itemsize"])
    if size != expected:
        raise UserError(
            f"{path} is truncated ({size:,} bytes, its header says {expected:,}): {advice}"
        )
    return header


def verify_shard(path, header):
    """Compare the tokens with the checksum in the header. Raises UserError."""
    checksum = 0
    with open(path, "rb") as f:
        f.seek(HEADER_BYTES)
        while body := f.read(CHECKED_AT_ONCE):
            checksum = zlib.crc32(body, checksum)
    if checksum != header["tokens_crc32"]:
        raise UserError(
            f"{path} is corrupted (checksum): delete it and run its prepare_fineweb.py "
            "command again"
        )


def shard_facts(path):
    """What a manifest says of a shard, read from its header."""
    header = read_header(path)
    return {
        "documents": int(header["documents"]),
        "tokens": int(header["tokens"]),
        "crc32": f"{int(header['tokens_crc32']):08x}",
    }


class Shard:
    """A shard from which token ids are read.

    Every read opens the file and checks that it is still the one that was checked at the start. A
    memory map would do neither, and of a file that somebody cuts short it would kill the process.
    """

    def __init__(self, path):
        self.path = path
        self.stamp = stamp_of(os.stat(path))
        self.header = read_header(path)
        self.n_tokens = int(self.header["tokens"])
        self.dtype = np.dtype(np.uint16 if self.header["itemsize"] == 2 else np.uint32)
        self.tokenizer_hash = self.header["tokenizer_hash"].tobytes().hex()

    def read(self, first, count):
        """Tokens [first, first + count) of the shard. -> uint16 or uint32 [count]

        Raises RunError if the file is gone, cut short, or holds something else by now.
        """
        n_bytes = count * self.dtype.itemsize
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                if stamp_of(os.fstat(handle)) != self.stamp:
                    self.check_again()
                raw = os.pread(handle, n_bytes, HEADER_BYTES + first * self.dtype.itemsize)
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(f"{self.path} can no longer be read ({error.strerror})") from None
        if len(raw) != n_bytes:
            raise RunError(f"{self.path} was cut short while it was in use: copy or prepare it again")
        return np.frombuffer(raw, self.dtype)

    def check_again(self):
        """Accept a file that was written, replaced or touched since the start if its content is the same."""
        stamp = stamp_of(os.stat(self.path))
        try:
            header = read_header(self.path)
            if header.tobytes() != self.header.tobytes():
                raise UserError(f"{self.path} holds other tokens than before: put the old file back")
            verify_shard(self.path, header)
        except UserError as error:
            raise RunError(f"changed while it was in use: {error}") from None
        self.stamp = stamp


def stamp_of(stat):
    """What changes when a file is written or replaced."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
