"""The trials of scripts/soak.sh in short: one place holds the code, the script runs it at full length."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import soak


def soak_main(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "soak.py"), *arguments], env=environment, capture_output=True, text=True,
                          timeout=600, check=False)  # fmt: skip


@pytest.mark.parametrize("trial, says", [
    (("--kills", "1", "--seed", "7"), "writing a checkpoint, call"), (("--inputs", "270"), "inputs: checkpoint"),
    (("--games", "60"), "games: 60 in"),
], ids=["kills", "inputs", "games"])  # fmt: skip
def test_a_short_trial(trial, says):
    result = soak_main(*trial)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout and f"{trial[0][2:]}: {trial[1]} passed" in result.stdout


def test_a_full_disk(tmp_path):
    """One line, no traceback, no half file; what was written before is whole."""
    status, _, err = soak.finish(soak.start(tmp_path, "full disk", 2))
    assert status == 2 and err.count("error: ") == 1 and "cannot write" in err and "Traceback" not in err
    (run,) = (tmp_path / "runs" / "custom-nethack-pomdp-v0").iterdir()
    assert soak.pomdp.read_checkpoint(run / "last.pt")["step"] == 3
    assert not list(run.glob(".*"))


def test_trials_can_fail(tmp_path):
    """A soak that passes whatever happens would show nothing."""
    with pytest.raises(soak.Failure, match="weight"):
        soak.must_equal({"weight": 1, "rows": []}, {"weight": 2, "rows": []}, "trial")
    with pytest.raises(soak.Failure, match="rows"):
        soak.must_equal({"weight": 1}, {"weight": 1, "rows": []}, "trial")
    (tmp_path / "a").write_bytes(b"0123456789" * 20)
    damaged = [soak.damage((tmp_path / "a").read_bytes(), soak.random.Random(seed)) for seed in range(40)]
    assert sum(data != (tmp_path / "a").read_bytes() for data in damaged) >= 38
