# SPDX-License-Identifier: MIT
"""Human games as nethack.alt.org keeps them (NLD-NAO): found, read. No command of its own.

A game is joined from its files:

    ROOT/<player>/YYYY-MM-DD.HH_MM_SS.ttyrec.bz2    what one connection's terminal was sent (UTC)
    ROOT/xlogfile.*                                 a line a finished game, of all players
    ROOT/blacklist.txt                              recordings to leave out

A recording holds screens alone: no keys, no scores, and a frame is a write to the terminal, not a
step of the game. A game that was saved and restored has several files. It is over where its last
file ends: humans leave no pages that NLE answers, so its last frame is one after a cut.

NLE's converter draws IBM and DEC line graphics as ASCII, as the game without them would, and leaves
out the last write of a file. Of a file of several bz2 streams it reads the first alone, which
`read_parts` makes good. It does not know colours by number (ESC[38;5;3m, from 2019 on):
`plain_copy` makes a file that has them, and the last write.
"""

import bisect
import bz2
import contextlib
import itertools
import re
import struct
import sys
import tempfile
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
from nle.dataset.dataset import converter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from custom_nethack_pomdp import COLS, ROWS, GameError

NAME = re.compile(r"(\d{4}-\d\d-\d\d)\.(\d\d)[_:](\d\d)[_:](\d\d)\.ttyrec\.bz2")
EARLY = 5 * 60  # seconds: a file begins a little before its game
PART = 256  # frames decoded at a time


# --- finding games
class Game(NamedTuple):
    """A game, by its line in an xlogfile, and the files of it in their order."""

    player: str
    start: int  # seconds since 1970, UTC
    end: int
    files: Tuple[Path, ...]
    character: str  # it began with, such as val-hum-neu
    version: str  # of NetHack
    points: int
    turns: int
    max_depth: int
    death: str

    @property
    def year(self) -> int:
        return datetime.fromtimestamp(self.start, timezone.utc).year

    def __str__(self) -> str:
        began = datetime.fromtimestamp(self.start, timezone.utc)
        return f"{self.player}, {began:%Y-%m-%d %H:%M:%S}"


LeftOut = Dict[str, List[str]]  # why -> what


def find_games(root: Path) -> Tuple[List[Game], LeftOut]:
    """All games of a folder, by player and time, and what could not be placed.

    A file belongs to the game of its player during which it begins, or else to the first one that
    starts within five minutes after. Where several games were under way (of two versions of
    NetHack, say) it is not known whose it is.
    """
    left_out: LeftOut = defaultdict(list)
    recordings = find_recordings(root, left_out)
    games = []
    for player, lines in read_xlogfiles(root, left_out).items():
        files = recordings.pop(player, [])
        for game, its_files in place(lines, files, left_out):
            if its_files:
                games.append(game._replace(files=tuple(its_files)))
            else:
                left_out["games without a file"].append(str(game))
    for files in recordings.values():
        left_out["files that fit no game"] += [str(path) for _, path in files]
    return sorted(games), dict(left_out)


def find_recordings(root: Path, left_out: LeftOut) -> Dict[str, List[Tuple[int, Path]]]:
    """{player in lower case: (when it begins, file) in order of time}."""
    listed = root / "blacklist.txt"
    blacklist = set()
    if listed.is_file():
        blacklist = {name.strip() for name in listed.read_text(errors="replace").splitlines()}
    found = defaultdict(list)
    for path in sorted(root.glob("*/*.ttyrec.bz2")):
        if str(path.relative_to(root)) in blacklist:
            left_out["files in blacklist.txt"].append(str(path))
            continue
        match = NAME.fullmatch(path.name)
        try:
            if not match:
                raise ValueError
            began = datetime.fromisoformat("{}T{}:{}:{}+00:00".format(*match.groups()))
        except ValueError:
            left_out["files whose name is no time"].append(str(path))
        else:
            found[path.parent.name.lower()].append((int(began.timestamp()), path))
    for files in found.values():
        files.sort()
    return found


