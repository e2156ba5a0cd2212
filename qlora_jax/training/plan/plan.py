"""The memory plan of a run: what its steps need on a device, whether that fits, and what nearest change would fit.

At most MAX_COMPILES steps are compiled, since a large model's takes most of a minute: the one that was asked for, the
same at about half the length, and the answers that are given by name. Other numbers lie on the line through those, and
are marked so.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.config import plain_name
from qlora_jax.data.batching.buckets import UNIT
from qlora_jax.training.plan.requirements import (
    CompileStep,
    Requirements,
    StepConfig,
    compiled_requirements,
    estimated_requirements,
    fitted_requirements,
)

MAX_COMPILES = 4
MOST_ROWS = 256  # of a micro-batch that is looked for

PAGE = "page the optimizer's state to host memory"
LEANER = {
    "full": "compute activations again in the backward pass",
    "offload": "compute activations again while layers' inputs wait in host memory",
}  # policies of train.remat by what they keep on the device, the most first


class Change(NamedTuple):
    """One change of the configuration, the options that make it, and what is needed with it."""

    description: str
    options: Mapping[str, str | int]
    requirements: Requirements


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for, and what would fit.

    Attributes:
      limit: bytes of the device that a step may use.
      asked: the setting itself; `otherwise`: with its optimizer's state paged where that is not, or the reverse.
      shorter: at the data's other lengths, the longest first; where those are not known, at half and a quarter.
      longest: the longest length found to fit, the rest as asked; None: none does.
      largest: the largest micro-batch found to fit at the length that was asked for; None: not one row does.
      change: the nearest change that fits, where the setting does not; None: none does.
    """

    limit: int
    requested: Requirements
    other_paging: Requirements
    shorter: tuple[Requirements, ...]
    longest: Requirements | None
    largest: Requirements | None
    change: Change | None

    @property
    def fits(self) -> bool:
        """Whether what was asked for fits."""
        return self.requested.total <= self.limit


class _Compiler:
    """Compiles as long as it may; what it may not is fitted to what it has compiled."""

    def __init__(self, compile_step: CompileStep | None):
        self._compile, self._left = compile_step, MAX_COMPILES
        self.known: list[Requirements] = []

    def measured(self, config: StepConfig) -> Requirements:
        """Compiled, or the best that is known without."""
        if self._compile is None or self._left == 0 or self._same_program(config):
            return self.guessed(config)
        self._left -= 1
        self.known.append(compiled_requirements(config, self._compile))
        return self.known[-1]

    def guessed(self, config: StepConfig) -> Requirements:
        """Fitted to what was compiled, the same policy before others; estimated where nothing was.

        Where the optimizer's state lies changes no program: with the state elsewhere, a step is still as compiled.
        """
        if same := self._same_program(config):
            return dataclasses.replace(fitted_requirements(config, [same]), source=same.source)
        alike = [need for need in self.known if need.config.remat == config.remat] or self.known
        return fitted_requirements(config, alike) if alike else estimated_requirements(config)

    def _same_program(self, config: StepConfig) -> Requirements | None:
        return next((need for need in self.known if _program(need.config) == _program(config)), None)


def _program(config: StepConfig) -> tuple[Any, ...]:
    """What the compiled step depends on, of what plans change."""
    return config.batch, config.remat, config.lora.dtype, plain_name(config.optim.name)


def make_plan(config: StepConfig, limit: int, compile_step: CompileStep | None, buckets: Sequence[int] = ()) -> Plan:
    """The plan of a setting under a limit in bytes; without `compile_step` every number is an estimate.

    Args:
      buckets: the lengths that batches come in, the setting's own as the longest; empty: not known.
    """
    compiler = _Compiler(compile_step)
    shorter = [config.resized(config.batch[1], part) for part in _shorter(config.batch[2], buckets)]
    for middle in sorted(shorter, key=lambda each: abs(2 * each.batch[2] - config.batch[2]))[:1]:
        compiler.measured(middle)
    asked = compiler.measured(config)
    fits = asked.total <= limit
    change = None if fits else _nearest(_changes(config, limit, compiler), limit, compiler)
    found = compiler.measured if fits else compiler.guessed
    return Plan(
        limit=limit,
        requested=asked,
        other_paging=compiler.guessed(config.replace(paged=not config.paged)),
        shorter=tuple(compiler.guessed(each) for each in shorter),
        longest=_most(_lengths(config), limit, compiler, found),
        largest=_most(_row_counts(config), limit, compiler, found),
        change=change,
    )


