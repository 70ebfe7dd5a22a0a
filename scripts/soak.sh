#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# What takes too long for the tests: kills, full disks and games by the thousand (scripts/soak.py says what each
# must survive). Makes .venv when needed. Arguments replace these counts, e.g. scripts/soak.sh --kills 100 --seed 1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/venv.sh"

ensure_pinned_venv
if [ $# -eq 0 ]; then set -- --kills 25 --ranks 10 --games 10000; fi
exec .venv/bin/python scripts/soak.py "$@"
