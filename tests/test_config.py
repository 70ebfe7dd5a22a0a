"""Settings: the command line over the file over the defaults, and one clear line for every mistake."""

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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import TrainConfig, UserError, main, parse_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "custom_nethack_pomdp.py"
GAMES = ROOT / "tests" / "data" / "nle_data"
FIELDS = [item.name for item in dataclasses.fields(TrainConfig)]
DEFAULTS = dataclasses.asdict(TrainConfig())


def changed(config):
    """The settings that differ from the defaults."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value != DEFAULTS[name]}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- where a value comes from
def test_command_line_over_file_over_default(tmp_path):
    path = write(tmp_path / "a.yaml", "batch_size: 8\nseq_len: 4\nname: from_file\nclip_grad_norm: 2\n")
    for argv in (["--batch_size", "3", "--config", path], ["--config", path, "--batch_size", "3"],
                 [f"--config={path}", "--batch_size=3"], ["--config_path", path, "--batch_size=3"]):  # fmt: skip
        assert changed(parse_config(argv)) == {"batch_size": 3, "seq_len": 4, "name": "from_file", "clip_grad_norm": 2.0}
    assert changed(parse_config([])) == {}
    # A default on the command line beats the file as well, and null takes an optional value back.
    argv = ["--config", path, "--batch_size", "128", "--clip_grad_norm", "null"]
    assert changed(parse_config(argv)) == {"seq_len": 4, "name": "from_file"}


def test_values_may_hold_an_equals_sign_and_begin_with_a_dash():
    assert parse_config(["--name=a=b"]).name == "a=b"
    assert parse_config(["--name", "-a"]).name == "-a"


def test_characters_may_be_written_with_spaces():
    """The same characters are the same run, however they are written."""
    plain, spaced = (parse_config(["--character", text]) for text in ("mon-hum-neu,val-hum-neu", " mon-hum-neu, val-hum-neu,"))
    assert plain.characters == spaced.characters == ["mon-hum-neu", "val-hum-neu"]
    assert pomdp.run_identity(plain) == pomdp.run_identity(spaced) and pomdp.run_folder(plain) == pomdp.run_folder(spaced)


def test_algorithm_is_merged_key_by_key(tmp_path):
    path = write(tmp_path / "a.yaml", "algorithm: {burn_in: 8, lam: 0.5}\n")
    assert parse_config(["--config", path]).algorithm == {"burn_in": 8, "lam": 0.5}
    assert parse_config(["--config", path, "--algorithm", "{burn_in: 2}"]).algorithm == {"burn_in": 2, "lam": 0.5}
    assert parse_config(["--config", path, "--algorithm={beta: 3}"]).algorithm == {"burn_in": 8, "lam": 0.5, "beta": 3}
    assert parse_config(["--algorithm", "{beta: 3}"]).algorithm == {"beta": 3}
    parse_config(["--algorithm", "{beta: 3}"]).algorithm["lam"] = 0.1
    assert parse_config([]).algorithm == {}, "one config's overrides leak into the next"


@pytest.mark.parametrize("text", ["1000000", "1e6", "1E6", "1_000_000", "1000000.0"])
def test_whole_numbers_may_be_written_with_an_exponent(tmp_path, text):
    for config in (parse_config(["--update_steps", text]), parse_config(["--config", write(tmp_path / "a.yaml", f"update_steps: {text}")])):
        assert config.update_steps == 1_000_000 and type(config.update_steps) is int


@pytest.mark.parametrize("name, text, value", [
    ("resume", "true", True), ("resume", "True", True), ("use_prev_action", "False", False), ("use_prev_action", "no", False),
    ("learning_rate", "1e-3", 1e-3), ("learning_rate", "1", 1.0), ("clip_grad_norm", "null", None), ("clip_grad_norm", "0.5", 0.5),
    ("train_seed", str(2**53 + 1), 2**53 + 1), ("data_path", "null", None), ("data_path", "a/b", "a/b"), ("heldout_share", "0", 0.0),
])  # fmt: skip
def test_values_are_read_as_their_type(tmp_path, name, text, value):
    """From either place, with the exact type: `False` is False, 1 for a float is 1.0, and a large seed keeps its digits."""
    for config in (parse_config([f"--{name}", text]), parse_config(["--config", write(tmp_path / "a.yaml", f"{name}: {text}\n")])):
        read = getattr(config, name)
        assert read == value and type(read) is type(value)


def test_a_dumped_config_reads_back(tmp_path):
    """config.yaml in a run's folder is a config file like any other."""
    config = parse_config(["--character", "ran-hum-neu", "--algorithm", "{burn_in: 2}", "--clip_grad_norm", "1", "--resume", "yes",
                           "--learning_rate", "1e-5", "--name", "null", "--data_path", "x: #y"])  # fmt: skip
    with open(tmp_path / "config.yaml", "w", encoding="utf-8") as file:
        pyrallis.dump(config, file)
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_parse(path):
    config = parse_config(["--config", str(path)])
    pomdp.awr_config(config.algorithm)
    assert changed(config), "a config file that changes nothing"


