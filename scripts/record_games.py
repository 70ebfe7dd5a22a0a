# SPDX-License-Identifier: MIT
"""Play games of NetHack with a player of your choice and record them in NLD-AA's layout.

    python scripts/record_games.py --character mon-hum-neu --games 20 --out my_games --workers 2
    python scripts/record_games.py --character mon-hum-neu --games 20 --out agent --checkpoint FILE
    python custom_nethack_pomdp.py --data_path my_games --character mon-hum-neu

Every game gets a folder of its own, `OUT/<character>-<seed>-<k>/`, with `nle.<pid>.0.ttyrec3.bz2`
(every frame, the key pressed at it and the score) and `nle.<pid>.xlogfile` (one line about the
game). A folder appears when its game is over. Game k's seeds are drawn from (`--seed`, k): the same
command records the same games, on any number of workers.

A game is played to its end. What reaches `--max_steps` first, or presses 1,000 keys without a turn,
is quit by the keys a person would press (ESC, #quit, y), so that it too has its line; with
`--leave_out_cut` it is thrown away instead. So is a game that its player breaks off.

Who plays is one of three:

--player module:function
    The module is looked for beside this script, on the Python path and in the current folder. The
    function is called once a game with a `numpy.random.Generator`, its only source of chance. What
    it returns has one of
      `act(obs) -> int`, an index into nle.nethack.ACTIONS; obs holds fresh arrays, `tty_chars`
          uint8 [24, 80], `tty_colors` int8 [24, 80] (bit 16 is inverse), `tty_cursor` uint8 [2] and
          `blstats` int32 [27] (the status lines);
      `play(game) -> str or None`, for a player with a loop of its own, which presses all keys by
          `game.step(action) -> obs, reward, done, info` (`game.obs` is the first obs) until it is
          done, or breaks the game off and returns why. NLE's own arrays, those that the player
          names as `observation_keys`, are in `game.env.unwrapped.last_observation`.
--player autoascend, or --autoascend CHECKOUT
    The bot that played NLD-AA's games, from the package nethackers or from a checkout of its
    repository (autoascend_player.py has the commands).
--checkpoint FILE
    An agent that custom_nethack_pomdp.py trained: best.pt, last.pt or <step>.pt of a run. It acts
    as in evaluation, from a cleared recurrent state on; --temperature takes the place of its own.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import agent_player
import autoascend_player
import numpy as np
from nle import nethack
from shared import Parser, check_least

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import NUM_ACTIONS, UserError

LONGEST_OUT = 300  # of 400 bytes that NLE has for a game's file
# ESC, ESC, #quit, y
QUIT = [int(pomdp.KEY_TO_ACTION[key]) for key in (27, 27, int(nethack.Command.QUIT), ord("y"))]


class Game(pomdp.NetHackGame):
    """A game that remembers its newest obs and its deepest level."""

    obs: Dict[str, np.ndarray]
    deepest = 1

    def reset(self, core_seed: int, disp_seed: int) -> Dict[str, np.ndarray]:
        self.obs = super().reset(core_seed, disp_seed)
        return self.obs

    def step(self, action: int) -> Tuple[Dict[str, np.ndarray], float, bool, Dict[str, Any]]:
        self.obs, reward, done, info = super().step(action)
        self.deepest = max(self.deepest, self.depth)
        return self.obs, reward, done, info


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, function = spec.partition(":")
    if not module or not function:
        raise UserError(f"--player wants module:function or autoascend, not {spec!r}")
    if "" not in sys.path:
        sys.path.append("")  # the current folder
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError("it is not callable")
        return found
    except Exception as error:  # whatever the module raises when it is imported
        raise UserError(f"cannot load the player {spec}: {error}") from error


def load_player(args: argparse.Namespace) -> Callable[..., Any]:
    """What makes a player for each game."""
    if args.autoascend or args.player == "autoascend":
        return autoascend_player.load(args.autoascend)
    if args.checkpoint:
        return agent_player.load(args.checkpoint, args.character, args.temperature)
    return load_function(args.player)


def seeds_of(seed: int, k: int) -> Tuple[int, int, int]:
    """Seeds of game k: NetHack's own two, and the player's, whose chance stays apart from the
    game's."""
    # 32 bits each, which both NLE versions take
    core, disp, chance = np.random.SeedSequence([seed, k]).generate_state(3)
    return int(core), int(disp), int(chance)


def play_by_act(player: Any, game: Game, name: str) -> None:
    """Plays a game that has begun to its end, asking the player for one key after another."""
    while not game.end:
        try:
            action = int(player.act(game.obs))
        except Exception as error:
            raise RuntimeError(f"the player failed in game {name}, at key {game.steps}") from error
        if not 0 <= action < NUM_ACTIONS:
            raise UserError(
                f"the player answered {action} in game {name}: actions are 0 to {NUM_ACTIONS - 1}"
            )
        game.step(action)


