"""(IA)^3 (Liu et al., 2022): a trainable vector that scales a frozen layer's results or its inputs.

Dimension key: L layers, M rows, K in, N out.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape, every_layer, names_within_layers
from qlora_jax.methods.method import Given, Method, linears
from qlora_jax.methods.peft_form import (
    PeftFile,
    PeftForm,
    PeftLeaf,
    ReadAdapter,
    TrainedAdapter,
    common_config,
    layer_tensors,
    stack_layers,
)
from qlora_jax.methods.peft_names import linears_of, suffixes_of, target_suffixes
from qlora_jax.methods.targets import AUTO, Layers, projection_layers, target_layers, whole_stacks
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.column_scale import scale_columns
from qlora_jax.nn.linear import BatchedAdapter, FrozenLayer, LinearAdapter
from qlora_jax.nn.variables import Frozen, TrainedLeaf, select_layer
from qlora_jax.regex import matches_end
from qlora_jax.untrusted_json import JsonObject


class BatchedIA3(BatchedAdapter):
    """(IA)^3 of several runs: a vector of ones, which changes nothing, where a run does not scale."""

    def __init__(self, adapters: "Sequence[IA3 | None]", layers: int):
        self.vectors = nnx.Dict(
            {
                f"{on_input}": Frozen(_stacked([one if one and one.on_input == on_input else None for one in adapters]))
                for on_input in (False, True)
                if any(one is not None and one.on_input == on_input for one in adapters)
            }
        )

    def _scaled(self, x_MK: jax.Array, on_input: bool, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        if f"{on_input}" not in self.vectors:
            return x_MK
        own_MK = select_layer(self.vectors[f"{on_input}"][...], layer)[own_M]
        return (x_MK.astype(jnp.float32) * own_MK).astype(x_MK.dtype)

    def on_input(self, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        """Returns x * vector."""
        return self._scaled(x_MK, True, layer, own_M)

    def on_result(self, y_MN: jax.Array, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        """Returns y * vector."""
        return self._scaled(y_MN, False, layer, own_M)


def _stacked(adapters: "Sequence[IA3 | None]") -> jax.Array:
    """Returns the vectors [L, adapters, _], of ones for None."""
    shape = next(one.vector[...].shape for one in adapters if one is not None)
    vectors = [np.ones(shape, np.float32) if one is None else np.asarray(one.vector[...]) for one in adapters]
    return jnp.asarray(np.stack(vectors, axis=1))


class IA3(LinearAdapter):
    """y = (x W^T + b) * vector, or (x * vector) W^T + b if `on_input`; PEFT's IA3.

    `vector` is [L, N], or [L, K] if `on_input`. It is in f32, because it starts at 1, where bf16 would round updates
    away. Inside the scan over layers it has one layer.
    """

    LEAVES = (TrainedLeaf("vector", vector=True),)
    SAVED = ("unscaled",)
    for_batch = BatchedIA3

    def __init__(self, vector: Float[Array, "*L _"], on_input: bool):
        self.vector = nnx.LoRAParam(vector)
        self.on_input = on_input

    @classmethod
    def init(cls, stack: int, shape: tuple[int, int], *, on_input: bool) -> "IA3":
        """Creates vectors of ones, which change nothing, for `stack` layers of weights (N, K)."""
        return cls(jnp.ones((stack, shape[1] if on_input else shape[0]), jnp.float32), on_input)

    @staticmethod
    def apply(
        adapters: "Sequence[IA3]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns each layer's result with its vector; dropout does not apply."""
        return [adapter._applied(x_MK, one) for adapter, one in zip(adapters, frozen, strict=True)]

    def _applied(self, x_MK: jax.Array, frozen: FrozenLayer) -> jax.Array:
        vector = self.vector[...]
        if self.on_input:
            return frozen(scale_columns(x_MK, vector))
        return scale_columns(checkpoint_name(frozen(x_MK), "unscaled"), vector)

    def select_layer(self, layer: int) -> "IA3":
        """Returns the adapter of one layer of the stack."""
        return IA3(self.vector[...][layer], self.on_input)

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns the weight in f32, its rows (or its columns if `on_input`) multiplied by the vector."""
        vector = self.vector[...]
        return weight.astype(jnp.float32) * (vector[None] if self.on_input else vector[:, None])

    def merge_bias(self, bias: Float[Array, " N"]) -> Float[Array, " N"]:
        """Returns bias * vector in f32, or the bias unchanged if `on_input`."""
        return bias if self.on_input else bias.astype(jnp.float32) * self.vector[...]


# The defaults of (IA)^3: keys, values (or the fused projection), and the MLP's last projection.
LAST = "mlp.down_proj"
IA3_TARGETS = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", LAST)


def ia3_targets(config: ModelConfig, spec: LoraArgs) -> tuple[list[str], list[str]]:
    """Returns (projections that get a vector, those of them whose inputs are scaled).

    The defaults are keys, values, and the inputs of the MLP's last projection.

    Raises:
      ValueError: a pattern that matches nothing, or only some layers of a stack.
    """
    names = {name: config.hugging_face_name(f"model.layers.{name}") for name in config.linear_shapes()}
    usual = [names[name] for name in IA3_TARGETS if name in names]
    scaled = usual if spec.target_modules == AUTO else list(target_layers(config, spec))
    if spec.feedforward_modules is None:
        return scaled, [name for name in scaled if name == names.get(LAST)]
    layers_of: dict[str, Layers] = {name: projection_layers(config)[name] for name in scaled}
    found = [
        name
        for entry in spec.feedforward_modules
        for name in whole_stacks("feedforward_modules", re.escape(entry), matches_end, layers_of)
    ]
    return scaled, found


class IA3Form(PeftForm):
    """PEFT's IA3: ia3_l [N, 1], or [1, K] if it scales inputs."""

    unused = ("feedforward_modules", "init_ia3_weights")
    leaves: ClassVar[Mapping[str, PeftLeaf]] = {"vector": PeftLeaf("ia3_l")}

    def describe(self, config: JsonObject) -> str:
        """Returns what an adapter is."""
        return "An (IA)^3 adapter"

    def config(self, adapter: TrainedAdapter, base: str) -> JsonObject:
        """Returns adapter_config.json."""
        on_inputs = ia3_targets(adapter.model, adapter.args)[1]
        feedforward = target_suffixes(sorted(on_inputs), linears_of(adapter.model))
        own = {"peft_type": "IA3", "feedforward_modules": feedforward, "init_ia3_weights": True}
        return common_config(adapter, base) | own

    def tensors(self, adapter: TrainedAdapter) -> dict[str, np.ndarray]:
        """Returns the vectors of each layer."""
        on_inputs = ia3_targets(adapter.model, adapter.args)[1]
        shaped = {
            name: {leaf: np.expand_dims(np.asarray(values), 1 if name in on_inputs else 2)}
            for name, leaves in adapter.lora.items()
            for leaf, values in leaves.items()
        }
        return layer_tensors(shaped, self.leaves)

    def read(self, file: PeftFile) -> ReadAdapter:
        """Reads the vectors: inputs are scaled if a stack is [L, 1, K], outputs if it is [L, N, 1]."""
        stacks = stack_layers(file, self)
        on_inputs = [name for name, leaves in stacks.items() if leaves["vector"].shape[1] == 1]
        args = LoraArgs(
            method="ia3",
            target_modules=suffixes_of(stacks, file.model),
            feedforward_modules=suffixes_of(on_inputs, file.model),
        )
        count = file.model.num_layers
        return ReadAdapter(
            {name: {"vector": leaves["vector"].reshape(count, -1)} for name, leaves in stacks.items()}, args
        )

    def shapes(self, first: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of a layer's vector, which scales what that of the first layer scales."""
        n, k = shape
        return {"vector": (1, k) if first["vector"] == (1, k) else (n, 1)}

    def differences(self, ours: LoraArgs, of_adapter: LoraArgs, model: ModelConfig) -> list[str]:
        """Lists the settings of targets if they select others."""
        if ia3_targets(model, ours) == ia3_targets(model, of_adapter):
            return []
        names = ("target_modules", "feedforward_modules")
        return [f"lora.{name}: expected {getattr(of_adapter, name)!r}" for name in names]


class IA3Method(Method):
    """(IA)^3 on projections."""

    peft = IA3Form()

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns the projections that get a vector."""
        return ia3_targets(config, spec)[0]

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns the projections whose results are scaled, and those whose inputs are."""
        targets, on_inputs = ia3_targets(config, spec)
        scaled = names_within_layers(config, [name for name in targets if name not in on_inputs])
        return AdapterShape(reads=every_layer(config, names_within_layers(config, on_inputs)), scaled=frozenset(scaled))

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds a vector of ones to each targeted projection."""
        scaled, on_inputs = ia3_targets(model.config, spec)
        stacks, known = projection_layers(model.config), dict(linears(model))
        for name in scaled:
            known[name].adapter = IA3.init(len(stacks[name]), known[name].shape, on_input=name in on_inputs)


METHOD = IA3Method()
