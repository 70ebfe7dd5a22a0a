"""A small scripted player of NetHack, which sees what the agent sees of the game: tty_chars, tty_colors and tty_cursor.

It answers what the game asks, prays when nearly dead or starving, fights what is beside it (a Ranger shoots), eats,
rests, explores, searches for hidden ways, and goes down when it is strong enough or has waited long enough.
"""

import re
from collections import deque
from typing import Dict, List, Mapping, Optional, Set, Tuple

import numpy as np
from nle import nethack

Look = Tuple[str, int]  # character and colour
# the first of two
KEYS = {chr(key.value): action for action, key in reversed(list(enumerate(nethack.ACTIONS)))}
ESC, RETURN, KICK, PRAY = "\x1b", "\r", "\x04", chr(nethack.Command.PRAY.value)

# The screen is one string of 24 * 80 cells; a step in a direction is an offset. The map is between TOP and BOTTOM.
STEPS = {"k": -80, "l": 1, "j": 80, "h": -1, "u": -79, "n": 81, "b": 79, "y": -81}
STRAIGHT = (-80, 1, 80, -1)
CELLS, TOP, BOTTOM = 24 * 80, 80, 22 * 80

# What a cell is, by character and colour.
WALL, FLOOR, DOOR, TRAP, BOULDER, MONSTER = range(6)
KIND = np.full((256, 32), WALL, np.uint8)
KIND[[ord(c) for c in '.<>_{$)[="(%!?/*\\+#']] = FLOOR
KIND[[ord(c) for c in "|-+"], 3] = DOOR  # brown ones are doors, others walls and spellbooks
KIND[ord("#"), [2, 6]] = WALL  # trees, iron bars
KIND[ord("^")], KIND[ord("`")] = TRAP, BOULDER
KIND[[ord(c) for c in "@&':;~"] + [c for c in range(128) if chr(c).isalpha()]] = MONSTER

# Eyes, gas spores, jellies and molds hurt those who hit them and come after nobody. Not so lichens (bright green) and
# shriekers (magenta), whose noise draws worse.
PASSIVE = {(c, color) for c in "ejF" for color in range(32)} - {("F", 10), ("F", 5)}
EDIBLE = re.compile(  # corpses that do no harm when fresh
    "newt|jackal|(sewer|giant) rat|gecko|iguana|baby crocodile|gnome( lord)?|gnomish wizard|dwarf( lord)?|hobbit|"
    "goblin|(hill|Mordor|snow) orc|Uruk-hai|bugbear|(giant|fire) ant|rock piercer|cave spider|lichen|floating eye|"
    "rothe|coyote|fox|hyena|dingo|wolf|winter wolf cub|woodchuck|pony|horse|jaguar|lynx|panther"
)


