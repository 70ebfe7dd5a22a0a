# SPDX-License-Identifier: MIT
# Sourced by the other shell scripts: enters the repository's root, makes virtual environments. Defines
#   ensure_venv DIR "VERSIONS" INSTALL_FUNCTION FILES...
# which makes the virtual environment DIR with one of the Python VERSIONS and fills it, unless that was done before.
# A DIR that it did not make is filled if it has pip and one of the VERSIONS, but never cleared.
# FILES are what its content follows from: a stamp in DIR holds their hash, and is written last, so that an
# interrupted install is taken up again. PYTHON=... chooses the Python, PIP_* variables are pip's own.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Threads that wait for each other sleep instead of spinning: where cores are shared, spinning takes them from those at work.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

die() {
    echo "error: $*" >&2
    exit 2
}

version_of() { # prints X.Y, or nothing where $1 is no Python that runs
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

contains() { [[ " $1 " == *" $2 "* ]]; }

find_python() { # prints the first Python that is one of the versions $1 and can make environments
    local candidate version no_venv="" candidates=(python3)
    for version in $1; do candidates+=("python$version"); done
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate")
        contains "$1" "${version:-none}" || continue
        # Debian and Ubuntu ship Python without ensurepip, in a package of its own.
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null </dev/null; then
            echo "$candidate"
            return
        fi
        no_venv=${no_venv:-$version}
    done
    [ -z "$no_venv" ] || die "Python $no_venv cannot make virtual environments: sudo apt install python$no_venv-venv"
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python of version ${1// /, }"
    die "no Python of version ${1// /, } found: sudo apt install python3 python3-venv, or set PYTHON=/path/to/python"
}

ensure_venv() {
    local dir=$1 versions=$2 install=$3 hash
    shift 3
    hash=$(cat "$@" | sha256sum)
    if venv_done; then return; fi
    ( # two scripts started at once must not install into one environment
        flock 9
        if venv_done; then exit; fi
        if ! venv_usable; then
            may_clear || die "$dir was not made by this script and cannot be used: it needs pip and Python" \
                "${PYTHON:-${versions// /, }}; install pip into it, or move it away and start this again"
            python=$(find_python "$versions")
            echo "Making $dir with Python $(version_of "$python")" >&2
            "$python" -m venv --clear --without-pip "$dir"
            touch "$dir/.made-here"
            "$python" -m venv "$dir"
        fi
        rm -f "$dir/.stamp"
        echo "Installing into $dir: this takes some minutes the first time" >&2
        "$install" "$dir" >&2
        echo "$hash" >"$dir/.stamp"
    ) 9>"$dir.lock" </dev/null
}

# These see the variables of ensure_venv.
may_clear() { [ -e "$dir/.made-here" ] || [ -z "$(ls -A "$dir" 2>/dev/null)" ]; }

venv_usable() {
    local version
    version=$(version_of "$dir/bin/python")
    contains "$versions" "${version:-none}" && "$dir/bin/python" -m pip --version >/dev/null 2>&1 </dev/null &&
        { [ -z "${PYTHON:-}" ] || [ "$version" = "$(version_of "$PYTHON")" ]; }
}

venv_done() { [ "$(cat "$dir/.stamp" 2>/dev/null)" = "$hash" ] && venv_usable; }

pip_install() { # DIR ARGUMENTS...
    "$1/bin/python" -m pip install --no-input --disable-pip-version-check "${@:2}"
}

# The pinned environment, which everything but test_legacy.sh uses.
install_pinned() { pip_install "$1" -r requirements.txt; }
ensure_pinned_venv() { ensure_venv .venv "3.13 3.12 3.11 3.10" install_pinned requirements.txt; }
