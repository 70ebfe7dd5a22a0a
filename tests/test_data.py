# SPDX-License-Identifier: MIT
"""Recorded games -> chunk store -> batches: against nle's own readers, against plain loops, and
with damaged input."""

import bz2
import errno
import fcntl
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import h5py
import nle.dataset as nld
import numpy as np
import pytest
import torch
from conftest import CHARACTERS, LIMIT_S, RECORDED
from hypothesis import given
from hypothesis import strategies as st
from nle import nethack
from nle.scripts.read_tty import ttyframes

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import (
    NO_ACTION,
    UNKNOWN_KEY,
    Games,
    GameStore,
    TrainConfig,
    UserError,
    open_or_build_store,
)

SCREEN = ("tty_chars", "tty_colors", "tty_cursor")
# Written out again: where two actions send the same key, the last one counts.
ACTION_OF_KEY = {int(action): index for index, action in enumerate(nethack.ACTIONS)}
SPACE = 32
DEPTH, TURN = 12, 20  # places in blstats


# -- helpers ---------------------------------------------------------------------------------------
def play_of(source):
    """The player's frames of a recorded game."""
    frames = pomdp.read_ttyrec(source.path)
    play = slice(pomdp.find_first_frame(frames), pomdp.find_end_of_play(frames))
    return pomdp.Frames(*(array[play] for array in frames))


