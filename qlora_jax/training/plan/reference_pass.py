"""The reference of a run in its plan: operations of the pass, and memory of programs, values and parameters."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import aot
from qlora_jax.config import TrainArgs
from qlora_jax.config.sizes import format_bytes
from qlora_jax.data.report.stats import DataReport, SplitReport
from qlora_jax.objectives.objective import needs_reference, read_by_outputs
from qlora_jax.sharding import ROWS, part_bytes
from qlora_jax.training.cost.memory_use import lora_bytes
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.device_mesh import MAX_ROWS, rows_of_batch, rows_that_divide
from qlora_jax.training.metrics.mfu import Utilization, utilization
from qlora_jax.training.plan.records import ACTIVATIONS, ReferencePlan, ReferenceWork
from qlora_jax.training.plan.step_memory import estimated_requirements
from qlora_jax.training.run_spec import RunSpec
from qlora_jax.training.step_spec import StepSpec, abstract_batch

F32 = 4


def plan_reference(run: RunSpec) -> ReferencePlan | None:
    """Plans the pass and compiles a program for the longest rows; returns None for an objective without reference."""
    inputs = run.inputs
    if not needs_reference(inputs.objective):
        return None
    step = StepShape(
        model=inputs.model,
        weights=run.step.weights,
        lora=run.config.lora,
        batch=(1, 1, 1),
        remat=run.config.train.remat,
        new_tokens=len(inputs.new_ids),
    )
    work = work_of_rows(step, inputs.dataset.report.train)
    values = F32 * work.rows * inputs.objective.sequences_per_row
    parameters = 0 if inputs.dataset.eval is None else part_bytes(run.gradients.parts.lora)
    program = parameters + _program_bytes(run)
    return ReferencePlan(work=work, program=program, values=values, parameters=parameters)


def work_of_rows(step: StepShape, rows: SplitReport) -> ReferenceWork:
    """Returns the work of the pass over the training rows."""
    flops = _flops(utilization(step, None, backward=False), rows)
    return ReferenceWork(rows.kept, rows.tokens, flops, flops / _flops(utilization(step, None), rows))


def work_without_rows(step: StepShape) -> ReferenceWork:
    """Returns the work relative to an epoch's, if all rows are as long as the step's and all targets supervised."""
    length = step.batch[2]
    forward, whole = (
        utilization(step, None, backward=backward).flops(np.full((1, 1, 1), length), length)
        for backward in (False, True)
    )
    return ReferenceWork(0, 0, 0, forward / whole)


class PlannedReference(NamedTuple):
    """The pass of a run that is planned before it has a model in memory.

    Fields:
      share: the part of the run's model FLOP that the pass takes; None if the run's epochs are not known.
      device: estimated bytes on the device, with the reference's adapter if held-out rows are compared with it.
    """

    work: ReferenceWork
    share: float | None
    device: int

    def __str__(self) -> str:
        """Returns it as text for people."""
        share = "" if self.share is None else f", {self.share:.0%} of the run's"
        return f"{self.work}{share}; about {format_bytes(self.device)} on the device"


def reference_of_step(config: StepSpec, report: DataReport | None, train: TrainArgs) -> PlannedReference | None:
    """Plans the pass of a run with this longest step; returns None for an objective without reference.

    Args:
      report: counts of the data; None if it is not known.
    """
    if not needs_reference(config.objective):
        return None
    step = config.sizes
    work = work_without_rows(step) if report is None else work_of_rows(step, report.train)
    epochs = train.epochs
    if train.steps is not None:
        epochs = None if report is None else train.steps / report.steps_per_epoch
    share = None if epochs is None else work.epochs / (work.epochs + epochs)
    parameters = lora_bytes(step) if config.compared else 0
    return PlannedReference(work, share, parameters + _estimated_bytes(config))


def _estimated_bytes(config: StepSpec) -> int:
    """Estimates the bytes of the pass on the device: a step's, without gradients and saved activations."""
    rows = rows_that_divide(min(MAX_ROWS, config.batch[1]), config.mesh)
    device = estimated_requirements(config.replace(batch=(1, rows, config.batch[2]))).device
    return sum(size for kind, size in device.items() if kind not in ("gradients", ACTIVATIONS))


def _flops(counted: Utilization, split: SplitReport) -> int:
    """Returns the FLOP of all rows of a split, each once."""
    lengths = np.repeat(*(np.array([*each], np.int64) for each in (split.lengths.keys(), split.lengths.values())))
    scale = split.tokens / max(1, int(lengths.sum()))  # lengths are those before truncation
    return int(scale * counted.flops(lengths.reshape(1, -1, 1), 0)) + split.supervised * counted.target


def _program_bytes(run: RunSpec) -> int:
    """Returns the bytes of the comparison with held-out rows, which includes the pass; otherwise those of the pass."""
    dataset, forward = run.inputs.dataset, run.gradients.forward
    batch, alone = forward_batch(run, max(dataset.eval_buckets)), dataset.eval is None
    program = forward.outputs(run.inputs.objective, batch) if alone else forward.comparison(batch)
    memory = aot.read_memory(program.memory_analysis()).device
    return part_bytes(batch) + memory.temporaries + memory.outputs - memory.aliases


def forward_batch(run: RunSpec, length: int, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays of a batch [B, T] and [B, S]; B is by default that of the reference pass and held-out rows."""
    shape, objective = (1, rows or rows_of_batch(run.config, run.mesh), length), run.inputs.objective
    arrays = read_by_outputs(abstract_batch(shape, objective, branching=run.inputs.branching), objective)
    sharding = None if run.mesh is None else NamedSharding(run.mesh, P(ROWS))
    return {
        name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype, sharding=sharding) for name, array in arrays.items()
    }
