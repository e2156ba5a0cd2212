"""Random stacks of experts, choices of experts, and the oracle: a loop over experts in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml
from pallas_kernels.formats.qtensor import QTensor
from tests.pallas_kernels.nf4_matmul.contract import weight


def quantized(layers, experts, shape, **form):
    """Makes a QTensor [layers, experts, ...] of different weights."""
    made = [weight(shape, seed=seed, **form) for seed in range(layers * experts)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(layers, experts, *leaves[0].shape), *made)


def dense(weights):
    """Returns the weights [layers, experts, N, K] in NumPy, in float32."""
    if isinstance(weights, GgmlTensor):
        return np.asarray(dequantize_ggml(weights, jnp.float32))
    if isinstance(weights, QTensor):
        return dequantize_numpy(jax.tree.map(np.asarray, weights), np.float32)
    return np.asarray(weights)


def choices(tokens, choices, experts, pattern="random"):
    """Makes experts_Mk: different experts per token, as a router chooses them."""
    rng = np.random.default_rng(tokens * experts + choices)
    if pattern == "all to one":
        return np.full((tokens, choices), experts - 1, np.int32)
    among = np.arange(0, experts, 2) if pattern == "empty experts" else np.arange(experts)
    return np.stack([rng.permutation(among)[:choices] for _ in range(tokens)]).astype(np.int32)


def random_rows(*shape, dtype=jnp.float32, seed=3):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def mixture(x_MK, w_ENK, experts_Mk, weights_Mk):
    """Computes sum_j weights[m, j] w[experts[m, j]] x[m] in float64, expert by expert."""
    x, w, of_choice = (np.asarray(array, np.float64) for array in (x_MK, w_ENK, weights_Mk))
    y_MN = np.zeros((len(x), w.shape[1]))
    for expert in range(len(w)):
        token, choice = np.nonzero(experts_Mk == expert)
        np.add.at(y_MN, token, of_choice[token, choice][:, None] * (x[token] @ w[expert].T))
    return y_MN
