"""Evaluation: fair quotas, cleared states, results that repeat to the bit, and nothing left behind."""

import hashlib
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from nle import nethack
from torch import nn

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import (
    NO_ACTION,
    GamePool,
    GameResult,
    NetHackGame,
    game_seeds,
    play_games,
)

ROOT = Path(__file__).resolve().parents[1]
SLOTS = 3
CPU = torch.device("cpu")
ESC, SEARCH, QUIT = (next(i for i, action in enumerate(nethack.ACTIONS) if action.name == name) for name in ("ESC", "SEARCH", "QUIT"))
YES = int(pomdp.KEY_TO_ACTION[ord("y")])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def game_folder(tmp_path_factory):
    """Where the worker processes' NLE puts its folders: no other program's are among them."""
    folder = tmp_path_factory.mktemp("nle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(scope="module")
def pools(game_folder):
    """Pools of three slots by their number of worker processes. Starting one takes seconds, so the tests share them."""
    pools = {workers: GamePool(SLOTS, workers) for workers in (1, 2, 3)}
    yield pools
    for pool in pools.values():
        pool.close()


class Player(nn.Module):
    """A small recurrent policy on the real backbone, greedy or sampled."""

    def __init__(self, greedy):
        super().__init__()
        torch.manual_seed(7)
        self.backbone = pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 32, 2)
        self.policy = nn.Linear(32, pomdp.NUM_ACTIONS)
        self.greedy = greedy
        with torch.no_grad():  # spread the choices: an untrained policy is close to uniform, and greedily repeats one action
            self.policy.weight.mul_(60)

    @torch.no_grad()
    def vec_act(self, obs, state=None, device="cpu"):
        inputs = {name: torch.as_tensor(array)[:, None] for name, array in obs.items()}
        core_output, state = self.backbone(inputs, state)
        logits = self.policy(core_output[:, -1])
        actions = logits.argmax(dim=-1) if self.greedy else torch.distributions.Categorical(logits=logits).sample()
        return actions.numpy(), state


class Watched(nn.Module):
    """Passes everything on to another model, and keeps a fingerprint of all that went in and out."""

    def __init__(self, model):
        super().__init__()
        self.model, self.fingerprint, self.ticks, self.actions = model, hashlib.sha256(), 0, []

    def vec_act(self, obs, state=None, device="cpu"):
        actions, new_state = self.model.vec_act(obs, state, device)
        for name in sorted(obs):
            self.fingerprint.update(name.encode() + np.ascontiguousarray(obs[name]).tobytes())
        self.fingerprint.update(np.asarray(actions).tobytes() + b"".join(part.numpy().tobytes() for part in new_state))
        self.ticks += 1
        self.actions.append(np.array(actions))
        return actions, new_state


class Scripted(nn.Module):
    """Plays by the clock, quits in slot r every r + 3 ticks, and records everything that it is given."""

    def __init__(self, act=None, fail_at=None):
        super().__init__()
        self.act, self.fail_at = act or self.quit_often, fail_at
        self.seen, self.given, self.returned, self.actions, self.modes = [], [], [], [], set()

    @staticmethod
    def quit_often(tick, row):
        return {row + 1: QUIT, row + 2: YES}.get(tick % (row + 3), SEARCH)

    def vec_act(self, obs, state=None, device="cpu"):
        tick, rows = len(self.seen), len(obs["prev_actions"])
        if tick == self.fail_at:
            raise RuntimeError("the model fails")
        self.modes.add(self.training)
        self.seen.append({name: array.copy() for name, array in obs.items()})
        self.given.append(None if state is None else tuple(part.clone() for part in state))
        self.actions.append(np.array([self.act(tick, row) for row in range(rows)]))
        self.returned.append(tuple(torch.full((2, rows, 4), float(tick + 1)) * sign for sign in (1, -1)))
        return self.actions[-1], self.returned[-1]


def play(pool, model, games=7, character="mon-hum-neu", seed=50, max_steps=60):
    return play_games(pool, model, character, games, seed, max_steps, CPU)


