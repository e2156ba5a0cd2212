"""The compiled programs of a run: its gradients, one per batch shape, and its forward passes."""

from collections.abc import Callable, Hashable, Mapping
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

from qlora_jax import runtime
from qlora_jax.models.partition import Lora, ModelParts
from qlora_jax.objectives.objective import Objective
from qlora_jax.sharding import AnyMesh
from qlora_jax.training.step import StepLoss, compared_outputs, evaluation_outputs
from qlora_jax.training.step_spec import AbstractLora, StepSpec

ForwardBatch = Mapping[str, np.ndarray | jax.Array | jax.ShapeDtypeStruct]  # [B, ...]; see `read_by_outputs`


class CompiledForward:
    """The forward passes of step.py for one run, compiled from shapes before any weight is read.

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


Shape = tuple[int, int, int]  # (A, B, T): accumulated micro-batches, rows, positions


class CompiledGradients:
    """`training.step.gradients` of one run, compiled from shapes before any weight is read.

    The compiler takes 300 MB and returns them before the weights or a step's scratch need memory. The peak of the
    process is therefore the largest of the three, not their sum. A new shape is compiled when its first batch arrives.

    Args:
      step: the run's step, for the longest batches; others have other shapes.

    Attributes:
      forward: the forward passes of the same model.
    """

    def __init__(self, step: StepSpec):
        self.step = step
        self.forward = CompiledForward(step.arrays.parts, step.mesh)
        self._compiled: dict[Shape, jax.stages.Compiled] = {}

    @property
    def trained(self) -> AbstractLora:
        """The tree of trained LoRA parameters with ShapeDtypeStructs as leaves."""
        return self.step.arrays.parts.trained

    @property
    def parts(self) -> ModelParts:
        """The model's parts with ShapeDtypeStructs as leaves."""
        return self.step.arrays.parts

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the rows and the model; None: one device."""
        return cast(Mesh | None, self.step.mesh)  # programs that run have a mesh of real devices

    @property
    def objective(self) -> Objective:
        """The loss, with those of routers."""
        return self.step.arrays.objective

    @property
    def is_random(self) -> bool:
        """True if the step takes a key, for dropout or noise."""
        return self.step.arrays.key is not None

    @property
    def is_scaled(self) -> bool:
        """True if the step takes a factor of the loss, in float16."""
        return self.step.arrays.scale is not None

    def __len__(self) -> int:
        """The number of compiled programs."""
        return len(self._compiled)

    def compiled(self, shape: Shape) -> jax.stages.Compiled:
        """Returns the program for batches of a shape (A, B, T), compiling it on first use."""
        if shape not in self._compiled:
            program, options = self.step.gradients(shape), self.step.compiler_options
            self._compiled[shape] = program.function.lower(*program.args, **program.kwargs).compile(options or None)
            runtime.give_memory_back()
        return self._compiled[shape]

    def __call__(
        self,
        parts: ModelParts,
        batch: Mapping[str, np.ndarray | jax.Array],
        key: jax.Array | None,
        scale: np.float32 | None = None,
    ) -> tuple[Lora, StepLoss]:
        """Returns (gradients, losses) of a batch; see `training.step.gradients`."""
        accumulated, rows, length = batch["inputs"].shape
        return self.compiled((accumulated, rows, length))(parts, batch, key, scale)
