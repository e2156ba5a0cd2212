"""The content of report.json: a run's settings, data, memory plan and results; page.py writes it as HTML."""

import dataclasses
from collections.abc import Sequence

from qlora_jax.config import Config, to_dict
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.report.stats import DataReport
from qlora_jax.data.report.text import ExampleRow, example_rows
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.record_summaries import (
    before_and_after,
    preference_summary,
    question_summary,
    training_summary,
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
