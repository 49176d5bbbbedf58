"""JSON that this process did not just write: read it, and check its shape before anybody uses it.

A file may be torn by a power cut, edited by hand or come from a stranger. A shape says what is
needed of it, written as the value would be:

    {"steps": int, "note?": str, "sizes": [int], "mean": (float, None), "scores": {str: float}}

    int float str bool None   a value of this type; an int may stand for a float
    object                    any value
    (a, b)                    one of these shapes
    [a]                       a list of such values
    {"key": a, "key?": b}     an object with these keys; "?" marks one that may be missing; others are ignored
    {str: a}                  an object with any keys
"""
import json

from core.configurator import LARGEST, UserError

NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false",
         type(None): "null", None: "null", list: "a list", dict: "an object"}


def read_json(path, shape=object):
    """The content of a JSON file. Raises UserError if it is not JSON or not of this shape."""
    with open(path, "rb") as f:
        return parse_json(f.read(), path, shape)


def parse_json(text, where, shape=object):
    """The value that JSON text (str or bytes) stands for. Raises UserError that begins with `where`."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is not JSON that we can read: it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not JSON: not UTF-8 at byte {error.start}") from None
    except ValueError as error:      # also a number of more digits than Python converts
        reason = str(error).partition(";")[0]
        raise UserError(f"{where} is not JSON ({reason})") from None
    problem = misfit(value, shape)
    if problem:
        raise UserError(f"{where}: {problem}")
    return value


def misfit(value, shape, key=""):
    """What keeps a value from having a shape, as words; "" if it has it. key: where the value stands"""
    name = f"'{key}'" if key else "the content"
    if shape is object:
        return ""
    if isinstance(shape, tuple):
        problems = [misfit(value, one, key) for one in shape]
        if "" in problems:
            return ""
        # A list or an object that nearly fits says more than "is not one of".
        deeper = [text for text in problems if not text.startswith(f"{name} is ")]
        expected = " or ".join(shape_in_words(one) for one in shape)
        return deeper[0] if deeper else f"{name} is {value_in_words(value)}, not {expected}"
    if isinstance(shape, list) and isinstance(value, list):
        for i, item in enumerate(value):
            problem = misfit(item, shape[0], f"{key}[{i}]")
            if problem:
                return problem
        return ""
    if isinstance(shape, dict) and isinstance(value, dict):
        return misfit_of_object(value, shape, key)
    if shape is None and value is None:
        return ""
    if shape is float and type(value) is int and abs(value) <= LARGEST:
        return ""
    if isinstance(shape, type) and type(value) is shape:
        return ""
    return f"{name} is {value_in_words(value)}, not {shape_in_words(shape)}"


def misfit_of_object(value, shape, key):
    """misfit() of a dict."""
    prefix = f"{key}." if key else ""
    for wanted, inner in shape.items():
        if wanted is str:
            for name, item in value.items():
                problem = misfit(item, inner, prefix + name)
                if problem:
                    return problem
            continue
        name = wanted.removesuffix("?")
        if name in value:
            problem = misfit(value[name], inner, prefix + name)
            if problem:
                return problem
        elif not wanted.endswith("?"):
            return f"has no '{prefix}{name}'"
    return ""


def shape_in_words(shape):
    """"a whole number" for int, and so on."""
    if isinstance(shape, (list, dict)):
        shape = type(shape)
    return NAMES[shape]


def value_in_words(value):
    """A value as words in a message, not longer than half a line."""
    if isinstance(value, (list, dict)):
        return NAMES[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
