"""Settings in three layers: a dataclass at the top of a script <- config/*.py files <- --key=value.

    @dataclass
    class Config:
        # model
        size: str = "210m"          # a row of model.SIZES
        mask_rate: float = 0.4      # share of tokens hidden from an MLM

    python train.py config/demo_mlm.py --mask_rate=0.3

--key VALUE is --key=VALUE, and a tuple takes all words up to the next --key: `--seeds 0 1 2`. A
word that ends in .py is a config file, unless it is the value of a str: `--prompt a.py`. A config
file is Python that assigns plain values to these names, so it can show its arithmetic.
Both layers are strict: an unknown key is an error that names the nearest one, and a value must have
its field's type. The type also says which values make sense, as in `steps: PositiveInt`; a Path may
begin with ~, the home folder. `run(main, Config)` turns expected errors into one line and an exit
code, without a traceback.
"""

import ast
import dataclasses
import difflib
import errno
import inspect
import io
import os
import runpy
import signal
import sys
import tokenize
import traceback
import typing
from dataclasses import dataclass
from typing import Annotated

# ---- types of settings: PositiveInt is an int of at least 1, and so on


@dataclass(frozen=True)
class Range:
    """The numbers a setting may have, from lowest to highest; in words for the message."""

    lowest: float
    highest: float
    words: str

    def contains(self, value):
        return self.lowest <= value <= self.highest      # False for NaN


LARGEST_INT = 2**63 - 1                    # of torch and numpy
SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max      # finite floats
JUST_BELOW_1 = 1 - sys.float_info.epsilon

PositiveInt = Annotated[int, Range(1, LARGEST_INT, "a whole number of at least 1")]
NonNegativeInt = Annotated[int, Range(0, LARGEST_INT, "a whole number of at least 0")]
Seed = Annotated[int, Range(0, LARGEST_INT, "a whole number from 0 to 2**63 - 1")]
PositiveFloat = Annotated[float, Range(SMALLEST, LARGEST, "a number above 0")]
NonNegativeFloat = Annotated[float, Range(0, LARGEST, "a number of at least 0")]
Share = Annotated[float, Range(SMALLEST, 1, "a share, above 0 and at most 1")]
Fraction = Annotated[float, Range(0, JUST_BELOW_1, "a share, from 0 to below 1")]
Beta = Annotated[float, Range(0, JUST_BELOW_1, "a number from 0 to below 1")]
Workers = Annotated[int, Range(0, 1024, "a whole number from 0 to 1,024")]      # threads or processes
Path = Annotated[str, "may begin with ~, also after a prefix such as parquet:"]


# Each line holds the names of one setting, here and elsewhere. If a program does not have a key, its
# error names the first key of the same line that it does have.
SYNONYMS = (
    ("learning_rate", "lrs", "lr", "max_lr", "peak_lr"),
    ("weight_decay", "wd", "l2"),
    ("batch_rows", "batch", "rows", "bs", "batch_size", "global_batch_size", "train_batch_size"),
    ("micro_rows", "micro_tokens", "micro_batch", "micro_batch_size", "mbs", "device_batch_size",
     "per_device_train_batch_size", "grad_accum", "gradient_accumulation_steps"),
    ("phases", "steps", "run_steps", "epochs", "num_epochs", "num_train_epochs", "max_epochs",
     "max_steps", "num_steps", "max_iters", "iters", "iterations", "total_steps"),
    ("warmup_steps", "warmup", "warmup_ratio", "warmup_iters"),
    ("grad_clip", "clip", "max_norm", "max_grad_norm", "gradient_clipping"),
    ("block_size", "max_length", "seq_len", "max_seq_len", "seq_length", "sequence_length", "max_seq_length",
     "context_length", "context", "ctx"),
    ("mask_rate", "mlm_probability", "mlm_prob", "mask_prob", "masking_rate", "masking_ratio"),
    ("size", "model", "model_size", "arch", "architecture"),
    ("ckpt", "init_from", "model", "checkpoint", "model_path", "model_name", "model_name_or_path",
     "pretrained"),
    ("data_dir", "source", "dataset", "dataset_name", "data", "data_path", "input", "train_file"),
    ("out_dir", "out", "to", "output", "output_dir", "output_path", "save_dir", "save_path", "log_dir"),
    ("attention", "attn", "attn_implementation", "flash", "flash_attention"),
    ("dtype", "precision", "mixed_precision", "amp", "bf16", "fp16"),
    ("device", "gpu", "cuda", "accelerator"),
    ("checkpoint_activations", "gradient_checkpointing", "activation_checkpointing"),
    ("seed", "seeds", "random_seed", "rng_seed"),
    ("processes", "jobs", "workers", "num_workers", "nproc", "n_jobs"),
)


class UserError(Exception):
    """A mistake that the user can correct; the message says how. Exit code 2."""


class RunError(Exception):
    """A failure that stops a run (a full disk, a loss that is not finite). Exit code 1.

    The message says what is safe.
    """


