"""Will the benchmark take this block? Takes the EDITABLE block out of a file and runs it as the benchmark would.

    python scripts/check_submission.py                            the block of custom_nethack_pomdp.py
    python scripts/check_submission.py scripts/references/iql.py  a bare block, without banners
    python scripts/check_submission.py --export block.py          also writes the block, if it passes

One line a check, `ok` or `FAIL` with the reason; lines are numbered as in the file. Exit code 0: everything passed, 1: something did not,
2: there was nothing to check (no such file, no banners), with one line on standard error.

What the block may use without defining or importing it is `PROVIDED`; what surrounds it when it runs is `benchmark_standin.py`.
It is executed here, so check only what you would run.
"""
import argparse
import ast
import builtins
import contextlib
import dis
import importlib.util
import os
import re
import sys
import sysconfig
import tempfile
import traceback
import types
from copy import deepcopy
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import numpy as np
import torch
from torch import nn

_HERE = os.path.dirname(os.path.abspath(__file__))
if _HERE not in sys.path:  # run as a script it is there already; loaded by path, as the tests do, it is not
    sys.path.insert(0, _HERE)
import benchmark_standin as standin

DEFAULT_FILE = os.path.join(os.path.dirname(_HERE), "custom_nethack_pomdp.py")
BEGIN, END = "EDITABLE BEGIN", "EDITABLE END"
EXPORT_MARK = "# An exported block. Written by scripts/check_submission.py --export, which may overwrite this file."

# What surrounds the block in the benchmark's file: the names that the task promises, and of standard modules those that Katakomba's own
# scripts import. The benchmark's file is built on these; whatever else it may import is not known, so a block imports the rest itself.
PROLOGUE = """\
import os
import random
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Tuple
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Categorical
"""
HELPERS = {"ModelBackbone": standin.ModelBackbone, "soft_update": standin.soft_update, "asymmetric_l2_loss": standin.asymmetric_l2_loss}
PROVIDED = frozenset(HELPERS) | {"os", "random", "deepcopy", "asdict", "dataclass", "Any", "Dict", "List", "Optional", "Tuple",
                                 "np", "torch", "nn", "F", "Categorical"}
# What every module has, and what Python makes of a class or an annotation.
IMPLICIT = {"__name__", "__file__", "__doc__", "__annotations__", "__builtins__", "__module__", "__qualname__",
            "__build_class__", "__class__"}
# A block computes: it neither talks to the outside nor reaches names that a static check cannot see.
FORBIDDEN_BUILTINS = {"open", "print", "input", "breakpoint", "exit", "quit", "eval", "exec", "compile", "globals",
                      "locals", "vars", "__import__"}
IMPORTABLE = {"torch", "numpy"}  # beside the standard library: all that is sure to be in the benchmark's container

TASK_LIMIT = 2_000_000     # parameters beyond the backbone, from the task's text
LARGEST_REFERENCE = 254_318  # IQL's head at 121 actions and a 2048-d LSTM
SCRIPT_LIMIT = int(1.05 * LARGEST_REFERENCE)  # the budget script's: 267,033

# What people reach for and the container lacks: attributes of anything, full names, and calls with a keyword.
TOO_NEW = {"removeprefix", "removesuffix", "bit_count", "set_submodule", "functools.cache", "math.lcm",
           "math.nextafter", "math.cbrt", "itertools.pairwise", "itertools.batched", "torch.accelerator", "torch.amp.GradScaler",
           "torch.amp.custom_bwd", "torch.amp.custom_fwd", "torch.amp.is_autocast_available", "torch.compiler", "torch.export",
           "torch.get_autocast_dtype", "torch.get_default_device", "torch.library.custom_op", "torch.nn.Buffer", "torch.nn.RMSNorm",
           "torch.nn.attention", "torch.nn.functional.rms_norm", "torch.nn.utils.clip_grads_with_norm_", "torch.nn.utils.get_total_norm",
           "torch.nn.utils.parametrizations.weight_norm", "torch.optim.Adafactor", "torch.optim.Muon", "torch.unravel_index"}
