# SPDX-License-Identifier: MIT
"""Studies: whole ones on the recorded games, cut off and gone on with; what a file may say; what is
still to do."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
study = pytest.importorskip("study", reason="scripts need Python 3.10")
report = pytest.importorskip("report", reason="scripts need Python 3.10")
pytestmark = [pytest.mark.pinned_stack, pytest.mark.usefixtures("one_thread")]
GAMES, STUDIES, MONK = (
    ROOT / "tests" / "data" / "nle_data",
    ROOT / "scripts" / "studies",
    "mon-hum-neu",
)
KEYS = "study algorithm variant seed characters settings config evaluation commit script_sha256 submission_sha256 command"  # noqa: E501
KEYS += " hardware versions rnn_hidden_dim parameters data transitions best_transitions wall_seconds evaluation_seconds"  # noqa: E501
KEYS += " heldout heldout_games recorded_scores curve scores depths turns lengths ends"
KEYS += " max_depths levels causes"
BASE = """
{name: small, characters: [mon-hum-neu, val-hum-neu], seeds: [1, 2], games: 2, phases: [100, 300],
 base: {rnn_hidden_dim: 16, update_steps: 3, batch_size: 4, seq_len: 8, log_every: 1, eval_every: 2,
        heldout_share: 0.3, eval_heldout_frames: 64, eval_processes: 2, eval_max_steps: 30, learning_rate: 0.03,
        algorithm: {lam: 0.5}}, evaluations: {ours: {argmax: {algorithm: {temperature: 0.001}, games: 1}}},
 arms: {ours: {}, slow: {learning_rate: 1.0e-5, algorithm: {burn_in: 0}, seeds: [2], games: 3}}}"""  # noqa: E501
SLOW, ARGMAX = "learning_rate: 1.0e-5, algorithm: {burn_in: 0}", "algorithm: {temperature: 0.001}, "
ONE = BASE.replace("seeds: [1, 2]", "seeds: [1]").replace(", val-hum-neu", "")


def to(old, new):
    assert old in BASE
    return BASE.replace(old, new)


def arguments(folder, stores_path, *more, text=BASE):
    """Writes the study's file; -> the command line for it."""
    (folder / "small.yaml").write_text(text, encoding="utf-8")
    places = {
        "data_path": GAMES,
        "store_path": stores_path,
        "runs_path": folder / "runs",
        "out": folder / "rows.jsonl",
    }
    return [f"{folder}/small.yaml", *(f"--{name}={place}" for name, place in places.items()), *more]


def rows_in(folder):
    return [
        json.loads(line)
        for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def name_of(row):
    return row["algorithm"], row["variant"], row["seed"]


def find(folder, *name):
    row = next(row for row in rows_in(folder) if name_of(row) == name)
    return row, next((folder / "runs" / "small-v0").glob(f"{name[0]}-*-seed{name[2]}"))


@pytest.fixture(scope="module")
def small(tmp_path_factory, stores, stores_path):
    """BASE's Monk, whole, with its checkpoints kept."""
    folder = tmp_path_factory.mktemp("small")
    assert study.main(arguments(folder, stores_path, "--characters", MONK, "--keep")) == 0
    return folder


def test_runs_go_seed_by_seed_over_all_arms_and_each_row_is_made_once(small, stores_path, capsys):
    rows = (small / "rows.jsonl").read_bytes()
    expected = "ours default 1, ours argmax 1, slow default 2, ours default 2, ours argmax 2"
    assert ", ".join("{} {} {}".format(*name_of(row)) for row in rows_in(small)) == expected
    assert study.main(arguments(small, stores_path, "--characters", MONK)) == 0
    assert (
        "0 rows to make" in capsys.readouterr().out and (small / "rows.jsonl").read_bytes() == rows
    )


def test_what_is_missing_is_played_with_weights_that_are_there(
    small, stores_path, tmp_path, capsys
):
    """One variant's row is gone and another is cut short: no training is repeated, and the same
    rows come again."""
    expected, lines = rows_in(small), (small / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:1] + lines[2:4]) + lines[4][:50])
    more = ["--characters", MONK, "--keep", "--out", f"{tmp_path}/rows.jsonl"]
    assert study.main([*arguments(small, stores_path), *more]) == 0
    told, again = capsys.readouterr(), sorted(rows_in(tmp_path), key=name_of)
    assert (
        "2 rows to make" in told.out and "cut short" in told.err and "TRAIN_METRICS" not in told.out
    )
    for row in (*again, *expected):
        del row["evaluation_seconds"]
    assert again == sorted(expected, key=name_of)


