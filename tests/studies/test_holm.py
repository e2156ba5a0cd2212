"""Holm's correction against statsmodels."""

import numpy as np
import pytest

from qlora_jax.studies.statistics import holm


@pytest.mark.slow
def test_equals_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 45):
        p = rng.uniform(size=size) ** 3
        p[: size // 3] = p[0]  # ties
        np.testing.assert_allclose(holm(p.tolist()), multitest.multipletests(p, method="holm")[1], rtol=1e-12)


def test_a_worked_example():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
