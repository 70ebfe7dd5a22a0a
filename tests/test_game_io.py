"""The game as it is played, and as it is read back from its recording: the same screens, actions and rewards."""

import os
from pathlib import Path

import nle.dataset as nld
import numpy as np
import pytest
from nle import nethack

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import (
    BLOCK,
    NO_ACTION,
    NO_PROGRESS_STEPS,
    NUM_ACTIONS,
    ChunkLoader,
    Games,
    NetHackGame,
)

OBSERVATIONS = {"tty_chars": "chars", "tty_colors": "colors", "tty_cursor": "cursor", "blstats": "blstats"}  # and in a store's block
ACTION_OF_KEY = {int(action): index for index, action in enumerate(nethack.ACTIONS)}  # of two actions with one key, the last


def keys(text):
    return [ACTION_OF_KEY[ord(key)] for key in text]


SPACE, ESC, YES, SEARCH = keys(" \x1by" + "s")
PRAY, QUIT = ACTION_OF_KEY[int(nethack.Command.PRAY)], ACTION_OF_KEY[int(nethack.Command.QUIT)]
MOVES = keys("hjklyubnHJKLYUBN")
COMMANDS = (nethack.Command.ATTRIBUTES, nethack.Command.OVERVIEW, nethack.Command.EXTCMD)
MENUS = keys("i\\+DdaewPWTRrqztf^:;/,@_") + [ACTION_OF_KEY[int(command)] for command in COMMANDS]

EIGHT_BIT = [index for index, action in enumerate(nethack.ACTIONS) if int(action) >= 128]

# -- players: (rng, text of the screen, step) -> action ----------------------------------------------------------------


def any_key(rng, text, step):
    """Any of the 121 actions, 8-bit characters typed at prompts among them."""
    return int(rng.integers(NUM_ACTIONS))


def explorer(rng, text, step):
    if b"--More--" in text:
        return SPACE
    return int(rng.choice(MOVES + [SEARCH, *keys(">F"), ESC]))


def menu_reader(rng, text, step):
    """Opens menus and turns their pages, so that the status lines are hidden again and again."""
    return int(rng.choice(MENUS)) if step % 3 == 0 else int(rng.choice([SPACE, *keys(">"), ESC, SEARCH]))


def spacer(rng, text, step):
    """Presses SPACE from the very first frame on, as NLE does before it: the reader must tell them apart."""
    return SPACE if step < 12 or rng.random() < 0.6 else int(rng.choice(MOVES))


def believer(rng, text, step):
    """Prays until the god has had enough, and answers everything with SPACE, as NLE does after death."""
    if b"[yn]" in text:
        return YES
    return SPACE if b"--More--" in text or b"(end)" in text or step == 0 else PRAY


def quitter(rng, text, step):
    """Keeps its word: whatever is open, it gets out and ends the game."""
    return [ESC, ESC, QUIT, YES][step % 4]


def typist(rng, text, step):
    """Writes 8-bit characters into the dust: what a player types is shown, and stands in the recording."""
    if b"write in the dust here?" in text:
        return int(rng.choice(EIGHT_BIT)) if step % 40 else ESC
    if b"What do you want to write with?" in text:
        return keys("-")[0]
    return SPACE if b"--More--" in text else keys("E")[0]


class Played:
    """A game with all that the player saw, did and was given."""

    def __init__(self, game, player, seed, then_quit=True):
        rng = np.random.default_rng(seed)
        self.obs, self.actions, self.rewards = [], [], []
        obs, done, step = game.reset(seed, seed + 1), False, 0
        while not done:
            obs, done = self.take(game, obs, player(rng, obs["tty_chars"].tobytes(), step))
            step += 1
        self.end = self.info["end"]
        step = 0
        while then_quit and self.info["end"] != "died":  # cut by a limit; only a game that is over gets its line in the xlogfile
            obs, _ = self.take(game, obs, quitter(rng, None, step))
            step += 1
            assert step < 200, "the game cannot be quit"
        self.terminal = obs
        self.score_on_screen = int(game.last_blstats[9])

    def take(self, game, obs, action):
        self.obs.append(obs)
        self.actions.append(action)
        obs, reward, done, self.info = game.step(action)
        self.rewards.append(reward)
        return obs, done


