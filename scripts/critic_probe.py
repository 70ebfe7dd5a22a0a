# SPDX-License-Identifier: MIT
"""Is there anything to weight by? How much more than the state the action tells of what comes.

    python scripts/critic_probe.py --checkpoint RUN/best.pt --data_path DATA_DIR

Advantage weighting prefers actions after which more came than the state let expect. Where the
action tells no more than the state, it prefers chance. So: the agent's LSTM reads recorded games
once; on its output h, which stays as it is, small networks are fitted to what came after each
frame, and asked about games that they were not fitted to (five folds over games):

    V           from h alone
    Q           from h and the action that was taken
    shuffled    from h and the action of another frame: what a further input does by itself
    numbers     from turn, share of hit points, depth and number of the frame, without h

What came: the score gained within 20, 200 and 1,000 steps, the discounted return, and the game's
end, which is death but for quit games, within 200 and 1,000 steps. Rewards are scaled and clipped
as in training. The table has shares of variance explained, with 95 % bootstrap intervals over
games. The sentence below it says where Q tells more than V by an interval that leaves out 0, and
more than with shuffled actions by another.

Read are the first `--game_frames` frames of as many games, drawn by `--seed`, as make `--frames`.
What came after a cut, as in a quit game, is not known: the last 1,000 frames before it are left
out, and counted. `--json FILE` keeps the rows of the table.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import numpy as np
import torch
import torch.nn.functional as F
from exact_returns import exact_returns
from nle import nethack
from shared import Parser, check_least, markdown_table
from torch import Tensor, nn

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import UserError

GAINS = (20, 200, 1_000)  # steps
ENDS = (200, 1_000)
LONGEST = 1_000
CHUNK = 100  # frames that the LSTM reads at once
FOLDS = 5
HIDDEN = 64  # units of a fitted network
EPOCHS = 1  # with more of them V learns the games by heart
BATCH = 512
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
RESAMPLES = 2_000  # of the games, for an interval

Row = Dict[str, Any]


class Data(NamedTuple):
    """Frames of several games."""

    h: Tensor  # [n, H] float32, normalised as the head sees it
    numbers: Tensor  # [n, 6] float32
    actions: Tensor  # [n] int64
    games: np.ndarray  # [n] int: whose frame it is
    targets: Tensor  # [n, K] float32
    names: List[str]  # [K] of the targets


# --- what the agent's LSTM makes of recorded games, and what came
def choose_games(games: pomdp.Games, frames: int, seed: int) -> List[int]:
    """Numbers of games, in random order, that together have so many frames."""
    chosen = []
    total = 0
    for game in np.random.default_rng(seed).permutation(len(games.frames)).tolist():
        if total >= frames:
            break
        chosen.append(game)
        total += int(games.frames[game])
    return chosen


def status_numbers(blstats: Tensor) -> Tensor:
    """A game's first frames [n, 27] int -> [n, 6] float32; the last one: a menu hides them."""
    stats = blstats.float().T
    hp_max = stats[nethack.NLE_BL_HPMAX]
    turn = stats[nethack.NLE_BL_TIME]
    numbers = [
        stats[nethack.NLE_BL_HP] / hp_max.clamp(min=1),
        stats[nethack.NLE_BL_DEPTH],
        turn,
        torch.log1p(turn),
        torch.arange(len(blstats)).float(),
        (hp_max == 0).float(),
    ]
    return torch.stack(numbers, dim=1)


def what_came(loader: pomdp.ChunkLoader, game: int, frames: int) -> Dict[str, np.ndarray]:
    """{name: [frames]} after each of a game's first frames; NaN where a cut hides it."""
    store, number = loader.games.in_store[game]
    rewards = loader.rewards_of(store, number).astype(float)
    length = len(rewards)
    total = np.append(0.0, np.cumsum(rewards))  # up to each frame
    now = np.arange(frames)
    found = {}
    for steps in GAINS:
        then = np.minimum(now + steps, length)
        found[f"score gained within {steps:,} steps"] = total[then] - total[now]
    found["discounted return"] = exact_returns(rewards, loader.config.gamma)[:frames]
    for steps in ENDS:
        found[f"death within {steps:,} steps"] = (now + steps >= length).astype(float)
    if store.truncated[number]:
        for values in found.values():
            values[now + LONGEST >= length] = np.nan
    return found


@torch.no_grad()
def run_lstm(
    backbone: Any, loader: pomdp.ChunkLoader, device: torch.device, precision: Any
) -> Dict[str, Tensor]:
    """The loader's one game from its first frame on -> h [n, H], blstats [n, 27], actions and
    counts [n], padding included."""
    parts: Dict[str, List[Tensor]] = {"h": [], "blstats": [], "actions": [], "counts": []}
    state = None
    for step in range(loader.sampler.steps):
        batch, prev_actions = pomdp.to_device(loader.batch_at(step), device)
        counts = pomdp.known_actions(batch)
        actions = batch["actions"][:, :-1]
        previous = actions.masked_fill(~counts, backbone.no_action)
        inputs = {name: batch[name][:, :-1].contiguous() for name in backbone.observations}
        inputs["prev_actions"] = torch.cat([prev_actions, previous[:, :-1]], dim=1)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            core_output, state = backbone(inputs, state)
        parts["h"].append(F.layer_norm(core_output.float(), core_output.shape[-1:])[0])
        parts["blstats"].append(batch["blstats"][0, :-1])
        parts["actions"].append(actions[0])
        parts["counts"].append(counts[0])
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


