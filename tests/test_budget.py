"""The code stays small enough to be read: limits of the main file, the scripts and the README."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "custom_nethack_pomdp.py").read_text(encoding="utf-8")
LIMIT_LINES, LIMIT_BYTES, LIMIT_COLUMNS = 2125, 122_000, 120  # the main file
LIMIT_FUNCTION, LIMIT_CLASS = 60, 160  # lines of one
LIMIT_SCRIPTS, LIMIT_README = 3600, 260  # lines of all scripts together, and of the README
TOP_LEVEL = {"custom_nethack_pomdp.py", "README.md", "requirements.txt", "tests", "scripts"}


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_main_file():
    lines = SOURCE.splitlines()
    assert len(lines) <= LIMIT_LINES
    assert len(SOURCE.encode()) <= LIMIT_BYTES
    assert [number for number, line in enumerate(lines, start=1) if len(line) > LIMIT_COLUMNS] == []
    assert re.findall(r"# *fmt: *(?:skip|off)|# *yapf: *disable", SOURCE) == [], "a layout kept from the formatter"


def test_functions_and_classes():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    too_long = []
    for node in ast.walk(ast.parse(SOURCE)):
        limit = (
            LIMIT_FUNCTION if isinstance(node, functions) else LIMIT_CLASS if isinstance(node, ast.ClassDef) else None
        )
        if limit and node.end_lineno - node.lineno + 1 > limit:
            too_long.append(f"{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert too_long == []


def test_main_file_is_python_3_8():
    """The benchmark's Python. Its grammar takes `with (open(a) as x, open(b) as y)` for an error, newer ones do not."""
    with pytest.raises(SyntaxError):
        ast.parse("with (a as x, b as y): pass", feature_version=(3, 8))
    ast.parse(SOURCE, feature_version=(3, 8))


def test_scripts():
    files = [path for kind in ("*.py", "*.sh") for path in sorted((ROOT / "scripts").rglob(kind))]
    assert len(files) > 10 and sum(map(lines_of, files)) <= LIMIT_SCRIPTS


def test_readme():
    assert lines_of(ROOT / "README.md") <= LIMIT_README


def test_top_level_of_the_repository():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files here: {error}")
    tops = {path.split("/")[0] for path in listed.split("\0") if path}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL
