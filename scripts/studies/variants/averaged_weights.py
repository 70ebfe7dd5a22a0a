"""Ours, acting (and scored on held-out games) with a running average of the weights instead of the last ones (Polyak
averaging): w' = r w' + (1 - r) w with r = (1 + n) / (10 + n) after n updates, about the last tenth of them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import custom_nethack_pomdp as ours


class Model(ours.Model):
    """Keeps the average in a buffer, so that it is saved with the weights and costs no parameter."""

    average: Tensor
    updates: Tensor

    def __init__(self, backbone: Any, hyper: Any = None) -> None:
        super().__init__(backbone, hyper)
        self.register_buffer("average", parameters_to_vector(self.parameters()).detach())
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def train(self, mode: bool = True) -> "Model":
        """Between eval() and train() the weights and their average are exchanged."""
        if mode != self.training:
            latest, sizes = (
                parameters_to_vector(self.parameters()),
                [weight.numel() for weight in self.parameters()],
            )
            for weight, average in zip(self.parameters(), self.average.split(sizes)):
                weight.copy_(average.view_as(weight))
            self.average.copy_(latest)
        return super().train(mode)


class OfflineAlgorithm(ours.OfflineAlgorithm):
    model_class = Model
    model: Model

    @torch.no_grad()
    def after_gradient_step(self) -> None:
        self.model.updates += 1
        rate = (1.0 + self.model.updates) / (10.0 + self.model.updates)
        self.model.average.lerp_(parameters_to_vector(self.model.parameters()), 1.0 - rate)
