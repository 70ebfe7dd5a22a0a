# SPDX-License-Identifier: MIT
"""The benchmark's batches made of recorded games, their picture, and the study that trains blocks
on them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LIMIT_S, RECORDED, ROOT

import custom_nethack_pomdp as pomdp

sys.path.insert(0, str(ROOT / "scripts"))
study = pytest.importorskip("standin_study", reason="scripts need Python 3.10")
pytestmark = [
    pytest.mark.pinned_stack,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

MONK = "mon-hum-neu"
SEARCH = int(pomdp.KEY_TO_ACTION[ord("s")])
SMALL = [
    "--steps",
    "3",
    "--batch_size",
    "4",
    "--rnn_hidden_dim",
    "32",
    "--games",
    "2",
    "--eval_max_steps",
    "12",
]


@pytest.fixture(scope="module")
def table():
    return study.draw_glyphs()


@pytest.fixture(scope="module")
def monk(stores):
    return pomdp.Games([stores[MONK]])


def take(games, table, count, **settings):
    batches = study.game_batches(games, study.standin.TrainConfig(**settings), table)
    return [next(batches) for _ in range(count)]


@pytest.fixture(scope="module")
def batches(monk, table):
    """40 batches of 3 rows and 32 + 1 steps: one begins with the shortest game, so that another
    follows."""
    return take(monk, table, 40, batch_size=3, seq_len=32, train_seed=40)


# --- The batches
def test_batches_look_as_the_made_up_ones_and_overlap_by_a_step(batches, table):
    made_up = next(
        study.standin.made_up_batches(study.standin.TrainConfig(batch_size=3, seq_len=32), seed=0)
    )
    for name, array in made_up.items():
        assert (batches[0][name].shape, batches[0][name].dtype) == (array.shape, array.dtype), name
        for before, after in zip(batches, batches[1:]):
            np.testing.assert_array_equal(before[name][:, -1], after[name][:, 0], err_msg=name)
    assert batches[0].keys() == made_up.keys()
    screens = study.render(table, *(batches[0][name] for name in study.SCREEN))
    np.testing.assert_array_equal(batches[0]["screen_image"], screens)


def test_rows_play_whole_games_one_after_another(batches, stores):
    """Without the overlap a row is games from their first frame to their last, as the store has
    them."""
    store, inside, rewards = stores[MONK], 0, []
    for row in range(3):
        stream = {
            name: np.concatenate([batch[name][row, :-1] for batch in batches])
            for name in batches[0]
        }
        ends = np.flatnonzero(stream["dones"]) + 1
        inside += int((ends % 32 != 0).sum())
        for steps in np.split(np.arange(40 * 32), ends):
            lengths = (
                store.frames == len(steps) if steps[-1] + 1 in ends else store.frames > len(steps)
            )
            firsts = {game: store.block(game, 0) for game in np.flatnonzero(lengths)}
            begin = stream["tty_chars"][steps[0]]
            (game,) = [
                game for game, first in firsts.items() if (first["tty_chars"][0] == begin).all()
            ]
            for number in range(-(-len(steps) // pomdp.BLOCK)):
                part, block = (
                    steps[number * pomdp.BLOCK : (number + 1) * pomdp.BLOCK],
                    store.block(game, number),
                )
                for name in (*study.SCREEN, "actions"):
                    np.testing.assert_array_equal(
                        stream[name][part], block[name][: len(part)], err_msg=name
                    )
            expected = np.zeros(store.frames[game])
            expected[store.rewards(game)[0]] = store.rewards(game)[1]
            rewards.append(stream["rewards"][steps])
            np.testing.assert_array_equal(rewards[-1], np.maximum(expected, 0)[: len(steps)])
    assert inside > 0 and np.concatenate(rewards).max() >= 4, "the test shows nothing"


def test_a_lost_score_costs_nothing(monk, monkeypatch):
    store, _ = monk.in_store[0]
    monkeypatch.setattr(store, "rewards", lambda game: ([0, 2], np.array([-7, 5])))
    assert next(study.play_row(monk, iter([0])))["rewards"][:3].tolist() == [0, 0, 5]


def test_the_seed_decides_the_order_of_games(monk, table):
    first, again, other = (
        take(monk, table, 1, batch_size=3, seq_len=2, train_seed=seed)[0] for seed in (1, 1, 2)
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["tty_chars"], other["tty_chars"])
    # each row plays another game
    assert len({screen.tobytes() for screen in first["tty_chars"][:, 0]}) == 3


# --- The picture
def test_every_cell_is_drawn_at_its_place_and_black_beyond_the_screen(table):
    """Against a loop over cells, with the cursor in corners and the middle, and all colours and
    characters."""
    rng = np.random.default_rng(0)
    cursor = np.array([(0, 0), (23, 79), (0, 79), (12, 40)], dtype=np.uint8)
    chars, colors = (
        rng.integers(0, 256, (4, 24, 80)).astype(np.uint8),
        rng.integers(0, 32, (4, 24, 80)).astype(np.int8),
    )
    pictures = study.render(table, chars, colors, cursor)
    assert pictures.shape == (4, 3, 108, 108) and pictures.dtype == np.uint8
    for frame, i, j in np.ndindex(4, 18, 18):
        cell = pictures[frame, :, 6 * i : 6 * i + 6, 6 * j : 6 * j + 6]
        y, x = (cursor[frame].astype(int) - 9 + (i, j)).tolist()
        if 0 <= y < 24 and 0 <= x < 80:
            np.testing.assert_array_equal(
                cell, table[32 * int(chars[frame, y, x]) + int(colors[frame, y, x])]
            )
        else:
            assert not cell.any()


def test_characters_differ_and_inverse_video_is_the_negative(table):
    glyphs = table.reshape(256, 32, 3, 6, 6).astype(int)
    assert len({glyphs[code, 7].tobytes() for code in range(33, 127)}) == 94
    assert len({glyphs[ord("@"), color].tobytes() for color in range(32) if color % 16}) == 30
    for color in range(1, 16):
        assert not glyphs[ord(" "), color].any()
        full = glyphs[ord(" "), 16 + color]  # the whole cell in the colour
        assert np.ptp(full, axis=(1, 2)).max() == 0
        # rounding
        assert np.abs(glyphs[ord("@"), color] + glyphs[ord("@"), 16 + color] - full).max() <= 1
    assert [glyphs[ord(" "), 16 + color, :, 0, 0].tolist() for color in (1, 12)] == [
        [170, 0, 0],
        [85, 85, 255],
    ]


# --- Games
class Recorder(torch.nn.Module):
    """Searches, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen, self.states = [], []

    def vec_act(self, obs, state=None, device="cpu"):
        self.seen.append({name: np.array(array) for name, array in obs.items()})
        self.states.append(state)
        return np.full(len(obs["prev_actions"]), SEARCH), len(self.seen)


