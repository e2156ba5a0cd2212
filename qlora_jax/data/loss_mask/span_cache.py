"""The spans of a conversation from those of its kind: a template is looked at once a kind, and rendered once a row.

Conversations of one kind have the same roles in the same order. One of placeholders is taken apart as spans.py does;
the others of its kind have the same pieces with their own texts in them, if that is what the template makes of them, to
the character. Where it is not, and where turns hold more than a text, spans.py does the row itself. That a prompt is
rendered alike before and behind its answer is thus checked once a kind.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.tool_calls import Tools
from qlora_jax.data.loss_mask.spans import VARIANTS, Segment, conversation_segments, turn_marks
from qlora_jax.data.tokenizer.chat_template import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Letters and digits only, as a template's trim or escape leaves alone.
_PLACE = "Qz8MESSAGE{}x8Zq"
_PLACES = re.compile(_PLACE.replace("{}", "([0-9]+)"))
_KINDS = 4096  # kept

Segments = Callable[[Sequence[Message], Tools | None], list[Segment]]


class RowChunk(NamedTuple):
    """A segment of a kind: the template's own texts, and between them the numbers of the messages that stand there."""

    texts: tuple[str, ...]
    messages: tuple[int, ...]
    supervised: bool

    def fill(self, contents: Sequence[str]) -> str:
        """The segment's text with these contents."""
        first, *others = self.texts
        return first + "".join([contents[n] + text for n, text in zip(self.messages, others, strict=True)])


def make_segmenter(tokenizer: Tokenizer) -> Segments:
    """`conversation_segments` through the tokenizer's chat template, fast where rows are many.

    Raises:
      ValueError: as `turn_marks` does; what is returned, as `conversation_segments` does.
    """
    marks = turn_marks(tokenizer)

    @functools.lru_cache(_KINDS)
    def pieces_of(roles: tuple[str, ...]) -> list[RowChunk]:
        conversation = [{"role": role, "content": _PLACE.format(n)} for n, role in enumerate(roles)]
        try:
            segments = conversation_segments(tokenizer, marks, conversation)
        except ValueError:  # the row itself has to tell why
            return []
        return [_piece(segment) for segment in segments]

    def segments_of(messages: Sequence[Message], tools: Tools | None) -> list[Segment]:
        if tools is None and all([len(message) == 2 for message in messages]):
            pieces = pieces_of(tuple([message["role"] for message in messages]))
            if pieces and (filled := _filled(pieces, messages, tokenizer.render(messages))):
                return filled
        return conversation_segments(tokenizer, marks, messages, tools)

    return segments_of


def _piece(segment: Segment) -> RowChunk:
    parts = _PLACES.split(segment.text)
    return RowChunk(tuple(parts[::2]), tuple(map(int, parts[1::2])), segment.supervised)


def _filled(pieces: Sequence[RowChunk], messages: Sequence[Message], rendered: str) -> list[Segment]:
    """The pieces with the messages' texts, if they join to `rendered`; else none."""
    for variant in VARIANTS:
        contents = [variant(message["content"]) for message in messages]
        texts = [piece.fill(contents) for piece in pieces]
        if "".join(texts) == rendered:
            return [Segment(text, piece.supervised) for text, piece in zip(texts, pieces, strict=True)]
    return []
