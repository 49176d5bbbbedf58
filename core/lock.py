"""One writer per folder.

A program that writes a folder holds its `.lock` until it ends. The kernel frees the lock when the
process dies, however it dies, so nothing has to be cleaned up after a kill. Where several machines
share a folder and their kernels do not know of each other's locks, the holder's heartbeat speaks
for it: it touches the file every ten seconds, and a minute without a touch means that it is gone.
"""
import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time

from core.configurator import UserError

NAME = ".lock"
HEARTBEAT = 10.0      # seconds between two touches
STALE = 60.0          # seconds without one after which a holder on another machine is given up


def this_process():
    """What a lock or a claim is signed with.

    Two containers may have the same host name, and a process 7 each. The kernel's boot and the
    namespace of process ids tell them apart.
    """
    return {"host": socket.gethostname(), "pid": os.getpid(), "kernel": this_kernel()}


def this_kernel():
    """A name for our kernel and its namespace of process ids; "" where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            boot = f.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@contextlib.contextmanager
def hold(folder, program, name=NAME):
    """Hold a folder, which must exist and be ours to write, while the block runs.

    program: its name, for the message that others get. name: the lock's file, if several processes may
    write the folder, each under a lock of its own. Yields the open file of the lock; a child process that
    inherits it (subprocess's pass_fds) holds the folder, too. Raises UserError at once if another
    process holds it.
    """
    path = os.path.join(folder, name)
    file = open_lock(path)
    try:
        take(file, path, fcntl.LOCK_EX)
        sign(file, this_process() | {"program": program})
        stop = threading.Event()
        heart = threading.Thread(target=beat, args=(file, stop), daemon=True)
        heart.start()
        try:
            yield file
        finally:
            stop.set()
            heart.join()
            if read_owner(file).get("pid") == os.getpid():
                os.ftruncate(file.fileno(), 0)      # an empty lock: nobody holds it
    finally:
        file.close()


def take(file, path, kind):
    """Take an open lock, or only check that nobody holds it. Raises UserError if another process does.

    kind: fcntl.LOCK_EX to hold it, LOCK_SH to check, which any number of processes may do at a time
    """
    folder = os.path.dirname(path)
    owner = read_owner(file)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy(folder, owner)) from None
    except OSError as error:
        # Some network file systems have no such locks: then the heartbeat alone decides.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    # A holder that wrote nothing removes the lock with its folder: what we opened may be gone.
    if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
        raise UserError(busy(folder, owner))
    owner = read_owner(file)      # it may have changed before we got the lock
    if owner and owner.get("kernel") != this_kernel() and is_alive(path):
        raise UserError(busy(folder, owner))


def check_free(folder, name):
    """Raises UserError if another process holds the lock `name` of a folder."""
    path = os.path.join(folder, name)
    with open_lock(path) as file:
        take(file, path, fcntl.LOCK_SH)


@contextlib.contextmanager
def hold_new(folder, program, name=NAME):
    """Hold a folder as hold() does, and make it if it is missing.

    A folder made here is removed again if it is still empty at the end, e.g. after a wrong setting.
    """
    is_made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    with hold(folder, program, name) as file:
        try:
            yield file
        finally:
            if is_made and os.listdir(folder) == [name]:
                os.remove(os.path.join(folder, name))
                os.rmdir(folder)


def open_lock(path):
    """Open or make the file of a lock. Raises UserError if something else has its name."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise UserError(f"{path} is not a file of ours: move it away") from None
        raise
    file = os.fdopen(number, "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(number).st_mode) or not looks_like_a_lock(file):
        file.close()
        raise UserError(f"{path} is not a file of ours: move it away")
    return file


def looks_like_a_lock(file):
    """True if a file is empty, torn by a power cut (NULs), or begins as our locks do."""
    start = os.pread(file.fileno(), 100, 0)
    return start.strip(b"\0") == b"" or start.startswith(b'{"host"')


def read_owner(file):
    """The process that signed a lock, as a dict; {} if nobody did."""
    try:
        owner = json.loads(os.pread(file.fileno(), 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def sign(file, owner):
    os.ftruncate(file.fileno(), 0)
    os.pwrite(file.fileno(), json.dumps(owner).encode(), 0)


def beat(file, stop):
    """Touch a lock until `stop` is set."""
    while not stop.wait(HEARTBEAT):
        os.utime(file.fileno())


def busy(folder, owner):
    """The message to somebody who came second."""
    holder = "another process"
    if "pid" in owner:
        holder = f"{owner.get('program', 'a process')} (pid {owner['pid']} on {owner.get('host', '?')})"
    return f"{holder} is writing {folder}: wait for it or stop it, or choose another folder"


def is_alive(path):
    """True if the holder of a lock on another machine still touches it.

    Ages are differences of two times of the same file system, so no two clocks are compared.
    """
    age = age_of(path)
    if age > STALE:
        return False
    if age >= -HEARTBEAT:
        return True
    # Its time lies in the future: a clock was set back. Watch whether it changes.
    before = os.stat(path).st_mtime
    deadline = time.monotonic() + STALE
    while time.monotonic() < deadline:
        if os.stat(path).st_mtime != before:
            return True
        time.sleep(1.0)
    return False


def age_of(path):
    """Seconds since a file was last touched, by the clock of its file system."""
    probe = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    number = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        now = os.fstat(number).st_mtime
    finally:
        os.close(number)
        with contextlib.suppress(FileNotFoundError):      # the holder took it for a leftover
            os.unlink(probe)
    return now - os.stat(path).st_mtime
