"""Tokenizers, all of them tiktoken at run time: text in, ids out, and the two special ids that pretraining needs.

    gpt2              tiktoken's GPT-2 ranks; <|endoftext|> is eos, <|mask|> is appended, rows padded to a multiple of 64
    llama3            the paper's: 128,256 rows, eos = pad = 128001, mask = 128002 (arXiv 2507.00994 and EuroBERT);
                      ranks from the hub's EuroBERT/EuroBERT-210m, or from a rank file: llama3:/path/to/tokenizer.model
    train:8192        a byte-level BPE of 8,192 rows trained on the corpus itself
    hf:ORG/NAME       that of a Hugging Face model, with the same ids (hf_tokenizer.py)

A prepared corpus and a run directory each carry their tokenizer as two files, `tokenizer.tiktoken` (tiktoken's rank
file) and `tokenizer_info.json` (pattern, special tokens, sizes), so nothing is downloaded twice and no run guesses.
"""
import base64
import functools
import hashlib
import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import regex
import tiktoken
import tiktoken.load

from core.configurator import UserError
from core.files import write_whole

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_PATTERN = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
                  r"""|\s*[\r\n]+|\s+(?!\S)|\s+""")
LLAMA3_SPECIALS = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|mask|>": 128002}
TRAIN_CHARACTERS = 300_000_000   # a BPE has converged long before; more text only costs memory


