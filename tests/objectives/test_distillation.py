"""Divergences from a teacher by hand, and what the outcomes of distillation add up to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, DistillationArgs, ModelArgs
from qlora_jax.config.objectives import RowKind
from qlora_jax.objectives.distillation import Distillation
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.objective import TokenValue, token_values

P, Q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.5, 0.1, 0.4]])


def divergence(beta: float, *, has_tail: bool = True) -> float:
    objective = Distillation(beta=beta, count_of_tokens=2, has_tail=has_tail)
    return float(objective.divergence(jnp.log(jnp.float32(P)), jnp.log(jnp.float32(Q)))[0])


def kl(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * np.log(a / b)).sum())


def test_the_divergence_of_one_token_by_hand():
    assert divergence(0.0) == pytest.approx(0.5 * np.log(5 / 7) + 0.1 * np.log(1 / 2) + 0.4 * np.log(4), rel=1e-6)
    assert divergence(1.0) == pytest.approx(kl(P, Q), rel=1e-6)
    mixture = 0.75 * P + 0.25 * Q
    assert divergence(0.25) == pytest.approx(0.25 * kl(Q, mixture) + 0.75 * kl(P, mixture), rel=1e-6)


def test_without_a_tail_both_are_normalized():
    assert divergence(0.0, has_tail=False) == pytest.approx(kl(Q[:, :2] / 0.6, P[:, :2] / 0.9), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_outcomes_without_tokens_have_no_part_and_no_gradient(beta: float):
    objective = Distillation(beta=beta)
    log_p, log_q = (jnp.log(jnp.float32(each)) for each in (P, Q))
    none = jnp.full((1, 1), -jnp.inf)

    def padded(log_p):
        more = [jnp.concatenate([each, none], axis=1) for each in (log_p, log_q)]
        return objective.divergence(*more)[0]

    value, gradient = jax.value_and_grad(padded)(log_p)
    expected, wanted = jax.value_and_grad(lambda x: objective.divergence(x, log_q)[0])(log_p)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


@pytest.mark.parametrize(("name", "kind", "sequences"), [("distill", "text", 0), ("gkd", "prompt", 8)])
def test_the_objective_of_the_settings(name: str, kind: RowKind, sequences: int):
    args = DistillationArgs(teacher="base", beta=0.5, temperature=2.0, loss_top_k=4, loss_add_tail=False)
    config = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", objective=name, distillation=args)
    made = make_objective(config)
    assert made == Distillation(
        row_kind=kind,
        sequences_per_row=sequences,
        beta=0.5,
        temperature=2.0,
        count_of_tokens=4,
        has_tail=False,
    )
    sampled = {"sampler_logps": TokenValue()} if kind == "prompt" else {}
    predicted = {"teacher_ids": TokenValue((4,), "int32"), "teacher_logps": TokenValue((5,))}
    assert token_values(made) == sampled | predicted
