"""Implicit Q-learning, the strongest of the benchmark's three references, under the benchmark's contract.

Linear layers on the LSTM's output s_t: a value V(s), a policy pi(.|s), and two action values Q_i(s, a), each linear in s and the one-hot
action together. Three losses are added up, and all of them train the backbone (Kostrikov et al., arXiv 2110.06169, equations 5 to 7):

    L_V  = E[ |tau_e - 1(u < 0)| * u^2 ],        u = min_i Q_i,target(s, a) - V(s),  tau_e = 0.8
    L_Q  = E[ (Q_i(s, a) - y)^2 ] mean over i,   y = r + gamma * (1 - done) * V(s')
    L_pi = E[ -exp(beta * u) * log pi(a | s) ],  beta = 1

As the benchmark has it: the target network follows with tau = 0.005; acts by argmax; V(s') is computed by the online network in a stream of
its own over the next observations; the three recurrent states (online, target, next) run on from one game to the next (`starts` is not looked at).

One deviation: the weight exp(beta * u) is held at 100, as in the authors' code. The benchmark's own holds u at 100 before the
exponential, which is infinite in float32 from u = 89 on.

A block by itself: it runs with `custom_nethack_pomdp.py --submission scripts/references/iql.py`.
Axes: B batch, T time, A actions, H hidden, N games. Batches hold T + 1 steps, of which the first T carry loss.
"""
import math
from copy import deepcopy
from typing import Any, Dict, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NOT_OBSERVATIONS = ("actions", "rewards", "dones", "mask", "starts", "returns")
EXPECTILE = 0.8     # tau_e above (Katakomba's setting)
TEMPERATURE = 1.0   # beta above (Katakomba's setting)
MAX_WEIGHT = 100.0  # the authors' bound on exp(beta * u)


