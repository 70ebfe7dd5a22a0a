# SPDX-License-Identifier: MIT
"""Backbone, model and algorithm: reference implementations, properties, and what must not leave a
trace."""

import math
import re
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import AWRConfig, advantage_weights, lambda_returns

HIDDEN, ROWS = 32, 4
CPU = torch.device("cpu")
NO_PREVIOUS = torch.full((ROWS, 1), pomdp.NO_ACTION)
pytestmark = pytest.mark.usefixtures("one_thread")


def small_algorithm(seed=0, algorithm=(), **settings):
    torch.manual_seed(seed)
    algorithm = {"head_dim": 24, **dict(algorithm)}
    return pomdp.make_algorithm(
        pomdp.TrainConfig(rnn_hidden_dim=HIDDEN, algorithm=algorithm, **settings), CPU
    )


def small_backbone(**settings):
    return small_algorithm(**settings).model.backbone


def random_observations(rows, steps, seed=0):
    rng = np.random.default_rng(seed)
    blstats = rng.integers(0, 100, size=(rows, steps, pomdp.NUM_BLSTATS))
    blstats[rng.random((rows, steps)) < 0.2] = 0  # hidden status lines
    return {
        "tty_chars": torch.as_tensor(
            rng.integers(0, 256, size=(rows, steps, 24, 80)), dtype=torch.uint8
        ),
        "tty_colors": torch.as_tensor(
            rng.integers(0, 32, size=(rows, steps, 24, 80)), dtype=torch.int8
        ),
        "tty_cursor": torch.as_tensor(
            rng.integers(0, (24, 80), size=(rows, steps, 2)), dtype=torch.uint8
        ),
        "blstats": torch.as_tensor(blstats, dtype=torch.int32),
    }


def random_batch(rows=ROWS, steps=6, seed=0, starts=None, done_share=0.0):
    """A batch as our loader makes it, or as the benchmark does when `starts` is None."""
    rng = np.random.default_rng(seed + 1)
    batch = random_observations(rows, steps + 1, seed)
    batch["actions"] = torch.as_tensor(rng.integers(0, pomdp.NUM_ACTIONS, (rows, steps + 1)))
    batch["rewards"] = torch.as_tensor(rng.normal(size=(rows, steps + 1)), dtype=torch.float32)
    batch["dones"] = torch.as_tensor(rng.random((rows, steps + 1)) < done_share)
    if starts is not None:
        batch.update(
            starts=torch.as_tensor(starts), mask=torch.ones(rows, steps + 1, dtype=torch.bool)
        )
    return batch


def step(algorithm, batch, states=None):
    return algorithm.train_step(batch, NO_PREVIOUS[: len(batch["actions"])], states or {})


def one_run(batch):
    """The backbone's inputs for a batch whose rows begin games, and where games begin
    [B, T + 1]."""
    resets = torch.cat([torch.ones(ROWS, 1, dtype=torch.bool), batch["dones"][:, :-1]], dim=1)
    previous = torch.cat([NO_PREVIOUS, batch["actions"][:, :-1]], dim=1).masked_fill(
        resets, pomdp.NO_ACTION
    )
    return {**{name: batch[name] for name in pomdp.OBSERVATIONS}, "prev_actions": previous}, resets


@torch.no_grad()
def single_steps(backbone, inputs, resets):
    """Frame by frame, as in acting, clearing the rows of `resets` [B, T] before their frame ->
    outputs, states."""
    outputs, states = [], [None]
    for t in range(resets.shape[1]):
        state = states[-1] and tuple(
            part * (~resets[:, t]).float()[None, :, None] for part in states[-1]
        )
        output, state = backbone(
            {name: value[:, t : t + 1] for name, value in inputs.items()}, state
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), states


def core_outputs(algorithm):
    """The list in which what the head is given will be found."""
    seen, head = [], algorithm.model.head
    algorithm.model.head = lambda core, chars: seen.append(core.detach()) or head(core, chars)
    return seen


# --- backbone
def test_crop_shows_the_cells_round_the_cursor():
    encoder, cells = (
        pomdp.ScreenEncoder(),
        torch.arange(1, 24 * 80 + 1).view(1, 24, 80).repeat(3, 1, 1),
    )
    cursor, half = torch.tensor([[0, 0], [11, 40], [23, 79]]), encoder.CROP // 2
    for crop, (row, column) in zip(encoder.crop_cells(cells, cursor), cursor.tolist()):
        for i, j in np.ndindex(encoder.CROP, encoder.CROP):
            r, c = row + i - half, column + j - half
            assert crop[i, j] == (cells[0, r, c] if 0 <= r < 24 and 0 <= c < 80 else 0)


@pytest.mark.parametrize("copies", [64, 7])
def test_embedding_with_copies_of_the_table_gives_what_one_table_gives(copies, monkeypatch):
    """On a CPU, where a table that says it is on a GPU takes the other way."""
    encoder = pomdp.ScreenEncoder()
    encoder.TABLE_COPIES = copies
    cells = torch.randint(
        0, 50, (3, 24, 80), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    tables = [
        torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2)
    ]
    one = encoder.embed(cells, tables[0])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = [one, encoder.embed(cells, tables[1])]
    monkeypatch.undo()
    assert found[1].shape == (3, 4, 24, 80) and torch.equal(*found)
    for each in found:
        (each * torch.arange(each.numel()).view_as(each).cos()).sum().backward()
    torch.testing.assert_close(tables[0].grad, tables[1].grad, rtol=1e-5, atol=1e-4)


