# SPDX-License-Identifier: MIT
"""What is in a data folder: each character's games, their scores and depths, what is left out.

    python scripts/inspect_data.py DATA_DIR
    python scripts/inspect_data.py DATA_DIR --character mon-hum-neu --json

DATA_DIR is what `--data_path` takes: an NLD-AA folder, Katakomba's .hdf5 file or a folder of them,
or a chunk store. Or it holds human games in alt.org's layout (NLD-NAO, lib/human_games.py):
games are joined from their files, and every file is read once, for its frames and the share of them
whose status lines can be read. Where menus, or what stands before and after a game, hide a line, it
cannot.

Games are read as training reads them, by building their chunk store under `--store_path`: the next
run finds it there. Scores are differences of the game's score from the player's first frame to its
last. Held out is what a run with the default `heldout_share` never trains on. --json tells of every
game.
"""

import argparse
import contextlib
import json
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import human_games
import numpy as np
from shared import Parser

import custom_nethack_pomdp as pomdp

LISTED = ("frames", "score", "turns", "depth")
NAMED = 3  # of what is left out for one reason; --json names all


def characters_in(root: Path) -> List[str]:
    """Whose games lie at or below a folder, by its stores, its HDF5 files' names or its
    xlogfiles."""
    if (root / "frames.bin").exists():
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return [str(np.load(root / "index.npz")["character"])]
        return [root.name]  # damaged, which opening it tells
    found = {path.parent.name for path in root.glob("*/frames.bin")}
    for path in [root, *root.glob("*.hdf5")]:
        match = re.fullmatch(r"data-(\S+)-any\.hdf5", path.name)
        if match and path.is_file():
            found.add(match.group(1))
    for path in pomdp.find_xlogfiles(root):
        with contextlib.suppress(OSError):  # reading a character's games names it
            for line in pomdp.parse_xlogfile(path):
                role, race, align = line.get("role"), line.get("race"), line.get("align0")
                found.add(f"{role}-{race}-{align}".lower())
    return sorted(found & set(pomdp.AUTOASCEND_MEAN_SCORE))


def describe(store: pomdp.GameStore) -> Dict[str, Any]:
    """All that the store's index says of a character's games."""
    index = store.index
    names = list(map(str, store.names))
    heldout = pomdp.choose_heldout(names, pomdp.TrainConfig.heldout_share)
    frames = int(store.frames.sum())
    games = []
    for game, name in enumerate(names):
        games.append(
            {
                "name": name,
                "frames": int(store.frames[game]),
                "score": int(store.rewards(game)[1].sum()),
                "turns": int(index["turns"][game]),
                "depth": int(index["max_depths"][game]),
                "heldout": bool(heldout[game]),
            }
        )
    return {
        "character": str(index["character"]),
        "store": str(store.folder),
        "games": len(games),
        "heldout": int(heldout.sum()),
        "frames": frames,
        "bytes_a_frame": float(store.block_offsets[-1] / frames),
        "unknown_keys": int(index["unknown_keys"].sum()),
        "skipped": [*map(str, index["skipped"]), *map(str, index["passed_over"])],
        "of_each_game": games,
    }


def table(told: Dict[str, Any]) -> str:
    count = "{character}: {games:,} games ({heldout:,} held out)"
    size = "{frames:,} frames, {bytes_a_frame:.0f} bytes a frame; {store}"
    lines = [f"{count}, {size}".format(**told)]
    lines.append("  {:8s}{:>12}{:>12}{:>12}{:>12}".format("a game", "min", "median", "mean", "max"))
    for name in LISTED:
        values = np.array([game[name] for game in told["of_each_game"]])
        line = f"  {name:8s}"
        for number in (values.min(), np.median(values), values.mean(), values.max()):
            line += f"{number:12,.1f}"
        lines.append(line)
    if told["unknown_keys"]:
        lines.append(f"  {told['unknown_keys']:,} keys are no action: their frames carry no loss")
    for reason in told["skipped"]:
        lines.append(f"  left out: {reason}")
    return "\n".join(lines)


# --- human games
def count_frames(path: Path) -> Tuple[int, int, str]:
    """Frames of a recording, those of them whose status lines are read, and why there are none."""
    frames = read = unreadable = 0
    problem = ""
    try:
        for part in human_games.read_parts(path):
            unreadable += human_games.count_unreadable(part.chars)
            stats = pomdp.read_blstats(part.chars)
            frames += len(stats)
            first_line = stats[:, pomdp.nethack.NLE_BL_STR125] > 0
            second_line = stats[:, pomdp.nethack.NLE_BL_HPMAX] > 0
            read += int((first_line & second_line).sum())
        if not frames:
            problem = "it holds no frame"
        human_games.check_map(unreadable, frames)
    except pomdp.UNREADABLE as error:
        return 0, 0, str(error)
    return frames, read, problem


