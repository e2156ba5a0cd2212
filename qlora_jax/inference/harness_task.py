"""Tasks of lm-evaluation-harness as one task of ours: names, limits, and its results as figures."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.inference.decode import Parts
from qlora_jax.inference.measures import Comparison, Measure, Progress
from qlora_jax.inference.statistics import Z_95

SHARES = ("acc", "acc_norm", "exact_match")  # metrics of the harness that are from 0 to 1

Results = dict[str, dict[str, Any]]  # by task, then "metric,filter" and "metric_stderr,filter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """Some of the harness' tasks.

    Attributes:
      tasks: their names.
      folder: where task files of the user's lie; None: the harness' own alone.
      limit: rows of each task at most.
    """

    tasks: Sequence[str]
    folder: str | None
    limit: int | None
    tokenizer: Tokenizer
    name: str = "harness"
    size: int | None = None  # how many requests there are, the harness knows

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"lm-evaluation-harness: {', '.join(self.tasks)}"

    def score(self, parts: Parts, progress: Progress) -> Results:
        """The harness' results of one model.

        Raises:
          ValueError: it is not installed, or knows no such task.
        """
        harness = _harness()
        from qlora_jax.inference.harness import HarnessModel

        manager = harness.tasks.TaskManager(include_path=self.folder)
        if unknown := [task for task in self.tasks if task not in manager.all_tasks]:
            raise ValueError(f"harness: no task is called {', '.join(unknown)}; `lm_eval ls tasks` lists them")
        results = harness.simple_evaluate(
            model=HarnessModel(parts, self.tokenizer, progress),
            tasks=list(self.tasks),
            task_manager=manager,
            limit=self.limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
        return results["results"]

    def measures(self, scores: Results) -> list[Measure]:
        """Every metric, with 1.96 of the harness' standard errors to both sides."""
        return [
            Measure(name, kind, value, None if error is None else (value - Z_95 * error, value + Z_95 * error))
            for name, kind, value, error in _figures(scores)
        ]

    def compare(self, before: Results, after: Results) -> list[Comparison]:
        """What changed from one model to another."""
        pairs = zip(_figures(before), _figures(after), strict=True)
        return [Comparison(name, kind, now - then) for (name, kind, then, _), (_, _, now, _) in pairs]


def _figures(scores: Results) -> Iterator[tuple[str, str, float, float | None]]:
    """(name, kind, value, standard error or None) of each metric of each task."""
    for task, metrics in scores.items():
        for key, value in metrics.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kept}")
            kind = "share" if metric in SHARES else "number"
            told = f"{task}: {metric}" + ("" if kept == "none" else f" ({kept})")
            yield told, kind, float(value), error if isinstance(error, float) else None


def _harness() -> Any:
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars; ours are shown
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"harness: it is not installed ({error}): pip install 'qlora-jax[lm-eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval
