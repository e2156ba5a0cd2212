"""Writes the page of a study: one HTML file that loads no script, font or image.

Names, settings and paths are untrusted text. jinja2 escapes all of it, and the page's Content-Security-Policy keeps a
browser from running scripts.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from qlora_jax.atomic_files import write_text
from qlora_jax.config.sizes import format_bytes
from qlora_jax.evaluation.task import Better
from qlora_jax.page_template import page_template
from qlora_jax.studies.comparison.results import LEVEL, MethodDifference, MethodEstimate, Results, search_losses
from qlora_jax.studies.comparison.study import StudyTask
from qlora_jax.studies.statistics import pareto_front
from qlora_jax.training.report.plot import NARROW, WIDE, Size, page_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
LOG_FROM = 5  # ratio of the largest cost to the smallest


class Cost(NamedTuple):
    """A cost of a method.

    Fields:
      name: in one word.
      caption: with its unit.
      of: its value; None if it is not known.
    """

    name: str
    caption: str
    of: Callable[[MethodEstimate], float | None]


COSTS = (
    Cost("parameters", "trainable parameters", lambda estimate: float(estimate.parameters)),
    Cost("memory", "peak memory, MiB", lambda estimate: estimate.peak_bytes and estimate.peak_bytes / MIB),
    Cost("time", "seconds in training steps", lambda estimate: estimate.seconds),
)


def front(estimates: Sequence[MethodEstimate], cost: Cost, better: Better) -> list[int]:
    """Returns the indices of the methods on the Pareto front; methods without the cost are left out."""
    known = [index for index, estimate in enumerate(estimates) if cost.of(estimate) is not None]
    sign = -1 if better == "higher" else 1
    costs = [value for index in known if (value := cost.of(estimates[index])) is not None]
    found = pareto_front(costs, [sign * estimates[index].mean.value for index in known])
    return [known[index] for index in found]


def pareto_svg(estimates: Sequence[MethodEstimate], cost: Cost, measure: str, better: Better, size: Size) -> str:
    """Returns quality against cost; a point has the method's number, and a line joins those that no other beats."""
    draw = functools.partial(_draw_pareto, estimates=estimates, cost=cost, measure=measure, better=better)
    return page_svg(draw, f"{estimates[0].task}: {measure} against {cost.caption}", size)


def _draw_pareto(axes: "Axes", estimates: Sequence[MethodEstimate], cost: Cost, measure: str, better: Better) -> None:
    best = front(estimates, cost, better)
    for index, estimate in enumerate(estimates):
        at = cost.of(estimate)
        if at is None:
            continue
        color = "C0" if index in best else "C1"
        low, high = estimate.mean.interval
        axes.plot([at, at], [low, high], color=color, linewidth=1)
        axes.plot(at, estimate.mean.value, "o", color=color)
        axes.annotate(str(index + 1), (at, estimate.mean.value), (5, 4), textcoords="offset points")
    line = [(at, estimates[index].mean.value) for index in best if (at := cost.of(estimates[index])) is not None]
    axes.plot([at for at, _ in line], [value for _, value in line], color="C0", linewidth=1, linestyle="--")
    _scale(axes, [at for estimate in estimates if (at := cost.of(estimate)) is not None])
    axes.set_xlabel(cost.caption)
    axes.set_ylabel(measure, parse_math=False)
    _tidy(axes)


def _scale(axes: "Axes", costs: Sequence[float]) -> None:
    """Makes the axis of costs logarithmic if they differ by much."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    if max(costs) > LOG_FROM * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=30)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def runs_svg(estimates: Sequence[MethodEstimate], measure: str, size: Size) -> str:
    """Returns each method's runs as points, with the mean and its interval over seeds and rows."""
    width, _ = size
    height = 0.9 + 0.35 * len(estimates)
    draw = functools.partial(_draw_runs, estimates=estimates, measure=measure)
    return page_svg(draw, f"{estimates[0].task}: runs", (width, height))


def _draw_runs(axes: "Axes", estimates: Sequence[MethodEstimate], measure: str) -> None:
    for place, estimate in enumerate(estimates):
        low, high = estimate.mean.interval
        axes.plot([low, high], [place, place], color="C0", linewidth=2, alpha=0.6)
        axes.plot(estimate.mean.value, place, "|", color="C0", markersize=14, markeredgewidth=2)
        axes.plot(estimate.by_seed, [place] * len(estimate.by_seed), "o", color="C1", markersize=4)
    axes.set_yticks(range(len(estimates)), [str(place + 1) for place in range(len(estimates))])
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.set_xlabel(measure, parse_math=False)
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


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
    margin = f"; differences below {task.settings.margin:g} count as equal" if task.settings.margin else ""
    costs = [cost for cost in COSTS if front(estimates, cost, task.better)]
    return Section(
        name=task.name,
        measure=f"{measure} ({task.better} is better{margin})",
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
        _p_value(one.p),
        f"equal (p {_p_value(one.p_unequal)})" if one.verdict == "equal" and one.p_unequal is not None else one.verdict,
    )


def _p_value(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _search(results: Results) -> Table | None:
    searched = [one for one in results.runs if one.run.stage == "search"]
    if not searched:
        return None
    rows = []
    for estimate in results.estimates:
        pair = estimate.method, estimate.task
        losses = search_losses([one for one in searched if (one.run.method, one.run.task) == pair])
        for rate, loss in losses.items():
            edge = " (at the end of the grid)" if rate in (min(losses), max(losses)) else ""
            mark = f"chosen{edge}" if rate == estimate.learning_rate else ""
            rows.append((*pair, f"{rate:g}", figure(loss) if math.isfinite(loss) else "not finite", mark))
    return Table(("method", "task", "learning rate", "loss", ""), rows)


def figure(value: float, *, sign: bool = False) -> str:
    """Returns a number as text, with four decimals."""
    return f"{value:{'+' if sign else ''}.4f}"


def interval(ends: tuple[float, float], *, sign: bool = False) -> str:
    """Returns an interval as text."""
    return f"[{figure(ends[0], sign=sign)}, {figure(ends[1], sign=sign)}]"
