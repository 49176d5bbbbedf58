"""Bad input of every kind: each program answers it with one line, and never with a traceback, for ever, or with a result.

Two generators, both the same in every run. One gives each setting of each program values that make no sense. The other
damages each file that a program reads, in each of a dozen ways, and runs the program on it in this process. A sample
of the damaged files is tried by default; `pytest -m slow tests/test_bad_input.py` tries them all, which takes minutes.
"""
import dataclasses
import json
import os
import random
import shutil
import signal
import traceback
import typing

import pytest
from conftest import ROOT
from speech_collections import collection

import bench
import eval_ir
import finetune
import hf
import prepare_fineweb
import report
import sample
import study
import train
from core.configurator import RunError, UserError, configure, item_type, plain_type
from model import SIZES

OLD = os.path.join(ROOT, "tests", "data", "old")
SETTINGS_OF = {module.__name__: module.Config for module in (train, finetune, eval_ir, sample, report, study, prepare_fineweb, hf)}
SETTINGS_OF |= {f"bench_{name}": part.settings for name, part in (bench.PARTS | bench.INTERNAL).items()}
LONG = "9" * 5000            # more digits than Python converts
DEEP = "[" * 200_000 + "]" * 200_000


# ---- settings

NOT_A_NUMBER = ["", "abc", "nan", "inf", "-inf", "1e999", "-1e999", "None", "True", "'1'", "1j", "(1,2)", "[[1]]", "{}", "{[]: 1}", "\0", "1\0",
                LONG, "-" + LONG, "1" + "0" * 400, "[" * 9999 + "]" * 9999, "-1e-999x"]
BAD_WORDS = {
    int: [*NOT_A_NUMBER, "1.5", "1e3", "-1", str(2**63), str(-2**63)],
    float: [*NOT_A_NUMBER, "-1", "-1e-9", "-1e308"],
    bool: ["", "1", "0", "yes", "None", "\0", LONG],
    str: ["\0", "a\0b"],
}
BAD_ITEMS = {int: ["'a'", "None", "1.5", "-1", "[1]", "1e999", str(2**63)], float: ["'a'", "None", "-1", "[1]", "1e999", "1j"], str: ["1", "None", "[1]"]}
# what a config file can assign to any setting
BAD_CODE = ["None", "object()", "b'1'", "{1}", "{}", "lambda: 0", "float('nan') * 1j", "10**5000 * 1j if False else b''"]
BAD_NUMBERS = ["float('nan')", "float('inf')", "-float('inf')", "10**5000", "-1", "True", "'1'"]


def fields_of(config_class):
    return [field for field in dataclasses.fields(config_class) if field.name != "args"]


def refusal(config_class, words):
    """What configure() says of a command line; "" if it takes it. Any other exception is the test's failure."""
    try:
        configure(config_class, words)
    except UserError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000, str(error)[:2000]
        return str(error)
    return ""


@pytest.mark.parametrize("program", SETTINGS_OF)
def test_every_number_among_the_settings_has_a_range(program):
    for field in fields_of(SETTINGS_OF[program]):
        assert field.type not in (int, float), f"{field.name}: which values make sense?"


@pytest.mark.parametrize("program", SETTINGS_OF)
def test_a_value_that_makes_no_sense_is_refused_whatever_the_setting(program):
    taken = []
    for field in fields_of(SETTINGS_OF[program]):
        kind = plain_type(field.type)
        words = BAD_WORDS.get(kind, [])
        if item_type(field.type):
            words = [f"({text},)" for text in BAD_ITEMS[item_type(field.type)]] + ["{1}", "None"][: 2 * (item_type(field.type) is not str)]
        taken += [f"--{field.name}={text[:50]!r}" for text in words if not refusal(SETTINGS_OF[program], [f"--{field.name}={text}"])]
    assert taken == []


@pytest.mark.parametrize("program", SETTINGS_OF)
def test_a_config_file_with_a_value_that_makes_no_sense_is_refused(program, tmp_path):
    taken = []
    for field in fields_of(SETTINGS_OF[program]):
        is_number = plain_type(field.type) in (int, float)
        for code in BAD_CODE + BAD_NUMBERS * is_number:
            (tmp_path / "c.py").write_text(f"{field.name} = {code}\n")
            if not refusal(SETTINGS_OF[program], [str(tmp_path / "c.py")]):
                taken.append(f"{field.name} = {code}")
    assert taken == []


