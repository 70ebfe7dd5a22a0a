# SPDX-License-Identifier: MIT
"""Implicit Q-learning, the strongest of the benchmark's references (Kostrikov et al., arXiv
2110.06169, equations 5-7).

    L_V  = E[ |0.8 - 1(u < 0)| u^2 ],         u = min_i Q_i,target(s, a) - V(s)
    L_Q  = E[ (Q_i(s, a) - y)^2 ], mean over i,  y = r + gamma (1 - done) V(s')
    L_pi = E[ -exp(u) log pi(a | s) ]

The policy, V and the Q_i are linear in the LSTM's output, the Q_i in the one-hot action too. As the
benchmark has it: the target network follows with tau; V(s') is the online network's, in a stream of
its own over the next frames; it acts by argmax; the three recurrent states run on from one game to
the next. One thing differs: exp(u) is held at 100, as in the authors' code; the benchmark holds u
at 100, whose exponential is infinite in float32. Run it with `--submission
scripts/references/iql.py`. Axes as in the main file.
"""

import math
from copy import deepcopy
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ours, or the benchmark's
OBSERVATIONS = ("tty_chars", "tty_colors", "tty_cursor", "blstats", "screen_image")
EXPECTILE, MAX_WEIGHT = 0.8, 100.0


class Model(nn.Module):
    """The backbone and four linear layers: 254,318 parameters beyond the backbone's."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        hidden, self.num_actions = backbone.rnn_hidden_dim, backbone.num_actions
        self.policy, self.value = nn.Linear(hidden, self.num_actions), nn.Linear(hidden, 1)
        self.q1, self.q2 = (nn.Linear(hidden + self.num_actions, 1) for _ in range(2))

    def q(self, core_output: Tensor, actions: Tensor) -> Tensor:
        """[B, T, H], [B, T] -> [2, B, T]"""
        pair = torch.cat(
            [core_output, F.one_hot(actions, self.num_actions).to(core_output.dtype)], dim=-1
        )
        return torch.stack([self.q1(pair).squeeze(-1), self.q2(pair).squeeze(-1)]).float()

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
        model, states = self.model, {}

        with torch.no_grad():
            core_output, states["target"] = self.target.backbone(now, rnn_states.get("target"))
            target_q = self.target.q(core_output, actions).amin(dim=0)  # [B, T]
        core_output, states["online"] = model.backbone(now, rnn_states.get("online"))
        logits, values = (
            model.policy(core_output).float(),
            model.value(core_output).squeeze(-1).float(),
        )
        q = model.q(core_output, actions)  # [2, B, T]
        # last: autocast would use half precision weights again that were cast without gradient
        with torch.no_grad():
            core_output, states["next"] = model.backbone(after, rnn_states.get("next"))
            next_values = model.value(core_output).squeeze(-1).float()
            target = rewards + self.gamma * (1.0 - dones.float()) * next_values

        u = target_q - values
        weights = torch.exp(u.detach().clamp(max=math.log(MAX_WEIGHT)))
        nll = F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none").view_as(
            actions
        )
        each = {
            "value_loss": torch.where(u < 0, 1.0 - EXPECTILE, EXPECTILE) * u**2,
            "policy_loss": weights * nll,
        }
        each.update(
            td_loss=((q - target) ** 2).mean(dim=0),
            loss_per_action=nll,
            advantage=u,
            q_target=target,
        )
        each.update(
            accuracy=(logits.argmax(dim=-1) == actions).float(),
            weight_clipped=(weights >= MAX_WEIGHT).float(),
        )
        info = {
            name: (values * counts).sum() / counts.sum().clamp(min=1.0)
            for name, values in each.items()
        }
        loss = info["value_loss"] + info["td_loss"] + info["policy_loss"]
        states = {name: tuple(part.detach() for part in state) for name, state in states.items()}
        return (
            loss,
            states,
            {name: value.detach() for name, value in {"loss": loss, **info}.items()},
        )
