"""Sizes of memory as text, and the settings that hold them."""

import pytest

from qlora_jax.config import Config, ConfigError, DataArgs, ModelArgs, OptimArgs, read_config, validate, write_config
from qlora_jax.config.command_line import parse
from qlora_jax.config.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("0B", 0), ("2GiB", 2 * 2**30), ("1.5 gib", 3 * 2**29), ("512MB", 512_000_000), (" 3 KiB ", 3072)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2", "-1GiB", "2 gigs", "GiB", "1e3MiB", "1..5GiB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"found .*expected a number of 0 or more and a unit"):
        parse_bytes(text)


def test_sizes_in_words():
    assert [format_bytes(size) for size in (12, 1536, 2**21, 3 * 2**29)] == ["12 B", "1.50 KiB", "2.00 MiB", "1.50 GiB"]


def paged(**optim) -> Config:
    return Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", optim=OptimArgs(**optim))


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (dict(paging="on"), "found None with optim.paging=on, expected a size such as 2GiB"),
        (dict(paging="auto", paging_budget="2GiB"), "expected null"),
        (dict(paging_budget="2GiB"), "expected null"),
        (dict(paging="on", paging_budget="-2GiB"), "paging_budget: found '-2GiB', expected a number of 0 or more"),
    ],
)
def test_a_budget_goes_with_its_mode(optim, words):
    with pytest.raises(ConfigError, match=words):
        validate(paged(**optim))


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
    assert parse(["--config", str(path), "--optim.paging", mode, *given], "train").optim.paging == mode
