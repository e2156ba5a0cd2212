"""A template of gpt-oss's form: channels, reasoning that later prompts drop, calls of tools, and a date.

It is a short form of the published one, with its tokens: the last answer ends with <|return|>, earlier ones with
<|end|>, and calls with <|call|>. Reasoning stands before the last answer, and before calls that no answer follows.
"""

from typing import Any

import pytest

from qlora_jax.data.encoder import make_encoder
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.readers.files import Place, Problem, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_new_tokens, with_template_kwargs
from tests.data.branches.test_encoder import encoded, texts_of
from tests.data.loss_mask.test_encode_branches import check_row, encode, learned_turns

TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"]
GPT_OSS = """
{%- macro said(header, text, end) %}{{ '<|start|>' + header + '<|message|>' + text + end }}{% endmacro %}
{%- macro think(text) %}{{ said('assistant<|channel|>analysis', text, '<|end|>') }}{% endmacro %}
{%- set first = messages[0] %}
{%- set rules = first.content if first.role in ['system', 'developer'] else '' %}
{%- set effort = reasoning_effort | default('medium') %}
{%- set head = 'Date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' + effort + '\n\n# Channels: analysis, final' %}
{{- said('system', head + ('\nTools: functions, by commentary.' if tools else ''), '<|end|>') }}
{%- if rules or tools %}
    {%- set types = namespace(text='') %}
    {%- for tool in tools or [] %}
        {%- set parameters = tool.function.parameters | tojson %}
        {%- set types.text = types.text + 'type ' + tool.function.name + ' = (_: ' + parameters + ');\n' %}
    {%- endfor %}
    {%- set listed = '\n\n# Tools\n\n' + types.text if tools else '' %}
    {{- said('developer', '# Instructions\n\n' + rules + listed, '<|end|>') }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- set rest = messages[1:] if rules else messages %}
{%- for message in rest %}
    {%- if message.role == 'assistant' %}
        {%- for key in ['content', 'thinking'] %}
            {%- if key in message and '<|channel|>' in message[key] %}{{ raise_exception(key) }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message.role == 'user' %}{{ said('user', message.content, '<|end|>') }}
    {%- elif message.role == 'tool' %}
        {%- if called.name is none %}{{ raise_exception('a result without a call') }}{% endif %}
        {%- set header = 'functions.' + called.name + ' to=assistant<|channel|>commentary' %}
        {{- said(header, message.content | tojson, '<|end|>') }}
    {%- elif 'tool_calls' in message %}
        {%- set later = namespace(answer=false) %}
        {%- for other in rest[loop.index:] %}
            {%- if other.role == 'assistant' and 'tool_calls' not in other %}{% set later.answer = true %}{% endif %}
        {%- endfor %}
        {%- if message.content and message.thinking %}{{ raise_exception('content and thinking in a call') }}{% endif %}
        {%- set thought = message.content or message.thinking %}
        {%- if thought and not later.answer %}{{ think(thought) }}{% endif %}
        {%- set call = message.tool_calls[0].function %}{% set called.name = call.name %}
        {%- set header = 'assistant to=functions.' + call.name + '<|channel|>commentary json' %}
        {{- said(header, call.arguments | tojson, '<|call|>') }}
    {%- elif loop.last and not add_generation_prompt %}
        {%- if 'thinking' in message %}{{ think(message.thinking) }}{% endif %}
        {{- said('assistant<|channel|>final', message.content, '<|return|>') }}
    {%- else %}{% set called.name = none %}{{ said('assistant<|channel|>final', message.content, '<|end|>') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

Chat = list[dict[str, Any]]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
SYSTEM = {"role": "developer", "content": "Be brief."}


@pytest.fixture(scope="module")
def gpt_oss(smollm2_source: dict) -> Tokenizer:
    return with_new_tokens(load_tokenizer({**smollm2_source, "chat_template": GPT_OSS}), [], TOKENS)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, reasoning: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"reasoning_content": reasoning} if reasoning else {})}


def call(number: int, **extra: str) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": number}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **extra}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


LOOP = [
    user("q1"),
    call(1, reasoning_content="r1"),
    result('"two"'),
    call(2, reasoning_content="r2"),
    result("3"),
    answer("a1", "r3"),
]


@pytest.mark.parametrize(
    ("chat", "tools"),
    [
        ([user("q1"), answer("a1", "r1"), user("q2"), answer("a2", "r2"), user("q3"), answer("a3")], None),
        ([SYSTEM, user("q1"), answer("a1"), user("q2"), answer("a2", "r2"), user("q3")], None),
        (LOOP, TOOLS),
        ([SYSTEM, *LOOP, user("q2"), call(3, content="I add"), result("6"), answer("a2", "r4")], TOOLS),
        (LOOP[:4], TOOLS),
    ],
    ids=["reasoning", "developer", "calls", "calls and turns", "last is a call"],
)
@pytest.mark.parametrize("variables", [{}, {"reasoning_effort": "high"}])
def test_turns_are_learned_behind_the_prompts_of_inference(gpt_oss: Tokenizer, chat: Chat, tools: Any, variables: dict):
    tokenizer = with_template_kwargs(gpt_oss, variables, "chat_template_kwargs")
    row = encode(make_encoder(FORMATS["messages"], tokenizer), chat, tools)
    check_row(tokenizer, row, chat, tools)
    learned = "".join(tokenizer.decode(reply) for _, reply in learned_turns(row))
    reasoning = [message["reasoning_content"] for message in chat if "reasoning_content" in message]
    assert all(learned.count(f"analysis<|message|>{one}<|end|>") == 1 for one in reasoning) and not row.unseen_reasoning
    assert ("Reasoning: high" in tokenizer.decode(row.ids.tolist())) == bool(variables)


def test_the_texts_that_the_model_learns_to_write(gpt_oss: Tokenizer):
    """Each reply goes through the token that ends generation; the headers of its channels are a part of it."""
    row = encode(make_encoder(FORMATS["messages"], gpt_oss), [*LOOP, user("q2"), answer("a2", "r4")], TOOLS)
    replies = {gpt_oss.decode(reply) for _, reply in learned_turns(row)}
    think = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>{}<|return|>"
    called = ' to=functions.add<|channel|>commentary json<|message|>{{"a": {}}}<|call|>'
    assert replies == {
        think.format("r1") + called.format(1),
        think.format("r2") + called.format(2),
        think.format("r3") + final.format("a1"),
        think.format("r4") + final.format("a2"),
    }


def test_keys_without_a_value_are_left_out(gpt_oss: Tokenizer):
    """Published rows have `thinking` in every message and `content` in calls; the template looks into both."""
    chat = [{"content": None, "thinking": None, **message} for message in [*LOOP[:3], user("q2"), answer("a2")]]
    chat[1]["thinking"], chat[-1]["thinking"] = chat[1].pop("reasoning_content"), "r2"
    replies = [
        gpt_oss.decode(reply)
        for _, reply in learned_turns(encode(make_encoder(FORMATS["messages"], gpt_oss), chat, TOOLS))
    ]
    assert "<|channel|>analysis<|message|>r2<|end|><|start|>assistant<|channel|>final<|message|>a2<|return|>" in replies
    assert sum("analysis<|message|>r1<|end|>" in reply for reply in replies) == 1
    assert (
        gpt_oss.decode(encode(make_encoder(FORMATS["messages"], gpt_oss), chat, TOOLS).ids.tolist()).count("None") == 0
    )


def test_an_answer_of_a_pair_is_that_of_sft(gpt_oss: Tokenizer):
    """The text of the call is reasoning in the prompt, and the template drops it once an answer follows."""
    prompt, chosen, rejected = [user("q"), call(3, content="I add"), result("6")], answer("a", "r"), answer("b")
    (pair,) = encoded(gpt_oss, [{"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "tools": TOOLS}])
    for (ids, mask), last in zip(texts_of(pair), (chosen, rejected), strict=True):
        ((asked, reply),) = learned_turns(
            encode(make_encoder(FORMATS["messages"], gpt_oss, "last"), [*prompt, last], TOOLS)
        )
        assert (ids, [*map(bool, mask)]) == (asked + reply, [False] * len(asked) + [True] * len(reply))


def problem_of(tokenizer: Tokenizer, chat: Chat) -> str:
    problems: list[Problem] = []
    rows = [Row(Place(1, 0), {"messages": chat, "tools": TOOLS})]
    make_encoder(FORMATS["messages"], tokenizer).begin(rows, problems)()(problems)
    ((_, problem),) = problems
    return problem


def test_rows_that_the_template_cannot_write_are_refused(gpt_oss: Tokenizer):
    both = call(1, content="I add", reasoning_content="r")
    assert "content and thinking in a call" in problem_of(gpt_oss, [user("q"), both, result("2"), answer("a")])
    two = call(1)
    two["tool_calls"] = [*two["tool_calls"], {"type": "function", "function": {"name": "other", "arguments": {}}}]
    assert "drops 'other' of message 1" in problem_of(gpt_oss, [user("q"), two, result("2"), answer("a")])
