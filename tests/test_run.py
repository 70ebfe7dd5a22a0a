"""Whole runs: what they write, that they repeat, that they go on to the bit where they stopped, and that nothing is lost.

The network's size cannot be changed by settings, so runs through the command line take it at full size; they are few and
shared. What does not depend on the size is tested in this process on a small network.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import AUTOASCEND_MEAN_SCORE, main

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "custom_nethack_pomdp.py"
GAMES = ROOT / "tests" / "data" / "nle_data"
MONK, VALKYRIE, RANGER = CHARACTERS = ("mon-hum-neu", "val-hum-neu", "ran-hum-neu")
# For processes that share their cores: threads that wait, and do not spin; memory that is kept, and not given back and
# cleared again at every update. Neither changes a result.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "WANDB_MODE": "disabled"}


def arguments(settings):
    return [token for name, value in settings.items() for token in (f"--{name}", str(value))]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def untimed(rows):
    """Rows without what depends on the clock."""
    return [{name: value for name, value in row.items() if not name.startswith("times/") and name != "charts/SPS"} for row in rows]


def lines_of(text, tag):
    """`TAG name=value ...` lines -> list of {name: number}."""
    lines = [line for line in text.splitlines() if line.startswith(tag + " ")]
    return [{name: float(value) for name, value in (pair.split("=") for pair in line.split()[1:])} for line in lines]


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(left, right, where="checkpoint"):
    """Equal to the bit, through dicts, lists, tuples and tensors."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_same(left[name], right[name], f"{where}[{name!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    else:
        assert left == right, where


ASIDE = ("config", "wandb_id")  # what a checkpoint holds beyond the state of training


def assert_same_training(left, right):
    one, other = ({name: value for name, value in load(folder / "last.pt").items() if name not in ASIDE} for folder in (left, right))
    assert_same(one, other)


def files_of(folder):
    """{relative path: (size, time of the last change)} of all files below."""
    stats = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The shipped command, at full size
# ----------------------------------------------------------------------------------------------------------------------
FULL = dict(data_path=GAMES, batch_size=8, seq_len=8, log_every=1, eval_every=2, checkpoint_every=2, eval_heldout_frames=256)
ONE = dict(FULL, character=MONK, eval_episodes=2, eval_processes=2, eval_max_steps=40, eval_workers=1)
THREE = dict(FULL, update_steps=2, eval_episodes=3, eval_processes=3, eval_max_steps=60)


def command_line(settings):
    environment = {**{name: value for name, value in os.environ.items() if not name.startswith("WANDB")}, **PATIENT}
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments(settings)], cwd=settings["checkpoints_path"].parent, env=environment,
                            capture_output=True, text=True, timeout=900, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def full(tmp_path_factory, stores, stores_path):
    """Five runs in two chains side by side: three characters, then 4 updates at once; 2 updates, 2 again, and 2 more of these."""
    folder = tmp_path_factory.mktemp("full")

    def first_chain():
        three = command_line(dict(THREE, checkpoints_path=folder / "three", store_path=folder / "stores"))  # builds its own stores
        return three, command_line(dict(ONE, checkpoints_path=folder / "straight", store_path=stores_path, update_steps=4))

    def second_chain():
        two = dict(ONE, checkpoints_path=folder / "repeated", store_path=stores_path, update_steps=2)
        first = command_line(two)
        after_first = files_of(folder / "repeated")
        second = command_line(two)
        kept = folder / "kept.pt"  # the resumed run renames its last.pt to last.prev.pt and later drops it
        os.link(folder / "repeated" / "custom-nethack-pomdp-v0" / f"custom-{MONK}-seed42-2" / "last.pt", kept)
        return first, after_first, second, command_line(dict(two, update_steps=4, resume="true"))

    with ThreadPoolExecutor(2) as pool:
        chains = pool.submit(first_chain), pool.submit(second_chain)
        (three, straight), (first, after_first, second, resumed) = (chain.result() for chain in chains)
    group = folder / "repeated" / "custom-nethack-pomdp-v0"
    yield dict(
        three=three, three_folder=folder / "three" / "custom-nethack-pomdp-v0" / f"custom-{'+'.join(CHARACTERS)}-seed42",
        stores=folder / "stores",
        straight=straight, straight_folder=folder / "straight" / "custom-nethack-pomdp-v0" / f"custom-{MONK}-seed42",
        first=first, after_first=after_first, second=second, resumed=resumed, repeated=folder / "repeated",
        first_folder=group / f"custom-{MONK}-seed42", resumed_folder=group / f"custom-{MONK}-seed42-2", kept=folder / "kept.pt",
    )  # fmt: skip
    shutil.rmtree(folder)  # gigabytes of checkpoints, which pytest would keep


def test_three_characters_print_what_readers_look_for(full):
    out = full["three"].stdout
    training = lines_of(out, "TRAIN_METRICS")
    assert [line["step"] for line in training] == [1, 2] and [line["transitions"] for line in training] == [64, 128]
    assert all(line["loss"] > 0 for line in training)
    (tested,) = lines_of(out, "TEST_METRICS")
    columns = ["normalized_score_mon_hum_neu", "normalized_score_val_hum_neu", "normalized_score_ran_hum_neu"]
    assert list(tested) == ["normalized_score", *columns]
    folder = full["three_folder"]
    for character, column in zip(CHARACTERS, columns):
        scores = np.load(folder / f"2_{character}_normalized_scores.npy")
        assert tested[column] == pytest.approx(scores.mean(), rel=1e-4)
        assert re.search(rf"^{character} +3 +{scores.mean():.4f} ", out, re.MULTILINE), "no line in the table"
    assert tested["normalized_score"] == pytest.approx(pomdp.geometric_mean([tested[column] for column in columns]), rel=1e-4)
    assert "Traceback" not in full["three"].stderr


def test_three_characters_write_the_folder_of_the_design(full):
    folder = full["three_folder"]
    arrays = {f"2_{character}_{name}.npy" for character in CHARACTERS for name in ("returns", "depths", "normalized_scores")}
    tables = {f"2_{character}_games.csv" for character in CHARACTERS}
    others = {"config.yaml", "config.json", "metrics.jsonl", "last.pt", "best.pt"}
    assert {path.name for path in folder.iterdir()} == others | arrays | tables
    for character in CHARACTERS:
        with open(folder / f"2_{character}_games.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["game"]) for row in rows] == [0, 1, 2] and {row["character"] for row in rows} == {character}
        assert [float(row["score"]) for row in rows] == np.load(folder / f"2_{character}_returns.npy").tolist()
        returns, depths, normalized = (np.load(folder / f"2_{character}_{name}.npy") for name in ("returns", "depths", "normalized_scores"))
        assert returns.shape == depths.shape == normalized.shape == (3,)
        assert np.allclose(normalized, returns / AUTOASCEND_MEAN_SCORE[character], rtol=1e-12)
        assert (depths >= 1).all() and returns.dtype == normalized.dtype == np.float64 and depths.dtype == np.int64
    assert {path.name for path in full["stores"].glob("*/*/")} >= set(CHARACTERS)


def test_the_run_s_config_is_resolved_and_usable(full):
    folder = full["three_folder"]
    given = arguments(dict(THREE, checkpoints_path=folder.parents[1], store_path=full["stores"]))
    expected = pomdp.parse_config(given)
    assert pomdp.parse_config(["--config", str(folder / "config.yaml")]) == expected
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert described["config"] == json.loads(json.dumps(pomdp.asdict(expected)))
    assert described["script_sha256"] == pomdp.sha256_of_file(SCRIPT) and described["finished_at_step"] == 2
    assert described["versions"]["torch"] == torch.__version__ and described["versions"]["nle"] == pomdp.nle.__version__
    assert described["hardware"]["cores"] >= 1 and described["command"][1:] == given


def test_metrics_hold_katakomba_s_names(full):
    for folder, prefixes in ((full["three_folder"], [f"{name}/" for name in CHARACTERS]), (full["straight_folder"], [""])):
        rows = rows_of(folder)
        training, evaluation = [row for row in rows if "loss" in row], [row for row in rows if "loss" not in row]
        for row in rows:
            assert row["transitions"] == row["step"] * 64
        for row in training:
            assert {"times/batch_loading_cpu", "times/forward_pass", "times/backward_pass", "charts/SPS", "train/learning_rate"} <= set(row)
        for row in evaluation:
            assert {f"{prefix}{name}_{statistic}" for prefix in prefixes for name in ("reward", "depth")
                    for statistic in ("median", "mean", "std", "min", "max")} <= set(row)  # fmt: skip
            assert {"times/evaluation_cpu", "heldout/loss_per_action", "heldout/explained_variance", "eval/normalized_score"} <= set(row)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]


def test_the_same_command_again_repeats_the_run_beside_it(full):
    """To the bit: what is logged, what is printed, every game's score, and the weights. The first run's files stay as they are."""
    first, second = full["first_folder"], full["resumed_folder"]
    now = files_of(full["repeated"])
    assert {path: now[path] for path in full["after_first"]} == full["after_first"], "the second run touched the first's files"
    assert {path.relative_to(full["repeated"]).parts[1] for path in full["repeated"].rglob("*.pt")} == {first.name, second.name}
    assert untimed(rows_of(first)) == [row for row in untimed(rows_of(second)) if row["step"] <= 2]
    for tag in ("TRAIN_METRICS", "HELDOUT_METRICS", "TEST_METRICS"):
        one, other = (lines_of(full[name].stdout, tag) for name in ("first", "second"))
        for line in one + other:
            line.pop("transitions_per_s", None)
        assert one == other and one, tag
    for name in ("returns", "depths", "normalized_scores"):
        one, other = (np.load(folder / f"2_{MONK}_{name}.npy") for folder in (first, second))
        assert np.array_equal(one, other)
    one, other = ({name: value for name, value in load(path).items() if name not in ASIDE} for path in (first / "last.pt", full["kept"]))
    assert_same(one, other)


def test_two_updates_resumed_for_two_more_equal_four(full):
    straight, resumed = full["straight_folder"], full["resumed_folder"]
    assert "resuming" in full["resumed"].stdout and "at step 2" in full["resumed"].stdout
    assert untimed(rows_of(straight)) == untimed(rows_of(resumed))
    assert_same_training(straight, resumed)
    for step in (2, 4):
        for name in ("returns", "depths", "normalized_scores"):
            assert np.array_equal(*(np.load(folder / f"{step}_{MONK}_{name}.npy") for folder in (straight, resumed)))
    losses = [row["loss"] for row in rows_of(straight) if "loss" in row]
    assert len(set(losses)) == 4, "all updates alike: this shows nothing"
    assert json.loads((resumed / "config.json").read_text(encoding="utf-8"))["finished_at_step"] == 4


def test_checkpoints_are_read_without_running_code_and_best_is_the_lowest_held_out_loss(full):
    folder = full["straight_folder"]
    best, last, previous = (load(folder / name) for name in ("best.pt", "last.pt", "last.prev.pt"))
    assert (last["step"], previous["step"]) == (4, 2)
    heldout = {row["step"]: row["heldout/loss_per_action"] for row in rows_of(folder) if "heldout/loss_per_action" in row}
    assert best["step"] == min(heldout, key=heldout.get) and best["heldout"] == min(heldout.values())
    assert_same(best["model"], {4: last, 2: previous}[best["step"]]["model"])
    backbone = pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 2048, 2)
    pomdp.OfflineAlgorithm(backbone, pomdp.TrainConfig(), "cpu").model.load_state_dict(best["model"])


