# SPDX-License-Identifier: MIT
"""The game as it is played, and as it is read back from its recording: the same screens, actions
and rewards."""

import contextlib
import ctypes
import inspect
import os
import re
import signal
from pathlib import Path

import nle.dataset as nld
import numpy as np
import pytest
from nle import nethack
from nle.env.base import NLE
from nle.env.tasks import NetHackScore

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import (
    BLOCK,
    KEY_TO_ACTION,
    NO_ACTION,
    NUM_ACTIONS,
    OBSERVATIONS,
    NetHackGame,
)


def keys(text):
    return KEY_TO_ACTION[list(text.encode())].tolist()


def same_key(actions):
    """Three keys have two actions each: the index that the recording's reader takes."""
    return [int(KEY_TO_ACTION[int(nethack.ACTIONS[action])]) for action in actions]


SPACE, ESC, YES, SEARCH = keys(" \x1bys")
PRAY, QUIT = (int(KEY_TO_ACTION[int(key)]) for key in (nethack.Command.PRAY, nethack.Command.QUIT))
MOVES = keys("hjklyubnHJKLYUBN")
COMMANDS = (nethack.Command.ATTRIBUTES, nethack.Command.OVERVIEW, nethack.Command.EXTCMD)
MENUS = keys("i\\+DdaewPWTRrqztf^:;/,@_") + [
    int(KEY_TO_ACTION[int(command)]) for command in COMMANDS
]
EIGHT_BIT = [index for index, action in enumerate(nethack.ACTIONS) if int(action) >= 128]


# --- players: (rng, text of the screen, step) -> action
def any_key(rng, text, step):
    """Any of the 121 actions, 8-bit characters typed at prompts among them."""
    return int(rng.integers(NUM_ACTIONS))


def explorer(rng, text, step):
    return SPACE if b"--More--" in text else int(rng.choice(MOVES + [SEARCH, *keys(">F"), ESC]))


def menu_reader(rng, text, step):
    """Opens menus and turns their pages, so that the status lines are hidden again and again."""
    return (
        int(rng.choice(MENUS))
        if step % 3 == 0
        else int(rng.choice([SPACE, *keys(">"), ESC, SEARCH]))
    )


def spacer(rng, text, step):
    """Presses SPACE from the very first frame on, as NLE does before it: the reader must tell them
    apart."""
    return SPACE if step < 12 or rng.random() < 0.6 else int(rng.choice(MOVES))


def believer(rng, text, step):
    """Prays until the god has had enough, and answers everything with SPACE, as NLE does after
    death."""
    if b"[yn]" in text:
        return YES
    return SPACE if b"--More--" in text or b"(end)" in text or step == 0 else PRAY


def quitter(rng, text, step):
    """Keeps its word: whatever is open, it gets out and ends the game."""
    return [ESC, ESC, QUIT, YES][step % 4]


def typist(rng, text, step):
    """Writes 8-bit characters into the dust: what a player types is shown, and stands in the
    recording."""
    if b"write in the dust here?" in text:
        return int(rng.choice(EIGHT_BIT)) if step % 40 else ESC
    if b"What do you want to write with?" in text:
        return keys("-")[0]
    return SPACE if b"--More--" in text else keys("E")[0]


def result_of(game):
    """What an evaluation keeps of a game that has ended."""
    return game.result(0)._asdict()


class Played:
    """A game with all that the player saw, did and was given."""

    def __init__(self, game, player, seed, then_quit=True):
        rng, self.obs, self.actions, self.rewards = np.random.default_rng(seed), [], [], []
        obs, done, step = game.reset(seed, seed + 1), False, 0
        while not done:
            obs, done = self.take(game, obs, player(rng, obs["tty_chars"].tobytes(), step))
            step += 1
        self.end, step = self.info["end"], 0
        while (
            then_quit and self.info["end"] != "died"
        ):  # only a game that is over gets its line in the xlogfile
            obs, _ = self.take(game, obs, quitter(rng, None, step))
            step += 1
            assert step < 200, "the game cannot be quit"
        self.terminal = obs

    def take(self, game, obs, action):
        env = game.env.unwrapped
        self.score_on_screen = int(env.last_observation[env._blstats_index][9])  # NLE's own
        self.obs.append(obs)
        self.actions.append(action)
        obs, reward, done, _ = game.step(action)
        self.info = result_of(game)
        self.rewards.append(reward)
        return obs, done


