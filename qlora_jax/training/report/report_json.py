"""The content of report.json: a run's settings, data, memory plan and results; page.py writes it as HTML."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from qlora_jax.config import QUESTION_KINDS, Config, to_dict
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.report.stats import DataReport
from qlora_jax.data.report.text import ExampleRow, example_rows
from qlora_jax.measures.metrics import perplexity
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.step_metrics import (
    EVAL,
    HIGH,
    LOW,
    OBJECTIVE_ROWS,
    PREFERENCE_LABELS,
    loss_interval,
    task_metrics,
)
from qlora_jax.training.plan.records import RunPlan

ROWS_SHOWN = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run's settings, data and memory plan, and its results so far.

    Attributes:
      rows: a few training rows.
      peak: the peak memory in bytes (memory_watch.py); None before a run, or if it is not known.
      records: the records of metrics.jsonl; empty before the first step.
      samples: the records of samples.jsonl.
    """

    config: Config
    data: DataReport
    rows: tuple[ExampleRow, ...]
    plan: RunPlan
    peak: int | None
    records: Sequence[Record]
    samples: Sequence[Record]


class EvaluationSummary(TypedDict):
    """The held-out loss at a step, with its 95 % interval, and its perplexity if it is a mean over tokens."""

    step: int
    loss: float
    interval: list[float] | None
    perplexity: float | None


class TrainingSummary(TypedDict):
    """The training results of a run.

    Tokens do not include padding. `tokens_per_second` and `mfu` are medians over steps, because the first step of each
    length compiles. `mfu` is None if the device's peak is not known.
    """

    steps: int
    last_loss: float | None
    first_eval: EvaluationSummary | None
    last_eval: EvaluationSummary | None
    best_eval: EvaluationSummary | None
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None


class MetricPoint(TypedDict):
    """A metric at a step, with its 95 % interval."""

    step: int
    value: float
    interval: list[float]


class QuestionSummary(TypedDict):
    """A question metric at the first evaluation and at the last.

    Keys:
      kind: the task, such as `letters`.
      share: the metric's label.
    """

    kind: str
    share: str
    first: MetricPoint
    last: MetricPoint


class Sample(NamedTuple):
    """A prompt with its first and last replies.

    Fields:
      prompt: its columns as text.
      replies: (step, reply) at the first evaluation and at the last.
    """

    prompt: dict[str, str]
    replies: tuple[tuple[int, str], ...]


def report_rows(dataset: Dataset) -> tuple[ExampleRow, ...]:
    """Returns the training rows that a report shows."""
    return example_rows(dataset.train, dataset.tokenizer, ROWS_SHOWN, dataset.report.parts)


def report_json(report: RunReport) -> dict[str, object]:
    """Returns the content of report.json; sizes are in bytes, shares from 0 to 1."""
    return {
        "config": to_dict(report.config),
        "data": _data_json(report.data),
        "rows": [_row_json(row) for row in report.rows],
        "memory_plan": {
            "fits": report.plan.fits,
            "device_bytes": report.plan.requirements.device,
            "host_bytes": report.plan.requirements.host,
            "questions_bytes": report.plan.question_bytes or None,
            "reference": None if report.plan.reference is None else report.plan.reference.to_dict(),
            "limit_bytes": report.plan.limit,
            "micro_batch": list(report.plan.requirements.config.batch[1:]),
            "peak_bytes": report.peak,
        },
        "training": training_summary(report.records) or {},
        "questions": question_summary(report.records),
        "preferences": preference_summary(report.records),
        "samples": [sample._asdict() for sample in before_and_after(report.samples)],
    }


def _data_json(data: DataReport) -> dict[str, object]:
    facts: dict[str, object] = dataclasses.asdict(data)
    for name in ("example", "example_place", "example_label", "parts"):  # `rows` has more examples
        del facts[name]
    return facts | {"sources": [{"weight": weight, **dataclasses.asdict(side)} for side, weight in data.sources]}


