"""Watch an agent play, or a recorded game, in the terminal; or write either to a file.

    python scripts/watch.py --checkpoint RUN/best.pt --character mon-hum-neu            # the agent plays
    python scripts/watch.py --game DIR/nle.123.0.ttyrec3.bz2                            # a recorded game
    python scripts/watch.py --game FILE --checkpoint RUN/best.pt                        # what would the agent have done?
    python scripts/watch.py --checkpoint RUN/best.pt --gif game.gif --cast game.cast    # no terminal needed

Beside the game a panel shows the five likeliest actions with their probabilities, the value, the score and the turn. Keys:
space pauses and goes on, n (or the right arrow) takes one step, + and - (or up and down) change the speed, q quits.

The agent's game is the one that evaluation plays: `--seed` is its eval_seed (the checkpoint's if left out), `--number` its
game. Screens, recurrent state, previous action and drawn actions are the same, step by step, on the same kind of device.
Game k is played by slot k modulo eval_processes, so with a number from eval_processes on, the slot's games before it
are played first, unseen, since chance in a game depends on the tick at which it begins.

The value is in the rewards of training: differences of the score over the run's reward scale. "Agreement" is the share of the
recorded keys that are the agent's likeliest action (or, of a submission that shows no probabilities, the action it chose).

With --cast or --gif the game is not played in the terminal, unless --live is given as well. A cast is an asciicast of
version 2 (asciinema). A GIF holds at most 50 pictures a second: above that speed it leaves steps out.
"""
import argparse
import difflib
import importlib.util
import json
import math
import os
import select
import signal
import sys
import termios
import time
import tty
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
if os.path.dirname(HERE) not in sys.path:
    sys.path.insert(0, os.path.dirname(HERE))

import torch
from nle import nethack

from custom_nethack_pomdp import (
    AUTOASCEND_MEAN_SCORE,
    COLS,
    NO_ACTION,
    NUM_ACTIONS,
    OBSERVATION_SHAPES,
    OBSERVATIONS,
    ROWS,
    UNKNOWN_KEY,
    Frames,
    GameError,
    NetHackGame,
    StatusReader,
    TrainConfig,
    UserError,
    character_of,
    choose_device,
    derived_seed,
    find_end_of_play,
    find_first_frame,
    game_seeds,
    make_algorithm,
    parse_xlogfile,
    read_checkpoint,
    read_ttyrec,
)

PANEL = 40  # columns of the side panel, its left edge included
WIDTH = COLS + PANEL
BELOW = 15  # rows of the panel where it stands below the game: what a terminal too narrow for both gets
TOP = 5  # likeliest actions shown
RED, GREEN, YELLOW, BLUE, CYAN, GRAY, DARK, WHITE = 1, 2, 3, 4, 6, 7, 8, 15  # of the terminal's 16 colours
# As most terminals show the 16 colours; blue and dark grey are lighter, to be read on black.
RGB = ((0, 0, 0), (205, 49, 49), (13, 188, 60), (190, 140, 40), (70, 110, 230), (188, 63, 188), (17, 168, 205), (204, 204, 204),
       (120, 120, 120), (255, 130, 60), (60, 230, 100), (245, 245, 67), (110, 160, 255), (230, 120, 230), (80, 220, 240), (255, 255, 255))
Piece = Tuple[str, int, bool]  # text, colour, inverse


# --- names of actions
def key_name(action: int) -> str:
    """What a person would press: k, ^D, M-p, ESC, space."""
    key = int(nethack.ACTIONS[action])
    named = {13: "Enter", 27: "ESC", 32: "space"}
    if key in named:
        return named[key]
    if key >= 128:
        return "M-" + (chr(key - 128) if key - 128 >= 32 else "^" + chr(key - 64))
    return chr(key) if key >= 32 else "^" + chr(key + 64)


def action_name(action: int) -> str:
    """'EAST (l)' for an index into nethack.ACTIONS; long ones in capitals run."""
    names = {"N": "NORTH", "E": "EAST", "S": "SOUTH", "W": "WEST",
             "NE": "NORTHEAST", "SE": "SOUTHEAST", "SW": "SOUTHWEST", "NW": "NORTHWEST"}  # fmt: skip
    found = nethack.ACTIONS[action]
    short = names.get(found.name, found.name)
    if isinstance(found, nethack.CompassDirectionLonger):
        short = "run " + short
    return f"{short} ({key_name(action)})"


def same_key(first: int, second: int) -> bool:
    """Three keys have two actions each: either does the same."""
    return int(nethack.ACTIONS[first]) == int(nethack.ACTIONS[second])


