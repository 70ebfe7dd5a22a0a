# SPDX-License-Identifier: MIT
"""Reports: their numbers against plain arithmetic, their reading of rows and folders, their table
and picture."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import report

MONK, VALKYRIE = "mon-hum-neu", "val-hum-neu"
MEAN = {MONK: 17456.05, VALKYRIE: 18624.77}


def row(algorithm="ours", seed=1, scores=(10.0, 20.0), character=MONK, losses=(), **others):
    """A row as study.py writes it."""
    games = {place: {"loss_per_action": loss} for place, loss in enumerate(losses)}
    content = dict(
        study="made", algorithm=algorithm, variant="default", settings=algorithm, seed=seed
    )
    content.update(
        characters=[character], scores={character: list(scores)}, evaluation={"eval_seed": 50}
    )
    content.update(heldout={"loss_per_action": 1.25}, curve=[[100, 2.0, 2.5], [200, 1.25, 1.5]])
    content.update(ends={character: {"died": len(scores), "no progress": 0, "step limit": 0}})
    content.update({"heldout_games": {character: games}} if games else {}, **others)
    return content


def write_rows(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def table_of(rows, baseline="ours"):
    """{(character, arm): {column: cell}} of the table of these rows."""
    lines = report.make_table(report.collect(rows), baseline).splitlines()
    header, _, *cells = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines)
    made = [dict(zip(header, line)) for line in cells]
    return {(line["character"], line.get("arm")): line for line in made}


def numbers(cell):
    return [
        float(part)
        for part in cell.replace(", ", " ").replace(",", "").replace("[", "").strip("*]").split()
    ]


def test_scores_are_those_of_the_games_of_all_seeds():
    rng = np.random.default_rng(1)
    scores = [np.floor(rng.lognormal(level, 1.0, 60)).tolist() for level in (5.0, 5.5)]
    ends = {MONK: {"died": 50, "no progress": 7, "step limit": 3}}
    line = table_of(
        [row(scores=scores[0], ends=ends), row("bc"), row(seed=2, scores=scores[1], ends=ends)]
    )[MONK, "ours"]
    games = np.array([*scores[0], *scores[1]])
    half = 1.96 * games.std() / math.sqrt(120)  # the normal interval is near
    mean, low, high = numbers(line["points [95 %]"])
    assert mean == round(games.mean(), 1) and (line["seeds"], line["games"]) == ("2", "120")
    assert low == pytest.approx(mean - half, abs=0.2 * half) and high == pytest.approx(
        mean + half, abs=0.2 * half
    )
    score = numbers(line["normalized score [95 %]"])
    assert score == pytest.approx(
        [mean / MEAN[MONK], low / MEAN[MONK], high / MEAN[MONK]], abs=6e-5
    )
    assert line["died / no progress / step limit"] == "100 / 14 / 6"


def test_differences_are_between_equal_games():
    """Game for game 5 points and 0.1 nats more: sure, although both arms' own intervals overlap
    widely."""
    scores, hard = np.arange(0.0, 200.0, 10.0), np.linspace(0.5, 3.0, 9)
    rows = [
        row(scores=scores, losses=hard),
        row(
            seed=2, scores=scores + 70, losses=[*hard + 0.02, 9.0]
        ),  # a game that seed 1 was not scored on
        row("bc", scores=scores[:16] + 5, losses=hard + 0.1),  # seed 1 alone, and fewer games
        row("iql", seed=3, losses=hard),  # no seed in common
        row("cql", evaluation={"eval_seed": 51}),  # other games
    ]
    made = table_of(rows)
    assert made[MONK, "bc"]["points more than ours [95 %]"] == "**5.0 [5.0, 5.0]**"
    assert made[MONK, "bc"]["loss more than ours [95 %]"] == "**0.100 [0.100, 0.100]**"
    mean, low, high = numbers(made[MONK, "ours"]["held-out loss, nats [95 %]"])
    # mean over seeds of a game, drawn by games: nine say little
    assert mean == 1.76 and low < 1.4 and high > 2.1
    for arm in ("ours", "iql", "cql"):
        assert made[MONK, arm]["points more than ours [95 %]"] == report.NOTHING, arm
    assert made[MONK, "iql"]["loss more than ours [95 %]"] == report.NOTHING
    # not known game by game: no interval
    assert made[MONK, "cql"]["held-out loss, nats [95 %]"] == "1.250"
    assert (
        table_of(rows, "bc")[MONK, "ours"]["points more than bc [95 %]"] == "**-5.0 [-5.0, -5.0]**"
    )


def test_a_difference_that_may_be_none_is_not_bold():
    rows = [row(scores=(1.0, 2.0, 3.0, 4.0)), row("bc", scores=(2.0, 1.0, 4.0, 3.0))]
    assert table_of(rows)[MONK, "bc"]["points more than ours [95 %]"] == "0.0 [-1.0, 1.0]"


def test_over_characters_the_geometric_mean_counts():
    made = table_of(
        [row(scores=(4000.0,)), row(character=VALKYRIE, scores=(500.0, 1500.0)), row("bc")]
    )
    expected = math.sqrt(4000 / MEAN[MONK] * 1000 / MEAN[VALKYRIE])
    assert (
        made["all", "ours"]["normalized score [95 %]"] == f"{expected:.4f}"
        and made["all", "ours"]["games"] == "3"
    )
    assert ("all", "bc") not in made  # it did not play both


def test_recorded_games_stand_beside_the_arms_once():
    recorded = {MONK: [0.0, 100.0, 200.0, 20.0]}
    text = report.make_table(
        report.collect([row(recorded_scores=recorded), row("bc", recorded_scores=recorded)])
    )
    (line,) = (line for line in text.splitlines() if "AutoAscend" in line)
    assert "| 4 | 80.0 [" in line and f"| {80 / MEAN[MONK]:.4f} [" in line


def test_columns_that_say_nothing_are_left_out():
    assert report.make_table(report.collect([row()])).splitlines()[0] == (
        "| character | games | points [95 %] | normalized score [95 %] | held-out loss, nats [95 %] "  # noqa: E501
        "| died / no progress / step limit |"
    )


# --- why games ended
ALIKE = {
    "killed by a newt": ["killed by a newt", "killed by a newt, while praying"],
    "killed by a jackal": ["killed by a jackal"],
    "killed by a shopkeeper": [
        "killed by Ms. Oz, the shopkeeper, while helpless",
        "killed by Asidonhopo, the shopkeeper",
    ],
    "killed by a kitten": ["killed by a kitten called Sir Purr, the second", "killed by a kitten"],
    "killed by a ghost": ["killed by the ghost of Agent"],
    "killed by an invisible stalker": ["killed by an invisible stalker"],
    "killed by the wrath of a god": ["killed by the wrath of Chih Sung-tzu"],
    "killed by a priest of a god": ["killed by a priest of Anhur"],
    "poisoned by a rotted corpse": [
        "poisoned by a rotted gnome lord corpse",
        "poisoned by a rotted newt corpse",
    ],
    "choked on a food ration": ["choked on a food ration"],
    "no progress": ["no progress"],
}


@pytest.mark.parametrize("plain", ALIKE)
def test_causes_that_are_alike_are_one(plain):
    assert {report.plain_cause(cause) for cause in ALIKE[plain]} == {plain}


def test_causes_by_share_and_how_deep_beside_points():
    """Of both seeds' games; the commonest few, then the rest together. An older row has none."""
    causes = ["killed by a newt"] * 9 + ["killed by a newt, while praying", "starvation"]
    more = [*["step limit"] * 4, "a", "b", "c", "b", "c", "d"]
    rows = [row(scores=[1.0] * 11, causes={MONK: causes})]
    rows[0].update(max_depths={MONK: [1, 2, 3] + [4] * 8}, levels={MONK: [1] * 10 + [9]})
    rows.append(row(seed=2, scores=[1.0] * 10, causes={MONK: more}))
    assert report.make_causes(report.collect(rows)).splitlines() == [
        "| character | games | why they ended |",
        "| :--- | ---: | :--- |",
        f"| {MONK} | 21 | killed by a newt 48%; step limit 19%; b 10%; c 10%; starvation 5%; others 10% |",  # noqa: E501
    ]
    rows.append(row("bc"))
    cells = table_of(rows)
    assert cells[MONK, "ours"]["max depth"] == f"{38 / 11:.1f}"
    assert cells[MONK, "ours"]["level"] == f"{19 / 11:.1f}"
    mean, low, high = numbers(cells[MONK, "ours"]["progression [95 %]"])
    # one game's experience level is worth more than its deepest level
    assert mean == round((0.01539 + 0.01754 + 7 * 0.02122 + 0.11705) / 11, 4) and low < mean < high
    for name in ("progression [95 %]", "max depth", "level"):
        assert cells[MONK, "bc"][name] == report.NOTHING
    (line,) = report.make_causes(report.collect(rows)).splitlines()[2:]
    assert line.startswith(f"| {MONK} | ours | 21 | killed by a newt 48%")


