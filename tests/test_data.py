"""Recorded games -> chunk store -> batches: against nle.dataset's own reader, against plain loops, and with damaged input."""

import bz2
import itertools
import json
import multiprocessing
import os
import random
import struct
import threading
from pathlib import Path

import h5py
import nle.dataset as nld
import numpy as np
import pytest
import torch
from conftest import CHARACTERS, RECORDED
from hypothesis import given, settings
from hypothesis import strategies as st
from nle import nethack

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import (
    BLOCK,
    NO_ACTION,
    NUM_ACTIONS,
    UNKNOWN_KEY,
    ChunkLoader,
    ChunkPlan,
    ChunkStore,
    Frames,
    GameEncoder,
    Games,
    StatusReader,
    UserError,
    build_store,
    encode_game,
    find_nld_games,
    frames_of_play,
    open_or_build_store,
    read_ttyrec,
)

SCREEN = ("tty_chars", "tty_colors", "tty_cursor")
# Written out again: where two actions send the same key, the last one counts.
ACTION_OF_KEY = {int(action): index for index, action in enumerate(nethack.ACTIONS)}
SPACE = 32


# -- helpers -----------------------------------------------------------------------------------------------------------


def join(pieces):
    """All frames of a game in one."""
    return Frames(*(np.concatenate(arrays) for arrays in zip(*pieces)))


def play_of(source):
    """The player's frames of a recorded game."""
    return join(frames_of_play(read_ttyrec(source.path)))


