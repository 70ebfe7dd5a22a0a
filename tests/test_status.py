"""The status lines' reader against NLE's own blstats: in ordinary games, in places few games reach, and row by row."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nle.env.tasks import NetHackScore

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import COLS, NUM_BLSTATS, ROWS, NetHackGame, StatusReader

# Places in NLE's blstats (nle/include/nletypes.h), written out here so that a wrong index in the code cannot hide.
STRENGTH_25, STRENGTH, DEXTERITY, CONSTITUTION, INTELLIGENCE, WISDOM, CHARISMA = range(2, 9)
HP, HP_MAX, DEPTH, GOLD, ENERGY, ENERGY_MAX, ARMOR_CLASS, HIT_DICE, LEVEL, POINTS, TURN, HUNGER, LOAD = range(10, 23)
DUNGEON_LEVEL, CONDITION, ALIGNMENT = 24, 25, 26
UPPER = (STRENGTH_25, STRENGTH, DEXTERITY, CONSTITUTION, INTELLIGENCE, WISDOM, CHARISMA, ALIGNMENT)
LOWER = (HP, HP_MAX, DEPTH, GOLD, ENERGY, ENERGY_MAX, ARMOR_CLASS, HIT_DICE, LEVEL, POINTS, TURN, HUNGER, LOAD, CONDITION)
NEVER_SHOWN = (0, 1, 9, 23)  # position, score (cut off at the screen's edge), dungeon number

UPPER_SHOWN = re.compile(r" St:\d.* Ch:\d")
LOWER_SHOWN = re.compile(r"HP:\d+\(\d+\) Pw:.* T:\d")


def text_rows(chars):
    """[24, 80] uint8 -> 24 strings."""
    return [bytes(row).decode("latin-1") for row in chars]


def differences(read, live, rows):
    """Places in which `read` differs from NLE's `live` although the screen shows them. `rows`: the screen's text."""
    upper, lower = UPPER_SHOWN.search(rows[22]), LOWER_SHOWN.search(rows[23])
    shown = [*(UPPER if upper else ()), *(LOWER if lower else ())]
    if "HD:" in rows[23]:  # polymorphed: experience is not shown
        shown = [place for place in shown if place not in (LEVEL, POINTS)]
    if rows[23].startswith(("Home", "Fort")):  # places without a depth on the screen
        shown = [place for place in shown if place != DEPTH]
    wrong = [place for place in shown if read[place] != live[place]]
    # What is not shown stays 0.
    hidden = set(range(NUM_BLSTATS)) - {DUNGEON_LEVEL} - (set(UPPER) if upper else set()) - (set(LOWER) if lower else set())
    return wrong + [place for place in sorted(hidden) if read[place] != 0]


# -- games -------------------------------------------------------------------------------------------------------------


def random_play(character, seed, steps):
    """Yields (observation, NLE's blstats) of random play that answers half of what asks for a key, so that it gets on."""
    rng = np.random.default_rng(seed)
    space = int(pomdp.KEY_TO_ACTION[ord(" ")])
    game = NetHackGame(character)
    try:
        obs = game.reset(seed, seed + 1)
        for _ in range(steps):
            more = b"--More--" in obs["tty_chars"].tobytes()
            obs, _, done, _ = game.step(space if more and rng.random() < 0.5 else int(rng.integers(pomdp.NUM_ACTIONS)))
            if done:
                return
            yield obs, game.last_blstats
    finally:
        game.close()


def test_agrees_with_nle_over_many_games():
    """60,000 frames of random games of ten characters: every place that the screen shows, in every frame."""
    characters = ["mon-hum-neu", "val-hum-neu", "ran-hum-neu", "wiz-elf-cha", "tou-hum-neu", "arc-gno-neu", "kni-hum-law",
                  "pri-elf-cha", "sam-hum-law", "hea-gno-neu"]  # fmt: skip
    seen = {HUNGER: set(), ALIGNMENT: set(), GOLD: set(), ARMOR_CLASS: set(), HP: set(), TURN: set()}
    frames = stale = hidden = seed = 0
    while frames < 60_000:
        agreed = 1
        for obs, live in random_play(characters[seed % len(characters)], seed, 3_000):
            rows, read = text_rows(obs["tty_chars"]), obs["blstats"]
            wrong = differences(read, live, rows)
            # NetHack redraws the turn counter late where a message interrupts a turn: the screen is behind, and is read so.
            if wrong == [TURN] and agreed <= read[TURN] < live[TURN]:
                stale += 1
                wrong = []
            else:
                agreed = int(live[TURN])
            assert not wrong, (seed, frames, wrong, read[wrong], live[wrong], rows[22:])
            frames += 1
            hidden += not LOWER_SHOWN.search(rows[23])
            for place, values in seen.items():
                values.add(int(live[place]))
        seed += 1
    assert stale < 0.01 * frames
    assert 0 < hidden < 0.25 * frames
    # The games were worth comparing.
    assert seed >= len(characters)
    assert seen[ALIGNMENT] == {-1, 0, 1}
    assert all(len(values) > 1 for values in seen.values()), seen


class WizardGame:
    """A game in NetHack's wizard mode, which has wishes and can go anywhere; every frame is compared with NLE's blstats."""

    def __init__(self, seed):
        options = {"fix_moon_phase": True} if int(pomdp.nle.__version__.split(".")[0]) >= 1 else {}
        self.env = NetHackScore(
            wizard=True, spawn_monsters=False, actions=tuple(range(128)), allow_all_modes=True, allow_all_yn_questions=True,
            max_episode_steps=10**9, savedir=None, observation_keys=("tty_chars", "tty_colors", "tty_cursor", "blstats"),
            **options)  # fmt: skip
        self.env.unwrapped.seed(core=seed, disp=seed, reseed=False)
        first = self.env.reset()
        self.obs = first[0] if isinstance(first, tuple) else first
        self.read_status = StatusReader()
        self.words = set()  # what followed the turn counter
        self.places = set()  # what stood before the level's number, and the sign of gold

    @property
    def rows(self):
        return text_rows(self.obs["tty_chars"])

    @property
    def live(self):
        return self.obs["blstats"]

    def press(self, key):
        self.obs, _, done, *_ = self.env.step(ord(key))
        assert not done
        rows, read, live = self.rows, self.read_status(self.obs["tty_chars"][None])[0], self.live
        if LOWER_SHOWN.search(rows[23]):
            assert read[HP_MAX] == live[HP_MAX], rows[23]  # nothing that is shown is taken for hidden
            cut_off = rows[23][-1] != " " or len(rows[23].rstrip()) == COLS - 1
            words = re.sub(r".* T:\d+", "", rows[23]).split()
            self.words.update(words[:-1] if cut_off else words)
            self.places.update(re.match(r"(.*?)[: ]?\d* (\S):\d+ HP", rows[23]).groups())
            wrong = differences(read, live, rows)
            if cut_off:  # the last words may be cut in two or missing
                wrong = [place for place in wrong if place != CONDITION]
            if any("--More--" in row for row in rows[:3]):  # redrawn after the message
                wrong = []
            assert not wrong, (wrong, read[wrong], live[wrong], rows[22:])

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

    def choose(self, *names):
        """Marks the lines of a menu of several pages that contain one of the names, and returns them."""
        chosen = []
        for _ in range(10):
            for row in self.rows:
                line = re.search(r"(?:^| )([a-zA-Z]) - +(.*)", row)
                if line and any(name in line.group(2) for name in names):
                    self.press(line.group(1))
                    chosen.append(line.group(2).strip())
            page = re.search(r"\((\d+) of (\d+)\)", "\n".join(self.rows))
            if page is None or page.group(1) == page.group(2):
                break
            self.press(">")
        self.type("\r")
        return chosen

    def suffer(self, *conditions):
        for key in "#wizintrinsic\r":
            self.press(key)
        chosen = self.choose(*conditions)
        assert len(chosen) == len(conditions), chosen

    def wish(self, item):
        """Wishes for the item and returns its letter."""
        self.press("\x17")
        for key in item + "\r":
            self.press(key)
        letter = re.search(r"\b([a-zA-Z$]) - ", "\n".join(self.rows[:3]))
        self.type("")
        return letter.group(1) if letter else None

    def go(self, level):
        """Teleports to a level by its name in the game's own overview."""
        for key in "\x16?\r":
            self.press(key)
        chosen = self.choose(level)
        assert len(chosen) == 1, (level, chosen)

    def close(self):
        self.env.close()


@pytest.fixture
def wizard():
    game = WizardGame(1)
    yield game
    game.close()


def test_wizard_abilities_and_load(wizard):
    """Strength of every form, negative armour class, all loads, and more conditions than a row has room for."""
    potions = wizard.wish("9 blessed potions of gain ability")
    for _ in range(9):
        wizard.type("q" + potions)
    assert 18 < wizard.live[STRENGTH] < 118  # 18/xx
    gloves = wizard.wish("blessed +20 gauntlets of power")
    wizard.type("W" + gloves)
    wizard.type("ss")
    assert wizard.live[STRENGTH] == 125
    assert wizard.live[ARMOR_CLASS] < 0
    potions = wizard.wish("9 blessed potions of gain level")
    for _ in range(9):
        wizard.type("q" + potions)
    assert wizard.live[LEVEL] == 10
    while wizard.live[LOAD] < 5:
        wizard.wish("loadstone")
    assert {"Burdened", "Stressed", "Strained", "Overtaxed", "Overloaded"} <= wizard.words
    # Words become shorter as the row fills, down to "Dl" for "Dlvl", and in the end the row is cut.
    for condition in ("strangling", "fatally sick", "deafness", "stunned", "confused", "hallucinating", "blinded", "levitating"):
        wizard.suffer(condition)
    assert {"Overload", "Ovld", "Strngl", "Stngl", "Str", "Ill", "Bl", "Df", "St", "Cf", "Hl"} <= wizard.words
    assert "Dl" in wizard.places
    wizard.wish("20000 gold pieces")
    assert wizard.live[GOLD] == 20_000


def test_wizard_conditions_one_by_one(wizard):
    """Each condition beside those before it, so that the row fills and every word is shown in each of its lengths."""
    conditions = ("petrifying", "becoming slime", "strangling", "fatally sick", "stunned", "confused", "hallucinating", "deafness",
                  "blinded", "levitating")  # fmt: skip
    for condition in conditions:
        wizard.suffer(condition)
    assert wizard.live[CONDITION].bit_count() == len(conditions)
    assert {"Stone", "Ston", "Sto", "Slime", "Slim", "Slm", "Strngl", "Stngl", "Str", "Stun", "St", "Cnf", "Cf", "Hl", "Df",
            "Bl", "Lv"} <= wizard.words  # fmt: skip


@pytest.mark.parametrize("condition, word", [("deafness", "Deaf"), ("blinded", "Blind"), ("confused", "Conf"), ("hallucinating", "Hallu"),
                                             ("levitating", "Lev"), ("flying", "Fly")])  # fmt: skip
def test_wizard_conditions_in_full(wizard, condition, word):
    wizard.suffer(condition)
    assert wizard.words == {word}


def test_wizard_polymorph(wizard):
    """Hit dice take the place of experience, and the monster's points that of ours."""
    dice = set()
    for monster in ("vampire lord", "giant beetle", "iron golem", "jackal"):
        wizard.press("#")
        wizard.type("polyself\r" + monster + "\r")
        assert "HD:" in wizard.rows[23]
        dice.add(int(wizard.live[HIT_DICE]))
        if monster == "vampire lord":
            assert wizard.live[STRENGTH] == 118 and "St:18/**" in wizard.rows[22]
    assert len(dice) == 4
    assert "Fly" in wizard.words


def test_wizard_levels(wizard):
    """The Rogue level with its own sign for gold, the quest, Gehennom and all planes."""
    wizard.wish("Amulet of Yendor")  # without it there is no way into the planes
    depths = {}
    for level in ("rogue", "strt", "minend", "valley", "sanctum", "earth", "air", "fire", "water", "astral"):
        wizard.go(level)
        depths[level] = int(wizard.live[DEPTH])
        if level == "strt":
            assert wizard.read_status(wizard.obs["tty_chars"][None])[0][DUNGEON_LEVEL] == wizard.live[DUNGEON_LEVEL] == 1
    assert wizard.places == {"Dlvl", "*", "$", "Home", "Earth", "Air", "Fire", "Water", "Astral Plane"}
    assert [depths[level] for level in ("earth", "air", "fire", "water", "astral")] == [-1, -2, -3, -4, -5]
    assert depths["sanctum"] > depths["valley"] > depths["rogue"] > 10


def test_wizard_hunger(wizard):
    """From satiated to fainting, by searching without a meal."""
    wizard.suffer("voracious hunger")
    wizard.type("e" + wizard.wish("food ration"))
    wizard.type("s")
    assert wizard.live[HUNGER] == 0
    for _ in range(200):
        wizard.type("1000s")
        if wizard.live[HUNGER] >= 4:
            break
    assert {"Satiated", "Hungry", "Weak", "Fainting"} <= wizard.words


# -- rows --------------------------------------------------------------------------------------------------------------

ABILITIES = "Agent the Stripling            St:16 Dx:11 Co:18 In:9 Wi:10 Ch:7 Neutral S:0"
VITALS = "Dlvl:1 $:0 HP:14(14) Pw:4(4) AC:4 Xp:1/0 T:1"


def read(upper, lower):
    """blstats [27] as read off a screen with these last two rows."""
    chars = np.full((1, ROWS, COLS), ord(" "), np.uint8)
    for row, text in ((22, upper), (23, lower)):
        text = text.encode("latin-1")[:COLS]
        chars[0, row, : len(text)] = np.frombuffer(text, np.uint8)
    blstats = StatusReader()(chars)
    assert blstats.shape == (1, NUM_BLSTATS) and blstats.dtype == np.int32
    return blstats[0]


def test_plain_rows():
    expected = np.zeros(NUM_BLSTATS, np.int32)
    expected[[STRENGTH_25, STRENGTH, DEXTERITY, CONSTITUTION, INTELLIGENCE, WISDOM, CHARISMA]] = 16, 16, 11, 18, 9, 10, 7
    expected[[HP, HP_MAX, DEPTH, GOLD, ENERGY, ENERGY_MAX, ARMOR_CLASS, LEVEL, POINTS, TURN]] = 23, 38, 12, 345, 6, 7, -8, 9, 2801, 20_417
    expected[[HUNGER, ALIGNMENT]] = 1, -1
    assert (read(ABILITIES.replace("Neutral", "Chaotic"), "Dlvl:12 $:345 HP:23(38) Pw:6(7) AC:-8 Xp:9/2801 T:20417") == expected).all()


def test_hidden_rows():
    menu = " a - a blessed +1 quarterstaff (weapon in hands)"
    whole = read(ABILITIES, VITALS)
    assert not read(menu, menu).any()
    assert not read("", "").any()
    upper, lower = read(ABILITIES, menu), read(menu, VITALS)
    assert (upper + lower == whole).all()
    assert all(upper[place] == (whole[place] if place in UPPER else 0) for place in range(NUM_BLSTATS))
    assert all(lower[place] == (whole[place] if place in LOWER else 0) for place in range(NUM_BLSTATS))
    assert lower[HP_MAX] == 14 and upper[HP_MAX] == 0  # what the network takes for "hidden"
    assert not any(whole[place] for place in NEVER_SHOWN)


@pytest.mark.parametrize("row", ["Agent the Initiate             St:18/09  (end)", "Agent the Initiate             St:18/09  --More--"])
def test_menu_over_half_of_the_upper_row(row):
    """Seen in recorded games: a menu of 22 lines ends on row 22 and leaves the row below as it is."""
    blstats = read(row, VITALS)
    assert not blstats[list(UPPER)].any()
    assert blstats[HP_MAX] == 14


@pytest.mark.parametrize(
    "shown, strength, compact",
    [("3", 3, 3), ("18", 18, 18), ("18/01", 19, 19), ("18/31", 49, 19), ("18/32", 50, 20), ("18/50", 68, 20), ("18/82", 100, 21),
     ("18/99", 117, 21), ("18/**", 118, 21), ("19", 119, 21), ("21", 121, 21), ("22", 122, 22), ("25", 125, 25)],
)  # fmt: skip
def test_strength(shown, strength, compact):
    blstats = read(ABILITIES.replace("St:16", "St:" + shown), VITALS)
    assert (blstats[STRENGTH], blstats[STRENGTH_25], blstats[DEXTERITY]) == (strength, compact, 11)


@pytest.mark.parametrize("word, alignment", [("Lawful", 1), ("Neutral", 0), ("Chaotic", -1)])
def test_alignment(word, alignment):
    assert read(ABILITIES.replace("Neutral", word), VITALS)[ALIGNMENT] == alignment


@pytest.mark.parametrize(
    "place, depth, level",
    [("Dlvl:1", 1, 0), ("Dlvl:50", 50, 0), ("Dl:7", 7, 0), ("Dl:23", 23, 0), ("Home 1", 0, 1), ("Home 7", 0, 7), ("Fort Ludios", 0, 0),
     ("Earth", -1, 0), ("Air", -2, 0), ("Fire", -3, 0), ("Water", -4, 0), ("Astral Plane", -5, 0)],
)  # fmt: skip
def test_places(place, depth, level):
    blstats = read(ABILITIES, VITALS.replace("Dlvl:1", place).replace("$:0", "$:99"))
    assert (blstats[DEPTH], blstats[DUNGEON_LEVEL], blstats[GOLD], blstats[HP_MAX]) == (depth, level, 99, 14)


def test_gold_on_the_rogue_level():
    assert read(ABILITIES, "Dlvl:16 *:250 HP:14(14) Pw:4(4) AC:4 Xp:1/0 T:1")[GOLD] == 250


def test_polymorphed():
    blstats = read(ABILITIES, "Dlvl:1 $:0 HP:54(60) Pw:2(2) AC:-6 HD:12 T:77 Fly")
    assert blstats[[HP, HP_MAX, HIT_DICE, LEVEL, POINTS, TURN, CONDITION]].tolist() == [54, 60, 12, 0, 0, 77, 1 << 11]


# Words as NetHack writes them (botl.c, wintty.c), with the value that each stands for.
HUNGERS = {"Satiated": 0, "Hungry": 2, "Weak": 3, "Fainting": 4, "Fainted": 5}
LOADS = [("Burdened", "Burden", "Brd"), ("Stressed", "Stress", "Strs"), ("Strained", "Strain", "Strn"), ("Overtaxed", "Overtax", "Ovtx"),
         ("Overloaded", "Overload", "Ovld")]  # fmt: skip
CONDITIONS = [("Stone", "Ston", "Sto"), ("Slime", "Slim", "Slm"), ("Strngl", "Stngl", "Str"), ("FoodPois", "Fpois", "Poi"),
              ("TermIll", "Ill"), ("Blind", "Blnd", "Bl"), ("Deaf", "Def", "Df"), ("Stun", "St"), ("Conf", "Cnf", "Cf"),
              ("Hallu", "Hal", "Hl"), ("Lev", "Lv"), ("Fly", "Fl"), ("Ride", "Rid", "Rd")]  # fmt: skip


def test_status_words_one_by_one():
    for word, value in HUNGERS.items():
        assert read(ABILITIES, f"{VITALS} {word}")[[HUNGER, LOAD, CONDITION]].tolist() == [value, 0, 0], word
    for value, words in enumerate(LOADS, start=1):
        for word in words:
            assert read(ABILITIES, f"{VITALS} {word}")[[HUNGER, LOAD, CONDITION]].tolist() == [1, value, 0], word
    for bit, words in enumerate(CONDITIONS):
        for word in words:
            assert read(ABILITIES, f"{VITALS} {word}")[[HUNGER, LOAD, CONDITION]].tolist() == [1, 0, 1 << bit], word


@given(hunger=st.sampled_from([("", 1), *HUNGERS.items()]), load=st.integers(0, 5), bits=st.integers(0, 2**13 - 1),
       length=st.integers(0, 2))  # fmt: skip
def test_status_words_together(hunger, load, bits, length):
    """Any mixture of words, as far as the row holds them."""
    words = [hunger[0], LOADS[load - 1][length] if load else ""]
    words += [forms[min(length, len(forms) - 1)] for bit, forms in enumerate(CONDITIONS) if bits >> bit & 1]
    row = " ".join([VITALS, *filter(None, words)])
    if len(row) > COLS:
        row, bits = VITALS + f" {hunger[0]}", 0
        load = 0
    assert read(ABILITIES, row)[[HUNGER, LOAD, CONDITION]].tolist() == [hunger[1], load, bits]


@given(cut=st.integers(0, COLS))
def test_cut_off_rows(cut):
    """A row that ends early gives each number whole as it is or not at all, apart from the one that the cut goes through."""
    upper = read(ABILITIES[:cut], "")
    assert not upper[list(LOWER)].any()
    full = read(ABILITIES, "")
    if ABILITIES[:cut].endswith(("Neutral", "Neutral S:", "Neutral S:0")):
        assert (upper == full).all()
    row = "Dlvl:12 $:345 HP:23(38) Pw:6(7) AC:-8 Xp:9/2801 T:20417 Satiated Burdened Conf"
    full = read("", row)
    lower = read("", row[:cut])
    wrong = [place for place in LOWER if lower[place] not in (0, full[place])]
    assert set(wrong) <= {LEVEL, POINTS, TURN, HUNGER}  # what comes last
    if cut >= row.index(" Satiated"):
        assert (lower[[HP, HP_MAX, DEPTH, GOLD, ENERGY, ARMOR_CLASS, LEVEL, POINTS, TURN]]
                == full[[HP, HP_MAX, DEPTH, GOLD, ENERGY, ARMOR_CLASS, LEVEL, POINTS, TURN]]).all()  # fmt: skip


@given(upper=st.binary(max_size=COLS), lower=st.binary(max_size=COLS))
@settings(max_examples=300)
def test_any_bytes_are_read(upper, lower):
    read(upper.decode("latin-1"), lower.decode("latin-1"))


PIECES = st.sampled_from(["St:", "18/", "**", " ", ":", "Dlvl:", "Home ", "$:", "HP:", "(", ")", "Xp:", "HD:", "T:", "-", "Neutral",
                          "Astral Plane", "99999999999999999999", "1", "Conf", "\xff", "\x00"])  # fmt: skip


@given(upper=st.lists(PIECES, max_size=30), lower=st.lists(PIECES, max_size=30))
@settings(max_examples=300)
def test_any_mixture_of_pieces_is_read(upper, lower):
    read("".join(upper), "".join(lower))


def test_numbers_too_large_for_32_bits():
    """No game shows them, but a damaged recording might."""
    blstats = read(ABILITIES.replace("Dx:11", "Dx:99999999999"), "Dlvl:1 $:99999999999 HP:1(9999999999) Pw:4(4) AC:-9999999999 Xp:1/0 T:1")
    assert blstats[[DEXTERITY, GOLD, HP_MAX]].tolist() == [2**31 - 1] * 3
    assert blstats[ARMOR_CLASS] == -(2**31)


def test_frames_do_not_depend_on_each_other():
    """A reader remembers rows; what it saw before must not show, also after it has forgotten."""
    rows = [(ABILITIES, VITALS.replace("T:1", f"T:{turn}")) for turn in range(40)] + [("", VITALS), (ABILITIES, ""), ("", "")]
    chars = np.full((len(rows), ROWS, COLS), ord(" "), np.uint8)
    for frame, texts in enumerate(rows):
        for row, text in zip((22, 23), texts):
            chars[frame, row, : len(text)] = np.frombuffer(text.encode(), np.uint8)
    alone = np.stack([read(*texts) for texts in rows])
    reader = StatusReader()
    reader.MEMORY = 16
    order = np.random.default_rng(0).permutation(len(rows))
    for _ in range(3):
        assert (reader(chars) == alone).all()
        assert (reader(chars[order]) == alone[order]).all()
    assert reader(chars[:0]).shape == (0, NUM_BLSTATS)
