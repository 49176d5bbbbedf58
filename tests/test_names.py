"""A name is shown as it is, whatever it means to Markdown or matplotlib, and the environment does not decide whether there is a report."""
import json
import os
import re
import shutil
import sys
import warnings

import made_study as made
import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, run_python
from made_study import draw
from matplotlib import font_manager

from core import checkpoint
from core.configurator import UserError
from core.files import as_code, as_markdown, printable
from huggingface.history import check_history
from huggingface.model_card import model_card
from reporting import output, panels
from reporting.loss_curves import loss_curves
from reporting.output import write_report
from reporting.read import read_run
from tasks import worker

RUN = os.path.join(ROOT, "tests", "data", "old", "run")
ODD = ["$\\frac$", "$", "_a", "__init__", "a_", "a|b", "a\\|b", "*b*", "`c`", "<b>", "a\nb", "\x1b[31m", "\udcff", "模型", "🙂", "^{", "\\", "#", "a$b$c", " ", "[a](b)", "![a](b)", "~~a~~", "&lt;", "a ]( b"]


def shown(markdown):
    """What Markdown without any markup shows: backslashes before punctuation are gone. A bar or a line feed would end a table's cell."""
    assert not re.search(r"(?<!\\)(\\\\)*\|", markdown) and "\n" not in markdown
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)


@pytest.mark.parametrize("name", ODD)
def test_a_name_in_markdown_is_shown_as_it_is(name):
    text = as_markdown(name)
    assert shown(text) == printable(name) and printable(text).encode() and len(printable(name).splitlines()) == 1
    assert not re.search(r"(?<!\\)([$`*<~]|\]\(|&lt;)|(?<![\w\\])_|(?<!\\)_(?!\w)", text.replace("\\\\", "")), text


@pytest.mark.parametrize("name", ["610m-clm-42k", "uner_en_ewt", "lr [5e-4]", "run 1 (copy)", "Ümläut", "a.b-c+d=e,f"])
def test_usual_names_stay_as_they_are(name):
    assert as_markdown(name) == name


def test_every_text_of_a_study_survives_odd_names(tmp_path, monkeypatch):
    """Tasks, baselines and the plan may have any name: no cell breaks, and each figure can be drawn."""
    tasks = {name: "sequence" for name in ("$\\frac$", "a|b", "_a_", "模型")}
    monkeypatch.setattr(made, "TASKS", tasks)
    root = made.write(str(tmp_path / "s"), names=[*made.BOTH, "610m-clm-10k-mlm40-42k"], tasks=tuple(tasks), lrs=(2e-5, 5e-5), seeds=(0, 1), plan="$\\x$")
    for name in os.listdir(f"{root}/{made.folder_of('610m-clm-42k')}/trials"):
        path = f"{root}/{made.folder_of('610m-clm-42k')}/trials/{name}/lr5e-05_sd0.json"
        made.dump(path, json.load(open(path)) | {"baseline": {"name": "$|_x", "score": 0.99}})
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *_, **__: (figures.append(figure), figure.canvas.draw()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import report
        report.main(report.Config((root,), f"{root}/report"))
    assert len(figures) >= 3
    page = open(f"{root}/report/report.md", encoding="utf-8").read()
    assert "\\$\\\\frac\\$" in page and "a\\|b" in page and "\\_a\\_" in page and "# Report: plan \\$\\\\x\\$\n" in page
    assert not re.search(r"(?<!\\)\$", page)
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.M)
    assert len(blocks) > 4
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in block.splitlines()}) == 1, block


def test_characters_that_no_font_has_are_one_line(tmp_path, monkeypatch, capfd):
    """matplotlib's own fonts have no Chinese; one of them has a box for every character there is."""
    fonts = font_manager.fontManager.ttflist
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in fonts if font.fname.startswith(matplotlib.get_data_path())])
    folder = str(tmp_path / "模型")
    shutil.copytree(RUN, folder)
    write_report(str(tmp_path / "out"), {}, {"loss_curves.png": loss_curves([read_run(folder)])})
    assert capfd.readouterr() == ("warning: no installed font has 型模, so the pictures show boxes in their place; on Debian, apt install fonts-noto-cjk has most\n", "")
    # where a font has them it is used, for these texts alone
    monkeypatch.setattr(output, "fonts_for", lambda _: (["DejaVu Serif"], ""))
    figure = loss_curves([read_run(folder)])
    write_report(str(tmp_path / "out2"), {}, {"loss_curves.png": figure})
    assert {tuple(text.get_fontfamily()) for text in figure.findobj(plt.Text)} == {("DejaVu Sans", "DejaVu Serif")}
    assert panels.fonts_for("usual names, 1.5e-3 ± ½ †") == ([], "")


