# SPDX-License-Identifier: MIT
"""scripts/record_games.py and its players: what is recorded, that it repeats, and what happens on
mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIMIT_S
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
        [*command, "--seed", str(SEED), *more], capture_output=True, text=True, timeout=LIMIT_S
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
    """Plays game `name` again in this process: the screens that the player saw and its keys."""
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
        # A game cut short is quit by keys that are actions too; what follows is NLE's own way past
        # the closing screens.
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
    assert (
        record_games.main([*same, "--games", "3"]) == 2
    )  # nothing is played when part of it exists already
    assert re.fullmatch("error: .* already holds 2 of these games.*\n", capsys.readouterr().err)
    assert record_games.main([*same, "--games", "1", "--first", "2"]) == 0
    assert sorted(os.listdir(out)) == [f"{CHARACTER}-{SEED}-{k}" for k in range(3)]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_unfinished(tmp_path, number, workers):
    out = tmp_path / "out"
    line = [sys.executable, str(ROOT / "scripts" / "record_games.py"), "--character", CHARACTER]
    line += ["--games", "4", "--workers", workers, "--out", str(out)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(out.glob(".recording.*/*/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    told, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + number and "Traceback" not in error
    assert told == "stopped; the games that were over are kept\n"
    assert not list(out.glob(".*"))


def test_files_are_as_private_as_the_umask_says(tmp_path):
    before = os.umask(0o077)
    try:
        record(tmp_path / "out", "--games", "1", "--max_steps", "5")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_one_player_at_a_time(capsys):
    usual = ["--character", CHARACTER, "--games", "1", "--out", "out"]
    players = (["--autoascend", "a"], ["--checkpoint", "b"], ["--player", "c:d"])
    for one, two in zip(players, players[1:] + players[:1]):
        assert record_games.main([*usual, *one, *two]) == 2
        assert "not allowed with argument" in capsys.readouterr().err


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
        "is not a checkout of AutoAscend": ["--autoascend", str(tmp_path)],
        "no_such_file.pt cannot be read as a checkpoint": ["--checkpoint", "no_such_file.pt"],
        "--temperature is for --checkpoint alone": ["--temperature", "0.5"],
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

class Tired(Player):
    keys = [38, 38]
    def play(self, game):
        for key in self.keys: game.step(key)
        return "tired"
"""


@pytest.mark.parametrize(
    "player, more, code, says, keys",
    [
        ("Quitter", [], 0, "1 games recorded, 0 left out; 0 were quit", QUITTING[2:]),
        ("Waiter", [], 0, "1 games recorded, 0 left out; 1 were quit", 1000 * [27] + QUITTING),
        ("Waiter", ["--leave_out_cut"], 0, "0 games recorded, 1 left out; 1 were quit", None),
        ("Wrong", [], 2, "the player answered 121", None),
        (
            "Tired",
            [],
            0,
            "broke off\n  broken off: ran-hum-neu-0-0 at key 2: tired\n",
            2 * [27] + QUITTING,
        ),
        ("Tired", ["--leave_out_cut"], 0, "0 games recorded, 1 left out; 1 were quit, 1 of", None),
    ],
)
def test_any_player(tmp_path, monkeypatch, capsys, player, more, code, says, keys):
    """One that gets nowhere is stopped, one that errs leaves nothing behind, one that breaks off is
    quit; found in the current folder."""
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


OBSERVER = """
from scripted_player import ScriptedPlayer

class Observer:
    observation_keys = ("glyphs", "blstats", "inv_strs", "tty_chars", "tty_colors", "tty_cursor")
    def __init__(self, rng): self.player = ScriptedPlayer(rng)
    def play(self, game):
        obs, done = game.obs, False
        while not done:
            raw = dict(zip(self.observation_keys, game.env.unwrapped.last_observation))
            assert raw["glyphs"].shape == (21, 79) and raw["inv_strs"].shape == (55, 80)
            assert (raw["tty_cursor"] == obs["tty_cursor"]).all()
            obs, _, done, _ = game.step(self.player.act(obs))
"""


def test_more_observations_and_a_loop_of_its_own_change_no_recording(
    recorded, tmp_path, monkeypatch, capsys
):
    (tmp_path / "observer_of_this_test.py").write_text(OBSERVER)
    monkeypatch.chdir(tmp_path)
    line = ["--character", CHARACTER, "--seed", str(SEED), "--games", "1", "--out", "out"]
    line += ["--max_steps", str(STEPS), "--player", "observer_of_this_test:Observer"]
    assert record_games.main(line) == 0
    assert "1 games recorded, 0 left out; 1 were quit\n" in capsys.readouterr().out
    name = f"{CHARACTER}-{SEED}-0"
    for array, wanted in zip(read(tmp_path / "out" / name)[0], read(recorded[1] / name)[0]):
        np.testing.assert_array_equal(array, wanted)