def test_the_shipped_configs_are_there():
    assert {"quickstart.yaml", "gpu.yaml"} <= {path.name for path in (ROOT / "scripts" / "configs").glob("*.yaml")}


def test_the_gpu_config_sees_as_many_transitions_as_the_defaults():
    fast, default = parse_config(["--config", str(ROOT / "scripts" / "configs" / "gpu.yaml")]), TrainConfig()
    transitions = [config.update_steps * config.batch_size * config.seq_len for config in (fast, default)]
    assert transitions[0] == transitions[1] == 204_800_000
    # The last evaluation and the last checkpoint are at the end in any case; the others divide the run evenly.
    for name in ("eval_every", "log_every", "checkpoint_every"):
        assert fast.update_steps % getattr(fast, name) == 0 and getattr(fast, name) < getattr(default, name), name


def test_benchmark_s_fields_keep_their_defaults():
    """Those of its own file, all but `character`."""
    benchmark = dict(data_mode="in_memory", project="NetHack", group="custom-nethack-pomdp", name="custom", version=0,
                     tau=0.005, rnn_hidden_dim=2048, rnn_layers=2, use_prev_action=True, rnn_dropout=0.0,
                     clip_range=10.0, gamma=0.999, update_steps=100_000, batch_size=128, seq_len=16, learning_rate=3e-4,
                     weight_decay=0.0, clip_grad_norm=None, checkpoints_path=None, eval_every=10_000, eval_episodes=50, eval_processes=14,
                     render_processes=14, eval_seed=50, train_seed=42)  # fmt: skip
    assert {name: DEFAULTS[name] for name in benchmark} == benchmark and "character" in FIELDS


