"""Lets a judge judge the matches that it has not judged yet, and stores its judgements."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.record_file import RecordFile, stored_records
from qlora_jax.studies.tournament.judges.judge import Attempts, Judge, Judgement, JudgeStopped, Record, Verdict
from qlora_jax.studies.tournament.matches import Match, Transcripts


class StoredJudgement(TypedDict):
    """A line of a judge's judgements; `texts` is the digest of the texts that it read."""

    prompt: str
    first: str
    second: str
    texts: str
    verdict: Verdict | None
    review: str
    failed: int
    timed_out: int
    unreadable: int
    problem: str | None


class Judged(NamedTuple):
    """A judge's judgements.

    Fields:
      matches: number of matches that it is asked to judge.
      judgements: the last one on each match.
      attempts: all attempts without a verdict, those of earlier starts included.
      stopped: why the judge stopped before the end; None if it did not.
    """

    matches: int
    judgements: Mapping[Match, Judgement]
    attempts: Attempts
    stopped: str | None


def check_inputs(judges: Mapping[str, Judge], folder: Path) -> None:
    """Raises ValueError if stored judgements are damaged, or their judge had other settings."""
    for name, judge in judges.items():
        if not judge.remembers:
            stored_records(_path(folder, name), judge.inputs(), StoredJudgement)


def check_texts(judges: Mapping[str, Judge], matches: Sequence[Match], transcripts: Transcripts, folder: Path) -> None:
    """Raises ValueError if stored judgements are on other texts."""
    for name, judge in judges.items():
        if not judge.remembers:
            path = _path(folder, name)
            _on_matches(path, stored_records(path, judge.inputs(), StoredJudgement), matches, transcripts)


def judge_matches(
    name: str,
    judge: Judge,
    matches: Sequence[Match],
    transcripts: Transcripts,
    folder: Path,
    reporter: ProgressReporter,
) -> Judged:
    """Judges the matches without a verdict; each judgement is on the disk before the next one is made.

    Args:
      folder: of the tournament.

    Raises:
      ValueError: stored judgements are of other inputs or texts.
    """
    if judge.remembers:
        found: list[Judgement] = []
        judge.judge(matches, transcripts, found.append)
        return Judged(len(found), _last(found), _sum(found), None)
    with RecordFile(_path(folder, name), judge.inputs(), StoredJudgement) as stored:
        found = _on_matches(stored.path, stored.records, matches, transcripts)
        verdicts = {judgement.match for judgement in found if judgement.verdict is not None}
        missing = [match for match in matches if match not in verdicts]
        with reporter.counting(f"{name}: judgements", len(matches), len(verdicts)) as progress:

            def record(judgement: Judgement) -> None:
                stored.append(_to_stored(judgement, transcripts))
                found.append(judgement)
                if judgement.verdict is not None:
                    verdicts.add(judgement.match)
                    progress(len(verdicts))

            stopped = _judge(judge, missing, transcripts, record)
    return Judged(len(matches), _last(found), _sum(found), stopped)


def _path(folder: Path, judge: str) -> Path:
    return folder / "judgements" / f"{judge}.jsonl"


def _judge(judge: Judge, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> str | None:
    """Returns why the judge stopped, or None."""
    if not matches:
        return None
    try:
        judge.judge(matches, transcripts, record)
    except JudgeStopped as error:
        return str(error)
    return None


def _last(judgements: Sequence[Judgement]) -> dict[Match, Judgement]:
    return {judgement.match: judgement for judgement in judgements}


def _sum(judgements: Sequence[Judgement]) -> Attempts:
    return Attempts(*(sum(counts) for counts in zip(Attempts(), *(one.attempts for one in judgements), strict=True)))


def _on_matches(
    path: Path, records: Sequence[StoredJudgement], matches: Sequence[Match], transcripts: Transcripts
) -> list[Judgement]:
    """The stored judgements on the matches; ValueError if one is on other texts."""
    wanted = {*matches}
    found = [(_from_stored(record), record["texts"]) for record in records]
    found = [(judgement, texts) for judgement, texts in found if judgement.match in wanted]
    changed = [judgement.match for judgement, texts in found if transcripts.digest(judgement.match) != texts]
    if changed:
        example = min(changed)
        raise ValueError(
            f"{path}: {len(changed)} judgements are on other texts, such as that on {example.first} and "
            f"{example.second} for the prompt {example.prompt}. Restore the prompts and replies, or delete this file "
            "to judge again"
        )
    return [judgement for judgement, _ in found]


def _to_stored(judgement: Judgement, transcripts: Transcripts) -> StoredJudgement:
    return StoredJudgement(
        **judgement.match._asdict(),
        texts=transcripts.digest(judgement.match),
        verdict=judgement.verdict,
        review=judgement.review,
        **judgement.attempts._asdict(),
        problem=judgement.problem,
    )


def _from_stored(record: StoredJudgement) -> Judgement:
    return Judgement(
        match=Match(record["prompt"], record["first"], record["second"]),
        verdict=record["verdict"],
        review=record["review"],
        attempts=Attempts(record["failed"], record["timed_out"], record["unreadable"]),
        problem=record["problem"],
    )
