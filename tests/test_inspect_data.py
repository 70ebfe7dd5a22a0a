"""What inspect_data tells of a folder is what training reads there, and damage of every kind is named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import inspect_data  # imported by name, so that its worker processes find it too

GAMES = ROOT / "tests" / "data" / "nle_data"
MONK, VALKYRIE, RANGER = "mon-hum-neu", "val-hum-neu", "ran-hum-neu"


def look(capsys, *arguments):
    """The report as JSON."""
    assert inspect_data.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def of(report, character):
    (told,) = [told for told in report["characters"] if told["character"] == character]
    return told


def summed(values):
    mean = pytest.approx(np.mean(values))
    return {"min": min(values), "median": float(np.median(values)), "mean": mean, "max": max(values), "total": sum(values)}


def actions_in(store):
    blocks = [store.block(game, number) for game in range(len(store)) for number in range(-(-int(store.frames[game]) // pomdp.BLOCK))]
    return np.concatenate([block.actions for block in blocks])


@pytest.fixture
def folder(tmp_path):
    """A copy of two Monk's and one Valkyrie's folder of games."""
    monk = sorted(GAMES.glob("mon-*"), key=lambda path: sum(file.stat().st_size for file in path.iterdir()))[:2]
    for path in (*monk, GAMES / "val-hum-neu-1-0"):
        shutil.copytree(path, tmp_path / "data" / path.name)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def counted():
    """Two of the characters decoded in this process."""
    args = inspect_data.parse([str(GAMES), "--character", f"{MONK},{VALKYRIE}", "--workers", "1"])
    return inspect_data.inspect(args)


# --- what is told is what training sees
@pytest.mark.parametrize("character", [MONK, VALKYRIE])
def test_numbers_are_those_of_training(counted, stores, character):
    told, store = of(counted, character), stores[character]
    assert told["games"] == len(store) and not told["unreadable"] and not told["missing"] and not counted["damage"]
    assert told["frames"] == summed(store.frames.tolist()) and told["turns"] == summed(store.turns.tolist())
    assert told["score"] == summed([int(store.rewards(game)[1].sum()) for game in range(len(store))])
    heldout = pomdp.Games([store]).heldout(0.1)
    assert (told["heldout"], told["training"]) == (heldout.sum(), (~heldout).sum())
    actions = actions_in(store)
    assert sum(row["frames"] for row in told["actions"]) + told["unknown_keys"] == len(actions)
    for row in told["actions"]:
        assert row["frames"] == (actions == row["action"]).sum() and row["share"] == pytest.approx(row["frames"] / len(actions))
    assert [row["frames"] for row in told["actions"]] == sorted((row["frames"] for row in told["actions"]), reverse=True)
    assert {row["name"] for row in told["actions"]} > {"NORTH (k)", "EAST (l)"}


def test_the_number_of_processes_does_not_matter(folder):
    reports = [inspect_data.inspect(inspect_data.parse([str(folder), "--workers", workers])) for workers in ("1", "2")]
    assert reports[0] == reports[1] and [told["games"] for told in reports[0]["characters"]] == [2, 1]
    sources = pomdp.find_nld_games(folder, MONK).games
    for one, two in zip(inspect_data.examine_all(sources, 1), inspect_data.examine_all(sources, 2), strict=True):
        assert one[:4] == two[:4] and np.array_equal(one.actions, two.actions)


def test_a_store_says_the_same_as_its_games(counted, stores, capsys):
    folder = stores[VALKYRIE].folder
    report = look(capsys, folder)
    kept = ("games", "training", "heldout", "frames", "score", "turns", "actions", "unknown_keys", "unreadable")
    assert {name: of(report, VALKYRIE)[name] for name in kept} == {name: of(counted, VALKYRIE)[name] for name in kept}
    quick = look(capsys, folder.parent, "--quick")  # a folder of stores
    assert of(quick, VALKYRIE)["frames"] == of(counted, VALKYRIE)["frames"] and "actions" not in of(quick, VALKYRIE)


def test_quick_reads_the_xlogfiles(capsys, counted):
    report = look(capsys, GAMES, "--quick")
    for character in (MONK, VALKYRIE, RANGER):
        lines = [line for path in GAMES.glob(f"{character}-*/*.xlogfile") for line in pomdp.parse_xlogfile(path)]
        told = of(report, character)
        assert told["score"] == summed([int(line["points"]) for line in lines])
        assert told["turns"] == summed([int(line["turns"]) for line in lines])
        assert told["frames"] is None and told["games"] == len(lines)
    assert of(report, MONK)["heldout"] == of(counted, MONK)["heldout"]


def test_katakomba_s_files(tmp_path, capsys, counted):
    import h5py

    game = min(pomdp.find_nld_games(GAMES, MONK).games, key=lambda game: game.size)
    frames = pomdp.Frames(*(np.concatenate(parts) for parts in zip(*pomdp.read_ttyrec(game.path))))
    with h5py.File(tmp_path / f"data-{MONK}-any.hdf5", "w") as file:
        group = file.create_group("0")
        rewards = np.maximum(np.diff(frames.scores, append=frames.scores[-1]), 0)
        for name, array in (("tty_chars", frames.chars), ("tty_colors", frames.colors), ("tty_cursor", frames.cursor.astype(np.int16)),
                            ("actions", frames.actions.astype(np.int16)), ("rewards", rewards.astype(np.int32))):  # fmt: skip
            group[name] = array
    told = of(look(capsys, tmp_path), MONK)
    length = sum(len(piece.chars) for piece in pomdp.frames_of_play(pomdp.read_ttyrec(game.path)))
    assert told["games"] == 1 and told["frames"]["total"] == length and told["from"] == f"HDF5 data-{MONK}-any.hdf5"
    assert of(look(capsys, tmp_path / f"data-{MONK}-any.hdf5"), MONK)["frames"] == told["frames"]


def test_the_text(capsys, folder):
    assert inspect_data.main([str(folder), "--character", MONK]) == 0
    text = capsys.readouterr().out
    assert "mon-hum-neu   2 games (1 for training, 1 held out)   NLD-AA" in text and "others" in text and VALKYRIE not in text
    assert text.count("#\n") <= inspect_data.TOP and "%" in text


# --- damage
def test_damage_is_named(folder, capsys):
    first, second = sorted(path for path in folder.iterdir() if path.name.startswith("mon"))
    game = next(first.glob("*.bz2"))
    game.write_bytes(game.read_bytes()[:1000])
    missing = next(second.glob("*.bz2"))
    missing.rename(second / "nle.77.0.ttyrec3.bz2")
    log = next((folder / "val-hum-neu-1-0").glob("*.xlogfile"))
    log.write_bytes(log.read_bytes() + b"rubbish\n")
    report = look(capsys, folder)
    told = of(report, MONK)
    assert told["games"] == 0 and len(told["unreadable"]) == len(told["missing"]) == 1 and of(report, VALKYRIE)["games"] == 1
    assert str(game) in told["unreadable"][0] and str(missing) in told["missing"][0]
    assert len(report["damage"]) == 2 and all(any(part in line for line in report["damage"]) for part in ("nle.77.0", str(log)))
    assert inspect_data.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("1 games that cannot be read", "1 lines of an xlogfile", "2 files that nothing reads"))
    quick = of(look(capsys, folder, "--quick"), MONK)
    assert quick["games"] == 1 and quick["missing"] == told["missing"], "whether a game can be read, only decoding tells"


def test_damaged_stores_are_named(tmp_path, stores, capsys):
    block, index = tmp_path / "block", tmp_path / "index"
    for copy in (block, index):
        shutil.copytree(stores[MONK].folder, copy)
    content = bytearray((block / "frames.bin").read_bytes())
    content[100] ^= 1
    (block / "frames.bin").write_bytes(content)
    (index / "index.npz").write_bytes(b"no index")
    report = look(capsys, tmp_path)
    assert len(report["damage"]) == 1 and str(index) in report["damage"][0]
    assert len(of(report, MONK)["unreadable"]) == 1 and "block 0" in of(report, MONK)["unreadable"][0]
    assert of(report, MONK)["games"] == len(stores[MONK]) - 1


class Deadly:
    """A source at which a reader dies, as a library may at damaged input."""

    name, key = "deadly", ""

    @property
    def path(self):
        os._exit(1)


def test_a_reader_that_crashes_is_one_damaged_game():
    good = pomdp.find_nld_games(GAMES, MONK).games[:1]
    reports = list(inspect_data.examine_all([*good, Deadly(), *good], 2))
    assert reports[1] == "its reader crashed" and reports[0].frames == reports[2].frames > 0 and len(reports) == 3


# --- the command
def test_the_command_and_a_reader_that_has_seen_enough(folder):
    command = f"{sys.executable} {ROOT / 'scripts' / 'inspect_data.py'} {folder} --quick"
    both = f"{command} | head -c 1 | wc -c; {command} --json"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", both], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert [told["games"] for told in json.loads(result.stdout.partition("\n")[2])["characters"]] == [2, 1]


@pytest.mark.parametrize("arguments, says", [
    (["none"], "does not exist"), (["."], "neither an xlogfile"), ([str(GAMES), "--character", "mon-hum-neo"], "did you mean mon-hum-neu"),
    ([str(GAMES), "--character", "wiz-elf-cha"], "it holds mon-hum-neu, ran-hum-neu, val-hum-neu"), ([__file__], "is not named data-"),
    ([str(GAMES), "--heldout_share", "1"], "below 1"), ([str(GAMES), "--workers", "-1"], "not be negative"),
])  # fmt: skip
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert inspect_data.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("inspect_data: error: ") and says in error and error.count("\n") == 1
