"""The studies' variants of ours: each differs in the one thing that it is named for."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "studies" / "variants"))
import averaged_weights
import crop_only
import hl_gauss
import plain_head

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = pomdp.TrainConfig(algorithm={"head_dim": 24})


def algorithm_of(module):
    torch.manual_seed(0)
    return module.OfflineAlgorithm(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 16, 2), CONFIG, "cpu")


@pytest.fixture
def batch(games):
    """Four rows of recorded games; a new copy each time, as train_step keeps nothing of it."""
    loader = pomdp.ChunkLoader(games, np.arange(len(games.frames)), 4, 8, 0, 1.0, 10.0)
    return loader.batch_at(3)


def step(algorithm, batch):
    inputs = dict(batch)
    return algorithm.train_step(inputs, inputs.pop("prev_actions"), {})


def test_the_average_is_what_is_scored_played_and_saved(batch):
    algorithm = algorithm_of(averaged_weights)
    expected = [parameter.detach().clone() for parameter in algorithm.parameters()]
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.5)
    for update in (1, 2, 3):
        optimizer.zero_grad()
        step(algorithm, batch)[0].backward()
        optimizer.step()
        algorithm.after_gradient_step()
        rate = (1 + update) / (10 + update)
        expected = [rate * old + (1 - rate) * new.detach() for old, new in zip(expected, algorithm.parameters())]
    plain = algorithm_of(pomdp)
    with torch.no_grad():
        for parameter, average in zip(plain.parameters(), expected):
            parameter.copy_(average)
    latest = [parameter.detach().clone() for parameter in algorithm.parameters()]
    assert any(not torch.allclose(old, new) for old, new in zip(latest, expected))
    with torch.no_grad():
        scored, wanted = (step(one, batch)[2]["loss_per_action"] for one in (algorithm, plain))
    assert scored == pytest.approx(wanted, rel=1e-5)
    restored = algorithm_of(averaged_weights)  # weights are saved with the average, the count of updates beside them
    restored.model.load_state_dict(algorithm.model.state_dict())
    restored.load_state_dict(algorithm.state_dict())
    assert restored.updates == 3
    obs = {name: batch[name][:, 0].numpy() for name in ("tty_chars", "tty_colors", "tty_cursor", "blstats")}
    obs["prev_actions"] = np.full(4, pomdp.NO_ACTION)
    states = [model.eval().vec_act(obs)[1] for model in (restored.model, plain.model)]
    torch.testing.assert_close(states[0], states[1])
    assert all(torch.equal(old, new) for old, new in zip(latest, algorithm.parameters()))  # swapped back


def test_bins_hold_a_gaussian_whose_mean_is_the_target():
    targets = torch.tensor([-7.0, -4.0, -0.3, 0.0, 1.25, 9.0, 12.0])
    bins = hl_gauss.target_bins(targets)
    centres = hl_gauss.LOW + (torch.arange(hl_gauss.BINS) + 0.5) * (hl_gauss.HIGH - hl_gauss.LOW) / hl_gauss.BINS
    torch.testing.assert_close(bins.sum(-1), torch.ones(len(targets)))
    torch.testing.assert_close(bins @ centres, targets.clamp(hl_gauss.LOW, hl_gauss.HIGH), atol=0.25, rtol=0)  # cut at the range's ends
    torch.testing.assert_close((bins @ centres)[2:5], targets[2:5], atol=1e-3, rtol=0)


def test_classes_over_bins_learn_the_value(batch):
    """The gradient of its value loss leads to the targets."""
    algorithm = algorithm_of(hl_gauss)
    algorithm.gamma = 0.0
    batch["rewards"] = torch.full_like(batch["rewards"], 2.0)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _, info = step(algorithm, batch)
        loss.backward()
        optimizer.step()
    assert info["value_mean"] == pytest.approx(2.0, abs=0.15)


def test_outside_of_the_crop_all_is_blank(batch):
    inputs = {name: batch[name] for name in ("tty_chars", "tty_colors", "tty_cursor")}
    seen = crop_only.blank_outside(inputs)
    changed = 0
    for row, t in np.ndindex(4, 9):
        y, x = batch["tty_cursor"][row, t].tolist()
        for i, j in np.ndindex(24, 80):
            inside = (abs(i - y) <= 7 and abs(j - x) <= 7) or i in (0, 22, 23)
            char, color = int(batch["tty_chars"][row, t, i, j]), int(batch["tty_colors"][row, t, i, j])
            expected = (char, color) if inside else (pomdp.SPACE, 0)
            assert (int(seen["tty_chars"][row, t, i, j]), int(seen["tty_colors"][row, t, i, j])) == expected
            changed += expected != (char, color)
    assert changed > 100
    encoder = pomdp.ScreenEncoder().eval()  # the crop itself sees the same
    for cells in ("tty_chars", "tty_colors"):
        before, after = (encoder.crop_cells(part[cells].flatten(0, 1).int(), batch["tty_cursor"].flatten(0, 1)) for part in (inputs, seen))
        inner = (before != 0) & (after != pomdp.SPACE)
        assert torch.equal(before[inner], after[inner])


def test_the_plain_head_sees_the_output_as_it_comes():
    torch.manual_seed(1)
    ours, plain = (module.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 16, 2), head_dim=24) for module in (pomdp, plain_head))
    plain.load_state_dict(ours.state_dict())
    output = torch.randn(2, 3, 16)
    normal = (output - output.mean(-1, keepdim=True)) / output.var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt()
    for found, expected in zip(plain.head(normal), ours.head(output)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain.head(output)[0], ours.head(output)[0])
