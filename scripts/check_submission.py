# SPDX-License-Identifier: MIT
"""Before a block is handed in: will the benchmark take it, as far as a stand-in can tell?

    python scripts/check_submission.py                            the block of the main file
    python scripts/check_submission.py scripts/references/iql.py  a bare block, without banners
    python scripts/check_submission.py --export block.py          also writes it, if it passes

One line a finding, lines numbered as in the file. Exit code 0: everything passed, 1: something did
not, 2: there was nothing to check, with one line on standard error. The block is executed: check
only what you would run. standin.py says what the stand-in has of the benchmark's own file; its
games are noise, and standin_study.py has real ones.
"""

import argparse
import ast
import builtins
import itertools
import math
import os
import re
import symtable
import sys
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import numpy as np
import torch
from standin import (
    DEFAULT_FILE,
    EXPORT_MARK,
    NUM_ACTIONS,
    PROVIDED,
    SLOTS,
    Batch,
    Block,
    ModelBackbone,
    TrainConfig,
    attempt,
    load_block,
    made_up_batches,
    module_by_path,
    read_block,
    run_acting,
    run_training,
)
from torch.utils._pytree import tree_leaves

TASK_LIMIT = 2_000_000  # parameters beyond the backbone, from the task's text
SCRIPT_LIMIT = int(1.05 * 254_318)  # its budget script's: by the largest reference's head, IQL's
# of the small loop: enough for carried states, an update of a target network and several game ends
STEPS = 8
SMALL = {"rnn_hidden_dim": 32, "width": 8}


# --- Checks of the text
# What people reach for and Python 3.8 or torch 2.0.1 lack: full names, attributes of anything,
# keywords of calls.
TOO_NEW = {
    "functools.cache",
    "itertools.pairwise",
    ".removeprefix",
    ".removesuffix",
    ".bit_count",
    "zip(strict=)",
    "dataclass(slots=)",
    "dataclass(kw_only=)",
    "torch.accelerator",
    "torch.amp.GradScaler",
    "torch.amp.custom_bwd",
    "torch.amp.custom_fwd",
    "torch.compiler",
    "torch.get_autocast_dtype",
    "torch.get_default_device",
    "torch.nn.Buffer",
    "torch.nn.RMSNorm",
    "torch.nn.attention",
    "torch.nn.functional.rms_norm",
    "torch.optim.Muon",
    "LayerNorm(bias=)",
    "scaled_dot_product_attention(scale=)",
}
# a block computes, no more
FORBIDDEN = {
    "open",
    "print",
    "input",
    "breakpoint",
    "exit",
    "quit",
    "eval",
    "exec",
    "globals",
    "__import__",
}
IMPORTED = {*sys.stdlib_module_names, "torch", "numpy", "nle"}


def imported(node: ast.AST) -> List[str]:
    """Full names that an import statement names, `a.b` as `a` and `a.b`."""
    within = ""
    if isinstance(node, ast.ImportFrom):
        within = f"{node.module}."
    names: List[str] = []
    for alias in getattr(node, "names", []):
        names += itertools.accumulate((within + alias.name).split("."), "{}.{}".format)
    return names


def too_new(node: ast.AST) -> Iterator[str]:
    """What Python 3.8 or torch 2.0.1 lack of a node of the syntax tree (of its own, not of the
    nodes below)."""
    names: List[str] = []
    if isinstance(node, ast.Attribute):
        names = [re.sub(r"^F\.", "nn.functional.", ast.unparse(node)), f".{node.attr}"]
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        names = imported(node)
        if not {name.split(".")[0] for name in names} <= IMPORTED:
            yield f"import of {names[0]}: neither standard library, torch, numpy nor nle"
    elif isinstance(node, ast.Call):
        function = ast.unparse(node.func).split(".")[-1]
        names = [f"{function}({keyword.arg}=)" for keyword in node.keywords]
    for name in names:
        name = re.sub(r"^nn\.", "torch.nn.", name)
        if name in TOO_NEW:
            yield f"{name} is newer than Python 3.8 or torch 2.0.1"
    yield from too_new_syntax(node)


