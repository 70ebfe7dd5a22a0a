# SPDX-License-Identifier: MIT
"""The READMEs' tables are what their rows make; commands can be given; links and names exist.

A table's marker says what it is made from: <!-- table: report small_512 --> stands above what
scripts/report.py prints of scripts/results/small_512. The README shows some lines of the long ones.
After the main file changed: `python tests/test_readme.py` writes the README's map of it.
"""

import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import benchmark
import critic_probe
import report
import standin_study

import custom_nethack_pomdp as pomdp

RESULTS = ROOT / "scripts" / "results"
NAMES = ("README.md", "scripts/README.md", "scripts/results/README.md", "scripts/agents/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
WITHOUT_CODE = {
    name: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for name, text in TEXTS.items()
}


# --- tables
def read_rows(name):
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def report_table(*names):
    """`baseline=ARM` may be among the names."""
    paths = [RESULTS / name for name in names if "=" not in name]
    options = dict(name.split("=") for name in names if "=" in name)
    return report.make_table(
        report.collect(report.read_all(paths)), options.get("baseline", "ours")
    )


def training_table(name):
    yield "| batch | what differs | ready | loaded |"
    yield "| :--- | :--- | ---: | ---: |"
    for row in json.loads((RESULTS / name).read_text(encoding="utf-8"))["train"]:
        loaded = f"{row['loaded']:,}" if "loaded" in row else report.NOTHING
        what = row.get("what", row.get("look_up"))
        yield f"| {row['batch']} | {what} | {row['ready']:,} | {loaded} |"


def readers_table(name):
    yield "| batch | LSTM | read by | transitions a second |"
    yield "| :--- | ---: | :--- | ---: |"
    for row in json.loads((RESULTS / name).read_text(encoding="utf-8"))["h100"]["train"]:
        pace = np.median(row["paces"])
        yield f"| {row['batch']} | {row['units']:,} | {row['reader']} | {pace:,.0f} |"


MAKERS = {
    "report": report_table,
    "standin": lambda name: standin_study.make_table(read_rows(name)),
    "benchmark": lambda name: benchmark.table(str(RESULTS / name)),
    "critic": lambda name: critic_probe.make_table(read_rows(name)),
    "training": lambda name: "\n".join(training_table(name)),
    "readers": lambda name: "\n".join(readers_table(name)),
}
TABLES = [
    (name, marker, table.splitlines())
    for name, text in TEXTS.items()
    for marker, table in re.findall(r"<!-- table: (.*?) -->\n+((?:\|.*\n)+)", text)
]


@pytest.mark.parametrize("name, marker, shown", TABLES, ids=[" ".join(each[:2]) for each in TABLES])
def test_a_table_is_what_is_made_from_its_rows(name, marker, shown):
    maker, *arguments = marker.split()
    made = MAKERS[maker](*arguments).splitlines()
    assert shown[:2] == made[:2], "another header"
    assert [line for line in shown if line not in made] == []
    if name != "README.md":  # which shows some lines of the long ones
        assert shown == [line for line in made if line.startswith("|")]


def test_results_are_in_tables_with_markers():
    """Every marker has its table; without one are the tables of words."""
    markers = sum(text.count("<!-- table: ") for text in TEXTS.values())
    assert len(TABLES) == markers >= 9
    results = WITHOUT_CODE["scripts/results/README.md"]
    assert len(re.findall(r"^\| ?:?--", results, re.MULTILINE)) == results.count("<!-- table: ")


# --- commands
def commands():
    for text in TEXTS.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())
        yield from re.findall(r"`((?:python|bash|torchrun|uv) [^`]+)`", text)


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_a_command_can_be_given(line, monkeypatch):
    """Its files are there; the main file takes the settings, other scripts know the options."""
    program, *words = shlex.split(line, comments=True)
    script = next((word for word in words if word.endswith((".py", ".sh"))), "")
    assert program in ("python", "bash", "torchrun", "source", "uv"), line
    for word in words:
        assert not word.startswith(("scripts/", "tests/")) or (ROOT / word).exists(), word
    arguments = words[words.index(script) + 1 :] if script else []
    if script == "custom_nethack_pomdp.py":
        monkeypatch.chdir(ROOT)
        pomdp.parse_config([word for word in arguments if word != "--help"])
    elif script:
        source = (ROOT / script).read_text(encoding="utf-8")
        options = [word[2:] for word in arguments if word.startswith("--")]
        assert [option for option in options if not re.search(rf'"(--)?{option}"', source)] == []


