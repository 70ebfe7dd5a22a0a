"""Runs a study: arms (algorithms, or ours with one thing changed) x characters x seeds, at one budget, from one file.

    python scripts/study.py scripts/studies/cpu_small.yaml --data_path DATA_DIR              # again: goes on where it stopped
    python scripts/study.py scripts/studies/cpu_small.yaml --dry_run                         # what there is to do
    python scripts/study.py scripts/studies/cpu_small.yaml --data_path DATA_DIR --only ours,bc --seeds 1

Each training is a process of its own, and so is each set of games: a crash loses one of them and no more. A training that was
cut goes on from its checkpoint. The weights that play are those of the lowest held-out loss (best.pt), never those of the
best score. All of it runs a copy of the scripts that is made at the start, so they may be edited meanwhile. Every finished set
of games is one line of JSON in scripts/results/<study>.jsonl; a line that is there is not made again. The runs go
seed by seed and character by character over all arms, so that arms can be compared early.

A study's file (scripts/studies/*.yaml):

    name            names the rows, their file and the folder of runs
    base            settings of custom_nethack_pomdp.py that all arms share
    rnn_hidden_dim  LSTM units, if not the benchmark's 2048: for studies that a CPU can afford. Said in every row
    characters      each arm learns each of them separately; with `together: true` one agent learns all
    seeds, games    train_seeds; games played with each character
    arms            {arm: settings that differ}; `seeds` and `games` may differ too
    evaluations     {arm: {variant: eval_* settings, algorithm: {...}, games}}: other ways to act with the same weights

A row holds: study, algorithm (the arm), variant, seed, characters, settings (a hash of all that shapes the result), config,
evaluation, commit, modified, script_sha256, command, hardware, versions, rnn_hidden_dim, data, transitions, best_transitions
(seen by the weights that played), wall_seconds (updates alone), evaluation_seconds, heldout, heldout_games (loss and accuracy of each
held-out game by itself), recorded_scores (points of the recorded games after eval_max_steps actions, to compare with), train_loss
(loss per action over the last tenth), curve ([transitions, held-out, training loss per action]), and by character scores, depths,
turns, lengths, ends.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple, Union

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import TrainConfig, UserError

BENCHMARK_UNITS = 2048
STUDY_KEYS = ("name", "base", "rnn_hidden_dim", "characters", "together", "seeds", "games", "arms", "evaluations")
ARM_KEYS = ("seeds", "games")  # an arm may have its own, beside TrainConfig's fields
# Set by the study itself or on the command line: a study's file has no paths and no names of runs.
NOT_IN_STUDY = ("character", "train_seed", "data_path", "store_path", "checkpoints_path", "group", "name", "version", "resume",
                "keep_checkpoints", "eval_record", "rnn_hidden_dim", "rnn_layers", "render_processes", "data_mode")  # fmt: skip
# How games are played: may differ between evaluations of the same weights.
ACTING = ("eval_processes", "eval_max_steps", "eval_clear_state", "eval_precision", "eval_seed")
# What shapes no result: how a run is watched, where it runs, and what the study counts apart.
NOT_SETTINGS = (*NOT_IN_STUDY, "project", "log_every", "checkpoint_every", "data_workers", "device", "eval_workers", "eval_episodes",
                "submission")  # fmt: skip
DEFAULT_VARIANT = "default"
ROWS_A_GAME = 8
OF_A_GAME = ("loss_per_action", "accuracy", "frames")  # metrics of single held-out games
ENDS = ("died", "no progress", "step limit")


# ----------------------------------------------------------------------------------------------------------------------
# The study's file
# ----------------------------------------------------------------------------------------------------------------------
class Playing(NamedTuple):
    """One way to play with an arm's weights; becomes one row."""

    variant: str
    config: TrainConfig
    games: int


class Run(NamedTuple):
    """One training and the ways its weights play."""

    arm: str
    seed: int
    config: TrainConfig
    playings: Tuple[Playing, ...]


@dataclass
class Study:
    name: str
    runs: List[Run]  # in the order in which they are made
    file: Path


def choose_key(key: Any, known: Sequence[str], where: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"))


def mapping(value: Any, where: str) -> Dict[str, Any]:
    """`value` as a mapping with text for keys; nothing is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} takes lines such as 'name: value', not {value!r}")
    return value


def label(value: Any, where: str) -> str:
    """A name that may stand in a file's name."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", value):
        raise UserError(f"{where}: {value!r} is no name; use letters, digits and _ . + -")
    return value


def whole_numbers(value: Any, least: int, where: str) -> List[int]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, int) and not isinstance(item, bool) and item >= least for item in values):
        raise UserError(f"{where} takes whole numbers of at least {least}, not {value!r}")
    if len(set(values)) != len(values):
        raise UserError(f"{where} names a number twice: {value!r}")
    return values


def one_number(value: Any, least: int, where: str) -> int:
    if isinstance(value, list):
        raise UserError(f"{where} takes one whole number, not {value!r}")
    return whole_numbers(value, least, where)[0]


def find_submission(text: str, file: Path, where: str) -> str:
    """The submission's path, looked for from the repository's root and from the study's folder."""
    for folder in (ROOT, file.resolve().parent):
        if (folder / text).is_file():
            return str((folder / text).resolve())
    raise UserError(f"{where}: the submission {text} does not exist (looked for from the repository's root and beside the study)")


def make_config(values: Dict[str, Any], units: int, where: str) -> TrainConfig:
    """TrainConfig of these values, with an LSTM of `units`. Raises UserError, which begins with `where`."""
    types = pomdp.config_types()
    try:
        config = TrainConfig(**{name: pomdp.coerce(name, value, types[name]) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    # TrainConfig takes the benchmark's size only, so that no submission is trained at another by mistake; here it is on purpose.
    config.rnn_hidden_dim = units
    return config


def arm_values(base: Dict[str, Any], own: Dict[str, Any], file: Path, where: str) -> Dict[str, Any]:
    """Base settings under the arm's own; `algorithm` is merged key by key."""
    for key in own:
        if key in NOT_IN_STUDY:
            raise UserError(f"{where}: {key} is not an arm's to set: the study or the command line gives it")
        choose_key(key, [*pomdp.config_types()], where)
    values = {**base, **own}
    if "algorithm" in values:
        values["algorithm"] = {key: value for part in (base, own)
                               for key, value in mapping(part.get("algorithm"), f"{where}: algorithm").items()}  # fmt: skip
    if values.get("eval_episodes", 0) != 0:
        raise UserError(f"{where}: eval_episodes must be 0: games are played after training, with the best weights; set 'games' for them")
    values["eval_episodes"] = 0
    if values.get("submission"):
        values["submission"] = find_submission(str(values["submission"]), file, where)
    return values


def check_algorithm(config: TrainConfig, where: str) -> None:
    """Makes the algorithm on a tiny network: wrong settings and broken submissions show now, and not after hours."""
    small = dataclasses.replace(config, rnn_hidden_dim=BENCHMARK_UNITS)
    small.rnn_hidden_dim = 8
    try:
        pomdp.make_algorithm(small, torch.device("cpu"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not config.eval_heldout_frames or not config.heldout_share:
        raise UserError(f"{where}: a study needs eval_heldout_frames and heldout_share above 0: weights are chosen by held-out loss")


def read_study(file: Path) -> Study:
    """Raises UserError with one line for whatever is wrong in the file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the study {file}: {getattr(error, 'strerror', None) or error}") from None
    content = mapping(pomdp.parse_yaml(text, str(file)), str(file))
    for key in content:
        choose_key(key, STUDY_KEYS, str(file))
    for key in ("name", "characters", "seeds", "games", "arms"):
        if key not in content:
            raise UserError(f"{file}: '{key}' is missing")
    name = label(content["name"], f"{file}: name")
    units = one_number(content.get("rnn_hidden_dim", BENCHMARK_UNITS), 1, f"{file}: rnn_hidden_dim")
    characters = content["characters"] if isinstance(content["characters"], list) else [content["characters"]]
    together = content.get("together", False)
    if not isinstance(together, bool):
        raise UserError(f"{file}: together is true or false, not {together!r}")
    groups = [",".join(map(str, characters))] if together else [str(character) for character in characters]
    base = arm_values({}, mapping(content.get("base"), f"{file}: base"), file, f"{file}: base")
    arms = mapping(content["arms"], f"{file}: arms")
    evaluations = mapping(content.get("evaluations"), f"{file}: evaluations")
    for arm in evaluations:
        choose_key(arm, list(arms), f"{file}: evaluations")

    runs: List[Tuple[Tuple[int, int], Run]] = []
    for arm, own in arms.items():
        where = f"{file}: arm {label(arm, f'{file}: arms')}"
        own = dict(mapping(own, where))
        seeds = whole_numbers(own.pop("seeds", content["seeds"]), 0, f"{where}: seeds")
        games = one_number(own.pop("games", content["games"]), 1, f"{where}: games")
        values = arm_values(base, own, file, where)
        ways = mapping(evaluations.get(arm), f"{file}: evaluations: {arm}")
        check_algorithm(make_config({**values, "character": groups[0]}, units, where), where)
        for place, seed in enumerate(seeds):
            for group_place, group in enumerate(groups):
                mine = {**values, "character": group, "train_seed": seed, "group": name, "name": arm}
                config = make_config(mine, units, where)
                playings = [Playing(DEFAULT_VARIANT, config, games)]
                for variant, way in ways.items():
                    place_of_way = f"{where}: evaluation {label(variant, f'{where}: evaluations')}"
                    playings.append(other_playing(variant, way, mine, units, games, place_of_way))
                runs.append(((place, group_place), Run(arm, seed, config, tuple(playings))))
    if not runs:
        raise UserError(f"{file}: arms is empty")
    return Study(name, [run for _, run in sorted(runs, key=lambda pair: pair[0])], file)


def other_playing(variant: str, way: Any, values: Dict[str, Any], units: int, games: int, where: str) -> Playing:
    """Another way to act with an arm's weights."""
    way = dict(mapping(way, where))
    if variant == DEFAULT_VARIANT:
        raise UserError(f"{where}: {DEFAULT_VARIANT!r} is the arm itself; take another name")
    games = one_number(way.pop("games", games), 1, f"{where}: games")
    for key in way:
        choose_key(key, [*ACTING, "algorithm"], where)
    algorithm = {**mapping(values.get("algorithm"), where), **mapping(way.pop("algorithm", None), f"{where}: algorithm")}
    config = make_config({**values, **way, "algorithm": algorithm}, units, where)
    check_algorithm(config, where)
    return Playing(variant, config, games)


# ----------------------------------------------------------------------------------------------------------------------
# Settings, keys and rows
# ----------------------------------------------------------------------------------------------------------------------
def portable(path: Optional[str]) -> Optional[str]:
    """A path from the repository's root, or the file's name alone: no row tells where things lie."""
    if path is None:
        return None
    resolved = Path(path).resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else resolved.name


def changed(config: TrainConfig, names: Sequence[str]) -> Dict[str, Any]:
    """Those of the settings that are not at their default: a setting that the script gains later leaves old rows valid."""
    default = TrainConfig()
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}


def training_settings(config: TrainConfig) -> Dict[str, Any]:
    """All that shapes the weights, but seed, character, data and the script itself."""
    settings = changed(config, [name for name in asdict(config) if name not in (*NOT_SETTINGS, *ACTING)])
    submission = pomdp.sha256_of_file(Path(config.submission)) if config.submission else None
    return {**settings, "rnn_hidden_dim": config.rnn_hidden_dim, "submission": submission}


def acting_settings(config: TrainConfig, games: int) -> Dict[str, Any]:
    """All that shapes the games, given the weights."""
    return {**changed(config, (*ACTING, "algorithm")), "games": games}


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def settings_hash(run: Run, playing: Playing) -> str:
    """Equal for rows that may stand for each other: same arm settings, whatever the seed, the character and the place of the data."""
    return hash_of(training_settings(run.config), acting_settings(playing.config, playing.games))


def row_config(run: Run, playing: Playing) -> Dict[str, Any]:
    """The resolved settings as a row tells them: no paths, no names."""
    config = {name: value for name, value in asdict(playing.config).items() if name not in NOT_SETTINGS}
    return {**config, "submission": portable(run.config.submission)}


def same_settings(row: Dict[str, Any], run: Run, playing: Playing) -> bool:
    """Whether the row was made with these settings, also where a default has changed since."""
    config = row_config(run, playing)
    shared = (config.keys() & row["config"].keys()) - {"submission"}  # whose content is in the hash
    return row["settings"] == settings_hash(run, playing) and all(config[name] == row["config"][name] for name in shared)


def row_key(row: Dict[str, Any]) -> Tuple[Any, ...]:
    return row["study"], row["algorithm"], row["variant"], row["seed"], ",".join(row["characters"])


def wanted_key(study: Study, run: Run, playing: Playing) -> Tuple[Any, ...]:
    return study.name, run.arm, playing.variant, run.seed, run.config.character


def read_rows(file: Path) -> List[Dict[str, Any]]:
    """Rows of a .jsonl file; a last line that was cut short while it was written is left out, with a warning."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the rows {file}: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row_key(row), row["scores"], row["settings"], row["config"], row["data"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                pomdp.warn(f"{file}: the last line was cut short and is left out")
                break
            raise UserError(f"{file}, line {number}: not a row of a study") from None
        rows.append(row)
    return rows


def append_row(file: Path, row: Dict[str, Any]) -> None:
    """One more line, on the disk before anything else happens; what a kill left of a line before is cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as out:
        out.seek(0)
        content = out.read()
        out.truncate(content.rfind(b"\n") + 1)
        out.write((json.dumps(row) + "\n").encode())
        out.flush()
        os.fsync(out.fileno())


def describe_data(store: Any, heldout_share: float) -> Dict[str, Any]:
    """How much there is to learn from and to test on. `games_sha256` is the same wherever the games lie, `fingerprint` is the store's."""
    games = pomdp.Games([store])
    heldout = games.heldout(heldout_share)
    digest = hashlib.sha256(json.dumps([games.names, games.frames.tolist()]).encode()).hexdigest()[:16]
    parts = {"training": ~heldout, "heldout": heldout}
    counts = {name: {"games": int(part.sum()), "frames": int(games.frames[part].sum())} for name, part in parts.items()}
    return {**counts, "games_sha256": digest, "fingerprint": store.meta["fingerprint"]}


def number_or_none(value: Any) -> Optional[float]:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def mean_of(values: Sequence[Any]) -> Optional[float]:
    numbers = [float(value) for value in values if number_or_none(value) is not None]
    return sum(numbers) / len(numbers) if numbers else None


def learning_curve(metrics: Sequence[Dict[str, Any]]) -> List[List[Optional[float]]]:
    """[transitions, held-out loss per action, mean training loss per action since the point before] of each evaluation."""
    curve, since = [], []
    for row in metrics:
        if "train/loss_per_action" in row:
            since.append(row["train/loss_per_action"])
        if any(name.startswith("heldout/") for name in row):
            curve.append([row["transitions"], number_or_none(row.get("heldout/loss_per_action")), mean_of(since)])
            since = []
    return curve


def loss_near_end(metrics: Sequence[Dict[str, Any]]) -> Optional[float]:
    """Training loss per action, mean of the rows of the last tenth of the transitions (at least the last row)."""
    logged = [row for row in metrics if "train/loss_per_action" in row]
    if not logged:
        return None
    last = logged[-1]["transitions"]
    return mean_of([row["train/loss_per_action"] for row in logged if row["transitions"] > 0.9 * last or row is logged[-1]])


def seconds_of_updates(metrics: Sequence[Dict[str, Any]]) -> float:
    """Seconds spent on updates, from transitions and rates: right also for a run that was stopped and went on."""
    seconds, before = 0.0, 0
    for row in metrics:
        if row.get("charts/SPS"):
            seconds += (row["transitions"] - before) / row["charts/SPS"]
            before = row["transitions"]
    return seconds


def read_metrics(folder: Path) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def commit_of(paths: Iterable[Union[str, Path]]) -> Tuple[Optional[str], Optional[bool]]:
    """The repository's commit, and whether the paths differ from it; None outside of git."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    differs = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *map(str, paths)], capture_output=True).returncode
    return commit, {0: False, 1: True}.get(differs)


def cpu_name() -> Optional[str]:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found.group(1) if found else None
    return None


def make_row(study: Study, run: Run, playing: Playing, trained: Dict[str, Any], played: Dict[str, Any], data: Dict[str, Any],
             code: "Code") -> Dict[str, Any]:  # fmt: skip
    """The line of the results file for one set of games; `trained` and `played` are what train_one and play_one wrote."""
    folder = Path(trained["folder"])
    described, metrics = pomdp.read_json(folder / "config.json"), read_metrics(folder)
    chosen = next(row for row in metrics if row["step"] == played["step"] and any(name.startswith("heldout/") for name in row))
    # Paths are left out on purpose: DATA_DIR stands for where the data lies.
    command = f"python scripts/study.py {portable(str(study.file))} --data_path DATA_DIR --only {run.arm} --seeds {run.seed}"
    command += f" --characters {run.config.character}" * (len(run.config.characters) == 1)
    by_character = {name: {character: games[name] for character, games in played["characters"].items()}
                    for name in ("scores", "depths", "turns", "lengths", "ends")}  # fmt: skip
    return {
        "study": study.name, "algorithm": run.arm, "variant": playing.variant, "seed": run.seed, "characters": run.config.characters,
        "settings": settings_hash(run, playing), "config": row_config(run, playing),
        "evaluation": {**{name: getattr(playing.config, name) for name in ACTING}, "games": playing.games,
                       "temperature": played["temperature"]},
        "commit": code.commit, "modified": code.modified, "script_sha256": described.get("script_sha256"), "command": command,
        "hardware": {**described.get("hardware", {}), "cpu": cpu_name()}, "versions": described.get("versions"),
        "rnn_hidden_dim": run.config.rnn_hidden_dim, "data": data,
        "transitions": metrics[-1]["transitions"], "best_transitions": chosen["transitions"],
        "wall_seconds": round(seconds_of_updates(metrics), 2), "evaluation_seconds": round(played["seconds"], 2),
        "heldout": {name[len("heldout/"):]: value for name, value in chosen.items() if name.startswith("heldout/")},
        "heldout_games": trained["heldout_games"], "recorded_scores": trained["recorded_scores"],
        "train_loss": loss_near_end(metrics), "curve": learning_curve(metrics), **by_character,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The processes that do the work: `study.py --train-one TASK` and `study.py --play-one TASK`
# ----------------------------------------------------------------------------------------------------------------------
def read_task(file: str) -> Tuple[Dict[str, Any], TrainConfig]:
    """A task's file (JSON) and the config in it."""
    task = pomdp.read_json(Path(file))
    if "config" not in task:
        raise UserError(f"{file} is no task of a study")
    values = dict(task["config"])
    units = values.pop("rnn_hidden_dim")
    return task, make_config(values, units, file)


def die_with_parent() -> None:
    """A study that is killed takes its work along (which saves where it is); the next one goes on from there."""
    with contextlib.suppress(OSError, AttributeError):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def finished_folder(config: TrainConfig) -> Optional[Path]:
    """The folder of this training if it was finished, by this very script, and its best weights are still there."""
    identity = pomdp.run_identity(config)
    for folder in pomdp.siblings(pomdp.run_folder(config)):
        described = pomdp.read_json(folder / "config.json")
        finished = described.get("identity") == identity and described.get("finished_at_step") == config.update_steps
        if finished and (folder / "best.pt").is_file():
            return folder
    return None


def train_one(file: str) -> None:
    """Trains as the main script does, or goes on with what was begun; writes the run's folder to the task's result."""
    task, config = read_task(file)
    pomdp.keep_freed_memory()
    folder, identity = finished_folder(config) or pomdp.train(config), pomdp.run_identity(config)
    games = {character: pomdp.Games([pomdp.open_or_build_store(config.data_path, config.store_path, character)])
             for character in config.characters}  # fmt: skip
    result = {"folder": str(folder), "identity": identity,
              "recorded_scores": {name: recorded_scores(part, config.eval_max_steps) for name, part in games.items()}}  # fmt: skip
    if (folder / "best.pt").is_file():
        content = pomdp.read_checkpoint(folder / "best.pt", identity)
        result["heldout_games"] = {name: score_heldout_games(config, part, content) for name, part in games.items()}
    pomdp.write_json(Path(task["result"]), result)


def recorded_scores(games: pomdp.Games, steps: int) -> List[float]:
    """Points of each recorded game after so many of its actions."""
    scores = []
    for store, number in games.places:
        at, rewards = store.rewards(number)
        scores.append(float(rewards[at < steps].sum()))
    return scores


def score_heldout_games(config: TrainConfig, games: pomdp.Games, content: Dict[str, Any]) -> Dict[str, Dict[str, float]]:
    """{name: held-out metrics} of each held-out game by itself: frames of one game are alike, so intervals must draw whole games.

    Each is scored in ROWS_A_GAME places of it, on an equal share of eval_heldout_frames.
    """
    device = pomdp.choose_device(config)
    precision = pomdp.choose_precision(config, device)
    algorithm = pomdp.make_algorithm(config, device)
    algorithm.model.load_state_dict(content["model"])
    heldout = games.heldout(config.heldout_share)
    frames = config.eval_heldout_frames // max(int(heldout.sum()), 1)
    autocast = functools.partial(torch.autocast, device.type, dtype=precision) if precision else contextlib.nullcontext
    found = {}
    for game in np.flatnonzero(heldout):
        loader = pomdp.ChunkLoader(games, [game], ROWS_A_GAME, config.seq_len, None, 1.0, config.clip_range)  # no metric of rewards
        metrics = pomdp.evaluate_heldout(algorithm, loader, frames, device, autocast, lambda part: [part])
        found[games.names[game]] = {name: round(metrics[name], 6) for name in OF_A_GAME if name in metrics}
    return found


def lists_of(results: Sequence[pomdp.GameResult]) -> Dict[str, Any]:
    """A set of games as a row tells of it: lists in the games' order, and how many ended how."""
    return {"scores": [result.score for result in results], "depths": [result.depth for result in results],
            "turns": [result.turns for result in results], "lengths": [result.length for result in results],
            "ends": {end: sum(result.end == end for result in results) for end in ENDS}}  # fmt: skip


def play_one(file: str) -> None:
    """Plays with the weights of the task; writes every game's score, depth, turns, length and how the games ended."""
    task, config = read_task(file)
    stop: List[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: stop.append(number))

    def check() -> None:
        if stop:
            raise pomdp.Stopped(stop[0])

    pomdp.keep_freed_memory()
    begin = time.perf_counter()
    device = pomdp.choose_device(config)
    algorithm = pomdp.make_algorithm(config, device)
    content = pomdp.read_checkpoint(Path(task["weights"]), task["identity"])
    algorithm.model.load_state_dict(content["model"])
    algorithm.model.backbone.acting_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.eval_precision]
    played = {}
    pool = pomdp.GamePool(config.eval_processes, config.eval_workers)
    try:
        for character in config.characters:
            results = pomdp.play_games(pool, algorithm.model, character, task["games"], config.eval_seed, config.eval_max_steps, device,
                                       config.eval_clear_state, check)  # fmt: skip
            played[character] = lists_of(results)
    finally:
        pool.close()
    temperature = getattr(getattr(algorithm, "hyper", None), "temperature", None)
    pomdp.write_json(Path(task["result"]), {"step": content["step"], "seconds": time.perf_counter() - begin, "temperature": temperature,
                                            "characters": played})  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The study
# ----------------------------------------------------------------------------------------------------------------------
class TaskFailed(Exception):
    """A process of the study ended with an error; the argument is its last line."""


class Code:
    """A copy of the scripts that the study runs, made as it begins: edits while it runs must not get into some of its runs."""

    def __init__(self, folder: Path, submissions: Sequence[str]) -> None:
        places = {"custom_nethack_pomdp.py": Path(pomdp.__file__), "scripts/study.py": Path(__file__)}
        self.submissions = {}
        for submission in submissions:
            self.submissions[submission] = name = f"submissions/{pomdp.sha256_of_file(Path(submission))[:8]}/{Path(submission).name}"
            places[name] = Path(submission)
        contents = {name: path.read_bytes() for name, path in places.items()}
        self.folder = folder / f"code-{hash_of({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})[:8]}"
        for name, content in contents.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            pomdp.write_atomically(self.folder / name, methodcaller("write", content))
        self.commit, self.modified = commit_of(places.values())
        self.script = self.folder / "scripts" / "study.py"

    def submission(self, path: Optional[str]) -> Optional[str]:
        return str(self.folder / self.submissions[path]) if path else None


class Processes:
    """Starts one process at a time and hands a signal on to it, so that it saves before this one ends."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self.current: Optional[subprocess.Popen] = None
        self.stop_signal: Optional[int] = None
        self.before = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        self.stop_signal = number
        if self.current is not None:
            self.current.send_signal(signal.SIGTERM)

    def check(self) -> None:
        if self.stop_signal is not None:
            raise pomdp.Stopped(self.stop_signal)

    def run(self, mode: str, task: Dict[str, Any], file: Path, log: Path) -> Dict[str, Any]:
        """`study.py MODE FILE` on the task; its result. Raises TaskFailed, or Stopped when a signal came."""
        self.check()
        result = Path(task["result"])
        result.unlink(missing_ok=True)
        pomdp.write_json(file, task)
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled", **os.environ}
        with open(log, "a", encoding="utf-8") as out:
            start = out.tell()
            self.current = subprocess.Popen([sys.executable, str(self.script), mode, str(file)], stdout=out, stderr=out,
                                            stdin=subprocess.DEVNULL, env=environment)  # fmt: skip
        code = self.current.wait()
        self.current = None
        self.check()
        if code or not result.exists():
            lines = log.read_bytes()[start:].decode("utf-8", "replace").strip().splitlines()
            raise TaskFailed(f"{lines[-1] if lines else 'no output'} (exit code {code}; all of it: {log})")
        content = pomdp.read_json(result)
        result.unlink()
        file.unlink()
        return content

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class Pace:
    """Mean seconds of a training and of a game, from rows and from what this process did: an estimate of the time left."""

    def __init__(self) -> None:
        self.trainings: List[float] = []
        self.games: List[Tuple[int, float]] = []

    def left(self, trainings: int, games: int) -> str:
        if (trainings and not self.trainings) or (games and not self.games):
            return "time left not known yet"
        a_game = sum(seconds for _, seconds in self.games) / max(sum(count for count, _ in self.games), 1)
        seconds = trainings * (mean_of(self.trainings) or 0.0) + games * a_game
        return f"about {duration(seconds)} left"


def summary_line(row: Dict[str, Any]) -> str:
    heldout = row["heldout"]
    parts = [f"held-out loss {heldout['loss_per_action']:.4f}" if "loss_per_action" in heldout else f"held-out {heldout}"]
    if "accuracy" in heldout:
        parts.append(f"accuracy {heldout['accuracy']:.3f}")
    for character, scores in row["scores"].items():
        values = np.array(scores) / pomdp.AUTOASCEND_MEAN_SCORE[character]
        low, high = pomdp.bootstrap_interval(values)
        parts.append(f"{character} score {np.mean(scores):.0f}, normalized {values.mean():.4f} ({low:.4f} to {high:.4f})")
    return ", ".join(parts)


class Todo(NamedTuple):
    run: Run
    missing: List[Playing]


def open_data(study: Study, runs: Sequence[Run], data_path: Optional[str], store_path: str) -> Dict[Tuple[str, float], Dict[str, Any]]:
    """{(character, heldout_share): describe_data}. Builds the stores, so that the trainings find them; UserError without held-out games."""
    described, stores = {}, {}
    for config in (run.config for run in runs):
        for character in config.characters:
            if character not in stores:
                stores[character] = pomdp.open_or_build_store(data_path, store_path, character)
            if (character, config.heldout_share) not in described:
                described[character, config.heldout_share] = data = describe_data(stores[character], config.heldout_share)
                if not data["heldout"]["games"]:
                    raise UserError(f"a study needs held-out games, but there is only one game of {character}")
    return described


def data_of(config: TrainConfig, described: Dict[Tuple[str, float], Dict[str, Any]]) -> Dict[str, Any]:
    return {character: described[character, config.heldout_share] for character in config.characters}


def same_data(row: Dict[str, Any], data: Optional[Dict[str, Any]]) -> bool:
    """Whether the row was made from these games; a dry run has no data and takes every row."""
    return data is None or {name: part["games_sha256"] for name, part in row["data"].items()} == {
        name: part["games_sha256"] for name, part in data.items()
    }


def select(study: Study, args: argparse.Namespace) -> List[Run]:
    """The runs that --only, --seeds and --characters leave."""
    wanted = {name: [part.strip() for part in text.split(",") if part.strip()] if text is not None else None
              for name, text in (("arm", args.only), ("seed", args.seeds), ("character", args.characters))}  # fmt: skip
    values = {"arm": lambda run: [run.arm], "seed": lambda run: [str(run.seed)], "character": lambda run: run.config.characters}
    runs = study.runs
    for name, chosen in wanted.items():
        if chosen is None:
            continue
        known = sorted({value for run in study.runs for value in values[name](run)})
        for value in chosen:
            if value not in known:
                raise UserError(f"the study has no {name} {value!r}; there are {', '.join(known)}")
        runs = [run for run in runs if set(values[name](run)) & set(chosen)]
    if not runs:
        raise UserError("--only, --seeds and --characters leave nothing of the study")
    return runs


def plan(study: Study, runs: Sequence[Run], rows: Sequence[Dict[str, Any]],
         described: Optional[Dict[Tuple[str, float], Dict[str, Any]]]) -> Tuple[List[Todo], int]:  # fmt: skip
    """What is still to do, and how many rows there are with the same name but other settings or data."""
    by_key: Dict[Tuple[Any, ...], List[Dict[str, Any]]] = {}
    for row in rows:
        by_key.setdefault(row_key(row), []).append(row)
    todo, stale = [], 0
    for run in runs:
        data = data_of(run.config, described) if described is not None else None
        missing = []
        for playing in run.playings:
            there = by_key.get(wanted_key(study, run, playing), [])
            good = [row for row in there if same_settings(row, run, playing) and same_data(row, data)]
            stale += len(there) - len(good)
            if not good:
                missing.append(playing)
        todo.append(Todo(run, missing))
    return todo, stale


def run_line(run: Run, playing: Playing) -> str:
    return f"{run.arm}{'' if playing.variant == DEFAULT_VARIANT else '/' + playing.variant}, {run.config.character}, seed {run.seed}"


def announce(study: Study, todo: Sequence[Todo], stale: int, rows: Sequence[Dict[str, Any]], out: Path, units: int) -> None:
    wanted, missing = sum(len(item.run.playings) for item in todo), sum(len(item.missing) for item in todo)
    pomdp.say(f"study {study.name}: {len(todo)} runs, {wanted} rows; {wanted - missing} rows are there, {missing} to make, in {out}")
    if units != BENCHMARK_UNITS:
        pomdp.say(f"its LSTM has {units} units a layer, the benchmark's has {BENCHMARK_UNITS}: no scores to compare with the benchmark's")
    if stale:
        pomdp.warn(f"{stale} rows in {out} have these names but other settings or data: they are stale, kept, and made anew beside them")
    script = pomdp.sha256_of_file(Path(pomdp.__file__))
    older = sum(row.get("study") == study.name and row.get("script_sha256") != script for row in rows)
    if older:
        pomdp.warn(f"{older} rows of this study were made by another version of custom_nethack_pomdp.py (see their commit); "
                   "they count as done")  # fmt: skip


def delete_weights(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


CHECKPOINTS = ("last.pt", "last.prev.pt")


def do_run(item: Todo, study: Study, described: Dict[Tuple[str, float], Dict[str, Any]], args: argparse.Namespace, processes: Processes,
           pace: Pace, code: Code) -> Iterator[Tuple[Playing, Dict[str, Any]]]:  # fmt: skip
    """Trains if need be, plays what is missing; yields (playing, row), the row written. Raises TaskFailed."""
    run, data = item.run, data_of(item.run.config, described)
    digests = {character: part["games_sha256"] for character, part in data.items()}
    # Settings and data enter the folder's name: what is found there can be gone on with, and nothing else can.
    name = f"{run.arm}-{hash_of(training_settings(run.config), digests)[:8]}"
    places = dict(data_path=args.data_path, store_path=args.store_path, checkpoints_path=args.runs_path, name=name, resume=True,
                  submission=code.submission(run.config.submission))  # fmt: skip
    config = located(run.config, places)
    first = pomdp.run_folder(config)
    first.parent.mkdir(parents=True, exist_ok=True)
    log, task_file = first.with_name(first.name + ".log"), first.with_name(first.name + ".task.json")
    result = str(first.with_name(first.name + ".result.json"))
    begin = time.perf_counter()
    trained = processes.run("--train-one", {"config": asdict(config), "result": result}, task_file, log)
    folder = Path(trained["folder"])
    pace.trainings.append(time.perf_counter() - begin)
    delete_weights(folder, CHECKPOINTS)  # a finished run needs them no more, and they are six times as large as its best weights
    if not (folder / "best.pt").is_file():
        raise TaskFailed(f"no held-out loss was finite, so there are no best weights ({log})")
    for playing in item.missing:
        task = {"config": asdict(located(playing.config, places)), "weights": str(folder / "best.pt"), "games": playing.games,
                "identity": trained["identity"], "result": result}  # fmt: skip
        played = processes.run("--play-one", task, task_file, log)
        pace.games.append((playing.games * len(config.characters), played["seconds"]))
        row = make_row(study, run, playing, trained, played, data, code)
        append_row(args.out, row)
        yield playing, row
    if not args.keep:
        delete_weights(folder, ("best.pt",))


def located(config: TrainConfig, places: Dict[str, Any]) -> TrainConfig:
    """The config with the paths and the name of this machine's run."""
    units = config.rnn_hidden_dim
    moved = TrainConfig(**{**asdict(config), "rnn_hidden_dim": BENCHMARK_UNITS, **places})
    moved.rnn_hidden_dim = units
    return moved


def run_study(study: Study, args: argparse.Namespace) -> int:
    """0 when all rows are there at the end, 1 when some failed."""
    runs = select(study, args)
    rows = read_rows(args.out) if args.out.exists() else []
    described = None if args.dry_run else open_data(study, runs, args.data_path, args.store_path)
    todo, stale = plan(study, runs, rows, described)
    announce(study, todo, stale, rows, args.out, runs[0].config.rnn_hidden_dim)
    if args.dry_run:
        for item in todo:
            for playing in item.run.playings:
                print(f"  {'to make' if playing in item.missing else 'there  '}  {run_line(item.run, playing)}, {playing.games} games")
        return 0
    assert described is not None  # this is no dry run
    todo = [item for item in todo if item.missing]
    pace = Pace()
    for row in rows:
        if row["study"] == study.name:
            pace.games.append((sum(map(len, row["scores"].values())), row["evaluation_seconds"]))
            if row["variant"] == DEFAULT_VARIANT:
                pace.trainings.append(row["wall_seconds"])
    code = Code(study_folder(study, args), sorted({item.run.config.submission for item in todo if item.run.config.submission}))
    failures: List[str] = []
    total, made = sum(len(item.missing) for item in todo), 0
    processes = Processes(code.script)
    try:
        for position, item in enumerate(todo):
            games_left = sum(playing.games * len(one.run.config.characters) for one in todo[position:] for playing in one.missing)
            try:
                for playing, row in do_run(item, study, described, args, processes, pace, code):
                    made += 1
                    games_left -= playing.games * len(item.run.config.characters)
                    left = pace.left(len(todo) - position - 1, games_left)
                    pomdp.say(f"[{made + len(failures)}/{total}] {run_line(item.run, playing)}: {summary_line(row)}; "
                              f"{duration(row['wall_seconds'])} of updates, {duration(row['evaluation_seconds'])} of games; "
                              f"{left}")  # fmt: skip
            except TaskFailed as failure:
                failures.append(f"{item.run.arm}, {item.run.config.character}, seed {item.run.seed}: {failure}")
                pomdp.warn(f"failed: {failures[-1]}")
    finally:
        processes.close()
    if failures:
        print(f"study: error: {len(failures)} of {len(todo)} runs failed, the first: {failures[0]}", file=sys.stderr)
        return 1
    pomdp.say(f"study {study.name}: all rows are in {args.out}" if len(runs) == len(study.runs) else f"done; rows are in {args.out}")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """Mistakes become UserError, one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", metavar="STUDY.yaml")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="file of rows (default: scripts/results/<study>.jsonl)")
    parser.add_argument("--data_path", help="games to learn from, as for custom_nethack_pomdp.py")
    parser.add_argument("--store_path", default="runs/stores", help="folder of chunk stores (default: %(default)s)")
    parser.add_argument("--runs_path", default="runs/studies", help="folder of runs, one folder a study in it (default: %(default)s)")
    parser.add_argument("--only", metavar="ARM,ARM", help="these arms only")
    parser.add_argument("--seeds", metavar="SEED,SEED", help="these seeds only")
    parser.add_argument("--characters", metavar="NAME,NAME", help="these characters only")
    parser.add_argument("--keep", action="store_true", help="keep the best weights (best.pt) when their rows are written")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and what is there; do nothing")
    parser.add_argument("--train-one", metavar="TASK", help="used by the study itself: one training")
    parser.add_argument("--play-one", metavar="TASK", help="used by the study itself: one set of games")
    args = parser.parse_args(argv)
    if not (args.study or args.train_one or args.play_one):
        raise UserError("which study? For example scripts/studies/cpu_small.yaml")
    return args


def study_folder(study: Study, args: argparse.Namespace) -> Path:
    return Path(args.runs_path).expanduser() / f"{study.name}-v0"


def with_claim(study: Study, args: argparse.Namespace) -> int:
    """Runs the study while holding a lock on its folder of runs."""
    folder = study_folder(study, args)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {error.filename}: {error.strerror}; choose --runs_path and --out") from None
    lock = pomdp.claim(folder)
    if lock is None:
        raise UserError(f"the study {study.name} is running already in {folder}")
    try:
        return run_study(study, args)
    finally:
        os.close(lock)


def main(argv: Optional[Sequence[str]] = None) -> int:
    try:
        args = parse(argv)
        if args.train_one or args.play_one:
            die_with_parent()
            train_one(args.train_one) if args.train_one else play_one(args.play_one)
            return 0
        study = read_study(Path(args.study))
        args.out = (args.out or ROOT / "scripts" / "results" / f"{study.name}.jsonl").expanduser()
        return run_study(study, args) if args.dry_run else with_claim(study, args)
    except UserError as error:
        print("study: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except pomdp.Stopped as stopped:
        print("study: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
