"""Which characters of a rendered conversation the model has to write: exact spans, for any chat template.

Templates seldom mark what the assistant says, so spans are derived, each step checked:

  start of turn i: the end of the text that `messages[:i]` renders to with a generation prompt, which is what the model
    is given when it has to answer;
  its text: the conversation is rendered once more with every assistant text replaced by a placeholder; what lies
    between placeholders is the template's own;
  end: what the template always puts after an assistant's text, up to its first special token. A newline behind that
    token is not supervised: generation has stopped by then.

A turn that calls tools is written by the template: it begins likewise, and ends with the last special token of the text
that the messages up to it render to.

A template that rewrites what the assistant says, or that ends a turn without a special token, is refused.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.tool_calls import Tools, called_functions, check_template_shows
from qlora_jax.data.tokenizer.chat_template import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

Render = Callable[..., str]  # the tokenizer's, with the tools of a row

# Letters and digits only, so that a template's trim or escape leaves it alone.
_PLACEHOLDER = "Qz7PLACEHOLDER{}x9Zq"

# What templates do to an assistant's text; one holds for all turns of a conversation, the first that fits.
VARIANTS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.rstrip,
    str.lstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
)


class Segment(NamedTuple):
    """A piece of text, and whether the loss sees it."""

    text: str
    supervised: bool


class TurnMarks(NamedTuple):
    """What a template puts before and after an assistant's text: the generation prompt, and the end of a turn."""

    prompt: str
    end: str


def turn_marks(tokenizer: Tokenizer) -> TurnMarks:
    """The marks of the tokenizer's chat template, found by rendering a short conversation.

    Raises:
      ValueError: no template, or no special token follows an assistant's text: a model could not learn to stop.
    """
    user, answer = {"role": "user", "content": "Hi"}, _PLACEHOLDER.format(0)
    asked, prompted = tokenizer.render([user]), tokenizer.render([user], add_generation_prompt=True)
    answered = tokenizer.render([user, {"role": "assistant", "content": answer}])
    _, found, tail = answered.partition(answer)
    if not found:
        raise ValueError(f"the chat template drops or rewrites what the assistant says: {answer!r} in {answered!r}")
    end = tokenizer.special_text.search(tail)
    if end is None or tail[: end.start()].strip():
        raise ValueError(
            f"the chat template puts {tail!r} after an assistant's text, and no special token comes first there, so "
            "the model could not learn to stop. Use a template that ends a turn with one, such as eos_token: "
            "data.chat_template names a jinja file."
        )
    prompt = prompted.removeprefix(asked) if prompted.startswith(asked) else ""
    return TurnMarks(prompt, tail[: end.end()])


def conversation_segments(
    tokenizer: Tokenizer, marks: TurnMarks, messages: Sequence[Message], tools: Tools | None = None
) -> list[Segment]:
    """Segments whose texts join to the rendered conversation; each assistant turn, its end included, is supervised.

    Raises:
      ValueError: the template refuses the conversation or leaves out some of it, or its spans can't be told exactly.
    """
    render = functools.partial(tokenizer.render, tools=tools)
    rendered = render(messages)
    check_template_shows(tokenizer, messages, tools, rendered)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    said = [index for index in turns if not messages[index].get("tool_calls")]
    texts = dict(zip(said, _assistant_texts(render, messages, said, rendered), strict=True)) if said else {}
    segments, at = [], 0
    for index in turns:
        if index in texts:
            begin, stop = texts[index]
            start = _turn_start(render, marks, messages[:index], rendered[:begin], at)
            end = _turn_end(marks, index, rendered, stop)
        else:
            start, end = _call_turn(tokenizer, render, messages[: index + 1], rendered, at)
        segments += [Segment(rendered[at:start], False), Segment(rendered[start:end], True)]
        at = end
    return [*segments, Segment(rendered[at:], False)]


def _assistant_texts(
    render: Render, messages: Sequence[Message], turns: Sequence[int], rendered: str
) -> list[tuple[int, int]]:
    """[begin, end) of each assistant text in `rendered`."""
    places = {index: _PLACEHOLDER.format(index) for index in turns}
    masked = [{**m, "content": places[i]} if i in places else m for i, m in enumerate(messages)]
    around = _split_once_each(render(masked), list(places.values()))
    for variant in VARIANTS:
        texts = [variant(messages[index]["content"]) for index in turns]
        if rendered == "".join(a + t for a, t in zip(around, [*texts, ""], strict=True)):
            return _positions(around, texts)
    raise ValueError(
        "the chat template rewrites what the assistant says (it may take out reasoning, say), so the exact span "
        "of its text is unknown. Use a template that keeps it as it is: data.chat_template names a jinja file."
    )


def _split_once_each(text: str, separators: Sequence[str]) -> list[str]:
    """The len(separators) + 1 pieces around `separators`, each of which is there once and in this order."""
    pieces = []
    for separator in separators:
        before, found, text = text.partition(separator)
        if not found or separator in text:
            raise ValueError("the chat template drops, repeats or reorders what the assistant says")
        pieces.append(before)
    return [*pieces, text]


def _positions(around: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for before, text in zip(around, texts, strict=False):
        begin = at + len(before)
        at = begin + len(text)
        spans.append((begin, at))
    return spans


def _turn_start(render: Render, marks: TurnMarks, before: Sequence[Message], rendered: str, at: int) -> int:
    """Where the model begins to write; `rendered` ends where the assistant's own text begins."""
    # Templates may refuse a conversation in which nobody has asked anything.
    if any(message["role"] == "user" for message in before):
        prompt = render(before, add_generation_prompt=True)
        if rendered.startswith(prompt) and len(prompt) >= at:
            return len(prompt)
    if marks.prompt and rendered[at:].endswith(marks.prompt):
        return len(rendered)
    raise _told_otherwise(len(before))


def _turn_end(marks: TurnMarks, index: int, rendered: str, stop: int) -> int:
    """Where the turn is over whose text ends at `stop`."""
    if not rendered.startswith(marks.end, stop):
        found = rendered[stop : stop + len(marks.end) + 10]
        raise ValueError(f"the chat template ends message {index} with {found!r}, and others with {marks.end!r}")
    return stop + len(marks.end)


def _call_turn(
    tokenizer: Tokenizer, render: Render, through: Sequence[Message], rendered: str, at: int
) -> tuple[int, int]:
    """[start, end) of the last turn of `through`, which calls tools: the template writes it, up to a special token."""
    index, message = len(through) - 1, through[-1]
    prompt, whole = render(through[:-1], add_generation_prompt=True), render(through)
    if not (rendered.startswith(whole) and whole.startswith(prompt) and len(prompt) >= at):
        raise _told_otherwise(index)
    ends = [match.end() for match in tokenizer.special_text.finditer(whole, len(prompt))]
    if not ends or whole[ends[-1] :].strip():
        raise ValueError(f"the chat template ends message {index}, which calls tools, with no special token")
    written = whole[len(prompt) : ends[-1]]
    missing = [
        what for what in (*called_functions(message), (message.get("content") or "").strip()) if what not in written
    ]
    if missing:
        raise ValueError(
            f"the chat template leaves out {missing[0]!r} of message {index}, which calls tools. Use a template that "
            "shows calls: chat_template (data.chat_template in training) names a jinja file"
        )
    return len(prompt), ends[-1]


def _told_otherwise(turn: int) -> ValueError:
    return ValueError(
        f"the chat template renders the messages before turn {turn} in another way once an answer follows, so "
        "the model would be trained on a prompt that it never gets. Use another template: data.chat_template names a "
        "jinja file."
    )
