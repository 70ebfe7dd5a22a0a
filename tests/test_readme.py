"""The READMEs say what is: every number in them is a row's or the code's, every command, setting and file is there."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import report
import standin_study

RESULTS = ROOT / "scripts" / "results"
NAMES = ("README.md", "scripts/results/README.md", "scripts/agents/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
SOURCES = [
    ROOT / "custom_nethack_pomdp.py",
    *(path for path in (ROOT / "scripts").rglob("*.*") if path.suffix in (".py", ".yaml", ".sh")),
]
CODE = "\n".join(path.read_text(encoding="utf-8") for path in [*SOURCES, *RESULTS.glob("*.jsonl")])
CONFIG, CONFIGS = (
    pomdp.TrainConfig(),
    [f"scripts/configs/{name}.yaml" for name in ("quickstart", "gpu")],
)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers. What is left of a README without its code, the lines of generated tables and the phrases below has no digit.
# ----------------------------------------------------------------------------------------------------------------------
def rows_of(name):
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def report_lines(*names, baseline="ours"):
    arms = report.collect(report.read_all([RESULTS / name for name in names]))
    return report.make_table(arms, baseline).splitlines()


def benchmark_lines():
    command = [
        sys.executable,
        str(ROOT / "scripts" / "benchmark.py"),
        "--table",
        str(RESULTS / "benchmark.json"),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()


GPU = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))
H100 = {
    (row["batch"], row["units"], row["reader"]): np.median(row["paces"])
    for row in GPU["h100"]["train"]
}


def gpu_lines():
    for (batch, units, reader), pace in H100.items():
        yield f"| {batch} | {units:,} | {reader} | {pace:,.0f} |"
    for row in GPU["train"]:
        loaded = f"{row['loaded']:,}" if "loaded" in row else report.NOTHING
        yield f"| {row['batch']} | {row.get('what', row.get('look_up'))} | {row['ready']:,} | {loaded} |"


# ----------------------------------------------------------------------------------------------------------------------
# Phrases with numbers, written from the rows and the code. Those in quotes alone are no results: versions, definitions,
# others' papers.
# ----------------------------------------------------------------------------------------------------------------------
def phrases_of_readme():
    limits = (ROOT / "tests" / "test_budget.py").read_text(encoding="utf-8")
    nodes = int(re.search(r"LIMIT_NODES = (\S+)", limits)[1])
    columns = int(re.search(r"LIMIT_COLUMNS = (\S+)", limits)[1])
    previous = float(SMALL["mon-hum-neu", "no_prev_action"]["loss more than ours"].split()[0])
    return [
        f"policy stream of {pomdp.NUM_ACTIONS} logits",
        f"the previous action {previous:.2f} nats",
        f"frames in blocks of {pomdp.BLOCK},",
        f"after {pomdp.NO_PROGRESS_STEPS:,} steps without a turn",
        f"{CONFIG.update_steps:,} updates of {CONFIG.batch_size} x {CONFIG.seq_len} = {BUDGET / 1e6} million",
        f"{CONFIG.eval_episodes} games with the last weights",
        f"within {nodes:,} nodes of its syntax tree and {columns} columns",
        *(
            "Python 3.10 to 3.13",
            "some 0.02 in size",
            "normalised to mean 1",
            "1 is plain imitation",
            "exit code 2",
        ),
        *("w)^2 / (n sum w^2)", "95 % bootstrap interval"),
        "Python 3.8, torch 2.0.1, nle 0.9.0, gym 0.23.0, numpy 1.23.5",
        *("bf16 within its tolerance", "fp32 and bf16", "without bf16 trains in fp32"),
        f"{agent_facts()[1]} in {agent_facts()[2]}.",
        *("LSTM of 512 units", "on NLE 0.9.0, not NLD-AA itself"),
        "Each character's 100 games",
        f"(LSTM of 2,048, {BUDGET / 1e6} million transitions a character, a GPU) have 0.024, 0.0216 and 0.089",
    ]


def agent_facts():
    """Of the agent in the box: budget and scores, as they stand in its rows."""
    training = rows_of("small_512/training.jsonl")
    logged = [row for row in training if "charts/SPS" in row]
    steps = np.diff([0, *(row["transitions"] for row in logged)])
    minutes = sum(steps / np.array([row["charts/SPS"] for row in logged])) / 60
    return (
        training[-1],
        f"{logged[-1]['transitions'] / 1e6:.1f} million transitions",
        f"{minutes:.0f} minutes",
    )


def geometric_means():
    """Over Monk's and Valkyrie's first 100 games, by temperature."""
    for temperature, folder in (
        (1, "small_512_7000"),
        (0.8, "small_512_7000_t0.8"),
        (0.6, "small_512_7000_t0.6"),
    ):
        means = []
        for character in ("mon-hum-neu", "val-hum-neu"):
            lines = (RESULTS / folder / f"7000_{character}_games.csv").read_text().splitlines()
            place = lines[0].split(",").index("normalized_score")
            means.append(np.mean([float(line.split(",")[place]) for line in lines[1:101]]))
        yield f"{temperature:g} has {np.prod(means) ** 0.5:.4f}"


def phrases_of_longer():
    """Of the weights that were trained for longer: their rows beside those of the agent in the box."""
    characters, last, means, still = ("mon-hum-neu", "val-hum-neu", "ran-hum-neu"), [], [], {}
    for folder, step in (
        ("small_512_7000", 7000),
        ("small_512_longer", 11600),
        ("small_512", 12600),
    ):
        last.append(rows_of(f"{folder}/training.jsonl")[-1])
        scores = []
        for character in characters:
            with open(RESULTS / folder / f"{step}_{character}_games.csv") as file:
                games = list(csv.DictReader(file))[:100]
            scores.append(np.mean([float(game["normalized_score"]) for game in games]))
            still[folder, character] = sum(game["end"] == "no progress" for game in games)
        means.append(f"{np.prod(scores) ** (1 / 3):.4f}")
    standing = [
        sum(still[name, one] for one in characters) for name in ("small_512_longer", "small_512")
    ]
    monk = {name: games for (name, character), games in still.items() if character == "mon-hum-neu"}
    return [
        f"{last[1]['step'] - last[0]['step']:,} updates of 32 x 32 more (rate 5e-4, cosine)",
        f", {last[1]['transitions'] / 1e6:.1f} million",
        f"{last[0]['step']:,} updates. ",
        f"from 4, by {last[2]['step'] - last[1]['step']:,} updates (rate 3e-4, cosine)",
        f": {last[2]['heldout/loss_per_action']:.3f} nats, {standing[1]} of 300 games",
        f"the geometric mean is {means[2]}.",
        f"fell from {last[0]['heldout/loss_per_action']:.3f} to {last[1]['heldout/loss_per_action']:.3f} nats",
        f"characters' first 100 games is a tenth higher. It is {means[1]} against {means[0]}",
        f"But {standing[0]} of its 300 games stood still, {monk['small_512_longer']} of them as Monk",
        f"have {monk['small_512_7000']} in the same 100",
        *("5 added to the logits", "leaving out 0,"),
    ]


def phrases_of_agent():
    last, budget, minutes = agent_facts()
    scores = rows_of("small_512/metrics.jsonl")[0]
    shown = []
    for name, character in (
        ("Monk", "mon-hum-neu"),
        ("Valkyrie", "val-hum-neu"),
        ("Ranger", "ran-hum-neu"),
    ):
        mean, low, high = (
            scores[f"{character}/normalized_score{end}"] for end in ("", "_low", "_high")
        )
        shown.append(f"{name} {mean:.3f} [{low:.3f}, {high:.3f}]")
    depth = np.mean(
        [
            scores[f"{character}/depth_mean"]
            for character in ("mon-hum-neu", "val-hum-neu", "ran-hum-neu")
        ]
    )
    return [
        f"updates of 32 x 32 = {budget}, {minutes} on two cores of a CPU (bf16)",
        f"{last['step']:,} ",
        f"{last['heldout/loss_per_action']:.3f} nats an action, {last['heldout/accuracy']:.1%} of".replace(
            "%", " %"
        ),
        f"explained variance of the value {last['heldout/explained_variance']:.2f}",
        ", ".join(shown) + ": 100 games each",
        f"(mean depth {depth:.1f})",
        *(
            "small_512",
            "LSTM of 2 x 512",
            "has 2 x 2,048",
            "; 12 MB in",
            "on NLE 0.9.0",
            "1e-3, then 5e-4, then 3e-4, cosine each",
            "clipped at 1;",
            "7,000 updates on one thread, 4,600 in two processes, 1,000 on one thread",
        ),
        "172 whole games of AutoAscend of these three characters, their first 15,000 frames",
        "and the first 5,000 frames of 461 more",
    ]


def phrases_of_results():
    def cell(column, arm, character="mon-hum-neu"):
        return SMALL[character, arm][column]

    def more(arm, digits=3, character="mon-hum-neu"):
        return f"{abs(float(cell('loss more than ours', arm, character).split()[0])):.{digits}f}"

    def played(arm, variant="default", rows=ROWS):
        same = [row for row in rows if (row["algorithm"], row["variant"]) == (arm, variant)]
        (number,) = {row["evaluation"]["games"] for row in same}
        return number

    untouched, config = rows_of("cpu_untouched.jsonl"), ROWS[0]["config"]
    names = ("cpu_small", "cpu_untouched")
    studies = [
        yaml.safe_load((ROOT / "scripts" / "studies" / f"{name}.yaml").read_text())
        for name in names
    ]
    stand = STANDIN[0]
    width = stand["transitions"] // stand["steps"] // stand["batch_size"]
    few = next(row for row in ROWS if row["algorithm"] == "few_games")
    points, bc_losses = (
        "points more than ours",
        [
            row["heldout"]["loss_per_action"]
            for row in ROWS
            if row["algorithm"] == "bc" and "mon-hum-neu" in row["scores"]
        ],
    )
    loss = {arm: cell("held-out loss, nats", arm).split()[0] for arm in ("plain_head",)}
    games = [row["data"][row["characters"][0]]["heldout"]["games"] for row in (ROWS[0], VALKYRIE)]
    samurai = "sam-hum-law"
    recorded = next(row["data"][samurai] for row in untouched if samurai in row["data"])
    weights, autoascend = (
        pomdp.AWRConfig(),
        float(cell("points", "AutoAscend, in as many actions").split()[0]),
    )
    lam = [part.strip("[],") for part in cell(points, "lam_0").replace("-", "").split()]
    return [
        f"an LSTM of {ROWS[0]['rnn_hidden_dim']} units instead of the benchmark's {CONFIG.rnn_hidden_dim:,}",
        f"{ROWS[0]['transitions']:,} transitions ({config['update_steps']} updates) instead of {BUDGET / 1e6} million",
        f"games cut at {config['eval_max_steps']:,} actions",
        f"own first {config['eval_max_steps']:,} actions AutoAscend itself has {autoascend:.0f} points",
        f"({config['batch_size']} rows of {config['seq_len']} steps, the same",
        f"({games[0]} of Monk, {games[1]} of Valkyrie)",
        f"have three seeds and {cell('games', 'ours')} games a character ({played('ours')} a seed)",
        f"the others one seed and {played('iql')} games, another way to act {played('ours', 'argmax')} games",
        f"an arm of {played('iql')} with the first {played('iql')} of the same seed",
        f"play {studies[0]['games']} games for each row (``: {studies[1]['arms']['bc']['games']} for the first three",
        f"IQL and CQL played {played('cql', rows=untouched)} games",
        f"on {cell('games', 'AutoAscend, in as many actions')} games of Monk",
        f"and {cell('games', 'AutoAscend, in as many actions', 'val-hum-neu')} of Valkyrie;",
        f"up to 8 stretches of {int(max(row['frames'] for row in HELDOUT)) // 8} frames",
        "leaves out 0.",
        f"{more('plain_head', 1)} nats more; after {config['update_steps']} updates",
        f"each action is taken ({float(loss['plain_head']):.2f} nats)",
        f"(held-out loss on Monk {min(bc_losses):.2f} to {max(bc_losses):.2f})",
        f"**The previous action**: {more('no_prev_action', 2)} nats",
        f"lower by {more('bc_ours')} nats on Monk and {more('bc_ours', 3, 'val-hum-neu')} on Valkyrie",
        f"differ by {cell(points, 'bc_ours')} and {cell(points, 'bc_ours', 'val-hum-neu')}.",
        f"(beta {weights.beta:g}, weights up to {weights.max_weight:g})",
        f"sharper weights cost {more('sharp_weights', 2)} nats",
        f"have {cell('points', 'ours / argmax').split()[0]} points on Monk",
        f"and {cell('points', 'ours / argmax', 'val-hum-neu').split()[0]} on Valkyrie",
        f"Temperature 0.7 looks better than {weights.temperature:g}",
        f"({cell(points, 'ours / temperature_0.7')} points more on Monk,",
        f"{cell(points, 'ours / temperature_0.7', 'val-hum-neu')} on Valkyrie)",
        f"tried on {cell('games', 'ours / temperature_0.7')} games each",
        f"burn-in ({more('no_burn_in')} nats)",
        f"{more('lam_0')} nats, but {lam[0]} [{lam[2]}, {lam[1]}] points less",
        f"learned from {few['data']['mon-hum-neu']['training']['games']} games",
        f"{more('few_games')} nats more on the same nine held-out games",
        f"is over {few['data']['mon-hum-neu']['heldout']['games']})",
        f"training loss of {few['train_loss']:.2f}.",
        f"The other arms have {ROWS[0]['data']['mon-hum-neu']['training']['games']} to learn from",
        f"(Samurai has {recorded['training']['games'] + recorded['heldout']['games']} in all)",
        "an 18 x 18 crop drawn as a picture, and 14 game slots",
        f"Monk, LSTM of {stand['rnn_hidden_dim']}, batches of {stand['batch_size']} x {width}, the benchmark's",
        f"float32, games cut at {stand['played']['eval_max_steps']:,} actions. The loss",
        f"the last {stand['steps'] // 10} updates",
        f"sees its first {stand['steps'] * width:,} steps once",
        *("below 2.7 nats", f"after {CONFIG.update_steps:,} updates so short a run"),
        f"whole budget of {BUDGET / 1e6} million transitions",
        f"a line through {config['update_steps']} updates says nothing about {CONFIG.update_steps:,}",
        "about 800 points at 0.45 nats an action, 2,270 at 0.22 and 4,000 to 5,500 at 0.15",
        f"The target of 0.20 on Monk, {0.2 * MONK:,.0f} points, therefore asks for some 0.17 nats",
        "on the first 100 games of the same seeds",
        "on those 100 games",
        *geometric_means(),
        *phrases_of_longer(),
        ": 1 stays",
        *phrases_of_gpu(),
        *("On 58 Monk games.", "each side in turn, fp32 and bf16", *phrases_of_targets()),
    ]


def phrases_of_targets():
    rows = json.loads((RESULTS / "benchmark.json").read_text(encoding="utf-8"))["rows"]
    # SyncVectorEnv is shown and no target
    names = [re.sub(",? against (?!Sync).*", "", row["what"]) for row in rows]
    reached = {(row["row"], name): row["ratio"] for row, name in zip(rows, names)}
    reached["bytes", "a frame"] = next(row["ours"] for row in rows if row["row"] == "bytes")
    wanted = {
        ("read", "64 x 16"): 20,
        ("read", "64 x 32"): 25,
        ("build", "one core"): 0.9,
        ("play", "8 games"): 3,
    }
    wanted |= {("act", "fp32, 8 games"): 5, ("act", "bf16, 8 games"): 8}
    wanted |= {("train", "fp32, 64 x 16 on cpu"): 2, ("train", "bf16, 64 x 16 on cpu"): 4}
    assert reached["bytes", "a frame"] <= 60 and not [
        key for key, times in wanted.items() if reached[key] >= times
    ]
    return [
        "20 times for reading at 64 x 16 and 25 at 64 x 32, at most 60 bytes a frame, 0.9 for building, 5 and 8 for",
        "acting with 8 games in fp32 and bf16, 3 for playing, 2 and 4 for training in",
        "fp32 and bf16. Met on this machine: bytes a frame.",
    ]


def phrases_of_gpu():
    off = {row["precision"]: row["difference"] for row in GPU["agreement"]}
    pace = {
        (row["batch"], row.get("what", row.get("look_up"))): row["ready"] for row in GPU["train"]
    }
    ours, iql = (
        pace["1024 x 32", "copies"],
        max(pace[batch, "Katakomba's IQL"] for batch in ("64 x 16", "128 x 16")),
    )
    both = [
        H100[batch, 2048, "four processes"] / H100[batch, 2048, "its thread"]
        for batch in ("256 x 32", "1024 x 32")
    ]
    return [
        f"gives {both[0]:.2f} times at 256 x 32 and {both[1]:.2f} at 1024 x 32,",
        f"which alone gives {GPU['loader_alone']:,}",
        f"makes {ours / pace['1024 x 32', 'embedding']:.1f} times the pace at 1024 x 32",
        f"that is {ours / iql:.1f} times; the targets of 10 times and of 300,000",
        f"by at most {off['fp32']} in fp32, {off['bf16']} in bf16 and {off['fp16']} in fp16 from the CPU's in fp32",
        *(
            "One NVIDIA H100, bf16",
            "At 128 x 32 the GPU",
            "One NVIDIA H200, full size, bf16",
            "in 64 copies of the table",
            "over 20 updates of 8 x 16",
        ),
    ]


def cells_of(lines):
    """{(character, arm): {column: cell}} of a report's table; columns without their "[95 %]"."""
    header, _, *cells = (
        [cell.strip(" *") for cell in line.strip("|").split(" | ")] for line in lines
    )
    names = [name.split(" [")[0] for name in header]
    return {(line[0], line[1]): dict(zip(names, line)) for line in cells}


ROWS, STANDIN = rows_of("cpu_small.jsonl"), rows_of("standin.jsonl")
HELDOUT = [
    game for row in ROWS for games in row["heldout_games"].values() for game in games.values()
]
VALKYRIE = next(row for row in ROWS if row["characters"] == ["val-hum-neu"])
MONK, BUDGET = (
    pomdp.AUTOASCEND_MEAN_SCORE["mon-hum-neu"],
    CONFIG.update_steps * CONFIG.batch_size * CONFIG.seq_len,
)
AGENTS = ("small_512_7000", "small_512_7000_t0.8", "small_512_7000_t0.6")
REPORTS = [
    report_lines(*names)
    for names in (["cpu_small.jsonl"], ["cpu_untouched.jsonl"], ["small_512"], AGENTS)
]
SMALL = cells_of(REPORTS[0])
LINES = {*(line for lines in REPORTS for line in lines), *benchmark_lines(), *gpu_lines()}
LONGER = (
    "small_512",
    "small_512_7000",
    "small_512_longer",
    "small_512_named",
    "small_512_longer_named",
)
LINES |= {*report_lines(*LONGER, baseline="small_512_longer")}
LINES |= {*standin_study.make_table(STANDIN).splitlines()}
PHRASES = dict(zip(NAMES, (phrases_of_readme(), phrases_of_results(), phrases_of_agent())))


