# SPDX-License-Identifier: MIT

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "nle==1.3.0",
#     "numpy==2.2.6",
#     "pyrallis==0.3.1",
#     "PyYAML==6.0.3",
#     "wandb==0.31.0",
#     "zstandard==0.25.0",
#     "h5py==3.16.0",
#     "tqdm==4.70.1",
# ]
# ///
"""Recurrent advantage-weighted regression with burn-in for NetHack, offline.

Trains on games of the symbolic bot AutoAscend (NLD-AA) and plays NetHack (NLE) with the result; the
score is the game's score over AutoAscend's mean score for that character. From top to bottom:
configuration, utilities, processes, data, backbone, the EDITABLE block (model and algorithm),
scoring, the run.

    python custom_nethack_pomdp.py --data_path DIR [--config FILE]        train and evaluate
    python custom_nethack_pomdp.py --data_path DIR --resume true          go on where a run stopped
    python custom_nethack_pomdp.py --data_path DIR --submission FILE      with another algorithm
    python custom_nethack_pomdp.py --evaluate runs/.../best.pt            score a checkpoint
    torchrun --nproc_per_node 8 custom_nethack_pomdp.py --data_path DIR   on eight GPUs

What calls what: `train` loops over `gradient_step` > `OfflineAlgorithm.train_step` (> `_burn_in`,
`_unroll`, `Model.head`, `_loss`), `log_update`, `save_run` and `evaluate_run` > `evaluate` >
`evaluate_heldout` and `evaluate_games` > `vec_evaluate` > `Model.vec_act`.

Axes: B rows of a batch, T steps of a chunk (seq_len), A actions (121), H hidden units (2048), L
layers (2), N game slots. A batch holds T + 1 frames of each row; the last one is the first of the
row's next chunk and serves only as the successor of frame T - 1, so only frames 0 .. T - 1 carry
loss. The benchmark's batches are laid out alike, in float32, with `screen_image` and without the
last three.

    tty_chars   [B, T+1, 24, 80]  uint8    characters on the terminal
    tty_colors  [B, T+1, 24, 80]  int8     colours 0..31 (bit 16: inverse video)
    tty_cursor  [B, T+1, 2]       uint8    row and column of the cursor
    actions     [B, T+1]          int64    index into nle.nethack.ACTIONS; 121 where unknown
    rewards     [B, T+1]          float32  score[t+1] - score[t], over the reward scale, clipped
    dones       [B, T+1]          bool     the player's last frame of a game
    blstats     [B, T+1, 27]      int32    NLE's bottom-line statistics as read off the status lines
    mask        [B, T+1]          bool     in play: not padding, not behind a truncation
    starts      [B]               bool     the row's first frame does not follow the batch before

An action is unknown where the keypress is not an action, as in human games without labels. Rewards
and values are real there, so the value learns from every frame in play; the policy learns from
those with a known action (mask & (actions < 121)).

Beside the batch goes prev_actions [B, 1] int64: the action before the first frame, or NO_ACTION.
"""

# ==================================================================================================
# Imports and constants
# ==================================================================================================
import argparse
import csv
import ctypes
import difflib
import fcntl
import hashlib
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tokenize
import types
import zipfile
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from copy import deepcopy
from dataclasses import Field, asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
    get_args,
)

import nle
import numpy as np
import pyrallis
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from nle import nethack
from nle.dataset.dataset import converter as ttyrec_converter
from nle.env.base import NLE
from nle.env.tasks import NetHackScore
from torch import Tensor
from torch.distributions import Categorical
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

# --- what an observation is, in the data and in the game
ROWS = 24  # lines of the terminal
COLS = 80
NUM_BLSTATS = nethack.BLSTATS_SHAPE[0]  # 27; the statistics' places are nethack.NLE_BL_HP and so on
OBSERVATION_SHAPES: Dict[str, Tuple[Any, ...]] = {  # dtype and shape
    "tty_chars": (np.uint8, ROWS, COLS),
    "tty_colors": (np.int8, ROWS, COLS),
    "tty_cursor": (np.uint8, 2),
    "blstats": (np.int32, NUM_BLSTATS),
}
OBSERVATIONS = tuple(OBSERVATION_SHAPES)

# --- actions
NUM_ACTIONS = len(nethack.ACTIONS)  # 121
# In batches: an unknown action (the keypress is not an action), and the previous action of a game's
# first frame. Frames that are not in play have action 0.
NO_ACTION = NUM_ACTIONS
UNKNOWN_KEY = 255  # an unknown action in the store, whose actions are bytes
# Three keys have two actions (`"` 77/109, `$` 79/120, `+` 81/105); either sends the same key, and
# the last index is the one that Katakomba's data uses.
KEY_TO_ACTION = np.full(256, UNKNOWN_KEY, dtype=np.uint8)
for _action, _key in enumerate(nethack.ACTIONS):
    KEY_TO_ACTION[int(_key)] = _action
SPACE_ACTION = KEY_TO_ACTION[ord(" ")]

# --- characters: AutoAscend's mean score, by which scores are divided (Katakomba, arXiv 2306.08772)
AUTOASCEND_MEAN_SCORE: Dict[str, float] = {
    "arc-dwa-law": 5445.69,
    "arc-gno-neu": 5316.57,
    "arc-hum-law": 5826.35,
    "arc-hum-neu": 6636.44,
    "bar-hum-cha": 18228.11,
    "bar-hum-neu": 17836.68,
    "bar-orc-cha": 17594.38,
    "cav-dwa-law": 11893.48,
    "cav-gno-neu": 10083.06,
    "cav-hum-law": 12462.82,
    "cav-hum-neu": 12113.87,
    "hea-gno-neu": 3783.93,
    "hea-hum-neu": 4068.27,
    "kni-hum-law": 14137.06,
    "mon-hum-cha": 18353.30,
    "mon-hum-law": 16091.57,
    "mon-hum-neu": 17456.05,
    "pri-elf-cha": 7109.35,
    "pri-hum-cha": 8262.56,
    "pri-hum-law": 6847.99,
    "pri-hum-neu": 7732.69,
    "ran-elf-cha": 9014.18,
    "ran-gno-neu": 6965.04,
    "ran-hum-cha": 8378.50,
    "ran-hum-neu": 8067.99,
    "ran-orc-cha": 7608.48,
    "rog-hum-cha": 4818.20,
    "rog-orc-cha": 4897.69,
    "sam-hum-law": 11009.36,
    "tou-hum-neu": 4211.47,
    "val-dwa-law": 23473.61,
    "val-hum-law": 26103.03,
    "val-hum-neu": 18624.77,
    "wiz-elf-cha": 5005.16,
    "wiz-gno-neu": 4317.51,
    "wiz-hum-cha": 5316.82,
    "wiz-hum-neu": 5323.48,
    "wiz-orc-cha": 5016.74,
}

CORES = len(os.sched_getaffinity(0))
# torchrun tells each process how many there are and its own number: on all machines, and on this.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0)
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)

Batch = Dict[str, Tensor]
Observations = Dict[str, np.ndarray]
Metrics = Dict[str, Any]  # numbers under their names
RNNState = Tuple[Tensor, Tensor]  # (h, c), each [L, B, H]


class UserError(Exception):
    """Something that the user can mend: `main` prints its one line on stderr and exits with 2."""


# ==================================================================================================
# Configuration: each setting once; the command line over a file over defaults
# ==================================================================================================
def setting(
    default: Any,
    text: str,
    limits: Tuple[float, float] = (-math.inf, math.inf),
    choices: str = "",
    affects_results: bool = True,
    may_change: bool = False,
) -> Any:
    """Declare one setting of `TrainConfig`.

    text: what --help says. limits: smallest and largest value. choices: a regular expression,
    alternatives separated by "|". affects_results: False for names, places and logging.
    may_change: whether a resumed run may have another value; True where results are not affected.
    """
    metadata = dict(
        help=text,
        limits=limits,
        choices=choices,
        affects_results=affects_results,
        may_change=may_change or not affects_results,
    )
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


COUNT = (1, math.inf)
NOT_NEGATIVE = (0, math.inf)
POSITIVE = (1e-12, math.inf)
FRACTION = (0, 1)
SEED = (0, 2**63 - 1)


@dataclass
class TrainConfig:
    """Settings of a run. Names and defaults are the benchmark's where it has them, except for
    `character`. Raises UserError for a value out of range."""

    character: str = setting(
        "mon-hum-neu,val-hum-neu,ran-hum-neu",
        "one or several, comma-separated: train and play as each",
    )
    data_path: Optional[str] = setting(
        None,
        "NLD-AA, .hdf5 or store; several, comma-separated; None: Katakomba's",
        affects_results=False,
    )
    data_mode: str = setting(
        "in_memory",
        "accepted for the benchmark's command lines; data is always read compressed",
        choices="compressed|memmap|in_memory",
        affects_results=False,
    )
    store_path: str = setting(
        "runs/stores", "folder in which chunk stores are built", affects_results=False
    )
    game_frames: int = setting(
        0, "learn from the first this many frames of each game only; 0: all", limits=NOT_NEGATIVE
    )
    heldout_share: float = setting(
        0.1, "fraction of each character's games that is never trained on", limits=(0, 0.9)
    )
    submission: Optional[str] = setting(
        None, "file to take Model and OfflineAlgorithm from; None: this one"
    )
    algorithm: Dict[str, Any] = setting({}, "settings of AWRConfig, for example '{burn_in: 8}'")
    init_from: Optional[str] = setting(
        None, "start from this checkpoint's weights, with a fresh optimizer", may_change=True
    )
    evaluate: Optional[str] = setting(None, "score this checkpoint instead of training")

    project: str = setting("NetHack", "wandb project", affects_results=False)
    group: str = setting(
        "custom-nethack-pomdp",
        'wandb group and folder of runs; "-v<version>" is appended',
        affects_results=False,
    )
    name: str = setting(
        "custom", 'run name; "-<character>-seed<train_seed>" is appended', affects_results=False
    )
    version: int = setting(
        0, "number that is appended to the group", limits=NOT_NEGATIVE, affects_results=False
    )
    log_every: int = setting(50, "updates between logged rows", limits=COUNT, affects_results=False)

    benchmark_sizes: bool = setting(
        True,
        "the LSTM must be the benchmark's 2 x 2048; false: any size is accepted",
        affects_results=False,
    )
    rnn_hidden_dim: int = setting(2048, "LSTM units per layer", limits=COUNT)
    rnn_layers: int = setting(2, "LSTM layers", limits=COUNT)
    use_prev_action: bool = setting(True, "feed the previous action to the LSTM")
    rnn_dropout: float = setting(
        0.0, "dropout probability between the LSTM's layers", limits=FRACTION
    )
    clip_range: float = setting(
        10.0, "rewards, in units of the reward scale, are clipped to +- this", limits=POSITIVE
    )
    tau: float = setting(
        0.005,
        "Polyak rate of target networks per update (used by reference algorithms)",
        limits=FRACTION,
    )
    gamma: float = setting(0.999, "discount per step of the game", limits=FRACTION)

    update_steps: int = setting(
        100_000, "updates (gradient steps) in total", limits=COUNT, may_change=True
    )
    batch_size: int = setting(128, "rows of a batch, on each GPU", limits=COUNT)
    seq_len: int = setting(16, "steps of a chunk (T)", limits=COUNT)
    learning_rate: float = setting(3e-4, "peak learning rate of AdamW", limits=POSITIVE)
    lr_schedule: str = setting(
        "constant",
        "constant, or cosine: down to a tenth at the last transition",
        choices="constant|cosine",
    )
    warmup_transitions: int = setting(
        0, "transitions over which the learning rate rises from 0", limits=NOT_NEGATIVE
    )
    weight_decay: float = setting(0.0, "AdamW's, on weight matrices only", limits=NOT_NEGATIVE)
    clip_grad_norm: Optional[float] = setting(
        None, "largest L2 norm of the whole gradient; None: any", limits=POSITIVE
    )
    device: str = setting(
        "auto",
        "auto, cpu, cuda or cuda:N",
        choices=r"auto|cpu|cuda|cuda:\d+",
        may_change=True,
    )
    precision: str = setting(
        "auto",
        "of matrix products: auto (bf16 on a GPU that has it), fp32 or bf16",
        choices="auto|fp32|bf16",
    )
    train_seed: int = setting(42, "seed of initial weights and of the order of games", limits=SEED)

    checkpoints_path: Optional[str] = setting(
        None, "runs go to <this>/<group>/<name>; None: to runs", affects_results=False
    )
    checkpoint_every: int = setting(
        2_000,
        "updates between checkpoints; each evaluation saves one too",
        limits=COUNT,
        affects_results=False,
    )
    keep_checkpoints: bool = setting(
        False, "also keep the weights of every evaluation as <step>.pt", affects_results=False
    )
    resume: Union[bool, str] = setting(
        False,
        "true: continue the newest run of this name; or the folder of a run",
        affects_results=False,
    )

    eval_every: int = setting(
        10_000,
        "updates between evaluations; the last update is always followed by one",
        limits=COUNT,
        may_change=True,
    )
    eval_episodes: int = setting(
        50, "games per character; 0 plays none", limits=NOT_NEGATIVE, may_change=True
    )
    eval_processes: int = setting(
        14,
        "environment slots, played side by side in the process itself",
        limits=COUNT,
        may_change=True,
    )
    render_processes: int = setting(
        14,
        "accepted for the benchmark's command lines; nothing is rendered",
        limits=COUNT,
        affects_results=False,
    )
    eval_max_steps: int = setting(
        1_000_000,
        "a game is truncated after this many actions (counted and reported)",
        limits=COUNT,
        may_change=True,
    )
    eval_precision: str = setting(
        "fp32",
        "of products when acting on a CPU: fp32, or bf16 (faster, rounded)",
        choices="fp32|bf16",
        may_change=True,
    )
    eval_heldout_frames: int = setting(
        65_536,
        "frames of held-out games scored at each evaluation",
        limits=NOT_NEGATIVE,
        may_change=True,
    )
    eval_seed: int = setting(
        50, "seed of the evaluation games and of sampled actions", limits=SEED, may_change=True
    )
    eval_replays: int = setting(
        0,
        "recordings kept per character: the best game, the worst, between",
        limits=NOT_NEGATIVE,
        affects_results=False,
    )

    def __post_init__(self) -> None:
        self.character = ",".join(self.characters)  # one spelling, for names
        if self.submission:  # found from any folder when the run is resumed or scored
            self.submission = os.path.abspath(expand(self.submission))
        for character in self.characters or ["(none)"]:
            check_character(character)
        for one in fields(self):
            check_setting(one, getattr(self, one.name))

    @property
    def characters(self) -> List[str]:
        names = [name.strip().lower() for name in self.character.split(",")]
        return [name for name in dict.fromkeys(names) if name]


def settings_where(**wanted: bool) -> Set[str]:
    """Names of the settings declared so: settings_where(affects_results=False)."""
    return {one.name for one in fields(TrainConfig) if wanted.items() <= one.metadata.items()}


def check_character(character: str) -> None:
    if character not in AUTOASCEND_MEAN_SCORE:
        close = difflib.get_close_matches(character, AUTOASCEND_MEAN_SCORE, n=3)
        hint = f"did you mean {', '.join(close)}?"
        if not close:
            hint = "a name is role-race-alignment, such as mon-hum-neu; separate several by commas"
        raise UserError(f"unknown character {character!r}; {hint}")


def check_setting(one: Field, value: Any) -> None:
    """Raises UserError for a value outside of the limits or choices of its declaration."""
    low, high = one.metadata["limits"]
    choices = one.metadata["choices"]
    is_number = type(value) in (int, float)
    if is_number and not low <= value <= high:
        raise UserError(f"{one.name} must be at least {low:g} and at most {high:g}, not {value}")
    if choices and not re.fullmatch(choices, value):
        shown = choices.replace("|", ", ").replace(r"\d+", "N")
        raise UserError(f"{one.name} must be one of {shown}, not {value!r}")


# --- from a command line and a file to settings
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def to_bool(value: Any) -> bool:
    return BOOLEANS[str(value).lower()]


def to_text(value: Any) -> str:
    if not isinstance(value, str):  # 1_000, 10:30 and 007 are numbers to YAML
        raise TypeError
    return value


def to_number(kind: Any, value: Any) -> Any:
    """A finite number, or its text (1e6 and 1_000 too), as an int or a float."""
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError
    try:
        return int(value)  # all digits of a large one
    except ValueError:
        return int(number)


def to_number_if_possible(value: Any) -> Any:
    """For a value inside `algorithm`, whose type is not declared."""
    for kind in (int, float):
        with suppress(ValueError, TypeError, OverflowError):
            return to_number(kind, value)
    return value


# pyrallis alone reads 2.7 as the int 2, 'maybe' as True and null as the text 'None'.
pyrallis.decode.register(bool, to_bool)
pyrallis.decode.register(str, to_text)
pyrallis.decode.register(int, partial(to_number, int))
pyrallis.decode.register(float, partial(to_number, float))
pyrallis.decode.register(Any, to_number_if_possible)
KINDS = {  # what a mistake in a value of this type says
    bool: "true or false",
    str: "text, in quotes in a file",
    int: "a whole number",
    float: "a number",
    Optional[str]: "text, in quotes in a file, or null",
    Optional[float]: "a number or null",
    Union[bool, str]: "true, false or a folder",
    Dict[str, Any]: "settings such as {burn_in: 8}",
}


def decode_setting(one: Field, value: Any) -> Any:
    """The value as the setting's type. Raises UserError."""
    try:
        return pyrallis.decode(one.type, value)
    except Exception:  # it raises many types
        raise UserError(f"{one.name} must be {KINDS[one.type]}, not {value!r}") from None


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML without what it does by default with a key that is given twice: take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
        seen: List[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value} is given twice, the second time in line {line}")
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: Union[str, bytes], where: str) -> Dict[Any, Any]:
    """Raises UserError."""
    try:
        content = yaml.load(text, UniqueKeyLoader)
    except Exception as error:  # of many types, such as for the date 2024-13-45
        raise UserError(f"{where} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold settings, each as `name: value`")
    return content


def unknown_setting(word: Any) -> UserError:
    text = f"unknown setting {word}"
    for name in difflib.get_close_matches(str(word).strip("-"), vars(TrainConfig()), n=1):
        text += f"; did you mean {name}?"
    return UserError(text)


