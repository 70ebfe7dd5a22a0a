"""What is in a data folder: games, frames, scores, lengths and actions of each character, and what is damaged.

    python scripts/inspect_data.py DATA_DIR                             # decodes every game, on all cores
    python scripts/inspect_data.py DATA_DIR --character mon-hum-neu
    python scripts/inspect_data.py DATA_DIR --quick                     # reads the xlogfiles only: seconds
    python scripts/inspect_data.py DATA_DIR --json > data.json          # everything, for programs

DATA_DIR is what `--data_path` takes: an NLD-AA folder, Katakomba's .hdf5 file or a folder of them, or a chunk store (or a
folder of stores, such as runs/stores). Games are found and decoded by the project's own functions, so frames, lengths and actions are
what training sees: without start-up screens and what NLE plays after the end. Scores are the game's own at the last such
frame; with --quick they are the xlogfile's points, which may differ by some per cent, and nothing is said of frames.

Held out are the games that a run with this `--heldout_share` never trains on. Damage is counted and named: games that cannot be
read, lines of an xlogfile whose game is missing, games without a line (which nothing reads), damaged stores. Exit code 0: it was
looked at, whatever was found; 2: there was nothing to look at.
"""
import argparse
import difflib
import functools
import json
import multiprocessing
import os
import re
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
for folder in (HERE, os.path.dirname(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from watch import action_name

from custom_nethack_pomdp import (
    AUTOASCEND_MEAN_SCORE,
    NUM_ACTIONS,
    UNKNOWN_KEY,
    ChunkStore,
    GameError,
    GameSource,
    StatusReader,
    TrainConfig,
    UserError,
    character_of,
    choose_heldout,
    find_hdf5_games,
    find_nld_games,
    frames_of_play,
    label_of,
    read_hdf5,
    read_ttyrec,
    usable_cores,
    walk_xlogfiles,
)

TOP = 15  # actions shown
SHOWN = 10  # damaged things named for each character; --json names all


class StoredGame(NamedTuple):
    """A game of a chunk store."""

    name: str
    store: str
    game: int


class GameReport(NamedTuple):
    """One game. What is not known without decoding is None."""

    name: str
    frames: Optional[int]
    score: Optional[int]
    turns: Optional[int]
    actions: Optional[np.ndarray]  # [256] int64: frames with each action, UNKNOWN_KEY where the key is none


class Found(NamedTuple):
    """A character's games in the folder, of one kind."""

    character: str
    kind: str  # NLD-AA, HDF5 or store
    sources: List[Any]  # GameSource or StoredGame
    damage: List[str]
    known: Dict[str, GameReport]  # what is known of games without decoding, by name


# --- looking at one game, in worker processes
@functools.lru_cache(maxsize=4)
def open_store(folder: str) -> ChunkStore:
    return ChunkStore(Path(folder))


def examine_stored(source: StoredGame) -> GameReport:
    """Decodes every block, which compares its checksum. Raises UserError for a damaged one."""
    store = open_store(source.store)
    counts, frames = np.zeros(256, dtype=np.int64), int(store.frames[source.game])
    for number in range(int(store.first_blocks[source.game + 1] - store.first_blocks[source.game])):
        counts += np.bincount(store.block(source.game, number).actions, minlength=256)
    return GameReport(source.name, frames, int(store.rewards(source.game)[1].sum()), int(store.turns[source.game]), counts)


def examine(source: Union[GameSource, StoredGame]) -> Union[GameReport, str]:
    """What is in a game, or the reason why it cannot be read."""
    try:
        if isinstance(source, StoredGame):
            return examine_stored(source)
        read_status, counts, frames, score, turns = StatusReader(), np.zeros(256, dtype=np.int64), 0, 0, 0
        for piece in frames_of_play(read_hdf5(source.path, source.key) if source.key else read_ttyrec(source.path)):
            if len(piece.chars):
                counts += np.bincount(piece.actions, minlength=256)
                frames, score = frames + len(piece.chars), int(piece.scores[-1])
                turns = max(turns, int(read_status(piece.chars)[:, 20].max()))
    except (GameError, UserError) as error:
        return str(error)
    return GameReport(source.name, frames, score, turns, counts) if frames else "it holds no frame of play"


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def examine_all(sources: Sequence[Any], workers: int) -> Iterator[Union[GameReport, str]]:
    """`examine` of each, in order; a game whose reader crashes is damaged like any other."""
    if workers <= 1:
        yield from map(examine, sources)
        return
    context = multiprocessing.get_context("spawn")
    done = 0
    while done < len(sources):
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=ignore_interrupts)
        try:
            futures = [pool.submit(examine, source) for source in sources[done:]]
            for future in futures:
                yield future.result()
                done += 1
        except BrokenExecutor:  # one of those under way killed its worker: one by one, to find out which
            for source in sources[done : done + workers]:
                with ProcessPoolExecutor(1, mp_context=context, initializer=ignore_interrupts) as single:
                    try:
                        yield single.submit(examine, source).result()
                    except BrokenExecutor:
                        yield "its reader crashed"
                done += 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# --- finding games
def number_in(xlog: Dict[str, str], name: str) -> Optional[int]:
    try:
        return int(xlog[name])
    except (KeyError, ValueError):
        return None


def look_through_nld(root: Path) -> Tuple[Dict[str, Dict[str, GameReport]], List[str]]:
    """One walk over the xlogfiles: {character: {name: what its line says}}, and damage that belongs to no character."""
    known: Dict[str, Dict[str, GameReport]] = {}
    damage: List[str] = []
    for folder, files, lines in walk_xlogfiles(root, damage):
        named = set()
        for xlogfile, xlog in lines:
            character, name = character_of(xlog), xlog.get("ttyrecname", "")
            named.add(name)
            if "?" in character:
                damage.append(f"{xlogfile}: a line without role, race and alignment")
                continue
            label = label_of(folder, name)
            known.setdefault(character, {})[label] = GameReport(label, None, number_in(xlog, "points"), number_in(xlog, "turns"), None)
        damage += [f"{folder / name}: no line of an xlogfile names it" for name in sorted(files)
                   if re.search(r"\.ttyrec\d*\.bz2$", name) and name not in named]  # fmt: skip
    return known, damage


def find_stores(root: Path) -> List[Path]:
    """Chunk stores at the folder or below it."""
    return [Path(folder) for folder, subfolders, files in sorted(os.walk(root)) if {"meta.json", "index.npz"} <= set(files)]


def found_in_store(folder: Path, damage: List[str]) -> Optional[Found]:
    try:
        store = ChunkStore(folder)
    except UserError as error:
        damage.append(str(error))
        return None
    names = [str(name) for name in store.names]
    known = {name: GameReport(name, int(store.frames[k]), int(store.rewards(k)[1].sum()), int(store.turns[k]), None)
             for k, name in enumerate(names)}  # fmt: skip
    left_out = (*store.meta.get("skipped", ()), *store.meta.get("passed_over", ()))
    skipped = [f"left out when the store was built: {text}" for text in left_out]
    sources = [StoredGame(name, str(folder), k) for k, name in enumerate(names)]
    return Found(str(store.meta.get("character")), f"store {folder}", sources, skipped, known)


def find_all(root: Path) -> Tuple[List[Found], List[str]]:
    """Everything that a run could read at or below `root`, and damage that belongs to no character. Raises UserError."""
    if not root.exists():
        raise UserError(f"{root} does not exist")
    damage: List[str] = []
    found: List[Found] = []
    stores = find_stores(root) if root.is_dir() else []
    for folder in stores:
        content = found_in_store(folder, damage)
        if content is not None:
            found.append(content)
    for path in [root] if root.is_file() else sorted(root.glob("*.hdf5")):
        name = re.fullmatch(r"data-(\w+-\w+-\w+)-any\.hdf5", path.name)
        if name is None and root.is_file():
            raise UserError(f"{path} is not named data-<role>-<race>-<align>-any.hdf5")
        if name is None:
            damage.append(f"{path}: not named data-<role>-<race>-<align>-any.hdf5, so nothing reads it")
            continue
        try:
            games = find_hdf5_games(path)
        except UserError as error:
            damage.append(str(error))
            continue
        found.append(Found(name.group(1), f"HDF5 {path.name}", games.games, games.problems, {}))
    if root.is_dir():
        known, loose = look_through_nld(root)
        damage += loose
        for character, reports in sorted(known.items()):
            games = find_nld_games(root, character)
            found.append(Found(character, "NLD-AA", games.games, games.problems, reports))
    if not found and not damage:
        raise UserError(f"no games in {root}: neither an xlogfile (NLD-AA), nor data-<character>-any.hdf5, nor a chunk store. "
                        "python scripts/get_nld_aa.py --out DIR fetches some")  # fmt: skip
    return found, damage


# --- what is told of them
def statistics(values: Sequence[Optional[int]]) -> Optional[Dict[str, float]]:
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return None
    return {"min": float(known.min()), "median": float(np.median(known)), "mean": float(known.mean()), "max": float(known.max()),
            "total": float(known.sum())}  # fmt: skip


def heldout_count(names: Sequence[str], share: float) -> int:
    """Games held out of these, by the rule of a run that trains on them."""
    return int(choose_heldout(names, share).sum()) if names else 0


def describe(found: Found, reports: Sequence[Union[GameReport, str]], share: float) -> Dict[str, Any]:
    """Reports in the order of the sources -> what is told of the character."""
    whole = [report for report in reports if isinstance(report, GameReport)]
    unreadable = [f"{getattr(source, 'path', '') or source.name}{':' + source.key if getattr(source, 'key', '') else ''}: {report}"
                  for source, report in zip(found.sources, reports) if isinstance(report, str)]  # fmt: skip
    heldout = heldout_count([report.name for report in whole], share)
    told: Dict[str, Any] = {
        "character": found.character, "from": found.kind, "games": len(whole), "training": len(whole) - heldout, "heldout": heldout,
        "frames": statistics([report.frames for report in whole]), "score": statistics([report.score for report in whole]),
        "turns": statistics([report.turns for report in whole]),
    }  # fmt: skip
    if whole and whole[0].actions is not None:
        counts = np.sum([report.actions for report in whole if report.actions is not None], axis=0)
        total = int(counts.sum())
        order = np.argsort(-counts[:NUM_ACTIONS], kind="stable")
        told["actions"] = [{"action": int(action), "name": action_name(int(action)), "frames": int(counts[action]),
                            "share": float(counts[action] / total)} for action in order if counts[action]]  # fmt: skip
        told["unknown_keys"] = int(counts[UNKNOWN_KEY])
    return {**told, "unreadable": unreadable, "missing": list(found.damage)}


def as_text(told: Dict[str, Any], quick: bool) -> str:
    """A character's part of the report."""
    split = f"{told['training']:,} for training, {told['heldout']:,} held out"
    lines = [f"{told['character']}   {told['games']:,} games ({split})   {told['from']}"]
    rows = [(name, told[name]) for name in ("frames", "score", "turns") if told[name]]
    if rows:
        lines.append("  {:<8}{:>12}{:>12}{:>14}{:>12}{:>16}".format("a game", "min", "median", "mean", "max", "all games"))
    for name, row in rows:
        label = "points" if name == "score" and quick and told["from"] == "NLD-AA" else name
        total = f"{row['total']:>16,.0f}" if name == "frames" else ""
        lines.append(f"  {label:<8}{row['min']:>12,.0f}{row['median']:>12,.0f}{row['mean']:>14,.1f}{row['max']:>12,.0f}{total}")
    for place, row in enumerate(told.get("actions", ())[:TOP]):
        lines += ["  actions"] if place == 0 else []
        lines.append(f"    {row['name']:<24}{row['share']:>7.2%}  {'#' * round(60 * row['share'])}".rstrip())
    if len(told.get("actions", ())) > TOP:
        rest = sum(row["share"] for row in told["actions"][TOP:])
        lines.append(f"    {str(len(told['actions']) - TOP) + ' others':<24}{rest:>7.2%}")
    if told.get("unknown_keys"):
        lines.append(f"  {told['unknown_keys']:,} keys are no action: their frames carry no loss")
    return "\n".join(lines + damage_lines("games that cannot be read", told["unreadable"], "  ")
                     + damage_lines("lines of an xlogfile without their game, or games left out", told["missing"], "  "))  # fmt: skip


def damage_lines(what: str, texts: Sequence[str], indent: str = "") -> List[str]:
    if not texts:
        return []
    more = [f"{indent}  ... and {len(texts) - SHOWN:,} more (--json names all)"] if len(texts) > SHOWN else []
    return [f"{indent}{len(texts):,} {what}:"] + [f"{indent}  {' '.join(text.split())}" for text in texts[:SHOWN]] + more


def inspect(args: argparse.Namespace) -> Dict[str, Any]:
    """The whole report. Raises UserError."""
    root = Path(args.folder).expanduser()
    wanted = [name.strip() for name in args.character.split(",") if name.strip()] if args.character else []
    for name in wanted:
        if name not in AUTOASCEND_MEAN_SCORE:
            close = difflib.get_close_matches(name, AUTOASCEND_MEAN_SCORE, n=3)
            raise UserError(f"unknown character {name!r}; did you mean {', '.join(close) or 'mon-hum-neu'}?")
    found, damage = find_all(root)
    chosen = [part for part in found if not wanted or part.character in wanted]
    if wanted and not chosen:
        others = ", ".join(sorted({part.character for part in found})) or "none"
        raise UserError(f"no games of {', '.join(wanted)} in {root}; it holds {others}")
    sources = [source for part in chosen for source in part.sources]
    if args.quick:
        reports: List[Any] = [part.known.get(source.name, GameReport(source.name, None, None, None, None))
                              for part in chosen for source in part.sources]  # fmt: skip
    else:
        workers = min(args.workers or usable_cores(), max(1, len(sources) // 4))  # starting one takes seconds
        results = examine_all(sources, workers)
        reports = list(tqdm(results, total=len(sources), desc="decoding", unit="game", disable=None))
    told, begin = [], 0
    for part in chosen:
        told.append(describe(part, reports[begin : begin + len(part.sources)], args.heldout_share))
        begin += len(part.sources)
    return {"folder": str(root), "quick": args.quick, "heldout_share": args.heldout_share, "characters": told, "damage": damage}


# --- the command line
def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DATA_DIR", help="what --data_path takes")
    parser.add_argument("--character", help="one or several, by commas (default: all there are)")
    parser.add_argument("--quick", action="store_true", help="read xlogfiles and indexes only, decode nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: as many as there are cores)")
    parser.add_argument("--heldout_share", type=float, default=TrainConfig.heldout_share, help="as in training (default: %(default)s)")
    return parser.parse_args(argv)


def show(text: str) -> None:
    """Prints; a reader that has seen enough (head, less) is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse(argv)
    try:
        if args.workers < 0:
            raise UserError(f"--workers must not be negative, but is {args.workers}")
        if not 0.0 <= args.heldout_share < 1.0:
            raise UserError(f"--heldout_share must be at least 0 and below 1, not {args.heldout_share}")
        report = inspect(args)
    except UserError as error:
        print(f"inspect_data: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if args.json:
        show(json.dumps(report, indent=1))
        return 0
    parts = [as_text(told, args.quick) for told in report["characters"]]
    loose = damage_lines("files that nothing reads, or that cannot be read", report["damage"])
    show("\n\n".join(parts + (["\n".join(loose)] if loose else [])))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # through `finally`: worker processes must go
    sys.exit(main())
