# SPDX-License-Identifier: MIT
"""Watch an agent play, or a recorded game, in the terminal; or print either as text.

    python scripts/watch.py --checkpoint scripts/agents/small_512.pt   # the agent in the box plays
    python scripts/watch.py --game DIR/nle.123.0.ttyrec3.bz2           # a recorded game
    python scripts/watch.py --game FILE --checkpoint RUN/best.pt       # what would the agent do?
    python scripts/watch.py --checkpoint RUN/best.pt --every 100 > game.txt    # a run's, as text
    python scripts/watch.py --game FILE --html game.html               # a page for a browser
    python scripts/watch.py --run RUN --html FOLDER                    # of all games a run kept
    python scripts/watch.py --game PLAYER/2019-07-25.22_03_29.ttyrec.bz2    # a human's (NLD-NAO)

Beside the game a panel shows the five likeliest actions with their probabilities, the value, the
score and the turn. Keys: space pauses and goes on, n and b (or right and left) go one step on and
back, N and B 100 steps, + and - (or up and down) change the speed, p hides and shows the panel, q
quits. A terminal without room for the panel has it over the game, away from the cursor. Where
standard input or output is no terminal, frames are printed one after another.

With `--html` the game becomes one page instead, which holds all it needs: `game.html#frame=812`
opens at that frame. With `--run` the games that an evaluation kept (its setting `eval_replays`)
become pages in a folder, with an index.html; `--wandb` adds them to the run in wandb, which is
logged to as when it was made: offline without a key.

Recordings before ttyrec3 hold no scores, and those of humans no keys: a step is then a write to the
terminal. Line graphics are shown as ASCII.

The agent's game is the one that evaluation plays: `--seed` is its eval_seed (the checkpoint's if
left out), `--number` its game; an evaluation with other settings than the checkpoint's needs those
as well (`--eval_processes`, `--eval_max_steps`). Screens, recurrent state and drawn actions are the
same, step by step, on the same kind of device. Game k is played by slot k modulo eval_processes:
the slot's games before it are played first, unseen, since chance in a game depends on the tick at
which it begins. The value is in rewards of training: differences of the score over a scale.
"""

import argparse
import contextlib
import inspect
import itertools
import os
import select
import shutil
import signal
import sys
import tempfile
import termios
import textwrap
import tty
from pathlib import Path
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import html_page
import human_games
import numpy as np
import run_pages
import torch
from html_page import View
from nle import nethack
from shared import Parser, check_least

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import COLS, NO_ACTION, ROWS, UNKNOWN_KEY, UserError

PANEL = 36  # columns of the panel at the game's right, below it or over it, as there is room
JUMP = 100  # steps
NAMED_KEYS = {13: "Enter", 27: "ESC", 32: "space"}


def action_name(action: int) -> str:
    """'E (l)' for an index into nethack.ACTIONS: NLE's name (compass directions that run in lower
    case) and the key."""
    if action == UNKNOWN_KEY:
        return "a key that is no action"
    found = nethack.ACTIONS[action]
    name = found.name
    if isinstance(found, nethack.CompassDirectionLonger):
        name = f"run {name}"
    key = int(found)
    if key in NAMED_KEYS:
        return f"{name} ({NAMED_KEYS[key]})"
    meta = "M-" if key >= 128 else ""
    low = key & 127
    if low < 32:
        return f"{name} ({meta}^{chr(low + 64)})"
    return f"{name} ({meta}{chr(low)})"


class Actor:
    """Asks a model for actions just as `vec_evaluate` does: in row `row` of `rows`, with chance
    seeded by the tick."""

    def __init__(
        self, model: Any, device: torch.device, seed: int, rows: int = 1, row: int = 0
    ) -> None:
        self.model = model.eval()
        self.device = device
        self.seed = seed
        self.row = row
        self.previous = np.full(rows, NO_ACTION, dtype=np.int64)
        self.obs = pomdp.empty_observations(rows)
        self.forget()
        # None where a submission's model has no `head` that gives logits and values
        self.probabilities: Optional[np.ndarray] = None  # [A], the last action was drawn from them
        self.value: Optional[float] = None
        head = getattr(model, "head", None)
        if inspect.ismethod(head):
            model.head = lambda *inputs: self._keep(*head(*inputs))

    def _keep(self, logits: torch.Tensor, value: torch.Tensor) -> Any:
        """Takes what vec_act's own call of the head gives: the recurrent state must not step
        twice."""
        temperature = getattr(getattr(self.model, "hyper", None), "temperature", 1.0)
        shares = torch.softmax(logits[self.row, -1].float() / temperature, dim=0)
        self.probabilities = shares.cpu().numpy()
        self.value = float(value[self.row, -1])
        return logits, value

    def forget(self) -> None:
        """Another game begins: nothing of those before may enter it."""
        self.state: Any = None
        self.tick = 0
        self.previous[:] = NO_ACTION

    def act(self, obs: Dict[str, np.ndarray]) -> int:
        for name, array in self.obs.items():
            array[self.row] = obs[name]
        inputs = {name: array.copy() for name, array in self.obs.items()}
        inputs["prev_actions"] = self.previous.copy()
        torch.manual_seed(pomdp.derived_seed(self.seed, self.tick))
        actions, self.state = self.model.vec_act(inputs, self.state, device=str(self.device))
        self.tick += 1
        action = int(np.asarray(actions)[self.row])
        self.previous[self.row] = action
        return action


