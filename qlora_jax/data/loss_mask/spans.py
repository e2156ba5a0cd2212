"""Finds the characters of a rendered conversation that the model has to write, exactly and for any chat template.

Few templates mark the assistant's texts, so their spans are derived. Each step is checked.

  start of turn i: the end of `messages[:i]`, rendered with a generation prompt. This is the prompt that the model
    continues at inference.
  text: the conversation is rendered once more with a placeholder for each assistant text. The characters between
    placeholders are the template's own.
  end: the first special token behind the assistant's text. A newline behind that token is not supervised, because
    generation has stopped by then.

The template writes the text of a turn that calls tools. Such a turn starts in the same way. It ends with the last
special token of the messages up to it, rendered.

A template that rewrites the assistant's texts, or ends a turn without a special token, raises an error.
"""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.tool_calls import Tools, called_functions, check_template_shows
from qlora_jax.data.readers.json_rows import shorten
from qlora_jax.data.tokenizer.chat_template import Message, Rendering, text_of
from qlora_jax.data.tokenizer.render_batches import run_together
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Letters and digits only: a template that trims or escapes texts does not change it.
_PLACEHOLDER = "Qz7PLACEHOLDER{}x9Zq"

# Changes that templates make to an assistant's text. The first that fits has to fit all turns of a conversation.
TEXT_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.rstrip,
    str.lstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
)


class Segment(NamedTuple):
    """A piece of text, and True if the loss sees it."""

    text: str
    supervised: bool


# A search for segments, which yields the conversations that it needs and is sent their texts (render_batches.py).
SegmentSearch = Generator[Sequence[Rendering], Sequence[str | ValueError], list[Segment]]


class TurnMarks(NamedTuple):
    """Texts that a template writes around an assistant's text: the generation prompt and the end of a turn."""

    prompt: str
    end: str


def turn_marks(tokenizer: Tokenizer) -> TurnMarks:
    """Returns the turn marks of the tokenizer's chat template, from a short rendered conversation.

    Raises:
      ValueError: the template is missing, or no special token follows an assistant's text.
    """
    user, answer = {"role": "user", "content": "Hi"}, _PLACEHOLDER.format(0)
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
    return TurnMarks(prompt, tail[: end.end()])


