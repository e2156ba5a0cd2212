"""Clipping by the global norm, which may be known before: it spans more than the gradients that are clipped at once."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from qlora_jax.sharding import FSDP, cut_axis


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
