"""Splits the scores of a study, and the differences between its models, into variance components."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from qlora_jax.studies.statistics import MeanEstimate, crossed_mean
from qlora_jax.studies.variance.components import Component, Interval, difference_components, variance_components
from qlora_jax.studies.variance.conditions import Design
from qlora_jax.studies.variance.measures import score
from qlora_jax.studies.variance.questions import Question
from qlora_jax.studies.variance.replies import Observations
from qlora_jax.studies.variance.settings import Measure, VarianceArgs

Table = Float64[np.ndarray, "prompts levels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One variance component.

    Attributes:
      name: model, prompts, levels or residual.
      share: of the sum of all components, where a negative estimate counts as 0.
    """

    name: str
    value: float
    interval: Interval
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The variance of one measure while one factor varies.

    Attributes:
      models: one model, or two whose difference (second - first) is split.
      mean: over all prompts and levels.
      level_means: by the name of the level.
      sd_between_levels: standard deviation of the mean over prompts between levels.
    """

    measure: Measure
    factor: str
    models: list[str]
    mean: float
    mean_interval: Interval
    level_means: dict[str, float]
    sd_between_levels: float
    parts: list[Part]


def analyse(
    args: VarianceArgs, design: Design, questions: Sequence[Question], observations: Observations
) -> list[Split]:
    """Splits each measure for each factor: the difference of each model to the first, then each model's own score.

    A judge's preferences are about two models, so those of a single model are not split.
    """
    splits = []
    for measure, (factor, levels) in itertools.product(args.measures, design.factors.items()):
        tables = {
            model: np.stack(
                [score(measure, of_model[one], questions, args.answer_pattern) for one in levels.values()], axis=1
            )
            for model, of_model in observations.items()
        }
        first, *others = tables
        names = [*levels]
        splits += [_pair(measure, factor, names, [first, other], tables) for other in others]
        if measure != "judge":
            splits += [_single(measure, factor, names, model, table) for model, table in tables.items()]
    return splits


def _pair(measure: Measure, factor: str, levels: list[str], models: list[str], tables: Mapping[str, Table]) -> Split:
    first, second = (tables[model] for model in models)
    found = difference_components(first, second)
    parts = {name: getattr(found, name) for name in ("model", "prompts", "levels", "residual")}
    return _split(measure, factor, levels, models, second - first, found.mean, parts)


def _single(measure: Measure, factor: str, levels: list[str], model: str, table: Table) -> Split:
    found = variance_components(table)
    return _split(measure, factor, levels, [model], table, crossed_mean(table.T), found._asdict())


def _split(
    measure: Measure,
    factor: str,
    levels: list[str],
    models: list[str],
    table: Table,
    mean: MeanEstimate,
    parts: Mapping[str, Component],
) -> Split:
    total = sum(max(0.0, part.value) for part in parts.values())
    return Split(
        measure=measure,
        factor=factor,
        models=models,
        mean=mean.value,
        mean_interval=mean.interval,
        level_means=dict(zip(levels, table.mean(axis=0).tolist(), strict=True)),
        sd_between_levels=max(0.0, parts["levels"].value) ** 0.5,
        parts=[
            Part(
                name=name,
                value=part.value,
                interval=part.interval,
                share=max(0.0, part.value) / total if total else 0.0,
            )
            for name, part in parts.items()
        ],
    )
