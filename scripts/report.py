"""Turns results into a report: report.md with its tables, and its figures as PNG and SVG.

    python scripts/report.py scripts/results/cpu_small.jsonl --out REPORT_DIR          # rows written by scripts/study.py
    python scripts/report.py runs/custom-nethack-pomdp-v0/custom-mon-hum-neu-seed42 --out REPORT_DIR   # a run's folder, or several, or both

From rows the scores are those of the weights with the lowest held-out loss; from a run's folder those of its last evaluation.

Statistics. Scores are normalized by AutoAscend's mean score for the character. An arm's games of all its seeds are pooled. Intervals
are 95 % percentile bootstrap intervals that draw whole games anew, with replacement, within each seed: they say how sure the
number is for these trained agents, and not what another seed would give; for that the seeds' own means are shown as well. The
interquartile mean leaves out the lowest and the highest quarter of the games. P(X > Y) is the share of pairs of games, one of
each arm, in which X scores more (ties count half), averaged over characters. Over characters, scores enter a geometric mean.
Held-out losses are means over held-out games, each counted once, of the means over seeds; their intervals draw these games anew, the
same ones for all arms, so that differences are between equal games (and equal seeds). The weights were chosen by the loss on the same
games.
"""

import argparse
import json
import re
import sys
import zlib
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import numpy as np
import study

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import UserError

REFERENCES = "bc,cql,iql,ours"
RESAMPLES = 5_000


# ----------------------------------------------------------------------------------------------------------------------
# Statistics: pure functions
# ----------------------------------------------------------------------------------------------------------------------
def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis [..., N] without the lowest and the highest int(N / 4) values (a 25 % trimmed mean)."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def resampled_indices(sizes: Sequence[int], resamples: int, *seed: int) -> np.ndarray:
    """[R, N] indices into the games of all seeds put one after another: each seed's games are drawn anew among themselves."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.concatenate([start + rng.integers(size, size=(resamples, size)) for start, size in zip(starts.tolist(), sizes)], axis=1)


def interval(samples: np.ndarray) -> Tuple[float, float]:
    """The middle 95 % of the resampled values [R]."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def geometric_means(scores: np.ndarray) -> np.ndarray:
    """[..., C] -> [...]: as the task scores over characters; 0 where any of several is not above 0."""
    if scores.shape[-1] == 1:
        return scores[..., 0]
    logs = np.log(np.maximum(scores, 1e-300)).mean(axis=-1)
    return np.where((scores > 0).all(axis=-1), np.exp(logs), 0.0)