def test_every_input_reaches_the_backbones_output():
    backbone, status = small_backbone().eval(), []
    backbone.blstats_encoder.register_forward_pre_hook(
        lambda _, arguments: status.append(arguments[0])
    )
    inputs = {**random_observations(1, 1), "prev_actions": torch.tensor([[5]])}
    inputs["blstats"][:] = 10
    inputs["tty_cursor"][0, 0] = torch.tensor([6, 20])
    changes = {
        "tty_chars": (0, 0, 3, 60),
        "tty_cursor": (0, 0, 1),
        "blstats": (0, 0, 10),
        "prev_actions": (0, 0),
    }
    without = small_backbone(use_prev_action=False).eval()
    with torch.no_grad():
        base, _ = backbone(inputs)
        for name, place in changes.items():
            changed = {key: tensor.clone() for key, tensor in inputs.items()}
            changed[name][place] += 1
            assert not torch.equal(backbone(changed)[0], base), name
        assert torch.equal(
            without(changed)[0], without(inputs)[0]
        )  # the previous action is the last one changed
    assert status[0][0, -2:].tolist() == [0.25, 0.25]  # where the cursor is
    assert torch.equal(status[0][:, :-2], pomdp.blstats_features(inputs["blstats"][0]))


@torch.no_grad()
def test_the_screen_encoder_tells_all_colours_apart_and_reads_the_message_row():
    torch.manual_seed(0)
    encoder, seen = pomdp.ScreenEncoder(), random_observations(1, 1)
    cells = [seen[name][0] for name in ("tty_chars", "tty_colors")]
    cursor = torch.tensor([[20, 10]])
    outputs = []
    for color in range(32):
        cells[1][0, 3, 60] = color
        outputs.append(tuple(encoder(*cells, cursor)[0].tolist()))
    assert len(set(outputs)) == 32
    for row in (0, 1):  # the message's features come last
        before = encoder(*cells, cursor)[0, -128:]
        cells[0][0, row, 60] += 1
        assert torch.equal(encoder(*cells, cursor)[0, -128:], before) == (row > 0)


def test_status_features_against_a_vector_made_by_hand():
    stats = torch.zeros(1, pomdp.NUM_BLSTATS, dtype=torch.int32)
    stats[0, 2:9] = torch.tensor([18, 68, 17, 16, 15, 14, 13])  # strength twice, Dx Co In Wi Ch
    stats[0, 10:21] = torch.tensor(
        [14, 20, 7, 99, 4, 8, -3, 5, 6, 400, 5000]
    )  # HP, depth, gold, Pw, AC, HD, Xp, turn
    stats[0, 21], stats[0, 22], stats[0, 25], stats[0, 26] = 3, 2, 0b1000000100001, -1
    log = math.log1p
    expected = [18 / 25, 17 / 25, 16 / 25, 15 / 25, 14 / 25, 13 / 25, 68 / 125]
    expected += [
        log(14) / 5,
        log(20) / 5,
        14 / 20,
        log(4) / 5,
        4 / 8,
        7 / 10,
        log(99) / 8,
        -3 / 10,
        5 / 20,
        6 / 20,
    ]
    expected += [log(400) / 10, log(5000) / 10, -1]
    expected += [0, 0, 0, 1, 0, 0, 0] + [0, 0, 1, 0, 0, 0]  # Weak, Stressed
    expected += [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1] + [0]  # Stone, Blind, Ride; not hidden
    torch.testing.assert_close(
        pomdp.blstats_features(stats), torch.tensor([expected]), rtol=1e-6, atol=0
    )
    for place, values, first in (
        (21, range(7), 20),
        (22, range(6), 27),
        (25, [1 << bit for bit in range(13)], 33),
    ):
        several = stats.repeat(len(values), 1)
        several[:, place] = torch.tensor(values)
        found = pomdp.blstats_features(several)[:, first : first + len(values)]
        assert torch.equal(found, torch.eye(len(values))), place
    extreme = torch.tensor([0, 2**31 - 1, -(2**31)], dtype=torch.int32)[:, None].repeat(
        1, pomdp.NUM_BLSTATS
    )
    features = pomdp.blstats_features(extreme)
    assert (
        features[0].tolist() == [0.0] * 46 + [1.0] and torch.isfinite(features).all()
    )  # hidden lines are flagged


# --- the block's functions
@given(
    st.integers(1, 5), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6)
)
def test_lambda_returns_equal_a_plain_loop(rows, steps, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(rows, steps)), rng.normal(size=(rows, steps + 1))
    dones, expected = rng.random((rows, steps)) < 0.3, np.zeros((rows, steps))
    counts = rng.random((rows, steps)) < 0.8
    for row in range(rows):
        after = values[row, steps]
        for t in reversed(range(steps)):
            following = 0 if dones[row, t] else (1 - lam) * values[row, t + 1] + lam * after
            after = rewards[row, t] + gamma * following
            if not counts[row, t]:  # behind a cut: from here on the value goes on
                after = values[row, t]
            expected[row, t] = after
    tensors = (
        torch.tensor(rewards),
        torch.tensor(dones).double(),
        torch.tensor(values, requires_grad=True),
        torch.tensor(counts).double(),
    )
    result = lambda_returns(*tensors, gamma, lam)
    assert not result.requires_grad
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=30), st.floats(1e-12, 1e12))
def test_weights_are_finite_at_extreme_advantages_and_have_mean_one(advantages, scale):
    advantages = torch.tensor([advantages], dtype=torch.float32)
    mask = torch.ones_like(advantages)
    mask[0, 0] = 0
    weights, clipped = advantage_weights(
        advantages, mask, torch.tensor(scale), AWRConfig(beta=1.0, max_weight=20.0)
    )
    assert torch.isfinite(weights).all() and weights[0, 0] == 0 and 0 <= clipped <= 1
    # all counting weights may vanish (each advantage hugely negative); otherwise they average to 1
    exponents = (advantages / max(scale, 1e-6)).clamp(max=math.log(20.0))[0, 1:]
    if torch.exp(exponents).sum() > 1e-6:
        assert weights.sum() == pytest.approx(float(mask.sum()), rel=1e-4)


