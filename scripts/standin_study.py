"""The EDITABLE block and the references inside the stand-in for the benchmark, on real games with a rendered picture.

    python scripts/standin_study.py --data_path DATA_DIR
    python scripts/standin_study.py --data_path DATA_DIR --submissions ours,scripts/references/bc.py --steps 300 --out rows.jsonl
    python scripts/standin_study.py --data_path DATA_DIR --games 50                       # and play, as the benchmark does

`benchmark_standin.py` has the benchmark's backbone, loop and batches, but made-up games. Here the batches are made of recorded games as
Katakomba makes them: each row plays games one after another without padding, so a game may end inside a chunk; consecutive batches overlap
by one step; and the backbone sees an 18 x 18 crop round the cursor drawn as a picture. Every submission is trained for the same number of
steps, from the same seed and on the same batches; then its own train_step runs without gradient over games that none was trained on,
and it plays `--games` games in 14 slots whose states and previous actions are never cleared. A small LSTM and few steps, to run on a
CPU: this compares how blocks start to learn in the benchmark's setting, and not what they reach there.

Two differences to the benchmark, both for the sake of a short run: a row's first game begins at a frame drawn by chance instead of at its
start (else nobody would see anything but first levels, and hardly a game's end), and training is in float32.

One JSON row for each submission goes to --out as soon as it is made: algorithm, block_sha256, character, steps, transitions, batch_size,
seq_len, rnn_hidden_dim, rnn_layers, learning_rate, seed, game_ends, train_loss (nats per action, mean of the last tenth of the steps),
heldout (loss_per_action, accuracy, frequencies: the loss of always giving each action its share of the training batches, transitions,
games, game_ends), curve, wall_seconds, played (scores, depths, turns, lengths, ends, eval_max_steps, seconds; None without games),
commit, modified, hardware. Exit code 2 and one line on standard error for a mistake in what
was asked.

Axes: B batch (rows), T time (seq_len), N frames. Batches hold T + 1 steps.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import benchmark_standin as standin
import check_submission
import numpy as np
import torch
from study import commit_of, cpu_name, lists_of
from watch import RGB, monospaced_font

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import BLOCK, COLS, ROWS, UserError

CROP, PIXELS = 18, 6  # cells of the picture in each direction, pixels of a cell: 108 x 108 pixels
LEFT = CROP // 2      # the cursor's cell is the picture's row and column 9, from 0
OUTSIDE = 0           # the character beyond the screen's edge: drawn black, as every character below 32
SCORED = ("loss_per_action", "accuracy")  # what every block's info must hold
SLOTS = 14            # of the benchmark's evaluation
HELDOUT_SEED = 10_000  # other places of the held-out games than any small --seed draws

Arrays = Dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------------------
def draw_glyphs() -> np.ndarray:
    """Each character in each colour: [256, 32, 3, 6, 6] uint8.

    Colours 16 to 31 are 0 to 15 in inverse video, and drawn so: the cell in the colour, the character black. (Katakomba has a table of
    16 colours and reads past its row there, so that another character appears. With `colour & 15` the picture would hide what the
    terminal shows: the status line's highlights and the selected entries of menus.)
    """
    from PIL import Image, ImageDraw

    font = monospaced_font()
    width, height = math.ceil(font.getlength("M")), math.ceil(font.getbbox("|gjy_")[3]) + 1
    shades = np.zeros((256, PIXELS, PIXELS))
    for code in [*range(33, 127), *range(161, 256)]:
        image = Image.new("L", (width, height))
        ImageDraw.Draw(image).text((0, 0), chr(code), fill=255, font=font)
        shades[code] = np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.BOX)) / 255.0
    both = np.stack([shades, 1.0 - shades], axis=1)                                          # [256, 2, 6, 6]
    both[:32] = 0.0
    table = np.einsum("ivyx,kc->ivkcyx", both, np.array(RGB, dtype=float))                   # [256, 2, 16, 3, 6, 6]
    return np.round(table).astype(np.uint8).reshape(256, 32, 3, PIXELS, PIXELS)


def render(table: np.ndarray, chars: np.ndarray, colors: np.ndarray, cursor: np.ndarray) -> np.ndarray:
    """chars, colors [N, 24, 80], cursor [N, 2] (row, column) -> pictures [N, 3, 108, 108] uint8 of the cursor's surroundings."""
    frames = len(chars)
    cells = np.full((frames, ROWS + 2 * LEFT, COLS + 2 * LEFT), OUTSIDE * 32, dtype=np.int64)
    cells[:, LEFT:LEFT + ROWS, LEFT:LEFT + COLS] = chars.astype(np.int64) * 32 + (colors.astype(np.int64) & 31)
    rows = cursor[:, 0, None].astype(np.int64) + np.arange(CROP)                             # [N, 18], LEFT cells up in the padded screen
    columns = cursor[:, 1, None].astype(np.int64) + np.arange(CROP)
    crop = cells[np.arange(frames)[:, None, None], rows[:, :, None], columns[:, None, :]]    # [N, 18, 18]
    glyphs = table.reshape(-1, 3, PIXELS, PIXELS)[crop]                                      # [N, 18, 18, 3, 6, 6]
    return glyphs.transpose(0, 3, 1, 4, 2, 5).reshape(frames, *standin.SCREEN_SHAPE)


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark's batches, from recorded games
# ----------------------------------------------------------------------------------------------------------------------
class Row:
    """One row of the batches: plays the games that `next_game` names from end to end, the first one from `start` (share of it) on."""

    def __init__(self, games: pomdp.Games, next_game: Callable[[], int], start: float) -> None:
        self.games, self.next_game = games, next_game
        self.frames = 0
        self._begin()
        self.position = int(start * self.frames)

    def _begin(self) -> None:
        self.game, self.position, self.block_number = self.next_game(), 0, -1
        store, number = self.games.places[self.game]
        self.frames = int(store.frames[number])
        at, values = store.rewards(number)
        self.rewards = np.zeros(self.frames)
        self.rewards[at] = np.maximum(values, 0)  # Katakomba's data: a lost score (stolen gold) costs nothing

    def _piece(self, most: int) -> Arrays:
        """At most `most` frames of the current game, all from one block of the store."""
        if self.block_number != self.position // BLOCK:
            self.block_number = self.position // BLOCK
            store, number = self.games.places[self.game]
            self.block = store.block(number, self.block_number)
        inside = self.position % BLOCK
        count = min(most, len(self.block.actions) - inside)
        part, begin = slice(inside, inside + count), self.position
        self.position += count
        places = np.arange(begin, self.position)
        return {"tty_chars": self.block.chars[part], "tty_colors": self.block.colors[part], "tty_cursor": self.block.cursor[part],
                "actions": self.block.actions[part].astype(np.int64), "rewards": self.rewards[begin:self.position],
                "dones": places == self.frames - 1}  # fmt: skip

    def read(self, count: int) -> Arrays:
        """The next `count` frames, each array [count, ...]."""
        pieces: List[Arrays] = []
        while count:
            if self.position == self.frames:
                self._begin()
            pieces.append(self._piece(count))
            count -= len(pieces[-1]["actions"])
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def in_turns(chosen: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """All games in a random order, then all in another one, without end."""
    while True:
        yield from rng.permutation(chosen).tolist()


def game_batches(games: pomdp.Games, chosen: np.ndarray, config: standin.TrainConfig, seed: int, table: np.ndarray) -> Iterator[Arrays]:
    """Batches [B, T + 1, ...] of the chosen games, keys and dtypes as `benchmark_standin.made_up_batches`; the same for the same seed.

    Each begins with the step that ended the one before. Rewards are raw: the loop scales them.
    """
    rng = np.random.default_rng(seed)
    starts = rng.random(config.batch_size)
    turns = in_turns(chosen, rng)
    rows = [Row(games, lambda: next(turns), start) for start in starts]

    def steps(count: int) -> Arrays:
        parts = [row.read(count) for row in rows]
        data = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        flat = [data[name].reshape(-1, *data[name].shape[2:]) for name in ("tty_chars", "tty_colors", "tty_cursor")]
        data["screen_image"] = render(table, *flat).reshape(len(rows), count, *standin.SCREEN_SHAPE)
        return data

    batch = steps(config.seq_len + 1)
    while True:
        yield dict(batch)  # the loop puts its own rewards in
        fresh = steps(config.seq_len)
        batch = {name: np.concatenate([batch[name][:, -1:], fresh[name]], axis=1) for name in batch}


# ----------------------------------------------------------------------------------------------------------------------
# Training and held-out games
# ----------------------------------------------------------------------------------------------------------------------
class Counts:
    """What went through the batches that pass here: how often each action, and games' ends, over the steps that carry loss."""

    def __init__(self) -> None:
        self.actions = np.zeros(standin.NUM_ACTIONS)
        self.game_ends = 0

    def of(self, batches: Iterator[Arrays]) -> Iterator[Arrays]:
        for batch in batches:
            self.actions += np.bincount(batch["actions"][:, :-1].ravel(), minlength=standin.NUM_ACTIONS)
            self.game_ends += int(batch["dones"][:, :-1].sum())
            yield batch

    def frequencies_loss(self, other: "Counts") -> float:
        """Nats per action that `other`'s actions cost when each is given its share here (one more than counted, so that none is 0)."""
        log_shares = np.log((self.actions + 1) / (self.actions + 1).sum())
        return float(-(other.actions * log_shares).sum() / max(other.actions.sum(), 1))


@torch.no_grad()
def score_heldout(algo: Any, config: standin.TrainConfig, batches: Iterator[Arrays], steps: int) -> Dict[str, float]:
    """Mean loss_per_action (nats) and accuracy that the algorithm's own train_step reports without gradient, its states carried along.

    Nothing is cleared at a game's end but what the algorithm clears itself, and the first previous action is 0, as in training.
    """
    rewards = standin.RewardScaler(config.gamma, config.clip_range)
    previous = torch.zeros((config.batch_size, 1), dtype=torch.long)
    states: Dict[str, Any] = {}
    sums = dict.fromkeys(SCORED, 0.0)
    algo.model.eval()
    for _ in range(steps):
        data = next(batches)
        data["rewards"] = rewards(data["rewards"], data["dones"])
        batch = standin.to_float(data, "cpu")
        actions = batch["actions"].clone()
        _, states, info = algo.train_step(batch, previous, states)
        previous = actions[:, -2:-1]
        for name in sums:
            sums[name] += float(info[name]) / steps  # all batches have as many steps
    algo.model.train()
    return sums


class InBenchmark:
    """A model as `pomdp.play_games` wants it, given what the benchmark gives: a picture, no blstats, 0 as the first previous action."""

    def __init__(self, model: Any, table: np.ndarray) -> None:
        self.model, self.table = model, table
        self.training, self.eval, self.train = model.training, model.eval, model.train

    def vec_act(self, obs: Arrays, state: Any = None, device: str = "cpu") -> Any:
        terminal = {name: obs[name] for name in ("tty_chars", "tty_colors", "tty_cursor")}
        previous = np.where(obs["prev_actions"] == pomdp.NO_ACTION, 0, obs["prev_actions"])
        given = {**terminal, "screen_image": render(self.table, *terminal.values()), "prev_actions": previous}
        return self.model.vec_act(given, state, device=device)


def play(model: Any, options: argparse.Namespace, table: np.ndarray) -> Optional[Dict[str, Any]]:
    """Games in SLOTS slots, nothing cleared between them."""
    if not options.games:
        return None
    began = time.monotonic()
    pool = pomdp.GamePool(SLOTS)
    try:
        results = pomdp.play_games(pool, InBenchmark(model, table), options.character, options.games, pomdp.TrainConfig().eval_seed,
                                   options.eval_max_steps, torch.device("cpu"), clear_state=False)  # fmt: skip
    finally:
        pool.close()
    return {**lists_of(results), "eval_max_steps": options.eval_max_steps, "seconds": round(time.monotonic() - began, 1)}


class Submission(NamedTuple):
    name: str
    block: check_submission.Block
    module: Any


def read_submissions(wanted: str, folder: str) -> List[Submission]:
    """The blocks named by commas, each loaded among the names that the benchmark provides, from a file of its own in `folder`."""
    result: List[Submission] = []
    for number, path in enumerate(wanted.split(",")):
        name = "ours" if path == "ours" else Path(path).stem
        if name in [other.name for other in result]:
            raise UserError(f"--submissions names {name} twice")
        place = Path(folder) / str(number)
        place.mkdir()
        try:
            block = check_submission.read_block(check_submission.DEFAULT_FILE if path == "ours" else path)
            result.append(Submission(name, block, check_submission.load(block, str(place))))
        except check_submission.UserError as error:
            raise UserError(f"--submissions: {error}") from None
        except Exception as error:  # the file is the user's, and whatever is wrong with it shows here
            raise UserError(f"--submissions: {path} does not load: {type(error).__name__}: {error}") from error
    return result


class Data(NamedTuple):
    games: pomdp.Games
    trained: np.ndarray  # numbers of the games
    heldout: np.ndarray
    table: np.ndarray


def open_games(options: argparse.Namespace) -> Data:
    store = pomdp.open_or_build_store(options.data_path, options.store_path, options.character)
    if store.meta["unknown_keys"]:
        raise UserError(f"{store.meta['unknown_keys']} keypresses are no action, and the benchmark's batches cannot say so: "
                        "take other games")  # fmt: skip
    games = pomdp.Games([store])
    if len(store) < 2:
        raise UserError(f"{options.character}: one game is not enough, as one must be held out")
    heldout = games.heldout(options.heldout_share)
    return Data(games, np.flatnonzero(~heldout), np.flatnonzero(heldout), draw_glyphs())


def measure(submission: Submission, options: argparse.Namespace, data: Data, code: Dict[str, Any]) -> Dict[str, Any]:
    """Trains the block and scores it: its row. `code` is the provenance as it was when the blocks were read."""
    began = time.monotonic()
    config = standin.TrainConfig(character=options.character, rnn_hidden_dim=options.rnn_hidden_dim, batch_size=options.batch_size,
                                 seq_len=options.seq_len, learning_rate=options.learning_rate, train_seed=options.seed)  # fmt: skip
    torch.manual_seed(options.seed)
    backbone = standin.ModelBackbone(standin.NUM_ACTIONS, config.rnn_hidden_dim, config.rnn_layers, config.rnn_dropout,
                                     config.use_prev_action)  # fmt: skip
    algo = submission.module.OfflineAlgorithm(backbone=backbone, config=config, device="cpu")
    curve: List[float] = []

    def on_step(step: int, batch: Any, before: Any, loss: torch.Tensor, states: Any, info: Dict[str, Any]) -> None:
        lacking = [name for name in SCORED if name not in info]
        if lacking:
            raise UserError(f"{submission.name}: the info of its train_step lacks {' and '.join(lacking)}")
        curve.append(float(info["loss_per_action"]))
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"{submission.name}: the loss is {loss.item()} at step {step}")
        if step % 50 == 0:
            print(f"{submission.name}: step {step}, {curve[-1]:.3f} nats per action, {time.monotonic() - began:.0f} s", flush=True)

    seen, scored = Counts(), Counts()
    batches = seen.of(game_batches(data.games, data.trained, config, options.seed, data.table))
    standin.run_training(algo, config, batches, options.steps, on_step=on_step)
    batches = scored.of(game_batches(data.games, data.heldout, config, options.seed + HELDOUT_SEED, data.table))
    heldout: Dict[str, Any] = score_heldout(algo, config, batches, options.heldout_steps)
    per_step = options.batch_size * options.seq_len
    heldout.update(frequencies=seen.frequencies_loss(scored), transitions=options.heldout_steps * per_step, games=len(data.heldout),
                   game_ends=scored.game_ends)  # fmt: skip
    last = curve[-max(1, options.steps // 10):]
    tenths = np.array_split(np.array(curve), min(10, len(curve)))
    return {"algorithm": submission.name, "block_sha256": hashlib.sha256(submission.block.source.encode()).hexdigest(),
            "character": options.character, "steps": options.steps, "transitions": options.steps * per_step,
            "batch_size": options.batch_size, "seq_len": options.seq_len, "rnn_hidden_dim": config.rnn_hidden_dim,
            "rnn_layers": config.rnn_layers, "learning_rate": options.learning_rate, "seed": options.seed, "game_ends": seen.game_ends,
            "train_loss": sum(last) / len(last), "heldout": heldout, "curve": [round(float(part.mean()), 4) for part in tenths],
            "wall_seconds": round(time.monotonic() - began, 1), "played": play(algo.model, options, data.table), **code}  # fmt: skip


def provenance() -> Dict[str, Any]:
    """The code and the machine. `modified`: the submission or the scripts differ from the commit; None outside of git."""
    commit, modified = commit_of(["custom_nethack_pomdp.py", "scripts"])
    return {"commit": commit, "modified": modified,
            "hardware": {"cpu": cpu_name(), "cores": pomdp.usable_cores(), "threads": torch.get_num_threads()}}  # fmt: skip


def append(path: str, row: Dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------
def show(rows: List[Dict[str, Any]]) -> None:
    print(f"{'algorithm':<12} {'transitions':>11} {'train loss':>10} {'held-out loss':>13} {'accuracy':>8} {'seconds':>8} "
          f"{'mean score':>10}")
    for row in rows:
        mean = f"{np.mean(row['played']['scores']):.1f}" if row["played"] else "-"
        print(f"{row['algorithm']:<12} {row['transitions']:>11,} {row['train_loss']:>10.3f} {row['heldout']['loss_per_action']:>13.3f} "
              f"{row['heldout']['accuracy']:>8.1%} {row['wall_seconds']:>8.0f} {mean:>10}")
    first = rows[0]
    print(f"{'frequencies':<12} {first['transitions']:>11,} {'':>10} {first['heldout']['frequencies']:>13.3f}")
    print(f"nats per action; {first['game_ends']} games ended inside the training batches, {first['heldout']['game_ends']} inside the "
          f"{first['heldout']['transitions']:,} held-out steps of {first['heldout']['games']} games")


def check_options(options: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "seq_len", "rnn_hidden_dim", "heldout_steps", "eval_max_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.games < 0:
        raise UserError(f"--games must be at least 0, not {options.games}")
    if not 0 < options.heldout_share < 1:
        raise UserError(f"--heldout_share must be between 0 and 1, not {options.heldout_share}")
    if not 0 < options.learning_rate < math.inf:
        raise UserError(f"--learning_rate must be above 0, not {options.learning_rate}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be at least 0 and below 2^32, not {options.seed}")
    if options.out:
        out = Path(options.out)
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise UserError(f"--out: cannot write {out}: give a file in a folder that exists")


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="folder with recorded games, or a chunk store")
    parser.add_argument("--character", default="mon-hum-neu")
    parser.add_argument("--submissions", default="ours,scripts/references/bc.py,scripts/references/iql.py",
                        help="files with a block, by commas; ours is custom_nethack_pomdp.py")
    parser.add_argument("--steps", type=int, default=100, help="gradient steps of each")
    parser.add_argument("--heldout_steps", type=int, default=32, help="batches of held-out games")
    parser.add_argument("--heldout_share", type=float, default=pomdp.TrainConfig().heldout_share, help="share of the games held out")
    parser.add_argument("--games", type=int, default=0, help="games played by each after training")
    parser.add_argument("--eval_max_steps", type=int, default=1000, help="a game is cut after so many actions")
    parser.add_argument("--batch_size", type=int, default=32, help="the benchmark has 128")
    parser.add_argument("--seq_len", type=int, default=16)
    parser.add_argument("--rnn_hidden_dim", type=int, default=512, help="the benchmark has 2048")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the batches")
    parser.add_argument("--out", metavar="FILE.jsonl", help="append the rows to this file")
    parser.add_argument("--store_path", default="runs/stores", help="where the chunk store is made or found")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:  # stays as long as the blocks are in use
        try:
            check_options(options)
            submissions, code = read_submissions(options.submissions, folder), provenance()
            data = open_games(options)
            for submission in submissions:
                rows.append(measure(submission, options, data, code))
                if options.out:
                    append(options.out, rows[-1])
        except UserError as error:
            print(f"standin_study.py: {error}", file=sys.stderr)
            return 2
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
