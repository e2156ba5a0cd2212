"""What is known of a run, before it starts and after it ended, as figures; report_page.py tells it to people."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from qlora_jax.config import QUESTION_KINDS, Config, to_dict
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.report.examples import ExampleRow, example_rows
from qlora_jax.data.report.stats import DataReport
from qlora_jax.training.eval_metrics import loss_interval, perplexity, task_metrics
from qlora_jax.training.metrics import Record
from qlora_jax.training.plan.preflight import RunPlan

ROWS_SHOWN = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run's settings, data and plan, and what has come of it so far.

    Fields:
      rows: a few training rows.
      peak: as peak.py tells it; None before a run, and where it is not known.
      records: of metrics.jsonl, those of earlier processes too; none before the first step.
      samples: of samples.jsonl, likewise.
    """

    config: Config
    data: DataReport
    rows: tuple[ExampleRow, ...]
    plan: RunPlan
    peak: int | None
    records: Sequence[Record]
    samples: Sequence[Record]


class Sample(NamedTuple):
    """One prompt.

    Fields:
      prompt: its columns as text.
      replies: (step, reply) at the first evaluation and at the last.
    """

    prompt: dict[str, str]
    replies: tuple[tuple[int, str], ...]


def report_rows(dataset: Dataset) -> tuple[ExampleRow, ...]:
    """The rows that a report shows."""
    return example_rows(dataset.train, dataset.tokenizer, ROWS_SHOWN)


def report_json(report: RunReport) -> dict[str, Any]:
    """What JSON holds; bytes and shares as numbers."""
    return {
        "config": to_dict(report.config),
        "data": _data_facts(report.data),
        "rows": [_row_facts(row) for row in report.rows],
        "memory_plan": {
            "fits": report.plan.fits,
            "device_bytes": report.plan.requirements.device,
            "host_bytes": report.plan.requirements.host,
            "questions_bytes": report.plan.question_bytes or None,
            "limit_bytes": report.plan.limit,
            "micro_batch": list(report.plan.requirements.config.batch[1:]),
            "peak_bytes": report.peak,
        },
        "training": training_summary(report.records),
        "questions": question_summary(report.records),
        "samples": [sample._asdict() for sample in before_and_after(report.samples)],
    }


def _data_facts(data: DataReport) -> dict[str, Any]:
    facts = dataclasses.asdict(data)
    del facts["example"], facts["example_place"]  # `rows` has more of them
    return facts | {"sources": [{"weight": weight, **dataclasses.asdict(side)} for side, weight in data.sources]}


def _row_facts(row: ExampleRow) -> dict[str, Any]:
    segments = [{"text": "".join(run.text for run in runs), "supervised": seen} for runs, seen in row.segments]
    return {"place": row.place, "tokens": row.tokens, "supervised": row.supervised, "segments": segments}


def training_summary(records: Sequence[Record]) -> dict[str, Any]:
    """What the records of a run come to; empty where it made no step.

    `tokens_per_second` is the median over steps: the first of each length compiles, in every process anew. Padding is
    not counted. So is `mfu`, where the device's peak is known.
    """
    steps = [record for record in records if "loss" in record]
    if not steps:
        return {}
    held = [record for record in records if record.get("eval_loss") is not None]
    mfu = [record["mfu"] for record in steps if "mfu" in record]
    best = min(held, key=lambda record: record["eval_loss"], default=None)
    return {
        "steps": steps[-1]["step"],
        "last_loss": steps[-1]["loss"],
        "first_eval": _held_out(held[0]) if held else None,
        "last_eval": _held_out(held[-1]) if held else None,
        "best_eval": _held_out(best) if best else None,
        "tokens": sum(record["tokens"] for record in steps),
        "supervised_tokens": sum(record["supervised_tokens"] for record in steps),
        "seconds": sum(record["seconds"] for record in steps),
        "tokens_per_second": statistics.median(record["tokens"] / record["seconds"] for record in steps),
        "mfu": statistics.median(mfu) if mfu else None,
    }


def question_summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of each share of right answers: the kind of questions, its words, and it at the first evaluation and the last."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        for kind in QUESTION_KINDS:
            for share in task_metrics(record, kind):
                told = {"step": record["step"], "value": share.value, "interval": [share.low, share.high]}
                found.setdefault((kind, share.words), []).append(told)
    return [{"kind": kind, "share": words, "first": each[0], "last": each[-1]} for (kind, words), each in found.items()]


def before_and_after(samples: Sequence[Record]) -> list[Sample]:
    """Each prompt with its first and its last replies; a prompt that was not asked at both is left out."""
    steps = sorted({record["step"] for record in samples})
    ends = dict.fromkeys((*steps[:1], *steps[-1:]))
    by_step = [[record for record in samples if record["step"] == step] for step in ends]
    # A run that was killed while it wrote has fewer in its last step.
    return [
        Sample(_as_text(records[0]["prompt"]), tuple((record["step"], record["reply"]) for record in records))
        for records in zip(*by_step, strict=False)
    ]


def _as_text(columns: dict[str, Any]) -> dict[str, str]:
    """Messages of plain text as `role: content`, other columns that are no text as JSON."""
    return {name: _value_as_text(value) for name, value in columns.items()}


def _value_as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, dict) and one.keys() == {"role", "content"} for one in value):
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return json.dumps(value, ensure_ascii=False, indent=1)


def _held_out(record: Record) -> dict[str, Any]:
    loss = record["eval_loss"]
    ends = loss_interval(record)
    return {"step": record["step"], "loss": loss, "interval": ends and [*ends], "perplexity": perplexity(loss)}
