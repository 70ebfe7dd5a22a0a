# SPDX-License-Identifier: MIT
"""Makes games to train on of games without keys: an inverse model says which keys were pressed.

    python custom_nethack_pomdp.py --submission scripts/studies/variants/inverse_dynamics.py \\
        --eval_episodes 0 --data_path NLD_AA_DIR                    trains the inverse model
    python scripts/label_games.py --checkpoint INVERSE --data_path NAO_DIR --out DIR
    python custom_nethack_pomdp.py --data_path DIR,NLD_AA_DIR --character val-hum-neu \\
        --algorithm '{beta: 1.0e+6, value_coef: 0}'                 learns, without the value

--data_path holds human games in alt.org's layout (lib/human_games.py). DIR gets an HDF5 file a
character as Katakomba has them, with -1 for a key that is not known. A character's file that this
command made before, of the same games in the same way, is left as it is; a killed one leaves none.

Frames of human games are writes to a terminal. Within 20 ms of the one before a write belongs to
the same key (a person needs 30 ms and more): the screens between are left out, so the key stands at
the last screen before the first of its writes. A screen gets no key where the next one differs
neither in turn nor in map nor in message, where the model gives its best key less than
--min_probability, or which is the last. Rewards are the changes of NetHack's score as far as the
screen shows them: gold gained + 4 x experience points + 50 for each new deepest level. What comes
after a death is left out, and a game ends in a cut: its last screen serves as a successor alone.

--data_path may also hold games with keys, as custom_nethack_pomdp.py takes them. They are hidden
from the model, and how many come back right is told, by kind: moves (of which "moved" are those
after which the cursor stands elsewhere on the map), answers to a question, a menu or --More--, and
commands (all else). --true_keys writes the games' own keys instead, to compare with.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import h5py
import human_games
import numpy as np
import torch
from shared import ROOT, Parser
from torch import Tensor

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import ROWS, GameError, UserError, nethack

ONE_KEY = 20_000  # microseconds, within which the next write is to the same key
MOST = 100_000  # screens of a human game; what comes later is left out
CHUNK = 256  # screens that the model reads at once
NO_KEY = -1
VERSION = 2  # of what this makes of a game: with another, files are made anew

# The first screens after a game, as NetHack asks and tells; NLE never shows them to an agent.
OVER = re.compile(pomdp.DEATH_MESSAGE.pattern + rb".*--More--|Do you want your possessions iden")
LAST_SCREENS = 64  # among which they are looked for
QUESTION = re.compile(rb"[?\[]|--More--")  # on the top line
MOVES = pomdp.KEY_TO_ACTION[[int(key) for key in nethack.CompassCardinalDirection]]
MOVES = np.append(
    MOVES, pomdp.KEY_TO_ACTION[[int(key) for key in nethack.CompassIntercardinalDirection]]
)


class Screens(NamedTuple):
    """Of one game, one for each key."""

    chars: np.ndarray  # [n, 24, 80] uint8
    colors: np.ndarray  # [n, 24, 80] int8
    cursor: np.ndarray  # [n, 2] int16
    actions: np.ndarray  # [n] int16, NO_KEY where it is not known: everywhere in human games


class Labels(NamedTuple):
    best: np.ndarray  # [n] int16: the likeliest action; NO_KEY at the last screen
    probability: np.ndarray  # [n] float32, of it
    changed: np.ndarray  # [n] bool: turn, map or message differ at the next screen


# --- games: by character, {name of the game: what to read it with}
class HumanGames:
    """A character's, read from recordings of writes."""

    def __init__(self, games: List[human_games.Game]) -> None:
        self.games = {f"{game.player} {game.start}": game for game in games}
        stats = [(path, path.stat()) for game in games for path in game.files]
        self.identity = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def read(self, name: str, counts: Counter) -> Screens:
        pieces = []
        kept = 0
        last = None  # the last frame of the part before: does it stand?
        for part in read_parts(self.games[name]):
            arrays = [part.chars, part.colors, part.cursor, part.times]
            if last is not None:
                arrays = [np.concatenate(pair) for pair in zip(last, arrays)]
            times = arrays[3]
            stands = np.append(np.abs(np.diff(times)) >= ONE_KEY, False)
            counts["writes"] += len(part.times)
            pieces.append([array[stands] for array in arrays])
            last = [array[-1:].copy() for array in arrays]
            kept += int(stands.sum())
            if kept >= MOST:
                counts["games cut for their length"] += 1
                break
        if last is not None:
            pieces.append(last)
        if not pieces:
            raise GameError("it holds no frame")
        chars, colors, cursor, _ = [np.concatenate(arrays) for arrays in zip(*pieces)]
        human_games.check_map(human_games.count_unreadable(chars), len(chars))
        end = find_end(chars)
        actions = np.full(end, NO_KEY, np.int16)
        counts["screens after the game was over"] += len(chars) - end
        return Screens(chars[:end], colors[:end], cursor[:end], actions)