# --- it repeats
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_repeats_to_the_bit_whatever_the_number_of_workers(pools, greedy):
    runs = []
    for seed, workers in enumerate((1, 2, 3, 2)):  # 2 twice: the same pool, again
        watched = Watched(Player(greedy))
        torch.manual_seed(seed)  # what the process drew before must not matter
        runs.append((play(pools[workers], watched), watched.fingerprint.hexdigest(), watched.ticks))
    assert all(run == runs[0] for run in runs[1:])
    assert len(np.unique(np.concatenate(watched.actions)[:SLOTS])) > 1 or greedy, "a policy that always does the same shows nothing"


def test_another_seed_plays_other_games(pools):
    first, second, again = (Watched(Player(greedy=False)) for _ in range(3))
    play(pools[2], first, seed=50)
    play(pools[2], second, seed=51)
    play(pools[2], again, seed=50)
    assert first.fingerprint.digest() == again.fingerprint.digest() != second.fingerprint.digest()


def test_the_block_s_own_model_repeats(pools):
    """The submission itself, small, sampled."""
    torch.manual_seed(1)
    algorithm = pomdp.OfflineAlgorithm(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 32, 2), pomdp.TrainConfig(), "cpu")
    runs = []
    for workers in (1, 3):
        watched = Watched(algorithm.model)
        runs.append((play(pools[workers], watched), watched.fingerprint.hexdigest()))
    assert runs[0] == runs[1]
    assert len({tuple(actions[:SLOTS]) for actions in watched.actions}) > 10, "it does not sample"


def test_the_number_of_threads_does_not_matter(pools):
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            watched = Watched(Player(greedy=False))
            runs.append((play(pools[2], watched, games=3, max_steps=15), watched.fingerprint.hexdigest()))
    finally:
        torch.set_num_threads(1)
    assert runs[0] == runs[1]


def test_a_game_does_not_depend_on_how_many_are_played(pools):
    """With the same slots, games 0 .. n - 1 are the same whether n are played or more, sampled actions included."""
    few, many = (play(pools[2], Player(greedy=False), games=games) for games in (4, 9))
    assert few == many[:4] and [result.game for result in many] == list(range(9))
    assert len({(result.score, result.turns, result.depth) for result in many}) > 1, "games that are all alike show nothing"


def test_what_was_played_before_does_not_matter(pools):
    alone = play(pools[2], Player(greedy=False), character="val-hum-neu", games=4)
    play(pools[2], Player(greedy=False), character="ran-hum-neu", games=5, seed=3)
    assert play(pools[2], Player(greedy=False), character="val-hum-neu", games=4) == alone


def test_a_pool_serves_on_after_an_evaluation_that_failed(pools):
    alone = play(pools[2], Player(greedy=False), games=4)
    with pytest.raises(RuntimeError, match="the model fails"):
        play(pools[2], Scripted(fail_at=5))
    assert play(pools[2], Player(greedy=False), games=4) == alone


# --- which games are played
@pytest.fixture(scope="module")
def scripted(pools):
    model = Scripted().train()

    def generators():
        return [torch.get_rng_state(), np.random.get_state()[1], random.getstate()]  # noqa: NPY002  the global one is meant

    before = generators()
    results = play(pools[2], model, games=10)
    return model, results, before, generators()


def starts_of(results, slots=SLOTS):
    """{game: (slot, tick of its first frame)}, from what the quota promises and the games' lengths."""
    places, clock = {}, [0] * slots
    for result in sorted(results):
        slot = result.game % slots
        places[result.game] = (slot, clock[slot])
        clock[slot] += result.length
    return places, clock


def test_each_game_is_played_once_by_its_slot_with_its_seeds(scripted):
    """Slots end games at different rates; still slot s plays games s, s + slots, ... and no other."""
    model, results, _, _ = scripted
    assert [result.game for result in results] == list(range(10))
    assert len({result.length for result in results}) == SLOTS, "all slots are equally fast: this shows nothing"
    game = NetHackGame("mon-hum-neu")
    places, clock = starts_of(results)
    for number, (slot, tick) in places.items():
        first = game.reset(*game_seeds(50, number))
        for name, array in first.items():
            assert np.array_equal(model.seen[tick][name][slot], array), (number, name)
    game.close()
    assert len(model.seen) == max(clock), "it goes on when all games are over"


def test_first_frames_do_not_depend_on_the_number_of_slots(pools, game_folder):
    pool = GamePool(2, 1)
    try:
        two, three = Scripted(), Scripted()
        for model, chosen, slots in ((two, pool, 2), (three, pools[1], 3)):
            model.places = starts_of(play(chosen, model, games=6), slots)[0]
    finally:
        pool.close()
    for number in range(6):
        frames = [model.seen[tick]["tty_chars"][slot] for model in (two, three) for slot, tick in [model.places[number]]]
        assert np.array_equal(*frames), number


def test_seeds_are_distinct_and_within_nle_s_range():
    seeds = [game_seeds(eval_seed, number) for eval_seed in (0, 1, 50) for number in range(300)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for pair in seeds for seed in pair)


@pytest.mark.parametrize("games", [1, 2, 3, 4])
def test_fewer_games_than_slots_and_just_as_many(pools, games):
    assert [result.game for result in play(pools[3], Scripted(), games=games)] == list(range(games))


# --- what the model is given
def test_state_and_previous_action_are_cleared_at_each_new_game_and_only_there(scripted):
    model, results, _, _ = scripted
    places, clock = starts_of(results)
    fresh = set(places.values())
    assert model.given[0] is None
    for tick, obs in enumerate(model.seen):
        for slot in range(SLOTS):
            if tick >= clock[slot]:
                continue
            if (slot, tick) in fresh:
                assert obs["prev_actions"][slot] == NO_ACTION, (slot, tick)
                assert tick == 0 or all((part[:, slot] == 0).all() for part in model.given[tick]), (slot, tick)
            else:
                assert obs["prev_actions"][slot] == model.actions[tick - 1][slot], (slot, tick)
                for part, returned in zip(model.given[tick], model.returned[tick - 1]):
                    assert torch.equal(part[:, slot], returned[:, slot]), (slot, tick)


class Quitting(pomdp.Model):
    """Ours, but slot r quits its game every 20 + r ticks."""

    def __init__(self, clear_state):
        torch.manual_seed(3)
        super().__init__(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 32, 2), head_dim=24, clear_state=clear_state)
        with torch.no_grad():  # decided enough for states to matter
            self.policy.weight.mul_(60)
        self.ticks, self.states = 0, []

    def vec_act(self, obs, state=None, device="cpu"):
        actions, state = super().vec_act(obs, state, device)
        self.states.append(torch.cat([part[:, :SLOTS].flatten() for part in state[:2]]))
        every = 20 + np.arange(len(actions))
        actions = np.where(self.ticks % every == every - 2, QUIT, np.where(self.ticks % every == every - 1, YES, actions))
        actions[: SLOTS][self.ticks % every[:SLOTS] < 8] = SEARCH  # some turns go by in every game
        self.ticks += 1
        return actions, state


def test_our_model_notices_new_games_by_itself(pools):
    """In a loop that clears nothing, as the benchmark's, it plays as in one that does; without looking at the turns it does not."""
    played = {}
    for name, loop_clears, model_clears in (("loop", True, False), ("model", False, True), ("neither", False, False)):
        model = Quitting(model_clears)
        results = play_games(pools[1], model, "mon-hum-neu", 9, 50, 60, CPU, clear_state=loop_clears)
        played[name] = results, torch.stack(model.states)
    assert len(played["loop"][0]) == 9 and played["loop"][0] == played["model"][0]
    assert torch.equal(played["loop"][1], played["model"][1])
    assert played["neither"][1].shape != played["loop"][1].shape or not torch.equal(played["neither"][1], played["loop"][1])


def test_states_run_on_when_they_are_not_to_be_cleared(pools):
    """eval_clear_state: false, as in Katakomba's loop: only the first game of a slot begins with nothing."""
    model = Scripted()
    results = play_games(pools[2], model, "mon-hum-neu", 10, 50, 60, CPU, clear_state=False)
    _, clock = starts_of(results)
    assert (model.seen[0]["prev_actions"] == NO_ACTION).all() and model.given[0] is None
    for tick, obs in enumerate(model.seen[1:], start=1):
        for slot in (slot for slot in range(SLOTS) if tick < clock[slot]):
            assert obs["prev_actions"][slot] == model.actions[tick - 1][slot], (slot, tick)
            assert all(torch.equal(part[:, slot], returned[:, slot]) for part, returned in zip(model.given[tick], model.returned[tick - 1]))


