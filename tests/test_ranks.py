"""Several processes: they learn what one would, play the same games, stop and fail together, and go on to the bit.

On CPUs (gloo), two processes, a small network. What NCCL and several GPUs add is not tested here.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GAMES = ROOT / "tests" / "data" / "nle_data"
MONK = "mon-hum-neu"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
SETTINGS = dict(character=MONK, data_path=GAMES, seq_len=8, batch_size=2, update_steps=4, log_every=1, eval_every=10, checkpoint_every=2,
                eval_episodes=0, eval_heldout_frames=0, data_workers=1)  # fmt: skip
PROGRAM = """
import os, signal, sys, time, torch, custom_nethack_pomdp as pomdp
from datetime import timedelta
backbone = pomdp.ModelBackbone
pomdp.ModelBackbone = lambda actions, *_: backbone(actions, 32, 2)
update, play = pomdp.Trainer.update, pomdp.play_games

def before_update(step, act):
    def changed(trainer, *args, **options):
        if trainer.step == step:
            act()
        return update(trainer, *args, **options)
    pomdp.Trainer.update = changed

if __name__ == "__main__":
    torch.set_num_threads(1)
    {hook}
    sys.exit(pomdp.main(sys.argv[1:]))
"""
PRINT_RESULTS = ("summarize = pomdp.summarize_games; "
                 "pomdp.summarize_games = lambda results, name: print(results) or summarize(results, name)")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start(folder, stores_path, stores):
    """start(name, processes, hook, {rank: settings}, settings...) -> the processes; their runs lie in folder/name."""

    def start(name, processes=2, hook="pass", differing=None, **settings):
        program = folder / f"run_{name}.py"
        program.write_text(PROGRAM.format(hook=hook), encoding="utf-8")
        port, started = free_port(), []
        for rank in range(processes):
            values = {**SETTINGS, "store_path": stores_path, "checkpoints_path": folder / name, **settings,
                      **(differing or {}).get(rank, {})}  # fmt: skip
            environment = {**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            command = [sys.executable, str(program), *(token for key, value in values.items() for token in (f"--{key}", str(value)))]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started

    return start


def finish(processes, seconds=120):
    """-> [(exit status, standard output, standard error)]; none of them may go on for longer."""
    end = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(1.0, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def run_folder(folder, name):
    return folder / name / "custom-nethack-pomdp-v0" / f"custom-{MONK}-seed42"


def rows_of(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("times/") and key != "charts/SPS"} for row in rows]


def checkpoint(path, name="last.pt"):
    return torch.load(path / name, map_location="cpu", weights_only=True)


def flat(content, where=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {path: leaf for key, value in items for path, leaf in flat(value, f"{where}/{key}").items()}
    return {where: content}


def assert_same_end(one, other):
    """To the bit: weights, optimizer, every process's states, and the logged rows."""
    left, right = (flat({key: value for key, value in checkpoint(path).items() if key != "config"}) for path in (one, other))
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert torch.equal(leaf, right[path]) if isinstance(leaf, torch.Tensor) else leaf == right[path], path
    assert rows_of(one) == rows_of(other)


# --- they learn what one learns
EQUAL = dict(learning_rate=1e-3, warmup_transitions=256, eval_every=1, eval_episodes=5, eval_processes=3, eval_workers=1, eval_max_steps=50,
             eval_heldout_frames=256, character=MONK)  # fmt: skip
# Every weight 1 (to 1e-6), so that nothing is normalised within a process's rows.
UNWEIGHTED = "{beta: 1000000}"


