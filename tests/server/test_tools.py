"""Calls of tools and reasoning: derived from templates, read from replies, and through OpenAI's client."""

import dataclasses
import json

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_new_tokens
from qlora_jax.inference.engine.grammar import Grammar, GrammarCompiler
from qlora_jax.inference.engine.request import Request
from qlora_jax.inference.reply_format import ReplyFormat, reply_format
from qlora_jax.inference.reply_reader import Call, Part, ReplyReader, Text
from qlora_jax.server.errors import ApiError
from qlora_jax.server.reply_grammar import call_grammar
from tests.data.loss_mask.reasoning_templates import HARMONY, QWEN3, R1, THINKING
from tests.server.conftest import Start
from tests.server.scripted_engine import wait_until

_TURNS = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}{% set f = call.function %}CALL{% endfor %}
    {{- END }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def turns(call: str, end: str = "'<|im_end|>\n'") -> str:
    return _TURNS.replace("CALL", call).replace("END", end)


# Short templates that write calls as published ones do.
CALLS = {
    "hermes": turns(
        "{{- '\n' if loop.index > 1 else '' }}{{- '<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' }}"
        "{{- f.arguments | tojson + '}\n</tool_call>' }}"
    ),
    "llama3": turns("{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}' }}"),
    "mistral": turns(
        "{{- '[TOOL_CALLS][' if loop.first else ', ' }}"
        '{{- \'{"name": "\' + f.name + \'", "arguments": \' + f.arguments | tojson }}'
        "{{- ', \"id\": \"' + call.id + '\"}' }}"
        "{{- ']' if loop.last else '' }}"
    ),
    "mistral_named": turns("{{- '[TOOL_CALLS]' + f.name + '[ARGS]' + f.arguments | tojson }}"),
    "qwen3_coder": turns(
        "{{- '\n' if loop.index > 1 else '' }}{{- '<tool_call>\n<function=' + f.name + '>\n' }}"
        "{%- for k, v in f.arguments.items() %}{{- '<parameter=' + k + '>\n' }}"
        "{{- (v if v is string else v | tojson) + '\n</parameter>\n' }}{% endfor %}{{- '</function>\n</tool_call>' }}"
    ),
    "glm": turns(
        "{{- '\n<tool_call>' + f.name }}{%- for k, v in f.arguments.items() %}{{- '\n<arg_key>' + k + '</arg_key>\n' }}"
        "{{- '<arg_value>' + (v if v is string else v | tojson) + '</arg_value>' }}{% endfor %}{{- '\n</tool_call>' }}",
        "''",
    ),
}
WEATHER = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "flags": {"type": "array", "items": {"type": "boolean"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather",
            "parameters": {"type": "object", "properties": WEATHER, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]


def with_template(tokenizer: Tokenizer, template: str, *special: str) -> Tokenizer:
    source = {"tokenizer_json": tokenizer.to_json(), "chat_template": template}
    loaded = load_tokenizer({**source, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    return with_new_tokens(loaded, [], special)


@pytest.fixture(scope="module", params=CALLS)
def calling(request, tokenizer) -> tuple[Tokenizer, ReplyFormat]:
    special = ("[TOOL_CALLS]", "[ARGS]") if request.param.startswith("mistral") else ()
    own = with_template(tokenizer, CALLS[request.param], *special)
    return own, reply_format(own)


def read(form: ReplyFormat, reply: str, prompt: str = "", pieces: int = 1, tools=TOOLS) -> list[Part]:
    """The parts of a reply that comes in pieces of some characters; neighbouring texts are joined."""
    reader, found = ReplyReader(form, prompt, tools), []
    for start in range(0, len(reply), pieces):
        found += reader.feed(reply[start : start + pieces])
    joined: list[Part] = []
    for part in [*found, *reader.feed("", last=True)]:
        if joined and isinstance(part, Text) and isinstance(joined[-1], Text) and part.kind == joined[-1].kind:
            joined[-1] = Text(part.kind, joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def written(tokenizer: Tokenizer, **turn) -> str:
    """Returns the text that the template writes for a turn, up to the token that ends it."""
    user, end = {"role": "user", "content": "Hi"}, "<|im_end|>"
    prompt = tokenizer.render([user], add_generation_prompt=True, tools=TOOLS)
    whole = tokenizer.render([user, {"role": "assistant", "content": "", **turn}], tools=TOOLS)
    assert whole.startswith(prompt)
    return whole[len(prompt) :].partition(end)[0]


def call(name: str, arguments: dict) -> dict:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


LETTERS = st.text(st.characters(exclude_categories=["C"]), max_size=12)
VALUES = st.fixed_dictionaries(
    {"city": LETTERS.filter(lambda text: "<" not in text and text == text.strip())},
    optional={"days": st.integers(-9, 99), "flags": st.lists(st.booleans(), max_size=2)},
)


@settings(max_examples=15)
@given(
    calls=st.lists(
        st.one_of(st.tuples(st.just("get_weather"), VALUES), st.tuples(st.just("now"), st.just({}))),
        min_size=1,
        max_size=3,
    ),
    pieces=st.integers(1, 40),
)
def test_what_a_template_writes_is_read_back(calling, calls, pieces):
    tokenizer, form = calling
    assert form.calls is not None
    if not form.calls.head.strip():
        calls = calls[:1]  # one JSON object is the whole reply
    reply = written(tokenizer, tool_calls=[call(*each) for each in calls])
    found = read(form, reply, pieces=pieces)
    assert [(each.name, json.loads(each.arguments)) for each in found if isinstance(each, Call)] == calls
    assert not [part for part in found if isinstance(part, Text)]


@settings(max_examples=15)
@given(text=st.text(max_size=30), pieces=st.integers(1, 9))
def test_text_without_calls_stays_as_it_is(calling, text, pieces):
    _, form = calling
    for tools in (TOOLS, []):
        found = read(form, text, pieces=pieces, tools=tools)
        assert "".join(part.text for part in found) == text.lstrip()


@pytest.mark.parametrize(
    "reply", ['<tool_call>\n{"name": 3}\n</tool_call> so.', "a <tool_call> b", '<tool_call>\n{"name": "now", ']
)
def test_what_begins_like_a_call_and_is_none_is_content(tokenizer, reply):
    form = reply_format(with_template(tokenizer, CALLS["hermes"]))
    found = read(form, reply)
    assert "".join(part.text for part in found).split() == reply.split()


def test_text_and_calls_may_alternate(tokenizer):
    form = reply_format(with_template(tokenizer, CALLS["hermes"]))
    one = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert read(form, f"First.\n{one}\nThen {one}{one}") == [
        Text("content", "First."),
        Call("now", "{}"),
        Text("content", "Then"),
        Call("now", "{}"),
        Call("now", "{}"),
    ]


def test_a_json_answer_of_llama_is_a_call_only_of_a_known_function(tokenizer):
    form = reply_format(with_template(tokenizer, CALLS["llama3"]))
    assert read(form, '{"name": "now", "parameters": {}}') == [Call("now", "{}")]
    assert read(form, '{"name": "other", "parameters": {}}') == [Text("content", '{"name": "other", "parameters": {}}')]
    assert read(form, '{"a": 1}') == [Text("content", '{"a": 1}')]


@pytest.mark.parametrize(
    ("template", "prompt", "reply"),
    [
        (QWEN3, "", "<think>\nIt is < so.\n</think>\n\nYes."),
        (THINKING, "<|im_start|>assistant\n<think>\n", "It is < so.\n</think>\n\nYes."),
        (R1, "<filename><think>\n", "It is < so.</think>Yes."),
        (
            HARMONY,
            "",
            "<gh_stars>analysis<file_sep>It is < so.<filename><|im_start|>assistant<gh_stars>final<file_sep>Yes.",
        ),
    ],
    ids=["qwen3", "thinking", "r1", "harmony"],
)
def test_reasoning_is_told_from_the_answer(tokenizer, template, prompt, reply):
    form = reply_format(with_template(tokenizer, template))
    for pieces in (1, 5, 1000):
        found = read(form, reply, prompt, pieces)
        assert found == [Text("reasoning", "It is < so."), Text("content", "Yes.")]
    cut = read(form, reply[: reply.index("<", reply.index("so."))], prompt)
    assert cut == [Text("reasoning", "It is < so.")]


def test_gpt_oss_calls_after_its_reasoning(tokenizer):
    form = reply_format(with_template(tokenizer, HARMONY))
    reply = (
        '<gh_stars>analysis<file_sep>Hm.<filename><|im_start|>assistant to=now<gh_stars>commentary<file_sep>{"a": 1}'
    )
    assert read(form, reply) == [Text("reasoning", "Hm."), Call("now", '{"a": 1}')]


def random_reply(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, seed: int) -> str | None:
    """A reply that a grammar allows, with random tokens; None if it does not end soon."""
    closing = [tokenizer.backend.token_to_id(letter) for letter in '"}]<Ċ']
    matcher, rng, ids = compiler.matcher(grammar, frozenset([tokenizer.eos_id])), np.random.default_rng(seed), []
    while not matcher.is_over and len(ids) < 200:
        bits = np.unpackbits(compiler.masks([matcher]).view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        allowed = np.flatnonzero(bits)
        if tokenizer.eos_id in allowed:
            break
        likely = np.intersect1d(allowed, closing)
        ids.append(int(rng.choice(likely if likely.size and len(ids) % 3 else allowed)))
        matcher.accept(ids[-1])
    return tokenizer.decode(ids) if len(ids) < 200 else None


@pytest.mark.slow  # masks over the whole vocabulary
@pytest.mark.parametrize("required", [["get_weather"], ["get_weather", "now"]])
def test_a_required_call_has_the_form_of_the_template(calling, required):
    tokenizer, form = calling
    grammar = call_grammar(form.calls, TOOLS, required, single=True, tokenizer=tokenizer)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    drawn = [random_reply(compiler, tokenizer, grammar, seed) for seed in range(3)]
    replies = [reply for reply in drawn if reply is not None]
    assert replies
    for reply in replies:
        (found,) = read(form, reply)
        assert isinstance(found, Call) and found.name in required
        if found.name == "get_weather":
            assert isinstance(json.loads(found.arguments)["city"], str)


OPTIONAL = {
    "$defs": {"Unit": {"enum": ["C", "F"], "type": "string"}, "Place": {"type": "object"}},
    "properties": {
        "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/Place"},
        "loop": {"anyOf": [{"$ref": "#/properties/loop"}]},
        "code": {"type": "string", "pattern": "a+"},
    },
    "required": ["days"],
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("days", "5", 5),
        ("days", "null", None),
        ("unit", "C", "C"),
        ("unit", "null", None),
        ("place", "{}", {}),
        ("loop", "7", "7"),
        ("code", "1", "1"),
    ],
)
def test_arguments_between_tags_have_the_types_of_their_schemas(tokenizer, key, text, value):
    tokenizer = dataclasses.replace(tokenizer, chat_template=CALLS["qwen3_coder"])
    tools = [{"type": "function", "function": {"name": "get", "parameters": OPTIONAL}}]
    reply = f"<tool_call>\n<function=get>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (call,) = ReplyReader(reply_format(tokenizer), "", tools).feed(reply, last=True)
    assert json.loads(call.arguments) == {key: value}


@pytest.mark.slow  # masks over the whole vocabulary
def test_arguments_between_tags_follow_their_schemas(tokenizer):
    tokenizer = dataclasses.replace(tokenizer, chat_template=CALLS["qwen3_coder"])
    form, compiler = reply_format(tokenizer).calls, GrammarCompiler(tokenizer, tokenizer.vocab_size)
    for key, wrong in (("days", "x"), ("unit", "K"), ("place", "1")):
        parameters = OPTIONAL | {"properties": {key: OPTIONAL["properties"][key]}, "required": [key]}
        tools = [{"type": "function", "function": {"name": "get", "parameters": parameters}}]
        grammar = call_grammar(form, tools, ["get"], single=True, tokenizer=tokenizer)
        matcher = compiler.matcher(grammar, frozenset([tokenizer.eos_id]))
        for token in tokenizer.encode(f"<tool_call>\n<function=get>\n<parameter={key}>\n"):
            matcher.accept(token)
        allowed = np.unpackbits(compiler.masks([matcher]).view(np.uint8), bitorder="little")
        assert not allowed[tokenizer.encode(wrong)[0]] and allowed[tokenizer.backend.token_to_id("n")] == (
            key != "place"
        )
    for parameters in (OPTIONAL, {"properties": 3}):
        tools = [{"type": "function", "function": {"name": "get", "parameters": parameters}}]
        with pytest.raises(ApiError, match="tools: "):
            call_grammar(form, tools, ["get"], single=True, tokenizer=tokenizer)


# ---- through the server

HI = [{"role": "user", "content": "Hi"}]
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def script(request: Request) -> str:
    """A call, a reply with reasoning, or JSON, by the seed."""
    return [f"<think>\nHm.\n</think>\n\n{CALL}\n{CALL[12:]}", "<think>\nHm.\n</think>\n\nIt rains.", '{"a": 1}'][
        request.sampling.seed
    ]


@pytest.fixture(scope="module")
def served(serve: Start):
    with serve(script) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_calls_reach_the_client(client, stream):
    settings = {"model": "a", "messages": HI, "tools": TOOLS, "seed": 0}
    if stream:
        with client.chat.completions.stream(**settings) as events:
            for _ in events:
                pass
            choice = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**settings).choices[0]
    message = choice.message
    assert choice.finish_reason == "tool_calls" and message.content == "Let me see."
    assert message.model_extra["reasoning_content"] == "Hm."
    assert [(one.function.name, one.function.arguments) for one in message.tool_calls] == [
        ("get_weather", '{"city": "Ulm"}')
    ] * 2
    assert len({one.id for one in message.tool_calls}) == 2


def test_a_reply_may_have_one_call_at_most(client, served):
    for tools in (
        {"parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ):
        found = client.chat.completions.create(model="a", messages=HI, tools=TOOLS, seed=0, **tools).choices[0]
        assert len(found.message.tool_calls) == 1 and found.finish_reason == "tool_calls"
    wait_until(lambda: not served.engine.running)


def test_without_tools_there_are_no_calls(client, served):
    for given_tools in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        found = client.chat.completions.create(model="a", messages=HI, seed=0, **given_tools).choices[0]
        assert found.message.tool_calls is None and "<tool_call>" in found.message.content
        assert found.finish_reason == "stop"
        prompt = served.engine.seen[-1].prompt
        assert "get_weather" not in served.service.models.get("a").tokenizer.decode(prompt)


def test_reasoning_has_a_field(client):
    message = client.chat.completions.create(model="a", messages=HI, seed=1).choices[0].message
    assert message.content == "It rains." and message.model_extra["reasoning_content"] == "Hm."
    chunks = [*client.chat.completions.create(model="a", messages=HI, seed=1, stream=True)]
    reasoning = "".join(chunk.choices[0].delta.model_extra.get("reasoning_content", "") for chunk in chunks)
    assert reasoning == "Hm."


def test_a_conversation_with_tools_is_rendered_as_in_training(client, served):
    calls = [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}]
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "Hm.", "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    client.chat.completions.create(model="a", messages=messages, tools=TOOLS, seed=1)
    tokenizer = served.service.models.get("a").tokenizer
    expected = [{**messages[1], "tool_calls": [call("get_weather", {"city": "Ulm"})]}, messages[2]]
    rendered = tokenizer.render([*HI, *expected], add_generation_prompt=True, tools=TOOLS)
    assert tokenizer.decode(served.engine.seen[-1].prompt) == rendered


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}},
            "json_schema",
            '{"type": "integer"}',
        ),
        ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, "regex", "a+"),
        ({"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}}, "choice", '["a", "b"]'),
        ({"extra_body": {"structured_outputs": {"json": {"type": "null"}}}}, "json_schema", '{"type": "null"}'),
        ({"extra_body": {"structured_outputs": {"grammar": "start: /a/"}}}, "lark", "start: /a/"),
    ],
)
def test_restrictions_reach_the_engine(client, served, settings, kind, text):
    client.chat.completions.create(model="a", messages=HI, seed=2, **settings)
    assert served.engine.seen[-1].grammar == Grammar(kind=kind, text=text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tool_choice": "required"}, "'required' without tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x' is not one of tools"),
        ({"tools": TOOLS * 2}, "two functions have the same name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type: found 'custom'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema: expected"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS, "tool_choice": "required"}, "found tools too"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "found tools too"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "strict": True}}]},
            "tools.0.function.strict: kept",
        ),
        ({"extra_body": {"structured_outputs": {}}}, "found 0 restrictions"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "found 2 restrictions"),
        ({"extra_body": {"guided_json": {}}}, "guided_json: found"),
    ],
)
def test_restrictions_that_cannot_be_kept_are_refused(client, settings, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="a", messages=HI, **settings)
