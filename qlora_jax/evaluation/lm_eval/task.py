"""The task `harness`: tasks of EleutherAI's lm-evaluation-harness, with its results as our metrics, also in pairs."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float64

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.lm_eval.preflight import check_ready, import_lm_eval, task_manager
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, MetricKind
from qlora_jax.measures.statistics import Z_95, mcnemar, paired_bootstrap_of
from qlora_jax.models.partition import ModelParts

Documents = Float64[np.ndarray, "documents 2"]  # a metric's value and weight of each document
MetricOfMean = Callable[[np.ndarray], np.ndarray]

# The harness' function from (sum of values) / (sum of weights) to the metric; for other metrics it is the identity.
METRIC_OF_MEAN: dict[str, MetricOfMean] = {
    "perplexity": lambda mean: np.exp(-mean),
    "word_perplexity": lambda mean: np.exp(-mean),
    "byte_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


def by_document(samples: Sequence[Mapping[str, object]]) -> dict[str, Documents]:
    """Returns the values of each document, in order, by "metric,filter".

    Metrics whose values are not numbers are dropped.

    Args:
      samples: the harness' logged samples.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for sample in samples:
        head = _head(sample)
        for metric in head["metrics"]:
            if (pair := _value_and_weight(sample[metric])) is not None:
                found.setdefault(f"{metric},{head['filter']}", {})[head["doc_id"]] = pair
    return {key: np.array([each[doc] for doc in sorted(each)], np.float64) for key, each in found.items()}


class _Head(TypedDict):
    """The fixed keys of a logged sample; each metric is another key."""

    doc_id: int
    filter: str
    metrics: Sequence[str]


def _head(sample: Mapping[str, object]) -> _Head:
    doc_id, name, metrics = sample["doc_id"], sample["filter"], sample["metrics"]
    assert isinstance(doc_id, int) and isinstance(name, str) and isinstance(metrics, list)
    return {"doc_id": doc_id, "filter": name, "metrics": metrics}


def _value_and_weight(value: object) -> tuple[float, float] | None:
    match value:
        case bool() | int() | float() | np.number() | np.bool_():
            return float(value), 1.0
        case (int() | float() as total, int() | float() as weight):
            return float(total), float(weight)
    return None


def compare_metric(
    name: str,
    key: str,
    kind: MetricKind,
    values: tuple[float, float],
    documents: tuple[Documents | None, Documents | None],
) -> Comparison:
    """Returns a metric's change, with a test if the metric is a function of the documents' mean.

    The test is McNemar's if each document is right or wrong, otherwise a bootstrap over documents.

    Args:
      key: "metric,filter".
      values: the metric of both models.
      documents: the values of both models' documents, or None if unknown.
    """
    before, after = documents
    difference = values[1] - values[0]
    metric_of_mean = METRIC_OF_MEAN.get(key.partition(",")[0], lambda mean: mean)
    if before is None or after is None:
        return Comparison(name, kind, difference)
    if not (_is_of_mean(metric_of_mean, before, values[0]) and _is_of_mean(metric_of_mean, after, values[1])):
        return Comparison(name, kind, difference)
    if all(np.isin(each[:, 0], (0, 1)).all() and (each[:, 1] == 1).all() for each in (before, after)):
        return Comparison(name, kind, difference, p=mcnemar(before[:, 0] == 1, after[:, 0] == 1))
    return Comparison(name, kind, difference, interval=paired_bootstrap_of(before, after, metric_of_mean))


def _is_of_mean(metric_of_mean: MetricOfMean, documents: Documents, value: float) -> bool:
    """True if the harness computes its value from the documents' mean; an F1 score, for instance, it does not."""
    total, weight = documents.sum(axis=0)
    return bool(weight) and math.isclose(float(metric_of_mean(total / weight)), value, rel_tol=1e-6, abs_tol=1e-9)


SHARES = ("acc", "acc_norm", "exact_match")  # the harness' metrics that are from 0 to 1