# --- the agent
class Opinion(NamedTuple):
    """What the agent makes of one frame."""

    action: int  # drawn or chosen, as in evaluation
    probabilities: Optional[np.ndarray]  # [A], or None where the submission shows none
    outputs: Optional[np.ndarray]  # [A]: what it gives for each action, if these are no logits of a policy that draws
    value: Optional[float]

    @property
    def favourite(self) -> int:
        """The likeliest action; of a submission that does not tell, the chosen one."""
        return self.action if self.probabilities is None else int(self.probabilities.argmax())


class Actor:
    """Asks a model for actions just as `play_games` does: in row `row` of `rows`, with chance seeded by the tick."""

    def __init__(self, model: Any, device: torch.device, seed: int, rows: int = 1, row: int = 0, clear_state: bool = True) -> None:
        self.model, self.device, self.seed, self.row, self.clear_state = model.eval(), device, seed, row, clear_state
        self.state, self.tick = None, 0
        self.previous = np.full(rows, NO_ACTION, dtype=np.int64)
        self.obs = {name: np.zeros((rows, *shape), dtype=kind) for name, (kind, *shape) in OBSERVATION_SHAPES.items()}
        self.seen: Any = None
        model.register_forward_hook(self._see)

    def _see(self, _model: Any, _inputs: Any, outputs: Any) -> None:
        """Takes what vec_act's own call of the model gives: the recurrent state must not step twice."""
        self.seen = outputs

    def begin_game(self) -> None:
        if self.clear_state or self.tick == 0:
            self.previous[self.row] = NO_ACTION
            if self.state is not None:
                keep = torch.ones(len(self.previous), dtype=torch.bool, device=self.device)
                keep[self.row] = False
                self.state = tuple(part * keep[None, :, None].to(part.dtype) for part in self.state)

    def act(self, obs: Dict[str, np.ndarray]) -> Opinion:
        for name in OBSERVATIONS:
            self.obs[name][self.row] = obs[name]
        self.seen = None
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(derived_seed(self.seed, self.tick))
            inputs = {**{name: array.copy() for name, array in self.obs.items()}, "prev_actions": self.previous.copy()}
            actions, self.state = self.model.vec_act(inputs, self.state, device=str(self.device))
        self.tick += 1
        self.previous[self.row] = action = int(np.asarray(actions)[self.row])
        return Opinion(action, *self._read(self.seen))

    def _read(self, seen: Any) -> Tuple[Optional[np.ndarray], Optional[np.ndarray], Optional[float]]:
        """-> probabilities, outputs, value: of (logits, values, state) all that counts, of anything else what can be shown."""
        parts = seen if isinstance(seen, tuple) else (seen,)
        first = parts[0]
        if not torch.is_tensor(first) or first.dim() != 3 or first.shape[0] != len(self.previous) or first.shape[2] != NUM_ACTIONS:
            return None, None, None
        row = first[self.row, -1].float().cpu()
        if len(parts) == 3 and torch.is_tensor(parts[1]) and parts[1].shape == first.shape[:2]:
            probabilities = torch.softmax(row / float(getattr(self.model, "temperature", 1.0)), dim=0)
            return probabilities.numpy(), None, float(parts[1][self.row, -1])
        return None, row.numpy(), None

    def was_played(self, action: int) -> None:
        """The action that came after the frame, where it is not the agent's to choose."""
        self.previous[self.row] = action if action != UNKNOWN_KEY else NO_ACTION


