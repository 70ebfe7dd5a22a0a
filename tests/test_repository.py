"""The repository's layout, and that the main file is one that the benchmark's Python can read."""

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


def test_top_level_of_the_repository():
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files here: {error}")
    tops = {path.split("/")[0] for path in listed.split("\0") if path}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL
