"""Asks a judge which of two models' replies to the same prompt, under the same condition, is better.

The judges, their prompts and the files of judgements are those of tournaments. A match is named by a digest of its
texts, so a stored judgement is never used for other texts, and equal replies of several conditions are judged once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from qlora_jax.inference.result_cache import digest
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.judge import OUTCOMES, TIE, UNREADABLE, Judge
from qlora_jax.studies.tournament.judges.registry import Context, build_judge
from qlora_jax.studies.tournament.judging import Judged, check_inputs, judge_matches
from qlora_jax.studies.tournament.matches import Match, Prompt, Transcripts
from qlora_jax.studies.variance.questions import Question
from qlora_jax.studies.variance.replies import Observations, Observed
from qlora_jax.studies.variance.settings import VarianceArgs

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