@dataclass(frozen=True)
class Tokenizer:
    """A tiktoken encoding with the ids that pretraining uses. Ids in [special_start, vocab_size) never come from text.

    What the encoding numbers from vocab_size on are bytes that an imported vocabulary has no token for; Hugging Face's
    tokenizers drop them without a word, and so do we.
    """
    name: str
    encoding: tiktoken.Encoding
    eos_id: int          # closes every document; also the padding id
    mask_id: int
    special_start: int   # ids from here on are special or unused (an imported vocabulary may have special ones below it, too)
    vocab_size: int      # rows of the embedding
    normalization: str = ""   # Unicode's normal form that text is brought into first, as in Qwen's "NFC"

    @functools.cached_property
    def hash(self):
        """sha256 over everything that decides ids: ranks, pattern, special tokens, sizes. -> 32 bytes"""
        digest = hashlib.sha256(rank_file(self.encoding))
        digest.update(json.dumps(self.description(), sort_keys=True).encode())
        return digest.digest()

    def same_ids(self, other):
        """Do both give the same ids to every text, and the same to eos and mask, whatever they are called?"""
        ours, theirs = ((t.encoding._mergeable_ranks, t.encoding._pat_str, t.normalization, t.eos_id, t.mask_id, t.vocab_size)
                        for t in (self, other))
        return ours == theirs

    def description(self):
        return {"name": self.name.partition(":")[0], "pattern": self.encoding._pat_str,
                "special_tokens": self.encoding._special_tokens, "eos_id": self.eos_id, "mask_id": self.mask_id,
                "special_start": self.special_start, "vocab_size": self.vocab_size
                } | ({"normalization": self.normalization} if self.normalization else {})

    def normalized(self, text):
        return unicodedata.normalize(self.normalization, text) if self.normalization else text

    def without_dropped(self, text, ids):
        """ids, or those of text (normalized) without the bytes that have no token: its pieces are cut with them, and merged
        without."""
        if self.encoding.max_token_value < self.vocab_size or max(ids, default=0) < self.vocab_size:
            return ids
        dropped = bytes(np.flatnonzero(~self.has_token).tolist())
        found = regex.finditer(self.encoding._pat_str, as_tiktoken_reads(text))
        pieces = (match.group().encode().translate(None, dropped) for match in found)
        return [i for piece in pieces if piece for i in self.encoding._encode_single_piece(piece)]

    def encode(self, text):
        """Ordinary ids only: a literal "<|mask|>" in a document is seven-odd characters of text. -> list[int]"""
        text = self.normalized(text)
        return self.without_dropped(text, self.encoding.encode_ordinary(text))

    def encode_batch(self, texts, threads):
        """texts -> list of lists of ids. tiktoken replaces lone surrogates by U+FFFD, so any str can be encoded."""
        texts = [self.normalized(text) for text in texts] if self.normalization else texts
        return [self.without_dropped(text, ids)
                for text, ids in zip(texts, self.encoding.encode_ordinary_batch(texts, num_threads=threads))]

    def encode_to_arrays(self, texts, threads):
        """The ids of encode_batch as uint32 arrays [n]: what a corpus is written from, without a Python int for each id."""
        if threads == 1:
            return [self.encode_to_array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode_to_array, texts))

    def encode_to_array(self, text):
        text = self.normalized(text)
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())    # nothing is allowed: ordinary ids only
        except UnicodeEncodeError:                                               # a lone surrogate, as encode() takes it
            ids = np.array(self.encoding.encode_ordinary(text), np.uint32)
        if self.encoding.max_token_value < self.vocab_size or not len(ids) or ids.max() < self.vocab_size:
            return ids
        return np.array(self.without_dropped(text, ids.tolist()), np.uint32)

    @functools.cached_property
    def token_bytes(self):
        """How many bytes each id stands for; 0 for special ones. -> int32 [vocab_size]"""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self.encoding._mergeable_ranks.items():
            if i < self.vocab_size:
                lengths[i] = len(token)
        return lengths

    @functools.cached_property
    def has_token(self):
        """-> bool [256]: is there a token for this byte? Everywhere but in some imported vocabularies."""
        return np.array([self.encoding._mergeable_ranks[bytes([b])] < self.vocab_size for b in range(256)])

    def encode_with_offsets(self, text):
        """-> ids [n] and character spans [n, 2], the end exclusive: text[start:end] are the characters a token has bytes of.

        A character that is split over tokens belongs to each of them; a word's leading space belongs to its first token.
        (tiktoken's decode_with_offsets gives starts only and fails on a slice that cuts a character.)
        """
        text, starts, ends = self.aligned(as_tiktoken_reads(text))
        ids = np.array(self.without_dropped(text, self.encoding.encode_ordinary(text)), np.int32)
        code = np.frombuffer(text.encode("utf-32-le"), "<u4")                           # [characters]
        width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)                # bytes of each in UTF-8
        character_of = np.repeat(np.arange(len(code)), width)                           # [bytes]
        byte = np.flatnonzero(self.has_token[np.frombuffer(text.encode(), np.uint8)])   # of those that ids stand for
        end = np.cumsum(self.token_bytes[ids])                                          # [n], among them
        first, last = byte[end - self.token_bytes[ids]], byte[end - 1]
        return ids, np.stack([starts[character_of[first]], ends[character_of[last]]], axis=1)

    def aligned(self, text):
        """-> the normalized text, and where in the original each of its characters begins [n] and ends [n].

        What normalization changes is told apart by the ASCII characters around it, which never join the one before them:
        all between two of them has one span.
        """
        if self.normalized(text) == text:
            return text, np.arange(len(text)), np.arange(1, len(text) + 1)
        pieces, begin = [], 0
        for piece in re.findall(r"[\x00-\x7f]?[^\x00-\x7f]*", text):
            new, end = self.normalized(piece), begin + len(piece)
            same = new == piece
            pieces += [(c, begin + i if same else begin, begin + i + 1 if same else end) for i, c in enumerate(new)]
            begin = end
        characters, starts, ends = zip(*pieces)
        return "".join(characters), np.array(starts), np.array(ends)

    @functools.cached_property
    def known(self):
        """Ids that stand for something."""
        return {*self.encoding._mergeable_ranks.values(), *self.encoding._special_tokens.values()}

    def decode(self, ids):
        """Text of ids; rows of the embedding that stand for nothing give none."""
        return self.encoding.decode([i for i in ids if i in self.known])


