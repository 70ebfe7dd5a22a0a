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
    prev_actions [B, 1]           int64    the action before the first frame, or NO_ACTION (an argument of its own)
"""

# ======================================================================================================================
# FIXED: imports and constants
# ======================================================================================================================
import argparse
import contextlib
import ctypes
import difflib
import fcntl
import hashlib
import inspect
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
import tempfile
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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

# AutoAscend's mean score for each character, by which scores are divided (Katakomba, arXiv 2306.08772).
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
    data_path: Optional[str] = None  # NLD-AA folder, Katakomba .hdf5 file or folder, or a store; None: Katakomba's
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
    clip_grad_norm: Optional[float] = None  # largest L2 norm of the gradient, over all parameters; None: any
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

    def __post_init__(self) -> None:
        self.character = ",".join(self.characters)  # one spelling, for names
        validate_config(self)

    @property
    def characters(self) -> List[str]:
        return [name.strip() for name in self.character.split(",") if name.strip()]


LIMITS: Dict[str, Tuple[float, float]] = {  # smallest and largest value
    **dict.fromkeys("log_every update_steps batch_size seq_len checkpoint_every eval_every".split(), (1, math.inf)),
    **dict.fromkeys("eval_processes eval_max_steps render_processes".split(), (1, math.inf)),
    **dict.fromkeys("version warmup_transitions weight_decay game_frames eval_workers".split(), (0, math.inf)),
    **dict.fromkeys("eval_episodes eval_heldout_frames".split(), (0, math.inf)),
    **dict.fromkeys("learning_rate clip_range clip_grad_norm".split(), (1e-12, math.inf)),
    **dict.fromkeys("gamma tau rnn_dropout".split(), (0, 1)),
    **dict.fromkeys("train_seed eval_seed".split(), (0, 2**63 - 1)),
    "heldout_share": (0, 0.9),
}
CHOICES = {"data_mode": "compressed|memmap|in_memory", "lr_schedule": "constant|cosine", "eval_precision": "fp32|bf16"}
CHOICES.update({"precision": "auto|fp32|bf16|fp16", "device": r"auto|cpu|cuda(:\d+)?"})


def check_character(character: str) -> None:
    if character not in AUTOASCEND_MEAN_SCORE:
        close = difflib.get_close_matches(character, AUTOASCEND_MEAN_SCORE, n=3)
        raise UserError(f"unknown character {character!r}; did you mean {', '.join(close) or 'mon-hum-neu'}?")


def validate_config(config: TrainConfig) -> None:
    """Raises UserError with one line that says what to change."""
    for character in config.characters or ["(none)"]:
        check_character(character)
    if len(set(config.characters)) != len(config.characters):
        raise UserError(f"character names one twice: {config.character}")
    for name, value in asdict(config).items():
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if name in LIMITS and value is not None and not low <= value <= high:
            raise UserError(f"{name} must be at least {low:g} and at most {high:g}, not {value}")
        if name in CHOICES and not re.fullmatch(CHOICES[name], value):
            raise UserError(f"{name} must be one of {CHOICES[name].replace('|', ', ')}, not {value!r}")


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


# For each setting's help pyrallis asks for TrainConfig's source, and Python parses this whole file: 3 seconds.
inspect.getsource = lru_cache(maxsize=None)(inspect.getsource)  # type: ignore[assignment]


class SettingsParser(ArgumentParser):
    """pyrallis' parser, which raises where argparse would print its whole usage and exit."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Command line over config file over defaults; `algorithm` is merged key by key. Raises UserError."""
    argv = [re.sub("^--config(?=$|=)", "--config_path", token) for token in argv]  # pyrallis' name
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config_path", nargs="?")
    path = early.parse_known_args(argv)[0].config_path
    try:
        parser = SettingsParser(TrainConfig, description=__doc__.split("Axes:")[0], allow_abbrev=False)
        config = parser.parse_args(argv)
        of_file = pyrallis.parse(TrainConfig, config_path=path, args=[]).algorithm if path else {}
        config.algorithm = {**of_file, **config.algorithm}
        return config
    except Exception as error:  # pyrallis raises many types
        text = re.sub(r"(?s).*field \".*\.(\w+)\" of type.*error is \"\w+: (.*)\"", r"\1: \2", str(error))
        words = re.findall(r"(?:--|'fields \{')(\w+)", text.replace("fields {'", "--"))
        close = [name for word in words for name in difflib.get_close_matches(word, vars(TrainConfig()), n=1)]
        text += f" (with --config {path})" if path else ""
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


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for every parameter (Polyak averaging)."""
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
    """One line on standard output, above a progress bar if there is one. Of several processes only the first speaks."""
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

            os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds
            names: Dict[str, Any] = dict(project=config.project, group=folder.parent.name, name=folder.name)
            names.update(dir=folder, config=asdict(config), id=wandb_id, resume="allow")
            try:
                names["mode"] = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
                self.run = wandb.init(**names)
            except Exception as error:  # of many types; a run must not die of them
                warn(f"wandb could not start ({' '.join(str(error).split())}); the run is logged offline")
                wandb.teardown()
                os.environ["WANDB_MODE"] = "offline"
                self.run = wandb.init(**{**names, "mode": "offline"})
            self.rows = max(self.path.read_bytes().count(b"\n"), self.run.step)  # wandb drops rows whose step goes back
            self.run.define_metric("*", step_metric="transitions")  # our own axis: a resumed run lies where it belongs

    def log(self, row: Dict[str, Any]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
        try:
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room, --resume true goes on") from None
        if self.run is not None:
            self.run.log(row, step=self.rows)
            self.rows += 1

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
    22: "- Burdened|Burden|Brd Stressed|Stress|Strs Strained|Strain|Strn Overtaxed|Overtax|Ovtx "
    "Overloaded|Overload|Ovld",
    25: "Stone|Ston|Sto Slime|Slim|Slm Strngl|Stngl|Str FoodPois|Fpois|Poi TermIll|Ill Blind|Blnd|Bl Deaf|Def|Df "
    "Stun|St Conf|Cnf|Cf Hallu|Hal|Hl Lev|Lv Fly|Fl Ride|Rid|Rd",
}
STATUS_WORDS = {  # word -> (place, value)
    word.encode(): (place, 1 << index if place == 25 else index)
    for place, names in WORDS.items()
    for index, spellings in enumerate(names.split())
    for word in spellings.split("|")
}
LOWEST, HIGHEST = -(2**31), 2**31 - 1  # int32


@lru_cache(maxsize=16_384)  # rows repeat from frame to frame
def parse_upper_status(row: bytes) -> np.ndarray:
    """Terminal row 22 -> [27] int32 with attributes and alignment in their places; zeros where a menu hides the row."""
    stats, found = np.zeros(NUM_BLSTATS, dtype=np.int32), ATTRIBUTES.search(row)
    if found:
        base, extra, *others, alignment = found.groups(b"0")
        # 18/xx counts on from 18, 18/** is 118, and 19 to 25 lie at 119 to 125 (NetHack's STR18 and STR19)
        strength = int(base) + (100 if extra == b"**" else int(extra)) + (100 if int(base) > 18 else 0)
        compact = strength if strength <= 18 else 19 + strength // 50 if strength <= 121 else min(strength, 125) - 100
        stats[2:9] = np.clip([compact, strength, *map(int, others)], LOWEST, HIGHEST)
        stats[26] = {b"Lawful": 1, b"Chaotic": -1}.get(alignment, 0)
    return stats


@lru_cache(maxsize=16_384)
def parse_lower_status(row: bytes) -> np.ndarray:
    """Terminal row 23 -> [27] int32 with depth, vitals, turn and conditions; zeros where a menu hides the row."""
    stats, found = np.zeros(NUM_BLSTATS, dtype=np.int32), VITALS.match(row)
    if found:
        depth, home, plane, *numbers, words = found.groups(b"0")
        stats[PLACES] = [min(max(int(number), LOWEST), HIGHEST) for number in (depth, home, *numbers)]
        stats[12], stats[21] = PLANES.get(plane, stats[12]), 1  # not hungry unless a word says so
        for place, value in (STATUS_WORDS[word] for word in words.split() if word in STATUS_WORDS):
            stats[place] = stats[place] | value if place == 25 else value
    return stats


def read_blstats(chars: np.ndarray) -> np.ndarray:
    """Screens [n, 24, 80] uint8 -> [n, 27] int32: what the status lines say, in the places of NLE's blstats.h.

    What the screen does not show (position 0/1, score 9, dungeon 23) and what a menu hides stays 0.
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
    kinds: List[Tuple[Any, ...]] = [(np.uint8, ROWS, COLS), (np.int8, ROWS, COLS), (np.int16, 2)]
    kinds += [(np.int64,), (np.uint8,), (np.int32,)]  # times, keys, scores
    pieces, size, remaining = [], 1024, 0
    while remaining == 0:
        arrays = [np.empty((size, *shape), kind) for kind, *shape in kinds]
        remaining = decoder.convert(*arrays)
        pieces.append([array[: size - remaining] for array in arrays])
    chars, colors, cursor, _, keys, scores = map(np.concatenate, zip(*pieces))
    return Frames(chars, colors, cursor.astype(np.uint8), KEY_TO_ACTION[keys], scores)


