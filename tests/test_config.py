# SPDX-License-Identifier: MIT
"""Settings: the command line over the file over the defaults, and one clear line for every
mistake."""

import dataclasses
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pyrallis
import pytest
import torch
import yaml
from conftest import LIMIT_S
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import TrainConfig, UserError, main, parse_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "custom_nethack_pomdp.py"
CONFIGS = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))
GAMES = ROOT / "tests" / "data" / "nle_data"
DEFAULTS = dataclasses.asdict(TrainConfig())
MONK, VALKYRIE = "mon-hum-neu", "val-hum-neu"


def changed(config):
    """The settings that differ from the defaults."""
    return {
        name: value for name, value in dataclasses.asdict(config).items() if value != DEFAULTS[name]
    }


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- where a value comes from
def test_command_line_over_file_over_default(tmp_path):
    path = write(
        tmp_path / "a.yaml", "batch_size: 8\nseq_len: 4\nname: from_file\nclip_grad_norm: 2\n"
    )
    expected = {"batch_size": 3, "seq_len": 4, "name": "from_file", "clip_grad_norm": 2.0}
    options = (
        (["--batch_size", "3"], ["--config", path]),
        (["--batch_size=3"], [f"--config={path}"]),
    )
    for ours, file in (*options, (["--batch_size", "3"], ["--config_path", path])):
        assert changed(parse_config(ours + file)) == changed(parse_config(file + ours)) == expected
    assert changed(parse_config([])) == {}
    # A default on the command line beats the file as well, and null takes an optional value back.
    argv = ["--config", path, "--batch_size", "128", "--clip_grad_norm", "null"]
    assert changed(parse_config(argv)) == {"seq_len": 4, "name": "from_file"}


def test_algorithm_is_merged_key_by_key(tmp_path):
    file = ["--config", write(tmp_path / "a.yaml", "algorithm: {burn_in: 8, lam: 0.5}\n")]
    assert parse_config(file).algorithm == {"burn_in": 8, "lam": 0.5}
    assert parse_config([*file, "--algorithm", "{burn_in: 2}"]).algorithm == {
        "burn_in": 2,
        "lam": 0.5,
    }
    assert parse_config(["--algorithm={beta: 3}", *file]).algorithm == {
        "burn_in": 8,
        "lam": 0.5,
        "beta": 3,
    }
    empty = ["--config", write(tmp_path / "b.yaml", "algorithm:\n")]
    assert parse_config(empty).algorithm == {}, "a key without a value overrides nothing"
    parse_config(["--algorithm", "{beta: 3}"]).algorithm["lam"] = 0.1
    assert parse_config([]).algorithm == {}, "one config's overrides leak into the next"


VALUES_READ = [
    *[
        ("update_steps", text, 1_000_000)
        for text in ("1000000", "1e6", "1E6", "1_000_000", "1000000.0")
    ],
    *[("resume", "true", True), ("resume", "True", True), ("use_prev_action", "False", False)],
    *[
        ("use_prev_action", "no", False),
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", "1", 1.0),
    ],
    *[
        ("clip_grad_norm", "null", None),
        ("clip_grad_norm", "0.5", 0.5),
        ("train_seed", str(2**53 + 1), 2**53 + 1),
    ],
    *[
        ("data_path", "null", None),
        ("data_path", "a/b", "a/b"),
        ("heldout_share", "0", 0.0),
        ("name", "a=b", "a=b"),
    ],
    (
        "character",
        f" {MONK}, {VALKYRIE},",
        f"{MONK},{VALKYRIE}",
    ),  # the same characters are the same run
]


@pytest.mark.parametrize("name, text, value", VALUES_READ)
def test_values_are_read_as_their_type(tmp_path, name, text, value):
    """From either place, with the exact type: 1e6 is a whole number, and a large seed keeps its
    digits."""
    file = write(tmp_path / "a.yaml", f"{name}: {text}\n")
    for argv in ([f"--{name}", text], [f"--{name}={text}"], ["--config", file]):
        read = getattr(parse_config(argv), name)
        assert read == value and type(read) is type(value), argv


AS_GIVEN = [
    "/mnt/exp #3/runs",
    "/a: b",
    "2024-01-05",
    "1_000",
    "007",
    "10:30",
    "no",
    "null.txt",
    "it's",
    "[a",
    "x" * 200 + " #y",
]


