"""Measures as the flat numbers of a record, and back."""

import json
import math

import numpy as np

from qlora_jax.measures.metrics import Metric, perplexity, share
from qlora_jax.measures.statistics import wilson_interval
from qlora_jax.training.metrics.record_summaries import loss_interval, task_metrics
from qlora_jax.training.metrics.step_metrics import eval_loss_metrics, flatten_metrics
from qlora_jax.training.metrics.trackers import scalars


def test_measures_there_and_back():
    right = np.array([True, False, False, True])
    found = flatten_metrics(
        "choices", [share("right by likelihood per token", right), Metric("ties (counted as wrong)", "count", 3)]
    )
    low, high = wilson_interval(2, 4)
    name = "choices_right_by_likelihood_per_token"
    assert found == {name: 0.5, f"{name}_low": low, f"{name}_high": high, "choices_ties": 3}
    record = json.loads(json.dumps({"step": 3, "eval_loss": 1.0} | found))
    assert task_metrics(record, "choices") == [(name, "right by likelihood per token", 0.5, low, high)]
    assert task_metrics(record, "letters") == []
    assert scalars(record) == {"eval_loss": 1.0} | found  # trackers draw all of them


def test_perplexity_is_the_exponential_also_where_that_is_too_much():
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))


def test_held_out_loss_has_the_interval_of_the_normal_approximation():
    """The delta method for a ratio of sums gives 1.96 sqrt(sum of (nll - loss tokens)^2) / (sum of tokens)."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 200, size=400)
    nll = tokens * rng.normal(2.0, 0.5, size=400)
    found = eval_loss_metrics(nll, tokens)
    loss = nll.sum() / tokens.sum()
    half = 1.96 * np.sqrt(np.sum((nll - loss * tokens) ** 2)) / tokens.sum()
    low, high = loss_interval(found) or (0, 0)
    assert found["eval_loss"] == loss and found["eval_tokens"] == tokens.sum()
    np.testing.assert_allclose([low, high], [loss - half, loss + half], atol=0.1 * half)


def test_a_loss_that_is_not_finite_has_no_interval():
    for broken in (math.inf, math.nan):
        found = eval_loss_metrics(np.array([1.0, broken]), np.array([1, 1]))
        assert not math.isfinite(found["eval_loss"]) and loss_interval(found) is None
