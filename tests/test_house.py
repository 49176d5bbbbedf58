"""The house: arrows go down only, nothing is unpickled, the README's commands exist."""
import ast
import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, rows, run_python

import train
from reporting.read import read_run

PROGRAMS = ("train", "finetune", "eval_ir", "prepare_fineweb", "sample", "hf", "study", "report", "bench")
# what each folder, and each of the two files that are edited first, may import: {name: names}, and all that these may import
MAY_IMPORT = {
    "kernels": (),
    "model": ("kernels",),
    "core": ("model",),
    "objectives": ("core",),
    "corpus": ("core",),
    "tasks": ("core",),
    "huggingface": ("objectives",),
    "pretraining": ("objectives", "corpus", "huggingface"),
    "retrieval": ("tasks",),
    "experiments": ("pretraining", "tasks"),
    "reporting": ("experiments",),
    "benchmarks": ("reporting", "retrieval"),
}


def below(name):
    """Everything that a folder may import, by one step or several."""
    names = set(MAY_IMPORT[name])
    for other in MAY_IMPORT[name]:
        names |= below(other)
    return names


def sources():
    """The paths of the repository's Python files outside tests/ and config/."""
    for name in (*PROGRAMS, "model", "objectives"):
        yield os.path.join(ROOT, f"{name}.py")
    for folder in MAY_IMPORT:
        if os.path.isdir(os.path.join(ROOT, folder)):
            for name in sorted(os.listdir(os.path.join(ROOT, folder))):
                if name.endswith(".py"):
                    yield os.path.join(ROOT, folder, name)


def module_of(path):
    """core/files.py -> "core.files", core/__init__.py -> "core", train.py -> "train"."""
    name = os.path.relpath(path, ROOT).removesuffix(".py").replace(os.sep, ".")
    return name.removesuffix(".__init__")


def imports(path):
    """The modules a file imports, anywhere in it: "torch", "core.files", ..."""
    modules = {module_of(p) for p in sources()}
    package = module_of(path).partition(".")[0]
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level == 1:
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full in modules else base)
    return names


def test_imports_go_down_only():
    for path in sources():
        here = module_of(path).partition(".")[0]
        for name in imports(path):
            there = name.partition(".")[0]
            assert there not in PROGRAMS, f"{path} imports the program {there}"
            if there in MAY_IMPORT and there != here:
                assert here in PROGRAMS or there in below(here), f"{path}: {here} may not import {there}"
    assert {name.partition(".")[0] for name in imports(os.path.join(ROOT, "core", "configurator.py"))} <= set(sys.stdlib_module_names)


def test_no_program_imports_at_its_start_what_takes_long_and_only_some_runs_need():
    """torch._dynamo alone takes as long as the rest of torch."""
    code = "import sys, train, finetune, eval_ir, prepare_fineweb, sample, hf, study, report\n"
    code += "print(*{'torch._dynamo', 'sympy', 'datasets', 'transformers', 'pyarrow', 'wandb'} & sys.modules.keys())"
    done = run_python(["-c", code])
    assert (done.stdout, done.stderr) == ("\n", "")


def test_no_file_imports_itself_by_way_of_others():
    graph = {module_of(path): imports(path) for path in sources() if not path.endswith("__init__.py")}
    seen, on_the_way = set(), []

    def visit(name):
        assert name not in on_the_way, f"a circle of imports: {' -> '.join([*on_the_way, name])}"
        if name in seen or name not in graph:
            return
        on_the_way.append(name)
        for other in graph[name]:
            visit(other)
        on_the_way.pop()
        seen.add(name)
    for name in graph:
        visit(name)


def test_the_root_holds_what_one_runs_and_the_two_files_one_edits_first():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    at_root = {name for name in tracked if "/" not in name}
    documents = {"README.md", "LICENSE", "requirements.txt", "requirements-dev.txt", "ruff.toml", ".gitignore"}
    assert at_root - documents == {f"{name}.py" for name in (*PROGRAMS, "model", "objectives")}


@pytest.mark.parametrize("folder", [name for name in MAY_IMPORT if os.path.isdir(os.path.join(ROOT, name))])
def test_each_folder_says_what_its_files_are(folder):
    with open(os.path.join(ROOT, folder, "__init__.py"), encoding="utf-8") as f:
        docstring = ast.get_docstring(ast.parse(f.read()))
    for name in os.listdir(os.path.join(ROOT, folder)):
        if name.endswith(".py") and name != "__init__.py":
            assert re.search(rf"\b{name.removesuffix('.py')}\b", docstring), f"{folder}/__init__.py does not name {name}"


def test_nothing_is_ever_unpickled():
    for path in sources():
        assert not re.search(r"import pickle|pickle\.load|torch\.load\((?!path, map_location=.cpu., weights_only=True\))|allow_pickle|broadcast_object|all_gather_object", open(path).read()), path


