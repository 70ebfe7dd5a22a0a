"""scripts/check_submission.py: it accepts what the benchmark would run, every one of its checks can fail, and the references
are what they claim."""
import ast
import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = os.path.join(ROOT, "scripts")
MAIN_FILE = os.path.join(ROOT, "custom_nethack_pomdp.py")
sys.path.insert(0, SCRIPTS)

import benchmark_standin as standin
import check_submission as check

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the benchmark's backbone is scripted

REFERENCES = {"bc": 247_929, "cql": 247_929, "iql": 254_318}  # parameters beyond the backbone, as the benchmark's own references have


def reference_path(name):
    return os.path.join(SCRIPTS, "references", name + ".py")


def reference_source(name):
    with open(reference_path(name), encoding="utf-8") as file:
        return file.read()


def block_of(source, path="some_file.py", first_line=1):
    return check.Block(path, source, first_line, False)


def edited(name, *changes):
    """A reference's block with pieces of its text replaced; a piece that is not there is this test's mistake."""
    source = reference_source(name)
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return block_of(source)


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    """Small matrices: more threads than cores that are free only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- what passes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_references_pass(name):
    results = list(check.run_checks(check.read_block(reference_path(name)), full_size=False))
    assert [r for r in results if not r.passed] == []
    expected = {*CHECKS, "syntax", "imports", "names from outside", "trains, bfloat16 autocast"}
    assert {r.name for r in results if "CUDA" not in r.name} == expected


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_reference_head_has_the_benchmarks_size(name):
    trial = check.Trial(check.read_block(reference_path(name)))
    backbone = trial.backbone(**check.FULL)
    algo = trial.module.OfflineAlgorithm(backbone=backbone, config=standin.TrainConfig(), device="cpu")
    assert check.head_size(algo, backbone) == REFERENCES[name]


def test_limits():
    assert check.SCRIPT_LIMIT == 267_033
    assert check.TASK_LIMIT == 2_000_000


@pytest.mark.skipif(not os.path.exists(MAIN_FILE), reason="custom_nethack_pomdp.py is not there")
def test_main_file_passes():
    results = list(check.run_checks(check.read_block(MAIN_FILE)))
    assert [r for r in results if not r.passed] == []
    assert [r.name for r in results][-1] == "whole file by path"


# -- taking the block out ----------------------------------------------------------------------------------------------

RULE = "# " + "=" * 60 + "\n"


def test_extract_leaves_out_the_banners():
    text = '"""A docstring may speak of EDITABLE BEGIN."""\n' + RULE + "# EDITABLE BEGIN: what is submitted\n# more about it\n" + RULE + \
        "# first\nx = 1\n\n# last\n" + RULE + "# EDITABLE END\n" + RULE + "y = 2\n"
    block = check.extract(text)
    assert block.source == "# first\nx = 1\n\n# last\n"
    assert block.first_line == 6 and block.whole_file
    assert block.where(2) == "line 7"


def test_extract_without_rules():
    block = check.extract("# EDITABLE BEGIN\n# a comment of the block\nx = 1\n# another\n# EDITABLE END\n")
    assert block.source == "# a comment of the block\nx = 1\n# another\n"


@pytest.mark.parametrize("text, message", [
    ("# EDITABLE BEGIN\nx = 1\n", "no banner 'EDITABLE END'"),
    ("x = 1\n# EDITABLE END\n", "no banner 'EDITABLE BEGIN'"),
    ("# EDITABLE BEGIN\n# EDITABLE BEGIN\n# EDITABLE END\n", "2 banners 'EDITABLE BEGIN' .lines 1, 2."),
    ("# EDITABLE END\n# EDITABLE BEGIN\n", "comes before"),
    ("x = 1\n", "not a bare block"),
    ("def (:\n", "not a bare block either: SyntaxError"),
    ("", "not a bare block"),
])
def test_extract_refuses(text, message):
    with pytest.raises(check.UserError, match=message):
        check.extract(text)


# -- static checks -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, expected", [
    ("x = [np, nn, F, torch, Categorical, deepcopy, ModelBackbone, soft_update, asymmetric_l2_loss, len, Optional[Dict[str, Any]]]", []),
    ("import math\ndef f(a, *b, c=1, **d):\n    e = a\n    return [g + e for g in b], math, c, d", []),
    ("def f():\n    return later()\ndef later():\n    return 1", []),
    ("def f():\n    global made\n    made = 1\ndef g():\n    return made", []),
    ("class A:\n    n = 2\n    m: int = n + 1\n    def f(self):\n        return super().f(), __class__", []),
    ("try:\n    pass\nexcept ValueError as error:\n    raise error", []),
    ("x = math.pi", [("math", 1)]),
    ("import numpy\n\ndef f():\n    return lambda: NUM_ACTIONS", [("NUM_ACTIONS", 4)]),
    ("class A:\n    n = 2\n    def f(self):\n        return n", [("n", 4)]),
    ("def f(a=DEFAULT) -> Union[int, str]:\n    a: Nowhere = 1", [("DEFAULT", 1), ("Union", 1)]),
    ("@decorate\ndef f(x: TrainConfig): pass", [("decorate", 1), ("TrainConfig", 2)]),
    ("def f(LOCAL):\n    return LOCAL\ndef g():\n    return LOCAL", [("LOCAL", 4)]),
    ("print('x')\nopen('f')", [("print", 1), ("open", 2)]),
])
def test_names_from_outside(source, expected):
    assert check.names_from_outside(source) == expected


def test_names_are_reported_with_the_files_lines():
    with pytest.raises(check.CheckFailed, match=r"^BLSTATS \(line 102\), print \(line 103; not in a block\)$"):
        check.check_names(block_of("\nx = BLSTATS\nprint(x)\n", first_line=101))


def test_provided_names_are_what_the_standin_provides():
    imported = {alias.asname or alias.name for node in ast.parse(check.PROLOGUE).body for alias in node.names}
    assert imported | set(check.HELPERS) == check.PROVIDED


@pytest.mark.parametrize("source", ["import nle", "import wandb.sdk", "from gymnasium import Env", "from . import x", "from .a import b",
                                    "from math import *", "import custom_nethack_pomdp", "def f():\n    import pyrallis"])
def test_imports_from_elsewhere_fail(source):
    with pytest.raises(check.CheckFailed):
        check.check_imports(block_of(source))


def test_imports_that_pass():
    assert check.check_imports(block_of("import math, torch.nn.functional\nfrom collections import deque\nimport numpy as np")) \
        == "collections, math, numpy, torch"


@pytest.mark.parametrize("source, message", [
    ("x = 1\nmatch x:\n    case 1:\n        pass\n", "line"),
    ("def f(x: int | None): pass", "Python 3.10"),
    ("class A:\n    x: 'a'\n    y: list[int | str] = []", "line 3.*Python 3.10"),
    ("def f() -> int | None: pass", "Python 3.10"),
    ("from __future__ import annotations", "__future__"),
    ("x = (", "line 1"),
    ("with (open('a') as a, open('b') as b):\n    pass\n", "line \\d: Parenthesized"),  # Python 3.9
    ("names: list[int] = []\n", r"line 1: list\[...\] needs Python 3.9"),
    ("x = 1\nname = 'abc'.removeprefix('a')\n", "line 2: 'abc'.removeprefix is newer"),
    ("scaler = torch.amp.GradScaler('cuda')\n", "line 1: torch.amp.GradScaler is newer"),
    ("from torch.amp import GradScaler\n", "line 1: torch.amp.GradScaler is newer"),
    ("import torch.nn.attention.flex_attention\n", "line 1: torch.nn.attention is newer"),
    ("x = 1\ny = F.rms_norm(x)\n", "line 2: torch.nn.functional.rms_norm is newer"),
    ("for a, b in zip(c, d, strict=True):\n    pass\n", r"line 1: zip\(strict=\) is newer"),
    ("def f(a: Dict[str, int], b):\n    return b | a\n", "line 2: `dict | dict` needs Python 3.9"),
    ("a = dict(b)\na |= c\n", "line 2: `dict | dict` needs Python 3.9"),
])
def test_syntax_too_new(source, message):
    with pytest.raises(check.CheckFailed, match=message):
        check.check_syntax(block_of(source))


def test_syntax_that_passes():
    source = "import torch.nn.functional as F\na = {**b}\nc = (a > 1) | (b > 1)\nd = zip(a, b)\nm.load_state_dict(w, strict=True)\n"
    assert check.check_syntax(block_of(source)) == "Python 3.8, 5 lines"


# -- checks that run the block -----------------------------------------------------------------------------------------

LOSS = "        loss = masked_mean(nll, counts)\n"                                     # of bc.py
RETURN = '        return loss, states, {"loss": loss.detach(), "loss_per_action": loss.detach(), "accuracy": accuracy}\n'
STATES = '        states = {"online": tuple(s.detach() for s in new_state)}\n'
ACTIONS = "logits[:, 0].argmax(dim=-1).cpu().numpy()"
POLICY = "        self.policy = nn.Linear(backbone.rnn_hidden_dim, backbone.num_actions)\n"

BROKEN = [
    # which check must notice, in what words, and what is wrong with the block
    ("loads", "NameError.*MISSING.*line 20", "bc", [("NOT_OBSERVATIONS = (", "NOT_OBSERVATIONS = MISSING + (")]),
    ("loads", "no class Model", "bc", [("class Model(nn.Module)", "class Modell(nn.Module)"), ("Model(backbone)", "Modell(backbone)")]),
    ("loads", "SystemExit", "bc", [("NOT_OBSERVATIONS = (", "raise SystemExit\nNOT_OBSERVATIONS = (")]),
    ("builds", "AttributeError.*expectile.*line", "bc",
     [("        self.model = M", "        self.e = config.expectile\n        self.model = M")]),
    ("builds", "not the backbone that was given", "bc", [("self.backbone = backbone", "self.backbone = deepcopy(backbone)")]),
    ("builds", "backbone was changed", "bc", [(POLICY, POLICY + "        nn.init.zeros_(backbone.rnn.weight_hh_l0)\n")]),
    ("builds", "not part of algo.model", "bc",
     [("return self.model.parameters()", "return list(self.model.parameters()) + [nn.Parameter(torch.ones(1))]")]),
    ("builds", "leaves out", "bc", [("return self.model.parameters()", "return self.model.policy.parameters()")]),
    ("trains, float32", "loss is nan", "bc", [(LOSS, LOSS + "        loss = loss * float('nan')\n")]),
    ("trains, float32", "not a scalar", "bc", [(LOSS, LOSS + "        loss = nll\n")]),
    ("trains, float32", "float16", "bc", [(LOSS, LOSS + "        loss = loss.half()\n")]),
    ("trains, float32", "float64", "bc", [(LOSS, LOSS + "        loss = loss.double()\n")]),
    ("trains, float32", "view size is not compatible.*line", "bc", [(".contiguous()", "")]),
    ("trains, float32", "view size is not compatible.*line", "iql", [("v[:, 1:].contiguous()", "v[:, 1:]")]),
    ("trains, float32", "gradient of every parameter", "bc",
     [(POLICY, POLICY + "        self.policy.bias.requires_grad_(False)\n")]),
    ("builds", "leaf variables", "bc", [(POLICY, POLICY + "        self.kept = [deepcopy(backbone).requires_grad_(False)]\n")]),
    ("trains, float32", "not detached", "bc", [(STATES, '        states = {"online": tuple(new_state)}\n')]),
    ("trains, float32", "not a tuple of tensors", "bc", [(STATES, '        states = {"online": new_state[0].detach()}\n')]),
    ("trains, float32", "not a tuple of tensors", "bc", [(STATES, STATES + '        states["prev"] = (1, 2)\n')]),
    ("trains, float32", r"info\['loss'\] is neither", "bc", [(RETURN, RETURN.replace('"loss": loss.detach()', '"loss": loss'))]),
    ("trains, float32", "info lacks accuracy", "bc", [(RETURN, RETURN.replace('"accuracy"', '"acc"'))]),
    ("trains, float32", r"info\['accuracy'\] is nan", "bc", [(RETURN, RETURN.replace("accuracy}", "float('nan')}"))]),
    ("trains, float32", "changed in place", "bc", [(STATES, STATES + '        batch["rewards"].add_(1.0)\n')]),
    ("trains, float32", "KeyError: 'mask'", "bc", [('if "mask" in batch else', "if True else")]),
    ("trains, float32", "KeyError: 'blstats'", "bc", [(STATES, STATES + '        batch["blstats"]\n')]),
    ("trains, float32", "Class values|index", "bc", [("prev_actions.long(), actions", "prev_actions.long() + 121, actions")]),
    ("trains, float32", "no gradient reaches backbone.topline.0.weight", "bc",
     [("self.policy(core_output)", "self.policy(core_output.detach())")]),
    ("trains, float32", "no gradient reaches unused", "bc", [(POLICY, POLICY + "        self.unused = nn.Linear(2, 2)\n")]),
    ("trains, float16 autocast", "no gradient reaches backbone.topline.*CastCache", "bc",  # lost in autocast's memory
     [("        logits, new_state = self.model(",
       "        with torch.no_grad():\n            self.model(inputs)\n        logits, new_state = self.model(")]),
    ("trains, float16 autocast", "loss is", "bc",
     [(LOSS, LOSS + "        loss = loss + core_output_overflow(new_state[0])\n"),
      ("class Model(", "def core_output_overflow(h):\n    return h.detach().abs().sum() * 1e9\n\n\nclass Model(")]),
    ("extreme rewards", "loss is inf", "bc", [(LOSS, LOSS + '        loss = loss + torch.exp(20 * batch["rewards"].sum(dim=1)).mean()\n')]),
    ("extreme head", "loss is", "iql", [("clamp(max=math.log(maximum))", "clamp(max=100.0)")]),  # what the benchmark's own reference has
    ("our own loader, held out", "do not count change the loss", "bc", [('if "mask" in batch else', "if False else")]),
    ("our own loader, held out", "grad", "bc", [(LOSS, LOSS + "        loss.backward(retain_graph=True)\n")]),
    ("acts", "float", "bc", [(ACTIONS, ACTIONS + ".astype(float)")]),
    ("acts", "returns a Tensor", "bc", [(ACTIONS, ACTIONS.replace(".cpu().numpy()", ""))]),
    ("acts", "shape", "bc", [(ACTIONS, ACTIONS + "[:, None]")]),
    ("acts", "outside of 0..120|Class values", "bc", [(ACTIONS, ACTIONS + " + 121")]),
    ("acts", "other actions", "bc", [(ACTIONS, "np.random.default_rng().integers(0, 121, len(logits))")]),
    ("acts", "one_hot|int64|Long", "bc", [('        inputs["prev_actions"] = inputs["prev_actions"].long()\n', "")]),
    ("copies", "deepcopy", "bc", [("        return self.policy(core_output).float(), new_state",
                                   "        self.last = self.policy(core_output)\n        return self.last.float(), new_state")]),
]


CHECKS = {  # those of `run_checks`, one at a time
    "loads": lambda trial: None,
    "builds": check.check_builds,
    "trains, float32": check.check_trains,
    "trains, float16 autocast": lambda trial: check.check_trains(trial, torch.float16),
    "extreme rewards": check.check_extreme_rewards,
    "extreme head": check.check_extreme_head,
    "our own loader, held out": check.check_held_out,
    "acts": check.check_acts,
    "copies": check.check_copies,
}


@pytest.mark.parametrize("name, message, reference, changes", BROKEN, ids=[f"{i}-{b[0]}" for i, b in enumerate(BROKEN)])
def test_a_broken_block_fails(name, message, reference, changes):
    block = edited(reference, *changes)
    result = check.attempt(block, name, lambda: CHECKS[name](check.Trial(block)))
    assert not result.passed
    assert re.search(message, result.detail), result.detail


PREVIOUS = '        inputs["prev_actions"] = inputs["prev_actions"].long()\n'
KEPT = '        inputs["tty_chars"], self.kept = getattr(self, "kept", inputs["tty_chars"]), inputs["tty_chars"]\n'
TRAPS = [  # of our own block: the text, the mistake in its place, what is told
    ("[:, begin:end].contiguous()", "[:, begin:end]", "view size is not compatible.*line"),
    ("        self.policy = nn.L", "        self.shared.requires_grad_(False)\n        self.policy = nn.L", "gradient of every parameter"),
    ("return loss, new_states", "return loss.double(), new_states", "loss is torch.float64"),
    # acts on the screens of the tick before, or on what has been written over them
    (PREVIOUS, PREVIOUS + KEPT, "keeps a view"),
    ('getattr(backbone, "no_action", 0)', "NO_ACTION", r"NO_ACTION \(line"),
    ("info.update(value_errors(", "info |= (value_errors(", r"`dict \| dict` needs Python 3.9"),
    ("int(found.group(1))", 'int(found.group(1).removeprefix(b"0"))', "removeprefix is newer"),
    ("-> List[int]:", "-> list[int]:", r"list\[...\] needs Python 3.9"),
    ("torch.clear_autocast_cache()", 'torch.amp.GradScaler("cpu")', "torch.amp.GradScaler is newer"),
    ("import crc32\n", "import crc32\nfrom torch.nn.attention import sdpa_kernel\n", "torch.nn.attention is newer"),
]


@pytest.mark.parametrize("old, new, message", TRAPS, ids=[trap[2] for trap in TRAPS])
def test_a_trap_in_our_block_is_found(old, new, message):
    block = check.read_block(check.DEFAULT_FILE)
    source = block.source.replace(old, new)
    assert source != block.source
    failed = [result.detail for result in check.run_checks(block._replace(source=source), full_size=False) if not result.passed]
    assert any(re.search(message, detail) for detail in failed), failed


def test_our_block_gets_over_the_first_rewards():
    """They come out at the clip, where there was none for a while."""
    trial = check.Trial(check.read_block(check.DEFAULT_FILE))
    highest, value_losses = [], []

    def rewards_come_late():
        for step, batch in enumerate(standin.made_up_batches(trial.config, seed=1, game_end=0.02)):
            yield {**batch, "rewards": (batch["rewards"] > 0) * (1.0 if step >= 40 else 0.0)}

    def on_step(step, batch, before, loss, states, info):
        assert torch.isfinite(loss) and np.isfinite(list(info.values())).all()
        highest.append(batch["rewards"].max().item())
        value_losses.append(info["value_loss"])

    trial.train(trial.algorithm(), batches=rewards_come_late(), steps=100, on_step=on_step)
    assert max(highest) == trial.config.clip_range == highest[40]
    assert max(value_losses) > 10 and np.mean(value_losses[-20:]) < 1, value_losses


@pytest.mark.parametrize("head, over", [
    ("nn.Sequential(nn.Linear(backbone.rnn_hidden_dim, 128), nn.Linear(128, backbone.num_actions))", ["267,033"]),
    ("nn.Sequential(nn.Linear(backbone.rnn_hidden_dim, 1024), nn.Linear(1024, backbone.num_actions))", ["267,033", "2,000,000"]),
])
def test_a_head_too_large_fails(head, over):
    trial = check.Trial(edited("bc", (POLICY, f"        self.policy = {head}\n")))
    with pytest.raises(check.CheckFailed) as failure:
        check.check_size(trial)
    assert [limit for limit in ("267,033", "2,000,000") if limit in str(failure.value)] == over


def test_a_target_network_inside_the_model_counts():
    block = edited("cql", ("        self.target = deepcopy(self.model)", "        self.target = self.model.target = deepcopy(self.model)"))
    with pytest.raises(check.CheckFailed, match="more than 2,000,000 and than 267,033"):
        check.check_size(check.Trial(block))


def test_a_run_stops_at_what_cannot_go_on():
    assert [(r.name, r.passed) for r in check.run_checks(block_of("x = (\n"))] == [("syntax", False)]
    names = [r.name for r in check.run_checks(edited("bc", ("class Model(nn.Module)", "class Model(nn.Missing)")))]
    assert names[-1] == "loads"


# -- the whole file ----------------------------------------------------------------------------------------------------

@pytest.fixture
def whole_file(tmp_path):
    """A file that holds everything: the stand-in's backbone and config, and a reference's block between banners."""
    with open(standin.__file__, encoding="utf-8") as file:
        around = file.read()
    path = tmp_path / "whole.py"
    begin, end = (f"{RULE}# EDITABLE {word}\n{RULE}" for word in ("BEGIN", "END"))
    path.write_text(around + begin + reference_source("bc") + end + "AFTER = 1\n", encoding="utf-8")
    return path


def test_whole_file_passes(whole_file):
    block = check.read_block(str(whole_file))
    assert block.source == reference_source("bc") and block.whole_file
    assert "247,929" in check.check_whole_file(block)


@pytest.mark.parametrize("old, new, message", [
    ("AFTER = 1", "AFTER = undefined", "NameError.*undefined.*line"),
    ("AFTER = 1", "import sys\nsys.modules[__name__] = sys", "registers itself"),
    ("import contextlib\n", "from __future__ import annotations\nimport contextlib\n", "AttributeError"),  # @dataclass looks its module up
    ("class TrainConfig:", "class OtherConfig:", "TrainConfig"),
])
def test_whole_file_fails(whole_file, old, new, message):
    text = whole_file.read_text(encoding="utf-8")
    assert old in text
    docstring_end = text.index('"""\n', 3) + 4
    if "__future__" in new:  # allowed only right after the docstring
        text = text[:docstring_end] + text[docstring_end:].replace(old, new, 1)
    else:
        text = text.replace(old, new)
    whole_file.write_text(text, encoding="utf-8")
    block = check.read_block(str(whole_file))
    try:
        result = check.attempt(block, "whole", check.check_whole_file, block)
    finally:
        sys.modules.pop("_whole_file_under_check", None)
    assert not result.passed
    assert re.search(message, result.detail), result.detail