class TaskResults(NamedTuple):
    """The harness' results of one of its tasks.

    Fields:
      metrics: the harness' values by "metric,filter" and "metric_stderr,filter", and some that are not numbers.
      documents: the values of each document by "metric,filter".
    """

    metrics: Mapping[str, object]
    documents: Mapping[str, Documents]


Results = dict[str, TaskResults]  # by the name of the harness' task


class LmEvalMetric(NamedTuple):
    """One metric of one of the harness' tasks.

    Fields:
      key: "metric,filter".
      error: the harness' standard error, or None.
      documents: the values of each document; None if the metric combines several tasks, or values that are not numbers.
    """

    name: str
    key: str
    kind: MetricKind
    value: float
    error: float | None
    documents: Documents | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The value plus and minus 1.96 standard errors."""
        return None if self.error is None else (self.value - Z_95 * self.error, self.value + Z_95 * self.error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalTask:
    """Scores some of the harness' tasks; see `task.Task` for the members.

    Attributes:
      tasks: names of the harness' tasks.
      folder: folder with the user's task files; None: only the harness' tasks.
      limit: maximum documents per task; None: all.
      max_positions: maximum tokens; the beginning of longer texts is dropped.
    """

    tasks: Sequence[str]
    folder: str | None
    limit: int | None
    tokenizer: Tokenizer
    max_positions: int
    name: str = "harness"
    size: int | None = None  # only the harness knows the number of requests

    @property
    def title(self) -> str:
        """The names of the harness' tasks."""
        return f"lm-evaluation-harness: {', '.join(self.tasks)}"

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """The properties that determine the tokenization; the texts are known only during scoring."""
        reader = self.tokenizer
        return [[reader.exported, sorted(reader.special_tokens.items()), reader.add_bos_token, self.max_positions]]

    def prepare(self, report: Callable[[str], object]) -> None:
        """Loads the data sets; see `preflight.check_ready`."""
        check_ready(self.tasks, self.folder, report)

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> Results:
        """Returns the harness' results of one model; call `prepare` before."""
        from qlora_jax.evaluation.lm_eval.model import LmEvalModel

        results = import_lm_eval().simple_evaluate(
            model=LmEvalModel(parts, self.tokenizer, progress, cache),
            tasks=list(self.tasks),
            task_manager=task_manager(self.folder),
            limit=self.limit,
            bootstrap_iters=1000,
            log_samples=True,
        )
        samples = results["samples"]
        return {
            task: TaskResults(metrics, by_document(samples.get(task, [])))
            for task, metrics in results["results"].items()
        }

    def metrics(self, scores: Results) -> list[Metric]:
        """Every metric, with an interval of 1.96 of the harness' standard errors to both sides."""
        return [Metric(one.name, one.kind, one.value, one.interval) for one in _metrics(scores)]

    def compare(self, before: Results, after: Results) -> list[Comparison]:
        """The change of every metric, with a test over pairs of the same documents where possible."""
        pairs = zip(_metrics(before), _metrics(after), strict=True)
        return [
            compare_metric(old.name, old.key, old.kind, (old.value, new.value), (old.documents, new.documents))
            for old, new in pairs
        ]

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Yields nothing: the requests are known only during scoring, and training never asks them."""
        return iter(())


def build(settings: TaskArgs, context: TaskContext) -> LmEvalTask:
    """Builds the task that the settings describe."""
    assert settings.harness is not None
    return LmEvalTask(
        tasks=settings.harness,
        folder=settings.harness_folder,
        limit=settings.max_rows,
        tokenizer=context.tokenizer,
        max_positions=context.max_positions,
    )


def _metrics(results: Results) -> Iterator[LmEvalMetric]:
    """Yields each metric of each task."""
    for task, (metrics, documents) in results.items():
        for key, value in metrics.items():
            metric, comma, metric_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{metric_filter}")
            yield LmEvalMetric(
                name=f"{task}: {metric}" + ("" if metric_filter == "none" else f" ({metric_filter})"),
                key=key,
                kind="share" if metric in SHARES else "number",
                value=float(value),
                error=error if isinstance(error, float) else None,
                documents=documents.get(key),
            )
