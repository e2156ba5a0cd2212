"""Settings of preferences that the objective does not use, or that contradict each other, raise an error."""

import dataclasses

import pytest

from qlora_jax.config import Config, ConfigError, DataArgs, ModelArgs, PreferenceArgs, validate
from qlora_jax.config.parse import from_dict

RUN = {"model": {"path": "m"}, "data": {"train": "t"}, "output": "o"}


def problems_of(objective: str, **preference: object) -> list[str]:
    """Returns the problems of a configuration, as a command reports them."""
    try:
        validate(from_dict(Config, RUN | {"objective": objective, "preference": preference}))
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("objective", "preference"),
    [
        ("sft", {}),
        ("dpo", {"beta": 0.5, "label_smoothing": 0.1}),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.1}),
        ("dpo", {"loss_type": "ipo"}),
        ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}),
        ("simpo", {"simpo_gamma": 1.0, "label_smoothing": 0.1}),
        ("orpo", {"beta": 1.0}),
        ("kto", {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0}),
    ],
)
def test_settings_that_are_used_are_valid(objective: str, preference: dict[str, object]):
    assert problems_of(objective, **preference) == []


@pytest.mark.parametrize(
    ("objective", "name", "value"),
    [
        ("sft", "beta", 0.2),
        ("sft", "loss_type", "ipo"),
        ("orpo", "label_smoothing", 0.1),
        ("orpo", "loss_type", "sigmoid"),
        ("dpo", "cpo_alpha", 1.0),
        ("cpo", "simpo_gamma", 1.0),
        ("dpo", "desirable_weight", 2.0),
        ("kto", "label_smoothing", 0.1),
    ],
)
def test_a_setting_that_the_objective_ignores_is_refused(objective: str, name: str, value: object):
    assert problems_of(objective, **{name: value}) == [
        f"preference.{name}: found {value!r}, but objective={objective} does not use it. Remove this setting"
    ]


def test_all_problems_are_reported_at_once():
    assert problems_of("cpo", loss_type="robust", desirable_weight=2.0) == [
        "preference.desirable_weight: found 2.0, but objective=cpo does not use it. Remove this setting",
        "preference.loss_type: found 'robust' with objective=cpo, expected one of sigmoid, hinge, ipo. Set one of them",
    ]


def test_a_loss_without_smoothing_refuses_it():
    assert problems_of("dpo", loss_type="hinge", label_smoothing=0.1) == [
        "preference.label_smoothing: found 0.1, but preference.loss_type=hinge does not use it. Remove this setting"
    ]


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("label_smoothing", 0.5), ("simpo_gamma", -1.0)])
def test_values_out_of_bounds_are_refused(name: str, value: float):
    with pytest.raises(ConfigError, match=f"preference.{name}: found {value}, expected"):
        from_dict(Config, RUN | {"objective": "simpo", "preference": {name: value}})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"learn": "last"}, "data.learn: found 'last', but objective=dpo does not use it. Remove this setting"),
        ({"source_max_length": 8, "target_max_length": 8}, "data.source_max_length: found 8, but objective=dpo"),
    ],
)
def test_settings_of_single_answers_are_refused(data: dict[str, object], problem: str):
    config = Config(
        model=ModelArgs(path="m"), data=DataArgs(train="t"), objective="dpo", preference=PreferenceArgs(), output="o"
    )
    with pytest.raises(ConfigError, match=problem):
        validate(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))
