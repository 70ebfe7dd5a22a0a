"""Long trials of what a run promises to survive; `scripts/soak.sh` runs them at full length, tests/test_soak.py in short.

    kills    runs killed (SIGKILL) at random moments, while building the store, training, writing a checkpoint, playing, or at
             any time; each is resumed and must end as an undisturbed run does, to the bit
    disks    runs that find no room for a checkpoint; each must end with one line and go on, once there is room, to the same end
    inputs   damaged files and texts; each must be refused in one line, or give what the whole one gives
    games    games one after another; neither memory nor temporary folders may grow

    python scripts/soak.py [--kills N] [--disks N] [--inputs N] [--games N] [--seed S]

A network of 32 units and the games in tests/data/. Exits with 1 and names the trial if one fails.
"""

import argparse
import bz2
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import custom_nethack_pomdp as pomdp

GAMES = ROOT / "tests" / "data" / "nle_data"
MONK = "mon-hum-neu"
SETTINGS = dict(data_path=GAMES, character=MONK, batch_size=4, seq_len=8, update_steps=12, log_every=3, eval_every=6, checkpoint_every=3,
                eval_episodes=4, eval_processes=4, eval_workers=1, eval_max_steps=30, eval_heldout_frames=128, data_workers=1)  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
SECONDS = 300  # no single trial takes as long


class Failure(Exception):
    """A promise that was not kept."""