def run(main, config_class):
    """Call main(config) with the settings of the command line.

    An expected error is printed as one line, and the process exits with its code. Any other error is
    reported as a bug, with its traceback. A program whose console is gone, as with `| head`, continues
    without it.
    """
    sys.stdout = Console(sys.stdout)
    sys.stderr = Console(sys.stderr)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)      # replaces that of core.ctrl_c
    config = None
    try:
        config = configure(config_class)
        main(config)
    except (UserError, RunError, OSError) as error:
        # OSError: a full disk, a folder that we may not write to.
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.stdout.flush()
        # MemoryError, and torch.OutOfMemoryError of a GPU
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            print(f"error: out of memory; take smaller batches. {error}", file=sys.stderr)
            sys.exit(1)
        print(f"error: this is a bug in the program, please report it. {where_state_is(config)}",
              file=sys.stderr)
        traceback.print_exc()
        sys.exit(1)
    sys.stdout.flush()
    if sys.stdout.error:
        print(f"error: the output above is not complete: {sys.stdout.error}", file=sys.stderr)
        sys.exit(1)


def where_state_is(config):
    """A sentence that tells the user, after a crash, where the program's output is."""
    for name in ("out_dir", "out", "to"):
        folder = getattr(config, name, None)
        if folder:
            return f"What it has written is in {folder}; the same command may resume."
    return "Files that exist are complete."


class Console:
    """A text stream that drops its text once it cannot be written, so that the program continues.

    error: why text was lost; None if only because nobody reads it any more
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")      # None: closed by >&-
        if hasattr(self.stream, "reconfigure"):
            # what a console without UTF-8 cannot show becomes an escape like \\xb1
            self.stream.reconfigure(errors="backslashreplace")
        self.error = None

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error):
        # EPIPE: the reader of a pipe has ended. EIO: the terminal is closed.
        if error.errno not in (errno.EPIPE, errno.EIO):
            self.error = error
        # What is still buffered, and all that follows, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def configure(config_class, argv=None):
    """Make the config_class that argv (default: sys.argv[1:]) asks for.

    Its defaults come first. Config files (words that end in .py, wherever they stand) override
    them, and --key=value words override both. Other words go to the field `args` (a tuple), if the
    class has one. Prints the help and exits 0 on --help. Raises UserError.
    """
    if argv is None:
        argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class))
        sys.exit(0)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    takes_args = fields.pop("args", None) is not None
    values = {}

    # the config files
    files, words = split_config_files(argv, fields)
    for path in files:
        for key, value in read_file(path).items():
            values[key] = check(key, value, fields, where=path)

    # the command line
    where = "the command line"
    args = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")   # at the first =, so the value of --x=a=b is "a=b"
            kind = find_field(key, fields, where).type
            value = parse(text, kind) if equals else take_value(key, kind, words)
            values[key] = check(key, value, fields, where)
        elif takes_args and not word.startswith("-"):
            args.append(word)
        else:
            raise UserError(
                f"what is {shorten(word)}? Settings are --key=value, config files end in .py; --help "
                "lists every key"
            )
    if takes_args:
        values["args"] = tuple(args)
    return config_class(**values)


def split_config_files(argv, fields):
    """The config files among the words of a command line, and its other words. -> (files, words)

    A word that ends in .py is a config file, wherever it stands, but not right after the --key of a str.
    """
    files = []
    words = []
    previous = ""
    for word in argv:
        field = fields.get(previous.removeprefix("--")) if previous.startswith("--") else None
        is_value = field is not None and plain_type(field.type) is str
        if word.endswith(".py") and not word.startswith("-") and not is_value:
            files.append(word)
        else:
            words.append(word)
        previous = word
    return files, words


def read_file(path):
    """Run a config file. -> {name: value}, without the names that start with an underscore"""
    if not os.path.isfile(path):
        raise UserError(f"config file {path} does not exist")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        # A user's file can raise anything: report it in its own words.
        reason = " ".join(str(error).split())
        raise UserError(f"config file {path} does not run: {type(error).__name__}: {reason}") from None
    return {key: value for key, value in names.items() if not key.startswith("_")}


def take_value(key, kind, words):
    """The value that follows "--key" on the command line. It is removed from `words`."""
    n_values = 0
    while n_values < len(words) and not words[n_values].startswith("--"):
        n_values += 1
    # Config files are not among the words, so --fast has no value in "--fast config.py".
    if n_values == 0:
        raise UserError(f"--{key} needs a value: write --{key}=VALUE")
    if plain_type(kind) is not tuple:
        return parse(words.pop(0), kind)

    # A tuple takes all the words. A single word may hold the whole tuple: --phases "(('mlm', 3),)".
    values = [parse(word, kind) for word in words[:n_values]]
    del words[:n_values]
    if len(values) == 1 and not isinstance(values[0], str):
        return values[0]
    return tuple(values)


def find_field(key, fields, where):
    """The field called `key`. Raises UserError that names the nearest key."""
    if key not in fields:
        raise UserError(
            f"unknown key {shorten(key)} in {where}; the nearest is '{nearest(key, fields)}' "
            "(--help lists every key)"
        )
    return fields[key]


def nearest(key, names):
    """The one of `names` that means the same as `key` elsewhere, or else is spelled most like it."""
    key = key[:100].lower().replace("-", "_")
    for group in SYNONYMS:
        if key in group:
            for name in group:
                if name in names:
                    return name
    return difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]


def parse(text, kind):
    """The Python value that a word of the command line stands for.

    A word that is not a Python literal stays a str; check() then decides. Where a tuple of str is
    expected, only a word in brackets is read as a literal, as in --compare="('a', 'b')". So a run may
    be called 1e3.
    """
    if plain_type(kind) is str or (item_type(kind) is str and not text.startswith(("(", "["))):
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def plain_type(kind):
    """The Python type of a setting's type: int for PositiveInt, tuple for tuple[PositiveFloat, ...]."""
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)[0]
    return typing.get_origin(kind) or kind