@pytest.mark.parametrize("program", SETTINGS_OF)
def test_the_ends_of_a_range_are_taken_and_what_lies_beyond_is_not(program):
    for field in fields_of(SETTINGS_OF[program]):
        kind = typing.get_args(field.type)[0] if item_type(field.type) else field.type
        if plain_type(kind) not in (int, float):
            continue
        lowest, highest = typing.get_args(kind)[1].lowest, typing.get_args(kind)[1].highest
        for end in (lowest, highest):
            name, value = field.name, plain_type(kind)(end)
            # A class may refuse a pair of settings that contradict each other, such as a short row that is cut.
            assert "in the command line" not in refusal(SETTINGS_OF[program], [f"--{name}={value!r}"])
        assert refusal(SETTINGS_OF[program], [f"--{field.name}={lowest - 1!r}"])


# ---- files

class Hang(BaseException):
    """A program ran past its time."""


def run_main(main, config_class, words, seconds=60):
    """Run a program in this process. -> "" if it succeeds or refuses in one line, else what it did; and whether it refused"""
    def on_alarm(_number, _frame):
        raise Hang
    old_handlers = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        main(configure(config_class, words))
    except (UserError, RunError, OSError) as error:
        text = str(error)
        return (f"{len(text)} characters in {len(text.splitlines())} lines: {text[:200]}" if "\n" in text or len(text) > 1500 else ""), True
    except Hang:
        return f"still ran after {seconds} s", False
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(ROOT)]
        return f"{type(error).__name__}: {str(error)[:150]!r} at {os.path.relpath(frames[-1].filename, ROOT)}:{frames[-1].lineno}", False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    return "", False


TRAIN = ["--data_dir=corpus", "--out_dir=run", "--size=nano", "--block_size=64", "--batch_rows=8", "--micro_rows=8", "--phases=(('clm',10),('mlm',10))",
         "--warmup_steps=2", "--decay_steps=4", "--learning_rate=3e-3", "--eval_interval=10", "--eval_rows=8", "--save_interval=5", "--keep_last=9",
         "--log_interval=5", "--dtype=float32", "--compile=false", "--device=cpu"]
GRID = ["--ckpt=run/step_0000010", "--steps=8", "--batch=8", "--dtype=float32", "--device=cpu", "--cache_dir=cache", "--lrs=1e-3"]
CORPUS = ["corpus/manifest.json", "corpus/tokenizer_info.json", "corpus/tokenizer.tiktoken", "corpus/train_00000.bin", "corpus/val_00000.bin"]
TOKENIZER = ["run/tokenizer_info.json", "run/tokenizer.tiktoken"]
CHECKPOINT = [*TOKENIZER, *(f"run/step_0000010/{name}" for name in ("state.json", "model.safetensors", "SHA256SUMS"))]
TASK = [f"tasks/mood/{name}" for name in ("info.json", "train.jsonl", "validation.jsonl", "test.jsonl")]
RIVERS = [f"collections/rivers/{name}" for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv")]
HUB = [f"hub/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")]

