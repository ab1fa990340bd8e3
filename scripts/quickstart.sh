#!/usr/bin/env bash
# The two-minute demonstration: trains the built-in tiny model on the built-in data, in an environment of its own.
# Arguments go to `effitrain run`: scripts/quickstart.sh --max-steps 20 -o my-run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
prepare_env
.venv/bin/effitrain run -o "outputs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
