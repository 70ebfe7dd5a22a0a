# SPDX-License-Identifier: MIT
"""A trained agent as a player for record_games.py, as in evaluation. No command of its own."""

import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import custom_nethack_pomdp as pomdp


class AgentPlayer:
    """Plays one game, from a cleared recurrent state on. `rng`, a numpy.random.Generator, seeds
    torch's chance anew for each action."""

    def __init__(self, model: Any, device: str, rng: np.random.Generator) -> None:
        self.model = model
        self.device = device
        self.rng = rng
        self.state: Any = None  # what vec_act hands on from step to step
        self.previous = np.array([pomdp.NO_ACTION])

    def act(self, obs: Dict[str, np.ndarray]) -> int:
        """Index into nle.nethack.ACTIONS of the next key. obs: one screen, without a batch axis."""
        inputs = {name: array[None] for name, array in obs.items()}
        inputs["prev_actions"] = self.previous
        torch.manual_seed(int(self.rng.integers(2**32)))
        actions, self.state = self.model.vec_act(inputs, self.state, device=self.device)
        self.previous = np.asarray(actions)
        return int(self.previous[0])


@lru_cache(maxsize=1)  # a process plays many games with one agent
def load(
    checkpoint: str, character: str, temperature: Optional[float]
) -> Callable[[np.random.Generator], AgentPlayer]:
    """What makes a player for each game. temperature: None keeps the agent's. Raises UserError."""
    torch.set_num_threads(1)  # sums depend on the threads; and workers would wait for each other
    settings = {}
    if temperature is not None:
        settings["temperature"] = temperature
    algorithm, config, _ = pomdp.load_agent(
        checkpoint, character=character, algorithm=settings, device="auto"
    )
    return partial(AgentPlayer, algorithm.model.eval(), str(pomdp.choose_device(config)))
