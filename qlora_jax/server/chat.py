"""Answers conversations, for the routes of OpenAI and of Anthropic alike."""

import dataclasses
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, NamedTuple

from qlora_jax.config.fields import TemplateValue
from qlora_jax.data.formats.turn_fields import called_functions, check_template_shows, with_row_kwargs
from qlora_jax.data.loss_mask.turns import opened_reasoning
from qlora_jax.data.tokenizer.chat_template import Rendering, text_of
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.grammar import Grammar
from qlora_jax.inference.engine.request import Request, Step
from qlora_jax.inference.reply_reader import Call, Part, ReplyReader
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.server.engine_thread import EngineThread, Replies
from qlora_jax.server.errors import ApiError, bad_request, too_long
from qlora_jax.server.reply_grammar import call_grammar
from qlora_jax.server.served_models import ServedModel
from qlora_jax.untrusted_json import JsonObject

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTask:
    """A conversation to continue.

    Attributes:
      messages: in OpenAI's form, with text as content.
      tools: functions that the model may call, in OpenAI's form.
      required: names of functions of which it has to call one; empty: it need not.
      single_call: end the reply after its first call.
      variables: variables of the chat template.
      max_tokens: limit of the reply's tokens.
      choices: number of replies.
      likeliest: as in Request.
      grammar: restricts the reply's text; None: any text.
    """

    messages: Sequence[Message]
    tools: Sequence[JsonObject] = ()
    required: Sequence[str] = ()
    single_call: bool = False
    variables: Mapping[str, TemplateValue] = dataclasses.field(default_factory=dict)
    sampling: Sampling
    stop_texts: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    max_tokens: int
    choices: int = 1
    likeliest: int | None = None
    grammar: Grammar | None = None


class PreparedChat(NamedTuple):
    """A conversation as requests to the engine, and a reader for each reply."""

    requests: list[Request]
    readers: list[ReplyReader]


class ChatEvent(NamedTuple):
    """A step of one reply.

    Fields:
      index: number of the reply.
      parts: additions to the reply.
      finish: why the reply ends here; None if it continues.
    """

    index: int
    parts: list[Part]
    step: Step
    finish: FinishReason | None


def new_seed() -> int:
    """Returns the seed of a request that has none."""
    return secrets.randbits(32)


def prepare_chat(model: ServedModel, task: ChatTask) -> PreparedChat:
    """Renders and encodes a conversation.

    Raises:
      ApiError: the template rejects it, drops a part of it, or it does not fit into the model's positions.
    """
    assert model.form is not None, "ServedModels.writing refuses other models"
    if task.tools and model.form.calls is None:
        raise bad_request(["tools: the model's chat template does not write calls in a known way. Remove tools"])
    try:
        tokenizer = with_row_kwargs(model.tokenizer, task.variables)
    except ValueError as error:
        raise bad_request([str(error)]) from None
    try:
        prompt = _render(tokenizer, task)
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        raise bad_request([f"messages: {error}"]) from None
    if len(ids) >= model.positions:
        raise too_long(len(ids), model.positions)
    request = Request(
        prompt=ids,
        max_new_tokens=min(task.max_tokens, model.positions - len(ids)),
        sampling=task.sampling,
        stop_ids=model.turn_end_ids | task.stop_ids | _call_ends(model, task),
        stop_texts=task.stop_texts,
        adapter=model.adapter,
        likeliest=task.likeliest,
        grammar=_grammar(model, task, prompt),
    )
    requests = [dataclasses.replace(request, repeat=number) for number in range(task.choices)]
    return PreparedChat(requests, [ReplyReader(model.form, prompt, task.tools) for _ in requests])


async def chat_events(
    thread: EngineThread, replies: Replies, chat: PreparedChat, task: ChatTask
) -> AsyncIterator[ChatEvent]:
    """Yields the steps of all replies as they come."""
    called: set[int] = set()
    async for index, step in replies:
        parts = chat.readers[index].feed(step.text, last=step.end is not None)
        finish: FinishReason | None = None if step.end is None else "stop" if step.end == "stop" else "length"
        calls = [part for part in parts if isinstance(part, Call)]
        if calls:
            called.add(index)
            if task.single_call and finish is None:
                parts, finish = parts[: parts.index(calls[0]) + 1], "stop"
                thread.end(replies, index)
        if finish == "stop" and index in called:
            finish = "tool_calls"
        yield ChatEvent(index, parts, step, finish)


def _render(tokenizer: Tokenizer, task: ChatTask) -> str:
    group = [Rendering(task.messages, True, [*task.tools] or None)]
    if task.tools:
        group.append(Rendering(task.messages, True))
    prompt, *without = map(text_of, tokenizer.start_rendering([group])()[0])
    if without == [prompt]:
        raise bad_request(["tools: the model's chat template does not write them. Remove tools"])
    check_template_shows(task.messages, prompt, None)
    dropped = [name for message in task.messages for name in called_functions(message) if name not in prompt]
    if dropped:
        raise bad_request([f"messages: the model's chat template drops the call of {dropped[0]!r}. Remove it"])
    return prompt


def _call_ends(model: ServedModel, task: ChatTask) -> frozenset[int]:
    calls = model.form.calls if model.form else None
    return frozenset() if not task.tools or calls is None or calls.end_id is None else frozenset([calls.end_id])


def _grammar(model: ServedModel, task: ChatTask, prompt: str) -> Grammar | None:
    calls = model.form.calls if model.form else None
    grammar = task.grammar
    if grammar is not None and task.tools:
        raise bad_request(
            ["response_format: found tools too, whose calls it does not allow. Remove it, or set tool_choice to none"]
        )
    if task.required and calls is not None:
        grammar = call_grammar(calls, task.tools, task.required, single=task.single_call, tokenizer=model.tokenizer)
    if grammar is not None and opened_reasoning(prompt):
        raise ApiError(
            400,
            "the model's chat template opens a block of reasoning, which a restricted reply cannot have. Send "
            'chat_template_kwargs {"enable_thinking": false}, or remove the restriction',
        )
    return grammar
