# SPDX-License-Identifier: MIT
"""Logging: metrics.jsonl always, wandb where it is configured, and the lines that readers of output
look for."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import RunLogger, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
GAMES = ROOT / "tests" / "data" / "nle_data"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_logged(path):
    """The rows as wandb has them, which does not get their kind."""
    rows = rows_of(path)
    assert {row.pop("kind") for row in rows} <= {"training", "evaluation"}
    return rows


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- rows and lines
def test_rows_are_lines_of_json_and_are_added_to_what_is_there(tmp_path):
    logger = RunLogger(TrainConfig(), tmp_path)  # tests run with WANDB_MODE=disabled
    metrics = {"step": 3, "transitions": 192, "loss": 1.5}
    logger.log("training", {**metrics, "train/nan": math.nan, "train/inf": -math.inf})
    # Read before the file is closed: a run that is killed keeps its rows.
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text, "JSON knows neither"
    first = {"kind": "training", **metrics, "train/nan": None, "train/inf": None}
    assert json.loads(text) == first
    logger.close()
    logger = RunLogger(TrainConfig(), tmp_path)
    logger.log("evaluation", {"step": 4, "reward_mean": 7})
    logger.close()
    assert rows_of(tmp_path / "metrics.jsonl") == [
        first,
        {"kind": "evaluation", "step": 4, "reward_mean": 7},
    ]
    assert files_below(tmp_path) == ["metrics.jsonl"]


def test_lines_for_readers_of_standard_output(capfd):
    """Counts keep all their digits: a step of 1e+06 is no number of a step to a reader that looks
    for digits."""
    pomdp.say_metrics(
        "TRAIN_METRICS", {"step": 1_234_567, "transitions": 512_000_000, "loss": 0.123456789}
    )
    pomdp.say_metrics(
        "TEST_METRICS", {"normalized_score": 0.0213, "normalized_score_mon_hum_neu": 1e-7}
    )
    assert capfd.readouterr().out.splitlines() == [
        "TRAIN_METRICS step=1234567 transitions=512000000 loss=0.123457",
        "TEST_METRICS normalized_score=0.0213 normalized_score_mon_hum_neu=1e-07",
    ]


T1, T2, T3 = [json.dumps({"kind": "training", "step": step}) + "\n" for step in (1, 2, 3)]
E1, E2 = [json.dumps({"kind": "evaluation", "step": step}) + "\n" for step in (1, 2)]
ROWS_KEPT = {
    (T1 + T2 + E1 + T3): 3,
    (T1 + E1 + T2 + E2): 3,  # the checkpoint was written before the evaluation
    (T1 + T2 + '{"kind": "training", "step": 2, "lo'): 2,  # a row that was cut short
    "": 0,
    None: 0,  # no file yet
}


@pytest.mark.parametrize("text, kept", ROWS_KEPT.items())
def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path, text, kept):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    pomdp.cut_metrics(path, step=2, evaluated=1)
    assert files_below(tmp_path) == ["metrics.jsonl"] * (text is not None)
    if text is not None:
        assert path.read_text(encoding="utf-8").splitlines() == text.splitlines()[:kept]


# --- wandb itself, offline
PROGRAM = """
import sys
from pathlib import Path
import custom_nethack_pomdp as pomdp

folder, run_id = Path(sys.argv[1]), (sys.argv[2:] or [None])[0]
folder.mkdir(parents=True, exist_ok=True)
logger = pomdp.RunLogger(pomdp.TrainConfig(group="quick", batch_size=5), folder, run_id)
print("ID", logger.run and logger.run.id)
for step in (1, 2, 3):
    row = {"loss": 3.0 / step, "train/accuracy": step / 10, "mon-hum-neu/reward_mean": 2.0 ** (40 + step)}
    logger.log("training", {"step": step, "transitions": 64 * step, **row})
logger.log("evaluation", {"step": 3, "transitions": 192, "eval/normalized_score": 0.0125})
logger.close()
"""  # noqa: E501
OFFLINE = {"WANDB_MODE": "offline"}


def log_some_rows(folder, *arguments, **variables):
    """Runs PROGRAM as a user without an account: a home of its own, and none of this process's
    wandb settings."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB")
    }
    environment.update(HOME=str(folder / "home"), PYTHONPATH=str(ROOT), **variables)
    for name in ("home", "cwd"):
        (folder / name).mkdir(exist_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(folder / "quick-v0" / "run"), *arguments]
    options = dict(
        capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, check=False
    )
    result = subprocess.run(command, cwd=folder / "cwd", env=environment, **options)
    assert files_below(folder / "cwd") == [], "a run writes into its own folder only"
    return result


def read_back(data):
    """wandb's own reading of an offline run -> (rows, all records)."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(data)]
    environment = {**os.environ, "HOME": str(data)}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=True, env=environment
    )
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"], records


def plain(rows):
    """wandb's rows without its own columns."""
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