GAMES = [("mon-hum-neu", any_key, 0, 1200), ("val-hum-neu", explorer, 1, 1500), ("ran-hum-neu", menu_reader, 2, 600),
         ("mon-hum-neu", believer, 3, 2000), ("val-hum-neu", believer, 4, 2000), ("ran-hum-neu", believer, 5, 2000),
         ("wiz-elf-cha", quitter, 6, 100), ("val-hum-neu", spacer, 7, 150), ("ran-hum-neu", explorer, 8, 1500),
         ("wiz-elf-cha", any_key, 9, 1200), ("mon-hum-neu", explorer, 10, 1), ("wiz-elf-cha", believer, 11, 2000),
         ("mon-hum-neu", typist, 12, 300)]  # fmt: skip


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Folder with the games' recordings, and {name of a game's folder: Played}."""
    root, played = tmp_path_factory.mktemp("recordings"), {}
    for character, player, seed, max_steps in GAMES:
        name = f"{character}-{player.__name__}-{seed}"
        game = NetHackGame(character, savedir=str(root / name), max_steps=max_steps)
        try:
            played[name] = Played(game, player, seed)
        finally:
            game.close()
    return root, played


@pytest.fixture(scope="module")
def stores(recordings, tmp_path_factory):
    root, _ = recordings
    path = str(tmp_path_factory.mktemp("stores"))
    return {character: pomdp.open_or_build_store(str(root), path, character) for character in sorted({game[0] for game in GAMES})}


def test_the_games_end_in_different_ways(recordings):
    _, played = recordings
    assert {game.end for game in played.values()} == {"died", "step limit"}
    for (_, player, _, _), game in zip(GAMES, played.values()):
        if player in (believer, quitter):
            assert game.end == "died"
    frames = sum(len(game.actions) for game in played.values())
    hidden = sum(not obs["blstats"].any() for game in played.values() for obs in game.obs)
    assert frames > 4000 and hidden > 0.02 * frames


def test_every_game_is_found_and_whole(recordings, stores):
    _, played = recordings
    read = {str(name).split("/")[0]: int(frames) for store in stores.values() for name, frames in zip(store.names, store.frames)}
    assert read == {name: len(game.actions) for name, game in played.items()}
    for store in stores.values():
        assert store.meta["skipped"] == store.meta["passed_over"] == [] and store.meta["unknown_keys"] == 0


def test_frames_read_back_equal_the_frames_played(recordings, stores):
    """Observations, actions and rewards, frame by frame, from the first the player saw to the last it acted on."""
    _, played = recordings
    compared = 0
    for store in stores.values():
        for game in range(len(store)):
            name = str(store.names[game]).split("/")[0]
            live = played[name]
            blocks = [store.block(game, number) for number in range(-(-int(store.frames[game]) // BLOCK))]
            for ours, theirs in OBSERVATIONS.items():
                read = np.concatenate([getattr(block, theirs) for block in blocks])
                seen = np.stack([obs[ours] for obs in live.obs])
                assert read.shape == seen.shape and read.dtype == seen.dtype
                wrong = np.argwhere(read != seen)
                assert not len(wrong), (name, ours, wrong[:5], read[tuple(wrong[0])], seen[tuple(wrong[0])])
            actions = np.concatenate([block.actions for block in blocks]).tolist()
            assert actions == [ACTION_OF_KEY[int(nethack.ACTIONS[action])] for action in live.actions], name
            rewards = np.zeros(len(live.rewards))
            at, values = store.rewards(game)
            rewards[at] = values
            assert rewards.tolist() == live.rewards, name
            compared += len(live.rewards)
    assert compared == sum(len(live.actions) for live in played.values())


def test_batches_show_the_network_what_it_sees_in_the_game(recordings, stores):
    """The same through the loader: the tensors of a batch against the arrays of the game, the previous action included."""
    _, played = recordings
    character, player, seed, _ = GAMES[0]
    store = stores[character]
    number = next(game for game in range(len(store)) if str(store.names[game]).startswith(f"{character}-{player.__name__}-{seed}/"))
    live = played[f"{character}-{player.__name__}-{seed}"]
    loader = ChunkLoader(Games([store]), [number], 1, 32, None, 1.0, 1e9)
    previous = [NO_ACTION, *(ACTION_OF_KEY[int(nethack.ACTIONS[action])] for action in live.actions)]
    for step in range(loader.plan.steps):
        batch, first = loader.batch_at(step), 32 * step
        for t in range(min(33, len(live.actions) - first)):
            for name in OBSERVATIONS:
                assert (batch[name][0, t].numpy() == live.obs[first + t][name]).all()
            assert batch["actions"][0, t] == previous[first + t + 1]
            assert batch["rewards"][0, t] == live.rewards[first + t]
            assert batch["dones"][0, t] == (first + t == len(live.actions) - 1)
            assert batch["mask"][0, t]
        assert batch["prev_actions"][0, 0] == previous[first]


def test_nle_dataset_finds_the_games(recordings, tmp_path):
    """What we record is NLD-AA's layout."""
    root, played = recordings
    database = str(tmp_path / "ttyrecs.db")
    nld.db.create(database)
    nld.add_nledata_directory(str(root), "played", database)
    dataset = nld.TtyrecDataset("played", batch_size=1, dbfilename=database)
    assert sorted(Path(path).parent.name for gameid in dataset._gameids for path in dataset.get_paths(gameid)) == sorted(played)


