#!/usr/bin/env bash
# Runs all tests. Makes .venv when needed. Arguments go on to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_pinned_venv
exec .venv/bin/python -m pytest -q tests "$@"
