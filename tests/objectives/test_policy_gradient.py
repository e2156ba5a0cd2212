"""Losses of tokens and their gradients by hand, from the equations in f64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.objectives.objective import read_by_losses, read_by_outputs, token_values
from qlora_jax.objectives.policy_gradient import PolicyGradient, PolicyOutputs
from qlora_jax.objectives.router_losses import Routed
from qlora_jax.training.step_spec import abstract_batch

# One row: a trunk, three tokens of reply 0, two of reply 1, one of the masked reply 2, padding.
SEQUENCES = np.array([[3, 0, 0, 0, 1, 1, 2, 3]], np.int32)
WEIGHTS = np.array([[0, 1, 1, 1, 1, 1, 0, 0]], np.float32)
P = np.array([0.5, 0.5, 0.2, 0.9, 0.4, 0.3, 0.5, 0.5])
OLD = np.array([0.1, 0.25, 0.25, 0.85, 0.38, 0.9, 0.1, 0.1])
REFERENCE = np.array([0.1, 0.4, 0.4, 0.5, 0.4, 0.2, 0.1, 0.1])
SAMPLER = np.array([0.1, 0.2, 0.24, 0.9, 0.36, 0.5, 0.1, 0.1])
ADVANTAGES, SCALES = [1.5, -0.5, 2.0], [0.3, 0.7, 0.2]
REPLIES = {0: [1, 2, 3], 1: [4, 5]}

OBJECTIVES = [
    PolicyGradient(sequences_per_row=3, stored_old=True),
    PolicyGradient(sequences_per_row=3, stored_old=True, epsilon_high=0.05, delta=1.6),
    PolicyGradient(sequences_per_row=3, stored_old=True, level="sequence", beta=0.3, epsilon=0.1),
    PolicyGradient(sequences_per_row=3, stored_old=True, beta=0.3, bias_corrected_kl=False),
    PolicyGradient(sequences_per_row=3, stored_old=True, loss="cispo", epsilon_high=1.2, beta=0.1),
    PolicyGradient(sequences_per_row=3, stored_old=True, correction="token_truncate", correction_max=1.1),
    PolicyGradient(sequences_per_row=3, stored_old=True, correction="sequence_mask", correction_max=1.25, beta=0.1),
    PolicyGradient(sequences_per_row=3, beta=0.2),
]


def arrays(objective: PolicyGradient) -> dict[str, np.ndarray]:
    found = {"sequences": SEQUENCES, "weights": WEIGHTS, "present": np.ones((1, 3), np.float32)}
    found |= {"advantages": np.array([ADVANTAGES], np.float32), "token_scale": np.array([SCALES], np.float32)}
    of_tokens = {"old_logps": OLD, "reference_logps": REFERENCE, "sampler_logps": SAMPLER}
    found |= {name: np.log(of_tokens[name])[None].astype(np.float32) for name in objective.token_values}
    assert {*found} == {*read_by_losses(objective)}
    return found


def by_hand(of: PolicyGradient, logps: np.ndarray, fixed: np.ndarray) -> float:
    """The row's loss; `fixed` are the log-probabilities in parts without gradient."""
    total, old = 0.0, np.log(OLD) if of.stored_old else fixed
    for reply, tokens in REPLIES.items():
        gap = float(np.mean(logps[tokens] - old[tokens]))
        drift = float(np.sum(old[tokens] - np.log(SAMPLER[tokens])))
        for token in tokens:
            ratio = math.exp(gap if of.level == "sequence" else logps[token] - old[token])
            advantage = ADVANTAGES[reply]
            if of.loss == "cispo":
                loss = -min(math.exp(fixed[token] - old[token]), of.epsilon_high) * advantage * logps[token]
            else:
                clipped = min(max(ratio, 1 - of.epsilon), 1 + of.epsilon_high)
                loss = -min(min(ratio, of.delta or math.inf) * advantage, clipped * advantage)
            if of.correction == "token_truncate":
                loss *= min(math.exp(old[token] - math.log(SAMPLER[token])), of.correction_max)
            if of.correction == "sequence_mask":
                loss *= math.exp(drift) if math.exp(drift) <= of.correction_max else 0.0
            if of.beta:
                below = math.log(REFERENCE[token]) - logps[token]
                loss += of.beta * (math.exp(below) - below - 1) * (ratio if of.bias_corrected_kl else 1)
            total += SCALES[reply] * loss
    return total


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_losses_and_gradients_by_hand(objective: PolicyGradient):
    given = {name: jnp.asarray(array) for name, array in arrays(objective).items()}
    logps = np.where(WEIGHTS[0] > 0, np.log(P), 0.0)  # 0 where nothing is scored

    def row_loss(logps_BT: jax.Array) -> jax.Array:
        return jnp.sum(objective.row_losses(PolicyOutputs(logps_BT, jnp.zeros_like(logps_BT)), given, {}))

    loss, gradient = jax.value_and_grad(row_loss)(jnp.asarray(logps[None], jnp.float32))
    np.testing.assert_allclose(loss, by_hand(objective, logps, logps), rtol=2e-6)
    for token, step in enumerate(1e-6 * np.eye(len(logps))):
        numeric = (by_hand(objective, logps + step, logps) - by_hand(objective, logps - step, logps)) / 2e-6
        np.testing.assert_allclose(gradient[0, token], numeric, rtol=1e-5, atol=1e-6)


def test_the_first_iteration_is_reinforce():
    """The ratio is 1 to the bit if old = new, and the gradient is that of -A log p."""
    objective = PolicyGradient(sequences_per_row=3)
    given = {name: jnp.asarray(array) for name, array in arrays(objective).items()}
    outputs = PolicyOutputs(jnp.log(jnp.asarray(P, jnp.float32))[None], jnp.zeros((1, 8)))
    assert (objective.token_terms(outputs, given).ratios_BT == 1).all()
    gradient = jax.grad(lambda x: jnp.sum(objective.row_losses(PolicyOutputs(x, x), given, {})))(outputs.logps_BT)
    expected = [-SCALES[reply] * ADVANTAGES[reply] for reply in REPLIES for _ in REPLIES[reply]]
    np.testing.assert_allclose(gradient[0, 1:6], expected, rtol=1e-6)
    assert (gradient[0, [0, 6, 7]] == 0).all()


def test_batches_have_arrays_of_tokens():
    objective = Routed(objective=PolicyGradient(sequences_per_row=3, stored_old=True, beta=0.1), aux_loss_coef=0.1)
    names = ("old_logps", "reference_logps", "sampler_logps")
    batch = abstract_batch((2, 4, 64), objective, packed=True, branching=True)
    assert tuple(token_values(objective)) == names
    assert all(batch[name].shape == (2, 4, 64) and batch[name].dtype == jnp.float32 for name in names)
    assert batch["advantages"].shape == batch["token_scale"].shape == (2, 4, 15)
    assert not {*names, "advantages", "token_scale"} & {*read_by_outputs(batch, objective)}
    assert {*read_by_losses(dataclasses.replace(objective, aux_loss_coef=0.0))} == {
        *("present", "advantages", "token_scale", "weights", "sequences", *names)
    }
