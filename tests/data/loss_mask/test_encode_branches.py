"""Every assistant turn is learned behind the ids that inference gives the model, for templates that rewrite turns."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.branch_tree import branch_ends, branch_problem
from qlora_jax.data.encoder import Encoder, make_encoder
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.loss_mask.reference import EncodedRow, mask_branches
from qlora_jax.data.loss_mask.spans import conversation_segments
from qlora_jax.data.loss_mask.turns import turn_marks
from qlora_jax.data.readers.files import Place, Problem, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_template_kwargs
from qlora_jax.inference.prompts import prompter
from qlora_jax.inference.terminal_chat import Conversation
from tests.data.loss_mask.cases import as_lists
from tests.data.loss_mask.reasoning_templates import REASONING_TEMPLATES

Chat = list[dict[str, Any]]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
OFF = {"enable_thinking": False}
# (template, its variables): all that a template is tested with.
CASES = [*((name, {}) for name in REASONING_TEMPLATES), ("qwen3", OFF), ("smollm3", OFF), ("r1", OFF)]
FAST = ("qwen3", {})
of_templates = pytest.mark.parametrize(
    ("name", "variables"),
    [
        pytest.param(*case, id=case[0] + "-off" * bool(case[1]), marks=() if case == FAST else pytest.mark.slow)
        for case in CASES
    ],
)


@pytest.fixture(scope="module")
def tokenizers(smollm2_source: dict) -> dict[str, Tokenizer]:
    """Tokenizers by the name of their template."""
    found = {}
    for name, template in REASONING_TEMPLATES.items():
        found[name] = load_tokenizer({**smollm2_source, "chat_template": template})
    return found


def encode(encoder: Encoder, chat: Chat, tools: object = None) -> EncodedRow:
    problems: list[Problem] = []
    texts = encoder.segment_rows([Row(Place(1, 0), {"messages": chat, "tools": tools})], problems)
    _, rows = encoder.mask_rows(texts, encoder.encode_texts(texts), problems)
    assert not problems, problems
    return rows[0]


def learned_turns(row: EncodedRow) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (ids that the model sees before the turn, ids of the turn) of all runs of supervised ids."""
    trunk = row.branches[0].begin if row.branches else len(row.ids)
    texts = [(row.ids[:trunk], row.supervised[:trunk])]
    for branch, end in zip(row.branches, branch_ends(row.branches, len(row.ids)), strict=True):
        ids = np.concatenate([row.ids[: branch.depth], row.ids[branch.begin : end]])
        mask = np.concatenate([np.zeros(branch.depth, bool), row.supervised[branch.begin : end]])
        texts.append((ids, mask))
    for ids, mask in texts:
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2):
            yield ids[:start].tolist(), ids[start:stop].tolist()


def prompts(tokenizer: Tokenizer, chat: Chat, tools: Any = None) -> list[list[int]]:
    """The ids of the prompts that inference builds for the turns of the assistant."""
    turns = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    return [tokenizer.encode(tokenizer.render(chat[:n], add_generation_prompt=True, tools=tools)) for n in turns]


texts = st.sampled_from(["4", "two words", "a\nb", "    code", "é\u0301", "\n\nx ", "5 < 6"])
answers = texts | st.sampled_from(["Yes.", "\tindented"])


@st.composite
def reasoning_chats(draw: st.DrawFn, name: str) -> Chat:
    """Turns with reasoning in a field, in the content, or without; sometimes a question without an answer last."""
    chat: Chat = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        chat.append({"role": "user", "content": draw(texts)})
        form = draw(st.sampled_from(["field", "content", "none"]))
        answer = {"role": "assistant", "content": draw(answers)}
        if form == "field":
            answer["reasoning_content"] = draw(texts)
        if form == "content" and name != "harmony":
            answer["content"] = f"<think>\n{draw(texts).strip()}\n</think>\n\n{answer['content'].strip()}"
        chat.append(answer)
    return [*chat, {"role": "user", "content": draw(texts)}] if draw(st.booleans()) else chat


def thought_chat(turns: int) -> Chat:
    """Questions q1, q2, ... with the answers a1, a2, ... and their reasoning r1, r2, ..."""
    return [
        message
        for n in range(1, turns + 1)
        for message in (
            {"role": "user", "content": f"q{n}"},
            {"role": "assistant", "content": f"a{n}", "reasoning_content": f"r{n}"},
        )
    ]