def test_weights_grow_with_the_advantage_up_to_the_clip_and_those_at_it_are_counted():
    advantages, mask = (
        torch.tensor([[-1.0, 0.0, 1.0, 50.0, 60.0, 70.0]]),
        torch.tensor([[1.0, 1, 1, 1, 1, 0]]),
    )
    weights, clipped = advantage_weights(
        advantages, mask, torch.tensor(2.0), AWRConfig(beta=0.5, max_weight=20.0)
    )
    ratios = (weights / weights[0, 1])[0].tolist()
    assert ratios == pytest.approx([1 / math.e, 1, math.e, 20, 20, 0], rel=1e-5)
    assert clipped.item() == pytest.approx(2 / 5)


def named_by(line):
    """The same as prompt_options in plain Python, for one message line: the keys that it names."""
    found = re.search(rb"\? \[(.*?)(?: or \?|\]|$)", line)
    text = re.sub(
        rb"(\w)-(\w)",
        lambda span: bytes(range(span[1][0], span[2][0] + 1)),
        found[1].replace(b" ", b"") if found else b"",
    )
    return [int(key) in text for key in pomdp.nethack.ACTIONS]


QUESTIONS = {  # -> the keys named, of those that are actions
    "What do you want to throw? [$lp or ?*]": "$lp",
    "What do you want to wield? [- a-dfo or ?*]": "-abcdfo",
    "What do you want to eat? [d-f or ?*]": "def",
    "What do you want to eat? [a-cX-Z or ?*]": "abcXYZ",
    "What do you want to wield? [- or ?*]": "-",
    "What do you want to eat? [oqr or ?*]": "oqr",
    "There is a newt corpse here; eat it? [ynq] (n)": "ynq",
    "A large box is here.  Check it for traps? [yn".rjust(80): "yn",  # and on in the next line
    "What do you want to throw? [$ajt or ?*]": "$ajt",
    # "o" and "r" are letters too
    "What do you want to eat? [o or ?*]": "o",
    "What do you want to wield? [- or or ?*]": "-or",
    "What do you want to wield? [- ort or ?*]": "-ort",
    "What do you want to write with? [- abd or ?*]": "-abd",  # not SPACE, which cancels
    "You see an [x] here.  Eat it? [abc or ?*]": "abc",
    # no questions: a menu of skills, and what was read
    "   boomerang          [Unskilled]": "",
    'You read: "[ad aerarium".': "",
}


def screens_of(lines):
    """Terminals [N, 24, 80] with these messages; the other rows are full of brackets."""
    chars = torch.full((len(lines), 24, 80), ord(" "), dtype=torch.uint8)
    for screen, line in zip(chars, lines):
        screen[0, : len(line)] = torch.tensor(list(line.encode()))
    chars[:, 1:] = torch.tensor(list(b"? [a")).repeat(20)
    return chars


@pytest.mark.parametrize("line", QUESTIONS)
def test_keys_that_a_question_names(line):
    keys = small_algorithm().model.keys
    named = pomdp.prompt_options(screens_of([line]), keys)[0]
    assert {chr(key) for key in keys[named > 0].tolist()} == {*QUESTIONS[line]}
    assert set(named.tolist()) <= {0.0, 1.0}
    assert named_by(line.encode()) == named.tolist()


def test_keys_that_recorded_questions_name(games):
    """All frames that ask, and as floats, as the benchmark gives them."""
    loader = pomdp.ChunkLoader(
        games, range(len(games.frames)), pomdp.TrainConfig(seq_len=200), 16, 1.0
    )
    recorded = torch.cat(
        [loader.batch_at(number)[0]["tty_chars"][:, :-1].flatten(0, 1) for number in range(8)]
    )
    keys = small_algorithm().model.keys
    found = pomdp.prompt_options(recorded[:, None], keys)[:, 0]
    expected = torch.tensor([named_by(bytes(line.tolist())) for line in recorded[:, 0]]).float()
    assert torch.equal(found, expected) and (expected.sum(-1) > 0).sum() >= 50
    assert torch.equal(found, pomdp.prompt_options(recorded.float(), keys))


def test_prompt_options_are_answered_as_the_model_has_learned(games):
    """Questions that name one letter, another one every time, and the letter is the answer: nothing
    else can tell."""
    algorithm, batch = small_algorithm(), random_batch(rows=64, steps=1)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=1e-2)
    letters = torch.randint(ord("a"), ord("z") + 1, (64, 2), generator=torch.manual_seed(0))
    batch["tty_chars"][:], batch["rewards"][:] = ord(" "), 0
    batch["tty_chars"][:, :, 0, 18:23] = torch.tensor(list(b"? [x]")).byte()
    batch["tty_chars"][:, :, 0, 21] = letters.byte()
    batch["actions"] = torch.as_tensor(pomdp.KEY_TO_ACTION)[letters].long()
    for _ in range(60):
        optimizer.zero_grad()
        loss, _, _ = algorithm.train_step(batch, NO_PREVIOUS[:1].expand(64, 1), {})
        loss.backward()
        optimizer.step()
    batch["tty_chars"][:, :, 0, 21] = letters.roll(
        1, 0
    ).byte()  # letters that this row has not seen
    obs = {name: batch[name][:, 0].numpy() for name in pomdp.OBSERVATIONS}
    actions, _ = algorithm.model.eval().vec_act(
        {**obs, "prev_actions": np.full(64, pomdp.NO_ACTION)}
    )
    assert (actions == pomdp.KEY_TO_ACTION[letters.roll(1, 0)[:, 0]]).mean() > 0.9


