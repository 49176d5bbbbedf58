"""A grid of fine-tuning trials as a queue of files, shared by any number of processes that see the same folder; and the
training of one trial, `fit`.

    FOLDER/trials/<task>/lr5e-05_sd0.json      the trial's row: it is done (or has failed, and says so)
    FOLDER/trials/<task>/lr5e-05_sd0.claim     somebody works on it; its modification time is a heartbeat

No server and no rendezvous: eight processes of torchrun, several shells, or the jobs of a Slurm array each take whatever
trial nobody has claimed, until all have a row. A claim is a file made with O_EXCL and a row appears by a rename, both of
which exactly one process can win, on local disks and on NFS. A killed worker costs the trial it was in: its claim goes stale
when its process is gone (same machine) or its heartbeat has stopped (another one), and the next worker takes it.
"""
import json
import os
import socket
import threading
import time

from tqdm import tqdm

from core.distributed import speaks
from core.files import unique, write_whole

HEARTBEAT, STALE = 10.0, 60.0      # seconds: a claim is touched, and a claim of another machine is given up


def path_of(folder, trial, ending="json"):
    """Where a trial {"task", "lr", "seed"} has its row ("json") or its claim ("claim")."""
    lr = f"{trial['lr']:.0e}"                           # 5e-05 as the paper's folders have it; 1.5e-05 needs its digits
    lr = lr if float(lr) == trial["lr"] else repr(trial["lr"])
    return os.path.join(folder, "trials", trial["task"], f"lr{lr}_sd{trial['seed']}.{ending}")


def claim(path):
    """True if this process has the claim now, and nobody else."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return steal(path) and claim(path)
    with os.fdopen(file, "w") as f:
        f.write(json.dumps(myself()))
    return True


def myself():
    return {"host": socket.gethostname(), "pid": os.getpid()}


def owner_of(path):
    """Who signed a claim; {} if its owner has just made it and not yet signed, None if there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.loads(f.read() or "{}")
    except (FileNotFoundError, ValueError):
        return None


def steal(path):
    """Remove the claim of a worker that is gone. True if it was removed, by us."""
    if not is_stale(path):
        return False
    aside = unique(path)
    try:
        os.rename(path, aside)     # of several thieves one succeeds; a later one may find a new, living claim in its hands
    except FileNotFoundError:
        return False
    if not is_stale(aside):
        try:
            os.link(aside, path)   # put it back as it was, unless a third has claimed the trial in this instant
        except FileExistsError:
            pass
        os.unlink(aside)
        return False
    os.unlink(aside)
    return True


def is_stale(path):
    owner = owner_of(path)
    if owner is None:
        return False
    if owner.get("host") == socket.gethostname():
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:                         # somebody else's process: alive
            pass
    try:
        return time.time() - os.stat(path).st_mtime > STALE
    except FileNotFoundError:
        return False


def keep_alive(path, stop):
    while not stop.wait(HEARTBEAT):
        try:
            os.utime(path)
        except FileNotFoundError:                       # taken for dead, and the trial by another
            return


def is_done(folder, trial):
    """Has it its row, and has every task in trial["also"], which are scored after the same training?"""
    return all(os.path.isfile(path_of(folder, trial | {"task": task})) for task in (trial["task"], *trial.get("also", ())))


def finish(path, row):
    """Write a row whole, unless one is there: the first stays."""
    mine = unique(path)
    write_whole(mine, json.dumps(row).encode())
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    os.unlink(mine)


def work(trials, folder, run, poll=2.0):
    """Run what nobody has run, until every trial of the list has a row. run(trial) -> row, a dict for JSON; rows of the
    tasks in trial["also"] are run's to finish before it returns.

    A worker that finds only claimed trials waits for them: their owners may be killed. The first row of a trial stays.
    -> how many trials this process ran
    """
    ran = 0
    with tqdm(total=len(trials), desc="trials", unit="trial", smoothing=0, disable=not speaks()) as bar:
        while True:
            open_trials = [t for t in trials if not is_done(folder, t)]
            bar.n = len(trials) - len(open_trials)
            bar.refresh()
            if not open_trials:
                return ran
            mine = next((t for t in open_trials if claim(path_of(folder, t, "claim"))), None)
            if mine is None:
                time.sleep(poll)
                continue
            claimed, stop = path_of(folder, mine, "claim"), threading.Event()
            heart = threading.Thread(target=keep_alive, args=(claimed, stop), daemon=True)
            heart.start()
            try:
                if not is_done(folder, mine):           # its owner may have finished it between the look and the claim
                    row = run(mine)
                    finish(path_of(folder, mine), row)
                    ran += 1
            finally:                                    # also when interrupted: the trial is anybody's again
                stop.set()
                heart.join()
                if owner_of(claimed) == myself():       # else we were taken for dead and it is another's
                    os.unlink(claimed)
