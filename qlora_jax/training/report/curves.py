"""The curves of a run besides the loss, as numbers; plot.py draws them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.training.eval_metrics import TaskMetric, task_metrics
from qlora_jax.training.metrics import Record

GIB = 2**30


class Line(NamedTuple):
    """A curve over steps.

    Fields:
      main: True for the page's first colour, False for its second.
      dash: a line style of matplotlib.
      low, high: the ends of each value's interval; empty without intervals.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    main: bool = True
    dash: str = "-"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Chart(NamedTuple):
    """Curves with a common unit, which is empty if the caption includes it."""

    caption: str
    unit: str
    lines: Sequence[Line]

    @property
    def title(self) -> str:
        """Caption and unit, such as `Memory in use, GiB`."""
        return ", ".join(filter(None, (self.caption, self.unit)))


def charts(records: Sequence[Record], planned: int) -> list[Chart]:
    """Returns the charts of right answers, learning rate, speed, MFU and memory for which there are records.

    Speed and MFU omit the first step of each length, which compiles.

    Args:
      planned: the planned bytes on the device; drawn next to the measured ones.
    """
    steps = [record for record in records if "loss" in record]
    warm = _warm(steps)
    found = [
        *(Chart(kind.caption, "% right", _question_lines(records, name)) for name, kind in QUESTION_KINDS.items()),
        Chart("Learning rate", "", [_line("", steps, lambda r: r["learning_rate"])]),
        Chart("Speed", "tokens per second, without padding", [_line("", warm, lambda r: r["tokens"] / r["seconds"])]),
        Chart("MFU", "% of the device's peak", [_line("", _with(warm, "mfu"), lambda r: 100 * r["mfu"])]),
        Chart("Memory in use", "GiB", _memory(steps, planned)),
    ]
    drawn = [chart._replace(lines=[line for line in chart.lines if line.steps]) for chart in found]
    return [chart for chart in drawn if chart.lines]


def _question_lines(records: Sequence[Record], kind: str) -> list[Line]:
    """Returns a line per metric of a question task, with intervals; the first is the main one."""
    found: dict[str, list[tuple[int, TaskMetric]]] = {}
    for record in records:
        for metric in task_metrics(record, kind):
            found.setdefault(metric.label, []).append((record["step"], metric))
    return [
        Line(
            label,
            [step for step, _ in points],
            [100 * metric.value for _, metric in points],
            main=not index,
            low=[100 * metric.low for _, metric in points],
            high=[100 * metric.high for _, metric in points],
        )
        for index, (label, points) in enumerate(found.items())
    ]


def _memory(steps: Sequence[Record], planned: int) -> list[Line]:
    device = _with(steps, "device_bytes")
    return [
        _line("device", device, lambda r: r["device_bytes"] / GIB),
        _line("peak so far", _with(steps, "device_peak_bytes"), lambda r: r["device_peak_bytes"] / GIB, dash=":"),
        _line("planned", device, lambda r: planned / GIB, dash="--"),
        _line("host", _with(steps, "host_bytes"), lambda r: r["host_bytes"] / GIB, main=False),
    ]


def _line(
    label: str, records: Sequence[Record], value: Callable[[Record], float], main: bool = True, dash: str = "-"
) -> Line:
    return Line(label, [record["step"] for record in records], [value(record) for record in records], main, dash)


def _with(records: Sequence[Record], key: str) -> list[Record]:
    return [record for record in records if key in record]


def _warm(steps: Sequence[Record]) -> list[Record]:
    firsts = {record["length"]: record["step"] for record in reversed(steps)}
    return [record for record in steps if record["step"] != firsts[record["length"]]]
