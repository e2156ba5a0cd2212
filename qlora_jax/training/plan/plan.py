"""The memory plan of a run: the requirements of its steps, whether they fit, and the nearest change that fits.

On a mesh, everything is that of one device.

At most MAX_COMPILES steps are compiled, because a large model's step takes most of a minute: the requested one, the
same at about half its length, and the proposed alternatives. Other numbers are interpolated and marked as such.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.config import plain_name
from qlora_jax.config.validate import uses
from qlora_jax.data.batching.buckets import UNIT
from qlora_jax.sharding import FSDP, AnyMesh, axis_size
from qlora_jax.training.plan.requirements import (
    CompileStep,
    Requirements,
    StepConfig,
    compiled_requirements,
    estimated_requirements,
    fitted_requirements,
)

MAX_COMPILES = 4
SCRATCH_ERROR = (0.2, 3.0)  # compiled scratch over estimated scratch, on the models of the tests and docs
MOST_ROWS = 256  # the largest micro-batch that is searched for

PAGE = "page the optimizer state to host memory"
LEANER = {
    "full": "recompute activations in the backward pass",
    "offload": "recompute activations, and offload the layers' inputs to host memory",
}  # policies of train.remat with less memory on the device, in order


class Change(NamedTuple):
    """A change of the configuration, its options, and the requirements with it."""

    description: str
    options: Mapping[str, str | int]
    requirements: Requirements


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The requirements of the requested step, and what would fit.

    Attributes:
      limit: bytes of the device that a step may use.
      requested: the requested step.
      other_paging: the same step with paging of the optimizer state switched on, or off if it was on.
      shorter: the step at the data's other lengths, longest first; at half and a quarter if those are not known.
      longest: the longest rows that fit, the rest as requested; None if none fit.
      largest: the largest micro-batch that fits at the requested length; None if not one row fits.
      change: the nearest change that fits; None if the requested step fits, or if no change does.
      more_devices: the smallest larger mesh that fits; None if the requested step fits, or if no such mesh does.
    """

    limit: int
    requested: Requirements
    other_paging: Requirements
    shorter: tuple[Requirements, ...]
    longest: Requirements | None
    largest: Requirements | None
    change: Change | None
    more_devices: Change | None = None

    @property
    def fits(self) -> bool:
        """True if the requested step fits."""
        return self.requested.total <= self.limit


class _Compiler:
    """Compiles at most MAX_COMPILES steps, and interpolates the others from them."""

    def __init__(self, compile_step: CompileStep | None):
        self._compile, self._left = compile_step, MAX_COMPILES
        self.known: list[Requirements] = []

    def compiled(self, config: StepConfig) -> Requirements:
        """Returns compiled requirements, or interpolated ones if the compilations are used up."""
        if self._compile is None or self._left == 0 or self._same_program(config):
            return self.interpolated(config)
        self._left -= 1
        self.known.append(compiled_requirements(config, self._compile))
        return self.known[-1]

    def interpolated(self, config: StepConfig) -> Requirements:
        """Returns requirements fitted to compiled steps, of the same remat policy if possible; else estimated ones.

        Paging changes no program: a step with the optimizer state elsewhere still counts as compiled.
        """
        if same := self._same_program(config):
            return dataclasses.replace(fitted_requirements(config, [same]), source=same.source)
        near = [need for need in self.known if need.config.mesh == config.mesh] or self.known
        alike = [need for need in near if need.config.remat == config.remat] or near
        return fitted_requirements(config, alike) if alike else estimated_requirements(config)

    def _same_program(self, config: StepConfig) -> Requirements | None:
        return next((need for need in self.known if _program(need.config) == _program(config)), None)


def _program(config: StepConfig) -> tuple[object, ...]:
    """Returns the changeable settings that the compiled step depends on."""
    return config.batch, config.remat, config.lora.dtype, plain_name(config.optim.name), config.mesh