def read_config_file(path: str) -> Dict[str, Any]:
    """Settings of a YAML file. Raises UserError."""
    try:
        content = load_yaml(expand(path).read_bytes(), f"--config {path}")
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    if content.get("algorithm", {}) is None:  # `algorithm:` without a value
        content["algorithm"] = {}
    settings = {one.name: one for one in fields(TrainConfig)}
    for name, value in content.items():
        if name not in settings:
            raise UserError(f"--config {path}: {unknown_setting(name)}")
        content[name] = decode_setting(settings[name], value)
    return content


class SettingsParser(argparse.ArgumentParser):
    """argparse, which raises UserError where it would print its whole usage and exit."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Command line over config file over defaults; `algorithm` is merged key by key.

    A text of the command line is taken as given: " #" does not begin a comment there, and
    2024-01-05 is not a date. Raises UserError.
    """
    parser = SettingsParser(
        description=(__doc__ or "").split("Axes:")[0],  # python -OO has no docstrings
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "--config_path", metavar="FILE", help="settings as YAML")
    defaults = TrainConfig()
    for one in fields(TrainConfig):
        text = f"{one.metadata['help']} (default: {getattr(defaults, one.name)})"
        parser.add_argument(f"--{one.name}", default=argparse.SUPPRESS, help=text)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        raise unknown_setting(word)
    values = {}
    if given.config is not None:
        values = read_config_file(given.config)
    overrides: Dict[str, Any] = {}
    for one in fields(TrainConfig):
        if one.name not in given:
            continue
        value = getattr(given, one.name)
        if one.name == "algorithm":
            value = load_yaml(value, "--algorithm")
        elif value == "null" and type(None) in get_args(one.type):
            value = None
        overrides[one.name] = decode_setting(one, value)
    if "algorithm" in overrides:
        overrides["algorithm"] = {**values.get("algorithm", {}), **overrides["algorithm"]}
    return TrainConfig(**{**values, **overrides})


# ==================================================================================================
# Utilities: seeds, files, the console, logging
# ==================================================================================================
def expand(path: str) -> Path:
    """With ~ as the user's home; where there is none it stays as it is (Path.expanduser raises)."""
    return Path(os.path.expanduser(path))


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator: a submission may use it
    torch.manual_seed(seed)


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    text = ",".join(str(int(part)) for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for every parameter (Polyak averaging)."""
    for target_param, source_param in zip(target.parameters(), source.parameters()):
        target_param.lerp_(source_param, tau)


def asymmetric_l2_loss(u: Tensor, tau: float) -> Tensor:
    """Mean of |tau - 1(u < 0)| u^2: the expectile loss of IQL (arXiv 2110.06169, equation 5)."""
    return torch.mean(torch.abs(tau - (u < 0).float()) * u**2)


def to_device(value: Any, device: torch.device) -> Any:
    """With every tensor in nested dicts, lists and tuples, as recurrent states may be, moved."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def keep_freed_memory() -> None:
    """By default glibc gives each large freed tensor back to the system, which clears the same
    memory anew at every update: on a CPU that took more time than the update itself."""
    with suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def write_atomically(path: Path, content: bytes) -> None:
    """Into a temporary file, synced, then renamed: `path` holds the old content or the new, never a
    part.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room, --resume true goes on"
        ) from None


def to_bytes(save: Callable[[Any], None]) -> bytes:
    """What `save(file)` writes."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def write_line(text: str, file: Any) -> None:
    """One line, above a progress bar if there is one. If the console is gone the run continues."""
    try:
        tqdm.write(text, file=file)
        file.flush()
    except OSError as error:
        discard(file)
        if file is sys.stdout:
            warn(f"standard output cannot be written ({error.strerror}); this continues without it")


def discard(file: Any) -> None:
    """What is written to the file from here on, and what it still holds, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def say(text: str) -> None:
    """One line on standard output. Of several processes only the first speaks."""
    if RANK == 0:
        write_line(text, sys.stdout)


def warn(text: str) -> None:
    """One line on standard error, of the first process on each machine."""
    if LOCAL_RANK == 0:
        write_line(f"warning: {text}", sys.stderr)


warn_once = lru_cache(maxsize=None)(warn)


def lock_file(file: Any, operation: int) -> None:
    """flock, until the file is closed, however its holder ends. Where the file system has no locks
    it must do without."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:  # another has it
        raise
    except OSError as error:
        warn_once(f"no locks here ({error.strerror}): let no two runs write to one folder at once")


def write_error(error: Exception) -> None:
    """A mistake in one line."""
    write_line("error: " + " ".join(str(error).split())[:2000], sys.stderr)


def prepare_console() -> None:
    """Standard output and error can be written whatever they are: closed at the start (`>&-`), a
    notebook's, or of an encoding that lacks a character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    with suppress(AttributeError):  # a notebook's cannot be changed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def run_command(command: Callable[[], Any], if_stopped: str = "stopped by a signal") -> int:
    """Call it -> the exit status: its own (None is 0), 2 after a user's mistake, which gets one
    line, or 128 + number after a signal, as the shell reports it. Every script ends in this."""
    prepare_console()
    try:
        status = command()
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # the reader closed the pipe
        discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        write_error(error)
        return 2
    except KeyboardInterrupt as stopped:  # Python's own, or Stopped with its number
        say(if_stopped)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)


def say_metrics(tag: str, metrics: Metrics) -> None:
    """The lines that readers of standard output look for: `TRAIN_METRICS step=... name=value`."""
    words = []
    for name, value in metrics.items():
        words.append(f"{name}={value}" if isinstance(value, int) else f"{name}={value:.6g}")
    say(" ".join([tag, *words]))


def progress_bar(**options: Any) -> Any:
    """A progress bar on a terminal; of a machine's processes the first alone shows one."""
    return tqdm(disable=True if LOCAL_RANK else None, dynamic_ncols=True, **options)


@contextmanager
def only_watching(what: str) -> Iterator[None]:
    """What fails inside costs a run one warning."""
    try:
        yield
    except Exception as error:  # wandb has many types
        reason = " ".join(str(error).split())
        warn_once(f"{what} failed ({reason}); the run continues without it")


class RunLogger:
    """Every row goes to metrics.jsonl and to wandb: online with an API key, offline without one, or
    as WANDB_MODE says."""

    def __init__(self, config: TrainConfig, folder: Path, wandb_id: Optional[str] = None) -> None:
        self.path = folder / "metrics.jsonl"
        self.file = open(self.path if RANK == 0 else os.devnull, "a", encoding="utf-8")
        self.run: Any = None
        self.wandb_step = 0
        mode: Any = os.environ.get("WANDB_MODE")
        if RANK > 0 or mode == "disabled":
            return
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds
        with only_watching("wandb (WANDB_MODE=offline needs no server)"):
            import wandb

            if not mode:
                has_key = wandb.login(prompt=False, verify=False)
                mode = "online" if has_key else "offline"
            run: Any = wandb.init(
                project=config.project,
                group=folder.parent.name,
                name=folder.name,
                dir=folder,
                config=asdict(config),
                id=wandb_id,
                resume="allow",
                mode=mode,
            )
            # wandb drops rows whose step decreases
            self.wandb_step = max(self.path.read_bytes().count(b"\n"), run.step)
            # our own axis, so that a resumed run continues where it belongs
            run.define_metric("*", step_metric="transitions")
            self.run = run

    def log(self, kind: str, metrics: Metrics, games: Any = ()) -> None:
        """A row of this kind: "training" or "evaluation"; and the evaluation's games, which wandb
        shows as tables: pairs of a character and its GameResults."""
        # JSON knows no NaN
        finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        row = {"kind": kind, **finite}
        with only_watching(f"writing to {self.path}"):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.run is not None:
            with only_watching("wandb"):
                import wandb

                for character, results in games:
                    rows = [[*result, result.progression] for result in results]
                    table = wandb.Table([*GameResult._fields, "progression"], rows)
                    metrics = {**metrics, f"{character}/games": table}
                self.run.log(metrics, step=self.wandb_step)
            self.wandb_step += 1

    def close(self) -> None:
        with suppress(OSError):  # a row that found no room was reported
            self.file.close()
        if self.run is not None:
            with only_watching("wandb"):  # older ones have no teardown; it also ends a broken one
                getattr(sys.modules["wandb"], "teardown", self.run.finish)()


# ==================================================================================================
# Signals, and several processes: one per GPU, started by torchrun. Each learns from its own rows,
# the first one writes
# ==================================================================================================
# Ctrl-C; a scheduler's end, and its warnings before; a terminal that is closed.
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
)
stop_signal = 0  # number of the last one


class Stopped(KeyboardInterrupt):
    """One of STOP_SIGNALS arrived; raised with its number at the next point where the run can be
    left."""


@contextmanager
def noting_signals() -> Iterator[None]:
    """Inside, STOP_SIGNALS are noted and nothing else; afterwards they act as before. In a thread,
    where Python allows no handlers, they are left alone."""

    def note(number: int, _frame: Any) -> None:
        global stop_signal
        stop_signal = number

    note(0, None)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, note)
        if before[signal.SIGHUP] == signal.SIG_IGN:  # started by nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    """Raises Stopped in all processes if one of them got a signal, so that they stop at the same
    step."""
    number = max_over_processes(stop_signal)
    if number:
        raise Stopped(number)


def max_over_processes(number: int) -> int:
    if WORLD == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def gather(mine: Any) -> List[Any]:
    """Every process's object, in their order."""
    everyone = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started can talk to each other. Raises UserError where
    something else started them."""
    if WORLD == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # torchrun keeps its store over a restart: what was left there before is not ours.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
    except ValueError as error:
        raise UserError(f"{error}; start several processes with torchrun") from None
    # a process may wait for another that plays long games
    dist.init_process_group(backend, None, timedelta(hours=24), WORLD, RANK, store)
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_mean(tensors: Sequence[Tensor], weight: Tensor) -> None:
    """Each tensor becomes its mean over the processes, weighted by their known actions: the
    gradient of the policy's mean is then the one over all rows, to rounding. The value's mean is
    over frames in play; its gradient is exact where the processes have equal fractions of known
    actions among them, as where all are known. What an algorithm
    normalises, it normalises in each process's rows."""
    if WORLD > 1:
        total = weight.clone()
        dist.all_reduce(total)
        for tensor in tensors:
            tensor.mul_(weight / total.clamp(min=1))
            dist.all_reduce(tensor)


# ==================================================================================================
# Data: game file -> frames -> store of compressed blocks -> sampling order -> batch_at(step)
# ==================================================================================================
# --- status lines: what the terminal's last two lines say, in the places of NLE's blstats
ATTRIBUTES = re.compile(
    rb" St:(\d+)(?:/(\d\d|\*\*))? Dx:(\d+) Co:(\d+) In:(\d+) Wi:(\d+) Ch:(\d+)"
    rb"\s+(Lawful|Neutral|Chaotic)?"
)
VITALS = re.compile(
    # depth, level of the quest, or the name of a place; NetHack 3.4.3 pads numbers by blanks
    rb"^(?:Dl(?:vl)?:(-?\d+)|Home (\d+)|"
    rb"(Fort Ludios|Earth|Air|Fire|Water|Astral Plane|End Game))\s+"
    # gold, hit points, maximum, energy, maximum, armour class
    rb"\S?:(\d+)\s+HP:(-?\d+)\((\d+)\) Pw:(-?\d+)\((\d+)\) AC:(-?\d+)\s+"
    # experience level and points, or hit dice; turn; words
    rb"(?:(?:Xp|Exp):(\d+)(?:/(\d+))?|HD:(\d+))(?: T:(\d+))?(.*)$"
)
VITALS_INDICES = [  # of these numbers in blstats, the place's name left out
    nethack.NLE_BL_DEPTH,
    nethack.NLE_BL_DLEVEL,
    nethack.NLE_BL_GOLD,
    nethack.NLE_BL_HP,
    nethack.NLE_BL_HPMAX,
    nethack.NLE_BL_ENE,
    nethack.NLE_BL_ENEMAX,
    nethack.NLE_BL_AC,
    nethack.NLE_BL_XP,
    nethack.NLE_BL_EXP,
    nethack.NLE_BL_HD,
    nethack.NLE_BL_TIME,
]
PLANE_DEPTHS = {
    b"Earth": b"-1",
    b"Air": b"-2",
    b"Fire": b"-3",
    b"Water": b"-4",
    b"Astral Plane": b"-5",
}
ALIGNMENTS = {b"Lawful": 1, b"Neutral": 0, b"Chaotic": -1}
NOT_HUNGRY = 1
HUNGER = {b"Satiated": 0, b"Hungry": 2, b"Weak": 3, b"Fainting": 4, b"Fainted": 5, b"Starved": 6}
LOADS = (  # 1, 2, ...: a word, and how a full line shortens it
    b"Burdened Burden Brd",
    b"Stressed Stress Strs",
    b"Strained Strain Strn",
    b"Overtaxed Overtax Ovtx",
    b"Overloaded Overload Ovld",
)
CONDITIONS = (  # bits 0, 1, ... (nethack.BL_MASK_STONE and so on)
    b"Stone Ston Sto",
    b"Slime Slim Slm",
    b"Strngl Stngl Str",
    b"FoodPois Fpois Poi",
    b"TermIll Ill",
    b"Blind Blnd Bl",
    b"Deaf Def Df",
    b"Stun St",
    b"Conf Cnf Cf",
    b"Hallu Hal Hl",
    b"Lev Lv",
    b"Fly Fl",
    b"Ride Rid Rd",
)
# word -> where in blstats it adds what
STATUS_WORDS = {word: (nethack.NLE_BL_HUNGER, n - NOT_HUNGRY) for word, n in HUNGER.items()}
for _load, _words in enumerate(LOADS, 1):
    STATUS_WORDS.update(dict.fromkeys(_words.split(), (nethack.NLE_BL_CAP, _load)))
for _bit, _words in enumerate(CONDITIONS):
    STATUS_WORDS.update(dict.fromkeys(_words.split(), (nethack.NLE_BL_CONDITION, 1 << _bit)))


def to_int32(number: bytes) -> int:
    """A number on the screen; one that is too large for int32 becomes the largest."""
    return min(max(int(number), -(2**31)), 2**31 - 1)


@lru_cache(maxsize=16_384)  # lines repeat from frame to frame
def parse_upper_status(line: bytes) -> np.ndarray:
    """Terminal line 22 -> [27] int32 with attributes and alignment in their places; zeros where a
    menu hides the line."""
    stats = np.zeros(NUM_BLSTATS, dtype=np.int32)
    match = ATTRIBUTES.search(line)
    if not match:
        return stats
    base, extra, *others, alignment = match.groups(b"0")
    # 18/xx counts on from 18, 18/** is 118, and 19 to 25 lie at 119 to 125 (NetHack's STR18, STR19)
    strength = int(base)
    if strength > 18:
        strength += 100
    strength += 100 if extra == b"**" else int(extra)
    if strength <= 18:
        compact = strength
    elif strength <= 121:
        compact = 19 + strength // 50
    else:
        compact = min(strength, 125) - 100
    stats[nethack.NLE_BL_STR25] = compact
    stats[nethack.NLE_BL_STR125] = strength
    stats[nethack.NLE_BL_DEX : nethack.NLE_BL_CHA + 1] = [to_int32(number) for number in others]
    stats[nethack.NLE_BL_ALIGN] = ALIGNMENTS.get(alignment, 0)
    return stats


@lru_cache(maxsize=16_384)
def parse_lower_status(line: bytes) -> np.ndarray:
    """Terminal line 23 -> [27] int32 with depth, vitals, turn and conditions; zeros where a menu
    hides the line."""
    stats = np.zeros(NUM_BLSTATS, dtype=np.int32)
    match = VITALS.match(line)
    if not match:
        return stats
    depth, home, place, *numbers, words = match.groups(b"0")
    depth = PLANE_DEPTHS.get(place, depth)
    stats[VITALS_INDICES] = [to_int32(number) for number in (depth, home, *numbers)]
    stats[nethack.NLE_BL_HUNGER] = NOT_HUNGRY
    for word in words.split():
        index, value = STATUS_WORDS.get(word, (nethack.NLE_BL_CONDITION, 0))
        stats[index] += value
    return stats


def read_blstats(chars: np.ndarray) -> np.ndarray:
    """Screens [n, 24, 80] uint8 -> [n, 27] int32: what the status lines say, as NLE's blstats.

    What the screen does not show (the hero's position, score, dungeon) and what a menu hides is 0.
    """
    text = chars[:, 22:].tobytes()
    lines = [text[begin : begin + COLS] for begin in range(0, len(text), COLS)]
    upper = [parse_upper_status(line) for line in lines[::2]]
    lower = [parse_lower_status(line) for line in lines[1::2]]
    return np.array(upper) + np.array(lower)  # the two fill different places


# --- games as recorded
class GameError(Exception):
    """A game that cannot be read; the build skips it, names it and goes on."""


# What a game that cannot be read raises, in nle.dataset, h5py and here.
UNREADABLE = (GameError, RuntimeError, ValueError, TypeError, OSError, EOFError, LookupError)


class GameSource(NamedTuple):
    """Where a game lies."""

    name: str  # the same wherever the data lies; held-out games are chosen by it
    path: str
    key: str  # the group inside an HDF5 file, empty for a ttyrec
    size: int  # this and the time only tell whether to look into the file again
    mtime_ns: int
    was_quit: bool = False  # by the keys that record_games.py and others press, QUIT_KEYS


class Frames(NamedTuple):
    """Frames of one game. Frame t is what the player saw before action t, score t the score by
    then."""

    chars: np.ndarray  # [n, 24, 80] uint8
    colors: np.ndarray  # [n, 24, 80] int8
    cursor: np.ndarray  # [n, 2] uint8
    actions: np.ndarray  # [n] uint8, UNKNOWN_KEY where the key is no action
    scores: np.ndarray  # [n] int32


