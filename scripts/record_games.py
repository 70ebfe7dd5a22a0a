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

where obs holds what the terminal shows: `tty_chars` uint8 [24, 80], `tty_colors` int8 [24, 80] (0..31; bit 16 is inverse) and
`tty_cursor` uint8 [2] (row, column). `scripts/scripted_player.py` is an example, and the default; its scores are stated there.
"""
import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
for folder in (HERE, os.path.dirname(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from nle import nethack  # noqa: E402

CUT_KEYS = (nethack.Command.ESC, nethack.Command.ESC, nethack.Command.QUIT, ord("y"))


class UserError(Exception):
    """Something that the user can put right: shown as one line, exit status 2."""


# ---- stand-in
from nle.env.tasks import NetHackScore  # noqa: E402
class NetHackGame:
    def __init__(self, character, savedir=None):
        self.env = NetHackScore(character=character, savedir=savedir, save_ttyrec_every=1 if savedir else 0,
            actions=nethack.ACTIONS, allow_all_modes=True, allow_all_yn_questions=True, penalty_step=0, penalty_time=0,
            max_episode_steps=1_000_000, observation_keys=("tty_chars", "tty_colors", "tty_cursor", "blstats"), fix_moon_phase=True)
    def _copy(self, obs):
        if obs["blstats"].any():
            self.last_blstats = obs["blstats"].copy()
        return {k: obs[k].copy() for k in ("tty_chars", "tty_colors", "tty_cursor")}
    def reset(self, core, disp):
        self.env.unwrapped.seed(core=core, disp=disp, reseed=False)
        return self._copy(self.env.reset()[0])
    def step(self, action):
        obs, reward, done, _, info = self.env.step(action)
        return self._copy(obs), reward, done, info
    def close(self):
        self.env.close()
def check_character(name):
    if not re.fullmatch(r"[a-z]{3}-[a-z]{3}-[a-z]{3}(-[a-z]{3})?", name):
        raise UserError("bad character " + name)
# ---- end of stand-in


class Task(NamedTuple):
    """One game to record."""

    character: str
    seed: int
    k: int
    out: str
    player: str
    max_steps: int
    leave_out_cut: bool

    @property
    def name(self) -> str:
        return "%s-%d-%d" % (self.character, self.seed, self.k)


def load_player(spec: str):
    """The function that `module:function` names."""
    module, _, function = spec.partition(":")
    if not module or not function:
        raise UserError("--player wants module:function, not %r" % spec)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError("cannot load the player %s: %s" % (spec, error))
    if not callable(found):
        raise UserError("the player %s is not callable" % spec)
    return found


def play(task: Task) -> Dict[str, Any]:
    """Plays and records one game; its folder appears under its name once it is complete.

    Returns a dict: name, frames (actions sent), score (in-game, summed rewards), turns, depth (deepest level seen), cut (bool)
    and kept (bool).
    """
    # Words of 32 bits are taken by both NLE versions; a stream of its own keeps the player's chance apart from the game's.
    core, disp, chance = (int(s) for s in np.random.SeedSequence([task.seed, task.k]).generate_state(3))
    player = load_player(task.player)(np.random.default_rng(chance))
    # NLE names its files once, at the start, after folder and process; a name with a dot in front is passed over by readers.
    part = os.path.join(task.out, ".%s.part" % task.name)
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left
    keys = [int(a) for a in nethack.ACTIONS]
    try:
        game = NetHackGame(task.character, savedir=part)
        try:
            obs = game.reset(core, disp)
            score, depth, frames, done = 0.0, 1, 0, False
            while not done and frames < task.max_steps:
                action = player.act(obs)
                if not 0 <= int(action) < len(keys):
                    raise UserError("the player answered %r in game %s: actions are 0 to %d" % (action, task.name, len(keys) - 1))
                obs, reward, done, _ = game.step(int(action))
                score += reward
                frames += 1
                depth = max(depth, int(game.last_blstats[nethack.NLE_BL_DEPTH]))
            cut = not done
            for key in CUT_KEYS if cut else ():
                if not done:
                    obs, reward, done, _ = game.step(keys.index(int(key)))
                    score += reward
                    frames += 1
            turns = int(game.last_blstats[nethack.NLE_BL_TIME])
        finally:
            game.close()
        # NLE writes the line when the game is over; without it no reader would take the game.
        log = [name for name in os.listdir(part) if name.endswith(".xlogfile")]
        whole = bool(log) and os.path.getsize(os.path.join(part, log[0])) > 0
        kept = whole and not (cut and task.leave_out_cut)
        if kept:
            os.rename(part, os.path.join(task.out, task.name))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return dict(name=task.name, frames=frames, score=score, turns=turns, depth=depth, cut=cut, kept=kept)


def record(tasks: List[Task], workers: int) -> List[Dict[str, Any]]:
    """Plays all tasks, with a progress bar; returns what `play` returns for each, in their order."""
    with tqdm(total=len(tasks), unit="game", disable=None) as bar:
        rows = []

        def add(row: Dict[str, Any]) -> None:
            rows.append(row)
            bar.set_postfix(score="%.0f" % np.mean([r["score"] for r in rows]))
            bar.update()

        if workers == 1:
            for task in tasks:
                add(play(task))
        else:
            # Spawned, not forked: a forked copy of an environment would delete its parent's files.
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for row in pool.imap_unordered(play, tasks):
                    add(row)
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
    unfinished = [row["name"] for row in rows if not row["kept"] and not row["cut"]]
    lines = ["%d games recorded, %s frames" % (len(kept), format(sum(r["frames"] for r in kept), ","))]
    for key, word in (("score", "score"), ("turns", "turns"), ("depth", "deepest level"), ("frames", "frames")):
        values = np.array([row[key] for row in kept], dtype=float)
        if len(values):
            low, high = bootstrap(values)
            lines.append("  %-14s mean %9.1f (95 %% interval %.1f to %.1f)   median %9.1f   max %9.1f"
                         % (word, values.mean(), low, high, np.median(values), values.max()))
    if cut:
        lines.append("  %d games reached --max_steps: %d quit there and recorded, %d left out"
                     % (len(cut), sum(r["kept"] for r in cut), sum(not r["kept"] for r in cut)))
    if unfinished:
        lines.append("  %d games left out, NLE wrote no xlogfile line for them: %s" % (len(unfinished), " ".join(unfinished)))
    return "\n".join(lines)


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--character", required=True, help="role-race-alignment[-gender], for example mon-hum-neu")
    parser.add_argument("--games", type=int, required=True, help="how many games to play")
    parser.add_argument("--out", required=True, help="folder for the recordings; made if need be, added to if it exists")
    parser.add_argument("--player", default="scripted_player:ScriptedPlayer", help="module:function (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the recording, 0 or more (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first game: adds to an earlier recording (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes to play in (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=100_000, help="actions after which a game is quit (default: %(default)s)")
    parser.add_argument("--leave_out_cut", action="store_true", help="throw games away that reach --max_steps")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse(argv)
    try:
        for name, least in (("games", 1), ("workers", 1), ("max_steps", 1), ("seed", 0), ("first", 0)):
            if getattr(args, name) < least:
                raise UserError("--%s must be at least %d, not %d" % (name, least, getattr(args, name)))
        check_character(args.character)
        load_player(args.player)
        tasks = [Task(args.character, args.seed, k, os.path.abspath(args.out), args.player, args.max_steps, args.leave_out_cut)
                 for k in range(args.first, args.first + args.games)]
        there = [task.name for task in tasks if os.path.exists(os.path.join(task.out, task.name))]
        if there:
            raise UserError("%s already holds %s (%d of these games): choose another --seed, --first or --out"
                            % (args.out, there[0], len(there)))
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise UserError("cannot write to %s: %s" % (args.out, error))
        start = time.time()
        rows = record(tasks, min(args.workers, args.games))
    except UserError as error:
        print("record_games: error: %s" % error, file=sys.stderr)
        return 2
    print(summary(rows))
    print("  in %s, %.0f s" % (args.out, time.time() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
