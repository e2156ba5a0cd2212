"""Advantages by hand, and scales of losses against the means that the loss types define."""

import numpy as np
import pytest

from qlora_jax.config.policy import PolicyLossType
from qlora_jax.rollouts.advantages import group_advantages, token_scale

NAN = float("nan")


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, NAN], [NAN, NAN], [5.0, 1.0], [6.0, 0.0]])
    found = group_advantages(rewards, num_generations=3)
    np.testing.assert_array_equal(found.rewards_N, [1, 3, 2, NAN, 6, 6])
    np.testing.assert_allclose(found.advantages_N, [-1 / 1.0001, 1 / 1.0001, 0, 0, 0, 0])
    assert found.has_signal_P.tolist() == [True, False]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [-0.5, 0.5, 2.5, -2.5]),
        ("batch", [value / (np.std([0, 1, 7, 2], ddof=1) + 1e-4) for value in (-0.5, 0.5, 2.5, -2.5)]),
    ],
)
def test_weights_and_scales(scale, expected: list[float]):
    rewards = np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 2.0], [2.0, 0.0]])
    weights = np.array([1.0, 2.0])
    found = group_advantages(rewards, num_generations=2, scale_rewards=scale, weights_F=weights)
    np.testing.assert_allclose(found.advantages_N, expected)


def test_equal_rewards_teach_exactly_nothing():
    """The mean of three times 0.1 is not 0.1 in floating point."""
    found = group_advantages(np.full((6, 1), 0.1), num_generations=3, scale_rewards="batch")
    assert not found.has_signal_P.any() and (found.advantages_N == 0).all()


# A length of 0 is that of a masked reply, or of a gap.
LENGTHS = np.array([[[4, 2, 0, 6], [1, 3, 5, 0]], [[2, 2, 2, 2], [7, 1, 0, 0]]])
IS_REPLY = np.array([[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]], bool)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_scales_make_the_mean_of_each_loss_type(loss_type: PolicyLossType):
    """Steps of one rollout phase share the divisor of dapo and cispo."""
    rng = np.random.default_rng(0)
    sums = np.where(LENGTHS > 0, rng.normal(size=LENGTHS.shape), 0.0)
    scales = token_scale(loss_type, LENGTHS, IS_REPLY, max_completion_length=10)
    assert (scales[~IS_REPLY] == 0).all()
    for step, (lengths, own) in enumerate(zip(LENGTHS, sums, strict=True)):
        replies = IS_REPLY[step].sum()
        expected = {
            "grpo": (own / np.maximum(lengths, 1)).sum() / replies,
            "bnpo": np.mean([micro.sum() / size.sum() for micro, size in zip(own, lengths, strict=True)]),
            "dr_grpo": own.sum() / (replies * 10),
        }.get(loss_type, own.sum() / (LENGTHS.sum() / 2))
        np.testing.assert_allclose((scales[step] * own).sum() / replies, expected, rtol=1e-12)
