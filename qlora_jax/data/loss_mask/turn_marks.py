"""Finds the texts that a chat template writes around an assistant's text."""

from typing import NamedTuple

from qlora_jax.data.readers.json_rows import shorten
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
