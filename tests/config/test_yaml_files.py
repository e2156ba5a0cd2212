"""Configurations in YAML files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.config import (
    Config,
    ConfigError,
    DataArgs,
    LoraArgs,
    ModelArgs,
    OptimArgs,
    TrainArgs,
    differences,
    read_config,
    write_config,
)

MINIMAL = Config(model=ModelArgs(path="m.gguf"), data=DataArgs(train="t.jsonl"), output="runs/a")

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
NUMBER = st.floats(min_value=1e-30, max_value=1e30)
CONFIGS = st.builds(
    Config,
    model=st.builds(ModelArgs, path=TEXT, double_quant=st.booleans()),
    lora=st.builds(
        LoraArgs,
        alpha=NUMBER,
        target_modules=TEXT | st.lists(TEXT, min_size=1),
        rank_pattern=st.dictionaries(TEXT, st.integers(min_value=1)),
        alpha_pattern=st.dictionaries(TEXT, NUMBER),
    ),
    data=st.builds(DataArgs, train=TEXT, eval=st.none() | TEXT),
    optim=st.builds(OptimArgs, learning_rate=NUMBER, eps=NUMBER),
    train=st.builds(TrainArgs, steps=st.none() | st.integers(min_value=1)),
    output=TEXT | st.sampled_from(["1e5", "2e-4", "yes", "null", "012", "2024-01-01", "~", "", "{a: b}"]).filter(len),
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@given(config=CONFIGS)
def test_written_config_reads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    write_config(config, path)
    assert read_config(path) == config


def test_a_learning_rate_without_a_dot_is_a_number(tmp_path):
    path = write(tmp_path, "model: {path: m}\ndata: {train: t}\noptim: {learning_rate: 2e-4}\noutput: o\n")
    assert read_config(path).optim.learning_rate == 2e-4


def test_an_empty_section_keeps_its_defaults(tmp_path):
    path = write(tmp_path, "model: {path: m}\nlora:\n#  rank: 3\ndata: {train: t}\noutput: o\n")
    assert read_config(path).lora == LoraArgs()


def test_every_problem_is_reported_with_file_and_line(tmp_path):
    path = write(tmp_path, "model:\n  path: m\n  quant_type: nf5\nlora:\n  rnak: 8\n  rank: 1.5\n  use_rslora: 1\n")
    with pytest.raises(ConfigError) as error:
        read_config(path)
    quant_type, unknown, rank, boolean, train, output = error.value.problems
    assert quant_type.startswith("model.quant_type: found 'nf5', expected one of nf4, fp4")
    assert quant_type.endswith(f"({path}:3)")
    assert unknown == f"lora.rnak: unknown setting; did you mean lora.rank? ({path}:5)"
    assert rank == f"lora.rank: found 1.5, expected a whole number ({path}:6)"
    assert boolean == f"lora.use_rslora: found 1, expected true or false ({path}:7)"
    assert train.startswith("data.train: missing")
    assert output.startswith("output: missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 3, rank: 4}", "lora.rank: set twice"),
        ("lora: [", "not a YAML file"),
        ("- a\n", "found list, expected sections"),
        ("lora: 3", "lora: found 3, expected a section"),
        ("data: {format: alpaca-clean}", "chip2, text or a mapping of text to one of these; did you mean alpaca?"),
        ("lora: {target_modules: [1]}", "lora.target_modules: found [1], expected text or a list of text"),
        ("lora: {rank_pattern: {q: x}}", "expected a mapping of text to a whole number"),
        ("optim: {learning_rate: .nan}", "optim.learning_rate: found nan, expected a number"),
        ("train: {steps: true}", "train.steps: found True, expected a whole number or null"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read_config(write(tmp_path, text))
    assert message in str(error.value)


def test_differences_name_the_dotted_keys():
    other = Config(
        model=ModelArgs(path="m.gguf"),
        lora=LoraArgs(rank=8, rank_pattern={"q_proj": 4}),
        data=DataArgs(train="t.jsonl"),
        output="runs/b",
    )
    assert differences(MINIMAL, MINIMAL) == {}
    assert differences(MINIMAL, other) == {
        "lora.rank": (16, 8),
        "lora.rank_pattern": ({}, {"q_proj": 4}),
        "output": ("runs/a", "runs/b"),
    }
