"""Files and folders under names that users choose: such a name is never a pattern, nor markup."""
import glob
import os


def find_files(folder, pattern):
    """The sorted paths of all files and folders in `folder` that match a pattern like "step_*" or "**/*.parquet".

    Only `pattern` is a pattern. The folder's own name is taken literally, so a run may be called "lr [5e-4]" or "what?".
    No other file of this repository imports the glob module, so that no user's path becomes part of a pattern.
    """
    names = glob.glob(pattern, root_dir=folder, recursive=True)
    return [os.path.join(folder, name) for name in sorted(names)]


def table_cell(name):
    """A name as it stands in a Markdown table, whose columns end at a bar: folders may have one in their names."""
    return name.replace("|", "\\|")
