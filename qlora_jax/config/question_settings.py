"""Settings of question files: a training run asks them at each evaluation, `evaluate` asks them of any model."""

import dataclasses
import difflib
from collections.abc import Collection
from typing import NamedTuple

from qlora_jax.config.fields import AT_LEAST_ONE, NOT_EMPTY, setting
from qlora_jax.patterns import text_pattern_problems


class QuestionKind(NamedTuple):
    """A kind of question file.

    Fields:
      columns: names of the columns that a file may have.
      caption: caption of its chart in a run's report.
    """

    columns: tuple[str, ...]
    caption: str


# By the name of the setting, in QuestionArgs, that names the file.
QUESTION_KINDS = {
    "choices": QuestionKind(("question", "options", "answer"), "Questions by options"),
    "letters": QuestionKind(("question", "options", "answer", "subject", "input", "output"), "Questions by letter"),
    "answers": QuestionKind(("question", "answer"), "Exact answers"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionArgs:
    """Files of questions, and how each kind is scored (docs/evaluate.md). A training run asks them at every evaluation
    (docs/training.md)."""

    choices: str | None = setting(
        "file of multiple-choice questions, scored by the likelihood of each option; columns question (or prompt), "
        "options, answer",
        None,
        NOT_EMPTY,
    )
    letters: str | None = setting(
        "file of multiple-choice questions, scored like MMLU by the letter after a prompt with all options; columns "
        "question, options, answer, or input (the whole prompt) and output (its letter). With the column subject, the "
        "mean over subjects too",
        None,
        NOT_EMPTY,
    )
    shots: str | None = setting(
        "letters: file of example questions, shown with their answers before questions of their subject",
        None,
        NOT_EMPTY,
    )
    num_shots: int = setting("shots: number of examples, the first of each subject", 5, AT_LEAST_ONE)
    answers: str | None = setting(
        "file of questions with a text as answer, scored by exact match of the greedy reply; columns question (or "
        "prompt), answer (a text, or a list of correct ones)",
        None,
        NOT_EMPTY,
    )
    answer_pattern: str | None = setting(
        "answers: regular expression that finds the answer in a reply and in the file. Its last match counts, or the "
        "match's group if it has one, such as '#### (-?[0-9.,]+)'. null: the whole text",
        None,
        NOT_EMPTY,
    )
    file_columns: dict[str, str] | None = setting(
        "the files' names of these columns, where they differ: {question: problem, answer: solution}",
        None,
        NOT_EMPTY,
    )
    max_new_tokens: int = setting("answers: maximum tokens per reply", 256, AT_LEAST_ONE)
    max_rows: int | None = setting("use only the first questions of each file; null: all", None, AT_LEAST_ONE)

    @property
    def given(self) -> bool:
        """True if there is a file of questions."""
        return any(getattr(self, kind) is not None for kind in QUESTION_KINDS)


def question_problems(args: QuestionArgs, section: str = "", rows_columns: Collection[str] = ()) -> list[str]:
    """Describes how settings of questions contradict each other, one line each.

    Args:
      section: prefix of their names in messages.
      rows_columns: columns that a file other than those of questions may have.
    """
    problems = _column_problems(args, section, rows_columns)
    if args.shots is not None and args.letters is None:
        problems.append(f"{section}shots: requires {section}letters; set it too")
    if args.answer_pattern is None:
        return problems
    if args.answers is None:
        problems.append(f"{section}answer_pattern: requires {section}answers; set it too")
    wrong = text_pattern_problems(args.answer_pattern)
    return problems + [f"{section}answer_pattern: {problem} (found {args.answer_pattern!r})" for problem in wrong]


def _column_problems(args: QuestionArgs, section: str, rows_columns: Collection[str]) -> list[str]:
    if args.file_columns is None:
        return []
    asked = [kind for kind in QUESTION_KINDS if getattr(args, kind) is not None]
    if not asked and not rows_columns:
        return [f"{section}file_columns: requires one of {', '.join(QUESTION_KINDS)}; set one too"]
    known = dict.fromkeys([*(name for kind in asked for name in QUESTION_KINDS[kind].columns), *rows_columns])
    return unknown_columns(f"{section}file_columns", args.file_columns, known)


def unknown_columns(setting: str, names: Collection[str], known: Collection[str]) -> list[str]:
    """Describes names of columns that are not ours, one line each."""
    return [
        f"{setting}: unknown column (found {name!r}, expected any of {', '.join(known)}){_near(name, known)} Write our "
        "name first, then the file's"
        for name in names
        if name not in known
    ]


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name.strip().lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
