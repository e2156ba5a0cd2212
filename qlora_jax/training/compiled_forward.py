"""The compiled forward passes of a run, for its reference and its held-out rows, one per batch shape."""

from collections.abc import Callable, Hashable, Mapping

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.models.partition import ModelParts
from qlora_jax.objectives.objective import Objective
from qlora_jax.sharding import AnyMesh
from qlora_jax.training.forward import compared_outputs, evaluation_outputs

ForwardBatch = Mapping[str, np.ndarray | jax.Array | jax.ShapeDtypeStruct]  # [B, ...]; see `read_by_outputs`


class CompiledForward:
    """Programs of `training.evaluation.forward` for one run, compiled from shapes before any weight is read.

    A new shape is compiled when its first batch arrives.

    Args:
      parts: the model's parts with ShapeDtypeStructs as leaves.
      mesh: the devices that share the rows and the model; None: one device.
    """

    def __init__(self, parts: ModelParts, mesh: AnyMesh | None):
        self._parts, self._mesh = parts, mesh
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}

    def outputs(self, objective: Objective, batch: ForwardBatch) -> jax.stages.Compiled:
        """Returns `evaluation_outputs` for batches of this shape: a function of (parts, batch)."""
        return self._program(evaluation_outputs.lower, self._parts, batch, objective=objective)

    def comparison(self, batch: ForwardBatch) -> jax.stages.Compiled:
        """Returns `compared_outputs` for batches of this shape: a function of (both parts, batch)."""
        return self._program(compared_outputs.lower, (self._parts, self._parts), batch)

    def _program(
        self,
        lower: Callable[..., jax.stages.Lowered],
        model: ModelParts | tuple[ModelParts, ModelParts],
        batch: ForwardBatch,
        **static: Hashable,
    ) -> jax.stages.Compiled:
        key = (lower, *static.values(), *sorted((name, array.shape) for name, array in batch.items()))
        if key not in self._compiled:
            lowered = lower(model, dict(batch), mesh=self._mesh, **static)
            self._compiled[key] = lowered.compile()
            runtime.give_memory_back()
        return self._compiled[key]
