"""The block constants of one layer in the form that the kernels read: one per row and run of 64 columns.

XLA expands them before the kernel, for one layer. Nested dequantization then costs one look-up and multiply-add per 64
weights, which a kernel would repeat in each of its tiles. The codes, 32 times larger, are never sliced outside of a
kernel. Dimension key: N out, K in, G = K / block_size, P = ceil(K / 128).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.formats.dequantize import expand_absmax
from pallas_kernels.formats.layouts import RUN
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul.dispatch import Layer


def expanded_scales(weights: QTensor, layer: Layer, dtype: DTypeLike) -> Float[Array, "*E runs N"]:
    """Returns scales[r, n], the constant of the block of (n, 64 r), rounded once to `dtype`: [2P, N], 0 past K.

    `weights` has layout `split_k`: one weight (`layer` None), or a stack and the index of a layer. If a layer has
    several experts, so have the scales: [E, 2P, N].
    """
    assert weights.layout == "split_k"
    with jax.named_scope("expanded_scales"):
        # Without the codes: slicing them could copy a layer.
        constants = dataclasses.replace(weights, codes=None)
        absmax_GN = expand_absmax(constants if layer is None else constants.layer(layer))
        scales = jnp.repeat(absmax_GN, weights.block_size // RUN, axis=-2).astype(dtype)
        return jnp.pad(scales, (*[(0, 0)] * (scales.ndim - 2), (0, scales.shape[-2] % 2), (0, 0)))