# --- mistakes, all of which parse_config finds
MISTAKES = [  # (arguments, config file or None, what the message must name)
    (["--batch_sise", "3"], None, "batch_sise.*batch_size"),
    (["--batch-size", "3"], None, "batch-size.*batch_size"),
    ([], "batch_sise: 3", "a.yaml.*batch_sise.*batch_size"),
    ([], "1: 2", "1"),
    (["--zzz", "3"], None, "zzz"),
    (["batch_size=3"], None, "batch_size=3"),
    (["-b", "3"], None, "-b"),
    (["--batch_size"], None, "batch_size.*value"),
    (["--algorithm.burn_in", "8"], None, "algorithm"),
    (["--batch_size", "many"], None, "batch_size.*many"),
    ([], "batch_size: many", "batch_size.*many"),
    ([], "batch_size: [1]", "batch_size"),
    ([], "batch_size: {a: 1}", "batch_size"),
    ([], "batch_size: true", "batch_size"),
    ([], "batch_size:", "batch_size"),
    (["--batch_size", "2.7"], None, "batch_size.*2.7"),
    ([], "batch_size: 2.7", "batch_size.*2.7"),
    (["--learning_rate", "nan"], None, "learning_rate.*nan"),
    (["--learning_rate", "inf"], None, "learning_rate.*inf"),
    ([], "learning_rate: .nan", "learning_rate.*nan"),
    ([], "learning_rate: .inf", "learning_rate.*inf"),
    (["--clip_grad_norm", "nan"], None, "clip_grad_norm.*nan"),
    (["--resume", "maybe"], None, "resume.*maybe"),
    ([], "resume: maybe", "resume.*maybe"),
    ([], "resume: 2", "resume.*2"),
    ([], "name: null", "name"),
    ([], "name: no", "name"),  # YAML reads it as false, and the run would be called False
    ([], "name: [a]", "name"),
    ([], "batch_size: 8\nbatch_size: 9", "a.yaml.*batch_size.*twice"),
    ([], "algorithm: {lam: 1, lam: 2}", "a.yaml.*lam.*twice"),
    (["--algorithm", "{lam: 1, lam: 2}"], None, "algorithm.*lam.*twice"),
    (["--algorithm", "burn_in"], None, "algorithm"),
    (["--algorithm", "{a: ["], None, "algorithm"),
    (["--algorithm", "{1: 2}"], None, "algorithm"),
    ([], "algorithm: [burn_in]", "algorithm"),
    ([], "", "a.yaml"),
    ([], "# nothing but a comment\n", "a.yaml"),
    ([], "- batch_size\n", "a.yaml"),
    ([], "just text", "a.yaml"),
    ([], "batch_size: [1", "a.yaml.*YAML"),
    ([], "? [1]\n: 2", "a.yaml"),
    ([], "name: !!python/object/apply:os.system [true]", "a.yaml"),
    ([], "name: 2024-13-45", "a.yaml"),  # YAML takes it for a date, of a thirteenth month
    ([], "batch_size: 0x_", "a.yaml"),
    ([], "!!map batch_size", "a.yaml"),
    ([], "[" * 5000, "a.yaml"),
    ([], "train_seed: 1" + "0" * 400, "train_seed"),
    (["--train_seed", "1" + "0" * 400], None, "train_seed"),
    (["--train_seed", str(2**64)], None, "train_seed"),  # torch takes no seed as large as this
    (["--train_seed", "-1"], None, "train_seed"),
    (["--config", "does/not/exist.yaml"], None, "does/not/exist.yaml"),
    (["--config", "."], None, "config"),
    (["--config", ""], None, "config"),
    (["--config="], None, "config"),
    (["--config", "a\0b"], None, "config"),
    (["--a\nb"], None, "a"),
    (["--character", "mon-hum-nue"], None, "mon-hum-nue.*mon-hum-neu"),
    (["--character", "mon-hum-neu,orc"], None, "orc"),
    (["--character", "mon-hum-neu,mon-hum-neu"], None, "twice"),
    (["--character", ","], None, "character"),
    (["--character", ""], None, "character"),
    ([], "character: elf", "elf"),
    (["--rnn_hidden_dim", "512"], None, "rnn_hidden_dim"),
    (["--rnn_layers", "1"], None, "rnn_layers"),
    ([], "rnn_hidden_dim: 1024", "rnn_hidden_dim"),
    ([], "rnn_layers: 3", "rnn_layers"),
    (["--seq_len", "0"], None, "seq_len"),
    (["--batch_size", "-4"], None, "batch_size"),
    (["--eval_episodes", "-1"], None, "eval_episodes"),
    (["--gamma", "1.5"], None, "gamma"),
    (["--heldout_share", "1"], None, "heldout_share"),
    (["--clip_grad_norm", "0"], None, "clip_grad_norm"),
    (["--lr_schedule", "linear"], None, "lr_schedule.*cosine"),
    (["--precision", "fp8"], None, "precision.*bf16"),
    (["--device", "tpu"], None, "device.*tpu"),
]


def mistake_id(case):
    argv, text, _ = case
    return re.sub(r"[^\w=.,:+-]+", "_", " ".join(argv) + (f" <{text}>" if text is not None else ""))[:50]


