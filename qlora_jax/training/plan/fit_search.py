"""The memory plan of a run: the requirements of its steps, whether they fit, and the nearest change that fits.

On a mesh, everything is that of one device.

A large model's step takes the compiler half a minute, so formulas go first and only what decides is compiled: the
requested step unless no error of its estimate lets it fit, the change that the plan suggests, or sizes well beyond the
compiled ones. Other numbers are interpolated and marked as such.

Dimension key: A micro-batches, B rows, T positions.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.config import plain_name
from qlora_jax.config.methods import uses
from qlora_jax.data.batching.packing import UNIT
from qlora_jax.models.partition import partly_dense
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.sharding import FSDP, AnyMesh, axis_size
from qlora_jax.training.plan.records import Requirements
from qlora_jax.training.plan.step_memory import (
    CompileStep,
    compiled_requirements,
    estimated_requirements,
    fitted_requirements,
)
from qlora_jax.training.step_spec import StepSpec

MOST_ROWS = 256  # the largest micro-batch that is searched for

PAGE = "page the optimizer state to host memory"
OFFLOAD_EXPERTS = "keep the routed experts in host memory"
LEANER = {
    "full": "recompute activations in the backward pass",
    "offload": "recompute activations, and offload the layers' inputs to host memory",
}  # policies of train.remat with less memory on the device, in order

Options = dict[str, str | int]
Measure = Callable[[StepSpec], Requirements]


class Change(NamedTuple):
    """A change of the configuration, its options, and the requirements with it."""

    description: str
    options: Mapping[str, str | int]
    requirements: Requirements


def changes(config: StepSpec, limit: int, measure: Measure) -> Iterator[Change]:
    """Yields single changes, those with the least effect on the run first, then pairs that change no result.

    The order is: same numbers, same optimizer step, lower precision, another optimizer step.
    """
    rows, length = config.batch[1:]
    if not config.paged:
        yield Change(PAGE, {"optim.paging": "auto"}, measure(config.replace(paged=True)))
    for remat in _smaller_remat_policies(config):
        yield Change(LEANER[remat], {"train.remat": remat}, measure(config.replace(remat=remat)))
    fewer = [each for each in row_counts(config) if each.batch[1] < rows]
    if count := count_fitting(fewer, limit, measure):
        smaller = fewer[count - 1]
        yield Change("smaller micro-batches with more accumulation", _batch_options(smaller), measure(smaller))
    yield from _offloaded_experts(config, measure)
    yield from _lower_precision(config, measure)
    lengths = [each for each in all_lengths(config) if each.batch[2] < length]
    if shorter := count_fitting(lengths, limit, measure):
        need = measure(lengths[shorter - 1])
        yield Change("shorter rows", {"data.max_length": _max_length(need.config)}, need)
    for remat in () if config.paged else _smaller_remat_policies(config):
        options: Options = {"optim.paging": "auto", "train.remat": remat}
        both = config.replace(paged=True, remat=remat)
        yield Change(f"both {PAGE} and {LEANER[remat]}", options, measure(both))
    yield from _offloaded_and_leaner(config, measure)


def more_devices(config: StepSpec, larger: Sequence[AnyMesh], measure: Measure) -> Iterator[Change]:
    """Yields the step on larger meshes, with at least one row per device and as many rows per optimizer step."""
    for mesh in larger:
        on_device = dataclasses.replace(config.weights, experts_on_host=False)  # offloading works on one device
        on_mesh = config.replace(
            mesh=mesh, remat="names" if config.remat == "none" else config.remat, weights=on_device
        )
        options: Options = {"mesh.fsdp": axis_size(mesh, FSDP)}
        if config.weights.experts_on_host:
            options["model.experts"] = "device"
        if on_mesh.remat != config.remat:
            options["train.remat"] = on_mesh.remat
        if config.batch[1] % on_mesh.devices:
            on_mesh = on_mesh.resized(-(-config.batch[1] // on_mesh.devices) * on_mesh.devices, config.batch[2])
            options |= _batch_options(on_mesh)
        yield Change(f"{on_mesh.devices} devices", options, measure(on_mesh))


def all_lengths(config: StepSpec) -> list[StepSpec]:
    """Returns the step at every batch length, up to the model's maximum."""
    return [config.resized(config.batch[1], n) for n in range(UNIT, config.model.max_positions + 1, UNIT)]


def row_counts(config: StepSpec) -> list[StepSpec]:
    """Returns the step with every number of rows that the devices can share evenly."""
    counts = range(config.devices, MOST_ROWS + 1, config.devices)
    return [config.resized(rows, config.batch[2]) for rows in counts]


def count_fitting(configs: list[StepSpec], limit: int, measure: Measure) -> int:
    """Returns how many of increasing steps fit, by bisection."""
    low, high = 0, len(configs)
    while low < high:
        middle = (low + high) // 2
        if measure(configs[middle]).total <= limit:
            low = middle + 1
        else:
            high = middle
    return low


def _max_length(config: StepSpec) -> int:
    """Returns the largest limit per sequence such that a full row fits the batch's length."""
    return config.batch[2] // max(1, config.objective.sequences_per_row)


