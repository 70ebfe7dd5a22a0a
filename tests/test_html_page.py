# SPDX-License-Identifier: MIT
"""The page of a game: a browser shows the game's own screens, marks stand where things happened."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import html_page
import watch

pytestmark = pytest.mark.usefixtures("one_thread")
MONK, AGENT = "mon-hum-neu", str(ROOT / "scripts" / "agents" / "small_512.pt")
NAMES = [watch.action_name(action) for action in range(pomdp.NUM_ACTIONS)]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
QUIET = ["--headless", *QUIET.split(), "--disable-component-update", "--virtual-time-budget=10000"]


def game_path(which):
    """The shortest recorded game (min) or the longest (max) of the Monk."""
    games, _ = pomdp.find_nld_games(ROOT / "tests" / "data" / "nle_data", MONK)
    return which(games, key=lambda game: game.size).path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Of the shortest game: the page that the command wrote, and the game's views."""
    page = tmp_path_factory.mktemp("page") / "a page.html"
    assert watch.main(["--game", game_path(min), "--html", str(page)]) == 0
    return page, list(watch.recorded_game(game_path(min), None, 10**6))


# --- games made by hand
def moment(message="", depth=1, turn=1, **more):
    """A view whose screen says so; depth None: a menu hides the status lines."""
    lines = [message, *[""] * 21, "Agent the Candidate  St:18 Dx:13 Co:11 In:8 Wi:13 Ch:9 Neutral"]
    lines.append(f"Dlvl:{depth} $:0 HP:7(14) Pw:4(4) AC:4 Xp:1/0 T:{turn}")
    if depth is None:
        lines[-2:] = ["(end)", ""]
    chars = np.frombuffer("".join(line.ljust(80) for line in lines).encode(), np.uint8)
    colors = np.full((24, 80), 7, np.int8)
    fields = dict(step=turn, turn=turn, score=2 * turn, action=0)
    view = watch.View(chars.reshape(24, 80), colors, np.array([1, 2], np.uint8), **fields)
    return view._replace(**more)


def make(views, title="a game", **more):
    page = html_page.Page()
    for view in views:
        page.see(view)
        page.add(view)
    return page.make(title, NAMES, **{"agent": True, "speed": 10.0, **more}).decode()


# --- the page read back
def read_page(text):
    """The page's game; its columns as arrays."""
    found = re.search(r'<script id="game" type="application/json">(.*?)</script>', text, re.DOTALL)
    game = json.loads(found.group(1))
    notes = zlib.decompress(base64.b64decode(game["columns"].pop("notes")[1])).decode()
    columns = {"notes": notes.split("\n")}
    for name, (kind, data) in game["columns"].items():
        columns[name] = np.frombuffer(
            zlib.decompress(base64.b64decode(data)), html_page.KINDS[name]
        )
        assert kind == html_page.ARRAYS[columns[name].dtype.str[1:]]
    return {**game, "columns": columns}


def screens_of(columns):
    """[n, 2, 24, 80]: characters and colours of all frames."""
    screen = np.zeros((2, 24 * 80), np.uint8)
    screens, change = [], 0
    for count in columns["changed"].tolist():
        part = slice(change, change + count)
        cells = np.cumsum(columns["gaps"][part])
        screen[0, cells] = columns["chars"][part]
        screen[1, cells] = columns["colors"][part]
        change += count
        screens.append(screen.copy())
    assert change == len(columns["gaps"])
    return np.array(screens).reshape(-1, 2, 24, 80)


def test_differences_add_up_to_the_frames(recorded):
    page, views = recorded
    columns = read_page(page.read_text())["columns"]
    screens = screens_of(columns)
    assert np.array_equal(screens[:, 0], np.array([view.chars for view in views]))
    assert np.array_equal(screens[:, 1], np.array([view.colors for view in views]))
    assert columns["changed"].mean() < 100, "of 1,920 cells: a browser must hold whole games"
    cells = [80 * int(view.cursor[0]) + int(view.cursor[1]) for view in views]
    assert columns["cursor"].tolist() == cells
    for name in ("step", "turn", "score"):
        assert columns[name].tolist() == [getattr(view, name) for view in views]
    assert [action for action in columns["action"] if action >= 0] == [
        view.action for view in views if view.action is not None
    ]
    assert columns["notes"] == [view.note for view in views]
    assert np.isnan(columns["value"]).all() and not columns["shares"].any(), "no agent was asked"


