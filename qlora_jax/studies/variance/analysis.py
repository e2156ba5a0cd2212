"""Splits the scores of a study, and the differences between its models, into variance components.

Dimension key: P prompts, L levels.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import special

from qlora_jax.evaluation.tasks.answers import extract_answer
from qlora_jax.inference.result_cache import digest
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.statistics import MeanEstimate, crossed_mean
from qlora_jax.studies.tournament.judges.judge import OUTCOMES, TIE, UNREADABLE, Judge
from qlora_jax.studies.tournament.judges.registry import Context, build_judge
from qlora_jax.studies.tournament.judging import Judged, check_inputs, judge_matches
from qlora_jax.studies.tournament.matches import Match, Prompt, Transcripts
from qlora_jax.studies.variance.questions import Question
from qlora_jax.studies.variance.replies import Observations, Observed
from qlora_jax.studies.variance.settings import Design, Measure, VarianceArgs

# Variance components of a table of scores, prompts by levels of one factor, from its mean squares.
#
#     score[prompt, level] = mean + prompt's effect + level's effect + residual,    all three random.
#
# The layout is balanced, so the expected mean squares give unbiased estimates in closed form, which are those of
# restricted maximum likelihood (REML) where all are positive. An estimate may be negative; the variance is then about
# 0. Intervals: of the residual from its chi-squared distribution, of the others the modified large-sample intervals of
# Ting, Burdick, Graybill, Jeyaratnam and Lu (1990), which are close to 95 % for few levels too, where effects are
# normal.

Interval = tuple[float, float]  # 95 %
TAIL = 0.025


class Component(NamedTuple):
    """A variance, with its interval."""

    value: float
    interval: Interval


class Components(NamedTuple):
    """Variances of a table.

    Fields:
      prompts: between prompts, the same at every level.
      levels: between levels, the same for every prompt.
      residual: levels matter on some prompts more than on others.
    """

    prompts: Component
    levels: Component
    residual: Component


class DifferenceComponents(NamedTuple):
    """The difference between two models on one prompt at one level, in parts whose squares add up.

    Fields:
      mean: the mean over all prompts and levels, which is the difference between the models themselves.
      model: square of the mean without what chance adds to it; its interval follows from that of the mean.
    """

    mean: MeanEstimate
    model: Component
    prompts: Component
    levels: Component
    residual: Component


def variance_components(scores_PL: Float64[np.ndarray, "P L"]) -> Components:
    """Estimates the three variances; needs two prompts and two levels."""
    prompts, levels = scores_PL.shape
    row_P, column_L = scores_PL.mean(axis=1), scores_PL.mean(axis=0)
    residual_PL = scores_PL - row_P[:, None] - column_L + scores_PL.mean()
    degrees_of_freedom = (prompts - 1) * (levels - 1)
    by_prompt, by_level = levels * float(row_P.var(ddof=1)), prompts * float(column_L.var(ddof=1))
    residual = float((residual_PL**2).sum()) / degrees_of_freedom
    chi_low, chi_high = (float(special.chdtri(degrees_of_freedom, tail)) for tail in (1 - TAIL, TAIL))
    return Components(
        prompts=_surplus((by_prompt, prompts - 1), (residual, degrees_of_freedom), levels),
        levels=_surplus((by_level, levels - 1), (residual, degrees_of_freedom), prompts),
        residual=Component(
            residual, (degrees_of_freedom * residual / chi_high, degrees_of_freedom * residual / chi_low)
        ),
    )


def difference_components(
    first_PL: Float64[np.ndarray, "P L"], second_PL: Float64[np.ndarray, "P L"]
) -> DifferenceComponents:
    """Splits second - first, on the same prompts at the same levels."""
    difference_PL = second_PL - first_PL
    mean, parts = crossed_mean(difference_PL.T), variance_components(difference_PL)
    low, high = sorted(abs(end) for end in mean.interval)
    excludes_zero = mean.interval[0] * mean.interval[1] > 0
    model = Component(mean.value**2 - mean.error**2, (low**2 if excludes_zero else 0.0, high**2))
    return DifferenceComponents(mean, model, *parts)


MeanSquare = tuple[float, int]  # (mean square, degrees of freedom)


def _surplus(larger: MeanSquare, smaller: MeanSquare, copies: int) -> Component:
    """The variance (E larger - E smaller) / copies, and its modified large-sample interval."""
    (a, n), (b, m) = larger, smaller
    g_n, g_m = (1 - df / special.chdtri(df, TAIL) for df in (n, m))
    h_n, h_m = (df / special.chdtri(df, 1 - TAIL) - 1 for df in (n, m))
    f_low, f_high = special.fdtri(n, m, TAIL), special.fdtri(n, m, 1 - TAIL)
    g_nm = ((f_high - 1) ** 2 - (g_n * f_high) ** 2 - h_m**2) / f_high
    h_nm = ((1 - f_low) ** 2 - (h_n * f_low) ** 2 - g_m**2) / f_low
    below = np.sqrt(max(0.0, (g_n * a) ** 2 + (h_m * b) ** 2 + g_nm * a * b))
    above = np.sqrt(max(0.0, (h_n * a) ** 2 + (g_m * b) ** 2 + h_nm * a * b))
    ends = (max(0.0, float(a - b - below) / copies), max(0.0, float(a - b + above) / copies))
    return Component((a - b) / copies, ends)


TITLES: dict[Measure, str] = {
    "answer": "right answers (0 or 1)",
    "likelihood": "log likelihood of the answer, nats per token",
    "length": "length of the reply, tokens",
    "judge": "the judge's preference for the reply over that of the first model, from -1 to 1",
}


def score(
    measure: Measure, observed: Observed, questions: Sequence[Question], pattern: str | None
) -> Float64[np.ndarray, " prompts"]:
    """The score of each reply.

    Args:
      pattern: finds the answer in a reply, see `extract_answer`.
    """
    match measure:
        case "answer":
            pairs = zip(observed.replies, questions, strict=True)
            return np.array([_is_right(reply["reply"], question, pattern) for reply, question in pairs], np.float64)
        case "length":
            return np.array([reply["tokens"] for reply in observed.replies], np.float64)
        case "likelihood":
            assert observed.likelihood is not None
            return observed.likelihood
        case "judge":
            assert observed.preference is not None
            return observed.preference


def _is_right(reply: str, question: Question, pattern: str | None) -> bool:
    found = extract_answer(reply, pattern)
    return found is not None and found in [extract_answer(answer, pattern) for answer in question.answers]


# Asks a judge which of two models' replies to the same prompt, under the same condition, is better.
#
# The judges, their prompts and the files of judgements are those of tournaments. A match is named by a digest of its
# texts, so a stored judgement is never used for other texts, and equal replies of several conditions are judged once.

NAME = "judge"  # name of its file of judgements
FIRST_MODEL, OTHER_MODEL = "first model", "other model"  # the systems of a match


def build_study_judge(args: VarianceArgs, reporter: ProgressReporter) -> Judge | None:
    """Returns the judge of a study, or None if no measure needs one.

    Raises:
      ValueError: its key, file or model cannot be used, or it had other settings when the study was started.
    """
    if NAME not in args.measures:
        return None
    judge = build_judge(args.judge, Context(NAME, Path(args.output), reporter))
    check_inputs({NAME: judge}, Path(args.output))
    return judge


def add_preferences(
    args: VarianceArgs,
    judge: Judge,
    questions: Sequence[Question],
    observations: Observations,
    reporter: ProgressReporter,
) -> Observations:
    """Returns the observations with the judge's preferences; those of the first model are 0.

    Raises:
      ValueError: the judge gave no verdict on some matches; those that it gave are stored.
    """
    first, *others = args.models
    of_first = observations[first]
    found = {first: {one: observed._replace(preference=np.zeros(len(questions))) for one, observed in of_first.items()}}
    for other in others:
        of_other = observations[other]
        transcripts = _transcripts(questions, [(of_first[one], observed) for one, observed in of_other.items()])
        judged = judge_matches(NAME, judge, transcripts.matches(), transcripts, Path(args.output), reporter)
        _report(other, judged, reporter)
        found[other] = {
            one: observed._replace(preference=_preferences(questions, of_first[one], observed, judged))
            for one, observed in of_other.items()
        }
    return found


def _pairs(questions: Sequence[Question], first: Observed, other: Observed) -> Iterator[tuple[str, str, str]]:
    """Yields (id of the match, the first model's reply, the other's) of each prompt."""
    for question, one, two in zip(questions, first.replies, other.replies, strict=True):
        yield digest([question.prompt, one["reply"], two["reply"]])[:16], one["reply"], two["reply"]


def _transcripts(questions: Sequence[Question], conditions: Sequence[tuple[Observed, Observed]]) -> Transcripts:
    """The replies of both models under all conditions."""
    prompts: dict[str, Prompt] = {}
    replies: dict[str, dict[str, str]] = {FIRST_MODEL: {}, OTHER_MODEL: {}}
    for first, other in conditions:
        for question, (key, *texts) in zip(questions, _pairs(questions, first, other), strict=True):
            category = question.row.data.get("category")
            prompts[key] = Prompt(key, category if isinstance(category, str) else None, question.prompt, question.row)
            replies[FIRST_MODEL][key], replies[OTHER_MODEL][key] = texts
    return Transcripts(prompts=prompts, replies=replies)


def _report(other: str, judged: Judged, reporter: ProgressReporter) -> None:
    """Raises ValueError if verdicts are missing; reports how many are unreadable."""
    missing = [one for one in judged.judgements.values() if one.verdict is None]
    absent = judged.matches - len(judged.judgements) + len(missing)
    if absent:
        reason = judged.stopped or (missing[0].problem if missing else None) or "no reply"
        found = f"{absent} of {judged.matches} verdicts on {other} are missing ({reason})"
        raise ValueError(f"judge: {found}. Remove the cause, and start again")
    if unreadable := sum(one.verdict == UNREADABLE for one in judged.judgements.values()):
        found = f"{unreadable} of {judged.matches} reviews on {other} are unreadable"
        reporter.message(f"judge: {found}, and count as equal")


def _preferences(
    questions: Sequence[Question], first: Observed, other: Observed, judged: Judged
) -> Float64[np.ndarray, " prompts"]:
    """1 where the judge prefers the other model's reply in both orders, -1 for the first's, 0 if the orders differ."""

    def outcome(match: Match) -> float:
        verdict = judged.judgements[match].verdict
        return OUTCOMES[TIE if verdict == UNREADABLE else verdict]

    matches = [Match(key, OTHER_MODEL, FIRST_MODEL) for key, *_ in _pairs(questions, first, other)]
    return np.array([outcome(match) - outcome(match.swapped()) for match in matches])


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