def describe_human_games(root: Path, characters: Optional[List[str]]) -> Dict[str, Any]:
    """Of alt.org's layout: files, games and frames by years. Takes as long as decoding them."""
    games, left_out = human_games.find_games(root)
    whose = ""
    if characters is not None:
        whose = f" of {', '.join(characters)}"
        games = [game for game in games if game.character in characters]
    if not games:
        reasons = [f"{len(names):,} {why}" for why, names in sorted(left_out.items())]
        told = ", ".join(reasons) or "nothing"
        raise pomdp.UserError(f"no human games{whose} in {root}; left out: {told}")
    files = [path for game in games for path in game.files]
    with ThreadPoolExecutor(pomdp.CORES) as pool:  # NLE's decoder lets other threads run
        counted = pool.map(count_frames, files)
        bar = pomdp.progress_bar(iterable=counted, total=len(files), desc="human games")
        counts = dict(zip(files, bar))
    totals = dict.fromkeys(HUMAN_COLUMNS, 0)
    years: Dict[int, Dict[str, int]] = {}
    for game in games:
        year = years.setdefault(game.year, {"year": game.year, **dict.fromkeys(HUMAN_COLUMNS, 0)})
        for line in (year, totals):
            line["games"] += 1
            line["files"] += len(game.files)
        for path in game.files:
            frames, read, problem = counts[path]
            for line in (year, totals):
                line["frames"] += frames
                line["frames_read"] += read
            if problem:
                left_out.setdefault("files that cannot be read", []).append(f"{path}: {problem}")
    by_year = [years[year] for year in sorted(years)]
    return {"human_games": str(root), **totals, "years": by_year, "left_out": left_out}


HUMAN_COLUMNS = ("games", "files", "frames", "frames_read")


def human_table(told: Dict[str, Any]) -> str:
    lines = [f"{told['human_games']}: human games (alt.org's layout), without keys"]
    lines.append(
        "  {:8s}{:>12}{:>12}{:>14}{:>20}".format("", *HUMAN_COLUMNS[:3], "status lines read")
    )
    for row in [*told["years"], {**told, "year": "all"}]:
        share = row["frames_read"] / max(1, row["frames"])
        numbers = "{games:12,}{files:12,}{frames:14,}".format(**row)
        lines.append(f"  {row['year']:<8}{numbers}{share:20.1%}")
    for why, names in sorted(told["left_out"].items()):
        more = ", ..." if len(names) > NAMED else ""
        lines.append(f"  left out: {len(names):,} {why}: {', '.join(names[:NAMED])}{more}")
    return "\n".join(lines)


def show(args: argparse.Namespace, told: List[Any], make_table: Callable[[Any], str]) -> None:
    if args.json:
        print(json.dumps(told, indent=1))
    else:
        print("\n\n".join(map(make_table, told)))


def inspect(args: argparse.Namespace) -> int:
    """Prints what there is -> exit status: 2 where a character's games could not be read."""
    root = pomdp.expand(args.folder)
    chosen = None
    if args.character:
        chosen = pomdp.TrainConfig(args.character).characters
    if not root.exists():
        raise pomdp.UserError(f"there is no {root}")
    if pomdp.holds_human_games(root):
        human = describe_human_games(root, chosen)
        show(args, [human], human_table)
        return 0
    characters = chosen or characters_in(root)
    if not characters:
        kinds = "neither an xlogfile (NLD-AA), nor data-<character>-any.hdf5, nor a store"
        raise pomdp.UserError(f"no games in {root}: {kinds}")
    told = []

    def tell(name: str) -> None:
        try:
            told.append(describe(pomdp.open_or_build_store(str(root), args.store_path, name)))
        except pomdp.UserError as error:  # the others can be told of all the same
            pomdp.write_error(error)

    for name in characters:
        tell(name)
    if told:
        show(args, told, table)
    return 0 if len(told) == len(characters) else 2


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="DATA_DIR", help="folder of NLD-AA or of human games, .hdf5 or store")
    add("--character", help="one or several, by commas (default: all there are)")
    add("--store_path", default="runs/stores", help="where stores are built (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    return parser.run(inspect, argv)


if __name__ == "__main__":
    sys.exit(main())
