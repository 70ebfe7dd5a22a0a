"""How fast each part is, side by side with what users had before, in one run.

    python scripts/benchmark.py --data_path DATA_DIR [--rows read,build,act,play,evaluate,train] [--repeats 5] [--json FILE]

Every row times ours and theirs alternately, `--repeats` times each, and gives medians, the spread (quartiles over the
median) and the ratio ours / theirs of the medians. Machines are shared and noisy: trust the ratio, never one time.

read      frames/s of one core: the chunk store's batches against nle.dataset's TtyrecDataset, same games
build     frames/s of one core at which a store is made, against TtyrecDataset merely decoding them
act       model steps/s on the CPU at full size: the packed step (float32, and bfloat16) against nn.LSTM at every step
play      game steps/s without a policy: the evaluation's workers against AsyncVectorEnv, 8 games, all cores
evaluate  game steps/s with the full-size policy, 8 games, against a loop over AsyncVectorEnv and nn.LSTM
train     transitions/s of a whole update, loading included, at the benchmark's batch (64 x 16) and at ours; its share of
          time waiting for data; on a CUDA GPU if there is one, otherwise on the CPU
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import custom_nethack_pomdp as pomdp

ROWS = ("read", "build", "act", "play", "evaluate", "train")


def once(work: Callable[[], float]) -> float:
    """Units of work a second of one call; `work` returns how many units it did."""
    begin = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - begin)


def compare(row: str, what: str, unit: str, ours: Callable[[], float], theirs: Optional[Callable[[], float]], repeats: int,
            **extra: Any) -> Dict[str, Any]:  # fmt: skip
    """Times both alternately; -> the row of the table."""
    speeds: Dict[str, List[float]] = {"ours": [], "theirs": []}
    ours()  # caches, compilers and worker processes warm up
    if theirs is not None:
        theirs()
    for _ in range(repeats):
        speeds["ours"].append(once(ours))
        if theirs is not None:
            speeds["theirs"].append(once(theirs))
    median = {side: statistics.median(values) if values else None for side, values in speeds.items()}
    quartiles = np.percentile(speeds["ours"], [25, 75])
    result = {"row": row, "what": what, "ours": median["ours"], "theirs": median["theirs"],
              "ratio": median["ours"] / median["theirs"] if median["theirs"] else None, "unit": unit, "repeats": repeats,
              "spread": float((quartiles[1] - quartiles[0]) / median["ours"]), **extra}  # fmt: skip
    show(result)
    return result


def show(row: Dict[str, Any]) -> None:
    theirs = f"{row['theirs']:>12,.0f}" if row["theirs"] else f"{'-':>12}"
    ratio = f"{row['ratio']:>7.2f} x" if row["ratio"] else ""
    notes = ", ".join(f"{name} {value}" for name, value in row.items() if name in ("bytes_a_frame", "peak_memory_mb", "waiting", "agreement"))
    print(f"{row['row']:<9} {row['what']:<66} {row['ours']:>12,.0f} {theirs} {row['unit']:<14} +-{row['spread']:>4.0%} {ratio}  {notes}", flush=True)


class Data:
    """The games of one character, their store, and nle.dataset over the same games."""

    def __init__(self, data_path: str, character: str, folder: str) -> None:
        self.found = pomdp.find_games(data_path, character)
        self.store = pomdp.open_or_build_store(data_path, folder, character)
        self.games = pomdp.Games([self.store])
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


def bench_read(data: Data, repeats: int) -> List[Dict[str, Any]]:
    results = []
    games = len(data.games.frames)
    for rows, steps in ((64, 16), (min(64, games), 32)):
        loader, theirs = data.loader(rows, steps), iter(data.ttyrec_dataset(min(rows, games), steps))
        position = iter(range(10**9))

        def ours(loader: Any = loader, rows: int = rows, steps: int = steps) -> float:
            for _ in range(20):
                loader.batch_at(next(position) % loader.plan.steps)
            return 20 * rows * steps

        def other(theirs: Any = theirs, rows: int = min(rows, games), steps: int = steps) -> float:
            for _ in range(10):
                next(theirs)
            return 10 * rows * steps

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        results.append(compare("read", f"chunk store against TtyrecDataset, one core, {rows} x {steps}", "frames/s", ours, other, repeats,
                               bytes_a_frame=round(data.store.meta["bytes"] / data.store.meta["frames"], 1), peak_memory_mb=memory))  # fmt: skip
    return results


def bench_build(data: Data, repeats: int) -> List[Dict[str, Any]]:
    smallest = sorted(data.found.games, key=lambda game: game.size)[:2]

    def ours() -> float:
        return sum(pomdp.encode_game(game).frames for game in smallest)

    def theirs() -> float:
        return sum(len(piece.chars) for game in smallest for piece in decode_only(game.path))

    return [compare("build", "making the store against decoding alone, one core", "frames/s", ours, theirs, repeats)]


def decode_only(path: str) -> Any:
    """nle.dataset's converter and nothing else."""
    decoder = pomdp.ttyrec_converter.Converter(pomdp.ROWS, pomdp.COLS, 3)
    decoder.load_ttyrec(path, gameid=1, part=0)
    arrays = [np.empty((1024, 24, 80), np.uint8), np.empty((1024, 24, 80), np.int8), np.empty((1024, 2), np.int16),
              np.empty(1024, np.int64), np.empty(1024, np.uint8), np.empty(1024, np.int32)]  # fmt: skip
    remaining = 0
    while remaining == 0:
        remaining = decoder.convert(*arrays)
        yield pomdp.Frames(arrays[0][: 1024 - remaining], *arrays[1:])


