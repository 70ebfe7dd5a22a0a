"""Watching: the agent's game is evaluation's, what is written is what was drawn, keys do what they say, nothing is left behind."""

import bz2
import importlib.util
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "watch.py"
GAMES = ROOT / "tests" / "data" / "nle_data"
pytestmark = pytest.mark.usefixtures("one_thread")

MONK = "mon-hum-neu"
CPU = torch.device("cpu")
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled"}


def load_script():
    spec = importlib.util.spec_from_file_location("watch_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


watch = load_script()


def train(folder, stores_path, **settings):
    """A run of two updates on a small network, whose actions are spread out; returns its last.pt."""
    config = pomdp.TrainConfig(character=MONK, data_path=str(GAMES), store_path=str(stores_path), checkpoints_path=str(folder),
                               update_steps=2, batch_size=4, seq_len=8, eval_episodes=0, eval_processes=3, eval_heldout_frames=64,
                               eval_max_steps=50, device="cpu", **settings)  # fmt: skip
    config.rnn_hidden_dim = 32
    path = pomdp.train(config) / "last.pt"
    content = pomdp.read_checkpoint(path)
    content["model"]["policy.weight"] *= 60  # an untrained policy is close to uniform, and its favourite always the same
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, stores_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return train(tmp_path_factory.mktemp("runs"), stores_path)


@pytest.fixture(scope="module")
def recorded():
    """The shortest recorded game: path and its frames of play."""
    path = min((game.path for game in pomdp.find_nld_games(GAMES, MONK).games), key=os.path.getsize)
    pieces = list(pomdp.frames_of_play(pomdp.read_ttyrec(path)))
    return path, pomdp.Frames(*(np.concatenate(parts) for parts in zip(*pieces)))


def command(*arguments, **options):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], env={**os.environ, **QUIET}, capture_output=True, text=True,
                          timeout=120, stdin=subprocess.DEVNULL, **options)  # fmt: skip


def actor_of(checkpoint, number=0, rows=True):
    model, config, device = watch.load_model(checkpoint, None, "cpu")
    return watch.Actor(model, device, 50, 8 if rows else 1, number % 3 if rows else 0), config


# --- the agent's own games
class Kept(torch.nn.Module):
    """Passes on to a model, and keeps screens and actions of all rows."""

    def __init__(self, model):
        super().__init__()
        self.model, self.screens, self.actions = model, [], []

    def vec_act(self, obs, state=None, device="cpu"):
        actions, state = self.model.vec_act(obs, state, device)
        self.screens.append(obs["tty_chars"].copy())
        self.actions.append(np.array(actions))
        return actions, state


@pytest.fixture(scope="module")
def evaluated(checkpoint):
    model, _, _ = watch.load_model(checkpoint, None, "cpu")
    kept, pool = Kept(model), pomdp.GamePool(3, 1)
    try:
        return kept, pomdp.play_games(pool, kept, MONK, 6, 50, 50, CPU)
    finally:
        pool.close()


@pytest.mark.parametrize("number", [0, 2, 4])
def test_the_game_is_the_one_that_evaluation_plays(checkpoint, evaluated, number):
    """Screen by screen and action by action; game 4 comes second in its slot, so chance depends on the game before it."""
    kept, results = evaluated
    actor, config = actor_of(checkpoint, number)
    *views, last = watch.agent_game(actor, config, MONK, 50, number, 50)
    first = sum(results[k].length for k in range(number % 3, number, 3))
    assert [view.opinion.action for view in views] == [actions[number % 3] for actions in kept.actions[first : first + 50]]
    assert all(np.array_equal(view.chars, screens[number % 3]) for view, screens in zip(views, kept.screens[first:]))
    assert (last.score, last.turn, last.step) == (results[number].score, results[number].turns, results[number].length)
    assert last.note == "stopped: step limit" and len({view.opinion.action for view in views}) > 3


def test_probabilities_and_value_are_the_model_s(checkpoint):
    """Against the model unrolled by itself on the same screens: the recurrent state moves once a step."""
    actor, config = actor_of(checkpoint)
    views = list(watch.agent_game(actor, config, MONK, 50, 0, 12))[:-1]
    model, _, _ = watch.load_model(checkpoint, None, "cpu")
    read, state, previous = pomdp.StatusReader(), None, pomdp.NO_ACTION
    for view in views:
        inputs = {"tty_chars": view.chars, "tty_colors": view.colors, "tty_cursor": np.array(view.cursor),
                  "blstats": read(view.chars[None])[0]}  # fmt: skip
        inputs = {name: torch.as_tensor(array)[None, None] for name, array in inputs.items()}
        with torch.no_grad():
            logits, values, state = model({**inputs, "prev_actions": torch.tensor([[previous]])}, state)
        wanted = torch.softmax(logits[0, 0] / model.temperature, 0).numpy()
        np.testing.assert_allclose(view.opinion.probabilities, wanted, atol=1e-5)
        assert view.opinion.value == pytest.approx(float(values), abs=1e-4)
        previous = view.opinion.action


