# SPDX-License-Identifier: MIT
"""Ours, seeing only what Katakomba's references see: a crop round the cursor, the message line and
the status lines. Every other cell of the screen is made blank before the backbone looks at it."""

from typing import Any, Tuple

import torch

import custom_nethack_pomdp as ours

HALF = ours.ScreenEncoder.CROP // 2


def blank_outside(_backbone: Any, arguments: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """The backbone's inputs, with tty_chars, tty_colors [B, T, 24, 80] blank where a crop would not
    look."""
    inputs, *state = arguments
    row, column = inputs["tty_cursor"].long()[..., None, None].unbind(2)  # [B, T, 1, 1]
    rows = torch.arange(ours.ROWS, device=row.device)[:, None]
    columns = torch.arange(ours.COLS, device=row.device)
    seen = (
        ((rows - row).abs() <= HALF) & ((columns - column).abs() <= HALF)
        | (rows == 0)
        | (rows >= ours.ROWS - 2)
    )
    blank = {
        "tty_chars": inputs["tty_chars"].masked_fill(~seen, ord(" ")),
        "tty_colors": inputs["tty_colors"] * seen,
    }
    return {**inputs, **blank}, *state


class Model(ours.Model):
    def __init__(self, backbone: Any, hyper: Any = None) -> None:
        super().__init__(backbone, hyper)
        backbone.register_forward_pre_hook(blank_outside)


class OfflineAlgorithm(ours.OfflineAlgorithm):
    model_class = Model
