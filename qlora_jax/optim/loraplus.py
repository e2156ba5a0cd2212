"""LoRA+ (Hayou et al., 2024, arXiv 2402.12354): B trains at a multiple of the learning rate of A."""

import functools
from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree

from qlora_jax.config.methods import METHODS

# Parameters -> the factor of the learning rate of each leaf.
Factors = Callable[[PyTree], PyTree]


def rate_factors(ratio: float | None) -> Factors | None:
    """Returns the factors of LoRA+ with this ratio; None without LoRA+.

    The multiplied rate is that of a method's fast leaves, as in peft.optimizers.create_loraplus_optimizer.
    """
    if ratio is None:
        return None
    fast = {leaf for _, declared in METHODS.items() for leaf in declared.fast_leaves}

    def factor(path: jax.tree_util.KeyPath, leaf: object) -> float:
        return ratio if getattr(path[-1], "key", None) in fast else 1.0

    return functools.partial(jax.tree_util.tree_map_with_path, factor)


def scale_updates(transform: optax.GradientTransformation, factors: Factors | None) -> optax.GradientTransformation:
    """Multiplies updates, which are proportional to the learning rate, by the factor of each leaf."""
    if factors is None:
        return transform

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        updates, state = transform.update(updates, state, params)
        return jax.tree.map(lambda factor, leaf: leaf * factor, factors(updates), updates), state

    return optax.GradientTransformation(transform.init, update)
