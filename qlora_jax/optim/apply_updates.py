"""Parameters after an update, and gradients before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class NewValue(NamedTuple):
    """An update that is the new parameter itself: p + (new - p) may differ from `new` in the last bit."""

    value: jax.Array


def apply_updates[Tree](params: Tree, updates: object) -> Tree:
    """Applies updates as `optax.apply_updates` does; a `NewValue` replaces its parameter. Dtypes of `params` stay."""

    def apply(update: jax.Array | NewValue, param: jax.Array) -> jax.Array:
        if isinstance(update, NewValue):
            return update.value.astype(param.dtype)
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(optax.apply_updates(param, update))

    return jax.tree.map(apply, updates, params, is_leaf=lambda update: isinstance(update, NewValue))


def in_f32[Tree](tree: Tree) -> Tree:
    """Converts every leaf from f32 or bf16 to f32, in which norms, moments and updates are computed."""
    return jax.tree.map(_in_f32, tree)


def _in_f32(leaf: jax.Array) -> jax.Array:
    # `astype` would change norms: XLA on CPUs fuses it into a sum over bf16 if nothing else in the program reads the
    # converted array, and that sum adds in another order. Norms must have the same bits in every program.
    if leaf.dtype != jnp.bfloat16:
        return leaf.astype(jnp.float32)
    high = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(high << 16, jnp.float32)
