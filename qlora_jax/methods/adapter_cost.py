"""Terms in which a method states the work and the memory that it adds to a training step.

Dimension key: M tokens of a micro-batch, L layers, P slots (rows of grouped experts), D embed.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

from qlora_jax.config import LoraArgs
from qlora_jax.models.config import ModelConfig

F32 = 4

type LayersOf = Mapping[str, tuple[int, ...]]  # layers by a module's name within a layer, such as `mlp.down_proj`

NOWHERE: LayersOf = MappingProxyType({})
ONCE: Mapping[str, int] = MappingProxyType({})


class AdapterShape(NamedTuple):
    """The facts about adapters from which the model's own work and memory follow; modules by name within a layer.

    Fields:
      layers: those with an adapter, of adapters that may be in some layers only; the backward pass ends at the first.
      reads: layers in which the backward pass needs the module's input.
      scaled: modules whose results a trained vector multiplies, so that they are kept or computed again.
      wraps: "self_attn" or "mlp" with an adapter behind it.
      products: number of products of all tokens with the frozen weight, if it is not 1.
      rereads: modules whose weight a forward pass reads once more.
    """

    layers: LayersOf = NOWHERE
    reads: LayersOf = NOWHERE
    scaled: frozenset[str] = frozenset()
    wraps: frozenset[str] = frozenset()
    products: Mapping[str, int] = ONCE
    rereads: frozenset[str] = frozenset()


class Work(NamedTuple):
    """FLOP of a micro-batch over all layers, in a named scope of the program.

    Fields:
      again: recomputed with the remat policies that recompute products.
      rebuild: recomputed with every policy.
      per_micro_batch: the work does not grow with the tokens.
    """

    scope: str
    forward: int
    backward: int = 0
    again: int = 0
    rebuild: int = 0
    per_micro_batch: bool = False


@runtime_checkable
class StepSizes(Protocol):
    """The sizes of a training step from which a method computes its work."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def lora(self) -> LoraArgs: ...
    @property
    def rows(self) -> int: ...  # M
    @property
    def itemsize(self) -> int: ...  # bytes per activation
    @property
    def slots(self) -> int: ...  # P
    @property
    def tiles(self) -> tuple[int, int]: ...  # tiles of grouped experts, and their rows
    @property
    def tiles_together(self) -> int: ...  # tiles whose adapter products are computed together
    @property
    def backward_layers(self) -> int: ...  # layers that the backward pass visits
    @property
    def not_recomputed(self) -> tuple[str, ...]: ...  # projections whose results the backward pass does not need

    def shapes(self) -> Iterator[tuple[str, tuple[int, int]]]: ...  # (name, (N, K)) of each projection
    def layers(self, name: str, first: int = 0) -> int: ...  # number of layers from `first` on that have a module


def every_layer(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns all layers of the model for each module."""
    return dict.fromkeys(names, tuple(range(config.num_layers)))


def within_layers[Value](config: ModelConfig, by_name: Mapping[str, Value]) -> dict[str, Value]:
    """Returns values of projections by their names within a layer, in the model's order.

    Args:
      by_name: by Hugging Face's names; other modules are left out.
    """
    names = {inner: config.hugging_face_name(f"model.layers.{inner}") for inner in config.linear_shapes()}
    return {inner: by_name[name] for inner, name in names.items() if name in by_name}


def names_within_layers(config: ModelConfig, names: Collection[str]) -> list[str]:
    """Returns Hugging Face's names of projections as names within a layer, in the model's order."""
    return [*within_layers(config, dict.fromkeys(names))]
