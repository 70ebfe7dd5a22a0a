# SPDX-License-Identifier: MIT
"""Whole runs: what they write, that they repeat, go on to the bit where they stopped, and that
nothing is lost.

`main` is called as from the command line, with a small network; one run at the true command line
has it at full size.
"""

import csv
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import UserError, main

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from soak import before_call, differences, outcome, rows_of

SCRIPT = ROOT / "custom_nethack_pomdp.py"
GAMES = ROOT / "tests" / "data" / "nle_data"
MONK, VALKYRIE, RANGER = CHARACTERS = ("mon-hum-neu", "val-hum-neu", "ran-hum-neu")
SMALL = dict(
    character=MONK,
    data_path=GAMES,
    batch_size=4,
    seq_len=8,
    update_steps=4,
    log_every=1,
    checkpoint_every=2,
)
SMALL.update(eval_every=2, eval_episodes=0, eval_heldout_frames=128)
SMALL.update(benchmark_sizes=False, rnn_hidden_dim=16)
PLAYING = dict(
    update_steps=3,
    eval_episodes=3,
    eval_processes=2,
    eval_max_steps=30,
    rnn_dropout=0.3,
)
PLAYING.update(keep_checkpoints=True)


def arguments(settings):
    return [token for name, value in settings.items() for token in (f"--{name}", str(value))]


def lines_of(text, tag):
    """`TAG name=value ...` lines -> list of {name: number}."""
    lines = [line for line in text.splitlines() if line.startswith(tag + " ")]
    return [
        {name: float(value) for name, value in (pair.split("=") for pair in line.split()[1:])}
        for line in lines
    ]