def test_score_depth_and_turns(recordings):
    """What a game reports at its end, against its rewards, its screen and NLE's own log of it."""
    root, played = recordings
    for name, game in played.items():
        info = game.info
        assert info["score"] == sum(game.rewards) == game.score_on_screen
        assert info["length"] == len(game.actions)
        assert {type(info[key]) for key in ("score", "depth", "turns", "length")} == {int}
        xlog = dict(pair.split("=", 1) for pair in next((root / name).glob("*.xlogfile")).read_text().strip().split("\t"))
        assert info["depth"] == int(xlog["deathlev"])  # the frame of game over has no status any more
        assert 1 <= info["turns"] <= int(xlog["turns"]) < info["turns"] + 30  # the last action may take some
        assert not game.terminal["blstats"].any()
    assert any(game.info["score"] > 0 for game in played.values())


def test_cut_game_leaves_no_line(tmp_path):
    """A game that a limit cuts is not over for NLE: no reader takes its recording for a whole game."""
    game = NetHackGame("val-hum-neu", savedir=str(tmp_path / "cut"), max_steps=50)
    played = Played(game, explorer, 0, then_quit=False)
    game.close()
    assert played.end == "step limit" and len(played.actions) == 50
    assert any(path.name.endswith(".ttyrec3.bz2") for path in (tmp_path / "cut").iterdir())
    with pytest.raises(pomdp.UserError, match="no games of val-hum-neu"):
        pomdp.open_or_build_store(str(tmp_path), str(tmp_path / "stores"), "val-hum-neu")


def test_several_games_of_one_env_are_recorded_apart(tmp_path):
    """One after another into one folder, as NLD-AA was made; the one in the middle was cut and is left out."""
    game, played = NetHackGame("val-hum-neu", savedir=str(tmp_path / "games"), max_steps=300), []
    for number, player in enumerate((quitter, explorer, believer)):
        played.append(Played(game, player, number, then_quit=False))
    game.close()
    assert [one.end for one in played] == ["died", "step limit", "died"]
    store = pomdp.open_or_build_store(str(tmp_path), str(tmp_path / "stores"), "val-hum-neu")
    assert store.frames.tolist() == [len(played[0].actions), len(played[2].actions)]
    assert (store.block(1, 0).chars[0] == played[2].obs[0]["tty_chars"]).all()


# -- the game ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def game():
    game = NetHackGame("val-hum-neu", max_steps=400)
    yield game
    game.close()


def assert_same_game(one, other):
    assert one.actions == other.actions and one.rewards == other.rewards and one.end == other.end
    for obs, other_obs in zip([*one.obs, one.terminal], [*other.obs, other.terminal]):
        for name in OBSERVATIONS:
            assert (obs[name] == other_obs[name]).all()
    own = ("score", "depth", "turns", "length", "end")
    assert [one.info[key] for key in own] == [other.info[key] for key in own]


@pytest.mark.parametrize("player", [any_key, believer])
def test_seeds_make_the_game(game, player):
    """The same seeds give the same game, whatever was played before, and in another environment too."""
    first = Played(game, player, 7, then_quit=False)
    other = Played(game, player, 8, then_quit=False)
    again = Played(game, player, 7, then_quit=False)
    assert_same_game(first, again)
    assert any((one["tty_chars"] != two["tty_chars"]).any() for one, two in zip(first.obs, other.obs))
    elsewhere = NetHackGame("val-hum-neu", max_steps=400)
    try:
        assert_same_game(first, Played(elsewhere, player, 7, then_quit=False))
    finally:
        elsewhere.close()


def test_both_seeds_count(game):
    """The core seed makes the dungeon. The display's own makes what is shown by chance alone, and must be given with it."""
    screens = {seeds: game.reset(*seeds)["tty_chars"].tobytes() for seeds in [(1, 1), (2, 1), (1, 2), (2, 2)]}
    assert screens[1, 1] != screens[2, 1] and screens[1, 2] != screens[2, 2]


