"""Will the benchmark take this block? Runs a file's EDITABLE block inside a stand-in for the benchmark's own file.

    python scripts/check_submission.py                            the block of custom_nethack_pomdp.py
    python scripts/check_submission.py scripts/references/iql.py  a bare block, without banners
    python scripts/check_submission.py --export block.py          also writes the block, if it passes

One line a finding, lines numbered as in the file. Exit code 0: everything passed, 1: something did not, 2: there was
nothing to check, with one line on standard error. The block is executed: check only what you would run.

The benchmark (MLS-Bench, task rl-offline-pomdp) copies one block over the same block of its own file, which is built on
Katakomba's recurrent scripts, under Python 3.8 and torch 2.0.1. The stand-in follows that file in our own code: the
names around the block, a backbone that views its inputs and has two scripted encoders, batches of 128 x 16 float
tensors that overlap by one step, rewards scaled by a running RMS, mixed precision with a GradScaler, states carried
from batch to batch and never cleared, and 14 slots in evaluation. Its games are noise; standin_study.py has real ones.
Axes: B batch, T time, N games.
"""

import argparse
import ast
import builtins
import importlib.util
import math
import os
import re
import symtable
import sys
import tempfile
import traceback
from copy import deepcopy
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

DEFAULT_FILE = Path(__file__).resolve().parents[1] / "custom_nethack_pomdp.py"
EXPORT_MARK = "# An exported block. Written by scripts/check_submission.py --export, which may overwrite this file.\n"
NUM_ACTIONS = 121
SCREEN_SHAPE = (3, 108, 108)  # an 18 x 18 crop round the cursor, 6 x 6 pixels a cell
SLOTS = 14  # games at a time in the benchmark's evaluation
TASK_LIMIT = 2_000_000  # parameters beyond the backbone, from the task's text
SCRIPT_LIMIT = int(1.05 * 254_318)  # its budget script's: by the largest reference's head, IQL's
# of the small loop: enough for carried states, an update of a target network and several game ends
STEPS = 8
SMALL = {"rnn_hidden_dim": 32, "width": 8}

Batch = Dict[str, torch.Tensor]
Arrays = Dict[str, np.ndarray]


# --- The stand-in: what surrounds the block in the benchmark's file
DEFAULTS = dict(
    character="mon-hum-neu", data_mode="in_memory", update_steps=100_000, batch_size=128, seq_len=16
)
DEFAULTS.update(
    project="NetHack", group="custom-nethack-pomdp", name="custom", version=0, checkpoints_path=None
)
DEFAULTS.update(
    rnn_hidden_dim=2048,
    rnn_layers=2,
    use_prev_action=True,
    rnn_dropout=0.0,
    clip_range=10.0,
    tau=0.005,
)
DEFAULTS.update(
    gamma=0.999,
    learning_rate=3e-4,
    weight_decay=0.0,
    clip_grad_norm=None,
    train_seed=42,
    eval_seed=50,
)
DEFAULTS.update(eval_every=10_000, eval_episodes=50, eval_processes=14, render_processes=14)
# The benchmark's fields and defaults, and no others: a block that reads any other from `config` fails there.
TrainConfig: Any = make_dataclass(
    "TrainConfig", [(name, Any, field(default=x)) for name, x in DEFAULTS.items()]
)


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    for old, new in zip(target.parameters(), source.parameters()):
        old.lerp_(new, tau)


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    return torch.mean(torch.abs(tau - (u < 0).float()) * u.square())


# Autocast's memory, as PyTorch had it until the end of 2025: a weight is cast once. If its first use was without
# gradient (a burn-in, say), so is the result, and every later use silently trains nothing (pytorch issues 65766,
# 112583). The benchmark's PyTorch is older, ours is not: hence this note of each backbone's first use.
CASTS: Dict[int, bool] = {}