# ----------------------------------------------------------------------------------------------------------------------
# Everything that does not depend on the size, on a small network in this process
# ----------------------------------------------------------------------------------------------------------------------
SMALL = dict(character=MONK, batch_size=4, seq_len=8, update_steps=4, log_every=1, eval_every=2, checkpoint_every=2, eval_episodes=0,
             eval_heldout_frames=128, data_workers=1)  # fmt: skip


@pytest.fixture
def small(monkeypatch, tmp_path, stores, stores_path, capfd):
    """run(settings...) -> (exit status, stdout, stderr), with a network of 32 units; runs lie in tmp_path/runs."""
    backbone = pomdp.ModelBackbone
    monkeypatch.setattr(pomdp, "ModelBackbone", lambda actions, *_: backbone(actions, 32, 2))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    random_state = torch.get_rng_state()

    def run(**settings):
        status = main(arguments({**SMALL, "data_path": GAMES, "store_path": stores_path, "checkpoints_path": "runs", **settings}))
        return (status, *capfd.readouterr())

    yield run
    torch.set_rng_state(random_state)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def group(tmp_path):
    return tmp_path / "runs" / "custom-nethack-pomdp-v0"


@pytest.fixture
def folder(group):
    return group / f"custom-{MONK}-seed42"


def assert_user_error(result, pattern):
    status, _, err = result
    message = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert status == 2 and len(message) == 1 and re.search("^error: .*" + pattern, message[0]), result


