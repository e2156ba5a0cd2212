"""LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): A stays at its initial value, and B trains.

Dimension key: L layers, B rows of the batch, M tokens, K in, N out, R rank.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from qlora_jax.config import LoraArgs
from qlora_jax.methods.lora import LowRankMethod, LowRankStart
from qlora_jax.methods.method import Correction, Given, our_names
from qlora_jax.methods.targets import ranks_and_scalings
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import Lora
from qlora_jax.nn.lora import LoRA, backward, forward
from qlora_jax.nn.variables import TrainedLeaf
from qlora_jax.optim.updates import in_f32


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fixed_a_deltas(
    x_MK: Float[Array, "M K"],
    lora_a_KR: Float[Array, "K R"],
    lora_bs: tuple[Float[Array, "_ _"], ...],
    scalings: tuple[float, ...],
    dropout: float,
    keys_B: Key[Array, " B"] | None,
) -> tuple[Float[Array, "M _"], ...]:
    """Returns the result of `lora_deltas`. A has no gradient, so x is not saved for the backward pass."""
    return forward(x_MK, lora_a_KR, lora_bs, scalings, dropout, keys_B)[0]


def _forward(*args):
    ys, (_, *rest) = forward(*args)
    return ys, (None, *rest)


fixed_a_deltas.defvjp(_forward, backward)


class LoRAFA(LoRA):
    """LoRA in which only B trains."""

    LEAVES = (TrainedLeaf("lora_a", trained=False), TrainedLeaf("lora_b"))
    DELTAS = staticmethod(fixed_a_deltas)


DAMPING = 1e-8  # added to the diagonal of A^T A, as in peft.optimizers.LoraFAOptimizer


def inverse_gram(lora_a: Float[Array, "L K R"], scaling: float) -> Float[Array, "L R R"]:
    """Returns (A^T A)^-1 / scaling^2 of each layer, in f32; a pseudo-inverse if A does not have full rank.

    With A fixed, the change of W that is nearest to that of full finetuning is reached with (A^T A)^-1 dB / scaling^2
    in place of dB, as in PEFT's optimizer.
    """
    a_LKR = in_f32(lora_a)
    gram_LRR = jnp.einsum("lkr,lks->lrs", a_LKR, a_LKR, precision=jax.lax.Precision.HIGHEST)
    damped_LRR = gram_LRR + DAMPING * jnp.eye(gram_LRR.shape[1], dtype=jnp.float32)[None]
    return jnp.linalg.pinv(damped_LRR, hermitian=True) / scaling**2


def corrected(grads: Lora, inverse: Mapping[str, Float[Array, "L R R"]]) -> Lora:
    """Multiplies the gradient of each B by its module's matrix, in f32.

    Args:
      grads: {module: {"lora_b": [L, R, N]}}, and leaves of other modules, which stay as they are.
    """

    def one(inverse_LRR: jax.Array, grad_LRN: jax.Array) -> jax.Array:
        product = jnp.einsum("lrs,lsn->lrn", inverse_LRR, in_f32(grad_LRN), precision=jax.lax.Precision.HIGHEST)
        return product.astype(grad_LRN.dtype)

    return {
        name: leaves | {"lora_b": one(inverse[name], leaves["lora_b"])} if name in inverse else leaves
        for name, leaves in grads.items()
    }


class LoRAFAMethod(LowRankMethod):
    """LoRA-FA on projections."""

    trains_a, merged_products = False, 1

    def correction(self, config: ModelConfig, spec: LoraArgs) -> Correction:
        """Returns the multiplication of B's gradients by `inverse_gram`."""
        ours = our_names(config)
        scalings = {ours[name]: scaling for name, (_, scaling) in ranks_and_scalings(config, spec).items()}

        def compute(fixed: Lora) -> dict[str, jax.Array]:
            return {name: inverse_gram(leaves["lora_a"], scalings[name]) for name, leaves in fixed.items()}

        return Correction(compute, corrected)

    def adapter(self, start: LowRankStart, spec: LoraArgs, given: Given) -> LoRAFA:
        """Returns the adapter of one projection."""
        return LoRAFA(start.lora_a, start.lora_b, start.scaling, spec.dropout, start.layers)


METHOD = LoRAFAMethod()
