# SPDX-License-Identifier: MIT
"""How fast each part is, side by side with what there was before, in one run.

    python scripts/benchmark.py --data_path tests/data/nle_data --rows read,bytes,build
    python scripts/benchmark.py --data_path DATA_DIR --katakomba CHECKOUT --json rows.json
    python scripts/benchmark.py --table scripts/results/benchmark.json   # as a Markdown table

Both sides of every row take turns (ours, baseline, ours, ...), `--repeats` times after a first one
that warms up. A row shows the median and in brackets the lowest and highest of each side, and how
many times better the median of ours is. float32 and bfloat16 are set against the same timings of
one baseline. Machines are shared and noisy: trust the ratio. Ours runs with the memory settings
that the script gives itself (keep_freed_memory), another's network in a process of its own with
glibc's usual ones, as its users would have it. act and train take minutes at the full size;
--rnn_hidden_dim 64 tries them out.

read    frames/s of one core: the chunk store's batches against nle.dataset's TtyrecDataset on the
        same games, and the first of them against Katakomba's own buffer (--katakomba), from its
        gzip and its memmap files
bytes   bytes a frame in the store (its index apart) against the raw screen's characters and colours
build   frames/s of one core at which a store is made, against nle.dataset's converter on the same
        games, nothing kept
act     model steps/s on the CPU: the packed step against nn.LSTM in float32 called at every step,
        encoders, head and drawing of actions included; for bfloat16 the share of likeliest actions
        that stay the same (untrained weights)
play    game steps/s with 8 games, without a policy: stepped one after another in the process
        itself, as evaluation does it, against gymnasium's AsyncVectorEnv (a process a game, on all
        cores) and against its SyncVectorEnv
train   transitions/s of whole updates, loading included (the share of time waiting for it is
        noted), on a CUDA GPU if there is one, against the update of Katakomba's IQL at the same
        size (--katakomba): float32 on a CPU, its own fp16 on a GPU. A row says what of it is not
        Katakomba's own
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
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import human_games
import numpy as np
import torch
from shared import Parser

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
    result["ours"] = statistics.median(ours)
    result["ours_range"] = [min(ours), max(ours)]
    result.update(baseline=None, baseline_range=None, ratio=None)
    if baseline:
        result["baseline"] = statistics.median(baseline)
        result["baseline_range"] = [min(baseline), max(baseline)]
        ratio = result["ours"] / result["baseline"]
        result["ratio"] = 1 / ratio if fewer else ratio
    return result


def compare(
    row: str, unit: str, ours: Dict[str, Speed], baseline: Optional[Speed], repeats: int
) -> List[Row]:
    """Times all sides in turn -> a row for each of ours, against the same timings of the
    baseline."""
    sides = dict(ours)
    if baseline:
        sides["baseline"] = baseline
    speeds: Dict[str, List[float]] = {"baseline": []}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            speed = side()
            if turn > 0:
                speeds.setdefault(name, []).append(speed)
    return [make_row(row, what, unit, speeds[what], speeds["baseline"]) for what in ours]


# --- reading and building
def make_loader(options: argparse.Namespace, rows: int, steps: int) -> Any:
    store = pomdp.open_or_build_store(options.data_path, options.store_path, options.character)
    games = pomdp.Games([store])
    config = pomdp.TrainConfig(character=options.character, seq_len=steps, device="cpu")
    return pomdp.ChunkLoader(games, np.arange(len(games.frames)), config, rows, 100.0)


def read_ours(options: argparse.Namespace, rows: int, steps: int) -> Speed:
    loader = make_loader(options, rows, steps)
    position = itertools.count()
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
    settings: Dict[str, Any] = dict(dbfilename=database, seq_length=steps)
    settings.update(shuffle=False, loop_forever=True)
    whose = "lower(role || '-' || race || '-' || align0) = ?"
    settings["subselect_sql"] = f"SELECT gameid FROM games WHERE {whose}"
    settings["subselect_sql_args"] = (options.character,)
    rows = min(rows, len(nld.TtyrecDataset("games", batch_size=1, **settings)._gameids))
    batches = iter(nld.TtyrecDataset("games", batch_size=rows, **settings))
    return rate(partial(next, batches), 10, rows * steps)


def bench_read(options: argparse.Namespace) -> Iterator[Row]:
    against = partial(compare, "read", "frames/s", repeats=options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        for rows, steps in ((64, 16), (64, 32)):
            ours = {f"{rows} x {steps} against TtyrecDataset": read_ours(options, rows, steps)}
            yield from against(ours, read_nle(options, folder, rows, steps))
        if not options.katakomba:
            return
        for mode in ("compressed", "memmap"):
            buffer = katakomba_buffer(options, folder, mode)
            ours = {f"64 x 16 against Katakomba's buffer, {mode}": read_ours(options, 64, 16)}
            for row in against(ours, rate(buffer.sample, 2, 64 * 16)):
                yield {**row, "note": "not Katakomba's own: the games, six of ours in its layout"}
            buffer.close(clear_cache=False)


def bench_bytes(options: argparse.Namespace) -> Iterator[Row]:
    store = pomdp.open_or_build_store(options.data_path, options.store_path, options.character)
    frames = int(store.frames.sum())
    size = os.path.getsize(store.folder / "frames.bin") / frames
    index = os.path.getsize(store.folder / "index.npz") / frames
    raw = 2.0 * pomdp.ROWS * pomdp.COLS
    row = make_row("bytes", "in the store against raw", "bytes a frame", [size], [raw], True)
    yield {**row, "index": index, "all_of_nld_aa_gb": (size + index) * NLD_AA_FRAMES / 1e9}


def decode(games: Sequence[Any]) -> None:
    for game in games:
        for _ in human_games.read_parts(game.path, version=3, size=1024):
            pass


def bench_build(options: argparse.Namespace) -> Iterator[Row]:
    found, _ = pomdp.find_games(options.data_path, options.character)
    games = sorted(found, key=lambda game: game.size)
    # three, not among the longest
    some = games[len(games) // 4 : len(games) // 2 + 1 : max(1, len(games) // 8)]
    frames = 0  # both sides count those that the store keeps
    for game in map(pomdp.encode_game, some):
        if not game.problem:
            frames += game.columns["frames"]
    ours = rate(lambda: list(map(pomdp.encode_game, some)), 1, frames)
    baseline = rate(lambda: decode(some), 1, frames)
    sides = {"one core against decoding alone": ours}
    (row,) = compare("build", "frames/s", sides, baseline, options.repeats)
    yield {**row, "all_of_nld_aa_core_hours": NLD_AA_FRAMES / row["ours"] / 3600}


# --- acting and playing
@cache
def make_model(units: int, dtype: Optional[torch.dtype]) -> Any:
    """Acts with the packed step in `dtype`, or, if that is None, with nn.LSTM at every step, as a
    plain loop would."""
    torch.manual_seed(0)
    model = pomdp.Model(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, units)).eval()
    if dtype is None:
        model.backbone._step = lambda features, state: model.backbone.rnn(features[:, None], state)
    else:
        model.backbone.acting_dtype = dtype
    return model


def acting(units: int, dtype: Optional[torch.dtype], obs: Dict[str, np.ndarray]) -> Speed:
    model = make_model(units, dtype)
    state = None

    def step() -> None:
        nonlocal state
        _, state = model.vec_act(obs, state)

    return rate(step, 10, 1)


@torch.no_grad()
def likeliest_actions(
    model: Any, batch: Dict[str, torch.Tensor], prev_actions: torch.Tensor
) -> torch.Tensor:
    """[B, T] on recorded frames, from step to step as in a game."""
    inputs = {name: batch[name] for name in pomdp.OBSERVATIONS}
    inputs["prev_actions"] = torch.cat([prev_actions, batch["actions"][:, :-1]], dim=1)
    state = None
    actions = []
    for t in range(batch["mask"].shape[1] - 1):
        now = {name: value[:, t : t + 1] for name, value in inputs.items()}
        core_output, state = model.backbone(now, state)
        actions.append(model.head(core_output, now["tty_chars"])[0].argmax(-1))
    return torch.cat(actions, dim=1)


def bench_act(options: argparse.Namespace) -> Iterator[Row]:
    units = options.rnn_hidden_dim
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    batch = make_loader(options, 8, 60).batch_at(0)
    usual = likeliest_actions(make_model(units, None), *batch)
    for rows in (1, 8, 32):
        frame, _ = make_loader(options, rows, 1).batch_at(5)
        obs = {name: frame[name][:, 0].numpy() for name in pomdp.OBSERVATIONS}
        obs["prev_actions"] = np.zeros(rows, np.int64)
        ours = {}
        for name, dtype in dtypes.items():
            ours[f"{name}, {rows} games, against nn.LSTM"] = acting(units, dtype, obs)
        with elsewhere(acting, units, None, obs) as baseline:
            found = compare("act", "steps/s", ours, baseline, options.repeats)
        for row, dtype in zip(found, dtypes.values()):
            if rows == 8:
                equal = likeliest_actions(make_model(units, dtype), *batch) == usual
                row["equal_actions"] = float(equal.float().mean())
            yield row


def plain_env(character: str) -> Any:
    options: Dict[str, Any] = dict(character=character, actions=pomdp.nethack.ACTIONS)
    options.update(allow_all_modes=True, allow_all_yn_questions=True, max_episode_steps=10**9)
    options.update(penalty_step=0.0, penalty_time=0.0)
    options["observation_keys"] = ("tty_chars", "tty_colors", "tty_cursor", "blstats")
    return pomdp.NetHackScore(**options)


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
def read_and_step(run: pomdp.Run, batches: Iterator[Any]) -> None:
    begin = time.perf_counter()
    batch = next(batches)
    run.seconds[0] += time.perf_counter() - begin
    pomdp.gradient_step(run, *batch)


def bench_train(options: argparse.Namespace) -> Iterator[Row]:
    names = ("character", "data_path", "store_path", "rnn_hidden_dim")
    settings = {name: getattr(options, name) for name in names}
    for rows, steps in options.sizes:
        ours: Dict[str, Speed] = {}
        runs: List[pomdp.Run] = []
        settings.update(batch_size=rows, seq_len=steps)
        calls = 20 if torch.cuda.is_available() else 1
        for precision in ("fp32", "bf16"):
            run = pomdp.make_run(pomdp.TrainConfig(precision=precision, **settings))
            runs.append(run)
            update = partial(read_and_step, run, pomdp.read_ahead(run.loader.batch_at, 0))
            what = f"{precision}, {rows} x {steps} on {run.device.type}"
            if options.katakomba:
                what += ", against Katakomba's IQL"
            ours[what] = rate(update, calls, rows * steps)
        against = partial(compare, "train", "transitions/s", ours, repeats=options.repeats)
        if options.katakomba:
            sizes = (rows, steps, options.rnn_hidden_dim)
            device = str(run.device)
            with elsewhere(katakomba_iql, options.katakomba, *sizes, device, calls) as speed:
                found = against(speed)
        else:
            found = against(None)
        for row, run in zip(found, runs):
            row["waiting_for_data"] = run.seconds[0] / run.seconds.sum()
            if options.katakomba:
                row["note"] = f"not Katakomba's own: {REPLACED}"
            yield row


# --- Katakomba's own code, out of a checkout: its packages need not be installed
IQL = "algorithms/small_scale/iql_chaotic_lstm.py"
REPLACED = (
    "the batches (noise that is ready: nothing is read or rendered) and the lines of the training "
    "loop; without wandb, gym, its environments, data sets and renderer"
)
# What the file imports, but its networks and its loss do not call.
SCREEN = (3, 108, 108)  # its pictures: 18 x 18 cells of 6 x 6 pixels
UNUSED = ["wandb", "gym", "gym.vector", "katakomba.env", "katakomba.utils.datasets"]
UNUSED += ["katakomba.utils.misc", "katakomba.utils.render"]


def katakomba_buffer(options: argparse.Namespace, folder: str, mode: str) -> Any:
    """Its SequentialBuffer over the six smallest games in its own layout; mode: compressed (gzip)
    or memmap."""
    import h5py

    games, _ = pomdp.find_games(options.data_path, options.character)
    with h5py.File(Path(folder, f"data-{options.character}-any.hdf5"), "w") as file:
        for number, game in enumerate(sorted(games, key=lambda game: game.size)[:6]):
            frames = pomdp.read_ttyrec(game.path)
            columns = {
                "tty_chars": frames.chars,
                "tty_colors": frames.colors,
                "tty_cursor": frames.cursor.astype(np.int16),
                "actions": frames.actions.astype(np.int16),
                "dones": np.zeros(len(frames.actions), dtype=bool),
                "rewards": np.diff(frames.scores, append=0),
            }
            for name, column in columns.items():
                file.create_dataset(f"{number}/{name}", data=column, compression="gzip")
    sys.path.insert(0, options.katakomba)
    roles = importlib.import_module("katakomba.utils.roles")
    small_scale = importlib.import_module("katakomba.utils.datasets.small_scale")
    buffer = importlib.import_module("katakomba.utils.datasets.small_scale_buffer")
    vars(small_scale).update(DATA_PATH=folder, CACHE_PATH=folder)
    role, race, alignment = options.character.split("-")
    character = (roles.Role(role), roles.Race(race), roles.Alignment(alignment))
    dataset = small_scale.NLDSmallDataset(*character, mode=mode)
    return buffer.SequentialBuffer(dataset, batch_size=64, seq_len=16, add_next_step=True)


def noise_batch(rows: int, steps: int, device: str) -> Dict[str, torch.Tensor]:
    """As its buffer and its renderer give one: [rows, steps, ...], floats."""
    random = np.random.default_rng(0)
    shape = (rows, steps)
    arrays = {
        "tty_chars": random.integers(32, 127, (*shape, pomdp.ROWS, pomdp.COLS)),
        "screen_image": random.integers(0, 256, (*shape, *SCREEN)),
        "actions": random.integers(0, pomdp.NUM_ACTIONS, shape),
        "rewards": random.normal(size=shape),
        "dones": np.zeros(shape),
    }
    batch = {}
    for name, array in arrays.items():
        batch[name] = torch.as_tensor(array, dtype=torch.float, device=device)
    return batch


def katakomba_iql(root: str, rows: int, steps: int, units: int, device: str, calls: int) -> Speed:
    """Updates of its IQL at its defaults, as in its `train`."""
    sys.path.insert(0, root)
    modules = dict.fromkeys(UNUSED, mock.MagicMock(SCREEN_SHAPE=SCREEN))
    with mock.patch.dict(sys.modules, modules):
        iql = runpy.run_path(os.path.join(root, IQL))
    config = iql["TrainConfig"]()
    cuda = device.startswith("cuda")
    sizes = (pomdp.NUM_ACTIONS, units, config.rnn_layers)
    critic = iql["Critic"](*sizes).to(device)
    target = iql["Critic"](*sizes).to(device)
    no_decay, decay = iql["filter_wd_params"](critic)
    groups = [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": config.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    scaler = torch.amp.GradScaler("cuda", enabled=cuda)
    batch = noise_batch(rows, steps + 1, device)
    states: List[Any] = [None, None, None]
    previous = torch.zeros((rows, 1), dtype=torch.long, device=device)

    def update() -> None:
        nonlocal states, previous
        actions = batch["actions"].long()
        with torch.autocast("cuda", torch.float16, enabled=cuda):
            obs = {name: value[:, :-1].contiguous() for name, value in batch.items()}
            following = {name: value[:, 1:].contiguous() for name, value in batch.items()}
            obs["prev_actions"] = torch.cat([previous, actions[:, :-2]], dim=1)
            following["prev_actions"] = actions[:, :-1]
            now = (obs["actions"], obs["rewards"], obs["dones"])
            coefficients = (config.gamma, config.expectile_tau, config.temperature)
            loss, *states, _ = iql["iql_loss"](
                critic, target, obs, following, *now, *states, *coefficients
            )
        for number, state in enumerate(states):
            states[number] = [part.detach() for part in state]
        previous = actions[:, -2, None]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        iql["soft_update"](target, critic, config.tau)

    return rate(update, calls, rows * steps)


# --- what it says
BENCHES = {
    "read": bench_read,
    "bytes": bench_bytes,
    "build": bench_build,
    "act": bench_act,
    "play": bench_play,
    "train": bench_train,
}
HEADER = """| row | what | ours | baseline | unit | times better | |
| :--- | :--- | ---: | ---: | :--- | ---: | :--- |"""
USUAL = make_row("", "", "", [1.0], [])


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(row: Row, side: str) -> str:
    if row[side] is None:
        return "-"
    text = number(row[side])
    if row["repeats"] > 1:
        text += f" ({'..'.join(map(number, row[f'{side}_range']))})"
    return text


def line_of(row: Row) -> str:
    """Of the Markdown table."""
    ratio = f"**{row['ratio']:.2f} x**" if row["ratio"] else "-"
    notes = []
    for name, value in row.items():
        if name == "note":
            notes.append(value)
        elif name not in USUAL:
            notes.append(f"{name} {number(value)}")
    cells = [row["row"], row["what"], cell(row, "ours"), cell(row, "baseline"), row["unit"], ratio]
    return f"| {' | '.join(cells)} | {', '.join(notes)} |"


def table(path: str) -> str:
    """The Markdown table of a file that --json wrote, and where its numbers are from."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    about = []
    for name, value in {**content["hardware"], **content["versions"]}.items():
        about.append(f"{name} {value}")
    about.append(f"commit {content['commit'][:10]}, {content['rows'][0]['repeats']} repeats")
    return "\n".join([HEADER, *map(line_of, content["rows"]), "", ", ".join(about)])


