# SPDX-License-Identifier: MIT
"""scripts/critic_probe.py: it finds what an action tells where it tells something, and nothing
where it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import critic_probe

AGENT = ROOT / "scripts" / "agents" / "small_512.pt"
pytestmark = pytest.mark.usefixtures("one_thread")


def made_up_data(action_matters):
    """40 games of 1,000 frames, each with luck of its own. What comes follows from h, and where the
    action matters a seventh of it from whether that is 1."""
    generator = torch.Generator().manual_seed(1)
    games = np.repeat(np.arange(40), 1_000)
    h = torch.randn(len(games), 8, generator=generator)
    actions = torch.randint(0, 4, (len(games),), generator=generator)
    luck = 0.3 * torch.randn(40, generator=generator)[torch.from_numpy(games)]
    noise = torch.randn(len(games), generator=generator)
    came = h[:, 0] + luck + noise + action_matters * (actions == 1)
    late = came[:, None].repeat(1, 2)
    late[:, 1] = h[:, 0] + luck + noise  # whatever the action was
    numbers = torch.stack([h[:, 0], noise * 0, torch.ones(len(games))], dim=1)
    return critic_probe.Data(h, numbers, actions, games, late, ["soon", "later"])


def test_an_action_that_matters_is_found():
    soon, later = critic_probe.probe(made_up_data(action_matters=1.0))
    value, low, high = soon["q_minus_v"]
    assert 0.03 < low < value < high < 0.1  # 0.19 of a variance of 2.27 is 0.083
    assert critic_probe.tells_more(soon)
    assert not critic_probe.tells_more(later)
    assert "for soon: there is something" in critic_probe.sentence([soon, later])


def test_where_it_does_not_matter_nothing_is_found():
    rows = critic_probe.probe(made_up_data(action_matters=0.0))
    for row in rows:
        assert not critic_probe.tells_more(row)
        assert abs(row["q_minus_v"][0]) < 0.01
        assert abs(row["shuffled_minus_v"][0]) < 0.01
        assert 0.35 < row["v"][1] < row["v"][0] < row["v"][2] < 0.5  # 1 of 2.09 is 0.48
        assert row["numbers"][0] == pytest.approx(0.48, abs=0.05)  # what matters is among them
    assert critic_probe.sentence(rows).startswith("Nowhere")


def test_folds_are_of_games():
    """Luck that all frames of a game share cannot be known before: from h that names the game, a
    network that had seen some of its frames would tell it."""
    data = made_up_data(action_matters=0.0)
    luck = torch.randn(40, generator=torch.Generator().manual_seed(2))
    mine = torch.from_numpy(data.games)
    named = torch.nn.functional.one_hot(mine, 40).float()
    row = critic_probe.probe(data._replace(h=named, targets=luck[mine, None], names=["luck"]))[0]
    assert row["v"][0] < 0.05


def test_what_came_is_counted_from_the_frame_on(stores):
    """Against plain loops, in a game that is played to its end and in the same as if it was cut."""
    store = stores["mon-hum-neu"]
    game = int(np.argmax(store.frames))
    config = pomdp.TrainConfig(rnn_hidden_dim=16, benchmark_sizes=False)
    loader = pomdp.ChunkLoader(pomdp.Games([store]), np.array([game]), config, 1, 7.0)
    length = int(store.frames[game])
    rewards = np.zeros(length)
    at, values = store.rewards(game)
    rewards[at] = np.clip(values / 7.0, -10, 10)
    assert length > 1_100 and len(at) > 5
    came = critic_probe.what_came(loader, game, length)
    for t in range(length):
        for steps in (20, 200, 1_000):
            gained = came[f"score gained within {steps:,} steps"][t]
            assert gained == pytest.approx(rewards[t : t + steps].sum(), abs=1e-4)
        for steps in (200, 1_000):
            assert came[f"death within {steps:,} steps"][t] == (length - t <= steps)
        discounted = rewards[t:] * 0.999 ** np.arange(length - t)
        assert came["discounted return"][t] == pytest.approx(discounted.sum(), abs=1e-3)
    cut = critic_probe.pomdp.GameStore(store.folder, "mon-hum-neu")
    cut.truncated = np.ones_like(cut.truncated)
    loader = pomdp.ChunkLoader(pomdp.Games([cut]), np.array([game]), config, 1, 7.0)
    for values in critic_probe.what_came(loader, game, length - 1).values():
        assert np.isnan(values).sum() == 999
        assert not np.isnan(values[: length - 1_000]).any()


@torch.no_grad()
def test_h_is_what_acting_has(stores):
    """Frame by frame, from the game's first one on, over the edges of chunks."""
    algorithm, config, _ = pomdp.load_agent(AGENT, seq_len=100, game_frames=230)
    games = pomdp.Games([stores["mon-hum-neu"]], 230)
    data, unknown = critic_probe.collect(algorithm, config, games, [1])
    loader = pomdp.ChunkLoader(games, np.array([1]), config, 1, 1.0)
    state = None
    assert len(data.h) > 200 and unknown == 0
    for t in range(len(data.h)):
        batch, prev_actions = loader.batch_at(t // 100)
        inputs = {name: batch[name][:, t % 100][:, None] for name in pomdp.OBSERVATIONS}
        inputs["prev_actions"] = batch["actions"][:, t % 100 - 1][:, None]
        if t % 100 == 0:
            inputs["prev_actions"] = prev_actions
        core_output, state = algorithm.model.backbone(inputs, state)
        h = torch.nn.functional.layer_norm(core_output[0, 0], (512,))
        torch.testing.assert_close(data.h[t], h, atol=0.2, rtol=0.1)  # the one in bf16
        assert data.actions[t] == batch["actions"][0, t % 100]
        assert data.numbers[t, 4] == t
        assert data.numbers[t, 2] == batch["blstats"][0, t % 100, pomdp.nethack.NLE_BL_TIME]


def command(*more):
    return subprocess.run(
        [sys.executable, "scripts/critic_probe.py", "--checkpoint", str(AGENT), *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_command_prints_its_table(stores, stores_path, tmp_path):
    rows = tmp_path / "rows.jsonl"
    ran = command(
        *("--data_path", "tests/data/nle_data", "--store_path", str(stores_path)),
        *("--frames", "2000", "--game_frames", "200", "--json", str(rows)),
    )
    assert ran.returncode == 0, ran.stderr
    first, *shown, _, last = ran.stdout.splitlines()
    assert first == "2,000 frames of 10 games; 0 left out before a cut"
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert critic_probe.make_table(made).splitlines() == shown
    assert critic_probe.sentence(made) == last
    assert [row["target"] for row in made][:4] == [
        *("score gained within 20 steps", "score gained within 200 steps"),
        *("score gained within 1,000 steps", "discounted return"),
    ]


@pytest.mark.parametrize(
    "options, told",
    [
        (["--frames", "0"], "--frames must be at least 1"),
        (["--data_path", "scripts"], "no games of mon-hum-neu in scripts"),
        (["--data_path", "tests/data/nle_data", "--frames", "300"], "5 folds want 5 games"),
    ],
)
def test_a_mistake_gets_one_line(options, told, stores, stores_path):
    ran = command("--store_path", str(stores_path), *options)
    assert ran.returncode == 2 and told in ran.stderr
    assert ran.stderr.count("\n") == 1