GAMES = """mon-hum-neu any_key 0 1200, val-hum-neu explorer 1 1500, ran-hum-neu menu_reader 2 600,
mon-hum-neu believer 3 2000, val-hum-neu believer 4 2000, ran-hum-neu believer 5 2000, wiz-elf-cha quitter 6 100,
val-hum-neu spacer 7 150, ran-hum-neu explorer 8 1500, wiz-elf-cha any_key 9 1200, mon-hum-neu explorer 10 1,
wiz-elf-cha believer 11 2000, mon-hum-neu typist 12 300"""  # noqa: E501


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Folder with the games' recordings, and {name of a game's folder: Played}."""
    root, played = tmp_path_factory.mktemp("recordings"), {}
    for character, player, seed, max_steps in map(str.split, GAMES.split(",")):
        name = f"{character}-{player}-{seed}"
        game = NetHackGame(character, savedir=str(root / name), max_steps=int(max_steps))
        played[name] = Played(game, globals()[player], int(seed))
        game.close()
    return root, played


def forget_quitting(root):
    """Games of which the log says that they were quit are read without the keys that did it."""
    for log in root.rglob("*.xlogfile"):
        log.write_text(log.read_text().replace("death=quit", "death=tested"))


@pytest.fixture(scope="module")
def stores(recordings, tmp_path_factory):
    forget_quitting(recordings[0])
    characters = sorted({name[:11] for name in recordings[1]})
    path = str(tmp_path_factory.mktemp("stores"))
    return [
        pomdp.open_or_build_store(str(recordings[0]), path, character) for character in characters
    ]


def test_frames_read_back_equal_the_frames_played(recordings, stores):
    """Every game, from the first frame the player saw to the last it acted on: observations,
    actions and rewards."""
    left = dict(recordings[1])
    assert {game.end for game in left.values()} == {"died", "step limit"}
    hidden = [not obs["blstats"].any() for game in left.values() for obs in game.obs]
    assert len(hidden) > 4000 and np.mean(hidden) > 0.02
    for store in stores:
        assert (
            len(store.index["skipped"])
            == len(store.index["passed_over"])
            == store.index["unknown_keys"].sum()
            == 0
        )
        for game, name in enumerate(store.names):
            live = left.pop(str(name).split("/")[0])
            blocks = [
                store.block(game, number) for number in range(-(-int(store.frames[game]) // BLOCK))
            ]
            for plane in OBSERVATIONS:
                read = np.concatenate([block[plane] for block in blocks])
                seen = np.stack([obs[plane] for obs in live.obs])
                assert read.shape == seen.shape and read.dtype == seen.dtype
                wrong = np.argwhere(read != seen)
                assert not len(wrong), (
                    name,
                    plane,
                    wrong[:5],
                    read[tuple(wrong[0])],
                    seen[tuple(wrong[0])],
                )
            assert np.concatenate([block["actions"] for block in blocks]).tolist() == same_key(
                live.actions
            ), name
            rewards, (at, values) = np.zeros(len(live.rewards)), store.rewards(game)
            rewards[at] = values
            assert rewards.tolist() == live.rewards, name
    assert not left


def test_batches_show_the_network_what_it_sees_in_the_game(recordings, stores):
    """The same through the loader: the tensors of a batch against the arrays of the game, the
    previous action too."""
    store = next(store for store in stores if str(store.index["character"]) == "mon-hum-neu")
    number = next(number for number, name in enumerate(store.names) if "any_key" in str(name))
    live, config = (
        recordings[1]["mon-hum-neu-any_key-0"],
        pomdp.TrainConfig(seq_len=32, clip_range=1e9),
    )
    loader = pomdp.ChunkLoader(pomdp.Games([store]), [number], config, 1, 1.0)
    previous = [NO_ACTION, *same_key(live.actions)]
    for step in range(loader.sampler.steps):
        batch, prev_actions = loader.batch_at(step)
        first = 32 * step
        for t in range(min(33, len(live.actions) - first)):
            assert all(
                (batch[name][0, t].numpy() == live.obs[first + t][name]).all()
                for name in OBSERVATIONS
            )
            assert batch["actions"][0, t] == previous[first + t + 1] and batch["mask"][0, t]
            assert batch["rewards"][0, t] == live.rewards[first + t]
            assert batch["dones"][0, t] == (first + t == len(live.actions) - 1)
        assert prev_actions[0, 0] == previous[first]


def test_nle_dataset_finds_the_games(recordings, tmp_path):
    """What we record is NLD-AA's layout."""
    root, played = recordings
    database = str(tmp_path / "ttyrecs.db")
    nld.db.create(database)
    nld.add_nledata_directory(str(root), "played", database)
    dataset = nld.TtyrecDataset("played", batch_size=1, dbfilename=database)
    paths = [path for gameid in dataset._gameids for path in dataset.get_paths(gameid)]
    assert sorted(Path(path).parent.name for path in paths) == sorted(played)


