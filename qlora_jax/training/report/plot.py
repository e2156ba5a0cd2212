"""The curves of a run, and lengths of rows, as a PNG or as SVG that takes its colours from the page around it."""

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.training.eval_metrics import loss_interval
from qlora_jax.training.metrics import Record
from qlora_jax.training.report.curves import Chart

Size = tuple[float, float]  # inches
# Of SVG: a page shows one about as wide as it is drawn, so that its letters are of the size of the page's.
NARROW: Size = (4.0, 2.9)  # a phone, or half of a page
WIDE: Size = (8.4, 3.2)  # all of a page
_BARS = 40
_FEW = 30  # steps
_THOUSAND = 1000
_FAINT = 0.2
# Colours that nobody draws with, and the CSS variables that take their place in a page, which is light or dark.
_PAGE_COLORS = {"#010101": "--ink", "#020202": "--first", "#030303": "--second"}
_SMOOTHING_SHARE = 0.05  # of the steps: over about so many the bold curve averages


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average m = weight * m + (1 - weight) * value, with Adam's correction for its start at 0."""
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed


def _curve(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(records: Sequence[Record], path: str | os.PathLike, title: str) -> None:
    """Draws `loss` (each step faint, its average bold) and `eval_loss` over `step`."""
    # Here, not above: matplotlib costs half a second of every command's start, and is needed at a run's end alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_loss(axes, records)
    axes.set(title=title, ylabel="loss, nats per supervised token")
    figure.savefig(path)


def loss_svg(records: Sequence[Record], size: Size) -> str:
    """The same curves as an <svg> element; their unit is for the text around it to tell."""
    return _svg(lambda axes: _draw_loss(axes, records), "loss", size)


def chart_svg(chart: Chart, size: Size) -> str:
    """A chart of curves.py as an <svg> element, zero in sight; caption and unit are for the text around it to tell."""
    return _svg(lambda axes: _draw_chart(axes, chart), chart.caption, size)


def lengths_svg(lengths: Mapping[int, int], max_length: int, size: Size) -> str:
    """A histogram of rows by tokens, as an <svg> element; `max_length` is marked where rows reach it."""
    return _svg(lambda axes: _draw_lengths(axes, lengths, max_length), "lengths", size)


def _draw_loss(axes: Any, records: Sequence[Record]) -> None:
    steps, losses = _curve(records, "loss")
    weight = 1 - 1 / max(1.0, _SMOOTHING_SHARE * len(losses))
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="each step")
    dots = _dots(steps)
    axes.plot(steps, smooth(losses, weight), color="C0", linewidth=2, marker=dots, label="moving average")
    eval_steps, eval_losses = _curve(records, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, color="C1", marker="o", linewidth=2, label="held out")
        between = [(record["step"], *ends) for record in records if (ends := loss_interval(record))]
        axes.fill_between(*np.array(between).reshape(-1, 3).T, color="C1", alpha=_FAINT, linewidth=0)
    _legend_above(axes)
    _over_steps(axes)


def _draw_chart(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        color = "C0" if line.main else "C1"
        style = {"color": color, "linestyle": line.dash, "linewidth": 2, "marker": _dots(line.steps)}
        axes.plot(line.steps, line.values, label=line.label, **style)
        if line.low:
            axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.15, linewidth=0)
    most = max(value for line in chart.lines for value in (*line.values, *line.high))
    axes.set_ylim(0, 1.1 * most or 1)
    if most >= _THOUSAND:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 6), useMathText=True)
    if any(line.label for line in chart.lines):
        _legend_above(axes)
    _over_steps(axes)


def _legend_above(axes: Any) -> None:
    """In a row of its own, where no curve crosses it."""
    axes.figure.legend(loc="outside upper center", frameon=False, ncols=4, handlelength=1.5, columnspacing=1)


def _dots(steps: Sequence[int]) -> str | None:
    """Where there are so few that a line alone hides them."""
    return "." if len(steps) <= _FEW else None


def _over_steps(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_lengths(axes: Any, lengths: Mapping[int, int], max_length: int) -> None:
    from matplotlib.ticker import MaxNLocator

    longest = max(lengths)
    axes.hist(list(lengths), weights=list(lengths.values()), bins=min(_BARS, longest), range=(0, longest), color="C0")
    if longest >= max_length:
        axes.axvline(max_length, color="C1", linestyle="--", label=f"data.max_length {max_length:,}")
        _legend_above(axes)
    axes.set(xlabel="tokens a row, before any is cut", ylabel="rows")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0, None)
    axes.grid(axis="y", alpha=_FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _svg(draw: Callable[[Any], None], name: str, size: Size) -> str:
    """Text stays text. What it refers to by id is its own: a browser need not draw what is in a hidden drawing."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), "#010101"
    )
    colors: dict[Any, Any] = {"axes.prop_cycle": cycler(color=["#020202", "#030303"]), "grid.color": "#010101"}
    texts: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"{name} {size}", "font.size": 10}
    out = io.StringIO()
    with matplotlib.rc_context(texts | ink | colors):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    for placeholder, name in _PAGE_COLORS.items():
        svg = svg.replace(placeholder, f"var({name})")
    return svg[svg.index("<svg") :]
