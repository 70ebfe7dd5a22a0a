# SPDX-License-Identifier: MIT
"""Turns results into Markdown tables; with --out also into a report with learning curves.

    python scripts/report.py scripts/results/cpu_small.jsonl --out DIR   # rows of scripts/study.py
    python scripts/report.py RUN ANOTHER_RUN         # folders of runs: their last evaluation
    python scripts/report.py RUN/best-evaluation     # a checkpoint scored with --evaluate

A line is a character and an arm: an algorithm with one set of settings, the games of all its seeds
together. The normalized score is the mean of the points over AutoAscend's mean for the character,
over several characters their geometric mean. Intervals are 95 % bootstrap intervals over the games
of all seeds. Differences from the baseline are between equal games (same seeds of game and
training, same held-out games), bold where the interval leaves out 0. A held-out loss is a mean over
held-out games, each the mean over seeds, of -log pi(a|s); of a run's folder the mean over frames;
an algorithm whose info lacks loss_per_action has none. A study's agents play with the weights of
their lowest held-out loss. Progression is BALROG's metric,
computed from a game's deepest level and its experience level: it misses the milestones of the quest
and of the planes. Progression and both levels are means over games. A second table has why games
ended: the commonest causes, in NetHack's words, and their shares; names of shopkeepers, pets, gods
and of what was eaten are left out, so that like stands with like. Older rows lack all four.
"""

import hashlib
import json
import re
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import numpy as np
from shared import (
    DEFAULT_VARIANT,
    Parser,
    Row,
    markdown_table,
    newest_games,
    read_games,
    read_rows,
)

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import AUTOASCEND_MEAN_SCORE, ENDS, UserError, settings_where

NEEDED = {"study", "algorithm", "variant", "seed", "characters", "settings", "scores", "curve"}
SAME = ("study", "algorithm", "variant", "settings", "seed", "characters")  # of a row made again
# Settings that make no other arm of a run: they shape no result (a device only rounds otherwise),
# or are told apart anyway. The names that its user gave a run do tell it from others.
NOT_SETTINGS = settings_where(affects_results=False) - {"group", "name"}
NOT_SETTINGS |= {"device", "character", "train_seed", "evaluate"}
NOTHING = "–"
Line = Dict[str, str]  # of the table: {column in HEADER: cell}
# the benchmark's best, 204.8 million
PUBLISHED = {"mon-hum-neu": 0.024, "val-hum-neu": 0.0216, "ran-hum-neu": 0.089}
HEADER = {
    "character": "character",
    "arm": "arm",
    "seeds": "seeds",
    "games": "games",
    "points": "points [95 %]",
    "score": "normalized score [95 %]",
    "progression": "progression [95 %]",
    "more_points": "points more than {} [95 %]",
    "max_depths": "max depth",
    "levels": "level",
    "loss": "held-out loss, nats [95 %]",
    "more_loss": "loss more than {} [95 %]",
    "ends": " / ".join(ENDS),
}
CAUSES = 5  # shown of each arm
# What tells apart causes of death that are alike, and what stands for it.
ALIKE = (
    (r", while .*", ""),
    (r"\b(?:Mr\. |Ms\. )?[^ ]+, the shopkeeper", "a shopkeeper"),
    (r" (?:called|named) .*", ""),  # what a player calls his pet or his sword
    (r"\bthe ((?:invisible )?ghost) of .*", r"a \1"),
    (r"\b((?:high )?priest(?:ess)?|wrath|minion|Angel) of .*", r"\1 of a god"),
    (r"\brotted .* corpse", "rotted corpse"),
)


class Estimate(NamedTuple):
    value: float
    low: float = np.nan  # without an interval
    high: float = np.nan


@dataclass
class Arm:
    """All rows of one algorithm and variant with the same settings."""

    label: str
    name: str  # the label without what tells it from its namesakes
    study: str  # "" for folders
    settings: str
    variant: str
    rows: List[Row]


