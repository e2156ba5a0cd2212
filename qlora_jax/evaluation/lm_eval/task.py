"""Tasks of lm-evaluation-harness as one task of ours: names, limits, and its results as figures."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.lm_eval.paired import Documents, by_document, compared
from qlora_jax.evaluation.lm_eval.preflight import harness, task_manager
from qlora_jax.evaluation.metrics import Comparison, Measure, Progress
from qlora_jax.evaluation.statistics import Z_95
from qlora_jax.inference.result_cache import Kept
from qlora_jax.models.partition import ModelParts

SHARES = ("acc", "acc_norm", "exact_match")  # metrics of the harness that are from 0 to 1

Results = dict[str, dict[str, Any]]  # by task, then "metric,filter", "metric_stderr,filter", and "documents"


class Figure(NamedTuple):
    """One metric of one task.

    Fields:
      key: "metric,filter".
      error: the harness' standard error, or None.
      documents: what it is made of, or None where it is made of several tasks or of no numbers.
    """

    name: str
    key: str
    kind: str
    value: float
    error: float | None
    documents: Documents | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """1.96 of the standard errors to both sides."""
        return None if self.error is None else (self.value - Z_95 * self.error, self.value + Z_95 * self.error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """Some of the harness' tasks.

    Attributes:
      tasks: their names.
      folder: where task files of the user's lie; None: the harness' own alone.
      limit: rows of each task at most.
      max_positions: tokens that the model reads; the beginning of what is longer is cut off.
    """

    tasks: Sequence[str]
    folder: str | None
    limit: int | None
    tokenizer: Tokenizer
    max_positions: int
    name: str = "harness"
    size: int | None = None  # how many requests there are, the harness knows

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"lm-evaluation-harness: {', '.join(self.tasks)}"

    @property
    def asked(self) -> list[list[Any]]:
        """What decides, beside the model, what the harness' texts become; they are not known before they are scored."""
        reader = self.tokenizer
        return [[reader.exported, sorted(reader.special_tokens.items()), reader.add_bos_token, self.max_positions]]

    def score(self, parts: ModelParts, progress: Progress, kept: Kept) -> Results:
        """The harness' results of one model, once `check_ready` has loaded the data sets."""
        from qlora_jax.evaluation.lm_eval.model import HarnessModel

        results = harness().simple_evaluate(
            model=HarnessModel(parts, self.tokenizer, progress, kept),
            tasks=list(self.tasks),
            task_manager=task_manager(self.folder),
            limit=self.limit,
            bootstrap_iters=1000,
            log_samples=True,
        )
        samples = results["samples"]
        return {
            task: {**metrics, "documents": by_document(samples.get(task, []))}
            for task, metrics in results["results"].items()
        }

    def measures(self, scores: Results) -> list[Measure]:
        """Every metric, with 1.96 of the harness' standard errors to both sides."""
        return [Measure(one.name, one.kind, one.value, one.interval) for one in _figures(scores)]

    def compare(self, before: Results, after: Results) -> list[Comparison]:
        """What changed from one model to another, in pairs of the same documents."""
        pairs = zip(_figures(before), _figures(after), strict=True)
        return [
            compared(then.name, then.key, then.kind, (then.value, now.value), (then.documents, now.documents))
            for then, now in pairs
        ]


def _figures(scores: Results) -> Iterator[Figure]:
    """Each metric of each task."""
    for task, metrics in scores.items():
        for key, value in metrics.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kept}")
            yield Figure(
                name=f"{task}: {metric}" + ("" if kept == "none" else f" ({kept})"),
                key=key,
                kind="share" if metric in SHARES else "number",
                value=float(value),
                error=error if isinstance(error, float) else None,
                documents=metrics.get("documents", {}).get(key),
            )