# --- the algorithm: states
def test_chunks_with_carried_state_equal_one_long_run():
    """With unchanged weights: whatever the burn-in, and across ends of games."""
    steps, total = 6, 18
    long = random_batch(steps=total, done_share=0.1)
    long["tty_chars"] = long["tty_chars"].float()  # as the benchmark hands them
    for burn_in in (0, 1, 4, steps):
        algorithm = small_algorithm(algorithm={"burn_in": burn_in})
        seen, states, previous = core_outputs(algorithm), {}, NO_PREVIOUS
        expected, one_by_one = single_steps(algorithm.model.backbone.eval(), *one_run(long))
        for begin in range(0, total, steps):
            batch = {name: value[:, begin : begin + steps + 1] for name, value in long.items()}
            with torch.no_grad():
                _, states, _ = algorithm.train_step(batch, previous, states)
            previous = batch["actions"][:, steps - 1 : steps]
            torch.testing.assert_close(
                seen[-1], expected[:, begin : begin + steps + 1], rtol=0, atol=5e-6
            )
        kept = [*states.get("burn_in_frames", {"": torch.zeros(ROWS, 0)}).values()]
        assert {part.shape[1] for part in kept} == {burn_in}  # not a frame more or less
        rows = ~one_run(long)[1][:, total - burn_in]  # where no game begins just there
        for part, wanted in zip(states["stored_state"], one_by_one[total - burn_in]):
            torch.testing.assert_close(part[:, rows], wanted[:, rows], rtol=0, atol=5e-6)


def test_burn_in_gets_no_gradient_and_no_loss():
    algorithm = small_algorithm(algorithm={"burn_in": 3})
    _, states, _ = step(algorithm, random_batch(starts=[True] * ROWS))
    assert not any(
        part.requires_grad for part in (*states["stored_state"], *states["burn_in_frames"].values())
    )
    second, calls = random_batch(seed=1, starts=[False] * ROWS), []
    algorithm.model.backbone.register_forward_pre_hook(
        lambda _, arguments: calls.append(
            (arguments[0]["tty_chars"].shape[1], torch.is_grad_enabled())
        )
    )
    loss, _, info = step(algorithm, second, states)
    assert calls[0] == (3, False) and all(
        enabled for _, enabled in calls[1:]
    )  # the tail first, without gradient
    assert sum(length for length, _ in calls[1:]) == 7 and info["known_actions"] == 1.0
    shifted = {name: part.roll(1, dims=0) for name, part in states["burn_in_frames"].items()}
    assert step(algorithm, second, {**states, "burn_in_frames": shifted})[0].item() != loss.item()


def test_the_state_kept_for_the_next_chunk_does_not_hold_the_batch():
    """Only what the backbone reads, in memory of its own: a slice would keep the whole batch (300
    MB) alive."""
    batch = {**random_batch(starts=[True] * ROWS), "unused": torch.zeros(ROWS, 7, 1000)}
    tail = step(small_algorithm(algorithm={"burn_in": 2}), batch)[1]["burn_in_frames"]
    assert set(tail) == {*pomdp.OBSERVATIONS, "prev_actions", "begins"}
    assert all(torch.equal(tail[name], batch[name][:, 4:6]) for name in pomdp.OBSERVATIONS)
    assert all(
        part.untyped_storage().nbytes() == part.numel() * part.element_size()
        for part in tail.values()
    )


def test_a_row_that_starts_anew_forgets_what_was_before():
    algorithm, starts = small_algorithm(algorithm={"burn_in": 3}), [False, True, False, True]
    pasts, seen = (
        [step(algorithm, random_batch(seed=seed))[1] for seed in (0, 7)],
        core_outputs(algorithm),
    )
    for states in pasts:
        step(algorithm, random_batch(seed=1, starts=starts), states)
    assert [torch.equal(one, other) for one, other in zip(*seen)] == starts


# --- the algorithm: what enters it
WRONG_SHAPES = {
    "rewards": torch.zeros(ROWS, 6),  # without the frame after the chunk
    "dones": torch.zeros(ROWS, 7, 1, dtype=torch.bool),
    "mask": torch.ones(ROWS + 1, 7, dtype=torch.bool),
    "starts": torch.ones(ROWS + 1, dtype=torch.bool),
    "tty_chars": torch.zeros(ROWS, 6, 24, 80, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_a_batch_of_other_shapes_is_refused_by_name(name):
    """Broadcasting would learn from it in silence."""
    batch = {**random_batch(starts=[True] * ROWS), name: WRONG_SHAPES[name]}
    pattern = rf"{name}'\] has the shape .*, but \({ROWS},.* was expected"
    with pytest.raises(ValueError, match=pattern):
        step(small_algorithm(), batch)


def test_previous_actions_and_heads_of_other_shapes_are_refused_by_name():
    algorithm, batch = small_algorithm(), random_batch()
    with pytest.raises(ValueError, match=rf"prev_actions has the shape \({ROWS},\)"):
        algorithm.train_step(batch, NO_PREVIOUS[:ROWS, 0], {})
    algorithm.model.value = torch.nn.Linear(24, 2)
    with pytest.raises(ValueError, match=rf"head's values has the shape \({ROWS}, 7, 2\)"):
        step(algorithm, batch)


# --- the algorithm: loss
def test_loss_is_that_of_the_formulas():
    algorithm, batch = (
        small_algorithm(algorithm={"burn_in": 0, "value_coef": 0.3}),
        random_batch(done_share=0.2),
    )
    core, _ = single_steps(algorithm.model.backbone.eval(), *one_run(batch))
    with torch.no_grad():
        logits, values = algorithm.model.head(core, batch["tty_chars"])
    rewards = batch["rewards"][:, :-1]
    dones = batch["dones"][:, :-1].float()
    mask = torch.ones_like(rewards)
    targets = lambda_returns(rewards, dones, values, mask, 0.999, AWRConfig.lam)
    advantages = targets - values[:, :-1]
    scale = math.sqrt((advantages**2).mean().item())  # the first batch's own; later a running mean
    weights = torch.exp(
        (advantages / (AWRConfig.beta * scale)).clamp(max=math.log(AWRConfig.max_weight))
    )
    weights = weights / weights.mean()
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["actions"][:, :-1], reduction="none"
    )
    errors = torch.where(
        advantages.abs() < 1, advantages**2, 2 * advantages.abs() - 1
    )  # linear beyond 1
    assert 0.2 < (advantages.abs() < 1).float().mean() < 0.8
    expected = (weights * losses).mean() + 0.3 * errors.mean()
    loss, _, info = step(algorithm, batch)
    assert all(
        isinstance(value, torch.Tensor) and not value.requires_grad for value in info.values()
    )
    info, size = (
        {name: value.item() for name, value in info.items()},
        weights.sum() ** 2 / (weights**2).sum(),
    )
    wanted = {
        "loss": expected,
        "loss_per_action": losses.mean(),
        "effective_sample_size": size / weights.numel(),
    }
    wanted.update(
        advantage_scale=torch.tensor(scale), weight_max=weights.max(), value_loss=errors.mean()
    )
    assert {name: info[name] for name in wanted} == pytest.approx(
        {n: x.item() for n, x in wanted.items()}, rel=1e-4
    )
    assert loss.item() == info["loss"]


def test_padding_and_masked_frames_carry_no_loss_and_no_gradient():
    batch = random_batch(starts=[True] * ROWS)
    batch["mask"][:, 4:] = False
    batch["dones"][:, 3] = True  # the game ends; what follows is padding
    batch["mask"][1, 1] = False  # out of play
    other = random_batch(seed=9, starts=[True] * ROWS)
    garbage = {name: value.clone() for name, value in batch.items()}
    for name in (*pomdp.OBSERVATIONS, "actions", "rewards"):
        garbage[name][:, 4:] = other[name][:, 4:]
    garbage["actions"][1, 1] += 1

    def gradients(batch):
        algorithm = small_algorithm()
        loss, _, _ = step(algorithm, batch)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in algorithm.parameters())]

    torch.testing.assert_close(gradients(garbage), gradients(batch), rtol=1e-4, atol=1e-6)
    batch["mask"][:] = False
    assert not any(part.any() for part in gradients(batch))  # a wholly padded chunk