TOO_NEW_KEYWORDS = {("zip", "strict"), ("dataclass", "slots"), ("dataclass", "kw_only"), ("load_state_dict", "assign"),
                    ("LayerNorm", "bias"), ("scaled_dot_product_attention", "scale"), ("scaled_dot_product_attention", "enable_gqa")}

METRICS = ("loss", "loss_per_action", "accuracy")  # what every algorithm reports, so that they can be compared
STANDIN_FILE = "standin_with_block.py"
SLOTS = 14        # games at a time in the benchmark's evaluation
STEPS = 8         # of the small loop: enough for carried states, an update of a target network and several game ends
SMALL = {"rnn_hidden_dim": 32, "rnn_layers": 2, "width": 8}
FULL = {"rnn_hidden_dim": 2048, "rnn_layers": 2}


class UserError(Exception):
    """The user's mistake: told in one line, exit code 2."""


class CheckFailed(Exception):
    """What a check found wrong."""


class Block(NamedTuple):
    path: str
    source: str
    first_line: int   # of the block in the file, from 1
    whole_file: bool  # the file has banners and more around them

    def where(self, line: int) -> str:
        """A line of the block (from 1) as the file numbers it."""
        return f"line {line + self.first_line - 1}"


class Result(NamedTuple):
    name: str
    passed: bool
    detail: str


# ---------------------------------------------------------------------------------------------------------------------
# Taking the block out
# ---------------------------------------------------------------------------------------------------------------------

def extract(text: str, path: str = "the file") -> Block:
    """The block between the two banners, or the whole text where it is a bare block. Raises UserError where there is neither.

    A banner is a comment that holds the words, between two rules `# ====`; the banners themselves are not part of the block.
    """
    lines = text.splitlines(keepends=True)
    marked = {words: [i for i, line in enumerate(lines) if line.lstrip().startswith("#") and words in line] for words in (BEGIN, END)}
    for words, found in marked.items():
        if len(found) > 1:
            lines_found = ", ".join(str(i + 1) for i in found)
            raise UserError(f"{path}: {len(found)} banners '{words}' (lines {lines_found}), expected one")
    if not marked[BEGIN] and not marked[END]:
        return _bare_block(lines, path)
    for words, found in marked.items():
        if not found:
            raise UserError(f"{path}: no banner '{words}' ('{END if words == BEGIN else BEGIN}' is there)")
    begin, end = marked[BEGIN][0], marked[END][0]
    if end < begin:
        raise UserError(f"{path}: '{END}' (line {end + 1}) comes before '{BEGIN}' (line {begin + 1})")
    first = _past_rule(lines, begin + 1, +1)
    last = _past_rule(lines, end - 1, -1)
    return Block(path, "".join(lines[first:last + 1]), first + 1, True)


def _past_rule(lines: List[str], at: int, step: int) -> int:
    """Walks over the banner's own comment lines to the first line beyond its rule.

    A banner without a rule is the one line that holds its words.
    """
    place = at
    while 0 <= place < len(lines) and lines[place].startswith("#"):
        if re.fullmatch(r"#\s*[=#\-*]{8,}\s*", lines[place]):
            return place + step
        place += step
    return at


def _bare_block(lines: List[str], path: str) -> Block:
    skip = 1 if lines and lines[0].startswith(EXPORT_MARK) else 0
    source = "".join(lines[skip:])
    try:
        defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: no banners '{BEGIN}' and '{END}', and not a bare block either: {_one_line(error)}") from None
    if not {"Model", "OfflineAlgorithm"} <= defined or {"ModelBackbone", "TrainConfig"} & defined:
        raise UserError(f"{path}: no banners '{BEGIN}' and '{END}', and not a bare block (classes Model and OfflineAlgorithm, without the "
                        "backbone and the config) either")
    return Block(path, source, 1 + skip, False)


def read_block(path: str) -> Block:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    return extract(text, path)


