"""Ours, seeing only what Katakomba's references see: a crop round the cursor, the message line and the status lines. Every other
cell of the screen is made blank before the backbone looks at it."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

import custom_nethack_pomdp as ours

HALF = ours.ScreenEncoder.CROP // 2


def blank_outside(inputs: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """tty_chars, tty_colors [B, T, 24, 80], tty_cursor [B, T, 2] -> the same, blank where a crop would not look."""
    row, column = inputs["tty_cursor"].long()[..., None, None].unbind(2)  # [B, T, 1, 1]
    rows = torch.arange(ours.ROWS, device=row.device)[:, None]
    columns = torch.arange(ours.COLS, device=row.device)[None]
    seen = ((rows - row).abs() <= HALF) & ((columns - column).abs() <= HALF) | (rows == 0) | (rows >= ours.ROWS - 2)
    return {**inputs, "tty_chars": torch.where(seen, inputs["tty_chars"], ours.SPACE), "tty_colors": inputs["tty_colors"] * seen}


class Model(ours.Model):
    """Acts on what is left of the screen."""

    def forward(self, inputs: Dict[str, torch.Tensor], state: Optional[Tuple[torch.Tensor, torch.Tensor]] = None) -> Tuple[Any, ...]:
        return super().forward(blank_outside(inputs), state)


class OfflineAlgorithm(ours.OfflineAlgorithm):
    """Learns from what is left of the screen."""

    def __init__(self, backbone: nn.Module, config: Any, device: str) -> None:
        super().__init__(backbone, config, device)
        self.model = Model(backbone, self.hyper.head_dim, self.hyper.temperature).to(device)

    def _run(self, inputs: Dict[str, torch.Tensor], resets: Optional[torch.Tensor], state: Any,
             cuts: Sequence[int]) -> Tuple[torch.Tensor, List[Any]]:  # fmt: skip
        return super()._run(blank_outside(inputs), resets, state, cuts)
