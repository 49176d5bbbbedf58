"""A grid of trials as a queue of files, shared by any number of processes that see the same folder.

    FOLDER/trials/<task>/lr5e-05_sd0.json     the trial's row: the trial is done, or has failed
    FOLDER/trials/<task>/lr5e-05_sd0.claim    a worker is running it; touched as a heartbeat

There is no server. Eight processes of torchrun, several shells, or the jobs of a Slurm array each
take a trial that nobody has claimed, until all have a row. A claim is a file made with O_EXCL, and
a row appears by a hard link: exactly one process can succeed, on local disks and on NFS. A killed
worker costs only the trial it was in. Its claim is stale when its process is gone (same machine) or
its heartbeat has stopped (another machine, or a claim that cannot be read), and the next worker
takes it. A row that is damaged, by a power cut for example, is renamed, and its trial runs again.
"""
import contextlib
import json
import os
import re
import sys
import threading
import time

from tqdm import tqdm

from core.configurator import UserError
from core.distributed import shows_progress
from core.files import check_regular, unique, write_whole
from core.lock import age_of, this_kernel, this_process
from core.schema import read_json

HEARTBEAT = 10.0      # seconds between two touches of a claim
STALE = 60.0          # seconds without a touch after which a claim is stale
ANY_ROW = {}          # the shape of any object, see core/schema.py

# What a killed process leaves in a folder of trials: files under a name of its own, see unique(),
# write_whole() and age_of().
LEFTOVER = re.compile(r"(lr.+_sd\d+|settings)\.(json|npz|claim)(\..+)?\.\d+(-[0-9a-f]{8}(\.tmp)?)?")

# Since when a claim has not been touched, as far as this process knows: {(device, inode, time of the
# touch): a time of our own clock}. A renamed claim keeps its entry; a touched one gets a new entry.
silent_since = {}


def path_of(folder, trial, ending="json"):
    """The path of a trial's row ("json"), claim ("claim") or other file. trial: {"task", "lr",
    "seed"}."""
    lr = f"{trial['lr']:.0e}"             # 5e-05, as in the names of the paper's folders
    if float(lr) != trial["lr"]:
        lr = repr(trial["lr"])            # 1.5e-05 needs more digits
    return os.path.join(folder, "trials", trial["task"], f"lr{lr}_sd{trial['seed']}.{ending}")


def work(trials, folder, run, poll=2.0, shape=ANY_ROW):
    """Run the trials that nobody has run, until every trial of the list has a row.

    run(trial) returns the trial's row, a dict for JSON. If trial["also"] names more tasks, run
    writes their rows itself. A worker that finds only claimed trials waits for them, since their
    owners may be killed. poll: seconds between two looks. shape: of a row, for read_json(). Returns
    how many trials this process ran.
    """
    for task in {task for trial in trials for task in tasks_of(trial)}:
        remove_leftovers(os.path.join(folder, "trials", task))
    n_run = 0
    open_trials = trials
    with tqdm(total=len(trials), desc="trials", unit="trial", smoothing=0,
              disable=not shows_progress()) as bar:
        while True:
            open_trials = [trial for trial in open_trials if not is_done(folder, trial, shape)]
            bar.n = len(trials) - len(open_trials)
            bar.refresh()
            if not open_trials:
                if n_run == 0 and shows_progress():
                    print(f"{folder}: every trial has its row already, so no data is read and nothing is run",
                          file=sys.stderr)
                return n_run
            trial = claim_one(open_trials, folder)
            if trial is None:
                time.sleep(poll)
                continue
            with heartbeat(path_of(folder, trial, "claim")):
                # an earlier owner may have finished the trial after open_trials was made
                if not is_done(folder, trial, shape):
                    set_aside_damaged(folder, trial, shape)
                    finish(path_of(folder, trial), run(trial))
                    n_run += 1


def claim_one(trials, folder):
    """Claim the first of these trials that is free, and return it; None if there is none."""
    for trial in trials:
        if claim(path_of(folder, trial, "claim")):
            return trial
    return None


# ---- rows

def tasks_of(trial):
    """The names of the tasks that a trial writes a row for."""
    return [trial["task"], *trial.get("also", ())]


def is_done(folder, trial, shape=ANY_ROW):
    """True if this trial, and every task scored with it (trial["also"]), already has an intact row."""
    for task in tasks_of(trial):
        try:
            if read_row(folder, trial | {"task": task}, shape) is None:
                return False
        except UserError:
            return False
    return True


