#!/usr/bin/env bash
# Make .venv with everything that the Makefile's targets need. Called by `make setup`.
#
#   PYTHON  the interpreter to use (otherwise python3.12, python3 if it is 3.12 or later, or uv's)
#   TORCH   another torch build, as arguments of pip install: TORCH="torch==2.8.0 --index-url URL"
set -euo pipefail
cd "$(dirname "$0")/.."

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

make_venv() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3}; do
        if is_new_enough "$candidate"; then
            if "$candidate" -m venv .venv; then return; fi
            rm -rf .venv
            echo "$candidate cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)." >&2
        fi
    done
    if [ -z "${PYTHON:-}" ] && command -v uv >/dev/null 2>&1; then
        uv venv --seed --python 3.12 .venv
        return
    fi
    echo "No Python >= 3.12 found${PYTHON:+ at PYTHON=$PYTHON}: megatron-core 0.19 needs it." >&2
    echo "Install python3.12 (or uv, https://docs.astral.sh/uv), or give one: make setup PYTHON=/path/to/python3.12" >&2
    exit 1
}

if [ ! -x .venv/bin/python ] || ! is_new_enough .venv/bin/python; then
    rm -rf .venv
    make_venv
fi

constraints=constraints.txt
if [ -n "${TORCH:-}" ]; then
    # The build that the user names, and nothing later may replace it.
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install $TORCH
    constraints=.venv/constraints.txt
    grep -v '^torch==' constraints.txt > "$constraints"
    .venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >> "$constraints"
fi
echo "Installing megatron-muon and what it needs into .venv (the first time: some minutes, about 5 GB with CUDA torch) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable '.[dev]'
