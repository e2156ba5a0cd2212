"""Measures as the flat numbers of a record, and back."""

import json
import math

import numpy as np

from qlora_jax.inference.measures import Measure, share
from qlora_jax.inference.statistics import wilson_interval
from qlora_jax.training.figures import figures, perplexity, shares
from qlora_jax.training.trackers import numbers


def test_measures_there_and_back():
    right = np.array([True, False, False, True])
    found = figures(
        "choices", [share("right by likelihood a token", right), Measure("ties (counted as wrong)", "count", 3)]
    )
    low, high = wilson_interval(2, 4)
    name = "choices_right_by_likelihood_a_token"
    assert found == {name: 0.5, f"{name}_low": low, f"{name}_high": high, "choices_ties": 3}
    record = json.loads(json.dumps({"step": 3, "eval_loss": 1.0} | found))
    assert shares(record, "choices") == [(name, "right by likelihood a token", 0.5, low, high)]
    assert shares(record, "letters") == []
    assert numbers(record) == {"eval_loss": 1.0} | found  # trackers draw all of them


def test_perplexity_is_the_exponential_also_where_that_is_too_much():
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))
