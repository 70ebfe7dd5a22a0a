# SPDX-License-Identifier: MIT
"""Watching: the agent's game is evaluation's, what is shown is what was seen, keys do what they
say."""

import bz2
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "watch.py"
sys.path.insert(0, str(ROOT / "scripts"))
import watch

pytestmark = pytest.mark.usefixtures("one_thread")
MONK, CPU = "mon-hum-neu", torch.device("cpu")
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a small agent whose actions are spread out, in half precision, as agents are shipped."""
    sizes = dict(rnn_hidden_dim=24, rnn_layers=1, eval_processes=3, eval_max_steps=50)
    config = pomdp.TrainConfig(character=MONK, device="cpu", **sizes)
    pomdp.set_seed(1)
    model = pomdp.make_algorithm(config, CPU).model
    # an untrained policy is close to uniform, and its favourite always the same
    model.policy.weight.data *= 60
    content = {"format": pomdp.CHECKPOINT_FORMAT, "step": 1, "config": json.dumps(asdict(config))}
    content["model"] = {name: tensor.half() for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("agent") / "small.pt"
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def recorded():
    """The shortest recorded game: path and frames of play."""
    games, _ = pomdp.find_nld_games(ROOT / "tests" / "data" / "nle_data", MONK)
    path = min(games, key=lambda game: game.size).path
    frames = pomdp.read_ttyrec(path)
    part = slice(pomdp.find_first_frame(frames), pomdp.find_end_of_play(frames))
    return path, pomdp.Frames(*(array[part] for array in frames))


def command(*arguments):
    line = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        line, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=LIMIT_S, input=""
    )


# --- the agent's own games
def evaluate(checkpoint, games, **given):
    """An evaluation: all rows' screens and actions tick by tick, and the results."""
    algorithm, config, _ = pomdp.load_agent(checkpoint, eval_episodes=games, **given)
    screens, actions, act = [], [], algorithm.model.vec_act

    def vec_act(obs, *others, **more):
        screens.append(obs["tty_chars"].copy())
        chosen, state = act(obs, *others, **more)
        actions.append(chosen.copy())
        return chosen, state

    algorithm.model.vec_act = vec_act
    return screens, actions, pomdp.vec_evaluate(algorithm.model, MONK, config, CPU)


@pytest.fixture(scope="module")
def evaluated(checkpoint):
    return evaluate(checkpoint, 6)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_the_game_is_the_one_that_evaluation_plays(checkpoint, evaluated, number):
    """Screen by screen and action by action; game 4 comes second in its slot: chance depends on the
    game before it."""
    screens, actions, results = evaluated
    algorithm, config, _ = pomdp.load_agent(checkpoint)
    row = number % 3
    *views, last = watch.agent_game(
        watch.Actor(algorithm.model, CPU, config.eval_seed, 8, row), config, number, 1000
    )
    first = sum(results[k].length for k in range(row, number, 3))
    assert [view.action for view in views] == [
        chosen[row] for chosen in actions[first : first + 50]
    ]
    assert all(
        np.array_equal(view.chars, screen[row]) for view, screen in zip(views, screens[first:])
    )
    assert (last.score, last.turn, last.step) == (
        results[number].score,
        results[number].turns,
        results[number].length,
    )
    assert last.note == "the end: step limit" and len({view.action for view in views}) > 3


def test_settings_of_the_evaluation_can_be_given(checkpoint):
    """Of two slots game 2 is the second of slot 0, of three it was the first of slot 2."""
    _, actions, _ = evaluate(checkpoint, 3, eval_processes=2, eval_max_steps=20)
    line = ["--checkpoint", checkpoint, "--number", 2]
    done = command(*line, "--eval_processes", 2, "--eval_max_steps", 20)
    keys = [line[6:] for line in done.stdout.splitlines() if line.startswith("key   ")]
    assert keys == [watch.action_name(int(chosen[0])) for chosen in actions[20:]], done.stderr


