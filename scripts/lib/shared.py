# SPDX-License-Identifier: MIT
"""What several scripts need: command lines, readers of a run's files, tables. No command itself.

Importing it also lets a script find custom_nethack_pomdp.py, whatever folder it is started in.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import ENDS, UserError

Row = Dict[str, Any]
DEFAULT_VARIANT = "default"  # of a row: the way of acting that is the arm's own
# Columns of <step>_<character>_games.csv that are kept. A study's rows have them in the plural.
COLUMNS = {
    "score": float,
    "depth": int,
    "max_depth": int,
    "level": int,
    "turns": int,
    "length": int,
    "cause": str,
}


# What a table that was changed by other hands may raise when it is read.
BAD_TABLE = (csv.Error, KeyError, TypeError, ValueError)


class Parser(pomdp.SettingsParser):
    """Its help is the script's docstring; a mistake is one line, as everywhere."""

    def __init__(self, text: Optional[str]) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=text, formatter_class=layout)

    def run(
        self,
        command: Callable[[argparse.Namespace], Any],
        argv: Optional[Sequence[str]] = None,
        **options: Any,
    ) -> int:
        """Calls it with the arguments -> exit status. options: of `run_command`."""
        return pomdp.run_command(lambda: command(self.parse_args(argv)), **options)


def check_least(args: argparse.Namespace, **least: float) -> None:
    """Raises UserError for a setting below what is given for it."""
    for name, number in least.items():
        if getattr(args, name) < number:
            raise UserError(f"--{name} must be at least {number}, not {getattr(args, name)}")


def is_row(line: Union[str, bytes]) -> bool:
    """Whether it is an object of JSON: a line that was cut short is none."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_rows(path: Path) -> List[Row]:
    """Objects of a .jsonl file; a last line that was cut short is left out with a warning.

    Raises OSError, and UserError where a line is no object.
    """
    text, _, last = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = text.splitlines()
    if is_row(last):  # without the newline at its end
        lines.append(last)
    elif last:
        pomdp.warn(f"{path}: the last line is cut short and left out")
    try:
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError):
        raise UserError(f"{path} has a line that is not a JSON object") from None


def read_table(path: Path) -> List[Dict[str, str]]:
    """Lines of a .csv file with a header, each {column: text}; also as spreadsheets save it, with a
    byte-order mark or semicolons. Raises OSError, and BAD_TABLE where it is none."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        return list(csv.DictReader(file, delimiter=";" if ";" in header else ","))


def newest_games(folder: Path) -> Dict[str, Path]:
    """{character: games.csv} of the folder's last evaluation, sorted."""
    evaluations: Dict[int, Dict[str, Path]] = {0: {}}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(\d+)_(.+)_games\.csv", path.name)
        if match:
            evaluations.setdefault(int(match[1]), {})[match[2]] = path
    return evaluations[max(evaluations)]


def read_games(paths: Mapping[str, Path]) -> Row:
    """{character: <step>_<character>_games.csv} -> {scores, depths, ...: {character: a value of
    each game, in their order}} and {"ends": {character: {way to end: games}}}. Older files lack
    some columns. Raises UserError."""
    found: Row = {"scores": {}, "ends": {}}
    for character, path in paths.items():
        ends = found["ends"][character] = dict.fromkeys(ENDS, 0)
        try:
            games = read_table(path)
            for game in games:
                ends[game["end"]] += 1
            for column, kind in COLUMNS.items():
                if column == "score" or (games and column in games[0]):
                    values = [kind(game[column]) for game in games]
                    found.setdefault(column.rstrip("s") + "s", {})[character] = values
        except BAD_TABLE:
            raise UserError(f"{path} is damaged: a line without score or end") from None
    return found


def markdown_table(lines: Sequence[Sequence[str]], align: str = "") -> str:
    """The header and lines of as many cells. align: l or r for each column; without it the first is
    text and the others are numbers."""
    align = align or "l".ljust(len(lines[0]), "r")
    rules = [{"l": ":---", "r": "---:"}[side] for side in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rules, *lines[1:]])
