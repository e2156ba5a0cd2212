"""The memory requirements of one optimizer step, by kind; on a mesh, those of one device.

Shapes determine everything but scratch (cost/memory_use.py). Scratch is measured by compiling the
real step for the device, or estimated. Dimension key: A micro-batches, B rows, T positions, M = B T.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pallas_kernels import aot
from pallas_kernels.nf4_matmul.costs import dequantized_bytes
from qlora_jax.config.sizes import format_bytes
from qlora_jax.optim.page_layout import PAGE_BYTES, PAGES_PER_BUDGET
from qlora_jax.training.cost import communication, memory_use
from qlora_jax.training.cost.memory_use import activation_bytes, offloaded_activation_bytes
from qlora_jax.training.cost.step_shape import DOWN, F32, IN_LAYERS, StepShape
from qlora_jax.training.plan.records import (
    ACTIVATIONS,
    KINDS,
    PROGRAMS,
    REFERENCE,
    REWARD_MODEL,
    STATE,
    Requirements,
)
from qlora_jax.training.step_spec import Program, StepSpec

# On a CPU, programs take part of the planned memory. This covers the programs of the loader and the update, and the
# library pages that they touch. Measured by scripts/bench/plan_memory.py, nearly the same for every model.
CPU_PROGRAMS = 80 * 2**20
# This covers the programs of an engine, in a run that samples replies. SmolLM2-135M's take 38 MiB.
CPU_SAMPLING_PROGRAMS = 40 * 2**20
PAGES_IN_FLIGHT = PAGES_PER_BUDGET * PAGE_BYTES  # bytes of a paged state on the device during an update


class Temporaries(NamedTuple):
    """Bytes of a compiled step's temporary buffers, including the activations saved for the backward pass.

    Fields:
      gradients: of the gradient program, on the device.
      update: of the update program, on the device.
      host: of the gradient program, in host memory.
      host_arguments: bytes of the gradient program's arguments in host memory.
    """

    gradients: int
    update: int
    host: int = 0
    host_arguments: int = 0


# Compiles the real step for one device. Raises what the compiler raises.
CompileStep = Callable[[StepSpec], Temporaries]


def _requirements(config: StepSpec, scratch: int, source: str) -> Requirements:
    step = config.sizes
    frozen, lora, state = memory_use.frozen_bytes(step), memory_use.lora_bytes(step), memory_use.optimizer_bytes(step)
    away = memory_use.offloaded_expert_bytes(step)
    codes, on_cpu = frozen["codes"] - away["codes"], config.weights.platform == "cpu"
    reference = lora if config.compared else 0
    device = {
        "weights": codes + frozen["tables"] + frozen["vectors"] + frozen["adapters"] + frozen["routers"],
        "constants": frozen["constants"] - away["constants"],
        "trained": lora,
        "gradients": memory_use.gradient_bytes(step),
        STATE: min(state, PAGES_IN_FLIGHT) if config.paged else state,
        ACTIVATIONS: _saved_bytes(step),
        "scratch": scratch,
        REFERENCE: reference if on_cpu else 0,
        REWARD_MODEL: config.reward_model,
        PROGRAMS: on_cpu * (CPU_PROGRAMS + (config.objective.row_kind == "prompt") * CPU_SAMPLING_PROGRAMS),
    }
    on_host = {STATE: state if config.paged else 0, ACTIVATIONS: _offloaded_bytes(step)}
    on_host |= {REFERENCE: 0 if on_cpu else reference}
    host = dict.fromkeys(KINDS, 0) | on_host | {"weights": away["codes"], "constants": away["constants"]}
    return Requirements(config=config, device=device, host=host, source=source)


def _saved_bytes(step: StepShape) -> int:
    return sum(activation_bytes(step).values())


def _offloaded_bytes(step: StepShape) -> int:
    return sum(offloaded_activation_bytes(step).values())


def compiled_requirements(config: StepSpec, compile_step: CompileStep) -> Requirements:
    """Returns the requirements with scratch as compiled.

    Scratch is the larger of two: temporaries of the gradients without saved activations, plus the batch; or temporaries
    of the update.

    Raises:
      RuntimeError: the compiled step has activations or experts on the device that the settings offload.
    """
    _ = config.arrays  # raises for settings that no step has, before a compiler is asked
    step, temporaries = config.sizes, compile_step(config)
    _check_offloaded(config, temporaries)
    scratch = max(temporaries.gradients + memory_use.batch_bytes(step), temporaries.update) - _saved_bytes(step)
    return _requirements(config, scratch, "compiled")


def _check_offloaded(config: StepSpec, found: Temporaries) -> None:
    """Raises RuntimeError if less is in host memory than the settings say."""
    step = config.sizes
    experts = sum(memory_use.offloaded_expert_bytes(step).values())
    checks = (
        (f"train.remat={config.remat}", "activations", found.host, _offloaded_bytes(step), "train.remat=full"),
        ("model.experts=offload", "experts", found.host_arguments, experts, "model.experts=device"),
    )
    if problems := [
        f"{setting}: the compiled step does not offload all {what} to host memory (found {format_bytes(has)}, expected "
        f"{format_bytes(expected)}). Set {fix}."
        for setting, what, has, expected, fix in checks
        if has < expected
    ]:
        raise RuntimeError("\n".join(problems))


def estimated_requirements(config: StepSpec) -> Requirements:
    """Returns the requirements with scratch by formula: `working_set` and the batch."""
    step = config.sizes
    return _requirements(config, working_set(step) + memory_use.batch_bytes(step), "estimated")


def fitted_requirements(config: StepSpec, known: Sequence[Requirements]) -> Requirements:
    """Returns the requirements with scratch interpolated over M = B T from the last two compiled steps in `known`.

    With one compiled step, scratch is proportional to `working_set`.
    """
    *before, last = known[-2:]
    rows, scratch = last.config.rows, _without_batch(last)
    batch = memory_use.batch_bytes(config.sizes)
    if not before or before[0].config.rows == rows:
        share = working_set(config.sizes) / working_set(last.config.sizes)
        return _requirements(config, round(scratch * share) + batch, "fitted")
    slope = (scratch - _without_batch(before[0])) / (rows - before[0].config.rows)
    return _requirements(config, max(0, round(scratch + slope * (config.rows - rows))) + batch, "fitted")


def _without_batch(need: Requirements) -> int:
    return need.device["scratch"] - memory_use.batch_bytes(need.config.sizes)


def working_set(step: StepShape) -> int:
    """Estimates a step's scratch in bytes; tests/training/plan/test_step_memory.py compares it with compiled steps.

    It is the larger of two, which are not live together: one tile of logits, or the backward pass of one layer. A
    model that is cut over devices adds two gathered layers, and experts in host memory add those of two layers.
    """
    fetched = sum(memory_use.offloaded_expert_bytes(step).values())
    fetched //= len(step.experts.layers) if step.experts else 1
    return max(memory_use.logits_bytes(step), _layer_bytes(step) + 2 * fetched) + 2 * communication.layer_bytes(step)


def _layer_bytes(step: StepShape) -> int:
    """Returns two f32 arrays of each width of a layer, two dequantized MLP weights, and the work of routed experts."""
    model = step.model
    inner = model.mlp_dim if step.layers(DOWN) else 0
    widths = 2 * inner + 4 * model.embed_dim + 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    shapes = [shape for name, shape in step.matrices() if name.startswith("mlp.")]
    return 2 * (F32 * step.rows * widths + max(map(dequantized_bytes, shapes))) + _experts_work(step)


def _experts_work(step: StepShape) -> int:
    """Returns the bytes of slots' rows that are live together, and twice the f32 gradients of adapters on experts.

    The gradient of the activation reads gate, up and the gradient of its result, next to that of down's result. Those
    of gate and up have two results as wide as the layer. Adapters add their inputs and results.
    """
    if step.experts is None:
        return 0
    embed, inner = step.model.embed_dim, step.experts.mlp_dim
    shapes, lora = step.model.expert_targets(), step.trees.parts.lora
    adapters = {name: [*lora.get(f"{IN_LAYERS}{name}", {}).values()] for name in shapes}
    adapted = [sum(shape) for name, shape in shapes.items() if adapters[name]]
    live = max(embed + 3 * inner, 2 * embed + 2 * inner) + max(adapted, default=0)
    of_expert = [sum(math.prod(leaf.shape[2:]) for leaf in leaves) for leaves in adapters.values()]
    together = (not step.lora.share_experts) * step.tiles_together
    return step.slots * live * step.itemsize + 2 * F32 * together * max(of_expert, default=0)


# Compilers


def compile_here(step: StepSpec) -> Temporaries:
    """Compiles a step for this process's devices."""

    def memory_of(program: Program, options: dict[str, str]) -> aot.MemoryUse:
        lowered = program.function.lower(*program.args, **program.kwargs)
        return aot.read_memory(lowered.compile(options or None).memory_analysis())

    return _temporaries(step, memory_of)


