#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Trains on the small games in tests/data/, lets the bundled agent play, and shows both, in about three minutes on a CPU.
# Makes .venv when needed. scripts/quickstart.py says what is shown and which arguments it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/venv.sh"

ensure_pinned_venv
exec .venv/bin/python scripts/quickstart.py "$@"
