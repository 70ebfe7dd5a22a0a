"""Turns results into one Markdown table on standard output; with --out also into a report with learning curves.

    python scripts/report.py scripts/results/cpu_small.jsonl --out REPORT_DIR   # rows written by scripts/study.py
    python scripts/report.py RUN ANOTHER_RUN                                    # folders of runs: their last evaluation
    python scripts/report.py RUN/best-evaluation                                # a checkpoint scored with --evaluate

A line is a character and an arm: an algorithm with one set of settings, the games of all its seeds together. The
normalized score is the mean of the points over AutoAscend's mean for the character, over several characters their
geometric mean. Intervals are 95 % bootstrap intervals over the games of all seeds. Differences from the baseline are
between equal games (same seeds of game and training, same held-out games), bold where the interval leaves out 0. A
held-out loss is a mean over held-out games, each the mean over seeds, of -log pi(a|s); of a run's folder the mean over
frames. A study's agents play with the weights of their lowest held-out loss. Deepest level and experience level are
means over games. A second table has why games ended: the commonest causes, in NetHack's words, and their shares; names
of shopkeepers, pets, gods and of what was eaten are left out, so that like stands with like. Older rows lack all three.
"""

import argparse
import csv
import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import AUTOASCEND_MEAN_SCORE, ENDS, NO_RESULT, UserError, run_command

Row = Dict[str, Any]
DEFAULT_VARIANT = "default"
NEEDED = {"study", "algorithm", "variant", "seed", "characters", "settings", "scores", "curve"}
# Settings that make no other arm of a run: they shape no result (a device only rounds otherwise),
# or are told apart anyway. The names that its user gave a run do tell it from others.
NOT_SETTINGS = (NO_RESULT - {"group", "name"}) | {"device", "character", "train_seed", "evaluate"}
NOTHING = "–"
# the benchmark's best, 204.8 million
PUBLISHED = {"mon-hum-neu": 0.024, "val-hum-neu": 0.0216, "ran-hum-neu": 0.089}
HEADER = dict(
    character="character", arm="arm", seeds="seeds", games="games", points="points [95 %]"
)
HEADER.update(score="normalized score [95 %]", more_points="points more than {} [95 %]")
HEADER.update(max_depths="max depth", levels="level")
HEADER.update(
    loss="held-out loss, nats [95 %]", more_loss="loss more than {} [95 %]", ends=" / ".join(ENDS)
)
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


class Arm(NamedTuple):  # all rows of one algorithm and variant with the same settings
    label: str
    name: str  # the label without what tells it from its namesakes
    study: str  # "" for folders
    variant: str
    rows: List[Row]


def read_lines(path: Path) -> List[Row]:
    """Objects of a .jsonl file; a last line that was cut short is left out with a warning."""
    text, _, cut = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    if cut:
        pomdp.warn(f"{path}: the last line is cut short and left out")
    try:
        return [dict(json.loads(line)) for line in text.splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} has a line that is not a JSON object") from None


def read_games(path: Path) -> Row:
    """<step>_<character>_games.csv -> scores, and what newer files have, in the order of the games;
    how many games ended in each way."""
    try:
        games = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        ends = [game["end"] for game in games]
        found: Row = {"scores": [float(game["score"]) for game in games]}
        found["ends"] = {end: ends.count(end) for end in ENDS}
        if games and "cause" in games[0]:
            found["max_depths"] = [int(game["max_depth"]) for game in games]
            found["levels"] = [int(game["level"]) for game in games]
            found["causes"] = [game["cause"] for game in games]
        return found
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: a line without score or end") from None


def read_folder(folder: Path) -> Row:
    """The folder of a run or of an evaluation as a row of a study: its last step's games, its last held-out loss."""
    try:
        metrics = read_lines(folder / "metrics.jsonl")
        described = folder / "config.json"
        config = (
            json.loads(described.read_text(encoding="utf-8"))["config"]
            if described.exists()
            else {}
        )
        curve = [
            [row["transitions"], row["heldout/loss_per_action"]]
            for row in metrics
            if "heldout/frames" in row
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no folder of a run or an evaluation, or it is damaged: {error!r}"
        ) from None
    found = [re.fullmatch(r"(\d+)_(.+)_games\.csv", path.name) for path in folder.iterdir()]
    last = max((int(match[1]) for match in found if match), default=0)
    files = sorted(
        (match[2], folder / match[0]) for match in found if match and int(match[1]) == last
    )
    games = {character: read_games(path) for character, path in files}
    settings = {name: value for name, value in config.items() if name not in NOT_SETTINGS}
    settings["together"] = "," in config.get("character", "")
    stem = re.sub(r"-evaluation(-\d+)?$", "", folder.name)  # of the checkpoint that was scored
    characters = dict.fromkeys([*filter(None, config.get("character", "").split(",")), *games])
    row = {
        "study": "",
        "variant": DEFAULT_VARIANT,
        "seed": config.get("train_seed", 0),
        "characters": list(characters),
    }
    row["algorithm"] = config["name"] if config and stem == folder.name else stem
    row["settings"] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    row["scores"] = {}
    for character, found_games in games.items():
        for name, values in found_games.items():
            row.setdefault(name, {})[character] = values
    row["heldout"] = {"loss_per_action": curve[-1][1]} if curve else {}
    return {**row, "curve": curve, "evaluation": {"eval_seed": config.get("eval_seed")}}


