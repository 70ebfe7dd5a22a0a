"""Logging: metrics.jsonl always, wandb where it is configured, and the lines that readers of standard output look for."""

import contextlib
import csv
import fcntl
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

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import RunLogger, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
GAMES = ROOT / "tests" / "data" / "nle_data"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- rows and lines
class Recorder:
    """Stands where a wandb run stands."""

    def __init__(self):
        self.rows, self.steps, self.step, self.finished = [], [], 0, 0

    def log(self, row, step, commit):
        assert commit, "wandb keeps a row back until the next one"
        self.rows.append(row)
        self.steps.append(step)

    def define_metric(self, name, step_metric):
        pass

    def finish(self):
        self.finished += 1


def test_rows_are_lines_of_json_and_go_to_wandb_as_well(tmp_path):
    run = Recorder()
    logger = RunLogger(tmp_path / "metrics.jsonl", run)
    logger.log({"loss": 1.5, "train/nan": math.nan, "train/inf": -math.inf}, 3, 192)
    logger.log({"reward_mean": 7}, 4, 256)
    # Read before the file is closed: a run that is killed keeps its rows.
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text, "JSON knows neither"
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 3, "transitions": 192, "loss": 1.5, "train/nan": None, "train/inf": None},
        {"step": 4, "transitions": 256, "reward_mean": 7},
    ]
    assert [(row["step"], row["transitions"]) for row in run.rows] == [(3, 192), (4, 256)]
    assert run.rows[0]["loss"] == 1.5 and math.isnan(run.rows[0]["train/nan"]), "wandb can show what is not a number"
    assert run.finished == 0
    logger.close()
    assert run.finished == 1


def test_rows_are_added_to_what_is_there(tmp_path):
    runs = [Recorder(), Recorder()]
    for step, run in enumerate(runs, start=1):
        logger = RunLogger(tmp_path / "metrics.jsonl", run)
        logger.log({"loss": 0.5}, step, step)
        logger.close()
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [run.steps for run in runs] == [[0], [1]], "wandb drops rows whose own step goes back"


def test_lines_for_readers_of_standard_output(capfd):
    """Counts keep all their digits: a step of 1e+06 is no number of a step to a reader that looks for digits."""
    RunLogger.line("TRAIN_METRICS", {"step": 1_234_567, "transitions": 512_000_000, "loss": 0.123456789})
    RunLogger.line("TEST_METRICS", {"normalized_score": 0.0213, "normalized_score_mon_hum_neu": 1e-7})
    out = capfd.readouterr().out.splitlines()
    assert out[0] == "TRAIN_METRICS step=1234567 transitions=512000000 loss=0.123457"
    assert re.fullmatch(r"TEST_METRICS normalized_score=0\.0213 normalized_score_mon_hum_neu=1e-07", out[1])


@pytest.mark.parametrize("text, kept", [
    ('{"step": 1}\n{"step": 2}\n{"step": 2, "a": 1}\n{"step": 3}\n', 3),
    ('{"step": 1}\n{"step": 2, "lo', 1),  # a row that was cut short
    ('{"step": 1}\nno json\n[1]\n{"loss": 1}\n{"step": null}\n', 1),
    ("", 0),
    (None, 0),  # no file yet
])  # fmt: skip
def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path, text, kept):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    pomdp.cut_metrics(path, 2)
    assert path.read_text(encoding="utf-8").splitlines() == (text or "").splitlines()[:kept]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- wandb itself, offline
PROGRAM = """
import math, sys
from pathlib import Path
import custom_nethack_pomdp as pomdp

folder, run_id = Path(sys.argv[1]), (sys.argv[2:] or [None])[0]
folder.mkdir(parents=True, exist_ok=True)
run = pomdp.start_wandb(pomdp.parse_config(["--group", "quick", "--batch_size", "5"]), folder, run_id)
print("ID", run.id if run is not None else None)
logger = pomdp.RunLogger(folder / "metrics.jsonl", run)
for step in (1, 2, 3):
    logger.log({"loss": 3.0 / step, "train/accuracy": step / 10, "mon-hum-neu/reward_mean": 2.0 ** (40 + step)}, step, 64 * step)
games = [{"character": "mon-hum-neu", "game": k, "score": score, "cause": cause} for k, score, cause in ((0, 7.0, "died"), (1, 9.0, ""))]
logger.log({"eval/normalized_score": 0.0125, "eval/autoascend": 1.0}, 3, 192, lambda wandb: logger.evaluation_media(wandb, games))
if run is not None:
    (folder / "recorded.bz2").write_bytes(b"a game")
logger.keep_game(str(folder / "recorded.bz2"), "3_mon-hum-neu_best.ttyrec3.bz2")
logger.close()
"""
MEDIA = ("train/weights", "eval/games", "eval/scores_table")  # what wandb has beside the rows


