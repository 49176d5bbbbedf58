#!/usr/bin/env bash
# Lint and test, from a bare machine; as many processes as cores share the tests. `bash runs/test.sh tests/test_data.py -k masks`
# hands its words to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh
use_environment requirements-dev.txt
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -q -n auto --dist worksteal "$@"