def test_inactive_rows_show_nothing(scripted):
    """Rows that pad to a multiple of 8, and slots whose games are over: empty screens, and no previous action."""
    model, results, _, _ = scripted
    _, clock = starts_of(results)
    assert len({*clock}) > 1, "all slots end together: this shows nothing"
    for tick, obs in enumerate(model.seen):
        assert all(len(array) == 8 for array in obs.values())
        idle = [row for row in range(8) if row >= SLOTS or tick >= clock[row]]
        assert (obs["prev_actions"][idle] == NO_ACTION).all()
        assert not any(obs[name][idle].any() for name in pomdp.OBSERVATIONS)


def test_padding_follows_the_number_of_slots(pools):
    assert [pools[1].rows] + [-(-slots // 8) * 8 for slots in (8, 9, 14)] == [8, 8, 16, 16]


def test_inactive_rows_do_not_matter(pools):
    """Whatever stands in them and whatever is done there, the games go the same way."""

    class Disturbed(Player):
        def vec_act(self, obs, state=None, device="cpu"):
            noise = np.random.default_rng(len(self.noisy))
            obs = {name: array.copy() for name, array in obs.items()}
            idle = ~obs["blstats"].any(axis=1) & ~obs["tty_chars"].any(axis=(1, 2))
            for name, top in (("tty_chars", 128), ("tty_colors", 16), ("tty_cursor", 24), ("blstats", 100), ("prev_actions", 121)):
                obs[name][idle] = noise.integers(0, top, size=obs[name][idle].shape)
            actions, state = super().vec_act(obs, state, device)
            actions[idle] = noise.integers(0, 121, size=int(idle.sum()))
            self.noisy.append(int(idle.sum()))
            return actions, state

    disturbed = Disturbed(greedy=False)
    disturbed.noisy = []
    assert play(pools[2], disturbed, games=5) == play(pools[2], Player(greedy=False), games=5)
    assert min(disturbed.noisy) == 5 and max(disturbed.noisy) > 5


def test_training_goes_on_undisturbed(scripted):
    """Evaluating more or less often must not change what is trained: no random state moves, and the mode comes back."""
    model, _, before, after = scripted
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]
    assert model.training and model.modes == {False}, "games are played in evaluation mode, training goes on in its own"


# --- how games end
def test_ends_are_told_apart(pools):
    """One slot quits at once, one stands still, one quits later."""

    def act(tick, row):
        return {(0, 3): QUIT, (0, 4): YES, (1, 6): SEARCH, (2, 28): QUIT, (2, 29): YES}.get((row, tick), ESC if row else SEARCH)

    results = play(pools[3], Scripted(act), games=3, max_steps=2000)
    assert [(result.end, result.length, result.turns) for result in results] == [("died", 5, 4), ("no progress", 1007, 2), ("died", 30, 1)]
    assert [result.cause for result in results] == ["quit", "", "quit"]
    results = play(pools[3], Scripted(act), games=3, max_steps=20)
    ends = [(result.end, result.length, result.turns) for result in results]
    assert ends == [("died", 5, 4), ("step limit", 20, 2), ("step limit", 20, 1)]


@pytest.fixture
def game():
    game = NetHackGame("val-hum-neu", max_steps=5000)
    game.reset(*game_seeds(50, 3))
    yield game
    game.close()


def steps_until_done(game, actions):
    for action in actions:
        _, _, done, info = game.step(action)
        if done:
            return info
    return None


def test_no_progress_aborts_after_exactly_1000_steps_without_a_turn(game):
    assert steps_until_done(game, [SEARCH] * 5 + [ESC] * 999) is None
    info = steps_until_done(game, [ESC])
    assert (info["end"], info["length"], info["turns"]) == ("no progress", 1005, 6)


def test_any_turn_starts_the_count_anew(game):
    assert steps_until_done(game, [ESC] * 999 + [SEARCH] + [ESC] * 999) is None
    assert steps_until_done(game, [ESC])["length"] == 2000


def test_a_reset_starts_the_count_anew(game):
    assert steps_until_done(game, [ESC] * 999) is None
    game.reset(*game_seeds(50, 4))
    assert steps_until_done(game, [ESC] * 999) is None
    assert steps_until_done(game, [ESC])["length"] == 1000


def test_the_cause_of_a_death_is_what_nethack_itself_notes(tmp_path):
    """A tourist who walks about at random does not live long."""
    said = {"died": "killed by", "starving": "starv", "poisoning": "poison", "quit": "quit", "drowning": "drown", "crushing": "crush"}
    rng, causes = np.random.default_rng(0), set()
    actions = [index for index, action in enumerate(nethack.ACTIONS) if action.name[0] in "NSEW" and index < 16]  # moves and runs
    for number in range(2):
        game = NetHackGame("tou-hum-neu", str(tmp_path / str(number)))
        game.reset(*game_seeds(50, number))
        info = steps_until_done(game, (rng.choice(actions) if step % 50 else ESC for step in range(100_000)))
        game.close()
        (noted,) = pomdp.parse_xlogfile(next((tmp_path / str(number)).glob("*xlogfile")))
        assert info["end"] == "died" and said[info["cause"]] in noted["death"]
        causes.add(info["cause"])
    assert causes - {"quit"}, "nobody died: this shows nothing"


@pytest.mark.parametrize("limit, end", [(1, "step limit"), (2, "died"), (3, "died")])
def test_the_step_limit_and_a_death_at_the_same_step(limit, end):
    game = NetHackGame("mon-hum-neu", max_steps=limit)
    game.reset(*game_seeds(50, 0))
    info = steps_until_done(game, [QUIT, YES])
    assert (info["end"], info["length"]) == (end, min(limit, 2))
    assert info["cause"] == ("quit" if end == "died" else "")
    game.close()


def test_rewards_add_up_to_the_score_that_the_game_shows():
    rng, seen = np.random.default_rng(0), set()
    game = NetHackGame("val-hum-neu")
    actions = [index for index, action in enumerate(nethack.ACTIONS) if action.name[0] in "NSEW" and index < 16]  # moves and runs
    for number in range(4):
        game.reset(*game_seeds(50, number))
        total, start = 0.0, game.last_blstats[9]
        for _ in range(300):
            _, reward, done, info = game.step(rng.choice(actions))
            total += reward
            if done:
                assert info["score"] == total
                break
            assert total == game.score == game.last_blstats[9] - start
        seen.add(total)
    game.close()
    assert max(seen) > 0, "no game scored: this shows nothing"


# --- what is made of the results
RESULTS = [GameResult(0, 100.0, 1, 10, 50, "died"), GameResult(1, 40.0, 3, 400, 1000, "no progress"), GameResult(2, 0.0, 2, 7, 60, "died"),
           GameResult(3, 900.0, 4, 1000, 2000, "step limit", 2)]  # fmt: skip


def test_summary_against_plain_arithmetic():
    summary = pomdp.summarize_games(RESULTS, "ran-hum-neu")
    scores, depths = [100.0, 40.0, 0.0, 900.0], [1, 3, 2, 4]
    normalized = [score / 8067.99 for score in scores]
    expected = {"normalized_score": statistics.mean(normalized), "normalized_score_median": statistics.median(normalized),
                "turns_mean": 1417 / 4, "length_mean": 3110 / 4, "end_died": 0.5, "end_no_progress": 0.25, "end_step_limit": 0.25,
                "games_replayed": 1}  # fmt: skip
    for name, values in (("reward", scores), ("depth", depths)):
        expected.update({f"{name}_mean": statistics.mean(values), f"{name}_median": statistics.median(values),
                         f"{name}_std": statistics.pstdev(values), f"{name}_min": min(values), f"{name}_max": max(values)})  # fmt: skip
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, rel=1e-12), name
    assert {"normalized_score_low", "normalized_score_high"} == set(summary) - set(expected)
    assert summary["normalized_score_low"] < summary["normalized_score"] < summary["normalized_score_high"]
    assert all(type(value) is float for value in summary.values()), "numpy's numbers do not go into JSON"