def read_all(paths: Sequence[Path]) -> List[Row]:
    rows: List[Row] = []
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path} does not exist; give .jsonl files of rows, or folders of runs or evaluations"
            )
        rows += [read_folder(path)] if path.is_dir() else read_lines(path)
    for row in rows:
        if NEEDED - row.keys():
            raise UserError(
                f"a row is none of a study: it lacks {', '.join(sorted(NEEDED - row.keys()))}"
            )
        unknown = [
            name
            for name in [*row["characters"], *row["scores"]]
            if name not in AUTOASCEND_MEAN_SCORE
        ]
        if unknown:
            raise UserError(f"no mean score of AutoAscend is known for {unknown[0]!r}")
    if not rows:
        raise UserError("there are no rows in " + ", ".join(map(str, paths)))
    return rows


def collect(rows: Sequence[Row]) -> List[Arm]:
    """Rows -> arms, other ways to act last. Rows with other settings are never put together."""
    newest: Dict[str, Row] = {}
    for row in rows:
        key = [
            row[name]
            for name in ("study", "algorithm", "variant", "settings", "seed", "characters")
        ]
        newest[json.dumps(key)] = row
    if len(newest) < len(rows):
        pomdp.warn("rows repeat others in arm, seed and characters: the last was taken")
    groups: Dict[Tuple[str, str, str, str], List[Row]] = {}
    for row in newest.values():
        variant = row["variant"]
        name = row["algorithm"] + ("" if variant == DEFAULT_VARIANT else f" / {variant}")
        groups.setdefault((name, row["study"], row["settings"], variant), []).append(row)
    names, arms = [name for name, *_ in groups], []
    for (name, study, settings, variant), members in groups.items():
        more = "" if names.count(name) == 1 else f" ({study or 'run'} {settings[:4]})"
        arms.append(Arm(name + more, name, study, variant, members))
    return sorted(arms, key=lambda arm: arm.variant != DEFAULT_VARIANT)


def rows_of(arm: Arm, character: str) -> List[Row]:
    return [row for row in arm.rows if character in row["characters"]]


def games_of(arm: Arm, character: str) -> Dict[Any, float]:
    """{(seed of the training, seed and number of the game): points}; the last two decide the game's own seeds."""
    rows = {
        (row["seed"], row.get("evaluation", {}).get("eval_seed")): row
        for row in rows_of(arm, character)
    }
    return {
        (*key, k): points
        for key in rows
        for k, points in enumerate(rows[key]["scores"].get(character, ()))
    }


def values_of(arm: Arm, character: str, name: str) -> List[Any]:
    """Of the games of all rows that have this: one value a game."""
    rows = rows_of(arm, character)
    return [value for row in rows for value in row.get(name, {}).get(character, ())]


def losses_of(arm: Arm, character: str, seeds: Sequence[int]) -> Dict[Any, float]:
    """{held-out game: loss per action, mean over these seeds}, of games that all of them were scored on."""
    rows = [row for row in rows_of(arm, character) if row["seed"] in seeds]
    scored = [row["heldout_games"][character] for row in rows if "heldout_games" in row]
    shared = sorted(set.intersection(*map(set, scored))) if scored else []
    return {
        name: float(np.mean([games[name]["loss_per_action"] for games in scored]))
        for name in shared
    }


def estimate(values: Any) -> Optional[Estimate]:
    """Mean and interval; None of no values."""
    array = np.array(list(values), dtype=float)
    return Estimate(float(array.mean()), *pomdp.bootstrap_interval(array)) if len(array) else None


def difference(mine: Dict[Any, float], theirs: Dict[Any, float]) -> Optional[Estimate]:
    return estimate(value - theirs[game] for game, value in mine.items() if game in theirs)


def loss_of_runs(rows: Sequence[Row]) -> Optional[Estimate]:
    """Where games were not scored one by one: the mean over seeds, without an interval."""
    losses = [
        row["heldout"]["loss_per_action"]
        for row in rows
        if row.get("heldout", {}).get("loss_per_action")
    ]
    return Estimate(float(np.mean(losses))) if losses else None


