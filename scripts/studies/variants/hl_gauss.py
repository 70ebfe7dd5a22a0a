# SPDX-License-Identifier: MIT
"""Ours with the value as classes over bins instead of a scalar (HL-Gauss, arXiv 2403.03950, section
3): cross-entropy to a Gaussian around the target; the value is the expectation over the bins'
centres. Head: 266,811 parameters."""

from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_nethack_pomdp as ours

BINS, LOW, HIGH = 51, -5.0, 10.0  # scaled returns have root mean square 1
SIGMA = 0.75 * (HIGH - LOW) / BINS  # of the Gaussian: 0.75 bins (section 4.1 there)


def target_bins(targets: Tensor) -> Tensor:
    """Targets [...] -> probabilities [..., BINS] of a Gaussian of width SIGMA around them, within
    the bins' range."""
    edges = torch.linspace(LOW, HIGH, BINS + 1, device=targets.device)
    below = torch.special.ndtr((edges - targets.clamp(LOW, HIGH)[..., None]) / SIGMA)
    return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])


class Model(ours.Model):
    def __init__(self, backbone: Any, hyper: Any = None) -> None:
        super().__init__(backbone, hyper)
        self.value = nn.Linear(self.hyper.head_dim, BINS)

    def head(self, core_output: Tensor, tty_chars: Tensor) -> Tuple[Tensor, Tensor]:
        shared = self.shared(F.layer_norm(core_output.float(), core_output.shape[-1:]))
        self.bin_logits = self.value(shared).float()  # kept for the loss
        centres = LOW + (torch.arange(BINS, device=shared.device) + 0.5) * (HIGH - LOW) / BINS
        logits = self.policy(shared) + self.named(shared) * ours.prompt_options(
            tty_chars, self.keys
        )
        return logits.float(), self.bin_logits.softmax(-1) @ centres


class OfflineAlgorithm(ours.OfflineAlgorithm):
    model_class = Model
    model: Model

    def _value_loss(self, values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        log_probs = F.log_softmax(self.model.current_model().bin_logits[:, :-1], dim=-1)
        return ours.masked_mean(-(target_bins(targets) * log_probs).sum(-1), mask)