def compile_on_card(card: str) -> CompileStep:
    """Returns a compiler for a card of pallas_kernels.gpu_specs, which need not be present.

    pallas_kernels.aot.problem() says whether this machine can compile for it.
    """

    def memory_of(program: Program, options: dict[str, str]) -> aot.MemoryUse:
        compiled = aot.compile_for(
            card, program.function, *program.args, **program.kwargs, compiler_options=options or None
        )
        return compiled.memory

    return lambda step: _temporaries(step, memory_of)


def _temporaries(step: StepSpec, memory_of: Callable[[Program, dict[str, str]], aot.MemoryUse]) -> Temporaries:
    gradients, update = memory_of(step.gradients(), step.compiler_options), memory_of(step.update(), {})
    host = gradients.host
    return Temporaries(gradients.device.temporaries, update.device.temporaries, host.temporaries, host.arguments)


USUAL = "each usually takes 10 to 60 seconds"


class ReportedCompiler:
    """Compiles steps, remembers them, and reports each before it is compiled.

    Args:
      compile_step: compiles a step.
      report: called with a line of text.
      most: the most steps that will be compiled.
    """

    def __init__(self, compile_step: CompileStep, report: Callable[[str], None], most: int):
        self._compile, self._report, self._most = compile_step, report, most
        self._known: list[tuple[StepSpec, Temporaries]] = []
        self._last = USUAL

    def __call__(self, step: StepSpec) -> Temporaries:
        """Returns the temporaries of a compiled step."""
        for known, found in self._known:
            if known is step:
                return found
        rows, length = step.batch[1:]
        number = f"program {len(self._known) + 1} of at most {self._most}"
        self._report(f"compiling a step of {rows} x {length} tokens, remat {step.remat} ({number}; {self._last})")
        began = time.perf_counter()
        found = self._compile(step)
        self._last = f"the last took {time.perf_counter() - began:.0f} seconds"
        self._known.append((step, found))
        return found
