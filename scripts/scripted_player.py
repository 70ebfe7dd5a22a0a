"""A small scripted player of NetHack, which sees what the agent sees of the game: tty_chars, tty_colors and tty_cursor.

It answers what the game asks, prays when nearly dead or starving, fights what is beside it (a Ranger shoots), eats, rests,
explores, searches for hidden ways, and goes down when it is strong enough or has waited long enough.
"""

import re
from collections import deque
from typing import Dict, List, Mapping, Optional, Set, Tuple

import numpy as np
from nle import nethack

KEYS: Dict[str, int] = {}  # key -> action; the first of two for the few keys that have two
for _index, _action in enumerate(nethack.ACTIONS):
    KEYS.setdefault(chr(_action.value), _index)
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
# shriekers (magenta), whose noise draws worse. The deadly are not to be touched even when they stand in the only way.
PASSIVE = {(c, color) for c in "ejF" for color in range(32)} - {("F", 10), ("F", 5)}
EYE = ("e", 4)
DEADLY = {EYE, ("e", 7), ("j", 4), ("F", 3)}
# Corpses that do no harm when fresh.
EDIBLE = re.compile("newt|jackal|(sewer|giant) rat|gecko|iguana|baby crocodile|gnome( lord)?|gnomish wizard|dwarf( lord)?|hobbit|goblin|"
                    "(hill|Mordor|snow) orc|Uruk-hai|bugbear|(giant|fire) ant|rock piercer|cave spider|lichen|floating eye|rothe|coyote|"
                    "fox|hyena|dingo|wolf|winter wolf cub|woodchuck|pony|horse|jaguar|lynx|panther")  # fmt: skip

