# SPDX-License-Identifier: MIT
"""Conservative Q-learning, one of the benchmark's three references (Kumar et al., arXiv 2006.04779,
equation 4).

    L = 2 E[ (Q(s, a) - y)^2 ] + E[ log sum_a' exp Q(s, a') - Q(s, a) ]
    y = r + gamma (1 - done) max_a' Q_target(s', a')

Q is one linear layer on the LSTM's output. As the benchmark has it: the 2 stands before the first
term (the paper's alpha stands before the second), the maximum is over the target network's own
values, and that network follows with tau; it acts by argmax, and each network's recurrent state
runs on from one game to the next. `loss_per_action` is the second term: what a policy that draws
from softmax(Q) would pay. Run it with `--submission scripts/references/cql.py`. Axes as in the main
file.
"""

from copy import deepcopy
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

# ours, or the benchmark's
OBSERVATIONS = ("tty_chars", "tty_colors", "tty_cursor", "blstats", "screen_image")


class Model(nn.Module):
    """The backbone and a linear layer: 247,929 parameters beyond the backbone's."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.q = nn.Linear(backbone.rnn_hidden_dim, backbone.num_actions)

    def forward(self, inputs: Dict[str, Tensor], state: Any) -> Tuple[Tensor, Any]:
        core_output, state = self.backbone(inputs, state)
        return self.q(core_output).float(), state  # [B, T, A]

    @torch.no_grad()
    def vec_act(
        self, obs: Dict[str, np.ndarray], state: Any = None, device: str = "cpu"
    ) -> Tuple[np.ndarray, Any]:
        inputs = {
            name: torch.as_tensor(array, device=device)[:, None] for name, array in obs.items()
        }
        q, state = self({**inputs, "prev_actions": inputs["prev_actions"].long()}, state)
        return q[:, 0].argmax(dim=-1).cpu().numpy(), state


class OfflineAlgorithm:
    accepts_unknown_actions = True

    def __init__(self, backbone: Any, config: Any, device: str) -> None:
        self.gamma, self.tau = config.gamma, config.tau
        self.model = Model(backbone).to(device)
        with torch.no_grad():  # or the copies of scripted encoders' weights are no leaves
            self.target = deepcopy(self.model).requires_grad_(False)

    def parameters(self) -> List[nn.Parameter]:
        return list(self.model.parameters())

    @torch.no_grad()
    def after_gradient_step(self) -> None:
        for old, new in zip(self.target.parameters(), self.model.parameters()):
            old.lerp_(new, self.tau)

    def train_step(
        self, batch: Dict[str, Tensor], prev_actions: Tensor, rnn_states: Dict[str, Any]
    ) -> Tuple[Any, ...]:
        # [B, T]
        actions, rewards, dones = (batch[name][:, :-1] for name in ("actions", "rewards", "dones"))
        actions, names = actions.long(), [name for name in OBSERVATIONS if name in batch]
        known = batch.get("mask", torch.ones_like(batch["actions"]))[:, :-1] > 0
        known &= actions < self.model.backbone.num_actions
        counts = known.float()
        now = {name: batch[name][:, :-1].contiguous() for name in names}
        now["prev_actions"] = torch.cat([prev_actions.long(), actions[:, :-1]], dim=1)
        after = {
            **{name: batch[name][:, 1:].contiguous() for name in names},
            "prev_actions": actions,
        }
        actions = actions.masked_fill(~known, 0)

        with torch.no_grad():
            next_q, target_state = self.target(after, rnn_states.get("target"))
            target = rewards + self.gamma * (1.0 - dones.float()) * next_q.amax(dim=-1)
        q, state = self.model(now, rnn_states.get("online"))
        taken = q.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # [B, T]
        each = {
            "loss_per_action": q.logsumexp(dim=-1) - taken,
            "td_loss": (taken - target) ** 2,
            "q_target": target,
        }
        each["accuracy"] = (q.argmax(dim=-1) == actions).float()
        info = {
            name: (values * counts).sum() / counts.sum().clamp(min=1.0)
            for name, values in each.items()
        }
        loss = 2.0 * info["td_loss"] + info["loss_per_action"]
        states = {"online": tuple(part.detach() for part in state), "target": target_state}
        return (
            loss,
            states,
            {name: value.detach() for name, value in {"loss": loss, **info}.items()},
        )
