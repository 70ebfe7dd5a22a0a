"""Ours, BC and IQL as the benchmark runs them: in check_submission.py's stand-in, on recorded games drawn as pictures.

    python scripts/standin_study.py --data_path DATA_DIR --rnn_hidden_dim 512 --out rows.jsonl

Each block is trained from the same seed on the same batches with the benchmark's settings (learning rate 3e-4,
constant, the last weights), for a million transitions if nothing else is said, and plays 50 games in 14 slots whose
states and previous actions are never cleared. Float32, on a GPU if there is one; a JSON row for each, and a table.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import check_submission as check
import numpy as np
import torch

import custom_nethack_pomdp as pomdp

SCREEN = ("tty_chars", "tty_colors", "tty_cursor")


def draw_glyphs() -> np.ndarray:
    """Each character in each colour, [256 * 32, 3, 6, 6] uint8; colours 16 to 31 are 0 to 15 in inverse video."""
    from PIL import Image, ImageDraw, ImageFont  # here, since a table can be made without it

    shades, font = np.zeros((256, 6, 6)), ImageFont.load_default_imagefont()
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
    """[..., 24, 80] twice, [..., 2] (row, column) -> [..., 3, 108, 108] uint8: 18 x 18 cells round the cursor's."""
    numbers = (chars.astype(np.int64) * 32 + (colors & 31)).reshape(-1, 24, 80)
    cells = np.pad(numbers, ((0, 0), (9, 9), (9, 9)))
    # [N, 18] each
    rows, columns = (cursor.reshape(-1, 2, 1).astype(int) + np.arange(18)).swapaxes(0, 1)
    crop = cells[np.arange(len(cells))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return table[crop].transpose(0, 3, 1, 4, 2, 5).reshape(*chars.shape[:-2], *check.SCREEN_SHAPE)


def play_row(games: pomdp.Games, order: Iterator[int]) -> Iterator[check.Arrays]:
    """A row's frames, a block of the store at a time: whole games, each the next one in the order."""
    for store, number in (games.in_store[game] for game in order):
        rewards, (at, values) = np.zeros(store.frames[number]), store.rewards(number)
        rewards[at] = np.maximum(values, 0)  # in Katakomba's data a lost score costs nothing
        for begin in range(0, len(rewards), pomdp.BLOCK):
            block, part = (
                store.block(number, begin // pomdp.BLOCK),
                rewards[begin : begin + pomdp.BLOCK],
            )
            dones = np.arange(begin + 1, begin + 1 + len(part)) == len(rewards)
            actions = block["actions"].astype(np.int64)
            yield {
                **{name: block[name] for name in SCREEN},
                "actions": actions,
                "rewards": part,
                "dones": dones,
            }


def game_batches(
    games: pomdp.Games, config: check.TrainConfig, table: np.ndarray
) -> Iterator[check.Arrays]:
    """As check.made_up_batches, of recorded games: in one random order, over and over, each row taking the next one."""
    order = itertools.cycle(
        np.random.default_rng(config.train_seed).permutation(len(games.frames)).tolist()
    )
    rows = [play_row(games, order) for _ in range(config.batch_size)]
    rests = [next(row) for row in rows]  # what was read and not yet given

    def steps(count: int) -> check.Arrays:
        for index, row in enumerate(rows):
            while len(rests[index]["actions"]) < count:
                more = next(row)
                rests[index] = {
                    name: np.concatenate([rest, more[name]]) for name, rest in rests[index].items()
                }
        data = {name: np.stack([rest[name][:count] for rest in rests]) for name in rests[0]}
        rests[:] = [{name: value[count:] for name, value in rest.items()} for rest in rests]
        return {**data, "screen_image": render(table, *(data[name] for name in SCREEN))}

    return check.overlapping(steps, config.seq_len)


class Player:
    """A model as `vec_evaluate` wants it, given what the benchmark gives: pictures, no blstats, and previous actions
    that begin with 0 and are never cleared."""

    def __init__(self, model: Any, table: np.ndarray) -> None:
        self.model, self.table, self.eval, self.train = model, table, model.eval, model.train

    def vec_act(self, obs: check.Arrays, state: Any, device: str) -> Any:
        previous, state = state or (np.zeros(len(obs["tty_chars"])), None)
        given = {name: obs[name] for name in SCREEN}
        given.update(screen_image=render(self.table, *given.values()), prev_actions=previous)
        actions, state = self.model.vec_act(given, state, device=device)
        return actions, (actions, state)


def measure(
    path: str, options: argparse.Namespace, games: pomdp.Games, table: np.ndarray
) -> Dict[str, Any]:
    """Trains the block and lets it play: its row."""
    began, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    losses: List[float] = []
    trial = check.Trial(check.read_block(check.DEFAULT_FILE if path == "ours" else path))
    loaded, complaint = check.attempt(trial.block, trial.load)
    if not loaded:
        raise pomdp.UserError(f"{path}: {complaint}")
    settings = {name: vars(options)[name] for name in ("character", "batch_size", "rnn_hidden_dim")}
    config = check.TrainConfig(train_seed=options.seed, **settings)
    torch.manual_seed(options.seed)
    backbone = check.ModelBackbone(check.NUM_ACTIONS, config.rnn_hidden_dim).to(device)
    algo = trial.module.OfflineAlgorithm(backbone=backbone, config=config, device=device)

    def on_step(
        step: int, batch: Any, before: Any, loss: torch.Tensor, states: Any, info: Any
    ) -> None:
        losses.append(float(info["loss_per_action"]))
        if step % 50 == 0:
            print(
                f"{path}: step {step}, {losses[-1]:.3f} nats, {time.monotonic() - began:.0f} s",
                flush=True,
            )

    check.run_training(
        algo, config, game_batches(games, config, table), options.steps, on_step=on_step
    )
    curve, seconds = (
        [float(part.mean()) for part in np.array_split(losses, 10) if len(part)],
        time.monotonic() - began,
    )
    playing = pomdp.TrainConfig(
        eval_processes=check.SLOTS,
        eval_episodes=options.games,
        eval_max_steps=options.eval_max_steps,
        eval_seed=config.eval_seed,
    )
    player = Player(algo.model, table)
    results = pomdp.vec_evaluate(player, config.character, playing, torch.device(device))
    row: Dict[str, Any] = {
        "algorithm": Path(path).stem,
        "block_sha256": hashlib.sha256(trial.block.source.encode()).hexdigest(),
    }
    row.update(
        settings,
        seed=options.seed,
        learning_rate=config.learning_rate,
        steps=options.steps,
        train_seconds=seconds,
    )
    row.update(
        transitions=len(losses) * config.batch_size * config.seq_len,
        curve=curve,
        train_loss=curve[-1],
    )
    played = {
        f"{name}s": [getattr(game, name) for game in results]
        for name in ("score", "depth", "length", "end")
    }
    described = json.loads(pomdp.describe_run(pomdp.TrainConfig()))
    row["played"] = {**played, "eval_max_steps": options.eval_max_steps}
    return {**row, **{name: described[name] for name in ("commit", "versions", "hardware")}}


def make_table(rows: List[Dict[str, Any]]) -> str:
    """Rows -> Markdown. The loss is the mean over the last tenth of the updates."""
    lines = [
        f"| block | transitions | training loss, nats | games | points [95 %] | {' / '.join(pomdp.ENDS)} |"
    ]
    lines.append("| :--- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        scores, ends = np.array(row["played"]["scores"]), row["played"]["ends"]
        low, high = pomdp.bootstrap_interval(scores)
        line = f"| {row['algorithm']} | {row['transitions']:,} | {row['train_loss']:.2f} | {len(scores)} "
        counts = " / ".join(str(ends.count(end)) for end in pomdp.ENDS)
        lines.append(f"{line}| {scores.mean():.1f} [{low:.1f}, {high:.1f}] | {counts} |")
    return "\n".join(lines)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", required=True, help="folder with recorded games")
    submissions = "ours,scripts/references/bc.py,scripts/references/iql.py"
    texts = {
        "submissions": submissions,
        "character": "mon-hum-neu",
        "store_path": "runs/stores",
        "out": "rows.jsonl",
    }
    numbers = {
        "steps": 500,
        "batch_size": 128,
        "rnn_hidden_dim": 2048,
        "games": 50,
        "eval_max_steps": 10**6,
        "seed": 1,
    }
    for name, default in {**texts, **numbers}.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"default: {default}"
        )
    options = parser.parse_args(argv)

    def command() -> None:
        if min(vars(options)[name] for name in numbers) < 1:
            raise pomdp.UserError(f"{', '.join(numbers)} must be at least 1")
        store = pomdp.open_or_build_store(options.data_path, options.store_path, options.character)
        if store.index["unknown_keys"].any():
            told = f"{store}: the benchmark's batches cannot say so, take other games"
            raise pomdp.UserError(told)
        games, table, rows = pomdp.Games([store]), draw_glyphs(), []
        with open(options.out, "a", encoding="utf-8") as file:
            for path in options.submissions.split(","):
                rows.append(measure(path, options, games, table))
                print(json.dumps(rows[-1]), file=file, flush=True)
        print(make_table(rows))

    return pomdp.run_command(command)


if __name__ == "__main__":
    sys.exit(main())
