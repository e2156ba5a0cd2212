"""Leaves out meshes that would cut none of a model's frozen weights, so that each device would hold all of them."""

from collections.abc import Sequence

from qlora_jax.config import ConfigError
from qlora_jax.sharding import DATA, FSDP, absent_mesh, axis_size
from qlora_jax.training.cost.memory_use import frozen_bytes
from qlora_jax.training.plan.requirements import StepConfig

LARGEST = 16  # value of mesh.fsdp to propose


def usable_meshes(steps: Sequence[StepConfig]) -> list[StepConfig]:
    """Returns the steps whose mesh cuts the model's weights, or needs no cut.

    Raises:
      ConfigError: there are none; with the values of mesh.fsdp that cut most.
    """
    usable = [step for step in steps if axis_size(step.mesh, FSDP) == 1 or _is_cut(step)]
    if not usable:
        raise ConfigError([_problem(steps[0])])
    return usable


def _is_cut(step: StepConfig) -> bool:
    """Returns True if a device has less than all 4-bit codes and tables."""
    return _codes_and_tables(step) != _codes_and_tables(step.replace(mesh=None))


def _codes_and_tables(step: StepConfig) -> tuple[int, int]:
    found = frozen_bytes(step.step_shape())
    return found["codes"], found["tables"]


def _problem(step: StepConfig) -> str:
    fsdp, data = axis_size(step.mesh, FSDP), axis_size(step.mesh, DATA)
    found = f"mesh.fsdp: found {fsdp}, which divides neither a 4-bit weight nor a table of this model"
    values = _values_that_cut(step)
    fix = f"Set mesh.fsdp to one of {', '.join(map(str, values))}, or" if values else "Set"
    return (
        f"{found}, so each device would hold the whole model. {fix} mesh.fsdp=1 and mesh.data={data * fsdp} to share "
        "the rows alone"
    )


def _values_that_cut(step: StepConfig) -> list[int]:
    """Returns the values of mesh.fsdp that cut all 4-bit weights; those that cut any if none cuts all."""
    cut = {n: step.replace(mesh=absent_mesh(1, n)) for n in range(2, LARGEST + 1)}
    codes, _ = _codes_and_tables(step.replace(mesh=None))
    every = [n for n, other in cut.items() if _codes_and_tables(other)[0] * n == codes]
    return every or [n for n, other in cut.items() if _is_cut(other)]
