"""The loss curves of a run as a PNG."""

import os
from collections.abc import Iterable, Sequence

from qlora_jax.training.metrics import Record

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
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    steps, losses = _curve(records, "loss")
    weight = 1 - 1 / max(1.0, _SMOOTHING_SHARE * len(losses))
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smooth(losses, weight), color="C0", linewidth=2, label="training, moving average")
    eval_steps, eval_losses = _curve(records, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, color="C1", marker="o", linewidth=2, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per supervised token", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