def documents():
    """README.md and the pages of docs/ that describe the present; log.md is dated."""
    pages = [os.path.join(ROOT, "docs", name) for name in sorted(os.listdir(os.path.join(ROOT, "docs"))) if name != "log.md"]
    return [os.path.join(ROOT, "README.md"), *pages]


def settings_of(script, words):
    """The dataclass of settings that a command line is for."""
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "bench.py":
        return module.PARTS[words.split()[0]].settings
    return module.Config


@pytest.mark.parametrize("path", documents(), ids=os.path.basename)
def test_every_command_link_and_key_of_a_document_exists(path):
    with open(path, encoding="utf-8") as f:
        text = f.read()
    in_blocks = re.findall(r"^(?:torchrun .*?|python )(\w+\.py)(.*)$", text, re.M)
    in_lines = re.findall(r"`(?:torchrun [^`]*?|python )(\w+\.py)([^`]*)`", text.replace("\n", " "))
    for script, words in in_blocks + in_lines:
        keys = settings_of(script, words).__dataclass_fields__
        for file in re.findall(r"config/\w+\.py", words):
            assert os.path.isfile(os.path.join(ROOT, file)), file
        for key in re.findall(r"--(\w+)=", words.partition("#")[0]):
            assert key in keys, f"{script}: --{key}"
    for script in re.findall(r"bash (runs/\w+\.sh)", text):
        assert os.path.isfile(os.path.join(ROOT, script)), script
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert os.path.exists(os.path.join(os.path.dirname(path), link)), link


def test_the_readme_is_read_in_five_minutes_and_its_tree_names_every_program_and_folder():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read()
    assert len(text.splitlines()) <= 220 and len(text.split()) < 2000
    tree = text.partition("## The files")[2].partition("## ")[0]
    for name in [*(f"{program}.py" for program in PROGRAMS), "model.py", "objectives.py", *(f"{folder}/" for folder in MAY_IMPORT if folder not in ("model", "objectives"))]:
        assert name in tree, name


def test_the_report_shows_a_branch_from_step_0_and_reads_the_log(tiny, tmp_path):
    train.main(tiny("clm", phases=(("clm", 20),), eval_interval=5))
    train.main(tiny("mlm", phases=(("mlm", 20),), eval_interval=5))
    branch = tiny("both", branch_from=str(tmp_path / "clm" / "step_0000010"), phases=(("clm", 10), ("mlm", 10)), eval_interval=5)
    train.main(branch)
    done = run_python(["report.py", *(str(tmp_path / n) for n in ("clm", "mlm", "both")), f"--to={tmp_path}/out"])
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout
    last = rows(branch.out_dir, validation=True)[-1]
    assert f"| both | 10 clm, 10 mlm | 10,240 | {last['seconds']:,.0f} | {last['val_clm_loss']:.4f} | " in table
    assert (tmp_path / "out" / "loss_curves.png").read_bytes()[:4] == b"\x89PNG"
    both = read_run(branch.out_dir)
    assert [r["step"] for r in both["train"]] == list(range(1, 21)) and [r["step"] for r in both["validation"]] == [0, 5, 10, 15, 20]
    assert both["train"][:10] == rows(str(tmp_path / "clm"))[:10]


@pytest.mark.parametrize("words, says", [(["report.py"], "which runs?"), (["report.py", "nowhere"], "nowhere is not a run of train.py"),
                                         (["bench.py"], "what to measure?"), (["bench.py", "kernels", "--sizes=('2b',)", "--device=cpu"], "sizes="),
                                         (["bench.py", "data", "--data_dir=nowhere"], "no corpus in"),
                                         (["bench.py", "finetune", "--task=sotu_case"], "expected a sequence classification task"),
                                         (["bench.py", "search", "--queries=9"], "expected at least 100 each"),
                                         (["bench.py", "train", "--contestants=gpt5"], "expected some of ours,ours-clm"),
                                         (["bench.py", "train", "--contestants=nanogpt"], "none can be measured here: nanogpt: no --nanogpt=CLONE"),
                                         (["bench.py", "train", "--nanogpt=nowhere"], "--nanogpt=nowhere is not a clone of karpathy/nanoGPT"),
                                         (["bench.py", "memory", "--device=cpu"], "needs a limit, e.g. --memory_gib=2"),
                                         (["bench.py", "train", "--size=7b"], "size=7b"), (["bench.py", "steady", "--run_steps=150"], "run_steps=150"),
                                         (["bench.py", "ddp", "--run_steps=20"], "run_steps=20"),
                                         (["finetune.py"], "which encoder?"), (["eval_ir.py"], "which encoder?")])
def test_leaves_explain_a_wrong_call_in_one_line(words, says):
    done = run_python(words)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
