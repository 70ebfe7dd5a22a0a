"""Recurrent advantage-weighted regression with burn-in for NetHack, offline.

It trains on games of the symbolic bot AutoAscend (NLD-AA) and plays NetHack
(NLE) with the result. The score is the game's score over AutoAscend's mean
score for that character. One file, read from top to bottom: configuration,
utilities, data, backbone, the EDITABLE block (model and algorithm), evaluation,
checkpoints, training. On a CPU or the first GPU; with a file of settings; on
eight GPUs (--nnodes for more machines); to go on where a run stopped; with
another algorithm:

    python custom_nethack_pomdp.py --data_path DIR
    python custom_nethack_pomdp.py --data_path DIR --config FILE
    torchrun --nproc_per_node 8 custom_nethack_pomdp.py --data_path DIR
    python custom_nethack_pomdp.py --data_path DIR --resume true
    python custom_nethack_pomdp.py --data_path DIR --submission FILE

Axes: B rows of a batch, T steps of a chunk (seq_len), A actions (121), H hidden units (2048), L layers (2), N games.

A batch holds T + 1 frames of each row; the last one is the first of the row's next chunk and serves only as the
successor of frame T - 1. Only frames 0 .. T - 1 can carry loss.

    tty_chars   [B, T+1, 24, 80]  uint8    characters on the terminal
    tty_colors  [B, T+1, 24, 80]  int8     colours 0..31 (bit 16: inverse video)
    tty_cursor  [B, T+1, 2]       uint8    row and column of the cursor
    blstats     [B, T+1, 27]      int32    NLE's bottom-line statistics as read off the status lines; all 0 if hidden
    actions     [B, T+1]          int64    index into nle.nethack.ACTIONS
    rewards     [B, T+1]          float32  score[t+1] - score[t], over `reward_scale`, clipped to +-clip_range
    dones       [B, T+1]          bool     the player's last frame of a game
    mask        [B, T+1]          bool     the frame counts: not padding, and its key is an action
    starts      [B]               bool     the row's first frame does not follow the batch before: clear the state
    returns     [B, T+1]          float32  exact discounted return-to-go (held-out batches only)
"""

# ======================================================================================================================
# FIXED: imports and constants
# ======================================================================================================================
import argparse
import bz2
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import fcntl
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import netrc
import os
import pickle
import platform
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, Callable, Dict, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
from urllib.parse import urlparse

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
from torch.distributed.rendezvous import rendezvous
from torch.distributions import Categorical
from tqdm.auto import tqdm

ROWS, COLS = 24, 80  # the terminal
CELLS = ROWS * COLS
NUM_BLSTATS = 27  # nle.nethack.BLSTATS_SHAPE
NUM_ACTIONS = len(nethack.ACTIONS)  # 121
NO_ACTION = NUM_ACTIONS  # "previous action" of a game's first frame: no real action has this index
UNKNOWN_KEY = 255  # in the store: a keypress that is none of the 121 actions
SPACE = ord(" ")
# torchrun tells each process the number of processes and its own number: on all machines, and on this one.
WORLD, LOCAL_WORLD = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) if WORLD > 1 else 0 for name in ("RANK", "LOCAL_RANK"))

# Key to action. Three keys have two actions (`"` 77/109, `$` 79/120, `+` 81/105); either sends the same key, and the
# last index is the one that Katakomba's data uses.
KEY_TO_ACTION = np.full(256, UNKNOWN_KEY, dtype=np.uint8)
for _index, _action in enumerate(nethack.ACTIONS):
    KEY_TO_ACTION[int(_action)] = _index

# AutoAscend's mean score for each character, by which scores are divided (Katakomba, arXiv 2306.08772, table of scores).
AUTOASCEND_MEAN_SCORE: Dict[str, float] = {
    "arc-dwa-law": 5445.69, "arc-gno-neu": 5316.57, "arc-hum-law": 5826.35, "arc-hum-neu": 6636.44,
    "bar-hum-cha": 18228.11, "bar-hum-neu": 17836.68, "bar-orc-cha": 17594.38, "cav-dwa-law": 11893.48,
    "cav-gno-neu": 10083.06, "cav-hum-law": 12462.82, "cav-hum-neu": 12113.87, "hea-gno-neu": 3783.93,
    "hea-hum-neu": 4068.27, "kni-hum-law": 14137.06, "mon-hum-cha": 18353.30, "mon-hum-law": 16091.57,
    "mon-hum-neu": 17456.05, "pri-elf-cha": 7109.35, "pri-hum-cha": 8262.56, "pri-hum-law": 6847.99,
    "pri-hum-neu": 7732.69, "ran-elf-cha": 9014.18, "ran-gno-neu": 6965.04, "ran-hum-cha": 8378.50,
    "ran-hum-neu": 8067.99, "ran-orc-cha": 7608.48, "rog-hum-cha": 4818.20, "rog-orc-cha": 4897.69,
    "sam-hum-law": 11009.36, "tou-hum-neu": 4211.47, "val-dwa-law": 23473.61, "val-hum-law": 26103.03,
    "val-hum-neu": 18624.77, "wiz-elf-cha": 5005.16, "wiz-gno-neu": 4317.51, "wiz-hum-cha": 5316.82,
    "wiz-hum-neu": 5323.48, "wiz-orc-cha": 5016.74,
}  # fmt: skip

Batch = Dict[str, torch.Tensor]
RNNState = Tuple[torch.Tensor, torch.Tensor]  # (h, c), each [L, B, H]


class UserError(Exception):
    """A mistake of the user's: `main` prints its one line on stderr and exits with 2."""


# ======================================================================================================================
# FIXED: configuration
# ======================================================================================================================
@dataclass
class TrainConfig:
    """Settings of a run. Names and defaults are the benchmark's where it has them, `character` aside."""

    # --- what is learned and played
    character: str = "mon-hum-neu,val-hum-neu,ran-hum-neu"  # one or several, by commas: train on all, evaluate on each
    data_path: Optional[str] = None  # NLD-AA folder, Katakomba .hdf5 file or folder, or a chunk store [Katakomba's folder]
    data_mode: str = "in_memory"  # accepted for Katakomba's command lines; data is always read compressed
    store_path: str = "runs/stores"  # folder in which chunk stores are built
    heldout_share: float = 0.1  # share, 0 to 1, of each character's games that is never trained on (chosen by hash of the name)
    data_workers: int = 2  # threads that decode frames ahead of the training step
    submission: Optional[str] = None  # take Model and OfflineAlgorithm from this Python file [the block in this script]
    algorithm: Dict[str, Any] = field(default_factory=dict)  # overrides of AWRConfig, e.g. '{burn_in: 8, lam: 0.9}'
    # --- logging
    project: str = "NetHack"  # wandb project
    group: str = "custom-nethack-pomdp"  # wandb group and folder of runs; "-v<version>" is appended
    name: str = "custom"  # run name; "-<character>-seed<train_seed>" is appended
    version: int = 0  # number that is appended to the group, as -v<version>
    log_every: int = 50  # updates between logged rows
    # --- model (rnn_hidden_dim and rnn_layers are the benchmark's and cannot be changed)
    rnn_hidden_dim: int = 2048  # LSTM units a layer: 2048
    rnn_layers: int = 2  # LSTM layers: 2
    use_prev_action: bool = True  # feed the previous action to the LSTM
    rnn_dropout: float = 0.0  # share, 0 to 1, of values dropped between the LSTM's layers
    clip_range: float = 10.0  # rewards, in units of the run's reward scale, are clipped to +- this
    tau: float = 0.005  # Polyak rate of target networks, share an update (used by reference algorithms)
    gamma: float = 0.999  # discount, factor a step of the game
    # --- training
    update_steps: int = 100_000  # updates (gradient steps) in all
    batch_size: int = 128  # rows a batch, on each GPU
    seq_len: int = 16  # steps a chunk (T)
    learning_rate: float = 3e-4  # peak learning rate of AdamW
    lr_schedule: str = "constant"  # constant, or cosine: down to a tenth at the last transition
    warmup_transitions: int = 0  # transitions over which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's, factor of the learning rate, on weight matrices only
    clip_grad_norm: Optional[float] = None  # clip the gradient's norm (L2, over all parameters) to this [no clipping]
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: str = "auto"  # auto (bf16 on GPUs that have it, fp16 on others, fp32 on a CPU), fp32, bf16 or fp16
    train_seed: int = 42  # seed of initial weights and of the order of games
    # --- checkpoints
    checkpoints_path: Optional[str] = None  # runs are written to <checkpoints_path>/<group>/<name> [runs]
    checkpoint_every: int = 2_000  # updates between checkpoints
    keep_checkpoints: bool = False  # also keep the weights of every evaluation as <step>.pt
    resume: bool = False  # go on with the newest unfinished run of the same identity
    # --- evaluation
    eval_every: int = 10_000  # updates between evaluations; after the last one there always is one
    eval_episodes: int = 50  # games a character; 0 plays none
    eval_processes: int = 14  # game slots that play side by side
    render_processes: int = 14  # accepted for Katakomba's command lines; nothing is rendered
    eval_workers: int = 0  # processes that run the game slots; 0: as many as there are cores
    eval_max_steps: int = 1_000_000  # a game is cut after so many actions (counted and reported)
    eval_clear_state: bool = True  # clear recurrent state and previous action at each new game (Katakomba's loop never does)
    eval_precision: str = "fp32"  # matrix products when acting on a CPU: fp32, or bf16 (faster, other actions now and then)
    eval_heldout_frames: int = 65_536  # frames of held-out games scored at each evaluation
    eval_seed: int = 50  # seed of the evaluation games and of sampled actions
    eval_record: Optional[str] = None  # folder in which evaluation records its games in NLD-AA's layout [not recorded]

    def __post_init__(self) -> None:
        self.character = ",".join(self.characters)  # one spelling, for names and identity
        validate_config(self)

    @property
    def characters(self) -> List[str]:
        return [name.strip() for name in self.character.split(",") if name.strip()]


POSITIVE_FIELDS = ("log_every", "update_steps", "batch_size", "seq_len", "learning_rate", "checkpoint_every", "eval_every",
                   "eval_processes", "eval_max_steps", "clip_range", "data_workers", "render_processes")  # fmt: skip
NON_NEGATIVE_FIELDS = ("warmup_transitions", "weight_decay", "eval_episodes", "eval_workers", "eval_heldout_frames",
                       "train_seed", "eval_seed", "version")  # fmt: skip
