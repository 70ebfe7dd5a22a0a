"""Ours without the normalisation of the LSTM's output before the head."""

from typing import Any, Tuple

import torch
import torch.nn as nn

import custom_nethack_pomdp as ours


class Model(ours.Model):
    """The head sees the LSTM's output as it comes, which is tiny at first."""

    def head(self, core_output: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        shared = self.shared(core_output)
        return self.policy(shared).float(), self.value(shared).float().squeeze(-1)


class OfflineAlgorithm(ours.OfflineAlgorithm):
    """The same algorithm on that head."""

    def __init__(self, backbone: nn.Module, config: Any, device: str) -> None:
        super().__init__(backbone, config, device)
        self.model = Model(backbone, self.hyper.head_dim, self.hyper.temperature).to(device)