def _shorter(length: int, buckets: Sequence[int]) -> list[int]:
    """The other lengths of a plan, the longest first."""
    if buckets:
        return sorted(set(buckets) - {length}, reverse=True)
    return [part for part in (length // 2 // UNIT * UNIT, length // 4 // UNIT * UNIT) if part >= UNIT]


def _lengths(config: StepConfig) -> list[StepConfig]:
    """Every length that batches may come in, up to what the model was made for."""
    return [config.resized(config.batch[1], n) for n in range(UNIT, config.model.max_positions + 1, UNIT)]


def _row_counts(config: StepConfig) -> list[StepConfig]:
    return [config.resized(rows, config.batch[2]) for rows in range(1, MOST_ROWS + 1)]


def _most(
    configs: list[StepConfig], limit: int, compiler: _Compiler, measure: Callable[[StepConfig], Requirements]
) -> Requirements | None:
    """The largest of growing settings that fits, measured; where that says otherwise, what then is known to fit."""
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
    """How many of growing settings fit, by bisection."""
    low, high = 0, len(configs)
    while low < high:
        middle = (low + high) // 2
        if compiler.guessed(configs[middle]).total <= limit:
            low = middle + 1
        else:
            high = middle
    return low


def _changes(config: StepConfig, limit: int, compiler: _Compiler) -> Iterator[Change]:
    """Single changes, what changes least of the run first: the same numbers, the same step, coarser numbers, another
    step. At last the pairs that change no result."""
    rows, length = config.batch[1:]
    if not config.paged:
        paged = config.replace(paged=True)
        yield Change(PAGE, {"optim.paging": "auto"}, compiler.guessed(paged))
    for remat in _leaner(config):
        yield Change(LEANER[remat], {"train.remat": remat}, compiler.guessed(config.replace(remat=remat)))
    if rows > 1 and (smaller := _count_fitting(_row_counts(config)[: rows - 1], limit, compiler)):
        need = compiler.guessed(config.resized(smaller, length))
        options = {"train.micro_batch_size": smaller, "train.accumulation": need.config.batch[0]}
        yield Change("fewer rows at once, accumulated", options, need)
    yield from _smaller_numbers(config, compiler)
    lengths = [each for each in _lengths(config) if each.batch[2] < length]
    if shorter := _count_fitting(lengths, limit, compiler):
        need = compiler.guessed(lengths[shorter - 1])
        yield Change("shorter rows", {"data.max_length": need.config.batch[2]}, need)
    for remat in () if config.paged else _leaner(config):
        options = {"optim.paging": "auto", "train.remat": remat}
        both = config.replace(paged=True, remat=remat)
        yield Change(f"both {PAGE} and {LEANER[remat]}", options, compiler.guessed(both))


def _smaller_numbers(config: StepConfig, compiler: _Compiler) -> Iterator[Change]:
    """State in 8 bits, adapters in bf16."""
    name = config.optim.name.replace("_32bit", "_8bit")
    if name != config.optim.name:
        eight_bit = config.replace(optim=dataclasses.replace(config.optim, name=name))
        yield Change("hold the optimizer's state in 8 bits", {"optim.name": name}, compiler.guessed(eight_bit))
    if config.lora.dtype != "bfloat16":
        halved = config.replace(lora=dataclasses.replace(config.lora, dtype="bfloat16"))
        yield Change("hold adapters in bfloat16", {"lora.dtype": "bfloat16"}, compiler.guessed(halved))


def _leaner(config: StepConfig) -> Iterator[str]:
    """Policies that keep less on the device, what changes least first. A CPU has no other memory."""
    policies = [remat for remat in LEANER if remat != "offload" or config.weights.platform != "cpu"]
    yield from policies[policies.index(config.remat) + 1 :] if config.remat in policies else policies


def _nearest(changes: Iterator[Change], limit: int, compiler: _Compiler) -> Change | None:
    """The first change that is thought to fit and then does."""
    for change in changes:
        if change.requirements.total <= limit:
            confirmed = compiler.measured(change.requirements.config)
            if confirmed.total <= limit:
                return change._replace(requirements=confirmed)
    return None
