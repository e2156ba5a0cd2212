"""Parameters after an update, and the norm and clipping of gradients before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from qlora_jax.sharding import FSDP, cut_axis


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


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.clip_by_global_norm(max_norm)`, whose `update` also takes the global norm as `norm`.

    Without `norm` it is computed from the gradients given. Those of a page, or of one device's part, have another norm
    than all gradients.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, *, norm: jax.Array | None = None, **_: object
    ) -> tuple[PyTree, PyTree]:
        return clipped(updates, optax.tree.norm(updates) if norm is None else norm, max_norm), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def clipped(grads: PyTree, norm: Float[Array, ""], max_norm: float) -> PyTree:
    """Clips bit for bit as optax.clip_by_global_norm does, with a known norm; a `max_norm` of 0 changes nothing."""
    if max_norm == 0:
        return grads
    small = norm < max_norm
    return jax.tree.map(lambda g: lax.select(small, g, (g / norm.astype(g.dtype)) * max_norm), grads)


def global_norm(grads: PyTree, specs: PyTree | None = None) -> Float[Array, ""]:
    """Computes the norm of all gradients, in f32.

    Inside shard_map, the sums of all parts are gathered and added in the same order on every device. So the norm has
    the same bits everywhere, and devices with the same parameters keep them the same.

    Args:
      grads: f32; inside shard_map, this device's parts.
      specs: how each leaf is cut; None outside shard_map.
    """
    if specs is None:
        return optax.tree.norm(grads)
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True))
    whole = _squares([leaf for leaf, spec in pairs if cut_axis(spec) is None])
    parts = [leaf for leaf, spec in pairs if cut_axis(spec) is not None]
    return jnp.sqrt(whole + jnp.sum(lax.all_gather(_squares(parts), FSDP)) if parts else whole)


def _squares(leaves: list[jax.Array]) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.norm(leaves, squared=True), jnp.float32)


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, P)
