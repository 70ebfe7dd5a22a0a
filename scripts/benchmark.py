"""How fast each part is, side by side with what there was before, in one run.

    python scripts/benchmark.py --data_path DATA_DIR --katakomba CHECKOUT --json scripts/results/benchmark.json
    python scripts/benchmark.py --table scripts/results/benchmark.json   # its rows as a Markdown table

Both sides of every row take turns (ours, baseline, ours, ...), `--repeats` times after a first one that warms up. A row
shows the median and in brackets the lowest and highest of each side, and how many times better the median of ours is.
float32 and bfloat16 are set against the same timings of one baseline. Machines are shared and noisy: trust the ratio.
Ours runs with the memory settings that the script gives itself (keep_freed_memory), another's network in a process of
its own with glibc's usual ones, as its users would have it.

read    frames/s of one core: the chunk store's batches against nle.dataset's TtyrecDataset on the same games, and the
        first of them against Katakomba's own buffer (--katakomba), from its gzip and its memmap files
bytes   bytes a frame in the store (its index apart) against the raw screen's characters and colours
build   frames/s of one core at which a store is made, against nle.dataset's converter on the same games, nothing kept
act     model steps/s on the CPU: the packed step against nn.LSTM in float32 called at every step, encoders, head and
        drawing of actions included; for bfloat16 the share of likeliest actions that stay the same (untrained weights)
play    game steps/s with 8 games, without a policy: stepped one after another in the process itself, as evaluation does
        it, against gymnasium's AsyncVectorEnv (a process a game, on all cores) and against its SyncVectorEnv
train   transitions/s of whole updates, loading included (the share of time waiting for it is noted), on a CUDA GPU if
        there is one, against the update of Katakomba's IQL at the same size (--katakomba): on pictures that are ready,
        its reading and rendering left out; float32 on a CPU, its own fp16 on a GPU
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import custom_nethack_pomdp as pomdp

NLD_AA_FRAMES = 3_481_605_009  # arXiv 2211.00539, table 1
Row = Dict[str, Any]
Speed = Callable[[], float]  # units a second
again: Speed  # in a process of its own


# --- timing
def rate(action: Callable[[], Any], calls: int, units: float) -> Speed:
    """Of so many calls, each of which does so many units of work."""

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            action()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return calls * units / (time.perf_counter() - start)

    return timed


def begin(make: Callable[..., Speed], arguments: Any) -> None:
    global again
    again = make(*arguments)


def once_more() -> float:
    return again()


@contextlib.contextmanager
def elsewhere(make: Callable[..., Speed], *arguments: Any) -> Iterator[Speed]:
    """make(*arguments), made and timed in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, begin, (make, arguments)) as process:
        yield lambda: process.submit(once_more).result()


def make_row(
    row: str, what: str, unit: str, ours: List[float], baseline: List[float], fewer: bool = False
) -> Row:
    """`fewer` units are better."""
    result: Row = {"row": row, "what": what, "unit": unit, "repeats": len(ours)}
    for side, values in (("ours", ours), ("baseline", baseline)):
        result[side] = statistics.median(values) if values else None
        result[f"{side}_range"] = [min(values), max(values)] if values else None
    ratio = result["ours"] / result["baseline"] if baseline else None
    return {**result, "ratio": 1 / ratio if ratio and fewer else ratio}