class ScriptedPlayer:
    """Plays one game. `rng`, a numpy.random.Generator, is its only source of chance."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.queue: List[str] = []  # keys to press next, whatever is on the screen
        self.heard = ""  # messages since the last decision
        self.level, self.place, self.states, self.hungry = "none yet", "", "", False
        self.hp = self.max_hp = self.xl = self.turn = self.idle = 0
        self.prayed = -890  # turn; the first prayer is safe from about turn 100 on
        self.friends = {("d", 15), ("f", 15)}  # looks of pets: at first, dogs and cats in white
        self.peaceful: Dict[Tuple[str, int], int] = {}  # look -> turn in which the game asked "Really attack?"
        self.archer: Optional[bool] = None  # whether we have arrows for a bow
        self.kill: Optional[Tuple[int, int, str]] = None  # (cell, turn, kind) of what we killed last
        self.bow, self.eating, self.meals = False, False, 0  # the bow is in hand; the kill is to be eaten now; how often we began
        self.own_food = self.pickup = True
        self.goal: Optional[int] = None  # what the last key was meant for: a cell
        self.step_taken: Optional[Tuple[int, int, Tuple[str, int]]] = None  # (from, offset, look of the cell)

    def act(self, obs: Mapping[str, np.ndarray]) -> int:
        """Index into nethack.ACTIONS of the next key. obs: tty_chars uint8 [24, 80], tty_colors int8 [24, 80], tty_cursor [2]."""
        chars, colors = obs["tty_chars"], obs["tty_colors"] & 31
        self.text, self.colors = chars.tobytes().decode("latin-1"), colors.tobytes()
        self.kind = KIND[chars, colors].reshape(-1)
        row, column = (int(x) for x in obs["tty_cursor"])
        self.here = row * 80 + column
        status = re.search(r"(.*?) +[$*]:.*HP:(-?\d+)\((\d+)\).*(?:Xp|HD):(\d+).* T:(\d+)(.*)", self.text[23 * 80 :])
        if status:
            self.place, self.states = status.group(1), status.group(6)
            self.hungry = bool(re.search("Hungry|Weak|Faint", self.states))
            self.hp, self.max_hp, self.xl, turn = (int(status.group(i)) for i in (2, 3, 4, 5))
            self.idle, self.turn = (self.idle + 1 if turn == self.turn else 0), turn
        return KEYS.get(self.choose(row), KEYS[ESC])

    def choose(self, row: int) -> str:
        if self.idle > 60:  # whatever it is that keeps us, this gets out of it
            self.queue = []
            return (ESC, "s", ESC, self.rng.choice(list(STEPS)))[self.idle % 4]
        if "--More--" in self.text:
            self.heard, self.queue = self.heard + " ".join(self.text.split("--More--")[0].split()) + " ", []
            return RETURN
        if self.queue:
            return self.queue.pop(0)
        if row == 0:
            return self.answer(self.text[:80])
        if re.search(r"\((end|\d+ of \d+)\)", self.text):
            return ESC
        self.heard += self.text[:80]
        return self.decide()

    def answer(self, question: str) -> str:
        letters = re.search(r"\[[^\w]*(\w[^\]]*) or \?\*\]", question)
        if "Really attack" in question and self.goal is not None:
            self.peaceful[self.look(self.goal)] = self.turn
        elif "here; eat" in question:
            fresh = self.eating and self.kill and f"{self.kill[2]} corpse" in question
            snack = self.hungry and not re.search("corpse|egg|tin|glob", question)
            return "y" if fresh or snack else "n"
        elif "want to eat?" in question:
            return letters.group(1)[0] if letters and not self.eating else ESC
        elif re.search("want to (fire|throw)", question):
            arrows = re.search("[c-g]", letters.group(1) if letters else "")
            self.archer = bool(arrows)
            return arrows.group() if arrows else ESC
        return "y" if "sure you want to pray" in question else ESC

    def look(self, cell: int) -> Tuple[str, int]:
        return self.text[cell], self.colors[cell]

    def decide(self) -> str:
        if self.place != self.level:
            self.level, self.arrival, self.kicks, self.no_kicks = self.place, self.turn, 0, False
            self.known, self.searched = np.zeros(CELLS, bool), np.zeros(CELLS)  # cells we stood beside; searches made there
            self.stairs, self.locked, self.statues, self.food, self.tasted = (set[int]() for _ in range(5))
            self.failed: Dict[Tuple[int, int], int] = {}  # (cell, offset) -> how often that step got nowhere
        self.learn()
        rules = (self.setup, self.survive, self.fight, self.eat, self.rest, self.explore)
        key = next(filter(None, (rule() for rule in rules)), "s")  # of the first that has one
        self.heard = ""
        return key

    def learn(self) -> None:
        """Draws conclusions from the screen, from the messages and from whether the last step got anywhere."""
        self.known[[self.here, *(self.here + offset for offset in STEPS.values())]] = True
        self.stairs |= self.cells(">")
        self.food |= self.cells("%") - self.tasted
        self.tasted |= self.food
        heard, cell, step = self.heard, self.goal, self.step_taken
        self.goal = self.step_taken = None
        self.no_kicks |= bool(re.search("Closed for inventory|Halt|vandal|[Ww]atch", heard))
        self.own_food &= "don't have anything to eat" not in heard
        if step and "swap places" in heard:
            self.friends.add(step[2])
        for beast in re.findall(r"The (kitten|housecat|little dog|dog) (?:bites|misses)", heard):
            self.friends.discard(("f" if beast in ("kitten", "housecat") else "d", 15))
        kill = re.search(r"You kill (?:the |poor |invisible )*([A-Za-z -]+?)!", heard)
        if kill and cell is not None:
            self.kill, self.meals = (cell, self.turn, kill.group(1)), 0
        elif step and cell is not None and self.here == step[0] and not kill:
            if "door is locked" in heard:
                self.locked.add(cell)
            elif re.search("Perhaps that's why|statue|in vain|diagonal", heard):
                self.failed[step[:2]] = 3
                self.statues |= set() if "diagonal" in heard else {cell}
            elif KIND[ord(step[2][0]), step[2][1]] != MONSTER:  # to try three times is enough, or once if it took no time
                self.failed[step[:2]] = self.failed.get(step[:2], 0) + (3 if self.idle else 1)

    def cells(self, character: str) -> Set[int]:
        return {found.start() for found in re.finditer(re.escape(character), self.text[:BOTTOM]) if found.start() >= TOP}

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
        return self.step(self.rng.choice(list(STEPS))) if self.text[self.here - 81 : self.here - 78] == "/-\\" else None  # swallowed

    def step(self, key: str) -> str:
        self.goal = self.here + STEPS[key]
        self.step_taken = self.here, STEPS[key], self.look(self.goal)
        return key

    def wait(self, turns: str = "20") -> str:
        self.queue = [*turns[1:], "s"]
        return turns[0]

    def monsters(self) -> List[int]:
        return [cell for cell in np.flatnonzero(self.kind[:BOTTOM] == MONSTER).tolist() if cell >= TOP and cell != self.here]

    def harmless(self, cell: int) -> bool:
        look = self.look(cell)
        return look in self.friends or cell in self.statues or self.turn - self.peaceful.get(look, -99) < 50

    def enemies(self, reach: int) -> List[Tuple[int, str, Tuple[str, int]]]:
        """(distance, key, look) of the first enemy in each direction, up to `reach` cells away, nearest first."""
        found = []
        for key, offset in STEPS.items():
            for distance in range(1, reach + 1):
                cell = self.here + distance * offset
                if not TOP <= cell < BOTTOM or self.kind[cell] in (WALL, BOULDER):
                    break
                if self.kind[cell] == MONSTER:
                    if not self.harmless(cell) and self.failed.get((self.here, offset), 0) < 3:
                        found.append((distance, key, self.look(cell)))
                    break
        return sorted(found)

    def survive(self) -> Optional[str]:
        low = self.hp < 6 or self.hp * 7 < self.max_hp
        due = self.turn - self.prayed > (1000 if low else 850) and (low or re.search("Weak|Faint", self.states))
        self.prayed = self.turn if due else self.prayed
        return PRAY if due else None

    def fight(self) -> Optional[str]:
        for distance, key, look in self.enemies(7 if self.archer else 1):
            if self.archer and look[0] != "@":  # shopkeepers and the watch are @: the game asks before a blow, not before a shot
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

    def rest(self) -> Optional[str]:
        threats = any(not self.harmless(cell) and self.look(cell) not in PASSIVE for cell in self.monsters())
        return None if threats or self.hp >= 0.6 * self.max_hp else self.wait()

    def walk(self, goals: Set[int]) -> Optional[str]:
        """First key of a shortest way to one of the cells `goals` (a set), if there is one. Keeps all cells passed as `reach`."""
        kind, todo = self.kind.tobytes(), deque([self.here])
        self.reach: Dict[int, Optional[str]] = {self.here: None}
        while todo:
            cell = todo.popleft()
            first = self.reach[cell]
            if cell in goals and first is not None:
                return self.go(first)
            for key, offset in STEPS.items():
                to = cell + offset
                if to in self.reach or not TOP <= to < BOTTOM or kind[to] in (WALL, TRAP) or self.failed.get((cell, offset), 0) > 2:
                    continue
                if offset not in STRAIGHT and (DOOR in (kind[to], kind[cell]) or kind[to] == BOULDER):
                    continue
                look = self.look(to)
                if kind[to] == MONSTER and look not in self.friends and (look in PASSIVE or self.harmless(to)):
                    continue
                self.reach[to] = first or key
                todo.append(to)
        return None

    def go(self, key: str) -> str:
        cell = self.here + STEPS[key]
        if cell not in self.locked or self.text[cell] != "+":
            return self.step(key)
        self.kicks += 1
        if self.no_kicks or self.kicks % 40 == 0:
            self.failed[self.here, STEPS[key]] = 9
            return "s"
        self.queue = [key]
        return KICK

    def explore(self) -> Optional[str]:
        depth = int("0" + re.sub(r"\D", "", self.place))
        strong = self.xl >= min(2 * depth, 8) or self.turn - self.arrival > 400
        ready = strong and self.hp >= 0.6 * self.max_hp
        if ready and self.here in self.stairs:
            return ">"
        blank = (np.frombuffer(self.text.encode("latin-1"), np.uint8) == 32) & ~self.known
        frontier = np.zeros(CELLS, bool)  # cells beside blank ones that we have not stood beside
        for offset in STEPS.values():
            frontier[82:-82] |= blank[82 + offset : CELLS - 82 + offset]
        frontier &= (self.kind == FLOOR) | (self.kind == DOOR)
        edge = set(np.flatnonzero(frontier[:BOTTOM]).tolist())
        key = (self.pickup and self.walk(self.cells("$"))) or (ready and self.walk(self.stairs)) or self.walk(edge)
        return key or (self.wait() if not ready and self.reach.keys() & self.stairs else self.search())

    def search(self) -> Optional[str]:
        """Nowhere left to go: searches for hidden doors and passages where there is room for something behind."""
        for _, key, look in self.enemies(1):  # passive ones, or `fight` would have seen to them
            if look not in DEADLY and self.hp > max(20, 0.8 * self.max_hp):
                return self.step(key)
        reach = list(self.reach)  # from near to far
        if self.turn // 400 % 2 and any(self.look(cell) == EYE for cell in self.monsters()):
            # It creeps after us: at the far end of where we can get to, there may be a way round it.
            return (reach[-1] != self.here and self.walk({reach[-1]})) or self.wait()
        scores = -12 * self.searched[reach] - 0.1 * np.arange(len(reach))
        for i, cell in enumerate(reach):
            for offset in STRAIGHT:
                beyond = self.text[cell + 2 * offset : cell + 8 * offset : offset] if self.kind[cell + offset] == WALL else ""
                scores[i] += len(beyond) - len(beyond.lstrip())
            ways = sum(self.kind[cell + offset] != WALL for offset in STEPS.values())
            scores[i] += 25 * (ways == 1)  # a dead end
        best = reach[int(scores.argmax())]
        if best != self.here:
            return self.walk({best})
        self.searched[[self.here, *(self.here + offset for offset in STEPS.values())]] += 1
        self.failed.clear()
        return self.wait("9")
