"""The games that a run kept, as pages, with an index: what `watch.py --html FOLDER --run RUN_DIR`
writes, and what its `--wandb` adds to the run. No command of its own.

A run keeps recordings of games where its setting `eval_replays` says so. The index takes what the
evaluation's games.csv tells of them. Its look is in html_index.html.
"""

import csv
import fcntl
import html
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

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
    """games.csv -> {number: line}."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {line["game"]: line for line in csv.DictReader(file)}


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
    newest = max(game.step for game in games)
    games = [game for game in games if every_evaluation or game.step == newest]
    return sorted(games, key=lambda game: game.order)


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
    with_steps = len({game.step for game in games}) > 1
    names = ["character", "game", *COLUMNS.values()]
    if with_steps:
        names.insert(0, "step")
    lines = []
    for game in games:
        link = f'<a href="{html.escape(game.page)}">game {game.number}</a>'
        cells = [html.escape(game.character), link]
        cells += [html.escape(show(name, game.facts)) for name in COLUMNS]
        if with_steps:
            cells.insert(0, f"{game.step:,}")
        pairs = zip(names, cells)
        line = [f'<td data-name="{name}" class="{name.split()[-1]}">{x}</td>' for name, x in pairs]
        lines.append(f"<tr>{''.join(line)}</tr>")
    header = "".join(f'<th scope="col" class="{name.split()[-1]}">{name}</th>' for name in names)
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, content in (
        ("%TITLE%", html.escape(title)),
        ("%HEADER%", header),
        ("%ROWS%", "\n".join(lines)),
    ):
        page = page.replace(name, content)
    return page.encode()


# --- wandb
def wandb_id_of(folder: Path) -> Optional[str]:
    """The id under which wandb knows the run; of an evaluation's folder, which has no last.pt, by
    the newest folder that wandb left there."""
    if (folder / "last.pt").exists():
        progress: Any = pomdp.read_checkpoint(folder / "last.pt")["progress"]
        return progress["wandb_id"]
    left = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.name.split("run-")[1])
    return left[-1].name.rsplit("-", 1)[1] if left else None


def transitions_at(folder: Path) -> Dict[int, int]:
    """{step: transitions} of the run's rows."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["step"]: row["transitions"] for row in rows}


def log_pages(folder: Path, pages: Path, games: Sequence[KeptGame]) -> None:
    """Adds the games' pages to the run in wandb, a row for each evaluation."""
    folder = folder.resolve()  # its name and its parent's are the run's
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UserError(f"the run in {folder} is going on: add its pages when it is over") from None
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        known = vars(pomdp.TrainConfig())  # not what the script no longer has
        given = {name: value for name, value in settings.items() if name in known}
        at = transitions_at(folder)
        logger = pomdp.RunLogger(pomdp.TrainConfig(**given), folder, wandb_id_of(folder))
    except (OSError, ValueError, KeyError) as error:
        os.close(lock)
        raise UserError(f"{folder} is no folder of a run, or it is damaged: {error!r}") from None
    try:
        if logger.run is None:
            raise UserError("wandb is switched off by WANDB_MODE=disabled: --wandb adds nothing")
        import wandb

        for number, step in enumerate(sorted({game.step for game in games})):
            row: Dict[str, Any] = {"step": step, "transitions": at.get(step, 0)}
            for game in games:
                if game.step == step:
                    text = (pages / game.page).read_text(encoding="utf-8")
                    name = f"{game.character}/game{game.number}"
                    row[name] = wandb.Html(text, inject=False)
            logger.run.log(row, step=logger.wandb_step + number)
        print(f"wandb: {len(games)} pages in the run {logger.run.id}")
    finally:
        logger.close()
        os.close(lock)
