"""NEFTune (Jain et al., 2023, arXiv 2310.05914): uniform noise on the embeddings of a training step.

Dimension key: B rows of the batch, T positions, M = B T, D embed.
"""

import math

import jax
from jaxtyping import Array, Float, Key


def add_noise(x_MD: Float[Array, "M D"], alpha: float, keys_B: Key[Array, " B"]) -> Float[Array, "M D"]:
    """Adds noise that is uniform in +-alpha / sqrt(T D), as transformers does.

    T counts padding. The noise is drawn in f32 and rounded to x's dtype.

    Args:
      keys_B: the key of each row of the batch; M is a multiple of B.
    """
    shape_TD = (x_MD.shape[0] // keys_B.shape[0], x_MD.shape[1])
    bound = alpha / math.sqrt(math.prod(shape_TD))
    noise_BTD = jax.vmap(lambda key: jax.random.uniform(key, shape_TD, minval=-bound, maxval=bound))(keys_B)
    return x_MD + noise_BTD.reshape(x_MD.shape).astype(x_MD.dtype)