def read_parts(game: human_games.Game) -> Iterator[human_games.Part]:
    """All of a game's frames, with colours by number too and the last write of each file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.ttyrec.bz2"
        for path in game.files:
            human_games.plain_copy(path, 1, copy)
            yield from human_games.read_parts(copy)


class RecordedGames:
    """A character's games with keys, from their chunk store: the player's frames alone."""

    def __init__(self, store: pomdp.GameStore) -> None:
        self.store = store
        self.games = {name.replace("/", " "): number for number, name in enumerate(store.names)}
        self.identity = store.index["identities"].tolist()

    def read(self, name: str, _counts: Counter) -> Screens:
        number = self.games[name]
        count = -(-int(self.store.frames[number]) // pomdp.BLOCK)
        blocks = [self.store.block(number, k) for k in range(count)]
        columns = ("tty_chars", "tty_colors", "tty_cursor", "actions")
        arrays = [np.concatenate([block[column] for block in blocks]) for column in columns]
        chars, colors, cursor, keys = arrays
        actions = keys.astype(np.int16)
        actions[actions == pomdp.UNKNOWN_KEY] = NO_KEY
        actions[-1] = NO_KEY
        return Screens(chars, colors, cursor, actions)


def find_end(chars: np.ndarray) -> int:
    """The number of screens up to the first one after the game was over."""
    first = max(0, len(chars) - LAST_SCREENS)
    for number in range(first, len(chars)):
        if OVER.search(chars[number].tobytes()):
            return number + 1
    return len(chars)


def find_games(args: Namespace, counts: Counter) -> Dict[str, Any]:
    """{character: its games}. Raises UserError where there are none."""
    root = pomdp.expand(args.data_path)
    wanted = []
    if args.character:
        wanted = pomdp.TrainConfig(args.character).characters
    if not pomdp.holds_human_games(root):
        sources = {}
        for character in wanted or pomdp.TrainConfig().characters:
            store = pomdp.open_or_build_store(args.data_path, args.store_path, character)
            sources[character] = RecordedGames(store)
        return sources
    if args.true_keys:
        raise UserError("--true_keys: human games have none")
    found, left_out = human_games.find_games(root)
    for why, names in left_out.items():
        counts[why] += len(names)
    by_character = defaultdict(list)
    for game in found:
        if game.character in (wanted or pomdp.AUTOASCEND_MEAN_SCORE):
            by_character[game.character].append(game)
        else:
            counts["games of other characters"] += 1
    if not by_character:
        raise UserError(f"no human games of {args.character or 'any known character'} in {root}")
    return {character: HumanGames(games) for character, games in sorted(by_character.items())}


# --- labels
def load_model(checkpoint: str) -> Tuple[Any, torch.device, Optional[torch.dtype]]:
    """The inverse model, where it runs, and in which precision. Raises UserError for another."""
    torch.set_num_threads(1)  # sums depend on the threads
    content = pomdp.read_checkpoint(Path(checkpoint))
    submission = json.loads(content["config"])["submission"]
    given = {}
    if submission and not Path(submission).is_file():  # by its path in the repository
        given["submission"] = str(ROOT / submission)
    algorithm, config, _ = pomdp.load_agent(checkpoint, device="auto", **given)
    if not getattr(algorithm.model, "is_inverse", False):
        raise UserError(
            f"{checkpoint} is no inverse model; train one with --submission "
            "scripts/studies/variants/inverse_dynamics.py"
        )
    device = pomdp.choose_device(config)
    return algorithm.model.eval(), device, pomdp.choose_precision(config, device)


@torch.no_grad()
def label(
    model: Any, screens: Screens, blstats: np.ndarray, device: torch.device, precision: Any
) -> Labels:
    """What the model says of a game, read from its first screen to its last."""
    n = len(screens.chars)
    best = np.full(n, NO_KEY, np.int16)
    probability = np.zeros(n, np.float32)
    changed = np.zeros(n, bool)
    state = None
    before: Optional[Tuple[Tensor, Tensor]] = None  # output and screen of the frame before
    turn = blstats[:, nethack.NLE_BL_TIME]
    for begin in range(0, n, CHUNK):
        here = slice(begin, begin + CHUNK)
        arrays = (screens.chars, screens.colors, screens.cursor, blstats)
        inputs = {}
        for name, array in zip(pomdp.OBSERVATIONS, arrays):
            inputs[name] = torch.from_numpy(array[here])[None].to(device)
        chars = inputs["tty_chars"]
        inputs["prev_actions"] = torch.full(chars.shape[:2], pomdp.NO_ACTION, device=device)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            output, state = model.backbone(inputs, state)
        first = begin
        if before is not None:
            output = torch.cat([before[0], output], dim=1)
            chars = torch.cat([before[1], chars], dim=1)
            first -= 1
        before = (output[:, -1:], chars[:, -1:])
        logits, _ = model.head(output, chars)
        shares, actions = logits[0, :-1].softmax(-1).max(-1)
        labelled = slice(first, first + len(actions))
        best[labelled] = actions.cpu().numpy()
        probability[labelled] = shares.cpu().numpy()
    one, other = screens.chars[:-1, : ROWS - 2], screens.chars[1:, : ROWS - 2]
    changed[:-1] = (one != other).any((1, 2)) | (turn[1:] != turn[:-1])
    return Labels(best, probability, changed)


def shown_rewards(blstats: np.ndarray) -> np.ndarray:
    """[n, 27] -> [n] int32: by how much NetHack's score, as far as the screen shows it, changes to
    the next screen. Where a menu hides the status lines nothing changes."""
    shown = blstats[:, nethack.NLE_BL_HPMAX] > 0
    if not shown.any():
        return np.zeros(len(blstats), np.int32)
    last_shown = np.maximum.accumulate(np.where(shown, np.arange(len(shown)), np.argmax(shown)))
    stats = blstats[last_shown]
    gold = stats[:, nethack.NLE_BL_GOLD].astype(np.int64)
    experience = np.maximum.accumulate(stats[:, nethack.NLE_BL_EXP].astype(np.int64))
    depth = np.maximum.accumulate(stats[:, nethack.NLE_BL_DEPTH])
    scores = np.maximum(gold - gold[0], 0) + 4 * experience + 50 * depth
    return np.append(np.diff(scores), 0).astype(np.int32)


# --- files
def write_game(group: Any, screens: Screens, blstats: np.ndarray, actions: np.ndarray) -> None:
    """As Katakomba's; the last `dones` is false, since no game is known to end where its record
    does."""
    n = len(screens.chars)
    for name, array in zip(pomdp.OBSERVATIONS, screens[:3]):
        chunks = (min(n, pomdp.BLOCK), *array.shape[1:])
        group.create_dataset(name, data=array, chunks=chunks, compression=1)
    group["actions"] = actions
    group["rewards"] = shown_rewards(blstats)
    group["dones"] = np.zeros(n, bool)


def kinds_of(screens: Screens) -> Dict[str, np.ndarray]:
    """{kind: [n] bool} of the games' own keys."""
    known = screens.actions != NO_KEY
    asked = np.zeros(len(known), bool)
    for t, screen in enumerate(screens.chars):
        asked[t] = bool(
            QUESTION.search(screen[0].tobytes()) or pomdp.MENU_PAGE.search(screen.tobytes())
        )
    moves = known & ~asked & np.isin(screens.actions, MOVES)
    row = screens.cursor[:, 0]
    on_map = (row > 0) & (row < ROWS - 2)
    moved = np.zeros(len(known), bool)
    steps = (screens.cursor[1:] != screens.cursor[:-1]).any(1)
    moved[:-1] = on_map[1:] & on_map[:-1] & steps
    return {
        "moves": moves,
        "  moved": moves & moved,
        "answers": known & asked,
        "commands": known & ~asked & ~moves,
        "all": known,
    }


