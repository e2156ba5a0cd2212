"""The task `harness`: tasks of EleutherAI's lm-evaluation-harness, with its results as our metrics."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.lm_eval.paired import Documents, by_document, compare_metric
from qlora_jax.evaluation.lm_eval.preflight import check_ready, import_lm_eval, task_manager
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, MetricKind
from qlora_jax.measures.statistics import Z_95
from qlora_jax.models.partition import ModelParts

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
