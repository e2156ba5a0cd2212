"""Metrics of policy gradients against loops over replies in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.objectives.policy_gradient import PolicyGradient, PolicyOutputs
from qlora_jax.training.metrics.step_metrics import step_metrics

A, B, REPLIES, LENGTH = 2, 3, 2, 5
SHAPE = (A, B, REPLIES * LENGTH + 2)  # a trunk of one position, the replies, one of padding


def random_step(seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns log p, entropies, and the arrays of a batch with a masked reply and a gap."""
    rng = np.random.default_rng(seed)
    sequences = np.full(SHAPE, REPLIES, np.int32)
    weights = np.zeros(SHAPE, np.float32)
    present = np.ones((A, B, REPLIES), np.float32)
    present[1, 2] = 0
    for micro, row, reply in np.ndindex(A, B, REPLIES):
        begin = 1 + reply * LENGTH
        sequences[micro, row, begin : begin + LENGTH] = reply
        weights[micro, row, begin : begin + rng.integers(1, LENGTH + 1)] = present[micro, row, reply]
    weights[0, 1, 1 : 1 + LENGTH] = 0
    logps = np.where(weights > 0, -rng.uniform(0.1, 3, SHAPE), 0).astype(np.float32)
    drawn = {
        name: rng.normal(0, 0.5, SHAPE).astype(np.float32) for name in ("old_logps", "reference_logps", "sampler_logps")
    }
    arrays = {"sequences": sequences, "weights": weights, "present": present} | {
        name: logps + gap for name, gap in drawn.items()
    }
    arrays["advantages"] = rng.normal(size=present.shape).astype(np.float32)
    arrays["token_scale"] = present
    return logps, np.where(weights > 0, rng.uniform(0, 2, SHAPE), 0).astype(np.float32), arrays


def outputs_of(logps: np.ndarray, entropies: np.ndarray) -> PolicyOutputs:
    return PolicyOutputs(jnp.asarray(logps), jnp.asarray(entropies))


def by_hand(
    objective: PolicyGradient, logps: np.ndarray, arrays: dict[str, np.ndarray]
) -> tuple[list, list, list, list]:
    """Returns (clipped below, clipped above) of each token in a list per reply, divergences and gaps of tokens."""
    low, high, kl, gaps = [], [], [], []
    for micro, row, reply in np.ndindex(A, B, REPLIES):
        if not arrays["present"][micro, row, reply]:
            continue
        own = (arrays["sequences"][micro, row] == reply) & (arrays["weights"][micro, row] > 0)
        ours, old, reference, sampler = (
            each[micro, row, own].astype(np.float64)
            for each in (logps, arrays["old_logps"], arrays["reference_logps"], arrays["sampler_logps"])
        )
        gap = (
            ours - old
            if objective.level == "token"
            else np.full(max(len(ours), 1), (ours - old).mean() if len(ours) else 0.0)
        )
        ratios, advantage = np.exp(gap), arrays["advantages"][micro, row, reply]
        low.append((ratios < 1 - objective.epsilon) & (advantage < 0))
        high.append((ratios > 1 + objective.epsilon_high) & (advantage > 0))
        kl += ((np.exp(reference - ours) - (reference - ours) - 1) * ratios[: len(ours)]).tolist()
        gaps += np.abs(old - sampler).tolist()
    return low, high, kl, gaps


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics_by_hand(level):
    objective = PolicyGradient(
        sequences_per_row=REPLIES, level=level, epsilon=0.1, epsilon_high=0.05, beta=0.1, stored_old=True
    )
    logps, entropies, arrays = random_step(0)
    low, high, kl, gaps = by_hand(objective, logps, arrays)
    found = step_metrics(objective, outputs_of(logps, entropies), arrays)
    both = [np.array(one) | np.array(other) for one, other in zip(low, high, strict=True)]
    flat = {"low": low, "high": high, "region": both}
    if level == "sequence":
        flat = {name: [np.array([one[0]]) for one in values] for name, values in flat.items()}
    expected = {f"clip_ratio_{name}_mean": np.concatenate(values).mean() for name, values in flat.items()}
    expected |= {
        "entropy": entropies[arrays["weights"] > 0].mean(),
        "kl": np.mean(kl),
        "clip_ratio_low_min": min(np.mean(one) for one in flat["low"] if len(one)),
        "clip_ratio_high_max": max(np.mean(one) for one in flat["high"] if len(one)),
        "sampling_logp_difference_mean": np.mean(gaps),
        "sampling_logp_difference_max": np.max(gaps),
    }
    assert found.keys() == expected.keys() and min(expected[f"clip_ratio_{name}_mean"] for name in ("low", "high")) > 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_without_stored_probabilities_the_gap_is_that_of_the_new_ones():
    objective = PolicyGradient(sequences_per_row=REPLIES, loss="cispo", epsilon_high=5.0)
    logps, entropies, arrays = random_step(1)
    found = step_metrics(objective, outputs_of(logps, entropies), arrays)
    gaps = np.abs(logps - arrays["sampler_logps"])[arrays["weights"] > 0]
    assert found["cispo_clip_ratio"] == 0.0
    np.testing.assert_allclose(found["sampling_logp_difference_max"], gaps.max(), rtol=1e-6)


def test_a_step_whose_replies_are_all_masked_has_no_metrics():
    logps, entropies, arrays = random_step(2)
    arrays["weights"][:] = 0
    objective = PolicyGradient(sequences_per_row=REPLIES)
    assert step_metrics(objective, outputs_of(np.zeros_like(logps), entropies), arrays) == {}