def compare(counts: Counter, screens: Screens, labels: Labels, actions: np.ndarray) -> None:
    """Counts what got no key, and of keys that are known which came back."""
    unchanged = int((~labels.changed[:-1]).sum())
    counts["screens without a key, since nothing changed to the next one"] += unchanged
    if (screens.actions == NO_KEY).all():
        return
    for kind, chosen in kinds_of(screens).items():
        right = chosen & (labels.best == screens.actions)
        given = chosen & (actions != NO_KEY)
        counts[f"{kind}: keys"] += int(chosen.sum())
        counts[f"{kind}: right"] += int(right.sum())
        counts[f"{kind}: given"] += int(given.sum())
        counts[f"{kind}: given and right"] += int((right & given).sum())


def was_made_from(path: Path) -> str:
    """What `made_from` says in the file; empty where there is none that can be read."""
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("made_from", ""))
    except OSError:
        return ""


def make_file(
    path: Path, games: Any, made_from: str, args: Namespace, model: Any, bar: Any
) -> Counter:
    """Labels a character's games into the file, which is there once it is whole."""
    counts: Counter = Counter()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs["made_from"] = made_from
            for name in games.games:
                try:
                    screens = games.read(name, counts)
                    if len(screens.chars) < 2:
                        raise GameError("it holds no two frames")
                except pomdp.UNREADABLE as error:
                    pomdp.warn(f"left out {name}: {error}")
                    counts["games that cannot be read"] += 1
                    bar.update()
                    continue
                blstats = pomdp.read_blstats(screens.chars)
                actions = screens.actions
                if model is not None:
                    labels = label(model[0], screens, blstats, *model[1:])
                    sure = labels.changed & (labels.probability >= args.min_probability)
                    actions = np.where(sure, labels.best, NO_KEY).astype(np.int16)
                    compare(counts, screens, labels, actions)
                counts["games"] += 1
                counts["screens"] += len(actions)
                counts["keys"] += int((actions != NO_KEY).sum())
                write_game(file.create_group(name), screens, blstats, actions)
                bar.update()
        if counts["games"]:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