def frames_in_store(store, game):
    """Screens, blstats, actions [n, ...] of a game as the store gives them back."""
    blocks = [store.block(game, number) for number in range(-(-int(store.frames[game]) // BLOCK))]
    names = ("chars", "colors", "blstats", "cursor", "actions")
    return {name: np.concatenate([getattr(block, name) for block in blocks]) for name in names}


def dense_rewards(store, game):
    """[n] unscaled rewards of a game."""
    rewards = np.zeros(int(store.frames[game]))
    at, values = store.rewards(game)
    rewards[at] = values
    return rewards


def smallest(recorded_games, count):
    """The smallest recorded games of the character that has the smallest: quick to read again and again."""
    by_size = sorted((game for games in recorded_games.values() for game in games), key=lambda game: game.size)
    character = next(name for name, games in recorded_games.items() if by_size[0] in games)
    assert len(recorded_games[character]) >= count
    return character, sorted(recorded_games[character], key=lambda game: game.size)[:count]


def xlog_of(source):
    """The game's line in its xlogfile, without the end of line."""
    lines = [line for file in Path(source.path).parent.glob("*.xlogfile") for line in file.read_text().splitlines()]
    return next(line for line in lines if line.endswith("ttyrecname=" + Path(source.path).name) or f"{Path(source.path).name}\t" in line)


def add_game(root, name, source, recording=None, **changes):
    """Lays a game out as NLD-AA does, with another recording or other values in its xlogfile line if given."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    file = f"nle.{len(list(folder.iterdir()))}.0.ttyrec3.bz2"
    values = dict(pair.split("=", 1) for pair in xlog_of(source).split("\t"))
    values.update({"ttyrecname": file, **changes})
    with open(folder / "nle.1.xlogfile", "a") as log:
        log.write("\t".join(f"{key}={value}" for key, value in values.items()) + "\n")
    (folder / file).write_bytes(Path(source.path).read_bytes() if recording is None else recording)
    return folder / file


def records(plain):
    """Splits an uncompressed ttyrec3 into its records: [offset, channel, length]. Channels: 0 output, 1 key, 2 score."""
    offset, found = 0, []
    while offset < len(plain):
        _, _, length, channel = struct.unpack_from("<iiiB", plain, offset)
        found.append((offset, channel, length))
        offset += 13 + length
    return found


def store_of(root, tmp_path, character):
    return open_or_build_store(str(root), str(tmp_path / "stores"), character)


# -- the reader --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """nle.dataset's reader of the recorded games, and {path of a recording: gameid}."""
    database = str(tmp_path_factory.mktemp("database") / "ttyrecs.db")
    nld.db.create(database)
    nld.add_nledata_directory(str(RECORDED), "recorded", database)
    dataset = nld.TtyrecDataset("recorded", batch_size=1, seq_length=1000, dbfilename=database, shuffle=False)
    ids = {os.path.realpath(RECORDED / dataset.get_paths(gameid)[0]): gameid for gameid in dataset._gameids}
    return dataset, ids


def test_all_recorded_games_are_found(recorded_games, dataset):
    """The same games that nle.dataset finds, each under its own character."""
    found = {os.path.realpath(game.path): character for character, games in recorded_games.items() for game in games}
    assert set(found) == set(dataset[1])
    for path, gameid in dataset[1].items():
        meta = dataset[0].get_meta(gameid)
        assert found[path] == "-".join((meta["role"], meta["race"], meta["align0"])).lower()


@pytest.mark.parametrize("character", CHARACTERS)
def test_frames_equal_nle_dataset(recorded_games, dataset, character):
    """Frame by frame from the player's first to the last; what NLE itself played before and after is dropped."""
    for source in recorded_games[character]:
        batches = dataset[0].get_ttyrec(dataset[1][os.path.realpath(source.path)], 1000)
        whole = {name: np.concatenate([batch[name][0] for batch in batches]) for name in batches[0]}
        length = int((whole["gameids"] != 0).sum())
        assert (whole["gameids"][:length] != 0).all()  # padding comes last
        whole = {name: values[:length] for name, values in whole.items()}
        ours = play_of(source)
        n = len(ours.chars)
        first = next(start for start in range(length - n + 1) if (whole["tty_chars"][start : start + n] == ours.chars).all())
        stop = first + n
        play = slice(first, stop)
        assert (whole["tty_colors"][play] == ours.colors).all()
        assert (whole["tty_cursor"][play] == ours.cursor).all()
        assert [ACTION_OF_KEY.get(key, UNKNOWN_KEY) for key in whole["keypresses"][play].tolist()] == ours.actions.tolist()
        assert ((whole["keypresses"][play] == SPACE) == ours.spaces).all()
        assert (whole["scores"][play] == ours.scores).all()

        # NLE passes the start-up screens and the disclosure at the end with SPACE: a handful each, nothing of the game.
        dropped = np.concatenate([whole["keypresses"][:first], whole["keypresses"][stop:]])
        assert (dropped == SPACE).all()
        assert first <= 6 and 8 <= length - stop <= 20
        for screen in whole["tty_chars"][:first]:
            assert b"HP:" not in screen[23].tobytes() or b"--More--" in screen.tobytes()
        assert b"HP:" in ours.chars[0, 23].tobytes() and b"--More--" not in ours.chars[0].tobytes()
        ends = [screen.tobytes() for screen in whole["tty_chars"][stop:]]
        assert any(b"'s attributes:" in screen for screen in ends)
        # From the end of the game on the score does not change any more, until it is gone.
        assert (whole["scores"][stop:-2] == whole["scores"][stop]).all()
        assert (whole["scores"][-2:] == 0).all()


@pytest.mark.parametrize("character", CHARACTERS)
def test_store_gives_the_frames_back(recorded_games, stores, character):
    store, read_status = stores[character], StatusReader()
    sources = recorded_games[character]
    assert len(store) == len(sources) and store.names.tolist() == [source.name for source in sources]
    for game, source in enumerate(sources):
        frames, stored = play_of(source), frames_in_store(store, game)
        assert store.frames[game] == len(frames.chars)
        for name in ("chars", "colors", "cursor", "actions"):
            assert (stored[name] == getattr(frames, name)).all() and stored[name].dtype == getattr(frames, name).dtype
        blstats = read_status(frames.chars)
        assert (stored["blstats"] == blstats).all()
        # Reward t = score t + 1 - score t; the tombstone's score of 0 makes none.
        assert (dense_rewards(store, game) == np.append(np.diff(frames.scores), 0)).all()
        assert store.max_depths[game] == blstats[:, 12].max()
        assert store.turns[game] == blstats[:, 20].max()
        for number in range(1, -(-len(frames.chars) // BLOCK)):
            assert store.block(game, number).previous == frames.actions[number * BLOCK - 1]
        assert store.block(game, 0).previous == NO_ACTION
    meta = store.meta
    assert (meta["games"], meta["frames"], meta["character"]) == (len(sources), int(store.frames.sum()), character)
    assert meta["skipped"] == meta["passed_over"] == [] and meta["unknown_keys"] == 0
    assert meta["bytes"] == (store.folder / "frames.bin").stat().st_size < 160 * meta["frames"]  # 3,840 bytes each uncompressed


def test_pieces_do_not_matter(recorded_games):
    """A game encoded frame by frame, in odd pieces or as a whole gives the same bytes."""
    _, (source,) = smallest(recorded_games, 1)
    frames = play_of(source)
    whole = GameEncoder().encode("game", iter([frames]))
    for size in (1, 7, 64, 100):
        pieces = (frames.cut(start, start + size) for start in range(0, len(frames.chars), size))
        assert GameEncoder().encode("game", pieces).blocks == whole.blocks
    rng = random.Random(0)
    cuts = [0, *sorted(rng.sample(range(1, len(frames.chars)), 5)), len(frames.chars)]
    pieces = (frames.cut(*ends) for ends in itertools.pairwise(cuts))
    assert GameEncoder().encode("game", pieces).blocks == whole.blocks


# -- games made for the tests ------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 130, 300)
UNKNOWN = 7  # every so many frames a key that is no action


def write_hdf5(path, games):
    """Katakomba's layout: a group a game."""
    with h5py.File(path, "w") as file:
        for name, arrays in games.items():
            group = file.create_group(name)
            for key, values in arrays.items():
                group.create_dataset(key, data=values, compression="gzip", compression_opts=1)


def raw_frames(source):
    """All frames of a recording, with those that NLE itself played."""
    return join(read_ttyrec(source.path))


def katakomba_arrays(chars, colors, cursor, actions, rewards):
    """As Katakomba's converter writes them: rewards clipped at 0 and the last one repeated, done at the last step."""
    rewards = np.maximum(np.append(rewards, rewards[-1:]), 0) if len(rewards) < len(actions) else rewards
    dones = np.zeros(len(actions), bool)
    dones[-1] = True
    return {"tty_chars": chars.astype(np.uint8), "tty_colors": colors.astype(np.int8), "tty_cursor": cursor.astype(np.int16),
            "actions": actions.astype(np.int16), "rewards": rewards.astype(np.int32), "dones": dones}  # fmt: skip


@pytest.fixture(scope="module")
def marked(recorded_games, tmp_path_factory):
    """Games whose every frame tells its game (as depth) and its number (as turn), of all lengths at which something may go wrong.

    -> (Games, list of {name: array [n, ...]} with the frames' content). They end as recorded games do.
    """
    rng = np.random.default_rng(0)
    ending = raw_frames(smallest(recorded_games, 1)[1][0])
    ending = ending.cut(pomdp.find_end_of_play(ending), len(ending.chars))
    written, expected = {}, []
    for game, n in enumerate(LENGTHS):
        chars, colors = np.full((n, 24, 80), ord("."), np.uint8), np.full((n, 24, 80), 7)
        chars[:, 5], colors[:, 5] = rng.integers(33, 127, (n, 80)), rng.integers(0, 32, (n, 80))
        for frame in range(n):
            row = f"Dlvl:{game + 1} $:0 HP:9(9) Pw:1(1) AC:9 Xp:1/0 T:{frame + 1}".ljust(80).encode()
            chars[frame, 22:] = np.frombuffer(b" " * 80 + row, np.uint8).reshape(2, 80)
        cursor = np.stack([rng.integers(0, 24, n), rng.integers(0, 80, n)], 1)
        actions = rng.integers(0, 100, n)
        rewards = rng.integers(1, 200, n) * (rng.random(n) < 0.2)
        rewards[-1] = 0  # a game's last step pays nothing
        unknown = np.arange(n) % UNKNOWN == 5
        numbers = np.where(unknown, np.where(np.arange(n) % 2, -1, NUM_ACTIONS), actions)
        arrays = (np.concatenate(pair) for pair in ((chars, ending.chars), (colors, ending.colors), (cursor, ending.cursor),
                                                    (numbers, ending.actions), (rewards, np.zeros(len(ending.chars)))))  # fmt: skip
        written[f"{game:03d}"] = katakomba_arrays(*arrays)
        expected.append({"tty_chars": chars, "tty_colors": colors, "tty_cursor": cursor, "actions": np.where(unknown, 0, actions),
                         "known": ~unknown, "rewards": rewards})  # fmt: skip
    folder = tmp_path_factory.mktemp("marked")
    write_hdf5(folder / "data-mon-hum-neu-any.hdf5", written)
    store = open_or_build_store(str(folder), str(folder / "stores"), "mon-hum-neu")
    assert store.frames.tolist() == list(LENGTHS)
    assert store.meta["unknown_keys"] == sum(int((~game["known"]).sum()) for game in expected)
    return Games([store]), expected


# Rows and steps; the last two: more rows than games, or chunks.
SHAPES = [(1, 16), (2, 7), (3, 1), (5, 32), (8, 64), (16, 100), (7, 400), (64, 16), (500, 8)]


@pytest.mark.parametrize("batch_size, seq_len", SHAPES)
@pytest.mark.parametrize("seed", [None, 3])
def test_batches(marked, batch_size, seq_len, seed):
    """Two passes over all games: each frame once a pass, its content right, rows that continue, padding that does not count."""
    games, expected = marked
    loader = ChunkLoader(games, range(len(games.frames)), batch_size, seq_len, seed, reward_scale=50.0, clip_range=3.0)
    before = None
    orders = []
    for number in range(2):
        counted = [np.zeros(n, int) for n in LENGTHS]
        shown = [np.zeros(n, int) for n in LENGTHS]
        order = []
        for step in range(number * loader.plan.steps, (number + 1) * loader.plan.steps):
            batch = {name: tensor.numpy() for name, tensor in loader.batch_at(step).items()}
            assert batch["tty_chars"].shape == (batch_size, seq_len + 1, 24, 80)
            game, frame = batch["blstats"][:, :, 12] - 1, batch["blstats"][:, :, 20] - 1  # [B, T + 1], -1: padding
            for row in range(batch_size):
                real = int((game[row] >= 0).sum())
                assert (game[row, :real] >= 0).all()  # padding comes last
                for name in (*SCREEN, "actions", "rewards", "dones", "mask"):
                    assert not batch[name][row, real:].any()
                if real == 0:
                    assert batch["starts"][row] and batch["prev_actions"][row, 0] == NO_ACTION
                    continue
                g, first = int(game[row, 0]), int(frame[row, 0])
                order.append((g, first))
                content, n = expected[g], LENGTHS[g]
                assert (game[row, :real] == g).all() and (frame[row, :real] == first + np.arange(real)).all()
                assert real == min(seq_len + 1, n - first)
                part = slice(first, first + real)
                for name in (*SCREEN, "actions"):
                    assert (batch[name][row, :real] == content[name][part]).all(), name
                assert (batch["mask"][row, :real] == content["known"][part]).all()
                assert np.allclose(batch["rewards"][row, :real], np.clip(content["rewards"][part] / 50.0, -3.0, 3.0))
                assert (batch["dones"][row, :real] == (np.arange(first, first + real) == n - 1)).all()
                # A row goes on where it was, one step overlapping, unless it says that it starts anew.
                continues = before is not None and before[0][row] == g and before[1][row] == first
                assert continues or batch["starts"][row]
                if first == 0:
                    assert batch["starts"][row]
                known = not batch["starts"][row] and content["known"][first - 1]
                assert batch["prev_actions"][row, 0] == (content["actions"][first - 1] if known else NO_ACTION)
                shown[g][first : first + min(real, seq_len)] += 1
                counted[g][first : first + min(real, seq_len)] += batch["mask"][row, : min(real, seq_len)]
            before = game[:, seq_len], frame[:, seq_len]
        assert all((times == 1).all() for times in shown)
        assert all((times == content["known"]).all() for times, content in zip(counted, expected))
        orders.append(order)
    assert (orders[0] == orders[1]) == (seed is None)  # a new order each pass


def test_rows_start_anew_as_rarely_as_they_can(marked):
    """Only where a game begins and at the beginning of a pass: clearing the state more often would waste what the LSTM knows."""
    games, _ = marked
    loader = ChunkLoader(games, range(len(games.frames)), 4, 8, 0, 1.0, 1.0)
    starts = 0
    for step in range(2 * loader.plan.steps):
        game, first, start = loader.plan.locate(step)
        assert (start == ((first == 0) | (step % loader.plan.steps == 0) | (game < 0))).all()
        starts += int((start & (game >= 0)).sum())
    assert starts <= 2 * (len(LENGTHS) + 4)


def test_batches_have_their_types(marked):
    games, _ = marked
    loader = ChunkLoader(games, [0, 5], 3, 4, 0, 1.0, 1.0, gamma_for_returns=0.9)
    kinds = {"tty_chars": torch.uint8, "tty_colors": torch.int8, "tty_cursor": torch.uint8, "blstats": torch.int32, "actions": torch.int64,
             "rewards": torch.float32, "dones": torch.bool, "mask": torch.bool, "starts": torch.bool, "prev_actions": torch.int64,
             "returns": torch.float32}  # fmt: skip
    shapes = {"tty_chars": (24, 80), "tty_colors": (24, 80), "tty_cursor": (2,), "blstats": (27,)}
    batch = loader.batch_at(0)
    assert {name: tensor.dtype for name, tensor in batch.items()} == kinds
    for name, tensor in batch.items():
        assert tuple(tensor.shape) == {"starts": (3,), "prev_actions": (3, 1)}.get(name, (3, 5, *shapes.get(name, ())))


@pytest.mark.parametrize("gamma", [0.9, 0.999, 1.0])
def test_returns_to_go(marked, gamma):
    """Equal a plain loop over the scaled and clipped rewards to the game's end."""
    games, expected = marked
    loader = ChunkLoader(games, range(len(games.frames)), 6, 11, 1, reward_scale=40.0, clip_range=2.5, gamma_for_returns=gamma)
    compared = 0
    for step in range(loader.plan.steps):
        batch = {name: tensor.numpy() for name, tensor in loader.batch_at(step).items()}
        game, frame = batch["blstats"][:, :, 12] - 1, batch["blstats"][:, :, 20] - 1
        for row, t in np.argwhere(game >= 0):
            to_go = 0.0
            for reward in expected[game[row, t]]["rewards"][frame[row, t] :][::-1]:
                to_go = min(max(reward / 40.0, -2.5), 2.5) + gamma * to_go
            assert batch["returns"][row, t] == pytest.approx(to_go, rel=1e-4, abs=1e-5)
            compared += 1
        assert not batch["returns"][game < 0].any()
    assert compared >= sum(LENGTHS)


@pytest.mark.parametrize("gamma", [0.5, 0.999, 1.0])
def test_reward_scale(games, marked, gamma):
    """Equals a plain loop over every frame of the games chosen."""
    for source, chosen in ((games, range(0, len(games.frames), 2)), (marked[0], range(3, len(LENGTHS)))):
        squares, frames = 0.0, 0
        for game in chosen:
            store, number = source.places[game]
            accumulated = 0.0
            for reward in dense_rewards(store, number).tolist():
                accumulated = gamma * accumulated + reward
                squares += accumulated**2
                frames += 1
        assert source.reward_scale(chosen, gamma) == pytest.approx((squares / frames) ** 0.5, rel=1e-9)


def test_reward_scale_without_rewards(marked):
    assert marked[0].reward_scale([0], 0.999) == 0.01  # the floor keeps rewards finite


def same(batches, others):
    for batch, other in zip(batches, others):
        assert set(batch) == set(other)
        for name in batch:
            assert torch.equal(batch[name], other[name]), name


@pytest.fixture(scope="module")
def make_loader(games):
    """Loaders of all recorded games with the same settings but for those given."""

    def make(**options):
        return ChunkLoader(games, range(len(games.frames)), 6, 48, 5, 10.0, 10.0, gamma_for_returns=0.99, **options)

    return make


def test_threads_do_not_matter(make_loader):
    plain = [make_loader().batch_at(step) for step in range(8)]
    threaded = make_loader(threads=3)
    same(plain, [threaded.batch_at(step) for step in range(8)])


def test_batch_is_a_pure_function_of_its_number(make_loader):
    """A run that resumes in the middle of a pass gets the batches that it would have had."""
    loader = make_loader()
    steps = list(range(12)) + [loader.plan.steps - 1, loader.plan.steps, loader.plan.steps + 1]
    plain = {step: loader.batch_at(step) for step in steps}
    random.Random(1).shuffle(steps)
    same([plain[step] for step in steps], [loader.batch_at(step) for step in steps])
    same([plain[step] for step in steps[:4]], [make_loader().batch_at(step) for step in steps[:4]])


def test_stream_reads_ahead_what_batch_at_gives(make_loader):
    loader, threads = make_loader(threads=2), threading.active_count()
    stream = loader.stream(5, ahead=3)
    same([next(stream) for _ in range(10)], [make_loader().batch_at(step) for step in range(5, 15)])
    stream.close()
    assert threading.active_count() <= threads + 2  # the pool's own two threads; the reader is gone


def test_stream_hands_errors_over(marked, tmp_path):
    """A damaged store stops the run with its message; it does not leave it waiting for ever."""
    games, _ = marked
    folder = copy_store(games.stores[0].folder, tmp_path / "store")
    damaged = ChunkStore(folder)
    with open(folder / "frames.bin", "r+b") as file:
        file.write(b"\xff" * int(damaged.block_offsets[-1]))
    stream = ChunkLoader(Games([damaged]), range(len(LENGTHS)), 2, 8, 0, 1.0, 1.0).stream(0)
    with pytest.raises(UserError, match="damaged"):
        next(stream)


def test_rows_of_a_part_are_rows_of_the_whole(make_loader):
    """Each GPU reads its own rows of the same plan."""
    whole = [make_loader().batch_at(step) for step in range(5)]
    for rows in (slice(0, 2), slice(2, 5), slice(5, 6)):
        part = make_loader(rows=rows)
        assert part.batch_size == rows.stop - rows.start
        same([{name: tensor[rows] for name, tensor in batch.items()} for batch in whole], [part.batch_at(step) for step in range(5)])


@given(frames=st.lists(st.integers(1, 200), min_size=1, max_size=12), rows=st.integers(1, 20), seq_len=st.integers(1, 70),
       seed=st.one_of(st.none(), st.integers(0, 2**31)), number=st.integers(0, 3))  # fmt: skip
@settings(max_examples=150)
def test_plan(frames, rows, seq_len, seed, number):
    plan = ChunkPlan(np.array(frames), rows, seq_len, seed)
    chunks = [-(-n // seq_len) for n in frames]
    assert plan.steps == -(-sum(chunks) // rows)
    played, last = [], None
    for step in range(number * plan.steps, (number + 1) * plan.steps):
        game, first, starts = plan.locate(step)
        assert game.shape == first.shape == starts.shape == (rows,)
        for row in range(rows):
            if game[row] < 0:
                assert first[row] == 0 and starts[row]
                assert step == (number + 1) * plan.steps - 1 or sum(chunks) < rows  # a row pads at most its last chunk
                continue
            played.append((int(game[row]), int(first[row])))
            assert first[row] % seq_len == 0 and first[row] < frames[game[row]]
            if not starts[row]:
                assert (last[0][row], last[1][row] + seq_len) == (game[row], first[row])
            else:
                assert first[row] == 0 or step == number * plan.steps
        last = game, first
    every = [(game, chunk * seq_len) for game, count in enumerate(chunks) for chunk in range(count)]
    assert sorted(played) == every  # each chunk exactly once
    # The place in the data is the step alone.
    again = ChunkPlan(np.array(frames), rows, seq_len, seed)
    for step in (number * plan.steps, 0, (number + 1) * plan.steps - 1):
        assert all((ours == theirs).all() for ours, theirs in zip(plan.locate(step), again.locate(step)))


# -- held-out games ----------------------------------------------------------------------------------------------------


def heldout_names(games, share):
    return {name for name, out in zip(games.names, games.heldout(share)) if out}


def test_heldout_games(stores, games):
    for share in (0.05, 0.3, 0.7):
        out = games.heldout(share)
        assert out.dtype == bool and out.shape == (len(games.names),)
        start = 0
        for store in stores.values():  # each character has games on both sides
            assert 0 < out[start : start + len(store)].sum() < len(store)
            start += len(store)
        # It depends on a character's names alone: not on the process, the order of stores or the other characters.
        assert (games.heldout(share) == out).all()
        assert heldout_names(Games(list(stores.values())[::-1]), share) == heldout_names(games, share)
        assert set().union(*(heldout_names(Games([store]), share) for store in stores.values())) == heldout_names(games, share)
    assert not games.heldout(0.0).any()
    assert heldout_names(games, 0.05) <= heldout_names(games, 0.7)


def test_one_game_is_trained_on(recorded_games, tmp_path):
    character, (source,) = smallest(recorded_games, 1)
    add_game(tmp_path / "one", "a", source)
    assert not Games([store_of(tmp_path / "one", tmp_path, character)]).heldout(0.9).any()


# -- keys that are no action -------------------------------------------------------------------------------------------


def test_unknown_keys_are_counted_and_masked(recorded_games, tmp_path, capsys):
    """A recording whose player pressed keys that are none of the 121 actions."""
    character, (source,) = smallest(recorded_games, 1)
    known = play_of(source)
    first = pomdp.find_first_frame(raw_frames(source))
    plain = bytearray(bz2.decompress(Path(source.path).read_bytes()))
    keys = [offset + 13 for offset, channel, length in records(plain) if channel == 1]
    strange = next(key for key in range(256) if key not in ACTION_OF_KEY)
    places = [0, 10, 11, len(known.chars) - 1]  # the first and the last frame of play among them
    for place in places:
        plain[keys[first + place]] = strange
    add_game(tmp_path / "games", "a", source, bz2.compress(bytes(plain)))
    store = store_of(tmp_path / "games", tmp_path, character)
    assert f"{len(places)} keypresses" in capsys.readouterr().err
    assert store.meta["unknown_keys"] == len(places)
    assert store.frames[0] == len(known.chars)
    batch = ChunkLoader(Games([store]), [0], 1, int(store.frames[0]), None, 1.0, 1e9).batch_at(0)
    mask = np.append(~np.isin(np.arange(len(known.chars)), places), False)
    assert (batch["mask"][0].numpy() == mask).all()
    assert (batch["actions"][0].numpy()[mask] == known.actions[mask[:-1]]).all()
    assert (batch["rewards"][0, :-1].numpy() == np.append(np.diff(known.scores), 0)).all()  # the rewards are there all the same
    after = ChunkLoader(Games([store]), [0], 1, 11, None, 1.0, 1e9).batch_at(1)  # begins after frame 10, the strange one
    assert not after["starts"][0] and after["prev_actions"][0, 0] == NO_ACTION


def test_every_action_and_no_other_key_is_known():
    for key in range(256):
        assert pomdp.KEY_TO_ACTION[key] == ACTION_OF_KEY.get(key, UNKNOWN_KEY)
    assert NUM_ACTIONS == 121 and len(ACTION_OF_KEY) == 118


# -- finding games -----------------------------------------------------------------------------------------------------


def test_only_games_with_a_line_count(recorded_games, tmp_path, capsys):
    """Empty xlogfiles, lines without a file, files without a line, lines that are none: the other games are read as ever."""
    character, (small, other) = smallest(recorded_games, 2)
    root = tmp_path / "games"
    (root / "junk").mkdir(parents=True)
    kept = [add_game(root, "kept", small), add_game(root, "kept", other)]  # two games in one folder
    (root / "empty").mkdir()
    (root / "empty" / "nle.1.xlogfile").write_bytes(b"")
    (root / "empty" / "nle.1.0.ttyrec3.bz2").write_bytes(Path(small.path).read_bytes())
    add_game(root, "missing", small).unlink()
    add_game(root, "strange", small, ttyrecname="notes.txt")
    (root / "strange" / "notes.txt").write_bytes(Path(small.path).read_bytes())
    (root / "junk" / "nle.1.xlogfile").write_bytes(b"\x00\xff\tno line\t=\n\n====\t\nrole=Mon\n" + b"\xfe" * 1000)
    (root / "kept" / "nle.9.9.ttyrec3.bz2").write_bytes(b"no line names it")
    store = store_of(root, tmp_path, character)
    assert store.names.tolist() == sorted(f"kept/{path.name}" for path in kept)
    assert sorted(store.frames.tolist()) == sorted(len(play_of(source).chars) for source in (small, other))
    assert store.meta["skipped"] == [] and len(store.meta["passed_over"]) == 2
    assert all(any(name in problem for problem in store.meta["passed_over"]) for name in ("missing", "strange"))
    assert "2 lines" in capsys.readouterr().err


def test_linked_games(recorded_games, tmp_path, capsys):
    """Links are followed and keep their names; a game or an xlogfile whose target is gone is named, and stops nothing."""
    character, (source,) = smallest(recorded_games, 1)
    root = tmp_path / "games"
    linked, game_gone = add_game(root, "linked", source), add_game(root, "game_gone", source)
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    game_gone.unlink()
    game_gone.symlink_to(tmp_path / "gone")
    (root / "log_gone").mkdir()
    (root / "log_gone" / "nle.1.xlogfile").symlink_to(tmp_path / "gone")
    store = store_of(root, tmp_path, character)
    assert store.names.tolist() == [f"linked/{linked.name}"]
    errors = capsys.readouterr().err
    told = "\n".join([*store.meta["passed_over"], *store.meta["skipped"], errors])
    assert str(game_gone) in told and "log_gone" in told


@pytest.mark.parametrize("name", ["../../secret.ttyrec3.bz2", "/secret.ttyrec3.bz2", "..", "", "a/b.ttyrec3.bz2"])
def test_a_line_may_not_point_out_of_its_folder(recorded_games, tmp_path, name):
    """The file exists and could be read, but a data set must not reach outside of itself."""
    character, (source,) = smallest(recorded_games, 1)
    root = tmp_path / "data" / "games"
    secret = tmp_path / "data" / "secret.ttyrec3.bz2"
    add_game(root, "ok", source)
    add_game(root, "evil", source, ttyrecname=str(secret) if name.startswith("/") else name)
    (root / "evil" / "a").mkdir()
    for path in (secret, root / "evil" / "a" / "b.ttyrec3.bz2"):
        path.write_bytes(Path(source.path).read_bytes())
    found = find_nld_games(root, character)
    assert [game.name.split("/")[0] for game in found.games] == ["ok"]
    assert len(found.problems) == 1 and "evil" in found.problems[0]


def test_games_are_told_by_the_character_they_began_with(recorded_games, tmp_path):
    """A helmet of opposite alignment or an amulet of change makes another character of it later on."""
    character, (source,) = smallest(recorded_games, 1)
    _, race, align = character.split("-")
    root = tmp_path / "games"
    add_game(root, "converted", source, align="Cha")
    add_game(root, "was_another", source, align0="Cha")
    add_game(root, "elf", source, race="Elf")
    add_game(root, "arc", source, role="Arc")
    assert [game.name.split("/")[0] for game in find_nld_games(root, character).games] == ["converted"]
    assert [game.name.split("/")[0] for game in find_nld_games(root, f"arc-{race}-{align}").games] == ["arc"]
    with pytest.raises(UserError, match=f"no games of wiz-elf-cha in .*{character}"):
        store_of(root, tmp_path, "wiz-elf-cha")


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_no_games_at_all(tmp_path, where):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"hdf5.*record_games"):
        store_of(tmp_path / where, tmp_path, "mon-hum-neu")
    assert not (tmp_path / "stores").exists()


# -- Katakomba's HDF5 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def katakomba(recorded_games, tmp_path_factory):
    """Recorded games, converted: (character, its sources, folder with the file)."""
    character, sources = smallest(recorded_games, 2)
    sources = sorted(sources)
    written = {}
    for number, source in enumerate(sources):
        raw = raw_frames(source)
        written[f"{number:03d}"] = katakomba_arrays(raw.chars, raw.colors, raw.cursor, raw.actions, np.maximum(np.diff(raw.scores), 0))
    folder = tmp_path_factory.mktemp("katakomba")
    write_hdf5(folder / f"data-{character}-any.hdf5", written)
    return character, sources, folder


def test_hdf5_gives_the_same_batches(katakomba, tmp_path, monkeypatch):
    """Found where Katakomba keeps it; the same frames as from the recording. Its rewards lack what the player lost."""
    character, sources, folder = katakomba
    monkeypatch.setenv("KATAKOMBA_DATA_DIR", str(folder))
    store = open_or_build_store(None, str(tmp_path / "stores"), character)
    root = tmp_path / "games"
    for number, source in enumerate(sources):
        add_game(root, f"{number:03d}", source)
    original = store_of(root, tmp_path, character)
    assert store.frames.tolist() == original.frames.tolist()
    ours, theirs = (ChunkLoader(Games([opened]), range(len(sources)), 3, 20, 7, 5.0, 1e9) for opened in (store, original))
    for step in range(ours.plan.steps):
        batch, other = ours.batch_at(step), theirs.batch_at(step)
        same([batch], [{**other, "rewards": other["rewards"].clamp(min=0)}])


@pytest.mark.parametrize("given", ["file", "folder"])
def test_hdf5_given_as_data_path(katakomba, tmp_path, given):
    character, sources, folder = katakomba
    path = folder / f"data-{character}-any.hdf5" if given == "file" else folder
    assert len(store_of(path, tmp_path, character)) == len(sources)


def test_hdf5_of_another_character(katakomba, tmp_path, monkeypatch):
    character, _, folder = katakomba
    path = folder / f"data-{character}-any.hdf5"
    with pytest.raises(UserError, match="does not hold games of wiz-elf-cha"):
        store_of(path, tmp_path, "wiz-elf-cha")
    monkeypatch.setenv("KATAKOMBA_DATA_DIR", str(folder))
    with pytest.raises(UserError, match=r"data-wiz-elf-cha-any\.hdf5 does not exist"):
        open_or_build_store(None, str(tmp_path), "wiz-elf-cha")


def test_damaged_hdf5(katakomba, tmp_path, capsys):
    """Groups with arrays missing, of different lengths or without an end are skipped; a file that is none is refused."""
    character, _, folder = katakomba
    path = tmp_path / f"data-{character}-any.hdf5"
    with h5py.File(folder / path.name, "r") as file:
        whole = {name: np.array(values) for name, values in file["000"].items()}
    no_colors = {name: values for name, values in whole.items() if name != "tty_colors"}
    uneven = {**whole, "rewards": whole["rewards"][:-1]}
    cut = {name: values[: len(values) // 2] for name, values in whole.items()}
    shapeless = {**whole, "tty_chars": whole["tty_chars"][:, :10]}
    nothing = {name: values[:0] for name, values in whole.items()}
    write_hdf5(path, {"a": no_colors, "b": whole, "c": uneven, "d": cut, "e": nothing, "f": shapeless, "g": {}})
    store = store_of(path, tmp_path, character)
    assert store.names.tolist() == [f"{path.name}/b"]
    assert len(store.meta["skipped"]) == 5
    errors = capsys.readouterr().err
    assert all(f"{path}:{name}" in errors for name in "acdef") and "5 unreadable games" in errors
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 1000)
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        store_of(path, tmp_path, character)


def test_hdf5_may_not_point_out_of_its_file(katakomba, tmp_path, capsys):
    """Links and data kept elsewhere: a stranger's file could have any file of the reader's read as frames."""
    character, _, folder = katakomba
    path, other = tmp_path / f"data-{character}-any.hdf5", tmp_path / "other.hdf5"
    with h5py.File(folder / path.name, "r") as file:
        whole = {name: np.array(values) for name, values in file["000"].items()}
    write_hdf5(other, {"game": whole})
    write_hdf5(path, {"whole": whole})
    raw = tmp_path / "secret.bin"
    raw.write_bytes(whole["tty_chars"].tobytes())
    with h5py.File(path, "a") as file:
        file["a-external"] = h5py.ExternalLink(str(other), "/game")
        file["b-soft"] = h5py.SoftLink("/whole")
        file["c-nowhere"] = h5py.ExternalLink(str(tmp_path / "missing"), "/game")
        chars = whole["tty_chars"]
        layout = h5py.VirtualLayout(shape=chars.shape, dtype=chars.dtype)
        layout[:] = h5py.VirtualSource(str(other), "game/tty_chars", shape=chars.shape)
        for name in ("d-inner", "e-raw", "f-virtual"):
            group = file.create_group(name)
            for member, values in whole.items():
                if member != "tty_chars":
                    group[member] = values
        file["d-inner"]["tty_chars"] = h5py.ExternalLink(str(other), "/game/tty_chars")
        file["e-raw"].create_dataset("tty_chars", chars.shape, chars.dtype, external=[(str(raw), 0, raw.stat().st_size)])
        file["f-virtual"].create_virtual_dataset("tty_chars", layout)
        followed = [file[name]["tty_chars"][:] for name in ("a-external", "d-inner", "e-raw", "f-virtual")]
        assert all((one == chars).all() for one in followed), "HDF5 follows none"
    store = store_of(path, tmp_path, character)
    assert store.names.tolist() == [f"{path.name}/whole"]
    errors = capsys.readouterr().err
    assert all(f"{path}:{name}" in errors for name in ("a-external", "b-soft", "c-nowhere", "d-inner", "e-raw", "f-virtual"))


# -- damaged games -----------------------------------------------------------------------------------------------------


def damaged_recordings(source):
    """{what happened: bytes} made of a good recording."""
    good = Path(source.path).read_bytes()
    plain = bz2.decompress(good)
    rng = random.Random(0)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    garbled = bytearray(plain)  # a recording that was damaged before it was compressed
    for _ in range(300):
        garbled[rng.randrange(len(garbled))] = rng.randrange(256)
    last_key = [offset for offset, channel, _ in records(plain) if channel == 1][-30]
    return {
        **{f"cut at {share}": good[: int(len(good) * share)] for share in (0.01, 0.3, 0.6, 0.9)},
        "cut between frames": bz2.compress(plain[:last_key]),  # as a player that was killed leaves it
        "cut within a frame": bz2.compress(plain[: last_key + 5]),
        "flipped": bytes(flipped),
        "garbled": bz2.compress(bytes(garbled)),
        "empty": b"",
        "compressed nothing": bz2.compress(b""),
        "random": rng.randbytes(5000),
        "compressed random": bz2.compress(rng.randbytes(5000)),
        "long frame": bz2.compress(plain[:last_key] + struct.pack("<iiiB", 0, 0, 2**31 - 1, 0) + b"x"),
    }


def make_damaged(root, source, other):
    """Two good games with damaged ones before, between and after them: (good files, damaged files)."""
    good = [add_game(root, "good-1", source), add_game(root, "good-2", other)]
    damaged = [add_game(root, f"{'abcdefghijklmnop'[number]}-{what}", source, recording)
               for number, (what, recording) in enumerate(damaged_recordings(source).items())]  # fmt: skip
    damaged.append(add_game(root, "z-folder", source))
    damaged[-1].unlink()
    damaged[-1].mkdir()  # found by its name only as a line without a file
    return good, damaged[:-1]


def assert_only_the_good_are_kept(store, sources, damaged, errors):
    assert [name.split("/")[0] for name in store.names.tolist()] == ["good-1", "good-2"]
    for game, source in enumerate(sources):
        frames, stored = play_of(source), frames_in_store(store, game)
        assert (stored["chars"] == frames.chars).all() and (stored["actions"] == frames.actions).all()
    for path in damaged:
        assert sum(str(path) in line for line in errors.splitlines()) == 1, path
    assert len(store.meta["skipped"]) == len(damaged)


def test_damaged_games_are_skipped_by_name(recorded_games, tmp_path, capsys):
    character, sources = smallest(recorded_games, 2)
    _, damaged = make_damaged(tmp_path / "games", *sources)
    store = store_of(tmp_path / "games", tmp_path, character)
    errors = capsys.readouterr().err
    assert_only_the_good_are_kept(store, sources, damaged, errors)
    assert f"{len(damaged)} unreadable games" in errors
    # They are told of each time, not only when the store is built.
    store_of(tmp_path / "games", tmp_path, character)
    assert f"{len(damaged)} unreadable games" in capsys.readouterr().err


def test_cut_anywhere(recorded_games, tmp_path):
    """A recording cut before its end shows is refused; cut later, it gives all its frames: never a part of them."""
    _, (source,) = smallest(recorded_games, 1)
    plain = bz2.decompress(Path(source.path).read_bytes())
    whole = encode_game(source)
    offsets = [offset for offset, channel, _ in records(plain) if channel == 1]
    refused = []
    # Some 15 cuts in the game, and one after each of its last frames.
    for place in [*range(0, len(offsets) - 25, max(1, len(offsets) // 15)), *range(max(0, len(offsets) - 25), len(offsets))]:
        path = tmp_path / "cut.ttyrec3.bz2"
        path.write_bytes(bz2.compress(plain[: offsets[place]], 1))
        game = encode_game(source._replace(path=str(path)))
        refused.append(isinstance(game, str))
        assert refused[-1] or (game.blocks == whole.blocks and game.reward_values.tolist() == whole.reward_values.tolist())
    assert refused[0] and not refused[-1] and refused == sorted(refused, reverse=True)


def test_damaged_games_with_several_workers(recorded_games, tmp_path, capfd):
    """As above in worker processes, one of which is killed over a game: that game is skipped like any other."""
    character, sources = smallest(recorded_games, 2)
    root = tmp_path / "games"
    _, damaged = make_damaged(root, *sources)
    killer = add_game(root, "0-deadly", sources[0])  # the first, so that nothing has to be read again for its sake
    killer.unlink()
    os.mkfifo(killer)  # its reader waits for us
    finished = threading.Event()

    def kill_readers():
        while not finished.wait(0.02):
            try:
                pipe = os.open(killer, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # nobody reads it yet
                continue
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
            os.close(pipe)

    thread = threading.Thread(target=kill_readers)
    thread.start()
    try:
        build_store(tmp_path / "store", find_nld_games(root, character), character, workers=2)
    finally:
        finished.set()
        thread.join()
    assert_only_the_good_are_kept(ChunkStore(tmp_path / "store"), sources, [*damaged, killer], capfd.readouterr().err)


def test_nothing_can_be_read(recorded_games, tmp_path):
    character, (source,) = smallest(recorded_games, 1)
    paths = [add_game(tmp_path / "games", name, source, b"no game") for name in "ab"]
    with pytest.raises(UserError, match=f"none of the 2 games of {character} can be read") as raised:
        store_of(tmp_path / "games", tmp_path, character)
    assert str(paths[0]) in str(raised.value)
    left = [path for path in (tmp_path / "stores").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert left == []


# -- the store ---------------------------------------------------------------------------------------------------------


def copy_store(folder, to):
    to.mkdir(parents=True)
    for path in Path(folder).iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def state(store):
    """What changes whenever the store is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.folder.iterdir()}


def test_store_is_built_again_only_when_its_games_changed(recorded_games, tmp_path):
    character, (small, other) = smallest(recorded_games, 2)
    root = tmp_path / "games"
    path = add_game(root, "a", small)
    first = store_of(root, tmp_path, character)
    states = [state(first)]
    assert state(store_of(root, tmp_path, character)) == states[-1]
    # A game more.
    added = add_game(root, "b", other)
    second = store_of(root, tmp_path, character)
    states.append(state(second))
    assert len(second) == 2 and states[-1] != states[-2]
    assert state(store_of(root, tmp_path, character)) == states[-1]
    # One that was written again, with its size and name as before.
    os.utime(path, (1, 1))
    states.append(state(store_of(root, tmp_path, character)))
    assert states[-1] != states[-2]
    # A game less.
    added.unlink()
    fourth = store_of(root, tmp_path, character)
    assert fourth.names.tolist() == first.names.tolist() and len(frames_in_store(fourth, 0)["chars"]) == first.frames[0]
    # The store that was open before is still good for the run that opened it.
    assert (frames_in_store(first, 0)["chars"] == frames_in_store(fourth, 0)["chars"]).all()


def test_store_of_another_format_is_built_again(recorded_games, tmp_path):
    character, (source,) = smallest(recorded_games, 1)
    add_game(tmp_path / "games", "a", source)
    store = store_of(tmp_path / "games", tmp_path, character)
    for content in ({**store.meta, "format": 0, "fingerprint": "old"}, {}, [], None):
        (store.folder / "meta.json").write_text(json.dumps(content) if content is not None else "{ half a fi")
        again = store_of(tmp_path / "games", tmp_path, character)
        assert again.meta["fingerprint"] == store.meta["fingerprint"] and len(again) == 1


def test_what_a_killed_build_left_is_cleared_away(recorded_games, tmp_path):
    character, (source,) = smallest(recorded_games, 1)
    add_game(tmp_path / "games", "a", source)
    store = store_of(tmp_path / "games", tmp_path, character)
    before = {path.name for path in store.folder.parent.iterdir()}
    left = store.folder.with_name(f".{character}.building")
    left.mkdir()
    (left / "frames.bin").write_bytes(b"half")
    (left / "junk").write_bytes(b"junk")
    (store.folder / "meta.json").unlink()
    again = store_of(tmp_path / "games", tmp_path, character)
    assert set(state(again)) == {"frames.bin", "index.npz", "meta.json"}
    assert {path.name for path in again.folder.parent.iterdir()} == before


def test_store_as_data_path(stores, tmp_path):
    """The folder of one character or the one above it; nothing is built anew."""
    store = stores["val-hum-neu"]
    for path in (store.folder, store.folder.parent):
        assert state(store_of(path, tmp_path, "val-hum-neu")) == state(store)
    with pytest.raises(UserError, match="is a store of val-hum-neu"):
        store_of(store.folder, tmp_path, "mon-hum-neu")
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("damage", ["flip in a block", "flip of the length in a block", "flip of the previous action in a block",
                                    "cut frames", "no frames", "flip in the index", "cut index", "no index", "meta", "meta of nothing",
                                    "other index"])  # fmt: skip
def test_damaged_store(marked, tmp_path, damage):
    """Whatever is damaged, the message names the folder, and no wrong frame is given out."""
    games, _ = marked
    folder = copy_store(games.stores[0].folder, tmp_path / "store" / "mon-hum-neu")
    frames, index, meta = (folder / name for name in ("frames.bin", "index.npz", "meta.json"))

    def flip(path, place):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(bytes(content))

    if damage == "flip in a block":
        flip(frames, frames.stat().st_size // 2)
    elif damage == "flip of the length in a block":
        flip(frames, 5)
    elif damage == "flip of the previous action in a block":
        flip(frames, 4)
    elif damage == "cut frames":
        frames.write_bytes(frames.read_bytes()[:-1])
    elif damage == "no frames":
        frames.unlink()
    elif damage == "flip in the index":
        flip(index, index.stat().st_size // 2)
    elif damage == "cut index":
        index.write_bytes(index.read_bytes()[:-10])
    elif damage == "no index":
        index.unlink()
    elif damage == "meta":
        meta.write_bytes(b"{")
    elif damage == "meta of nothing":
        meta.write_text(json.dumps({"format": json.loads(meta.read_text())["format"], "character": "mon-hum-neu"}))
    else:  # a valid index, but not this store's
        np.savez(index, **{**np.load(index), "frames": np.array([1])})
    with pytest.raises(UserError) as raised:  # noqa: PT012  some damage shows when the store is opened, some when it is read
        store = ChunkStore(folder)
        assert "in a block" in damage  # all else shows when the store is opened, not hours into a run
        for game in range(len(store)):
            frames_in_store(store, game)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def _open_and_report(root, stores, character, barrier, results):
    barrier.wait(30)
    store = open_or_build_store(root, stores, character)
    results.put((state(store), int(frames_in_store(store, 0)["chars"].sum())))


def test_two_processes_build_the_same_store(recorded_games, tmp_path):
    """One builds, the others wait for it and read what it built."""
    character, sources = smallest(recorded_games, 2)
    root = tmp_path / "games"
    for name, source in zip("ab", sources):
        add_game(root, name, source)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_open_and_report, args=(str(root), str(tmp_path / "stores"), character, barrier, results))
                 for _ in range(3)]  # fmt: skip
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert seen[0] == seen[1] == seen[2]  # the very same files: built once
    assert seen[0][1] == play_of(sources[0]).chars.sum()


def test_store_path_that_cannot_be_written(recorded_games, tmp_path):
    character, (source,) = smallest(recorded_games, 1)
    add_game(tmp_path / "games", "a", source)
    (tmp_path / "file").write_bytes(b"not a folder")
    (tmp_path / "locked").mkdir(mode=0o555)
    places = [tmp_path / "file", tmp_path / "file" / "below"]
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere
        places.append(tmp_path / "locked")
    for place in places:
        with pytest.raises(UserError, match=r"cannot write the chunk store.*--store_path") as raised:
            open_or_build_store(str(tmp_path / "games"), str(place), character)
        assert str(place) in str(raised.value)
    assert (tmp_path / "file").read_bytes() == b"not a folder"


def test_several_threads_read_one_store(stores):
    """Decoding is not shared between threads."""
    store = stores["val-hum-neu"]
    expected = [frames_in_store(store, game)["chars"].sum() for game in range(len(store))]
    wrong = []

    def read():
        for game in range(len(store)):
            if frames_in_store(store, game)["chars"].sum() != expected[game]:
                wrong.append(game)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
