"""The curves of a run besides the loss, as numbers; plot.py draws them."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.record_summaries import (
    AUX_LOSS,
    BY_LAYER,
    CROSS_ENTROPY,
    DEAD,
    ENTROPY,
    HIGH,
    LOW,
    MAX_LOAD,
    POLICY_ENTROPY,
    POLICY_KL,
    REWARD,
    SAMPLER_GAP,
    SAMPLER_GAP_MAX,
    TEACHER_TAIL,
    Z_LOSS,
    TaskMetric,
    task_metrics,
)

GIB = 2**30
ENDS = ("", LOW, HIGH)  # endings of the keys of a metric and its interval
IN_STEPS_AND_HELD_OUT = {  # metrics, with the caption, unit and factor of their charts
    CROSS_ENTROPY: ("Cross-entropy of the learned tokens", "nats per token", 1.0),
    TEACHER_TAIL: ("Probability outside the teacher's likeliest tokens", "%", 100.0),
    "reply_tokens": ("Length of replies", "tokens", 1.0),
    "tool_calls": ("Calls of tools", "per reply", 1.0),
    "tool_failures": ("Calls of tools with an error", "%", 100.0),
}
_SMOOTHING_SHARE = 0.05  # share of the steps over which a moving average averages


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
    """Curves with a common unit, which is empty if the caption includes it.

    Fields:
      from_zero: True if the vertical axis includes zero.
    """

    caption: str
    unit: str
    lines: Sequence[Line]
    from_zero: bool = True

    @property
    def title(self) -> str:
        """Caption and unit, such as `Memory in use, GiB`."""
        return ", ".join(filter(None, (self.caption, self.unit)))


def charts(records: Sequence[Record], planned: int | None) -> list[Chart]:
    """Returns the charts of right answers, learning rate, speed, MFU and memory for which there are records.

    Speed and MFU omit the first step of each length, which compiles.

    Args:
      planned: the planned bytes on the device, drawn next to the measured ones; None if they are not known.
    """
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "loss" not in record]
    warmed = warm(steps)
    found = [
        *_preference_charts(records, steps),
        *_rollout_charts(records, steps),
        *(Chart(kind.caption, "% right", _question_lines(evaluations, name)) for name, kind in QUESTION_KINDS.items()),
        *_router_charts(steps),
        Chart("Learning rate", "", [_line("", steps, lambda r: r["learning_rate"])]),
        Chart("Speed", "tokens per second, without padding", [_line("", warmed, lambda r: r["tokens"] / r["seconds"])]),
        Chart("MFU", "% of the device's peak", [_line("", _with(warmed, "mfu"), lambda r: 100 * r["mfu"])]),
        Chart("Memory in use", "GiB", _memory(steps, planned)),
    ]
    drawn = [chart._replace(lines=[line for line in chart.lines if line.steps]) for chart in found]
    return [chart for chart in drawn if chart.lines]


def loss_chart(records: Sequence[Record], title: str) -> Chart | None:
    """Returns the losses of all steps and of the held-out rows; None before the first step."""
    training = _metric_line(_with(records, "loss"), "loss", "training")
    held_out = _metric_line(_with(records, "eval_loss"), "eval_loss", "held out")._replace(main=False)
    lines = [line for line in (training, held_out) if line.steps]
    return Chart(title, "", lines, from_zero=False) if lines else None


def thinned(line: Line, most: int) -> Line:
    """Returns a line of at most `most` points: means of equal numbers of values, with their range as the interval."""
    size = -(-len(line.steps) // most)
    if size <= 1:
        return line
    groups = [slice(start, start + size) for start in range(0, len(line.steps), size)]

    def means(values: Sequence[float]) -> list[float]:
        return [statistics.fmean(values[group]) for group in groups]

    has_intervals = len(line.low) == len(line.steps)
    return line._replace(
        steps=[line.steps[group][-1] for group in groups],
        values=means(line.values),
        low=means(line.low) if has_intervals else [min(line.values[group]) for group in groups],
        high=means(line.high) if has_intervals else [max(line.values[group]) for group in groups],
    )


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Returns the moving average m = weight * m + (1 - weight) * value, with Adam's correction for its start at 0."""
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed


def moving_average(values: Sequence[float]) -> list[float]:
    """Returns the average over a share of all steps before each step, and the step itself."""
    return smooth(values, 1 - 1 / max(1.0, _SMOOTHING_SHARE * len(values)))


def _both_lines(
    records: Sequence[Record],
    steps: Sequence[Record],
    name: str,
    label: str = "",
    *,
    main: bool = True,
    scale: float = 1.0,
) -> list[Line]:
    """Returns a metric of held-out rows, solid, and the moving average of its training steps, dashed."""
    found = [
        _metric_line(_with(records, f"eval_{name}"), f"eval_{name}", f"{label}held out", scale)._replace(main=main),
        _metric_line(_with(steps, name), name, f"{label}training", scale)._replace(main=main, dash="--"),
    ]
    return [found[0], found[1]._replace(values=moving_average(found[1].values))]


