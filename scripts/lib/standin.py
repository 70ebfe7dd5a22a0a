# SPDX-License-Identifier: MIT
"""A stand-in for the benchmark's own file, to run an EDITABLE block in. No command of its own.

The benchmark (MLS-Bench, task rl-offline-pomdp) copies one block over the same block of its file,
which is built on Katakomba's recurrent scripts, under Python 3.8 and torch 2.0.1. The stand-in
follows that file in our own code: the names around the block, a backbone that views its inputs and
has two scripted encoders, batches of 128 x 16 float tensors that overlap by one step, rewards
scaled by a running RMS, mixed precision with a GradScaler, states carried from batch to batch and
never cleared, and 14 slots in evaluation. Its games are noise. Axes: B batch, T time, N games.
"""

import importlib.util
import os
import re
import sys
import traceback
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple
from unittest import mock

import numpy as np
import torch
from torch import nn

DEFAULT_FILE = Path(__file__).resolve().parents[2] / "custom_nethack_pomdp.py"
EXPORT_MARK = (
    "# An exported block. Written by scripts/check_submission.py --export, which may overwrite "
    "this file.\n"
)
NUM_ACTIONS = 121
SCREEN_SHAPE = (3, 108, 108)  # an 18 x 18 crop round the cursor, 6 x 6 pixels a cell
SLOTS = 14  # games at a time in the benchmark's evaluation

Batch = Dict[str, torch.Tensor]
Arrays = Dict[str, np.ndarray]


# --- What surrounds the block
DEFAULTS = {
    "character": "mon-hum-neu",
    "data_mode": "in_memory",
    "update_steps": 100_000,
    "batch_size": 128,
    "seq_len": 16,
    "project": "NetHack",
    "group": "custom-nethack-pomdp",
    "name": "custom",
    "version": 0,
    "checkpoints_path": None,
    "rnn_hidden_dim": 2048,
    "rnn_layers": 2,
    "use_prev_action": True,
    "rnn_dropout": 0.0,
    "clip_range": 10.0,
    "tau": 0.005,
    "gamma": 0.999,
    "learning_rate": 3e-4,
    "weight_decay": 0.0,
    "clip_grad_norm": None,
    "train_seed": 42,
    "eval_seed": 50,
    "eval_every": 10_000,
    "eval_episodes": 50,
    "eval_processes": 14,
    "render_processes": 14,
}
# The benchmark's fields and defaults, and no others: a block that reads any other from `config`
# fails there.
FIELDS = [(name, Any, field(default=value)) for name, value in DEFAULTS.items()]
TrainConfig: Any = make_dataclass("TrainConfig", FIELDS)


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    for old, new in zip(target.parameters(), source.parameters()):
        old.lerp_(new, tau)


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    return torch.mean(torch.abs(tau - (u < 0).float()) * u.square())


# Autocast's memory, as PyTorch had it until the end of 2025: a weight is cast once. If its first
# use was without gradient (a burn-in, say), so is the result, and every later use silently trains
# nothing (pytorch issues 65766, 112583). The benchmark's PyTorch is older, ours is not: hence this
# note of each backbone's first use.
CASTS: Dict[int, bool] = {}


