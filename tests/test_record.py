"""scripts/record_games.py and the scripted player: what is recorded, that it repeats, and what happens on mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nle import dataset, nethack

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(ROOT / "scripts"))
import record_games
from scripted_player import ScriptedPlayer

KEYS = [int(action) for action in nethack.ACTIONS]
CHARACTER, SEED, STEPS = "ran-hum-neu", 5, 200
QUITTING = [27, 27, ord("q") + 128, ord("y")]


def record(out, *more):
    """Runs the command line as a user would; returns its standard output."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "record_games.py"),
        "--character",
        CHARACTER,
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--seed", str(SEED), *more], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(folder):
    """Frames of the only game in a folder, from the player's first on, and its keys."""
    (path,) = folder.glob("*.ttyrec3.bz2")
    frames = pomdp.read_ttyrec(str(path))
    frames = pomdp.Frames(*(array[pomdp.find_first_frame(frames) :] for array in frames))
    return frames, [KEYS[action] for action in frames.actions]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(standard output, folder) of two games of 200 keys."""
    out = tmp_path_factory.mktemp("recorded") / "out"
    return record(out, "--games", "2", "--max_steps", str(STEPS)), out


def replay(name, steps):
    """Plays game `name` again in this process: the screens that the player saw and the keys it pressed."""
    character, seed, k = name.rsplit("-", 2)
    core, disp, chance = record_games.seeds_of(int(seed), int(k))
    player, game = ScriptedPlayer(np.random.default_rng(chance)), pomdp.NetHackGame(character)
    seen, keys, done, obs = [], [], False, game.reset(core, disp)
    while not done and len(keys) < steps:
        seen.append(obs)
        keys.append(
            KEYS[
                player.act({name: obs[name] for name in ("tty_chars", "tty_colors", "tty_cursor")})
            ]
        )
        obs, _, done, _ = game.step(nethack.ACTIONS.index(keys[-1]))
    game.close()
    return [
        np.stack([obs[name] for obs in seen]) for name in ("tty_chars", "tty_colors", "tty_cursor")
    ], keys


def test_layout_is_that_of_nle_s_dataset(recorded, tmp_path):
    text, out = recorded
    assert "2 games recorded, 0 left out; 2 were quit" in text
    assert sorted(os.listdir(out)) == [f"{CHARACTER}-{SEED}-{k}" for k in range(2)]
    for folder in out.iterdir():
        game, log = sorted(folder.iterdir())
        assert (
            re.fullmatch(r"nle\.\d+\.0\.ttyrec3\.bz2", game.name)
            and log.stat().st_mode & 0o777 == 0o644
        )
        assert re.fullmatch(r"[^\n]*\trole=Ran\t[^\n]*\tdeath=quit\t[^\n]*\n", log.read_text())
    dataset.db.create(str(tmp_path / "db"))
    dataset.add_nledata_directory(str(out), "games", str(tmp_path / "db"))
    assert (
        len(dataset.TtyrecDataset("games", batch_size=1, dbfilename=str(tmp_path / "db"))._gameids)
        == 2
    )


def test_frames_are_what_the_player_saw(recorded):
    for folder in recorded[1].iterdir():
        (frames, pressed), (seen, keys) = read(folder), replay(folder.name, STEPS)
        for array, wanted in zip(frames, seen):
            np.testing.assert_array_equal(array[:STEPS], wanted)
        # A game cut short is quit by keys that are actions too; what follows is NLE's own way past the closing screens.
        assert pressed[: STEPS + 4] == keys + QUITTING and set(pressed[STEPS + 4 :]) == {ord(" ")}


def test_same_seed_same_games_whatever_the_workers(recorded, tmp_path):
    record(tmp_path / "out", "--games", "2", "--max_steps", str(STEPS), "--workers", "2")
    one, two = (
        [read(folder / f"{CHARACTER}-{SEED}-{k}")[0] for k in range(2)]
        for folder in (recorded[1], tmp_path / "out")
    )
    for array, again in zip(one[0] + one[1], two[0] + two[1]):
        np.testing.assert_array_equal(array, again)
    assert not np.array_equal(one[0].chars[50], one[1].chars[50]), "all games have the same seeds"


def test_adding_to_a_recording(recorded, capsys):
    _, out = recorded
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    same = ["--character", CHARACTER, "--seed", str(SEED), "--out", str(out), "--max_steps", "20"]
    # nothing is played when part of it exists already
    assert record_games.main([*same, "--games", "3"]) == 2
    assert re.fullmatch("error: .* already holds 2 of these games.*\n", capsys.readouterr().err)
    assert record_games.main([*same, "--games", "1", "--first", "2"]) == 0
    assert sorted(os.listdir(out)) == [f"{CHARACTER}-{SEED}-{k}" for k in range(3)]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys):
    for says, arguments in {
        "unknown character 'mon-hum-neut'; did you mean mon-hum-neu": [
            "--character",
            "mon-hum-neut",
        ],
        "--player wants module:function": ["--player", "scripted_player"],
        "cannot load the player": ["--player", "no_such_module:function"],
        "it is not callable": ["--player", "scripted_player:KEYS"],
        "--games must be at least 1": ["--games", "0"],
        "/dev/null/games": ["--out", os.devnull + "/games"],
    }.items():
        usual = ["--character", CHARACTER, "--games", "1", "--out", str(tmp_path / "out")]
        assert record_games.main(usual + arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "out").exists()


PLAYERS = """
class Player:
    def __init__(self, rng): self.left = list(self.keys)
    def act(self, obs): return self.left.pop(0)

class Waiter(Player): keys = 1100 * [38]  # ESC
class Wrong(Player): keys = [38, 121]  # an action that does not exist
class Quitter(Player): keys = [65, 7]  # #quit and y
"""


@pytest.mark.parametrize(
    "player, more, code, says, keys",
    [
        ("Quitter", [], 0, "1 games recorded, 0 left out; 0 were quit", QUITTING[2:]),
        ("Waiter", [], 0, "1 games recorded, 0 left out; 1 were quit", 1000 * [27] + QUITTING),
        ("Waiter", ["--leave_out_cut"], 0, "0 games recorded, 1 left out; 1 were quit", None),
        ("Wrong", [], 2, "the player answered 121", None),
    ],
)
def test_any_player(tmp_path, monkeypatch, capsys, player, more, code, says, keys):
    """One that gets nowhere is stopped, one that errs leaves nothing behind; found in the current folder."""
    (tmp_path / "players_of_this_test.py").write_text(PLAYERS)
    monkeypatch.chdir(tmp_path)
    spec = ["--player", f"players_of_this_test:{player}", "--out", "out"]
    assert record_games.main(["--character", CHARACTER, "--games", "1", *spec, *more]) == code
    assert says in "".join(capsys.readouterr())
    assert len(os.listdir("out")) == (keys is not None)
    for name in os.listdir("out"):
        assert read(tmp_path / "out" / name)[1][: len(keys)] == keys


@pytest.mark.pinned_stack  # the older NLE plays about one game in ten differently
@pytest.mark.parametrize("name", ["mon-hum-neu-1-4", "ran-hum-neu-1-2", "val-hum-neu-1-4"])
def test_recorded_games_are_made_by_this_player(name):
    """Some of the games in tests/data, played again: tests/data is of this player and this NLE."""
    (frames, pressed), (seen, keys) = read(DATA / "nle_data" / name), replay(name, 10_000)
    assert pressed[: len(keys)] == keys and set(pressed[len(keys) :]) == {ord(" ")}
    np.testing.assert_array_equal(frames.chars[: len(keys)], seen[0])
