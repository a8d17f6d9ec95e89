#!/usr/bin/env bash
# Runs the tests; arguments are handed on to pytest, paths are relative to the repository's root:
# bash scripts/test.sh tests/laws -k grpo
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

# Compiled programs are kept between runs. The size limit also makes JAX lock the folder: the workers share it.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.2}
export JAX_COMPILATION_CACHE_MAX_SIZE=${JAX_COMPILATION_CACHE_MAX_SIZE:-2000000000}

workers=(-n 2)
for argument in "$@"; do
    case $argument in
        # A choice of one's own, or something that xdist cannot do.
        -n* | --numprocesses* | --pdb | --trace | no:xdist | -pno:xdist) workers=() ;;
    esac
done
exec "$PY" -m pytest ${workers[@]+"${workers[@]}"} "$@"