class ScriptedPlayer:
    """Plays one game. `rng`, a numpy.random.Generator, is its only source of chance."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.queue: List[str] = []  # keys to press next, whatever is on the screen
        self.heard = ""  # messages since the last decision
        self.level, self.place, self.states, self.hungry = "none yet", "", "", False
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
        """Index into nethack.ACTIONS of the next key. obs: tty_chars [24, 80], tty_colors [24, 80], tty_cursor [2]."""
        chars, colors = obs["tty_chars"], obs["tty_colors"] & 31
        self.text, self.colors = chars.tobytes().decode("latin-1"), colors.tobytes()
        self.codes, self.kind = chars.reshape(-1), KIND[chars, colors].reshape(-1)
        row, column = map(int, obs["tty_cursor"])
        self.here = row * 80 + column
        status = re.search(
            r"(.*?) +[$*]:.*HP:(-?\d+)\((\d+)\).*(?:Xp|HD):(\d+).* T:(\d+)(.*)",
            self.text[23 * 80 :],
        )
        if status:
            self.place, self.states = status.group(1), status.group(6)
            self.hungry = bool(re.search("Hungry|Weak|Faint", self.states))
            self.hp, self.max_hp, self.xl, turn = map(int, status.groups()[1:5])
            self.idle, self.turn = (self.idle + 1 if turn == self.turn else 0), turn
        return KEYS.get(self.choose(row), KEYS[ESC])

    def choose(self, row: int) -> str:
        if self.idle > 60:  # whatever it is that keeps us, this gets out of it
            self.queue = []
            return (ESC, "s", ESC, self.rng.choice(list(STEPS)))[self.idle % 4]
        if "--More--" in self.text:
            self.heard, self.queue = (
                self.heard + " ".join(self.text.split("--More--")[0].split()) + " ",
                [],
            )
            return RETURN
        if self.queue:
            return self.queue.pop(0)
        if row == 0:
            return self.answer(self.text[:80])
        self.heard += self.text[:80]
        self.learn()
        rules = (self.setup, self.fight, self.eat, self.explore)
        key = next(filter(None, (rule() for rule in rules)), "s")  # of the first that has one
        self.heard = ""
        return key

    def answer(self, question: str) -> str:
        letters = re.search(r"\[[^\w]*(\w[^\]]*) or \?\*\]", question)
        if "Really attack" in question and self.goal is not None:
            self.peaceful[self.look(self.goal)] = self.turn
        elif "here; eat" in question:
            fresh = self.eating and self.kill and f"{self.kill[2]} corpse" in question
            return (
                "y"
                if fresh or (self.hungry and not re.search("corpse|egg|tin|glob", question))
                else "n"
            )
        elif "want to eat?" in question:
            return letters.group(1)[0] if letters and not self.eating else ESC
        elif re.search("want to (fire|throw)", question):
            arrows = re.search("[c-g]", letters.group(1) if letters else "")
            self.archer = bool(arrows)
            return arrows.group() if arrows else ESC
        return "y" if "sure you want to pray" in question else ESC

    def learn(self) -> None:
        """Draws conclusions from the screen, from the messages and from whether the last step got anywhere."""
        if self.place != self.level:
            self.level, self.arrival, self.no_kicks = self.place, self.turn, False
            # cells we stood beside; searches there
            self.known, self.searched = (np.zeros(CELLS, bool), np.zeros(CELLS))
            self.stairs, self.locked, self.food, self.tasted = (set[int]() for _ in range(4))
            # (cell, offset) -> how often that step got nowhere
            self.failed: Dict[Tuple[int, int], int] = {}
        self.known[self.around()] = True
        self.stairs |= self.cells(">")
        self.food, self.tasted = (
            self.food | (self.cells("%") - self.tasted),
            self.tasted | self.cells("%"),
        )
        self.monsters = set((np.flatnonzero(self.kind[TOP:BOTTOM] == MONSTER) + TOP).tolist()) - {
            self.here
        }
        heard, cell, step = self.heard, self.goal, self.step_taken
        self.goal = self.step_taken = None
        self.no_kicks |= bool(re.search("Closed for inventory|Halt|vandal|[Ww]atch", heard))
        self.own_food &= "don't have anything to eat" not in heard
        if step and "swap places" in heard:
            self.friends.add(step[2])
        for beast in re.findall(r"The (?:little )?(kitten|housecat|dog) (?:bites|misses)", heard):
            self.friends.discard(("d" if beast == "dog" else "f", 15))
        kill = re.search(r"You kill (?:the |poor |invisible )*([A-Za-z -]+?)!", heard)
        if kill and cell is not None:
            self.kill, self.meals = (cell, self.turn, kill.group(1)), 0
        elif step and cell is not None and self.here == step[0] and not kill:
            if "door is locked" in heard:
                self.locked.add(cell)
            elif re.search("Perhaps that's why|statue|in vain|diagonal", heard):
                self.failed[step[:2]] = 3
            # three times, or once if it took no time
            elif KIND[ord(step[2][0]), step[2][1]] != MONSTER:
                self.failed[step[:2]] = self.failed.get(step[:2], 0) + (3 if self.idle else 1)

    def look(self, cell: int) -> Look:
        return self.text[cell], self.colors[cell]

    def around(self) -> List[int]:
        return [self.here, *(self.here + offset for offset in STEPS.values())]

    def cells(self, character: str) -> Set[int]:
        return set((np.flatnonzero(self.codes[TOP:BOTTOM] == ord(character)) + TOP).tolist())

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
        return (
            self.look(cell) in self.friends
            or self.turn - self.peaceful.get(self.look(cell), -99) < 50
        )

    def fight(self) -> Optional[str]:
        """Prays when it is due, else attacks the nearest enemy that can be reached: beside us, or by an arrow."""
        low = self.hp < 6 or self.hp * 7 < self.max_hp
        if self.turn - self.prayed > (1000 if low else 850) and (
            low or re.search("Weak|Faint", self.states)
        ):
            self.prayed = self.turn
            return PRAY
        enemies = []  # the first in each direction
        for key, offset in STEPS.items():
            for distance in range(1, 8 if self.archer else 2):
                cell = self.here + distance * offset
                if not TOP <= cell < BOTTOM or self.kind[cell] in (WALL, BOULDER):
                    break
                if self.kind[cell] == MONSTER:
                    if not self.harmless(cell) and self.failed.get((self.here, offset), 0) < 3:
                        enemies.append((distance, key, self.look(cell)))
                    break
        for distance, key, look in sorted(enemies):
            # shopkeepers and the watch: the game asks before a blow, not a shot
            if self.archer and look[0] != "@":
                self.queue, self.goal = [key], self.here + STEPS[key] * distance
                return "f"
            if distance == 1 and look not in PASSIVE:
                return self.step(key)
        return None

    def eat(self) -> Optional[str]:
        self.eating = False
        if self.kill and "Satiated" not in self.states:
            cell, turn, kind = self.kill
            self.meals += cell == self.here
            if self.turn - turn < 30 and EDIBLE.fullmatch(kind) and self.meals < 4:
                self.eating = cell == self.here
                key = "e" if self.eating else self.walk({cell}) if self.text[cell] == "%" else None
                if key:
                    return key
            self.kill = None
        if self.hungry and (self.here in self.food or self.own_food):
            self.food.discard(self.here)
            return "e"
        return self.walk(self.food) if self.hungry else None

    def walk(self, goals: Set[int]) -> Optional[str]:
        """First key of a shortest way to one of the cells, if there is one. Keeps all cells passed as `reach`."""
        kind, todo = self.kind.tobytes(), deque([self.here])
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
                corner = offset not in STRAIGHT and (
                    DOOR in (kind[to], kind[cell]) or kind[to] == BOULDER
                )
                if corner or self.failed.get((cell, offset), 0) > 2:
                    continue
                free = kind[to] != MONSTER or self.look(to) in self.friends
                if free or (self.look(to) not in PASSIVE and not self.harmless(to)):
                    self.reach[to] = first or key
                    todo.append(to)
        return None

    def explore(self) -> Optional[str]:
        """Rests when hurt, goes down when strong enough, else to where the map is blank, else searches."""
        threats = any(
            not self.harmless(cell) and self.look(cell) not in PASSIVE for cell in self.monsters
        )
        if not threats and self.hp < 0.6 * self.max_hp:
            return self.wait()
        strong = (
            self.xl >= min(2 * int("0" + re.sub(r"\D", "", self.place)), 8)
            or self.turn - self.arrival > 400
        )
        ready = strong and self.hp >= 0.6 * self.max_hp
        if ready and self.here in self.stairs:
            return ">"
        blank = (self.codes == 32) & ~self.known
        frontier = np.zeros(CELLS, bool)  # cells beside blank ones that we have not stood beside
        for offset in STEPS.values():
            frontier[82:-82] |= blank[82 + offset : CELLS - 82 + offset]
        edge = set(
            np.flatnonzero(
                (frontier & ((self.kind == FLOOR) | (self.kind == DOOR)))[:BOTTOM]
            ).tolist()
        )
        key = (
            (self.pickup and self.walk(self.cells("$")))
            or (ready and self.walk(self.stairs))
            or self.walk(edge)
        )
        return key or (
            self.wait() if not ready and self.reach.keys() & self.stairs else self.search()
        )

    def search(self) -> Optional[str]:
        """Nowhere left to go: searches for hidden doors and passages where there is room for something behind."""
        reach = list(self.reach)  # from near to far
        if self.turn // 400 % 2 and any(self.look(cell) == ("e", 4) for cell in self.monsters):
            # A floating eye creeps after us: at the far end of where we can get to, there may be a way round it.
            return (reach[-1] != self.here and self.walk({reach[-1]})) or self.wait()
        scores = -12 * self.searched[reach] - 0.1 * np.arange(len(reach))
        for i, cell in enumerate(reach):
            for offset in STRAIGHT:
                if self.kind[cell + offset] == WALL:
                    beyond = self.text[cell + 2 * offset : cell + 8 * offset : offset]
                    scores[i] += len(beyond) - len(beyond.lstrip())
            # a dead end
            scores[i] += 25 * (
                sum(self.kind[cell + offset] != WALL for offset in STEPS.values()) == 1
            )
        best = reach[int(scores.argmax())]
        if best != self.here:
            return self.walk({best})
        self.searched[self.around()] += 1
        self.failed.clear()
        return self.wait("9")