class ModelBackbone(nn.Module):
    """Encoders of the top line, the bottom two lines, the picture and the previous action, into an LSTM.

    `prev_actions` [B, T] are one-hot over exactly `action_dim` classes: an index outside of them and a dtype other than
    int64 are errors. `width` divides Katakomba's sizes of the encoders, for fast checks.
    """

    def __init__(
        self, action_dim: int, rnn_hidden_dim: int = 2048, rnn_layers: int = 2, width: int = 1
    ) -> None:
        super().__init__()
        self.num_actions, self.rnn_hidden_dim = action_dim, rnn_hidden_dim
        line, screen, c = 128 // width, 512 // width, 32 // width

        def layer(kind: Any, *sizes: int) -> List[nn.Module]:
            return [kind(*sizes), nn.ELU()]

        self.topline = nn.Sequential(
            *layer(nn.Linear, 80 * 256, line), *layer(nn.Linear, line, line)
        )
        lines = [*layer(nn.Conv1d, 2, c, 8, 4), *layer(nn.Conv1d, c, 2 * c, 4), nn.Flatten()]
        lines += [*layer(nn.Linear, 2 * c * 36, line), *layer(nn.Linear, line, line)]
        pixels = [*layer(nn.Conv2d, 3, c, 8, 6), *layer(nn.Conv2d, c, 2 * c, 4, 2)]
        pixels += [
            *layer(nn.Conv2d, 2 * c, 4 * c, 3, 2),
            *layer(nn.Conv2d, 4 * c, 4 * c, 3, 1),
            nn.Flatten(),
        ]
        # Scripted, as there: a copy made where gradients are recorded has parameters that are no leaves.
        self.bottom = torch.jit.script(nn.Sequential(*lines))
        self.screen = torch.jit.script(nn.Sequential(*pixels, *layer(nn.Linear, 4 * c, screen)))
        self.rnn = nn.LSTM(
            2 * line + screen + action_dim, rnn_hidden_dim, rnn_layers, batch_first=True
        )

    def _encode(self, inputs: Batch) -> torch.Tensor:
        chars, screen = inputs["tty_chars"], inputs["screen_image"]
        B, T = chars.shape[:2]

        def rows(x: torch.Tensor) -> torch.Tensor:
            """[B, T, ...] -> [B * T, ...], a view: a slice in time of a float batch is not copied before, and fails."""
            return x.to(torch.float, memory_format=torch.contiguous_format).view(
                B * T, *x.shape[2:]
            )

        # [B*T, 80*256]
        top = nn.functional.one_hot(rows(chars[..., 0, :]).long(), 256).flatten(1).float()
        bottom = rows(chars[..., -2:, :]).flatten(1)  # [B*T, 160]
        digits = ((bottom >= 45) & (bottom <= 57)) * (bottom - 47) / 10
        bottom = torch.stack([(bottom - 32) / 96, digits], dim=1)  # [B*T, 2, 160]
        parts = [self.topline(top), self.bottom(bottom), self.screen(rows(screen) / 255.0)]
        parts.append(
            nn.functional.one_hot(inputs["prev_actions"], self.num_actions).view(B * T, -1)
        )
        return torch.cat(parts, dim=-1).view(B, T, -1)

    def forward(self, inputs: Batch, state: Any = None) -> Tuple[torch.Tensor, Any]:
        if inputs["tty_chars"].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.rnn(self._encode(inputs), state)
        # A CPU has no float16 LSTM: sums in float32, the rest as on the benchmark's GPU, outputs and states in half
        # precision and encoders' weights cast once for all calls (autocast does not keep an LSTM's).
        dtype, gradient = torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()
        if torch.is_autocast_cache_enabled():
            gradient = CASTS.setdefault(id(self), gradient) and gradient
        with torch.autocast("cpu", enabled=False):
            with torch.set_grad_enabled(gradient):
                encoded = self._encode(inputs)
            output, state = self.rnn(
                encoded, None if state is None else tuple(part.float() for part in state)
            )
        return output.to(dtype), tuple(part.to(dtype) for part in state)


# What the block may use without defining or importing it: what the benchmark's file has, but for logging and progress.
PROVIDED: Dict[str, Any] = {}
IMPORTS = """
import os, random, sys, uuid
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Tuple
from torch.distributions import Categorical
DEVICE, LSTM_HIDDEN, UPDATE_INFO = "cpu", Tuple[torch.Tensor, torch.Tensor], Dict[str, Any]
"""
exec(IMPORTS, PROVIDED)
PROVIDED.update(
    {part.__name__: part for part in (TrainConfig, ModelBackbone, soft_update, asymmetric_l2_loss)}
)


