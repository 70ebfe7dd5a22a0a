"""How fast each part is, side by side with what users had before, in one run.

    python scripts/benchmark.py --data_path DATA_DIR [--rows read,build,act,play,evaluate,train,ranks,grow] [--repeats 5]
                                [--katakomba CHECKOUT] [--json FILE]

Every row times ours and theirs alternately, `--repeats` times each, and gives medians, the spread (quartiles over the
median) and, last, the ratio ours / theirs of the medians. Machines are shared and noisy: trust the ratio, never one time.
Ours runs with the memory settings that the script gives itself (keep_freed_memory), another's network in a process of its
own with glibc's usual ones, as its users would have it.

read      frames/s of one core: the chunk store's batches against nle.dataset's TtyrecDataset on the same games, and against
          Katakomba's gzip and memmap readers on some of them; bytes a frame and peak memory beside them
build     frames/s of one core at which a store is made, against TtyrecDataset's decoding alone
act       model steps/s on the CPU at full size: the packed step (float32, and bfloat16) against nn.LSTM at every step; the
          share of equal greedy actions on recorded games (of the policy in --checkpoint, or an untrained one)
play      game steps/s without a policy: the evaluation's workers against AsyncVectorEnv, 8 games, all cores
evaluate  game steps/s with the full-size policy, 8 games, against a loop over AsyncVectorEnv and nn.LSTM
train     transitions/s of a whole update, loading included, at the benchmark's batch (64 x 16) and at ours, against
          Katakomba's IQL update (without its loading and rendering); share of the time waiting for data, share of what the
          chip does in a large matrix product; on a CUDA GPU if there is one, otherwise on the CPU
ranks     transitions/s of whole runs under torchrun, 2 processes against 1, the same rows in all
grow      read and train at 1, 4, 16 and 64 times the games (repeated) and on 1 and 2 cores, each in a process of its own,
          with its peak memory; and from these a worked estimate for all of NLD-AA
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import benchmark_katakomba as katakomba
import numpy as np
import torch
from study import cpu_name

import custom_nethack_pomdp as pomdp

ROWS = ("read", "build", "act", "play", "evaluate", "train", "ranks", "grow")
NLD_AA_GAMES, NLD_AA_FRAMES = 109_545, 3_481_605_009  # arXiv 2211.00539, table 1


def once(work: Callable[[], float]) -> float:
    """Units of work a second of one call; `work` returns how many units it did."""
    begin = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - begin)


def serve(pipe: Any, make: Callable[..., Callable[[], float]], arguments: Any) -> None:
    """In a process of its own: does make(*arguments)() whenever it is asked to, and answers with units a second."""
    work = make(*arguments)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while pipe.recv():
            pipe.send(once(work))


class Elsewhere:
    """Work that is done and timed in a process of its own."""

    def __init__(self, make: Callable[..., Callable[[], float]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, arguments))
        self.process.start()
        theirs.close()

    def speed(self) -> float:
        self.pipe.send(True)
        return float(self.pipe.recv())

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()


def speed_of(work: Any) -> float:
    return work.speed() if isinstance(work, Elsewhere) else once(work)


def compare(row: str, what: str, unit: str, ours: Callable[[], float], theirs: Any, repeats: int,
            quiet: bool = False, **extra: Any) -> Dict[str, Any]:  # fmt: skip
    """Times both alternately; -> the row of the table, shown unless `quiet`."""
    speeds: Dict[str, List[float]] = {"ours": [], "theirs": []}
    ours()  # caches, compilers and worker processes warm up
    for turn in range(repeats + 1):
        if turn:
            speeds["ours"].append(once(ours))
        if theirs is not None:
            speed = speed_of(theirs)
            speeds["theirs"] += [speed] if turn else []  # its first call warms up too
    median = statistics.median(speeds["ours"])
    base = statistics.median(speeds["theirs"]) if theirs is not None else None
    quartiles = np.percentile(speeds["ours"], [25, 75])
    result = {"row": row, "what": what, "ours": median, "theirs": base,
              "ratio": median / base if base else None, "unit": unit, "repeats": repeats,
              "spread": float((quartiles[1] - quartiles[0]) / median), **extra}  # fmt: skip
    if not quiet:
        show(result)
    return result


def show(row: Dict[str, Any]) -> None:
    theirs = f"{row['theirs']:>11,.0f}" if row["theirs"] else f"{'-':>11}"
    shown = ("row", "what", "ours", "theirs", "ratio", "unit", "repeats", "spread")
    notes = ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                      for name, value in row.items() if name not in shown)  # fmt: skip
    ratio = f"{row['ratio']:>7.2f} x" if row["ratio"] else f"{'-':>9}"
    print(f"{row['row']:<8} {row['what']:<63} {row['ours']:>11,.0f} {theirs} {row['unit']:<13} +-{row['spread']:>4.0%} {ratio}", flush=True)
    if notes:
        print(f"{'':<8}   {notes}", flush=True)


def peak_memory_mb() -> int:
    """Of this process since it began (getrusage would count what its parent held when it was made)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))


