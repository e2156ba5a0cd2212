"""The tasks of files of questions, as settings name them: for `evaluate`, and for a run that asks while it trains."""

from collections.abc import Collection

from qlora_jax.config import QuestionArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.tasks.answers import AnswersTask, answers_task
from qlora_jax.evaluation.tasks.letters import letters_task
from qlora_jax.evaluation.tasks.task import ChoiceTask, LettersTask
from qlora_jax.evaluation.tasks.text import choice_task

QuestionTask = ChoiceTask | LettersTask | AnswersTask


def question_tasks(
    args: QuestionArgs, tokenizer: Tokenizer, *, named_stop_ids: Collection[int], max_positions: int
) -> list[QuestionTask]:
    """A task for each file that `args` names, in the order of its settings.

    Args:
      named_stop_ids: ids that end a reply, of the model's files.

    Raises:
      ValueError: rows that are no such questions, or too long for the model: all of the first file that has any.
    """
    limits = {"max_rows": args.max_rows, "max_positions": max_positions, "named": args.file_columns}
    tasks: list[QuestionTask] = []
    if args.choices is not None:
        tasks.append(choice_task(args.choices, tokenizer, **limits))
    if args.letters is not None:
        tasks.append(letters_task(args.letters, tokenizer, shots=args.shots, num_shots=args.num_shots, **limits))
    if args.answers is not None:
        of_replies = {"pattern": args.answer_pattern, "max_new_tokens": args.max_new_tokens}
        tasks.append(answers_task(args.answers, tokenizer, named_stop_ids=named_stop_ids, **of_replies, **limits))
    return tasks