@pytest.mark.parametrize("text", [*AS_GIVEN, os.fsdecode(b"/d\xff"), "a\nb", " ", "\U0001f600"])
def test_text_is_taken_as_it_was_given(tmp_path, text, monkeypatch):
    """On the command line; in a file a text is what YAML says is one. A config file's own name
    too."""
    for name in ("checkpoints_path", "data_path", "name", "project", "evaluate"):
        assert getattr(parse_config([f"--{name}={text}"]), name) == text
    assert parse_config(["--resume", "/mnt/exp #3/run"]).resume == "/mnt/exp #3/run"
    monkeypatch.chdir(tmp_path)
    Path("a #b.yaml").write_text("name: 'x: #y'\nresume: 'a #b'\n")
    config = parse_config(["--config", "a #b.yaml"])
    assert (config.name, config.resume) == ("x: #y", "a #b")


def test_numbers_of_the_algorithm_are_read_as_elsewhere():
    assert parse_config(["--algorithm", "{beta: 1e-1, burn_in: 8.0}"]).algorithm == {
        "beta": 0.1,
        "burn_in": 8,
    }
    assert type(parse_config(["--algorithm", "{burn_in: 8.0}"]).algorithm["burn_in"]) is int


def test_a_dumped_config_reads_back(tmp_path):
    """config.yaml in a run's folder is a config file like any other."""
    argv = [
        "--character",
        VALKYRIE,
        "--algorithm",
        "{burn_in: 2}",
        "--clip_grad_norm",
        "1",
        "--resume",
        "yes",
    ]
    config = dataclasses.replace(
        parse_config([*argv, "--learning_rate", "1e-5"]), name="null", data_path="x: #y"
    )
    file = write(tmp_path / "config.yaml", pyrallis.dump(config))
    assert parse_config(["--config", file]) == config


def test_shipped_configs_parse():
    assert {"quickstart.yaml", "gpu.yaml"} <= {path.name for path in CONFIGS}
    for path in CONFIGS:
        config = parse_config(["--config", str(path)])
        pomdp.awr_config(config.algorithm)
        assert changed(config), f"{path} changes nothing"


def test_the_gpu_config_sees_as_many_transitions_as_the_defaults():
    fast, default = (
        parse_config(["--config", str(ROOT / "scripts" / "configs" / "gpu.yaml")]),
        TrainConfig(),
    )
    transitions = [
        config.update_steps * config.batch_size * config.seq_len for config in (fast, default)
    ]
    assert transitions[0] == transitions[1] == 204_800_000
    # The last evaluation and the last checkpoint are at the end in any case; the others divide the
    # run evenly.
    for name in ("eval_every", "log_every", "checkpoint_every"):
        assert fast.update_steps % getattr(fast, name) == 0 and getattr(fast, name) < getattr(
            default, name
        ), name


BENCHMARK = """
{data_mode: in_memory, project: NetHack, group: custom-nethack-pomdp, name: custom, version: 0, tau: 0.005,
 gamma: 0.999, rnn_hidden_dim: 2048, rnn_layers: 2, use_prev_action: true, rnn_dropout: 0.0, clip_range: 10.0,
 update_steps: 100000, batch_size: 128, seq_len: 16, learning_rate: 3.0e-4, weight_decay: 0.0, clip_grad_norm: null,
 checkpoints_path: null, eval_every: 10000, eval_episodes: 50, eval_processes: 14, render_processes: 14, eval_seed: 50,
 train_seed: 42}"""  # noqa: E501


def test_benchmark_s_fields_keep_their_defaults():
    """Those of its own file, all but `character`."""
    benchmark = yaml.safe_load(BENCHMARK)
    assert {name: DEFAULTS[name] for name in benchmark} == benchmark


@pytest.mark.usefixtures("one_thread")
def test_gamma_reaches_the_algorithm_and_the_reward_scale(stores_path, stores):
    """Each by itself: either of the two alone would change what a run learns."""
    shared = dict(
        rnn_hidden_dim=8,
        data_path=str(GAMES),
        store_path=str(stores_path),
        character=MONK,
        batch_size=2,
    )
    losses, configs = [], [TrainConfig(**shared, gamma=gamma) for gamma in (0.5, 0.999)]
    loaders = [pomdp.load_data(config)[0] for config in configs]
    assert loaders[0].reward_scale < 0.5 * loaders[1].reward_scale
    batch, prev_actions = loaders[0].batch_at(0)
    for config in configs:
        torch.manual_seed(0)
        algorithm = pomdp.make_algorithm(config, torch.device("cpu"))
        losses.append(algorithm.train_step(batch, prev_actions, {})[2]["value_loss"].item())
    assert losses[0] != losses[1]


