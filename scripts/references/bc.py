"""Behavioural cloning, the plainest of the benchmark's three references, under the benchmark's contract.

One linear layer on the LSTM's output gives the logits of pi(a | s_1..s_t), trained by maximum likelihood on the data's actions:

    L = -E[ log pi(a_t | s_1..s_t) ]                                      Pomerleau, "ALVINN", NeurIPS 1988

Rewards are not used. As the benchmark has it: acts by argmax, and the recurrent state runs on from one game to the next (`starts` is
not looked at).

A block by itself: it runs with `custom_nethack_pomdp.py --submission scripts/references/bc.py`.
Axes: B batch, T time, A actions, H hidden, N games. Batches hold T + 1 steps, of which the first T carry loss.
"""
from typing import Any, Dict, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NOT_OBSERVATIONS = ("actions", "rewards", "dones", "mask", "starts", "returns")


def masked_mean(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [B, T] over the frames where `counts` [B, T] is 1, and 0 where there are none."""
    assert values.shape == counts.shape, (values.shape, counts.shape)
    return (values * counts).sum() / counts.sum().clamp(min=1.0)


class Model(nn.Module):
    """The backbone and one linear layer: `num_actions * (H + 1)` parameters beyond the backbone's, 247,929 at 121 and 2048."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone
        self.policy = nn.Linear(backbone.rnn_hidden_dim, backbone.num_actions)

    def forward(self, inputs: Dict[str, torch.Tensor], state: Any = None) -> Tuple[torch.Tensor, Any]:
        """Logits [B, T, A] float32, and the new state. float32, because under autocast the layer gives half precision."""
        core_output, new_state = self.backbone(inputs, state)
        return self.policy(core_output).float(), new_state

    @torch.no_grad()
    def vec_act(self, obs: Dict[str, np.ndarray], state: Any = None, device: str = "cpu") -> Tuple[np.ndarray, Any]:
        """The most probable action of each of N games, [N] int64. `obs`: arrays [N, ...], `prev_actions` [N] among them."""
        inputs = {k: torch.as_tensor(v, device=device).unsqueeze(1) for k, v in obs.items()}  # [N, 1, ...]
        inputs["prev_actions"] = inputs["prev_actions"].long()
        logits, new_state = self(inputs, state)
        return logits[:, 0].argmax(dim=-1).cpu().numpy(), new_state


class OfflineAlgorithm:
    def __init__(self, backbone: Any, config: Any, device: str):
        self.model = Model(backbone).to(device)

    def parameters(self):
        return self.model.parameters()

    def train_step(self, batch: Dict[str, torch.Tensor], prev_actions: torch.Tensor, rnn_states: Dict[str, Any]):
        """Loss of one batch [B, T + 1, ...], the states to go on from, and metrics as detached scalar tensors."""
        actions = batch["actions"][:, :-1].long()                                            # [B, T]
        counts = batch["mask"][:, :-1].float() if "mask" in batch else torch.ones_like(actions, dtype=torch.float)
        inputs = {k: v[:, :-1].contiguous() for k, v in batch.items() if k not in NOT_OBSERVATIONS}
        inputs["prev_actions"] = torch.cat([prev_actions.long(), actions[:, :-1]], dim=1)    # [B, T]

        logits, new_state = self.model(inputs, rnn_states.get("online"))                     # [B, T, A]
        nll = F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none").view_as(actions)
        loss = masked_mean(nll, counts)
        with torch.no_grad():
            accuracy = masked_mean((logits.argmax(dim=-1) == actions).float(), counts)
        states = {"online": tuple(s.detach() for s in new_state)}
        return loss, states, {"loss": loss.detach(), "loss_per_action": loss.detach(), "accuracy": accuracy}

    def after_gradient_step(self) -> None:
        """Nothing follows a step: there is no target network."""
