"""The memory plan of a run before it starts, for the device that it runs on.

It plans the step for the longest rows of the data, which the run compiles anyway. More is compiled only if that does
not fit.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from pallas_kernels import aot
from qlora_jax.config import Config
from qlora_jax.config.sizes import format_bytes
from qlora_jax.models.precision import kept_text
from qlora_jax.optim.page_pool import memory_of
from qlora_jax.training.abstract_step import AbstractStep
from qlora_jax.training.compiled_step import CompiledGradients
from qlora_jax.training.cost import memory_use
from qlora_jax.training.paging_budget import device_bytes
from qlora_jax.training.plan.from_config import rows_of, run_step_config
from qlora_jax.training.plan.plan import make_plan
from qlora_jax.training.plan.reference import ReferencePlan, plan_reference
from qlora_jax.training.plan.requirements import (
    ACTIVATIONS,
    KINDS,
    CompileStep,
    Requirements,
    StepConfig,
    Temporaries,
    compile_here,
    compiled_requirements,
)
from qlora_jax.training.plan.text import verdict
from qlora_jax.training.questions import QuestionMemory
from qlora_jax.training.session import Inputs, weights_of

STEP_ONLY = ("gradients", ACTIVATIONS, "scratch")  # kinds that an evaluation does not need
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
BREAKDOWN = "breakdown"  # name of the row with the bytes of each kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The memory that a run's largest step and its questions require, and the device's limit.

    Attributes:
      limit: bytes that the run may use.
      device: the limit as text.
      questions: the memory of questions; None for a run without questions.
      reference: the work and memory of the reference; None for an objective without one.
    """

    requirements: Requirements
    limit: int
    device: str
    questions: QuestionMemory | None = None
    reference: ReferencePlan | None = None

    @property
    def fits(self) -> bool:
        """True if the step, the questions and the reference fit."""
        return self.peak_bytes <= self.limit

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device at the peak."""
        return max(self.requirements.total, self.question_bytes, self.reference_bytes)

    @property
    def question_bytes(self) -> int:
        """Bytes on the device during questions, without gradients and saved activations; 0 without questions."""
        return 0 if self.questions is None else self._resident + self.questions.size

    @property
    def reference_bytes(self) -> int:
        """Bytes on the device during the reference pass or the held-out comparison; 0 without a reference."""
        return 0 if self.reference is None else self._resident + self.reference.program

    @property
    def _resident(self) -> int:
        """Bytes on the device without gradients and saved activations."""
        return sum(self.requirements.device[kind] for kind in KINDS if kind not in STEP_ONLY)

    def rows(self) -> dict[str, str]:
        """Returns the plan as rows of a banner."""
        sizes = self.requirements.device
        parts = [f"{kind} {format_bytes(sizes[kind])}" for kind in KINDS if sizes[kind]]
        host = sum(self.requirements.host.values())
        total = f"{format_bytes(self.requirements.total)} of {self.device}"
        batch = "{1} x {2} tokens".format(*self.requirements.config.batch)
        rows = {"longest step": batch, "memory": total, BREAKDOWN: ", ".join(parts)}
        config = self.requirements.config
        if kept := kept_text(config.model, config.weights):
            rows["in 16 bits"] = kept
        if received := sum(self.requirements.received.values()):
            rows["received per step"] = f"{format_bytes(received)} by each device"
        if self.questions is not None:
            rows["questions"] = f"{format_bytes(self.question_bytes)}, peak in {self.questions.program}"
        if self.reference is not None:
            rows["reference pass"] = f"{self.reference}; {format_bytes(self.reference_bytes)} on the device"
        return rows | ({"host memory": format_bytes(host)} if host else {})

    def nearest_fix(self) -> str:
        """Returns lines that say what would fit; compiles to find it."""
        lines = verdict(make_plan(self.requirements.config, self.limit, compile_here))
        if self.questions is not None and self.question_bytes > self.limit:
            required = f"questions need {format_bytes(self.question_bytes)} of {format_bytes(self.limit)}"
            lines.append(
                f"DOES NOT FIT: {required}, peak in {self.questions.program}. Shorten these questions, or remove them "
                "and run qlora-jax evaluate after training."
            )
        if self.reference_bytes > self.limit:
            required = f"the reference needs {format_bytes(self.reference_bytes)} of {format_bytes(self.limit)}"
            lines.append(f"DOES NOT FIT: {required}. Lower train.micro_batch_size or data.max_length.")
        return "\n  ".join(lines)


def longest_step(config: Config, inputs: Inputs, mesh: Mesh | None) -> StepConfig:
    """Returns the configuration of the run's step for its longest bucket."""
    return run_step_config(config, inputs.model, weights_of(config, inputs), rows_of(inputs), inputs.new_ids, mesh)


def plan_run(config: Config, inputs: Inputs, gradients: CompiledGradients) -> RunPlan:
    """Plans the run's step for its longest bucket; uses the program that `gradients` has compiled."""
    setting = longest_step(config, inputs, gradients.mesh)
    limit, device = device_bytes(memory_of(gradients.mesh))
    requirements = compiled_requirements(setting, _compiled_by(gradients, setting))
    questions = None if inputs.questions is None else inputs.questions.memory(gradients.parts)
    reference = plan_reference(config, inputs, gradients)
    return RunPlan(requirements=requirements, limit=limit, device=device, questions=questions, reference=reference)


def _compiled_by(gradients: CompiledGradients, setting: StepConfig) -> CompileStep:
    """Returns a compiler that reads the gradients' program and bounds the update's scratch by f32 gradients."""

    def compile_step(step: AbstractStep) -> Temporaries:
        memory = aot.read_memory(gradients.compiled(setting.batch).memory_analysis())
        in_f32 = dataclasses.replace(setting.lora, dtype="float32")
        update = memory_use.gradient_bytes(dataclasses.replace(setting.step_shape(), lora=in_f32))
        return Temporaries(memory.device.temporaries, update, memory.host.temporaries, memory.host.arguments)

    return compile_step


@contextmanager
def explain_out_of_memory(plan: RunPlan) -> Iterator[None]:
    """Turns an out-of-memory error of the device into a ValueError with the plan and what would fit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        first = str(error).splitlines()[0]
        lines = [f"{name}: {text}" for name, text in plan.rows().items()]
        raise ValueError(
            "\n  ".join([f"the device ran out of memory: {first}", "memory plan:", *lines, plan.nearest_fix()])
        ) from error
