"""The losses of rows from log-probabilities, against the formulas of the papers and of TRL in NumPy.

Slots: two rows of two pairs; the last pair is empty.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.objectives.cpo import CPO
from qlora_jax.objectives.dpo import DPO
from qlora_jax.objectives.kto import KTO
from qlora_jax.objectives.orpo import ORPO, ORPOOutputs, log_odds
from qlora_jax.objectives.pairs import PairObjective
from qlora_jax.objectives.sequences import SequenceLogps

PRESENT = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.float32)
LOGPS = np.array([[-5.0, -7.5, -2.0, -30.0], [-9.0, -4.0, 0, 0]], np.float32)
TOKENS = np.array([[3.0, 5.0, 4.0, 10.0], [6.0, 2.0, 0, 0]], np.float32)
REFERENCE = np.array([[-6.0, -6.5, -4.0, -25.0], [-9.5, -4.5, 0, 0]], np.float32)
OUTPUTS = SequenceLogps(jnp.asarray(LOGPS), jnp.asarray(TOKENS))
ARRAYS = {"present": jnp.asarray(PRESENT), "reference": jnp.asarray(REFERENCE)}
BATCH = ARRAYS | {
    "sequences": jnp.asarray([[0, 0, 0, 1, 1, 2], [0, 0, 1, 4, 4, 4]], jnp.int32),
    "weights": jnp.asarray([[1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0]], jnp.float32),
}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def by_pair(per_slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(chosen, rejected) of the three real pairs."""
    flat = per_slot.reshape(-1, 2)[:3].astype(np.float64)
    return flat[:, 0], flat[:, 1]


def loss_of(objective: PairObjective) -> float:
    """The mean over pairs, from the sums of rows."""
    losses = objective.row_losses(OUTPUTS, ARRAYS, objective.totals(BATCH))
    assert losses.shape == (2,)
    return float(jnp.sum(losses) / objective.count(BATCH))


def test_dpo_is_its_formula():
    chosen, rejected = by_pair(LOGPS - REFERENCE)
    assert loss_of(DPO(beta=0.4)) == pytest.approx(np.mean(-np.log(sigmoid(0.4 * (chosen - rejected)))), rel=1e-6)


def test_ipo_divides_by_tokens():
    chosen, rejected = by_pair((LOGPS - REFERENCE) / np.maximum(TOKENS, 1))
    expected = np.mean((chosen - rejected - 1 / 0.8) ** 2)
    assert loss_of(DPO(loss_type="ipo", beta=0.4)) == pytest.approx(expected, rel=1e-6)


def test_cpo_adds_the_mean_cross_entropy_of_chosen_tokens():
    """Chosen tokens are counted in the batch: those of even slots with weight 1, four here."""
    chosen, rejected = by_pair(LOGPS)
    expected = np.mean(-np.log(sigmoid(0.1 * (chosen - rejected)))) - 0.5 * chosen.sum() / 4
    assert loss_of(CPO(alpha=0.5)) == pytest.approx(expected, rel=1e-6)


def test_simpo_has_a_target_margin_and_means_per_token():
    chosen, rejected = by_pair(LOGPS / np.maximum(TOKENS, 1))
    expected = np.mean(-np.log(sigmoid(2.0 * (chosen - rejected) - 0.7)))
    assert loss_of(CPO(loss_type="simpo", beta=2.0, gamma=0.7, alpha=0.0)) == pytest.approx(expected, rel=1e-6)


def test_orpo_is_its_formula():
    p_chosen, p_rejected = (np.exp(p) for p in by_pair(LOGPS / np.maximum(TOKENS, 1)))
    ratio = np.log(p_chosen / (1 - p_chosen)) - np.log(p_rejected / (1 - p_rejected))
    outputs = ORPOOutputs(OUTPUTS.logps_BS, OUTPUTS.tokens_BS, jnp.asarray([11.0, 3.0]))
    losses = ORPO(beta=0.6).row_losses(outputs, ARRAYS, {"pairs": jnp.asarray(3.0), "tokens": jnp.asarray(20.0)})
    assert float(losses.sum() / 3) == pytest.approx(np.mean(-0.6 * np.log(sigmoid(ratio))) + 14 / 20, rel=1e-6)


def test_log_odds_are_exact_and_finite_for_every_probability():
    log_p = np.array([-80.0, -20.0, -1.0, -0.7, -0.6, -1e-3, -1e-6, 0.0], np.float32)
    found, slope = jax.vmap(jax.value_and_grad(log_odds))(jnp.asarray(log_p))
    exact = log_p[:-1].astype(np.float64)
    np.testing.assert_allclose(found[:-1], exact - np.log(-np.expm1(exact)), rtol=1e-6, atol=1e-7)
    assert np.isfinite(found).all() and np.isfinite(slope).all()


KTO_ARRAYS = ARRAYS | {"labels": jnp.asarray([[1, 1, 0, 0], [0, 0, 0, 0]], jnp.float32)}


def kto_loss(kto: KTO, arrays: dict[str, jax.Array] = KTO_ARRAYS) -> float:
    return float(jnp.sum(kto.row_losses(OUTPUTS, arrays, {})) / kto.count(arrays))


def test_kto_is_its_formula():
    own, other = by_pair(LOGPS - REFERENCE)
    arrays = KTO_ARRAYS | {"reference": KTO_ARRAYS["reference"].at[0, 1].set(-20.0)}
    other[0] = LOGPS[0, 1] + 20
    z = max(other.mean(), 0)
    assert z > 1
    losses = [2 * (1 - sigmoid(0.3 * (own[0] - z))), *(3 * (1 - sigmoid(0.3 * (z - own[1:]))))]
    found = kto_loss(KTO(beta=0.3, desirable_weight=2.0, undesirable_weight=3.0), arrays)
    assert found == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_divergence_is_not_negative():
    own, other = by_pair(LOGPS - REFERENCE)
    assert other.mean() < 0
    losses = [1 - sigmoid(0.1 * own[0]), *(1 - sigmoid(-0.1 * own[1:]))]
    assert kto_loss(KTO()) == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_divergence_has_no_gradient():
    arrays = KTO_ARRAYS | {"reference": jnp.asarray(LOGPS - 1)}

    def total(logps_BS: jax.Array) -> jax.Array:
        return jnp.sum(KTO().row_losses(SequenceLogps(logps_BS, OUTPUTS.tokens_BS), arrays, {}))

    by_slot = np.asarray(jax.grad(total)(OUTPUTS.logps_BS))
    assert (by_slot[:, 1::2] == 0).all() and (by_slot[PRESENT > 0].reshape(-1, 2)[:, 0] != 0).all()


def test_apo_zero_unpaired_compares_with_the_reference_alone():
    """One slot per answer."""
    ratios = (LOGPS - REFERENCE).ravel()[:6].astype(np.float64)
    labels = np.array([1, 1, 0, 0, 0, 0])
    losses = np.where(labels, 1 - sigmoid(0.5 * ratios), sigmoid(0.5 * ratios))
    assert kto_loss(KTO(loss_type="apo_zero_unpaired", beta=0.5)) == pytest.approx(losses.mean(), rel=1e-6)
