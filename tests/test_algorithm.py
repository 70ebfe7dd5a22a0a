"""Backbone, model and algorithm: reference implementations, properties, and what must not leave a trace."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import AWRConfig, Model, ModelBackbone, OfflineAlgorithm, advantage_weights, lambda_returns

HIDDEN = 32


def small_backbone(seed=0, **options):
    torch.manual_seed(seed)
    return ModelBackbone(pomdp.NUM_ACTIONS, rnn_hidden_dim=HIDDEN, rnn_layers=2, **options)


def small_algorithm(seed=0, **algorithm):
    config = pomdp.TrainConfig(algorithm={"head_dim": 24, **algorithm})
    return OfflineAlgorithm(small_backbone(seed), config, "cpu")


def random_observations(rows, steps, seed=0):
    rng = np.random.default_rng(seed)
    blstats = rng.integers(0, 100, size=(rows, steps, pomdp.NUM_BLSTATS))
    blstats[rng.random((rows, steps)) < 0.2] = 0  # hidden status lines
    return {
        "tty_chars": torch.as_tensor(rng.integers(0, 256, size=(rows, steps, 24, 80)), dtype=torch.uint8),
        "tty_colors": torch.as_tensor(rng.integers(0, 32, size=(rows, steps, 24, 80)), dtype=torch.int8),
        "tty_cursor": torch.as_tensor(rng.integers(0, (24, 80), size=(rows, steps, 2)), dtype=torch.uint8),
        "blstats": torch.as_tensor(blstats, dtype=torch.int32),
    }


def random_batch(rows=4, steps=6, seed=0, starts=None, done_share=0.0, **extra):
    """A batch as our loader makes it, or as the benchmark does when `starts` is None."""
    rng = np.random.default_rng(seed + 1)
    batch = random_observations(rows, steps + 1, seed)
    batch["actions"] = torch.as_tensor(rng.integers(0, pomdp.NUM_ACTIONS, (rows, steps + 1)))
    batch["rewards"] = torch.as_tensor(rng.normal(size=(rows, steps + 1)), dtype=torch.float32)
    batch["dones"] = torch.as_tensor(rng.random((rows, steps + 1)) < done_share)
    if starts is not None:
        batch["starts"] = torch.as_tensor(starts)
        batch["mask"] = torch.ones(rows, steps + 1, dtype=torch.bool)
    batch.update(extra)
    return batch


def cut(batch, begin, end):
    return {name: value[:, begin:end] for name, value in batch.items() if name not in ("starts", "prev_actions")}


NO_PREVIOUS = torch.full((4, 1), pomdp.NO_ACTION)


# --- backbone
def single_steps(backbone, inputs, clear, state=None):
    """Frame by frame, as in acting, clearing the rows of `clear` [B, T] before their frame."""
    outputs = []
    with torch.no_grad():
        for t in range(clear.shape[1]):
            if state is not None:
                state = tuple(part * (~clear[:, t]).float()[None, :, None] for part in state)
            output, state = backbone({name: value[:, t : t + 1] for name, value in inputs.items()}, state)
            outputs.append(output)
    return torch.cat(outputs, 1), state


def test_steps_at_once_equal_single_steps_across_the_end_of_a_game():
    algorithm = small_algorithm()
    inputs = {**random_observations(4, 9), "prev_actions": torch.randint(0, pomdp.NUM_ACTIONS + 1, (4, 9))}
    resets = torch.zeros(4, 9, dtype=torch.bool)
    resets[0, 3] = resets[2, 3] = resets[1, 7] = True
    algorithm.model.eval()
    slow, final = single_steps(algorithm.model.backbone, inputs, resets)
    with torch.no_grad():
        fast, states = algorithm._run(inputs, resets, None, algorithm._cuts(resets))
    torch.testing.assert_close(fast, slow, rtol=0, atol=2e-6)
    for ours, theirs in zip(states[-1], final):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    # and the clearing matters: without it the frames after a game's end come out differently
    with torch.no_grad():
        uncleared, _ = algorithm._run(inputs, None, None, [0])
    assert (uncleared[0, 3] - slow[0, 3]).abs().max() > 1e-4
    torch.testing.assert_close(uncleared[3], slow[3], rtol=0, atol=2e-6)


def test_packed_acting_step_equals_the_lstm_and_follows_the_weights():
    backbone = small_backbone().eval()
    inputs = {**random_observations(8, 1), "prev_actions": torch.zeros(8, 1, dtype=torch.long)}
    state = (torch.randn(2, 8, HIDDEN), torch.randn(2, 8, HIDDEN))

    def both():
        with torch.no_grad():
            packed = backbone(inputs, state)
            plain = backbone.rnn(backbone.encode(inputs), state)
        return packed, plain

    for _ in range(2):
        (output, new), (expected, expected_new) = both()
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
        for ours, theirs in zip(new, expected_new):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        before = output
        optimizer = torch.optim.SGD(backbone.parameters(), lr=1.0)  # act, update, act
        backbone.rnn.weight_hh_l1.grad = torch.ones_like(backbone.rnn.weight_hh_l1)
        optimizer.step()
    assert (both()[0][0] - before).abs().max() > 1e-3


def test_packed_weights_are_not_copied_with_the_model():
    backbone = small_backbone().eval()
    with torch.no_grad():
        backbone({**random_observations(1, 1), "prev_actions": torch.zeros(1, 1, dtype=torch.long)})
    assert backbone._packed is not None
    other = copy.deepcopy(backbone)
    assert other._packed is None
    assert all(torch.equal(a, b) and a is not b for a, b in zip(backbone.parameters(), other.parameters()))
    assert not any("packed" in name for name in backbone.state_dict())


def test_crop_shows_the_cells_round_the_cursor():
    encoder = pomdp.ScreenEncoder()
    cells = torch.arange(1, 24 * 80 + 1).view(1, 24, 80).repeat(3, 1, 1)
    cursor = torch.tensor([[0, 0], [11, 40], [23, 79]])
    crops = encoder.crop_cells(cells, cursor)
    half = encoder.CROP // 2
    for index, (row, column) in enumerate(cursor.tolist()):
        for i in range(encoder.CROP):
            for j in range(encoder.CROP):
                r, c = row + i - half, column + j - half
                expected = cells[0, r, c] if 0 <= r < 24 and 0 <= c < 80 else 0
                assert crops[index, i, j] == expected


@pytest.mark.parametrize("copies", [64, 7])
def test_looking_up_in_copies_of_the_table_gives_what_one_table_gives(copies):
    cells = torch.randint(0, 50, (3, 24, 80), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tables = [torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    found = [pomdp.look_up(cells, table, number) for table, number in zip(tables, (1, copies))]
    assert found[1].shape == (3, 4, 24, 80) and torch.equal(*found)
    for cells_found in found:
        (cells_found * torch.arange(cells_found.numel()).view_as(cells_found).cos()).sum().backward()
    torch.testing.assert_close(tables[0].grad, tables[1].grad, rtol=1e-5, atol=1e-4)


def test_every_input_reaches_the_backbones_output():
    backbone = small_backbone().eval()
    inputs = {**random_observations(1, 1), "prev_actions": torch.tensor([[5]])}
    inputs["blstats"][:] = 10
    changes = {"tty_chars": (0, 0, 3, 60, 65), "tty_colors": (0, 0, 3, 60, 7), "tty_cursor": (0, 0, 1, 50), "blstats": (0, 0, 10, 1),
               "prev_actions": (0, 0, 6)}  # fmt: skip
    with torch.no_grad():
        base, _ = backbone(inputs)
        for name, (*place, value) in changes.items():
            changed = {key: tensor.clone() for key, tensor in inputs.items()}
            assert changed[name][tuple(place)] != value
            changed[name][tuple(place)] = value
            assert not torch.equal(backbone(changed)[0], base), name


def test_hidden_status_lines_are_flagged_and_otherwise_zero():
    features = pomdp.blstats_features(torch.zeros(1, pomdp.NUM_BLSTATS, dtype=torch.int32))
    assert features[0, -1] == 1 and (features[0, :-1] == 0).all()
    extreme = torch.full((2, pomdp.NUM_BLSTATS), 2**31 - 1, dtype=torch.int32)
    extreme[1] = -(2**31)
    assert torch.isfinite(pomdp.blstats_features(extreme)).all()


# --- the block's functions
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_lambda_returns_equal_a_plain_loop(rows, steps, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(rows, steps)), rng.normal(size=(rows, steps + 1))
    dones = rng.random((rows, steps)) < 0.3
    expected = np.zeros((rows, steps))
    for row in range(rows):
        after = values[row, steps]
        for t in reversed(range(steps)):
            if dones[row, t]:
                after = rewards[row, t]
            else:
                after = rewards[row, t] + gamma * ((1 - lam) * values[row, t + 1] + lam * after)
            expected[row, t] = after
    result = lambda_returns(torch.tensor(rewards), torch.tensor(dones, dtype=torch.float64), torch.tensor(values), gamma, lam)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_lambda_returns_stop_the_gradient_and_check_shapes():
    values = torch.randn(2, 4, requires_grad=True)
    assert not lambda_returns(torch.zeros(2, 3), torch.zeros(2, 3), values, 0.9, 0.9).requires_grad
    with pytest.raises(ValueError, match="shapes do not fit"):
        lambda_returns(torch.zeros(2, 3), torch.zeros(2, 3), values[:, :3], 0.9, 0.9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=30), st.floats(1e-12, 1e12))
def test_weights_are_finite_at_extreme_advantages_and_have_mean_one(advantages, scale):
    advantages = torch.tensor([advantages], dtype=torch.float32)
    mask = torch.ones_like(advantages)
    mask[0, 0] = 0
    weights = advantage_weights(advantages, mask, torch.tensor(scale), beta=1.0, max_weight=20.0)
    assert torch.isfinite(weights).all() and weights[0, 0] == 0
    # all counting weights may vanish (each advantage hugely negative); otherwise they average to 1
    exponents = (advantages / max(scale, 1e-6)).clamp(max=math.log(20.0))[0, 1:]
    if torch.exp(exponents).sum() > 1e-6:
        assert weights.sum() == pytest.approx(float(mask.sum()), rel=1e-4)


def test_weights_grow_with_the_advantage_up_to_the_clip():
    weights = advantage_weights(torch.tensor([[-1.0, 0.0, 1.0, 50.0, 60.0]]), torch.ones(1, 5), torch.tensor(1.0), 1.0, 20.0)[0]
    assert weights[0] < weights[1] < weights[2] < weights[3] and weights[3] == weights[4]
    assert weights[3] / weights[1] == pytest.approx(20.0, rel=1e-5)
    assert weights[2] / weights[1] == pytest.approx(math.e, rel=1e-5)


# --- the algorithm
def seen_by(head, seen):
    """The head, which keeps what it is called with."""
    return lambda core: seen.append(core) or head(core)


def test_carried_states_make_chunks_equal_one_long_run():
    """With unchanged weights, three chunks with carried state and burn-in see what one unbroken run sees."""
    steps, total = 6, 18
    long = random_batch(4, total, done_share=0.1)
    for burn_in in (0, 1, 4, steps):
        algorithm = small_algorithm(burn_in=burn_in)
        seen = []
        algorithm.model.head = seen_by(algorithm.model.head, seen)
        states, previous = {}, NO_PREVIOUS
        with torch.no_grad():
            for begin in range(0, total, steps):
                batch = cut(long, begin, begin + steps + 1)
                _, states, _ = algorithm.train_step(batch, previous, states)
                previous = batch["actions"][:, steps - 1 : steps]
        resets = torch.cat([torch.ones(4, 1, dtype=torch.bool), long["dones"][:, :-1]], 1)
        previous_actions = torch.cat([NO_PREVIOUS, long["actions"][:, :-1]], 1).masked_fill(resets, pomdp.NO_ACTION)
        inputs = {**{name: long[name] for name in pomdp.OBSERVATIONS}, "prev_actions": previous_actions}
        expected, _ = single_steps(algorithm.model.backbone.eval(), inputs, resets)
        for number, core in enumerate(seen):
            torch.testing.assert_close(core, expected[:, number * steps : number * steps + steps + 1], rtol=0, atol=5e-6)


def test_loader_batches_and_benchmark_batches_give_the_same_loss():
    """`starts` of our loader and the benchmark's dones are two ways to say the same."""
    for burn_in in (0, 3):
        plain, ours = small_algorithm(burn_in=burn_in), small_algorithm(burn_in=burn_in)
        states, our_states = {}, {}
        for number in range(3):
            batch = random_batch(seed=number)
            batch["dones"][1, 5] = number == 1  # row 1 ends with the second chunk's last step
            batch["tty_chars"] = batch["tty_chars"].float()  # the benchmark hands floats
            loss, states, _ = plain.train_step(batch, NO_PREVIOUS, states)
            starts = torch.tensor([number == 0, number in (0, 2), number == 0, number == 0])
            with_starts = {**batch, "starts": starts, "mask": torch.ones(4, 7, dtype=torch.bool)}
            our_loss, our_states, _ = ours.train_step(with_starts, NO_PREVIOUS, our_states)
            assert loss.item() == pytest.approx(our_loss.item(), rel=1e-5)