# --- mistakes: arguments, and what the line must name
MISTAKES = {
    "--batch_sise 3": "batch_sise.*batch_size",
    "--batch-size 3": "batch-size.*batch_size",
    "batch_size=3": "batch_size=3",
    "-b 3": "-b",
    "--batch_size": "batch_size.*expected one argument",
    "--config": "config.*expected one argument",
    "--config does/not/exist.yaml": "does/not/exist.yaml",
    "--algorithm.burn_in 8": "algorithm",
    "--batch_size many": "batch_size.*many",
    "--batch_size 2.7": "batch_size.*2.7",
    "--learning_rate nan": "learning_rate.*nan",
    "--clip_grad_norm nan": "clip_grad_norm.*nan",
    "--algorithm burn_in": "algorithm",
    f"--train_seed 1{'0' * 400}": "train_seed",
    f"--train_seed {2**64}": "train_seed",  # torch takes no seed as large as this
    "--character mon-hum-nue": "mon-hum-nue.*mon-hum-neu",
    "--character mon-hum-neu,orc": "orc",
    "--rnn_hidden_dim 512": "rnn_hidden_dim.*benchmark_sizes false",
    "--rnn_layers 1": "rnn_layers.*benchmark_sizes false",
    "--character VAL-HUM-NEU-FEM": "did you mean val-hum-neu",
    "--data_mode disk": "data_mode.*in_memory",
    "--lr_schedule linear": "lr_schedule.*cosine",
    "--precision fp16": "precision.*bf16",
    "--eval_precision fp16": "eval_precision.*bf16",
    "--device cuda:x": "device.*cuda:x",
}
MISTAKES_IN_A_FILE = {
    "batch_sise: 3": "batch_sise.*batch_size",
    "batch_size: {a: 1}": "batch_size",
    "batch_size: true": "batch_size",
    "batch_size:": "batch_size",
    "batch_size: 2.7": "batch_size.*2.7",
    "resume: 1.5": "resume.*1.5",
    "name: null": "name",
    "name: 1_000": "name.*quotes",
    "name: no": "name",  # YAML reads it as false, and the run would be called False
    "algorithm: [burn_in]": "algorithm",
    "character: ''": "character",
    "name: !!python/object/apply:os.system [true]": "python/object",
    # No settings at all: what is wrong is the file, so the line names it.
    "seq_len: 4\nbatch_size: 8\nseq_len: 5": r"a\.yaml.*seq_len.*line 3",
    "algorithm: {lam: 1, lam: 0.5}": r"a\.yaml.*lam.*line 1",
    "batch_size: [1": r"a\.yaml",
    "": r"a\.yaml",
    "- batch_size\n": r"a\.yaml",
    "name: 2024-13-45": r"a\.yaml",  # YAML takes it for a date, of a thirteenth month
    "\0": r"a\.yaml",
}
OUT_OF_RANGE = {
    "0": "log_every update_steps batch_size seq_len checkpoint_every eval_every eval_processes eval_max_steps",  # noqa: E501
    "-0": "render_processes",
    "-1": "version warmup_transitions game_frames eval_seed eval_episodes eval_heldout_frames",
    "-2": "weight_decay train_seed",
    "0.0": "learning_rate clip_range clip_grad_norm",
    "-0.1": "gamma tau rnn_dropout heldout_share",
    "1.1": "gamma tau rnn_dropout heldout_share",
}
CASES = [
    ([argument.strip("'") for argument in line.split(" ")], None, names)
    for line, names in MISTAKES.items()
]
CASES += [([], text, names) for text, names in MISTAKES_IN_A_FILE.items()]
CASES += [
    ([f"--{name}={value}"], None, f"{name} must be")
    for value in OUT_OF_RANGE
    for name in OUT_OF_RANGE[value].split()
]


def case_id(case):
    return re.sub(
        r"[^\w=.,:+-]+", "_", " ".join(case[0]) if case[1] is None else f"file {case[1]}"
    )[:40]


