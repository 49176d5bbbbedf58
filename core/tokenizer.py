"""Tokenizers: text in, ids out, and the two special ids that pretraining needs, eos and mask.

--tokenizer of prepare_fineweb.py names one. All are tiktoken encodings at run time:

    gpt2              tiktoken's GPT-2 ranks; eos is <|endoftext|>, <|mask|> is appended, and the
                      vocabulary is padded to a multiple of 64
    llama3            the paper's (arXiv 2507.00994 and EuroBERT): vocabulary size 128,256,
                      eos = pad = 128001, mask = 128002. Ranks from the hub's
                      EuroBERT/EuroBERT-210m, or from a rank file: llama3:/path/to/tokenizer.model
    train:8192        a byte-level BPE with a vocabulary of 8,192, trained on the corpus itself
    hf:ORG/NAME       that of a Hugging Face model, with the same ids (huggingface/tokenizer.py)

A prepared corpus and a run directory each carry their tokenizer as two files: `tokenizer.tiktoken`
(tiktoken's rank file) and `tokenizer_info.json` (pattern, special tokens, sizes). So nothing is
downloaded twice, and no program has to guess what encoded a corpus.
"""
import base64
import functools
import hashlib
import json
import os
import re
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import regex
import tiktoken
import tiktoken.load
from tqdm import tqdm

from core.configurator import UserError
from core.files import write_json, write_whole
from core.schema import read_json

# How a text is cut into pieces before BPE: no token spans two pieces.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
LLAMA3_SPECIALS = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|mask|>": 128002}
# A BPE is trained on at most this much text: it has converged long before, and more costs memory.
TRAIN_CHARACTERS = 300_000_000
# Documents are cut into chunks of this size: training takes 80 bytes of memory for a byte of a chunk.
CHUNK_CHARACTERS = 100_000
# Training time grows with the square of a piece's length, so a longer piece is cut: no word is that long.
LONGEST_PIECE = 1_000
LARGEST_VOCABULARY = 1 << 20

# Between a character that is not blank and a blank, where GPT2_PATTERN always cuts.
BORDER = re.compile(r"\S(?=[ \n])")
LONG_WHITE_SPACE = re.compile(rf"\s{{{LONGEST_PIECE}}}")
# Runs of one kind of character. A piece of GPT2_PATTERN lies in one run, apart from its first character.
LETTERS_OR_OTHERS = regex.compile(r"\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|\s+")

# The content of tokenizer_info.json.
INFO_SHAPE = {
    "name": str, "pattern": str, "special_tokens": {str: int}, "eos_id": int, "mask_id": int,
    "special_start": int, "vocab_size": int, "normalization?": str,
}

# What retrieval writes in front of a text, as in the paper.
QUERY = "Query: "
DOCUMENT = "Document: "


