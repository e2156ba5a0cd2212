"""Checks that two runs get exactly the same token ids: only then are their scores compared question by question."""

import itertools
from collections.abc import Sequence

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.task import AnyTask
from qlora_jax.inference.result_cache import digest


def check_same_inputs(
    tasks: Sequence[AnyTask], others: Sequence[AnyTask], names: tuple[str, str], tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    """Raises ValueError unless two runs' tasks, built from the same files, have the same inputs.

    Args:
      names: names of the two runs, for the error.
      tokenizers: tokenizers of the two runs, without a template where none is used.
    """
    pairs = zip(tasks, others, strict=True)
    problems = [f"{task.name}: {problem}" for task, other in pairs if (problem := _difference(task, other))]
    if problems:
        first, second = names
        raise ValueError(
            f"{first} and {second}: not comparable, because their questions differ:"
            + "".join(f"\n  {problem}" for problem in problems)
            + f"\n{_fix(*tokenizers)}"
        )


def _difference(task: AnyTask, other: AnyTask) -> str | None:
    """Describes which rows differ; None if all are equal."""
    pairs = list(itertools.zip_longest(task.inputs, other.inputs))
    differing = [
        number for number, (a, b) in enumerate(pairs, start=1) if a is None or b is None or digest(a) != digest(b)
    ]
    if not differing:
        return None
    if task.size is None:  # the rows are known only when they are scored
        return "different tokenizers or maximum lengths"
    return f"different tokens or stop tokens in {len(differing)} of {len(pairs)}; the first is number {differing[0]}"


def _fix(a: Tokenizer, b: Tokenizer) -> str:
    if a.chat_template != b.chat_template:
        return "Their chat templates differ. Use one template for both (--chat_template), or none (--raw)."
    if a.chat_template_kwargs != b.chat_template_kwargs:
        return "Their variables for the template differ. Set the same for both (--chat_template_kwargs)."
    return "Their tokenizers, maximum lengths or stop tokens differ. Evaluate each run separately, without --against."
