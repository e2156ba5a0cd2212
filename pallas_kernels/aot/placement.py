"""The memory of each argument and result, the card's or the host's, and checks that JAX preserves it.

On the mesh of a compile-only device, JAX silently drops memory kinds, because such a device reports no memories. On an
abstract mesh it preserves them. One argument must be on the concrete mesh, so that JAX knows the target.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.extend.core import Literal, Var
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

HOST = "pinned_host"
HOST_LAYOUT = "S(5)"  # in the HLO layout of an array in host memory
ONE_CARD = AbstractMesh((1,), ("device",), (AxisType.Auto,))


def on_host(tree: PyTree) -> PyTree:
    """Marks a pytree of arguments of compile_for as being in pinned host memory.

    The compiled function moves them itself: `jax.device_put(x, jax.memory.Space.Device)`.
    """
    sharding = NamedSharding(ONE_CARD, PartitionSpec(), memory_kind=HOST)
    return jax.tree.map(lambda leaf: _abstract(leaf, sharding), tree)


def mesh_of(tree: PyTree) -> AbstractMesh:
    """Returns the abstract mesh of the leaves' shardings; one card's if there is none.

    Raises:
      ValueError: there are several such meshes.
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    named = (one.mesh for one in shardings if isinstance(one, NamedSharding) and one.memory_kind != HOST)
    meshes = {mesh for mesh in named if isinstance(mesh, AbstractMesh)}
    if len(meshes) > 1:
        found = ", ".join(map(str, meshes))
        raise ValueError(f"array arguments are on several meshes (found {found}, expected one).")
    return next(iter(meshes), ONE_CARD)


def place(tree: PyTree, *devices: Any) -> PyTree:
    """Converts arrays to ShapeDtypeStructs on the devices of `mesh_of`, or in host memory if they are `on_host`.

    Raises:
      ValueError: all of them are in host memory.
    """
    like = mesh_of(tree)
    mesh = Mesh(np.array(devices).reshape(like.axis_sizes), like.axis_names, axis_types=like.axis_types)
    in_host = NamedSharding(mesh.abstract_mesh, PartitionSpec(), memory_kind=HOST)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]
    if arrays and all(map(_is_on_host, arrays)):
        raise ValueError(
            "all array arguments are on_host, but JAX derives the target from one on the card. Keep one there."
        )

    def placed(leaf):
        sharding = getattr(leaf, "sharding", None)
        spec = sharding.spec if _is_abstract(sharding) else PartitionSpec()
        return _abstract(leaf, in_host if _is_on_host(leaf) else NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree)


def check_host_kept(traced: jax.stages.Traced, text: str) -> None:
    """Raises RuntimeError unless the optimized HLO has in host memory the arrays that the traced program places there.

    Otherwise an offload that does not happen would go unnoticed.
    """
    jaxpr = traced.jaxpr.jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # jit passes only used arguments to XLA
    arguments = [variable for variable, is_used in zip(jaxpr.invars, used, strict=True) if is_used]
    wanted = (_count_host(arguments), _count_host(jaxpr.outvars))
    header = text.split("\n", 1)[0]
    in_host = _in_host(header)
    found = tuple(map(sum, in_host))
    if found[0] != wanted[0] or found[1] < wanted[1]:  # jit's out_shardings may have moved more results
        raise RuntimeError(
            f"the program has {wanted} (arguments, results) in host memory, JAX compiled it with {found}: memory kinds "
            "were dropped, so its bytes on the card are wrong."
        )
    _check_donations(header, *in_host)


def _in_host(header: str) -> tuple[list[bool], list[bool]]:
    """Returns, for each argument and result of the entry computation, True if its layout is in host memory."""
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->(.*?)\}(?:, \w+=|$)", header)
    assert layout is not None, header
    arguments, results = ([HOST_LAYOUT in shape for shape in part.split(", ")] for part in layout.groups())
    return arguments, results


def _check_donations(header: str, arguments: list[bool], results: list[bool]) -> None:
    """Raises RuntimeError if a donated argument's bytes are given to a result in the other memory.

    Unless JAX knows the memory of every argument and result, it matches donations by shape and dtype only, and XLA then
    puts the result where the argument was. On a real card jit's out_shardings supply that knowledge. Here nothing does,
    because arguments on a compile-only device have no memory kind.
    """
    for result, argument in re.findall(r"\{(\d*)\}: \((\d+), \{\}, \w+-alias\)", header):
        at = (int(argument), int(result or 0))
        if arguments[at[0]] != results[at[1]]:
            raise RuntimeError(
                f"JAX gives result {at[1]} the bytes of donated argument {at[0]} (of the used ones), but one is in "
                "host memory and the other on the card: do not donate that argument, or return the result that takes "
                "its place before other results of its shape and dtype."
            )


def _count_host(variables: Sequence[Var | Literal]) -> int:
    return sum(getattr(variable.aval, "memory_space", None) == jax.memory.Space.Host for variable in variables)


def _is_array(leaf: object) -> TypeGuard[jax.Array]:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_abstract(sharding: object) -> TypeGuard[NamedSharding]:
    return isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)


def _is_on_host(leaf: object) -> bool:
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def _abstract(leaf: object, sharding: NamedSharding) -> object:
    if not _is_array(leaf):
        return leaf
    weak_type = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak_type)