def may_export(path: str) -> None:
    """Raises UserError unless `path` can be written without losing anything."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"cannot export to {path}: no folder {folder}")
    if not os.path.lexists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            exported = file.readline().startswith(EXPORT_MARK)
    except (OSError, UnicodeDecodeError):
        exported = False
    if not exported:
        raise UserError(f"will not overwrite {path}: it is not an exported block")


def export(block: Block, path: str) -> None:
    """Writes the block; whole or not at all."""
    may_export(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(EXPORT_MARK + "\n" + block.source)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise UserError(f"cannot export to {path}: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Static checks
# ---------------------------------------------------------------------------------------------------------------------

def check_syntax(block: Block) -> str:
    """Python 3.8 and torch 2.0.1, which the container has."""
    try:
        tree = ast.parse(block.source, feature_version=(3, 8))  # the benchmark's
    except SyntaxError as error:
        raise CheckFailed(f"{block.where(error.lineno or 1)}: {error.msg}") from None
    dicts = _names_of_dicts(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise CheckFailed(f"{block.where(node.lineno)}: from __future__ is allowed at the top of a file only, and the block goes "
                              "into the middle of one")
        complaint = _too_new(node, dicts)
        if complaint:
            raise CheckFailed(f"{block.where(getattr(node, 'lineno', 1))}: {complaint}")
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("dict", "list", "tuple", "set", "type"):
            generic = ast.unparse(node.value)
            raise CheckFailed(f"{block.where(node.lineno)}: {generic}[...] needs Python 3.9: write {generic.title()} of typing")
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for annotation in filter(None, annotations):
            for part in ast.walk(annotation):
                if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr):
                    raise CheckFailed(f"{block.where(part.lineno)}: `X | Y` as a type needs Python 3.10: write Optional or Union")
    return "Python 3.8, {} lines".format(block.source.count("\n"))


def _too_new(node: ast.AST, dicts: Set[str]) -> str:
    """What Python 3.8 or torch 2.0.1 lack of it, '' where nothing is known."""
    newer = "is newer than Python 3.8 or torch 2.0.1"
    for name in _full_names(node):
        if name in TOO_NEW or (isinstance(node, ast.Attribute) and node.attr in TOO_NEW):
            return f"{name} {newer}"
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func).split(".")[-1]
        for keyword in node.keywords:
            if (function, keyword.arg) in TOO_NEW_KEYWORDS:
                return f"{function}({keyword.arg}=) {newer}"
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitOr):
        sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
        if any(_is_dict(side) or ast.unparse(side) in dicts for side in sides):
            return "`dict | dict` needs Python 3.9: write {**a, **b}"
    return ""


def _full_names(node: ast.AST) -> List[str]:
    """What an attribute or an import names, `nn` and `F` written out: of a.b.c also a.b where it is imported."""
    names: List[str] = []
    if isinstance(node, ast.Attribute):
        names = [re.sub(r"^F\.", "nn.functional.", ast.unparse(node))]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    if not isinstance(node, ast.Attribute):  # an attribute's own parts are nodes of their own
        names = [".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)]
    return [re.sub(r"^nn\.", "torch.nn.", name) for name in names]


def _is_dict(node: Optional[ast.AST]) -> bool:
    return isinstance(node, (ast.Dict, ast.DictComp)) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "dict")


def _names_of_dicts(tree: ast.AST) -> Set[str]:
    """Names that are somewhere annotated as a Dict or given one: a guess, which a name used for two things deceives."""
    names: Set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation and re.match(r"[Dd]ict\b", ast.unparse(node.annotation)):
            names.add(node.arg if isinstance(node, ast.arg) else ast.unparse(node.target))
        elif isinstance(node, ast.Assign) and _is_dict(node.value):
            names.update(ast.unparse(target) for target in node.targets)
    return names


def check_imports(block: Block) -> str:
    """Only the standard library, torch and numpy."""
    problems, names = [], set()
    for node in ast.walk(ast.parse(block.source)):
        if isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")] if node.level else [node.module or ""]
            if any(alias.name == "*" for alias in node.names):
                problems.append(f"from {modules[0]} import * ({block.where(node.lineno)})")
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            root = module.split(".")[0]
            names.add(root)
            if module.startswith(".") or not (root in IMPORTABLE or _in_standard_library(root)):
                problems.append(f"{module} ({block.where(node.lineno)})")
    if problems:
        raise CheckFailed("neither standard library, torch nor numpy: " + ", ".join(problems))
    return ", ".join(sorted(names)) or "none"


def _in_standard_library(root: str) -> bool:
    known = getattr(sys, "stdlib_module_names", None)  # from Python 3.10
    if known is not None:
        return root in known
    if root in sys.builtin_module_names:
        return True
    spec = importlib.util.find_spec(root)
    origin = (spec.origin or "") if spec else ""
    return origin.startswith(sysconfig.get_paths()["stdlib"]) and "site-packages" not in origin


def names_from_outside(source: str) -> List[Tuple[str, int]]:
    """(name, line) of every name that the code looks up outside of itself and finds neither there nor in Python.

    The compiled code is asked, not the syntax tree: which names are global is the compiler's decision, and it says so with a line
    for each use (in default values, decorators, annotations and nested functions alike).
    """
    uses: List[Tuple[str, int]] = []
    defined: Set[str] = set()

    def visit(code: types.CodeType, at_top: bool) -> None:
        starts = dict(dis.findlinestarts(code))
        line = code.co_firstlineno
        local: Set[str] = set()  # of a class body: found before anything outside
        for instruction in dis.get_instructions(code):
            line = starts.get(instruction.offset) or line
            name, operation = instruction.argval, instruction.opname
            if operation in ("STORE_NAME", "STORE_GLOBAL"):
                (defined if at_top or operation == "STORE_GLOBAL" else local).add(name)
            elif operation in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS") and name not in local:
                uses.append((name, line))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                visit(constant, False)

    visit(compile(source, "block", "exec", dont_inherit=True), True)
    known = defined | PROVIDED | IMPLICIT | (set(dir(builtins)) - FORBIDDEN_BUILTINS)
    return sorted({use for use in uses if use[0] not in known}, key=lambda use: (use[1], use[0]))


def check_names(block: Block) -> str:
    outside = names_from_outside(block.source)
    if outside:
        raise CheckFailed(", ".join("{} ({}{})".format(name, block.where(line), "; not in a block" if name in FORBIDDEN_BUILTINS else "")
                                    for name, line in outside))
    return "none but those provided"


# ---------------------------------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------------------------------

def load(block: Block, folder: str) -> types.ModuleType:
    """The block executed in a module of its own that holds the provided names and nothing else, from a file in `folder`.

    It is not registered in sys.modules: the benchmark does not register its own either, and a dataclass with postponed annotations
    fails then.
    """
    path = os.path.join(folder, STANDIN_FILE)
    with open(path, "w", encoding="utf-8") as file:
        file.write(PROLOGUE + block.source)
    module = _module_by_path(path, "_block_under_check", HELPERS)
    for name in ("Model", "OfflineAlgorithm"):
        if not isinstance(getattr(module, name, None), type):
            raise CheckFailed(f"it defines no class {name}")
    return module


def _module_by_path(path: str, name: str, names: Optional[Dict[str, Any]] = None) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CheckFailed(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    module.__dict__.update(names or {})
    previous, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a check leaves no __pycache__ beside what it checks
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = previous
    return module


class Trial:
    """Runs one block: builds it afresh for each check, always from the same seed."""

    def __init__(self, block: Block, device: str = "cpu"):
        self.device = device
        self._folder = tempfile.TemporaryDirectory()  # stays as long as the block is in use: some code reads its own source
        self.module = load(block, self._folder.name)
        self.config = standin.TrainConfig(batch_size=3, seq_len=8)

    def backbone(self, **sizes: Any) -> standin.ModelBackbone:
        backbone = standin.ModelBackbone(action_dim=standin.NUM_ACTIONS, rnn_dropout=0.0, use_prev_action=True, **(sizes or SMALL))
        return backbone.to(self.device)

    def algorithm(self, **sizes: Any) -> Any:
        torch.manual_seed(0)
        return self.module.OfflineAlgorithm(backbone=self.backbone(**sizes), config=self.config, device=self.device)

    def train(self, algo: Any, autocast: Optional[torch.dtype] = None, **options: Any) -> None:
        """A few steps of the loop, each of them inspected."""
        steps = options.pop("steps", STEPS)
        batches = options.pop("batches", None) or standin.made_up_batches(self.config, seed=1)
        options.setdefault("on_step", _Inspector(algo))
        standin.run_training(algo, self.config, batches, steps, self.device, autocast, **options)


class _Inspector:
    """Looks at everything that each step gives back, and remembers the trained weights as they were before step `snapshot_at`'s update."""

    def __init__(self, algo: Any, snapshot_at: int = 0):
        self.algo, self.snapshot_at = algo, snapshot_at
        self.snapshot: Dict[str, torch.Tensor] = {}

    def __call__(self, step: int, batch: standin.Batch, before: standin.Batch, loss: Any, states: Any, info: Any) -> None:
        at = f"step {step}: "
        if step == self.snapshot_at:
            self.snapshot = {name: p.detach().clone() for name, p in self.algo.model.named_parameters() if p.requires_grad}
        require(isinstance(loss, torch.Tensor) and loss.dim() == 0, at + "loss is not a scalar tensor")
        require(bool(torch.isfinite(loss)), at + f"loss is {loss.item()}")
        require(loss.dtype == torch.float32, at + f"loss is {loss.dtype}, which overflows at 65,504 or rounds: compute it in float32")
        inspect_states(states, at)
        inspect_info(info, at)
        require(batch.keys() == before.keys() and all(torch.equal(batch[k], before[k]) for k in before),
                at + "the batch was changed in place, and the loop still needs it")


