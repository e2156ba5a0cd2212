"""The reference pass of a run in its plan: rows, operations, and memory of its program and its values."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import aot
from qlora_jax import runtime
from qlora_jax.config import Config
from qlora_jax.config.sizes import format_bytes
from qlora_jax.data.report.stats import SplitReport
from qlora_jax.sharding import ROWS, part_bytes
from qlora_jax.training.abstract_step import abstract_batch
from qlora_jax.training.compiled_step import CompiledGradients
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.metrics.mfu import Utilization, utilization
from qlora_jax.training.objectives.objective import needs_reference, read_by_outputs
from qlora_jax.training.run_mesh import rows_of_batch
from qlora_jax.training.session import Inputs, weights_of
from qlora_jax.training.step import evaluation_outputs

F32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePlan:
    """The pass over all rows before the first step.

    Attributes:
      rows: training rows and held-out rows.
      tokens: their positions, without padding.
      flops: model FLOP.
      epochs: `flops` relative to those of an epoch of training.
      program: bytes of its largest batch, outputs and temporary buffers on a device.
      values: bytes of its results in host memory.
    """

    rows: int
    tokens: int
    flops: int
    epochs: float
    program: int
    values: int

    def __str__(self) -> str:
        """Returns it as text for people."""
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.flops:.2g} FLOP, those of {self.epochs:.2f} epochs; "
            f"{format_bytes(self.values)} of values"
        )


def plan_reference(config: Config, inputs: Inputs, gradients: CompiledGradients) -> ReferencePlan | None:
    """Plans the pass and compiles its program for the longest rows; returns None for an objective without reference."""
    if not needs_reference(inputs.objective):
        return None
    dataset = inputs.dataset
    splits = [split for split in (dataset.report.train, dataset.report.eval) if split is not None]
    rows = sum(split.kept for split in splits)
    step = StepShape(
        model=inputs.model,
        weights=weights_of(config, inputs),
        lora=config.lora,
        batch=(1, 1, 1),
        remat=config.train.remat,
        new_tokens=len(inputs.new_ids),
    )
    forward = utilization(step, None, backward=False)
    flops = sum(_flops(forward, split) for split in splits)
    return ReferencePlan(
        rows=rows,
        tokens=sum(split.tokens for split in splits),
        flops=flops,
        epochs=flops / _flops(utilization(step, None), splits[0]),
        program=_program_bytes(config, inputs, gradients),
        values=F32 * rows * inputs.objective.sequences_per_row,
    )


def _flops(counted: Utilization, split: SplitReport) -> int:
    """Returns the FLOP of all rows of a split, each once."""
    lengths = np.repeat(*(np.array([*each], np.int64) for each in (split.lengths.keys(), split.lengths.values())))
    scale = split.tokens / max(1, int(lengths.sum()))  # lengths are those before truncation
    return int(scale * counted.flops(lengths.reshape(1, -1, 1), 0)) + split.supervised * counted.target


def _program_bytes(config: Config, inputs: Inputs, gradients: CompiledGradients) -> int:
    batch = _batch(config, inputs, gradients.mesh)
    lowered = evaluation_outputs.lower(gradients.parts, batch, objective=inputs.objective, mesh=gradients.mesh)
    memory = aot.read_memory(lowered.compile().memory_analysis()).device
    runtime.give_memory_back()
    return part_bytes(batch) + memory.temporaries + memory.outputs - memory.aliases


def _batch(config: Config, inputs: Inputs, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays of the pass's longest batch, [B, T] and [B, S]."""
    shape = (1, rows_of_batch(config, mesh), max(inputs.dataset.eval_buckets))
    arrays = read_by_outputs(
        abstract_batch(shape, inputs.objective, branching=inputs.dataset.branching), inputs.objective
    )
    sharding = None if mesh is None else NamedSharding(mesh, P(ROWS))
    return {
        name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype, sharding=sharding) for name, array in arrays.items()
    }
