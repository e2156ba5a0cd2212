"""Plots of a run's curves and of row lengths, as PNG, or as SVG with the colours of the page around it."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.atomic_files import write_bytes
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.record_summaries import loss_interval
from qlora_jax.training.report.curves import Chart, moving_average

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Size = tuple[float, float]  # inches
RcParams = dict[Any, Any]  # matplotlib types its keys as literals
# Sizes of SVGs: a page shows them about as wide as they are drawn, so that letters have the size of the page's text.
NARROW: Size = (4.0, 2.9)  # for a phone, or half a page
WIDE: Size = (8.4, 3.2)  # for a full page
_BARS = 40
_FEW = 30  # steps
_LEGEND_CHARACTERS = 9  # per inch of a legend in one row
_THOUSAND = 1000
_FAINT = 0.2
# Placeholder colours, and the CSS variables that replace them, so that the page can be light or dark.
_PAGE_COLORS = {"#010101": "--ink", "#020202": "--first", "#030303": "--second"}


MEANS = {"tokens": "supervised tokens", "rows": "rows"}


def _curve(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def loss_label(objective: str) -> str:
    """Returns the label of the axis of losses."""
    if objective == "sft":
        return "loss, nats per supervised token"
    return f"loss of {objective}, mean over {MEANS[OBJECTIVES[objective].per]}"


def plot_loss(records: Sequence[Record], path: Path, title: str, label: str) -> None:
    """Draws `loss` (each step faint, its average bold) and `eval_loss` over `step`, as a PNG file.

    Args:
      label: of the axis of losses.
    """
    # Imported here because matplotlib adds half a second to the start of every command.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_loss(axes, records)
    axes.set_title(title, parse_math=False)  # a name may contain $
    axes.set_ylabel(label)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_bytes(path, out.getvalue())


def loss_svg(records: Sequence[Record], size: Size) -> str:
    """Returns the loss curves as an <svg> element, without caption and unit."""
    return page_svg(lambda axes: _draw_loss(axes, records), "loss", size)


def chart_svg(chart: Chart, size: Size) -> str:
    """Returns a chart as an <svg> element, without caption and unit."""
    return page_svg(lambda axes: draw_chart(axes, chart), chart.caption, size)


def lengths_svg(lengths: Mapping[int, int], max_length: int, size: Size) -> str:
    """Returns a histogram of row lengths as an <svg> element; marks `max_length` if a row reaches it."""
    return page_svg(lambda axes: _draw_lengths(axes, lengths, max_length), "lengths", size)


def _draw_loss(axes: "Axes", records: Sequence[Record]) -> None:
    steps, losses = _curve(records, "loss")
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="loss per step")
    marker = _marker(steps)
    axes.plot(steps, moving_average(losses), color="C0", linewidth=2, marker=marker, label="moving average")
    eval_steps, eval_losses = _curve(records, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, color="C1", marker="o", linewidth=2, label="held-out loss")
        between = [(record["step"], *ends) for record in records if (ends := loss_interval(record))]
        eval_at, low, high = np.array(between).reshape(-1, 3).T
        axes.fill_between(eval_at, low, high, color="C1", alpha=_FAINT, linewidth=0)
    _legend_above(axes)
    _label_steps(axes)


def draw_chart(axes: "Axes", chart: Chart) -> None:
    """Draws the curves of a chart with their intervals."""
    for line in chart.lines:
        color = "C0" if line.main else "C1"
        style = {"color": color, "linestyle": line.dash, "linewidth": 2, "marker": _marker(line.steps)}
        axes.plot(line.steps, line.values, label=line.label, **style)
        if line.low:
            axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.15, linewidth=0)
    top = max(value for line in chart.lines for value in (*line.values, *line.high))
    lowest = min(value for line in chart.lines for value in (*line.values, *line.low))
    if chart.from_zero:
        axes.set_ylim(min(0, 1.1 * lowest), 1.1 * top if top > 0 else (0 if lowest < 0 else 1))
    if top >= _THOUSAND:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 6), useMathText=True)
    if any(line.label for line in chart.lines):
        _legend_above(axes)
    _label_steps(axes)


def _legend_above(axes: "Axes") -> None:
    """Places the legend above the plot, where no curve crosses it; in two columns if it is too long for a row."""
    characters = sum(len(label) for label in axes.get_legend_handles_labels()[1])
    columns = 4 if characters <= _LEGEND_CHARACTERS * axes.figure.bbox.width / axes.figure.dpi else 2
    style = {"frameon": False, "handlelength": 1.5, "columnspacing": 1}
    legend = axes.figure.legend(loc="outside upper center", ncols=columns, **style)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _marker(steps: Sequence[int]) -> str | None:
    """Returns a marker if the points are so few that a line hides them."""
    return "." if len(steps) <= _FEW else None


def _label_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_lengths(axes: "Axes", lengths: Mapping[int, int], max_length: int) -> None:
    from matplotlib.ticker import MaxNLocator

    longest = max(lengths)
    axes.hist(list(lengths), weights=list(lengths.values()), bins=min(_BARS, longest), range=(0, longest), color="C0")
    if longest >= max_length:
        axes.axvline(max_length, color="C1", linestyle="--", label=f"data.max_length {max_length:,}")
        _legend_above(axes)
    axes.set(xlabel="tokens per row, before truncation", ylabel="rows")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0, None)
    axes.grid(axis="y", alpha=_FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def page_svg(draw: Callable[["Axes"], None], name: str, size: Size) -> str:
    """Returns a plot as an <svg> element, with text as text and the colours of the page around it.

    Ids are unique per drawing: a browser may not render what it references in a hidden drawing.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    ink: RcParams = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), "#010101"
    )
    colors: RcParams = {"axes.prop_cycle": cycler(color=["#020202", "#030303"]), "grid.color": "#010101"}
    texts: RcParams = {"svg.fonttype": "none", "svg.hashsalt": f"{name} {size}", "font.size": 10}
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
