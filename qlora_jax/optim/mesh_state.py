"""The state of an optimizer on a mesh: moments are cut as their parameters are, counts are on every device."""

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from qlora_jax.optim.page_layout import state_owners
from qlora_jax.sharding import named


def state_specs(optimizer: optax.GradientTransformation, params: PyTree, specs: PyTree) -> PyTree:
    """Returns the PartitionSpec of every leaf of the state.

    Args:
      params: arrays, tracers or ShapeDtypeStructs, in whole shapes.
      specs: the PartitionSpecs of the parameters.
    """
    structure, _, owners = state_owners(optimizer, params)
    by_parameter = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    return jax.tree.unflatten(structure, [P() if owner is None else by_parameter[owner] for owner in owners])


def init_state(optimizer: optax.GradientTransformation, params: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Computes `optimizer.init(params)` on the mesh.

    The sharding of every leaf is given: a count does not depend on parameters, so JAX would place it on one device.
    """
    shardings = named(mesh, state_specs(optimizer, params, specs))
    return jax.jit(optimizer.init, out_shardings=shardings)(params)