class Watched(pomdp.OfflineAlgorithm):
    """Keeps what its losses are made of."""

    def _loss(self, logits, values, *others):
        logits.retain_grad()
        self.logits, self.values = logits, values.detach()
        return super()._loss(logits, values, *others)

    def _value_loss(self, values, targets, mask):
        self.targets = targets
        return super()._value_loss(values, targets, mask)


def watched(**settings):
    torch.manual_seed(0)
    config = pomdp.TrainConfig(rnn_hidden_dim=HIDDEN, algorithm={"head_dim": 24, **settings})
    return Watched(small_backbone(), config, "cpu")


def test_frames_without_a_known_action_teach_the_value_and_not_the_policy():
    """Before, between and behind them: their rewards are real."""
    batch = random_batch(starts=[True] * ROWS)
    batch["actions"][0, 2:5] = pomdp.NO_ACTION
    batch["actions"][1, 0] = batch["actions"][2, 5] = pomdp.NO_ACTION
    known = (batch["actions"] < pomdp.NUM_ACTIONS)[:, :-1]
    algorithm = watched(value_coef=0.0, lam=0.7)
    loss, _, info = step(algorithm, batch)
    loss.backward()
    targets = algorithm.values[:, -1]
    for t in range(5, -1, -1):  # the loop written out, through all frames
        following = 0.3 * algorithm.values[:, t + 1] + 0.7 * targets
        targets = batch["rewards"][:, t] + 0.999 * (~batch["dones"][:, t]) * following
        torch.testing.assert_close(algorithm.targets[:, t], targets)
    moved = (algorithm.logits.grad != 0).any(dim=-1)
    assert torch.equal(moved, known)
    assert info["known_actions"] == pytest.approx(known.float().mean().item())
    assert info["frames_in_play"] == 1.0
    # Which action an unknown one stands for does not matter, nor what it would have been.
    nll = F.cross_entropy(
        algorithm.logits.detach()[known], batch["actions"][:, :-1][known], reduction="mean"
    )
    assert info["loss_per_action"].item() == pytest.approx(nll.item(), rel=1e-5)
    errors = F.huber_loss(algorithm.values[:, :-1], algorithm.targets, reduction="none")
    assert info["value_loss"].item() == pytest.approx(2 * errors.mean().item(), rel=1e-5)
    square = ((algorithm.targets - algorithm.values[:, :-1]) ** 2)[known].mean()
    assert algorithm.model.advantage_square.item() == pytest.approx(square.item(), rel=1e-5)


def test_an_unknown_action_is_no_previous_action():
    batch = random_batch(starts=[True] * ROWS)
    batch["actions"][0, 2] = pomdp.NO_ACTION
    algorithm, seen = small_algorithm(), []
    algorithm.model.backbone.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0]["prev_actions"])
    )
    step(algorithm, batch)
    previous = torch.cat(seen, dim=1)
    assert previous[0, 3] == pomdp.NO_ACTION
    assert torch.equal(previous[1, 1:], batch["actions"][1, :-1])


def test_behind_a_truncation_values_are_bootstrapped_from_the_frame_after_it():
    batch = random_batch(starts=[True] * ROWS)
    batch["dones"][:] = False
    batch["mask"][:, 4:] = False  # frame 4 is the one after the cut
    algorithm = watched(lam=1.0)
    step(algorithm, batch)
    expected = batch["rewards"][:, 3] + 0.999 * algorithm.values[:, 4]
    torch.testing.assert_close(algorithm.targets[:, 3], expected)