def describe() -> Dict[str, Any]:
    described = json.loads(pomdp.describe_run(pomdp.TrainConfig()))
    described["benchmark_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    described["hardware"]["cpu"] = cpu.group(1) if cpu else "unknown"
    return described


def run(options: argparse.Namespace) -> None:
    if options.table:
        try:
            print(table(options.table))
        except (ValueError, LookupError, TypeError):
            raise pomdp.UserError(f"{options.table} is no file that --json wrote") from None
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
    pomdp.keep_freed_memory()  # as the script does
    # the table alone on standard output
    pomdp.say = lambda text: print(text, file=sys.stderr)
    content = {**describe(), "rows": []}
    print(HEADER)
    for name in chosen:
        for row in BENCHES[name](options):
            content["rows"].append(row)
            print(line_of(row), flush=True)
            if options.json:  # row by row: a long run may be cut off
                text = json.dumps(content, indent=1)
                Path(options.json).write_text(text, encoding="utf-8")


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_path", help="NLD-AA folder")
    add("--character", default="mon-hum-neu", help="whose games (default: %(default)s)")
    add("--rows", default=",".join(BENCHES), help="which, by commas (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timings of each side (default: %(default)s)")
    add("--store_path", default="runs/stores", help="where the chunk store is made or found")
    add("--katakomba", metavar="CHECKOUT", help="also against its buffer and its IQL")
    add("--sizes", default="64x16,32x32", help="rows x steps of train (default: %(default)s)")
    add("--rnn_hidden_dim", type=int, default=2048, help="LSTM units (default: %(default)s)")
    add("--json", metavar="FILE", help="also write everything to this file")
    add("--table", metavar="FILE", help="measure nothing, print a file of --json as a table")
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
