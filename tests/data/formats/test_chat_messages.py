"""OpenAI's other forms of messages: content in parts, and calls of functions before tools existed."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_jax.data.formats.chat_messages import current_messages
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.formats.turn_fields import read_tools
from qlora_jax.data.holdout import content_hash
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.formats.test_tool_calls import HERMES, WEATHER
from tests.data.loading import load

# A template that reads parts itself, as those of vision models do.
READS_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def parts(*texts: str, kind: str = "text") -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


def row_of(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [*messages], **columns}


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_content_in_parts_gives_the_ids_of_their_joined_text(tokenizer: Tokenizer, write_rows: Callable, kind: str):
    joined = row_of(turn("system", "Be brief."), turn("user", "Is 7\nprime?"), turn("assistant", "Yes."))
    in_parts = row_of(
        turn("system", parts("Be brief.", kind=kind)),
        turn("user", parts("Is 7\n", "prime?", kind=kind)),
        turn("assistant", parts("Y", "es.", kind=kind)),
    )
    data = load(tokenizer, train=write_rows([joined, in_parts]))
    (ids, mask), (other_ids, other_mask) = data.train.row(0), data.train.row(1)
    assert ids.tolist() == other_ids.tolist() and mask.tolist() == other_mask.tolist()
    assert content_hash(FORMATS["messages"], joined) == content_hash(FORMATS["messages"], in_parts)


def test_parts_are_joined_as_a_template_joins_them(smollm2_source: dict[str, Any]):
    reads_parts = load_tokenizer({**smollm2_source, "chat_template": READS_PARTS})
    messages = [turn("user", parts("one\n", " two", "")), turn("assistant", parts("three"))]
    assert reads_parts.render(messages) == reads_parts.render(current_messages(messages))


def test_messages_of_today_are_not_copied():
    messages = [turn("user", "Q", name="Ann"), turn("assistant", "A", function_call=None), turn("function", "F")]
    assert current_messages(messages) is messages


FUNCTION = WEATHER["function"]


@pytest.fixture
def hermes(smollm2_source: dict[str, Any]) -> Tokenizer:
    return load_tokenizer({**smollm2_source, "chat_template": HERMES})


def test_function_calls_give_the_ids_of_tool_calls(hermes: Tokenizer, write_rows: Callable):
    call = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    ask, end = turn("user", "Weather?"), turn("assistant", "Dry.")
    deprecated = row_of(
        ask, turn("assistant", None, function_call=call), turn("function", "dry", name="weather"), end,
        functions=[FUNCTION],
    )  # fmt: skip
    today = row_of(
        ask, turn("assistant", None, tool_calls=[{"type": "function", "function": call}]), turn("tool", "dry"), end,
        tools=[{"type": "function", "function": FUNCTION}],
    )  # fmt: skip
    data = load(hermes, train=write_rows([deprecated, today]))
    assert data.train.row(0)[0].tolist() == data.train.row(1)[0].tolist()
    assert '{"name": "weather", "arguments": {"city": "Ulm"}}' in hermes.decode(data.train.row(0)[0].tolist())
    assert data.report.train.ignored_columns == ()


def test_the_functions_of_a_row_are_its_tools_unless_it_has_tools():
    tools = [{"type": "function", "function": FUNCTION}]
    assert read_tools({"functions": [FUNCTION]}) == read_tools({"functions": json.dumps([FUNCTION])}) == tools
    assert read_tools({"functions": [{"name": "other"}], "tools": tools}) == tools
    assert read_tools({"functions": [], "tools": None}) is None


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (
            [turn("user", [*parts("What is this?"), IMAGE]), turn("assistant", "A cat.")],
            "message 0: part 1 of content is 'image_url', and only text can be learned. Remove such parts or rows",
        ),
        ([turn("user", [{"type": "input_audio"}]), turn("assistant", "A")], "message 0: part 0 of content is 'input_a"),
        ([turn("user", ["Q"]), turn("assistant", "A")], "message 0: part 0 of content is not an object like {"),
        ([turn("user", [{"type": ["text"]}]), turn("assistant", "A")], "part 0 of content is not an object like {"),
        ([turn("user", [{"type": "text", "text": 3}]), turn("assistant", "A")], "message 0: part 0 of content has no"),
        ([turn("user", "Q"), turn("assistant", [])], "content of message 1 (assistant) is empty"),
        ([turn("user", "Q"), turn("assistant", parts(" ", "\n"))], "content of message 1 (assistant) is empty"),
        (
            [turn("user", parts("\ud83d")), turn("assistant", "A")],
            "content of message 0 (user) contains half of a surr",
        ),
        ([turn("assistant", None, function_call="f()")], "message 0: function_call is not an object like {"),
        ([turn("assistant", None, function_call={"name": "f"})], "message 0: tool call 0 needs a function with 'name'"),
        (
            [turn("assistant", None, function_call={"name": "f", "arguments": "{"})],
            "message 0: the arguments of tool call 0 are not JSON",
        ),
        (
            [turn("assistant", None, function_call={"name": "f"}, tool_calls=[{"name": "f", "arguments": {}}])],
            "message 0 has both function_call and tool_calls. Remove one of them",
        ),
    ],
)
def test_parts_and_calls_that_cannot_be_learned_are_reported(messages: list[dict[str, Any]], problem: str):
    assert problem in "; ".join(FORMATS["messages"].check({"messages": messages}))


def test_parts_that_are_not_text_are_reported_by_line(tokenizer: Tokenizer, write_rows: Callable):
    good = row_of(turn("user", parts("Q")), turn("assistant", "A"))
    bad = row_of(turn("user", [IMAGE]), turn("assistant", "A"))
    with pytest.raises(ValueError, match=r"1 of 2 rows can't be used:\n.*jsonl:2: message 0: part 0 .* 'image_url'"):
        load(tokenizer, train=write_rows([good, bad]))


def test_wrong_functions_are_reported():
    row = row_of(turn("user", "Q"), turn("assistant", "A"), functions={"name": "f"})
    assert FORMATS["messages"].check(row) == ["functions is not a list of JSON schemas"]
