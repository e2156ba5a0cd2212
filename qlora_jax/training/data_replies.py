"""The completions that the data has, in the form of sampled replies."""

from collections.abc import Callable, Sequence

import numpy as np

from qlora_jax.data.encoder import encode_rows
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.reply import Reply
from qlora_jax.rollouts.started_prompts import Asked
from qlora_jax.untrusted_json import JsonObject

SHOWN = 20  # rows that one error lists


def check_completions(prompts: PromptRows) -> None:
    """Raises ValueError for rows of the training files without a completion, held-out ones included."""
    found = {number: _problems(prompts, number) for number in prompts.rows}
    files = {number: [file for file in prompts.files if file.first <= number][-1] for number in found}
    problems = [
        f"{files[number].path}: row {number - files[number].first + 1}: {'; '.join(wrong)}"
        for number, wrong in found.items()
        if wrong
    ]
    if problems:
        lines = "\n  ".join(problems[:SHOWN])
        raise ValueError(
            f"distillation.lmbda: below 1, but {len(problems):,} of {len(found):,} rows have no completion to learn. "
            f"Add a column completion, or an assistant's last message:\n  {lines}"
        )


def _problems(prompts: PromptRows, number: int) -> list[str]:
    name, columns = _answered(prompts, number)
    found = FORMATS[name].check(columns)
    if not found and name == "messages" and len(prompts.prompt(number)) == len(columns[name]):
        return ["the last message is not the assistant's"]
    return found


def replies_of_data(
    prompts: PromptRows,
    tokenizer: Tokenizer,
    asked: Sequence[Asked],
    where: Callable[[int], str],
    *,
    count: int,
    most: int,
) -> list[list[Reply]]:
    """Returns `count` replies to each prompt: its row's completion, and others that have one token and do not train.

    So the batch has the form of one with sampled replies, for the same compiled step.

    Args:
      where: returns file and line of a row.
      most: tokens of a completion; the rest is cut.

    Raises:
      ValueError: the template writes a prompt in another way once its completion follows.
    """
    return [_replies(prompts, tokenizer, each, where(each.number), count, most) for each in asked]


def _replies(prompts: PromptRows, tokenizer: Tokenizer, asked: Asked, place: str, count: int, most: int) -> list[Reply]:
    name, columns = _answered(prompts, asked.number)
    (row,) = encode_rows(place, [Row(Place(1, 0), columns)], FORMATS[name], tokenizer)
    start = len(asked.ids)
    if row.branches or row.ids[:start].tolist() != asked.ids:
        raise ValueError(
            f"{place}: the chat template writes the prompt in another way once its completion follows. Set "
            "distillation.lmbda to 1, or data.chat_template to a template that does not"
        )
    own = slice(start, min(start + most, int(np.flatnonzero(row.supervised)[-1]) + 1))
    completion = _reply(row.ids[own].tolist(), row.supervised[own].tolist())
    return [completion, *[_reply(asked.ids[-1:], [False])] * (count - 1)]


def _reply(ids: list[int], drawn: list[bool]) -> Reply:
    return Reply(ids=ids, logps=[0.0] * len(ids), drawn=drawn, text="", end="stop", messages=[])


def _answered(prompts: PromptRows, number: int) -> tuple[str, JsonObject]:
    """Returns the name of a format of texts, and the row's columns in it."""
    row = prompts.rows[number]
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return "messages", row | {"messages": [*row["prompt"], *row["completion"]]}
    return ("completion" if "prompt" in row else "messages"), row
