# SPDX-License-Identifier: MIT
"""What tools read of the repository: licenses, the header by which uv runs the main file, the
workflow of GitHub Actions."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MAIN = (ROOT / "custom_nethack_pomdp.py").read_text(encoding="utf-8")
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


def imported_distributions(source):
    """Names of the distributions that a source imports, at its top or later."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    found = metadata.packages_distributions()
    return {name for module in modules - sys.stdlib_module_names for name in found[module]}


def test_the_main_file_s_header_has_the_pins_of_what_it_imports():
    """The block of comments of PEP 723, read as the PEP reads it."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    (content,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)# ///$", MAIN)
    header = tomllib.loads(re.sub(r"(?m)^# ?", "", content))
    assert header["requires-python"] == ">=3.10,<3.14"
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = re.findall(r"(?m)^[\w-]+==[\w.]+", requirements)
    assert set(header["dependencies"]) <= set(pins)
    names = [pin.partition("==")[0] for pin in header["dependencies"]]
    assert sorted(names) == sorted(imported_distributions(MAIN))


def test_github_runs_what_ci_runs_on_each_version_of_python():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert "bash .ci/run" in commands
    environments = (ROOT / "scripts" / "lib" / "venv.sh").read_text(encoding="utf-8")
    (versions,) = re.findall(r'ensure_venv \.venv "([\d. ]+)"', environments)
    assert sorted(job["strategy"]["matrix"]["python"]) == sorted(versions.split())
