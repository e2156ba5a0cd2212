"""The Pareto front against the definition, over all points."""

import numpy as np

from qlora_jax.studies.statistics import pareto_front


def test_equals_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.integers(0, 6, size=(rng.integers(1, 9), 2))
        unbeaten = {
            index
            for index, point in enumerate(points)
            if not any((other <= point).all() and (other < point).any() for other in points)
        }
        front = pareto_front(points[:, 0].tolist(), points[:, 1].tolist())
        assert set(front) == unbeaten and len(front) == len(unbeaten)
        assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)