def test_score_depth_and_turns(recordings):
    """What a game reports at its end, against its rewards, its screen and NLE's own log of it."""
    for name, game in recordings[1].items():
        info, (xlog,) = (
            game.info,
            pomdp.parse_xlogfile(next((recordings[0] / name).glob("*.xlogfile"))),
        )
        assert info["score"] == sum(game.rewards) == game.score_on_screen and info["length"] == len(
            game.actions
        )
        assert info["cause"] in (xlog["death"], "quit"), "of NetHack's own log"
        assert info["max_depth"] == int(xlog["maxlvl"])
        assert {type(info[key]) for key in ("score", "depth", "turns", "length")} == {int}
        assert xlog["starttime"] == "0"  # the clock does not enter the game
        assert info["depth"] == int(
            xlog["deathlev"]
        )  # the frame of game over has no status any more
        assert (
            1 <= info["turns"] <= int(xlog["turns"]) < info["turns"] + 30
        )  # the last action may take some
        assert not game.terminal["blstats"].any()
    assert any(game.info["score"] > 0 for game in recordings[1].values())


def test_several_games_of_one_env_are_recorded_apart(tmp_path):
    """One after another into one folder, as NLD-AA was made. Cut by a limit a game is not over for
    NLE: left out."""
    game, played = NetHackGame("val-hum-neu", savedir=str(tmp_path / "games"), max_steps=300), []
    for number, player in enumerate((explorer, quitter, explorer, believer)):
        played.append(Played(game, player, number, then_quit=False))
        if not number:
            assert any(
                path.name.endswith(".ttyrec3.bz2") for path in (tmp_path / "games").iterdir()
            )
            with pytest.raises(pomdp.UserError, match="no games of val-hum-neu"):
                pomdp.find_games(str(tmp_path), "val-hum-neu")
    game.close()
    assert [one.end for one in played] == ["step limit", "died", "step limit", "died"]
    forget_quitting(tmp_path)
    store = pomdp.open_or_build_store(str(tmp_path), str(tmp_path / "stores"), "val-hum-neu")
    assert store.frames.tolist() == [len(played[1].actions), len(played[3].actions)]
    assert (store.block(1, 0)["tty_chars"][0] == played[3].obs[0]["tty_chars"]).all()


# --- the game
@pytest.fixture
def make_game():
    """NetHackGame whose games are closed after the test."""
    games = []
    yield (
        lambda *arguments, **options: games.append(NetHackGame(*arguments, **options)) or games[-1]
    )
    for game in games:
        game.close()


