# SPDX-License-Identifier: MIT
"""The status lines' reader against NLE's own blstats: in ordinary games, in places few games reach,
and row by row."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nle.env.tasks import NetHackScore

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import COLS, NUM_BLSTATS, ROWS, read_blstats

# Places in NLE's blstats (nle/include/nletypes.h), written out here so that a wrong index in the
# code cannot hide.
STRENGTH_25, STRENGTH, DEXTERITY, CONSTITUTION, INTELLIGENCE, WISDOM, CHARISMA = range(2, 9)
(
    HP,
    HP_MAX,
    DEPTH,
    GOLD,
    ENERGY,
    ENERGY_MAX,
    ARMOR_CLASS,
    HIT_DICE,
    LEVEL,
    POINTS,
    TURN,
    HUNGER,
    LOAD,
) = range(10, 23)
DUNGEON_LEVEL, CONDITION, ALIGNMENT = 24, 25, 26
UPPER = [*range(STRENGTH_25, CHARISMA + 1), ALIGNMENT]
LOWER = [*range(HP, LOAD + 1), CONDITION]  # never shown: position, score, dungeon number


def differences(live, rows, read):
    """Places in which `read` differs from NLE's `live` although the screen shows them, or is not 0
    elsewhere."""
    upper, lower = (
        re.search(r" St:\d.* Ch:\d", rows[22]),
        re.search(r"HP:\d+\(\d+\) Pw:.* T:\d", rows[23]),
    )
    shown = {*(UPPER if upper else ()), *(LOWER if lower else ())}
    if "HD:" in rows[23]:  # polymorphed: experience is not shown
        shown -= {LEVEL, POINTS}
    if rows[23].startswith(("Home", "Fort")):  # places without a depth on the screen
        shown -= {DEPTH}
    hidden = {*range(NUM_BLSTATS)} - shown - {DUNGEON_LEVEL}
    return [place for place in sorted(shown) if read[place] != live[place]] + [
        p for p in sorted(hidden) if read[p]
    ]


class Game:
    """A game of NLE's, every frame of which can be compared with NLE's own blstats; in wizard mode
    it has wishes and can go anywhere."""

    def __init__(self, seed, wizard=True, **options):
        fixed = {"fix_moon_phase": True} if int(pomdp.nle.__version__.split(".")[0]) >= 1 else {}
        keys = ("tty_chars", "tty_colors", "tty_cursor", "blstats")
        options.update(
            allow_all_modes=True, allow_all_yn_questions=True, max_episode_steps=10**9, savedir=None
        )
        options.update({"wizard": True, "spawn_monsters": False} if wizard else {})
        self.env = NetHackScore(
            actions=tuple(range(256)), observation_keys=keys, **options, **fixed
        )
        self.env.unwrapped.seed(core=seed, disp=seed, reseed=False)
        first = self.env.reset()
        self.obs = first[0] if isinstance(first, tuple) else first
        self.live = self.obs["blstats"]  # NLE writes each frame into the same arrays
        self.words = set()  # what followed the turn counter
        self.places = set()  # what stood before the level's number, and the sign of gold

    @property
    def rows(self):
        return [bytes(row).decode("latin-1") for row in self.obs["tty_chars"]]

    @property
    def read(self):
        return read_blstats(self.obs["tty_chars"][None])[0]

    def press(self, key):
        self.obs, _, done, *_ = self.env.step(ord(key))
        assert not done
        rows, read, live = self.rows, self.read, self.live
        if re.search(r"HP:\d+\(\d+\) Pw:.* T:\d", rows[23]):
            assert read[HP_MAX] == live[HP_MAX], rows[
                23
            ]  # nothing that is shown is taken for hidden
            cut_off = rows[23][-1] != " " or len(rows[23].rstrip()) == COLS - 1
            words = re.sub(r".* T:\d+", "", rows[23]).split()
            self.words.update(words[:-1] if cut_off else words)
            self.places.update(re.match(r"(.*?)[: ]?\d* (\S):\d+ HP", rows[23]).groups())
            wrong = set(differences(live, rows, read))
            if cut_off:  # the last words may be cut in two or missing
                wrong -= {CONDITION}
            redrawn_later = any("--More--" in row for row in rows[:3])
            assert not wrong or redrawn_later, (wrong, live, rows[22:])

    def type(self, keys):
        """Presses the keys, then dismisses messages and declines questions."""
        for key in keys:
            self.press(key)
        for _ in range(100):
            text = "\n".join(self.rows)
            if "--More--" in text or "(end)" in text:
                self.press("\r")
            elif re.search(r"\[yn|Die\?", text):
                self.press("n")
            else:
                return
        raise AssertionError("no end of messages")

    def choose(self, keys, name):
        """Opens a menu of several pages and marks the line that contains the name."""
        for key in keys:
            self.press(key)
        chosen = 0
        for _ in range(10):
            for row in self.rows:
                line = re.search(r"(?:^| )([a-zA-Z]) - +(.*)", row)
                if line and name in line.group(2):
                    self.press(line.group(1))
                    chosen += 1
            page = re.search(r"\((\d+) of (\d+)\)", "\n".join(self.rows))
            if page is None or page.group(1) == page.group(2):
                break
            self.press(">")
        self.type("\r")
        assert chosen == 1, name

    def suffer(self, *conditions):
        for condition in conditions:
            self.choose("#wizintrinsic\r", condition)

    def wish(self, item):
        """Wishes for the item and returns its letter."""
        for key in "\x17" + item + "\r":
            self.press(key)
        letter = re.search(r"\b([a-zA-Z$]) - ", "\n".join(self.rows[:3]))
        self.type("")
        return letter.group(1) if letter else None


@pytest.fixture
def wizard():
    game = Game(1)
    yield game
    game.env.close()


# -- games -----------------------------------------------------------------------------------------
CHARACTERS = "mon-hum-neu wiz-elf-cha tou-hum-neu arc-gno-neu kni-hum-law pri-elf-cha sam-hum-law hea-gno-neu".split()  # noqa: E501


def test_agrees_with_nle_in_random_games():
    """Every place that the screen shows, in every frame of play that answers half of what asks for
    a key."""
    seen, frames, stale, hidden, keys = (
        [],
        0,
        0,
        0,
        [int(action) for action in pomdp.nethack.ACTIONS],
    )
    for seed, character in enumerate(CHARACTERS * 2):
        game, rng, agreed = (
            Game(seed, wizard=False, character=character),
            np.random.default_rng(seed),
            1,
        )
        for _ in range(2500):
            more = b"--More--" in game.obs["tty_chars"].tobytes()
            key = ord(" ") if more and rng.random() < 0.5 else keys[rng.integers(len(keys))]
            game.obs, _, done, *_ = game.env.step(key)
            if done:
                break
            read, live, rows = game.read, game.live, game.rows
            wrong = differences(live, rows, read)
            # NetHack redraws the turn counter late where a message interrupts a turn: the screen is
            # behind.
            if wrong == [TURN] and agreed <= read[TURN] < live[TURN]:
                stale, wrong = stale + 1, []
            else:
                agreed = int(live[TURN])
            assert not wrong, (seed, wrong, read[wrong], live[wrong], rows[22:])
            seen.append(live.copy())
            frames, hidden = frames + 1, hidden + (read[HP_MAX] == 0)
        game.env.close()
    assert frames > 30_000 and stale < 0.01 * frames and 0 < hidden < 0.25 * frames
    for place in (
        HP,
        ENERGY,
        GOLD,
        ARMOR_CLASS,
        TURN,
        ALIGNMENT,
        HUNGER,
    ):  # the games were worth comparing
        assert len({live[place] for live in seen}) > 1, place


def test_wizard_abilities_and_load(wizard):
    """Strength of every form, negative armour class, all loads, and more conditions than a row has
    room for."""
    for potion, place, low, high in (
        ("gain ability", STRENGTH, 19, 117),
        ("gain level", LEVEL, 10, 10),
    ):
        letter = wizard.wish(f"9 blessed potions of {potion}")
        for _ in range(9):
            wizard.type("q" + letter)
        assert low <= wizard.live[place] <= high
    wizard.type("W" + wizard.wish("blessed +20 gauntlets of power") + "ss")
    assert wizard.live[STRENGTH] == 125 and wizard.live[ARMOR_CLASS] < 0
    while wizard.live[LOAD] < 5:
        wizard.wish("loadstone")
    assert {"Burdened", "Stressed", "Strained", "Overtaxed", "Overloaded"} <= wizard.words
    # Words become shorter as the row fills, down to "Dl" for "Dlvl", and in the end the row is cut.
    wizard.suffer(
        "strangling",
        "fatally sick",
        "deafness",
        "stunned",
        "confused",
        "hallucinating",
        "blinded",
        "levitat",
    )
    assert {
        "Overload",
        "Ovld",
        "Strngl",
        "Stngl",
        "Str",
        "Ill",
        "Bl",
        "Df",
        "St",
        "Cf",
        "Hl",
    } <= wizard.words
    assert "Dl" in wizard.places
    wizard.wish("20000 gold pieces")
    assert wizard.live[GOLD] == 20_000


def test_wizard_conditions(wizard):
    """Each beside those before it, so that the row fills and every word is shown in each of its
    lengths."""
    conditions = "petrifying|becoming slime|strangling|fatally sick|stunned|confused|hallucinating|deafness|blinded|levitat"  # noqa: E501
    wizard.suffer(*conditions.split("|"))
    assert bin(wizard.live[CONDITION]).count("1") == 10
    words = "Stone Ston Sto Slime Slim Slm Strngl Stngl Str Stun St Cnf Cf Hl Df Bl Lv"
    assert {*words.split()} <= wizard.words


def test_wizard_polymorph(wizard):
    """Hit dice take the place of experience, and the monster's points that of ours."""
    dice = set()
    for monster in ("vampire lord", "giant beetle", "iron golem", "jackal"):
        wizard.type("#polyself\r" + monster + "\r")
        assert "HD:" in wizard.rows[23]
        dice.add(int(wizard.live[HIT_DICE]))
        if monster == "vampire lord":
            assert wizard.live[STRENGTH] == 118 and "St:18/**" in wizard.rows[22]
    assert len(dice) == 4 and "Fly" in wizard.words