WAYS = {  # how a run comes to be logged offline -> variables
    "asked for": OFFLINE,
    "neither key nor mode": {},
    "online, but there is no key": {"WANDB_MODE": "online"},
    "no such mode": {"WANDB_MODE": "nonsense"},
    "a key, but no server": dict(
        WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="3"
    ),
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """{way: (folder, result)}; side by side, since they mostly wait."""
    folders = {way: tmp_path_factory.mktemp("offline") for way in WAYS}
    with ThreadPoolExecutor(2) as pool:
        futures = {way: pool.submit(log_some_rows, folders[way], **WAYS[way]) for way in WAYS}
    return {
        way: (folders[way] / "quick-v0" / "run", future.result()) for way, future in futures.items()
    }


@pytest.mark.pinned_stack
@pytest.mark.parametrize("way", ["asked for", "neither key nor mode"])
def test_an_offline_run_holds_what_metrics_jsonl_holds(logged, way):
    folder, result = logged[way]
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    rows, (data,) = as_logged(folder / "metrics.jsonl"), folder.glob("wandb/offline-run-*")
    assert [row["step"] for row in rows] == [1, 2, 3, 3], "rows of the same step are all kept"
    shown, records = read_back(data)
    assert plain(shown) == rows
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["run_group"], run["display_name"]) == ("NetHack", "quick-v0", "run")
    assert f"ID {run['run_id']}" in result.stdout.splitlines()
    config = {
        name: value for name, value in run["config"]["update"].items() if not name.startswith("_")
    }
    assert config == {**pomdp.asdict(TrainConfig()), "group": "quick", "batch_size": 5}


@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_in_metrics_jsonl_whatever_wandb_does(logged, way):
    """A run does not die of wandb; what does not start costs one line that says how it would."""
    folder, result = logged[way]
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert len(rows_of(folder / "metrics.jsonl")) == 4
    if way not in ("asked for", "neither key nor mode"):
        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning")]
        assert len(warnings) == 1 and "WANDB_MODE=offline" in warnings[0], result.stderr
        assert "ID None" in result.stdout


def test_disabled_writes_nothing_but_metrics_jsonl(tmp_path):
    result = log_some_rows(tmp_path, WANDB_MODE="disabled")
    assert result.stdout == "ID None\n" and "wandb" not in result.stderr
    assert files_below(tmp_path / "quick-v0") == [os.path.join("run", "metrics.jsonl")]
    assert len(rows_of(tmp_path / "quick-v0" / "run" / "metrics.jsonl")) == 4


KILLED = """
import os, re, signal, subprocess, sys, time
from pathlib import Path
import custom_nethack_pomdp as pomdp

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
logger = pomdp.RunLogger(pomdp.TrainConfig(), folder)
logger.log("training", {"step": 1, "transitions": 1})
listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
for pid in re.findall(rf"(?m)^ *(\\d+) +{os.getpid()} .*wandb", listed):
    os.kill(int(pid), signal.SIGKILL)
time.sleep(1)
for step in (2, 3, 4):
    logger.log("training", {"step": step, "transitions": step})
logger.close()
"""