def test_older_rows_look_as_they_did(tmp_path, capsys):
    assert report.make_causes(report.collect([row(), row("bc")])) == ""
    columns = {"max depth", "level", "progression [95 %]"}
    assert not columns & next(iter(table_of([row()]).values())).keys()
    (tmp_path / "metrics.jsonl").touch()
    older = "character,game,score,depth,turns,length,end,normalized_score,core_seed,disp_seed\n"
    path = tmp_path / f"7_{MONK}_games.csv"
    path.write_text(f"{older}{MONK},0,670,1,5872,7079,died,0.0384,680652266,587125654\n")
    assert report.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| 670.0 | 0.0384 |" in said and "why" not in said
    assert "level" not in said and "progression" not in said


def test_a_folder_s_causes_are_those_of_its_file(tmp_path, capsys):
    played = [
        (0, 5.0, 1, 10, 50, "died", 2, 3, "killed by Ms. Oz, the shopkeeper"),
        (1, 7.0, 1, 10, 50, "no progress", 3, 1, "no progress"),
    ]
    results = [pomdp.GameResult(*values) for values in played]
    pomdp.save_games(tmp_path / f"7_{MONK}", MONK, results, 50)
    (tmp_path / "metrics.jsonl").touch()
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"\n| {MONK} | 2 | killed by a shopkeeper 50%; no progress 50% |\n" in said
    assert "| max depth | level |" in said and "| 2.5 | 2.0 |" in said
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == said