@pytest.mark.parametrize("reference, says", [("bc", "no probabilities, no value"), ("cql", "no probabilities, no value"),
                                             ("iql", "this submission shows neither")])  # fmt: skip
def test_other_submissions_show_what_they_can(tmp_path, stores_path, reference, says):
    config = pomdp.TrainConfig(submission=str(ROOT / "scripts" / "references" / f"{reference}.py"), device="cpu", eval_processes=3)
    config.rnn_hidden_dim = 32
    model = pomdp.make_algorithm(config, CPU).model
    torch.save({"format": pomdp.CHECKPOINT_FORMAT, "identity": "", "model": model.state_dict(),
                "config": json.dumps(pomdp.asdict(config))}, tmp_path / "last.pt")  # fmt: skip
    actor, config = actor_of(str(tmp_path / "last.pt"))
    views = list(watch.agent_game(actor, config, MONK, 50, 0, 3))
    text = "\n".join("".join(piece[0] for piece in line) for line in watch.panel_lines(views[1], 38))
    assert all(sum(len(piece[0]) for piece in line) <= 38 for line in watch.panel_lines(views[1], 38)), "cut off"
    assert says in text and f"presses  {watch.action_name(views[1].opinion.action)}" in text
    assert views[1].opinion.probabilities is None and views[1].opinion.value is None


# --- recorded games
def test_a_recorded_game_is_played_whole(recorded):
    path, frames = recorded
    views = list(watch.recorded_game(path, None, sys.maxsize))
    played = [view for view in views if not view.note]
    assert len(played) == len(frames.chars) < len(views), "the tombstone is shown as well"
    for name in ("chars", "colors"):
        assert all(np.array_equal(getattr(view, name), array) for view, array in zip(played, getattr(frames, name)))
    assert [view.played for view in played] == frames.actions.tolist() and [view.score for view in played] == frames.scores.tolist()
    assert {view.note for view in views[len(played) :]} == {"the game is over"} and MONK in views[0].title and "points" in views[0].title


def test_agreement_is_the_share_of_keys_that_the_agent_likes_most(checkpoint, recorded):
    """Against the model run over the recording in one go."""
    path, frames = recorded
    steps = 200
    model, _, _ = watch.load_model(checkpoint, None, "cpu")
    part = frames.cut(0, steps)
    inputs = {"tty_chars": part.chars, "tty_colors": part.colors, "tty_cursor": part.cursor, "blstats": pomdp.StatusReader()(part.chars),
              "prev_actions": np.append(pomdp.NO_ACTION, part.actions[:-1]).astype(np.int64)}  # fmt: skip
    common = int(np.bincount(part.actions).argmax())
    with torch.no_grad():
        logits, _, _ = model({name: torch.as_tensor(array)[None] for name, array in inputs.items()})
        bias = (logits[0].max(-1).values - logits[0, :, common]).median() + 0.01  # its favourite in half of the frames
        model.policy.bias[common] += bias
        logits[0, :, common] += bias
    *_, last = watch.recorded_game(path, watch.Actor(model, CPU, 50), steps)
    keys = np.array([int(action) for action in watch.nethack.ACTIONS])
    same = keys[logits[0].argmax(-1).numpy()] == keys[part.actions]
    assert (last.agreed, last.compared) == (same.sum(), steps) and 0 < same.sum() < steps


