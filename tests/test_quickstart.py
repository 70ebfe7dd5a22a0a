# SPDX-License-Identifier: MIT
"""scripts/quickstart.py, small: both losses, a table with both agents, a page of the best game."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LIMIT_S

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import quickstart
from shared import newest_games, read_games

pytestmark = pytest.mark.pinned_stack  # scripts need Python 3.10
SMALL = dict(
    benchmark_sizes=False,
    rnn_hidden_dim=16,
    update_steps=20,
    batch_size=8,
    warmup_transitions=0,
    eval_every=20,
    eval_heldout_frames=256,
    eval_episodes=1,
    eval_max_steps=20,
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory, stores_path):
    """Folder and standard output of a small quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    settings = {**SMALL, "checkpoints_path": folder, "store_path": stores_path}
    line = [sys.executable, quickstart.__file__, "--actions", "60"]
    line += [f"--{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = dict(cwd=quickstart.ROOT, env=environment, capture_output=True, text=True)
    done = subprocess.run(line, timeout=LIMIT_S, **options)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_lowers_the_held_out_loss(shown):
    _, text = shown
    (losses,) = re.findall(r"per action: ([\d.]+) nats before training, ([\d.]+) after 20", text)
    before, after = map(float, losses)
    assert 4.6 < before < 5.0  # about log(121), as guessing has
    assert after < before - 0.3
    (logged,) = re.findall(r"HELDOUT_METRICS step=20 .*\bloss_per_action=([\d.]+)", text)
    assert f"{float(logged):.2f}" == f"{after:.2f}"


def test_one_table_has_both_agents(shown):
    _, text = shown
    table = re.search(r"\| character \|.*\n(?:\|.*\n)+", text)[0]
    for character in ("mon-hum-neu", "val-hum-neu", "ran-hum-neu"):
        assert re.search(rf"\| {character} \| quickstart \|", table)
        assert re.search(rf"\| {character} \| small_512 \|", table)


def test_the_page_is_the_best_game_and_named_last(shown):
    folder, text = shown
    *_, path, command = text.splitlines()
    assert path == str(folder / "game.html") and command.endswith(f" {path}")
    scores = read_games(newest_games(folder / "small_512-evaluation"))["scores"]
    best = max(scores, key=scores.get)
    (end,) = re.findall(r"(?m)^(\S+), game 0 of seed \d+: step 60, turn \d+, score ([\d,]+)", text)
    assert end == (best, f"{scores[best][0]:,.0f}")
    assert best in Path(path).read_text(encoding="utf-8")[:2000]
