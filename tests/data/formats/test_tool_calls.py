"""Conversations with tools: calls are learned as the template writes them, and dropped texts raise an error."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.inference.prompts import prompter

# As Hermes and Qwen write them: tools in the system turn, calls in tags, answers of tools in a user's turn.
HERMES = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{% endfor %}{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set f = call.function or call %}
            {{- '<tool_call>\n{"name": "' + f.name + '", "arguments": ' + f.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def called(arguments: Any) -> dict[str, Any]:
    return {"function": {"name": "weather", "arguments": arguments}}


def conversation(arguments: Any, **turn: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Rain in Ulm?"},
        {"role": "assistant", "tool_calls": [called(arguments)], **turn},
        {"role": "tool", "content": 'dry "as" a bone', "name": "weather"},
        {"role": "assistant", "content": "No."},
    ]


@pytest.fixture(scope="module")
def hermes(smollm2_source: dict) -> Tokenizer:
    return load_tokenizer({**smollm2_source, "chat_template": HERMES})


def learned(tokenizer: Tokenizer, path: str, **settings: Any) -> str:
    data = load_dataset(DataArgs(train=path, **settings), tokenizer, seed=0, micro_batch_size=1, accumulation=1)
    ids, supervised = data.train.row(0)
    return tokenizer.decode(ids[supervised].tolist())


@pytest.mark.parametrize("arguments", [{"city": "Ulm"}, '{"city": "Ulm"}'])
@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])])
def test_calls_and_answers_are_learned(hermes: Tokenizer, write_rows: Callable, arguments: Any, tools: Any):
    path = write_rows([{"messages": conversation(arguments, content="Let me see. "), "tools": tools}])
    call = 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>'
    assert learned(hermes, path) == call + "No.<|im_end|>"
    assert learned(hermes, path, learn="last") == "No.<|im_end|>"
    whole = learned(hermes, path, learn="all")
    assert whole == hermes.render(conversation({"city": "Ulm"}, content="Let me see. "), tools=[WEATHER])
    assert json.dumps(WEATHER) in whole and 'dry "as" a bone' in whole


@pytest.mark.parametrize("turn", [{}, {"content": None}, {"content": ""}])
def test_templates_that_join_content_get_it_empty(smollm2_source: dict, write_rows: Callable, turn: dict):
    joining = HERMES.replace("(message.content or '')", "message.content")
    assert joining != HERMES
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": joining})
    path = write_rows([{"messages": conversation({}, **turn)[:2], "tools": [WEATHER]}])
    assert learned(tokenizer, path) == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("test", ["is defined", "is string"])
def test_templates_that_ask_for_content_are_told_when_there_is_none(
    smollm2_source: dict, write_rows: Callable, test: str
):
    asking = HERMES.replace("(message.content or '')", f"('.' + message.content if message.content {test} else '')")
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": asking})
    path = write_rows([{"messages": conversation({}, content=None)[:2], "tools": [WEATHER]}])
    assert learned(tokenizer, path) == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'


def test_a_call_needs_no_words(hermes: Tokenizer, write_rows: Callable):
    for turn in ({}, {"content": None}, {"content": ""}):
        path = write_rows([{"messages": conversation({}, **turn)[:2], "tools": [WEATHER]}])
        assert learned(hermes, path) == ('<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>')


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"messages": conversation({}, content="Hm."), "tools": [WEATHER]},
            "the chat template does not write the row's tools",
        ),
        ({"messages": conversation({}, content="Hm.")}, "drops 'weather' of message 1, which calls tools"),
        ({"messages": conversation({}, content=None)}, "drops 'weather' of message 1, which calls tools"),
    ],
)
def test_templates_without_tools_are_refused(tokenizer: Tokenizer, write_rows: Callable, row: dict, told: str):
    with pytest.raises(ValueError, match=rf"1 of 1 rows(.|\n)*{told}"):
        learned(tokenizer, write_rows([row]))


def test_turns_that_a_template_leaves_out_are_refused(smollm2_source: dict, write_rows: Callable):
    template = "{% for m in messages if m.role != 'system' %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    silent = load_tokenizer({**smollm2_source, "chat_template": template})
    turns = [{"role": role, "content": f"the {role}"} for role in ("system", "user", "assistant")]
    with pytest.raises(ValueError, match=r"2 of 3 rows") as error:
        learned(silent, write_rows([{"messages": turns}, {"messages": turns[1:]}, {"messages": turns[1:] + turns}]))
    _, told, fix = str(error.value).splitlines()  # once, wherever the message stands
    assert fix == "Correct the rows, or set data.bad_rows=drop."
    assert "jsonl:1, 3: the chat template drops the text of a message of the role 'system'. " in told
    assert told.endswith("or set chat_template (data.chat_template in training) to a jinja file that writes them.")
    assert learned(silent, write_rows([{"messages": turns[1:]}])) == "assistantthe assistant<|im_end|>"


@pytest.mark.parametrize("role", ["developer", "function", "ipython", "observation"])
def test_turns_by_other_names_that_a_template_leaves_out_are_refused(
    smollm2_source: dict, write_rows: Callable, role: str
):
    template = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    silent = load_tokenizer({**smollm2_source, "chat_template": template})
    turns = [{"role": one, "content": f"the {one}"} for one in (role, "user", "assistant")]
    with pytest.raises(ValueError, match=f"drops the text of a message of the role '{role}'"):
        learned(silent, write_rows([{"messages": turns}]))


def test_what_a_tool_says_may_be_written_as_json(smollm2_source: dict, write_rows: Callable):
    quoting = HERMES.replace("message.content + '\n</tool", "message.content | tojson + '\n</tool")
    assert quoting != HERMES
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": quoting})
    turns = conversation({}, content="Hm.")
    turns[2]["content"] = 'Überall "trocken"\n👍'
    path = write_rows([{"messages": turns, "tools": [WEATHER]}])
    assert '"Überall \\"trocken\\"\\n👍"' in learned(tokenizer, path, learn="all")


def test_calls_that_end_otherwise_are_refused(smollm2_source: dict, write_rows: Callable):
    open_ended = HERMES.replace(
        "{{- '<|im_end|>\n' }}\n    {%- endif %}", "{{- '.' if message.tool_calls else '<|im_end|>\n' }}{%- endif %}"
    )
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": open_ended})
    with pytest.raises(ValueError, match="ends message 1, which calls tools, without a special token"):
        learned(tokenizer, write_rows([{"messages": conversation({}), "tools": [WEATHER]}]))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tools": "[{"}, "tools is not JSON: Expecting"),
        ({"tools": '["\x01"]'}, "tools is not JSON: Invalid control character at column 3"),
        ({"tools": "[" * 100_000}, "tools is not JSON: nested more than 200 levels deep"),
        ({"tools": "[" * 300 + "]" * 300}, "tools is not JSON: nested more than 200 levels deep"),
        ({"tools": "9" * 5000}, "tools is not JSON: Exceeds the limit"),
        ({"tools": {"a": 1}}, "tools is not a list of JSON schemas"),
        ({"messages": conversation("{city}")}, "message 1: the arguments of tool call 0 are not JSON"),
        ({"messages": conversation("[1]")}, "message 1: the arguments of tool call 0 are not an object"),
        ({"messages": conversation({}, tool_calls=[{"name": "f"}])}, "tool call 0 needs a function with 'name'"),
        ({"messages": conversation({}, tool_calls="f()")}, "message 1: tool_calls is not a list of objects"),
        ({"messages": conversation({}, tool_calls=[])}, "message 1 needs 'role' and 'content'"),
    ],
)
def test_what_is_wrong_is_told(row: dict, told: str):
    assert told in "; ".join(FORMATS["messages"].check({"messages": conversation({}), **row}))


def test_prompts_have_the_tools_too(hermes: Tokenizer):
    row = {"messages": conversation({"city": "Ulm"})[:3], "tools": [WEATHER]}
    ids = prompter(hermes, raw=False, system=None).row(row)
    assert hermes.decode(ids) == hermes.render(row["messages"], add_generation_prompt=True, tools=[WEATHER])