@dataclass(frozen=True)
class Tokenizer:
    """A tiktoken encoding with the ids that pretraining uses.

    Ids in [special_start, vocab_size) never come from text. An imported vocabulary may have special
    ids below special_start, too. It may also lack tokens for some bytes: the encoding then gives
    these bytes ids from vocab_size on. Hugging Face's tokenizers drop such bytes silently, and so
    does this class.
    """

    name: str
    encoding: tiktoken.Encoding
    eos_id: int               # closes every document; also the padding id
    mask_id: int
    special_start: int        # ids from here on are special or unused (see the docstring)
    vocab_size: int           # rows of the embedding
    # the Unicode form that a text is brought into before it is encoded ("NFC" in Qwen); "": none
    normalization: str = ""

    # ---- identity

    @functools.cached_property
    def hash(self):
        """SHA-256 of everything that decides ids: ranks, pattern, special tokens, sizes."""
        digest = hashlib.sha256(rank_file(self.encoding))
        digest.update(json.dumps(self.description(), sort_keys=True).encode())
        return digest.digest()

    def description(self):
        """The content of tokenizer_info.json, except that the name is only its kind, such as "hf"."""
        info = {
            "name": self.name.partition(":")[0],
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
            "eos_id": self.eos_id,
            "mask_id": self.mask_id,
            "special_start": self.special_start,
            "vocab_size": self.vocab_size,
        }
        if self.normalization:
            info["normalization"] = self.normalization
        return info

    def same_ids(self, other):
        """True if both give every text the same ids, and use the same ids for eos and mask."""
        return self.what_decides_ids() == other.what_decides_ids()

    def what_decides_ids(self):
        """What two tokenizers must have in common to give the same ids, as a tuple."""
        ranks = self.encoding._mergeable_ranks
        pattern = self.encoding._pat_str
        return ranks, pattern, self.normalization, self.eos_id, self.mask_id, self.vocab_size

    # ---- text -> ids

    def encode(self, text):
        """Ids of a text. -> list of int

        A literal "<|mask|>" in a document is text like any other, and not the special id.
        """
        return self.encode_to_array(text).tolist()

    def encode_batch(self, texts, threads):
        """Ids of several texts. -> list of lists of int

        tiktoken replaces lone surrogates by U+FFFD, so every str can be encoded.
        """
        return [ids.tolist() for ids in self.encode_to_arrays(texts, threads)]

    def encode_to_arrays(self, texts, threads):
        """The ids of encode_batch as uint32 arrays [n].

        A corpus is written from these, without making a Python int for each of billions of ids.
        """
        if threads == 1:
            return [self.encode_to_array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode_to_array, texts))

    def encode_to_array(self, text):
        """Ids of a text. -> uint32 [n]"""
        text = self.normalized(text)
        try:
            # Without disallowed_special=(), tiktoken would raise for a text like "<|mask|>".
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            # A lone surrogate.
            text = as_tiktoken_reads(text)
            return self.encode_to_array(text)
        except ValueError:
            # tiktoken's regular expressions run out of stack on a million spaces in a row.
            return self.encode_by_pieces(text)
        if self.has_all_bytes or len(ids) == 0 or ids.max() < self.vocab_size:
            return ids
        return self.encode_by_pieces(text)

    def normalized(self, text):
        """The text in the Unicode form that this tokenizer encodes."""
        if self.normalization:
            return unicodedata.normalize(self.normalization, text)
        return text

    @property
    def has_all_bytes(self):
        """True unless this is an imported vocabulary without tokens for some bytes."""
        return self.encoding.max_token_value < self.vocab_size

    def encode_by_pieces(self, text):
        """Ids of a normalized text, without the bytes that have no token. -> uint32 [n]

        As in Hugging Face's tokenizers, the text is cut into pieces first, and then each piece
        loses these bytes and is merged. Raises UserError if the pattern takes more than a minute.
        """
        dropped = bytes(np.flatnonzero(~self.has_token).tolist())
        kept = []
        try:
            for match in regex.finditer(self.encoding._pat_str, text, timeout=60):
                piece = match.group().encode().translate(None, dropped)
                if piece:
                    kept += self.encoding._encode_single_piece(piece)
        except (regex.error, TimeoutError) as error:
            raise UserError(
                f"the tokenizer's pattern cannot cut the text that begins {text[:40]!r} "
                f"({type(error).__name__}): shorten its runs of equal characters"
            ) from None
        return np.array(kept, np.uint32)

    @functools.cached_property
    def has_token(self):
        """Which bytes have a token. -> bool [256]"""
        ranks = self.encoding._mergeable_ranks
        return np.array([ranks[bytes([byte])] < self.vocab_size for byte in range(256)])

    @functools.cached_property
    def token_bytes(self):
        """How many bytes each id stands for; 0 for special ones. -> int32 [vocab_size]"""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self.encoding._mergeable_ranks.items():
            if i < self.vocab_size:
                lengths[i] = len(token)
        return lengths

    # ---- text -> ids, and where in the text each of them comes from

    def encode_with_offsets(self, text):
        """Ids of a text and their character spans. -> int32 [n], int [n, 2]

        text[start:end] holds the characters that a token has bytes of. A character that is split
        over tokens belongs to each of them; a word's leading space belongs to its first token.
        (tiktoken's decode_with_offsets gives only starts, and fails where a character is cut.)
        """
        text, starts, ends = self.aligned(as_tiktoken_reads(text))
        ids = self.encode_to_array(text).astype(np.int32)

        # The character that each byte of the text belongs to. UTF-8 takes 1 to 4 bytes for one.
        code = np.frombuffer(text.encode("utf-32-le"), "<u4")                        # [characters]
        width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
        character_of = np.repeat(np.arange(len(code)), width)                        # [bytes]

        # Tokens lie end to end over the bytes that have a token.
        position = np.flatnonzero(self.has_token[np.frombuffer(text.encode(), np.uint8)])
        lengths = self.token_bytes[ids]                                              # [n]
        stop = np.cumsum(lengths)
        first_byte = position[stop - lengths]
        last_byte = position[stop - 1]
        spans = [starts[character_of[first_byte]], ends[character_of[last_byte]]]
        return ids, np.stack(spans, axis=1)

    def aligned(self, text):
        """The normalized text, and where in the original each of its characters begins and ends.

        Normalization never joins an ASCII character with the one before it. So the text is cut
        before each ASCII character. If normalization changes a piece, each of its characters gets
        the span of the whole piece.
        -> str [n], int [n], int [n]
        """
        if self.normalized(text) == text:
            return text, np.arange(len(text)), np.arange(1, len(text) + 1)
        pieces = []
        starts = []
        ends = []
        begin = 0
        for piece in re.findall(r"[\x00-\x7f]?[^\x00-\x7f]*", text):
            end = begin + len(piece)
            normalized = self.normalized(piece)
            if normalized == piece:
                starts += range(begin, end)
                ends += range(begin + 1, end + 1)
            else:
                starts += [begin] * len(normalized)
                ends += [end] * len(normalized)
            pieces.append(normalized)
            begin = end
        return "".join(pieces), np.array(starts), np.array(ends)

    # ---- ids -> text

    @functools.cached_property
    def known_ids(self):
        """The ids that stand for a token. Those that pad the vocabulary do not."""
        return {*self.encoding._mergeable_ranks.values(), *self.encoding._special_tokens.values()}

    def decode(self, ids):
        """Text of ids. An id that stands for no token gives no text."""
        return self.encoding.decode([i for i in ids if i in self.known_ids])