Views = Generator[View, None, None]


def view_of(game: pomdp.NetHackGame, obs: Dict[str, np.ndarray]) -> View:
    screen = (obs["tty_chars"], obs["tty_colors"], obs["tty_cursor"])
    return View(*screen, game.steps, game.turn, game.score)


def agent_game(actor: Actor, config: pomdp.TrainConfig, number: int, max_steps: int) -> Views:
    """Game `number` of an evaluation of the first character. The slot's games before it are played
    unseen."""
    slots = config.eval_processes
    game = pomdp.NetHackGame(config.characters[0], max_steps=config.eval_max_steps)
    with contextlib.closing(game):
        for k in range(number % slots, number + 1, slots):
            obs = game.reset(*pomdp.game_seeds(config.eval_seed, k))
            done = False
            actor.previous[actor.row] = NO_ACTION
            while not done and (k < number or game.steps < max_steps):
                view = view_of(game, obs)
                action = actor.act(obs)
                if k == number:
                    view = view._replace(probabilities=actor.probabilities, value=actor.value)
                    yield view._replace(action=action)
                obs, _, done, _ = game.step(action)
        note = f"the end: {game.end}" if done else ""
        yield view_of(game, obs)._replace(note=note)


def version_of(path: str) -> int:
    """Of a recording, by its name and its first records. Raises UserError for what is none."""
    try:
        version = human_games.version_of(Path(path))
        with contextlib.suppress(EOFError):  # it breaks off: what there is of it can be seen
            human_games.check_records(Path(path), version)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except pomdp.GameError as error:
        raise UserError(f"{path} cannot be shown: {error}") from None
    return version