def copy_run(folder, name):
    """Sets a run's folder aside, as its owner might."""
    return Path(shutil.copytree(folder, folder.parents[2] / name, copy_function=shutil.copy2))


def test_a_run_uses_all_settings_of_its_config_file(small, folder, tmp_path):
    (tmp_path / "a.yaml").write_text("algorithm: {burn_in: 2, lam: 0.5}\nclip_grad_norm: 0.5\n", encoding="utf-8")
    assert small(config=tmp_path / "a.yaml", algorithm="{lam: 0.7}", update_steps=1)[0] == 0
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert described["config"]["algorithm"] == {"burn_in": 2, "lam": 0.7} and described["config"]["clip_grad_norm"] == 0.5


@pytest.mark.parametrize("setting", [dict(algorithm="{burn_in: 0}"), dict(algorithm="{beta: 0.5}"), dict(learning_rate=1e-2),
                                     dict(train_seed=1), dict(gamma=0.5), dict(clip_grad_norm=1e-3),
                                     dict(weight_decay=10.0, learning_rate=1e-2)],
                         ids=lambda setting: ",".join(setting))  # fmt: skip
def test_settings_of_training_reach_training(small, group, setting):
    """Each of these must change what is learned; a setting that is read but not used changes nothing."""
    small(eval_heldout_frames=0)
    reference = dict(weight_decay=0.0, learning_rate=1e-2) if "weight_decay" in setting else {}
    small(eval_heldout_frames=0, **reference)
    small(eval_heldout_frames=0, name="other", **setting)
    (other,) = group.glob("other-*")
    base = group / (f"custom-{MONK}-seed42-2" if reference else f"custom-{MONK}-seed42")
    one, two = (load(path / "last.pt")["model"] for path in (base, other))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_schedules_count_transitions(small, folder):
    settings = dict(learning_rate=1e-3, warmup_transitions=96, lr_schedule="cosine", update_steps=8, eval_heldout_frames=0)
    assert small(**settings)[0] == 0
    rates = [row["train/learning_rate"] for row in rows_of(folder) if "loss" in row]
    per_update, total = 4 * 8, 8 * 4 * 8
    expected = [1e-3 * min(1.0, step * per_update / 96) * (0.1 + 0.45 * (1 + np.cos(np.pi * step * per_update / total)))
                for step in range(8)]  # fmt: skip
    assert rates == pytest.approx(expected, rel=1e-9)
    assert rates[0] == 0.0 and max(rates) == max(rates[2:4])