class Sample:
    """What an arm's rows tell of one character."""

    def __init__(self, arm: Arm, character: str) -> None:
        self.seeds: List[int] = []  # of the trainings, one a row
        self.heldout: List[Tuple[int, Row]] = []  # seed, {game: its metrics}
        self.alone: List[Row] = []  # rows that learned no other character
        self.values: Dict[str, List[Any]] = defaultdict(list)  # one a game
        self.ends: Dict[str, int] = Counter()  # empty where no row has them
        games = {}
        for row in arm.rows:
            if character not in row["characters"]:
                continue
            seed = row["seed"]
            self.seeds.append(seed)
            eval_seed = row.get("evaluation", {}).get("eval_seed")
            games[seed, eval_seed] = row["scores"].get(character, [])
            if "heldout_games" in row:
                self.heldout.append((seed, row["heldout_games"][character]))
            if row["characters"] == [character]:
                self.alone.append(row)
            for name in ("max_depths", "levels", "causes"):
                self.values[name] += row.get(name, {}).get(character, [])
            levels = [row.get(name, {}).get(character, []) for name in ("max_depths", "levels")]
            self.values["progression"] += map(pomdp.progression, *levels)
            self.ends.update(row.get("ends", {}).get(character, {}))
        # {(seed of the training, seed and number of the game): points}; the last two decide the
        # game's own seeds
        self.points: Dict[Any, float] = {}
        for key, scores in games.items():
            for number, points in enumerate(scores):
                self.points[key + (number,)] = points


# --- rows
def read_folder(folder: Path) -> Row:
    """The folder of a run or of an evaluation as a row of a study: its last evaluation's games, its
    last held-out loss. Raises UserError."""
    config: Row = {}
    curve = []
    described = folder / "config.json"
    try:
        if described.exists():
            config = json.loads(described.read_text(encoding="utf-8"))["config"]
        for line in read_rows(folder / "metrics.jsonl"):
            if "heldout/frames" in line:
                curve.append([line["transitions"], line.get("heldout/loss_per_action")])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no folder of a run or an evaluation, or it is damaged: {error!r}"
        ) from None
    files = newest_games(folder)
    trained = config.get("character", "")
    settings = {name: value for name, value in config.items() if name not in NOT_SETTINGS}
    settings["together"] = "," in trained
    row: Row = {
        "study": "",
        "algorithm": re.sub(r"-evaluation(-\d+)?$", "", folder.name),  # the checkpoint's name
        "variant": DEFAULT_VARIANT,
        "seed": config.get("train_seed", 0),
        "characters": list(dict.fromkeys([*filter(None, trained.split(",")), *files])),
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "heldout": {},
        "curve": curve,
        "evaluation": {"eval_seed": config.get("eval_seed")},
        **read_games(files),
    }
    if config and row["algorithm"] == folder.name:  # a run
        row["algorithm"] = config["name"]
    if curve:
        row["heldout"] = {"loss_per_action": curve[-1][1]}
    return row


def read_all(paths: Sequence[Path]) -> List[Row]:
    rows: List[Row] = []
    for path in paths:
        if not path.exists() or path.suffix == ".pt":
            raise UserError(
                f"{path} does not exist, or is a checkpoint; give .jsonl files of rows, or folders "
                "of runs or evaluations"
            )
        if path.is_dir():
            rows.append(read_folder(path))
        else:
            rows += read_rows(path)
    if not rows:
        raise UserError("there are no rows in " + ", ".join(map(str, paths)))
    for row in rows:
        missing = NEEDED - row.keys()
        if missing:
            raise UserError(f"a row is none of a study: it lacks {', '.join(sorted(missing))}")
        for name in [*row["characters"], *row["scores"]]:
            if name not in AUTOASCEND_MEAN_SCORE:
                raise UserError(f"no mean score of AutoAscend is known for {name!r}")
    return rows


