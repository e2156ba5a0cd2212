"""Renders conversations with chat templates, in jinja with the extras of transformers that published ones rely on.

A template is a program from a stranger, so another process renders it, in jinja's sandbox (template_worker.py). The
conversations of many rows are sent to it at once.
"""

import itertools
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.config.fields import TEMPLATE_CHOICES
from qlora_jax.data.tokenizer.template_pipe import Limits, Message, Tool
from qlora_jax.data.tokenizer.template_process import ProcessEnded, TemplateProcess

MAX_TEMPLATE = 1 << 20  # characters; published ones have thousands
_process = TemplateProcess(Limits())
_refusals: dict[str, str] = {}  # a template that reached a limit -> the error, so that it does so only once


class Rendering(NamedTuple):
    """A conversation to render.

    Fields:
      messages: dicts with `role` and `content`. Keys whose value is None are dropped. A turn that calls tools may lack
        content. A template that fails without it then gets empty text.
      add_generation_prompt: True if the text ends with the prompt of an assistant's turn.
      tools: JSON schemas of the functions that the model may call.
      variables: variables of the template that this conversation sets; None: none.
    """

    messages: Sequence[Message]
    add_generation_prompt: bool = False
    tools: Sequence[Tool] | None = None
    variables: Mapping[str, object] | None = None


def start_process() -> None:
    """Starts the process that renders, if it does not run, so that it is ready when it is needed."""
    _process.start()


def render(template: str, rendering: Rendering, variables: Mapping[str, object], name: str = "") -> str:
    """Renders a conversation to the same text as transformers' `apply_chat_template(tokenize=False)`.

    Args:
      template: jinja source.
      variables: variables of the template besides the conversation's: `bos_token`, `eos_token` and others, if the
        tokenizer has them, and those of chat_template_kwargs.
      name: the template's file, for messages.

    Raises:
      ValueError: the template does not parse, rejects these messages, fails on them or reaches a limit.
    """
    return text_of(_render_alone(template, rendering, variables, name))


def text_of(found: str | ValueError) -> str:
    """Returns a text that was rendered; raises it if it is an error."""
    if isinstance(found, ValueError):
        raise found
    return found


def start_rendering(
    template: str, groups: Sequence[Sequence[Rendering]], variables: Mapping[str, object], name: str = ""
) -> Callable[[], list[list[str | ValueError]]]:
    """Sends groups of conversations to the process; returns a function that waits for their texts.

    A conversation gets its text, or the error that `render` raises for it. Messages that several conversations of a
    group share are sent once.
    """
    if len(template) > MAX_TEMPLATE:
        _refusals[template] = (
            f"{_prefix(name)}too long for a chat template (found {len(template):,} characters, expected at most "
            f"{MAX_TEMPLATE:,}). Set chat_template (data.chat_template in training) to a jinja file."
        )
    if template in _refusals:
        return lambda: [[ValueError(_refusals[template])] * len(group) for group in groups]
    calls = pickle.dumps([[tuple(one) for one in group] for group in groups])
    request = _process.submit(template, variables, calls)

    def finish() -> list[list[str | ValueError]]:
        try:
            texts = iter(_process.wait(request))
        except ProcessEnded as ended:
            if len(groups) == len(groups[0]) == 1:
                return [[_refuse(template, groups[0][0], name, ended)]]
            # One by one: one of them ended the process, or all of them are too much for its memory.
            return [[_render_alone(template, one, variables, name) for one in group] for group in groups]
        return [[_with_prefix(name, text) for text in itertools.islice(texts, len(group))] for group in groups]

    return finish


def _render_alone(template: str, rendering: Rendering, variables: Mapping[str, object], name: str) -> str | ValueError:
    ((text,),) = start_rendering(template, [[rendering]], variables, name)()
    return text


def _with_prefix(name: str, text: str | ValueError) -> str | ValueError:
    return ValueError(f"{_prefix(name)}{text}") if isinstance(text, ValueError) else text


def _refuse(template: str, rendering: Rendering, name: str, ended: ProcessEnded) -> ValueError:
    """Returns the error for a conversation at which the process ended."""
    message = (
        f"{_prefix(name)}the chat template {ended} for a conversation with roles "
        f"{[message.get('role') for message in rendering.messages]}. "
        "Set chat_template (data.chat_template in training) to another jinja file."
    )
    if ended.by_template:
        _refusals[template] = message
    return ValueError(message)


def _prefix(name: str) -> str:
    return f"{name}: " if name else ""


FOLDER = Path(__file__).parent / "chat_templates"
TOKENS: Mapping[str, tuple[str, ...]] = {  # a template's name: the tokens that it writes; zephyr writes eos
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "zephyr": (),
}


def read_template(name: str | Path, token_id: Callable[[str], int | None], eos: str | None) -> str:
    """Returns the template of a name in TOKENS, or else of a file.

    Args:
      token_id: returns the id of a token, or None if the vocabulary does not have it.
      eos: the token that ends a text, if there is one.

    Raises:
      ValueError: the file cannot be read, or the vocabulary lacks tokens of the named template.
    """
    missing = [token for token in TOKENS.get(str(name), ()) if token_id(token) is None]
    if missing:
        raise ValueError(
            f"chat_template: {name} needs tokens that this vocabulary lacks: {', '.join(missing)}. Add them to "
            "model.new_special_tokens in training, or use zephyr, which ends turns with eos."
        )
    if eos is None and name == "zephyr":
        raise ValueError("chat_template: zephyr ends turns with eos (found no eos_token). Add it to the model's files.")
    path = FOLDER / f"{name}.jinja" if str(name) in TOKENS else Path(name)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MAX_TEMPLATE + 1)  # a longer one is refused when it is used
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name}: the chat template can't be read as UTF-8 text ({error}). Name {TEMPLATE_CHOICES}."
        ) from error