@pytest.fixture(scope="module")
def pairs(start, folder):
    """{algorithm: (one process with 4 rows, two with 2 each)}: their folders and outputs."""
    found = {}
    bc = dict(submission=ROOT / "scripts" / "references" / "bc.py", eval_episodes=0)
    for name, settings in {"bc": bc, "unweighted": dict(algorithm=UNWEIGHTED)}.items():
        running = [start(f"{name}1", 1, PRINT_RESULTS, batch_size=4, **{**EQUAL, **settings}),
                   start(f"{name}2", 2, PRINT_RESULTS, batch_size=2, **{**EQUAL, **settings})]  # fmt: skip
        results = [finish(processes) for processes in running]
        assert all(status == 0 for result in results for status, _, _ in result), results
        found[name] = [(run_folder(folder, f"{name}{count}"), results[count - 1]) for count in (1, 2)]
    return found


@pytest.mark.parametrize("algorithm", ["bc", "unweighted"])
def test_two_processes_learn_what_one_learns(pairs, algorithm):
    (one, _), (two, _) = pairs[algorithm]
    left, right = checkpoint(one), checkpoint(two)
    begin = checkpoint(one, "last.prev.pt")["model"]
    moved = max(float((left["model"][name] - begin[name]).abs().max()) for name in begin)
    assert moved > 1e-4, "nothing was learned: this shows nothing"
    for name, weights in left["model"].items():
        assert torch.allclose(weights, right["model"][name], rtol=0, atol=2e-6), (name, moved)
    for path, value in flat(left["algorithm"]).items():
        assert float(value) == pytest.approx(float(flat(right["algorithm"])[path]), rel=1e-4), path
    names = ("loss", "train/loss_per_action", "train/accuracy", "train/grad_norm", "heldout/loss_per_action", "heldout/accuracy",
             "heldout/frames", "heldout/explained_variance", "train/learning_rate", "transitions", "step")  # fmt: skip
    for row, other in zip(rows_of(one), rows_of(two)):
        assert row.keys() == other.keys()
        for name in set(names) & set(row):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert [len(content["ranks"]) for content in (left, right)] == [1, 2]
    for name, parts in left["ranks"][0]["rnn_states"].items():  # each process has its own rows' states
        for number, part in enumerate(parts):
            other = [state["rnn_states"][name][number] for state in right["ranks"]]
            other = torch.cat(other, dim=1 if name in ("core", "online") else 0)
            assert torch.allclose(part.float(), other.float(), atol=1e-4), name


def test_games_shared_out_go_as_with_one_process(pairs):
    """At step 1 the weights are still the initial ones (the learning rate rises from 0): there every game must be the same."""
    (one, [(_, alone, _)]), (two, [(_, first, _), (_, second, _)]) = pairs["unweighted"]
    played = [re.findall(r"^\[GameResult.*\]$", out, re.MULTILINE) for out in (alone, first, second)]
    assert played[0][0] == played[1][0] == played[2][0] and played[0][0].count("GameResult(") == 5
    assert len(set(re.findall(r"turns=\d+", played[0][0]))) > 1, "games that are all alike show nothing"
    for name in ("returns", "depths", "normalized_scores"):
        assert np.array_equal(*(np.load(path / f"1_{MONK}_{name}.npy") for path in (one, two)))
    assert "TRAIN_METRICS" not in second and "run: " not in second, "only the first process speaks"


# --- they stop, fail and go on together
@pytest.fixture(scope="module")
def straight(start, folder):
    results = finish(start("straight", update_steps=5))
    assert [status for status, _, _ in results] == [0, 0], results
    return run_folder(folder, "straight")


def test_a_signal_at_one_stops_all_at_one_step_and_resuming_is_exact(start, folder, straight):
    hook = "before_update(2, lambda: pomdp.RANK == 1 and os.kill(os.getpid(), signal.SIGTERM))"
    results = finish(start("signal", hook=hook, update_steps=5))
    assert [status for status, _, _ in results] == [143, 143], results
    path = run_folder(folder, "signal")
    assert checkpoint(path)["step"] == 3 and "stopped at step 3" in results[0][1]
    results = finish(start("signal", update_steps=5, resume="true"))
    assert [status for status, _, _ in results] == [0, 0] and "at step 3" in results[0][1], results
    assert_same_end(straight, path)


