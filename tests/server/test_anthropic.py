"""Anthropic's own client against the server: messages, streams, tools, thinking, errors."""

import json

import anthropic
import pytest

from qlora_jax.inference.engine.request import Request
from tests.server.conftest import Start

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"name": "get_weather", "description": "the weather", "input_schema": SCHEMA}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def script(request: Request) -> str:
    """Calls a tool twice after thinking, if there is temperature; else a plain reply."""
    if request.sampling.temperature == 0.5:
        return f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
    return "It rains. END never"


@pytest.fixture(scope="module")
def served(serve: Start):
    with serve(script) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_is_answered(client, served):
    found = client.messages.create(
        model="a",
        max_tokens=50,
        messages=HI,
        system="Be brief.",
        stop_sequences=["zz", " END"],
        metadata={"user_id": "x"},
        extra_body={"top_k": 5},
    )
    assert [block.text for block in found.content] == ["It rains."]
    assert (found.stop_reason, found.stop_sequence, found.role) == ("stop_sequence", " END", "assistant")
    request = served.engine.seen[-1]
    assert found.usage.input_tokens == len(request.prompt) and found.usage.output_tokens > 2
    tokenizer = served.service.models.get("a").tokenizer
    assert tokenizer.decode(request.prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert request.sampling.top_k == 5 and request.max_new_tokens == 50
    assert client.messages.create(model="a", max_tokens=2, messages=HI).stop_reason == "max_tokens"
    assert client.messages.create(model="a", max_tokens=99, messages=HI).stop_reason == "end_turn"


def test_a_stream_has_the_events_of_every_block(client):
    asked = {"model": "a", "max_tokens": 200, "messages": HI, "tools": TOOLS, "extra_body": {"temperature": 0.5}}
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    assert [block.type for block in found.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert found.content[0].thinking == "Hm." and found.content[1].text == "Let me see."
    assert found.content[2].input == {"city": "Ulm"} and found.content[2].id != found.content[3].id
    assert found.stop_reason == "tool_use"
    whole = client.messages.create(**asked)
    same = {"id": None, "content": None}
    assert {**whole.model_dump(), **same} == {**found.model_dump(exclude={"parsed_output"}), **same}
    assert [block.type for block in whole.content] == [block.type for block in found.content]


def test_one_call_at_most(client):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    found = client.messages.create(
        model="a", max_tokens=200, messages=HI, tools=TOOLS, extra_body={"temperature": 0.5}, tool_choice=choice
    )
    assert [block.type for block in found.content] == ["thinking", "text", "tool_use"]


def test_results_of_tools_go_back_to_the_model(client, served):
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Ulm"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "no net"}], "is_error": True},
        {"type": "text", "text": "Go on.", "cache_control": {"type": "ephemeral"}},
    ]
    messages = [*HI, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    client.messages.create(model="a", max_tokens=9, messages=messages, tools=TOOLS, thinking={"type": "disabled"})
    tokenizer = served.service.models.get("a").tokenizer
    prompt = tokenizer.decode(served.engine.seen[-1].prompt)
    assert f"<think>\nHm.\n</think>\n\nLet me see.{CALL}<|im_end|>" in prompt
    assert "<tool_response>\nError: no net\n</tool_response>" in prompt
    assert prompt.endswith("user\nGo on.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tool = {"type": "function", "function": {"name": "get_weather", "description": "the weather", "parameters": SCHEMA}}
    assert json.dumps(tool) in prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "I"}]}, "the last one is the assistant's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "content.0.type: found 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "x"}]}]}, "input: missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.type: found 'enabled'"),
        ({"tool_choice": {"type": "any"}}, "'any' without tools"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"extra_body": {"container": "x"}}, "container: not implemented"),
        ({"max_tokens": 301}, "max_tokens: found 301"),
    ],
)
def test_what_cannot_be_answered_is_refused(client, fields, message):
    with pytest.raises(anthropic.BadRequestError, match=message) as found:
        client.messages.create(**{"model": "a", "max_tokens": 9, "messages": HI, **fields})
    assert found.value.body["type"] == "error" and found.value.body["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(anthropic.NotFoundError, match="'zz' is not served"):
        client.messages.create(model="zz", max_tokens=9, messages=HI)