def test_one_batch_can_be_overfitted():
    algorithm = small_algorithm(algorithm={"head_dim": 64})
    batch = random_batch(rows=1, steps=4, starts=[True])
    batch["dones"][:, -2] = (
        True  # or the value of the frame after the chunk, which has no target, would run away
    )
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=1e-3)
    for _ in range(500):
        loss, _, info = step(algorithm, batch)
        if info["accuracy"] == 1.0 and info["loss_per_action"] < 0.2 and info["value_loss"] < 0.05:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"not overfitted: {info}")


def test_advantage_scale_is_saved_and_held_out_games_leave_it_alone():
    plain, algorithm = (small_algorithm(algorithm={"scale_rate": rate}) for rate in (1.0, 0.25))
    expected = None
    for seed in range(3):
        step(plain, random_batch(seed=seed))
        square = float(plain.model.advantage_square)  # at rate 1: each batch's own
        expected = square if expected is None else 0.75 * expected + 0.25 * square
        step(algorithm, random_batch(seed=seed))
        before = {name: value.clone() for name, value in algorithm.model.state_dict().items()}
        assert before["advantage_square"].item() == pytest.approx(expected, rel=1e-5)
        with torch.no_grad():
            assert not step(algorithm, random_batch(seed=9))[0].requires_grad
        assert all(
            torch.equal(value, before[name]) for name, value in algorithm.model.state_dict().items()
        )


@pytest.mark.parametrize("reward", [0.0, 10.0, -10.0])
def test_finite_under_autocast_at_extreme_rewards(reward):
    algorithm, batch, states = small_algorithm(), random_batch(), {}
    batch["rewards"][:] = reward
    inputs = torch.ones(1, 2, HIDDEN).cumsum(-1), batch["tty_chars"][:1, :2]
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=1e-2)
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, states, info = step(algorithm, batch, states)
            half = algorithm.model.head(*inputs)
        # Half precision would round a value by more than a step of the game changes it.
        torch.testing.assert_close(half, algorithm.model.head(*inputs), rtol=0, atol=0)
        assert loss.dtype == torch.float32 and all(map(math.isfinite, info.values()))
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in algorithm.parameters())
        optimizer.step()


# --- acting
def test_acting_draws_from_the_policy_at_the_temperature():
    obs = {name: value[:, 0].numpy() for name, value in random_observations(400, 1).items()}
    obs["prev_actions"] = np.full(400, pomdp.NO_ACTION)
    for temperature, share in ((1.0, 3 / 4), (0.5, 0.999)):
        model = small_algorithm(algorithm={"temperature": temperature}).model.eval()
        torch.nn.init.zeros_(model.policy.weight)
        torch.nn.init.zeros_(model.policy.bias)
        model.policy.bias.data[7] = math.log(
            3 * (pomdp.NUM_ACTIONS - 1)
        )  # at temperature 1 its probability is 3/4
        actions, state = model.vec_act(obs)
        assert (
            actions.dtype == np.int64
            and actions.shape == (400,)
            and state.rnn_state[0].shape == (2, 400, HIDDEN)
        )
        assert abs((actions == 7).mean() - share) < 0.09 and (
            temperature < 1 or len({*actions.tolist()}) > 20
        )


def screens(*lines):
    """Terminals [N, 24, 80] with these two bottom lines each, which a "|" separates."""
    chars = np.full((len(lines), 24, 80), ord(" "), dtype=np.uint8)
    for rows, line in zip(chars, lines):
        above, _, below = line.partition("|")
        rows[22, : len(above)], rows[23, : len(below)] = list(above.encode()), list(below.encode())
    return chars


def status(turn, strength="18/02"):
    above = f"Agent the Candidate    St:{strength} Dx:9 Co:9 In:9 Wi:9 Ch:9 Neutral S:5"
    return f"{above}|Dlvl:1 $:0 HP:14(14) Pw:5(5) AC:4 Xp:1/0 T:{turn} Blind"


NEW_GAME = {  # what a slot shows at three ticks -> whether a game begins at the third
    (status(7), status(8), status(9)): False,
    (status(9), status(12345), status(1)): True,
    (status(1), status(1), status(1)): False,
    (status(30), "a menu", status(1)): True,
    (status(30), status(31), "a menu|T:1"): False,
    (
        status(1),
        "a menu",
        status(1, "9"),
    ): True,  # it never left turn 1, and its attributes are others
    (status(1), "a menu", status(2, "9")): False,
    ("a menu", "a menu", status(1)): False,
}


def test_acting_begins_anew_where_a_new_game_shows_or_the_loop_says_so():
    N, model = len(NEW_GAME) + 1, small_algorithm().model.eval()
    ticks = [
        screens(*lines, status(5)) for lines in zip(*NEW_GAME)
    ]  # of the last one the loop says so
    obs = {name: value[:, 0].numpy() for name, value in random_observations(N, 1).items()}
    previous, none = np.full(N, 3), np.full(N, pomdp.NO_ACTION)
    _, state = model.vec_act({**obs, "tty_chars": ticks[0], "prev_actions": none})
    _, state = model.vec_act(
        {**obs, "tty_chars": ticks[1].astype(np.float32), "prev_actions": previous}, state
    )
    third = {**obs, "tty_chars": ticks[2], "prev_actions": np.append(previous[1:], pomdp.NO_ACTION)}
    found = model.vec_act(third, state)[1].rnn_state
    begun, unsaid = [*NEW_GAME.values(), True], [(b"", 0)] * N
    anew = model.vec_act({**third, "prev_actions": none})[1].rnn_state
    going_on = model.vec_act({**third, "prev_actions": previous}, state._replace(seen=unsaid))[
        1
    ].rnn_state
    for n in range(N):
        assert torch.equal(found[0][:, n], (anew if begun[n] else going_on)[0][:, n]), n
        assert not torch.equal(anew[0][:, n], going_on[0][:, n])


# --- acting with the EMA of the weights
def weights_of(model):
    """Copies, in the order of the parameters."""
    return [weight.detach().clone() for weight in model.parameters()]


