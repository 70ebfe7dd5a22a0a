"""scripts/record_games.py and the scripted player: what is recorded, that it repeats, and what happens on mistakes."""

import glob
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nle import dataset as nld
from nle import nethack

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(ROOT / "scripts"))

import record_games
from scripted_player import ScriptedPlayer

from custom_nethack_pomdp import NetHackGame

KEYS = [int(action) for action in nethack.ACTIONS]
CHARACTER, SEED, STEPS = "ran-hum-neu", 5, 200
SEEN = ("tty_chars", "tty_colors", "tty_cursor")


def record(out, *more, cwd=ROOT):
    """Runs the command line as a user would; returns the finished process."""
    command = [sys.executable, str(ROOT / "scripts" / "record_games.py"), "--character", CHARACTER, "--out", str(out), *more]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def read(root, db):
    """{folder: arrays of all frames of its game}, read by nle.dataset."""
    nld.db.create(str(db))
    nld.add_nledata_directory(str(root), "games", str(db))
    data = nld.TtyrecDataset("games", batch_size=1, seq_length=32, dbfilename=str(db), shuffle=False)
    games = {}
    for gameid in data._gameids:
        pieces = data.get_ttyrec(gameid, chunk_size=500)
        frames = {key: np.concatenate([piece[key][0] for piece in pieces]) for key in (*SEEN, "keypresses", "scores", "gameids")}
        real = frames["gameids"] != 0  # the last piece is padded
        games[os.path.dirname(data.get_paths(gameid)[0])] = {key: values[real] for key, values in frames.items()}
    return games


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(finished process, folder, frames of the games in it) of two games of 200 keys."""
    folder = tmp_path_factory.mktemp("recorded")
    done = record(folder / "out", "--games", "2", "--seed", str(SEED), "--max_steps", str(STEPS))
    assert done.returncode == 0, done.stderr
    return done, folder / "out", read(folder / "out", folder / "db")


@pytest.fixture(scope="module")
def test_games(tmp_path_factory):
    """Frames of the games in tests/data."""
    return read(DATA / "nle_data", tmp_path_factory.mktemp("data") / "db")


def replay(name, steps):
    """Plays game `name` again in this process: what the player saw (lists of arrays) and the keys it pressed."""
    character, seed, k = name.rsplit("-", 2)
    core, disp, chance = record_games.game_seeds(int(seed), int(k))
    player, game = ScriptedPlayer(np.random.default_rng(chance)), NetHackGame(character)
    seen, keys, done, obs = {key: [] for key in SEEN}, [], False, game.reset(core, disp)
    while not done and len(keys) < steps:
        for key in SEEN:
            seen[key].append(obs[key])
        action = player.act({key: obs[key] for key in SEEN})  # nothing but the terminal
        keys.append(KEYS[action])
        obs, _, done, _ = game.step(action)
    game.close()
    return {key: np.stack(values) for key, values in seen.items()}, keys


def frames_of_play(frames, seen):
    """The frames from the player's first on: those before show how NLE itself answers the start-up screens with SPACE."""
    first = next(i for i in range(5) if np.array_equal(frames["tty_chars"][i], seen["tty_chars"][0]))
    assert set(frames["keypresses"][:first].tolist()) <= {ord(" ")}
    return {key: values[first:] for key, values in frames.items()}


def test_layout(recorded):
    done, out, games = recorded
    assert sorted(os.listdir(out)) == [f"{CHARACTER}-{SEED}-{k}" for k in range(2)] == sorted(games)
    for folder in out.iterdir():
        files = sorted(path.name for path in folder.iterdir())
        assert len(files) == 2 and re.fullmatch(r"nle\.\d+\.0\.ttyrec3\.bz2", files[0])
        assert files[1] == files[0].replace("0.ttyrec3.bz2", "xlogfile")
        line = (folder / files[1]).read_text()
        assert line.count("\n") == 1 and "\trole=Ran\t" in line and "\tdeath=quit\t" in line
    assert "2 games recorded" in done.stdout and "2 games cut short" in done.stdout


def test_frames_are_what_the_player_saw(recorded):
    _, _, games = recorded
    for name, frames in games.items():
        seen, keys = replay(name, STEPS)
        assert len(keys) == STEPS
        frames = frames_of_play(frames, seen)
        for key in SEEN:
            np.testing.assert_array_equal(frames[key][:STEPS], seen[key])
        assert frames["keypresses"][:STEPS].tolist() == keys
        # A game cut short is quit by keys that are actions too; what follows is NLE's own way past the closing screens.
        quitting = frames["keypresses"][STEPS:STEPS + 4].tolist()
        assert quitting == [KEYS[action] for action in record_games.QUIT]
        assert set(frames["keypresses"][STEPS + 4:].tolist()) == {ord(" ")}
        assert set(frames["keypresses"].tolist()) <= set(KEYS)


def test_same_seed_same_games_whatever_the_workers(recorded, tmp_path):
    _, _, games = recorded
    done = record(tmp_path / "out", "--games", "2", "--seed", str(SEED), "--max_steps", str(STEPS), "--workers", "2")
    assert done.returncode == 0, done.stderr
    again = read(tmp_path / "out", tmp_path / "db")
    assert games.keys() == again.keys()
    for name in games:
        for key in (*SEEN, "keypresses", "scores"):
            np.testing.assert_array_equal(games[name][key], again[name][key])
    first, second = games.values()
    assert not np.array_equal(first["tty_chars"][50], second["tty_chars"][50])  # other games have other seeds


