"""Stacks of experts' weights [S, E, ...]: their kinds, and one expert's weight as a matrix.

Dimension key: S layers, E experts, N out, K in.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import target_device
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import Leaf, QTensor
from pallas_kernels.frozen_product import Direction
from pallas_kernels.ggml_matmul import api as ggml
from pallas_kernels.ggml_matmul import cpu as ggml_cpu
from pallas_kernels.nf4_matmul import api as nf4
from pallas_kernels.nf4_matmul import cpu
from pallas_kernels.nf4_matmul.dispatch import Call

ExpertWeights = QTensor | GgmlTensor | jax.Array  # 4-bit, ggml's blocks, or dense [S, E, N, K]
Layer = Int[Array, ""] | int
Index = Int[Array, ""]


class Kind(NamedTuple):
    """A kind of weights; its functions take stacks of this kind.

    Attributes:
      shape: returns (N, K) of one expert.
      stack_shape: returns the leading axes.
      expert: (flat stack [S E, ...], index, dtype) -> the weight [N, K].
      product: (rows [C, K], flat stack, index) -> [C, N]; None if it would dequantize the weight.
      reads_codes: (flat stack, C, dtype) -> True if `product` of C rows multiplies without dequantizing the weight.
      problems: yields why a stack is malformed.
      call: (direction, rows, dtype, stack) -> the call that fused kernels may take; None if none takes this kind.
    """

    shape: Callable[[Leaf], tuple[int, ...]]
    stack_shape: Callable[[Leaf], tuple[int, ...]]
    expert: Callable[[Leaf, Index, DTypeLike], Float[Array, "N K"]]
    product: Callable[[Float[Array, "C K"], Leaf, Index], Float[Array, "C N"]] | None
    reads_codes: Callable[[Leaf, int, DTypeLike], bool]
    problems: Callable[[Leaf], Iterator[str]]
    call: Callable[[Direction, int, jnp.dtype, Leaf], Call] | None = None


def _quantized_expert(flat: QTensor, index: Index, dtype: DTypeLike) -> Float[Array, "N K"]:
    if _implementation("backward", flat, 1, dtype) == "cpu":
        return cpu.dequantize_layer(flat, index, dtype)
    return dequantize(flat.layer(index), dtype)


def _quantized_product(x_CK: Float[Array, "C K"], flat: QTensor, index: Index) -> Float[Array, "C N"]:
    return nf4.product("forward", x_CK, flat, index)


def _reads_codes(flat: QTensor, rows: int, dtype: DTypeLike) -> bool:
    chosen = _implementation("forward", flat, rows, dtype)
    return chosen == "cpu" and rows <= cpu.FEW_ROWS


def _implementation(direction: Direction, flat: QTensor, rows: int, dtype: DTypeLike) -> str | None:
    call = Call.of(direction, rows, jnp.dtype(dtype), flat)
    return nf4.choose_implementation(target_device(), call).name


def _ggml_expert(flat: GgmlTensor, index: Index, dtype: DTypeLike) -> Float[Array, "N K"]:
    chosen = ggml.choose_implementation(target_device(), str(jnp.dtype(dtype)))
    return ggml.IMPLEMENTATIONS[chosen].dequantize_layer(flat, index, dtype)


def _reads_blocks(flat: GgmlTensor, rows: int, dtype: DTypeLike) -> bool:
    chosen = ggml.choose_implementation(target_device(), str(jnp.dtype(dtype)))
    return chosen == "cpu" and rows <= ggml_cpu.FEW_ROWS


def _ggml_product(x_CK: Float[Array, "C K"], flat: GgmlTensor, index: Index) -> Float[Array, "C N"]:
    return ggml.product("forward", x_CK, flat, index)


def _dense_expert(flat: jax.Array, index: Index, dtype: DTypeLike) -> Float[Array, "N K"]:
    return jax.lax.dynamic_index_in_dim(flat, index, keepdims=False).astype(dtype)


KINDS: dict[type, Kind] = {
    QTensor: Kind(
        shape=lambda weights: weights.shape,
        stack_shape=lambda weights: weights.stack_shape,
        expert=_quantized_expert,
        product=_quantized_product,
        reads_codes=_reads_codes,
        problems=nf4.weights_problems,
        call=Call.of,
    ),
    GgmlTensor: Kind(
        shape=lambda weights: weights.shape,
        stack_shape=lambda weights: weights.stack_shape,
        expert=_ggml_expert,
        product=_ggml_product,
        reads_codes=_reads_blocks,
        problems=ggml.weights_problems,
    ),
}
DENSE = Kind(
    shape=lambda weights: weights.shape[2:],
    stack_shape=lambda weights: weights.shape[:2],
    expert=_dense_expert,
    product=None,
    reads_codes=lambda flat, rows, dtype: False,
    problems=lambda weights: iter(()),
)


def kind_of(weights: ExpertWeights) -> Kind:
    """Returns the kind of the weights; arrays, NumPy's and tracers included, are dense."""
    return KINDS.get(type(weights), DENSE)


def expert_shape(weights: ExpertWeights) -> tuple[int, int]:
    """Returns (N, K) of one expert."""
    rows, columns = kind_of(weights).shape(weights)
    return rows, columns


def flatten(weights: ExpertWeights) -> ExpertWeights:
    """Returns the same weights as one stack [S E, ...]; a view."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), weights)
