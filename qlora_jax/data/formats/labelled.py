"""Formats of texts with labels, and of texts that mean the same."""

from collections.abc import Sequence

from qlora_jax.data.formats.chat_messages import current_messages, message_problems
from qlora_jax.data.formats.columns import text_problems
from qlora_jax.data.formats.row_format import Columns, RowFormat, Texts
from qlora_jax.data.formats.turn_fields import tools_problems, with_parsed_arguments

# Columns of one text or of two, such as those of GLUE's tasks. Two texts are joined as two lines.
_COLUMNS = {
    "text-label": ("text",),
    "sentence-label": ("sentence",),
    "sentence-pair-label": ("sentence1", "sentence2"),
    "premise-hypothesis-label": ("premise", "hypothesis"),
    "question-sentence-label": ("question", "sentence"),
    "question-pair-label": ("question1", "question2"),
}


def _conversation_problems(row: Columns) -> list[str]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return message_problems(row)
    if not messages:
        return ["messages is empty"]
    # A conversation without an answer can have a label too.
    answered = [*messages, {"role": "assistant", "content": "."}]
    return [*message_problems({"messages": answered}), *tools_problems(row)]


def _conversation_texts(row: Columns, chat: bool) -> Texts:
    return Texts("", ([with_parsed_arguments(message) for message in current_messages(row["messages"])],))


def _labelled(name: str, columns: Sequence[str], required: Sequence[str], objective: str | None = None) -> RowFormat:
    """Returns the format of texts in these columns, which are never a conversation."""
    return RowFormat(
        name=name,
        kind="class",
        objective=objective,
        required=tuple(required),
        problems=lambda row: text_problems(row, *columns),
        texts=lambda row, chat: Texts("", ("\n".join([row[column] for column in columns]),)),
    )


def _embedding(name: str, columns: tuple[str, ...]) -> RowFormat:
    """Returns the format of texts in these columns, each a sequence."""
    return RowFormat(
        name=name,
        kind="embedding",
        required=columns,
        problems=lambda row: text_problems(row, *columns) or _equal_texts(row, columns),
        texts=lambda row, chat: Texts("", tuple(row[column] for column in columns)),
    )


def _equal_texts(row: Columns, columns: Sequence[str]) -> list[str]:
    if len({row[column] for column in columns}) == len(columns):
        return []
    return [f"{' and '.join(columns)} are not different texts"]


FORMS = (
    RowFormat(
        name="messages-label",
        kind="class",
        required=("messages", "label"),
        optional=("tools",),
        problems=_conversation_problems,
        texts=_conversation_texts,
    ),
    *(_labelled(name, columns, (*columns, "label")) for name, columns in reversed(_COLUMNS.items())),
    # Each label is a column of 0 and 1; head.labels names them.
    _labelled("text-label-columns", ("text",), ("text",), objective="multi_label"),
    _embedding("triplet", ("anchor", "positive", "negative")),
    _embedding("anchor-positive", ("anchor", "positive")),
)
