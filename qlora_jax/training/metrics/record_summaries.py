"""The keys of a run's records, and summaries of the records: training, questions, preferences, samples.

Nothing here needs jax, so that a program that only shows runs starts at once.
"""

import json
import statistics
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.measures.metrics import perplexity
from qlora_jax.training.metrics.metrics_file import Record

LOW, HIGH = "_low", "_high"  # suffixes of an interval's ends
LOSS, REWARD = "eval_loss", "reward"
OBJECTIVE_ROWS = "eval_rows"  # in records whose loss is a mean over rows, not over tokens
AUX_LOSS, Z_LOSS = "router_aux_loss", "router_z_loss"
MAX_LOAD, ENTROPY, DEAD = "router_max_load", "router_entropy", "router_dead_experts"
BY_LAYER = "_by_layer"
EVAL = "eval_"  # prefix of the held-out metrics
CHOSEN, REJECTED, MARGIN, ACCURACY = "rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy"
LOG_RATIO, KTO_KL, LOGP_CHOSEN, LOGP_REJECTED = "log_ratio_per_token", "kto_kl", "logp_chosen", "logp_rejected"
KL_CHOSEN, KL_REJECTED = "kl_chosen", "kl_rejected"
DIVERGENCE, CROSS_ENTROPY, TEACHER_TAIL = "divergence", "cross_entropy", "teacher_tail"
POLICY_ENTROPY, POLICY_KL = "entropy", "kl"
CLIPPED, CISPO_CLIPPED = "clip_ratio_region_mean", "cispo_clip_ratio"
CLIPPED_LOW, CLIPPED_LOW_MIN = "clip_ratio_low_mean", "clip_ratio_low_min"
CLIPPED_HIGH, CLIPPED_HIGH_MAX = "clip_ratio_high_mean", "clip_ratio_high_max"
SAMPLER_GAP, SAMPLER_GAP_MAX = "sampling_logp_difference_mean", "sampling_logp_difference_max"
PREFERENCE_LABELS = {
    ACCURACY: "right by reward",
    MARGIN: "reward margin",
    CHOSEN: "reward of chosen",
    REJECTED: "reward of rejected",
    KL_CHOSEN: "KL to the reference per token of chosen",
    KL_REJECTED: "KL to the reference per token of rejected",
    LOGP_CHOSEN: "log p per token of chosen",
    LOGP_REJECTED: "log p per token of rejected",
    LOG_RATIO: "log ratio to the reference per token",
    KTO_KL: "KL of KTO",
}


class TaskMetric(NamedTuple):
    """A task's metric from 0 to 1, such as its share of right answers, with its 95 % confidence interval.

    Fields:
      name: its key in records.
      label: its name for readers.
      low, high: the ends of the interval.
    """

    name: str
    label: str
    value: float
    low: float
    high: float


def task_metrics(record: Record, task: str) -> list[TaskMetric]:
    """Returns the metrics of a task in a record, in order; the inverse of `flatten_metrics`."""
    names = [name for name in record if name.startswith(f"{task}_") and name + LOW in record]
    return [
        TaskMetric(
            name, name.removeprefix(f"{task}_").replace("_", " "), *(record[name + end] for end in ("", LOW, HIGH))
        )
        for name in names
    ]


def loss_interval(record: Record) -> tuple[float, float] | None:
    """Returns the interval of a record's held-out loss; None if it has none."""
    return (record[LOSS + LOW], record[LOSS + HIGH]) if LOSS + LOW in record else None


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
    for record in (record for record in records if "loss" not in record):
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