def test_rows_tell_what_they_come_from(small, recorded_games):
    recorded = []  # points after 30 actions
    for frames in (pomdp.read_ttyrec(source.path) for source in recorded_games[MONK]):
        scores = frames.scores[pomdp.find_first_frame(frames) : pomdp.find_end_of_play(frames)]
        recorded.append(float(scores[30] - scores[0]))
    for row in rows_in(small):
        assert row["recorded_scores"] == {MONK: recorded} and any(recorded)
        assert (
            row.keys() == set(KEYS.split())
            and row["rnn_hidden_dim"] == 16
            and row["transitions"] == 3 * 4 * 8
        )
        assert sum(row["data"][MONK][part]["games"] for part in ("training", "heldout")) == 5
        games = row["evaluation"]["games"]
        for name in ("scores", "depths", "turns", "lengths", "max_depths", "levels"):
            assert len(row[name][MONK]) == games
        assert row["causes"][MONK] == ["step limit"] * games
        assert (
            row["ends"][MONK] == {"died": 0, "no progress": 0, "step limit": games}
            and row["lengths"][MONK][0] == 30
        )
        assert not any(str(path) in json.dumps(row) for path in (ROOT, small, GAMES))
    ours, argmax, slow, other, _ = rows_in(small)
    assert ours["heldout_games"] == argmax["heldout_games"] != other["heldout_games"]
    assert ours["settings"] == other["settings"] != argmax["settings"]
    assert argmax["config"]["algorithm"] == {"lam": 0.5, "temperature": 0.001}
    assert (
        slow["config"]["algorithm"] == {"lam": 0.5, "burn_in": 0}
        and slow["config"]["learning_rate"] == 1e-5
    )
    assert slow["command"].endswith(
        f"small.yaml --data_path DATA_DIR --only slow --seeds 2 --characters {MONK}"
    )


def test_rows_hold_the_numbers_of_the_run_and_of_its_best_weights(small):
    """Played again from the run's own folder, by the main file's functions."""
    row, folder = find(small, "ours", "default", 2)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["transitions"]: line for line in metrics if "heldout/frames" in line}
    assert [point[:2] for point in row["curve"]] == [
        [at, evaluated[at]["heldout/loss_per_action"]] for at in (64, 96)
    ]
    losses = [line["train/loss_per_action"] for line in metrics if "loss" in line]
    assert [point[2] for point in row["curve"]] == pytest.approx([np.mean(losses[:2]), losses[2]])
    # not the last: the learning rate is far too high
    best = min(evaluated.values(), key=pomdp.heldout_loss)
    assert row["best_transitions"] == 64 and row["heldout"]["accuracy"] == best["heldout/accuracy"]
    algorithm, config, _ = pomdp.load_agent(folder / "best.pt", eval_episodes=2)
    assert row["parameters"] == sum(parameter.numel() for parameter in algorithm.model.parameters())
    results = pomdp.vec_evaluate(algorithm.model, MONK, config, torch.device("cpu"))
    for plural, name in (
        ("scores", "score"),
        ("depths", "depth"),
        ("turns", "turns"),
        ("lengths", "length"),
        ("max_depths", "max_depth"),
        ("levels", "level"),
        ("causes", "cause"),
    ):
        assert row[plural][MONK] == [getattr(result, name) for result in results]


def test_held_out_games_are_scored_from_their_first_frame_on_by_phase(small, games, stores):
    """Against the network's own losses on the game's first 300 frames in one piece."""
    row, folder = find(small, "ours", "default", 1)
    algorithm, config, _ = pomdp.load_agent(folder / "best.pt")
    heldout = np.flatnonzero(pomdp.choose_heldout(stores[MONK].names, config.heldout_share))
    assert row["heldout_games"][MONK].keys() == set(stores[MONK].names[heldout])
    for game in heldout:
        loader = pomdp.ChunkLoader(
            games, np.array([game]), study.replace(config, seq_len=300), 1, 1.0
        )
        batch, prev_actions = loader.batch_at(0)
        batch["prev_actions"] = torch.cat([prev_actions, batch["actions"][:, :-1]], dim=1)
        with torch.no_grad():
            logits, _ = algorithm.model.head(
                algorithm.model.backbone(batch, None)[0], batch["tty_chars"]
            )
        losses = torch.nn.functional.cross_entropy(logits[0], batch["actions"][0], reduction="none")
        counts, found = batch["mask"][0], row["heldout_games"][MONK][stores[MONK].names[game]]
        parts = [found, *found["phases"].values()]
        for part, place in zip(parts, (slice(300), slice(100), slice(100, 300))):
            expected = losses[place][counts[place]].numpy()
            assert part["loss_per_action"] == pytest.approx(expected.mean(), abs=2e-5)
            assert part["frames"] == len(expected)


