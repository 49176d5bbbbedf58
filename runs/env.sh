# Sourced by the scripts beside it, from the repository's root: `use_environment FILE` leaves in $PYTHON an interpreter
# whose packages satisfy the requirements FILE. Without VENV that is .venv, made and filled here; VENV=/path/to/venv takes
# one that satisfies them already (say, with PyTorch's CPU build) and changes nothing in it. NANOENCODER_PYTHON=/path/to/python is
# taken unchecked, for a machine whose packages are other versions.

satisfies() {   # PYTHON FILE: prints what is missing, one line each; nothing and exit 0 if all is there
  "$1" - "$2" <<'PY'
import os
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("packaging")

def lines(path):
    for line in open(path, encoding="utf-8"):
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from lines(os.path.join(os.path.dirname(path), line[3:].strip()))
        elif line:
            yield line

missing = []
for wanted in map(Requirement, lines(sys.argv[1])):
    if wanted.marker is None or wanted.marker.evaluate():
        try:
            if version(wanted.name) not in wanted.specifier:
                missing.append(f"{wanted} (is {version(wanted.name)})")
        except PackageNotFoundError:
            missing.append(str(wanted))
sys.exit("\n".join(missing) or 0)
PY
}

use_environment() {
  local venv=${VENV:-.venv} candidate missing
  if [ -n "${NANOENCODER_PYTHON:-}" ]; then
    PYTHON=$NANOENCODER_PYTHON
    return
  fi
  PYTHON=$venv/bin/python
  if [ -n "${VENV:-}" ]; then
    if [ ! -x "$PYTHON" ]; then echo "error: VENV=$VENV holds no bin/python" >&2; exit 2; fi
    if ! missing=$(satisfies "$PYTHON" "$1" 2>&1); then
      echo "error: VENV=$VENV lacks $(echo "$missing" | tr '\n' ';') install them with: $PYTHON -m pip install -r $1" >&2; exit 2
    fi
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
      candidate=""
    done
    if [ -z "$candidate" ]; then echo "error: Python 3.11 or newer is needed and none is on the PATH" >&2; exit 2; fi
    echo "making .venv with $("$candidate" --version)"
    rm -rf .venv
    if ! "$candidate" -m venv .venv; then echo "error: could not make .venv (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; fi
  fi
  if ! satisfies "$PYTHON" "$1" >/dev/null 2>&1; then
    echo "installing $1 into .venv (PyTorch is large: some minutes the first time)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
  fi
}
