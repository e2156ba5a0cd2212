"""Gradients before, and parameters after an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Written(NamedTuple):
    """An update that is the new parameter. p + (new - p) would not be `new` to the last bit."""

    value: jax.Array


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates`; where an update is `Written`, the parameter becomes its value. Dtypes of `params` stay."""

    def apply(update: Any, param: jax.Array) -> Any:
        if isinstance(update, Written):
            return update.value.astype(param.dtype)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(param, update)

    return jax.tree.map(apply, updates, params, is_leaf=lambda update: isinstance(update, Written))


def in_f32(tree: Any) -> Any:
    """Every leaf, f32 or bf16, in f32, in which norms, moments and updates are computed."""
    return jax.tree.map(_in_f32, tree)


def _in_f32(leaf: jax.Array) -> jax.Array:
    # Not by `astype`: XLA on CPUs fuses that into a sum over bf16 in a program that has no other use of it, and adds up
    # in another order than where it does not. Norms are to be the same bits in every program.
    if leaf.dtype != jnp.bfloat16:
        return leaf.astype(jnp.float32)
    high = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(high << 16, jnp.float32)