def baseline_of(arm: Arm, arms: Sequence[Arm], name: str) -> Optional[Arm]:
    """The arm to compare with: that of the same study, else the only one; None where it is unclear, or `arm` itself."""
    known = [other for other in arms if other.name == name]
    near = [other for other in known if other.study == arm.study] or known
    return near[0] if len(near) == 1 and near[0] is not arm else None


def show(found: Optional[Estimate], digits: int, bold: bool = False) -> str:
    if found is None:
        return NOTHING
    value, low, high = (f"{part:,.{digits}f}" for part in found)
    text = value if np.isnan(found.low) else f"{value} [{low}, {high}]"
    return f"**{text}**" if bold and (found.low > 0 or found.high < 0) else text


def line_of(arm: Arm, character: str, baseline: Optional[Arm]) -> Dict[str, str]:
    rows, games = rows_of(arm, character), games_of(arm, character)
    seeds = [row["seed"] for row in rows]
    line = {
        "character": character,
        "arm": arm.label,
        "seeds": str(len(rows)),
        "games": str(len(games) or NOTHING),
    }
    line["points"] = show(estimate(games.values()), 1)
    line["score"] = show(
        estimate(points / AUTOASCEND_MEAN_SCORE[character] for points in games.values()), 4
    )
    for name in ("max_depths", "levels"):
        values = values_of(arm, character, name)
        line[name] = f"{np.mean(values):.1f}" if values else NOTHING
    if baseline:
        line["more_points"] = show(difference(games, games_of(baseline, character)), 1, bold=True)
    if arm.variant == DEFAULT_VARIANT:  # another way to act has the same weights
        alone = [row for row in rows if row["characters"] == [character]]
        line["loss"] = show(
            estimate(losses_of(arm, character, seeds).values()) or loss_of_runs(alone), 3
        )
        if baseline:
            both = [row["seed"] for row in rows_of(baseline, character) if row["seed"] in seeds]
            pair = [losses_of(one, character, both) for one in (arm, baseline)]
            line["more_loss"] = show(difference(*pair), 3, bold=True)
    ends = [row["ends"][character] for row in rows if character in row.get("ends", {})]
    if ends:
        line["ends"] = " / ".join(str(sum(counts[end] for counts in ends)) for end in ENDS)
    return line


def line_of_all(arm: Arm, characters: Sequence[str]) -> Dict[str, str]:
    """Over all characters: the geometric mean of their scores, and the loss of weights that learned them together."""
    scores = [list(games_of(arm, character).values()) for character in characters]
    means = [
        float(np.mean(games)) / AUTOASCEND_MEAN_SCORE[name]
        for games, name in zip(scores, characters)
    ]
    line = {
        "character": "all",
        "arm": arm.label,
        "seeds": str(len({row["seed"] for row in arm.rows})),
    }
    line.update(games=str(sum(map(len, scores))), score=f"{pomdp.geometric_mean(means):.4f}")
    return {
        **line,
        "loss": show(loss_of_runs([row for row in arm.rows if len(row["characters"]) > 1]), 3),
    }