def as_tiktoken_reads(text):
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- making a tokenizer

def get(name, texts=None):
    """The tokenizer called `name`: gpt2, llama3:RANK_FILE or train:SIZE. Raises UserError.

    huggingface/tokenizer.py loads those of the hub. texts: an iterable of str that train:SIZE
    learns from
    """
    kind, _, option = name.partition(":")
    if kind == "gpt2" and not option:
        return gpt2()
    if kind == "llama3" and option:
        return llama3(name, rank_path=option)
    if kind == "train" and re.fullmatch("[0-9]{1,18}", option) and texts is not None:
        return train(int(option), texts)
    raise UserError(
        f"unknown tokenizer '{name}': use gpt2, llama3, llama3:RANK_FILE, hf:ORG/NAME, hf:FOLDER, "
        "or train:SIZE (e.g. train:8192)"
    )


def gpt2():
    """GPT-2's tokenizer with a mask token. Its 50,258 ids are padded to a multiple of 64."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:
        # tiktoken downloads the ranks once; any error of its HTTP library can arrive here.
        raise UserError(
            f"tiktoken could not fetch the gpt2 ranks ({type(error).__name__}): connect to the "
            "network once, point TIKTOKEN_CACHE_DIR at a filled cache, or use "
            "--tokenizer=train:8192"
        ) from None
    ranks = encoding._mergeable_ranks
    specials = {"<|endoftext|>": 50256, "<|mask|>": 50257}
    return build("gpt2", ranks, encoding._pat_str, specials, "<|endoftext|>", "<|mask|>", 50304)


def llama3(name, rank_path):
    """The paper's tokenizer, from Meta's rank file."""
    ranks = read_ranks(rank_path)
    if len(ranks) != 128_000:
        raise UserError(f"{rank_path} holds {len(ranks):,} ranks; Llama 3 has 128,000")
    specials = LLAMA3_SPECIALS
    return build(name, ranks, LLAMA3_PATTERN, specials, "<|end_of_text|>", "<|mask|>", 128_256)


def train(vocab_size, texts):
    """A byte-level BPE learned from texts. Its last two ids are <|eos|> and <|mask|>."""
    name = f"train:{vocab_size}"
    if not 320 <= vocab_size <= LARGEST_VOCABULARY or vocab_size % 64:
        raise UserError(
            f"{name}: the vocabulary size must be a multiple of 64 (the grain of matrix units), "
            f"from 320 to {LARGEST_VOCABULARY:,}"
        )
    bpe = train_bpe(vocab_size, texts)
    ranks = ranks_of_tokenizer_json(json.loads(bpe.to_str()))
    if len(ranks) < vocab_size - 2:
        raise UserError(
            f"{name}: this corpus yields only {len(ranks)} tokens; ask for a smaller vocabulary"
        )
    specials = {"<|eos|>": len(ranks), "<|mask|>": len(ranks) + 1}
    return build(name, ranks, GPT2_PATTERN, specials, "<|eos|>", "<|mask|>", vocab_size)


def build(name, ranks, pattern, specials, eos, mask, vocab_size, normalization=""):
    """A Tokenizer from a rank table.

    ranks: {bytes: id}; pattern: how text is cut into pieces; specials: {text: id} of the special
    tokens; eos, mask: two of these texts.
    """
    kind = name.partition(":")[0]
    encoding = new_encoding(kind, pattern, ranks, specials)
    special_start = 1 + max(i for i in ranks.values() if i < vocab_size)
    eos_id = specials[eos]
    mask_id = specials[mask]
    return Tokenizer(name, encoding, eos_id, mask_id, special_start, vocab_size, normalization)


def new_encoding(name, pattern, ranks, specials):
    """A tiktoken.Encoding. Raises UserError if the pattern, the ranks and the special tokens make none."""
    ids = [*ranks.values(), *specials.values()]
    if len(set(ids)) < len(ids):
        raise UserError("two tokens have the same id")
    if min(ids, default=-1) < 0 or max(ids) >= 2**32:
        raise UserError("there is an id below 0 or above 32 bits, or there are no tokens")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"there is no token for the byte {missing[0]} ({len(missing)} such bytes)")
    try:
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:      # a panic in Rust is not an Exception
        reason = " ".join(str(error).split())
        raise UserError(f"tiktoken does not take the pattern or the tokens ({reason})") from None


def train_bpe(vocab_size, texts):
    """What Hugging Face's trainer learns, with room for two special ids. -> tokenizers.Tokenizer"""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HfTokenizer
    bpe = HfTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(first_characters(texts), trainer)
    return bpe


