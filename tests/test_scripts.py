"""scripts/README.md lists all scripts by their own first sentences, and no command imports another.

After a script came, went or says something else: `python tests/test_scripts.py` writes the list.
"""

import ast
import re
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
README = SCRIPTS / "README.md"
FILES = sorted([*SCRIPTS.glob("*.py"), *SCRIPTS.glob("*.sh")])
COMMANDS = []
OTHERS = []  # for commands to import or source
for path in FILES:
    text = path.read_text(encoding="utf-8")
    is_command = text.startswith("#!") or '__name__ == "__main__"' in text
    (COMMANDS if is_command else OTHERS).append(path)
LIST = r"(?s)(?<=<!-- scripts: python tests/test_scripts.py -->\n).*?(?=\n## )"


def first_sentence(path):
    """Of a Python file's docstring, or of the comment that a shell script begins with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text))
    else:
        lines = [line for line in text.splitlines() if not line.startswith("#!")]
        text = "\n".join(line.lstrip("# ") for line in lines)
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) ", paragraph)[0]


def make_list():
    lines = ["", "Commands:", ""]
    lines += [f"- `{path.name}`: {first_sentence(path)}" for path in COMMANDS]
    lines += ["", "Imported or sourced by them:", ""]
    lines += [f"- `{path.name}`: {first_sentence(path)}" for path in OTHERS]
    return "\n".join([*lines, ""])


def test_the_list_of_scripts():
    (listed,) = re.findall(LIST, README.read_text(encoding="utf-8"))
    assert listed == make_list(), "`python tests/test_scripts.py` writes it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_first_sentence_fits_into_a_line(path):
    sentence = first_sentence(path)
    assert 20 < len(sentence) <= 160 and sentence[-1] in ".?!"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_a_command(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & {command.stem for command in COMMANDS} == set()


if __name__ == "__main__":
    listed = re.sub(LIST, lambda _: make_list(), README.read_text(encoding="utf-8"))
    README.write_text(listed, encoding="utf-8")