def game_of_screens(path: str, version: int, max_steps: int) -> Views:
    """A recorded game of version 1 or 2, all of its frames."""
    turn = step = 0
    view = None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "game.bz2"
        try:
            human_games.plain_copy(Path(path), version, copy)
        except (OSError, EOFError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        for part in human_games.read_parts(copy, version):
            stats = pomdp.read_blstats(part.chars)
            for t in range(min(len(part.chars), max_steps - step)):
                if view is not None:
                    yield view
                turn = int(stats[t, nethack.NLE_BL_TIME]) or turn  # hidden by a menu: as before
                screen = (part.chars[t].copy(), part.colors[t].copy(), part.cursor[t].copy())
                view = View(*screen, step, turn, None)
                if version == 2:
                    view = view._replace(action=int(pomdp.KEY_TO_ACTION[part.keys[t]]))
                step += 1
            if step == max_steps:
                break
    if view is None:
        raise UserError(f"{path} holds no frame of play")
    if step < max_steps:
        view = view._replace(note="the recording ends")
    yield view


def recorded_game(path: str, actor: Optional[Actor], max_steps: int) -> Views:
    """A recorded game from the player's first frame; with an actor also what it would have done."""
    version = version_of(path)
    if version < 3 and actor is not None:
        raise UserError(
            f"{path} lacks the keys or scores that --checkpoint needs: only ttyrec3 has"
        )
    if version < 3:
        yield from game_of_screens(path, version, max_steps)
        return
    try:
        frames = pomdp.read_ttyrec(path)
    except pomdp.UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    first = pomdp.find_first_frame(frames)
    total = end = len(frames.chars)
    note = "the game is over"
    try:
        end = pomdp.find_end_of_play(frames)
    except pomdp.GameError as error:  # it breaks off: what there is of it can be seen
        note = str(error)
    if first == total:
        raise UserError(f"{path} holds no frame of play")
    turn = agreed = compared = 0
    for t in range(first, min(total, first + max_steps)):
        screen = (frames.chars[t], frames.colors[t], frames.cursor[t])
        stats = pomdp.read_blstats(frames.chars[t : t + 1])[0]
        turn = int(stats[nethack.NLE_BL_TIME]) or turn  # hidden by a menu: as before
        view = View(*screen, t - first, turn, int(frames.scores[min(t, end - 1)]))
        played = int(frames.actions[t])
        if t < end:
            view = view._replace(action=played)
        if t < end and actor is not None:
            actor.act(dict(zip(pomdp.OBSERVATIONS, (*screen, stats))))
            actor.previous[0] = NO_ACTION if played == UNKNOWN_KEY else played
            if played != UNKNOWN_KEY and actor.probabilities is not None:
                compared += 1
                # three keys have two actions each: either does the same
                likeliest = nethack.ACTIONS[actor.probabilities.argmax()]
                agreed += int(likeliest) == int(nethack.ACTIONS[played])
            said = f"the agent's likeliest: {agreed} of {compared} keys"
            view = view._replace(probabilities=actor.probabilities, value=actor.value, note=said)
        if t >= end or t + 1 == total:
            view = view._replace(note=note)
        yield view


# --- drawing
def panel(view: View, title: str) -> List[str]:
    lines = textwrap.wrap(title, PANEL)
    lines.append(f"step  {view.step:<11,}turn  {view.turn:,}")
    score = f"{view.score_text:<11}"
    if view.value is not None:
        score += f"value {view.value:+.3f}"
    lines.append(f"score {score}")
    if view.action is not None:
        lines.append(f"key   {action_name(view.action)}")
    lines += textwrap.wrap(view.note, PANEL)
    if view.probabilities is not None:
        for action in np.argsort(-view.probabilities, kind="stable")[: html_page.TOP].tolist():
            share = float(view.probabilities[action])
            mark = ">" if action == view.action else " "
            bar = "#" * round(8 * share)
            line = f"{mark} {action_name(action):<18.18} {share:6.1%} {bar}"
            lines.append(line.rstrip())
    return lines


COLOURS = [37, *range(31, 38), *range(90, 98)]  # black on black would not be seen


def game_lines(view: View, coloured: bool) -> List[str]:
    """The 24 lines of the game's terminal, in its colours by escape sequences or as plain text."""
    lines = [row.tobytes().decode("ascii") for row in html_page.plain_text(view.chars)]
    if not coloured:
        return lines
    for row, colors in enumerate(view.colors.tolist()):
        line = ""
        for color, run in itertools.groupby(range(COLS), key=colors.__getitem__):
            columns = list(run)
            inverse = "7;" * (color >> 4 & 1)
            line += f"\x1b[0;{inverse}{COLOURS[color & 15]}m"
            line += lines[row][columns[0] : columns[-1] + 1]
        lines[row] = line + "\x1b[0m"
    return lines


def draw(view: View, title: str, footer: str, with_panel: bool = True) -> str:
    """What turns the terminal into this view: the panel stands at the game's right, or below where
    it is narrow, or over the game where it is low as well, at the side where the cursor is not."""
    columns, rows = shutil.get_terminal_size()
    lines = game_lines(view, coloured=True)
    beside = [*panel(view, title), "", footer] if with_panel else []
    row, column = view.cursor.tolist()
    over = ""
    if columns >= COLS + 2 + PANEL:
        beside += [""] * (ROWS - len(beside))
        for number in range(ROWS):
            lines[number] += f"| {beside[number]}"
    elif rows > ROWS + len(beside):
        lines += ["-" * COLS, *beside]
    else:
        left = 1
        if column < COLS // 2:
            left = max(1, min(columns, COLS) - PANEL - 1)
        for number, text in enumerate(beside, 2):  # the message above stays
            over += f"\x1b[{number};{left}H| {text:<{PANEL}}"
    shown = "\x1b[H" + "\x1b[K\n".join(lines[:rows]) + "\x1b[K\x1b[J"
    return f"{shown}{over}\x1b[{row + 1};{column + 1}H"


# --- the terminal
ARROWS = {"\x1b[A": "+", "\x1b[B": "-", "\x1b[C": "n", "\x1b[D": "b", "=": "+"}
MOVES = {"n": 1, "b": -1, "N": JUMP, "B": -JUMP}
FASTER = {"+": 1.5, "-": 1 / 1.5}


def read_keys(seconds: float) -> str:
    """Keys pressed within so many seconds; returns at the first."""
    if not select.select([sys.stdin], [], [], seconds)[0]:
        return ""
    # the terminal is gone
    typed = os.read(sys.stdin.fileno(), 64).decode("ascii", "replace") or "q"
    for sequence, key in ARROWS.items():
        typed = typed.replace(sequence, key)
    return typed


def send(text: str) -> None:
    """To the terminal, past sys.stdout: a signal's handler must not enter its buffer again."""
    data = text.encode("utf-8", "replace")
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


@contextlib.contextmanager
def screen() -> Iterator[Callable[[str], None]]:
    """The terminal's alternate screen, without wrapping, and keys without Enter; restored in any
    case, also while the process is stopped (Ctrl-Z)."""
    saved = termios.tcgetattr(sys.stdin)
    shown = ""

    def write(text: str) -> None:
        nonlocal shown
        shown = text
        send(text)

    def enter() -> None:
        tty.setcbreak(sys.stdin)
        send("\x1b[?1049h\x1b[?7l\x1b[2J")

    def leave() -> None:
        send("\x1b[0m\x1b[?7h\x1b[?1049l")
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)

    def resume(*_: Any) -> None:
        if os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():  # by `bg`: the terminal is another's
            os.kill(os.getpid(), signal.SIGTTOU)
        enter()
        send(shown)

    def suspend(number: int, _frame: Any) -> None:
        leave()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # it stops here, unless no shell could make it go on
        signal.signal(number, suspend)
        resume()

    before = [signal.signal(signal.SIGTSTP, suspend), signal.signal(signal.SIGCONT, resume)]
    try:
        enter()
        yield write
    finally:
        for number, handler in zip((signal.SIGTSTP, signal.SIGCONT), before):
            signal.signal(number, handler)
        leave()


