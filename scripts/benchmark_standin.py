"""A stand-in for the benchmark that the EDITABLE block is submitted to: its backbone, config, helpers and loop, on made-up games.

The benchmark (MLS-Bench, task rl-offline-pomdp) copies one block over the same block of its own file, which is built on
Katakomba's recurrent scripts. This one follows that file in our own code:
the names around the block, a Katakomba-like backbone that views its inputs, 128 x 16 batches of float tensors that overlap by one step,
rewards scaled by a running RMS, mixed precision with a GradScaler, states carried from batch to batch and never cleared,
and 14 slots in evaluation. `check_submission.py` puts a block into it; nothing here is needed for training.

Axes: B batch, T time, H hidden, L layers, N games. LSTM state is (h, c), each [L, B, H].
"""
import contextlib
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NUM_ACTIONS = 121
SCREEN_SHAPE = (3, 108, 108)  # an 18 x 18 crop round the cursor, 6 x 6 pixels a cell

Batch = Dict[str, torch.Tensor]
Encoded = Tuple[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]  # the LSTM's output [B, T, H] and its state
States = Dict[str, Any]


@dataclass
class TrainConfig:
    """The benchmark's fields and defaults, and no others: a block that reads any other from `config` fails there."""

    character: str = "mon-hum-neu"
    data_mode: str = "in_memory"
    project: str = "NetHack"
    group: str = "custom-nethack-pomdp"
    name: str = "custom"
    version: int = 0
    rnn_hidden_dim: int = 2048
    rnn_layers: int = 2
    use_prev_action: bool = True
    rnn_dropout: float = 0.0
    clip_range: float = 10.0
    tau: float = 0.005
    gamma: float = 0.999
    update_steps: int = 100_000
    batch_size: int = 128
    seq_len: int = 16
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    clip_grad_norm: Optional[float] = None
    checkpoints_path: Optional[str] = None
    eval_every: int = 10_000
    eval_episodes: int = 50
    eval_processes: int = 14
    render_processes: int = 14
    eval_seed: int = 50
    train_seed: int = 42