def item_type(kind):
    """The plain type of what a tuple[..., ...] holds; None for a plain tuple and for other types."""
    if typing.get_origin(kind) is not tuple:
        return None
    return plain_type(typing.get_args(kind)[0])


def check(key, value, fields, where):
    """The value, as its field's type. Raises UserError if the key, the type or the range is wrong."""
    field = find_field(key, fields, where)
    kind = plain_type(field.type)
    # A list or one number may stand for a tuple, and an int for a float.
    if kind is tuple:
        if isinstance(value, (tuple, list)):
            try:
                value = as_tuple(value)
            except RecursionError:
                raise UserError(f"{key} in {where} is nested too deep") from None
        elif type(value) in (int, float):
            value = (value,)      # --seeds=0
    value = as_float(value, kind)
    if type(value) is not kind:
        raise UserError(
            f"{key}={shorten(value)} in {where}: expected {kind.__name__}, as in {key}={field.default!r}"
        )

    # Check the range of the value, or of each value in a tuple.
    if item_type(field.type):
        kind_of_item = typing.get_args(field.type)[0]
        return tuple(check_range(key, item, kind_of_item, where) for item in value)
    return check_range(key, value, field.type, where)


def as_float(value, kind):
    """The value; an int becomes a float if the type asks for one."""
    if plain_type(kind) is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    return value


def check_range(key, value, kind, where):
    """The value, if it has this type and is in its range. Raises UserError.

    The ~ of a Path becomes the home folder.
    """
    value = as_float(value, kind)
    if plain_type(kind) is str and type(value) is str:
        if "\0" in value:
            raise UserError(f"{key} in {where} contains a NUL character")
        return expand_home(value) if kind == Path else value
    allowed = typing.get_args(kind)[1] if typing.get_origin(kind) is Annotated else None
    if isinstance(allowed, Range):
        is_allowed = type(value) is plain_type(kind) and allowed.contains(value)
        expected = allowed.words
    else:
        is_allowed = type(value) is plain_type(kind)
        expected = plain_type(kind).__name__
    if not is_allowed:
        raise UserError(f"{key}={shorten(value)} in {where}: expected {expected}")
    return value


def expand_home(path):
    """A path with its ~ replaced by the home folder, also in "parquet:~/folder"."""
    prefix, colon, rest = path.rpartition(":")
    return prefix + colon + os.path.expanduser(rest)


def shorten(value):
    """A value as a message shows it."""
    try:
        text = repr(value)
    except ValueError:      # an int of more digits than Python prints
        return "(a very long number)"
    except RecursionError:
        return "(nested very deep)"
    return text if len(text) <= 100 else f"{text[:97]}..."


def as_tuple(value):
    """The value with lists turned into tuples at every depth.

    So a config file's list equals a command line's tuple and JSON's list.
    """
    if isinstance(value, (tuple, list)):
        return tuple(as_tuple(item) for item in value)
    return value


def help_text(config_class):
    """The text of --help: the script's docstring, then every key with its default and its comment.

    The comment lines of the class are headings. Inherited settings are listed, too: a setting that
    the subclass writes again keeps its place and gets the new comment, and a new setting stands
    after the one that is above it in the subclass.
    """
    # The order of headings and settings, from the base class to config_class.
    order = []
    comments = {}
    for layer in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(layer):
            place = len(order)
            for name, comment in commented_lines(layer):
                if name not in comments:
                    # a new heading comes last, a new setting after the line above it
                    if name.startswith("#"):
                        place = len(order)
                    order.insert(place, name)
                place = order.index(name) + 1
                comments[name] = comment

    # One line for each.
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
    """Yield (name, comment) for each setting and heading in a class's own source.

    The name of a heading is its whole line, "# model".
    """
    fields = {f.name for f in dataclasses.fields(config_class) if f.name != "args"}
    source = inspect.getsource(config_class)
    # {line number: comment}. tokenize knows that a # inside a string begins no comment.
    comments = {}
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
    """["key: OLD then, NEW now", ...] for every setting that changed and is not in `free`."""
    changed = []
    for key, value in new.items():
        old_value = old.get(key)
        if key not in free and as_tuple(old_value) != as_tuple(value):
            changed.append(f"{key}: {old_value} then, {value} now")
    return changed