def test_a_study_that_was_stopped_goes_on_from_there(tmp_path, stores, stores_path, capsys):
    text = ONE.replace("update_steps: 3", "update_steps: 40, checkpoint_every: 100").replace(
        "every: 2", "every: 20"
    )
    command = arguments(tmp_path, stores_path, "--only", "ours", text=text)
    process = subprocess.Popen(
        [sys.executable, study.__file__, *command], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("TRAIN_METRICS step=5 "):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM and rows_in(tmp_path) == []
    assert study.main(command) == 0
    assert "TRAIN_METRICS step=5 " not in capsys.readouterr().out
    row, folder = find(tmp_path, "ours", "default", 1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41)) and len(
        row["curve"]
    ) == 2
    assert len(rows_in(tmp_path)) == 2 and not list(folder.glob("*.pt"))  # not kept


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(
    tmp_path, stores, stores_path, capsys
):
    source = (ROOT / "scripts" / "references" / "bc.py").read_text()
    codes = {
        "broken": source.replace("actions = batch", "raise RuntimeError('on purpose')  # ", 1),
        "bc": source,
    }
    codes["changing"] = f"{source}\nopen('{tmp_path}/changing.py', 'a').write('#')\n"
    for arm, code in codes.items():
        (tmp_path / f"{arm}.py").write_text(code)
    arms = ", ".join(f"{arm}: {{submission: {arm}.py}}" for arm in codes)
    text = ONE[: ONE.index(" algorithm: {lam")] + f" gamma: 0.9}}, arms: {{{arms}}}}}"
    assert study.main(arguments(tmp_path, stores_path, text=text)) == 1
    told = capsys.readouterr()
    assert re.search(r"error: 2 of 3 runs failed, the first: .*on purpose.*\n$", told.err)
    assert "the submission was changed since the study began" in told.err
    (row,) = rows_in(tmp_path)
    assert row["algorithm"] == "bc" and row["config"]["submission"] == "bc.py"
    assert row["submission_sha256"] == pomdp.hashlib.sha256(source.encode()).hexdigest()


def test_an_info_with_another_loss_or_none(tmp_path, stores, stores_path, capsys):
    """Which loss is not known to be one per action: a dash. Without any nothing is trained."""
    source = (ROOT / "scripts" / "references" / "bc.py").read_text()
    arms = {"alone": '{"loss": loss.detach()}', "silent": "{}"}
    for arm, info in arms.items():
        code = re.sub(r"info = \{.*\}", f"info = {info}", source)
        assert code != source
        (tmp_path / f"{arm}.py").write_text(code)
    lines = ", ".join(f"{arm}: {{submission: {arm}.py}}" for arm in arms)
    text = ONE[: ONE.index(" algorithm: {lam")] + f" gamma: 0.9}}, arms: {{{lines}}}}}"
    assert study.main(arguments(tmp_path, stores_path, text=text)) == 1
    told = capsys.readouterr()
    assert "1 of 2 runs failed, the first: silent" in told.err
    assert "info has neither loss_per_action nor loss" in told.err
    (folder,) = (tmp_path / "runs" / "small-v0").iterdir()
    assert folder.name.startswith("alone-"), "the other began to train"
    (row,) = rows_in(tmp_path)
    for game in row["heldout_games"][MONK].values():
        assert game.keys() == {"frames", "phases"} and game["phases"]["100"] == {"frames": 100.0}
    for path in (tmp_path / "rows.jsonl", folder):
        assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr()
        assert MONK in said.out and "held-out" not in said.out + said.err


