# SPDX-License-Identifier: MIT
"""Exact discounted returns of a recorded game. Not a command.

Training needs none: its values learn lambda-returns within a chunk. `critic_probe.py` and the
variant `blind_value.py` look to the game's end.
"""

import numpy as np


def exact_returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Rewards [n] of a whole game -> [n] float64: G_t = r_t + gamma G_{t+1}, with G_n = 0."""
    returns = rewards.astype(float)
    for t in range(len(returns) - 2, -1, -1):
        returns[t] += gamma * returns[t + 1]
    return returns
