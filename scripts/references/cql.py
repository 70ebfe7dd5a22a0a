"""Conservative Q-learning for discrete actions, one of the benchmark's three references, under the benchmark's contract.

One linear layer on the LSTM's output gives Q(s_t, .) for every action. Two terms are added up:

    L = alpha * E[ (Q(s, a) - y)^2 ],  y = r + gamma * (1 - done) * max_a' Q_target(s', a')
      + E[ log sum_a' exp Q(s, a') - Q(s, a) ]               Kumar et al., arXiv 2006.04779, equation 4, the entropy variant CQL(H)

As the benchmark has it: alpha = 2 multiplies the TD error (in the paper it multiplies the other term); the maximum is taken over the target
network's own values (plain DQN targets, not double ones); the target follows with tau = 0.005; acts by argmax; each network's recurrent
state runs on from one game to the next (`starts` is not looked at), and the target's state follows the stream of next observations.

`loss_per_action` is -log softmax(Q)(a), which is the second term itself: what a policy that samples from softmax(Q) would pay per action.

A block by itself: it runs with `custom_nethack_pomdp.py --submission scripts/references/cql.py`.
Axes: B batch, T time, A actions, H hidden, N games. Batches hold T + 1 steps, of which the first T carry loss.
"""
from copy import deepcopy
from typing import Any, Dict, Tuple

import numpy as np
import torch
from torch import nn

NOT_OBSERVATIONS = ("actions", "rewards", "dones", "mask", "starts", "returns")
ALPHA = 2.0  # weight of the TD error against the conservative term (Katakomba's setting)


def masked_mean(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [B, T] over the frames where `counts` [B, T] is 1, and 0 where there are none."""
    assert values.shape == counts.shape, (values.shape, counts.shape)
    return (values * counts).sum() / counts.sum().clamp(min=1.0)


class Model(nn.Module):
    """The backbone and one linear layer: `num_actions * (H + 1)` parameters beyond the backbone's, 247,929 at 121 and 2048."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone
        self.q = nn.Linear(backbone.rnn_hidden_dim, backbone.num_actions)

    def forward(self, inputs: Dict[str, torch.Tensor], state: Any = None) -> Tuple[torch.Tensor, Any]:
        """Q values [B, T, A] float32, and the new state. float32, because under autocast the layer gives half precision."""
        core_output, new_state = self.backbone(inputs, state)
        return self.q(core_output).float(), new_state

    @torch.no_grad()
    def vec_act(self, obs: Dict[str, np.ndarray], state: Any = None, device: str = "cpu") -> Tuple[np.ndarray, Any]:
        """The action of highest value in each of N games, [N] int64. `obs`: arrays [N, ...], `prev_actions` [N] among them."""
        inputs = {k: torch.as_tensor(v, device=device).unsqueeze(1) for k, v in obs.items()}  # [N, 1, ...]
        inputs["prev_actions"] = inputs["prev_actions"].long()
        q, new_state = self(inputs, state)
        return q[:, 0].argmax(dim=-1).cpu().numpy(), new_state


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
            next_q, target_state = self.target(following, rnn_states.get("target"))
            td_target = rewards + self.gamma * (1.0 - dones) * next_q.amax(dim=-1)           # [B, T]
        q, online_state = self.model(now, rnn_states.get("online"))                          # [B, T, A]
        q_taken = q.gather(-1, actions.unsqueeze(-1)).squeeze(-1)                            # [B, T]
        assert q_taken.shape == td_target.shape, (q_taken.shape, td_target.shape)
        td_loss = masked_mean((q_taken - td_target).square(), has_target)
        conservative = masked_mean(q.logsumexp(dim=-1) - q_taken, counts)
        loss = ALPHA * td_loss + conservative

        with torch.no_grad():
            info = {
                "loss": loss.detach(),
                "loss_per_action": conservative.detach(),
                "accuracy": masked_mean((q.argmax(dim=-1) == actions).float(), counts),
                "td_loss": td_loss.detach(),
                "q_target": masked_mean(td_target, has_target),
            }
        states = {"online": tuple(s.detach() for s in online_state), "target": tuple(s.detach() for s in target_state)}
        return loss, states, info

    @torch.no_grad()
    def after_gradient_step(self) -> None:
        """target <- (1 - tau) * target + tau * model."""
        for old, new in zip(self.target.parameters(), self.model.parameters()):
            old.lerp_(new, self.tau)