def made_up_frames(rng: np.random.Generator, *lead: int) -> Arrays:
    """Observations of noise, each [*lead, ...], with the benchmark's keys, shapes and dtypes. Only the status lines can
    be read: a character's in turn 1 or 2, so that new games are seen to begin."""
    chars = rng.integers(32, 127, (*lead, 24, 80)).astype(np.uint8)
    status = [
        f"{'Agent St:18 Dx:12 Co:17 In:8 Wi:9 Ch:10':80}Dlvl:1 T:{turn:<71}" for turn in (1, 2)
    ]
    chars[..., 22:, :] = np.array([list(text.encode()) for text in status]).reshape(2, 2, 80)[
        rng.integers(0, 2, lead)
    ]
    return {
        "tty_chars": chars,
        "tty_colors": rng.integers(0, 32, (*lead, 24, 80)).astype(np.int8),
        "tty_cursor": rng.integers(0, (24, 80), (*lead, 2)).astype(np.uint8),
        "screen_image": rng.integers(0, 256, (*lead, *SCREEN_SHAPE)).astype(np.uint8),
    }


def overlapping(steps: Callable[[int], Arrays], seq_len: int) -> Iterator[Arrays]:
    """Batches [B, seq_len + 1, ...] as the benchmark's buffer gives them: each begins with the step that ended the one
    before. `steps(n)`: the next n of them, [B, n, ...]."""
    batch = steps(seq_len + 1)
    while True:
        yield {name: value.copy() for name, value in batch.items()}
        fresh = steps(seq_len)
        batch = {name: np.concatenate([batch[name][:, -1:], fresh[name]], axis=1) for name in batch}


def made_up_batches(config: Any, seed: int, game_end: float = 0.15) -> Iterator[Arrays]:
    """Noise. A game ends with probability `game_end` a step, so also at once, and at a chunk's first and last step."""
    rng = np.random.default_rng(seed)

    def steps(count: int) -> Arrays:
        shape = (config.batch_size, count)
        rewards = rng.integers(1, 50, shape) * (rng.random(shape) < 0.2) * 1.0
        actions, dones = rng.integers(0, NUM_ACTIONS, shape), rng.random(shape) < game_end
        return {
            **made_up_frames(rng, *shape),
            "actions": actions,
            "rewards": rewards,
            "dones": dones,
        }

    return overlapping(steps, config.seq_len)