def require(condition: bool, complaint: str) -> None:
    if not condition:
        raise CheckFailed(complaint)


def inspect_states(states: Any, at: str) -> None:
    require(isinstance(states, dict), at + f"rnn_states is a {type(states).__name__}, not a dict")
    for key, value in states.items():
        require(isinstance(value, (tuple, list)) and all(isinstance(s, torch.Tensor) for s in value),
                at + f"rnn_states[{key!r}] is not a tuple of tensors, which is what the loop can detach")
        require(not any(s.requires_grad for s in value),
                at + f"rnn_states[{key!r}] is not detached: a loop that does not do it fails at the next step")


def inspect_info(info: Any, at: str) -> None:
    require(isinstance(info, dict), at + f"info is a {type(info).__name__}, not a dict")
    for key, value in info.items():
        scalar = isinstance(value, (float, int)) or (isinstance(value, torch.Tensor) and value.dim() == 0 and not value.requires_grad)
        require(isinstance(key, str) and scalar, at + f"info[{key!r}] is neither a float nor a detached scalar tensor")
        require(bool(np.isfinite(float(value))), at + f"info[{key!r}] is {float(value)}")
    missing = [name for name in METRICS if name not in info]
    require(not missing, at + "info lacks " + ", ".join(missing))


def check_builds(trial: Trial) -> str:
    """`OfflineAlgorithm(backbone, config, device)` with Katakomba's config; the backbone is kept as it was given."""
    torch.manual_seed(0)
    backbone = trial.backbone()
    given = {k: v.clone() for k, v in backbone.state_dict().items()}
    algo = trial.module.OfflineAlgorithm(backbone=backbone, config=trial.config, device=trial.device)
    require(isinstance(algo.model, nn.Module), "algo.model is not an nn.Module")
    require(getattr(algo.model, "backbone", None) is backbone, "model.backbone is not the backbone that was given")
    now = backbone.state_dict()
    require(now.keys() == given.keys() and all(torch.equal(now[k], given[k]) for k in given), "the backbone was changed")
    parameters = list(algo.parameters())
    require(all(isinstance(p, torch.Tensor) for p in parameters), "parameters() does not give tensors")
    trained, counted = {id(p) for p in parameters}, {id(p) for p in algo.model.parameters()}
    require(len(trained) == len(parameters), "parameters() gives a tensor twice")
    require(trained <= counted, "parameters() holds tensors that are not part of algo.model, so they would not be counted")
    require({id(p) for p in backbone.parameters()} <= trained, "parameters() leaves out some of the backbone's")
    return f"{len(parameters)} tensors to train"


