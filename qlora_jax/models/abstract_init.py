"""Placeholders of frozen leaves, for `nnx.eval_shape` before any weight is loaded."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.formats.ggml_blocks import nvfp4_type
from pallas_kernels.formats.ggml_tensor import GgmlTensor, block_layout, held_bytes
from pallas_kernels.formats.layouts import LAYOUTS
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.models.config import DENSE, NVFP4, QUANTIZED, WeightFormat
from qlora_jax.nn.frozen_weight import MixedStack, PaddedStack, Part
from qlora_jax.nn.linear import Weight


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
    return _leaf(name, (stack,), shape, weights), bias


def frozen_expert_leaves(
    name: str, stack: tuple[int, int], shape: tuple[int, int], has_bias: bool, weights: WeightFormat
) -> tuple[Weight, jax.Array | None]:
    """Returns zeros as (weight, bias) of one projection of all experts.

    Args:
      name: name within a layer, such as `mlp.experts.up_proj`.
      stack: numbers of sparse layers S and of experts E.
      shape: (N, K) of one expert.
      has_bias: True for a bias [S, E, N].
    """
    bias = jnp.zeros((*stack, shape[0]), weights.dtype) if has_bias else None
    formats = weights.formats(name, stack[0])
    if weights.experts_on_host and len(set(formats)) > 1:
        return PaddedStack.zeros(formats, stack[1], shape, weights.dtype), bias
    return _leaf(name, stack, shape, weights), bias


def _leaf(name: str, stack: tuple[int, ...], shape: tuple[int, int], weights: WeightFormat) -> Part | MixedStack:
    """Returns zeros of a stack, whose layers may have several formats."""
    parts = weights.parts(name, stack[0])
    leaves = tuple(_empty(kind, (len(layers), *stack[1:]), shape, weights) for kind, layers in parts.items())
    return leaves[0] if len(leaves) == 1 else MixedStack(parts=leaves, layers=tuple(parts.values()))


def _empty(kind: str, stack: tuple[int, ...], shape: tuple[int, int], weights: WeightFormat) -> Part:
    """Returns zeros of a stack of one format."""
    if kind == DENSE:
        return jnp.zeros((*stack, *shape), weights.dtype)
    if kind == QUANTIZED and weights.quant_type == NVFP4:
        kind = nvfp4_type(shape[1], inverse=True)
    elif kind == QUANTIZED:
        return _empty_qtensor(stack, shape, weights)
    layout = block_layout(weights.platform, kind, shape)
    codes = jnp.zeros((*stack, shape[0], held_bytes(layout, kind, shape[1])), jnp.uint8)
    return GgmlTensor(codes=codes, ggml_type=kind, shape=shape, dtype=weights.dtype, layout=layout)


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