def same(weights, others):
    return all(torch.equal(one, other) for one, other in zip(weights, others))


def learn(algorithm, updates=3, optimizer=None):
    """-> the weights after each update."""
    optimizer = optimizer or torch.optim.SGD(algorithm.parameters(), lr=0.5)
    states = {}
    after = []
    for seed in range(updates):
        optimizer.zero_grad()
        loss, states, _ = step(algorithm, random_batch(seed=seed), states)
        loss.backward()
        optimizer.step()
        algorithm.after_gradient_step()
        after.append(weights_of(algorithm.model))
    return after


def acts(algorithm):
    """The recurrent state after a step of acting: it tells which weights acted."""
    obs = {name: value[:, 0].numpy() for name, value in random_observations(ROWS, 1).items()}
    obs["prev_actions"] = np.full(ROWS, pomdp.NO_ACTION)
    return algorithm.model.vec_act(obs)[1].rnn_state


@pytest.mark.parametrize("average_decay", [0.15, 0.999, 1.0])
def test_the_ema_is_that_of_the_formula(average_decay):
    algorithm = small_algorithm(algorithm={"average_decay": average_decay})
    expected = None
    for n, weights in enumerate(learn(algorithm, updates=6)):
        weights = [weight.double() for weight in weights]
        if n == 0:
            expected = weights  # the first update's weights begin it
            continue
        decay = min(average_decay, n / (9 + n))  # 1/10, 2/11, ...: (1 + m) / (10 + m)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights)]
    found = weights_of(algorithm.ema.module)
    for weight, average in zip(found, expected):
        torch.testing.assert_close(weight.double(), average, rtol=1e-5, atol=1e-7)
    assert not same(found, weights_of(algorithm.model))
    assert torch.equal(algorithm.ema.module.advantage_square, algorithm.model.advantage_square)


def test_the_ema_acts_and_is_scored_in_evaluation_and_the_model_learns():
    """Through the packed weights of acting too, which are made again as the EMA moves."""
    algorithm = small_algorithm()
    batch = random_batch(starts=[True] * ROWS)
    learn(algorithm, 1)
    for _ in range(2):
        *_, latest = learn(algorithm, 2)
        algorithm.model.eval()
        fresh = small_algorithm(seed=1)
        fresh.model.load_state_dict(algorithm.ema.module.state_dict())
        fresh.model.eval()
        states = [acts(each) for each in (algorithm, fresh)]
        with torch.no_grad():
            losses = [step(each, batch)[0] for each in (algorithm, fresh)]
        algorithm.model.train()
        assert same(*states) and torch.equal(*losses)
        assert not torch.allclose(acts(algorithm)[0], states[0][0]), "in training the model acts"
        assert same(weights_of(algorithm.model), latest), "an evaluation changes no weights"


def test_before_the_first_update_and_without_an_ema_the_weights_act():
    for settings, updates in (({}, 0), ({"average_decay": 0}, 3)):
        algorithm = small_algorithm(algorithm=settings)
        learn(algorithm, updates)
        with torch.no_grad():
            algorithm.model.backbone.rnn.bias_ih_l0 += 1.0  # by whatever hand
        training = acts(algorithm)
        algorithm.model.eval()
        assert all(map(partial(torch.allclose, atol=1e-5), training, acts(algorithm)))
        assert (algorithm.ema is None) == bool(settings)


def test_a_model_that_learns_in_evaluation_mode_is_the_one_that_learns():
    """As where somebody's loop forgets to call train()."""
    algorithm = small_algorithm()
    algorithm.model.eval()
    *_, before, latest = learn(algorithm)
    assert not same(before, latest)


def test_copies_have_an_ema_of_their_own():
    algorithm = small_algorithm()
    *_, latest = learn(algorithm)
    average = weights_of(algorithm.ema.module)
    copy = deepcopy(algorithm)
    assert copy.model.ema == [copy.ema] and copy.ema is not algorithm.ema
    learn(copy)
    assert int(copy.ema.n_averaged) == 6 and int(algorithm.ema.n_averaged) == 3
    assert same(weights_of(algorithm.model), latest)
    assert same(weights_of(algorithm.ema.module), average)


@pytest.mark.parametrize("order", [("model", "ema"), ("ema", "model")])
def test_model_and_ema_are_restored_by_name_in_any_order(order):
    algorithm = small_algorithm()
    learn(algorithm)
    restored = small_algorithm(seed=1)
    for name in order:
        part = getattr(algorithm, name)
        getattr(restored, name).load_state_dict(deepcopy(part.state_dict()))
    assert same(acts(restored), acts(algorithm))
    assert same(learn(restored)[-1], learn(algorithm)[-1])
    assert same(weights_of(restored.ema.module), weights_of(algorithm.ema.module))
    for each in (algorithm, restored):
        each.model.eval()
    assert same(acts(restored), acts(algorithm))


def test_the_ema_is_no_part_of_the_model():
    """So its weights are not counted, optimized, or exchanged between processes; and they fit a
    model without one."""
    algorithm = small_algorithm()
    without = small_algorithm(algorithm={"average_decay": 0})
    learn(algorithm)
    assert algorithm.model.state_dict().keys() == without.model.state_dict().keys()
    assert len(algorithm.parameters()) == len(without.parameters())
    of_model = {id(part) for part in [*algorithm.model.buffers(), *algorithm.parameters()]}
    of_ema = {id(part) for part in [*algorithm.ema.buffers(), *algorithm.ema.parameters()]}
    assert of_model.isdisjoint(of_ema)
    without.model.load_state_dict(algorithm.ema.module.state_dict())
    without.model.eval()
    algorithm.model.eval()
    assert same(acts(without), acts(algorithm))


