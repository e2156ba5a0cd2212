"""Replies that call tools: ids, masks and messages equal TRL's, and limits hold."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config.rewards import RewardArgs
from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.objectives.policy_gradient import SAMPLER_LOGPS
from qlora_jax.rewards.functions import RewardFunctions
from qlora_jax.rollouts.reply import Reply
from qlora_jax.rollouts.rows import Group, replies_batch
from qlora_jax.rollouts.tool_template import ToolTemplate
from qlora_jax.rollouts.tool_turns import continue_with_tools
from tests.rollouts.tool_models import Script, byte_tokenizer, byte_tokenizer_json, call, first_requests, write_tools

SCRIPT = Path(__file__).parent.parent / "oracle/trl_tool_calls.py"
ORACLE = Path(os.environ.get("QLORA_ORACLE_PYTHON", ".oracle/bin/python")).parents[1]
END = "<|im_end|>"
NAMES = ("add", "fails", "later")
LONGEST = 220
TURNS = [
    ["no tool" + END],
    [f"Adding. {call('add', a=2, b=3)}{END}", f"It is 5.{END}"],
    [f"{call('add', a=1, b=1)}\n{call('fails', text='luck')}{END}", f"{call('later', text='x')}{END}", f"xxx{END}"],
    [f"{call('missing')}{END}", f"{call('add', a=1)}{END}", f"{call('add', a=1, b=2)}{END}", "cut." * 80],
    [f"{call('later', text='long')}{END}"],  # its answer does not fit
    [f"<tool_call>\n{{broken\n</tool_call>{END}"],
    ["never.ends." * 40],
    [f"{call('add', a=10**70, b=0)}{END}", "x" * 300],
]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    file = write_tools(tmp_path_factory.mktemp("tools"))
    with RewardFunctions(RewardArgs(functions=["exact"]), [], [f"{file}:{name}" for name in NAMES]) as found:
        found.file = file  # pyright: ignore[reportAttributeAccessIssue]
        yield found


def published(name: str) -> str:
    """Returns a template that TRL has a copy of."""
    found = next(ORACLE.glob(f"lib/python3*/site-packages/trl/chat_templates/{name}.jinja"), None)
    if found is None:
        pytest.skip("the oracle is missing: bash scripts/setup_oracle.sh")
    return found.read_text()


def prompts_of(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"reply {number}"}] for number in range(count)]


def replies_of(
    functions, turns, template=None, longest=LONGEST, iterations=None
) -> tuple[list[list[int]], list[Reply], Script]:
    """Returns (prompts, replies, the model that wrote them)."""
    tokenizer = byte_tokenizer() if template is None else byte_tokenizer(template)
    own = ToolTemplate(tokenizer, functions.tools.schemas, frozenset({tokenizer.eos_id}))
    prompts = [own.prompt(prompt, {}) for prompt in prompts_of(len(turns))]
    requests, script = first_requests(prompts, longest), Script(tokenizer, turns)
    settings = RolloutArgs(max_completion_length=longest, max_tool_calling_iterations=iterations)
    how = {"tools": functions.tools, "template": own, "variables": [{}] * len(turns), "settings": settings}
    return prompts, continue_with_tools(requests, script(requests), script, **how), script


@pytest.mark.slow  # the oracle imports torch
def test_replies_equal_those_of_trl(oracle, functions, tmp_path):
    names = [("qwen2_5", "qwen2_5"), ("qwen3", "qwen3_training"), ("qwen3_instruct_2507", "qwen3_instruct_2507")]
    cases = [(*map(published, pair), most) for pair in names for most in (None, 1)]
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer_json())
    found = oracle(
        SCRIPT,
        file=functions.file,
        names=NAMES,
        tokenizer=str(tmp_path / "tokenizer.json"),
        cases=cases,
        prompts=prompts_of(len(TURNS)),
        turns=TURNS,
        max_completion_length=LONGEST,
    )
    for (_, template, most), expected in zip(cases, json.loads(str(found["json"])), strict=True):
        prompts, replies, _ = replies_of(functions, TURNS, template, iterations=most)
        assert prompts == expected["prompts"]
        assert [reply.ids for reply in replies] == expected["ids"]
        assert [[*map(int, reply.drawn)] for reply in replies] == expected["mask"]
        assert [reply.logps for reply in replies] == expected["logps"]
        assert [reply.messages for reply in replies] == expected["messages"]
        calls, failed = (sum(getattr(reply, each) for reply in replies) for each in ("calls", "failed_calls"))
        shares = {
            "tools/call_frequency": calls / len(replies),
            "tools/failure_frequency": failed / calls,
            "completions/mean_length": np.mean([reply.length for reply in replies]),
            "completions/clipped_ratio": np.mean([reply.is_cut for reply in replies]),
        }
        assert shares == pytest.approx({name: expected["metrics"][name] for name in shares}, rel=1e-6)


def test_answers_of_tools_are_in_a_reply_and_not_trained(functions):
    prompts, replies, _ = replies_of(functions, TURNS)
    tokenizer = byte_tokenizer()
    for reply in replies:
        assert len(reply.ids) == len(reply.drawn) <= LONGEST
        assert reply.logps == [-1.0 if drawn else 0.0 for drawn in reply.drawn]
    assert [reply.calls for reply in replies] == [0, 1, 3, 2, 1, 0, 0, 1]
    assert [reply.failed_calls for reply in replies] == [0, 0, 1, 2, 0, 0, 0, 0]
    answer = f"\n<|im_start|>tool\n5{END}\n<|im_start|>assistant\n"
    assert tokenizer.decode(replies[1].ids) == f"{replies[1].text}{END}" == TURNS[1][0] + answer + TURNS[1][1]
    undrawn = [token for token, drawn in zip(replies[1].ids, replies[1].drawn, strict=True) if not drawn]
    assert tokenizer.decode(undrawn) == answer
    group = Group(0, prompts[1], replies[:3], [True, True, False])
    batch = replies_batch([group], {}, [2048], (1, 1), pad_id=0, position=None)
    assert batch.weights.sum() == replies[0].length + replies[1].length
    trained = batch.weights[0, 0].astype(bool)
    assert tokenizer.decode(batch.targets[0, 0][trained].tolist()) == TURNS[0][0] + TURNS[1][0] + TURNS[1][1]
    np.testing.assert_array_equal(batch.token_values[SAMPLER_LOGPS][0, 0][trained], -1.0)


def test_ids_of_earlier_turns_are_kept_where_a_template_drops_reasoning(functions):
    turns = [[f"<think>\nI add\n</think>\n\n{call('add', a=2, b=3)}{END}", f"<think>\nWell\n</think>\n\nIt is 5.{END}"]]
    (prompt,), (reply,), script = replies_of(functions, turns, published("qwen3"))
    (first,), (second,), *_ = script.requests
    tokenizer = byte_tokenizer()
    assert first.prompt == prompt and second.prompt[: len(prompt)] == prompt
    assert tokenizer.decode(second.prompt[len(prompt) :]).startswith(
        turns[0][0] + "\n<|im_start|>user\n<tool_response>\n5"
    )
    assert reply.messages[0]["reasoning_content"] == "I add" and reply.messages[-1]["content"] == "It is 5."
    # The template itself writes the conversation without the reasoning.
    whole = [{"role": "user", "content": "reply 0"}, *reply.messages, {"role": "user", "content": "?"}]
    assert "I add" not in byte_tokenizer(published("qwen3")).render(whole)
