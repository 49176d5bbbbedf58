"""Writing a report into its folder. A file that report.py did not write is never replaced."""
import io
import os
import warnings

import matplotlib.pyplot as plt

from core import files, lock
from core.configurator import UserError
from reporting.panels import fonts_for

# How report.py recognizes its own files: the first line of a page, the metadata of a picture, and
# the first row of a rows.jsonl
MARK = "<!-- written by nanoEncoder's report.py, which may write it again -->"
SOFTWARE = "nanoEncoder report.py"
FIRST_ROW = '{"what": "study"'
# these files have no such mark, or had none in earlier versions: a text in them tells
CONTENTS = {"loss_curves.png": "Matplotlib",
            "table.md": "| run | steps |",
            "trials.md": "| task | model |"}


def is_own_file(path):
    """True if report.py wrote this file, or if it is empty."""
    with open(path, "rb") as f:
        beginning = f.read(4096)
    marks = [MARK, SOFTWARE, FIRST_ROW]
    name = os.path.basename(path)
    if name in CONTENTS:
        marks.append(CONTENTS[name])
    return not beginning or any(mark.encode() in beginning for mark in marks)


def use_fonts(figures):
    """Let all text of some matplotlib figures have fonts for its characters, if there are any.

    Names may have characters that matplotlib's own font lacks. Prints a warning if no font has them.
    """
    texts = []
    for figure in figures:
        texts += figure.findobj(plt.Text)
    fonts, missing = fonts_for("".join("".join(text.get_text() for text in texts).split()))
    if fonts:
        for text in texts:
            text.set_fontfamily(["DejaVu Sans", *fonts])
    if missing:
        print(f"warning: no installed font has {missing}, so the pictures show boxes in their place; "
              "on Debian, apt install fonts-noto-cjk has most")


def write_report(folder, texts, figures):
    """Writes {name: text} and {name: matplotlib figure} into a folder, and closes the figures.

    Each file is complete or absent, also if the program is killed. Raises UserError, before
    anything is written, if a file of such a name exists that is not report.py's own.
    """
    os.makedirs(folder, exist_ok=True)
    for name in [*texts, *figures]:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not is_own_file(path):
            raise UserError(f"{path} was not written by report.py: choose another --to")
    with lock.hold(folder, "report.py"):
        files.remove_leftovers(folder, [*texts, *figures])
        for name, text in texts.items():
            files.write_whole(os.path.join(folder, name), text.encode())
        use_fonts(figures.values())
        for name, figure in figures.items():
            path = os.path.join(folder, name)
            picture = io.BytesIO()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                figure.savefig(picture, dpi=100, format="png", metadata={"Software": SOFTWARE})
            plt.close(figure)
            files.write_whole(path, picture.getvalue())
