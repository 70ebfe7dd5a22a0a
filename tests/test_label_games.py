# SPDX-License-Identifier: MIT
"""Human games are labelled: each key stands at the screen on which it was pressed, and training
takes what comes out.

The human games are made here: games are played by chance and recorded, and their records are
written out anew without keys and scores, each key's output in several writes, a fifth of a second
after the key before.
"""

import bz2
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_human_games import QUIET, records_of_version_3, write, xlog

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import label_games

RECORDED = ROOT / "tests" / "data" / "nle_data"
VARIANT = ROOT / "scripts" / "studies" / "variants" / "inverse_dynamics.py"
START = 1_300_000_000
KEYS = "hjklyubnhjklyubns,i.:@"
pytestmark = pytest.mark.usefixtures("one_thread")

# A submission that has looked the keys up: {two screens, one after the other: action, logit}.
STAND_IN = """
import hashlib, json
import custom_nethack_pomdp as ours

with open({table!r}) as file:
    TABLE = json.load(file)

class Model(ours.Model):
    is_inverse = True

    def head(self, core_output, tty_chars):
        logits = torch.zeros(*tty_chars.shape[:2], ours.NUM_ACTIONS)
        for t in range(tty_chars.shape[1] - 1):
            pair = hashlib.sha256(tty_chars[0, t : t + 2].numpy().tobytes()).hexdigest()
            action, logit = TABLE.get(pair, (0, 0.0))
            logits[0, t, action] = logit
        return logits, logits[..., 0]

class OfflineAlgorithm(ours.OfflineAlgorithm):
    model_class = Model
"""


def play(folder, seed):
    """[(key that NLE was sent, or None; what it then sent to the terminal)] of a game that is quit,
    with the end that alt.org's games have."""
    rng = np.random.default_rng(seed)
    game = pomdp.NetHackGame("val-hum-neu", savedir=str(folder))
    game.reset(seed, 6)
    keys = []
    for key in rng.choice(list(KEYS), 300):
        keys += [ord(key), 27]  # it leaves menus
    keys += [27, 27, 27, int(pomdp.nethack.Command.QUIT), ord("y")]
    for key in keys:
        if not game.end:
            game.step(int(pomdp.KEY_TO_ACTION[key]))
    game.close()
    (path,) = folder.rglob("*.ttyrec3.bz2")
    sent = [(None, b"")]
    for _, kind, content in records_of_version_3(path):
        if kind == 1:
            sent.append((content[0], b""))
        elif kind == 0:
            key, before = sent[-1]
            sent[-1] = (key, before + content)
    played = max(number for number, (key, _) in enumerate(sent) if key == ord("y"))
    over = b"\x1b[H\x1b[KDo you want your possessions identified? [ynq] (n)"
    return [*sent[:played], (ord("y"), over), (ord("n"), b"\x1b[2JRIP"), (ord(" "), b"\x1b[H-")]


