"""Memory sizes as text, and the settings that use them."""

import dataclasses

import pytest

from qlora_jax.config import (
    Config,
    ConfigError,
    DataArgs,
    ModelArgs,
    OptimArgs,
    paging_of,
    read_config,
    validate,
    write_config,
)
from qlora_jax.config.command_line import read_arguments
from qlora_jax.config.parse import from_dict
from qlora_jax.config.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("0B", 0), ("2GiB", 2 * 2**30), ("1.5 gib", 3 * 2**29), ("512MB", 512_000_000), (" 3 KiB ", 3072)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2", "-1GiB", "2 gigs", "GiB", "1e3MiB", "1..5GiB"])
def test_malformed_sizes(text):
    with pytest.raises(ValueError, match=r"found .*expected a number of 0 or more and a unit"):
        parse_bytes(text)


def test_format_bytes():
    assert [format_bytes(size) for size in (12, 1536, 2**21, 3 * 2**29)] == ["12 B", "1.50 KiB", "2.00 MiB", "1.50 GiB"]


def paged(**optim) -> Config:
    return Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", optim=OptimArgs(**optim))


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (dict(paging="on"), "found None with optim.paging=on, expected a size such as 2GiB"),
        (dict(paging="auto", paging_budget="2GiB"), "expected null"),
        (dict(paging_budget="2GiB"), "expected null"),
        (dict(name="paged_adamw_8bit", paging_budget="2GiB"), "expected null"),
        (dict(name="paged_adamw_8bit", paging="off"), "found 'off' with optim.name=paged_adamw_8bit.*. Use adamw_8bit"),
        (dict(paging="on", paging_budget="-2GiB"), "paging_budget: found '-2GiB', expected a number of 0 or more"),
    ],
)
def test_paging_budget_must_match_the_paging_mode(optim, words):
    with pytest.raises(ConfigError, match=words):
        validate(paged(**optim))


@pytest.mark.parametrize(
    ("name", "paging", "expected"),
    [
        ("adamw_8bit", "by_name", "off"),
        ("paged_adamw_8bit", "by_name", "auto"),
        ("lion_32bit", "auto", "auto"),
        ("paged_lion_32bit", "on", "on"),
    ],
)
def test_paging_follows_the_name_unless_set(name, paging, expected):
    optim = OptimArgs(name=name, paging=paging, paging_budget="2GiB" if paging == "on" else None)
    validate(dataclasses.replace(paged(), optim=optim))
    assert paging_of(optim) == expected


@pytest.mark.parametrize(
    ("name", "ours"),
    [("adamw", "adamw_32bit"), ("adamw_bnb_8bit", "adamw_8bit"), ("paged_adamw8bit", "paged_adamw_8bit")],
)
def test_other_trainers_optimizer_names_get_a_suggestion(name, ours):
    with pytest.raises(ConfigError, match=f"optim.name: found '{name}', expected one of .*; did you mean {ours}[?]"):
        from_dict(Config, {"model": {"path": "m"}, "data": {"train": "t"}, "output": "o", "optim": {"name": name}})


@pytest.mark.parametrize("mode", ["off", "on", "auto"])
def test_on_and_off_are_words_in_yaml(tmp_path, mode):
    budget = "2GiB" if mode == "on" else None
    path = tmp_path / "run.yaml"
    lines = ["model: {path: m}", "data: {train: t}", "output: o", "optim:", f"  paging: {mode}"]
    path.write_text("\n".join([*lines, f"  paging_budget: {budget or 'null'}"]))
    assert read_config(path) == paged(paging=mode, paging_budget=budget)
    write_config(read_config(path), path)
    assert read_config(path) == paged(paging=mode, paging_budget=budget)
    given = [] if budget is None else ["--optim.paging_budget", budget]
    assert read_arguments(["--config", str(path), "--optim.paging", mode, *given]).optim.paging == mode
