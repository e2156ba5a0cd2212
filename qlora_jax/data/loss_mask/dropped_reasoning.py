"""Finds rows whose reasoning the chat template drops, so that the model never sees it."""

from collections.abc import Sequence

from qlora_jax.data.formats.reasoning import read_thought
from qlora_jax.data.loss_mask.turn_branches import RowText, join_text
from qlora_jax.data.tokenizer.template_protocol import Message


def mark_dropped_reasoning(row: RowText, messages: Sequence[Message]) -> RowText:
    """Returns the row; it is marked if reasoning of its messages is in none of its texts."""
    reasoning = [found for message in messages if message["role"] == "assistant" and (found := _reasoning(message))]
    if not reasoning:
        return row
    texts = [join_text(branch.segments) for branch in row.branches]
    trunk = join_text(row.segments)
    texts.append(trunk[: row.needed] if row.branches else trunk)
    seen = all(any(one in text for text in texts) for one in reasoning)
    return row if seen else row._replace(unseen_reasoning=True)


def _reasoning(message: Message) -> str:
    return read_thought(message).reasoning
