"""The memory plan of a run: the requirements of its steps, whether they fit, and the nearest change that fits.

On a mesh, everything is that of one device.

A large model's step takes the compiler half a minute, so formulas go first and only what decides is compiled: the
requested step unless no error of its estimate lets it fit, the change that the plan suggests, or sizes well beyond the
compiled ones. Other numbers are interpolated and marked as such.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence

from qlora_jax.config import plain_name
from qlora_jax.data.batching.packing import UNIT
from qlora_jax.sharding import AnyMesh
from qlora_jax.training.plan.changes import Change, all_lengths, changes, count_fitting, more_devices, row_counts
from qlora_jax.training.plan.requirements import (
    CompileStep,
    Requirements,
    StepConfig,
    compiled_requirements,
    estimated_requirements,
    fitted_requirements,
)

MAX_COMPILES = 3
# Compiled scratch over estimated scratch. It was 0.25 for gpt-oss-20b on 1 x 8,192 tokens, and falls with the length.
SCRATCH_ERROR = (0.15, 3.0)
# Settings that scratch depends on most; steps that share them are interpolated from each other.
SIMILAR = operator.attrgetter("mesh"), operator.attrgetter("remat"), operator.attrgetter("weights.experts_on_host")
EXTRAPOLATED = 1.25  # tokens per micro-batch over those of the largest compiled step, up to which none is compiled


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
        self.exists = compile_step is not None
        self.known: list[Requirements] = []

    def compiled(self, config: StepConfig) -> Requirements:
        """Returns compiled requirements, or interpolated ones if the compilations are used up."""
        if self._compile is None or self._left == 0 or self._same_program(config):
            return self.interpolated(config)
        self._left -= 1
        self.known.append(compiled_requirements(config, self._compile))
        return self.known[-1]

    def interpolated(self, config: StepConfig) -> Requirements:
        """Returns requirements fitted to compiled steps, as similar ones as possible; estimated ones if there are none.

        Paging changes no program: a step with the optimizer state elsewhere still counts as compiled.
        """
        if same := self._same_program(config):
            return dataclasses.replace(fitted_requirements(config, [same]), source=same.source)
        alike = self.known
        for setting in SIMILAR:
            alike = [need for need in alike if setting(need.config) == setting(config)] or alike
        nearest = sorted(alike, key=lambda need: -abs(need.config.rows - config.rows))[-2:]
        return fitted_requirements(config, nearest) if nearest else estimated_requirements(config)

    def within_known(self, config: StepConfig) -> Requirements:
        """Returns interpolated requirements of a step that is hardly larger than a compiled one, else compiled ones."""
        largest = max((need.config.rows for need in self.known), default=0)
        return self.interpolated(config) if config.rows <= EXTRAPOLATED * largest else self.compiled(config)

    def _same_program(self, config: StepConfig) -> Requirements | None:
        return next((need for need in self.known if _program(need.config) == _program(config)), None)


def _program(config: StepConfig) -> tuple[object, ...]:
    """Returns the changeable settings that the compiled step depends on."""
    on_host = config.weights.experts_on_host
    return config.batch, config.remat, config.lora.dtype, plain_name(config.optim.name), config.mesh, on_host


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
      buckets: the lengths of batches, up to the step's length; empty if they are not known.
      larger: meshes of more devices to propose, the smallest first.
    """
    compiler = _Compiler(compile_step)
    measure = compiler.interpolated
    found = compiler.within_known
    change = more = None
    if not _may_fit(config, limit) or compiler.compiled(config).total > limit:
        change = _nearest(changes(config, limit, measure), limit, compiler)
        more = _nearest(more_devices(config, larger, measure), limit, compiler)
        found = measure
    longest = _largest(all_lengths(config), limit, compiler, found)
    largest = _largest(row_counts(config), limit, compiler, found)
    return Plan(
        limit=limit,
        requested=measure(config),
        other_paging=measure(config.replace(paged=not config.paged)),
        shorter=tuple(measure(config.resized(config.batch[1], part)) for part in _shorter(config.batch[2], buckets)),
        longest=longest,
        largest=largest,
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
    tried = (config for config in configs[:-1] if _may_fit(config, limit(config)))
    return next(filter(fits, tried), configs[-1])


def fits(config: StepConfig, limit: int, compile_step: CompileStep | None) -> bool:
    """Returns True if a step fits. Compiles it if possible, unless it fits even with its estimate's largest error."""
    if compile_step is None:
        return estimated_requirements(config).total <= limit
    return estimated_range(config)[1] <= limit or compiled_requirements(config, compile_step).total <= limit


def _may_fit(config: StepConfig, limit: int) -> bool:
    """Returns True if a step fits with some error of its estimate."""
    return estimated_range(config)[0] <= limit


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


def _largest(
    configs: list[StepConfig], limit: int, compiler: _Compiler, measure: Callable[[StepConfig], Requirements]
) -> Requirements | None:
    """Returns the largest of increasing steps that fits after `measure`; None if none does.

    A compiled step moves the interpolated numbers, so the search continues from it, in both directions.
    """
    best, count = None, 0
    for _ in range(2 * MAX_COMPILES):
        found = count_fitting(configs, limit, compiler.interpolated)
        if found <= count:
            break
        need = measure(configs[found - 1])
        if need.total <= limit:
            best, count = need, found
        else:
            configs = configs[: found - 1]
    return best


def _nearest(proposed: Iterator[Change], limit: int, compiler: _Compiler) -> Change | None:
    """Returns the first change that fits by interpolation and then as compiled.

    Before anything is compiled, a change is also tried if only an error of its estimate lets it fit.
    """
    for change in proposed:
        need = change.requirements
        if need.total <= limit or (not compiler.known and compiler.exists and _may_fit(need.config, limit)):
            confirmed = compiler.compiled(change.requirements.config)
            if confirmed.total <= limit:
                return change._replace(requirements=confirmed)
    return None