def first_characters(texts):
    """Yield texts until they hold TRAIN_CHARACTERS characters, in chunks that the trainer can take."""
    budget = TRAIN_CHARACTERS
    name = "reading for the tokenizer"
    with tqdm(desc=name, unit=" characters", unit_scale=True, mininterval=1.0, delay=2.0) as bar:
        for text in texts:
            for chunk in chunks(text):
                # The trainer refuses lone surrogates.
                yield chunk.encode("utf-8", "replace").decode("utf-8")
            bar.update(len(text))
            budget -= len(text)
            if budget < 0:
                return


def chunks(text):
    """Yield a text in chunks of about CHUNK_CHARACTERS, in which no piece is longer than LONGEST_PIECE.

    A text is cut between a character that is not blank and a blank. The pattern cuts there, too, so
    the pieces that the trainer counts are the same.
    """
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        if end < len(text):
            border = BORDER.search(text, end, end + LONGEST_PIECE)
            end = border.end() if border else end
        yield from short_pieces(text[start:end])
        start = end


def short_pieces(chunk):
    """Yield a chunk, or its parts if it has a piece of more than LONGEST_PIECE characters."""
    # A quick test that ordinary text passes: neither a long word nor many blanks in a row.
    longest_word = max(map(len, chunk.split()), default=0)
    if longest_word <= LONGEST_PIECE and not LONG_WHITE_SPACE.search(chunk):
        yield chunk
        return
    begin = 0      # of the part that comes next
    for match in LETTERS_OR_OTHERS.finditer(chunk):
        while match.end() - max(begin, match.start()) > LONGEST_PIECE:
            cut = max(begin, match.start()) + LONGEST_PIECE
            yield chunk[begin:cut]
            begin = cut
    yield chunk[begin:]


