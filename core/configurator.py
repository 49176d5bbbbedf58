"""Settings in three layers: a dataclass at the top of a script <- config/*.py files <- --key=value.

    @dataclass
    class Config:
        # model
        size: str = "210m"          # a row of model.SIZES
        mask_rate: float = 0.4      # share of tokens hidden from an MLM

    python train.py config/demo_mlm.py --mask_rate=0.3

--key VALUE is --key=VALUE, and a tuple takes all words up to the next --key: `--seeds 0 1 2`. A
config file is Python that assigns plain values to these names, so it can do arithmetic in the open.
Both layers are strict: an unknown key anywhere is an error that names the nearest one, and a value
must have its field's type. `run(main, Config)` also turns expected trouble into one line and an
exit code, without a traceback.
"""
import ast
import dataclasses
import difflib
import inspect
import io
import os
import runpy
import sys
import tokenize


class UserError(Exception):
    """A mistake the user can mend; the message says how. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on (a full disk, a loss that is not finite); the message says what is
    safe. Exit code 1."""


def run(main, config_class):
    """Call main(config) with the command line's settings; print an expected error as one line and
    exit with its code."""
    try:
        main(configure(config_class))
    except (UserError, RunError, OSError) as error:      # OSError: a full disk, a folder that may not be written
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def configure(config_class, argv=None):
    """Build config_class from its defaults, then the .py files, then the --key=value words of argv
    (default sys.argv[1:]).

    Files are read before the command line, wherever they stand on it. Words that are neither go to
    the field `args` (a tuple), if the class has one. Raises UserError; prints the help and exits 0
    on --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class))
        sys.exit(0)
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.name != "args"}
    takes_args = "args" in {f.name for f in dataclasses.fields(config_class)}
    files = [word for word in argv if not word.startswith("-") and word.endswith(".py")]
    values, args = {}, []
    for path in files:
        for key, value in read_file(path).items():
            values[key] = check(key, value, fields, where=path)
    rest = [word for word in argv if word not in files]
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")   # the first = only, so --x=a=b is the string "a=b"
            kind = find(key, fields, where="the command line").type
            value, ahead = parse(text, kind), next((i for i, w in enumerate(rest) if w.startswith("--")), len(rest))
            if not equals:
                if not ahead:
                    raise UserError(f"--{key} needs a value: write --{key}=VALUE")
                words = [parse(w, kind) for w in rest[:ahead if kind is tuple else 1]]
                value = words[0] if len(words) == 1 and type(words[0]) is not str or kind is not tuple else tuple(words)
                del rest[:len(words)]
            values[key] = check(key, value, fields, where="the command line")
        elif takes_args and not word.startswith("-"):
            args.append(word)
        else:
            raise UserError(f"what is '{word}'? Settings are --key=value, config files end in .py; --help lists every key")
    return config_class(**values, **({"args": tuple(args)} if takes_args else {}))


def read_file(path):
    """Run a config file in an empty namespace -> {name: value}, without names that start with an
    underscore."""
    if not os.path.isfile(path):
        raise UserError(f"config file {path} does not exist")
    try:
        names = runpy.run_path(path)
    except Exception as error:   # whatever a user's file can raise: report it as theirs, with its own words
        raise UserError(f"config file {path} does not run: {type(error).__name__}: {error}") from None
    return {key: value for key, value in names.items() if not key.startswith("_")}


def find(key, fields, where):
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
        raise UserError(f"unknown key '{key}' in {where}; the nearest is '{near[0]}' (--help lists every key)")
    return fields[key]


def parse(text, kind):
    """A command-line word as the field's type would have it written; text that is no literal stays
    text for check()."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check(key, value, fields, where):
    """The value, with int widened to float and list to tuple; UserError if the key or the type is
    wrong."""
    find(key, fields, where)
    kind = fields[key].type
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, (tuple, list)):
        value = as_tuple(value)
    if kind is tuple and type(value) in (int, float):      # --seeds=0, a grid of one
        value = (value,)
    if type(value) is not kind:
        raise UserError(f"{key}={value!r} in {where}: expected {kind.__name__}, as in {key}={fields[key].default!r}")
    return value


def as_tuple(value):
    """Lists to tuples at every depth, so that a config file's list equals a command line's tuple
    and JSON's list."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, (tuple, list)) else value


def help_text(config_class):
    """The script's docstring, then every key with its default and its comment, under the block's
    own headings.

    Inherited settings are listed too. A setting that the subclass writes again has the subclass's
    comment, and a new setting stands after the one that is above it in the subclass.
    """
    order, comments = [], {}
    for layer in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(layer):
            place = len(order)
            for name, comment in commented_lines(layer):
                if name not in comments:
                    # a new heading comes last, a new setting after the line above it
                    place = len(order) if name.startswith("#") else place
                    order.insert(place, name)
                place = order.index(name) + 1
                comments[name] = comment

    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    lines = [(sys.modules[config_class.__module__].__doc__ or "").strip()]
    for name in order:
        if name.startswith("#"):
            lines.append(f"\n{comments[name]}:")
        else:
            default = defaults[name]
            shown = f"--{name}={str(default).lower() if isinstance(default, bool) else default}"
            lines.append(f"  {shown:<34} {comments[name]}".rstrip())
    return "\n".join(lines)


def commented_lines(config_class):
    """Yields (name, comment) of the settings and headings in a class's own source; "# what" is the
    name of a heading."""
    fields = {f.name for f in dataclasses.fields(config_class) if f.name != "args"}
    source = inspect.getsource(config_class)
    comments = {}        # line number -> comment; tokenize knows that a # inside a string is not a comment
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    for number, line in enumerate(source.splitlines(), start=1):
        setting = line.partition(":")[0].strip()
        if line.lstrip().startswith("#"):
            yield line.strip(), comments[number]
        elif setting in fields:
            yield setting, comments.get(number, "")


def differences(old, new, free):
    """["key: OLD then, NEW now", ...] for every setting outside `free` that changed."""
    return [f"{k}: {old.get(k)} then, {v} now" for k, v in new.items() if k not in free and as_tuple(old.get(k)) != as_tuple(v)]