def test_observations_are_the_callers_own(game):
    """NLE writes each frame into the same arrays. What a caller keeps stays as it was, the last frame of a game too."""
    first = Played(game, believer, 3, then_quit=False)
    frames = [*first.obs, first.terminal]
    copies = [{name: obs[name].copy() for name in OBSERVATIONS} for obs in frames]
    Played(game, any_key, 4, then_quit=False)
    for obs, copy in zip(frames, copies):
        for name in OBSERVATIONS:
            assert (obs[name] == copy[name]).all()
    assert len({id(obs[name]) for obs in frames for name in OBSERVATIONS}) == len(frames) * len(OBSERVATIONS)
    # The other way round: what a caller writes does not get into the game.
    rng, obs = np.random.default_rng(3), game.reset(3, 4)
    for step, (action, expected) in enumerate(zip(first.actions, frames[1:])):
        for name in OBSERVATIONS:
            obs[name][...] = rng.integers(0, 100)
        obs, *_ = game.step(action)
        assert all((obs[name] == expected[name]).all() for name in OBSERVATIONS), step


def test_observations_have_their_types(game):
    obs = game.reset(1, 2)
    shapes = {"tty_chars": (24, 80), "tty_colors": (24, 80), "tty_cursor": (2,), "blstats": (27,)}
    types = {"tty_chars": np.uint8, "tty_colors": np.int8, "tty_cursor": np.uint8, "blstats": np.int32}
    for seen in (obs, game.step(SEARCH)[0]):
        assert {name: values.shape for name, values in seen.items()} == shapes
        assert {name: values.dtype for name, values in seen.items()} == types


@pytest.fixture
def patient_game():
    game = NetHackGame("val-hum-neu")
    yield game
    game.close()


def steps_until_done(game, actions):
    """Number of steps until the game is done, and its info."""
    for count, action in enumerate(actions, start=1):
        _, reward, done, info = game.step(action)
        assert reward == 0
        if done:
            return count, info
    return None, {}


def test_no_progress(patient_game):
    """1,000 steps without a turn, neither more nor less, on every version of NLE; a turn in between starts the count again."""
    assert NO_PROGRESS_STEPS == 1000
    game = patient_game
    game.reset(1, 2)
    count, info = steps_until_done(game, [ESC] * 2000)
    assert count == 1000
    assert (info["end"], info["length"], info["turns"], info["score"], info["depth"]) == ("no progress", 1000, 1, 0, 1)
    # Menus, questions and unknown commands take no turn either.
    game.reset(1, 2)
    count, info = steps_until_done(game, (keys("i") + [ESC] + keys("d") + [ESC, SPACE]) * 400)
    assert count == 1000 and info["end"] == "no progress"
    # Turns: at the 600th step, and at the last moment. (Valkyries are as fast as the clock: every search takes a turn.)
    game.reset(3, 4)
    count, info = steps_until_done(game, [ESC] * 599 + [SEARCH] + [ESC] * 999 + [SEARCH] + [ESC] * 2000)
    assert count == 600 + 1000 + 1000
    assert (info["end"], info["length"], info["turns"]) == ("no progress", 2600, 3)


def test_no_progress_is_forgotten_at_a_new_game(patient_game):
    """999 idle steps of a game that was left do not count in the next."""
    patient_game.reset(1, 2)
    assert steps_until_done(patient_game, [ESC] * 999) == (None, {})
    patient_game.reset(1, 2)
    assert steps_until_done(patient_game, [ESC] * 2000)[0] == 1000


@pytest.mark.parametrize("limit", [1, 7, 300])
def test_step_limit(limit):
    game = NetHackGame("mon-hum-neu", max_steps=limit)
    try:
        for seed in (1, 2):  # each game has the whole limit
            game.reset(seed, seed)
            count, info = steps_until_done(game, [SEARCH] * 1000)
            assert count == limit
            assert (info["end"], info["length"]) == ("step limit", limit)
            assert info["turns"] == game.last_blstats[20] > limit * 0.5
    finally:
        game.close()


def test_a_game_in_progress_reports_nothing_final(game):
    game.reset(5, 6)
    for _ in range(20):
        _, reward, done, info = game.step(SEARCH)
        assert not done and isinstance(reward, float)
        assert not {"score", "depth", "turns", "length", "end"} & set(info)


def test_character_is_the_one_asked_for():
    for character, rank in (("mon-hum-neu", "Candidate"), ("val-hum-neu", "Stripling"), ("ran-hum-neu", "Tenderfoot")):
        game = NetHackGame(character)
        try:
            row = game.reset(1, 1)["tty_chars"][22].tobytes().decode()
        finally:
            game.close()
        assert rank in row and "Neutral" in row


def test_without_savedir_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    game = NetHackGame("val-hum-neu", max_steps=20)
    Played(game, explorer, 1, then_quit=False)
    game.close()
    assert os.listdir(tmp_path) == []
