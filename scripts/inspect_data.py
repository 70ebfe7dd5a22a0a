"""What is in a data folder: games, frames, scores, lengths and depths of each character, and what training leaves out.

    python scripts/inspect_data.py DATA_DIR
    python scripts/inspect_data.py DATA_DIR --character mon-hum-neu --json

DATA_DIR is what `--data_path` takes: an NLD-AA folder, Katakomba's .hdf5 file or a folder of them, or a chunk store.
Or it holds human games in alt.org's layout (NLD-NAO, scripts/human_games.py): games are joined from
their files, and every file is read once, for its frames and the share of them whose status lines can be
read. Where menus, or what stands before and after a game, hide a line, it cannot.
Games are read as training reads them, by building their chunk store under `--store_path`: the next run finds it there.
Scores are differences of the game's score from the player's first frame to its last. Held out is what a run with the
default `heldout_share` never trains on. --json tells of every game.
"""

import argparse
import collections
import contextlib
import json
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import human_games

import custom_nethack_pomdp as pomdp

LISTED = ("frames", "score", "turns", "depth")
NAMED = 3  # of what is left out for one reason; --json names all


def characters_in(root: Path) -> List[str]:
    """Whose games lie at or below a folder, by its stores, its HDF5 files' names or its xlogfiles."""
    if (root / "frames.bin").exists():
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return [str(np.load(root / "index.npz")["character"])]
        return [root.name]  # damaged, which opening it tells
    found = {folder.name for folder in root.glob("*") if (folder / "frames.bin").exists()}
    files = [root] if root.is_file() else root.glob("*.hdf5")
    found |= {
        match.group(1)
        for match in (re.fullmatch(r"data-(\S+)-any\.hdf5", path.name) for path in files)
        if match
    }
    for path in pomdp.find_xlogfiles(root):
        with contextlib.suppress(OSError):  # reading a character's games names it
            for line in pomdp.parse_xlogfile(path):
                parts = [line.get(name, "?").lower() for name in ("role", "race", "align0")]
                found.add("-".join(parts))
    return sorted(found & set(pomdp.AUTOASCEND_MEAN_SCORE))


def describe(store: pomdp.ChunkStore) -> Dict[str, Any]:
    """All that the store's index says of a character's games."""
    index, frames = store.index, int(store.frames.sum())
    heldout = pomdp.choose_heldout(list(map(str, store.names)), pomdp.TrainConfig.heldout_share)
    columns = {
        "name": list(map(str, store.names)),
        "frames": store.frames.tolist(),
        "score": [int(store.rewards(game)[1].sum()) for game in range(len(store.frames))],
        "turns": index["turns"].tolist(),
        "depth": index["max_depths"].tolist(),
        "heldout": heldout.tolist(),
    }
    return {
        "character": str(index["character"]),
        "store": str(store.folder),
        "games": len(store.frames),
        "heldout": int(heldout.sum()),
        "frames": frames,
        "bytes_a_frame": float(store.block_offsets[-1] / frames),
        "unknown_keys": int(index["unknown_keys"].sum()),
        "skipped": [*map(str, index["skipped"]), *map(str, index["passed_over"])],
        "of_each_game": [dict(zip(columns, values)) for values in zip(*columns.values())],
    }


def table(told: Dict[str, Any]) -> str:
    text = "{character}: {games:,} games ({heldout:,} held out), {frames:,} frames, {bytes_a_frame:.0f} bytes a frame"
    lines = [text.format(**told) + f"; {told['store']}"]
    lines += ["  {:8s}{:>12}{:>12}{:>12}{:>12}".format("a game", "min", "median", "mean", "max")]
    for name in LISTED:
        values = np.array([game[name] for game in told["of_each_game"]])
        numbers = (values.min(), np.median(values), values.mean(), values.max())
        lines.append(f"  {name:8s}" + "".join(f"{number:12,.1f}" for number in numbers))
    if told["unknown_keys"]:
        lines.append(f"  {told['unknown_keys']:,} keys are no action: their frames carry no loss")
    return "\n".join(lines + [f"  left out: {reason}" for reason in told["skipped"]])


# --- human games
def count_frames(path: Path) -> Tuple[int, int, str]:
    """Frames of a recording, those of them whose status lines are read, and why there are none."""
    frames = read = 0
    try:
        for part in human_games.read_parts(path):
            stats = pomdp.read_blstats(part.chars)
            frames += len(stats)
            shown = (stats[:, pomdp.nethack.NLE_BL_HPMAX] > 0) & (
                stats[:, pomdp.nethack.NLE_BL_STR125] > 0
            )
            read += int(shown.sum())
    except pomdp.UNREADABLE as error:
        return frames, read, str(error)
    return frames, read, "" if frames else "it holds no frame"


def describe_human_games(root: Path, characters: Optional[List[str]]) -> Dict[str, Any]:
    """Of alt.org's layout: files, games and frames by years. Takes as long as decoding all files."""
    games, left_out = human_games.find_games(root)
    if characters is not None:
        games = [game for game in games if game.character in characters]
    if not games:
        whose = f" of {', '.join(characters)}" if characters else ""
        reasons = ", ".join(f"{len(names):,} {why}" for why, names in sorted(left_out.items()))
        raise pomdp.UserError(f"no human games{whose} in {root}; left out: {reasons or 'nothing'}")
    years: Dict[int, Dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    files = [path for game in games for path in game.files]
    with ThreadPoolExecutor(pomdp.CORES) as pool:  # NLE's decoder lets other threads run
        counted = pool.map(count_frames, files)
        bar = pomdp.progress(iterable=counted, total=len(files), desc="human games")
        told = dict(zip(files, bar))
    for game in games:
        year = years[game.year]
        year["games"] += 1
        for path in game.files:
            frames, read, problem = told[path]
            year["files"] += 1
            year["frames"] += frames
            year["frames_read"] += read
            if problem:
                left_out.setdefault("files that cannot be read", []).append(f"{path}: {problem}")
    by_year = [{"year": year, **years[year]} for year in sorted(years)]
    totals = {name: sum(year[name] for year in years.values()) for name in HUMAN_COLUMNS}
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


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DATA_DIR", help="what --data_path takes")
    parser.add_argument("--character", help="one or several, by commas (default: all there are)")
    parser.add_argument(
        "--store_path", default="runs/stores", help="where stores are built (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    return pomdp.run_command(partial(inspect, args))


def inspect(args: argparse.Namespace) -> int:
    """Prints what there is -> exit status: 2 where a character's games could not be read."""
    root = pomdp.expand(args.folder)
    chosen = pomdp.TrainConfig(args.character).characters if args.character else None
    if pomdp.holds_human_games(root):
        human = describe_human_games(root, chosen)
        print(json.dumps([human], indent=1) if args.json else human_table(human))
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
        print(json.dumps(told, indent=1) if args.json else "\n\n".join(map(table, told)))
    return 0 if len(told) == len(characters) else 2


if __name__ == "__main__":
    sys.exit(main())