def test_burn_in_gets_no_gradient_and_no_loss():
    algorithm = small_algorithm(burn_in=3)
    starts = [True] * 4
    _, states, _ = algorithm.train_step(random_batch(seed=0, starts=starts), NO_PREVIOUS, {})
    assert all(not part.requires_grad for parts in states.values() for part in parts)
    tail = list(states["tail"])
    second = random_batch(seed=1, starts=[False] * 4)
    calls = []
    backbone_forward = algorithm.model.backbone.forward
    algorithm.model.backbone.forward = lambda *args: calls.append(torch.is_grad_enabled()) or backbone_forward(*args)
    loss, _, info = algorithm.train_step(second, NO_PREVIOUS, states)
    assert calls[0] is False and all(calls[1:])  # the tail first, without gradient
    assert info["counting_frames"] == 1.0
    # The tail does matter: another one gives another loss. (Its order: resets, then the inputs by name.)
    changed = [part.roll(1, dims=0) for part in tail]
    other, _, _ = algorithm.train_step(second, NO_PREVIOUS, {**states, "tail": tuple(changed)})
    assert other.item() != loss.item()


def test_padding_and_masked_frames_carry_no_loss_and_no_gradient():
    algorithm = small_algorithm()
    batch = random_batch(starts=[True] * 4)
    batch["mask"][:, 4:] = False
    batch["dones"][:, 3] = True  # the game ends; what follows is padding

    def gradients(batch):
        algorithm.advantage_square = torch.zeros(())
        algorithm.model.zero_grad()
        loss, _, _ = algorithm.train_step(batch, NO_PREVIOUS, {})
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in algorithm.parameters()]

    loss, expected = gradients(batch)
    garbage = {name: value.clone() for name, value in batch.items()}
    other = random_batch(seed=9, starts=[True] * 4)
    for name in (*pomdp.OBSERVATIONS, "actions", "rewards"):
        garbage[name][:, 4:] = other[name][:, 4:]
    changed_loss, changed = gradients(garbage)
    assert changed_loss == pytest.approx(loss, rel=1e-6)
    for ours, theirs in zip(changed, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    batch["mask"][:] = False
    assert gradients(batch)[0] == 0.0  # a wholly padded chunk


def test_a_new_game_in_a_row_forgets_the_one_before():
    algorithm = small_algorithm(burn_in=3)
    starts = [False, True, False, True]
    outputs = []
    for first_seed in (0, 7):  # two different pasts
        _, states, _ = algorithm.train_step(random_batch(seed=first_seed, starts=[True] * 4), NO_PREVIOUS, {})
        seen = []
        head = algorithm.model.head
        algorithm.model.head = lambda core, seen=seen, head=head: seen.append(core.detach()) or head(core)
        algorithm.train_step(random_batch(seed=1, starts=starts), NO_PREVIOUS, states)
        algorithm.model.head = head
        outputs.append(seen[0])
    assert torch.equal(outputs[0][[1, 3]], outputs[1][[1, 3]])
    assert not torch.equal(outputs[0][[0, 2]], outputs[1][[0, 2]])


def test_one_batch_can_be_overfitted():
    algorithm = small_algorithm(head_dim=64)
    batch = random_batch(rows=1, steps=4, starts=[True])
    batch["dones"][:, -2] = True  # otherwise the value of the frame after the chunk, which has no target, would run away
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=1e-3)
    for _ in range(500):
        loss, _, info = algorithm.train_step(batch, NO_PREVIOUS[:1], {})
        if info["accuracy"] == 1.0 and info["loss_per_action"] < 0.2 and info["value_loss"] < 0.05:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"not overfitted: {info}")


