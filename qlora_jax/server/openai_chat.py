"""Answers /v1/chat/completions."""

import dataclasses
from collections.abc import AsyncIterator, Sequence

from qlora_jax.data.formats.turn_fields import REASONING, call_problems, with_parsed_arguments
from qlora_jax.data.tokenizer.template_pipe import Message as TemplateMessage
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.request import Scored
from qlora_jax.inference.reply_reader import Call, Part, Text
from qlora_jax.server.chat import ChatEvent, ChatTask, PreparedChat, chat_events, prepare_chat
from qlora_jax.server.errors import bad_request
from qlora_jax.server.openai_schemas import ChatBody, Message, NamedTool, Tool
from qlora_jax.server.served_models import ServedModel
from qlora_jax.server.service import (
    Service,
    grammar_of,
    new_id,
    now,
    sampling_of,
    sampling_problems,
    stop_texts,
)

Json = dict[str, object]


def chat_task(service: Service, model: ServedModel, body: ChatBody) -> ChatTask:
    """Returns the conversation of a body; raises ApiError that lists what is wrong with it."""
    names = [tool.function.name for tool in body.tools]
    problems = [problem for index, message in enumerate(body.messages) for problem in _problems(index, message)]
    problems += sampling_problems(body, model)
    if body.top_logprobs is not None and not body.logprobs:
        problems.append("top_logprobs: requires logprobs. Set logprobs to true")
    if body.stream_options is not None and not body.stream:
        problems.append("stream_options: requires stream. Set stream to true")
    if None not in (body.max_tokens, body.max_completion_tokens):
        problems.append("max_tokens: found max_completion_tokens too, which means the same. Remove one of them")
    choice = body.tool_choice or ("auto" if names else "none")
    if choice == "required" and not names:
        problems.append("tool_choice: found 'required' without tools. Give tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        problems.append(f"tool_choice: {choice.function.name!r} is not one of tools (expected one of {names})")
    if len({*names}) < len(names):
        problems.append("tools: two functions have the same name. Rename one")
    if choice == "auto":
        problems += [
            f"tools.{index}.function.strict: kept only in calls that tool_choice requires. Remove it or set that"
            for index, tool in enumerate(body.tools)
            if tool.function.strict
        ]
    template = model.tokenizer.chat_template or ""
    if body.reasoning_effort is not None and "reasoning_effort" not in template:
        problems.append("reasoning_effort: the model's chat template does not read it. Remove it")
    if problems:
        raise bad_request(problems)
    named = [choice.function.name] if isinstance(choice, NamedTool) else names if choice == "required" else []
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    keeps_developer = "developer" in template
    return ChatTask(
        messages=[_template_message(message, keeps_developer) for message in body.messages],
        tools=[] if choice == "none" else [_template_tool(tool) for tool in body.tools],
        required=named,
        single_call=not body.parallel_tool_calls or isinstance(choice, NamedTool),
        variables={**body.chat_template_kwargs, **effort},
        sampling=sampling_of(body),
        stop_texts=stop_texts(body),
        stop_ids=frozenset(body.stop_token_ids),
        max_tokens=service.tokens(
            body.max_completion_tokens or body.max_tokens,
            "max_completion_tokens" if body.max_tokens is None else "max_tokens",
        ),
        choices=body.n,
        likeliest=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar_of(body),
    )


def _template_tool(tool: Tool) -> Json:
    """Returns a tool as templates expect it; `strict` is for the server."""
    return tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})


def _problems(index: int, message: Message) -> list[str]:
    """Returns what a message has that its role cannot have, or lacks."""
    owners = {
        "name": ("tool",),
        "tool_call_id": ("tool",),
        "tool_calls": ("assistant",),
        "reasoning_content": ("assistant",),
        "reasoning": ("assistant",),
    }
    place = f"messages.{index}"
    problems = [
        f"{place}.{field}: not implemented for the role {message.role!r}. Remove it"
        for field, roles in owners.items()
        if getattr(message, field) is not None and message.role not in roles
    ]
    if message.content is None and not message.tool_calls:
        problems.append(f"{place}.content: missing")
    if message.reasoning and message.reasoning_content and message.reasoning != message.reasoning_content:
        problems.append(f"{place}.reasoning: differs from reasoning_content. Remove one of them")
    calls = [call.model_dump() for call in message.tool_calls or ()]
    return problems + [f"{place}.tool_calls: {problem}" for problem in call_problems({"tool_calls": calls})]


def _template_message(message: Message, keeps_developer: bool) -> TemplateMessage:
    """Returns a message as templates expect it: text, parsed arguments, and reasoning under our name."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    role = "system" if message.role == "developer" and not keeps_developer else message.role
    given = {
        "role": role,
        "content": content,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [call.model_dump() for call in message.tool_calls or ()],
        REASONING: message.reasoning_content or message.reasoning,
    }
    return with_parsed_arguments({name: value for name, value in given.items() if value or name == "content"})


@dataclasses.dataclass
class _Reply:
    """One choice of a response, as far as it has arrived."""

    text: dict[str, str] = dataclasses.field(default_factory=dict)
    calls: list[Json] = dataclasses.field(default_factory=list)
    scored: list[Json] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def message(self) -> Json:
        """Returns the choice's message."""
        content = self.text.get("content")
        found: Json = {"role": "assistant", "content": content if self.calls else content or "", "refusal": None}
        found |= {REASONING: self.text["reasoning"]} if "reasoning" in self.text else {}
        return found | ({"tool_calls": self.calls} if self.calls else {})