class Data:
    """The games of one character, their store, and nle.dataset over the same games."""

    def __init__(self, data_path: str, character: str, folder: str, times: int = 1) -> None:
        self.found = pomdp.find_games(data_path, character)
        self.store = pomdp.open_or_build_store(data_path, folder, character)
        self.games = pomdp.Games([self.store] * times)
        self.data_path, self.folder, self.character = data_path, folder, character

    def loader(self, rows: int, steps: int, threads: int = 1, seed: Optional[int] = 0) -> Any:
        return pomdp.ChunkLoader(self.games, range(len(self.games.frames)), rows, steps, seed, 100.0, 10.0, threads=threads)

    def ttyrec_dataset(self, rows: int, steps: int) -> Any:
        """nle.dataset's own reader over the folders of these games."""
        from nle import dataset as nld

        database = os.path.join(self.folder, "ttyrecs.db")
        if not os.path.exists(database):
            nld.db.create(database)
            nld.populate_db.add_nledata_directory(os.path.abspath(self.data_path), "games", database)
        role, race, align = self.character.split("-")
        select = "SELECT gameid FROM games WHERE lower(role)=? AND lower(race)=? AND lower(align0)=?"
        return nld.TtyrecDataset("games", batch_size=rows, seq_length=steps, dbfilename=database, shuffle=False, loop_forever=True,
                                 subselect_sql=select, subselect_sql_args=(role, race, align))  # fmt: skip


def read_ours(data: Data, rows: int, steps: int, threads: int = 1) -> Callable[[], float]:
    loader, position = data.loader(rows, steps, threads), iter(range(10**9))

    def read() -> float:
        for _ in range(40):
            loader.batch_at(next(position))
        return 40 * rows * steps

    return read


def read_batches(batches: Callable[[], Any], count: int, frames: int) -> Callable[[], float]:
    def read() -> float:
        for _ in range(count):
            batches()
        return count * frames

    return read