def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) * target + tau * source, in place, over the parameters (not the buffers)."""
    with torch.no_grad():
        for target_param, source_param in zip(target.parameters(), source.parameters()):
            target_param.lerp_(source_param, tau)


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    """Mean expectile loss |tau - 1(u < 0)| * u^2 (IQL, arXiv 2110.06169, equation 5)."""
    return torch.mean(torch.abs(tau - (u < 0).float()) * u.square())


class ModelBackbone(nn.Module):
    """Encoders of the top line, the bottom two lines, a picture of the cursor's surroundings and the previous action, into an LSTM.

    Inputs that it takes: `tty_chars` [B, T, 24, 80], `screen_image` [B, T, 3, 108, 108], `prev_actions` [B, T] int64.
    The previous action is one-hot over exactly `action_dim` classes, so an index outside of 0..action_dim-1 is an error,
    and so is a dtype other than int64. Two encoders are scripted, as there. `width` divides the encoders' sizes, for fast checks; 1 is
    Katakomba's size.
    """

    def __init__(self, action_dim: int, rnn_hidden_dim: int = 2048, rnn_layers: int = 2, rnn_dropout: float = 0.0,
                 use_prev_action: bool = True, width: int = 1):
        super().__init__()
        self.num_actions = action_dim
        self.rnn_hidden_dim = rnn_hidden_dim
        self.use_prev_action = use_prev_action
        line, screen, channels = 128 // width, 512 // width, 32 // width
        self.topline = nn.Sequential(nn.Linear(80 * 256, line), nn.ELU(), nn.Linear(line, line), nn.ELU())
        # A copy of a scripted encoder, made where gradients are recorded, has parameters that are no leaves: `requires_grad_` fails there.
        self.bottom = torch.jit.script(nn.Sequential(
            nn.Conv1d(2, channels, 8, 4), nn.ELU(), nn.Conv1d(channels, 2 * channels, 4), nn.ELU(), nn.Flatten(),
            nn.Linear(2 * channels * 36, line), nn.ELU(), nn.Linear(line, line), nn.ELU()))
        self.screen = torch.jit.script(nn.Sequential(
            nn.Conv2d(3, channels, 8, 6), nn.ELU(), nn.Conv2d(channels, 2 * channels, 4, 2), nn.ELU(),
            nn.Conv2d(2 * channels, 4 * channels, 3, 2), nn.ELU(), nn.Conv2d(4 * channels, 4 * channels, 3, 1), nn.ELU(), nn.Flatten(),
            nn.Linear(4 * channels, screen), nn.ELU()))
        inputs = 2 * line + screen + (action_dim if use_prev_action else 0)
        self.rnn = nn.LSTM(inputs, rnn_hidden_dim, num_layers=rnn_layers, dropout=rnn_dropout, batch_first=True)

    def _encode(self, inputs: Batch) -> torch.Tensor:
        chars, screen = inputs["tty_chars"], inputs["screen_image"]
        B, T = chars.shape[:2]

        def rows(x: torch.Tensor) -> torch.Tensor:
            """[B, T, ...] -> [B * T, ...]. A view, as there: a slice in time of a float batch is not copied by `float`, and fails."""
            return x.to(torch.float, memory_format=torch.contiguous_format).view(B * T, *x.shape[2:])

        top = F.one_hot(rows(chars[..., 0, :]).long(), 256).flatten(1).float()                # [B*T, 80*256]
        bottom = rows(chars[..., -2:, :]).flatten(1)                                         # [B*T, 160]
        digits = ((bottom >= 45) & (bottom <= 57)) * (bottom - 47) / 10
        bottom = torch.stack([(bottom - 32) / 96, digits], dim=1)                            # [B*T, 2, 160]
        screen = rows(screen) / 255.0
        parts = [self.topline(top), self.bottom(bottom), self.screen(screen)]
        if self.use_prev_action:
            parts.append(F.one_hot(inputs["prev_actions"], self.num_actions).view(B * T, -1))
        return torch.cat(parts, dim=-1).view(B, T, -1)

    def _compute(self, inputs: Batch, state: Optional[Tuple[torch.Tensor, ...]]) -> Encoded:
        return self.rnn(self._encode(inputs), None if state is None else tuple(state))

    def forward(self, inputs: Batch, state: Optional[Tuple[torch.Tensor, ...]] = None) -> Encoded:
        device = inputs["tty_chars"].device.type
        if device != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self._compute(inputs, state)
        # A CPU has no float16 LSTM, so the sums are done in float32. The rest is as on the benchmark's GPU: weights rounded, the
        # encoders' once for all calls (autocast does not keep an LSTM's), and outputs and states in half precision.
        dtype = torch.get_autocast_dtype("cpu")
        weights = {name: parameter.to(dtype).float() if name.startswith("rnn.") else CASTS.cast(parameter, dtype)
                   for name, parameter in self.named_parameters()}
        with torch.autocast("cpu", enabled=False):
            state = None if state is None else tuple(s.float() for s in state)
            output, (h, c) = torch.func.functional_call(_Compute(self), {f"backbone.{k}": v for k, v in weights.items()}, (inputs, state))
        return output.to(dtype), (h.to(dtype), c.to(dtype))


class _Compute(nn.Module):
    """`ModelBackbone._compute` as a module, which is what can be called with other weights than its own."""

    def __init__(self, backbone: ModelBackbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Batch, state: Any) -> Encoded:
        return self.backbone._compute(inputs, state)


class CastCache:
    """Autocast's memory of half precision weights, as PyTorch had it until the end of 2025.

    Inside an autocast block a weight is cast once and the result used again. If the first use was without gradient (a burn-in, say), so
    is the result, and every later use in the same block silently trains nothing (pytorch issues 65766 and 112583, repaired by pull request
    165068). The benchmark's PyTorch is older than that, and ours is not: hence this imitation. What helps there, helps here: with gradient
    first, `torch.clear_autocast_cache()`, or autocast with `cache_enabled=False`.
    """

    def __init__(self) -> None:
        self.casts: Dict[int, Tuple[torch.Tensor, torch.Tensor]] = {}

    def cast(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not torch.is_autocast_cache_enabled():
            return parameter.to(dtype).float()
        if id(parameter) not in self.casts:
            self.casts[id(parameter)] = (parameter, parameter.to(dtype).float())  # kept, so that its id stays its own
        return self.casts[id(parameter)][1]

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """One autocast block: the memory is empty before and after it, and when `torch.clear_autocast_cache` is called."""
        clear = torch.clear_autocast_cache

        def clear_both() -> None:
            self.casts.clear()
            clear()

        self.casts.clear()
        torch.clear_autocast_cache = clear_both
        try:
            yield
        finally:
            torch.clear_autocast_cache = clear
            self.casts.clear()


CASTS = CastCache()


class RewardScaler:
    """Rewards over the root mean square of their discounted running sums, clipped.

    The sums run over batches for each place in the chunk, not along the chunk: the benchmark has it so.
    """

    def __init__(self, gamma: float, clip_range: float):
        self.gamma, self.clip_range = gamma, clip_range
        self.running: Any = 0.0
        self.sum_squares, self.count = 0.0, 0

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        self.running = self.running * self.gamma + rewards
        self.sum_squares += float((self.running ** 2).sum())
        self.count += rewards.size
        self.running = self.running * ~dones
        scale = max(0.01, (self.sum_squares / self.count) ** 0.5)
        return np.clip(rewards / scale, -self.clip_range, self.clip_range)


def made_up_frames(rng: np.random.Generator, *lead: int) -> Dict[str, np.ndarray]:
    """Observations of noise, each [*lead, ...], with the keys, shapes and dtypes that the benchmark has."""
    cursor = np.stack([rng.integers(0, 24, lead), rng.integers(0, 80, lead)], axis=-1)
    return {
        "tty_chars": rng.integers(32, 127, (*lead, 24, 80)).astype(np.uint8),
        "tty_colors": rng.integers(0, 32, (*lead, 24, 80)).astype(np.int8),
        "tty_cursor": cursor.astype(np.uint8),
        "screen_image": rng.integers(0, 256, (*lead, *SCREEN_SHAPE)).astype(np.uint8),
    }


def made_up_batches(config: TrainConfig, seed: int, game_end: float = 0.15,
                    num_actions: int = NUM_ACTIONS) -> Iterator[Dict[str, np.ndarray]]:
    """Batches [B, seq_len + 1, ...] as the benchmark's buffer gives them: each begins with the step that ended the one before.

    Games end anywhere (with probability `game_end` a step, so also at once, and at a chunk's first and last step) and the next one
    follows without a gap. Rewards are raw: 0 on most steps.
    """
    rng = np.random.default_rng(seed)
    B, T = config.batch_size, config.seq_len

    def steps(count: int) -> Dict[str, np.ndarray]:
        data = made_up_frames(rng, B, count)
        data["actions"] = rng.integers(0, num_actions, (B, count))
        data["rewards"] = rng.integers(1, 50, (B, count)) * (rng.random((B, count)) < 0.2) * 1.0
        data["dones"] = rng.random((B, count)) < game_end
        return data

    batch = steps(T + 1)
    while True:
        yield {k: v.copy() for k, v in batch.items()}
        fresh = steps(T)
        batch = {k: np.concatenate([batch[k][:, -1:], fresh[k]], axis=1) for k in batch}


def to_float(batch: Dict[str, np.ndarray], device: str) -> Batch:
    """Everything becomes float32 in the benchmark, actions and game ends included."""
    return {k: torch.as_tensor(v, dtype=torch.float, device=device) for k, v in batch.items()}


def metrics_line(step: int, info: Dict[str, Any]) -> str:
    """What the benchmark prints of every 1,000th step; here it is made at each step, to see whether it can be."""
    values = {name: value.item() if hasattr(value, "item") else value for name, value in info.items()}
    return " ".join([f"TRAIN_METRICS step={step}"] + [f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()])


def run_training(algo: Any, config: TrainConfig, batches: Iterator[Dict[str, np.ndarray]], steps: int, device: str = "cpu",
                 autocast: Optional[torch.dtype] = None, scale_rewards: bool = True,
                 on_step: Optional[Callable[..., None]] = None) -> None:
    """The benchmark's training loop. `autocast` is the half precision dtype, or None for float32.

    `on_step(step, batch, before, loss, states, info)` sees what each step gives back; `before` is a copy of the batch as the block got it.
    """
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=autocast is torch.float16)
    named = list(algo.model.named_parameters())
    assert all(parameter.requires_grad for _, parameter in named), "the weight-decay split asserts a gradient of every parameter"
    groups: Dict[bool, List[nn.Parameter]] = {True: [], False: []}  # with weight decay and without
    for name, parameter in named:
        groups["weight" in name and "norm" not in name and "bn" not in name].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[False], "weight_decay": 0.0},
                                   {"params": groups[True], "weight_decay": config.weight_decay}], lr=config.learning_rate)
    rewards = RewardScaler(config.gamma, config.clip_range)
    # The first is 0, which is a real action (north).
    prev_actions = torch.zeros((config.batch_size, 1), dtype=torch.long, device=device)
    states: States = {}
    for step in range(1, steps + 1):
        data = next(batches)
        if scale_rewards:
            data["rewards"] = rewards(data["rewards"], data["dones"])
        batch = to_float(data, device)
        before = {k: v.clone() for k, v in batch.items()}
        half = torch.autocast(kind, dtype=autocast) if autocast is not None else contextlib.nullcontext()
        with CASTS.block(), half:
            loss, states, info = algo.train_step(batch, prev_actions, states)
        prev_actions = before["actions"][:, -2:-1].long()
        if on_step is not None:
            on_step(step, batch, before, loss, states, info)
        scaler.scale(loss).backward()
        if config.clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(algo.parameters(), config.clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        algo.after_gradient_step()
        line = metrics_line(step, info)
        if step % 1000 == 0:
            print(line, flush=True)


@torch.no_grad()
def run_acting(model: Any, ticks: int, slots: int = 14, seed: int = 0, device: str = "cpu",
               overwritten: bool = True) -> List[np.ndarray]:
    """The benchmark's evaluation, the game replaced by noise: the actions of each tick, exactly as `vec_act` returned them.

    As there: the previous action is a float 0 and the state None at first; neither is ever cleared; and the arrays of `obs`
    are shared memory which the next tick overwrites (not `overwritten`: new arrays at each tick, to compare with).
    """
    rng = np.random.default_rng(seed)
    model.eval()
    obs = made_up_frames(rng, slots)
    shared = dict(obs)
    obs["prev_actions"] = np.zeros(slots, dtype=float)
    state: Any = None
    taken = []
    for _ in range(ticks):
        actions, state = model.vec_act(obs, state, device=device)
        taken.append(actions)
        for key, value in made_up_frames(rng, slots).items():
            shared[key] = shared[key] if overwritten else value
            shared[key][...] = value
        obs = {**shared, "prev_actions": actions}
    model.train()
    return taken
