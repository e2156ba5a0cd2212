"""LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): A stays at its initial value, and B trains.

Dimension key: B rows of the batch, M tokens, K in, N out, R rank.
"""

import functools

import jax
from jaxtyping import Array, Float, Key

from qlora_jax.config import LoraArgs
from qlora_jax.methods.lora import LowRankMethod, LowRankStart
from qlora_jax.methods.method import Given
from qlora_jax.nn.lora import LoRA, backward, forward
from qlora_jax.nn.variables import TrainedLeaf


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


class LoRAFAMethod(LowRankMethod):
    """LoRA-FA on projections."""

    trains_a = False

    def adapter(self, start: LowRankStart, spec: LoraArgs, given: Given) -> LoRAFA:
        """Returns the adapter of one projection."""
        return LoRAFA(start.lora_a, start.lora_b, start.scaling, spec.dropout, start.layers)


METHOD = LoRAFAMethod()
