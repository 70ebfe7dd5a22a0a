# SPDX-License-Identifier: MIT
"""An inverse model: which key a player must have pressed at frame t, from the LSTM's output at
t + 1, when what the key did has been seen. It labels games without keys (scripts/label_games.py).

Previous actions are hidden from it, or it would be told. Its head also sees how the cursor, which
stands on the hero while the game waits for a move, went from t to t + 1. It learns by cross-entropy
alone; its values mean nothing, and it cannot play: train it with --eval_episodes 0.
"""

from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_nethack_pomdp as ours

FAR = 2  # steps of the cursor beyond which all are alike
SIDE = 2 * FAR + 1


def hide_actions(backbone: Any, arguments: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """The backbone's inputs, as if no action had been before any frame."""
    inputs, *state = arguments
    none = torch.full_like(inputs["prev_actions"], backbone.no_action)
    return {**inputs, "prev_actions": none}, *state


def append_cursor(_backbone: Any, arguments: Tuple[Any, ...], outputs: Any) -> Any:
    """The backbone's core_output [B, T, H] with the cursor for the head: [B, T, H + 2]."""
    core_output, state = outputs
    cursor = arguments[0]["tty_cursor"].float()
    return torch.cat([core_output.float(), cursor], dim=-1), state


class Model(ours.Model):
    is_inverse = True  # its head's logits at t are of the key between frames t and t + 1

    def __init__(self, backbone: Any, hyper: Any = None) -> None:
        super().__init__(backbone, hyper)
        self.moved = nn.Embedding(SIDE * SIDE, self.hyper.head_dim)
        backbone.register_forward_pre_hook(hide_actions)
        backbone.register_forward_hook(append_cursor)

    def head(self, core_output: Tensor, tty_chars: Tensor) -> Tuple[Tensor, Tensor]:
        """[B, T, H + 2], [B, T, 24, 80] -> logits [B, T, A], of which the last frame's mean
        nothing, and values [B, T], which never do."""
        with torch.autocast(core_output.device.type, enabled=False):
            after = core_output.roll(-1, dims=1)
            steps = (after - core_output)[..., -2:].clamp(-FAR, FAR).long() + FAR
            moved = self.moved(steps[..., 0] * SIDE + steps[..., 1])
            seen = F.layer_norm(after[..., :-2], after[..., :-2].shape[-1:])
            shared = F.relu(self.shared[0](seen) + moved)
            logits = self.policy(shared) + self.named(shared) * ours.prompt_options(
                tty_chars, self.keys
            )
            return logits, self.value(shared).squeeze(-1)


class OfflineAlgorithm(ours.OfflineAlgorithm):
    model_class = Model

    def _loss(
        self,
        logits: Tensor,
        values: Tensor,
        actions: Tensor,
        rewards: Tensor,
        dones: Tensor,
        mask: Tensor,
        known: Tensor,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """The mean nats per action, except for a game's last one, after which nothing is seen."""
        known = known * (1.0 - dones)
        nll = F.cross_entropy(logits.transpose(1, 2), actions, reduction="none")  # [B, T]
        loss = ours.masked_mean(nll, known)
        correct = (logits.argmax(dim=-1) == actions).float()
        info = {"loss_per_action": loss.detach(), "accuracy": ours.masked_mean(correct, known)}
        return loss, {"loss": loss.detach(), **info}