def plain(rows):
    """wandb's rows without its own columns and what it alone shows."""
    return [{key: value for key, value in row.items() if not key.startswith(("_", *MEDIA))} for row in rows]


def table_of(folder, key):
    """The last table of this name among a run's files -> rows as dicts."""
    files = sorted(folder.glob(f"wandb/offline-run-*/files/media/table/{key}_*.table.json"), key=lambda path: path.stat().st_mtime_ns)
    content = json.loads(files[-1].read_text(encoding="utf-8"))
    return [dict(zip(content["columns"], row)) for row in content["data"]]


def log_some_rows(folder, name, *arguments, **variables):
    """Runs PROGRAM as a user without an account would: a home of its own, and none of this process's wandb settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment.update(HOME=str(folder / "home"), PYTHONPATH=str(ROOT), WANDB_DIR=str(folder / "elsewhere"), **variables)
    (folder / "home").mkdir(exist_ok=True)
    (folder / "cwd").mkdir(exist_ok=True)
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(folder / name), *arguments], cwd=folder / "cwd", env=environment, text=True,
                            capture_output=True, timeout=300, stdin=subprocess.DEVNULL, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert files_below(folder / "cwd") == [], "a run writes into its own folder only"
    return result


def read_back(run_folder):
    """wandb's own reading of an offline run -> (rows, records of the run's beginning)."""
    (data,) = run_folder.glob("wandb/offline-run-*/*.wandb") if run_folder.is_dir() else [run_folder]
    result = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(data.parent)], capture_output=True, text=True,
                            timeout=120, check=True, env={**os.environ, "HOME": str(data.parent)})  # fmt: skip
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"], records


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run logged with WANDB_MODE=offline, and one logged without mode and key."""
    folder = tmp_path_factory.mktemp("offline")
    return folder, {name: log_some_rows(folder, name, **variables) for name, variables in
                    (("asked", {"WANDB_MODE": "offline"}), ("alone", {}))}  # fmt: skip


@pytest.mark.parametrize("name", ["asked", "alone"])
def test_an_offline_run_holds_what_metrics_jsonl_holds(offline, name):
    folder, _ = offline
    logged, records = read_back(folder / name)
    rows = rows_of(folder / name / "metrics.jsonl")
    assert plain(logged) == rows
    assert len(rows) == 4 and [row["step"] for row in rows] == [1, 2, 3, 3], "rows of the same step are all kept"
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {metric.get("glob_name", metric.get("name")): metric.get("step_metric") for metric in metrics}
    for name in {name for row in rows for name in row} | {"reward_mean", "mon-hum-neu/end_died", "normalized_score_low"}:
        fitting = [axis for pattern, axis in axes.items() if pattern == name or (pattern[-1] == "*" and name.startswith(pattern[:-1]))]
        expected = None if name in ("step", "transitions") else "step" if name.startswith(("loss", "train/")) else "transitions"
        assert fitting == [expected], name


def test_an_offline_run_holds_games_and_chart_and_recordings(offline):
    folder = offline[0] / "asked"
    assert table_of(folder, "eval/games") == [{"character": "mon-hum-neu", "game": 0, "score": 7.0, "cause": "died"},
                                              {"character": "mon-hum-neu", "game": 1, "score": 9.0, "cause": ""}]  # fmt: skip
    lines = {(row["lineKey"], row["step"]): row["lineVal"] for row in table_of(folder, "eval/scores_table")}
    assert lines == {("eval/normalized_score", 192): 0.0125, ("eval/autoascend", 192): 1.0}
    (kept,) = folder.glob("wandb/offline-run-*/files/games/*.bz2")
    assert kept.name == "3_mon-hum-neu_best.ttyrec3.bz2" and kept.read_bytes() == b"a game" and not kept.is_symlink()
    assert "scripts/watch.py --game" in (kept.parent / "README.txt").read_text(encoding="utf-8")
    _, records = read_back(folder)
    uploaded = {file["path"] for record in records if record["type"] == "files" for file in record["files"]["files"]}
    assert {"games/README.txt", f"games/{kept.name}"} <= uploaded
    manifests = [record["artifact"]["manifest"]["contents"] for record in records if record["type"] == "artifact"]
    waiting = [item["local_path"] for contents in manifests for item in contents]
    assert waiting and all(Path(path).is_file() and folder in Path(path).parents for path in waiting), "the run's folder is not all of it"


def test_an_offline_run_is_named_and_described(offline):
    folder, results = offline
    _, records = read_back(folder / "asked")
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["run_group"], run["display_name"]) == ("NetHack", "quick-v0", "asked")
    assert f"ID {run['run_id']}" in results["asked"].stdout.splitlines()
    config = run["config"]["update"]
    expected = {**pomdp.asdict(TrainConfig()), "group": "quick", "batch_size": 5}
    assert {name: value for name, value in config.items() if not name.startswith("_")} == expected


