# SPDX-License-Identifier: MIT
"""Trains for a minute, lets the bundled agent play, and shows both: run by scripts/quickstart.sh.

1. A network of the benchmark's size learns from the few games in tests/data. Its loss on games that
   it has not seen is compared with that of the same network before training.
2. The bundled agent plays one game as each character.
3. One table has both agents; the best game becomes a page for a browser.

Other arguments are settings of the training, as custom_nethack_pomdp.py takes them:

    bash scripts/quickstart.sh --update_steps 80
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().with_name("lib")))
from shared import ROOT, Parser, newest_games, read_games, read_rows

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import TrainConfig, UserError

CONFIG = ROOT / "scripts" / "configs" / "quickstart.yaml"
AGENT = ROOT / "scripts" / "agents" / "small_512.pt"


def run_script(name: str, *arguments: Any) -> None:
    """Run another script. Raises UserError if it fails."""
    line = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    if subprocess.run(line).returncode:
        raise UserError(f"scripts/{name} failed, for the reason above")


def loss_before_training(config: TrainConfig) -> float:
    """Held-out loss of a fresh network, in nats per action."""
    run = pomdp.make_run(config)
    if run.heldout is None:
        raise UserError("no game is held out: give a larger --heldout_share")
    frames = config.eval_heldout_frames
    metrics = pomdp.evaluate_heldout(run.algorithm, run.heldout, frames, run.device)
    return metrics["loss_per_action"]


def loss_after_training(folder: Path) -> float:
    name = "heldout/loss_per_action"
    losses = [row[name] for row in read_rows(folder / "metrics.jsonl") if name in row]
    return losses[-1]


def best_game(folder: Path) -> Tuple[str, float]:
    """Character and score of the game with the highest score, one game per character."""
    scores = read_games(newest_games(folder))["scores"]
    best = max(scores, key=scores.get)
    return best, scores[best][0]


def quickstart(actions: int, settings: List[str]) -> None:
    os.chdir(ROOT)  # paths in the config are relative to it
    os.environ.setdefault("WANDB_MODE", "disabled")
    pomdp.keep_freed_memory()
    config = pomdp.parse_config(["--config", str(CONFIG), *settings])
    out = Path(config.checkpoints_path or "runs")
    page = out / "game.html"
    game = ["--eval_processes", "1", "--eval_max_steps", str(actions)]

    print("--- 1. training on the games in tests/data", flush=True)
    before = loss_before_training(config)
    trained = pomdp.train(config)
    after = loss_after_training(trained)

    print("\n--- 2. the bundled agent plays", flush=True)
    evaluation = ["--evaluate", str(AGENT), "--checkpoints_path", str(out), "--eval_episodes", "1"]
    played = pomdp.evaluate_checkpoint(pomdp.parse_config([*evaluation, *game]))

    print("\n--- 3. what was learned, and what can be learned")
    print(
        f"held-out loss per action: {before:.2f} nats before training, {after:.2f} after "
        f"{config.update_steps} updates\n"
        f"games: at most {config.eval_max_steps:,} actions after this training, {actions:,} of the "
        "bundled agent\n",
        flush=True,
    )
    run_script("report.py", trained, played)
    best, score = best_game(played)
    print(f"\nthe bundled agent's best game, {score:,.0f} points as {best}:", flush=True)
    run_script("watch.py", "--checkpoint", AGENT, "--character", best, *game, "--html", page)
    print(f"\n{page}\nopen it: xdg-open {page}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(__doc__)
    limit = "of the bundled agent's games (default: %(default)s)"
    parser.add_argument("--actions", type=int, default=1500, help=limit)

    def command() -> None:
        args, settings = parser.parse_known_args(argv)
        quickstart(args.actions, settings)

    return pomdp.run_command(command)


if __name__ == "__main__":
    sys.exit(main())