def test_probabilities_and_value_are_the_model_s(checkpoint, recorded):
    """Against the model unrolled over the recording in one go: the state moves once a step, by the
    recorded action."""
    path, frames = recorded
    model, steps = pomdp.load_agent(checkpoint)[0].model.eval(), 150
    part = pomdp.Frames(*(array[:steps] for array in frames))
    previous = np.append(pomdp.NO_ACTION, part.actions[:-1]).astype(np.int64)
    arrays = (part.chars, part.colors, part.cursor, pomdp.read_blstats(part.chars), previous)
    inputs = {
        name: torch.as_tensor(array)[None]
        for name, array in zip((*pomdp.OBSERVATIONS, "prev_actions"), arrays)
    }
    common = int(np.bincount(part.actions).argmax())
    with torch.no_grad():
        core_output, _ = model.backbone(inputs)
        logits, values = model.head(core_output, inputs["tty_chars"])
        # its favourite in half of the frames
        bias = (logits[0].max(-1).values - logits[0, :, common]).median() + 0.01
        model.policy.bias[common] += bias
        logits[0, :, common] += bias
    views = list(watch.recorded_game(path, watch.Actor(model, CPU, 50), steps))
    wanted = torch.softmax(logits[0], -1).numpy()
    np.testing.assert_allclose([view.probabilities for view in views], wanted, atol=1e-4)
    np.testing.assert_allclose([view.value for view in views], values[0].numpy(), atol=1e-3)
    keys = np.array([int(action) for action in pomdp.nethack.ACTIONS])
    agreed = int((keys[wanted.argmax(-1)] == keys[part.actions]).sum())
    assert (
        views[-1].note == f"the agent's likeliest: {agreed} of {steps} keys" and 0 < agreed < steps
    )


# --- recorded games
def test_a_recorded_game_is_shown_whole(recorded):
    path, frames = recorded
    views = list(watch.recorded_game(path, None, 10**6))
    played = [view for view in views if view.action is not None]
    assert len(played) == len(frames.chars) < len(views), "the tombstone is shown as well"
    for name in ("chars", "colors", "cursor"):
        assert all(
            np.array_equal(getattr(view, name), array)
            for view, array in zip(played, getattr(frames, name))
        )
    assert [view.action for view in played] == frames.actions.tolist()
    assert [view.score for view in played] == frames.scores.tolist()
    assert {(view.note, view.score) for view in views[len(played) :]} == {
        ("the game is over", frames.scores[-1])
    }