def _batch_options(config: StepSpec) -> Options:
    accumulated, rows, _ = config.batch
    return {"train.micro_batch_size": rows, "train.accumulation": accumulated}


def _offloaded_experts(config: StepSpec, measure: Measure) -> Iterator[Change]:
    """Yields the step with its experts in host memory, if a card can fetch them from there."""
    if can_offload_experts(config):
        offloaded, options = _with_offloaded_experts(config)
        yield Change(OFFLOAD_EXPERTS, options, measure(offloaded))


def _offloaded_and_leaner(config: StepSpec, measure: Measure) -> Iterator[Change]:
    for remat in _smaller_remat_policies(config) if can_offload_experts(config) else ():
        offloaded, options = _with_offloaded_experts(config.replace(remat=remat))
        both = {"train.remat": remat, **options}
        yield Change(f"both {OFFLOAD_EXPERTS} and {LEANER[remat]}", both, measure(offloaded))


def can_offload_experts(config: StepSpec) -> bool:
    """Returns True if `model.experts` can become `offload`: routed experts, none partly in 16 bits, on one card."""
    if config.weights.platform == "cpu" or config.mesh is not None or config.model.experts is None:
        return False
    return not config.weights.experts_on_host and not partly_dense(config.weights, config.model)


def _with_offloaded_experts(config: StepSpec) -> tuple[StepSpec, Options]:
    """Returns the step, and its options; the policy `none` would keep what was fetched, so it becomes `names`."""
    weights = dataclasses.replace(config.weights, experts_on_host=True)
    options: Options = {"model.experts": "offload"}
    if config.remat == "none":
        return config.replace(weights=weights, remat="names"), options | {"train.remat": "names"}
    return config.replace(weights=weights), options


def _lower_precision(config: StepSpec, measure: Measure) -> Iterator[Change]:
    """Yields optimizer state in 8 bits, then adapters in bf16."""
    name = config.optim.name.replace("_32bit", "_8bit")
    if name != config.optim.name:
        eight_bit = config.replace(optim=dataclasses.replace(config.optim, name=name))
        yield Change("store the optimizer state in 8 bits", {"optim.name": name}, measure(eight_bit))
    if config.lora.dtype != "bfloat16" and uses(config.lora.method, "dtype"):
        halved = config.replace(lora=dataclasses.replace(config.lora, dtype="bfloat16"))
        yield Change("store adapters in bfloat16", {"lora.dtype": "bfloat16"}, measure(halved))


def _smaller_remat_policies(config: StepSpec) -> Iterator[str]:
    """Yields remat policies with less memory on the device, in order; a CPU cannot offload."""
    if REMAT_POLICIES[config.remat].on_host:
        return
    policies = [remat for remat in LEANER if remat != "offload" or config.weights.platform != "cpu"]
    yield from policies[policies.index(config.remat) + 1 :] if config.remat in policies else policies


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

    def compiled(self, config: StepSpec) -> Requirements:
        """Returns compiled requirements, or interpolated ones if the compilations are used up."""
        if self._compile is None or self._left == 0 or self._same_program(config):
            return self.interpolated(config)
        self._left -= 1
        self.known.append(compiled_requirements(config, self._compile))
        return self.known[-1]

    def interpolated(self, config: StepSpec) -> Requirements:
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

    def within_known(self, config: StepSpec) -> Requirements:
        """Returns interpolated requirements of a step that is hardly larger than a compiled one, else compiled ones."""
        largest = max((need.config.rows for need in self.known), default=0)
        return self.interpolated(config) if config.rows <= EXTRAPOLATED * largest else self.compiled(config)

    def _same_program(self, config: StepSpec) -> Requirements | None:
        return next((need for need in self.known if _program(need.config) == _program(config)), None)


def _program(config: StepSpec) -> tuple[object, ...]:
    """Returns the changeable settings that the compiled step depends on."""
    on_host = config.weights.experts_on_host
    return config.batch, config.remat, config.lora.dtype, plain_name(config.optim.name), config.mesh, on_host


def make_plan(
    config: StepSpec,
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
    configs: Sequence[StepSpec], limit: Callable[[StepSpec], int], fits: Callable[[StepSpec], bool]
) -> StepSpec:
    """Returns the first step that fits, or the last one if none does. The last one is not tried.

    Args:
      limit: bytes of a device that a step may use. A step is not tried if its estimate exceeds them by any error.
      fits: tries a step.
    """
    tried = (config for config in configs[:-1] if _may_fit(config, limit(config)))
    return next(filter(fits, tried), configs[-1])


def fits(config: StepSpec, limit: int, compile_step: CompileStep | None) -> bool:
    """Returns True if a step fits. Compiles it if possible, unless it fits even with its estimate's largest error."""
    if compile_step is None:
        return estimated_requirements(config).total <= limit
    return estimated_range(config)[1] <= limit or compiled_requirements(config, compile_step).total <= limit


def _may_fit(config: StepSpec, limit: int) -> bool:
    """Returns True if a step fits with some error of its estimate."""
    return estimated_range(config)[0] <= limit


def estimated_range(config: StepSpec) -> tuple[float, float]:
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
    configs: list[StepSpec], limit: int, compiler: _Compiler, measure: Callable[[StepSpec], Requirements]
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
