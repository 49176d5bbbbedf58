"""JSON of others: what fits a shape is returned, everything else is one line that names file and key."""
import json

import pytest

from core.configurator import UserError
from core.schema import parse_json, read_json

SHAPE = {"steps": int, "rate": float, "note?": str, "sizes": [int], "mean": (float, None), "scores": {str: [{"f1": float}]}}
GOOD = {"steps": 3, "rate": 1, "sizes": [], "mean": None, "scores": {"a": [{"f1": 0.5}]}, "more": "is ignored"}


def test_what_fits_comes_back_unchanged(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())      # also with a byte order mark
    assert read_json(path, SHAPE) == GOOD


@pytest.mark.parametrize("changes, message", [
    ({"steps": None}, "'steps' is null, not a whole number"),
    ({"steps": 1.5}, "'steps' is 1.5, not a whole number"),
    ({"steps": True}, "'steps' is true, not a whole number"),
    ({"rate": "fast"}, "'rate' is \"fast\", not a number"),
    ({"note": 1}, "'note' is 1, not a string"),
    ({"sizes": [1, "x" * 99]}, r"'sizes\[1\]' is \"xxxx"),
    ({"sizes": {}}, "'sizes' is an object, not a list"),
    ({"mean": "x"}, "'mean' is \"x\", not a number or null"),
    ({"scores": {"a": [{}]}}, r"has no 'scores.a\[0\].f1'"),
])
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError, match=f"^row 3: {message}"):
        parse_json(json.dumps(GOOD | changes), "row 3", SHAPE)


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 40, b'{"a": 1}{', b"\xff", b"[" * 200_000 + b"]" * 200_000, b"9" * 5000, b"nul"])
def test_what_is_not_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not JSON") as error:
        read_json(path)
    assert "\n" not in str(error.value)


def test_the_top_of_a_file_may_be_anything_but_what_was_asked():
    for text in ("[]", "3", "null", '"x"'):
        with pytest.raises(UserError, match="the content is .*, not an object"):
            parse_json(text, "manifest.json", {"steps": int})
