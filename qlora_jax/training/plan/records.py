"""Results of a plan: the bytes of a step by kind, the work of a reference, and a run's memory on its device."""

import dataclasses
from typing import NamedTuple

from qlora_jax.config.sizes import format_bytes
from qlora_jax.inference.lowering import ProgramMemory
from qlora_jax.models.precision import kept_text
from qlora_jax.training.cost import communication, memory_use
from qlora_jax.training.step_spec import StepSpec

STATE, ACTIVATIONS, REFERENCE = "optimizer state", "saved activations", "reference"
REWARD_MODEL, PROGRAMS = "reward model", "programs"
KINDS = (
    *("weights", "constants", "trained", "gradients", STATE, ACTIVATIONS, "scratch", REFERENCE),
    *(REWARD_MODEL, PROGRAMS),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirements:
    """The bytes that one step requires, by kind.

    Attributes:
      device: bytes on the device for each of KINDS; scratch is its peak. On a CPU, those of the reference are here.
      host: bytes in host memory for each of KINDS.
      source: `compiled`, `fitted` to compiled steps, or `estimated` by formula.
    """

    config: StepSpec
    device: dict[str, int]
    host: dict[str, int]
    source: str

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def received(self) -> dict[str, int]:
        """Bytes that each device receives from the others in one optimizer step, by kind; by formula."""
        return {kind: one.received for kind, one in communication.exchanges(self.config.sizes).items()}

    @property
    def fetched(self) -> int:
        """Bytes of experts that cross from host memory to the device in one optimizer step; by formula."""
        return memory_use.fetched_expert_bytes(self.config.sizes)


class ReferenceWork(NamedTuple):
    """The operations of the pass over the training rows before the first step.

    Fields:
      rows: training rows; 0 if they are not known.
      tokens: their positions, without padding.
      flops: model FLOP.
      epochs: `flops` relative to those of an epoch of training.
    """

    rows: int
    tokens: int
    flops: int
    epochs: float

    def __str__(self) -> str:
        """Returns it as text for people."""
        if not self.rows:
            return f"FLOP of {self.epochs:.2f} epochs"
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {self.flops:.2g} FLOP, those of {self.epochs:.2f} epochs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePlan:
    """The work of a run's pass, and the memory of its programs, its values and its parameters.

    Attributes:
      program: bytes on a device of the largest batch, outputs and temporary buffers of the pass; with held-out rows,
        those of their comparison with the reference, and of its parameters.
      values: bytes of its results in host memory.
      parameters: bytes of a device's part of the reference's adapter, in host memory; 0 without held-out rows.
    """

    work: ReferenceWork
    program: int
    values: int
    parameters: int

    def __str__(self) -> str:
        """Returns it as text for people."""
        parameters = f" and {format_bytes(self.parameters)} of parameters" if self.parameters else ""
        return f"{self.work}; {format_bytes(self.values)} of values{parameters} in host memory"

    def to_dict(self) -> dict[str, int | float]:
        """Returns its numbers for JSON."""
        return self.work._asdict() | {
            "program": self.program,
            "values": self.values,
            "parameters": self.parameters,
        }


class PlannedTeacher(NamedTuple):
    """The memory of a teacher.

    Fields:
      nbytes: bytes of its weights; 0 behind an endpoint.
      stays: True if it stays in memory next to the model, False if it is freed before the model is loaded.
    """

    nbytes: int
    stays: bool

    def peak(self, of_model: int) -> int:
        """Returns the bytes on the device at the peak, if the model takes so many."""
        return of_model + self.nbytes if self.stays else max(of_model, self.nbytes)

    def __str__(self) -> str:
        if not self.nbytes:
            return "behind an endpoint, takes no memory here"
        return f"{format_bytes(self.nbytes)}, {'next to' if self.stays else 'before'} the model"


STEP_ONLY = ("gradients", ACTIVATIONS, "scratch")  # kinds that an evaluation does not need


BREAKDOWN = "breakdown"  # name of the row with the bytes of each kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The memory that a run's largest step and its questions require, and the device's limit.

    Attributes:
      limit: bytes that the run may use.
      device: the limit as text.
      questions: the memory of questions; None for a run without questions.
      rollouts: the memory of sampling replies to learn from; None for a run that samples none.
      reference: the work and memory of the reference; None for an objective without one.
      teacher: the memory of the teacher; None for an objective without one.
    """

    requirements: Requirements
    limit: int
    device: str
    questions: ProgramMemory | None = None
    rollouts: ProgramMemory | None = None
    reference: ReferencePlan | None = None
    teacher: PlannedTeacher | None = None

    @property
    def fits(self) -> bool:
        """True if the step, the questions and the reference fit."""
        return self.peak_bytes <= self.limit

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device at the peak."""
        of_model = max(self.requirements.total, self.question_bytes, self.rollout_bytes, self.reference_bytes)
        return of_model if self.teacher is None else self.teacher.peak(of_model)

    @property
    def question_bytes(self) -> int:
        """Bytes on the device during questions, without gradients and saved activations; 0 without questions."""
        return 0 if self.questions is None else self._resident + self.questions.size

    @property
    def rollout_bytes(self) -> int:
        """Bytes on the device while replies are sampled, without gradients and saved activations; 0 without them."""
        return 0 if self.rollouts is None else self._resident + self.rollouts.size

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
        if self.rollouts is not None:
            rows["rollouts"] = f"{format_bytes(self.rollout_bytes)}, peak in {self.rollouts.program}"
        if self.reference is not None:
            rows["reference pass"] = f"{self.reference}; {format_bytes(self.reference_bytes)} on the device"
        if self.teacher is not None:
            rows["teacher"] = str(self.teacher)
        return rows | ({"host memory": format_bytes(host)} if host else {})