def test_bootstrap_interval_against_a_plain_loop():
    values = np.array([0.0, 0.0, 0.1, 0.4, 2.0])
    rng = np.random.default_rng(0)
    means = sorted(statistics.mean(values[index] for index in rng.integers(5, size=5)) for _ in range(999))
    # 2.5 % of the way from the first to the last of 999 means is place 24.95, and 97.5 % is place 973.05.
    expected = (means[24] + 0.95 * (means[25] - means[24]), means[973] + 0.05 * (means[974] - means[973]))
    assert pomdp.bootstrap_interval(values, seed=0, resamples=999) == pytest.approx(expected, rel=1e-9)
    assert pomdp.bootstrap_interval(values) == pomdp.bootstrap_interval(values), "it must repeat"
    assert pomdp.bootstrap_interval(np.full(6, 0.25)) == (0.25, 0.25)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng, covered, repeats = np.random.default_rng(5), 0, 400
    for repeat in range(repeats):
        low, high = pomdp.bootstrap_interval(rng.exponential(size=50), seed=repeat, resamples=400)
        covered += low <= 1.0 <= high
    # A percentile interval over 50 skewed values covers some 92 %; four standard errors either way are 5.4 %.
    assert 0.865 < covered / repeats < 0.98


def test_the_table_of_games():
    rows = pomdp.game_rows(RESULTS, "ran-hum-neu", 50)
    assert [{name: row[name] for name in GameResult._fields} for row in rows] == [result._asdict() for result in RESULTS]
    assert [(row["core_seed"], row["disp_seed"]) for row in rows] == [game_seeds(50, k) for k in range(4)]
    assert [row["normalized_score"] for row in rows] == [result.score / 8067.99 for result in RESULTS]