def comparisons(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n, m]: 1 where x[i] > y[j], 1/2 where they are equal, 0 where x[i] < y[j]."""
    return (np.sign(x[:, None] - y[None, :]) + 1.0) / 2.0


def counts_of(indices: np.ndarray, games: int) -> np.ndarray:
    """[R, N] indices -> [R, games] how often each was drawn."""
    shifted = indices + games * np.arange(len(indices))[:, None]
    return np.bincount(shifted.ravel(), minlength=games * len(indices)).reshape(len(indices), games).astype(np.float64)


def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """P(X > Y) over all pairs of games."""
    return float(comparisons(x, y).mean())


def improvement_samples(x: np.ndarray, y: np.ndarray, drawn_x: np.ndarray, drawn_y: np.ndarray) -> np.ndarray:
    """P(X > Y) of each pair of resamples: drawn_x [R, n], drawn_y [R, m] indices -> [R]."""
    wins = counts_of(drawn_x, len(x)) @ comparisons(x, y)  # [R, m]
    return (wins * counts_of(drawn_y, len(y))).sum(axis=1) / (drawn_x.shape[1] * drawn_y.shape[1])


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Arm:
    """All rows of one algorithm and variant with the same settings."""

    label: str
    algorithm: str
    variant: str
    group: str  # the study, or "" for a run's folder
    rows: List[Dict[str, Any]]
    drawn: Dict[str, np.ndarray] = field(default_factory=dict)

    def rows_of(self, character: str) -> List[Dict[str, Any]]:
        return [row for row in self.rows if row["scores"].get(character)]

    def games(self, character: str) -> np.ndarray:
        """[N] raw scores of all seeds, seed after seed."""
        return np.array([score for row in self.rows_of(character) for score in row["scores"][character]], dtype=np.float64)

    def normalized(self, character: str) -> np.ndarray:
        return self.games(character) / pomdp.AUTOASCEND_MEAN_SCORE[character]

    def indices(self, character: str, resamples: int) -> np.ndarray:
        """[R, N]: the same resamples wherever this arm's games are resampled, others than any other arm's."""
        if character not in self.drawn:
            sizes = [len(row["scores"][character]) for row in self.rows_of(character)]
            seed = (zlib.crc32(self.label.encode()), zlib.crc32(character.encode()))
            self.drawn[character] = resampled_indices(sizes, resamples, *seed)
        return self.drawn[character]


def read_array(file: Path) -> List[float]:
    try:
        return np.load(file, allow_pickle=False).tolist()
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def read_run(folder: Path) -> Dict[str, Any]:
    """A run's folder as a row: the games of its last evaluation, the held-out metrics logged with them."""
    described = pomdp.read_json(folder / "config.json")
    config = described.get("config")
    if not isinstance(config, dict) or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is no run's folder: it has no config.json and metrics.jsonl that can be read")
    try:
        metrics = study.read_metrics(folder)
    except ValueError:
        raise UserError(f"{folder / 'metrics.jsonl'} has a line that is not JSON; is the run still going on?") from None
    characters = [name for name in config["character"].split(",") if name]
    found = re.compile(r"(\d+)_(.+)_returns\.npy")
    steps = [int(match.group(1)) for match in map(found.fullmatch, (path.name for path in folder.iterdir())) if match]
    step = max(steps) if steps else None
    tested = next((row for row in metrics if row["step"] == step and any("normalized_score" in name for name in row)), {})
    heldout_rows = [row for row in metrics if any(name.startswith("heldout/") for name in row)]
    heldout = next((row for row in heldout_rows if row["step"] == step), heldout_rows[-1] if heldout_rows else {})
    scores, depths, ends = {}, {}, {}
    for character in characters if step is not None else ():
        if (folder / f"{step}_{character}_returns.npy").is_file():
            prefix = "" if len(characters) == 1 else f"{character}/"
            scores[character] = read_array(folder / f"{step}_{character}_returns.npy")
            if (folder / f"{step}_{character}_depths.npy").is_file():
                depths[character] = read_array(folder / f"{step}_{character}_depths.npy")
            shares = {end: tested.get(f"{prefix}end_{end.replace(' ', '_')}") for end in study.ENDS}
            counts = {end: round(share * len(scores[character])) for end, share in shares.items() if share is not None}
            if len(counts) == len(shares):
                ends[character] = counts
    settings = {name: value for name, value in config.items() if name not in study.NOT_SETTINGS}
    submission = config.get("submission")
    return {
        "study": "", "algorithm": Path(submission).stem if submission else config["name"], "variant": study.DEFAULT_VARIANT,
        "seed": config["train_seed"], "characters": characters, "config": config,
        "settings": study.hash_of(settings, config.get("rnn_hidden_dim"), len(next(iter(scores.values()), []))),
        "evaluation": {name: config.get(name) for name in study.ACTING}, "commit": described.get("commit"),
        "hardware": described.get("hardware", {}), "rnn_hidden_dim": config.get("rnn_hidden_dim"), "data": {},
        "transitions": metrics[-1]["transitions"] if metrics else 0, "best_transitions": heldout.get("transitions"),
        "wall_seconds": study.seconds_of_updates(metrics), "evaluation_seconds": None,
        "heldout": {name[len("heldout/"):]: value for name, value in heldout.items() if name.startswith("heldout/")},
        "train_loss": study.loss_near_end(metrics), "curve": study.learning_curve(metrics),
        "scores": scores, "depths": depths, "ends": ends,
    }  # fmt: skip


def read_all(paths: Sequence[Path]) -> List[Dict[str, Any]]:
    rows: List[Dict[str, Any]] = []
    for path in paths:
        if path.is_dir():
            rows.append(read_run(path))
        elif path.is_file():
            rows.extend(study.read_rows(path))
        else:
            raise UserError(f"{path} does not exist; give .jsonl files of rows or folders of runs")
    for row in rows:
        for character in row["scores"]:
            if character not in pomdp.AUTOASCEND_MEAN_SCORE:
                raise UserError(f"a row has scores of {character!r}, for which no mean score of AutoAscend is known")
    if not rows:
        raise UserError("there are no rows in " + ", ".join(map(str, paths)))
    return rows