def test_adding_to_a_recording(recorded, capsys):
    _, out, _ = recorded
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    same = ["--character", CHARACTER, "--seed", str(SEED), "--out", str(out), "--max_steps", "20"]
    assert record_games.main([*same, "--games", "3"]) == 2  # nothing is played when part of it exists already
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "already holds 2 of these games" in error
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert record_games.main([*same, "--games", "1", "--first", "2"]) == 0
    assert sorted(os.listdir(out)) == [f"{CHARACTER}-{SEED}-{k}" for k in range(3)]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != out)


@pytest.mark.parametrize("arguments, message", [
    (["--character", "mon-hum-neut"], "unknown character 'mon-hum-neut'; did you mean mon-hum-neu"),
    (["--player", "scripted_player"], "--player wants module:function"),
    (["--player", "no_such_module:function"], "cannot load the player"),
    (["--player", "scripted_player:NoSuchPlayer"], "cannot load the player"),
    (["--player", "scripted_player:KEYS"], "is not callable"),
    (["--games", "0"], "--games must be at least 1"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--out", os.devnull + "/games"], "cannot write to"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(arguments, message, tmp_path, capsys):
    usual = ["--character", CHARACTER, "--games", "1", "--out", str(tmp_path / "out")]
    assert record_games.main(usual + arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


PLAYERS = """
class Waiter:  # presses ESC for ever
    def __init__(self, rng): pass
    def act(self, obs): return 38

class Wrong:  # an action that does not exist
    def __init__(self, rng): pass
    def act(self, obs): return 121

class Quitter:  # ends the game itself, by #quit and y
    def __init__(self, rng): self.keys = [65, 7]
    def act(self, obs): return self.keys.pop(0)
"""


@pytest.fixture
def players(tmp_path, monkeypatch):
    (tmp_path / "players_of_this_test.py").write_text(PLAYERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["--character", CHARACTER, "--games", "1", "--out", str(tmp_path / "out"), "--player"]


def test_any_player(players, tmp_path, capsys):
    assert record_games.main([*players, "players_of_this_test:Quitter"]) == 0
    assert "cut short" not in capsys.readouterr().out  # the player ended it, not we
    frames, = read(tmp_path / "out", tmp_path / "db").values()
    assert bytes(frames["keypresses"].tolist()).strip(b" ") == b"\xf1y"


def test_a_player_that_gets_nowhere_is_stopped(players, tmp_path, capsys):
    assert record_games.main([*players, "players_of_this_test:Waiter"]) == 0
    assert "1 quit there and recorded" in capsys.readouterr().out
    frames, = read(tmp_path / "out", tmp_path / "db").values()
    assert 1000 <= len(frames["keypresses"]) < 1030


def test_leaving_out_what_was_cut(players, tmp_path, capsys):
    assert record_games.main([*players, "players_of_this_test:Waiter", "--leave_out_cut"]) == 0
    assert "0 quit there and recorded, 1 left out" in capsys.readouterr().out
    assert os.listdir(tmp_path / "out") == []


def test_a_wrong_action_leaves_nothing_behind(players, tmp_path, capsys):
    assert record_games.main([*players, "players_of_this_test:Wrong"]) == 2
    assert "the player answered 121" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


def test_recorded_games_of_the_tests(test_games):
    """tests/data holds what its README says: whole games, at least four a character, in less than 2.4 MB."""
    characters = [name.rsplit("-", 2)[0] for name in test_games]
    assert {character: characters.count(character) >= 4 for character in characters} == {
        "mon-hum-neu": True, "val-hum-neu": True, "ran-hum-neu": True}  # fmt: skip
    for log in glob.glob(str(DATA / "nle_data" / "*" / "*.xlogfile")):
        assert "death=quit" not in Path(log).read_text()
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 2.4e6
    command = re.search(r"--games (\d+) --seed (\d+) --max_steps (\d+) --leave_out_cut", (DATA / "README.md").read_text())
    games, seed, steps = command.groups()
    for name, frames in test_games.items():
        assert name.rsplit("-", 2)[1] == seed and int(name.rsplit("-", 2)[2]) < int(games)
        assert len(frames["keypresses"]) < int(steps) + 20


def test_the_player_never_stalls(test_games):
    """The turn counter moves at least every 200 keys, in every game of tests/data."""
    for name, frames in test_games.items():
        last, since = None, 0
        for row in frames["tty_chars"][:, 23].copy():
            shown = re.search(rb" T:(\d+)", row.tobytes())
            turn = shown.group(1) if shown else last
            since = since + 1 if turn == last else 0
            last = turn
            assert since < 200, name


@pytest.mark.pinned_stack  # the older NLE plays about one game in ten differently
def test_recorded_games_are_made_by_this_player(test_games):
    """The shortest of the games in tests/data, played again: tests/data is of this player and this NLE."""
    name = min(test_games, key=lambda name: len(test_games[name]["keypresses"]))
    frames = test_games[name]
    seen, keys = replay(name, len(frames["keypresses"]))
    frames = frames_of_play(frames, seen)
    assert frames["keypresses"][:len(keys)].tolist() == keys
    np.testing.assert_array_equal(frames["tty_chars"][:len(keys)], seen["tty_chars"])
    assert set(frames["keypresses"][len(keys):].tolist()) == {ord(" ")}


def test_the_player_is_small():
    assert len((ROOT / "scripts" / "scripted_player.py").read_text().splitlines()) <= 300
