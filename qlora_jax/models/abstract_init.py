"""Placeholders of frozen leaves, for `nnx.eval_shape` before any weight is loaded."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.formats.layouts import LAYOUTS
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.models.config import WeightFormat
from qlora_jax.nn.experts import ExpertWeight
from qlora_jax.nn.linear import Weight
from qlora_jax.nn.mixed_stack import MixedStack


def frozen_linear_leaves(
    name: str, stack: int, shape: tuple[int, int], has_bias: bool, weights: WeightFormat
) -> tuple[Weight, jax.Array | None]:
    """Returns zeros as (weight, bias) of one projection.

    Args:
      name: name within a layer, such as `mlp.up_proj`.
      stack: number of layers L.
      shape: (N, K) of one layer.
      has_bias: True for a bias [L, N].
    """
    bias = jnp.zeros((stack, shape[0]), weights.dtype) if has_bias else None
    dense = weights.dense_layers(name, stack)
    if len(dense) == stack:
        return jnp.zeros((stack, *shape), weights.dtype), bias
    quantized = _empty_qtensor((stack - len(dense),), shape, weights)
    if not dense:
        return quantized, bias
    in_16_bit = jnp.zeros((len(dense), *shape), weights.dtype)
    return MixedStack(quantized=quantized, dense=in_16_bit, dense_layers=dense), bias


def frozen_expert_leaves(
    name: str, stack: tuple[int, int], shape: tuple[int, int], has_bias: bool, weights: WeightFormat
) -> tuple[ExpertWeight, jax.Array | None]:
    """Returns zeros as (weight, bias) of one projection of all experts.

    Args:
      name: name within a layer, such as `mlp.experts.up_proj`.
      stack: numbers of sparse layers S and of experts E.
      shape: (N, K) of one expert.
      has_bias: True for a bias [S, E, N].

    Raises:
      ValueError: only some layers of the projection are to stay dense.
    """
    bias = jnp.zeros((*stack, shape[0]), weights.dtype) if has_bias else None
    dense = weights.dense_layers(name, stack[0])
    if len(dense) == stack[0]:
        return jnp.zeros((*stack, *shape), weights.dtype), bias
    if dense:
        raise ValueError(
            f"{name}: found {len(dense)} of {stack[0]} layers in 16 bits, expected none or all, because the experts of "
            "a model are stored in one format. Keep all of these layers in 16 bits, or none."
        )
    return _empty_qtensor(stack, shape, weights), bias


def _empty_qtensor(stack: tuple[int, ...], shape: tuple[int, int], weights: WeightFormat) -> QTensor:
    layout = LAYOUTS[weights.layout_for(shape)]
    codes, blocks = layout.codes_shape(shape), layout.constants_shape(shape, weights.block_size)
    num_blocks = math.prod(blocks)
    nested = -(-num_blocks // weights.nested_block_size)
    f32, u8, double = jnp.float32, jnp.uint8, weights.double_quant
    return QTensor(
        codes=jnp.zeros((*stack, *codes), u8),
        absmax=None if double else jnp.zeros((*stack, *blocks), f32),
        absmax_codes=jnp.zeros((*stack, *blocks), u8) if double else None,
        nested_absmax=jnp.zeros((*stack, nested), f32) if double else None,
        nested_offset=jnp.zeros(stack, f32) if double else None,
        quant_type=str(weights.quant_type),
        block_size=weights.block_size,
        nested_block_size=weights.nested_block_size,
        shape=shape,
        dtype=weights.dtype,
        layout=weights.layout_for(shape),
    )
