"""BitFit (Ben Zaken et al., 2021): the bias of a frozen linear layer trains.

Dimension key: L layers, M rows, K in, N out.
"""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape
from qlora_jax.methods.method import Given, Method, linears, norm_widths, norms
from qlora_jax.methods.targets import projection_layers, target_layers_of
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.linear import FrozenLayer, LinearAdapter, QLinear
from qlora_jax.nn.norm import LayerNorm
from qlora_jax.nn.variables import Frozen, TrainedLeaf


@jax.custom_vjp
def add_bias(y_MN: Float[Array, "M N"], bias_N: Float[Array, " N"]) -> Float[Array, "M N"]:
    """Returns y + bias, with the bias cast to y's dtype; its gradient is summed over rows in f32."""
    return y_MN + bias_N.astype(y_MN.dtype)[None]


def _backward(like_N, dy_MN):
    return dy_MN, jnp.sum(dy_MN, axis=0, dtype=jnp.float32)


add_bias.defvjp(lambda y_MN, bias_N: (add_bias(y_MN, bias_N), None), _backward)


class TrainableBias(LinearAdapter):
    """y = x W^T + bias in place of the frozen bias: `bias` is [L, N] in f32; inside the scan, one layer."""

    LEAVES = (TrainedLeaf("bias", vector=True),)

    def __init__(self, bias: Float[Array, "*L N"]):
        self.bias = nnx.LoRAParam(bias)

    @staticmethod
    def apply(
        adapters: "Sequence[TrainableBias]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns x W^T + bias of each; dropout does not apply."""
        return [add_bias(one.product(x_MK), each.bias[...]) for each, one in zip(adapters, frozen, strict=True)]

    def select_layer(self, layer: int) -> "TrainableBias":
        """Returns one layer of the stack."""
        return TrainableBias(self.bias[...][layer])

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns the weight unchanged, in f32."""
        return weight.astype(jnp.float32)

    def merge_bias(self, bias: Float[Array, " N"]) -> Float[Array, " N"]:
        """Returns the trained bias."""
        return self.bias[...]


def make_bias_trainable(linear: QLinear) -> None:
    """Replaces the layer's frozen bias by a trainable copy in f32."""
    assert linear.bias is not None, "only layers with a bias are selected"
    linear.adapter = TrainableBias(linear.bias[...].astype(jnp.float32))
    linear.bias = Frozen(linear.bias[...][:0])  # zero layers: frees the memory


def bias_widths(config: ModelConfig) -> dict[str, int]:
    """Returns {Hugging Face name without the layer's index: width} of each linear layer and norm that has a bias."""
    shapes = {f"model.layers.{name}": each for name, each in config.linear_shapes().items()}
    biased = {config.hugging_face_name(name): n for name, ((n, _), has_bias) in shapes.items() if has_bias}
    return biased | (norm_widths(config) if config.norm == "layer" else {})


def bias_targets(config: ModelConfig, spec: LoraArgs) -> list[str]:
    """Returns the linear layers and norms whose biases train with the method `bitfit`, by their Hugging Face names.

    Raises:
      ValueError: the model has no bias, or a pattern matches nothing, or only some layers of a stack.
    """
    every = tuple(range(config.num_layers))
    layers_of = {name: projection_layers(config).get(name, every) for name in bias_widths(config)}
    if not layers_of:
        raise ValueError(
            "lora.method=bitfit: the model has no bias that can train (found linear layers and norms without biases). "
            "Set lora.method=ln_tuning, which trains the weights of the norms, or lora"
        )
    return list(target_layers_of(layers_of, spec, config.num_layers, "modules with a bias"))


class BitFit(Method):
    """The method `bitfit`: biases of linear layers and norms train."""

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns the layers and norms whose biases train."""
        return bias_targets(config, spec)

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns nothing: gradients of biases read what the frozen model keeps."""
        return AdapterShape()

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Makes the targeted biases trainable."""
        chosen = bias_targets(model.config, spec)
        for name, linear in linears(model):
            if name in chosen:
                make_bias_trainable(linear)
        for name, norm in norms(model):
            if name in chosen and isinstance(norm, LayerNorm) and norm.bias is not None:
                norm.make_bias_trainable()


METHOD = BitFit()