# What our player knows of AutoAscend, played by a few lines: it looks at the same observations, as
# they were in NLE 0.7.3, marks its plans on a map, goes on after an exception of its own but not
# after KeyboardInterrupt, and breaks off in some games by a failed assertion, or after pressing ESC
# one call deeper each time.
STAND_IN = {
    "__init__": "",
    "agent": """
from collections import namedtuple
import numpy as np
from nle.nethack import actions as A

BLStats = namedtuple("BLStats", [f"field_{number}" for number in range(26)])

class Agent:
    def __init__(self, env, seed=0, verbose=False, panic_on_errors=False):
        self.env, self.rng = env, np.random.RandomState(seed)

    def step(self, key):
        try:
            with self.env.debug_tiles([(0, 0)], color=(255, 0, 0)), self.env.debug_log("a plan"):
                obs, reward, done, info = self.env.step(A.ACTIONS[A.ACTIONS.index(key)])
        except Exception as error:
            return
        assert not done and obs["glyphs"].dtype == np.int16 and len(obs["misc"]) == 3
        blstats = BLStats(*obs["blstats"])
        assert obs["chars"][blstats.field_1, blstats.field_0] == ord("@")
        if obs["misc"][0]:  # it asks on the top line
            assert obs["tty_cursor"][0] - 1 == -1

    def lose_its_way(self):
        self.step(27)
        (lambda: self.lose_its_way())()

    def main(self):
        breaks_off = self.rng.randint(2) == 0
        for _ in range(60):
            self.step(self.rng.choice(list(b"hjklyubn")))
            self.step(27)
        if breaks_off:
            assert self.rng.randint(2, size=2)[1], "no\\nidea"
            self.lose_its_way()
        for key in (241, 121):  # #quit, y
            self.step(key)
        raise RuntimeError("it plays on after the game's end")
""",
}


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like AutoAscend's repository."""
    folder = tmp_path / "checkout" / "autoascend"
    folder.mkdir(parents=True)
    for name, text in STAND_IN.items():
        (folder / f"{name}.py").write_text(text)
    return folder.parent


def test_autoascend(checkout, tmp_path):
    """One worker plays 0, 1, 2; two share them, from another depth of calls; and game 2 is played
    alone."""
    line = ["--autoascend", str(checkout), "--games"]
    told = record(tmp_path / "one", *line, "3")
    record(tmp_path / "two", *line, "3", "--workers", "2")
    record(tmp_path / "alone", *line, "1", "--first", "2")
    names = [f"{CHARACTER}-{SEED}-{k}" for k in range(3)]
    games = [read(tmp_path / "one" / name)[0] for name in names]
    again = [read(tmp_path / "two" / name)[0] for name in names]
    for array, wanted in zip(sum(again, ()), sum(games, ())):
        np.testing.assert_array_equal(array, wanted)
    for array, wanted in zip(read(tmp_path / "alone" / names[2])[0], games[2]):
        np.testing.assert_array_equal(array, wanted)
    first, *broken_off = told.splitlines()[:3]
    assert first.startswith("3 games recorded, 0 left out; 2 were quit, 2 of them after the player")
    assert broken_off[0] == f"  broken off: {names[0]} at key 120: AssertionError in main: no idea"
    lost = rf"  broken off: {names[2]} at key (\d+): RecursionError in .*recursion depth.*"
    end = int(re.fullmatch(lost, broken_off[1])[1])
    keys = [read(tmp_path / "one" / name)[1] for name in names]
    assert keys[0][120:124] == QUITTING and keys[1][120:122] == QUITTING[2:]
    # the last call too deep may have been one of the game's own, after the key was pressed
    assert 500 < end < 700 and set(keys[2][120:end]) == {27}
    assert bytes(keys[2][end:]).lstrip(b"\x1b").startswith(bytes(QUITTING[2:]))
    assert keys[0][:120] != keys[1][:120] != keys[2][:120] != keys[0][:120]


