# SPDX-License-Identifier: MIT
"""After the block was changed: ours, BC and IQL as the benchmark runs them, but on real games.

    python scripts/standin_study.py --data_path DATA_DIR --rnn_hidden_dim 512 --out rows.jsonl
    python scripts/standin_study.py --data_path tests/data/nle_data --steps 20 --batch_size 8 \\
        --rnn_hidden_dim 64 --games 4 --eval_max_steps 100            # shows that all works

Each block is trained in the stand-in of standin.py, on recorded games drawn as pictures, from the
same seed on the same batches with the benchmark's settings (learning rate 3e-4, constant, the last
weights), for a million transitions if nothing else is said, and plays 50 games in 14 slots whose
states and previous actions are never cleared. Float32, on a GPU if there is one; a JSON row for
each, added to --out, and a table.
"""

import hashlib
import itertools
import json
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, Iterator, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import numpy as np
import standin
import torch
from shared import Parser, Row, markdown_table
from standin import Arrays

import custom_nethack_pomdp as pomdp

SCREEN = ("tty_chars", "tty_colors", "tty_cursor")
BLOCKS = {"ours": str(standin.DEFAULT_FILE)}
# Settings and their defaults.
DEFAULTS = {
    "submissions": "ours,scripts/references/bc.py,scripts/references/iql.py",
    "character": "mon-hum-neu",
    "store_path": "runs/stores",
    "out": "rows.jsonl",
    "steps": 500,
    "batch_size": 128,
    "rnn_hidden_dim": 2048,
    "games": 50,
    "eval_max_steps": 10**6,
    "seed": 1,
}
NUMBERS = [name for name, default in DEFAULTS.items() if isinstance(default, int)]


def draw_glyphs() -> np.ndarray:
    """Each character in each colour, [256 * 32, 3, 6, 6] uint8; colours 16 to 31 are 0 to 15 in
    inverse video."""
    from PIL import Image, ImageDraw, ImageFont  # here, since a table can be made without it

    shades = np.zeros((256, 6, 6))
    font = ImageFont.load_default_imagefont()
    for code in [*range(33, 127), *range(161, 256)]:
        image = Image.new("L", (6, 11))
        ImageDraw.Draw(image).text((0, 0), chr(code), fill=255, font=font)
        shades[code] = np.asarray(image.resize((6, 6), Image.Resampling.BILINEAR)) / 255.0
    both = np.stack([shades, 1.0 - shades], axis=1)  # [256, 2, 6, 6]
    both[:32] = 0.0  # black, as is what lies beyond the screen's edge
    colors = np.arange(16)[:, None]
    rgb = 170 * (colors >> np.arange(3) & 1) + 85 * (colors >> 3)  # [16, 3]
    return np.einsum("ivyx,kc->ivkcyx", both, rgb).round().astype(np.uint8).reshape(-1, 3, 6, 6)