def test_the_agent_s_opinion_on_a_recorded_game(tmp_path, capsys):
    path, page, steps = game_path(min), tmp_path / "page.html", 60
    line = ["--game", path, "--checkpoint", AGENT, "--device", "cpu", "--max_steps", str(steps)]
    assert watch.main([*line, "--html", str(page)]) == 0
    size = f"{page}: {steps} frames, {page.stat().st_size:,} bytes\n"
    assert size in capsys.readouterr().out
    game = read_page(page.read_text())
    columns = game["columns"]
    assert game["title"] == "mon-hum-neu-1-4/nle.31931.0.ttyrec3.bz2 (agents/small_512.pt)"
    model = pomdp.load_agent(AGENT, device="cpu")[0].model
    actor = watch.Actor(model, torch.device("cpu"), 50)
    views = list(watch.recorded_game(path, actor, steps))
    wanted = np.array([view.probabilities for view in views])
    shares = columns["shares"].reshape(steps, 5)
    top = columns["top"].reshape(steps, 5).astype(int)
    np.testing.assert_allclose(shares / 1000, -np.sort(-wanted)[:, :5], atol=6e-4)
    np.testing.assert_allclose(shares / 1000, np.take_along_axis(wanted, top, 1), atol=6e-4)
    spread = torch.distributions.Categorical(probs=torch.tensor(wanted)).entropy().numpy()
    np.testing.assert_allclose(columns["entropy"], spread, atol=1e-3)
    np.testing.assert_allclose(columns["value"], [view.value for view in views], atol=1e-4)
    assert spread.max() > 0.1 and columns["notes"][-1].startswith("the agent's likeliest: ")


def test_every_so_many_frames_and_the_last(tmp_path, recorded, capsys):
    """What happened between two frames is marked at the second."""
    page, views = tmp_path / "page.html", recorded[1]
    line = ["--game", game_path(min), "--html", str(page), "--start", "5", "--every", "50"]
    assert watch.main(line) == 0
    game = read_page(page.read_text())
    steps = [*range(5, len(views), 50), len(views) - 1]
    assert game["columns"]["step"].tolist() == steps and game["frames"] == len(steps)
    assert f"{page}: {len(steps)} frames, " in capsys.readouterr().out
    all_marks = read_page(recorded[0].read_text())["marks"]
    assert len(all_marks) == len(game["marks"]) >= 2
    for (frame, *said), (before, *told) in zip(game["marks"], all_marks, strict=True):
        assert said == told and steps[frame - 1] < before <= steps[frame]


# --- what happened
def test_marks_of_a_recorded_game(tmp_path):
    page = html_page.Page()
    for view in watch.recorded_game(game_path(max), None, 10**6):
        page.see(view)
        page.add(view)
        said = view.chars[0].tobytes().decode()
        for kind, text in (("level", "Welcome to experience"), ("prayer", "You begin praying")):
            if page.marks and page.marks[-1][::2] == (len(page) - 1, kind):
                assert text in said
    levels = [f"Welcome to experience level {level}" for level in range(2, 7)]
    assert [text for *_, kind, text in page.marks if kind == "level"] == levels
    depths = [f"Dlvl {depth} for the first time" for depth in range(2, 6)]
    assert [text for *_, kind, text in page.marks if kind == "depth"] == depths
    last = [(kind, text) for *_, kind, text in page.marks[-2:]]
    assert last == [("prayer", "You begin praying"), ("end", "You die")]


def test_marks_stand_where_it_is_said_first():
    views = [
        moment("Welcome to experience level 2.", turn=1),
        moment("Welcome to experience level 2.", turn=1),  # still there
        moment("You climb.", depth=3, turn=2),
        moment(
            "You begin praying to Chih Sung-tzu.  You are surrounded by light.", depth=3, turn=3
        ),
        moment("Inventory", depth=None, turn=3),  # hides the status lines: no new level afterwards
        moment("", depth=2, turn=4),
        moment("", depth=3, turn=5),
        moment("You begin praying to Chih Sung-tzu.", depth=4, turn=6),
        moment("", depth=4, turn=7, action=None, note="the end: no progress"),
        moment("", depth=4, turn=7, action=None, note="the end: no progress"),
    ]
    game = read_page(make(views))
    assert game["marks"] == [
        [0, 1, "level", "Welcome to experience level 2"],
        [2, 2, "depth", "Dlvl 3 for the first time"],
        [3, 3, "prayer", "You begin praying"],
        [7, 6, "depth", "Dlvl 4 for the first time"],
        [7, 6, "prayer", "You begin praying"],
        [8, 7, "end", "the end: no progress"],
    ]
    assert game["columns"]["depth"].tolist() == [1, 1, 3, 3, 3, 2, 3, 4, 4, 4]
    assert set(game["columns"]["hp"]) == {7} and set(game["columns"]["hp_max"]) == {14}


# --- size, and that it needs nothing else
def test_five_thousand_frames_with_the_panel_take_a_megabyte_at_most():
    """With opinions that no compression makes smaller: each frame's drawn anew."""
    rng = np.random.default_rng(1)
    views = [
        view._replace(probabilities=rng.dirichlet(np.full(121, 0.1)), value=float(rng.normal()))
        for view in watch.recorded_game(game_path(max), None, 5000)
    ]
    assert len(views) == 5000 and len(make(views)) <= 1_000_000