def test_both_streams_are_trained_each_by_its_own_loss():
    algorithm = small_algorithm()
    loss, _, _ = algorithm.train_step(random_batch(), NO_PREVIOUS, {})
    loss.backward()
    model = algorithm.model
    for part in (model.policy, model.value, model.shared, model.backbone):
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in part.parameters() if parameter.dim() > 1)
    model.zero_grad(set_to_none=True)
    algorithm.hyper.value_coef = 0.0
    algorithm.train_step(random_batch(), NO_PREVIOUS, {})[0].backward()
    assert model.value.weight.grad is None or model.value.weight.grad.abs().max() == 0
    assert model.policy.weight.grad.abs().max() > 0


def test_policy_loss_is_the_weighted_cross_entropy():
    algorithm = small_algorithm(burn_in=0)
    batch = random_batch(done_share=0.2)
    model = algorithm.model
    resets = torch.cat([torch.ones(4, 1, dtype=torch.bool), batch["dones"][:, :-1]], 1)
    previous = torch.cat([NO_PREVIOUS, batch["actions"][:, :-1]], 1).masked_fill(resets, pomdp.NO_ACTION)
    core, _ = single_steps(model.backbone.eval(), {**{n: batch[n] for n in pomdp.OBSERVATIONS}, "prev_actions": previous}, resets)
    with torch.no_grad():
        logits, values = model.head(core)
    targets = lambda_returns(batch["rewards"][:, :-1], batch["dones"][:, :-1].float(), values, 0.999, AWRConfig.lam)
    advantages = targets - values[:, :-1]
    scale = math.sqrt((advantages**2).mean().item())  # the first batch's own; later a running mean
    weights = torch.exp((advantages / (AWRConfig.beta * scale)).clamp(max=math.log(AWRConfig.max_weight)))
    weights = weights / weights.mean()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["actions"][:, :-1].flatten(), reduction="none").view(4, -1)
    errors = torch.where(advantages.abs() < 1, advantages**2, 2 * advantages.abs() - 1)  # linear beyond 1
    assert 0.2 < (advantages.abs() < 1).float().mean() < 0.8
    expected = (weights * losses).mean() + AWRConfig.value_coef * errors.mean()
    loss, _, info = algorithm.train_step(batch, NO_PREVIOUS, {})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert info["loss_per_action"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert info["effective_sample_size"] == pytest.approx((weights.sum() ** 2 / (weights**2).sum() / weights.numel()).item(), rel=1e-4)


def test_held_out_chunks_leave_no_trace():
    algorithm = small_algorithm()
    before = {name: value.clone() for name, value in algorithm.model.state_dict().items()}
    with torch.no_grad():
        loss, _, info = algorithm.train_step(random_batch(returns=torch.randn(4, 7)), NO_PREVIOUS, {})
    assert not loss.requires_grad and algorithm.advantage_square == 0.0
    assert all(torch.equal(value, before[name]) for name, value in algorithm.model.state_dict().items())
    assert {"moment_return", "moment_return_square", "moment_value_error", "moment_value_error_square"} <= set(info)


def test_info_is_floats_unless_tensors_are_asked_for():
    algorithm = small_algorithm()
    info = algorithm.train_step(random_batch(), NO_PREVIOUS, {})[2]
    assert info and all(type(value) is float for value in info.values())
    algorithm.info_as_tensors = True
    info = algorithm.train_step(random_batch(), NO_PREVIOUS, {})[2]
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in info.values())


