# SPDX-License-Identifier: MIT
"""Before a release, by scripts/soak.sh: long trials of what a run promises to survive.

    kills    runs that are killed (SIGKILL) at random moments: while they build the store, train,
             write a checkpoint, rename files, play, or at any time, or that find no room for a
             checkpoint and must say so in one line; resumed, each must end as an undisturbed run
             does, to the bit
    ranks    the same with two processes, one of which is killed
    games    the same games over and over in one process must stay the same; neither its memory nor
             its temporary folders may grow

    python scripts/soak.py --kills 2          # some 10 seconds each
    python scripts/soak.py --ranks 1 --games 1000 --seed 3

A network of 16 units and the games in tests/data/. Exits with 1 and names the trial if one fails.
tests/test_soak.py has all this in short.
"""

import itertools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import numpy as np
import torch
from shared import ROOT, Parser, Row, read_rows

import custom_nethack_pomdp as pomdp

MONK = "mon-hum-neu"
SETTINGS = {
    "data_path": ROOT / "tests" / "data" / "nle_data",
    "character": MONK,
    "batch_size": 4,
    "seq_len": 8,
    "update_steps": 12,
    "log_every": 3,
    "rnn_dropout": 0.3,
    "checkpoint_every": 3,
    "eval_every": 6,
    "eval_episodes": 4,
    "eval_processes": 4,
    "eval_max_steps": 30,
    "eval_heldout_frames": 128,
    "resume": "true",
    "benchmark_sizes": "false",
    "rnn_hidden_dim": 16,
}
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "WANDB_MODE": "disabled",
    "MASTER_ADDR": "127.0.0.1",
}
SECONDS = 300  # no single trial takes as long
RUN = Path("runs", "custom-nethack-pomdp-v0", f"custom-{MONK}-seed42")
Call = Callable[..., Any]
Content = Dict[str, Any]


class Failure(Exception):
    pass


# --- a small run in processes of its own
def before_call(function: Call, count: int, act: Call) -> Call:
    """The function, with `act(*arguments)` before its count-th call."""
    calls = itertools.count(1)

    def counted(*args: Any, **options: Any) -> Any:
        if next(calls) == count:
            act(*args)
        return function(*args, **options)

    return counted


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_a_part_and_die(_content: Any, file: Any) -> None:
    file.write(b"PK: a checkpoint's first bytes")
    file.flush()
    die()


def fill_the_disk(*_: Any) -> None:
    """From here on no file may grow beyond 100 kB: to a process that is a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


# -> calls in a run; what is disturbed, and how
PHASES: Dict[str, Tuple[int, Any, str, Call]] = {
    "building the store": (5, pomdp, "encode_game", die),
    "training": (12, pomdp, "gradient_step", die),
    "writing a checkpoint": (5, torch, "save", write_a_part_and_die),
    "full disk": (5, torch, "save", fill_the_disk),
    "renaming files": (18, os, "replace", die),
    "playing": (100, pomdp.NetHackGame, "step", die),
}
# of two processes
OF_THE_FIRST = ("building the store", "writing a checkpoint", "full disk", "renaming files")


def run_small(argv: List[str]) -> int:
    """PHASE COUNT ARGUMENTS...: custom_nethack_pomdp.py, disturbed at one moment."""
    phase, count, *arguments = argv
    torch.set_num_threads(1)
    if phase in PHASES:
        _, owner, name, act = PHASES[phase]
        setattr(owner, name, before_call(getattr(owner, name), int(count), act))
    return pomdp.main(arguments)


def run(
    folder: Path,
    processes: int,
    phase: str = "",
    count: int = 0,
    victim: int = 0,
    moment: float = 0.0,
) -> Tuple[int, str]:
    """A run of so many processes, the victim disturbed -> its exit status and standard error."""
    folder.mkdir(exist_ok=True)
    settings = {**SETTINGS, "store_path": folder / "stores", "checkpoints_path": folder / "runs"}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **ENVIRONMENT,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "TMPDIR": str(folder),
    }
    started = []
    for rank in range(processes):
        environment["RANK"] = environment["LOCAL_RANK"] = str(rank)
        disturbed = ["", "0"]
        if rank == victim:
            disturbed = [phase, str(count)]
        process = subprocess.Popen(
            [sys.executable, __file__, "--run", *disturbed, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
    disturbed_one = started[victim]
    if moment:
        threading.Timer(moment, disturbed_one.kill).start()
    try:
        _, err = disturbed_one.communicate(timeout=SECONDS)
        if disturbed_one.returncode == 0:
            for process in started:
                process.wait(SECONDS)
    finally:
        for process in started:  # as torchrun does
            process.kill()
            process.wait()
    return disturbed_one.returncode, err


# --- runs that must end alike
def rows_of(folder: Path) -> List[Row]:
    """A run's logged rows, without what depends on the clock."""
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        for name in list(row):
            if name.startswith(("times/", "charts/")):
                del row[name]
    return rows


def leaves(content: Any, where: str) -> Content:
    """{path: leaf} of nested dicts, lists and tuples; tensors as bytes."""
    if isinstance(content, torch.Tensor):
        return {where: (content.dtype, content.numpy().tobytes())}
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return {where: content}
    found: Content = {}
    for key, value in content.items():
        found.update(leaves(value, f"{where}/{key}"))
    return found


