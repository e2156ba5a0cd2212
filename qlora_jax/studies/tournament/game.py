"""One judged comparison of two systems, the input of all ratings."""

from typing import NamedTuple


class Game(NamedTuple):
    """A judge's verdict on the replies of two systems to one prompt.

    Fields:
      prompt: id of the prompt; bootstraps resample prompts, and judges agree or disagree on a prompt.
      first: name of the system whose reply the judge saw first.
      second: name of the system whose reply the judge saw second.
      outcome: 1 if the judge prefers the first system, 0 if the second, 0.5 for a tie.
      judge: name of the judge.
    """

    prompt: str
    first: str
    second: str
    outcome: float
    judge: str
