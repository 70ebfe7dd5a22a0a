#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Runs all tests, files side by side on two cores. Makes .venv when needed. Arguments go on to pytest (-n 0: one after another).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/venv.sh"

ensure_pinned_venv
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile tests "$@"
