# SPDX-License-Identifier: MIT
"""Runs a study: arms (algorithms, or ours with one change) x characters x seeds, from one file.

    python scripts/study.py scripts/studies/cpu_small.yaml --dry_run      # what there is to do
    python scripts/study.py scripts/studies/cpu_small.yaml --data_path DATA_DIR
    python scripts/study.py scripts/studies/tiny.yaml --data_path tests/data/nle_data   # minutes

The same command again goes on where it stopped; --only ours,bc --seeds 1 makes a part of it. All
arms have one budget.

Every training is a run of custom_nethack_pomdp.py, resumed if it was cut off. The weights that play
are those of the lowest held-out loss (best.pt), never those of the best score; they are scored as
`--evaluate` does. Every finished set of games is one line of JSON in
scripts/results/<study>.jsonl; a line that is there is not made again. The runs go seed by seed and
character by character over all arms, so that arms can be compared early.

A study's file (scripts/studies/*.yaml):

    name            names the rows, their file and the folder of runs
    base            settings of custom_nethack_pomdp.py that all arms share; rnn_hidden_dim may be
                    below 2048 here
    characters      a list; each arm learns each of them separately ("mon-hum-neu,val-hum-neu" is
                    one agent for both)
    seeds, games    train_seeds; games played with each character
    arms            {arm: settings that differ}; `seeds` and `games` may differ too
    evaluations     {arm: {variant: settings}}: other ways to act with the same weights (eval_*,
                    algorithm, games)
    phases          numbers of frames at which the phases of a held-out game end (default 1000,
                    5000, 10000)

A row tells what was run: study, algorithm (the arm), variant, seed, characters, config, evaluation,
settings (a hash of all that shapes the result), data, script_sha256, submission_sha256, commit,
versions, hardware, command. And what came of it: parameters, transitions, best_transitions (seen by
the weights that played), wall_seconds (updates alone), evaluation_seconds, curve ([transitions,
held-out loss, mean training loss since the point before]), heldout (the run's metrics; with
game_frames on these frames alone), heldout_games (each from its first frame on, with the state
carried: loss_per_action and accuracy, if the algorithm's info has them, up to the last phase's end
and by phase), recorded_scores (points of the recorded games after eval_max_steps actions), and by
character scores, depths, max_depths (deepest levels), levels (of experience), turns, lengths,
causes (of death, in NetHack's words) and ends ("no progress" apart from deaths).
"""

import fcntl
import hashlib
import json
import os
import re
import sys
import time
import traceback
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
import numpy as np
import torch
import yaml
from shared import DEFAULT_VARIANT, ROOT, Parser, Row, is_row, newest_games, read_games, read_rows

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import TrainConfig, UserError, settings_where

OPTIONAL = {"base": {}, "evaluations": {}, "phases": [1_000, 5_000, 10_000]}
KINDS = {
    "name": str,
    "base": dict,
    "characters": list,
    "seeds": list,
    "games": int,
    "arms": dict,
    "evaluations": dict,
    "phases": list,
}
NAME = re.compile(r"[\w.+-]+")  # of a study or an arm
# For the study itself or its command line to set.
OURS = (
    "character",
    "train_seed",
    "data_path",
    "store_path",
    "checkpoints_path",
    "group",
    "name",
    "version",
    "resume",
    "evaluate",
    "eval_episodes",
)
# Not in a row's config: what shapes no result (a device only rounds otherwise), and what a row
# counts apart.
NOT_SETTINGS = settings_where(affects_results=False) | {
    "device",
    "character",
    "train_seed",
    "evaluate",
    "eval_episodes",
    "submission",
}
ACTING = ("eval_processes", "eval_max_steps", "eval_precision", "eval_seed")  # how games are played
NAMES = ("study", "algorithm", "variant", "seed", "characters")  # of a row
NEEDED = {*NAMES, "settings", "config", "data", "script_sha256"}
CHUNK = 100  # frames of a held-out game that are scored at once
SCORED = ("loss_per_action", "accuracy")  # of a held-out game, if the algorithm's info has them
Settings = Dict[str, Any]
Code = Dict[str, Optional[str]]  # {"script_sha256": ..., "submission_sha256": ...}


class Run(NamedTuple):
    """One training, and the ways its weights play: {variant: config}, first the arm's own."""

    arm: str
    config: TrainConfig
    ways: Dict[str, TrainConfig]
    code: Code  # hashes, as they were when the study began
    order: Tuple[int, int]  # places of its seed and of its character

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.config.character}, seed {self.config.train_seed}"


class Task(NamedTuple):
    run: Run
    missing: List[str]  # variants
    data: Row  # {character: description}


# --- the study's file
def make_config(file: Path, parts: Sequence[Settings]) -> TrainConfig:
    """What the main script makes of these settings, later over earlier ones; `algorithm` is merged
    key by key."""
    values: Settings = {}
    algorithm: Settings = {}
    for part in parts:
        values.update(part)
        algorithm.update(part.get("algorithm", {}))
    values["algorithm"] = algorithm
    # a submission lies there, or beside the study's file
    for folder in (ROOT, file.resolve().parent):
        submission = folder / values.get("submission", "")
        if submission.is_file():
            values["submission"] = str(submission)
    arguments = []
    for name, value in values.items():
        if not isinstance(value, str):
            value = json.dumps(value, default=str)
        arguments.append(f"--{name}={value}")
    return pomdp.parse_config(arguments)


def read_arm(content: Settings, file: Path, arm: str) -> List[Run]:
    """Raises what read_study makes one line of."""
    base = content["base"]
    own = dict(content["arms"][arm] or {})
    seeds = own.pop("seeds", content["seeds"])
    games = own.pop("games", content["games"])
    if not NAME.fullmatch(arm) or {*OURS} & {*base, *own}:
        told = "its name takes letters, digits and _ . + -, its settings none of "
        raise UserError(told + ", ".join(OURS))
    evaluations = {DEFAULT_VARIANT: {}, **content["evaluations"].get(arm, {})}
    for variant, way in evaluations.items():
        if {*way} - {*ACTING, "algorithm", "games"}:
            raise UserError(
                f"evaluation {variant} takes {', '.join(ACTING)}, algorithm and games alone"
            )
    runs = []
    for place, seed in enumerate(dict.fromkeys(seeds)):
        for number, character in enumerate(dict.fromkeys(content["characters"])):
            mine = {"train_seed": seed, "character": character, "group": content["name"]}
            ways = {}
            for variant, way in evaluations.items():
                last = {"games": games, **way, **mine}
                last["eval_episodes"] = last.pop("games")
                ways[variant] = make_config(file, [base, own, last])
            config = replace(ways[DEFAULT_VARIANT], eval_episodes=0)
            runs.append(Run(arm, config, ways, code_of(config), (place, number)))
    for config in runs[0].ways.values():
        if min(config.eval_episodes, config.eval_heldout_frames, config.heldout_share) == 0:
            raise UserError("games, eval_heldout_frames and heldout_share must be above 0")
        # complains now
        pomdp.make_algorithm(replace(config, rnn_hidden_dim=8, device="cpu"), torch.device("cpu"))
    return runs


def check_content(content: Settings) -> None:
    """Raises UserError where the parts of a study's file are not what KINDS says."""
    for name in [*KINDS, *content]:
        value = content.get(name)
        if type(value) is not KINDS.get(name) or not (value or name in OPTIONAL):
            kinds = ", ".join(f"{name} ({kind.__name__})" for name, kind in KINDS.items())
            raise UserError(
                f"{name} is missing, empty, unknown or of another type; a study has {kinds}"
            )
    phases = content["phases"]
    start = 0
    for stop in phases:
        if stop % CHUNK or stop <= start:
            raise UserError(f"phases takes rising multiples of {CHUNK}, not {phases}")
        start = stop
    if {*content["evaluations"]} - {*content["arms"]} or not NAME.fullmatch(content["name"]):
        raise UserError("name takes letters, digits and _ . + -; evaluations takes names of arms")


def read_study(file: Path) -> Tuple[List[int], List[Run]]:
    """-> phases, and the runs in the order in which they are made. Raises UserError with one line
    for any mistake."""
    where = str(file)
    runs: List[Run] = []
    same: Dict[str, str] = {}
    try:
        content = {**OPTIONAL, **yaml.safe_load(file.read_text(encoding="utf-8"))}
        check_content(content)
        for arm in content["arms"]:
            where = f"{file}: arm {arm}"
            found = read_arm(content, file, arm)
            runs += found
            for variant, config in found[0].ways.items():
                name = f"{arm}, {variant}"
                one_game = replace(config, eval_episodes=1)  # their number makes no other arm
                other = same.setdefault(settings_hash(one_game, content["phases"]), name)
                if other != name:
                    raise UserError(f"{variant} changes nothing: it has the settings of {other}")
    except (UserError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {error}") from None
    return content["phases"], sorted(runs, key=lambda run: run.order)


SELECT: Dict[str, Callable[[Run], Set[str]]] = {
    "only": lambda run: {run.arm},
    "seeds": lambda run: {str(run.config.train_seed)},
    "characters": lambda run: {*run.config.characters},
}


def select(runs: List[Run], args: Namespace) -> List[Run]:
    """Those that --only, --seeds and --characters leave."""
    every = runs
    for option, value_of in SELECT.items():
        wanted = set(getattr(args, option) or [])
        known = set().union(*map(value_of, every))
        unknown = ", ".join(wanted - known)
        if unknown:
            raise UserError(f"--{option}: {unknown} is not among {', '.join(sorted(known))}")
        if wanted:
            runs = [run for run in runs if wanted & value_of(run)]
    return runs


# --- what a row comes from
def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_of(config: TrainConfig) -> Code:
    code: Code = {"script_sha256": pomdp.__file__, "submission_sha256": config.submission}
    for name, file in code.items():
        if file:
            code[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return code


def check_code(run: Run) -> None:
    if code_of(run.config) != run.code:
        raise UserError(
            "the script or the submission was changed since the study began; start it again"
        )


def row_config(config: TrainConfig) -> Settings:
    return {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}


def settings_hash(config: TrainConfig, phases: List[int]) -> str:
    """Equal for rows that may stand beside each other, whatever seed, character and place of the
    data. Settings at their default are left out: one that the script gains later leaves old rows
    valid."""
    default = row_config(TrainConfig())
    changed = {name: value for name, value in row_config(config).items() if value != default[name]}
    return hash_of(changed, code_of(config)["submission_sha256"], config.eval_episodes, phases)


def describe_data(store: Any, heldout_share: float) -> Row:
    """How much there is to learn from and to test on. `games_sha256` is the same wherever the games
    lie."""
    heldout = pomdp.choose_heldout(store.names, heldout_share)
    if not heldout.any():
        raise UserError(
            f"a study needs held-out games, and there is only one game in {store.folder}"
        )
    found: Row = {}
    for name, part in (("training", ~heldout), ("heldout", heldout)):
        found[name] = {"games": int(part.sum()), "frames": int(store.frames[part].sum())}
    found["games_sha256"] = hash_of(store.names.tolist(), store.frames.tolist())
    found["fingerprint"] = hash_of(store.index["identities"].tolist())
    return found


def is_valid(row: Row, config: TrainConfig, phases: List[int], data: Row) -> bool:
    """Whether the row was made with these settings, also where a default has changed since, and
    from these games."""
    for name, value in row_config(config).items():
        if row["config"].get(name, value) != value:
            return False
    for name, part in data.items():
        if row["data"][name]["games_sha256"] != part["games_sha256"]:
            return False
    return row["settings"] == settings_hash(config, phases)


# --- what a row tells
def learning_curve(metrics: Sequence[Row]) -> List[List[Optional[float]]]:
    """[transitions, held-out loss per action, mean training loss per action since the last point],
    by evaluation."""
    curve = []
    losses = []
    for line in metrics:
        if line.get("train/loss_per_action") is not None:
            losses.append(line["train/loss_per_action"])
        if "heldout/frames" in line:
            mean = None
            if losses:
                mean = sum(losses) / len(losses)
            curve.append([line["transitions"], line.get("heldout/loss_per_action"), mean])
            losses = []
    return curve


def means_of(sums: Row) -> Row:
    """Sums over frames, and their number -> means."""
    count = max(sums["frames"], 1.0)
    means = {name: round(sums[name] / count, 6) for name in sums}
    return {**means, "frames": sums["frames"]}


def score_games(algorithm: Any, config: TrainConfig, store: Any, phases: List[int]) -> Row:
    """{name: metrics} of each held-out game by itself, since intervals must draw whole games:
    frames of one are alike. A phase is what the sums over the frames up to its end have more than
    those up to its beginning."""
    games = pomdp.Games([store])
    device = pomdp.choose_device(config)
    precision = pomdp.choose_precision(config, device)
    config = replace(config, seq_len=CHUNK)
    found = {}
    for game in np.flatnonzero(games.heldout(config.heldout_share)):
        # The reward scale is no matter, since no metric of rewards is kept; one row begins with the
        # game's first frame.
        loader = pomdp.ChunkLoader(games, np.array([game]), config, 1, 1.0)
        by_phase = {}
        start = 0
        sums: Row = {}
        for stop in phases:
            if start < games.frames[game]:
                means = pomdp.evaluate_heldout(algorithm, loader, stop, device, precision)
                before = sums
                sums = {"frames": means["frames"]}
                for name in SCORED:
                    if name in means:
                        sums[name] = means[name] * means["frames"]
                phase = {name: sums[name] - before.get(name, 0.0) for name in sums}
                by_phase[str(stop)] = means_of(phase)
            start = stop
        found[str(store.names[game])] = {**means_of(sums), "phases": by_phase}
    return found


def recorded_scores(store: Any, steps: int) -> List[float]:
    """Points of each recorded game after so many of its actions."""
    scores = []
    for game in range(len(store.frames)):
        at, values = store.rewards(game)
        scores.append(float(values[at < steps].sum()))
    return scores


# --- the study
def check_algorithm(run: Run, store: Any) -> None:
    """Raises UserError for an algorithm without a held-out loss, by which best.pt is chosen: before
    the training, which would be in vain."""
    config = replace(run.config, rnn_hidden_dim=8, device="cpu", seq_len=CHUNK)
    device = torch.device("cpu")
    algorithm = pomdp.make_algorithm(config, device)
    loader = pomdp.ChunkLoader(pomdp.Games([store]), np.array([0]), config, 1, 1.0)
    pomdp.check_actions(algorithm, loader)
    with pomdp.noting_signals():
        means = pomdp.evaluate_heldout(algorithm, loader, CHUNK, device)
    if not {"loss", "loss_per_action"} & means.keys():
        raise UserError("the algorithm's info has neither loss_per_action nor loss")


def train(task: Task, args: Namespace) -> Path:
    """Trains, or goes on with what was begun -> the best weights."""
    run = task.run
    check_code(run)
    # Settings and data enter the folder's name: what is found there can be gone on with, and
    # nothing else can.
    games = [part["games_sha256"] for part in task.data.values()]
    digest = hash_of(settings_hash(run.config, args.phases), games)
    config = replace(
        run.config,
        data_path=args.data_path,
        store_path=args.store_path,
        checkpoints_path=args.runs_path,
        name=f"{run.arm}-{digest[:8]}",
        resume=True,
    )
    best = pomdp.train(config) / "best.pt"
    if not best.is_file():
        raise UserError("no held-out loss was finite, so there are no best weights")
    return best


def describe_run(task: Task, best: Path, stores: Row, args: Namespace) -> Row:
    """What all rows of a run share."""
    algorithm, config, step = pomdp.load_agent(best)
    metrics = read_rows(best.with_name("metrics.jsonl"))
    described = json.loads(best.with_name("config.json").read_text(encoding="utf-8"))
    arm = task.run.arm
    command = f"python scripts/study.py scripts/studies/{args.study.name} --data_path DATA_DIR"
    command += f" --only {arm} --seeds {config.train_seed} --characters {config.character}"
    row: Row = {
        "study": config.group,
        "algorithm": arm,
        "seed": config.train_seed,
        "characters": config.characters,
        **task.run.code,
        "commit": described["commit"],
        "hardware": described["hardware"],
        "versions": described["versions"],
        "command": command,
        "parameters": sum(parameter.numel() for parameter in algorithm.model.parameters()),
        "rnn_hidden_dim": config.rnn_hidden_dim,
        "data": task.data,
        "curve": learning_curve(metrics),
        "transitions": metrics[-1]["transitions"],
        "heldout": {},
        "heldout_games": {},
    }
    seconds = 0.0
    for line in metrics:
        seconds += sum(line.get(name, 0.0) for name in pomdp.TIMES)
        if line["step"] == step and "heldout/frames" in line and not row["heldout"]:
            row["best_transitions"] = line["transitions"]
            for name, value in line.items():
                if name.startswith("heldout/"):
                    row["heldout"][name[8:]] = value
    row["wall_seconds"] = round(seconds, 2)
    with pomdp.noting_signals():
        for name in config.characters:
            scored = score_games(algorithm, config, stores[name], args.phases)
            row["heldout_games"][name] = scored
    return row


def play(row: Row, way: TrainConfig, best: Path, stores: Row, phases: List[int]) -> None:
    """Adds to the row what comes of these weights when they play in this way."""
    begin = time.perf_counter()
    played = pomdp.evaluate_checkpoint(replace(way, evaluate=str(best)))
    row["evaluation_seconds"] = round(time.perf_counter() - begin, 2)
    row["settings"] = settings_hash(way, phases)
    row["config"] = {**row_config(way), "submission": None}
    if way.submission:
        row["config"]["submission"] = Path(way.submission).name
    row["evaluation"] = {name: getattr(way, name) for name in ACTING}
    row["evaluation"]["games"] = way.eval_episodes
    row["recorded_scores"] = {}
    for name in way.characters:
        row["recorded_scores"][name] = recorded_scores(stores[name], way.eval_max_steps)
    row.update(read_games(newest_games(played)))


def do_run(task: Task, stores: Row, args: Namespace) -> Iterator[Row]:
    """Trains, or goes on with what was begun, and plays what is missing -> rows."""
    check_algorithm(task.run, stores[task.run.config.characters[0]])
    best = train(task, args)
    row = describe_run(task, best, stores, args)
    for variant in task.missing:
        row["variant"] = variant
        play(row, task.run.ways[variant], best, stores, args.phases)
        check_code(task.run)
        yield row
    if not args.keep:
        for path in best.parent.glob("*.pt"):
            path.unlink()


def rows_in(file: Any) -> List[Row]:
    """Rows of an open .jsonl file; what a kill left of a last line is cut off, and a whole one gets
    its newline."""
    file.seek(0)
    *lines, last = file.read().split(b"\n")
    if is_row(last):
        lines.append(last)
        file.write(b"\n")
    elif last:
        pomdp.warn(f"{file.name}: the last line was cut short and is left out")
        file.truncate(file.tell() - len(last))
    try:
        rows = [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError):
        rows = [{}]
    for row in rows:
        if NEEDED - row.keys():
            raise UserError(f"{file.name} holds a line that is not a row of a study")
    return rows


def plan(runs: Sequence[Run], rows: Sequence[Row], stores: Row, args: Namespace) -> List[Task]:
    """Runs of which rows are missing; says what there is to do."""
    tasks = []
    stale = older = total = 0
    for run in runs:
        config = run.config
        task = Task(run, [], {})
        if stores:
            for name in config.characters:
                task.data[name] = describe_data(stores[name], config.heldout_share)
        for variant, way in run.ways.items():
            key = [config.group, run.arm, variant, config.train_seed, config.characters]
            there = [row for row in rows if key == [row[name] for name in NAMES]]
            valid = [row for row in there if is_valid(row, way, args.phases, task.data)]
            now = run.code["script_sha256"]
            older += any(row["script_sha256"] != now for row in valid)
            if not valid:
                task.missing.append(variant)
                stale += bool(there)
        pomdp.say(f"{run.name}: to make: {', '.join(task.missing) or 'nothing'}")
        if task.missing:
            tasks.append(task)
            total += len(task.missing)
    pomdp.say(f"{total} rows to make in {args.out}")
    if stale or older:
        told = (
            f"{older} rows of another version of custom_nethack_pomdp.py count as done, {stale} of"
        )
        told += " other settings or data are kept, with new ones below (--out takes another file)"
        pomdp.warn(told)
    return tasks


def run_study(runs: List[Run], args: Namespace, file: Any) -> int:
    """0 when all rows are there at the end, 1 when some failed."""
    rows = rows_in(file)
    runs = select(runs, args)
    stores: Row = {}
    for run in runs:
        for name in run.config.characters:
            if name not in stores and not args.dry_run:
                stores[name] = pomdp.open_or_build_store(args.data_path, args.store_path, name)
    tasks = plan(runs, rows, stores, args)
    if args.dry_run:
        return 0
    total = sum(len(task.missing) for task in tasks)
    made = 0
    failures = []
    for task in tasks:
        try:
            for row in do_run(task, stores, args):
                file.write((json.dumps(row) + "\n").encode())
                os.fsync(file.fileno())
                made += 1
                pomdp.say(f"[{made}/{total}] {task.run.name}, {row['variant']}")
        except Exception as error:  # noqa: PERF203  of this run alone: the others go on
            failures.append(f"{task.run.name}: {error!r}")
            pomdp.warn(f"{failures[-1]}\n{traceback.format_exc()}")
    if not failures:
        return 0
    told = f"{len(failures)} of {len(tasks)} runs failed, the first: {failures[0]}"
    print(f"study: error: {told}", file=sys.stderr)
    return 1


def study(args: Namespace) -> int:
    args.phases, runs = read_study(args.study)
    args.out = args.out or ROOT / "scripts" / "results" / f"{runs[0].config.group}.jsonl"
    path = args.out
    if args.dry_run and not path.exists():
        path = os.devnull
    with open(path, "a+b", buffering=0) as file:
        try:
            pomdp.lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another study is writing to {path}; --out takes another file"
            ) from None
        return run_study(runs, args, file)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml")
    add("--out", type=Path, metavar="FILE", help="rows (default: scripts/results/<study>.jsonl)")
    add("--data_path", help="games to learn from, as for custom_nethack_pomdp.py")
    add("--store_path", default="runs/stores", help="folder of chunk stores (default: %(default)s)")
    add("--runs_path", default="runs/studies", help="folder of runs (default: %(default)s)")
    for name in SELECT:
        add(f"--{name}", type=lambda text: text.split(","), help="these alone, separated by commas")
    add("--keep", action="store_true", help="keep the checkpoints when their rows are written")
    add("--dry_run", action="store_true", help="list what is to do; do nothing")
    os.environ.setdefault("WANDB_MODE", "disabled")
    pomdp.keep_freed_memory()
    return parser.run(study, argv, if_stopped="stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
