# SPDX-License-Identifier: MIT
"""The repository's layout and licenses, and that the benchmark's Python can read the main file."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {"custom_nethack_pomdp.py", "README.md", "requirements.txt", "tests", "scripts"}


def test_main_file_is_python_3_8():
    """The benchmark's Python. In its grammar `with (open(a) as x, open(b) as y)` is an error."""
    with pytest.raises(SyntaxError):
        ast.parse("with (a as x, b as y): pass", feature_version=(3, 8))
    source = (ROOT / "custom_nethack_pomdp.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))


def tracked_files():
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files here: {error}")
    return [path for path in listed.split("\0") if path]


def test_top_level_of_the_repository():
    tops = {path.split("/")[0] for path in tracked_files()}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL


def test_each_source_file_begins_with_its_license():
    sources = [path for path in tracked_files() if path.endswith((".py", ".sh"))]
    lacking = []
    for path in [".ci/run", *sources]:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        if "# SPDX-License-Identifier: MIT" not in lines[:2]:
            lacking.append(path)
    assert lacking == []
    license_text = (ROOT / "scripts" / "LICENSE").read_text(encoding="utf-8")
    assert license_text.startswith("MIT License\n")