class ModelBackbone(nn.Module):
    """Encoders of the top line, the bottom two lines, the picture and the previous action, into an
    LSTM.

    `prev_actions` [B, T] are one-hot over exactly `action_dim` classes: an index outside of them
    and a dtype other than int64 are errors. `width` divides Katakomba's sizes of the encoders, for
    fast checks.
    """

    def __init__(
        self, action_dim: int, rnn_hidden_dim: int = 2048, rnn_layers: int = 2, width: int = 1
    ) -> None:
        super().__init__()
        self.num_actions = action_dim
        self.rnn_hidden_dim = rnn_hidden_dim
        line = 128 // width
        screen = 512 // width
        c = 32 // width

        def layer(kind: Any, *sizes: int) -> List[nn.Module]:
            return [kind(*sizes), nn.ELU()]

        self.topline = nn.Sequential(
            *layer(nn.Linear, 80 * 256, line), *layer(nn.Linear, line, line)
        )
        lines = [*layer(nn.Conv1d, 2, c, 8, 4), *layer(nn.Conv1d, c, 2 * c, 4), nn.Flatten()]
        lines += [*layer(nn.Linear, 2 * c * 36, line), *layer(nn.Linear, line, line)]
        pixels = [*layer(nn.Conv2d, 3, c, 8, 6), *layer(nn.Conv2d, c, 2 * c, 4, 2)]
        pixels += [
            *layer(nn.Conv2d, 2 * c, 4 * c, 3, 2),
            *layer(nn.Conv2d, 4 * c, 4 * c, 3, 1),
            nn.Flatten(),
        ]
        # Scripted, as there: a copy made where gradients are recorded has parameters that are no
        # leaves.
        self.bottom = torch.jit.script(nn.Sequential(*lines))
        self.screen = torch.jit.script(nn.Sequential(*pixels, *layer(nn.Linear, 4 * c, screen)))
        self.rnn = nn.LSTM(
            2 * line + screen + action_dim, rnn_hidden_dim, rnn_layers, batch_first=True
        )

    def _encode(self, inputs: Batch) -> torch.Tensor:
        chars = inputs["tty_chars"]
        B, T = chars.shape[:2]

        def rows(x: torch.Tensor) -> torch.Tensor:
            """[B, T, ...] -> [B * T, ...], a view: a slice in time of a float batch is not copied
            before, and fails."""
            x = x.to(torch.float, memory_format=torch.contiguous_format)
            return x.view(B * T, *x.shape[2:])

        # [B*T, 80*256]
        top = nn.functional.one_hot(rows(chars[..., 0, :]).long(), 256).flatten(1).float()
        bottom = rows(chars[..., -2:, :]).flatten(1)  # [B*T, 160]
        digits = ((bottom >= 45) & (bottom <= 57)) * (bottom - 47) / 10
        bottom = torch.stack([(bottom - 32) / 96, digits], dim=1)  # [B*T, 2, 160]
        screen = self.screen(rows(inputs["screen_image"]) / 255.0)
        previous = nn.functional.one_hot(inputs["prev_actions"], self.num_actions)
        parts = [self.topline(top), self.bottom(bottom), screen, previous.view(B * T, -1)]
        return torch.cat(parts, dim=-1).view(B, T, -1)

    def forward(self, inputs: Batch, state: Any = None) -> Tuple[torch.Tensor, Any]:
        if inputs["tty_chars"].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.rnn(self._encode(inputs), state)
        # A CPU has no float16 LSTM: sums in float32, the rest as on the benchmark's GPU, outputs
        # and states in half precision and encoders' weights cast once for all calls (autocast does
        # not keep an LSTM's).
        dtype = torch.get_autocast_dtype("cpu")
        gradient = torch.is_grad_enabled()
        if state is not None:
            state = tuple(part.float() for part in state)
        if torch.is_autocast_cache_enabled():
            gradient = CASTS.setdefault(id(self), gradient) and gradient
        with torch.autocast("cpu", enabled=False):
            with torch.set_grad_enabled(gradient):
                encoded = self._encode(inputs)
            output, state = self.rnn(encoded, state)
        return output.to(dtype), tuple(part.to(dtype) for part in state)


# What the block may use without defining or importing it: what the benchmark's file has, but for
# logging and progress.
PROVIDED: Dict[str, Any] = {}
IMPORTS = """
import os, random, sys, uuid
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Tuple
from torch.distributions import Categorical
DEVICE, LSTM_HIDDEN, UPDATE_INFO = "cpu", Tuple[torch.Tensor, torch.Tensor], Dict[str, Any]
"""
exec(IMPORTS, PROVIDED)
for part in (TrainConfig, ModelBackbone, soft_update, asymmetric_l2_loss):
    PROVIDED[part.__name__] = part


