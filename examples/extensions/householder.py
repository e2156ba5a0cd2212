"""Householder reflection adaptation, HRA (Yuan et al., 2024), as a package of its own adds it to qlora_jax.

Dimension key: L layers, M tokens, K in, N out, R reflections.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from qlora_jax.config import LoraArgs
from qlora_jax.config.fields import Bound, TemplateValue, setting
from qlora_jax.config.methods import MethodDeclaration
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work, every_layer, names_within_layers
from qlora_jax.methods.method import Given, Method, linears, options_of
from qlora_jax.methods.peft_form import (
    PeftFile,
    PeftForm,
    PeftKeys,
    PeftLeaf,
    ReadAdapter,
    TrainedAdapter,
    common_config,
    setting_differences,
    stack_layers,
)
from qlora_jax.methods.peft_names import suffixes_of
from qlora_jax.methods.targets import projection_layers, target_layers
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.linear import FrozenLayer, LinearAdapter
from qlora_jax.nn.random_keys import named_key
from qlora_jax.nn.variables import TrainedLeaf

# Pairs of equal reflections change nothing, which is how training starts.
EVEN = Bound("an even number, 2 or more", lambda value: value >= 2 and value % 2 == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    reflections: int = setting("number of reflections", 8, EVEN)


class HRA(LinearAdapter):
    """y = (x H) W^T + b, where H reflects x at the planes normal to the columns of u [L, K, R], the last one first."""

    LEAVES = (TrainedLeaf("hra_u"),)

    def __init__(self, hra_u: jax.Array):
        self.hra_u = nnx.LoRAParam(hra_u)

    @staticmethod
    def apply(
        adapters: "Sequence[HRA]", x_MK: jax.Array, frozen: Sequence[FrozenLayer], keys: Sequence[jax.Array | None]
    ) -> list[jax.Array]:
        return [one(adapter._reflected(x_MK)) for adapter, one in zip(adapters, frozen, strict=True)]

    def _reflected(self, x_MK: jax.Array) -> jax.Array:
        u_KR = self.hra_u[...].astype(jnp.float32)
        u_KR /= jnp.linalg.norm(u_KR, axis=0, keepdims=True)
        y_MK = x_MK.astype(jnp.float32)
        with jax.named_scope("hra"):
            for index in reversed(range(u_KR.shape[1])):
                u_K = u_KR[:, index]
                y_MK -= 2 * jnp.matmul(y_MK, u_K, precision="highest")[:, None] * u_K[None]
        return y_MK.astype(x_MK.dtype)

    def select_layer(self, layer: int) -> "HRA":
        return HRA(self.hra_u[...][layer])

    def merge(self, weight: jax.Array) -> jax.Array:
        # x H W^T = x (W H^T)^T: the rows of W are reflected in the other order.
        reversed_u = HRA(self.hra_u[...][:, ::-1])
        return reversed_u._reflected(weight.astype(jnp.float32))


class Keys(PeftKeys, total=False):
    r: Annotated[int, Field(ge=1, le=1 << 16)]
    apply_GS: bool


class HRAForm(PeftForm):
    keys, required, unused = Keys, ("r",), ("init_weights",)
    leaves = {"hra_u": PeftLeaf("hra_u")}  # noqa: RUF012

    def describe(self, config) -> str:
        return "An HRA adapter"

    def config(self, adapter: TrainedAdapter, base: str):
        reflections = options_of(adapter.args, Options).reflections
        return common_config(adapter, base) | {
            "peft_type": "HRA",
            "r": reflections,
            "apply_GS": False,
            "bias": "none",
            "init_weights": True,
        }

    def problems(self, config: Keys) -> list[str]:
        return ["apply_GS: found True, expected false"] if config.get("apply_GS") else []

    def read(self, file: PeftFile[Keys]) -> ReadAdapter:
        lora = stack_layers(file, self)
        options: dict[str, TemplateValue] = {"reflections": file.config.get("r", 0)}
        return ReadAdapter(lora, LoraArgs(method="hra", target_modules=suffixes_of(lora, file.model), options=options))

    def differences(self, ours: LoraArgs, of_adapter: LoraArgs, model: ModelConfig) -> list[str]:
        return setting_differences(["options"], ours, of_adapter)


class HRAMethod(Method):
    peft = HRAForm()

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        return target_layers(config, spec)

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        stacks, known = projection_layers(model.config), dict(linears(model))
        half = options_of(spec, Options).reflections // 2
        for name in target_layers(model.config, spec):
            shape = len(stacks[name]), known[name].shape[1], half
            drawn = jax.random.normal(named_key(given.key, name), shape)
            known[name].adapter = HRA(jnp.repeat(drawn, 2, axis=2))

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        names = names_within_layers(config, target_layers(config, spec))
        return AdapterShape(reads=every_layer(config, names))

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        names = names_within_layers(sizes.model, target_layers(sizes.model, sizes.lora))
        inputs = {name: k for name, (_, k) in sizes.shapes()}
        one = sum(sizes.layers(name) * 2 * sizes.rows * inputs[name] for name in names)
        flop = options_of(sizes.lora, Options).reflections * one
        return (Work("hra", flop, 3 * flop, flop),)


METHOD = HRAMethod()
DECLARATION = MethodDeclaration(
    summary="reflections of inputs",
    title="HRA",
    implementation="householder:METHOD",
    uses=frozenset({"target_modules", "modules_to_save", "start"}),
    peft_type="HRA",
    options=Options,
)
