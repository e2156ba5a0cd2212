"""Settings of questions, which a run asks while it trains and `evaluate` asks of a model."""

import dataclasses
import re
from collections.abc import Collection

from qlora_jax.config.fields import AT_LEAST_ONE, NOT_EMPTY, setting

# The settings that name files, each of a kind of its own, and the columns that a file of that kind may have.
FILE_COLUMNS = {
    "choices": ("question", "options", "answer"),
    "letters": ("question", "options", "answer", "subject", "input", "output"),
    "answers": ("question", "answer"),
}
QUESTION_KINDS = tuple(FILE_COLUMNS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionArgs:
    """Files of questions, each scored in its own way, and how (docs/evaluate.md); while a run trains, at every
    evaluation (docs/training.md)."""

    choices: str | None = setting(
        "file of multiple-choice questions: question, options, answer, or prompt, options, answer: accuracy by the "
        "likelihood of the options",
        None,
        NOT_EMPTY,
    )
    letters: str | None = setting(
        "file of multiple-choice questions that are scored as MMLU is, by the letter after a prompt with all options: "
        "question, options, answer, or input, output (a whole prompt and its letter); with subject: their mean too",
        None,
        NOT_EMPTY,
    )
    shots: str | None = setting(
        "with letters: file of questions, shown with their answers before those of their subject", None, NOT_EMPTY
    )
    num_shots: int = setting("with shots: how many, the first of each subject", 5, AT_LEAST_ONE)
    answers: str | None = setting(
        "file of questions whose answer is a text: question (or prompt), answer (a text, or a list of right ones): how "
        "many greedy replies are exactly it",
        None,
        NOT_EMPTY,
    )
    answer_pattern: str | None = setting(
        "with answers: regular expression that finds the answer in a reply and in the file, its last match; its group, "
        r"where it has one, such as '#### (-?[0-9.,]+)' (null: the whole text)",
        None,
        NOT_EMPTY,
    )
    file_columns: dict[str, str] | None = setting(
        "what these files call their columns, where it is not as above: {question: problem, answer: solution}",
        None,
        NOT_EMPTY,
    )
    max_new_tokens: int = setting("with answers: tokens of a reply at most", 256, AT_LEAST_ONE)
    max_rows: int | None = setting("only the first questions of each file (null: all)", None, AT_LEAST_ONE)

    @property
    def given(self) -> bool:
        """Whether there is any file of questions."""
        return any(getattr(self, kind) is not None for kind in QUESTION_KINDS)


def question_problems(args: QuestionArgs, section: str = "", rows_columns: Collection[str] = ()) -> list[str]:
    """In which settings of questions contradict each other.

    Args:
      section: what stands before their names.
      rows_columns: the columns that a file beside those of questions may have.
    """
    problems = _column_problems(args, section, rows_columns)
    if args.shots is not None and args.letters is None:
        problems.append(f"{section}shots: is for letters; give {section}letters too")
    if args.answer_pattern is None:
        return problems
    if args.answers is None:
        problems.append(f"{section}answer_pattern: is for answers; give {section}answers too")
    try:
        re.compile(args.answer_pattern)
    except re.error as error:
        problems.append(f"{section}answer_pattern: found {args.answer_pattern!r}, no regular expression: {error}")
    return problems


def _column_problems(args: QuestionArgs, section: str, rows_columns: Collection[str]) -> list[str]:
    if args.file_columns is None:
        return []
    asked = [kind for kind in QUESTION_KINDS if getattr(args, kind) is not None]
    if not asked and not rows_columns:
        return [f"{section}file_columns: is for {', '.join(QUESTION_KINDS)}; give one of them too"]
    known = dict.fromkeys([*(name for kind in asked for name in FILE_COLUMNS[kind]), *rows_columns])
    return [
        f"{section}file_columns: found {name!r}, expected some of {', '.join(known)}, each before the file's own name"
        for name in args.file_columns
        if name not in known
    ]
