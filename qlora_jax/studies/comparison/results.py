"""Turns finished runs into estimates per method and task, and tests of methods against each other."""

import csv
import dataclasses
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from qlora_jax.atomic_files import write_text
from qlora_jax.measures.statistics import t_interval
from qlora_jax.studies.comparison.run import Run
from qlora_jax.studies.comparison.run_files import RunOutcome
from qlora_jax.studies.comparison.study import Pair, Study, StudyTask
from qlora_jax.studies.statistics import MeanEstimate, crossed_mean, holm, ratio_scores

LEVEL = 0.05  # significance level, shared by all tests of a study

Verdict = Literal["better", "worse", "equal", "not decided"]


class Finished(NamedTuple):
    """A run with its outcome."""

    run: Run
    outcome: RunOutcome

    @property
    def value(self) -> float | None:
        """The measure on the held-out rows; None if the run was not scored."""
        weights = sum(self.outcome["weights"])
        return sum(self.outcome["values"]) / weights if weights else None


def search_losses(searched: Sequence[Finished]) -> dict[float, float]:
    """Returns the mean loss of each learning rate over the seeds of the search; nan if it diverged with any."""
    by_rate: dict[float, list[float]] = {}
    for run, outcome in searched:
        loss = outcome["search_loss"]
        by_rate.setdefault(run.config.optim.learning_rate, []).append(math.nan if loss is None else loss)
    return {rate: statistics.fmean(losses) for rate, losses in by_rate.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodEstimate:
    """The results of a method on a task.

    Attributes:
      by_seed: the measure of each seed.
      over_seeds: 95 % interval for other seeds on the same rows; None for one seed.
      mean: over seeds, with the error for other seeds and other rows.
      parameters: trainable parameters.
      steps, seconds, peak_bytes: means over the runs; peak_bytes is None if nothing reports it.
    """

    method: str
    task: str
    by_seed: tuple[float, ...]
    over_seeds: tuple[float, float] | None
    mean: MeanEstimate
    learning_rate: float
    parameters: int
    steps: float
    seconds: float
    peak_bytes: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodDifference:
    """A method compared with another on one task, paired by seed and row.

    Attributes:
      mean: of (method - reference).
      p: of the hypothesis that the difference is 0, corrected for all tests of the study (Holm).
      p_unequal: of the hypothesis that the difference is at least the task's margin, corrected for all such tests;
        None without a margin.
    """

    method: str
    reference: str
    task: str
    mean: MeanEstimate
    p: float
    p_unequal: float | None
    verdict: Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a study."""

    study: Study
    runs: Sequence[Finished]
    estimates: Sequence[MethodEstimate]
    differences: Sequence[MethodDifference]

    def of_task(self, task: str) -> list[MethodEstimate]:
        """Returns the estimates of a task, in the order of the methods."""
        return [estimate for estimate in self.estimates if estimate.task == task]


def summarize(study: Study, runs: Sequence[Run], parameters: Mapping[Pair, int]) -> Results:
    """Computes the results of finished runs.

    Args:
      runs: of all stages; those of the stage `final` count.

    Raises:
      ValueError: methods were scored on rows with other numbers of tokens, on one row, or with values that are not
        finite.
    """
    finished = [Finished(run, run.outcome()) for run in runs]
    by_pair: dict[Pair, list[Finished]] = {pair: [] for pair in study.pairs()}
    for one in finished:
        if one.run.stage == "final":
            by_pair[one.run.method, one.run.task].append(one)
    estimates = [_estimate(pair, by_pair[pair], parameters[pair]) for pair in study.pairs()]
    return Results(study=study, runs=finished, estimates=estimates, differences=_differences(study, by_pair))


def _estimate(pair: Pair, runs: Sequence[Finished], parameters: int) -> MethodEstimate:
    values_SR, weights_R = _rows(runs)
    by_seed = tuple(float(value) for value in values_SR.sum(axis=1) / weights_R.sum())
    peaks = [one.outcome["peak_bytes"] for one in runs]
    return MethodEstimate(
        method=pair[0],
        task=pair[1],
        by_seed=by_seed,
        over_seeds=t_interval(by_seed),
        mean=crossed_mean(ratio_scores(values_SR, weights_R)),
        learning_rate=runs[0].run.config.optim.learning_rate,
        parameters=parameters,
        steps=statistics.fmean(one.outcome["steps"] for one in runs),
        seconds=statistics.fmean(one.outcome["seconds"] for one in runs),
        peak_bytes=None if None in peaks else statistics.fmean(peak for peak in peaks if peak is not None),
    )


def _rows(runs: Sequence[Finished]) -> tuple[Float64[np.ndarray, "S R"], Float64[np.ndarray, " R"]]:
    """Returns the values [seeds, rows] and the weights, which all seeds share."""
    weights = np.array([one.outcome["weights"] for one in runs], np.float64)
    return np.array([one.outcome["values"] for one in runs], np.float64), weights[0]


def _differences(study: Study, by_pair: Mapping[Pair, Sequence[Finished]]) -> list[MethodDifference]:
    methods = study.methods
    couples = [(methods[0], other) for other in methods[1:]]
    if study.settings.pairs == "all":
        couples = list(itertools.combinations(methods, 2))
    tested = [(task, reference, method) for task in study.tasks.values() for reference, method in couples]
    means = [_difference(by_pair[a, task.name], by_pair[b, task.name], task) for task, a, b in tested]
    corrected = holm([mean.p for mean in means])
    unequal = _corrected_equivalence([task.settings.margin for task, _, _ in tested], means)
    return [
        MethodDifference(
            method=method,
            reference=reference,
            task=task.name,
            mean=mean,
            p=p,
            p_unequal=p_unequal,
            verdict=_verdict(mean, p, p_unequal, task),
        )
        for (task, reference, method), mean, p, p_unequal in zip(tested, means, corrected, unequal, strict=True)
    ]


def _corrected_equivalence(margins: Sequence[float | None], means: Sequence[MeanEstimate]) -> list[float | None]:
    pairs = zip(margins, means, strict=True)
    p_values = {index: mean.p_at_least(margin) for index, (margin, mean) in enumerate(pairs) if margin is not None}
    corrected = dict(zip(p_values, holm([*p_values.values()]), strict=True))
    return [corrected.get(index) for index in range(len(means))]


def _difference(reference: Sequence[Finished], method: Sequence[Finished], task: StudyTask) -> MeanEstimate:
    values_SR, weights_R = _rows(reference)
    others_SR, other_weights_R = _rows(method)
    if not np.array_equal(weights_R, other_weights_R):
        names = f"{method[0].run.method} and {reference[0].run.method}"
        raise ValueError(
            f"tasks.{task.name}: {names} were scored on rows with different numbers of tokens, so rows cannot be "
            "paired. Compare them by a measure that is a share"
        )
    return crossed_mean(ratio_scores(others_SR, weights_R) - ratio_scores(values_SR, weights_R))


def _verdict(mean: MeanEstimate, p: float, p_unequal: float | None, task: StudyTask) -> Verdict:
    if p_unequal is not None and p_unequal < LEVEL:
        return "equal"
    if not p < LEVEL:  # also true if p is NaN
        return "not decided"
    return "better" if (mean.value > 0) == (task.better == "higher") else "worse"


TABLE_FILE = "runs.csv"
COLUMNS: tuple[str, ...] = (
    "stage",
    "method",
    "task",
    "seed",
    "learning_rate",
    "steps",
    "measure",
    "value",
    "search_loss",
    "trainable_parameters",
    "seconds",
    "peak_bytes",
    "folder",
)


def write_table(results: Results, folder: Path) -> Path:
    """Writes the file into the study's folder; returns its path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_line(results, one, folder) for one in results.runs)
    write_text(folder / TABLE_FILE, text.getvalue())
    return folder / TABLE_FILE


def _line(results: Results, one: Finished, folder: Path) -> dict[str, object]:
    run, outcome = one.run, one.outcome
    parameters = {(each.method, each.task): each.parameters for each in results.estimates}
    return {
        "stage": run.stage,
        "method": run.method,
        "task": run.task,
        "seed": run.seed,
        "learning_rate": run.config.optim.learning_rate,
        "steps": outcome["steps"],
        "measure": run.study.tasks[run.task].settings.measure,
        "value": one.value,
        "search_loss": outcome["search_loss"],
        "trainable_parameters": parameters[run.method, run.task],
        "seconds": outcome["seconds"],
        "peak_bytes": outcome["peak_bytes"],
        "folder": run.folder.relative_to(folder),
    }
