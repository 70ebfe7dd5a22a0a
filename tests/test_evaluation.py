# SPDX-License-Identifier: MIT
"""Evaluation: fair quotas, results that repeat to the bit, held-out games, and nothing left
behind."""

import contextlib
import csv
import hashlib
import json
import math
import statistics
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from nle import nethack

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import NO_ACTION, GameResult, NetHackGame, game_seeds

SLOTS, HIDDEN = 3, 32
CPU = torch.device("cpu")
SEARCH, QUIT = (
    int(pomdp.KEY_TO_ACTION[int(key)]) for key in (nethack.Command.SEARCH, nethack.Command.QUIT)
)
YES = int(pomdp.KEY_TO_ACTION[ord("y")])
pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**others):
    small = dict(
        character="mon-hum-neu",
        rnn_hidden_dim=HIDDEN,
        device="cpu",
        eval_processes=SLOTS,
        eval_max_steps=30,
    )
    return pomdp.TrainConfig(**{**small, **others})


class Watched(pomdp.Model):
    """Ours, small and decided enough for states to matter, with a fingerprint of all that goes in
    and out."""

    def __init__(self):
        torch.manual_seed(7)
        super().__init__(
            pomdp.ModelBackbone(pomdp.NUM_ACTIONS, HIDDEN), pomdp.AWRConfig(head_dim=24)
        )
        self.policy.weight.data *= 8
        self.hash, self.actions, self.states = hashlib.sha256(), [], []

    def vec_act(self, obs, state=None, device="cpu"):
        actions, state = super().vec_act(obs, state, device)
        self.actions.append(np.array(self.choose(obs, actions)))
        self.states.append(state.rnn_state)
        for array in (
            *(obs[name] for name in sorted(obs)),
            *(part.numpy() for part in state.rnn_state),
            self.actions[-1],
        ):
            self.hash.update(np.ascontiguousarray(array).tobytes())
        return self.actions[-1], state

    def choose(self, obs, actions):
        return actions


class Scripted(torch.nn.Module):
    """Plays by the clock: quits in slot r every r + 3 ticks. Records everything that it is
    given."""

    def __init__(self):
        super().__init__()
        self.seen, self.given, self.actions, self.modes = [], [], [], set()

    def vec_act(self, obs, state=None, device="cpu"):
        tick = len(self.seen)
        keys = [
            {row + 1: QUIT, row + 2: YES}.get(tick % (row + 3), SEARCH)
            for row in range(len(obs["prev_actions"]))
        ]
        self.modes.add(self.training)
        self.seen.append({name: array.copy() for name, array in obs.items()})
        self.given.append(state)
        self.actions.append(np.array(keys))
        return self.actions[-1], f"state of tick {tick}"


def play(model, games=4, character="mon-hum-neu", **others):
    config = settings(eval_episodes=games, **others)
    return pomdp.vec_evaluate(model, character, config, CPU)


def watched(**options):
    """Results, and the fingerprint of everything that the model saw and did."""
    model = Watched()
    return play(model, **options), model.hash.hexdigest()


# --- it repeats
def test_repeats_to_the_bit_whatever_the_number_of_threads():
    first, again = watched(), watched()
    assert first == again
    assert watched(eval_seed=51)[1] != first[1]
    one = watched(games=1)
    try:
        torch.set_num_threads(2)
        assert watched(games=1) == one
    finally:
        torch.set_num_threads(1)


def test_games_and_sampled_actions_both_depend_on_the_seed(monkeypatch):
    """Each alone too: the other's seed is held."""
    first = watched()
    monkeypatch.setattr(pomdp, "game_seeds", lambda _, number: game_seeds(50, number))
    assert watched(eval_seed=51)[1] != first[1], "actions are drawn alike"
    monkeypatch.undo()
    monkeypatch.setattr(torch, "manual_seed", lambda _: torch.default_generator.manual_seed(1))
    held = watched()
    assert watched() == held and watched(eval_seed=51)[1] != held[1], "games are alike"


def test_a_game_depends_neither_on_the_number_of_games_nor_on_what_was_played_before():
    few, _ = watched(character="val-hum-neu", games=4)
    watched(character="ran-hum-neu", games=5, eval_seed=3)
    many, _ = watched(character="val-hum-neu", games=9)
    assert few == many[:4] and [result.game for result in many] == list(range(9))
    outcomes = {(result.score, result.turns, result.depth) for result in many}
    assert len(outcomes) > 1, "all alike: this shows nothing"


# --- which games are played, and what the model is given
@pytest.fixture(scope="module")
def scripted():
    """-> model, {game: (slot, tick of its first frame)} by the quota and the games' lengths, and
    each slot's ticks."""
    model = Scripted().train()

    results = play(model, games=10)
    places, clock = {}, [0] * SLOTS
    for result in results:
        slot = result.game % SLOTS
        places[result.game] = (slot, clock[slot])
        clock[slot] += result.length
    assert [*places] == list(range(10)) and len(
        {result.length for result in results}
    ) == SLOTS  # as fast as unequal
    return model, places, clock


def test_each_game_is_played_once_by_its_slot_with_its_seeds(scripted):
    """Slots end games at different rates; still slot s plays games s, s + slots, ... and no
    other."""
    model, places, clock = scripted
    game = NetHackGame("mon-hum-neu")
    for number, (slot, tick) in places.items():
        for name, array in game.reset(*game_seeds(50, number)).items():
            assert np.array_equal(model.seen[tick][name][slot], array), (number, name)
    game.close()
    assert len(model.seen) == max(clock), "it goes on when all games are over"


def test_the_model_is_given_previous_actions_within_a_game_and_its_own_states(scripted):
    model, places, clock = scripted
    assert model.training and model.modes == {False}, (
        "played in evaluation mode, trained on in its own"
    )
    assert model.given == [None] + [f"state of tick {tick}" for tick in range(len(model.seen) - 1)]
    for tick, obs in enumerate(model.seen):
        for slot in (slot for slot in range(SLOTS) if tick < clock[slot]):
            expected = (
                NO_ACTION if (slot, tick) in places.values() else model.actions[tick - 1][slot]
            )
            assert obs["prev_actions"][slot] == expected, (slot, tick)
        # Rows that pad to a multiple of 8, and slots whose games are over, show nothing.
        idle = [row for row in range(8) if row >= SLOTS or tick >= clock[row]]
        assert (
            all(len(array) == 8 for array in obs.values())
            and (obs["prev_actions"][idle] == NO_ACTION).all()
        )
        assert not any(obs[name][idle].any() for name in pomdp.OBSERVATIONS)


def test_rows_without_a_game_do_not_matter():
    """Whatever is done there, and however many slots there are beside."""

    class Disturbed(Watched):
        def choose(self, obs, actions):
            idle = ~obs["tty_chars"].any(axis=(1, 2))
            self.idle = max(idle.sum(), getattr(self, "idle", 0))
            return np.where(idle, len(self.actions) % 121, actions)

    disturbed = Disturbed()
    assert play(disturbed, games=5) == watched(games=5)[0]
    assert disturbed.idle > 8 - SLOTS
    rows = {}
    for slots in (8, 9):
        model = Scripted()
        play(model, games=1, eval_processes=slots)
        rows[slots] = len(model.seen[0]["prev_actions"])
    assert rows == {8: 8, 9: 16}
    for games in (1, 2, 3):
        assert [result.game for result in play(Scripted(), games=games)] == list(range(games))


class Quitting(Watched):
    """Searches, and quits its game in slot r every 20 + r ticks. `told`: by the loop, where a game
    begins."""

    def vec_act(self, obs, state=None, device="cpu"):
        previous = obs["prev_actions"] if self.told or not self.actions else self.actions[-1]
        actions, state = super().vec_act({**obs, "prev_actions": previous}, state, device)
        self.playing.append(state.rnn_state[0][:, obs["tty_chars"].any(axis=(1, 2))].tolist())
        return actions, state

    def choose(self, obs, actions):
        ticks = len(self.actions) % (20 + np.arange(len(actions))) - np.arange(len(actions))
        return np.where(ticks == 18, QUIT, np.where(ticks == 19, YES, SEARCH))


def test_our_model_notices_new_games_by_itself(monkeypatch):
    """In a loop that does not tell, as the benchmark's, it plays as in one that does; without a
    look at them not."""
    played = []
    for told, looks in ((True, True), (True, False), (False, True), (False, False)):
        model = Quitting()
        model.told, model.playing = told, []
        if not looks:
            monkeypatch.setattr(
                pomdp, "games_begun", lambda seen, chars: ([False] * len(seen), seen)
            )
        assert {result.end for result in play(model, games=6)} == {"died"}
        played.append(model.playing)
        monkeypatch.undo()
    assert played[0] == played[1] == played[2] != played[3]


def test_seeds_are_distinct_and_within_nle_s_range():
    seeds = [game_seeds(eval_seed, number) for eval_seed in (0, 1, 50) for number in range(300)]
    for each in zip(*seeds):
        assert len({*each}) == len(each) and 0 <= min(each) and max(each) < 2**31
    assert all(core != disp for core, disp in seeds)


# --- what is made of the results
RESULTS = [
    GameResult(0, 100.0, 1, 10, 50, "died", 1, 2, "killed by a newt"),
    GameResult(1, 40.0, 3, 400, 1000, "no progress", 3, 1, "no progress"),
    GameResult(2, 0.0, 2, 7, 60, "died", 2, 1, "killed by Ms. Oz, the shopkeeper, while praying"),
    GameResult(3, 900.0, 4, 1000, 2000, "step limit", 5, 8, "step limit"),
]


def test_summary_against_plain_arithmetic():
    summary = pomdp.summarize_games(RESULTS, "ran-hum-neu")
    scores = [100.0, 40.0, 0.0, 900.0]
    expected = {"normalized_score": statistics.mean(score / 8067.99 for score in scores)}
    expected.update(max_depth_mean=11 / 4, level_mean=12 / 4)
    expected.update(
        turns_mean=1417 / 4,
        length_mean=3110 / 4,
        end_died=0.5,
        end_no_progress=0.25,
        end_step_limit=0.25,
    )
    functions = {
        "mean": statistics.mean,
        "median": statistics.median,
        "std": statistics.pstdev,
        "min": min,
        "max": max,
    }
    for name, function in functions.items():
        expected.update(
            {f"reward_{name}": function(scores), f"depth_{name}": function([1, 3, 2, 4])}
        )
    expected["progression"] = (0.01848 + 0.01754 + 0.01539 + 0.07454) / 4
    for name in ("normalized_score", "progression"):
        low, high = summary.pop(f"{name}_low"), summary.pop(f"{name}_high")
        assert low < summary[name] < high
    assert summary == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in summary.values()), (
        "numpy's numbers do not go into JSON"
    )
    assert pomdp.geometric_mean([0.02, 0.03, 0.09]) == pytest.approx(
        (0.02 * 0.03 * 0.09) ** (1 / 3)
    )
    assert pomdp.geometric_mean([0.5]) == 0.5
    assert pomdp.geometric_mean([0.5, 0.0]) == pomdp.geometric_mean([-0.1, 0.2]) == 0.0


def test_progression_is_the_larger_of_two_values():
    """Deeper than the last depth that has a value, it stays at that one's."""
    games = [(1, 1), (1, 2), (2, 1), (12, 10), (10, 12), (53, 1), (1, 30), (50, 30)]
    values = [0.0, 0.01848, 0.01539, 0.20613, 0.33265, 0.8068, 0.78046, 0.8068]
    assert [pomdp.progression(*game) for game in games] == values
    back_up = GameResult(0, 10.0, 1, 10, 50, "died", 12, 10, "starvation")  # who had been at 12
    assert back_up.progression == 0.20613


