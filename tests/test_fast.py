# SPDX-License-Identifier: MIT
"""Speed changes no result: what only makes things faster gives what the plain way gives. And the
benchmark runs."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
GAMES = ROOT / "tests" / "data" / "nle_data"
pytestmark = pytest.mark.usefixtures("one_thread")


def trained(stores_path, updates=6, **settings):
    """Weights in one vector and losses of a short run with a small network."""
    config = dict(
        character="mon-hum-neu,val-hum-neu",
        data_path=str(GAMES),
        store_path=str(stores_path),
        device="cpu",
    )
    config.update(rnn_hidden_dim=64, batch_size=6, seq_len=8, clip_grad_norm=1.0, **settings)
    run = pomdp.make_run(pomdp.TrainConfig(**config))
    losses = []
    for step in range(updates):
        info = pomdp.gradient_step(run, *run.loader.batch_at(step))
        losses.append(float(info["loss"]))
    return torch.nn.utils.parameters_to_vector(run.algorithm.parameters()).detach(), losses


def test_bfloat16_training_stays_close_to_float32(stores_path):
    """Stated tolerance: losses of the first six updates within 0.1 % (measured: 0.002 %), the
    weights' change within 30 % (10 %: AdamW's first steps are as long for a small gradient as for a
    large one)."""
    (full, losses), (half, others) = (
        trained(stores_path, precision=name) for name in ("fp32", "bf16")
    )
    begin, _ = trained(stores_path, updates=0)
    np.testing.assert_allclose(others, losses, rtol=1e-3)
    assert others != losses and 0 < (full - half).norm() < 0.3 * (full - begin).norm()


def test_greedy_actions_of_the_fast_step_equal_the_lstms_on_recorded_games(games):
    torch.manual_seed(0)
    model = pomdp.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 512)).eval()
    loader = pomdp.ChunkLoader(games, range(8), pomdp.TrainConfig(seq_len=80), 8, 100.0)
    batch, prev_actions = loader.batch_at(0)
    inputs = {name: batch[name][:, :80] for name in pomdp.OBSERVATIONS}
    inputs["prev_actions"] = torch.cat([prev_actions, batch["actions"][:, :79]], dim=1)
    state, outputs = None, []
    with torch.no_grad():
        plain = model.backbone(inputs)[0]  # nn.LSTM over the whole chunk
        for t in range(80):
            output, state = model.backbone(
                {name: value[:, t : t + 1] for name, value in inputs.items()}, state
            )
            outputs.append(output)
        fast, plain = (
            model.head(core_output, inputs["tty_chars"])[0]
            for core_output in (torch.cat(outputs, dim=1), plain)
        )
    torch.testing.assert_close(fast, plain, rtol=0, atol=3e-5)
    counts = batch["mask"][:, :80]
    assert counts.sum() > 500 and torch.equal(fast.argmax(-1)[counts], plain.argmax(-1)[counts])


@torch.no_grad()
def test_the_packed_step_follows_the_weights_and_is_the_same_without_onednn_and_close_in_bfloat16(
    monkeypatch,
):
    torch.manual_seed(0)
    backbone = pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 64).eval()
    features, state = (
        torch.randn(8, backbone.rnn.input_size),
        (torch.randn(2, 8, 64), torch.randn(2, 8, 64)),
    )
    for update in (0.0, 1.0):  # act, update, act
        backbone.rnn.weight_hh_l1.sub_(update)
        plain, plain_state = backbone.rnn(features[:, None], state)
        fast, fast_state = backbone._step(features, state)
        torch.testing.assert_close([fast, *fast_state], [plain, *plain_state], rtol=0, atol=5e-6)
        assert backbone._packed_weights()[0][0].is_mkldnn
    assert copy.deepcopy(backbone)._packed is None  # 230 MB that a copy makes anew
    backbone.acting_dtype = torch.bfloat16
    half, _ = backbone._step(features, state)
    assert half.dtype == torch.float32 and 1e-5 < (half - plain).abs().max() < 5e-2
    backbone.acting_dtype = torch.float32
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(backbone._step(features, state)[0], plain, rtol=0, atol=5e-6)
    assert not backbone._packed_weights()[0][0].is_mkldnn


def benchmark(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)


KATAKOMBA = {  # what the benchmark takes out of a checkout, with the signatures that it has there
    "algorithms/small_scale/iql_chaotic_lstm.py": """
import gym, torch, wandb
from dataclasses import dataclass
from katakomba.utils.render import SCREEN_SHAPE

@dataclass
class TrainConfig:
    rnn_layers, learning_rate, weight_decay, tau, gamma, expectile_tau, temperature = 2, 1e-3, 0.0, 0.1, 0.9, 0.8, 1.0

class Critic(torch.nn.LSTM):
    def __init__(self, action_dim, rnn_hidden_dim, rnn_layers):
        super().__init__(80, rnn_hidden_dim, rnn_layers, batch_first=True)

