"""Divergences for distillation and their gradients, against plain sums over all logits and against TRL."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lm_head.generalized_jsd import generalized_jsd
from qlora_jax.nn.lm_head.head import Head
from qlora_jax.nn.lm_head.tiles import TILES, Tile
from tests.nn.gradients import check_vjp, random_array

M, D, E, V = 45, 24, 12, 100
SCRIPT = Path(__file__).parent.parent.parent / "oracle/trl_jsd.py"
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, "cpu", Tile(32, 32))


def arrays() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states and tables of a student and a teacher of another width, and the wanted tokens."""
    wanted = jnp.asarray(np.random.default_rng(0).random(M) < 0.6)
    hidden, table = random_array(M, D, seed=1) / 2, random_array(V, D, seed=2)
    return hidden, table, random_array(M, E, seed=3), random_array(V, E, seed=4), wanted


@pytest.mark.parametrize(("beta", "softcap"), [(0.0, None), (0.3, 3.0), (1.0, 3.0)])
def test_divergences_are_those_of_all_logits(beta: float, softcap: float | None):
    hidden, table, teacher_hidden, teacher_table, wanted = arrays()
    head, teacher = Head(table, random_array(V, seed=5), softcap), Head(teacher_table)

    def plain(hidden):
        log_p = jax.nn.log_softmax(head.logits(hidden) / 0.7)
        log_q = jax.nn.log_softmax(teacher.logits(teacher_hidden) / 0.7)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        log_m = jnp.log((1 - beta) * p + beta * q)
        found = beta * jnp.sum(q * (log_q - log_m), 1) + (1 - beta) * jnp.sum(p * (log_p - log_m), 1)
        limits = {0.0: jnp.sum(q * (log_q - log_p), 1), 1.0: jnp.sum(p * (log_p - log_q), 1)}
        return jnp.where(wanted, limits.get(beta, found), 0.0)

    def ours(hidden):
        return generalized_jsd(hidden, head, teacher_hidden, teacher, wanted, beta=beta, temperature=0.7)

    check_vjp(jax.jit(ours), plain, hidden)


def test_a_student_that_equals_its_teacher_does_not_diverge():
    hidden, table, *_ = arrays()
    everyone = jnp.ones(M, bool)

    def total(hidden):
        return jnp.sum(generalized_jsd(hidden, Head(table), jax.lax.stop_gradient(hidden), Head(table), everyone))

    value, gradient = jax.value_and_grad(total)(hidden)
    assert abs(value) < 1e-5 * M and np.abs(gradient).max() < 1e-5


@pytest.mark.slow
def test_divergences_equal_trl(oracle):
    hidden, table, teacher_hidden, teacher_table, wanted = arrays()
    names = ("hidden", "table", "teacher_hidden", "teacher_table", "wanted")
    inputs = {name: np.asarray(array) for name, array in zip(names, arrays(), strict=True)}
    found = oracle(SCRIPT, **inputs, betas=BETAS, temperature=1.5)
    for beta in BETAS:

        def loss(hidden, beta=beta):
            how = {"beta": beta, "temperature": 1.5}
            each = generalized_jsd(hidden, Head(table), teacher_hidden, Head(teacher_table), wanted, **how)
            return jnp.sum(each) / jnp.sum(wanted, dtype=jnp.float32)

        value, gradient = jax.value_and_grad(loss)(hidden)
        np.testing.assert_allclose(value, found[f"{beta}/loss"], rtol=1e-5)
        expected = found[f"{beta}/grad"]
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())