def made_up_frames(rng: np.random.Generator, *lead: int) -> Arrays:
    """Observations of noise, each [*lead, ...], with the benchmark's keys, shapes and dtypes. Only
    the status lines can be read: a character's in turn 1 or 2, so that new games are seen to begin.
    """
    chars = rng.integers(32, 127, (*lead, 24, 80)).astype(np.uint8)
    who = "Agent St:18 Dx:12 Co:17 In:8 Wi:9 Ch:10"
    status = "".join(f"{who:80}Dlvl:1 T:{turn:<71}" for turn in (1, 2)).encode()
    chars[..., 22:, :] = np.array(list(status)).reshape(2, 2, 80)[rng.integers(0, 2, lead)]
    return {
        "tty_chars": chars,
        "tty_colors": rng.integers(0, 32, (*lead, 24, 80)).astype(np.int8),
        "tty_cursor": rng.integers(0, (24, 80), (*lead, 2)).astype(np.uint8),
        "screen_image": rng.integers(0, 256, (*lead, *SCREEN_SHAPE)).astype(np.uint8),
    }


def overlapping(steps: Callable[[int], Arrays], seq_len: int) -> Iterator[Arrays]:
    """Batches [B, seq_len + 1, ...] as the benchmark's buffer gives them: each begins with the step
    that ended the one before. `steps(n)`: the next n of them, [B, n, ...]."""
    batch = steps(seq_len + 1)
    while True:
        yield {name: value.copy() for name, value in batch.items()}
        fresh = steps(seq_len)
        batch = {name: np.concatenate([batch[name][:, -1:], fresh[name]], axis=1) for name in batch}


def made_up_batches(config: Any, seed: int, game_end: float = 0.15) -> Iterator[Arrays]:
    """Noise. A game ends with probability `game_end` a step, so also at once, and at a chunk's
    first and last step."""
    rng = np.random.default_rng(seed)

    def steps(count: int) -> Arrays:
        shape = (config.batch_size, count)
        rewards = rng.integers(1, 50, shape) * (rng.random(shape) < 0.2) * 1.0
        actions = rng.integers(0, NUM_ACTIONS, shape)
        dones = rng.random(shape) < game_end
        return {
            **made_up_frames(rng, *shape),
            "actions": actions,
            "rewards": rewards,
            "dones": dones,
        }

    return overlapping(steps, config.seq_len)