def render(
    table: np.ndarray, chars: np.ndarray, colors: np.ndarray, cursor: np.ndarray
) -> np.ndarray:
    """[..., 24, 80] twice, [..., 2] (row, column) -> [..., 3, 108, 108] uint8: 18 x 18 cells round
    the cursor's."""
    numbers = (chars.astype(np.int64) * 32 + (colors & 31)).reshape(-1, 24, 80)
    cells = np.pad(numbers, ((0, 0), (9, 9), (9, 9)))
    # [N, 18] each
    rows, columns = (cursor.reshape(-1, 2, 1).astype(int) + np.arange(18)).swapaxes(0, 1)
    crop = cells[np.arange(len(cells))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return table[crop].transpose(0, 3, 1, 4, 2, 5).reshape(*chars.shape[:-2], *standin.SCREEN_SHAPE)


def play_row(games: pomdp.Games, order: Iterator[int]) -> Iterator[Arrays]:
    """A row's frames, a block of the store at a time: whole games, each the next one in the
    order."""
    for game in order:
        store, number = games.in_store[game]
        rewards = np.zeros(store.frames[number])
        at, values = store.rewards(number)
        rewards[at] = np.maximum(values, 0)  # in Katakomba's data a lost score costs nothing
        dones = np.arange(len(rewards)) == len(rewards) - 1
        for begin in range(0, len(rewards), pomdp.BLOCK):
            here = slice(begin, begin + pomdp.BLOCK)
            block = store.block(number, begin // pomdp.BLOCK)
            frames = {name: block[name] for name in SCREEN}
            frames["actions"] = block["actions"].astype(np.int64)
            frames["rewards"] = rewards[here]
            frames["dones"] = dones[here]
            yield frames


def game_batches(games: pomdp.Games, config: Any, table: np.ndarray) -> Iterator[Arrays]:
    """As standin.made_up_batches, of recorded games: in one random order, over and over, each row
    taking the next one."""
    rng = np.random.default_rng(config.train_seed)
    order = itertools.cycle(rng.permutation(len(games.frames)).tolist())
    rows = [play_row(games, order) for _ in range(config.batch_size)]
    rests = [next(row) for row in rows]  # what was read and not yet given

    def steps(count: int) -> Arrays:
        for row, rest in zip(rows, rests):
            while len(rest["actions"]) < count:
                for name, more in next(row).items():
                    rest[name] = np.concatenate([rest[name], more])
        data = {name: np.stack([rest[name][:count] for rest in rests]) for name in rests[0]}
        for rest in rests:
            for name in rest:
                rest[name] = rest[name][count:]
        data["screen_image"] = render(table, *(data[name] for name in SCREEN))
        return data

    return standin.overlapping(steps, config.seq_len)


class Player:
    """A model as `vec_evaluate` wants it, given what the benchmark gives: pictures, no blstats, and
    previous actions that begin with 0 and are never cleared."""

    def __init__(self, model: Any, table: np.ndarray) -> None:
        self.model = model
        self.table = table
        self.eval = model.eval
        self.train = model.train

    def vec_act(self, obs: Arrays, state: Any, device: str) -> Any:
        previous, state = state or (np.zeros(len(obs["tty_chars"])), None)
        given = {name: obs[name] for name in SCREEN}
        given["screen_image"] = render(self.table, *given.values())
        given["prev_actions"] = previous
        actions, state = self.model.vec_act(given, state, device=device)
        return actions, (actions, state)


def read_block(path: str) -> standin.Block:
    try:
        return standin.read_block(path)
    except ValueError as error:  # it has no block
        raise pomdp.UserError(str(error)) from None


def train(module: Any, config: Any, batches: Iterator[Arrays], steps: int, name: str) -> Any:
    """-> the model, and the loss of each step."""
    began = time.monotonic()
    losses: List[float] = []
    device = str(pomdp.choose_device(pomdp.TrainConfig()))

    def on_step(step: int, *seen: Any) -> None:
        losses.append(float(seen[-1]["loss_per_action"]))
        if step % 50 == 0:
            seconds = time.monotonic() - began
            pomdp.say(f"{name}: step {step}, {losses[-1]:.3f} nats, {seconds:.0f} s")

    torch.manual_seed(config.train_seed)
    backbone = standin.ModelBackbone(standin.NUM_ACTIONS, config.rnn_hidden_dim).to(device)
    algo = module.OfflineAlgorithm(backbone=backbone, config=config, device=device)
    standin.run_training(algo, config, batches, steps, on_step=on_step)
    return algo.model, losses


def measure(
    path: str, options: Namespace, games: pomdp.Games, table: np.ndarray, folder: str
) -> Row:
    """Trains the block and lets it play: its row. The folder takes the block while it is in use."""
    began = time.monotonic()
    block = read_block(BLOCKS.get(path, path))
    loaded, module = standin.attempt(block, partial(standin.load_block, block, folder))
    if not loaded:
        raise pomdp.UserError(f"{path}: {module}")
    settings = {name: vars(options)[name] for name in ("character", "batch_size", "rnn_hidden_dim")}
    config = standin.TrainConfig(train_seed=options.seed, **settings)
    batches = game_batches(games, config, table)
    model, losses = train(module, config, batches, options.steps, path)
    seconds = time.monotonic() - began
    curve = [float(part.mean()) for part in np.array_split(losses, 10) if len(part)]
    playing = pomdp.TrainConfig(
        eval_processes=standin.SLOTS,
        eval_episodes=options.games,
        eval_max_steps=options.eval_max_steps,
        eval_seed=config.eval_seed,
    )
    device = pomdp.choose_device(playing)
    results = pomdp.vec_evaluate(Player(model, table), config.character, playing, device)
    played: Row = {"eval_max_steps": options.eval_max_steps}
    for name in ("score", "depth", "length", "end"):
        played[f"{name}s"] = [getattr(game, name) for game in results]
    described = json.loads(pomdp.describe_run(playing))
    return {
        "algorithm": Path(path).stem,
        "block_sha256": hashlib.sha256(block.source.encode()).hexdigest(),
        **settings,
        "seed": options.seed,
        "learning_rate": config.learning_rate,
        "steps": options.steps,
        "train_seconds": seconds,
        "transitions": len(losses) * config.batch_size * config.seq_len,
        "curve": curve,
        "train_loss": curve[-1],
        "played": played,
        "commit": described["commit"],
        "versions": described["versions"],
        "hardware": described["hardware"],
    }


def make_table(rows: List[Row]) -> str:
    """Rows -> Markdown. The loss is the mean over the last tenth of the updates."""
    header = ["block", "transitions", "training loss, nats", "games", "points [95 %]"]
    lines = [[*header, " / ".join(pomdp.ENDS)]]
    for row in rows:
        scores = np.array(row["played"]["scores"])
        low, high = pomdp.bootstrap_interval(scores)
        line = [
            row["algorithm"],
            f"{row['transitions']:,}",
            f"{row['train_loss']:.2f}",
            str(len(scores)),
            f"{scores.mean():.1f} [{low:.1f}, {high:.1f}]",
            " / ".join(str(row["played"]["ends"].count(end)) for end in pomdp.ENDS),
        ]
        lines.append(line)
    return markdown_table(lines)


def standin_study(options: Namespace) -> None:
    if min(vars(options)[name] for name in NUMBERS) < 1:
        raise pomdp.UserError(f"{', '.join(NUMBERS)} must be at least 1")
    store = pomdp.open_or_build_store(options.data_path, options.store_path, options.character)
    if store.index["unknown_keys"].any():
        raise pomdp.UserError(f"{store}: the benchmark's batches cannot say so, take other games")
    games = pomdp.Games([store])
    table = draw_glyphs()
    rows = []
    with open(options.out, "a", encoding="utf-8") as file:
        for path in options.submissions.split(","):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(path, options, games, table, folder))
            print(json.dumps(rows[-1]), file=file, flush=True)
    print(make_table(rows))


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--data_path", required=True, help="folder with recorded games")
    for name, default in DEFAULTS.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help="default: %(default)s"
        )
    return parser.run(standin_study, argv)


if __name__ == "__main__":
    sys.exit(main())