def play(args: argparse.Namespace, scratch: str, k: int) -> Dict[str, Any]:
    """Plays and records game k -> name, keys pressed, score, turns, deepest level, whether it was
    cut, where and why its player broke it off, whether it was kept, seconds of a core's time."""
    name = f"{args.character}-{args.seed}-{k}"
    core, disp, chance = seeds_of(args.seed, k)
    player = load_player(args)(np.random.default_rng(chance))
    tempfile.tempdir = scratch  # for NLE; a worker that is stopped leaves its folders behind
    part = Path(scratch) / name
    begin = time.process_time()
    broken_off = ""
    game = Game(
        args.character,
        savedir=str(part),
        max_steps=args.max_steps,
        observation_keys=getattr(player, "observation_keys", pomdp.OBSERVATIONS),
    )
    try:
        game.reset(core, disp)
        if hasattr(player, "play"):
            why = player.play(game)
            if why:
                broken_off = f"{name} at key {game.steps}: {why}"
        else:
            play_by_act(player, game, name)
        cut = game.end != "died"
        for action in 3 * QUIT if cut else ():
            if game.end != "died":
                game.step(action)
    finally:
        game.close()
    seconds = time.process_time() - begin
    # NLE writes its line when a game is over; a game without one would never be read.
    finished = any(log.stat().st_size for log in part.glob("*.xlogfile"))
    kept = finished and not (cut and args.leave_out_cut)
    if kept:
        for log in part.glob("*.xlogfile"):
            log.chmod(log.stat().st_mode & 0o666)  # NLE makes it executable
        part.rename(Path(args.out) / name)
    shutil.rmtree(part, ignore_errors=True)
    return dict(
        name=name,
        keys=game.steps,
        score=game.score,
        turns=game.turn,
        depth=game.deepest,
        cut=cut,
        broken_off=broken_off,
        kept=kept,
        seconds=seconds,
    )


def record(args: argparse.Namespace, numbers: Sequence[int]) -> List[Dict[str, Any]]:
    """Plays all games, with a progress bar -> what `play` tells of each."""
    # On the same disk, so that games can be renamed from it.
    scratch = tempfile.mkdtemp(prefix=".recording.", dir=args.out)
    task = partial(play, args, scratch)
    workers = min(args.workers, args.games)
    bar = partial(pomdp.progress_bar, total=len(numbers), unit="game")
    try:
        if workers == 1:
            return list(bar(iterable=map(task, numbers)))
        # Spawned, not forked: a forked copy of an environment would delete its parent's files.
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            return list(bar(iterable=pool.imap(task, numbers)))
    finally:
        tempfile.tempdir = None
        shutil.rmtree(scratch, ignore_errors=True)


def summary(rows: List[Dict[str, Any]], character: str) -> str:
    """What was recorded, in a few lines."""
    kept = [row for row in rows if row["kept"]]
    cut = sum(row["cut"] for row in rows)
    lines = [f"{len(kept)} games recorded, {len(rows) - len(kept)} left out; {cut} were quit"]
    broken_off = [row["broken_off"] for row in rows if row["broken_off"]]
    if broken_off:
        lines[0] += f", {len(broken_off)} of them after the player broke off"
    lines += [f"  broken off: {told}" for told in broken_off]
    for name in ("score", "turns", "depth", "keys") if kept else ():
        values = np.array([row[name] for row in kept], dtype=float)
        low, high = pomdp.bootstrap_interval(values)
        mean = f"{name:5s} mean {values.mean():9.1f} (95 % interval {low:.1f} to {high:.1f})"
        others = f"median {np.median(values):9.1f}   max {values.max():9.1f}"
        lines.append(f"  {mean}   {others}")
    published = pomdp.AUTOASCEND_MEAN_SCORE[character]
    lines.append(f"  AutoAscend's published mean score is {published:.1f}")
    pace = sum(row["keys"] for row in rows) / sum(row["seconds"] for row in rows)
    lines.append(f"  {pace:.0f} keys a second of a core's time")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--character", required=True, help="role-race-alignment, for example mon-hum-neu")
    add("--games", type=int, required=True, help="how many games to play")
    add("--out", required=True, help="folder for the recordings: made, or added to if it exists")
    who = parser.add_mutually_exclusive_group()
    scripted = "scripted_player:ScriptedPlayer"
    what = "module:function, or autoascend (default: %(default)s)"
    who.add_argument("--player", default=scripted, help=what)
    who.add_argument("--autoascend", metavar="CHECKOUT", help="AutoAscend plays, from this folder")
    who.add_argument("--checkpoint", metavar="FILE", help="the agent of this checkpoint plays")
    add("--temperature", type=float, help="softmax temperature of --checkpoint's actions")
    add("--seed", type=int, default=0, help="of the recording, 0 or more (default: %(default)s)")
    add("--first", type=int, default=0, help="first game's number, to add games (default: 0)")
    add("--workers", type=int, default=1, help="processes to play in (default: %(default)s)")
    limit = "keys after which a game is quit (default: %(default)s)"
    add("--max_steps", type=int, default=100_000, help=limit)
    add("--leave_out_cut", action="store_true", help="throw games away that had to be quit")
    return parser


def run(args: argparse.Namespace) -> None:
    check_least(args, games=1, workers=1, max_steps=1, seed=0, first=0)
    pomdp.check_character(args.character)
    if args.temperature is not None and not args.checkpoint:
        raise UserError("--temperature is for --checkpoint alone")
    load_player(args)
    numbers = range(args.first, args.first + args.games)
    folders = [Path(args.out) / f"{args.character}-{args.seed}-{k}" for k in numbers]
    there = sum(map(Path.exists, folders))
    if there:
        told = f"{args.out} already holds {there} of these games"
        raise UserError(f"{told}: choose another --seed, --first or --out")
    place = os.path.abspath(args.out)
    if "%" in place or len(os.fsencode(place)) > LONGEST_OUT:
        told = f"NLE takes no folder with % in its name, or of more than {LONGEST_OUT} bytes"
        raise UserError(f"--out: {told}, but {place}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows = record(args, numbers)
    print(f"{summary(rows, args.character)}\n  in {args.out}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    return make_parser().run(run, argv, if_stopped="stopped; the games that were over are kept")


def stop(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # what is unfinished is being removed
    raise pomdp.Stopped(number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
            signal.signal(number, stop)
    sys.exit(main())