def read_xlogfiles(root: Path, left_out: LeftOut) -> Dict[str, List[Game]]:
    """{player in lower case: games, still without files}. NetHack 3.4.3 separates by colons, later
    ones by tabs."""
    games = defaultdict(list)
    for path in sorted(root.glob("xlogfile*")):
        with open(path, encoding="latin-1", newline="\n") as file:
            for number, text in enumerate(file, 1):
                separator = "\t" if "\t" in text else ":"
                pairs = [pair.split("=", 1) for pair in text.strip().split(separator)]
                try:
                    game = game_of(dict(pairs))
                except (ValueError, KeyError):
                    kind = "lines without a player, a start and an end"
                    left_out[kind].append(f"{path}, line {number}")
                else:
                    games[game.player.lower()].append(game)
    return games


def game_of(line: Dict[str, str]) -> Game:
    """Raises ValueError or KeyError where the line lacks what is needed."""
    start = int(line["starttime"])
    end = int(line["endtime"])
    if not 0 < start <= end:
        raise ValueError
    parts = [line.get(name, "?") for name in ("role", "race")]
    parts.append(line.get("align0", line.get("align", "?")))
    death = line.get("death", "")
    if "while" in line:
        death += f", while {line['while']}"
    return Game(
        player=line["name"],
        start=start,
        end=end,
        files=(),
        character=sys.intern("-".join(parts).lower()),
        version=sys.intern(line.get("version", "?")),
        points=int(line.get("points", 0)),
        turns=int(line.get("turns", 0)),
        max_depth=int(line.get("maxlvl", 0)),
        death=death,
    )


def place(
    games: List[Game], files: List[Tuple[int, Path]], left_out: LeftOut
) -> List[Tuple[Game, List[Path]]]:
    """Each game of a player with its files."""
    games = sorted(games, key=lambda game: game.start)
    starts = [game.start for game in games]
    last_ends = list(itertools.accumulate((game.end for game in games), max))  # so far
    placed: List[Tuple[Game, List[Path]]] = [(game, []) for game in games]
    for began, path in files:
        started = bisect.bisect_right(starts, began)
        under_way = []
        for i in range(started - 1, -1, -1):
            if last_ends[i] < began:
                break
            if games[i].end >= began:
                under_way.append(i)
        if not under_way and started < len(games) and starts[started] - EARLY <= began:
            under_way = [started]
        if len(under_way) == 1:
            placed[under_way[0]][1].append(path)
        else:
            why = "files that fit several games" if under_way else "files that fit no game"
            left_out[why].append(str(path))
    return placed


# --- reading recordings
# A bz2 stream's beginning: with blocks, or an empty one.
STREAM = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
MOST_UNREADABLE = 5  # cells of a map, as the mean over frames


class Part(NamedTuple):
    """Consecutive frames of a recording. The arrays are filled anew with the next part."""

    chars: np.ndarray  # [n, 24, 80] uint8
    colors: np.ndarray  # [n, 24, 80] int8
    cursor: np.ndarray  # [n, 2] int16
    times: np.ndarray  # [n] int64, microseconds since 1970
    keys: np.ndarray  # [n] uint8; 0 in version 1, which has none
    scores: np.ndarray  # [n] int32; 0 before version 3


def read_parts(path: Path, version: int = 1, size: int = PART) -> Iterator[Part]:
    """The frames of a file, at most `size` at a time. A file that breaks off ends there.

    Raises OSError or RuntimeError where it cannot be read.
    """
    if len(STREAM.findall(Path(path).read_bytes())) > 1:  # NLE would read the first alone
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "one_stream.bz2"
            whole = contextlib.suppress(EOFError)  # or what there is of it
            with bz2.open(path) as several, bz2.open(copy, "wb", compresslevel=1) as one, whole:
                for content in iter(several.read1, b""):
                    one.write(content)
            yield from read_parts(copy, version, size)
        return
    decoder = converter.Converter(ROWS, COLS, version)
    decoder.load_ttyrec(str(path), gameid=1, part=0)
    arrays = Part(
        np.zeros((size, ROWS, COLS), np.uint8),
        np.zeros((size, ROWS, COLS), np.int8),
        np.zeros((size, 2), np.int16),
        np.zeros(size, np.int64),
        np.zeros(size, np.uint8),
        np.zeros(size, np.int32),
    )
    remaining = 0
    while remaining == 0:
        remaining = decoder.convert(*arrays)
        # version 1 has a column 80, behind the last
        np.minimum(arrays.cursor, (ROWS - 1, COLS - 1), out=arrays.cursor)
        if remaining < size:
            yield Part(*[array[: size - remaining] for array in arrays])


