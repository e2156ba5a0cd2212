"""A memory plan as people read it, and as JSON."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_jax.config.sizes import format_bytes
from qlora_jax.training.plan.plan import MOST_ROWS, Plan
from qlora_jax.training.plan.requirements import KINDS, STATE, Requirements

GIB = 2**30
MARKS = {"compiled": "", "fitted": "~", "estimated": "?"}
LEGEND = {"fitted": "~ fitted to compiled steps", "estimated": "? estimated by formula, nothing was compiled"}


def print_plan(plan: Plan, title: str, console: Console) -> None:
    """A table of bytes by kind, the verdict, and what would fit."""
    needs = [plan.requested, plan.other_paging, *plan.shorter]
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("GiB on the device")
    for need in needs:
        table.add_column(_heading(need), justify="right")
    for kind in KINDS:
        table.add_row(kind, *(_gib(need.device[kind]) for need in needs))
    table.add_row("total", *(_gib(need.total) + MARKS[need.source] for need in needs), style="bold")
    table.add_row("in host memory", *(_gib(sum(need.host.values())) for need in needs))
    console.print(table)
    for line in (*_legend(needs), *verdict(plan)):
        console.print(line, highlight=False, soft_wrap=True)


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, the nearest change, and the most that fits."""
    asked = plan.requested
    relation = "fits" if plan.fits else "DOES NOT FIT"
    lines = [f"{relation}: {format_bytes(asked.total)} of {format_bytes(plan.limit)} that a step may use"]
    if not plan.fits and plan.change is None:
        lines.append("no change that is known makes it fit: take a smaller model or a larger card")
    if plan.change is not None:
        options = " ".join(f"--{name} {value}" for name, value in plan.change.options.items())
        need = plan.change.requirements
        lines.append(f"nearest change that fits: {plan.change.description}: {options} ({_total(need)})")
    rows, length = asked.config.batch[1:]
    most_positions = asked.config.model.max_positions
    lines.append(f"longest rows found to fit, {rows} at once: {_most(plan.longest, 2, most_positions)}")
    lines.append(f"most rows at once found to fit, of {length} tokens: {_most(plan.largest, 1, MOST_ROWS)}")
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """Every number, in bytes."""
    named = {"asked": plan.requested, "otherwise": plan.other_paging, "longest": plan.longest, "largest": plan.largest}
    told: dict[str, Any] = {name: need and _need_json(need) for name, need in named.items()}
    told["shorter"] = [_need_json(need) for need in plan.shorter]
    if plan.change is not None:
        change = plan.change
        told["change"] = {
            "what": change.description,
            "options": dict(change.options),
            "need": _need_json(change.requirements),
        }
    return {"fits": plan.fits, "limit": plan.limit, "change": None} | told


def _need_json(need: Requirements) -> dict[str, Any]:
    config = need.config
    what = {"batch": config.batch, "remat": config.remat, "paged": config.paged, "source": need.source}
    return what | {"total": need.total, "device": need.device, "host": need.host}


def _heading(need: Requirements) -> str:
    rows, length = need.config.batch[1:]
    return f"{rows} x {length}" + (f"\n{STATE}\npaged" if need.config.paged else "")


def _most(need: Requirements | None, axis: int, highest: int) -> str:
    if need is None:
        return "none"
    value = need.config.batch[axis]
    beyond = " (what the model was made for)" if axis == 2 and value + 64 > highest else ""
    return f"{value:,}{' or more' if axis == 1 and value == highest else beyond} ({_total(need)})"


def _total(need: Requirements) -> str:
    return format_bytes(need.total) + MARKS[need.source]


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _legend(needs: Iterable[Requirements]) -> list[str]:
    sources = {need.source for need in needs}
    return [text for source, text in LEGEND.items() if source in sources]
