"""Whether two runs are asked the same, to the token: only then are their scores compared question by question."""

import itertools
from collections.abc import Sequence

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.tasks.task import Task
from qlora_jax.inference.result_cache import digest


def check_same(
    tasks: Sequence[Task], others: Sequence[Task], names: tuple[str, str], tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    """Raises ValueError unless two runs' tasks, made of the same files, ask the same.

    Args:
      names, tokenizers: of the two runs; a tokenizer has no template where none is used.
    """
    pairs = zip(tasks, others, strict=True)
    problems = [f"{task.name}: {problem}" for task, other in pairs if (problem := _difference(task, other))]
    if problems:
        told = "".join(f"\n  {problem}" for problem in problems)
        first, second = names
        raise ValueError(
            f"{first} and {second} are not asked the same, so they can't be compared:{told}\n{_fix(*tokenizers)}"
        )


def _difference(task: Task, other: Task) -> str | None:
    """Which questions are not the same, in words."""
    asked = list(itertools.zip_longest(task.asked, other.asked))
    apart = [number for number, (a, b) in enumerate(asked, start=1) if a is None or b is None or digest(a) != digest(b)]
    if not apart:
        return None
    if task.name == "harness":
        return "its texts would become other tokens, or be cut at another length"
    return f"{len(apart)} of {len(asked)} become other tokens, or end at others; the first is number {apart[0]}"


def _fix(a: Tokenizer, b: Tokenizer) -> str:
    if a.chat_template != b.chat_template:
        return "Their chat templates are not the same; give one to both: --chat_template FILE, or none: --raw."
    return (
        "Their models' tokenizers, lengths or ends of replies are not the same; score each run by itself, without "
        "--against."
    )
