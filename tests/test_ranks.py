# SPDX-License-Identifier: MIT
"""Several processes: they learn what one would, play the same games, stop together, and go on to
the bit.

On CPUs (gloo), two processes, a small network. What NCCL and several GPUs add is not tested here.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from soak import MONK, SETTINGS, differences, outcome, rows_of

RUN = Path("custom-nethack-pomdp-v0", f"custom-{MONK}-seed42")
QUIET = dict(
    update_steps=5,
    batch_size=2,
    log_every=1,
    checkpoint_every=2,
    eval_episodes=0,
    eval_heldout_frames=0,
    benchmark_sizes=False,
    rnn_hidden_dim=16,
)
PROGRAM = f"""
import math, os, sys, torch
sys.path.insert(0, {str(ROOT / "scripts")!r})
import custom_nethack_pomdp as pomdp
from soak import before_call
batch_at = pomdp.ChunkLoader.batch_at

def spoiled(loader, step):
    batch, prev_actions = batch_at(loader, step)
    if step == 2 and pomdp.RANK == 1:
        batch["rewards"] *= math.nan
    return batch, prev_actions

def send_the_second(number, owner, name, count):
    if pomdp.RANK == 1:
        setattr(owner, name, before_call(getattr(owner, name), count, lambda *_: os.kill(os.getpid(), number)))

if __name__ == "__main__":
    torch.set_num_threads(1)
    HOOK
    sys.exit(pomdp.main(sys.argv[1:]))