def bench_read(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    results, games = [], len(data.games.frames)
    extra: Dict[str, Any] = {"bytes_a_frame": round(data.store.meta["bytes"] / data.store.meta["frames"], 1)}
    for rows, steps in ((64, 16), (64, 32)):
        theirs = read_batches(partial(next, iter(data.ttyrec_dataset(min(rows, games), steps))), 10, min(rows, games) * steps)
        memory: Dict[str, Any] = {"peak_memory_mb": in_process(measure_read, options, 1, 1, rows, steps)["memory"]}
        what = f"chunk store against TtyrecDataset, one core, {rows} x {steps}"
        results.append(compare("read", what, "frames/s", read_ours(data, rows, steps), theirs, options.repeats, **extra, **memory))
    if options.katakomba:
        with tempfile.TemporaryDirectory() as folder:
            few = [int(game) for game in np.argsort(data.games.frames)[: min(6, games)]]
            path = Path(folder, f"data-{data.character}-any.hdf5")
            frames = katakomba.write_hdf5(path, data.games, few)
            for mode in ("compressed", "memmap"):
                buffer = katakomba.open_buffer(options.katakomba, Path(folder), data.character, mode, 64, 16)
                what = f"chunk store against Katakomba's {'gzip' if mode == 'compressed' else mode} reader, one core, 64 x 16"
                size = os.path.getsize(path) / frames if mode == "compressed" else 2 * pomdp.CELLS + 13
                note: Dict[str, Any] = {"katakomba_bytes_a_frame": round(size)}
                results.append(compare("read", what, "frames/s", read_ours(data, 64, 16), read_batches(buffer.sample, 2, 1024),
                                       options.repeats, **note))  # fmt: skip
                buffer.close(clear_cache=False)
    return results


def bench_build(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    by_size = sorted(data.found.games, key=lambda game: game.size)
    some = by_size[len(by_size) // 4 : len(by_size) // 2 + 1 : max(1, len(by_size) // 8)]  # three games, not among the longest

    def ours() -> float:
        return sum(pomdp.encode_game(game).frames for game in some)

    def theirs() -> float:
        return sum(len(piece.chars) for game in some for piece in decode_only(game.path))

    row = compare("build", "making the store against decoding alone, one core", "frames/s", ours, theirs, options.repeats)
    options.build_speed = row["ours"]
    return [row]


def decode_only(path: str) -> Any:
    """nle.dataset's converter, which TtyrecDataset runs in its threads, and nothing else."""
    decoder = pomdp.ttyrec_converter.Converter(pomdp.ROWS, pomdp.COLS, 3)
    decoder.load_ttyrec(path, gameid=1, part=0)
    arrays: List[Any] = [np.empty((1024, 24, 80), np.uint8), np.empty((1024, 24, 80), np.int8), np.empty((1024, 2), np.int16),
              np.empty(1024, np.int64), np.empty(1024, np.uint8), np.empty(1024, np.int32)]  # fmt: skip
    remaining = 0
    while remaining == 0:
        remaining = decoder.convert(*arrays)
        yield pomdp.Frames(arrays[0][: 1024 - remaining], *arrays[1:])


def full_model(checkpoint: Optional[str] = None) -> Any:
    torch.manual_seed(0)
    model = pomdp.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS)).eval()
    if checkpoint:
        model.load_state_dict(pomdp.read_checkpoint(Path(checkpoint))["model"])
    return model


def observations(data: Data, rows: int) -> Dict[str, np.ndarray]:
    batch = data.loader(rows, 1).batch_at(5)
    return {name: batch[name][:, 0].numpy() for name in pomdp.OBSERVATIONS}


class PlainModel(torch.nn.Module):
    """The same model with nn.LSTM called at every step, as a loop without the packed step would."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def _plainly(self, function: Callable[..., Any], *arguments: Any) -> Any:
        backbone = self.model.backbone
        backbone._step, step = lambda features, state: backbone.rnn(features[:, None], state), backbone._step
        try:
            return function(*arguments)
        finally:
            backbone._step = step

    def forward(self, inputs: Any, state: Any = None) -> Any:
        return self._plainly(self.model, inputs, state)

    def vec_act(self, obs: Any, state: Any = None, device: str = "cpu") -> Any:
        return self._plainly(self.model.vec_act, obs, state, device)


def greedy_agreement(model: Any, plain: PlainModel, data: Data, frames: int = 60) -> float:
    """Share of equal likeliest actions of both, each with its own state, over the first frames of 8 recorded games."""
    loader = pomdp.ChunkLoader(data.games, range(min(8, len(data.games.frames))), 8, frames, None, 100.0, 10.0)
    batch = loader.batch_at(0)
    equal, states = [], [None, None]
    for step in range(frames):
        obs = {name: batch[name][:, step].numpy() for name in pomdp.OBSERVATIONS}
        previous = batch["prev_actions"][:, 0] if step == 0 else batch["actions"][:, step - 1]
        choices = []
        for side, actor in enumerate((model, plain)):
            actor.eval()
            with torch.no_grad():
                inputs = {name: torch.as_tensor(array)[:, None] for name, array in {**obs, "prev_actions": previous.numpy()}.items()}
                logits, _, states[side] = actor(inputs, states[side])
            choices.append(logits[:, -1].argmax(-1))
        equal.append((choices[0] == choices[1]).float().mean().item())
    return float(np.mean(equal))


def bench_act(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    model = full_model(options.checkpoint)
    plain, results = PlainModel(model), []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model.backbone.acting_dtype = dtype
        agreement: Dict[str, Any] = {"equal_greedy_actions": greedy_agreement(model, plain, data),
                                     "policy": "trained" if options.checkpoint else "untrained"}  # fmt: skip
        for rows in (1, 8, 14, 32):
            obs = {**observations(data, rows), "prev_actions": np.zeros(rows, np.int64)}

            theirs = Elsewhere(plain_acting, obs)
            what = f"packed step in {precision} against nn.LSTM, {rows} games"
            results.append(compare("act", what, "steps/s", acting(model, obs), theirs, options.repeats, **(agreement if rows == 8 else {})))
            theirs.close()
    return results


def acting(actor: Any, obs: Dict[str, np.ndarray]) -> Callable[[], float]:
    def steps() -> float:
        state = None
        for _ in range(10):
            _, state = actor.vec_act(obs, state)
        return 10

    return steps


def plain_acting(obs: Dict[str, np.ndarray]) -> Callable[[], float]:
    return acting(PlainModel(full_model()), obs)


def make_async_env(character: str) -> Any:
    """Eight games, a process each."""
    import gymnasium

    return gymnasium.vector.AsyncVectorEnv([partial(plain_env, character)] * 8, shared_memory=True)


def plain_env(character: str) -> Any:
    from nle import nethack
    from nle.env.tasks import NetHackScore

    return NetHackScore(character=character, actions=nethack.ACTIONS, allow_all_modes=True, allow_all_yn_questions=True, penalty_step=0.0,
                        penalty_time=0.0, max_episode_steps=10**9,
                        observation_keys=("tty_chars", "tty_colors", "tty_cursor", "blstats"))  # fmt: skip


COMPASS = list(range(16))  # moves and runs: safe keys that keep games going


def bench_play(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    actions = np.random.default_rng(0).choice(COMPASS, (1000, 8))
    envs, pool = make_async_env(data.character), pomdp.GamePool(8)
    envs.reset()
    pool.begin(data.character, 100_000, 0, 10**6)

    def ours() -> float:
        for chosen in actions:
            pool.step(chosen)
        return actions.size

    def theirs() -> float:
        for chosen in actions:
            envs.step(chosen)
        return actions.size

    try:
        return [compare("play", "evaluation workers against AsyncVectorEnv, 8 games", "game steps/s", ours, theirs, options.repeats)]
    finally:
        pool.close()
        envs.close()


TICKS = 25  # of a timed evaluation


def plain_evaluation(character: str) -> Callable[[], float]:
    """A loop like Katakomba's vec_evaluate over the same network: one environment a process, nn.LSTM at every step."""
    plain, envs = PlainModel(full_model()), make_async_env(character)
    raw, _ = envs.reset()

    def evaluate() -> float:
        obs, state, previous = raw, None, np.zeros(8, np.int64)
        for _ in range(TICKS):
            frame = {name: np.asarray(obs[name]) for name in pomdp.OBSERVATIONS}
            frame["blstats"] = frame["blstats"].astype(np.int32)
            previous, state = plain.vec_act({**frame, "prev_actions": previous}, state)
            obs, *_ = envs.step(previous)
        return 8 * TICKS

    return evaluate


def bench_evaluate(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    results, pool = [], pomdp.GamePool(8)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, theirs = full_model(), Elsewhere(plain_evaluation, data.character)
        model.backbone.acting_dtype = dtype

        def ours(model: Any = model) -> float:
            return sum(game.length for game in pomdp.play_games(pool, model, data.character, 8, 0, TICKS, torch.device("cpu")))

        what = f"play_games in {precision} against AsyncVectorEnv and nn.LSTM, 8 games"
        results.append(compare("evaluate", what, "game steps/s", ours, theirs, options.repeats))
        theirs.close()
    pool.close()
    return results


def make_trainer(data: Data, folder: str, rows: int, steps: int, threads: int) -> Any:
    config = pomdp.TrainConfig(character=data.character, data_path=data.data_path, store_path=data.folder, checkpoints_path=folder,
                               batch_size=rows, seq_len=steps, clip_grad_norm=1.0, data_workers=threads)  # fmt: skip
    return pomdp.Trainer(config)


def updates(trainer: Any, stream: Any, count: int) -> Callable[[], float]:
    def run() -> float:
        for _ in range(count):
            trainer.update(stream, timed=False)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return count * trainer.config.batch_size * trainer.config.seq_len

    return run


def matrix_peak(device: torch.device, precision: Optional[torch.dtype]) -> float:
    """FLOP/s of a large square matrix product in the precision of training: what the chip is seen to do."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=precision or torch.float32) for _ in range(2))
    speeds = []
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(5):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        speeds.append(5 * 2 * size**3 / (time.perf_counter() - begin))
    return max(speeds)


def matrix_flops(trainer: Any) -> float:
    """FLOP a transition of the LSTM's and the head's matrix products: forward, twice that backward, and the burn-in's forward."""
    model, burn_in = trainer.algorithm.model, trainer.algorithm.hyper.burn_in
    lstm = sum(weight.numel() for weight in model.backbone.rnn.parameters() if weight.dim() == 2)
    head = sum(weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2 and not name.startswith("backbone"))
    return 6.0 * (lstm + head) + 2.0 * lstm * burn_in / trainer.config.seq_len


def bench_train(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    results, cuda = [], torch.cuda.is_available()
    for rows, steps in ((64, 16), (1024, 32) if cuda else (64, 32)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(data, folder, rows, steps, 8 if cuda else 2)
            stream = trainer.loader.stream(0)
            peak = matrix_peak(trainer.device, trainer.precision)
            ours, theirs = updates(trainer, stream, 20 if cuda else 1), None
            if options.katakomba:
                theirs = Elsewhere(katakomba.iql_update, options.katakomba, 64, 16, str(trainer.device))
            ours()
            trainer.timers.take()
            timed: List[float] = []

            def watched(ours: Callable[[], float] = ours, timed: List[float] = timed) -> float:
                begin = time.perf_counter()
                units = ours()
                timed.append(time.perf_counter() - begin)
                return units

            what = f"update at {rows} x {steps} on {trainer.device}" + " against Katakomba's IQL at 64 x 16" * bool(theirs)
            row = compare("train", what, "transitions/s", watched, theirs, options.repeats, quiet=True)
            row["waiting_for_data"] = round(trainer.timers.take()["times/batch_loading_cpu"] / sum(timed), 4)
            row["share_of_matrix_peak"] = round(row["ours"] * matrix_flops(trainer) / peak, 3)
            row["peak_memory_mb"] = peak_memory_mb()
            if cuda:
                row["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            show(row)
            results.append(row)
            stream.close()
            trainer.close()
            if theirs:
                theirs.close()
    return results


def processes_speed(data: Data, processes: int) -> float:
    """Transitions/s that a run under torchrun logs: 64 rows in all, shared by the processes as are the cores."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"character": data.character, "data_path": data.data_path, "store_path": data.folder, "checkpoints_path": folder,
                    "batch_size": 64 // processes, "update_steps": 6, "log_every": 3, "eval_episodes": 0,
                    "eval_heldout_frames": 0}  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), pomdp.__file__]
        command += [token for name, value in settings.items() for token in (f"--{name}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, pomdp.usable_cores() // processes))}
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return float([line for line in said.splitlines() if line.startswith("TRAIN_METRICS")][-1].rsplit("=", 1)[1])


def bench_ranks(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    speeds: Dict[int, List[float]] = {1: [], 2: []}
    for _ in range(max(1, options.repeats // 2)):
        for processes, found in speeds.items():
            found.append(processes_speed(data, processes))
    ours, theirs = statistics.median(speeds[2]), statistics.median(speeds[1])
    row = {"row": "ranks", "what": "2 processes against 1 (torchrun), 64 x 16 in all", "ours": ours, "theirs": theirs,
           "ratio": ours / theirs, "unit": "transitions/s", "repeats": len(speeds[1]),
           "spread": (max(speeds[2]) - min(speeds[2])) / ours}  # fmt: skip
    show(row)
    return [row]


# --- how cost grows
def in_process(work: Callable[..., Dict[str, float]], options: argparse.Namespace, times: int, cores: int, *more: Any) -> Dict[str, float]:
    """work(options, times, cores, ...) in a fresh process on `cores` cores."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(on_cores, (work, options, times, cores, *more))


def on_cores(work: Callable[..., Dict[str, float]], options: argparse.Namespace, times: int, cores: int, *more: Any) -> Dict[str, float]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    pomdp.keep_freed_memory()
    pomdp.say = lambda text: None  # the store was announced once
    return work(options, times, cores, *more)


def measure_read(options: argparse.Namespace, times: int, cores: int, rows: int = 64, steps: int = 32) -> Dict[str, float]:
    read = read_ours(Data(options.data_path, options.character, options.store_path, times), rows, steps, threads=cores)
    read()
    return {"speed": statistics.median(once(read) for _ in range(options.repeats)), "memory": peak_memory_mb()}


def measure_train(options: argparse.Namespace, times: int, cores: int) -> Dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Data(options.data_path, options.character, options.store_path), folder, 64, 16, cores)
        trainer.games = pomdp.Games(trainer.games.stores * times)
        loader = trainer._loader(np.arange(len(trainer.games.frames)), 64, 0)
        stream = loader.stream(0)
        run = updates(trainer, stream, 20 if trainer.device.type == "cuda" else 1)
        run()
        speed = statistics.median(once(run) for _ in range(max(2, options.repeats // 2)))
        stream.close()
        trainer.close()
    return {"speed": speed, "memory": peak_memory_mb()}


def bench_grow(data: Data, options: argparse.Namespace) -> List[Dict[str, Any]]:
    results = []
    for kind, measure, unit in (("read", measure_read, "frames/s"), ("train", measure_train, "transitions/s")):
        base: Dict[int, float] = {}
        for times in (1, 4, 16, 64):
            for cores in (1, 2):
                if cores > pomdp.usable_cores():
                    continue
                measured = in_process(measure, options, times, cores)
                base.setdefault(cores, measured["speed"])
                what = f"{kind}: {times} x the games ({times * len(data.store):,}), {cores} core{'s' * (cores > 1)}, against 1 x"
                row = {"row": "grow", "what": what, "ours": measured["speed"], "theirs": base[cores],
                       "ratio": measured["speed"] / base[cores], "unit": unit, "repeats": options.repeats,
                       "spread": 0.0, "peak_memory_mb": measured["memory"]}  # fmt: skip
                show(row)
                results.append(row)
    estimate(data, results, options)
    return results


def estimate(data: Data, results: List[Dict[str, Any]], options: argparse.Namespace) -> None:
    """All of NLD-AA, from what was just measured. Printed with its sums, so that a reader can redo them for another machine."""
    frames = int(data.store.frames.sum())
    disk = data.store.meta["bytes"] / frames * NLD_AA_FRAMES
    index = os.path.getsize(data.store.folder / "index.npz") / frames * NLD_AA_FRAMES
    build = getattr(options, "build_speed", None) or bench_build(data, options)[0]["ours"]
    print(f"\nAll of NLD-AA ({NLD_AA_GAMES:,} games, {NLD_AA_FRAMES:,} transitions), from the rows above:")
    print(f"  disk    {data.store.meta['bytes'] / frames:.1f} bytes a frame x {NLD_AA_FRAMES / 1e9:.2f}e9 = {disk / 1e9:.0f} GB")
    print(f"  memory  index of {index / 1e9:.2f} GB beside what a run on these games takes; frames stay on disk")
    print(f"  build   {NLD_AA_FRAMES / 1e9:.2f}e9 / {build:,.0f} frames/s a core = {NLD_AA_FRAMES / build / 3600:.0f} core hours")
    for row in [row for row in results if "train: 64 x" in row["what"]]:
        print(f"  epoch   {NLD_AA_FRAMES / 1e9:.2f}e9 / {row['ours']:,.0f} transitions/s = {NLD_AA_FRAMES / row['ours'] / 3600:,.0f} h "
              f"({row['what'].split(', ')[-2]}, 64 x 16)")  # fmt: skip


BENCHES = {"read": bench_read, "build": bench_build, "act": bench_act, "play": bench_play, "evaluate": bench_evaluate, "train": bench_train,
           "ranks": bench_ranks, "grow": bench_grow}  # fmt: skip


def machine() -> str:
    """The machine in words: processor, cores, GPU, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU: the train rows are a CPU's"
    return f"{cpu_name() or platform.machine()}, {pomdp.usable_cores()} cores, torch {torch.__version__}, {device}"


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="NLD-AA folder")
    parser.add_argument("--character", default="mon-hum-neu")
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, by commas")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side")
    parser.add_argument("--store_path", default="runs/stores", help="where the chunk store is made or found")
    parser.add_argument("--katakomba", help="checkout of Katakomba, for rows against its readers and its IQL")
    parser.add_argument("--checkpoint", help="trained weights for the act row's agreement, e.g. a run's best.pt")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(argv)
    os.environ["WANDB_MODE"] = "disabled"
    pomdp.keep_freed_memory()  # as the script does
    chosen = options.rows.split(",")
    try:
        unknown = set(chosen) - set(ROWS)
        if unknown or options.repeats < 1:
            raise pomdp.UserError(f"--rows takes {', '.join(ROWS)} and --repeats at least 1")
        options.katakomba = katakomba.check_checkout(options.katakomba) if options.katakomba else None
        data = Data(options.data_path, options.character, options.store_path)
    except (pomdp.UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(machine())
    print(f"{'row':<8} {'what':<63} {'ours':>11} {'theirs':>11} {'unit':<13} {'spread':>6} {'ratio':>9}")
    results = [row for name in ROWS if name in chosen for row in BENCHES[name](data, options)]
    if options.json:
        Path(options.json).write_text(json.dumps([{**row, "machine": machine()} for row in results], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