def test_weights_are_decayed_only_where_they_multiply():
    model = pomdp.OfflineAlgorithm(pomdp.ModelBackbone(pomdp.NUM_ACTIONS, 16, 1), pomdp.TrainConfig(), "cpu").model
    decayed, others = pomdp.split_weight_decay(list(model.named_parameters()), 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert sum(len(part["params"]) for part in (decayed, others)) == len(list(model.parameters()))
    assert {id(parameter) for parameter in others["params"]} == {id(parameter) for parameter in model.parameters() if parameter.dim() < 2}


def test_times_of_updates_are_logged_with_updates(small, folder):
    """An evaluation between two rows must not take the times of the updates before it: the next row would lack them."""
    assert small(update_steps=4, log_every=2, eval_every=3)[0] == 0
    rows = {"update": [], "evaluation": []}
    for row in rows_of(folder):
        rows["update" if "loss" in row else "evaluation"].append((row["step"], "times/forward_pass" in row))
    assert rows == {"update": [(2, True), (4, True)], "evaluation": [(3, False), (4, False)]}


def test_evaluation_leaves_training_alone(small, folder, group):
    """With games and held-out losses at every update or none at all, the weights come out the same."""
    assert small(eval_every=1, eval_episodes=2, eval_processes=2, eval_workers=1, eval_max_steps=20, update_steps=3)[0] == 0
    assert small(eval_every=10, eval_heldout_frames=0, update_steps=3, name="quiet")[0] == 0
    (quiet,) = group.glob("quiet-*")
    one, other = load(folder / "last.pt"), load(quiet / "last.pt")
    for name in ("model", "optimizer", "ranks", "algorithm"):
        assert_same(one[name], other[name])


def test_choices_of_evaluation_reach_it(small, monkeypatch):
    play, seen = pomdp.play_games, []

    def watched(pool, model, character, games, eval_seed, max_steps, *others):
        seen.append((pool.slots, len(pool.processes), model.backbone.acting_dtype, character, games, eval_seed, max_steps, others[1]))
        return play(pool, model, character, games, eval_seed, max_steps, *others)

    monkeypatch.setattr(pomdp, "play_games", watched)
    status, out, _ = small(update_steps=1, eval_episodes=3, eval_processes=2, eval_workers=1, eval_seed=9, eval_max_steps=8,
                           eval_precision="bf16", eval_clear_state="false", eval_heldout_frames=0,
                           character=f"{RANGER},{MONK}")  # fmt: skip
    assert status == 0 and len(lines_of(out, "TEST_METRICS")) == 1
    assert seen == [(2, 1, torch.bfloat16, character, 3, 9, 8, False) for character in (RANGER, MONK)]


WALK = """
    def vec_act(self, obs, state=None, device="cpu"):
        steps = np.zeros(len(obs["prev_actions"])) if state is None else state[0][0, :, 0].numpy()
        actions = (steps * 5 + obs["tty_cursor"].sum(axis=1) * 3).astype(np.int64) % 16  # moves and runs, in an order that looks random
        actions = np.where(steps % 4 == 3, 38, actions)  # and now and then ESC, which answers questions
        return actions, (torch.as_tensor(steps + 1)[None, :, None],)
"""


def test_arrays_are_in_the_order_of_the_games_seeds(small, group, tmp_path):
    """A walk that depends on nothing but its own game: played one by one, without pool and model, it gives the same values."""
    path = plain_submission(tmp_path / "walk.py")
    text = path.read_text(encoding="utf-8")
    begin, end = text.index("    @torch.no_grad()"), text.index("class OfflineAlgorithm")
    path.write_text(text[:begin] + WALK + text[end:], encoding="utf-8")
    settings = dict(eval_episodes=7, eval_processes=3, eval_workers=2, eval_max_steps=400, update_steps=1, character=VALKYRIE)
    assert small(submission=path, **settings)[0] == 0
    scores, depths = [], []
    game = pomdp.NetHackGame(VALKYRIE, max_steps=400)
    for number in range(7):
        obs, done, step = game.reset(*pomdp.game_seeds(50, number)), False, 0
        while not done:
            obs, _, done, info = game.step(38 if step % 4 == 3 else (step * 5 + int(obs["tty_cursor"].sum(dtype=np.int64)) * 3) % 16)
            step += 1
        scores.append(info["score"])
        depths.append(info["depth"])
    game.close()
    (folder,) = group.iterdir()
    assert np.array_equal(np.load(folder / f"1_{VALKYRIE}_returns.npy"), scores)
    assert np.array_equal(np.load(folder / f"1_{VALKYRIE}_depths.npy"), depths)
    assert len(set(scores)) > 2, "games that score alike show nothing of their order"


# --- going on
def test_resuming_equals_running_on_wherever_it_stopped(small, group):
    """6 updates = 1 + resume to 3 + resume to 6, checkpoints not at evaluations."""
    settings = dict(checkpoint_every=5, eval_every=3)
    assert small(name="straight", update_steps=6, **settings)[0] == 0
    for steps in (1, 3, 6):
        assert small(name="parts", update_steps=steps, resume=True, **settings)[0] == 0
    (straight,), (parts,) = group.glob("straight-*"), group.glob("parts-*")
    assert_same_training(straight, parts)
    assert pomdp.parse_config(["--config", str(parts / "config.yaml")]).update_steps == 6, "the run's config is the one that it ended with"
    # The part that ended at update 1 was evaluated there as well, since it was its last.
    assert [row for row in untimed(rows_of(parts)) if row["step"] > 1] == [row for row in untimed(rows_of(straight)) if row["step"] > 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_told_to_stop_goes_on_to_the_same_end(small, group, monkeypatch, number):
    assert small(name="straight", update_steps=5)[0] == 0
    update, seen = pomdp.Trainer.update, []

    def interrupted(trainer, *args, **options):
        info = update(trainer, *args, **options)
        seen.append(trainer.step)
        if trainer.step == 3:
            os.kill(os.getpid(), number)
        return info

    monkeypatch.setattr(pomdp.Trainer, "update", interrupted)
    status, out, err = small(name="stopped", update_steps=5)
    assert status == 128 + number and "--resume" in out and "Traceback" not in err
    assert seen == [1, 2, 3], "it went on after the signal"
    monkeypatch.setattr(pomdp.Trainer, "update", update)
    assert small(name="stopped", update_steps=5, resume=True)[0] == 0
    (straight,), (stopped,) = group.glob("straight-*"), group.glob("stopped-*")
    assert_same_training(straight, stopped)
    assert untimed(rows_of(straight)) == untimed(rows_of(stopped))


def test_a_run_gives_the_signals_back(small):
    """In a program that trains several times, or does something else afterwards, Ctrl-C must work again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert small(update_steps=1, eval_heldout_frames=0)[0] == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_killed_run_goes_on_to_the_same_end(small, group, monkeypatch, tmp_path):
    """Rows written after the last checkpoint, and a last line cut short, are not there twice in the end."""
    assert small(name="straight", update_steps=5)[0] == 0
    update = pomdp.Trainer.update

    class Killed(BaseException):
        pass

    def killed(trainer, *args, **options):
        if trainer.step == 3:
            raise Killed
        return update(trainer, *args, **options)

    monkeypatch.setattr(pomdp.Trainer, "update", killed)
    with pytest.raises(Killed):
        small(name="killed", update_steps=5)
    (killed_folder,) = group.glob("killed-*")
    assert [row["step"] for row in rows_of(killed_folder)] == [1, 2, 2, 3]
    with open(killed_folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "loss": 1.2')
    monkeypatch.setattr(pomdp.Trainer, "update", update)
    status, out, _ = small(name="killed", update_steps=5, resume=True)
    assert status == 0 and "at step 2" in out
    (straight,) = group.glob("straight-*")
    assert_same_training(straight, killed_folder)
    assert untimed(rows_of(straight)) == untimed(rows_of(killed_folder))


def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder(small, folder, group):
    assert small(update_steps=3)[0] == 0
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink()
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**described, "finished_at_step": 0}), encoding="utf-8")
    rows = rows_of(folder)
    assert small(update_steps=3, resume=True)[0] == 0
    assert untimed(rows_of(folder)) == untimed(rows) and [path.name for path in group.iterdir()] == [folder.name]


def test_resume_with_nothing_to_resume_begins_a_run(small, folder):
    status, out, _ = small(resume=True)
    assert status == 0 and "nothing to resume" in out and (folder / "last.pt").is_file()


def test_a_finished_run_is_not_resumed(small, folder, group):
    small()
    before = files_of(folder)
    assert small(resume=True)[0] == 0
    assert files_of(folder) == before and {path.name for path in group.iterdir()} == {folder.name, folder.name + "-2"}


def test_the_newest_unfinished_run_is_resumed(small, folder):
    for _ in range(3):
        small(update_steps=2)
    status, out, _ = small(resume=True, update_steps=4)
    assert status == 0 and f"{folder.name}-3 at step 2" in out
    status, out, _ = small(resume=True, update_steps=4)  # the third is finished now, so it is the second's turn
    assert status == 0 and f"{folder.name}-2 at step 2" in out


@pytest.mark.parametrize("setting", [dict(learning_rate=1e-4), dict(batch_size=3), dict(seq_len=4), dict(algorithm="{lam: 0.9}"),
                                     dict(heldout_share=0.3), dict(gamma=0.99), dict(precision="bf16")],
                         ids=lambda setting: next(iter(setting)))  # fmt: skip
def test_resume_with_other_settings_never_touches_the_run(small, folder, setting):
    small(update_steps=2)
    before = files_of(folder)
    status, out, _ = small(update_steps=4, resume=True, **setting)
    assert status == 0 and "nothing to resume" in out and files_of(folder) == before
    assert (folder.with_name(folder.name + "-2") / "last.pt").is_file()


def test_resume_may_change_what_does_not_change_training(small, group, tmp_path, stores_path):
    assert small(update_steps=4)[0] == 0
    assert small(update_steps=2, name="moved")[0] == 0
    shutil.move(str(tmp_path / "runs"), str(tmp_path / "elsewhere"))
    status, out, _ = small(update_steps=4, name="moved", resume=True, checkpoints_path="elsewhere", log_every=2, eval_every=4, eval_seed=3,
                           checkpoint_every=3, data_workers=2, eval_heldout_frames=64)  # fmt: skip
    assert status == 0 and "at step 2" in out
    straight, moved = (tmp_path / "elsewhere" / "custom-nethack-pomdp-v0" / f"{name}-{MONK}-seed42" for name in ("custom", "moved"))
    for name in ("model", "optimizer", "ranks"):
        assert_same(load(straight / "last.pt")[name], load(moved / "last.pt")[name])


def test_resume_refuses_changed_games_and_changes_nothing(small, folder, tmp_path, recorded_games):
    data = tmp_path / "data"
    for game in recorded_games[MONK]:
        shutil.copytree(Path(game.path).parent, data / Path(game.path).parent.name, dirs_exist_ok=True)
    settings = dict(data_path=data, store_path=tmp_path / "stores")
    assert small(update_steps=2, **settings)[0] == 0
    shutil.rmtree(next(iter(sorted(data.iterdir()))))
    # A row beyond the checkpoint, as after a crash: a refusal may not cost it.
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "transitions": 96, "loss": 1.0}\n')
    before = files_of(folder)
    assert_user_error(small(update_steps=4, resume=True, **settings), "games.*changed")
    assert files_of(folder) == before


# --- damaged checkpoints
def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    path.write_bytes(b"no checkpoint at all")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, overwrite, empty])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(small, group, damage):
    assert small(name="straight", update_steps=6)[0] == 0
    assert small(name="damaged", update_steps=4)[0] == 0
    (straight,), (damaged,) = group.glob("straight-*"), group.glob("damaged-*")
    damage(damaged / "last.pt")
    status, out, err = small(name="damaged", update_steps=6, resume=True)
    assert status == 0 and "at step 2" in out
    assert re.search(r"^warning: .*last\.pt", err, re.MULTILINE) and "Traceback" not in err
    assert_same_training(straight, damaged)
    assert untimed(rows_of(straight)) == untimed(rows_of(damaged))


def test_a_damaged_checkpoint_is_not_kept_as_the_one_before(small, folder):
    """Renamed to last.prev.pt it would take the place of the only whole one, just before the new one gets its name."""
    assert small(update_steps=4)[0] == 0
    truncate(folder / "last.pt")
    assert small(update_steps=5, resume=True, checkpoint_every=5)[0] == 0
    assert (load(folder / "last.pt")["step"], load(folder / "last.prev.pt")["step"]) == (5, 2)


def test_two_damaged_checkpoints_stop_the_run_and_nothing_is_lost(small, folder):
    assert small(update_steps=4)[0] == 0
    truncate(folder / "last.pt")
    overwrite(folder / "last.prev.pt")
    before = files_of(folder)
    assert_user_error(small(update_steps=6, resume=True), r"last.*pt")
    assert files_of(folder) == before


class Payload:
    """What unpickling runs in a file from a stranger."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_checkpoints_of_strangers_run_no_code(small, folder, tmp_path):
    assert small(update_steps=2)[0] == 0
    torch.save({"format": 1, "step": 2, "model": Payload()}, folder / "last.pt")
    assert_user_error(small(update_steps=4, resume=True), r"last\.pt")
    assert not (tmp_path / "pwned").exists()


def test_another_run_s_checkpoint_is_not_taken(small, group):
    assert small(update_steps=2, name="one")[0] == 0
    assert small(update_steps=2, name="other", learning_rate=1e-4)[0] == 0
    (one,), (other,) = group.glob("one-*"), group.glob("other-*")
    shutil.copy(other / "last.pt", one / "last.pt")
    assert_user_error(small(update_steps=4, name="one", resume=True), r"last\.pt.*settings")


# --- folders
def test_without_resume_nothing_is_ever_overwritten(small, folder, group):
    for _ in range(2):
        assert small(update_steps=1)[0] == 0
    (group / f"custom-{MONK}-seed42-3").mkdir()  # somebody else's, and empty
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    before = files_of(group)
    assert small(update_steps=1)[0] == 0
    now = files_of(group)
    assert {path: now[path] for path in before} == before
    assert {Path(path).parts[0] for path in set(now) - set(before)} == {f"custom-{MONK}-seed42-4"}


def test_folders_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert_user_error(small(checkpoints_path=tmp_path / "file"), "checkpoints_path")
    assert_user_error(small(store_path=tmp_path / "file" / "stores"), "store_path")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_best_weights_are_those_of_the_lowest_held_out_loss(small, folder):
    """With a rate that rises until it is so high that the loss goes up again."""
    assert small(update_steps=6, eval_every=1, learning_rate=0.02, warmup_transitions=192, keep_checkpoints=True)[0] == 0
    losses = {row["step"]: row["heldout/loss_per_action"] for row in rows_of(folder) if "heldout/loss_per_action" in row}
    best, chosen = min(losses, key=losses.get), load(folder / "best.pt")
    assert best not in (1, 6), "losses that only fall, or only rise, show nothing"
    assert (chosen["step"], chosen["heldout"]) == (best, losses[best])
    assert_same(chosen["model"], load(folder / f"{best}.pt")["model"])


def test_weights_of_every_evaluation_are_kept_on_demand(small, folder, group):
    assert small(keep_checkpoints=True)[0] == 0
    assert sorted(path.name for path in folder.glob("*.pt")) == ["2.pt", "4.pt", "best.pt", "last.prev.pt", "last.pt"]
    assert_same(load(folder / "4.pt")["model"], load(folder / "last.pt")["model"])
    assert_same(load(folder / "2.pt")["model"], load(folder / "last.prev.pt")["model"])


SMALL_PROGRAM = """
import sys, torch, custom_nethack_pomdp as pomdp
backbone = pomdp.ModelBackbone
pomdp.ModelBackbone = lambda actions, *_: backbone(actions, 32, 2)
if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(pomdp.main(sys.argv[1:]))
"""


def test_a_run_in_progress_is_not_resumed_by_another(small, folder, tmp_path, stores_path, monkeypatch):
    """Two processes in one folder would mix their rows and checkpoints."""
    program = tmp_path / "small.py"
    program.write_text(SMALL_PROGRAM, encoding="utf-8")
    settings = dict(SMALL, data_path=GAMES, store_path=stores_path, checkpoints_path=tmp_path / "runs", update_steps=10**6,
                    eval_every=10**6)  # fmt: skip
    with open(tmp_path / "out.txt", "w", encoding="utf-8") as out:
        process = subprocess.Popen([sys.executable, str(program), *arguments(settings)], stdout=out, stderr=subprocess.STDOUT,
                                   env={**os.environ, **PATIENT, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (folder / "last.pt").exists() and time.monotonic() < end:
            assert process.poll() is None, (tmp_path / "out.txt").read_text(encoding="utf-8")
            time.sleep(0.1)
        # Left to itself the second run would never end: it stops at its first update.
        monkeypatch.setattr(pomdp.Trainer, "update", lambda trainer, *_, **__: os.kill(os.getpid(), signal.SIGTERM) or {"loss": 0.0})
        status, out, _ = small(**{**settings, "resume": True})
        assert process.poll() is None
        assert status in (2, 128 + signal.SIGTERM) and f"resuming {folder}" not in out, "it went on in the folder of a run in progress"
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    steps = [row["step"] for row in rows_of(folder)]
    assert steps == sorted(steps) and "loss" in rows_of(folder)[-1]


# --- a block from another file
def test_the_references_train_as_submissions(small, group, tmp_path):
    path = ROOT / "scripts" / "references" / "bc.py"
    if not path.is_file():
        pytest.skip("there is no scripts/references/bc.py")
    status, out, err = small(submission=path, update_steps=3, eval_episodes=2, eval_processes=2, eval_workers=1, eval_max_steps=10)
    assert status == 0, err
    assert [line["step"] for line in lines_of(out, "TRAIN_METRICS")] == [1, 2, 3] and len(lines_of(out, "TEST_METRICS")) == 2
    (folder,) = group.iterdir()
    assert "policy.weight" in load(folder / "last.pt")["model"] and "value.weight" not in load(folder / "last.pt")["model"]
    status, out, _ = small(submission=path, update_steps=4, resume=True, eval_episodes=0)
    assert status == 0 and "at step 3" in out
    # The same settings with another block are another run.
    status, out, _ = small(update_steps=5, resume=True)
    assert status == 0 and "nothing to resume" in out


def test_the_own_block_as_a_submission_is_the_same_run(small, group):
    """The block is taken out between the banners, and learns exactly what it learns in its own file."""
    assert small(name="own")[0] == 0
    assert small(name="given", submission=SCRIPT)[0] == 0
    (own,), (given,) = group.glob("own-*"), group.glob("given-*")
    assert_same(load(own / "last.pt")["model"], load(given / "last.pt")["model"])
    assert untimed(rows_of(own)) == untimed(rows_of(given))


PLAIN = """
class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.policy = backbone, nn.Linear(backbone.rnn_hidden_dim, backbone.num_actions)

    @torch.no_grad()
    def vec_act(self, obs, state=None, device="cpu"):
        inputs = {name: torch.as_tensor(value, device=device)[:, None] for name, value in obs.items()}
        output, state = self.backbone(inputs, state)
        return self.policy(output[:, 0]).argmax(-1).cpu().numpy(), state

class OfflineAlgorithm:
    def __init__(self, backbone, config, device):
        self.model, self.steps = Model(backbone), 0

    def parameters(self):
        return self.model.parameters()

    def train_step(self, batch, prev_actions, rnn_states):
        inputs = {name: batch[name][:, :-1] for name in ("tty_chars", "tty_colors", "tty_cursor", "blstats")}
        inputs["prev_actions"] = torch.cat([prev_actions, batch["actions"][:, :-2]], dim=1).long()
        output, state = self.model.backbone(inputs, rnn_states.get("core"))
        logits = self.policy(output)
        self.steps += torch.is_grad_enabled()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["actions"][:, :-1].long().flatten()) SCALE
        return loss, {"core": tuple(part.detach() for part in state)}, INFO

    def policy(self, output):
        return self.model.policy(output)

    def after_gradient_step(self):
        pass
"""


def plain_submission(path, scale="", info="{'loss': float(loss.detach())}"):
    path.write_text(PLAIN.replace("SCALE", scale).replace("INFO", info), encoding="utf-8")
    return path


@pytest.mark.parametrize("info", ["{'loss': float(loss.detach())}", "{}", "{'loss': loss.detach(), 'other': torch.ones(())}"])
def test_a_submission_may_report_whatever_it_likes(small, folder, tmp_path, info):
    """The protocol asks for an `info` of floats, and names none of them."""
    status, out, err = small(submission=plain_submission(tmp_path / "plain.py", info=info), eval_episodes=1, eval_processes=1,
                             eval_workers=1, eval_max_steps=5)  # fmt: skip
    assert status == 0, err
    assert len(lines_of(out, "TRAIN_METRICS")) == 4 and len(lines_of(out, "TEST_METRICS")) == 2


@pytest.mark.parametrize("text, names", [
    ("x = (", r"broken\.py"), ("import nothing_of_this_name", r"broken\.py.*nothing_of_this_name"), ("x = 1", r"broken\.py.*Model"),
    ("class Model: pass", r"broken\.py.*OfflineAlgorithm"),
])  # fmt: skip
def test_a_broken_submission_is_one_line(small, tmp_path, text, names):
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    assert_user_error(small(submission=tmp_path / "broken.py"), names)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.py"]


def test_algorithm_settings_for_a_submission_that_has_none(small, tmp_path):
    path = plain_submission(tmp_path / "plain.py")
    assert_user_error(small(submission=path, algorithm="{burn_in: 2}"), "burn_in")


# --- numbers that are not finite
def test_an_update_that_is_not_finite_never_reaches_the_weights(small, folder, tmp_path):
    """The third update's loss is infinite; the run goes on without it, says so and counts it."""
    path = plain_submission(tmp_path / "plain.py", "* (float('inf') if self.steps == 3 else 1.0)")
    status, _, err = small(submission=path, update_steps=4, checkpoint_every=1, keep_checkpoints=True, eval_every=1, eval_heldout_frames=0)
    assert status == 0 and re.search("warning: .*step 3.*not finite", err)
    models = [load(folder / f"{step}.pt")["model"] for step in (1, 2, 3, 4)]
    assert_same(models[1], models[2])
    assert not torch.equal(models[2]["policy.weight"], models[3]["policy.weight"])
    assert all(bool(torch.isfinite(value).all()) for value in models[3].values())
    rows = [row for row in rows_of(folder) if "loss" in row]
    assert rows[2]["loss"] is None and rows[3]["train/skipped_updates"] == 1


def test_a_run_that_never_is_finite_ends(small, folder, tmp_path):
    path = plain_submission(tmp_path / "plain.py", "* (float('nan') if self.steps > 3 else 1.0)")
    result = small(submission=path, update_steps=200, eval_every=500, checkpoint_every=500, log_every=500, eval_heldout_frames=0)
    assert_user_error(result, "not finite.*learning_rate")
