# SPDX-License-Identifier: MIT
"""Pages of the games that a run kept: which, in what order, what the index says, and wandb's
rows."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import LIMIT_S
from shared import read_games
from test_html_page import AGENT, game_path, read_page

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import run_pages
import watch

pytestmark = pytest.mark.usefixtures("one_thread")
MONK, VALKYRIE = "mon-hum-neu", "val-hum-neu"
KILLED = "killed by Ms. Oz, the shopkeeper"
COLUMNS = ["character", "game", "score", "max depth", "level", "turns", "end", "cause"]


def keep(folder, step, character, results, kept):
    """An evaluation's files; the kept games' recordings are all the same short game."""
    results = [pomdp.GameResult(*result) for result in results]
    pomdp.save_games(folder / f"{step}_{character}", character, results, 50)
    for number in kept:
        shutil.copy(game_path(min), folder / f"{step}_{character}_game{number}.ttyrec3.bz2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run with two evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    folder.mkdir()
    keep(folder, 900, MONK, [(0, 5.0, 1, 9, 50, "step limit", 1, 1, "step limit")], [0])
    played = [
        (0, 12.0, 1, 1500, 50, "died", 2, 3, KILLED),
        (1, 9.0, 1, 100, 50, "no progress", 1, 1, "no progress"),
        (2, 1234.0, 3, 9876, 50, "died", 4, 8, "killed by a <newt>"),
    ]
    keep(folder, 1000, VALKYRIE, played, [0, 2])
    keep(folder, 1000, MONK, played, [1])
    return folder


def lines_of(index):
    """The index's table: its header, and each line's cells as text."""
    text = index.read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in cells]


def test_pages_of_the_newest_evaluation_and_their_index(folder, tmp_path, capsys):
    pages = tmp_path / "new" / "pages"
    assert watch.main(["--run", str(folder), "--html", str(pages)]) == 0
    assert lines_of(pages / "index.html") == [
        COLUMNS,
        [MONK, "game 1", "9", "1", "1", "100", "no progress", "–"],
        [VALKYRIE, "game 2", "1,234", "4", "8", "9,876", "died", "killed by a <newt>"],
        [VALKYRIE, "game 0", "12", "2", "3", "1,500", "died", KILLED],
    ]
    text = (pages / "index.html").read_text(encoding="utf-8")
    links = re.findall('href="(1.*?)"', text)
    assert sorted([*links, "index.html"]) == sorted(path.name for path in pages.iterdir())
    assert re.findall(r"https?:|url\(|@import|<script", text) == [] and "%" not in links
    assert set(re.findall('data-name="(.*?)"', text)) == set(COLUMNS), "named on a phone"
    game = read_page((pages / f"1000_{VALKYRIE}_game2.html").read_text())
    assert game["title"] == f"{VALKYRIE}, game 2 at step 1,000 of a run" and game["agent"]
    views = list(watch.recorded_game(game_path(min), None, 10**6))
    assert game["columns"]["step"].tolist() == [view.step for view in views]
    assert f"{pages}/index.html: 3 games\n" in capsys.readouterr().out


def test_a_table_that_a_spreadsheet_saved(folder, tmp_path, capsys):
    """With a byte-order mark and semicolons it says the same; a spoiled one is told, and the pages
    are there."""
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    monk, valkyrie = copy / f"1000_{MONK}_games.csv", copy / f"1000_{VALKYRIE}_games.csv"
    text = monk.read_text(encoding="utf-8")
    monk.write_text(text.replace(",", ";").replace("\n", "\r\n"), encoding="utf-8-sig")
    for spoiled in (
        valkyrie.read_text().replace("12.0", "12. Jan"),
        "a\0b\n1\n",
        "x;y\n1;2\n",
        "\xff",
    ):
        valkyrie.write_text(spoiled, encoding="latin-1")
        line = ["--run", str(copy), "--html", str(tmp_path / "pages"), "--max_steps", "5"]
        assert watch.main(line) == 0
        _, *lines = lines_of(tmp_path / "pages" / "index.html")
        assert lines[0] == [MONK, "game 1", "9", "1", "1", "100", "no progress", "–"]
        assert [line[:3] for line in lines[1:]] == [[VALKYRIE, f"game {k}", "–"] for k in (0, 2)]
        error = capsys.readouterr().err
        assert f"{valkyrie} cannot be read" in error and "Traceback" not in error
    assert read_games({MONK: monk})["scores"] == {MONK: [12.0, 9.0, 1234.0]}
    with pytest.raises(pomdp.UserError, match="is damaged"):
        read_games({VALKYRIE: valkyrie})


def test_all_evaluations_the_newest_first(folder, tmp_path):
    line = ["--run", str(folder), "--html", str(tmp_path), "--all", "--max_steps", "5"]
    assert watch.main(line) == 0
    header, *lines = lines_of(tmp_path / "index.html")
    assert header == ["step", *COLUMNS] and len(list(tmp_path.iterdir())) == 5
    assert [line[:2] for line in lines] == [
        ["1,000", MONK],
        ["1,000", VALKYRIE],
        ["1,000", VALKYRIE],
        ["900", MONK],
    ]


def test_the_agent_s_opinion_stands_in_the_pages_if_asked_for(folder, tmp_path):
    line = ["--run", str(folder), "--checkpoint", AGENT, "--device", "cpu", "--max_steps", "40"]
    assert watch.main([*line, "--html", str(tmp_path)]) == 0
    page = read_page((tmp_path / f"1000_{MONK}_game1.html").read_text())
    assert page["columns"]["shares"].any() and page["title"].endswith("(agents/small_512.pt)")


class Counter(torch.nn.Module):
    """Its state is the number of actions; unlike ours it does not see that a game has begun."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def vec_act(self, obs, state=None, device="cpu"):
        self.seen.append((state, int(obs["prev_actions"][0]) == pomdp.NO_ACTION))
        return [3], (state or 0) + 1