def read_ttyrec(path: str) -> Frames:
    """All frames of a ttyrec3.bz2 file, through nle.dataset's converter."""
    if len(re.findall(rb"BZh\d1AY&SY", Path(path).read_bytes())) > 1:
        raise GameError("NLE reads the first of its bz2 streams alone: bunzip2 and bzip2 it anew")
    decoder = ttyrec_converter.Converter(ROWS, COLS, 3)
    decoder.load_ttyrec(os.fsencode(path), gameid=1, part=0)
    size = 1024
    remaining = 0
    pieces = []
    while remaining == 0:
        arrays: Any = [
            np.empty((size, ROWS, COLS), np.uint8),  # characters
            np.empty((size, ROWS, COLS), np.int8),  # colours
            np.empty((size, 2), np.int16),  # cursor
            np.empty(size, np.int64),  # times
            np.empty(size, np.uint8),  # keys
            np.empty(size, np.int32),  # scores
        ]
        remaining = decoder.convert(*arrays)
        pieces.append([array[: size - remaining] for array in arrays])
    chars, colors, cursor, _, keys, scores = map(np.concatenate, zip(*pieces))
    return Frames(chars, colors, cursor.astype(np.uint8), KEY_TO_ACTION[keys], scores)


def whole_numbers(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array as integers of this type. Raises GameError where a value would not stay the
    same."""
    with np.errstate(invalid="ignore"):  # NaN
        numbers = array.astype(dtype)
    if not np.array_equal(numbers, array):
        raise GameError(f"its {name} are not whole numbers ({np.dtype(dtype)})")
    return numbers


def read_hdf5(path: str, key: str) -> Frames:
    """All frames of one game of a Katakomba HDF5 file, which keeps score differences."""
    import h5py

    shapes: Dict[str, Tuple[int, ...]] = {
        "tty_chars": (ROWS, COLS),
        "tty_colors": (ROWS, COLS),
        "tty_cursor": (2,),
        "actions": (),
        "rewards": (),
    }
    with h5py.File(path, "r") as file:
        group: Any = file[key]
        arrays = {name: group[name][:] for name in shapes}
        if "dones" in group and np.any(group["dones"][:-1]):
            raise GameError("it holds several games: `dones` is true before its last frame")
    n = len(arrays["actions"])
    if any(arrays[name].shape != (n, *shape) for name, shape in shapes.items()):
        raise GameError("its arrays have not the shapes of Katakomba's")
    actions = whole_numbers("actions", arrays["actions"], np.int64)
    is_action = (actions >= 0) & (actions < NUM_ACTIONS)
    rewards = whole_numbers("rewards", arrays["rewards"], np.int64)
    return Frames(
        whole_numbers("tty_chars", arrays["tty_chars"], np.uint8),
        whole_numbers("tty_colors", arrays["tty_colors"], np.int8),
        whole_numbers("tty_cursor", arrays["tty_cursor"], np.uint8),
        np.where(is_action, actions, UNKNOWN_KEY).astype(np.uint8),
        whole_numbers("scores", np.cumsum(rewards) - rewards, np.int32),
    )


def find_first_frame(frames: Frames) -> int:
    """Index of the player's first frame: NLE itself answers start-up screens with SPACE, and they
    are recorded too."""
    index = 0
    while index < len(frames.chars) and frames.actions[index] == SPACE_ACTION:
        text = frames.chars[index].tobytes()
        greeting = b"welcome to NetHack!" in text and b"--More--" in text
        if VITALS.match(text[-COLS:]) and not greeting:
            break
        index += 1
    return index


MENU_PAGE = re.compile(rb"\((?:end|\d+ of \d+)\) *")
DEATH_MESSAGE = re.compile(
    rb"You (?:die|drown|suffocate|burn|turn to|are turned|dissolve|choke|escaped|ascend)"
)


def find_end_of_play(frames: Frames) -> int:
    """Index of the first frame after the game was over. Raises GameError if the recording shows no
    end.

    From the end of a game on, NLE itself presses SPACE: on the message of death, on the inventory
    (pages of a menu), on "NAME the ROLE's attributes:" and on what follows up to the tombstone. The
    frames before are the player's.
    """
    end = len(frames.chars)
    texts: Dict[int, bytes] = {}
    attribute_pages = []
    while end > max(0, len(frames.chars) - 64) and frames.actions[end - 1] == SPACE_ACTION:
        end -= 1
        texts[end] = frames.chars[end].tobytes()
        if b"'s attributes:" in texts[end]:
            attribute_pages.append(end)
    if not attribute_pages:
        raise GameError("the recording breaks off before the end of the game")
    end = max(attribute_pages)
    while MENU_PAGE.search(texts.get(end - 1, b"")):
        end -= 1
    if b"--More--" in texts.get(end - 1, b""):  # shown after the game was over, whatever it says
        end -= 1
        while b"--More--" in texts.get(end - 1, b"") and DEATH_MESSAGE.search(texts[end - 1]):
            end -= 1
    return end


def ends_undone(path: str, key: str) -> bool:
    """Whether the last `dones` of a Katakomba game is false: then it was not played to its end."""
    import h5py

    with h5py.File(path, "r") as file:
        dones = file[key].get("dones")
        return dones is not None and not dones[-1]


# ESC, ESC, #quit and its answer: how record_games.py and others quit a game
QUIT_ACTIONS = KEY_TO_ACTION[[27, 27, int(nethack.Command.QUIT), ord("y")]]


# --- where games lie
def parse_xlogfile(path: Path) -> List[Dict[str, str]]:
    """Tab-separated key=value pairs, a line a finished game; what is not of that form is left
    out."""
    games = []
    for line in path.read_bytes().decode("latin-1").splitlines():
        pairs = [pair.split("=", 1) for pair in line.split("\t") if "=" in pair]
        games.append(dict(pairs))
    return games


def find_xlogfiles(root: Path) -> List[Path]:
    """Those at and below a folder. Links to folders are followed, but each folder counts once, and
    what lies around `root` is not below it."""
    found: List[Path] = []
    seen = set(map(str, root.resolve().parents))
    for folder, below, _ in os.walk(root, followlinks=True):
        below.sort()
        real_path = os.path.realpath(folder)
        if real_path in seen:
            below.clear()
        else:
            found += [path for path in Path(folder).glob("*.xlogfile") if not path.is_dir()]
        seen.add(real_path)
    return found


def find_nld_games(root: Path, character: str) -> Tuple[List[GameSource], List[str]]:
    """The character's games below an NLD-AA folder, those with a line in an xlogfile beside them;
    and lines without."""
    games: Dict[str, GameSource] = {}  # by their real place, which several links may lead to
    problems = []
    for xlogfile in sorted(find_xlogfiles(Path(root))):
        if not os.access(xlogfile, os.R_OK):  # a link to nowhere, for one
            problems.append(f"{xlogfile} cannot be read")
            continue
        for xlog in parse_xlogfile(xlogfile):
            parts = [xlog.get(part, "?").lower() for part in ("role", "race", "align0")]
            if "-".join(parts) != character:
                continue
            name = xlog.get("ttyrecname", "")
            path = xlogfile.parent / name
            is_plain = name == os.path.basename(name) and name.endswith(".ttyrec3.bz2")
            if is_plain and path.is_file():
                # the root's own name is no part of the data
                label = "/".join(path.relative_to(root).parts[-2:])
                stat = path.stat()
                was_quit = xlog.get("death", "").startswith("quit")
                game = GameSource(label, str(path), "", stat.st_size, stat.st_mtime_ns, was_quit)
                games.setdefault(os.path.realpath(path), game)
            else:
                what = f"its line names no ttyrec3.bz2 file beside it ({name!r})"
                problems.append(f"{xlogfile}: {what}")
    return sorted(games.values()), problems


def holds_human_games(root: Path) -> bool:
    """Whether a folder is laid out as alt.org's (NLD-NAO): a folder a player, recordings of screens
    alone in them."""
    return any(Path(root).glob("*/*.ttyrec.bz2"))


def find_games(root: Path, character: str) -> Tuple[List[GameSource], List[str]]:
    """The character's games in a folder or file, and what is none. Raises UserError where there is
    nothing to read."""
    root = Path(root)
    problems: List[str] = []
    hdf5 = root if root.is_file() else root / f"data-{character}-any.hdf5"
    if hdf5.is_file() and f"data-{character}-any" in hdf5.name:
        import h5py

        with h5py.File(hdf5, "r") as file:
            keys = sorted(file)
        stat = (hdf5.stat().st_size, hdf5.stat().st_mtime_ns)
        games = [GameSource(f"{hdf5.name}/{key}", str(hdf5), key, *stat) for key in keys]
    else:
        games, problems = find_nld_games(root, character)
    if not games and holds_human_games(root):
        raise UserError(
            f"{root} holds human games, whose keys are unknown: python scripts/label_games.py "
            "--checkpoint INVERSE --data_path NAO_DIR --out DIR makes games to train on of them; "
            "see the README, section Data"
        )
    if not games:
        raise UserError(
            f"no games of {character} in {root}. --data_path takes NLD-AA's folder, Katakomba's "
            f"data-{character}-any.hdf5, or games of your own (scripts/record_games.py); see the "
            "README, section Data" + "; ".join(["", *problems[:1]])
        )
    return games, problems


# --- the store of a character's games: index.npz and frames.bin in one folder
STORE_FORMAT = 7
BLOCK = 64  # frames compressed together: more make the store smaller, and reading slower
BYTES_PER_WORKER = 4_000_000  # of recordings, for which a process of its own is worth its start
ZSTD_LEVEL = 3  # smaller than level 1 and as fast to write; level 6 takes three times as long


@lru_cache(maxsize=BLOCK)
def block_dtype(n: int) -> np.dtype:
    """A record of n frames: what the agent sees, and its actions (UNKNOWN_KEY where the key is
    none)."""
    shapes = OBSERVATION_SHAPES.items()
    fields = [(name, dtype, (n, *shape)) for name, (dtype, *shape) in shapes]
    return np.dtype([*fields, ("actions", np.uint8, (n,))])


class EncodedGame(NamedTuple):
    """A game as it goes into the store, or why it does not."""

    blocks: List[bytes]
    columns: Dict[str, Any]  # the game's part of index.npz
    problem: str = ""


def trim_game(source: GameSource) -> Tuple[Frames, bool]:
    """The player's frames of a recording, and whether it was truncated (it broke off before the
    game was over). A truncated game ends with one more frame, from which the value before it is
    bootstrapped. Raises what UNREADABLE lists."""
    frames = read_hdf5(source.path, source.key) if source.key else read_ttyrec(source.path)
    first = find_first_frame(frames)
    truncated = source.was_quit
    try:
        end = find_end_of_play(frames)
    except GameError:
        truncated = bool(source.key) and ends_undone(source.path, source.key)
        if not truncated:
            raise
        end = len(frames.chars) - 1
    while source.was_quit and np.array_equal(frames.actions[end - 4 : end], QUIT_ACTIONS):
        end -= 4
    if first >= end:
        raise GameError("it holds no frame of play")
    end += truncated
    return Frames(*[array[first:end] for array in frames]), truncated


def encode_game(source: GameSource) -> EncodedGame:
    """A recording as it goes into the store."""
    import zstandard

    try:
        frames, truncated = trim_game(source)
    except UNREADABLE as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        return EncodedGame([], {}, problem)
    n = len(frames.chars)
    blstats = read_blstats(frames.chars)
    planes = dict(
        tty_chars=frames.chars,
        tty_colors=frames.colors,
        tty_cursor=frames.cursor,
        blstats=blstats,
        actions=frames.actions,
    )
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    blocks = []
    for begin in range(0, n, BLOCK):
        record = np.empty((), block_dtype(min(BLOCK, n - begin)))
        for name, plane in planes.items():
            record[name] = plane[begin : begin + BLOCK]
        blocks.append(compressor.compress(record.tobytes()))
    rewards = np.append(np.diff(frames.scores), 0)  # NLE pays nothing for the step that ends a game
    reward_frames = np.flatnonzero(rewards)
    checksum = 0  # of what it holds, however it is compressed
    for plane in (*planes.values(), rewards):
        checksum = zlib.crc32(plane.data, checksum)
    columns = dict(
        names=source.name,
        frames=n,
        truncated=truncated,
        identities=f"{source.name}, {n} frames, checksum {checksum:08x}",
        block_sizes=[len(block) for block in blocks],
        block_checksums=[zlib.crc32(block) for block in blocks],  # quicker than zstandard's own
        reward_counts=len(reward_frames),
        reward_frames=reward_frames,
        reward_values=rewards[reward_frames],
        max_depths=blstats[:, nethack.NLE_BL_DEPTH].max(),
        turns=blstats[:, nethack.NLE_BL_TIME].max(),
        unknown_keys=np.count_nonzero(frames.actions == UNKNOWN_KEY),
    )
    return EncodedGame(blocks, columns)


def fingerprint(games: List[GameSource]) -> str:
    """Changes whenever a game was added, removed or perhaps rewritten, or the format of the store
    changed: then the games are read again."""
    content = repr((STORE_FORMAT, BLOCK, ZSTD_LEVEL, games))
    return hashlib.sha256(content.encode()).hexdigest()


def start_worker(parent: int) -> None:
    """A worker process leaves signals to its parent, and ends with it however that ends."""
    keep_freed_memory()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def encode_games(games: List[GameSource]) -> Any:
    """Yield each EncodedGame, in the games' order, made by a process per core if there is enough
    to read."""
    # An HDF5 file holds many games.
    size = sum({game.path: game.size for game in games}.values())
    workers = max(1, min(CORES, len(games), size // BYTES_PER_WORKER))
    if workers == 1:
        yield from map(encode_game, games)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker, (os.getpid(),)) as pool:
        waiting: Deque[Any] = deque()
        for game in games:
            waiting.append(pool.submit(encode_game, game))
            if len(waiting) > 2 * workers:  # few, so that a signal stops all of them soon
                yield waiting.popleft().result()
        for one in waiting:
            yield one.result()


def build_store(store: Path, games: List[GameSource], problems: List[str], character: str) -> None:
    """Write a store into a temporary folder and rename it to `store`. Raises Stopped."""
    temporary = store.with_name(f".{store.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed; the lock is ours
    temporary.mkdir(parents=True)
    parts = []
    skipped = []
    with noting_signals(), open(temporary / "frames.bin", "wb") as file:
        with closing(encode_games(games)) as encoded:
            bar = progress_bar(iterable=encoded, total=len(games), desc=f"store of {character}")
            for source, game in zip(games, bar):
                if stop_signal:
                    raise Stopped(stop_signal)
                if game.problem:
                    where = f"{source.path}:{source.key}".rstrip(":")
                    skipped.append(f"{where}: {game.problem}")
                    warn(f"skipped {skipped[-1]}")
                else:
                    file.writelines(game.blocks)
                    parts.append(game.columns)
        file.flush()
        os.fsync(file.fileno())
    if not parts:
        shutil.rmtree(temporary)
        raise UserError(
            f"none of the {len(games)} games of {character} can be read; the first: {skipped[0]}"
        )
    arrays: Any = {}
    for name in parts[0]:
        arrays[name] = np.hstack([part[name] for part in parts])
    arrays.update(format=STORE_FORMAT, fingerprint=fingerprint(games), character=character)
    arrays.update(skipped=skipped, passed_over=problems)
    np.savez(temporary / "index.npz", **arrays)
    # Whoever has the old one open reads on: its file lives until it is closed.
    shutil.rmtree(store, ignore_errors=True)
    os.replace(temporary, store)


def open_current_store(folder: Path, games: List[GameSource], character: str) -> Any:
    """The store in this folder, or None where it was not made of exactly these games."""
    with suppress(UserError):
        store = GameStore(folder, character)
        if str(store.index["fingerprint"]) == fingerprint(games):
            return store
    return None


def open_or_build_store(data_path: Optional[str], store_path: str, character: str) -> "GameStore":
    """A store of the character's games: the given one, the one built before if the games did not
    change, or a new one. Only building takes a lock and writes."""
    katakomba = os.environ.get("KATAKOMBA_DATA_DIR", "~/.katakomba/datasets")
    data = expand(data_path or katakomba)
    for folder in (data, data / character):
        if (folder / "frames.bin").exists():
            return GameStore(folder, character)
    digest = hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:12]
    folder = expand(store_path) / digest / character
    try:
        games, problems = find_games(data, character)
        store = open_current_store(folder, games, character)
        if store is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(folder.with_name(f".{character}.lock"), "a") as lock:
                lock_file(lock, fcntl.LOCK_EX)
                store = open_current_store(folder, games, character)  # another may have built it
                if store is None:
                    build_store(folder, games, problems, character)
                    store = GameStore(folder, character)
    except (OSError, RuntimeError) as error:  # of h5py and of a process that crashed too
        raise UserError(
            f"cannot read {data} or write its store (--store_path {store_path}): {error}"
        ) from None
    return store


class GameStore:
    """A store opened for reading, safe from several threads. Raises UserError for a damaged store
    or another's."""

    def __init__(self, folder: Path, character: str) -> None:
        self.folder = Path(folder)
        self.local = threading.local()  # a zstandard decompressor serves one thread
        try:
            with np.load(self.folder / "index.npz") as arrays:  # a zip file, which keeps checksums
                self.index = dict(arrays)
            if self.index.get("format") != STORE_FORMAT:
                raise ValueError("another version of this script built it")
            self.names = self.index["names"]
            self.frames = self.index["frames"]
            self.truncated = self.index["truncated"]  # then its last frame is the one after the cut
            num_blocks = -(-self.frames // BLOCK)
            self.first_blocks = np.cumsum(np.append(0, num_blocks))
            self.block_offsets = np.cumsum(np.append(0, self.index["block_sizes"]))
            self.first_rewards = np.cumsum(np.append(0, self.index["reward_counts"]))
            self.file = open(self.folder / "frames.bin", "rb")
            size = os.fstat(self.file.fileno()).st_size
            expected = (len(self.index["block_checksums"]), size)
            if (self.first_blocks[-1], self.block_offsets[-1]) != expected:
                raise ValueError("index.npz and frames.bin do not belong together")
            owner = str(self.index["character"])
            if owner != character:
                raise ValueError(f"its games are of {owner}, not of {character}")
        except Exception as error:  # numpy and zipfile report damage by many types
            raise self._unusable(error) from None

    def _unusable(self, why: Any) -> UserError:
        return UserError(
            f"the chunk store {self.folder} cannot be used: {why}; delete a damaged one and start "
            "again"
        )

    def __str__(self) -> str:
        frames = self.frames.sum()
        return (
            f"{self.index['character']}: {len(self.frames)} games, {frames:,} frames, "
            f"{self.block_offsets[-1] / frames:.0f} bytes a frame; left out: "
            f"{len(self.index['skipped'])} unreadable games, "
            f"{len(self.index['passed_over'])} lines without a game, "
            f"{self.index['unknown_keys'].sum()} keys that are no action"
        )

    def rewards(self, game: int) -> Tuple[np.ndarray, np.ndarray]:
        """Frames whose reward is not 0, and these rewards (differences of the in-game score)."""
        part = slice(*self.first_rewards[game : game + 2])
        return self.index["reward_frames"][part], self.index["reward_values"][part]

    def block(self, game: int, number: int) -> Any:
        """Frames BLOCK * number ... of the game, as in block_dtype. Raises UserError for bytes that
        were damaged."""
        import zstandard

        if not hasattr(self.local, "decompressor"):
            self.local.decompressor = zstandard.ZstdDecompressor()
        block = int(self.first_blocks[game]) + number
        begin, end = self.block_offsets[block : block + 2].tolist()
        dtype = block_dtype(min(BLOCK, int(self.frames[game]) - BLOCK * number))
        try:
            stored = os.pread(self.file.fileno(), end - begin, begin)
            if zlib.crc32(stored) != self.index["block_checksums"][block]:
                raise ValueError("its checksum is wrong")
            content = self.local.decompressor.decompress(stored)
            return np.frombuffer(content, dtype).reshape(())[()]
        except (zstandard.ZstdError, ValueError, MemoryError, OSError) as error:
            raise self._unusable(f"block {block} is damaged ({error})") from None


# --- from stores to batches
def choose_heldout(names: Sequence[str], share: float) -> np.ndarray:
    """bool [G]: which of a character's games are held out, by hash of their name; at least one of
    two or more."""
    digests = [hashlib.sha256(os.fsencode(name)).hexdigest() for name in names]
    hashes = np.array([int(digest[:8], 16) for digest in digests]) / 2**32
    heldout = hashes < share
    if share > 0:
        heldout[np.argmin(hashes)] = True
        heldout[np.argmax(hashes)] = False  # one to train on; the only one, if there is one
    return heldout


class Games:
    """The games of one or several stores under one numbering, each up to its first `game_frames`
    frames (0: all)."""

    def __init__(self, stores: Sequence[GameStore], game_frames: int = 0) -> None:
        self.stores = list(stores)
        # each game's store, and its number there
        self.in_store = [(store, n) for store in self.stores for n in range(len(store.frames))]
        frames = np.concatenate([store.frames - store.truncated for store in self.stores])
        self.frames = frames.clip(0, game_frames or None)

    def heldout(self, share: float) -> np.ndarray:
        """bool [G]: games never trained on, chosen among each store's."""
        return np.concatenate([choose_heldout(store.names, share) for store in self.stores])

    def reward_scale(self, games: np.ndarray, gamma: float) -> float:
        """Root mean square of the discounted return so far, R_t = gamma R_{t-1} + r_t, over all
        frames of the games: what the benchmark divides rewards by, exact here, while its own is a
        running estimate."""
        squares = 0.0
        for game in games:
            store, number = self.in_store[game]
            reward_frames, rewards = store.rewards(number)
            ends = np.append(reward_frames, self.frames[game]).clip(0, self.frames[game])
            discounted = 0.0
            for reward, length in zip(rewards.tolist(), np.diff(ends).tolist()):
                discounted += reward
                if gamma == 1.0:
                    squares += discounted**2 * length
                else:
                    squares += discounted**2 * (1.0 - gamma ** (2 * length)) / (1.0 - gamma**2)
                discounted *= gamma**length
        mean = squares / max(int(self.frames[games].sum()), 1)
        return max(math.sqrt(mean), 0.01)  # 0.01: the benchmark's floor


class ChunkSampler:
    """Which chunk each row plays at each step: pure arithmetic, so a batch depends on its number
    alone.

    A pass puts all games one after another in a new random order, each padded to whole chunks of
    `seq_len` frames, and cuts that line into as many equal parts as there are rows; each row plays
    its part from left to right. So a pass plays every chunk exactly once, rows are spread over
    early and late parts of games, and a row starts inside a game only at a pass's beginning (its
    state is then cleared).
    """

    def __init__(self, frames: np.ndarray, rows: int, seq_len: int, seed: Optional[int]) -> None:
        self.chunks = -(-np.asarray(frames) // seq_len)  # [G] chunks of each game
        self.rows = rows
        self.seq_len = seq_len
        self.seed = seed  # None: the games' own order
        self.total = int(self.chunks.sum())
        self.steps = -(-self.total // rows)  # of a pass; a row one chunk short pads the last one

    def locate(self, step: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step 0, 1, ... -> game [rows] (-1: padding), first frame [rows], starts [rows] bool."""
        number, offset = divmod(step, self.steps)
        order: np.ndarray = np.arange(len(self.chunks))
        if self.seed is not None:
            order = np.random.default_rng(derived_seed(self.seed, number)).permutation(order)
        ends = np.cumsum(self.chunks[order])
        edges = np.arange(self.rows + 1) * self.total // self.rows
        chunk = edges[:-1] + offset
        padding = chunk >= edges[1:]
        chunk = np.minimum(chunk, self.total - 1)
        position = np.searchsorted(ends, chunk, side="right")  # of the chunk's game in the order
        game = order[position]
        inside = chunk - (ends[position] - self.chunks[game])
        starts = (inside == 0) | (offset == 0) | padding
        first_frame = np.where(padding, 0, inside * self.seq_len)
        return np.where(padding, -1, game), first_frame, starts


class ChunkLoader:
    """Batches of `rows` rows on all processes together; this one reads its share.

    `shuffle`: games in a new random order each pass, else in their own.
    """

    def __init__(
        self,
        games: Games,
        chosen: np.ndarray,
        config: TrainConfig,
        rows: int,
        reward_scale: float,
        shuffle: bool = True,
    ) -> None:
        self.games = games
        self.chosen = np.asarray(chosen)  # numbers of the games to read
        self.config = config
        self.reward_scale = reward_scale
        self.shapes: Dict[str, Tuple[Any, ...]] = {  # of all that has an axis of time
            **OBSERVATION_SHAPES,
            "actions": (np.int64,),
            "rewards": (np.float32,),
            "dones": (np.bool_,),
            "mask": (np.bool_,),
        }
        self.pin_memory = torch.cuda.is_available() and config.device != "cpu"
        seed = config.train_seed if shuffle else None
        frames = games.frames[self.chosen]
        self.sampler = ChunkSampler(frames, rows, self.config.seq_len, seed)
        self.rows = slice(rows * RANK // WORLD, rows * (RANK + 1) // WORLD)
        self.batch_size = self.rows.stop - self.rows.start
        # What all rows read at a step is kept for the next one.
        blocks_a_step = self.batch_size * (2 + self.config.seq_len // BLOCK)
        self.block = lru_cache(maxsize=blocks_a_step)(GameStore.block)
        self.rewards_of = lru_cache(maxsize=2 * self.batch_size)(self._rewards)

    def _rewards(self, store: GameStore, number: int) -> np.ndarray:
        """[n] float32: scaled and clipped, at every frame of the whole game."""
        reward_frames, values = store.rewards(number)
        scaled = values / self.reward_scale
        rewards = np.zeros(store.frames[number], dtype=np.float32)
        rewards[reward_frames] = np.clip(scaled, -self.config.clip_range, self.config.clip_range)
        return rewards

    def _fill_row(self, batch: Dict[str, np.ndarray], row: int, game: int, first: int) -> None:
        """Writes frames first .. first + T of the game, as far as it goes, into a row."""
        store, number = self.games.in_store[game]
        length = int(store.frames[number])
        stop = min(first + self.config.seq_len + 1, length)
        position = first
        if first:  # this block was read a step ago
            block = self.block(store, number, (first - 1) // BLOCK)
            batch["previous"][row] = block["actions"][(first - 1) % BLOCK]
        while position < stop:
            inside = position % BLOCK
            block = self.block(store, number, position // BLOCK)
            count = min(stop - position, BLOCK - inside)
            here = slice(position - first, position - first + count)
            for name in block.dtype.names:
                batch[name][row, here] = block[name][inside : inside + count]
            position += count
        filled = slice(0, stop - first)
        batch["dones"][row, stop - first - 1] = stop == length and not store.truncated[number]
        batch["rewards"][row, filled] = self.rewards_of(store, number)[first:stop]
        # Frames beyond a truncation are not in play, but values before it are bootstrapped from
        # them.
        batch["mask"][row, : min(stop, self.games.frames[game]) - first] = True

    def batch_at(self, step: int) -> Tuple[Batch, Tensor]:
        """Batch and prev_actions of step 0, 1, ... on the CPU, as in the module's docstring."""
        games, first_frames, starts = self.sampler.locate(step)
        games = games[self.rows]
        first_frames = first_frames[self.rows]
        starts = starts[self.rows]
        batch = {}
        for name, (dtype, *shape) in self.shapes.items():
            batch[name] = torch.zeros(
                (self.batch_size, self.config.seq_len + 1, *shape),
                dtype=getattr(torch, np.dtype(dtype).name),
                pin_memory=self.pin_memory,
            )
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        arrays["previous"] = np.full(self.batch_size, UNKNOWN_KEY)
        for row in np.flatnonzero(games >= 0):
            self._fill_row(arrays, row, self.chosen[games[row]], int(first_frames[row]))
        arrays["actions"][arrays["actions"] == UNKNOWN_KEY] = NO_ACTION
        arrays["actions"][~arrays["mask"]] = 0
        batch["starts"] = torch.from_numpy(starts.copy())
        none = starts | (arrays["previous"] == UNKNOWN_KEY)
        prev_actions = np.where(none, NO_ACTION, arrays["previous"])
        return batch, torch.from_numpy(prev_actions[:, None])


def data_paths(data_path: Optional[str]) -> Sequence[Optional[str]]:
    """One path, or several, comma-separated; one that exists is never taken apart."""
    if data_path is None or os.path.exists(expand(data_path)):
        return [data_path]
    paths = [path.strip() for path in data_path.split(",")]
    return list(filter(None, paths)) or [data_path]


def open_stores(config: TrainConfig) -> List[GameStore]:
    """Each character's, at each data path. The first process of a machine builds what is missing,
    while the others wait; its mistake is one line and ends all."""
    stores: List[GameStore] = []
    problem = ""
    for is_first in (True, False):
        if is_first == (LOCAL_RANK == 0):
            try:
                for name in config.characters:
                    for path in data_paths(config.data_path):
                        stores.append(open_or_build_store(path, config.store_path, name))
            except UserError as error:
                problem = str(error)
        for text in filter(None, gather(problem)):
            if RANK > 0:
                sys.exit(2)  # the first process says why
            raise UserError(text)
    return stores


def load_data(config: TrainConfig) -> Tuple[ChunkLoader, Optional[ChunkLoader]]:
    """Loaders of the games to learn from, and of those held out, if any."""
    stores = open_stores(config)
    for store in stores:
        say(str(store))
    games = Games(stores, config.game_frames)
    is_heldout = games.heldout(config.heldout_share)
    chosen = np.flatnonzero(~is_heldout)
    heldout = np.flatnonzero(is_heldout)
    scale = games.reward_scale(chosen, config.gamma)
    rows = config.batch_size * WORLD
    loader = ChunkLoader(games, chosen, config, rows, scale)
    if not len(heldout):
        return loader, None
    rows = min(rows, max(32, WORLD))
    return loader, ChunkLoader(games, heldout, config, rows, scale, shuffle=False)


def read_ahead(batch_at: Callable[[int], Any], step: int) -> Any:
    """Yield batches step, step + 1, ... without end, read by a thread of their own while the one
    before is learned from."""
    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(batch_at, step), reader.submit(batch_at, step + 1)]
        while True:
            batch = waiting.pop(0).result()
            step += 1
            waiting.append(reader.submit(batch_at, step + 1))
            yield batch


# ==================================================================================================
# Backbone: encoders of a frame, and the LSTM
# ==================================================================================================
NUM_LOADS = 6  # NetHack's words for hunger and load, no word included
NUM_HUNGERS = 7
NUM_FEATURES = 47  # what blstats_features makes


def log_scaled(values: Tensor, scale: float) -> Tensor:
    return torch.log1p(values.clamp(min=0)) / scale


def blstats_features(blstats: Tensor) -> Tensor:
    """[n, 27] int -> [n, 47] float32 of about unit size; the last flags hidden status lines
    (maximal HP is never 0)."""
    stats = blstats.float().T  # [27, n]
    hp = stats[nethack.NLE_BL_HP]
    hp_max = stats[nethack.NLE_BL_HPMAX]
    energy = stats[nethack.NLE_BL_ENE]
    energy_max = stats[nethack.NLE_BL_ENEMAX]
    numbers = [
        stats[nethack.NLE_BL_STR25] / 25.0,
        stats[nethack.NLE_BL_DEX] / 25.0,
        stats[nethack.NLE_BL_CON] / 25.0,
        stats[nethack.NLE_BL_INT] / 25.0,
        stats[nethack.NLE_BL_WIS] / 25.0,
        stats[nethack.NLE_BL_CHA] / 25.0,
        stats[nethack.NLE_BL_STR125] / 125.0,
        log_scaled(hp, 5.0),
        log_scaled(hp_max, 5.0),
        hp / hp_max.clamp(min=1),
        log_scaled(energy, 5.0),
        energy / energy_max.clamp(min=1),
        stats[nethack.NLE_BL_DEPTH] / 10.0,
        log_scaled(stats[nethack.NLE_BL_GOLD], 8.0),
        stats[nethack.NLE_BL_AC] / 10.0,
        stats[nethack.NLE_BL_HD] / 20.0,
        stats[nethack.NLE_BL_XP] / 20.0,
        log_scaled(stats[nethack.NLE_BL_EXP], 10.0),
        log_scaled(stats[nethack.NLE_BL_TIME], 10.0),
        stats[nethack.NLE_BL_ALIGN],
    ]
    hunger = blstats[:, nethack.NLE_BL_HUNGER].long().clamp(0, NUM_HUNGERS - 1)
    load = blstats[:, nethack.NLE_BL_CAP].long().clamp(0, NUM_LOADS - 1)
    bits = torch.arange(nethack.BL_MASK_BITS, device=blstats.device, dtype=torch.int32)
    conditions = (blstats[:, nethack.NLE_BL_CONDITION, None].int() >> bits) & 1
    features = torch.cat(
        [
            torch.stack(numbers, dim=1),
            F.one_hot(hunger, NUM_HUNGERS).float(),
            F.one_hot(load, NUM_LOADS).float(),
            conditions.float(),
        ],
        dim=1,
    )
    hidden = hp_max[:, None] == 0
    return torch.cat([torch.where(hidden, 0.0, features), hidden.float()], dim=1)


class ScreenEncoder(nn.Module):
    """Characters and colours of the whole terminal, of a crop centred on the cursor, and of the
    message line.

    [n, 24, 80] characters and colours, [n, 2] cursor -> [n, output_dim].
    """

    CROP = 15  # side of the crop, in cells
    CHAR_DIM = 16  # size of a cell's embedding
    TABLE_COPIES = 64  # in the gradient on a GPU

    def __init__(self) -> None:
        super().__init__()
        self.char_embedding = nn.Embedding(256, self.CHAR_DIM)
        self.color_embedding = nn.Embedding(32, self.CHAR_DIM)

        def conv(inputs: int, outputs: int, stride: int = 2) -> List[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]

        def conv_line(inputs: int) -> List[nn.Module]:
            return [nn.Conv1d(inputs, 64, 5, stride=2, padding=2), nn.ReLU()]

        def linear(inputs: int, outputs: int) -> List[nn.Module]:
            return [nn.Flatten(), nn.Linear(inputs, outputs), nn.ReLU()]

        self.screen = nn.Sequential(
            *conv(self.CHAR_DIM, 32),
            *conv(32, 64),
            *conv(64, 64),
            *linear(64 * 3 * 10, 256),
        )
        self.crop = nn.Sequential(
            *conv(self.CHAR_DIM, 32, stride=1),
            *conv(32, 64),
            *conv(64, 64),
            *linear(64 * 4 * 4, 256),
        )
        self.message = nn.Sequential(
            *conv_line(self.CHAR_DIM),
            *conv_line(64),
            *linear(64 * 20, 128),
        )
        self.output_dim = 256 + 256 + 128

    def embed(self, cells: Tensor, table: Tensor) -> Tensor:
        """[n, H, W] int, [codes, C] -> [n, C, H, W]: F.embedding, but its gradient is quick on a
        GPU.

        F.embedding's own sorts all cells and adds up those that are alike (most are blank) one
        after another: four fifths of an update. index_select's adds atomically; neighbors that are
        alike take different ones of 64 copies of the table, so as not to wait. The copies are
        32 MB, which fit into a GPU's cache.
        """
        if not (table.is_cuda and torch.is_grad_enabled()):
            return F.embedding(cells, table).movedim(3, 1)
        copy = torch.arange(cells[0].numel(), device=cells.device) % self.TABLE_COPIES
        codes = cells.flatten(1) + copy * len(table)
        tables = table.repeat(self.TABLE_COPIES, 1)
        embedded = tables.index_select(0, codes.flatten())
        return embedded.view(*cells.shape, -1).movedim(3, 1)

    def crop_cells(self, cells: Tensor, cursor: Tensor) -> Tensor:
        """[n, 24, 80] cell codes, [n, 2] -> [n, CROP, CROP]; code 0 outside of the terminal."""
        half = self.CROP // 2
        padded = F.pad(cells, (half, half, half, half))
        window = torch.arange(self.CROP, device=cells.device)
        lines = cursor[:, 0, None].long().clamp(0, ROWS - 1) + window  # [n, CROP]
        columns = cursor[:, 1, None].long().clamp(0, COLS - 1) + window
        index = lines[:, :, None] * padded.shape[2] + columns[:, None, :]
        crop = padded.flatten(1).gather(1, index.flatten(1))
        return crop.view(-1, self.CROP, self.CROP)

    def forward(self, chars: Tensor, colors: Tensor, cursor: Tensor) -> Tensor:
        # One table for all pairs of a character and a colour: one look-up (and one gradient) a cell
        # instead of two.
        pairs = self.char_embedding.weight[:, None] + self.color_embedding.weight[None]
        table = pairs.flatten(0, 1)  # [256 * 32, C]
        cells = chars.int() * 32 + (colors.int() & 31)  # [n, 24, 80]
        parts = [
            self.screen(self.embed(cells, table)),
            self.crop(self.embed(self.crop_cells(cells, cursor), table)),
            # Not a line of the screen's: the gradient of that is a zeroed copy of the whole screen.
            self.message(self.embed(cells[:, :1], table).squeeze(2)),
        ]
        return torch.cat(parts, dim=1)


class ModelBackbone(nn.Module):
    """Encoders of one frame and the previous action, feeding an LSTM: what every submission's Model
    is built on.

    `forward(inputs, state)`: inputs hold `observations` [B, T, ...] and prev_actions [B, T]
    (NO_ACTION at a game's first frame), of any type; state is None (zeros) or (h, c), each
    [L, B, H]. -> core_output [B, T, H], new state.
    """

    observations = OBSERVATIONS

    def __init__(
        self,
        action_dim: int,
        rnn_hidden_dim: int = 2048,
        rnn_layers: int = 2,
        rnn_dropout: float = 0.0,
        use_prev_action: bool = True,
    ) -> None:
        super().__init__()
        self.num_actions = action_dim
        self.no_action = action_dim  # stands for the previous action where there is none
        self.rnn_hidden_dim = rnn_hidden_dim
        self.use_prev_action = use_prev_action
        self.screen_encoder = ScreenEncoder()
        self.blstats_encoder = nn.Sequential(
            nn.Linear(NUM_FEATURES + 2, 128),  # and the cursor
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
        )
        self.action_embedding = nn.Embedding(action_dim + 1, 64)
        features = self.screen_encoder.output_dim + 128
        if use_prev_action:
            features += 64
        self.rnn = nn.LSTM(
            features,
            rnn_hidden_dim,
            num_layers=rnn_layers,
            dropout=rnn_dropout,
            batch_first=True,
        )
        self.acting_dtype = torch.float32  # of single steps' products on a CPU; bfloat16 is faster
        self._packed: Any = None

    def encode(self, inputs: Batch) -> Tensor:
        """-> [B, T, features]: each frame on its own."""
        B, T = inputs["tty_chars"].shape[:2]
        frames = {name: inputs[name].flatten(0, 1) for name in self.observations}
        cursor = frames["tty_cursor"]
        screen = self.screen_encoder(frames["tty_chars"], frames["tty_colors"], cursor)
        position = cursor.float() / cursor.new_tensor([ROWS, COLS]).float()
        stats = torch.cat([blstats_features(frames["blstats"]), position], dim=1)
        parts = [screen, self.blstats_encoder(stats).to(screen.dtype)]
        if self.use_prev_action:
            previous = inputs["prev_actions"].long().flatten()
            parts.append(self.action_embedding(previous).to(screen.dtype))
        return torch.cat(parts, dim=1).view(B, T, -1)

    def forward(self, inputs: Batch, state: Optional[RNNState] = None) -> Tuple[Tensor, RNNState]:
        features = self.encode(inputs)
        acting = features.shape[1] == 1 and not torch.is_grad_enabled() and not self.training
        if acting and features.device.type == "cpu":
            return self._step(features[:, 0], state)
        return self.rnn(features, None if state is None else tuple(state))

    def _packed_weights(self) -> List[Tuple[Tensor, Tensor]]:
        """Each layer's weights as one matrix [4H, inputs + H] and bias [4H], made anew when a
        parameter has changed."""
        versions = [(weight._version, weight.data_ptr()) for weight in self.rnn.parameters()]
        version = (self.acting_dtype, versions)
        if self._packed is not None and self._packed[0] == version:
            return self._packed[1]
        mkldnn = self.acting_dtype is torch.float32 and torch.backends.mkldnn.is_available()
        packed = []
        for weights in self.rnn.all_weights:
            w_in, w_h, b_in, b_h = weights
            weight = torch.cat([w_in, w_h], dim=1).detach().to(self.acting_dtype)
            bias = b_in.detach().to(self.acting_dtype) + b_h.detach().to(self.acting_dtype)
            if mkldnn:
                weight = weight.to_mkldnn()
                bias = bias.to_mkldnn()
            packed.append((weight, bias))
        self._packed = (version, packed)
        return packed

    def _step(self, features: Tensor, state: Optional[RNNState]) -> Tuple[Tensor, RNNState]:
        """One step of the LSTM as one matrix product a layer: nn.LSTM on a CPU packs all its
        weights at every call."""
        if state is None:
            zeros = features.new_zeros(self.rnn.num_layers, len(features), self.rnn.hidden_size)
            state = (zeros, zeros)
        h, c = state
        x = features
        hs = []
        cs = []
        for layer, (weight, bias) in enumerate(self._packed_weights()):
            inputs = torch.cat([x, h[layer]], dim=1).to(weight.dtype)
            # In float32 torch would take MKL, for few rows up to twice as slow as oneDNN; in
            # bfloat16 it takes oneDNN.
            if weight.is_mkldnn:
                gates = F.linear(inputs.to_mkldnn(), weight, bias).to_dense()
            else:
                gates = F.linear(inputs, weight, bias).to(x.dtype)
            i, f, g, o = gates.chunk(4, dim=1)  # PyTorch's order of gates
            cell = torch.sigmoid(f) * c[layer] + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(cell)
            cs.append(cell)
            hs.append(x)
        return x[:, None], (torch.stack(hs), torch.stack(cs))

    def __getstate__(self) -> Dict[str, Any]:
        # a copy need not copy 230 MB that are quickly made again
        return {**self.__dict__, "_packed": None}


# ==================================================================================================
# ===================================  EDITABLE BEGIN  =============================================
# ==================================================================================================
# Recurrent advantage-weighted regression with burn-in. The benchmark takes this block alone and
# runs it inside its own file: it names nothing from outside but torch, nn, F, np and Categorical.
import re
from dataclasses import dataclass, field, fields, replace  # noqa: F811
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from nle.nethack import ACTIONS
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

# What a chunk hands on to the next one of its rows: "stored_state" (h, c) before its last `burn_in`
# frames, "burn_in_frames" with what the backbone reads of these, "ended" [B].
States = Dict[str, Any]


def hyperparameter(default: Any, limits: Tuple[float, float], text: str) -> Any:
    """Declare one setting of AWRConfig: its default, smallest and largest value, and meaning."""
    return field(default=default, metadata={"limits": limits, "help": text})


@dataclass
class AWRConfig:
    """Hyper-parameters of the algorithm, each with its source; `config.algorithm` overrides them by
    name."""

    head_dim: int = hyperparameter(
        120, (1e-9, 1e9), "width of the shared projection; up to 122 keep the head within 267,033"
    )
    burn_in: int = hyperparameter(
        4,
        (0, 1e9),
        "steps re-run before a chunk to refresh its state (R2D2, Kapturowski et al. 2019)",
    )
    lam: float = hyperparameter(
        0.95, (0, 1), "lambda of the returns (TD(lambda); the usual value, arXiv 1506.02438)"
    )
    # Rewards are rare and of very unequal size: with AWR's own 1 and 20 a few frames make up half
    # to two thirds of a batch's effective size. On frames of a better and a worse player the
    # weights prefer neither (scripts/results/README.md).
    beta: float = hyperparameter(
        3.0,
        (1e-9, 1e9),
        "temperature: weight = exp(advantage / (beta * scale)) (AWR, arXiv 1910.00177, eq. 7)",
    )
    max_weight: float = hyperparameter(
        5.0, (1e-9, 1e9), "largest weight before normalization (AWR, section 5, has 20)"
    )
    scale_rate: float = hyperparameter(
        0.01, (1e-9, 1), "rate of the advantages' running mean square (MARWIL 2018, eq. 4)"
    )
    value_coef: float = hyperparameter(
        0.5, (0, 1e9), "weight of the value loss against the policy loss"
    )
    temperature: float = hyperparameter(
        1.0, (1e-9, 1e9), "softmax temperature of the actions sampled when acting"
    )
    average_decay: float = hyperparameter(
        0.999,
        (0, 1),
        "decay of the weights' exponential moving average (EMA), which acts (arXiv 2310.11428); "
        "0: none",
    )
    remember: bool = hyperparameter(
        True, (0, 1), "refuse corpses that may have rotted when acting (`recall`)"
    )


def awr_config(overrides: Dict[str, Any]) -> AWRConfig:
    """AWRConfig with these values. Raises ValueError for an unknown name, a wrong type or a value
    out of range."""
    known = {one.name: one for one in fields(AWRConfig)}
    for name, value in overrides.items():
        if name not in known:
            raise ValueError(f"algorithm: unknown setting {name!r}; there are {', '.join(known)}")
        kind: Any = known[name].type
        low, high = known[name].metadata["limits"]
        if type(value) not in (int, kind) or not low <= value <= high:
            wanted = f"{kind.__name__} in [{low:g}, {high:g}]"
            raise ValueError(f"algorithm: {name} must be {wanted}, not {value!r}")
    return replace(AWRConfig(), **overrides)


def check_shape(name: str, tensor: Tensor, shape: Tuple[int, ...]) -> None:
    """Raises ValueError where it is another: what is broadcast would be learned from in silence."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but {shape} was expected")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, T] where mask [B, T] is 1 (0 where nothing counts)."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def lambda_returns(
    rewards: Tensor, dones: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """TD(lambda) targets: G_t = r_t + gamma (1 - d_t) ((1 - lam) v_{t+1} + lam G_{t+1}), G_T = v_T.
    Where a frame is not in play, as behind a truncation, G_t = v_t.

    rewards, dones, mask [B, T] float; values [B, T + 1] float (no gradient flows through the
    result). Returns [B, T].
    """
    values = values.detach()
    discounts = gamma * (1.0 - dones)
    result = values[:, -1]
    targets = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = (1.0 - lam) * values[:, t + 1] + lam * result
        result = rewards[:, t] + discounts[:, t] * following
        result = torch.where(mask[:, t] > 0, result, values[:, t])
        targets.append(result)
    return torch.stack(targets[::-1], dim=1)


def advantage_weights(
    advantages: Tensor, mask: Tensor, scale: Tensor, hyper: AWRConfig
) -> Tuple[Tensor, Tensor]:
    """exp(A / (beta * scale)), clipped at `max_weight` before exp so that it stays finite, with
    mean 1 over `mask`.

    advantages, mask [B, T] float; scale [] float. -> weights [B, T], 0 where the mask is 0, and the
    share [] clipped.
    """
    exponents = advantages / (hyper.beta * scale.clamp(min=1e-6))
    limit = float(np.log(hyper.max_weight))
    weights = torch.exp(exponents.clamp(max=limit)) * mask
    clipped = masked_mean((exponents >= limit).float(), mask)
    normalisation = mask.sum().clamp(min=1.0) / weights.sum().clamp(min=1e-6)
    return weights * normalisation, clipped


def clear(state: Any, rows: Tensor) -> Any:
    """(h, c), each [L, B, H], with zeros in the rows [B] bool; None (zeros everywhere) stays
    None."""
    if state is None:
        return None
    return tuple(part.masked_fill(rows[None, :, None], 0.0) for part in state)


Shown = Tuple[bytes, int]  # attributes and turn, as a game's status lines last showed them


class Facts(NamedTuple):
    """What a game's earlier screens said and later ones do not."""

    place: Tuple[int, int]  # row and column of the hero
    kills: Dict[bytes, Tuple[int, int, int]]  # monster -> the hero's last kill: turn and place
    refused: Any  # the place where a corpse was refused last, or None


NO_FACTS = Facts((0, 0), {}, None)


class ActingState(NamedTuple):
    """What `vec_act` hands on from tick to tick for N games."""

    rnn_state: Any  # (h, c), each [L, N, H]
    seen: List[Shown]  # of each game
    facts: List[Facts]  # of each game


def games_begun(seen: List[Shown], tty_chars: Any) -> Tuple[List[bool], List[Shown]]:
    """Which of N screens [N, 24, 80] show a new game: turn 1 after a later one, or with other
    attributes than before.

    The benchmark hands on the recurrent state of the slot's game before and says nothing; menus may
    hide the lines.
    """
    begun = []
    now = []
    for (attributes, turn), screen in zip(seen, tty_chars):
        lines = np.asarray(screen[22:], dtype=np.uint8).tobytes()
        match = re.search(rb"( St:.* Ch:\d+) .* T:(\d{1,9})", lines)
        if match:
            now.append((match.group(1), int(match.group(2))))
        else:
            now.append((attributes, turn))
        shown_attributes, shown_turn = now[-1]
        differs = turn > 1 or shown_attributes != attributes
        begun.append(shown_turn == 1 and turn > 0 and differs)
    return begun, now


def moving_average(max_decay: float, average: Tensor, weight: Tensor, num_averaged: Any) -> Tensor:
    """The next value of an EMA whose decay rises to `max_decay`: 1/10, 2/11, ... Before it, at the
    first update, AveragedModel copies the weights."""
    n = int(num_averaged)
    decay = min(max_decay, n / (n + 9))
    return average.lerp(weight, 1.0 - decay)


YES, EAT, ESC = map(ACTIONS.index, (ord("y"), ord("e"), 27))
KILL = re.compile(rb"You (?:kill|destroy) the (?:poor |invisible |saddled )*([^!]+)!")
OFFER = re.compile(
    rb"There \w+ \w+ (?:\w*cursed |blessed |partly eaten )*(.+?) corpses?\b.* here;\s+eat "
)


def recall(facts: Facts, screen: Any, cursor: Any, turn: int) -> Tuple[Facts, Optional[int]]:
    """Facts after a screen [24, 80] with its cursor [2], and the action that they rule out, if any.

    YES to a corpse whose monster the hero did not kill within 50 turns, in line with where the
    hero is (AutoAscend's agent.py, `_is_corpse_editable`). Zombies leave old corpses of another
    name. EAT where a corpse was refused, until the hero moves or kills: asking takes no turn.
    """
    _, kills, refused = facts
    row, column = map(int, cursor)
    on_hero = screen[row, column] == ord("@")  # not at questions, --More-- and menus
    place = (row, column) if on_hero else facts.place
    top = np.asarray(screen[:2], dtype=np.uint8).tobytes()
    for monster in KILL.findall(top):
        kills = {**kills, monster: (turn, *place)}
        refused = None
    ruled_out = EAT if on_hero and place == refused else None
    offer = None if on_hero else OFFER.search(top)  # a question stays in sight when it is answered
    if offer and offer.group(1) not in (b"lichen", b"lizard", b"acid blob"):  # these never rot
        killed, row, column = kills.get(offer.group(1), (-50, 0, 0))
        down, right = abs(place[0] - row), abs(place[1] - column)
        if turn - killed >= 50 or (down != right and down * right > 0):
            ruled_out = YES
            refused = place
    return Facts(place, kills, refused), ruled_out


def prompt_options(tty_chars: Tensor, keys: Tensor) -> Tensor:
    """Screens [..., 24, 80] -> [..., A] float32: 1 for the actions whose keys [A] the question on
    the top line names. "What do you want to eat? [d-gk or ?*]" names d, e, f, g and k."""
    # line        e a t ?   [ d - g k   o r   ? * ]     the top line
    # inside      . . . . . . x x x x . . . . . . .     after "? [", before "]" or " or ?"
    # spans       . . . . . . . x . . . . . . . . .     a "-" between two rising keys, here d and g
    # rises       +1 at d, -1 at h (the span); +1 at g, -1 at h; +1 at k, -1 at l
    # cumulated over the keys' codes: above 0 at d, e, f, g and k
    line = tty_chars[..., 0, :].long()
    before = line.roll(1, -1)
    after = line.roll(-1, -1)
    column = torch.arange(line.shape[-1], device=line.device)
    is_space = line == ord(" ")
    is_or = is_space & (line.roll(-4, -1) == ord("?"))
    is_open = (line == ord("[")) & (line.roll(2, -1) == ord("?"))
    is_end = (line == ord("]")) | is_or
    opened = torch.where(is_open, column, -1).cummax(-1).values  # the last one so far
    ended = torch.where(is_end, column, -1).cummax(-1).values
    inside = (opened > ended) & (opened < column) & ~is_space  # "- abc": bare hands, a, b and c
    spans = inside & (line == ord("-")) & (before < after)
    first = torch.where(spans, before, line)
    last = torch.where(spans, after, line)
    rises = torch.zeros(*line.shape[:-1], 257, device=line.device)
    rises.scatter_add_(-1, first, inside.float())
    rises.scatter_add_(-1, last + 1, -inside.float())
    return (rises.cumsum(-1)[..., keys] > 0).float()


class Model(nn.Module):
    """Policy and value on the recurrent backbone: a dueling head (arXiv 1511.06581), but its two
    streams are not added up, since there are no action values."""

    advantage_square: Tensor
    keys: Tensor  # [A] that the actions send

    def __init__(self, backbone: Any, hyper: Optional[AWRConfig] = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.hyper = hyper or AWRConfig()
        # or the benchmark's, whose backbone has no index for "no action" either
        self.observations = getattr(backbone, "observations", ("tty_chars", "screen_image"))
        self.no_action = getattr(backbone, "no_action", 0)
        head_dim = self.hyper.head_dim
        self.shared = nn.Sequential(nn.Linear(backbone.rnn_hidden_dim, head_dim), nn.ReLU())
        self.policy = nn.Linear(head_dim, backbone.num_actions)
        self.value = nn.Linear(head_dim, 1)
        self.named = nn.Linear(head_dim, 1)
        keys = torch.tensor([int(key) for key in ACTIONS[: backbone.num_actions]])
        self.register_buffer("keys", keys, persistent=False)
        # Running mean of the squared advantage; 0: none seen yet. A buffer is saved like a weight
        # and is no parameter.
        self.register_buffer("advantage_square", torch.zeros(()))
        # The EMA of the weights, as OfflineAlgorithm makes it. In a list it is not a submodule, so
        # its weights are not this model's parameters.
        self.ema: List[AveragedModel] = []

    def current_model(self) -> Any:
        """Whose weights are used now: the EMA's in evaluation (games, and held-out games without
        gradient), once it has seen an update; else this model's own."""
        learning = self.training or torch.is_grad_enabled()
        if learning or not self.ema or self.ema[0].n_averaged == 0:
            return self
        return self.ema[0].module

    def head(self, core_output: Tensor, tty_chars: Tensor) -> Tuple[Tensor, Tensor]:
        """[B, T, H], [B, T, 24, 80] -> logits [B, T, A], values [B, T], in float32: half precision
        rounds away what a step changes.

        A fresh LSTM's output is some 0.02 in size and differs by a thousandth from frame to frame:
        for its first hundred updates the network would learn little but how often each action is
        taken. Normalised (without parameters, arXiv 1607.06450), it learns from the first one on.
        What it hardly learns is to answer a question with a letter that is named there: it is told,
        or the same wrong answer is given without end.
        """
        with torch.autocast(core_output.device.type, enabled=False):
            shared = self.shared(F.layer_norm(core_output.float(), core_output.shape[-1:]))
            logits = self.policy(shared) + self.named(shared) * prompt_options(tty_chars, self.keys)
            return logits, self.value(shared).squeeze(-1)

    @torch.no_grad()
    def vec_act(
        self, obs: Dict[str, np.ndarray], state: Optional[ActingState] = None, device: str = "cpu"
    ) -> Tuple[np.ndarray, ActingState]:
        """Draws an action for each of N games. obs: arrays [N, ...], prev_actions [N] among them
        -> [N] int64, state.

        Actions are drawn, not taken by argmax: greedy imitation of AutoAscend repeats itself
        without end (README).
        """
        previous = torch.as_tensor(obs["prev_actions"], device=device).long()
        if state is None:
            state = ActingState(None, [(b"", 0)] * len(previous), [NO_FACTS] * len(previous))
        begun, seen = games_begun(state.seen, obs["tty_chars"])
        rows = torch.tensor(begun, device=device)
        if self.no_action:  # our own loop says where a game begins
            rows |= previous == self.no_action
        inputs = {}
        for name in self.observations:
            inputs[name] = torch.as_tensor(obs[name], device=device)[:, None]
        inputs["prev_actions"] = previous.masked_fill(rows, self.no_action)[:, None]
        model = self.current_model()
        core_output, rnn_state = model.backbone(inputs, clear(state.rnn_state, rows))
        logits, _ = model.head(core_output, inputs["tty_chars"])
        logits = logits[:, -1] / self.hyper.temperature
        facts = [NO_FACTS if new else old for new, old in zip(rows.tolist(), state.facts)]
        for n in range(len(facts) if self.hyper.remember else 0):
            turn = seen[n][1]
            facts[n], out = recall(facts[n], obs["tty_chars"][n], obs["tty_cursor"][n], turn)
            if out == YES:  # whoever wants this corpse wants no other food
                logits[n, ESC] = logits[n, YES]
            if out is not None:
                logits[n, out] = -torch.inf
        actions = Categorical(logits=logits).sample()
        return actions.cpu().numpy(), ActingState(rnn_state, seen, facts)


class OfflineAlgorithm:
    """Recurrent advantage-weighted regression.

    The value stream learns lambda-returns; the policy stream regresses onto the data's actions,
    weighted by exp(advantage). The recurrent state is carried from chunk to chunk: it is stored as
    it was `burn_in` steps before the chunk's end, with the frames since. These burn-in frames are
    re-run without gradient before the next chunk, so that its first state comes from the current
    weights. Another head is a subclass of Model, named as `model_class`.
    """

    model_class = Model
    accepts_unknown_actions = True

    def __init__(self, backbone: nn.Module, config: Any, device: str) -> None:
        self.hyper = awr_config(getattr(config, "algorithm", {}))
        self.gamma = config.gamma
        self.model = self.model_class(backbone, self.hyper).to(device)
        self.ema: Optional[AveragedModel] = None
        if self.hyper.average_decay > 0:
            average = partial(moving_average, self.hyper.average_decay)
            self.ema = AveragedModel(self.model, avg_fn=average).eval()
            self.model.ema = [self.ema]

    def parameters(self) -> List[nn.Parameter]:
        return list(self.model.parameters())

    def after_gradient_step(self) -> None:
        """Update the EMA. No target network is needed because the value function evaluates the
        behavior policy."""
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def train_step(
        self, batch: Dict[str, Tensor], prev_actions: Tensor, rnn_states: States
    ) -> Tuple[Tensor, States, Dict[str, Tensor]]:
        """One chunk of T steps and the frame after it -> (loss [], new rnn_states, info). Runs
        under no_grad as well.

        batch [B, T + 1, ...]; prev_actions [B, 1]: the action before the first frame; rnn_states:
        {} at first. Games may begin anywhere in a chunk. Without our loader's `mask` every frame
        is in play, and without its `starts` a game begins at frame 0 if the chunk before ended one.
        """
        B, frames = batch["actions"].shape
        shapes = {name: (B, frames, *batch[name].shape[2:]) for name in self.model.observations}
        shapes.update(dict.fromkeys(("rewards", "dones", "mask"), (B, frames)), starts=(B,))
        for name, shape in shapes.items():
            if name in batch:
                check_shape(f"batch[{name!r}]", batch[name], shape)
        check_shape("prev_actions", prev_actions, (B, 1))
        actions = batch["actions"].long()
        T = frames - 1
        in_play = batch.get("mask", torch.ones_like(actions)) > 0  # [B, T + 1]
        known = in_play & (actions < self.model.backbone.num_actions)
        ended = batch["dones"] > 0
        begun: Tensor = rnn_states.get("ended", torch.ones_like(ended[:, 0]))
        begun = batch.get("starts", begun)
        # A game's end is followed by the next game or by padding. Padding needs no clean state, and
        # each place where one is cleared is a further call of the backbone.
        begins = torch.cat([begun[:, None], ended[:, :-1] & in_play[:, 1:]], dim=1)
        previous = actions[:, :-1].masked_fill(~known[:, :-1], self.model.no_action)
        previous = torch.cat([prev_actions.long(), previous], dim=1)
        inputs = {name: batch[name] for name in self.model.observations}
        inputs["prev_actions"] = previous.masked_fill(begins, self.model.no_action)

        store_at = T - min(self.hyper.burn_in, T)
        state = self._burn_in(rnn_states)
        core_output, stored_state = self._unroll(inputs, begins, state, store_at)
        logits, values = self.model.current_model().head(core_output, inputs["tty_chars"])
        check_shape("the head's logits", logits, (B, frames, self.model.backbone.num_actions))
        check_shape("the head's values", values, (B, frames))
        loss, info = self._loss(
            logits[:, :T],
            values,
            actions[:, :T].masked_fill(~known[:, :T], 0),
            batch["rewards"].float()[:, :T],
            ended.float()[:, :T],
            in_play.float()[:, :T],
            known.float()[:, :T],
        )

        new_states: States = {"ended": ended[:, T - 1]}
        if stored_state is not None:
            new_states["stored_state"] = tuple(part.detach() for part in stored_state)
        if store_at < T:  # copies, since a slice would keep the whole batch alive
            frames_since = {name: value[:, store_at:T].clone() for name, value in inputs.items()}
            frames_since["begins"] = begins[:, store_at:T].clone()
            new_states["burn_in_frames"] = frames_since
        return loss, new_states, info

    @torch.no_grad()
    def _burn_in(self, rnn_states: States) -> Any:
        """The state after the chunk before: the stored one, brought up to date over the frames
        since."""
        state = rnn_states.get("stored_state")
        if "burn_in_frames" not in rnn_states:
            return state
        inputs = dict(rnn_states["burn_in_frames"])
        begins = inputs.pop("begins")
        _, state = self._unroll(inputs, begins, state, begins.shape[1])
        # Until 2.10 torch's autocast kept the weights that it had cast here without gradient for
        # the pass with it.
        torch.clear_autocast_cache()
        return state

    def _unroll(
        self, inputs: Dict[str, Tensor], begins: Tensor, state: Any, store_at: int
    ) -> Tuple[Tensor, Any]:
        """Runs frames [B, n, ...] through the backbone, in pieces that end where a row's game
        begins (begins [B, n]), its state cleared there.

        -> core_output [B, n, H], and the state before frame `store_at`, n for the one after all.
        """
        frames = begins.shape[1]
        columns = begins[:, 1:].any(dim=0).nonzero().flatten() + 1
        cuts = sorted({0, store_at, *columns.tolist(), frames})
        outputs = []
        stored = None
        for start, end in zip(cuts, cuts[1:]):
            state = clear(state, begins[:, start])
            if start == store_at:
                stored = state
            piece = {name: value[:, start:end].contiguous() for name, value in inputs.items()}
            output, state = self.model.current_model().backbone(piece, state)
            outputs.append(output)
        if store_at == frames:
            stored = state
        return torch.cat(outputs, dim=1), stored

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
        """logits [B, T, A], values [B, T + 1]; actions (0 where unknown), rewards, dones, mask (in
        play) and known (in play, with a known action) [B, T] -> loss [], metrics."""
        targets = self._targets(rewards, dones, values, mask)
        advantages = targets - values[:, :-1].detach()
        weights, clipped = self._weights(advantages, known)
        log_probs = F.log_softmax(logits, dim=-1)
        nll = -log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # [B, T] nats
        policy_loss = self._policy_loss(nll, weights, known)
        value_loss = self._value_loss(values[:, :-1], targets, mask)
        loss = policy_loss + self.hyper.value_coef * value_loss
        info = {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "loss_per_action": masked_mean(nll.detach(), known),
            **self._metrics(log_probs, actions, weights, known),
            "known_actions": known.mean(),
            "frames_in_play": mask.mean(),
            "value_mean": masked_mean(values[:, :-1].detach(), mask),
            "weight_clipped": clipped,
        }
        return loss, info

    def _targets(self, rewards: Tensor, dones: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """What the value learns, [B, T]."""
        return lambda_returns(rewards, dones, values, mask, self.gamma, self.hyper.lam)

    def _weights(self, advantages: Tensor, known: Tensor) -> Tuple[Tensor, Tensor]:
        """Weights of the frames in the policy's loss, [B, T], and the clipped fraction []."""
        model = self.model
        if torch.is_grad_enabled():  # held-out games must leave no trace
            square = masked_mean(advantages**2, known)
            running = torch.lerp(model.advantage_square, square, self.hyper.scale_rate)
            model.advantage_square = torch.where(model.advantage_square > 0, running, square)
        return advantage_weights(advantages, known, model.advantage_square.sqrt(), self.hyper)

    def _policy_loss(self, nll: Tensor, weights: Tensor, known: Tensor) -> Tensor:
        """-E[w log pi(a|s)] (AWR, arXiv 1910.00177, equation 7)."""
        return masked_mean(weights * nll, known)

    def _value_loss(self, values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """The squared error up to 1, linear beyond (Huber). The benchmark divides its first rewards
        by a running scale that is still near zero: they come out at the clip, and squared their
        errors would drown the policy's loss."""
        return masked_mean(2.0 * F.huber_loss(values, targets, reduction="none"), mask)

    @torch.no_grad()
    def _metrics(self, log_probs: Tensor, actions: Tensor, weights: Tensor, known: Tensor) -> Any:
        correct = (log_probs.argmax(dim=-1) == actions).float()
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        effective = weights.sum() ** 2 / (weights**2).sum().clamp(min=1e-6)
        return {
            "accuracy": masked_mean(correct, known),
            "entropy": masked_mean(entropy, known),
            "advantage_scale": self.model.advantage_square.sqrt(),
            "weight_max": weights.max(),
            "effective_sample_size": effective / known.sum().clamp(min=1.0),
        }


# ==================================================================================================
# ===================================  EDITABLE END  ===============================================
# ==================================================================================================


# ==================================================================================================
# Evaluation on held-out games
# ==================================================================================================
def known_actions(batch: Batch) -> Tensor:
    """bool [B, T]: frames in play whose action is known."""
    return batch["mask"][:, :-1] & (batch["actions"][:, :-1] < NUM_ACTIONS)


def check_actions(algorithm: Any, loader: ChunkLoader) -> None:
    """Raises UserError where games have unknown actions and the algorithm does not say that it
    expects them: it would use 121 as the index of an action."""
    unknown = sum(int(store.index["unknown_keys"].sum()) for store in loader.games.stores)
    if unknown and not getattr(algorithm, "accepts_unknown_actions", False):
        raise UserError(
            f"the games have {unknown:,} frames without a known action, which the algorithm does "
            "not handle: let it skip frames with actions >= 121 and set accepts_unknown_actions = "
            "True in its class"
        )


def call_train_step(
    algorithm: Any, batch: Batch, prev_actions: Any, rnn_states: Any, precision: Any
) -> Tuple[Tensor, Any, Metrics]:
    """The algorithm's train_step, under autocast unless `precision` is None. Raises UserError where
    it refuses the batch, as a loader or a head of another make is refused."""
    try:
        device = prev_actions.device.type
        with torch.autocast(device, precision, enabled=precision is not None):
            return algorithm.train_step(batch, prev_actions, rnn_states)
    except ValueError as error:
        raise UserError(f"the algorithm's train_step refuses its batch: {error}") from error


@torch.no_grad()
def evaluate_heldout(
    algorithm: Any,
    loader: ChunkLoader,
    max_frames: int,
    device: torch.device,
    precision: Optional[torch.dtype] = None,
) -> Metrics:
    """Means of the metrics of the algorithm's own train_step over held-out chunks: of those named
    value_... over frames in play, of all others over known actions, whose number is `frames`."""
    rnn_states: Any = {}
    sums: Metrics = {}
    algorithm.model.eval()
    steps = min(
        loader.sampler.steps, -(-max_frames // (loader.sampler.rows * loader.config.seq_len))
    )
    bar = progress_bar(iterable=range(steps), desc="held-out games", unit="batch", leave=False)
    for step in bar:
        stop_if_asked()
        batch, prev_actions = to_device(loader.batch_at(step), device)
        _, rnn_states, info = call_train_step(algorithm, batch, prev_actions, rnn_states, precision)
        frames = float(known_actions(batch).sum())
        frames_in_play = float(batch["mask"][:, :-1].sum())
        terms = {"frames": frames, "value_frames": frames_in_play}
        for name, value in info.items():
            terms[name] = float(value) * (frames_in_play if is_of_value(name) else frames)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term
    algorithm.model.train()

    parts = gather(sums)
    total = {name: sum(part[name] for part in parts) for name in sums}
    frames = total.pop("frames")
    frames_in_play = total.pop("value_frames")
    means: Metrics = {}
    for name, term in total.items():
        means[name] = term / max(frames_in_play if is_of_value(name) else frames, 1.0)
    return {**means, "frames": frames}


def is_of_value(name: str) -> bool:
    return name.startswith("value_")


# ==================================================================================================
# Evaluation in the game
# ==================================================================================================
# nle.dataset shows line-drawing bytes as plain characters, the live terminal does not. They appear
# only where the player typed such a byte himself; with this table live screens equal recorded ones
# there too.
LINE_DRAWING = bytes.fromhex("b0b1f0f1 b3b4c3fe bfc0c1c2c4c5d9da f4 f7 fa")
PLAIN_CHARS = np.frombuffer(bytes.maketrans(LINE_DRAWING, b"####||||--------{}."), np.uint8)
ENDS = ("died", "no progress", "step limit")  # of a game; "died" also if it was quit or won
NO_PROGRESS_STEPS = 1000  # the benchmark's: a game ends when its turn stands still for so long


def restore_handlers() -> None:
    """Once a game is over, NetHack has these signals ignored for the rest of the process."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGHUP, signal.SIGXCPU):
            handler = signal.getsignal(number)
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)


def check_recordable(folder: Path) -> None:
    """Raises UserError for a folder in which NLE cannot record: it formats the path by %."""
    if "%" in str(folder.absolute()):
        raise UserError(f"NLE cannot record games below {folder}: its path has a %; give another")


class NetHackGame:
    """A game as in the NetHack Challenge, but seeded; the same on nle 0.9 (gym) and 1.x
    (gymnasium).

    Observations equal those of recorded games: fresh arrays, or always those given as `into`.
    `savedir` records games. `observation_keys`: what NLE is asked for, ours among them; it lies in
    `env.unwrapped.last_observation`, in this order.
    """

    def __init__(
        self,
        character: str,
        savedir: Any = None,
        max_steps: int = 1_000_000,
        into: Any = None,
        observation_keys: Sequence[str] = OBSERVATIONS,
    ) -> None:
        options: Any = dict(
            character=character,
            actions=nethack.ACTIONS,
            observation_keys=observation_keys,
            allow_all_modes=True,
            allow_all_yn_questions=True,
            penalty_step=0.0,
            penalty_time=0.0,
            max_episode_steps=10**9,
            savedir=savedir,
            save_ttyrec_every=1 if savedir else 0,
        )
        if "fix_moon_phase" in inspect.signature(NLE.__init__).parameters:
            options["fix_moon_phase"] = True  # otherwise the date enters the game
        self.env = NetHackScore(**options)
        self.max_steps = max_steps
        self.into = into
        self.steps = self.score = self.depth = self.max_depth = self.level = self.turn = 0
        self.still = 0  # steps since the turn last changed
        self.end = ""  # one of ENDS, once the game is over

    def reset(self, core_seed: int, disp_seed: int) -> Observations:
        """Begins the game of these two seeds."""
        # holds for one game only
        self.env.unwrapped.seed(core=core_seed, disp=disp_seed, reseed=False)
        raw = self.env.reset()
        if isinstance(raw, tuple):
            raw = raw[0]
        # The clock's time, which enters games with shopkeepers, in this game's own copy of NetHack.
        library = ctypes.CDLL(self.env.unwrapped.nethack.dlpath)
        ctypes.c_long.in_dll(library, "ubirthday").value = 0
        # NLE loads it anew for the next game
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
        self.steps = self.score = self.still = self.max_depth = 0
        self.end = ""
        self._note(raw["blstats"].tolist())
        return self._observe(raw)

    def _note(self, blstats: List[int]) -> None:
        self.turn = blstats[nethack.NLE_BL_TIME]
        self.level = blstats[nethack.NLE_BL_XP]
        self.depth = blstats[nethack.NLE_BL_DEPTH]
        self.max_depth = max(self.max_depth, self.depth)

    def result(self, number: int) -> "GameResult":
        """Of a game that has ended. NetHack's own log has the cause of a death."""
        cause = self.end
        if self.end == "died":
            env = self.env.unwrapped
            (log,) = Path(env.savedir or env.nethack._vardir).glob("*xlogfile")
            cause = parse_xlogfile(log)[-1].get("death", self.end)
        played = (self.score, self.depth, self.turn, self.steps, self.end)
        return GameResult(number, *played, self.max_depth, self.level, cause)

    def step(self, action: int) -> Tuple[Observations, float, bool, Dict[str, Any]]:
        """-> obs, reward (difference of the in-game score), done, NLE's info."""
        raw, reward, over, *_, info = self.env.step(int(action))
        self.steps += 1
        self.score += int(reward)
        if not over:  # the screens after a game's end have all-zero blstats
            turn = self.turn
            self._note(raw["blstats"].tolist())
            self.still = self.still + 1 if turn == self.turn else 0
        if over:
            self.end = "died"
            restore_handlers()
        elif self.still >= NO_PROGRESS_STEPS:
            self.end = "no progress"
        elif self.steps >= self.max_steps:
            self.end = "step limit"
        return self._observe(raw), float(reward), self.end != "", info

    def _observe(self, raw: Observations) -> Observations:
        """Copies, since NLE writes the next frame into the same arrays."""
        obs = self.into or empty_observations()
        # without a mode numpy buffers the result
        PLAIN_CHARS.take(raw["tty_chars"], out=obs["tty_chars"], mode="clip")
        obs["tty_colors"][:] = raw["tty_colors"]
        obs["tty_cursor"][:] = raw["tty_cursor"]
        obs["blstats"][:] = read_blstats(obs["tty_chars"][None])
        return obs

    def close(self) -> None:
        self.env.close()


def empty_observations(*axes: int) -> Observations:
    """Zeros under every observation's name, with these axes before its own."""
    shapes = OBSERVATION_SHAPES.items()
    return {name: np.zeros((*axes, *shape), dtype) for name, (dtype, *shape) in shapes}


# Progression, the metric of BALROG (arXiv 2411.13543): the probability of winning a game that has
# reached this level, estimated from human games. The values are those of nle-progress (MIT,
# github.com/BartekCupial/nle-progress), rounded to 5 decimals.
DEPTH_PROGRESSION = np.ravel(  # depths 1 to 50
    (
        (0.0, 0.01539, 0.01754, 0.02122, 0.02648, 0.03543, 0.04846, 0.06958, 0.09771, 0.12559),
        (0.16127, 0.20613, 0.2566, 0.29247, 0.30881, 0.32491, 0.34008, 0.35265, 0.36549, 0.37896),
        (0.39294, 0.40832, 0.42584, 0.44518, 0.46638, 0.50676, 0.55436, 0.60156, 0.6465, 0.69131),
        (0.71011, 0.71765, 0.72321, 0.72844, 0.73278, 0.73685, 0.74215, 0.74713, 0.75373, 0.76104),
        (0.76741, 0.77253, 0.77716, 0.78126, 0.7859, 0.78903, 0.79297, 0.79674, 0.80185, 0.8068),
    )
)
LEVEL_PROGRESSION = np.ravel(  # experience levels 1 to 30
    (
        (0.0, 0.01848, 0.02081, 0.02416, 0.02911, 0.03689, 0.05076, 0.07454, 0.11705, 0.1791),
        (0.2548, 0.33265, 0.41443, 0.49404, 0.57788, 0.62612, 0.65628, 0.68102, 0.70153, 0.71745),
        (0.7287, 0.7371, 0.74434, 0.75134, 0.75855, 0.76422, 0.77034, 0.77598, 0.77833, 0.78046),
    )
)


def progression(max_depth: int, level: int) -> float:
    """Progression of a game, 0 to 1: the larger value of its deepest level and its experience level
    at the end. Misses the milestones of the quest and the planes, and levels that were lost."""
    depth = DEPTH_PROGRESSION[min(max_depth, len(DEPTH_PROGRESSION)) - 1]
    return float(max(depth, LEVEL_PROGRESSION[level - 1]))


class GameResult(NamedTuple):
    game: int  # its number k; its seeds derive from eval_seed and k
    score: float
    depth: int
    turns: int
    length: int  # actions
    end: str  # one of ENDS
    max_depth: int  # deepest level
    level: int  # experience level
    cause: str  # of death, in NetHack's words; for a game cut short its end

    @property
    def progression(self) -> float:
        return progression(self.max_depth, self.level)


def game_seeds(eval_seed: int, game: int) -> Tuple[int, int]:
    core = derived_seed(eval_seed, game, 0) % 2**31
    disp = derived_seed(eval_seed, game, 1) % 2**31
    return core, disp


def vec_evaluate(
    actor: Any,
    character: str,
    config: TrainConfig,
    device: torch.device,
    savedir: Optional[Path] = None,
) -> List[GameResult]:
    """Plays games 0 .. eval_episodes - 1 of the character, recorded below `savedir`, -> results.

    Slot s plays games s, s + slots, ..., each from seeds of its own, with one model call per step
    of all slots. Of several processes each plays the games of its share of the slots, but draws
    actions for all rows, so that games do not depend on the number of processes.
    """
    slots = config.eval_processes
    num_episodes = config.eval_episodes
    # A matrix product's bits depend on its number of rows, but not at multiples of 8.
    rows = -(-slots // 8) * 8
    obs = empty_observations(rows)
    obs["prev_actions"] = np.full(rows, NO_ACTION)
    games: Dict[int, NetHackGame] = {}  # of each slot
    playing: Dict[int, int] = {}  # slot -> number of its game

    def begin(slot: int, number: int) -> None:
        """The slot's next game, if there is one."""
        obs["prev_actions"][slot] = NO_ACTION
        if number < num_episodes:
            games[slot].reset(*game_seeds(config.eval_seed, number))
            playing[slot] = number
        else:
            del playing[slot]
            for name in OBSERVATIONS:
                obs[name][slot] = 0

    results = []
    rnn_states = None
    step = 0
    actor.eval()
    bar = progress_bar(total=num_episodes, desc=f"playing {character}", leave=False)
    with ExitStack() as stack:
        stack.callback(bar.close)
        for slot in range(min(slots, num_episodes))[RANK::WORLD]:
            screen = {name: obs[name][slot] for name in OBSERVATIONS}
            folder = savedir and str(savedir / str(slot))
            if folder:  # an evaluation that was killed may have left one
                shutil.rmtree(folder, ignore_errors=True)
            games[slot] = NetHackGame(character, folder, config.eval_max_steps, into=screen)
            stack.callback(games[slot].close)
            begin(slot, slot)
        while max_over_processes(len(playing)):
            stop_if_asked()
            torch.manual_seed(derived_seed(config.eval_seed, step))  # sampled actions depend on it
            actions, rnn_states = actor.vec_act(obs, rnn_states, device=str(device))
            step += 1
            for slot, number in list(playing.items()):
                obs["prev_actions"][slot] = actions[slot]
                games[slot].step(actions[slot])
                if games[slot].end:
                    results.append(games[slot].result(number))
                    bar.update()
                    begin(slot, number + slots)
    actor.train()
    return sorted(result for part in gather(results) for result in part)


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, resamples: int = 10_000
) -> Tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over games."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize_games(results: Sequence[GameResult], character: str) -> Metrics:
    """Metrics of one character's games, under the benchmark's names where it has them (reward_*,
    depth_*)."""
    scores = np.array([result.score for result in results])
    depths = np.array([result.depth for result in results])
    metrics = {
        "normalized_score": scores / AUTOASCEND_MEAN_SCORE[character],
        "progression": np.array([result.progression for result in results]),
    }
    summary = {}
    for name, values in metrics.items():
        summary[name] = values.mean()
        summary[f"{name}_low"], summary[f"{name}_high"] = bootstrap_interval(values)
    for name in ("turns_mean", "length_mean", "max_depth_mean", "level_mean"):
        summary[name] = np.mean([getattr(result, name[:-5]) for result in results])
    for name in ("median", "mean", "std", "min", "max"):
        statistic = getattr(np, name)
        summary[f"reward_{name}"] = statistic(scores)
        summary[f"depth_{name}"] = statistic(depths)
    for end in ENDS:
        name = end.replace(" ", "_")
        summary[f"end_{name}"] = np.mean([result.end == end for result in results])
    return {name: float(value) for name, value in summary.items()}


def geometric_mean(scores: Sequence[float]) -> float:
    """Of characters' scores, 0 if any is not above 0. (The task squashes each score before it takes
    this mean.)"""
    return math.prod(scores) ** (1 / len(scores)) if min(scores) > 0 else 0.0


def save_games(prefix: Path, character: str, results: Sequence[GameResult], eval_seed: int) -> None:
    """Write <prefix>_games.csv with all that is known of each game, in the games' order."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    seeds = ["core_seed", "disp_seed"]
    writer.writerow(["character", *GameResult._fields, "normalized_score", "progression", *seeds])
    for result in results:
        normalized = result.score / AUTOASCEND_MEAN_SCORE[character]
        computed = (normalized, result.progression, *game_seeds(eval_seed, result.game))
        writer.writerow([character, *result, *computed])
    path = prefix.with_name(f"{prefix.name}_games.csv")
    write_atomically(path, table.getvalue().encode())


def keep_replays(
    savedir: Path, prefix: Path, results: Sequence[GameResult], config: TrainConfig
) -> None:
    """Of the games recorded below `savedir` keeps `eval_replays` as <prefix>_game<k>.ttyrec3.bz2,
    evenly spaced by score from the best to the worst: one is the best."""
    ranked = sorted(results, key=lambda result: result.score)
    count = min(config.eval_replays, len(ranked))
    for rank in np.linspace(len(ranked) - 1, 0, count).round().astype(int):
        number = ranked[rank].game
        slot = savedir / str(number % config.eval_processes)
        (path,) = slot.glob(f"nle.*.{number // config.eval_processes}.ttyrec3.bz2")
        os.replace(path, prefix.with_name(f"{prefix.name}_game{number}.ttyrec3.bz2"))


def evaluate_games(
    model: Any, config: TrainConfig, device: torch.device, prefix: Path
) -> Tuple[Metrics, List[Any]]:
    """Plays every character's games, writes their files as <prefix>_<character>_..., prints scores
    -> metrics, and pairs of a character and its results."""
    metrics: Metrics = {}
    scores: Metrics = {}
    games = []
    for character in config.characters:
        files = prefix.with_name(f"{prefix.name}_{character}")
        savedir = prefix.with_name(f".{files.name}_replays") if config.eval_replays else None
        with ExitStack() as stack:
            if savedir:  # what is not kept goes, also if a signal stops the games
                stack.callback(shutil.rmtree, savedir, ignore_errors=True)
            results = vec_evaluate(model, character, config, device, savedir)
            games.append((character, results))
            if RANK == 0:
                save_games(files, character, results, config.eval_seed)
            if RANK == 0 and savedir:
                keep_replays(savedir, files, results, config)
        summary = summarize_games(results, character)
        score = summary["normalized_score"]
        say_metrics(character, summary)
        say(f"D4RL score: {score:.6f}")  # what the benchmark reads
        group = f"{character}/" if len(config.characters) > 1 else ""
        for name, value in summary.items():
            metrics[group + name] = value
        scores[f"normalized_score_{character.replace('-', '_')}"] = score
    scores = {"normalized_score": geometric_mean(list(scores.values())), **scores}
    say_metrics("TEST_METRICS", scores)
    for name, score in scores.items():
        metrics[f"eval/{name}"] = score
    return metrics, games


# ==================================================================================================
# A run's folder and its files
# ==================================================================================================
CHECKPOINT_FORMAT = 2  # of all that playing needs
RUN_FORMAT = 3  # of what going on needs beside it


def find_checkpoints(folder: Path) -> List[Path]:
    """last.prev.pt and last.pt, as far as they are there."""
    return sorted(folder.glob("last.*pt"))


def open_folder(first: Path, resume: Any) -> Tuple[Path, int]:
    """`first`, or where it exists `first-2`, `first-3`, ...: a new one. With `resume` the newest
    that holds a checkpoint, or if none does the newest; or the folder that it names. -> folder, and
    the descriptor of a lock on it."""
    folder = first
    there = []
    while folder.exists():
        there.append(folder)
        folder = first.with_name(f"{first.name}-{len(there) + 1}")
    if isinstance(resume, str):
        there = [expand(resume)]
    begun = [one for one in there if find_checkpoints(one)]
    if resume and there:
        folder = (begun or there)[-1]
    try:
        folder.mkdir(parents=True, exist_ok=bool(resume))
        lock = os.open(folder, os.O_RDONLY)
        lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, lock
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}, or it is in use by another run ({error.strerror}); give "
            "another --name or --checkpoints_path"
        ) from None


@contextmanager
def run_folder(first: Path, resume: Any = False) -> Iterator[Path]:
    """The folder that `open_folder` finds, locked; the same one in all processes. A start that
    failed leaves no folder behind."""
    lock: Optional[int] = None
    folder = first
    if RANK == 0:
        folder, lock = open_folder(first, resume)
    folder = gather(folder)[0]
    try:
        yield folder
    finally:
        if lock is not None:
            written = {path.name for path in folder.iterdir() if path.stat().st_size}
            if written <= {"config.yaml", "config.json", "wandb"}:
                shutil.rmtree(folder)
            os.close(lock)


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """A checkpoint's content. Raises UserError for one that is truncated, damaged or foreign."""
    if path.is_dir():
        found = ", ".join(sorted(file.name for file in path.glob("*.pt")))
        raise UserError(f"{path} is a folder; give a checkpoint: {found or 'it holds none'}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at its checksums
            if archive.testzip() is not None:
                raise ValueError("its checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        if content["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is not {CHECKPOINT_FORMAT}")
        return content
    except Exception as error:  # torch reports damage by many types
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__} {str(error)[:120]}); "
            "if it is damaged, remove it: a run goes on from its last.prev.pt"
        ) from None


def cut_metrics(path: Path, step: int, evaluated: int) -> None:
    """Keeps the rows up to `step`, of evaluations those up to `evaluated`; later ones, and a last
    line that was cut short, are dropped: they are written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            known = evaluated if row.get("kind") == "evaluation" else step
            if row["step"] <= known:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def start_logging(config: TrainConfig, folder: Path, progress: "Progress") -> RunLogger:
    """From here on files are changed."""
    if RANK == 0:
        write_atomically(folder / "config.yaml", pyrallis.dump(config).encode())
        write_atomically(folder / "config.json", describe_run(config))
        cut_metrics(folder / "metrics.jsonl", progress.step, progress.evaluated)
    logger = RunLogger(config, folder, progress.wandb_id)
    if logger.run is not None:
        progress.wandb_id = logger.run.id
    return logger


def describe_run(config: TrainConfig) -> bytes:
    """config.json: what is needed to know how a result came about."""
    script = Path(__file__).resolve()
    # by the shell, since there may be no git
    git = subprocess.run(
        "git rev-parse HEAD", cwd=script.parent, capture_output=True, text=True, shell=True
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    description = {
        "config": asdict(config),
        "command": sys.argv,
        "commit": git.stdout.strip(),
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nle": nle.__version__,
        },
        "hardware": {
            "device": device,
            "cores": CORES,
            "threads": torch.get_num_threads(),
            "processes": WORLD,
        },
    }
    return json.dumps(description, indent=1).encode()


# ==================================================================================================
# The run: set up, loop, score
# ==================================================================================================
def choose_device(config: TrainConfig) -> torch.device:
    """Each of several processes on a machine takes a GPU of its own."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number = int(config.device.partition(":")[2] or LOCAL_RANK)
    found = torch.cuda.device_count()
    if number >= found:
        raise UserError(f"device is {config.device}, but torch finds {found} CUDA GPUs")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_precision(config: TrainConfig, device: torch.device) -> Optional[torch.dtype]:
    """The type of autocast's matrix products, or None for float32 throughout. (Before compute
    capability 8 a GPU only imitates bfloat16.)"""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if config.precision == "bf16" or (config.precision == "auto" and has_bf16):
        return torch.bfloat16
    return None


def benchmark_names() -> Dict[str, Any]:
    """What the benchmark's own file gives a block without an import."""
    import uuid

    import wandb
    from tqdm.auto import trange

    return dict(
        os=os,
        sys=sys,
        random=random,
        uuid=uuid,
        wandb=wandb,
        torch=torch,
        nn=nn,
        F=F,
        np=np,
        pyrallis=pyrallis,
        deepcopy=deepcopy,
        dataclass=dataclass,
        asdict=asdict,
        Optional=Optional,
        Dict=Dict,
        Tuple=Tuple,
        Any=Any,
        List=List,
        tqdm=tqdm,
        trange=trange,
        Categorical=Categorical,
        LSTM_HIDDEN=Tuple[Tensor, Tensor],
        UPDATE_INFO=Dict[str, Any],
        DEVICE="cuda" if torch.cuda.is_available() else "cpu",
        TrainConfig=TrainConfig,
        ModelBackbone=ModelBackbone,
        soft_update=soft_update,
        asymmetric_l2_loss=asymmetric_l2_loss,
    )


def load_submission(path: str) -> Any:
    """A Python file as a module with `Model` and `OfflineAlgorithm`. If it has the two banners, the
    EDITABLE block between them is the module.

    It may import helpers that lie next to it. Without an import it knows the names that the
    benchmark's own file gives a block, and no others.
    """
    spec: Any = importlib.util.spec_from_file_location("submission", path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(benchmark_names())
    sys.modules["submission"] = module  # dataclasses look their module up
    sys.path.append(str(Path(path).parent))
    try:
        with tokenize.open(path) as file:  # as Python reads it: a byte-order mark, a coding line
            text = file.read()
        parts = re.split(r"(?m)^# =+ +EDITABLE (?:BEGIN|END) +=+$", text)
        if len(parts) == 3:  # line numbers stay right
            text = "\n" * parts[0].count("\n") + parts[1]
        exec(compile(text, path, "exec"), vars(module))
        module.Model, module.OfflineAlgorithm  # noqa: B018  both must be there
    except (Exception, SystemExit) as error:
        raise UserError(
            f"the submission {path} cannot be used: {type(error).__name__}: {error}"
        ) from error
    return module


def hash_of_submission(config: TrainConfig) -> str:
    """Of the file's text; empty for this file's own block."""
    if not config.submission:
        return ""
    return hashlib.sha256(Path(config.submission).read_bytes()).hexdigest()


def make_algorithm(config: TrainConfig, device: torch.device) -> Any:
    """The submission's OfflineAlgorithm on a fresh backbone. Raises UserError for wrong algorithm
    settings."""
    algorithm_class = OfflineAlgorithm
    if config.submission:
        algorithm_class = load_submission(config.submission).OfflineAlgorithm
    backbone = ModelBackbone(
        action_dim=NUM_ACTIONS,
        rnn_hidden_dim=config.rnn_hidden_dim,
        rnn_layers=config.rnn_layers,
        rnn_dropout=config.rnn_dropout,
        use_prev_action=config.use_prev_action,
    ).to(device)
    if config.eval_precision == "bf16":
        backbone.acting_dtype = torch.bfloat16
    try:
        algorithm = algorithm_class(backbone=backbone, config=config, device=str(device))
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.algorithm and not hasattr(algorithm, "hyper"):
        raise UserError(
            f"the submission {config.submission} takes no settings, but algorithm is "
            f"{config.algorithm}"
        )
    return algorithm


def start_algorithm(config: TrainConfig, device: torch.device) -> Any:
    """A run's, with the weights of `init_from`, if any; layers that it has not keep their own, and
    are named. Raises UserError where sizes differ."""
    algorithm = make_algorithm(config, device)
    if config.init_from:
        path = expand(config.init_from)
        weights = read_checkpoint(path)["model"]
        try:
            missing = algorithm.model.load_state_dict(weights, strict=False).missing_keys
        except RuntimeError as error:
            raise UserError(f"{path} does not fit; give its sizes ({str(error)[:300]})") from None
        fresh = [name for name, _ in algorithm.model.named_parameters() if name in missing]
        say(f"begins with the weights of {path}; fresh layers: {', '.join(fresh) or 'none'}")
    return algorithm


def learning_rate_at(config: TrainConfig, transitions: int) -> float:
    """Warm-up, then constant or cosine down to a tenth. Counted in transitions, so the same at any
    batch size."""
    rate = config.learning_rate
    if transitions < config.warmup_transitions:
        rate *= transitions / config.warmup_transitions
    if config.lr_schedule == "constant":
        return rate
    total = config.update_steps * config.batch_size * config.seq_len * WORLD
    progressed = min(1.0, transitions / total)
    return rate * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progressed)))


def heldout_loss(metrics: Metrics) -> float:
    """The loss that best.pt is chosen by; infinite without held-out games, so that a run without
    them has no best.pt."""
    loss: Any = metrics.get("heldout/loss_per_action", metrics.get("heldout/loss", math.inf))
    return loss


TIMES = ("times/batch_loading_cpu", "times/forward_pass", "times/backward_pass")  # seconds


@dataclass
class Progress:
    """How far a run has come: kept in last.pt."""

    step: int = 0  # updates made
    skipped: int = 0  # updates among them whose gradient was not finite
    evaluated: int = 0  # step of the last evaluation
    best: float = math.inf  # lowest held-out loss
    wandb_id: Optional[str] = None


@dataclass
class Run:
    """What a training run consists of. `train` sets it up and shows the loop."""

    config: TrainConfig
    device: torch.device
    precision: Optional[torch.dtype]
    algorithm: Any
    optimizer: torch.optim.Optimizer
    loader: ChunkLoader
    heldout: Optional[ChunkLoader]  # None without held-out games
    submission_sha256: str  # of the file as it was loaded
    folder: Path = Path()
    progress: Progress = field(default_factory=Progress)
    rnn_states: Any = field(default_factory=dict)
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(len(TIMES)))  # since the last row
    logged: int = 0  # step of the last row

    @property
    def position(self) -> Metrics:
        return position_at(self.config, self.progress.step)


def position_at(config: TrainConfig, step: int) -> Metrics:
    return {"step": step, "transitions": step * config.batch_size * config.seq_len * WORLD}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)


def make_run(config: TrainConfig) -> Run:
    """All of a new run but its folder. Reads the data, and builds its stores where needed."""
    device = choose_device(config)
    set_seed(config.train_seed)
    algorithm = start_algorithm(config, device)
    loader, heldout = load_data(config)
    check_actions(algorithm, loader)
    return Run(
        config=config,
        device=device,
        precision=choose_precision(config, device),
        algorithm=algorithm,
        optimizer=make_optimizer(algorithm.model, config),
        loader=loader,
        heldout=heldout,
        submission_sha256=hash_of_submission(config),
    )


# --- checkpoints
def save_weights(path: Path, algorithm: Any, config: TrainConfig, step: int) -> None:
    """best.pt, <step>.pt: what is needed to play."""
    content = playing_state(algorithm, config, step)
    write_atomically(path, to_bytes(partial(torch.save, content)))


def playing_state(algorithm: Any, config: TrainConfig, step: int) -> Dict[str, Any]:
    """`model` holds the weights that play: the EMA where the algorithm keeps one (an AveragedModel
    as `ema`), else the model's own."""
    ema = getattr(algorithm, "ema", None)
    model = ema.module if ema is not None and ema.n_averaged > 0 else algorithm.model
    return {
        "format": CHECKPOINT_FORMAT,
        "step": step,
        "config": json.dumps(asdict(config)),
        "model": model.state_dict(),
    }


def fixed_settings(run: Run) -> Dict[str, Any]:
    """What must be equal in a run and its continuation."""
    settings: Dict[str, Any] = asdict(run.config)
    for name in settings_where(may_change=True):
        del settings[name]
    # where the file lies does not matter
    settings["submission"] = run.config.submission and "another file"
    games = []
    for store in run.loader.games.stores:
        games += store.index["identities"].tolist()
    return {**settings, "processes": WORLD, "games": games}


def modules_of(algorithm: Any) -> Dict[str, nn.Module]:
    """The model, and what else the algorithm has, such as an EMA or target networks."""
    return {name: part for name, part in vars(algorithm).items() if isinstance(part, nn.Module)}


def save_run(run: Run) -> None:
    """Write last.pt, from which the run can be continued; the one before becomes last.prev.pt, and
    one of them is always whole. All processes must call it."""
    rnn_states = gather(to_device(run.rnn_states, torch.device("cpu")))
    if RANK > 0:
        return
    modules = modules_of(run.algorithm)
    content = {
        **playing_state(run.algorithm, run.config, run.progress.step),
        "run_format": RUN_FORMAT,
        "algorithm": {name: module.state_dict() for name, module in modules.items()},
        "optimizer": run.optimizer.state_dict(),
        "rnn_states": rnn_states,
        "progress": asdict(run.progress),
        "settings": json.dumps(fixed_settings(run)),
        "submission_sha256": run.submission_sha256,
    }
    last = run.folder / "last.pt"
    following = run.folder / "next.pt"
    write_atomically(following, to_bytes(partial(torch.save, content)))
    if last.exists():
        os.replace(last, run.folder / "last.prev.pt")
    os.replace(following, last)


def load_run(run: Run, content: Dict[str, Any]) -> None:
    """Restore what `save_run` wrote. On a CPU continuing from it is bitwise identical to never
    having stopped; on a GPU, whose sums have no fixed order, to rounding. Raises UserError for
    another run's checkpoint."""
    if content.get("run_format") != RUN_FORMAT:
        raise UserError("cannot resume: another version of this script made the run")
    saved = json.loads(content["settings"])
    for name, value in fixed_settings(run).items():
        was = saved.get(name)
        if name == "games" and was != value:
            lost = sorted(set(was) - set(value))
            raise UserError(
                f"cannot resume: the data lost {lost} and gained {sorted(set(value) - set(was))}"
            )
        if was != value:
            raise UserError(
                f"cannot resume: {name} was {was} and is {value}; begin without --resume"
            )
    if content["submission_sha256"] != run.submission_sha256:
        warn(f"{run.config.submission} has changed since this run was saved")
    for name, module in modules_of(run.algorithm).items():
        module.load_state_dict(content["algorithm"][name])
    run.optimizer.load_state_dict(content["optimizer"])
    run.rnn_states = to_device(content["rnn_states"][RANK], run.device)
    run.progress = Progress(**content["progress"])
    run.logged = run.progress.step


# --- the parts of the loop
def gradient_step(run: Run, batch: Batch, prev_actions: Tensor) -> Metrics:
    """One update of the weights -> the algorithm's info, and what the loop adds to it."""
    # Whatever is drawn depends on the step alone: a resumed run draws the same, and evaluations
    # change nothing.
    set_seed(derived_seed(run.config.train_seed, run.progress.step, RANK))
    begin = time.perf_counter()
    batch, prev_actions = to_device((batch, prev_actions), run.device)
    loss, rnn_states, info = call_train_step(
        run.algorithm, batch, prev_actions, run.rnn_states, run.precision
    )
    run.rnn_states = tree_map_only(Tensor, Tensor.detach, rnn_states)
    forwarded = time.perf_counter()
    learning_rate = learning_rate_at(run.config, run.position["transitions"])
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = list(run.algorithm.model.parameters())
    tensors = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Running statistics too. Initial weights are equal since all processes share the seed.
    buffers = run.algorithm.model.buffers()
    tensors += [buffer for buffer in buffers if buffer.is_floating_point()]
    all_reduce_mean(tensors, known_actions(batch).sum())
    limit = run.config.clip_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    if math.isfinite(float(norm)):  # on a GPU this waits for all its work
        run.optimizer.step()
        run.algorithm.after_gradient_step()
    else:  # it must not reach the weights
        run.progress.skipped += 1
        run.rnn_states = {}
        warn(f"the gradient at step {run.progress.step} is not finite: the update is skipped")
    run.progress.step += 1
    run.seconds[1:] += np.diff([begin, forwarded, time.perf_counter()])
    return {
        "loss": loss.detach(),
        **info,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "skipped_updates": run.progress.skipped,
    }


def log_update(run: Run, logger: RunLogger, info: Metrics) -> None:
    """One row and one line: the algorithm's info, as means over the processes."""
    parts = gather({name: float(value) for name, value in info.items()})
    means = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
    before = position_at(run.config, run.logged)["transitions"]
    rate = (run.position["transitions"] - before) / run.seconds.sum()
    row = dict(run.position)
    for name, value in means.items():
        row[name if name == "loss" else f"train/{name}"] = value
    row["charts/SPS"] = rate
    row.update(zip(TIMES, run.seconds.tolist()))
    logger.log("training", row)
    run.logged = run.progress.step
    run.seconds[:] = 0.0
    say_metrics("TRAIN_METRICS", {**run.position, **means, "transitions_per_s": rate})


def evaluate(
    algorithm: Any, config: TrainConfig, heldout: Optional[ChunkLoader], folder: Path, step: int
) -> Tuple[Metrics, List[Any]]:
    """Held-out loss, then games of every character, whose files go to <folder>/<step>_... ->
    metrics, and the games as pairs of a character and its results."""
    device = choose_device(config)
    metrics: Metrics = {}
    games: List[Any] = []
    set_seed(config.eval_seed)  # in case an algorithm draws
    if heldout is not None and config.eval_heldout_frames:
        where = (device, choose_precision(config, device))
        found = evaluate_heldout(algorithm, heldout, config.eval_heldout_frames, *where)
        say_metrics("HELDOUT_METRICS", {"step": step, **found})
        for name, value in found.items():
            metrics[f"heldout/{name}"] = value
    if config.eval_episodes:
        begin = time.perf_counter()
        scores, games = evaluate_games(algorithm.model, config, device, folder / str(step))
        metrics.update(scores)
        metrics["times/evaluation_cpu"] = time.perf_counter() - begin
    return metrics, games


def evaluate_run(run: Run, logger: RunLogger) -> None:
    """One row; best.pt where the held-out loss is the lowest so far."""
    step = run.progress.step
    metrics, games = evaluate(run.algorithm, run.config, run.heldout, run.folder, step)
    loss = heldout_loss(metrics)
    names = ["best.pt"] if loss < run.progress.best else []
    names += [f"{step}.pt"] if run.config.keep_checkpoints else []
    for name in names:
        if RANK == 0:
            save_weights(run.folder / name, run.algorithm, run.config, step)
    run.progress.best = min(run.progress.best, loss)
    run.progress.evaluated = step
    logger.log("evaluation", {**run.position, **metrics}, games)


def is_evaluation_due(run: Run) -> bool:
    step = run.progress.step
    at_end = step >= run.config.update_steps
    return step > run.progress.evaluated and (at_end or step % run.config.eval_every == 0)


def run_name(config: TrainConfig) -> str:
    """Raises UserError for one that is too long for a folder's name."""
    characters = "+".join(config.characters)
    if len(characters) > 100:
        digest = hashlib.sha256(characters.encode()).hexdigest()[:8]
        characters = f"{config.characters[0]}+{len(config.characters) - 1}more-{digest}"
    name = f"{config.name}-{characters}-seed{config.train_seed}"
    if len(os.fsencode(name)) > 240:  # file systems allow 255, and a repeat has a number
        raise UserError("--name is too long for a folder's name; give a shorter one")
    return name


def train(config: TrainConfig) -> Path:
    """Train, evaluate, and return the run's folder."""
    # --- set up
    if isinstance(config.resume, str) and not find_checkpoints(expand(config.resume)):
        raise UserError(f"resume: {config.resume} is neither true nor false, nor holds it last.pt")
    runs = expand(config.checkpoints_path or "runs")
    first = runs / f"{config.group}-v{config.version}" / run_name(config)
    if config.eval_replays:
        check_recordable(first)
    with ExitStack() as stack:
        stack.enter_context(process_group(choose_device(config)))
        run = make_run(config)
        folder = stack.enter_context(run_folder(first, config.resume))
        run.folder = folder
        for checkpoint in find_checkpoints(folder)[-1:]:
            load_run(run, read_checkpoint(checkpoint))
        progress = run.progress
        if progress.evaluated >= config.update_steps:
            say(f"{folder} is finished, at step {progress.step}: it is left as it is")
            return folder
        logger = start_logging(config, folder, progress)
        stack.callback(logger.close)
        parameters = sum(parameter.numel() for parameter in run.algorithm.model.parameters())
        say(
            f"{'resuming' if progress.step else 'beginning'} {folder} at step {progress.step}: "
            f"{parameters:,} parameters on {WORLD} x {run.device}"
        )
        stack.enter_context(noting_signals())
        batches = stack.enter_context(closing(read_ahead(run.loader.batch_at, progress.step)))
        bar = stack.enter_context(progress_bar(initial=progress.step, total=config.update_steps))

        # --- loop
        while True:
            if is_evaluation_due(
                run
            ):  # also what a run that was stopped in its evaluation still owes
                evaluate_run(run, logger)
                save_run(run)  # with what the evaluation found
            if progress.step >= config.update_steps:
                return folder
            begin = time.perf_counter()
            batch, prev_actions = next(batches)
            run.seconds[0] += time.perf_counter() - begin
            info = gradient_step(run, batch, prev_actions)
            bar.update()
            if progress.step % config.log_every == 0 or progress.step == config.update_steps:
                log_update(run, logger, info)
            stopped = max_over_processes(stop_signal)
            # A checkpoint comes before an evaluation: whatever goes wrong while games are played,
            # the run can be continued from here.
            is_due = is_evaluation_due(run)
            if stopped or is_due or progress.step % config.checkpoint_every == 0:
                save_run(run)
            if stopped:
                raise Stopped(stopped)


# --- scoring a checkpoint
def load_agent(path: Any, **overrides: Any) -> Tuple[Any, TrainConfig, int]:
    """A checkpoint's algorithm with its weights, its config with `overrides`, and its step."""
    content = read_checkpoint(Path(path))
    saved = json.loads(content["config"])
    known = vars(TrainConfig())  # not what the script no longer has
    settings = {name: value for name, value in saved.items() if name in known}
    algorithm_settings = {**settings["algorithm"], **overrides.get("algorithm", {})}
    overrides.update(algorithm=algorithm_settings, resume=False)
    config = TrainConfig(**{**settings, **overrides})
    algorithm = make_algorithm(config, choose_device(config))
    try:
        algorithm.model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the algorithm; give its own with --submission ({error})"
        ) from None
    return algorithm, config, content["step"]


def evaluate_checkpoint(config: TrainConfig) -> Path:
    """Scores a checkpoint with this command's evaluation settings, with `data_path` on held-out
    games too -> folder."""
    path = expand(str(config.evaluate))
    names = ["algorithm", "data_path", "store_path", "device", "precision"]
    names += [name for name in vars(config) if name.startswith("eval")]
    overrides = {name: getattr(config, name) for name in names}
    for name in ("character", "submission"):  # the checkpoint's own, unless others are given
        if getattr(config, name) != getattr(TrainConfig(), name):
            overrides[name] = getattr(config, name)
    first = expand(config.checkpoints_path or str(path.parent)) / f"{path.stem}-evaluation"
    if config.eval_replays:
        check_recordable(first)
    algorithm, config, step = load_agent(path, **overrides)
    with ExitStack() as stack:
        stack.enter_context(process_group(choose_device(config)))
        heldout = None
        if config.data_path:
            loader, heldout = load_data(config)
            check_actions(algorithm, loader)
        folder = stack.enter_context(run_folder(first))
        logger = start_logging(config, folder, Progress(step))
        stack.callback(logger.close)
        say(f"evaluating {path} at step {step}, with results in {folder}")
        stack.enter_context(noting_signals())
        metrics, games = evaluate(algorithm, config, heldout, folder, step)
        logger.log("evaluation", {**position_at(config, step), **metrics}, games)
    return folder


def check_sizes(config: TrainConfig) -> None:
    """Raises UserError where the LSTM is not the benchmark's, unless that is wanted."""
    if (config.rnn_hidden_dim, config.rnn_layers) != (2048, 2):
        sizes = "rnn_hidden_dim and rnn_layers are not the benchmark's 2048 and 2"
        if config.benchmark_sizes:
            raise UserError(f"{sizes}: give --benchmark_sizes false for a run outside of it")
        say(f"{sizes}: this run is not meant for it")


def main(argv: Optional[Sequence[str]] = None) -> int:
    # A submission that imports this file by its name gets this one, not a second one.
    this = sys.modules[__name__]
    if vars(this) is not globals():  # a profiler is `__main__`, and has run this file inside
        this = types.ModuleType(__name__)
        vars(this).update(globals())
        sys.modules[__name__] = this
    sys.modules.setdefault("custom_nethack_pomdp", this)

    def command() -> None:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        keep_freed_memory()
        if config.evaluate:
            evaluate_checkpoint(config)
        else:
            check_sizes(config)
            train(config)

    return run_command(command, "stopped by a signal; a run goes on with --resume true")


if __name__ == "__main__":
    sys.exit(main())
