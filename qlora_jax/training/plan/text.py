"""A memory plan as a table for people and as JSON, and what it says of a run that does not fit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.table import Table

from qlora_jax.config.sizes import format_bytes
from qlora_jax.models.precision import kept_text
from qlora_jax.training.plan.fit_search import MOST_ROWS, Change, Plan, make_plan
from qlora_jax.training.plan.records import KINDS, STATE, Requirements, RunPlan
from qlora_jax.training.plan.reference_pass import PlannedReference
from qlora_jax.training.plan.roofline import StepRoofs
from qlora_jax.training.plan.step_memory import compile_here
from qlora_jax.training.step_spec import StepSpec

GIB = 2**30
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
MARKS = {"compiled": "", "fitted": "~", "estimated": "?"}
LEGEND = {"fitted": "~ interpolated from compiled steps", "estimated": "? estimated by formula, without compiling"}


def print_plan(
    plan: Plan,
    title: str,
    console: Console,
    reference: PlannedReference | None = None,
    roofs: StepRoofs | None = None,
) -> None:
    """Prints a table of bytes by kind, the verdict, what would fit, and the step's parts at the card's roofs."""
    columns = [plan.requested, plan.other_paging, *plan.shorter]
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("GiB on the device" if plan.requested.config.mesh is None else "GiB on each device")
    for requirements in columns:
        table.add_column(_heading(requirements), justify="right")
    for kind in (kind for kind in KINDS if any(requirements.device[kind] for requirements in columns)):
        table.add_row(kind, *(_gib(requirements.device[kind]) for requirements in columns))
    table.add_row(
        "total", *(_gib(requirements.total) + MARKS[requirements.source] for requirements in columns), style="bold"
    )
    table.add_row("host memory", *(_gib(sum(requirements.host.values())) for requirements in columns))
    if plan.requested.received:
        table.add_row("received per step", *(_gib(sum(requirements.received.values())) for requirements in columns))
    console.print(table)
    before = [] if reference is None else [f"reference pass before step 1: {reference}"]
    for line in (*_legend(columns), *verdict(plan), *before):
        console.print(line, highlight=False, soft_wrap=True)
    if roofs is not None:
        _print_roofs(roofs, plan.requested.config, console)


def _print_roofs(roofs: StepRoofs, config: StepSpec, console: Console) -> None:
    """Prints the parts of a step with the roof that binds each, and the tokens per second at the roofs."""
    accumulated, rows, length = config.batch
    of = f"an optimizer step of {accumulated} x {rows} x {length} tokens"
    rates = f"{roofs.peak / 1e12:,.1f} TFLOP/s in {roofs.dtype}, {roofs.card.bandwidth / 1e9:,.0f} GB/s"
    title = f"at the roofs of {roofs.card.description} ({rates}), {of}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("part" if config.mesh is None else "part, of each device")
    for name in ("TFLOP", "GB", "milliseconds"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for name, part in roofs.parts.items():
        numbers = (part.flops / 1e12, part.moved / 1e9, 1e3 * part.roofline.seconds)
        table.add_row(name, *(f"{number:,.2f}" for number in numbers), part.bound)
    console.print()
    console.print(table)
    for line in roofs_verdict(roofs):
        console.print(line, highlight=False, soft_wrap=True)


def roofs_verdict(roofs: StepRoofs) -> list[str]:
    """Returns lines with the tokens per second at the roofs, and at the share of them that the card has measured."""
    speed, share = roofs.tokens_per_second, roofs.measured_share
    lines = [f"at most {speed:,.0f} tokens per second: {roofs.seconds:.3g} s per step, by arithmetic"]
    if share is None:
        return [*lines, "no step was measured on this card, so its share of that speed is not known"]
    return [*lines, f"{share * speed:,.0f} tokens per second at {share:.0%} of that speed, as measured on this card"]


def verdict(plan: Plan) -> list[str]:
    """Returns lines that say whether the plan fits, the nearest change that fits, and the largest sizes that fit."""
    requested = plan.requested
    config, relation = requested.config, "fits" if plan.fits else "DOES NOT FIT"
    lines = [f"{relation}: {format_bytes(requested.total)} of the {format_bytes(plan.limit)} that a step may use"]
    if stored := config.weights.stored_counts:
        lines.append(f"codes of the files: {stored}")
    if kept := kept_text(config.model, config.weights):
        lines.append(f"in 16 bits: {kept}")
    if received := requested.received:
        parts = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in received.items())
        lines.append(f"each device receives {format_bytes(sum(received.values()))} per step: {parts}")
    if requested.fetched:
        lines.append(f"routed experts are in host memory: {_offloaded(requested)}")
    if not plan.fits and plan.change is None and plan.more_devices is None:
        lines.append("no single setting makes it fit: use a smaller model or a larger card")
    if plan.change is not None:
        lines.append(f"nearest change that fits: {_change(plan.change)} ({_with_host(plan.change.requirements)})")
    if plan.more_devices is not None:
        total = _total(plan.more_devices.requirements)
        lines.append(f"fits on more devices: {_change(plan.more_devices)} ({total} on each)")
    rows, length = config.batch[1:]
    max_positions = config.model.max_positions
    lines.append(f"longest rows that fit, {rows} per micro-batch: {_most(plan.longest, 2, max_positions)}")
    lines.append(f"largest micro-batch that fits, rows of {length} tokens: {_most(plan.largest, 1, MOST_ROWS)}")
    return lines


def as_json(plan: Plan, reference: PlannedReference | None = None, roofs: StepRoofs | None = None) -> dict[str, object]:
    """Returns every number of the plan for JSON: bytes, and FLOP and seconds of the step at the roofs."""
    named = {"asked": plan.requested, "otherwise": plan.other_paging, "longest": plan.longest, "largest": plan.largest}
    found: dict[str, object] = {
        name: requirements and _requirements_json(requirements) for name, requirements in named.items()
    }
    found["shorter"] = [_requirements_json(requirements) for requirements in plan.shorter]
    changes = {"change": plan.change, "more_devices": plan.more_devices}
    found |= {name: change and _change_json(change) for name, change in changes.items()}
    if reference is not None:
        found["reference"] = reference.work._asdict() | {"share": reference.share, "device": reference.device}
    found["roofs"] = roofs and _roofs_json(roofs)
    return {"fits": plan.fits, "limit": plan.limit} | found


def _roofs_json(roofs: StepRoofs) -> dict[str, object]:
    parts = {
        name: {"flops": part.flops, "bytes": part.moved, "seconds": part.roofline.seconds, "bound": part.bound}
        for name, part in roofs.parts.items()
    }
    rates = {"card": roofs.card.name, "dtype": roofs.dtype, "peak": roofs.peak, "bandwidth": roofs.card.bandwidth}
    names = ("tokens", "seconds", "tokens_per_second", "measured_share")
    return rates | {"parts": parts} | {name: getattr(roofs, name) for name in names}


def _change_json(change: Change) -> dict[str, object]:
    need = _requirements_json(change.requirements)
    return {"what": change.description, "options": dict(change.options), "need": need}


def _requirements_json(requirements: Requirements) -> dict[str, object]:
    config = requirements.config
    settings = {"batch": config.batch, "remat": config.remat, "paged": config.paged, "source": requirements.source}
    mesh = {} if config.mesh is None else {"mesh": dict(config.mesh.shape), "received": requirements.received}
    sizes = {"total": requirements.total, "device": requirements.device, "host": requirements.host}
    found: dict[str, object] = settings | mesh | sizes
    return found | {"fetched": requirements.fetched} if requirements.fetched else found


def _change(change: Change) -> str:
    return f"{change.description}: " + " ".join(f"--{name} {value}" for name, value in change.options.items())


def _with_host(requirements: Requirements) -> str:
    """Returns the total on the device; with offloaded experts, also their bytes in host memory and per step."""
    on_device = _total(requirements)
    return f"{on_device} on the device; {_offloaded(requirements)}" if requirements.fetched else on_device


def _offloaded(requirements: Requirements) -> str:
    host = sum(requirements.host[kind] for kind in ("weights", "constants"))
    return f"{format_bytes(host)} in host memory, {format_bytes(requirements.fetched)} fetched per optimizer step"


def _heading(requirements: Requirements) -> str:
    rows, length = requirements.config.batch[1:]
    return f"{rows} x {length}" + (f"\n{STATE}\npaged" if requirements.config.paged else "")


def _most(requirements: Requirements | None, axis: int, highest: int) -> str:
    if requirements is None:
        return "none"
    value = requirements.config.batch[axis]
    beyond = " (the model's maximum)" if axis == 2 and value + 64 > highest else ""
    return f"{value:,}{' or more' if axis == 1 and value == highest else beyond} ({_total(requirements)})"


def _total(requirements: Requirements) -> str:
    return format_bytes(requirements.total) + MARKS[requirements.source]


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _legend(columns: Iterable[Requirements]) -> list[str]:
    sources = {requirements.source for requirements in columns}
    return [text for source, text in LEGEND.items() if source in sources]


def nearest_fix(plan: RunPlan) -> str:
    """Returns lines that say what would fit instead; compiles to find it."""
    lines = verdict(make_plan(plan.requirements.config, plan.limit, compile_here))
    if plan.questions is not None and plan.question_bytes > plan.limit:
        required = f"questions need {format_bytes(plan.question_bytes)} of {format_bytes(plan.limit)}"
        lines.append(
            f"DOES NOT FIT: {required}, peak in {plan.questions.program}. Shorten these questions, or remove them "
            "and run qlora-jax evaluate after training."
        )
    if plan.rollouts is not None and plan.rollout_bytes > plan.limit:
        required = f"rollouts need {format_bytes(plan.rollout_bytes)} of {format_bytes(plan.limit)}"
        lines.append(
            f"DOES NOT FIT: {required}, peak in {plan.rollouts.program}. Lower rollouts.cache or "
            "rollouts.max_completion_length."
        )
    if plan.reference_bytes > plan.limit:
        required = f"the reference needs {format_bytes(plan.reference_bytes)} of {format_bytes(plan.limit)}"
        lines.append(f"DOES NOT FIT: {required}. Lower train.micro_batch_size or data.max_length.")
    of_model = plan.requirements.total
    if plan.teacher is not None and plan.teacher.peak(of_model) > max(of_model, plan.limit):
        lines.append(
            f"The teacher needs {format_bytes(plan.teacher.nbytes)}. Choose a smaller one, or set "
            "distillation.teacher_quant_type."
        )
    return "\n  ".join(lines)


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
            "\n  ".join([f"the device ran out of memory: {first}", "memory plan:", *lines, nearest_fix(plan)])
        ) from error