def run_training(
    algo: Any, config: Any, batches: Any, steps: int, dtype: Any = None, on_step: Any = None
) -> None:
    """The benchmark's training loop. `dtype` is that of autocast, or None for float32;
    `on_step(step, batch, before, loss, states, info)` sees each step with its gradients, and in
    `before` a copy of the batch as the block got it."""
    device = next(algo.model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    others: Dict[str, Any] = {"params": [], "weight_decay": 0.0}
    decayed: Dict[str, Any] = {"params": [], "weight_decay": config.weight_decay}
    for name, parameter in algo.model.named_parameters():
        assert parameter.requires_grad, (
            "the weight-decay split asserts a gradient of every parameter"
        )
        group = others
        if "weight" in name and "norm" not in name and "bn" not in name:
            group = decayed
        group["params"].append(parameter)
    optimizer = torch.optim.AdamW([others, decayed], lr=config.learning_rate)
    # discounted sums of rewards: over batches for each place in the chunk, as there, not along it
    running: Any = 0.0
    squares = 0.0
    count = 0
    # 0 is a real action (north)
    prev_actions = torch.zeros((config.batch_size, 1), dtype=torch.long, device=device)
    states: Dict[str, Any] = {}
    for step in range(1, steps + 1):
        data = next(batches)
        running = running * config.gamma + data["rewards"]
        squares += float((running**2).sum())
        count += running.size
        running = running * ~data["dones"]
        data["rewards"] = data["rewards"] / max(0.01, (squares / count) ** 0.5)
        data["rewards"] = np.clip(data["rewards"], -config.clip_range, config.clip_range)
        batch = {}
        before = {}
        for name, value in data.items():
            batch[name] = torch.as_tensor(value, dtype=torch.float, device=device)
            before[name] = batch[name].clone()
        CASTS.clear()
        half = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with mock.patch.object(torch, "clear_autocast_cache", CASTS.clear), half:
            loss, states, info = algo.train_step(batch, prev_actions, states)
        prev_actions = before["actions"][:, -2:-1].long()
        scaler.scale(loss).backward()
        if on_step is not None:
            on_step(step, batch, before, loss, states, info)
        if config.clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(algo.model.parameters(), config.clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        algo.after_gradient_step()
        # There every 1,000th step, for the line of metrics.
        for value in info.values():
            if hasattr(value, "item"):
                value.item()


@torch.no_grad()
def run_acting(model: Any, ticks: int, overwritten: bool = True) -> List[Any]:
    """The benchmark's evaluation, of noise: each tick's actions as `vec_act` gave them. As there,
    the first previous action is a float 0 and the state None, neither is ever cleared, and the
    arrays of `obs` are overwritten by the next tick (not `overwritten`: new ones at each tick, to
    compare with)."""
    rng = np.random.default_rng(0)
    model.eval()
    shared = made_up_frames(rng, SLOTS)
    state = None
    taken = []
    actions: Any = np.zeros(SLOTS, dtype=float)
    for _ in range(ticks):
        actions, state = model.vec_act({**shared, "prev_actions": actions}, state, device="cpu")
        taken.append(actions)
        for name, value in made_up_frames(rng, SLOTS).items():
            if overwritten:
                shared[name][...] = value
            else:
                shared[name] = value
    model.train()
    return taken


# --- Taking the block out
BANNER = r"(?m)^(?:# =+\n)?# =+ +EDITABLE (BEGIN|END) +=+\n(?:# =+\n)?"


class Block(NamedTuple):
    path: str
    source: str
    first_line: int = 1  # of the block in the file
    whole_file: bool = False  # the file has banners and more around them


def read_block(path: Any) -> Block:
    """The block between a file's two banners, or all of it where it is a bare block; ValueError
    where it is neither."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    banners = list(re.finditer(BANNER, text))
    lines = [text[: banner.end()].count("\n") for banner in banners]
    words = [banner.group(1) for banner in banners]
    if words == ["BEGIN", "END"]:
        source = text[banners[0].end() : banners[1].start()]
        return Block(str(path), source, lines[0] + 1, True)
    if banners:
        told = "there must be a banner EDITABLE BEGIN and then one EDITABLE END; there is "
        found = map("{} in line {}".format, words, lines)
        raise ValueError(f"{path}: {told}{', '.join(found)}")
    for name in ("Model", "OfflineAlgorithm"):
        if not re.search(rf"(?m)^class {name}\b", text):
            told = "neither EDITABLE banners nor a bare block, with classes Model and"
            raise ValueError(f"{path}: {told} OfflineAlgorithm")
    if text.startswith(EXPORT_MARK):
        return Block(str(path), text[len(EXPORT_MARK) :], 2)
    return Block(str(path), text)


# --- Loading it
def module_by_path(path: Any, names: Dict[str, Any]) -> Any:
    """Not registered in sys.modules: the benchmark's budget script does not register its own
    either."""
    spec = importlib.util.spec_from_file_location("_under_check", path)
    assert spec and spec.loader, "it is no .py file"
    module = importlib.util.module_from_spec(spec)
    module.__dict__.update(names)
    # a check leaves no __pycache__ beside what it checks
    with mock.patch.object(sys, "dont_write_bytecode", True):
        spec.loader.exec_module(module)
    assert "_under_check" not in sys.modules, "it registers itself in sys.modules"
    return module


def load_block(block: Block, folder: str) -> Any:
    """The block as a module, among the provided names and no others. It lies in the folder, which
    must stay while the block is in use: some code reads its own source."""
    path = Path(folder) / os.path.basename(block.path)
    before = "\n" * (block.first_line - 1)  # lines are numbered as in the file
    path.write_text(before + block.source, encoding="utf-8")
    module = module_by_path(path, PROVIDED)
    for name in ("Model", "OfflineAlgorithm"):
        assert isinstance(vars(module).get(name), type), f"it defines no class {name}"
    return module


def attempt(block: Block, check: Callable[[], Any]) -> Tuple[bool, Any]:
    """One check; whatever it raises is its result, with the innermost line of the file that it
    passed through."""
    try:
        return True, check()
    except (Exception, SystemExit) as error:  # the code under check may raise anything
        told = " ".join(str(error).split())
        if not isinstance(error, AssertionError):
            told = f"{type(error).__name__}: {told}"
        where = ""
        for frame in traceback.extract_tb(error.__traceback__):
            if os.path.basename(frame.filename) == os.path.basename(block.path):
                where = f" (line {frame.lineno})"
        return False, told + where
