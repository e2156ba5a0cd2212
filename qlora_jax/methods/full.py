"""Full finetuning: linear layers and tables that train a copy of the frozen weight.

Dimension key: L layers, M rows, K in, N out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn
from pallas_kernels.nf4_matmul.costs import product_flops
from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work, every_layer
from qlora_jax.methods.method import Given, Method, linears, norms
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.linear import FrozenLayer, LinearAdapter, QLinear
from qlora_jax.nn.variables import Frozen, TrainedLeaf


@jax.custom_vjp
def trainable_linear(
    x_MK: Float[Array, "M K"], weight_NK: Float[Array, "N K"], bias_N: Float[Array, " N"] | None
) -> Float[Array, "M N"]:
    """Returns x W^T + b, with W and b cast to x's dtype; their gradients are summed in f32 and keep their dtypes."""
    y_MN = dot_nt(x_MK, weight_NK.astype(x_MK.dtype), x_MK.dtype)
    return y_MN if bias_N is None else y_MN + bias_N.astype(y_MN.dtype)[None]


def _forward(x_MK, weight_NK, bias_N):
    return trainable_linear(x_MK, weight_NK, bias_N), (x_MK, weight_NK, bias_N)


def _backward(residuals, dy_MN):
    x_MK, weight_NK, bias_N = residuals
    dx_MK = dot_nn(dy_MN, weight_NK.astype(dy_MN.dtype), x_MK.dtype)
    d_weight_NK = dot_tn(dy_MN, x_MK).astype(weight_NK.dtype)
    d_bias_N = None if bias_N is None else jnp.sum(dy_MN, axis=0, dtype=jnp.float32).astype(bias_N.dtype)
    return dx_MK, d_weight_NK, d_bias_N


trainable_linear.defvjp(_forward, _backward)


class TrainableLinear(LinearAdapter):
    """y = x W^T + b in place of the frozen layer.

    `weight` [L, N, K] is in f32 or bf16, `bias` [L, N] in f32 or None. Inside the scan over layers they have one layer.
    """

    LEAVES = (TrainedLeaf("weight"), TrainedLeaf("bias", vector=True))

    def __init__(self, weight: Float[Array, "*L N K"], bias: Float[Array, "*L N"] | None):
        self.weight = nnx.LoRAParam(weight)
        self.bias = None if bias is None else nnx.LoRAParam(bias)

    @staticmethod
    def apply(
        adapters: "Sequence[TrainableLinear]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns x W^T + b of each; the frozen layers are not used."""
        biases = [None if one.bias is None else one.bias[...] for one in adapters]
        with jax.named_scope("whole_linear"):
            return [trainable_linear(x_MK, one.weight[...], bias) for one, bias in zip(adapters, biases, strict=True)]

    def select_layer(self, layer: int) -> "TrainableLinear":
        """Returns one layer of the stack."""
        return TrainableLinear(self.weight[...][layer], None if self.bias is None else self.bias[...][layer])

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns the trained weight in f32."""
        return self.weight[...].astype(jnp.float32)

    def merge_bias(self, bias: Float[Array, " N"]) -> Float[Array, " N"]:
        """Returns the trained bias."""
        assert self.bias is not None
        return self.bias[...]


def make_trainable(linear: QLinear, dtype: DTypeLike) -> None:
    """Replaces the layer's frozen weight by a trainable copy in `dtype`, and its bias by one in f32.

    Raises:
      ValueError: all or some of the weight is in 4-bit codes.
    """
    weight = linear.weight.get_value()
    if not isinstance(weight, jax.Array):
        raise ValueError(
            f"{linear.name}: a 4-bit weight cannot train (found {type(weight).__name__}, expected a dense array). "
            "Load the model with model.quant_type=none."
        )
    bias = None if linear.bias is None else linear.bias[...].astype(jnp.float32)
    linear.adapter = TrainableLinear(weight.astype(dtype), bias)
    linear.weight = Frozen(weight[:0])  # zero layers: frees the memory and keeps (N, K)
    linear.bias = None if linear.bias is None else Frozen(linear.bias[...][:0])


class FullMethod(Method):
    """Every weight of an unquantized model trains; tables: models/trainable_embeddings.py."""

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns all projections: their inputs are read, and no frozen weight is multiplied."""
        names = config.linear_shapes()
        return AdapterShape(reads=every_layer(config, names), products=dict.fromkeys(names, 0))

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        """Returns the work of x W^T, and of as much for each of dx = dy W and dW = dy^T x."""
        flop = {name: sizes.layers(name) * product_flops(sizes.rows, shape) for name, shape in sizes.shapes()}
        again = sum(each for name, each in flop.items() if name not in sizes.not_recomputed)
        whole = sum(flop.values())
        return (Work("whole_linear", whole, 2 * whole, again),)

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Makes all linear layers and norms trainable."""
        if model.config.experts is not None:
            raise ValueError(
                "lora.method=full: the model is a mixture of experts, whose experts cannot train in full (found "
                f"{model.config.experts.count} experts per layer). Set lora.method=lora, with lora.target_parameters "
                "for adapters on experts."
            )
        for _, linear in linears(model):
            make_trainable(linear, spec.dtype)
        for _, norm in norms(model):
            norm.make_trainable()


METHOD = FullMethod()