@pytest.mark.parametrize("name", [name for name in ODD if name.strip()])
def test_a_model_card_shows_names_as_they_are(name):
    with open(f"{RUN}/step_0000010/state.json") as f:
        state = json.load(f)
    config = checkpoint.config_of(f"{RUN}/step_0000010")
    state["settings"]["init_from"] = f"/home/me/{name.replace('/', '')}/step_0000010"
    tuned = {"settings": {}, "step": 8, "parent": state, "imported": {"source": f"hf:a/{name}", "revision": None},
             "fine_tuned": {"model": name, "task": name, "mode": "standard", "steps": 8, "lr": 1e-3, "seed": 0, "test": {"score": 0.5}}}
    about = {"architectures": ["EuroBertModel"], "model_type": "eurobert"}
    card = model_card(f"/x/{name}/step_0000008", ["/x"], tuned, about, config, 1000)
    _, top, text = card.encode().decode().split("---\n", 2)
    assert len(top.splitlines()) == 4 and f"# {as_markdown(name)} on {as_markdown(name)}\n" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) == 3 for line in table)
    assert f"| fine-tuned on | {as_markdown(name)}: 8 steps" in text and f"from {as_code(f'{name}/step_0000008')};" in text


@pytest.mark.parametrize("changes, says", [
    ({"parent": "run"}, "'parent' is \"run\", not an object"), ({"parent": {"settings": 1}}, "'settings' is 1"), ({"settings": {"phases": []}, "totals": 3}, "'totals' is 3"),
    ({"fine_tuned": []}, "is a list"), ({"fine_tuned": {"model": "a"}}, "has no 'task'"), ({"imported": {"source": 3, "revision": None}}, "'source' is 3"),
    ({"settings": {"phases": [["clm"]]}}, "has ['clm'], not [objective, steps]"), ({"settings": {"phases": []}}, "is empty"), ({"settings": {"seed": "x"}}, "'settings.seed' is"),
    ({"objectives": {"mlm": {"is_causal": False, "hides_tokens": True, "rate": None}}}, "'objectives' lacks clm")])
def test_a_history_that_cannot_be_read_is_one_line(changes, says):
    with open(f"{RUN}/step_0000010/state.json") as f:
        state = json.load(f)
    check_history(state, "state.json")
    changed = state | changes
    if "settings" in changes:
        changed["settings"] = state["settings"] | changes["settings"]
    for whole in (changed, {"settings": {}, "parent": changed}):
        with pytest.raises(UserError, match=f"^state.json: .*{re.escape(says)}"):
            check_history(whole, "state.json")


@pytest.mark.parametrize("environment", [
    {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"},
    {"MPLBACKEND": "nonsense", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_report_is_written_whatever_the_console_the_display_and_a_users_style(tmp_path, environment):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: Nonexistent\nsavefig.transparent: True\n")
    folder = str(tmp_path / "模型 ü")
    shutil.copytree(os.path.join(ROOT, "tests", "data", "old"), folder)
    done = run_python(["report.py", f"{folder}/run", f"{folder}/grid", f"--to={tmp_path}/out"], env=environment | {"MATPLOTLIBRC": str(tmp_path)})
    assert done.returncode == 0 and done.stderr == "" and f"the report is in {tmp_path}/out: table.md, trials.md, rows.jsonl, loss_curves.png\n" in done.stdout
    assert "rule paper: test" in done.stdout and {"table.md", "trials.md", "loss_curves.png", "rows.jsonl"} <= set(os.listdir(tmp_path / "out"))


def test_a_folder_whose_name_is_not_utf8_has_a_report(tmp_path):
    if sys.platform != "linux":
        pytest.skip("other systems refuse such a name")
    folder = os.path.join(str(tmp_path), "run\udcff")
    shutil.copytree(RUN, folder)
    draw(folder, to=f"{tmp_path}/out")
    assert "| run\\\\udcff | 10 clm, 10 mlm |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("text, device", [("0", "cuda:0"), ("5", "cuda:1"), (None, "cuda:0"), ("", None), ("x", None), ("-1", None)])
def test_a_local_rank_that_is_no_number_is_one_line(monkeypatch, text, device):
    monkeypatch.setattr(worker, "pick_device", lambda name: "cuda")
    monkeypatch.setattr(worker.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(worker.torch.cuda, "set_device", lambda name: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if text is not None:
        monkeypatch.setenv("LOCAL_RANK", text)
    if device:
        assert worker.local_device("auto") == device
    else:
        with pytest.raises(UserError, match=f"LOCAL_RANK='{text}' is not a number: start with torchrun, or unset it"):
            worker.local_device("auto")