def test_wizard_levels(wizard):
    """The Rogue level with its own sign for gold, the quest, Gehennom and all planes."""
    wizard.wish("Amulet of Yendor")  # without it there is no way into the planes
    depths = []
    for level in (
        "rogue",
        "strt",
        "minend",
        "valley",
        "sanctum",
        "earth",
        "air",
        "fire",
        "water",
        "astral",
    ):
        wizard.choose("\x16?\r", level)
        depths.append(int(wizard.live[DEPTH]))
        assert level != "strt" or wizard.read[DUNGEON_LEVEL] == wizard.live[DUNGEON_LEVEL] == 1
    assert wizard.places == {
        "Dlvl",
        "*",
        "$",
        "Home",
        "Earth",
        "Air",
        "Fire",
        "Water",
        "Astral Plane",
    }
    assert depths[-5:] == [-1, -2, -3, -4, -5] and depths[4] > depths[3] > depths[0] > 10


def test_wizard_hunger(wizard):
    """From satiated to fainting, by searching without a meal."""
    wizard.suffer("voracious hunger")
    wizard.type("e" + wizard.wish("food ration") + "s")
    assert wizard.live[HUNGER] == 0
    while wizard.live[HUNGER] < 4:
        wizard.type("1000s")
    assert {"Satiated", "Hungry", "Weak", "Fainting"} <= wizard.words