def collect(rows: Sequence[Row]) -> List[Arm]:
    """Rows -> arms, other ways to act last. Rows with other settings are never put together."""
    newest = {json.dumps([row[name] for name in SAME]): row for row in rows}
    if len(newest) < len(rows):
        pomdp.warn("rows repeat others in arm, seed and characters: the last was taken")
    found: Dict[Tuple[str, ...], Arm] = {}
    for row in newest.values():
        name = row["algorithm"]
        if row["variant"] != DEFAULT_VARIANT:
            name += f" / {row['variant']}"
        key = (name, row["study"], row["settings"], row["variant"])
        found.setdefault(key, Arm(name, *key, [])).rows.append(row)
    arms = sorted(found.values(), key=lambda arm: arm.variant != DEFAULT_VARIANT)
    namesakes = Counter(arm.name for arm in arms)
    for arm in arms:
        if namesakes[arm.name] > 1:
            arm.label += f" ({arm.study or 'run'} {arm.settings[:4]})"
    return arms


def characters_of(arms: Sequence[Arm]) -> List[str]:
    found: Dict[str, None] = {}
    for arm in arms:
        for row in arm.rows:
            found.update(dict.fromkeys(row["characters"]))
    return list(found)


# --- estimates
def losses_of(sample: Sample, seeds: Sequence[int]) -> Dict[str, float]:
    """{held-out game: loss per action, mean over these seeds}, of games that all of them were
    scored on."""
    scored = [games for seed, games in sample.heldout if seed in seeds]
    losses: Dict[str, List[float]] = defaultdict(list)
    for games in scored:
        for name, metrics in games.items():
            if "loss_per_action" in metrics:
                losses[name].append(metrics["loss_per_action"])
    shared = [name for name in sorted(losses) if len(losses[name]) == len(scored)]
    return {name: float(np.mean(losses[name])) for name in shared}


def estimate(values: Any) -> Optional[Estimate]:
    """Mean and interval, which one value alone does not have; None of no values."""
    array = np.array(list(values), dtype=float)
    if not len(array):
        return None
    if len(array) == 1:
        return Estimate(float(array[0]))
    return Estimate(float(array.mean()), *pomdp.bootstrap_interval(array))


def difference(mine: Dict[Any, float], theirs: Dict[Any, float]) -> Optional[Estimate]:
    return estimate(value - theirs[game] for game, value in mine.items() if game in theirs)


def loss_of_runs(rows: Sequence[Row]) -> Optional[Estimate]:
    """Where games were not scored one by one: the mean over seeds, without an interval."""
    losses = [row.get("heldout", {}).get("loss_per_action") for row in rows]
    known = list(filter(None, losses))
    if not known:
        return None
    return Estimate(float(np.mean(known)))


def baseline_of(arm: Arm, arms: Sequence[Arm], name: str) -> Optional[Arm]:
    """The arm to compare with: that of the same study, else the only one; None where it is unclear,
    or `arm` itself."""
    known = [other for other in arms if other.name == name]
    near = [other for other in known if other.study == arm.study] or known
    if len(near) != 1 or near[0] is arm:
        return None
    return near[0]


def show(found: Optional[Estimate], digits: int, bold: bool = False) -> str:
    if found is None:
        return NOTHING
    text = f"{found.value:,.{digits}f}"
    if np.isnan(found.low):
        return text
    text += f" [{found.low:,.{digits}f}, {found.high:,.{digits}f}]"
    if bold and (found.low > 0 or found.high < 0):
        return f"**{text}**"
    return text


# --- tables
def line_of(arm: Arm, character: str, baseline: Optional[Arm]) -> Line:
    mine = Sample(arm, character)
    points = np.array(list(mine.points.values()))
    line = {
        "character": character,
        "arm": arm.label,
        "seeds": str(len(mine.seeds)),
        "games": str(len(points) or NOTHING),
        "points": show(estimate(points), 1),
        "score": show(estimate(points / AUTOASCEND_MEAN_SCORE[character]), 4),
        "progression": show(estimate(mine.values["progression"]), 4),
    }
    for name in ("max_depths", "levels"):
        if mine.values[name]:
            line[name] = f"{np.mean(mine.values[name]):.1f}"
    learned = arm.variant == DEFAULT_VARIANT  # another way to act has the same weights
    if learned:
        losses = losses_of(mine, mine.seeds)
        line["loss"] = show(estimate(losses.values()) or loss_of_runs(mine.alone), 3)
    if baseline:
        theirs = Sample(baseline, character)
        line["more_points"] = show(difference(mine.points, theirs.points), 1, bold=True)
        if learned:
            both = [seed for seed in theirs.seeds if seed in mine.seeds]
            more = difference(losses_of(mine, both), losses_of(theirs, both))
            line["more_loss"] = show(more, 3, bold=True)
    if mine.ends:
        line["ends"] = " / ".join(str(mine.ends[end]) for end in ENDS)
    return line


