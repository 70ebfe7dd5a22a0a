# SPDX-License-Identifier: MIT
"""What tools read of the repository: licenses."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LICENSE_LINE = "# SPDX-License-Identifier: MIT"


def test_each_source_file_begins_with_its_license():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            [*command, "*.py", "*.sh", ".ci/run"], cwd=ROOT, capture_output=True, check=True
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files here: {error}")
    lacking = []
    for name in filter(None, listed.split("\0")):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        if LICENSE_LINE not in lines[:2]:
            lacking.append(name)
    assert lacking == []
    assert (ROOT / "scripts" / "LICENSE").read_text(encoding="utf-8").startswith("MIT License\n")
