# SPDX-License-Identifier: MIT
"""What all tests share: the path to the code, quiet libraries, the recorded games and the stores
made of them."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "lib")]
# Worker processes and subprocesses of the tests find the code the same way, from whatever folder
# they start in.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault(
    "WANDB_MODE", "disabled"
)  # no test may wait for a server; a test of logging sets its own mode

import pytest
import torch
from hypothesis import settings

# Small matrices: more threads than cores that are free only wait for each other.
torch.set_num_threads(min(2, os.cpu_count() or 1))
# A busy machine makes single examples slow, which says nothing about the code; examples are the
# same in every run.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

import custom_nethack_pomdp as pomdp

CHARACTERS = ("mon-hum-neu", "val-hum-neu", "ran-hum-neu")
RECORDED = ROOT / "tests" / "data" / "nle_data"
# Seconds that a subprocess may take, which only ends what hangs: none takes a tenth of it alone,
# and other programs may want the cores.
LIMIT_S = 1200


def pytest_configure(config):
    marker = "pinned_stack: needs what only requirements.txt's versions have (skipped by scripts/test_legacy.sh)"  # noqa: E501
    config.addinivalue_line("markers", marker)


@pytest.fixture(scope="session")
def recorded_games():
    """{character: games found in tests/data}, each with at least two games."""
    found = {character: pomdp.find_nld_games(RECORDED, character)[0] for character in CHARACTERS}
    assert all(len(games) >= 2 for games in found.values())
    return found


@pytest.fixture(scope="session")
def stores_path(tmp_path_factory):
    """Folder in which the session's chunk stores are built: what `--store_path` names."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="session")
def stores(stores_path):
    """{character: chunk store of its games in tests/data}."""
    return {
        character: pomdp.open_or_build_store(str(RECORDED), str(stores_path), character)
        for character in CHARACTERS
    }


@pytest.fixture(scope="session")
def games(stores):
    """All recorded games under one numbering."""
    return pomdp.Games(list(stores.values()))


@pytest.fixture(scope="module")
def one_thread():
    """Layers as small as a test's gain nothing from threads, and lose much where other programs
    want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