def test_the_quickstart_s_output_follows_from_its_settings_and_games(stores):
    """Losses do not, they take a run to see. Parameters are counted without being made."""
    block = re.search(r"```text\n(.*?)```", TEXTS["README.md"], re.DOTALL)[1]
    path = ROOT / "scripts" / "configs" / "quickstart.yaml"
    config = pomdp.parse_config(["--config", str(path)])
    with torch.device("meta"):
        backbone = pomdp.ModelBackbone(pomdp.NUM_ACTIONS, config.rnn_hidden_dim, config.rnn_layers)
        parameters = sum(parameter.numel() for parameter in pomdp.Model(backbone).parameters())
    assert block.startswith(str(stores["mon-hum-neu"]).partition(" 0 lines")[0] + " ...\n")
    assert f" {parameters:,} parameters on" in block
    for step in (config.log_every, config.update_steps):
        assert f" step={step} transitions={step * config.batch_size * config.seq_len} " in block
    heldout = f"HELDOUT_METRICS step={config.update_steps} "
    assert re.search(rf"{heldout}.* frames={config.eval_heldout_frames}\n", block)
    assert f" after {config.update_steps} updates\n" in block
    assert f"-seed{config.train_seed} at step 0" in block and "+".join(config.characters) in block


MAP = r"(?s)(?<=```text\n)\d+ Imports.*?(?=\n```)"


def map_of_the_file():
    """Sections of the main file with the lines at which they begin, from its banners."""
    sections = []
    lines = (ROOT / "custom_nethack_pomdp.py").read_text(encoding="utf-8").splitlines()
    rule = "# " + "=" * 98
    for number, line in enumerate(lines, start=1):
        banner = re.match(r"# (?:--- |=+  (?=EDITABLE BEGIN))?([^.:=]+?)(?:[.:]|  |$)", line)
        heads = lines[number - 2] == rule and rule in lines[number : number + 2]
        if banner and (heads or line.startswith("# ---") or "EDITABLE BEGIN" in line):
            sections.append(f"{number} {banner[1]}".replace(" ", "\0"))
    return textwrap.fill(" · ".join(sections), width=140).replace("\0", " ")


def test_the_map_is_the_file_s():
    (shown,) = re.findall(MAP, TEXTS["README.md"])
    assert shown == map_of_the_file(), "`python tests/test_readme.py` writes it"


# --- links and names
def anchors(text):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_made_as_on_github():
    assert anchors("# On a GPU\n\n## Promises, and the tests that hold them") == {
        *("on-a-gpu", "promises-and-the-tests-that-hold-them")
    }


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            code = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert anchor in anchors(code), target


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_names_exist(name):
    sources = [ROOT / "custom_nethack_pomdp.py", *RESULTS.glob("*.jsonl")]
    sources += [
        path for path in (ROOT / "scripts").rglob("*.*") if path.suffix in (".py", ".yaml", ".sh")
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    spans = " ".join(re.findall(r"`([^`\n]+)`", WITHOUT_CODE[name]))
    for path in re.findall(r"(?:scripts|tests|\.ci)/[\w./-]*\w", spans):
        assert (ROOT / path).exists(), path
    for word in re.findall(r"(?<![\w/])[a-z]+(?:_[a-z0-9]+)+(?![\w.]|/)", spans):
        made = word.split("_")[0] + "_{"  # an f-string's: reward_{statistic}
        assert word in code or made in code or (RESULTS / word).is_dir(), word


def test_each_paper_of_the_readme_has_its_entry_in_bibtex():
    (entries,) = re.findall(r"```bibtex\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    named = re.findall(r"arXiv (\d{4}\.\d{5})", WITHOUT_CODE["README.md"])
    assert len(named) >= 10 and set(named) == set(re.findall(r"arXiv:([\d.]+)", entries))
    assert entries.count("{") == entries.count("}")


if __name__ == "__main__":
    text = re.sub(MAP, lambda _: map_of_the_file(), TEXTS["README.md"])
    (ROOT / "README.md").write_text(text, encoding="utf-8")