def everything(game):
    """Of a Played, comparable."""
    screens = [obs[name].tobytes() for obs in [*game.obs, game.terminal] for name in OBSERVATIONS]
    return (
        game.actions,
        game.rewards,
        screens,
        [game.info[key] for key in pomdp.GameResult._fields[1:]],
    )


@pytest.mark.parametrize("player", [any_key, believer])
def test_seeds_make_the_game(make_game, player):
    """The same seeds give the same game, whatever was played before, and in another environment
    too."""
    game = make_game("val-hum-neu", max_steps=400)
    first, other, again = (
        everything(Played(game, player, seed, then_quit=False)) for seed in (7, 8, 7)
    )
    assert first == again and first[2] != other[2]
    assert (
        everything(Played(make_game("val-hum-neu", max_steps=400), player, 7, then_quit=False))
        == first
    )


# --- wizard mode reaches shops quickly: keys that go to a level, and to a random place on it
LEVELS = ["\x16" + level + "\r  \x1b" for level in "234"]  # ^V asks which
TELEPORT = "\x14" + 10 * "H" + ".  "  # ^T asks where to: into the rock, so anywhere


def visit_levels(seed, birthday, after_reset):
    """Screens of a game that began at the clock's time `birthday`, as NLE's own reset leaves it, or
    set after ours."""
    typed = {key: index for index, key in enumerate(dict.fromkeys("".join([*LEVELS, TELEPORT])))}
    with contextlib.closing(NetHackGame("mon-hum-neu")) as game:
        game.env.close()
        options = dict(
            actions=tuple(map(ord, typed)),
            observation_keys=OBSERVATIONS,
            wizard=True,
            save_ttyrec_every=0,
        )
        if "fix_moon_phase" in inspect.signature(NLE.__init__).parameters:
            options["fix_moon_phase"] = True
        game.env = NetHackScore(
            character="mon-hum-neu", allow_all_yn_questions=True, allow_all_modes=True, **options
        )
        own_reset = game.env.reset

        def set_clock():
            library = ctypes.CDLL(game.env.unwrapped.nethack.dlpath)
            ctypes.c_long.in_dll(library, "ubirthday").value = birthday
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))

        def reset_at_birthday():
            first = own_reset()
            set_clock()
            return first

        game.env.reset = reset_at_birthday
        screens = [game.reset(seed, seed + 1)["tty_chars"].copy()]
        if after_reset:
            set_clock()
        for level in LEVELS:
            screens += [
                game.step(typed[key])[0]["tty_chars"].copy() for key in level + 25 * TELEPORT
            ]
    return np.stack(screens)


def test_games_do_not_depend_on_the_clock():
    """NetHack names shopkeepers by the time at which the game began, and the game goes on
    accordingly."""
    now, minutes, year = (1_000_000_000 + seconds for seconds in (0, 600, 31_536_000))
    seeds = (1, 3, 7, 35)
    assert any(
        (visit_levels(seed, now, True) != visit_levels(seed, year, True)).any() for seed in seeds
    )
    for seed in seeds:
        first = visit_levels(seed, now, False)
        assert (first == visit_levels(seed, minutes, False)).all()
        assert (first == visit_levels(seed, year, False)).all()


def test_observations_are_the_callers_own_and_have_their_types(make_game):
    """NLE writes each frame into the same arrays: what a caller keeps stays, what it writes does
    not reach the game."""
    game, rng = make_game("val-hum-neu", max_steps=400), np.random.default_rng(3)
    first = Played(game, believer, 3, then_quit=False)
    frames, before = [*first.obs, first.terminal], everything(first)
    Played(game, any_key, 4, then_quit=False)
    assert everything(first) == before
    obs = game.reset(3, 4)
    for action, expected in zip(first.actions, frames[1:]):
        for name, (kind, *shape) in pomdp.OBSERVATION_SHAPES.items():
            assert obs[name].dtype == kind and obs[name].shape == tuple(shape)
            obs[name][...] = rng.integers(0, 100)
        obs, *_ = game.step(action)
        assert all((obs[name] == expected[name]).all() for name in OBSERVATIONS)
    into = {
        name: np.zeros(shape, kind) for name, (kind, *shape) in pomdp.OBSERVATION_SHAPES.items()
    }
    given = make_game("val-hum-neu", into=into).reset(3, 4)
    assert all(
        given[name] is into[name] and (given[name] == frames[0][name]).all()
        for name in OBSERVATIONS
    )