def test_names_and_the_mean_over_characters():
    names = [pomdp.column_name(character) for character in ("mon-hum-neu", "val-hum-neu", "ran-hum-neu")]
    assert names == ["normalized_score_mon_hum_neu", "normalized_score_val_hum_neu", "normalized_score_ran_hum_neu"]
    assert pomdp.geometric_mean([0.02, 0.03, 0.09]) == pytest.approx((0.02 * 0.03 * 0.09) ** (1 / 3))
    assert pomdp.geometric_mean([0.5]) == pytest.approx(0.5)
    assert pomdp.geometric_mean([0.5, 0.0]) == 0.0 and not math.isnan(pomdp.geometric_mean([-0.1, 0.2]))


# --- games are kept
def test_recorded_games_are_the_same_games_and_can_be_read(pools, tmp_path):
    """Results and all that the model saw are those of an evaluation that keeps nothing; a cut game is whole as well."""
    plain, recorded = Watched(Player(greedy=False)), Watched(Player(greedy=False))
    results = play(pools[2], plain)
    record = str(tmp_path / "kept")
    assert play_games(pools[2], recorded, "mon-hum-neu", 7, 50, 60, CPU, record=record) == results
    assert recorded.fingerprint.digest() == plain.fingerprint.digest()
    assert {result.end for result in results} == {"step limit"}, "no game had to be quit: this shows nothing"
    found = pomdp.find_nld_games(tmp_path, "mon-hum-neu")
    assert sorted(Path(game.path).parent.name for game in found.games) == [f"kept-{k}" for k in range(7)] and not found.problems
    for game, result in zip(sorted(found.games), results):
        frames = list(pomdp.frames_of_play(pomdp.read_ttyrec(game.path)))
        assert 60 < sum(len(part.actions) for part in frames) <= 60 + 3 * len(pomdp.QUIT)  # and the keys that quit it
        first = 60 * (result.game // SLOTS)
        chosen = [nethack.ACTIONS[actions[result.game % SLOTS]] for actions in recorded.actions[first : first + 60]]
        assert [nethack.ACTIONS[action] for action in frames[0].actions[:60]] == chosen  # keys: three have two actions
        assert frames[0].scores[60] == result.score


def test_nle_s_own_reader_finds_recorded_games(pools, tmp_path):
    """Games that ended by themselves; repeats of an evaluation take nothing away."""
    from nle import dataset

    for _ in range(2):
        results = play_games(pools[2], Scripted(), "val-hum-neu", 4, 50, 10**6, CPU, record=str(tmp_path / "data" / "kept"))
    assert {result.end for result in results} == {"died"}
    assert len(list((tmp_path / "data").iterdir())) == 8
    db = str(tmp_path / "games.db")
    dataset.db.create(db)
    dataset.add_nledata_directory(str(tmp_path / "data"), "kept", db)
    assert len(dataset.TtyrecDataset("kept", batch_size=1, seq_length=8, dbfilename=db).get_meta(1)) > 0
    with dataset.db.connect(db) as connection:
        assert connection.execute("SELECT COUNT(*) FROM games").fetchone() == (8,)


def test_recording_is_not_part_of_a_run_s_identity_and_its_folder_is_checked(tmp_path):
    config = pomdp.TrainConfig(eval_record=str(tmp_path / "new" / "kept"))
    assert pomdp.run_identity(config) == pomdp.run_identity(pomdp.TrainConfig())
    assert pomdp.recordings_folder(config).is_dir() and pomdp.recordings_folder(pomdp.TrainConfig()) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(pomdp.UserError, match="--eval_record"):
        pomdp.recordings_folder(pomdp.TrainConfig(eval_record=str(tmp_path / "file")))


# --- nothing is left behind
def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_closing_ends_workers_and_removes_their_folders(tmp_path, monkeypatch):
    """Also in the middle of games."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = GamePool(4, 2)
    workers = list(pool.processes)
    pool.begin("mon-hum-neu", 6, 50, 100)
    pool.step(np.full(pool.rows, SEARCH))
    assert len(list(tmp_path.glob("*/nle*"))) >= 4, "NLE's folders lie elsewhere: this shows nothing"
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    pool.close()
    assert not any(worker.is_alive() for worker in workers)
    assert not set(workers) & set(multiprocessing.active_children())
    assert list(tmp_path.iterdir()) == []


def runs(pid):
    """Whether the process runs; one that has ended may stay listed until init takes notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


ENDLESS_GAMES = """
import numpy as np, custom_nethack_pomdp as pomdp
if __name__ == "__main__":
    pool = pomdp.GamePool(2, 1)
    pool.begin("mon-hum-neu", 10**5, 50, 10**9)
    print(*[process.pid for process in pool.processes], flush=True)
    while True:
        pool.step(np.full(pool.rows, 75))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_worker_that_dies_or_hangs_is_replaced(number, pools, game_folder, monkeypatch, capsys):
    """Its games are begun anew and marked; those of the other workers go as they go undisturbed."""
    undisturbed = play(pools[2], Player(greedy=False))
    before = set(game_folder.iterdir())
    monkeypatch.setattr(GamePool, "ANSWER_SECONDS", 2)
    pool = GamePool(SLOTS, 2)
    victim, seen = pool.processes[0], []

    class Disturbing(Player):
        def vec_act(self, obs, state=None, device="cpu"):
            seen.append(state is None or float(state[0][:, 0].abs().sum()))
            if len(seen) == 40:
                os.kill(victim.pid, number)
            return super().vec_act(obs, state, device)

    try:
        results = play(pool, Disturbing(greedy=False))
        assert pool.processes[0] is not victim and not victim.is_alive()
        assert 0.0 in seen[40:42], "the game begun anew must find a cleared state"
    finally:
        pool.close()
    assert [result.game for result in results] == list(range(7))
    others, own = ([result for result in results if (result.game % SLOTS == 1) is other] for other in (True, False))
    assert others == [result for result in undisturbed if result.game % SLOTS == 1]
    assert [result.game for result in own if result.replayed] == [0, 2] and all(result.replayed <= 1 for result in results)
    assert "games played again from their beginning: 0, 2" in capsys.readouterr().err
    assert pomdp.summarize_games(results, "mon-hum-neu")["games_replayed"] == 2
    assert set(game_folder.iterdir()) == before, "folders are left behind"


def test_a_game_that_kills_every_worker_ends_the_evaluation(game_folder):
    """Instead of replacing workers for ever."""
    pool = GamePool(2, 1)

    class Deadly(Scripted):
        def vec_act(self, obs, state=None, device="cpu"):
            os.kill(pool.processes[0].pid, signal.SIGKILL)
            return super().vec_act(obs, state, device)

    try:
        pool.MAX_REPLAYS = 1
        with pytest.raises(pomdp.WorkerDied, match="game 0 of mon-hum-neu"):
            play(pool, Deadly(), games=2)
    finally:
        pool.close()


def test_workers_and_folders_go_with_a_main_process_that_is_killed(tmp_path):
    (tmp_path / "main.py").write_text(ENDLESS_GAMES, encoding="utf-8")
    running = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / number.name
        folder.mkdir()
        environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        running.append((number, folder, process))
    try:
        for number, folder, process in running:
            workers = [int(word) for word in process.stdout.readline().split()]
            assert len(workers) == 1 and len(list(folder.glob("*/nle*"))) >= 2
            process.send_signal(number)
            assert process.wait(timeout=30) != 0
            assert wait_until(lambda worker=workers[0]: not runs(worker)), f"{number.name}: a worker lives on"
            assert list(folder.iterdir()) == [], number.name
    finally:
        for _, _, process in running:
            process.kill()
            process.communicate()
