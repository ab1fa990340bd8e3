#!/usr/bin/env bash
# On a CUDA card, in under nine minutes: the tests marked gpu, then NF4 LoRA runs, resident and streamed, with speed and memory.
# The results are JSON, in $OUT_JSON or benchmarks/gpu_suite.json. Without a card it says so and ends well.
# EFFITRAIN_PYTHON names the Python to use; else it is the python3 at hand when effitrain and pytest work there, installed
# or from this folder; else that of an environment of its own. Arguments go to scripts/gpu_suite.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo "No CUDA card on this machine: the GPU suite has nothing to do."
    exit 0
fi

works() { "$1" -P -c "import effitrain.api, pytest" 2>/dev/null; }

python="${EFFITRAIN_PYTHON:-python3}"
source_path="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if works "$python"; then
    :
elif PYTHONPATH="$source_path" works "$python"; then
    export PYTHONPATH="$source_path"
elif [[ -n ${EFFITRAIN_PYTHON:-} ]]; then
    echo "$EFFITRAIN_PYTHON cannot import effitrain and pytest:" >&2
    PYTHONPATH="$source_path" "$python" -P -c "import effitrain.api, pytest"
else
    prepare_env test
    python=.venv/bin/python
fi
# -P keeps the folder of the script, and the root where kernels/ lies, off the import path.
exec "$python" -P scripts/gpu_suite.py "$@"
