"""What of a run goes over its steps besides the loss, as numbers; plot.py draws it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.training.eval_metrics import TaskMetric, task_metrics
from qlora_jax.training.metrics import Record

GIB = 2**30


class Line(NamedTuple):
    """Values at steps.

    Fields:
      main: in the page's first colour, not in its second.
      dash: as matplotlib names it.
      low, high: ends of each value's interval; empty where there is none.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    main: bool = True
    dash: str = "-"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Chart(NamedTuple):
    """Lines of one unit, which is empty where the caption says all."""

    caption: str
    unit: str
    lines: Sequence[Line]

    @property
    def told(self) -> str:
        """`Memory held, GiB`."""
        return ", ".join(filter(None, (self.caption, self.unit)))


def charts(records: Sequence[Record], planned: int) -> list[Chart]:
    """Right answers, learning rate, speed, MFU and memory, of what the records tell.

    Speed and MFU leave out the first step of each length, which compiles.

    Args:
      planned: bytes that the device was to need; shown beside what it held, where it told.
    """
    steps = [record for record in records if "loss" in record]
    warm = _warm(steps)
    found = [
        *(Chart(kind.caption, "% right", _shares(records, name)) for name, kind in QUESTION_KINDS.items()),
        Chart("Learning rate", "", [_line("", steps, lambda r: r["learning_rate"])]),
        Chart("Speed", "tokens a second, no padding", [_line("", warm, lambda r: r["tokens"] / r["seconds"])]),
        Chart("MFU", "% of the device's peak", [_line("", _with(warm, "mfu"), lambda r: 100 * r["mfu"])]),
        Chart("Memory held", "GiB", _memory(steps, planned)),
    ]
    told = [chart._replace(lines=[line for line in chart.lines if line.steps]) for chart in found]
    return [chart for chart in told if chart.lines]


def _shares(records: Sequence[Record], kind: str) -> list[Line]:
    """A line for each share, the first as the main one; its record's interval around each value."""
    found: dict[str, list[tuple[int, TaskMetric]]] = {}
    for record in records:
        for share in task_metrics(record, kind):
            found.setdefault(share.words, []).append((record["step"], share))
    return [
        Line(
            words,
            [step for step, _ in each],
            [100 * share.value for _, share in each],
            main=not place,
            low=[100 * share.low for _, share in each],
            high=[100 * share.high for _, share in each],
        )
        for place, (words, each) in enumerate(found.items())
    ]


def _memory(steps: Sequence[Record], planned: int) -> list[Line]:
    device = _with(steps, "device_bytes")
    return [
        _line("device", device, lambda r: r["device_bytes"] / GIB),
        _line("most so far", _with(steps, "device_peak_bytes"), lambda r: r["device_peak_bytes"] / GIB, dash=":"),
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
