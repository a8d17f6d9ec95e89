#!/usr/bin/env bash
# Trains the policy shipped with the package by GRPO on multi-digit arithmetic, on CPU, and shows before and after.
# Arguments are handed on: bash scripts/quickstart.sh --seed 1
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
exec "$PY" -m jaxrl_llm.cli quickstart "$@"
