"""The benchmark's batches made of recorded games, their picture, and the study that trains blocks on them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
study = pytest.importorskip("standin_study", reason="scripts need Python 3.10")
pytestmark = pytest.mark.pinned_stack

GAMES = ROOT / "tests" / "data" / "nle_data"
REFERENCES = ROOT / "scripts" / "references"
MONK = "mon-hum-neu"
SEARCH = int(pomdp.KEY_TO_ACTION[ord("s")])
NAMES = ("tty_chars", "tty_colors", "tty_cursor", "actions", "rewards")
SMALL = ("--steps", "3", "--heldout_steps", "2", "--batch_size", "4", "--seq_len", "8", "--rnn_hidden_dim", "32")


@pytest.fixture(scope="module")
def table():
    return study.draw_glyphs()


@pytest.fixture(scope="module")
def monk(stores):
    return pomdp.Games([stores[MONK]])


@pytest.fixture(scope="module")
def whole_games(monk):
    """Every game from its first frame to its last, read block by block from the store: {name: [frames, ...]}."""
    result = []
    for store, number in monk.places:
        blocks = [store.block(number, place) for place in range(-(-int(store.frames[number]) // pomdp.BLOCK))]
        game = {name: np.concatenate([getattr(block, name.replace("tty_", "")) for block in blocks]) for name in NAMES[:-1]}
        game["rewards"] = np.zeros(len(game["actions"]))
        for frame, reward in zip(*store.rewards(number)):
            game["rewards"][frame] = max(reward, 0)
        result.append(game)
    return result


def take(batches, count):
    return [next(batches) for _ in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# The batches
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def batches(monk, table):
    """40 batches of 3 rows and 32 + 1 steps: long enough for games to end, and for the next ones to follow."""
    config = study.standin.TrainConfig(batch_size=3, seq_len=32)
    return take(study.game_batches(monk, np.arange(len(monk.frames)), config, 2, table), 40)


def test_batches_look_as_the_made_up_ones(batches):
    config = study.standin.TrainConfig(batch_size=3, seq_len=32)
    made_up = next(study.standin.made_up_batches(config, seed=0))
    assert {name: (array.shape, array.dtype) for name, array in batches[0].items()} == {
        name: (array.shape, array.dtype) for name, array in made_up.items()}  # fmt: skip


def test_each_batch_begins_with_the_step_that_ended_the_one_before(batches):
    for before, after in zip(batches, batches[1:]):
        for name, array in after.items():
            np.testing.assert_array_equal(before[name][:, -1], array[:, 0], err_msg=name)
        assert not np.array_equal(before["tty_chars"], after["tty_chars"])


def test_rows_play_whole_games_one_after_another(batches, whole_games):
    """Put together without the overlap, a row is a game's rest and then games from their first frame on, as they lie in the store."""
    inside = 0
    for row in range(3):
        stream = {name: np.concatenate([batch[name][row, : -1] for batch in batches]) for name in (*NAMES, "dones")}
        ends = np.flatnonzero(stream["dones"]) + 1
        inside += int((ends % 32 != 0).sum())
        played = np.split(np.arange(len(stream["actions"])), ends)
        for number, steps in enumerate(part for part in played if len(part)):
            at_end = bool(stream["dones"][steps[-1]])
            found = []
            for game in whole_games:
                length = len(game["actions"])
                if number == 0:  # begins anywhere: where its actions are found
                    firsts = [length - len(steps)] if at_end else range(length - len(steps) + 1)
                else:
                    firsts = [0] if not at_end or length == len(steps) else []
                found += [(game, first) for first in firsts if first >= 0
                          and np.array_equal(game["actions"][first : first + len(steps)], stream["actions"][steps])]  # fmt: skip
            assert any(all(np.array_equal(game[name][first : first + len(steps)], stream[name][steps]) for name in NAMES)
                       for game, first in found), (row, number, len(steps))  # fmt: skip
    assert inside > 0, "no game ended inside a chunk: the test shows nothing"


def test_rewards_are_raw_and_never_negative(batches):
    rewards = np.concatenate([batch["rewards"] for batch in batches])
    assert rewards.max() >= 4 and rewards.min() == 0 and np.array_equal(rewards, np.round(rewards))


def test_the_same_seed_gives_the_same_batches_and_the_games_asked_for(monk, table, whole_games):
    config = study.standin.TrainConfig(batch_size=2, seq_len=8)
    first, again, other = (next(study.game_batches(monk, np.array([1, 3]), config, seed, table)) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["tty_chars"], other["tty_chars"])
    for batch in (first, other):
        for frame in batch["tty_chars"].reshape(-1, 24, 80):
            assert any((whole_games[game]["tty_chars"] == frame).all(axis=(1, 2)).any() for game in (1, 3))