# --- a small run in a process of its own
def at_call(module: Any, name: str, count: int, act: Callable[..., None]) -> None:
    """Lets `act(*arguments)` come before the count-th call of module.name."""
    function, calls = getattr(module, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            act(*args)
        return function(*args, **options)

    setattr(module, name, counted)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_a_part_and_die(content: Any, file: Any) -> None:
    whole = io.BytesIO()
    torch.serialization.save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    file.flush()
    die()


def fill_the_disk(*_: Any) -> None:
    """From here on no file may grow beyond 100 kB: what a full disk does, as far as a process can tell, without filling one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


PHASES: Dict[str, Tuple[int, Callable[[int], None]]] = {  # phase -> (calls in a run, what prepares the trial)
    "building the store": (5, lambda count: at_call(pomdp, "encode_game", count, die)),
    "training": (12, lambda count: at_call(pomdp.OfflineAlgorithm, "_loss", count, die)),
    "writing a checkpoint": (5, lambda count: at_call(torch, "save", count, write_a_part_and_die)),
    "renaming files": (18, lambda count: at_call(os, "replace", count, die)),
    "playing": (50, lambda count: at_call(pomdp.GamePool, "step", count, die)),
    "full disk": (5, lambda count: at_call(torch, "save", count, fill_the_disk)),
}


def run_small(argv: List[str]) -> int:
    """PHASE COUNT ARGUMENTS...: custom_nethack_pomdp.py with a small network, disturbed at one moment."""
    phase, count, *arguments = argv
    backbone = pomdp.ModelBackbone
    pomdp.ModelBackbone = lambda actions, *_: backbone(actions, 32, 2)  # type: ignore[misc, assignment]  # that is the point
    torch.set_num_threads(1)
    if phase in PHASES:
        PHASES[phase][1](int(count))
    return pomdp.main(arguments)


def start(folder: Path, phase: str = "", count: int = 0) -> "subprocess.Popen[str]":
    settings = {**SETTINGS, "store_path": folder / "stores", "checkpoints_path": folder / "runs", "resume": "true"}
    arguments = [token for name, value in settings.items() for token in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, __file__, "--run", phase, str(count), *arguments], env={**ENVIRONMENT, "TMPDIR": str(folder)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> Tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


# --- runs that must end alike
def leaves(content: Any, where: str = "") -> Dict[str, Any]:
    """{path: leaf} of nested dicts, lists and tuples; tensors as bytes."""
    if isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {path: leaf for key, value in items for path, leaf in leaves(value, f"{where}/{key}").items()}
    return {where: content.numpy().tobytes() if isinstance(content, torch.Tensor) else content}


def outcome(folder: Path) -> Dict[str, Any]:
    """All that a run leaves, but for times and paths: names of its files, checkpoints, logged rows, every game's score."""
    runs = sorted((folder / "runs" / "custom-nethack-pomdp-v0").iterdir())
    # A run killed before it had described itself has done nothing yet: its folder stays as it is, and the next one begins beside it.
    (run,) = [path for path in runs if (path / "config.json").is_file()]
    found: Dict[str, Any] = {"files": sorted(path.name for path in run.iterdir())}
    for path in sorted(run.iterdir()):
        if path.suffix == ".pt":
            content = pomdp.read_checkpoint(path)
            found.update(leaves({name: value for name, value in content.items() if name not in ("config", "data")}, path.name))
        elif path.suffix == ".npy":
            found[path.name] = np.load(path, allow_pickle=False).tobytes()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found["rows"] = [{name: value for name, value in row.items() if not name.startswith("times/") and name != "charts/SPS"} for row in rows]
    found["left behind"] = sorted(path.name for path in folder.iterdir() if path.name not in ("runs", "stores"))
    return found


def must_equal(found: Dict[str, Any], expected: Dict[str, Any], trial: str) -> None:
    for name in {**expected, **found}:
        if name not in found or name not in expected or found[name] != expected[name]:
            raise Failure(f"{trial}: {name} is not as in the undisturbed run")


def wait_for_workers(folder: Path, seconds: float = 20) -> None:
    """The games' processes of a killed run notice it within a moment, and then remove their folders."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(folder.glob("nethack_games_*")):
        time.sleep(0.05)


def undisturbed(folder: Path) -> Tuple[Dict[str, Any], float]:
    begin = time.monotonic()
    status, _, err = finish(start(folder))
    if status:
        raise Failure(f"the undisturbed run ended with {status}: {err}")
    return outcome(folder), time.monotonic() - begin


def try_kills(trials: int, seed: int, folder: Path) -> None:
    expected, duration = undisturbed(folder / "undisturbed")
    phases = [phase for phase in PHASES if phase != "full disk"] + ["any moment"]
    rng, shift = random.Random(seed), random.Random(seed).randrange(len(phases))
    for number in range(trials):
        phase = phases[(number + shift) % len(phases)]
        here = folder / f"kill{number}"
        here.mkdir()
        count = rng.randint(1, PHASES[phase][0]) if phase in PHASES else 0
        trial = f"kill {number + 1} (seed {seed}): {phase}" + (f", call {count}" if count else "")
        process = start(here, phase, count)
        if phase == "any moment":
            threading.Timer(moment := rng.uniform(0, duration), process.kill).start()
            trial += f", {moment:.1f} s"
        status, _, err = finish(process)
        if status not in (-signal.SIGKILL, 0) or (status == 0 and phase != "any moment"):
            raise Failure(f"{trial}: it was to be killed, but ended with {status}: {err}")
        wait_for_workers(here)
        status, _, err = finish(start(here)) if status else (0, "", "")
        if status:
            raise Failure(f"{trial}: resumed, it ended with {status}: {err}")
        must_equal(outcome(here), expected, trial)
        print(f"{trial}: ended as the undisturbed run", flush=True)
        shutil.rmtree(here)


def try_disks(trials: int, seed: int, folder: Path) -> None:
    expected, _ = undisturbed(folder / "undisturbed")
    rng = random.Random(seed)
    for number in range(trials):
        here = folder / f"disk{number}"
        here.mkdir()
        count = rng.randint(1, PHASES["full disk"][0])
        trial = f"full disk {number + 1} (seed {seed}) at file {count}"
        status, _, err = finish(start(here, "full disk", count))
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        if status != 2 or len(lines) != 1 or "cannot write" not in lines[0] or "Traceback" in err:
            raise Failure(f"{trial}: it ended with {status} and said: {err}")
        status, _, err = finish(start(here))
        if status:
            raise Failure(f"{trial}: with room again it ended with {status}: {err}")
        must_equal(outcome(here), expected, trial)
        print(f"{trial}: {lines[0][:60]}...; resumed, it ended as the undisturbed run", flush=True)
        shutil.rmtree(here)


# --- damaged inputs
def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten, repeated, or something else altogether."""
    out = bytearray(data)
    at = rng.randrange(max(len(out), 1))
    kind = rng.randrange(6)
    if kind == 0:
        del out[at:]
    elif kind == 1:
        for _ in range(rng.choice((1, 1, 3, 50))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    elif kind == 3:
        out[at:at] = out[at : at + rng.randrange(1, 500)]
    elif kind == 4:
        del out[at : at + rng.randrange(1, 500)]
    else:
        out[:] = rng.choice((b"", b"\0" * len(out), rng.randbytes(rng.randrange(2000))))
    return bytes(out)


class Inputs:
    """Readers, each with a whole input and a check of what it makes of a damaged one. A check raises whatever the reader must not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        game = min(pomdp.find_nld_games(GAMES, MONK).games, key=lambda game: game.size)
        self.recording, self.expected = Path(game.path).read_bytes(), pomdp.encode_game(game)
        self.xlogfile = next(Path(game.path).parent.glob("*.xlogfile")).read_bytes()
        source = folder / "source" / "game"
        source.mkdir(parents=True)
        shutil.copy(game.path, source)
        (source / "x.xlogfile").write_bytes(self.xlogfile)
        with open(os.devnull, "w") as nowhere:
            sys.stdout, out = nowhere, sys.stdout
            try:
                self.store = pomdp.open_or_build_store(str(source.parent), str(folder / "stores"), MONK)
            finally:
                sys.stdout = out
        self.blocks = [self.store.block(0, number) for number in range(-(-int(self.store.frames[0]) // pomdp.BLOCK))]
        self.rows = b"".join(bytes(block.chars[0, 22:]) for block in self.blocks[:50])
        self.write_hdf5(folder / f"data-{MONK}-any.hdf5")
        self.hdf5 = (folder / f"data-{MONK}-any.hdf5").read_bytes()
        self.config = (ROOT / "scripts" / "configs" / "quickstart.yaml").read_bytes()
        self.content = {"format": pomdp.CHECKPOINT_FORMAT, "identity": "i", "step": 3, "model": {"weight": torch.arange(4000.0)}}
        torch.save(self.content, folder / "whole.pt")
        self.checkpoint = (folder / "whole.pt").read_bytes()

    def write_hdf5(self, path: Path) -> None:
        """The whole recording, NLE's own frames at its ends included, as Katakomba keeps it."""
        import h5py

        parts = list(pomdp.read_ttyrec(self.game_path(self.recording)))
        names = ("chars", "colors", "cursor", "actions", "scores")
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        with h5py.File(path, "w") as file:
            group = file.create_group("0")
            for name in ("chars", "colors", "cursor"):
                group.create_dataset(f"tty_{name}", data=arrays[name], compression="gzip")
            group["actions"], group["rewards"] = arrays["actions"], np.append(np.diff(arrays["scores"]), 0)

    def game_path(self, data: bytes) -> str:
        path = self.folder / "game.ttyrec3.bz2"
        path.write_bytes(data)
        return str(path)

    def read(self, path: str, key: str) -> None:
        """A game or a reason; with all its frames, if none was damaged."""
        game = pomdp.encode_game(pomdp.GameSource("game", path, key, 1, 1))
        if not isinstance(game, str) and game.frames < 1:
            raise Failure("a game without frames")

    def check_ttyrec(self, rng: random.Random) -> None:
        """Compressed recordings have checksums: what can be read must be what was written, up to where it was cut."""
        game = pomdp.encode_game(pomdp.GameSource("game", self.game_path(damage(self.recording, rng)), "", 1, 1))
        if not isinstance(game, str) and game.blocks != self.expected.blocks:
            raise Failure("other frames than the recording's")

    def check_ttyrec_inside(self, rng: random.Random) -> None:
        """Damaged before it was compressed: no checksum can tell, but nothing may break."""
        self.read(self.game_path(bz2.compress(damage(bz2.decompress(self.recording), rng))), "")

    def check_hdf5(self, rng: random.Random) -> None:
        path = self.folder / f"data-{MONK}-any.hdf5"
        path.write_bytes(damage(self.hdf5, rng))
        for source in pomdp.find_hdf5_games(path).games:
            self.read(source.path, source.key)

    def check_xlogfile(self, rng: random.Random) -> None:
        folder = self.folder / "nld" / "game"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "game.ttyrec3.bz2").write_bytes(b"")
        (folder / "x.xlogfile").write_bytes(damage(self.xlogfile, rng))
        for game in pomdp.find_nld_games(folder.parent, MONK).games:
            if Path(game.path).parent != folder:
                raise Failure(f"{game.path} lies outside of the folder")

    def check_store(self, rng: random.Random) -> None:
        folder = self.folder / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.store.folder, folder)
        path = folder / rng.choice(("index.npz", "frames.bin", "meta.json"))
        path.write_bytes(damage(path.read_bytes(), rng))
        store = pomdp.ChunkStore(folder)
        try:
            for number, block in enumerate(self.blocks):
                read = store.block(0, number)
                if any(not np.array_equal(getattr(read, name), getattr(block, name)) for name in read._fields):
                    raise Failure("other frames than were stored")
        finally:
            store.file.close()

    def check_status(self, rng: random.Random) -> None:
        chars = np.zeros((1, pomdp.ROWS, pomdp.COLS), np.uint8)
        text = damage(self.rows, rng)
        place = rng.randrange(max(len(text) // 160, 1)) * 160
        chars[0, 22:] = np.frombuffer(text[place : place + 160].ljust(160), np.uint8).reshape(2, pomdp.COLS)
        stats = pomdp.StatusReader()(chars)
        if stats.shape != (1, pomdp.NUM_BLSTATS) or stats.dtype != np.int32:
            raise Failure(f"{stats!r} are no blstats")

    def check_config(self, rng: random.Random) -> None:
        path = self.folder / "config.yaml"
        path.write_bytes(damage(self.config, rng))
        setting = damage(b"--batch_size=64", rng).decode("latin-1")
        pomdp.parse_config(["--config", str(path), *rng.choice(([], [setting]))])

    def check_checkpoint(self, rng: random.Random) -> None:
        path = self.folder / "damaged.pt"
        path.write_bytes(damage(self.checkpoint, rng))
        content = pomdp.read_checkpoint(path)
        if leaves(content) != leaves(self.content):
            raise Failure("another content than was saved")


def feed(number_of: List[int], seed: int, folder: str, pipe: Any) -> None:
    """Runs in a process of its own: tells which input comes next, then what became of it."""
    inputs = Inputs(Path(folder))
    checks = [name for name in dir(Inputs) if name.startswith("check_")]
    for number in number_of:
        name = checks[number % len(checks)]
        pipe.send((name, number, None))
        try:
            getattr(inputs, name)(random.Random(f"{seed} {number}"))
            verdict = "read"
        except pomdp.UserError as error:
            verdict = "refused" if str(error) else "refused without a word"
        except SystemExit as error:
            verdict = "help" if error.code == 0 else f"exit {error.code}"
        except BaseException as error:  # whatever it is, it is the finding
            verdict = f"{type(error).__name__}: {error}"
        pipe.send((name, number, verdict))
    pipe.send(None)


def try_inputs(trials: int, seed: int, folder: Path) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=feed, args=(range(trials), seed, str(folder), theirs))
    process.start()
    theirs.close()
    counts: Dict[Tuple[str, str], int] = {}
    failures, last = [], None
    try:
        while True:
            if not ours.poll(SECONDS):
                raise Failure(f"input {last} (seed {seed}): no end after {SECONDS} s")
            message = ours.recv()
            if message is None:
                break
            name, number, verdict = last = message
            if verdict is not None:
                counts[name[6:], verdict] = counts.get((name[6:], verdict), 0) + 1
                if verdict not in ("read", "refused", "help"):
                    failures.append(f"input {number} (seed {seed}), {name[6:]}: {verdict}")
    except EOFError:
        process.join()
        raise Failure(f"input {last} (seed {seed}) ended the process with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    for (name, verdict), count in sorted(counts.items()):
        print(f"inputs: {name:<14} {verdict:<8} {count}", flush=True)
    if failures:
        raise Failure("; ".join(failures[:10]))


# --- games without end
def memory(processes: List[Any]) -> float:
    """MB that the processes hold."""
    pages = sum(int(Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1]) for process in processes)
    return pages * resource.getpagesize() / 1e6


def try_games(trials: int, seed: int, folder: Path) -> None:
    """Random actions; ESC now and then, so that games get somewhere. Each round begins the slots' games anew."""
    tempfile.tempdir = str(folder)
    rng, slots, played, memories, folders = np.random.default_rng(seed), 4, 0, [], []
    pool = pomdp.GamePool(slots, min(2, pomdp.usable_cores()))
    begin = time.monotonic()
    a_round = min(500, max(slots, trials // 20))
    try:
        while played < trials:
            count = min(a_round, trials - played)
            pool.begin(MONK, count, seed + played, 15)
            ended = 0
            folders.append(len(list(folder.glob("*/nle*"))))
            while pool.views["active"].any():
                ended += len(pool.step(rng.integers(0, pomdp.NUM_ACTIONS, size=pool.rows)))
            if ended != count:
                raise Failure(f"{ended} games ended where {count} were begun")
            played += count
            memories.append(memory(pool.processes))
    finally:
        pool.close()
        tempfile.tempdir = None
    warm = memories[len(memories) // 10]
    print(f"games: {played} in {time.monotonic() - begin:.0f} s; workers' memory {memories[0]:.0f} MB at first, "
          f"{warm:.0f} MB after a tenth, {memories[-1]:.0f} MB at the end; folders at most {max(folders)}", flush=True)  # fmt: skip
    if not 0 < max(folders) <= slots or list(folder.iterdir()):
        raise Failure(f"{max(folders)} temporary folders for {slots} games, {len(list(folder.iterdir()))} left")
    if memories[-1] > warm * 1.1 + 10:
        raise Failure(f"the workers' memory grew from {warm:.0f} to {memories[-1]:.0f} MB")


TRIALS = {"kills": try_kills, "disks": try_disks, "inputs": try_inputs, "games": try_games}


def main(argv: List[str]) -> int:
    if argv[:1] == ["--run"]:
        return run_small(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in TRIALS:
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides the moments and the damage")
    args = parser.parse_args(argv)
    for name, function in TRIALS.items():
        if getattr(args, name) > 0:
            begin = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="soak_") as folder:
                try:
                    for sub in ("undisturbed",) if name in ("kills", "disks") else ():
                        Path(folder, sub).mkdir()
                    function(getattr(args, name), args.seed, Path(folder))
                except Failure as failure:
                    print(f"soak: error: {failure}", file=sys.stderr)
                    return 1
            print(f"{name}: {getattr(args, name)} passed in {math.ceil(time.monotonic() - begin)} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