def filter_wd_params(model):
    return [], list(model.parameters())

def soft_update(target, source, tau):
    pass

def iql_loss(critic, target_critic, obs, next_obs, actions, rewards, dones, rnn_states, target_rnn_states,
             next_rnn_states, gamma, expectile_tau, temperature):
    assert next_obs["screen_image"].shape[2:] == SCREEN_SHAPE and obs["prev_actions"].dtype == torch.long
    assert obs["prev_actions"].shape == actions.shape == rewards.shape == dones.shape == (4, 3) and gamma == 0.9
    output, state = critic(obs["tty_chars"][:, :, 0], rnn_states and tuple(rnn_states))
    return output.square().mean(), state, state, state, {}
""",  # noqa: E501
    "katakomba/utils/roles.py": "Role = Race = Alignment = str",
    "katakomba/utils/datasets/small_scale.py": """
import h5py

def NLDSmallDataset(role, race, align, mode):
    return h5py.File(f"{DATA_PATH}/data-{role}-{race}-{align}-any.hdf5", "r")
""",
    "katakomba/utils/datasets/small_scale_buffer.py": """
class SequentialBuffer:
    def __init__(self, dataset, batch_size, seq_len, add_next_step):
        self.dataset, self.steps = dataset, seq_len + add_next_step

    def sample(self):
        return {name: column[: self.steps] for game in self.dataset.values() for name, column in game.items()}

    def close(self, clear_cache):
        self.dataset.close()
""",  # noqa: E501
}


@pytest.mark.pinned_stack
def test_benchmark_measures_every_row_and_shows_its_file_as_it_did(tmp_path):
    for name, text in KATAKOMBA.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    out = tmp_path / "rows.json"
    options = [
        "--store_path",
        str(tmp_path),
        "--repeats",
        "2",
        "--json",
        str(out),
        "--katakomba",
        str(tmp_path),
    ]
    options += ["--character", "ran-hum-neu", "--rnn_hidden_dim", "16", "--sizes", "4x3"]
    done = benchmark("--data_path", str(GAMES), *options)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text(encoding="utf-8"))
    script = (ROOT / "custom_nethack_pomdp.py").read_bytes()
    assert (
        content["script_sha256"] == hashlib.sha256(script).hexdigest()
        and content["versions"]["torch"]
    )
    rows = content["rows"]
    count = {name: sum(row["row"] == name for row in rows) for name in {row["row"] for row in rows}}
    assert count == {"read": 4, "bytes": 1, "build": 1, "act": 6, "play": 2, "train": 2}
    for row in rows:
        better = (
            row["baseline"] / row["ours"]
            if row["row"] == "bytes"
            else row["ours"] / row["baseline"]
        )
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(better)
        named = "not Katakomba's own: " in row.get("note", "")
        assert named == ("Katakomba" in row["what"])
    for kind in ("act", "train"):  # one baseline a size, timed once
        fp32, bf16 = (
            [row["baseline_range"] for row in rows if row["row"] == kind][part::2]
            for part in (0, 1)
        )
        assert fp32 == bf16
    assert all(20 < row["ours"] < 120 for row in rows if row["row"] == "bytes")
    shown = benchmark("--table", str(out))
    tables = [
        [line for line in text.splitlines() if line.startswith("|")]
        for text in (shown.stdout, done.stdout)
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 2 + len(rows)


@pytest.mark.pinned_stack
def test_the_sides_of_a_row_take_turns_and_the_first_turn_warms_up(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark

    calls = []

    def side(name, *speeds):
        speeds = iter(speeds)
        return lambda: calls.append(name) or next(speeds)

    ours = {"fp32": side("fp32", 1, 30, 10, 20), "bf16": side("bf16", 1, 50, 50, 80)}
    fp32, bf16 = benchmark.compare("act", "steps/s", ours, side("baseline", 1, 5, 4, 3), repeats=3)
    assert calls == ["fp32", "bf16", "baseline"] * 4
    assert (fp32["ours"], fp32["ours_range"], fp32["ratio"], bf16["ratio"]) == (
        20,
        [10, 30],
        5.0,
        12.5,
    )
    (alone,) = benchmark.compare(
        "train", "transitions/s", {"fp32": side("fp32", 1, 30, 10, 20)}, None, repeats=3
    )
    assert benchmark.line_of(alone) == "| train | fp32 | 20 (10..30) | - | transitions/s | - |  |"


@pytest.mark.pinned_stack
def test_benchmark_says_what_is_wrong(tmp_path):
    for option, value, message in (
        ("--rows", "reading", "--rows out of"),
        ("--katakomba", ".", "is no checkout of"),
    ):
        done = benchmark("--data_path", str(GAMES), "--store_path", str(tmp_path), option, value)
        assert (
            done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
        )
