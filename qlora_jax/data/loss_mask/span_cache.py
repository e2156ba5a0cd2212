"""Fast path of spans.conversation_segments: reuses the spans of conversations of the same kind.

spans.py renders a conversation several times: as a whole, and each turn's prompt and the messages up to it. Here it
does so once per kind, which is the sequence of roles and the place of reasoning, for a conversation of placeholders.
A row of the kind is then rendered once, and its texts replace the placeholders.

If the template writes turns differently later, so that the row has branches, the messages up to each turn are rendered
too. That is necessary: nothing else shows how the template writes a turn that is the last one. It makes n texts for n
turns, and spans.py needs 2 n.

If a text with the row's own messages is not the rendered one, to the character, or if turns contain more than text and
reasoning, spans.py handles the row.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.formats.turn_fields import REASONING, TAGS, Tools, read_thought
from qlora_jax.data.loss_mask.spans import SegmentSearch, search_segments, search_turns
from qlora_jax.data.loss_mask.turn_branches import LearnedTurn, RowText, build_row_text
from qlora_jax.data.loss_mask.turns import TEXT_CHANGES, TurnMarks, closes_reasoning, turn_marks
from qlora_jax.data.tokenizer.chat_template import Rendering, text_of
from qlora_jax.data.tokenizer.render_batches import run_together
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Letters and digits only: a template that trims or escapes texts does not change them.
_PLACEHOLDER = "Qz8MESSAGE{}x8Zq"
_PLACEHOLDERS = re.compile(_PLACEHOLDER.replace("{}", "([0-9]+)"))
_CACHED = 4096  # kinds of conversations

Segmenter = Callable[[Sequence[Message], Tools | None], SegmentSearch]


class MessageKind(NamedTuple):
    """The kind of a message: the template treats messages of one kind alike.

    Fields:
      frame: the content's text before its reasoning and before its answer; one text if it has no reasoning.
      has_field: True if the message has a field of reasoning.
    """

    role: str
    frame: tuple[str, ...] = ("",)
    has_field: bool = False


class TextTemplate(NamedTuple):
    """The segments of a rendered conversation, with gaps for the texts of its messages.

    Fields:
      texts: the template's own texts.
      order: the pieces of the conversation, as indices of a list with `texts` and then the messages' texts.
      segments: for each segment, its pieces, and True if the loss sees it.
    """

    texts: list[str]
    order: list[int]
    segments: list[tuple[slice, bool]]


class ConversationTemplate(NamedTuple):
    """The texts that conversations of one kind need.

    Fields:
      whole: the conversation.
      turns: for each turn of the assistant, the number of messages up to it, and these as prompt, reply and rest. Empty
        if the segments of `whole` have all turns.
    """

    whole: TextTemplate
    turns: list[tuple[int, TextTemplate]]


def make_segmenter(tokenizer: Tokenizer) -> Segmenter:
    """Returns a function like `search_segments` for the tokenizer's chat template, but fast.

    Raises:
      ValueError: the same errors as `turn_marks`. The searches raise those of `conversation_segments`.
    """
    marks = turn_marks(tokenizer)
    closed = closes_reasoning(marks.prompt)  # then reasoning inside the content is not learned

    @functools.lru_cache(_CACHED)
    def template_of(kinds: tuple[MessageKind, ...]) -> ConversationTemplate | None:
        return _conversation_template(tokenizer, marks, kinds)

    def search(messages: Sequence[Message], tools: Tools | None) -> SegmentSearch:
        reasons = closed and any([read_thought(message).reasoning for message in messages])
        if tools is None and not reasons and (split := _split_all(messages)):
            kinds, texts = split
            template = template_of(kinds)
            if template is not None:
                rendered = yield _renderings(template, messages)
                if row := _fill_all(template, texts, [text_of(text) for text in rendered]):
                    return row
        return (yield from search_segments(tokenizer, marks, messages, tools))

    return search


def _split_all(messages: Sequence[Message]) -> tuple[tuple[MessageKind, ...], list[str]] | None:
    """Returns the kinds of the messages, and the texts that differ; None if a message has more than text."""
    kinds, texts = [], []
    for message in messages:
        content, field = message.get("content"), message.get(REASONING)
        if content is None:
            return None
        if len(message) == 2 and not _has_block(content):  # most messages
            kinds.append(_plain_kind(message["role"]))
            texts.append(content)
            continue
        if sum([value is not None for value in message.values()]) != 2 + bool(field):
            return None
        kind, own = _split(message, field)
        kinds.append(kind)
        texts += own
    return tuple(kinds), texts


_plain_kind = functools.cache(MessageKind)


def _has_block(content: str) -> bool:
    return any([closing in content for _, closing in TAGS])


def _split(message: Message, field: str | None) -> tuple[MessageKind, list[str]]:
    role, content = message["role"], message["content"]
    if field:
        return MessageKind(role, has_field=True), [content, field]
    thought = read_thought(message) if role == "assistant" else None
    if thought is None or not thought.head:
        return MessageKind(role), [content]
    if not thought.reasoning:
        return MessageKind(role, (thought.head,)), [thought.answer]
    block = thought.head.rstrip()
    inside = next(block.removesuffix(closing) for _, closing in TAGS if block.endswith(closing)).rstrip()
    frame = inside.removesuffix(thought.reasoning), thought.head[len(inside) :]
    return MessageKind(role, frame), [thought.reasoning, thought.answer]


def _conversation_template(
    tokenizer: Tokenizer, marks: TurnMarks, kinds: Sequence[MessageKind]
) -> ConversationTemplate | None:
    """Returns None if such conversations have no spans, or turns that the template does not write after the prompt."""
    gaps = (_PLACEHOLDER.format(n) for n in itertools.count())
    conversation = [_placeholder_message(kind, gaps) for kind in kinds]
    (found,) = run_together([search_turns(tokenizer, marks, conversation, None)], tokenizer.start_rendering)
    if isinstance(found, ValueError):  # conversation_segments reports the reason with the row
        return None
    row = build_row_text(*found)
    if not row.branches:
        return ConversationTemplate(_with_gaps(row.segments), [])
    counts = [index + 1 for index, kind in enumerate(kinds) if kind.role == "assistant"]
    try:
        texts = [tokenizer.render(conversation[:count]) for count in counts]
    except ValueError:  # a conversation that begins with the assistant's turn
        return None
    if not all(text.startswith(turn.text) for text, turn in zip(texts, found.turns, strict=True)):
        return None
    turns = [
        _with_gaps([Segment(turn.prompt, False), Segment(turn.reply, True), Segment(text[len(turn.text) :], False)])
        for text, turn in zip(texts, found.turns, strict=True)
    ]
    return ConversationTemplate(_with_gaps([Segment(found.rendered, False)]), [*zip(counts, turns, strict=True)])


def _placeholder_message(kind: MessageKind, gaps: Iterator[str]) -> Message:
    content = "".join([before + next(gaps) for before in kind.frame])
    reasoning = {REASONING: next(gaps)} if kind.has_field else {}
    return {"role": kind.role, "content": content, **reasoning}


def _with_gaps(segments: Sequence[Segment]) -> TextTemplate:
    split = [_PLACEHOLDERS.split(segment.text) for segment in segments]  # texts and numbers of messages in turn
    texts = [text for parts in split for text in parts[::2]]
    template, place = TextTemplate(texts, [], []), itertools.count()
    for parts, segment in zip(split, segments, strict=True):
        start = len(template.order)
        template.order.extend(len(texts) + int(part) if index % 2 else next(place) for index, part in enumerate(parts))
        template.segments.append((slice(start, len(template.order)), segment.supervised))
    return template


def _renderings(template: ConversationTemplate, messages: Sequence[Message]) -> list[Rendering]:
    """Returns the conversation, and the messages up to each turn of a row with branches, but for the last message."""
    earlier = [count for count, _ in template.turns if count < len(messages)]
    return [Rendering(messages), *(Rendering(messages[:count]) for count in earlier)]


def _fill_all(template: ConversationTemplate, texts: Sequence[str], rendered: Sequence[str]) -> RowText | None:
    """Returns the row if all texts with the messages' texts are equal to those of `_renderings`, else None."""
    whole = _fill(template.whole, texts, rendered[0])
    if not whole or not template.turns:
        return RowText(whole) if whole else None
    turns = []
    for (_, turn), text in zip(template.turns, [*rendered[1:], rendered[0]], strict=False):
        filled = _fill(turn, texts, text)
        if not filled:
            return None
        turns.append(LearnedTurn(filled[0].text, filled[1].text))
    return build_row_text(rendered[0], turns)


def _fill(template: TextTemplate, texts: Sequence[str], rendered: str) -> list[Segment]:
    """Returns the segments with the messages' texts if they join to `rendered`, else an empty list."""
    for change in TEXT_CHANGES:
        available = template.texts + [change(text) for text in texts]
        pieces = [available[index] for index in template.order]
        if "".join(pieces) == rendered:
            return [Segment("".join(pieces[part]), supervised) for part, supervised in template.segments]
    return []
