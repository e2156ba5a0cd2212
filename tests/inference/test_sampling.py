"""The distribution of the next token equals that of transformers' logits processors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.inference.sampling import Sampling, choose, filter_logits, keep_top_k, keep_top_p

ORACLE = Path(__file__).parent.parent / "oracle/generate_filters.py"
SETTINGS = {
    "temperature": (0.7, 0, 1.0),
    "top_1": (1.0, 1, 1.0),
    "top_k": (1.0, 40, 1.0),
    "top_k_beyond_the_vocabulary": (1.0, 5000, 1.0),
    "top_p": (1.0, 0, 0.9),
    "top_p_small": (1.0, 0, 0.01),
    "all": (1.6, 100, 0.8),
    "all_cold": (0.2, 20, 0.95),
}


def test_kept_tokens_and_probabilities_equal_those_of_transformers(oracle):
    logits = np.random.default_rng(0).normal(0, 3, (16, 2000)).astype(np.float32)
    expected = oracle(ORACLE, logits=logits, settings=SETTINGS)
    for name, (temperature, top_k, top_p) in SETTINGS.items():
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        actual = np.asarray(jax.nn.softmax(filter_logits(jnp.array(logits), sampling), axis=-1))
        np.testing.assert_array_equal(actual > 0, expected[name] > 0, err_msg=name)
        np.testing.assert_allclose(actual, expected[name], rtol=2e-5, atol=1e-30, err_msg=name)


def test_equal_logits_stay_together():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(jnp.isfinite(keep_top_k(logits, 1)), [[False, True, True, False]])
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(logits, 0.1)), [[False, True, True, False]])


def test_draws_have_the_probabilities_of_the_filtered_logits():
    sampling = Sampling(temperature=0.8, top_k=4, top_p=0.95)
    logits = jnp.array([[0.0, 1.0, 2.0, 0.5, -1.0, 1.5]])
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(choose, static_argnums=2)(jnp.repeat(logits, count, axis=0), keys, sampling)
    shares = np.bincount(drawn, minlength=6) / count
    expected = np.asarray(jax.nn.softmax(filter_logits(logits, sampling), axis=-1))[0]
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / count**0.5)
    np.testing.assert_array_equal(shares > 0, expected > 0)


def test_greedy_takes_the_first_of_equals():
    keys = jax.random.split(jax.random.key(0), 2)
    assert choose(jnp.array([[1.0, 3.0, 3.0], [5.0, 3.0, 4.0]]), keys, Sampling()).tolist() == [1, 0]


def test_settings_out_of_bounds_are_told_all_at_once():
    with pytest.raises(ValueError, match=r"temperature: found -1.*top_k: found -1.*top_p: found 0"):
        Sampling(temperature=-1.0, top_k=-1, top_p=0.0)


def test_biases_and_penalties_out_of_bounds_are_told_all_at_once():
    expected = (
        r"min_p: found 2.*repetition_penalty: found 0.*presence_penalty: found nan.*frequency_penalty: found inf.*"
        r"found id -1, .*found 2 values for id 5; .*found inf for id 6"
    )
    with pytest.raises(ValueError, match=expected):
        Sampling(
            min_p=2.0,
            repetition_penalty=0.0,
            presence_penalty=float("nan"),
            frequency_penalty=float("inf"),
            logit_bias=((-1, 0.0), (5, 1.0), (5, 2.0), (6, float("inf"))),
        )