def full_model() -> Any:
    torch.manual_seed(0)
    return pomdp.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS)).eval()


def observations(data: Data, rows: int) -> Dict[str, np.ndarray]:
    batch = data.loader(rows, 1).batch_at(5)
    return {name: batch[name][:, 0].numpy() for name in pomdp.OBSERVATIONS}


class PlainModel(torch.nn.Module):
    """The same model with nn.LSTM called at every step, as a loop without the packed step would."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def vec_act(self, obs: Any, state: Any = None, device: str = "cpu") -> Any:
        backbone = self.model.backbone
        backbone._step, step = lambda features, state: backbone.rnn(features[:, None], state), backbone._step
        try:
            return self.model.vec_act(obs, state, device)
        finally:
            backbone._step = step


def bench_act(data: Data, repeats: int) -> List[Dict[str, Any]]:
    model = full_model()
    plain, results = PlainModel(model), []
    for rows in (1, 8, 14, 32):
        obs = {**observations(data, rows), "prev_actions": np.zeros(rows, np.int64)}

        def act(actor: Any, obs: Any = obs) -> Callable[[], float]:
            def steps() -> float:
                state = None
                for _ in range(5):
                    _, state = actor.vec_act(obs, state)
                return 5

            return steps

        for precision in ("fp32", "bf16"):
            model.backbone.acting_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            results.append(compare("act", f"packed step in {precision} against nn.LSTM, {rows} games", "steps/s", act(model), act(plain), repeats))
    return results


def make_async_env(character: str) -> Any:
    """Eight games, a process each."""
    from functools import partial

    import gymnasium

    return gymnasium.vector.AsyncVectorEnv([partial(plain_env, character)] * 8, shared_memory=True)


def plain_env(character: str) -> Any:
    from nle import nethack
    from nle.env.tasks import NetHackScore

    return NetHackScore(character=character, actions=nethack.ACTIONS, allow_all_modes=True, allow_all_yn_questions=True, penalty_step=0.0,
                        penalty_time=0.0, max_episode_steps=10**9, observation_keys=("tty_chars", "tty_colors", "tty_cursor", "blstats"))  # fmt: skip


COMPASS = list(range(16))  # moves and runs: safe keys that keep games going


def bench_play(data: Data, repeats: int) -> List[Dict[str, Any]]:
    ticks, rng = 400, np.random.default_rng(0)
    envs, pool = make_async_env(data.character), pomdp.GamePool(8)
    envs.reset()

    def ours() -> float:
        pool.begin(data.character, 10_000, 0, 10**6)
        for _ in range(ticks):
            pool.step(rng.choice(COMPASS, 8))
        return 8 * ticks

    def theirs() -> float:
        for _ in range(ticks):
            envs.step(rng.choice(COMPASS, 8))
        return 8 * ticks

    try:
        return [compare("play", "evaluation workers against AsyncVectorEnv, 8 games", "game steps/s", ours, theirs, repeats)]
    finally:
        pool.close()
        envs.close()


def bench_evaluate(data: Data, repeats: int) -> List[Dict[str, Any]]:
    model, ticks = full_model(), 25
    plain, envs, pool = PlainModel(model), make_async_env(data.character), pomdp.GamePool(8)
    raw, _ = envs.reset()

    def ours() -> float:
        results = pomdp.play_games(pool, model, data.character, 8, 0, ticks, torch.device("cpu"))
        return sum(result.length for result in results)

    def theirs() -> float:
        obs, state, previous = raw, None, np.zeros(8, np.int64)
        for _ in range(ticks):
            frame = {name: np.asarray(obs[name]) for name in pomdp.OBSERVATIONS}
            frame["blstats"] = frame["blstats"].astype(np.int32)
            previous, state = plain.vec_act({**frame, "prev_actions": previous}, state)
            obs, *_ = envs.step(previous)
        return 8 * ticks

    try:
        return [compare("evaluate", "play_games against AsyncVectorEnv and nn.LSTM, 8 games", "game steps/s", ours, theirs, repeats)]
    finally:
        pool.close()
        envs.close()


def bench_train(data: Data, repeats: int) -> List[Dict[str, Any]]:
    results = []
    cuda = torch.cuda.is_available()
    for rows, steps in ((64, 16), (1024, 32) if cuda else (32, 32)):
        with tempfile.TemporaryDirectory() as folder:
            config = pomdp.TrainConfig(character=data.character, data_path=data.data_path, store_path=data.folder, checkpoints_path=folder,
                                       batch_size=rows, seq_len=steps, clip_grad_norm=1.0)  # fmt: skip
            trainer = pomdp.Trainer(config)
            stream = trainer.loader.stream(0)

            def update(trainer: Any = trainer, stream: Any = stream, rows: int = rows, steps: int = steps) -> float:
                count = 20 if cuda else 1
                for _ in range(count):
                    trainer.update(stream, timed=False)
                if cuda:
                    torch.cuda.synchronize()
                return count * rows * steps

            trainer.timers.take()
            begin = time.perf_counter()
            row = compare("train", f"a whole update at {rows} x {steps} on {trainer.device}", "transitions/s", update, None, repeats)
            row["waiting"] = f"{trainer.timers.take()['times/batch_loading_cpu'] / (time.perf_counter() - begin):.1%}"
            if cuda:
                row["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            print(f"{'':<9} of the time waiting for data: {row['waiting']}", flush=True)
            results.append(row)
            stream.close()
            trainer.close()
    return results


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="NLD-AA folder")
    parser.add_argument("--character", default="mon-hum-neu")
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, by commas")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side")
    parser.add_argument("--store_path", default="runs/stores", help="where the chunk store is made or found")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(argv)
    os.environ["WANDB_MODE"] = "disabled"
    chosen = options.rows.split(",")
    try:
        unknown = set(chosen) - set(ROWS)
        if unknown or options.repeats < 1:
            raise pomdp.UserError(f"--rows takes {', '.join(ROWS)} and --repeats at least 1")
        data = Data(options.data_path, options.character, options.store_path)
    except pomdp.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU: the train rows are a CPU's"
    print(f"{platform.processor() or platform.machine()}, {pomdp.usable_cores()} cores, torch {torch.__version__}, {device}")
    print(f"{'row':<9} {'what':<66} {'ours':>12} {'theirs':>12} {'unit':<14} {'spread':>6} {'ratio':>9}")
    benches = {"read": bench_read, "build": bench_build, "act": bench_act, "play": bench_play, "evaluate": bench_evaluate, "train": bench_train}
    results = [row for name in ROWS if name in chosen for row in benches[name](data, options.repeats)]
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