# ----------------------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------------------
def test_the_hero_is_in_the_pictures_middle(batches, table):
    """Column and row 9 of the 18 x 18 cells, 6 pixels each: the character under the cursor in its colour."""
    batch, seen = batches[0], 0
    for row, step in np.ndindex(batch["actions"].shape):
        y, x = batch["tty_cursor"][row, step]
        char, color = batch["tty_chars"][row, step, y, x], batch["tty_colors"][row, step, y, x]
        np.testing.assert_array_equal(batch["screen_image"][row, step][:, 54:60, 54:60], table[char, color])
        seen += char == ord("@")
    assert seen > 10


def test_every_cell_is_drawn_at_its_place_and_black_beyond_the_screen(table):
    """Against a loop over cells, with the cursor in corners and the middle, and all colours and characters."""
    rng = np.random.default_rng(0)
    cursor = np.array([(0, 0), (23, 79), (0, 79), (12, 40)], dtype=np.uint8)
    chars = rng.integers(0, 256, (4, 24, 80)).astype(np.uint8)
    colors = rng.integers(0, 32, (4, 24, 80)).astype(np.int8)
    pictures = study.render(table, chars, colors, cursor)
    assert pictures.shape == (4, 3, 108, 108) and pictures.dtype == np.uint8
    for frame, (y, x) in enumerate(cursor.astype(int)):
        for i, j in np.ndindex(18, 18):
            cell = pictures[frame, :, 6 * i : 6 * i + 6, 6 * j : 6 * j + 6]
            at = y - 9 + i, x - 9 + j
            if 0 <= at[0] < 24 and 0 <= at[1] < 80:
                np.testing.assert_array_equal(cell, table[chars[(frame, *at)], colors[(frame, *at)]])
            else:
                assert not cell.any()


def test_characters_differ_and_inverse_video_is_the_negative(table):
    assert table.shape == (256, 32, 3, 6, 6)
    printable = range(33, 127)
    assert len({table[code, 7].tobytes() for code in printable}) == len(printable)
    colors = range(1, 16)
    assert len({table[ord("@"), color].tobytes() for color in (*colors, *(16 + color for color in colors))}) == 30
    for color in colors:
        assert not table[ord(" "), color].any()
        full = table[ord(" "), 16 + color].astype(int)  # the whole cell in the colour
        assert np.ptp(full, axis=(1, 2)).max() == 0 and tuple(full[:, 0, 0]) == study.RGB[color]
        assert np.abs(table[ord("@"), color].astype(int) + table[ord("@"), 16 + color] - full).max() <= 1  # rounding


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss
# ----------------------------------------------------------------------------------------------------------------------
def test_heldout_loss_is_that_of_one_long_pass(monk, table, tmp_path):
    """Chunk by chunk with states carried: as if the whole stream had gone through the model at once."""
    config = study.standin.TrainConfig(batch_size=2, seq_len=8)
    block, = study.read_submissions(str(REFERENCES / "bc.py"), str(tmp_path))
    torch.manual_seed(0)
    backbone = study.standin.ModelBackbone(study.standin.NUM_ACTIONS, rnn_hidden_dim=32, rnn_layers=2)
    algo = block.module.OfflineAlgorithm(backbone, config, "cpu")
    with torch.no_grad():  # large enough weights for states and previous actions to matter
        for parameter in algo.model.parameters():
            parameter.mul_(3.0)
    chosen = np.array([1])  # 432 frames: the game ends on the way
    result = study.score_heldout(algo, config, study.game_batches(monk, chosen, config, 0, table), 60)

    batches = take(study.game_batches(monk, chosen, config, 0, table), 60)
    stream = {name: torch.from_numpy(np.concatenate([batch[name][:, :-1] for batch in batches], axis=1)) for name in batches[0]}
    assert stream["dones"].any()
    actions = stream["actions"]
    inputs = {name: stream[name].float() for name in ("tty_chars", "tty_colors", "tty_cursor", "screen_image")}
    inputs["prev_actions"] = torch.cat([torch.zeros((2, 1), dtype=torch.long), actions[:, :-1]], dim=1)
    with torch.no_grad():
        log_probs = torch.log_softmax(algo.model(inputs)[0], dim=-1)
    assert result["loss_per_action"] == pytest.approx(-log_probs.gather(-1, actions[..., None]).mean().item(), rel=1e-4)
    assert result["accuracy"] == pytest.approx((log_probs.argmax(-1) == actions).float().mean().item())
    assert algo.model.training and all(parameter.grad is None for parameter in algo.parameters())


def test_loss_of_frequencies():
    seen, other = study.Counts(), study.Counts()
    seen.actions[:2] = 29, 9  # shares 30, 10 and 119 times 1 of 159
    other.actions[[1, 5]] = 3, 1
    assert seen.frequencies_loss(other) == pytest.approx(-(3 * np.log(10 / 159) + np.log(1 / 159)) / 4)


