# Sourced by quickstart.sh and test.sh: leaves the shell in the repository's root with $PY set to the Python of a .venv
# that holds exactly requirements.lock and this package (editable). Installs only when something changed since the last
# complete installation, so every later call works without network.
#
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of python3.11, 3.12, 3.13, python3 that is >= 3.11.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
# What a user's shell adds to Python must not shadow the pinned packages.
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 PIP_NO_INPUT=1
PY=$root/.venv/bin/python
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Every XLA program maps its temporaries anew; with huge pages that costs hundreds of page faults instead of 100,000s.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# A command may exist and still not run (version managers leave such shims), so each candidate is tried.
_runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

_pick_python() {
    if [ -n "${PYTHON:-}" ]; then
        _runs "$PYTHON" && { printf '%s\n' "$PYTHON"; return; }
        echo "error: PYTHON=$PYTHON is not a working Python >= 3.11" >&2
        return 1
    fi
    local name
    for name in python3.11 python3.12 python3.13 python3 python; do
        _runs "$name" && { printf '%s\n' "$name"; return; }
    done
    echo "error: no Python >= 3.11 found (tried python3.11, python3.12, python3.13, python3, python)." >&2
    echo "Install one, or name one: PYTHON=/path/to/python bash scripts/quickstart.sh" >&2
    return 1
}

_version() { "$1" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null; }

# Everything a complete installation depends on. The path is part of it: a copied or moved .venv points at its old place.
_wanted() {
    "$PY" - <<'EOF' 2>/dev/null
import hashlib, pathlib, sys
root = pathlib.Path.cwd()
digest = hashlib.sha256(repr((str(root), sys.version, sys.prefix)).encode())
for name in ("requirements.lock", "pyproject.toml"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
EOF
}

_is_complete() {
    [ -x "$PY" ] && [ -f .venv/complete ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(_version "$PYTHON")" = "$(_version "$PY")" ] || return 1
    local wanted
    wanted=$(_wanted) && [ -n "$wanted" ] && [ "$wanted" = "$(cat .venv/complete)" ]
}

_install() {
    local python
    python=$(_pick_python) || return 1
    echo "Installing into $root/.venv with $python ($(_version "$python")); this happens once and takes a few minutes." >&2
    # From scratch: what an interrupted installation left behind cannot be trusted.
    rm -rf .venv
    "$python" -m venv .venv || {
        echo "error: '$python -m venv' failed; on Debian and Ubuntu install the python3-venv package." >&2
        return 1
    }
    "$PY" -m pip install -qq -r requirements.lock || {
        echo "error: could not install requirements.lock (is there a network?); run the script again to retry." >&2
        return 1
    }
    "$PY" -m pip install -qq --no-deps --no-build-isolation --editable . || return 1
    # Written last, and moved into place whole: its presence means that everything before it succeeded.
    _wanted >.venv/complete.part && mv .venv/complete.part .venv/complete
}

if ! _is_complete; then
    (
        # Two scripts started together: the second waits, then finds the work done.
        if command -v flock >/dev/null 2>&1; then flock 9; fi
        _is_complete || _install
    ) 9>.venv.lock || exit 1
fi