def play(views: Views, title: str, at: int, speed: float) -> View:
    """Shows the views from number `at` on, until the user quits -> the one shown last. What was
    seen is kept."""
    seen = [next(views)]
    paused = False
    with_panel = True
    with screen() as write:
        while True:
            seen.extend(itertools.islice(views, max(0, at + 1 - len(seen))))
            ended = at >= len(seen)
            at = min(at, len(seen) - 1)
            state = f"{speed:.3g} steps/s"
            seconds = 1 / speed
            if paused or ended:
                state = "END" if ended else "PAUSED"
                seconds = 0.25
            write(draw(seen[at], title, f"{state}  space n b N B + - p q", with_panel))
            keys = read_keys(seconds)
            for key in keys:
                if key in "qQ":
                    return seen[at]
                if key in FASTER:
                    speed = min(max(speed * FASTER[key], 0.1), 1000.0)
                if key == " ":
                    paused = not paused
                if key == "p":
                    with_panel = not with_panel
                if key in MOVES:
                    paused = True
                    at = max(0, at + MOVES[key])
            at += not paused and not keys


def print_frames(views: Views, title: str, start: int, every: int) -> View:
    """Every so many frames as text, each with its panel -> the last frame."""
    for number, view in enumerate(views):
        if number >= start and (number - start) % every == 0:
            lines = [*game_lines(view, coloured=False), *panel(view, title), "-" * COLS]
            print("\n".join(lines), flush=True)
    return view


def write_html(args: argparse.Namespace, views: Views, title: str, path: Path) -> View:
    """The game as a page for a browser: every so many frames, and the last -> the last frame."""
    page = html_page.Page()
    added = False
    for number, view in enumerate(pomdp.progress_bar(iterable=views, desc=str(path), unit="step")):
        if number < args.start:
            continue
        page.see(view)
        added = (number - args.start) % args.every == 0
        if added:
            page.add(view)
    if not len(page):
        raise UserError(f"no frame to show: the game has {number + 1:,}, --start is {args.start:,}")
    if not added:
        page.add(view)
    names = list(map(action_name, range(pomdp.NUM_ACTIONS)))
    if args.checkpoint:
        title += f" ({'/'.join(Path(args.checkpoint).parts[-2:])})"
    content = page.make(title, names, agent=not args.game, speed=args.speed)
    pomdp.write_atomically(path, content)
    print(f"{path}: {len(page):,} frames, {len(content):,} bytes")
    return view


def write_run(args: argparse.Namespace, actor: Optional[Actor]) -> None:
    """Pages of the games that a run kept, and their index. Games that cannot be read are left out
    and named."""
    folder = Path(args.run)
    pages = Path(args.html)
    games = []
    for game in run_pages.kept_games(folder, args.all):
        title = f"{game.character}, game {game.number} at step {game.step:,} of {folder.name}"
        if actor is not None:
            actor.forget()
        try:
            pages.mkdir(parents=True, exist_ok=True)
            views = recorded_game(str(game.path), actor, args.max_steps)
            with contextlib.closing(views):
                write_html(args, views, title, pages / game.page)
            games.append(game)
        except OSError as error:
            raise UserError(f"cannot write to {pages}: {error.strerror}") from None
        except UserError as error:
            pomdp.warn(f"left out: {error}")
    if not games:
        raise UserError(f"there is no game to show in {folder}")
    index = pages / "index.html"
    title = f"Games of {folder.resolve().name}"
    pomdp.write_atomically(index, run_pages.make_index(title, games))
    print(f"{index}: {len(games)} games")
    if args.wandb:
        run_pages.log_pages(folder, pages, games)


