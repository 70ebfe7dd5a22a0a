# SPDX-License-Identifier: MIT
"""scripts/lib/venv.sh clears no environment but its own."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "scripts" / "lib" / "venv.sh"
VERSION = "{}.{}".format(*sys.version_info)


@pytest.fixture
def ensure(tmp_path):
    """Ensures tmp_path/.env, in a copy of the repository; what it installs is a file `filled`."""
    (tmp_path / "scripts" / "lib").mkdir(parents=True)
    shutil.copy(LIBRARY, tmp_path / "scripts" / "lib")
    (tmp_path / "requirements.txt").touch()
    script = "source scripts/lib/venv.sh; fill() { touch $1/filled; }; set -euo pipefail\n"

    def run(versions=VERSION, python=sys.executable):
        command = f"{script}PYTHON={python} ensure_venv .env '{versions}' fill requirements.txt"
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)

    return run


def test_an_environment_of_the_user_is_never_cleared(ensure, tmp_path):
    """One without pip, as uv makes them; one of another Python; a folder that is no environment."""
    kept = tmp_path / ".env" / "mine"
    kept.parent.mkdir()
    kept.touch()
    for versions in (VERSION, "3.6"):
        done = ensure(versions)
        assert done.returncode == 2 and kept.exists(), done.stderr
        assert done.stderr.startswith("error: .env was not made by this script")
        assert "move it away" in done.stderr and done.stderr.count("\n") == 1
        venv.create(kept.parent)  # without pip
    assert not (kept.parent / "filled").exists()


def test_its_own_is_made_filled_once_and_made_again_when_it_is_broken(ensure, tmp_path):
    made = tmp_path / ".env"
    for left in ("nothing", "a killed start"):
        done = ensure()
        assert done.returncode == 0 and "Making .env" in done.stderr, (left, done.stderr)
        assert (made / "filled").exists() and not (made / "mine").exists()
        assert ensure().stderr == ""
        (made / "bin" / "python").unlink()
        (made / "mine").touch()
