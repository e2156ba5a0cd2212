"""Settings of distillation that the objective does not use, or that contradict each other, raise an error."""

from typing import Any

import pytest

from qlora_jax.config import Config, ConfigError, validate
from qlora_jax.config.parse import from_dict

RUN = {"model": {"path": "m"}, "data": {"train": "t"}, "output": "o"}


def problems_of(objective: str = "distill", more: dict[str, Any] | None = None, **distillation: Any) -> list[str]:
    try:
        validate(from_dict(Config, RUN | {"objective": objective, "distillation": distillation} | (more or {})))
    except ConfigError as error:
        return error.problems
    return []


def test_settings_that_are_used_are_valid():
    assert problems_of(teacher="base") == []
    assert problems_of(teacher="org/large", teacher_quant_type="nf4", beta=0.5, loss_top_k=8) == []
    assert problems_of(teacher="https://a/v1", teacher_model="m", teacher_key_variable="KEY") == []
    assert problems_of(teacher="base", more={"data": {"train": "t", "learn": "all"}}) == []
    assert problems_of("gkd", teacher="base", more={"rollouts": {"temperature": 0.7}}) == []


def test_a_teacher_is_required():
    assert problems_of("gkd") == [
        "distillation.teacher: missing, expected a model for objective=gkd. Set it to base, for example"
    ]


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_other_objectives_refuse_the_section(objective: str):
    assert problems_of(objective, teacher="base") == [
        f"distillation.teacher: found 'base', but objective={objective} does not use it. Remove this setting"
    ]


def test_settings_that_contradict_each_other():
    found = problems_of(teacher="base", teacher_quant_type="nf4", loss_top_k=1, loss_add_tail=False)
    assert [problem.split(":")[0] for problem in found] == [
        "distillation.teacher_quant_type",
        "distillation.loss_add_tail",
    ]
    assert problems_of("gkd", more={"policy": {"beta": 0.1}}, teacher="base") == [
        "policy.beta: found 0.1, but objective=gkd does not use it. Remove this setting"
    ]
    assert problems_of(more={"rollouts": {"temperature": 0.7}}, teacher="base") == [
        "rollouts.temperature: found 0.7, but objective=distill does not use it. Remove this setting"
    ]
    assert problems_of(teacher="http://a/v1", teacher_quant_type="nf4", temperature=0.5) == [
        "distillation.teacher_model: missing, expected the endpoint's name of the model. Set it",
        "distillation.teacher_quant_type: found 'nf4', but the endpoint has loaded its model already. Remove this "
        "setting",
        "distillation.temperature: found 0.5, but an endpoint gives probabilities at temperature 1, from which that of "
        "all other tokens at another temperature cannot be computed. Remove this setting",
    ]
    assert problems_of(teacher="base", teacher_model="m", teacher_timeout=1.0) == [
        f"distillation.{name}: found {value}, but distillation.teacher=base is not an address. Remove this setting"
        for name, value in (("teacher_model", "'m'"), ("teacher_timeout", "1.0"))
    ]
    assert problems_of(teacher="base", lmbda=0.5) == [
        "distillation.lmbda: found 0.5, but objective=distill samples no replies. Set objective to gkd, or remove this "
        "setting"
    ]
    assert "lora.dropout" in problems_of("gkd", more={"lora": {"dropout": 0.1}}, teacher="base")[0]
