"""Reports: their statistics against plain loops and closed forms, their reading of rows and folders, their text and pictures."""

import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
report = pytest.importorskip("report", reason="scripts need Python 3.10")
study = sys.modules["study"]
pytestmark = pytest.mark.pinned_stack  # matplotlib

MONK, VALKYRIE = "mon-hum-neu", "val-hum-neu"
numbers = st.lists(st.integers(-5, 40).map(float), min_size=1, max_size=12)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------
def plain_interquartile_mean(values):
    ordered = sorted(values)
    cut = int(0.25 * len(ordered))
    middle = ordered[cut : len(ordered) - cut]
    return sum(middle) / len(middle)


def plain_improvement(x, y):
    return sum(1.0 if one > other else 0.5 if one == other else 0.0 for one in x for other in y) / (len(x) * len(y))


@given(numbers)
def test_interquartile_mean_is_the_mean_of_the_middle_half(values):
    assert report.interquartile_mean(np.array(values)) == pytest.approx(plain_interquartile_mean(values))


def test_interquartile_mean_by_hand_and_by_rows():
    assert report.interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == 3.5  # 2, 3, 4, 5 are the middle half
    rows = np.array([[9.0, 1, 2, 0], [5, 5, 5, 1000]])
    assert report.interquartile_mean(rows).tolist() == [1.5, 5.0]


@given(numbers, numbers)
def test_improvement_counts_pairs_and_halves_ties(x, y):
    found = report.improvement(np.array(x), np.array(y))
    assert found == pytest.approx(plain_improvement(x, y))
    assert found + report.improvement(np.array(y), np.array(x)) == pytest.approx(1.0)


def test_improvement_of_normal_scores_is_the_known_one():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.7, 1.0, 3000), rng.normal(0.0, 2.0, 3000)
    expected = 0.5 * (1.0 + math.erf(0.7 / math.sqrt(1.0 + 4.0) / math.sqrt(2.0)))  # P(X - Y > 0)
    assert report.improvement(x, y) == pytest.approx(expected, abs=0.02)


def test_resampled_improvement_equals_a_loop_over_the_resamples():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, 7).astype(float), rng.integers(0, 6, 5).astype(float)
    drawn_x, drawn_y = report.resampled_indices([4, 3], 20, 1), report.resampled_indices([5], 20, 2)
    expected = [plain_improvement(x[one], y[other]) for one, other in zip(drawn_x, drawn_y)]
    assert report.improvement_samples(x, y, drawn_x, drawn_y) == pytest.approx(expected)
    assert len(set(expected)) > 3


def test_resamples_stay_within_their_seed_and_repeat():
    drawn = report.resampled_indices([3, 5, 1], 400, 7)
    assert drawn.shape == (400, 9)
    for part, (low, high) in zip(np.split(drawn, [3, 8], axis=1), ((0, 3), (3, 8), (8, 9))):
        assert set(np.unique(part)) == set(range(low, high))  # with replacement, and every game at times
    assert any(len(set(row[:3])) < 3 for row in drawn.tolist())
    assert np.array_equal(drawn, report.resampled_indices([3, 5, 1], 400, 7))
    assert not np.array_equal(drawn, report.resampled_indices([3, 5, 1], 400, 8))


def test_stratified_means_do_not_move_where_only_seeds_differ():
    values = np.array([0.0] * 10 + [1.0] * 10)
    assert np.all(values[report.resampled_indices([10, 10], 200, 0)].mean(axis=1) == 0.5)
    assert np.std(values[report.resampled_indices([20], 200, 0)].mean(axis=1)) > 0.05


def test_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    low, high = report.interval(values[report.resampled_indices([400], 5000, 0)].mean(axis=1))
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.03) and high == pytest.approx(values.mean() + half, abs=0.03)


@given(st.lists(st.lists(st.sampled_from([-0.1, 0.0, 0.002, 0.5, 3.0]), min_size=3, max_size=3), min_size=1, max_size=5))
def test_geometric_means_are_the_tasks(rows):
    assert report.geometric_means(np.array(rows)) == pytest.approx([pomdp.geometric_mean(row) for row in rows])
    single = np.array(rows)[:, :1]
    assert report.geometric_means(single) == pytest.approx(single[:, 0])


