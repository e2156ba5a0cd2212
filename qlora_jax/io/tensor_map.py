"""Which tensors on disk belong to which leaf of a model: the loader's way in, and the export's way out."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.model_source import ModelSource
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.mixed_stack import MixedStack

LAYER = re.compile(r"\.layers\.(\d+)\.")


def layer_name(stacked: str, layer: int) -> str:
    """("model.layers.mlp.up_proj.weight", 3) -> "model.layers.3.mlp.up_proj.weight"."""
    return stacked.replace(".layers.", f".layers.{layer}.", 1)


def check_inventory(source: ModelSource, needed: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Passes a source that holds exactly the tensors needed, in their shapes.

    A head equal to the embedding it is tied to may be there too.

    Raises:
      ValueError: names all missing, unexpected and mis-shaped tensors.
    """
    held = source.tensors
    extra = set(held.keys() - needed.keys())
    head, embedding = (config.hugging_face_name(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    if config.tie_embeddings and head in extra and _equal_tensors(source, head, embedding):
        extra.remove(head)
    problems = grouped("missing", needed.keys() - held.keys()) + grouped("unexpected", extra)
    problems += [
        f"shape {list(held[name].shape)} of {name}, expected {list(shape)}"
        for name, shape in needed.items()
        if name in held and held[name].shape != shape
    ]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{source.path}: the tensors do not fit the model that its config describes:\n{lines}")


def _equal_tensors(source: ModelSource, first: str, second: str) -> bool:
    held = source.tensors
    if second not in held or held[first].shape != held[second].shape:
        return False
    return np.array_equal(held[first].read(), held[second].read())


def grouped(what: str, names: Iterable[str]) -> list[str]:
    """One line for the same tensor in many layers."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = LAYER.search(name)
        group = layers.setdefault(LAYER.sub(".layers.*.", name, count=1), [])
        if match:
            group.append(int(match[1]))
    return [
        f"{what}: {name}" + (f" in layers {', '.join(map(str, sorted(found)))}" if found else "")
        for name, found in sorted(layers.items())
    ]


EMBEDDING = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One leaf of the base and the tensors on disk that fill it.

    Attributes:
      path: of the leaf in the model's state.
      leaf: array, QTensor or MixedStack; of ShapeDtypeStructs before it is filled.
      names: Hugging Face's names of the layers' tensors in order, or one name.
      stacked: the leaf has a leading axis of layers.
    """

    path: tuple[Any, ...]
    leaf: Any
    names: list[str]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each tensor on disk."""
        if isinstance(self.leaf, QTensor | MixedStack):
            return self.leaf.shape
        return self.leaf.shape[1:] if self.stacked else self.leaf.shape

    def quantized_as(self, index: int) -> QTensor | None:
        """Of the tensor at `index` in `names`: what its codes are like; None: it is dense."""
        if isinstance(self.leaf, MixedStack):
            return None if index in self.leaf.dense_layers else self.leaf.quantized
        return self.leaf if isinstance(self.leaf, QTensor) else None

    @property
    def quantized_names(self) -> list[str]:
        """Those of `names` that are held in codes."""
        return [name for index, name in enumerate(self.names) if self.quantized_as(index) is not None]

    @property
    def dtype(self) -> Any:
        """Of the tensors that are dense."""
        return self.leaf.dense.dtype if isinstance(self.leaf, MixedStack) else self.leaf.dtype


def slots_of(model: CausalLM) -> list[Slot]:
    """The slots of a model without adapters, in the order of its state."""
    return [_slot(path, variable.get_value(), model.config) for path, variable in nnx.to_flat_state(nnx.state(model))]


def with_tables(
    slots: Sequence[Slot], config: Mapping[str, Any], tables: Mapping[str, Any]
) -> tuple[list[Slot], dict[str, Any]]:
    """(slots, config.json) of the model in which tables are those given, by our names, with more rows perhaps."""
    placed = [dataclasses.replace(slot, leaf=tables.get(".".join(map(str, slot.path)), slot.leaf)) for slot in slots]
    rows = {"vocab_size": len(tables[EMBEDDING])} if EMBEDDING in tables else {}
    return placed, {**config, **rows}


def shapes_of(features: ModelConfig) -> dict[str, tuple[int, ...]]:
    """By Hugging Face's name, every tensor of a model that is not quantized."""
    model = nnx.eval_shape(lambda: CausalLM(features, WeightFormat(quant_type=None)))
    return {name: slot.shape for slot in slots_of(model) for name in slot.names}


def _slot(path: tuple[Any, ...], leaf: Any, config: ModelConfig) -> Slot:
    name = ".".join(map(str, path))
    stacked = path[:2] == ("model", "layers")
    names = [layer_name(name, layer) for layer in range(config.num_layers)] if stacked else [name]
    return Slot(path=path, leaf=leaf, names=[config.hugging_face_name(name) for name in names], stacked=stacked)