# -- rows ------------------------------------------------------------------------------------------
ABILITIES = "Agent the Stripling            St:16 Dx:11 Co:18 In:9 Wi:10 Ch:7 Neutral S:0"
VITALS = "Dlvl:1 $:0 HP:14(14) Pw:4(4) AC:4 Xp:1/0 T:1"
MENU = " a - a blessed +1 quarterstaff (weapon in hands)"


def read(*pairs):
    """blstats [n, 27] as read off n screens with these last two rows."""
    chars = np.full((len(pairs), ROWS, COLS), ord(" "), np.uint8)
    for screen, rows in zip(chars, pairs):
        for row, text in zip((22, 23), rows):
            screen[row, : len(text)] = np.frombuffer(text.encode("latin-1"), np.uint8)[:COLS]
    blstats = read_blstats(chars)
    assert blstats.shape == (len(pairs), NUM_BLSTATS) and blstats.dtype == np.int32
    return blstats


def in_places(**values):
    expected = np.zeros(NUM_BLSTATS, np.int32)
    for name, value in values.items():
        expected[globals()[name]] = value
    return expected.tolist()


def test_plain_rows_hidden_rows_and_frames_beside_each_other():
    upper = dict(
        STRENGTH_25=16,
        STRENGTH=16,
        DEXTERITY=11,
        CONSTITUTION=18,
        INTELLIGENCE=9,
        WISDOM=10,
        CHARISMA=7,
    )
    lower = dict(
        HP=23,
        HP_MAX=38,
        DEPTH=12,
        GOLD=345,
        ENERGY=6,
        ENERGY_MAX=7,
        ARMOR_CLASS=-8,
        LEVEL=9,
        POINTS=2801,
    )
    lower.update(TURN=20417, HUNGER=1)  # not hungry
    rows = ABILITIES, "Dlvl:12 $:345 HP:23(38) Pw:6(7) AC:-8 Xp:9/2801 T:20417"
    cases = [
        (rows, in_places(**upper, **lower)),
        ((rows[0], MENU), in_places(**upper)),
        ((MENU, rows[1]), in_places(**lower)),
        # Seen in recorded games: a menu of 22 lines ends on row 22 and leaves the row below as it
        # is.
        (("Agent the Initiate             St:18/09  (end)", rows[1]), in_places(**lower)),
        ((MENU, MENU), in_places()),
        (("", ""), in_places()),
        ((rows[0].replace("Neutral", "Lawful"), ""), in_places(**upper, ALIGNMENT=1)),
        ((rows[0].replace("Neutral", "Chaotic"), ""), in_places(**upper, ALIGNMENT=-1)),
    ]
    polymorphed = dict(
        DEPTH=1,
        HP=54,
        HP_MAX=60,
        ENERGY=2,
        ENERGY_MAX=2,
        ARMOR_CLASS=-6,
        HIT_DICE=12,
        TURN=77,
        HUNGER=1,
    )
    row = "Dlvl:1 $:0 HP:54(60) Pw:2(2) AC:-6 HD:12 T:77 Fly"
    cases.append((("", row), in_places(**polymorphed, CONDITION=1 << 11)))
    assert read(*(rows for rows, _ in cases)).tolist() == [expected for _, expected in cases]


