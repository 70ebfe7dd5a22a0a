"""Studies: what a file may say, what is still to do, and whole studies on the recorded games, cut off and gone on with."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
study = pytest.importorskip("study", reason="scripts need Python 3.10")
pytestmark = pytest.mark.pinned_stack

GAMES = ROOT / "tests" / "data" / "nle_data"
STUDIES = ROOT / "scripts" / "studies"
MONK, VALKYRIE = "mon-hum-neu", "val-hum-neu"
KEYS = {"algorithm", "variant", "seed", "commit", "command", "hardware", "data", "transitions", "wall_seconds", "heldout", "train_loss",
        "heldout_games", "recorded_scores", "curve", "scores", "ends", "evaluation", "settings", "config", "rnn_hidden_dim",
        "depths"}  # fmt: skip


def command(file, folder, stores_path, *more):
    return [sys.executable, str(ROOT / "scripts" / "study.py"), str(file), "--data_path", str(GAMES), "--store_path", str(stores_path),
            "--runs_path", str(folder / "runs"), "--out", str(folder / "rows.jsonl"), *more]  # fmt: skip


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, env=environment, check=False)


def name_of(row):
    return row["algorithm"], row["variant"], row["seed"]


def rows_in(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# A whole study
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory, stores, stores_path):
    """scripts/studies/tiny.yaml in three parts: one arm alone with its weights kept, then killed in the midst, then to its end."""
    folder = tmp_path_factory.mktemp("tiny")
    first = run(STUDIES / "tiny.yaml", folder, stores_path, "--only", "bc", "--keep")
    assert first.returncode == 0, first.stderr
    after_first = (folder / "rows.jsonl").read_bytes()
    whole = command(STUDIES / "tiny.yaml", folder, stores_path)
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with process.stdout:
        for line in process.stdout:
            if line.startswith("[1/4]"):  # the first new row is written; what follows is lost
                process.kill()
    assert process.wait() == -signal.SIGKILL
    after_kill = (folder / "rows.jsonl").read_bytes()
    last = run(STUDIES / "tiny.yaml", folder, stores_path, "--keep")
    assert last.returncode == 0, last.stderr
    return dict(folder=folder, first=first, after_first=after_first, after_kill=after_kill, last=last, rows=rows_in(folder))


def test_every_row_is_made_once_whatever_was_cut_off(tiny):
    names = [("bc", "default", 1), ("ours", "default", 1), ("ours", "argmax", 1), ("ours", "default", 2), ("ours", "argmax", 2)]
    assert [name_of(row) for row in tiny["rows"]] == names
    whole = (tiny["folder"] / "rows.jsonl").read_bytes()
    assert tiny["after_kill"].startswith(tiny["after_first"]) and whole.startswith(tiny["after_kill"])  # nothing is written over
    assert tiny["after_first"].count(b"\n") == 1 and tiny["after_kill"].count(b"\n") in (2, 3)
    there = tiny["after_kill"].count(b"\n")
    assert f"3 runs, 5 rows; {there} rows are there, {5 - there} to make" in tiny["last"].stdout
    assert f"[{5 - there}/{5 - there}] ours/argmax, {MONK}, seed 2: held-out loss " in tiny["last"].stdout
    assert "left" in tiny["last"].stdout


def test_a_finished_training_is_not_repeated_for_what_is_missing(tiny):
    """Killed after its first row, the arm's weights were still there: argmax was played with them."""
    log = next((tiny["folder"] / "runs" / "tiny-v0").glob(f"ours-*-{MONK}-seed1.log")).read_text(encoding="utf-8")
    assert log.count("run: ") == 1
    assert len(list((tiny["folder"] / "runs" / "tiny-v0").glob("ours-*-seed1*/"))) == 1