# ---- files

def byte_of_character():
    """The printable characters that GPT-2 and tokenizer.json write for bytes: {character: byte}.

    A byte that is not printable is written as a character from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        byte_of[chr(256 + i)] = byte
    return byte_of


def ranks_of_tokenizer_json(config):
    """The rank table of a Hugging Face tokenizer.json of a byte-level BPE. -> {bytes: rank}

    Its ids are the ranks, in order of merging.
    """
    byte_of = byte_of_character()
    ranks = {}
    for token, rank in config["model"]["vocab"].items():
        token_bytes = bytes(byte_of[character] for character in token)
        ranks[token_bytes] = rank
    return ranks


def rank_file(encoding):
    """tiktoken's own file format: a line per token, its bytes in base64 and its rank. -> bytes"""
    lines = []
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        lines.append(base64.b64encode(token) + b" " + str(rank).encode() + b"\n")
    return b"".join(lines)


def read_ranks(path):
    """The rank table in a tiktoken rank file. -> {bytes: rank}. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"rank file {path} does not exist")
    ranks = {}
    try:
        with open(path, "rb") as f:
            for line in f:
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise UserError(
            f"{path} is not a tiktoken rank file (one 'base64 rank' pair a line)"
        ) from None
    return ranks


def save(tokenizer, directory):
    """Write tokenizer.tiktoken and tokenizer_info.json into a directory."""
    ranks = rank_file(tokenizer.encoding)
    write_whole(os.path.join(directory, "tokenizer.tiktoken"), ranks)
    info = tokenizer.description() | {"name": tokenizer.name}
    write_json(os.path.join(directory, "tokenizer_info.json"), info)


def load(directory):
    """The tokenizer that save() wrote into a corpus or run directory. Raises UserError."""
    path = os.path.join(directory, "tokenizer_info.json")
    try:
        info = read_json(path, INFO_SHAPE)
    except OSError:
        raise UserError(
            f"{directory} holds no tokenizer_info.json: is it a prepared corpus or a run?"
        ) from None
    check_info(info, path)
    name = info["name"]
    ranks = read_ranks(os.path.join(directory, "tokenizer.tiktoken"))
    try:
        encoding = new_encoding(
            name.partition(":")[0], info["pattern"], ranks, info["special_tokens"]
        )
    except UserError as error:
        raise UserError(
            f"{directory}: tokenizer.tiktoken and tokenizer_info.json are damaged: {error}"
        ) from None
    return Tokenizer(
        name,
        encoding,
        eos_id=info["eos_id"],
        mask_id=info["mask_id"],
        special_start=info["special_start"],
        vocab_size=info["vocab_size"],
        normalization=info.get("normalization", ""),
    )


def check_info(info, path):
    """Raises UserError if the ids in a tokenizer_info.json do not fit each other."""
    vocab_size = info["vocab_size"]
    if not 1 <= vocab_size < 2**31:
        raise UserError(f"{path}: 'vocab_size' is {vocab_size}, not between 1 and 2**31 - 1")
    ids = {key: info[key] for key in ("eos_id", "mask_id")}
    for text, i in info["special_tokens"].items():
        ids[f"special_tokens.{text}"] = i
    for key, i in ids.items():
        if not 0 <= i < vocab_size:
            raise UserError(f"{path}: '{key}' is {i}, not an id below the vocabulary size {vocab_size}")
    if not 0 <= info["special_start"] <= vocab_size:
        raise UserError(f"{path}: 'special_start' is {info['special_start']}, not at most {vocab_size}")
    if info["eos_id"] == info["mask_id"]:
        raise UserError(f"{path}: 'mask_id' is {info['mask_id']}, and so is 'eos_id'")
    if info.get("normalization", "") not in ("", "NFC", "NFD", "NFKC", "NFKD"):
        raise UserError(f"{path}: 'normalization' is {info['normalization']!r}, not a Unicode form")
