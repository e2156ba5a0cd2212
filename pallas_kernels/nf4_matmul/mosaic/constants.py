"""The block constants of one layer as the kernels read them: one for each row and run of 64 columns.

They are made by XLA before the kernel, for one layer: nested dequantization costs a look-up and a multiply-add for each
64 weights there, once, where a kernel would repeat it in each of its tiles. The codes, 32 times their bytes, are never
sliced outside of a kernel. Dimension key: N out, K in, G = K / block_size, P = ceil(K / 128).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.formats.dequantize import expand_absmax
from pallas_kernels.formats.layouts import RUN
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul.dispatch import Layer


def expanded_scales(weights: QTensor, layer: Layer, dtype: Any) -> Float[Array, "runs N"]:
    """scales[r, n] = constant of the block that holds (n, 64 r), rounded once to dtype; 0 in the run past K. [2P, N].

    `weights` has layout `split_k`: one weight (`layer` None), or a stack and the index of the layer that is meant.
    """
    assert weights.layout == "split_k"
    with jax.named_scope("expanded_scales"):
        # Without the codes: a slice of them would be a copy of a layer where nothing removes it.
        constants = dataclasses.replace(weights, codes=None)
        absmax_GN = expand_absmax(constants if layer is None else constants.layer(layer))
        scales = jnp.repeat(absmax_GN, weights.block_size // RUN, axis=0).astype(dtype)
        return jnp.pad(scales, ((0, len(scales) % 2), (0, 0)))