def check_row(tokenizer: Tokenizer, row: EncodedRow, chat: Chat, tools: Any = None) -> None:
    """Each turn is learned once, after its prompt, and ends with a special token."""
    assert branch_problem(row.branches, row.supervised) is None
    turns = [*learned_turns(row)]
    assert sorted(prompt for prompt, _ in turns) == sorted(prompts(tokenizer, chat, tools))
    for _, reply in turns:
        assert tokenizer.special_text.fullmatch(tokenizer.decode(reply[-1:]))


@of_templates
def test_turns_are_behind_the_prompts_of_inference(tokenizers: dict, name: str, variables: dict):
    tokenizer = with_template_kwargs(tokenizers[name], variables, "chat_template_kwargs")
    encoder, marks = make_encoder(FORMATS["messages"], tokenizer), turn_marks(tokenizer)

    @settings(max_examples=15)
    @given(reasoning_chats(name))
    def check(chat: Chat):
        row, written = encode(encoder, chat), conversation_segments(tokenizer, marks, chat)
        assert bool(row.branches) == bool(written.branches)
        if row.branches:
            assert as_lists(row) == as_lists(mask_branches(tokenizer, written))
            check_row(tokenizer, row, chat)
        else:  # one text, whose ids are those of test_reference.py
            turns = [tokenizer.decode(prompt) for prompt, _ in learned_turns(row)]
            assert turns == [tokenizer.decode(prompt) for prompt in prompts(tokenizer, chat)]

    check()


def call(**extra: str) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": 1}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **extra}


@pytest.mark.parametrize("name", ["qwen3", "thinking", "harmony"])
def test_a_loop_of_tool_calls_is_one_branch(tokenizers: dict, name: str):
    """The reasoning of a loop stays until the next question. Then the template drops it, and a branch keeps it."""
    tokenizer = tokenizers[name]
    loop = [
        call(reasoning_content="r1"),
        {"role": "tool", "content": "t1"},
        call(reasoning_content="r2"),
        {"role": "tool", "content": "t2"},
    ]
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r3"}
    chat = [{"role": "user", "content": "q"}, *loop, answer]
    later = [*chat, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "b", "reasoning_content": "r4"}]
    tools = None if name == "harmony" else TOOLS
    encoder = make_encoder(FORMATS["messages"], tokenizer)
    short, long = encode(encoder, chat, tools), encode(encoder, later, tools)
    check_row(tokenizer, short, chat, tools)
    check_row(tokenizer, long, later, tools)
    # gpt-oss drops the reasoning of calls from the conversation once the answer follows, but not from its prompt.
    assert (len(short.branches), len(long.branches)) == (int(name == "harmony"), 1)
    whole = np.concatenate([long.ids[: long.branches[0].depth], long.ids[long.branches[0].begin :]]).tolist()
    prompt = prompts(tokenizer, chat, tools)[2]
    assert whole[: len(prompt)] == prompt and all(f"r{n}" in tokenizer.decode(whole) for n in (1, 2, 3))


