# SPDX-License-Identifier: MIT
"""A game as one page for a browser: what `watch.py --html` writes. No command of its own.

Look and code of the page are in html_page.html. All that a game needs is in the page, as columns:
arrays of numbers, each deflated and in base64. A browser inflates them by its own
DecompressionStream, and asks no network for anything. A screen is kept as the cells in which it
differs from the screen before it; the first differs from an empty one.
"""

import base64
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from shared import pomdp

TEMPLATE = Path(__file__).with_suffix(".html")
TOP = 5  # likeliest actions shown
CELLS = pomdp.ROWS * pomdp.COLS
KINDS = {
    "changed": np.uint16,  # [n]: how many cells differ from the screen before
    "gaps": np.uint16,  # [changes]: from one changed cell to the next, the first from cell 0
    "chars": np.uint8,  # [changes]: what the cell shows now, as ASCII
    "colors": np.uint8,  # [changes]: 0 to 15, and 16 more for inverse video
    "cursor": np.uint16,  # [n]: its cell
    "step": np.int32,  # [n] actions before this moment
    "turn": np.int32,  # [n]
    "score": np.int32,  # [n]: -1 where the recording does not tell
    "hp": np.int16,  # [n]
    "hp_max": np.int16,  # [n]: 0 where no status line has been seen yet
    "depth": np.int8,  # [n]
    "action": np.int16,  # [n] index into nethack.ACTIONS, -1 where nothing is pressed
    "top": np.uint8,  # [n, 5] likeliest actions
    "shares": np.uint16,  # [n, 5] their probabilities in thousandths; 0: no agent was asked
    "entropy": np.float32,  # [n] of the policy, in nats; NaN where no agent was asked
    "value": np.float32,  # [n] in rewards of training
}
ARRAYS = {"u1": "Uint8Array", "u2": "Uint16Array", "i1": "Int8Array", "i2": "Int16Array"}
ARRAYS.update({"i4": "Int32Array", "f4": "Float32Array"})

# What the game says, by kind of mark. New deepest levels are read from the status line instead.
SAYINGS = {
    "level": re.compile(rb"Welcome to experience level \d+"),
    "prayer": re.compile(rb"You begin praying"),
    "end": re.compile(rb"You (?:die|drown|suffocate|turn to stone|burn to a crisp|dissolve)\b"),
}


class View(NamedTuple):
    """One moment of a game, with all that is shown beside it."""

    chars: np.ndarray  # [24, 80] uint8
    colors: np.ndarray  # [24, 80] int8
    cursor: np.ndarray  # [2]
    step: int  # actions before this moment
    turn: int
    score: Optional[int]  # None where a recording does not tell
    action: Optional[int] = None  # pressed here
    probabilities: Optional[np.ndarray] = None  # [A]
    value: Optional[float] = None
    note: str = ""

    @property
    def score_text(self) -> str:
        if self.score is None:
            return "unknown"
        return f"{self.score:,}"


def plain_text(chars: np.ndarray) -> np.ndarray:
    """The terminal's bytes, uint8 -> as ASCII: below 32 shown as blanks, above 126 as '?'."""
    return np.where(chars < 127, np.maximum(chars, 32), ord("?")).astype(np.uint8)


def entropy(probabilities: np.ndarray) -> float:
    """[A] -> in nats."""
    positive = probabilities[probabilities > 0].astype(np.float64)
    return float(-(positive * np.log(positive)).sum())


class Page:
    """Takes a game's views one after another and makes a page of them."""

    def __init__(self) -> None:
        self.columns: Dict[str, List[Any]] = {name: [] for name in KINDS}
        self.notes: List[str] = []
        self.marks: List[Tuple[int, int, str, str]] = []  # frame, turn, kind, what the game said
        self.screen: Any = np.zeros((2, CELLS), dtype=np.uint8)
        self.said = dict.fromkeys(SAYINGS, b"")
        self.stats = np.zeros(pomdp.NUM_BLSTATS, dtype=np.int32)
        self.deepest: Optional[int] = None
        self.over = False

    def __len__(self) -> int:
        return len(self.notes)

    def see(self, view: View) -> None:
        """Looks for what a timeline should mark. Takes every view, also those that the page leaves
        out: a mark stands at the next one that it shows."""
        screen = plain_text(view.chars)
        stats = pomdp.read_blstats(screen[None])[0]
        if stats[11]:  # otherwise a menu hides them: as before
            self.stats = stats
            depth = int(stats[12])
            if self.deepest is not None and depth > self.deepest:
                self._mark(view, "depth", f"Dlvl {depth} for the first time")
            self.deepest = depth if self.deepest is None else max(depth, self.deepest)
        text = screen.tobytes()
        for kind, saying in SAYINGS.items():
            found = saying.search(text)
            said = found.group() if found else b""
            if said and said != self.said[kind]:
                self._mark(view, kind, said.decode())
            self.said[kind] = said
        over = view.action is None and view.note != ""
        if over and not self.over and not self.said["end"]:
            self._mark(view, "end", view.note)
        self.over = over

    def _mark(self, view: View, kind: str, text: str) -> None:
        self.marks.append((len(self), view.turn, kind, text))

    def add(self, view: View) -> None:
        """One frame of the page. It has been seen."""
        chars = plain_text(view.chars).ravel()
        screen = np.stack([chars, view.colors.ravel().astype(np.uint8)])
        cells = np.flatnonzero((screen != self.screen).any(axis=0))
        self.screen = screen
        top: Any = np.zeros(TOP)
        shares: Any = np.zeros(TOP)
        spread = value = np.nan
        if view.probabilities is not None:
            top = np.argsort(-view.probabilities, kind="stable")[:TOP]
            shares = view.probabilities[top]
            spread = entropy(view.probabilities)
        if view.value is not None:
            value = view.value
        action = -1
        if view.action is not None:
            action = view.action
        score = -1
        if view.score is not None:
            score = view.score
        row, column = view.cursor.tolist()
        frame = {
            "changed": len(cells),
            "gaps": np.diff(cells, prepend=0),
            "chars": screen[0, cells],
            "colors": screen[1, cells],
            "cursor": row * pomdp.COLS + column,
            "step": view.step,
            "turn": view.turn,
            "score": score,
            "hp": self.stats[10],
            "hp_max": self.stats[11],
            "depth": self.stats[12],
            "action": action,
            "top": top,
            "shares": np.rint(1000 * shares),
            "entropy": spread,
            "value": value,
        }
        for name, content in frame.items():
            self.columns[name].append(np.atleast_1d(content).astype(KINDS[name]))
        self.notes.append(view.note)

    def make(self, title: str, names: List[str], agent: bool, speed: float) -> bytes:
        """-> the page. `names` are those of the actions by their index. `agent` says whose key is
        pressed: the agent's, or the recorded player's. `speed` is in frames a second."""
        columns = {"notes": ["Uint8Array", pack("\n".join(self.notes).encode())]}
        for name, pieces in self.columns.items():
            array = np.concatenate(pieces)
            columns[name] = [ARRAYS[array.dtype.str[1:]], pack(array.tobytes())]
        game = dict(title=title, frames=len(self), names=names, agent=agent, speed=speed)
        game.update(marks=self.marks, columns=columns)
        data = json.dumps(game).replace("<", "\\u003c")  # or a text could end the page's script
        page = TEMPLATE.read_text(encoding="utf-8")
        return page.replace("%TITLE%", html.escape(title)).replace("%GAME%", data).encode()


def pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()