def test_rows_tell_what_they_come_from(tiny):
    for row in tiny["rows"]:
        assert row.keys() >= KEYS
        assert row["rnn_hidden_dim"] == 32 and row["transitions"] == 4 * 4 * 8 and row["best_transitions"] in (64, 128)
        assert row["data"][MONK]["heldout"]["games"] >= 1 and len(row["data"][MONK]["fingerprint"]) == 64
        assert sum(row["data"][MONK][part]["games"] for part in ("training", "heldout")) == len(pomdp.find_games(str(GAMES), MONK).games)
        assert len(row["scores"][MONK]) == len(row["depths"][MONK]) == sum(row["ends"][MONK].values()) == 2
        assert row["evaluation"]["eval_max_steps"] == 30 and max(row["lengths"][MONK]) <= 30
        text = json.dumps(row)
        assert str(ROOT) not in text and str(tiny["folder"]) not in text and str(GAMES) not in text
    by_name = {name_of(row): row for row in tiny["rows"]}
    assert by_name["bc", "default", 1]["config"]["submission"] == "scripts/references/bc.py"
    assert by_name["bc", "default", 1]["evaluation"]["eval_clear_state"] is False
    assert by_name["ours", "default", 1]["evaluation"]["temperature"] == 1.0
    assert by_name["ours", "argmax", 1]["evaluation"]["temperature"] == 0.001
    # One training, acting in two ways: the same losses, other games.
    ours, argmax = by_name["ours", "default", 1], by_name["ours", "argmax", 1]
    assert ours["heldout"] == argmax["heldout"] and ours["curve"] == argmax["curve"] and ours["settings"] != argmax["settings"]
    assert ours["settings"] == by_name["ours", "default", 2]["settings"] and ours["heldout"] != by_name["ours", "default", 2]["heldout"]
    again = f"--data_path DATA_DIR --only ours --seeds 1 --characters {MONK}"
    assert ours["command"] == f"python scripts/study.py scripts/studies/tiny.yaml {again}"


def run_folder(tiny, arm, seed):
    return next(path for path in (tiny["folder"] / "runs" / "tiny-v0").glob(f"{arm}-*-seed{seed}") if path.is_dir())


def test_runs_use_the_copy_of_the_scripts_made_at_the_start(tiny):
    described = pomdp.read_json(run_folder(tiny, "bc", 1) / "config.json")
    assert Path(described["command"][0]).parts[-3].startswith("code-") and Path(described["config"]["submission"]).name == "bc.py"
    script = Path(described["command"][0]).parents[1] / "custom_nethack_pomdp.py"
    assert pomdp.sha256_of_file(script) == described["script_sha256"] == tiny["rows"][0]["script_sha256"]


def test_rows_hold_the_runs_own_numbers(tiny):
    row = next(row for row in tiny["rows"] if name_of(row) == ("ours", "default", 2))
    metrics = study.read_metrics(run_folder(tiny, "ours", 2))
    evaluated = {one["transitions"]: one for one in metrics if "heldout/loss_per_action" in one}
    assert [point[0] for point in row["curve"]] == sorted(evaluated) == [64, 128]
    assert [point[1] for point in row["curve"]] == [evaluated[at]["heldout/loss_per_action"] for at in (64, 128)]
    best = min(evaluated.values(), key=lambda one: one["heldout/loss_per_action"])
    assert row["best_transitions"] == best["transitions"]
    assert row["heldout"] == {name[len("heldout/"):]: value for name, value in best.items() if name.startswith("heldout/")}
    assert {"loss_per_action", "accuracy", "value_rmse", "explained_variance", "effective_sample_size"} <= row["heldout"].keys()


def test_rows_hold_each_held_out_game_by_itself(tiny, stores):
    games = pomdp.Games([stores[MONK]])
    heldout = {name for name, chosen in zip(games.names, games.heldout(0.1)) if chosen}
    for row in tiny["rows"]:
        found = row["heldout_games"][MONK]
        assert set(found) == heldout and all(0 < one["loss_per_action"] < 8 and one["frames"] > 0 for one in found.values())
    by_name = {name_of(row): row["heldout_games"] for row in tiny["rows"]}
    assert by_name["ours", "default", 1] == by_name["ours", "argmax", 1] != by_name["ours", "default", 2]