def test_the_ids_of_a_conversation(tokenizers: dict):
    """Spells out the trunk, the branch, the place where it leaves the trunk, and the learned ids."""
    chat = thought_chat(2)
    tokenizer = tokenizers["qwen3"]
    row = encode(make_encoder(FORMATS["messages"], tokenizer), chat)
    (branch,) = row.branches
    asked = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    trunk = asked + "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.ids[: branch.begin].tolist()) == trunk + "<think>\nr2\n</think>\n\na2<|im_end|>"
    assert tokenizer.decode(row.ids[branch.begin :].tolist()) == "\n<think>\nr1\n</think>\n\na1<|im_end|>"
    assert branch.depth == len(tokenizer.encode(asked)) - 1
    assert tokenizer.decode(row.ids[row.supervised].tolist()) == (
        "<think>\nr2\n</think>\n\na2<|im_end|><think>\nr1\n</think>\n\na1<|im_end|>"
    )


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        ({"content": "a", "reasoning_content": "r"}, "r\n</think>\n\na<|im_end|>"),
        ({"content": "<think>\nr\n</think>\n\na"}, "r\n</think>\n\na<|im_end|>"),
        ({"content": "r\n</think> a"}, "r\n</think> a<|im_end|>"),
        ({"content": "a"}, "\n</think>\n\na<|im_end|>"),
    ],
)
def test_a_prompt_that_opens_the_reasoning(tokenizers: dict, message: Mapping[str, str], reply: str):
    """The model writes the reasoning and closes it, although the template would write neither."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", **message}]
    tokenizer = tokenizers["r1"]
    ((prompt, learned),) = learned_turns(encode(make_encoder(FORMATS["messages"], tokenizer), chat))
    assert tokenizer.decode(prompt) == "<file_sep>q<filename><think>\n"
    assert tokenizer.decode(learned) == reply


def test_the_last_turn_alone_or_all_of_the_text(tokenizers: dict):
    chat = thought_chat(2)
    for name in ("qwen3", "r1"):
        tokenizer = tokenizers[name]
        last = encode(make_encoder(FORMATS["messages"], tokenizer, "last"), chat)
        assert last.branches == () and last.unseen_reasoning
        ((prompt, _),) = learned_turns(last)
        assert prompt == prompts(tokenizer, chat)[-1]
        whole = encode(make_encoder(FORMATS["messages"], tokenizer, "all"), chat)
        assert whole.branches == () and whole.supervised.all()
        assert whole.ids.tolist() == tokenizer.encode(tokenizer.render(chat))


def test_reasoning_that_the_template_drops_is_counted(tokenizers: dict):
    question = {"role": "user", "content": "q"}
    field = [question, {"role": "assistant", "content": "a", "reasoning_content": "why"}]
    content = [question, {"role": "assistant", "content": "<think>why</think>a"}]
    unseen = {
        name: [
            encode(make_encoder(FORMATS["messages"], tokenizers[name]), chat).unseen_reasoning
            for chat in (field, content)
        ]
        for name in ("chatml", "qwen3", "r1", "smollm3")
    }
    assert unseen == {"chatml": [True, False], "qwen3": [False] * 2, "r1": [False] * 2, "smollm3": [True, False]}


def content_chat(turns: int) -> Chat:
    """The questions and answers of `thought_chat`, with the reasoning in the content."""
    return [
        {
            "role": message["role"],
            "content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}",
        }
        if message["role"] == "assistant"
        else message
        for message in thought_chat(turns)
    ]


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "r1"])
def test_without_thinking_no_reasoning_is_learned(tokenizers: dict, name: str):
    """The prompt closes the block of reasoning, so the reply is the answer alone, and the reasoning is counted."""
    tokenizer = with_template_kwargs(tokenizers[name], OFF, "chat_template_kwargs")
    row = encode(make_encoder(FORMATS["messages"], tokenizer), content_chat(2))
    assert sorted(tokenizer.decode(reply) for _, reply in learned_turns(row)) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert row.unseen_reasoning


@pytest.mark.parametrize(
    ("name", "variables"),
    [("qwen3", {}), ("thinking", {}), ("r1", {}), ("smollm3", {}), ("chatml", {}), ("qwen3", OFF)],
)
def test_a_chat_builds_the_prompts_of_training(tokenizers: dict, name: str, variables: dict):
    """`generate` gets the replies that the row has, and asks with the ids before each turn of the row."""
    tokenizer = with_template_kwargs(tokenizers[name], variables, "chat_template_kwargs")
    row = encode(make_encoder(FORMATS["messages"], tokenizer), content_chat(3))
    replies = {tuple(prompt): reply for prompt, reply in learned_turns(row)}
    history = Conversation(prompter(tokenizer, raw=False, system=None))
    for number in (1, 2, 3):
        reply = replies.pop(tuple(history.ask(f"q{number}")))
        history.add(f"q{number}", tokenizer.decode(reply[:-1]))
    assert not replies


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_public_names_of_the_field(tokenizers: dict, name: str):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", name: "why"}]
    for template in ("qwen3", "harmony"):
        row = encode(make_encoder(FORMATS["messages"], tokenizers[template]), chat)
        assert "why" in tokenizers[template].decode(row.ids[row.supervised].tolist())


def test_special_tokens_that_swallow_spaces(smollm2_source: dict):
    whole = json.loads(smollm2_source["tokenizer_json"])
    for token in whole["added_tokens"]:
        token["rstrip"] = True
    source = {**smollm2_source, "tokenizer_json": json.dumps(whole), "chat_template": REASONING_TEMPLATES["qwen3"]}
    tokenizer = load_tokenizer(source)
    turn = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    chat = [{"role": "user", "content": "q"}, turn, {"role": "user", "content": "q2"}, turn]
    check_row(tokenizer, encode(make_encoder(FORMATS["messages"], tokenizer), chat), chat)