def files_of(folder):
    """{relative path: (size, time of the last change)} of all files below."""
    stats = {
        str(path.relative_to(folder)): path.stat()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_user_error(result, pattern):
    status, _, err = result
    assert status == 2 and err.count("\n") == 1 and re.search("^error: .*" + pattern, err), result


@pytest.fixture
def small(monkeypatch, tmp_path, stores, stores_path, capfd, one_thread):
    """small(settings...) -> (exit status, stdout, stderr) of `main` with 16 hidden units; runs lie
    in ./runs."""
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        return (
            main(arguments({**SMALL, "store_path": stores_path, **settings})),
            *capfd.readouterr(),
        )

    return run


def run_of(name="custom", number=""):
    return Path("runs", "custom-nethack-pomdp-v0", f"{name}-{MONK}-seed42{number}")


# --- at the true command line, at full size
FULL = dict(data_path=GAMES, batch_size=4, seq_len=4, update_steps=2, log_every=1, eval_every=2)
EVALUATION = dict(eval_heldout_frames=64, eval_episodes=2, eval_processes=2, eval_max_steps=60)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run on the three characters, and the score of its best.pt: their folders and what they
    printed."""
    folder, printed = tmp_path_factory.mktemp("full"), []
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled"}
    run = folder / "runs" / "custom-nethack-pomdp-v0" / f"custom-{'+'.join(CHARACTERS)}-seed42"
    for settings in (FULL, dict(evaluate=run / "best.pt", data_path=GAMES)):
        command = [sys.executable, str(SCRIPT), *arguments({**settings, **EVALUATION})]
        options = dict(
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        result = subprocess.run(command, **options)
        assert result.returncode == 0 and not result.stderr, result.stderr
        printed.append(result.stdout)
    yield run, run / "best-evaluation", printed
    shutil.rmtree(folder)  # gigabytes of checkpoints, which pytest would keep


def test_a_run_prints_and_writes_what_readers_look_for(full):
    folder, _, (out, _) = full
    assert [(line["step"], line["transitions"]) for line in lines_of(out, "TRAIN_METRICS")] == [
        (1, 16),
        (2, 32),
    ]
    (tested,), names = (
        lines_of(out, "TEST_METRICS"),
        [name.replace("-", "_") for name in CHARACTERS],
    )
    assert list(tested) == ["normalized_score", *(f"normalized_score_{name}" for name in names)]
    tables = {f"2_{character}_games.csv" for character in CHARACTERS}
    assert {path.name for path in folder.iterdir() if path.is_file()} == tables | {
        *("config.yaml", "config.json", "metrics.jsonl", "last.pt", "last.prev.pt", "best.pt")
    }
    for character, name in zip(CHARACTERS, names):
        with open(folder / f"2_{character}_games.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["game"]) for row in rows] == [0, 1]
        assert all(int(row["depth"]) >= 1 for row in rows)
        scores = np.array([float(row["score"]) for row in rows])
        normalized = scores / pomdp.AUTOASCEND_MEAN_SCORE[character]
        assert tested[f"normalized_score_{name}"] == pytest.approx(normalized.mean(), rel=1e-4)
    *training, evaluation = map(
        json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert [row["step"] for row in training] == [1, 2] and evaluation["step"] == 2
    times = {"times/batch_loading_cpu", "times/forward_pass", "times/backward_pass", "charts/SPS"}
    assert all(times | {"loss", "train/learning_rate"} <= set(row) for row in training)
    expected = {"times/evaluation_cpu", "heldout/loss_per_action"}
    for character in CHARACTERS:
        for statistic in ("median", "mean", "std", "min", "max"):
            expected |= {f"{character}/reward_{statistic}", f"{character}/depth_{statistic}"}
    assert expected <= set(evaluation)


def test_a_run_s_config_is_resolved_and_usable(full):
    folder = full[0]
    expected = pomdp.parse_config(arguments({**FULL, **EVALUATION}))
    assert pomdp.parse_config(["--config", str(folder / "config.yaml")]) == expected
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert described["config"] == json.loads(json.dumps(asdict(expected)))
    assert (
        described["versions"]["torch"] == torch.__version__ and described["hardware"]["cores"] >= 1
    )
    assert described["command"][1:] == arguments({**FULL, **EVALUATION})
    assert described["script_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()


def test_a_checkpoint_s_score_is_that_of_its_run(full):
    folder, scored, (out, again) = full
    assert rows_of(scored) == rows_of(folder)[-1:]
    assert lines_of(again, "TEST_METRICS") == lines_of(out, "TEST_METRICS")
    for path in folder.glob("2_*"):
        assert (scored / path.name).read_bytes() == path.read_bytes(), path.name


# --- an update, on weights whose gradient is known
TOY = """
import math

class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

class OfflineAlgorithm:
    def __init__(self, backbone, config, device):
        self.model, self.target, self.tau = Model(backbone), Model(backbone), config.tau

    def parameters(self):
        return list(self.model.parameters())

    def after_gradient_step(self):
        soft_update(self.target, self.model, self.tau)

    def train_step(self, batch, prev_actions, rnn_states):
        self.model.updates += torch.is_grad_enabled()
        factor = math.inf if self.model.updates == 3 and torch.is_grad_enabled() else 1.0
        loss = factor * (self.model.matrix.sum() + self.model.vector.sum())
        matrix, vector, target = (part.mean().detach() for part in (*self.model.parameters(), self.target.matrix))
        chunks = rnn_states.get("chunks", torch.zeros(()))
        states = {"chunks": chunks + 1}
        info = {"loss": (matrix - 0.8).abs(), "matrix": matrix, "vector": vector, "target": target, "chunks": chunks,
                "training": self.model.training, "drawn": torch.rand(()) + np.random.rand() + random.random()}
        return loss, states, info
"""  # noqa: E501
TOY_SETTINGS = dict(
    submission="toy.py",
    update_steps=8,
    eval_every=1,
    learning_rate=0.1,
    warmup_transitions=64,
    lr_schedule="cosine",
    weight_decay=0.5,
    clip_grad_norm=0.5,
    tau=0.25,
)


@pytest.fixture
def toy(small):
    Path("toy.py").write_text(TOY, encoding="utf-8")
    return small


def test_an_update_is_what_the_settings_say(toy):
    """AdamW moves a weight whose gradient is constant by the learning rate; the third update's
    gradient is infinite."""
    status, _, err = toy(**TOY_SETTINGS)
    assert status == 0 and re.fullmatch("warning: .*step 2 is not finite.*\n", err)
    matrix = vector = target = 1.0
    rows = [row for row in rows_of(run_of()) if "loss" in row]
    for step, row in enumerate(rows):
        assert (row["train/matrix"], row["train/vector"], row["train/target"]) == pytest.approx(
            (matrix, vector, target), abs=1e-5
        ), step
        rate = 0.1 * min(1.0, step / 2) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 8)))
        assert row["train/learning_rate"] == pytest.approx(rate) and row[
            "train/skipped_updates"
        ] == (step >= 2)
        if step != 2:
            matrix, vector = matrix * (1 - rate * 0.5) - rate, vector - rate
            target += 0.25 * (matrix - target)
            assert row["train/grad_norm"] == pytest.approx(math.sqrt(6))
    last = load(run_of() / "last.pt")
    moments = torch.cat(
        [state["exp_avg"].flatten() for state in last["optimizer"]["state"].values()]
    )
    assert float(moments.norm()) == pytest.approx(0.5 * (1 - 0.9**7), rel=1e-4), (
        "gradients were not clipped"
    )
    assert len({row["train/drawn"] for row in rows}) == 8, "all updates draw alike"
    assert [row["train/chunks"] for row in rows] == [0, 1, 2, 0, 1, 2, 3, 4], (
        "states are cleared after a skipped update"
    )
    assert all(row["train/training"] for row in rows)
    for row in rows_of(
        run_of()
    ):  # 4 held-out batches of 4 x 8 frames, of which the last frames of games do not count
        if "heldout/loss" in row:
            assert 96 < row["heldout/frames"] <= 128 and row["heldout/chunks"] == pytest.approx(
                1.5, abs=0.2
            )
            assert row["heldout/training"] == 0


def test_best_weights_and_target_networks_and_what_is_drawn_outlive_a_stop(toy, monkeypatch):
    """The held-out loss is lowest before the stop."""
    assert toy(**TOY_SETTINGS)[0] == 0
    losses = {
        row["step"]: row["heldout/loss"] for row in rows_of(run_of()) if "heldout/loss" in row
    }
    best = min(losses, key=losses.get)
    assert 1 < best <= 5 and load(run_of() / "best.pt")["step"] == best, losses
    with monkeypatch.context() as patch:
        patch.setattr(
            pomdp,
            "gradient_step",
            before_call(pomdp.gradient_step, 6, stop_by(signal.SIGTERM)),
        )
        assert toy(**TOY_SETTINGS, name="stopped")[0] == 143
    assert toy(**TOY_SETTINGS, name="stopped", resume=True)[0] == 0
    assert not differences(outcome(run_of()), outcome(run_of("stopped")))


# --- another's weights
def test_a_run_begins_with_the_weights_of_another(small):
    """Its optimizer, schedule and step are new; what the checkpoint has not is fresh, and named."""
    assert small(update_steps=2)[0] == 0
    status, out, _ = small(name="next", init_from=run_of() / "last.pt", learning_rate=1e-12)
    first, following = load(run_of() / "last.pt"), load(run_of("next") / "last.pt")
    assert status == 0 and "last.pt; fresh layers: none" in out and " at step 0: " in out
    assert following["step"] == 4 and following["optimizer"]["state"][0]["step"] == 4
    for name, weights in first["model"].items():
        close = torch.allclose(weights, following["model"][name], rtol=0, atol=1e-9)
        assert close == (name != "advantage_square"), name

    Path("idea.py").write_text(
        "import torch\nimport custom_nethack_pomdp as ours\n"
        "class Model(ours.Model):\n"
        "    def __init__(self, backbone, hyper=None):\n"
        "        super().__init__(backbone, hyper)\n"
        "        self.value = torch.nn.Sequential(torch.nn.Linear(120, 3), torch.nn.Linear(3, 1))\n"
        "class OfflineAlgorithm(ours.OfflineAlgorithm):\n"
        "    model_class = Model\n",
        encoding="utf-8",
    )
    other = dict(name="other", submission="idea.py", init_from=run_of() / "last.pt")
    status, out, _ = small(**other)
    names = [f"value.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")]
    assert status == 0 and f"fresh layers: {', '.join(names)}\n" in out


def test_weights_of_another_size_are_one_line(small):
    assert small(update_steps=1)[0] == 0
    wider = dict(name="wider", rnn_hidden_dim=24, init_from=run_of() / "last.pt")
    assert_user_error(small(**wider), r"last\.pt does not fit.*shape")
    assert not run_of("wider").exists()
    assert_user_error(small(name="wider", init_from="not/there.pt"), "not/there.pt")


def test_a_run_of_other_sizes_says_that_it_is_not_meant_for_the_benchmark(small):
    status, out, _ = small(update_steps=1)
    lines = [line for line in out.splitlines() if "this run is not meant for it" in line]
    assert status == 0 and len(lines) == 1 and "2048" in lines[0]
    assert_user_error(small(benchmark_sizes=True), "benchmark_sizes false")


def test_the_recipe_of_a_small_agent_runs(stores_path, monkeypatch, tmp_path, capfd):
    """A few of its updates, and a game as each character cut short."""
    config = ROOT / "scripts" / "configs" / "small_512.yaml"
    short = dict(config=config, data_path=GAMES, store_path=stores_path, update_steps=3)
    short.update(eval_heldout_frames=64, eval_episodes=1, eval_processes=1, eval_max_steps=5)
    monkeypatch.chdir(tmp_path)
    assert main(arguments({**short, "precision": "fp32"})) == 0
    out = capfd.readouterr().out
    assert "this run is not meant for it" in out and out.count("D4RL score") == 3
    (folder,) = Path("runs", "custom-nethack-pomdp-v0").iterdir()
    again = dict(evaluate=folder / "best.pt", eval_episodes=1, eval_max_steps=5, eval_processes=1)
    assert main(arguments(again)) == 0, "it brings its own sizes"


def test_the_best_weights_are_those_of_the_lowest_loss_per_action(toy):
    """The loss as it is weighted is lowest at the end."""
    text = TOY.replace('"loss": (', '"loss": matrix, "loss_per_action": (')
    Path("toy.py").write_text(text, encoding="utf-8")
    assert toy(**TOY_SETTINGS)[0] == 0
    rows = [row for row in rows_of(run_of()) if "heldout/loss" in row]
    best, last = (
        min(rows, key=lambda row: row[f"heldout/{name}"])["step"]
        for name in ("loss_per_action", "loss")
    )
    assert best < last and load(run_of() / "best.pt")["step"] == best


def test_a_head_that_does_not_fit_the_batch_is_one_line(small):
    """The usual mistake in a new one; without the check its loss would be broadcast."""
    Path("idea.py").write_text(
        "import custom_nethack_pomdp as ours\n"
        "class Model(ours.Model):\n"
        "    def head(self, core_output, tty_chars):\n"
        "        logits, values = super().head(core_output, tty_chars)\n"
        "        return logits, values[:, 1:]\n"
        "class OfflineAlgorithm(ours.OfflineAlgorithm):\n"
        "    model_class = Model\n",
        encoding="utf-8",
    )
    pattern = r"head's values has the shape \(4, 8\), but \(4, 9\)"
    assert_user_error(small(submission="idea.py"), pattern)


def test_what_is_learned_is_not_what_is_held_out(small, stores, monkeypatch):
    """By the games that are read: for training by a thread, for the held-out loss by the main
    one."""
    block, read = pomdp.GameStore.block, {True: set(), False: set()}

    def noting(store, game, number):
        read[threading.current_thread() is threading.main_thread()].add(game)
        return block(store, game, number)

    monkeypatch.setattr(pomdp.GameStore, "block", noting)
    assert (
        small(game_frames=16, update_steps=8, eval_heldout_frames=10**6, heldout_share=0.3)[0] == 0
    )
    heldout = pomdp.Games([stores[MONK]]).heldout(0.3)
    assert (
        read == {True: set(np.flatnonzero(heldout)), False: set(np.flatnonzero(~heldout))}
        and heldout.any()
    )


def test_transitions_per_second(small, monkeypatch):
    """On a clock that stands still but for half a second an update, and one in each evaluation."""
    clock, loss = [0.0], pomdp.OfflineAlgorithm._loss

    def slow_loss(*args):
        clock[0] += 0.5 if torch.is_grad_enabled() else 1.0
        return loss(*args)

    monkeypatch.setattr(pomdp.OfflineAlgorithm, "_loss", slow_loss)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    status, out, _ = small(log_every=2, update_steps=6, eval_every=3)
    assert (
        status == 0
        and [line["transitions_per_s"] for line in lines_of(out, "TRAIN_METRICS")]
        == [4 * 8 / 0.5] * 3
    )
    rows = [
        json.loads(line)
        for line in (run_of() / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(row["charts/SPS"], row["times/forward_pass"]) for row in rows if "loss" in row] == [
        (64.0, 1.0)
    ] * 3


def test_transitions_per_second_after_a_resume(small, monkeypatch):
    """The first row counts the updates since. The clock goes on by a quarter of a second a look."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 4)
    assert small(update_steps=2, log_every=3)[0] == 0
    status, out, _ = small(update_steps=6, log_every=3, resume=True)
    assert status == 0 and "at step 2" in out
    rates = [line["transitions_per_s"] for line in lines_of(out, "TRAIN_METRICS")]
    assert rates == pytest.approx([4 * 8 / 0.75] * 2, rel=1e-4)


CHANGES = [("algorithm", "{burn_in: 0}"), ("algorithm", "{beta: 0.5}"), ("precision", "bf16")]
CHANGES += dict(
    train_seed=1, gamma=0.5, rnn_dropout=0.5, use_prev_action=False, clip_range=0.01, game_frames=20
).items()


def test_settings_of_training_reach_training(small):
    """Each of these must change what is learned; a setting that is read but not used changes
    nothing."""
    settings = dict(update_steps=2, eval_heldout_frames=0)
    assert small(**settings)[0] == 0
    for number, (name, value) in enumerate(CHANGES):
        assert small(**settings, **{name: value}, name=str(number))[0] == 0
        (other,) = run_of().parent.glob(f"{number}-*")
        assert rows_of(other)[1]["loss"] != rows_of(run_of())[1]["loss"], (name, value)


def made_run(stores_path, **settings):
    """On all recorded games, as `train` makes it."""
    config = dict(character=",".join(CHARACTERS), data_path=str(GAMES), store_path=str(stores_path))
    config.update(rnn_hidden_dim=16, batch_size=4, seq_len=8, device="cpu", **settings)
    return pomdp.make_run(pomdp.TrainConfig(**config))


@pytest.mark.usefixtures("one_thread")
def test_the_seed_decides_initial_weights_and_the_order_of_games(stores_path, stores):
    """Each by itself: either alone would make two runs differ."""
    weights, orders = [], []
    for seed in (1, 1, 2):
        run = made_run(stores_path, train_seed=seed)
        weights.append(torch.nn.utils.parameters_to_vector(run.algorithm.parameters()))
        sampler = run.loader.sampler
        orders.append([sampler.locate(step)[0].tolist() for step in range(sampler.steps)])
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.usefixtures("one_thread")
def test_what_is_drawn_in_an_update_depends_on_the_process_and_on_the_step(
    stores_path, stores, monkeypatch
):
    """On the same batch with the same weights, at a rate of 0 in effect."""
    run = made_run(stores_path, rnn_dropout=0.5, warmup_transitions=10**12)
    batch = run.loader.batch_at(0)
    model = run.algorithm.model
    square = model.advantage_square.clone()

    def loss(rank, step):
        monkeypatch.setattr(pomdp, "RANK", rank)
        run.progress.step, run.rnn_states = step, {}
        model.advantage_square = square
        return float(pomdp.gradient_step(run, *batch)["loss_per_action"])

    losses = [loss(*place) for place in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert len(set(losses)) == 4 and loss(1, 0) == pytest.approx(losses[1], abs=1e-5)


# --- going on
def stop_by(number):
    return lambda *_: os.kill(os.getpid(), number)


class Killed(BaseException):
    pass


def killed(*_):
    raise Killed


STOPS = {  # (what is disturbed, before which call, by what) -> exit status
    "SIGTERM": (pomdp, "gradient_step", 3, stop_by(signal.SIGTERM), 143),
    "SIGINT": (pomdp, "gradient_step", 4, stop_by(signal.SIGINT), 130),
    "SIGHUP": (pomdp, "gradient_step", 4, stop_by(signal.SIGHUP), 129),
    "SIGUSR1": (pomdp, "gradient_step", 4, stop_by(signal.SIGUSR1), 138),
    "SIGUSR2": (pomdp, "gradient_step", 3, stop_by(signal.SIGUSR2), 140),
    "signal in the held-out loss": (pomdp.ChunkLoader, "batch_at", 6, None, 143),
    "killed": (pomdp, "gradient_step", 4, killed, None),
    "killed before the first checkpoint": (pomdp, "gradient_step", 2, killed, None),
    "killed between two names": (os, "replace", 9, killed, None),
}


@pytest.fixture(scope="module")
def undisturbed():
    return {}


@pytest.mark.parametrize("name", STOPS)
def test_a_run_that_was_stopped_ends_as_the_undisturbed_one(
    small, undisturbed, monkeypatch, request, name
):
    """Rows after the last checkpoint, and a last line cut short, are not there twice in the end."""
    settings = dict(update_steps=5, rnn_dropout=0.3, checkpoint_every=3)
    if not undisturbed:
        assert small(**settings)[0] == 0
        undisturbed.update(outcome(run_of()))
    owner, function, count, act, expected = STOPS[name]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where nohup started the tests
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        if act is None:
            evaluate = pomdp.evaluate_heldout
            patch.setattr(
                pomdp,
                "evaluate_heldout",
                lambda *args: stop_by(signal.SIGTERM)() or evaluate(*args),
            )
        else:
            patch.setattr(owner, function, before_call(getattr(owner, function), count, act))
        if act is killed:
            with pytest.raises(Killed):
                small(**settings, name="stopped")
            with open(run_of("stopped") / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write('{"step": 4, "loss": 1.2')
        else:
            status, out, err = small(**settings, name="stopped")
            assert status == expected and "--resume" in out and not err
            assert act or load(run_of("stopped") / "last.pt")["step"] == 2, (
                "the whole evaluation was waited for"
            )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert small(**settings, name="stopped", resume=True)[0] == 0
    assert not differences(undisturbed, outcome(run_of("stopped")))


@pytest.fixture
def playing(small):
    """A run with games, undisturbed."""
    assert small(**PLAYING)[0] == 0
    return run_of()


def test_evaluations_can_be_stopped_and_repeated_and_change_nothing(small, playing, monkeypatch):
    with monkeypatch.context() as patch:
        step = before_call(pomdp.NetHackGame.step, 7, stop_by(signal.SIGTERM))
        patch.setattr(pomdp.NetHackGame, "step", step)
        status, _, err = small(**PLAYING, name="stopped")
    assert status == 143 and "Traceback" not in err
    stopped = load(run_of("stopped") / "last.pt")
    assert stopped["step"] == 2 and stopped["progress"]["evaluated"] == 0
    assert not list(run_of("stopped").glob("*.csv"))
    assert small(**PLAYING, name="stopped", resume=True)[0] == 0
    assert not differences(outcome(playing), outcome(run_of("stopped")))

    # A checkpoint played again, and fewer games of it.
    status, _, err = small(evaluate=playing / "2.pt", **{**PLAYING, "eval_episodes": 2})
    assert status == 0, err
    (scored,) = rows_of(playing / "2-evaluation")
    (row,) = [row for row in rows_of(playing) if row["step"] == 2 and "loss" not in row]
    assert {name: value for name, value in scored.items() if "heldout" in name} == {
        name: value for name, value in row.items() if "heldout" in name
    }
    tables = [
        (folder / f"2_{MONK}_games.csv").read_text().splitlines()
        for folder in (playing / "2-evaluation", playing)
    ]
    assert tables[0] == tables[1][:3], "a header and two games"

    quiet = {**PLAYING, "eval_episodes": 0, "eval_heldout_frames": 0, "eval_every": 10}
    assert small(**quiet, name="quiet")[0] == 0
    one, other = (
        {name: leaf for name, leaf in outcome(folder).items() if name.startswith("last.pt/model")}
        for folder in (playing, run_of("quiet"))
    )
    assert one and not differences(one, other)


MARKING = """
import custom_nethack_pomdp as ours
Model = ours.Model
class OfflineAlgorithm(ours.OfflineAlgorithm):
    def _metrics(self, *args):
        return {"mark": ours.torch.ones(())}
"""


def test_a_checkpoint_is_scored_with_what_the_command_line_says(small):
    """Characters, seed, precision and algorithm of this command; and no weights are written."""
    assert small(update_steps=1, eval_every=1)[0] == 0
    (row,) = [row for row in rows_of(run_of()) if "heldout/loss" in row]
    Path("idea.py").write_text(MARKING, encoding="utf-8")
    scored = dict(evaluate=run_of() / "last.pt", eval_episodes=3, eval_max_steps=5)
    assert small(**scored, checkpoints_path="own")[0] == 0
    given = dict(character=f"{VALKYRIE},{RANGER}", submission="idea.py", eval_seed=51)
    assert small(**scored, **given, checkpoints_path="given")[0] == 0
    assert small(**scored, precision="bf16", checkpoints_path="bf16")[0] == 0
    folders = [Path(place, "last-evaluation") for place in ("own", "given", "bf16")]
    (own,), (other,), (half,) = map(rows_of, folders)
    assert own["heldout/loss"] == row["heldout/loss"] and "heldout/mark" not in own
    assert other["heldout/mark"] == 1
    assert half["heldout/loss"] == pytest.approx(own["heldout/loss"], rel=1e-2)
    assert half["heldout/loss"] != own["heldout/loss"], "the held-out loss is not in bf16"
    played = {path.name: path for path in folders[1].glob("*_games.csv")}
    assert set(played) == {f"1_{character}_games.csv" for character in (VALKYRIE, RANGER)}
    for path in played.values():
        with open(path, encoding="utf-8", newline="") as file:
            seeds = [
                (int(game["core_seed"]), int(game["disp_seed"])) for game in csv.DictReader(file)
            ]
        assert seeds == [pomdp.game_seeds(51, number) for number in range(3)]
    assert not [path for folder in folders for path in folder.glob("*.pt")]


def test_resume_takes_the_newest_run_and_a_finished_one_is_left(small):
    status, out, _ = small(resume=True, update_steps=2)
    assert status == 0 and "resuming" not in out
    for _ in range(2):
        assert small(update_steps=2)[0] == 0
    older = files_of(run_of()), files_of(run_of(number="-2"))
    status, out, _ = small(resume=True, update_steps=4)
    assert status == 0 and f"{run_of(number='-3')} at step 2" in out
    ended = outcome(run_of(number="-3"))
    assert small(resume=True, update_steps=4)[0] == 0
    assert not differences(ended, outcome(run_of(number="-3"))) and ended["last.pt/step"] == 4
    assert (files_of(run_of()), files_of(run_of(number="-2"))) == older


def test_resume_takes_the_newest_run_with_a_checkpoint_or_the_one_that_is_named(small):
    for name in ("custom", "other"):
        assert small(update_steps=2, name=name)[0] == 0
    run_of(number="-2").mkdir()  # as a start leaves it that was killed in its first seconds
    status, out, _ = small(update_steps=3, resume=True)
    assert status == 0 and f"resuming {run_of()} at step 2" in out
    status, out, _ = small(update_steps=3, resume=run_of("other"))
    assert status == 0 and f"resuming {run_of('other')} at step 2" in out
    for nothing in ("nowhere", run_of(number="-2")):
        assert_user_error(small(resume=nothing), f"resume: {nothing} is neither true nor false")
    assert not Path("nowhere").exists() and not list(run_of(number="-2").iterdir())


def test_a_start_that_fails_leaves_no_folder(small, monkeypatch):
    """Because the disk is full, or because of an idea that does not fit."""
    describe = pomdp.describe_run

    def full(*_):
        raise UserError("cannot write")

    monkeypatch.setattr(pomdp, "describe_run", full)
    assert_user_error(small(), "cannot write")
    monkeypatch.setattr(pomdp, "describe_run", describe)
    monkeypatch.setattr(pomdp, "gradient_step", full)
    assert_user_error(small(), "cannot write")
    assert list(run_of().parent.iterdir()) == []


def test_a_hang_up_is_ignored_under_nohup(small, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    update = before_call(pomdp.gradient_step, 2, stop_by(signal.SIGHUP))
    monkeypatch.setattr(pomdp, "gradient_step", update)
    try:
        assert small()[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_leaves_signals_alone(small):
    """As a notebook or a tuner starts it: there Python allows no handlers."""
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(small, update_steps=1).result()[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before


DIFFERING = dict(
    learning_rate=1e-4, batch_size=3, seq_len=4, algorithm="{lam: 0.9}", heldout_share=0.3
)
DIFFERING.update(precision="bf16", submission=SCRIPT)


def test_resume_refuses_other_settings_and_other_games_and_changes_nothing(small, stores_path):
    for game in pomdp.find_nld_games(GAMES, MONK)[0]:
        shutil.copytree(
            Path(game.path).parent, Path("data", Path(game.path).parent.name), dirs_exist_ok=True
        )
    settings = dict(data_path="data", store_path="stores")
    assert small(update_steps=2, **settings)[0] == 0
    # A row beyond the checkpoint, as after a crash: a refusal may not cost it.
    with open(run_of() / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "transitions": 96, "loss": 1.0}\n')
    before = files_of(run_of())
    for name, value in DIFFERING.items():
        refused = small(update_steps=4, resume=True, **settings, **{name: value})
        assert_user_error(refused, f"cannot resume: {name} was")
    added = Path(shutil.copytree(min(Path("data").iterdir()), "data/copy"))
    (name,) = (path.name for path in added.glob("*.bz2"))
    refused = small(update_steps=4, resume=True, **settings)
    assert_user_error(refused, rf"cannot resume: the data lost \[\] and gained \['copy/{name}, ")
    shutil.rmtree(added)
    assert files_of(run_of()) == before
    # The same games, fetched again: other files with other times.
    shutil.copytree("data", "again")
    for path in Path("again").rglob("*"):
        os.utime(path, (1, 1))
    shutil.rmtree("data")
    Path("again").rename("data")
    status, out, _ = small(update_steps=4, resume=True, **settings)
    assert status == 0 and "at step 2" in out
    shutil.rmtree(min(Path("data").iterdir()))
    refused = small(update_steps=6, resume=True, **settings)
    assert_user_error(refused, r"cannot resume: the data lost \['.* and gained \[\]")


MUST_AGREE = dict(
    character=MONK,
    game_frames=100,
    heldout_share=0.3,
    submission=str(SCRIPT),
    algorithm={"lam": 0.9},
    rnn_hidden_dim=8,
    rnn_layers=1,
    use_prev_action=False,
    rnn_dropout=0.5,
    clip_range=5.0,
    tau=0.1,
    gamma=0.9,
    batch_size=2,
    seq_len=4,
    learning_rate=1e-4,
    lr_schedule="cosine",
    warmup_transitions=100,
    weight_decay=0.1,
    clip_grad_norm=1.0,
    precision="bf16",
    train_seed=1,
)


@pytest.mark.usefixtures("one_thread")
def test_resume_refuses_every_setting_that_shapes_training(
    stores_path, stores, monkeypatch, tmp_path
):
    """Seed and characters too: they are in the folder's name, but a folder may be renamed."""
    run = made_run(stores_path)
    run.folder = tmp_path
    pomdp.save_run(run)
    content, config = load(tmp_path / "last.pt"), run.config
    for name, value in MUST_AGREE.items():
        run.config = replace(config, **{name: value})
        with pytest.raises(pomdp.UserError, match=f"cannot resume: {name} was"):
            pomdp.load_run(run, content)
    run.config = config
    with monkeypatch.context() as patch:
        patch.setattr(pomdp, "WORLD", 2)
        with pytest.raises(pomdp.UserError, match="cannot resume: processes was 1 and is 2"):
            pomdp.load_run(run, content)
    pomdp.load_run(run, content)


def test_resume_may_change_what_does_not_change_training(small):
    assert small(update_steps=4)[0] == 0
    assert small(update_steps=2, name="moved")[0] == 0
    shutil.move("runs", "elsewhere")
    changed = dict(
        checkpoints_path="elsewhere",
        log_every=2,
        eval_every=4,
        eval_seed=3,
        checkpoint_every=3,
        eval_heldout_frames=64,
    )
    status, out, _ = small(update_steps=4, name="moved", resume=True, **changed)
    assert status == 0 and "at step 2" in out
    ends = [outcome("elsewhere" / run_of(name).relative_to("runs")) for name in ("custom", "moved")]
    # the lowest of other held-out losses
    assert all(
        name in ("rows", "last.pt/progress/best") or name.startswith("last.prev.pt")
        for name in differences(*ends)
    )


def test_files_are_on_the_disk_before_they_get_their_names(small, monkeypatch):
    """Or a crash of the machine could leave a name whose content was never written."""
    fsync, rename, synced, renamed = os.fsync, os.replace, {}, {}

    def noting(descriptor):
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_size

    def checking(source, target):
        # of a store its index has checksums: a damaged one is built anew
        path = Path(source, "frames.bin") if Path(source).is_dir() else Path(source)
        renamed[Path(target).name] = synced.get(path.stat().st_ino) == path.stat().st_size
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    assert small(update_steps=2, store_path="stores", eval_episodes=1, eval_max_steps=2)[0] == 0
    assert {MONK, "config.json", "last.pt", "best.pt", f"2_{MONK}_games.csv"} <= set(renamed)
    assert [name for name, whole in renamed.items() if not whole] == []


# --- damaged checkpoints
class Payload:
    """What unpickling runs in a file from a stranger."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "overwritten": lambda path: path.write_bytes(b"no checkpoint at all"),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip_a_byte,
    "a stranger's": lambda path: torch.save(
        {"format": pomdp.CHECKPOINT_FORMAT, "model": Payload()}, path
    ),
}


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(small):
    assert small(update_steps=6)[0] == 0
    assert small(name="damaged", update_steps=4)[0] == 0
    folder = run_of("damaged")
    whole = (folder / "last.pt").read_bytes()
    for damage in DAMAGES.values():
        (folder / "last.pt").write_bytes(whole)
        damage(folder / "last.pt")
        before = files_of(folder)
        assert_user_error(
            small(name="damaged", update_steps=6, resume=True),
            r"last\.pt cannot be read.*remove it.*last\.prev\.pt",
        )
        assert files_of(folder) == before and not Path("pwned").exists()
    (folder / "last.pt").unlink()
    status, out, _ = small(name="damaged", update_steps=6, resume=True)
    assert status == 0 and "at step 4" in out
    assert not differences(outcome(run_of()), outcome(folder))


# --- the EMA of the weights: what is scored, played and kept is it
def test_checkpoints_for_playing_hold_the_ema_alone_and_last_holds_both(small):
    settings = dict(update_steps=6, learning_rate=1e-2, keep_checkpoints=True)
    assert small(**settings)[0] == 0
    content = {name: load(run_of() / f"{name}.pt") for name in ("2", "6", "best", "last")}
    last = content["last"]
    ema = last["algorithm"]["ema"]
    assert int(ema.pop("n_averaged")) == 6
    parameters = [name for name in last["model"] if name != "advantage_square"]
    assert len(parameters) == len(last["optimizer"]["state"])
    assert ema.keys() == {f"module.{name}" for name in last["model"]}
    for name, value in last["model"].items():
        assert torch.equal(ema[f"module.{name}"], value), name
        assert torch.equal(content["6"]["model"][name], value), name
    learned = last["algorithm"]["model"]
    assert learned.keys() == last["model"].keys() == content["best"]["model"].keys()
    assert any(not torch.equal(learned[name], last["model"][name]) for name in parameters)
    # best.pt is that of its step, also where training went on afterwards.
    losses = {row["step"]: row.get("heldout/loss_per_action") for row in rows_of(run_of())}
    best = content["best"]
    assert losses[best["step"]] == min(filter(None, losses.values()))
    kept = load(run_of() / f"{best['step']}.pt")["model"]
    assert all(torch.equal(value, kept[name]) for name, value in best["model"].items())
    assert any(not torch.equal(content["2"]["model"][name], kept[name]) for name in parameters)

    # They score as in the run; and a last.pt as its EMA, whatever decay is asked for.
    rows = {row["step"]: row for row in rows_of(run_of()) if "heldout/loss" in row}
    for name, step in (("2", 2), ("last", 6), ("6", 6)):
        for number, algorithm in enumerate(({}, {"algorithm": "{average_decay: 0}"})):
            folder = Path(f"scored-{name}-{number}")
            scoring = dict(evaluate=run_of() / f"{name}.pt", checkpoints_path=folder)
            assert small(**{**settings, **algorithm, **scoring})[0] == 0
            (row,) = rows_of(folder / f"{name}-evaluation")
            assert row["heldout/loss"] == rows[step]["heldout/loss"], (name, number)


def test_the_ema_changes_what_is_scored_and_nothing_that_is_learned(small):
    settings = dict(update_steps=6, learning_rate=1e-2, eval_every=3)
    assert small(**settings)[0] == 0
    assert small(**settings, name="none", algorithm="{average_decay: 0}")[0] == 0
    assert small(**settings, name="other", algorithm="{average_decay: 0.2}")[0] == 0
    learned = []
    scored = []
    for name in ("custom", "none", "other"):
        rows = rows_of(run_of(name))
        learned.append([row["loss"] for row in rows if "loss" in row])
        scored.append([row["heldout/loss"] for row in rows if "heldout/loss" in row])
    assert learned[0] == learned[1] == learned[2]
    assert scored[0] != scored[1] != scored[2] != scored[0]
    without = load(run_of("none") / "last.pt")
    of_model = without["algorithm"]["model"].items()
    assert all(torch.equal(without["model"][name], value) for name, value in of_model)


# --- folders
def test_a_path_in_which_nle_cannot_record_is_known_before_the_training(small):
    """NLE formats the path by %. Without recordings it does no harm."""
    refused = small(update_steps=1, eval_replays=1, checkpoints_path="100%s")
    assert_user_error(refused, "cannot record games below 100%s")
    assert not Path("100%s").exists()
    assert small(update_steps=1, checkpoints_path="100%s")[0] == 0
    (run,) = Path("100%s").glob("*/*")
    scored = dict(evaluate=run / "last.pt", eval_episodes=1, eval_replays=1)
    assert_user_error(small(**scored), "cannot record games below")


def test_a_folder_is_not_taken_for_a_damaged_checkpoint(small):
    assert small(update_steps=1)[0] == 0
    pattern = "is a folder; give a checkpoint: best.pt, last.prev.pt, last.pt"
    assert_user_error(small(evaluate=run_of()), pattern)
    assert_user_error(small(name="next", init_from=run_of()), pattern)
    assert_user_error(small(evaluate=GAMES), "it holds none")


def test_an_evaluation_that_is_stopped_leaves_no_half_recordings(small, monkeypatch):
    assert small(update_steps=1)[0] == 0
    before = set(run_of().iterdir())
    step = before_call(pomdp.NetHackGame.step, 7, stop_by(signal.SIGINT))
    monkeypatch.setattr(pomdp.NetHackGame, "step", step)
    scored = dict(evaluate=run_of() / "last.pt", eval_episodes=2, eval_replays=2)
    assert small(**scored, eval_max_steps=50, eval_processes=1)[0] == 130
    assert set(run_of().iterdir()) == before


def test_names_of_runs_stay_short(small):
    """All 38 characters: a folder's name may have 255 bytes; two lists have two names."""
    every = list(pomdp.AUTOASCEND_MEAN_SCORE)
    names = [
        pomdp.run_name(pomdp.TrainConfig(character=",".join(few))) for few in (every, every[1:])
    ]
    assert re.fullmatch(r"custom-arc-dwa-law\+37more-[0-9a-f]{8}-seed42", names[0])
    assert "arc-gno-neu+36more-" in names[1] and len(set(names)) == 2
    three = pomdp.run_name(pomdp.TrainConfig())
    assert three == f"custom-{MONK}+{VALKYRIE}+{RANGER}-seed42"
    assert_user_error(small(name="x" * 250, store_path="stores"), "--name is too long")
    assert not Path("stores").exists(), "known before stores are built"


def test_without_resume_nothing_is_ever_overwritten(small):
    for _ in range(2):
        assert small(update_steps=1)[0] == 0
    run_of(number="-3").mkdir()  # somebody else's, and empty
    (run_of() / "notes.txt").write_text("mine", encoding="utf-8")
    before = files_of(Path("runs"))
    assert small(update_steps=1)[0] == 0
    now = files_of(Path("runs"))
    assert {path: now[path] for path in before} == before
    assert {Path(path).parts[1] for path in set(now) - set(before)} == {run_of(number="-4").name}
    one, other = (outcome(run_of(number=number)) for number in ("-2", "-4"))
    assert not differences(one, other), "the same command gives another run"


def test_folders_that_cannot_be_written(small):
    Path("file").write_text("mine", encoding="utf-8")
    assert_user_error(small(checkpoints_path="file"), "checkpoints_path")
    assert_user_error(small(store_path="file/stores"), "store_path")
    assert Path("file").read_text(encoding="utf-8") == "mine" and os.listdir() == ["file"]


def test_a_run_in_progress_is_not_resumed_by_another(small, monkeypatch):
    """Two processes in one folder would mix their rows and checkpoints."""
    results, update = [], pomdp.gradient_step

    def second(*_):
        monkeypatch.setattr(pomdp, "gradient_step", update)
        results.append(small(resume=True))

    monkeypatch.setattr(pomdp, "gradient_step", before_call(update, 3, second))
    assert small()[0] == 0
    assert_user_error(results[0], "in use")


# --- a block from another file
def test_the_own_block_as_a_submission_is_the_same_run(small):
    assert small(name="own")[0] == 0
    assert small(name="given", submission=SCRIPT)[0] == 0
    found = differences(outcome(run_of("own")), outcome(run_of("given")))
    assert {path.partition("/")[2] for path in found} == {"submission_sha256", "settings"}


HELPED = """\ufeff# -*- coding: utf-8 -*-
import custom_nethack_pomdp as ours
import helper_of_an_idea
from pathlib import Path
assert Path(__file__).name == "idea.py" and Path(helper_of_an_idea.__file__).parent == Path(__file__).parent
Model = ours.Model
class OfflineAlgorithm(ours.OfflineAlgorithm):
    def _metrics(self, *args):
        return {"mark": torch.full((), helper_of_an_idea.MARK)}
"""  # noqa: E501


def test_a_submission_is_loaded_as_a_module_is_and_found_from_anywhere(small, monkeypatch):
    """With its own helper, a byte-order mark, and a path that is relative to where the run
    began."""
    home = Path("home").absolute()
    folder = home / "ideas"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    idea = folder / "idea.py"
    idea.write_text(HELPED, encoding="utf-8")
    (folder / "helper_of_an_idea.py").write_text("MARK = 7.0\n", encoding="utf-8")
    assert small(update_steps=2, submission="~/ideas/idea.py")[0] == 0
    (saved,) = {row["train/mark"] for row in rows_of(run_of()) if "loss" in row}
    assert saved == 7.0
    run = run_of().absolute()
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert json.loads(load(run / "last.pt")["config"])["submission"] == str(idea)
    scored = small(evaluate=run / "last.pt", checkpoints_path="scored")
    assert scored[0] == 0 and "heldout/mark" in rows_of(Path("scored", "last-evaluation"))[0]
    resumed = dict(resume=run, update_steps=3)
    assert_user_error(small(**resumed), "cannot resume: submission was .* and is None")
    status, _, err = small(**resumed, submission="../home/ideas/idea.py")
    assert (status, err) == (0, "")
    idea.write_text(HELPED + "# another idea\n", encoding="utf-8")
    status, _, err = small(resume=run, update_steps=4, submission=idea)
    assert status == 0 and err == f"warning: {idea} has changed since this run was saved\n"


def test_a_block_knows_the_benchmark_s_names_and_no_others(small):
    """What our file happens to import would not be there when the benchmark runs the block."""
    banner = "# ====  EDITABLE {}  ====\n"
    names = (
        "os sys random uuid wandb torch nn F np pyrallis deepcopy dataclass asdict Optional Dict"
    )
    names += " Tuple Any List tqdm trange Categorical TrainConfig ModelBackbone soft_update"
    names += " asymmetric_l2_loss LSTM_HIDDEN UPDATE_INFO DEVICE"
    used = f"{', '.join(names.split())}\nclass Model: pass\nclass OfflineAlgorithm: pass\n"
    text = "raise SystemExit\n" + banner.format("BEGIN") + used + banner.format("END") + "x = (\n"
    Path("block.py").write_text(text, encoding="utf-8")
    assert pomdp.load_submission("block.py").Model
    for name in ("math", "NUM_ACTIONS", "Tensor", "UserError", "log_scaled"):
        Path("block.py").write_text(used + name, encoding="utf-8")
        assert_user_error(small(submission="block.py"), f"NameError.*'{name}'")


def test_the_readme_s_idea_learns(small):
    """It is another algorithm: its head is larger and its loss another."""
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    (idea,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    Path("idea.py").write_text(idea, encoding="utf-8")
    assert small(name="own")[0] == 0
    assert small(name="idea", submission="idea.py")[0] == 0
    own, other = (
        json.loads((run_of(name) / "metrics.jsonl").open().readline()) for name in ("own", "idea")
    )
    assert own["train/value_loss"] != other["train/value_loss"]
    weights = torch.load(run_of("idea") / "best.pt")["model"]
    assert weights["value.2.weight"].shape == (1, 32)


def test_unknown_actions_are_refused_for_an_algorithm_that_does_not_expect_them(toy, stores_path):
    """It would use 121 as an index, which fails in a gather, on a GPU with another's message."""
    (source, *_), _ = pomdp.find_nld_games(GAMES, MONK)
    frames = pomdp.read_ttyrec(source.path)
    path = Path(f"data-{MONK}-any.hdf5")
    actions = np.where(frames.actions == 255, -1, frames.actions).astype(np.int16)
    actions[100:103] = -1
    with h5py.File(path, "w") as file:
        for name in ("a", "b"):
            group = file.create_group(name)
            planes = dict(tty_chars=frames.chars, tty_colors=frames.colors, actions=actions)
            planes.update(tty_cursor=frames.cursor, rewards=np.append(np.diff(frames.scores), 0))
            for plane, values in planes.items():
                group[plane] = values
    unknown = dict(data_path=path, store_path="stores", update_steps=2)
    refused = toy(submission="toy.py", **unknown)
    assert_user_error(refused, "6 frames without a known action.*accepts_unknown_actions")
    text = TOY.replace(
        "class OfflineAlgorithm:", "class OfflineAlgorithm:\n    accepts_unknown_actions = True"
    )
    Path("toy.py").write_text(text, encoding="utf-8")
    assert toy(submission="toy.py", **unknown)[0] == 0
    assert toy(name="own", **unknown)[0] == 0
    for name in ("bc", "cql", "iql"):
        reference = ROOT / "scripts" / "references" / f"{name}.py"
        assert toy(submission=reference, name=name, **unknown)[0] == 0


def test_a_submission_need_not_report_anything(toy):
    Path("toy.py").write_text(
        TOY.replace("return loss, {}, info", "return loss, {}, {}"), encoding="utf-8"
    )
    status, out, err = toy(submission="toy.py", update_steps=2)
    assert status == 0 and len(lines_of(out, "TRAIN_METRICS")) == 2, err


BROKEN = {
    "x = (": "SyntaxError",
    "import unknown": "unknown",
    "x = 1": "Model",
    "class Model: pass": "OfflineAlgorithm",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_submission_is_one_line(small, text):
    Path("broken.py").write_text(text, encoding="utf-8")
    assert_user_error(small(submission="broken.py"), rf"broken\.py.*{BROKEN[text]}")
    assert os.listdir() == ["broken.py"]


def test_algorithm_settings_for_a_submission_that_has_none(toy):
    assert_user_error(toy(submission="toy.py", algorithm="{burn_in: 2}"), "burn_in")
