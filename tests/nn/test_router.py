"""Routing against a loop over tokens, ties included, and the gradient of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.router import SIGMOID, SOFTMAX, SOFTMAX_OF_CHOSEN, RoutingRule, route, routing_sums

TOKENS, EXPERTS = 33, 8
RULES = {
    "softmax": RoutingRule(per_token=3),
    "normalized": RoutingRule(per_token=3, normalize=True, scale=2.5),
    "of chosen": RoutingRule(per_token=3, score=SOFTMAX_OF_CHOSEN),
    "sigmoid": RoutingRule(per_token=2, score=SIGMOID, normalize=True, scale=1.7),
    "groups": RoutingRule(per_token=3, score=SIGMOID, groups=4, groups_per_token=2),
    "all": RoutingRule(per_token=EXPERTS, normalize=True),
}


route_compiled = jax.jit(route, static_argnums=1)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def best(values: np.ndarray, count: int) -> list[int]:
    """Returns the places of the largest values in descending order; of equal ones the first come first."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]


def routed(logits_E: np.ndarray, rule: RoutingRule, bias_E: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Returns the choice and the weights of one token."""
    scores_E = 1 / (1 + np.exp(-logits_E)) if rule.score == SIGMOID else softmax(logits_E)
    ranked_E = (logits_E if rule.score == SOFTMAX_OF_CHOSEN else scores_E) + bias_E
    groups = ranked_E.reshape(rule.groups, -1)
    chosen_groups = best(np.array([sum(sorted(group)[-2:]) for group in groups]), rule.groups_per_token)
    allowed_E = np.repeat([group in chosen_groups for group in range(rule.groups)], groups.shape[1])
    experts = best(np.where(allowed_E, ranked_E, -np.inf), rule.per_token)
    weights = softmax(logits_E[experts]) if rule.score == SOFTMAX_OF_CHOSEN else scores_E[experts]
    return experts, rule.scale * (weights / weights.sum() if rule.normalize else weights)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_choices_and_weights_equal_those_of_a_loop(name, ties):
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, (TOKENS, EXPERTS)) if ties else rng.standard_normal((TOKENS, EXPERTS))
    logits, bias = logits.astype("f4"), (rng.integers(0, 2, EXPERTS) if ties else rng.standard_normal(EXPERTS))
    experts, weights = route_compiled(jnp.asarray(logits), RULES[name], jnp.asarray(bias, jnp.float32))
    expected = [routed(row, RULES[name], bias.astype("f4")) for row in logits]
    np.testing.assert_array_equal(experts, [chosen for chosen, _ in expected])
    np.testing.assert_allclose(weights, [values for _, values in expected], rtol=1e-5)


def test_the_bias_of_the_choice_has_no_part_in_the_gradient():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS, EXPERTS)), jnp.float32)
    rule, bias = RULES["groups"], jnp.linspace(0, 1, EXPERTS)
    weight_E = jnp.arange(1.0, EXPERTS + 1)

    def loss(logits, bias):
        experts, weights = route(logits, rule, bias)
        return (weights * weight_E[experts]).sum()

    by_logits, by_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, bias)
    assert not by_bias.any()
    experts = np.asarray(route_compiled(logits, rule, bias)[0])
    chosen = (experts[:, :, None] == np.arange(EXPERTS)).any(axis=1)
    sigmoid = 1 / (1 + np.exp(-np.asarray(logits)))
    np.testing.assert_allclose(by_logits, chosen * sigmoid * (1 - sigmoid) * np.asarray(weight_E), rtol=1e-4)


@pytest.mark.parametrize("score", [SOFTMAX, SIGMOID])
def test_sums_of_a_row_leave_padding_out(score):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 5, EXPERTS)).astype("f4")
    counted = np.ones((2, 5), "f4")
    counted[1, 2:] = 0
    experts = np.argsort(-logits.reshape(10, -1), axis=1)[:, :2].astype("i4")
    sums = jax.jit(routing_sums, static_argnums=2)
    counts, probs, z = sums(jnp.asarray(logits.reshape(10, -1)), jnp.asarray(experts), score, jnp.asarray(counted))
    for row, tokens in ((0, 5), (1, 2)):
        each = logits[row, :tokens]
        scores = 1 / (1 + np.exp(-each)) if score == SIGMOID else np.stack([softmax(token) for token in each])
        np.testing.assert_allclose(probs[row], scores.sum(axis=0), rtol=1e-5)
        np.testing.assert_allclose(z[row], (np.log(np.exp(each).sum(axis=1)) ** 2).sum(), rtol=1e-5)
        chosen = experts.reshape(2, 5, 2)[row, :tokens].reshape(-1)
        np.testing.assert_array_equal(counts[row], np.bincount(chosen, minlength=EXPERTS))