def write_as_human(path, sent):
    """Version 1: each key's output in three writes of a millisecond, and now and then a bell later
    on. -> [key, or None, that was pressed before each screen which stands]."""
    records, pressed, now = [], [], START * 1_000_000
    for number, (key, content) in enumerate(sent):
        now += 200_000
        if not content:
            continue
        third = len(content) // 3 + 1
        writes = [(now + 1000 * i, content[i * third : (i + 1) * third]) for i in range(3)]
        pressed.append(key)
        if number % 7 == 0:
            writes.append((now + 100_000, b"\x07"))
            pressed.append(None)
        records += [(time, content) for time, content in writes if content]
    records.append((now + 500_000, b"\x07"))  # the converter leaves out the last one
    path.parent.mkdir(parents=True)
    packed = [struct.pack("<iii", t // 10**6, t % 10**6, len(c)) + c for t, c in records]
    path.write_bytes(bz2.compress(b"".join(packed)))
    return pressed


def action_of(key):
    return int(pomdp.KEY_TO_ACTION[key])


def pairs_of(screens):
    pairs = (screens[t : t + 2].tobytes() for t in range(len(screens) - 1))
    return [hashlib.sha256(pair).hexdigest() for pair in pairs]


def as_turn(screen):
    found = re.search(rb" T:(\d+)", screen[23].tobytes())
    return found and found.group(1)


@pytest.fixture(scope="module")
def human(tmp_path_factory):
    """Two games of a Valkyrie in alt.org's layout, a stand-in for the inverse model, and what must
    come of it: {name: (screens [n, 24, 80], actions [n])}."""
    folder = tmp_path_factory.mktemp("human")
    games, wanted, lines = {}, {}, ""
    for seed, player in ((1, "Ada"), (2, "Bob")):
        path = folder / "nao" / player / "2011-03-13.07_06_40.ttyrec.bz2"
        pressed = write_as_human(path, play(folder / player, seed))
        lines += xlog(player, "2011-03-13T07:06:40", "2011-03-13T09:00:00")
        parts = [
            (part.chars.copy(), part.times.copy())
            for part in label_games.human_games.read_parts(path)
        ]
        chars, times = map(np.concatenate, zip(*parts))
        screens = chars[np.append(np.diff(times) > 50_000, True)]  # all but those between
        assert len(screens) == len(pressed)
        over = [b"possessions identified" in screen.tobytes() for screen in screens].index(True)
        screens = screens[: over + 1]
        games[f"{player} {START}"] = (screens, pressed[1 : over + 1])
    # A move against a wall and ESC may do the same; and of some keys it is to be unsure.
    done_by = defaultdict(set)
    for screens, keys in games.values():
        for pair, key in zip(pairs_of(screens), keys):
            done_by[pair].add(key or ord("s"))  # where nothing changed it is sure of a key, too
    table = {pair: (action_of(min(keys)), 20.0) for pair, keys in done_by.items()}
    doubtful = {pair for pair, keys in done_by.items() if len(keys) > 1 or pair < "4"}
    table.update({pair: (table[pair][0], 6.5) for pair in doubtful})  # a probability of 0.85
    for name, (screens, keys) in games.items():
        actions = np.full(len(screens), -1)
        for t, (pair, key) in enumerate(zip(pairs_of(screens), keys)):
            one, other = screens[t], screens[t + 1]
            changed = (one[:22] != other[:22]).any() or as_turn(one) != as_turn(other)
            assert key or not changed
            if changed and pair not in doubtful:
                actions[t] = action_of(key)
        wanted[name] = (screens, actions)
        assert 100 < (actions != -1).sum() < 0.8 * len(screens)
    (folder / "nao" / "xlogfile.1").write_text(lines)
    (folder / "table.json").write_text(json.dumps(table))
    submission = folder / "stand_in.py"
    submission.write_text(STAND_IN.format(table=str(folder / "table.json")))
    checkpoint(folder / "stand_in.pt", submission)
    return folder, wanted


def checkpoint(path, submission=None):
    config = pomdp.TrainConfig(
        submission=submission and str(submission), rnn_hidden_dim=8, eval_episodes=0, device="cpu"
    )
    torch.manual_seed(0)
    algorithm = pomdp.make_algorithm(config, torch.device("cpu"))
    content = {
        "format": pomdp.CHECKPOINT_FORMAT,
        "step": 1,
        "config": json.dumps(pomdp.asdict(config)),
        "model": algorithm.model.state_dict(),
    }
    torch.save(content, path)
    return path


@pytest.fixture
def run(capsys):
    """Runs the command in this process -> what a subprocess would come back with."""

    def command(*arguments):
        capsys.readouterr()
        status = label_games.main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def labelled(human):
    folder, _ = human
    arguments = ["--checkpoint", folder / "stand_in.pt", "--data_path", folder / "nao"]
    arguments += ["--out", folder / "out"]
    line = [sys.executable, str(ROOT / "scripts" / "label_games.py"), *map(str, arguments)]
    environment = {**os.environ, **QUIET}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    return arguments, done


def test_each_label_stands_at_its_screen(human, labelled):
    folder, wanted = human
    _, done = labelled
    assert done.returncode == 0, done.stderr
    path = folder / "out" / "data-val-hum-neu-any.hdf5"
    with h5py.File(path) as file:
        assert sorted(file) == sorted(wanted)
        for name, (screens, actions) in wanted.items():
            game = file[name]
            assert np.array_equal(game["tty_chars"][:], screens)
            assert game["actions"][:].tolist() == actions.tolist()
            assert game["actions"].dtype == np.int16 and not game["dones"][:].any()
            assert (actions != -1).sum() > 100
    keys = sum((actions != -1).sum() for _, actions in wanted.values())
    screens = sum(len(actions) for _, actions in wanted.values())
    assert f"2 games, {screens:,} screens, {keys / screens:.1%} with a key" in done.stdout


def test_a_file_that_is_there_is_left_as_it_is(human, labelled, run):
    """And made anew for another threshold; nothing else is left behind."""
    folder, wanted = human
    arguments, _ = labelled
    path = folder / "out" / "data-val-hum-neu-any.hdf5"
    before = path.read_bytes()
    assert "left as it is" in run(*arguments).stdout and path.read_bytes() == before
    other = [*arguments[:-1], folder / "other"]
    assert run(*other, "--min_probability", "0.8").returncode == 0
    with h5py.File(folder / "other" / path.name) as file:
        assert (file["Ada 1300000000/actions"][:] != -1).sum() > (
            wanted["Ada 1300000000"][1] != -1
        ).sum()
    assert run(*other).returncode == 0
    assert [found.name for found in (folder / "other").iterdir()] == [path.name]
    with h5py.File(path) as one, h5py.File(folder / "other" / path.name) as two:
        assert np.array_equal(one["Ada 1300000000/actions"], two["Ada 1300000000/actions"])


def test_training_takes_the_file_and_counts_labelled_frames_alone(human, labelled, tmp_path):
    """Mixed with recorded games; the held-out loss is over the keys that are known."""
    folder, wanted = human
    argv = ["--data_path", f"{folder / 'out'}, {RECORDED}", "--character", "val-hum-neu"]
    argv += ["--store_path", str(tmp_path / "stores"), "--checkpoints_path", str(tmp_path / "runs")]
    argv += ["--rnn_hidden_dim", "8", "--benchmark_sizes", "false", "--device", "cpu"]
    argv += ["--update_steps", "2", "--batch_size", "4", "--eval_episodes", "0"]
    config = pomdp.parse_config(argv)
    human_games, recorded = pomdp.open_stores(config)
    loader, heldout = pomdp.load_data(config)
    assert human_games.truncated.all() and len(recorded.names) >= 2
    known = {name: (actions != -1).sum() for name, (_, actions) in wanted.items()}
    frames = [0, 0]
    for number, one in enumerate((loader, heldout)):
        for step in range(one.sampler.steps):
            games = one.sampler.locate(step)[0]
            mine = pomdp.known_actions(one.batch_at(step)[0]).sum(1).numpy()
            for row, game in enumerate(games):
                if (
                    game >= 0
                    and one.games.in_store[one.chosen[game]][0].folder == human_games.folder
                ):
                    frames[number] += int(mine[row])
    held_out = pomdp.choose_heldout(human_games.names, config.heldout_share)
    names = [name.split("/")[1] for name in human_games.names]
    assert frames[0] == sum(known[name] for name, is_out in zip(names, held_out) if not is_out)
    assert frames[1] == sum(known[name] for name, is_out in zip(names, held_out) if is_out) > 0
    assert pomdp.main(argv) == 0
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    row = json.loads(metrics.read_text().splitlines()[-1])
    others = pomdp.Games([recorded])
    others = others.frames[others.heldout(config.heldout_share)].sum()
    assert row["heldout/frames"] == frames[1] + others and np.isfinite(row["heldout/loss"])


def test_colours_by_number_and_the_last_write_are_there(tmp_path):
    """From all files of a game, which NLE's converter leaves out."""
    files = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.ttyrec.bz2"
        files.append(write(path, b"\x1b[2J", b"\x1b[H\x1b[38;5;9m" + name.encode()))
    game = label_games.human_games.Game("Ada", 1, 2, tuple(files), "val-hum-neu", "", 0, 0, 1, "")
    screens = label_games.HumanGames([game]).read("Ada 1", Counter())
    assert [bytes(screen[0, :3]) for screen in screens.chars] == [b"   ", b"one", b"   ", b"two"]
    assert screens.colors[1::2, 0, :3].tolist() == [[9, 9, 9]] * 2


def test_rewards_are_what_the_screen_shows():
    """Gold beyond the first, four times the experience points, 50 a new deepest level; hidden lines
    change nothing."""
    lines = [(1, 0, 0), (1, 30, 0), None, (3, 30, 5), (2, 10, 5), None, (3, 50, 6)]
    screens = np.full((len(lines), 24, 80), ord(" "), np.uint8)
    for screen, line in zip(screens, lines):
        if line:
            depth, gold, points = line
            text = b"Dlvl:%d $:%d HP:14(14) Pw:4(4) AC:4 Xp:1/%d T:9" % (depth, 7 + gold, points)
            screen[23, : len(text)] = list(text)
    rewards = label_games.shown_rewards(pomdp.read_blstats(screens))
    assert rewards.tolist() == [30, 0, 120, -20, 0, 44, 0]
    assert label_games.shown_rewards(pomdp.read_blstats(screens[2:3])).tolist() == [0]


def test_rewards_are_the_games_own(tmp_path):
    """As far as AutoAscend's games are scored by gold, experience and depth: nearly always."""
    store = pomdp.open_or_build_store(str(RECORDED), str(tmp_path / "stores"), "val-hum-neu")
    games = label_games.RecordedGames(store)
    for name, number in games.games.items():
        screens = games.read(name, None)
        assert len(screens.chars) == store.frames[number]
        shown = label_games.shown_rewards(pomdp.read_blstats(screens.chars)).sum()
        own = store.rewards(number)[1].sum()
        assert own > 0 and abs(shown - own) <= 0.05 * own, name


@pytest.fixture(scope="module")
def inverse(tmp_path_factory):
    """A real inverse model, fresh."""
    return checkpoint(tmp_path_factory.mktemp("inverse") / "inverse.pt", VARIANT)


def test_games_with_keys_are_labelled_without_a_look_at_them(inverse, run, tmp_path):
    """The model is told no key, and reads a game in parts as it does in one piece; --true_keys
    keeps the keys."""
    arguments = ["--data_path", RECORDED, "--store_path", tmp_path / "stores"]
    arguments += ["--character", "val-hum-neu"]
    every_key = ["--checkpoint", inverse, "--min_probability", "0", "--out", tmp_path / "all"]
    done = run(*arguments, *every_key)
    assert done.returncode == 0, done.stderr
    assert re.search(r"moves +[\d,]+ +[\d.]+% +[\d.]+% +[\d.]+%", done.stdout)
    assert run(*arguments, "--true_keys", "--out", tmp_path / "true").returncode == 0
    store = pomdp.open_or_build_store(str(RECORDED), str(tmp_path / "stores"), "val-hum-neu")
    algorithm, *_ = pomdp.load_agent(inverse)
    model = algorithm.model.eval()
    with (
        h5py.File(tmp_path / "all" / "data-val-hum-neu-any.hdf5") as one,
        h5py.File(tmp_path / "true" / "data-val-hum-neu-any.hdf5") as true,
    ):
        for number, name in enumerate(store.names):
            mine, keys = one[name.replace("/", " ")], true[name.replace("/", " ")]["actions"][:]
            blocks = [store.block(number, k) for k in range(-(-store.frames[number] // 64))]
            own = np.concatenate([block["actions"] for block in blocks])
            assert keys[:-1].tolist() == own[:-1].tolist() and keys[-1] == -1
            frames = {
                name: torch.from_numpy(np.concatenate([block[name] for block in blocks]))[None]
                for name in pomdp.OBSERVATIONS
            }
            told = torch.from_numpy(own.astype(int))[None]  # which it must not see
            with torch.no_grad():
                output, _ = model.backbone({**frames, "prev_actions": told})
                logits = model.head(output, frames["tty_chars"])[0]
            labels = mine["actions"][:]
            given = labels[:-1] != -1
            assert given.mean() > 0.5 and labels[-1] == -1
            same = labels[:-1][given] == logits[0, :-1].argmax(-1).numpy()[given]
            assert same.mean() > 0.999  # sums over other lengths are rounded otherwise


def test_the_inverse_model_sees_what_came_after(games):
    """A key's logits depend on the frame after it, not on later ones, and on no key."""
    config = pomdp.TrainConfig(submission=str(VARIANT), rnn_hidden_dim=16, seq_len=8)
    torch.manual_seed(0)
    algorithm = pomdp.make_algorithm(config, torch.device("cpu"))
    loader = pomdp.ChunkLoader(games, np.arange(len(games.frames)), config, 4, 1.0)
    batch, prev_actions = loader.batch_at(3)
    batch["mask"][:, :-1] = False
    batch["mask"][:, 4] = True  # the loss is of the key at frame 4 alone

    def loss_of(batch, prev_actions=prev_actions):
        with torch.no_grad():
            return float(algorithm.train_step(batch, prev_actions, {})[0])

    def changed_at(t, name, value):
        return {**batch, name: batch[name].index_fill(1, torch.tensor([t]), value)}

    loss = loss_of(batch)
    for name, value in (("tty_chars", 64), ("tty_cursor", 9)):
        assert loss_of(changed_at(5, name, value)) != loss
        assert loss_of(changed_at(6, name, value)) == loss
    for t in (0, 3, 5):
        assert loss_of(changed_at(t, "actions", 7)) == loss
    assert loss_of(batch, torch.zeros_like(prev_actions)) == loss
    assert loss_of(changed_at(4, "actions", 7)) != loss
    # after a game's last key nothing is seen
    assert loss_of(changed_at(4, "dones", True)) == 0


def test_mistakes_get_one_line(human, inverse, run, tmp_path):
    folder, _ = human
    agent = checkpoint(tmp_path / "agent.pt")
    nao = ["--data_path", folder / "nao", "--out", tmp_path / "out"]
    games = ["--data_path", RECORDED, "--out", tmp_path / "out"]
    cases = {
        "is no inverse model; train one": ["--checkpoint", agent, *nao],
        "cannot be read as a checkpoint": ["--checkpoint", VARIANT, *nao],
        "from 0 to 1": ["--checkpoint", inverse, *nao, "--min_probability", "90"],
        "no human games of mon-hum-neu": ["--checkpoint", inverse, *nao, "--character=mon-hum-neu"],
        "unknown character": ["--checkpoint", inverse, *nao, "--character", "mon"],
        "human games have none": ["--true_keys", *nao],
        "give --checkpoint": nao,
        "no games of wiz-elf-cha": ["--true_keys", *games, "--character", "wiz-elf-cha"],
    }
    for says, arguments in cases.items():
        done = run(*arguments, "--store_path", tmp_path / "stores")
        assert done.returncode == 2 and says in done.stderr, (says, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_recording_that_cannot_be_read_is_left_out_and_told(human, run, tmp_path):
    folder, wanted = human
    for path in (folder / "nao").rglob("*"):
        if path.is_file():
            copy = tmp_path / "nao" / path.relative_to(folder / "nao")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    next((tmp_path / "nao" / "Bob").iterdir()).write_bytes(b"rubbish")
    arguments = ["--checkpoint", folder / "stand_in.pt", "--data_path", tmp_path / "nao"]
    done = run(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 0 and "1 games that cannot be read" in done.stdout
    assert "left out Bob" in done.stderr
    with h5py.File(tmp_path / "out" / "data-val-hum-neu-any.hdf5") as file:
        assert [*file] == ["Ada 1300000000"]
        assert file["Ada 1300000000/actions"][:].tolist() == wanted["Ada 1300000000"][1].tolist()


def test_a_map_in_other_characters_is_not_labelled(tmp_path):
    """In UTF-8 a wall is three cells, and all that is at its right stands elsewhere."""
    path = write(tmp_path / "a.ttyrec.bz2", *["\x1b[5;5H┌─┐\x1b[6;5H│@│".encode()] * 3)
    game = label_games.human_games.Game("x", 1, 2, (path,), "val-hum-neu", "3.7.0", 0, 0, 1, "")
    with pytest.raises(pomdp.GameError, match="its map is neither ASCII nor"):
        label_games.HumanGames([game]).read("x 1", Counter())
    write(path, *[b"\x1b[5;5H\xda\xc4\xbf\x1b[6;5H\xb3@\xb3"] * 3)
    assert len(label_games.HumanGames([game]).read("x 1", Counter()).chars) == 3


def test_data_paths(tmp_path):
    """Several by commas; a path that exists is one, whatever its name."""
    assert list(pomdp.data_paths(None)) == [None]
    assert list(pomdp.data_paths("a, b/c,,")) == ["a", "b/c"]
    assert list(pomdp.data_paths(",")) == [","]
    (tmp_path / "a,b").mkdir()
    assert list(pomdp.data_paths(str(tmp_path / "a,b"))) == [str(tmp_path / "a,b")]