def test_one_study_writes_a_file_at_a_time(tmp_path, capsys):
    with open(tmp_path / "rows.jsonl", "a") as file:
        study.fcntl.flock(file, study.fcntl.LOCK_EX)
        assert study.main(arguments(tmp_path, tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: another study is writing to ")


# --- the file
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_sound(path):
    _, runs = study.read_study(path)
    assert {run.config.group for run in runs} == {path.stem} and runs[0].arm == "ours"
    assert (
        len({(run.config.update_steps, run.config.batch_size, run.config.seq_len) for run in runs})
        == 1
    )
    assert (
        path.stem == "tiny"
        or min(way.eval_episodes for run in runs for way in run.ways.values()) >= 100
    )


WRONG = [  # old and new text, or an option, and what the line says
    ("seeds: [1", "seedz: [1", "seeds is missing"),
    (
        "_rate: 1.0e-5",
        "_rat: 1.0e-5",
        "arm slow: unknown setting --learning_rat=1e-05; did you mean",
    ),
    ("burn_in", "burnin", "arm slow: algorithm: unknown setting 'burnin'"),
    (ARGMAX, "gamma: 1, ", "arm ours: evaluation argmax takes eval_processes"),
    ("{ours: {argmax", "{our: {argmax", "evaluations takes names of arms"),
    ("name: small", "name: a/b", "name takes letters"),
    (
        "learning_rate: 1.0e-5",
        "data_path: x",
        "arm slow: its name takes letters, digits and _ . + -, its settings",
    ),
    ("games: 3", "games: 0", "arm slow: games, eval_heldout_frames"),
    (SLOW, "submission: nowhere.py", "arm slow: [Errno 2] No such file or directory: '/"),
    ("[100, 300]", "[300, 300]", "phases takes rising multiples of 100"),
    (
        SLOW,
        "learning_rate: 0.03",
        "arm slow: default changes nothing: it has the settings of ours, default",
    ),
    (ARGMAX, "", "arm ours: argmax changes nothing: it has the settings of ours, default"),
    (BASE, "{", "small.yaml: while parsing"),
    (BASE, "- 1", "small.yaml: "),
    ("arms: {ours: {}, slow", "arms: {}, x: {slow", "arms is missing, empty"),
    ("--only=nobody", None, "--only: nobody is not among ours, slow"),
    ("--what", None, "unrecognized arguments: --what"),
    ("--data_path=/nowhere", None, "no games of mon-hum-neu in /nowhere"),
    ("--out=/nowhere/rows.jsonl", None, "No such file or directory: '/nowhere/rows.jsonl'"),
]


@pytest.mark.parametrize(("old", "new", "expected"), WRONG)
def test_a_mistake_gets_one_line_and_exit_code_2(old, new, expected, tmp_path, capsys):
    option, text = ([old], BASE) if new is None else ([], to(old, new))
    assert study.main(arguments(tmp_path, tmp_path, *option, text=text)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "runs").exists()


# --- what is still to do
CHANGES = {  # what is changed, and how many of the five rows of Monk are made anew
    ("update_steps: 3", "update_steps: 4"): 5,
    ("learning_rate: 1.0e-5", "learning_rate: 2.0e-5"): 1,
    ("games: 2,", "games: 5,"): 2,
    ("[100, 300]", "[100, 400]"): 5,
    ("log_every: 1", "log_every: 3, checkpoint_every: 7, device: cpu"): 0,  # shapes no result
}


@pytest.mark.parametrize(("change", "count"), CHANGES.items())
def test_rows_of_other_settings_are_made_anew(change, count, small, tmp_path, capsys):
    more = ["--characters", MONK, "--dry_run", "--out", f"{small}/rows.jsonl"]
    assert study.main(arguments(tmp_path, tmp_path, *more, text=to(*change))) == 0
    told = capsys.readouterr()
    assert f"{count} rows to make" in told.out and (
        "other settings or data are kept" in told.err
    ) == bool(count)


def test_rows_of_other_games_another_submission_or_other_defaults_are_made_anew(small, tmp_path):
    (row, _), (file, *_) = find(small, "slow", "default", 2), arguments(tmp_path, tmp_path)
    phases, runs = study.read_study(Path(file))
    config, data = next(run.ways["default"] for run in runs if run.arm == "slow"), row["data"]
    assert study.is_valid(row, config, phases, data)
    assert not study.is_valid(
        row, config, phases, {MONK: {**data[MONK], "games_sha256": "of others"}}
    )
    (tmp_path / "mine.py").write_text("# another algorithm")
    assert not study.is_valid(
        row, study.replace(config, submission=f"{tmp_path}/mine.py"), phases, data
    )
    del row["config"]["weight_decay"]  # a setting that the script gained since
    assert study.is_valid(row, config, phases, data)
    row["config"]["gamma"] = 0.9  # the default then
    assert not study.is_valid(row, config, phases, data)