@pytest.mark.pinned_stack  # older ones warn otherwise
def test_a_run_outlives_wandb_s_process(tmp_path):
    environment = {**os.environ, **OFFLINE, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "quick" / "run")]
    options = dict(capture_output=True, text=True, timeout=300, check=False)
    result = subprocess.run(command, env=environment, cwd=tmp_path, **options)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("warning: wandb failed") == 1, result.stderr
    rows = rows_of(tmp_path / "quick" / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


SAYING = """
import sys, time
import custom_nethack_pomdp as pomdp

def command():
    for number in range(3):
        pomdp.say(f"line {number}")
        pomdp.warn(f"line {number}")
        time.sleep(0.5)
    print("done", file=open(sys.argv[1], "w"))

sys.exit(pomdp.run_command(command))
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_outlives_its_console(tmp_path, terminal):
    """A pipe whose reader is gone, and a terminal that was closed."""
    mine, theirs = pty.openpty() if terminal else os.pipe()
    errors = theirs if terminal else subprocess.PIPE
    command = [sys.executable, "-c", SAYING, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=theirs, stderr=errors, text=True)
    os.close(theirs)
    assert b"line 0" in os.read(mine, 100)
    os.close(mine)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "out").read_text() == "done\n", err
    if not terminal:
        assert err.count("warning: standard output cannot be written") == 1
        assert err.count("\n") == 4, err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_console_that_is_closed_from_the_start(tmp_path, closed):
    out = tmp_path / "out"
    command = f'"{sys.executable}" -c "$SAYING" "{out}" {closed}'
    environment = {**os.environ, "SAYING": SAYING}
    options = dict(env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    result = subprocess.run(["sh", "-c", command], **options)
    assert result.returncode == 0 and out.read_text() == "done\n", result.stderr
    assert "Traceback" not in result.stderr


class NotebookOutput(io.StringIO):
    """Has no `reconfigure` and no file descriptor, as in Jupyter."""


def test_a_command_runs_in_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", NotebookOutput())
    assert pomdp.run_command(lambda: pomdp.say("hello")) == 0
    assert sys.stdout.getvalue() == "hello\n"


def test_a_file_name_that_is_not_text_is_printed(tmp_path):
    """By print too, which the scripts use."""
    program = "import custom_nethack_pomdp as pomdp\n"
    program += "pomdp.run_command(lambda: (pomdp.say('a\\udcffb'), print('a\\udcffb'), None)[2])"
    command = [sys.executable, "-c", program]
    options = dict(capture_output=True, text=True, timeout=LIMIT_S, check=False)
    result = subprocess.run(command, env={**os.environ, "PYTHONUTF8": "1"}, **options)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "a\\udcffb\n" * 2


def test_a_full_disk_costs_a_warning(tmp_path, capfd):
    pomdp.warn_once.cache_clear()
    logger = RunLogger(TrainConfig(), tmp_path)
    logger.file = open("/dev/full", "w", encoding="utf-8")
    for step in (1, 2):
        logger.log("training", {"step": step, "transitions": step})
    logger.close()
    assert capfd.readouterr().err.count("warning: writing to") == 1


# --- a whole run
SMALL_RUN = """
import sys
import custom_nethack_pomdp as pomdp

if __name__ == "__main__":
    sys.exit(pomdp.main(sys.argv[1:]))
"""


def run_on_a_terminal(command, **options):
    """Standard error is a terminal of 120 columns -> what went to standard output, and what the
    terminal got."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown = b""
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=theirs, **options
        )
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while part := os.read(mine, 65536):
                shown += part
        os.close(mine)
        assert process.wait(timeout=LIMIT_S) == 0, shown.decode()
        file.seek(0)
        return file.read().decode(), shown.decode()


@pytest.mark.pinned_stack  # older ones have no reader of offline runs
def test_a_run_logs_to_wandb_and_the_checkpoint_keeps_its_id(tmp_path, stores, stores_path):
    """wandb's rows equal metrics.jsonl, before and after resuming, and its own step goes on: it
    drops what goes back.

    The first part runs on a terminal, the second does not.
    """
    (tmp_path / "small.py").write_text(SMALL_RUN, encoding="utf-8")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB")
    }
    environment.update(HOME=str(tmp_path), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **OFFLINE)
    settings = dict(
        data_path=GAMES, store_path=stores_path, character="mon-hum-neu", batch_size=4, seq_len=8
    )
    settings.update(
        log_every=1,
        eval_every=2,
        eval_episodes=1,
        eval_processes=1,
        eval_max_steps=5,
    )
    settings.update(eval_heldout_frames=64, benchmark_sizes=False, rnn_hidden_dim=16)
    command = [
        sys.executable,
        "small.py",
        *(f"--{name}={value}" for name, value in settings.items()),
    ]
    out, shown = run_on_a_terminal([*command, "--update_steps", "2"], env=environment, cwd=tmp_path)
    assert re.search(r"100%\|[^|]+\| 2/2 ", shown), shown
    assert "TRAIN_METRICS" not in shown and re.search("^TRAIN_METRICS step=2 ", out, re.MULTILINE)
    options = dict(
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    result = subprocess.run([*command, "--update_steps", "4", "--resume", "true"], **options)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\r|%\|", result.stderr), "a bar where there is no terminal"
    (folder,) = (tmp_path / "runs").glob("custom*/*")
    parts = sorted(
        folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert len(parts) == 2 and len({path.name for path in parts}) == 1, (
        "the resumed part is another run to wandb"
    )
    shown, rows = (
        [row for part in parts for row in read_back(part.parent)[0]],
        as_logged(folder / "metrics.jsonl"),
    )
    # What metrics.jsonl has not: a table of each evaluation's games, beside the run.
    tables = [key for row in shown for key in list(row) if "/games" in key]
    assert len(tables) > 2
    for row in shown:
        for key in tables:
            row.pop(key, None)
    found = [json.loads(path.read_text()) for path in folder.rglob("games_*.table.json")]
    assert len(found) == 2 and all(len(table["data"]) == 1 for table in found)
    assert found[0]["columns"] == [*pomdp.GameResult._fields, "progression"]
    for table in found:
        (game,) = (dict(zip(table["columns"], line)) for line in table["data"])
        assert game["progression"] == pomdp.progression(game["max_depth"], game["level"])
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert plain(shown) == rows and [row["_step"] for row in shown] == list(range(6))
