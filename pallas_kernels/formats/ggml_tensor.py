"""GgmlTensor: a weight in the bytes of blocks, of ggml or of other files' codes, as a pytree, and its dequantization.

Dimension key: N out, K in; `...` stacked layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.formats.qtensor import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgmlTensor:
    """A weight in codes that a file stores (GGUF, NVFP4, FP8, groups of integers): the bytes of its blocks, along K.

    Leaf:
      codes: uint8 [..., N, bytes per row], rows in the order of Hugging Face; leading axes are stacked layers, or
        layers and experts.
    Static:
      ggml_type: a key of BLOCK_FORMATS.
      shape: (N, K) of one weight.
      dtype: name of the compute dtype.

    Nothing is validated here, because the leaf may be a tracer or a ShapeDtypeStruct. Constructors validate.
    """

    codes: Leaf
    ggml_type: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes: (layers,) of a stack, () of a single weight."""
        return tuple(self.codes.shape[:-2])

    @property
    def nbytes(self) -> int:
        """The bytes of the codes."""
        return math.prod(self.codes.shape)

    def layer(self, index: int | jax.Array) -> "GgmlTensor":
        """Returns the weight of one layer of a stack; `index` may be traced."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)


def dequantize_ggml(weight: GgmlTensor, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns the weights, computed in f32 as ggml does and then cast to `dtype` (default: the compute dtype).

    The result has shape [..., N, K], with the leading axes of a stack. For one layer, pass `weight.layer(i)`.
    """
    block = BLOCK_FORMATS[weight.ggml_type]
    with jax.named_scope("dequantize"):
        codes = jnp.asarray(weight.codes)
        blocks = codes.reshape(*codes.shape[:-1], -1, block.nbytes)
        values = block.decode(blocks).astype(weight.dtype if dtype is None else dtype)
        return values.reshape(*codes.shape[:-1], weight.shape[-1])


def finite_scales(codes: np.ndarray, ggml_type: str) -> bool:
    """True if the scales of all blocks, and codes that may be none, are finite, so that all weights are.

    Args:
      codes: uint8 [..., bytes per row].
    """
    block = BLOCK_FORMATS[ggml_type]
    blocks = codes.reshape(-1, block.nbytes)
    runs = [*((at, block.half_type, 1) for at in block.halves), *block.floats]
    numbers = (np.ascontiguousarray(blocks[:, at : at + count * kind.itemsize]).view(kind) for at, kind, count in runs)
    return all(np.isfinite(each).all() for each in numbers)