def outcome(folder: Path) -> Content:
    """All that a run leaves in its folder, but for times and paths."""
    files = sorted(folder.iterdir())
    found: Content = {"files": [path.name for path in files], "rows": rows_of(folder)}
    for path in files:
        if path.suffix == ".pt":
            content = pomdp.read_checkpoint(path)
            for name in ("config", "run"):  # these name folders, and when the games were unpacked
                content.pop(name, None)
            found.update(leaves(content, path.name))
        elif path.suffix in (".npy", ".csv"):
            found[path.name] = path.read_bytes()
    return found


def differences(one: Content, other: Content) -> List[str]:
    lacking = object()
    names = {**one, **other}
    return [name for name in names if one.get(name, lacking) != other.get(name, lacking)]


def try_runs(processes: int, trials: int, seed: int, folder: Path) -> None:
    """An undisturbed run, then disturbed ones, each resumed: all must end alike."""
    begin = time.monotonic()
    status, err = run(folder / "undisturbed", processes)
    if status:
        raise Failure(f"the undisturbed run ended with {status}: {err}")
    expected = outcome(folder / "undisturbed" / RUN)
    duration = time.monotonic() - begin
    rng = random.Random(seed)
    phases = [*PHASES, "any moment"]
    for number in range(trials):
        phase = phases[(number + seed) % len(phases)]
        here = folder / f"run{number}"
        count = 0
        moment = 0.0
        victim = 0
        if phase in PHASES:
            count = rng.randint(1, PHASES[phase][0])
            when = f"call {count}"
        else:
            moment = rng.uniform(0.1, duration)
            when = f"{moment:.1f} s"
        if phase not in OF_THE_FIRST:
            victim = rng.randrange(processes)
        trial = f"run {number + 1} (seed {seed}): process {victim} of {processes}, {phase}, {when}"
        status, err = run(here, processes, phase, count, victim, moment)
        right = status == -signal.SIGKILL or (status == 0 and not count)
        if phase == "full disk":
            right = status == 2 and err.count("error: cannot write") == 1 and "Traceback" not in err
        if not right:
            raise Failure(f"{trial}: it ended with {status} and said: {err}")
        if status:
            status, err = run(here, processes)
        if status:
            raise Failure(f"{trial}: resumed, it ended with {status}: {err}")
        different = differences(outcome(here / RUN), expected)
        if different:
            raise Failure(f"{trial}: not as undisturbed: {', '.join(different[:5])}")
        print(f"{trial}: resumed, it ended as the undisturbed run", flush=True)
        shutil.rmtree(here)


# --- games without end
class RandomWalk(torch.nn.Module):
    def vec_act(
        self, obs: Dict[str, np.ndarray], state: Any = None, device: str = "cpu"
    ) -> Tuple[np.ndarray, Any]:
        return torch.randint(16, (len(obs["prev_actions"]),)).numpy(), None


def megabytes() -> float:
    """Of memory that this process has in use."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 1e6


def try_games(trials: int, seed: int, folder: Path) -> None:
    games = max(4, min(500, trials // 30))
    config = pomdp.TrainConfig(
        eval_processes=4, eval_episodes=games, eval_max_steps=40, eval_seed=seed
    )
    expected: List[pomdp.GameResult] = []
    memories = []
    with patch.object(tempfile, "tempdir", str(folder)):
        for number in range(max(1, trials // games)):
            results = pomdp.vec_evaluate(RandomWalk(), MONK, config, torch.device("cpu"))
            expected = expected or results
            if results != expected or len({result[1:] for result in results}) < 2:
                raise Failure(f"games (seed {seed}), round {number + 1}: not those of round 1")
            if list(folder.iterdir()):
                raise Failure("temporary folders of games that are over are left")
            memories.append(megabytes())
    warm = memories[len(memories) // 10]
    what = f"games: memory {warm:.0f} MB after a tenth, {memories[-1]:.0f} MB at the end"
    print(what)
    if memories[-1] > warm * 1.1 + 10:
        raise Failure(what)


TRIALS: Content = {
    "kills": partial(try_runs, 1),
    "ranks": partial(try_runs, 2),
    "games": try_games,
}


def soak(args: Namespace) -> int:
    """Exit status: 1 where a trial failed."""
    if not max(getattr(args, name) for name in TRIALS):
        raise pomdp.UserError("nothing to try: give --kills N, --ranks N or --games N")
    for name, function in TRIALS.items():
        number = getattr(args, name)
        begin = time.monotonic()
        if number > 0:
            with tempfile.TemporaryDirectory(prefix="soak_") as folder:
                try:
                    function(number, args.seed, Path(folder))
                except Failure as failure:
                    print(f"soak: error: {failure}", file=sys.stderr)
                    return 1
            print(f"{name}: {number} passed in {time.monotonic() - begin:.0f} s", flush=True)
    return 0


def main(argv: List[str]) -> int:
    if argv[:1] == ["--run"]:
        return run_small(argv[1:])
    parser = Parser(__doc__)
    for name in TRIALS:
        parser.add_argument(
            f"--{name}", type=int, default=0, metavar="N", help="so many trials (default: none)"
        )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="decides the moments and the damage (default: %(default)s)",
    )
    return parser.run(soak, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