def read_hdf5(path: str, key: str) -> Frames:
    """All frames of one game of a Katakomba HDF5 file, which keeps score differences."""
    import h5py

    shapes = {"tty_chars": (ROWS, COLS), "tty_colors": (ROWS, COLS), "tty_cursor": (2,), "actions": (), "rewards": ()}
    with h5py.File(path, "r") as file:
        arrays = [file[key][name][:] for name in shapes]
    if [array.shape for array in arrays] != [(len(arrays[0]), *shape) for shape in shapes.values()]:
        raise GameError("its arrays have not the shapes of Katakomba's")
    chars, colors, cursor, actions, rewards = arrays
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
    first, texts = len(frames.chars), {}
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
STORE_FORMAT = 4
BLOCK = 64  # frames compressed together: more make the store smaller, but a row decodes a block to read a chunk
ZSTD_LEVEL = 3  # on AutoAscend's games smaller than level 1 and as fast to write; level 6 takes three times as long


@lru_cache(maxsize=BLOCK)
def block_dtype(n: int) -> np.dtype:
    """A record of n frames: what the agent sees, and its actions (UNKNOWN_KEY where the key is none)."""
    planes = [(name, kind, (n, *shape)) for name, (kind, *shape) in OBSERVATION_SHAPES.items()]
    return np.dtype([*planes, ("actions", np.uint8, (n,))])


