"""Answers Anthropic's /v1/messages."""

import json
from collections.abc import AsyncIterator, Sequence

from qlora_jax.data.formats.turn_fields import REASONING
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.inference.reply_reader import Call, Text
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.server.anthropic_schemas import AnthropicMessage, Block, MessagesBody, TextBlock
from qlora_jax.server.chat import ChatTask, FinishReason, PreparedChat, chat_events, new_seed, prepare_chat
from qlora_jax.server.errors import bad_request
from qlora_jax.server.openai_chat import Json
from qlora_jax.server.served_models import ServedModel
from qlora_jax.server.service import Service, new_id

# Type of a block -> the fields that it has, besides `type` and `cache_control`; the first ones have to be there.
_FIELDS = {
    "text": ("text",),
    "thinking": ("thinking",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
_OPTIONAL = {"text": ("citations",), "thinking": ("signature",), "tool_result": ("content", "is_error")}
_ROLES = {
    "text": ("user", "assistant"),
    "thinking": ("assistant",),
    "tool_use": ("assistant",),
    "tool_result": ("user",),
}
_SIGNATURE = ""  # reasoning is not signed
_ERROR = "Error: "  # before the result of a tool that failed, because templates have no mark for it


def prepare_messages(service: Service, body: MessagesBody) -> tuple[ServedModel, ChatTask, PreparedChat]:
    """Returns the model and the requests of a body; raises ApiError that lists what is wrong with it."""
    model = service.models.writing(body.model, chat=True)
    names = [tool.name for tool in body.tools]
    choice = body.tool_choice
    problems = [problem for index, message in enumerate(body.messages) for problem in _problems(index, message)]
    if body.messages[-1].role != "user":
        problems.append("messages: the last one is the assistant's, and continuing it is not implemented. Remove it")
    if choice is not None and (choice.type == "tool") != (choice.name is not None):
        problems.append("tool_choice.name: expected for the type 'tool', and only there")
    if choice is not None and choice.name is not None and choice.name not in names:
        problems.append(f"tool_choice: {choice.name!r} is not one of tools (expected one of {names})")
    if choice is not None and choice.type == "any" and not names:
        problems.append("tool_choice: found 'any' without tools. Give tools")
    if len({*names}) < len(names):
        problems.append("tools: two have the same name. Rename one")
    is_off = body.thinking is not None and body.thinking.type == "disabled"
    can_skip = "enable_thinking" in (model.tokenizer.chat_template or "")
    if is_off and not can_skip and model.form is not None and model.form.reasoning is not None:
        problems.append("thinking: the model's chat template cannot leave reasoning out. Remove it")
    if problems:
        raise bad_request(problems)
    kind = "auto" if choice is None else choice.type
    required = {"any": names, "tool": [choice.name] if choice and choice.name else []}.get(kind, [])
    system = body.system if isinstance(body.system, str) or body.system is None else _joined(body.system)
    task = ChatTask(
        messages=[*([{"role": "system", "content": system}] if system else []), *_template_messages(body.messages)],
        tools=[] if kind == "none" else [_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools],
        required=required,
        single_call=kind == "tool" or (choice is not None and choice.disable_parallel_tool_use),
        variables={"enable_thinking": False} if is_off and can_skip else {},
        sampling=Sampling(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, seed=new_seed()),
        stop_texts=tuple(body.stop_sequences),
        max_tokens=service.tokens(body.max_tokens, "max_tokens"),
    )
    return model, task, prepare_chat(model, task)


def _tool(name: str, description: str | None, schema: Json) -> Json:
    described = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **described, "parameters": schema}}


def _problems(index: int, message: AnthropicMessage) -> list[str]:
    """Returns the fields of blocks that their types do not have, or lack."""
    problems = []
    for number, block in enumerate([] if isinstance(message.content, str) else message.content):
        place, needed = f"messages.{index}.content.{number}", _FIELDS[block.type]
        known = (*needed, *_OPTIONAL.get(block.type, ()), "type", "cache_control")
        given = {name for name in Block.model_fields if getattr(block, name) is not None}
        problems += [f"{place}.{name}: missing" for name in needed if name not in given]
        problems += [
            f"{place}.{name}: not a field of the type {block.type!r}" for name in sorted(given.difference(known))
        ]
        if message.role not in _ROLES[block.type]:
            problems.append(f"{place}: found {block.type!r} in a message of the role {message.role!r}")
    return problems