def test_rows_of_other_settings_are_never_put_together():
    arms = report.collect(
        [row(), row(settings="other"), row(study="second"), row("bc"), row(variant="argmax")]
    )
    # other ways to act last
    assert [arm.label for arm in arms] == [
        *("ours (made ours)", "ours (made othe)", "ours (second ours)", "bc", "ours / argmax")
    ]
    assert report.baseline_of(arms[3], arms, "ours") is None  # which one is not clear
    assert report.baseline_of(arms[2], arms, "bc") is arms[3]


def test_of_repeated_rows_the_last_is_taken(capsys):
    (arm,) = report.collect([row(scores=[1.0]), row(scores=[2.0]), row(seed=2, scores=[3.0])])
    assert (
        list(report.Sample(arm, MONK).points.values()) == [2.0, 3.0]
        and "repeat others" in capsys.readouterr().err
    )


def test_curves_average_over_the_seeds_that_have_the_point():
    curves = (
        [[100, 2.0, None], [200, 1.0, 1.0]],
        [[100, 3.0, 1.0], [200, None, 1.0], [300, 0.5, 1.0]],
    )
    expected = [[100, 2.5, 2.0, 3.0], [200, 1.0, 1.0, 1.0], [300, 0.5, 0.5, 0.5]]
    assert report.mean_curve([{"curve": curve} for curve in curves]).tolist() == expected


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, stores, stores_path):
    """A small run with two evaluations, and its best weights scored again."""
    data = dict(data_path=str(ROOT / "tests" / "data" / "nle_data"), store_path=str(stores_path))
    playing = dict(eval_episodes=3, eval_processes=3, eval_max_steps=25, eval_heldout_frames=64)
    learning = dict(
        benchmark_sizes=False,
        rnn_hidden_dim=16,
        update_steps=4,
        batch_size=4,
        seq_len=8,
        log_every=1,
        eval_every=2,
        train_seed=5,
    )
    runs = str(tmp_path_factory.mktemp("run"))
    folder = pomdp.train(
        pomdp.TrainConfig(
            character=f"{MONK},{VALKYRIE}", checkpoints_path=runs, **data, **playing, **learning
        )
    )
    pomdp.evaluate_checkpoint(
        pomdp.TrainConfig(evaluate=str(folder / "best.pt"), **{**playing, "eval_episodes": 2})
    )
    return folder