def test_no_game_before_enters_the_agent_s_opinion(folder, tmp_path, monkeypatch):
    agent = types.SimpleNamespace(model=Counter())
    loaded = (agent, pomdp.TrainConfig(device="cpu"), 0)
    monkeypatch.setattr(pomdp, "load_agent", lambda *_, **__: loaded)
    line = ["--run", str(folder), "--checkpoint", "x.pt", "--max_steps", "3"]
    assert watch.main([*line, "--html", str(tmp_path)]) == 0
    assert agent.model.seen == [(None, True), (1, False), (2, False)] * 3


def test_a_game_that_cannot_be_read_is_named_and_left_out(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run")
    broken = tmp_path / "run" / f"1000_{MONK}_game1.ttyrec3.bz2"
    broken.write_bytes(b"BZh9 broken")
    pages = tmp_path / "pages"
    assert watch.main(["--run", str(tmp_path / "run"), "--html", str(pages)]) == 0
    assert [line[:2] for line in lines_of(pages / "index.html")[1:]] == [
        [VALKYRIE, "game 2"],
        [VALKYRIE, "game 0"],
    ]
    error = capsys.readouterr().err
    assert error.startswith(f"warning: left out: {broken} ") and error.count("\n") == 1


def test_mistakes_get_one_line(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    pages = ["--html", str(tmp_path / "pages"), "--max_steps", "5"]
    for says, line in {
        "needs --html FOLDER": ["--run", str(folder)],
        "takes no --game": ["--run", str(folder), "--game", game_path(min), *pages],
        "go with --run": ["--game", game_path(min), "--wandb", *pages],
        "there is no folder": ["--run", str(folder / "none"), *pages],
        "holds no recorded game": ["--run", str(tmp_path), *pages],
        "cannot write": ["--run", str(folder), "--html", str(tmp_path / "file")],
        "is no folder of a run": ["--run", str(folder), "--wandb", *pages],  # no config.json
    }.items():
        assert watch.main(line) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = shutil.copytree(folder, tmp_path / "run")
    for name in ("config.json", "metrics.jsonl"):
        content = '{"config": {}}' if name == "config.json" else ""
        (folder / name).write_text(content)
    assert watch.main(["--run", str(folder), "--wandb", *pages]) == 2
    assert "switched off" in capsys.readouterr().err
    descriptor = pomdp.open_folder(folder, resume=True)[1]  # as a run that goes on holds it
    assert watch.main(["--run", str(folder), "--wandb", *pages]) == 2
    assert "add its pages when it is over" in capsys.readouterr().err
    os.close(descriptor)


# --- wandb, offline
def test_an_evaluation_s_id_is_that_of_the_newest_folder_of_wandb(tmp_path):
    assert run_pages.wandb_id_of(tmp_path) is None
    for name in ("offline-run-20260102_000000-older", "run-20260103_000000-newer"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to("offline-run-20260102_000000-older")
    assert run_pages.wandb_id_of(tmp_path) == "newer"


PROGRAM = """
import sys
import custom_nethack_pomdp as pomdp
import watch

assert pomdp.main(sys.argv[1:]) == 0
(folder,) = pomdp.Path("runs").glob("*/*")
sys.exit(watch.main(["--run", str(folder), "--html", "pages", "--wandb", "--all"]))
"""


@pytest.mark.pinned_stack  # older ones have no reader of offline runs
def test_wandb_gets_the_pages_of_the_games_that_a_run_kept(tmp_path, stores, stores_path):
    """A real run, offline, read back: its pages are under its own id, at the evaluation's place."""
    settings = dict(
        data_path=ROOT / "tests" / "data" / "nle_data", store_path=stores_path, character=MONK
    )
    settings.update(benchmark_sizes=False, rnn_hidden_dim=16, batch_size=4, seq_len=8)
    settings.update(update_steps=2, eval_every=1, log_every=1, eval_heldout_frames=0)
    settings.update(eval_episodes=3, eval_processes=3, eval_max_steps=60, eval_replays=2)
    line = [sys.executable, "-c", PROGRAM, *(f"--{name}={x}" for name, x in settings.items())]
    known = os.environ.items()
    environment = {name: value for name, value in known if not name.startswith("WANDB")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    environment.update(HOME=str(tmp_path), PYTHONPATH=path, WANDB_MODE="offline")
    options = dict(env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    done = subprocess.run(line, **options)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    first, second = sorted(folder.glob("wandb/offline-run-*"), key=lambda path: path.name)
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(second)]
    read = subprocess.run(inspect, **options)
    records = [json.loads(text) for text in read.stdout.splitlines()]
    run = next(record["run"] for record in records if record["type"] == "run")
    wandb_id = pomdp.read_checkpoint(folder / "last.pt")["progress"]["wandb_id"]
    assert run["run_id"] == wandb_id == first.name.rsplit("-", 1)[1]
    named = (run["project"], run["run_group"], run["display_name"])
    assert named == ("NetHack", folder.parent.name, folder.name)
    logged = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["_step"] for row in logged] == [len(rows), len(rows) + 1], "after the run's rows"
    assert [(row["step"], row["transitions"]) for row in logged] == [(1, 32), (2, 64)]
    for row in logged:
        games = list(folder.glob(f"{row['step']}_{MONK}_game*.ttyrec3.bz2"))
        assert len(games) == 2
        for game in games:
            number = game.name[: -len(".ttyrec3.bz2")].rpartition("game")[2]
            assert row[f"{MONK}/game{number}._type"] == "html-file"
            kept = second / "files" / row[f"{MONK}/game{number}.path"]
            page = tmp_path / "pages" / f"{row['step']}_{MONK}_game{number}.html"
            assert kept.read_bytes() == page.read_bytes()
    assert (folder / "metrics.jsonl").read_text().splitlines() == rows, "left as it was"
