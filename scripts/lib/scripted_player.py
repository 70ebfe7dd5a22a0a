# SPDX-License-Identifier: MIT
"""A small scripted player of NetHack for record_games.py. No command of its own.

It sees what the agent sees of the game: tty_chars, tty_colors and tty_cursor. It answers what the
game asks, prays when nearly dead or starving, fights what is beside it (a Ranger shoots), eats,
rests, explores, searches for hidden ways, and goes down when it is strong enough or has waited long
enough.
"""

import re
import string
from collections import deque
from typing import Dict, List, Mapping, Optional, Set, Tuple

import numpy as np
from nle import nethack

Look = Tuple[str, int]  # character and colour
# the first of two
KEYS = {chr(key.value): action for action, key in reversed(list(enumerate(nethack.ACTIONS)))}
ESC = "\x1b"
RETURN = "\r"
KICK = "\x04"
PRAY = chr(nethack.Command.PRAY.value)

# The screen is one string of 24 * 80 cells; a step in a direction is an offset.
STEPS = {"k": -80, "l": 1, "j": 80, "h": -1, "u": -79, "n": 81, "b": 79, "y": -81}
STRAIGHT = (-80, 1, 80, -1)
BESIDE = np.array(list(STEPS.values()))
CELLS = 24 * 80
TOP = 80  # the map is from here
BOTTOM = 22 * 80  # to before here

# What a cell is, by character and colour.
WALL, FLOOR, DOOR, TRAP, BOULDER, MONSTER = range(6)
KIND = np.full((256, 32), WALL, np.uint8)
KIND[np.frombuffer(b'.<>_{$)[="(%!?/*\\+#', np.uint8)] = FLOOR
KIND[np.frombuffer(b"|-+", np.uint8), 3] = DOOR  # brown ones; others are walls and spellbooks
KIND[ord("#"), [2, 6]] = WALL  # trees, iron bars
KIND[ord("^")] = TRAP
KIND[ord("`")] = BOULDER
KIND[np.frombuffer(b"@&':;~" + string.ascii_letters.encode(), np.uint8)] = MONSTER

# Eyes, gas spores, jellies and molds hurt those who hit them and come after nobody. Not so lichens
# (bright green) and shriekers (magenta), whose noise draws worse.
PASSIVE = {(c, color) for c in "ejF" for color in range(32)} - {("F", 10), ("F", 5)}
EDIBLE = re.compile(  # corpses that do no harm when fresh
    "newt|jackal|(sewer|giant) rat|gecko|iguana|baby crocodile|gnome( lord)?|gnomish wizard|"
    "dwarf( lord)?|hobbit|goblin|(hill|Mordor|snow) orc|Uruk-hai|bugbear|(giant|fire) ant|"
    "rock piercer|cave spider|lichen|floating eye|rothe|coyote|fox|hyena|dingo|wolf|"
    "winter wolf cub|woodchuck|pony|horse|jaguar|lynx|panther"
)
STATUS = re.compile(r"(.*?) +[$*]:.*HP:(-?\d+)\((\d+)\).*(?:Xp|HD):(\d+).* T:(\d+)(.*)")
PETS = {"kitten": "f", "housecat": "f", "dog": "d"}


