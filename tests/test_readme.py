"""The README says what is: its commands are taken as they stand, its table of settings is the code's, its results are those of the
rows in scripts/results."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GAMES = ROOT / "tests" / "data" / "nle_data"
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
SCRIPTS = [command for command in COMMANDS if command[0] == "python" and command[1].startswith("scripts/")]
RUNS = [command[command.index("custom_nethack_pomdp.py") + 1 :] for command in COMMANDS if "custom_nethack_pomdp.py" in command]
# What is too long, or needs a network or a terminal, for this file: the tests that run it.
ELSEWHERE = {"scripts/get_nld_aa.py": "test_get_nld_aa.py", "scripts/watch.py": "test_watch.py", "scripts/benchmark.py": "test_fast.py",
             "scripts/record_games.py": "test_record.py", "scripts/soak.py": "test_soak.py",
             "scripts/standin_study.py": "test_standin_study.py"}  # fmt: skip


def names_of(command):
    return command[1] + " " + " ".join(token for token in command[2:] if token.startswith("--"))


def test_every_command_is_of_a_known_kind():
    assert len(COMMANDS) > 25 and len(RUNS) > 9 and len(SCRIPTS) > 12
    for command in COMMANDS:
        if command[0] == "bash":
            subprocess.run(["bash", "-n", str(ROOT / command[1])], check=True)
        else:
            assert command[0] in ("python", "torchrun"), command
            assert "custom_nethack_pomdp.py" in command or (ROOT / command[1]).is_file(), command


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_settings_of_the_runs_are_taken(arguments, monkeypatch, capsys):
    """What the runs then do is tested in test_run.py (one process) and test_ranks.py (torchrun)."""
    monkeypatch.chdir(ROOT)
    arguments = [str(GAMES) if token == "DATA_DIR" else token for token in arguments if token != "..."]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            pomdp.parse_config(arguments)
        assert ended.value.code == 0 and "--learning_rate" in capsys.readouterr().out
    else:
        config = pomdp.parse_config(arguments)
        assert config.data_path == str(GAMES) or "--submission" in arguments


@pytest.mark.pinned_stack
@pytest.mark.parametrize("command", SCRIPTS, ids=names_of)
def test_scripts_take_their_arguments(command, tmp_path):
    script, arguments = command[1], command[2:]
    if script in ELSEWHERE:
        asked = [sys.executable, str(ROOT / script), "--help"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True).stdout
        assert all(token in said for token in arguments if token.startswith("--")), said
        assert Path(script).name in (ROOT / "tests" / ELSEWHERE[script]).read_text(encoding="utf-8")
        return
    places = {"DATA_DIR": str(GAMES), "REPORT_DIR": str(tmp_path / "report"), "block.py": str(tmp_path / "block.py")}
    arguments = [places.get(token, token) for token in arguments]
    if script.endswith("study.py") and "--dry_run" not in arguments:
        arguments.append("--dry_run")  # whole studies are run in test_study.py
    if script.endswith("inspect_data.py"):
        arguments.append("--quick")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})  # fmt: skip
    assert done.returncode == 0, done.stderr


def settings_table():
    """The table of all settings, from the comments of TrainConfig."""
    lines, parser = [], pomdp.help_parser()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest in pomdp.config_types()]
        if actions:
            lines += [f"| **{group.title}** | | |"]
        for action in actions:
            meaning, default = re.fullmatch(r"(.*) \(default: (.*)\)", action.help.replace("%%", "%")).groups()
            lines.append(f"| `{action.dest}` | `{default}` | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *lines])


def test_the_table_of_settings_is_the_code_s():
    assert settings_table() in README, f"put this into README.md:\n{settings_table()}"


STUDIED = sorted((ROOT / "scripts" / "results").glob("cpu_*.jsonl"))


@pytest.mark.pinned_stack
def test_results_are_those_of_the_rows(tmp_path):
    """Every line of the results' tables is one that report.py makes of the rows of one study."""
    reports = []
    for rows in STUDIED:
        out = tmp_path / rows.stem
        subprocess.run([sys.executable, str(ROOT / "scripts" / "report.py"), str(rows), "--out", str(out)], check=True, timeout=240)
        reports.append((out / "report.md").read_text(encoding="utf-8").splitlines())
    section = README[README.index("## Results") : README.index("**As the benchmark runs it.**")]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith(("| arm", "| :"))]
    assert len(lines) > 30 and len(STUDIED) >= 2
    for line in lines:
        assert any(line in report for report in reports), line


def test_benchmark_s_table_is_that_of_its_rows():
    """Each ratio of the README's table is that of a row in scripts/results/benchmark.json."""
    rows = json.loads((ROOT / "scripts" / "results" / "benchmark.json").read_text(encoding="utf-8"))
    ratios = {row["what"]: row["ratio"] for row in rows if row["ratio"]}
    lines = re.findall(r"^\| (?:read|build|act|play|evaluate|train|ranks) \| (.*?) \|.*\| \*?\*?([\d.]+) x\*?\*? \|", README, re.MULTILINE)
    assert len(lines) > 8
    for what, ratio in lines:
        assert f"{ratios[what]:.1f}" == ratio, what


def test_the_stand_in_s_table_is_that_of_its_rows():
    for row in map(json.loads, (ROOT / "scripts" / "results" / "standin.jsonl").read_text(encoding="utf-8").splitlines()):
        heldout, scores = row["heldout"], np.array(row["played"]["scores"])
        low, high = pomdp.bootstrap_interval(scores)
        assert (f"| {row['algorithm']} | {row['transitions']:,} | {row['train_loss']:.2f} | {heldout['loss_per_action']:.2f} "
                f"| {heldout['accuracy']:.0%} | {len(scores)} | {scores.mean():.1f} [{low:.1f}, {high:.1f}] |") in README  # fmt: skip