@pytest.mark.parametrize("case", CASES, ids=map(case_id, CASES))
def test_every_mistake_is_one_line_and_writes_nothing(case, tmp_path, monkeypatch, capfd):
    argv, text, names = case
    monkeypatch.chdir(tmp_path)
    if text is not None:
        argv = ["--config", write(tmp_path / "a.yaml", text)]
    with mock.patch.object(pomdp, "train", side_effect=AssertionError("the run began")):
        assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and re.search(names, err), err
    assert os.listdir() == ([] if text is None else ["a.yaml"])


def test_the_lstm_s_size_is_main_s_to_refuse():
    assert (
        TrainConfig(rnn_hidden_dim=16, rnn_layers=1).rnn_hidden_dim == 16
    )  # a test's and a study's


# --- anything at all
SCALARS = st.one_of(
    *(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(2**50, 2**70),
        st.floats(),
        st.dates(),
        st.text(max_size=12),
    ),
    st.sampled_from(
        [
            "1e6",
            "nan",
            "null",
            "true",
            "no",
            "1:30",
            "0x_",
            MONK,
            "2024-13-45",
            "{a: 1}",
            "[",
            "~",
            "auto",
        ]
    ),
)
DICTS = st.dictionaries(SCALARS, SCALARS | st.lists(SCALARS, max_size=3), max_size=3)
KEYS = st.sampled_from([*DEFAULTS]) | st.text(max_size=8)
LINES = st.builds("{}: {}".format, KEYS, SCALARS | st.text(max_size=20))
FILES = st.one_of(
    *(st.text(max_size=60), st.lists(LINES, max_size=4).map("\n".join)),
    st.dictionaries(KEYS, SCALARS | DICTS, max_size=4).map(yaml.dump),
    st.text(alphabet="!&*<>|?:-{}[],#%@=~01abx_ \n\"'", max_size=40),
)
TOKENS = (
    st.sampled_from([*DEFAULTS]).map("--{}".format)
    | st.builds("--{}={}".format, KEYS, SCALARS)
    | SCALARS.map(str)
)


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(argv=st.lists(TOKENS, max_size=5), text=st.none() | FILES)
@example(argv=["--algorithm", "!!int x"], text="[" * 5000)
@example(argv=["--train_seed=1e300"], text=None)
def test_anything_else_than_a_config_is_a_user_error(argv, text, tmp_path):
    if text is not None:
        (tmp_path / "any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        argv = [*argv, "--config", str(tmp_path / "any.yaml")]
    try:
        config = parse_config(argv)
    except UserError as error:
        assert str(error).strip(), "no message"  # noqa: PT017  any text may also be right
        return
    for name, value in dataclasses.asdict(config).items():
        expected = (bool, str) if name == "resume" else (type(DEFAULTS[name]),)
        assert value is None or DEFAULTS[name] is None or type(value) in expected, (
            name,
            value,
        )


# --- through the command line itself
def command_line(folder, *argv):
    """As a user who has neither data nor accounts -> the result, and the files that it left."""
    folder.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "KATAKOMBA"))
    }
    environment = {**kept, "HOME": str(folder), "WANDB_MODE": "disabled"}
    options = dict(
        cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return subprocess.run([sys.executable, *argv], **options), os.listdir(folder)


DATA = ["--data_path", str(GAMES)]
MISTAKES_OUTSIDE = {
    "the benchmark's command without data": (
        ["--character", "ran-hum-neu", "--train_seed", "42", "--checkpoints_path", "results"],
        r"ran-hum-neu in \S+ --data_path.*NLD-AA.*Katakomba.*data-ran-hum-neu-any\.hdf5.*record_games\.py",  # noqa: E501
    ),
    "an unknown algorithm setting": (["--algorithm", "{burnin: 2}", *DATA], "burnin.*burn_in"),
    "the LSTM's size": (["--rnn_hidden_dim", "1024", *DATA], "rnn_hidden_dim"),
    "a folder that is not there": (["--data_path", "nowhere"], "nowhere"),
    "a character without games": (
        [*DATA, "--character", "wiz-elf-cha"],
        "wiz-elf-cha.*--data_path",
    ),
    "a submission that is not there": ([*DATA, "--submission", "nowhere.py"], r"nowhere\.py"),
    **(
        {}
        if torch.cuda.is_available()
        else {"a GPU that is not there": ([*DATA, "--device", "cuda"], "cuda")}
    ),
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Results of all commands by name; two run side by side, since each takes seconds to import its
    libraries."""
    folder = tmp_path_factory.mktemp("command_line")
    commands = {name: [str(SCRIPT), *argv] for name, (argv, _) in MISTAKES_OUTSIDE.items()}
    # What the libraries themselves say on import (gym 0.23 warns of its age), so that the tests can
    # look past it.
    commands.update(
        {"help": [str(SCRIPT), "--help"], "import": ["-c", "import custom_nethack_pomdp"]}
    )
    with ThreadPoolExecutor(2) as pool:
        folders = [folder / str(number) for number in range(len(commands))]
        return dict(
            zip(
                commands,
                pool.map(
                    lambda pair: command_line(pair[0], *pair[1]), zip(folders, commands.values())
                ),
            )
        )


@pytest.mark.parametrize("name", MISTAKES_OUTSIDE)
def test_mistakes_through_the_command_line(outside, name):
    result, files = outside[name]
    assert result.returncode == 2 and result.stdout == "" and files == [], result.stderr
    before, error, message = result.stderr.rpartition("error: ")
    assert before == outside["import"][0].stderr and error and re.fullmatch(r"[^\n]+\n", message), (
        result.stderr
    )
    assert re.search(MISTAKES_OUTSIDE[name][1], message), message


def test_importing_prints_nothing(outside):
    """No side effects at import. gym 0.23 cannot be kept from its notice."""
    if int(pomdp.nle.__version__.split(".")[0]) >= 1:
        assert (outside["import"][0].stderr, outside["import"][1]) == ("", [])


def test_help_lists_every_setting_with_its_meaning(outside):
    """The declared help text, with the default."""
    result, files = outside["help"]
    assert result.returncode == 0 and result.stderr == outside["import"][0].stderr and files == []
    shown = re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(result.stdout.split()))  # a break in a name
    for one in dataclasses.fields(TrainConfig):
        meaning = re.escape(one.metadata["help"])
        default = re.escape(str(DEFAULTS[one.name]))
        assert re.search(rf"--{one.name} \S+ {meaning} \(default: {default}\)", shown), one.name


@pytest.mark.parametrize("option", ["-O", "-OO"])
def test_help_without_docstrings(option):
    """python -OO removes them."""
    command = [sys.executable, option, str(SCRIPT), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0 and "--batch_size" in done.stdout, done.stderr


def test_settings_are_declared_completely():
    """Whoever adds a number gives it limits, or it is negative some day."""
    for one in dataclasses.fields(TrainConfig):
        assert one.type in pomdp.KINDS, one.name
        assert one.metadata["help"], one.name
        if one.type in (int, float):
            assert one.metadata["limits"][0] >= 0, one.name
    for one in dataclasses.fields(pomdp.AWRConfig):
        assert one.metadata["help"] and one.metadata["limits"][0] >= 0, one.name


def test_settings_that_do_not_affect_results_may_change():
    quiet = pomdp.settings_where(affects_results=False)
    assert {"name", "data_path", "store_path", "log_every", "resume"} <= quiet
    assert quiet < pomdp.settings_where(may_change=True)
    fixed = pomdp.settings_where(affects_results=True, may_change=False)
    assert {"seq_len", "gamma", "train_seed", "algorithm", "submission", "precision"} <= fixed
    assert {"update_steps", "eval_seed", "device"} <= pomdp.settings_where(
        affects_results=True, may_change=True
    )


@pytest.mark.parametrize("runner", [[], ["-m", "cProfile"]], ids=["alone", "profiled"])
def test_a_submission_that_imports_this_file_gets_the_one_that_runs(tmp_path, runner):
    """A second one would have classes of its own. Under a profiler `__main__` is the profiler."""
    text = "import sys, custom_nethack_pomdp as ours\nsys.exit(ours.TrainConfig is TrainConfig)"
    (tmp_path / "idea.py").write_text(text, encoding="utf-8")
    command = [sys.executable, *runner, str(SCRIPT), "--submission", str(tmp_path / "idea.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=LIMIT_S)
    assert "cannot be used: SystemExit: True" in done.stderr


def test_characters_in_upper_case_and_named_twice():
    config = TrainConfig(character="Mon-Hum-Neu, val-hum-neu,mon-hum-neu")
    assert config.characters == ["mon-hum-neu", "val-hum-neu"]
    assert config.character == "mon-hum-neu,val-hum-neu"