def conversation_segments(
    tokenizer: Tokenizer, marks: TurnMarks, messages: Sequence[Message], tools: Tools | None = None
) -> list[Segment]:
    """Returns segments that join to the rendered conversation. Each assistant turn with its end is supervised.

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
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spoken = [index for index in turns if not messages[index].get("tool_calls")]
    wanted = _renderings(messages, tools, turns, spoken)
    found = dict(zip(wanted, (yield [*wanted.values()]), strict=True))

    def text(kind: str, turn: int = 0) -> str:
        return text_of(found[kind, turn])

    rendered = text("whole")
    check_template_shows(messages, rendered, None if tools is None else text("without tools"))
    texts = dict(
        zip(spoken, _assistant_texts(messages, spoken, rendered, text("masked")) if spoken else [], strict=True)
    )
    segments, at = [], 0
    for turn in turns:
        prompt = text("prompt", turn) if ("prompt", turn) in wanted else None
        if turn in texts:
            begin, stop = texts[turn]
            start = _turn_start(marks, turn, prompt, rendered[:begin], at)
            end = _turn_end(marks, turn, rendered, stop)
        else:
            assert prompt is not None
            start, end = _call_turn(tokenizer, messages[turn], turn, prompt, text("through", turn), rendered, at)
        segments += [Segment(rendered[at:start], False), Segment(rendered[start:end], True)]
        at = end
    return [*segments, Segment(rendered[at:], False)]


def _renderings(
    messages: Sequence[Message], tools: Tools | None, turns: Sequence[int], spoken: Sequence[int]
) -> dict[tuple[str, int], Rendering]:
    """Returns the conversations that a search needs, by their kind and the turn that they are for.

    Args:
      turns: indices of the assistant's messages.
      spoken: those of them that do not call tools.
    """
    wanted = {("whole", 0): Rendering(messages, tools=tools)}
    if tools is not None:
        wanted["without tools", 0] = Rendering(messages)
    if spoken:
        texts = {index: _PLACEHOLDER.format(index) for index in spoken}
        masked = [{**m, "content": texts[i]} if i in texts else m for i, m in enumerate(messages)]
        wanted["masked", 0] = Rendering(masked, tools=tools)
    for turn in turns:
        calls = turn not in spoken
        # Templates may reject a conversation without a user.
        if calls or any(message["role"] == "user" for message in messages[:turn]):
            wanted["prompt", turn] = Rendering(messages[:turn], add_generation_prompt=True, tools=tools)
        if calls:
            wanted["through", turn] = Rendering(messages[: turn + 1], tools=tools)
    return wanted


def _assistant_texts(
    messages: Sequence[Message], turns: Sequence[int], rendered: str, masked: str
) -> list[tuple[int, int]]:
    """Returns [begin, end) of each assistant text in `rendered`; in `masked` they are placeholders."""
    around = _split_once_each(masked, [_PLACEHOLDER.format(index) for index in turns])
    for change in TEXT_CHANGES:
        texts = [change(messages[index]["content"]) for index in turns]
        if rendered == "".join(a + t for a, t in zip(around, [*texts, ""], strict=True)):
            return _positions(around, texts)
    raise ValueError(
        "the chat template rewrites the assistant's texts (for example, removes reasoning), so their spans are "
        "unknown. Set data.chat_template to a jinja file that writes them unchanged."
    )


def _split_once_each(text: str, separators: Sequence[str]) -> list[str]:
    """Returns the len(separators) + 1 pieces around `separators`, which have to occur once each and in this order."""
    pieces = []
    for separator in separators:
        before, found, text = text.partition(separator)
        if not found or separator in text:
            raise ValueError(
                "the chat template drops, repeats or reorders the assistant's texts. Set data.chat_template to a jinja "
                "file that writes each once, in order."
            )
        pieces.append(before)
    return [*pieces, text]


def _positions(around: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for before, text in zip(around, texts, strict=False):
        begin = at + len(before)
        at = begin + len(text)
        spans.append((begin, at))
    return spans


def _turn_start(marks: TurnMarks, turn: int, prompt: str | None, rendered: str, at: int) -> int:
    """Returns the position where the model begins to write. `rendered` ends where the assistant's text begins."""
    if prompt is not None and rendered.startswith(prompt) and len(prompt) >= at:
        return len(prompt)
    if marks.prompt and rendered[at:].endswith(marks.prompt):
        return len(rendered)
    raise _prompt_changes(turn)


def _turn_end(marks: TurnMarks, index: int, rendered: str, stop: int) -> int:
    """Returns the position where the turn ends whose text ends at `stop`."""
    if not rendered.startswith(marks.end, stop):
        found = rendered[stop : stop + len(marks.end) + 10]
        raise ValueError(
            f"the chat template ends message {index} with {found!r}, expected {marks.end!r} as in others. "
            "Set data.chat_template to a jinja file that ends all turns alike."
        )
    return stop + len(marks.end)


def _call_turn(
    tokenizer: Tokenizer, message: Message, index: int, prompt: str, whole: str, rendered: str, at: int
) -> tuple[int, int]:
    """Returns [start, end) of a turn that calls tools and ends with a special token; `whole` ends with it."""
    if not (rendered.startswith(whole) and whole.startswith(prompt) and len(prompt) >= at):
        raise _prompt_changes(index)
    ends = [match.end() for match in tokenizer.special_text.finditer(whole, len(prompt))]
    if not ends or whole[ends[-1] :].strip():
        raise ValueError(
            f"the chat template ends message {index}, which calls tools, without a special token. "
            "Set data.chat_template to a jinja file that ends turns with one."
        )
    written = whole[len(prompt) : ends[-1]]
    missing = [
        what for what in (*called_functions(message), (message.get("content") or "").strip()) if what not in written
    ]
    if missing:
        raise ValueError(
            f"the chat template drops {missing[0]!r} of message {index}, which calls tools. Set chat_template "
            "(data.chat_template in training) to a jinja file that writes calls."
        )
    return len(prompt), ends[-1]


def _prompt_changes(turn: int) -> ValueError:
    return ValueError(
        f"the chat template renders the messages before turn {turn} differently once an answer follows, so the model "
        "would learn from a prompt that it never gets. Set data.chat_template to another jinja file."
    )
