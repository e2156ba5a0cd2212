"""Bottleneck adapters (Houlsby et al., 2019): y = x + act(x D + b) U + c on the results of attention or of the MLP.

Dimension key: L layers, M tokens, D embed, R bottleneck.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn
from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work
from qlora_jax.methods.method import Given, Method
from qlora_jax.models.config import NORM_PLACEMENTS, ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.activations import ACTIVATIONS
from qlora_jax.nn.lora import initial_factors
from qlora_jax.nn.random_keys import named_key
from qlora_jax.nn.variables import TrainedLeaf


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def bottleneck(
    x_MD: Float[Array, "M D"],
    down_DR: Float[Array, "D R"],
    down_bias_R: Float[Array, " R"],
    up_RD: Float[Array, "R D"],
    up_bias_D: Float[Array, " D"],
    activation: str,
) -> Float[Array, "M D"]:
    """Returns x + act(x down + down_bias) up + up_bias in x's dtype.

    Matrices are cast to x's dtype, and sums are in f32. Gradients of the parameters are summed in f32 and returned in
    their dtypes. The backward pass reads x and x down + down_bias, both in x's dtype.

    Args:
      activation: a key of nn.activations.ACTIVATIONS.
    """
    return _forward(x_MD, down_DR, down_bias_R, up_RD, up_bias_D, activation)[0]


def _forward(x_MD, down_DR, down_bias_R, up_RD, up_bias_D, activation):
    dtype = x_MD.dtype
    x_MD = checkpoint_name(x_MD, "bottleneck_in")
    narrow_MR = (dot_nn(x_MD, down_DR.astype(dtype)) + down_bias_R.astype(jnp.float32)[None]).astype(dtype)
    narrow_MR = checkpoint_name(narrow_MR, "bottleneck_narrow")
    inner_MR = ACTIVATIONS[activation].value(narrow_MR.astype(jnp.float32)).astype(dtype)
    wide_MD = dot_nn(inner_MR, up_RD.astype(dtype)) + up_bias_D.astype(jnp.float32)[None]
    return x_MD + wide_MD.astype(dtype), (x_MD, narrow_MR, down_DR, down_bias_R, up_RD, up_bias_D)


def _backward(activation, residuals, dy_MD):
    x_MD, narrow_MR, down_DR, down_bias_R, up_RD, up_bias_D = residuals
    dtype = x_MD.dtype
    value_MR, slope_MR = ACTIVATIONS[activation].with_slope(narrow_MR.astype(jnp.float32))
    d_up_RD = dot_tn(value_MR.astype(dtype), dy_MD).astype(up_RD.dtype)
    d_narrow_MR = (dot_nt(dy_MD, up_RD.astype(dtype)) * slope_MR).astype(dtype)
    d_down_DR = dot_tn(x_MD, d_narrow_MR).astype(down_DR.dtype)
    dx_MD = dy_MD + dot_nt(d_narrow_MR, down_DR.astype(dtype), dtype)
    d_down_bias_R, d_up_bias_D = (
        _row_sum(d_narrow_MR).astype(down_bias_R.dtype),
        _row_sum(dy_MD).astype(up_bias_D.dtype),
    )
    return dx_MD, d_down_DR, d_down_bias_R, d_up_RD, d_up_bias_D


def _row_sum(x_MN: jax.Array) -> jax.Array:
    return jnp.sum(x_MN, axis=0, dtype=jnp.float32)


bottleneck.defvjp(_forward, _backward)


class Bottleneck(nnx.Module):
    """A bottleneck adapter of attention or of the MLP.

    `down` [L, D, R] and `up` [L, R, D] are in f32 or bf16, `down_bias` [L, R] and `up_bias` [L, D] in f32. Inside the
    scan over layers they have one layer.
    """

    LEAVES = (
        *(TrainedLeaf("down"), TrainedLeaf("down_bias", vector=True)),
        *(TrainedLeaf("up"), TrainedLeaf("up_bias", vector=True)),
    )
    SAVED = ("bottleneck_in", "bottleneck_narrow")

    def __init__(
        self,
        down: Float[Array, "*L D R"],
        down_bias: Float[Array, "*L R"],
        up: Float[Array, "*L R D"],
        up_bias: Float[Array, "*L D"],
        activation: str,
    ):
        self.down, self.down_bias = nnx.LoRAParam(down), nnx.LoRAParam(down_bias)
        self.up, self.up_bias = nnx.LoRAParam(up), nnx.LoRAParam(up_bias)
        self.activation = activation

    @classmethod
    def init(
        cls, key: jax.Array, stack: int, width: int, *, rank: int, activation: str, dtype: DTypeLike = jnp.float32
    ) -> "Bottleneck":
        """Draws `down` for `stack` layers as LoRA draws A; all else is zero, so the adapter changes nothing."""
        down, up = initial_factors(key, stack, (width, width), rank, dtype)
        down_bias, up_bias = (jnp.zeros((stack, size), jnp.float32) for size in (rank, width))
        return cls(down, down_bias, up, up_bias, activation)

    def __call__(self, x_MD: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """Returns x with the adapter's change."""
        leaves = (leaf[...] for leaf in (self.down, self.down_bias, self.up, self.up_bias))
        with jax.named_scope("bottleneck"):
            return bottleneck(x_MD, *leaves, self.activation)


class BottleneckMethod(Method):
    """Bottleneck adapters behind modules of each layer.

    Args:
      modules: "self_attn", "mlp".
    """

    def __init__(self, *modules: str):
        self.modules = modules

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns the modules with an adapter behind them."""
        return AdapterShape(wraps=frozenset(self.modules))

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        """Returns the work of two products of 2 M D R forward and four backward: d inner, dU, dD and dx.

        Both are recomputed, or the first alone if no norm reads the result.
        """
        layout = NORM_PLACEMENTS[sizes.model.layout]
        is_read = {"self_attn": not layout.parallel, "mlp": layout.after_mlp is not None}
        one = sizes.model.num_layers * 2 * sizes.rows * sizes.model.embed_dim * sizes.lora.rank
        again = sum(1 + is_read[name] for name in self.modules) * one
        return (Work("bottleneck", 2 * len(self.modules) * one, 4 * len(self.modules) * one, again),)

    def saved(self, sizes: StepSizes) -> dict[str, int]:
        """Returns the bytes of the inputs [M, D] and inner values [M, R]."""
        width = (sizes.model.embed_dim + sizes.lora.rank) * sizes.itemsize
        count = sizes.backward_layers * len(self.modules)
        return {"bottleneck_in and bottleneck_narrow": count * sizes.rows * width}

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds adapters that change nothing."""
        config, layers = model.config, model.model.layers
        for group in self.modules:
            getattr(layers, group).adapter = Bottleneck.init(
                named_key(given.key, f"model.layers.{group}"),
                config.num_layers,
                config.embed_dim,
                rank=spec.rank,
                activation=spec.bottleneck_activation,
                dtype=spec.dtype,
            )


HOULSBY, PFEIFFER = BottleneckMethod("self_attn", "mlp"), BottleneckMethod("mlp")
