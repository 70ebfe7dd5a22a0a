#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Trains on the small games in tests/data/ and evaluates, in a few minutes on a CPU. Makes .venv when needed.
# Arguments go on to custom_nethack_pomdp.py; paths in them are relative to the repository's root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/venv.sh"

ensure_pinned_venv
exec .venv/bin/python custom_nethack_pomdp.py --config scripts/configs/quickstart.yaml "$@"
