"""Maps tensors on disk to leaves of a model's state, for loading and for export."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import numpy as np
from flax import nnx

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.model_source import ACT_ORDER, ModelSource
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families.multimodal import with_text_attributes
from qlora_jax.models.tensor_names import MAX_LINES, MAX_WIDTH, expert_name, layer_name, lines_by_layer
from qlora_jax.nn.frozen_weight import Weight, is_packed, ops_of
from qlora_jax.nn.variables import StatePath
from qlora_jax.untrusted_json import JsonObject

EMBEDDING = "model.embed_tokens.weight"

Leaf = Weight | np.ndarray | jax.ShapeDtypeStruct  # a leaf of a state, with or without values


def check_tensors(source: ModelSource, expected: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Checks that a source contains exactly the expected tensors, in their shapes.

    If the model ties its head to the embedding, a head tensor that equals the embedding is accepted. So are biases of
    zeros of layers in integers, which AutoGPTQ adds to all layers.

    Raises:
      ValueError: names all missing, unexpected and mis-shaped tensors.
    """
    found = source.tensors
    extra = set(found.keys() - expected.keys())
    head, embedding = (config.hugging_face_name(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    if config.tie_embeddings and head in extra and _equal_tensors(source, head, embedding):
        extra.remove(head)
    extra = {name for name in extra if not _is_bias_of_zeros(source, name)}
    problems = lines_by_layer("missing", expected.keys() - found.keys()) + lines_by_layer("unexpected", extra)
    problems += [
        f"shape {list(found[name].shape)} of {name}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = [f"and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        lines = "\n".join(f"  {problem[:MAX_WIDTH]}" for problem in [*problems[:MAX_LINES], *more])
        raise ValueError(f"{source.path}: the tensors do not fit the model that its config describes:\n{lines}")


def _is_bias_of_zeros(source: ModelSource, name: str) -> bool:
    """True for the bias of a layer in integers whose values are all zero."""
    module, _, leaf = name.rpartition(".")
    weight = source.tensors.get(f"{module}.weight")
    if leaf != "bias" or weight is None or not weight.file_type.startswith(("INT", ACT_ORDER)):
        return False
    return not source.tensors[name].read().any()


def check_number_of_experts(source: ModelSource, config: ModelConfig) -> None:
    """Checks that a source may contain all experts of a config, before anything loops over them.

    Raises:
      ValueError: it has fewer tensors than the experts have weights.
    """
    if config.experts is None:
        return
    layers, count = len(config.experts.layers), config.experts.count
    expected = layers * count * len(config.expert_shapes())
    if expected > len(source.tensors):
        raise ValueError(
            f"{source.path}: the tensors do not fit the model that its config describes (found {len(source.tensors):,} "
            f"tensors, expected {expected:,} of experts, {layers} layers of {count} experts). Download the files "
            "again"
        )


def _equal_tensors(source: ModelSource, first: str, second: str) -> bool:
    tensors = source.tensors
    if second not in tensors or tensors[first].shape != tensors[second].shape:
        return False
    return np.array_equal(tensors[first].read(), tensors[second].read())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One leaf of the base's state and the tensors on disk that fill it.

    Attributes:
      path: keys of the leaf in the model's state.
      leaf: the leaf; its arrays are ShapeDtypeStructs until it is filled.
      names: Hugging Face's names of the tensors in the order of the stack, experts within a layer; or one name.
      stack: lengths of the leaf's leading axes: (layers,), (layers, experts), or () if it is not stacked. A leaf that
        only some layers have is stacked over these.
    """

    path: StatePath
    leaf: Leaf
    names: list[str]
    stack: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """True if the leaf has a leading axis of layers."""
        return bool(self.stack)

    @property
    def module(self) -> str:
        """The module's name, within a layer if it has layers: "self_attn.q_proj", "model.embed_tokens"."""
        return ".".join(map(str, self.path[2 if self.stacked else 0 : -1]))

    def place(self, index: int) -> tuple[int, ...]:
        """Returns the place in the stack of the tensor at `index` in `names`."""
        return tuple(int(each) for each in np.unravel_index(index, self.stack))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each tensor on disk."""
        return self.leaf.shape if is_packed(self.leaf) else self.leaf.shape[len(self.stack) :]

    def part(self, index: int) -> Leaf:
        """The leaf, or part of a mixed stack, that holds the tensor at `index` in `names`."""
        return ops_of(self.leaf).part(self.leaf, self.place(index)[0])[0] if self.stacked else self.leaf

    def quantization_of(self, index: int) -> QTensor | GgmlTensor | None:
        """The leaf that describes the codes of the tensor at `index` in `names`; None if that tensor is dense."""
        part = self.part(index)
        return cast(QTensor | GgmlTensor, part) if is_packed(part) else None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the dense tensors."""
        return np.dtype(self.leaf.dtype)


def slots_of(model: CausalLM) -> list[Slot]:
    """The slots of a model without adapters, in the order of its state."""
    return [_slot(path, variable.get_value(), model.config) for path, variable in nnx.to_flat_state(nnx.state(model))]


def with_tables(
    slots: Sequence[Slot], config: JsonObject, tables: Mapping[str, jax.Array | np.ndarray]
) -> tuple[list[Slot], JsonObject]:
    """Replaces embedding and head by `tables`, which may have more rows.

    Args:
      tables: arrays by our names, such as "model.embed_tokens.weight".

    Returns:
      (slots, config.json) of the model with these tables.
    """
    placed = [dataclasses.replace(slot, leaf=tables.get(".".join(map(str, slot.path)), slot.leaf)) for slot in slots]
    rows = {"vocab_size": len(tables[EMBEDDING])} if EMBEDDING in tables else {}
    return placed, with_text_attributes(config, rows)


def tensor_shapes(features: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an unquantized model, by Hugging Face's name."""
    model = nnx.eval_shape(lambda: CausalLM(features, WeightFormat(quant_type=None)))
    return {name: slot.shape for slot in slots_of(model) for name in slot.names}


def _slot(path: StatePath, leaf: Leaf, config: ModelConfig) -> Slot:
    name = ".".join(map(str, path))
    if path[:2] != ("model", "layers"):
        return Slot(path=path, leaf=leaf, names=[config.hugging_face_name(name)], stack=())
    module = ".".join(map(str, path[2:-1]))
    layers = config.layers_with(module)
    names, stack = [layer_name(name, layer) for layer in layers], (len(layers),)
    if module in config.expert_shapes():
        assert config.experts is not None
        stack = (*stack, config.experts.count)
        names = [expert_name(each, expert) for each in names for expert in range(config.experts.count)]
    return Slot(path=path, leaf=leaf, names=[config.hugging_face_name(each) for each in names], stack=stack)
