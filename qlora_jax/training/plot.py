"""The loss curves of a run, and lengths of rows, as a PNG or as SVG that takes its colours from the page around it."""

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qlora_jax.training.metrics import Record

_BARS = 40
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
    axes.set(title=title)
    figure.savefig(path)


def loss_svg(records: Sequence[Record]) -> str:
    """The same curves as an <svg> element."""
    return _svg(lambda axes: _draw_loss(axes, records))


def lengths_svg(lengths: Mapping[int, int], max_length: int) -> str:
    """A histogram of rows by tokens, as an <svg> element; `max_length` is marked where rows reach it."""
    return _svg(lambda axes: _draw_lengths(axes, lengths, max_length))


def _draw_loss(axes: Any, records: Sequence[Record]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, losses = _curve(records, "loss")
    weight = 1 - 1 / max(1.0, _SMOOTHING_SHARE * len(losses))
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smooth(losses, weight), color="C0", linewidth=2, label="training, moving average")
    eval_steps, eval_losses = _curve(records, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, color="C1", marker="o", linewidth=2, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per supervised token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_lengths(axes: Any, lengths: Mapping[int, int], max_length: int) -> None:
    from matplotlib.ticker import MaxNLocator

    longest = max(lengths)
    axes.hist(list(lengths), weights=list(lengths.values()), bins=min(_BARS, longest), range=(0, longest), color="C0")
    if longest >= max_length:
        axes.axvline(max_length, color="C1", linestyle="--", label=f"data.max_length {max_length:,}")
        axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # above the bars
        axes.legend(frameon=False, loc="upper left")
    axes.set(xlabel="tokens a row, before any is cut", ylabel="rows")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _svg(draw: Callable[[Any], None]) -> str:
    """As wide as a phone, so that its letters can be read there; text stays text."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), "#010101"
    )
    colors: dict[Any, Any] = {"axes.prop_cycle": cycler(color=["#020202", "#030303"]), "grid.color": "#010101"}
    texts: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 10}
    out = io.StringIO()
    with matplotlib.rc_context(texts | ink | colors):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    for placeholder, name in _PAGE_COLORS.items():
        svg = svg.replace(placeholder, f"var({name})")
    return svg[svg.index("<svg") :]