def test_a_recording_that_breaks_off_is_shown_so_far(tmp_path, recorded):
    broken, rubbish = tmp_path / "nle.1.0.ttyrec3.bz2", tmp_path / "nle.2.0.ttyrec3.bz2"
    content = bz2.decompress(Path(recorded[0]).read_bytes())
    broken.write_bytes(bz2.compress(content[: len(content) // 2]))
    rubbish.write_text("rubbish")
    done = command("--game", broken, "--every", 1000)
    assert done.returncode == 0 and re.search(
        r"step \d{2,}, .*breaks off", done.stdout.splitlines()[-1]
    )
    old = tmp_path / "nle.3.0.ttyrec3.bz2"  # version 1: a channel less
    header = struct.pack("<iii", 0, 0, 5)
    old.write_bytes(bz2.compress(100 * (header + b"\x1b[H@@")))
    other = tmp_path / "nle.4.0.ttyrec4.bz2"
    other.write_bytes(Path(recorded[0]).read_bytes())
    for path in (old, other):
        done = command("--game", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "cannot be shown" in done.stderr and done.stderr.count("\n") == 1
    done = command("--game", rubbish)
    assert done.returncode == 2 and "cannot be read" in done.stderr and done.stderr.count("\n") == 1


# --- what is drawn
def test_colours_and_bytes_that_are_no_text(monkeypatch):
    """All 16 colours, plain and inverse; the panel at the game's right, or below it in a narrow
    terminal."""
    chars, colors = (
        np.full((24, 80), ord("a"), np.uint8),
        np.tile(np.arange(80, dtype=np.int8) % 32, (24, 1)),
    )
    chars[0, :3] = (7, 127, 200)
    view = watch.View(chars, colors, np.array([3, 4]), 1, 2, 3)
    cells = re.findall(r"\x1b\[([\d;]*)m([^\x1b])", watch.game_lines(view, True)[0])
    codes = [37, *range(31, 38), *range(90, 98)]  # black is shown as grey
    assert [style for style, _ in cells[:32]] == [f"0;{code}" for code in codes] + [
        f"0;7;{code}" for code in codes
    ]
    assert "".join(char for _, char in cells) == " ??" + 77 * "a"
    for columns, row, wanted in (
        (120, 1, r".*a\x1b\[0m\| step  1 +turn  2"),
        (80, 26, "step  1 +turn  2"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "30")
        assert re.fullmatch(wanted, watch.draw(view, "title", "").split("\x1b[K\n")[row])


@pytest.mark.parametrize("size", [(80, 24), (80, 28), (60, 20), (100, 24)])
@pytest.mark.parametrize("column", [4, 70])
def test_a_terminal_without_room_has_the_panel_over_the_game(monkeypatch, size, column):
    """With its keys, within the terminal, neither over the message nor over the cursor."""
    monkeypatch.setenv("COLUMNS", str(size[0]))
    monkeypatch.setenv("LINES", str(size[1]))
    screen = (np.full((24, 80), ord("a"), np.uint8), np.full((24, 80), 7, np.int8))
    view = watch.View(*screen, np.array([3, column]), 1, 2, 3)
    view = view._replace(action=5, probabilities=np.full(121, 1 / 121), value=0.5)
    shown = watch.draw(view, "title", "keys")
    over = re.findall(r"\x1b\[(\d+);(\d+)H\| ([^\x1b]*)", shown)
    text = [line.strip() for *_, line in over]
    assert text[0] == "title" and text[-1] == "keys" and "step  1          turn  2" in text
    for row, left, line in over:
        right = int(left) + len(line) + 1
        assert 1 < int(row) <= size[1] and right <= size[0]
        assert column + 1 < int(left) or column + 1 > right
    assert shown.endswith(f"\x1b[4;{column + 1}H")
    assert "title" not in watch.draw(view, "title", "keys", with_panel=False)


def test_names_of_actions():
    names = [watch.action_name(action) for action in range(pomdp.NUM_ACTIONS)]
    assert (
        names[:2] == ["N (k)", "E (l)"]
        and names[8] == "run N (K)"
        and len(set(names)) == len(names)
    )
    assert {"ESC (ESC)", "SPACE (space)", "MORE (Enter)", "KICK (^D)", "PRAY (M-p)"} < set(names)


def test_frames_as_text(checkpoint, evaluated):
    """Of the second game in slot 1, by the command line."""
    screens, actions, results = evaluated
    done = command("--checkpoint", checkpoint, "--number", 4, "--start", 2, "--every", 7)
    assert done.returncode == 0, done.stderr
    *frames, last = done.stdout.split("-" * 80 + "\n")
    for number, frame in zip(range(2, 51, 7), frames, strict=True):
        shown = watch.View(screens[results[1].length + number][1], None, None, 0, 0, 0)
        assert (
            frame.split("\n")[:24] == watch.game_lines(shown, False) and f"step  {number} " in frame
        )
        assert f"key   {watch.action_name(int(actions[results[1].length + number][1]))}\n" in frame
    assert (
        last
        == f"{MONK}, game 4 of seed 50: step 50, turn {results[4].turns}, score 0; the end: step limit\n"  # noqa: E501
    )


# --- the terminal
class Session:
    """The script, or another command, on a pseudo-terminal of 120 x 24."""

    def __init__(self, *arguments, folder, command=(sys.executable, str(SCRIPT))):
        self.text = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            # which a shell's background jobs ignore, and so do those that they start
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            environment = {**os.environ, **QUIET, "TMPDIR": str(folder)}
            for name in ("COLUMNS", "LINES"):  # the terminal's own size counts
                environment.pop(name, None)
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
            line = [*command, *map(str, arguments)]
            # given, since readline, which pytest loads, sets COLUMNS where os.environ does not see
            # it
            os.execve(line[0], line, environment)

    def until(self, pattern):
        end = time.monotonic() + LIMIT_S
        while not re.search(pattern, self.text) and time.monotonic() < end:
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.file, 65536).decode()
                except OSError:  # it has ended
                    break
        assert re.search(pattern, self.text), f"{pattern} not in {self.text[-2000:]!r}"

    def press(self, keys):
        self.text = ""
        os.write(self.file, keys.encode())

    def takes_lines(self):
        return bool(termios.tcgetattr(self.file)[3] & termios.ICANON)

    def end(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert self.takes_lines(), "the terminal takes keys without Enter"
        os.close(self.file)
        return code


def test_keys(tmp_path, checkpoint):
    session = Session("--checkpoint", checkpoint, "--speed", 2, folder=tmp_path)
    session.until("2 steps/s")
    for keys, shown in (
        (" ", "PAUSED"),
        ("+ ", "3 steps/s"),  # 2 * 1.5, and on
        ("--", r"1\.33 steps/s"),
        ("BN", "(?s)step  50 .*END"),  # beyond the last
        ("\x1b[D", "(?s)step  49 .*PAUSED"),
        ("\x1b[C", "step  50 "),
        ("B", "step  0 "),
        ("q", "step 0, .*not at its end"),
    ):
        session.press(keys)
        session.until(shown)
    assert "\x1b[?1049l" in session.text and session.end() == 0
    assert list(tmp_path.iterdir()) == []


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(tmp_path, recorded):
    """From a shell, which can make it go on; what was shown is drawn again."""
    session = Session("-i", folder=tmp_path, command=["/bin/sh"])
    session.press(f"'{sys.executable}' '{SCRIPT}' --game '{recorded[0]}' --speed 0.1\n")
    session.until("steps/s")
    for _ in range(2):
        session.press("\x1a")
        session.until(r"(?s)\x1b\[\?1049l.*Stopped")
        assert session.takes_lines()
        session.press("fg\n")
        session.until(r"(?s)\x1b\[\?1049h.*step  0 .*steps/s")
        assert not session.takes_lines()
    session.press("p")
    session.until(r"\x1b\[H((?!steps/s)[\s\S])*\x1b\[J\x1b\[\d+;\d+H")  # a screen without it
    session.press("q")
    session.until("not at its end")
    session.press("exit\n")
    assert session.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(tmp_path, checkpoint, number):
    session = Session("--checkpoint", checkpoint, "--speed", 0.1, folder=tmp_path)
    session.until("steps/s")
    assert len(list(tmp_path.iterdir())) == 1
    os.kill(session.pid, number)
    session.until(r"\x1b\[\?1049l")
    assert session.end() == 128 + number
    assert list(tmp_path.iterdir()) == []


# --- mistakes
def test_mistakes_get_one_line(checkpoint, capsys):
    for says, arguments in {
        "give --checkpoint FILE, --game FILE or both": [],
        "none.pt cannot be read as a checkpoint": ["--checkpoint", "none.pt"],
        "there is no recorded game": ["--game", "none.ttyrec3.bz2"],
        "did you mean mon-hum-neu": ["--checkpoint", checkpoint, "--character", "mon-hum-neo"],
        "none.py cannot be used": [
            "--checkpoint",
            checkpoint,
            "--submission",
            "none.py",
        ],
        "--speed must be at least 0.1": ["--game", __file__, "--speed", "0"],
    }.items():
        assert watch.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