STYLES = {  # of NetHack 3.4.3 (2008 to 2015), of 3.6.0, of 3.6.1 and later with a bar of hit points
    "Fare the Evoker           St:16 Dx:11 Co:18 In:9 Wi:10 Ch:7  Neutral S:104": [
        ("Dlvl:12  $:88 HP:3(12) Pw:6(7) AC:9  Xp:9/2801 T:270 Hungry Conf", 2801, 270),
        ("Dlvl:12 $:88  HP:3(12) Pw:6(7) AC:9  Xp:9/2801", 2801, 0),
        ("Dlvl:12 $:88  HP:3(12) Pw:6(7) AC:9  Exp:9 T:270", 0, 270),
        ("Dlvl:12 :88  HP:3(12) Pw:6(7) AC:9  Xp:9/2801 T:270", 2801, 270),  # IBM's Rogue level
        ("Dlvl:12 *:88  HP:3(12) Pw:6(7) AC:9  Xp:9/2801 T:270", 2801, 270),
    ],
    "Mackeyth the Initiate         St:16 Dx:11 Co:18 In:9 Wi:10 Ch:7 Neutral": [
        ("Dlvl:12  $:88 HP:3(12) Pw:6(7) AC:9 Xp:9 T:5551  Burdened", 0, 5551),
    ],
    "[Moo22 the Rhizotomist         ] St:16 Dx:11 Co:18 In:9 Wi:10 Ch:7 Neutral": [
        ("Dlvl:12   $:88 HP:3(12) Pw:6(7) AC:9 Xp:9 T:134", 0, 134),
        ("Dlvl:12 $:88 HP:3(12) Pw:6(7) AC:9 Xp:9/2801 T:134 Hungry", 2801, 134),
    ],
}


def test_styles_of_all_years():
    """Human games of 2008 to 2020: padded numbers, experience without points, no turn, brackets."""
    upper = dict(STRENGTH_25=16, STRENGTH=16, DEXTERITY=11, CONSTITUTION=18, INTELLIGENCE=9)
    upper.update(WISDOM=10, CHARISMA=7, DEPTH=12, GOLD=88, HP=3, HP_MAX=12, ENERGY=6, ENERGY_MAX=7)
    upper.update(ARMOR_CLASS=9, LEVEL=9)
    pairs, expected = [], []
    for first, others in STYLES.items():
        for second, points, turn in others:
            pairs.append((first, second))
            words = dict(HUNGER=2 if "Hungry" in second else 1, LOAD=int("Burdened" in second))
            words.update(CONDITION=(1 << 8) * ("Conf" in second), POINTS=points, TURN=turn)
            expected.append(in_places(**upper, **words))
    assert read(*pairs).tolist() == expected
    for place, depth in (("End Game", 0), ("Astral Plane", -5), ("Home 2", 0), ("Fort Ludios", 0)):
        row = f"{place}  $:0  HP:3(12) Pw:6(7) AC:9  HD:12 T:9"
        assert read(("", row))[0, [DEPTH, HP_MAX, HIT_DICE, TURN]].tolist() == [depth, 12, 12, 9]