def test_without_key_and_mode_it_goes_offline_and_says_so(offline):
    folder, results = offline
    assert "offline" in results["alone"].stdout, "the user must learn where the rows are"
    assert len(list((folder / "alone" / "wandb").glob("offline-run-*"))) == 1
    assert "deprecated" not in results["alone"].stderr


def test_disabled_writes_nothing_but_metrics_jsonl(tmp_path):
    result = log_some_rows(tmp_path, "disabled", WANDB_MODE="disabled")
    assert "ID None" in result.stdout and "wandb" not in (result.stdout + result.stderr).replace("ID None", "")
    assert files_below(tmp_path) == [os.path.join("disabled", "metrics.jsonl")]
    assert len(rows_of(tmp_path / "disabled" / "metrics.jsonl")) == 4


def test_a_resumed_run_keeps_its_id(tmp_path):
    """wandb then shows both parts as one run, along the step that is logged with each row."""
    first = log_some_rows(tmp_path, "run", WANDB_MODE="offline")
    run_id = re.search(r"^ID (\w+)$", first.stdout, re.MULTILINE).group(1)
    second = log_some_rows(tmp_path, "run", run_id, WANDB_MODE="offline")
    assert f"ID {run_id}" in second.stdout.splitlines()
    parts = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert 1 <= len(parts) <= 2  # within one second wandb takes one folder for both


