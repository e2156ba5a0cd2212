"""Settings of policies and rollouts that the objective or its loss does not use raise an error."""

from typing import Any

import pytest

from qlora_jax.config import Config, ConfigError, validate
from qlora_jax.config.parse import from_dict
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.policy_gradient import PolicyGradient

RUN = {"model": {"path": "m"}, "data": {"train": "t"}, "output": "o"}


def problems_of(objective: str = "grpo", rollouts: Any = None, **policy: Any) -> list[str]:
    """Returns the problems of a configuration, as a command reports them."""
    try:
        validate(from_dict(Config, RUN | {"objective": objective, "policy": policy, "rollouts": rollouts or {}}))
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"epsilon_high": 0.28, "delta": 4.0, "beta": 0.04, "use_bias_correction_kl": False},
        {"importance_correction": "token_truncate", "correction_max": 2.0},
    ],
)
def test_settings_that_are_used_are_valid(policy: dict[str, Any]):
    assert problems_of(**policy) == []


def test_other_objectives_refuse_both_sections():
    assert problems_of("sft", beta=0.1, rollouts={"temperature": 0.7}) == [
        "policy.beta: found 0.1, but objective=sft does not use it. Remove this setting",
        "rollouts.temperature: found 0.7, but objective=sft does not use it. Remove this setting",
    ]


def test_a_loss_refuses_settings_that_it_ignores():
    found = problems_of(loss_type="cispo", delta=2.0, correction_max=2.0, use_bias_correction_kl=False)
    assert found == [
        "policy.epsilon_high: found null with policy.loss_type=cispo, expected the largest ratio. Set it, to 5 for "
        "example",
        "policy.delta: found 2.0, but policy.loss_type=cispo does not use it. Remove this setting",
        "policy.correction_max: found 2.0, but policy.importance_correction=null does not use it. Remove this setting",
        "policy.use_bias_correction_kl: found False, but policy.beta=0.0 does not use it. Remove this setting",
    ]


def test_values_out_of_bounds_are_refused():
    found = problems_of(delta=1.0, rollouts={"num_generations": 1, "temperature": 0.0, "top_p": 0.0})
    assert [problem.partition(":")[0] for problem in found] == [
        *("policy.delta", "rollouts.num_generations", "rollouts.temperature", "rollouts.top_p"),
    ]
    assert problems_of(rollouts={"cache": "2 apples"})[0].startswith("rollouts.cache: found '2 apples', expected")


def test_the_settings_make_the_objective():
    policy = {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 0.1}
    rollouts = {"num_generations": 4, "temperature": 0.7}
    made = make_objective(from_dict(Config, RUN | {"objective": "grpo", "policy": policy, "rollouts": rollouts}))
    assert made == PolicyGradient(
        sequences_per_row=4, level="sequence", epsilon=0.1, epsilon_high=0.1, temperature=0.7, stored_old=True
    )
    plain = make_objective(from_dict(Config, RUN | {"objective": "grpo"}))
    assert plain == PolicyGradient()
