"""Fast path of spans.conversation_segments: reuses the spans of conversations with the same roles.

spans.py renders a conversation several times. Here it does so once per sequence of roles, for a conversation of
placeholders. A row with these roles is then rendered once, and its texts replace the placeholders. If the result is
not the rendered row, to the character, or if turns contain more than text, spans.py handles the row.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.reasoning import read_thought
from qlora_jax.data.formats.tool_calls import Tools
from qlora_jax.data.loss_mask.spans import SegmentSearch, conversation_segments, search_segments
from qlora_jax.data.loss_mask.turn_branches import RowText, Segment
from qlora_jax.data.loss_mask.turn_marks import turn_marks
from qlora_jax.data.loss_mask.turns import TEXT_CHANGES, closes_reasoning
from qlora_jax.data.tokenizer.chat_template import Message, Rendering, text_of
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Letters and digits only: a template that trims or escapes texts does not change them.
_PLACEHOLDER = "Qz8MESSAGE{}x8Zq"
_PLACEHOLDERS = re.compile(_PLACEHOLDER.replace("{}", "([0-9]+)"))
_CACHED = 4096  # sequences of roles

Segmenter = Callable[[Sequence[Message], Tools | None], SegmentSearch]


class ConversationTemplate(NamedTuple):
    """The segments of a rendered conversation, with gaps for its messages.

    Fields:
      texts: the template's own texts.
      order: the pieces of the conversation, as indices of a list with the texts and then the messages.
      segments: for each segment, its pieces, and True if the loss sees it.
    """

    texts: list[str]
    order: list[int]
    segments: list[tuple[slice, bool]]


def make_segmenter(tokenizer: Tokenizer) -> Segmenter:
    """Returns a function like `search_segments` for the tokenizer's chat template, but fast.

    Raises:
      ValueError: the same errors as `turn_marks`. The searches raise those of `conversation_segments`.
    """
    marks = turn_marks(tokenizer)
    closed = closes_reasoning(marks.prompt)  # then reasoning inside the content is not learned

    @functools.lru_cache(_CACHED)
    def template_of(roles: tuple[str, ...]) -> ConversationTemplate | None:
        conversation = [{"role": role, "content": _PLACEHOLDER.format(n)} for n, role in enumerate(roles)]
        try:
            row = conversation_segments(tokenizer, marks, conversation)
        except ValueError:  # conversation_segments reports the reason with the row
            return None
        return None if row.branches else _with_gaps(row.segments)

    def search(messages: Sequence[Message], tools: Tools | None) -> SegmentSearch:
        reasons = closed and any([read_thought(message).reasoning for message in messages])
        if tools is None and all([len(message) == 2 for message in messages]) and not reasons:
            template = template_of(tuple([message["role"] for message in messages]))
            if template is not None:
                (rendered,) = yield [Rendering(messages)]
                if filled := _fill(template, messages, text_of(rendered)):
                    return RowText(filled)
        return (yield from search_segments(tokenizer, marks, messages, tools))

    return search


def _with_gaps(segments: Sequence[Segment]) -> ConversationTemplate:
    split = [_PLACEHOLDERS.split(segment.text) for segment in segments]  # texts and numbers of messages in turn
    texts = [text for parts in split for text in parts[::2]]
    template, place = ConversationTemplate(texts, [], []), itertools.count()
    for parts, segment in zip(split, segments, strict=True):
        start = len(template.order)
        template.order.extend(len(texts) + int(part) if index % 2 else next(place) for index, part in enumerate(parts))
        template.segments.append((slice(start, len(template.order)), segment.supervised))
    return template


def _fill(template: ConversationTemplate, messages: Sequence[Message], rendered: str) -> list[Segment]:
    """Returns the segments with the messages' texts if they join to `rendered`, else an empty list."""
    for change in TEXT_CHANGES:
        available = template.texts + [change(message["content"]) for message in messages]
        pieces = [available[index] for index in template.order]
        if "".join(pieces) == rendered:
            return [Segment("".join(pieces[part]), supervised) for part, supervised in template.segments]
    return []