def load_config(content: Dict[str, Any], path: str, submission: Optional[str]) -> TrainConfig:
    """The settings a checkpoint was made with. Raises UserError for those of another version."""
    try:
        values = dict(json.loads(content["config"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} holds no settings: it is not a checkpoint of this script") from None
    unknown = sorted(set(values) - {item.name for item in fields(TrainConfig)})
    if unknown:
        raise UserError(f"{path} was written by another version of the script: unknown settings {', '.join(unknown)}")
    sizes = {name: values.pop(name) for name in ("rnn_hidden_dim", "rnn_layers") if name in values}
    config = TrainConfig(**values)
    for name, size in sizes.items():  # networks of other sizes can be looked at, though not trained by the command line
        setattr(config, name, size)
    if submission:
        config.submission = submission
    return config


def load_model(path: str, submission: Optional[str], device: Optional[str]) -> Tuple[Any, TrainConfig, torch.device]:
    """-> model, settings, device. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}")
    content = read_checkpoint(Path(path))
    config = load_config(content, path, submission)
    config.device = device or "auto"
    chosen = choose_device(config)
    if config.submission and not os.path.isfile(config.submission):
        raise UserError(f"{path} belongs to the submission {config.submission}, which is not there: name it with --submission FILE")
    model = make_algorithm(config, chosen).model
    try:
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, AttributeError, TypeError):
        what = f"the submission {config.submission}" if config.submission else "the block of custom_nethack_pomdp.py"
        raise UserError(f"the weights in {path} are not those of {what}: was it changed since, or is --submission FILE missing?") from None
    model.backbone.acting_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.eval_precision]
    return model, config, chosen


# --- games
class View(NamedTuple):
    """One moment of a game, with all that the panel tells of it."""

    title: str
    chars: np.ndarray  # [24, 80] uint8
    colors: np.ndarray  # [24, 80] int8
    cursor: Tuple[int, int]
    step: int  # actions before this moment
    turn: int
    score: int
    opinion: Optional[Opinion] = None
    played: Optional[int] = None  # the recorded action, UNKNOWN_KEY if its key is none
    agreed: int = 0  # recorded actions that were the agent's favourite, this one included
    compared: int = 0
    note: str = ""  # how the game ended, or which part of it this is


def agent_game(actor: Actor, config: TrainConfig, character: str, seed: int, number: int, max_steps: int) -> Generator[View, None, None]:
    """Game `number` of an evaluation with this seed. The slot's games before it are played unseen."""
    earlier = list(range(number % config.eval_processes, number, config.eval_processes))
    game = NetHackGame(character, max_steps=config.eval_max_steps)
    try:
        for k in tqdm(earlier, desc="playing the slot's games before it", unit="game", disable=None if earlier else True):
            obs, done = game.reset(*game_seeds(seed, k)), False
            actor.begin_game()
            while not done:
                obs, _, done, _ = game.step(actor.act(obs).action)
        game.max_steps = max_steps
        title, note = f"{character}, game {number} of seed {seed}", ""
        obs = game.reset(*game_seeds(seed, number))
        actor.begin_game()
        while not note:
            opinion = actor.act(obs)
            yield View(title, obs["tty_chars"], obs["tty_colors"], tuple(obs["tty_cursor"].tolist()), game.steps,
                       int(game.last_blstats[20]), game.score, opinion)  # fmt: skip
            obs, _, done, info = game.step(opinion.action)
            note = {"died": "the game is over"}.get(info["end"], f"stopped: {info['end']}") if done else ""
        yield View(title, obs["tty_chars"], obs["tty_colors"], tuple(obs["tty_cursor"].tolist()), game.steps,
                   int(game.last_blstats[20]), game.score, note=note)  # fmt: skip
    finally:
        game.close()


def recorded_pieces(path: str) -> Iterator[Tuple[Frames, int]]:
    """All frames from the player's first on, in pieces, and how many of a piece are the player's: the rest is NLE's.

    Raises GameError after the last frame that can be read, if the recording breaks off.
    """
    held: Optional[Frames] = None
    damage: Optional[GameError] = None
    try:
        for piece in read_ttyrec(path):
            if held is None:
                held = piece.cut(find_first_frame(piece), len(piece.chars))
            elif len(piece.chars) >= 64:  # an end of play lies within the last 64 frames
                yield held, len(held.chars)
                held = piece
            else:
                held = Frames(*(np.concatenate(pair) for pair in zip(held, piece)))
    except GameError as error:
        damage = error
    if held is not None and len(held.chars):
        end = None if damage else find_end_of_play(held)
        yield held, len(held.chars) if end is None else end
        damage = damage or (GameError("the recording breaks off before the end of the game") if end is None else None)
    elif damage is None:
        damage = GameError("it holds no frame of play")
    if damage:
        raise damage


def title_of(path: str) -> str:
    """The file's name, and what the xlogfile beside it says of the game."""
    name = os.path.basename(path)
    for xlogfile in sorted(Path(path).parent.glob("*.xlogfile")):
        try:
            lines = parse_xlogfile(xlogfile)
        except OSError:
            continue
        for line in lines:
            if line.get("ttyrecname") == name:
                return f"{character_of(line)}, {line.get('points', '?')} points: {line.get('death', '?')}"
    return name


def recorded_game(path: str, actor: Optional[Actor], max_steps: int) -> Generator[View, None, None]:
    """A recorded game from the player's first frame; with an actor also what it would have done. Raises GameError."""
    title, read_status = title_of(path), StatusReader()
    step = turn = score = agreed = compared = 0
    if actor is not None:
        actor.begin_game()
    for frames, playing in recorded_pieces(path):
        for t in range(len(frames.chars)):
            if step >= max_steps:
                return
            blstats = read_status(frames.chars[t : t + 1])[0]
            turn = int(blstats[20]) or turn  # hidden by a menu: as before
            opinion, played, note = None, None, "the game is over"
            if t < playing:
                note, played, score = "", int(frames.actions[t]), int(frames.scores[t])
                if actor is not None:
                    obs = {"tty_chars": frames.chars[t], "tty_colors": frames.colors[t], "tty_cursor": frames.cursor[t], "blstats": blstats}
                    opinion = actor.act(obs)
                    actor.was_played(played)
                    if played != UNKNOWN_KEY:
                        compared += 1
                        agreed += same_key(opinion.favourite, played)
            yield View(title, frames.chars[t], frames.colors[t], tuple(frames.cursor[t].tolist()), step, turn, score, opinion, played,
                       agreed, compared, note)  # fmt: skip
            step += 1


# --- drawing
class Canvas:
    """A screen of characters, each with one of 16 colours and possibly inverse; blank at first."""

    def __init__(self, rows: int, columns: int) -> None:
        self.chars = np.full((rows, columns), ord(" "), dtype=np.uint8)
        self.colors = np.full((rows, columns), GRAY, dtype=np.uint8)
        self.inverse = np.zeros((rows, columns), dtype=bool)
        self.cursor = (0, 0)

    def write(self, row: int, column: int, pieces: Sequence[Piece], last: int) -> None:
        """Pieces of text from a place on, as far as column `last`."""
        for text, color, inverse in pieces:
            codes = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)[: max(0, last - column)]
            part = (row, slice(column, column + len(codes)))
            self.chars[part], self.colors[part], self.inverse[part] = codes, color, inverse
            column += len(codes)

    def clip(self, rows: int, columns: int) -> "Canvas":
        clipped = Canvas(min(rows, len(self.chars)), min(columns, self.chars.shape[1]))
        for name in ("chars", "colors", "inverse"):
            setattr(clipped, name, getattr(self, name)[:rows, :columns])
        clipped.cursor = (min(self.cursor[0], rows - 1), min(self.cursor[1], columns - 1))
        return clipped


def panel_lines(view: View, width: int) -> List[List[Piece]]:
    """The panel's text: where the game stands, the value, and the likeliest actions or the chosen one."""

    def plain(text: str, color: int = GRAY) -> List[Piece]:
        return [(text, color, False)]

    def split(text: str, color: int) -> List[List[Piece]]:
        """At most two lines."""
        if len(text) <= width:
            return [plain(text, color)]
        cut = text.rfind(" ", 0, width + 1)
        cut = cut if cut > 0 else width
        return [plain(text[:cut], color), plain(text[cut:].strip()[:width], color)]

    opinion = view.opinion
    lines = split(view.title, WHITE)
    lines.append([("step ", DARK, False), (f"{view.step:<9,}", WHITE, False), ("turn ", DARK, False), (f"{view.turn:,}", WHITE, False)])
    lines.append([("score ", DARK, False), (f"{view.score:<8,}", WHITE, False)])
    if opinion is not None and opinion.value is not None:
        lines[-1] += [("value ", DARK, False), (f"{opinion.value:+.3f}", WHITE, False)]
    if view.note:
        return lines + split(view.note, YELLOW)
    if view.played is not None:
        name = action_name(view.played) if view.played != UNKNOWN_KEY else "a key that is no action"
        lines.append([("played   ", DARK, False), (name, YELLOW, False)])
    if opinion is None:
        return lines
    if view.played is None:
        lines.append([("presses  ", DARK, False), (action_name(opinion.action), YELLOW, False)])
    else:
        same = view.played != UNKNOWN_KEY and same_key(opinion.favourite, view.played)
        lines.append([("agent    ", DARK, False), (action_name(opinion.favourite), GREEN if same else RED, False)])
        share = f"{view.agreed / view.compared:.1%} of {view.compared:,}" if view.compared else "-"
        lines.append([("agreement ", DARK, False), (share, WHITE, False)])
    shown = opinion.probabilities if opinion.probabilities is not None else opinion.outputs
    if shown is None:
        return lines + [plain("this submission shows neither", DARK), plain("probabilities nor a value", DARK)]
    if opinion.probabilities is None:
        lines += [plain("the submission's outputs", DARK), plain("(no probabilities, no value)", DARK)]
    for action in np.argsort(-shown, kind="stable")[:TOP].tolist():
        chosen = action == opinion.action if view.played is None else view.played != UNKNOWN_KEY and same_key(action, view.played)
        color = YELLOW if chosen else GRAY
        named = (f"{action_name(action)[:20]:<20} ", color, False)
        if opinion.probabilities is None:
            lines.append([named, (f"{shown[action]:>9.3f}", color, False)])
        else:
            bar = " " * round(10 * float(shown[action]))
            lines.append([named, (f"{shown[action]:>6.1%} ", color, False), (bar, color if chosen else BLUE, True)])
    return lines


def draw(view: View, below: bool = False, footer: Sequence[str] = ()) -> Canvas:
    """The game, and the panel at its right or below it, with the footer's lines at its end."""
    canvas = Canvas(ROWS + BELOW, COLS) if below else Canvas(ROWS, WIDTH)
    colors = view.colors.astype(np.int64)
    canvas.chars[:ROWS, :COLS] = np.where((view.chars >= 32) & (view.chars < 127), view.chars, np.where(view.chars < 32, 32, ord("?")))
    canvas.colors[:ROWS, :COLS] = np.where(colors & 15 == 0, GRAY, colors & 15)  # black on black would not be seen
    canvas.inverse[:ROWS, :COLS] = colors & 16 != 0
    top, left, width = (ROWS + 1, 0, COLS) if below else (0, COLS + 2, PANEL - 2)
    if below:
        canvas.write(ROWS, 0, [("-" * COLS, DARK, False)], COLS)
    else:
        canvas.chars[:, COLS], canvas.colors[:, COLS] = ord("|"), DARK
    last = len(canvas.chars)
    for row, line in enumerate(panel_lines(view, width)):
        if top + row < last - len(footer):
            canvas.write(top + row, left, line, left + width)
    for row, text in enumerate(footer):
        canvas.write(last - len(footer) + row, left, [(text, DARK, False)], left + width)
    canvas.cursor = (min(view.cursor[0], ROWS - 1), min(view.cursor[1], COLS - 1))
    return canvas


def style_code(color: int, inverse: bool) -> str:
    return f"\x1b[0;{'7;' if inverse else ''}{30 + color if color < 8 else 82 + color}m"


def ansi(canvas: Canvas, before: Optional[Canvas] = None) -> str:
    """Escape sequences that turn a terminal that shows `before` (None: anything) into `canvas`."""
    fresh = before is None or before.chars.shape != canvas.chars.shape
    parts = ["\x1b[0m\x1b[2J"] if fresh else []
    base = Canvas(*canvas.chars.shape) if before is None or fresh else before
    blank = (canvas.chars == ord(" ")) & (base.chars == ord(" ")) & ~canvas.inverse & ~base.inverse  # whatever their colour
    changed = ((canvas.chars != base.chars) | (canvas.colors != base.colors) | (canvas.inverse != base.inverse)) & ~blank
    for row in np.flatnonzero(changed.any(axis=1)).tolist():
        columns = np.flatnonzero(changed[row])
        starts = np.flatnonzero(np.diff(columns, prepend=-9) > 4)  # closer ones go in one: moving costs some 7 bytes
        for begin, end in zip(columns[starts].tolist(), (columns[np.append(starts[1:], len(columns)) - 1] + 1).tolist()):
            parts.append(f"\x1b[{row + 1};{begin + 1}H")
            style = None
            for column in range(begin, end):
                wanted = (int(canvas.colors[row, column]), bool(canvas.inverse[row, column]))
                if wanted != style:
                    parts.append(style_code(*wanted))
                    style = wanted
                parts.append(chr(canvas.chars[row, column]))
    parts.append(f"\x1b[0m\x1b[{canvas.cursor[0] + 1};{canvas.cursor[1] + 1}H")
    return "".join(parts)


# --- files
class Cast:
    """Writes an asciicast of version 2: a header, then [seconds, "o", text] for every step."""

    def __init__(self, path: str, title: str) -> None:
        self.file = open(path, "w", encoding="utf-8")
        header = {"version": 2, "width": WIDTH, "height": ROWS, "timestamp": int(time.time()), "title": title,
                  "env": {"TERM": "xterm-256color"}}  # fmt: skip
        self.file.write(json.dumps(header) + "\n")
        self.before: Optional[Canvas] = None
        self.time = 0.0

    def add(self, canvas: Canvas, seconds: float) -> None:
        """Shows the canvas for so long."""
        self.file.write(json.dumps([round(self.time, 4), "o", ansi(canvas, self.before)]) + "\n")
        self.before, self.time = canvas, self.time + seconds

    def close(self) -> None:
        self.file.write(json.dumps([round(self.time, 4), "o", "\x1b[0m"]) + "\n")  # the last picture stays as long as the others
        self.file.close()


def monospaced_font() -> Any:
    """DejaVu Sans Mono, which matplotlib brings along, or else Pillow's own small font."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")
    for place in spec.submodule_search_locations or () if spec else ():
        path = os.path.join(place, "mpl-data", "fonts", "ttf", "DejaVuSansMono.ttf")
        if os.path.isfile(path):
            return ImageFont.truetype(path, 13)
    return ImageFont.load_default_imagefont()


class Painter:
    """Canvas to picture: an array of indices into a palette of 16 colours in 8 shades each."""

    SHADES = 8

    def __init__(self) -> None:
        from PIL import Image, ImageDraw

        font = monospaced_font()
        bottom = font.getbbox("M")[3]
        self.width, self.height = math.ceil(font.getlength("M") - 0.2), max(font.getbbox("|gjy_")[3], bottom) + 1
        self.glyphs = np.zeros((128, self.height, self.width), dtype=np.uint8)
        for code in range(33, 127):
            image = Image.new("L", (self.width, self.height))
            ImageDraw.Draw(image).text((0, 0), chr(code), fill=255, font=font)
            self.glyphs[code] = np.round(np.asarray(image, dtype=np.float32) / 255 * (self.SHADES - 1))
        shades = np.arange(self.SHADES)[None, :, None] / (self.SHADES - 1)
        self.palette = np.round(np.array(RGB)[:, None, :] * shades).astype(np.uint8).reshape(-1, 3)

    def paint(self, canvas: Canvas) -> np.ndarray:
        """-> [rows * height, columns * width] uint8."""
        inverse = canvas.inverse.copy()
        inverse[canvas.cursor] ^= True  # the cursor is a block
        shades = self.glyphs[canvas.chars]  # [rows, columns, height, width]
        shades = np.where(inverse[..., None, None], self.SHADES - 1 - shades, shades)
        picture = canvas.colors[..., None, None] * np.uint8(self.SHADES) + shades
        picture[shades == 0] = 0  # one black, so that what does not change is the same
        rows, columns = canvas.chars.shape
        return picture.transpose(0, 2, 1, 3).reshape(rows * self.height, columns * self.width).astype(np.uint8)


class Gif:
    """Writes a GIF picture by picture, each only where it differs from the one before: games are long."""

    SHORTEST = 0.02  # seconds: viewers show anything shorter for longer

    def __init__(self, path: str) -> None:
        self.painter = Painter()
        self.file = open(path, "wb")
        self.shown: Optional[np.ndarray] = None
        self.waiting: Optional[np.ndarray] = None
        self.seconds = 0.0  # that the waiting picture is to be shown
        self.owed = 0.0  # what rounding to hundredths has left over

    def _image(self, picture: np.ndarray) -> Any:
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(picture))  # of greys: it gets the palette next
        image.putpalette(self.painter.palette.tobytes())
        return image

    def add(self, canvas: Canvas, seconds: float) -> None:
        """Shows the canvas for so long; pictures that are too short to be seen are left out, their time is not."""
        picture = self.painter.paint(canvas)
        if self.waiting is not None and self.seconds >= self.SHORTEST - 1e-9 and not np.array_equal(picture, self.waiting):
            self._flush()
        self.waiting, self.seconds = picture, self.seconds + seconds

    def _flush(self) -> None:
        from PIL import GifImagePlugin

        picture, box = self.waiting, (0, 0)
        if picture is None:
            return
        if self.shown is None:
            self.file.writelines(GifImagePlugin.getheader(self._image(picture), info={"loop": 0})[0])
            part = picture
        else:
            rows, columns = (np.flatnonzero(np.not_equal(picture, self.shown).any(axis=axis)) for axis in (1, 0))
            part = picture[:1, :1]
            if len(rows):
                box = (int(columns[0]), int(rows[0]))
                part = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        hundredths = min(max(round(100 * (self.seconds + self.owed)), 2), 65535)
        self.owed += self.seconds - hundredths / 100
        self.file.writelines(GifImagePlugin.getdata(self._image(part), box, duration=10 * hundredths))
        self.shown, self.waiting, self.seconds = picture, None, 0.0

    def close(self) -> None:
        self._flush()
        if self.shown is not None:
            self.file.write(b";")
        self.file.close()


# --- the terminal
def terminal_size() -> Tuple[int, int]:
    """Columns and rows of the terminal itself: the variables COLUMNS and LINES do not follow a window that changes."""
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    return columns or COLS, rows or ROWS  # 0 where it does not know


class Terminal:
    """The user's terminal: its alternate screen, keys without Enter. Always restored by `leave`."""

    def __init__(self) -> None:
        self.input = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self.saved = termios.tcgetattr(self.input) if self.input is not None else None
        self.before: Optional[Canvas] = None
        self.size = (0, 0)

    def enter(self) -> None:
        if self.input is not None:
            tty.setcbreak(self.input)
        self._write("\x1b[?1049h\x1b[2J")
        self.before = None

    def leave(self) -> None:
        self._write("\x1b[0m\x1b[?1049l")
        if self.input is not None and self.saved is not None:
            termios.tcsetattr(self.input, termios.TCSADRAIN, self.saved)

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def suspend(self, *_: Any) -> None:
        """Ctrl-Z: gives the terminal back until the program goes on."""
        self.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.enter()

    def resized(self) -> bool:
        return terminal_size() != self.size

    def show(self, view: View, footer: Sequence[str]) -> None:
        columns, rows = size = terminal_size()
        if size != self.size:
            self.before, self.size = None, size
        canvas = draw(view, below=columns < WIDTH and rows >= ROWS + 9, footer=footer)
        if rows < len(canvas.chars) or columns < canvas.chars.shape[1]:
            canvas = canvas.clip(rows, columns)
        self._write(ansi(canvas, self.before))
        self.before = canvas

    def keys(self, seconds: float) -> List[str]:
        """Keys pressed within so many seconds; returns at the first."""
        if self.input is None:
            time.sleep(seconds)
            return []
        if not select.select([self.input], [], [], max(seconds, 0.0))[0]:
            return []
        typed = os.read(self.input, 64).decode("ascii", "replace")
        if not typed:
            return ["q"]  # the terminal is gone
        for arrow, key in (("\x1b[A", "+"), ("\x1b[B", "-"), ("\x1b[C", "n"), ("\x1b[D", ""), ("=", "+"), ("_", "-"), (".", "n")):
            typed = typed.replace(arrow, key)
        return list(typed)


class Player:
    """Shows views in the terminal at a speed that the user changes, until they end or the user quits."""

    SLOWEST, FASTEST = 0.1, 1000.0
    REDRAW = 1 / 60  # seconds: faster than that nobody sees

    def __init__(self, terminal: Terminal, speed: float) -> None:
        self.terminal, self.speed, self.paused, self.quit, self.drawn = terminal, speed, False, False, 0.0
        self.due = 0.0

    def _footer(self, ended: bool) -> List[str]:
        state = "END" if ended else "PAUSED" if self.paused else f"{self.speed:.3g} steps/s"
        return [state, "space pause  n step  + - speed  q quit"]

    def _show(self, view: View, ended: bool = False) -> None:
        self.terminal.show(view, self._footer(ended))
        self.drawn = time.monotonic()

    def _press(self, key: str) -> bool:
        """Whether the key asks for the next step."""
        if key in ("q", "Q"):
            self.quit = True
        elif key == " ":
            self.paused = not self.paused
            self.due = time.monotonic()
        elif key in ("+", "-"):
            self.speed = min(max(self.speed * (1.5 if key == "+" else 1 / 1.5), self.SLOWEST), self.FASTEST)
            self.due = min(self.due, time.monotonic() + 1 / self.speed)
        elif key == "n":
            self.paused = True
            return True
        return False

    def step(self, view: View) -> bool:
        """Shows the view until the next is due. False: the user quits."""
        now = time.monotonic()
        if self.paused or now - self.drawn >= self.REDRAW or self.due > now:
            self._show(view)
        self.due = max(self.due, now) + 1 / self.speed
        while not self.quit:
            left = 0.25 if self.paused else min(self.due - time.monotonic(), 0.25)
            for key in self.terminal.keys(max(left, 0.0)):
                if self._press(key):
                    return True
                self._show(view)
            if self.terminal.resized():
                self._show(view)
            if not self.paused and time.monotonic() >= self.due:
                break
        return not self.quit

    def hold(self, view: View) -> None:
        """The last view, until the user quits."""
        self._show(view, ended=True)
        while self.terminal.input is not None and not self.quit:
            for key in self.terminal.keys(0.25):
                self._press(key)
            if self.terminal.resized():
                self._show(view, ended=True)


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP leave through `finally`, so that NLE's folders go and the terminal is restored."""

    def leave(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def entered(terminal: Optional[Terminal]) -> Iterator[None]:
    if terminal is None:
        yield
        return
    before = signal.signal(signal.SIGTSTP, terminal.suspend)
    try:
        terminal.enter()
        yield
    finally:
        terminal.leave()
        signal.signal(signal.SIGTSTP, before)


LAST_SECONDS = 3.0  # the last picture in files


def play(views: Generator[View, None, None], writers: Sequence[Any], terminal: Optional[Terminal],
         speed: float) -> Tuple[Optional[View], Optional[str]]:  # fmt: skip
    """Shows and writes the views. -> the last one seen, and what was wrong with the game if it could not be read to its end."""
    player = Player(terminal, speed) if terminal is not None else None
    bar = tqdm(unit="step", desc="writing", disable=None if terminal is None else True)
    last: Optional[View] = None
    problem: Optional[str] = None
    try:
        with entered(terminal):
            try:
                for view in views:
                    if last is not None:
                        for writer in writers:
                            writer.add(draw(last), 1 / (player.speed if player else speed))
                    last = view
                    bar.update()
                    if player is not None and not player.step(view):
                        break
            except GameError as error:
                problem = str(error)
            if player is not None and last is not None and not player.quit:
                player.hold(last)
    except KeyboardInterrupt:  # what was seen is kept
        if terminal is None:
            problem = "interrupted"
    finally:
        views.close()
        bar.close()
        for writer in writers:
            if last is not None:
                writer.add(draw(last), LAST_SECONDS)
            writer.close()
    return last, problem


def summary(view: View, game: Optional[str]) -> str:
    """What was seen, in one line."""
    text = f"{game or view.title}: {view.step:,} steps, turn {view.turn:,}, score {view.score:,}; {view.note or 'not at its end'}"
    if view.compared:
        text += f"; the agent agrees on {view.agreed / view.compared:.1%} of {view.compared:,} keys"
    return text


# --- the command line
def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="best.pt, last.pt or <step>.pt of a run")
    parser.add_argument("--character", help="whom the agent plays (default: the first that the checkpoint was trained on)")
    parser.add_argument("--game", help="a recorded game, ttyrec3.bz2")
    parser.add_argument("--seed", type=int, help="seed of the evaluation whose game is played (default: the checkpoint's eval_seed)")
    parser.add_argument("--number", type=int, default=0, help="number of the game in that evaluation (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, help="stop after so many steps (default: as in evaluation; of a recording all)")
    parser.add_argument("--speed", type=float, default=10.0, help="steps a second (default: %(default)s)")
    parser.add_argument("--cast", help="write an asciicast to this file")
    parser.add_argument("--gif", help="write a GIF to this file")
    parser.add_argument("--live", action="store_true", help="play in the terminal also with --cast or --gif")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--submission", help="the submission's file, if the checkpoint is of one and it has moved")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what does not go together."""
    if not args.checkpoint and not args.game:
        raise UserError("nothing to watch: give --checkpoint FILE, --game FILE or both")
    if args.game and (args.character or args.number):
        raise UserError("--character and --number are the agent's own games': leave them out with --game")
    if args.game and not os.path.isfile(args.game):
        raise UserError(f"there is no recorded game {args.game}")
    if args.game and not args.game.endswith(".ttyrec3.bz2"):
        raise UserError(f"{args.game} is no ttyrec3.bz2 file")
    if args.character and args.character not in AUTOASCEND_MEAN_SCORE:
        close = difflib.get_close_matches(args.character, AUTOASCEND_MEAN_SCORE, n=3)
        raise UserError(f"unknown character {args.character!r}; did you mean {', '.join(close) or 'mon-hum-neu'}?")
    for name, least in (("seed", 0), ("number", 0), ("max_steps", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if not Player.SLOWEST <= args.speed <= Player.FASTEST:
        raise UserError(f"--speed must lie between {Player.SLOWEST} and {Player.FASTEST:.0f} steps a second, not {args.speed}")
    if args.cast and args.gif and os.path.abspath(args.cast) == os.path.abspath(args.gif):
        raise UserError("--cast and --gif name the same file")


def open_terminal(args: argparse.Namespace) -> Optional[Terminal]:
    """The terminal, if the game is to be played there. Raises UserError where it cannot be."""
    if (args.cast or args.gif) and not args.live:
        return None
    if not sys.stdout.isatty():
        raise UserError("standard output is no terminal: write to a file with --cast FILE or --gif FILE")
    columns, rows = terminal_size()
    if rows < ROWS or columns < COLS:
        raise UserError(f"the terminal has {columns} columns and {rows} rows: make it at least {COLS} x {ROWS}, "
                        f"or {WIDTH} x {ROWS} for the panel")  # fmt: skip
    return Terminal()


def open_writers(args: argparse.Namespace, title: str) -> List[Any]:
    writers: List[Any] = []
    for kind, path in ((Cast, args.cast), (Gif, args.gif)):
        if path:
            try:
                writers.append(Cast(path, title) if kind is Cast else Gif(path))
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from None
    return writers


def run(args: argparse.Namespace) -> int:
    check(args)
    terminal = open_terminal(args)
    actor = None
    if args.checkpoint:
        model, config, device = load_model(args.checkpoint, args.submission, args.device)
        seed = config.eval_seed if args.seed is None else args.seed
        rows, row = (1, 0) if args.game else (-(-config.eval_processes // 8) * 8, args.number % config.eval_processes)
        actor = Actor(model, device, seed, rows, row, config.eval_clear_state)
    if args.game:
        title = title_of(args.game)
        views = recorded_game(args.game, actor, args.max_steps or sys.maxsize)
    else:
        character = args.character or config.characters[0]
        assert actor is not None  # `check` has asked for a checkpoint or a game
        title = f"{character}, game {args.number} of seed {seed}"
        views = agent_game(actor, config, character, seed, args.number, args.max_steps or config.eval_max_steps)
    last, problem = play(views, open_writers(args, title), terminal, args.speed)
    if last is not None:
        print(summary(last, args.game))
    for path in (args.cast, args.gif):
        if path and last is not None:
            print(f"written: {path} ({os.path.getsize(path):,} bytes)")
    if problem == "interrupted":
        return 130
    if problem:
        raise UserError(f"{args.game}: {problem}" + (f" (after {last.step + 1:,} frames)" if last is not None else ""))
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    try:
        with signals_as_exits():
            return run(parse(argv))
    except UserError as error:
        print(f"watch: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