def make_plan(
    config: StepConfig,
    limit: int,
    compile_step: CompileStep | None,
    buckets: Sequence[int] = (),
    larger: Sequence[AnyMesh] = (),
) -> Plan:
    """Plans a step under a limit in bytes.

    Args:
      compile_step: compiles for the device; None makes every number an estimate.
      buckets: the lengths of batches, of which the step's length is the longest; empty if they are not known.
      larger: meshes of more devices to propose, the smallest first.
    """
    compiler = _Compiler(compile_step)
    shorter = [config.resized(config.batch[1], part) for part in _shorter(config.batch[2], buckets)]
    for middle in sorted(shorter, key=lambda each: abs(2 * each.batch[2] - config.batch[2]))[:1]:
        compiler.compiled(middle)
    requested = compiler.compiled(config)
    fits = requested.total <= limit
    change = None if fits else _nearest(_changes(config, limit, compiler), limit, compiler)
    more = None if fits else _nearest(_more_devices(config, larger, compiler), limit, compiler)
    found = compiler.compiled if fits else compiler.interpolated
    return Plan(
        limit=limit,
        requested=requested,
        other_paging=compiler.interpolated(config.replace(paged=not config.paged)),
        shorter=tuple(compiler.interpolated(each) for each in shorter),
        longest=_largest(_lengths(config), limit, compiler, found),
        largest=_largest(_row_counts(config), limit, compiler, found),
        change=change,
        more_devices=more,
    )


def first_fitting(
    configs: Sequence[StepConfig], limit: Callable[[StepConfig], int], fits: Callable[[StepConfig], bool]
) -> StepConfig:
    """Returns the first step that fits, or the last one if none does. The last one is not tried.

    Args:
      limit: bytes of a device that a step may use. A step is not tried if its estimate exceeds them by any error.
      fits: tries a step.
    """
    tried = (config for config in configs[:-1] if estimated_range(config)[0] <= limit(config))
    return next(filter(fits, tried), configs[-1])


def fits(config: StepConfig, limit: int, compile_step: CompileStep | None) -> bool:
    """Returns True if a step fits; compiles it, if it can, unless it fits with any error of its estimate."""
    if compile_step is None:
        return estimated_requirements(config).total <= limit
    return estimated_range(config)[1] <= limit or compiled_requirements(config, compile_step).total <= limit


def estimated_range(config: StepConfig) -> tuple[float, float]:
    """Returns the least and most bytes of a step, by its estimate and the errors that estimates have."""
    need = estimated_requirements(config)
    scratch = need.device["scratch"]
    least, most = (need.total - scratch + error * scratch for error in SCRATCH_ERROR)
    return least, most


