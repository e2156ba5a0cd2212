"""The choice of layers under a byte budget, against all subsets."""

import itertools

import numpy as np
import pytest

from qlora_jax.evaluation.quantization_cost.choose import choose_layers, spare_bytes
from qlora_jax.evaluation.quantization_cost.measure import LayerCost


def layer(index: int, increase: float, added: int) -> LayerCost:
    ends = increase - 1.0, increase + 1.0
    return LayerCost(place=("mlp.up_proj", index), name=str(index), increase=increase, interval=ends, added_bytes=added)


@pytest.mark.parametrize("seed", range(8))
def test_no_subset_saves_more(seed):
    rng = np.random.default_rng(seed)
    # As of projections: few sizes that do not divide each other, and costs of a small fraction of a nat.
    sizes = rng.choice([1_536_004, 512_004, 1_000_003, 307], 11)
    costs = [layer(i, float(rng.normal(2e-4, 3e-4)), int(size)) for i, size in enumerate(sizes)]
    spare = int(rng.uniform(0.1, 0.7) * sizes.sum())
    choice = choose_layers(costs, spare)
    subsets = (each for count in range(12) for each in itertools.combinations(costs, count))
    fitting = (each for each in subsets if sum(one.added_bytes for one in each) <= spare)
    best = max(sum(one.increase for one in each) for each in fitting)
    assert choice.saved == pytest.approx(best, rel=1e-12) and choice.gap == 0
    assert choice.added_bytes == sum(one.added_bytes for one in choice.costs) <= spare


def test_the_limits_of_a_budget():
    costs = [layer(0, 0.5, 100), layer(1, -0.1, 1), layer(3, 0.2, 50), layer(2, 0.3, 50)]
    everything = choose_layers(costs, 10_000)
    assert [cost.place[1] for cost in everything.costs] == [0, 2, 3]  # never one that 4 bits improve
    assert everything.kept == (("mlp.up_proj", (0, 2, 3)),)
    # Two layers that fill the budget to the byte save as much as one; a byte less leaves one.
    assert choose_layers(costs, 100).saved == pytest.approx(0.5)
    assert choose_layers(costs, 99).saved == pytest.approx(0.3)
    assert choose_layers(costs, 0).costs == ()
    assert spare_bytes(1000, 900) == 100
    with pytest.raises(ValueError, match=r"budget: found 1000 B, but the base .* has 1\.00 KiB"):
        spare_bytes(1000, 1024)