def test_advantage_scale_is_a_running_mean_square():
    algorithm = small_algorithm()
    squares = []
    for seed in range(3):
        algorithm.train_step(random_batch(seed=seed), NO_PREVIOUS, {})
        squares.append(float(algorithm.advantage_square))
    assert squares[0] > 0 and 0 < abs(squares[1] - squares[0]) < 0.2 * squares[0]  # moves, slowly
    restored = small_algorithm()
    restored.load_state_dict(algorithm.state_dict())
    assert float(restored.advantage_square) == squares[-1]


@pytest.mark.parametrize("reward", [0.0, 10.0, -10.0])
def test_finite_under_autocast_at_extreme_rewards(reward):
    algorithm = small_algorithm()
    batch = random_batch()
    batch["rewards"][:] = reward
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=1e-2)
    states = {}
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, states, info = algorithm.train_step(batch, NO_PREVIOUS, states)
        assert loss.dtype == torch.float32 and all(math.isfinite(value) for value in info.values())
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in algorithm.parameters() if parameter.grad is not None)
        optimizer.step()


def test_acting_draws_from_the_policy():
    model = Model(small_backbone(), head_dim=24).eval()
    with torch.no_grad():
        model.policy.bias[:] = 0
        model.policy.weight[:] = 0
        model.policy.bias[7] = math.log(3 * (pomdp.NUM_ACTIONS - 1))  # action 7 has probability 3/4
    obs = {name: value[:, 0].numpy() for name, value in random_observations(400, 1).items()}
    torch.manual_seed(0)
    actions, state = model.vec_act({**obs, "prev_actions": np.full(400, pomdp.NO_ACTION)}, None)
    assert actions.dtype == np.int64 and actions.shape == (400,)
    assert 0.66 < (actions == 7).mean() < 0.84 and len(set(actions.tolist())) > 20
    assert state[0].shape == (2, 400, HIDDEN)


