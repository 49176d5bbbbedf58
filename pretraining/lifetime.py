"""The life of a run: the lock on its folder while it lives, and the signals that end it."""

import os
import signal
import sys
import threading

from core import lock
from core.configurator import UserError
from core.distributed import all_sum, wait_for_all
from core.files import OF_CHECKPOINTS, remove_leftovers
from pretraining import resume

# Ctrl-C; what Slurm, Kubernetes and a kill send; Slurm's warning; a terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

# The files of a run beside its checkpoints. write_whole() makes each under another name first.
OWN_FILES = ("config.json", "log.jsonl", "tokenizer.tiktoken", "tokenizer_info.json")


def stop_on_signals(at_exit):
    """Let STOP_SIGNALS finish the step, save and exit 0; a second Ctrl-C interrupts at once.

    -> a list that is empty until such a signal arrives. at_exit: the ExitStack that undoes all this.
    """
    signals = []

    def on_signal(number, _frame):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in STOP_SIGNALS:
        # nohup ignores SIGHUP, and a shell ignores Ctrl-C for what it runs in the background.
        if signal.getsignal(number) is not signal.SIG_IGN:
            at_exit.callback(signal.signal, number, signal.signal(number, on_signal))

    # A terminal and a job manager signal our children, too, and a compiler of torch.compile that dies
    # of it ends the training. Children inherit what this thread blocks. So it blocks these signals,
    # and a thread that only waits receives them for the process.
    is_over = threading.Event()
    threading.Thread(target=is_over.wait, daemon=True).start()
    at_exit.callback(is_over.set)
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    at_exit.callback(signal.pthread_sigmask, signal.SIG_SETMASK, old_mask)
    return signals


def hold_out_dir(out_dir, processes, at_exit):
    """Make out_dir and hold it until at_exit ends, so that no other training writes there.

    -> "", or why nobody can write there: a finished run may lie on a read-only disk
    Raises OSError if such a folder holds no run yet, and UserError if it holds something else than a
    run, or if another training holds it.
    """
    resume.check_out_dir(out_dir)
    error = None
    unwritable = ""
    if processes.is_first:
        try:
            at_exit.enter_context(lock.hold_new(out_dir, "train.py"))
            remove_leftovers(out_dir, OWN_FILES, OF_CHECKPOINTS)
        except UserError as user_error:
            error = user_error
        except OSError as os_error:
            if os.path.isfile(os.path.join(out_dir, "config.json")):
                unwritable = os_error.strerror or str(os_error)
            else:
                error = os_error
    # The other ranks hear how the first one fared. One on each machine has verified the corpus until
    # now, which may take longer than --timeout.
    wait_for_all(processes)
    n_refused, n_unwritable = all_sum([error is not None, unwritable != ""], processes)
    if error:
        raise error
    if n_refused:
        sys.exit(2)
    if n_unwritable:
        return unwritable or "by the first process"
    return ""
