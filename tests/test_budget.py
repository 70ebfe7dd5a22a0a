"""The code stays small enough to be read, and says one thing a statement: limits of the main file and the README.

Not lines are counted but what is said, the nodes of the syntax tree: a line more that says one thing is welcome.
"""

import ast
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "custom_nethack_pomdp.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
LIMIT_NODES = 25_860
LIMIT_STATEMENT = 11  # nodes of the median one
LIMIT_COLUMNS = 100
LIMIT_FUNCTION, LIMIT_CLASS = 60, 230  # lines of one
LIMIT_README = 260  # lines
TOP_LEVEL = {"custom_nethack_pomdp.py", "README.md", "requirements.txt", "tests", "scripts"}
COMPREHENSIONS = (ast.GeneratorExp, ast.ListComp, ast.DictComp, ast.SetComp)
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
LIMIT_SCRIPTS = 50_467  # nodes of all of them


def count_own_nodes(statement):
    """A statement's nodes, without those of statements inside it."""
    count, todo = 0, [statement]
    while todo:
        node = todo.pop()
        count += 1
        todo += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, (ast.stmt, ast.ExceptHandler))
        ]
    return count


def statements_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def count(tree, kinds):
    return sum(isinstance(node, kinds) for node in ast.walk(tree))


def unpacked(tree, kinds):
    """`a, b = ...` with a value of one of these kinds."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            found.append(node.value)
    return [value for value in found if isinstance(value, kinds)]


def split_strings(tree):
    """`"a b c".split()`, a list in disguise."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(call, ast.Attribute)
        and call.attr == "split"
        and isinstance(call.value, ast.Constant)
    ]


STATEMENTS = statements_of(TREE)


def test_what_the_main_file_says():
    assert sum(1 for _ in ast.walk(TREE)) <= LIMIT_NODES
    assert statistics.median_high(map(count_own_nodes, STATEMENTS)) <= LIMIT_STATEMENT


def test_one_statement_says_one_thing():
    """In a thousand statements; Katakomba, CORL and fql have 0 to 16 tuples, 6 to 10 conditionals, 8 to 27 comprehensions."""
    thousands = len(STATEMENTS) / 1000
    assert len(unpacked(TREE, ast.Tuple)) <= 15 * thousands
    assert count(TREE, ast.IfExp) <= 20 * thousands
    assert count(TREE, COMPREHENSIONS) <= 50 * thousands
    assert unpacked(TREE, COMPREHENSIONS) == [] and split_strings(TREE) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_one_statement_of_a_script_says_one_thing(path):
    """In a thousand statements; the scripts had up to 265 comprehensions."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    thousands = len(statements_of(tree)) / 1000
    assert [line for line in text.splitlines() if len(line) > LIMIT_COLUMNS] == []
    assert len(unpacked(tree, ast.Tuple)) <= 20 * thousands
    assert count(tree, ast.IfExp) <= 25 * thousands
    assert count(tree, COMPREHENSIONS) <= 90 * thousands
    assert split_strings(tree) == []


def test_what_all_scripts_say():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SCRIPTS]
    assert sum(count(tree, ast.AST) for tree in trees) <= LIMIT_SCRIPTS


def test_layout():
    too_wide = [line for line in SOURCE.splitlines() if len(line) > LIMIT_COLUMNS]
    assert too_wide == []
    kept = re.findall(r"# *fmt: *(?:skip|off)|# *yapf: *disable", SOURCE)
    assert kept == [], "a layout kept from the formatter"


def test_functions_and_classes():
    limits = {
        ast.FunctionDef: LIMIT_FUNCTION,
        ast.AsyncFunctionDef: LIMIT_FUNCTION,
        ast.ClassDef: LIMIT_CLASS,
    }
    too_long = []
    for node in STATEMENTS:
        lines = node.end_lineno - node.lineno + 1
        if lines > limits.get(type(node), lines):
            too_long.append(f"{node.name}: {lines} lines")
    assert too_long == []


def test_main_file_is_python_3_8():
    """The benchmark's Python. Its grammar takes `with (open(a) as x, open(b) as y)` for an error, newer ones do not."""
    with pytest.raises(SyntaxError):
        ast.parse("with (a as x, b as y): pass", feature_version=(3, 8))
    ast.parse(SOURCE, feature_version=(3, 8))


def test_readme():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LIMIT_README


def test_top_level_of_the_repository():
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files here: {error}")
    tops = {path.split("/")[0] for path in listed.split("\0") if path}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL
