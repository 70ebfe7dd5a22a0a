"""Runs a study: arms (algorithms, or ours with one thing changed) x characters x seeds, at one budget, from one file.

    python scripts/study.py scripts/studies/cpu_small.yaml --data_path DATA_DIR      # again: goes on where it stopped
    python scripts/study.py scripts/studies/cpu_small.yaml --dry_run                 # what there is to do
    python scripts/study.py scripts/studies/cpu_small.yaml --data_path DATA_DIR --only ours,bc --seeds 1

Every training is a run of custom_nethack_pomdp.py, resumed if it was cut off. The weights that play are those of the
lowest held-out loss (best.pt), never those of the best score; they are scored as `--evaluate` does. Every finished set
of games is one line of JSON in scripts/results/<study>.jsonl; a line that is there is not made again. The runs go seed
by seed and character by character over all arms, so that arms can be compared early.

A study's file (scripts/studies/*.yaml):

    name            names the rows, their file and the folder of runs
    base            settings of custom_nethack_pomdp.py that all arms share; rnn_hidden_dim may be below 2048 here
    characters      a list; each arm learns each of them separately ("mon-hum-neu,val-hum-neu" is one agent for both)
    seeds, games    train_seeds; games played with each character
    arms            {arm: settings that differ}; `seeds` and `games` may differ too
    evaluations     {arm: {variant: settings}}: other ways to act with the same weights (eval_*, algorithm, games)
    phases          numbers of frames at which the phases of a held-out game end (default 1000, 5000, 10000)

A row tells what was run: study, algorithm (the arm), variant, seed, characters, config, evaluation, settings (a hash of
all that shapes the result), data, script_sha256, submission_sha256, commit, versions, hardware, command. And what came
of it: parameters, transitions, best_transitions (seen by the weights that played), wall_seconds (updates alone),
evaluation_seconds, curve ([transitions, held-out loss, mean training loss since the point before]), heldout (the run's
metrics; with game_frames on these frames alone), heldout_games (each from its first frame on, with the state carried:
loss and accuracy up to the last phase's end, and by phase), recorded_scores (points of the recorded games after
eval_max_steps actions), and by character scores, depths, max_depths (deepest levels), levels (of experience), turns,
lengths, causes (of death, in NetHack's words) and ends ("no progress" apart from deaths).
"""

import argparse
import csv
import fcntl
import hashlib
import json
import os
import re
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
import yaml

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import ENDS, NO_RESULT, TrainConfig, UserError

Row = Dict[str, Any]
OPTIONAL = {"base": {}, "evaluations": {}, "phases": [1_000, 5_000, 10_000]}
KINDS = dict(
    name=str,
    base=dict,
    characters=list,
    seeds=list,
    games=int,
    arms=dict,
    evaluations=dict,
    phases=list,
)
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
NOT_SETTINGS = NO_RESULT | {
    "device",
    "character",
    "train_seed",
    "evaluate",
    "eval_episodes",
    "submission",
}
ACTING = ("eval_processes", "eval_max_steps", "eval_precision", "eval_seed")  # how games are played
DEFAULT_VARIANT = "default"
NAMES = ("study", "algorithm", "variant", "seed", "characters")  # of a row
CHUNK = 100  # frames of a held-out game that are scored at once


class Run(NamedTuple):
    """One training, and the ways its weights play: {variant: config}, the first one the arm's own."""

    arm: str
    config: TrainConfig
    ways: Dict[str, TrainConfig]
    code: Dict[str, Optional[str]]  # hashes, as they were when the study began


# --- the study's file
def make_config(file: Path, *parts: Dict[str, Any], **more: Any) -> TrainConfig:
    """What the main script makes of these settings, later over earlier ones; `algorithm` is merged key by key."""
    values = {name: value for part in (*parts, more) for name, value in part.items()}
    values["algorithm"] = {
        name: value for part in parts for name, value in part.get("algorithm", {}).items()
    }
    # a submission lies there, or beside the study's file
    for folder in (ROOT, file.resolve().parent):
        if "submission" in values and (folder / values["submission"]).is_file():
            values["submission"] = str(folder / values["submission"])
    return pomdp.parse_config(
        [
            f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
            for name, value in values.items()
        ]
    )


def read_arm(content: Dict[str, Any], file: Path, arm: str) -> List[Tuple[Tuple[int, int], Run]]:
    """[((place of the seed, place of the character), run)]. Raises what read_study makes one line of."""
    base, own, runs = content["base"], dict(content["arms"][arm] or {}), []
    seeds, games = own.pop("seeds", content["seeds"]), own.pop("games", content["games"])
    if not re.fullmatch(r"[\w.+-]+", arm) or {*OURS} & {*base, *own}:
        raise UserError(
            "its name takes letters, digits and _ . + -, its settings none of " + ", ".join(OURS)
        )
    for place, seed in enumerate(dict.fromkeys(seeds)):
        for number, character in enumerate(dict.fromkeys(content["characters"])):
            mine, ways = dict(train_seed=seed, character=character, group=content["name"]), {}
            for variant, way in {
                DEFAULT_VARIANT: {},
                **content["evaluations"].get(arm, {}),
            }.items():
                if {*way} - {*ACTING, "algorithm", "games"}:
                    raise UserError(
                        f"evaluation {variant} takes {', '.join(ACTING)}, algorithm and games alone"
                    )
                way = {"games": games, **way}
                ways[variant] = make_config(
                    file, base, own, way, eval_episodes=way.pop("games"), **mine
                )
            config = replace(ways[DEFAULT_VARIANT], eval_episodes=0)
            runs.append(((place, number), Run(arm, config, ways, code_of(config))))
    for config in runs[0][1].ways.values():
        if min(config.eval_episodes, config.eval_heldout_frames, config.heldout_share) == 0:
            raise UserError("games, eval_heldout_frames and heldout_share must be above 0")
        # complains now
        pomdp.make_algorithm(replace(config, rnn_hidden_dim=8, device="cpu"), torch.device("cpu"))
    return runs


def read_study(file: Path) -> Tuple[List[int], List[Run]]:
    """-> phases, and the runs in the order in which they are made. Raises UserError with one line for any mistake."""
    where, placed = str(file), []
    same: Dict[str, str] = {}
    try:
        content = {**OPTIONAL, **yaml.safe_load(file.read_text(encoding="utf-8"))}
        for name in [*KINDS, *content]:
            if type(content.get(name)) is not KINDS.get(name) or not (
                content[name] or name in OPTIONAL
            ):
                kinds = ", ".join(f"{name} ({kind.__name__})" for name, kind in KINDS.items())
                raise UserError(
                    f"{name} is missing, empty, unknown or of another type; a study has {kinds}"
                )
        phases = content["phases"]
        if any(stop % CHUNK or stop <= start for start, stop in zip([0, *phases], phases)):
            raise UserError(f"phases takes rising multiples of {CHUNK}, not {phases}")
        if {*content["evaluations"]} - {*content["arms"]} or not re.fullmatch(
            r"[\w.+-]+", content["name"]
        ):
            raise UserError(
                "name takes letters, digits and _ . + -; evaluations takes names of arms"
            )
        for arm in content["arms"]:
            where = f"{file}: arm {arm}"
            placed += (found := read_arm(content, file, arm))
            for variant, config in found[0][1].ways.items():
                name = f"{arm}, {variant}"  # the number of games makes no other arm
                other = same.setdefault(
                    settings_hash(replace(config, eval_episodes=1), phases), name
                )
                if other != name:
                    raise UserError(f"{variant} changes nothing: it has the settings of {other}")
    except (
        UserError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        yaml.YAMLError,
    ) as error:
        raise UserError(f"{where}: {error}") from None
    return phases, [run for _, run in sorted(placed, key=lambda pair: pair[0])]


def select(runs: List[Run], args: argparse.Namespace) -> List[Run]:
    """Those that --only, --seeds and --characters leave."""
    every, values = (
        runs,
        {"only": lambda run: {run.arm}, "seeds": lambda run: {str(run.config.train_seed)}},
    )
    values["characters"] = lambda run: {*run.config.characters}
    for option, value_of in values.items():
        wanted, known = {*(getattr(args, option) or [])}, set().union(*map(value_of, every))
        if wanted - known:
            raise UserError(
                f"--{option}: {', '.join(wanted - known)} is not among {', '.join(sorted(known))}"
            )
        runs = [run for run in runs if not wanted or wanted & value_of(run)]
    return runs


# --- what a row comes from
def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_of(config: TrainConfig) -> Dict[str, Optional[str]]:
    files = {"script_sha256": pomdp.__file__, "submission_sha256": config.submission}
    return {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
        for name, file in files.items()
    }


def row_config(config: TrainConfig) -> Dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}


def settings_hash(config: TrainConfig, phases: List[int]) -> str:
    """Equal for rows that may stand beside each other, whatever seed, character and place of the data. Settings at
    their default are left out: one that the script gains later leaves old rows valid."""
    default = row_config(TrainConfig())
    changed = {name: value for name, value in row_config(config).items() if value != default[name]}
    return hash_of(changed, code_of(config)["submission_sha256"], config.eval_episodes, phases)


def describe_data(store: Any, heldout_share: float) -> Dict[str, Any]:
    """How much there is to learn from and to test on. `games_sha256` is the same wherever the games lie."""
    heldout = pomdp.choose_heldout(store.names, heldout_share)
    if not heldout.any():
        raise UserError(
            f"a study needs held-out games, and there is only one game in {store.folder}"
        )
    parts = {"training": ~heldout, "heldout": heldout}
    told = {
        name: dict(games=int(part.sum()), frames=int(store.frames[part].sum()))
        for name, part in parts.items()
    }
    digest = hash_of(store.names.tolist(), store.frames.tolist())
    content = hash_of(store.index["identities"].tolist())
    return {**told, "games_sha256": digest, "fingerprint": content}


def is_valid(row: Row, config: TrainConfig, phases: List[int], data: Dict[str, Any]) -> bool:
    """Whether the row was made with these settings, also where a default has changed since, and from these games."""
    same = all(
        row["config"].get(name, value) == value for name, value in row_config(config).items()
    )
    games = all(
        row["data"][name]["games_sha256"] == part["games_sha256"] for name, part in data.items()
    )
    return same and games and row["settings"] == settings_hash(config, phases)


# --- what a row tells
def learning_curve(metrics: Sequence[Row]) -> List[List[Optional[float]]]:
    """[transitions, held-out loss per action, mean training loss per action since the last point], by evaluation."""
    curve, losses = [], []
    for row in metrics:
        losses += (
            [row["train/loss_per_action"]] if row.get("train/loss_per_action") is not None else []
        )
        if "heldout/frames" in row:
            mean = sum(losses) / len(losses) if losses else None
            curve.append([row["transitions"], row.get("heldout/loss_per_action"), mean])
            losses = []
    return curve


def score_games(
    algorithm: Any, config: TrainConfig, store: Any, phases: List[int]
) -> Dict[str, Row]:
    """{name: metrics} of each held-out game by itself, since intervals must draw whole games: frames of one are alike.
    A phase is what the sums over the frames up to its end have more than those up to its beginning."""

    def means_of(sums: Dict[str, float]) -> Row:
        count = max(sums["frames"], 1.0)
        return {
            name: total if name == "frames" else round(total / count, 6)
            for name, total in sums.items()
        }

    games, device, found = pomdp.Games([store]), pomdp.choose_device(config), {}
    for game in np.flatnonzero(games.heldout(config.heldout_share)):
        # The reward scale is no matter, since no metric of rewards is kept; one row begins with the game's first frame.
        loader = pomdp.ChunkLoader(
            games, np.array([game]), replace(config, seq_len=CHUNK), 1, 1.0, with_returns=True
        )
        sums, by_phase = dict.fromkeys(("frames", "loss_per_action", "accuracy"), 0.0), {}
        for start, stop in zip([0, *phases], phases):
            if start < games.frames[game]:
                precision, before = pomdp.choose_precision(config, device), sums
                means = pomdp.evaluate_heldout(algorithm, loader, stop, device, precision)
                sums = {
                    name: means[name] * (1.0 if name == "frames" else means["frames"])
                    for name in sums
                }
                by_phase[str(stop)] = means_of({name: sums[name] - before[name] for name in sums})
        found[str(store.names[game])] = {**means_of(sums), "phases": by_phase}
    return found


def recorded_scores(store: Any, steps: int) -> List[float]:
    """Points of each recorded game after so many of its actions."""
    rewards = (store.rewards(game) for game in range(len(store.frames)))
    return [float(values[at < steps].sum()) for at, values in rewards]


def read_games(folder: Path, step: int, characters: Sequence[str]) -> Row:
    """What the evaluation wrote of each game -> {scores, depths, ...: {character: ...}}."""
    counts = ("depth", "turns", "length", "max_depth", "level")
    names = ["scores", "ends", "causes", *(name.rstrip("s") + "s" for name in counts)]
    found: Row = {name: {} for name in names}
    for character in characters:
        with open(folder / f"{step}_{character}_games.csv", encoding="utf-8") as file:
            games = list(csv.DictReader(file))
        found["scores"][character] = [float(game["score"]) for game in games]
        found["causes"][character] = [game["cause"] for game in games]
        for name in counts:
            found[name.rstrip("s") + "s"][character] = [int(game[name]) for game in games]
        found["ends"][character] = {end: sum(game["end"] == end for game in games) for end in ENDS}
    return found


# --- the study
def do_run(run: Run, missing: List[str], stores: Row, data: Row, args: Any) -> Iterator[Row]:
    """Trains, or goes on with what was begun, and plays what is missing -> rows."""
    if code_of(run.config) != run.code:
        raise UserError(
            "the script or the submission was changed since the study began; start it again"
        )
    # Settings and data enter the folder's name: what is found there can be gone on with, and nothing else can.
    digest = hash_of(
        settings_hash(run.config, args.phases), [part["games_sha256"] for part in data.values()]
    )
    places = {
        "data_path": args.data_path,
        "store_path": args.store_path,
        "checkpoints_path": args.runs_path,
    }
    folder = pomdp.train(replace(run.config, **places, name=f"{run.arm}-{digest[:8]}", resume=True))
    best = folder / "best.pt"
    if not best.is_file():
        raise UserError("no held-out loss was finite, so there are no best weights")
    metrics = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    algorithm, config, step = pomdp.load_agent(best)
    chosen = next(line for line in metrics if line["step"] == step and "heldout/frames" in line)
    names = config.characters
    row: Row = {
        "study": config.group,
        "algorithm": run.arm,
        "seed": config.train_seed,
        "characters": names,
        **run.code,
    }
    row.update({name: described[name] for name in ("commit", "hardware", "versions")})
    command = f"python scripts/study.py scripts/studies/{args.study.name} --data_path DATA_DIR --only {run.arm}"
    row["command"] = f"{command} --seeds {config.train_seed} --characters {config.character}"
    row["parameters"] = sum(parameter.numel() for parameter in algorithm.model.parameters())
    row.update(rnn_hidden_dim=config.rnn_hidden_dim, data=data, curve=learning_curve(metrics))
    row.update(transitions=metrics[-1]["transitions"], best_transitions=chosen["transitions"])
    row["wall_seconds"] = round(
        sum(line.get(name, 0.0) for line in metrics for name in pomdp.TIMES), 2
    )
    row["heldout"] = {
        name[8:]: value for name, value in chosen.items() if name.startswith("heldout/")
    }
    with pomdp.noting_signals():
        row["heldout_games"] = {
            name: score_games(algorithm, config, stores[name], args.phases) for name in names
        }
    for variant in missing:
        way, begin = run.ways[variant], time.perf_counter()
        played = pomdp.evaluate_checkpoint(replace(way, evaluate=str(best)))
        row.update(
            read_games(played, step, names),
            variant=variant,
            settings=settings_hash(way, args.phases),
        )
        row["config"] = {
            **row_config(way),
            "submission": way.submission and Path(way.submission).name,
        }
        row["evaluation"] = {
            **{name: getattr(way, name) for name in ACTING},
            "games": way.eval_episodes,
        }
        row["evaluation_seconds"] = round(time.perf_counter() - begin, 2)
        row["recorded_scores"] = {
            name: recorded_scores(stores[name], way.eval_max_steps) for name in names
        }
        if code_of(run.config) != run.code:
            raise UserError(
                "the script or the submission was changed while this ran; start the study again"
            )
        yield row
    for path in [] if args.keep else folder.glob("*.pt"):
        path.unlink()


def read_rows(file: Any) -> List[Row]:
    """Rows of an open .jsonl file; what a kill left of a last line is cut off."""
    file.seek(0)
    *lines, cut = file.read().split(b"\n")
    if cut:
        pomdp.warn(f"{file.name}: the last line was cut short and is left out")
        file.truncate(file.tell() - len(cut))
    try:
        rows = [json.loads(line) for line in lines]
        [
            [row[name] for name in (*NAMES, "settings", "config", "data", "script_sha256")]
            for row in rows
        ]
        return rows
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file.name} holds a line that is not a row of a study") from None


def run_study(runs: List[Run], args: argparse.Namespace, file: Any) -> int:
    """0 when all rows are there at the end, 1 when some failed."""
    runs, rows, todo, stale, older = select(runs, args), read_rows(file), [], 0, 0
    names = dict.fromkeys(
        name for run in runs for name in run.config.characters if not args.dry_run
    )
    stores = {
        name: pomdp.open_or_build_store(args.data_path, args.store_path, name) for name in names
    }
    for run in runs:
        share, missing = run.config.heldout_share, []
        data = {
            name: describe_data(stores[name], share) for name in run.config.characters if stores
        }
        for variant, config in run.ways.items():
            key = (config.group, run.arm, variant, config.train_seed, config.characters)
            there = [row for row in rows if key == tuple(row[name] for name in NAMES)]
            valid = [row for row in there if is_valid(row, config, args.phases, data)]
            missing += [] if valid else [variant]
            stale += bool(there) and not valid
            older += any(row["script_sha256"] != run.code["script_sha256"] for row in valid)
        name = f"{run.arm}, {run.config.character}, seed {run.config.train_seed}"
        pomdp.say(f"{name}: to make: {', '.join(missing) or 'nothing'}")
        todo += [(name, run, missing, data)] if missing else []
    total, failures, made = sum(len(missing) for _, _, missing, _ in todo), [], 0
    pomdp.say(f"{total} rows to make in {file.name}")
    if stale or older:
        what = f"{older} rows of another version of custom_nethack_pomdp.py count as done, {stale} of other settings or"
        pomdp.warn(f"{what} data are kept, with new ones below them (--out takes another file)")
    for name, run, missing, data in [] if args.dry_run else todo:
        try:
            for row in do_run(run, missing, stores, data, args):
                file.write((json.dumps(row) + "\n").encode())
                os.fsync(file.fileno())
                made += 1
                pomdp.say(f"[{made}/{total}] {name}, {row['variant']}")
        except Exception as error:  # noqa: PERF203  of this run alone: the others go on
            failures.append(f"{name}: {error!r}")
            pomdp.warn(f"{failures[-1]}\n{traceback.format_exc()}")
    if failures:
        print(
            f"study: error: {len(failures)} of {len(todo)} runs failed, the first: {failures[0]}",
            file=sys.stderr,
        )
    return 1 if failures else 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)  # one line, like all mistakes


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="rows (default: scripts/results/<study>.jsonl)"
    )
    parser.add_argument("--data_path", help="games to learn from, as for custom_nethack_pomdp.py")
    parser.add_argument(
        "--store_path", default="runs/stores", help="folder of chunk stores (default: %(default)s)"
    )
    parser.add_argument(
        "--runs_path", default="runs/studies", help="folder of runs (default: %(default)s)"
    )
    for name in ("only", "seeds", "characters"):
        parser.add_argument(
            f"--{name}", type=lambda text: text.split(","), help="these alone, separated by commas"
        )
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoints when their rows are written"
    )
    parser.add_argument("--dry_run", action="store_true", help="list what is to do; do nothing")
    os.environ.setdefault("WANDB_MODE", "disabled")
    pomdp.keep_freed_memory()

    def command() -> int:
        args = parser.parse_args(argv)
        args.phases, runs = read_study(args.study)
        out = args.out or ROOT / "scripts" / "results" / f"{runs[0].config.group}.jsonl"
        with open(
            out if out.exists() or not args.dry_run else os.devnull, "a+b", buffering=0
        ) as file:
            try:
                pomdp.lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = f"another study is writing to {out}; --out takes another file"
                raise UserError(told) from None
            return run_study(runs, args, file)

    return pomdp.run_command(command, "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
