# SPDX-License-Identifier: MIT
"""The benchmark's references, and the studies' variants of ours: each differs in the one thing that
it is named for."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nle import nethack
from torch.utils._pytree import tree_leaves

import custom_nethack_pomdp as pomdp

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS / "studies" / "variants"))
import blind_value
import crop_only
import hl_gauss
import no_named_keys
import plain_head

VARIANTS = sorted((SCRIPTS / "studies" / "variants").glob("*.py"))
REFERENCES = sorted((SCRIPTS / "references").glob("*.py"))
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def config(**settings):
    return pomdp.TrainConfig(rnn_hidden_dim=16, seq_len=8, **settings)


def algorithm_of(module):
    torch.manual_seed(0)
    backbone = pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 16)
    return module.OfflineAlgorithm(backbone, config(algorithm={"head_dim": 24}), "cpu")


@pytest.fixture
def batches(games):
    """Batches of four rows of recorded games, as they come from the loader, prev_actions among
    them."""
    every = np.arange(len(games.frames))
    loader = blind_value.LoaderWithReturns(games, every, config(), 4, 1.0)

    def batch_at(number):
        batch, prev_actions = loader.batch_at(number)
        return {**batch, "prev_actions": prev_actions}

    return batch_at


@pytest.fixture(autouse=True)
def same_loader(monkeypatch):
    """A variant that has a loader of its own leaves none to other tests."""
    monkeypatch.setattr(pomdp, "ChunkLoader", pomdp.ChunkLoader)


def step(algorithm, batch, states=None):
    batch = dict(batch)
    return algorithm.train_step(batch, batch.pop("prev_actions"), states or {})


def observations(batch, t=0):
    obs = {name: batch[name][:, t].numpy() for name in pomdp.OBSERVATIONS}
    return {**obs, "prev_actions": batch["prev_actions"][:, 0].numpy()}


@pytest.mark.parametrize("path", VARIANTS + REFERENCES, ids=lambda path: path.stem)
def test_each_one_is_a_submission_that_learns_resumes_and_acts(path, batches):
    """Through the loop's own way to load it, and carrying its states from batch to batch."""
    algorithm = pomdp.make_algorithm(config(submission=str(path)), CPU)
    optimizer, states, losses = torch.optim.Adam(algorithm.parameters(), lr=3e-3), {}, []
    for number in range(30):
        loss, states, info = step(algorithm, batches(number % 3), states if number % 3 else {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        algorithm.after_gradient_step()
        losses.append(info["loss_per_action"].item())
        assert (
            all(part.ndim == 0 and not part.requires_grad for part in info.values())
            and info["loss"].isfinite()
        )
        assert not any(part.requires_grad for part in tree_leaves(states)), "they carry gradients"
    assert losses[-1] < losses[0] - 0.2
    actions, state = algorithm.model.eval().vec_act(observations(batches(0)))
    again, _ = algorithm.model.vec_act(observations(batches(0), 1), state)
    assert (
        actions.shape == again.shape == (4,)
        and 0 <= min(actions)
        and max(actions) < pomdp.NUM_ACTIONS
    )
    if path in REFERENCES:  # greedy
        assert (actions == algorithm.model.vec_act(observations(batches(0)))[0]).all()
    if path in REFERENCES:  # the heads have the benchmark's sizes
        backbone = torch.nn.Module()
        backbone.rnn_hidden_dim, backbone.num_actions = 2048, 121
        size = sum(weight.numel() for weight in type(algorithm.model)(backbone).parameters())
        assert size == (254_318 if path.stem == "iql" else 247_929)
    extra = {
        name for name, part in vars(algorithm).items() if isinstance(part, torch.nn.Module)
    } - {"model"}
    expected = {"ema"} if path in VARIANTS else set()
    assert extra == ({"target"} if path.stem in ("cql", "iql") else expected)


@torch.no_grad()
@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_the_references_losses_are_those_of_the_papers(path, batches):
    """Frame by frame, in plain loops. The target has other weights, a game ends, and a frame does
    not count."""
    algorithm, batch = algorithm_of(pomdp.load_submission(str(path))), batches(0)
    batch["mask"][2, 3], batch["dones"][1, 4], batch["rewards"] = False, True, torch.randn(4, 9)
    batch["actions"].remainder_(5)
    batch["actions"][3, 2] = pomdp.NO_ACTION
    target = getattr(algorithm, "target", algorithm.model)
    for name, weight in target.named_parameters():
        if not name.startswith("backbone"):
            weight += 0.1 * torch.randn_like(weight) * (target is not algorithm.model)
    previous = torch.cat([batch["prev_actions"], batch["actions"][:, :-1]], dim=1)
    frames = {**{name: batch[name] for name in pomdp.OBSERVATIONS}, "prev_actions": previous}
    core = algorithm.model.backbone({name: value[:, :8] for name, value in frames.items()})[0]
    # a stream of its own
    after = algorithm.model.backbone({name: value[:, 1:] for name, value in frames.items()})[0]
    losses = {name: [] for name in ("policy", "td", "value")}
    for row, t in zip(*np.nonzero(pomdp.known_actions(batch).numpy())):
        a, r, goes_on = (
            batch["actions"][row, t],
            batch["rewards"][row, t],
            0.999 * (1 - batch["dones"][row, t].float()),
        )
        if path.stem == "cql":
            q = algorithm.model.q(core[row, t])
            losses["policy"].append(-q.log_softmax(-1)[a])
            losses["td"].append(2 * (q[a] - r - goes_on * target.q(after[row, t]).max()) ** 2)
            continue
        weight = 1.0
        if path.stem == "iql":
            chosen = torch.eye(pomdp.NUM_ACTIONS)[a]
            pair = torch.cat([core[row, t], chosen])
            q = [
                part.get_submodule(name)(pair)
                for part in (algorithm.model, target)
                for name in ("q1", "q2")
            ]
            u = min(q[2], q[3]) - algorithm.model.value(core[row, t])
            weight, y = (
                min(u.exp(), torch.tensor(100.0)),
                r + goes_on * algorithm.model.value(after[row, t]),
            )
            losses["value"].append((0.8 if u > 0 else 0.2) * u**2)
            losses["td"].append(((q[0] - y) ** 2 + (q[1] - y) ** 2) / 2)
        losses["policy"].append(weight * -algorithm.model.policy(core[row, t]).log_softmax(-1)[a])
    expected = sum(
        torch.stack([value.squeeze() for value in each]).mean() for each in losses.values() if each
    )
    assert step(algorithm, batch)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_bins_hold_a_gaussian_whose_mean_is_the_target():
    targets = torch.tensor([-7.0, -4.0, -0.3, 0.0, 1.25, 9.0, 12.0])
    bins = hl_gauss.target_bins(targets)
    centres = (
        hl_gauss.LOW
        + (torch.arange(hl_gauss.BINS) + 0.5) * (hl_gauss.HIGH - hl_gauss.LOW) / hl_gauss.BINS
    )
    torch.testing.assert_close(bins.sum(-1), torch.ones(len(targets)))
    # cut at the range's ends
    torch.testing.assert_close(bins @ centres, targets.clamp(-5, 10), atol=0.25, rtol=0)
    torch.testing.assert_close((bins @ centres)[2:5], targets[2:5], atol=1e-3, rtol=0)


def test_classes_over_bins_learn_the_value(batches):
    """The gradient of its value loss leads to the targets."""
    algorithm, batch = algorithm_of(hl_gauss), batches(3)
    algorithm.gamma, batch["rewards"] = 0.0, torch.full((4, 9), 2.0)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _, info = step(algorithm, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert info["value_mean"].item() == pytest.approx(2.0, abs=0.15)


def test_a_blind_value_learns_exact_returns_and_sees_status_numbers_alone(games):
    """Its runs' own loader gives it the returns; whatever else the screen shows, the value
    stays."""
    algorithm = algorithm_of(blind_value)
    loader = pomdp.ChunkLoader(games, np.arange(len(games.frames)), config(), 4, 1.0)
    batch, prev_actions = loader.batch_at(3)
    values = []
    algorithm.model.blind.register_forward_hook(lambda *call: values.append(call[-1][..., 0]))
    _, _, info = algorithm.train_step(batch, prev_actions, {})
    errors = F.huber_loss(values[0][:, :-1], batch["returns"][:, :-1], reduction="none")
    assert batch["mask"].all() and info["value_loss"].item() == pytest.approx(
        2 * errors.mean().item(), rel=1e-5
    )
    other = {**batch, "tty_chars": batch["tty_chars"] * 0, "actions": batch["actions"] * 0}
    for changed in (nethack.NLE_BL_GOLD, nethack.NLE_BL_EXP, nethack.NLE_BL_AC):
        other["blstats"] = batch["blstats"].clone()
        other["blstats"][..., changed] += 100
        algorithm.train_step(other, prev_actions, {})
        assert torch.equal(values[-1], values[0])
    other["blstats"][..., nethack.NLE_BL_TIME] += 1000
    algorithm.train_step(other, prev_actions, {})
    assert not torch.isclose(values[-1], values[0]).any()


def test_returns_reach_to_the_end_of_the_game(games):
    """Row by row against sums written out, in the last chunk of a game too."""
    chosen = np.array([int(np.argmin(games.frames))])
    loader = blind_value.LoaderWithReturns(games, chosen, config(gamma=0.9), 1, 2.0)
    rewards = loader.rewards_of(*games.in_store[chosen[0]])
    assert rewards.any()
    for step in range(loader.sampler.steps):
        first = step * loader.config.seq_len
        row = loader.batch_at(step)[0]["returns"][0]
        for t in range(first, min(first + len(row), len(rewards))):
            rest = rewards[t:]
            expected = (rest * 0.9 ** np.arange(len(rest))).sum()
            assert row[t - first].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_outside_of_the_crop_nothing_is_seen(batches):
    batch = batches(3)
    inputs = {name: batch[name] for name in pomdp.OBSERVATIONS}
    (seen,), changed = crop_only.blank_outside(None, (inputs,)), 0
    for row, t, i, j in np.ndindex(4, 9, 24, 80):
        y, x = batch["tty_cursor"][row, t].tolist()
        inside = (abs(i - y) <= 7 and abs(j - x) <= 7) or i in (0, 22, 23)
        cell = [int(inputs[name][row, t, i, j]) for name in ("tty_chars", "tty_colors")]
        expected = cell if inside else [ord(" "), 0]
        assert [int(seen[name][row, t, i, j]) for name in ("tty_chars", "tty_colors")] == expected
        changed += expected != cell
    assert changed > 100
    algorithm = algorithm_of(crop_only)  # and nothing else reaches its backbone
    seen["prev_actions"] = inputs["prev_actions"] = batch["actions"]
    outputs = [algorithm.model.backbone(part)[0] for part in (inputs, seen)]
    assert torch.equal(*outputs) and not torch.equal(
        outputs[0], algorithm_of(pomdp).model.backbone(inputs)[0]
    )


@torch.no_grad()
def test_the_plain_head_sees_the_output_as_it_comes():
    ours, plain = algorithm_of(pomdp).model, algorithm_of(plain_head).model
    output = torch.randn(2, 3, 16)
    deviation = output.var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt()
    normal = (output - output.mean(-1, keepdim=True)) / deviation
    chars = torch.zeros(2, 3, 24, 80)
    torch.testing.assert_close(
        plain.head(normal, chars), ours.head(output, chars), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(plain.head(output, chars)[0], ours.head(output, chars)[0])


@torch.no_grad()
def test_without_named_keys_no_question_reaches_the_head():
    ours, blind = algorithm_of(pomdp).model, algorithm_of(no_named_keys).model
    output, chars = torch.randn(2, 1, 16), torch.full((2, 1, 24, 80), ord(" "))
    asked = chars.clone()
    asked[1, 0, 0, :7] = torch.tensor(list(b"? [a-c]"))
    assert torch.equal(blind.head(output, asked)[0], ours.head(output, chars)[0])
    told = ours.head(output, asked)[0] - ours.head(output, chars)[0]
    letters = {chr(int(pomdp.nethack.ACTIONS[place])) for place in told[1, 0].nonzero().flatten()}
    assert letters == {*"abc"} and not told[0].any()
