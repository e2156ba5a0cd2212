"""Leaves out meshes that do not cut a model's frozen weights, so that each device would hold them whole."""

from collections.abc import Sequence

from qlora_jax.config import ConfigError
from qlora_jax.models.config import QUANTIZED, STORED
from qlora_jax.sharding import DATA, FSDP, absent_mesh, axis_size
from qlora_jax.training.cost.memory_use import frozen_bytes
from qlora_jax.training.cost.trees import CODES
from qlora_jax.training.plan.requirements import StepConfig

LARGEST = 16  # value of mesh.fsdp to propose


def usable_meshes(steps: Sequence[StepConfig]) -> list[StepConfig]:
    """Returns the steps whose mesh cuts the model's weights, or needs no cut.

    Raises:
      ConfigError: there are none; with the values of mesh.fsdp that cut them.
    """
    usable = [step for step in steps if not width_problems(step)]
    if not usable:
        raise ConfigError(width_problems(steps[0]))
    return usable


def width_problems(step: StepConfig) -> list[str]:
    """Describes why a mesh does not cut a model's weights: at most one line."""
    fsdp = axis_size(step.mesh, FSDP)
    if fsdp == 1:
        return []
    if whole := _whole_weights(step):
        return [f"mesh.fsdp: found {fsdp}, which does not divide {', '.join(whole)}. {_fix(step)}"]
    if not _is_cut(step):
        return [
            f"mesh.fsdp: found {fsdp}, which divides neither a 4-bit weight nor a table of this model. {_fix(step)}"
        ]
    return []


def _whole_weights(step: StepConfig) -> list[str]:
    """Describes the 4-bit projections of which each device would hold all codes, with their outputs x inputs."""
    shape, weights = step.step_shape(), step.weights
    if weights.quant_type == STORED:
        return []
    whole = {leaf.name for kind, leaf in shape.trees.frozen(step.mesh) if kind == CODES and not leaf.is_cut}
    names = [name for name in whole if {*weights.formats(name, shape.layers(name))} == {QUANTIZED}]
    found = {name: size for name, size in shape.matrices() if name in names}
    return [f"{name.rpartition('.')[2]} ({n:,} x {k:,})" for name, (n, k) in found.items()]


def _is_cut(step: StepConfig) -> bool:
    """Returns True if a device has less than all codes and tables."""
    return _codes_and_tables(step) != _codes_and_tables(step.replace(mesh=None))


def _codes_and_tables(step: StepConfig) -> tuple[int, int]:
    found = frozen_bytes(step.step_shape())
    return found["codes"], found["tables"]


def _fix(step: StepConfig) -> str:
    cut = {n: step.replace(mesh=absent_mesh(1, n)) for n in range(2, LARGEST + 1)}
    values = [n for n, other in cut.items() if _is_cut(other) and not _whole_weights(other)]
    of_model = f"Set mesh.fsdp to one of {', '.join(map(str, values))}, or" if values else "Set"
    devices = axis_size(step.mesh, DATA, FSDP)
    return f"{of_model} mesh.fsdp=1 and mesh.data={devices} to share only the rows"