def collect(
    algorithm: Any, config: pomdp.TrainConfig, games: pomdp.Games, chosen: Sequence[int]
) -> Tuple[Data, int]:
    """The chosen games' frames, and how many more a cut leaves unknown."""
    device = pomdp.choose_device(config)
    precision = pomdp.choose_precision(config, device)
    backbone = algorithm.model.eval().backbone
    scale = games.reward_scale(np.array(chosen), config.gamma)
    parts: List[List[Tensor]] = []
    names: List[str] = []
    owners: List[np.ndarray] = []
    unknown = 0
    for game in pomdp.progress_bar(iterable=chosen, desc="LSTM", unit="game"):
        loader = pomdp.ChunkLoader(games, np.array([game]), config, 1, scale)
        frames = int(games.frames[game])
        read = run_lstm(backbone, loader, device, precision)
        came = what_came(loader, game, frames)
        names = list(came)
        targets = torch.from_numpy(np.stack(list(came.values()), axis=1)).float()
        is_known = ~targets.isnan().any(dim=1)
        kept = read["counts"][:frames] & is_known
        numbers = status_numbers(read["blstats"])
        each = [read["h"][:frames], numbers[:frames], read["actions"][:frames], targets]
        parts.append([values[kept] for values in each])
        owners.append(np.full(int(kept.sum()), game))
        unknown += int((~is_known).sum())
    h, numbers, actions, targets = [torch.cat(values) for values in zip(*parts)]
    return Data(h, numbers, actions, np.concatenate(owners), targets, names), unknown