def stored(store, game):
    """{name: array [n, ...]} of a game as the store gives it back."""
    blocks = [
        store.block(game, number) for number in range(-(-int(store.frames[game]) // pomdp.BLOCK))
    ]
    return {
        name: np.concatenate([block[name] for block in blocks]) for name in blocks[0].dtype.names
    }


def dense_rewards(store, game):
    """[n] unscaled rewards of a game."""
    rewards = np.zeros(int(store.frames[game]))
    at, values = store.rewards(game)
    rewards[at] = values
    return rewards


def batch_of(loader, step):
    """The batch of a step, prev_actions in it."""
    batch, prev_actions = loader.batch_at(step)
    return {**batch, "prev_actions": prev_actions}


def loader_of(games, rows, seq_len, scale=1.0, shuffle=True, **options):
    """Of all games."""
    config = TrainConfig(device="cpu", seq_len=seq_len, **options)
    chosen = np.arange(len(games.frames))
    return pomdp.ChunkLoader(games, chosen, config, rows, scale, shuffle)


def assert_same(batches, others):
    for batch, other in zip(batches, others):
        assert set(batch) == set(other)
        for name in batch:
            assert torch.equal(batch[name], other[name]), name


@pytest.fixture(scope="module")
def small(recorded_games):
    """A character, and its two smallest games: the quickest to read again and again."""
    by_size = {
        name: sorted(games, key=lambda game: game.size) for name, games in recorded_games.items()
    }
    character = min(by_size, key=lambda name: by_size[name][0].size)
    return character, by_size[character][:2]


def add_game(root, name, source, recording=None, **changes):
    """Lays a game out as NLD-AA does, with another recording or other values in its xlogfile line
    if given."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    file = f"nle.{len(list(folder.iterdir()))}.0.ttyrec3.bz2"
    (line,) = (log.read_text().strip() for log in Path(source.path).parent.glob("*.xlogfile"))
    values = {
        **dict(pair.split("=", 1) for pair in line.split("\t")),
        "ttyrecname": file,
        **changes,
    }
    with open(folder / "nle.1.xlogfile", "a") as log:
        log.write("\t".join(f"{key}={value}" for key, value in values.items()) + "\n")
    (folder / file).write_bytes(Path(source.path).read_bytes() if recording is None else recording)
    return folder / file


def key_offsets(plain):
    """Where each key's record begins in an uncompressed ttyrec3."""
    file = io.BytesIO(plain)
    return [file.tell() - len(data) - 13 for _, channel, data in ttyframes(file) if channel == 1]


def store_of(root, tmp_path, character):
    return open_or_build_store(str(root), str(tmp_path / "stores"), character)


# -- the readers -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """nle.dataset's reader of the recorded games, and {path of a recording: gameid}."""
    database = str(tmp_path_factory.mktemp("database") / "ttyrecs.db")
    nld.db.create(database)
    nld.add_nledata_directory(str(RECORDED), "recorded", database)
    dataset = nld.TtyrecDataset(
        "recorded", batch_size=1, seq_length=1000, dbfilename=database, shuffle=False
    )
    ids = {
        os.path.realpath(RECORDED / dataset.get_paths(gameid)[0]): gameid
        for gameid in dataset._gameids
    }
    return dataset, ids


@pytest.mark.parametrize("character", CHARACTERS)
def test_stores_hold_what_nle_s_readers_read(recorded_games, stores, dataset, character):
    """Frame by frame from the player's first to the last; what NLE itself played before and after
    is dropped."""
    store, sources = stores[character], recorded_games[character]
    assert store.names.tolist() == [source.name for source in sources]
    assert sum(map(len, recorded_games.values())) == len(dataset[1])
    for game, source in enumerate(sources):
        gameid = dataset[1][os.path.realpath(source.path)]
        meta, batches = dataset[0].get_meta(gameid), dataset[0].get_ttyrec(gameid, 1000)
        assert "-".join((meta["role"], meta["race"], meta["align0"])).lower() == character
        whole = {name: np.concatenate([batch[name][0] for batch in batches]) for name in batches[0]}
        length = int((whole["gameids"] != 0).sum())  # padding comes last
        whole = {name: values[:length] for name, values in whole.items()}
        with bz2.open(source.path) as file:  # nle's other reader knows no screens
            told = [(channel, data) for _, channel, data in ttyframes(file)]
        keys = [data[0] for channel, data in told if channel == 1]
        assert whole["keypresses"].tolist() == keys

        frames, n = stored(store, game), int(store.frames[game])
        same = (
            whole["tty_chars"][start : start + n] == frames["tty_chars"]
            for start in range(length - n + 1)
        )
        first = next(start for start, equal in enumerate(same) if equal.all())
        stop, play = first + n, slice(first, first + n)
        for name in SCREEN:
            assert (whole[name][play] == frames[name]).all(), name
        assert [ACTION_OF_KEY.get(key, UNKNOWN_KEY) for key in keys[play]] == frames[
            "actions"
        ].tolist()
        # Reward t = score t + 1 - score t; the tombstone's score of 0 makes none.
        assert (dense_rewards(store, game) == np.append(np.diff(whole["scores"][play]), 0)).all()
        assert (frames["blstats"] == pomdp.read_blstats(frames["tty_chars"])).all()
        assert store.index["max_depths"][game] == frames["blstats"][:, DEPTH].max()
        assert store.index["turns"][game] == frames["blstats"][:, TURN].max()

        # NLE passes the start-up screens and the disclosure at the end with SPACE: a handful,
        # nothing of the game.
        assert {*keys[:first], *keys[stop:]} == {SPACE}
        assert first <= 6 and 8 <= length - stop <= 20
        for screen in whole["tty_chars"][:first]:
            assert b"HP:" not in screen[23].tobytes() or b"--More--" in screen.tobytes()
        begin = frames["tty_chars"][0]
        assert b"HP:" in begin[23].tobytes() and b"--More--" not in begin.tobytes()
        assert any(b"'s attributes:" in screen.tobytes() for screen in whole["tty_chars"][stop:])
        # From the end of the game on the score does not change any more, until it is gone.
        assert (whole["scores"][stop:-2] == whole["scores"][stop]).all() and (
            whole["scores"][-2:] == 0
        ).all()
    size = (store.folder / "frames.bin").stat().st_size
    assert size < 120 * store.frames.sum()  # 3,840 bytes each uncompressed
    assert "left out: 0 unreadable games, 0 lines without a game, 0 keys" in str(
        store
    ) and f"{len(sources)} games" in str(store)


# -- where the player's frames end -----------------------------------------------------------------
TOMB, ATTRIBUTES, WEAPONS = "/ killed by a newt", "Agent the Candidate's attributes:", "Weapons"
MORE, BITTEN, DIED = "--More--", "The newt bites!--More--", "You die...--More--"
DEATHS = [
    "You die...",
    "You drown.",
    "You suffocate.",
    "You burn to a crisp...",
    "You turn to stone...",
]
DEATHS += ["You are turned to slime!", "You dissolve in molten lava.", "You choke over your food."]
DEATHS += ["You escaped from the dungeon!", "You ascend to the status of Demigod..."]
ENDINGS = [  # what is shown when the player presses SPACE, and when NLE does
    *(([BITTEN], [death + MORE, "Identify?" + MORE, ATTRIBUTES, TOMB]) for death in DEATHS),
    ([BITTEN], [DIED, f"{WEAPONS} (1 of 2)", "Armor (2 of 2)", ATTRIBUTES, TOMB]),
    ([BITTEN], [DIED, f"{WEAPONS} (end)", f"{ATTRIBUTES} (1 of 2)", "(2 of 2)", TOMB]),
    # whatever it says, the last message is shown after the game is over
    ([BITTEN], ["It bites!" + MORE, ATTRIBUTES, TOMB]),
    (["You see a newt."], [ATTRIBUTES, TOMB]),
    # the player's own look at attributes, and at a menu
    ([f"{ATTRIBUTES} (1 of 2)", "(2 of 2)", BITTEN], [DIED, ATTRIBUTES, TOMB]),
    ([ATTRIBUTES, "You see a newt.", BITTEN], [DIED, f"{ATTRIBUTES} (end)", TOMB]),
    ([f"{WEAPONS} (1 of 2)", BITTEN], [DIED, ATTRIBUTES, TOMB]),
]


@pytest.mark.parametrize("played, shown", ENDINGS)
def test_play_ends_where_nle_takes_over(played, shown):
    texts = ["a newt", *played, *shown]
    actions = np.array([0] + [pomdp.SPACE_ACTION] * (len(texts) - 1), np.uint8)
    chars = np.full((len(texts), 24, 80), ord(" "), np.uint8)
    for screen, text in zip(chars, texts):
        screen[0, : len(text)] = list(text.encode())
    colors, cursor, scores = np.zeros_like(chars), np.zeros((len(texts), 2)), np.zeros(len(texts))
    frames = pomdp.Frames(chars, colors, cursor, actions, scores)
    assert pomdp.find_end_of_play(frames) == 1 + len(played)


# -- batches, of games made for the tests ----------------------------------------------------------
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 130, 300)
UNKNOWN = 7  # every so many frames a key that is no action


KATAKOMBA = ("tty_chars", "tty_colors", "tty_cursor", "actions")


def write_hdf5(path, games):
    """A group a game."""
    with h5py.File(path, "w") as file:
        for name, arrays in games.items():
            group = file.create_group(name)
            for key, values in arrays.items():
                group.create_dataset(key, data=values, compression="gzip", compression_opts=1)


def katakomba_arrays(chars, colors, cursor, actions, rewards):
    """As Katakomba's converter writes them: rewards clipped at 0 and the last one repeated, done at
    the last step."""
    rewards = np.maximum(np.append(rewards, rewards[-1:])[: len(actions)], 0).astype(np.int32)
    dones = np.arange(len(actions)) == len(actions) - 1
    arrays = {
        "tty_chars": chars.astype(np.uint8),
        "tty_colors": colors.astype(np.int8),
        "rewards": rewards,
    }
    return {
        **arrays,
        "tty_cursor": cursor.astype(np.int16),
        "actions": actions.astype(np.int16),
        "dones": dones,
    }


@pytest.fixture(scope="module")
def marked(small, tmp_path_factory):
    """A store of games whose every frame tells its game (as depth) and its number (as turn), and
    [{name: [n, ...]}] of what they hold. They end as recorded games do."""
    rng = np.random.default_rng(0)
    ending = pomdp.read_ttyrec(small[1][0].path)
    ending = [array[pomdp.find_end_of_play(ending) :] for array in ending[:4]]
    written, expected = {}, []
    for game, n in enumerate(LENGTHS):
        chars, colors = np.full((n, 24, 80), ord("."), np.uint8), np.full((n, 24, 80), 7, np.int8)
        for row in (0, 5):  # the message's row, and one of the map's
            chars[:, row], colors[:, row] = (
                rng.integers(33, 127, (n, 80)),
                rng.integers(0, 32, (n, 80)),
            )
        for frame in range(n):
            line = f"Dlvl:{game + 1} $:0 HP:9(9) Pw:1(1) AC:9 Xp:1/0 T:{frame + 1}".ljust(
                80
            ).encode()
            chars[frame, 22:] = np.frombuffer(b" " * 80 + line, np.uint8).reshape(2, 80)
        cursor = np.stack([rng.integers(0, 24, n), rng.integers(0, 80, n)], 1)
        actions = rng.integers(0, 90, n)  # none of them is SPACE
        rewards = (
            rng.integers(1, 200, n) * (rng.random(n) < 0.2) * (np.arange(n) < n - 1)
        )  # a game's last pays nothing
        known = np.arange(n) % UNKNOWN != 5
        numbers = np.where(known, actions, np.where(np.arange(n) % 2, -1, pomdp.NUM_ACTIONS))
        arrays = [np.concatenate(pair) for pair in zip((chars, colors, cursor, numbers), ending)]
        written[f"{game:03d}"] = katakomba_arrays(
            *arrays, np.append(rewards, np.zeros(len(ending[0])))
        )
        content = dict(zip(SCREEN, (chars, colors, cursor)), actions=np.where(known, actions, 0))
        expected.append({**content, "known": known, "rewards": rewards})
    folder = tmp_path_factory.mktemp("marked")
    write_hdf5(folder / "data-mon-hum-neu-any.hdf5", written)
    store = open_or_build_store(str(folder), str(folder / "stores"), "mon-hum-neu")
    assert store.frames.tolist() == list(LENGTHS)
    unknown = sum(int((~game["known"]).sum()) for game in expected)
    assert store.index[
        "unknown_keys"
    ].sum() == unknown and f"{unknown} keys that are no action" in str(store)
    return store, expected


# Rows, steps, game_frames (0: all), in a random order, gamma and clip_range.
CASES = [
    *(
        (1, 16, 0, False, 0.9, 2.5),
        (2, 7, 0, True, 0.9, 3.0),
        (3, 1, 0, False, 1.0, 100.0),
        (5, 32, 0, True, 0.9, 1.0),
    ),
    *((8, 64, 0, False, 0.5, 0.3), (16, 100, 0, True, 0.9, 3.0), (7, 400, 0, False, 0.99, 3.0)),
    *(
        (500, 8, 0, True, 0.9, 3.0),
        (64, 16, 0, False, 0.9, 3.0),
    ),  # more rows than games, or than chunks
    *((3, 16, 48, False, 0.9, 3.0), (4, 7, 33, True, 0.9, 3.0), (2, 16, 1, True, 0.9, 3.0)),
]


@pytest.mark.parametrize("rows, seq_len, game_frames, shuffle, gamma, clip_range", CASES)
def test_batches(marked, rows, seq_len, game_frames, shuffle, gamma, clip_range):
    """Two passes: each frame that counts carries loss once a pass, its content is right, rows go
    on, padding does not count. A game that is cut is not over (no done), and shows the frame after
    the cut, whose value is bootstrapped."""
    store, expected = marked
    games = Games([store], game_frames)
    loader = loader_of(games, rows, seq_len, 50.0, shuffle, gamma=gamma, clip_range=clip_range)
    limits, orders, before = [min(n, game_frames or n) for n in LENGTHS], [], None
    rewards = [np.clip(game["rewards"] / 50.0, -clip_range, clip_range) for game in expected]
    for number in range(2):
        counted, order = [np.zeros(n, int) for n in LENGTHS], []
        for step in range(number * loader.sampler.steps, (number + 1) * loader.sampler.steps):
            batch = {name: tensor.numpy() for name, tensor in batch_of(loader, step).items()}
            game, frame = (
                batch["blstats"][:, :, DEPTH] - 1,
                batch["blstats"][:, :, TURN] - 1,
            )  # [B, T + 1]; -1: padding
            for row in range(rows):
                real = int((game[row] >= 0).sum())
                for name in {*batch} - {"starts", "prev_actions"}:  # padding comes last
                    assert not batch[name][row, real:].any()
                if real == 0:
                    assert batch["starts"][row] and batch["prev_actions"][row, 0] == NO_ACTION
                    continue
                g, first = int(game[row, 0]), int(frame[row, 0])
                order.append((g, first))
                content, n, part = expected[g], LENGTHS[g], slice(first, first + real)
                counts = np.arange(n) < limits[g]
                actions = np.where(content["known"], content["actions"], NO_ACTION)
                assert (game[row, :real] == g).all() and (
                    frame[row, :real] == first + np.arange(real)
                ).all()
                assert real == min(seq_len + 1, n - first) and first < limits[g]
                for name in SCREEN:
                    assert (batch[name][row, :real] == content[name][part]).all(), name
                assert (batch["actions"][row, :real] == np.where(counts, actions, 0)[part]).all()
                assert (batch["mask"][row, :real] == counts[part]).all()
                assert (batch["dones"][row, :real] == (np.arange(n) == n - 1)[part]).all()
                assert batch["rewards"][row, :real] == pytest.approx(rewards[g][part], rel=1e-6)
                # A row goes on where it was, one step overlapping, unless it says that it starts
                # anew.
                continues = before is not None and before[0][row] == g and before[1][row] == first
                assert batch["starts"][row] or (continues and first > 0)
                known = not batch["starts"][row] and content["known"][first - 1]
                assert batch["prev_actions"][row, 0] == (
                    content["actions"][first - 1] if known else NO_ACTION
                )
                counted[g][first : first + seq_len] += batch["mask"][row, :seq_len][: n - first]
            before = game[:, seq_len], frame[:, seq_len]
        for times, limit in zip(counted, limits):
            assert (times == (np.arange(len(times)) < limit)).all()
        orders.append(order)
    assert (orders[0] != orders[1]) == shuffle  # a new order each pass; held-out games in their own


def test_the_order_of_games_follows_the_seed(marked):
    """Of all fourteen, so that no two orders agree by chance."""
    orders = []
    for seed in (1, 1, 2):
        plan = loader_of(Games([marked[0]]), 1, max(LENGTHS), train_seed=seed).sampler
        orders.append([int(plan.locate(step)[0][0]) for step in range(2 * len(LENGTHS))])
    assert sorted(orders[0][: len(LENGTHS)]) == list(range(len(LENGTHS)))
    assert orders[0] == orders[1] != orders[2]


def test_batches_have_their_types(marked):
    batch = batch_of(loader_of(Games([marked[0]]), 3, 4), 0)
    expected = "tty_chars uint8 3 5 24 80, tty_colors int8 3 5 24 80, tty_cursor uint8 3 5 2, blstats int32 3 5 27, "  # noqa: E501
    expected += "rewards float32 3 5, dones bool 3 5, mask bool 3 5, starts bool 3, "
    expected += "actions int64 3 5, prev_actions int64 3 1"
    found = [
        " ".join([name, str(value.dtype)[6:], *map(str, value.shape)])
        for name, value in batch.items()
    ]
    assert sorted(found) == sorted(expected.split(", "))


def plain_scale(store, chosen, gamma, game_frames):
    """Root mean square of R_t = gamma R_{t-1} + r_t, frame by frame."""
    squares = []
    for game in chosen:
        accumulated = 0.0
        for reward in dense_rewards(store, game)[: game_frames or None]:
            accumulated = gamma * accumulated + reward
            squares.append(accumulated**2)
    return np.mean(squares) ** 0.5


@pytest.mark.parametrize("gamma, game_frames", [(0.5, 0), (0.999, 0), (1.0, 0), (0.9, 100)])
def test_reward_scale(stores, marked, gamma, game_frames):
    for store, chosen in ((stores["val-hum-neu"], [0, 2]), (marked[0], range(3, len(LENGTHS)))):
        expected = plain_scale(store, chosen, gamma, game_frames)
        assert Games([store], game_frames).reward_scale(np.array(chosen), gamma) == pytest.approx(
            expected, rel=1e-9
        )
    assert (
        Games([marked[0]]).reward_scale(np.array([0]), gamma) == 0.01
    )  # without rewards the floor keeps them finite


def test_training_never_sees_held_out_games(marked):
    """Neither in a batch nor in the reward scale, which both loaders divide by."""
    store, _ = marked
    options = dict(
        heldout_share=0.4, gamma=0.8, clip_range=1.5, game_frames=100, batch_size=4, seq_len=8
    )
    config = TrainConfig(
        character="mon-hum-neu", data_path=str(store.folder), device="cpu", **options
    )
    loaders, again = pomdp.load_data(config), pomdp.load_data(config)
    seen = [set(), set()]
    for loader, games in zip(loaders, seen):
        for step in range(loader.sampler.steps):
            depths = batch_of(loader, step)["blstats"][:, :, DEPTH]
            games.update((depths[depths > 0] - 1).tolist())
    assert (
        not seen[0] & seen[1]
        and seen[0] | seen[1] == set(range(len(LENGTHS)))
        and 3 <= len(seen[1]) <= 8
    )
    scale = plain_scale(store, sorted(seen[0]), config.gamma, config.game_frames)
    assert [loader.reward_scale for loader in loaders] == pytest.approx([scale, scale], rel=1e-9)
    for loader, other in zip(loaders, again):
        assert_same([batch_of(loader, 3)], [batch_of(other, 3)])
    loaders = pomdp.load_data(TrainConfig(**{**vars(config), "heldout_share": 0.0}))
    assert len(loaders[0].chosen) == len(LENGTHS) and loaders[1] is None


@pytest.fixture(scope="module")
def make_loader(games):
    return lambda: loader_of(games, 5, 48, 10.0)


def test_a_batch_is_a_pure_function_of_its_number(make_loader):
    """A run that resumes in the middle of a pass gets the batches that it would have had."""
    loader = make_loader()
    steps = [*range(12), loader.sampler.steps - 1, loader.sampler.steps, loader.sampler.steps + 1]
    plain = {step: batch_of(loader, step) for step in steps}
    random.Random(1).shuffle(steps)
    assert_same([plain[step] for step in steps], [batch_of(loader, step) for step in steps])
    assert_same(
        [plain[step] for step in steps[:4]], [batch_of(make_loader(), step) for step in steps[:4]]
    )
    threads, batches = threading.active_count(), pomdp.read_ahead(partial(batch_of, loader), 5)
    assert_same([next(batches) for _ in range(7)], [plain[step] for step in range(5, 12)])
    batches.close()
    assert threading.active_count() == threads


def test_processes_share_the_rows_of_one_batch(make_loader, monkeypatch):
    whole = [batch_of(make_loader(), step) for step in range(5)]
    for rank, rows in enumerate((slice(0, 2), slice(2, 5))):
        monkeypatch.setattr(pomdp, "WORLD", 2)
        monkeypatch.setattr(pomdp, "RANK", rank)
        part = make_loader()
        assert part.batch_size == rows.stop - rows.start
        shares = [{name: tensor[rows] for name, tensor in batch.items()} for batch in whole]
        assert_same(shares, [batch_of(part, step) for step in range(5)])


@given(
    *(
        st.lists(st.integers(1, 200), min_size=1, max_size=12),
        st.integers(1, 20),
        st.integers(1, 70),
    ),
    *(st.one_of(st.none(), st.integers(0, 2**31)), st.integers(0, 3)),
)
def test_a_pass_plays_each_chunk_once_and_clears_states_as_rarely_as_it_can(
    frames, rows, seq_len, seed, number
):
    plan = pomdp.ChunkSampler(np.array(frames), rows, seq_len, seed)
    chunks = [-(-n // seq_len) for n in frames]
    assert plan.steps == -(-sum(chunks) // rows)
    played, before = [], None
    for step in range(number * plan.steps, (number + 1) * plan.steps):
        game, first, starts = plan.locate(step)
        padding = game < 0
        assert (
            starts == (padding | (first == 0) | (step == number * plan.steps))
        ).all() and not first[padding].any()
        # A row pads at most its last chunk.
        assert not padding.any() or step == (number + 1) * plan.steps - 1
        if before is not None:
            going_on = (game == before[0]) & (first == before[1] + seq_len)
            assert (starts | going_on).all()
        played += zip(game[~padding].tolist(), first[~padding].tolist())
        before = game, first
    assert sorted(played) == [
        (game, chunk * seq_len) for game, n in enumerate(chunks) for chunk in range(n)
    ]


# -- held-out games --------------------------------------------------------------------------------
def test_held_out_games_are_chosen_by_their_names_alone(stores):
    """Not by the process, the order of games and of stores, or the other characters."""

    def names(stores, share):
        games = Games(stores)
        out = games.heldout(share)
        return {
            str(store.names[game]) for (store, game), chosen in zip(games.in_store, out) if chosen
        }

    every = list(stores.values())
    for share in (0.05, 0.3, 0.7):
        assert (
            names(every, share)
            == names(every[::-1], share)
            == set().union(*(names([one], share) for one in every))
        )
        for store in every:  # each character has games on both sides
            assert 0 < len(names([store], share)) < len(store.names)
    assert names(every, 0.0) == set() and names(every, 0.05) <= names(every, 0.7)
    letters = np.array(
        list("abcdefghij")
    )  # which ones may never change: checkpoints were trained on the others
    for order in (slice(None), slice(None, None, -1)):
        assert set(letters[order][pomdp.choose_heldout(letters[order], 0.2)]) == set("cdfj")
    assert not pomdp.choose_heldout(["a"], 0.9).any()  # one game is trained on


# -- keys that are no action -----------------------------------------------------------------------
def test_keys_that_are_no_action_are_unknown_and_never_a_previous_action(small, tmp_path):
    """A recording whose player pressed keys that are none of the 121 actions. The rewards are there
    all the same, and the network sees the same previous actions wherever chunks are cut."""
    character, (source, _) = small
    known = play_of(source)
    first = pomdp.find_first_frame(pomdp.read_ttyrec(source.path))
    plain = bytearray(bz2.decompress(Path(source.path).read_bytes()))
    keys = [offset + 13 for offset in key_offsets(plain)]
    n, strange = len(known.chars), next(key for key in range(256) if key not in ACTION_OF_KEY)
    places = [0, 10, 11, n - 1]  # the first and the last frame of play among them
    for place in places:
        plain[keys[first + place]] = strange
    add_game(tmp_path / "games", "a", source, bz2.compress(bytes(plain)))
    store = store_of(tmp_path / "games", tmp_path, character)
    assert store.index["unknown_keys"].tolist() == [4] and store.frames[0] == n
    counts = ~np.isin(np.arange(n), places)
    previous = np.append(NO_ACTION, np.where(counts, known.actions, NO_ACTION)[:-1])
    config, seen = (
        TrainConfig(rnn_hidden_dim=4, device="cpu", algorithm={"burn_in": 0, "head_dim": 4}),
        [],
    )
    algorithm = pomdp.make_algorithm(config, torch.device("cpu"))
    algorithm.model.backbone.rnn = torch.nn.LSTM(1, 4, batch_first=True)
    encode = lambda inputs: (
        seen.append(inputs["prev_actions"]) or torch.zeros(1, seen[-1].shape[1], 1)
    )
    algorithm.model.backbone.encode = encode
    rewards, actions = (
        np.append(np.diff(known.scores), 0),
        np.where(counts, known.actions, NO_ACTION),
    )
    for seq_len in (n, 11, 1):
        loader, states = loader_of(Games([store]), 1, seq_len, clip_range=1e9), {}
        for step in range(min(loader.sampler.steps, 30)):
            batch, part = batch_of(loader, step), slice(step * seq_len, (step + 1) * seq_len)
            in_play = np.ones(n, bool)
            for name, expected in (("mask", in_play), ("actions", actions), ("rewards", rewards)):
                assert (
                    batch[name][0, :seq_len][: n - part.start].numpy() == expected[part]
                ).all(), name
            seen.clear()
            with torch.no_grad():
                _, states, _ = algorithm.train_step(batch, batch.pop("prev_actions"), states)
            given = torch.cat(seen, dim=1)[0, :seq_len][: n - part.start]
            assert given.tolist() == previous[part].tolist()


def test_every_action_and_no_other_key_is_known():
    assert pomdp.KEY_TO_ACTION.tolist() == [
        ACTION_OF_KEY.get(key, UNKNOWN_KEY) for key in range(256)
    ]
    assert pomdp.NUM_ACTIONS == 121 and len(ACTION_OF_KEY) == 118


# -- finding games ---------------------------------------------------------------------------------
def test_only_games_with_a_line_count(small, tmp_path):
    """Links are followed; empty xlogfiles, lines without a file, files without a line, lines that
    are none, and an xlogfile that is gone stop nothing. A data set must not reach outside of its
    folders, though the file exists."""
    character, (source, other) = small
    root, content = tmp_path / "games", Path(source.path).read_bytes()
    # A game is told by the character that it began with; two games in one folder.
    kept = [add_game(root, "kept", game, align="Cha") for game in (source, other)]
    for other_character in (dict(align0="Cha"), dict(race="Elf"), dict(role="Arc")):
        add_game(root, "other", source, **other_character)
    kept[0].rename(tmp_path / "elsewhere")
    kept[0].symlink_to(tmp_path / "elsewhere")
    add_game(root, "missing", source).unlink()
    for name in ("empty", "junk", "gone"):
        (root / name).mkdir()
    (root / "empty" / "nle.1.xlogfile").write_bytes(b"")
    (root / "empty" / "nle.1.0.ttyrec3.bz2").write_bytes(content)
    (root / "junk" / "nle.1.xlogfile").write_bytes(
        b"\x00\xff\tno line\t=\n\n====\t\nrole=Mon\n" + b"\xfe" * 1000
    )
    (root / "gone" / "nle.1.xlogfile").symlink_to(tmp_path / "nowhere")
    outside = tmp_path / "secret.ttyrec3.bz2"
    evil = ["../../secret.ttyrec3.bz2", str(outside), "..", "", "a/b.ttyrec3.bz2", "notes.txt"]
    for name in evil:
        add_game(root, "evil", source, ttyrecname=name)
    (root / "evil" / "a").mkdir()
    for path in (outside, root / "evil" / "a" / "b.ttyrec3.bz2", root / "evil" / "notes.txt"):
        path.write_bytes(content)
    store = store_of(root, tmp_path, character)
    assert store.names.tolist() == sorted(f"kept/{path.name}" for path in kept)
    problems = store.index["passed_over"].tolist()
    assert len(problems) == 2 + len(evil) and store.index["skipped"].size == 0
    assert all(
        any(text in problem for problem in problems)
        for text in ("gone", "missing", *map(repr, evil))
    )
    assert f"{len(problems)} lines without a game" in str(store)
    assert len(pomdp.find_nld_games(root, "arc" + character[3:])[0]) == 1


def test_names_of_games(small, tmp_path):
    """The folder of a game and its file; directly in the data's folder its file alone, whatever
    that folder is called."""
    character, (source, other) = small
    for root in ("job1", "job2"):
        add_game(tmp_path, root, source)
        add_game(tmp_path / root, "own", other)
        found, _ = pomdp.find_nld_games(tmp_path / root, character)
        assert [game.name for game in found] == ["nle.0.0.ttyrec3.bz2", "own/nle.0.0.ttyrec3.bz2"]


HELD_OUT = [
    "mon-hum-neu-1-6",
    "val-hum-neu-1-1",
    "val-hum-neu-1-5",
    "ran-hum-neu-1-2",
    "ran-hum-neu-1-6",
]


def test_the_shipped_agent_keeps_its_held_out_games(recorded_games):
    """Which recorded games are held out may never change: agents were trained on the others."""
    heldout = []
    for games in recorded_games.values():
        names = [game.name for game in games]
        heldout += np.array(names)[pomdp.choose_heldout(names, 0.1)].tolist()
    assert [name.split("/")[0] for name in heldout] == HELD_OUT


def test_links_to_folders_are_followed_once(small, tmp_path):
    """A label is the link's name; what two links lead to is one game; a link back, or to a folder
    around, is no way."""
    character, (source, other) = small
    add_game(tmp_path / "disk", "far", source)
    root = tmp_path / "data"
    add_game(root, "own", other)
    for name, target in {"link": "far", "second": "far"}.items():
        (root / name).symlink_to(tmp_path / "disk" / target)
    (root / "own" / "back").symlink_to(root)
    (root / "around").symlink_to(tmp_path)
    (root / "own" / "again.ttyrec3.bz2").symlink_to(root / "own" / "nle.0.0.ttyrec3.bz2")
    line = (root / "own" / "nle.1.xlogfile").read_text()
    (root / "own" / "nle.2.xlogfile").write_text(line.replace("nle.0.0.", "again."))
    for place in (root, tmp_path / "whole"):
        if place != root:
            place.symlink_to(root)
        found, problems = pomdp.find_nld_games(place, character)
        assert [game.name for game in found] == [
            "link/nle.0.0.ttyrec3.bz2",
            "own/nle.0.0.ttyrec3.bz2",
        ]
        assert problems == []


def test_nothing_to_read_or_nowhere_to_write(small, tmp_path):
    character, (source, _) = small
    (tmp_path / "empty").mkdir()
    bad, _ = (
        add_game(tmp_path / "bad", "a", source, b"no game"),
        add_game(tmp_path / "good", "a", source),
    )
    (tmp_path / "file").write_bytes(b"not a folder")
    none = "no games of wiz-elf-cha in .*{}.*hdf5"
    cases = [
        (where, "stores", "wiz-elf-cha", none.format(where))
        for where in ("nowhere", "empty", "good")
    ]
    cases.append(
        ("bad", "stores", character, f"none of the 1 games of {character} can be read.*{bad}")
    )
    for place in ("file", "file/below"):
        cases.append(("good", place, character, f"cannot .*--store_path {tmp_path / place}"))
    for where, place, name, message in cases:
        with pytest.raises(UserError, match=message):
            open_or_build_store(str(tmp_path / where), str(tmp_path / place), name)
    assert (
        not list((tmp_path / "stores").rglob("frames.bin"))
        and (tmp_path / "file").read_bytes() == b"not a folder"
    )


# -- Katakomba's HDF5 ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def katakomba(small, tmp_path_factory):
    """The file of two recorded games, converted."""
    written = {}
    for number, source in enumerate(small[1]):
        raw = pomdp.read_ttyrec(source.path)
        written[f"{number:03d}"] = katakomba_arrays(*raw[:4], np.diff(raw.scores))
    path = tmp_path_factory.mktemp("katakomba") / f"data-{small[0]}-any.hdf5"
    write_hdf5(path, written)
    return path


def test_hdf5_gives_the_same_batches(small, katakomba, tmp_path, monkeypatch):
    """Found where Katakomba keeps it; the same frames as from the recording. Its rewards lack what
    the player lost."""
    character, sources = small
    monkeypatch.setenv("KATAKOMBA_DATA_DIR", str(katakomba.parent))
    store = open_or_build_store(None, str(tmp_path / "stores"), character)
    for number, source in enumerate(sources):
        add_game(tmp_path / "games", f"{number:03d}", source)
    original = store_of(tmp_path / "games", tmp_path, character)
    ours, theirs = (loader_of(Games([opened]), 3, 20, 5.0) for opened in (store, original))
    for step in range(ours.sampler.steps):
        batch, other = batch_of(ours, step), batch_of(theirs, step)
        assert_same([batch], [{**other, "rewards": other["rewards"].clamp(min=0)}])
    assert len(store_of(katakomba, tmp_path, character).frames) == len(
        sources
    )  # the file itself as data_path
    for path in (None, str(katakomba)):
        with pytest.raises(UserError, match="no games of wiz-elf-cha"):
            open_or_build_store(path, str(tmp_path / "stores"), "wiz-elf-cha")


def test_damaged_hdf5(small, katakomba, tmp_path, capsys):
    """Groups without an array or an end, or with arrays of other shapes are skipped; a file that is
    none is refused."""
    path = tmp_path / katakomba.name
    with h5py.File(katakomba, "r") as file:
        whole = {name: np.array(values) for name, values in file["000"].items()}
    games = {
        "a": dict(whole),
        "b": whole,
        "c": {**whole, "rewards": whole["rewards"][:-1]},
        "g": {},
    }
    games["a"].pop("tty_colors")
    games["d"] = {name: values[: len(values) // 2] for name, values in whole.items()}
    games["d"]["dones"] = np.arange(len(games["d"]["dones"])) == len(games["d"]["dones"]) - 1
    games["e"] = {name: values[:0] for name, values in whole.items()}
    games["f"] = {**whole, "tty_chars": whole["tty_chars"][:, :10]}
    write_hdf5(path, games)
    store = store_of(path, tmp_path, small[0])
    assert store.names.tolist() == [f"{path.name}/b"]
    assert "6 unreadable games" in str(store) and store.index["skipped"].size == 6
    errors = capsys.readouterr().err
    assert all(f"{path}:{name}: " in errors for name in "acdefg")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 1000)
    with pytest.raises(UserError, match=f"cannot read {path}"):
        store_of(path, tmp_path, small[0])


def test_values_that_are_no_whole_numbers_are_not_cast(small, katakomba, tmp_path):
    path = tmp_path / katakomba.name
    with h5py.File(katakomba, "r") as file:
        whole = {name: np.array(values) for name, values in file["000"].items()}
    games = {"fine": {**whole, "rewards": whole["rewards"].astype(float)}}
    bad = {"nan": np.nan, "inf": np.inf, "part": 0.5, "huge": 1e300, "far": 3e9}
    for name, value in bad.items():
        games[name] = {**whole, "rewards": whole["rewards"].astype(float)}
        games[name]["rewards"][3] = value
    games["key"] = {**whole, "actions": whole["actions"] + 0.5}
    games["wide"] = {**whole, "tty_chars": whole["tty_chars"].astype(np.int16) + 256}
    write_hdf5(path, games)
    store = store_of(path, tmp_path, small[0])
    assert store.names.tolist() == [f"{path.name}/fine"]
    skipped = dict(zip(sorted(set(games) - {"fine"}), store.index["skipped"].tolist()))
    for name, reason in skipped.items():
        assert f"{path}:{name}: its " in reason and "are not whole numbers" in reason


def test_a_file_that_another_writes_to_is_a_user_error(small, katakomba, tmp_path):
    path = Path(shutil.copy(katakomba, tmp_path))
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"hdf5.*lock"):
            store_of(path, tmp_path, small[0])


def test_an_hdf5_group_of_several_games_is_skipped(small, katakomba, tmp_path):
    path = tmp_path / katakomba.name
    with h5py.File(katakomba, "r") as file:
        whole = {name: np.array(values) for name, values in file["000"].items()}
    dones = np.zeros(len(whole["dones"]), bool)
    dones[[50, -1]] = True
    write_hdf5(path, {"one": whole, "several": {**whole, "dones": dones}})
    store = store_of(path, tmp_path, small[0])
    (reason,) = store.index["skipped"].tolist()
    assert "several: it holds several games" in reason and len(store.frames) == 1


def test_a_folder_whose_name_ends_as_an_xlogfile_s(small, tmp_path):
    character, (source, *_) = small
    add_game(tmp_path / "games", "old.xlogfile", source)
    store = store_of(tmp_path / "games", tmp_path, character)
    assert len(store.frames) == 1 and store.index["passed_over"].size == 0


def test_an_hdf5_game_that_is_not_done_is_cut(small, katakomba, tmp_path):
    """Its last `dones` is false and no end is shown: all frames are kept, the last as the one after
    the cut. Where the end is shown the game is whole whatever `dones` says; without `dones` it is
    left out."""
    path, count = tmp_path / katakomba.name, 100
    with h5py.File(katakomba, "r") as file:
        whole = {name: np.array(values) for name, values in file["000"].items()}
    part = {name: values[:count] for name, values in whole.items()}
    games = {"a": part, "b": {**whole, "dones": np.zeros(len(whole["dones"]), bool)}}
    games["c"] = {name: values for name, values in part.items() if name != "dones"}
    first = pomdp.find_first_frame(pomdp.Frames(*[whole[name] for name in KATAKOMBA], None))
    games["d"] = {name: values[: first + 1] for name, values in whole.items()}
    write_hdf5(path, games)
    store = store_of(path, tmp_path, small[0])
    assert store.names.tolist() == [f"{path.name}/a", f"{path.name}/b"]
    assert store.truncated.tolist() == [True, False] and store.index["skipped"].size == 2
    assert store.frames[0] == count - first and len(Games([store]).frames) == 2
    assert Games([store]).frames[0] == count - first - 1
    kept = stored(store, 0)
    for name in KATAKOMBA:
        assert (kept[name] == whole[name][first:count]).all(), name
    loader = pomdp.ChunkLoader(
        Games([store]), np.array([0]), TrainConfig(device="cpu", seq_len=8), 1, 1.0, False
    )
    assert not any(loader.batch_at(step)[0]["dones"].any() for step in range(loader.sampler.steps))


# -- damaged games ---------------------------------------------------------------------------------
def damaged_recordings(source):
    """{what happened: bytes} made of a good recording."""
    good = Path(source.path).read_bytes()
    plain, rng = bz2.decompress(good), random.Random(0)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    garbled = bytearray(plain)  # a recording that was damaged before it was compressed
    for _ in range(300):
        garbled[rng.randrange(len(garbled))] = rng.randrange(256)
    last_key = key_offsets(plain)[-30]
    return {
        **{f"cut at {share}": good[: int(len(good) * share)] for share in (0.01, 0.3, 0.6, 0.9)},
        "cut between frames": bz2.compress(
            plain[:last_key]
        ),  # as a player that was killed leaves it
        "cut within a frame": bz2.compress(plain[: last_key + 5]),
        "flipped": bytes(flipped),
        "garbled": bz2.compress(bytes(garbled)),
        "empty": b"",
        "compressed nothing": bz2.compress(b""),
        "random": bytes(rng.choices(range(256), k=5000)),
        "compressed random": bz2.compress(bytes(rng.choices(range(256), k=5000))),
        "long frame": bz2.compress(
            plain[:last_key] + struct.pack("<iiiB", 0, 0, 2**31 - 1, 0) + b"x"
        ),
    }


def test_damaged_games_are_skipped_by_name_with_any_number_of_workers(
    small, tmp_path, capfd, monkeypatch
):
    """Two good games with damaged ones before, between and after them. The store is the same to the
    byte."""
    character, sources = small
    root = tmp_path / "games"
    good = [add_game(root, name, source) for name, source in zip(("good-1", "good-2"), sources)]
    damaged = []
    for number, (what, recording) in enumerate(damaged_recordings(sources[0]).items()):
        damaged.append(add_game(root, f"{'abcdxyz'[number % 7]}-{what}", sources[0], recording))
    found, problems = pomdp.find_nld_games(root, character)
    assert sorted(game.path for game in found) == sorted(map(str, good + damaged))
    stores = []
    monkeypatch.setattr(pomdp, "BYTES_PER_WORKER", 1)
    for workers in (1, 2):
        monkeypatch.setattr(pomdp, "CORES", workers)
        pomdp.build_store(tmp_path / f"store-{workers}", found, problems, character)
        stores.append(GameStore(tmp_path / f"store-{workers}", character))
        errors = capfd.readouterr().err
        for path in damaged:
            assert sum(f"warning: skipped {path}: " in line for line in errors.splitlines()) == 1, (
                path
            )
    for name in ("frames.bin", "index.npz"):
        assert len({(store.folder / name).read_bytes() for store in stores}) == 1
    assert [name.split("/")[0] for name in stores[0].names.tolist()] == ["good-1", "good-2"]
    assert f"{len(damaged)} unreadable games" in str(stores[0])
    for game, source in enumerate(sources):
        frames, content = play_of(source), stored(stores[0], game)
        assert (content["tty_chars"] == frames.chars).all() and (
            content["actions"] == frames.actions
        ).all()


def test_several_bz2_streams_are_named_as_the_reason(small, tmp_path):
    """NLE reads the first of them alone, and the game would seem to break off."""
    character, (source, other) = small
    plain = bz2.decompress(Path(source.path).read_bytes())
    add_game(
        tmp_path / "games", "a", source, bz2.compress(plain[:9000]) + bz2.compress(plain[9000:])
    )
    add_game(tmp_path / "games", "b", other)
    (reason,) = store_of(tmp_path / "games", tmp_path, character).index["skipped"].tolist()
    assert "bz2 streams" in reason and "/a/" in reason


def test_a_worker_that_was_killed_is_a_user_error(small, tmp_path, monkeypatch):
    for name, source in zip("ab", small[1]):
        add_game(tmp_path / "games", name, source)
    monkeypatch.setattr(pomdp, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(pomdp, "CORES", 2)
    monkeypatch.setattr(pomdp, "start_worker", os._exit)  # which every worker begins with
    with pytest.raises(UserError, match=r"store_path.*terminated"):
        store_of(tmp_path / "games", tmp_path, small[0])


def test_a_recording_cut_anywhere_is_refused_or_whole(small, tmp_path):
    """Cut before its end shows it is refused; cut later, it gives all its frames: never a part of
    them."""
    _, (source, _) = small
    plain = bz2.decompress(Path(source.path).read_bytes())
    whole = pomdp.encode_game(source)
    offsets, refused = key_offsets(plain), []
    last = len(offsets) - 25  # some 15 cuts in the game, and one after each of its last frames
    for place in [*range(0, last, last // 15), *range(last, len(offsets))]:
        path = tmp_path / "cut.ttyrec3.bz2"
        path.write_bytes(bz2.compress(plain[: offsets[place]], 1))
        game = pomdp.encode_game(source._replace(path=str(path)))
        refused.append(game.problem != "")
        assert refused[-1] or (
            game.blocks == whole.blocks
            and (game.columns["reward_values"] == whole.columns["reward_values"]).all()
        )
    assert refused[0] and not refused[-1] and refused == sorted(refused, reverse=True)


# -- the store -------------------------------------------------------------------------------------
def state(store):
    """What changes whenever the store is written anew."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.folder.iterdir()
    }


def test_a_store_is_built_again_only_when_its_games_or_its_format_changed(
    small, tmp_path, monkeypatch
):
    character, (source, other) = small
    root = tmp_path / "games"
    path = add_game(root, "a", source)
    first, states = store_of(root, tmp_path, character), []

    def assert_built_anew(games):
        store = store_of(root, tmp_path, character)
        assert len(store.frames) == games and state(store) not in states
        states.append(state(store))
        assert state(store_of(root, tmp_path, character)) == states[-1]
        assert set(states[-1]) == {"frames.bin", "index.npz"}
        return store

    states.append(state(first))
    added = add_game(root, "b", other)
    assert_built_anew(2)
    os.utime(path, (1, 1))  # written again, with its size and name as before
    assert_built_anew(2)
    added.unlink()
    store = assert_built_anew(1)
    # The store that was open before is still good for the run that opened it.
    assert (stored(first, 0)["tty_chars"] == stored(store, 0)["tty_chars"]).all()
    (store.folder / "index.npz").write_bytes(b"half")
    left = store.folder.with_name(f".{character}.building")  # by a build that was killed
    left.mkdir()
    (left / "junk").write_bytes(b"junk")
    store = assert_built_anew(1)
    assert not left.exists()
    for name in ("STORE_FORMAT", "ZSTD_LEVEL"):
        monkeypatch.setattr(pomdp, name, getattr(pomdp, name) + 1)
        assert_built_anew(1)


def test_games_are_the_same_by_what_they_hold(small, tmp_path, monkeypatch):
    """Copied, at another time, compressed otherwise; under another name, or with one key changed,
    it is another game."""
    character, (source, _) = small
    plain = bytearray(bz2.decompress(Path(source.path).read_bytes()))
    add_game(tmp_path / "a", "x", source)
    copy = add_game(tmp_path / "b", "x", source, bz2.compress(plain, 1))
    os.utime(copy, (1, 1))
    plain[key_offsets(plain)[200] + 13] ^= 1
    add_game(tmp_path / "c", "x", source, bz2.compress(plain))
    add_game(tmp_path / "d", "y", source)
    first, same, *others = (
        store_of(tmp_path / name, tmp_path, character).index["identities"].tolist()
        for name in "abcd"
    )
    assert first == same and first not in others
    monkeypatch.setattr(pomdp, "ZSTD_LEVEL", 1)
    assert store_of(tmp_path / "a", tmp_path, character).index["identities"].tolist() == first


BUILDING = """
import sys
import custom_nethack_pomdp as pomdp
pomdp.BYTES_PER_WORKER, pomdp.CORES = 1, 2
command = lambda: print(pomdp.open_or_build_store(*sys.argv[1:]))
if __name__ == "__main__":
    sys.exit(pomdp.run_command(command))
"""


def children_of(pid):
    """Process numbers, those of multiprocessing's own helper among them."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_of_a_build_end_with_it_and_the_next_build_starts_over(small, tmp_path, number):
    character, (source, *_) = small
    for name in range(60):
        add_game(tmp_path / "games", str(name), source)
    (tmp_path / "build.py").write_text(BUILDING, encoding="utf-8")
    command = [sys.executable, "build.py", str(tmp_path / "games"), "stores", character]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    building = tmp_path / "stores"
    while not list(building.glob(f"*/.{character}.building/frames.bin")) or (
        len(children_of(process.pid)) < 3
    ):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(1)
    children = children_of(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == (143 if number == signal.SIGTERM else -9), err
    assert "Traceback" not in err
    until = time.monotonic() + 120
    while any(map(is_running, children)):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.1)
    assert not list(building.glob(f"*/{character}"))


def test_a_current_store_is_read_without_a_lock_or_a_write(small, tmp_path, monkeypatch):
    """As on a file system that is mounted read-only, or while another process holds the lock."""
    character, (source, *_) = small
    add_game(tmp_path / "games", "a", source)
    store = store_of(tmp_path / "games", tmp_path, character)
    with open(store.folder.with_name(f".{character}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", None)
            again = store_of(tmp_path / "games", tmp_path, character)
    assert again.index["fingerprint"] == store.index["fingerprint"]


def test_a_store_that_is_replaced_can_still_be_read_by_who_has_it_open(small, tmp_path):
    character, (source, other, *_) = small
    add_game(tmp_path / "games", "a", source)
    old = store_of(tmp_path / "games", tmp_path, character)
    before = old.block(0, 0)["tty_chars"].copy()
    add_game(tmp_path / "games", "b", other)
    new = store_of(tmp_path / "games", tmp_path, character)
    assert new.folder == old.folder and len(new.frames) == 2
    assert np.array_equal(old.block(0, 0)["tty_chars"], before)
    last = int(old.frames[0] - 1) // pomdp.BLOCK
    assert old.block(0, last)["tty_chars"].shape[1:] == (24, 80)


def test_a_file_system_without_locks_costs_a_warning(small, tmp_path, monkeypatch, capsys):
    character, (source, _) = small
    add_game(tmp_path / "games", "a", source)

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    pomdp.warn_once.cache_clear()
    for place in ("one", "two"):
        assert (
            len(
                open_or_build_store(
                    str(tmp_path / "games"), str(tmp_path / place), character
                ).frames
            )
            == 1
        )
    assert capsys.readouterr().err.count("warning: no locks here") == 1


def test_a_store_of_another_version_is_refused_as_data(marked, tmp_path):
    folder = Path(shutil.copytree(marked[0].folder, tmp_path / "store"))
    np.savez(folder / "index.npz", **{**marked[0].index, "format": 4})
    with pytest.raises(UserError, match="another version"):
        GameStore(folder, "mon-hum-neu")


def test_store_as_data_path(stores, tmp_path):
    """The folder of one character or the one above it; nothing is built anew."""
    store = stores["val-hum-neu"]
    for path in (store.folder, store.folder.parent):
        assert store_of(path, tmp_path, "val-hum-neu").folder == store.folder
    with pytest.raises(UserError, match="are of val-hum-neu, not of mon-hum-neu"):
        store_of(store.folder, tmp_path, "mon-hum-neu")
    assert not (tmp_path / "stores").exists()


def test_damaged_stores_are_refused_when_opened(marked, tmp_path):
    """Not hours into a run. None: the file is gone."""
    whole = {name: (marked[0].folder / name).read_bytes() for name in ("frames.bin", "index.npz")}
    np.savez(tmp_path / "other.npz", **{**marked[0].index, "frames": np.array([1])})
    damages = [
        ("frames.bin", content)
        for content in (whole["frames.bin"][:-1], b"", whole["frames.bin"] + b"0", None)
    ]
    damages += [
        ("index.npz", whole["index.npz"][:length]) for length in (0, 1, 4, 30, 1000, -10, -1)
    ]
    damages += [
        ("index.npz", content)
        for content in ((tmp_path / "other.npz").read_bytes(), b"PK\3\4" * 50, None)
    ]
    for number, (name, content) in enumerate(damages):
        folder = Path(shutil.copytree(marked[0].folder, tmp_path / f"store-{number}"))
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"the chunk store {folder} cannot be used") as raised:
            GameStore(folder, "mon-hum-neu")
        assert "\n" not in str(raised.value)


def test_no_flipped_bit_makes_a_wrong_frame(marked, tmp_path):
    """Wherever it is: the store is refused, or its contents are what they were."""
    store, rng = marked[0], random.Random(0)
    folder = Path(shutil.copytree(store.folder, tmp_path / "store"))
    content, refused = [stored(store, game) for game in range(len(LENGTHS))], 0
    for name, places in (("frames.bin", 80), ("index.npz", 40)):
        whole = (folder / name).read_bytes()
        for place in [*range(8), *(rng.randrange(len(whole)) for _ in range(places))]:
            changed = whole[place] ^ 1 << rng.randrange(8)
            (folder / name).write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
            try:
                damaged = GameStore(folder, "mon-hum-neu")
                found = [stored(damaged, game) for game in range(len(LENGTHS))]
            except UserError as error:
                refused += f"the chunk store {folder} cannot be used" in str(error)
            else:
                np.testing.assert_equal((damaged.index, found), (store.index, content))
            (folder / name).write_bytes(whole)
    assert refused > 120


def test_runs_that_start_together_build_one_store(small, tmp_path):
    """One builds, the others wait for it and read what it built: the very same files."""
    character, (source, _) = small
    add_game(tmp_path / "games", "a", source)
    with pomdp.ThreadPoolExecutor(3) as pool:
        states = list(
            pool.map(lambda _: state(store_of(tmp_path / "games", tmp_path, character)), range(3))
        )
    assert states[0] == states[1] == states[2]


def test_several_threads_read_one_store(stores):
    """Held-out games are read while a thread reads ahead; decoding is not shared between them."""
    store = stores["val-hum-neu"]

    def sums(_=None):
        return [int(stored(store, game)["tty_chars"].sum()) for game in range(len(store.frames))]

    with pomdp.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sums, range(4))) == [sums()] * 4


# --- games that were quit
ESC, QUIT, YES, SEARCH = [int(pomdp.KEY_TO_ACTION[key]) for key in (27, 241, ord("y"), ord("s"))]


@pytest.mark.parametrize("escapes, learned", [(0, 40), (3, 43), (30, 70)])
def test_the_keys_that_quit_a_game_are_not_learned_and_it_is_cut(tmp_path, escapes, learned):
    """ESC, ESC, #quit, y after 40 searches and some escapes of the player's own."""
    game = pomdp.NetHackGame("val-hum-neu", savedir=str(tmp_path / "games"))
    game.reset(5, 6)
    for action in [SEARCH] * 40 + [ESC] * escapes + [ESC, ESC, QUIT, YES]:
        assert not game.end
        game.step(action)
    game.close()
    assert game.end == "died"
    store = open_or_build_store(str(tmp_path), str(tmp_path / "stores"), "val-hum-neu")
    games = Games([store])
    assert games.frames.tolist() == [learned] and store.frames.tolist() == [learned + 1]
    loader = loader_of(games, 1, 16, 1.0)
    counted = []
    for step in range(loader.sampler.steps):
        batch, _ = loader.batch_at(step)
        assert not batch["dones"].any(), "the game went on"
        counted.append(batch["actions"][:, :-1][batch["mask"][:, :-1]])
    assert torch.cat(counted).tolist() == [SEARCH] * 40 + [ESC] * (learned - 40)


def test_the_value_goes_on_where_a_game_was_quit(tmp_path):
    """The last frame that counts is bootstrapped from the one on which the quitting began."""
    game = pomdp.NetHackGame("val-hum-neu", savedir=str(tmp_path / "games"))
    game.reset(5, 6)
    for action in [SEARCH] * 40 + [ESC, ESC, QUIT, YES]:
        game.step(action)
    game.close()
    store = open_or_build_store(str(tmp_path), str(tmp_path / "stores"), "val-hum-neu")
    batch, _ = loader_of(Games([store]), 1, 64, 1.0).batch_at(0)
    values = torch.arange(65.0)[None] + 100.0
    mask = batch["mask"][:, :-1].float()
    chunk = [batch[name][:, :-1].float() for name in ("rewards", "dones")]
    targets = pomdp.lambda_returns(*chunk, values, mask, 0.9, 0.5)
    assert chunk[0][0, 39] == 0 and targets[0, 39] == pytest.approx(0.9 * 140.0)
