"""The work and the memory of products with two narrow matrices, x A B, on projections, experts and routers.

Dimension key: M tokens, K in, N out, R rank, P slots of routed experts.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import F32, StepSizes, Work, within_layers
from qlora_jax.methods.expert_lora import parameter_shapes
from qlora_jax.methods.targets import parameter_ranks_and_scalings, ranks_and_scalings, target_layers, target_parameters
from qlora_jax.models.config import ROUTER, ModelConfig


class Ranked(NamedTuple):
    """An adapter: (N, K) of its weight, R, and its layers."""

    shape: tuple[int, int]
    rank: int
    layers: tuple[int, ...]


def ranked_projections(config: ModelConfig, spec: LoraArgs) -> dict[str, Ranked]:
    """Returns the adapter of each projection, by its name within a layer."""
    shapes, layers_of = config.linear_shapes(), within_layers(config, target_layers(config, spec))
    ranks = within_layers(config, ranks_and_scalings(config, spec))
    return {inner: Ranked(shapes[inner][0], rank, layers_of[inner]) for inner, (rank, _) in ranks.items()}


def ranked_parameters(config: ModelConfig, spec: LoraArgs) -> dict[str, Ranked]:
    """Returns the adapter of each parameter of experts and routers, by its name within a layer."""
    named, layers_of = parameter_shapes(config), target_parameters(config, spec)
    return {
        named[name][0]: Ranked(named[name][1], rank, layers_of[name])
        for name, (rank, _) in parameter_ranks_and_scalings(config, spec).items()
    }


def low_rank_work(
    sizes: StepSizes,
    projections: Mapping[str, Ranked],
    parameters: Mapping[str, Ranked],
    *,
    trains_a: bool = True,
    down: Collection[str] | None = None,
) -> Work:
    """Returns the work of x A, (x A) B, d(x A) = dy B^T, dB = (x A)^T dy, dx, and of dA if A trains.

    Args:
      down: the projections with a product x A of their own; None: all.
    """
    rows_of = dict.fromkeys(projections, sizes.rows) | {
        name: sizes.rows if name == ROUTER else _slots_in_chunks(sizes) for name in parameters
    }
    every = {**projections, **parameters}
    elements = {name: 2 * rows_of[name] * one.rank * len(one.layers) for name, one in every.items()}
    shapes = {name: one.shape for name, one in every.items()}
    downs = {*(projections if down is None else down), *parameters}
    x_a = sum(elements[name] * k for name, (_, k) in shapes.items() if name in downs)
    up = {name: elements[name] * n for name, (n, _) in shapes.items()}
    again = sum(flop for name, flop in up.items() if name not in sizes.not_recomputed)
    whole = sum(up.values())
    return Work("lora", x_a + whole, 2 * whole + (1 + trains_a) * x_a, x_a + again)


def saved_products(
    sizes: StepSizes, projections: Mapping[str, Ranked], parameters: Mapping[str, Ranked]
) -> dict[str, int]:
    """Returns the bytes of x A that a step saves: of experts it has all P slots, of routers it is f32."""
    of_projections = sum(sizes.itemsize * sizes.rows * one.rank * len(one.layers) for one in projections.values())
    of_parameters = sum(
        one.rank * len(one.layers) * (F32 * sizes.rows if name == ROUTER else sizes.itemsize * sizes.slots)
        for name, one in parameters.items()
    )
    return {"lora_xa": of_projections + of_parameters}


def _slots_in_chunks(sizes: StepSizes) -> int:
    """Returns the rows that adapters on experts multiply: P slots, in whole chunks of E tiles unless experts share."""
    tiles, rows = sizes.tiles
    together = 1 if sizes.lora.share_experts else sizes.tiles_together
    return -(-tiles // together) * together * rows
