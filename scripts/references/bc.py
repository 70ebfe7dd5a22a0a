# SPDX-License-Identifier: MIT
"""Behavioural cloning, the plainest of the benchmark's references (Pomerleau, "ALVINN", NeurIPS
1988).

    L = -E[ log pi(a_t | s_1..s_t) ],  pi a softmax of one linear layer on the LSTM's output

As the benchmark has it: it acts by argmax, and the recurrent state runs on from one game to the
next. Run it with `--submission scripts/references/bc.py`. Axes as in the main file.
"""

from typing import Any, Dict, List, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ours, or the benchmark's
OBSERVATIONS = ("tty_chars", "tty_colors", "tty_cursor", "blstats", "screen_image")


class Model(nn.Module):
    """The backbone and a linear layer: 247,929 parameters beyond the backbone's."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.policy = nn.Linear(backbone.rnn_hidden_dim, backbone.num_actions)

    @torch.no_grad()
    def vec_act(
        self, obs: Dict[str, np.ndarray], state: Any = None, device: str = "cpu"
    ) -> Tuple[np.ndarray, Any]:
        inputs = {
            name: torch.as_tensor(array, device=device)[:, None] for name, array in obs.items()
        }
        core_output, state = self.backbone(
            {**inputs, "prev_actions": inputs["prev_actions"].long()}, state
        )
        return self.policy(core_output[:, 0]).argmax(dim=-1).cpu().numpy(), state


class OfflineAlgorithm:
    accepts_unknown_actions = True

    def __init__(self, backbone: Any, config: Any, device: str) -> None:
        self.model = Model(backbone).to(device)

    def parameters(self) -> List[nn.Parameter]:
        return list(self.model.parameters())

    def after_gradient_step(self) -> None:
        """There is no target network."""

    def train_step(
        self, batch: Dict[str, Tensor], prev_actions: Tensor, rnn_states: Dict[str, Any]
    ) -> Tuple[Any, ...]:
        actions = batch["actions"][:, :-1].long()  # [B, T]
        known = batch.get("mask", torch.ones_like(batch["actions"]))[:, :-1] > 0
        known &= actions < self.model.backbone.num_actions
        counts = known.float()
        inputs = {name: batch[name][:, :-1].contiguous() for name in OBSERVATIONS if name in batch}
        inputs["prev_actions"] = torch.cat([prev_actions.long(), actions[:, :-1]], dim=1)
        core_output, state = self.model.backbone(inputs, rnn_states.get("online"))
        logits = self.model.policy(core_output).float()  # [B, T, A]
        actions = actions.masked_fill(~known, 0)
        nll = F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none").view_as(
            actions
        )
        correct = (logits.argmax(dim=-1) == actions).float()
        loss, accuracy = (
            (values * counts).sum() / counts.sum().clamp(min=1.0) for values in (nll, correct)
        )
        info = {"loss": loss.detach(), "loss_per_action": loss.detach(), "accuracy": accuracy}
        return loss, {"online": tuple(part.detach() for part in state)}, info