def test_the_page_loads_nothing(recorded):
    text = recorded[0].read_text()
    assert re.findall(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest", text) == []
    template = html_page.TEMPLATE.read_text()
    assert set(re.findall(r'(?:src|href)="([^"]*)"', template)) <= {"data:,"} | set(
        re.findall(r'"(#i-[a-z-]+)"', template)
    )
    assert "default-src 'none'" in text, "the browser is told so as well"


# --- in a browser
def open_page(page, address, folder):
    """The page's elements after it has been opened at an address."""
    with_hash = page.as_uri() + address
    line = [BROWSER, *QUIET, f"--user-data-dir={folder}", "--dump-dom", with_hash]
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_of(dump, tag, name):
    inside = re.search(rf'<{tag} id="{name}"[^>]*>(.*?)</{tag}>', dump, re.DOTALL).group(1)
    return html.unescape(re.sub(r"<[^>]*>", "", inside))


@needs_browser
@pytest.mark.parametrize("address", ["", "#frame=300", "#frame=99999"])
def test_a_browser_shows_the_recording_s_screen(tmp_path, recorded, address):
    """The frame that the address names; the first without one, the last beyond the end."""
    page, views = recorded
    view = views[{"": 0, "#frame=300": 300}.get(address, -1)]
    dump = open_page(page, address, tmp_path)
    rows = [row.tobytes().decode("ascii") for row in view.chars]
    assert len(rows) == 24 and text_of(dump, "pre", "screen") == "\n".join(rows)
    key = "–" if view.action is None else watch.action_name(view.action)
    assert text_of(dump, "div", "key") == key and f"<dd>{view.turn:,}</dd>" in dump
    assert text_of(dump, "p", "note") == view.note
    assert dump.count('aria-label="One frame on"') == 1 and text_of(dump, "p", "said") == ""


@needs_browser
def test_a_browser_shows_colours_and_the_panel(tmp_path):
    """Also what is markup elsewhere, bytes that are no text, what could end the page's script."""
    chars, colors = moment().chars.copy(), np.tile(np.arange(80, dtype=np.int8) % 64, (24, 1))
    colors[0] = 7
    chars[0, :5], chars[1] = np.frombuffer(b"<i>&\x07", np.uint8), 200
    probabilities = np.zeros(121)
    probabilities[[5, 17, 3, 40, 60]] = 0.5, 0.25, 0.125, 0.1, 0.025
    fields = dict(chars=chars, colors=colors, action=17, probabilities=probabilities, value=-0.5)
    views = [*[moment(turn=turn) for turn in range(300)], moment(**fields, note="</script>&amp;")]
    page = tmp_path / "page.html"
    page.write_text(make(views, title="</script>&amp;<b>", agent=True))
    dump = open_page(page, "#frame=300", tmp_path / "profile")
    first, second, *_ = text_of(dump, "pre", "screen").split("\n")
    assert first == "<i>& " + 75 * " " and second == 80 * "?"
    row = dump.split('<pre id="screen"')[1].split("\n")[1]
    shown = re.findall(r'<i class="c(\d+)( inverse)?( cursor)?">\?</i>', row)
    assert [int(color) + 16 * bool(inverse) for color, inverse, _ in shown] == (
        colors[1] % 32
    ).tolist()
    assert [place for place, (*_, cursor) in enumerate(shown) if cursor] == [2]
    assert text_of(dump, "p", "note") == "</script>&amp;"
    assert "<h1>&lt;/script&gt;&amp;amp;&lt;b&gt;</h1>" in dump
    table = dump.split('<table id="likeliest">')[1].split("</table>")[0]
    likeliest = re.findall(r'<tr [^>]*class="(\w*)"[^>]*><th [^>]*>(.*?)</th><td>(.*?)</td>', table)
    shares = ["50.0 %", "25.0 %", "12.5 %", "10.0 %", "2.5 %"]
    names = [NAMES[action] for action in (5, 17, 3, 40, 60)]
    wanted = list(zip(["", "taken", "", "", ""], names, shares))
    assert [(taken, html.unescape(name), share) for taken, name, share in likeliest] == wanted
    assert "<dd>1.28 nats</dd>" in dump and "<dd>−0.500</dd>" in dump


EMBEDDED = """<!doctype html><pre id="told"></pre><iframe srcdoc="{page}"></iframe><script>
const told = document.querySelector("#told"), frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentWindow, event = new page.KeyboardEvent("keydown", {{key: "n"}});
  page.onerror = text => {{ told.textContent += text; }};
  setTimeout(() => page.dispatchEvent(event), 3000);
  setTimeout(() => {{
    told.textContent += page.document.querySelector("#place").textContent;
  }}, 6000);
}};
</script>"""


@needs_browser
def test_a_page_inside_another_goes_on_without_an_error(tmp_path, recorded):
    """In an iframe's srcdoc, as wandb shows it: such a page has no address to note a frame in."""
    outer = tmp_path / "outer.html"
    outer.write_text(EMBEDDED.format(page=html.escape(recorded[0].read_text())))
    dump = open_page(outer, "", tmp_path / "profile")
    assert text_of(dump, "pre", "told") == f"frame 1 of {len(recorded[1]) - 1}"


# --- mistakes
def test_mistakes_get_one_line(tmp_path, capsys):
    page = tmp_path / "page.html"
    for says, more in {
        "the game has 441, --start is 441": ["--html", str(page), "--start", "441"],
        "cannot write": ["--html", str(tmp_path / "none" / "page.html")],
        "takes a file in a folder": ["--html", str(tmp_path)],
    }.items():
        assert watch.main(["--game", game_path(min), *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