def read_row(folder, trial, shape=ANY_ROW):
    """The row of a trial; None if there is none. Raises UserError if it is damaged."""
    path = path_of(folder, trial)
    check_regular(path)
    try:
        row = read_json(path, shape)
    except FileNotFoundError:
        return None
    for key in ("lr", "seed"):
        if row.get(key, trial[key]) != trial[key]:
            raise UserError(f"{path} is the row of another trial: '{key}' is {row[key]}")
    return row


def set_aside_damaged(folder, trial, shape):
    """Rename the rows of a trial that are damaged, and say so. The trial must be ours to run."""
    for task in tasks_of(trial):
        try:
            read_row(folder, trial | {"task": task}, shape)
        except UserError as error:
            for ending in ("npz", "json"):      # the scores of its examples go with it
                path = path_of(folder, trial | {"task": task}, ending)
                aside = f"{path}.damaged"
                while os.path.lexists(aside):
                    aside += "_"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path, aside)
            tqdm.write(f"{error}; it is kept as {os.path.basename(aside)}, and the trial runs again")


def remove_leftovers(folder):
    """Remove what killed processes left in a folder of trials: stale claims, and unfinished files."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".claim"):
            remove_stale(path)
        elif LEFTOVER.fullmatch(name):
            # Another worker may have removed it before us.
            with contextlib.suppress(FileNotFoundError):
                if age_of(path) > STALE:
                    os.unlink(path)


def finish(path, row):
    """Write a row, complete or not at all. If the file exists, it stays unchanged."""
    temporary = unique(path)
    write_whole(temporary, json.dumps(row).encode())
    try:
        os.link(temporary, path)          # a rename would replace an existing row
    except FileExistsError:
        pass
    except OSError:
        # A file system without hard links (exFAT, SMB). If another worker writes this trial's row
        # between these two lines, the later of two complete rows stays.
        if not os.path.exists(path):
            os.rename(temporary, path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)


# ---- claims

def claim(path):
    """Try to claim a trial. True if this process, and no other, has the claim now."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return remove_stale(path) and claim(path)
    with os.fdopen(file, "w") as f:
        f.write(json.dumps(this_process()))
    return True


def owner_of(path):
    """The process that holds a claim; {} if it has not signed yet, or its signature is damaged."""
    try:
        return read_json(path, {"pid": int, "kernel?": str})
    except (OSError, UserError):
        return {}


@contextlib.contextmanager
def heartbeat(path):
    """Touches a claim while the block runs, and removes it at the end, also when interrupted."""
    stop = threading.Event()
    thread = threading.Thread(target=touch_until, args=(stop, path), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        # If this process was suspended for long, another worker may have taken the claim over. Then
        # that worker removes it.
        if owner_of(path) == this_process():
            os.unlink(path)


def touch_until(stop, path):
    """Touch a file every HEARTBEAT seconds until the event `stop`."""
    while not stop.wait(HEARTBEAT):
        # Another worker may have taken this one for dead, or looks at its claim under another name.
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)


def is_stale(path):
    """True if the worker that made a claim is gone."""
    # On this machine its process id tells. Two containers may have one host name, and each a
    # process 7; the kernel's name tells them apart.
    owner = owner_of(path)
    if owner.get("kernel") == this_kernel() and owner["pid"] > 0:
        try:
            os.kill(owner["pid"], 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:           # it is alive, and another user's
            pass

    # Elsewhere its heartbeat tells. The age of the last touch is its age when we first saw it, by the
    # file system's clock, plus the time since then by ours. A touch dated in the future counts as new.
    try:
        status = os.stat(path)
        touch = status.st_dev, status.st_ino, status.st_mtime_ns
        if touch not in silent_since:
            silent_since[touch] = time.monotonic() - max(0.0, age_of(path))
    except FileNotFoundError:
        return False
    return time.monotonic() - silent_since[touch] > STALE


def remove_stale(path):
    """Remove a claim if its worker is gone. True if this process removed it.

    Raises UserError for a folder or a pipe by this name, which no worker has made.
    """
    check_regular(path)
    if not is_stale(path):
        return False
    # Several workers may try this at once, but only one can rename the file.
    aside = unique(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    was_stale = is_stale(aside)
    if not was_stale:
        put_back(aside, path)
    os.unlink(aside)
    return was_stale


def put_back(aside, path):
    """Restore the claim of a living worker that a slow remove_stale() has renamed.

    That claim had replaced the stale one in the meantime. If yet another worker has claimed the trial
    by now, its claim stays.
    """
    with open(aside, "rb") as f:
        signature = f.read()
    with contextlib.suppress(FileExistsError), open(path, "xb") as f:
        f.write(signature)