@pytest.mark.parametrize("case", MISTAKES, ids=mistake_id)
def test_every_mistake_is_one_line_and_writes_nothing(case, tmp_path, monkeypatch, capfd):
    argv, text, names = case
    monkeypatch.chdir(tmp_path)
    if text is not None:
        argv = [*argv, "--config", write(tmp_path / "a.yaml", text)]
    before = everything_below(tmp_path)
    with mock.patch.object(pomdp, "train", side_effect=AssertionError("the run began")):
        assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err), err
    assert re.search(names, err), err
    assert everything_below(tmp_path) == before


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00batch_size")
    with pytest.raises(UserError, match=r"a\.yaml"):
        parse_config(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("overrides, names", [
    ("{burnin: 8}", "burnin.*burn_in"),
    ("{burn_in: eight}", "burn_in.*eight"),
    ("{burn_in: 2.5}", r"burn_in.*2\.5"),
    ("{burn_in: -1}", "burn_in.*-1"),
    ("{burn_in: true}", "burn_in"),
    ("{burn_in: null}", "burn_in"),
    ("{burn_in: .inf}", "burn_in"),
    ("{lam: .nan}", "lam"),
    ("{lam: .inf}", "lam"),
    ("{lam: 1.5}", "lam"),  # returns would grow without bound
    ("{beta: 0}", "beta"),  # the advantage is divided by it
    ("{temperature: 0}", "temperature"),  # and logits by this
    ("{max_weight: 0}", "max_weight"),  # its logarithm bounds the exponent
    ("{head_dim: 0}", "head_dim"),
    ("{lam: {a: 1}}", "lam"),
])  # fmt: skip
def test_wrong_algorithm_settings_through_main(overrides, names, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pomdp.Trainer, "run", mock.Mock(side_effect=AssertionError("the run began")))
    backbone = pomdp.ModelBackbone
    monkeypatch.setattr(pomdp, "ModelBackbone", lambda actions, *_: backbone(actions, 16, 1))  # the full size takes seconds to make
    assert main(["--data_path", str(GAMES), "--character", "mon-hum-neu", "--algorithm", overrides]) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert re.search(names, err), err
    assert everything_below(tmp_path) == []


# --- anything at all
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(2**50, 2**70), st.floats(), st.dates(), st.text(max_size=12),
    st.sampled_from(["1e6", "nan", "null", "true", "no", "1:30", "0x_", "mon-hum-neu", "2024-13-45", "{a: 1}", "[", "~", "auto"]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=4)
KEYS = st.sampled_from([*FIELDS, "config", "config_path"]) | st.text(max_size=8)
LINES = st.tuples(KEYS, SCALARS.map(str) | st.text(max_size=20)).map(lambda pair: f"{pair[0]}: {pair[1]}")
FILES = st.one_of(
    st.text(max_size=60), st.lists(LINES, max_size=4).map("\n".join), st.dictionaries(KEYS, VALUES, max_size=4).map(yaml.dump),
    st.text(alphabet="!&*<>|?:-{}[],#%@=~01abx_ \n\"'", max_size=40),
)  # fmt: skip
TOKENS = st.one_of(
    st.sampled_from(FIELDS).map("--{}".format), st.builds("--{}={}".format, KEYS, SCALARS), SCALARS.map(str), st.text(max_size=10)
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(argv=st.lists(TOKENS, max_size=5), text=st.none() | FILES)
@example(argv=[], text="name: 2024-13-45")
@example(argv=["--config=\0"], text=None)
@example(argv=["--algorithm", "!!int x"], text=None)
@example(argv=["--train_seed=1e300"], text=None)
def test_anything_else_than_a_config_is_a_user_error(argv, text, tmp_path):
    if "-h" in argv or "--help" in argv:
        return
    if text is not None:
        (tmp_path / "any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        argv = [*argv, "--config", str(tmp_path / "any.yaml")]
    try:
        config = parse_config(argv)
    except UserError as error:
        assert str(error).strip(), "a mistake without a message"  # noqa: PT017  any text may also be right
        return
    kinds = {item.name: type(getattr(TrainConfig(), item.name)) for item in dataclasses.fields(TrainConfig)}
    for name, value in dataclasses.asdict(config).items():
        assert value is None or kinds[name] is type(None) or type(value) is kinds[name], (name, value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["batch_size", "seq_len", "update_steps", "eval_seed"]),
                       st.tuples(st.integers(1, 10**9), st.booleans(), st.booleans())))  # fmt: skip
def test_precedence_holds_for_any_mixture(tmp_path, choices):
    """Each setting comes from the command line if it is there, else from the file, else from the defaults."""
    in_file = {name: value for name, (value, file, _) in choices.items() if file}
    arguments = [token for name, (value, _, line) in choices.items() if line for token in (f"--{name}", str(value + 1))]
    if in_file:
        arguments += ["--config", write(tmp_path / "mixture.yaml", yaml.safe_dump(in_file))]
    config = parse_config(arguments)
    for name, (value, file, line) in choices.items():
        assert getattr(config, name) == (value + 1 if line else value if file else DEFAULTS[name])


# --- through the command line itself
def outside_environment(folder):
    """Variables of a user who has neither data nor accounts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "KATAKOMBA"))}
    return {**kept, "HOME": str(folder), "WANDB_MODE": "disabled"}


def command_line(folder, *argv):
    folder.mkdir()
    result = subprocess.run([sys.executable, str(SCRIPT), *argv], cwd=folder, env=outside_environment(folder), capture_output=True,
                            text=True, timeout=300, check=False)  # fmt: skip
    return result, everything_below(folder)


MISTAKES_OUTSIDE = {
    "the benchmark's command without data": (
        ["--character", "ran-hum-neu", "--train_seed", "42", "--checkpoints_path", "results"],
        r"data-ran-hum-neu-any\.hdf5.*NLD-AA.*--data_path.*Katakomba.*KATAKOMBA_DATA_DIR.*scripts/record_games\.py --character ran-hum-neu",
    ),
    "an unknown setting": (["--learning_rat", "1"], "learning_rat.*learning_rate"),
    "an unknown algorithm setting": (["--algorithm", "{burnin: 2}", "--data_path", str(GAMES)], "burnin"),
    "the LSTM's size": (["--rnn_hidden_dim", "1024", "--data_path", str(GAMES)], "rnn_hidden_dim"),
    "a folder that is not there": (["--data_path", "nowhere"], "nowhere"),
    "a character without games": (["--data_path", str(GAMES), "--character", "wiz-elf-cha"], "wiz-elf-cha.*mon-hum-neu"),
    "a submission that is not there": (["--data_path", str(GAMES), "--submission", "nowhere.py"], r"nowhere\.py"),
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Results of all commands by name; two run side by side, since each takes seconds to import its libraries."""
    folder = tmp_path_factory.mktemp("command_line")
    commands = {"help": ["--help"], **{name: argv for name, (argv, _) in MISTAKES_OUTSIDE.items()}}
    if not torch.cuda.is_available():
        commands["cuda"] = ["--data_path", str(GAMES), "--device", "cuda"]
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(command_line, folder / str(number), *argv) for number, (name, argv) in enumerate(commands.items())}
        # What the libraries themselves say on import (gym 0.23 warns of its age), so that the tests can look past it.
        imported = subprocess.run([sys.executable, "-c", "import custom_nethack_pomdp"], cwd=ROOT, capture_output=True, text=True,
                                  check=True)  # fmt: skip
        return {**{name: future.result() for name, future in futures.items()}, "import": imported.stderr}


