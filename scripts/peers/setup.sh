#!/usr/bin/env bash
# Builds the peers' environments and checkpoints in a folder outside the repository:
#   bash scripts/peers/setup.sh DIR        ->  DIR/trl, DIR/tunix, DIR/ckpt
# PYTHON names the interpreter (default python3.11, else python3). Safe to run again.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
[ $# -eq 1 ] || { echo "usage: bash $0 DIR" >&2; exit 2; }
mkdir -p -- "$1"
dir=$(cd -- "$1" && pwd -P)
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
unset PYTHONPATH PYTHONHOME

environment() { # name, then the groups of requirements, each installed in a call of its own
    local name=$1 group
    shift
    [ -f "$dir/$name/complete" ] && return
    echo "== $name"
    "$python" -m venv --clear "$dir/$name"
    for group in "$@"; do
        # shellcheck disable=SC2086 -- a group is a list of requirements
        "$dir/$name/bin/python" -m pip install -qq $group
    done
    touch "$dir/$name/complete"
}

# torch alone and first, pinned: what the others would choose may bring gigabytes of CUDA packages.
environment trl torch==2.13.0 \
    "torch==2.13.0 trl==1.16.0 transformers==5.23.0 tokenizers==0.23.3 datasets==5.2.0 accelerate==1.15.0 psutil"
environment tunix "google-tunix==0.1.7 jax==0.10.2 flax==0.12.8 transformers==5.12.1"

echo "== checkpoints"
BENCH_CKPT=$dir/ckpt "$dir/trl/bin/python" "$here/make_model.py"
printf "done: BENCH_CKPT=%q %q %q --size tiny --steps 12\n" "$dir/ckpt" "$dir/trl/bin/python" "$here/trl_grpo.py"