def visible(text):
    """A README without code, comments, targets of links, papers' numbers and licences; a paragraph on one line."""
    text = re.sub(r"```.*?```", "", text.split("## Licences and citation")[0], flags=re.DOTALL)
    text = re.sub(r"arXiv \d{4}\.\d{5}|\]\(.*?\)|<!--.*?-->", "", re.sub(r"`[^`\n]*`", "``", text))
    return re.sub(r"(?<!\|)\n *(?![|\n])", " ", text)


def unexplained(text, phrases):
    """Phrases that are not there, and places of numbers that nothing explains."""
    text = "\n".join(line for line in text.splitlines() if line not in LINES)
    wrong = [f"not there: {phrase}" for phrase in phrases if phrase not in text]
    for phrase in sorted(phrases, key=len, reverse=True):
        text = text.replace(phrase, "")
    return wrong + [
        f"from no row: ...{found[0]}..." for found in re.finditer(r".{0,40}\d[^\n]{0,40}", text)
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_every_number_is_a_row_s_or_the_code_s(name):
    assert unexplained(visible(TEXTS[name]), PHRASES[name]) == []


@pytest.mark.parametrize("name", TEXTS)
def test_a_false_number_is_noticed(name):
    text = visible(TEXTS[name])
    digits = [match.start() for match in re.finditer(r"\d", text)]
    for place in digits[:: len(digits) // 10]:
        false = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        assert unexplained(false, PHRASES[name]), text[place - 30 : place + 30]


def test_what_is_said_in_words_of_the_stand_in_is_in_its_rows():
    command = re.search(r"standin_study.py (.*--steps.*)\\\n", TEXTS["scripts/results/README.md"])[
        1
    ].split()
    options = {
        name[2:]: value for name, value in zip(command[::2], command[1::2]) if name != "--data_path"
    }
    for row, first in zip(STANDIN, (2, 7, 7)):  # of ten tenths
        made = {**row, **row["played"], "games": len(row["played"]["scores"])}
        assert {name: str(made[name]) for name in options} == options
        assert [loss < 2.7 for loss in row["curve"]] == [False] * first + [True] * (10 - first)
        assert (row["character"], row["seed"], row["learning_rate"]) == (
            "mon-hum-neu",
            1,
            CONFIG.learning_rate,
        )
    ours, *others = (pomdp.bootstrap_interval(np.array(row["played"]["scores"])) for row in STANDIN)
    # far apart
    assert [row["algorithm"] for row in STANDIN] == ["ours", "bc", "iql"] and ours[0] > max(others)[
        1
    ] + 2


def test_the_quickstart_s_output_follows_from_its_settings_and_games(stores):
    """Losses do not, they take a run to see. Parameters are counted without being made."""
    block = re.search(r"```text\n(.*?)```", TEXTS["README.md"], re.DOTALL)[1]
    config = pomdp.parse_config(["--config", str(ROOT / CONFIGS[0])])
    with torch.device("meta"):
        backbone = pomdp.ModelBackbone(pomdp.NUM_ACTIONS, config.rnn_hidden_dim, config.rnn_layers)
        parameters = sum(parameter.numel() for parameter in pomdp.Model(backbone).parameters())
    assert block.startswith(str(stores["mon-hum-neu"]).partition(" 0 lines")[0] + " ...\n")
    assert f" {parameters:,} parameters on" in block
    for step in (config.log_every, config.update_steps):
        assert f" step={step} transitions={step * config.batch_size * config.seq_len} " in block
    assert (
        f"HELDOUT_METRICS step={config.update_steps} frames={config.eval_heldout_frames} " in block
    )
    assert f"-seed{config.train_seed} at step 0" in block and "+".join(config.characters) in block
    points = round(float(re.search(r"reward_mean=(\S+)", block)[1]) * config.eval_episodes)
    score = points / config.eval_episodes / pomdp.AUTOASCEND_MEAN_SCORE["ran-hum-neu"]
    assert (
        block.count(f"normalized_score={score:.6g} ") == 1 and f"D4RL score: {score:.6f}\n" in block
    )
    assert f"normalized_score_ran_hum_neu={score:.6g}\n" in block


# ----------------------------------------------------------------------------------------------------------------------
# Commands, files and names
# ----------------------------------------------------------------------------------------------------------------------
def commands():
    for text in TEXTS.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())
        yield from re.findall(r"`((?:python|bash|torchrun) [^`]+)`", text)


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_a_command_names_scripts_options_and_settings_that_exist(line):
    program, *words = shlex.split(line, comments=True)
    script = next((word for word in words if word.endswith((".py", ".sh"))), "")
    assert program in ("python", "bash", "torchrun", "source"), line
    for word in words:
        assert not word.startswith(("scripts/", "tests/")) or (ROOT / word).exists(), word
    arguments = words[words.index(script) + 1 :] if script else []
    options = [word[2:] for word in arguments if word.startswith("--")]
    if script == "custom_nethack_pomdp.py":
        assert set(options) <= {*vars(CONFIG), "config", "help"}
        assert all(
            path in CONFIGS for name, path in zip(arguments, arguments[1:]) if name == "--config"
        )
    elif script:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [option for option in options if not re.search(rf'"(--)?{option}"', source)] == []


@pytest.mark.parametrize("path", CONFIGS)
def test_config_files_are_taken(path):
    pomdp.parse_config(["--config", str(ROOT / path)])


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_names_exist(name):
    text = TEXTS[name]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), target
    for path in re.findall(r"(?:scripts|tests|\.ci)/[\w./]*\w", " ".join(spans)):
        assert (ROOT / path).exists(), path
    for word in re.findall(r"(?<![\w/])[a-z]+(?:_[a-z0-9]+)+(?![\w.]|/)", " ".join(spans)):
        made = word.split("_")[0] + "_{"  # an f-string's: reward_{statistic}
        assert word in CODE or made in CODE or (RESULTS / word).is_dir(), word


def test_the_readme_is_short_and_its_promises_name_their_tests():
    assert len(TEXTS["README.md"].splitlines()) <= 260
    promises = TEXTS["README.md"].split("| promise | test |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(promises) > 10
    assert [
        line
        for line in promises
        if not re.search(r"`(tests/test_\w+\.py|scripts/\w+\.\w+)` \|$", line)
    ] == []
