# SPDX-License-Identifier: MIT
"""Human games: found and joined from alt.org's layout, read in versions 1 and 2, told of and
watched.

All recordings are made here: of a game that is played for it, or of screens that are written out.
"""

import bz2
import datetime
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import LIMIT_S
from nle import dataset as nld

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import html_page
import human_games
import inspect_data
import watch

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SECOND = 1_300_000_000  # when hand-made recordings begin


def records_of_version_3(path):
    """[(header's 12 bytes, channel, content)]."""
    plain, at, found = bz2.decompress(Path(path).read_bytes()), 0, []
    while at < len(plain):
        length = struct.unpack_from("<i", plain, at + 8)[0]
        found.append((plain[at : at + 12], plain[at + 12], plain[at + 13 : at + 13 + length]))
        at += 13 + length
    return found


def write(path, *contents):
    """A recording of version 1: what was sent to the terminal, a second apart."""
    headers = [struct.pack("<iii", SECOND + i, 7, len(sent)) for i, sent in enumerate(contents)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(bz2.compress(b"".join(h + sent for h, sent in zip(headers, contents))))
    return Path(path)


def read(path, version=1, size=human_games.PART):
    """All frames as one Part."""
    copies = [
        [array.copy() for array in part] for part in human_games.read_parts(path, version, size)
    ]
    return human_games.Part(*map(np.concatenate, zip(*copies)))


def assert_same_screens(one, other):
    for name in ("chars", "colors", "cursor"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A Valkyrie's game of 500 keys, then quit: as recorded, and the same without scores and
    keys."""
    folder = tmp_path_factory.mktemp("played")
    rng = np.random.default_rng(3)
    game = pomdp.NetHackGame("val-hum-neu", savedir=str(folder))
    game.reset(5, 6)
    for key in [ord(key) for key in rng.choice(list("hjklyubns,i.:@"), 500)]:
        if not game.end:
            game.step(int(pomdp.KEY_TO_ACTION[key]))
        for _ in range(2):  # leave menus
            if not game.end:
                game.step(int(pomdp.KEY_TO_ACTION[27]))
    for key in (27, 27, int(pomdp.nethack.Command.QUIT), ord("y")):
        if not game.end:
            game.step(int(pomdp.KEY_TO_ACTION[key]))
    game.close()
    (path,) = folder.rglob("*.ttyrec3.bz2")
    records = records_of_version_3(path)
    first, second = folder / "2011-03-13.07_06_40.ttyrec.bz2", folder / "nle.1.0.ttyrec2.bz2"
    first.write_bytes(bz2.compress(b"".join(h + sent for h, kind, sent in records if kind == 0)))
    kept = [h + bytes([kind]) + sent for h, kind, sent in records if kind < 2]
    second.write_bytes(bz2.compress(b"".join(kept)))
    return records, {1: first, 2: second, 3: path}


# --- reading
def test_version_1_and_2_show_the_game_that_version_3_shows(played):
    """Version 1 has a frame for each write: the last one before a key is what the player saw."""
    records, paths = played
    whole = pomdp.read_ttyrec(str(paths[3]))
    second = read(paths[2], 2)
    assert_same_screens(second, whole)
    assert (pomdp.KEY_TO_ACTION[second.keys] == whole.actions).all() and not second.scores.any()
    kinds = np.array([kind for _, kind, _ in records])
    seen = np.cumsum(kinds == 0)[kinds == 1] - 1
    first = read(paths[1])
    assert len(first.chars) == (kinds == 0).sum() - 1, "the converter leaves out the last write"
    seen = seen[seen < len(first.chars)]
    assert_same_screens(
        human_games.Part(*(array[seen] for array in first)),
        human_games.Part(*(array[: len(seen)] for array in second)),
    )
    assert len(seen) > 1000 and not first.keys.any() and (np.diff(first.times) >= 0).all()


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_parts_of_any_size_are_the_same_frames(played, size):
    path = played[1][1]
    assert_same_screens(read(path, size=size), read(path))


def test_a_game_is_read_from_all_of_its_files(played, tmp_path):
    """Each file is a terminal of its own: what the one before left behind is gone."""
    paths = [write(tmp_path / "a.ttyrec.bz2", b"\x0e one", b" two", b"-"), played[1][1]]
    game = human_games.Game("x", 1, 2, tuple(paths), "val-hum-neu", "3.6.0", 0, 0, 1, "")
    parts = [part.chars.copy() for part in human_games.read_game(game)]
    wanted = np.concatenate([read(path).chars for path in paths])
    assert np.array_equal(np.concatenate(parts), wanted)


def test_a_file_of_several_streams_is_read_to_its_end(played, tmp_path):
    """As two files appended to each other, or pbzip2 makes them; also where the last breaks off."""
    plain = bz2.decompress(played[1][1].read_bytes())
    third = len(plain) // 3
    streams = [b"", plain[:third], plain[third : 2 * third], plain[2 * third :]]
    path = tmp_path / "several.ttyrec.bz2"
    path.write_bytes(b"".join(map(bz2.compress, streams)))
    assert_same_screens(read(path), read(played[1][1]))
    assert inspect_data.count_frames(path) == inspect_data.count_frames(played[1][1])
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read(path).chars) > 100


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(frames):
        path = write(tmp_path / "long.ttyrec.bz2", *[b"\x1b[H%d" % i for i in range(frames)])
        tracemalloc.start()
        assert sum(len(part.chars) for part in human_games.read_parts(path)) == frames - 1
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(5000) < 1.1 * peak(300)


def test_the_cursor_stays_on_the_screen(tmp_path):
    """NLE's converter has a column more in version 1."""
    path = write(tmp_path / "a.ttyrec.bz2", b"\x1b[24;1H" + 80 * b"x", b"\x1b[H", b"")
    assert read(path).cursor.tolist() == [[23, 79], [0, 0]]
    assert read(path).chars[0, 23].tobytes() == 80 * b"x"


ROW = b"\x1b[2;1H"  # where the drawing goes
WALLS = {
    "IBM 437": b"\xda\xc4\xbf \xb3\xfa\xb3 \xb0\xb1\xf4",
    "DEC by SO and SI": b"\x1b)0\x1b[2;1H\x0elqk x~x\x0f ##{",
    "DEC by ESC ( 0": b"\x1b(0lqk x~x\x1b(B ##{",
    "tiles": b"".join(b"\x1b[0;%dz%c\x1b[1z" % (i, c) for i, c in enumerate(b"--- |.| ##{")),
}


@pytest.mark.parametrize("kind", WALLS)
def test_line_graphics_are_drawn_as_ascii(kind, tmp_path, capsys):
    path = write(tmp_path / "2009-02-05.10_33_51.ttyrec.bz2", b"\x1b[2J", ROW + WALLS[kind])
    (*_, view) = watch.recorded_game(str(path), None, 100)
    assert view.chars[1].tobytes().rstrip() == b"--- |.| ##{"
    assert watch.main(["--game", str(path)]) == 0
    assert "\n--- |.| ##{ " in capsys.readouterr().out


def test_colours_of_all_years(tmp_path):
    """By name with bold, and by number as from 2019 on; inverse video; a write is never lost."""
    colours = [b"\x1b[0;3%dm" % i for i in range(8)] + [b"\x1b[0;1;3%dm" % i for i in range(8)]
    numbers = [b"\x1b[0m\x1b[38;5;%dm" % i for i in range(16)]
    bright = [b"\x1b[0m\x1b[9%dm" % i for i in range(8)]
    inverse = [b"\x1b[0;7m\x1b[38;5;%dm" % i for i in range(8)]
    rows = [(1, colours), (2, numbers), (3, bright), (4, inverse)]
    sent = [
        b"\x1b[%d;1H" % (row + 1) + b"".join(style + b"a" for style in styles)
        for row, styles in rows
    ]
    path = write(tmp_path / "2020-10-03.17_27_10.ttyrec.bz2", *sent)
    views = list(watch.recorded_game(str(path), None, 100))
    assert len(views) == 4 and views[-1].note == "the recording ends"
    shown = [views[-1].colors[row, : len(styles)].tolist() for row, styles in rows]
    assert shown == [[*range(16)], [*range(16)], [*range(8, 16)], [*range(16, 24)]]
    shown = watch.game_lines(views[-1], coloured=True)[2]
    assert re.findall(r"0;(\d+)ma", shown)[:3] == ["37", "31", "32"]


# --- finding and joining
def seconds(text):
    return int(datetime.datetime.fromisoformat(text + "+00:00").timestamp())


def xlog(name, start, end, separator="\t", **more):
    values = dict(version="3.6.2" if separator == "\t" else "3.4.3", points=1234, deathdnum=0)
    values.update(deathlev=2, maxlvl=3, hp=0, maxhp=12, deaths=1, deathdate=20190725)
    values.update(birthdate=20190725, uid=5, role="Val", race="Hum", gender="Fem", align="Cha")
    values.update(name=name, death="killed by a newt", conduct="0xf88", turns=100, achieve="0x0")
    values.update(realtime=9, starttime=seconds(start), endtime=seconds(end), gender0="Fem")
    values.update(align0="Neu", **more)
    return separator.join(f"{key}={value}" for key, value in values.items()) + "\n"


STATUS = (
    b"\x1b[23;1HAda the Stripling   St:16 Dx:11 Co:18 In:9 Wi:10 Ch:7  Neutral"
    b"\x1b[24;1HDlvl:1  $:0  HP:14(14) Pw:4(4) AC:4  Xp:1/0 T:1"
)


@pytest.fixture
def layout(tmp_path):
    """Ada: a game of 2009 in two files and one of 2019, Bob's in 2019, and what cannot be
    placed."""
    root = tmp_path / "nao"
    files = {
        "Ada/2009-02-05.10_33_51": 3,  # its game starts 2 minutes later
        "Ada/2009-02-06.08:00:00": 4,  # restored on the day after
        "Ada/2009-02-08.08_00_00": 2,  # after its end
        "Ada/2019-07-25.22_03_29": 5,
        "bob/2019-07-25.22_03_29": 2,
        "bob/2019-07-27.12_00_00": 2,  # during two games
        "bob/2019-07-28.10_00_00": 2,  # during the longer one, after the other
        "bob/2019-07-25.22_04_00": 2,  # blacklisted
        "bob/notes": 1,
        "Cyd/2019-07-25.22_03_29": 2,  # no line names her
    }
    for name, frames in files.items():
        contents = [b"\x1b[2J", STATUS, *[b"\x1b[5;5H@"] * (frames - 1)]
        if frames == 5:
            contents[3] = b"\x1b[23;1H\x1b[K"  # a menu hides the first line, then the other one
            contents[4] = STATUS + b"\x1b[24;1H\x1b[K"
        write(root / f"{name}.ttyrec.bz2", *contents)
    (root / "blacklist.txt").write_text("bob/2019-07-25.22_04_00.ttyrec.bz2")
    old = xlog("ada", "2009-02-05T10:35:51", "2009-02-06T09:00:00", ":", death="quit")
    (root / "xlogfile.full.txt").write_text(old)
    new = xlog("Ada", "2019-07-25T22:03:31", "2019-07-25T23:00:00", role="Wiz", **{"while": "ill"})
    new += xlog("Bob", "2019-07-25T22:03:31", "2019-07-25T23:00:00")
    new += xlog("Bob", "2019-07-26T12:00:00", "2019-07-28T12:00:00")
    new += xlog("Bob", "2019-07-27T11:00:00", "2019-07-27T13:00:00")
    new += "name=Bob\tstarttime=\nno line\n\n"
    (root / "xlogfile.nh362").write_text(new)
    return root


def test_games_are_joined_by_player_and_time(layout):
    games, left_out = human_games.find_games(layout)
    found = [(str(game), game.year, [path.name[:10] for path in game.files]) for game in games]
    assert found == [
        ("Ada, 2019-07-25 22:03:31", 2019, ["2019-07-25"]),
        ("Bob, 2019-07-25 22:03:31", 2019, ["2019-07-25"]),
        ("Bob, 2019-07-26 12:00:00", 2019, ["2019-07-28"]),
        ("ada, 2009-02-05 10:35:51", 2009, ["2009-02-05", "2009-02-06"]),
    ]
    assert [game.character for game in games] == ["wiz-hum-neu", *["val-hum-neu"] * 3]
    newest, oldest = games[0], games[3]
    assert (newest.version, newest.death) == ("3.6.2", "killed by a newt, while ill")
    assert (oldest.version, oldest.points, oldest.turns, oldest.max_depth) == (
        "3.4.3",
        1234,
        100,
        3,
    )
    told = {
        why: [name.replace(f"{layout}/", "") for name in names] for why, names in left_out.items()
    }
    assert told == {
        "files in blacklist.txt": ["bob/2019-07-25.22_04_00.ttyrec.bz2"],
        "files whose name is no time": ["bob/notes.ttyrec.bz2"],
        "files that fit several games": ["bob/2019-07-27.12_00_00.ttyrec.bz2"],
        "files that fit no game": [
            "Ada/2009-02-08.08_00_00.ttyrec.bz2",
            "Cyd/2019-07-25.22_03_29.ttyrec.bz2",
        ],
        "games without a file": ["Bob, 2019-07-27 11:00:00"],
        "lines without a player, a start and an end": [
            f"xlogfile.nh362, line {number}" for number in (5, 6, 7)
        ],
    }


def test_joined_as_nle_joins_them(tmp_path):
    """Against NLE's own way into its database, with games of a player one after another."""
    rng = np.random.default_rng(0)
    root, lines, at = tmp_path / "nao", [], seconds("2015-01-01T00:00:00")

    def when(second):
        return datetime.datetime.fromtimestamp(int(second), datetime.timezone.utc)

    for _ in range(60):
        at += int(rng.integers(1, 1500))
        end = at + int(rng.integers(1, 3000))
        lines.append(xlog("eve", f"{when(at):%Y-%m-%dT%H:%M:%S}", f"{when(end):%Y-%m-%dT%H:%M:%S}"))
        for began in {at - int(rng.integers(0, 500)), *rng.integers(at, end + 200, 2).tolist()}:
            write(root / "eve" / f"{when(began):%Y-%m-%d.%H_%M_%S}.ttyrec.bz2", b"x", b"y")
        at = end
    (root / "xlogfile.1").write_text("".join(lines))
    (root / "blacklist.txt").write_text("")
    database = str(tmp_path / "ttyrecs.db")
    nld.db.create(database)
    nld.populate_db.add_altorg_directory(str(root), "altorg", database)
    with sqlite3.connect(database) as connection:
        wanted = connection.execute(
            "SELECT starttime, path FROM ttyrecs JOIN games USING (gameid) "
            "WHERE ttyrecs.gameid > 0 ORDER BY starttime, part"
        ).fetchall()
    games, left_out = human_games.find_games(root)
    found = [(game.start, str(path.relative_to(root))) for game in games for path in game.files]
    assert found == wanted and len(found) > 100
    assert len(found) + len(left_out["files that fit no game"]) == len(list(root.glob("eve/*")))


# --- inspect_data
def test_inspect_data_tells_of_human_games(layout, capsys):
    assert inspect_data.main([str(layout), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["years"] == [
        {"year": 2009, "games": 1, "files": 2, "frames": 7, "frames_read": 5},
        {"year": 2019, "games": 3, "files": 3, "frames": 9, "frames_read": 4},
    ]
    (layout / "bob" / "2019-07-25.22_03_29.ttyrec.bz2").write_bytes(b"rubbish")
    assert inspect_data.main([str(layout)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["all", "4", "5", "14", "57.1%"] in [line.split() for line in lines]
    assert any(re.search("left out: 1 files that cannot be read: .*bob", line) for line in lines)
    assert inspect_data.main([str(layout), "--character", "wiz-hum-neu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["frames"] == 5


def test_a_map_in_other_characters_is_left_out_by_name(layout, capsys):
    """UTF-8 takes several cells for each; a word of a player's in it is no reason."""
    there = layout / "bob" / "2019-07-25.22_03_29.ttyrec.bz2"
    word = "\x1b[2;1HThis is a potion named Höhle."
    write(there, STATUS, word.encode(), b"\x1b[5;5H@")
    assert inspect_data.main([str(layout)]) == 0
    assert "cannot be read" not in capsys.readouterr().out
    write(there, STATUS, "\x1b[5;5H┌─┐\x1b[6;5H│@│".encode(), b"\x1b[6;5H@")
    assert inspect_data.main([str(layout)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line)
    assert f"{there}: its map is neither ASCII nor IBM 437 or DEC line graphics" in line


def test_mistakes_get_one_line(layout, tmp_path, capsys):
    assert inspect_data.main([str(layout), "--character", "mon-hum-neu"]) == 2
    error = capsys.readouterr().err
    assert "no human games of mon-hum-neu in" in error and error.count("\n") == 1
    line = [sys.executable, str(ROOT / "custom_nethack_pomdp.py"), "--data_path", str(layout)]
    line += ["--store_path", str(tmp_path / "stores"), "--checkpoints_path", str(tmp_path / "runs")]
    environment = {**os.environ, **QUIET}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "scripts/label_games.py" in done.stderr


# --- watching
def test_watching_all_versions(played, tmp_path, capsys):
    records, paths = played
    whole = pomdp.read_ttyrec(str(paths[3]))
    second = list(watch.recorded_game(str(paths[2]), None, 10**6))
    keys = [content[0] for _, kind, content in records if kind == 1]
    assert [view.action for view in second] == pomdp.KEY_TO_ACTION[keys].tolist()
    for t in (0, 100, len(whole.chars) - 1):
        assert np.array_equal(second[t].chars, whole.chars[t]) and second[t].score is None
    first = list(watch.recorded_game(str(paths[1]), None, 10**6))
    assert len(first) == sum(kind == 0 for _, kind, _ in records), "the last write too"
    assert {view.action for view in first} == {None} and max(view.turn for view in first) > 100
    assert [view.note for view in first[-2:]] == ["", "the recording ends"]
    assert len(list(watch.recorded_game(str(paths[1]), None, 300))) == 300
    for path in paths.values():
        assert watch.main(["--game", str(path), "--every", "100000"]) == 0
        assert watch.main(["--game", str(path), "--html", str(tmp_path / "game.html")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("score unknown") == 6 and "key   " in shown
    assert sorted(tmp_path.iterdir()) == [tmp_path / "game.html"]


def test_a_page_of_a_game_without_keys_and_scores(played):
    """They are not taken for an end of the game and a score of 0."""
    page = html_page.Page()
    for view in watch.recorded_game(str(played[1][1]), None, 10**6):
        page.see(view)
        page.add(view)
    ends = [mark for mark in page.marks if mark[2] == "end"]
    assert [(frame, text) for frame, _, _, text in ends] == [(len(page) - 1, "the recording ends")]
    scores = np.concatenate(page.columns["score"])
    assert (scores == -1).all() and (np.concatenate(page.columns["action"]) == -1).all()


def test_a_recording_that_breaks_off_is_shown_so_far(played, tmp_path):
    path = tmp_path / "2011-03-13.07_06_40.ttyrec.bz2"
    plain = bz2.decompress(played[1][1].read_bytes())
    path.write_bytes(bz2.compress(plain[: len(plain) // 2]))
    views = list(watch.recorded_game(str(path), None, 10**6))
    wanted = read(played[1][1])
    assert 100 < len(views) < len(wanted.chars)
    assert np.array_equal(views[-1].chars, wanted.chars[len(views) - 1])


def test_what_is_not_known_is_refused(played, tmp_path, capsys):
    """Instead of showing nonsense: other versions by name, and files that are not what their name
    says."""
    _, paths = played
    cases = {
        "game.ttyrec4.bz2": (3, "it is none of .ttyrec.bz2"),
        "game.ttyrec.gz": (1, "it is none of .ttyrec.bz2"),
        "three.ttyrec.bz2": (3, "not those of version 1"),
        "two.ttyrec.bz2": (2, "not those of version 1"),
        "three.ttyrec2.bz2": (3, "not those of version 2"),
        "one.ttyrec2.bz2": (1, "not those of version 2"),
        "one.ttyrec3.bz2": (1, "not those of version 3"),
    }
    for name, (version, says) in cases.items():
        path = tmp_path / name
        path.write_bytes(paths[version].read_bytes())
        assert watch.main(["--game", str(path)]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
    (tmp_path / "rubbish.ttyrec.bz2").write_bytes(b"rubbish")
    (tmp_path / "empty.ttyrec.bz2").write_bytes(bz2.compress(b""))
    for name, says in (("rubbish", "cannot be read"), ("empty", "holds no frame")):
        assert watch.main(["--game", str(tmp_path / f"{name}.ttyrec.bz2")]) == 2
        assert says in capsys.readouterr().err
    agent = str(ROOT / "scripts" / "agents" / "small_512.pt")
    assert watch.main(["--game", str(paths[1]), "--checkpoint", agent]) == 2
    assert "only ttyrec3 has" in capsys.readouterr().err