def test_a_recording_that_breaks_off_is_played_so_far(tmp_path, recorded):
    broken = tmp_path / "nle.1.0.ttyrec3.bz2"
    content = bz2.decompress(Path(recorded[0]).read_bytes())
    broken.write_bytes(bz2.compress(content[: len(content) // 2]))
    result = command("--game", broken, "--cast", tmp_path / "a.cast")
    assert result.returncode == 2 and re.fullmatch(r"watch: error: .*nle\.1\.0.*\(after [\d,]+ frames\)\n", result.stderr), result.stderr
    empty = tmp_path / "nle.2.0.ttyrec3.bz2"
    empty.write_bytes(Path(recorded[0]).read_bytes()[:50])
    assert command("--game", empty, "--cast", tmp_path / "b.cast").returncode == 2
    frames = int(re.search(r"after ([\d,]+)", result.stderr).group(1).replace(",", ""))
    assert frames > 100 and len((tmp_path / "a.cast").read_text().splitlines()) == frames + 2


# --- what is written
class Screen:
    """A terminal that knows the few sequences that a cast may hold."""

    def __init__(self, rows, columns):
        self.cells = np.full((rows, columns), " ", dtype=object)
        self.styles = np.full((rows, columns), "", dtype=object)
        self.row = self.column = 0
        self.style = ""

    def feed(self, text):
        for found in re.finditer(r"\x1b\[([\d;]*)([HJm])|([^\x1b])", text):
            numbers, kind, char = found.groups()
            if kind == "H":
                self.row, self.column = (int(number) - 1 for number in numbers.split(";"))
            elif kind == "J":
                self.cells[:], self.styles[:] = " ", ""
            elif kind == "m":
                self.style = numbers
            else:
                self.cells[self.row, self.column], self.styles[self.row, self.column] = char, self.style
                self.column += 1
        assert re.sub(r"\x1b\[[\d;]*[HJm]", "", text).isprintable()


def coloured_view():
    """All 16 colours, plain and inverse, and bytes that are no text."""
    chars, colors = np.full((24, 80), 32, np.uint8), np.zeros((24, 80), np.int8)
    for color in range(32):
        chars[color % 16, 10 * (color // 16) : 10 * (color // 16) + 5] = np.frombuffer(b"a@# .", np.uint8)
        colors[color % 16, 10 * (color // 16) : 10 * (color // 16) + 5] = color
    chars[20, :3], colors[20, :3] = (7, 127, 200), 7
    return watch.View("a title", chars, colors, (3, 4), 1, 2, 3)


def test_a_cast_shows_every_screen(tmp_path, recorded):
    views = [coloured_view(), *list(watch.recorded_game(recorded[0], None, 80))]
    cast = watch.Cast(str(tmp_path / "a.cast"), "a title")
    for view in views:
        cast.add(watch.draw(view), 0.25)
    cast.close()
    header, *events = map(json.loads, (tmp_path / "a.cast").read_text(encoding="utf-8").splitlines())
    assert header["version"] == 2 and (header["width"], header["height"]) == (watch.WIDTH, 24) and header["title"] == "a title"
    assert [event[0] for event in events] == [0.25 * i for i in range(len(views) + 1)] and {event[1] for event in events} == {"o"}
    screen = Screen(24, watch.WIDTH)
    for view, event in zip(views, events):
        screen.feed(event[2])
        canvas = watch.draw(view)
        assert ["".join(row) for row in screen.cells] == [row.tobytes().decode() for row in canvas.chars]
        assert (screen.row, screen.column) == view.cursor
        for row, column in zip(*np.nonzero((canvas.chars != 32) | canvas.inverse)):
            color, inverse = int(canvas.colors[row, column]), canvas.inverse[row, column]
            assert screen.styles[row, column] == f"0;{'7;' * bool(inverse)}{color + (30 if color < 8 else 82)}"
    first = watch.draw(views[0])
    assert first.colors[1, 0] == 1 and first.colors[0, 0] == 7, "black is shown as grey"
    assert first.inverse[2, 10:15].all() and not first.inverse[2, :5].any() and first.chars[20, :3].tobytes() == b" ??"


def test_a_gif_shows_every_screen_for_its_time(tmp_path, recorded):
    """The streamed file, decoded by Pillow, pixel by pixel."""
    from PIL import Image

    views = [coloured_view(), *list(watch.recorded_game(recorded[0], None, 60))]
    gif = watch.Gif(str(tmp_path / "a.gif"))
    for view in views:
        gif.add(watch.draw(view), 0.1)
    gif.close()
    pictures = [gif.painter.palette[gif.painter.paint(watch.draw(view))] for view in views]
    distinct = [0] + [i for i in range(1, len(pictures)) if not np.array_equal(pictures[i], pictures[i - 1])]
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == len(distinct) > 30
        total = 0
        for frame, index in enumerate(distinct):
            image.seek(frame)
            assert np.array_equal(np.asarray(image.convert("RGB")), pictures[index]), frame
            total += image.info["duration"]
    assert total == pytest.approx(100 * len(views), abs=10)
    colours = {tuple(color) for color in pictures[0].reshape(-1, 3).tolist()}
    assert set(watch.RGB) - {(0, 0, 0)} <= colours


def test_a_fast_gif_leaves_steps_out_but_not_their_time(tmp_path, recorded):
    from PIL import Image

    gif = watch.Gif(str(tmp_path / "a.gif"))
    views = list(watch.recorded_game(recorded[0], None, 100))
    for view in views:
        gif.add(watch.draw(view), 1 / 200)
    gif.close()
    with Image.open(tmp_path / "a.gif") as image:
        assert 20 <= image.n_frames <= 26
        durations = []
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
    assert min(durations) >= 20 and sum(durations) == pytest.approx(500, abs=20)


def test_without_a_terminal_files_are_written(tmp_path, checkpoint):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = command("--checkpoint", checkpoint, "--max_steps", 15, "--gif", tmp_path / "a.gif", "--cast", tmp_path / "a.cast",
                     "--device", "cpu", cwd=scratch)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "15 steps" in result.stdout and "step limit" in result.stdout and (tmp_path / "a.gif").read_bytes()[-1:] == b";"
    assert "presses" in (tmp_path / "a.cast").read_text() and not list(scratch.iterdir())


def test_names_of_actions():
    names = [watch.action_name(action) for action in range(pomdp.NUM_ACTIONS)]
    assert names[:4] == ["NORTH (k)", "EAST (l)", "SOUTH (j)", "WEST (h)"] and names[8] == "run NORTH (K)" and len(set(names)) == len(names)
    assert names[38] == "ESC (ESC)" and names[107] == "SPACE (space)" and names[19] == "MORE (Enter)"
    assert "KICK (^D)" in names and "PRAY (M-p)" in names
    assert all(name.isascii() and name.isprintable() for name in names)


# --- the terminal
class Session:
    """The script on a pseudo-terminal of 120 x 24."""

    def __init__(self, *arguments, size=(24, 120), folder):
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.environ.update({**QUIET, "TMPDIR": str(folder), "TERM": "xterm"})
            import fcntl
            import termios

            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *map(str, arguments)])
        self.text = ""

    def until(self, pattern, seconds=20):
        end = time.monotonic() + seconds
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

    def end(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.file)
        return code


def test_keys(tmp_path, checkpoint):
    session = Session("--checkpoint", checkpoint, "--speed", 2, "--max_steps", 50, "--device", "cpu", folder=tmp_path)
    session.until("steps/s")
    session.press(" ")
    session.until("PAUSED")
    session.press("+ ")  # 2 * 1.5, and on
    session.until(r"3 steps/s")
    session.press("--")
    session.until(r"1\.33 steps/s")
    session.press("n")
    session.until("PAUSED")
    session.press("\x1b[C")
    session.until(r"\x1b\[\d+;\d+H")
    assert len(list(tmp_path.iterdir())) == 1, "NLE's folder lies elsewhere: this shows nothing"
    session.press("q")
    session.until("not at its end")
    assert "\x1b[?1049l" in session.text and session.end() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(tmp_path, checkpoint, number):
    session = Session("--checkpoint", checkpoint, "--speed", 50, "--device", "cpu", folder=tmp_path)
    session.until("steps/s")
    assert len(list(tmp_path.iterdir())) == 1
    os.kill(session.pid, number)
    session.until(r"\x1b\[\?1049l")
    assert session.end() == (0 if number == signal.SIGINT else 128 + number)
    assert list(tmp_path.iterdir()) == []


def test_the_end_waits_for_the_user_and_a_narrow_terminal_shows_the_panel_below(tmp_path, recorded):
    session = Session("--game", recorded[0], "--speed", 1000, "--max_steps", 30, size=(40, 80), folder=tmp_path)
    session.until("END")
    assert re.search(r"\x1b\[25;1H[^H]*-{80}", session.text) and "score" in session.text
    session.press("q")
    session.until("29 steps")
    assert session.end() == 0


# --- mistakes
@pytest.mark.parametrize("arguments, says", [
    ([], "give --checkpoint FILE, --game FILE or both"),
    (["--checkpoint", "none.pt", "--gif", "a.gif"], "there is no checkpoint none.pt"),
    (["--game", "none.ttyrec3.bz2"], "there is no recorded game"),
    (["--game", str(GAMES), "--cast", "a"], "there is no recorded game"),
    (["--game", __file__, "--cast", "a"], "is no ttyrec3.bz2 file"),
    (["--checkpoint", __file__, "--cast", "a.cast"], "cannot be read as a checkpoint"),
    (["--checkpoint", "x", "--character", "mon-hum-neo"], "did you mean mon-hum-neu"),
    (["--checkpoint", "x", "--speed", "0"], "--speed must lie between"),
    (["--checkpoint", "x", "--max_steps", "0"], "--max_steps must be at least 1"),
    (["--game", "x", "--number", "3"], "leave them out with --game"),
    (["--checkpoint", "x"], "standard output is no terminal"),
])  # fmt: skip
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert watch.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("watch: error: ") and says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_submission_or_with_nowhere_to_write(tmp_path, checkpoint, capsys):
    reference = str(ROOT / "scripts" / "references" / "bc.py")
    assert watch.main(["--checkpoint", checkpoint, "--submission", reference, "--cast", str(tmp_path / "a"), "--device", "cpu"]) == 2
    assert "are not those of the submission" in capsys.readouterr().err
    assert watch.main(["--checkpoint", checkpoint, "--cast", str(tmp_path / "none" / "a"), "--device", "cpu"]) == 2
    assert "cannot write" in capsys.readouterr().err