def compare(
    row: str, unit: str, ours: Dict[str, Speed], baseline: Optional[Speed], repeats: int
) -> List[Row]:
    """Times all sides in turn -> a row for each of ours, against the same timings of the baseline."""
    sides = {**ours, "baseline": baseline}
    speeds: Dict[str, List[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            speed = side() if side else None
            if turn and speed:
                speeds[name].append(speed)
    return [make_row(row, what, unit, speeds[what], speeds["baseline"]) for what in ours]


# --- reading and building
def make_loader(options: argparse.Namespace, rows: int, steps: int) -> Any:
    store = pomdp.open_or_build_store(options.data_path, options.store_path, options.character)
    games = pomdp.Games([store])
    config = pomdp.TrainConfig(character=options.character, seq_len=steps, device="cpu")
    return pomdp.ChunkLoader(games, np.arange(len(games.frames)), config, rows, 100.0)


def read_ours(options: argparse.Namespace, rows: int, steps: int) -> Speed:
    loader, position = make_loader(options, rows, steps), itertools.count()
    return rate(lambda: loader.batch_at(next(position)), 40, rows * steps)


def read_nle(options: argparse.Namespace, folder: str, rows: int, steps: int) -> Speed:
    """nle.dataset's own reader over the same games."""
    from nle import dataset as nld

    database = os.path.join(folder, "ttyrecs.db")
    if not os.path.exists(database):
        nld.db.create(database)
        xlogfile = next(Path(options.data_path).resolve().rglob("*.xlogfile"))
        with contextlib.redirect_stdout(sys.stderr):
            nld.populate_db.add_nledata_directory(str(xlogfile.parent.parent), "games", database)
    settings: Dict[str, Any] = dict(
        dbfilename=database, shuffle=False, loop_forever=True, seq_length=steps
    )
    settings["subselect_sql"] = (
        "SELECT gameid FROM games WHERE lower(role || '-' || race || '-' || align0) = ?"
    )
    settings["subselect_sql_args"] = (options.character,)
    rows = min(rows, len(nld.TtyrecDataset("games", batch_size=1, **settings)._gameids))
    batches = iter(nld.TtyrecDataset("games", batch_size=rows, **settings))
    return rate(partial(next, batches), 10, rows * steps)


def bench_read(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for rows, steps in ((64, 16), (64, 32)):
            ours = {f"{rows} x {steps} against TtyrecDataset": read_ours(options, rows, steps)}
            yield from compare(
                "read", "frames/s", ours, read_nle(options, folder, rows, steps), options.repeats
            )
        for mode in ("compressed", "memmap") if options.katakomba else ():
            buffer = katakomba_buffer(options, folder, mode)
            ours = {f"64 x 16 against Katakomba's buffer, {mode}": read_ours(options, 64, 16)}
            yield from compare(
                "read", "frames/s", ours, rate(buffer.sample, 2, 64 * 16), options.repeats
            )
            buffer.close(clear_cache=False)


def bench_bytes(options: argparse.Namespace) -> Iterator[Row]:
    store = pomdp.open_or_build_store(options.data_path, options.store_path, options.character)
    size, index = (
        os.path.getsize(store.folder / name) / store.frames.sum()
        for name in ("frames.bin", "index.npz")
    )
    row = make_row(
        "bytes",
        "in the store against raw",
        "bytes a frame",
        [size],
        [2.0 * pomdp.ROWS * pomdp.COLS],
        True,
    )
    yield {**row, "index": float(index), "all_of_nld_aa_gb": (size + index) * NLD_AA_FRAMES / 1e9}


def decode(game: Any) -> None:
    decoder = pomdp.ttyrec_converter.Converter(pomdp.ROWS, pomdp.COLS, 3)
    decoder.load_ttyrec(game.path, gameid=1, part=0)
    arrays: List[Any] = [
        np.empty((1024, pomdp.ROWS, pomdp.COLS), kind) for kind in (np.uint8, np.int8)
    ]
    arrays += [
        np.empty((1024, 2), np.int16),
        *(np.empty(1024, kind) for kind in (np.int64, np.uint8, np.int32)),
    ]
    while decoder.convert(*arrays) == 0:
        pass


def bench_build(options: argparse.Namespace) -> Iterator[Row]:
    games = sorted(
        pomdp.find_games(options.data_path, options.character)[0], key=lambda game: game.size
    )
    # three, not among the longest
    some = games[len(games) // 4 : len(games) // 2 + 1 : max(1, len(games) // 8)]
    encoded = [game for game in map(pomdp.encode_game, some) if not game.problem]
    # both sides count those that the store keeps
    frames = sum(game.columns["frames"] for game in encoded)
    ours = rate(lambda: list(map(pomdp.encode_game, some)), 1, frames)
    baseline = rate(lambda: list(map(decode, some)), 1, frames)
    (row,) = compare(
        "build", "frames/s", {"one core against decoding alone": ours}, baseline, options.repeats
    )
    yield {**row, "all_of_nld_aa_core_hours": NLD_AA_FRAMES / row["ours"] / 3600}


# --- acting and playing
@cache
def make_model(units: int, dtype: Optional[torch.dtype]) -> Any:
    """Acts with the packed step in `dtype`, or, if that is None, with nn.LSTM at every step, as a plain loop would."""
    torch.manual_seed(0)
    model = pomdp.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, units)).eval()
    if dtype is None:
        model.backbone._step = lambda features, state: model.backbone.rnn(features[:, None], state)
    else:
        model.backbone.acting_dtype = dtype
    return model


def acting(units: int, dtype: Optional[torch.dtype], obs: Dict[str, np.ndarray]) -> Speed:
    model, state = make_model(units, dtype), None

    def step() -> None:
        nonlocal state
        _, state = model.vec_act(obs, state)

    return rate(step, 10, 1)


@torch.no_grad()
def likeliest_actions(
    model: Any, batch: Dict[str, torch.Tensor], prev_actions: torch.Tensor
) -> torch.Tensor:
    """[B, T] on recorded frames, from step to step as in a game."""
    inputs, state, actions = {name: batch[name] for name in pomdp.OBSERVATIONS}, None, []
    inputs["prev_actions"] = torch.cat([prev_actions, batch["actions"][:, :-1]], dim=1)
    for t in range(batch["mask"].shape[1] - 1):
        now = {name: value[:, t : t + 1] for name, value in inputs.items()}
        core_output, state = model.backbone(now, state)
        actions.append(model.head(core_output, now["tty_chars"])[0].argmax(-1))
    return torch.cat(actions, dim=1)


def bench_act(options: argparse.Namespace) -> Iterator[Row]:
    units, dtypes = options.rnn_hidden_dim, {"fp32": torch.float32, "bf16": torch.bfloat16}
    batch = make_loader(options, 8, 60).batch_at(0)
    usual = likeliest_actions(make_model(units, None), *batch)
    equal = {
        name: likeliest_actions(make_model(units, dtype), *batch) == usual
        for name, dtype in dtypes.items()
    }
    for rows in (1, 8, 32):
        frame, _ = make_loader(options, rows, 1).batch_at(5)
        obs = {name: frame[name][:, 0].numpy() for name in pomdp.OBSERVATIONS}
        obs["prev_actions"] = np.zeros(rows, np.int64)
        what = {name: f"{name}, {rows} games, against nn.LSTM" for name in dtypes}
        ours = {what[name]: acting(units, dtype, obs) for name, dtype in dtypes.items()}
        with elsewhere(acting, units, None, obs) as baseline:
            found = compare("act", "steps/s", ours, baseline, options.repeats)
        for name, row in zip(dtypes, found):
            yield {
                **row,
                **({"equal_actions": float(equal[name].float().mean())} if rows == 8 else {}),
            }


def plain_env(character: str) -> Any:
    options: Dict[str, Any] = dict(
        character=character, actions=pomdp.nethack.ACTIONS, max_episode_steps=10**9
    )
    options.update(
        allow_all_modes=True, allow_all_yn_questions=True, penalty_step=0.0, penalty_time=0.0
    )
    return pomdp.NetHackScore(
        observation_keys=("tty_chars", "tty_colors", "tty_cursor", "blstats"), **options
    )


@contextlib.contextmanager
def playing(character: str, keys: Iterator[np.ndarray]) -> Iterator[Speed]:
    """Games stepped as `vec_evaluate` does it, each with its observations in a row of one array."""
    obs = pomdp.empty_observations(8)
    games = []
    for slot in range(8):
        screen = {name: array[slot] for name, array in obs.items()}
        games.append(pomdp.NetHackGame(character, into=screen))
    numbers = itertools.count()

    def begin_game(game: pomdp.NetHackGame) -> None:
        game.reset(*pomdp.game_seeds(0, next(numbers)))

    def step() -> None:
        for game, key in zip(games, next(keys)):
            game.step(key)
            if game.end:
                begin_game(game)

    for game in games:
        begin_game(game)
    try:
        yield rate(step, 1000, 8)
    finally:
        for game in games:
            game.close()


def bench_play(options: argparse.Namespace) -> Iterator[Row]:
    from gymnasium import vector

    # moves and runs, which keep games going
    keys = itertools.cycle(np.random.default_rng(0).choice(16, (1000, 8)))
    make_envs = [partial(plain_env, options.character)] * 8
    with playing(options.character, keys) as ours:
        for kind in (vector.AsyncVectorEnv, vector.SyncVectorEnv):
            sides = {f"8 games against {kind.__name__}": ours}
            with contextlib.closing(kind(make_envs)) as envs:
                envs.reset()
                baseline = rate(lambda: envs.step(next(keys)), 1000, 8)
                yield from compare("play", "game steps/s", sides, baseline, options.repeats)


# --- training
def bench_train(options: argparse.Namespace) -> Iterator[Row]:
    names = ("character", "data_path", "store_path", "rnn_hidden_dim")
    settings = {name: getattr(options, name) for name in names}
    for rows, steps in options.sizes:
        ours: Dict[str, Speed] = {}
        trainers: List[Any] = []
        baseline: Any = contextlib.nullcontext()
        for precision in ("fp32", "bf16"):
            config = pomdp.TrainConfig(
                batch_size=rows, seq_len=steps, precision=precision, **settings
            )
            trainers.append(trainer := pomdp.Trainer(None, config))
            update = partial(trainer.update, pomdp.read_ahead(trainer.loader.batch_at, 0))
            what = f"{precision}, {rows} x {steps} on {trainer.device.type}"
            what += ", against Katakomba's IQL" if options.katakomba else ""
            calls = 20 if trainer.device.type == "cuda" else 1
            ours[what] = rate(update, calls, rows * steps)
        if options.katakomba:
            sizes = (rows, steps, options.rnn_hidden_dim)
            baseline = elsewhere(
                katakomba_iql, options.katakomba, *sizes, str(trainer.device), calls
            )
        with baseline as speed:
            found = compare("train", "transitions/s", ours, speed, options.repeats)
        for row, trainer in zip(found, trainers):
            yield {**row, "waiting_for_data": trainer.seconds[0] / trainer.seconds.sum()}


# --- Katakomba's own code, out of a checkout: its packages need not be installed
IQL = "algorithms/small_scale/iql_chaotic_lstm.py"


def katakomba_buffer(options: argparse.Namespace, folder: str, mode: str) -> Any:
    """Its SequentialBuffer over the six smallest games in its own layout; mode: compressed (gzip) or memmap."""
    import h5py

    games, _ = pomdp.find_games(options.data_path, options.character)
    with h5py.File(Path(folder, f"data-{options.character}-any.hdf5"), "w") as file:
        for number, game in enumerate(sorted(games, key=lambda game: game.size)[:6]):
            frames = pomdp.read_ttyrec(game.path)
            columns = dict(
                tty_chars=frames.chars,
                tty_colors=frames.colors,
                tty_cursor=frames.cursor.astype(np.int16),
            )
            columns.update(
                actions=frames.actions.astype(np.int16), dones=np.arange(len(frames.actions)) < 0
            )
            columns.update(rewards=np.diff(frames.scores, append=0))
            for name, column in columns.items():
                file.create_dataset(f"{number}/{name}", data=column, compression="gzip")
    sys.path.insert(0, options.katakomba)
    names = ("utils.roles", "utils.datasets.small_scale", "utils.datasets.small_scale_buffer")
    roles, small_scale, buffer = (importlib.import_module(f"katakomba.{name}") for name in names)
    vars(small_scale).update(DATA_PATH=folder, CACHE_PATH=folder)
    parts = zip((roles.Role, roles.Race, roles.Alignment), options.character.split("-"))
    dataset = small_scale.NLDSmallDataset(*(kind(part) for kind, part in parts), mode=mode)
    return buffer.SequentialBuffer(dataset, batch_size=64, seq_len=16, add_next_step=True)


def katakomba_iql(root: str, rows: int, steps: int, units: int, device: str, calls: int) -> Speed:
    """Updates of its IQL at its defaults, as in its `train`."""
    sys.path.insert(0, root)
    # a C++ extension; 18 x 18 cells of 6 x 6 pixels
    render = mock.MagicMock(SCREEN_SHAPE=(3, 108, 108))
    missing = (
        "wandb",
        "gym",
        "gym.vector",
        "katakomba.env",
        "katakomba.utils.datasets",
        "katakomba.utils.misc",
    )
    modules = {**{name: mock.MagicMock() for name in missing}, "katakomba.utils.render": render}
    with mock.patch.dict(sys.modules, modules):
        iql = runpy.run_path(os.path.join(root, IQL))
    config, cuda, random = iql["TrainConfig"](), device.startswith("cuda"), np.random.default_rng(0)
    critic, target = (
        iql["Critic"](pomdp.NUM_ACTIONS, units, config.rnn_layers).to(device) for _ in range(2)
    )
    no_decay, decay = iql["filter_wd_params"](critic)
    groups = [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": config.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    scaler, shape = torch.amp.GradScaler("cuda", enabled=cuda), (rows, steps + 1)
    arrays = {
        "tty_chars": random.integers(32, 127, (*shape, pomdp.ROWS, pomdp.COLS)),
        "screen_image": random.integers(0, 256, (*shape, *render.SCREEN_SHAPE)),
        "actions": random.integers(0, pomdp.NUM_ACTIONS, shape),
        "rewards": random.normal(size=shape),
        "dones": np.zeros(shape),
    }
    batch = {
        name: torch.as_tensor(array, dtype=torch.float, device=device)
        for name, array in arrays.items()
    }
    states: List[Any] = [None, None, None]
    previous = torch.zeros((rows, 1), dtype=torch.long, device=device)

    def update() -> None:
        nonlocal states, previous
        actions = batch["actions"]
        with torch.autocast("cuda", torch.float16, enabled=cuda):
            parts = (slice(0, -1), slice(1, None))
            obs, following = (
                {name: value[:, part].contiguous() for name, value in batch.items()}
                for part in parts
            )
            obs["prev_actions"] = torch.cat([previous, actions[:, :-2].long()], dim=1)
            following["prev_actions"] = actions[:, :-1].long()
            now = [obs[name] for name in ("actions", "rewards", "dones")]
            coefficients = (config.gamma, config.expectile_tau, config.temperature)
            loss, *states, _ = iql["iql_loss"](
                critic, target, obs, following, *now, *states, *coefficients
            )
        states = [[part.detach() for part in state] for state in states]
        previous = actions[:, -2, None].long()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        iql["soft_update"](target, critic, config.tau)

    return rate(update, calls, rows * steps)


# --- what it says
BENCHES = {name[6:]: bench for name, bench in list(globals().items()) if name.startswith("bench_")}
HEADER = "| row | what | ours | baseline | unit | times better | |\n| :--- | :--- | ---: | ---: | :--- | ---: | :--- |"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line_of(row: Row) -> str:
    """Of the Markdown table."""
    known = make_row("", "", "", [1.0], [])
    cells = [number(row[side]) if row[side] else "-" for side in ("ours", "baseline")]
    if row["repeats"] > 1:
        ranges = (row["ours_range"], row["baseline_range"])
        cells = [
            f"{cell} ({'..'.join(map(number, span))})" if span else cell
            for cell, span in zip(cells, ranges)
        ]
    ratio = f"**{row['ratio']:.2f} x**" if row["ratio"] else "-"
    notes = ", ".join(f"{name} {number(value)}" for name, value in row.items() if name not in known)
    return " | ".join(["", row["row"], row["what"], *cells, row["unit"], ratio, notes, ""]).strip()


def table(path: str) -> str:
    """The Markdown table of a file that --json wrote, and where its numbers are from."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    about = ", ".join(
        f"{name} {value}"
        for part in ("hardware", "versions")
        for name, value in content[part].items()
    )
    about += f", commit {content['commit'][:10]}, {content['rows'][0]['repeats']} repeats"
    return "\n".join([HEADER, *map(line_of, content["rows"]), "", about])


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", help="NLD-AA folder")
    parser.add_argument("--character", default="mon-hum-neu")
    parser.add_argument("--rows", default=",".join(BENCHES), help="which, by commas")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side")
    parser.add_argument(
        "--store_path", default="runs/stores", help="where the chunk store is made or found"
    )
    parser.add_argument(
        "--katakomba", help="checkout of Katakomba, for the rows against its buffer and its IQL"
    )
    parser.add_argument("--sizes", default="64x16,32x32", help="rows x steps of train")
    parser.add_argument(
        "--rnn_hidden_dim", type=int, default=2048, help="LSTM units, of both sides"
    )
    parser.add_argument("--json", help="also write everything to this file")
    parser.add_argument(
        "--table", metavar="FILE", help="measure nothing, print a file of --json as a table"
    )
    options = parser.parse_args(argv)
    pomdp.keep_freed_memory()  # as the script does
    # the table alone on standard output
    pomdp.say = lambda text: print(text, file=sys.stderr)

    def command() -> None:
        if options.table:
            print(table(options.table))
            return
        chosen = options.rows.split(",")
        if not options.data_path or set(chosen) - set(BENCHES) or options.repeats < 1:
            raise pomdp.UserError(
                f"give --data_path, --rows out of {','.join(BENCHES)}, and --repeats of at least 1"
            )
        try:
            options.sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
        except ValueError as error:
            raise pomdp.UserError(f"--sizes: {error}") from None
        if options.katakomba and not Path(options.katakomba, IQL).is_file():
            raise pomdp.UserError(
                f"{options.katakomba} is no checkout of github.com/corl-team/katakomba: no {IQL}"
            )
        described = json.loads(pomdp.describe_run(pomdp.TrainConfig()))
        described["benchmark_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        cpus = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        described["hardware"]["cpu"] = cpus[0] if cpus else "unknown"
        rows: List[Row] = []
        print(HEADER)
        for name in chosen:
            for row in BENCHES[name](options):
                rows.append(row)
                print(line_of(row), flush=True)
                if options.json:  # row by row: a long run may be cut off
                    text = json.dumps({**described, "rows": rows}, indent=1)
                    Path(options.json).write_text(text, encoding="utf-8")

    return pomdp.run_command(command)


if __name__ == "__main__":
    sys.exit(main())