"""  # noqa: E501
SPOILED = "pomdp.ChunkLoader.batch_at = spoiled"
# Each process writes its EMA, and whether any of it was among what processes average.
SAVED = """reduce, close_log = pomdp.all_reduce_mean, pomdp.RunLogger.close
    exchanged, runs = set(), []

    def noting(tensors, weight):
        exchanged.update(map(id, tensors))
        reduce(tensors, weight)

    def making(config, make=pomdp.make_run):
        runs.append(make(config))
        return runs[-1]

    def saving(logger):
        (run,) = runs
        ema = run.algorithm.ema
        parts = [*ema.buffers(), *ema.parameters()]
        shared = not exchanged.isdisjoint(map(id, parts))
        content = {"ema": ema.state_dict(), "shared": shared, "exchanged": len(exchanged)}
        torch.save(content, f"{run.folder}/ema-{pomdp.RANK}.pt")
        close_log(logger)

    pomdp.all_reduce_mean, pomdp.make_run, pomdp.RunLogger.close = noting, making, saving"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def start(folder, stores_path, stores):
    """start(name, hook, processes, launcher, settings...) -> processes, as torchrun would start
    them, or torchrun."""

    def start(name, hook="pass", processes=2, launcher=(), **settings):
        program, started = folder / f"run_{name}.py", []
        program.write_text(PROGRAM.replace("HOOK", hook), encoding="utf-8")
        settings = {
            **SETTINGS,
            "store_path": stores_path,
            "checkpoints_path": folder / name,
            **QUIET,
            **settings,
        }
        arguments = [str(token) for pair in settings.items() for token in (f"--{pair[0]}", pair[1])]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            of_torchrun = dict(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=probe.getsockname()[1], WORLD_SIZE=processes
            )
        for rank in range(processes):
            of_torchrun.update(
                RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=processes, OMP_NUM_THREADS=1
            )
            environment = {
                **os.environ,
                **{name: str(value) for name, value in of_torchrun.items()},
            }
            options = dict(
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            started.append(
                subprocess.Popen([sys.executable, *launcher, str(program), *arguments], **options)
            )
        return started

    return start


def finish(processes):
    """-> [exit status], [standard output], [standard error]."""
    try:
        outputs = [process.communicate(timeout=LIMIT_S) for process in processes]
        return [process.returncode for process in processes], *map(list, zip(*outputs))
    finally:
        for process in processes:
            process.kill()


# --- they learn what one learns
@pytest.fixture(scope="module")
def pair(start, folder):
    """Folders of one process with 4 rows and of two with 2 each.

    Games are cut, so that at step 2 one process's rows count 12 frames and the other's 16; with
    every weight 1 (to 1e-6) nothing is normalised within a process's rows.
    """
    settings = dict(
        learning_rate=1e-3, warmup_transitions=64, game_frames=500, rnn_dropout=0, eval_every=5
    )
    settings.update(algorithm="{beta: 1000000}", eval_heldout_frames=256)
    games = dict(eval_episodes=5, eval_processes=3)
    running = [
        start("one", processes=1, **{**settings, **games, "batch_size": 4}),
        start("two", **settings),
    ]
    (alone, *_), (both, out, err) = map(finish, running)
    assert alone == [0] and both == [0, 0], err
    assert out[0].count("TRAIN_METRICS") == 5 and not out[1], "the first process alone speaks"
    return folder / "one" / RUN, folder / "two" / RUN


def test_two_processes_learn_what_one_learns(pair):
    left, right = (pomdp.read_checkpoint(path / "last.pt") for path in pair)
    config = pomdp.TrainConfig(**json.loads(left["config"]))
    pomdp.set_seed(config.train_seed)
    begin = pomdp.make_algorithm(config, torch.device("cpu")).model.state_dict()
    learned = max(float((left["model"][name] - begin[name]).abs().max()) for name in begin)
    assert 1e-4 < learned < 0.1
    for name, weights in left["model"].items():
        assert torch.allclose(weights, right["model"][name], rtol=0, atol=1e-5), name
    rows = rows_of(pair[0])
    assert rows[2]["train/known_actions"] == 28 / 32, "all rows count alike: this shows nothing"
    names = ["step", "transitions", "train/grad_norm", "train/learning_rate"]
    names += [f"heldout/{name}" for name in ("loss_per_action", "accuracy", "frames")]
    for row, other in zip(rows, rows_of(pair[1])):
        # What is logged of an update is a plain mean over the processes.
        of_row = [
            name
            for name in [*names, *["loss", "train/accuracy"] * (row["step"] != 3)]
            if name in row
        ]
        assert [row[name] for name in of_row] == pytest.approx(
            [other[name] for name in of_row], rel=1e-4, abs=1e-6
        )
    parts = [content["rnn_states"] for content in (left, right)]
    for one, *both in zip(
        *(part["stored_state"] for part in (*parts[0], *parts[1]))
    ):  # each process has its own rows' states
        assert torch.allclose(one, torch.cat(both, dim=1), atol=1e-4)


def test_games_shared_out_go_as_with_one_process(pair, start, folder):
    """The one process's checkpoint, played by two."""
    exits, _, err = finish(
        start("shared", evaluate=pair[0] / "last.pt", eval_episodes=5, eval_processes=3)
    )
    assert exits == [0, 0], err
    for path in pair[0].glob("5_*"):
        assert (
            path.read_bytes() == (folder / "shared" / "last-evaluation" / path.name).read_bytes()
        ), path.name
    assert (
        len(set((pair[0] / "5_mon-hum-neu_games.csv").read_text(encoding="utf-8").splitlines()))
        == 6
    )


def test_the_ema_is_alike_on_all_and_not_exchanged(start, folder):
    exits, _, err = finish(start("ema", SAVED, learning_rate=1e-2))
    assert exits == [0, 0], err
    run = folder / "ema" / RUN
    one, other = (torch.load(run / f"ema-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert int(one["ema"]["n_averaged"]) == 5
    assert all(torch.equal(value, other["ema"][name]) for name, value in one["ema"].items())
    assert one["exchanged"] > 10 and not one["shared"] and not other["shared"]
    saved = pomdp.read_checkpoint(run / "last.pt")["algorithm"]["ema"]
    assert all(torch.equal(value, saved[name]) for name, value in one["ema"].items())


# --- they skip, stop and go on together
@pytest.fixture(scope="module")
def straight(start, folder):
    exits, _, err = finish(start("straight", SPOILED, eval_every=1, keep_checkpoints=True))
    assert exits == [0, 0] and [text.count("step 2 is not finite") for text in err] == [1, 0], err
    return folder / "straight" / RUN


def test_a_gradient_that_is_not_finite_on_one_is_skipped_on_all(straight):
    models = [pomdp.read_checkpoint(straight / f"{step}.pt")["model"] for step in (2, 3, 4)]
    weights = [
        {name: value for name, value in model.items() if name != "advantage_square"}
        for model in models
    ]
    changed = [
        any(not torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(weights, weights[1:])
    ]
    assert changed == [False, True]
    rows = [row for row in rows_of(straight) if "loss" in row]
    assert [row["train/skipped_updates"] for row in rows] == [0, 0, 1, 1, 1] and rows[4][
        "loss"
    ] < 100


def test_a_signal_at_one_stops_all_at_one_step_and_resuming_is_exact(start, folder, straight):
    settings = dict(eval_every=1, keep_checkpoints=True)
    hook = f"{SPOILED}; send_the_second({int(signal.SIGTERM)}, pomdp, 'gradient_step', 4)"
    exits, _, err = finish(start("signal", hook, **settings))
    assert exits == [143, 143], err
    assert pomdp.read_checkpoint(folder / "signal" / RUN / "last.pt")["step"] == 4
    exits, out, err = finish(start("signal", SPOILED, **settings))
    assert exits == [0, 0] and "at step 4" in out[0], err
    assert not differences(outcome(straight), outcome(folder / "signal" / RUN))


def test_a_signal_at_one_stops_the_games_of_all(start, folder):
    """Games without end: the other process must hear of the signal while it plays."""
    hook = f"send_the_second({int(signal.SIGINT)}, pomdp.NetHackGame, 'step', 20)"
    exits, _, err = finish(
        start("games", hook, eval_every=2, eval_episodes=4, eval_max_steps=10**6)
    )
    assert exits == [130, 130], err
    assert pomdp.read_checkpoint(folder / "games" / RUN / "last.pt")["step"] == 2


def test_the_first_process_builds_and_its_mistake_is_one_line(start, folder, tmp_path):
    """The others, which are quicker, wait; a folder without games is told of once, and ends all."""
    hook = "pomdp.RANK or (pomdp.time.sleep(1), setattr(pomdp, 'build_store', print_and(pomdp.build_store)))"  # noqa: E501
    hook += "; pomdp.RANK and setattr(pomdp, 'build_store', None)"
    helper = "print_and = lambda build: lambda *args: (print('BUILT'), build(*args)); "
    settings = dict(update_steps=1, store_path=tmp_path / "stores")
    exits, out, err = finish(start("builds", helper + hook, **settings))
    assert exits == [0, 0] and [text.count("BUILT") for text in out] == [1, 0], err
    (tmp_path / "empty").mkdir()
    exits, _, err = finish(start("empty", data_path=tmp_path / "empty"))
    assert exits == [2, 2] and re.fullmatch("error: no games of .*\n", err[0]) and err[1] == ""


def test_torchrun_starts_again_what_was_killed(start, folder, straight):
    """One of two processes is killed; the restarted run ends as the undisturbed one, to the bit."""
    kill = f"send_the_second({int(signal.SIGKILL)}, pomdp, 'gradient_step', 4)"
    hook = f"{SPOILED}; os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and {kill}"
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1".split()
    exits, out, err = finish(
        start("restart", hook, 1, launcher, eval_every=1, keep_checkpoints=True)
    )
    assert exits == [0] and out[0].count("at step 3") == 1, err
    assert not differences(outcome(straight), outcome(folder / "restart" / RUN))


def test_several_processes_without_torchrun_are_one_line(tmp_path):
    """Some schedulers set WORLD_SIZE and nothing else; an empty one is none."""
    script = [
        sys.executable,
        str(ROOT / "custom_nethack_pomdp.py"),
        "--data_path",
        str(ROOT / "tests/data/nle_data"),
    ]
    quiet = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    options = dict(cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    result = subprocess.run(script, env={**quiet, "WORLD_SIZE": "2", "RANK": "0"}, **options)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch("error: [^\n]*MASTER_ADDR[^\n]*torchrun\n", result.stderr)
    help_text = [*script, "--help"]
    empty = {**quiet, "WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}
    assert subprocess.run(help_text, env=empty, **options).returncode == 0