# --- the fitted networks
class Network(nn.Module):
    """One hidden layer. An action adds to it what it has learned for it, 0 at first: then Q is V,
    and differs from it by what the actions teach alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, HIDDEN)
        self.action = nn.Embedding(pomdp.NUM_ACTIONS, HIDDEN)
        nn.init.zeros_(self.action.weight)
        self.output = nn.Linear(HIDDEN, outputs)

    def forward(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """[n, d] float, [n] int -> [n, K]."""
        return self.output(torch.relu(self.hidden(inputs) + self.action(actions)))


def standardised(values: Tensor, of: Tensor) -> Tensor:
    """By the means and deviations of the rows of `of`."""
    return (values - of.mean(0)) / of.std(0).clamp(min=1e-6)


def fit(inputs: Tensor, actions: Tensor, targets: Tensor, seed: int) -> Network:
    """Least squares, by Adam with a learning rate that falls to 0."""
    torch.manual_seed(seed)
    network = Network(inputs.shape[1], targets.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    updates = EPOCHS * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            errors = network(inputs[rows], actions[rows]) - targets[rows]
            loss = (errors**2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


@torch.no_grad()
def squared_errors(network: Network, inputs: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
    """[n, K]."""
    pieces = []
    for rows in torch.arange(len(inputs)).split(8_192):
        pieces.append((network(inputs[rows], actions[rows]) - targets[rows]) ** 2)
    return torch.cat(pieces)


def cross_validate(data: Data, inputs: Tensor, actions: Tensor, seed: int) -> np.ndarray:
    """Squared errors [n, K] on games that were not fitted to, in units of the targets' variance in
    those that were."""
    numbers = np.unique(data.games)
    fold_of_game = np.random.default_rng(seed).permutation(len(numbers)) % FOLDS
    fold = torch.from_numpy(fold_of_game[np.searchsorted(numbers, data.games)])
    errors = torch.zeros_like(data.targets)
    for number in range(FOLDS):
        held = fold == number
        x = standardised(inputs, inputs[~held])
        y = standardised(data.targets, data.targets[~held])
        network = fit(x[~held], actions[~held], y[~held], seed)
        deviation = data.targets[~held].std(0).clamp(min=1e-6)
        errors[held] = squared_errors(network, x[held], actions[held], y[held]) * deviation**2
    return errors.numpy()


# --- shares of variance explained, and their intervals
def by_game(values: np.ndarray, games: np.ndarray) -> np.ndarray:
    """[n, K] -> sums [G, K]."""
    _, place = np.unique(games, return_inverse=True)
    sums = np.zeros((place.max() + 1, values.shape[1]))
    np.add.at(sums, place, values)
    return sums


class Explained:
    """Shares of variance explained, of the games as they are and of resamples of them: [1 +
    RESAMPLES, K], the first row of all games once."""

    def __init__(self, data: Data, seed: int) -> None:
        targets = data.targets.numpy().astype(float)
        self.games = data.games
        num_games = len(np.unique(data.games))
        draws = np.random.default_rng(seed).multinomial(
            num_games, np.full(num_games, 1.0 / num_games), RESAMPLES
        )
        self.counts = np.concatenate([np.ones((1, num_games)), draws])
        frames = self.total(np.ones_like(targets))
        mean = self.total(targets) / frames
        self.variance = self.total(targets**2) / frames - mean**2
        self.frames = frames

    def total(self, values: np.ndarray) -> np.ndarray:
        return self.counts @ by_game(values, self.games)

    def share(self, errors: np.ndarray) -> np.ndarray:
        unexplained = self.total(errors) / self.frames
        # NaN of a resample in which nothing differs, as where nobody dies
        return 1.0 - unexplained / np.where(self.variance > 1e-12, self.variance, np.nan)


def estimate(shares: np.ndarray) -> List[float]:
    """[1 + RESAMPLES] -> value, and the ends of its 95 % interval."""
    low, high = np.nanpercentile(shares[1:], [2.5, 97.5])
    return [round(float(value), 5) for value in (shares[0], low, high)]


def probe(data: Data, seed: int = 0) -> List[Row]:
    """A row for each target that is not the same at all frames."""
    if len(np.unique(data.games)) < FOLDS:
        raise UserError(f"the games are too few: {FOLDS} folds want {FOLDS} games at least")
    generator = torch.Generator().manual_seed(seed)
    shuffled = data.actions[torch.randperm(len(data.actions), generator=generator)]
    none = torch.zeros_like(data.actions)
    explained = Explained(data, seed)
    shares = {
        "v": explained.share(cross_validate(data, data.h, none, seed)),
        "q": explained.share(cross_validate(data, data.h, data.actions, seed)),
        "shuffled": explained.share(cross_validate(data, data.h, shuffled, seed)),
        "numbers": explained.share(cross_validate(data, data.numbers, none, seed)),
    }
    rows = []
    for k, name in enumerate(data.names):
        v = shares["v"][:, k]
        if np.isnan(v[0]):
            pomdp.warn(f"{name}: the same at all frames, nothing is to be explained")
            continue
        q = shares["q"][:, k]
        other = shares["shuffled"][:, k]
        row: Row = {"target": name}
        row["v"] = estimate(v)
        row["q_minus_v"] = estimate(q - v)
        row["shuffled_minus_v"] = estimate(other - v)
        row["q_minus_shuffled"] = estimate(q - other)
        row["numbers"] = estimate(shares["numbers"][:, k])
        rows.append(row)
    return rows


# --- what is printed
COLUMNS = {
    "v": "V",
    "q_minus_v": "Q - V",
    "shuffled_minus_v": "shuffled - V",
    "q_minus_shuffled": "Q - shuffled",
    "numbers": "numbers",
}


def make_table(rows: Sequence[Row]) -> str:
    lines = [["what comes", *COLUMNS.values()]]
    for row in rows:
        cells = [row["target"]]
        for name in COLUMNS:
            value, low, high = row[name]
            cells.append(f"{value:.4f} [{low:.4f}, {high:.4f}]")
        lines.append(cells)
    return markdown_table(lines)


def tells_more(row: Row) -> bool:
    """Whether the action tells more than the state, and more than shuffled actions do."""
    above_v = row["q_minus_v"][1] > 0
    above_shuffled = row["q_minus_shuffled"][1] > 0
    return above_v and above_shuffled


def sentence(rows: Sequence[Row]) -> str:
    found = [row["target"] for row in rows if tells_more(row)]
    what = "Q - V leaves out 0 and exceeds that of shuffled actions"
    if found:
        return f"{what} for {', '.join(found)}: there is something to weight by."
    return f"Nowhere {what}: the action tells no more than the state, nothing is to weight by."


def run(args: Namespace) -> None:
    pomdp.keep_freed_memory()
    check_least(args, frames=1, game_frames=1)
    settings = {"seq_len": CHUNK, "game_frames": args.game_frames, "evaluate": None}
    settings.update(data_path=args.data_path, store_path=args.store_path)
    if args.character:
        settings["character"] = args.character
    algorithm, config, _ = pomdp.load_agent(pomdp.expand(args.checkpoint), **settings)
    games = pomdp.Games(pomdp.open_stores(config), config.game_frames)
    chosen = choose_games(games, args.frames, args.seed)
    data, unknown = collect(algorithm, config, games, chosen)
    rows = probe(data, args.seed)
    left_out = f"{unknown:,} left out before a cut"
    print(f"{len(data.games):,} frames of {len(chosen)} games; {left_out}")
    print(f"{make_table(rows)}\n\n{sentence(rows)}")
    if args.json:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(args.json).write_text(text, encoding="utf-8")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="best.pt, last.pt or <step>.pt of a run")
    add("--data_path", help="recorded games, as for custom_nethack_pomdp.py")
    add("--store_path", default="runs/stores", help="where stores are built (%(default)s)")
    add("--character", help="one or several, by commas (default: the checkpoint's)")
    add("--frames", type=int, default=150_000, help="to read in all (%(default)s)")
    add("--game_frames", type=int, default=3_000, help="of each game (%(default)s)")
    add("--seed", type=int, default=0, help="of games, folds and networks (%(default)s)")
    add("--json", metavar="FILE", help="keep the rows as JSON, a line each")
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
