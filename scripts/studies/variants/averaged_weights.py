"""Ours, acting (and scored on held-out games) with a running average of the weights instead of the last ones (Polyak averaging):
w' = r w' + (1 - r) w with r = (1 + n) / (10 + n) after n updates, an average over about the last tenth of them, however many."""

from typing import Any, Dict, Tuple

import torch
import torch.nn as nn

import custom_nethack_pomdp as ours


class Model(ours.Model):
    """Keeps the average in buffers, so that it is saved with the weights; without gradient it runs on the average."""

    def __init__(self, backbone: nn.Module, head_dim: int = ours.AWRConfig.head_dim, temperature: float = 1.0) -> None:
        super().__init__(backbone, head_dim, temperature)
        for name, parameter in self.named_parameters():
            self.register_buffer(self.place(name), parameter.detach().clone())

    @staticmethod
    def place(name: str) -> str:
        return "average_" + name.replace(".", "_")  # buffers' names have no dots

    @torch.no_grad()
    def update_average(self, updates: int) -> None:
        rate = (1.0 + updates) / (10.0 + updates)
        for name, parameter in self.named_parameters():
            self.get_buffer(self.place(name)).lerp_(parameter, 1.0 - rate)

    def swap(self) -> None:
        """Exchanges the weights and their average."""
        for name, parameter in self.named_parameters():
            average = self.get_buffer(self.place(name))
            parameter.data, average.data = average.data, parameter.data

    def vec_act(self, *arguments: Any, **named: Any) -> Any:
        self.swap()
        try:
            return super().vec_act(*arguments, **named)
        finally:
            self.swap()


class OfflineAlgorithm(ours.OfflineAlgorithm):
    """Ours, with the average brought up to date after each update."""

    def __init__(self, backbone: nn.Module, config: Any, device: str) -> None:
        super().__init__(backbone, config, device)
        self.model = Model(backbone, self.hyper.head_dim, self.hyper.temperature).to(device)
        self.updates = 0

    def state_dict(self) -> Dict[str, torch.Tensor]:
        return {**super().state_dict(), "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self.updates = int(state["updates"])

    def train_step(self, batch: Dict[str, torch.Tensor], prev_actions: torch.Tensor, rnn_states: Dict[str, Any]) -> Tuple[Any, ...]:
        if torch.is_grad_enabled():
            return super().train_step(batch, prev_actions, rnn_states)
        self.model.swap()  # held-out games are scored as they would be played
        try:
            return super().train_step(batch, prev_actions, rnn_states)
        finally:
            self.model.swap()

    def after_gradient_step(self) -> None:
        self.updates += 1
        self.model.update_average(self.updates)
