# SPDX-License-Identifier: MIT
"""scripts/check_submission.py: it accepts what the benchmark would run, each of its checks can
fail, and the references are what they claim."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LIMIT_S
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
# parameters beyond the backbone, as the benchmark's have
REFERENCES = {"bc": 247_929, "cql": 247_929, "iql": 254_318}
sys.path.insert(0, str(ROOT / "scripts"))
import check_submission as check
import standin

# the benchmark's backbone is scripted
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def path_of(name):
    return (
        ROOT / "scripts" / "references" / f"{name}.py"
        if name in REFERENCES
        else ROOT / "custom_nethack_pomdp.py"
    )


def edited(name, *changes):
    """The block of ours or a reference with pieces of its text replaced; a piece that is not there
    is a mistake."""
    block = standin.read_block(path_of(name))
    source = block.source
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return block._replace(source=source)


def failures(block, **options):
    return [
        f"{name}: {detail}"
        for name, passed, detail in check.run_checks(block, **options)
        if not passed
    ]


# --- What passes
@pytest.mark.parametrize("name", ["ours", *REFERENCES])
def test_ours_and_the_references_pass(name):
    results = list(check.run_checks(standin.read_block(path_of(name))))
    assert [result for result in results if not result[1]] == []
    assert len(results) == 9 + (name == "ours")
    if name in REFERENCES:
        assert results[-1][2].startswith(
            f"{REFERENCES[name]:,} parameters beyond the backbone; the limits are 267,033"
        )


# --- Taking the block out
RULE = "# " + "=" * 60 + "\n"
BEGIN, END = (f"# ==== EDITABLE {word} ====\n" for word in ("BEGIN", "END"))
BARE = "class Model:\n    pass\nclass OfflineAlgorithm:\n    pass\n"


def test_a_block_is_what_lies_between_the_banners(tmp_path):
    file = tmp_path / "file.py"
    head = '"""A docstring may speak of EDITABLE BEGIN."""\n'
    for banners in ([RULE, BEGIN, RULE], [BEGIN]):
        file.write_text(
            head + "".join(banners) + "# first\nx = 1\n\n# last\n" + RULE + END + RULE + "y = 2\n"
        )
        block = standin.read_block(file)
        assert block.source == "# first\nx = 1\n\n# last\n"
        assert block.first_line == 2 + len(banners) and block.whole_file


@pytest.mark.parametrize(
    "text, message",
    [
        (BEGIN + BARE, "there is BEGIN in line 1$"),
        (BARE + END, "there is END in line 5$"),
        (BEGIN + BEGIN + END, "there is BEGIN in line 1, BEGIN in line 2, END in line 3$"),
        (END + BEGIN, "there must be a banner EDITABLE BEGIN and then one EDITABLE END"),
        ("x = 1\n", "neither EDITABLE banners nor a bare block"),
        (b"\xff\xfe\x00", "neither EDITABLE banners nor a bare block"),
        (None, "No such file or directory: .*file.py"),
    ],
)
def test_a_file_without_a_block_is_told_in_one_line(text, message, tmp_path, capsys):
    file = tmp_path / "file.py"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    assert check.main([str(file)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert re.search(rf"^check_submission.py: .*{message}", error.strip()), error


# --- The text
@pytest.mark.parametrize(
    "source, expected",
    [
        (
            "x = [np, nn, F, Categorical, deepcopy, ModelBackbone, soft_update, len, Optional[Dict[str, Any]]]",  # noqa: E501
            [],
        ),
        (
            "import math\ndef f(a, *b, c=1, **d):\n    e = a\n    return [g + e for g in b], math, c, d",  # noqa: E501
            [],
        ),
        ("def f():\n    return later()\ndef later():\n    return 1", []),
        ("def f():\n    global made\n    made = 1\ndef g():\n    return made", []),
        (
            "class A:\n    n = 2\n    m: int = n + 1\n    def f(self):\n        return super().f(), __class__",  # noqa: E501
            [],
        ),
        ("try:\n    pass\nexcept ValueError as error:\n    raise error", []),
        ("x = math.pi", [(1, "math")]),
        ("import numpy\n\ndef f():\n    return lambda: NUM_ACTIONS", [(4, "NUM_ACTIONS")]),
        ("class A:\n    n = 2\n    def f(self):\n        return n", [(4, "n")]),
        ("def f(a=DEFAULT) -> Union[int, str]:\n    pass", [(1, "DEFAULT"), (1, "Union")]),
        ("@decorate\ndef f(x: Blstats): pass", [(1, "decorate"), (2, "Blstats")]),
        ("def f(LOCAL):\n    return LOCAL\ndef g():\n    return LOCAL", [(4, "LOCAL")]),
        ("print('x')\nopen('f')", [(1, "print"), (2, "open")]),
    ],
)
def test_names_from_outside(source, expected):
    assert sorted(check.names_from_outside(source)) == expected


@pytest.mark.parametrize(
    "source, complaints",
    [
        (
            "import math, torch.nn.functional, nle\nfrom collections import deque\nimport numpy as np",  # noqa: E501
            [],
        ),
        (
            "a = {**b}\nc = (a > 1) | (b > 1)\nd = zip(a, b)\nm.load_state_dict(w, strict=True)\na |= b\n",  # noqa: E501
            [],
        ),
        ("import gym", ["line 1: import of gym"]),
        ("import os, wandb.sdk", ["line 1: import of os: neither"]),
        ("from . import x", ["line 1: import of"]),
        (
            "def f():\n    import custom_nethack_pomdp",
            ["line 2: import of custom_nethack_pomdp: neither"],
        ),
        (
            "x = 1\nmatch x:\n    case 1:\n        pass\n",
            ["line 4: Pattern matching is only supported in Python 3.10"],
        ),
        (
            "with (open('a') as a, open('b') as b):\n    pass\n",
            ["line 2: Parenthesized context managers"],
        ),
        ("x = (", ["line 1: '(' was never closed"]),
        ("def f(x: int | None): pass", ["line 1: `X | Y` as a type needs Python 3.10"]),
        ("def f() -> int | None: pass", ["line 1: `X | Y`"]),
        ("x: int\ny: list[int] = []", ["line 2: list[...] needs Python 3.9: write List of typing"]),
        ("from __future__ import annotations", ["line 1: from __future__"]),
        (
            "x = 1\ny = 'abc'.removeprefix('a')",
            ["line 2: .removeprefix is newer than Python 3.8 or torch 2.0.1"],
        ),
        ("x = torch.amp.GradScaler('cuda')", ["line 1: torch.amp.GradScaler is newer"]),
        ("from torch.amp import GradScaler", ["line 1: torch.amp.GradScaler is newer"]),
        ("import torch.nn.attention.flex_attention", ["line 1: torch.nn.attention is newer"]),
        ("x = 1\ny = F.rms_norm(x)", ["line 2: torch.nn.functional.rms_norm is newer"]),
        ("x = nn.RMSNorm(3)", ["line 1: torch.nn.RMSNorm is newer"]),
        ("for a, b in zip([], [], strict=True):\n    pass", ["line 1: zip(strict=) is newer"]),
        ("x = {} | {'a': 1}", ["line 1: `dict | dict` needs Python 3.9"]),
        ("a = {}\na |= dict(b=1)", ["line 2: `dict | dict`"]),
    ],
)
def test_text_that_the_benchmark_cannot_run(source, complaints):
    found = check.check_text(standin.Block("block.py", source.replace("= {**b}", "= b = np"), 101))
    told = [
        f"line {line - 100}: {complaint}"
        for line, complaint in found
        if "neither defined" not in complaint
    ]
    assert len(told) == len(complaints) and all(map(str.startswith, told, complaints)), told


# --- Each check can fail: which one must, in what words, and what is wrong with the block
# of bc.py
POLICY = "        self.policy = nn.Linear(backbone.rnn_hidden_dim, backbone.num_actions)\n"
FORWARD, INFO = (
    "        core_output, state = self.model.backbone(",
    '        info = {"loss": loss.detach()',
)
STATES, ACTIONS = (
    "tuple(part.detach() for part in state)",
    "self.policy(core_output[:, 0]).argmax(dim=-1)",
)
TRAINS, HALF, LOGITS = (
    "trains, float32",
    "trains, float16 autocast",
    "self.model.policy(core_output)",
)
# see below: without gradient
BROKEN = [
    ("loads", r"NameError.*MISSING.*\(line 19\)", "OBSERVATIONS = (", "OBSERVATIONS = MISSING + ("),
    ("loads", "no class Model", "class Model(nn.Module)", "class Modell(nn.Module)"),
    ("loads", "SystemExit", "OBSERVATIONS = (", "raise SystemExit\nOBSERVATIONS = ("),
    (
        "builds",
        r"AttributeError.*lam.*\(line \d+\)",
        " self.model = M",
        " config.lam; self.model = M",
    ),
    (
        "builds",
        "not the backbone that was given",
        "self.backbone = backbone",
        "self.backbone = deepcopy(backbone)",
    ),
    (
        "builds",
        "backbone was changed",
        POLICY,
        POLICY + "        nn.init.zeros_(backbone.rnn.weight_hh_l0)\n",
    ),
    (
        "builds",
        "not those of algo.model",
        "l.parameters())",
        "l.parameters()) + [nn.Parameter(torch.ones(1))]",
    ),
    (
        "builds",
        "not those of algo.model",
        "self.model.parameters()",
        "self.model.policy.parameters()",
    ),
    (
        "builds",
        "leaf variables",
        POLICY,
        POLICY + "        self.kept = [deepcopy(backbone).requires_grad_(False)]\n",
    ),
    (TRAINS, "step 1: loss is nan", INFO, "        loss = loss * float('nan')\n" + INFO),
    (TRAINS, "for scalar outputs", INFO, "        loss = nll\n" + INFO),
    (TRAINS, "loss is torch.float16", INFO, "        loss = loss.half()\n" + INFO),
    (TRAINS, r"view size is not compatible.*\(line \d+\)", ".contiguous()", ""),
    (
        TRAINS,
        "gradient of every parameter",
        POLICY,
        POLICY + "        self.policy.bias.requires_grad_(False)\n",
    ),
    (TRAINS, "step 1: rnn_states are not detached", STATES, "tuple(state)"),
    (TRAINS, r"info\['loss'\] is no number", INFO, '        info = {"loss": "low"'),
    (
        TRAINS,
        "only one element tensors|Tensor with 2",
        INFO,
        '        info = {"loss": torch.ones(2)',
    ),
    (TRAINS, r"info\['accuracy'\] is nan", '"accuracy": accuracy', '"accuracy": float("nan")'),
    (TRAINS, "changed in place", INFO, '        batch["rewards"].add_(1.0)\n' + INFO),
    (
        TRAINS,
        "KeyError: 'mask'",
        'batch.get("mask", torch.ones_like(batch["actions"]))',
        'batch["mask"]',
    ),
    (TRAINS, "KeyError: 'blstats'", INFO, '        batch["blstats"]\n' + INFO),
    (TRAINS, "Class values", "prev_actions.long(), actions", "prev_actions.long() + 121, actions"),
    (
        TRAINS,
        "reaches 30 parameters, backbone.topline.0.weight",
        LOGITS,
        "self.model.policy(core_output.detach())",
    ),
    (
        TRAINS,
        "reaches 2 parameters, unused.weight",
        POLICY,
        POLICY + "        self.unused = nn.Linear(2, 2)\n",
    ),
    (HALF, "reaches 22 parameters, .*CASTS", FORWARD, FORWARD + "inputs)\n" + FORWARD),
    (HALF, "loss is (inf|nan)", LOGITS, "(core_output.half() * 1e6)[..., :1].expand(-1, -1, 121)"),
    (
        "extreme weights",
        "loss is inf",
        INFO,
        "        loss = loss * torch.exp(logits.detach().max())\n" + INFO,
    ),
    ("acts", "ndarray float64 .14., not", ACTIONS, ACTIONS + ".double()"),
    ("acts", "gives Tensor torch.int64 .14., not", ACTIONS + ".cpu().numpy()", ACTIONS),
    ("acts", "gives ndarray int64 .14, 1., not", ACTIONS, ACTIONS + "[:, None]"),
    ("acts", "outside of 0..120|Class values", ACTIONS, ACTIONS + ".add(121)"),
    (
        "acts",
        "other actions from the same",
        ACTIONS,
        "torch.tensor(np.random.default_rng().integers(0, 121, 14))",
    ),
    ("acts", "one_hot", 'inputs["prev_actions"].long()', 'inputs["prev_actions"]'),
    (
        "head's size",
        "271,050 .* more than 267,033$",
        POLICY,
        POLICY + "        self.more = nn.Linear(23120, 1)\n",
    ),
    (
        "head's size",
        "more than 267,033 and than 2,000,000$",
        POLICY,
        POLICY + "        self.m = deepcopy(backbone)\n",
    ),
]


@pytest.mark.parametrize(
    "name, message, old, new", BROKEN, ids=[f"{case[0]}: {case[1]}" for case in BROKEN]
)
def test_a_broken_block_fails(name, message, old, new):
    if "CASTS" in message:
        new = "        with torch.no_grad():\n    " + new
    found = [
        text
        for text in failures(edited("bc", (old, new)), only=name)
        if not text.startswith("text: ")
    ]
    assert len(found) == 1 and re.search(f"^{name}: .*({message})", found[0]), found


CLEARED = '        inputs["prev_actions"] = previous'
KEPT = '        inputs["tty_chars"], self.kept = getattr(self, "kept", inputs["tty_chars"]), inputs["tty_chars"]\n'  # noqa: E501
TRAPS = [  # of our own block: the text, the mistake in its place, what is told
    ("[:, start:end].contiguous()", "[:, start:end]", "view size is not compatible.*line"),
    (
        " self.policy = nn.L",
        " self.shared.requires_grad_(False); self.policy = nn.L",
        "of every parameter",
    ),
    ("return loss, new_states", "return loss.double(), new_states", "loss is torch.float64"),
    ("tuple(part.detach() for part in stored_state)", "stored_state", "not detached"),
    (
        "masked_fill(begins, self.model.no_action)",
        "masked_fill(begins, 121)",
        "trains.*Class values",
    ),
    ("masked_fill(rows, self.no_action)", "masked_fill(rows, 121)", "acts: .*Class values"),
    (CLEARED, KEPT + CLEARED, "keeps a view"),  # acts on the screens of the tick before
    ("torch.clear_autocast_cache()", "pass", "no gradient reaches .*backbone.topline.*CASTS"),
    (
        "core_output.float()",
        "core_output.detach().float()",
        "no gradient reaches 30 parameters, backbone",
    ),
    ('getattr(backbone, "no_action", 0)', "NO_ACTION", r"text: line \d+: NO_ACTION is neither"),
    ('batch.get("starts", begun)', 'batch["starts"]', "KeyError: 'starts'"),
]


@pytest.mark.parametrize("old, new, message", TRAPS, ids=[trap[2] for trap in TRAPS])
def test_a_mistake_in_our_block_is_found_by_name(old, new, message):
    found = failures(edited("ours", (old, new)), full_size=False)
    assert any(re.search(message, text) for text in found), found


def test_a_run_stops_at_what_cannot_go_on():
    block = standin.Block("block.py", "x = (\n")
    assert [result[:2] for result in check.run_checks(block)] == [("text", False), ("loads", False)]
    assert list(check.run_checks(edited("bc", ("self.backbone = backbone", "pass"))))[-1][:2] == (
        "builds",
        False,
    )


# --- The whole file
def test_the_whole_file_must_import_by_path(tmp_path):
    whole, text = tmp_path / "whole.py", path_of("ours").read_text(encoding="utf-8")
    for more, message in (
        ("\nundefined\n", r"NameError: name 'undefined' is not defined \(line \d+\)$"),
        ("\nimport sys\nsys.modules[__name__] = sys\n", "it registers itself in sys.modules$"),
        ("\ndel TrainConfig\n", "TrainConfig"),
        ("\nwith (open('a') as a, open('b') as b): pass\n", "Parenthesized context managers"),
        (
            "\nawr_config = lambda _: AWRConfig(200)\n",
            "434,523 parameters beyond the backbone, more than 267,033$",
        ),
    ):
        whole.write_text(text + more, encoding="utf-8")
        found = failures(standin.read_block(whole), only="whole file by path")
        sys.modules.pop("_under_check", None)
        assert len(found) == 1 and re.search(f"^whole file by path: .*{message}", found[0]), found


# --- The command
def command(*arguments):
    line = [sys.executable, str(ROOT / "scripts" / "check_submission.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_the_command_passes_and_exports(tmp_path):
    out = tmp_path / "block.py"
    for name in ("bc", "ours"):  # an export may overwrite an export
        done = command(path_of(name), "--export", out)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (
            all(line.startswith("ok ") for line in done.stdout.splitlines()[:-1])
            and done.stderr == ""
        )
        exported, original = standin.read_block(out), standin.read_block(path_of(name))
        assert exported.source == original.source and exported.first_line == 2
        # no temporary file, no __pycache__
        assert [file.name for file in tmp_path.iterdir()] == ["block.py"]


def test_the_command_fails_and_tells_what_it_will_not_do(tmp_path, capsys):
    bad, out = tmp_path / "bad.py", tmp_path / "block.py"
    bad.write_text(
        edited("bc", ("OBSERVATIONS = (", "OBSERVATIONS = MISSING + (")).source, encoding="utf-8"
    )
    done = command(bad, "--export", out)
    assert done.returncode == 1 and done.stderr == "" and not out.exists()
    assert "FAIL text: line 19: MISSING is neither defined nor provided" in done.stdout
    text = bad.read_text(encoding="utf-8")
    for place in (bad, tmp_path):
        assert check.main([str(path_of("bc")), "--export", str(place)]) == 2
        assert (
            "will not overwrite" in capsys.readouterr().err
            and bad.read_text(encoding="utf-8") == text
        )


# --- The stand-in
def test_the_loop_is_the_benchmarks():
    config = standin.TrainConfig(batch_size=2, seq_len=4, gamma=0.5, clip_range=1.5)
    model, given, seen = nn.Linear(1, 1), [], []

    def train_step(batch, prev_actions, states):
        assert all(value.dtype == torch.float32 for value in batch.values())
        given.append((prev_actions.clone(), states))
        # in place: the next previous actions are those that the block was given
        batch["actions"].zero_()
        return model(torch.ones(1)).sum(), {"number": len(given)}, {"loss": 0.0}

    def steps(rewards, dones):
        batches = standin.made_up_batches(config, seed=0)
        for reward, done in zip(rewards, dones):
            batch = next(batches)
            yield {**batch, "rewards": np.full((2, 5), reward), "dones": np.full((2, 5), done)}

    algo = SimpleNamespace(model=model, train_step=train_step, after_gradient_step=lambda: None)
    keep = lambda step, batch, before, *_: seen.append(before)
    standin.run_training(
        algo, config, steps([2.0, 3.0, 90.0], [False, True, False]), 3, on_step=keep
    )
    # 2 / sqrt(4); 0.5 * 2 + 3 = 4, so 3 / sqrt((4 + 16) / 2); then the sum began again: 90 /
    # sqrt((4 + 16 + 8100) / 3).
    assert [before["rewards"][0, 0].item() for before in seen] == pytest.approx(
        [1.0, 3 / 10**0.5, 1.5]
    )
    assert [states for _, states in given] == [{}, {"number": 1}, {"number": 2}]
    assert all(actions.dtype == torch.int64 for actions, _ in given) and not given[0][0].any()
    for (actions, _), before, after in zip(given[1:], seen, seen[1:]):
        assert torch.equal(actions, before["actions"][:, -2:-1].long())
        assert all(
            torch.equal(before[name][:, -1], after[name][:, 0]) for name in ("actions", "tty_chars")
        )


def test_the_backbone_is_katakombas():
    backbone = standin.ModelBackbone(121)
    lstm = 4 * 2048 * ((128 + 128 + 512 + 121) + 2048 + 2) + 4 * 2048 * (2048 + 2048 + 2)
    assert sum(p.numel() for p in backbone.rnn.parameters()) == lstm
    small = standin.ModelBackbone(5, rnn_hidden_dim=4, width=8)
    inputs = {
        k: torch.as_tensor(v)
        for k, v in standin.made_up_frames(np.random.default_rng(0), 1, 2).items()
    }
    small({**inputs, "prev_actions": torch.tensor([[0, 4]])})
    for wrong in ([[0, 5]], [[0.0, 4.0]]):
        with pytest.raises(RuntimeError, match=r"Class values|one_hot"):
            small({**inputs, "prev_actions": torch.tensor(wrong)})


def test_the_helpers():
    assert standin.asymmetric_l2_loss(torch.tensor([-2.0, 1.0]), 0.8).item() == pytest.approx(
        (0.2 * 4 + 0.8 * 1) / 2
    )
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    expected = 0.75 * target.weight.item() + 0.25 * source.weight.item()
    standin.soft_update(target, source, 0.25)
    assert target.weight.item() == pytest.approx(expected)


def test_our_block_gets_over_the_first_rewards():
    """They come out at the clip, where there was none for a while."""
    trial = check.Trial(standin.read_block(standin.DEFAULT_FILE))
    trial.load()
    algo, value_losses = trial.algorithm(), []

    def rewards_come_late():
        for step, batch in enumerate(standin.made_up_batches(trial.config, seed=1, game_end=0.02)):
            yield {**batch, "rewards": (batch["rewards"] > 0) * (1.0 if step >= 40 else 0.0)}

    def on_step(step, batch, before, loss, states, info):
        assert torch.isfinite(loss) and (
            step != 41 or before["rewards"].max() == trial.config.clip_range
        )
        value_losses.append(info["value_loss"].item())

    standin.run_training(algo, trial.config, rewards_come_late(), 100, on_step=on_step)
    assert max(value_losses) > 10 and np.mean(value_losses[-20:]) < 1, value_losses


# --- The references' equations, against plain loops
class TinyBackbone(nn.Module):
    """Has no memory and sees one number, so that an expected value can be written down; its state
    counts the frames."""

    num_actions, rnn_hidden_dim = 4, 3

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(2, 3)

    def forward(self, inputs, state=None):
        # [B, T, 2]
        pair = torch.stack([inputs["tty_chars"], inputs["prev_actions"].float()], dim=-1)
        h = torch.zeros(1, len(pair), 3) if state is None else state[0]
        return torch.tanh(self.encode(pair)), (h + pair.shape[1], h)


def reference(name):
    """The reference on the tiny backbone, its target network moved away from the online one."""
    module = standin.module_by_path(path_of(name), {})
    torch.manual_seed(0)
    algo = module.OfflineAlgorithm(TinyBackbone(), SimpleNamespace(gamma=0.9, tau=0.25), "cpu")
    with torch.no_grad():
        for parameter in algo.target.parameters() if hasattr(algo, "target") else ():
            parameter.add_(torch.randn_like(parameter))
    return algo


def tiny_batch():
    """[2, 5], and the actions before: a game ends inside the first row; in the second, two frames
    do not count."""
    generator = torch.Generator().manual_seed(1)
    return {
        "tty_chars": torch.randn(2, 5, generator=generator),
        "actions": torch.randint(0, 4, (2, 5), generator=generator),
        "rewards": torch.randn(2, 5, generator=generator),
        "dones": torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool),
        "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.bool),
        "starts": torch.ones(2, dtype=torch.bool),  # which they do not look at
    }, torch.tensor([[2], [3]])


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_reference_is_its_equations(name):
    algo, (batch, first) = reference(name), tiny_batch()
    loss, states, info = algo.train_step(batch, first, {})

    def core(model, b, t):
        previous = first[b, 0] if t == 0 else batch["actions"][b, t - 1]
        return torch.tanh(
            model.backbone.encode(torch.stack([batch["tty_chars"][b, t], previous.float()]))
        )

    def q_values(model, b, t):
        pair = torch.cat(
            [core(model, b, t), nn.functional.one_hot(batch["actions"][b, t], 4).float()]
        )
        return model.q1(pair).item(), model.q2(pair).item()

    terms = []  # of each frame that counts
    for b, t in [(b, t) for b in range(2) for t in range(4) if batch["mask"][b, t]]:
        action, output = batch["actions"][b, t], core(algo.model, b, t)
        discount, reward = 0.0 if batch["dones"][b, t] else 0.9, batch["rewards"][b, t].item()
        if name == "cql":
            q, following = (
                algo.model.q(output),
                algo.target.q(core(algo.target, b, t + 1)).max().item(),
            )
            gap = torch.log(torch.exp(q).sum()).item() - q[action].item()
            terms.append((2 * (q[action].item() - reward - discount * following) ** 2, gap, gap))
            continue
        nll = -torch.log_softmax(algo.model.policy(output), 0)[action].item()
        if name == "bc":
            terms.append((nll, nll))
            continue
        u = min(q_values(algo.target, b, t)) - algo.model.value(output).item()
        y = reward + discount * algo.model.value(core(algo.model, b, t + 1)).item()
        td_error = np.mean([(q - y) ** 2 for q in q_values(algo.model, b, t)])
        terms.append(((0.8 if u >= 0 else 0.2) * u * u, td_error, min(np.exp(u), 100.0) * nll, nll))
    *losses, per_action = np.mean(terms, axis=0)
    assert loss.item() == pytest.approx(sum(losses), rel=1e-5)
    assert info["loss_per_action"].item() == pytest.approx(per_action, rel=1e-5)
    assert (
        set(states)
        == {"bc": {"online"}, "cql": {"online", "target"}, "iql": {"online", "target", "next"}}[
            name
        ]
    )
    for rounds in (2, 3):  # the states run on, whatever ended or started: 4 new frames a batch
        _, states, _ = algo.train_step(batch, first, states)
        assert all((h == 4 * rounds).all() for h, _ in states.values())


@pytest.mark.parametrize("name", ["cql", "iql"])
def test_a_target_network_follows_and_is_not_trained(name):
    algo, (batch, first) = reference(name), tiny_batch()
    algo.train_step(batch, first, {})[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in algo.target.parameters())
    old = [p.clone() for p in algo.target.parameters()]
    algo.after_gradient_step()
    for before, now, online in zip(old, algo.target.parameters(), algo.model.parameters()):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * online.detach())


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_reference_acts_by_argmax(name):
    algo, numbers = reference(name), np.linspace(-1, 1, 6).astype(np.float32)
    obs = {"tty_chars": numbers, "prev_actions": np.zeros(6)}
    actions, state = algo.model.vec_act(obs, None)
    head = algo.model.q if name == "cql" else algo.model.policy
    inputs = {"tty_chars": torch.tensor(numbers)[:, None], "prev_actions": torch.zeros(6, 1)}
    core_output, _ = algo.model.backbone(inputs)
    assert (
        np.array_equal(actions, head(core_output)[:, 0].argmax(-1).numpy())
        and len(set(actions)) > 1
    )
    assert (algo.model.vec_act(obs, state)[1][0] == 2).all()
