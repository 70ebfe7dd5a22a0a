# SPDX-License-Identifier: MIT
"""Ours without the normalisation of the LSTM's output before the head, which is tiny at first."""

from typing import Tuple

from torch import Tensor

import custom_nethack_pomdp as ours


class Model(ours.Model):
    def head(self, core_output: Tensor, tty_chars: Tensor) -> Tuple[Tensor, Tensor]:
        shared = self.shared(core_output)
        logits = self.policy(shared) + self.named(shared) * ours.prompt_options(
            tty_chars, self.keys
        )
        return logits.float(), self.value(shared).float().squeeze(-1)


class OfflineAlgorithm(ours.OfflineAlgorithm):
    model_class = Model
