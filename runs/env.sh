# The scripts beside this file source it, from the root of the repository. `use_environment FILE`
# sets $PYTHON to an interpreter whose packages satisfy the requirements FILE. By default that is
# .venv, which it makes and fills. Two variables change this:
#
#   VENV=/path/to/venv                    take this environment, say with PyTorch's CPU build; it
#                                         must satisfy FILE, and is not changed
#   NANOENCODER_PYTHON=/path/to/python    take this interpreter, whatever packages it has

satisfies() {   # PYTHON FILE: print each requirement that is missing; exit 0 if there is none
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
for requirement in map(Requirement, lines(sys.argv[1])):
    if requirement.marker and not requirement.marker.evaluate():
        continue      # it is for other machines
    try:
        installed = version(requirement.name)
        if installed not in requirement.specifier:
            missing.append(f"{requirement} (is {installed})")
    except PackageNotFoundError:
        missing.append(str(requirement))
sys.exit("\n".join(missing) or 0)
PY
}

use_environment() {   # FILE: set $PYTHON
  local venv=${VENV:-.venv} candidate missing
  if [ -n "${NANOENCODER_PYTHON:-}" ]; then
    PYTHON=$NANOENCODER_PYTHON
    return
  fi
  PYTHON=$venv/bin/python
  if [ -n "${VENV:-}" ]; then
    if [ ! -x "$PYTHON" ]; then
      echo "error: VENV=$VENV holds no bin/python" >&2
      exit 2
    fi
    if ! missing=$(satisfies "$PYTHON" "$1" 2>&1); then
      missing=$(echo "$missing" | tr '\n' ';')
      echo "error: VENV=$VENV lacks $missing install them with: $PYTHON -m pip install -r $1" >&2
      exit 2
    fi
    return
  fi

  # make .venv with the first Python that is new enough
  if [ ! -x "$PYTHON" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        break
      fi
      candidate=""
    done
    if [ -z "$candidate" ]; then
      echo "error: Python 3.11 or newer is needed and none is on the PATH" >&2
      exit 2
    fi
    echo "making .venv with $("$candidate" --version)"
    rm -rf .venv
    if ! "$candidate" -m venv .venv; then
      echo "error: could not make .venv (Debian and Ubuntu: apt install python3-venv)" >&2
      exit 1
    fi
  fi

  # fill it, or complete it
  if ! satisfies "$PYTHON" "$1" >/dev/null 2>&1; then
    echo "installing $1 into .venv (PyTorch is large: some minutes the first time)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
  fi
}