def count_unreadable(chars: np.ndarray) -> int:
    """Cells of maps [n, 24, 80] that the converter could not draw as ASCII, such as the bytes of
    UTF-8."""
    return int((chars[:, 1 : ROWS - 2] > 126).sum())


def check_map(unreadable: int, frames: int) -> None:
    """Raises GameError where so many cells of so many maps are more than players' own words."""
    if unreadable > MOST_UNREADABLE * frames:
        raise GameError("its map is neither ASCII nor IBM 437 or DEC line graphics")


def read_game(game: Game, size: int = PART) -> Iterator[Part]:
    """The frames of all of a game's files, one after another."""
    for path in game.files:
        yield from read_parts(path, size=size)


# --- single files, of whatever version
HEADERS = {1: struct.Struct("<iii"), 2: struct.Struct("<iiiB"), 3: struct.Struct("<iiiB")}
# In version 2 and 3 a record is of a channel: what was sent, a key or a score. How long these are.
LENGTHS = {1: {0: range(1, 2**20)}, 2: {0: range(1, 2**20), 1: range(1, 2)}}
LENGTHS[3] = {**LENGTHS[2], 2: range(4, 5)}
TIMES = range(300_000_000, 4_000_000_000)  # 1979 to 2096
SURE = 64  # records after which a file is what its name says
NUMBERED = re.compile(rb"\x1b\[(?:38;5;|9)(\d+)m")


def version_of(path: Path) -> int:
    """1, 2 or 3, by the file's name. Raises GameError for others."""
    match = re.search(r"\.ttyrec([23]?)\.bz2$", Path(path).name)
    if not match:
        raise GameError("it is none of .ttyrec.bz2, .ttyrec2.bz2 and .ttyrec3.bz2")
    return int(match.group(1) or 1)


def records(path: Path, version: int) -> Iterator[Tuple[Tuple[Any, ...], bytes]]:
    """(header, content) of each record, up to the end or where the file breaks off. Raises
    GameError where the first ones are of another version, OSError where nothing can be read."""
    layout = HEADERS[version]
    number = 0
    with bz2.open(path) as file:
        while True:
            try:
                raw = file.read(layout.size)
                if len(raw) < layout.size:
                    return
                seconds, micros, length, *channel = layout.unpack(raw)
                lengths = LENGTHS[version].get(sum(channel), range(0))
                fits = seconds in TIMES and 0 <= micros < 10**6 and length in lengths
                content = file.read(length) if fits else b""
            except (EOFError, OSError):
                if number == 0:
                    raise
                return
            if not fits and number < SURE:
                raise GameError(f"its records are not those of version {version}")
            if not fits or len(content) < length:
                return
            yield (seconds, micros, length, *channel), content
            number += 1


def check_records(path: Path, version: int) -> None:
    """Raises as `records` does where the file is not of this version."""
    for _ in itertools.islice(records(path, version), SURE):
        pass


def named_colour(match: "re.Match[bytes]") -> bytes:
    """ESC[38;5;3m or ESC[93m -> the same by the sequences of the eight colours and bold."""
    number = int(match.group(1))
    if match.group().startswith(b"\x1b[9"):
        number += 8
    if number < 8:
        return b"\x1b[3%dm" % number
    if number < 16:
        return b"\x1b[1;3%dm" % (number - 8)
    return b"\x1b[39m"  # of a palette of 256, which NetHack does not use


def plain_copy(path: Path, version: int, copy: Path) -> None:
    """Writes the recording anew so that NLE's converter gives all its colours and frames. Raises as
    `records` does."""
    layout = HEADERS[version]
    with bz2.open(copy, "wb", compresslevel=1) as file:
        header: Tuple[Any, ...] = ()
        for header, content in records(path, version):
            content = NUMBERED.sub(named_colour, content)
            file.write(layout.pack(*header[:2], len(content), *header[3:]) + content)
        if header:  # the last record, which the converter leaves out
            file.write(layout.pack(*header[:2], 1, *[0 for _ in header[3:]]) + b"\0")