def test_counts_of_resamples():
    drawn = np.array([[0, 0, 2], [1, 1, 1]])
    assert report.counts_of(drawn, 4).tolist() == [[2, 0, 1, 0], [0, 3, 0, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# Rows and arms
# ----------------------------------------------------------------------------------------------------------------------
def row(algorithm="ours", seed=1, scores=(10.0, 20.0), character=MONK, variant="default", settings="s", group="made", **others):
    """A row as study.py writes it."""
    data = {name: {"games": 4, "frames": 1000} for name in ("training", "heldout")}
    content = {
        "study": group, "algorithm": algorithm, "variant": variant, "seed": seed, "characters": [character],
        "settings": f"{settings}-{algorithm}-{variant}", "config": {},
        "evaluation": {"eval_max_steps": 30, "eval_clear_state": True, "games": 2},
        "commit": "0123456789abcdef", "hardware": {"device": "cpu", "cpu": "some CPU", "cores": 2}, "rnn_hidden_dim": 32,
        "data": {character: {**data, "games_sha256": "abc", "fingerprint": "def"}},
        "transitions": 300, "best_transitions": 200, "wall_seconds": 5.0, "evaluation_seconds": 2.0,
        "heldout": {"loss_per_action": 1.25, "accuracy": 0.5}, "train_loss": 1.125,
        "curve": [[100, 2.0, 2.5], [200, 1.25, 1.5], [300, 1.5, 1.0]], "scores": {character: list(scores)},
        "depths": {character: [1] * len(scores)}, "ends": {character: {"died": len(scores), "no progress": 0, "step limit": 0}},
    }  # fmt: skip
    return {**content, **others}


def write_rows(file, rows):
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


def made_rows():
    """Three arms, two of them with two seeds, one of them also acting in another way; two characters."""
    rng, rows = np.random.default_rng(4), []
    for (algorithm, variant, seed, level), character in itertools.product(
        [("ours", "default", 1, 5.0), ("ours", "default", 2, 5.2), ("ours", "argmax", 1, 3.0), ("bc", "default", 1, 3.5),
         ("bc", "default", 2, 3.4), ("cql", "default", 1, 1.0)], (MONK, VALKYRIE)):  # fmt: skip
        rows.append(row(algorithm, seed, np.floor(rng.lognormal(level, 1.0, 40)).tolist(), character, variant))
    return rows


def test_arms_pool_the_games_of_their_seeds():
    arms, remarks = report.collect(made_rows())
    assert [arm.label for arm in arms] == ["ours", "bc", "cql", "ours / argmax"] and not remarks  # other ways to act come last
    assert [len(arm.games(MONK)) for arm in arms] == [80, 80, 40, 40]
    assert arms[0].normalized(MONK) == pytest.approx(arms[0].games(MONK) / 17456.05)


def test_repeated_rows_count_once_and_the_last_is_taken():
    arms, remarks = report.collect([row(scores=[1.0]), row(scores=[2.0]), row(seed=2, scores=[3.0])])
    assert arms[0].games(MONK).tolist() == [2.0, 3.0]
    assert len(remarks) == 1 and remarks[0].startswith("1 rows repeat others")


def test_rows_of_other_settings_are_never_pooled():
    arms, remarks = report.collect([row(), row(settings="other"), row("bc")])
    assert [arm.label for arm in arms] == ["ours [s-ou]", "ours [othe]", "bc"] and "shown apart" in remarks[0]
    arms, _ = report.collect([row(), row(group="second")])
    assert [arm.label for arm in arms] == ["ours (made)", "ours (second)"]


def test_references_are_those_of_the_same_study():
    arms, _ = report.collect([row(), row("bc"), row(group="second"), row("bc", group="second"), row(group="third")])
    by_group = {(arm.algorithm, arm.group): arm for arm in arms}
    for group in ("made", "second"):
        assert report.choose_references(by_group["ours", group], arms, ["bc", "iql"]) == [by_group["bc", group], None]
    assert report.choose_references(by_group["ours", "third"], arms, ["bc"]) == [None]  # which one is not clear
    assert report.choose_references(by_group["bc", "made"], arms, ["bc"]) == [None]


def test_improvement_over_characters_is_the_mean_of_both():
    ours, bc = report.collect(made_rows())[0][:2]
    found = report.estimate_improvement(ours, bc, [MONK, VALKYRIE], 500)
    assert found.value == pytest.approx(np.mean([plain_improvement(ours.games(name), bc.games(name)) for name in (MONK, VALKYRIE)]))
    assert 0.5 < found.low < found.value < found.high < 1.0


def test_no_score_over_characters_for_an_arm_that_did_not_play_all():
    ours, bc = report.collect([row(), row(character=VALKYRIE), row("bc")])[0]
    expected = math.sqrt(15.0 / 17456.05 * 15.0 / 18624.77)
    assert report.estimate_over_characters(ours, [MONK, VALKYRIE], 100).value == pytest.approx(expected)
    assert report.estimate_over_characters(bc, [MONK, VALKYRIE], 100) is None


def test_curves_average_over_the_seeds_that_have_the_point():
    rows = [row(curve=[[100, 2.0, None], [200, 1.0, 1.0]]), row(seed=2, curve=[[100, 3.0, 1.0], [200, None, 1.0], [300, 0.5, 1.0]])]
    assert report.mean_curve(rows).tolist() == [[100, 2.5, 2.0, 3.0], [200, 1.0, 1.0, 1.0], [300, 0.5, 0.5, 0.5]]


def test_missing_numbers_are_left_out_and_not_taken_for_zero():
    rows = [row(heldout={"accuracy": 0.25}), row(heldout={"accuracy": None}), row(heldout={}), row(heldout={"accuracy": 0.75})]
    assert report.over_seeds(rows, lambda one: one["heldout"].get("accuracy")) == (0.5, 0.25, 0.75)
    assert report.over_seeds(rows, lambda one: one["heldout"].get("entropy")) is None


def by_game(*losses):
    return {"heldout_games": {MONK: {f"game {place}": {"loss_per_action": loss} for place, loss in enumerate(losses)}}}


def test_held_out_losses_are_compared_on_equal_games():
    """Games differ far more than arms: the difference is sure although the intervals of the two losses overlap."""
    hard = np.linspace(0.5, 3.0, 9)
    rows = [row(**by_game(*hard)), row(seed=2, **by_game(*(hard + 0.02))), row("bc", **by_game(*(hard + 0.1))), row("cql")]
    arms = report.collect(rows)[0]
    assert list(report.heldout_losses(arms[0], MONK, [1, 2]).values()) == pytest.approx(hard + 0.01)
    lines = report.heldout_table(arms, MONK, 400).splitlines()[2:]
    ours, bc = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines)  # cql has none
    assert ours[:3] == ["ours", "2", "9"] and ours[3].startswith("1.760 [") and ours[4] == report.NOTHING
    assert bc[:3] == ["bc", "1", "9"] and bc[3].startswith("1.850 [") and bc[4] == "**0.100 [0.100, 0.100]**"  # of its seed
    low, high = (float(end) for end in ours[3][7:-1].split(","))
    assert low < 1.4 and high > 2.1  # drawn by games: nine of them say little


def test_no_table_of_held_out_games_without_them(made):
    assert report.heldout_table(report.collect(made_rows())[0], MONK, 100) == "" and "held-out games |" not in made[1]


def test_recorded_games_stand_beside_the_arms():
    recorded = {MONK: [0.0, 100.0, 200.0, 20.0]}
    arms = report.collect([row(recorded_scores=recorded), row("bc", recorded_scores=recorded), row("cql")])[0]
    lines = report.character_table(arms, MONK, 200).splitlines()
    assert len(lines) == 2 + 3 + 1  # once for all arms
    cells = [cell.strip() for cell in lines[-1].strip("| ").split("|")]
    assert cells[0].startswith("AutoAscend") and cells[2] == "4" and cells[3].startswith("80.0 [") and cells[4] == "60"
    assert cells[5].startswith(f"{80 / 17456.05:.4f} [")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------
OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


@pytest.mark.parametrize("count", [1, 2, 6, 7, 12, 30])
def test_no_panel_shows_two_arms_alike(count):
    arms = report.collect([row(f"arm{place:02d}") for place in range(count)])[0]
    look, panels = report.styles(arms), report.panels_of(arms)
    assert [panel[0] for panel in panels] == [arms[0]] * len(panels)  # the first arm to compare with
    assert [arm for panel in panels for arm in panel[1:]] == arms[1:]
    for panel in panels:
        assert len(panel) <= report.MOST_IN_PANEL
        for name in ("color", "linestyle", "marker"):  # each alone tells them apart
            assert len({str(look[arm.label][name]) for arm in panel}) == len(panel)
    assert {style["color"] for style in look.values()} <= OKABE_ITO


def assert_picture(folder, name):
    """A PNG that is not blank, and an SVG that can be read."""
    import matplotlib.image

    pixels = matplotlib.image.imread(folder / f"{name}.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 500
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.6
    assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, text) of the report of `made_rows`, through the command line."""
    folder = tmp_path_factory.mktemp("report")
    rows = write_rows(folder / "rows.jsonl", made_rows())
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), str(rows), "--out", str(folder / "out"), "--resamples", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder / "out", (folder / "out" / "report.md").read_text(encoding="utf-8")


def test_report_has_every_picture_and_names_it(made):
    folder, text = made
    names = ["scores", "improvement", "distributions", "curves"]
    expected = ["report.md", *(f"{name}.{kind}" for name in names for kind in ("png", "svg"))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    for name in names:
        assert f"({name}.png)" in text and f"({name}.svg)" in text
        assert_picture(folder, name)


def cells(text, label, after):
    """The cells of the first table line after the heading `after` that begins with `label`."""
    lines = text[text.index(after) :].splitlines()
    return next([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| {label} |"))


def test_tables_hold_the_numbers(made):
    text = made[1]
    games = {(algorithm, character): np.array([score for one in made_rows() if one["algorithm"] == algorithm and one["variant"] == "default"
                                               for score in one["scores"].get(character, [])])
             for algorithm in ("ours", "bc", "cql") for character in (MONK, VALKYRIE)}  # fmt: skip
    monk = cells(text, "ours", f"### {MONK}")
    assert monk[1:3] == ["2", "80"] and monk[4] == f"{np.median(games['ours', MONK]):.0f}"
    assert monk[3].startswith(f"{games['ours', MONK].mean():.0f} [")  # points, and in points its interval
    assert [float(end) for end in monk[3].split("[")[1][:-1].split(",")] == pytest.approx(
        [float(end) * 17456.05 for end in monk[5].split("[")[1][:-1].split(",")], abs=1.5)
    assert monk[5].startswith(f"{games['ours', MONK].mean() / 17456.05:.4f} [")
    assert monk[6].startswith(f"{plain_interquartile_mean(games['ours', MONK]) / 17456.05:.4f} [")
    assert monk[9] == "80 / 0 / 0"
    summary = cells(text, "ours", "## Scores")
    means = [games["ours", MONK].mean() / 17456.05, games["ours", VALKYRIE].mean() / 18624.77]
    assert summary[1].startswith(f"{math.sqrt(means[0] * means[1]):.4f} [")
    for place, reference in ((2, "bc"), (3, "cql")):
        expected = np.mean([plain_improvement(games["ours", name], games[reference, name]) for name in (MONK, VALKYRIE)])
        assert summary[place].startswith(f"{expected:.3f} [")
    assert "P(arm > iql)" not in text  # there is no such arm
    learned = cells(text, "ours", f"### Trained on {MONK}")
    assert learned[3:6] == ["1.2500", "0.500", "1.1250"]
    assert "LSTM units a layer: 32" in text and "some CPU" in text


def test_report_repeats(made, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", made_rows())
    assert report.main([str(rows), "--out", str(tmp_path / "out"), "--resamples", "300"]) == 0
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == made[1]
    for name in ("curves.svg", "improvement.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (made[0] / name).read_bytes()


def test_settings_that_differ_are_told(tmp_path, capsys):
    odd = row("bc", evaluation={"eval_max_steps": 30, "eval_clear_state": False, "games": 2})
    rows = write_rows(tmp_path / "rows.jsonl", [row(), row(seed=2), odd])
    assert report.main([str(rows), "--out", str(tmp_path), "--resamples", "50"]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "`eval_clear_state`: true, but false for bc" in text and "`eval_max_steps`: 30\n" in text


# ----------------------------------------------------------------------------------------------------------------------
# A run's folder
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, stores, stores_path):
    """A small run of the main script's own training loop, two evaluations with games."""
    folder = tmp_path_factory.mktemp("run")
    values = dict(character=MONK, data_path=str(ROOT / "tests" / "data" / "nle_data"), store_path=str(stores_path), update_steps=4,
                  batch_size=4, seq_len=8, log_every=1, eval_every=2, eval_episodes=3, eval_processes=3, eval_max_steps=25,
                  eval_heldout_frames=64,
                  checkpoints_path=str(folder), eval_workers=1, train_seed=5)  # fmt: skip
    return pomdp.train(study.make_config(values, 32, "test"))


def test_a_runs_folder_is_read_as_its_last_evaluation(run_folder):
    found = report.read_run(run_folder)
    metrics = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    last = metrics[-1]
    assert (found["algorithm"], found["seed"], found["transitions"]) == ("custom", 5, 128)
    assert np.mean(found["scores"][MONK]) == pytest.approx(last["reward_mean"]) and len(found["scores"][MONK]) == 3
    assert np.mean(found["depths"][MONK]) == pytest.approx(last["depth_mean"])
    assert found["ends"][MONK] == {end: round(3 * last["end_" + end.replace(" ", "_")]) for end in study.ENDS}
    assert sum(found["ends"][MONK].values()) == 3
    assert found["heldout"]["loss_per_action"] == last["heldout/loss_per_action"]
    assert [point[0] for point in found["curve"]] == [64, 128]


def test_rows_and_a_runs_folder_in_one_report(run_folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [one for one in made_rows() if one["characters"] == [MONK]])
    assert report.main([str(rows), str(run_folder), "--out", str(tmp_path / "out"), "--resamples", "50"]) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert cells(text, "custom", f"### {MONK}")[1:3] == ["1", "3"]
    assert cells(text, "custom", "## Scores")[2] != report.NOTHING  # compared with bc
    assert str(tmp_path) not in text


def test_a_run_without_games_still_has_its_curve(run_folder, tmp_path, capsys):
    folder = tmp_path / "no_games"
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_bytes((run_folder / name).read_bytes())
    assert report.main([str(folder), "--out", str(tmp_path / "out"), "--resamples", "50"]) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "no games were played by custom" in text and "(curves.png)" in text and "(scores.png)" not in text


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------
def broken_middle(folder):
    return write_rows(folder / "x.jsonl", [row()]).write_text('{"study": 1}\n' + json.dumps(row()) + "\n")


MISTAKES = {
    "missing file": (lambda folder: None, ["x.jsonl"], "x.jsonl does not exist"),
    "no run": (lambda folder: (folder / "x.jsonl").mkdir(), ["x.jsonl"], "is no run's folder"),
    "broken line": (broken_middle, ["x.jsonl"], "line 1: not a row of a study"),
    "empty": (lambda folder: write_rows(folder / "x.jsonl", []), ["x.jsonl"], "there are no rows"),
    "unknown character": (lambda folder: write_rows(folder / "x.jsonl", [row(character="mon-hum-xxx")]), ["x.jsonl"], "mon-hum-xxx"),
    "no resamples": (lambda folder: write_rows(folder / "x.jsonl", [row()]), ["x.jsonl", "--resamples", "0"],
                     "--resamples must be at least 1"),
    "out is a file": (lambda folder: write_rows(folder / "x.jsonl", [row()]), ["x.jsonl", "--out", "x.jsonl"], "choose another --out"),
    "no arguments": (lambda folder: None, [], "required"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    prepare, arguments, expected = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: error: ") and error.count("\n") == 1 and expected in error


def test_a_line_that_was_cut_short_is_left_out_with_a_warning(tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [row(), row(seed=2)])
    file.write_text(file.read_text()[:-30])
    assert [one["seed"] for one in report.read_all([file])] == [1]
    assert "cut short" in capsys.readouterr().err