@pytest.mark.parametrize("what, games", [(".", 3), ("best-evaluation", 2)])
def test_a_folder_is_read_as_its_last_evaluation(run_folder, what, games):
    found = report.read_folder(run_folder / what)
    last = json.loads((run_folder / what / "metrics.jsonl").read_text().splitlines()[-1])
    assert (found["seed"], found["evaluation"], found["characters"]) == (
        5,
        {"eval_seed": 50},
        [MONK, VALKYRIE],
    )
    assert found["algorithm"] == ("custom" if what == "." else "best")
    made = table_of([found])
    for name in (MONK, VALKYRIE):
        assert len(found["scores"][name]) == games and sum(found["ends"][name].values()) == games
        assert numbers(made[name, None]["points [95 %]"].split(" [")[0]) == [
            round(last[f"{name}/reward_mean"], 1)
        ]
        ends = {end: last[f"{name}/end_{end.replace(' ', '_')}"] * games for end in report.ENDS}
        assert found["ends"][name] == pytest.approx(ends)
    assert made["all", None]["normalized score [95 %]"] == f"{last['eval/normalized_score']:.4f}"
    if what == ".":
        assert [point[0] for point in found["curve"]] == [64, 128]
        assert (
            made["all", None]["held-out loss, nats [95 %]"]
            == f"{last['heldout/loss_per_action']:.3f}"
        )


def test_an_evaluation_is_known_by_its_folder_alone(run_folder, tmp_path):
    """What lies in scripts/results: config.json has paths and is not needed, older rows have no
    kind."""
    (tmp_path / "small").mkdir()
    for path in (run_folder / "best-evaluation").glob("*"):
        if path.suffix in (".csv", ".jsonl"):
            content = path.read_bytes().replace(b'"kind": "evaluation", ', b"")
            (tmp_path / "small" / path.name).write_bytes(content)
    # of an earlier step
    (tmp_path / "small" / f"0_{MONK}_games.csv").write_text("score,end\n99,died\n")
    found, full = (
        report.read_folder(tmp_path / "small"),
        report.read_folder(run_folder / "best-evaluation"),
    )
    assert found["algorithm"] == "small" and (found["scores"], found["ends"]) == (
        full["scores"],
        full["ends"],
    )