# -- the command -------------------------------------------------------------------------------------------------------

def command(*arguments, **options):
    return subprocess.run([sys.executable, os.path.join(SCRIPTS, "check_submission.py"), *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, check=False, **options)


def test_command_passes_and_exports(whole_file, tmp_path):
    out = tmp_path / "block.py"
    done = command(whole_file, "--export", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    checks = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    assert len(checks) >= 14 and all(line.startswith("ok ") for line in checks)
    assert check.read_block(str(out)).source == check.read_block(str(whole_file)).source
    assert sorted(os.listdir(tmp_path)) == ["block.py", "whole.py"]  # no temporary file, no __pycache__


def test_command_fails(tmp_path):
    path, out = tmp_path / "bad.py", tmp_path / "block.py"
    path.write_text(edited("bc", ("NOT_OBSERVATIONS = (", "NOT_OBSERVATIONS = MISSING + (")).source, encoding="utf-8")
    done = command(path, "--export", out)
    assert done.returncode == 1 and done.stderr == ""
    assert "FAIL names from outside: MISSING (line 20)" in done.stdout
    assert not out.exists()


def test_command_tells_the_users_mistake(tmp_path):
    nothing = tmp_path / "nothing.py"
    nothing.write_text("x = 1\n", encoding="utf-8")
    binary = tmp_path / "binary.py"
    binary.write_bytes(b"\xff\xfe\x00")
    mine = tmp_path / "mine.py"
    mine.write_text("my work\n", encoding="utf-8")
    for arguments in ([tmp_path / "none.py"], [tmp_path], [nothing], [binary], [reference_path("bc"), "--export", mine],
                      [reference_path("bc"), "--export", tmp_path / "no" / "block.py"]):
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr(check.sys, "stderr", SimpleNamespace(write=lines.append, flush=lambda: None))
            assert check.main([str(a) for a in arguments]) == 2
        assert "".join(lines).startswith("check_submission.py: ") and "".join(lines).count("\n") == 1
    assert mine.read_text(encoding="utf-8") == "my work\n"
    done = command(tmp_path / "none.py")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_export_overwrites_only_an_export(tmp_path):
    out = tmp_path / "block.py"
    for name in ("bc", "cql"):
        check.export(check.read_block(reference_path(name)), str(out))
        again = check.read_block(str(out))
        assert again.source == reference_source(name)
        assert again.where(1) == "line 2"  # below the mark
    check.export(again, str(out))  # an exported block onto itself
    assert check.read_block(str(out)).source == reference_source("cql")
    with pytest.raises(check.UserError, match="will not overwrite"):
        check.may_export(reference_path("iql"))


# -- the stand-in ------------------------------------------------------------------------------------------------------

def test_standin_batches_overlap_by_one_step():
    config = standin.TrainConfig(batch_size=2, seq_len=4)
    batches = standin.made_up_batches(config, seed=0)
    first, second = next(batches), next(batches)
    for key in first:
        assert first[key].shape[:2] == (2, 5)
        assert np.array_equal(first[key][:, -1], second[key][:, 0])


def test_standin_loop():
    config = standin.TrainConfig(batch_size=2, seq_len=4)
    model, given, carried = nn.Linear(1, 1), [], []

    def train_step(batch, prev_actions, states):
        assert all(value.dtype == torch.float32 for value in batch.values())
        given.append(prev_actions)
        carried.append(states)
        return model(torch.ones(1)).sum(), {"number": len(given)}, {"loss": 0.0}

    algo = SimpleNamespace(model=model, train_step=train_step, after_gradient_step=lambda: None)
    standin.run_training(algo, config, standin.made_up_batches(config, seed=0), steps=3)
    batches = standin.made_up_batches(config, seed=0)
    assert all(actions.dtype == torch.int64 for actions in given) and not given[0].any()
    assert all(np.array_equal(actions, next(batches)["actions"][:, -2:-1]) for actions in given[1:])
    assert carried == [{}, {"number": 1}, {"number": 2}]


def test_standin_prints_the_benchmarks_line():
    assert standin.metrics_line(2000, {"loss": torch.tensor(0.5), "n": 3}) == "TRAIN_METRICS step=2000 loss=0.5000 n=3"
    with pytest.raises(RuntimeError):
        standin.metrics_line(1, {"loss": torch.ones(2)})


def test_standin_backbone_has_katakombas_size():
    backbone = standin.ModelBackbone(121, rnn_hidden_dim=2048, rnn_layers=2)
    lstm = 4 * 2048 * ((128 + 128 + 512 + 121) + 2048 + 2) + 4 * 2048 * (2048 + 2048 + 2)
    assert sum(p.numel() for p in backbone.rnn.parameters()) == lstm


def test_standin_backbone_refuses_an_action_that_is_none():
    backbone = standin.ModelBackbone(5, rnn_hidden_dim=4, width=8)
    inputs = {k: torch.as_tensor(v) for k, v in standin.made_up_frames(np.random.default_rng(0), 1, 2).items()}
    backbone({**inputs, "prev_actions": torch.tensor([[0, 4]])})
    with pytest.raises(RuntimeError):
        backbone({**inputs, "prev_actions": torch.tensor([[0, 5]])})
    with pytest.raises(RuntimeError):
        backbone({**inputs, "prev_actions": torch.tensor([[0.0, 4.0]])})


def test_standin_helpers():
    u = torch.tensor([-2.0, 1.0])
    assert standin.asymmetric_l2_loss(u, 0.8).item() == pytest.approx((0.2 * 4 + 0.8 * 1) / 2)
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    expected = 0.75 * target.weight.item() + 0.25 * source.weight.item()
    standin.soft_update(target, source, 0.25)
    assert target.weight.item() == pytest.approx(expected)


def test_standin_scales_rewards():
    scaler = standin.RewardScaler(gamma=0.5, clip_range=1.5)
    none, end = np.zeros((1, 1), bool), np.ones((1, 1), bool)
    assert scaler(np.array([[2.0]]), none)[0, 0] == pytest.approx(1.0)              # 2 / sqrt(4)
    assert scaler(np.array([[3.0]]), end)[0, 0] == pytest.approx(3.0 / 10 ** 0.5)   # the sum is 0.5 * 2 + 3 = 4: mean square (4 + 16) / 2
    # The sum began again: 90 / sqrt((4 + 16 + 8100) / 3) is 1.73.
    assert scaler(np.array([[90.0]]), none)[0, 0] == 1.5


# -- the references' equations, against plain loops --------------------------------------------------------------------

class TinyBackbone(nn.Module):
    """Has no memory and sees one number, so that an expected value can be written down; its state counts the frames."""

    num_actions, rnn_hidden_dim = 4, 3

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(2, 3)

    def forward(self, inputs, state=None):
        pair = torch.stack([inputs["number"], inputs["prev_actions"].float()], dim=-1)  # [B, T, 2]
        h = torch.zeros(1, len(pair), 3) if state is None else state[0]
        return torch.tanh(self.encode(pair)), (h + pair.shape[1], h)


def reference(name, seed=0):
    """The reference on the tiny backbone, its target network moved away from the online one."""
    spec = importlib.util.spec_from_file_location("reference_" + name, reference_path(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    algo = module.OfflineAlgorithm(TinyBackbone(), SimpleNamespace(gamma=0.9, tau=0.25), "cpu")
    if hasattr(algo, "target"):
        with torch.no_grad():
            for parameter in algo.target.parameters():
                parameter.add_(torch.randn_like(parameter))
    return algo


def tiny_batch():
    """[2, 5]: a game ends inside the first row; in the second row one breaks off, and in the last place nothing counts."""
    generator = torch.Generator().manual_seed(1)
    return {
        "number": torch.randn(2, 5, generator=generator),
        "actions": torch.randint(0, 4, (2, 5), generator=generator),
        "rewards": torch.randn(2, 5, generator=generator),
        "dones": torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool),
        "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.bool),
    }, torch.tensor([[2], [3]])


def frames(batch):
    """(b, t, whether a TD target exists) of every frame that carries loss."""
    for b in range(2):
        for t in range(4):
            if batch["mask"][b, t]:
                yield b, t, bool(batch["mask"][b, t + 1] or batch["dones"][b, t])


def previous(batch, first, b, t):
    return first[b, 0] if t == 0 else batch["actions"][b, t - 1]


def core(model, batch, first, b, t):
    pair = torch.stack([batch["number"][b, t], previous(batch, first, b, t).float()])
    return torch.tanh(model.backbone.encode(pair))


def mean(values):
    return sum(values) / len(values)


@torch.no_grad()
def test_bc_is_maximum_likelihood():
    algo, (batch, first) = reference("bc"), tiny_batch()
    loss, states, info = algo.train_step(batch, first, {})
    nll = [-torch.log_softmax(algo.model.policy(core(algo.model, batch, first, b, t)), 0)[batch["actions"][b, t]].item()
           for b, t, _ in frames(batch)]
    assert loss.item() == pytest.approx(mean(nll), rel=1e-5) == info["loss_per_action"].item()
    assert set(states) == {"online"}


@torch.no_grad()
def test_cql_is_td_error_and_conservative_term():
    algo, (batch, first) = reference("cql"), tiny_batch()
    loss, states, info = algo.train_step(batch, first, {})
    errors, gaps = [], []
    for b, t, has_target in frames(batch):
        q = algo.model.q(core(algo.model, batch, first, b, t))
        taken = q[batch["actions"][b, t]].item()
        gaps.append(torch.log(torch.exp(q).sum()).item() - taken)
        if has_target:
            following = algo.target.q(core(algo.target, batch, first, b, t + 1)).max().item()
            y = batch["rewards"][b, t].item() + (0.0 if batch["dones"][b, t] else 0.9 * following)
            errors.append((taken - y) ** 2)
    assert len(errors) == 5 and len(gaps) == 7
    assert loss.item() == pytest.approx(2 * mean(errors) + mean(gaps), rel=1e-5)
    assert info["loss_per_action"].item() == pytest.approx(mean(gaps), rel=1e-5)
    assert set(states) == {"online", "target"}


@torch.no_grad()
def test_iql_is_its_three_losses():
    algo, (batch, first) = reference("iql"), tiny_batch()
    loss, states, info = algo.train_step(batch, first, {})

    def q_values(model, b, t):
        pair = torch.cat([core(model, batch, first, b, t), nn.functional.one_hot(batch["actions"][b, t], 4).float()])
        return model.q1(pair).item(), model.q2(pair).item()

    value_losses, td_losses, policy_losses = [], [], []
    for b, t, has_target in frames(batch):
        output = core(algo.model, batch, first, b, t)
        u = min(q_values(algo.target, b, t)) - algo.model.value(output).item()
        value_losses.append((0.8 if u >= 0 else 0.2) * u * u)
        nll = -torch.log_softmax(algo.model.policy(output), 0)[batch["actions"][b, t]].item()
        policy_losses.append(min(float(np.exp(u)), 100.0) * nll)
        if has_target:
            following = algo.model.value(core(algo.model, batch, first, b, t + 1)).item()
            y = batch["rewards"][b, t].item() + (0.0 if batch["dones"][b, t] else 0.9 * following)
            td_losses.append(mean([(q - y) ** 2 for q in q_values(algo.model, b, t)]))
    assert info["value_loss"].item() == pytest.approx(mean(value_losses), rel=1e-5)
    assert info["td_loss"].item() == pytest.approx(mean(td_losses), rel=1e-5)
    assert info["policy_loss"].item() == pytest.approx(mean(policy_losses), rel=1e-5)
    assert loss.item() == pytest.approx(mean(value_losses) + mean(td_losses) + mean(policy_losses), rel=1e-5)
    assert set(states) == {"online", "target", "next"}


def test_iql_weight_is_bounded():
    weight = importlib.util.spec_from_file_location("iql_weight", reference_path("iql"))
    module = importlib.util.module_from_spec(weight)
    weight.loader.exec_module(module)
    weights = module.advantage_weight(torch.tensor([-1e9, 0.0, 1.0, 4.0, 1e9]), 1.0, 100.0)
    assert weights.tolist() == pytest.approx([0.0, 1.0, np.e, np.exp(4.0), 100.0], rel=1e-5)


@pytest.mark.parametrize("name", ["cql", "iql"])
def test_target_follows_and_is_not_trained(name):
    algo, (batch, first) = reference(name), tiny_batch()
    loss, _, _ = algo.train_step(batch, first, {})
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in algo.target.parameters())
    old = [p.clone() for p in algo.target.parameters()]
    algo.after_gradient_step()
    for before, now, online in zip(old, algo.target.parameters(), algo.model.parameters()):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * online.detach())


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_states_run_on_and_are_never_cleared(name):
    algo, (batch, first) = reference(name), tiny_batch()
    batch["starts"] = torch.ones(2, dtype=torch.bool)
    states = {}
    for rounds in (1, 2, 3):
        _, states, _ = algo.train_step(batch, first, states)
        assert all((h == 4 * rounds).all() for h, _ in states.values())  # 4 new frames a batch, whatever ended or started


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_references_act_by_argmax(name):
    algo = reference(name)
    obs = {"number": np.linspace(-1, 1, 6).astype(np.float32), "prev_actions": np.zeros(6)}
    actions, state = algo.model.vec_act(obs, None)
    head = algo.model.q if name == "cql" else algo.model.policy
    inputs = {"number": torch.as_tensor(obs["number"])[:, None], "prev_actions": torch.zeros(6, 1, dtype=torch.long)}
    assert np.array_equal(actions, head(algo.model.backbone(inputs)[0])[:, 0].argmax(-1).numpy())
    assert np.array_equal(algo.model.vec_act(obs, None)[0], actions)
    assert (algo.model.vec_act(obs, state)[1][0] == 2).all()


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_references_learn_one_batch(name):
    algo, (batch, first) = reference(name), tiny_batch()
    batch["actions"] = (batch["number"] > 0).long()
    batch["rewards"] *= 0.1
    optimizer = torch.optim.Adam(algo.parameters(), lr=0.05)
    paid = []
    for _ in range(150):
        loss, _, info = algo.train_step(batch, first, {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        algo.after_gradient_step()
        paid.append(info["loss_per_action"].item())
    assert paid[-1] < 0.6 * paid[0]