def lines_of_recorded(arms: Sequence[Arm], character: str) -> List[Line]:
    """Of the recorded games, up to the step limit: one line, since all rows have the same."""
    recorded = {}
    for arm in arms:
        for row in arm.rows:
            points = np.array(row.get("recorded_scores", {}).get(character, []), dtype=float)
            recorded[points.tobytes()] = points
    lines = []
    for points in filter(len, recorded.values()):
        line = {
            "character": character,
            "arm": "AutoAscend, in as many actions",
            "games": str(len(points)),
            "points": show(estimate(points), 1),
            "score": show(estimate(points / AUTOASCEND_MEAN_SCORE[character]), 4),
        }
        lines.append(line)
    return lines


def lines_of_all(arm: Arm, characters: Sequence[str]) -> List[Line]:
    """Over all characters: the geometric mean of their scores, and the loss of weights that learned
    them together. No line of an arm that lacks one's games."""
    games = 0
    means = []
    for character in characters:
        points = list(Sample(arm, character).points.values())
        if not points:
            return []
        games += len(points)
        means.append(float(np.mean(points)) / AUTOASCEND_MEAN_SCORE[character])
    together = [row for row in arm.rows if len(row["characters"]) > 1]
    line = {
        "character": "all",
        "arm": arm.label,
        "seeds": str(len({row["seed"] for row in arm.rows})),
        "games": str(games),
        "score": f"{pomdp.geometric_mean(means):.4f}",
        "loss": show(loss_of_runs(together), 3),
    }
    return [line]


def make_table(arms: Sequence[Arm], baseline: str = "ours") -> str:
    lines: List[Line] = []
    characters = characters_of(arms)
    for character in characters:
        trained = [arm for arm in arms if character in characters_of([arm])]
        for arm in trained:
            lines.append(line_of(arm, character, baseline_of(arm, arms, baseline)))
        lines += lines_of_recorded(trained, character)
    if len(characters) > 1:
        for arm in arms:
            lines += lines_of_all(arm, characters)
    kept = []
    for name in HEADER:
        said = {line.get(name, NOTHING) for line in lines} - {NOTHING}
        if len(said) > (name in ("arm", "seeds")):  # not what all lines say alike
            kept.append(name)
    cells = [[HEADER[name].format(baseline) for name in kept]]
    for line in lines:
        cells.append([line.get(name, NOTHING) for name in kept])
    return markdown_table(cells)


def plain_cause(cause: str) -> str:
    """A cause of death without what tells it from its like."""
    for pattern, plain in ALIKE:
        cause = re.sub(pattern, plain, cause)
    return cause


def make_causes(arms: Sequence[Arm]) -> str:
    """Why games ended, a line for each character and arm; "" where no row has it."""
    lines = [["character", "arm", "games", "why they ended"]]
    for character in characters_of(arms):
        for arm in arms:
            causes = Counter(map(plain_cause, Sample(arm, character).values["causes"]))
            games = rest = sum(causes.values())
            if not games:
                continue
            shares = []
            for cause, count in causes.most_common(CAUSES):
                shares.append(f"{cause} {count / games:.0%}")
                rest -= count
            if rest:
                shares.append(f"others {rest / games:.0%}")
            lines.append([character, arm.label, str(games), "; ".join(shares)])
    if len(lines) == 1:
        return ""
    if len(arms) > 1:
        return markdown_table(lines, "llrl")
    for line in lines:  # the arm need not be told from others
        del line[1]
    return markdown_table(lines, "lrl")


