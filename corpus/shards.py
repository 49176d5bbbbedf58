"""The shard: a file of tokens behind a header of 1,024 bytes. See design.md for its fields."""
import os
import zlib

import numpy as np

from core.configurator import UserError


class Shards:
    """Documents to shards, each closed after the document that reaches shard_tokens; name(i) is the path of shard i."""

    def __init__(self, name, tok, shard_tokens, first=0):
        self.name, self.tok, self.shard_tokens, self.number, self.writer = name, tok, shard_tokens, first, None
        self.written = []     # (path, documents) of every closed shard

    def open(self):
        self.writer = self.writer or ShardWriter(self.name(self.number), self.tok)

    def write(self, documents):
        """documents: list of id arrays [n] without eos."""
        ends = np.cumsum([len(ids) + 1 for ids in documents])
        begin, before = 0, 0
        while begin < len(documents):
            self.open()
            room = self.shard_tokens - int(self.writer.header["tokens"])
            end = min(int(np.searchsorted(ends, before + room)) + 1, len(documents))     # up to the one that fills it
            body = np.full(int(ends[end - 1]) - before, self.tok.eos_id, self.writer.dtype)
            for ids, stop in zip(documents[begin:end], ends[begin:end]):
                body[stop - before - 1 - len(ids):stop - before - 1] = ids
            self.writer.write(body, end - begin)
            begin, before = end, int(ends[end - 1])
            if self.writer.header["tokens"] >= self.shard_tokens:
                self.close()

    def close(self):
        if self.writer:
            self.writer.close()
            self.written.append((self.writer.path, int(self.writer.header["documents"])))
            self.number, self.writer = self.number + 1, None


def shard_facts(path):
    """What a manifest says of a shard, from its header; the checksum is that of the tokens' bytes."""
    h = read_header(path)
    return {"documents": int(h["documents"]), "tokens": int(h["tokens"]), "crc32": f"{int(h['tokens_crc32']):08x}"}

# ---------------------------------------------------------------------------------------------------------------------
# shards: 256 int32 of header, then the tokens as uint16 or uint32
MAGIC, VERSION, HEADER_BYTES = 20_250_700, 1, 1024
FIELDS = np.dtype([("magic", "<i4"), ("version", "<i4"), ("itemsize", "<i4"), ("vocab_size", "<i4"), ("eos_id", "<i4"),
                   ("mask_id", "<i4"), ("special_start", "<i4"), ("tokens_crc32", "<u4"), ("tokens", "<i8"),
                   ("documents", "<i8"), ("tokenizer_hash", "u1", 32), ("unused", "u1", HEADER_BYTES - 84),
                   ("header_crc32", "<u4")])


class ShardWriter:
    """Writes one shard to a temporary name; close() makes it whole: header, fsync, rename."""

    def __init__(self, path, tokenizer):
        self.path, self.temporary = path, path + ".tmp"
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.header = np.zeros((), FIELDS)
        for field in ("vocab_size", "eos_id", "mask_id", "special_start"):
            self.header[field] = getattr(tokenizer, field)
        self.header["magic"], self.header["version"] = MAGIC, VERSION
        self.header["itemsize"] = self.dtype().itemsize
        self.header["tokenizer_hash"] = np.frombuffer(tokenizer.hash, np.uint8)
        self.file = open(self.temporary, "wb")
        self.file.write(bytes(HEADER_BYTES))

    def write(self, ids, documents=1):
        """Append the ids of a document, or of several end to end, each closed by eos."""
        body = np.asarray(ids, self.dtype).tobytes()
        self.file.write(body)
        self.header["tokens_crc32"] = zlib.crc32(body, int(self.header["tokens_crc32"]))
        self.header["tokens"] += len(ids)
        self.header["documents"] += documents

    def close(self):
        self.header["header_crc32"] = zlib.crc32(self.header.tobytes()[:-4])
        self.file.seek(0)
        self.file.write(self.header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)


def read_header(path):
    """The checked header of a shard. Raises UserError if the file is no shard, of another version, or cut short."""
    raw = np.fromfile(path, np.uint8, HEADER_BYTES)
    if raw.size < HEADER_BYTES:
        raise UserError(f"{path} is truncated: delete it and run its prepare_fineweb.py command again")
    header = raw.view(FIELDS)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION:
        raise UserError(f"{path} is no token shard of version {VERSION}: prepare the corpus with this prepare_fineweb.py")
    if header["header_crc32"] != zlib.crc32(header.tobytes()[:-4]):
        raise UserError(f"{path} has a corrupted header: delete it and run its prepare_fineweb.py command again")
    expected = HEADER_BYTES + int(header["tokens"]) * int(header["itemsize"])
    if os.path.getsize(path) != expected:
        raise UserError(f"{path} is truncated ({os.path.getsize(path):,} bytes, its header says {expected:,}): delete it "
                        "and run its prepare_fineweb.py command again")
    return header


def verify_shard(path, header):
    """Compare the tokens with the checksum in the header. Raises UserError."""
    crc, body = 0, np.memmap(path, np.uint8, "r", offset=HEADER_BYTES)
    for start in range(0, body.size, 1 << 24):
        crc = zlib.crc32(body[start:start + (1 << 24)], crc)
    if crc != header["tokens_crc32"]:
        raise UserError(f"{path} is corrupted (checksum): delete it and run its prepare_fineweb.py command again")