def test_strength():
    shown = dict(
        zip("3 18 18/01 18/31 18/32 18/50 18/82 18/99 18/** 19 21 22 25".split(), range(13))
    )
    found = read(*((ABILITIES.replace("St:16", f"St:{text}"), VITALS) for text in shown))
    assert found[:, STRENGTH].tolist() == [3, 18, 19, 49, 50, 68, 100, 117, 118, 119, 121, 122, 125]
    assert found[:, STRENGTH_25].tolist() == [3, 18, 19, 19, 20, 20, 21, 21, 21, 21, 21, 22, 25]
    assert (found[:, DEXTERITY] == 11).all()


PLACES = {
    "Dlvl:50": (50, 0),
    "Dl:7": (7, 0),
    "Home 7": (0, 7),
    "Fort Ludios": (0, 0),
    "Earth": (-1, 0),
    "Air": (-2, 0),
}
PLACES.update({"Fire": (-3, 0), "Water": (-4, 0), "Astral Plane": (-5, 0)})


def test_places_and_gold():
    found = read(
        *(
            (ABILITIES, VITALS.replace("Dlvl:1 $:0", f"{place} {sign}:99"))
            for place in PLACES
            for sign in "$*"
        )
    )
    expected = [[depth, level, 99, 14] for depth, level in PLACES.values() for _ in "$*"]
    assert found[:, [DEPTH, DUNGEON_LEVEL, GOLD, HP_MAX]].tolist() == expected


# Words as NetHack writes them (botl.c, wintty.c), with the value that each stands for.
HUNGERS = {"Satiated": 0, "": 1, "Hungry": 2, "Weak": 3, "Fainting": 4, "Fainted": 5}
LOADS = "Burdened|Burden|Brd Stressed|Stress|Strs Strained|Strain|Strn Overtaxed|Overtax|Ovtx Overloaded|Overload|Ovld"  # noqa: E501
CONDITIONS = "Stone|Ston|Sto Slime|Slim|Slm Strngl|Stngl|Str FoodPois|Fpois|Poi TermIll|Ill Blind|Blnd|Bl Deaf|Def|Df "  # noqa: E501
CONDITIONS += "Stun|St Conf|Cnf|Cf Hallu|Hal|Hl Lev|Lv Fly|Fl Ride|Rid|Rd"


def test_status_words_one_by_one():
    expected = [(word, [value, 0, 0]) for word, value in HUNGERS.items()]
    expected += [
        (word, [1, value, 0])
        for value, words in enumerate(LOADS.split(), 1)
        for word in words.split("|")
    ]
    expected += [
        (word, [1, 0, 1 << bit])
        for bit, words in enumerate(CONDITIONS.split())
        for word in words.split("|")
    ]
    found = read(*((ABILITIES, f"{VITALS} {word}") for word, _ in expected))
    assert found[:, [HUNGER, LOAD, CONDITION]].tolist() == [values for _, values in expected]


PIECES = "St:|18/|**| |:|Dlvl:|Home |$:|HP:|(|)|Xp:|HD:|T:|-|Neutral|Astral Plane|99999999999999999999|1|Conf|\xff|\0"  # noqa: E501
TEXTS = st.binary(max_size=COLS).map(lambda raw: raw.decode("latin-1")) | st.lists(
    st.sampled_from(PIECES.split("|"))
).map("".join)


@given(st.tuples(TEXTS, TEXTS))
def test_anything_is_read(rows):
    read(tuple(row[:COLS] for row in rows))


def test_numbers_too_large_for_32_bits():
    """No game shows them, but a damaged recording might."""
    upper = ABILITIES.replace("Dx:11", "Dx:99999999999")
    (found,) = read(
        (upper, "Dlvl:1 $:99999999999 HP:1(9999999999) Pw:4(4) AC:-9999999999 Xp:1/0 T:1")
    )
    assert found[[DEXTERITY, GOLD, HP_MAX, ARMOR_CLASS]].tolist() == [2**31 - 1] * 3 + [-(2**31)]