def check_trains(trial: Trial, autocast: Optional[torch.dtype] = None) -> str:
    """The loop; afterwards all weights are finite, and every tensor that is to be trained was still moved by the later steps.

    The first steps do not show it: a block may do less there (nothing to burn in), and a GradScaler may skip them. All of the backbone has
    to move too: under autocast a part of it can stop in silence (see `CastCache` in benchmark_standin.py).
    """
    algo = trial.algorithm()
    inspect = _Inspector(algo, snapshot_at=STEPS // 2)
    trial.train(algo, autocast, on_step=inspect)
    now = dict(algo.model.named_parameters())
    bad = [name for name, p in now.items() if not bool(torch.isfinite(p).all())]
    require(not bad, f"not finite after {STEPS} steps: {_some(bad)}")
    still = [name for name, p in inspect.snapshot.items() if torch.equal(now[name].detach(), p)]
    hint = "; autocast's memory of a pass without gradient? (CastCache in benchmark_standin.py)" if autocast is not None else ""
    require(not still, f"no gradient reaches {_some(still)}{hint}")
    return f"{STEPS} steps"


def _some(names: List[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_extreme_rewards(trial: Trial) -> str:
    """Rewards at the bounds of the clip, all of one sign, or changing sign at every step."""
    def at_the_bounds(sign: Callable[[Tuple[int, ...]], np.ndarray]) -> Iterator[Dict[str, np.ndarray]]:
        for batch in standin.made_up_batches(trial.config, seed=2, game_end=0.02):
            batch["rewards"] = sign(batch["rewards"].shape) * trial.config.clip_range
            yield batch

    signs: List[Callable[[Tuple[int, ...]], np.ndarray]] = [
        np.ones, lambda shape: -np.ones(shape), lambda shape: 1.0 - 2.0 * (np.indices(shape)[1] % 2)]
    for sign in signs:
        trial.train(trial.algorithm(), batches=at_the_bounds(sign), scale_rewards=False)
    return f"+-{trial.config.clip_range:g}"


@torch.no_grad()
def scale_weights(algo: Any, head: float, backbone: float = 1.0) -> None:
    for name, parameter in algo.model.named_parameters():
        parameter.mul_(backbone if name.startswith("backbone.") else head)


def check_extreme_head(trial: Trial) -> str:
    """A head with weights ten thousand times too large: values and advantages in the hundreds, where a careless exp is infinite.

    With both signs, as a target network keeps the weights that the head had: one of the two makes the advantages large and positive.
    """
    for factor in (1e4, -1e4):
        algo = trial.algorithm()
        scale_weights(algo, factor)
        trial.train(algo, steps=3)
    return "weights x +-10,000"


def own_loader_batch(config: standin.TrainConfig, seed: int, end: int, device: str = "cpu") -> standin.Batch:
    """A batch with the dtypes and keys of our own loader, all rows at a game's start.

    The game ends at frame `end - 1`, and what follows it does not count.
    """
    data = next(standin.made_up_batches(config, seed=seed, game_end=0.0))
    batch = {k: torch.as_tensor(v, device=device) for k, v in data.items()}
    place = torch.arange(config.seq_len + 1, device=device).expand(config.batch_size, -1)
    batch["rewards"] = batch["rewards"].float() / 10.0
    batch["dones"] = place == end - 1
    batch["mask"] = place < end
    batch["starts"] = torch.ones(config.batch_size, dtype=torch.bool, device=device)
    return batch


def check_held_out(trial: Trial) -> str:
    """Our own loop: integer tensors, masked frames, starts and exact returns, without gradient. Frames that do not count carry no loss."""
    losses = []
    for change in (False, True):
        algo = trial.algorithm()
        batch = own_loader_batch(trial.config, 3, trial.config.seq_len - 3, trial.device)
        if change:  # of what does not count: other rewards, and other actions than the data's
            batch["rewards"] = torch.where(batch["mask"], batch["rewards"], torch.full_like(batch["rewards"], 7.0))
            batch["actions"] = torch.where(batch["mask"], batch["actions"], (batch["actions"] + 1) % standin.NUM_ACTIONS)
        before = torch.zeros((trial.config.batch_size, 1), dtype=torch.long, device=trial.device)
        loss, states, info = algo.train_step(batch, before, {})
        require(bool(torch.isfinite(loss)), f"loss is {loss.item()}")
        losses.append(loss.item())
        with torch.no_grad():
            batch["returns"] = batch["rewards"].flip(1).cumsum(1).flip(1)
            carried = {name: tuple(part.detach() for part in state) for name, state in states.items()}
            held_out, states, info = algo.train_step(batch, batch["actions"][:, -2:-1], carried)
        require(not held_out.requires_grad and bool(torch.isfinite(held_out)), f"without gradient the loss is {held_out}")
        inspect_states(states, "held out: ")
        inspect_info(info, "held out: ")
    require(abs(losses[0] - losses[1]) <= 1e-6 * max(1.0, abs(losses[0])),
            "frames that do not count change the loss: {} and {}".format(*losses))
    return "masked frames carry no loss"


def check_acts(trial: Trial) -> str:
    """14 slots of noise: actions are whole numbers in range, and the same again from the same seed and from copies of the screens.

    With fresh weights hardly an action that is drawn would depend on the screen: hence larger ones.
    """
    runs = []
    for overwritten in (True, True, False):
        algo = trial.algorithm()
        scale_weights(algo, 100.0, 4.0)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002  the global generator: a block may draw from it
        runs.append(standin.run_acting(algo.model, ticks=4, slots=SLOTS, device=trial.device, overwritten=overwritten))
    for actions in runs[0]:
        require(isinstance(actions, np.ndarray), f"vec_act returns a {type(actions).__name__}, not an ndarray")
        require(np.issubdtype(actions.dtype, np.integer), f"actions are {actions.dtype}, not whole numbers")
        require(actions.shape == (SLOTS,), f"actions have shape {actions.shape}, expected ({SLOTS},)")
        require(bool(((actions >= 0) & (actions < standin.NUM_ACTIONS)).all()), f"actions outside of 0..{standin.NUM_ACTIONS - 1}")
    require(all(np.array_equal(a, b) for a, b in zip(*runs[:2])), "other actions from the same weights and seed")
    require(all(np.array_equal(a, b) for a, b in zip(runs[0], runs[2])),
            "other actions where each tick's screens are arrays of their own: it keeps a view of one that the next tick overwrites")
    return f"{SLOTS} slots, {runs[0][0].dtype}"


def check_copies(trial: Trial) -> str:
    """After training: `deepcopy(model)` works and acts, and the state dict goes into a fresh model without loss."""
    algo = trial.algorithm()
    trial.train(algo, steps=2)
    weights = algo.model.state_dict()
    copy = deepcopy(algo.model)
    fresh = trial.algorithm()
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.zero_()
    fresh.model.load_state_dict(weights)
    for name, model in (("the copy", copy), ("the loaded model", fresh.model)):
        other = model.state_dict()
        require(other.keys() == weights.keys() and all(torch.equal(other[k], weights[k]) for k in weights), name + " has other weights")
        standin.run_acting(model, ticks=2, device=trial.device)
    return "deepcopy and state_dict"


def head_size(algo: Any, backbone: nn.Module) -> int:
    """Parameters beyond the backbone's, counted as the benchmark counts them."""
    return sum(p.numel() for p in algo.model.parameters()) - sum(p.numel() for p in backbone.parameters())


def check_size(trial: Trial) -> str:
    backbone = trial.backbone(**FULL)
    return budget(head_size(trial.module.OfflineAlgorithm(backbone=backbone, config=standin.TrainConfig(), device=trial.device), backbone))


def budget(head: int) -> str:
    over = [limit for limit in (TASK_LIMIT, SCRIPT_LIMIT) if head > limit]
    require(not over, "{:,} parameters beyond the backbone, more than {}".format(head, " and than ".join(f"{limit:,}" for limit in over)))
    return f"{head:,} parameters beyond the backbone; the limits are {SCRIPT_LIMIT:,} and {TASK_LIMIT:,}"


def check_whole_file(block: Block) -> str:
    """The whole file as the benchmark's budget script takes it: imported by path, not registered, its own backbone at full size."""
    name = "_whole_file_under_check"
    module = _module_by_path(block.path, name)
    require(name not in sys.modules, "it registers itself in sys.modules")
    backbone = module.ModelBackbone(action_dim=standin.NUM_ACTIONS, rnn_hidden_dim=2048, rnn_layers=2, rnn_dropout=0.0,
                                    use_prev_action=True)
    config = module.TrainConfig()
    algo = module.OfflineAlgorithm(backbone=backbone, config=config, device="cpu")
    return budget(head_size(algo, backbone))


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------

def run_checks(block: Block, full_size: bool = True) -> Iterator[Result]:
    """Every check's result, in order. Those that need the block to run are left out where it cannot even be loaded or built.

    `full_size=False` leaves out the two that build a 57M-parameter network.
    """
    yield attempt(block, "syntax", check_syntax, block)
    try:
        ast.parse(block.source)
    except SyntaxError:
        return  # told by the line above
    yield attempt(block, "imports", check_imports, block)
    yield attempt(block, "names from outside", check_names, block)

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    trials: List[Trial] = []

    def start() -> str:
        trials.extend(Trial(block, device) for device in devices)
        return "by itself, among the provided names"

    loaded = attempt(block, "loads", start)
    yield loaded
    if not loaded.passed:
        return
    trial = trials[0]
    built = attempt(block, "builds", check_builds, trial)
    yield built
    if not built.passed:
        return
    yield attempt(block, "trains, float32", check_trains, trial)
    yield attempt(block, "trains, bfloat16 autocast", check_trains, trial, torch.bfloat16)
    yield attempt(block, "trains, float16 autocast", check_trains, trial, torch.float16)
    for gpu in trials[1:]:
        yield attempt(block, "trains on CUDA, float16", check_trains, gpu, torch.float16)
        yield attempt(block, "acts on CUDA", check_acts, gpu)
    yield attempt(block, "extreme rewards", check_extreme_rewards, trial)
    yield attempt(block, "extreme head", check_extreme_head, trial)
    yield attempt(block, "our own loader, held out", check_held_out, trial)
    yield attempt(block, "acts", check_acts, trial)
    yield attempt(block, "copies", check_copies, trial)
    if full_size:
        yield attempt(block, "head's size", check_size, trial)
        if block.whole_file:
            yield attempt(block, "whole file by path", check_whole_file, block)


def attempt(block: Block, name: str, check: Callable[..., Any], *arguments: Any) -> Result:
    """One check; whatever it raises is its result."""
    try:
        return Result(name, True, str(check(*arguments)))
    except CheckFailed as failure:
        return Result(name, False, str(failure))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the code under check may raise anything, SystemExit among it: all of it is a failed check
        return Result(name, False, _one_line(error) + _place(block, error))


def _one_line(error: BaseException) -> str:
    return "{}: {}".format(type(error).__name__, " ".join(str(error).split()) or "no message")


def _place(block: Block, error: BaseException) -> str:
    """The innermost line of the file under check that the error passed through."""
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if os.path.basename(frame.filename) == STANDIN_FILE:
            lines.append(block.where((frame.lineno or 1) - PROLOGUE.count("\n")))
        elif os.path.abspath(frame.filename) == os.path.abspath(block.path):
            lines.append(f"line {frame.lineno}")
    return f" ({lines[-1]})" if lines else ""


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", default=DEFAULT_FILE, metavar="FILE", help="default: custom_nethack_pomdp.py")
    parser.add_argument("--export", metavar="OUT", help="write the block there if it passes; overwrites nothing but an exported block")
    options = parser.parse_args(argv)
    try:
        block = read_block(options.file)
        if options.export:
            may_export(options.export)  # before the long part
    except UserError as error:
        print(f"check_submission.py: {error}", file=sys.stderr)
        return 2

    torch.set_num_threads(1)  # the networks are small: on a machine that is busy, threads only wait for each other
    last = block.first_line + len(block.source.splitlines()) - 1
    print(f"{block.path}, lines {block.first_line} to {last}", flush=True)
    failed = 0
    for result in run_checks(block):
        print("{:4} {}: {}".format("ok" if result.passed else "FAIL", result.name, result.detail), flush=True)
        failed += not result.passed
    if failed:
        print("{} of the checks failed{}".format(failed, "; not exported" if options.export else ""))
        return 1
    if options.export:
        try:
            export(block, options.export)
        except UserError as error:
            print(f"check_submission.py: {error}", file=sys.stderr)
            return 2
        print(f"written: {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