def test_games_one_by_one_are_all_games_together(stores, monkeypatch):
    """Ours clears its state at each game's beginning, so a row that plays all games scores each as if it were alone."""
    values = dict(heldout_share=0.5, eval_heldout_frames=10**6, seq_len=32, character=MONK)
    config = study.make_config(values, 32, "test")
    games = pomdp.Games(list(stores.values()))
    chosen = np.flatnonzero(games.heldout(0.5))
    algorithm = pomdp.make_algorithm(config, torch.device("cpu"))
    monkeypatch.setattr(study, "ROWS_A_GAME", 1)
    found = study.score_heldout_games(config, games, {"model": algorithm.model.state_dict()})
    assert set(found) == {games.names[game] for game in chosen} and len(found) > 1
    loader = pomdp.ChunkLoader(games, chosen, 1, 32, None, 1.0, config.clip_range)
    together = pomdp.evaluate_heldout(algorithm, loader, 10**6, torch.device("cpu"), contextlib.nullcontext, lambda part: [part])
    for name in ("loss_per_action", "accuracy"):
        mean = sum(one[name] * one["frames"] for one in found.values()) / sum(one["frames"] for one in found.values())
        assert mean == pytest.approx(together[name], abs=2e-6)
    assert len({one["loss_per_action"] for one in found.values()}) == len(found)


def test_points_of_recorded_games_at_the_step_limit(tiny, stores):
    """As the recordings themselves have them."""
    expected = []
    for source in pomdp.find_games(str(GAMES), MONK).games:
        scores = np.concatenate([piece.scores for piece in pomdp.frames_of_play(pomdp.read_ttyrec(source.path))])
        expected.append(float(scores[min(30, len(scores) - 1)] - scores[0]))
    assert tiny["rows"][0]["recorded_scores"] == {MONK: expected}
    whole = study.recorded_scores(pomdp.Games([stores[MONK]]), 10**9)
    assert max(whole) > 100 and all(late >= early for late, early in zip(whole, expected))


def test_games_are_played_with_the_best_weights(tiny):
    """The same games again in this process, from best.pt."""
    row, folder = next(row for row in tiny["rows"] if name_of(row) == ("ours", "default", 2)), run_folder(tiny, "ours", 2)
    assert not (folder / "last.pt").exists()  # of use to a training only
    content = pomdp.read_checkpoint(folder / "best.pt")
    config = study.make_config({**json.loads(content["config"]), "rnn_hidden_dim": 2048}, 32, "test")
    algorithm = pomdp.make_algorithm(config, torch.device("cpu"))
    algorithm.model.load_state_dict(content["model"])
    pool = pomdp.GamePool(2, 1)
    try:
        results = pomdp.play_games(pool, algorithm.model, MONK, 2, 50, 30, torch.device("cpu"))
    finally:
        pool.close()
    for plural, name in (("scores", "score"), ("depths", "depth"), ("turns", "turns"), ("lengths", "length")):
        assert row[plural][MONK] == [getattr(one, name) for one in results]


def test_weights_are_deleted_when_their_rows_are_written_unless_kept(tiny):
    kept = {arm: sorted(path.name for path in run_folder(tiny, arm, seed).glob("*.pt")) for arm, seed in (("bc", 1), ("ours", 2))}
    assert kept == {"bc": ["best.pt"], "ours": ["best.pt"]}  # without the optimizer's checkpoints
    pieces = tiny["after_kill"].count(b"\n")
    assert pieces == 2 or not list(run_folder(tiny, "ours", 1).glob("*.pt"))  # done before the kill, and without --keep


def test_a_finished_study_does_nothing(tiny, stores_path):
    before = (tiny["folder"] / "rows.jsonl").read_bytes()
    again = run(STUDIES / "tiny.yaml", tiny["folder"], stores_path)
    assert again.returncode == 0 and "5 rows are there, 0 to make" in again.stdout
    assert (tiny["folder"] / "rows.jsonl").read_bytes() == before