def test_autoascend_without_its_packages(checkout, tmp_path, monkeypatch, capsys):
    with (checkout / "autoascend" / "agent.py").open("a") as file:
        file.write("import no_such_package")
    monkeypatch.setattr(sys, "path", sys.path[:])
    line = ["--character", CHARACTER, "--games", "1", "--autoascend", str(checkout)]
    assert record_games.main([*line, "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "No module named 'no_such_package'" in error
    assert re.search(r"pip install -r \S+/requirements-autoascend-checkout\.txt", error)
    for name in [name for name in sys.modules if name.startswith("autoascend.")]:
        del sys.modules[name]


# The first keys in this game of a checkout of AutoAscend at its commit 8527910.
AUTOASCEND_KEYS = (
    b"\x1b\x1b\x18  \xe5  @\\ :/M #te\rb\x1b\x1b\x1b#te\rb\x1b\\ :/M snsjsjsjsjsjslslslsjsjjjsjslsnsusnsu"  # noqa: E501
    b"snsusnsusk\x04k\x04kksks#te\rb\x1bks/M ksu/M \xe5  kkskskskslsks:,:lsjshbjjjsb"
)


@pytest.mark.skipif(
    find_spec("nethackers") is None,
    reason="no package nethackers: scripts/requirements-autoascend.txt, Python 3.11 or later",
)
@pytest.mark.pinned_stack  # another NLE may play the game differently
def test_autoascend_of_the_package_plays_as_a_checkout_does(tmp_path):
    steps = len(AUTOASCEND_KEYS)
    line = ["--player", "autoascend", "--games", "1", "--max_steps", str(steps)]
    told = record(tmp_path / "out", *line)
    assert told.startswith("1 games recorded, 0 left out; 1 were quit\n"), "the bot broke off"
    _, keys = read(tmp_path / "out" / f"{CHARACTER}-{SEED}-0")
    assert bytes(keys[:steps]) == AUTOASCEND_KEYS and keys[steps : steps + 4] == QUITTING


@pytest.mark.parametrize(
    "version, says",
    [
        ((3, 11, 0), r"pip install -r \S+/requirements-autoascend\.txt$"),
        ((3, 10, 9), r"Python 3\.11 .*/requirements-autoascend-checkout\.txt.* --autoascend"),
    ],
)
def test_autoascend_without_its_package(version, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nethackers", None)
    monkeypatch.setattr(sys, "version_info", version)
    line = ["--character", CHARACTER, "--games", "1", "--player", "autoascend"]
    assert record_games.main([*line, "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(says, error)


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """Checkpoint of an agent of 16 units whose actions depend on all that it has seen."""
    sizes = dict(rnn_hidden_dim=16, rnn_layers=1)
    config = pomdp.TrainConfig(character=CHARACTER, device="cpu", **sizes)
    pomdp.set_seed(1)
    model = pomdp.make_algorithm(config, torch.device("cpu")).model
    model.policy.weight.data *= 20  # an untrained policy is close to uniform
    content = {"format": pomdp.CHECKPOINT_FORMAT, "step": 1, "config": json.dumps(asdict(config))}
    content["model"] = model.state_dict()
    path = tmp_path_factory.mktemp("agent") / "agent.pt"
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    "more, temperature", [([], 1.0), (["--temperature", "0.2", "--workers", "2"], 0.2)]
)
@pytest.mark.usefixtures("one_thread")
def test_checkpoint(agent, tmp_path, more, temperature):
    """The keys are those of the model, played here step by step: its state goes on through a game
    and is zero at the next one's beginning, chance comes from the game's third seed."""
    steps = 80
    line = ["--checkpoint", agent, "--games", "2", "--max_steps", str(steps)]
    record(tmp_path / "out", *line, *more)
    model = pomdp.load_agent(agent)[0].model.eval()
    for k in range(2):
        core, disp, chance = record_games.seeds_of(SEED, k)
        rng, game = np.random.default_rng(chance), pomdp.NetHackGame(CHARACTER)
        obs, state, action, keys = game.reset(core, disp), None, pomdp.NO_ACTION, []
        for _ in range(steps):
            inputs = {name: torch.as_tensor(obs[name])[None, None] for name in pomdp.OBSERVATIONS}
            inputs["prev_actions"] = torch.tensor([[action]])
            with torch.no_grad():
                core_output, state = model.backbone(inputs, state)
                logits, _ = model.head(core_output, inputs["tty_chars"])
            torch.manual_seed(int(rng.integers(2**32)))
            action = int(
                torch.distributions.Categorical(logits=logits[0, 0] / temperature).sample()
            )
            keys.append(KEYS[action])
            obs, *_ = game.step(action)
        game.close()
        recorded_keys = read(tmp_path / "out" / f"{CHARACTER}-{SEED}-{k}")[1]
        assert recorded_keys[: steps + 4] == keys + QUITTING and len(set(keys)) > 5