def encode_game(source: GameSource) -> Any:
    """-> compressed blocks and the game's part of the index, or the reason (str) why the game cannot be read."""
    import zstandard

    compress = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress
    try:
        frames = read_hdf5(source.path, source.key) if source.key else read_ttyrec(source.path)
        first, end = find_first_frame(frames), find_end_of_play(frames)
        if first >= end:
            raise GameError("it holds no frame of play")
    except (GameError, RuntimeError, ValueError, TypeError, OSError, EOFError, LookupError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    chars, colors, cursor, actions, scores = (array[first:end] for array in frames)
    blstats, blocks = read_blstats(chars), []
    for start in range(0, len(chars), BLOCK):
        planes = [plane[start : start + BLOCK] for plane in (chars, colors, cursor, blstats, actions)]
        record = np.empty((), block_dtype(len(planes[0])))
        for name, plane in zip(record.dtype.names, planes):
            record[name] = plane
        blocks.append(compress(record.tobytes()))
    rewards = np.append(np.diff(scores), 0)  # NLE pays nothing for the step that ends a game
    paid = np.flatnonzero(rewards)
    part: Dict[str, Any] = {"names": source.name, "frames": len(chars), "block_sizes": [len(block) for block in blocks]}
    part["block_checksums"] = [zlib.crc32(block) for block in blocks]  # quicker than zstandard's own
    part.update(reward_counts=len(paid), reward_frames=paid, reward_values=rewards[paid])
    part.update(max_depths=blstats[:, 12].max(), turns=blstats[:, 20].max())
    return blocks, {**part, "unknown_keys": np.count_nonzero(actions == UNKNOWN_KEY)}


def parse_xlogfile(path: Path) -> List[Dict[str, str]]:
    """Tab-separated key=value pairs, a line a finished game; what is not of that form is left out."""
    lines = path.read_bytes().decode("latin-1").splitlines()
    return [dict(pair.split("=", 1) for pair in line.split("\t") if "=" in pair) for line in lines]


def find_nld_games(root: Path, character: str) -> Tuple[List[GameSource], List[str]]:
    """The character's games below an NLD-AA folder, those with a line in an xlogfile beside them; and lines without."""
    games, problems = set(), []
    for xlogfile in sorted(Path(root).rglob("*.xlogfile")):
        if not os.access(xlogfile, os.R_OK):  # a link to nowhere, for one
            problems.append(f"{xlogfile} cannot be read")
            continue
        for xlog in parse_xlogfile(xlogfile):
            name = xlog.get("ttyrecname", "")
            path = xlogfile.parent / name
            if "-".join(xlog.get(part, "?").lower() for part in ("role", "race", "align0")) != character:
                continue
            if name == os.path.basename(name) and name.endswith(".ttyrec3.bz2") and path.is_file():
                label, stat = f"{path.parent.resolve().name}/{name}", path.stat()
                games.add(GameSource(label, str(path), "", stat.st_size, stat.st_mtime_ns))
            else:
                problems.append(f"{xlogfile}: its line names no ttyrec3.bz2 file beside it ({name!r})")
    return sorted(games), problems


def find_games(root: Path, character: str) -> Tuple[List[GameSource], List[str]]:
    """The character's games in a folder or file, and what is none. Raises UserError where there is nothing to read."""
    root = Path(root)
    hdf5 = root if root.is_file() else root / f"data-{character}-any.hdf5"
    if hdf5.is_file() and f"data-{character}-any" in hdf5.name:
        import h5py

        with h5py.File(hdf5, "r") as file:
            keys, stat = sorted(file), hdf5.stat()
        games = [GameSource(f"{hdf5.name}/{key}", str(hdf5), key, stat.st_size, stat.st_mtime_ns) for key in keys]
        problems: List[str] = []
    else:
        games, problems = find_nld_games(root, character)
    if not games:
        ways = f"NLD-AA's folder, Katakomba's data-{character}-any.hdf5, or games of your own (scripts/record_games.py)"
        raise UserError(f"no games of {character} in {root}. --data_path takes {ways}; see the README, section Data")
    return games, problems


def store_fingerprint(games: List[GameSource]) -> str:
    """Changes whenever a game was added, removed or rewritten, or the format of the store changed."""
    told = [(game.name, game.key, game.size, game.mtime_ns) for game in games]
    return hashlib.sha256(repr((STORE_FORMAT, BLOCK, ZSTD_LEVEL, told)).encode()).hexdigest()


def build_store(store: Path, games: List[GameSource], problems: List[str], character: str, workers: int) -> None:
    """Writes a store into a temporary folder and renames it to `store`. Several workers are processes of their own."""
    temporary = store.with_name(f".{store.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a build that was killed; the lock says nobody uses it
    temporary.mkdir(parents=True)
    pool = ProcessPoolExecutor(max(workers, 1), multiprocessing.get_context("spawn"), keep_freed_memory)
    parts, skipped = [], []
    with pool, open(temporary / "frames.bin", "wb") as file:
        encoded = pool.map(encode_game, games) if workers > 1 else map(encode_game, games)
        for source, game in zip(games, progress(iterable=encoded, total=len(games), desc=f"store of {character}")):
            if isinstance(game, str):
                skipped.append(f"{source.path}:{source.key}".rstrip(":") + f": {game}")
                warn(f"skipped {skipped[-1]}")
            else:
                file.writelines(game[0])
                parts.append(game[1])
        file.flush()
        os.fsync(file.fileno())
    if not parts:
        shutil.rmtree(temporary)
        raise UserError(f"none of the {len(games)} games of {character} can be read; the first: {skipped[0]}")
    index: Dict[str, Any] = {name: np.hstack([part[name] for part in parts]) for name in parts[0]}
    index.update(fingerprint=store_fingerprint(games), character=character, skipped=skipped, passed_over=problems)
    np.savez(temporary / "index.npz", **index)
    shutil.rmtree(store, ignore_errors=True)
    os.replace(temporary, store)


def open_or_build_store(data_path: Optional[str], store_path: str, character: str) -> "ChunkStore":
    """A store of the character's games: the given one, the one built before if they did not change, or a new one."""
    given = Path(data_path or os.environ.get("KATAKOMBA_DATA_DIR", "~/.katakomba/datasets")).expanduser()
    for folder in (given, given / character):
        if (folder / "frames.bin").exists():
            return ChunkStore(folder, character)
    folder = Path(store_path).expanduser() / hashlib.sha256(str(given.resolve()).encode()).hexdigest()[:12] / character
    try:
        games, problems = find_games(given, character)
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
    except (OSError, RuntimeError) as error:  # of h5py and of a process that crashed too
        raise UserError(f"cannot read {given} or write its chunk store (--store_path {store_path}): {error}") from None
    return ChunkStore(folder, character)


class ChunkStore:
    """A store opened for reading, safe from several threads. Raises UserError for a damaged store or another's."""

    def __init__(self, folder: Path, character: str) -> None:
        self.folder, self.local = Path(folder), threading.local()  # a zstandard decompressor serves one thread
        try:
            with np.load(self.folder / "index.npz") as arrays:  # a zip file, which keeps checksums
                self.index = index = dict(arrays)
            self.names, self.frames = index["names"], index["frames"]
            counts = (-(-self.frames // BLOCK), index["block_sizes"], index["reward_counts"])
            self.first_blocks, self.block_offsets, self.first_rewards = (np.cumsum(np.append(0, n)) for n in counts)
            self.file = open(self.folder / "frames.bin", "rb")
            size = os.fstat(self.file.fileno()).st_size
            if (self.first_blocks[-1], self.block_offsets[-1]) != (len(index["block_checksums"]), size):
                raise ValueError("index.npz and frames.bin do not belong together")
            if str(index["character"]) != character:
                raise ValueError(f"its games are of {index['character']}, not of {character}")
        except Exception as error:  # numpy and zipfile report damage by many types
            raise self._unusable(error) from None

    def _unusable(self, why: Any) -> UserError:
        return UserError(f"the chunk store {self.folder} cannot be used: {why}; delete a damaged one and start again")

    def __str__(self) -> str:
        index, frames, size = self.index, self.frames.sum(), self.block_offsets[-1]
        text = f"{index['character']}: {len(self.frames)} games, {frames:,} frames, {size / frames:.0f} bytes a frame"
        left_out = (len(index["skipped"]), len(index["passed_over"]), index["unknown_keys"].sum())
        what = "; left out: {} unreadable games, {} lines without a game, {} keys that are no action".format(*left_out)
        return text + (what if any(left_out) else "")

    def rewards(self, game: int) -> Tuple[np.ndarray, np.ndarray]:
        """Frames whose reward is not 0, and these rewards (differences of the in-game score)."""
        part = slice(*self.first_rewards[game : game + 2])
        return self.index["reward_frames"][part], self.index["reward_values"][part]

    def block(self, game: int, number: int) -> Any:
        """Frames BLOCK * number ... of the game, as in block_dtype. Raises UserError for bytes that were damaged."""
        import zstandard

        if not hasattr(self.local, "decompressor"):
            self.local.decompressor = zstandard.ZstdDecompressor()
        place = int(self.first_blocks[game]) + number
        begin, end = self.block_offsets[place : place + 2].tolist()
        frames = block_dtype(min(BLOCK, int(self.frames[game]) - BLOCK * number))
        try:
            stored = os.pread(self.file.fileno(), end - begin, begin)
            if zlib.crc32(stored) != self.index["block_checksums"][place]:
                raise ValueError("its checksum is wrong")
            return np.frombuffer(self.local.decompressor.decompress(stored), frames).reshape(())[()]
        except (zstandard.ZstdError, ValueError, MemoryError, OSError) as error:
            raise self._unusable(f"block {place} is damaged ({error})") from None


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
        self.frames = np.concatenate([store.frames for store in self.stores]).clip(max=game_frames or None)

    def heldout(self, share: float) -> np.ndarray:
        """bool [G]: games never trained on, chosen among each store's."""
        return np.concatenate([choose_heldout(store.names, share) for store in self.stores])

    def reward_scale(self, games: np.ndarray, gamma: float) -> float:
        """Root mean square of the discounted return so far, R_t = gamma R_{t-1} + r_t, over all frames of the games:
        what the benchmark divides rewards by, exact here, while its own is a running estimate."""
        squares = 0.0
        for game in games:
            store, number = self.places[game]
            at, values = store.rewards(number)
            lengths = np.diff(np.append(at, self.frames[game]).clip(max=self.frames[game]))  # frames to the next reward
            accumulated = 0.0
            for value, length in zip(values.tolist(), lengths.tolist()):
                accumulated += value
                decay = length if gamma == 1.0 else (1.0 - gamma ** (2 * length)) / (1.0 - gamma**2)
                squares += accumulated**2 * decay
                accumulated *= gamma**length
        return max(math.sqrt(squares / max(int(self.frames[games].sum()), 1)), 0.01)  # 0.01: the benchmark's floor


class ChunkPlan:
    """Which chunk each row plays at each step: pure arithmetic, so a batch depends on its number alone.

    A pass puts all games one after another in a new random order, each padded to whole chunks of `seq_len` frames, and
    cuts that line into as many equal parts as there are rows; each row plays its part from left to right. So a pass
    plays every chunk exactly once, rows are spread over early and late parts of games, and a row starts inside a game
    only at a pass's beginning (its state is then cleared).
    """

    def __init__(self, frames: np.ndarray, rows: int, seq_len: int, seed: Optional[int]) -> None:
        self.chunks = -(-np.asarray(frames) // seq_len)  # [G] chunks of each game
        self.rows, self.seq_len, self.seed = rows, seq_len, seed
        self.total = int(self.chunks.sum())
        self.steps = -(-self.total // rows)  # steps a pass; a row one chunk short pads the last one

    def locate(self, step: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step 0, 1, ... -> game [rows] (-1: padding), first frame [rows], starts [rows] bool."""
        number, offset = divmod(step, self.steps)
        order: np.ndarray = np.arange(len(self.chunks))
        if self.seed is not None:  # else the games' own order
            order = np.random.default_rng(derived_seed(self.seed, number)).permutation(order)
        ends = np.cumsum(self.chunks[order])
        edges = np.arange(self.rows + 1) * self.total // self.rows
        chunk = edges[:-1] + offset
        padding = chunk >= edges[1:]
        place = np.searchsorted(ends, np.minimum(chunk, self.total - 1), side="right")
        game = order[place]
        inside = chunk - (ends[place] - self.chunks[game])
        starts = (inside == 0) | (offset == 0) | padding
        return np.where(padding, -1, game), np.where(padding, 0, inside * self.seq_len), starts


class ChunkLoader:
    """Batches of `rows` rows on all processes together; this one reads its share. `returns`: exact returns as well."""

    def __init__(
        self,
        games: Games,
        chosen: np.ndarray,
        config: TrainConfig,
        rows: int,
        reward_scale: float,
        returns: bool = False,
    ) -> None:
        self.games, self.chosen, self.config, self.returns = games, np.asarray(chosen), config, returns
        self.reward_scale, self.seq_len = reward_scale, config.seq_len
        # Held-out games, those with returns, are always read in the same order.
        self.plan = ChunkPlan(games.frames[self.chosen], rows, self.seq_len, None if returns else config.train_seed)
        self.rows = slice(rows * RANK // WORLD, rows * (RANK + 1) // WORLD)
        self.batch_size = self.rows.stop - self.rows.start
        # What all rows read at a step is kept for the next one.
        self.block = lru_cache(maxsize=self.batch_size * (2 + self.seq_len // BLOCK))(ChunkStore.block)
        self.rewards_of = lru_cache(maxsize=2 * self.batch_size)(self._rewards)
        self.returns_of = lru_cache(maxsize=None)(self._returns)

    def _rewards(self, store: ChunkStore, game: int) -> np.ndarray:
        """Scaled and clipped, at every frame of the whole game."""
        at, values = store.rewards(game)
        rewards = np.zeros(store.frames[game], dtype=np.float32)
        rewards[at] = np.clip(values / self.reward_scale, -self.config.clip_range, self.config.clip_range)
        return rewards

    def _returns(self, store: ChunkStore, game: int) -> np.ndarray:
        """Exact discounted sums of the rewards from every frame on."""
        returns = self.rewards_of(store, game).astype(float)
        for t in range(len(returns) - 2, -1, -1):
            returns[t] += self.config.gamma * returns[t + 1]
        return returns

    def _fill_row(self, batch: Dict[str, np.ndarray], row: int, store: ChunkStore, game: int, first: int) -> None:
        """Writes frames first .. first + T of the game, as far as it goes, into a row of the batch."""
        stop, position = min(first + self.seq_len + 1, int(store.frames[game])), first
        if first:  # this block was read a step ago
            batch["previous"][row] = self.block(store, game, (first - 1) // BLOCK)["actions"][(first - 1) % BLOCK]
        while position < stop:
            block, inside = self.block(store, game, position // BLOCK), position % BLOCK
            count = min(stop - position, BLOCK - inside)
            here, there = slice(position - first, position - first + count), slice(inside, inside + count)
            for name in block.dtype.names:
                batch[name][row, here] = block[name][there]
            position += count
        batch["dones"][row, stop - first - 1] = stop == store.frames[game]
        batch["rewards"][row, : stop - first] = self.rewards_of(store, game)[first:stop]
        if self.returns:
            batch["returns"][row, : stop - first] = self.returns_of(store, game)[first:stop]

    def batch_at(self, step: int) -> Batch:
        """The batch of step 0, 1, ... as CPU tensors, as in the module's docstring."""
        game, first, starts = (array[self.rows] for array in self.plan.locate(step))
        shape, pin = (len(game), self.seq_len + 1), torch.cuda.is_available() and self.config.device != "cpu"
        kinds = {**OBSERVATION_SHAPES, "rewards": (np.float32,), "dones": (np.bool_,)}
        kinds.update({"returns": (np.float32,)} if self.returns else {})
        batch = {
            name: torch.zeros((*shape, *rest), dtype=getattr(torch, np.dtype(kind).name), pin_memory=pin)
            for name, (kind, *rest) in kinds.items()
        }
        keys, previous = (np.full(size, UNKNOWN_KEY) for size in (shape, len(game)))
        arrays = {**{name: tensor.numpy() for name, tensor in batch.items()}, "actions": keys, "previous": previous}
        for row in np.flatnonzero(game >= 0):
            store, number = self.games.places[self.chosen[game[row]]]
            self._fill_row(arrays, row, store, number, int(first[row]))
        # Frames beyond a cut do not count, but the values before it are bootstrapped from them.
        left = self.games.frames[self.chosen[game]] - first
        mask = (keys != UNKNOWN_KEY) & (np.arange(shape[1]) < left[:, None])
        previous = np.where(starts | (previous == UNKNOWN_KEY), NO_ACTION, previous)
        small = {"mask": mask, "starts": starts, "actions": np.where(mask, keys, 0), "prev_actions": previous[:, None]}
        return {**batch, **{name: torch.from_numpy(array) for name, array in small.items()}}


def read_ahead(batch_at: Callable[[int], Batch], step: int, ahead: int = 2) -> Iterator[Batch]:
    """Batches step, step + 1, ... without end, read by a thread of their own while the one before is learned from."""
    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(batch_at, step + number) for number in range(ahead)]
        while True:
            batch = waiting.pop(0).result()
            step += 1
            waiting.append(reader.submit(batch_at, step + ahead - 1))
            yield batch


# ======================================================================================================================
# FIXED: backbone
# ======================================================================================================================
def blstats_features(blstats: torch.Tensor) -> torch.Tensor:
    """[n, 27] int -> [n, 47] float32 of about unit size; the last flags hidden status lines (maximal HP is never 0)."""
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


def look_up(cells: torch.Tensor, table: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """[n, H, W] int, [codes, C] -> [n, C, H, W]: F.embedding; with `copies` above 1 its gradient is quick on a GPU.

    F.embedding's own sorts all cells and adds up those that are alike (most are blank) one after another: four fifths
    of an update. index_select's adds atomically; neighbours that are alike take different copies, so as not to wait.
    """
    if copies == 1:
        return F.embedding(cells, table).movedim(3, 1)
    place = torch.arange(cells[0].numel(), device=cells.device) % copies * len(table)
    chosen = table.repeat(copies, 1).index_select(0, (cells.flatten(1) + place).flatten())
    return chosen.view(*cells.shape, -1).movedim(3, 1)


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
        copies = 64 if table.is_cuda and torch.is_grad_enabled() else 1  # 32 MB: they fit into a GPU's cache
        screen = look_up(cells, table, copies)  # [n, C, 24, 80]
        crop = look_up(self.crop_cells(cells, cursor), table, copies)
        return torch.cat([self.screen(screen), self.crop(crop), self.message(screen[:, :, 0])], dim=1)


class ModelBackbone(nn.Module):
    """Encoders of one frame and the previous action, feeding an LSTM: what every submission's Model is built on.

    `forward(inputs, state)`: inputs hold `observations` [B, T, ...] and prev_actions [B, T] (NO_ACTION at a game's
    first frame), of any type; state is None (zeros) or (h, c), each [L, B, H]. -> core_output [B, T, H], new state.
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
from dataclasses import dataclass, replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from nle.nethack import ACTIONS
from torch import Tensor


@dataclass
class AWRConfig:
    """Hyper-parameters of the algorithm, each with its source; `config.algorithm` overrides them by name."""

    head_dim: int = 120  # width of the head's shared projection; up to 122 keep the head within 267,033 parameters
    burn_in: int = 4  # steps re-run before a chunk to refresh the stored state (R2D2, Kapturowski et al. 2019)
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
    for name, value in overrides.items():
        if name not in vars(AWRConfig()):
            raise ValueError(f"algorithm: unknown setting {name!r}; there are {', '.join(vars(AWRConfig()))}")
        kind, low = type(getattr(AWRConfig, name)), 0 if name in ("burn_in", "lam", "value_coef") else 1e-9
        high = 1 if name in ("lam", "scale_rate") else 1e9
        if type(value) not in (int, kind) or not low <= value <= high:
            raise ValueError(f"algorithm: {name} must be {kind.__name__} in [{low:g}, {high:g}], not {value!r}")
    return replace(AWRConfig(), **overrides)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, T] where mask [B, T] is 1 (0 where nothing counts)."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def lambda_returns(rewards: Tensor, dones: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) targets: G_t = r_t + gamma (1 - d_t) ((1 - lam) v_{t+1} + lam G_{t+1}), with G_T = v_T.

    rewards, dones [B, T] float; values [B, T + 1] float (no gradient flows through the result). Returns [B, T].
    """
    values = values.detach()
    discounts = gamma * (1.0 - dones)
    result, targets = values[:, -1], []
    for t in range(rewards.shape[1] - 1, -1, -1):
        result = rewards[:, t] + discounts[:, t] * ((1.0 - lam) * values[:, t + 1] + lam * result)
        targets.append(result)
    return torch.stack(targets[::-1], dim=1)


def advantage_weights(advantages: Tensor, mask: Tensor, scale: Tensor, hyper: AWRConfig) -> Tuple[Tensor, Tensor]:
    """exp(A / (beta * scale)), clipped at `max_weight` before exp so that it stays finite, with mean 1 over `mask`.

    advantages, mask [B, T] float; scale [] float. -> weights [B, T], 0 where the mask is 0, and the share [] clipped.
    """
    exponents, highest = advantages / (hyper.beta * scale.clamp(min=1e-6)), float(np.log(hyper.max_weight))
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
    """Which of N screens [N, 24, 80] show a new game: turn 1 after a later one, or with other attributes than before.

    The benchmark hands on the recurrent state of the slot's game before and says nothing; menus may hide the lines.
    """
    begun, now = [], []
    for before, screen in zip(seen, tty_chars):
        found = re.search(rb"( St:.* Ch:\d+) .* T:(\d{1,9})", np.asarray(screen[22:], dtype=np.uint8).tobytes())
        shown = (found.group(1), int(found.group(2))) if found else before
        begun.append(shown[1] == 1 and before[1] > 0 and (before[1] > 1 or shown[0] != before[0]))
        now.append(shown)
    return begun, now


def named_keys(tty_chars: Tensor, keys: Tensor) -> Tensor:
    """Screens [..., 24, 80] -> [..., A] float32: 1 for the actions whose keys [A] the question on the top line names.
    "What do you want to eat? [d-gk or ?*]" names d, e, f, g and k."""
    line = tty_chars[..., 0, :].long()
    before, after, place = line.roll(1, -1), line.roll(-1, -1), torch.arange(line.shape[-1], device=line.device)
    ends = (line == ord("]")) | (line == ord(" ")) & (after == ord("o")) & (line.roll(-2, -1) == ord("r"))
    opened, ended = (torch.where(at, place, -1).cummax(-1).values for at in (line == ord("["), ends))
    inside = (opened > ended) & (opened < place)
    spans = inside & (line == ord("-")) & (before > ord(" ")) & (before < after)
    rises = torch.zeros(*line.shape[:-1], 257, device=line.device)  # spans that begin at a key less those that ended
    rises.scatter_add_(-1, torch.where(spans, before, line), inside.float())
    rises.scatter_add_(-1, torch.where(spans, after, line) + 1, -inside.float())
    return (rises.cumsum(-1)[..., keys] > 0).float()


class Model(nn.Module):
    """Policy and value on the recurrent backbone: a dueling head (arXiv 1511.06581), but its two streams are not added
    up, since there are no action values."""

    advantage_square: Tensor
    keys: Tensor  # [A] that the actions send

    def __init__(self, backbone: Any, hyper: Optional[AWRConfig] = None) -> None:
        super().__init__()
        self.backbone, self.hyper = backbone, hyper or AWRConfig()
        self.observations = getattr(backbone, "observations", ("tty_chars", "screen_image"))  # or the benchmark's
        self.no_action = getattr(backbone, "no_action", 0)  # the benchmark's backbone has no index for it
        self.shared = nn.Sequential(nn.Linear(backbone.rnn_hidden_dim, self.hyper.head_dim), nn.ReLU())
        self.policy = nn.Linear(self.hyper.head_dim, backbone.num_actions)
        self.value = nn.Linear(self.hyper.head_dim, 1)
        self.named = nn.Linear(self.hyper.head_dim, 1)
        keys = torch.tensor([int(key) for key in ACTIONS[: backbone.num_actions]])
        self.register_buffer("keys", keys, persistent=False)
        # Running mean of the squared advantage; 0: none seen yet. A buffer is saved like a weight and is no parameter.
        self.register_buffer("advantage_square", torch.zeros(()))

    def head(self, core_output: Tensor, tty_chars: Tensor) -> Tuple[Tensor, Tensor]:
        """[B, T, H], [B, T, 24, 80] -> logits [B, T, A], values [B, T], in float32: half precision rounds away what
        a step changes.

        A fresh LSTM's output is some 0.02 in size and differs by a thousandth from frame to frame: for its first
        hundred updates the network would learn little but how often each action is taken. Normalised (without
        parameters, arXiv 1607.06450), it learns from the first one on. What it hardly learns is to answer a question
        with a letter that is named there: it is told, or the same wrong answer is given without end.
        """
        with torch.autocast(core_output.device.type, enabled=False):
            shared = self.shared(F.layer_norm(core_output.float(), core_output.shape[-1:]))
            logits = self.policy(shared) + self.named(shared) * named_keys(tty_chars, self.keys)
            return logits, self.value(shared).squeeze(-1)

    @torch.no_grad()
    def vec_act(
        self, obs: Dict[str, np.ndarray], state: Optional[ActingState] = None, device: str = "cpu"
    ) -> Tuple[np.ndarray, ActingState]:
        """Draws an action for each of N games. obs: arrays [N, ...], prev_actions [N] among them -> [N] int64, state.

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
        logits, _ = self.head(core_output, inputs["tty_chars"])
        actions = Categorical(logits=logits[:, -1] / self.hyper.temperature).sample()
        return actions.cpu().numpy(), ActingState(rnn_state, seen)


class OfflineAlgorithm:
    """Recurrent advantage-weighted regression.

    The value stream learns lambda-returns; the policy stream regresses onto the data's actions, weighted by
    exp(advantage). The recurrent state is carried from chunk to chunk: it is kept as it was `burn_in` steps before the
    chunk's end ("core"), with the frames since ("tail"). These are re-run without gradient before the next chunk, so
    that its first state comes from the current weights. Another head is a subclass of Model, named as `model_class`.
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

        batch [B, T + 1, ...]; prev_actions [B, 1]: the action before the first frame; rnn_states: {} at first. Games
        may begin anywhere in a chunk. Without our loader's `mask` every frame counts, and without its `starts` a game
        begins at frame 0 if the chunk before ended one.
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
        logits, values = self.model.head(core_output, inputs["tty_chars"])
        loss, info = self._loss(logits[:, :T], values, *(x[:, :T] for x in (actions, rewards, dones, mask)))
        self.values = values[:, :T].detach()

        new_states: Dict[str, Any] = {"ended": dones[:, T - 1] > 0}
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
        """Runs frames [B, T, ...] through the backbone, in pieces that end where a row's game begins (resets [B, T]).

        -> core_output [B, T, H] and, by frame, the states (cleared where games begin) before each piece and after the
        last; pieces end before the frames in `stops` too.
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
        """logits [B, T, A], values [B, T + 1], and actions, rewards, dones, mask, each [B, T] -> loss [], metrics."""
        (actions, rewards, dones, mask), hyper, model = chunk, self.hyper, self.model
        targets = lambda_returns(rewards, dones, values, self.gamma, hyper.lam)
        advantages = targets - values[:, :-1].detach()
        if torch.is_grad_enabled():  # held-out games must leave no trace
            square = masked_mean(advantages**2, mask)
            running = torch.lerp(model.advantage_square, square, hyper.scale_rate)
            model.advantage_square = torch.where(model.advantage_square > 0, running, square)
        scale = model.advantage_square.sqrt()
        weights, clipped = advantage_weights(advantages, mask, scale, hyper)

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
        """The squared error up to 1, linear beyond (Huber). The benchmark divides its first rewards by a running scale
        that is still near zero: they come out at the clip, and squared their errors would drown the policy's loss."""
        return masked_mean(2.0 * F.huber_loss(values, targets, reduction="none"), mask)


# ======================================================================================================================
# ========================================  EDITABLE END  ==============================================================
# ======================================================================================================================


# ======================================================================================================================
# FIXED: the game and its evaluation
# ======================================================================================================================
OBSERVATIONS = tuple(OBSERVATION_SHAPES)
# nle.dataset shows line-drawing bytes as plain characters, the live terminal does not. They appear only where the
# player typed such a byte himself; with this table live screens equal recorded ones there too.
_PLAIN = bytes.maketrans(bytes.fromhex("b0b1f0f1 b3b4c3fe bfc0c1c2c4c5d9da f4 f7 fa"), b"####||||--------{}.")
PLAIN_CHARS = np.frombuffer(_PLAIN, dtype=np.uint8)
ENDS = ("died", "no progress", "step limit")  # of a game; "died" also if it was quit or won
NO_PROGRESS_STEPS = 1000  # the benchmark's: a game is ended when its turn counter stands still for so long


class NetHackGame:
    """A game as in the NetHack Challenge, but seeded; the same on nle 0.9 (gym) and 1.x (gymnasium).

    Observations equal those of recorded games: fresh arrays, or always those given as `into`. `savedir` records games.
    `observation_keys`: what NLE is asked for, ours among them; in `env.unwrapped.last_observation`, in this order.
    """

    def __init__(
        self,
        character: str,
        savedir: Any = None,
        max_steps: int = 1_000_000,
        into: Any = None,
        observation_keys: Sequence[str] = OBSERVATIONS,
    ) -> None:
        options: Dict[str, Any] = dict(character=character, actions=nethack.ACTIONS, observation_keys=observation_keys)
        options.update(allow_all_modes=True, allow_all_yn_questions=True, penalty_step=0.0, penalty_time=0.0)
        options.update(max_episode_steps=10**9, savedir=savedir, save_ttyrec_every=1 if savedir else 0)
        if "fix_moon_phase" in inspect.signature(NLE.__init__).parameters:
            options["fix_moon_phase"] = True  # otherwise the date enters the game
        self.env, self.max_steps, self.into = NetHackScore(**options), max_steps, into

    def reset(self, core_seed: int, disp_seed: int) -> Dict[str, np.ndarray]:
        """Begins the game of these two seeds."""
        self.env.unwrapped.seed(core=core_seed, disp=disp_seed, reseed=False)  # holds for one game only
        raw = self.env.reset()
        raw = raw[0] if isinstance(raw, tuple) else raw
        library = ctypes.CDLL(self.env.unwrapped.nethack.dlpath)  # this game's own copy of NetHack
        ctypes.c_long.in_dll(library, "ubirthday").value = 0  # the clock's time, which enters games with shopkeepers
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))  # NLE loads it anew for the next game
        self.steps = self.score = self.still = 0
        self.depth, self.turn = int(raw["blstats"][12]), int(raw["blstats"][20])
        return self._observe(raw)

    def step(self, action: int) -> Tuple[Dict[str, np.ndarray], float, bool, Dict[str, Any]]:
        """-> obs, reward (difference of the in-game score), done, info: at a game's end what GameResult holds of it."""
        raw, reward, over, *_, info = self.env.step(int(action))
        self.steps, self.score = self.steps + 1, self.score + int(reward)
        if not over:  # the screens after a game's end have all-zero blstats
            turn, self.depth = int(raw["blstats"][20]), int(raw["blstats"][12])
            self.still, self.turn = (self.still + 1 if turn == self.turn else 0), turn
        stuck, cut = self.still >= NO_PROGRESS_STEPS, self.steps >= self.max_steps
        end = "died" if over else "no progress" if stuck else "step limit" if cut else None
        if end is not None:
            info = dict(info, score=self.score, depth=self.depth, turns=self.turn, length=self.steps, end=end)
        return self._observe(raw), float(reward), end is not None, info

    def _observe(self, raw: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Copies, since NLE writes the next frame into the same arrays."""
        obs = self.into or {name: np.empty(shape, kind) for name, (kind, *shape) in OBSERVATION_SHAPES.items()}
        PLAIN_CHARS.take(raw["tty_chars"], out=obs["tty_chars"], mode="clip")  # without a mode numpy buffers the result
        obs["tty_colors"][:], obs["tty_cursor"][:] = raw["tty_colors"], raw["tty_cursor"]
        obs["blstats"][:] = read_blstats(obs["tty_chars"][None])
        return obs

    def close(self) -> None:
        self.env.close()


class GameResult(NamedTuple):
    game: int  # its number k; its seeds derive from eval_seed and k
    score: float
    depth: int
    turns: int
    length: int  # actions
    end: str  # one of ENDS


def game_seeds(eval_seed: int, game: int) -> Tuple[int, int]:
    return derived_seed(eval_seed, game, 0) % 2**31, derived_seed(eval_seed, game, 1) % 2**31


# What the main process shares with its workers, a record a slot: the game's screen, the action before it and the action
# to take, and whether there is a game: not after the slot's last one.
_SLOT_FIELDS = {**OBSERVATION_SHAPES, "prev_actions": (np.int64,), "actions": (np.int64,), "active": (np.bool_,)}
SLOT = np.dtype([(name, kind, tuple(shape)) for name, (kind, *shape) in _SLOT_FIELDS.items()], align=True)


def play_slot(slots: np.ndarray, row: int, games: Sequence[int], character: str, config: TrainConfig) -> Iterator[Any]:
    """Plays these games, one after another, in a row of `slots`. The first `next` begins the first game, each further
    one takes an action; it gives the GameResult of the game that ended by it, or None."""
    screen = {name: slots[name][row] for name in OBSERVATIONS}
    game, result = NetHackGame(character, max_steps=config.eval_max_steps, into=screen), None
    for number in games:
        game.reset(*game_seeds(config.eval_seed, number))
        slots["active"][row], slots["prev_actions"][row] = True, NO_ACTION
        done = False
        while not done:
            yield result
            *_, done, info = game.step(slots["actions"][row])
            result = None
        result = GameResult(number, *(info[name] for name in GameResult._fields[1:]))
    game.close()
    slots[row] = np.zeros((), SLOT)
    yield result


def play_worker(pipe: Any, shared: Any, rows: Sequence[int], config: TrainConfig, folder: str) -> None:
    """A worker process: plays its rows' games, a step whenever the main process says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    tempfile.tempdir = folder  # for NLE, which makes a folder a game
    slots, players = np.frombuffer(shared, SLOT), []
    try:
        while True:
            message = json.loads(pipe.recv_bytes())  # plain bytes: pickling takes as long as a step
            if message:
                character, games = message
                quotas = [(row, range(row, games, config.eval_processes)) for row in rows]
                players = [play_slot(slots, *quota, character, config) for quota in quotas]
            results = [next(player, None) for player in players]
            pipe.send_bytes(json.dumps([result for result in results if result]).encode())
    except (EOFError, OSError):  # the main process is gone
        shutil.rmtree(folder, ignore_errors=True)


class GamePool:
    """`eval_processes` game slots spread over worker processes, of several torchrun processes each its share.

    Slot s plays games s, s + slots, ..., each from seeds of its own: the number of cores or processes changes none.
    """

    def __init__(self, config: TrainConfig) -> None:
        rows = -(-config.eval_processes // 8) * 8  # a matrix product's bits depend on its rows, at multiples of 8 not
        spawn = multiprocessing.get_context("spawn")
        shared = spawn.RawArray("b", rows * SLOT.itemsize)
        self.slots, self.folder = np.frombuffer(shared, SLOT), tempfile.TemporaryDirectory(prefix="nethack_games_")
        mine = range(config.eval_processes)[RANK::WORLD]
        workers = min(config.eval_workers or -(-CORES // LOCAL_WORLD), len(mine))
        self.pipes, self.processes = [], []
        for number in range(workers):
            pipe, theirs = spawn.Pipe()
            args = (theirs, shared, mine[number::workers], config, self.folder.name)
            self.processes.append(spawn.Process(target=play_worker, args=args, daemon=True))
            self.processes[-1].start()
            theirs.close()  # or its end would not be noticed
            self.pipes.append(pipe)

    def tell(self, message: Optional[Tuple[str, int]] = None) -> List[GameResult]:
        """All workers begin so many games of a character, or else take a step -> games that ended by it."""
        ended = None
        with contextlib.suppress(EOFError, OSError):
            told = json.dumps(message).encode()
            for pipe in self.pipes:
                pipe.send_bytes(told)
            answers = [json.loads(pipe.recv_bytes()) for pipe in self.pipes]
            ended = [GameResult(*result) for answer in answers for result in answer]
        stop_if_asked()  # before the next line, since a signal may have been for the workers too
        if ended is None:
            raise UserError("a process that plays games has died; --resume true plays this evaluation again")
        return ended

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def vec_evaluate(
    pool: GamePool, actor: Any, character: str, num_episodes: int, seed: int, device: torch.device
) -> List[GameResult]:
    """The benchmark's loop over games 0 .. num_episodes - 1 of the character, each process its share -> all results."""
    actor.eval()
    rnn_states, tick, slots = None, 0, pool.slots
    results = pool.tell((character, num_episodes))
    bar = progress(total=num_episodes, desc=f"playing {character}", unit="game", leave=False)
    while highest(np.count_nonzero(slots["active"])):
        slots["prev_actions"][~slots["active"]] = NO_ACTION
        obs = {name: slots[name].copy() for name in (*OBSERVATIONS, "prev_actions")}
        torch.manual_seed(derived_seed(seed, tick))  # sampled actions depend on these alone
        actions, rnn_states = actor.vec_act(obs, rnn_states, device=str(device))
        slots["actions"] = slots["prev_actions"] = actions
        ended = pool.tell()
        results += ended
        bar.update(len(ended))
        tick += 1
    bar.close()
    actor.train()
    return sorted(result for part in gather(results) for result in part)


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
    low, high = bootstrap_interval(normalized)
    summary = dict(normalized_score=normalized.mean(), normalized_score_low=low, normalized_score_high=high)
    summary.update(turns_mean=turns.mean(), length_mean=lengths.mean())
    for statistic in ("median", "mean", "std", "min", "max"):
        summary[f"reward_{statistic}"] = getattr(np, statistic)(scores)
        summary[f"depth_{statistic}"] = getattr(np, statistic)(depths)
    for end in ENDS:
        summary["end_" + end.replace(" ", "_")] = np.mean([result.end == end for result in results])
    return {name: float(value) for name, value in summary.items()}


def geometric_mean(scores: Sequence[float]) -> float:
    """Of characters' scores, 0 if any is not above 0. (The task squashes each score before it takes this mean.)"""
    if len(scores) == 1:
        return scores[0]
    return math.prod(scores) ** (1 / len(scores)) if min(scores) > 0 else 0.0


def save_games(path: str, character: str, results: Sequence[GameResult], eval_seed: int) -> None:
    """<path>_games.csv with all that is known of each game, and arrays with one value a game, in the games' order."""
    scores, depths = np.array([result[1:3] for result in results], dtype=float).T
    normalized = scores / AUTOASCEND_MEAN_SCORE[character]
    for name, values in dict(returns=scores, depths=depths.astype(int), normalized_scores=normalized).items():
        write_atomically(Path(f"{path}_{name}.npy"), partial(np.save, arr=values))
    lines: List[List[Any]] = [["character", *GameResult._fields, "normalized_score", "core_seed", "disp_seed"]]
    for result, score in zip(results, normalized):
        lines.append([character, *result, score, *game_seeds(eval_seed, result.game)])
    table = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_atomically(Path(f"{path}_games.csv"), lambda file: file.write(table.encode()))


def evaluate_games(model: Any, config: TrainConfig, device: torch.device, prefix: str) -> Dict[str, float]:
    """Plays every character's games, writes their files as <prefix>_<character>_..., prints scores -> metrics."""
    row: Dict[str, float] = {}
    scores: Dict[str, float] = {}
    with contextlib.closing(GamePool(config)) as pool:
        for name in config.characters:
            results = vec_evaluate(pool, model, name, config.eval_episodes, config.eval_seed, device)
            if RANK == 0:
                save_games(f"{prefix}_{name}", name, results, config.eval_seed)
            summary = summarize_games(results, name)
            say_metrics(name, summary)
            say(f"D4RL score: {summary['normalized_score']:.6f}")  # what the benchmark reads
            group = f"{name}/" if len(config.characters) > 1 else ""
            row.update({group + metric: value for metric, value in summary.items()})
            scores[f"normalized_score_{name.replace('-', '_')}"] = summary["normalized_score"]
    scores = {"normalized_score": geometric_mean(list(scores.values())), **scores}
    say_metrics("TEST_METRICS", scores)
    return {**row, **{f"eval/{name}": score for name, score in scores.items()}}


@torch.no_grad()
def evaluate_heldout(
    algorithm: Any, loader: ChunkLoader, max_frames: int, device: torch.device, precision: Optional[torch.dtype] = None
) -> Dict[str, float]:
    """Means over frames of the metrics of the algorithm's own train_step over held-out chunks, and, where it keeps its
    `values` [B, T], how much of the exact returns' variance they explain."""
    states: Dict[str, Any] = {}
    sums: Dict[str, float] = {"frames": 0.0}
    pairs = [torch.zeros(2, 0)]
    algorithm.model.eval()
    steps = min(loader.plan.steps, -(-max_frames // (loader.plan.rows * loader.seq_len)))
    for step in progress(iterable=range(steps), desc="held-out games", unit="batch", leave=False):
        stop_if_asked()
        batch = map_tensors(lambda tensor: tensor.to(device), loader.batch_at(step))
        prev_actions, mask = batch.pop("prev_actions"), batch["mask"][:, :-1]
        with torch.autocast(device.type, precision, enabled=precision is not None):
            _, states, info = algorithm.train_step(batch, prev_actions, states)
        count = float(mask.sum())
        for name, value in {**info, "frames": 1.0}.items():
            sums[name] = sums.get(name, 0.0) + float(value) * count
        if getattr(algorithm, "values", None) is not None:
            pairs.append(torch.stack([batch["returns"][:, :-1][mask], algorithm.values[mask]]).cpu())
    algorithm.model.train()
    parts = gather((sums, torch.cat(pairs, dim=1).double()))
    totals = {name: sum(part[name] for part, _ in parts) for name in sums}
    means = {name: total / max(totals["frames"], 1.0) for name, total in totals.items()}
    returns, values = torch.cat([pair for _, pair in parts], dim=1)
    if len(returns) and returns.var(False) > 0:
        means["value_rmse"] = float((returns - values).square().mean().sqrt())
        means["explained_variance"] = 1.0 - float((returns - values).var(False) / returns.var(False))
    return {**means, "frames": totals["frames"]}


# ======================================================================================================================
# FIXED: the run's folder, checkpoints and resuming
# ======================================================================================================================
CHECKPOINT_FORMAT = 2
# What may differ between a run and its continuation: how long it is, where things lie, how it is watched and evaluated.
MAY_DIFFER = "update_steps data_path store_path checkpoints_path project group name version log_every checkpoint_every"
MAY_DIFFER += " keep_checkpoints resume data_mode render_processes device"


def open_folder(first: Path, resume: bool) -> Tuple[Path, int]:
    """`first`, or where it exists `first-2`, `first-3`, ...: a new one, or with `resume` the newest. -> folder, and the
    descriptor of a lock on it."""
    newest, folder, number = first, first, 1
    while folder.exists():
        newest, number = folder, number + 1
        folder = first.with_name(f"{first.name}-{number}")
    folder = newest if resume else folder
    try:
        folder.mkdir(parents=True, exist_ok=resume)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, lock
    except OSError as error:
        what = f"cannot write to {folder}, or it is in use by another run ({error.strerror})"
        raise UserError(f"{what}; give another --name or --checkpoints_path") from None


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
        what = f"{path} cannot be read as a checkpoint ({type(error).__name__} {str(error)[:120]})"
        raise UserError(f"{what}; if it is damaged, remove it: a run goes on from its last.prev.pt") from None


def weights_of(trainer: "Trainer") -> Dict[str, Any]:
    """What is needed to play: all that best.pt and <step>.pt hold."""
    config = json.dumps(asdict(trainer.config))
    return dict(format=CHECKPOINT_FORMAT, step=trainer.step, config=config, model=trainer.model.state_dict())


def save_checkpoint(trainer: "Trainer") -> None:
    """Writes last.pt; the one before it becomes last.prev.pt. At every moment at least one of them is whole."""
    content, last = weights_of(trainer), trainer.folder / "last.pt"
    content["algorithm"] = {name: module.state_dict() for name, module in trainer.modules.items()}
    content["ranks"] = gather({"rnn_states": map_tensors(torch.Tensor.cpu, trainer.rnn_states)})
    content.update(optimizer=trainer.optimizer.state_dict(), scaler=trainer.scaler.state_dict())
    content.update(skipped=trainer.skipped, data=trainer.fingerprints, wandb_id=trainer.wandb_id)
    if RANK == 0:
        write_atomically(trainer.folder / "next.pt", lambda file: torch.save(content, file))
        if last.exists():
            os.replace(last, trainer.folder / "last.prev.pt")
        os.replace(trainer.folder / "next.pt", last)


def load_checkpoint(trainer: "Trainer", content: Dict[str, Any]) -> None:
    """Goes on where the checkpoint was saved, to the bit. Raises UserError if that was another run."""
    saved = {**json.loads(content["config"]), "processes": len(content["ranks"]), "data's fingerprint": content["data"]}
    given = {**asdict(trainer.config), "processes": WORLD, "data's fingerprint": trainer.fingerprints}
    for name, value in given.items():
        if saved.get(name) != value and name not in MAY_DIFFER.split() and not name.startswith("eval"):
            raise UserError(f"cannot resume: {name} was {saved.get(name)} and is {value}; begin without --resume")
    for name, module in trainer.modules.items():
        module.load_state_dict(content["algorithm"][name])
    trainer.optimizer.load_state_dict(content["optimizer"])
    trainer.scaler.load_state_dict(content["scaler"])
    trainer.step, trainer.skipped, states = content["step"], content["skipped"], content["ranks"][RANK]["rnn_states"]
    trainer.rnn_states = map_tensors(lambda tensor: tensor.to(trainer.device), states)


def cut_metrics(path: Path, step: int) -> List[Dict[str, Any]]:
    """The rows up to `step`; later ones, and a last line that was cut short, are dropped: they are written again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= step]
    write_atomically(path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return rows


def describe_run(config: TrainConfig) -> bytes:
    """config.json: what is needed to know how a result came about."""
    script = Path(__file__).resolve()
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=script.parent, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    described = {"config": asdict(config), "command": sys.argv, "commit": git.stdout.strip()}
    described["script_sha256"] = hashlib.sha256(script.read_bytes()).hexdigest()
    described["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "nle": nle.__version__}
    described["hardware"] = {"device": device, "cores": CORES, "threads": torch.get_num_threads(), "processes": WORLD}
    return json.dumps(described, indent=1).encode()


# ======================================================================================================================
# FIXED: signals, and several processes, one a GPU, started by torchrun: each learns from its own rows, the first writes
# ======================================================================================================================
stop_signal = 0  # number of the last SIGTERM or Ctrl-C


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C arrived; raised with its number at the next point where the run can be left."""


@contextlib.contextmanager
def noting_signals() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C are noted and nothing else; afterwards they act as before."""

    def note(number: int, _frame: Any) -> None:
        global stop_signal
        stop_signal = number

    note(0, None)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    """Raises Stopped in all processes if one of them got a signal, so that they stop at the same step."""
    number = highest(stop_signal)
    if number:
        raise Stopped(number)


def highest(number: int) -> int:
    """The highest of all processes' numbers."""
    if WORLD == 1:
        return int(number)
    box = torch.tensor(int(number))
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def gather(mine: Any) -> List[Any]:
    """Every process's object, in their order."""
    everyone = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def average(tensors: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
    """Each tensor becomes its mean over the processes, weighted by their counting frames: the gradient of a masked mean
    is then the one over all rows, to rounding. What an algorithm normalises, it normalises in each process's rows."""
    if WORLD > 1:
        total = weight.clone()
        dist.all_reduce(total)
        for tensor in tensors:
            tensor.mul_(weight / total.clamp(min=1))
            dist.all_reduce(tensor)


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
        raise UserError(f"the submission {config.submission} takes no settings, but algorithm is {config.algorithm}")
    return algorithm


def learning_rate_at(config: TrainConfig, transitions: int) -> float:
    """Warm-up, then constant or cosine down to a tenth. Counted in transitions, so the same at any batch size."""
    warm = min(1.0, transitions / config.warmup_transitions) if config.warmup_transitions else 1.0
    if config.lr_schedule == "constant":
        return config.learning_rate * warm
    total = config.update_steps * config.batch_size * config.seq_len * WORLD
    return config.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, transitions / total))))


def heldout_loss(row: Dict[str, Any]) -> float:
    """Of a logged row; infinite where it has none (None: it was not finite). The lowest one's weights are best.pt."""
    loss = row.get("heldout/loss_per_action", row.get("heldout/loss"))
    return math.inf if loss is None else loss


def load_data(config: TrainConfig) -> Tuple[ChunkLoader, Optional[ChunkLoader]]:
    """Loaders of the games to learn from, and of those held out, if any."""
    stores = [open_or_build_store(config.data_path, config.store_path, character) for character in config.characters]
    say("\n".join(map(str, stores)))
    games, rows = Games(stores, config.game_frames), config.batch_size * WORLD
    heldout = games.heldout(config.heldout_share)
    scale = games.reward_scale(np.flatnonzero(~heldout), config.gamma)
    loader = ChunkLoader(games, np.flatnonzero(~heldout), config, rows, scale)
    if not heldout.any():
        return loader, None
    rows = min(rows, max(32, WORLD))
    return loader, ChunkLoader(games, np.flatnonzero(heldout), config, rows, scale, returns=True)


class Trainer:
    """A run: its data, its agent, its folder and how far it has come."""

    TIMES = ("times/batch_loading_cpu", "times/forward_pass", "times/backward_pass")  # seconds since the last row

    def __init__(self, algorithm: Any, config: TrainConfig, step: int = 0) -> None:
        """`algorithm`: None makes a new one; one that is only evaluated needs no data."""
        self.config, self.device, self.step = config, choose_device(config), step
        self.precision = choose_precision(config, self.device)
        self.per_update = config.batch_size * config.seq_len * WORLD  # transitions
        if WORLD > 1:  # a process may wait for another that plays long games
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            # torchrun keeps its store over a restart: what the processes before left there must not be taken for ours.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
            dist.init_process_group(backend, None, timedelta(hours=24), WORLD, RANK, store)
        set_seed(config.train_seed)
        self.algorithm = algorithm or make_algorithm(config, self.device)
        self.model, self.heldout = self.algorithm.model, None
        parts = vars(self.algorithm).items()  # the model, and what else there is, such as target networks
        self.modules = {name: part for name, part in parts if isinstance(part, nn.Module)}
        if config.data_path or algorithm is None:
            self.loader, self.heldout = load_data(config)
            self.fingerprints = [str(store.index["fingerprint"]) for store in self.loader.games.stores]
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=self.device.type == "cuda")
        make_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # torch 2.0 has the second alone
        self.scaler = make_scaler(enabled=self.precision is torch.float16)
        self.rnn_states: Dict[str, Any] = {}
        self.skipped = self.logged = self.evaluated = 0
        self.seconds = np.zeros(len(self.TIMES))  # spent since step `logged`
        self.best = math.inf  # lowest held-out loss
        self.lock: Optional[int] = None  # on the folder
        self.logger: Any = None

    def open(self, first: Path) -> None:
        """Takes the folder, `first` or one of its repeats, and goes on from the checkpoint that it holds, if any."""
        self.folder, self.lock = open_folder(first, self.config.resume) if RANK == 0 else (first, None)
        self.folder = gather(self.folder)[0]
        checkpoints = [path for path in (self.folder / "last.pt", self.folder / "last.prev.pt") if path.exists()]
        content = read_checkpoint(checkpoints[0]) if checkpoints else {}
        if content:
            load_checkpoint(self, content)
        if RANK == 0:  # from here on files are changed
            write_atomically(self.folder / "config.yaml", lambda file: file.write(pyrallis.dump(self.config).encode()))
            write_atomically(self.folder / "config.json", lambda file: file.write(describe_run(self.config)))
        rows = gather(cut_metrics(self.folder / "metrics.jsonl", self.step) if RANK == 0 else [])[0]
        self.logged = self.step
        self.evaluated = max([row["step"] for row in rows if "loss" not in row], default=0)
        self.best = min(map(heldout_loss, rows), default=math.inf)
        self.logger = RunLogger(self.config, self.folder, content.get("wandb_id"))
        self.wandb_id = self.logger.run.id if self.logger.run else None

    def close(self) -> None:
        if self.logger is not None:
            self.logger.close()
        if self.lock is not None:
            os.close(self.lock)
        if WORLD > 1:
            dist.destroy_process_group()

    def position(self) -> Dict[str, Any]:
        return {"step": self.step, "transitions": self.step * self.per_update}

    def update(self, batches: Iterator[Batch]) -> Dict[str, Any]:
        """One gradient step -> the algorithm's info, and what the loop adds to it."""
        # Whatever is drawn depends on the step alone: a resumed run draws the same, and evaluations change nothing.
        set_seed(derived_seed(self.config.train_seed, self.step, RANK))
        clock = [time.perf_counter()]
        batch = next(batches)
        clock.append(time.perf_counter())
        batch = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch)
        prev_actions = batch.pop("prev_actions")
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            loss, states, info = self.algorithm.train_step(batch, prev_actions, self.rnn_states)
        self.rnn_states = map_tensors(torch.Tensor.detach, states)
        clock.append(time.perf_counter())
        learning_rate = learning_rate_at(self.config, self.step * self.per_update)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        tensors = [parameter.grad for parameter in self.algorithm.parameters() if parameter.grad is not None]
        tensors += [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        average(tensors, batch["mask"][:, :-1].sum())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.algorithm.parameters(), self.config.clip_grad_norm or math.inf)
        if math.isfinite(float(norm)):  # on a GPU this waits for all its work
            self.scaler.step(self.optimizer)
            self.algorithm.after_gradient_step()
        else:  # it must not reach the weights
            self.skipped, self.rnn_states = self.skipped + 1, {}
            warn(f"the gradient at step {self.step} is not finite: update skipped, recurrent states cleared")
        self.scaler.update()
        self.step += 1
        self.seconds += np.diff([*clock, time.perf_counter()])
        added = {"grad_norm": norm, "learning_rate": learning_rate, "skipped_updates": self.skipped}
        return {"loss": loss.detach(), **info, **added}

    def log(self, info: Dict[str, Any]) -> None:
        """One row and one line: the algorithm's info, as means over the processes."""
        parts = gather({name: float(value) for name, value in info.items()})
        info = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        metrics = {f"train/{name}" if name != "loss" else name: value for name, value in info.items()}
        rate = (self.step - self.logged) * self.per_update / self.seconds.sum()
        times = dict(zip(self.TIMES, self.seconds.tolist()))
        self.logger.log({**self.position(), **metrics, "charts/SPS": rate, **times})
        self.logged, self.seconds = self.step, np.zeros(len(self.TIMES))
        say_metrics("TRAIN_METRICS", {**self.position(), **info, "transitions_per_s": rate})

    def due(self) -> bool:
        """Whether an evaluation is due that there has not been."""
        last = self.step >= self.config.update_steps
        return self.step > self.evaluated and (last or self.step % self.config.eval_every == 0)

    def evaluate(self) -> None:
        """Held-out loss, then games of every character: one row. A run keeps its best weights."""
        config, row = self.config, self.position()
        set_seed(config.eval_seed)  # in case an algorithm draws
        if self.heldout is not None and config.eval_heldout_frames:
            limit = config.eval_heldout_frames
            metrics = evaluate_heldout(self.algorithm, self.heldout, limit, self.device, self.precision)
            say_metrics("HELDOUT_METRICS", {"step": self.step, **metrics})
            row.update({f"heldout/{name}": value for name, value in metrics.items()})
        if config.eval_episodes:
            begin = time.perf_counter()
            row.update(evaluate_games(self.model, config, self.device, f"{self.folder}/{self.step}"))
            row["times/evaluation_cpu"] = time.perf_counter() - begin
        kept = ["best.pt"] if heldout_loss(row) < self.best else []
        kept += [f"{self.step}.pt"] if config.keep_checkpoints else []
        for name in kept if RANK == 0 and not config.evaluate else []:
            write_atomically(self.folder / name, lambda file: torch.save(weights_of(self), file))
        self.best, self.evaluated = min(self.best, heldout_loss(row)), self.step
        self.logger.log(row)  # last: an evaluation that is logged is not repeated


def train(config: TrainConfig) -> Path:
    """Trains, evaluates, and returns the run's folder."""
    name = f"{config.name}-{'+'.join(config.characters)}-seed{config.train_seed}"
    with contextlib.closing(Trainer(None, config)) as trainer:
        trainer.open(Path(config.checkpoints_path or "runs").expanduser() / f"{config.group}-v{config.version}" / name)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        what = "resuming" if trainer.step else "nothing to resume in" if config.resume else "beginning"
        say(f"{what} {trainer.folder} at step {trainer.step}: {parameters:,} parameters on {WORLD} x {trainer.device}")
        batches: Any = read_ahead(trainer.loader.batch_at, trainer.step)
        with noting_signals(), contextlib.closing(batches):
            if trainer.due():  # the run was stopped while it was evaluated
                trainer.evaluate()
            steps = range(trainer.step, config.update_steps)
            for _ in progress(iterable=steps, initial=trainer.step, total=config.update_steps):
                info = trainer.update(batches)
                if trainer.step % config.log_every == 0 or trainer.step == config.update_steps:
                    trainer.log(info)
                stopped, due = highest(stop_signal), trainer.due()
                # First the checkpoint: whatever goes wrong while games are played, the run can go on from here.
                if stopped or due or trainer.step % config.checkpoint_every == 0:
                    save_checkpoint(trainer)
                if stopped:
                    raise Stopped(stopped)
                if due:
                    trainer.evaluate()
    return trainer.folder


def load_agent(path: Any, **overrides: Any) -> Tuple[Any, TrainConfig, int]:
    """A checkpoint's algorithm with its weights, its config with `overrides`, and its step."""
    content = read_checkpoint(Path(path))
    known = {name: value for name, value in json.loads(content["config"]).items() if name in vars(TrainConfig())}
    overrides["algorithm"] = {**known["algorithm"], **overrides.get("algorithm", {})}
    config = TrainConfig(**{**known, **overrides})
    algorithm = make_algorithm(config, choose_device(config))
    try:
        algorithm.model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the algorithm; give its own with --submission ({error})") from None
    return algorithm, config, content["step"]


def evaluate_checkpoint(config: TrainConfig) -> Path:
    """Scores a checkpoint with this command's evaluation settings, with `data_path` on held-out games too -> folder."""
    path = Path(str(config.evaluate)).expanduser()
    given = "algorithm data_path store_path device precision".split()
    given += [name for name in vars(config) if name.startswith("eval")]
    given += [name for name in ("character", "submission") if getattr(config, name) != getattr(TrainConfig(), name)]
    agent = load_agent(path, resume=False, **{name: getattr(config, name) for name in given})
    with contextlib.closing(Trainer(*agent)) as trainer:
        trainer.open(Path(config.checkpoints_path or path.parent).expanduser() / f"{path.stem}-evaluation")
        say(f"evaluating {path} at step {trainer.step}, with results in {trainer.folder}")
        with noting_signals():
            trainer.evaluate()
    return trainer.folder


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
    except KeyboardInterrupt as stopped:  # Python's own before training has begun, then Stopped
        say("stopped by a signal; a run goes on with --resume true")
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)  # as the shell reports it
    return 0


if __name__ == "__main__":
    sys.exit(main())
