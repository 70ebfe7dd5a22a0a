# SPDX-License-Identifier: MIT
"""The bot AutoAscend, unchanged, as a player for record_games.py. No command of its own.

    git clone https://github.com/cdmatters/autoascend
    pip install -r requirements.txt -r scripts/requirements-autoascend.txt
    python scripts/record_games.py --autoascend autoascend --character mon-hum-neu --games 20 \\
        --out my_games --max_steps 1000000

It plays every character. Its only source of chance is a generator that the game's third seed seeds.
Some games it breaks off by an error of its own, such as a failed assertion. Its games are long: of
thirty, two had more than the 100,000 keys after which a game is quit unless --max_steps says more.
"""

import importlib
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nle import nethack

from custom_nethack_pomdp import UserError

REQUIREMENTS = Path(__file__).parents[1] / "requirements-autoascend.txt"
REPOSITORY = "https://github.com/cdmatters/autoascend"


class GameOver(KeyboardInterrupt):
    """Ends the bot's own loop, which handles other exceptions itself. Told `done` instead, it looks
    for the score on the screen after the game, which NLE shows otherwise today."""


class OldGame:
    """A game with the interface that the bot knows: gym's, with the observations of NLE 0.7.3."""

    def __init__(self, game: Any, num_blstats: int) -> None:
        self.game = game
        self.num_blstats = num_blstats
        self._actions: List[Any] = list(nethack.ACTIONS)  # where the bot looks its keys up

    def reset(self) -> Dict[str, np.ndarray]:
        """The observation of a game that has already begun."""
        arrays = self.game.env.unwrapped.last_observation
        obs = dict(zip(AutoAscendPlayer.observation_keys, arrays))
        obs["blstats"] = obs["blstats"][: self.num_blstats]  # later versions have more of them
        # The bot subtracts 1 from the row, which in numpy 2 overflows as uint8.
        obs["tty_cursor"] = obs["tty_cursor"].astype(np.int64)
        return obs

    def step(self, action: int) -> Tuple[Dict[str, np.ndarray], float, bool, Dict[str, Any]]:
        """-> obs, reward, done, info. Raises GameOver in place of done."""
        _, reward, done, info = self.game.step(action)
        if done:
            raise GameOver
        return self.reset(), reward, False, info


class AutoAscendPlayer:
    """Plays one game. `rng`, a numpy.random.Generator, seeds the bot's own source of chance."""

    # What the bot looks at of NLE's observations.
    observation_keys = (
        *("glyphs", "chars", "colors", "specials", "blstats", "message", "misc"),
        *("inv_glyphs", "inv_strs", "inv_letters", "inv_oclasses"),
        *("tty_chars", "tty_colors", "tty_cursor"),
    )

    def __init__(self, env_wrapper: Any, rng: np.random.Generator) -> None:
        """`env_wrapper`: the module autoascend.env_wrapper."""
        self.env_wrapper = env_wrapper
        self.seed = int(rng.integers(2**32))

    def play(self, game: Any) -> Optional[str]:
        """Plays a game that has begun to its end -> None, or the error that broke the bot off."""
        old_game = OldGame(game, len(self.env_wrapper.agent_lib.BLStats._fields))
        try:
            self.env_wrapper.EnvWrapper(old_game, agent_args={"seed": self.seed}).main()
        except GameOver:
            return None
        except Exception as error:  # whatever the bot raises
            place = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__} in {place.name}: {error}"
            return " ".join(told.split())[:100]
        return "it stopped playing"


def load(folder: str) -> Callable[[np.random.Generator], AutoAscendPlayer]:
    """What makes a player for each game, from a checkout of AutoAscend. Raises UserError."""
    root = Path(folder).expanduser().resolve()
    if not (root / "autoascend" / "env_wrapper.py").is_file():
        missing = "it holds no autoascend/env_wrapper.py"
        raise UserError(f"{folder} is no checkout of AutoAscend ({REPOSITORY}): {missing}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        env_wrapper = importlib.import_module("autoascend.env_wrapper")
    except Exception as error:  # whatever is missing or does not fit
        needed = f"it needs pip install -r {REQUIREMENTS}"
        raise UserError(f"AutoAscend cannot be imported ({error}): {needed}") from error
    return partial(AutoAscendPlayer, env_wrapper)
