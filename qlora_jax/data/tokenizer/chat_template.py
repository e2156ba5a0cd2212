"""Renders conversations with chat templates, in jinja with the extras of transformers that published ones rely on.

A template is a program from a stranger, so another process renders it, in jinja's sandbox (template_worker.py). The
conversations of many rows are sent to it at once.
"""

import itertools
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.data.tokenizer.template_process import ProcessEnded, TemplateProcess
from qlora_jax.data.tokenizer.template_protocol import Limits

Message = Mapping[str, Any]  # a JSON object: `content` is text, but `tool_calls` is a list, and templates read more

MAX_TEMPLATE = 1 << 20  # characters; published ones have thousands
_BATCH = 128  # conversations that are sent at once
_process = TemplateProcess(Limits())
_refusals: dict[str, str] = {}  # a template that reached a limit -> the error, so that it does so only once


class Rendering(NamedTuple):
    """A conversation to render.

    Fields:
      messages: dicts with `role` and `content`. Keys whose value is None are dropped. A turn that calls tools may lack
        content. A template that fails without it then gets empty text.
      add_generation_prompt: True if the text ends with the prompt of an assistant's turn.
      tools: JSON schemas of the functions that the model may call.
    """

    messages: Sequence[Message]
    add_generation_prompt: bool = False
    tools: Sequence[Mapping[str, object]] | None = None


def render(template: str, rendering: Rendering, special_tokens: Mapping[str, str], name: str = "") -> str:
    """Renders a conversation to the same text as transformers' `apply_chat_template(tokenize=False)`.

    Args:
      template: jinja source.
      special_tokens: `bos_token`, `eos_token` and others, by name, if the tokenizer has them.
      name: the template's file, for messages.

    Raises:
      ValueError: the template does not parse, rejects these messages, fails on them or reaches a limit.
    """
    (text,) = render_all(template, [rendering], special_tokens, name)
    if isinstance(text, ValueError):
        raise text
    return text


def render_all(
    template: str, renderings: Sequence[Rendering], special_tokens: Mapping[str, str], name: str = ""
) -> list[str | ValueError]:
    """Returns the text of each conversation, or the error that `render` raises for it."""
    if len(template) > MAX_TEMPLATE:
        _refusals[template] = (
            f"{_prefix(name)}too long for a chat template (found {len(template):,} characters, expected at most "
            f"{MAX_TEMPLATE:,}). Set chat_template (data.chat_template in training) to a jinja file."
        )
    batches = itertools.batched(renderings, _BATCH)
    return [text for batch in batches for text in _render_batch(template, batch, special_tokens, name)]


def _render_batch(
    template: str, renderings: Sequence[Rendering], special_tokens: Mapping[str, str], name: str
) -> list[str | ValueError]:
    if template in _refusals:
        return [ValueError(_refusals[template])] * len(renderings)
    try:
        texts = _process.render(template, special_tokens, pickle.dumps([tuple(one) for one in renderings]))
        return [ValueError(f"{_prefix(name)}{text}") if isinstance(text, ValueError) else text for text in texts]
    except ProcessEnded as ended:
        if len(renderings) == 1:
            return [_refuse(template, renderings[0], name, ended)]
    # One by one: one of them ended the process, or all of them are too much for its memory.
    return [text for one in renderings for text in _render_batch(template, [one], special_tokens, name)]


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
