# SPDX-License-Identifier: MIT
"""What tools read of the repository: the header by which uv runs the main file, the
workflow of GitHub Actions, the model card.

After the bundled agent or its games changed: `python tests/test_metadata.py` writes the card's
results.
"""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import report

AGENTS = ROOT / "scripts" / "agents"
CARD = AGENTS / "README.md"
HEADER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
MAIN = (ROOT / "custom_nethack_pomdp.py").read_text(encoding="utf-8")


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


def estimate(digits, values):
    """A mean with its 95% interval, rounded, as the model card has it."""
    found = report.estimate(values)
    interval = [round(found.low, digits), round(found.high, digits)]
    games = len(values)
    return {"value": round(found.value, digits), "args": {"games": games, "interval_95": interval}}


def model_index(name):
    """Results of an agent in the Hub's form, from the games that the README's table is made of."""
    (arm,) = report.collect(report.read_all([ROOT / "scripts" / "results" / name]))
    results = []
    for character in report.characters_of([arm]):
        scores = np.array(list(report.Sample(arm, character).points.values()))
        normalized = scores / report.AUTOASCEND_MEAN_SCORE[character]
        metrics = [
            {"type": "score", "name": "mean score", **estimate(1, scores)},
            {
                "type": "normalized_score",
                "name": "mean score over AutoAscend's",
                **estimate(4, normalized),
            },
        ]
        results.append(
            {
                "task": {"type": "reinforcement-learning"},
                "dataset": {"name": f"NetHack as {character}", "type": "NetHackChallenge-v0"},
                "metrics": metrics,
            }
        )
    return [{"name": name, "results": results}]


def read_card():
    return yaml.safe_load(HEADER.match(CARD.read_text(encoding="utf-8"))[1])


def test_the_model_card_s_header():
    card = read_card()
    assert card["license"] == "mit" and card["library_name"] == "pytorch"
    assert "reinforcement-learning" in card["tags"] and card["datasets"]


def test_the_model_card_s_results_are_those_of_the_readme_s_games():
    (agent,) = AGENTS.glob("*.pt")
    card = read_card()
    assert card["model-index"] == model_index(agent.stem), "`python tests/test_metadata.py`"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"<!-- table: report [^>]*\b{agent.stem}\b", readme)


if __name__ == "__main__":
    (agent,) = AGENTS.glob("*.pt")
    card = {**read_card(), "model-index": model_index(agent.stem)}
    header = yaml.safe_dump(card, sort_keys=False, default_flow_style=None, width=100)
    text = HEADER.sub(lambda _: f"---\n{header}---\n", CARD.read_text(encoding="utf-8"))
    CARD.write_text(text, encoding="utf-8")
