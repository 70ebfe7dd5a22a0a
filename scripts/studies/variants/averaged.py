"""Ours, judged by an exponential moving average of its weights (arXiv 2310.11428): held-out games see the average, training
goes on with the weights themselves. The weights that are saved to play are not the average."""

from typing import Any, Dict, Tuple

import torch
import torch.nn as nn

import custom_nethack_pomdp as ours

DECAY = 0.99  # an update; at the few hundred updates of a small study the average spans the last hundred


class OfflineAlgorithm(ours.OfflineAlgorithm):
    """Keeps the average beside the model, so that it counts neither as a part of the head nor of the checkpointed weights."""

    def __init__(self, backbone: nn.Module, config: Any, device: str) -> None:
        super().__init__(backbone, config, device)
        self.average = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}

    def after_gradient_step(self) -> None:
        for name, weight in self.model.state_dict().items():
            self.average[name].lerp_(weight, 1.0 - DECAY)

    def state_dict(self) -> Dict[str, torch.Tensor]:
        return {**super().state_dict(), **{f"average.{name}": weight for name, weight in self.average.items()}}

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self.average = {name: state[f"average.{name}"].to(self.device) for name in self.average}

    def train_step(self, batch: Dict[str, torch.Tensor], prev_actions: torch.Tensor, rnn_states: Dict[str, Any]) -> Tuple[Any, ...]:
        if torch.is_grad_enabled():
            return super().train_step(batch, prev_actions, rnn_states)
        own = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            return super().train_step(batch, prev_actions, rnn_states)
        finally:
            self.model.load_state_dict(own)


Model = ours.Model