TROUBLES = {
    "asked for, but there is no key": {"WANDB_MODE": "online"},
    "no such mode": {"WANDB_MODE": "nonsense"},
    "a key, but no server": {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"},
}


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """{trouble: (folder, result)}; side by side, since they mostly wait."""
    folders = {name: tmp_path_factory.mktemp("trouble") for name in TROUBLES}
    with ThreadPoolExecutor(len(TROUBLES)) as pool:
        futures = {name: pool.submit(log_some_rows, folders[name], "run", **variables) for name, variables in TROUBLES.items()}
    return {name: (folders[name], future.result()) for name, future in futures.items()}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_run_does_not_die_of_wandb(troubled, trouble):
    folder, result = troubled[trouble]
    assert re.search("^warning: wandb.*offline", result.stderr, re.MULTILINE) and "Traceback" not in result.stderr
    logged, _ = read_back(folder / "run")
    assert len(logged) == len(rows_of(folder / "run" / "metrics.jsonl")) == 4


def test_a_server_that_does_not_answer_is_not_waited_for_long(tmp_path, monkeypatch):
    """wandb's own limit is 90 seconds; nobody wants to wait that long for a training to begin. The user may still choose."""
    import wandb

    limits = []

    def init(settings=None, mode=None, **_):
        limit = settings.get("init_timeout") if isinstance(settings, dict) else getattr(settings, "init_timeout", None)
        limits.append((mode, float(os.environ.get("WANDB_INIT_TIMEOUT") or limit or 90)))
        return Recorder()

    monkeypatch.setattr(wandb, "init", init)
    for name in ("WANDB_MODE", "WANDB_INIT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    pomdp.start_wandb(TrainConfig(), tmp_path, None)
    ((mode, limit),) = limits
    assert mode is None, "with a key it goes online, unless WANDB_MODE says otherwise"
    assert limit <= 45
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "70")
    pomdp.start_wandb(TrainConfig(), tmp_path, None)
    assert limits[1] == (None, 70.0)


def test_wandb_that_is_not_installed(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert pomdp.start_wandb(TrainConfig(), tmp_path, None) is None
    assert "metrics.jsonl" in capfd.readouterr().out and files_below(tmp_path) == []


# --- a whole run
def test_a_run_logs_to_wandb_and_the_checkpoint_keeps_its_id(tmp_path, stores, stores_path):
    """Trained by the loop itself (a small network): wandb's rows equal metrics.jsonl, before and after resuming.

    The first part runs on a terminal, the second does not.
    """
    program = tmp_path / "small.py"
    program.write_text(SMALL_RUN, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment.update(HOME=str(tmp_path), PYTHONPATH=str(ROOT), WANDB_MODE="offline", OMP_NUM_THREADS="1")
    settings = dict(data_path=GAMES, store_path=stores_path, checkpoints_path=tmp_path / "runs", character="mon-hum-neu", batch_size=4,
                    seq_len=8, log_every=1, eval_every=2, eval_episodes=1, eval_processes=1, eval_workers=1, eval_max_steps=5,
                    eval_heldout_frames=64, eval_record=tmp_path / "games")  # fmt: skip
    command = [sys.executable, str(program), *(token for name, value in settings.items() for token in (f"--{name}", str(value)))]
    out, shown = run_on_a_terminal([*command, "--update_steps", "2"], env=environment, cwd=tmp_path)
    check_first_lines(out, tmp_path, stores_path)
    assert re.search(r"100%\|[^|]+\| 2/2, \d+:\d+ left, loss [\d.]+, score 0\.\d{4}, [\d,]+ transitions/s", shown), shown
    assert re.search(r"playing mon-hum-neu: .*1/1 .*last score \d+", shown) and "held-out games: " in shown
    assert "TRAIN_METRICS" not in shown and re.search("^TRAIN_METRICS step=2 ", out, re.MULTILINE)
    result = subprocess.run([*command, "--update_steps", "4", "--resume", "true"], env=environment, cwd=tmp_path, capture_output=True,
                            text=True, timeout=300, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\r|%\||held-out games|transitions/s", result.stderr), "a bar where there is no terminal"
    for name in ("best", "last"):
        line = rf"^{name} game of mon-hum-neu \(score \d+\): python scripts/watch.py --game (.*)$"
        file = re.search(line, result.stdout, re.MULTILINE)
        assert Path(file.group(1)).is_file()
    (folder,) = (tmp_path / "runs").glob("*/*")
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len({path.name for path in parts}) == 1, "the resumed part is another run to wandb"
    logged = [row for part in parts for row in read_back(part)[0]]
    rows = rows_of(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert plain(logged) == rows and [row["_step"] for row in logged] == list(range(6))
    check_media(folder, logged, rows)


def run_on_a_terminal(command, **options):
    """Standard error is a terminal of 120 columns -> what went to standard output, and what the terminal got."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown = b""
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=theirs, **options)
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while part := os.read(mine, 65536):
                shown += part
        os.close(mine)
        assert process.wait(timeout=60) == 0, shown.decode()
        file.seek(0)
        return file.read().decode(), shown.decode()


def check_first_lines(out, folder, stores_path):
    store = pomdp.Games([pomdp.open_or_build_store(str(GAMES), str(stores_path), "mon-hum-neu")])
    kept = store.heldout(0.1)
    parts = [f"{int(part.sum())} ({int(store.frames[part].sum()):,} frames)" for part in (~kept, kept)]
    assert f"games of mon-hum-neu: {parts[0]} for training, {parts[1]} held out\n" in out
    model = pomdp.make_algorithm(TrainConfig(), "cpu").model
    head = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(("backbone.", "shared.0.weight")))
    backbone = sum(parameter.numel() for parameter in pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 32, 2).parameters())
    assert f"model: {backbone:,} parameters in the backbone, {head + 32 * 120:,} in the head\n" in out
    assert re.search(r"^device: cpu \(1 threads\), float32, processes: 1$", out, re.MULTILINE)
    assert re.search(r"^batch: 4 rows x 8 steps = 32 transitions; [\d,]+ updates a pass, 2 in all$", out, re.MULTILINE)
    assert f"run: {folder}/runs/custom-nethack-pomdp-v0/custom-mon-hum-neu-seed42; games are recorded in {folder}/games\n" in out


def check_media(folder, logged, rows):
    for row in logged:
        if "loss" in row:
            bins = {key.split(".", 1)[1]: value for key, value in row.items() if key.startswith("train/weights.")}
            assert bins["_type"] == "histogram", sorted(row)
    played = table_of(folder, "eval/games")
    with open(folder / "4_mon-hum-neu_games.csv", encoding="utf-8", newline="") as file:
        assert [{name: str(value) for name, value in game.items()} for game in played] == list(csv.DictReader(file))
    (game,) = played
    assert game["end"] == "step limit" and game["length"] == 5 and game["score"] == rows[-1]["reward_mean"]
    names = ("eval/normalized_score", "eval/normalized_score_mon_hum_neu", "eval/autoascend")
    expected = {(name, row["transitions"]): row[name] for row in rows if "eval/autoascend" in row for name in names}
    lines = {(row["lineKey"], row["step"]): row["lineVal"] for row in table_of(folder, "eval/scores_table")}
    assert lines == expected and len(lines) == 6
    for part in ("2_mon-hum-neu_best", "2_mon-hum-neu_last", "4_mon-hum-neu_best", "4_mon-hum-neu_last"):
        (kept,) = folder.glob(f"wandb/offline-run-*/files/games/{part}.ttyrec3.bz2")
        assert sum(len(piece.actions) for piece in pomdp.read_ttyrec(str(kept))) >= 5
    assert Path(game["recording"]).read_bytes() == kept.read_bytes()


SMALL_RUN = """
import sys
import custom_nethack_pomdp as pomdp

backbone = pomdp.ModelBackbone
pomdp.ModelBackbone = lambda actions, *_: backbone(actions, 32, 2)
if __name__ == "__main__":
    sys.exit(pomdp.main(sys.argv[1:]))
"""
