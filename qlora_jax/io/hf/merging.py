"""Merges an adapter into the tensors of a model, one tensor at a time."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qlora_jax.io.tensor_map import Slot
from qlora_jax.methods.expert_lora import ExpertLoRA
from qlora_jax.methods.method import linears, norms
from qlora_jax.models.config import ROUTER
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.mlp import MixtureMLP
from qlora_jax.models.tensor_names import EXPERT, LAYER
from qlora_jax.nn.experts import ExpertAdapter
from qlora_jax.nn.linear import LinearAdapter
from qlora_jax.nn.lora import LoRA
from qlora_jax.nn.norm import TrainableNorm


@dataclasses.dataclass(frozen=True)
class ExpertPart:
    """The part of an adapter on experts that belongs to one weight of theirs.

    Attributes:
      half: 0 for gate and 1 for up, which share an adapter; None: only this weight has the adapter.
    """

    adapter: ExpertLoRA
    half: int | None = None

    def select(self, row: int, expert: int) -> LoRA:
        """Returns the adapter of one expert's weight; `row` is that of its layer among those with an adapter."""
        a_EKR, b_ERN = self.adapter.lora_a[...][row], self.adapter.lora_b[...][row]
        own = min(expert, len(a_EKR) - 1)  # 0 if the experts share an adapter
        b_RN = b_ERN[own] if self.half is None else jnp.split(b_ERN[own], 2, axis=1)[self.half]
        return LoRA(a_EKR[own], b_RN, self.adapter.scaling, 0.0)


Mergeable = LinearAdapter | TrainableNorm | ExpertPart  # can be merged into the tensors of a module
Mergeables = Mapping[str, Mergeable]  # by Hugging Face's name without the indices of layer and expert


def mergeables(model: CausalLM) -> Mergeables:
    """Returns the adapters of a model."""
    modules = (*linears(model), *norms(model))
    found: dict[str, Mergeable] = {name: module.adapter for name, module in modules if module.adapter}
    return {**found, **_of_experts(model)}


def _mergeable(place: ExpertAdapter) -> ExpertLoRA | None:
    if place.adapter is None or isinstance(place.adapter, ExpertLoRA):
        return place.adapter
    raise ValueError(f"{type(place.adapter).__name__}: an adapter of experts that cannot be merged. Export the adapter")


def _of_experts(model: CausalLM) -> Mergeables:
    mlp, config = model.model.layers.mlp, model.config
    if not isinstance(mlp, MixtureMLP):
        return {}
    experts = mlp.experts
    both, down = (_mergeable(place) for place in (experts.gate_up_proj, experts.down_proj))
    found: dict[str, Mergeable | None] = {
        ROUTER: mlp.gate.adapter,
        "mlp.experts.gate_proj": both and ExpertPart(both, 0),
        "mlp.experts.up_proj": both and ExpertPart(both, 1),
        "mlp.experts.down_proj": down and ExpertPart(down),
    }
    return {config.hugging_face_name(f"model.layers.{name}"): part for name, part in found.items() if part}


def merge(slot: Slot, index: int, dense: jax.Array, adapters: Mergeables) -> jax.Array:
    """Returns a tensor with its module's adapter merged, in f32; the tensor itself if it has none.

    Args:
      dense: the tensor at `index` in `slot.names`, without an adapter.
    """
    name = slot.names[index]
    module, _, leaf = name.rpartition(".")
    adapter = adapters.get(EXPERT.sub(".experts.", LAYER.sub(".layers.", module, count=1), count=1))
    if adapter is None or leaf not in ("weight", "bias"):
        return dense
    one = _one_matrix(adapter, name, slot.place(index) if slot.stacked else (0,))
    if one is None:
        return dense
    return one.merge_bias(dense) if leaf == "bias" else one.merge(dense)


def _one_matrix(adapter: Mergeable, name: str, place: tuple[int, ...]) -> LinearAdapter | TrainableNorm | None:
    """Returns the adapter of one tensor; None if its layer has none."""
    layers = getattr(adapter.adapter if isinstance(adapter, ExpertPart) else adapter, "adapted_layers", None)
    layer = int(match[1]) if (match := LAYER.search(name)) else 0
    if layers is not None and layer not in layers:
        return None
    if isinstance(adapter, ExpertPart):
        return adapter.select(place[0] if layers is None else layers.index(layer), place[1])
    return adapter.select_layer(place[0] if layers is None else layer)