# --- the command
def summary(counts: Counter) -> str:
    share = counts["keys"] / max(counts["screens"], 1)
    lines = [f"{counts['games']:,} games, {counts['screens']:,} screens, {share:.1%} with a key"]
    kinds = [name[: -len(": keys")] for name in counts if name.endswith(": keys")]
    if kinds:
        lines.append("kind           keys   come back right   labelled   of these right")
    for kind in kinds:
        keys = counts[f"{kind}: keys"]
        given = counts[f"{kind}: given"]
        shares = (
            counts[f"{kind}: right"] / max(keys, 1),
            given / max(keys, 1),
            counts[f"{kind}: given and right"] / max(given, 1),
        )
        lines.append("{:<9} {:>9,} {:>17.1%} {:>10.1%} {:>16.1%}".format(kind, keys, *shares))
    told = {"games", "screens", "keys"}
    for name, number in counts.items():
        if number and ":" not in name and name not in told:
            lines.append(f"{number:,} {name}")
    return "\n".join(lines)


def run(args: Namespace) -> None:
    if not 0 <= args.min_probability <= 1:
        raise UserError(f"--min_probability is from 0 to 1, not {args.min_probability}")
    if bool(args.checkpoint) == args.true_keys:
        raise UserError("give --checkpoint, or --true_keys to keep the keys that games have")
    model = None
    how: Tuple[Any, ...] = (VERSION, "true keys")
    if args.checkpoint:
        model = load_model(args.checkpoint)
        digest = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
        how = (VERSION, digest, args.min_probability)
    total: Counter = Counter()
    sources = find_games(args, total)
    out = pomdp.expand(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for character, games in sources.items():
        path = out / f"data-{character}-any.hdf5"
        made_from = hashlib.sha256(repr((*how, games.identity)).encode()).hexdigest()
        if was_made_from(path) == made_from:
            print(f"{path} is there, of these games: it is left as it is")
            continue
        with pomdp.progress_bar(total=len(games.games), desc=character, unit="game") as bar:
            counts = make_file(path, games, made_from, args, model, bar)
        if not counts["games"]:
            print(f"{path} is not made: no game of {character} can be read")
        total += counts
    print(summary(total))


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="INVERSE", help="of an inverse model's training")
    add("--data_path", required=True, metavar="NAO_DIR", help="games without keys, or with")
    add("--out", required=True, metavar="DIR", help="folder for the HDF5 files; made if need be")
    add(
        "--min_probability",
        type=float,
        default=0.9,
        help="least probability of a key that is taken, 0 to 1 (default: %(default)s)",
    )
    add(
        "--character", help="one or several by commas; all that are known, of games with keys three"
    )
    add("--true_keys", action="store_true", help="keep the keys of games that have them")
    add(
        "--store_path",
        default="runs/stores",
        help="where stores of games with keys are built (default: %(default)s)",
    )
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
