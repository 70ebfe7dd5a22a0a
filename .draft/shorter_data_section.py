"""Recurrent advantage-weighted regression with burn-in for NetHack, offline.

Trains on games of the symbolic bot AutoAscend (NLD-AA) and plays NetHack (NLE) with the result; the score is the game's
score over AutoAscend's mean score for that character. From top to bottom: configuration, utilities, data, backbone, the
EDITABLE block (model and algorithm), evaluation, checkpoints, training.

    python custom_nethack_pomdp.py --data_path DIR [--config FILE]        train and evaluate
    python custom_nethack_pomdp.py --data_path DIR --resume true          go on where a run stopped
    python custom_nethack_pomdp.py --data_path DIR --submission FILE      with another algorithm
    python custom_nethack_pomdp.py --evaluate runs/.../best.pt            score a checkpoint
    torchrun --nproc_per_node 8 custom_nethack_pomdp.py --data_path DIR   on eight GPUs

Axes: B rows of a batch, T steps of a chunk (seq_len), A actions (121), H hidden units (2048), L layers (2), N games.
A batch holds T + 1 frames of each row; the last one is the first of the row's next chunk and serves only as the
successor of frame T - 1, so only frames 0 .. T - 1 carry loss. The benchmark's batches are laid out alike, in float32,
with `screen_image` and without the last five.

    tty_chars   [B, T+1, 24, 80]  uint8    characters on the terminal
    tty_colors  [B, T+1, 24, 80]  int8     colours 0..31 (bit 16: inverse video)
    tty_cursor  [B, T+1, 2]       uint8    row and column of the cursor
    actions     [B, T+1]          int64    index into nle.nethack.ACTIONS
    rewards     [B, T+1]          float32  score[t+1] - score[t], over the run's reward scale, clipped to +-clip_range
    dones       [B, T+1]          bool     the player's last frame of a game
    blstats     [B, T+1, 27]      int32    NLE's bottom-line statistics as read off the status lines; all 0 if hidden
    mask        [B, T+1]          bool     the frame counts: not padding, and its key is an action
    starts      [B]               bool     the row's first frame does not follow the batch before: clear the state
    returns     [B, T+1]          float32  exact discounted return-to-go (held-out batches only)
    prev_actions [B, 1]           int64    the action before the first frame, NO_ACTION if there is none (its own argument)
"""

# ======================================================================================================================
# FIXED: imports and constants
# ======================================================================================================================
import argparse
import contextlib
import csv
import ctypes
import difflib
import fcntl
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import nle
import numpy as np
import pyrallis
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from nle import nethack
from nle.dataset.dataset import converter as ttyrec_converter
from nle.env.base import NLE
from nle.env.tasks import NetHackScore
from pyrallis.argparsing import ArgumentParser
from torch.distributions import Categorical
from tqdm.auto import tqdm

ROWS, COLS = 24, 80  # the terminal
NUM_BLSTATS = 27  # nle.nethack.BLSTATS_SHAPE
OBSERVATION_SHAPES: Dict[str, Tuple[Any, ...]] = {  # what the agent sees: dtype and shape
    "tty_chars": (np.uint8, ROWS, COLS),
    "tty_colors": (np.int8, ROWS, COLS),
    "tty_cursor": (np.uint8, 2),
    "blstats": (np.int32, NUM_BLSTATS),
}
NUM_ACTIONS = len(nethack.ACTIONS)  # 121
NO_ACTION = NUM_ACTIONS  # "previous action" of a game's first frame: no real action has this index
UNKNOWN_KEY = 255  # in the store: a keypress that is none of the 121 actions
# Key to action. Three keys have two actions (`"` 77/109, `$` 79/120, `+` 81/105); either sends the same key, and the
# last index is the one that Katakomba's data uses.
KEY_TO_ACTION = np.full(256, UNKNOWN_KEY, dtype=np.uint8)
for _index, _key in enumerate(nethack.ACTIONS):
    KEY_TO_ACTION[int(_key)] = _index
SPACE_ACTION = KEY_TO_ACTION[ord(" ")]
CORES = len(os.sched_getaffinity(0))
# torchrun tells each process the number of processes and its own number: on all machines, and on this one.
WORLD, LOCAL_WORLD = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))

# AutoAscend's mean score for each character, by which scores are divided (Katakomba, arXiv 2306.08772, table of scores).
_SCORES = """
arc-dwa-law 5445.69  arc-gno-neu 5316.57  arc-hum-law 5826.35  arc-hum-neu 6636.44  bar-hum-cha 18228.11
bar-hum-neu 17836.68  bar-orc-cha 17594.38  cav-dwa-law 11893.48  cav-gno-neu 10083.06  cav-hum-law 12462.82
cav-hum-neu 12113.87  hea-gno-neu 3783.93  hea-hum-neu 4068.27  kni-hum-law 14137.06  mon-hum-cha 18353.30
mon-hum-law 16091.57  mon-hum-neu 17456.05  pri-elf-cha 7109.35  pri-hum-cha 8262.56  pri-hum-law 6847.99
pri-hum-neu 7732.69  ran-elf-cha 9014.18  ran-gno-neu 6965.04  ran-hum-cha 8378.50  ran-hum-neu 8067.99
ran-orc-cha 7608.48  rog-hum-cha 4818.20  rog-orc-cha 4897.69  sam-hum-law 11009.36  tou-hum-neu 4211.47
val-dwa-law 23473.61  val-hum-law 26103.03  val-hum-neu 18624.77  wiz-elf-cha 5005.16  wiz-gno-neu 4317.51
wiz-hum-cha 5316.82  wiz-hum-neu 5323.48  wiz-orc-cha 5016.74""".split()
AUTOASCEND_MEAN_SCORE: Dict[str, float] = dict(zip(_SCORES[::2], map(float, _SCORES[1::2])))

Batch = Dict[str, torch.Tensor]
RNNState = Tuple[torch.Tensor, torch.Tensor]  # (h, c), each [L, B, H]


class UserError(Exception):
    """Something that the user can mend: `main` prints its one line on stderr and exits with 2."""


# ======================================================================================================================
# FIXED: configuration
# ======================================================================================================================
@dataclass
class TrainConfig:
    """Settings of a run; names and defaults are the benchmark's where it has them, `character` aside."""

    character: str = "mon-hum-neu,val-hum-neu,ran-hum-neu"  # one or several, by commas: train on all, evaluate on each
    data_path: Optional[str] = (
        None  # NLD-AA folder, Katakomba .hdf5 file or folder, or a store; None: Katakomba's folder
    )
    data_mode: str = "in_memory"  # accepted for the benchmark's command lines; data is always read compressed
    store_path: str = "runs/stores"  # folder in which chunk stores are built
    game_frames: int = 0  # learn from the first so many frames of each game only; 0: all
    heldout_share: float = 0.1  # share of each character's games never trained on (chosen by hash of the name)
    submission: Optional[str] = None  # take Model and OfflineAlgorithm from this file; None: the block of this script
    algorithm: Dict[str, Any] = field(default_factory=dict)  # overrides of AWRConfig, e.g. '{burn_in: 8, lam: 0.9}'
    evaluate: Optional[str] = None  # score this checkpoint instead of training

    project: str = "NetHack"  # wandb project
    group: str = "custom-nethack-pomdp"  # wandb group and folder of runs; "-v<version>" is appended
    name: str = "custom"  # run name; "-<character>-seed<train_seed>" is appended
    version: int = 0  # number that is appended to the group
    log_every: int = 50  # updates between logged rows

    rnn_hidden_dim: int = 2048  # LSTM units a layer: the benchmark's 2048
    rnn_layers: int = 2  # LSTM layers: the benchmark's 2
    use_prev_action: bool = True  # feed the previous action to the LSTM
    rnn_dropout: float = 0.0  # share of values dropped between the LSTM's layers
    clip_range: float = 10.0  # rewards, in units of the run's reward scale, are clipped to +- this
    tau: float = 0.005  # Polyak rate of target networks an update (used by reference algorithms)
    gamma: float = 0.999  # discount a step of the game

    update_steps: int = 100_000  # updates (gradient steps) in all
    batch_size: int = 128  # rows a batch, on each GPU
    seq_len: int = 16  # steps a chunk (T)
    learning_rate: float = 3e-4  # peak learning rate of AdamW
    lr_schedule: str = "constant"  # constant, or cosine: down to a tenth at the last transition
    warmup_transitions: int = 0  # transitions over which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's, on weight matrices only
    clip_grad_norm: Optional[float] = (
        None  # clip the gradient's norm (L2, over all parameters) to this; None: no clipping
    )
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: str = "auto"  # auto (bf16 or fp16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16
    train_seed: int = 42  # seed of initial weights and of the order of games

    checkpoints_path: Optional[str] = None  # runs are written to <checkpoints_path>/<group>/<name>; None: runs
    checkpoint_every: int = 2_000  # updates between checkpoints; there is one before each evaluation too
    keep_checkpoints: bool = False  # also keep the weights of every evaluation as <step>.pt
    resume: bool = False  # go on with the newest run of this group and name

    eval_every: int = 10_000  # updates between evaluations; after the last one there always is one
    eval_episodes: int = 50  # games a character; 0 plays none
    eval_processes: int = 14  # game slots that play side by side
    render_processes: int = 14  # accepted for the benchmark's command lines; nothing is rendered
    eval_workers: int = 0  # processes that run the game slots; 0: as many as there are cores
    eval_max_steps: int = 1_000_000  # a game is cut after so many actions (counted and reported)
    eval_precision: str = "fp32"  # matrix products when acting on a CPU: fp32, or bf16 (faster, other actions at times)
    eval_heldout_frames: int = 65_536  # frames of held-out games scored at each evaluation
    eval_seed: int = 50  # seed of the evaluation games and of sampled actions
    eval_record: Optional[str] = (
        None  # folder in which evaluation games are recorded in NLD-AA's layout; None: none are
    )

    def __post_init__(self) -> None:
        self.character = ",".join(self.characters)  # one spelling, for names
        validate_config(self)

    @property
    def characters(self) -> List[str]:
        return [name.strip() for name in self.character.split(",") if name.strip()]


TINY = 1e-12  # stands for "above 0"
LIMITS: Dict[str, Tuple[float, float]] = {  # smallest and largest value
    **dict.fromkeys("log_every update_steps batch_size seq_len checkpoint_every eval_every".split(), (1, math.inf)),
    **dict.fromkeys("eval_processes eval_max_steps render_processes".split(), (1, math.inf)),
    **dict.fromkeys("version warmup_transitions weight_decay game_frames eval_workers".split(), (0, math.inf)),
    **dict.fromkeys("eval_episodes eval_heldout_frames".split(), (0, math.inf)),
    **dict.fromkeys("learning_rate clip_range clip_grad_norm".split(), (TINY, math.inf)),
    **dict.fromkeys("gamma tau rnn_dropout".split(), (0, 1)),
    **dict.fromkeys("train_seed eval_seed".split(), (0, 2**63 - 1)),
    "heldout_share": (0, 0.9),
}
CHOICES = {"data_mode": "compressed|memmap|in_memory", "lr_schedule": "constant|cosine", "eval_precision": "fp32|bf16"}
CHOICES.update({"precision": "auto|fp32|bf16|fp16", "device": r"auto|cpu|cuda(:\d+)?"})


def validate_config(config: TrainConfig) -> None:
    """Raises UserError with one line that says what to change."""
    for character in config.characters or ["(none)"]:
        if character not in AUTOASCEND_MEAN_SCORE:
            close = difflib.get_close_matches(character, AUTOASCEND_MEAN_SCORE, n=3)
            raise UserError(f"unknown character {character!r}; did you mean {', '.join(close) or 'mon-hum-neu'}?")
    if len(set(config.characters)) != len(config.characters):
        raise UserError(f"character names one twice: {config.character}")
    for name, value in asdict(config).items():
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if name in LIMITS and value is not None and not low <= value <= high:
            raise UserError(f"{name} must be at least {low:g} and at most {high:g}, not {value}")
        if name in CHOICES and not re.fullmatch(CHOICES[name], value):
            raise UserError(f"{name} must be one of {CHOICES[name].replace('|', ', ')}, not {value!r}")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{name} holds a NUL character")


def strict(kind: Any, value: Any) -> Any:
    """A value of YAML's as a bool, text, int (1e6 too) or float. Left alone pyrallis takes 2.7 for an int as 2, 'maybe'
    for a bool as True and null for text as 'None'. Raises ValueError."""
    text, is_bool = str(value).lower(), isinstance(value, bool)
    if kind is bool and text in ("true", "yes", "1", "false", "no", "0"):
        return text in ("true", "yes", "1")
    if kind is str and isinstance(value, (str, int, float)) and not is_bool:
        return str(value)
    if kind in (int, float) and not is_bool and math.isfinite(float(value)) and kind(float(value)) == float(value):
        return value if isinstance(value, kind) else kind(float(value))
    raise ValueError(f"{value!r} is not a valid {kind.__name__}")


for _kind in (bool, str, int, float):
    pyrallis.decode.register(_kind, partial(strict, _kind))


