#!/usr/bin/env bash
# Make .venv with shardkit (editable) and everything that its tests need, in the versions of constraints.txt.
# Nothing happens when it is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/packages.sh

stamp=.venv/.up-to-date
if [[ -e $stamp && $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]]; then
    exit 0
fi

find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

python=$(find_python)
if [[ -z $python ]]; then
    install_packages python3 python3-venv || true
    python=$(find_python)
fi
if [[ -z $python ]]; then
    fail "shardkit needs Python 3.11 or later, and none was found" "install it, or set PYTHON to its path"
fi

if [[ ! -x .venv/bin/python ]]; then
    echo "making .venv with $python"
    # Debian and Ubuntu keep what venv needs in a package of its own.
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        install_packages "python$version-venv" || install_packages python3-venv ||
            fail "$python cannot make virtual environments" "install the package python3-venv"
    fi
    "$python" -m venv .venv
fi

echo "installing shardkit and its tests' packages into .venv"
# --group came with pip 25.1, --build-constraint with 25.3.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.3'
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --build-constraint constraints.txt --editable . --group dev
touch "$stamp"
