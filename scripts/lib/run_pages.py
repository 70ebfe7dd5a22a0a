# SPDX-License-Identifier: MIT
"""A run's kept games as pages with an index: what `watch.py --run` writes. No command of its own.

Its `--wandb` adds the pages to the run. A run keeps recordings of games where its setting
`eval_replays` says so. The index takes what the evaluation's games.csv tells of them. Its look is
in html_index.html.
"""

import contextlib
import fcntl
import html
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from shared import BAD_TABLE, read_rows, read_table

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import UserError

TEMPLATE = Path(__file__).with_name("html_index.html")
RECORDING = re.compile(r"(\d+)_(.+)_game(\d+)\.ttyrec3\.bz2")
COLUMNS = {"score": "score", "max_depth": "max depth", "level": "level", "turns": "turns"}
COLUMNS.update(end="end", cause="cause")
NOTHING = "–"


class KeptGame(NamedTuple):
    """A game whose recording lies in a run's folder."""

    path: Path
    step: int  # of the run, at the evaluation
    character: str
    number: int  # in the evaluation
    facts: Dict[str, str]  # its line of games.csv; empty where there is none

    @property
    def page(self) -> str:
        return self.path.name.replace(".ttyrec3.bz2", ".html")

    @property
    def order(self) -> Tuple[int, str, float, int]:
        """The newest evaluation first; of a character the best game first."""
        return -self.step, self.character, -float(self.facts.get("score", 0)), self.number


def read_facts(path: Path) -> Dict[str, Dict[str, str]]:
    """games.csv -> {number: line}; none, with a warning, where it cannot be read."""
    if not path.exists():
        return {}
    try:
        facts = {line["game"]: line for line in read_table(path)}
        for line in facts.values():
            float(line["score"])  # games are sorted by it
        return facts
    except BAD_TABLE as error:
        pomdp.warn(f"{path} cannot be read, so its games have no results: {error!r}")
        return {}


def kept_games(folder: Path, every_evaluation: bool) -> List[KeptGame]:
    """Of the newest evaluation that kept any, or of all. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: --run takes that of a run or an evaluation")
    games = []
    for path in folder.iterdir():
        found = RECORDING.fullmatch(path.name)
        if found:
            step, character, number = found.groups()
            facts = read_facts(folder / f"{step}_{character}_games.csv").get(number, {})
            games.append(KeptGame(path, int(step), character, int(number), facts))
    if not games:
        raise UserError(f"{folder} holds no recorded game: evaluate with --eval_replays 3, say")
    games.sort(key=lambda game: game.order)
    if every_evaluation:
        return games
    return [game for game in games if game.step == games[0].step]


def show(name: str, facts: Dict[str, str]) -> str:
    """A fact as the index has it."""
    value = facts.get(name) or NOTHING
    if name == "cause" and value == facts.get("end"):
        return NOTHING  # a game cut short
    if name == "score" and value != NOTHING:
        return f"{float(value):,.0f}"
    return f"{int(value):,}" if value.isdecimal() else value


def make_index(title: str, games: Sequence[KeptGame]) -> bytes:
    """-> the page that lists the games' pages, in their order."""
    with_steps = games[0].step != games[-1].step
    names = ["character", "game", *COLUMNS.values()]
    if with_steps:
        names.insert(0, "step")
    header = ""
    for name in names:
        header += f'<th scope="col" class="{name.split()[-1]}">{name}</th>'
    lines = []
    for game in games:
        link = f'<a href="{html.escape(game.page)}">game {game.number}</a>'
        cells = [html.escape(game.character), link]
        cells += [html.escape(show(name, game.facts)) for name in COLUMNS]
        if with_steps:
            cells.insert(0, f"{game.step:,}")
        line = ""
        for name, cell in zip(names, cells):
            line += f'<td data-name="{name}" class="{name.split()[-1]}">{cell}</td>'
        lines.append(f"<tr>{line}</tr>")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("%TITLE%", html.escape(title))
    page = page.replace("%HEADER%", header)
    return page.replace("%ROWS%", "\n".join(lines)).encode()


# --- wandb
def wandb_id_of(folder: Path) -> Optional[str]:
    """The id under which wandb knows the run; of an evaluation's folder, which has no last.pt, by
    the newest folder that wandb left there."""
    if (folder / "last.pt").exists():
        progress: Any = pomdp.read_checkpoint(folder / "last.pt")["progress"]
        return progress["wandb_id"]
    left = [path.name.split("run-")[1] for path in folder.glob("wandb/*run-*-*")]
    if not left:
        return None
    return max(left).rsplit("-", 1)[1]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises UserError while the run goes on."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"the run in {folder} is going on: add its pages when it is over") from None
    finally:
        os.close(lock)


def open_logger(folder: Path) -> pomdp.RunLogger:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        known = vars(pomdp.TrainConfig())  # not what the script no longer has
        given = {name: value for name, value in settings.items() if name in known}
        return pomdp.RunLogger(pomdp.TrainConfig(**given), folder, wandb_id_of(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no folder of a run, or it is damaged: {error!r}") from None


def log_pages(folder: Path, pages: Path, games: Sequence[KeptGame]) -> None:
    """Adds the games' pages to the run in wandb, a row for each evaluation."""
    folder = folder.resolve()  # its name and its parent's are the run's
    with locked(folder), contextlib.closing(open_logger(folder)) as logger:
        if logger.run is None:
            raise UserError("wandb is switched off by WANDB_MODE=disabled: --wandb adds nothing")
        import wandb

        ours = read_rows(folder / "metrics.jsonl")
        transitions = {row["step"]: row["transitions"] for row in ours}
        rows: Dict[int, Dict[str, Any]] = {}
        for game in sorted(games, key=lambda game: game.step):
            at = {"step": game.step, "transitions": transitions.get(game.step, 0)}
            text = (pages / game.page).read_text(encoding="utf-8")
            name = f"{game.character}/game{game.number}"
            rows.setdefault(game.step, at)[name] = wandb.Html(text, inject=False)
        for number, row in enumerate(rows.values()):
            logger.run.log(row, step=logger.wandb_step + number)
        print(f"wandb: {len(games)} pages in the run {logger.run.id}")
