"""A grid of trials as a queue of files, shared by any number of processes that see the same folder.

    FOLDER/trials/<task>/lr5e-05_sd0.json     the trial's row: the trial is done, or has failed
    FOLDER/trials/<task>/lr5e-05_sd0.claim    a worker is running it; touched as a heartbeat

There is no server. Eight processes of torchrun, several shells, or the jobs of a Slurm array each
take a trial that nobody has claimed, until all have a row. A claim is a file made with O_EXCL, and
a row appears by a hard link: exactly one process can succeed, on local disks and on NFS. A killed
worker costs only the trial it was in. Its claim is stale when its process is gone (same machine) or
its heartbeat has stopped (another machine, or a claim that cannot be read), and the next worker
takes it.
"""
import contextlib
import json
import os
import threading
import time

from tqdm import tqdm

from core.distributed import shows_progress
from core.files import unique, write_whole
from core.lock import age_of, this_kernel, this_process

HEARTBEAT = 10.0      # seconds between two touches of a claim
STALE = 60.0          # seconds without a touch after which a claim is stale

# Since when a claim has not been touched, as far as this process knows: {(device, inode, time of the
# touch): a time of our own clock}. A claim that is renamed stays known, a touch makes it another one.
silent_since = {}


def path_of(folder, trial, ending="json"):
    """The path of a trial's row ("json"), claim ("claim") or other file. trial: {"task", "lr",
    "seed"}."""
    lr = f"{trial['lr']:.0e}"             # 5e-05, as in the names of the paper's folders
    if float(lr) != trial["lr"]:
        lr = repr(trial["lr"])            # 1.5e-05 needs more digits
    return os.path.join(folder, "trials", trial["task"], f"lr{lr}_sd{trial['seed']}.{ending}")


def work(trials, folder, run, poll=2.0):
    """Run the trials that nobody has run, until every trial of the list has a row.

    run(trial) returns the trial's row, a dict for JSON. If trial["also"] names more tasks, run
    writes their rows itself. A worker that finds only claimed trials waits for them, since their
    owners may be killed. poll: seconds between two looks. Returns how many trials this process ran.
    """
    n_run = 0
    with tqdm(total=len(trials), desc="trials", unit="trial", smoothing=0,
              disable=not shows_progress()) as bar:
        while True:
            open_trials = [trial for trial in trials if not is_done(folder, trial)]
            bar.n = len(trials) - len(open_trials)
            bar.refresh()
            if not open_trials:
                return n_run
            trial = claim_one(open_trials, folder)
            if trial is None:
                time.sleep(poll)
                continue
            with heartbeat(path_of(folder, trial, "claim")):
                # an earlier owner may have finished the trial after open_trials was made
                if not is_done(folder, trial):
                    finish(path_of(folder, trial), run(trial))
                    n_run += 1


def claim_one(trials, folder):
    """Claim the first of these trials that is free, and return it; None if there is none."""
    for trial in trials:
        if claim(path_of(folder, trial, "claim")):
            return trial
    return None


def is_done(folder, trial):
    """True if this trial, and every task scored with it (trial["also"]), already has a row."""
    tasks = [trial["task"], *trial.get("also", ())]
    return all(os.path.isfile(path_of(folder, trial | {"task": task})) for task in tasks)


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
        with open(path, encoding="utf-8") as f:
            owner = json.loads(f.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


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
        try:
            os.utime(path)
        except FileNotFoundError:         # another worker took this one for dead, and its trial
            return


def is_stale(path):
    """True if the worker that made a claim is gone."""
    # On this machine its process id tells. Two containers may have one host name, and each a
    # process 7; the kernel's name tells them apart.
    owner = owner_of(path)
    pid = owner.get("pid")
    if owner.get("kernel") == this_kernel() and type(pid) is int and pid > 0:
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:           # it is alive, and another user's
            pass

    # Elsewhere its heartbeat tells: how old the last touch was, by the file system's clock, when we
    # first saw it, and how long we have seen no other. A claim dated in the future counts as new.
    try:
        status = os.stat(path)
        touch = status.st_dev, status.st_ino, status.st_mtime_ns
        if touch not in silent_since:
            silent_since[touch] = time.monotonic() - max(0.0, age_of(path))
    except FileNotFoundError:
        return False
    return time.monotonic() - silent_since[touch] > STALE


def remove_stale(path):
    """Remove a claim if its worker is gone. True if this process removed it."""
    if not is_stale(path):
        return False
    # Several workers may try this at once, but only one can rename the file. A slow one may rename
    # a fresh claim that has replaced the stale one since it looked. Then it puts the claim back,
    # unless a third worker has claimed the trial in the meantime.
    aside = unique(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    was_stale = is_stale(aside)
    if not was_stale:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    os.unlink(aside)
    return was_stale