class SettingsParser(ArgumentParser):
    """pyrallis' parser, which raises where argparse would print its whole usage and exit."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Command line over config file over defaults; `algorithm` is merged key by key. Raises UserError."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config", "--config_path")
    try:
        config = SettingsParser(TrainConfig, description=__doc__.split("Axes:")[0]).parse_args(list(argv))
        path = early.parse_known_args(list(argv))[0].config
        of_file = pyrallis.parse(TrainConfig, config_path=path, args=[]).algorithm if path else {}
        config.algorithm = {**of_file, **config.algorithm}
        return config
    except (
        Exception
    ) as error:  # pyrallis raises its own errors, YAML's, OSError and, for an unknown key, a bare Exception
        text = re.sub(r"(?s).*field \".*\.(\w+)\" of type.*error is \"\w+: (.*)\"", r"\1: \2", str(error))
        words = re.findall(r"(?:--|'fields \{')(\w+)", text.replace("fields {'", "--"))
        close = [name for word in words for name in difflib.get_close_matches(word, vars(TrainConfig()), n=1)]
        raise UserError(text + "".join(f"; did you mean {name}?" for name in close)) from None


# ======================================================================================================================
# FIXED: utilities and logging
# ======================================================================================================================
def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator: a submission may draw from it
    torch.manual_seed(seed)


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    digest = hashlib.sha256(",".join(str(int(part)) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for every parameter (Polyak averaging)."""
    with torch.no_grad():
        for target_param, source_param in zip(target.parameters(), source.parameters()):
            target_param.lerp_(source_param, tau)


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    """Mean of |tau - 1(u < 0)| u^2: the expectile loss of IQL (arXiv 2110.06169, equation 5)."""
    return torch.mean(torch.abs(tau - (u < 0).float()) * u**2)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`function` of every tensor in nested dicts, lists and tuples: recurrent states may be any of these."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    return type(value)(map_tensors(function, part) for part in value)


def keep_freed_memory() -> None:
    """By default glibc gives each large freed tensor back to the system, which clears the same memory anew at every
    update: on a CPU that took more time than the update itself."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """`write(file)` to a temporary file, synced, then renamed: `path` holds the old content or the new, never a part.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the system's error
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; make room, --resume true goes on") from None


