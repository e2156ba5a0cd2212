"""The compiled programs of a run, one for each shape of batch."""

import dataclasses
from typing import Any

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.models.partition import Lora, ModelParts
from qlora_jax.training.abstract_step import AbstractStep, abstract_batch
from qlora_jax.training.step import StepLoss

Shape = tuple[int, int, int]  # (A, B, T)


class CompiledGradients:
    """`training.step.gradients` of one run, compiled from shapes alone, so before any weight is read.

    The compiler takes 300 MB, which it gives back before the weights or a step's scratch want them: the most that a
    process holds is the largest of the three, not their sum. A shape that was not foreseen is compiled when it comes.

    Args:
      step: of the run; its batch's shape does not matter.
    """

    def __init__(self, step: AbstractStep):
        self._step = step
        self._compiled: dict[Shape, Any] = {}

    @property
    def lora(self) -> Any:
        """The LoRA parameters' tree, its leaves ShapeDtypeStructs."""
        return self._step.parts.lora

    @property
    def parts(self) -> ModelParts:
        """The model's parts, their leaves ShapeDtypeStructs."""
        return self._step.parts

    def __len__(self) -> int:
        """How many programs were compiled."""
        return len(self._compiled)

    def compiled(self, shape: Shape) -> Any:
        """The program for batches of a shape (A, B, T), a `jax.stages.Compiled`."""
        if shape not in self._compiled:
            program = dataclasses.replace(
                self._step, batch=abstract_batch(*shape, packed="segments" in self._step.batch)
            ).gradients()
            self._compiled[shape] = program.function.lower(*program.args, **program.kwargs).compile()
            runtime.give_memory_back()
        return self._compiled[shape]

    def __call__(self, parts: ModelParts, batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[Lora, StepLoss]:
        """(gradients, losses) of a step's batch."""
        accumulated, rows, length = batch["inputs"].shape
        return self.compiled((accumulated, rows, length))(parts, batch, key)
