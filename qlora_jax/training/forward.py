"""Forward passes without gradients: held-out evaluation and the reference pass.

Dimension key: B rows of a batch, T positions, M = B T, D embed.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from qlora_jax.inference.mesh_inference import run_on_mesh
from qlora_jax.models.partition import ModelFunction, ModelParts, combine
from qlora_jax.objectives.objective import Objective
from qlora_jax.objectives.sequences import ComparedLogps, compared_logps
from qlora_jax.objectives.sft import SUPERVISED
from qlora_jax.sharding import AnyMesh, gather_rows
from qlora_jax.training.step import row_outputs, text_separation


@functools.partial(ModelFunction, static_argnames="mesh")
def evaluation_loss(
    parts: ModelParts, batch: dict[str, jax.Array], *, mesh: AnyMesh | None = None
) -> Float[Array, " B"]:
    """Returns each row's sum of losses in nats, without dropout; `batch` as in `step.gradients`, without the axis A."""
    return _forward(SUPERVISED, parts, batch, mesh)


@functools.partial(ModelFunction, static_argnames=("objective", "mesh"))
def evaluation_outputs(
    parts: ModelParts, batch: dict[str, jax.Array], *, objective: Objective, mesh: AnyMesh | None = None
) -> PyTree:
    """Returns the objective's outputs for each row, without dropout; `batch` is as in `evaluation_loss`."""
    return _forward(objective, parts, batch, mesh)


def _forward(objective: Objective, parts: ModelParts, batch: dict[str, jax.Array], mesh: AnyMesh | None) -> PyTree:
    def outputs(parts: ModelParts, batch: dict[str, jax.Array]) -> PyTree:
        return row_outputs(objective, combine(parts), batch, remat="none", keys_B=None)

    return _of_all_rows(outputs, parts, batch, mesh)


@functools.partial(ModelFunction, static_argnames="mesh")
def compared_outputs(
    both: tuple[ModelParts, ModelParts], batch: dict[str, jax.Array], *, mesh: AnyMesh | None = None
) -> ComparedLogps:
    """Returns log p of each row's sequences and their divergence from a reference, without dropout.

    Args:
      both: the model and its reference.
      batch: as in `evaluation_loss`.
    """

    def outputs(both: tuple[ModelParts, ModelParts], batch: dict[str, jax.Array]) -> ComparedLogps:
        model, reference = (combine(parts) for parts in both)
        how = {"remat": "none", "keys_B": None, **text_separation(batch)}
        hidden_MD, reference_MD = (one.hidden(batch["inputs"], **how) for one in (model, reference))
        return compared_logps(model, hidden_MD, reference, reference_MD, batch)

    return _of_all_rows(outputs, both, batch, mesh)


def _of_all_rows(
    outputs: Callable[[PyTree, dict[str, jax.Array]], PyTree],
    parts: PyTree,
    batch: dict[str, jax.Array],
    mesh: AnyMesh | None,
) -> PyTree:
    """Returns the outputs of all rows on every device; `parts` are those of a model, or of several."""

    def per_device(parts: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        return jax.tree.map(lambda leaf: gather_rows(leaf, mesh, axis=0), outputs(parts, batch))

    return run_on_mesh(per_device, parts, (batch,), mesh, P())
