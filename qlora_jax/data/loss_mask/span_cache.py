"""Fast path of spans.conversation_segments: reuses the spans of conversations with the same roles.

spans.py renders a conversation several times. Here it does so once per sequence of roles, for a conversation of
placeholders. A row with these roles is then rendered once, and its texts replace the placeholders. If the result is
not the rendered row, to the character, or if turns contain more than text, spans.py handles the row.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.tool_calls import Tools
from qlora_jax.data.loss_mask.spans import (
    TEXT_CHANGES,
    Segment,
    SegmentSearch,
    conversation_segments,
    search_segments,
    turn_marks,
)
from qlora_jax.data.tokenizer.chat_template import Message, Rendering
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Letters and digits only: a template that trims or escapes texts does not change them.
_PLACEHOLDER = "Qz8MESSAGE{}x8Zq"
_PLACEHOLDERS = re.compile(_PLACEHOLDER.replace("{}", "([0-9]+)"))
_CACHED = 4096  # sequences of roles

Segmenter = Callable[[Sequence[Message], Tools | None], SegmentSearch]


class SegmentTemplate(NamedTuple):
    """A segment with gaps: the template's own texts, and the index of the message that fills each gap between them."""

    texts: tuple[str, ...]
    messages: tuple[int, ...]
    supervised: bool

    def fill(self, contents: Sequence[str]) -> str:
        """Returns the segment's text with these contents in its gaps."""
        first, *others = self.texts
        return first + "".join([contents[n] + text for n, text in zip(self.messages, others, strict=True)])


def make_segmenter(tokenizer: Tokenizer) -> Segmenter:
    """Returns a function like `search_segments` for the tokenizer's chat template, but fast.

    Raises:
      ValueError: the same errors as `turn_marks`. The searches raise those of `conversation_segments`.
    """
    marks = turn_marks(tokenizer)

    @functools.lru_cache(_CACHED)
    def templates_of(roles: tuple[str, ...]) -> list[SegmentTemplate]:
        conversation = [{"role": role, "content": _PLACEHOLDER.format(n)} for n, role in enumerate(roles)]
        try:
            segments = conversation_segments(tokenizer, marks, conversation)
        except ValueError:  # conversation_segments reports the reason with the row
            return []
        return [_segment_template(segment) for segment in segments]

    def search(messages: Sequence[Message], tools: Tools | None) -> SegmentSearch:
        if tools is None and all([len(message) == 2 for message in messages]):
            templates = templates_of(tuple([message["role"] for message in messages]))
            if templates and (filled := _fill(templates, messages, (yield Rendering(messages)))):
                return filled
        return (yield from search_segments(tokenizer, marks, messages, tools))

    return search


def _segment_template(segment: Segment) -> SegmentTemplate:
    parts = _PLACEHOLDERS.split(segment.text)
    return SegmentTemplate(tuple(parts[::2]), tuple(map(int, parts[1::2])), segment.supervised)


def _fill(templates: Sequence[SegmentTemplate], messages: Sequence[Message], rendered: str) -> list[Segment]:
    """Returns the segments with the messages' texts if they join to `rendered`, else an empty list."""
    for change in TEXT_CHANGES:
        contents = [change(message["content"]) for message in messages]
        texts = [template.fill(contents) for template in templates]
        if "".join(texts) == rendered:
            return [Segment(text, template.supervised) for text, template in zip(texts, templates, strict=True)]
    return []