def test_the_bundled_agent_acts_as_it_is():
    path = Path(pomdp.__file__).parent / "scripts" / "agents" / "small_512.pt"
    algorithm, _, _ = pomdp.load_agent(path, device="cpu")
    saved = pomdp.read_checkpoint(path)["model"]
    state = algorithm.model.eval().current_model().state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in saved.items())


def test_a_layer_that_a_submission_adds_is_averaged_too():
    class Model(pomdp.Model):
        def __init__(self, backbone, hyper=None):
            super().__init__(backbone, hyper)
            self.value = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Linear(8, 1))

    class Algorithm(pomdp.OfflineAlgorithm):
        model_class = Model

    backbone = small_backbone()
    algorithm = Algorithm(backbone, pomdp.TrainConfig(algorithm={"head_dim": 24}), "cpu")
    latest = learn(algorithm)[-1]
    names = [name for name, _ in algorithm.model.named_parameters()]
    average = weights_of(algorithm.ema.module)
    moved = {name for name, *pair in zip(names, latest, average) if not torch.equal(*pair)}
    assert {"value.0.weight", "value.1.weight", "backbone.rnn.weight_ih_l0"} <= moved


# --- settings, and small parts of training
def test_head_passes_the_stricter_budget():
    with torch.device("meta"):
        model = pomdp.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS))
    count = {
        part: sum(weight.numel() for weight in part.parameters())
        for part in (model, model.backbone)
    }
    assert (
        model.backbone.rnn.hidden_size == 2048 and count[model] - count[model.backbone] <= 267_033
    )


def test_algorithm_settings_are_checked():
    said = {
        "bur_in": "unknown setting 'bur_in'; there are head_dim, burn_in",
        "burn_in": "burn_in must be int in",
    }
    said.update(lam=r"lam must be float in \[0, 1\], not", beta="beta must be float")
    said["average_decay"] = r"average_decay must be float in \[0, 1\], not"
    wrong = {"bur_in": [1], "burn_in": [1.5, -1], "lam": ["x", 1.5], "beta": [True, -1.0]}
    wrong["average_decay"] = [-0.1, 1.1]
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        with pytest.raises(pomdp.UserError, match=said[name]):
            small_algorithm(algorithm={name: value})


def test_settings_of_the_backbone_and_of_acting_reach_it():
    backbone = small_backbone(rnn_dropout=0.5, eval_precision="bf16")
    assert (
        backbone.acting_dtype is torch.bfloat16 and small_backbone().acting_dtype is torch.float32
    )
    inputs = {**random_observations(2, 3), "prev_actions": torch.zeros(2, 3)}
    with torch.no_grad():
        assert not torch.equal(backbone(inputs)[0], backbone(inputs)[0])  # dropout
        assert torch.equal(backbone.eval()(inputs)[0], backbone(inputs)[0])
    assert small_algorithm(algorithm={"burn_in": 8, "lam": 1}).hyper == AWRConfig(
        head_dim=24, burn_in=8, lam=1
    )


def test_expectile_and_polyak():
    assert pomdp.asymmetric_l2_loss(torch.tensor([-2.0, 1.0]), 0.8).item() == pytest.approx(
        (0.2 * 4 + 0.8 * 1) / 2
    )
    target, source = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * target.weight + 0.1 * source.weight
    pomdp.soft_update(target, source, 0.1)
    torch.testing.assert_close(target.weight, expected)


def test_learning_rate_counts_transitions():
    shared = dict(learning_rate=1.0, warmup_transitions=1000, lr_schedule="cosine", seq_len=10)
    one, other = (
        pomdp.TrainConfig(**shared, update_steps=10_000 // (10 * rows), batch_size=rows)
        for rows in (10, 20)
    )
    rates = [
        pomdp.learning_rate_at(one, transitions) for transitions in (0, 500, 1000, 5000, 10_000)
    ]
    assert rates == [
        pomdp.learning_rate_at(other, transitions) for transitions in (0, 500, 1000, 5000, 10_000)
    ]
    assert (
        rates[0] == 0.0
        and rates[1] < 0.5
        and rates[3] == pytest.approx(0.55)
        and rates[4] == pytest.approx(0.1)
    )
    assert pomdp.learning_rate_at(pomdp.TrainConfig(), 10**9) == pomdp.TrainConfig().learning_rate


def test_every_schedule_begins_with_the_warm_up():
    for schedule in ("constant", "cosine"):
        config = pomdp.TrainConfig(
            learning_rate=1.0, warmup_transitions=1000, lr_schedule=schedule, update_steps=10**9
        )
        rates = [pomdp.learning_rate_at(config, transitions) for transitions in (0, 250, 1000)]
        assert rates == pytest.approx([0.0, 0.25, 1.0]), schedule


def test_the_schedule_counts_the_rows_of_all_processes(monkeypatch):
    """Two processes with five rows each are as far as one with ten."""
    shared = dict(lr_schedule="cosine", seq_len=10, update_steps=100)
    alone = pomdp.TrainConfig(**shared, batch_size=10)
    of_two = pomdp.TrainConfig(**shared, batch_size=5)
    places = (0, 2500, 5000, 10_000)
    expected = [pomdp.learning_rate_at(alone, transitions) for transitions in places]
    monkeypatch.setattr(pomdp, "WORLD", 2)
    assert [pomdp.learning_rate_at(of_two, transitions) for transitions in places] == expected


def test_weight_decay_covers_each_matrix_once_and_nothing_else():
    algorithm = small_algorithm()
    config = pomdp.TrainConfig(rnn_hidden_dim=HIDDEN, weight_decay=0.1, device="cpu")
    groups = pomdp.make_optimizer(algorithm.model, config).param_groups
    decayed, others = (group["params"] for group in groups)
    assert sorted(map(id, decayed + others)) == sorted(map(id, algorithm.parameters()))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.dim() > 1 for parameter in decayed) and all(
        parameter.dim() == 1 for parameter in others
    )
