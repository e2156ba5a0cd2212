"""Plots of a comparison as SVG: each method's runs and interval, and quality against cost with the Pareto front."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qlora_jax.evaluation.row_measures import Better
from qlora_jax.studies.comparison.results import MethodEstimate
from qlora_jax.studies.statistics import pareto_front
from qlora_jax.training.report.plot import Size, page_svg

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
