"""The shard, the file format of a prepared corpus: a header of 1,024 bytes, then token ids.

A document is its token ids followed by eos; documents lie end to end. Ids are uint16 where the
vocabulary allows it, else uint32, so that a reader can memory-map them. A shard is written under a
temporary name and renamed when it is complete.
"""
import os
import zlib

import numpy as np

from core.configurator import UserError

MAGIC = 20_250_700
VERSION = 1
HEADER_BYTES = 1024
CHECKED_AT_ONCE = 1 << 24    # bytes of a shard that are in memory while its checksum is computed

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
    if header["header_crc32"] != header_checksum(header):
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
    body = np.memmap(path, np.uint8, "r", offset=HEADER_BYTES)
    checksum = 0
    for start in range(0, body.size, CHECKED_AT_ONCE):
        checksum = zlib.crc32(body[start:start + CHECKED_AT_ONCE], checksum)
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