def masked_mean(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [B, T] over the frames where `counts` [B, T] is 1, and 0 where there are none."""
    assert values.shape == counts.shape, (values.shape, counts.shape)
    return (values * counts).sum() / counts.sum().clamp(min=1.0)


def expectile_error(difference: torch.Tensor, expectile: float) -> torch.Tensor:
    """|expectile - 1(u < 0)| * u^2 for each u in `difference`, any shape."""
    return torch.where(difference < 0, 1.0 - expectile, expectile) * difference.square()


def advantage_weight(advantages: torch.Tensor, temperature: float, maximum: float) -> torch.Tensor:
    """min(exp(temperature * advantage), maximum), bounded before the exponential so that nothing overflows on the way."""
    return torch.exp((temperature * advantages).clamp(max=math.log(maximum)))


class Model(nn.Module):
    """The backbone and four linear layers: policy A * (H + 1), value H + 1, two times H + A + 1: 254,318 at A = 121 and H = 2048."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone
        hidden, self.num_actions = backbone.rnn_hidden_dim, backbone.num_actions
        self.policy = nn.Linear(hidden, self.num_actions)
        self.value = nn.Linear(hidden, 1)
        self.q1 = nn.Linear(hidden + self.num_actions, 1)
        self.q2 = nn.Linear(hidden + self.num_actions, 1)

    def action_values(self, core_output: torch.Tensor, actions: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Q_1 and Q_2 [B, T] float32 of `actions` [B, T] at `core_output` [B, T, H]."""
        one_hot = F.one_hot(actions, self.num_actions).to(core_output.dtype)
        pair = torch.cat([core_output, one_hot], dim=-1)                                     # [B, T, H + A]
        return self.q1(pair).squeeze(-1).float(), self.q2(pair).squeeze(-1).float()

    @torch.no_grad()
    def vec_act(self, obs: Dict[str, np.ndarray], state: Any = None, device: str = "cpu") -> Tuple[np.ndarray, Any]:
        """The most probable action of each of N games, [N] int64. `obs`: arrays [N, ...], `prev_actions` [N] among them."""
        inputs = {k: torch.as_tensor(v, device=device).unsqueeze(1) for k, v in obs.items()}  # [N, 1, ...]
        inputs["prev_actions"] = inputs["prev_actions"].long()
        core_output, new_state = self.backbone(inputs, state)
        return self.policy(core_output)[:, 0].argmax(dim=-1).cpu().numpy(), new_state


class OfflineAlgorithm:
    def __init__(self, backbone: Any, config: Any, device: str):
        self.gamma, self.tau = config.gamma, config.tau
        self.model = Model(backbone).to(device)
        with torch.no_grad():  # or the copies of scripted encoders' weights are no leaves
            self.target = deepcopy(self.model).requires_grad_(False)  # beside the model, not in it: it is no part of the head

    def parameters(self):
        return self.model.parameters()

    def train_step(self, batch: Dict[str, torch.Tensor], prev_actions: torch.Tensor, rnn_states: Dict[str, Any]):
        """Loss of one batch [B, T + 1, ...], the states to go on from, and metrics as detached scalar tensors."""
        actions = batch["actions"][:, :-1].long()                                            # [B, T]
        rewards, dones = batch["rewards"][:, :-1].float(), batch["dones"][:, :-1].float()    # [B, T]
        mask = batch["mask"].float() if "mask" in batch else torch.ones_like(batch["dones"], dtype=torch.float)
        counts = mask[:, :-1]
        # A TD error needs the next frame, unless the game is over: without either (a recording that breaks off) there is no target.
        has_target = counts * torch.maximum(mask[:, 1:], dones)

        observations = {k: v for k, v in batch.items() if k not in NOT_OBSERVATIONS}
        now = {k: v[:, :-1].contiguous() for k, v in observations.items()}
        now["prev_actions"] = torch.cat([prev_actions.long(), actions[:, :-1]], dim=1)       # [B, T]
        following = {k: v[:, 1:].contiguous() for k, v in observations.items()}
        following["prev_actions"] = actions

        with torch.no_grad():
            target_core, target_state = self.target.backbone(now, rnn_states.get("target"))
            target_q = torch.minimum(*self.target.action_values(target_core, actions))       # [B, T]

        core, online_state = self.model.backbone(now, rnn_states.get("online"))              # [B, T, H]
        logits, value = self.model.policy(core).float(), self.model.value(core).squeeze(-1).float()
        q1, q2 = self.model.action_values(core, actions)
        # After the pass with gradient: autocast may use its half precision weights again, and those of a pass without have none.
        with torch.no_grad():
            next_core, next_state = self.model.backbone(following, rnn_states.get("next"))
            next_value = self.model.value(next_core).squeeze(-1).float()
            td_target = rewards + self.gamma * (1.0 - dones) * next_value                    # [B, T]
        assert q1.shape == td_target.shape and value.shape == target_q.shape, (q1.shape, td_target.shape, value.shape)

        advantages = target_q - value
        value_loss = masked_mean(expectile_error(advantages, EXPECTILE), counts)
        td_loss = masked_mean(((q1 - td_target).square() + (q2 - td_target).square()) / 2, has_target)
        weights = advantage_weight(advantages.detach(), TEMPERATURE, MAX_WEIGHT)
        nll = F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none").view_as(actions)
        policy_loss = masked_mean(weights * nll, counts)
        loss = value_loss + td_loss + policy_loss

        with torch.no_grad():
            info = {
                "loss": loss.detach(),
                "loss_per_action": masked_mean(nll, counts),
                "accuracy": masked_mean((logits.argmax(dim=-1) == actions).float(), counts),
                "value_loss": value_loss.detach(),
                "td_loss": td_loss.detach(),
                "policy_loss": policy_loss.detach(),
                "advantage": masked_mean(advantages, counts),
                "weight_clipped": masked_mean((TEMPERATURE * advantages > math.log(MAX_WEIGHT)).float(), counts),
                "next_value": masked_mean(next_value, counts),
                "q_target": masked_mean(td_target, has_target),
            }
        states = {"online": tuple(s.detach() for s in online_state), "target": tuple(s.detach() for s in target_state),
                  "next": tuple(s.detach() for s in next_state)}
        return loss, states, info

    @torch.no_grad()
    def after_gradient_step(self) -> None:
        """target <- (1 - tau) * target + tau * model."""
        for old, new in zip(self.target.parameters(), self.model.parameters()):
            old.lerp_(new, self.tau)