def test_progression_has_the_values_of_nethackers():
    progress = pytest.importorskip("nethackers.arena.progress")  # Python 3.11 or later
    values = {
        **{f"Dlvl:{depth}": pomdp.progression(depth, 1) for depth in range(1, 51)},
        **{f"Xp:{level}": pomdp.progression(1, level) for level in range(1, 31)},
    }
    theirs = {name: progress.ACHIEVEMENTS.get(name) for name in values}
    assert values == pytest.approx(theirs, abs=5.1e-6)
    # What is missed: the quest, the planes and the win itself.
    assert {name[:4] for name in progress.ACHIEVEMENTS.keys() - values.keys()} == {
        *("Home", "Astr", "You ")
    }


def test_bootstrap_interval_against_a_plain_loop():
    values = np.array([0.0, 0.0, 0.1, 0.4, 2.0])
    rng = np.random.default_rng(0)
    means = sorted(
        statistics.mean(values[index] for index in rng.integers(5, size=5)) for _ in range(999)
    )
    # 2.5 % of the way from the first to the last of 999 means is place 24.95, and 97.5 % is place
    # 973.05.
    expected = (
        means[24] + 0.95 * (means[25] - means[24]),
        means[973] + 0.05 * (means[974] - means[973]),
    )
    assert pomdp.bootstrap_interval(values, seed=0, resamples=999) == pytest.approx(
        expected, rel=1e-9
    )


def test_an_evaluation_s_files_and_lines(tmp_path, capsys):
    config = settings(character="mon-hum-neu,ran-hum-neu", eval_episodes=4, eval_max_steps=20)
    row, games = pomdp.evaluate_games(Watched(), config, CPU, tmp_path / "7")
    assert [character for character, _ in games] == config.characters
    said = capsys.readouterr().out.splitlines()
    shown = [
        float(line.split()[-1]) for line in said if line.startswith("D4RL score: ")
    ]  # what the benchmark reads
    names = ("mon-hum-neu/normalized_score", "ran-hum-neu/normalized_score")
    assert (
        shown == pytest.approx([row[name] for name in names], abs=1e-6)
        and "TEST_METRICS" in said[-1]
    )
    assert row["eval/normalized_score_ran_hum_neu"] == row["ran-hum-neu/normalized_score"]
    with open(tmp_path / "7_ran-hum-neu_games.csv", newline="") as file:
        table = list(csv.DictReader(file))
    scores = [float(game["score"]) for game in table]
    normalized = [float(game["normalized_score"]) for game in table]
    assert normalized == [score / 8067.99 for score in scores]
    assert row["ran-hum-neu/reward_mean"] == np.mean(scores)
    seeds = [(int(game["core_seed"]), int(game["disp_seed"])) for game in table]
    assert seeds == [game_seeds(50, number) for number in range(4)]
    assert len(list(tmp_path.iterdir())) == 2