def _rollout_charts(records: Sequence[Record], steps: Sequence[Record]) -> list[Chart]:
    """Returns the charts of a run that samples replies, or learns from a teacher."""

    def line(key: str, label: str, *, main: bool = True, scale: float = 1.0) -> Line:
        return _line(label, _with(steps, key), lambda r: scale * r[key], main)

    return [
        Chart("Reward", "", _both_lines(records, steps, REWARD), from_zero=False),
        *(
            Chart(caption, unit, _both_lines(records, steps, name, scale=factor))
            for name, (caption, unit, factor) in IN_STEPS_AND_HELD_OUT.items()
        ),
        Chart(
            "Shares of a step",
            "%",
            [
                line("groups_without_signal", "prompts whose replies have equal rewards", scale=100.0),
                line("groups_redrawn", "prompts with further draws", main=False, scale=100.0),
                line("replies_cut", "cut replies", main=False, scale=100.0),
            ],
        ),
        Chart("Entropy of the predictions in replies", "nats", [line(POLICY_ENTROPY, "")]),
        Chart("KL divergence from the reference", "nats per token", [line(POLICY_KL, "")]),
        Chart(
            "Log p of a drawn token, trainer against sampler",
            "nats",
            [line(SAMPLER_GAP_MAX, "largest difference"), line(SAMPLER_GAP, "mean difference", main=False)],
        ),
    ]


def _preference_charts(records: Sequence[Record], steps: Sequence[Record]) -> list[Chart]:
    """Returns the charts of preferences: held-out curves are solid, the moving averages of training steps dashed."""
    lines = functools.partial(_both_lines, records, steps)

    rewards, logps, divergences = (
        [*lines(f"{kind}_chosen", "chosen, "), *lines(f"{kind}_rejected", "rejected, ", main=False)]
        for kind in ("rewards", "logp", "kl")
    )
    return [
        Chart("Pairs with a higher reward for the chosen answer", "%", lines("rewards_accuracy", "", scale=100.0)),
        Chart("Rewards", "", rewards),
        Chart("KL divergence from the reference", "nats per token", divergences),
        Chart("Log p of answers minus that of the reference", "nats per token", lines("log_ratio_per_token", "")),
        Chart("Log p of answers", "nats per token", logps, from_zero=False),
    ]


def _router_charts(steps: Sequence[Record]) -> list[Chart]:
    """Returns the charts of a mixture's routers: the least balanced layer, and the mean over layers."""

    def mean(key: str) -> Line:
        own = _with(steps, key + BY_LAYER)
        return _line("mean over layers", own, lambda r: sum(r[key + BY_LAYER]) / len(r[key + BY_LAYER]), main=False)

    def worst(key: str, label: str) -> Line:
        return _line(label, _with(steps, key), lambda r: r[key])

    return [
        Chart(
            "Load of the busiest expert over the mean load", "", [worst(MAX_LOAD, "most uneven layer"), mean(MAX_LOAD)]
        ),
        Chart("Entropy of the experts' loads over its maximum", "", [worst(ENTROPY, "lowest layer"), mean(ENTROPY)]),
        Chart("Experts without a token in the step, all layers", "", [worst(DEAD, "")]),
        Chart("Load-balancing loss", "", [worst(AUX_LOSS, "")]),
        Chart("Router z-loss", "", [worst(Z_LOSS, "")]),
    ]


def _metric_line(records: Sequence[Record], key: str, label: str, scale: float = 1.0) -> Line:
    """Returns a metric, with its intervals if the records have them."""
    steps = [record["step"] for record in records]
    values, low, high = ([scale * record[key + end] for record in records if key + end in record] for end in ENDS)
    return Line(label, steps, values, low=low, high=high)


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


def _memory(steps: Sequence[Record], planned: int | None) -> list[Line]:
    device = _with(steps, "device_bytes")
    return [
        _line("device", device, lambda r: r["device_bytes"] / GIB),
        _line("peak so far", _with(steps, "device_peak_bytes"), lambda r: r["device_peak_bytes"] / GIB, dash=":"),
        _line("planned", device if planned else [], lambda r: (planned or 0) / GIB, dash="--"),
        _line("host", _with(steps, "host_bytes"), lambda r: r["host_bytes"] / GIB, main=False),
    ]


def _line(
    label: str, records: Sequence[Record], value: Callable[[Record], float], main: bool = True, dash: str = "-"
) -> Line:
    return Line(label, [record["step"] for record in records], [value(record) for record in records], main, dash)


def _with(records: Sequence[Record], key: str) -> list[Record]:
    """Returns the records with a finite value; others are null in metrics.jsonl."""
    return [record for record in records if record.get(key) is not None]


def warm(steps: Sequence[Record]) -> list[Record]:
    """Returns the steps without the first of each length, which compiles."""
    firsts = {record["length"]: record["step"] for record in reversed(steps)}
    return [record for record in steps if record["step"] != firsts[record["length"]]]