def say(text: str, file: Any = None) -> None:
    """One line on standard output, above a progress bar if there is one. Of several processes the first alone speaks."""
    if RANK == 0:
        tqdm.write(text, file=file or sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    say(f"warning: {text}", sys.stderr)


def say_metrics(tag: str, values: Dict[str, Any]) -> None:
    """The lines that readers of standard output look for: `TRAIN_METRICS step=... name=value ...`."""
    shown = (f"{name}={value if isinstance(value, int) else format(value, '.6g')}" for name, value in values.items())
    say(" ".join([tag, *shown]))


def progress(**options: Any) -> Any:
    """A progress bar on a terminal; of several processes the first alone shows one."""
    return tqdm(disable=True if RANK else None, dynamic_ncols=True, **options)


class RunLogger:
    """Every row goes to metrics.jsonl and to wandb (WANDB_MODE; without it online with a key and offline without)."""

    def __init__(self, config: TrainConfig, folder: Path, wandb_id: Optional[str] = None) -> None:
        self.path, self.run = folder / "metrics.jsonl", None
        self.file = open(self.path if RANK == 0 else os.devnull, "a", encoding="utf-8")
        mode = os.environ.get("WANDB_MODE")
        if RANK == 0 and mode != "disabled":
            import wandb

            mode = mode or ("online" if wandb.api.api_key else "offline")
            names: Dict[str, Any] = dict(project=config.project, group=folder.parent.name, name=folder.name)
            self.run = wandb.init(mode=mode, dir=folder, config=asdict(config), id=wandb_id, resume="allow", **names)
            self.run.define_metric("*", step_metric="transitions")  # our own axis: a resumed run lies where it belongs

    def log(self, row: Dict[str, Any]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
        try:
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room, --resume true goes on") from None
        if self.run is not None:
            self.run.log(row)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a row that found no room was reported
            self.file.close()
        if self.run is not None:
            self.run.finish()


# ======================================================================================================================
# FIXED: data. Game file -> frames -> 64-frame blocks -> store -> plan -> batch_at(step)
# ======================================================================================================================
# --- status lines: what the terminal's last two rows say, in the places of NLE's blstats
ATTRIBUTES = re.compile(
    rb" St:(\d+)(?:/(\d\d|\*\*))? Dx:(\d+) Co:(\d+) In:(\d+) Wi:(\d+) Ch:(\d+)\s+(Lawful|Neutral|Chaotic)?"
)
VITALS = re.compile(  # depth | level of the quest | place; gold, HP, maximum, Pw, maximum, AC, level, points | HD, turn
    rb"^(?:Dl(?:vl)?:(-?\d+)|Home (\d+)|(Fort Ludios|Earth|Air|Fire|Water|Astral Plane))\s+"
    rb"\S:(\d+) HP:(-?\d+)\((\d+)\) Pw:(-?\d+)\((\d+)\) AC:(-?\d+)\s+(?:Xp:(\d+)(?:/(\d+))?|HD:(\d+))(?: T:(\d+))?(.*)$"
)
PLACES = [12, 24, 13, 10, 11, 14, 15, 16, 18, 19, 17, 20]  # of these numbers in blstats, the place's name left out
PLANES = {b"Earth": -1, b"Air": -2, b"Fire": -3, b"Water": -4, b"Astral Plane": -5}  # their depth in NetHack
WORDS = {  # place in blstats -> words for the values 0, 1, ... (conditions: for the bits); a full line shortens them
    21: "Satiated - Hungry Weak Fainting Fainted Starved",
    22: "- Burdened|Burden|Brd Stressed|Stress|Strs Strained|Strain|Strn Overtaxed|Overtax|Ovtx Overloaded|Overload|Ovld",
    25: "Stone|Ston|Sto Slime|Slim|Slm Strngl|Stngl|Str FoodPois|Fpois|Poi TermIll|Ill Blind|Blnd|Bl Deaf|Def|Df Stun|St "
    "Conf|Cnf|Cf Hallu|Hal|Hl Lev|Lv Fly|Fl Ride|Rid|Rd",
}
STATUS_WORDS = {  # word -> (place, value)
    word.encode(): (place, 1 << index if place == 25 else index)
    for place, names in WORDS.items()
    for index, spellings in enumerate(names.split())
    for word in spellings.split("|")
}
INT32 = np.iinfo(np.int32)


@lru_cache(maxsize=16_384)  # rows repeat from frame to frame
def parse_upper_status(row: bytes) -> np.ndarray:
    """Terminal row 22 -> [27] int32 with attributes and alignment in their places; zeros where a menu hides the row."""
    stats, found = np.zeros(NUM_BLSTATS, dtype=np.int32), ATTRIBUTES.search(row)
    if found:
        base, extra, *others, alignment = found.groups(b"0")
        # 18/xx counts on from 18, 18/** is 118, and 19 to 25 lie at 119 to 125 (NetHack's STR18 and STR19)
        strength = int(base) + (100 if extra == b"**" else int(extra)) + (100 if int(base) > 18 else 0)
        compact = strength if strength <= 18 else 19 + strength // 50 if strength <= 121 else min(strength, 125) - 100
        stats[2:9] = np.clip([compact, strength, *map(int, others)], INT32.min, INT32.max)
        stats[26] = {b"Lawful": 1, b"Chaotic": -1}.get(alignment, 0)
    return stats


@lru_cache(maxsize=16_384)
def parse_lower_status(row: bytes) -> np.ndarray:
    """Terminal row 23 -> [27] int32 with depth, vitals, turn and conditions; zeros where a menu hides the row."""
    stats, found = np.zeros(NUM_BLSTATS, dtype=np.int32), VITALS.match(row)
    if found:
        depth, home, plane, *numbers, words = found.groups(b"0")
        stats[PLACES] = [min(max(int(number), INT32.min), INT32.max) for number in (depth, home, *numbers)]
        stats[12], stats[21] = PLANES.get(plane, stats[12]), 1  # not hungry unless a word says so
        for place, value in (STATUS_WORDS[word] for word in words.split() if word in STATUS_WORDS):
            stats[place] = stats[place] | value if place == 25 else value
    return stats


def read_blstats(chars: np.ndarray) -> np.ndarray:
    """Screens [n, 24, 80] uint8 -> [n, 27] int32, what the status lines say, zeros where a menu hides them.

    Places as in NLE (blstats.h); what the screen does not show (position 0/1, score 9, dungeon 23) stays 0.
    """
    text = chars[:, 22:].tobytes()
    upper = [parse_upper_status(text[start : start + COLS]) for start in range(0, len(text), 2 * COLS)]
    lower = [parse_lower_status(text[start : start + COLS]) for start in range(COLS, len(text), 2 * COLS)]
    return np.array(upper) + np.array(lower)  # the two fill different places


# --- games as recorded
class GameError(Exception):
    """A game that cannot be read; the build skips it, names it and goes on."""


class GameSource(NamedTuple):
    """Where a game lies. `key` is the group inside an HDF5 file, empty for a ttyrec."""

    name: str  # the same wherever the data lies; held-out games are chosen by it
    path: str
    key: str
    size: int
    mtime_ns: int


class Frames(NamedTuple):
    """Frames of one game. Frame t is what the player saw before action t, score t the score by then."""

    chars: np.ndarray  # [n, 24, 80] uint8
    colors: np.ndarray  # [n, 24, 80] int8
    cursor: np.ndarray  # [n, 2] uint8
    actions: np.ndarray  # [n] uint8, UNKNOWN_KEY where the key is no action
    scores: np.ndarray  # [n] int32


def read_ttyrec(path: str) -> Frames:
    """All frames of a ttyrec3.bz2 file, through nle.dataset's converter."""
    decoder = ttyrec_converter.Converter(ROWS, COLS, 3)
    decoder.load_ttyrec(path, gameid=1, part=0)
    pieces, size, remaining = [], 1024, 0
    while remaining == 0:
        chars, colors = np.empty((size, ROWS, COLS), np.uint8), np.empty((size, ROWS, COLS), np.int8)
        cursor, times = np.empty((size, 2), np.int16), np.empty(size, np.int64)
        keys, scores = np.empty(size, np.uint8), np.empty(size, np.int32)
        remaining = decoder.convert(chars, colors, cursor, times, keys, scores)
        pieces.append([array[: size - remaining] for array in (chars, colors, cursor, keys, scores)])
    chars, colors, cursor, keys, scores = map(np.concatenate, zip(*pieces))
    return Frames(chars, colors, cursor.astype(np.uint8), KEY_TO_ACTION[keys], scores)


def read_hdf5(path: str, key: str) -> Frames:
    """All frames of one game of a Katakomba HDF5 file, which keeps score differences."""
    import h5py

    names = ("tty_chars", "tty_colors", "tty_cursor", "actions", "rewards")
    with h5py.File(path, "r") as file:
        chars, colors, cursor, actions, rewards = (file[key][name][:] for name in names)
    if len({len(array) for array in (chars, colors, cursor, actions, rewards)}) > 1:
        raise GameError("its arrays differ in length")
    actions = np.where((actions >= 0) & (actions < NUM_ACTIONS), actions, UNKNOWN_KEY).astype(np.uint8)
    scores = (np.cumsum(rewards.astype(np.int64)) - rewards).astype(np.int32)
    return Frames(chars.astype(np.uint8), colors.astype(np.int8), cursor.astype(np.uint8), actions, scores)


def find_first_frame(frames: Frames) -> int:
    """Index of the player's first frame: NLE itself answers start-up screens with SPACE, and they are recorded too."""
    index = 0
    while index < len(frames.chars) and frames.actions[index] == SPACE_ACTION:
        text = frames.chars[index].tobytes()
        greeting = b"welcome to NetHack!" in text and b"--More--" in text
        if VITALS.match(text[-COLS:]) and not greeting:
            break
        index += 1
    return index


MENU_PAGE = re.compile(rb"\((?:end|\d+ of \d+)\) *")
DEATH_MESSAGE = re.compile(rb"You (?:die|drown|suffocate|burn|turn to|are turned|dissolve|choke|escaped|ascend)")


def find_end_of_play(frames: Frames) -> int:
    """Index of the first frame after the game was over. Raises GameError if the recording shows no end.

    From the end of a game on, NLE itself presses SPACE: on the message of death, on the inventory (pages of a menu), on
    "NAME the ROLE's attributes:" and on what follows up to the tombstone. The frames before are the player's.
    """
    first = len(frames.chars)
    texts: Dict[int, bytes] = {}
    while first > max(0, len(frames.chars) - 64) and frames.actions[first - 1] == SPACE_ACTION:
        first -= 1
        texts[first] = frames.chars[first].tobytes()
    pages = [index for index, text in texts.items() if b"'s attributes:" in text]
    if not pages:
        raise GameError("the recording breaks off before the end of the game")
    first = max(pages)
    while MENU_PAGE.search(texts.get(first - 1, b"")):
        first -= 1
    if b"--More--" in texts.get(first - 1, b""):  # shown after the game was over, whatever it says
        first -= 1
        while b"--More--" in texts.get(first - 1, b"") and DEATH_MESSAGE.search(texts[first - 1]):
            first -= 1
    return first


# --- the chunk store of a character's games: index.npz and frames.bin in one folder
STORE_FORMAT = 3
BLOCK = 64  # frames compressed together: more make the store smaller, but a row decodes a block to read a chunk
ZSTD_LEVEL = 3  # on AutoAscend's games smaller than level 1 and as fast to write; level 6 takes three times as long


@lru_cache(maxsize=None)
def block_dtype(n: int) -> np.dtype:
    """A record of n frames: what the agent sees, and its actions (UNKNOWN_KEY where the key is none)."""
    planes = [(name, kind, (n, *shape)) for name, (kind, *shape) in OBSERVATION_SHAPES.items()]
    return np.dtype([*planes, ("actions", np.uint8, (n,))])


def encode_game(source: GameSource) -> Any:
    """-> compressed blocks and the game's entries in the index, or the reason (str) why the game cannot be read."""
    import zstandard

    compress = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress
    try:
        frames = read_hdf5(source.path, source.key) if source.key else read_ttyrec(source.path)
        first, end = find_first_frame(frames), find_end_of_play(frames)
        if first >= end:
            raise GameError("it holds no frame of play")
    except (GameError, RuntimeError, ValueError, TypeError, OSError, EOFError, LookupError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    chars, colors, cursor, actions, scores = (array[first:end] for array in frames)
    blocks, blstats = [], np.concatenate([read_blstats(chars[at : at + 1024]) for at in range(0, len(chars), 1024)])
    for start in range(0, len(chars), BLOCK):
        planes = [plane[start : start + BLOCK] for plane in (chars, colors, cursor, blstats, actions)]
        record = np.empty((), block_dtype(len(planes[0])))
        for name, plane in zip(record.dtype.names, planes):
            record[name] = plane
        blocks.append(compress(record.tobytes()))
    rewards = np.append(np.diff(scores), 0)  # NLE pays nothing for the step that ends a game
    entries = {"names": source.name, "frames": len(chars), "unknown_keys": int((actions == UNKNOWN_KEY).sum())}
    entries.update(max_depths=int(blstats[:, 12].max()), turns=int(blstats[:, 20].max()))
    paid = np.flatnonzero(rewards)
    return blocks, entries, paid, rewards[paid]


def parse_xlogfile(path: Path) -> List[Dict[str, str]]:
    """Tab-separated key=value pairs, a line a finished game; what is not of that form is left out."""
    lines = path.read_bytes().decode("latin-1").splitlines()
    return [dict(pair.split("=", 1) for pair in line.split("\t") if "=" in pair) for line in lines]


def find_nld_games(root: Path, character: str) -> Tuple[List[GameSource], List[str]]:
    """Games of the character below an NLD-AA folder: those with a line in their folder's xlogfile; lines without a game."""
    games, problems = set(), []
    for xlogfile in sorted(Path(root).rglob("*.xlogfile")):
        for xlog in parse_xlogfile(xlogfile):
            if "-".join(xlog.get(name, "?").lower() for name in ("role", "race", "align0")) != character:
                continue
            name = xlog.get("ttyrecname", "")
            path = xlogfile.parent / name
            if name != os.path.basename(name) or not name.endswith(".ttyrec3.bz2") or not path.is_file():
                problems.append(f"{xlogfile}: its line names no ttyrec3.bz2 file beside it ({name!r})")
            else:
                label, stat = f"{xlogfile.parent.resolve().name}/{name}", path.stat()
                games.add(GameSource(label, str(path), "", stat.st_size, stat.st_mtime_ns))
    return sorted(games), problems


def find_games(data_path: Optional[str], character: str) -> Tuple[List[GameSource], List[str]]:
    """-> games, and xlogfiles' lines that name none. Raises UserError where there is nothing to read."""
    root = data_folder(data_path)
    hdf5 = root if root.is_file() else root / f"data-{character}-any.hdf5"
    if hdf5.is_file() and f"data-{character}-any" not in hdf5.name:
        raise UserError(f"{hdf5} is not named data-{character}-any.hdf5: it does not hold games of {character}")
    games, problems = ([], []) if hdf5.is_file() else find_nld_games(root, character)
    if hdf5.is_file():
        import h5py

        try:
            with h5py.File(hdf5, "r") as file:
                keys, stat = sorted(file), hdf5.stat()
        except (OSError, RuntimeError) as error:
            raise UserError(f"{hdf5}: not a readable HDF5 file ({error})") from None
        games = [GameSource(f"{hdf5.name}/{key}", str(hdf5), key, stat.st_size, stat.st_mtime_ns) for key in keys]
    if not games:
        where = f"no games of {character} in {root}" + ("" if root.exists() else ", which does not exist")
        ways = "an NLD-AA folder, a Katakomba HDF5 file, or games of your own (scripts/record_games.py)"
        raise UserError(f"{where}. --data_path takes {ways}; see the README, section Data")
    return games, problems


def data_folder(data_path: Optional[str]) -> Path:
    return Path(data_path or os.environ.get("KATAKOMBA_DATA_DIR", "~/.katakomba/datasets")).expanduser()


def store_fingerprint(games: List[GameSource]) -> str:
    """Changes whenever a game was added, removed or rewritten, or the format of the store changed."""
    told = [(game.name, game.key, game.size, game.mtime_ns) for game in games]
    return hashlib.sha256(repr((STORE_FORMAT, BLOCK, ZSTD_LEVEL, told)).encode()).hexdigest()


def build_store(store: Path, games: List[GameSource], problems: List[str], character: str, workers: int) -> None:
    """Writes a store into a temporary folder and renames it to `store`. Games are read by worker processes."""
    temporary = store.with_name(f".{store.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a build that was killed; the lock says nobody uses it
    temporary.mkdir(parents=True)
    offsets, skipped, kept = [0], [], []
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(max(workers, 1), spawn, keep_freed_memory) as pool,
        open(temporary / "frames.bin", "wb") as file,
    ):
        encoded = pool.map(encode_game, games) if workers > 1 else map(encode_game, games)
        for source, game in zip(games, progress(iterable=encoded, total=len(games), desc=f"store of {character}")):
            if isinstance(game, str):
                skipped.append(f"{source.path} {source.key}: {game}")
                warn(f"skipped {skipped[-1]}")
                continue
            file.writelines(game[0])
            offsets += (offsets[-1] + np.cumsum([len(block) for block in game[0]])).tolist()
            kept.append(game[1:])
        file.flush()
        os.fsync(file.fileno())
    if not kept:
        raise UserError(f"none of the {len(games)} games of {character} can be read; the first: {skipped[0]}")
    index: Dict[str, Any] = {name: np.array([entries[name] for entries, *_ in kept]) for name in kept[0][0]}
    index.update(block_offsets=np.array(offsets), rewards_of=np.cumsum([0] + [len(frames) for _, frames, _ in kept]))
    index["reward_frames"], index["reward_values"] = (np.concatenate([game[n] for game in kept]) for n in (1, 2))
    index.update(fingerprint=store_fingerprint(games), character=character, skipped=skipped, passed_over=problems)
    np.savez(temporary / "index.npz", **index)
    shutil.rmtree(store, ignore_errors=True)
    os.replace(temporary, store)


def open_or_build_store(data_path: Optional[str], store_path: str, character: str) -> "ChunkStore":
    """The store of the character's games: the given one, the one built before if its games did not change, or a new one."""
    given = data_folder(data_path)
    for folder in (given, given / character):
        if (folder / "frames.bin").exists():
            return ChunkStore(folder, character)
    games, problems = find_games(data_path, character)
    folder = Path(store_path).expanduser() / hashlib.sha256(str(given.resolve()).encode()).hexdigest()[:12] / character
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{character}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, however the holder ends
            with contextlib.suppress(UserError):
                store = ChunkStore(folder, character)
                if str(store.index["fingerprint"]) == store_fingerprint(games):
                    return store
            # Starting a worker costs seconds: small sets are read right here. An HDF5 file holds many games.
            size = sum({game.path: game.size for game in games}.values())
            build_store(folder, games, problems, character, min(CORES, len(games), size // 4_000_000))
    except BrokenExecutor:
        raise UserError(
            f"a process that reads games of {character} has crashed: out of memory, or a damaged game?"
        ) from None
    except OSError as error:
        where = f"cannot write the chunk store in {store_path}: {error.strerror or error}"
        raise UserError(f"{where}; give a writable folder with --store_path") from None
    return ChunkStore(folder, character)


class ChunkStore:
    """A store opened for reading, safe from several threads. Raises UserError for a damaged store or another's."""

    def __init__(self, folder: Path, character: str) -> None:
        self.folder = Path(folder)
        try:
            with np.load(self.folder / "index.npz") as arrays:  # a zip file, which keeps checksums
                self.index = dict(arrays)
            self.names, self.frames, self.block_offsets = (self.index[n] for n in ("names", "frames", "block_offsets"))
            self.file = open(self.folder / "frames.bin", "rb")
            if os.fstat(self.file.fileno()).st_size != self.block_offsets[-1]:
                raise ValueError("frames.bin has the wrong size")
            if str(self.index["character"]) != character:
                raise ValueError(f"its games are of {self.index['character']}, not of {character}")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise self._damage(error) from None
        self.first_blocks = np.cumsum(np.append(0, -(-self.frames // BLOCK)))
        self.local = threading.local()  # a zstandard decompressor serves one thread

    def _damage(self, what: Any) -> UserError:
        return UserError(f"the chunk store {self.folder} cannot be used: {what}; delete the folder and start again")

    def __str__(self) -> str:
        index, frames = self.index, int(self.frames.sum())
        left_out = (len(index["skipped"]), len(index["passed_over"]), int(index["unknown_keys"].sum()))
        what = f"{index['character']}: {len(self.frames)} games, {frames:,} frames, {self.block_offsets[-1] / frames:.0f} bytes a frame"
        why = "; left out: {} unreadable games, {} lines without a game, {} keys that are no action".format(*left_out)
        return what + (why if any(left_out) else "")

    def rewards(self, game: int) -> Tuple[np.ndarray, np.ndarray]:
        """Frames whose reward is not 0, and these rewards (differences of the in-game score)."""
        part = slice(*self.index["rewards_of"][game : game + 2])
        return self.index["reward_frames"][part], self.index["reward_values"][part]

    def block(self, game: int, number: int) -> np.void:
        """Frames BLOCK * number ... of the game, as in block_dtype. Raises UserError if the bytes on disk were damaged."""
        import zstandard

        if not hasattr(self.local, "decompressor"):
            self.local.decompressor = zstandard.ZstdDecompressor()
        place = int(self.first_blocks[game]) + number
        begin, end = self.block_offsets[place : place + 2].tolist()
        frames = block_dtype(min(BLOCK, int(self.frames[game]) - BLOCK * number))
        try:  # zstandard compares its own checksum
            raw = self.local.decompressor.decompress(os.pread(self.file.fileno(), end - begin, begin))
            return np.frombuffer(raw, frames, count=1)[0]
        except (zstandard.ZstdError, ValueError, MemoryError) as error:
            raise self._damage(f"block {place} is damaged ({error})") from None


# --- from the store to batches
def choose_heldout(names: Sequence[str], share: float) -> np.ndarray:
    """bool [G]: which of a character's games are held out, by hash of their name; at least one of two or more."""
    shares = np.array([int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names])
    chosen = shares < share
    if share > 0:
        chosen[np.argmin(shares)] = True
        chosen[np.argmax(shares)] = False  # at least one to train on; the only one, if there is one
    return chosen


class Games:
    """The games of one or several stores under one numbering, each up to its first `game_frames` frames (0: all)."""

    def __init__(self, stores: Sequence[ChunkStore], game_frames: int = 0) -> None:
        self.stores = list(stores)
        self.places = [(store, game) for store in self.stores for game in range(len(store.frames))]
        whole = np.concatenate([store.frames for store in self.stores])
        self.frames = np.minimum(whole, game_frames) if game_frames else whole
        self.cut = self.frames < whole  # [G] bool: the game goes on where its frames end here

    def heldout(self, share: float) -> np.ndarray:
        """bool [G]: games never trained on, chosen among each store's."""
        return np.concatenate([choose_heldout(list(map(str, store.names)), share) for store in self.stores])

    def rewards(self, game: int) -> Tuple[np.ndarray, np.ndarray]:
        store, number = self.places[game]
        return store.rewards(number)

    def reward_scale(self, games: np.ndarray, gamma: float) -> float:
        """Root mean square of the discounted return so far, R_t = gamma R_{t-1} + r_t, over all frames of the games.

        The benchmark divides rewards by a running estimate of the same quantity; knowing all games, it can be exact.
        """
        squares = 0.0
        for game in games:
            at, values = (
                array[: np.searchsorted(self.rewards(game)[0], self.frames[game])] for array in self.rewards(game)
            )
            lengths = np.diff(np.append(at, self.frames[game]))  # frames until the next reward
            accumulated, last = 0.0, 0
            for begin, value, length in zip(at.tolist(), values.tolist(), lengths.tolist()):
                accumulated = accumulated * gamma ** (begin - last) + value
                decay = length if gamma == 1.0 else (1.0 - gamma ** (2 * length)) / (1.0 - gamma**2)
                squares, last = squares + accumulated**2 * decay, begin
        return max(math.sqrt(squares / max(int(self.frames[games].sum()), 1)), 0.01)  # 0.01: the benchmark's floor


class ChunkPlan:
    """Which chunk each row plays at each step: pure arithmetic, so a batch depends on its number alone.

    For each pass over the data all games are put one after another in a new random order, each padded to whole chunks
    of `seq_len` frames. That line of chunks is cut into as many equal parts as there are rows, and each row plays its
    part from left to right. So every chunk is played exactly once a pass, rows are spread over early and late parts of
    games, and a row starts inside a game only at a pass's beginning (its state is then cleared).
    """

    def __init__(self, frames: np.ndarray, rows: int, seq_len: int, seed: Optional[int]) -> None:
        self.chunks = -(-np.asarray(frames) // seq_len)  # [G] chunks of each game
        self.rows, self.seq_len, self.seed = rows, seq_len, seed
        self.total = int(self.chunks.sum())
        self.steps = -(-self.total // rows)  # steps a pass; a row one chunk short pads the last one

    @lru_cache(maxsize=2)
    def _pass(self, number: int) -> Tuple[np.ndarray, np.ndarray]:
        """The order of games in a pass (as they are where there is no seed), and where each one's chunks end."""
        order = np.arange(len(self.chunks))
        if self.seed is not None:
            order = np.random.default_rng(derived_seed(self.seed, number)).permutation(order)
        return order, np.cumsum(self.chunks[order])

    def locate(self, step: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step 0, 1, ... -> game [rows] (-1: padding), first frame [rows], starts [rows] bool."""
        number, offset = divmod(step, self.steps)
        order, ends = self._pass(number)
        edges = np.arange(self.rows + 1) * self.total // self.rows
        chunk = edges[:-1] + offset
        padding = chunk >= edges[1:]
        place = np.searchsorted(ends, np.minimum(chunk, self.total - 1), side="right")
        game = order[place]
        inside = chunk - (ends[place] - self.chunks[game])
        starts = (inside == 0) | (offset == 0) | padding
        return np.where(padding, -1, game), np.where(padding, 0, inside * self.seq_len), starts


class ChunkLoader:
    """Batches of `rows` rows on all processes together, of which this one reads its share. `returns`: exact ones too."""

    def __init__(
        self,
        games: Games,
        chosen: np.ndarray,
        config: TrainConfig,
        rows: int,
        reward_scale: float,
        returns: bool = False,
    ) -> None:
        self.games, self.chosen, self.returns = games, np.asarray(chosen, dtype=np.int64), returns
        # Held-out games are always read in the same order.
        self.plan = ChunkPlan(games.frames[self.chosen], rows, config.seq_len, None if returns else config.train_seed)
        self.rows = slice(rows * RANK // WORLD, rows * (RANK + 1) // WORLD)
        self.batch_size, self.seq_len, self.gamma = self.rows.stop - self.rows.start, config.seq_len, config.gamma
        self.reward_scale, self.clip_range = reward_scale, config.clip_range
        self.pin = torch.cuda.is_available() and config.device != "cpu"
        self.current: List[Any] = [None] * self.batch_size  # (game, number, block) decoded last for each row
        self.returns_of = lru_cache(maxsize=None)(self._returns)

    def _scaled(self, rewards: np.ndarray) -> np.ndarray:
        return np.clip(rewards / self.reward_scale, -self.clip_range, self.clip_range).astype(np.float32)

    def _returns(self, game: int) -> np.ndarray:
        """Exact discounted return-to-go of the scaled rewards at every frame of the whole game."""
        store, number = self.games.places[game]
        at, values = store.rewards(number)
        to_go = np.zeros(int(store.frames[number]))
        to_go[at] = self._scaled(values)
        for t in range(len(to_go) - 2, -1, -1):
            to_go[t] += self.gamma * to_go[t + 1]
        return to_go

    def _block(self, row: int, game: int, number: int) -> np.void:
        """Decodes a block once for all chunks of a row that lie in it."""
        if self.current[row] is None or self.current[row][:2] != (game, number):
            store, index = self.games.places[game]
            self.current[row] = (game, number, store.block(index, number))
        return self.current[row][2]

    def _fill_row(self, batch: Dict[str, np.ndarray], row: int, game: int, first: int) -> None:
        """Writes frames first .. first + T of the game into a row of the batch.

        A game that is cut (`game_frames`) ends as a chunk does: with the next frame as successor, and not done.
        """
        end = int(self.games.frames[game]) + int(self.games.cut[game])
        stop, position = min(first + self.seq_len + 1, end), first
        if first:  # sequential reading finds this block decoded
            batch["previous"][row] = self._block(row, game, (first - 1) // BLOCK)["actions"][(first - 1) % BLOCK]
        while position < stop:
            block, inside = self._block(row, game, position // BLOCK), position % BLOCK
            count = min(stop - position, BLOCK - inside)
            for name in block.dtype.names:
                batch[name][row, position - first : position - first + count] = block[name][inside : inside + count]
            position += count
        batch["dones"][row, stop - first - 1] = stop == end and not self.games.cut[game]
        at, rewards = self.games.rewards(game)
        low, high = np.searchsorted(at, (first, stop))
        batch["rewards"][row, at[low:high] - first] = self._scaled(rewards[low:high])
        if self.returns:
            batch["returns"][row, : stop - first] = self.returns_of(game)[first:stop]

    def batch_at(self, step: int) -> Batch:
        """The batch of step 0, 1, ... as CPU tensors, as in the module's docstring."""
        B, steps = self.batch_size, self.seq_len + 1
        kinds = {**OBSERVATION_SHAPES, "rewards": (np.float32,), "dones": (np.bool_,), "actions": (np.int64,)}
        kinds.update({"returns": (np.float32,)} if self.returns else {})
        tensors = {
            name: torch.zeros((B, steps, *shape), dtype=getattr(torch, np.dtype(kind).name), pin_memory=self.pin)
            for name, (kind, *shape) in kinds.items()
        }
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        arrays["actions"] = np.full((B, steps), UNKNOWN_KEY, dtype=np.uint8)  # as stored; padding counts as little
        arrays["previous"] = np.full(B, UNKNOWN_KEY, dtype=np.uint8)
        game, first, starts = (array[self.rows] for array in self.plan.locate(step))
        for row in np.flatnonzero(game >= 0):
            self._fill_row(arrays, row, int(self.chosen[game[row]]), int(first[row]))
        mask = arrays["actions"] != UNKNOWN_KEY
        tensors["mask"], tensors["starts"] = torch.from_numpy(mask), torch.from_numpy(np.ascontiguousarray(starts))
        tensors["actions"].copy_(torch.from_numpy(np.where(mask, arrays["actions"], 0)))
        previous = np.where(starts | (arrays["previous"] == UNKNOWN_KEY), NO_ACTION, arrays["previous"])
        tensors["prev_actions"] = torch.from_numpy(previous.astype(np.int64)[:, None])
        return tensors


def read_ahead(batch_at: Callable[[int], Batch], step: int, ahead: int = 2) -> Iterator[Batch]:
    """Batches step, step + 1, ... without end, read by a thread of their own while the one before is learned from."""
    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(batch_at, step + number) for number in range(ahead))
        while True:
            batch = waiting.popleft().result()
            step += 1
            waiting.append(reader.submit(batch_at, step + ahead - 1))
            yield batch


# ======================================================================================================================
# FIXED: backbone
# ======================================================================================================================
def blstats_features(blstats: torch.Tensor) -> torch.Tensor:
    """[n, 27] int -> [n, 47] float32 of about unit size. The last one flags hidden status lines (maximal HP is never 0)."""
    stats = blstats.float()
    hp, hp_max, energy, energy_max = stats[:, 10], stats[:, 11], stats[:, 14], stats[:, 15]
    numbers = [stats[:, place] / 25.0 for place in (2, 4, 5, 6, 7, 8)] + [stats[:, 3] / 125.0]  # attributes
    numbers += [torch.log1p(hp.clamp(min=0)) / 5.0, torch.log1p(hp_max.clamp(min=0)) / 5.0, hp / hp_max.clamp(min=1)]
    numbers += [torch.log1p(energy.clamp(min=0)) / 5.0, energy / energy_max.clamp(min=1), stats[:, 12] / 10.0]  # depth
    numbers += [torch.log1p(stats[:, 13].clamp(min=0)) / 8.0, stats[:, 16] / 10.0]  # gold, armour class
    numbers += [stats[:, 17] / 20.0, stats[:, 18] / 20.0]  # hit dice, experience level
    numbers += [torch.log1p(stats[:, place].clamp(min=0)) / 10.0 for place in (19, 20)]  # experience, turn
    numbers += [stats[:, 26]]  # alignment
    hunger = F.one_hot(blstats[:, 21].long().clamp(0, 6), 7)
    load = F.one_hot(blstats[:, 22].long().clamp(0, 5), 6)
    conditions = (blstats[:, 25, None].int() >> torch.arange(13, device=blstats.device, dtype=torch.int32)) & 1
    features = torch.cat([torch.stack(numbers, dim=1), hunger.float(), load.float(), conditions.float()], dim=1)
    hidden = hp_max[:, None] == 0
    return torch.cat([torch.where(hidden, 0.0, features), hidden.float()], dim=1)


class ScreenEncoder(nn.Module):
    """Characters and colours of the whole terminal, of a crop centred on the cursor, and of the message line.

    [n, 24, 80] characters and colours, [n, 2] cursor -> [n, output_dim].
    """

    CROP = 15  # side of the crop, in cells
    CHAR_DIM = 16  # size of a cell's embedding

    def __init__(self, screen_dim: int = 256, crop_dim: int = 256, message_dim: int = 128) -> None:
        super().__init__()
        self.char_embedding = nn.Embedding(256, self.CHAR_DIM)
        self.color_embedding = nn.Embedding(32, self.CHAR_DIM)

        def conv(inputs: int, outputs: int, stride: int = 2) -> List[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]

        def line(inputs: int) -> List[nn.Module]:
            return [nn.Conv1d(inputs, 64, 5, stride=2, padding=2), nn.ReLU()]

        def linear(inputs: int, outputs: int) -> List[nn.Module]:
            return [nn.Flatten(), nn.Linear(inputs, outputs), nn.ReLU()]

        C = self.CHAR_DIM
        self.screen = nn.Sequential(*conv(C, 32), *conv(32, 64), *conv(64, 64), *linear(64 * 3 * 10, screen_dim))
        self.crop = nn.Sequential(*conv(C, 32, 1), *conv(32, 64), *conv(64, 64), *linear(64 * 4 * 4, crop_dim))
        self.message = nn.Sequential(*line(C), *line(64), *linear(64 * 20, message_dim))
        self.output_dim = screen_dim + crop_dim + message_dim

    def crop_cells(self, cells: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
        """[n, 24, 80] cell codes, [n, 2] -> [n, CROP, CROP]; code 0 outside of the terminal."""
        half = self.CROP // 2
        padded = F.pad(cells, (half, half, half, half))
        window = torch.arange(self.CROP, device=cells.device)
        rows = cursor[:, 0, None].long().clamp(0, ROWS - 1) + window  # [n, CROP]
        columns = cursor[:, 1, None].long().clamp(0, COLS - 1) + window
        index = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
        return padded.flatten(1).gather(1, index.flatten(1)).view(-1, self.CROP, self.CROP)

    def forward(self, chars: torch.Tensor, colors: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
        # One table for all pairs of a character and a colour: one look-up (and one gradient) a cell instead of two.
        table = (self.char_embedding.weight[:, None] + self.color_embedding.weight[None]).flatten(0, 1)  # [256 * 32, C]
        cells = chars.int() * 32 + (colors.int() & 31)  # [n, 24, 80]
        screen = F.embedding(cells, table).movedim(3, 1)  # [n, C, 24, 80]
        crop = F.embedding(self.crop_cells(cells, cursor), table).movedim(3, 1)
        return torch.cat([self.screen(screen), self.crop(crop), self.message(screen[:, :, 0])], dim=1)


class ModelBackbone(nn.Module):
    """Encoders of one frame and the previous action, feeding an LSTM: what every submission's Model is built on.

    `forward(inputs, state)`: inputs hold `observations` [B, T, ...] and prev_actions [B, T] (NO_ACTION at a game's first
    frame), of any integer or float type; state is None (zeros) or (h, c), each [L, B, H]. Returns (core_output [B, T, H],
    new state).
    """

    observations = ("tty_chars", "tty_colors", "tty_cursor", "blstats")

    def __init__(
        self,
        action_dim: int,
        rnn_hidden_dim: int = 2048,
        rnn_layers: int = 2,
        rnn_dropout: float = 0.0,
        use_prev_action: bool = True,
    ) -> None:
        super().__init__()
        self.num_actions, self.rnn_hidden_dim, self.use_prev_action = action_dim, rnn_hidden_dim, use_prev_action
        self.no_action = action_dim  # stands for the previous action where there is none
        self.screen_encoder = ScreenEncoder()
        self.blstats_encoder = nn.Sequential(nn.Linear(47 + 2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.action_embedding = nn.Embedding(action_dim + 1, 64)
        features = self.screen_encoder.output_dim + 128 + (64 if use_prev_action else 0)
        self.rnn = nn.LSTM(features, rnn_hidden_dim, num_layers=rnn_layers, dropout=rnn_dropout, batch_first=True)
        self.acting_dtype = torch.float32  # of the matrix products of single steps on a CPU; bfloat16 is faster
        self._packed: Any = None

    def encode(self, inputs: Batch) -> torch.Tensor:
        """-> [B, T, features]: each frame on its own."""
        B, T = inputs["tty_chars"].shape[:2]
        chars, colors, cursor, blstats = (inputs[name].flatten(0, 1) for name in self.observations)
        position = cursor.float() / cursor.new_tensor([ROWS, COLS]).float()
        stats = self.blstats_encoder(torch.cat([blstats_features(blstats), position], dim=1))
        parts = [self.screen_encoder(chars, colors, cursor), stats]
        if self.use_prev_action:
            parts.append(self.action_embedding(inputs["prev_actions"].long().flatten()))
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=1).view(B, T, -1)

    def forward(self, inputs: Batch, state: Optional[RNNState] = None) -> Tuple[torch.Tensor, RNNState]:
        features = self.encode(inputs)
        acting = features.shape[1] == 1 and not torch.is_grad_enabled() and not self.training
        if acting and features.device.type == "cpu":
            return self._step(features[:, 0], state)
        return self.rnn(features, None if state is None else tuple(state))

    def _packed_weights(self) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's weights as one matrix [4H, inputs + H] and bias [4H], made anew when a parameter has changed."""
        version = (self.acting_dtype, *((weight._version, weight.data_ptr()) for weight in self.rnn.parameters()))
        if self._packed is None or self._packed[0] != version:
            layers = [[weight.detach().to(self.acting_dtype) for weight in weights] for weights in self.rnn.all_weights]
            packed = [(torch.cat([w_in, w_h], dim=1), b_in + b_h) for w_in, w_h, b_in, b_h in layers]
            if self.acting_dtype is torch.float32 and torch.backends.mkldnn.is_available():
                packed = [(weight.to_mkldnn(), bias.to_mkldnn()) for weight, bias in packed]
            self._packed = (version, packed)
        return self._packed[1]

    def _step(self, features: torch.Tensor, state: Optional[RNNState]) -> Tuple[torch.Tensor, RNNState]:
        """One step of the LSTM as one matrix product a layer: nn.LSTM on a CPU packs all its weights at every call."""
        L, H = self.rnn.num_layers, self.rnn.hidden_size
        h, c = state if state is not None else (features.new_zeros(L, len(features), H),) * 2
        x, hs, cs = features, [], []
        for layer, (weight, bias) in enumerate(self._packed_weights()):
            inputs = torch.cat([x, h[layer]], dim=1).to(weight.dtype)
            # In float32 torch would take MKL, for few rows up to twice as slow as oneDNN; in bfloat16 it takes oneDNN.
            if weight.is_mkldnn:
                gates = F.linear(inputs.to_mkldnn(), weight, bias).to_dense()
            else:
                gates = F.linear(inputs, weight, bias).to(x.dtype)
            i, f, g, o = gates.chunk(4, dim=1)  # PyTorch's order of gates
            cs.append(torch.sigmoid(f) * c[layer] + torch.sigmoid(i) * torch.tanh(g))
            x = torch.sigmoid(o) * torch.tanh(cs[-1])
            hs.append(x)
        return x[:, None], (torch.stack(hs), torch.stack(cs))

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a copy need not copy 230 MB that are quickly made again


# ======================================================================================================================
# ========================================  EDITABLE BEGIN  ============================================================
# ======================================================================================================================
# Recurrent advantage-weighted regression with burn-in. The benchmark takes this block alone and runs it inside its own
# file, so it names nothing from outside but torch, nn, F, np and Categorical.
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from torch import Tensor


@dataclass
class AWRConfig:
    """Hyper-parameters of the algorithm, each with its source; `config.algorithm` overrides them by name."""

    head_dim: int = 120  # width of the head's shared projection; up to 122 keep the head within 267,033 parameters
    burn_in: int = (
        4  # steps re-run before a chunk to refresh the stored state (R2D2, Kapturowski et al. 2019, section 3)
    )
    lam: float = 0.95  # lambda of the returns (TD(lambda); the usual value, arXiv 1506.02438)
    # Temperature: weight = exp(advantage / (beta * scale)) (AWR, arXiv 1910.00177, equation 7). Rewards are rare and of
    # very unequal size: with AWR's own 1 and 20 a few frames take half to two thirds of a batch's effective size.
    beta: float = 3.0
    max_weight: float = 5.0  # largest weight before normalisation (AWR, section 5, has 20)
    scale_rate: float = 0.01  # rate of the advantages' running mean square (MARWIL, 2018, equation 4)
    value_coef: float = 0.5  # weight of the value loss against the policy loss
    temperature: float = 1.0  # softmax temperature of the actions drawn when acting


def awr_config(overrides: Dict[str, Any]) -> AWRConfig:
    """AWRConfig with these values. Raises ValueError for an unknown name, a wrong type or a value out of range."""
    kinds = {item.name: type(item.default) for item in fields(AWRConfig)}
    for name, value in overrides.items():
        if name not in kinds:
            raise ValueError(f"algorithm: unknown setting {name!r}; there are {', '.join(kinds)}")
        low = 0 if name in ("burn_in", "lam", "value_coef") else 1e-9
        high = 1 if name in ("lam", "scale_rate") else 1e9
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or kinds[name](value) != value:
            raise ValueError(
                f"algorithm: {name} must be a {kinds[name].__name__} in [{low:g}, {high:g}], not {value!r}"
            )
    return replace(AWRConfig(), **{name: kinds[name](value) for name, value in overrides.items()})


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, T] where mask [B, T] is 1 (0 where nothing counts)."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def lambda_returns(rewards: Tensor, dones: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) targets: G_t = r_t + gamma (1 - d_t) ((1 - lam) v_{t+1} + lam G_{t+1}), with G_T = v_T.

    rewards, dones [B, T] float; values [B, T + 1] float (no gradient flows through the result). Returns [B, T].
    """
    if values.shape != (rewards.shape[0], rewards.shape[1] + 1) or dones.shape != rewards.shape:
        raise ValueError(f"shapes do not fit: {tuple(rewards.shape)}, {tuple(dones.shape)}, {tuple(values.shape)}")
    values = values.detach()
    discounts = gamma * (1.0 - dones)
    result, targets = values[:, -1], []
    for t in range(rewards.shape[1] - 1, -1, -1):
        result = rewards[:, t] + discounts[:, t] * ((1.0 - lam) * values[:, t + 1] + lam * result)
        targets.append(result)
    return torch.stack(targets[::-1], dim=1)


def advantage_weights(
    advantages: Tensor, mask: Tensor, scale: Tensor, beta: float, max_weight: float
) -> Tuple[Tensor, Tensor]:
    """exp(A / (beta * scale)), clipped at `max_weight` before exp so that it stays finite, with mean 1 over `mask`.

    advantages, mask [B, T] float; scale [] float. Returns the weights [B, T], 0 where the mask is 0, and the share [] of
    counting frames whose weight was clipped.
    """
    exponents = advantages / (beta * scale.clamp(min=1e-6))
    highest = float(np.log(max_weight))
    weights = torch.exp(exponents.clamp(max=highest)) * mask
    clipped = masked_mean((exponents >= highest).float(), mask)
    return weights * (mask.sum().clamp(min=1.0) / weights.sum().clamp(min=1e-6)), clipped


def clear(state: Any, rows: Tensor) -> Any:
    """(h, c), each [L, B, H], with zeros in the rows [B] bool; None (zeros everywhere) stays None."""
    return None if state is None else tuple(part.masked_fill(rows[None, :, None], 0.0) for part in state)


class ActingState(NamedTuple):
    """What `vec_act` hands on from tick to tick for N games."""

    rnn_state: Any  # (h, c), each [L, N, H]
    seen: List[Tuple[bytes, int]]  # each game's attributes and turn, as its status lines last showed them


def games_begun(seen: List[Tuple[bytes, int]], tty_chars: Any) -> Tuple[List[bool], List[Tuple[bytes, int]]]:
    """Which of N slots show a new game: turn 1 after a later one, or with attributes other than before. Screens [N, 24, 80].

    The benchmark hands on the recurrent state of the slot's game before and says nothing; menus may hide the lines.
    """
    begun, now = [], []
    for before, screen in zip(seen, tty_chars):
        found = re.search(rb"( St:.* Ch:\d+) .* T:(\d{1,9})", np.asarray(screen[22:], dtype=np.uint8).tobytes())
        shown = (found.group(1), int(found.group(2))) if found else before
        begun.append(shown[1] == 1 and before[1] > 0 and (before[1] > 1 or shown[0] != before[0]))
        now.append(shown)
    return begun, now


class Model(nn.Module):
    """Policy and value on the recurrent backbone: a head of two streams on one projection.

    The streams are split as in a dueling network (arXiv 1511.06581) but not added up: there are no action values.
    """

    def __init__(self, backbone: Any, hyper: Optional[AWRConfig] = None) -> None:
        super().__init__()
        self.backbone, self.hyper = backbone, hyper or AWRConfig()
        self.observations = getattr(backbone, "observations", ("tty_chars", "screen_image"))  # or the benchmark's
        self.no_action = getattr(backbone, "no_action", 0)  # the benchmark's backbone has no index for it
        self.shared = nn.Sequential(nn.Linear(backbone.rnn_hidden_dim, self.hyper.head_dim), nn.ReLU())
        self.policy = nn.Linear(self.hyper.head_dim, backbone.num_actions)
        self.value = nn.Linear(self.hyper.head_dim, 1)
        # Running mean of the squared advantage; 0: none seen yet. A buffer is saved with the weights and is no parameter.
        self.register_buffer("advantage_square", torch.zeros(()))

    def head(self, core_output: Tensor) -> Tuple[Tensor, Tensor]:
        """[B, T, H] -> logits [B, T, A] and values [B, T], in float32: half precision rounds a value by more than a step
        changes it.

        A fresh LSTM's output is some 0.02 in size and differs by a thousandth from frame to frame: for its first hundred
        updates the network would learn little but how often each action is taken. Normalised (without parameters, arXiv
        1607.06450), it learns from the first one on.
        """
        with torch.autocast(core_output.device.type, enabled=False):
            shared = self.shared(F.layer_norm(core_output.float(), core_output.shape[-1:]))
            return self.policy(shared), self.value(shared).squeeze(-1)

    @torch.no_grad()
    def vec_act(
        self, obs: Dict[str, np.ndarray], state: Optional[ActingState] = None, device: str = "cpu"
    ) -> Tuple[np.ndarray, ActingState]:
        """Draws an action for each of N games. obs: arrays [N, ...], prev_actions [N] among them. -> [N] int64, new state.

        Actions are drawn, not taken by argmax: greedy imitation of AutoAscend repeats itself without end (README).
        """
        inputs = {name: torch.as_tensor(obs[name], device=device)[:, None] for name in self.observations}
        previous = torch.as_tensor(obs["prev_actions"], device=device).long()
        rnn_state, seen = state or (None, [(b"", 0)] * len(previous))
        begun, seen = games_begun(seen, obs["tty_chars"])
        rows = torch.tensor(begun, device=device)
        if self.no_action:  # our own loop says where a game begins
            rows |= previous == self.no_action
        inputs["prev_actions"] = previous.masked_fill(rows, self.no_action)[:, None]
        core_output, rnn_state = self.backbone(inputs, clear(rnn_state, rows))
        logits, _ = self.head(core_output)
        actions = Categorical(logits=logits[:, -1] / self.hyper.temperature).sample()
        return actions.cpu().numpy(), ActingState(rnn_state, seen)


class OfflineAlgorithm:
    """Recurrent advantage-weighted regression.

    The value stream learns lambda-returns; the policy stream regresses onto the data's actions, weighted by
    exp(advantage). The recurrent state is carried from chunk to chunk: it is kept as it was `burn_in` steps before the
    chunk's end ("core"), together with the frames since ("tail"). Those are re-run without gradient before the next chunk,
    so that its first state comes from the current weights. Another head is a subclass of Model, named as `model_class`.
    """

    model_class = Model

    def __init__(self, backbone: nn.Module, config: Any, device: str) -> None:
        self.hyper, self.gamma = awr_config(getattr(config, "algorithm", {})), config.gamma
        self.model = self.model_class(backbone, self.hyper).to(device)
        self.values: Any = None  # of the last chunk, [B, T], for a loop that compares them with the returns

    def parameters(self) -> List[nn.Parameter]:
        return list(self.model.parameters())

    def after_gradient_step(self) -> None:
        """Nothing follows a step: there is no target network, since values of the data's own policy need none."""

    def train_step(
        self, batch: Dict[str, Tensor], prev_actions: Tensor, rnn_states: Dict[str, Any]
    ) -> Tuple[Tensor, Dict[str, Any], Dict[str, Tensor]]:
        """One chunk of T steps and the frame after it -> (loss [], new rnn_states, info). Runs under no_grad as well.

        batch [B, T + 1, ...]; prev_actions [B, 1]: the action before the first frame; rnn_states: {} at first. Games may
        begin anywhere in the chunk. The keys `mask` and `starts` are our loader's: without them every frame counts, and a
        game begins at frame 0 if the chunk before ended one.
        """
        actions, rewards, dones = batch["actions"].long(), batch["rewards"].float(), batch["dones"].float()
        mask = batch["mask"].float() if "mask" in batch else torch.ones_like(rewards)
        ended = rnn_states.get("ended", torch.ones_like(dones[:, 0], dtype=torch.bool))
        resets = torch.cat([batch.get("starts", ended)[:, None], dones[:, :-1] * mask[:, 1:] > 0], dim=1)  # [B, T + 1]
        previous = torch.where(mask[:, :-1] > 0, actions[:, :-1], self.model.no_action)
        previous = torch.cat([prev_actions.long(), previous], dim=1).masked_fill(resets, self.model.no_action)
        inputs = {"prev_actions": previous, **{name: batch[name] for name in self.model.observations}}

        T = actions.shape[1] - 1
        store_at = T - min(self.hyper.burn_in, T)
        core_output, states = self._unroll(inputs, resets, self._burn_in(rnn_states), store_at)
        logits, values = self.model.head(core_output)
        loss, info = self._loss(logits[:, :T], values, *(x[:, :T] for x in (actions, rewards, dones, mask)))
        self.values = values[:, :T].detach()

        new_states = {"ended": dones[:, T - 1] > 0}
        if states[store_at] is not None:
            new_states["core"] = tuple(part.detach() for part in states[store_at])
        if store_at < T:  # copies, since a slice would keep the whole batch alive
            new_states["tail"] = {name: value[:, store_at:T].clone() for name, value in inputs.items()}
            new_states["tail"]["resets"] = resets[:, store_at:T].clone()
        return loss, new_states, info

    @torch.no_grad()
    def _burn_in(self, rnn_states: Dict[str, Any]) -> Any:
        """The state after the chunk before: the stored one, brought up to date over the frames since."""
        state = rnn_states.get("core")
        if "tail" in rnn_states:
            inputs = dict(rnn_states["tail"])
            resets = inputs.pop("resets")
            state = self._unroll(inputs, resets, state)[1][resets.shape[1]]
            # Until 2.10 torch's autocast kept the weights that it had cast here without gradient for the pass with it.
            torch.clear_autocast_cache()
        return state

    def _unroll(
        self, inputs: Dict[str, Tensor], resets: Tensor, state: Any, *stops: int
    ) -> Tuple[Tensor, Dict[int, Any]]:
        """Runs frames [B, T, ...] through the backbone, stopping before each frame at which some row's game begins.

        resets [B, T] bool. Returns core_output [B, T, H] and the states (cleared where games begin) before each stop, before
        those in `stops` too, and after frame T - 1.
        """
        T = resets.shape[1]
        columns = resets[:, 1:].any(dim=0).nonzero().flatten() + 1
        cuts = sorted({0, *stops, *columns.tolist(), T})
        outputs, states = [], {}
        for begin, end in zip(cuts, cuts[1:]):
            states[begin] = state = clear(state, resets[:, begin])
            piece = {name: value[:, begin:end].contiguous() for name, value in inputs.items()}
            output, state = self.model.backbone(piece, state)
            outputs.append(output)
        states[T] = state
        return torch.cat(outputs, dim=1), states

    def _loss(self, logits: Tensor, values: Tensor, *chunk: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
        """logits [B, T, A], values [B, T + 1]; of the chunk, [B, T] each, actions, rewards, dones and mask -> loss [] and
        metrics, each []."""
        actions, rewards, dones, mask = chunk
        hyper, model = self.hyper, self.model
        targets = lambda_returns(rewards, dones, values, self.gamma, hyper.lam)
        advantages = targets - values[:, :-1].detach()
        if torch.is_grad_enabled():  # held-out games must leave no trace
            square = masked_mean(advantages**2, mask)
            running = torch.lerp(model.advantage_square, square, hyper.scale_rate)
            model.advantage_square = torch.where(model.advantage_square > 0, running, square)
        scale = model.advantage_square.sqrt()
        weights, clipped = advantage_weights(advantages, mask, scale, hyper.beta, hyper.max_weight)

        log_probs = F.log_softmax(logits, dim=-1)
        losses = -log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # [B, T] nats
        policy_loss = masked_mean(weights * losses, mask)
        value_loss = self._value_loss(values[:, :-1], targets, mask)
        loss = policy_loss + hyper.value_coef * value_loss
        with torch.no_grad():
            effective = weights.sum() ** 2 / (weights**2).sum().clamp(min=1e-6)
            info = {
                "loss": loss.detach(),
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "loss_per_action": masked_mean(losses, mask),
                "accuracy": masked_mean((logits.argmax(dim=-1) == actions).float(), mask),
                "entropy": masked_mean(-(log_probs.exp() * log_probs).sum(dim=-1), mask),
                "value_mean": masked_mean(values[:, :-1], mask),
                "advantage_scale": scale,
                "weight_max": weights.max(),
                "weight_clipped": clipped,
                "effective_sample_size": effective / mask.sum().clamp(min=1.0),
                "counting_frames": mask.mean(),
            }
        return loss, info

    def _value_loss(self, values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return masked_mean((values - targets) ** 2, mask)


# ======================================================================================================================
# ========================================  EDITABLE END  ==============================================================
# ======================================================================================================================


# ======================================================================================================================
# FIXED: the game and its evaluation
# ======================================================================================================================
OBSERVATIONS = tuple(OBSERVATION_SHAPES)
# nle.dataset shows line-drawing bytes as plain characters, the live terminal does not. They appear only where the player
# typed such a byte himself; with this table live screens equal recorded ones there too.
PLAIN_CHARS = np.arange(256, dtype=np.uint8)
for _plain, _codes in zip(b"#|-{}.", ("b0b1f0f1", "b3b4c3fe", "bfc0c1c2c4c5d9da", "f4", "f7", "fa")):
    PLAIN_CHARS[list(bytes.fromhex(_codes))] = _plain
QUIT = [int(KEY_TO_ACTION[key]) for key in (27, 27, int(nethack.Command.QUIT), ord("y"))]  # ESC, ESC, #quit, y
NO_PROGRESS_STEPS = 1000  # the benchmark's and the NetHack Challenge's: aborted when the turn counter stands still


class NetHackGame:
    """One game of the NetHack Challenge's kind that can be seeded; the same on nle 0.9 (gym) and 1.x (gymnasium).

    Observations are as in OBSERVATION_SHAPES, just as they come from recorded games: fresh arrays, or those given as
    `into`, written over at every step. `savedir` records in NLD-AA's layout.
    """

    def __init__(self, character: str, savedir: Any = None, max_steps: int = 1_000_000, into: Any = None) -> None:
        options: Dict[str, Any] = dict(character=character, actions=nethack.ACTIONS, observation_keys=OBSERVATIONS)
        options.update(allow_all_modes=True, allow_all_yn_questions=True, penalty_step=0.0, penalty_time=0.0)
        options.update(max_episode_steps=10**9, savedir=savedir, save_ttyrec_every=1 if savedir else 0)
        if "fix_moon_phase" in inspect.signature(NLE.__init__).parameters:
            options["fix_moon_phase"] = True  # otherwise the date enters the game
        self.env, self.max_steps, self.into = NetHackScore(**options), max_steps, into
        self.status_lines, self.status = b"", np.zeros(NUM_BLSTATS, dtype=np.int32)

    def _observe(self, raw: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Copies, since NLE writes the next frame into the same arrays."""
        obs = self.into or {name: np.empty(shape, kind) for name, (kind, *shape) in OBSERVATION_SHAPES.items()}
        PLAIN_CHARS.take(raw["tty_chars"], out=obs["tty_chars"], mode="clip")  # without a mode numpy buffers the result
        obs["tty_colors"][:], obs["tty_cursor"][:] = raw["tty_colors"], raw["tty_cursor"]
        lines = obs["tty_chars"][22:].tobytes()
        if lines != self.status_lines:  # they change at every second step or so
            self.status_lines, self.status = lines, read_blstats(obs["tty_chars"][None])[0]
        obs["blstats"][:] = self.status
        return obs

    def reset(self, core_seed: int, disp_seed: int) -> Dict[str, np.ndarray]:
        """Begins the game of these two seeds."""
        self.env.unwrapped.seed(core=core_seed, disp=disp_seed, reseed=False)  # holds for one game only
        raw = self.env.reset()
        raw = raw[0] if isinstance(raw, tuple) else raw
        self.steps = self.score = self.still = 0
        self.depth, self.turn = int(raw["blstats"][12]), int(raw["blstats"][20])
        return self._observe(raw)

    def step(self, action: int) -> Tuple[Dict[str, np.ndarray], float, bool, Dict[str, Any]]:
        """-> obs, reward (difference of the in-game score), done, info. At the end of a game info has score, depth, turns,
        length, end ('died', 'no progress' or 'step limit') and cause (of a death, as GameResult has it)."""
        raw, reward, over, *_, info = self.env.step(int(action))
        self.steps, self.score = self.steps + 1, self.score + int(reward)
        if not over:  # the screens after a game's end have all-zero blstats
            turn, self.depth = int(raw["blstats"][20]), int(raw["blstats"][12])
            self.still, self.turn = (self.still + 1 if turn == self.turn else 0), turn
        stuck, cut = self.still >= NO_PROGRESS_STEPS, self.steps >= self.max_steps
        end = "died" if over else "no progress" if stuck else "step limit" if cut else None
        if end is not None:
            cause = self.env.unwrapped.nethack.how_done().name.lower().replace("_", " ") if over else ""
            info = dict(
                info, score=self.score, depth=self.depth, turns=self.turn, length=self.steps, end=end, cause=cause
            )
        return self._observe(raw), float(reward), end is not None, info

    def close(self, quit: bool = False) -> None:
        """`quit` ends the game with the keys that a person would press: NLE records no xlogfile line of one not over."""
        any(self.env.step(action)[2] for action in (3 * QUIT if quit else []))
        self.env.close()


class GameResult(NamedTuple):
    """One evaluated game."""

    game: int  # its number k; its seeds derive from eval_seed and k
    score: float
    depth: int
    turns: int
    length: int
    end: str
    cause: (
        str  # of a death, NetHack's own word for how: died (killed), starving, drowning, stoning, quit, ascended, ...
    )


def game_seeds(eval_seed: int, game: int) -> Tuple[int, int]:
    return derived_seed(eval_seed, game, 0) % 2**31, derived_seed(eval_seed, game, 1) % 2**31


SHARED_SHAPES = {**OBSERVATION_SHAPES, "actions": (np.int64,), "fresh": (np.bool_,), "active": (np.bool_,)}


def shared_views(shared: Dict[str, Any], rows: int) -> Dict[str, np.ndarray]:
    """Arrays [rows, ...] over memory that the main process shares with its workers."""
    shapes = {name: (kind, (rows, *shape)) for name, (kind, *shape) in SHARED_SHAPES.items()}
    return {name: np.frombuffer(shared[name], kind).reshape(shape) for name, (kind, shape) in shapes.items()}


def play_slot(
    views: Dict[str, np.ndarray], row: int, numbers: Sequence[int], character: str, config: TrainConfig
) -> Iterator[Optional[GameResult]]:
    """Plays a slot's games, one after another, into a row of the shared arrays.

    The first `next` begins the first game; each further one takes the row's action and gives the result of the game that
    it ended, or None. With `eval_record` each game is recorded in a folder of its own.
    """
    screen = {name: views[name][row] for name in OBSERVATIONS}
    game: Optional[NetHackGame] = None
    result: Optional[GameResult] = None
    for number in numbers:
        if game is None or config.eval_record:  # NLE keeps to the folder that it began with
            savedir = str(Path(config.eval_record, f"{character}-{number}")) if config.eval_record else None
            game = NetHackGame(character, savedir, config.eval_max_steps, into=screen)
        game.reset(*game_seeds(config.eval_seed, number))
        views["active"][row] = views["fresh"][row] = True
        done = False
        while not done:
            yield result
            result, views["fresh"][row] = None, False
            *_, done, info = game.step(int(views["actions"][row]))
        result = GameResult(number, *(info[name] for name in GameResult._fields[1:]))
        if config.eval_record:
            game.close(quit=result.end != "died")
    for array in screen.values():
        array[:] = 0
    views["active"][row] = views["fresh"][row] = False
    while True:
        yield result
        result = None


def play_worker(
    pipe: Any, shared: Dict[str, Any], rows: Sequence[int], padded: int, config: TrainConfig, folder: str
) -> None:
    """A worker process: plays its slots' games, a step whenever the main process says so. Slot s plays games s, s + slots, ..."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # through `finally`: temporary folders must go
    tempfile.tempdir = folder  # for NLE, which makes a folder a game
    views, slots, players = shared_views(shared, padded), config.eval_processes, []
    try:
        while True:
            message = pipe.recv_bytes()
            if message:  # begin
                character, games = pickle.loads(message)
                players = [play_slot(views, row, range(row, games, slots), character, config) for row in rows]
            results = [result for result in map(next, players) if result is not None]
            pipe.send_bytes(pickle.dumps(results) if results else b"")
    except (EOFError, OSError):  # the main process has closed the pipe, or is gone
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class GamePool:
    """`eval_processes` game slots spread over worker processes, of several torchrun processes each its share.

    Game k is played by slot k % slots from seeds of its own, so neither the number of cores nor of processes changes it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.rows = (
            -(-config.eval_processes // 8) * 8
        )  # bits of a matrix product depend on its rows, at multiples of 8 not
        spawn = multiprocessing.get_context("spawn")
        shared = {
            name: spawn.RawArray("b", self.rows * np.dtype(kind).itemsize * math.prod(shape))
            for name, (kind, *shape) in SHARED_SHAPES.items()
        }
        self.views, self.folder = shared_views(shared, self.rows), tempfile.mkdtemp(prefix="nethack_games_")
        mine = range(config.eval_processes)[RANK::WORLD]
        workers = min(config.eval_workers or -(-CORES // LOCAL_WORLD), len(mine))
        self.pipes, self.processes = [], []
        for number in range(workers):
            pipe, theirs = spawn.Pipe()
            options = (theirs, shared, mine[number::workers], self.rows, config, self.folder)
            self.processes.append(spawn.Process(target=play_worker, args=options, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(pipe)

    def tell(self, message: bytes) -> List[GameResult]:
        """All workers take the same message and work at once -> games that ended. Raises UserError where one has died."""
        try:
            for pipe in self.pipes:
                pipe.send_bytes(message)
            answers = [pipe.recv_bytes() for pipe in self.pipes]
        except (EOFError, OSError):
            raise UserError("a process that plays games has died; --resume true plays this evaluation again") from None
        return [result for answer in answers if answer for result in pickle.loads(answer)]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=5)
            process.kill()  # a stopped process hears nothing else
        shutil.rmtree(self.folder, ignore_errors=True)


def vec_evaluate(
    pool: GamePool, actor: Any, character: str, num_episodes: int, seed: int, device: Any = "cpu", check: Callable = int
) -> List[GameResult]:
    """Plays games 0 .. num_episodes - 1 of the character (this process's share of them): the benchmark's loop.

    Repeats to the bit on any number of worker processes. `check` is called at every tick and may raise.
    """
    actor.eval()
    pool.tell(pickle.dumps((character, num_episodes)))
    views, rnn_states, results, tick = pool.views, None, [], 0
    prev_actions = np.full(pool.rows, NO_ACTION, dtype=np.int64)
    bar = progress(total=num_episodes, desc=f"playing {character}", unit="game", leave=False)
    while views["active"].any():
        check()
        prev_actions[views["fresh"] | ~views["active"]] = NO_ACTION
        obs = {name: views[name].copy() for name in OBSERVATIONS}
        with torch.random.fork_rng():  # sampled actions depend on the seed and the tick, and disturb nothing else
            torch.manual_seed(derived_seed(seed, tick))
            actions, rnn_states = actor.vec_act({**obs, "prev_actions": prev_actions}, rnn_states, device=str(device))
        prev_actions = np.array(actions, dtype=np.int64)
        views["actions"][:] = prev_actions
        ended = pool.tell(b"")
        results += ended
        bar.update(len(ended))
        tick += 1
    bar.close()
    actor.train()
    return sorted(results)


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = 10_000) -> Tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over games."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize_games(results: Sequence[GameResult], character: str) -> Dict[str, float]:
    """Metrics of one character's games, under the benchmark's names where it has them (reward_*, depth_*)."""
    scores, depths, turns, lengths = np.array([result[1:5] for result in results], dtype=float).T
    normalized = scores / AUTOASCEND_MEAN_SCORE[character]
    summary = {"normalized_score": normalized.mean(), "normalized_score_median": np.median(normalized)}
    summary["normalized_score_low"], summary["normalized_score_high"] = bootstrap_interval(normalized)
    for statistic in ("median", "mean", "std", "min", "max"):
        summary[f"reward_{statistic}"] = getattr(np, statistic)(scores)
        summary[f"depth_{statistic}"] = getattr(np, statistic)(depths)
    summary.update(turns_mean=turns.mean(), length_mean=lengths.mean())
    for end in ("died", "no progress", "step limit"):
        summary["end_" + end.replace(" ", "_")] = np.mean([result.end == end for result in results])
    return {name: float(value) for name, value in summary.items()}


def score_table(summaries: Dict[str, Dict[str, float]], games: int) -> str:
    """The table that ends an evaluation: a line a character."""
    line = (
        "{:<12} {games:>5} {normalized_score:>10.4f} {normalized_score_low:>8.4f} - {normalized_score_high:.4f} "
        "{reward_mean:>8.0f} {reward_median:>8.0f} {depth_mean:>6.1f} {turns_mean:>7.0f}  "
        "{end_died:.0%}/{end_no_progress:.0%}/{end_step_limit:.0%}"
    )
    lines = ["character    games normalized     95 % interval     mean   median  depth   turns  died/stuck/cut"]
    return "\n".join(lines + [line.format(name, games=games, **row) for name, row in summaries.items()])


def geometric_mean(scores: Sequence[float]) -> float:
    """Of several characters' scores, 0 if any is not above 0. (The task squashes each score before it takes this mean.)"""
    if len(scores) == 1:
        return scores[0]
    return math.exp(sum(map(math.log, scores)) / len(scores)) if min(scores) > 0 else 0.0


@torch.no_grad()
def evaluate_heldout(trainer: "Trainer", loader: ChunkLoader, max_frames: int) -> Dict[str, float]:
    """The algorithm's own train_step over held-out chunks from their beginning: means of its metrics over frames.

    `explained_variance` is that of the exact returns by the value, where the algorithm keeps its `values` [B, T].
    """
    algorithm, states, sums, pairs = trainer.algorithm, {}, {"frames": 0.0}, []
    algorithm.model.eval()
    steps = min(loader.plan.steps, -(-max_frames // (loader.plan.rows * loader.seq_len)))
    for step in progress(iterable=range(steps), desc="held-out games", unit="batch", leave=False):
        batch = map_tensors(lambda tensor: tensor.to(trainer.device), loader.batch_at(step))
        prev_actions, mask = batch.pop("prev_actions"), batch["mask"][:, :-1]
        with trainer.autocast():
            _, states, info = algorithm.train_step(batch, prev_actions, states)
        frames = float(mask.sum())
        for name, value in [*info.items(), ("frames", 1.0)]:
            sums[name] = sums.get(name, 0.0) + float(value) * frames
        if getattr(algorithm, "values", None) is not None:
            pairs.append(torch.stack([batch["returns"][:, :-1][mask], algorithm.values[mask]]).cpu())
    algorithm.model.train()
    parts = gather((sums, torch.cat([torch.zeros(2, 0), *pairs], dim=1).double()))
    frames = sum(part["frames"] for part, _ in parts)
    means = {name: sum(part[name] for part, _ in parts) / max(frames, 1.0) for name in sums}
    returns, values = torch.cat([pair for _, pair in parts], dim=1)
    if len(returns) and returns.var(False) > 0:
        error = returns - values
        means["value_rmse"] = float(error.square().mean().sqrt())
        means["explained_variance"] = 1.0 - float(error.var(False) / returns.var(False))
    return {**means, "frames": frames}


# ======================================================================================================================
# FIXED: the run's folder, checkpoints and resuming
# ======================================================================================================================
CHECKPOINT_FORMAT = 2
# What may differ between a run and its continuation: how long it is, where things lie, how it is watched.
MAY_DIFFER = "update_steps data_path store_path checkpoints_path evaluate project log_every checkpoint_every eval_every"
MAY_DIFFER += " keep_checkpoints resume data_mode render_processes device submission"


def open_folder(first: Path, resume: bool = False) -> Tuple[Path, bool, int]:
    """`first`, or where it exists `first-2`, `first-3`, ...: never one that is there, or with `resume` the newest.

    -> folder, whether it was there, and a lock on it, held as long as this process lives.
    """
    present = [first] if first.is_dir() else []
    while present and first.with_name(f"{first.name}-{len(present) + 1}").is_dir():
        present.append(first.with_name(f"{first.name}-{len(present) + 1}"))
    resumed = resume and bool(present)
    fresh = first.with_name(f"{first.name}-{len(present) + 1}") if present else first
    folder = present[-1] if resumed else fresh
    try:
        folder.mkdir(parents=True, exist_ok=resumed)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, resumed, lock
    except (FileExistsError, BlockingIOError):
        raise UserError(f"{folder} is in use by another run; give this one another --name") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give a folder with --checkpoints_path") from None


def describe_run(config: TrainConfig) -> bytes:
    """config.json: what is needed to know how a result came about."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    hardware = {"device": device, "cores": CORES, "threads": torch.get_num_threads(), "processes": WORLD}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "nle": nle.__version__}
    script = {"script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "commit": commit}
    described = {"config": asdict(config), "command": sys.argv, **script, "versions": versions, "hardware": hardware}
    return json.dumps(described, indent=1).encode()


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """A checkpoint's content. Raises UserError for one that is truncated, damaged or foreign."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums that it writes
            if archive.testzip() is not None:
                raise ValueError("its checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)  # no code is run by reading it
        if content["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is not {CHECKPOINT_FORMAT}")
        return content
    except Exception as error:  # torch reports damage by many types
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__} {str(error)[:120]})") from None


def newest_checkpoint(folder: Path) -> Optional[Dict[str, Any]]:
    """last.pt, or last.prev.pt with a warning where last.pt is damaged, or None where there is neither."""
    last, previous = folder / "last.pt", folder / "last.prev.pt"
    if last.exists() and previous.exists():
        try:
            return read_checkpoint(last)
        except UserError as error:
            warn(f"{error}; going on from {previous.name}")
            os.replace(last, folder / "last.damaged.pt")  # it must not replace the whole one at the next save
    path = last if last.exists() else previous
    return read_checkpoint(path) if path.exists() else None


def cut_metrics(path: Path, step: int) -> List[Dict[str, Any]]:
    """The rows up to `step`; later ones, and a last line that was cut short, are dropped: they will be written again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows += [row for row in [json.loads(line)] if row["step"] <= step]
    write_atomically(path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return rows


# ======================================================================================================================
# FIXED: several processes, one a GPU, started by torchrun. Each trains on rows of its own; process 0 alone writes
# ======================================================================================================================
def gather(mine: Any) -> List[Any]:
    """Every process's object, in their order."""
    everyone = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def highest(number: int) -> int:
    """The highest of all processes' numbers."""
    box = torch.tensor([number])
    if WORLD > 1:
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def average(tensors: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
    """Replaces each tensor by its mean over the processes, weighted by `weight` []: one all-reduce.

    Weighted by counting frames, so that the gradient of a masked mean is the one over all rows, to rounding. What an
    algorithm normalises within its batch, as ours does its weights, it normalises within each process's rows.
    """
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors] + [weight.new_ones(1, dtype=torch.float32)]) * weight
        dist.all_reduce(flat)
        flat /= flat[-1].clamp(min=1.0)
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors] + [1])):
            tensor.copy_(mean.view_as(tensor))


# ======================================================================================================================
# FIXED: training
# ======================================================================================================================
def choose_device(config: TrainConfig) -> torch.device:
    """Each of several processes on a machine takes a GPU of its own."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number = int(config.device.partition(":")[2] or LOCAL_RANK)
    if number >= torch.cuda.device_count():
        raise UserError(f"device is {config.device}, but torch finds {torch.cuda.device_count()} CUDA GPUs")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_precision(config: TrainConfig, device: torch.device) -> Optional[torch.dtype]:
    """The type of autocast's matrix products, or None for float32 throughout."""
    if config.precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if config.precision == "fp16" and device.type != "cuda":
        raise UserError("precision fp16 needs a CUDA GPU; on a CPU use fp32 or bf16")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)


def load_submission(path: str) -> Any:
    """Module with `Model` and `OfflineAlgorithm`: a file's EDITABLE block, or the whole file if it has no banners."""
    module = types.ModuleType("submission")
    module.__dict__.update({name: value for name, value in globals().items() if not name.startswith("__")})
    del module.Model, module.OfflineAlgorithm  # ours
    sys.modules["submission"] = module  # dataclasses look their module up
    try:
        text = Path(path).read_text(encoding="utf-8")
        parts = re.split(r"(?m)^# =+ +EDITABLE (?:BEGIN|END) +=+$", text)
        if len(parts) == 3:  # line numbers stay right
            text = "\n" * parts[0].count("\n") + parts[1]
        exec(compile(text, path, "exec"), module.__dict__)
        module.Model, module.OfflineAlgorithm  # noqa: B018  both must be there
    except (Exception, SystemExit) as error:
        raise UserError(f"the submission {path} cannot be used: {type(error).__name__}: {error}") from error
    return module


def make_algorithm(config: TrainConfig, device: torch.device) -> Any:
    """The submission's OfflineAlgorithm on a fresh backbone. Raises UserError for wrong algorithm settings."""
    algorithm_class = load_submission(config.submission).OfflineAlgorithm if config.submission else OfflineAlgorithm
    sizes = (config.rnn_hidden_dim, config.rnn_layers, config.rnn_dropout, config.use_prev_action)
    backbone = ModelBackbone(NUM_ACTIONS, *sizes).to(device)
    backbone.acting_dtype = torch.bfloat16 if config.eval_precision == "bf16" else torch.float32
    try:
        algorithm = algorithm_class(backbone=backbone, config=config, device=str(device))
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.algorithm and not hasattr(algorithm, "hyper"):
        raise UserError(f"the submission {config.submission} takes no algorithm settings")
    return algorithm


def learning_rate_at(config: TrainConfig, transitions: int) -> float:
    """Warm-up, then constant or cosine down to a tenth. Counted in transitions, so the same at any batch size."""
    warm = min(1.0, transitions / config.warmup_transitions) if config.warmup_transitions else 1.0
    if config.lr_schedule == "constant":
        return config.learning_rate * warm
    total = config.update_steps * config.batch_size * config.seq_len * WORLD
    return config.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, transitions / total))))


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; raised at the next point where the run can be left and resumed."""


class StopSignal:
    """Remembers the last SIGTERM or Ctrl-C while it is entered."""

    number = 0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _frame: Any) -> None:
        self.number = number

    def check(self) -> None:
        if self.number:
            raise Stopped(self.number)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Data(NamedTuple):
    """What a run learns from and is measured on."""

    games: Games
    training: np.ndarray  # numbers of games
    heldout: np.ndarray
    reward_scale: float


def load_data(config: TrainConfig) -> Data:
    stores = [open_or_build_store(config.data_path, config.store_path, character) for character in config.characters]
    games = Games(stores, config.game_frames)
    heldout = games.heldout(config.heldout_share)
    training = np.flatnonzero(~heldout)
    return Data(games, training, np.flatnonzero(heldout), games.reward_scale(training, config.gamma))


class Trainer:
    """What a run carries from update to update, and one update of it."""

    MAX_SKIPPED_IN_ROW = 50  # fp16 may need some 20 to find its loss scale

    def __init__(self, config: TrainConfig, algorithm: Any, device: torch.device, step: int = 0) -> None:
        self.config, self.algorithm, self.device, self.step = config, algorithm, device, step
        self.precision = choose_precision(config, device)
        matrices = [parameter for parameter in algorithm.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in algorithm.model.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=device.type == "cuda")
        make_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # older torch has the second alone
        self.scaler = make_scaler(enabled=self.precision is torch.float16)
        self.skipped = self.skipped_in_row = 0
        self.rnn_states: Dict[str, Any] = {}
        self.seconds: Dict[str, float] = {}

    @property
    def transitions(self) -> int:
        return self.step * self.config.batch_size * self.config.seq_len * WORLD

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.precision) if self.precision else contextlib.nullcontext()

    @contextlib.contextmanager
    def timed(self, name: str, wait: bool) -> Iterator[None]:
        """Adds up the seconds spent in a part of the loop; `wait`: until the GPU has done its work too."""
        begin = time.perf_counter()
        yield
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def update(self, batches: Iterator[Batch], wait: bool) -> Dict[str, Any]:
        """One gradient step; returns the algorithm's info."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.config, self.transitions)
        with self.timed("times/batch_loading_cpu", wait):
            batch = next(batches)
        with self.timed("times/batch_loading_gpu", wait):
            batch = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch)
        with self.timed("times/forward_pass", wait):
            prev_actions = batch.pop("prev_actions")
            with self.autocast():
                loss, states, info = self.algorithm.train_step(batch, prev_actions, self.rnn_states)
            self.rnn_states = map_tensors(torch.Tensor.detach, states)
        with self.timed("times/backward_pass", wait):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            tensors = [parameter.grad for parameter in self.algorithm.parameters() if parameter.grad is not None]
            tensors += [buffer for buffer in self.algorithm.model.buffers() if buffer.is_floating_point()]
            average(tensors, batch["mask"][:, :-1].sum())
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.algorithm.parameters(), self.config.clip_grad_norm or math.inf)
            if math.isfinite(float(norm)):
                self.scaler.step(self.optimizer)
                self.algorithm.after_gradient_step()
                self.skipped_in_row = 0
            else:
                self._skip_update()
            self.scaler.update()
        self.step += 1
        return {"loss": loss.detach(), **info, "grad_norm": norm, "skipped_updates": self.skipped}

    def _skip_update(self) -> None:
        """A loss or gradient that is not finite must not reach the weights; many in a row end the run."""
        self.skipped, self.skipped_in_row, self.rnn_states = self.skipped + 1, self.skipped_in_row + 1, {}
        warn(f"the gradient at step {self.step + 1} is not finite: update skipped, recurrent states cleared")
        if self.skipped_in_row >= self.MAX_SKIPPED_IN_ROW:
            what = (
                f"{self.skipped_in_row} updates in a row had a gradient that is not finite, up to step {self.step + 1}"
            )
            raise UserError(f"{what}: lower learning_rate or set clip_grad_norm, and start from an earlier checkpoint")

    def _modules(self) -> Dict[str, nn.Module]:
        """The algorithm's other modules, such as target networks."""
        parts = vars(self.algorithm).items()
        return {name: part for name, part in parts if isinstance(part, nn.Module) and name != "model"}

    def weights(self) -> Dict[str, Any]:
        """What is needed to play: the part of a checkpoint that best.pt and <step>.pt hold."""
        content = {"format": CHECKPOINT_FORMAT, "step": self.step, "config": json.dumps(asdict(self.config))}
        return {**content, "model": self.algorithm.model.state_dict()}

    def save(self, folder: Path, **more: Any) -> None:
        """Writes last.pt; the one before it becomes last.prev.pt. At every moment at least one of them is whole."""
        rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])
        ranks = gather({"rnn_states": map_tensors(torch.Tensor.cpu, self.rnn_states), "rng": rng})
        content = {
            **self.weights(),
            **more,
            "ranks": ranks,
            "skipped": self.skipped,
            "scaler": self.scaler.state_dict(),
        }
        content["algorithm"] = {name: module.state_dict() for name, module in self._modules().items()}
        content["optimizer"] = self.optimizer.state_dict()
        if RANK == 0:
            write_atomically(folder / "next.pt", lambda file: torch.save(content, file))
            if (folder / "last.pt").exists():
                os.replace(folder / "last.pt", folder / "last.prev.pt")
            os.replace(folder / "next.pt", folder / "last.pt")

    def load(self, content: Dict[str, Any]) -> None:
        """Goes on where the checkpoint was saved, to the bit. Raises UserError if it is of a run with other settings."""
        saved = {**json.loads(content["config"]), "processes": len(content["ranks"])}
        for name, value in {**asdict(self.config), "processes": WORLD}.items():
            if saved.get(name) != value and name not in MAY_DIFFER.split() and not name.startswith("eval_"):
                raise UserError(f"cannot resume: {name} was {saved.get(name)} and is {value}; begin without --resume")
        self.algorithm.model.load_state_dict(content["model"])
        for name, module in self._modules().items():
            module.load_state_dict(content["algorithm"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step, self.skipped, mine = content["step"], content["skipped"], content["ranks"][RANK]
        self.rnn_states = map_tensors(lambda tensor: tensor.to(self.device), mine["rnn_states"])
        torch.set_rng_state(mine["rng"][0])
        if len(mine["rng"]) > 1 and self.device.type == "cuda":
            torch.cuda.set_rng_state(mine["rng"][1], self.device)


def evaluate(
    trainer: Trainer, config: TrainConfig, folder: Path, heldout: Optional[ChunkLoader], check: Callable[[], None]
) -> Dict[str, Any]:
    """Held-out loss, then games of every character; writes arrays and tables, prints scores -> the row to be logged."""
    row: Dict[str, Any] = {"step": trainer.step, "transitions": trainer.transitions}
    if heldout is not None and config.eval_heldout_frames:
        metrics = evaluate_heldout(trainer, heldout, config.eval_heldout_frames)
        say_metrics("HELDOUT_METRICS", {"step": trainer.step, **metrics})
        row.update({f"heldout/{name}": value for name, value in metrics.items()})
    if not config.eval_episodes:
        return row
    begin, summaries, pool = time.perf_counter(), {}, GamePool(config)
    try:
        for character in config.characters:
            model, episodes, seed = trainer.algorithm.model, config.eval_episodes, config.eval_seed
            mine = vec_evaluate(pool, model, character, episodes, seed, trainer.device, check)
            results = sorted(result for part in gather(mine) for result in part)
            summaries[character] = summary = summarize_games(results, character)
            row.update(
                {f"{character}/" * (len(config.characters) > 1) + name: value for name, value in summary.items()}
            )
            say(f"{character}:\nD4RL score: {summary['normalized_score']:.6f}")  # the benchmark reads this line
            if RANK == 0:
                save_results(folder, trainer.step, character, results, seed)
    finally:
        pool.close()
    say(score_table(summaries, config.eval_episodes))
    scores = {f"normalized_score_{name.replace('-', '_')}": row["normalized_score"] for name, row in summaries.items()}
    scores = {"normalized_score": geometric_mean(list(scores.values())), **scores}
    say_metrics("TEST_METRICS", scores)
    row.update({f"eval/{name}": score for name, score in scores.items()})
    return {**row, "times/evaluation_cpu": time.perf_counter() - begin}


def save_results(folder: Path, step: int, character: str, results: Sequence[GameResult], eval_seed: int) -> None:
    """One value a game, in the order of the games' seeds, and all that is known of each game as a table."""
    scores, depths = (
        np.array([result.score for result in results], float),
        np.array([result.depth for result in results]),
    )
    normalized, table = scores / AUTOASCEND_MEAN_SCORE[character], io.StringIO(newline="")
    for name, array in {"returns": scores, "depths": depths, "normalized_scores": normalized}.items():
        write_atomically(folder / f"{step}_{character}_{name}.npy", partial(np.save, arr=array))
    rows = [
        [character, *result, value, *game_seeds(eval_seed, result.game)] for result, value in zip(results, normalized)
    ]
    header = ["character", *GameResult._fields, "normalized_score", "core_seed", "disp_seed"]
    csv.writer(table).writerows([header, *rows])
    write_atomically(folder / f"{step}_{character}_games.csv", lambda file: file.write(table.getvalue().encode()))


def start_run(trainer: Trainer, data: Data) -> Tuple[Path, RunLogger, List[Dict[str, Any]], Dict[str, Any]]:
    """The run's folder, new or resumed -> folder, logger, the rows logged before, and what each save adds."""
    config = trainer.config
    name = f"{config.name}-{'+'.join(config.characters)}-seed{config.train_seed}"
    wanted = Path(config.checkpoints_path or "runs").expanduser() / f"{config.group}-v{config.version}" / name
    folder, resumed, _lock = gather(open_folder(wanted, config.resume) if RANK == 0 else None)[0]
    extra: Dict[str, Any] = {"data": [store.meta["fingerprint"] for store in data.games.stores], "wandb_id": None}
    content = newest_checkpoint(folder) if resumed else None
    if content is not None:
        trainer.load(content)
        if content["data"] != extra["data"]:
            raise UserError(f"{folder} cannot be resumed: the games in the data folder have changed since")
        extra["wandb_id"] = content["wandb_id"]
    if config.resume:
        say(f"resuming {folder} at step {trainer.step}" if content else f"nothing to resume: {folder} begins anew")
    rows: List[Dict[str, Any]] = []
    if RANK == 0:
        write_atomically(folder / "config.yaml", lambda file: file.write(pyrallis.dump(config).encode()))
        write_atomically(folder / "config.json", lambda file: file.write(describe_run(config)))
        rows = cut_metrics(folder / "metrics.jsonl", trainer.step)
    logger = RunLogger(config, folder, extra["wandb_id"])
    extra["wandb_id"] = logger.run.id if logger.run is not None else None
    return folder, logger, gather(rows)[0], extra


def say_summary(trainer: Trainer, data: Data, loader: ChunkLoader, folder: Path) -> None:
    """The lines that a run begins with."""
    config, model = trainer.config, trainer.algorithm.model
    for what, games in (("training", data.training), ("held out", data.heldout)):
        say(f"{what}: {len(games):,} games, {int(data.games.frames[games].sum()):,} frames")
    total, backbone = (sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.backbone))
    say(f"model: {backbone:,} parameters in the backbone, {total - backbone:,} in the head")
    precision, rows = str(trainer.precision or torch.float32)[6:], config.batch_size * WORLD
    say(f"device: {trainer.device}, {torch.get_num_threads()} threads, {precision}, {WORLD} processes")
    say(f"rewards: over {data.reward_scale:.2f} points, then clipped to +-{config.clip_range:g}")
    passes = f"{loader.plan.steps:,} updates a pass, {config.update_steps:,} in all"
    say(f"batch: {rows:,} rows x {config.seq_len} steps; {passes}\nrun: {folder}")


def log_training(trainer: Trainer, info: Dict[str, Any], rate: float, logger: RunLogger) -> None:
    """One row and one line, the means over the processes."""
    parts = gather({name: float(value) for name, value in info.items()})
    info = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
    position = {"step": trainer.step, "transitions": trainer.transitions}
    metrics = {f"train/{name}": value for name, value in info.items() if name != "loss"}
    metrics["train/learning_rate"] = trainer.optimizer.param_groups[0]["lr"]
    logger.log({**position, "loss": info["loss"], **metrics, "charts/SPS": rate, **trainer.seconds})
    trainer.seconds = {}
    brief = {
        name: info[name] for name in ("loss", "loss_per_action", "accuracy", "effective_sample_size") if name in info
    }
    say_metrics("TRAIN_METRICS", {**position, **brief, "transitions_per_s": rate})


def heldout_loss(row: Dict[str, Any]) -> float:
    """Of a logged row; infinite where it has none. The weights with the lowest one are kept as best.pt."""
    loss = row.get("heldout/loss_per_action", row.get("heldout/loss"))
    return math.inf if loss is None else loss


def train(config: TrainConfig) -> Path:
    """Trains, evaluates, and returns the run's folder."""
    device = choose_device(config)
    if WORLD > 1:  # a process may wait for another that plays long games
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    set_seed(config.train_seed)
    trainer = Trainer(config, make_algorithm(config, device), device)
    data, rows = load_data(config), config.batch_size * WORLD
    loader = ChunkLoader(data.games, data.training, config, rows, data.reward_scale)
    heldout = None
    if len(data.heldout):
        heldout = ChunkLoader(data.games, data.heldout, config, min(rows, max(32, WORLD)), data.reward_scale, True)
    if RANK:  # equal weights by now; dropout is to differ
        torch.manual_seed(derived_seed(config.train_seed, RANK))
    folder, logger, logged, extra = start_run(trainer, data)
    say_summary(trainer, data, loader, folder)
    batches = read_ahead(loader.batch_at, trainer.step)
    try:
        with StopSignal() as stop:
            run_loop(trainer, batches, heldout, folder, logger, logged, extra, stop)
        return folder
    finally:
        batches.close()
        logger.close()
        if WORLD > 1:
            dist.destroy_process_group()


def run_loop(
    trainer: Trainer,
    batches: Iterator[Batch],
    heldout: Optional[ChunkLoader],
    folder: Path,
    logger: RunLogger,
    logged: List[Dict[str, Any]],
    extra: Dict[str, Any],
    stop: StopSignal,
) -> None:
    """Updates, and at their steps rows, checkpoints and evaluations, until the last step or a signal."""
    config, saved = trainer.config, trainer.step
    evaluated = max([row["step"] for row in logged if "loss" not in row], default=0)
    best = min(map(heldout_loss, logged), default=math.inf)
    bar = progress(total=config.update_steps, initial=trainer.step)
    since, begin = trainer.step, time.perf_counter()
    while True:
        at_end, stopped = trainer.step >= config.update_steps, highest(stop.number)
        due = trainer.step > evaluated and (at_end or trainer.step % config.eval_every == 0)
        # First the checkpoint: whatever goes wrong while games are played, the run can go on from here.
        if trainer.step > saved and (due or stopped or trainer.step % config.checkpoint_every == 0):
            trainer.save(folder, **extra)
            saved = trainer.step
        if stopped:
            say(f"stopped at step {trainer.step}; --resume true goes on from here")
            raise Stopped(stopped)
        if due:
            row = evaluate(trainer, config, folder, heldout, stop.check)
            kept = ["best.pt"] * (heldout_loss(row) < best) + [f"{trainer.step}.pt"] * config.keep_checkpoints
            for name in kept if RANK == 0 else ():
                write_atomically(folder / name, lambda file: torch.save(trainer.weights(), file))
            best, evaluated = min(best, heldout_loss(row)), trainer.step
            logger.log(row)
            since, begin = trainer.step, time.perf_counter()  # the clock stops while games are played
        if at_end:
            bar.close()
            return
        wait = (trainer.step + 1) % config.log_every == 0 or trainer.step + 1 == config.update_steps
        info = trainer.update(batches, wait)
        bar.update()
        if wait:
            per_update = config.batch_size * config.seq_len * WORLD
            rate = (trainer.step - since) * per_update / (time.perf_counter() - begin)
            log_training(trainer, info, rate, logger)
            since, begin = trainer.step, time.perf_counter()


def load_agent(path: Any, device: torch.device, **overrides: Any) -> Tuple[Any, TrainConfig, int]:
    """A checkpoint's algorithm with its weights, its config with `overrides`, and its step."""
    content = read_checkpoint(Path(path))
    known = {name: value for name, value in json.loads(content["config"]).items() if name in vars(TrainConfig())}
    config = TrainConfig(**{**known, **overrides})
    algorithm = make_algorithm(config, device)
    algorithm.model.load_state_dict(content["model"])
    return algorithm, config, content["step"]


def evaluate_checkpoint(config: TrainConfig) -> Path:
    """Scores a checkpoint as a run's evaluation does, with these evaluation settings; returns the folder of its results.

    With `data_path` the held-out loss is computed too, on the games that were held out when it was trained.
    """
    device, path = choose_device(config), Path(str(config.evaluate)).expanduser()
    given = [name for name in vars(config) if name.startswith("eval_")] + ["submission"] * bool(config.submission)
    given += ["character", "data_path", "store_path", "device", "precision"]
    algorithm, saved, step = load_agent(path, device, **{name: getattr(config, name) for name in given})
    trainer, heldout = Trainer(saved, algorithm, device, step), None
    folder, *_lock = open_folder(Path(config.checkpoints_path or path.parent).expanduser() / f"{path.stem}-evaluation")
    if config.data_path:
        data = load_data(saved)
        heldout = ChunkLoader(data.games, data.heldout, saved, 32, data.reward_scale, returns=True)
    say(f"evaluating {path} at step {step}, with results in {folder}")
    write_atomically(folder / "config.json", lambda file: file.write(describe_run(saved)))
    with StopSignal() as stop:
        row = evaluate(trainer, saved, folder, heldout, stop.check)
    write_atomically(folder / "metrics.jsonl", lambda file: file.write((json.dumps(row) + "\n").encode()))
    return folder


def main(argv: Optional[Sequence[str]] = None) -> int:
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        if (config.rnn_hidden_dim, config.rnn_layers) != (2048, 2):
            raise UserError("rnn_hidden_dim = 2048 and rnn_layers = 2 are the benchmark's and cannot be changed")
        keep_freed_memory()
        (evaluate_checkpoint if config.evaluate else train)(config)
    except UserError as error:
        print("error: " + " ".join(str(error).split())[:2000], file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.args[0]  # as the shell reports a process ended by this signal
    except KeyboardInterrupt:  # before training had begun
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
