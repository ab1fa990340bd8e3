#!/usr/bin/env bash
# Style, types and tests in an environment of its own. Arguments go to pytest: scripts/test.sh tests/io -k nf4
# Tests on real data need EFFITRAIN_DATA, the folder that holds it; without it they are skipped and say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
trap 'echo "scripts/test.sh took $SECONDS s."' EXIT
prepare_env test
export OMP_NUM_THREADS=1 # threads of two workers on shared cores cost more than they bring

# -P keeps the root of the repository, where kernels/ lies, off the import path.
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
# Triton either interprets its kernels or compiles them, whichever a process began with: hence three.
.venv/bin/python -P -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not interpreter" --ignore=tests/aot "$@"
if [[ $# == 0 ]]; then
    TRITON_INTERPRET=1 .venv/bin/python -P -m pytest -n 2 -m "interpreter and not slow" tests/kernels
    .venv/bin/python -P -m pytest -n 2 -m "not slow" tests/aot
fi