async def complete_chat(
    service: Service, model: ServedModel, body: ChatBody, task: ChatTask, chat: PreparedChat
) -> Json:
    """Returns the response to a request that does not stream."""
    replies = [_Reply() for _ in chat.requests]
    async with service.replies(model, chat.requests) as running:
        async for event in chat_events(service.thread, running, chat, task):
            _add(replies[event.index], event, model.tokenizer)
    prompt = chat.requests[0].prompt
    choices = [
        {
            "index": index,
            "message": reply.message(),
            "logprobs": {"content": reply.scored, "refusal": None} if body.logprobs else None,
            "finish_reason": reply.finish,
            **({"token_ids": reply.ids} if body.return_token_ids else {}),
        }
        for index, reply in enumerate(replies)
    ]
    return {
        **_head("chat.completion", body.model),
        "choices": choices,
        "usage": usage(len(prompt), sum(len(reply.ids) for reply in replies)),
        **({"prompt_token_ids": [*prompt]} if body.return_token_ids else {}),
    }


async def stream_chat(
    service: Service, model: ServedModel, body: ChatBody, task: ChatTask, chat: PreparedChat
) -> AsyncIterator[Json]:
    """Yields the chunks of a streamed response."""
    head = _head("chat.completion.chunk", body.model)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    head |= {"usage": None} if wants_usage else {}
    replies = [_Reply() for _ in chat.requests]
    async with service.replies(model, chat.requests) as running:
        for index in range(len(replies)):
            first = {"prompt_token_ids": [*chat.requests[0].prompt]} if body.return_token_ids else {}
            yield {**head, **first, "choices": [_choice(index, {"role": "assistant", "content": ""})]}
        async for event in chat_events(service.thread, running, chat, task):
            reply = replies[event.index]
            known = len(reply.calls), len(reply.scored), len(reply.ids)
            _add(reply, event, model.tokenizer)
            extra: Json = {}
            if body.logprobs:
                extra["logprobs"] = {"content": reply.scored[known[1] :], "refusal": None}
            if body.return_token_ids:
                extra["token_ids"] = reply.ids[known[2] :]
            deltas = _deltas(event.parts, reply.calls, known[0])
            if not deltas and any(extra.values()) and event.step.token is not None:
                deltas = [{}]
            for number, delta in enumerate(deltas):
                yield {**head, "choices": [_choice(event.index, delta) | (extra if number == 0 else {})]}
            if event.finish is not None:
                yield {**head, "choices": [_choice(event.index, {}, event.finish)]}
    if wants_usage:
        total = usage(len(chat.requests[0].prompt), sum(len(reply.ids) for reply in replies))
        yield {**head, "choices": [], "usage": total}


def prepare(service: Service, body: ChatBody) -> tuple[ServedModel, ChatTask, PreparedChat]:
    """Returns the model and the requests of a body; takes as long as its template and its tokenizer."""
    model = service.models.writing(body.model, chat=True)
    task = chat_task(service, model, body)
    return model, task, prepare_chat(model, task)


def _add(reply: _Reply, event: ChatEvent, tokenizer: Tokenizer) -> None:
    for part in event.parts:
        if isinstance(part, Text):
            reply.text[part.kind] = reply.text.get(part.kind, "") + part.text
        else:
            reply.calls.append(_tool_call(part))
    if event.step.token is not None:
        reply.ids.append(event.step.token)
    if event.step.scored is not None:
        reply.scored.append(_token_logprob(event.step.scored, tokenizer))
    reply.finish = event.finish


def _tool_call(call: Call) -> Json:
    return {"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _deltas(parts: Sequence[Part], calls: Sequence[Json], known: int) -> list[Json]:
    """Returns parts as changes of a message; a call comes in one piece.

    Args:
      calls: of the reply, of which the first `known` were there before these parts.
    """
    numbered = iter(range(known, len(calls)))
    return [
        {"content" if part.kind == "content" else REASONING: part.text}
        if isinstance(part, Text)
        else {"tool_calls": [{"index": (index := next(numbered)), **calls[index]}]}
        for part in parts
    ]


def _choice(index: int, delta: Json, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _head(kind: str, model: str) -> Json:
    return {"id": new_id("chatcmpl-"), "object": kind, "created": now(), "model": model}


def usage(prompt: int, reply: int) -> Json:
    """Returns the numbers of tokens of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """Returns the text of one token; bytes that are a part of a character are replaced."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _token_logprob(scored: Scored, tokenizer: Tokenizer) -> Json:
    def entry(token: int, log_p: float) -> Json:
        text = tokenizer.token_bytes(token)
        return {"token": text.decode("utf-8", "replace"), "logprob": log_p, "bytes": [*text]}

    likeliest = [entry(token, log_p) for token, log_p in scored.likeliest]
    return {**entry(scored.token, scored.log_p), "top_logprobs": likeliest}