def _shorter(length: int, buckets: Sequence[int]) -> list[int]:
    """Returns the other lengths of a plan, longest first."""
    if buckets:
        return sorted(set(buckets) - {length}, reverse=True)
    return [part for part in (length // 2 // UNIT * UNIT, length // 4 // UNIT * UNIT) if part >= UNIT]


def _lengths(config: StepConfig) -> list[StepConfig]:
    """Returns the step at every batch length, up to the model's maximum."""
    return [config.resized(config.batch[1], n) for n in range(UNIT, config.model.max_positions + 1, UNIT)]


def _row_counts(config: StepConfig) -> list[StepConfig]:
    """Returns the step with every number of rows that the devices can share evenly."""
    counts = range(config.devices, MOST_ROWS + 1, config.devices)
    return [config.resized(rows, config.batch[2]) for rows in counts]


def _largest(
    configs: list[StepConfig], limit: int, compiler: _Compiler, measure: Callable[[StepConfig], Requirements]
) -> Requirements | None:
    """Returns the largest of increasing steps that fits after `measure`; tries smaller ones if it does not fit."""
    for _ in range(MAX_COMPILES):
        index = _count_fitting(configs, limit, compiler) - 1
        if index < 0:
            return None
        need = measure(configs[index])
        if need.total <= limit:
            return need
        configs = configs[:index]
    return None


def _count_fitting(configs: list[StepConfig], limit: int, compiler: _Compiler) -> int:
    """Returns how many of increasing steps fit, by bisection."""
    low, high = 0, len(configs)
    while low < high:
        middle = (low + high) // 2
        if compiler.interpolated(configs[middle]).total <= limit:
            low = middle + 1
        else:
            high = middle
    return low


def _changes(config: StepConfig, limit: int, compiler: _Compiler) -> Iterator[Change]:
    """Yields single changes, those with the least effect on the run first, then pairs that change no result.

    The order is: same numbers, same optimizer step, lower precision, another optimizer step.
    """
    rows, length = config.batch[1:]
    if not config.paged:
        paged = config.replace(paged=True)
        yield Change(PAGE, {"optim.paging": "auto"}, compiler.interpolated(paged))
    for remat in _leaner(config):
        yield Change(LEANER[remat], {"train.remat": remat}, compiler.interpolated(config.replace(remat=remat)))
    fewer = [each for each in _row_counts(config) if each.batch[1] < rows]
    if count := _count_fitting(fewer, limit, compiler):
        smaller = fewer[count - 1]
        yield Change(
            "smaller micro-batches with more accumulation", _batch_options(smaller), compiler.interpolated(smaller)
        )
    yield from _lower_precision(config, compiler)
    lengths = [each for each in _lengths(config) if each.batch[2] < length]
    if shorter := _count_fitting(lengths, limit, compiler):
        need = compiler.interpolated(lengths[shorter - 1])
        yield Change("shorter rows", {"data.max_length": _max_length(need.config)}, need)
    for remat in () if config.paged else _leaner(config):
        options = {"optim.paging": "auto", "train.remat": remat}
        both = config.replace(paged=True, remat=remat)
        yield Change(f"both {PAGE} and {LEANER[remat]}", options, compiler.interpolated(both))


def _max_length(config: StepConfig) -> int:
    """Returns the limit of one sequence with which a row, of one or more of them, has at most the batch's length."""
    return config.batch[2] // max(1, config.objective.sequences_per_row)


def _batch_options(config: StepConfig) -> dict[str, str | int]:
    accumulated, rows, _ = config.batch
    return {"train.micro_batch_size": rows, "train.accumulation": accumulated}


def _more_devices(config: StepConfig, larger: Sequence[AnyMesh], compiler: _Compiler) -> Iterator[Change]:
    """Yields the step on larger meshes, with at least one row per device and as many rows per optimizer step."""
    for mesh in larger:
        on_device = dataclasses.replace(config.weights, experts_on_host=False)  # offloading works on one device
        on_mesh = config.replace(
            mesh=mesh, remat="names" if config.remat == "none" else config.remat, weights=on_device
        )
        options: dict[str, str | int] = {"mesh.fsdp": axis_size(mesh, FSDP)}
        if config.weights.experts_on_host:
            options["model.experts"] = "device"
        if on_mesh.remat != config.remat:
            options["train.remat"] = on_mesh.remat
        if config.batch[1] % on_mesh.devices:
            on_mesh = on_mesh.resized(-(-config.batch[1] // on_mesh.devices) * on_mesh.devices, config.batch[2])
            options |= _batch_options(on_mesh)
        yield Change(f"{on_mesh.devices} devices", options, compiler.interpolated(on_mesh))


def _lower_precision(config: StepConfig, compiler: _Compiler) -> Iterator[Change]:
    """Yields optimizer state in 8 bits, then adapters in bf16."""
    name = config.optim.name.replace("_32bit", "_8bit")
    if name != config.optim.name:
        eight_bit = config.replace(optim=dataclasses.replace(config.optim, name=name))
        yield Change("store the optimizer state in 8 bits", {"optim.name": name}, compiler.interpolated(eight_bit))
    if config.lora.dtype != "bfloat16" and uses(config.lora.method, "dtype"):
        halved = config.replace(lora=dataclasses.replace(config.lora, dtype="bfloat16"))
        yield Change("store adapters in bfloat16", {"lora.dtype": "bfloat16"}, compiler.interpolated(halved))


def _leaner(config: StepConfig) -> Iterator[str]:
    """Yields remat policies with less memory on the device, in order; a CPU cannot offload."""
    policies = [remat for remat in LEANER if remat != "offload" or config.weights.platform != "cpu"]
    yield from policies[policies.index(config.remat) + 1 :] if config.remat in policies else policies


def _nearest(changes: Iterator[Change], limit: int, compiler: _Compiler) -> Change | None:
    """Returns the first change that fits by interpolation and then as compiled."""
    for change in changes:
        if change.requirements.total <= limit:
            confirmed = compiler.compiled(change.requirements.config)
            if confirmed.total <= limit:
                return change._replace(requirements=confirmed)
    return None
