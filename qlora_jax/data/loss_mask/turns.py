"""Finds what the model has to write in a turn of the assistant, from the template's texts before and after it.

The prompt is the messages before the turn, rendered with a generation prompt. The reply is what the same messages with
the turn have after that prompt, up to the end of the turn. It ends with a special token. A newline after that token
is not a part of it, because generation has stopped by then.

A generation prompt may open a block of reasoning that the template does not write into the turn itself, as
DeepSeek-R1's does: it drops reasoning even from the last turn. Then the model writes the row's reasoning, closes the
block and continues with the turn. The block may also be closed already, where thinking is off: then it writes none.
"""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.turn_fields import TAGS, Thought, Tools, called_functions, read_thought, without_reasoning
from qlora_jax.data.loss_mask.turn_branches import LearnedTurn, RowText, join_text
from qlora_jax.data.readers.json_rows import shorten
from qlora_jax.data.tokenizer.chat_template import Rendering, text_of
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Letters and digits only: a template that trims or escapes texts does not change it.
PLACEHOLDER = "Qz7PLACEHOLDER{}x9Zq"


class TurnMarks(NamedTuple):
    """Texts that a template writes around an assistant's text.

    Fields:
      prompt: the generation prompt.
      end: the end of a turn, which the model writes.
      rest: the text after it at the end of a conversation.
    """

    prompt: str
    end: str
    rest: str


def turn_marks(tokenizer: Tokenizer) -> TurnMarks:
    """Returns the turn marks of the tokenizer's chat template, from a short rendered conversation.

    Raises:
      ValueError: the template is missing, or no special token follows an assistant's text.
    """
    user, answer = {"role": "user", "content": "Hi"}, PLACEHOLDER.format(0)
    asked, prompted = tokenizer.render([user]), tokenizer.render([user], add_generation_prompt=True)
    answered = tokenizer.render([user, {"role": "assistant", "content": answer}])
    _, found, tail = answered.partition(answer)
    if not found:
        raise ValueError(
            f"the chat template drops or rewrites the assistant's texts (expected {answer!r} in "
            f"{shorten(repr(answered))}). Set data.chat_template to a jinja file that writes them unchanged."
        )
    end = tokenizer.special_text.search(tail)
    if end is None or tail[: end.start()].strip():
        raise ValueError(
            f"the chat template writes {shorten(repr(tail))} after an assistant's text, expected a special token "
            "first. Without one the model cannot learn to stop. Set data.chat_template to a jinja file that ends turns "
            "with one, such as eos_token."
        )
    prompt = prompted.removeprefix(asked) if prompted.startswith(asked) else ""
    return TurnMarks(prompt, tail[: end.end()], tail[end.end() :])


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


# Changes that templates make to an assistant's text.
TEXT_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.rstrip,
    str.lstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
)
_PAIRS = "|".join(f"{re.escape(opening)}(?:\\s*{re.escape(closing)})?" for opening, closing in TAGS)
# A block of reasoning at the end of a generation prompt, which may be empty and closed.
_BLOCK = re.compile(rf"(?:{_PAIRS})\s*\Z")


def learned_turn(
    tokenizer: Tokenizer, marks: TurnMarks, index: int, message: Message, prompt: str, whole: str
) -> LearnedTurn:
    """Returns the turn `message`, which is at `index` of its conversation.

    Args:
      prompt: the messages before it, rendered with a generation prompt.
      whole: the messages up to it, rendered.

    Raises:
      ValueError: the prompt changes once the turn follows it, or the turn lacks its texts or its end.
    """
    start, lead = _behind_prompt(index, message, prompt, whole)
    written = whole[start:]
    end = _call_end if message.get("tool_calls") else _text_end
    reply = written[: end(tokenizer, marks, index, message, written)]
    return LearnedTurn(prompt, _joined(lead, reply))


def text_behind(index: int, message: Message, prompt: str, whole: str) -> str:
    """Returns what the model has to write after the prompt, through the end of `whole`.

    Args:
      index, message: the turn that follows the prompt.
      whole: rendered messages that begin with those of the prompt.

    Raises:
      ValueError: the prompt changes once the turn follows it.
    """
    start, lead = _behind_prompt(index, message, prompt, whole)
    return _joined(lead, whole[start:])


def closes_reasoning(prompt: str) -> bool:
    """Returns True if a prompt ends with a closed block of reasoning, so that the model writes none."""
    block = _BLOCK.search(prompt)
    return block is not None and any(closing in block.group() for _, closing in TAGS)


def opened_reasoning(prompt: str) -> tuple[str, str] | None:
    """Returns the tags of the block of reasoning that a prompt opens and leaves open; None if there is none."""
    block = _BLOCK.search(prompt)
    if block is None or closes_reasoning(prompt):
        return None
    return next(pair for pair in TAGS if block.group().startswith(pair[0]))


def _without_other_reasoning(earlier: Sequence[Message], turns: Sequence[Message], prompt: str) -> list[Message]:
    """Returns messages that end with turns of the same text, if they are not to depend on reasoning in their prompt.

    gpt-oss's template removes reasoning of earlier messages once an answer follows, so the prompt of that answer is not
    at the beginning of the whole text. Turns lose their own reasoning if the prompt closes the block of reasoning.
    """
    turns = [*map(without_reasoning, turns)] if closes_reasoning(prompt) else [*turns]
    return [*map(without_reasoning, earlier), *turns]


class TurnTexts(NamedTuple):
    """Rendered texts to find the assistant's turns in.

    Fields:
      before: the messages before the turns, with a generation prompt.
      whole: these messages and the turns.
      turns: the turns as they are in `whole`.
    """

    before: str
    whole: str
    turns: list[Message]