def test_causes_of_death_hold_commas_and_are_read_back(tmp_path):
    pomdp.save_games(tmp_path / "7", "ran-hum-neu", RESULTS, 50)
    with open(tmp_path / "7_games.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [game["cause"] for game in table] == [result.cause for result in RESULTS]
    assert [game["depth"] for game in table] == ["1", "3", "2", "4"]
    assert [float(game["progression"]) for game in table] == [0.01848, 0.01754, 0.01539, 0.07454]


class Walkers(torch.nn.Module):
    """They walk at random until their time is up: scores of several sizes."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(3)

    def vec_act(self, obs, state=None, device="cpu"):
        return self.rng.integers(16, size=len(obs["prev_actions"])), None


@pytest.mark.parametrize("kept", [1, 2, 4, 9])
def test_recordings_of_games_are_kept_by_their_score(tmp_path, kept):
    """The best, the worst, and between; what is kept is the game that was played."""
    config = settings(eval_episodes=7, eval_max_steps=400, eval_replays=kept)
    left = tmp_path / ".9_mon-hum-neu_replays" / "0" / "nle.1.0.ttyrec3.bz2"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of an evaluation that was killed")
    _, ((_, results),) = pomdp.evaluate_games(Walkers(), config, CPU, tmp_path / "9")
    recordings = list(tmp_path.glob("9_mon-hum-neu_game*.ttyrec3.bz2"))
    numbers = sorted(int(path.name[18:].partition(".")[0]) for path in recordings)
    assert len(numbers) == min(kept, 7) and set(numbers) <= set(range(7))
    scores = {result.game: result.score for result in results}
    chosen = [scores[number] for number in numbers]
    assert len(set(scores.values())) > 1, "all alike: this shows nothing"
    assert max(chosen) == max(scores.values())
    assert min(chosen) == min(scores.values()) or kept == 1
    for path, number in ((path, int(path.name[18:].partition(".")[0])) for path in recordings):
        frames = pomdp.read_ttyrec(str(path))
        assert frames.scores[pomdp.find_first_frame(frames) :].max() == scores[number]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "the others are gone"


def test_what_is_written_and_printed_of_known_games(tmp_path, capsys, monkeypatch):
    """Of games whose scores, depths and turns are all different, and none of them only 0."""
    monkeypatch.setattr(pomdp, "vec_evaluate", lambda *_: RESULTS)
    row, _ = pomdp.evaluate_games(None, settings(character="ran-hum-neu"), CPU, tmp_path / "7")
    score = 1040 / 4 / 8067.99
    assert row["eval/normalized_score"] == pytest.approx(score)
    assert f"D4RL score: {score:.6f}\n" in capsys.readouterr().out
    with open(tmp_path / "7_ran-hum-neu_games.csv", newline="") as file:
        table = list(csv.DictReader(file))
    scores = [float(game["score"]) for game in table]
    assert scores == [100.0, 40.0, 0.0, 900.0]
    assert [int(game["depth"]) for game in table] == [1, 3, 2, 4]
    normalized = [float(game["normalized_score"]) for game in table]
    assert normalized == [score / 8067.99 for score in scores]


# --- held-out games
class Counting:
    """An algorithm that counts what it is called with."""

    def __init__(self):
        self.model, self.calls = torch.nn.Linear(1, 1), []

    def train_step(self, batch, prev_actions, states):
        assert states.get("after", 0) == len(self.calls) and not (
            self.model.training or torch.is_grad_enabled()
        )
        self.calls.append((batch, prev_actions))
        states = {"after": len(self.calls)}
        return torch.zeros(()), states, {"number": torch.tensor(float(len(self.calls)))}


def loader_of(games, rows=4, **others):
    chosen = np.arange(0, len(games.frames), 3)
    config = settings(seq_len=8, **others)
    return pomdp.ChunkLoader(games, chosen, config, rows, 20.0, shuffle=False)


def test_held_out_chunks_follow_one_another_and_means_are_over_frames(games):
    loader, algorithm = loader_of(games), Counting()
    means = pomdp.evaluate_heldout(algorithm, loader, 300, CPU)
    batches = [loader.batch_at(number) for number in range(10)]  # 4 x 8 frames each
    assert len(algorithm.calls) == 10 and algorithm.model.training
    for (seen, previous), batch in zip(algorithm.calls, batches):
        batch, prev_actions = batch
        assert torch.equal(previous, prev_actions)
        assert all(torch.equal(seen[name], batch[name]) for name in batch)
    batches = [batch for batch, _ in batches]
    masks = [batch["mask"][:, :-1] for batch in batches]
    frames = [int(mask.sum()) for mask in masks]
    assert means["frames"] == sum(frames)
    assert means["number"] == pytest.approx(
        sum(n * (k + 1) for k, n in enumerate(frames)) / sum(frames)
    )
    assert pomdp.evaluate_heldout(Counting(), loader, 10**9, CPU)["frames"] == sum(
        games.frames[::3]
    )


def test_held_out_means_are_over_known_actions_and_the_value_s_over_frames_in_play():
    """Two batches: one of 8 frames in play with 2 known actions, one of 4 with 4."""

    class Reporting(Counting):
        def train_step(self, batch, prev_actions, states):
            _, states, _ = super().train_step(batch, prev_actions, states)
            number = torch.tensor(float(len(self.calls)))
            return number, states, {"loss_per_action": number, "value_loss": number}

    class Loader:
        sampler = types.SimpleNamespace(steps=2, rows=1)
        config = types.SimpleNamespace(seq_len=8)

        def batch_at(self, step):
            mask = torch.arange(9)[None] < (9, 4)[step]
            known = torch.arange(9)[None] < (2, 4)[step]
            actions = torch.where(known, 5, pomdp.NO_ACTION)
            return {"mask": mask, "actions": actions}, torch.zeros(1, 1, dtype=torch.long)

    means = pomdp.evaluate_heldout(Reporting(), Loader(), 16, CPU)
    assert means["frames"] == 6
    assert means["loss_per_action"] == pytest.approx((2 * 1 + 4 * 2) / 6)
    assert means["value_loss"] == pytest.approx((8 * 1 + 4 * 2) / 12)


def test_held_out_games_leave_no_trace_and_are_scored_without_dropout(games):
    torch.manual_seed(0)
    algorithm, loader = pomdp.make_algorithm(settings(rnn_dropout=0.5), CPU), loader_of(games)
    algorithm.train_step(*loader.batch_at(1), {})  # the scale of advantages is known
    before, drawn = (
        {name: value.clone() for name, value in algorithm.model.state_dict().items()},
        torch.get_rng_state(),
    )
    one, other = (pomdp.evaluate_heldout(algorithm, loader, 300, CPU) for _ in range(2))
    assert one == other and one["advantage_scale"] == pytest.approx(
        before["advantage_square"].sqrt().item()
    )
    assert all(
        torch.equal(value, before[name]) for name, value in algorithm.model.state_dict().items()
    )
    assert torch.equal(torch.get_rng_state(), drawn) and algorithm.model.training


def test_frames_of_held_out_games_are_those_asked_for(tmp_path, stores_path):
    data = str(Path(__file__).parent / "data" / "nle_data")
    config = settings(
        data_path=data, store_path=str(stores_path), batch_size=4, seq_len=8, eval_episodes=0
    )
    config.eval_heldout_frames = 90
    run = pomdp.make_run(config)
    run.folder = tmp_path / "run"
    run.folder.mkdir()
    with contextlib.closing(pomdp.start_logging(config, run.folder, run.progress)) as logger:
        pomdp.evaluate_run(run, logger)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["kind"] == "evaluation"
    assert 64 < row["heldout/frames"] <= 96 and math.isfinite(row["heldout/loss"])


# --- nothing is left behind
def test_games_that_are_left_in_the_middle_leave_no_folder(tmp_path, monkeypatch):
    """NLE makes one a game: while games are played they are there, whatever ends it they go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    class Failing(Scripted):
        def vec_act(self, obs, state=None, device="cpu"):
            seen.append(len(list(tmp_path.iterdir())))
            if len(seen) == 5:
                raise KeyboardInterrupt
            return super().vec_act(obs, state, device)

    with pytest.raises(KeyboardInterrupt):
        play(Failing())
    assert min(seen) >= SLOTS, "NLE's folders lie elsewhere"
    play(Scripted())
    assert list(tmp_path.iterdir()) == []
