"""Settings: three strict layers, and errors that name what is wrong."""
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from conftest import ROOT, run_python

import eval_ir
import finetune
import hf
import prepare_fineweb
import report
import sample
import study
import train
from core import configurator
from core.configurator import (
    SYNONYMS,
    NonNegativeFloat,
    Path,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    UserError,
)


@dataclass
class Config:
    # a heading
    size: str = "small"        # which one
    steps: int = 10            # how many
    rate: float = 0.5          # how fast
    fast: bool = False         # hurry
    phases: tuple = (("clm", 1),)   # what


def configure(*argv):
    return configurator.configure(Config, list(argv))


def test_command_line_overrides_file_overrides_default(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("_per_gpu = 4\nsteps = _per_gpu * 8\nsize = 'big'\nphases = [('mlm', 3), ['clm', 4]]\n")
    c = configure("--size=huge", str(file))
    assert (c.size, c.steps, c.rate, c.phases) == ("huge", 32, 0.5, (("mlm", 3), ("clm", 4)))


def test_values_keep_their_meaning():
    c = configure("--size=a=b=c", "--rate=1", "--fast=true", "--steps=1_000", "--phases=[('clm',2)]")
    assert c == Config("a=b=c", 1000, 1.0, True, (("clm", 2),))
    assert type(c.rate) is float


def test_a_space_is_as_good_as_an_equals_sign(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("steps = 5\n")
    assert configure("--size", "big one", "--rate", "-1", "--fast", "true", str(file)) == Config("big one", 5, -1.0, True)
    assert configure("--phases", "1", "2e-4", "--size", "x").phases == (1, 2e-4)
    assert configure("--phases", "runs/a", "runs/b").phases == ("runs/a", "runs/b") and configure("--phases", "a").phases == ("a",)
    assert configure("--phases", "(('mlm', 3),)").phases == (("mlm", 3),)
    for argv in (["--fast", str(file)], ["--size", "--steps=3"], ["--steps"]):
        with pytest.raises(UserError, match="needs a value"):
            configure(*argv)


@pytest.mark.parametrize("word, says", [
    ("--stpes=3", "unknown key 'stpes' in the command line; the nearest is 'steps'"),
    ("--steps=abc", "steps='abc' in the command line: expected int"),
    ("--steps=1.5", "steps=1.5 in the command line: expected int"),
    ("--steps=True", "steps=True in the command line: expected int"),
    ("--fast=1", "fast='1' in the command line: expected bool"),
    ("--rate=fast", "rate='fast' in the command line: expected float"),
    ("--phases=clm", "phases='clm' in the command line: expected tuple"),
    ("--fast", "write --fast=VALUE"),
    ("steps=3", "what is 'steps=3'?"),
    ("nowhere.py", "config file nowhere.py does not exist"),
])
def test_mistakes_are_named(word, says):
    with pytest.raises(UserError) as error:
        configure(word)
    assert says in str(error.value)


@pytest.mark.parametrize("program, key, nearest", [
    (train, "lr", "learning_rate"), (train, "LR", "learning_rate"), (train, "lrs", "learning_rate"), (train, "learning-rate", "learning_rate"),
    (train, "wd", "weight_decay"), (train, "bs", "batch_rows"), (train, "batch_size", "batch_rows"), (train, "epochs", "phases"),
    (train, "max_steps", "phases"), (train, "steps", "phases"), (train, "seq_len", "block_size"), (train, "model", "size"),
    (train, "max_grad_norm", "grad_clip"), (train, "output_dir", "out_dir"), (train, "mlm_probability", "mask_rate"),
    (train, "weight_deacy", "weight_decay"), (finetune, "lr", "lrs"), (finetune, "learning_rate", "lrs"), (finetune, "bs", "batch"),
    (finetune, "epochs", "steps"), (finetune, "model", "ckpt"), (eval_ir, "batch_size", "batch"), (sample, "model", "ckpt"),
    (prepare_fineweb, "output", "out"), (prepare_fineweb, "dataset", "source"), (report, "out", "to"),
])
def test_an_unknown_key_names_the_nearest_also_by_what_others_call_it(program, key, nearest):
    with pytest.raises(UserError, match=f"unknown key '{key}' in the command line; the nearest is '{nearest}'"):
        configurator.configure(program.Config, [f"--{key}=1"])


def test_each_line_of_synonyms_begins_with_settings_of_ours():
    names = set()
    for program in (train, finetune, eval_ir, sample, report, prepare_fineweb, study):
        names |= {field.name for field in fields(program.Config)}
    assert [group for group in SYNONYMS if group[0] not in names] == []


@pytest.mark.parametrize("words, says", [
    ((), "what to do? hf.py import SOURCE OUT, or hf.py export CKPT OUT"),
    (("exprt", "a", "b"), "unknown command 'exprt'; the nearest is hf.py export CKPT OUT"),
    (("Import", "a"), "unknown command 'Import'; the nearest is hf.py import SOURCE OUT"),
    (("publish",), "unknown command 'publish'; the nearest is hf.py "),
    (("export", "a"), "export needs a source and a target: hf.py export CKPT OUT"),
])
def test_a_wrong_command_of_hf_py_names_the_nearest(words, says):
    with pytest.raises(UserError, match=re.escape(says)):
        hf.main(hf.Config(args=words))


@pytest.mark.parametrize("text, says", [
    ("learning_rat = 3\nstep = 4\n", "unknown key 'learning_rat'"), ("steps = 'x'\n", "expected int"),
    ("steps = = 3\n", "SyntaxError"), ("steps = 1 / 0\n", "ZeroDivisionError"),
])
def test_mistakes_in_a_file_name_the_file(tmp_path, text, says):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        configure(str(file))
    assert says in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("script", ["train.py", "prepare_fineweb.py", "finetune.py", "eval_ir.py", "report.py", "hf.py", "sample.py"])
def test_help_lists_every_key_with_default_and_comment(script):
    module = __import__(script[:-3])
    help_text = configurator.help_text(module.Config)
    for field in fields(module.Config):
        if field.name != "args":
            line = next(line for line in help_text.splitlines() if line.strip().startswith(f"--{field.name}="))
            default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            comment = line.strip().removeprefix(f"--{field.name}={default}").strip()
            assert len(comment) > 3, f"{script}: {field.name} has no comment: {line}"
    if script == "report.py":      # the one that starts fastest
        assert run_python([script, "--help"]).stdout == help_text + "\n"


@dataclass
class MoreConfig(Config):
    # a heading
    steps: int = 20            # of each trial
    place: str = "here"        # where
    # another heading
    time: str = "now"          # when


def test_help_merges_the_settings_of_a_subclass_into_those_of_its_base_class():
    lines = configurator.help_text(MoreConfig).splitlines()
    keys = [line.split("=")[0].strip() for line in lines if line.strip().startswith("--")]
    assert keys == ["--size", "--steps", "--place", "--rate", "--fast", "--phases", "--time"]
    assert lines.index("a heading:") < lines.index("another heading:") and "of each trial" in "".join(lines)


def test_a_mistake_is_one_line_and_exit_code_2():
    done = run_python(["train.py", "--learning_rat=1"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown key 'learning_rat' in the command line; the nearest is 'learning_rate' (--help lists every key)\n"


def test_every_config_file_is_valid_and_short():
    names = sorted(os.listdir(os.path.join(ROOT, "config")))
    assert {"1b_clm_then_mlm.py", "mlm.py", "clm.py"} <= set(names)
    for name in (n for n in names if n.endswith(".py")):
        path = os.path.join(ROOT, "config", name)
        if name.startswith("finetune_"):
            assert finetune.check(configurator.configure(finetune.Config, [path, "--ckpt=somewhere"]))
        elif name.startswith("retrieval_"):
            assert eval_ir.check(configurator.configure(eval_ir.Config, [path, "--ckpt=somewhere"]))
        else:
            c = configurator.configure(train.Config, [path])
            assert train.check(c, world_size=8 if c.batch_rows % (8 * c.micro_rows) == 0 else 1) > 0
        text = open(path).read()
        assert len(text.splitlines()) <= 30 and text.startswith("#"), name


@dataclass
class Ranged:
    # types that say which values make sense
    steps: PositiveInt = 10    # how many
    clip: NonNegativeFloat = 1.0   # how much
    share: Share = 0.5         # of it
    lrs: tuple[PositiveFloat, ...] = (1e-3,)   # several
    seeds: tuple[Seed, ...] = (0,)   # several, too
    folder: Path = ""          # where


@pytest.mark.parametrize("word, says", [
    ("--steps=0", "steps=0 in the command line: expected a whole number of at least 1"),
    ("--steps=9223372036854775808", "steps=9223372036854775808 in the command line: expected a whole number of at least 1"),
    ("--clip=-1", "clip=-1.0 in the command line: expected a number of at least 0"),
    ("--clip=1e999", "clip=inf in the command line: expected a number of at least 0"),
    ("--clip=nan", "clip='nan' in the command line: expected float"),
    ("--share=1.5", r"share=1.5 in the command line: expected a share, above 0 and at most 1"),
    ("--share=0", r"share=0.0 in the command line: expected a share"),
    ("--lrs=[1e-3,-1]", r"lrs=-1.0 in the command line: expected a number above 0"),
    ("--lrs=[1e-3,'a']", r"lrs='a' in the command line: expected a number above 0"),
    ("--seeds=1.5", r"seeds=1.5 in the command line: expected a whole number"),
    ("--steps=" + "9" * 5000, "steps='9999"),
    ("--steps=" + "[" * 9999 + "]" * 9999, "expected int"),
    ("--clip=1" + "0" * 400, "expected float"),
    ("--folder=a\0b", "folder in the command line contains a NUL character"),
])
def test_a_type_says_which_values_make_sense(word, says):
    with pytest.raises(UserError, match=says):
        configurator.configure(Ranged, [word])


def test_a_config_file_is_held_to_the_same_ranges(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("clip = float('nan')\n")
    with pytest.raises(UserError, match=r"clip=nan in .*c\.py: expected a number of at least 0"):
        configurator.configure(Ranged, [str(file)])


def test_a_word_that_ends_in_py_is_a_value_after_the_key_of_a_text(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("steps = 5\n")
    c = configure("--size", "a.py", str(file))
    assert (c.size, c.steps) == ("a.py", 5)


def test_several_texts_are_taken_as_they_are_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    @dataclass
    class Texts:
        runs: tuple[Path, ...] = ()    # several
    take = lambda *words: configurator.configure(Texts, list(words)).runs  # noqa: E731
    assert take("--runs", "1e3", "~/b", "None") == ("1e3", "/home/ada/b", "None")
    assert take("--runs=('a', 'parquet:~/b')") == ("a", "parquet:/home/ada/b")
    with pytest.raises(UserError, match="runs=1 in the command line: expected str"):
        take("--runs=(1, 2)")


@pytest.mark.parametrize("text, says", [
    ("steps = [3]\nfor _ in range(200_000): steps = [steps]\n", "steps=.nested very deep. in .*expected int"),
    ("phases = []\nfor _ in range(200_000): phases = [phases]\n", "phases in .*is nested too deep"),
    ("raise SystemExit('no')\n", "does not run: SystemExit: no"),
])
def test_a_config_file_that_does_odd_things_is_one_line(tmp_path, text, says):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        configure(str(file))


def test_values_within_their_range_are_taken_and_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    c = configurator.configure(Ranged, ["--steps=1", "--clip=0", "--share=1", "--lrs", "1", "2e-4", "--seeds=3", "--folder=~/runs"])
    assert c == Ranged(1, 0.0, 1.0, (1.0, 2e-4), (3,), "/home/ada/runs") and type(c.lrs[0]) is float


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from core.configurator import run

@dataclass
class Config:
    out_dir: str = "somewhere"

def main(c):
    {body}

run(main, Config)
"""


def program(body, stdout=subprocess.PIPE):
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(root=ROOT, body=body)], stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_a_bug_shows_its_traceback_once_under_a_line_that_calls_it_one_and_says_where_the_state_is():
    process = program("{}['missing']")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1 and text.startswith("error: this is a bug in the program") and "somewhere" in text.splitlines()[0]
    assert text.count("Traceback") == 1 and text.rstrip().endswith("KeyError: 'missing'")


def test_memory_that_runs_out_is_no_bug():
    process = program("raise MemoryError")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1 and text.startswith("error: out of memory") and "Traceback" not in text


def test_a_program_whose_reader_has_left_works_on_and_shows_no_traceback(tmp_path):
    process = program(f"print(1, flush=True); import time; time.sleep(0.5); print('x' * 9000); open({str(tmp_path / 'done')!r}, 'w').close()")
    assert process.stdout.readline() == "1\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0 and (tmp_path / "done").exists()


def test_a_console_that_was_never_open_is_no_obstacle(tmp_path):
    code = PROGRAM.format(root=ROOT, body="print('nobody hears')")
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_lets_the_work_finish_and_is_an_error_at_the_end(tmp_path):
    with open("/dev/full", "w") as full:
        process = program(f"print(1, flush=True); open({str(tmp_path / 'done')!r}, 'w').close()", stdout=full)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1 and "not complete" in text and "Traceback" not in text and (tmp_path / "done").exists()


@pytest.mark.parametrize("name", ["train", "finetune", "eval_ir", "sample", "study", "bench"])
def test_ctrl_c_while_a_program_still_imports_is_one_line(tmp_path, name):
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, f"{name}.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130 and text == "interrupted\n"