def run_training(
    algo: Any, config: Any, batches: Any, steps: int, dtype: Any = None, on_step: Any = None
) -> None:
    """The benchmark's training loop. `dtype` is that of autocast, or None for float32; `on_step(step, batch, before,
    loss, states, info)` sees each step with its gradients, and in `before` a copy of the batch as the block got it."""
    device = next(algo.model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    named = list(algo.model.named_parameters())
    assert all(p.requires_grad for _, p in named), (
        "the weight-decay split asserts a gradient of every parameter"
    )
    groups: Dict[bool, List[nn.Parameter]] = {True: [], False: []}  # with weight decay and without
    for name, parameter in named:
        groups["weight" in name and "norm" not in name and "bn" not in name].append(parameter)
    options = [
        {"params": groups[decay], "weight_decay": config.weight_decay * decay}
        for decay in (False, True)
    ]
    optimizer = torch.optim.AdamW(options, lr=config.learning_rate)
    # discounted sums of rewards: over batches for each place in the chunk, as there, not along it
    running: Any = 0.0
    squares, count = 0.0, 0
    # 0 is a real action (north)
    prev_actions = torch.zeros((config.batch_size, 1), dtype=torch.long, device=device)
    states: Dict[str, Any] = {}
    for step in range(1, steps + 1):
        data = next(batches)
        running = running * config.gamma + data["rewards"]
        squares, count = squares + float((running**2).sum()), count + running.size
        running = running * ~data["dones"]
        data["rewards"] = data["rewards"] / max(0.01, (squares / count) ** 0.5)
        data["rewards"] = np.clip(data["rewards"], -config.clip_range, config.clip_range)
        batch = {
            name: torch.as_tensor(value, dtype=torch.float, device=device)
            for name, value in data.items()
        }
        before = {name: value.clone() for name, value in batch.items()}
        CASTS.clear()
        half = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with mock.patch.object(torch, "clear_autocast_cache", CASTS.clear), half:
            loss, states, info = algo.train_step(batch, prev_actions, states)
        prev_actions = before["actions"][:, -2:-1].long()
        scaler.scale(loss).backward()
        if on_step is not None:
            on_step(step, batch, before, loss, states, info)
        if config.clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(algo.model.parameters(), config.clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        algo.after_gradient_step()
        # There every 1,000th step, for the line of metrics.
        info = {
            name: value.item() if hasattr(value, "item") else value for name, value in info.items()
        }


@torch.no_grad()
def run_acting(model: Any, ticks: int, overwritten: bool = True) -> List[Any]:
    """The benchmark's evaluation, of noise: each tick's actions as `vec_act` gave them. As there, the first previous
    action is a float 0 and the state None, neither is ever cleared, and the arrays of `obs` are overwritten by the next
    tick (not `overwritten`: new ones at each tick, to compare with)."""
    rng = np.random.default_rng(0)
    model.eval()
    shared, state, taken = made_up_frames(rng, SLOTS), None, []
    actions: Any = np.zeros(SLOTS, dtype=float)
    for _ in range(ticks):
        actions, state = model.vec_act({**shared, "prev_actions": actions}, state, device="cpu")
        taken.append(actions)
        for name, value in made_up_frames(rng, SLOTS).items():
            shared[name] = shared[name] if overwritten else value
            shared[name][...] = value
    model.train()
    return taken


# --- Taking the block out
BANNER = r"(?m)^(?:# =+\n)?# =+ +EDITABLE (BEGIN|END) +=+\n(?:# =+\n)?"


class Block(NamedTuple):
    path: str
    source: str
    first_line: int = 1  # of the block in the file
    whole_file: bool = False  # the file has banners and more around them


def read_block(path: Any) -> Block:
    """The block between a file's two banners, or all of it where it is a bare block; ValueError where it is neither."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    banners = list(re.finditer(BANNER, text))
    if [banner.group(1) for banner in banners] == ["BEGIN", "END"]:
        begin, end = banners[0].end(), banners[1].start()
        return Block(str(path), text[begin:end], text[:begin].count("\n") + 1, True)
    if banners:
        found = ", ".join(
            f"{banner.group(1)} in line {text[: banner.end()].count(chr(10))}" for banner in banners
        )
        raise ValueError(
            f"{path}: there must be a banner EDITABLE BEGIN and then one EDITABLE END; there is {found}"
        )
    if not all(re.search(rf"(?m)^class {name}\b", text) for name in ("Model", "OfflineAlgorithm")):
        raise ValueError(
            f"{path}: neither EDITABLE banners nor a bare block, with classes Model and OfflineAlgorithm"
        )
    mark = len(EXPORT_MARK) * text.startswith(EXPORT_MARK)
    return Block(str(path), text[mark:], 1 + (mark > 0))


# --- Checks of the text
# What people reach for and Python 3.8 or torch 2.0.1 lack: full names, attributes of anything, keywords of calls.
TOO_NEW = """functools.cache itertools.pairwise .removeprefix .removesuffix .bit_count zip(strict=) dataclass(slots=)
    dataclass(kw_only=) torch.accelerator torch.amp.GradScaler torch.amp.custom_bwd torch.amp.custom_fwd torch.compiler
    torch.get_autocast_dtype torch.get_default_device torch.nn.Buffer torch.nn.RMSNorm torch.nn.attention
    torch.nn.functional.rms_norm torch.optim.Muon LayerNorm(bias=) scaled_dot_product_attention(scale=)""".split()
# a block computes, no more
FORBIDDEN = "open print input breakpoint exit quit eval exec globals __import__".split()


def too_new(node: ast.AST) -> Iterator[str]:
    """What Python 3.8 or torch 2.0.1 lack of a node of the syntax tree (of its own, not of the nodes below)."""
    names: List[str] = []
    if isinstance(node, ast.Attribute):
        names = [re.sub(r"^F\.", "nn.functional.", ast.unparse(node)), f".{node.attr}"]
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        within = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        parts = [(within + alias.name).split(".") for alias in node.names]
        names = [".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)]
        if not {part[0] for part in parts} <= sys.stdlib_module_names | {
            "torch",
            "numpy",
            "nle",
            "__future__",
        }:
            yield f"import of {names[0]}: neither standard library, torch, numpy nor nle"
    elif isinstance(node, ast.Call):
        names = [
            f"{ast.unparse(node.func).split('.')[-1]}({keyword.arg}=)" for keyword in node.keywords
        ]
    for name in (re.sub(r"^nn\.", "torch.nn.", name) for name in names):
        if name in TOO_NEW:
            yield f"{name} is newer than Python 3.8 or torch 2.0.1"
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        yield "from __future__ is allowed at the top of a file only, and the block goes into the middle of one"
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in (
        "dict",
        "list",
        "tuple",
        "set",
        "type",
    ):
        yield f"{ast.unparse(node.value)}[...] needs Python 3.9: write {ast.unparse(node.value).title()} of typing"
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitOr):
        sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
        if any(re.match(r"[{]|dict\(", ast.unparse(side)) for side in sides):
            yield "`dict | dict` needs Python 3.9: write {**a, **b}"
    for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        if annotation and any(isinstance(part, ast.BitOr) for part in ast.walk(annotation)):
            yield "`X | Y` as a type needs Python 3.10: write Optional or Union"


def names_from_outside(source: str) -> Iterator[Tuple[int, str]]:
    """(line, name) where a scope first uses a name that is neither defined in the source nor provided nor Python's."""
    used: List[Tuple[str, int]] = []
    known = {*PROVIDED, *dir(builtins), "__name__", "__file__"} - {*FORBIDDEN}
    tables = [symtable.symtable(source, "block", "exec")]
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                used.append((symbol.get_name(), table.get_lineno()))
            if symbol.is_declared_global() or (table is tables[0] and symbol.is_local()):
                known.add(symbol.get_name())
    places = [
        (node.id, node.lineno) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)
    ]
    for name, begin in used:
        if name not in known:
            yield min(line for place, line in places if place == name and line >= begin), name


def check_text(block: Block) -> List[Tuple[int, str]]:
    """(line of the file, complaint) of whatever can be seen without running the block."""
    try:
        tree = ast.parse(block.source, feature_version=(3, 8))  # the benchmark's
        found = {
            (line, f"{name} is neither defined nor provided")
            for line, name in names_from_outside(block.source)
        }
    except SyntaxError as error:
        return [(block.first_line + (error.lineno or 1) - 1, error.msg)]
    for node in ast.walk(tree):
        found.update((getattr(node, "lineno", 1), complaint) for complaint in too_new(node))
    return sorted((block.first_line + line - 1, complaint) for line, complaint in found)


# --- Checks that run the block
def module_by_path(path: Any, names: Dict[str, Any]) -> Any:
    """Not registered in sys.modules: the benchmark's budget script does not register its own either."""
    spec = importlib.util.spec_from_file_location("_under_check", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    module.__dict__.update(names)
    # a check leaves no __pycache__ beside what it checks
    with mock.patch.object(sys, "dont_write_bytecode", True):
        spec.loader.exec_module(module)
    assert "_under_check" not in sys.modules, "it registers itself in sys.modules"
    return module


class Trial:
    """A block loaded among the provided names and no others; it is built afresh for each check, from one seed."""

    def __init__(self, block: Block) -> None:
        self.block, self.config = block, TrainConfig(batch_size=3, seq_len=8)
        # stays while the block is in use: some code reads its own source
        self.folder = tempfile.TemporaryDirectory()

    def load(self) -> str:
        path = Path(self.folder.name) / os.path.basename(self.block.path)
        before = "\n" * (self.block.first_line - 1)  # lines are numbered as in the file
        path.write_text(before + self.block.source, encoding="utf-8")
        self.module = module_by_path(path, PROVIDED)
        for name in ("Model", "OfflineAlgorithm"):
            assert isinstance(vars(self.module).get(name), type), f"it defines no class {name}"
        return "among the provided names"

    def algorithm(self, config: Any = None, **sizes: int) -> Any:
        torch.manual_seed(0)
        backbone = ModelBackbone(NUM_ACTIONS, **(sizes or SMALL))
        return self.module.OfflineAlgorithm(
            backbone=backbone, config=config or self.config, device="cpu"
        )

    def train(self, algo: Any, autocast: Any = None, steps: int = STEPS) -> List[str]:
        """Some steps, each inspected -> the parameters without gradient in the second half (with a burn-in)."""
        named = dict(algo.model.named_parameters())
        reached: set = set()

        def inspect(
            step: int, batch: Batch, before: Batch, loss: torch.Tensor, states: Any, info: Any
        ) -> None:
            at = f"step {step}:"
            assert torch.isfinite(loss), f"{at} loss is {loss.item()}"
            assert loss.dtype == torch.float32, f"{at} loss is {loss.dtype}: compute it in float32"
            attached = any(getattr(leaf, "requires_grad", False) for leaf in tree_leaves(states))
            assert not attached, (
                f"{at} rnn_states are not detached, so the next step's backward fails"
            )
            for name, value in info.items():
                assert isinstance(value, (float, int)) or hasattr(value, "item"), (
                    f"{at} info[{name!r}] is no number"
                )
                assert math.isfinite(value), f"{at} info[{name!r}] is {value}"
            same = batch.keys() == before.keys() and all(
                torch.equal(batch[name], before[name]) for name in before
            )
            assert same, f"{at} the batch was changed in place, and the loop still needs it"
            if step > steps // 2:
                reached.update(
                    name for name, p in named.items() if p.grad is not None and p.grad.any()
                )

        run_training(
            algo, self.config, made_up_batches(self.config, seed=1), steps, autocast, inspect
        )
        return [name for name in named if name not in reached]


def check_builds(trial: Trial) -> str:
    """`OfflineAlgorithm(backbone, config, device)` with the benchmark's config keeps the backbone as it was given."""
    backbone = ModelBackbone(NUM_ACTIONS, **SMALL)
    given = deepcopy(backbone.state_dict())
    algo = trial.module.OfflineAlgorithm(backbone=backbone, config=trial.config, device="cpu")
    assert getattr(algo.model, "backbone", None) is backbone, (
        "model.backbone is not the backbone that was given"
    )
    now = backbone.state_dict()
    assert all(torch.equal(given[name], now[name]) for name in now), "the backbone was changed"
    trained, counted = ({id(p) for p in part.parameters()} for part in (algo, algo.model))
    assert trained == counted, (
        "parameters() are not those of algo.model, which are trained and counted"
    )
    return f"{len(counted)} tensors to train"


def check_trains(trial: Trial, autocast: Any = None) -> str:
    missed = trial.train(trial.algorithm(), autocast)
    hint = "; is it autocast's memory of a pass without gradient (see CASTS)?" if autocast else ""
    assert not missed, (
        f"no gradient reaches {len(missed)} parameters, {', '.join(missed[:3])}{hint}"
    )
    return f"{STEPS} steps"


def check_extreme_weights(trial: Trial) -> str:
    """A head with weights 10,000 times too large, where a careless exp is infinite, of both signs."""
    for factor in (1e4, -1e4):
        algo = trial.algorithm()
        scale_weights(algo, factor)
        trial.train(algo, steps=3)
    return "head x +-10,000"


@torch.no_grad()
def scale_weights(algo: Any, head: float, backbone: float = 1.0) -> None:
    for name, parameter in algo.model.named_parameters():
        parameter.mul_(backbone if name.startswith("backbone.") else head)


def check_acts(trial: Trial) -> str:
    """Actions are whole numbers in range, and the same again from the same seed and from copies of the screens. With
    fresh weights hardly an action that is drawn would depend on the screen: hence larger ones."""
    runs = []
    for overwritten in (True, True, False):
        algo = trial.algorithm()
        scale_weights(algo, 100.0, 4.0)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002  the global generator: a block may draw from it
        runs.append(run_acting(algo.model, 4, overwritten))
    for actions in runs[0]:
        kind = f"{type(actions).__name__} {getattr(actions, 'dtype', '')} {list(np.shape(actions))}"
        whole = (
            isinstance(actions, np.ndarray)
            and actions.shape == (SLOTS,)
            and actions.dtype.kind == "i"
        )
        assert whole, f"vec_act gives {kind}, not an ndarray of {SLOTS} whole numbers"
        assert 0 <= actions.min() and actions.max() < NUM_ACTIONS, (
            f"actions outside of 0..{NUM_ACTIONS - 1}"
        )
    assert np.array_equal(runs[0], runs[1]), "other actions from the same weights and seed"
    assert np.array_equal(runs[0], runs[2]), (
        "other actions from screens that no tick overwrites: it keeps a view"
    )
    return f"{SLOTS} slots"


def count(algo: Any) -> str:
    """Parameters beyond the backbone's, counted as the benchmark counts them."""
    sizes = [
        sum(parameter.numel() for parameter in part.parameters())
        for part in (algo.model, algo.model.backbone)
    ]
    head = sizes[0] - sizes[1]
    over = [f"{limit:,}" for limit in (SCRIPT_LIMIT, TASK_LIMIT) if head > limit]
    assert not over, f"{head:,} parameters beyond the backbone, more than {' and than '.join(over)}"
    return f"{head:,} parameters beyond the backbone; the limits are {SCRIPT_LIMIT:,} and {TASK_LIMIT:,}"


def check_whole_file(block: Block) -> str:
    """The whole file as the benchmark's budget script takes it: imported by path, its own backbone at full size."""
    ast.parse(Path(block.path).read_text(encoding="utf-8"), block.path, feature_version=(3, 8))
    module, sizes = (
        module_by_path(block.path, {}),
        dict(rnn_hidden_dim=2048, rnn_layers=2, rnn_dropout=0.0),
    )
    backbone = module.ModelBackbone(action_dim=NUM_ACTIONS, use_prev_action=True, **sizes)
    return count(
        module.OfflineAlgorithm(backbone=backbone, config=module.TrainConfig(), device="cpu")
    )


# --- All of it
def run_checks(
    block: Block, full_size: bool = True, only: str = ""
) -> Iterator[Tuple[str, bool, str]]:
    """Every finding: of which check, whether it passed, and what it says. Ends where the block does not load or build.
    `full_size=False` leaves out networks of 57M parameters; `only`: no check that runs the block but this."""
    found = check_text(block)
    yield from (("text", False, f"line {line}: {complaint}") for line, complaint in found)
    if not found:
        yield "text", True, "Python 3.8, and no names but those provided"
    trial = Trial(block)
    checks: Dict[str, Callable[[], str]] = {
        "loads": trial.load,
        "builds": lambda: check_builds(trial),
        "trains, float32": lambda: check_trains(trial),
        "trains, bfloat16 autocast": lambda: check_trains(trial, torch.bfloat16),
        "trains, float16 autocast": lambda: check_trains(trial, torch.float16),
        "extreme weights": lambda: check_extreme_weights(trial),
        "acts": lambda: check_acts(trial),
        "head's size": lambda: count(trial.algorithm(TrainConfig(), rnn_hidden_dim=2048)),
        "whole file by path": lambda: check_whole_file(block),
    }
    for name in list(checks)[: 7 + full_size + (full_size and block.whole_file)]:
        if only in ("", name) or name == "loads":
            passed, detail = attempt(block, checks[name])
            yield name, passed, detail
            if name in ("loads", "builds") and not passed:
                return


def attempt(block: Block, check: Callable[[], str]) -> Tuple[bool, str]:
    """One check; whatever it raises is its result, with the innermost line of the file that it passed through."""
    try:
        return True, check()
    except (Exception, SystemExit) as error:  # the code under check may raise anything
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        name, frames = os.path.basename(block.path), traceback.extract_tb(error.__traceback__)
        lines = [
            f" (line {frame.lineno})"
            for frame in frames
            if os.path.basename(frame.filename) == name
        ]
        return False, kind + " ".join(str(error).split()) + "".join(lines[-1:])


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", nargs="?", default=DEFAULT_FILE, help="default: custom_nethack_pomdp.py"
    )
    parser.add_argument(
        "--export", type=Path, help="write the block there if it passes; overwrites only an export"
    )
    options = parser.parse_args(argv)
    out, failed = options.export, 0
    try:
        block = read_block(options.file)
        if (
            out
            and os.path.lexists(out)
            and not (out.is_file() and out.read_bytes().startswith(EXPORT_MARK.encode()))
        ):
            raise ValueError(f"will not overwrite {out}: it is not an exported block")
        torch.set_num_threads(1)  # small networks: more only wait for each other
        for name, passed, detail in run_checks(block):
            print(f"{'ok' if passed else 'FAIL':4} {name}: {detail}", flush=True)
            failed += not passed
        if out and not failed:
            out.write_text(EXPORT_MARK + block.source, encoding="utf-8")
        if out:
            print("not exported" if failed else f"written: {out}")
    except (ValueError, OSError) as error:
        print(f"check_submission.py: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