CHOICES = {
    "data_mode": ("compressed", "memmap", "in_memory"),
    "lr_schedule": ("constant", "cosine"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "eval_precision": ("fp32", "bf16"),
}


def validate_config(config: TrainConfig) -> None:
    """Raises UserError with one line that says what to change."""
    if config.rnn_hidden_dim != 2048 or config.rnn_layers != 2:
        raise UserError("rnn_hidden_dim = 2048 and rnn_layers = 2 are the benchmark's and cannot be changed")
    for name, value in asdict(config).items():
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{name} holds a NUL character")
    if not config.characters:
        raise UserError("character is empty; give one or several, e.g. mon-hum-neu,val-hum-neu")
    for character in config.characters:
        if character not in AUTOASCEND_MEAN_SCORE:
            close = difflib.get_close_matches(character, AUTOASCEND_MEAN_SCORE, n=3)
            raise UserError(f"unknown character {character!r}; did you mean {', '.join(close) or 'mon-hum-neu'}?")
    if len(set(config.characters)) != len(config.characters):
        raise UserError(f"character names one twice: {config.character}")
    for name in POSITIVE_FIELDS:
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be above 0, not {getattr(config, name)}")
    for name in NON_NEGATIVE_FIELDS:
        if not getattr(config, name) >= 0:
            raise UserError(f"{name} must not be negative, but is {getattr(config, name)}")
    for name in ("train_seed", "eval_seed"):
        if getattr(config, name) >= 2**63:
            raise UserError(f"{name} must be below 2^63, not {getattr(config, name)}")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")
    for name in ("gamma", "tau", "rnn_dropout"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise UserError(f"{name} must lie between 0 and 1, not {getattr(config, name)}")
    if not 0.0 <= config.heldout_share < 1.0:
        raise UserError(f"heldout_share must be at least 0 and below 1, not {config.heldout_share}")
    if config.clip_grad_norm is not None and not config.clip_grad_norm > 0:
        raise UserError(f"clip_grad_norm must be above 0 or null, not {config.clip_grad_norm}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, not {config.device!r}")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which rejects a key given twice instead of silently taking the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, RecursionError) as error:  # PyYAML lets these through
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def config_types() -> Dict[str, Any]:
    return {item.name: item.type for item in dataclasses.fields(TrainConfig)}


def exact_number(value: Any, kind: Any) -> Any:
    """1e6 or '1e6' as an int or a float; ValueError for 2.7 as an int, for nan and for inf."""
    number = float(value)
    if not math.isfinite(number) or kind(number) != number:
        raise ValueError(value)
    return kind(number)


def coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` (from YAML or the command line) as `kind`; strict, since a value misread in silence spoils a run."""
    optional = type(None) in getattr(kind, "__args__", ())
    if optional:
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "~", "")):
            return None
        kind = next(arg for arg in kind.__args__ if arg is not type(None))
    problem = UserError(f"{name}: {value!r} is not a valid {getattr(kind, '__name__', 'value')}")
    if kind is str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise UserError(f"{name}: {value!r} is not text; put it in quotes")
        return value
    if kind is bool:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in known:
            raise UserError(f"{name}: {value!r} is neither true nor false")
        return known[str(value).lower()]
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise problem
        try:
            if kind is int and re.fullmatch(r"\s*[+-]?\d+\s*", str(value)):
                return int(value)  # exact beyond what a float holds
            return exact_number(value, kind)
        except (ValueError, OverflowError):
            raise problem from None
    mapping = parse_yaml(value, name) if isinstance(value, str) else value
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise UserError(f"{name} takes a mapping such as '{{burn_in: 8}}', not {value!r}")
    return mapping


def check_known(key: str, where: str) -> None:
    if key not in config_types():
        close = difflib.get_close_matches(str(key), config_types(), n=1)
        raise UserError(f"{where}: unknown setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def read_config_file(path: str) -> Dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL
        raise UserError(f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}") from None
    values = parse_yaml(text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config file must hold lines such as 'batch_size: 64'")
    for key in values:
        check_known(key, path)
    return values


def split_arguments(argv: Sequence[str]) -> Tuple[Optional[str], Dict[str, str]]:
    """['--config', 'x.yaml', '--seed=1', ...] -> (config file or None, {name: text})."""
    config_file, values, position = None, {}, 0
    while position < len(argv):
        token = argv[position]
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}; settings are given as --name value")
        name, equals, text = token[2:].partition("=")
        position += 1
        if not equals:
            if position >= len(argv):
                raise UserError(f"--{name} needs a value")
            text = argv[position]
            position += 1
        if name in ("config", "config_path"):
            config_file = text
        else:
            check_known(name, "command line")
            values[name] = text
    return config_file, values


def help_parser() -> argparse.ArgumentParser:
    """--help: every field with the comment behind it ([in brackets]: what None means), under the headings between them."""
    parser = argparse.ArgumentParser(description=__doc__.split("Axes:")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python custom_nethack_pomdp.py [--config FILE] [--name value ...]")  # fmt: skip
    group = parser.add_argument_group("settings, also as 'name: value' lines of a file")
    group.add_argument("--config", metavar="FILE", help="YAML file with settings; the command line beats it")
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
    for line in inspect.getsource(TrainConfig).splitlines():
        heading, setting = re.match(r"    # --- (.*)", line), re.match(r"    (\w+): (.*?) = .*?  # (.*)", line)
        if heading:
            group = parser.add_argument_group(heading.group(1))
        elif setting:
            name, kind, meaning = setting.groups()
            meaning, _, absent = meaning.rstrip("]").partition(" [")
            kind = {"bool": "true|false", "Dict[str, Any]": "YAML"}.get(kind, re.sub(r"Optional\[(.*)\]", r"\1", kind))
            default = "{}" if name == "algorithm" else absent or (str(defaults[name]).lower() if kind == "true|false" else defaults[name])
            group.add_argument(f"--{name}", metavar=kind, help=f"{meaning} (default: {default})".replace("%", "%%"))
    return parser


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Command line over config file over defaults; `algorithm` is merged key by key. Raises UserError."""
    if "-h" in argv or "--help" in argv:
        help_parser().print_help()
        sys.exit(0)
    config_file, arguments = split_arguments(argv)
    from_file = read_config_file(config_file) if config_file is not None else {}
    values = {}
    for name, kind in config_types().items():
        layers = [coerce(name, layer[name], kind) for layer in (from_file, arguments) if name in layer]
        if layers:
            values[name] = {**layers[0], **layers[-1]} if name == "algorithm" else layers[-1]
    return pyrallis.decode(TrainConfig, values)


# ======================================================================================================================
# FIXED: utilities (seeds, timers, logging)
# ======================================================================================================================
def seed_everything(seed: int) -> None:
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


def keep_freed_memory() -> None:
    """Lets freed tensors stay with the process. By default glibc gives each large one back to the system, which clears the
    same memory anew at every update: on a CPU that took more time than the update itself."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def sha256_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """`write(file)` to a temporary file, synced, then renamed: `path` holds the old content or the new, never a part.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the system's error
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; make room, and --resume true goes on from the last checkpoint") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path: Path) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Timers:
    """Seconds spent in named parts of the loop since the last `take`."""

    def __init__(self) -> None:
        self.seconds: Dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> Dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


def say(text: str) -> None:
    """One line on standard output, above a progress bar if there is one. Of several processes the first alone speaks."""
    if RANK == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    tqdm.write("warning: " + (f"process {RANK}: " if RANK else "") + text, file=sys.stderr)


def progress(**options: Any) -> Any:
    """A progress bar on a terminal; of several processes the first alone shows one."""
    return tqdm(disable=True if RANK else None, dynamic_ncols=True, **options)


def has_wandb_key() -> bool:
    """Whether wandb would find a key: in WANDB_API_KEY or, as `wandb login` leaves it, in ~/.netrc."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    return False


# What wandb shows along which x axis: our own ones, so that a resumed run lies where it belongs. Patterns must not overlap.
ALONG_STEP = ("loss", "train/*", "times/*", "charts/*")
ALONG_TRANSITIONS = ("eval/*", "heldout/*", "normalized_score*", "reward_*", "depth_*", "turns_*", "length_*", "games_*", "end_*")


def start_wandb(config: TrainConfig, run_dir: Path, run_id: Optional[str]) -> Any:
    """A wandb run, or None. WANDB_MODE decides where it is set; otherwise online with a key and offline without."""
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        say("wandb is not installed: metrics go to metrics.jsonl only")
        return None
    settings: Dict[str, Any] = dict(project=config.project, group=f"{config.group}-v{config.version}", name=run_dir.name,
                                    dir=str(run_dir), config=asdict(config), id=run_id, resume="allow")  # fmt: skip
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds; nobody waits longer for a training to begin
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve() / "wandb"))  # where tables wait for `wandb sync`: with their run
    if not mode and not has_wandb_key():
        say("wandb has no key: the run is logged offline, `wandb sync` uploads it later")
        settings["mode"] = "offline"
    try:
        run = wandb.init(**settings)
    except Exception as error:  # wandb's own errors have no common base over its versions; a run must not die of them
        warn(f"wandb could not start ({' '.join(str(error).split())}); the run is logged offline")
        run = wandb.init(**{**settings, "mode": "offline"})
    characters = [f"{character}/*" for character in config.characters]
    for name, axis in (("step", None), ("transitions", None), *((name, "step") for name in ALONG_STEP),
                       *((name, "transitions") for name in (*ALONG_TRANSITIONS, *characters))):  # fmt: skip
        run.define_metric(name, step_metric=axis)
    return run


class RunLogger:
    """Every row goes to metrics.jsonl, to wandb if there is a run, and in short to standard output."""

    def __init__(self, path: Path, wandb_run: Any = None) -> None:
        self.path, self.file, self.wandb_run = path, open(path, "a", encoding="utf-8"), wandb_run
        self.count = path.read_bytes().count(b"\n")  # rows so far: wandb's own step, which must go on where a resumed run stopped

    def log(self, row: Dict[str, float], step: int, transitions: int, media: Callable[[Any], Dict[str, Any]] = lambda wandb: {}) -> None:
        """`media(wandb)`: what wandb alone is to show beside the row."""
        row = {"step": step, "transitions": transitions, **row}
        clean = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON knows no NaN
        try:
            self.file.write(json.dumps(clean) + "\n")
            self.file.flush()
            if self.wandb_run is not None:
                import wandb

                self.wandb_run.log({**row, **media(wandb)}, step=max(self.count, self.wandb_run.step), commit=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room, and --resume true goes on") from None
        self.count += 1

    def evaluation_media(self, wandb: Any, games: List[Dict[str, Any]]) -> Dict[str, Any]:
        """The table of the games just played, and one chart of all evaluations' scores with AutoAscend's line, of resumed parts too."""
        rows = [row for row in map(json.loads, self.path.read_text(encoding="utf-8").splitlines()) if "eval/autoascend" in row]
        names = [name for name in rows[-1] if name.startswith("eval/")]
        chart = wandb.plot.line_series([row["transitions"] for row in rows], [[row.get(name) for row in rows] for name in names],
                                       keys=names, title="normalized score (AutoAscend: 1)", xname="transitions")  # fmt: skip
        table = wandb.Table(columns=list(games[0]), data=[list(game.values()) for game in games])
        return {"eval/games": table, "eval/scores": chart}

    def keep_game(self, recording: str, name: str) -> None:
        """Copies a recorded game to the files of wandb's run: a copy, so that an offline run holds all that it uploads later."""
        if self.wandb_run is not None:
            folder = Path(self.wandb_run.dir) / "games"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recording, folder / name)
            (folder / "README.txt").write_text("To watch a game: python scripts/watch.py --game FILE\n", encoding="utf-8")
            for file in ("README.txt", name):
                self.wandb_run.save(str(folder / file), base_path=self.wandb_run.dir, policy="now")

    @staticmethod
    def line(tag: str, values: Dict[str, float]) -> None:
        """The lines that readers of standard output look for: `TRAIN_METRICS step=... name=value ...`."""
        say(tag + " " + " ".join(f"{key}={value if isinstance(value, int) else format(value, '.6g')}" for key, value in values.items()))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a row that found no room was reported
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


# ======================================================================================================================
# FIXED: data. Status lines -> games -> chunk store -> batches
# ======================================================================================================================
# --- status lines: what the terminal's last two rows say, in the places of NLE's blstats
STRENGTH = re.compile(rb" St:(\d+)(?:/(\d\d|\*\*))? Dx:(\d+) Co:(\d+) In:(\d+) Wi:(\d+) Ch:(\d+)\s+(Lawful|Neutral|Chaotic)?")
VITALS = re.compile(  # depth | level of the quest | place; gold, HP, maximum, Pw, maximum, AC, level, points | HD, turn, words
    rb"^(?:Dl(?:vl)?:(-?\d+)|Home (\d+)|(Fort Ludios|Earth|Air|Fire|Water|Astral Plane))\s+"
    rb"\S:(\d+) HP:(-?\d+)\((\d+)\) Pw:(-?\d+)\((\d+)\) AC:(-?\d+)\s+(?:Xp:(\d+)(?:/(\d+))?|HD:(\d+))(?: T:(\d+))?(.*)$"
)
BLSTATS_RECORD, TURN, ONE = struct.Struct(f"{NUM_BLSTATS}i"), slice(80, 84), (1).to_bytes(4, sys.byteorder)  # place 20
ALIGNMENT = {b"Lawful": 1, b"Neutral": 0, b"Chaotic": -1, None: 0}
PLANES = {b"Earth": -1, b"Air": -2, b"Fire": -3, b"Water": -4, b"Astral Plane": -5}  # their depth in NetHack
STATUS_WORDS: Dict[bytes, Tuple[int, int]] = {}  # word -> (place in blstats, value or bit)
for _value, _word in enumerate(["Satiated", "", "Hungry", "Weak", "Fainting", "Fainted", "Starved"]):
    STATUS_WORDS[_word.encode()] = (21, _value)
for _value, _words in enumerate(["Burdened Burden Brd", "Stressed Stress Strs", "Strained Strain Strn",
                                 "Overtaxed Overtax Ovtx", "Overloaded Overload Ovld"], start=1):  # fmt: skip
    STATUS_WORDS.update({_word.encode(): (22, _value) for _word in _words.split()})
for _value, _words in enumerate(["Stone Ston Sto", "Slime Slim Slm", "Strngl Stngl Str", "FoodPois Fpois Poi", "TermIll Ill",
                                 "Blind Blnd Bl", "Deaf Def Df", "Stun St", "Conf Cnf Cf", "Hallu Hal Hl", "Lev Lv", "Fly Fl",
                                 "Ride Rid Rd"]):  # fmt: skip
    STATUS_WORDS.update({_word.encode(): (25, 1 << _value) for _word in _words.split()})


def parse_upper_status(row: bytes) -> Dict[int, int]:
    """Terminal row 22 -> {place in blstats: value}; empty when a menu hides the row."""
    found = STRENGTH.search(row)
    if not found:
        return {}
    base, extra, *others = found.groups()
    # 18/xx counts on from 18, 18/** is 118, and 19 to 25 lie above that, at 119 to 125 (NetHack's STR18 and STR19)
    strength = int(base) + (100 if extra == b"**" else int(extra or 0)) + (100 if int(base) > 18 else 0)
    compact = strength if strength <= 18 else 19 + strength // 50 if strength <= 121 else min(strength, 125) - 100
    abilities = [compact, strength] + [int(value) for value in others[:5]]
    return {**dict(zip(range(2, 9), abilities)), 26: ALIGNMENT[others[5]]}


def parse_lower_status(row: bytes) -> Dict[int, int]:
    """Terminal row 23 -> {place in blstats: value}; empty when a menu hides the row."""
    found = VITALS.match(row)
    if not found:
        return {}
    depth, home, place, *numbers, words = found.groups(b"0")
    stats = dict(zip((13, 10, 11, 14, 15, 16, 18, 19, 17, 20), map(int, numbers)))
    stats[12] = PLANES.get(place, int(depth))
    stats[24] = int(home)
    stats[21] = 1  # not hungry, unless a word says otherwise
    for word in words.split():
        if word in STATUS_WORDS:
            number, value = STATUS_WORDS[word]
            stats[number] = stats.get(number, 0) | value if number == 25 else value
    return stats


class StatusReader:
    """Reads blstats off terminals. Rows repeat from frame to frame, so each different one is parsed once."""

    MEMORY = 16_384  # rows remembered of each kind

    def __init__(self) -> None:
        self.known: List[Dict[bytes, bytes]] = [{}, {}]  # upper and lower rows -> what they say, NUM_BLSTATS int32

    def _parse(self, kind: int, row: bytes) -> bytes:
        stats = [0] * NUM_BLSTATS
        for place, value in (parse_lower_status if kind else parse_upper_status)(row).items():
            stats[place] = value if -(2**31) <= value < 2**31 else max(-(2**31), min(value, 2**31 - 1))
        said = self.known[kind][row] = BLSTATS_RECORD.pack(*stats)
        return said

    def _learn(self, kind: int, row: bytes) -> bytes:
        """Most new rows differ from a known one in the turn alone: the row of turn 1 is parsed, the turn then put in."""
        head, _, tail = row.partition(b" T:")
        turn, space, words = tail.partition(b" ")
        if not (kind and space and turn.isdigit() and len(turn) < 10):
            return self._parse(kind, row)
        first = head + b" T:1 " + words
        said = self.known[1].get(first) or self._parse(1, first)
        if said[TURN] == ONE:
            said = said[: TURN.start] + int(turn).to_bytes(4, sys.byteorder) + said[TURN.stop :]
        self.known[1][row] = said
        return said

    def __call__(self, chars: np.ndarray) -> np.ndarray:
        """chars [n, 24, 80] uint8 -> [n, 27] int32, all zeros where a menu hides the status lines.

        Places as in NLE (blstats.h); what the screen does not show (position 0/1, score 9, dungeon 23) stays 0.
        """
        said: List[List[bytes]] = [[], []]
        text = chars[:, 22:].tobytes()
        for kind, known in enumerate(self.known):
            if len(known) + 2 * len(chars) > self.MEMORY:
                known.clear()
            for start in range(kind * COLS, len(text), 2 * COLS):
                row = text[start : start + COLS]
                said[kind].append(known.get(row) or self._learn(kind, row))
        upper, lower = (np.frombuffer(b"".join(records), dtype=np.int32) for records in said)
        return (upper + lower).reshape(-1, NUM_BLSTATS)  # the two kinds fill different places


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
    """Consecutive frames of one game. Frame t is what the player saw before action t, score t the score by then."""

    chars: np.ndarray  # [n, 24, 80] uint8
    colors: np.ndarray  # [n, 24, 80] int8
    cursor: np.ndarray  # [n, 2] uint8
    actions: np.ndarray  # [n] uint8, UNKNOWN_KEY where the key is no action
    spaces: np.ndarray  # [n] bool, the key was SPACE
    scores: np.ndarray  # [n] int32

    def cut(self, start: int, stop: int) -> "Frames":
        return Frames(*(array[start:stop] for array in self))


PIECE = 1024  # frames decoded at a time; the end of a game (some 15 frames) must fit into one


def check_last_block(stream: bytes) -> None:
    """Compares a bzip2 stream's last block with its checksum. Raises OSError, ValueError or EOFError.

    NLE's converter hands a block out before it comes to its checksum, and just ends if that is wrong. Damage further up
    thus shows as a recording without an end, but in the last block it would go unseen. Unpacking the whole stream to find
    out would cost a fifth of a game's reading.
    """
    bit = -1
    for shift in range(8):  # blocks begin at any bit with the same 48
        pattern = (0x314159265359 << (8 - shift)).to_bytes(7, "big")[1:6]
        bit = max(bit, 8 * (stream.rfind(pattern) - 1) + shift)
    tail = stream[max(bit, 0) // 8 :]
    block = (int.from_bytes(tail, "big") << (bit % 8)).to_bytes(len(tail) + 1, "big")[1:]
    try:
        bz2.BZ2Decompressor().decompress(stream[:4] + block[:-5])  # without the checksum of the whole, which ends the stream
    except OSError:
        bz2.decompress(stream)  # the 48 bits may stand elsewhere by chance


def read_ttyrec(path: str) -> Iterator[Frames]:
    """Pieces of at most PIECE frames of a ttyrec3.bz2 file, through nle.dataset's converter. Raises GameError."""
    decoder = ttyrec_converter.Converter(ROWS, COLS, 3)
    try:
        check_last_block(Path(path).read_bytes())
        decoder.load_ttyrec(path, gameid=1, part=0)
        remaining = 0
        while remaining == 0:
            chars, colors = np.empty((PIECE, ROWS, COLS), np.uint8), np.empty((PIECE, ROWS, COLS), np.int8)
            cursor, times = np.empty((PIECE, 2), np.int16), np.empty(PIECE, np.int64)
            keys, scores = np.empty(PIECE, np.uint8), np.empty(PIECE, np.int32)
            remaining = decoder.convert(chars, colors, cursor, times, keys, scores)
            frames = Frames(chars, colors, cursor.astype(np.uint8), KEY_TO_ACTION[keys], keys == SPACE, scores)
            yield frames.cut(0, PIECE - remaining)
    except (RuntimeError, ValueError, OSError, EOFError, IndexError) as error:
        raise GameError(" ".join(str(error).split()) or type(error).__name__) from None


def hdf5_member(group: Any, name: str) -> Any:
    """The group's member, as long as it lies in this very file. Raises GameError for links and for data kept in other files."""
    import h5py

    member = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
    if member is None or (isinstance(member, h5py.Dataset) and (member.external or member.is_virtual)):
        raise GameError(f"{name!r} is missing, or a link to somewhere else")
    return member


def read_hdf5(path: str, key: str) -> Iterator[Frames]:
    """Pieces of at most PIECE frames of one game of a Katakomba HDF5 file. Raises GameError."""
    import h5py

    space_action = KEY_TO_ACTION[SPACE]
    try:
        with h5py.File(path, "r") as file:
            group, score = hdf5_member(file, key), 0
            shapes = {"tty_chars": (ROWS, COLS), "tty_colors": (ROWS, COLS), "tty_cursor": (2,), "rewards": (), "actions": ()}
            game = {name: hdf5_member(group, name) for name in shapes}
            length = len(game["actions"])
            if any(game[name].shape != (length, *shape) for name, shape in shapes.items()):
                raise GameError("its arrays have not the shapes of Katakomba's")
            for start in range(0, length, PIECE):
                part = slice(start, min(start + PIECE, length))
                actions, rewards = game["actions"][part].astype(np.int64), game["rewards"][part].astype(np.int64)
                actions = np.where((actions >= 0) & (actions < NUM_ACTIONS), actions, UNKNOWN_KEY).astype(np.uint8)
                scores = score + np.concatenate([[0], np.cumsum(rewards)])  # they keep score differences, we keep scores
                score = int(scores[-1])
                yield Frames(game["tty_chars"][part].astype(np.uint8), game["tty_colors"][part].astype(np.int8),
                             game["tty_cursor"][part].astype(np.uint8), actions, actions == space_action,
                             scores[:-1].astype(np.int32))  # fmt: skip
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise GameError(" ".join(str(error).split()) or type(error).__name__) from None


def find_first_frame(frames: Frames) -> int:
    """Index of the player's first frame: NLE itself answers start-up screens with SPACE, and they are recorded too."""
    index = 0
    while index < len(frames.chars) and frames.spaces[index]:
        text = frames.chars[index].tobytes()
        greeting = b"welcome to NetHack!" in text and b"--More--" in text
        if VITALS.match(text[-COLS:]) and not greeting:
            break
        index += 1
    return index


MENU_PAGE = re.compile(rb"\((?:end|\d+ of \d+)\) *")
DEATH_MESSAGE = re.compile(rb"You (?:die|drown|suffocate|burn|turn to|are turned|dissolve|choke|escaped|ascend)")


def find_end_of_play(frames: Frames) -> Optional[int]:
    """Index of the first frame after the game was over, or None if the recording shows no end.

    From the end of a game on, NLE itself presses SPACE: on the message of death, on the inventory (pages of a menu), on
    "NAME the ROLE's attributes:" and on what follows up to the tombstone. The frames before are the player's.
    """
    others = np.flatnonzero(~frames.spaces)
    first_space = int(others[-1]) + 1 if len(others) else 0
    texts = {index: frames.chars[index].tobytes() for index in range(max(first_space, len(frames.chars) - 64), len(frames.chars))}
    pages = [index for index, text in texts.items() if b"'s attributes:" in text]
    if not pages:
        return None
    first = pages[-1]
    while first - 1 in texts and MENU_PAGE.search(texts[first - 1]):
        first -= 1
    if first - 1 in texts and b"--More--" in texts[first - 1]:  # shown after the game was over, whatever it says
        first -= 1
        while first - 1 in texts and b"--More--" in texts[first - 1] and DEATH_MESSAGE.search(texts[first - 1]):
            first -= 1
    return first


def frames_of_play(pieces: Iterator[Frames]) -> Iterator[Frames]:
    """Drops what NLE played before the player's first frame and after the last. Raises GameError if no end is found."""
    held: Optional[Frames] = None  # the newest frames wait, since the end shows only once the file has ended
    for piece in pieces:
        if held is None:
            held = piece.cut(find_first_frame(piece), len(piece.chars))
            continue
        if len(piece.chars) >= 64:
            yield held
            held = piece
        else:
            held = Frames(*(np.concatenate(pair) for pair in zip(held, piece)))
    end = find_end_of_play(held) if held is not None and len(held.chars) else None
    if held is None or end is None:
        raise GameError("the recording breaks off before the end of the game")
    yield held.cut(0, end)


# --- encoding
BLOCK = 64  # frames compressed together: more make the store smaller, but a row decodes a block to read one chunk
ZSTD_LEVEL = 3  # on AutoAscend's games smaller than level 1 and as fast to write; level 6 takes three times as long
BLOCK_HEADER = struct.Struct("<IBBH")  # crc of all that follows it, previous action, frames, unused
FRAME_BYTES = 2 * CELLS + 4 * NUM_BLSTATS + 2 + 1  # characters, colours, blstats, cursor, action


class EncodedGame(NamedTuple):
    name: str
    frames: int
    blocks: List[bytes]  # header and compressed frames
    reward_frames: np.ndarray  # [k] int64, frames whose reward is not 0
    reward_values: np.ndarray  # [k] int32
    unknown_keys: int  # frames whose key is no action
    max_depth: int
    turns: int


class GameEncoder:
    """Compresses the frames of one game into blocks of BLOCK frames."""

    def __init__(self) -> None:
        import zstandard

        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self.read_status = StatusReader()

    def block(self, frames: Frames, blstats: np.ndarray, previous: int) -> bytes:
        planes = (frames.chars, frames.colors, np.ascontiguousarray(blstats.T), frames.cursor, frames.actions)
        body = self.compressor.compress(b"".join(plane.tobytes() for plane in planes))
        sealed = bytes([previous, len(frames.chars), 0, 0]) + body
        return zlib.crc32(sealed).to_bytes(4, "little") + sealed

    def encode(self, name: str, pieces: Iterator[Frames]) -> EncodedGame:
        blocks, actions, scores, max_depth, turns = [], [], [], 0, 0
        rest: Optional[Frames] = None
        previous = NO_ACTION

        def flush(frames: Frames) -> None:
            nonlocal previous, max_depth, turns
            blstats = self.read_status(frames.chars)
            max_depth, turns = max(max_depth, int(blstats[:, 12].max())), max(turns, int(blstats[:, 20].max()))
            for start in range(0, len(frames.chars), BLOCK):
                part = frames.cut(start, start + BLOCK)
                blocks.append(self.block(part, blstats[start : start + BLOCK], previous))
                previous = int(part.actions[-1]) if part.actions[-1] != UNKNOWN_KEY else NO_ACTION

        for piece in pieces:
            actions.append(piece.actions)
            scores.append(piece.scores)
            rest = piece if rest is None else Frames(*(np.concatenate(pair) for pair in zip(rest, piece)))
            whole = len(rest.chars) // BLOCK * BLOCK
            if whole:
                flush(rest.cut(0, whole))
                rest = rest.cut(whole, len(rest.chars))
        if rest is not None and len(rest.chars):
            flush(rest)
        total = np.concatenate(scores) if scores else np.zeros(0, np.int32)
        if not len(total):
            raise GameError("it holds no frame of play")
        rewards = np.append(np.diff(total), 0)  # NLE pays nothing for the step that ends a game
        paid = np.flatnonzero(rewards)
        unknown = int((np.concatenate(actions) == UNKNOWN_KEY).sum())
        return EncodedGame(name, len(total), blocks, paid, rewards[paid].astype(np.int32),
                           unknown, max_depth, turns)  # fmt: skip


def encode_game(source: GameSource) -> Any:
    """EncodedGame, or the reason (str) why the game cannot be read. Runs in worker processes."""
    pieces = read_hdf5(source.path, source.key) if source.key else read_ttyrec(source.path)
    try:
        return GameEncoder().encode(source.name, frames_of_play(pieces))
    except GameError as error:
        return str(error)


# --- finding games
def character_of(xlog: Dict[str, str]) -> str:
    """{'role': 'Mon', 'race': 'Hum', 'align0': 'Neu', ...} -> 'mon-hum-neu': as the game began."""
    return "-".join(xlog.get(name, "?").lower() for name in ("role", "race", "align0"))


def parse_xlogfile(path: Path) -> List[Dict[str, str]]:
    """Tab-separated key=value pairs, a line a finished game; what is not of that form is left out."""
    games = []
    for line in path.read_bytes().decode("latin-1").splitlines():
        games.append(dict(pair.split("=", 1) for pair in line.split("\t") if "=" in pair))
    return games


class FoundGames(NamedTuple):
    games: List[GameSource]
    problems: List[str]  # what was passed over, and why
    others: List[str]  # other characters seen


def walk_xlogfiles(root: Path, problems: List[str]) -> Iterator[Tuple[Path, List[str], List[Tuple[Path, Dict[str, str]]]]]:
    """Each folder at or below `root` with the names of its files and its xlogfiles' lines; those that cannot be read are problems."""
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        lines = []
        for path in sorted(Path(folder, name) for name in files if name.endswith(".xlogfile")):
            try:
                lines += [(path, xlog) for xlog in parse_xlogfile(path)]
            except OSError as error:  # noqa: PERF203  there are few of them
                problems.append(f"{path}: {error.strerror}")
        yield Path(folder), files, lines


def label_of(folder: Path, name: str) -> str:
    """A game's name: the same wherever the data lies."""
    return f"{folder.resolve().name}/{name}"


def find_nld_games(root: Path, character: str) -> FoundGames:
    """Games of the character below an NLD-AA folder: those with a line in their folder's xlogfile."""
    games: List[GameSource] = []
    problems: List[str] = []
    others = set()
    for folder, files, lines in walk_xlogfiles(root, problems):
        for xlogfile, xlog in lines:
            name = xlog.get("ttyrecname", "")
            if character_of(xlog) != character:
                others.add(character_of(xlog))
            elif name != os.path.basename(name) or not name.endswith(".ttyrec3.bz2"):
                problems.append(f"{xlogfile}: its line names no ttyrec3.bz2 file beside it")
            elif name not in files or not (folder / name).exists():  # a link may lead nowhere
                problems.append(f"{folder / name}: named by the xlogfile, but missing")
            else:
                stat = (folder / name).stat()
                games.append(GameSource(label_of(folder, name), str(folder / name), "", stat.st_size, stat.st_mtime_ns))
    return FoundGames(sorted(set(games)), problems, sorted(others))


def find_hdf5_games(path: Path) -> FoundGames:
    """Games of a Katakomba HDF5 file (one group a game)."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            # A link is passed on as well: read_hdf5 skips it by name.
            keys = [key for key in file if not isinstance(file.get(key, getlink=True), h5py.HardLink) or "actions" in file[key]]
    except (OSError, RuntimeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a readable HDF5 file ({' '.join(str(error).split())})") from None
    stat = path.stat()
    return FoundGames([GameSource(f"{path.name}/{key}", str(path), key, stat.st_size, stat.st_mtime_ns) for key in keys], [], [])


def katakomba_folder() -> Path:
    return Path(os.environ.get("KATAKOMBA_DATA_DIR", "~/.katakomba/datasets")).expanduser()


WAYS_TO_DATA = (
    "Three ways to get some: (1) NLD-AA, https://github.com/facebookresearch/nle#readme: --data_path NLD_AA/nle_data; "
    "(2) Katakomba's data-<role>-<race>-<align>-any.hdf5 files in $KATAKOMBA_DATA_DIR or --data_path FILE; "
    "(3) record games of your own: python scripts/record_games.py --character {character} --games 20 --out DIR, then --data_path DIR."
)


def find_games(data_path: Optional[str], character: str) -> FoundGames:
    """Raises UserError where there is nothing to read."""
    root = Path(data_path).expanduser() if data_path else katakomba_folder()
    hdf5 = root if root.is_file() else root / f"data-{character}-any.hdf5"
    if hdf5.is_file():
        if f"data-{character}-any" not in hdf5.name:
            raise UserError(f"{hdf5} is not named data-{character}-any.hdf5: it does not hold games of {character}")
        found = find_hdf5_games(hdf5)
    elif data_path and root.is_dir():
        found = find_nld_games(root, character)
    else:
        where = f"{root} does not exist" if data_path else f"no data_path is given and {hdf5} does not exist"
        raise UserError(f"no games to learn from: {where}. {WAYS_TO_DATA.format(character=character)}")
    if not found.games:
        hint = f"; it holds games of {', '.join(found.others[:8])}" if found.others else ""
        raise UserError(f"no games of {character} in {root}{hint}. {WAYS_TO_DATA.format(character=character)}")
    return found


# --- the chunk store: index.npz, frames.bin and meta.json in one folder
STORE_FORMAT = 2


def store_fingerprint(games: List[GameSource]) -> str:
    """Changes whenever a game was added, removed or rewritten, or the format of the store changed."""
    digest = hashlib.sha256(f"format {STORE_FORMAT} block {BLOCK} level {ZSTD_LEVEL}".encode())
    for game in games:
        digest.update(repr((game.name, game.key, game.size, game.mtime_ns)).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def exclusive(lock_path: Path, what: str) -> Iterator[None]:
    """Holds a lock on `lock_path`; the system frees it however the holder ends."""
    with open(lock_path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"waiting for another run that {what}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def encode_all(games: List[GameSource], workers: int) -> Iterator[Any]:
    """encode_game of each, in order, on worker processes; a game whose reader crashes is a reason like any other."""
    if workers <= 1:
        yield from map(encode_game, games)
        return
    context = multiprocessing.get_context("spawn")
    waiting = list(games)
    while waiting:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=keep_freed_memory) as pool:
            futures = [pool.submit(encode_game, game) for game in waiting]
            done = 0
            try:
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenExecutor:
                # One of the games under way killed its worker: play them one by one to find out which.
                for game in waiting[done : done + workers]:
                    with ProcessPoolExecutor(1, mp_context=context) as single:
                        try:
                            yield single.submit(encode_game, game).result()
                        except BrokenExecutor:
                            yield "its reader crashed"
                        done += 1
            waiting = waiting[done:]


def build_store(store: Path, found: FoundGames, character: str, workers: int) -> None:
    """Writes a store into a temporary folder and renames it to `store`."""
    temporary = store.with_name(f".{store.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a build that was killed; the lock says nobody uses it
    temporary.mkdir(parents=True)
    kept: List[EncodedGame] = []
    offsets, skipped = [0], []
    begin = time.perf_counter()
    with open(temporary / "frames.bin", "wb") as file:
        bar = progress(total=len(found.games), desc=f"building the store of {character}", unit="game")
        for source, game in zip(found.games, encode_all(found.games, workers)):
            bar.update()
            if isinstance(game, str):
                skipped.append(f"{source.path}{':' + source.key if source.key else ''}: {game}")
                warn(f"skipped {skipped[-1]}")
                continue
            for block in game.blocks:
                file.write(block)
                offsets.append(offsets[-1] + len(block))
            kept.append(game._replace(blocks=[b""] * len(game.blocks)))
        bar.close()
        file.flush()
        os.fsync(file.fileno())
    if not kept:
        shutil.rmtree(temporary)
        raise UserError(f"none of the {len(found.games)} games of {character} can be read; the first: {skipped[0]}")
    index = {
        "names": np.array([game.name for game in kept]),
        "frames": np.array([game.frames for game in kept], dtype=np.int64),
        "block_offsets": np.array(offsets, dtype=np.int64),
        "reward_offsets": np.cumsum([0] + [len(game.reward_frames) for game in kept]).astype(np.int64),
        "reward_frames": np.concatenate([game.reward_frames for game in kept]).astype(np.int64),
        "reward_values": np.concatenate([game.reward_values for game in kept]).astype(np.int32),
        "max_depths": np.array([game.max_depth for game in kept], dtype=np.int32),
        "turns": np.array([game.turns for game in kept], dtype=np.int64),
    }
    with open(temporary / "index.npz", "wb") as file:
        np.savez(file, **index)
    meta = {
        "format": STORE_FORMAT, "fingerprint": store_fingerprint(found.games), "character": character,
        "games": len(kept), "frames": int(index["frames"].sum()), "bytes": offsets[-1],
        "index_sha256": sha256_of_file(temporary / "index.npz"), "skipped": skipped, "passed_over": found.problems,
        "unknown_keys": sum(game.unknown_keys for game in kept), "build_seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    shutil.rmtree(store, ignore_errors=True)
    os.replace(temporary, store)


def report_store(meta: Dict[str, Any]) -> None:
    if RANK:  # the first process reports the same
        return
    frames = max(meta["frames"], 1)
    say(f"data: {meta['character']}: {meta['games']} games, {meta['frames']:,} frames, {meta['bytes'] / frames:.0f} bytes a frame")
    if meta["skipped"] or meta["passed_over"]:
        warn(f"{meta['character']}: {len(meta['skipped'])} unreadable games skipped, {len(meta['passed_over'])} lines "
             f"without a game passed over")  # fmt: skip
    if meta["unknown_keys"]:
        warn(f"{meta['character']}: {meta['unknown_keys']} keypresses are no action; their frames carry no loss")


def open_or_build_store(data_path: Optional[str], store_path: str, character: str) -> "ChunkStore":
    """The store of the character's games: the given one, the one built before if its games did not change, or a new one."""
    given = Path(data_path).expanduser() if data_path else None
    for folder in (given, given / character) if given else ():
        if (folder / "meta.json").is_file() and (folder / "index.npz").is_file():
            store = ChunkStore(folder)
            if store.meta.get("character") != character:
                raise UserError(f"{folder} is a store of {store.meta.get('character')}, not of {character}")
            report_store(store.meta)
            return store
    found = find_games(data_path, character)
    root = str(given.resolve()) if given else str(katakomba_folder())
    folder = Path(store_path).expanduser() / hashlib.sha256(root.encode()).hexdigest()[:12] / character
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f".{character}.lock"), f"builds the store of {character}"):
            if read_json(folder / "meta.json").get("fingerprint") != store_fingerprint(found.games):
                # Starting a worker costs seconds: small sets are read right here.
                size = sum({game.path: game.size for game in found.games}.values())  # an HDF5 file holds many games
                build_store(folder, found, character, workers=min(usable_cores(), len(found.games), size // 4_000_000))
    except OSError as error:
        raise UserError(f"cannot write the chunk store in {store_path}: {error.strerror or error}; "
                        "give a writable folder with --store_path") from None  # fmt: skip
    store = ChunkStore(folder)
    report_store(store.meta)
    return store


class Block(NamedTuple):
    """At most BLOCK decoded frames of a game."""

    chars: np.ndarray  # [n, 24, 80] uint8
    colors: np.ndarray  # [n, 24, 80] int8
    blstats: np.ndarray  # [n, 27] int32
    cursor: np.ndarray  # [n, 2] uint8
    actions: np.ndarray  # [n] uint8
    previous: int  # the action before the block's first frame, NO_ACTION if there is none


class ChunkStore:
    """A store opened for reading. Reads are safe from several threads. Raises UserError for a damaged store."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.meta = read_json(self.folder / "meta.json")
        rebuild = "delete the folder and start again to rebuild it"
        if self.meta.get("format") != STORE_FORMAT:
            raise UserError(f"{folder} is no chunk store of format {STORE_FORMAT}; {rebuild}")
        try:
            if sha256_of_file(self.folder / "index.npz") != self.meta.get("index_sha256"):
                raise ValueError("its index was changed")
            with np.load(self.folder / "index.npz", allow_pickle=False) as arrays:
                index = {name: arrays[name] for name in arrays.files}
            self.names, self.frames = index["names"], index["frames"]
            self.max_depths, self.turns = index["max_depths"], index["turns"]
            self.block_offsets = index["block_offsets"]
            self.reward_offsets, self.reward_frames = index["reward_offsets"], index["reward_frames"]
            self.reward_values = index["reward_values"]
            self.file = open(self.folder / "frames.bin", "rb")
            if os.fstat(self.file.fileno()).st_size != self.block_offsets[-1]:
                raise ValueError("frames.bin has the wrong size")
        except (OSError, ValueError, KeyError, zlib.error) as error:
            raise UserError(f"the chunk store {folder} is damaged ({error}); {rebuild}") from None
        self.first_blocks = np.cumsum(np.concatenate([[0], -(-self.frames // BLOCK)]))
        self.local = threading.local()  # a zstandard decompressor serves one thread

    def __len__(self) -> int:
        return len(self.frames)

    def rewards(self, game: int) -> Tuple[np.ndarray, np.ndarray]:
        """Frames whose reward is not 0, and these rewards (differences of the in-game score)."""
        part = slice(self.reward_offsets[game], self.reward_offsets[game + 1])
        return self.reward_frames[part], self.reward_values[part]

    def block(self, game: int, number: int) -> Block:
        """Frames BLOCK * number ... of the game. Raises UserError if the bytes on disk were damaged."""
        if not hasattr(self.local, "decompressor"):
            import zstandard

            self.local.decompressor = zstandard.ZstdDecompressor()
        place = int(self.first_blocks[game]) + number
        begin, end = int(self.block_offsets[place]), int(self.block_offsets[place + 1])
        stored = memoryview(os.pread(self.file.fileno(), end - begin, begin))
        crc, previous, n, _ = BLOCK_HEADER.unpack_from(bytes(stored[: BLOCK_HEADER.size]).ljust(BLOCK_HEADER.size))
        if zlib.crc32(stored[4:]) != crc:
            raise UserError(f"the chunk store {self.folder} is damaged (block {place}); delete the folder and start again")
        raw = self.local.decompressor.decompress(stored[BLOCK_HEADER.size :], max_output_size=n * FRAME_BYTES)
        colors, blstats, cursor, actions = n * CELLS, 2 * n * CELLS, n * (2 * CELLS + 4 * NUM_BLSTATS), n * (FRAME_BYTES - 1)
        return Block(np.frombuffer(raw, np.uint8, n * CELLS).reshape(n, ROWS, COLS),
                     np.frombuffer(raw, np.int8, n * CELLS, colors).reshape(n, ROWS, COLS),
                     np.frombuffer(raw, np.int32, n * NUM_BLSTATS, blstats).reshape(NUM_BLSTATS, n).T,
                     np.frombuffer(raw, np.uint8, n * 2, cursor).reshape(n, 2),
                     np.frombuffer(raw, np.uint8, n, actions), previous)  # fmt: skip


def choose_heldout(names: Sequence[str], share: float) -> np.ndarray:
    """bool [G]: which of a character's games are held out, by hash of their name; at least one of two or more."""
    shares = np.array([int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names])
    chosen = shares < share
    if share > 0:
        chosen[np.argmin(shares)] = True
        chosen[np.argmax(shares)] = False  # at least one to train on; the only one, if there is one
    return chosen


class Games:
    """The games of one or several stores under one numbering."""

    def __init__(self, stores: Sequence[ChunkStore]) -> None:
        self.stores = list(stores)
        self.places = [(store, game) for store in self.stores for game in range(len(store))]
        self.frames = np.concatenate([store.frames for store in self.stores])
        self.names = [str(store.names[game]) for store, game in self.places]

    def heldout(self, share: float) -> np.ndarray:
        """bool [G]: games never trained on, chosen among each store's."""
        return np.concatenate([choose_heldout([str(name) for name in store.names], share) for store in self.stores])

    def reward_scale(self, games: Union[Sequence[int], np.ndarray], gamma: float) -> float:
        """Root mean square of the discounted return so far, R_t = gamma R_{t-1} + r_t, over all frames of the games.

        Katakomba divides rewards by a running estimate of the same quantity; knowing all games, it can be exact.
        """
        squares, frames = 0.0, 0
        for game in games:
            store, number = self.places[game]
            at, values = store.rewards(number)
            lengths = np.diff(np.append(at, store.frames[number]))  # frames until the next reward
            accumulated, last = 0.0, 0
            for begin, value, length in zip(at.tolist(), values.tolist(), lengths.tolist()):
                accumulated = accumulated * gamma ** (begin - last) + value
                decay = length if gamma == 1.0 else (1.0 - gamma ** (2 * length)) / (1.0 - gamma**2)
                squares, last = squares + accumulated**2 * decay, begin
            frames += int(store.frames[number])
        return max(math.sqrt(squares / max(frames, 1)), 0.01)  # 0.01: Katakomba's floor


# --- from the store to batches
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
        self.pass_number = -1

    def _enter_pass(self, number: int) -> None:
        if number != self.pass_number:
            games = np.arange(len(self.chunks))
            self.order = games if self.seed is None else np.random.default_rng(derived_seed(self.seed, number)).permutation(games)
            self.ends = np.cumsum(self.chunks[self.order])
            self.pass_number = number

    def locate(self, step: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step 0, 1, ... -> game [rows] (-1: padding), first frame [rows], starts [rows] bool."""
        number, offset = divmod(step, self.steps)
        self._enter_pass(number)
        edges = np.arange(self.rows + 1) * self.total // self.rows
        chunk = edges[:-1] + offset
        padding = chunk >= edges[1:]
        place = np.searchsorted(self.ends, np.minimum(chunk, self.total - 1), side="right")
        game = self.order[place]
        inside = chunk - (self.ends[place] - self.chunks[game])
        starts = (inside == 0) | (offset == 0) | padding
        return np.where(padding, -1, game), np.where(padding, 0, inside * self.seq_len), starts


class ChunkLoader:
    """Batches of the plan, read from the stores. `batch_at(step)` is a pure function; `stream` reads ahead."""

    def __init__(self, games: Games, chosen: Union[Sequence[int], np.ndarray], plan_rows: int, seq_len: int,
                 seed: Optional[int], reward_scale: float, clip_range: float, *, rows: Optional[slice] = None, threads: int = 1,
                 pin: bool = False, gamma_for_returns: Optional[float] = None) -> None:  # fmt: skip
        self.games, self.chosen = games, np.asarray(chosen, dtype=np.int64)
        self.plan = ChunkPlan(games.frames[self.chosen], plan_rows, seq_len, seed)
        self.rows = rows or slice(0, plan_rows)
        self.batch_size, self.seq_len = self.rows.stop - self.rows.start, seq_len
        self.reward_scale, self.clip_range, self.gamma_for_returns = reward_scale, clip_range, gamma_for_returns
        self.pin, self.threads = pin, threads
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.current: List[Tuple[int, int, Optional[Block]]] = [(-1, -1, None)] * self.batch_size  # game, number, block of each row
        self.returns_of: Dict[int, Tuple[np.ndarray, np.ndarray]] = {}

    def _scaled(self, rewards: np.ndarray) -> np.ndarray:
        return np.clip(rewards / self.reward_scale, -self.clip_range, self.clip_range).astype(np.float32)

    def _returns(self, game: int, frames: np.ndarray) -> np.ndarray:
        """Exact discounted return-to-go of the scaled rewards at these frames."""
        gamma = float(self.gamma_for_returns or 0.0)
        if game not in self.returns_of:
            store, number = self.games.places[game]
            at, values = store.rewards(number)
            values = self._scaled(values)
            to_go = np.zeros(len(at) + 1)
            for index in range(len(at) - 1, -1, -1):
                later = gamma ** float(at[index + 1] - at[index]) * to_go[index + 1] if index + 1 < len(at) else 0.0
                to_go[index] = values[index] + later
            self.returns_of[game] = (np.append(at, 0), to_go)
        at, to_go = self.returns_of[game]
        following = np.searchsorted(at[:-1], frames)
        return np.where(to_go[following] != 0.0, gamma ** np.maximum(at[following] - frames, 0.0), 0.0) * to_go[following]

    def _block(self, row: int, game: int, number: int) -> Block:
        """Decodes a block once for all chunks of a row that lie in it."""
        known_game, known_number, block = self.current[row]
        if block is None or known_game != game or known_number != number:
            store, index = self.games.places[game]
            block = store.block(index, number)
            self.current[row] = (game, number, block)
        return block

    def _fill_row(self, batch: Dict[str, np.ndarray], row: int, game: int, first: int) -> None:
        """Writes frames first .. first + T of the game into one row of the batch; what lies beyond its end is set to 0."""
        store, number = self.games.places[game]
        end = int(store.frames[number])
        stop, position = min(first + self.seq_len + 1, end), first
        while position < stop:
            block, inside = self._block(row, game, position // BLOCK), position % BLOCK
            count = min(stop - position, BLOCK - inside)
            here, there = slice(position - first, position - first + count), slice(inside, inside + count)
            batch["tty_chars"][row, here] = block.chars[there]
            batch["tty_colors"][row, here] = block.colors[there]
            batch["tty_cursor"][row, here] = block.cursor[there]
            batch["blstats"][row, here] = block.blstats[there]
            batch["keys"][row, here] = block.actions[there]
            if position == first:
                batch["previous"][row] = block.actions[inside - 1] if inside else block.previous
            position += count
        if stop == end:
            batch["dones"][row, stop - first - 1] = True
            for name in ("tty_chars", "tty_colors", "tty_cursor", "blstats"):
                batch[name][row, stop - first :] = 0
        at, rewards = store.rewards(number)
        low = at.searchsorted(first)
        if low < len(at) and at[low] < stop:
            high = at.searchsorted(stop)
            batch["rewards"][row, at[low:high] - first] = self._scaled(rewards[low:high])
        if self.gamma_for_returns is not None:
            batch["returns"][row, : stop - first] = self._returns(game, np.arange(first, stop))

    def batch_at(self, step: int) -> Batch:
        """The batch of step 0, 1, ... as CPU tensors, as in the module's docstring, and `prev_actions` [B, 1] int64."""
        B, steps = self.batch_size, self.seq_len + 1
        shapes: Dict[str, Tuple[Any, ...]] = {  # dtype and shape
            "tty_chars": (torch.uint8, ROWS, COLS), "tty_colors": (torch.int8, ROWS, COLS), "tty_cursor": (torch.uint8, 2),
            "blstats": (torch.int32, NUM_BLSTATS)}  # fmt: skip
        tensors = {name: torch.empty((B, steps, *shape), dtype=kind, pin_memory=self.pin) for name, (kind, *shape) in shapes.items()}
        small = {"actions": torch.int64, "rewards": torch.float32, "dones": torch.bool, "mask": torch.bool}
        if self.gamma_for_returns is not None:
            small["returns"] = torch.float32
        tensors.update({name: torch.zeros((B, steps), dtype=kind, pin_memory=self.pin) for name, kind in small.items()})
        game, first, starts = (array[self.rows] for array in self.plan.locate(step))
        tensors["starts"] = torch.from_numpy(np.ascontiguousarray(starts))
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        arrays["keys"] = np.full((B, steps), UNKNOWN_KEY, dtype=np.uint8)  # as stored: an action or UNKNOWN_KEY
        arrays["previous"] = np.full(B, NO_ACTION, dtype=np.uint8)

        def fill(rows: range) -> None:
            for row in rows:
                if game[row] >= 0:
                    self._fill_row(arrays, row, int(self.chosen[game[row]]), int(first[row]))
                else:
                    for name in shapes:
                        arrays[name][row] = 0

        if self.pool is None:
            fill(range(B))
        else:
            list(self.pool.map(fill, [range(B)[part :: self.threads] for part in range(self.threads)]))
        np.not_equal(arrays["keys"], UNKNOWN_KEY, out=arrays["mask"])
        np.multiply(arrays["keys"], arrays["mask"], out=arrays["actions"], casting="unsafe")
        previous = np.where(starts | (arrays["previous"] == UNKNOWN_KEY), NO_ACTION, arrays["previous"])
        tensors["prev_actions"] = torch.from_numpy(previous.astype(np.int64)[:, None])
        return tensors

    def stream(self, first_step: int, ahead: int = 2) -> Generator[Batch, None, None]:
        """Batches first_step, first_step + 1, ... without end, read ahead by a thread of their own."""
        ready: Queue[Any] = Queue(maxsize=ahead)
        stopped = threading.Event()

        def read() -> None:
            step = first_step
            while not stopped.is_set():
                try:
                    item: Any = self.batch_at(step)
                except BaseException as error:  # handed over and raised where the batch is taken
                    item = error
                ready.put(item)
                step += 1
                if isinstance(item, BaseException):
                    return

        reader = threading.Thread(target=read, name="chunk-loader", daemon=True)
        reader.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            while reader.is_alive():  # the reader may wait for a free place
                with contextlib.suppress(Exception):
                    ready.get_nowait()
                reader.join(timeout=0.05)


# ======================================================================================================================
# FIXED: backbone
# ======================================================================================================================
def blstats_features(blstats: torch.Tensor) -> torch.Tensor:
    """[n, 27] int -> [n, 47] float32 of about unit size. The last one flags hidden status lines (maximal HP is never 0)."""
    stats = blstats.float()
    hp, hp_max, energy, energy_max = stats[:, 10], stats[:, 11], stats[:, 14], stats[:, 15]
    hidden = hp_max == 0
    numbers = torch.stack(
        [
            *(stats[:, place] / 25.0 for place in (2, 4, 5, 6, 7, 8)),
            stats[:, 3] / 125.0,
            torch.log1p(hp.clamp(min=0)) / 5.0,
            torch.log1p(hp_max.clamp(min=0)) / 5.0,
            hp / hp_max.clamp(min=1),
            torch.log1p(energy.clamp(min=0)) / 5.0,
            energy / energy_max.clamp(min=1),
            stats[:, 12] / 10.0,
            torch.log1p(stats[:, 13].clamp(min=0)) / 8.0,
            stats[:, 16] / 10.0,
            stats[:, 17] / 20.0,
            stats[:, 18] / 20.0,
            torch.log1p(stats[:, 19].clamp(min=0)) / 10.0,
            torch.log1p(stats[:, 20].clamp(min=0)) / 10.0,
            stats[:, 26],
        ],
        dim=1,
    )
    hunger = F.one_hot(blstats[:, 21].long().clamp(0, 6), 7)
    load = F.one_hot(blstats[:, 22].long().clamp(0, 5), 6)
    conditions = (blstats[:, 25, None].int() >> torch.arange(13, device=blstats.device, dtype=torch.int32)) & 1
    features = torch.cat([numbers, hunger.float(), load.float(), conditions.float()], dim=1)
    return torch.cat([torch.where(hidden[:, None], 0.0, features), hidden[:, None].float()], dim=1)


def look_up(cells: torch.Tensor, table: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """[n, H, W] int, [codes, C] -> [n, C, H, W]: F.embedding, with `copies` above 1 with a gradient that is quick on a GPU.

    There F.embedding's sorts all cells and then adds up those that are alike (most are blank) one after another: four
    fifths of an update. index_select's adds atomically; neighbours that are alike take different copies, so as not to wait.
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

        def halve(inputs: int, outputs: int) -> List[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]

        self.screen = nn.Sequential(*halve(self.CHAR_DIM, 32), *halve(32, 64), *halve(64, 64), nn.Flatten(),
                                    nn.Linear(64 * 3 * 10, screen_dim), nn.ReLU())  # fmt: skip
        self.crop = nn.Sequential(nn.Conv2d(self.CHAR_DIM, 32, 3, padding=1), nn.ReLU(), *halve(32, 64), *halve(64, 64), nn.Flatten(),
                                  nn.Linear(64 * 4 * 4, crop_dim), nn.ReLU())  # fmt: skip
        self.message = nn.Sequential(nn.Conv1d(self.CHAR_DIM, 64, 5, stride=2, padding=2), nn.ReLU(),
                                     nn.Conv1d(64, 64, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(),
                                     nn.Linear(64 * 20, message_dim), nn.ReLU())  # fmt: skip
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
        copies = 64 if table.is_cuda and torch.is_grad_enabled() else 1  # of 0.5 MB: together they fit into a GPU's cache
        screen = look_up(cells, table, copies)  # [n, C, 24, 80]
        crop = look_up(self.crop_cells(cells, cursor), table, copies)
        return torch.cat([self.screen(screen), self.crop(crop), self.message(screen[:, :, 0])], dim=1)


class ModelBackbone(nn.Module):
    """Encoders of one frame and the previous action, feeding an LSTM: what every submission's Model is built on.

    `forward(inputs, state)`: inputs hold tty_chars, tty_colors [B, T, 24, 80], tty_cursor [B, T, 2], blstats [B, T, 27]
    and prev_actions [B, T] (NO_ACTION at a game's first frame), of any integer or float type; state is None (zeros) or
    (h, c), each [L, B, H]. Returns (core_output [B, T, H], new state).
    """

    observations = ("tty_chars", "tty_colors", "tty_cursor", "blstats")

    def __init__(self, action_dim: int, rnn_hidden_dim: int = 2048, rnn_layers: int = 2, rnn_dropout: float = 0.0,
                 use_prev_action: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.num_actions, self.rnn_hidden_dim, self.use_prev_action = action_dim, rnn_hidden_dim, use_prev_action
        self.no_action = action_dim  # stands for the previous action where there is none
        self.screen_encoder = ScreenEncoder()
        self.blstats_encoder = nn.Sequential(nn.Linear(47 + 2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.action_embedding = nn.Embedding(action_dim + 1, 64)
        self.rnn = nn.LSTM(self.screen_encoder.output_dim + 128 + (64 if use_prev_action else 0), rnn_hidden_dim,
                           num_layers=rnn_layers, dropout=rnn_dropout, batch_first=True)  # fmt: skip
        self.acting_dtype = torch.float32  # of the matrix products of single steps on a CPU; bfloat16 is faster
        self._packed: Optional[Tuple[Tuple[Any, ...], List[Tuple[torch.Tensor, torch.Tensor]]]] = None

    def encode(self, inputs: Dict[str, torch.Tensor]) -> torch.Tensor:
        """-> [B, T, features]: each frame on its own."""
        B, T = inputs["tty_chars"].shape[:2]
        flat = {name: inputs[name].flatten(0, 1) for name in ("tty_chars", "tty_colors", "tty_cursor", "blstats")}
        position = flat["tty_cursor"].float() / flat["tty_cursor"].new_tensor([ROWS, COLS]).float()
        stats = self.blstats_encoder(torch.cat([blstats_features(flat["blstats"]), position], dim=1))
        parts = [self.screen_encoder(flat["tty_chars"], flat["tty_colors"], flat["tty_cursor"]), stats]
        if self.use_prev_action:
            parts.append(self.action_embedding(inputs["prev_actions"].long().flatten()))
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=1).view(B, T, -1)

    def forward(self, inputs: Dict[str, torch.Tensor], state: Optional[RNNState] = None) -> Tuple[torch.Tensor, RNNState]:
        features = self.encode(inputs)
        if features.shape[1] == 1 and features.device.type == "cpu" and not torch.is_grad_enabled() and not self.training:
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
        """One step of the LSTM as one matrix product a layer: nn.LSTM on a CPU packs all its weights anew at every call."""
        L, H = self.rnn.num_layers, self.rnn.hidden_size
        h, c = state if state is not None else (features.new_zeros(L, len(features), H),) * 2
        x, hs, cs = features, [], []
        for layer, (weight, bias) in enumerate(self._packed_weights()):
            inputs = torch.cat([x, h[layer]], dim=1).to(weight.dtype)
            # In float32 torch would take MKL, which for few rows is up to twice as slow as oneDNN; in bfloat16 it takes oneDNN.
            if weight.is_mkldnn:
                gates = F.linear(inputs.to_mkldnn(), weight, bias).to_dense()
            else:
                gates = F.linear(inputs, weight, bias).to(x.dtype)
            i, f, g, o = gates.chunk(4, dim=1)  # PyTorch's order of gates
            cs.append(torch.sigmoid(f) * c[layer] + torch.sigmoid(i) * torch.tanh(g))
            x = torch.sigmoid(o) * torch.tanh(cs[-1])
            hs.append(x)
        return x[:, None], (torch.stack(hs), torch.stack(cs))

    def __deepcopy__(self, memo: Dict[int, Any]) -> "ModelBackbone":
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update({name: deepcopy(value, memo) for name, value in self.__dict__.items() if name != "_packed"})
        copy._packed = None  # 230 MB that are quickly made again
        return copy


# ======================================================================================================================
# ========================================  EDITABLE BEGIN  ============================================================
# ======================================================================================================================
# Recurrent advantage-weighted regression with burn-in. The benchmark takes this block alone and runs it inside its own
# file, so it names nothing from outside but torch, nn, F, np and Categorical.
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple
from zlib import crc32


@dataclass
class AWRConfig:
    """Hyper-parameters of the algorithm, each with its source; `config.algorithm` overrides them by name."""

    head_dim: int = 120  # width of the head's shared projection; up to 122 keep the head within 267,033 parameters
    burn_in: int = 4  # steps re-run before a chunk to refresh the stored state (R2D2, Kapturowski et al. 2019, section 3)
    lam: float = 0.95  # lambda of the returns (TD(lambda); the usual value, arXiv 1506.02438)
    # Temperature: weight = exp(advantage / (beta * scale)) (AWR, arXiv 1910.00177, equation 7). Rewards are rare and of very
    # unequal size: with AWR's own 1 and 20 a few frames take half to two thirds of a batch's effective size (README).
    beta: float = 3.0
    max_weight: float = 5.0  # largest weight before normalisation (AWR, section 5, has 20)
    scale_rate: float = 0.01  # rate at which the advantages' running mean square is updated (MARWIL, 2018, equation 4)
    value_coef: float = 0.5  # weight of the value loss against the policy loss
    temperature: float = 1.0  # softmax temperature of the actions drawn when acting
    clear_state: int = 1  # 1: when acting, clear the state where the screen's turn counter falls back to 1; 0: leave it to the loop


MAY_BE_ZERO, AT_MOST_ONE = ("burn_in", "lam", "value_coef", "clear_state"), ("lam", "scale_rate", "clear_state")


def lambda_returns(rewards: torch.Tensor, dones: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
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


def advantage_weights(advantages: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor, beta: float,
                      max_weight: float) -> torch.Tensor:  # fmt: skip
    """exp(A / (beta * scale)), clipped at `max_weight` before exp so that it stays finite, with mean 1 over `mask`.

    advantages, mask [B, T] float; scale [] float. Returns [B, T], 0 where the mask is 0.
    """
    exponents = (advantages / (beta * scale.clamp(min=1e-6))).clamp(max=float(np.log(max_weight)))
    weights = torch.exp(exponents) * mask
    return weights * (mask.sum().clamp(min=1.0) / weights.sum().clamp(min=1e-6))


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of values [B, T] where mask [B, T] is 1 (0 where nothing counts)."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def numbers_shown(tty_chars: np.ndarray) -> np.ndarray:
    """Screens [N, 24, 80] -> [2, N] float32: the turn on the bottom line, and a number that stands for the attributes on the line
    above it; 0 where none are shown."""
    rows = np.asarray(tty_chars[:, -2:], dtype=np.uint8)
    turns = [re.search(rb"T:(\d{1,9})", row.tobytes()) for row in rows[:, 1]]
    attributes = [re.search(rb" St:.* Ch:\d+", row.tobytes()) for row in rows[:, 0]]
    return np.array([[int(found.group(1)) if found else 0 for found in turns],
                     [1 + crc32(found.group()) % 2**23 if found else 0 for found in attributes]], dtype=np.float32)  # fmt: skip


class Model(nn.Module):
    """Policy and value on the recurrent backbone: a dueling head (arXiv 1511.06581) of two streams on one projection."""

    def __init__(self, backbone: Any, head_dim: int = AWRConfig.head_dim, temperature: float = AWRConfig.temperature,
                 clear_state: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.shared = nn.Sequential(nn.Linear(backbone.rnn_hidden_dim, head_dim), nn.ReLU())
        self.policy = nn.Linear(head_dim, backbone.num_actions)
        self.value = nn.Linear(head_dim, 1)
        self.temperature, self.clear_state = temperature, clear_state
        # The benchmark's backbone reads these two, and has no index for "no previous action".
        self.observations = getattr(backbone, "observations", ("tty_chars", "screen_image"))
        self.no_action = getattr(backbone, "no_action", 0)

    def head(self, core_output: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """[B, T, H] -> logits [B, T, A] and values [B, T], in float32 also under autocast: half precision rounds a value near 1 by
        more than a step of the game changes it.

        A fresh LSTM's output is some 0.02 in size and differs by a thousandth from frame to frame: for its first hundred updates
        the network would learn little but how often each action is taken. Normalised (without parameters, arXiv 1607.06450), it
        learns from the first one on.
        """
        with torch.autocast(core_output.device.type, enabled=False):
            shared = self.shared(F.layer_norm(core_output.float(), core_output.shape[-1:]))
            return self.policy(shared), self.value(shared).squeeze(-1)

    def forward(self, inputs: Dict[str, torch.Tensor], state: Optional[Tuple[torch.Tensor, torch.Tensor]] = None) -> Tuple[Any, ...]:
        """-> logits [B, T, A], values [B, T], new state."""
        core_output, state = self.backbone(inputs, state)
        return (*self.head(core_output), state)

    @torch.no_grad()
    def vec_act(self, obs: Dict[str, np.ndarray], state: Any = None, device: str = "cpu") -> Tuple[np.ndarray, Any]:
        """Draws an action for each of N games. obs: arrays [N, ...], prev_actions [N] among them. -> [N] int64, new state: (h, c) and
        the turns and attributes last seen [2, N, 1], to notice that a slot's next game has begun: at turn 1, after a later
        one or with other attributes (a game may end without ever leaving turn 1).

        Actions are drawn, not taken by argmax: greedy imitation of AutoAscend repeats itself without end (README).
        """
        inputs = {name: torch.as_tensor(obs[name], device=device)[:, None] for name in (*self.observations, "prev_actions")}
        inputs["prev_actions"] = inputs["prev_actions"].long()
        shown = torch.as_tensor(numbers_shown(obs["tty_chars"]), device=device)[..., None]  # [2, N, 1]
        if state is not None:
            *state, before = state
            other = (shown[1] != before[1]) & (shown[1] > 0) & (before[1] > 0)
            begun = (shown[0] == 1) & ((before[0] > 1) | other) & self.clear_state  # the benchmark hands on the state of the game before
            shown = torch.where(shown > 0, shown, before)
            inputs["prev_actions"] = inputs["prev_actions"].masked_fill(begun, self.no_action)
            state = tuple(part.masked_fill(begun, 0.0) for part in state)
        logits, _, state = self(inputs, state)
        actions = Categorical(logits=logits[:, -1] / self.temperature).sample()
        return actions.cpu().numpy(), (*state, shown)


class OfflineAlgorithm:
    """Recurrent advantage-weighted regression.

    The value stream learns lambda-returns; the policy stream regresses onto the data's actions, weighted by
    exp(advantage). The recurrent state is carried from chunk to chunk. It is kept as it was `burn_in` steps before the
    chunk's end together with the frames since (`rnn_states["tail"]`); those frames are re-run without gradient before the
    next chunk, so that its first state comes from the current weights.
    """

    def __init__(self, backbone: nn.Module, config: Any, device: str) -> None:
        self.hyper = awr_config(getattr(config, "algorithm", {}))
        self.gamma, self.device = config.gamma, device
        self.model = Model(backbone, self.hyper.head_dim, self.hyper.temperature, bool(self.hyper.clear_state)).to(device)
        self.advantage_square = torch.zeros((), device=device)  # running mean of the squared advantage; 0: none seen yet
        self.info_as_tensors = False  # a loop may set it, to read `info` without waiting for the GPU at every step

    def parameters(self) -> List[nn.Parameter]:
        return list(self.model.parameters())

    def state_dict(self) -> Dict[str, torch.Tensor]:
        """What a checkpoint needs beyond the model's weights."""
        return {"advantage_square": self.advantage_square}

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        self.advantage_square = state["advantage_square"].to(self.device)

    def after_gradient_step(self) -> None:
        """Nothing follows a step: there is no target network, since values of the data's own policy need none."""

    # --- unrolling the backbone over a chunk
    def _run(self, inputs: Dict[str, torch.Tensor], resets: Optional[torch.Tensor], state: Any,
             cuts: Sequence[int]) -> Tuple[torch.Tensor, List[Any]]:  # fmt: skip
        """Runs frames 0 .. T - 1, stopping before each of `cuts` (the first is 0) to clear rows whose game begins there.

        resets [B, T] bool or None (nothing begins). Returns core_output [B, T, H] and the states at the cuts, after
        clearing, followed by the final state.
        """
        steps = inputs["prev_actions"].shape[1]
        outputs, states = [], []
        for begin, end in zip(cuts, [*cuts[1:], steps]):
            if state is not None and resets is not None:
                keep = (~resets[:, begin]).to(state[0].dtype)[None, :, None]
                state = tuple(part * keep for part in state)
            states.append(state)
            # The benchmark's backbone views its inputs in another shape, which a slice in time does not allow.
            output, state = self.model.backbone({name: value[:, begin:end].contiguous() for name, value in inputs.items()}, state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), [*states, state]

    @torch.no_grad()
    def _burn_in(self, rnn_states: Dict[str, Any], names: Sequence[str], starts: torch.Tensor, split: bool) -> Any:
        """The state before the chunk's first frame: the stored one, brought up to date over the tail, cleared at `starts`."""
        state = tuple(rnn_states["core"]) if "core" in rnn_states else None
        if "tail" in rnn_states:
            resets, *tensors = rnn_states["tail"]
            state = self._run(dict(zip(names, tensors)), resets, state, self._cuts(resets) if split else [0])[1][-1]
        return None if state is None else tuple(part * (~starts).to(part.dtype)[None, :, None] for part in state)

    @staticmethod
    def _cuts(resets: torch.Tensor) -> List[int]:
        """Columns at which some row's game begins, 0 always among them."""
        return sorted({0, *torch.nonzero(resets.any(dim=0)).flatten().tolist()})

    def train_step(self, batch: Dict[str, torch.Tensor], prev_actions: torch.Tensor, rnn_states: Dict[str, Any]) -> Tuple[Any, ...]:
        """One chunk of T steps and the frame after it -> (loss, new rnn_states, info). Runs under no_grad as well.

        batch [B, T + 1, ...]; prev_actions [B, 1]: the action before the first frame; rnn_states: {} at first.
        """
        actions, rewards, dones = batch["actions"].long(), batch["rewards"].float(), batch["dones"].float()
        mask = batch["mask"].float() if "mask" in batch else torch.ones_like(rewards)
        steps = actions.shape[1] - 1

        # Frames before which the state is cleared. Our loader begins games only where a chunk begins, and says so; in the
        # benchmark a game may begin anywhere, and the chunk is then run in pieces.
        split = "starts" not in batch
        resets = torch.zeros_like(dones, dtype=torch.bool)
        if split:
            resets[:, 1:] = dones[:, :-1] > 0
            resets[:, 0] = rnn_states["ended"][0] if "ended" in rnn_states else True
        else:
            resets[:, 0] = batch["starts"]
        inputs = {name: batch[name] for name in self.model.observations}
        previous = torch.cat([prev_actions.long().view(-1, 1), actions[:, :-1]], dim=1)
        inputs["prev_actions"] = previous.masked_fill(resets, self.model.no_action)
        names = sorted(inputs)

        state = self._burn_in(rnn_states, names, resets[:, 0], split)
        # Until 2.10 torch's autocast kept the half-precision weights it had cast without gradient for the pass with it.
        torch.clear_autocast_cache()
        keep_at = steps - min(self.hyper.burn_in, steps)  # the state to store lies before this frame
        cuts = sorted({keep_at, *(self._cuts(resets) if split else [0])})
        core_output, states = self._run(inputs, resets, state, cuts)
        logits, values = self.model.head(core_output)
        loss, info = self._loss(logits[:, :-1], values, actions[:, :-1], rewards[:, :-1], dones[:, :-1], mask[:, :-1])
        if "returns" in batch:
            info.update(value_errors(values[:, :-1].detach(), batch["returns"][:, :-1].float(), mask[:, :-1]))

        new_states: Dict[str, Any] = {"ended": (dones[:, steps - 1] > 0,)}
        if keep_at < steps:  # copies: a slice would keep the whole batch alive until the next one
            new_states["tail"] = (resets[:, keep_at:steps].clone(), *(inputs[name][:, keep_at:steps].clone() for name in names))
        stored = states[cuts.index(keep_at)]
        if stored is not None:
            new_states["core"] = tuple(part.detach() for part in stored)
        return loss, new_states, self._readable(info)

    # --- the loss
    def _loss(self, logits: torch.Tensor, values: torch.Tensor, actions: torch.Tensor, rewards: torch.Tensor, dones: torch.Tensor,
              mask: torch.Tensor) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:  # fmt: skip
        """logits [B, T, A], values [B, T + 1], the rest [B, T] -> loss [] and metrics."""
        hyper = self.hyper
        targets = lambda_returns(rewards, dones, values, self.gamma, hyper.lam)
        advantages = targets - values[:, :-1].detach()
        if torch.is_grad_enabled():  # held-out games must leave no trace
            square = masked_mean(advantages**2, mask)
            running = torch.lerp(self.advantage_square, square, hyper.scale_rate)
            self.advantage_square = torch.where(self.advantage_square > 0, running, square)
        weights = advantage_weights(advantages, mask, self.advantage_square.sqrt(), hyper.beta, hyper.max_weight)
        self.last_weights = (weights, mask)  # for a loop that shows them

        log_probs = F.log_softmax(logits, dim=-1)
        losses = -log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # [B, T] nats
        policy_loss = masked_mean(weights * losses, mask)
        value_loss = self._value_loss(values[:, :-1], targets, mask)
        loss = policy_loss + hyper.value_coef * value_loss
        with torch.no_grad():
            count = mask.sum().clamp(min=1.0)
            info = {
                "loss": loss.detach(),
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "loss_per_action": masked_mean(losses, mask),
                "accuracy": masked_mean((logits.argmax(dim=-1) == actions).float(), mask),
                "entropy": masked_mean(-(log_probs.exp() * log_probs).sum(dim=-1), mask),
                "value_mean": masked_mean(values[:, :-1], mask),
                "advantage_scale": self.advantage_square.sqrt(),
                "weight_max": weights.max(),
                "weight_clipped": masked_mean((weights >= weights.max() * 0.999).float(), mask),
                "effective_sample_size": weights.sum() ** 2 / (weights**2).sum().clamp(min=1e-6) / count,
                "counting_frames": mask.mean(),
            }
        return loss, info

    def _value_loss(self, values: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The squared error up to 1, linear beyond (Huber). The benchmark divides its first rewards by a running scale that is still
        near zero, so they come out at the clip, far above all later ones; squared, their errors would drown the policy's loss."""
        return masked_mean(2.0 * F.huber_loss(values, targets, reduction="none"), mask)

    def _readable(self, info: Dict[str, torch.Tensor]) -> Dict[str, Any]:
        """Floats, fetched from the device at once; tensors if the loop asked for them."""
        if self.info_as_tensors:
            return dict(info)
        return dict(zip(info, torch.stack([value.float() for value in info.values()]).tolist()))


def value_errors(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Moments of the exact returns and of the values' errors, all [B, T] -> means, for the explained variance."""
    error = returns - values
    moments = {"return": returns, "return_square": returns**2, "value_error": error, "value_error_square": error**2}
    return {f"moment_{name}": masked_mean(moment, mask) for name, moment in moments.items()}


def awr_config(overrides: Dict[str, Any]) -> AWRConfig:
    """AWRConfig with these values. Raises ValueError for an unknown name or a value of another type."""
    kinds: Dict[str, Any] = {item.name: type(item.default) for item in fields(AWRConfig)}
    values = {}
    for name, value in overrides.items():
        if name not in kinds:
            raise ValueError(f"algorithm: unknown setting {name!r}; there are {', '.join(kinds)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
        if not number or value != kinds[name](value) or value < 0 or (value == 0 and name not in MAY_BE_ZERO):
            raise ValueError(f"algorithm: {name} must be a {kinds[name].__name__} above 0{' or 0' * (name in MAY_BE_ZERO)}, not {value!r}")
        if value > 1 and name in AT_MOST_ONE:
            raise ValueError(f"algorithm: {name} must be at most 1, not {value!r}")
        values[name] = kinds[name](value)
    return replace(AWRConfig(), **values)


# ======================================================================================================================
# ========================================  EDITABLE END  ==============================================================
# ======================================================================================================================


# ======================================================================================================================
# FIXED: the game and its evaluation
# ======================================================================================================================
OBSERVATION_SHAPES: Dict[str, Tuple[Any, ...]] = {  # dtype and shape
    "tty_chars": (np.uint8, ROWS, COLS), "tty_colors": (np.int8, ROWS, COLS), "tty_cursor": (np.uint8, 2),
    "blstats": (np.int32, NUM_BLSTATS)}  # fmt: skip
OBSERVATIONS = tuple(OBSERVATION_SHAPES)
# nle.dataset shows line-drawing bytes as plain characters, the live terminal does not. They appear only where the player
# typed such a byte himself; with this table live screens equal recorded ones there too.
PLAIN_CHARS = np.arange(256, dtype=np.uint8)
for _plain, _codes in {"#": b"\xb0\xb1\xf0\xf1", "|": b"\xb3\xb4\xc3\xfe", "-": b"\xbf\xc0\xc1\xc2\xc4\xc5\xd9\xda",
                       "{": b"\xf4", "}": b"\xf7", ".": b"\xfa"}.items():  # fmt: skip
    PLAIN_CHARS[list(_codes)] = ord(_plain)
QUIT = [int(KEY_TO_ACTION[key]) for key in (27, 27, int(nethack.Command.QUIT), ord("y"))]  # ESC, ESC, #quit, y
NO_PROGRESS_STEPS = 1000  # Katakomba's and the NetHack Challenge's: a game is aborted when its turn counter stands still


class NetHackGame:
    """One game of the NetHack Challenge's kind that can be seeded; the same on nle 0.9 (gym) and 1.x (gymnasium).

    Observations are tty_chars [24, 80] uint8, tty_colors [24, 80] int8, tty_cursor [2] uint8 and blstats [27] int32 as
    read off the status lines, just as they come from recorded games: fresh arrays, or those given as `into`, written over
    at every step. `savedir` records in NLD-AA's layout.
    """

    def __init__(self, character: str, savedir: Optional[str] = None, max_steps: int = 1_000_000,
                 into: Optional[Dict[str, np.ndarray]] = None) -> None:  # fmt: skip
        options: Dict[str, Any] = dict(character=character, actions=nethack.ACTIONS, allow_all_modes=True, allow_all_yn_questions=True,
                                       penalty_step=0.0, penalty_time=0.0, max_episode_steps=10**9, savedir=savedir,
                                       save_ttyrec_every=1 if savedir else 0, observation_keys=OBSERVATIONS)  # fmt: skip
        if "fix_moon_phase" in inspect.signature(NLE.__init__).parameters:
            options["fix_moon_phase"] = True  # otherwise the date enters the game
        self.env = NetHackScore(**options)
        self.read_status, self.status_lines, self.status = StatusReader(), b"", np.zeros(NUM_BLSTATS, dtype=np.int32)
        self.max_steps, self.into = max_steps, into
        self.steps = self.score = self.still = 0
        self.last_blstats = np.zeros(NUM_BLSTATS, dtype=np.int64)  # NLE's own, for bookkeeping; the agent never sees them

    def _observe(self, raw: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Copies, since NLE writes the next frame into the same arrays."""
        obs = self.into or {name: np.empty(shape, kind) for name, (kind, *shape) in OBSERVATION_SHAPES.items()}
        PLAIN_CHARS.take(raw["tty_chars"], out=obs["tty_chars"], mode="clip")  # without a mode numpy buffers the result
        obs["tty_colors"][:], obs["tty_cursor"][:] = raw["tty_colors"], raw["tty_cursor"]
        lines = obs["tty_chars"][22:].tobytes()
        if lines != self.status_lines:  # they change at every second step or so
            self.status_lines, self.status = lines, self.read_status(obs["tty_chars"][None])[0]
        obs["blstats"][:] = self.status
        return obs

    def reset(self, core_seed: int, disp_seed: int) -> Dict[str, np.ndarray]:
        """Begins the game of these two seeds."""
        self.env.unwrapped.seed(core=core_seed, disp=disp_seed, reseed=False)  # holds for one game only
        raw = self.env.reset()
        raw = raw[0] if isinstance(raw, tuple) else raw
        self.steps = self.score = self.still = 0
        self.last_blstats[:] = raw["blstats"]
        return self._observe(raw)

    def step(self, action: int) -> Tuple[Dict[str, np.ndarray], float, bool, Dict[str, Any]]:
        """-> obs, reward (difference of the in-game score), done, info. At the end of a game info has score, depth, turns,
        length, end ('died', 'no progress' or 'step limit') and cause (of a death, as GameResult has it)."""
        raw, reward, done, *_, info = self.env.step(int(action))
        self.steps += 1
        self.score += int(reward)
        over = bool(done)
        if not over:
            blstats = raw["blstats"]
            self.still = 0 if blstats[20] != self.last_blstats[20] else self.still + 1
            self.last_blstats[:] = blstats
        stuck, cut = self.still >= NO_PROGRESS_STEPS, self.steps >= self.max_steps
        end = "died" if over else "no progress" if stuck else "step limit" if cut else None
        if end is None:
            return self._observe(raw), float(reward), False, info
        final = {"score": self.score, "depth": int(self.last_blstats[12]), "turns": int(self.last_blstats[20]),
                 "length": self.steps, "end": end,
                 "cause": self.env.unwrapped.nethack.how_done().name.lower().replace("_", " ") if over else ""}  # fmt: skip
        return self._observe(raw), float(reward), True, {**info, **final}

    def quit(self) -> None:
        """Ends the game with the keys that a person would press: NLE writes no xlogfile line for one that is not over."""
        for action in 3 * QUIT:
            if self.env.step(action)[2]:
                return

    def close(self) -> None:
        self.env.close()


class GameResult(NamedTuple):
    """One evaluated game."""

    game: int  # its number k; its seeds derive from eval_seed and k
    score: float
    depth: int
    turns: int
    length: int
    end: str
    replayed: int = 0  # how often it was begun anew, because its worker process had died or hung
    cause: str = ""  # if it died, NetHack's own word for how: died (killed), starving, drowning, stoning, quit, ascended, ...


def fresh_folder(wanted: str) -> str:
    """Makes a folder of this name, or, where there is one, with -2, -3, ... appended: another evaluation's games stay."""
    number = 1
    while True:
        folder = wanted if number == 1 else f"{wanted}-{number}"
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            number += 1


def game_seeds(eval_seed: int, game: int) -> Tuple[int, int]:
    return derived_seed(eval_seed, game, 0) % 2**31, derived_seed(eval_seed, game, 1) % 2**31


SHARED_SHAPES: Dict[str, Tuple[Any, ...]] = {**OBSERVATION_SHAPES, "actions": (np.int64,), "fresh": (np.bool_,), "active": (np.bool_,)}


def observation_views(shared: Dict[str, Any], slots: int) -> Dict[str, np.ndarray]:
    """Arrays [slots, ...] over memory that the main process shares with its workers."""
    return {name: np.frombuffer(shared[name], dtype=kind).reshape((slots, *shape)) for name, (kind, *shape) in SHARED_SHAPES.items()}


class Slot:
    """Plays one slot's games, one after another, into one row of the shared arrays."""

    def __init__(self, views: Dict[str, np.ndarray], row: int) -> None:
        self.screen = {name: views[name][row] for name in OBSERVATIONS}
        self.actions, self.fresh, self.active, self.row = views["actions"], views["fresh"], views["active"], row
        self.game: Optional[NetHackGame] = None
        self.queue: List[Tuple[int, int, int]] = []  # (game, core seed, disp seed)

    def begin(self, character: str, queue: List[Tuple[int, int, int]], max_steps: int, record: Optional[str] = None) -> None:
        """`record`: path to which "-<game>" is appended for the folder that each game is recorded in."""
        self.close()
        self.character, self.queue, self.max_steps, self.record = character, list(queue), max_steps, record
        self._next_game()

    def _next_game(self) -> None:
        if not self.queue or self.record:  # NLE keeps to the folder that it began with
            self.close()
        self.fresh[self.row] = self.active[self.row] = bool(self.queue)
        if not self.queue:
            for array in self.screen.values():
                array[:] = 0
            return
        self.number, core, disp = self.queue.pop(0)
        if self.game is None:
            folder = fresh_folder(f"{self.record}-{self.number}") if self.record else None
            self.game = NetHackGame(self.character, folder, self.max_steps, into=self.screen)
        self.game.reset(core, disp)

    def step(self) -> Optional[GameResult]:
        """Takes the row's action; the result of the game if it ended by it."""
        if self.game is None:
            return None
        self.fresh[self.row] = False
        _, _, done, info = self.game.step(int(self.actions[self.row]))
        if not done:
            return None
        result = GameResult(self.number, float(info["score"]), info["depth"], info["turns"], info["length"], info["end"],
                            cause=info["cause"])  # fmt: skip
        if self.record and result.end != "died":
            self.game.quit()
        self._next_game()
        return result

    def close(self) -> None:
        if self.game is not None:
            self.game.close()
            self.game = None


STEP, NOTHING = b"step", b""  # messages between the main process and its workers; any other is pickled


def play_worker(pipe: Any, shared: Dict[str, Any], slots: int, rows: Sequence[int], folder: str) -> None:
    """A worker process: plays its rows' games as it is told through `pipe`. Games are made here, never inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # through `finally`: temporary folders must go
    tempfile.tempdir = folder  # for NLE, which makes a folder a game
    views = observation_views(shared, slots)
    mine = [Slot(views, row) for row in rows]
    try:
        while True:
            message = pipe.recv_bytes()
            if message == STEP:
                results = [result for result in [slot.step() for slot in mine] if result is not None]
                pipe.send_bytes(pickle.dumps(results) if results else NOTHING)
            elif message:
                character, queues, *options = pickle.loads(message)
                for slot in mine:
                    slot.begin(character, queues[slot.row], *options)
                pipe.send_bytes(NOTHING)
            else:
                return
    except (EOFError, OSError):  # the main process is gone
        return
    finally:
        for slot in mine:
            slot.close()
        shutil.rmtree(folder, ignore_errors=True)


class WorkerDied(Exception):
    """The same game has ended or blocked its worker process again and again."""


class Worker:
    """A worker process, seen from the main process. Its games' temporary folders lie in one of its own, which goes with it."""

    def __init__(self, context: Any, shared: Dict[str, Any], slots: int, rows: Sequence[int]) -> None:
        self.rows, self.folder = list(rows), tempfile.mkdtemp(prefix="nethack_games_")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=play_worker, args=(theirs, shared, slots, self.rows, self.folder), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = select.poll()
        self.ready.register(self.pipe, select.POLLIN)

    def tell(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has died: that shows when it gives no answer
            self.pipe.send_bytes(message)

    def answer(self, seconds: int) -> Optional[List[GameResult]]:
        """None if it has died, or gives no answer for so long. Time in which this process itself was stopped does not count."""
        with contextlib.suppress(EOFError, OSError):
            if any(self.ready.poll(1000) for _ in range(seconds)):
                message = self.pipe.recv_bytes()
                return pickle.loads(message) if message else []
        return None

    def end(self, patience: float) -> None:
        self.process.join(timeout=patience)
        if self.process.is_alive():
            self.process.kill()  # a stopped process hears nothing else
            self.process.join()
        self.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class GamePool:
    """`slots` game slots spread over worker processes. Which slot plays which game depends on neither's number of cores.

    A worker that dies or hangs is replaced, and the games it was playing are begun anew from their seeds; games of other workers
    go on as if nothing had happened. A game begun anew meets other random draws (they depend on the tick), so where actions are
    drawn it goes another way: its result says `replayed`.
    """

    ANSWER_SECONDS = 60  # and one more for each slot: a worker that takes longer hangs
    MAX_REPLAYS = 3  # of one game

    def __init__(self, slots: int, workers: int = 0, mine: Optional[Sequence[int]] = None) -> None:
        """`mine`: the slots to play here, where several processes share out the games; all by default."""
        self.slots = slots
        self.rows = -(-slots // 8) * 8  # padded: a matrix product's bits may differ with the number of rows, at multiples of 8 not
        self.context = multiprocessing.get_context("spawn")
        self.shared = {name: self.context.RawArray("b", np.dtype(kind).itemsize * math.prod(shape) * self.rows)
                       for name, (kind, *shape) in SHARED_SHAPES.items()}  # fmt: skip
        self.views = observation_views(self.shared, self.rows)
        mine = range(slots) if mine is None else mine
        count = min(workers or usable_cores(), len(mine))
        self.workers = [self._start(mine[number::count]) for number in range(count)]
        self.queues: List[List[Tuple[int, int, int]]] = [[] for _ in range(slots)]  # each slot's unfinished games, as Slot takes them
        self.replays: Dict[int, int] = {}

    def _start(self, rows: Sequence[int]) -> Worker:
        return Worker(self.context, self.shared, self.rows, rows)

    @property
    def processes(self) -> List[Any]:
        return [worker.process for worker in self.workers]

    def _answers(self, check: Callable[[], None]) -> List[GameResult]:
        """Of all workers, which work at the same time; one that gives none is replaced."""
        results: List[GameResult] = []
        for number, worker in enumerate(self.workers):
            answer = worker.answer(self.ANSWER_SECONDS + self.slots)
            while answer is None:
                answer = self._replace(number, check).answer(self.ANSWER_SECONDS + self.slots)
            results.extend(answer)
        return results

    def _tell_games(self, worker: Worker) -> None:
        worker.tell(pickle.dumps((self.character, {row: self.queues[row] for row in worker.rows}, self.max_steps, self.record)))

    def _replace(self, number: int, check: Callable[[], None]) -> Worker:
        """A new worker with the old one's unfinished games, which it is told to begin."""
        old = self.workers[number]
        old.end(patience=0)
        check()  # a signal to the whole group ends the workers as well: that is a stop, not a failure
        playing = [self.queues[row][0][0] for row in old.rows if self.queues[row]]
        warn(f"an evaluation worker died or hung; games played again from their beginning: {', '.join(map(str, playing)) or 'none'}")
        for game in playing:
            self.replays[game] = self.replays.get(game, 0) + 1
            if self.replays[game] > self.MAX_REPLAYS:
                raise WorkerDied(f"game {game} of {self.character}: its worker process died or hung {self.replays[game]} times")
        self.workers[number] = worker = self._start(old.rows)
        self._tell_games(worker)
        return worker

    def begin(self, character: str, games: int, eval_seed: int, max_steps: int, record: Optional[str] = None,
              check: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        """Game k is played by slot k % slots: a fixed quota for each slot, so that short games are not over-counted."""
        self.character, self.max_steps, self.record, self.replays = character, max_steps, record, {}
        self.queues = [[(k, *game_seeds(eval_seed, k)) for k in range(slot, games, self.slots)] for slot in range(self.slots)]
        for worker in self.workers:
            self._tell_games(worker)
        self._answers(check)

    def step(self, actions: np.ndarray, check: Callable[[], None] = lambda: None) -> List[GameResult]:
        """The games that ended by these actions, one a row. `check` may raise before a worker is replaced."""
        self.views["actions"][:] = actions
        for worker in self.workers:
            worker.tell(STEP)
        results = self._answers(check)
        for result in results:
            self.queues[result.game % self.slots].pop(0)
        return [result._replace(replayed=self.replays.get(result.game, 0)) for result in results]

    def close(self) -> None:
        for worker in self.workers:
            worker.tell(NOTHING)
        for worker in self.workers:
            worker.end(patience=5)


def play_games(pool: GamePool, model: Any, character: str, games: int, eval_seed: int, max_steps: int, device: torch.device,
               clear_state: bool = True, check: Callable[[], None] = lambda: None,
               record: Optional[str] = None) -> List[GameResult]:  # fmt: skip
    """Plays games 0 .. games - 1 of the character. Repeats to the bit, whatever the number of worker processes, as long as none
    of them dies (GamePool).

    `check` is called at every tick and may raise to break the evaluation off. `record`: game k is recorded in the folder
    `<record>-<k>`, in NLD-AA's layout; a game that is cut is quit there, so that it too has its line in the xlogfile.
    """
    was_training = model.training
    model.eval()
    pool.begin(character, games, eval_seed, max_steps, record, check)
    views, state, results = pool.views, None, []
    previous: np.ndarray = np.full(pool.rows, NO_ACTION, dtype=np.int64)
    bar = progress(total=games, desc=f"playing {character}", unit="game", leave=False)
    cuda = [device] if device.type == "cuda" else []
    tick = 0
    while views["active"].any():
        check()
        fresh = views["fresh"] & (clear_state or tick == 0)
        previous[fresh | ~views["active"]] = NO_ACTION
        if state is not None and fresh.any():
            keep = torch.as_tensor(~fresh, device=device)[None, :, None]
            state = tuple(part * keep.to(part.dtype) for part in state)
        obs = {name: views[name].copy() for name in OBSERVATIONS}
        with torch.random.fork_rng(devices=cuda):  # sampled actions depend on the seed and the tick, and disturb nothing else
            torch.manual_seed(derived_seed(eval_seed, tick))
            actions, state = model.vec_act({**obs, "prev_actions": previous}, state, device=str(device))
        previous = np.asarray(actions, dtype=np.int64).copy()
        finished = pool.step(previous, check)
        results.extend(finished)
        bar.update(len(finished))
        if finished:
            bar.set_postfix_str(f"last score {finished[-1].score:.0f}")
        tick += 1
    bar.close()
    model.train(was_training)
    return sorted(results)


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = 10_000) -> Tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over games."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize_games(results: Sequence[GameResult], character: str) -> Dict[str, float]:
    """Metrics of one character's games, under Katakomba's names where it has them (reward_*, depth_*)."""
    scores = np.array([result.score for result in results], dtype=np.float64)
    depths = np.array([result.depth for result in results], dtype=np.float64)
    normalized = scores / AUTOASCEND_MEAN_SCORE[character]
    low, high = bootstrap_interval(normalized)
    summary = {"normalized_score": float(normalized.mean()), "normalized_score_median": float(np.median(normalized)),
               "normalized_score_low": low, "normalized_score_high": high,
               "turns_mean": float(np.mean([result.turns for result in results])),
               "length_mean": float(np.mean([result.length for result in results])),
               "games_replayed": float(sum(result.replayed > 0 for result in results))}  # fmt: skip
    for name, values in (("reward", scores), ("depth", depths)):
        statistics: Dict[str, Any] = {"median": np.median, "mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
        summary.update({f"{name}_{statistic}": float(function(values)) for statistic, function in statistics.items()})
    for end in ("died", "no progress", "step limit"):
        summary["end_" + end.replace(" ", "_")] = sum(result.end == end for result in results) / len(results)
    return summary


def score_table(summaries: Dict[str, Dict[str, float]], games: int) -> str:
    """The table that ends an evaluation: a line a character."""
    header = ("character", "games", "normalized", "95 % interval", "mean", "median", "depth", "turns", "died/stuck/cut")
    lines = ["{:<12} {:>5} {:>10} {:>16} {:>8} {:>8} {:>6} {:>7}  {}".format(*header)]
    for name, row in summaries.items():
        interval = f"{row['normalized_score_low']:.4f} - {row['normalized_score_high']:.4f}"
        ends = "/".join(f"{row[end] * games:.0f}" for end in ("end_died", "end_no_progress", "end_step_limit"))
        numbers = f"{row['reward_mean']:>8.0f} {row['reward_median']:>8.0f} {row['depth_mean']:>6.1f} {row['turns_mean']:>7.0f}"
        lines.append(f"{name:<12} {games:>5} {row['normalized_score']:>10.4f} {interval:>16} {numbers}  {ends}")
    return "\n".join(lines)


def game_rows(results: Sequence[GameResult], character: str, eval_seed: int, record: Optional[str] = None) -> List[Dict[str, Any]]:
    """The table of evaluated games: a row a game. `record` as in play_games; a game of another machine's has no `recording`."""
    rows = []
    for result in results:
        folders = siblings(Path(f"{record}-{result.game}"))[:1] if record else []
        core, disp = game_seeds(eval_seed, result.game)
        normalized = result.score / AUTOASCEND_MEAN_SCORE[character]
        rows.append({"character": character, **result._asdict(), "normalized_score": normalized, "core_seed": core, "disp_seed": disp,
                     "recording": next((str(file) for folder in folders for file in folder.glob("*.ttyrec*")), "")})  # fmt: skip
    return rows


def column_name(character: str) -> str:
    """mon-hum-neu -> normalized_score_mon_hum_neu, the leaderboard's name."""
    return "normalized_score_" + character.replace("-", "_")


def geometric_mean(scores: Sequence[float]) -> float:
    """Of several characters' scores; 0 if any is not above 0. (The benchmark squashes each score before it takes this mean.)"""
    if len(scores) == 1:
        return scores[0]
    return math.exp(sum(math.log(score) for score in scores) / len(scores)) if min(scores) > 0 else 0.0


def evaluate_heldout(algorithm: Any, loader: ChunkLoader, max_frames: int, device: torch.device, autocast: Callable[[], Any],
                     gather: Callable[[Any], List[Any]]) -> Dict[str, float]:  # fmt: skip
    """The algorithm's own train_step, without gradient, over held-out chunks from their beginning: mean of its metrics.

    The mean is over the counting frames of all processes, whose sums `gather` brings together.
    """
    model, counts = algorithm.model, 0.0
    states: Dict[str, Any] = {}
    totals: Dict[str, float] = {}
    was_training = model.training
    model.eval()
    steps = min(loader.plan.steps, -(-max_frames // (loader.plan.rows * loader.seq_len)))
    stream = loader.stream(0)
    try:
        with torch.no_grad():
            for _, batch in zip(progress(iterable=range(steps), desc="held-out games", unit="batch", leave=False), stream):
                batch = to_device(batch, device)
                previous = batch.pop("prev_actions")
                count = float(batch["mask"][:, :-1].sum())
                with autocast():
                    _, states, info = algorithm.train_step(batch, previous, states)
                counts += count
                for name, value in info.items():
                    totals[name] = totals.get(name, 0.0) + float(value) * count
    finally:
        stream.close()
        model.train(was_training)
    parts = gather((counts, totals))
    counts = sum(part[0] for part in parts)
    means = {name: sum(part[1][name] for part in parts) / max(counts, 1.0) for name in totals}
    moments = {name: means.pop(f"moment_{name}", math.nan) for name in ("return", "return_square", "value_error", "value_error_square")}
    variance = moments["return_square"] - moments["return"] ** 2
    if variance > 0:
        means["value_rmse"] = math.sqrt(moments["value_error_square"])
        means["explained_variance"] = 1.0 - (moments["value_error_square"] - moments["value_error"] ** 2) / variance
    means["frames"] = counts
    return means


# ======================================================================================================================
# FIXED: the run's folder, checkpoints and resuming
# ======================================================================================================================
CHECKPOINT_FORMAT = 1
# What may differ between a run and its continuation: how long it is, where things lie, how it is watched.
NOT_IDENTITY = ("update_steps", "data_path", "store_path", "checkpoints_path", "submission", "project", "group", "name", "version",
                "log_every", "checkpoint_every", "keep_checkpoints", "resume", "data_workers", "data_mode", "render_processes",
                "device")  # fmt: skip


def run_identity(config: TrainConfig) -> str:
    """Equal for a run and what may continue it: settings, this script, the submission and the number of processes."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY and not name.startswith("eval_")}
    scripts = [sha256_of_file(Path(path)) for path in (__file__, config.submission) if path]
    return hashlib.sha256(json.dumps([settings, scripts, WORLD], sort_keys=True).encode()).hexdigest()


def describe_run(config: TrainConfig, identity: str, device: torch.device) -> Dict[str, Any]:
    """config.json: what is needed to know how a result came about."""
    commit = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"], capture_output=True, text=True)
    hardware = {"machine": platform.machine(), "cores": usable_cores(), "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "processes": WORLD}  # fmt: skip
    versions = {"python": platform.python_version(), "torch": torch.__version__, "nle": nle.__version__, "numpy": np.__version__}
    return {"config": asdict(config), "identity": identity, "versions": versions, "hardware": hardware, "command": sys.argv,
            "commit": commit.stdout.strip() or None, "script_sha256": sha256_of_file(Path(__file__))}  # fmt: skip


def write_json(path: Path, content: Dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def run_folder(config: TrainConfig) -> Path:
    """<checkpoints_path>/<group>-v<version>/<name>-<characters>-seed<train_seed>: the same for the same command."""
    name = f"{config.name}-{'+'.join(config.characters)}-seed{config.train_seed}"
    return Path(config.checkpoints_path or "runs").expanduser() / f"{config.group}-v{config.version}" / name


def siblings(folder: Path) -> List[Path]:
    """The folder and its repeats, `<name>-2`, `<name>-3`, ..., as far as they exist, the newest first."""
    pattern = re.compile(re.escape(folder.name) + r"(-\d+)?")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    found = [(int((match.group(1) or "-1")[1:]), path) for match, path in matches if match]
    return [path for _, path in sorted(found, key=lambda item: item[0], reverse=True)]


def claim(folder: Path) -> Optional[int]:
    """A lock on the folder, held as long as the returned file descriptor is open; None if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def choose_run_folder(config: TrainConfig, identity: str) -> Tuple[Path, bool, Optional[int]]:
    """-> (folder, resumed, its lock). Never an existing folder, unless `resume` finds an unfinished run of this identity."""
    first = run_folder(config)
    present = siblings(first)
    if config.resume:
        for folder in present:
            described = read_json(folder / "config.json")
            if described.get("identity") == identity and described.get("finished_at_step", 0) < config.update_steps:
                lock = claim(folder)
                if lock is not None:
                    return folder, True, lock
                say(f"{folder} is in use by a run that has not ended")
        say("nothing to resume: no unfinished run with these settings and this script; a new one begins")
    number = 1
    while True:  # mkdir decides between two runs that start at once
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder, False, claim(folder)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; give a writable folder with --checkpoints_path") from None


def read_checkpoint(path: Path, identity: Optional[str] = None) -> Dict[str, Any]:
    """A checkpoint's content. Raises UserError for one that is truncated, foreign or of another run."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums that it writes
            if archive.testzip() is not None:
                raise ValueError("its checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)  # no code is run by reading it
    except Exception as error:  # torch reports damage by many types
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this script (format {CHECKPOINT_FORMAT})")
    if identity is not None and content.get("identity") != identity:
        raise UserError(f"{path} belongs to a run with other settings or another script")
    return content


def newest_checkpoint(folder: Path, identity: str) -> Tuple[Optional[Dict[str, Any]], bool]:
    """-> last.pt, or last.prev.pt with a warning if last.pt is damaged, or None if there is neither; whether it was damaged."""
    problems = []
    for path in (folder / "last.pt", folder / "last.prev.pt"):
        if path.exists():
            try:
                content = read_checkpoint(path, identity)
            except UserError as error:
                problems.append(str(error))
                warn(str(error))
                continue
            return content, bool(problems)
    if problems:
        raise UserError(f"no checkpoint in {folder} can be read: {problems[0]}")
    return None, False


def save_checkpoint(folder: Path, content: Dict[str, Any]) -> None:
    """Writes last.pt; the one before it becomes last.prev.pt. At every moment at least one of them is whole."""
    last, previous = folder / "last.pt", folder / "last.prev.pt"
    fresh = folder / ".last.pt.new"
    write_atomically(fresh, lambda file: torch.save(content, file))
    if last.exists():
        os.replace(last, previous)
    os.replace(fresh, last)


def cut_metrics(path: Path, step: int) -> None:
    """Drops rows after `step`, and a last line that was cut short: they will be written again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, lambda file: file.write("".join(kept).encode()))


# ======================================================================================================================
# FIXED: several processes, one a GPU
# ======================================================================================================================
class LostRank(Exception):
    """Another process of this training has ended, or has not answered in time."""


class Ranks:
    """The processes that torchrun has started for this training; where there is one, every operation gives back what it is given.

    Each trains on rows of its own and plays slots of its own; process 0 alone writes. All processes meet in `gather`, `share`,
    `maximum` and `average`, so all must call these in the same order.
    """

    ANSWER = timedelta(minutes=10)  # a process that lets the others wait longer at an update has been lost
    WORK = timedelta(hours=24)  # the same where one may have games to play, or a store to build, that others have not

    def __init__(self, cuda: bool) -> None:
        self.rank, self.world = RANK, WORLD
        if self.world > 1:
            with self._meeting():
                # torchrun may keep its store over a restart: what the processes before left there must not be taken for ours.
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                self.store = dist.PrefixStore(f"attempt {attempt}", next(rendezvous("env://"))[0])
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=self.store, rank=self.rank,
                                        world_size=self.world, timeout=self.ANSWER)  # fmt: skip
                self.patient = dist.new_group(backend="gloo", timeout=self.WORK)

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the base of all that torch.distributed raises
            raise LostRank(f"process {self.rank} of {self.world} has lost the others: one of them has ended, and said why, or hangs; "
                           "`torchrun --max-restarts 3 ... --resume true` would go on from the last checkpoint "
                           f"({str(error)[:120]})") from None  # fmt: skip

    def part(self, count: int) -> slice:
        """This process's share of `count` rows."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def gather(self, mine: Any) -> List[Any]:
        """Every process's object, in their order; waits as long as the slowest works."""
        everyone = [mine] * self.world
        if self.world > 1:
            with self._meeting():
                dist.all_gather_object(everyone, mine, group=self.patient)
        return everyone

    def share(self, content: Any) -> Any:
        """Process 0's object."""
        box = [content]
        if self.world > 1:
            with self._meeting():
                dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def maximum(self, number: int) -> int:
        if self.world == 1:
            return number
        box = torch.tensor([number])
        with self._meeting():
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def average(self, tensors: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
        """Replaces each tensor by its mean over the processes, weighted by `weight` []: one all-reduce, the same bits everywhere."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors] + [weight.new_ones(1, dtype=torch.float32)]).mul_(weight)
        with self._meeting():
            dist.all_reduce(flat)
        flat /= flat[-1].clamp(min=1.0)
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors] + [1])):
            tensor.copy_(mean.view_as(tensor))

    def pass_on(self, number: int) -> int:
        """A signal's number that this process or another one got; 0 without waiting if none did."""
        if self.world > 1:
            with self._meeting():
                if number:
                    self.store.set("signal", str(number))
                elif self.store.check(["signal"]):
                    number = int(self.store.get("signal"))
        return number

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


# ======================================================================================================================
# FIXED: training
# ======================================================================================================================
def choose_device(config: TrainConfig) -> torch.device:
    """Each of several processes on a machine takes a GPU of its own."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device is {config.device}, but torch finds no CUDA GPU")
    if WORLD == 1:
        return torch.device("cuda" if config.device == "auto" else config.device)
    if ":" in config.device:
        raise UserError(f"device is {config.device}, but {WORLD} processes need a GPU each: leave device out")
    if LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"{LOCAL_WORLD} processes on a machine with {torch.cuda.device_count()} GPUs: start at most that many")
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)


def choose_precision(config: TrainConfig, device: torch.device) -> Optional[torch.dtype]:
    """The type of autocast's matrix products, or None for float32 throughout."""
    if config.precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if config.precision == "fp16" and device.type != "cuda":
        raise UserError("precision fp16 needs a CUDA GPU; on a CPU use fp32 or bf16")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} if device.type != "cpu" else batch


def load_submission(path: str) -> Any:
    """Module with `Model` and `OfflineAlgorithm`: a file's EDITABLE block, or the whole file if it has no banners."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the submission {path}: {getattr(error, 'strerror', None) or error}") from None
    banners = [found.start() for found in re.finditer(r"^# =+ +EDITABLE (?:BEGIN|END) +=+$", text, re.MULTILINE)]
    if len(banners) not in (0, 2):
        raise UserError(f"the submission {path} must have both EDITABLE banners once, or neither")
    if banners:
        text = "\n" * text.count("\n", 0, banners[0]) + text[banners[0] : banners[1]]  # line numbers stay right
    module = types.ModuleType("submission")
    around = ("torch", "nn", "F", "np", "Categorical", "deepcopy", "ModelBackbone", "soft_update", "asymmetric_l2_loss", "random", "os",
              "dataclass", "asdict", "Any", "Dict", "List", "Optional", "Tuple")  # fmt: skip
    module.__dict__.update({name: globals()[name] for name in around})
    sys.modules["submission"] = module  # dataclasses look their module up
    try:
        exec(compile(text, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"the submission {path} does not run: {type(error).__name__}: {error}") from error
    for name in ("Model", "OfflineAlgorithm"):
        if not hasattr(module, name):
            raise UserError(f"the submission {path} defines no {name}")
    return module


def make_algorithm(config: TrainConfig, device: torch.device) -> Any:
    """The submission's OfflineAlgorithm on a fresh backbone. Raises UserError for wrong algorithm settings."""
    algorithm_class = load_submission(config.submission).OfflineAlgorithm if config.submission else OfflineAlgorithm
    backbone = ModelBackbone(NUM_ACTIONS, config.rnn_hidden_dim, config.rnn_layers, config.rnn_dropout, config.use_prev_action)
    try:
        algorithm = algorithm_class(backbone=backbone.to(device), config=config, device=str(device))
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.algorithm and not hasattr(algorithm, "hyper"):
        raise UserError(f"the submission {config.submission} takes no algorithm settings, but is given {', '.join(config.algorithm)}")
    return algorithm


def split_weight_decay(parameters: Sequence[Tuple[str, nn.Parameter]], weight_decay: float) -> List[Dict[str, Any]]:
    """AdamW's groups: decay on matrices only, not on biases, embeddings' offsets or norms."""
    decayed = [parameter for _, parameter in parameters if parameter.dim() > 1]
    others = [parameter for _, parameter in parameters if parameter.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate_at(config: TrainConfig, transitions: int) -> float:
    """Warm-up, then constant or cosine down to a tenth. Counted in transitions, so it means the same at any batch size."""
    warm = min(1.0, transitions / config.warmup_transitions) if config.warmup_transitions else 1.0
    if config.lr_schedule == "constant":
        return config.learning_rate * warm
    total = config.update_steps * config.batch_size * config.seq_len * WORLD
    return config.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, transitions / total))))


MAX_SKIPPED_IN_ROW = 50  # fp16 may need some 20 to find its loss scale


def recordings_folder(config: TrainConfig) -> Optional[Path]:
    """The folder of `eval_record`, made if need be. Raises UserError where it cannot be written to."""
    if config.eval_record is None:
        return None
    folder = Path(config.eval_record).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot record games in {folder}: {error.strerror}; give a writable folder with --eval_record") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot record games in {folder}: it is not writable; give a writable folder with --eval_record")
    return folder


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; raised at the next point where the run can be left and resumed."""


class Trainer:
    """Everything of a run: data, algorithm, optimizer, folder, and the loop over them."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = choose_device(config)
        self.ranks = Ranks(self.device.type == "cuda")
        self.precision = choose_precision(config, self.device)
        seed_everything(config.train_seed)
        self.algorithm = make_algorithm(config, self.device)
        self.algorithm.info_as_tensors = True
        self.algorithm.model.backbone.acting_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.eval_precision]
        self.games = Games([open_or_build_store(config.data_path, config.store_path, name) for name in config.characters])
        heldout = self.games.heldout(config.heldout_share)
        self.training_games, self.heldout_games = np.flatnonzero(~heldout), np.flatnonzero(heldout)
        self.reward_scale = self.games.reward_scale(self.training_games, config.gamma)
        self.loader = self._loader(self.training_games, config.batch_size * self.ranks.world, config.train_seed)
        groups = split_weight_decay(list(self.algorithm.model.named_parameters()), config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=self.device.type == "cuda")
        make_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # torch 2.0 has the second alone
        self.scaler = make_scaler(enabled=self.precision is torch.float16)
        self.step, self.evaluated_step, self.best_heldout = 0, 0, math.inf
        self.rnn_states: Dict[str, Any] = {}
        self.skipped = self.skipped_in_row = 0
        self.shown = dict.fromkeys(("loss", "score", "rate"), "")  # beside the progress bar
        self.pool: Optional[GamePool] = None
        self.recordings = recordings_folder(config)
        self.stop_signal = 0  # number of the signal that asked for it
        self.identity = run_identity(config)
        self._check_that_processes_agree()
        if self.ranks.rank:
            torch.manual_seed(derived_seed(config.train_seed, self.ranks.rank))  # equal weights by now; dropout is to differ
        chosen = choose_run_folder(config, self.identity) if self.ranks.rank == 0 else (None, None, None)
        (self.folder, resumed), self.lock = self.ranks.share(chosen[:2]), chosen[2]
        self.wandb_id: Optional[str] = None
        if resumed:
            self._resume()
        elif self.ranks.rank == 0:
            self._describe()
        self.timers = Timers()
        wandb_run = start_wandb(config, self.folder, self.wandb_id) if self.ranks.rank == 0 else None
        self.wandb_id = wandb_run.id if wandb_run is not None else self.wandb_id
        self.logger = RunLogger(self.folder / "metrics.jsonl" if self.ranks.rank == 0 else Path(os.devnull), wandb_run)

    def _check_that_processes_agree(self) -> None:
        """On several machines settings, scripts and games may differ by mistake, and so may what a seed gives."""
        games = hashlib.sha256(repr((self.games.names, self.games.frames.tolist())).encode()).hexdigest()
        facts = self.ranks.gather({"settings or scripts": self.identity, "games": games, "initial weights": self._weights_sum()})
        for name in facts[0]:
            others = [rank for rank, fact in enumerate(facts) if fact[name] != facts[0][name]]
            if others:
                raise UserError(f"process {others[0]} has not the same {name} as process 0")

    def _weights_sum(self) -> float:
        """Differs if two processes' weights do; one process has nothing to compare, and need not add up 57 million."""
        if self.ranks.world == 1:
            return 0.0
        return float(sum(parameter.detach().sum(dtype=torch.float64) for parameter in self.algorithm.parameters()))

    def _loader(self, chosen: np.ndarray, rows: int, seed: Optional[int], **options: Any) -> ChunkLoader:
        """Of batches with so many rows on all processes together, this process's rows."""
        return ChunkLoader(self.games, chosen, rows, self.config.seq_len, seed, self.reward_scale, self.config.clip_range,
                           rows=self.ranks.part(rows), threads=self.config.data_workers, pin=self.device.type == "cuda",
                           **options)  # fmt: skip

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.precision) if self.precision else contextlib.nullcontext()

    @property
    def transitions(self) -> int:
        return self.step * self.transitions_per_update

    @property
    def transitions_per_update(self) -> int:
        return self.config.batch_size * self.config.seq_len * self.ranks.world

    # --- folder and checkpoints
    def _describe(self, finished_at_step: int = 0) -> None:
        write_atomically(self.folder / "config.yaml", lambda file: file.write(pyrallis.dump(self.config).encode()))
        described = describe_run(self.config, self.identity, self.device)
        write_json(self.folder / "config.json", {**described, "finished_at_step": finished_at_step})

    def _extra_state(self) -> Dict[str, Any]:
        """State of the algorithm beyond its model: its own state_dict, or its other modules (target networks)."""
        if hasattr(self.algorithm, "state_dict"):
            return self.algorithm.state_dict()
        modules = {name: part for name, part in vars(self.algorithm).items() if isinstance(part, nn.Module) and name != "model"}
        return {name: part.state_dict() for name, part in modules.items()}

    def _load_extra_state(self, state: Dict[str, Any]) -> None:
        if hasattr(self.algorithm, "load_state_dict"):
            self.algorithm.load_state_dict(state)
        else:
            for name, content in state.items():
                getattr(self.algorithm, name).load_state_dict(content)

    def _data_fingerprints(self) -> List[str]:
        return [str(store.meta["fingerprint"]) for store in self.games.stores]

    def _own_state(self) -> Dict[str, Any]:
        """What each of several processes has for itself."""
        rng = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        states = {name: tuple(part.cpu() for part in parts) for name, parts in self.rnn_states.items()}
        return {"rnn_states": states, "rng": rng}

    def save(self) -> None:
        parts = self.ranks.gather((self._weights_sum(), self._own_state()))
        if any(weights != parts[0][0] for weights, _ in parts):
            raise RuntimeError(f"the processes' weights differ at step {self.step}: this must not happen, and no checkpoint is written")
        if self.ranks.rank:
            return
        content = {
            "format": CHECKPOINT_FORMAT, "identity": self.identity, "step": self.step, "evaluated_step": self.evaluated_step,
            "skipped": self.skipped, "model": self.algorithm.model.state_dict(),
            "algorithm": self._extra_state(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "ranks": [state for _, state in parts], "best_heldout": self.best_heldout, "wandb_id": self.wandb_id,
            "data": self._data_fingerprints(), "config": json.dumps(asdict(self.config)),
        }  # fmt: skip
        save_checkpoint(self.folder, content)

    def _prepare_to_resume(self) -> Optional[Dict[str, Any]]:
        """The checkpoint to go on from, if there is one; the folder is made to fit it."""
        content, damaged = newest_checkpoint(self.folder, self.identity)
        if content is not None and content["data"] != self._data_fingerprints():
            raise UserError(f"{self.folder} cannot be resumed: the games in the data folder have changed since")
        for path in self.folder.glob(".*.tmp"):  # left by a process that was killed; the folder's lock says nobody writes it
            path.unlink()
        if damaged:  # it must not take the place of the whole one at the next save
            os.replace(self.folder / "last.pt", self.folder / "last.damaged.pt")
        self._describe(finished_at_step=read_json(self.folder / "config.json").get("finished_at_step", 0))
        cut_metrics(self.folder / "metrics.jsonl", content["step"] if content else 0)
        return content

    def _resume(self) -> None:
        content = self.ranks.share(self._prepare_to_resume() if self.ranks.rank == 0 else None)
        if content is None:
            say(f"resuming {self.folder} from its beginning: it holds no checkpoint yet")
            return
        self.algorithm.model.load_state_dict(content["model"])
        self._load_extra_state(content["algorithm"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        own = content["ranks"][self.ranks.rank]
        self.rnn_states = {name: tuple(part.to(self.device) for part in parts) for name, parts in own["rnn_states"].items()}
        self.step, self.evaluated_step, self.skipped = content["step"], content["evaluated_step"], content["skipped"]
        self.best_heldout, self.wandb_id = content["best_heldout"], content["wandb_id"]
        torch.set_rng_state(own["rng"]["torch"])
        if "cuda" in own["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["rng"]["cuda"], self.device)
        say(f"resuming {self.folder} at step {self.step}")

    # --- one update
    def _synchronize(self, wanted: bool) -> None:
        if wanted and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def update(self, stream: Iterator[Batch], timed: bool) -> Dict[str, Any]:
        """One gradient step; returns the algorithm's info. `timed` waits for the GPU around each part."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.config, self.transitions)
        with self.timers.measure("times/batch_loading_cpu"):
            batch = next(stream)
        with self.timers.measure("times/batch_loading_gpu"):
            batch = to_device(batch, self.device)
            self._synchronize(timed)
        with self.timers.measure("times/forward_pass"):
            previous = batch.pop("prev_actions")
            with self.autocast():
                loss, states, info = self.algorithm.train_step(batch, previous, self.rnn_states)
            info = {"loss": loss.detach(), **info}
            self.rnn_states = {name: tuple(part.detach() for part in parts) for name, parts in states.items()}
            self._synchronize(timed)
        with self.timers.measure("times/backward_pass"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self._average_gradients(batch)
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.algorithm.parameters(), self.config.clip_grad_norm or math.inf)
            info["grad_norm"], info["skipped_updates"] = norm, self.skipped
            if math.isfinite(float(norm)):
                self.scaler.step(self.optimizer)
                self.algorithm.after_gradient_step()
                self.skipped_in_row = 0
            else:
                self._skip_update()
            self.scaler.update()
            self._synchronize(timed)
        self.step += 1
        return info

    def _average_gradients(self, batch: Batch) -> None:
        """Means over all processes of the gradients and of the numbers that the algorithm keeps (running means, say).

        Weighted by the frames that count, so that the gradient of a masked mean is the one over all rows, to rounding. What an
        algorithm normalises within its batch, as ours does its weights, it normalises within each process's rows.
        """
        if self.ranks.world == 1:
            return
        state = self.algorithm.state_dict() if hasattr(self.algorithm, "state_dict") else {}
        numbers = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dtype == torch.float32]
        gradients = [parameter.grad for parameter in self.algorithm.parameters() if parameter.grad is not None]
        self.ranks.average([*gradients, *numbers], batch["mask"][:, :-1].sum())
        if numbers:
            self.algorithm.load_state_dict(state)

    def _skip_update(self) -> None:
        """A loss or gradient that is not finite must not reach the weights; many in a row end the run."""
        self.skipped, self.skipped_in_row, self.rnn_states = self.skipped + 1, self.skipped_in_row + 1, {}
        if self.ranks.rank == 0:  # it is all processes' gradient
            warn(f"the gradient at step {self.step + 1} is not finite: update skipped, recurrent states cleared")
        if self.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise UserError(f"{MAX_SKIPPED_IN_ROW} updates in a row had a gradient that is not finite, up to step {self.step + 1}: "
                            "lower learning_rate or set clip_grad_norm, and start from an earlier checkpoint")  # fmt: skip

    def log_training(self, info: Dict[str, Any], rate: float) -> None:
        """Means over the processes, and the weights of all their counting frames where the algorithm keeps (weights, mask)."""
        weights, mask = getattr(self.algorithm, "last_weights", (torch.zeros(0), torch.zeros(0)))
        parts = self.ranks.gather(({name: float(value) for name, value in info.items()}, weights[mask > 0].float().cpu().numpy()))
        info = {name: sum(part[name] for part, _ in parts) / len(parts) for name in parts[0][0]}
        weights = np.concatenate([part for _, part in parts])
        weights = weights[np.isfinite(weights)]
        metrics = {f"train/{name}": value for name, value in info.items() if name != "loss"}
        row = {"loss": info["loss"], **metrics, **self.timers.take(), "train/learning_rate": self.optimizer.param_groups[0]["lr"],
               "charts/SPS": rate}  # fmt: skip
        self.logger.log(row, self.step, self.transitions, lambda wandb: {
            "train/weights": wandb.Histogram(np_histogram=np.histogram(weights, bins=50))} if len(weights) else {})  # fmt: skip
        self.shown.update({"loss": f"loss {info['loss']:.4g}", "rate": f"{rate:,.0f} transitions/s"})
        names = ("loss", "loss_per_action", "accuracy", "effective_sample_size")
        brief: Dict[str, Any] = {name: info[name] for name in names if name in info}
        RunLogger.line("TRAIN_METRICS", {"step": self.step, "transitions": self.transitions, **brief, "transitions_per_s": rate})

    # --- evaluation
    def evaluate(self) -> None:
        """Held-out loss, then games of every character; writes metrics, arrays and the best weights."""
        row: Dict[str, float] = {}
        timers = Timers()
        if len(self.heldout_games) and self.config.eval_heldout_frames:
            rows = min(self.config.batch_size * self.ranks.world, max(32, self.ranks.world))
            loader = self._loader(self.heldout_games, rows, None, gamma_for_returns=self.config.gamma)
            metrics = evaluate_heldout(self.algorithm, loader, self.config.eval_heldout_frames, self.device, self.autocast,
                                       self.ranks.gather)  # fmt: skip
            row.update({f"heldout/{name}": value for name, value in metrics.items()})
            yardstick = metrics.get("loss_per_action", metrics.get("loss", math.inf))
            if yardstick < self.best_heldout:
                self.best_heldout = yardstick
                self._save_weights("best.pt")
        summaries: Dict[str, Dict[str, float]] = {}
        games: List[Dict[str, Any]] = []
        if self.config.eval_episodes:
            for character in self.config.characters:
                name = f"{self.folder.name}-step{self.step}-{character}"
                record = str(self.recordings / name) if self.recordings else None
                with timers.measure("times/evaluation_cpu"):
                    results = self._play(character, record)
                if self.ranks.rank == 0:
                    games += self._save_results(results, character, record)
                summaries[character] = summary = summarize_games(results, character)
                prefix = "" if len(self.config.characters) == 1 else f"{character}/"
                row.update({prefix + name: value for name, value in summary.items()})
        scores = {column_name(character): summary["normalized_score"] for character, summary in summaries.items()}
        if scores:
            scores = {"normalized_score": geometric_mean(list(scores.values())), **scores}
            row.update({**{f"eval/{name}": score for name, score in scores.items()}, "eval/autoascend": 1.0})
            self.shown["score"] = f"score {scores['normalized_score']:.4f}"
        row.update(timers.take())
        self.logger.log(row, self.step, self.transitions, lambda wandb: self.logger.evaluation_media(wandb, games) if games else {})
        heldout = {name[len("heldout/"):]: value for name, value in row.items() if name.startswith("heldout/")}
        if heldout:
            RunLogger.line("HELDOUT_METRICS", {"step": self.step, **heldout})
        for character, summary in summaries.items():
            say(f"{character}:\nD4RL score: {summary['normalized_score']:.6f}")  # the line that the benchmark reads
        if scores:
            say(score_table(summaries, self.config.eval_episodes))
            RunLogger.line("TEST_METRICS", scores)
        if self.config.keep_checkpoints:
            self._save_weights(f"{self.step}.pt")

    def _play(self, character: str, record: Optional[str]) -> List[GameResult]:
        """The character's games, shared out over the processes by their slots: each game goes as it would with one process."""
        config, results = self.config, None
        if self.pool is None:
            mine = range(config.eval_processes)[self.ranks.rank :: self.ranks.world]
            self.pool = GamePool(config.eval_processes, config.eval_workers or -(-usable_cores() // LOCAL_WORLD), mine)
        with contextlib.suppress(Stopped):
            results = play_games(self.pool, self.algorithm.model, character, config.eval_episodes, config.eval_seed, config.eval_max_steps,
                                 self.device, config.eval_clear_state, self._check_stop_here, record)  # fmt: skip
        parts = self.ranks.gather(results)
        if any(part is None for part in parts):
            self._check_stop()
        return sorted(result for part in parts for result in part)

    def _save_weights(self, name: str) -> None:
        content = {"format": CHECKPOINT_FORMAT, "identity": self.identity, "step": self.step, "model": self.algorithm.model.state_dict(),
                   "heldout": self.best_heldout, "config": json.dumps(asdict(self.config))}  # fmt: skip
        if self.ranks.rank == 0:
            write_atomically(self.folder / name, lambda file: torch.save(content, file))

    def _save_results(self, results: Sequence[GameResult], character: str, record: Optional[str]) -> List[Dict[str, Any]]:
        """One value a game, in the order of the games' seeds, and all that is known of each as a table, which is returned."""
        scores = np.array([result.score for result in results])
        arrays = {"returns": scores, "depths": np.array([result.depth for result in results]),
                  "normalized_scores": scores / AUTOASCEND_MEAN_SCORE[character]}  # fmt: skip
        for name, array in arrays.items():
            write_atomically(self.folder / f"{self.step}_{character}_{name}.npy", partial(np.save, arr=array))
        rows, table = game_rows(results, character, self.config.eval_seed, record), io.StringIO(newline="")
        csv.writer(table).writerows([rows[0].keys(), *(row.values() for row in rows)])
        write_atomically(self.folder / f"{self.step}_{character}_games.csv", lambda file: file.write(table.getvalue().encode()))
        for name, row in (("best", max(rows, key=lambda row: row["score"])), ("last", rows[-1])):
            if row["recording"]:
                say(f"{name} game of {character} (score {row['score']:.0f}): python scripts/watch.py --game {row['recording']}")
                self.logger.keep_game(row["recording"], f"{self.step}_{character}_{name}.ttyrec3.bz2")
            elif self.recordings:
                warn(f"the {name} game of {character} was recorded on another machine: wandb does not get it")
        return rows

    # --- the loop
    def _summary(self) -> List[str]:
        """The lines that a run begins with."""
        config, model, first, lines = self.config, self.algorithm.model, 0, []
        for character, store in zip(config.characters, self.games.stores):
            parts = [chosen[(chosen >= first) & (chosen < first + len(store))] for chosen in (self.training_games, self.heldout_games)]
            train, heldout = (f"{len(part):,} ({int(self.games.frames[part].sum()):,} frames)" for part in parts)
            lines.append(f"games of {character}: {train} for training, {heldout} held out")
            first += len(store)
        total, backbone = (sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.backbone))
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        rows = config.batch_size * self.ranks.world
        return [*lines, f"rewards: over {self.reward_scale:.2f} points, then clipped to +-{config.clip_range:g}",
                f"model: {backbone:,} parameters in the backbone, {total - backbone:,} in the head",
                f"device: {self.device} ({device}), {str(self.precision or torch.float32)[6:]}, processes: {self.ranks.world}",
                (f"batch: {rows:,} rows x {config.seq_len} steps = {self.transitions_per_update:,} transitions; "
                 f"{self.loader.plan.steps:,} updates a pass, {config.update_steps:,} in all"),
                f"run: {self.folder}" + (f"; games are recorded in {self.recordings}" if self.recordings else "")]  # fmt: skip

    def run(self) -> None:
        for line in self._summary():
            say(line)
        before = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        except Stopped:
            self.save()
            say(f"stopped at step {self.step}; --resume true goes on from here")
            self.ranks.close()
            raise
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.ranks.rank == 0:
            described = read_json(self.folder / "config.json")
            write_json(self.folder / "config.json", {**described, "finished_at_step": self.step})
        self.ranks.close()

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        self.stop_signal = number

    def _check_stop(self) -> None:
        """Raises Stopped on all processes if any of them got a signal."""
        number = self.ranks.maximum(self.stop_signal)
        if number:
            raise Stopped(number)

    def _check_stop_here(self) -> None:
        """The same where the other processes are elsewhere."""
        self.stop_signal = self.ranks.pass_on(self.stop_signal)
        if self.stop_signal:
            raise Stopped(self.stop_signal)

    def _loop(self) -> None:
        """Updates, and at their steps: logged rows, evaluations, checkpoints. An evaluation cut short is played again whole."""
        config, last = self.config, self.config.update_steps
        stream = self.loader.stream(self.step)
        bar = progress(total=last, initial=self.step, bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}")
        since, begin = self.step, time.perf_counter()
        try:
            while True:
                if self.step > self.evaluated_step and (self.step % config.eval_every == 0 or self.step == last):
                    self.evaluate()
                    bar.set_postfix_str(", ".join(filter(None, self.shown.values())))
                    self.evaluated_step = self.step
                    since, begin = self.step, time.perf_counter()  # the clock of transitions/s stops while games are played
                if self.step > 0 and (self.step % config.checkpoint_every == 0 or self.step == last):
                    self.save()
                if self.step >= last:
                    return
                self._check_stop()
                logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == last
                info = self.update(stream, timed=logged)
                bar.update()
                if logged:
                    self.log_training(info, (self.step - since) * self.transitions_per_update / (time.perf_counter() - begin))
                    bar.set_postfix_str(", ".join(filter(None, self.shown.values())))
                    since, begin = self.step, time.perf_counter()
        finally:
            bar.close()
            stream.close()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        self.logger.close()
        if self.lock is not None:
            os.close(self.lock)


def train(config: TrainConfig) -> Path:
    """Trains, evaluates, and returns the run's folder."""
    trainer = Trainer(config)
    trainer.run()
    return trainer.folder


def main(argv: Optional[Sequence[str]] = None) -> int:
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        keep_freed_memory()
        train(config)
    except UserError as error:
        print("error: " + " ".join(str(error).split())[:2000], file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.args[0]  # as the shell reports a process ended by this signal
    except LostRank as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training had begun
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
