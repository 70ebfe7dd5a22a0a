#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# For people who change the code: layout and style (ruff), types (mypy) and the shell scripts' syntax. Makes .venv, whose libraries mypy
# reads, and .venv-check with the tools when needed. Exits with 1 where something was found, with 2 where nothing was checked.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/venv.sh"

install_tools() { pip_install "$1" -r scripts/requirements-check.txt; }

# Until the tools are there, whatever fails is no finding.
trap '[ $? = 0 ] || { echo "check: error: NOTHING WAS CHECKED, the tools could not be installed (see above); is there a network?" >&2; exit 2; }' EXIT
ensure_pinned_venv
ensure_venv .venv-check "3.13 3.12 3.11 3.10" install_tools scripts/requirements-check.txt
trap - EXIT

found=""
check() { # NAME COMMAND...: goes on after a finding, so that one run shows all
    "${@:2}" || found+="${found:+, }$1"
}

check_shell() {
    local script failed=0
    for script in scripts/{.,lib}/*.sh .ci/run; do
        [ ! -f "$script" ] || bash -n "$script" || failed=1
    done
    return $failed
}

check layout .venv-check/bin/ruff format --check --quiet --config scripts/ruff.toml .
check style .venv-check/bin/ruff check --quiet --config scripts/ruff.toml .
check types .venv-check/bin/mypy --no-error-summary --config-file scripts/mypy.ini --python-executable .venv/bin/python \
    custom_nethack_pomdp.py scripts/{.,lib,references,studies/variants}/*.py
check "shell scripts" check_shell

if [ -n "$found" ]; then
    echo "check: FAILED: $found"
    exit 1
fi
echo "check: passed: layout, style, types, shell scripts"
