"""`make_plan`: the memory that a training run needs on a card, before any download."""

import dataclasses
import io
from collections.abc import Callable, Mapping

import rich.console

from qlora_jax import runtime
from qlora_jax.config.parse import from_dict
from qlora_jax.terminal.console import Console
from qlora_jax.training.plan import fit_search, run_plan, text
from qlora_jax.training.plan.records import PlannedTeacher
from qlora_jax.training.plan.reference_pass import PlannedReference, reference_of_step
from qlora_jax.training.plan.rollouts import PlannedRollouts, plan_rollouts
from qlora_jax.training.plan.roofline import StepRoofs, step_roofs
from qlora_jax.training.plan.settings import PlanArgs
from qlora_jax.training.plan.step_memory import ReportedCompiler
from qlora_jax.training.plan.target import plan_target
from qlora_jax.training.plan.teacher import plan_teacher
from qlora_jax.training.step_spec import StepSpec
from qlora_jax.untrusted_json import JsonObject


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory that a run needs on a card; `str(plan)` is the table that the command prints.

    Fields:
      plan: the requirements of the run and of near variants, in bytes by kind.
      title: the planned run and its card.
      notes: why numbers are estimates, lengths unknown, or roofs missing; empty otherwise.
      reference: the pass over all rows before the first step; None for an objective without a reference.
      roofs: the step's FLOP, bytes and least time on the card, by part; None for a CPU, and for float32.
      rollouts: the memory of sampling replies; None for an objective without them.
      teacher: its memory; None for an objective without one.
    """

    plan: fit_search.Plan
    title: str
    notes: tuple[str, ...]
    reference: PlannedReference | None = None
    roofs: StepRoofs | None = None
    rollouts: PlannedRollouts | None = None
    teacher: PlannedTeacher | None = None

    @property
    def fits(self) -> bool:
        """True if the run fits."""
        return self._fits(self.plan.requested.total) and (self.rollouts is None or self._fits(self.rollouts.total))

    def _fits(self, of_model: int) -> bool:
        """Returns True if so many bytes and the teacher fit."""
        return (of_model if self.teacher is None else self.teacher.peak(of_model)) <= self.plan.limit

    @property
    def needed_bytes(self) -> int:
        """Device memory that the run's largest step needs."""
        return self.plan.requested.total

    @property
    def limit_bytes(self) -> int:
        """Device memory that a step may use."""
        return self.plan.limit

    def to_dict(self) -> dict[str, object]:
        """All numbers, as the command prints them with --json."""
        found = text.as_json(self.plan, self.reference, self.roofs) | {"fits": self.fits}
        named = {"rollouts": self.rollouts, "teacher": self.teacher}
        return found | {name: part._asdict() for name, part in named.items() if part is not None}

    def render(self, console: rich.console.Console) -> None:
        """Prints the tables and the verdict."""
        text.print_plan(self.plan, self.title, console, self.reference, self.roofs)
        if self.rollouts is not None:
            fits = "fit" if self._fits(self.rollouts.total) else "DO NOT FIT: lower rollouts.cache"
            console.print(f"{self.rollouts}; they {fits}", highlight=False, soft_wrap=True)
        if self.teacher is not None:
            fits = "" if self._fits(self.needed_bytes) else "; with it the run DOES NOT FIT: choose a smaller teacher"
            console.print(f"teacher: {self.teacher}{fits}", highlight=False, soft_wrap=True)

    def __str__(self) -> str:
        out = io.StringIO()
        self.render(Console(file=out, width=120))
        return out.getvalue()


def make_plan(
    model: str, *, card: str | None = None, memory: str | None = None, config: Mapping[str, object] | None = None
) -> MemoryPlan:
    """Plans the memory of a training run by compiling its step for a card, which may be absent.

    >>> plan = q.make_plan("model", card="cpu", config={"data.max_length": 64, "lora.rank": 8})
    >>> plan.fits
    True

    Args:
      model: a Hugging Face folder, only its config.json, a GGUF file, org/name on the Hub (only config.json is
        fetched), or a published model by name, such as "llama-3-8b".
      card: the card, such as "h100" or "rtx4090", or "cpu".
      memory: device memory, such as "24GiB", instead of the card's; without `card`, the card with the nearest size.
      config: settings of the run by dotted name, such as {"lora.rank": 64, "data.max_length": 2048}.

    Raises:
      ValueError: an unknown model, card or setting, or a row length beyond the model's positions.
    """
    raw: JsonObject = {"model": {"path": model}, "card": card, "memory": memory}
    for key, value in (config or {}).items():
        section, _, name = key.rpartition(".")
        inner = raw.setdefault(section, {}) if section else raw
        inner[name] = value
    return plan_of(from_dict(PlanArgs, raw))


def plan_of(args: PlanArgs, report: Callable[[str], None] = lambda line: None) -> MemoryPlan:
    """The plan for the settings of the command `plan`.

    Args:
      report: called with a line of text before each step that is compiled.

    Raises:
      ValueError: as `make_plan`.
    """
    target = plan_target(args.card, args.memory)
    teacher = plan_teacher(args, target)
    rows, unknown_lengths = run_plan.planned_rows(args)
    settings = run_plan.step_configs(args, target, rows)
    compile_step, problem = run_plan.compiler_for(target)
    notes = []
    if unknown_lengths:
        notes.append(f"every row counts as {args.data.max_length} tokens (data.max_length): {unknown_lengths}")
    if problem:
        notes.append(f"every number is an estimate, because nothing can be compiled: {problem}")

    def usable(step: StepSpec) -> int:
        total = int(float(runtime.USABLE_MEMORY) * target.memory_bytes)  # CUDA itself needs the rest
        return total if target.card is not None else total // step.devices  # CPU devices share the machine's memory

    if compile_step is not None:
        compile_step = ReportedCompiler(compile_step, report, fit_search.MAX_COMPILES + len(settings) - 1)
    setting = fit_search.first_fitting(settings, usable, lambda step: fit_search.fits(step, usable(step), compile_step))
    larger = run_plan.larger_meshes(setting, target)
    roofs = None if target.card is None else step_roofs(setting, target.card)
    if target.card is not None and roofs is None:
        notes.append(f"no tokens per second: the peak of {setting.weights.dtype} products depends on the use of TF32")
    planned = fit_search.make_plan(setting, usable(setting), compile_step, rows.buckets, larger)
    return MemoryPlan(
        plan=planned,
        title=run_plan.plan_title(args, target, setting),
        notes=tuple(notes),
        reference=reference_of_step(setting, rows.report, args.train),
        roofs=roofs,
        rollouts=plan_rollouts(args, planned.requested),
        teacher=teacher,
    )
