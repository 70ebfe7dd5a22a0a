"""A small scripted player of NetHack that sees only the terminal: tty_chars, tty_colors and tty_cursor.

One rule follows another, the most urgent first: answer what the game asks, stay alive, fight, eat, rest, explore, go down.
"""
import re
from collections import deque

import numpy as np

from nle import nethack

# The first index of each key: a few keys have two.
KEYS = {}
for index, action in enumerate(nethack.ACTIONS):
    KEYS.setdefault(chr(action.value), index)
ESC, RETURN, KICK, PRAY = "\x1b", "\r", "\x04", chr(nethack.Command.PRAY.value)

# The screen is one string of 24 * 80 cells, so a step in a direction is an offset.
STEPS = {"k": -80, "l": 1, "j": 80, "h": -1, "u": -79, "n": 81, "b": 79, "y": -81}
TOP, BOTTOM = 80, 22 * 80  # the map's rows

# What a cell is, by character and colour.
WALL, FLOOR, DOOR, TRAP, BOULDER, MONSTER = range(6)
KIND = np.full((256, 32), WALL, np.uint8)
KIND[[ord(c) for c in ".<>_{$)[=\"(%!?/*\\+#"]] = FLOOR
KIND[[ord(c) for c in "|-+"], 3] = DOOR  # brown: doors; otherwise walls and spellbooks
KIND[ord("#"), [2, 6]] = WALL  # trees and iron bars
KIND[ord("^")] = TRAP
KIND[ord("`")] = BOULDER
KIND[[ord(c) for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ@&':;~"]] = MONSTER
KIND[ord("#"), 1:2] = FLOOR

# What strikes back when hit but does not come after anyone: floating eyes, jellies, molds. Lichens (bright green F) are fair game.
PASSIVE = {("e", 4)} | {(c, k) for c in "jF" for k in range(32)} - {("F", 10)}
# Corpses that are safe to eat when fresh.
EDIBLE = set("""newt jackal,sewer rat,giant rat,gecko,gnome,gnome lord,gnomish wizard,dwarf,hobbit,hill orc,Mordor orc,Uruk-hai,
goblin,giant ant,fire ant,iguana,baby crocodile,lichen,cave spider,rothe,hyena,coyote,fox,wolf,winter wolf cub,woodchuck,pony,
horse,bugbear,dingo,jaguar,lynx,panther,floating eye,newt,jackal,hill giant,rock piercer,dwarf lord,snow orc""".replace("\n", "").split(",")) | {"newt", "jackal"}


class ScriptedPlayer:
    """Plays one game. `rng` is a numpy.random.Generator."""

    def __init__(self, rng):
        self.rng = rng
        self.queue = []  # keys to press next
        self.heard = ""  # messages since the last decision
        self.idle = 0  # actions since the turn counter moved
        self.turn = self.seen_turn = 0
        self.prayed = -800
        self.level = None
        self.friends = {("d", 15), ("f", 15)}  # dogs and cats in white: most likely our own
        self.peaceful = {}  # (character, colour) -> turn in which the game asked "Really attack?"
        self.archer = None
        self.fresh = None  # (cell, turn, kind) of what we killed last
        self.want_corpse = False
        self.hungry_food = True
        self.pickup = True
        self.target = None  # cell that the last key was meant for
        self.last = None  # (cell, key, turn) of the last step
        self.scared = None

    # -- seeing

    def act(self, obs):
        """Index of the next key in nethack.ACTIONS; obs as scripts/record_games.py says."""
        chars, colors = obs["tty_chars"], obs["tty_colors"] & 31
        self.text = chars.tobytes().decode("latin-1")
        self.colors = colors.tobytes()
        self.kind = KIND[chars, colors].reshape(-1)
        row, col = (int(x) for x in obs["tty_cursor"])
        self.here = row * 80 + col
        status = re.search(r"(.*?) +[$*]:.*HP:(-?\d+)\((\d+)\).*(?:Xp|HD):(\d+).* T:(\d+)(.*)", self.text[23 * 80:])
        if status:
            self.place, self.states = status.group(1), status.group(6)
            self.hp, self.max_hp, self.xl, self.turn = (int(status.group(i)) for i in (2, 3, 4, 5))
        self.idle = 0 if self.turn != self.seen_turn else self.idle + 1
        self.seen_turn = self.turn
        key = self.choose(row)
        return KEYS.get(key, KEYS[ESC])

    def choose(self, row):
        if self.idle > 60:  # whatever it is that keeps us, this gets out of it
            self.queue, self.heard = [], ""
            return (ESC, "s", ESC, self.rng.choice(list(STEPS)))[self.idle % 4]
        more = self.text.find("--More--")
        if more >= 0:
            self.heard += " " + " ".join(self.text[:more].split())
            self.queue = []
            return RETURN
        if row == 0:
            return self.answer(self.text[:80])
        if "(end)" in self.text or re.search(r"\(\d+ of \d+\)", self.text):
            return ESC
        if self.queue:
            return self.queue.pop(0)
        self.heard += " " + self.text[:80]
        key = self.decide()
        self.heard = ""
        return key

    def answer(self, question):
        """The answer to a question in the top line."""
        if "Really attack" in question:
            if self.target is not None:
                self.peaceful[self.look(self.target)] = self.turn
            return ESC
        if "eat it?" in question:
            wanted = self.want_corpse and self.fresh and "%s corpse" % self.fresh[2] in question
            self.want_corpse = False
            return "y" if wanted else "n"
        choice = re.search(r"\[\W*(\w)[^\]]*or \?\*\]", question)
        if "want to eat?" in question:
            return choice.group(1) if choice and not self.fresh else ESC
        if "want to fire?" in question:
            letters = re.search(r"\[(.*?) or", question)
            for letter in "cdefg":
                if letters and letter in letters.group(1):
                    return letter
            self.archer = False
            return ESC
        if "Are you sure you want to pray" in question:
            return "y"
        if self.queue:
            return self.queue.pop(0)
        return ESC

    def look(self, cell):
        return self.text[cell], self.colors[cell]

    # -- deciding

    def decide(self):
        if self.place != self.level:
            self.enter()
        self.learn()
        self.stairs.update(i for i in range(TOP, BOTTOM) if self.text[i] == ">")
        self.known[[self.here + d for d in STEPS.values()]] = True
        self.known[self.here] = True
        if self.archer is None:
            self.archer = "Tenderfoot" in self.text[22 * 80:]
            if self.archer:
                return "x"  # the bow in hand
        if self.text[self.here - 81:self.here - 78] == "/-\\":
            return self.step(self.rng.choice(list(STEPS)))  # engulfed: hit out
        for rule in (self.survive, self.fight, self.eat, self.rest, self.explore):
            key = rule()
            if key:
                return key
        return "s"

    def enter(self):
        """A new level: nothing is known of it."""
        self.level = self.place
        self.known = np.zeros(24 * 80, bool)  # cells next to which we have stood
        self.blocked = {}  # (cell, offset) -> how often the step failed
        self.locked, self.statues, self.stairs = set(), set(), set()
        self.searched = np.zeros(24 * 80)
        self.arrival = self.turn
        self.last = self.target = None
        self.kicks = 0

    def learn(self):
        """Draws conclusions from the messages and from whether the last step got anywhere."""
        heard, cell = self.heard, self.target
        self.target = None
        if "swap places" in heard and self.last_look:
            self.friends.add(self.last_look)
        kill = re.search(r"You kill (?:the |an? )?(?:poor )?(?:invisible )?([A-Za-z -]+?)!", heard)
        if kill and cell is not None:
            self.fresh = (cell, self.turn, kill.group(1))
        if "no ammunition" in heard or "You have nothing" in heard:
            self.archer = False
        if "don't have anything to eat" in heard:
            self.hungry_food = False
        if self.last is None or cell is None:
            return
        start, offset, turn = self.last
        self.last = None
        if self.here != start:
            return
        if "door is locked" in heard:
            self.locked.add(cell)
        elif "Perhaps that's why" in heard or "statue" in heard:
            self.blocked[start, offset] = 9
            self.statues.add(cell)
        elif "WHAMM" in heard or "kick" in heard:
            pass
        elif not kill:
            count = 2 if self.turn == turn or "in vain" in heard or "diagonal" in heard else 0.34
            self.blocked[start, offset] = self.blocked.get((start, offset), 0) + count

    def harmless(self, cell):
        """Whether the monster in that cell is none to hit."""
        look = self.look(cell)
        return look in self.friends or cell in self.statues or self.turn - self.peaceful.get(look, -99) < 50

    def step(self, key):
        self.target = self.here + STEPS[key]
        self.last_look = self.look(self.target)
        self.last = (self.here, STEPS[key], self.turn)
        return key

    def enemies(self, reach):
        """(distance, key) of every enemy in line with us, nearest first, up to `reach` cells away."""
        found = []
        for key, offset in STEPS.items():
            cell = self.here
            for distance in range(1, reach + 1):
                cell += offset
                if not TOP <= cell < BOTTOM or self.kind[cell] in (WALL, BOULDER):
                    break
                if self.kind[cell] == MONSTER:
                    if not self.harmless(cell):
                        found.append((distance, key, self.look(cell)))
                    break
        return sorted(found)

    def survive(self):
        low = self.hp < 6 or self.hp * 7 < self.max_hp
        weak = "Weak" in self.states or "Faint" in self.states
        if (low or weak) and self.turn - self.prayed > 1000 - 700 * (self.prayed < 0):
            self.prayed = self.turn
            return PRAY
        return None

    def fight(self):
        for distance, key, look in self.enemies(7 if self.archer else 1):
            if self.archer and (distance == 1 or look[0] != "@"):
                self.queue = [key]
                self.target = self.here + STEPS[key] * distance
                return "f"
            if distance == 1 and look not in PASSIVE:
                return self.step(key)
        return None

    def eat(self):
        if "Satiated" in self.states:
            return None
        if self.fresh and self.turn - self.fresh[1] < 30 and self.fresh[2] in EDIBLE:
            cell = self.fresh[0]
            if cell == self.here:
                if not self.want_corpse:
                    self.want_corpse = True
                    return "e"
                self.fresh = None
            elif self.text[cell] == "%":
                return self.walk({cell})
        self.want_corpse, self.fresh = False, None
        if self.hungry_food and re.search("Hungry|Weak|Faint", self.states):
            return "e"
        return None

    def watched(self):
        """Whether an enemy is in sight and near."""
        row, col = divmod(self.here, 80)
        for cell in np.flatnonzero(self.kind[TOP:BOTTOM] == MONSTER) + TOP:
            r, c = divmod(int(cell), 80)
            if 0 < max(abs(r - row), abs(c - col)) < 9 and not self.harmless(cell) and self.look(cell) not in PASSIVE:
                return True
        return False

    def wait(self, turns="20"):
        self.queue = list(turns[1:]) + ["s"]
        return turns[0]

    def rest(self):
        if self.hp < 0.6 * self.max_hp and not self.watched():
            return self.wait()
        return None

    # -- getting about

    def walk(self, goals, traps=False):
        """First step of a shortest way to one of the cells `goals` (a set, or a mask of all cells); None without one."""
        if isinstance(goals, set):
            goals, cells = np.zeros(24 * 80, bool), goals
            goals[list(cells)] = True
        kind, goal = self.kind.tobytes(), goals.tobytes()
        first = {self.here: None}
        todo = deque([self.here])
        while todo:
            cell = todo.popleft()
            if goal[cell] and cell != self.here:
                self.reached = cell
                return self.go(first[cell])
            for key, offset in STEPS.items():
                to = cell + offset
                if to in first or not TOP <= to < BOTTOM:
                    continue
                what = kind[to]
                if what == WALL or (what == TRAP and not traps) or self.blocked.get((cell, offset), 0) > 1:
                    continue
                if offset not in (1, -1, 80, -80) and (what == DOOR or kind[cell] == DOOR or what == BOULDER):
                    continue
                if what == MONSTER and (to in self.statues or self.look(to) in PASSIVE
                                        or (self.harmless(to) and self.look(to) not in self.friends)):
                    continue
                first[to] = first[cell] or key
                todo.append(to)
        self.reach = first
        return None

    def go(self, key):
        cell = self.here + STEPS[key]
        if cell in self.locked and self.kind[cell] == DOOR and self.text[cell] == "+":
            self.kicks += 1
            if self.kicks % 40 == 0:
                self.blocked[self.here, STEPS[key]] = 9
            self.queue = [key]
            return KICK
        return self.step(key)

    def ready(self):
        """Whether we are strong enough for the next level down."""
        depth = int("0" + "".join(c for c in self.place if c.isdigit()))
        return self.hp >= 0.6 * self.max_hp and (self.xl >= min(2 * depth, 8) or self.turn - self.arrival > 1500)

    def explore(self):
        gold = np.frombuffer(self.text.encode("latin-1"), np.uint8) == ord("$")
        gold[:TOP] = gold[BOTTOM:] = False
        key = gold.any() and self.walk(gold)
        if key:
            return key
        if self.stairs and self.ready():
            if self.here in self.stairs:
                return ">"
            key = self.walk(self.stairs)
            if key:
                return key
        # The frontier: cells beside blank ones that we have not stood beside.
        blank = (np.frombuffer(self.text.encode("latin-1"), np.uint8) == 32) & ~self.known
        near = np.zeros(24 * 80, bool)
        for offset in STEPS.values():
            near |= np.roll(blank, offset)
        near &= ~np.isin(self.kind, (WALL, MONSTER, BOULDER))
        near[:TOP] = near[BOTTOM:] = False
        key = self.walk(near)
        if key:
            return key
        if self.stairs and not self.ready():
            if self.walk(self.stairs) or self.here in self.stairs:
                return self.wait()
        return self.search()

    def search(self):
        """Nowhere left to go: looks for hidden doors and passages where there is room for something behind."""
        reach = self.reach
        best, where = -1e9, self.here
        for cell in reach:
            score = -12.0 * self.searched[cell]
            row, col = divmod(cell, 80)
            ways = 0
            for offset in (1, -1, 80, -80):
                if self.kind[cell + offset] != WALL:
                    ways += 1
                    continue
                beyond = cell + 2 * offset
                for _ in range(6):
                    if not TOP <= beyond < BOTTOM or self.text[beyond] != " ":
                        break
                    score += 1
                    beyond += offset
            if ways == 1 and self.text[cell] == "#":
                score += 20
            start = divmod(self.here, 80)
            score -= 0.3 * max(abs(row - start[0]), abs(col - start[1]))
            if score > best:
                best, where = score, cell
        if where != self.here:
            key = self.walk({where}) or self.walk({where}, traps=True)
            if key:
                return key
        for offset in list(STEPS.values()) + [0]:
            self.searched[self.here + offset] += 1
        self.blocked.clear()
        return self.wait("9")
