#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Runs the main file's tests on the stack of the benchmark's container: Python 3.8, torch 2.0.1, nle 0.9.0, gym 0.23, numpy 1.23.
# (Scripts need Python 3.10.) Makes .venv-legacy when needed, for which nle is built from source; without a Python 3.8 a later one
# up to 3.11 will do. Arguments go on to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/venv.sh"

# Looks for what the build needs from the system, and says what is missing. Installs it only where it may: as root.
need_build_tools() {
    local missing="" include
    include=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    for tool in bison flex git; do # nle's setup.py asks git for a version and does not get by without it
        command -v "$tool" >/dev/null || missing+=" $tool"
    done
    command -v make >/dev/null && command -v c++ >/dev/null || missing+=" build-essential"
    # cmake comes from pip; without a compiler the header cannot be looked for, and is asked for as well.
    echo '#include <bzlib.h>' | cc -E - >/dev/null 2>&1 || missing+=" libbz2-dev"
    [ -f "$include/Python.h" ] || missing+=" python$(version_of "$1/bin/python")-dev"
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Building nle 0.9.0 needs system packages; installing:$missing" >&2
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing ||
            die "could not install$missing, which building nle 0.9.0 needs"
    else
        die "building nle 0.9.0 needs: sudo apt install$missing"
    fi
}

install_legacy() {
    need_build_tools "$1"
    # gym 0.23 and nle 0.9.0 do not build with a newer setuptools; without isolation they build with this one.
    pip_install "$1" setuptools==65.7.0 wheel pybind11==2.11.1 cmake==3.27.9 numpy==1.23.5
    PATH="$PWD/$1/bin:$PATH" NLE_RELEASE_BUILD=1 pip_install "$1" --no-build-isolation nle==0.9.0 gym==0.23.0 numpy==1.23.5
    pip_install "$1" -r scripts/requirements-legacy.txt
}

if [ -z "${PYTHON:-}" ] && [ -n "$(version_of python3.8)" ]; then PYTHON=python3.8; fi
ensure_venv .venv-legacy "3.8 3.9 3.10 3.11" install_legacy scripts/requirements-legacy.txt scripts/test_legacy.sh
export PYTHONWARNINGS="ignore:TypedStorage:UserWarning" # of torch 2.0 itself, wherever it saves
exec .venv-legacy/bin/python -m pytest -q -m "not pinned_stack" \
    tests/test_{algorithm,config,data,evaluation,fast,game_io,logging,ranks,run,status}.py "$@"
