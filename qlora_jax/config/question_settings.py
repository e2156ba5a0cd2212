"""Settings of question files: a training run asks them at each evaluation, `evaluate` asks them of any model."""

import dataclasses
import difflib
from collections.abc import Collection
from typing import Literal, NamedTuple

from qlora_jax.config.fields import AT_LEAST_ONE, NON_NEGATIVE, NOT_EMPTY, Bound, setting
from qlora_jax.regex import text_pattern_problems


class QuestionKind(NamedTuple):
    """A kind of question file.

    Fields:
      columns: names of the columns that a file may have.
      caption: caption of its chart in a run's report.
    """

    columns: tuple[str, ...]
    caption: str


AnswerMatch = Literal["exact", "words", "number"]
LabelScore = Literal["sum", "mean", "calibrated"]
_TWO_OR_MORE = Bound("two or more labels", lambda value: len(value) >= 2)
_COUNTS = Bound("one or more numbers of 1 or more", lambda value: len(value) > 0 and min(value) >= 1)
_TOP_P = Bound("more than 0 and at most 1", lambda value: 0 < value <= 1)

# By the name of the setting, in QuestionArgs, that names the file.
QUESTION_KINDS = {
    "choices": QuestionKind(("question", "options", "answer"), "Questions by options"),
    "letters": QuestionKind(("question", "options", "answer", "subject", "input", "output"), "Questions by letter"),
    "labels": QuestionKind(("label",), "Classification"),
    "answers": QuestionKind(("question", "answer"), "Exact answers"),
    "programs": QuestionKind(("prompt", "test", "entry_point"), "Programs that pass their tests"),
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
        "letters: file of example questions, shown with their answers before questions of the same subject",
        None,
        NOT_EMPTY,
    )
    num_shots: int = setting("shots: number of examples, the first of each subject", 5, AT_LEAST_ONE)
    labels: str | None = setting(
        "file of texts with a label, scored by the likelihood of each label after label_prompt: accuracy, F1, Matthews "
        "correlation; column label, and those of label_prompt",
        None,
        NOT_EMPTY,
    )
    label_prompt: str | None = setting(
        "labels: the question, in which {name} stands for the column name: 'Review: {sentence}\\nSentiment:'",
        None,
        NOT_EMPTY,
    )
    label_texts: dict[str, str] | None = setting(
        'labels: each label of the file, and the text that stands for it, such as \'{"0": negative, "1": positive}\'. '
        "With two labels, F1 is that of the last one",
        None,
        _TWO_OR_MORE,
    )
    label_score: LabelScore = setting(
        "labels: sum: log p of a label's text; mean: divided by its number of tokens; calibrated: minus its log p "
        "after label_prompt with N/A in place of each column",
        "sum",
    )
    answers: str | None = setting(
        "file of questions with a text as the answer, scored by exact match of the greedy reply; columns question (or "
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
    answer_match: AnswerMatch = setting(
        "answers: how they are compared. exact: as written; words: ignoring case, punctuation and articles; also "
        "reports the share of replies that contain an answer and the F1 of their words; number: as numbers, so that "
        "$1,000.00 is 1000",
        "exact",
    )
    programs: str | None = setting(
        "file of functions to write, scored by running the replies with tests, like HumanEval; columns prompt, test "
        "(the source of check(candidate)), entry_point",
        None,
        NOT_EMPTY,
    )
    pass_at: list[int] = setting(
        "programs: values of k of pass@k, the chance that one of k replies passes its tests", [1], _COUNTS
    )
    program_samples: int = setting("programs: replies per prompt; at least the largest k of pass_at", 1, AT_LEAST_ONE)
    program_temperature: float = setting("programs: 0: the likeliest token; more than 0: draw", 0.0, NON_NEGATIVE)
    program_top_p: float = setting(
        "programs: draw only from the likeliest tokens whose probabilities reach this sum", 1.0, _TOP_P
    )
    program_seed: int = setting("programs: seed of the draws", 0, NON_NEGATIVE)
    program_seconds: int = setting("programs: limit on the processor time of one reply", 3, AT_LEAST_ONE)
    program_memory: int = setting("programs: limit on the memory of one reply, in MiB", 512, AT_LEAST_ONE)
    program_isolation: Literal["sealed", "none"] = setting(
        "programs: sealed: no network, no files to write, no other processes, or an error where the system cannot do "
        "this; none: only limits on time and memory, so that replies can do whatever you can",
        "sealed",
    )
    file_columns: dict[str, str] | None = setting(
        "names of these columns in the files, where they differ: {question: problem, answer: solution}",
        None,
        NOT_EMPTY,
    )
    max_new_tokens: int = setting("answers, programs: maximum tokens per reply", 256, AT_LEAST_ONE)
    max_rows: int | None = setting("use only the first questions of each file; null: all", None, AT_LEAST_ONE)

    @property
    def given(self) -> bool:
        """True if there is a file of questions."""
        return any(getattr(self, kind) is not None for kind in QUESTION_KINDS)


def question_problems(
    args: QuestionArgs, section: str = "", rows_columns: Collection[str] = (), *, may_have_head: bool = False
) -> list[str]:
    """Describes how settings of questions contradict each other, one line each.

    Args:
      section: prefix of their names in messages.
      rows_columns: columns that a file other than those of questions may have.
      may_have_head: True if the model may have a sequence head, which scores labels without a prompt.
    """
    problems = _column_problems(args, section, rows_columns)
    if args.shots is not None and args.letters is None:
        problems.append(f"{section}shots: requires {section}letters; set it too")
    problems += _label_problems(args, section, may_have_head) + _program_problems(args, section)
    if args.answer_pattern is None:
        return problems
    if args.answers is None:
        problems.append(f"{section}answer_pattern: requires {section}answers; set it too")
    wrong = text_pattern_problems(args.answer_pattern)
    return problems + [f"{section}answer_pattern: {problem} (found {args.answer_pattern!r})" for problem in wrong]


def _label_problems(args: QuestionArgs, section: str, may_have_head: bool) -> list[str]:
    given = {"label_prompt": args.label_prompt, "label_texts": args.label_texts}
    if args.labels is None:
        return [
            f"{section}{name}: requires {section}labels; set it too"
            for name, value in given.items()
            if value is not None
        ]
    missing = [name for name, value in given.items() if value is None]
    if may_have_head and len(missing) == len(given):
        return []
    problems = [f"{section}labels: requires {section}{name}; set it too" for name in missing]
    texts = [*(args.label_texts or {}).values()]
    if len(set(texts)) < len(texts) or "" in texts:
        problems.append(f"{section}label_texts: texts are empty or equal (found {texts}). Give each label another text")
    return problems


def _program_problems(args: QuestionArgs, section: str) -> list[str]:
    problems = []
    if max(args.pass_at) > args.program_samples:
        problems.append(
            f"{section}pass_at: more than {section}program_samples (found {max(args.pass_at)}, expected at most "
            f"{args.program_samples}). Increase program_samples"
        )
    if args.program_samples > 1 and args.program_temperature == 0:
        problems.append(
            f"{section}program_temperature: found 0 with {section}program_samples={args.program_samples}, whose "
            "replies are all equal. Set a temperature of more than 0"
        )
    return problems


def _column_problems(args: QuestionArgs, section: str, rows_columns: Collection[str]) -> list[str]:
    if args.file_columns is None:
        return []
    asked = [kind for kind in QUESTION_KINDS if getattr(args, kind) is not None]
    if not asked and not rows_columns:
        return [f"{section}file_columns: requires one of {', '.join(QUESTION_KINDS)}; set one too"]
    known = dict.fromkeys([*(name for kind in asked for name in QUESTION_KINDS[kind].columns), *rows_columns])
    return unknown_columns(f"{section}file_columns", args.file_columns, known)


def unknown_columns(setting: str, names: Collection[str], known: Collection[str]) -> list[str]:
    """Describes column names that are not ours, one line each."""
    return [
        f"{setting}: unknown column (found {name!r}, expected any of {', '.join(known)}){_near(name, known)} Write our "
        "name first, then the file's"
        for name in names
        if name not in known
    ]


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name.strip().lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