def _joined(blocks: Sequence[TextBlock | Block]) -> str:
    return "".join(block.text or "" for block in blocks)


def _template_messages(messages: Sequence[AnthropicMessage]) -> list[Message]:
    """Returns messages in OpenAI's form: results of tools are messages, calls and reasoning are fields."""
    found: list[Message] = []
    for message in messages:
        if isinstance(message.content, str):
            found.append({"role": message.role, "content": message.content})
            continue
        blocks = message.content
        found += [_result(block) for block in blocks if block.type == "tool_result"]
        text = _joined([block for block in blocks if block.type == "text"])
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
            for block in blocks
            if block.type == "tool_use"
        ]
        thought = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
        if message.role == "assistant":
            fields = {"tool_calls": calls, REASONING: thought}
            found.append(
                {"role": "assistant", "content": text, **{name: item for name, item in fields.items() if item}}
            )
        elif text or not any(block.type == "tool_result" for block in blocks):
            found.append({"role": "user", "content": text})
    return found


def _result(block: Block) -> Message:
    content = block.content if isinstance(block.content, str) else _joined(block.content or [])
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"{_ERROR if block.is_error else ''}{content}",
    }


def _stop(finish: FinishReason | None, ids: Sequence[int], model: ServedModel, task: ChatTask) -> Json:
    """Returns the reason of the end in Anthropic's words; a stop text is looked for in the whole reply."""
    if finish == "stop" and task.stop_texts:
        text = model.tokenizer.decode(ids)
        found = [(text.index(stop), stop) for stop in task.stop_texts if stop in text]
        if found:
            return {"stop_reason": "stop_sequence", "stop_sequence": min(found)[1]}
    reasons = {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}
    return {"stop_reason": reasons.get(finish or "stop"), "stop_sequence": None}


def _block(part: Text | Call) -> Json:
    """Returns the block that a part begins."""
    if isinstance(part, Call):
        return {"type": "tool_use", "id": new_id("toolu_"), "name": part.name, "input": {}}
    return (
        {"type": "text", "text": ""}
        if part.kind == "content"
        else {"type": "thinking", "thinking": "", "signature": _SIGNATURE}
    )


async def message_events(
    service: Service, model: ServedModel, body: MessagesBody, task: ChatTask, chat: PreparedChat
) -> AsyncIterator[Json]:
    """Yields the events of a response; their key `type` is the event's name."""
    message = {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": len(chat.requests[0].prompt), "output_tokens": 0},
    }
    ids: list[int] = []
    index, kind, finish = -1, "", None
    async with service.replies(model, chat.requests) as running:
        yield {"type": "message_start", "message": message}
        async for event in chat_events(service.thread, running, chat, task):
            ids += [] if event.step.token is None else [event.step.token]
            finish = event.finish
            for part in event.parts:
                own = "call" if isinstance(part, Call) else part.kind
                if own != kind or own == "call":
                    if index >= 0:
                        yield {"type": "content_block_stop", "index": index}
                    index, kind = index + 1, own
                    yield {"type": "content_block_start", "index": index, "content_block": _block(part)}
                yield {"type": "content_block_delta", "index": index, "delta": _delta(part)}
    if index >= 0:
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": _stop(finish, ids, model, task), "usage": {"output_tokens": len(ids)}}
    yield {"type": "message_stop"}


def _delta(part: Text | Call) -> Json:
    if isinstance(part, Call):
        return {"type": "input_json_delta", "partial_json": part.arguments}
    if part.kind == "content":
        return {"type": "text_delta", "text": part.text}
    return {"type": "thinking_delta", "thinking": part.text}


async def complete_message(events: AsyncIterator[Json]) -> Json:
    """Returns the response that the events of a stream add up to."""
    message: Json = {}
    prompt: object = 0
    blocks: list[Json] = []
    async for event in events:
        match event:
            case {"type": "message_start", "message": {"usage": {"input_tokens": prompt}, **start}}:
                message = start
            case {"type": "content_block_start", "content_block": dict(block)}:
                blocks.append(block)
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": str(text)}}:
                blocks[-1]["input"] = json.loads(text)
            case {"type": "content_block_delta", "delta": {"type": str(kind), **fields}}:
                field = kind.removesuffix("_delta")
                blocks[-1][field] = f"{blocks[-1][field]}{fields[field]}"
            case {"type": "message_delta", "delta": dict(delta), "usage": dict(usage)}:
                message |= {**delta, "usage": {"input_tokens": prompt, **usage}}
    return {**message, "content": blocks}
