"""Adapters of several runs on one projection, of which each token has one or none.

Dimension key: M tokens, K in, N out, A adapters.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.nn.linear import BatchedAdapter, FrozenLayer, LinearAdapter
from qlora_jax.nn.variables import Frozen, TrainedLeaf


class RequestAdapters(LinearAdapter):
    """The adapters of one projection, a `BatchedAdapter` per method; for inference only.

    A token that a method's adapters leave alone gets the bits that it would get without them.

    Args:
      own_M: number of each token's adapter; 0: none. A call sets it.
    """

    LEAVES: ClassVar[tuple[TrainedLeaf, ...]] = ()

    def __init__(self, batched: Sequence[BatchedAdapter], own_M: Int[Array, " M"]):
        self.batched = nnx.List(batched)
        self.own = Frozen(own_M)

    @staticmethod
    def apply(
        adapters: "Sequence[RequestAdapters]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns each layer's result."""
        return [adapter._applied(x_MK, one) for adapter, one in zip(adapters, frozen, strict=True)]

    def _applied(self, x_MK: jax.Array, frozen: FrozenLayer) -> jax.Array:
        own_M, scaled_MK = self.own[...], x_MK
        for each in self.batched:
            scaled_MK = each.on_input(scaled_MK, frozen.layer, own_M)
        y_MN = frozen.product(scaled_MK)
        for each in self.batched:
            y_MN = each.on_product(y_MN, x_MK, frozen.layer, own_M)
        y_MN = frozen.biased(y_MN)
        for each in self.batched:
            y_MN = each.on_result(y_MN, x_MK, frozen.layer, own_M)
        return y_MN

    def select_layer(self, layer: int) -> "RequestAdapters":
        """Raises TypeError: they are not merged."""
        raise TypeError("adapters of several runs have no single layer")

    def merge(self, weight: jax.Array) -> jax.Array:
        """Raises TypeError: they are not merged."""
        raise TypeError("adapters of several runs are not merged")


def set_own(model: nnx.Module, own_M: Int[Array, " M"]) -> None:
    """Sets the number of each token's adapter in all projections, in place."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, RequestAdapters):
            node.own = Frozen(own_M)
