# SPDX-License-Identifier: MIT
"""The bot AutoAscend, unchanged, as a player for record_games.py. No command of its own.

    pip install -r scripts/requirements-autoascend.txt        # Python 3.11 or later
    python scripts/record_games.py --player autoascend --character mon-hum-neu --games 20 \\
        --out my_games --max_steps 1000000

The bot comes with the package nethackers. Its repository has the same bot, for Python 3.10 too:

    git clone https://github.com/cdmatters/autoascend
    pip install -r scripts/requirements-autoascend-checkout.txt
    python scripts/record_games.py --autoascend autoascend ...

With the same seeds, both record the same games. The bot plays every character. Its only source of
randomness is a generator that the game's third seed seeds. It quits some games because of an error
of its own, such as a failed assertion. Its games are long: of 30, two had more than the 100,000
actions after which a game is truncated unless --max_steps says more.
"""

import importlib
import importlib.util
import sys
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nle import nethack

from custom_nethack_pomdp import UserError

REPOSITORY = "https://github.com/cdmatters/autoascend"
PYTHON = (3, 11)  # the oldest that the package nethackers supports
NESTED_CALLS = 1000  # that the bot can make, as in a fresh interpreter


class GameOver(KeyboardInterrupt):
    """Ends the bot's own loop, which handles other exceptions itself. Told `done` instead, the bot
    reads the score from the screen after the game, which NLE shows differently today."""


class OldGame:
    """A game with the interface that the bot knows: gym's, with the observations of NLE 0.7.3."""

    def __init__(self, game: Any, num_blstats: int) -> None:
        self.game = game
        self.num_blstats = num_blstats

    def step(self, key: int) -> Tuple[Dict[str, np.ndarray], float, bool, Dict[str, Any]]:
        """Press a key -> obs, reward, done, info. Raises GameOver instead of returning done."""
        _, reward, done, info = self.game.step(nethack.ACTIONS.index(key))
        if done:
            raise GameOver
        arrays = self.game.env.unwrapped.last_observation
        obs = dict(zip(AutoAscendPlayer.observation_keys, arrays))
        obs["blstats"] = obs["blstats"][: self.num_blstats]  # later versions have more of them
        # The bot subtracts 1 from the row, which in numpy 2 overflows as uint8.
        obs["tty_cursor"] = obs["tty_cursor"].astype(np.int64)
        return obs, reward, False, info

    def debug_tiles(self, *args: Any, **kwargs: Any) -> Any:
        """Draws nothing: the bot marks its plans on a map that nobody watches here."""
        return nullcontext()

    debug_log = debug_tiles


def nested_calls_left() -> int:
    """The calls that can still be nested here before Python raises a RecursionError."""
    try:
        return 1 + nested_calls_left()
    except RecursionError:
        return 0


class AutoAscendPlayer:
    """Plays one game. `rng`, a numpy.random.Generator, seeds the bot's own source of randomness."""

    # What the bot looks at of NLE's observations.
    observation_keys = (
        *("glyphs", "chars", "colors", "specials", "blstats", "message", "misc"),
        *("inv_glyphs", "inv_strs", "inv_letters", "inv_oclasses"),
        *("tty_chars", "tty_colors", "tty_cursor"),
    )

    def __init__(self, bot: Any, rng: np.random.Generator) -> None:
        """`bot`: the module autoascend.agent."""
        self.bot = bot
        self.seed = int(rng.integers(2**32))

    def play(self, game: Any) -> Optional[str]:
        """Play a game that has begun to its end -> None, or the error that made the bot stop."""
        old_game = OldGame(game, len(self.bot.BLStats._fields))
        # In some games the bot presses ESC, one call deeper each time, until a RecursionError. The
        # number of times must not depend on who calls this.
        sys.setrecursionlimit(sys.getrecursionlimit() + NESTED_CALLS - nested_calls_left())
        try:
            self.bot.Agent(old_game, seed=self.seed).main()
        except GameOver:
            return None
        except Exception as error:  # whatever the bot raises
            place = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__} in {place.name}: {error}"
            return " ".join(told.split())[:100]
        return "it stopped playing"


def needed(which: str) -> str:
    """The command that installs what the bot needs."""
    return f"pip install -r {Path(__file__).parents[1] / f'requirements-{which}.txt'}"


def find_package() -> Path:
    """The folder of the bot in the package nethackers. Raises UserError."""
    found = importlib.util.find_spec("nethackers")
    if found and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0], "roots", "autoascend")
    if sys.version_info >= PYTHON:
        raise UserError(f"--player autoascend needs {needed('autoascend')}")
    version = ".".join(map(str, PYTHON))
    other_way = f"clone {REPOSITORY}, {needed('autoascend-checkout')} and give --autoascend"
    raise UserError(
        f"--player autoascend needs Python {version} or later; on this one, {other_way}"
    )


def load(checkout: Optional[str] = None) -> Callable[[np.random.Generator], AutoAscendPlayer]:
    """Find the bot in a checkout of its repository, or in the package nethackers -> what makes a
    player for each game. Raises UserError."""
    which = "autoascend"
    if checkout is None:
        root = find_package()
    else:
        which = "autoascend-checkout"
        root = Path(checkout).expanduser().resolve()
        if not (root / "autoascend" / "agent.py").is_file():
            missing = "it has no autoascend/agent.py"
            raise UserError(f"{checkout} is not a checkout of AutoAscend ({REPOSITORY}): {missing}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        bot = importlib.import_module("autoascend.agent")
    except Exception as error:  # whatever is missing or does not fit
        raise UserError(
            f"AutoAscend cannot be imported ({error}): it needs {needed(which)}"
        ) from error
    return partial(AutoAscendPlayer, bot)