# --- the command line
def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="best.pt, last.pt or <step>.pt of a run")
    add("--game", metavar="FILE", help="a recording: ttyrec3.bz2, ttyrec2.bz2 or ttyrec.bz2")
    add("--run", metavar="RUN_DIR", help="folder of a run or an evaluation whose games are shown")
    add("--html", metavar="PAGE", help="write a page for a browser instead; with --run a folder")
    add("--all", action="store_true", help="with --run: all evaluations, not the newest alone")
    add("--wandb", action="store_true", help="with --run: also log the pages to its run in wandb")
    add("--start", type=int, default=0, help="step to begin with (default: %(default)s)")
    add("--max_steps", type=int, default=1_000_000, help="stop there (default: the game's end)")
    add("--speed", type=float, default=10.0, help="steps a second (default: %(default)s)")
    add("--every", type=int, default=1, help="of text and pages: every so many frames (default: 1)")
    agent = parser.add_argument_group("the agent's game; the checkpoint knows what is left out")
    add = agent.add_argument
    add("--character", help="whom it plays: role-race-alignment, such as mon-hum-neu")
    add(
        "--seed",
        type=int,
        dest="eval_seed",
        metavar="SEED",
        help="of the evaluation whose game is played",
    )
    add("--number", type=int, default=0, help="of the game in it (default: %(default)s)")
    add("--eval_processes", type=int, help="games side by side in it")
    add("--eval_max_steps", type=int, help="its games' limit")
    add("--device", help="auto, cpu, cuda or cuda:N (default: auto)", default="auto")
    add("--submission", help="the submission's file, if the checkpoint is of one and it has moved")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what does not go together."""
    check_least(args, number=0, start=0, max_steps=1, every=1, speed=0.1)
    if args.run and (args.game or not args.html):
        raise UserError("--run RUN_DIR needs --html FOLDER, and takes no --game")
    if (args.wandb or args.all) and not args.run:
        raise UserError("--wandb and --all go with --run RUN_DIR")
    if not args.checkpoint and not args.game and not args.run:
        raise UserError("nothing to watch: give --checkpoint FILE, --game FILE or both")
    if args.game and not Path(args.game).is_file():
        raise UserError(f"there is no recorded game {args.game}: give one's file")
    if args.html and not args.run:
        page = Path(args.html)
        if page.is_dir() or not os.access(page.parent, os.W_OK):
            raise UserError(f"cannot write {page}: --html takes a file in a folder that is there")


SETTINGS = ("character", "device", "submission", "eval_seed", "eval_processes", "eval_max_steps")


def load_actor(args: argparse.Namespace) -> Tuple[Actor, pomdp.TrainConfig]:
    settings = {name: getattr(args, name) for name in SETTINGS}
    given = {name: value for name, value in settings.items() if value is not None}
    algorithm, config, _ = pomdp.load_agent(args.checkpoint, **given)
    rows = 1
    row = 0
    if not args.game and not args.run:  # where it sits in the evaluation
        rows = -(-config.eval_processes // 8) * 8
        row = args.number % config.eval_processes
    device = pomdp.choose_device(config)
    return Actor(algorithm.model, device, config.eval_seed, rows, row), config


def run(args: argparse.Namespace) -> None:
    check(args)
    actor: Optional[Actor] = None
    if args.checkpoint:
        actor, config = load_actor(args)
    if args.run:
        write_run(args, actor)
        return
    if args.game:
        title = "/".join(Path(args.game).parts[-2:])
        views = recorded_game(args.game, actor, args.max_steps)
    else:
        assert actor is not None
        title = f"{config.characters[0]}, game {args.number} of seed {config.eval_seed}"
        views = agent_game(actor, config, args.number, args.max_steps)
    with contextlib.closing(views):
        if args.html:
            last = write_html(args, views, title, Path(args.html))
        elif sys.stdin.isatty() and sys.stdout.isatty():
            last = play(views, title, args.start, args.speed)
        else:
            last = print_frames(views, title, args.start, args.every)
    at = f"step {last.step:,}, turn {last.turn:,}, score {last.score_text}"
    print(f"{title}: {at}; {last.note or 'not at its end'}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    return make_parser().run(run, argv, if_stopped="stopped")


if __name__ == "__main__":
    # through `finally`: the terminal is restored, NLE's folder goes
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
