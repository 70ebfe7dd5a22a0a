# SPDX-License-Identifier: MIT
"""scripts/README.md lists each script with its own first sentence, commands stand apart from
modules and import no other command, and each finds its modules in whatever folder it is started.

After a script came, went or says something else: add or remove its line in scripts/README.md, then
`python tests/test_scripts.py` writes the sentences.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
README = SCRIPTS / "README.md"
COMMANDS = sorted([*SCRIPTS.glob("*.py"), *SCRIPTS.glob("*.sh")])
MODULES = sorted([*SCRIPTS.glob("lib/*.py"), *SCRIPTS.glob("lib/*.sh")])
FILES = COMMANDS + MODULES
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]
PYTHON_COMMANDS = [path for path in COMMANDS if path.suffix == ".py"]
LINE = re.compile(r"^- `([\w/]+\.(?:py|sh))`:.*$", re.MULTILINE)


def name_of(path):
    return path.relative_to(SCRIPTS).as_posix()


def first_sentence(path):
    """Of a Python file's docstring, or of the comment that a shell script begins with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text))
    else:
        lines = [line for line in text.splitlines() if not line.startswith(("#!", "# SPDX"))]
        text = "\n".join(line.lstrip("# ") for line in lines)
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) ", paragraph)[0]


def with_sentences(readme):
    """The README with each listed script's sentence as the script has it."""
    return LINE.sub(lambda line: f"- `{line[1]}`: {first_sentence(SCRIPTS / line[1])}", readme)


def test_the_readme_lists_each_script_once():
    listed = LINE.findall(README.read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(map(name_of, FILES)), "add or remove lines by hand"


def test_the_readme_has_the_scripts_sentences():
    readme = README.read_text(encoding="utf-8")
    assert readme == with_sentences(readme), "`python tests/test_scripts.py` writes them"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_first_sentence_fits_into_a_line(path):
    sentence = first_sentence(path)
    assert 20 < len(sentence) <= 160 and sentence[-1] in ".?!"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_commands_stand_apart_from_modules(path):
    text = path.read_text(encoding="utf-8")
    is_command = text.startswith("#!") or '__name__ == "__main__"' in text
    assert is_command == (path in COMMANDS)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_no_script_imports_a_command(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & {command.stem for command in COMMANDS} == set()


@pytest.mark.pinned_stack
@pytest.mark.parametrize("path", PYTHON_COMMANDS, ids=name_of)
def test_a_command_finds_its_modules_in_any_folder(path, tmp_path):
    """Even where Python does not look for modules next to the command."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    del environment["PYTHONPATH"]  # by which other tests find the code
    command = [sys.executable, str(path), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and done.stderr == ""


if __name__ == "__main__":
    written = with_sentences(README.read_text(encoding="utf-8"))
    README.write_text(written, encoding="utf-8")