def until_done(game, actions):
    """Number of steps until the game is done, and its info."""
    for count, action in enumerate(actions, start=1):
        _, reward, done, _ = game.step(action)
        assert isinstance(reward, float) and done == (game.end in pomdp.ENDS)
        if done:
            return count, result_of(game)
    return None, {}


def ignored_signals():
    (line,) = re.findall(r"^SigIgn:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {number for number in signal.Signals if int(line, 16) >> (number - 1) & 1}


def test_signals_reach_the_process_after_a_game_is_over(make_game):
    """NetHack itself has a hang-up ignored from then on; a handler of ours is there again."""
    before = ignored_signals()
    noted = []
    handler = signal.signal(signal.SIGHUP, lambda number, _: noted.append(number))
    try:
        game = make_game("val-hum-neu")
        game.reset(1, 2)
        for key in (27, 27, int(nethack.Command.QUIT), ord("y")):
            _, _, done, _ = game.step(pomdp.KEY_TO_ACTION[key])
        assert done and ignored_signals() == before - {signal.SIGHUP}
        os.kill(os.getpid(), signal.SIGHUP)
        assert noted == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_no_progress(make_game):
    """1,000 steps without a turn, on every version of NLE; a turn in between, or a new game, starts
    the count again."""
    game = make_game("val-hum-neu")
    game.reset(1, 2)
    assert until_done(game, [ESC] * 999) == (None, {})
    game.reset(1, 2)
    count, info = until_done(game, [ESC] * 2000)
    expected = (0, 0, 1, 1, count, "no progress", 1, 1, "no progress")
    assert tuple(info.values()) == expected and count == 1000
    game.reset(1, 2)  # menus, questions and unknown commands take no turn either
    count, info = until_done(game, (keys("i") + [ESC] + keys("d") + [ESC, SPACE]) * 400)
    assert count == 1000 and info["end"] == "no progress"
    # Turns: at the 600th step, and at the last moment. (Valkyries are as fast as the clock: every
    # search takes a turn.)
    game.reset(3, 4)
    count, info = until_done(game, [ESC] * 599 + [SEARCH] + [ESC] * 999 + [SEARCH] + [ESC] * 2000)
    assert (info["end"], info["length"], info["turns"]) == ("no progress", 2600, 3)


def test_step_limit_and_the_end_of_a_game_at_the_same_step(make_game):
    for limit in (1, 2, 3, 300):
        game = make_game("mon-hum-neu", max_steps=limit)
        for _ in range(2):  # each game has the whole limit
            game.reset(1, 2)
            count, info = until_done(game, [SEARCH] * 1000)
            assert (count, info["end"], info["length"]) == (limit, "step limit", limit) and info[
                "turns"
            ] > limit * 0.5
        game.reset(1, 2)
        count, info = until_done(game, [QUIT, YES])
        assert info["end"] == ("step limit" if limit == 1 else "died") and info[
            "length"
        ] == count == min(limit, 2)


def test_character_is_the_one_asked_for_and_without_savedir_nothing_is_recorded(
    make_game, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for character, rank in (
        ("mon-hum-neu", "Candidate"),
        ("val-hum-neu", "Stripling"),
        ("ran-hum-neu", "Tenderfoot"),
    ):
        game = make_game(character, max_steps=20)
        row = Played(game, explorer, 1, then_quit=False).obs[0]["tty_chars"][22].tobytes().decode()
        assert rank in row and "Neutral" in row
    assert os.listdir(tmp_path) == []
