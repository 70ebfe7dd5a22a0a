"""Play games of NetHack with a player of your choice and record them in NLD-AA's layout.

    python scripts/record_games.py --character mon-hum-neu --games 20 --out my_games --seed 1 --workers 2
    python custom_nethack_pomdp.py --data_path my_games --character mon-hum-neu

Every game gets a folder of its own, `OUT/<character>-<seed>-<k>/`, with `nle.<pid>.0.ttyrec3.bz2` (every frame, the key
pressed at it and the score) and `nle.<pid>.xlogfile` (one line about the game). A folder appears when its game is over.
Game k's seeds are drawn from (`--seed`, k): the same command records the same games, on any number of workers.

A game is played to its end. What reaches `--max_steps` first, or presses 1,000 keys without a turn, is quit by the keys
a person would press (ESC, #quit, y), so that it too has its line; with `--leave_out_cut` it is thrown away instead.

A player is named as `module:function`; the module is looked for beside this script, on the Python path and in the
current folder. The function is called once a game with a `numpy.random.Generator`, its only source of chance. What it
returns has `act(obs) -> int`, an index into nle.nethack.ACTIONS; obs holds fresh arrays, `tty_chars` uint8 [24, 80],
`tty_colors` int8 [24, 80] (bit 16 is inverse), `tty_cursor` uint8 [2] and `blstats` int32 [27] (the status lines).
"""

import argparse
import importlib
import multiprocessing
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nle import nethack

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import NUM_ACTIONS, UserError

# ESC, ESC, #quit, y
QUIT = [int(pomdp.KEY_TO_ACTION[key]) for key in (27, 27, int(nethack.Command.QUIT), ord("y"))]


def load_player(spec: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, function = spec.partition(":")
    if not module or not function:
        raise UserError(f"--player wants module:function, not {spec!r}")
    sys.path += [""] if "" not in sys.path else []  # the current folder
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError("it is not callable")
        return found
    except Exception as error:  # whatever the module raises when it is imported
        raise UserError(f"cannot load the player {spec}: {error}") from error


def seeds_of(seed: int, k: int) -> Tuple[int, int, int]:
    """Seeds of game k: NetHack's own two, and the player's, whose chance stays apart from the game's."""
    # of 32 bits, which both NLE versions take
    core, disp, chance = np.random.SeedSequence([seed, k]).generate_state(3)
    return int(core), int(disp), int(chance)


def play(args: argparse.Namespace, scratch: str, k: int) -> Dict[str, Any]:
    """Plays and records game k -> name, keys pressed, score, turns, deepest level, whether it was cut, and kept."""
    name = f"{args.character}-{args.seed}-{k}"
    core, disp, chance = seeds_of(args.seed, k)
    player = load_player(args.player)(np.random.default_rng(chance))
    tempfile.tempdir = scratch  # for NLE; a worker that is stopped leaves its folders behind
    part, depth = Path(scratch) / name, 1
    game = pomdp.NetHackGame(args.character, savedir=str(part), max_steps=args.max_steps)
    try:
        obs, done = game.reset(core, disp), False
        while not done:
            try:
                action = int(player.act(obs))
            except Exception as error:
                raise RuntimeError(
                    f"the player failed in game {name}, at key {game.steps}"
                ) from error
            if not 0 <= action < NUM_ACTIONS:
                raise UserError(
                    f"the player answered {action} in game {name}: actions are 0 to {NUM_ACTIONS - 1}"
                )
            obs, _, done, _ = game.step(action)
            depth = max(depth, game.depth)
        cut = game.end != "died"
        for action in 3 * QUIT:
            if game.end != "died":
                game.step(action)
    finally:
        game.close()
    # NLE writes its line when a game is over; a game without one would never be read.
    kept = any(log.stat().st_size for log in part.glob("*.xlogfile")) and not (
        cut and args.leave_out_cut
    )
    if kept:
        for log in part.glob("*.xlogfile"):
            log.chmod(0o644)  # NLE makes it executable
        part.rename(Path(args.out) / name)
    shutil.rmtree(part, ignore_errors=True)
    return dict(
        name=name,
        keys=game.steps,
        score=game.score,
        turns=game.turn,
        depth=depth,
        cut=cut,
        kept=kept,
    )


def record(args: argparse.Namespace, numbers: Sequence[int]) -> List[Dict[str, Any]]:
    """Plays all games, with a progress bar -> what `play` tells of each."""
    # on the same disk, to be renamed from
    scratch = tempfile.mkdtemp(prefix=".recording.", dir=args.out)
    task, bar = (
        partial(play, args, scratch),
        partial(tqdm, total=len(numbers), unit="game", disable=None),
    )
    try:
        if min(args.workers, args.games) == 1:
            return list(bar(map(task, numbers)))
        # Spawned, not forked: a forked copy of an environment would delete its parent's files.
        with multiprocessing.get_context("spawn").Pool(min(args.workers, args.games)) as pool:
            return list(bar(pool.imap(task, numbers)))
    finally:
        tempfile.tempdir = None
        shutil.rmtree(scratch, ignore_errors=True)


def summary(rows: List[Dict[str, Any]]) -> str:
    """What was recorded, in a few lines."""
    kept, cut = [row for row in rows if row["kept"]], sum(row["cut"] for row in rows)
    lines = [f"{len(kept)} games recorded, {len(rows) - len(kept)} left out; {cut} were quit"]
    for name in ("score", "turns", "depth", "keys") if kept else ():
        values = np.array([row[name] for row in kept], dtype=float)
        low, high = pomdp.bootstrap_interval(values)
        lines.append(
            f"  {name:5s} mean {values.mean():9.1f} (95 % interval {low:.1f} to {high:.1f})"
        )
        lines[-1] += f"   median {np.median(values):9.1f}   max {values.max():9.1f}"
    return "\n".join(lines)


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--character", required=True, help="role-race-alignment, for example mon-hum-neu")
    add("--games", type=int, required=True, help="how many games to play")
    add(
        "--out",
        required=True,
        help="folder for the recordings; made if need be, added to if it exists",
    )
    add(
        "--player",
        default="scripted_player:ScriptedPlayer",
        help="module:function (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the recording, 0 or more (default: %(default)s)",
    )
    add(
        "--first",
        type=int,
        default=0,
        help="first game's number, to add to a recording (default: %(default)s)",
    )
    add("--workers", type=int, default=1, help="processes to play in (default: %(default)s)")
    add(
        "--max_steps",
        type=int,
        default=100_000,
        help="keys after which a game is quit (default: %(default)s)",
    )
    add("--leave_out_cut", action="store_true", help="throw games away that had to be quit")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse(argv)
    try:
        for name, least in (
            ("games", 1),
            ("workers", 1),
            ("max_steps", 1),
            ("seed", 0),
            ("first", 0),
        ):
            if getattr(args, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")
        pomdp.check_character(args.character)
        load_player(args.player)
        numbers = range(args.first, args.first + args.games)
        there = [
            k for k in numbers if (Path(args.out) / f"{args.character}-{args.seed}-{k}").exists()
        ]
        if there:
            raise UserError(
                f"{args.out} already holds {len(there)} of these games: choose another --seed, --first or --out"
            )
        Path(args.out).mkdir(parents=True, exist_ok=True)
        rows = record(args, numbers)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the games that were over are in {args.out}", file=sys.stderr)
        return 130
    print(f"{summary(rows)}\n  in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
