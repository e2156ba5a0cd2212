"""Chooses the layers that stay in 16 bits under a byte budget: those whose costs in 4 bits add up to the most.

This is the 0-1 knapsack problem, which scipy's branch and bound solves exactly. It takes the sum of the layers' costs
for the cost of all of them together; the chosen set is therefore measured afterwards.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.config.sizes import format_bytes
from qlora_jax.evaluation.quantization_cost.measure import LayerCost
from qlora_jax.models.precision import Kept

SECONDS = 60  # for the search; a solution that is not proven to be the best states its gap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The layers that stay in 16 bits.

    Attributes:
      saved: the sum of their costs, in nats per token.
      gap: the most by which another choice could save more; 0 if it is the best.
      added_bytes: bytes that they add.
    """

    costs: tuple[LayerCost, ...]
    saved: float
    gap: float
    added_bytes: int

    @property
    def kept(self) -> Kept:
        """The layers in the form of `WeightFormat.dense`, with projections in the order of their largest cost."""
        layers: dict[str, list[int]] = {}
        for cost in self.costs:
            name, row = cost.place
            layers.setdefault(name, []).append(row)
        return tuple((name, tuple(sorted(found))) for name, found in layers.items())


def choose_layers(costs: Sequence[LayerCost], spare: int) -> Choice:
    """Returns the layers with the largest sum of costs whose added bytes fit in `spare`.

    Layers that cost nothing, or that lower the loss in 4 bits, are never chosen.
    """
    useful = [cost for cost in costs if cost.increase > 0 and cost.added_bytes <= spare]
    if sum(cost.added_bytes for cost in useful) <= spare:
        return _choice(useful, 0.0)
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes as long to import as JAX

    values, sizes = np.array([[cost.increase, cost.added_bytes] for cost in useful], np.float64).T
    unit = values.max()  # the solver's tolerances are absolute
    found = milp(
        -values / unit * 1e6,
        integrality=np.ones(len(useful)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(sizes[None] / spare, ub=1.0),
        options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
    )
    assert found.x is not None, found.message  # keeping nothing is always possible
    chosen = [cost for cost, share in zip(useful, found.x, strict=True) if share > 0.5]
    chosen = _within(chosen, spare)
    return _choice(chosen, max(0.0, -found.mip_dual_bound * unit / 1e6 - sum(cost.increase for cost in chosen)))


def spare_bytes(budget: int, base_bytes: int) -> int:
    """Returns the bytes of a budget that a base in 4 bits leaves.

    Raises:
      ValueError: the base in 4 bits is larger than the budget.
    """
    if base_bytes > budget:
        raise ValueError(
            f"budget: found {format_bytes(budget)}, but the base with all layers in 4 bits has "
            f"{format_bytes(base_bytes)}. Set at least that"
        )
    return budget - base_bytes


def _within(chosen: list[LayerCost], spare: int) -> list[LayerCost]:
    """Returns the layers without the cheapest, if the solver's tolerance let a few bytes too many pass."""
    while sum(cost.added_bytes for cost in chosen) > spare:
        chosen = sorted(chosen, key=lambda cost: -cost.increase)[:-1]
    return chosen


def _choice(chosen: Sequence[LayerCost], gap: float) -> Choice:
    return Choice(
        costs=tuple(sorted(chosen, key=lambda cost: -cost.increase)),
        saved=sum(cost.increase for cost in chosen),
        gap=gap if gap > 1e-9 else 0.0,
        added_bytes=sum(cost.added_bytes for cost in chosen),
    )