class ScriptedPlayer:
    """Plays one game. `rng`, a numpy.random.Generator, is its only source of chance."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.queue: List[str] = []  # keys to press next, whatever is on the screen
        self.heard = ""  # messages since the last decision
        self.level = "none yet"
        self.place = self.states = ""
        self.hungry = False
        self.hp = self.max_hp = self.xl = self.turn = self.idle = self.meals = 0
        self.prayed = -890  # turn; the first prayer is safe from about turn 100 on
        self.friends = {("d", 15), ("f", 15)}  # looks of pets: at first, dogs and cats in white
        self.peaceful: Dict[Look, int] = {}  # look -> turn in which the game asked "Really attack?"
        self.archer: Optional[bool] = None  # whether we have arrows for a bow
        # (cell, turn, kind) of what we killed last
        self.kill: Optional[Tuple[int, int, str]] = None
        self.bow = self.eating = False  # the bow is in hand; the kill is to be eaten now
        self.own_food = self.pickup = True
        self.goal: Optional[int] = None  # what the last key was meant for: a cell
        self.step_taken: Optional[Tuple[int, int, Look]] = None  # (from, offset, look of the cell)

    def act(self, obs: Mapping[str, np.ndarray]) -> int:
        """Index into nethack.ACTIONS of the next key. obs: tty_chars [24, 80], tty_colors [24, 80],
        tty_cursor [2]."""
        chars = obs["tty_chars"]
        colors = obs["tty_colors"] & 31
        self.text = chars.tobytes().decode("latin-1")
        self.colors = colors.tobytes()
        self.codes = chars.reshape(-1)
        self.kind = KIND[chars, colors].reshape(-1)
        row, column = map(int, obs["tty_cursor"])
        self.here = row * 80 + column
        status = STATUS.search(self.text, 23 * 80)
        if status:
            self.place = status.group(1)
            self.states = status.group(6)
            self.hungry = bool(re.search("Hungry|Weak|Faint", self.states))
            self.hp, self.max_hp, self.xl, turn = map(int, status.groups()[1:5])
            self.idle += 1
            if turn != self.turn:
                self.idle = 0
            self.turn = turn
        return KEYS.get(self.choose(row), KEYS[ESC])

    def choose(self, row: int) -> str:
        if self.idle > 60:  # whatever it is that keeps us, this gets out of it
            self.queue = []
            return (ESC, "s", ESC, self.rng.choice(list(STEPS)))[self.idle % 4]
        if "--More--" in self.text:
            before = self.text.split("--More--")[0]
            self.heard += " ".join(before.split()) + " "
            self.queue = []
            return RETURN
        if self.queue:
            return self.queue.pop(0)
        if row == 0:
            return self.answer(self.text[:80])
        self.heard += self.text[:80]
        self.learn()
        key = self.setup() or self.fight() or self.eat() or self.explore() or "s"
        self.heard = ""
        return key

    def answer(self, question: str) -> str:
        offered = re.search(r"\[[^\w]*(\w[^\]]*) or \?\*\]", question)
        letters = offered.group(1) if offered else ""
        if "Really attack" in question and self.goal is not None:
            self.peaceful[self.look(self.goal)] = self.turn
        elif "here; eat" in question:
            fresh = self.eating and self.kill and f"{self.kill[2]} corpse" in question
            doubtful = re.search("corpse|egg|tin|glob", question)
            if fresh or (self.hungry and not doubtful):
                return "y"
            return "n"
        elif "want to eat?" in question:
            if letters and not self.eating:
                return letters[0]
        elif re.search("want to (fire|throw)", question):
            arrows = re.search("[c-g]", letters)
            self.archer = bool(arrows)
            if arrows:
                return arrows.group()
        elif "sure you want to pray" in question:
            return "y"
        return ESC

    def learn(self) -> None:
        """Draws conclusions from the screen, from the messages and from whether the last step got
        anywhere."""
        if self.place != self.level:
            self.arrive()
        self.known[self.around()] = True
        self.stairs |= self.cells(">")
        food = self.cells("%")
        self.food |= food - self.tasted
        self.tasted |= food
        self.monsters = cells_where(self.kind == MONSTER) - {self.here}
        heard = self.heard
        cell = self.goal
        step = self.step_taken
        self.goal = self.step_taken = None
        self.no_kicks |= bool(re.search("Closed for inventory|Halt|vandal|[Ww]atch", heard))
        self.own_food &= "don't have anything to eat" not in heard
        if step and "swap places" in heard:
            self.friends.add(step[2])
        for beast in re.findall(r"The (?:little )?(kitten|housecat|dog) (?:bites|misses)", heard):
            self.friends.discard((PETS[beast], 15))
        kill = re.search(r"You kill (?:the |poor |invisible )*([A-Za-z -]+?)!", heard)
        if kill and cell is not None:
            self.kill = (cell, self.turn, kill.group(1))
            self.meals = 0
        elif step and cell is not None and self.here == step[0] and not kill:
            if "door is locked" in heard:
                self.locked.add(cell)
            elif re.search("Perhaps that's why|statue|in vain|diagonal", heard):
                self.failed[step[:2]] = 3
            # three times, or once if it took no time
            elif KIND[ord(step[2][0]), step[2][1]] != MONSTER:
                self.failed[step[:2]] = self.failed.get(step[:2], 0) + (3 if self.idle else 1)

    def arrive(self) -> None:
        """On a level that is new to us, or forgotten."""
        self.level = self.place
        self.arrival = self.turn
        self.no_kicks = False
        self.known = np.zeros(CELLS, bool)  # cells we stood beside
        self.searched = np.zeros(CELLS)  # searches there
        self.stairs: Set[int] = set()
        self.locked: Set[int] = set()
        self.food: Set[int] = set()
        self.tasted: Set[int] = set()
        # (cell, offset) -> how often that step got nowhere
        self.failed: Dict[Tuple[int, int], int] = {}

    def look(self, cell: int) -> Look:
        return self.text[cell], self.colors[cell]

    def around(self) -> np.ndarray:
        return np.append(self.here + BESIDE, self.here)

    def cells(self, character: str) -> Set[int]:
        return cells_where(self.codes == ord(character))

    def step(self, key: str) -> str:
        self.goal = self.here + STEPS[key]
        self.step_taken = self.here, STEPS[key], self.look(self.goal)
        return key

    def wait(self, turns: str = "20") -> str:
        self.queue = [*turns[1:], "s"]
        return turns[0]

    def setup(self) -> Optional[str]:
        if self.archer is None:
            self.archer = "Tenderfoot" in self.text[BOTTOM:]
        self.archer |= "arrows (in quiver" in self.heard
        if self.archer != self.bow:
            self.bow = self.archer
            return "x"  # swaps bow and dagger
        shop = re.search("Welcome (again )?to", self.heard)  # what is picked up there must be paid
        if (shop and self.pickup) or (self.turn == self.arrival and not self.pickup):
            self.pickup = not self.pickup
            return "@"
        return None

    def harmless(self, cell: int) -> bool:
        look = self.look(cell)
        return look in self.friends or self.turn - self.peaceful.get(look, -99) < 50

    def fight(self) -> Optional[str]:
        """Prays when it is due, else attacks the nearest enemy that can be reached: beside us, or
        by an arrow."""
        low = self.hp < 6 or self.hp * 7 < self.max_hp
        weak = re.search("Weak|Faint", self.states)
        since = self.turn - self.prayed
        if (low and since > 1000) or (weak and not low and since > 850):
            self.prayed = self.turn
            return PRAY
        for distance, key, look in sorted(self.enemies()):
            # shopkeepers and the watch: the game asks before a blow, not a shot
            if self.archer and look[0] != "@":
                self.queue = [key]
                self.goal = self.here + STEPS[key] * distance
                return "f"
            if distance == 1 and look not in PASSIVE:
                return self.step(key)
        return None

    def enemies(self) -> List[Tuple[int, str, Look]]:
        """(distance, key, look) of the first in each direction, as far as we reach."""
        found = []
        reach = 7 if self.archer else 1
        for key, offset in STEPS.items():
            for distance in range(1, reach + 1):
                cell = self.here + distance * offset
                if not TOP <= cell < BOTTOM or self.kind[cell] in (WALL, BOULDER):
                    break
                if self.kind[cell] == MONSTER:
                    if not self.harmless(cell) and self.failed.get((self.here, offset), 0) < 3:
                        found.append((distance, key, self.look(cell)))
                    break
        return found

    def eat(self) -> Optional[str]:
        self.eating = False
        if self.kill and "Satiated" not in self.states:
            cell, turn, kind = self.kill
            self.meals += cell == self.here
            if self.turn - turn < 30 and EDIBLE.fullmatch(kind) and self.meals < 4:
                self.eating = cell == self.here
                if self.eating:
                    return "e"
                key = self.text[cell] == "%" and self.walk({cell})
                if key:
                    return key
            self.kill = None
        if not self.hungry:
            return None
        if self.here in self.food or self.own_food:
            self.food.discard(self.here)
            return "e"
        return self.walk(self.food)

    def walk(self, goals: Set[int]) -> Optional[str]:
        """First key of a shortest way to one of the cells, if there is one. Keeps all cells passed
        as `reach`."""
        kind = self.kind.tobytes()
        todo = deque([self.here])
        self.reach: Dict[int, Optional[str]] = {self.here: None}
        while todo:
            cell = todo.popleft()
            first = self.reach[cell]
            if cell in goals and first is not None:
                door = self.here + STEPS[first]
                if door not in self.locked or self.text[door] != "+":
                    return self.step(first)
                if self.no_kicks:
                    self.failed[self.here, STEPS[first]] = 9
                    return "s"
                self.queue = [first]
                return KICK
            for key, offset in STEPS.items():
                to = cell + offset
                if to in self.reach or not TOP <= to < BOTTOM or kind[to] in (WALL, TRAP):
                    continue
                narrow = DOOR in (kind[to], kind[cell]) or kind[to] == BOULDER
                corner = narrow and offset not in STRAIGHT
                if corner or self.failed.get((cell, offset), 0) > 2:
                    continue
                free = kind[to] != MONSTER or self.look(to) in self.friends
                if free or self.threatens(to):
                    self.reach[to] = first or key
                    todo.append(to)
        return None

    def threatens(self, cell: int) -> bool:
        """Whether the monster in a cell may come after us."""
        return self.look(cell) not in PASSIVE and not self.harmless(cell)

    def explore(self) -> Optional[str]:
        """Rests when hurt, goes down when strong enough, else to where the map is blank, else
        searches."""
        hurt = self.hp < 0.6 * self.max_hp
        if hurt and not any(map(self.threatens, self.monsters)):
            return self.wait()
        depth = int("0" + re.sub(r"\D", "", self.place))
        strong = self.xl >= min(2 * depth, 8) or self.turn - self.arrival > 400
        ready = strong and not hurt
        if ready and self.here in self.stairs:
            return ">"
        key = (
            (self.pickup and self.walk(self.cells("$")))
            or (ready and self.walk(self.stairs))
            or self.walk(self.edge())
        )
        if key:
            return key
        if not ready and self.reach.keys() & self.stairs:
            return self.wait()
        return self.search()

    def edge(self) -> Set[int]:
        """Cells to walk on beside blank ones that we have not stood beside."""
        blank = (self.codes == 32) & ~self.known
        frontier = np.zeros(CELLS, bool)
        for offset in STEPS.values():
            frontier[82:-82] |= blank[82 + offset : CELLS - 82 + offset]
        return cells_where(frontier & ((self.kind == FLOOR) | (self.kind == DOOR)))

    def search(self) -> Optional[str]:
        """Nowhere left to go: searches for hidden doors and passages where there is room for
        something behind."""
        reach = list(self.reach)  # from near to far
        if self.turn // 400 % 2 and ("e", 4) in map(self.look, self.monsters):
            # A floating eye creeps after us: at the far end of where we can get to, there may be a
            # way round it.
            return self.walk({reach[-1]}) or self.wait()
        scores = -12 * self.searched[reach] - 0.1 * np.arange(len(reach))
        for i, cell in enumerate(reach):
            for offset in STRAIGHT:
                if self.kind[cell + offset] == WALL:
                    beyond = self.text[cell + 2 * offset : cell + 8 * offset : offset]
                    scores[i] += len(beyond) - len(beyond.lstrip())
            # a dead end
            scores[i] += 25 * (np.count_nonzero(self.kind[cell + BESIDE] != WALL) == 1)
        best = reach[int(scores.argmax())]
        if best != self.here:
            return self.walk({best})
        self.searched[self.around()] += 1
        self.failed.clear()
        return self.wait("9")


def cells_where(found: np.ndarray) -> Set[int]:
    """[24 * 80] booleans -> those of the map that are true."""
    return set((np.flatnonzero(found[TOP:BOTTOM]) + TOP).tolist())