def too_new_syntax(node: ast.AST) -> Iterator[str]:
    """What Python 3.8 cannot parse or does not evaluate, of the node itself."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        where = "the block goes into the middle of one"
        yield f"from __future__ is allowed at the top of a file only, and {where}"
    if isinstance(node, ast.Subscript):
        kind = ast.unparse(node.value)
        if kind in ("dict", "list", "tuple", "set", "type"):
            yield f"{kind}[...] needs Python 3.9: write {kind.title()} of typing"
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitOr):
        sides = [getattr(node, name, node.op) for name in ("left", "right", "value")]
        if any(re.match(r"[{]|dict\(", ast.unparse(side)) for side in sides):
            yield "`dict | dict` needs Python 3.9: write {**a, **b}"
    for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        if annotation and any(isinstance(part, ast.BitOr) for part in ast.walk(annotation)):
            yield "`X | Y` as a type needs Python 3.10: write Optional or Union"


def names_from_outside(source: str) -> Iterator[Tuple[int, str]]:
    """(line, name) where a scope first uses a name that is neither defined in the source nor
    provided nor Python's."""
    used: List[Tuple[str, int]] = []
    known = {*PROVIDED, *dir(builtins), "__name__", "__file__"} - FORBIDDEN
    tables = [symtable.symtable(source, "block", "exec")]
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                used.append((symbol.get_name(), table.get_lineno()))
            if symbol.is_declared_global() or (table is tables[0] and symbol.is_local()):
                known.add(symbol.get_name())
    lines: Dict[str, List[int]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            lines.setdefault(node.id, []).append(node.lineno)
    for name, begin in used:
        if name not in known:
            yield min(line for line in lines[name] if line >= begin), name


def check_text(block: Block) -> List[Tuple[int, str]]:
    """(line of the file, complaint) of whatever can be seen without running the block."""
    before = block.first_line - 1
    try:
        tree = ast.parse(block.source, feature_version=(3, 8))  # the benchmark's
        unknown = list(names_from_outside(block.source))
    except SyntaxError as error:
        return [(before + (error.lineno or 1), error.msg)]
    found = {(before + line, f"{name} is neither defined nor provided") for line, name in unknown}
    for node in ast.walk(tree):
        for complaint in too_new(node):
            found.add((before + getattr(node, "lineno", 1), complaint))
    return sorted(found)


# --- Checks that run the block
class Trial:
    """A block loaded among the provided names and no others; it is built afresh for each check,
    from one seed."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.config = TrainConfig(batch_size=3, seq_len=8)
        self.folder = tempfile.TemporaryDirectory()

    def load(self) -> str:
        self.module = load_block(self.block, self.folder.name)
        return "among the provided names"

    def algorithm(self, config: Any = None, **sizes: int) -> Any:
        torch.manual_seed(0)
        backbone = ModelBackbone(NUM_ACTIONS, **(sizes or SMALL))
        config = config or self.config
        return self.module.OfflineAlgorithm(backbone=backbone, config=config, device="cpu")

    def train(self, algo: Any, autocast: Any = None, steps: int = STEPS) -> List[str]:
        """Some steps, each inspected -> the parameters without gradient in the second half (with a
        burn-in)."""
        named = dict(algo.model.named_parameters())
        reached: set = set()

        def inspect(
            step: int, batch: Batch, before: Batch, loss: torch.Tensor, states: Any, info: Any
        ) -> None:
            at = f"step {step}:"
            assert torch.isfinite(loss), f"{at} loss is {loss.item()}"
            assert loss.dtype == torch.float32, f"{at} loss is {loss.dtype}: compute it in float32"
            for leaf in tree_leaves(states):
                told = f"{at} rnn_states are not detached, so the next step's backward fails"
                assert not getattr(leaf, "requires_grad", False), told
            for name, value in info.items():
                told = f"{at} info[{name!r}] is no number"
                assert isinstance(value, (float, int)) or hasattr(value, "item"), told
                assert math.isfinite(value), f"{at} info[{name!r}] is {value}"
            told = f"{at} the batch was changed in place, and the loop still needs it"
            assert batch.keys() == before.keys(), told
            for name in before:
                assert torch.equal(batch[name], before[name]), told
            if step > steps // 2:
                for name, p in named.items():
                    if p.grad is not None and p.grad.any():
                        reached.add(name)

        batches = made_up_batches(self.config, seed=1)
        run_training(algo, self.config, batches, steps, autocast, inspect)
        return [name for name in named if name not in reached]


def check_builds(trial: Trial) -> str:
    """`OfflineAlgorithm(backbone, config, device)` with the benchmark's config keeps the backbone
    as it was given."""
    backbone = ModelBackbone(NUM_ACTIONS, **SMALL)
    given = deepcopy(backbone.state_dict())
    algo = trial.module.OfflineAlgorithm(backbone=backbone, config=trial.config, device="cpu")
    assert getattr(algo.model, "backbone", None) is backbone, (
        "model.backbone is not the backbone that was given"
    )
    for name, value in backbone.state_dict().items():
        assert torch.equal(given[name], value), "the backbone was changed"
    trained = set(map(id, algo.parameters()))
    counted = set(map(id, algo.model.parameters()))
    assert trained == counted, (
        "parameters() are not those of algo.model, which are trained and counted"
    )
    return f"{len(counted)} tensors to train"


def check_trains(trial: Trial, autocast: Any = None) -> str:
    missed = trial.train(trial.algorithm(), autocast)
    told = f"no gradient reaches {len(missed)} parameters, {', '.join(missed[:3])}"
    if autocast:
        told += "; is it autocast's memory of a pass without gradient (see standin.CASTS)?"
    assert not missed, told
    return f"{STEPS} steps"


def check_extreme_weights(trial: Trial) -> str:
    """A head with weights 10,000 times too large, of both signs: a careless exp is infinite."""
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
    """Actions are whole numbers in range, and the same again from the same seed and from copies of
    the screens. With fresh weights hardly an action that is drawn would depend on the screen: hence
    larger ones."""
    runs = []
    for overwritten in (True, True, False):
        algo = trial.algorithm()
        scale_weights(algo, 100.0, 4.0)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002  the global generator: a block may draw from it
        runs.append(run_acting(algo.model, 4, overwritten))
    for actions in runs[0]:
        kind = f"{type(actions).__name__} {getattr(actions, 'dtype', '')} {list(np.shape(actions))}"
        told = f"vec_act gives {kind}, not an ndarray of {SLOTS} whole numbers"
        assert isinstance(actions, np.ndarray) and actions.shape == (SLOTS,), told
        assert actions.dtype.kind == "i", told
        told = f"actions outside of 0..{NUM_ACTIONS - 1}"
        assert 0 <= actions.min() and actions.max() < NUM_ACTIONS, told
    assert np.array_equal(runs[0], runs[1]), "other actions from the same weights and seed"
    assert np.array_equal(runs[0], runs[2]), (
        "other actions from screens that no tick overwrites: it keeps a view"
    )
    return f"{SLOTS} slots"


def count(algo: Any) -> str:
    """Parameters beyond the backbone's, counted as the benchmark counts them."""
    head = sum(parameter.numel() for parameter in algo.model.parameters())
    head -= sum(parameter.numel() for parameter in algo.model.backbone.parameters())
    told = f"{head:,} parameters beyond the backbone"
    over = [f"{limit:,}" for limit in (SCRIPT_LIMIT, TASK_LIMIT) if head > limit]
    assert not over, f"{told}, more than {' and than '.join(over)}"
    return f"{told}; the limits are {SCRIPT_LIMIT:,} and {TASK_LIMIT:,}"


def check_whole_file(block: Block) -> str:
    """The whole file as the benchmark's budget script takes it: imported by path, its own backbone
    at full size."""
    ast.parse(Path(block.path).read_text(encoding="utf-8"), block.path, feature_version=(3, 8))
    module = module_by_path(block.path, {})
    backbone = module.ModelBackbone(
        action_dim=NUM_ACTIONS,
        use_prev_action=True,
        rnn_hidden_dim=2048,
        rnn_layers=2,
        rnn_dropout=0.0,
    )
    config = module.TrainConfig()
    return count(module.OfflineAlgorithm(backbone=backbone, config=config, device="cpu"))


# --- All of it
def run_checks(
    block: Block, full_size: bool = True, only: str = ""
) -> Iterator[Tuple[str, bool, str]]:
    """Every finding: of which check, whether it passed, and what it says. Ends where the block does
    not load or build. `full_size=False` leaves out networks of 57M parameters; `only`: no check
    that runs the block but this."""
    found = check_text(block)
    for line, complaint in found:
        yield "text", False, f"line {line}: {complaint}"
    if not found:
        yield "text", True, "Python 3.8, and no names but those provided"
    trial = Trial(block)
    checks: Dict[str, Callable[[], str]] = {
        "loads": trial.load,
        "builds": partial(check_builds, trial),
        "trains, float32": partial(check_trains, trial),
        "trains, bfloat16 autocast": partial(check_trains, trial, torch.bfloat16),
        "trains, float16 autocast": partial(check_trains, trial, torch.float16),
        "extreme weights": partial(check_extreme_weights, trial),
        "acts": partial(check_acts, trial),
    }
    if full_size:
        checks["head's size"] = lambda: count(trial.algorithm(TrainConfig(), rnn_hidden_dim=2048))
    if full_size and block.whole_file:
        checks["whole file by path"] = partial(check_whole_file, block)
    for name in checks:
        if only in ("", name) or name == "loads":
            passed, detail = attempt(block, checks[name])
            yield name, passed, detail
            if name in ("loads", "builds") and not passed:
                return


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file",
        nargs="?",
        default=DEFAULT_FILE,
        help="a whole file with banners, or a bare block (default: custom_nethack_pomdp.py)",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the block there if it passes; overwrites only an export",
    )
    options = parser.parse_args(argv)
    out = options.export
    failed = 0
    try:
        block = read_block(options.file)
        exported = out and out.is_file() and out.read_bytes().startswith(EXPORT_MARK.encode())
        if out and os.path.lexists(out) and not exported:
            raise ValueError(f"will not overwrite {out}: it is not an exported block")
        torch.set_num_threads(1)  # small networks: more only wait for each other
        for name, passed, detail in run_checks(block):
            print(f"{'ok' if passed else 'FAIL':4} {name}: {detail}", flush=True)
            failed += not passed
        if out and failed:
            print("not exported")
        elif out:
            out.write_text(EXPORT_MARK + block.source, encoding="utf-8")
            print(f"written: {out}")
    except (ValueError, OSError) as error:  # not with the main file's: it may be what is broken
        print(f"check_submission.py: {error}", file=sys.stderr)
        return 2
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