# name: (program, words, files that it reads)
COMMANDS = {
    "resume": (train, TRAIN, [*CORPUS, *TOKENIZER, "run/config.json", "run/log.jsonl", "run/step_0000010/optimizer.safetensors"]),
    "init_from": (train, [*TRAIN, "--init_from=run", "--out_dir=new", "--phases=(('mlm',6),)"], CHECKPOINT),
    "import_from": (train, [*TRAIN, "--init_from=hub", "--size=", "--out_dir=new", "--phases=(('mlm',6),)"], HUB),
    "branch_from": (train, [*TRAIN, "--branch_from=run/step_0000010", "--out_dir=new"], ["run/config.json", *CHECKPOINT]),
    "finetune": (finetune, [*GRID, "--tasks=mood", "--data_dir=tasks", "--out_dir=grid", "--seeds=(0,1)"],
                 [*TASK, *CHECKPOINT, "grid/trials/mood/settings.json", "grid/trials/mood/lr1e-03_sd0.json"]),
    "eval_ir": (eval_ir, [*GRID, "--tasks=rivers", "--data_dir=collections", "--out_dir=ir", "--seeds=0"], [*RIVERS, *CHECKPOINT]),
    "sample": (sample, ["--ckpt=run", "--fill=the [MASK] of", "--device=cpu"], CHECKPOINT),
    "report_run": (report, ["run", "--to=report"], ["run/config.json", "run/log.jsonl"]),
    "report_grid": (report, ["grid", "--to=report"], ["grid/trials/mood/lr1e-03_sd0.json", "grid/trials/mood/lr1e-03_sd0.npz"]),
    "export": (hf, ["export", "run/step_0000010", "exported"], CHECKPOINT),
    "import": (hf, ["import", "hub", "imported"], HUB),
    "prepare": (prepare_fineweb, ["--source=source", "--out=made", "--tokenizer=train:320", "--val_fraction=0.2"], ["source/a.jsonl", "source/b.txt"]),
    "prepare_more": (prepare_fineweb, ["--source=source", "--out=half", "--tokenizer=train:320", "--val_fraction=0.2"],
                     ["half/manifest.json", "half/tokenizer_info.json", "half/tokenizer.tiktoken"]),
    "prepare_with_tokenizer_of": (prepare_fineweb, ["--source=source", "--out=made", "--tokenizer=hf:hub"], ["hub/tokenizer.json"]),
    "plan": (study, ["plan", "--scale=cpu", "--data_dir=corpus", "--only=B"], ["corpus/manifest.json"]),
}
# Files that a program only continues or looks at in passing, so that it may do without them. A damaged checkpoint is
# passed over by a run that resumes from the one before it.
MAY_BE_EMPTY = ("run/log.jsonl", "run/config.json", "source/a.jsonl", "source/b.txt", "run/tokenizer_info.json", "run/tokenizer.tiktoken",
                "hub/tokenizer_config.json", "run/step_0000010/optimizer.safetensors", "grid/trials/mood/lr1e-03_sd0.npz", "half/manifest.json")
# Files that a program names, keeps under another name and makes again.
MADE_AGAIN = {("finetune", "grid/trials/mood/lr1e-03_sd0.json")}



@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A corpus, a run, a grid, a task, a collection, an exported model, a source of texts and a half-made corpus."""
    folder = tmp_path_factory.mktemp("bad_input")
    work = folder / "work"
    shutil.copytree(OLD, work)
    collection(work / "collections")
    (work / "source").mkdir()
    texts = [f"The {i}th message to the Congress of the United States. " * 5 for i in range(60)]
    (work / "source" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (work / "source" / "b.txt").write_text(texts[0])
    patch = pytest.MonkeyPatch()
    patch.setitem(SIZES, "nano", dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64))
    patch.chdir(work)
    hf.main(configure(hf.Config, ["export", "run/step_0000010", "hub"]))
    prepare_fineweb.main(configure(prepare_fineweb.Config, ["--source=source", "--out=half", "--tokenizer=train:320", "--val_fraction=0.2"]))
    manifest = json.loads((work / "half" / "manifest.json").read_text())
    (work / "half" / "manifest.json").write_text(json.dumps({"settings": manifest["settings"], "complete": False}))
    patch.undo()
    return work


WHOLE = {"emptied": b"", "null": b"null", "list": b"[]", "string": b'"text"', "number": b"7", "deep": DEEP.encode(), "digits": LONG.encode(), "not UTF-8": b"\xff\xfe{"}
WAYS = [*WHOLE, "truncated", "NULs", "NULs at the end", "a byte changed", "removed", "a folder", "a key removed", "a key retyped", "a key deep", "a line torn", "a line of NULs", "a line of another type"]
OTHER_TYPES = [None, True, -1, 0, 1.5, 10**30, "", "text", [], {}, [[]], float("nan"), "\0", "../../x"]


def keys_of(value, path=()):
    """The paths of all keys and items below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from keys_of(item, (*path, key))


