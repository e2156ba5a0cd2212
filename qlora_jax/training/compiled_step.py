"""The compiled programs of a run: its gradients, one per batch shape, and its forward passes."""

from collections.abc import Mapping
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

from qlora_jax import runtime
from qlora_jax.models.partition import Lora, ModelParts
from qlora_jax.objectives.objective import Objective
from qlora_jax.training.abstract_step import AbstractLora, AbstractStep
from qlora_jax.training.compiled_forward import CompiledForward
from qlora_jax.training.step import StepLoss

Shape = tuple[int, int, int]  # (A, B, T): accumulated micro-batches, rows, positions


class CompiledGradients:
    """`training.step.gradients` of one run, compiled from shapes before any weight is read.

    The compiler takes 300 MB and returns them before the weights or a step's scratch need memory. The peak of the
    process is therefore the largest of the three, not their sum. A new shape is compiled when its first batch arrives.

    Args:
      step: the run's step; its batch's shape is replaced.

    Attributes:
      forward: the forward passes of the same model.
    """

    def __init__(self, step: AbstractStep):
        self._step = step
        self.forward = CompiledForward(step.parts, step.mesh)
        self._compiled: dict[Shape, jax.stages.Compiled] = {}

    @property
    def trained(self) -> AbstractLora:
        """The tree of trained LoRA parameters with ShapeDtypeStructs as leaves."""
        return self._step.parts.trained

    @property
    def parts(self) -> ModelParts:
        """The model's parts with ShapeDtypeStructs as leaves."""
        return self._step.parts

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the rows and the model; None: one device."""
        return cast(Mesh | None, self._step.mesh)  # programs that run have a mesh of real devices

    @property
    def objective(self) -> Objective:
        """The loss, with those of routers."""
        return self._step.objective

    @property
    def is_random(self) -> bool:
        """True if the step takes a key, for dropout or noise."""
        return self._step.key is not None

    def __len__(self) -> int:
        """The number of compiled programs."""
        return len(self._compiled)

    def compiled(self, shape: Shape) -> jax.stages.Compiled:
        """Returns the program for batches of a shape (A, B, T), compiling it on first use."""
        if shape not in self._compiled:
            program, options = self._step.with_batch(shape).gradients(), self._step.compiler_options
            self._compiled[shape] = program.function.lower(*program.args, **program.kwargs).compile(options or None)
            runtime.give_memory_back()
        return self._compiled[shape]

    def __call__(
        self, parts: ModelParts, batch: Mapping[str, np.ndarray | jax.Array], key: jax.Array | None
    ) -> tuple[Lora, StepLoss]:
        """Returns (gradients, losses) of a batch; see `training.step.gradients`."""
        accumulated, rows, length = batch["inputs"].shape
        return self.compiled((accumulated, rows, length))(parts, batch, key)
