"""Ctrl-C while a program still imports torch: one line instead of a traceback.

The programs import this module first. core.configurator.run takes over when main begins.
"""

import os
import signal
import sys


def end_at_once(_number, _frame):
    os.write(2, b"interrupted\n")
    os._exit(130)


# Only in the programs themselves: a test or a notebook that imports one keeps its own Ctrl-C.
program = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
is_ours = os.path.dirname(program) == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