def make_table(arms: Sequence[Arm], baseline: str = "ours") -> str:
    lines: List[Dict[str, str]] = []
    characters = list(
        dict.fromkeys(name for arm in arms for row in arm.rows for name in row["characters"])
    )
    for character in characters:
        trained = [arm for arm in arms if rows_of(arm, character)]
        lines += [line_of(arm, character, baseline_of(arm, arms, baseline)) for arm in trained]
        recorded = [
            row.get("recorded_scores", {}).get(character) for arm in trained for row in arm.rows
        ]
        # up to the step limit; the same in all rows
        for points in dict.fromkeys(map(tuple, filter(None, recorded))):
            line = {
                "character": character,
                "arm": "AutoAscend, in as many actions",
                "games": str(len(points)),
            }
            mean = show(estimate(np.array(points) / AUTOASCEND_MEAN_SCORE[character]), 4)
            lines.append({**line, "points": show(estimate(points), 1), "score": mean})
    if len(characters) > 1:
        lines += [
            line_of_all(arm, characters)
            for arm in arms
            if all(games_of(arm, name) for name in characters)
        ]
    header = {name: title.format(baseline) for name, title in HEADER.items()}
    said = {name: {line.get(name, NOTHING) for line in lines} - {NOTHING} for name in header}
    # not what all lines say alike
    kept = [name for name in header if len(said[name]) > (name in ("arm", "seeds"))]
    cells = [[line.get(name, NOTHING) for name in kept] for line in (header, *lines)]
    cells.insert(1, [":---"] + ["---:"] * (len(kept) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def plain_cause(cause: str) -> str:
    """A cause of death without what tells it from its like."""
    for pattern, plain in ALIKE:
        cause = re.sub(pattern, plain, cause)
    return cause


def make_causes(arms: Sequence[Arm]) -> str:
    """Why games ended, a line for each character and arm; "" where no row has it."""
    names = [name for arm in arms for row in arm.rows for name in row["characters"]]
    lines = [["character", "arm", "games", "why they ended"], [":---", ":---", "---:", ":---"]]
    for character in dict.fromkeys(names):
        for arm in arms:
            causes = [plain_cause(cause) for cause in values_of(arm, character, "causes")]
            if not causes:
                continue
            commonest = Counter(causes).most_common(CAUSES)
            rest = len(causes) - sum(count for _, count in commonest)
            if rest:
                commonest.append(("others", rest))
            shares = [f"{cause} {count / len(causes):.0%}" for cause, count in commonest]
            lines.append([character, arm.label, str(len(causes)), "; ".join(shares)])
    if len(lines) == 2:
        return ""
    if len(arms) == 1:  # it need not be told from others
        lines = [[line[0], *line[2:]] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_curve(rows: Sequence[Row]) -> np.ndarray:
    """[points, 4]: transitions; mean, lowest and highest held-out loss per action over seeds that have that point."""
    points, curve = [point for row in rows for point in row["curve"] if point[1] is not None], []
    for at in sorted({point[0] for point in points}):
        losses = [point[1] for point in points if point[0] == at]
        curve.append([at, np.mean(losses), min(losses), max(losses)])
    return np.array(curve).reshape(-1, 4)


def draw_curves(arms: Sequence[Arm], path: Path) -> str:
    """Held-out loss against transitions: mean and range over seeds, a panel for each set of characters -> Markdown."""
    from matplotlib.figure import Figure

    learned = [arm for arm in arms if arm.variant == DEFAULT_VARIANT]
    panels = list(
        dict.fromkeys(
            "+".join(row["characters"]) for arm in learned for row in arm.rows if row["curve"]
        )
    )
    if not panels:
        return ""
    figure, entries = Figure(figsize=(5 * len(panels) + 2, 4.5), layout="constrained"), {}
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for place, arm in enumerate(learned):
            at, mean, low, high = mean_curve(
                [row for row in arm.rows if "+".join(row["characters"]) == panel]
            ).T
            color, style = f"C{place % 10}", ("-", "--", ":", "-.")[place // 10 % 4]  # forty looks
            if len(at):
                (entries[arm.label],) = axis.plot(
                    at, mean, color=color, linestyle=style, marker="."
                )
                axis.fill_between(at, low, high, color=color, alpha=0.15)
        axis.set(title=panel, xlabel="transitions", ylabel="held-out loss per action (nats)")
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    figure.savefig(path)
    return f"\n![held-out loss]({path.name})\n"


def draw_scores(folders: Sequence[Path], path: Path) -> str:
    """Normalized score with its interval against transitions, all evaluations of all characters -> Markdown."""
    from matplotlib.figure import Figure

    rows = [
        row for folder in folders if folder.is_dir() for row in read_lines(folder / "metrics.jsonl")
    ]
    names = [
        name
        for name in AUTOASCEND_MEAN_SCORE
        if any(f"{name}/normalized_score" in row for row in rows)
    ]
    if not names:
        return ""
    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        keys = ["transitions", *(f"{name}/normalized_score{end}" for end in ("", "_low", "_high"))]
        at, mean, low, high = np.array(
            sorted([row[key] for key in keys] for row in rows if keys[1] in row)
        ).T
        axis.errorbar(at, mean, [mean - low, high - mean], marker="o", capsize=3)
        if name in PUBLISHED:
            axis.axhline(PUBLISHED[name], color="gray", linestyle="--")
        axis.set(title=name, xlabel="transitions", ylabel="normalized score", ylim=(0, None))
    figure.savefig(path)
    return f"\n![score]({path.name})\n"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)  # one line, like all mistakes


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="ROWS_OR_RUN_DIR",
        help=".jsonl files of rows, folders",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write report.md and pictures into this folder"
    )
    parser.add_argument(
        "--baseline",
        default="ours",
        metavar="ARM",
        help="arm to compare with (default: %(default)s)",
    )

    def command() -> None:
        args = parser.parse_args(argv)
        arms = collect(read_all(args.paths))
        if args.baseline not in ["ours", *(arm.name for arm in arms)]:
            raise UserError(
                f"no arm is named {args.baseline!r}; there are {', '.join(arm.name for arm in arms)}"
            )
        table = make_table(arms, args.baseline)
        causes = make_causes(arms)
        if causes:
            table += f"\n\n{causes}"
        print(table)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            pictures = draw_curves(arms, args.out / "curves.png") + draw_scores(
                args.paths, args.out / "scores.png"
            )
            (args.out / "report.md").write_text(f"{table}\n{pictures}", encoding="utf-8")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