def screens(*lines):
    """Terminals [N, 24, 80] with these bottom lines; what stands before a "|" is on the line above."""
    chars = np.full((len(lines), 24, 80), ord(" "), dtype=np.uint8)
    for rows, line in zip(chars, lines):
        above, _, bottom = line.rpartition("|")
        rows[22, : len(above)], rows[23, : len(bottom)] = list(above.encode()), list(bottom.encode())
    return chars


def test_turn_and_attributes_are_read_off_the_status_lines():
    vitals = "HP:14(14) Pw:5(5) AC:4 Xp:1/0 T:"
    lines = (f"Agent the Candidate St:18/02 Dx:9 Co:9 In:9 Wi:9 Ch:9 Neutral S:5|Dlvl:1 $:0 {vitals}1",
             f"Agent the Student   St:18/02 Dx:9 Co:9 In:9 Wi:9 Ch:9 Neutral S:90|Dlvl:12 $:0 {vitals}54321 Blind",
             f"Agent the Student   St:18/02 Dx:9 Co:9 In:9 Wi:9 Ch:10 Neutral S:90|Dlvl:12 $:0 {vitals}3", "(end)", "T:")  # fmt: skip
    for shown in (screens(*lines), screens(*lines).astype(np.float32)):  # the benchmark may hand floats
        turns, attributes = pomdp.numbers_shown(shown)
        assert turns.tolist() == [1, 54321, 3, 0, 0] and turns.dtype == np.float32
        assert attributes[0] == attributes[1] > 0 and attributes[2] not in (0, attributes[0]) and attributes[3:].tolist() == [0, 0]


