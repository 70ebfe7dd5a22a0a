# SPDX-License-Identifier: MIT
"""Ours with a value that cannot tell who plays: it reads turn, hit points and depth alone.

Where several players' games are learned from, the LSTM may see who plays. A value that knows it
expects much of the better player, and none of his actions looks better than expected. This one sees
a Monk at turn 900 with all his hit points, whoever he is: what the better player does there has the
higher advantage. Returns are exact (lambda 1, to the game's end): a shorter one ends in this very
value, which is the same for all players.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import torch
from torch import Tensor, nn

import custom_nethack_pomdp as ours
from custom_nethack_pomdp import nethack

sys.path.append(str(Path(__file__).resolve().parents[2] / "lib"))
from exact_returns import exact_returns

NUMBERS = 5


def status_numbers(blstats: Tensor) -> Tensor:
    """[..., 27] int -> [..., NUMBERS] float32 of about unit size; the last: a menu hides them."""
    stats = blstats.float().unbind(-1)
    hp_max = stats[nethack.NLE_BL_HPMAX]
    numbers = [
        stats[nethack.NLE_BL_HP] / hp_max.clamp(min=1),
        stats[nethack.NLE_BL_DEPTH] / 10.0,
        stats[nethack.NLE_BL_TIME] / 5_000.0,
        ours.log_scaled(stats[nethack.NLE_BL_TIME], 10.0),
        (hp_max == 0).float(),
    ]
    return torch.stack(numbers, dim=-1)


class LoaderWithReturns(ours.ChunkLoader):
    """With `returns` [B, T + 1] float32 in every batch: exact discounted returns."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.shapes["returns"] = (np.float32,)
        self.returns_of = lru_cache(maxsize=2 * self.batch_size)(self._returns)

    def _returns(self, store: Any, number: int) -> np.ndarray:
        return exact_returns(self.rewards_of(store, number), self.config.gamma)

    def _fill_row(self, batch: Any, row: int, game: int, first: int) -> None:
        super()._fill_row(batch, row, game, first)
        returns = self.returns_of(*self.games.in_store[game])[first:]
        filled = returns[: self.config.seq_len + 1]
        batch["returns"][row, : len(filled)] = filled


class Model(ours.Model):
    numbers: Any = None  # [B, T + 1, NUMBERS] of the batch; acting needs no value

    def __init__(self, backbone: Any, hyper: Any = None) -> None:
        super().__init__(backbone, hyper)
        self.blind = nn.Sequential(nn.Linear(NUMBERS, 32), nn.ReLU(), nn.Linear(32, 1))

    def head(self, core_output: Tensor, tty_chars: Tensor) -> Tuple[Tensor, Tensor]:
        logits, values = super().head(core_output, tty_chars)
        if self.numbers is not None:  # in place of ours, which learns nothing
            with torch.autocast(core_output.device.type, enabled=False):
                values = self.blind(self.numbers).squeeze(-1)
        return logits, values


class OfflineAlgorithm(ours.OfflineAlgorithm):
    model_class = Model
    model: Model

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # A run makes its loaders after its algorithm.
        ours.ChunkLoader = LoaderWithReturns  # type: ignore[misc]

    def train_step(self, batch: Dict[str, Tensor], prev_actions: Tensor, rnn_states: Any) -> Any:
        self.returns = batch["returns"][:, :-1]
        model = self.model.current_model()
        model.numbers = status_numbers(batch["blstats"])
        result = super().train_step(batch, prev_actions, rnn_states)
        model.numbers = None
        return result

    def _targets(self, rewards: Tensor, dones: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return self.returns