STOPPED = """
name: stopped
rnn_hidden_dim: 32
characters: mon-hum-neu
seeds: 3
games: 1
base: {update_steps: 60, batch_size: 4, seq_len: 8, log_every: 1, eval_every: 20, checkpoint_every: 500, eval_heldout_frames: 64,
       eval_processes: 1, eval_workers: 1, eval_max_steps: 10}
arms: {ours: {}}
"""


def test_a_training_that_was_stopped_goes_on_from_there(tmp_path, stores, stores_path):
    file = tmp_path / "stopped.yaml"
    file.write_text(STOPPED)
    process = subprocess.Popen(command(file, tmp_path, stores_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    logs, deadline = tmp_path / "runs" / "stopped-v0", time.monotonic() + 120
    while not any("TRAIN_METRICS step=5 " in log.read_text() for log in logs.glob("*.log")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    (folder,) = (path for path in logs.glob("ours-*") if path.is_dir())
    stopped_at = study.read_metrics(folder)[-1]["step"]
    assert 5 <= stopped_at < 60 and (folder / "last.pt").exists() and not (tmp_path / "rows.jsonl").exists()

    done = run(file, tmp_path, stores_path)
    assert done.returncode == 0, done.stderr
    assert [path for path in logs.glob("ours-*") if path.is_dir()] == [folder]
    assert f"resuming {folder} at step " in next(logs.glob("*.log")).read_text()
    updates = [row["step"] for row in study.read_metrics(folder) if "loss" in row]
    assert updates == list(range(1, 61))
    (row,) = rows_in(tmp_path)
    assert row["seed"] == 3 and [point[0] for point in row["curve"]] == [640, 1280, 1920]
    assert not list(folder.glob("*.pt"))  # not kept
    assert not list(logs.glob("*.json"))  # nor the tasks


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(tmp_path, stores, stores_path):
    submission = tmp_path / "broken.py"
    submission.write_text((ROOT / "scripts" / "references" / "bc.py").read_text().replace(
        "        actions = batch", "        raise RuntimeError('broken on purpose')\n        actions = batch"))  # fmt: skip
    file = tmp_path / "failing.yaml"
    text = STOPPED.replace("stopped", "failing").replace("60", "2")
    file.write_text(text.replace("{ours: {}}", "{broken: {submission: broken.py}, ours: {}}"))
    done = run(file, tmp_path, stores_path)
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr and "broken on purpose" in done.stderr
    assert [name_of(row) for row in rows_in(tmp_path)] == [("ours", "default", 3)]


def test_one_study_runs_once_at_a_time(tmp_path):
    (tmp_path / "runs" / "tiny-v0").mkdir(parents=True)
    lock = pomdp.claim(tmp_path / "runs" / "tiny-v0")
    done = run(STUDIES / "tiny.yaml", tmp_path, tmp_path)
    os.close(lock)
    assert done.returncode == 2 and "is running already" in done.stderr and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------------------------------------------------
BASE = """
name: small
rnn_hidden_dim: 16
characters: [mon-hum-neu, val-hum-neu]
seeds: [1, 2]
games: 7
base: {update_steps: 10, algorithm: {lam: 0.5}}
arms:
  ours: {}
  slow: {learning_rate: 1.0e-5, algorithm: {burn_in: 0}, seeds: [2], games: 3}
evaluations:
  ours: {argmax: {algorithm: {temperature: 0.001}, games: 5}}
"""


def read(tmp_path, text):
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return study.read_study(file)


def test_runs_go_seed_by_seed_and_character_by_character_over_all_arms(tmp_path):
    found = [(run.seed, run.config.character, run.arm, [(playing.variant, playing.games) for playing in run.playings])
             for run in read(tmp_path, BASE).runs]  # fmt: skip
    ours, slow = [("default", 7), ("argmax", 5)], [("default", 3)]
    assert found == [(1, MONK, "ours", ours), (2, MONK, "slow", slow), (1, VALKYRIE, "ours", ours), (2, VALKYRIE, "slow", slow),
                     (2, MONK, "ours", ours), (2, VALKYRIE, "ours", ours)]  # fmt: skip


def test_settings_are_merged(tmp_path):
    ours, slow = read(tmp_path, BASE).runs[:2]
    assert ours.config.algorithm == {"lam": 0.5} and slow.config.algorithm == {"lam": 0.5, "burn_in": 0}
    assert ours.playings[1].config.algorithm == {"lam": 0.5, "temperature": 0.001}
    assert (slow.config.learning_rate, slow.config.update_steps, slow.config.train_seed) == (1e-5, 10, 2)
    assert {run.config.rnn_hidden_dim for run in (ours, slow)} == {16} and ours.config.eval_episodes == 0


def test_together_trains_one_agent_on_all_characters(tmp_path):
    runs = read(tmp_path, BASE + "together: true\n").runs
    assert {run.config.character for run in runs} == {f"{MONK},{VALKYRIE}"} and len(runs) == 3


def test_the_network_is_the_benchmarks_unless_told_otherwise(tmp_path):
    assert read(tmp_path, BASE.replace("rnn_hidden_dim: 16", "")).runs[0].config.rnn_hidden_dim == 2048


@pytest.mark.parametrize("name", [path.stem for path in sorted(STUDIES.glob("*.yaml"))])
def test_shipped_studies_are_sound(name):
    found = study.read_study(STUDIES / f"{name}.yaml")
    assert found.name == name
    arms = {run.arm: run for run in found.runs}
    if name in ("cpu_small", "full"):
        assert {"ours", "bc_ours", "bc", "iql", "cql", "plain_head", "sharp_weights", "no_burn_in", "lam_0", "no_prev_action", "crop_only",
                "value_bins", "averaged_weights"} == set(arms) - {"few_games"}  # fmt: skip
        assert {playing.variant for playing in arms["ours"].playings} == {"default", "argmax", "temperature_0.7", "not_cleared"}
        assert len({(run.config.update_steps, run.config.batch_size, run.config.seq_len) for run in found.runs}) == 1  # one budget
    # No two arms are the same by mistake.
    hashes = {study.settings_hash(run, playing): (run.arm, playing.variant) for run in found.runs for playing in run.playings}
    assert len(hashes) == len({(run.arm, playing.variant) for run in found.runs for playing in run.playings})


WRONG = {
    "unknown key": (BASE.replace("seeds: [1", "seedz: [1"), "unknown key 'seedz'; did you mean 'seeds'?"),
    "unknown arm key": (BASE.replace("learning_rate", "learning_rat"),
                        "arm slow: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    "unknown algorithm key": (BASE.replace("burn_in", "burnin"), "unknown setting 'burnin'"),
    "unknown evaluation key": (BASE.replace("{argmax: {", "{argmax: {learning_rate: 1.0, "),
                               "evaluation argmax: unknown key 'learning_rate'"),
    "evaluation of no arm": (BASE.replace("  ours: {argmax", "  our: {argmax"), "unknown key 'our'; did you mean 'ours'?"),
    "no name": (BASE.replace("name: small", ""), "'name' is missing"),
    "a name with a slash": (BASE.replace("name: small", "name: a/b"), "is no name"),
    "a path": (BASE.replace("learning_rate: 1.0e-5", "data_path: x"), "data_path is not an arm's to set"),
    "a resized network": (BASE.replace("update_steps: 10", "rnn_hidden_dim: 10"), "rnn_hidden_dim is not an arm's to set"),
    "games during training": (BASE.replace("update_steps: 10", "eval_episodes: 5"), "eval_episodes must be 0"),
    "no held-out loss": (BASE.replace("update_steps: 10", "eval_heldout_frames: 0"), "weights are chosen by held-out loss"),
    "a value of another type": (BASE.replace("update_steps: 10", "update_steps: ten"), "update_steps: 'ten' is not a valid int"),
    "a value out of range": (BASE.replace("update_steps: 10", "update_steps: 0"), "update_steps must be above 0"),
    "seeds twice": (BASE.replace("[1, 2]", "[1, 1]"), "names a number twice"),
    "half a game": (BASE.replace("games: 7", "games: 0.5"), "whole numbers of at least 1"),
    "an unknown character": (BASE.replace("[mon-hum-neu", "[mon-hum-nue"), "unknown character 'mon-hum-nue'"),
    "a missing submission": (BASE.replace("learning_rate: 1.0e-5", "submission: nowhere.py"), "nowhere.py does not exist"),
    "not YAML": ("{", "not valid YAML"),
    "no mapping": ("- 1", "takes lines such as 'name: value'"),
    "no arms": (BASE[: BASE.index("arms:")] + "arms: {}\n", "arms is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_file_gets_one_line_and_exit_code_2(name, tmp_path, capsys):
    text, expected = WRONG[name]
    file = tmp_path / "study.yaml"
    file.write_text(text)
    assert study.main([str(file), "--dry_run", "--out", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("study: error: ") and error.count("\n") == 1 and expected in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.yaml"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.yaml"], "cannot read the study nowhere.yaml"),
        ([], "which study?"),
        (["study.yaml", "--only", "nobody"], "the study has no arm 'nobody'; there are ours, slow"),
        (["study.yaml", "--only", "slow", "--seeds", "1"], "leave nothing of the study"),
        (["study.yaml", "--seed", "x", "--what"], "--what"),
        (["study.yaml", "--data_path", "nowhere"], "nowhere does not exist"),
        (["study.yaml", "--runs_path", "study.yaml/x"], "cannot write to"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line_and_exit_code_2(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(BASE)
    assert study.main([*arguments, *(["--out", "rows.jsonl"] if arguments else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("study: error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "rows.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is still to do
# ----------------------------------------------------------------------------------------------------------------------
def finished_rows(found):
    """A row of each playing, as far as the plan looks at it."""
    return [dict(study=found.name, algorithm=run.arm, variant=playing.variant, seed=run.seed, characters=run.config.characters, scores={},
                 data={name: {"games_sha256": "these"} for name in run.config.characters}, settings=study.settings_hash(run, playing),
                 config=study.row_config(run, playing)) for run in found.runs for playing in run.playings]  # fmt: skip


def described(found, digest="these"):
    return {(name, run.config.heldout_share): {"games_sha256": digest} for run in found.runs for name in run.config.characters}


def missing(found, rows, data=None):
    todo, stale = study.plan(found, found.runs, rows, data)
    return [(item.run.arm, item.run.seed, item.run.config.character, playing.variant) for item in todo for playing in item.missing], stale


def test_only_missing_rows_are_made(tmp_path):
    found = read(tmp_path, BASE)
    rows = finished_rows(found)
    assert len(rows) == 10 and missing(found, rows, described(found)) == ([], 0)
    left = [row for row in rows if (row["algorithm"], row["variant"], row["seed"]) != ("ours", "argmax", 2)]
    assert missing(found, left, described(found)) == ([("ours", 2, MONK, "argmax"), ("ours", 2, VALKYRIE, "argmax")], 0)


@pytest.mark.parametrize(
    ("before", "after", "stale"),
    [
        ("update_steps: 10", "update_steps: 11", 10),
        ("learning_rate: 1.0e-5", "learning_rate: 2.0e-5", 2),
        ("games: 7", "games: 8", 4),
        ("temperature: 0.001", "temperature: 0.002", 4),
        ("update_steps: 10", "update_steps: 10, eval_max_steps: 5", 10),
        ("rnn_hidden_dim: 16", "rnn_hidden_dim: 17", 10),
        ("update_steps: 10", "update_steps: 10, log_every: 3, data_workers: 1, checkpoint_every: 7", 0),  # shapes no result
    ],
)
def test_rows_of_other_settings_are_stale(before, after, stale, tmp_path):
    rows = finished_rows(read(tmp_path, BASE))
    todo, found = missing(read(tmp_path, BASE.replace(before, after)), rows)
    assert found == len(todo) == stale


def test_rows_of_other_games_are_stale(tmp_path):
    found = read(tmp_path, BASE)
    assert missing(found, finished_rows(found), described(found, "others"))[1] == 10


def test_a_setting_the_script_gains_later_leaves_rows_valid_and_another_default_does_not(tmp_path):
    found = read(tmp_path, BASE)
    rows = finished_rows(found)
    for row in rows:
        del row["config"]["weight_decay"]
    assert missing(found, rows) == ([], 0)
    for row in rows:
        row["config"]["gamma"] = 0.9  # this script's default then
    assert missing(found, rows)[1] == 10


def test_another_submission_makes_rows_stale(tmp_path):
    text = BASE.replace("learning_rate: 1.0e-5, algorithm: {burn_in: 0}", "submission: mine.py").replace(", algorithm: {lam: 0.5}", "")
    source = (ROOT / "scripts" / "references" / "bc.py").read_text()
    (tmp_path / "mine.py").write_text(source)
    rows = finished_rows(read(tmp_path, text))
    assert missing(read(tmp_path, text), rows)[1] == 0
    (tmp_path / "mine.py").write_text(source + "\n# changed\n")
    assert missing(read(tmp_path, text), rows)[1] == 2


def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path, capsys):
    file, whole = tmp_path / "rows.jsonl", finished_rows(read(tmp_path, BASE))
    study.append_row(file, whole[0])
    with open(file, "a") as out:
        out.write(json.dumps(whole[1])[:50])
    assert study.read_rows(file) == whole[:1] and "cut short" in capsys.readouterr().err
    study.append_row(file, whole[2])
    assert study.read_rows(file) == [whole[0], whole[2]]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers from a run's metrics
# ----------------------------------------------------------------------------------------------------------------------
METRICS = [
    {"transitions": 100, "train/loss_per_action": 4.0, "charts/SPS": 50.0},
    {"transitions": 200, "train/loss_per_action": 2.0, "charts/SPS": 100.0},
    {"transitions": 200, "heldout/loss_per_action": 3.5, "heldout/accuracy": 0.1},
    {"transitions": 950, "train/loss_per_action": 1.5, "charts/SPS": 75.0},
    {"transitions": 1000, "train/loss_per_action": 0.5, "charts/SPS": 50.0},
    {"transitions": 1000, "heldout/loss_per_action": None, "heldout/accuracy": 0.2},
]


def test_numbers_of_a_run():
    assert study.learning_curve(METRICS) == [[200, 3.5, 3.0], [1000, None, 1.0]]
    assert study.loss_near_end(METRICS) == 1.0  # of 950 and 1000, the last tenth
    assert study.loss_near_end(METRICS[:3]) == 2.0 and study.loss_near_end([]) is None
    assert study.seconds_of_updates(METRICS) == 2.0 + 1.0 + 10.0 + 1.0


def test_data_are_described_alike_wherever_they_lie(stores):
    store = stores[MONK]
    found = study.describe_data(store, 0.1)
    heldout = pomdp.Games([store]).heldout(0.1)
    assert found["heldout"] == {"games": int(heldout.sum()), "frames": int(store.frames[heldout].sum())}
    assert found["training"]["frames"] + found["heldout"]["frames"] == store.meta["frames"]
    assert found["games_sha256"] != study.describe_data(stores[VALKYRIE], 0.1)["games_sha256"]
    assert found["fingerprint"] == store.meta["fingerprint"] and np.all(np.array(list(found["training"].values())) > 0)


def test_time_left_counts_trainings_and_games():
    pace = study.Pace()
    assert pace.left(1, 10) == "time left not known yet"
    pace.trainings, pace.games = [100.0, 200.0], [(10, 20.0), (30, 20.0)]
    assert pace.left(2, 100) == "about 7 min left"  # 2 x 150 + 100 x 1 seconds
    assert pace.left(0, 50) == "about 50 s left"
    assert study.duration(8000) == "2 h 13 min"
