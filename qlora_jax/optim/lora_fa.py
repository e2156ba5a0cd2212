"""LoRA-FA's correction of the gradient of B (Zhang et al., 2023, arXiv 2308.03303), as in PEFT's optimizer.

With A fixed, the change of W that is nearest to that of full finetuning is reached with (A^T A)^-1 dB / scaling^2 in
place of dB.

Dimension key: L layers, K in, N out, R rank.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from qlora_jax.optim.apply_updates import in_f32

DAMPING = 1e-8  # added to the diagonal of A^T A, as in peft.optimizers.LoraFAOptimizer


def correction(lora_a: Float[Array, "L K R"], scaling: float) -> Float[Array, "L R R"]:
    """Computes (A^T A)^-1 / scaling^2 of each layer, in f32; a pseudo-inverse if A does not have full rank."""
    a_LKR = in_f32(lora_a)
    gram_LRR = jnp.einsum("lkr,lks->lrs", a_LKR, a_LKR, precision=jax.lax.Precision.HIGHEST)
    damped_LRR = gram_LRR + DAMPING * jnp.eye(gram_LRR.shape[1], dtype=jnp.float32)[None]
    return jnp.linalg.pinv(damped_LRR, hermitian=True) / scaling**2


def correct(grads: PyTree, corrections: Mapping[str, Float[Array, "L R R"]]) -> PyTree:
    """Multiplies the gradient of each B by its module's correction, in f32.

    Args:
      grads: {module: {"lora_b": [L, R, N]}}, and leaves of other modules, which stay as they are.
    """

    def one(correction_LRR: jax.Array, grad_LRN: jax.Array) -> jax.Array:
        product = jnp.einsum("lrs,lsn->lrn", correction_LRR, in_f32(grad_LRN), precision=jax.lax.Precision.HIGHEST)
        return product.astype(grad_LRN.dtype)

    return {
        name: leaves | {"lora_b": one(corrections[name], leaves["lora_b"])} if name in corrections else leaves
        for name, leaves in grads.items()
    }