# --- pictures
def mean_curve(rows: Sequence[Row]) -> np.ndarray:
    """[points, 4]: transitions; mean, lowest and highest held-out loss per action over seeds that
    have that point."""
    losses: Dict[int, List[float]] = defaultdict(list)
    for row in rows:
        for at, loss, *_ in row["curve"]:
            if loss is not None:
                losses[at].append(loss)
    curve = []
    for at in sorted(losses):
        curve.append([at, np.mean(losses[at]), min(losses[at]), max(losses[at])])
    return np.array(curve).reshape(-1, 4)


def draw_curves(arms: Sequence[Arm], path: Path) -> str:
    """Held-out loss against transitions: mean and range over seeds, a panel for each set of
    characters -> Markdown."""
    from matplotlib.figure import Figure

    learned = [arm for arm in arms if arm.variant == DEFAULT_VARIANT]
    panels: Dict[str, None] = {}
    for arm in learned:
        shown = [row for row in arm.rows if len(mean_curve([row]))]
        panels.update(("+".join(row["characters"]), None) for row in shown)
    if not panels:
        return ""
    figure = Figure(figsize=(5 * len(panels) + 2, 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    entries = {}
    for axis, title in zip(axes, panels):
        for place, arm in enumerate(learned):
            rows = [row for row in arm.rows if "+".join(row["characters"]) == title]
            at, mean, low, high = mean_curve(rows).T
            color = f"C{place % 10}"
            style = ("-", "--", ":", "-.")[place // 10 % 4]  # forty looks
            if len(at):
                (line,) = axis.plot(at, mean, color=color, linestyle=style, marker=".")
                axis.fill_between(at, low, high, color=color, alpha=0.15)
                entries[arm.label] = line
        axis.set(title=title, xlabel="transitions", ylabel="held-out loss per action (nats)")
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    figure.savefig(path)
    return f"\n![held-out loss]({path.name})\n"


def draw_scores(folders: Sequence[Path], path: Path) -> str:
    """Normalized score with its interval against transitions, all evaluations of all characters
    -> Markdown."""
    from matplotlib.figure import Figure

    rows: List[Row] = []
    for folder in folders:
        if folder.is_dir():
            rows += read_rows(folder / "metrics.jsonl")
    panels = {}
    for name in AUTOASCEND_MEAN_SCORE:
        score = f"{name}/normalized_score"
        keys = ["transitions", score, f"{score}_low", f"{score}_high"]
        points = sorted([row[key] for key in keys] for row in rows if score in row)
        if points:
            panels[name] = np.array(points).T
    if not panels:
        return ""
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, name in zip(axes, panels):
        at, mean, low, high = panels[name]
        axis.errorbar(at, mean, [mean - low, high - mean], marker="o", capsize=3)
        if name in PUBLISHED:
            axis.axhline(PUBLISHED[name], color="gray", linestyle="--")
        axis.set(title=name, xlabel="transitions", ylabel="normalized score", ylim=(0, None))
    figure.savefig(path)
    return f"\n![score]({path.name})\n"


# --- the command
def report(args: Namespace) -> None:
    arms = collect(read_all(args.paths))
    names = [arm.name for arm in arms]
    if args.baseline not in ["ours", *names]:
        raise UserError(f"no arm is named {args.baseline!r}; there are {', '.join(names)}")
    table = make_table(arms, args.baseline)
    causes = make_causes(arms)
    if causes:
        table += f"\n\n{causes}"
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        pictures = draw_curves(arms, args.out / "curves.png")
        pictures += draw_scores(args.paths, args.out / "scores.png")
        (args.out / "report.md").write_text(f"{table}\n{pictures}", encoding="utf-8")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=Path,
        metavar="ROWS_OR_RUN_DIR",
        help=".jsonl files of rows, folders of runs or evaluations",
    )
    add(
        "--out", type=Path, metavar="DIR", help="also write report.md and pictures into this folder"
    )
    add(
        "--baseline",
        default="ours",
        metavar="ARM",
        help="arm to compare with (default: %(default)s)",
    )
    return parser.run(report, argv)


if __name__ == "__main__":
    sys.exit(main())