def collect(rows: Sequence[Dict[str, Any]]) -> Tuple[List[Arm], List[str]]:
    """Rows -> arms (plain ones first, then other ways to act) and remarks on rows that were not taken as they are."""
    remarks: List[str] = []
    newest: Dict[Tuple[Any, ...], Dict[str, Any]] = {}
    for row in rows:
        key = (*study.row_key(row), row["settings"])
        newest[key] = row
    if len(newest) < len(rows):
        remarks.append(f"{len(rows) - len(newest)} rows repeat others (same arm, seed, characters and settings); "
                       "the last of each was taken.")  # fmt: skip
    arms: Dict[Tuple[str, str, str, str], List[Dict[str, Any]]] = {}
    for row in newest.values():
        arms.setdefault((row["study"], row["algorithm"], row["variant"], row["settings"]), []).append(row)
    names: Dict[str, List[Tuple[str, str, str, str]]] = {}
    for key in arms:
        names.setdefault(key[1] + ("" if key[2] == study.DEFAULT_VARIANT else f" / {key[2]}"), []).append(key)
    result = []
    for key, members in arms.items():
        name = next(name for name, keys in names.items() if key in keys)
        label, namesakes = name, names[name]
        if len({other[0] for other in namesakes}) > 1:
            label += f" ({key[0] or 'run'})"
        if sum(other[0] == key[0] for other in namesakes) > 1:
            label += f" [{key[3][:4]}]"
        if label != name and key == namesakes[-1]:
            remarks.append(f"{len(namesakes)} sets of settings share the name {name!r}; they are shown apart.")
        result.append(Arm(label, key[1], key[2], key[0], sorted(members, key=lambda row: row["seed"])))
    return sorted(result, key=lambda arm: arm.variant != study.DEFAULT_VARIANT), remarks


def choose_references(arm: Arm, arms: Sequence[Arm], names: Sequence[str]) -> List[Optional[Arm]]:
    """The arm to compare with for each name: of the same study, else the only one; None where there is none, or it is `arm`."""
    chosen: List[Optional[Arm]] = []
    for name in names:
        known = [other for other in arms if other.algorithm == name and other.variant == study.DEFAULT_VARIANT]
        near = [other for other in known if other.group == arm.group] or known
        chosen.append(near[0] if len(near) == 1 and near[0] is not arm else None)
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------
def estimate(arm: Arm, character: str, statistic: Callable[[np.ndarray], np.ndarray], resamples: int) -> Estimate:
    """The statistic over the last axis of the normalized scores, and its interval."""
    values = arm.normalized(character)
    return Estimate(float(statistic(values)), *interval(statistic(values[arm.indices(character, resamples)])))


def mean_over_games(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def estimate_over_characters(arm: Arm, characters: Sequence[str], resamples: int) -> Optional[Estimate]:
    """Geometric mean over all characters of the mean score; None for an arm that did not play all of them."""
    if not all(len(arm.games(character)) for character in characters):
        return None
    values = [arm.normalized(character) for character in characters]
    means = np.array([value.mean() for value in values])
    samples = np.stack([value[arm.indices(character, resamples)].mean(axis=1) for value, character in zip(values, characters)], axis=1)
    return Estimate(float(geometric_means(means)), *interval(geometric_means(samples)))


def estimate_improvement(arm: Arm, reference: Arm, characters: Sequence[str], resamples: int) -> Optional[Estimate]:
    """P(arm > reference), mean over the characters that both played."""
    shared = [character for character in characters if len(arm.games(character)) and len(reference.games(character))]
    if not shared:
        return None
    values = [improvement(arm.games(character), reference.games(character)) for character in shared]
    samples = [improvement_samples(arm.games(character), reference.games(character), arm.indices(character, resamples),
                                   reference.indices(character, resamples)) for character in shared]  # fmt: skip
    return Estimate(float(np.mean(values)), *interval(np.mean(samples, axis=0)))


def over_seeds(rows: Sequence[Dict[str, Any]], read: Callable[[Dict[str, Any]], Any]) -> Optional[Estimate]:
    """Mean, lowest and highest over seeds of a number that some rows may lack."""
    values = [value for value in (study.number_or_none(read(row)) for row in rows) if value is not None]
    return Estimate(sum(values) / len(values), min(values), max(values)) if values else None


def mean_curve(rows: Sequence[Dict[str, Any]]) -> np.ndarray:
    """[points, 4]: transitions, and the mean, lowest and highest held-out loss per action over seeds that have that point."""
    points: Dict[float, List[float]] = {}
    for row in rows:
        for transitions, heldout, _ in row["curve"]:
            if heldout is not None:
                points.setdefault(transitions, []).append(heldout)
    return np.array([[at, np.mean(values), min(values), max(values)] for at, values in sorted(points.items())]).reshape(-1, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------
NOTHING = "–"


def show(value: Optional[Estimate], digits: int = 4) -> str:
    if value is None:
        return NOTHING
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def points(value: Estimate, autoascend: float) -> str:
    """A normalized mean and its interval in points of the game."""
    return show(Estimate(*(part * autoascend for part in value)), 0 if value.value * autoascend >= 100 else 1)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = [":---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line).replace("\n", " ") + " |" for line in [header, rule, *lines])


def known_references(arms: Sequence[Arm], names: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Those of the names that some arm can be compared with, and remarks on names that stand for several arms."""
    chosen = {name: [choose_references(arm, arms, [name])[0] for arm in arms] for name in names}
    candidates = {name: [arm for arm in arms if (arm.algorithm, arm.variant) == (name, study.DEFAULT_VARIANT)] for name in names}
    remarks = [f"{len(arms_of_it)} arms are named {name!r}: nothing is compared with it where it is not clear which is meant."
               for name, arms_of_it in candidates.items() if len({arm.group for arm in arms_of_it}) < len(arms_of_it)]  # fmt: skip
    return [name for name in names if any(chosen[name])], remarks


def summary_table(arms: Sequence[Arm], characters: Sequence[str], references: Sequence[str], resamples: int) -> str:
    several = len(characters) > 1
    score = "geometric mean of normalized scores" if several else f"normalized score, {characters[0]}"
    header = ["arm", f"{score} [95 %]", *(f"P(arm > {name}) [95 %]" for name in references)]
    lines = []
    for arm in arms:
        line = [arm.label, show(estimate_over_characters(arm, characters, resamples))]
        for reference in choose_references(arm, arms, references):
            found = estimate_improvement(arm, reference, characters, resamples) if reference else None
            sure = found is not None and (found.low > 0.5 or found.high < 0.5)
            line.append(f"**{show(found, 3)}**" if sure else show(found, 3))
        lines.append(line)
    return table(header, lines)


def character_table(arms: Sequence[Arm], character: str, resamples: int) -> str:
    header = ["arm", "seeds", "games", "mean score [95 %]", "median", "normalized mean [95 %]", "interquartile mean [95 %]",
              "means of the seeds", "mean depth", "died / no progress / step limit"]  # fmt: skip
    autoascend = pomdp.AUTOASCEND_MEAN_SCORE[character]
    lines = []
    for arm in arms:
        rows, games = arm.rows_of(character), arm.games(character)
        if not rows:
            continue
        means = [np.mean(row["scores"][character]) / autoascend for row in rows]
        mean = estimate(arm, character, mean_over_games, resamples)
        depths = [depth for row in rows for depth in row.get("depths", {}).get(character, [])]
        ends = [row["ends"][character] for row in rows if character in row.get("ends", {})]
        counts = " / ".join(str(sum(end[name] for end in ends)) for name in study.ENDS) if len(ends) == len(rows) else NOTHING
        lines.append([
            arm.label, str(len(rows)), str(len(games)), points(mean, autoascend), f"{np.median(games):.0f}", show(mean),
            show(estimate(arm, character, interquartile_mean, resamples)),
            f"{min(means):.4f} – {max(means):.4f}" if len(means) > 1 else NOTHING,
            f"{np.mean(depths):.2f}" if len(depths) == len(games) else NOTHING, counts,
        ])  # fmt: skip
    for scores in recorded_scores(arms, character):
        values = scores / autoascend
        drawn = resampled_indices([len(values)], resamples, zlib.crc32(character.encode()))
        mean, middle = (Estimate(float(statistic(values)), *interval(statistic(values[drawn])))
                        for statistic in (mean_over_games, interquartile_mean))  # fmt: skip
        lines.append(["AutoAscend, its recorded games up to the step limit", NOTHING, str(len(scores)), points(mean, autoascend),
                      f"{np.median(scores):.0f}", show(mean), show(middle), *[NOTHING] * 3])  # fmt: skip
    return table(header, lines)


def recorded_scores(arms: Sequence[Arm], character: str) -> List[np.ndarray]:
    """The points that the recorded games had when an evaluation's step limit was reached; one array for each limit."""
    found = {tuple(row.get("recorded_scores", {}).get(character, ())): None for arm in arms for row in arm.rows}
    return [np.array(scores) for scores in found if scores]


def heldout_losses(arm: Arm, column: str, seeds: Sequence[int]) -> Dict[str, float]:
    """{held-out game: loss per action, mean over these seeds}, of games that all of them were scored on."""
    rows = [{name: metrics["loss_per_action"] for part in row.get("heldout_games", {}).values() for name, metrics in part.items()}
            for row in trained_on(arm, column) if row["seed"] in seeds]  # fmt: skip
    shared = set.intersection(*map(set, rows)) if rows else set()
    return {name: sum(row[name] for row in rows) / len(rows) for name in sorted(shared)}


def estimate_over_heldout(losses: Dict[str, float], resamples: int) -> Estimate:
    """Mean over games; the same names are drawn for whatever is measured on them."""
    values = np.array(list(losses.values()))
    drawn = resampled_indices([len(values)], resamples, zlib.crc32(" ".join(losses).encode()))
    return Estimate(float(values.mean()), *interval(values[drawn].mean(axis=1)))


def heldout_table(arms: Sequence[Arm], column: str, resamples: int) -> str:
    """Held-out loss with its interval over games, and the difference from `ours` on the same games and seeds; empty if no row has it."""
    header = ["arm", "seeds", "held-out games", "loss per action (nats) [95 %]", "difference from ours [95 %]"]
    lines = []
    for arm in arms:
        seeds = [row["seed"] for row in trained_on(arm, column)]
        losses = heldout_losses(arm, column, seeds)
        if not losses or arm.variant != study.DEFAULT_VARIANT:
            continue
        (ours,) = choose_references(arm, arms, ["ours"])
        both = [row["seed"] for row in trained_on(ours, column) if row["seed"] in seeds] if ours else []
        mine, theirs = heldout_losses(arm, column, both), heldout_losses(ours, column, both) if ours else {}
        shared = {name: mine[name] - theirs[name] for name in mine if name in theirs}
        difference = estimate_over_heldout(shared, resamples) if shared else None
        sure = difference is not None and (difference.low > 0 or difference.high < 0)
        lines.append([arm.label, str(len(seeds)), str(len(losses)), show(estimate_over_heldout(losses, resamples), 3),
                      f"**{show(difference, 3)}**" if sure else show(difference, 3)])  # fmt: skip
    return table(header, lines) if lines else ""


def columns_of(arms: Sequence[Arm]) -> List[str]:
    """What was trained on, each a column of the curves: a character, or several joined by +."""
    return list(dict.fromkeys("+".join(row["characters"]) for arm in arms for row in arm.rows))


def trained_on(arm: Arm, column: str) -> List[Dict[str, Any]]:
    return [row for row in arm.rows if "+".join(row["characters"]) == column]


def learning_table(arms: Sequence[Arm], column: str) -> str:
    header = ["arm", "seeds", "transitions (M)", "held-out loss per action (nats)", "accuracy", "training loss per action", "value RMSE",
              "explained variance", "effective sample size", "seconds of updates"]  # fmt: skip
    lines = []
    for arm in arms:
        rows = trained_on(arm, column)
        if not rows or arm.variant != study.DEFAULT_VARIANT:
            continue
        heldout = [over_seeds([row["heldout"] for row in rows], methodcaller("get", name))
                   for name in ("loss_per_action", "accuracy", "value_rmse", "explained_variance", "effective_sample_size")]  # fmt: skip
        transitions, seconds = over_seeds(rows, lambda row: row["transitions"]), over_seeds(rows, lambda row: row["wall_seconds"])
        lines.append([arm.label, str(len(rows)), f"{transitions.value / 1e6:.3g}" if transitions else NOTHING,
                      spread(heldout[0], 4), spread(heldout[1], 3),
                      spread(over_seeds(rows, lambda row: row["train_loss"]), 4), *(spread(value, 3) for value in heldout[2:]),
                      f"{seconds.value:.0f}" if seconds else NOTHING])  # fmt: skip
    return table(header, lines)


def spread(value: Optional[Estimate], digits: int) -> str:
    """Mean, and the range over seeds if there is one."""
    if value is None:
        return NOTHING
    return f"{value.value:.{digits}f}" + (f" ({value.low:.{digits}f} – {value.high:.{digits}f})" if value.low != value.high else "")


def spoken(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, dict, list)) or value is None else str(value)


def settings_text(arms: Sequence[Arm]) -> List[str]:
    """How games were played and what was learned from: what all share, and who differs."""
    lines = []
    rows = [(arm.label, row) for arm in arms for row in arm.rows]
    sizes = sorted({row["rnn_hidden_dim"] for _, row in rows if row.get("rnn_hidden_dim")})
    if sizes and sizes != [study.BENCHMARK_UNITS]:
        lines.append(f"* **LSTM units a layer: {', '.join(map(str, sizes))}** (the benchmark's: {study.BENCHMARK_UNITS}). Scores of "
                     "another size are not the benchmark's.")  # fmt: skip
    for name in (*study.ACTING, "temperature"):
        values: Dict[str, List[str]] = {}
        for label, row in rows:
            if name in row["evaluation"]:
                values.setdefault(spoken(row["evaluation"][name]), []).append(label)
        if len(values) == 1:
            lines.append(f"* `{name}`: {next(iter(values))}")
        elif values:
            most = max(values, key=lambda value: len(values[value]))
            others = "; ".join(f"{value} for {', '.join(dict.fromkeys(labels))}" for value, labels in values.items() if value != most)
            lines.append(f"* `{name}`: {most}, but {others}")
    data: Dict[str, Dict[str, None]] = {}  # character -> texts, each once, in the order of the rows
    for _, row in rows:
        for character, part in row["data"].items():
            text = " ".join(f"{part[name]['games']} games ({part[name]['frames']:,} frames) {what}" + ","
                            for name, what in (("training", "for training"), ("heldout", "held out")))  # fmt: skip
            data.setdefault(character, {})[f"{text} hash {part['games_sha256']}"] = None
    lines.extend(f"* data, {character}: {'; '.join(texts)}" for character, texts in data.items())
    commits = sorted({(row.get("commit") or "unknown")[:10] + (" with changes" if row.get("modified") else "") for _, row in rows})
    parts = ("device", "cpu", "cores")
    hardware = sorted({", ".join(str(row["hardware"][name]) for name in parts if row["hardware"].get(name)) for _, row in rows})
    lines.append(f"* commit: {'; '.join(commits)}; hardware (device, CPU, cores): {'; '.join(hardware)}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------
# Okabe and Ito's colours, which people with any colour vision can tell apart; without the yellow, too pale on white paper.
COLORS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_IN_PANEL = 6  # more lines than this cannot be told apart


def styles(arms: Sequence[Arm]) -> Dict[str, Dict[str, Any]]:
    """{label: colour, line and marker}: the first arm's is its own, and no panel of `panels_of` has one twice."""
    result = {}
    for place, arm in enumerate(arms):
        index = 0 if place == 0 else 1 + (place - 1) % (len(COLORS) - 1)
        result[arm.label] = dict(color=COLORS[index], linestyle=LINES[index], marker=MARKERS[index])
    return result


def panels_of(arms: Sequence[Arm]) -> List[List[Arm]]:
    """Groups of at most MOST_IN_PANEL arms, the first arm in each of them to compare with."""
    rest = list(arms[1:])
    panels = max(-(-len(rest) // (MOST_IN_PANEL - 1)), 1)
    edges = [len(rest) * place // panels for place in range(panels + 1)]  # of about equal size
    return [[arms[0], *rest[start:stop]] for start, stop in zip(edges, edges[1:])]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 10, "axes.spines.top": False,
                         "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6,
                         "axes.axisbelow": True, "svg.hashsalt": "report", "lines.linewidth": 1.8, "lines.markersize": 6})  # fmt: skip
    return plt


def save(figure: Any, plt: Any, out: Path, name: str) -> None:
    figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
    figure.savefig(out / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def error_bar(axis: Any, value: Estimate, y: float, **style: Any) -> None:
    axis.errorbar([value.value], [y], xerr=[[max(value.value - value.low, 0.0)], [max(value.high - value.value, 0.0)]], capsize=3,
                  linestyle="none", **style)  # fmt: skip


def label_rows(figure: Any, axes: Sequence[Any], labels: Sequence[str]) -> None:
    """A row an arm, the first on top; thin lines between rows."""
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    for axis in axes:
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        for y in range(len(labels) - 1):
            axis.axhline(y + 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    figure.get_layout_engine().set(w_pad=0.12)  # labels of neighbouring axes must not touch


def draw_scores(arms: Sequence[Arm], characters: Sequence[str], resamples: int, out: Path) -> str:
    """Mean and interquartile mean with intervals, and the means of the seeds; a panel a character and one over all."""
    plt = pyplot()
    panels = len(characters) + (len(characters) > 1)
    size = (1.8 + 3.3 * panels, 1.7 + 0.48 * len(arms))
    figure, axes = plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False, layout="constrained")
    mean_style = dict(fmt="o", color=COLORS[2], markersize=6, label="mean, 95 % interval")
    middle_style = dict(fmt="D", color=COLORS[3], markerfacecolor="white", markersize=5, label="interquartile mean, 95 % interval")
    for axis, character in zip(axes[0], characters):
        for y, arm in enumerate(arms):
            if not len(arm.games(character)):
                continue
            error_bar(axis, estimate(arm, character, mean_over_games, resamples), y - 0.14, **mean_style)
            error_bar(axis, estimate(arm, character, interquartile_mean, resamples), y + 0.18, **middle_style)
            rows = arm.rows_of(character)
            if len(rows) > 1:
                means = [np.mean(row["scores"][character]) / pomdp.AUTOASCEND_MEAN_SCORE[character] for row in rows]
                axis.plot(means, [y - 0.36] * len(means), linestyle="none", marker="|", color="#000000", markersize=7, markeredgewidth=1.5,
                          label="mean of one seed")  # fmt: skip
        axis.set_title(character)
    if len(characters) > 1:
        for y, arm in enumerate(arms):
            value = estimate_over_characters(arm, characters, resamples)
            if value is not None:
                error_bar(axes[0, -1], value, y - 0.14, **mean_style)
        axes[0, -1].set_title("geometric mean")
    label_rows(figure, axes[0], [arm.label for arm in arms])
    for axis in axes[0]:
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
    figure.supxlabel("normalized score (AutoAscend's mean = 1)", fontsize=11)
    shared_legend(figure, axes.flat)
    save(figure, plt, out, "scores")
    return "scores"


def shared_legend(figure: Any, axes: Any) -> None:
    """One legend above all panels, with each entry once."""
    entries = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3, frameon=False)


def draw_improvement(arms: Sequence[Arm], characters: Sequence[str], references: Sequence[str], resamples: int, out: Path) -> Optional[str]:
    """P(arm > reference) with its interval; a panel a reference that is there."""
    found: Dict[str, Dict[str, Estimate]] = {}
    for arm in arms:
        for name, reference in zip(references, choose_references(arm, arms, references)):
            value = estimate_improvement(arm, reference, characters, resamples) if reference else None
            if value is not None:
                found.setdefault(name, {})[arm.label] = value
    if not found:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(1.8 + 3.0 * len(found), 1.3 + 0.36 * len(arms)), sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, (name, values) in zip(axes[0], found.items()):
        axis.axvline(0.5, color="#000000", linewidth=1.0, linestyle="--")
        for y, arm in enumerate(arms):
            if arm.label in values:
                error_bar(axis, values[arm.label], y, fmt="o", color=COLORS[2])
        axis.set_title(f"P(arm > {name})")
        axis.set_xlim(0.0, 1.0)
    label_rows(figure, axes[0], [arm.label for arm in arms])
    figure.supxlabel("share of pairs of games won, 95 % interval (dashed: as often as not)", fontsize=11)
    save(figure, plt, out, "improvement")
    return "improvement"


def panel_grid(plt: Any, groups: Sequence[Sequence[Arm]], columns: Sequence[str]) -> Tuple[Any, Any]:
    return plt.subplots(len(groups), len(columns), figsize=(2.6 + 3.7 * len(columns), 0.5 + 3.1 * len(groups)), squeeze=False, sharex="col",
                        sharey="col", layout="constrained")  # fmt: skip


def legend_beside(axes: Any, arms: Sequence[Arm], look: Dict[str, Dict[str, Any]], plt: Any) -> None:
    """The group's legend at the right of its row of panels."""
    handles = [plt.Line2D([], [], label=arm.label, **look[arm.label]) for arm in arms]
    axes[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handlelength=3.6)


def curve_limits(curves: Sequence[np.ndarray]) -> Tuple[Optional[float], Optional[float]]:
    """The axis of losses: from the lowest to the highest after the first quarter of the transitions, whose steep fall would
    press everything else together. Curves of few points are shown whole."""
    points = np.concatenate(curves)
    late = points[points[:, 0] >= 0.25 * points[:, 0].max()] if len(points) else points
    if max(len(curve) for curve in curves) < 6:
        return None, None
    low, high = late[:, 2].min(), late[:, 3].max()
    return float(low - 0.05 * (high - low)), float(high + 0.05 * (high - low))


def draw_curves(arms: Sequence[Arm], out: Path) -> Optional[str]:
    """Held-out loss per action against transitions: mean, and range over seeds as a band."""
    learned = [arm for arm in arms if arm.variant == study.DEFAULT_VARIANT and any(len(mean_curve([row])) for row in arm.rows)]
    if not learned:
        return None
    plt = pyplot()
    groups, columns, look = panels_of(learned), columns_of(learned), styles(learned)
    figure, axes = panel_grid(plt, groups, columns)
    most = max(row["transitions"] for arm in learned for row in arm.rows)
    scale, unit = (1e6, "million transitions") if most >= 1e6 else (1e3, "thousand transitions") if most >= 1e4 else (1.0, "transitions")
    for row, group in enumerate(groups):
        for column, name in enumerate(columns):
            for arm in group:
                curve = mean_curve(trained_on(arm, name))
                if len(curve):
                    at, style = curve[:, 0] / scale, look[arm.label]
                    axes[row, column].plot(at, curve[:, 1], markevery=max(1, len(curve) // 8), **style)
                    axes[row, column].fill_between(at, curve[:, 2], curve[:, 3], color=style["color"], alpha=0.15, linewidth=0)
            if row == 0:
                axes[row, column].set_title(name)
            if row == len(groups) - 1:
                axes[row, column].set_xlabel(unit)
        axes[row, 0].set_ylabel("held-out loss\nper action (nats)")
        legend_beside(axes[row], group, look, plt)
    for column, name in enumerate(columns):
        low, high = curve_limits([mean_curve(trained_on(arm, name)) for arm in learned])
        axes[0, column].set_ylim(low, high)
    save(figure, plt, out, "curves")
    return "curves"


def draw_distributions(arms: Sequence[Arm], characters: Sequence[str], out: Path) -> str:
    """Share of games that reached at least each score, on a logarithmic axis (scores below 1 stand at 1)."""
    plt = pyplot()
    played = [arm for arm in arms if any(len(arm.games(character)) for character in characters)]
    groups, look = panels_of(played), styles(played)
    figure, axes = panel_grid(plt, groups, characters)
    for row, group in enumerate(groups):
        for column, character in enumerate(characters):
            axis = axes[row, column]
            for arm in group:
                scores = np.sort(np.maximum(arm.games(character), 1.0))
                if len(scores):
                    share = np.concatenate([[1.0], 1.0 - np.arange(1, len(scores) + 1) / len(scores)])
                    axis.plot(np.concatenate([[1.0], scores]), share, drawstyle="steps-post", markevery=max(1, len(scores) // 6),
                              **{**look[arm.label], "markersize": 5})  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlim(left=0.9)
            axis.set_ylim(-0.02, 1.02)
            if row == 0:
                axis.set_title(character)
            if row == len(groups) - 1:
                axis.set_xlabel("score (points)")
        axes[row, 0].set_ylabel("share of games\nwith at least this score")
        legend_beside(axes[row], group, look, plt)
    save(figure, plt, out, "distributions")
    return "distributions"


# ----------------------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------------------
CAPTIONS = {
    "scores": "Normalized score: mean and interquartile mean over games with 95 % bootstrap intervals (games drawn anew within each seed); "
              "ticks are the means of single seeds.",
    "improvement": "Probability that a game of the arm scores more than a game of the reference, averaged over characters.",
    "curves": "Held-out loss per action while training: mean over seeds, band from the lowest to the highest seed. The steep fall of the "
              "first quarter may run off the top.",
    "distributions": "Share of games that reached at least each score (games of all seeds).",
}  # fmt: skip


def write_report(rows: Sequence[Dict[str, Any]], out: Path, references: Sequence[str], resamples: int) -> Path:
    """Writes report.md and the figures into `out`; returns the report's path."""
    arms, remarks = collect(rows)
    references, unclear = known_references([arm for arm in arms if any(row["scores"] for row in arm.rows)], references)
    remarks.extend(unclear)
    characters = list(dict.fromkeys(character for arm in arms for row in arm.rows for character in row["scores"]))
    out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(arm.group for arm in arms if arm.group))
    text = [f"# {', '.join(names) or 'Runs'}: {len(arms)} arms, {sum(len(arm.rows) for arm in arms)} rows", ""]
    for remark in remarks:
        pomdp.warn(remark)
        text.extend([f"**Note:** {remark}", ""])
    unplayed = [arm.label for arm in arms if not any(row["scores"] for row in arm.rows)]
    if unplayed:
        text.extend([f"**Note:** no games were played by {', '.join(unplayed)}.", ""])
    figures: List[Optional[str]] = []
    if characters:
        played = [arm for arm in arms if arm.label not in unplayed]
        text.extend(["## Scores", "", summary_table(played, characters, references, resamples), "",
                     ("P(arm > reference): share of pairs of games in which the arm scores more, ties counted half, mean over characters; "
                     "bold where the interval leaves out 0.5."), ""])  # fmt: skip
        figures += [draw_scores(played, characters, resamples, out), draw_improvement(played, characters, references, resamples, out)]
        text.extend(embedded(figures))
        for character in characters:
            text.extend([f"### {character}", "", character_table(played, character, resamples), ""])
        text.extend(embedded([draw_distributions(played, characters, out)]))
    text.extend(["## Learning", "", "Mean over seeds (lowest – highest). Held-out numbers are of the weights that played.", ""])
    for column in columns_of(arms):
        text.extend([f"### Trained on {column}", "", learning_table(arms, column), ""])
        if by_game := heldout_table(arms, column, resamples):
            text.extend([by_game, "", "Bold: the interval of the difference leaves out 0.", ""])
    text.extend(embedded([draw_curves(arms, out)]))
    text.extend(["## Settings", "", *settings_text(arms), "", "## Statistics", "", __doc__.split("Statistics. ")[1].strip(), ""])
    report = out / "report.md"
    report.write_text("\n".join(text), encoding="utf-8")
    return report


def embedded(figures: Sequence[Optional[str]]) -> List[str]:
    return [line for name in figures if name for line in (f"![{name}]({name}.png)", "", f"*{CAPTIONS[name]}* ([SVG]({name}.svg))", "")]


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = study.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="ROWS_OR_RUN_DIR", help=".jsonl files of rows, folders of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), metavar="DIR", help="folder of the report (default: %(default)s)")
    parser.add_argument("--references", default=REFERENCES, help="arms to compare with (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap resamples (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    try:
        args = parse(argv)
        if args.resamples < 1:
            raise UserError(f"--resamples must be at least 1, not {args.resamples}")
        references = [name.strip() for name in args.references.split(",") if name.strip()]
        try:
            report = write_report(read_all(args.paths), args.out, references, args.resamples)
        except OSError as error:
            raise UserError(f"cannot write the report to {args.out}: {error.strerror or error}; choose another --out") from None
    except UserError as error:
        print("report: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