def changed(value, rng, way):
    """A JSON value with one of its keys removed, of another type or nested deep, as text."""
    paths = list(keys_of(value))
    if not paths:
        return json.dumps(rng.choice(OTHER_TYPES))
    *path, last = rng.choice(paths)
    holder = value
    for key in path:
        holder = holder[key]
    if way == "a key removed":
        del holder[last]
    else:
        holder[last] = "@@" if way == "a key deep" else rng.choice(OTHER_TYPES)
    return json.dumps(value).replace('"@@"', rng.choice([DEEP, LONG]))


def damage(path, way, rng):
    """Damage a file in one way. -> False if this way does not exist for this file"""
    content = open(path, "rb").read()
    lines = content.splitlines(keepends=True)
    is_lines = path.endswith((".jsonl", ".tsv"))
    middle = rng.randrange(len(lines)) if lines else 0
    if way in WHOLE:
        content = WHOLE[way]
    elif way == "truncated":
        content = content[: rng.randrange(1, len(content))]
    elif way == "NULs":
        content = bytes(len(content))
    elif way == "NULs at the end":
        content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    elif way == "a byte changed":
        at = rng.randrange(min(len(content), 2000))
        content = content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1:]
    elif way in ("removed", "a folder"):
        os.remove(path)
        if way == "a folder":
            os.mkdir(path)
        return True
    elif way.startswith("a key") and path.endswith(".json"):
        content = changed(json.loads(content), rng, way).encode()
    elif way.startswith("a key") and path.endswith(".jsonl"):
        lines[middle] = changed(json.loads(lines[middle]), rng, way).encode() + b"\n"
        content = b"".join(lines)
    elif way.startswith("a key") and path.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        header = changed(json.loads(content[8: 8 + size]), rng, way).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + size:]
    elif way.startswith("a line") and is_lines:
        torn = lines[middle][: len(lines[middle]) // 2]
        lines[middle] = {"a line torn": torn, "a line of NULs": bytes(len(torn)) + b"\n", "a line of another type": b"[7]\n"}[way]
        content = b"".join(lines)
    else:
        return False
    with open(path, "wb") as f:
        f.write(content)
    return True


def cases_of(command):
    """Every (file, way, seed) of a command; a way that draws a key or a place is drawn several times."""
    drawn = ("truncated", "a byte changed", "a key removed", "a key retyped", "a key deep")
    cases = [(file, way, seed) for file in COMMANDS[command][2] for way in WAYS for seed in range(3 if way in drawn else 1)]
    random.Random(command).shuffle(cases)
    return cases


def failures(command, cases, made_once, tmp_path, monkeypatch, seconds):
    """Run a command on damaged files, one after the other. -> what went wrong, a line each"""
    monkeypatch.setitem(SIZES, "nano", dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64))
    module, words, _ = COMMANDS[command]
    wrong = []
    for number, (file, way, seed) in enumerate(cases):
        work = tmp_path / str(number)
        shutil.copytree(made_once, work)
        monkeypatch.chdir(work)
        if not damage(file, way, random.Random(f"{file} {way} {seed}")):
            continue
        problem, is_refused = run_main(module.main, module.Config, words, seconds)
        if not problem and not is_refused and way in WHOLE and file not in MAY_BE_EMPTY and (command, file) not in MADE_AGAIN:
            problem = "accepted"
        if problem:
            wrong.append(f"{command}: {file}, {way} ({seed}): {problem}")
        monkeypatch.chdir(made_once)
        shutil.rmtree(work)
    return wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_intact_files_are_taken(command, made_once, tmp_path, monkeypatch):
    """Otherwise a refusal below would mean nothing."""
    monkeypatch.setitem(SIZES, "nano", dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64))
    shutil.copytree(made_once, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    module, words, files = COMMANDS[command]
    assert all(os.path.isfile(file) for file in files)
    assert run_main(module.main, module.Config, words) == ("", False)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_is_one_line(command, made_once, tmp_path, monkeypatch):
    assert failures(command, cases_of(command)[:6], made_once, tmp_path, monkeypatch, seconds=60) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_damage_to_every_file_is_one_line(command, made_once, tmp_path, monkeypatch):
    wrong = failures(command, cases_of(command), made_once, tmp_path, monkeypatch, seconds=60)
    assert wrong == [], "\n" + "\n".join(wrong)
