"""The arguments of report.py: which folders and files it was given, and what they hold."""
import os
from dataclasses import dataclass, field

from core.configurator import UserError
from reporting.read import StudyRecord, read_rows, read_run, read_study, read_trials
from reporting.scores import PaperResults


@dataclass
class Inputs:
    """Everything that one report is about."""
    runs: list = field(default_factory=list)        # as read.read_run returns them
    # also holds the trials that belong to no study
    study: StudyRecord = field(default_factory=StudyRecord)
    paper: PaperResults | None = None


def read_inputs(args):
    """Reads everything that the arguments name. Raises UserError.

    An argument is results/paper.csv, a rows.jsonl, a study's folder, or a folder with runs or
    trials.
    """
    inputs = Inputs()
    run_folders = []
    trials = {}         # {path: row}: a file counts once even if two arguments hold it
    for arg in args:
        if not os.path.exists(arg):
            arg = os.path.expanduser(arg)
        # a folder may have any name, "a.csv" too
        is_named_as_file = arg.endswith((".csv", ".jsonl")) and not os.path.isdir(arg)
        if is_named_as_file and not os.path.isfile(arg):
            raise UserError(f"{arg} is not a file")
        if is_named_as_file and arg.endswith(".csv"):
            inputs.paper = PaperResults(arg)
        elif is_named_as_file:
            inputs.study.add(read_rows(arg), arg)
        elif os.path.isfile(os.path.join(arg, "study.json")):
            inputs.study.add(read_study(arg), arg)
        else:
            trials_of_folder = read_trials(arg)
            has_log = os.path.isfile(os.path.join(arg, "log.jsonl"))
            rows_path = os.path.join(arg, "rows.jsonl")
            if os.path.isfile(rows_path) and not trials_of_folder and not has_log:
                # the folder of an earlier report
                inputs.study.add(read_rows(rows_path), arg)
            else:
                trials |= trials_of_folder
                # a folder with neither a log nor trials is refused as a run, in read_runs
                if has_log or not trials_of_folder:
                    run_folders.append(arg)
    inputs.study.trials += trials.values()
    inputs.runs = read_runs(run_folders, inputs.study.notes)
    # the log of a trunk is read again for each of its branches: keep each note once
    inputs.study.notes = list(dict.fromkeys(inputs.study.notes))
    return inputs


def read_runs(folders, notes):
    """The logs of these runs. Raises UserError for a run without a logged step or validation."""
    runs = [read_run(folder, notes) for folder in folders]
    for folder, run in zip(folders, runs):
        if not run["validation"] or not run["train"]:
            raise UserError(f"{folder} has no logged steps yet")
    return runs