def test_blocks_play_with_what_the_benchmark_gives(table):
    """Two slots and three games of five steps: the first slot's second game finds the state that
    the first one left."""
    model = Recorder()
    config = pomdp.TrainConfig(eval_processes=2, eval_episodes=3, eval_max_steps=5)
    player = study.Player(model, table)
    results = pomdp.vec_evaluate(player, MONK, config, torch.device("cpu"))
    assert [game.length for game in results] == [5, 5, 5] and model.states == [None, *range(1, 10)]
    for tick, obs in enumerate(model.seen):
        assert (obs["prev_actions"] == SEARCH * (tick > 0)).all()
        assert set(obs) == {*study.SCREEN, "screen_image", "prev_actions"}
        np.testing.assert_array_equal(
            obs["screen_image"], study.render(table, *(obs[name] for name in study.SCREEN))
        )


# --- The command
def arguments(stores_path, *more):
    return ["--data_path", str(RECORDED), "--store_path", str(stores_path), *SMALL, *map(str, more)]


def test_the_command_trains_all_three_alike_and_repeatably(
    stores, stores_path, tmp_path, one_thread
):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"kept": true}\n', encoding="utf-8")
    command = [
        sys.executable,
        ROOT / "scripts" / "standin_study.py",
        *arguments(stores_path, "--out", out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (
        study.main(arguments(stores_path, "--out", out, "--submissions", "ours", "--steps", "8"))
        == 0
    )
    kept, ours, bc, iql, again = [
        json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()
    ]
    assert kept == {"kept": True} and [row["algorithm"] for row in (ours, bc, iql)] == [
        "ours",
        "bc",
        "iql",
    ]
    for row in (ours, bc, iql):
        assert (row["steps"], row["transitions"], row["rnn_hidden_dim"], row["seed"]) == (
            3,
            192,
            32,
            1,
        )
        assert (
            len(row["curve"]) == 3
            and row["played"]["lengths"] == [12, 12]
            and len(row["block_sha256"]) == 64
        )
        assert row["hardware"]["threads"] >= 1
    assert done.stdout.endswith(f"{study.make_table([ours, bc, iql])}\n")
    assert (
        f"| bc | 192 | {bc['train_loss']:.2f} | 2 | " in done.stdout
        and " | 0 / 0 / 2 |\n" in done.stdout
    )
    # the same weights and batches, but another head
    assert bc["curve"][0] == iql["curve"][0] != ours["curve"][0]
    assert again["block_sha256"] == ours["block_sha256"] != bc["block_sha256"]
    curve = again["curve"]
    assert curve[:3] == pytest.approx(ours["curve"], rel=1e-4) and curve[-1] < curve[0] - 0.15


BARE = "class Model:\n    pass\n\n\nclass OfflineAlgorithm:\n    pass\n\n\n1 / 0\n"


@pytest.mark.parametrize(
    "more, complaint",
    [
        (["--steps", "0"], "seed must be at least 1"),
        (["--submissions", "nowhere.py"], "No such file or directory: 'nowhere.py'"),
        (
            ["--submissions", "{folder}/broken.py"],
            r"broken.py: ZeroDivisionError: division by zero (line 9)",
        ),
        (["--out", "{folder}/nowhere/rows.jsonl"], "No such file or directory"),
        (["--character", "wiz-elf-cha"], "wiz-elf-cha"),
    ],
)
def test_mistakes_are_told_in_one_line(more, complaint, stores, stores_path, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(BARE, encoding="utf-8")
    out = ["--out", str(tmp_path / "rows.jsonl")]
    assert (
        study.main(
            arguments(
                stores_path, *out, *(word.replace("{folder}", str(tmp_path)) for word in more)
            )
        )
        == 2
    )
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and error.startswith("error: ")
