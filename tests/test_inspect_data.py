# SPDX-License-Identifier: MIT
"""What inspect_data tells of a folder is what training reads there, and what is left out is
named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import inspect_data

GAMES = ROOT / "tests" / "data" / "nle_data"
MONK, VALKYRIE, RANGER = "mon-hum-neu", "val-hum-neu", "ran-hum-neu"


@pytest.fixture
def look(capsys, stores_path):
    """The report on a folder as JSON, by character."""

    def report(*arguments):
        assert (
            inspect_data.main([*map(str, arguments), "--store_path", str(stores_path), "--json"])
            == 0
        )
        return {told["character"]: told for told in json.loads(capsys.readouterr().out)}

    return report


@pytest.fixture
def folder(tmp_path):
    """A copy of two Monk's games and a Valkyrie's."""
    for name in ("mon-hum-neu-1-4", "mon-hum-neu-1-1", "val-hum-neu-1-2"):
        shutil.copytree(GAMES / name, tmp_path / "data" / name)
    return tmp_path / "data"


def test_numbers_are_those_of_the_recordings(look, folder):
    """Against the recordings themselves, read here."""
    told = look(folder)
    assert (
        list(told) == [MONK, VALKYRIE] and told[MONK]["games"] == 2 and told[MONK]["heldout"] == 1
    )
    for game in told[MONK]["of_each_game"]:
        frames = pomdp.read_ttyrec(str(folder / game["name"]))
        play = slice(pomdp.find_first_frame(frames), pomdp.find_end_of_play(frames))
        stats, scores = pomdp.read_blstats(frames.chars[play]), frames.scores[play]
        assert (game["frames"], game["score"]) == (len(scores), scores[-1] - scores[0])
        assert (game["turns"], game["depth"]) == (stats[:, 20].max(), stats[:, 12].max())
    size = (Path(told[MONK]["store"]) / "frames.bin").stat().st_size
    assert told[MONK]["frames"] == sum(game["frames"] for game in told[MONK]["of_each_game"])
    assert (
        told[MONK]["bytes_a_frame"] == pytest.approx(size / told[MONK]["frames"])
        and not told[MONK]["skipped"]
    )
    assert list(look(folder, "--character", MONK)) == [MONK]


def test_stores_and_katakomba_s_files_are_known(look, tmp_path, stores):
    import h5py

    told = look(GAMES)
    assert list(told) == [MONK, RANGER, VALKYRIE]
    assert look(stores[MONK].folder.parent) == told, "a folder of stores"
    copy = shutil.copytree(stores[MONK].folder, tmp_path / "by another name")
    assert look(copy)[MONK]["of_each_game"] == told[MONK]["of_each_game"]
    frames = pomdp.read_ttyrec(str(GAMES / told[MONK]["of_each_game"][1]["name"]))
    rewards = np.diff(frames.scores, append=frames.scores[-1]).clip(min=0)
    arrays = (frames.chars, frames.colors, frames.cursor, frames.actions, rewards)
    with h5py.File(tmp_path / f"data-{MONK}-any.hdf5", "w") as file:
        for name, array in zip(
            ("tty_chars", "tty_colors", "tty_cursor", "actions", "rewards"), arrays
        ):
            file[f"0/{name}"] = array
    wanted = told[MONK]["of_each_game"][1]["frames"]
    for place in (tmp_path, tmp_path / f"data-{MONK}-any.hdf5"):
        assert [game["frames"] for game in look(place)[MONK]["of_each_game"]] == [wanted]


def test_what_is_left_out_is_named(look, folder, stores_path):
    """As text, by the command line: a game that is cut short, a line of an xlogfile whose game is
    missing."""
    third = shutil.copytree(GAMES / "mon-hum-neu-1-5", folder / "mon-hum-neu-1-5")
    damaged = next((folder / "mon-hum-neu-1-1").glob("*.bz2"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    next(third.glob("*.bz2")).unlink()
    command = [
        sys.executable,
        str(ROOT / "scripts" / "inspect_data.py"),
        str(folder),
        "--store_path",
        str(stores_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    monk, valkyrie = done.stdout.split("\n\n")
    assert done.returncode == 0 and monk.startswith(
        "mon-hum-neu: 1 games (0 held out), 432 frames, "
    )
    frames, score = (row.split() for row in monk.splitlines()[2:4])
    assert frames == ["frames", *["432.0"] * 4] and score == ["score", *["36.0"] * 4]
    left_out = [line for line in monk.splitlines() if "left out:" in line]
    assert (
        len(left_out) == 2
        and str(damaged) in left_out[0]
        and str(next(third.glob("*.xlogfile"))) in left_out[1]
    )
    assert "left out" not in valkyrie
    assert len(look(folder)[MONK]["skipped"]) == 2


def test_a_bad_thing_does_not_hide_the_others(folder, stores_path, capsys):
    """An xlogfile that leads nowhere, and a character whose game is missing."""
    for name in ("gone", "arc"):
        (folder / name).mkdir()
    (folder / "gone" / "nle.1.xlogfile").symlink_to("/nowhere")
    line = next((folder / "val-hum-neu-1-2").glob("*.xlogfile")).read_text()
    (folder / "arc" / "nle.1.xlogfile").write_text(line.replace("role=Val", "role=Arc"))
    assert inspect_data.main([str(folder), "--store_path", str(stores_path), "--json"]) == 2
    out, err = capsys.readouterr()
    assert [told["character"] for told in json.loads(out)] == [MONK, VALKYRIE]
    assert all("gone" in told["skipped"][-1] for told in json.loads(out))
    assert err.count("\n") == 1 and "no games of arc-hum-neu" in err and "arc/nle.1.xlogfile" in err


def test_ctrl_c_is_no_traceback(folder, stores_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pomdp, "open_or_build_store", stop)
    assert inspect_data.main([str(folder), "--store_path", str(stores_path)]) == 130
    assert capsys.readouterr() == ("stopped by a signal\n", "")


def test_mistakes_get_one_line(tmp_path, stores, capsys):
    store = shutil.copytree(stores[MONK].folder, tmp_path / MONK)
    (store / "index.npz").write_bytes(b"no index")
    (tmp_path / "empty").mkdir()
    for says, arguments in {
        "cannot be used": [store],
        "neither an xlogfile": [tmp_path / "empty"],
        "did you mean mon-hum-neu": [GAMES, "--character", "mon-hum-neo"],
        "no games of wiz-elf-cha in": [GAMES, "--character", "wiz-elf-cha"],
    }.items():
        assert (
            inspect_data.main([*map(str, arguments), "--store_path", str(tmp_path / "stores")]) == 2
        )
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
