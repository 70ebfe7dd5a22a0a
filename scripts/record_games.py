"""Play games of NetHack with a player of your choice and record them in NLD-AA's layout.

    python scripts/record_games.py --character mon-hum-neu --games 20 --out my_games --seed 1 --workers 2
    python custom_nethack_pomdp.py --data_path my_games --character mon-hum-neu

Every game gets a folder of its own, `OUT/<character>-<seed>-<k>/`, with `nle.<pid>.0.ttyrec3.bz2` (every frame of the
terminal, the key pressed at it and the score) and `nle.<pid>.xlogfile` (one line about the game), as
`nle.dataset.add_nledata_directory(OUT, name, db)` wants them. A folder appears under its name only when its game is over, so
an interrupted recording leaves whole games and nothing else.

Game k's seeds are drawn from (`--seed`, k), so the same command line records the same games, on any number of workers
(file names and times aside: they hold the process id and the clock).

A game is played to its end. What reaches `--max_steps` first is quit by pressing the keys a person would (ESC, then #quit and
y), so that it too has its line in the xlogfile; with `--leave_out_cut` it is thrown away instead. Either way it is counted.

A player is named as `module:function` (the module is looked for in the current folder, beside this script, and on the
Python path). The function is called once a game with a `numpy.random.Generator`, its only source of chance, and returns an
object with

    act(obs) -> int     an index into nle.nethack.ACTIONS, 0 to 120

where obs holds fresh arrays of what the terminal shows: `tty_chars` uint8 [24, 80], `tty_colors` int8 [24, 80] (0..31; bit 16
is inverse), `tty_cursor` uint8 [2] (row, column) and `blstats` int32 [27] (the status lines in numbers).

The default player is `scripts/scripted_player.py`, which looks at the terminal only. Its scores (a random walk's are below
30), from `--character CHARACTER --games 100 --seed 100 --workers 2 --out OUT` with nle 1.3.0:

    character      mean score (95 % interval, bootstrap)    median    deepest level, mean    turns, mean    keys, mean
    mon-hum-neu    2178  (1887 to 2485)                      2026     5.9                    5066           5416
    val-hum-neu    1207  (1045 to 1376)                       988     5.0                    4240           3155
    ran-hum-neu     967   (859 to 1087)                       796     4.6                    3790           2726
"""
import argparse
import difflib
import glob
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
for folder in (HERE, os.path.dirname(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from nle import nethack

from custom_nethack_pomdp import AUTOASCEND_MEAN_SCORE, QUIT, NetHackGame, UserError

KEYS = [int(action) for action in nethack.ACTIONS]


class Task(NamedTuple):
    """One game to record."""

    character: str
    seed: int
    k: int
    out: str
    player: str
    max_steps: int
    leave_out_cut: bool
    run: int  # this recording's process, which clears up

    @property
    def name(self) -> str:
        return f"{self.character}-{self.seed}-{self.k}"


def load_player(spec: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, function = spec.partition(":")
    if not module or not function:
        raise UserError(f"--player wants module:function, not {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module raises when it is imported
        raise UserError(f"cannot load the player {spec}: {error}") from error
    if not callable(found):
        raise UserError(f"the player {spec} is not callable")
    return found


def game_seeds(seed: int, k: int) -> Tuple[int, int, int]:
    """Seeds of game k: NetHack's own two, and the player's, whose chance stays apart from the game's."""
    core, disp, chance = np.random.SeedSequence([seed, k]).generate_state(3)  # words of 32 bits, which both NLE versions take
    return int(core), int(disp), int(chance)


def play(task: Task) -> Dict[str, Any]:
    """Plays and records one game; its folder appears under its name once the game is over.

    Returns a dict: name, frames (keys pressed), score (in the game, summed rewards), turns, depth (the deepest level), cut
    (whether --max_steps or 1,000 keys without a turn ended it) and kept (whether it is in the output folder).
    """
    core, disp, chance = game_seeds(task.seed, task.k)
    player = load_player(task.player)(np.random.default_rng(chance))
    # NLE names its files when it starts. Readers pass over folders with a dot in front, so half a game is never read.
    part = os.path.join(task.out, f".{task.name}.{task.run}.part")
    score, depth, frames = 0.0, 1, 0
    obs: Dict[str, np.ndarray] = {}
    info: Dict[str, Any] = {}
    try:
        game = NetHackGame(task.character, savedir=part)

        def press(action: int) -> bool:
            nonlocal score, depth, frames, obs, info
            obs, reward, done, info = game.step(action)
            score, frames = score + reward, frames + 1
            depth = max(depth, int(game.last_blstats[nethack.NLE_BL_DEPTH]))
            return done

        try:
            obs = game.reset(core, disp)
            done = False
            while not done and frames < task.max_steps:
                try:
                    action = int(player.act(obs))
                except Exception as error:
                    raise RuntimeError(f"the player failed in game {task.name}, at key {frames}") from error
                if not 0 <= action < len(KEYS):
                    raise UserError(f"the player answered {action} in game {task.name}: actions are 0 to {len(KEYS) - 1}")
                done = press(action)
            cut = info.get("end") != "died"
            for action in 3 * QUIT if cut else ():
                if info.get("end") != "died":
                    press(action)
            turns = int(game.last_blstats[nethack.NLE_BL_TIME])
        finally:
            game.close()
        # NLE writes its line when a game is over; a game without one would never be read.
        logs = [os.path.join(part, name) for name in os.listdir(part) if name.endswith(".xlogfile")]
        kept = any(os.path.getsize(log) > 0 for log in logs) and not (cut and task.leave_out_cut)
        if kept:
            for log in logs:
                os.chmod(log, 0o644)  # NLE makes it executable
            os.rename(part, os.path.join(task.out, task.name))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return dict(name=task.name, frames=frames, score=score, turns=turns, depth=depth, cut=cut, kept=kept)


def use_scratch(folder: str) -> None:
    tempfile.tempdir = folder


def record(tasks: List[Task], workers: int) -> List[Dict[str, Any]]:
    """Plays all tasks, with a progress bar; returns what `play` returns for each, in their order."""
    rows: List[Dict[str, Any]] = []
    # A worker that is stopped leaves NLE's temporary folders behind: they go with the one they are made in.
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(tasks), unit="game", disable=None) as bar:

        def add(row: Dict[str, Any]) -> None:
            rows.append(row)
            bar.set_postfix(score=f"{np.mean([row['score'] for row in rows]):.0f}")
            bar.update()

        if workers == 1:
            for task in tasks:
                add(play(task))
        else:
            # Spawned, not forked: a forked copy of an environment would delete its parent's files.
            try:
                with multiprocessing.get_context("spawn").Pool(workers, use_scratch, (scratch,)) as pool:
                    for row in pool.imap_unordered(play, tasks):
                        add(row)
            finally:
                for left in glob.glob(os.path.join(glob.escape(tasks[0].out), f".*.{tasks[0].run}.part")):
                    shutil.rmtree(left, ignore_errors=True)
    place = {task.name: i for i, task in enumerate(tasks)}
    return sorted(rows, key=lambda row: place[row["name"]])


def bootstrap(values: np.ndarray, draws: int = 10_000) -> np.ndarray:
    """95 % interval [2] of the mean of `values` [N], by resampling."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return np.percentile(values[picks].mean(1), (2.5, 97.5))


def summary(rows: List[Dict[str, Any]]) -> str:
    """What was recorded, in a few lines."""
    kept = [row for row in rows if row["kept"]]
    cut = [row for row in rows if row["cut"]]
    lines = [f"{len(kept)} games recorded, {sum(row['frames'] for row in kept):,} frames"]
    for key, what in (("score", "score"), ("turns", "turns"), ("depth", "deepest level"), ("frames", "frames")):
        values = np.array([row[key] for row in kept], dtype=float)
        if len(values):
            low, high = bootstrap(values)
            lines.append(f"  {what:14s} mean {values.mean():9.1f} (95 % interval {low:.1f} to {high:.1f})   "
                         f"median {np.median(values):9.1f}   max {values.max():9.1f}")  # fmt: skip
    if cut:
        quit_there = sum(row["kept"] for row in cut)
        lines.append(f"  {len(cut)} games cut short (--max_steps, or 1,000 keys without a turn): "
                     f"{quit_there} quit there and recorded, {len(cut) - quit_there} left out")  # fmt: skip
    lost = [row["name"] for row in rows if not row["kept"] and not row["cut"]]
    if lost:
        lines.append(f"  {len(lost)} games left out, for which NLE wrote no xlogfile line: {' '.join(lost)}")
    return "\n".join(lines)


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--character", required=True, help="role-race-alignment[-gender], for example mon-hum-neu")
    parser.add_argument("--games", type=int, required=True, help="how many games to play")
    parser.add_argument("--out", required=True, help="folder for the recordings; made if need be, added to if it exists")
    parser.add_argument("--player", default="scripted_player:ScriptedPlayer", help="module:function (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the recording, 0 or more (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="first game's number, to add to a recording (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes to play in (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=100_000, help="actions after which a game is quit (default: %(default)s)")
    parser.add_argument("--leave_out_cut", action="store_true", help="throw games away that reach --max_steps")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse(argv)
    try:
        for name, least in (("games", 1), ("workers", 1), ("max_steps", 1), ("seed", 0), ("first", 0)):
            if getattr(args, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")
        if args.character not in AUTOASCEND_MEAN_SCORE:
            close = difflib.get_close_matches(args.character, AUTOASCEND_MEAN_SCORE, n=3)
            raise UserError(f"unknown character {args.character!r}; did you mean {', '.join(close) or 'mon-hum-neu'}?")
        load_player(args.player)
        out, run = os.path.abspath(args.out), os.getpid()
        tasks = [Task(args.character, args.seed, k, out, args.player, args.max_steps, args.leave_out_cut, run)
                 for k in range(args.first, args.first + args.games)]  # fmt: skip
        there = [task.name for task in tasks if os.path.exists(os.path.join(task.out, task.name))]
        if there:
            raise UserError(f"{args.out} already holds {len(there)} of these games ({there[0]} ...): "
                            "choose another --seed, --first or --out")  # fmt: skip
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {args.out}: {error.strerror}") from error
        start = time.time()
        rows = record(tasks, min(args.workers, args.games))
    except UserError as error:
        print(f"record_games: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"record_games: interrupted; the games that were over are in {args.out}", file=sys.stderr)
        return 130
    print(summary(rows))
    print(f"  in {args.out}, {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
