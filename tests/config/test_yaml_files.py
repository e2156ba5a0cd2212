"""Configurations in YAML files."""

import json
import time
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
from qlora_jax.config.yaml_files import parse_yaml

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


def test_a_date_is_text(tmp_path):
    path = write(tmp_path, "model: {path: m}\ndata: {train: t, template_date: 2026-11-28}\noutput: o\n")
    assert read_config(path).data.template_date == "2026-11-28"


@pytest.mark.parametrize("date", ["2026-13-01", "28.11.2026"])
def test_what_is_not_a_date_is_refused(tmp_path, date):
    path = write(tmp_path, f"model: {{path: m}}\ndata: {{train: t, template_date: {date}}}\noutput: o\n")
    with pytest.raises(ConfigError, match=f"data.template_date: found '{date}', expected a date such as 2026-11-28"):
        read_config(path)


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
        ("data: {format: alpaca-clean}", "prompt-messages or a mapping of text to one of these; did you mean alpaca?"),
        ("lora: {target_modules: [1]}", "lora.target_modules: found [1], expected text or a list of text"),
        ("lora: {rank_pattern: {q: x}}", "expected a mapping of text to a whole number"),
        ("optim: {learning_rate: .nan}", "optim.learning_rate: found nan, expected a number"),
        (f"optim: {{learning_rate: 1{'0' * 400}}}", "00, expected a number"),  # larger than any float
        ("train: {steps: true}", "train.steps: found True, expected a whole number or null"),
        ("1e9: sft", "1e9: found a key of type float, expected text"),
        ("lora: {rank_pattern: {1: 4}}", "lora.rank_pattern.1: found a key of type int, expected text"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read_config(path := write(tmp_path, text))
    (found,) = [problem for problem in error.value.problems if message in problem]
    assert str(path) in found


def test_a_section_that_is_set_twice_is_one_problem(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_config(path := write(tmp_path, "lora:\n  rank: 3\n  alpha: 8\n" * 2))
    assert error.value.problems == [f"lora: set twice ({path}:1 and line 4). Remove one of them"]


def test_twenty_keys_that_are_set_twice_are_listed(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_config(path := write(tmp_path, "".join(f"k{n}: 0\n" for n in range(30)) * 2))
    assert len(error.value.problems) == 21 and error.value.problems[-1] == f"{path}: 10 more keys like these"


def test_characters_that_json_escapes_as_two_are_one(tmp_path):
    assert parse_yaml(json.dumps({"system": "\U0001f469"})) == {"system": "\U0001f469"}
    with pytest.raises(ConfigError, match=r"run\.yaml: not a YAML file: half of a surrogate pair .*line 1"):
        read_config(write(tmp_path, r'output: "\ud83d"'))


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


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


REFUSED = {
    "bomb": (BOMB, "line 5: too large .found more than 20000 values, those of aliases included"),
    "cycle": ("lora: &a\n  rank: *a\n", "line 2: alias .a is part of what it stands for"),
    "inner cycle": ("- &a [1, {b: [*a]}]\n", "line 1: alias .a is part of what it stands for"),
    "merged cycle": ("<<: &a {<<: *a}\n", "alias .a is part of what it stands for"),
    "lists": ("lora: " + "[" * 100_000, "line 1: nested too deeply .found more than 100 levels"),
    "mappings": ("{a: " * 100_000, "line 1: nested too deeply"),
    "indented": ("\n".join(" " * n + "a:" for n in range(1000)), "line 101: nested too deeply"),
    "dashes": ("- " * 100_000, "line 1: nested too deeply"),
    "undefined": ("a: *b", "found undefined alias"),
    "digits": (f"a: {'9' * 5000}", "line 1: found '999.*expected int: Exceeds the limit"),
    "empty int": ("a: 1\nb: !!int ''", "line 2: found '', expected int$"),
    "empty float": ("a: !!float ''", "line 1: found '', expected float$"),
    "no bool": ("a: {b: [1, !!bool maybe]}", "line 1: found 'maybe', expected bool$"),
    "no date": ("a: !!timestamp x", "line 1: found 'x', expected timestamp$"),
    "a day 99": ("a: !!timestamp 2024-99-99", "line 1: found '2024-99-99', expected timestamp: month must be"),
    "base 60": (f"\na: {'1:' * 200}1.5", "line 2: found '1:1.*expected float$"),
    "a tag on a list": ("a: !!bool [x]", "expected a scalar node"),
    "no character": ('a: 1\nb: "\\U00110000"', "line 2: .*not in range"),
    "version": (f"%YAML 1.{'9' * 5000}\n---\na: 1", "line 1: Exceeds the limit"),
    "values": ("a: [" + "1, " * 30_000 + "]", "too large"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_would_hang_or_fill_the_memory_are_refused(tmp_path: Path, case: str):
    text, message = REFUSED[case]
    (tmp_path / "c.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=f"c.yaml: not a YAML file: .*{message}"):
        read_config(tmp_path / "c.yaml")
    assert time.process_time() - start < 5


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    with (tmp_path / "c.yaml").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(ConfigError, match=r"c.yaml: too large for settings \(found 2147483648 bytes"):
        read_config(tmp_path / "c.yaml")


def test_aliases_and_merged_mappings_are_read(tmp_path: Path):
    text = """
model: {path: m.gguf}
data: {train: t.jsonl}
output: o
lora:
  target_modules: &names [q_proj, v_proj]
  modules_to_save: *names
"""
    (tmp_path / "c.yaml").write_text(text)
    assert read_config(tmp_path / "c.yaml").lora.modules_to_save == ["q_proj", "v_proj"]
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: *a}") == {"a": {"x": 1}, "b": {"x": 1, "y": {"x": 1}}}