def _row_json(row: ExampleRow) -> dict[str, object]:
    segments = [
        {"text": "".join(run.text for run in runs), "supervised": seen} | ({"name": name} if name else {})
        for runs, seen, name in row.segments
    ]
    label = {"label": row.label} if row.label else {}
    return {"place": row.place, **label, "tokens": row.tokens, "supervised": row.supervised, "segments": segments}


def training_summary(records: Sequence[Record]) -> TrainingSummary | None:
    """Summarizes the records of a run; returns None before the first step."""
    steps = [record for record in records if "loss" in record]
    if not steps:
        return None
    evaluations = [record for record in records if record.get("eval_loss") is not None]
    mfu = [record["mfu"] for record in steps if "mfu" in record]
    best = min(evaluations, key=lambda record: record["eval_loss"], default=None)
    return {
        "steps": steps[-1]["step"],
        "last_loss": steps[-1]["loss"],
        "first_eval": _evaluation(evaluations[0]) if evaluations else None,
        "last_eval": _evaluation(evaluations[-1]) if evaluations else None,
        "best_eval": _evaluation(best) if best else None,
        "tokens": sum(record["tokens"] for record in steps),
        "supervised_tokens": sum(record["supervised_tokens"] for record in steps),
        "seconds": sum(record["seconds"] for record in steps),
        "tokens_per_second": statistics.median(record["tokens"] / record["seconds"] for record in steps),
        "mfu": statistics.median(mfu) if mfu else None,
    }


def question_summary(records: Sequence[Record]) -> list[QuestionSummary]:
    """Returns each question metric at the first evaluation and at the last."""
    found: dict[tuple[str, str], list[MetricPoint]] = {}
    for record in records:
        for kind in QUESTION_KINDS:
            for metric in task_metrics(record, kind):
                point: MetricPoint = {
                    "step": record["step"],
                    "value": metric.value,
                    "interval": [metric.low, metric.high],
                }
                found.setdefault((kind, metric.label), []).append(point)
    return [
        {"kind": kind, "share": label, "first": points[0], "last": points[-1]}
        for (kind, label), points in found.items()
    ]


def preference_summary(records: Sequence[Record]) -> dict[str, list[MetricPoint]]:
    """Returns each held-out metric of preferences at the first evaluation and at the last, by its name."""
    found: dict[str, list[MetricPoint]] = {}
    for name in PREFERENCE_LABELS:
        key = f"{EVAL}{name}"
        points = [record for record in records if record.get(key) is not None and key + LOW in record]
        if points:
            found[name] = [
                {"step": one["step"], "value": one[key], "interval": [one[key + LOW], one[key + HIGH]]}
                for one in (points[0], points[-1])
            ]
    return found


def before_and_after(samples: Sequence[Record]) -> list[Sample]:
    """Returns each prompt with its first and last replies; omits prompts that lack one of them."""
    steps = sorted({record["step"] for record in samples})
    ends = dict.fromkeys((*steps[:1], *steps[-1:]))
    by_step = [[record for record in samples if record["step"] == step] for step in ends]
    # A run that was killed during a write has fewer replies at its last step.
    return [
        Sample(_as_text(records[0]["prompt"]), tuple((record["step"], record["reply"]) for record in records))
        for records in zip(*by_step, strict=False)
    ]


def _as_text(columns: Record) -> dict[str, str]:
    return {name: _value_as_text(value) for name, value in columns.items()}


def _value_as_text(value: object) -> str:
    """Returns messages as `role: content` lines, and other columns that are not text as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, dict) and one.keys() == {"role", "content"} for one in value):
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return json.dumps(value, ensure_ascii=False, indent=1)


def _evaluation(record: Record) -> EvaluationSummary:
    loss = record["eval_loss"]
    ends = loss_interval(record)
    found = None if OBJECTIVE_ROWS in record else perplexity(loss)
    return {"step": record["step"], "loss": loss, "interval": ends and [*ends], "perplexity": found}
