"""What is in a data folder: games, frames, scores, lengths and depths of each character, and what training leaves out.

    python scripts/inspect_data.py DATA_DIR
    python scripts/inspect_data.py DATA_DIR --character mon-hum-neu --json

DATA_DIR is what `--data_path` takes: an NLD-AA folder, Katakomba's .hdf5 file or a folder of them, or a chunk store.
Games are read as training reads them, by building their chunk store under `--store_path`: the next run finds it there.
Scores are differences of the game's score from the player's first frame to its last. Held out is what a run with the
default `heldout_share` never trains on. --json tells of every game.
"""

import argparse
import contextlib
import json
import re
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import custom_nethack_pomdp as pomdp

LISTED = ("frames", "score", "turns", "depth")


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
    characters = (
        pomdp.TrainConfig(args.character).characters if args.character else characters_in(root)
    )
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
