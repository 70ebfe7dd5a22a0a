"""Speed changes no result: options that only make things faster give what the plain way gives. And the benchmark runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
GAMES = ROOT / "tests" / "data" / "nle_data"
HIDDEN = 64


def trained(tmp_path, stores_path, name, updates=6, **settings):
    """Weights and losses of a short run with a small network."""
    config = pomdp.TrainConfig(character="mon-hum-neu,val-hum-neu", data_path=str(GAMES), store_path=str(stores_path), batch_size=6,
                               seq_len=8, checkpoints_path=str(tmp_path / name), clip_grad_norm=1.0, **settings)  # fmt: skip
    config.rnn_hidden_dim = HIDDEN  # the settings of a user's run take no other than 2048
    trainer = pomdp.Trainer(config)
    stream = trainer.loader.stream(0)
    try:
        losses = [float(trainer.update(stream, timed=False)["loss"]) for _ in range(updates)]
    finally:
        stream.close()
        trainer.close()
    return {name: weight.clone() for name, weight in trainer.algorithm.model.state_dict().items()}, losses


def test_decoding_threads_change_no_weight(tmp_path, stores_path):
    (one, losses), (three, others) = (trained(tmp_path, stores_path, str(threads), data_workers=threads) for threads in (1, 3))
    assert losses == others
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_bfloat16_training_stays_close_to_float32(tmp_path, stores_path):
    """Stated tolerance: losses of the first six updates within 0.1 % (measured: 0.002 %), the weights' change within 30 % (10 %:
    AdamW's first steps are as long for a small gradient as for a large one)."""
    full, losses = trained(tmp_path, stores_path, "fp32", precision="fp32")
    half, others = trained(tmp_path, stores_path, "bf16", precision="bf16")
    np.testing.assert_allclose(others, losses, rtol=1e-3)
    assert others != losses  # the option does something
    begin, _ = trained(tmp_path, stores_path, "begin", updates=0)
    moved = torch.cat([(full[name] - begin[name]).flatten() for name in full])
    apart = torch.cat([(full[name] - half[name]).flatten() for name in full])
    assert 0 < apart.norm() < 0.3 * moved.norm()


@pytest.mark.parametrize("hidden", [64, 512])
def test_greedy_actions_of_the_fast_step_equal_the_lstms_on_recorded_games(games, hidden):
    torch.manual_seed(0)
    model = pomdp.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, rnn_hidden_dim=hidden)).eval()
    batch = pomdp.ChunkLoader(games, range(8), 8, 80, None, 100.0, 10.0).batch_at(0)
    inputs = {name: batch[name][:, :80] for name in pomdp.OBSERVATIONS}
    inputs["prev_actions"] = torch.cat([batch["prev_actions"], batch["actions"][:, :79]], dim=1)
    state, fast = None, []
    with torch.no_grad():
        plain, _, _ = model(inputs)  # nn.LSTM over the whole chunk
        for t in range(80):
            logits, _, state = model({name: value[:, t : t + 1] for name, value in inputs.items()}, state)
            fast.append(logits[:, 0])
    fast = torch.stack(fast, dim=1)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)
    counts = batch["mask"][:, :80]
    assert counts.sum() > 500 and torch.equal(fast.argmax(-1)[counts], plain.argmax(-1)[counts])


def test_acting_without_onednn_is_the_same(games, monkeypatch):
    torch.manual_seed(0)
    backbone = pomdp.ModelBackbone(pomdp.NUM_ACTIONS, rnn_hidden_dim=HIDDEN).eval()
    features, state = torch.randn(8, backbone.rnn.input_size), (torch.randn(2, 8, HIDDEN), torch.randn(2, 8, HIDDEN))
    with torch.no_grad():
        fast, _ = backbone._step(features, state)
        assert backbone._packed_weights()[0][0].is_mkldnn
        backbone._packed = None
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        plain, _ = backbone._step(features, state)
        assert not backbone._packed_weights()[0][0].is_mkldnn
    torch.testing.assert_close(fast, plain, rtol=0, atol=2e-6)


def benchmark(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments], capture_output=True, text=True, timeout=120,
                          env=environment)  # fmt: skip


@pytest.mark.pinned_stack
def test_benchmark_measures_and_writes_json(tmp_path):
    out = tmp_path / "rows.json"
    done = benchmark("--data_path", str(GAMES), "--store_path", str(tmp_path), "--rows", "read,build,play", "--repeats", "1",
                     "--json", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["row"] for row in rows] == ["read", "read", "build", "play"]
    for row in rows:
        assert {"row", "what", "ours", "theirs", "ratio", "unit", "repeats", "machine"} <= row.keys()
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert all(20 < row["bytes_a_frame"] < 120 and row["peak_memory_mb"] > 50 for row in rows if row["row"] == "read")
    printed = [line for line in done.stdout.splitlines() if line.startswith(("read ", "build ", "play "))]
    assert len(printed) == 4 and all(line.endswith(" x") for line in printed)  # the ratio comes last


@pytest.mark.parametrize(("arguments", "message"), [
    (["--rows", "reading"], "--rows takes"), (["--katakomba", "."], "is no checkout of"),
    (["--repeats", "0"], "--repeats at least 1")])  # fmt: skip
def test_benchmark_says_what_is_wrong(tmp_path, arguments, message):
    done = benchmark("--data_path", str(GAMES), "--store_path", str(tmp_path), *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
