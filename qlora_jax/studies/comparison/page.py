"""Writes the page of a study: one HTML file that loads no script, font or image.

Names, settings and paths are untrusted text. jinja2 escapes all of it, and the page's Content-Security-Policy keeps a
browser from running scripts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from qlora_jax.atomic_files import write_text
from qlora_jax.config.sizes import format_bytes
from qlora_jax.page_template import page_template
from qlora_jax.studies.comparison.plots import COSTS, Cost, front, pareto_svg, runs_svg
from qlora_jax.studies.comparison.results import LEVEL, MethodDifference, MethodEstimate, Results
from qlora_jax.studies.comparison.study import StudyTask
from qlora_jax.training.report.plot import NARROW, WIDE

PAGE_FILE = "comparison.html"
DIFFERENCE = ("difference", "mean", "95 % interval", "p, corrected", "verdict")
ESTIMATE = (
    "method",
    "mean",
    "over seeds",
    "over seeds and rows",
    "learning rate",
    "trained",
    "steps",
    "time",
    "memory",
    "unbeaten in",
)


class Drawing(NamedTuple):
    """A plot with its caption, for a phone or half a page, and for a full page (None: it shares a row)."""

    caption: str
    narrow: Markup
    wide: Markup | None


class Table(NamedTuple):
    """A table; the first column is text, the others are figures."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A task on the page."""

    name: str
    measure: str
    estimates: Table
    runs: Drawing
    differences: Table
    fronts: Sequence[Drawing]


def write_page(results: Results, folder: Path) -> Path:
    """Writes the page into the study's folder; returns its path."""
    write_text(folder / PAGE_FILE, page(results))
    return folder / PAGE_FILE


def page(results: Results) -> str:
    """Returns the page as HTML."""
    study = results.study
    return page_template(__package__, "page.html.jinja").render(
        title=Path(study.settings.output).name,
        tiles=_tiles(results),
        methods=_methods(results),
        sections=[_section(results, task) for task in study.tasks.values()],
        search=_search(results),
        seeds=len(study.settings.seeds),
        tests=len(results.differences),
        level=f"{LEVEL:.0%}",
        pairs=study.settings.pairs,
        base=study.settings.base,
        shared=_text_of(study.settings.settings),
    )


def _tiles(results: Results) -> list[tuple[str, str]]:
    settings, budget = results.study.settings, results.study.settings.budget
    if budget.steps is not None:
        equal = f"{budget.steps:,} steps"
    elif budget.seconds is not None:
        equal = f"{budget.seconds:g} s in steps"
    else:
        equal = f"{budget.trainable_parameters:,} trainable parameters, within {budget.tolerance:.1%}"
    return [
        ("methods", str(len(settings.methods))),
        ("tasks", str(len(settings.tasks))),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("equal budget", equal),
    ]


def _numbered(names: Sequence[str], name: str) -> str:
    return f"{names.index(name) + 1}. {name}"


def _text_of(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key}: {json.dumps(v, ensure_ascii=False)}" for key, v in settings.items()) or "as configured"


def _chosen_rank(results: Results, method: str) -> dict[str, object]:
    """Returns the `lora.rank` that the budget of trainable parameters gave a method, by task where tasks differ."""
    runs = [one.run for one in results.runs if one.run.method == method]
    ranks = {run.task: run.settings["lora.rank"] for run in runs if "lora.rank" in run.settings}
    first = next(iter(ranks.values()), None)
    if first is not None and all(rank == first for rank in ranks.values()):
        return {"lora.rank": first}
    return {f"lora.rank of {task}": rank for task, rank in ranks.items()}


def _methods(results: Results) -> Table:
    names = results.study.methods
    settings = {name: {**results.study.settings.methods[name], **_chosen_rank(results, name)} for name in names}
    return Table(("method", "settings"), [(_numbered(names, name), _text_of(settings[name])) for name in names])


def _section(results: Results, task: StudyTask) -> Section:
    estimates, measure = results.of_task(task.name), task.settings.measure
    of_task = [difference for difference in results.differences if difference.task == task.name]
    costs = [cost for cost in COSTS if front(estimates, cost, task.better)]
    return Section(
        name=task.name,
        measure=f"{measure} ({task.better} is better)",
        estimates=estimate_table(results, task),
        runs=_runs(estimates, measure),
        differences=Table(DIFFERENCE, [difference_row(one) for one in of_task]),
        fronts=[_front(estimates, cost, task, alone=cost is costs[-1] and len(costs) % 2 == 1) for cost in costs],
    )


def _runs(estimates: Sequence[MethodEstimate], measure: str) -> Drawing:
    narrow, wide = (Markup(runs_svg(estimates, measure, size)) for size in (NARROW, WIDE))
    return Drawing("Runs and 95 % intervals over seeds and rows", narrow, wide)


def _front(estimates: Sequence[MethodEstimate], cost: Cost, task: StudyTask, *, alone: bool) -> Drawing:
    measure = task.settings.measure
    narrow, wide = (Markup(pareto_svg(estimates, cost, measure, task.better, size)) for size in (NARROW, WIDE))
    return Drawing(f"{measure} against {cost.caption}", narrow, wide if alone else None)


def estimate_table(results: Results, task: StudyTask) -> Table:
    """Returns the results of each method on a task as text."""
    estimates = results.of_task(task.name)
    fronts = [front(estimates, cost, task.better) for cost in COSTS]
    rows = []
    for index, one in enumerate(estimates):
        names = [cost.name for cost, found in zip(COSTS, fronts, strict=True) if index in found]
        rows.append(
            (
                _numbered(results.study.methods, one.method),
                figure(one.mean.value),
                "one seed" if one.over_seeds is None else interval(one.over_seeds),
                interval(one.mean.interval),
                f"{one.learning_rate:g}",
                f"{one.parameters:,}",
                f"{one.steps:,.0f}",
                f"{one.seconds:,.1f} s",
                "unknown" if one.peak_bytes is None else format_bytes(round(one.peak_bytes)),
                ", ".join(names) or "none",
            )
        )
    return Table(ESTIMATE, rows)


def difference_row(one: MethodDifference) -> tuple[str, ...]:
    """Returns a difference as text, in the columns of DIFFERENCE."""
    return (
        f"{one.method} - {one.reference}",
        figure(one.mean.value, sign=True),
        interval(one.mean.interval, sign=True),
        p_value(one.p),
        one.verdict,
    )


def _search(results: Results) -> Table | None:
    searched = [one for one in results.runs if one.run.stage == "search"]
    if not searched:
        return None
    chosen = {(one.method, one.task): one.learning_rate for one in results.estimates}
    rows = []
    for run, outcome in searched:
        rate, grid = run.config.optim.learning_rate, results.study.learning_rates(run.method)
        edge = " (at the end of the grid)" if len(grid) > 1 and rate in (min(grid), max(grid)) else ""
        mark = f"chosen{edge}" if chosen[run.method, run.task] == rate else ""
        loss = outcome["search_loss"]
        rows.append((run.method, run.task, f"{rate:g}", "not finite" if loss is None else figure(loss), mark))
    return Table(("method", "task", "learning rate", "loss", ""), rows)


def figure(value: float, *, sign: bool = False) -> str:
    """Returns a number as text, with four decimals."""
    return f"{value:{'+' if sign else ''}.4f}"


def interval(ends: tuple[float, float], *, sign: bool = False) -> str:
    """Returns an interval as text."""
    return f"[{figure(ends[0], sign=sign)}, {figure(ends[1], sign=sign)}]"


def p_value(p: float) -> str:
    """Returns a p-value as text."""
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