@pytest.mark.parametrize("clear_state", [True, False])
def test_acting_begins_anew_where_a_new_game_shows(clear_state):
    """Slots: goes on; begins a new game; stays in turn 1; begins anew after a menu that hides the turns; shows a menu; a game that
    never left turn 1 is followed by one with other attributes; a menu hides the attributes in turn 1."""
    model = Model(small_backbone(), head_dim=24, clear_state=clear_state).eval()
    obs = {name: value[:, 0].numpy() for name, value in random_observations(7, 1).items()}
    previous = np.full(7, 3)
    one, other = " St:8 Dx:9 Co:9 In:9 Wi:9 Ch:9 |T:1", " St:9 Dx:9 Co:9 In:9 Wi:9 Ch:9 |T:1"

    def act(lines, state):
        torch.manual_seed(0)
        seen = {**obs, "tty_chars": screens(*lines), "prev_actions": previous}
        return seen, model.vec_act(seen, state)[1]

    _, state = act(["T:7", "T:9", one, "T:30", "T:2", one, one], None)
    _, state = act(["T:8", "T:9", one, "a menu", "a menu", "a menu", "T:1"], state)
    assert state[2][0].flatten().tolist() == [8, 9, 1, 30, 2, 1, 1] and state[2].shape == (2, 7, 1) and len(state) == 3
    seen, after = act(["T:8", "T:1", one, "T:1", "a menu", other, one], state)
    begun = torch.tensor([False, True, False, True, False, True, False]) & clear_state
    seen["prev_actions"] = np.where(begun.numpy(), pomdp.NO_ACTION, 3)
    kept = tuple(part * (~begun)[None, :, None] for part in state)
    expected = Model(small_backbone(), head_dim=24, clear_state=False).eval()
    expected.load_state_dict(model.state_dict())
    for found, wanted in zip(after[:2], expected.vec_act(seen, kept)[1][:2]):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_head_computes_in_float32_under_autocast():
    """Half precision would round a value by more than a step of the game changes it."""
    model = Model(small_backbone(), head_dim=24)
    core_output = torch.randn(3, 5, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.head(core_output)
    for found, wanted in zip(half, model.head(core_output)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_state_kept_for_the_next_chunk_does_not_hold_the_batch():
    """Only what the backbone reads, in memory of its own: a slice would keep the whole batch (300 MB in the benchmark) alive."""
    algorithm = small_algorithm(burn_in=2)
    batch = random_batch(starts=[True] * 4)
    batch["unused"] = torch.zeros(4, 7, 1000)
    states = algorithm.train_step(batch, NO_PREVIOUS, {})[1]
    frames = dict(zip(sorted((*pomdp.OBSERVATIONS, "prev_actions")), states["tail"][1:]))
    assert len(states["tail"]) == 1 + len(frames)
    for name in pomdp.OBSERVATIONS:
        assert torch.equal(frames[name], batch[name][:, 4:6]), name
    assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in states["tail"])


def test_head_passes_the_stricter_budget():
    with torch.device("meta"):
        model = Model(ModelBackbone(pomdp.NUM_ACTIONS, 2048, 2, 0.0, True))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total - sum(parameter.numel() for parameter in model.backbone.parameters()) <= 267_033


def test_algorithm_settings_are_checked():
    for wrong, message in (({"bur_in": 1}, "unknown setting 'bur_in'"), ({"burn_in": 1.5}, "burn_in must be a int"),
                           ({"lam": "x"}, "lam"), ({"beta": True}, "beta"), ({"beta": -1.0}, "beta must be a float above 0"),
                           ({"lam": 1.5}, "at most 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pomdp.awr_config(wrong)
    assert pomdp.awr_config({"burn_in": 8, "lam": 1}) == AWRConfig(burn_in=8, lam=1.0)


# --- small parts of training
def test_expectile_and_polyak():
    u = torch.tensor([-2.0, 1.0])
    assert pomdp.asymmetric_l2_loss(u, 0.8).item() == pytest.approx((0.2 * 4 + 0.8 * 1) / 2)
    target, source = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * target.weight + 0.1 * source.weight
    pomdp.soft_update(target, source, 0.1)
    torch.testing.assert_close(target.weight, expected)


def test_learning_rate_counts_transitions():
    shared = dict(learning_rate=1.0, warmup_transitions=1000, lr_schedule="cosine", seq_len=10)
    config = pomdp.TrainConfig(**shared, update_steps=100, batch_size=10)
    other = pomdp.TrainConfig(**shared, update_steps=50, batch_size=20)
    for transitions in (0, 500, 1000, 5000, 10_000):
        assert pomdp.learning_rate_at(config, transitions) == pomdp.learning_rate_at(other, transitions)
    assert pomdp.learning_rate_at(config, 0) == 0.0 and pomdp.learning_rate_at(config, 10_000) == pytest.approx(0.1)
    assert pomdp.learning_rate_at(pomdp.TrainConfig(), 10**9) == pomdp.TrainConfig().learning_rate


def test_weight_decay_covers_each_parameter_once():
    backbone = small_backbone()
    groups = pomdp.split_weight_decay(list(backbone.named_parameters()), 0.1)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in backbone.parameters()) and len(set(ids)) == len(ids)
    assert all(parameter.dim() == 1 for parameter in groups[1]["params"]) and groups[1]["weight_decay"] == 0.0