@pytest.mark.parametrize(
    "name, value, same",
    [("log_every", 7, True), ("device", "cuda:1", True), ("train_seed", 6, True)]
    + [("gamma", 0.9, False), ("group", "before", False), ("eval_processes", 4, False)],
)
def test_runs_are_told_apart_by_settings_that_shape_results_and_by_their_names(
    name, value, same, run_folder, tmp_path
):
    described = json.loads((run_folder / "config.json").read_text())
    assert described["config"][name] != value
    described["config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "metrics.jsonl").write_bytes((run_folder / "metrics.jsonl").read_bytes())
    one, other = [report.read_folder(folder) for folder in (run_folder, tmp_path)]
    assert (one["settings"] == other["settings"]) == same


@pytest.mark.pinned_stack  # matplotlib
def test_rows_and_folders_in_one_report(run_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [row(), row("bc", seed=2)])
    command = [
        sys.executable,
        str(ROOT / "scripts" / "report.py"),
        str(rows),
        str(run_folder),
        "--out",
        "out",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, cwd=tmp_path, check=True
    )
    assert all(f"| {arm} |" in done.stdout for arm in ("ours", "bc", "custom")) and not done.stderr
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    pictures = "\n![held-out loss](curves.png)\n\n![score](scores.png)\n"
    assert text == done.stdout + pictures and str(tmp_path) not in text
    import matplotlib.image

    for name in ("curves.png", "scores.png"):
        pixels = matplotlib.image.imread(tmp_path / "out" / name)[..., :3]
        assert pixels.shape[1] > 700 and 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.6  # not blank


@pytest.mark.pinned_stack  # matplotlib
def test_the_picture_of_scores_shows_every_evaluation_with_its_interval(
    run_folder, tmp_path, monkeypatch
):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    assert (
        report.draw_scores([run_folder, tmp_path / "rows.jsonl"], tmp_path / "scores.png")
        == "\n![score](scores.png)\n"
    )
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [axis.get_title() for axis in drawn[0].axes] == [MONK, VALKYRIE]
    for axis in drawn[0].axes:
        key, (line, _, bars) = f"{axis.get_title()}/normalized_score", axis.containers[0]
        evaluated = [row for row in rows if key in row]
        assert len(evaluated) == 2 and line.get_xydata().tolist() == [
            [row["transitions"], row[key]] for row in evaluated
        ]
        ends = [[row[key + "_low"], row[key + "_high"]] for row in evaluated]
        assert np.allclose([segment[:, 1] for segment in bars[0].get_segments()], ends)
        assert {report.PUBLISHED[axis.get_title()]} in [
            {*other.get_ydata()} for other in axis.lines
        ]
    assert report.draw_scores([tmp_path / "rows.jsonl"], tmp_path / "scores.png") == ""


MISTAKES = {
    "x.jsonl does not exist": lambda path: None,
    "is no folder of a run": lambda path: path.mkdir(),
    "not a JSON object": lambda path: path.write_text('{"study": \n' + json.dumps(row()) + "\n"),
    "is none of a study": lambda path: path.write_text('{"study": 1}\n'),
    "there are no rows": lambda path: path.write_text(""),
    "mon-hum-xxx": lambda path: write_rows(path, [row(character="mon-hum-xxx")]),
    "no arm is named 'none'; there are ours": lambda path: write_rows(path, [row()]),
    "0_mon-hum-neu_games.csv is damaged": lambda path: (
        path.mkdir(),
        (path / "metrics.jsonl").touch(),
        (path / "0_mon-hum-neu_games.csv").write_text("game,score,end\n0,12,died\n1,"),
    ),
}


@pytest.mark.parametrize("expected", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    MISTAKES[expected](Path("x.jsonl"))
    assert report.main(["x.jsonl", "--baseline", "none" if "'none'" in expected else "ours"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error


@pytest.mark.pinned_stack  # study.py needs Python 3.10
def test_a_last_line_without_a_newline_is_a_row(tmp_path, capsys):
    """Read as one, and a study adds its rows below."""
    import study

    added = dict.fromkeys(study.NEEDED, 1)
    path = write_rows(tmp_path / "rows.jsonl", [{**row(), **added}, {**row(seed=2), **added}])
    rows = report.read_rows(path)
    path.write_text(path.read_text()[:-1])
    assert report.read_rows(path) == rows
    with open(path, "a+b", buffering=0) as file:
        assert study.rows_in(file) == rows
        file.write(b"{}\n")
    assert report.read_rows(path) == [*rows, {}]
    assert capsys.readouterr().err == ""


def test_a_line_that_was_cut_short_is_left_out_with_a_warning(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [row(), row(seed=2)])
    path.write_text(path.read_text()[:-30])
    assert [one["seed"] for one in report.read_all([path])] == [
        1
    ] and "cut short" in capsys.readouterr().err
