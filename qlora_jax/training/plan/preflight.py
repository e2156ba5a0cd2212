"""The memory plan of a run that is about to start, on the device that it starts on.

The step is planned for the longest rows that the data has. It is compiled anyway; nothing more is, unless it does not
fit.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from pallas_kernels import aot
from qlora_jax.config import Config
from qlora_jax.config.sizes import format_bytes
from qlora_jax.optim.page_pool import Memory
from qlora_jax.training.abstract_step import AbstractStep
from qlora_jax.training.compiled_step import CompiledGradients
from qlora_jax.training.cost import memory_use
from qlora_jax.training.paging_budget import device_bytes
from qlora_jax.training.plan.from_config import run_step_config
from qlora_jax.training.plan.plan import make_plan
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

OF_A_STEP = ("gradients", ACTIVATIONS, "scratch")  # kinds of what an evaluation does without
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What the run's largest step needs, and its questions, and what the device lets them have.

    Attributes:
      asking: what questions take; None of a run that asks none.
      limit: bytes; `device` says of what.
    """

    requirements: Requirements
    limit: int
    device: str
    questions: QuestionMemory | None = None

    @property
    def fits(self) -> bool:
        """Whether all of it fits."""
        return self.peak_bytes <= self.limit

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device at the largest moment."""
        return max(self.requirements.total, self.question_bytes)

    @property
    def question_bytes(self) -> int:
        """Bytes on the device while questions are asked: no gradients, nothing saved for them; 0 of a run that asks
        none."""
        if self.questions is None:
            return 0
        return sum(self.requirements.device[kind] for kind in KINDS if kind not in OF_A_STEP) + self.questions.size

    def rows(self) -> dict[str, str]:
        """For a banner."""
        parts = [f"{kind} {format_bytes(self.requirements.device[kind])}" for kind in KINDS]
        host = sum(self.requirements.host.values())
        total = f"{format_bytes(self.requirements.total)} of {self.device}"
        batch = "{1} x {2} tokens".format(*self.requirements.config.batch)
        told = {"longest step": batch, "needs": total, "made of": ", ".join(parts)}
        if self.questions is not None:
            told["questions need"] = f"{format_bytes(self.question_bytes)}, most in {self.questions.words}"
        return told | ({"in host memory": format_bytes(host)} if host else {})

    def nearest_fix(self) -> str:
        """What would fit, found by compiling; in lines."""
        lines = verdict(make_plan(self.requirements.config, self.limit, compile_here))
        if self.questions is not None and self.question_bytes > self.limit:
            needs = f"asking needs {format_bytes(self.question_bytes)} of {format_bytes(self.limit)}"
            lines.append(
                f"DOES NOT FIT: {needs}, most in {self.questions.words}; leave those questions out, and ask them by "
                "python -m qlora_jax.evaluate when the run is done, or shorten them"
            )
        return "\n  ".join(lines)


def plan_run(config: Config, inputs: Inputs, gradients: CompiledGradients) -> RunPlan:
    """The plan of the run's step for its longest bucket, whose program `gradients` has or compiles."""
    weights = weights_of(config, inputs)
    setting = run_step_config(config, inputs.model, weights, max(inputs.dataset.buckets), inputs.new_ids)
    limit, device = device_bytes(Memory.of(jax.local_devices()[0]))
    requirements = compiled_requirements(setting, _compiled_by(gradients, setting))
    questions = None if inputs.questions is None else inputs.questions.memory(gradients.parts)
    return RunPlan(requirements=requirements, limit=limit, device=device, questions=questions)


def _compiled_by(gradients: CompiledGradients, setting: StepConfig) -> CompileStep:
    """The update takes clipped gradients in f32 at most."""

    def compile_step(step: AbstractStep) -> Temporaries:
        memory = aot.read_memory(gradients.compiled(setting.batch).memory_analysis())
        in_f32 = dataclasses.replace(setting.lora, dtype="float32")
        update = memory_use.lora_bytes(dataclasses.replace(setting.step_shape(), lora=in_f32))
        return Temporaries(memory.device.temporaries, update, memory.host.temporaries)

    return compile_step


@contextmanager
def explain_out_of_memory(plan: RunPlan) -> Iterator[None]:
    """A device that runs out of memory becomes a ValueError with the plan and what would fit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        first = str(error).splitlines()[0]
        lines = [f"{name}: {words}" for name, words in plan.rows().items()]
        raise ValueError(
            "\n  ".join([f"the device ran out of memory: {first}", "the plan said:", *lines, plan.nearest_fix()])
        ) from error