def check_mistake(outside, name, pattern):
    result, files = outside[name]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(outside["import"])
    message = result.stderr[len(outside["import"]) :]
    assert re.fullmatch(r"error: [^\n]+\n", message), message
    assert re.search(pattern, message), message
    assert files == [], "a mistake left files behind"


@pytest.mark.parametrize("name", MISTAKES_OUTSIDE)
def test_mistakes_through_the_command_line(outside, name):
    check_mistake(outside, name, MISTAKES_OUTSIDE[name][1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(outside):
    check_mistake(outside, "cuda", "cuda")


def test_importing_prints_nothing(outside):
    """No side effects at import. gym 0.23 cannot be kept from its notice."""
    if int(pomdp.nle.__version__.split(".")[0]) >= 1:
        assert outside["import"] == ""


def test_help_lists_every_setting_with_its_meaning_and_default(outside):
    result, files = outside["help"]
    assert result.returncode == 0 and result.stderr == outside["import"] and files == []
    text = " ".join(result.stdout.split())
    source = SCRIPT.read_text(encoding="utf-8")
    body = source[source.index("class TrainConfig") : source.index("def __post_init__")]
    comments = dict(re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", body, re.MULTILINE))
    assert set(comments) == set(FIELDS), "a setting without a comment"
    for name in FIELDS:
        meaning, _, absent = comments[name].rstrip("]").partition(" [")
        default = DEFAULTS[name] if DEFAULTS[name] is not None else absent
        assert default != "", f"{name}: what does None stand for?"
        default = str(default).lower() if isinstance(default, bool) else str(default)
        default = re.escape(default).replace(",", ", ?").replace("-", "- ?").replace(r"\-", r"\- ?")  # argparse breaks lines at hyphens
        meaning = re.escape(" ".join(meaning.split())).replace(r"\-", r"\- ?")
        assert re.search(rf"--{name} \S.*?{meaning} \(default: {default}\)", text), name


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = pomdp.help_parser().format_help().splitlines()
    assert max(map(len, lines)) <= columns and "Optional" not in "".join(lines)
    groups = [line for line in lines if re.fullmatch(r"\S.*:", line) and not line.startswith("usage")]
    assert len(groups) >= 7, groups