def search_turn_texts(
    earlier: Sequence[Message], turns: Sequence[Message], before: str, whole: str, tools: Tools | None
) -> Generator[Sequence[Rendering], Sequence[str | ValueError], TurnTexts]:
    """Returns texts with the same turns; if possible, the whole begins with the other.

    If it does not, it yields the conversation to render without the reasoning of earlier messages, and then without the
    text of their calls, which gpt-oss's template writes as reasoning.

    Args:
      before, whole: the rendered messages as they are.
    """
    other = _without_other_reasoning(earlier, turns, before)
    if other != [*earlier, *turns] and (not whole.startswith(before) or closes_reasoning(before)):
        before, whole = map(text_of, (yield _to_render(other, len(earlier), tools)))
    bare = [*map(_without_call_text, other[: len(earlier)]), *other[len(earlier) :]]
    if bare != other and not whole.startswith(before):
        before, whole = map(text_of, (yield _to_render(bare, len(earlier), tools)))
    return TurnTexts(before, whole, other[len(earlier) :])


def _to_render(messages: Sequence[Message], earlier: int, tools: Tools | None) -> list[Rendering]:
    return [Rendering(messages[:earlier], True, tools), Rendering(messages, tools=tools)]


def _without_call_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    return {name: value for name, value in message.items() if name != "content"}


def check_history(messages: Sequence[Message], rendered: str) -> None:
    """Raises ValueError if the whole conversation lacks an answer of the assistant, or has them in another order."""
    at = 0
    for message in messages:
        if message["role"] != "assistant" or message.get("tool_calls"):
            continue
        ends = [place + len(text) for text in _forms(message) if (place := rendered.find(text, at)) >= 0]
        if not ends:
            raise ValueError(
                "the chat template drops, repeats or reorders the assistant's texts. Set data.chat_template to a jinja "
                "file that writes each once, in order."
            )
        at = min(ends)


def prompt_changes(turn: int) -> ValueError:
    """Returns the error for a prompt that the conversation does not continue."""
    return ValueError(
        f"the chat template renders the messages before turn {turn} differently once an answer follows, so the model "
        "would learn from a prompt that it never gets. Set data.chat_template to another jinja file."
    )


def text_rewritten() -> ValueError:
    """Returns the error for a turn whose text the template changes."""
    return ValueError(
        "the chat template rewrites the assistant's texts, so their spans are unknown. Set data.chat_template to a "
        "jinja file that writes them unchanged."
    )


def other_end(marks: TurnMarks, index: int, found: str) -> ValueError:
    """Returns the error for a turn whose text is followed by `found`, not by the mark of its end."""
    return ValueError(
        f"the chat template ends message {index} with {found[: len(marks.end) + 10]!r}, expected {marks.end!r} as in "
        "others. Set data.chat_template to a jinja file that ends all turns alike."
    )


def _forms(message: Message) -> Iterator[str]:
    """Yields the forms that templates give the text of a turn: with its reasoning, and without."""
    content: str = message.get("content") or ""
    answer = read_thought(message).answer
    for text in (content, answer) if answer != content else (content,):
        yield from (change(text) for change in TEXT_CHANGES)


def _behind_prompt(index: int, message: Message, prompt: str, whole: str) -> tuple[int, str]:
    """Returns the index after the prompt in `whole`, and what the model writes before the text there."""
    if whole.startswith(prompt):
        return len(prompt), ""
    return _behind_block(index, read_thought(message), prompt, whole)


def _behind_block(index: int, thought: Thought, prompt: str, whole: str) -> tuple[int, str]:
    """Returns the index after the prompt in `whole`, which lacks the prompt's block, and the text that ends the block.

    An empty text stands for a block that the prompt closes.
    """
    block = _BLOCK.search(prompt)
    if block is None or not whole.startswith(prompt[: block.start()]):
        raise prompt_changes(index)
    opening, closing = next(pair for pair in TAGS if block.group().startswith(pair[0]))
    if closing in block.group():
        return block.start(), ""
    if thought.head:  # the content's head, without the part that the prompt has
        written = thought.head.lstrip()
        return block.start(), written.removeprefix(block.group()) if opening in written else written
    gap = "\n" if block.group().endswith("\n") else ""
    return block.start(), f"{thought.reasoning}{gap}{closing}{2 * gap}"


def _joined(lead: str, reply: str) -> str:
    """Returns the end of a block and what follows it; the template may have written the space between them."""
    return (lead.rstrip() if reply[:1].isspace() else lead) + reply


def _text_end(tokenizer: Tokenizer, marks: TurnMarks, index: int, message: Message, written: str) -> int:
    """Returns where a turn ends that is text."""
    forms = [*_forms(message)]
    tail = marks.end + marks.rest
    if any([written.endswith(text + tail) for text in forms]):
        return len(written) - len(marks.rest)
    text = next((text for text in forms if text and text in written), None)
    if text is None:
        raise text_rewritten()
    raise other_end(marks, index, written[written.rindex(text) + len(text) :])


def _call_end(tokenizer: Tokenizer, marks: TurnMarks, index: int, message: Message, written: str) -> int:
    """Returns where a turn ends that calls tools: after its last special token."""
    ends = [match.end() for match in tokenizer.special_text.finditer(written)]
    if not ends or written[ends[-1] :].strip():
        raise ValueError(
            f"the chat template ends message {index}, which calls tools, without a special token. "
            "Set data.chat_template to a jinja file that ends turns with one."
        )
    answer = read_thought(message).answer.strip()
    if missing := [what for what in (*called_functions(message), answer) if what not in written]:
        raise ValueError(
            f"the chat template drops {missing[0]!r} of message {index}, which calls tools. Set chat_template "
            "(data.chat_template in training) to a jinja file that writes calls."
        )
    return ends[-1]