STOP_AT_PLAY = """
    def stop(pool, *args):
        step, ticks = pool.step, []
        def counted(*given):
            ticks.append(1)
            if len(ticks) == 20 and pomdp.RANK == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*given)
        pool.step = counted
        return play(pool, *args)
    pomdp.play_games = stop
"""


def test_a_signal_at_one_stops_the_games_of_all(start, folder):
    """Games without end on the other process: it must hear of the signal while it plays."""
    results = finish(start("games", hook=STOP_AT_PLAY.strip(), eval_every=2, eval_episodes=4, eval_processes=4, eval_workers=1))
    assert [status for status, _, _ in results] == [143, 143], results
    assert checkpoint(run_folder(folder, "games"))["step"] == 2


def test_a_killed_process_ends_the_others_with_a_message(start):
    hook = "before_update(2, lambda: pomdp.RANK == 1 and os.kill(os.getpid(), signal.SIGKILL))"
    (status, _, err), (killed, _, _) = finish(start("killed", hook=hook), seconds=60)
    assert killed == -signal.SIGKILL and status == 1
    assert re.search("^error: process 0 of 2 has lost the others.*--resume true", err, re.MULTILINE) and "Traceback" not in err


def test_a_process_that_hangs_ends_the_others_in_time(start):
    hook = "pomdp.Ranks.ANSWER = timedelta(seconds=4); before_update(2, lambda: pomdp.RANK == 1 and os.kill(os.getpid(), signal.SIGSTOP))"
    processes = start("hangs", hook=hook)
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1 and "error: process 0 of 2 has lost the others" in err
    processes[1].kill()
    processes[1].communicate()


def test_torchrun_starts_again_what_was_killed(folder, stores_path, stores, straight):
    """One of two processes is killed; the restarted run ends as the undisturbed one, to the bit."""
    program = folder / "run_restart.py"
    hook = ("before_update(3, lambda: pomdp.RANK == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' "
            "and os.kill(os.getpid(), signal.SIGKILL))")  # fmt: skip
    program.write_text(PROGRAM.format(hook=hook), encoding="utf-8")
    settings = {**SETTINGS, "store_path": stores_path, "checkpoints_path": folder / "restart", "update_steps": 5, "resume": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1",
               "--master-port", str(free_port()), str(program),
               *(token for key, value in settings.items() for token in (f"--{key}", str(value)))]  # fmt: skip
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("at step 2") == 1, result.stdout
    assert_same_end(straight, run_folder(folder, "restart"))


def test_a_gradient_that_is_not_finite_on_one_is_skipped_on_all(start, folder):
    text = (ROOT / "scripts" / "references" / "bc.py").read_text(encoding="utf-8")
    text = text.replace("        loss = masked_mean(nll, counts)\n", "        loss = masked_mean(nll, counts) * factor(self)\n")
    text += """

def factor(algorithm):
    import os
    algorithm.steps = getattr(algorithm, "steps", 0) + 1
    return float("inf") if algorithm.steps == 3 and os.environ["RANK"] == "1" else 1.0
"""
    path = folder / "infinite.py"
    path.write_text(text, encoding="utf-8")
    results = finish(start("infinite", submission=path, keep_checkpoints="true", eval_every=1))
    assert [status for status, _, _ in results] == [0, 0], results
    assert [err.count("not finite") for _, _, err in results] == [1, 0]
    models = [checkpoint(run_folder(folder, "infinite"), f"{step}.pt")["model"] for step in (2, 3, 4)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert any(not torch.equal(models[1][name], models[2][name]) for name in models[0])
    rows = [row for row in rows_of(run_folder(folder, "infinite")) if "loss" in row]
    assert rows[3]["train/skipped_updates"] == 1


def test_processes_that_were_started_differently_refuse(start, folder):
    results = finish(start("differ", differing={1: dict(learning_rate=1e-4)}))
    assert [status for status, _, _ in results] == [2, 2], results
    assert all("process 1 has not the same settings" in err for _, _, err in results)
    assert not (folder / "differ").exists()