# ----------------------------------------------------------------------------------------------------------------------
# Games
# ----------------------------------------------------------------------------------------------------------------------
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
    model = Recorder()
    options = study.argparse.Namespace(games=16, eval_max_steps=5, character=MONK)  # in two slots a second game begins
    played = study.play(model, options, table)
    assert len(played["scores"]) == 16 and set(played["lengths"]) == {5} and played["ends"]["step limit"] == 16
    assert model.states == [None, *range(1, 10)]  # handed on as it was, over the games' ends too
    assert (model.seen[0]["prev_actions"] == 0).all() and (model.seen[6]["prev_actions"][:2] == SEARCH).all()
    for obs in model.seen:
        assert set(obs) == {"tty_chars", "tty_colors", "tty_cursor", "screen_image", "prev_actions"}
        terminal = [obs[name] for name in ("tty_chars", "tty_colors", "tty_cursor")]
        np.testing.assert_array_equal(obs["screen_image"], study.render(table, *terminal))
    assert study.play(model, study.argparse.Namespace(games=0), table) is None


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------
def arguments(stores_path, *more):
    return ["--data_path", str(GAMES), "--store_path", str(stores_path), *SMALL, *more]


def test_the_command_trains_all_three_and_writes_their_rows(stores, stores_path, tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"kept": true}\n', encoding="utf-8")
    more = ("--out", str(out), "--games", "2", "--eval_max_steps", "12", "--heldout_share", "0.4")
    command = [sys.executable, str(ROOT / "scripts" / "standin_study.py"), *arguments(stores_path, *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    kept, *rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert kept == {"kept": True} and [row["algorithm"] for row in rows] == ["ours", "bc", "iql"]
    for row in rows:
        assert (row["steps"], row["transitions"], row["rnn_hidden_dim"], row["seed"]) == (3, 96, 32, 1)
        assert row["train_loss"] == pytest.approx(row["curve"][-1], abs=1e-3) and len(row["curve"]) == 3
        # Hardly trained: near log(121) = 4.80, and nothing but the games' actions decides the frequencies' loss.
        assert 4.5 < row["heldout"]["loss_per_action"] < 5.0 and 0 <= row["heldout"]["accuracy"] <= 1
        assert row["heldout"]["frequencies"] == rows[0]["heldout"]["frequencies"] < 4.8
        assert len(row["played"]["scores"]) == 2 == sum(row["played"]["ends"].values()) and row["played"]["lengths"] == [12, 12]
        assert row["hardware"]["threads"] >= 1 and len(row["block_sha256"]) == 64
        assert f"{row['algorithm']:<12} {96:>11} {row['train_loss']:>10.3f} {row['heldout']['loss_per_action']:>13.3f}" in done.stdout
    assert len({row["block_sha256"] for row in rows}) == 3
    assert rows[1]["curve"][0] == rows[2]["curve"][0]  # the same weights and batches: both begin with the same loss


def test_a_second_run_gives_the_same_and_training_lowers_the_loss(stores, stores_path, tmp_path):
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        more = ("--submissions", "ours", "--out", str(out), "--steps", "12", "--learning_rate", "3e-3")
        assert study.main(arguments(stores_path, *more)) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0]["curve"] == rows[1]["curve"] and rows[0]["heldout"] == rows[1]["heldout"]
    assert rows[0]["curve"][-1] < 4.0 < 4.5 < rows[0]["curve"][0]


BARE = "class Model:\n    pass\n\n\nclass OfflineAlgorithm:\n    def __init__(self, backbone, config, device):\n"
SILENT = BARE + ("        self.model = backbone\n    def parameters(self):\n        return self.model.parameters()\n"
                 "    def train_step(self, batch, previous, states):\n"
                 "        return self.model.topline[0].weight.sum(), {}, {'loss_per_action': 1.0}\n")  # fmt: skip


@pytest.mark.parametrize("more, complaint", [
    (["--steps", "0"], "--steps must be at least 1, not 0"),
    (["--learning_rate", "nan"], "--learning_rate must be above 0, not nan"),
    (["--seed", "-1"], "--seed must be"),
    (["--games", "-1"], "--games must be at least 0, not -1"),
    (["--heldout_share", "1"], "--heldout_share must be between 0 and 1, not 1.0"),
    (["--submissions", "ours,nowhere.py"], "cannot read nowhere.py"),
    (["--submissions", "ours,ours"], "--submissions names ours twice"),
    (["--submissions", "{folder}/broken.py"], "broken.py does not load: ZeroDivisionError"),
    (["--submissions", "{folder}/silent.py"], "silent: the info of its train_step lacks accuracy"),
    (["--out", "{folder}/nowhere/rows.jsonl"], "--out: cannot write"),
    (["--character", "wiz-elf-cha"], "wiz-elf-cha"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(more, complaint, stores, stores_path, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(BARE + "        pass\n1 / 0\n", encoding="utf-8")
    (tmp_path / "silent.py").write_text(SILENT, encoding="utf-8")
    assert study.main(arguments(stores_path, *(word.replace("{folder}", str(tmp_path)) for word in more))) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and error.startswith("standin_study.py: ")
