"""What one optimizer step needs, by kind: what formulas know, and what only a compiler does.

Everything that is held or kept follows from shapes (memory.py, saved.py). The rest, scratch, is measured by
compiling the real step for the device, or estimated. Dimension key: A micro-batches, B rows, T positions, M = B T.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pallas_kernels import aot
from pallas_kernels.nf4_matmul.costs import dequantized_bytes
from qlora_jax.config import LoraArgs, OptimArgs, plain_name
from qlora_jax.config.sizes import format_bytes
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.optim.page_layout import PAGE_BYTES
from qlora_jax.training.abstract_step import AbstractStep, Program, abstract_step
from qlora_jax.training.cost import flops, memory_use
from qlora_jax.training.cost.activations import activation_bytes, offloaded_activation_bytes
from qlora_jax.training.optimizer_state import PAGES_PER_BUDGET

STATE, ACTIVATIONS = "optimizer state", "saved activations"
PROGRAMS = "programs"
KINDS = ("weights", "constants", "trained", "gradients", STATE, ACTIVATIONS, "scratch", PROGRAMS)
# On a CPU programs lie in the planned memory. Measured (scripts/bench/plan_memory.py), much the same for any model:
# those of the loader and the update, and libraries' pages that they touch; not what is there before a weight is read.
CPU_PROGRAMS = 80 * 2**20
PAGES_IN_FLIGHT = PAGES_PER_BUDGET * PAGE_BYTES  # of paged state, on the device while an update runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step's memory depends on.

    Attributes:
      batch: (A, B, T).
      new_ids: of tokens whose rows train.
      remat: a key of REMAT_POLICIES.
      paged: the optimizer's state is in host memory while gradients are computed.
    """

    model: ModelConfig
    weights: WeightFormat
    lora: LoraArgs
    optim: OptimArgs
    batch: tuple[int, int, int]
    remat: str
    paged: bool = False
    new_ids: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """M."""
        return self.batch[1] * self.batch[2]

    @functools.cached_property
    def abstract_step(self) -> AbstractStep:
        """The real step from shapes alone."""
        of_batch = {"batch": self.batch, "new_ids": self.new_ids, "remat": self.remat}
        return abstract_step(self.model, self.weights, self.lora, **of_batch, optim=self.optim)

    def step_shape(self) -> flops.StepShape:
        """What flops.py counts by."""
        return flops.StepShape(
            model=self.model,
            weights=self.weights,
            lora=self.lora,
            batch=self.batch,
            remat=self.remat,
            optimizer=plain_name(self.optim.name),
            new_tokens=len(self.new_ids),
        )

    def replace(self, **changes: Any) -> "StepConfig":
        """With other batch, remat, paging or dtype."""
        return dataclasses.replace(self, **changes)

    def resized(self, rows: int, length: int) -> "StepConfig":
        """With B rows of T positions; as many rows an optimizer step, or a few more."""
        accumulated, before, _ = self.batch
        return self.replace(batch=(-(-accumulated * before // rows), rows, length))


class Temporaries(NamedTuple):
    """Bytes of a compiled step's temporary buffers, what is saved between forward and backward included.

    Fields:
      gradients, update: of each program, on the device.
      host: of the gradients, in host memory.
    """

    gradients: int
    update: int
    host: int = 0


# Compiles the real step for one device. Raises whatever compiling raises.
CompileStep = Callable[[AbstractStep], Temporaries]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirements:
    """Bytes of one step by kind.

    Attributes:
      device, host: a number for each of KINDS; on the device, scratch is at its largest moment.
      source: `compiled`, `fitted` to compiled neighbours, or `estimated` by formula alone.
    """

    config: StepConfig
    device: dict[str, int]
    host: dict[str, int]
    source: str

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())


def _need(config: StepConfig, scratch: int, source: str) -> Requirements:
    of = config.step_shape()
    frozen, lora, state = memory_use.frozen_bytes(of), memory_use.lora_bytes(of), memory_use.optimizer_bytes(of)
    device = {
        "weights": frozen["codes"] + frozen["tables"] + frozen["vectors"],
        "constants": frozen["constants"],
        "trained": lora,
        "gradients": lora,
        STATE: min(state, PAGES_IN_FLIGHT) if config.paged else state,
        ACTIVATIONS: _saved(of),
        "scratch": scratch,
        PROGRAMS: CPU_PROGRAMS if config.weights.platform == "cpu" else 0,
    }
    host = dict.fromkeys(KINDS, 0) | {STATE: state if config.paged else 0, ACTIVATIONS: _offloaded(of)}
    return Requirements(config=config, device=device, host=host, source=source)


def _saved(of: flops.StepShape) -> int:
    return sum(activation_bytes(of).values())


def _offloaded(of: flops.StepShape) -> int:
    return sum(offloaded_activation_bytes(of).values())


def compiled_requirements(config: StepConfig, compile_step: CompileStep) -> Requirements:
    """Scratch as compiled: what is temporary and not saved, and the batch; or the update's, where that is more.

    Raises:
      RuntimeError: activations that were to wait in host memory stay on the device.
    """
    of, temporaries = config.step_shape(), compile_step(config.abstract_step)
    if temporaries.host < _offloaded(of):
        raise RuntimeError(
            f"train.remat={config.remat}: {format_bytes(_offloaded(of))} of activations were to wait in host memory, "
            f"but the compiled step keeps {format_bytes(temporaries.host)} there; set train.remat=full"
        )
    scratch = max(temporaries.gradients + memory_use.batch_bytes(of), temporaries.update) - _saved(of)
    return _need(config, scratch, "compiled")


def estimated_requirements(config: StepConfig) -> Requirements:
    """Scratch by formula: `working_set`, and the batch."""
    of = config.step_shape()
    return _need(config, working_set(of) + memory_use.batch_bytes(of), "estimated")


def fitted_requirements(config: StepConfig, known: Sequence[Requirements]) -> Requirements:
    """Scratch on the line over B T through the last two compiled steps that are known; with one, in proportion to
    `working_set`."""
    *before, last = known[-2:]
    rows, scratch = last.config.rows, _without_batch(last)
    batch = memory_use.batch_bytes(config.step_shape())
    if not before or before[0].config.rows == rows:
        share = working_set(config.step_shape()) / working_set(last.config.step_shape())
        return _need(config, round(scratch * share) + batch, "fitted")
    slope = (scratch - _without_batch(before[0])) / (rows - before[0].config.rows)
    return _need(config, max(0, round(scratch + slope * (config.rows - rows))) + batch, "fitted")


def _without_batch(need: Requirements) -> int:
    return need.device["scratch"] - memory_use.batch_bytes(need.config.step_shape())


def working_set(of: flops.StepShape) -> int:
    """One tile of logits; of one layer two arrays of each width, in f32; two dequantized weights of the MLP.

    An estimate: what compilers make of it is compared in tests/training/plan/test_plan.py.
    """
    model = of.model
    widths = 2 * model.mlp_dim + 4 * model.embed_dim + 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    layer = 2 * of.rows * widths * flops.F32
    weights = 2 * dequantized_bytes((model.mlp_dim, model.embed_dim))
    return memory_use.logits_bytes(of) + layer + weights


# Where the step is compiled


def compile_here(step: AbstractStep) -> Temporaries:
    """Compiled for the device that this process computes on."""
    return _temporaries(
        step, lambda p: aot.read_memory(p.function.lower(*p.args, **p.kwargs).compile().memory_analysis())
    )


def compile_on_card(card: str) -> CompileStep:
    """Compiled for a card of pallas_kernels.gpu_specs, which need not be here (pallas_kernels.aot.problem: why not)."""
    return lambda step: _temporaries(step, lambda p: aot.compile_for(card, p.function, *p.args, **p.kwargs).memory)


def _temporaries(step: AbstractStep, memory_of: Callable[[Program], aot.MemoryUse]) -> Temporaries:
    gradients, update = (memory_of(program) for program in (step.gradients(), step.update()))
    return Temporaries(gradients.device.temporaries, update.device.temporaries, gradients.host.temporaries)
