"""Bounds and contradictions, all told at once."""

import dataclasses

import pytest

from qlora_jax.config import Config, ConfigError, DataArgs, ModelArgs, validate
from qlora_jax.config.decode import walk
from qlora_jax.config.synonyms import SYNONYMS

MINIMAL = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o")


def changed(key: str, value: object) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(MINIMAL, **{name: value})
    return dataclasses.replace(MINIMAL, **{section: dataclasses.replace(getattr(MINIMAL, section), **{name: value})})


def test_the_defaults_hold():
    validate(MINIMAL)


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("model.block_size", 48, 32),
        ("model.block_size", 8192, 4096),
        ("lora.rank", 0, 1),
        ("lora.alpha", 0.0, 0.5),
        ("lora.dropout", 1.0, 0.0),
        ("lora.target_modules", [], ["q_proj"]),
        ("lora.rank_pattern", {"q": 0}, {"q": 1}),
        ("lora.alpha_pattern", {"q": -1.0}, {"q": 1.0}),
        ("data.eval_fraction", 1.0, 0.5),
        ("data.eval_fraction", -0.1, 0.0),
        ("data.max_length", 1, 2),
        ("optim.learning_rate", -1e-4, 1e-4),
        ("optim.warmup_ratio", 1.1, 1.0),
        ("optim.beta2", 1.0, 0.0),
        ("optim.max_grad_norm", -1.0, 0.0),
        ("train.steps", 0, None),
        ("train.epochs", 0.0, 0.5),
        ("train.eval_every", 5, 0),
        ("output", "", "o"),
    ],
)
def test_bounds(key, bad, good):
    validate(changed(key, good))
    with pytest.raises(ConfigError, match=key):
        validate(changed(key, bad))


def test_types_of_a_config_made_in_python():
    with pytest.raises(ConfigError, match=r"lora\.rank: found True, expected a whole number"):
        validate(changed("lora.rank", True))


def test_two_sources_of_held_out_rows():
    both = dataclasses.replace(MINIMAL, data=DataArgs(train="t", eval="e", eval_fraction=0.1))
    with pytest.raises(ConfigError, match="expected one of them"):
        validate(both)


def test_every_synonym_points_at_a_setting():
    assert set(SYNONYMS.values()) <= {key for key, _, _ in walk(Config)}


def test_every_setting_has_help():
    assert all(field.metadata["help"] for _, field, _ in walk(Config))
