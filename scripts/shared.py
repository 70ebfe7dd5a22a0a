"""What several scripts need: command lines, readers of a run's files, tables. No command of its own.

Importing it also lets a script find custom_nethack_pomdp.py, whatever folder it is started in.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import ENDS, UserError

Row = Dict[str, Any]
# Columns of <step>_<character>_games.csv that are kept, and their names in a study's rows.
COLUMNS = {
    "score": ("scores", float),
    "depth": ("depths", int),
    "max_depth": ("max_depths", int),
    "level": ("levels", int),
    "turns": ("turns", int),
    "length": ("lengths", int),
    "cause": ("causes", str),
}


class Parser(argparse.ArgumentParser):
    """Its help is the script's docstring; a mistake is one line, as everywhere."""

    def __init__(self, text: Optional[str]) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=text, formatter_class=layout)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def run(
        self,
        command: Callable[[argparse.Namespace], Any],
        argv: Optional[Sequence[str]] = None,
        **options: Any,
    ) -> int:
        """Calls it with the arguments -> exit status. options: of `run_command`."""
        return pomdp.run_command(lambda: command(self.parse_args(argv)), **options)


def read_rows(path: Path) -> List[Row]:
    """Objects of a .jsonl file; a last line that was cut short is left out with a warning.

    Raises OSError, and UserError where a line is no object.
    """
    text, _, cut = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    if cut:
        pomdp.warn(f"{path}: the last line is cut short and left out")
    try:
        return [dict(json.loads(line)) for line in text.splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} has a line that is not a JSON object") from None


def read_table(path: Path) -> List[Dict[str, str]]:
    """Lines of a .csv file with a header, each {column: text}. Raises OSError."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_games(path: Path) -> Row:
    """<step>_<character>_games.csv -> {name in COLUMNS: value of each game, in the games' order},
    of an older file those that it has, and {"ends": {way to end: games}}. Raises UserError."""
    found: Row = {"scores": [], "ends": dict.fromkeys(ENDS, 0)}
    try:
        games = read_table(path)
        for game in games:
            found["ends"][game["end"]] += 1
        for column, (name, kind) in COLUMNS.items():
            if games and (column == "score" or column in games[0]):
                found[name] = [kind(game[column]) for game in games]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: a line without score or end") from None
    return found


def markdown_table(lines: Sequence[Sequence[str]], align: str = "") -> str:
    """The header and lines of as many cells. align: l or r for each column; without it the first is
    text and the others are numbers."""
    align = align or "l".ljust(len(lines[0]), "r")
    rules = [{"l": ":---", "r": "---:"}[side] for side in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rules, *lines[1:]])
