"""The house: arrows go down only, nothing is unpickled, the README's commands exist."""
import ast
import os
import re

import pytest
from conftest import ROOT, rows, run_python

import report
import train

ENTRY_POINTS = {"prepare_fineweb", "train", "finetune", "eval_ir", "bench", "report", "hf", "sample", "study"}
LAYERS = ["configurator", "files", "recipes", "system", "draws", "objectives", "tokenizer", "hf_tokenizer", "data", "hub_corpus", "file_shards", "kernels", "model", "checkpoint", "hf_model", "hf_import", "lineage", "metrics", "search", "trials", "demo_tasks", "tasks",
          "encode", "families", "ir_data", "worker", "retriever", "hf_export", "jobs", "bench_summary", "bench_rows", "bench_data", "bench_kernels", "bench_finetune", "bench_search", "bench_train",
          "bench_runs", "bench_gpu", "bench_tables",
          "report_read", "report_scores", "report_tables", "report_stats", "report_figures", "entry"]   # low to high


def sources():
    for folder in (ROOT, os.path.join(ROOT, "kernels")):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".py"):
                yield os.path.join(folder, name)


def imports(path):
    tree, found = ast.parse(open(path).read()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_imports_go_down_only():
    ours = {os.path.basename(p)[:-3] for p in sources()} | {"kernels"}
    for path in sources():
        name = "kernels" if os.path.dirname(path) != ROOT else os.path.basename(path)[:-3]
        used = (imports(path) & ours) - {name}
        assert not used & ENTRY_POINTS, f"{path} imports an entry point"
        level = LAYERS.index("entry" if name in ENTRY_POINTS else name)
        assert all(LAYERS.index(u) < level for u in used), f"{path} imports {used}"
        assert name.startswith("report") or not any(u.startswith("report_") for u in used), f"{path} imports a part of the report"
    assert imports(os.path.join(ROOT, "configurator.py")) <= set(__import__("sys").stdlib_module_names)
    assert "data" not in imports(os.path.join(ROOT, "model.py"))


def test_nothing_is_ever_unpickled():
    for path in sources():
        assert not re.search(r"import pickle|pickle\.load|torch\.load\(|allow_pickle|broadcast_object|all_gather_object", open(path).read()), path


def test_every_python_command_of_the_readme_names_files_and_keys_that_exist():
    text = open(os.path.join(ROOT, "README.md")).read()
    commands = re.findall(r"^(?:torchrun .*?|python )(\w+\.py)(.*)$", text, re.M)
    assert len(commands) >= 8
    for script, words in commands:
        keys = {f for f in __import__(script[:-3]).Config.__dataclass_fields__}
        for file in re.findall(r"config/\w+\.py", words):
            assert os.path.isfile(os.path.join(ROOT, file)), file
        for key in re.findall(r"--(\w+)=", words.partition("#")[0]):
            assert key in keys, f"{script}: --{key}"
    for script in re.findall(r"bash (runs/\w+\.sh)", text):
        assert os.path.isfile(os.path.join(ROOT, script))


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
    both = report.read_run(branch.out_dir)
    assert [r["step"] for r in both["train"]] == list(range(1, 21)) and [r["step"] for r in both["validation"]] == [0, 5, 10, 15, 20]
    assert both["train"][:10] == rows(str(tmp_path / "clm"))[:10]


@pytest.mark.parametrize("words, says", [(["report.py"], "which runs?"), (["report.py", "nowhere"], "nowhere is no run of train.py"),
                                         (["bench.py"], "what to measure?"), (["bench.py", "kernels", "--sizes=('2b',)", "--device=cpu"], "sizes="),
                                         (["bench.py", "data", "--data_dir=nowhere"], "no corpus in"),
                                         (["bench.py", "finetune", "--task=sotu_case"], "expected a sequence classification task"),
                                         (["bench.py", "search", "--queries=9"], "expected at least 100 each"),
                                         (["bench.py", "train", "--contestants=gpt5"], "expected some of ours,ours-clm"),
                                         (["bench.py", "train", "--contestants=nanogpt"], "none can be measured here: nanogpt: no --nanogpt=CLONE"),
                                         (["bench.py", "memory", "--device=cpu"], "of which memory?"),
                                         (["bench.py", "train", "--size=7b"], "size=7b"), (["bench.py", "steady", "--run_steps=150"], "run_steps=150"),
                                         (["bench.py", "ddp", "--run_steps=20"], "run_steps=20"),
                                         (["finetune.py"], "which encoder?"), (["eval_ir.py"], "which encoder?")])
def test_leaves_explain_a_wrong_call_in_one_line(words, says):
    done = run_python(words)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
