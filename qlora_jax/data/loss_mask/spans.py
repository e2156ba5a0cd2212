"""Splits a rendered conversation into what the model has to write and what it reads, exactly and for any chat template.

Few templates mark the assistant's texts, so their spans are derived: turns.py finds each turn after the prompt that
inference builds for it, and turn_branches.py puts the turns into one text, or into a trunk with branches where the
template writes a turn differently later. Each step is checked.

A template that rewrites the assistant's texts, or ends a turn without a special token, raises an error.
"""

from collections.abc import Generator, Mapping, Sequence
from os.path import commonprefix
from typing import NamedTuple

from qlora_jax.data.formats.turn_fields import Tools, check_template_shows
from qlora_jax.data.loss_mask.turn_branches import LearnedTurn, RowText, build_row_text
from qlora_jax.data.loss_mask.turns import (
    PLACEHOLDER,
    TEXT_CHANGES,
    TurnMarks,
    check_history,
    learned_turn,
    other_end,
    prompt_changes,
    search_turn_texts,
    text_rewritten,
)
from qlora_jax.data.tokenizer.chat_template import Rendering, text_of
from qlora_jax.data.tokenizer.render_batches import run_together
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# A search for segments, which yields the conversations that it needs and is sent their texts (render_batches.py).
SegmentSearch = Generator[Sequence[Rendering], Sequence[str | ValueError], RowText]


class ConversationTurns(NamedTuple):
    """A rendered conversation, and the turns of the assistant in it, in order."""

    rendered: str
    turns: list[LearnedTurn]


TurnSearch = Generator[Sequence[Rendering], Sequence[str | ValueError], ConversationTurns]


def conversation_segments(
    tokenizer: Tokenizer, marks: TurnMarks, messages: Sequence[Message], tools: Tools | None = None
) -> RowText:
    """Returns the rendered conversation. Each assistant turn with its end is supervised, after its own prompt.

    Raises:
      ValueError: the template rejects the conversation, drops a part of it, or its spans are not exact.
    """
    (found,) = run_together([search_segments(tokenizer, marks, messages, tools)], tokenizer.start_rendering)
    if isinstance(found, ValueError):
        raise found
    return found


def search_segments(
    tokenizer: Tokenizer, marks: TurnMarks, messages: Sequence[Message], tools: Tools | None
) -> SegmentSearch:
    """Yields the conversations that `conversation_segments` needs, and returns its result."""
    return build_row_text(*(yield from search_turns(tokenizer, marks, messages, tools)))


def search_turns(
    tokenizer: Tokenizer, marks: TurnMarks, messages: Sequence[Message], tools: Tools | None
) -> TurnSearch:
    """Yields the conversations that are needed, and returns the rendered conversation and its turns.

    A turn needs two of them: its prompt, and the messages up to it, because a template may write a turn differently
    when it is the last one.
    """
    wanted = _renderings(messages, tools)
    found = dict(zip(wanted, (yield [*wanted.values()]), strict=True))
    rendered = text_of(found["whole", 0])
    check_template_shows(messages, rendered, None if tools is None else text_of(found["without tools", 0]))
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if ("masked", index) in found:
            turns.append(_first_turn(marks, index, message, text_of(found["masked", index]), rendered))
            continue
        whole = rendered if index == len(messages) - 1 else text_of(found["through", index])
        prompt = text_of(found["prompt", index])
        before, whole, (other,) = yield from search_turn_texts(messages[:index], [message], prompt, whole, tools)
        turn = learned_turn(tokenizer, marks, index, other, before, whole)
        turns.append(turn._replace(prompt=prompt))
    check_history(messages, rendered)
    return ConversationTurns(rendered, turns)


def _renderings(messages: Sequence[Message], tools: Tools | None) -> Mapping[tuple[str, int], Rendering]:
    """Returns the conversations that a search needs, by their kind and the turn that they are for."""
    wanted = {("whole", 0): Rendering(messages, tools=tools)}
    if tools is not None:
        wanted["without tools", 0] = Rendering(messages)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Templates may reject a conversation without a user.
        if not message.get("tool_calls") and all(before["role"] != "user" for before in messages[:index]):
            masked = [*messages[:index], {**message, "content": PLACEHOLDER.format(index)}, *messages[index + 1 :]]
            wanted["masked", index] = Rendering(masked, tools=tools)
            continue
        wanted["prompt", index] = Rendering(messages[:index], add_generation_prompt=True, tools=tools)
        if index < len(messages) - 1:
            wanted["through", index] = Rendering(messages[: index + 1], tools=tools)
    return wanted


def _first_turn(marks: TurnMarks, index: int, message: Message, masked: str, rendered: str) -> LearnedTurn:
    """Returns a turn before the user's first message, which has no prompt that a template would render.

    Args:
      masked: the whole conversation with a placeholder for the turn's text.
    """
    before, _, after = masked.partition(PLACEHOLDER.format(index))
    start, stop = len(before), len(rendered) - len(after)
    written = [change(message["content"]) for change in TEXT_CHANGES]
    if not (rendered.startswith(before) and rendered.endswith(after) and rendered[start:stop] in written):
        raise text_rewritten()
    if not (marks.prompt and before.endswith(marks.prompt)):
        raise prompt_changes(index)
    if not rendered.startswith(marks.end, stop):
        raise other_end(marks, index, rendered[stop:])
    return LearnedTurn(before, rendered[start : stop + len(marks.end)])


def shared_prefix(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[str, list[int]]:
    """Returns (prefix, its ids). The ids of each text are those of the prefix, then those of the rest of the text.

    This holds if a special token ends the prefix: a tokenizer finds special tokens before it splits the text between
    them. Returns ("", []) if no special token ends a common prefix, or if the tokenizer treats the beginning of a text
    differently from the rest.
    """
    lengths = tokenizer.byte_lengths
    if lengths is None or lengths.prefix == "first":
        return "", []
    *_, last = (None, *tokenizer.special_text.finditer(commonprefix(texts)))  # noqa: RUF071 (characters, not paths)
    if last is None or not is_always_found(tokenizer, last.group()):
        return "", []
    prefix = last.string[: last.end()]
    ids = tokenizer.encode(prefix)
    # Another added token may overlap the beginning of this one.
    return (prefix, ids) if ids[-1] == tokenizer.backend.token_to_id(last.group()) else ("", [])


def is_always_found(tokenizer: Tokenizer, token: str) -> bool:
    """Returns True if the tokenizer finds this added token in any text, whatever follows it."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    found = [other for other in added if token in other.content]
    return len(found) == 1 and not found[0].rstrip and not found[0].single_word
