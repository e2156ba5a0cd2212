"""The protocol of judges: anything that gives verdicts on matches."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from qlora_jax.studies.tournament.matches import Match, Transcripts

Verdict = Literal[1, 2, 3, -1]
FIRST, SECOND, TIE, UNREADABLE = VERDICTS = 1, 2, 3, -1
OUTCOMES: dict[int | None, float] = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}  # for Game


class Attempts(NamedTuple):
    """Attempts at one judgement that gave no verdict.

    Fields:
      failed: the judge was not reached, or its reply was an error.
      timed_out: it did not reply in time.
      unreadable: its review does not end with 1, 2 or 3.
    """

    failed: int = 0
    timed_out: int = 0
    unreadable: int = 0

    def plus(self, other: "Attempts") -> "Attempts":
        """The sums of both."""
        return Attempts(*(a + b for a, b in zip(self, other, strict=True)))


class Judgement(NamedTuple):
    """A judge's verdict on one match.

    Fields:
      verdict: FIRST, SECOND or TIE; UNREADABLE if no attempt gave one; None if the judge did not reply, so that the
        match is still to be judged.
      review: the text that the verdict was read from.
      attempts: those without a verdict.
      problem: the reason why it did not reply.
    """

    match: Match
    verdict: Verdict | None
    review: str = ""
    attempts: Attempts = Attempts()
    problem: str | None = None


Record = Callable[[Judgement], None]


class JudgeStopped(ValueError):
    """The reason why a judge cannot be asked any more."""


@runtime_checkable
class Judge(Protocol):
    """Gives verdicts on matches.

    Attributes:
      remembers: True if its verdicts lie in another file, so that the tournament does not store them. It then
        records a judgement on each match that it is asked to judge, without a verdict if there is none yet.
    """

    remembers: bool

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """All that its verdicts depend on, apart from the texts of a match."""
        ...

    def judge(self, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> None:
        """Judges the matches, and calls `record` with each judgement as soon as it is complete.

        A match that gets no judgement, or one without a verdict, stays to be judged.

        Raises:
          JudgeStopped: the judge cannot be asked any more; the other judges continue.
        """
        ...
