"""Which memory each argument and result lies in: the card's, or the host's; and that JAX keeps it so.

On the mesh of a compile-only device JAX drops memory kinds without a word (such a device says that it has no memories);
on that mesh's abstract twin it keeps them. One argument has to be on the mesh itself, which tells what to compile for.
"""

from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

HOST = "pinned_host"
HOST_LAYOUT = "S(5)"  # what the layout of an array in host memory has in HLO


def on_host(tree: Any) -> Any:
    """The same pytree as arguments of compile_for that lie in the host's pinned memory.

    The function brings them over itself: `jax.device_put(x, jax.memory.Space.Device)`.
    """
    anywhere = AbstractMesh((1,), ("device",), (AxisType.Auto,))
    sharding = NamedSharding(anywhere, PartitionSpec(), memory_kind=HOST)
    return jax.tree.map(lambda leaf: _abstract(leaf, sharding), tree)


def place(tree: Any, device: Any) -> Any:
    """Array leaves as ShapeDtypeStructs on one device, or in its host's memory where they are `on_host`.

    Raises:
      ValueError: all of them are in host memory.
    """
    mesh = Mesh(np.array([device]), ("device",))
    on_card = NamedSharding(mesh, PartitionSpec())
    in_host = NamedSharding(mesh.abstract_mesh, PartitionSpec(), memory_kind=HOST)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]
    if arrays and all(map(_is_on_host, arrays)):
        raise ValueError("all array arguments are on_host; JAX needs one on the card to know what it compiles for")
    return jax.tree.map(lambda leaf: _abstract(leaf, in_host if _is_on_host(leaf) else on_card), tree)


def check_host_kept(traced: Any, text: str) -> None:
    """Raises RuntimeError unless the optimized HLO has as many arrays in host memory as the traced program says.

    Otherwise an offload that does not happen would pass for one that does.
    """
    jaxpr = traced.jaxpr.jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # jit gives XLA the used arguments only
    arguments = [variable for variable, is_used in zip(jaxpr.invars, used, strict=True) if is_used]
    wanted = (_count_host(arguments), _count_host(jaxpr.outvars))
    layout = text.split("\n", 1)[0].split("entry_computation_layout=", 1)[1]
    found = tuple(part.count(HOST_LAYOUT) for part in layout.split("->", 1))
    if found != wanted:
        raise RuntimeError(
            f"the program has {wanted} (arguments, results) in host memory, JAX compiled it with {found}: memory kinds "
            "were dropped, so its bytes on the card are not to be believed"
        )


def _count_host(variables: list[Any]) -> int:
    return sum(getattr(variable.aval, "memory_space", None) == jax.memory.Space.Host for variable in variables)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_on_host(leaf: Any) -> bool:
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def _abstract(leaf: Any, sharding: NamedSharding) -> Any:
    if not _is_array(leaf):
        return leaf
    weak_type = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak_type)
