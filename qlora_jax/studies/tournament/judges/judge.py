"""The protocol of judges, anything that gives verdicts on matches; and the prompts of those that are models."""

import string
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import xxhash

from qlora_jax.data.readers.files import Row, read_rows
from qlora_jax.evaluation.task_file import read_each
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


# The judge's prompt of the QLoRA paper, and the verdict in its review.
#
# The system message, the layout of question and answers, and the reading of the verdict are those of the paper's
# repository. Its instructions, which differ by category, are not part of this package: they come from a file in the
# format of that repository's eval/prompts/*_threeclass.jsonl, which can be used unchanged.

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPLATE = (
    "[Question]\n{question}\n\n"
    "[The Start of Assistant 1's Answer]\n{answer_1}\n\n[The End of Assistant 1's Answer]\n\n"
    "[The Start of Assistant 2's Answer]\n{answer_2}\n\n[The End of Assistant 2's Answer]\n\n"
    "[System]\n{prompt}\n\n"
)
_READABLE: dict[int, Verdict] = {FIRST: FIRST, SECOND: SECOND, TIE: TIE}
FIELDS: tuple[str, ...] = ("question", "answer_1", "answer_2", "prompt")


class JudgePrompt(NamedTuple):
    """A judge's prompt for one category of questions.

    Fields:
      category: the category; questions of other categories get the first prompt of a file.
      system: the system message.
      template: the user's message, with the fields of FIELDS in braces.
      instruction: stands for {prompt}.
    """

    category: str | None
    system: str
    template: str
    instruction: str

    def message(self, question: str, answers: tuple[str, str]) -> str:
        """The user's message about two answers."""
        values = dict(zip(FIELDS, (question, *answers, self.instruction), strict=True))
        parts = string.Formatter().parse(self.template)
        return "".join(text + ("" if field is None else values[field]) for text, field, _, _ in parts)


class JudgePrompts(NamedTuple):
    """The prompts of a file, at least one; the first one is the default."""

    prompts: Sequence[JudgePrompt]

    def of(self, category: str | None) -> JudgePrompt:
        """The first prompt of the category, or the default."""
        return next((one for one in self.prompts if one.category == category), self.prompts[0])

    @property
    def digest(self) -> str:
        """Digest of all prompts."""
        return xxhash.xxh3_64_hexdigest(repr([tuple(prompt) for prompt in self.prompts]).encode())


def read_judge_prompts(path: str) -> JudgePrompts:
    """Reads prompts, one per row: `defaults: {prompt: instruction}`, and optionally category and texts of your own.

    The columns system_prompt and prompt_template replace SYSTEM and TEMPLATE.

    Raises:
      ValueError: rows without an instruction, or with other fields in their template; the message lists them.
    """
    return JudgePrompts(read_each(path, read_rows(path), _prompt))


def parse_verdict(review: str) -> Verdict:
    """The whole number of the review's last line if it is 1, 2 or 3, else UNREADABLE."""
    last = review.strip().split("\n")[-1].strip()
    try:
        number = int(last)
    except ValueError:
        return UNREADABLE
    return _READABLE.get(number, UNREADABLE)


def _prompt(row: Row) -> JudgePrompt:
    defaults = row.data.get("defaults")
    instruction = defaults.get("prompt") if isinstance(defaults, dict) else None
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError('defaults: found no instruction, expected {"prompt": "..."}. Add it')
    category = row.data.get("category")
    template = _text(row, "prompt_template", TEMPLATE)
    try:
        parts = [*string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"prompt_template: {error}. Write a brace that is text twice: {{{{") from None
    fields = [field for _, field, _, _ in parts if field is not None]
    odd = sorted({*fields} - {*FIELDS}) + [field for _, field, spec, conversion in parts if spec or conversion]
    missing = sorted({*FIELDS} - {*fields})
    if odd or missing:
        raise ValueError(
            f"prompt_template: unknown fields {odd}, missing fields {missing}. Use {', '.join(FIELDS)} once"
        )
    return JudgePrompt(
        category=category if isinstance(category, str) else None,
        system=_text(row, "system_prompt", SYSTEM),
        template=template,
        instruction=instruction,
    )


def _text(row: Row, column: str, default: str) -> str:
    value = row.data.get(column, default)
    if not isinstance(value, str):
        raise ValueError(f"{column}: found {value!r}, expected a text. Correct it")
    return value
