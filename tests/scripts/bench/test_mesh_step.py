"""The comparison of a mesh of one device with no mesh: both calls compute the same gradients."""

import jax
import numpy as np
import pytest

from scripts.bench import mesh_step
from scripts.bench.support.random_model import make_random_model


@pytest.mark.exhaustive
@pytest.mark.slow
def test_both_calls_give_the_same_gradients():
    without, with_mesh = mesh_step.calls(str(make_random_model("random-15m")), 64, "float32")
    for a, b in zip(*(jax.tree.leaves(call()) for call in (without, with_mesh)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