def as_tiktoken_reads(text):
    """Lone surrogates, which no UTF-8 can hold, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def build(name, ranks, pattern, specials, eos, mask, vocab_size, normalization=""):
    """A Tokenizer from a rank table {bytes: id}; specials {text: id} are what the encoding can decode beyond it."""
    encoding = tiktoken.Encoding(name.partition(":")[0], pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    special_start = 1 + max(i for i in ranks.values() if i < vocab_size)
    return Tokenizer(name, encoding, specials[eos], specials[mask], special_start, vocab_size, normalization)


def get(name, texts=None):
    """The tokenizer called `name`; `texts`, an iterable of str, is what train:N learns from. Raises UserError."""
    kind, _, option = name.partition(":")
    if kind == "gpt2" and not option:
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:   # tiktoken fetches the ranks once; the errors are those of its HTTP library
            raise UserError(f"tiktoken could not fetch the gpt2 ranks ({type(error).__name__}): connect to the network "
                            "once, point TIKTOKEN_CACHE_DIR at a filled cache, or use --tokenizer=train:8192") from None
        specials = {"<|endoftext|>": 50256, "<|mask|>": 50257}
        return build(name, gpt2._mergeable_ranks, gpt2._pat_str, specials, "<|endoftext|>", "<|mask|>", 50304)
    if kind == "llama3" and option:
        ranks = read_ranks(option)
        if len(ranks) != 128_000:
            raise UserError(f"{option} holds {len(ranks):,} ranks; Llama 3 has 128,000")
        return build(name, ranks, LLAMA3_PATTERN, LLAMA3_SPECIALS, "<|end_of_text|>", "<|mask|>", 128_256)
    if kind == "train" and option.isdigit() and texts is not None:
        return train(int(option), texts)
    raise UserError(f"unknown tokenizer '{name}': use gpt2, llama3, llama3:RANK_FILE, hf:ORG/NAME, hf:FOLDER, or train:ROWS "
                    "(e.g. train:8192)")


def train(vocab_size, texts):
    """A byte-level BPE with `vocab_size` rows learned from texts, the last two rows being <|eos|> and <|mask|>."""
    if vocab_size < 320 or vocab_size % 64:
        raise UserError(f"train:{vocab_size}: rows must be a multiple of 64 (the matrix units' grain) and at least 320")
    ranks = ranks_of_tokenizer_json(json.loads(train_bpe(vocab_size, texts).to_str()))
    if len(ranks) < vocab_size - 2:
        raise UserError(f"train:{vocab_size}: this corpus yields only {len(ranks)} tokens; ask for a smaller vocabulary")
    specials = {"<|eos|>": len(ranks), "<|mask|>": len(ranks) + 1}
    return build(f"train:{vocab_size}", ranks, GPT2_PATTERN, specials, "<|eos|>", "<|mask|>", vocab_size)


def train_bpe(vocab_size, texts):
    """Hugging Face's trainer with room for two special rows. -> tokenizers.Tokenizer"""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HfTokenizer
    bpe = HfTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(first_characters(texts), trainers.BpeTrainer(
        vocab_size=vocab_size - 2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return bpe


def first_characters(texts):
    budget = TRAIN_CHARACTERS
    for text in texts:
        yield text.encode("utf-8", "replace").decode("utf-8")   # the trainer takes no lone surrogates
        budget -= len(text)
        if budget < 0:
            return


def byte_of_character():
    """GPT-2's disguise of bytes as printable characters, in which tokenizer.json writes tokens. -> {character: byte}"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}


def ranks_of_tokenizer_json(config):
    """Hugging Face's tokenizer.json of a byte-level BPE -> {bytes: rank}. Its ids are the ranks, in order of merging."""
    byte_of = byte_of_character()
    return {bytes(byte_of[c] for c in token): rank for token, rank in config["model"]["vocab"].items()}


def rank_file(encoding):
    """tiktoken's own file format: one line a token, its bytes in base64, a space, its rank. -> bytes"""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in ranks)


def read_ranks(path):
    if not os.path.isfile(path):
        raise UserError(f"rank file {path} does not exist")
    try:
        with open(path, "rb") as f:
            return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f if line.strip())}
    except ValueError:
        raise UserError(f"{path} is no tiktoken rank file (one 'base64 rank' pair a line)") from None


def save(tokenizer, directory):
    """Write tokenizer.tiktoken and tokenizer_info.json into directory."""
    write_whole(os.path.join(directory, "tokenizer.tiktoken"), rank_file(tokenizer.encoding))
    description = tokenizer.description() | {"name": tokenizer.name}
    write_whole(os.path.join(directory, "tokenizer_info.json"), json.dumps(description, indent=1).encode())


def load(directory):
    """The tokenizer that save() wrote into a corpus or run directory."""
    try:
        with open(os.path.join(directory, "tokenizer_info.json"), encoding="utf-8") as f:
            d = json.load(f)
    except OSError:
        raise UserError(f"{directory} holds no tokenizer_info.json: is it a prepared corpus or a run?") from None
    ranks = read_ranks(os.path.join(directory, "tokenizer.tiktoken"))
    encoding = tiktoken.Encoding(d["name"].partition(":")[0], pat_str=d["pattern"], mergeable_ranks=ranks,
                                 special_tokens=d["special_tokens"])
    return Tokenizer(d["name"], encoding, d["eos_id"], d["mask_id"], d["special_start"], d["vocab_size"],
                     d.get("normalization", ""))

QUERY, DOCUMENT = "Query: ", "Document: "
