# SPDX-License-Identifier: MIT
"""The trials of scripts/soak.sh in short: one place holds the code, the script runs it at full
length."""

import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import soak


@pytest.fixture
def trial(capfd):
    """trial(arguments...) -> exit status, stdout, stderr of scripts/soak.py."""
    return lambda *arguments: (soak.main(list(arguments)), *capfd.readouterr())


def test_a_killed_run_and_one_on_a_full_disk_go_on(trial):
    status, out, err = trial("--kills", "2", "--seed", "2")
    assert status == 0 and "kills: 2 passed" in out, err
    assert "writing a checkpoint, call" in out and "full disk, call" in out


def test_games_without_end(trial):
    status, out, err = trial("--games", "12")
    assert status == 0 and "games: memory " in out and "games: 12 passed" in out, err


def test_trials_can_fail(trial, monkeypatch):
    """A soak that passes whatever happens would show nothing."""
    for statuses, weights, says in (
        ([1], [], "undisturbed run ended with 1"),
        ([0, 1], [5], "run 1 .*it ended with 1"),
        ([0, -9, 2], [5], "resumed, it ended with 2"),
        ([0, -9, 0], [5, 6], "not as undisturbed: weight"),
    ):
        monkeypatch.setattr(soak, "run", Mock(side_effect=[(status, "") for status in statuses]))
        monkeypatch.setattr(
            soak, "outcome", Mock(side_effect=[{"weight": weight} for weight in weights])
        )
        status, _, err = trial("--kills", "1")
        assert status == 1 and re.search(says, err), (statuses, err)
    rounds = [[(0, score), (1, 2)] for score in (5, 6)]
    monkeypatch.setattr(soak.pomdp, "vec_evaluate", Mock(side_effect=rounds))
    status, _, err = trial("--games", "24")
    assert status == 1 and "not those of round 1" in err
